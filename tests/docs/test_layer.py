"""docs/layer.md and docs/examples/ run, and give the numbers that they speak of."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.docs.pages import ROOT, blocks

EXAMPLES = ROOT / "docs" / "examples"
PAGE = ROOT / "docs" / "layer.md"


def example(name: str) -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLES / name))


@pytest.mark.parametrize("code", blocks(PAGE, "python"))
def test_code_of_the_page_runs(code: str, capsys: pytest.CaptureFixture[str]):
    exec(compile(code, str(PAGE), "exec"), {"__name__": "page"})


@pytest.mark.requirement("R1-10")
def test_R1_10_four_dense_experts(capsys: pytest.CaptureFixture[str]):
    found = example("dense_four_experts.py")
    found["main"]()
    text = capsys.readouterr().out
    assert "4 experts, 264,196 parameters" in text and "output [32, 128]" in text and "expert_3_avg_weight" in text
    layer = found["build"]()
    assert layer.top_k == 2 and layer.num_parameters() == 264_196


@pytest.mark.requirement("R2-49", "R1-44")
def test_R1_44_training_loop():
    """In a fifth of its length: the task is learned better than without choosing, and every expert is used."""
    found = example("training_loop.py")
    losses, held_out, monitor = found["train"](steps=120)
    assert losses[-1] < 0.6 * losses[0] and held_out < 0.6
    assert monitor.num_steps == 24 and (monitor.get_statistics().avg_usage > 0).all()
    assert torch.isclose(monitor.get_statistics().avg_gates.sum(), torch.tensor(1.0).double())


def test_examples_are_linked():
    pages = [path.read_text() for path in (ROOT / "docs").glob("*.md")]
    for path in EXAMPLES.glob("*.py"):
        assert any(f"(examples/{Path(path).name})" in page for page in pages), path.name
