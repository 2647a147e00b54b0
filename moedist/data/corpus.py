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

END_SEARCH = 1 << 20
"""Tokens that are searched for the end of a document: enough for a book, little enough to read from a mapped file."""


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


def hold_out_tail(documents: Documents, every: int) -> tuple[Documents, Documents]:
    """Cuts the stream in two: the last ``1/every`` of its tokens is held out.

    The cut moves on to where the next document begins, if one begins within the first half of the held-out part.
    """
    end = documents.num_tokens
    cut = end - end // every
    cut = _beginning_within(documents, cut, cut + (end - cut) // 2)
    return _slice(documents, 0, cut), _slice(documents, cut, end)


def _beginning_within(documents: Documents, first: int, last: int) -> int:
    """The first place from ``first`` to ``last`` where a document begins; ``first`` if there is none."""
    if documents.start_G is not None:
        place = int(np.searchsorted(documents.start_G, first))
        begins = place < len(documents.start_G) and documents.start_G[place] <= last
        return int(documents.start_G[place]) if begins else first
    if documents.end_id is not None and first > 0:
        searched = _slice(documents, first - 1, min(last, first + END_SEARCH)).parts
        ends = np.flatnonzero(np.concatenate(searched) == documents.end_id)
        return first + int(ends[0]) if len(ends) else first
    return first


def _slice(documents: Documents, begin: int, end: int) -> Documents:
    """Tokens ``begin`` to ``end`` of a stream, as views; a document that is cut begins again."""
    parts, place = [], 0
    for part in documents.parts:
        piece = part[max(begin - place, 0) : max(end - place, 0)]
        parts += [piece] if len(piece) else []
        place += len(part)
    start_G = documents.start_G
    if start_G is not None:
        inside_G = start_G[(start_G > begin) & (start_G < end)] - begin
        start_G = np.concatenate([np.zeros(1 if end > begin else 0, np.int64), inside_G])
    return dataclasses.replace(documents, parts=tuple(parts), start_G=start_G)
