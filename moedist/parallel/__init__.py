"""How a model is spread over ranks, from outside: the model's own files know of one device only."""

from moedist.parallel.compile import compile_parts
from moedist.parallel.fully_shard import keep_on_device, release, sum_replicas
from moedist.parallel.gradients import GradientTable, ParameterSpread
from moedist.parallel.guest import clip_gradients, spread_as_guest
from moedist.parallel.recompute import recompute_in_backward
from moedist.parallel.spread import spread

__all__ = [
    "GradientTable",
    "ParameterSpread",
    "clip_gradients",
    "compile_parts",
    "keep_on_device",
    "recompute_in_backward",
    "release",
    "spread",
    "spread_as_guest",
    "sum_replicas",
]
