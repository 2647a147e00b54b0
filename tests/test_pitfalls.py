"""What cost other projects a bug that looked like training: each has the tests that catch it, marked with its number.

    pytest -m pitfall            all of them
    grep -rn 'pitfall("13"' tests/  those of one

A test may hold several, and several tests one. `ROWS` says in short what goes wrong; the marked tests say how it shows.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).parent

ROWS = {
    "1": "expert gradients are divided by a size that has no place there",
    "2": "the gradient's norm is that of a rank, or counts copies twice",
    "3": "the router's gradient is not reduced",
    "4": "a rank or an expert without tokens hangs, or has no gradient",
    "5": "ranks take part in different numbers of collectives",
    "6": "replicas of experts drift apart",
    "7": "first values depend on the layout, or are the same for all experts",
    "7b": "an exchange in backward takes a transposed gradient for a contiguous one",
    "8": "the balance loss never reaches the router",
    "9": "its coefficient depends on ranks, accumulation or micro-batches",
    "10": "its coefficient acts twice",
    "11": "its fraction is counted after the drop",
    "12": "the logged value is not the one that trains",
    "13": "counts in bf16",
    "14": "the balancing bias is cast with the model, or lost in checkpoints",
    "15": "the bias moves by counts of recomputation, evaluation, padding or one micro-batch",
    "16": "padding takes capacity, experts and a share of the balance loss",
    "17": "recomputation routes ties otherwise, or lays rows out otherwise",
    "17b": "recomputation draws other noise",
    "18": "losses collect in a list of the module",
    "19": "a capacity above the number of tokens",
    "20": "capacity in floating point",
    "21": "ties, not positions, decide who is dropped",
    "22": "uneven tokens per rank",
    "23": "grouped_mm: rows past the last offset, gradients of stride 0, widths that are no multiples of 16 bytes",
    "24": "equal scores in any order",
    "25": "a sum by atomics",
    "26": "an offset or a product that does not fit its integers",
    "27": "noise that changes the input, the logits or an evaluation",
    "28": "autocast makes the router bf16",
    "29": "one rank's experts are saved for all",
    "30": "experts sorted as strings",
    "31": "metrics wait for a rank without a MoE layer",
    "32": "one series per expert and layer",
    "33": "a table that ends at 10,000 rows",
    "34": "rows vanish after a resume from an older step",
    "35": "two ranks, two output folders",
    "36": "FLOPs of all experts instead of the active ones",
    "37": "time-outs that do not reach a group; an exit that hangs",
}
OPEN: set[str] = set()
"""Rows that need not have a marked test yet; take a row out with the test that holds it."""


def marked() -> Iterator[tuple[str, str]]:
    """Row and test of every mark, read from the sources: a run may have collected a part of the tests only."""
    for path in TESTS.rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef) or not node.name.startswith("test"):
                continue
            for decorator in node.decorator_list:
                if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "pytest.mark.pitfall":
                    for row in decorator.args:
                        yield ast.literal_eval(row), f"{path.relative_to(TESTS)}::{node.name}"


def test_every_pitfall_has_a_test():
    tests: dict[str, list[str]] = {}
    for row, name in marked():
        tests.setdefault(row, []).append(name)
    assert tests.keys() <= ROWS.keys(), "a mark names no row"
    missing = {row: text for row, text in ROWS.items() if row not in tests and row not in OPEN}
    assert not missing
