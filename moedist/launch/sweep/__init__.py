"""Sweeps: Hydra's sweepers choose the jobs, our launchers run each on ranks of its own.

`sweep` hands the command to a sweeper, which asks `batch` for jobs; `record` keeps what has become of them, `objective`
reads what they measure. `job` says what a place where jobs run must offer: `torchrun` (this machine, shared out by
`machine`) and `slurm` do; `launchers` lists both, `settings` is what both can be told.
"""
