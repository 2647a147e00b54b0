"""The state of a run as one flat mapping, and whether a checkpoint fits it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from moedist.train.checkpoint.errors import CheckpointError

_SHOWN = 3


def flatten(state: Mapping[str, Any], prefix: str = "") -> dict[str, Tensor]:
    """``{"model": {"head.weight": t}}`` as ``{"model.head.weight": t}``; the tensors are the same objects.

    Raises:
        TypeError: a value is neither a tensor nor a mapping. Anything else belongs in the manifest's ``meta``, because
            in a shard it would have to be unpickled.
        ValueError: two paths give one name.
    """
    flat: dict[str, Tensor] = {}
    for name, value in state.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping):
            inner = flatten(value, f"{key}.")
        elif isinstance(value, Tensor):
            inner = {key: value}
        else:
            raise TypeError(f"{key} is a {type(value).__name__}; a checkpoint's state holds tensors alone")
        if twice := flat.keys() & inner.keys():
            raise ValueError(f"the state names {min(twice)} twice")
        flat |= inner
    return flat


def describe(tensor: Tensor) -> str:
    """Shape (of a DTensor the global one) and dtype, as users read them."""
    return _description(tensor.shape, tensor.dtype)


def describe_saved(index: Metadata, key: str) -> str | None:
    """The same of a tensor in a checkpoint; None where there is no such tensor."""
    saved = index.state_dict_metadata.get(key)
    return _description(saved.size, saved.properties.dtype) if isinstance(saved, TensorStorageMetadata) else None


def _description(shape: torch.Size, dtype: torch.dtype) -> str:
    return f"{list(shape)} {str(dtype).removeprefix('torch.')}"


def check_state(
    live: Mapping[str, Tensor], parts: Collection[str], index: Metadata, path: Path, elsewhere: Collection[str] = ()
) -> None:
    """Compares a live state with a checkpoint before anything is filled.

    Args:
        live: the flat state.
        parts: its top-level keys. Each part must be the same tensors by name, global shape and dtype on both sides; a
            part that the state does not have is not asked for, so that an evaluation can load the model without the
            optimizer.
        index: of the checkpoint.
        path: of the checkpoint, for the message.
        elsewhere: names that other ranks have, this one or not.

    Raises:
        CheckpointError: the checkpoint is of another model; names the first tensors that differ, and how.
    """
    saved = {key: describe_saved(index, key) for key in index.state_dict_metadata if key.split(".")[0] in parts}
    here = {key: describe(tensor) for key, tensor in live.items()}
    both = saved.keys() & here.keys()
    problems = [
        _first("Only in the checkpoint", [f"{key} {saved[key]}" for key in saved.keys() - both - set(elsewhere)]),
        _first("Only in this run", [f"{key} {here[key]}" for key in here.keys() - both]),
        _first("Different", [f"{key} {saved[key]}, here {here[key]}" for key in both if saved[key] != here[key]]),
    ]
    if any(problems):
        raise CheckpointError(
            f"checkpoint {path} is of another model. {' '.join(filter(None, problems))} Give this run the model, the "
            f"optimizer and the precision of the checkpoint's run (its config.yaml has them), or another checkpoint."
        )


def _first(what: str, items: list[str]) -> str:
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return f"{what}: {'; '.join(sorted(items)[:_SHOWN])}{more}." if items else ""
