"""Rows on their way: even routing in closed form, and as it was recorded."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from moedist.cli.estimate import on_nodes
from moedist.config import ConfigError
from moedist.estimate.cluster import read_clusters
from moedist.estimate.estimate import as_mapping, estimate
from moedist.estimate.shape import Layout, shape_of
from moedist.estimate.traffic import even_spread, read_spreads, traffic_of
from moedist.log.config import TraceConfig
from moedist.moe.dispatch.all_to_all import AllToAllConfig
from moedist.moe.dispatch.budget import BudgetConfig
from moedist.moe.dispatch.contract import DispatchConfig
from moedist.moe.dispatch.hierarchical import HierarchicalConfig
from moedist.moe.trace import LayerTrace, StepTrace, write_part
from moedist.train.config import RunConfig
from tests.ranks import Here
from tests.train.tiny import CONFIG, changed, make_trainer, no_measuring

RANKS, EP = 4, 4
TINY = changed(CONFIG, mesh={"ep": EP}, capacity={"factor": None})
LAYOUT = Layout.of(TINY, RANKS, "cpu")
SHAPE = shape_of(TINY, 37)


def record(folder: Path, expert_TK: torch.Tensor) -> None:
    """A step of one rank in which both layers of `TINY` route alike."""
    tokens = expert_TK.shape[0]
    layer = LayerTrace(8, expert_TK, torch.full(expert_TK.shape, 0.5), expert_TK)
    ids = torch.arange(tokens)
    part = StepTrace(1, ids, ids, ids, torch.ones(tokens, dtype=torch.bool), {1: layer, 2: layer})
    write_part(folder, part, 0, 1)


def test_even_routing_is_the_binomial_count():
    # 2 of 8 experts, two on each of 4 ranks: both on one rank with probability 1/7
    assert even_spread(8, 2, ep=4, num_nodes=2).ranks == pytest.approx(1 / 7 + 2 * 6 / 7)
    assert even_spread(8, 2, ep=4, num_nodes=2).nodes == pytest.approx(3 / 7 + 2 * 4 / 7)


def test_recorded_routing_counts_distinct_ranks_and_the_fullest(tmp_path: Path):
    together = LAYOUT.tokens * EP
    # Half of the tokens go twice to rank 0 (experts 0 and 1), half to ranks 0 and 3 (experts 0 and 7).
    expert_TK = torch.tensor([[0, 1], [0, 7]]).repeat(together // 2, 1)
    record(tmp_path, expert_TK)
    spreads = read_spreads(tmp_path, SHAPE, LAYOUT, ranks_per_node=2)
    assert spreads.keys() == {1, 2}
    assert spreads[1].ranks == 1.5 and spreads[1].nodes == 1.5 and spreads[1].pairs_per_token == 2
    assert spreads[1].heaviest == 3.0  # three quarters of the pairs on one of four ranks
    traffic = traffic_of(SHAPE, LAYOUT, 2, spreads)[1]
    assert traffic.rows.sent == LAYOUT.tokens * 2 and traffic.rows.arrived == LAYOUT.tokens * 6
    even = traffic_of(SHAPE, LAYOUT, 2)[1]
    ratio = 1.5 / even_spread(8, 2, EP, 2).ranks
    assert traffic.per_rank.total == pytest.approx(even.per_rank.total * ratio)


def test_a_budget_bounds_rows_whatever_the_routing(tmp_path: Path):
    record(tmp_path, torch.zeros(LAYOUT.tokens * EP, 2, dtype=torch.int64) + torch.tensor([0, 1]))
    shape = shape_of(changed(TINY, moe={"dispatch": BudgetConfig(1.5)}), 37)
    even = traffic_of(shape, LAYOUT, 2)[1]
    assert even.rows.sent == even.rows.arrived == 1.5 * LAYOUT.tokens * 2
    spreads = read_spreads(tmp_path, shape, LAYOUT, ranks_per_node=2)
    skewed = traffic_of(shape, LAYOUT, 2, spreads)[1]
    assert spreads[1].heaviest == 4.0 and skewed.rows == even.rows and skewed.chosen == even.chosen
    assert even.chosen.total > 1.5 * even.per_pair.total


def test_skew_needs_more_memory_and_time(tmp_path: Path):
    record(tmp_path, torch.zeros(LAYOUT.tokens * EP, 2, dtype=torch.int64) + torch.tensor([0, 1]))
    cluster = dataclasses.replace(read_clusters()["laptop"], latency_us=0.0)
    spreads = read_spreads(tmp_path, SHAPE, LAYOUT, cluster.ranks_per_node)
    even = estimate(TINY, 37, RANKS, cluster)
    skewed = estimate(TINY, 37, RANKS, cluster, spreads=spreads)
    assert spreads[1].heaviest == EP
    assert skewed.traffic[1].rows.arrived == EP * even.traffic[1].rows.arrived
    assert skewed.duration.exchange == pytest.approx(EP * even.duration.exchange)


class Written:
    """Stands for the run's log."""

    def write(self, record: dict[str, Any]) -> None:
        self.record = record

    def say(self, line: str) -> None:
        raise AssertionError(line)


def traced_step(here: Here, config: RunConfig, folder: Path) -> float:
    """Records the routing of a step; bytes that all ranks sent in it."""
    trainer = make_trainer(config, config.data.open(), here.mesh_of(here.world), traces=folder)
    log = Written()
    with no_measuring():
        assert trainer.step(trainer.loader())
        trainer.write_trace(log)  # type: ignore[arg-type]
        trainer.record(log, evaluated=False)  # type: ignore[arg-type]
    return float(log.record["moe/exchange_bytes"])


@pytest.mark.parametrize(
    "dispatch",
    [AllToAllConfig(), HierarchicalConfig(once_per="rank"), AllToAllConfig(exchange_dtype="fp8")],
    ids=["pairs", "copies", "fp8"],
)
def test_the_trace_of_a_run_gives_the_bytes_that_the_run_sent(ranks, tmp_path: Path, dispatch: DispatchConfig):
    """Of a run that drops so much that of many tokens nothing is sent."""
    config = changed(
        CONFIG,
        mesh={"ep": 2},
        capacity={"factor": 0.4},
        moe={"dispatch": dispatch},
        data={"num_tokens": 12_000},
        train={"sequence_length": 512, "activation_checkpointing": "full"},
        log={"trace": TraceConfig(steps=(1,))},
    )
    sent = ranks(2).run(traced_step, config, tmp_path)[0]
    shape, layout = shape_of(config, 37), Layout.of(config, 2, "cpu")
    spreads = read_spreads(tmp_path, shape, layout, 2)
    cluster = read_clusters()["laptop"]
    traced, even = (as_mapping(estimate(config, 37, 2, cluster, spreads=found)) for found in (spreads, None))
    assert 2 * traced["all_to_all"]["bytes_per_step"] == pytest.approx(sent, rel=0.03)
    assert 2 * even["all_to_all"]["bytes_per_step"] > 1.5 * sent


def test_exchanges_one_after_the_other_take_the_sum_of_their_times():
    config = changed(TINY, moe={"dispatch": HierarchicalConfig()})
    cluster = dataclasses.replace(read_clusters()["laptop"], latency_us=0.0, ranks_per_node=2)
    found = estimate(config, 37, RANKS, cluster)
    sent = [layer.chosen for layer in found.traffic.values()]
    seconds = sum(
        one.inside / (cluster.node_gb_per_s * 1e9) + one.across / (cluster.network_gb_per_s * 1e9) for one in sent
    )
    assert all(one.inside > 0 and one.across > 0 for one in sent)
    assert found.duration.exchange == pytest.approx(seconds)


def test_nodes_of_fewer_ranks_than_the_cluster_has_count():
    cluster = read_clusters()["h100"]
    assert on_nodes(cluster, TINY, ranks=4).ranks_per_node == 8
    assert on_nodes(cluster, changed(TINY, mesh={"ranks_per_node": 2}), ranks=4).ranks_per_node == 2
    assert on_nodes(cluster, changed(TINY, launch={"nproc": 4}), ranks=None).ranks_per_node == 4


def test_a_trace_of_another_model_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="--trace"):
        read_spreads(tmp_path, SHAPE, LAYOUT, 2)
    layer = LayerTrace(4, torch.zeros(2, 2).long(), torch.zeros(2, 2), torch.zeros(2, 2).long())
    ids = torch.arange(2)
    write_part(tmp_path, StepTrace(1, ids, ids, ids, ids >= 0, {1: layer, 2: layer}), 0, 1)
    with pytest.raises(ConfigError, match="4 experts"):
        read_spreads(tmp_path, SHAPE, LAYOUT, 2)
