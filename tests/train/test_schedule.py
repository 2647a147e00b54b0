"""Learning-rate factors by hand."""

from __future__ import annotations

import math

import pytest

from moedist.config import ConfigError
from moedist.train.schedule.cosine import CosineConfig
from moedist.train.schedule.wsd import WSDConfig


@pytest.mark.parametrize("schedule", [CosineConfig(warmup_steps=4), WSDConfig(warmup_steps=4)])
def test_warmup(schedule):
    assert [schedule.factor(step, 20) for step in (1, 2, 3, 4)] == [0.25, 0.5, 0.75, 1.0]


def test_cosine():
    schedule = CosineConfig(warmup_steps=2, final_factor=0.2)
    # ten steps after the warm-up: half way down at the fifth
    assert schedule.factor(7, 12) == pytest.approx(0.2 + 0.8 * 0.5)
    assert schedule.factor(12, 12) == pytest.approx(0.2)
    assert schedule.factor(3, 12) == pytest.approx(0.2 + 0.4 * (1 + math.cos(math.pi / 10)))
    assert schedule.factor(99, 12) == pytest.approx(0.2), "past the end it stays"
    values = [schedule.factor(step, 12) for step in range(2, 13)]
    assert values == sorted(values, reverse=True)


def test_warmup_stable_decay():
    schedule = WSDConfig(warmup_steps=2, final_factor=0.2, decay_share=0.4)
    # steps 3 to 8 at the peak, 9 to 12 down in quarters of 0.8
    assert [schedule.factor(step, 12) for step in range(3, 9)] == [1.0] * 6
    assert [schedule.factor(step, 12) for step in range(9, 13)] == pytest.approx([0.8, 0.6, 0.4, 0.2])
    assert schedule.factor(99, 12) == pytest.approx(0.2)


@pytest.mark.parametrize("schedule", [CosineConfig(), WSDConfig()])
def test_without_warmup(schedule):
    assert 0.9 < schedule.factor(1, 100) <= 1
    assert schedule.factor(100, 100) == pytest.approx(0.1)
    assert schedule.factor(1, 1) == pytest.approx(0.1)


@pytest.mark.parametrize("schedule", [CosineConfig(warmup_steps=5), WSDConfig(warmup_steps=5)])
def test_a_run_that_ends_in_its_warmup(schedule):
    assert schedule.factor(3, 3) == 0.6


@pytest.mark.parametrize(
    ("make", "key", "said"),
    [
        (lambda: CosineConfig(warmup_steps=-1), "warmup_steps", "Set it to 0 or more"),
        (lambda: CosineConfig(final_factor=1.5), "final_factor", "Set it between 0 and 1"),
        (lambda: WSDConfig(final_factor=-0.1), "final_factor", "Set it between 0 and 1"),
        (lambda: WSDConfig(decay_share=0.0), "decay_share", r"Set it in \(0, 1\]"),
    ],
)
def test_errors(make, key, said):
    with pytest.raises(ConfigError, match=said) as caught:
        make()
    assert caught.value.key == key and repr(caught.value.value) in str(caught.value)
