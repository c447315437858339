"""What a config file says: systems, recipes, optimizers; finding a config and changing its fields."""
