"""One model made of another."""
