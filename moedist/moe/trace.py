"""Recorded routing: what every token of a step was sent to, as files that any layout can read.

A trace is a folder with one folder per recorded step, one file per rank in each::

    <run>/traces/step_00000012/rank_00003_of_00004.npz

A file is a zip of plain numpy arrays (read with ``allow_pickle=False``) over the T positions of the rank's
micro-batches, one after the other: ``sample``, ``position``, ``id`` and ``valid`` name the tokens, and each MoE layer
has ``layer_01.expert``, ``layer_01.gate`` and ``layer_01.computed`` of shape [T, K]. ``meta`` is JSON: format, step,
ranks and the sizes of each layer. A token's name, (sample, position), is the same at every number of ranks, so which
rank wrote it says nothing.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

FORMAT = 1
STEP, RANK = re.compile(r"step_(\d{8})"), re.compile(r"rank_(\d{5})_of_(\d{5})\.npz")
NAMES = {"sample_T": "sample", "position_T": "position", "id_T": "id", "valid_T": "valid"}


class TraceError(ValueError):
    """A trace that is missing, incomplete or damaged, or that does not hold what is asked of it."""


@dataclasses.dataclass(frozen=True)
class LayerSizes:
    """Sizes of one recorded MoE layer."""

    num_experts: int
    top_k: int


@dataclasses.dataclass(frozen=True)
class LayerTrace:
    """What one MoE layer decided.

    Attributes:
        num_experts: E.
        expert_TK: int64, the experts that each token asked for, from its first choice on.
        gate_TK: fp32, their gates as the router proposed them, before any drop.
        computed_TK: int64, the expert that computed the pair: the one asked for unless overflow moved it; -1 where none
            did, and at padding.
    """

    num_experts: int
    expert_TK: Tensor
    gate_TK: Tensor
    computed_TK: Tensor

    @property
    def kept_TK(self) -> Tensor:
        """Bool: pairs that some expert computed."""
        return self.computed_TK >= 0


@dataclasses.dataclass(frozen=True)
class StepTrace:
    """Routing of one step: of one rank, or of all ranks one after the other.

    Attributes:
        step: the optimizer step, as in ``train/step`` of its record.
        sample_T, position_T: int64, the tokens' names, as in `TokenContext`.
        id_T: int64 vocabulary ids.
        valid_T: bool; false at padding, where the layers' entries mean nothing.
        layers: by the index of the block, from 0.
    """

    step: int
    sample_T: Tensor
    position_T: Tensor
    id_T: Tensor
    valid_T: Tensor
    layers: Mapping[int, LayerTrace]


@dataclasses.dataclass(frozen=True)
class TraceIndex:
    """Which steps a trace has, and the sizes of the layers, equal in all of them.

    Attributes:
        steps: the files of each recorded step, of all its ranks.
        layers: by the index of the block, from 0.
    """

    steps: Mapping[int, tuple[Path, ...]]
    layers: Mapping[int, LayerSizes]


def write_part(folder: Path, part: StepTrace, rank: int, world: int) -> Path:
    """Writes one rank's part of a step below the trace ``folder``, whole or not at all; returns the file.

    Files that another number of ranks left at the same step are of an earlier start of the run; rank 0 removes them.

    Raises:
        OSError: the disk refuses.
    """
    step_folder = folder / f"step_{part.step:08d}"
    step_folder.mkdir(parents=True, exist_ok=True)
    layers = {block: [layer.num_experts, layer.expert_TK.shape[1]] for block, layer in part.layers.items()}
    meta = {"format": FORMAT, "step": part.step, "rank": rank, "world": world, "layers": layers}
    arrays: dict[str, Any] = {"meta": np.frombuffer(json.dumps(meta).encode(), np.uint8)}
    arrays |= {name: getattr(part, field).cpu().numpy() for field, name in NAMES.items()}
    for block, layer in part.layers.items():
        arrays[f"layer_{block:02d}.expert"] = layer.expert_TK.to("cpu", torch.int32).numpy()
        arrays[f"layer_{block:02d}.gate"] = layer.gate_TK.to("cpu", torch.float32).numpy()
        arrays[f"layer_{block:02d}.computed"] = layer.computed_TK.to("cpu", torch.int32).numpy()
    path = step_folder / f"rank_{rank:05d}_of_{world:05d}.npz"
    draft = step_folder / f".{path.name}.{os.getpid()}"
    try:
        with draft.open("wb") as file:
            np.savez(file, **arrays)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    if rank == 0:
        for other in step_folder.glob("rank_*.npz"):
            if not other.name.endswith(f"_of_{world:05d}.npz"):
                other.unlink(missing_ok=True)
    return path


def open_trace(path: Path | str) -> TraceIndex:
    """Looks at a trace without reading its tokens.

    Args:
        path: a run folder, its ``traces`` folder, or the folder of one step.

    Raises:
        TraceError: there is none, ranks are missing, or steps are of different models.
    """
    root = Path(path).expanduser()
    if STEP.fullmatch(root.name):
        folders = [root]
    else:
        root = root / "traces" if (root / "traces").is_dir() else root
        folders = [folder for folder in root.glob("step_*") if STEP.fullmatch(folder.name)]
    steps: dict[int, tuple[Path, ...]] = {}
    layers: dict[int, LayerSizes] | None = None
    for folder in sorted(folders):
        files = _files_of(folder)
        for file in files:
            with _Arrays(file) as arrays:
                meta = arrays.meta()
                found = {int(block): LayerSizes(*sizes) for block, sizes in meta["layers"].items()}
            if layers is not None and found != layers:
                raise TraceError(f"{file} is of another model than the rest: its MoE layers are {found}, not {layers}")
            layers = found
        steps[int(meta["step"])] = files
    if layers is None:
        raise TraceError(f"{root} holds no recorded step (step_00000012/rank_00000_of_00004.npz)")
    return TraceIndex(steps, layers)


def read_step(files: Sequence[Path], blocks: Iterable[int] | None = None) -> StepTrace:
    """One step's routing, all ranks one after the other.

    Args:
        files: of one step (`TraceIndex.steps`).
        blocks: MoE layers to read, by the index of their block; None for all.

    Raises:
        TraceError: a file is damaged or lacks a layer.
    """
    parts = [_read_part(file, blocks) for file in files]
    names = {field: torch.cat([getattr(part, field) for part in parts]) for field in NAMES}
    layers = {
        block: LayerTrace(
            layer.num_experts,
            *(
                torch.cat([getattr(part.layers[block], field) for part in parts])
                for field in ("expert_TK", "gate_TK", "computed_TK")
            ),
        )
        for block, layer in parts[0].layers.items()
    }
    return StepTrace(parts[0].step, layers=layers, **names)


def _read_part(file: Path, blocks: Iterable[int] | None) -> StepTrace:
    with _Arrays(file) as arrays:
        meta = arrays.meta()
        sizes = {int(block): LayerSizes(*pair) for block, pair in meta["layers"].items()}
        wanted = sizes if blocks is None else list(blocks)
        layers = {
            block: LayerTrace(
                sizes[block].num_experts,
                arrays.tensor(f"layer_{block:02d}.expert").long(),
                arrays.tensor(f"layer_{block:02d}.gate"),
                arrays.tensor(f"layer_{block:02d}.computed").long(),
            )
            for block in wanted
        }
        names = {field: arrays.tensor(name) for field, name in NAMES.items()}
        return StepTrace(int(meta["step"]), layers=layers, **names)


def _files_of(folder: Path) -> tuple[Path, ...]:
    """The files of a step in the order of ranks."""
    found = {path: match for path in folder.iterdir() if (match := RANK.fullmatch(path.name))}
    worlds = {int(match[2]) for match in found.values()}
    if len(worlds) != 1:
        raise TraceError(f"{folder} holds files of {sorted(worlds) or 'no'} ranks, not of one start of a run")
    (world,) = worlds
    ranks = {int(match[1]): path for path, match in found.items()}
    missing = sorted(set(range(world)) - set(ranks))
    if missing:
        raise TraceError(f"{folder} lacks the files of ranks {missing} of {world}")
    return tuple(ranks[rank] for rank in range(world))


class _Arrays:
    """A file's arrays; whatever is wrong with it is a `TraceError`."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> _Arrays:
        try:
            self._file = np.load(self.path, allow_pickle=False)
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise TraceError(f"{self.path} cannot be read: {error}") from error
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def tensor(self, name: str) -> Tensor:
        try:
            return torch.from_numpy(self._file[name])
        except (KeyError, OSError, ValueError, TypeError, zipfile.BadZipFile) as error:
            raise TraceError(f"{self.path} has no readable {name}: {error}") from error

    def meta(self) -> dict[str, Any]:
        try:
            meta: dict[str, Any] = json.loads(bytes(self.tensor("meta").numpy()))
        except ValueError as error:
            raise TraceError(f"{self.path} has no readable meta: {error}") from error
        if meta.get("format") != FORMAT:
            raise TraceError(f"{self.path} has the format {meta.get('format')!r}, and this version reads {FORMAT}")
        return meta
