"""Whether kernels run here, and if not, why."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def why_not(device: torch.device) -> str | None:
    """Why Triton's kernels cannot compute on ``device``, to be read behind a colon; None where they can.

    A GPU is asked once per process, by a small product that is held against the right one: that finds a missing
    compiler or driver, and a GPU that Triton does not know. With ``TRITON_INTERPRET=1`` they run on a CPU, line by
    line, for tests.
    """
    return _why_not(device)


@functools.lru_cache
def _why_not(device: torch.device) -> str | None:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != ("cpu" if interpreted else "cuda"):
        return f"Triton's {'interpreter needs a CPU' if interpreted else 'kernels need a GPU'}, not {device.type}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if interpreted:
        return None
    name = torch.cuda.get_device_name(device)
    try:
        from moedist.moe.kernels.products import probe

        return None if probe(device) else f"Triton's product on {name} is wrong"
    except Exception as error:  # whatever compilers and drivers come up with
        first_line = str(error).strip().partition("\n")[0]
        return f"Triton cannot run on {name} ({type(error).__name__}: {first_line})"
