"""Per-token networks: mixers without a state."""
