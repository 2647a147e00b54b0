"""Small corpora whose every token is known."""

from __future__ import annotations

import numpy as np

from moedist.data.contract import Documents
from moedist.data.corpus import MemorySource, concatenate


def source_of(train: Documents, valid: Documents | None = None, vocab_size: int = 1000) -> MemorySource:
    """An opened corpus of given streams."""
    return MemorySource(vocab_size, "0" * 64, False, "for a test", train, valid or concatenate([]))


def counting(num_tokens: int, vocab_size: int = 1 << 20) -> MemorySource:
    """One document 0, 1, 2, ... in both splits: a token says where it stood."""
    stream = Documents((np.arange(num_tokens, dtype=np.uint32),), start_G=np.zeros(1, np.int64))
    return source_of(stream, stream, vocab_size)


def documents_of(*lengths: int, end_id: int = 99) -> list[np.ndarray]:
    """Documents of given lengths: the g-th counts from 100 * (g + 1) and ends with ``end_id``."""
    return [
        np.append(np.arange(length - 1) + 100 * (g + 1), end_id).astype(np.uint16) for g, length in enumerate(lengths)
    ]
