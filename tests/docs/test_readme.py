"""The README's code runs, and its numbers hold."""

from __future__ import annotations

import os
import re

import pytest

from tests.docs.pages import ROOT, blocks, prose

README = ROOT / "README.md"


@pytest.mark.requirement("R3-16")
@pytest.mark.parametrize("code", blocks(README, "python"))
def test_python_runs(code: str):
    exec(compile(code, str(README), "exec"), {"__name__": "readme"})


def test_reading_order_has_the_right_lengths():
    rows = re.findall(r"^\| \[(\S+\.py)\]\(\1\) \| (\d+) \|", prose(README), re.MULTILINE)
    assert 10 <= len(rows) <= 12
    for path, said in rows:
        lines = len((ROOT / path).read_text().splitlines())
        assert abs(lines - int(said)) <= max(15, lines // 5), f"{path} has {lines} lines; README says {said}"


def test_files_in_the_picture_exist():
    (picture,) = [block for block in blocks(README, "") if "plan_capacity" in block]
    names = re.findall(r"[a-z]+/[a-z_/]+\.py", picture)
    assert len(names) >= 10
    for name in names:
        assert (ROOT / "moedist" / name).is_file(), name


def test_both_commands_stand_on_the_first_screen():
    first = "\n".join(README.read_text().splitlines()[:16])
    for script in ("launch/quickstart.sh", "launch/test.sh"):
        assert f"\n{script}\n" in first and os.access(ROOT / script, os.X_OK)
    assert (ROOT / ".ci" / "run").read_text().rstrip().endswith('launch/test.sh"')
