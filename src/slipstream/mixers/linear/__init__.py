"""Linear attention: a matrix state that only decays."""
