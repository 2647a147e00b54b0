"""Triton kernels, the only place that imports triton, each with its twin in plain torch."""
