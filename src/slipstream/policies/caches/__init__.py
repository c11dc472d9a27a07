"""Cache policies: what is kept of the keys and values, and which of it a query reads."""
