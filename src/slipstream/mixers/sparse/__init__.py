"""Softmax over a part of the past: by position, or by what was found there."""
