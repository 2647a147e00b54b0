"""The feed-forward half of a block."""
