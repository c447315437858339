"""Measuring what a system makes: the shape oracle (no network), CLIP retrieval, the prior's suite, image sheets."""
