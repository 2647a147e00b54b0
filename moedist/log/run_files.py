"""The numbers that a run leaves in its folder, and how to read them back; needs numpy only.

``metrics.jsonl`` has a row for each log step: numbers of the whole run, and columns over MoE layers. ``experts.bin``
has the [L, E] arrays over layers and experts of chosen log steps: a sequence of frames, only ever appended to; a kill
leaves at most one that is cut off, which readers pass over. A frame is, in this order and little-endian,

    8 bytes  ``MOEXPERT``
    int64    step
    uint32   number of bytes of the rest
    uint32   CRC-32 of the rest
    rest     a line of JSON, ``{name: [numpy type, shape]}``, and behind it these arrays' bytes in this order, in one
             zlib stream: ``block`` (whole numbers [L]: which blocks of the model have experts), then [L, E] arrays
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

METRICS, EXPERTS = "metrics.jsonl", "experts.bin"
ATTENTION_EXPERTS = "attention_experts.bin"
"""As ``experts.bin``, of attentions that route."""
MAGIC = b"MOEXPERT"
HEAD = struct.Struct("<8sqII")


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The rows of a run folder's ``metrics.jsonl``, in the order of writing; empty where there is no such file.

    Steps that a resumed run has done again come again, marked ``"replayed": true``. Half a row at the end, of a run
    that writes at this moment or was killed, is left out.
    """
    try:
        lines = (run / METRICS).read_bytes().splitlines()
    except FileNotFoundError:
        return []
    rows = [row for line in lines if isinstance(row := _json(line), dict)]
    return [row for row in rows if "train/step" in row]


def _json(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


@dataclasses.dataclass(frozen=True)
class Frame:
    """Where a step's arrays lie in the file."""

    step: int
    begin: int
    size: int


class ExpertsFile:
    """Reads ``experts.bin`` of a run folder, or another file of its form; may be opened while the run writes.

    Attributes:
        steps: steps that have arrays, growing; of a step that a resumed run did again, the last one counts.
        blocks: for each of the L layers the index of its block in the model; empty for a file without steps.
        names: of the arrays that every step has.
    """

    def __init__(self, run: Path, name: str = EXPERTS):
        self._path = run / name
        self._frames: dict[int, Frame] = {}
        if self._path.exists():
            self._frames = {frame.step: frame for frame in whole_frames(self._path.read_bytes())}
        self.steps: tuple[int, ...] = tuple(sorted(self._frames))
        first = self._read(self.steps[0]) if self.steps else {"block": np.zeros(0, np.int64)}
        self.blocks: tuple[int, ...] = tuple(first["block"].tolist())
        self.names: tuple[str, ...] = tuple(name for name in first if name != "block")

    def at(self, step: int) -> dict[str, np.ndarray]:
        """[L, E] arrays of one of `steps`, by name."""
        return {name: array for name, array in self._read(step).items() if name != "block"}

    def stack(self, name: str, steps: Sequence[int] | None = None) -> np.ndarray:
        """[S, L, E]: one array of all ``steps`` (None: of all that there are)."""
        return np.stack([self._read(step)[name] for step in (self.steps if steps is None else steps)])

    def _read(self, step: int) -> dict[str, np.ndarray]:
        frame = self._frames[step]
        with self._path.open("rb") as file:
            file.seek(frame.begin)
            return unpack_arrays(file.read(frame.size))


def whole_frames(content: bytes) -> Iterator[Frame]:
    """The frames of a file; what a kill has cut off, and what is damaged, is passed over."""
    place = content.find(MAGIC)
    while place >= 0:
        begin = place + HEAD.size
        end = begin
        if begin <= len(content):
            _, step, size, crc = HEAD.unpack_from(content, place)
            end = begin + size
            if end <= len(content) and zlib.crc32(memoryview(content)[begin:end]) == crc:
                yield Frame(step, begin, size)
            else:
                end = place + len(MAGIC)
        place = content.find(MAGIC, end)


def append_frame(path: Path, step: int, blocks: Sequence[int], arrays: Mapping[str, np.ndarray]) -> None:
    """Adds a step's [L, E] arrays to ``experts.bin``.

    Raises:
        OSError: the disk refuses; the file is as it was.
    """
    frame = pack_frame(step, {"block": np.asarray(blocks, np.int64), **arrays})
    with path.open("ab", buffering=0) as file:
        begin = file.seek(0, os.SEEK_END)
        try:
            written = file.write(frame)
            if written != len(frame):  # a disk that fills up takes the first part without an error
                raise OSError(f"{written} of {len(frame)} bytes written")
        except OSError:
            file.truncate(begin)
            raise


def pack_frame(step: int, arrays: Mapping[str, np.ndarray]) -> bytes:
    """A frame of the file. Whole numbers are kept in the narrowest type that holds them."""
    narrow = {name: _narrow(np.ascontiguousarray(array)) for name, array in arrays.items()}
    shapes = {name: [array.dtype.str, array.shape] for name, array in narrow.items()}
    raw = zlib.compress(b"".join(array.tobytes() for array in narrow.values()), level=1)
    content = json.dumps(shapes).encode() + b"\n" + raw
    return HEAD.pack(MAGIC, step, len(content), zlib.crc32(content)) + content


def unpack_arrays(content: bytes) -> dict[str, np.ndarray]:
    """The arrays of a frame."""
    line, _, rest = content.partition(b"\n")
    raw, place, found = zlib.decompress(rest), 0, {}
    for name, (dtype, shape) in json.loads(line).items():
        count = math.prod(shape)
        found[name] = np.frombuffer(raw, dtype, count, place).reshape(shape)
        place += found[name].nbytes
    return found


def _narrow(array: np.ndarray) -> np.ndarray:
    if not np.issubdtype(array.dtype, np.integer) or array.size == 0:
        return array
    widest = np.promote_types(np.min_scalar_type(array.min()), np.min_scalar_type(array.max()))
    return array.astype(widest)
