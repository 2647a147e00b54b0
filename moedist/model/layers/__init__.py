"""Which blocks a model has."""
