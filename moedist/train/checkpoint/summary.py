"""What a checkpoint holds, for people and scripts; read from its manifest and index, not from its shards."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from moedist.train.checkpoint.manifest import check_sizes, read_manifest
from moedist.train.checkpoint.saved import SavedState, SavedTensor, natural


@dataclasses.dataclass(frozen=True)
class Part:
    """One part of a state: the model, the optimizer, ...

    Attributes:
        name: of the part; those of single ranks count as one, ``rank_*``.
        num_tensors, num_elements, num_bytes: in it.
    """

    name: str
    num_tensors: int
    num_elements: int
    num_bytes: int


@dataclasses.dataclass(frozen=True)
class Summary:
    """A checkpoint.

    Attributes:
        path: its folder.
        step: optimizer steps taken.
        meta: what the run has written down: ``run_id``, ``tokens``, ``next_sample``, ``layout``, ``config``, ...
        num_ranks: that wrote it.
        num_files, num_bytes: as they lie on the disk.
        tensors: every one.
    """

    path: Path
    step: int
    meta: Mapping[str, Any]
    num_ranks: int
    num_files: int
    num_bytes: int
    tensors: tuple[SavedTensor, ...]

    @property
    def parts(self) -> list[Part]:
        """The model first."""
        of: dict[str, list[SavedTensor]] = {}
        for tensor in self.tensors:
            of.setdefault("rank_*" if tensor.part.startswith("rank_") else tensor.part, []).append(tensor)
        order = sorted(of, key=lambda name: (name != "model", name.startswith("rank_"), -_bytes(of[name])))
        return [Part(name, len(of[name]), sum(t.num_elements for t in of[name]), _bytes(of[name])) for name in order]

    def as_mapping(self) -> dict[str, Any]:
        """The same as JSON."""
        return {
            "path": str(self.path),
            "step": self.step,
            "num_ranks": self.num_ranks,
            "num_files": self.num_files,
            "num_bytes": self.num_bytes,
            "meta": dict(self.meta),
            "parts": [dataclasses.asdict(part) for part in self.parts],
            "tensors": [
                {
                    "name": tensor.name,
                    "shape": list(tensor.shape),
                    "dtype": dtype_name(tensor),
                    "num_bytes": tensor.num_bytes,
                    "pieces": tensor.pieces,
                }
                for tensor in self.tensors
            ],
        }


def summarize(path: Path) -> Summary:
    """Reads manifest and index of a checkpoint; its shards are looked at for their sizes alone.

    Raises:
        CheckpointError: it is incomplete or damaged, as far as that shows.
    """
    manifest = read_manifest(path)
    check_sizes(path)
    return Summary(
        path=path,
        step=manifest.step,
        meta=manifest.meta,
        num_ranks=manifest.num_ranks,
        num_files=len(manifest.files) + 1,
        num_bytes=sum(seal.size for seal in manifest.files.values()),
        tensors=tuple(SavedState(path, manifest).tensors.values()),
    )


def fold(tensors: Iterable[SavedTensor]) -> list[tuple[str, list[SavedTensor]]]:
    """Tensors that differ in the number of their block alone, together, under ``blocks.0-3.norm.weight``."""
    groups: dict[tuple[Any, ...], list[SavedTensor]] = {}
    for tensor in tensors:
        pattern = tuple("#" if isinstance(part, int) else part for part in natural(tensor.name))
        groups.setdefault((pattern, tensor.shape, tensor.dtype, tensor.pieces), []).append(tensor)
    return [(_folded([tensor.name for tensor in group]), group) for group in groups.values()]


def _folded(names: list[str]) -> str:
    columns = zip(*map(natural, names), strict=True)
    return "".join(_ranges(column) if isinstance(column[0], int) else str(column[0]) for column in columns)


def _ranges(numbers: Iterable[Any]) -> str:
    ordered = sorted(set(numbers))
    runs: list[list[int]] = []
    for number in ordered:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def dtype_name(tensor: SavedTensor) -> str:
    """``float32``."""
    return str(tensor.dtype).removeprefix("torch.")


def _bytes(tensors: Iterable[SavedTensor]) -> int:
    return sum(tensor.num_bytes for tensor in tensors)
