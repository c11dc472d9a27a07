"""Faster forms of the ops, chosen per call by device, dtype and whether gradients are wanted (see ops.dispatch)."""
