"""A corpus that is held in memory: documents as arrays of ids, every n-th held out."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Sequence

import numpy as np

from moedist.data.contract import Documents, Split

BYTE_VOCAB_SIZE = 257
"""256 bytes and the end of a document."""
BYTE_END_ID = 256


@dataclasses.dataclass(frozen=True, eq=False)
class MemorySource:
    """An opened corpus in memory (`moedist.data.contract.Source`)."""

    vocab_size: int
    fingerprint: str
    byte_level: bool
    description: str
    train: Documents
    valid: Documents

    def describe(self) -> str:
        """Name, files, sizes, hash."""
        return self.description

    def documents(self, split: Split) -> Documents:
        """The documents of one split."""
        return self.train if split == "train" else self.valid


def hash_named(files: Iterable[tuple[str, bytes]]) -> str:
    """SHA-256 of named contents: each name and each length goes in, so that no two lists of files share a hash."""
    digest = hashlib.sha256()
    for name, content in files:
        encoded = name.encode("utf-8", "surrogateescape")
        digest.update(len(encoded).to_bytes(8, "little") + encoded + len(content).to_bytes(8, "little"))
        digest.update(content)
    return digest.hexdigest()


def encode_bytes(content: bytes) -> np.ndarray:
    """One document at byte level: uint16 ids of its bytes, then `BYTE_END_ID`; nothing where there are no bytes."""
    if not content:
        return np.empty(0, np.uint16)
    return np.append(np.frombuffer(content, np.uint8).astype(np.uint16), np.uint16(BYTE_END_ID))


def concatenate(documents: Sequence[np.ndarray], dtype: np.dtype | type = np.uint16) -> Documents:
    """Documents end to end; those without tokens vanish."""
    kept = [document for document in documents if len(document)]
    length_G = np.array([len(document) for document in kept], np.int64)
    token_N = np.concatenate(kept) if kept else np.empty(0, dtype)
    return Documents(parts=(token_N,), start_G=np.cumsum(length_G) - length_G)


def hold_out(documents: Sequence[np.ndarray], every: int | None) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Training and held-out documents: the ``every``-th, the ``2 * every``-th and so on are held out."""
    if every is None:
        return list(documents), []
    train = [document for place, document in enumerate(documents, start=1) if place % every]
    return train, list(documents[every - 1 :: every])
