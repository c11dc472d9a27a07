"""One file a family of models. Found by walking this folder."""
