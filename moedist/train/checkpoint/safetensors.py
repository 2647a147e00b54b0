"""Sets of safetensors files: tensors and text, nothing that could be run.

A file is the length of its header (8 bytes, little-endian), the header (JSON: name -> dtype, shape, place) and the bare
elements. It is written here one tensor at a time; the library's own writer wants a file's tensors in memory together.
Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import dataclasses
import json
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

INDEX = "model.safetensors.index.json"
"""Says which file of a set holds which tensor; there where a set is more than one file."""

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclasses.dataclass(frozen=True)
class Entry:
    """A tensor to be written.

    Attributes:
        name: in the file.
        shape: of the whole.
        dtype: of its elements.
        read: gives it; called when it is written, and the tensor is let go after that.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @property
    def num_bytes(self) -> int:
        """In the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_set(folder: Path, entries: Sequence[Entry], max_bytes: int, metadata: Mapping[str, str]) -> list[Path]:
    """Writes tensors as ``model.safetensors``, or as ``model-00001-of-0000n.safetensors`` and an index.

    Args:
        folder: exists.
        entries: in the order of the files.
        max_bytes: of the tensors of one file; a larger tensor gets a file of its own.
        metadata: goes into every file's header.

    Returns:
        the files with tensors.
    """
    groups: list[list[Entry]] = [[]]
    for entry in entries:
        if groups[-1] and sum(other.num_bytes for other in groups[-1]) + entry.num_bytes > max_bytes:
            groups.append([])
        groups[-1].append(entry)
    count = len(groups)
    names = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    if count == 1:
        names = ["model.safetensors"]
    else:
        placed = {entry.name: name for name, group in zip(names, groups, strict=True) for entry in group}
        total = sum(entry.num_bytes for entry in entries)
        index = {"metadata": {**metadata, "total_size": total}, "weight_map": placed}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    for name, group in zip(names, groups, strict=True):
        write_file(folder / name, group, metadata)
    return [folder / name for name in names]


def write_file(path: Path, entries: Sequence[Entry], metadata: Mapping[str, str]) -> None:
    """Writes one file, tensor by tensor."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for entry in entries:
        begin, end = end, end + entry.num_bytes
        header[entry.name] = {"dtype": DTYPES[entry.dtype], "shape": list(entry.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for entry in entries:
            tensor = entry.read()
            assert (tuple(tensor.shape), tensor.dtype) == (entry.shape, entry.dtype), f"{entry.name} is another tensor"
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
