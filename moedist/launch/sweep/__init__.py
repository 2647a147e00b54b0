"""Sweeps: Hydra's sweepers choose the jobs, our launchers run each on ranks of its own."""
