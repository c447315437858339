"""Numpy functions of features and images: no model, no data."""
