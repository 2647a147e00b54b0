"""What a source of text owes the loader."""

from __future__ import annotations

import dataclasses
from typing import Literal, Protocol

import numpy as np

from moedist.config import Choice

Split = Literal["train", "valid"]


@dataclasses.dataclass(frozen=True, eq=False)
class Documents:
    """The token stream of one split: all documents, end to end.

    Where documents begin is known from ``start_G``, or, where a format keeps no offsets, from ``end_id``: the token
    after it begins a new document. With neither, the stream is one document. A memory-mapped stream is thus cut row
    by row as it is read, never scanned as a whole.

    Attributes:
        parts: 1-D arrays of unsigned or signed integers, in memory or memory-mapped; the stream is their concatenation.
        start_G: int64 offset of each document's first token, strictly ascending, ``start_G[0] == 0``; or None.
        end_id: the id that ends a document; or None.
    """

    parts: tuple[np.ndarray, ...]
    start_G: np.ndarray | None = None
    end_id: int | None = None

    @property
    def num_tokens(self) -> int:
        """Length of the stream."""
        return sum(len(part) for part in self.parts)


class Source(Protocol):
    """An opened corpus, the same on every rank."""

    @property
    def vocab_size(self) -> int:
        """Number of ids; every id of every document is below it."""
        ...

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 of what was read, kept in the checkpoint. Corpora with unlike fingerprints differ; those with
        one are the same (up to what a memory-mapped source says it does not read)."""
        ...

    @property
    def byte_level(self) -> bool:
        """True where ids below 256 are bytes, so that losses are nats per byte and the bigram yardstick holds."""
        ...

    def describe(self) -> str:
        """One line for the start of a run: name, files, sizes, hash."""
        ...

    def documents(self, split: Split) -> Documents:
        """The documents of one split; an empty stream where there is no held-out part."""
        ...


@dataclasses.dataclass(frozen=True)
class DataConfig(Choice, path="data"):
    """Where tokens come from.

    Attributes:
        cross_documents: whether attention may look into the previous document of a packed row. False: attention and
            positions start again with each document, and no document's end predicts the next one's beginning.
    """

    cross_documents: bool = False

    def open(self) -> Source:
        """Reads or maps the corpus.

        Raises:
            ConfigError: it is empty, missing, unreadable or corrupt; with the path and the remedy. The parent of a
                run opens the source once, so that this is seen before a rank starts.
        """
        raise NotImplementedError
