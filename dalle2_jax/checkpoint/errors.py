"""The error of everything that is read from a stage's folder."""

from dalle2_jax.errors import InputError


class CheckpointError(InputError):
    """A stage's folder is missing, damaged, or not what was asked for; the message is one sentence."""
