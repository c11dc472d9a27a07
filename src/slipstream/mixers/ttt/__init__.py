"""Networks that are trained while they read: the memory is their weights."""
