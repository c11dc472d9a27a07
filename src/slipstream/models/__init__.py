"""From a pattern string to a model: blocks, the stack, frontends, heads, and checkpoints."""
