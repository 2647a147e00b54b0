"""What all tests share: ranks that are started once."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.ranks import RankPool


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without a GPU, tests that need one are skipped and say so."""
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], RankPool]]:
    """``ranks(world)``: the pool of that many ranks, started by its first job and reused until the session ends."""
    pools: dict[int, RankPool] = {}

    def pool(world: int) -> RankPool:
        return pools.setdefault(world, RankPool(world))

    yield pool
    for each in pools.values():
        each.close()
