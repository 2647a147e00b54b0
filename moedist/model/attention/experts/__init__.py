"""Attention experts: each one way in which queries take from keys and values."""
