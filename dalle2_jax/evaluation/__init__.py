"""Measuring what a system makes: the shape oracle that reads pictures of captioned shapes without a network."""
