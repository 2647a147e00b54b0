"""Mixture of experts for one's own model: `MoELayer`, and what belongs to training with it.

It stands beside the rooms above the trainer because it lends from it; nothing below imports it.
"""

from moedist.nn.attention import ExpertType, MoEAttention, MoEAttentionConfig, MoEAttentionOutput, usage_loss
from moedist.nn.config import MoELayerConfig
from moedist.nn.layer import DiagnosticsProvider, MoELayer
from moedist.nn.losses import AuxLossModule
from moedist.nn.monitor import ExpertSpecializationMonitor, ExpertStats
from moedist.nn.training import MoELoss, MoEOptimizerConfig, parameter_groups, training_step

__all__ = [
    "AuxLossModule",
    "DiagnosticsProvider",
    "ExpertSpecializationMonitor",
    "ExpertStats",
    "ExpertType",
    "MoEAttention",
    "MoEAttentionConfig",
    "MoEAttentionOutput",
    "MoELayer",
    "MoELayerConfig",
    "MoELoss",
    "MoEOptimizerConfig",
    "parameter_groups",
    "training_step",
    "usage_loss",
]
