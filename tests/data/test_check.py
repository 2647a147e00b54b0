from __future__ import annotations

from pathlib import Path

import pytest

from moedist.config import ConfigError
from moedist.data.check import check_data, open_data
from moedist.data.synthetic import SyntheticConfig
from moedist.data.text import TextConfig


def text_of(tmp_path: Path, num_bytes: int, **settings: int | None) -> TextConfig:
    (tmp_path / "a.txt").write_bytes(b"x" * num_bytes)
    return TextConfig(files=str(tmp_path / "a.txt"), **settings)  # type: ignore[arg-type]


def check(config: TextConfig, sequence_length: int, global_samples: int, evaluates: bool = True) -> None:
    check_data(
        config,
        open_data(config),
        sequence_length=sequence_length,
        global_samples=global_samples,
        evaluates=evaluates,
    )


def test_long_enough(tmp_path: Path) -> None:
    """41 tokens, of which 39 train: 38 positions."""
    check(text_of(tmp_path, 40), sequence_length=38, global_samples=1)
    check(text_of(tmp_path, 40), sequence_length=19, global_samples=2)


def test_fewer_positions_than_a_sample(tmp_path: Path) -> None:
    message = (
        "train.sequence_length = 39 is too long for data=text: its training part has 39 tokens, and one sample needs "
        "40. Set train.sequence_length to 38 or less, or give more text."
    )
    with pytest.raises(ConfigError) as caught:
        check(text_of(tmp_path, 40), sequence_length=39, global_samples=1)
    assert str(caught.value) == message


def test_fewer_samples_than_a_step(tmp_path: Path) -> None:
    message = "train.global_batch_tokens = 57 takes 3 samples per step, .*has only 2 of 19 positions. Set train.micro"
    with pytest.raises(ConfigError, match=message):
        check(text_of(tmp_path, 40), sequence_length=19, global_samples=3)
    with pytest.raises(ConfigError, match="has only 2 of 13 positions"):  # a short third sample does not count
        check(text_of(tmp_path, 40), sequence_length=13, global_samples=3)


def test_nothing_held_out(tmp_path: Path) -> None:
    config = text_of(tmp_path, 40, holdout_every=None)
    with pytest.raises(ConfigError, match="data.holdout_every = None leaves 0 held-out tokens .*Set data.valid_files"):
        check(config, sequence_length=8, global_samples=1)
    check(config, sequence_length=8, global_samples=1, evaluates=False)


def test_errors_of_opening_carry_the_full_key() -> None:
    with pytest.raises(ConfigError, match="data.files = 'none.txt' does not exist"):
        open_data(TextConfig(files="none.txt"))
    assert open_data(SyntheticConfig(num_tokens=40)).vocab_size == 1024
