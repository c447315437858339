"""A run's folder: the order of its stages, their data, whether each may go on, what each starts from."""
