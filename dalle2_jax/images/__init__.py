"""Images on the host: read from any file, resized, drawn as sheets, written. No jax."""
