"""Measurements: this machine, speed and memory of models, and what they can recall."""
