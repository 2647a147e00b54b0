"""How a model is spread over ranks, from outside: the model's own files know of one device only."""

from moedist.parallel.fully_shard import release, sum_replicas
from moedist.parallel.gradients import GradientTable, ParameterSpread
from moedist.parallel.guest import clip_gradients, spread_as_guest
from moedist.parallel.recompute import recompute_in_backward
from moedist.parallel.spread import spread

__all__ = [
    "GradientTable",
    "ParameterSpread",
    "clip_gradients",
    "recompute_in_backward",
    "release",
    "spread",
    "spread_as_guest",
    "sum_replicas",
]
