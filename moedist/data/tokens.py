"""Token files that exist already, memory-mapped."""

from __future__ import annotations

import dataclasses
import glob
import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from moedist.config import ConfigError, require
from moedist.data.contract import DataConfig, Documents, Source
from moedist.data.corpus import MemorySource, hold_out_tail
from moedist.data.paths import as_path, as_patterns, find_files
from moedist.data.token_files import Dtype, Format, TokenFile, map_tokens

SAMPLED_BLOCKS = 64
SAMPLED_TOKENS = 1 << 16


@dataclasses.dataclass(frozen=True)
class TokensConfig(DataConfig):
    """Memory-mapped ids: nanoGPT and llm.c ``.bin``, bare numbers, NumPy ``.npy``, Megatron ``.bin`` with ``.idx``.

    The files are one stream, in the order named. Only what is trained on is read: the ids of up to 64 blocks of 65536
    tokens per file (so all of a small file) are checked and hashed at the start, the others when they are read.

    Attributes:
        files: files, globs (quoted) and folders, or one of them; for Megatron also the prefix without its suffix.
        valid_files: likewise, to be held out; empty to hold out a part of ``files``.
        format: ``auto`` tells by the files' magic numbers and an ``.idx`` beside a ``.bin``; ``raw`` is bare ids of
            ``dtype``, ``nanogpt`` is bare uint16.
        dtype: of bare ids, little-endian.
        vocab_size: number of ids, of the tokenizer that wrote the files; must be set.
        eod_id: the id that ends a document; cuts documents where the files keep no index of them. None: a file
            without an index is one document.
        holdout_every: with n, the last n-th of the stream is held out where ``valid_files`` is empty (from the
            beginning of a document, if one is near). None to hold out nothing.
    """

    files: str | tuple[str, ...] = ()
    valid_files: str | tuple[str, ...] = ()
    format: Format = "auto"
    dtype: Dtype = "uint16"
    vocab_size: int | None = None
    eod_id: int | None = None
    holdout_every: int | None = 20

    def __post_init__(self) -> None:
        size, end, every = self.vocab_size, self.eod_id, self.holdout_every
        require(size is None or size >= 2, "vocab_size", size, "is too small", "Set it to the number of token ids.")
        require(
            end is None or (end >= 0 and (size is None or end < size)),
            "eod_id",
            end,
            f"is not an id below vocab_size = {size}",
            "Set it to the id that ends a document in these files, or null.",
        )
        require(
            every is None or every >= 2, "holdout_every", every, "leaves nothing to train on", "Set 2 or more, or null."
        )

    def open(self) -> Source:
        """Maps the files and checks a sample of their ids."""
        if self.vocab_size is None:
            remedy = "Set it to the number of ids of the tokenizer that wrote the files (GPT-2: 50257; bytes: 257)."
            raise ConfigError("vocab_size", None, "is not set, and token files do not say it", remedy)
        files = self._map("files", as_patterns(self.files))
        held_out = self._map("valid_files", patterns) if (patterns := as_patterns(self.valid_files)) else []
        train = join(files, self.eod_id)
        if held_out:
            valid, how = join(held_out, self.eod_id), "valid_files held out"
        elif self.holdout_every is None:
            valid, how = Documents(parts=()), "nothing held out"
        else:
            train, valid = hold_out_tail(train, self.holdout_every)
            how = f"the last 1/{self.holdout_every} held out"
        fingerprint = self._check_and_hash(files, held_out)
        description = (
            f"tokens: {len(files) + len(held_out)} files, {train.num_tokens} tokens to train on, "
            f"{valid.num_tokens} held out ({how}), {self.vocab_size} ids, sha256 (sampled) {fingerprint[:16]}"
        )
        return MemorySource(self.vocab_size, fingerprint, False, description, train, valid)

    def _map(self, key: str, patterns: tuple[str, ...]) -> list[TokenFile]:
        paths = find_files(key, tuple(_with_suffix(pattern) for pattern in patterns))
        # A glob or folder finds both files of a Megatron pair, which are one.
        pairs = {path.with_suffix(".bin") for path in paths if path.suffix == ".idx"}
        chosen = dict.fromkeys(path.with_suffix(".bin") if path.suffix == ".idx" else path for path in paths)
        require(all(path.exists() for path in pairs), key, list(patterns), "has an .idx without its .bin", "Add it.")
        return [map_tokens(key, path, self.format, self.dtype) for path in chosen]

    def _check_and_hash(self, files: Sequence[TokenFile], held_out: Sequence[TokenFile]) -> str:
        """SHA-256 of how the files are read, their sizes, and their sampled ids."""
        assert self.vocab_size is not None
        digest = hashlib.sha256(f"{self.vocab_size} {self.eod_id} {self.holdout_every} {len(files)}".encode())
        for file in (*files, *held_out):
            digest.update(f"{len(file.token_N)} {file.token_N.dtype.str}".encode())
            if file.start_G is not None:
                digest.update(np.ascontiguousarray(file.start_G, "<i8").data)
            for start in _sampled_blocks(len(file.token_N)):
                block = np.asarray(file.token_N[start : start + SAMPLED_TOKENS])
                self._check_ids(block, start, file.path)
                digest.update(np.ascontiguousarray(block).data)
        return digest.hexdigest()

    def _check_ids(self, block: np.ndarray, start: int, path: Path) -> None:
        assert self.vocab_size is not None
        wrong = np.flatnonzero((block < 0) | (block >= self.vocab_size))
        if len(wrong):
            problem = f"does not hold token id {int(block[wrong[0]])}, at position {start + int(wrong[0])} of {path}"
            remedy = (
                "Set vocab_size to the tokenizer's, and format and dtype to what wrote the file; if they are right, "
                "the file is corrupt: make it again."
            )
            raise ConfigError("vocab_size", self.vocab_size, problem, remedy)


def join(files: Sequence[TokenFile], eod_id: int | None) -> Documents:
    """Files end to end. Where all have an index of documents, it cuts them; else ``eod_id`` does."""
    parts = tuple(file.token_N for file in files)
    begin_P = np.cumsum([0, *(len(part) for part in parts)], dtype=np.int64)
    starts = [file.start_G + begin for file, begin in zip(files, begin_P, strict=False) if file.start_G is not None]
    if len(starts) == len(files):
        return Documents(parts, start_G=np.concatenate(starts))
    return Documents(parts, end_id=eod_id)


def _with_suffix(pattern: str) -> str:
    """Megatron's way to name a pair: by what its two files have in common."""
    path = as_path(pattern)
    is_prefix = not glob.has_magic(pattern) and not path.exists() and Path(f"{path}.idx").exists()
    return f"{path}.bin" if is_prefix else pattern


def _sampled_blocks(num_tokens: int) -> list[int]:
    """Where the sampled blocks begin: all of them where there are few, else evenly spread, both ends included."""
    num_blocks = -(-num_tokens // SAMPLED_TOKENS)
    if num_blocks <= SAMPLED_BLOCKS:
        return [block * SAMPLED_TOKENS for block in range(num_blocks)]
    return np.linspace(0, num_tokens - SAMPLED_TOKENS, SAMPLED_BLOCKS).astype(np.int64).tolist()
