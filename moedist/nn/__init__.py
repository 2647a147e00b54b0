"""Mixture of experts for one's own model: `MoELayer` and what belongs to training with it.

Above the trainer's floor because it lends from it; nothing below imports this room.
"""

from moedist.nn.layer import AuxLossModule, DiagnosticsProvider, MoELayer, MoELayerConfig

__all__ = ["AuxLossModule", "DiagnosticsProvider", "MoELayer", "MoELayerConfig"]
