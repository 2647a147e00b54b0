"""Where the host may look at values for nothing."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses import FakeTensor


def on_host(x: Tensor) -> bool:
    """Whether ``x`` is on a CPU and has values, outside of a graph: what it holds is known at once, so that a pass over
    it may be spared where it turns out to be needless. Elsewhere the host would wait for a device."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and not isinstance(x, FakeTensor)
