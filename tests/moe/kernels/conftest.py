"""Ranks on which kernels run in Triton's interpreter."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest

from tests.ranks import Here, RankPool


def interpreted(here: Here) -> bool:
    from moedist.moe.kernels.ffn_kernels import INTERPRETED

    return INTERPRETED


def by_twins() -> Any:
    """While it lasts, everything is computed in plain torch."""
    from moedist.moe.kernels import device

    return mock.patch.object(device, "_why_not", lambda *_: "twins are asked for")


@pytest.fixture(scope="session")
def interpreter() -> Iterator[Callable[[int], RankPool]]:
    """``interpreter(world)``: as `ranks`, kernels computed on the host line by line. A process of its own, because a
    kernel stays what it was when its module was imported."""
    pytest.importorskip("triton")
    pools: dict[int, RankPool] = {}

    def pool(world: int) -> RankPool:
        if world not in pools:
            pools[world] = RankPool(world)
            with mock.patch.dict(os.environ, TRITON_INTERPRET="1"):
                assert all(pools[world].run(interpreted))
        return pools[world]

    yield pool
    for each in pools.values():
        each.close()
