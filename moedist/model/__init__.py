"""The model: a list of layers written for one device; parallelism comes from outside."""
