"""Choices that live outside moedist: one module and one YAML each, and not a line of moedist knows of them."""
