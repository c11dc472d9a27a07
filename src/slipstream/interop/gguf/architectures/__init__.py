"""One architecture of llama.cpp a file, found by walking this folder."""
