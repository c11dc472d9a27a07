"""Measurements: speed, memory, recall, and the machine they were made on."""
