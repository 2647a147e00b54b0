"""The shipped check of parity: it passes what is right and names what is wrong."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from moedist.doctor.parity import RESULT, check_rank
from moedist.moe.balance.importance import ImportanceConfig
from moedist.moe.balance.switch import SwitchConfig
from moedist.moe.balance.z_loss import ZLossConfig
from moedist.moe.dispatch.hierarchical import HierarchicalConfig
from moedist.moe.dispatch.padded import PaddedConfig
from moedist.moe.experts.grouped import GroupedConfig
from moedist.parallel import GradientTable
from moedist.train.config import RunConfig
from tests.ranks import Here
from tests.train.tiny import CONFIG, LENGTH, ROWS, changed

SOURCE = Path(__file__).parent / "src"
WORLD = 4
GLOBAL = changed(CONFIG, moe={"balance": {"switch": SwitchConfig(0.3), "z_loss": ZLossConfig(0.1)}})


def compared(
    here: Here,
    names: list[str],
    folder: str,
    ep: int,
    *,
    fsdp: int | None = None,
    ranks_per_node: int | None = None,
    spoilt: bool = False,
) -> list[dict[str, Any]]:
    """The comparisons, as rank 0 writes them."""
    results = []
    for name in names:
        run_dir = Path(folder, name)
        (run_dir / "logs").mkdir(parents=True, exist_ok=True)
        with ranks_forget_to_add() if spoilt else contextlib.nullcontext():
            mesh = here.mesh_of(ep, fsdp, ranks_per_node)
            assert check_rank(case(name), run_dir, mesh) == 0, (run_dir / "status.json").read_text()
        if here.rank == 0:
            results.append(json.loads((run_dir / RESULT).read_text()))
    return results


def case(name: str) -> RunConfig:
    """Capacity by rank, dropping on, noise on; balance over all ranks, over each, and both; accumulation; faults."""
    if str(SOURCE) not in sys.path:
        sys.path.insert(0, str(SOURCE))
    from faulty.moe.balance.own_ranks import OwnRanksConfig
    from faulty.moe.dispatch.gateless import GatelessConfig
    from faulty.moe.experts.halved import HalvedConfig

    balance = {"switch": SwitchConfig(0.3, "micro_batch"), "z_loss": ZLossConfig(0.1), "other": SwitchConfig(0.2)}
    twice = {"global_batch_tokens": 2 * WORLD * ROWS * LENGTH, "activation_checkpointing": "full"}
    whole_step = {
        "running": SwitchConfig(0.2),
        "whole": SwitchConfig(0.3, accumulation="two_pass"),
        "pooled": SwitchConfig(0.1, accumulation="two_pass", layers="pooled"),
        "own": SwitchConfig(0.1, "micro_batch", layers="pooled"),
        "importance": ImportanceConfig(0.1, accumulation="two_pass"),
    }
    parts: dict[str, dict[str, Any]] = {
        "right": {},
        "fast": {"moe": {"dispatch": PaddedConfig(), "experts": GroupedConfig(hidden_dim=12)}},
        "accumulated": {"moe": {"balance": balance, "shared_hidden_dim": 6}, "train": twice},
        "by_sequence": {
            "capacity": {"group": "sequence"},
            "moe": {"balance": {"switch": SwitchConfig(0.3, "sequence")}},
        },
        "whole_step": {"moe": {"balance": whole_step}, "train": twice},
        "over_nodes": {"moe": {"dispatch": HierarchicalConfig()}, "train": twice},
        "halved": {"moe": {"experts": HalvedConfig(hidden_dim=12)}},
        "gateless": {"moe": {"dispatch": GatelessConfig()}},
        "own_ranks": {"moe": {"balance": {"own_ranks": OwnRanksConfig(0.3)}}},
    }
    return changed(GLOBAL, **parts[name])


@contextlib.contextmanager
def ranks_forget_to_add() -> Iterator[None]:
    """The engine's sum over ranks is left out."""
    with mock.patch.object(GradientTable, "sum_copies", lambda *_: None):
        yield


def wrong(result: dict[str, Any]) -> set[str]:
    return {one["name"].rpartition(".ffn.")[2] for one in result["parameters"] if not one["good"]}


def in_block(result: dict[str, Any], block: int) -> list[dict[str, Any]]:
    return [one for one in result["parameters"] if one["name"].startswith(f"blocks.{block}.")]


def test_what_is_right_passes_over_nodes(ranks, tmp_path: Path):
    """Two nodes of two ranks, accumulation and full recomputation."""
    (result,) = ranks(WORLD).run(compared, ["over_nodes"], str(tmp_path), 4, ranks_per_node=2)[0]
    assert result["good"], result
    assert 0 < result["pairs"]["kept"] < result["pairs"]["asked"], "nothing was dropped"


@pytest.mark.parametrize("ep", [2, 4])
def test_what_is_right_passes(ranks, tmp_path: Path, ep: int):
    for result in ranks(WORLD).run(compared, ["fast", "accumulated", "by_sequence", "whole_step"], str(tmp_path), ep)[
        0
    ]:
        assert result["good"], result
        assert 0 < result["pairs"]["kept"] < result["pairs"]["asked"], "nothing was dropped"
        assert max(one["difference"] for one in result["parameters"]) > 0, "it compares a thing with itself"
        assert all(one["largest"] > 0 for one in result["parameters"])
        layouts = {one["name"].partition(".ffn.")[2]: one["layout"] for one in result["parameters"]}
        assert layouts["moe.bank.experts.up"] == f"{ep} pieces x {WORLD // ep} copies"


def test_weights_that_are_cut_pass(ranks, tmp_path: Path):
    for result in ranks(WORLD).run(compared, ["fast", "accumulated"], str(tmp_path), 2, fsdp=4)[0]:
        assert result["good"], result
        assert {one["layout"] for one in result["parameters"]} == {"4 pieces x 1 copies"}


def test_what_is_wrong_is_named(ranks, tmp_path: Path):
    names = ["halved", "gateless", "own_ranks"]
    halved, gateless, own_ranks = ranks(WORLD).run(compared, names, str(tmp_path), 2)[0]
    assert wrong(halved) == {"moe.bank.experts.down"} and halved["last_wrong"].startswith("blocks.2.")
    assert halved["parameters"][0]["difference"] == pytest.approx(halved["parameters"][0]["largest"] / 2)
    assert halved["numbers"]["loss"]["good"] and not halved["numbers"]["norm"]["good"]
    assert gateless["last_wrong"] == "blocks.2.ffn.moe.router.weight" and not gateless["good"]
    assert "moe.bank.experts.down" not in wrong({"parameters": in_block(gateless, 2)})
    assert gateless["numbers"]["loss"]["good"] and gateless["pairs"]["good"]
    assert not own_ranks["numbers"]["own_ranks"]["good"] and "moe.router.weight" in wrong(own_ranks)


def test_the_engines_own_sum_is_part_of_it(ranks, tmp_path: Path):
    (result,) = ranks(WORLD).run(compared, ["right"], str(tmp_path), 4, spoilt=True)[0]
    names = {one["name"] for one in result["parameters"]}
    assert {"moe.bank.experts.up", "moe.bank.experts.gate", "moe.bank.experts.down"}.isdisjoint(wrong(result))
    assert len([one for one in result["parameters"] if not one["good"]]) == len(names) - 3 * 2
