"""Delta rule: what is written first erases."""
