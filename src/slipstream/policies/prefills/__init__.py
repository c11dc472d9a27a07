"""Prefill policies: which keys the tokens of a prompt read."""
