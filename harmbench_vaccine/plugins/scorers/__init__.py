"""Built-in scorers, one file each; the file's name is the scorer's name."""
