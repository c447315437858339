"""Public weights: networks that others trained, brought into the parameters of ours. One file a source."""
