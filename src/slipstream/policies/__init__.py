"""Ways of running a trained softmax mixer for less: what its cache keeps, and which keys a prompt reads. One policy a file."""
