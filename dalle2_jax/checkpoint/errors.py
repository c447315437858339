"""The error of everything that is read from a stage's folder."""


class CheckpointError(ValueError):
    """A stage's folder is missing, damaged, or not what was asked for; the message is one sentence."""
