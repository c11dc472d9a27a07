"""The head-to-head: architectures of equal size, on the user's own text, measured for quality, recall, speed and memory."""
