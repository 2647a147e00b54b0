from __future__ import annotations

import numpy as np
import pytest

from moedist.config import ConfigError
from moedist.data.synthetic import SyntheticConfig


def test_deterministic_and_keyed() -> None:
    config = SyntheticConfig(num_tokens=4000)
    first, again = config.open(), config.open()
    assert (first.documents("train").parts[0] == again.documents("train").parts[0]).all()
    assert first.fingerprint == again.fingerprint
    other = SyntheticConfig(num_tokens=4000, seed=1).open()
    assert other.fingerprint != first.fingerprint
    assert (other.documents("train").parts[0] != first.documents("train").parts[0]).mean() > 0.9


def test_known_values_stay() -> None:
    token_N = SyntheticConfig(num_tokens=64, vocab_size=100, document_length=16).open().documents("train").parts[0]
    assert token_N[:12].tolist() == [43, 50, 57, 64, 71, 78, 85, 92, 0, 52, 14, 21]


def test_rule_jumps_and_lengths() -> None:
    config = SyntheticConfig(vocab_size=1000, num_tokens=200_000, document_length=100, jump_rate=0.2)
    source = config.open()
    documents = source.documents("train")
    (token_N,), start_G = documents.parts, documents.start_G
    assert start_G is not None
    assert np.flatnonzero(token_N == 999).tolist() == [*(start_G[1:] - 1), 199_999]
    assert 90 < np.diff(start_G).mean() < 110
    inner = (token_N[:-1] != 999) & (token_N[1:] != 999)
    follows = token_N[1:] == (token_N[:-1].astype(int) + 7) % 999
    assert 0.79 < follows[inner].mean() < 0.81
    before, after = token_N[start_G[1:] - 2].astype(int), token_N[start_G[1:]]
    assert (after == (before + 14) % 999).mean() < 0.02, "a document goes on where the last one ended"
    assert token_N.max() < source.vocab_size and source.documents("valid").num_tokens == 10_000
    counts = np.bincount(token_N, minlength=1000)[:999]
    assert counts.min() > 100 and counts.max() < 320


def test_large_vocabulary() -> None:
    source = SyntheticConfig(vocab_size=151_936, num_tokens=5000).open()
    assert source.documents("train").parts[0].max() > 1 << 16


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vocab_size": 2}, "vocab_size = 2 is too small. Set it to 3 or more."),
        ({"num_tokens": 39}, "num_tokens = 39 is too small. Set it to 40 or more."),
        ({"document_length": 1}, "document_length = 1 is too short. Set it to 2 or more."),
        ({"jump_rate": 1.5}, "jump_rate = 1.5 is no probability. Set it to 0.0 to 1.0."),
    ],
)
def test_bad_values(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SyntheticConfig(**settings)  # type: ignore[arg-type]
