"""Whether a group of ranks is the launcher's second try."""

from __future__ import annotations

import os

import torch

from moedist.mesh.axis import Axis
from moedist.mesh.collectives import all_max


def restarted(everyone: Axis, device: torch.device) -> bool:
    """Whether a launcher has started this group of ranks again. Called by all ranks, which agree on it: a launcher
    counts its own node's failures, and those of other nodes only where its ranks failed first."""
    count = torch.tensor([int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))], device=device)
    return bool(all_max(count, everyone))
