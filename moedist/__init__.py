"""moedist trains mixture-of-experts models with their experts sharded over ranks."""

__version__ = "0.1.0"
