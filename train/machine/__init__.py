"""What is set before jax starts, and how several processes stay together."""
