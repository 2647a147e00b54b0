from __future__ import annotations

import math

import numpy as np
import pytest

from moedist.data import yardstick
from moedist.data.corpus import MemorySource, concatenate, encode_bytes
from moedist.data.yardstick import bigram_cross_entropy


def bytes_source(train: list[bytes], valid: list[bytes], byte_level: bool = True) -> MemorySource:
    splits = [concatenate([encode_bytes(text) for text in texts]) for texts in (train, valid)]
    return MemorySource(257, "", byte_level, "", *splits)


def test_by_hand() -> None:
    """Pairs fitted: ab ba ab b.; measured: ab and b. (a full stop ends a document)."""
    found = bigram_cross_entropy(bytes_source([b"abab"], [b"ab"]), alpha=1.0)
    p_ab, p_b_end = 3 / (2 + 257), 2 / (2 + 257)
    assert found == pytest.approx(-(math.log(p_ab) + math.log(p_b_end)) / 2, rel=1e-12)


def test_documents_do_not_touch() -> None:
    """What follows the end of a document is neither fitted nor measured."""
    apart = bigram_cross_entropy(bytes_source([b"ab", b"ab", b"ab"], [b"ab", b"ab"]))
    p_ab = p_b_end = 4 / (3 + 257)
    assert apart == pytest.approx(-(math.log(p_ab) + math.log(p_b_end)) / 2, rel=1e-12)


def test_pieces_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    source = bytes_source([rng.bytes(300), rng.bytes(50)], [rng.bytes(100)])
    whole = bigram_cross_entropy(source)
    monkeypatch.setattr(yardstick, "CHUNK", 7)
    assert bigram_cross_entropy(source) == whole


def test_none_without_bytes_or_held_out_text() -> None:
    assert bigram_cross_entropy(bytes_source([b"ab"], [b"ab"], byte_level=False)) is None
    assert bigram_cross_entropy(bytes_source([b"ab"], [])) is None
