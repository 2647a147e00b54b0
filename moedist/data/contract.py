"""What a source of text owes the loader."""

from __future__ import annotations

import dataclasses
from typing import Literal, Protocol

import numpy as np

from moedist.config import Choice

Split = Literal["train", "valid"]


@dataclasses.dataclass(frozen=True)
class Documents:
    """The token stream of one split.

    Attributes:
        token_N: 1-D array of ids (in memory or memory-mapped): all documents, end to end.
        start_G: int64 offset of each document's first token, ascending, ``start_G[0] == 0``; together with
            ``len(token_N)`` it cuts the stream.
    """

    token_N: np.ndarray
    start_G: np.ndarray


class Source(Protocol):
    """An opened corpus, the same on every rank."""

    @property
    def vocab_size(self) -> int:
        """Number of ids; every id of every document is below it."""
        ...

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 of what was read: two corpora with one fingerprint are the same (kept in the checkpoint)."""
        ...

    @property
    def byte_level(self) -> bool:
        """True where token ids below 256 are bytes, so that losses are nats per byte and a bigram yardstick holds."""
        ...

    def describe(self) -> str:
        """One line for the start of a run: name, files, sizes, hash."""
        ...

    def documents(self, split: Split) -> Documents:
        """The documents of one split."""
        ...


@dataclasses.dataclass(frozen=True)
class DataConfig(Choice, path="data"):
    """Where tokens come from.

    Attributes:
        cross_documents: whether attention may look into the previous document of a packed row. False: attention and
            positions start again with each document.
    """

    cross_documents: bool = False

    def open(self) -> Source:
        """Reads or maps the corpus.

        Raises:
            ConfigError: it is empty, missing, unreadable or corrupt; with the path and the remedy. The parent of a
                run opens the source once, so that this is seen before a rank starts.
        """
        raise NotImplementedError
