"""Softmax over the past."""
