"""Small parts with parameters that many mixers use: norms, short convolutions, rotary positions, feature maps."""
