"""The closed form of memory against torch's memory tracker on one full step of fakes."""

from __future__ import annotations

import pytest

from moedist.config import ConfigError
from moedist.estimate.fake_run import fake_run
from moedist.launch.compose import compose
from tests.estimate.checked import CHECKED, COMMON, compare, configured

LIMIT = 0.1
# Two layers of a small model, where rows and weights weigh alike.
SMALL = [
    *("data.vocab_size=2000", "model.dim=128", "model.layers.num_layers=2", "moe.num_experts=8", "mesh.ep=2"),
    *("moe.experts.hidden_dim=512", "train.sequence_length=256", "train.micro_batch=4", "train.precision=bf16"),
]


def test_a_small_step_holds_what_the_formulas_say():
    compared = compare(compose([*COMMON, *SMALL, "mesh.fsdp=4"]).config)
    assert abs(compared.error) <= LIMIT, compared


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("name", CHECKED)
def test_closed_forms_hold_where_they_were_not_made(name: str, checkpointing: str):
    compared = compare(configured(name, checkpointing))
    assert compared.tracked >= 2**30
    assert abs(compared.error) <= LIMIT, compared


def test_what_fakes_cannot_run_is_refused():
    for overrides in (["mesh.fsdp=4", "engine.offload=true"], ["moe/dispatch=hierarchical"]):
        config = compose([*COMMON, *SMALL, *overrides]).config
        with pytest.raises(ConfigError, match="cannot run on fakes"):
            fake_run(config, 2000, 4)
