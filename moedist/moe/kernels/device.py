"""Whether kernels run here, and if not, why."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from typing import Literal

import torch

Part = Literal["ffn", "pairs"]
"""Kernels that are asked for together: products of experts, or all that happens to pairs around them."""


def why_not(device: torch.device, part: Part) -> str | None:
    """Why Triton's kernels cannot compute on ``device``, to be read behind a colon; None where they can.

    A GPU is asked once per process, by small cases that are held against the right ones: that finds a missing compiler
    or driver, and a GPU that Triton does not know. ``MOEDIST_TRITON=0`` asks for the twins in torch. With
    ``TRITON_INTERPRET=1`` kernels run on a CPU, line by line, for tests.
    """
    return _why_not(device, part)


# To a compiled graph the answer is a constant: what `torch.compiler.assume_constant_result` says, which would load the
# compiler at the start of every program.
why_not._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.lru_cache
def _why_not(device: torch.device, part: Part) -> str | None:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != ("cpu" if interpreted else "cuda"):
        return f"Triton's {'interpreter needs a CPU' if interpreted else 'kernels need a GPU'}, not {device.type}"
    if os.environ.get("MOEDIST_TRITON") == "0":
        return "MOEDIST_TRITON is 0"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if interpreted:
        return None
    name = torch.cuda.get_device_name(device)
    try:
        is_right = importlib.import_module(f"moedist.moe.kernels.{part}_kernels").probe(device)
    except Exception as error:  # whatever compilers and drivers come up with
        first_line = str(error).strip().partition("\n")[0]
        return f"Triton cannot run on {name} ({type(error).__name__}: {first_line})"
    return None if is_right else f"a kernel of Triton's computes wrongly on {name}"


def pairs_note(device: torch.device) -> str | None:
    """What a run should say of what happens to pairs around the experts, as a sentence; None on a CPU."""
    if device.type == "cpu":
        return None
    reason = why_not(device, "pairs")
    return f"pairs are chosen, placed, copied and summed by {'kernels' if reason is None else f'torch: {reason}'}"
