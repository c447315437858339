"""Flax building blocks: attention, transformer, convolution, embedding and the U-Net."""
