"""Public weights, one source a file: which of our networks they are, and where each tensor goes."""
