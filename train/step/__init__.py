"""One compiled training step: its state, its lowering from shapes, and what it costs."""
