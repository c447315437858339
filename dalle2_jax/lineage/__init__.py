"""The systems that led to DALL-E 2."""
