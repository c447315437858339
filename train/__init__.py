"""The training program: `python -m train CONFIG STAGE` (see `train/__main__.py`)."""
