r"""The token files that the field has: what their bytes mean, and how to map them without reading them whole.

- nanoGPT ``.bin`` (``data/*/prepare.py``): little-endian uint16 ids and nothing else. Files of OLMo, named ``.npy``
  though they have no header, are the same with a type of their choice.
- llm.c ``.bin`` (``dev/data/data_common.py``): 256 int32, of which the first three are magic, version and number of
  tokens, then uint16 (magic 20240520, version 1) or uint32 ids (magic 20240801, version 7).
- Megatron ``.bin`` and ``.idx`` (``megatron/core/datasets/indexed_dataset.py``): bare ids, and beside them an index:
  ``MMIDIDX\0\0``, uint64 version 1, uint8 code of the type, uint64 numbers of sequences and of document bounds, then
  int32 lengths of sequences, int64 offsets of sequences in bytes, int64 numbers of the sequences at document bounds.
- NumPy ``.npy``: a 1-D array of integers.
"""

from __future__ import annotations

import dataclasses
import struct
from pathlib import Path
from typing import Literal

import numpy as np

from moedist.config import ConfigError, require
from moedist.data.paths import reading

Format = Literal["auto", "nanogpt", "llmc", "raw", "npy", "megatron"]
Dtype = Literal["uint8", "uint16", "uint32", "int16", "int32", "int64"]

LLMC_HEADER = 256
"""int32 numbers before the first token."""
LLMC_KINDS: dict[int, tuple[int, np.dtype]] = {20240520: (1, np.dtype("<u2")), 20240801: (7, np.dtype("<u4"))}
"""Version and type of ids for each magic number."""
MEGATRON_MAGIC = b"MMIDIDX\x00\x00"
MEGATRON_HEADER = struct.Struct("<9sQBQQ")
MEGATRON_DTYPES: dict[int, np.dtype] = {
    code: np.dtype(name) for code, name in {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}.items()
}
"""Codes of the integer types; 6 and 7 are floating-point."""
NPY_MAGIC = b"\x93NUMPY"


@dataclasses.dataclass(frozen=True, eq=False)
class TokenFile:
    """One mapped file.

    Attributes:
        path: where it lies.
        token_N: its ids, memory-mapped, read-only.
        start_G: where its documents begin, as `moedist.data.contract.Documents.start_G`; None where it doesn't say.
    """

    path: Path
    token_N: np.ndarray
    start_G: np.ndarray | None = None


def map_tokens(key: str, path: Path, file_format: Format, dtype: Dtype) -> TokenFile:
    """Maps a token file.

    Args:
        key: the config's key that named it, for errors.
        path: the file; for Megatron the ``.bin`` or the ``.idx``.
        file_format: ``auto`` tells by magic numbers, and by an ``.idx`` beside it; what it doesn't know is bare ids.
        dtype: of bare ids (``raw``, or ``auto`` where there is no header).

    Raises:
        ConfigError: it is empty, unreadable, truncated or not what its format says.
    """
    found = _recognise(key, path) if file_format == "auto" else file_format
    if found == "megatron":
        return _map_megatron(key, path)
    if found == "llmc":
        return TokenFile(path, _map_llmc(key, path))
    if found == "npy":
        return TokenFile(path, _map_npy(key, path))
    little_endian = np.dtype("<u2") if found == "nanogpt" else np.dtype(dtype).newbyteorder("<")
    return TokenFile(path, _map(key, path, little_endian))


def _recognise(key: str, path: Path) -> Format:
    with reading(key, path), path.open("rb") as file:
        head = file.read(16)
    if head.startswith(MEGATRON_MAGIC) or (path.suffix == ".bin" and path.with_suffix(".idx").exists()):
        return "megatron"
    if head.startswith(NPY_MAGIC):
        return "npy"
    if len(head) >= 4 and struct.unpack_from("<i", head)[0] in LLMC_KINDS:
        return "llmc"
    return "raw"


def _map(key: str, path: Path, dtype: np.dtype, offset: int = 0) -> np.ndarray:
    """The rest of a file from ``offset`` on, as numbers."""
    with reading(key, path):
        size = path.stat().st_size - offset
        require(size > 0, key, str(path), "holds no tokens", "Make the file again, or leave it out.")
        remedy = "Set format and dtype to what wrote the file; if they are right, it was cut short: make it again."
        problem = f"has {size} bytes of tokens, no multiple of the {dtype.itemsize} of {dtype.name}"
        require(size % dtype.itemsize == 0, key, str(path), problem, remedy)
        return np.memmap(path, dtype, mode="r", offset=offset, shape=(size // dtype.itemsize,))


def _map_llmc(key: str, path: Path) -> np.ndarray:
    with reading(key, path), path.open("rb") as file:
        header = np.frombuffer(file.read(4 * LLMC_HEADER), "u1")
    again = "Make it again with llm.c or moedist tokenize, or set format to what it is."
    require(len(header) == 4 * LLMC_HEADER, key, str(path), "is shorter than the 1024 bytes of an llm.c header", again)
    magic, version, count = (int(value) for value in header.view("<i4")[:3])
    if magic not in LLMC_KINDS or LLMC_KINDS[magic][0] != version:
        problem = f"has magic number {magic}, version {version}, which no llm.c token file has"
        raise ConfigError(key, str(path), problem, again)
    token_N = _map(key, path, LLMC_KINDS[magic][1], offset=4 * LLMC_HEADER)
    problem = f"says that it holds {count} tokens and holds {len(token_N)}"
    require(len(token_N) == count, key, str(path), problem, "It was cut short or added to: make it again.")
    return token_N


def _map_npy(key: str, path: Path) -> np.ndarray:
    with reading(key, path), path.open("rb") as file:
        magic = file.read(len(NPY_MAGIC))
    if magic != NPY_MAGIC:
        problem = "does not begin as a NumPy file"
        raise ConfigError(key, str(path), problem, "If it has bare ids, as OLMo's have, set format=raw and dtype.")
    try:
        with reading(key, path):
            token_N = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, SyntaxError, TypeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(key, str(path), f"is a broken NumPy file ({error})", "Make it again.") from None
    if token_N.ndim != 1 or token_N.dtype.kind not in "ui":
        problem = f"holds {token_N.dtype.name} of shape {list(token_N.shape)}, not one line of whole numbers"
        raise ConfigError(key, str(path), problem, "Save the ids as a 1-D array of uint16, uint32 or int32.")
    require(len(token_N) > 0, key, str(path), "holds no tokens", "Make the file again, or leave it out.")
    return token_N


def _map_megatron(key: str, path: Path) -> TokenFile:
    index_path, token_path = path.with_suffix(".idx"), path.with_suffix(".bin")
    with reading(key, index_path), index_path.open("rb") as file:
        head = file.read(MEGATRON_HEADER.size)
        size = index_path.stat().st_size
    again = "Make the pair again, with Megatron's preprocess_data.py or moedist tokenize."
    whole = len(head) == MEGATRON_HEADER.size
    magic, version, code, num_sequences, num_bounds = MEGATRON_HEADER.unpack(head) if whole else (b"", 0, 0, 0, 0)
    right = magic == MEGATRON_MAGIC and version == 1 and code in MEGATRON_DTYPES
    problem = f"is no index of whole numbers of Megatron (magic {magic!r}, version {version}, type {code})"
    require(right, key, str(index_path), problem, again)
    needed = MEGATRON_HEADER.size + 12 * num_sequences + 8 * num_bounds
    # A multimodal index has one more byte per sequence.
    problem = f"has {size} bytes, and {num_sequences} sequences and {num_bounds} document bounds take {needed}"
    require(size in (needed, needed + num_sequences), key, str(index_path), problem, again)
    dtype = MEGATRON_DTYPES[code]
    token_N = _map(key, token_path, dtype)
    length_S, offset_S, bound_G = _megatron_index(key, index_path, num_sequences, num_bounds)
    end_S = np.cumsum(length_S, dtype=np.int64)
    contiguous = np.array_equal(offset_S, (end_S - length_S) * dtype.itemsize) and bool((length_S >= 0).all())
    problem = f"does not cut {token_path.name} into sequences end to end"
    require(contiguous, key, str(index_path), problem, again)
    total = int(end_S[-1]) if len(end_S) else 0
    problem = f"has {len(token_N)} tokens of {dtype.name}, and its index counts {total}"
    require(len(token_N) == total, key, str(token_path), problem, again)
    ascending = (np.diff(bound_G) >= 0).all() and (bound_G >= 0).all() and (bound_G <= num_sequences).all()
    require(bool(ascending), key, str(index_path), "has document bounds that do not ascend", again)
    start_G = (end_S - length_S)[bound_G[bound_G < num_sequences]]
    start_G = np.unique(np.append(start_G[start_G < total], 0))
    return TokenFile(token_path, token_N, start_G.astype(np.int64))


def _megatron_index(key: str, path: Path, num_sequences: int, num_bounds: int) -> tuple[np.ndarray, ...]:
    with reading(key, path), path.open("rb") as file:
        file.seek(MEGATRON_HEADER.size)
        return (
            np.fromfile(file, "<i4", num_sequences).astype(np.int64),
            np.fromfile(file, "<i8", num_sequences),
            np.fromfile(file, "<i8", num_bounds),
        )
