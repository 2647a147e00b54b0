"""Where a kernel is launched."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor


def on(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """On the device of ``x``, whichever is the current one."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
