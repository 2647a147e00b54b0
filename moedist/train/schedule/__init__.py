"""How learning rates follow the step."""
