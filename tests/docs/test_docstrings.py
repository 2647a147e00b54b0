"""The examples in docstrings are run, so that they stay true."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

import moedist

ROOT = Path(moedist.__file__).parent.parent
SHOWN = sorted(path for path in (ROOT / "moedist").rglob("*.py") if ">>>" in path.read_text(encoding="utf-8"))


@pytest.mark.requirement("R3-16")
@pytest.mark.parametrize("path", SHOWN, ids=lambda path: str(path.relative_to(ROOT)))
def test_examples_give_what_they_show(path: Path):
    module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    results = doctest.testmod(module)
    assert results.attempted > 0 and results.failed == 0
