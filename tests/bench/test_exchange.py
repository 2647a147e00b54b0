from __future__ import annotations

import dataclasses

import torch

from moedist.bench.floor import exchange_bytes
from moedist.bench.shapes import LayerShape
from tests.ranks import Here

TINY = LayerShape("tiny", tokens=24, dim=16, hidden_dim=32, num_experts=4, top_k=2, dtype=torch.float32)


def exchange_and_layer(here: Here) -> tuple[dict, dict, dict]:
    from moedist.bench.exchange import measure_exchanges
    from moedist.bench.floor import Ceilings
    from moedist.bench.layer import measure_case
    from moedist.bench.peer.find import choose_peers
    from moedist.bench.trial import make_trial

    mesh = here.mesh_of(ep=here.world)
    (moved,) = measure_exchanges([TINY], ["balanced"], 1.0, 4, mesh)
    peers = choose_peers(["moedist_loop", "grouped_mm", "torchtitan_like"])
    case = measure_case(make_trial(TINY, "balanced", 1.0, mesh), peers, 4, Ceilings(1e9, 1e9))
    double = dataclasses.replace(TINY, num_experts=8)
    uneven = measure_case(make_trial(double, "zipf", 1.0, mesh), peers, 4, Ceilings(1e9, 1e9))
    return moved, case, uneven


def test_two_ranks(ranks):
    for moved, case, uneven in ranks(2).run(exchange_and_layer):
        by_name = {entry["name"]: entry for entry in moved["contenders"]}
        dispatchers, narrow = ["all_to_all", "budget", "padded", "hierarchical"], ["all_to_all bf16", "all_to_all fp8"]
        assert list(by_name) == dispatchers + narrow
        assert all(by_name[name]["error"] < 1e-6 and by_name[name]["gradient_error"] < 1e-6 for name in dispatchers)
        # Rounded there and back; the gradient in bf16 either way.
        for name, bound in zip(narrow, (1 / 256, 1 / 16), strict=True):
            assert bound / 10 < by_name[name]["error"] < 2 * bound
            assert 1 / 2560 < by_name[name]["gradient_error"] < 2 / 256
        assert moved["bare_mb"] == exchange_bytes(TINY, 2) / 1e6
        # Rows and their gates, there and back with their gradients; rows come home without a gate.
        gates = 2 * 24 * 2 * 4 / 2 / 1e6
        counts = 4 * 8 / 2 / 1e6
        assert abs(by_name["padded"]["sent_mb"] - moved["bare_mb"] - gates) < 1e-9
        assert abs(by_name["all_to_all"]["sent_mb"] - moved["bare_mb"] - gates - counts) < 1e-9
        sent_rows = 24 * 2 / 2
        for name, row in zip(narrow, (4 * 16 * 2, 2 * (16 + 4) + 2 * 16 * 2), strict=True):
            assert abs(by_name[name]["sent_mb"] - sent_rows * row / 1e6 - gates - counts) < 1e-9
        # No blocks above what the limit lets through; the place of its expert with each row there, and no counts.
        places = 24 * 2 * 4 / 2 / 1e6
        assert abs(by_name["budget"]["sent_mb"] - moved["bare_mb"] - gates - places) < 1e-9
        assert by_name["budget"]["spilled_pairs"] == 0
        assert [entry["name"] for entry in case["contenders"]] == ["moedist", "moedist_loop", "torchtitan_like"]
        assert case["skipped"] == {"grouped_mm": "keeps all experts on one rank"}
        assert all(entry["exchange_ms"] > 0 for entry in case["contenders"])
        assert uneven["dropped"] > 0 and "torchtitan_like" in uneven["skipped"]
