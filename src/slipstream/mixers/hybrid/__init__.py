"""Mixers that read one input in two ways at once: softmax over what is near or kept, and a state over everything."""
