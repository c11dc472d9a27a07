"""Models of other people's formats, read into ours and written back."""
