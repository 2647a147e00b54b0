"""Norms over the last dim."""
