"""What a check found, and what to do about it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Literal

Level = Literal["ok", "warning", "problem"]
"""``warning``: a run starts, and may be slow or lose something. ``problem``: it will fail, or already did."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        check: what, in a word or two.
        level: how it is.
        text: what was found.
        remedy: what to do, as a sentence; empty where nothing is to be done.
    """

    check: str
    level: Level
    text: str
    remedy: str = ""


def ok(check: str, text: str) -> Finding:
    """Nothing is to be done."""
    return Finding(check, "ok", text)


def warning(check: str, text: str, remedy: str) -> Finding:
    """A run starts all the same."""
    return Finding(check, "warning", text, remedy)


def problem(check: str, text: str, remedy: str) -> Finding:
    """A run cannot go well."""
    return Finding(check, "problem", text, remedy)


def worst(findings: Iterable[Finding]) -> Level:
    """The worst level; ``ok`` where nothing was looked at."""
    levels: tuple[Level, ...] = ("ok", "warning", "problem")
    return max((finding.level for finding in findings), key=levels.index, default="ok")
