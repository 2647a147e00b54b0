"""The mixture-of-experts layer. Imports torch only.

``MoEConfig(num_experts=8).build(dim=64)`` is a working layer; `moedist.moe.layer` is the page to read first.
"""

from moedist.moe.capacity import CapacityConfig
from moedist.moe.context import TokenContext
from moedist.moe.layer import MoE, MoEConfig, MoEOutput
from moedist.moe.report import MoEReport, StepCounts, pack_reports

__all__ = [
    "CapacityConfig",
    "MoEConfig",
    "MoE",
    "MoEOutput",
    "MoEReport",
    "StepCounts",
    "TokenContext",
    "pack_reports",
]
