"""How a model is spread over ranks, from outside: the model's own files know of one device only."""

from moedist.parallel.fully_shard import release, sum_replicas
from moedist.parallel.gradients import GradientTable, ParameterSpread
from moedist.parallel.spread import recompute_in_backward, spread

__all__ = ["GradientTable", "ParameterSpread", "recompute_in_backward", "release", "spread", "sum_replicas"]
