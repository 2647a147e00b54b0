"""A checkpoint as it lies on the disk: its tensors by name, read one at a time by a process of its own."""

from __future__ import annotations

import dataclasses
import io
import math
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from moedist.train.checkpoint.errors import CheckpointError
from moedist.train.checkpoint.manifest import Manifest
from moedist.train.checkpoint.shards import read_index


@dataclasses.dataclass(frozen=True)
class SavedTensor:
    """What is known of a tensor before it is read.

    Attributes:
        name: dotted; its first part says what it is of: ``model``, ``optimizer``, ``counters``, ``rank_00000``.
        shape: of the whole.
        properties: its dtype, and what else DCP keeps.
        pieces: in how many it lies there.
    """

    name: str
    shape: tuple[int, ...]
    properties: TensorProperties
    pieces: int

    @property
    def part(self) -> str:
        """The first part of its name."""
        return self.name.partition(".")[0]

    @property
    def dtype(self) -> torch.dtype:
        """Of its elements."""
        return self.properties.dtype

    @property
    def num_elements(self) -> int:
        """Of the whole."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Of the whole, without what a file adds."""
        return self.num_elements * self.dtype.itemsize


class SavedState:
    """The tensors of a checkpoint, whatever layout wrote them. Needs no other process.

    Attributes:
        tensors: by name, numbers in names in the order of numbers.

    Raises:
        CheckpointError: its index is damaged or hostile.
    """

    def __init__(self, path: Path, manifest: Manifest):
        self.path = path
        self._index = read_index(path, manifest)
        saved = self._index.state_dict_metadata
        self.tensors = {name: self._describe(name) for name in sorted(saved, key=natural)}

    def read(self, name: str, start: Sequence[int] | None = None, shape: Sequence[int] | None = None) -> Tensor:
        """A tensor, or the box of the given shape that begins at ``start``. Never more of the file than needed at once.

        Raises:
            CheckpointError: a piece is missing, or is not what the index says.
        """
        about = self.tensors[name]
        start = (0,) * len(about.shape) if start is None else start
        shape = about.shape if shape is None else shape
        box, filled = torch.empty(tuple(shape), dtype=about.dtype), 0
        for chunk in self._saved(name).chunks:
            low = [max(a, b) for a, b in zip(start, chunk.offsets, strict=True)]
            high = [min(a + n, b + m) for a, n, b, m in zip(start, shape, chunk.offsets, chunk.sizes, strict=True)]
            if any(a >= b for a, b in zip(low, high, strict=True)):
                continue
            to = tuple(slice(a - at, b - at) for a, b, at in zip(low, high, start, strict=True))
            of = tuple(slice(a - at, b - at) for a, b, at in zip(low, high, chunk.offsets, strict=True))
            box[to] = self._read_chunk(name, chunk)[of]
            filled += box[to].numel()
        if filled != box.numel():
            raise CheckpointError(f"checkpoint {self.path} holds {filled} of {box.numel()} elements of {name}")
        return box

    def _saved(self, name: str) -> TensorStorageMetadata:
        saved = self._index.state_dict_metadata[name]
        assert isinstance(saved, TensorStorageMetadata), "read_index has looked"
        return saved

    def _describe(self, name: str) -> SavedTensor:
        saved = self._saved(name)
        return SavedTensor(name, tuple(saved.size), saved.properties, len(saved.chunks))

    def _read_chunk(self, name: str, chunk: ChunkStorageMetadata) -> Tensor:
        entry = self._index.storage_data.get(MetadataIndex(name, chunk.offsets))
        if entry is None:
            raise CheckpointError(f"checkpoint {self.path} lacks a piece of {name}")
        try:
            with (self.path / entry.relative_path).open("rb") as file:
                file.seek(entry.offset)
                piece = torch.load(io.BytesIO(file.read(entry.length)), map_location="cpu", weights_only=True)
        except Exception as error:  # crafted bytes can make the loader raise anything
            raise CheckpointError(f"{self.path / entry.relative_path} cannot be read: {error}") from None
        expected = chunk.sizes, self.tensors[name].dtype
        if not isinstance(piece, Tensor) or (piece.shape, piece.dtype) != expected:
            raise CheckpointError(f"{self.path / entry.relative_path} holds something else than its piece of {name}")
        return piece.detach()


def natural(name: str) -> list[str | int]:
    """A sort key that takes the numbers in a name as numbers: expert 2 before expert 10.

    >>> sorted(["e.10", "e.2", "b"], key=natural)
    ['b', 'e.2', 'e.10']
    """
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]
