"""The examples of mixtures of attention experts, at a reduced size."""

from __future__ import annotations

import re
import runpy
from typing import Any

import pytest

from moedist.nn import MoEAttention
from tests.docs.pages import ROOT


def example(name: str) -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "docs" / "examples" / f"{name}.py"))


def test_R2_53_basic_use(capsys: pytest.CaptureFixture[str]):
    """All router scores tie at zero input, where the gradients of a naive distance are NaN."""
    attention = example("attention_basic")["main"](num_sequences=2, length=8, dim=64)
    said = capsys.readouterr().out
    assert isinstance(attention, MoEAttention)
    assert "Output shape: [2, 8, 64]" in said and "All gradients finite: True" in said
    assert "Auxiliary loss: 0.020000" in said and "0.010000 as Switch" in said
    assert f"Number of parameters: {attention.num_parameters()}" in said


def test_R2_54_a_training_loop_with_the_monitor(capsys: pytest.CaptureFixture[str]):
    means = example("attention_train")["main"](num_epochs=5, num_batches=4, num_sequences=2, length=8)
    assert means[-1] < 0.8 * means[0]
    said = capsys.readouterr().out
    gates = [float(number) for number in re.findall(r"mean gate ([\d.]+)", said)]
    assert len(gates) == 3 and sum(gates) == pytest.approx(1, abs=2e-3)


def test_a_transformer_of_ones_own_learns():
    first, last = example("transformer")["main"](num_steps=20, half=4)
    assert last < first - 0.1


@pytest.mark.slow
def test_the_transformer_learns_to_copy():
    first, last = example("transformer")["main"]()
    assert first > 2.5 and last < 0.5
