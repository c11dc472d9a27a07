"""The contract: what a mixer is, what a state is, and how both are found and stored."""
