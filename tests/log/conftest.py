from __future__ import annotations

import io

import pytest

from moedist.log.sink.contract import RunInfo


@pytest.fixture
def run_info(tmp_path) -> RunInfo:
    return RunInfo(
        directory=tmp_path,
        name="tiny",
        run_id="abcd1234",
        group_id="first123",
        resumed_step=0,
        config={"seed": 1, "moe": {"num_experts": 8}},
        environment={"code": "abc", "torch": "2"},
        num_steps=1000,
        device="4 x cpu",
        terminal=io.StringIO(),
    )
