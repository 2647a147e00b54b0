"""Recorded routing: what is written is read back, whatever layout wrote it, and damage is said."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from moedist.moe.balance.bias import BiasConfig
from moedist.moe.capacity import CapacityConfig
from moedist.moe.context import TokenContext
from moedist.moe.layer import MoEConfig
from moedist.moe.record import RoutingRecorder
from moedist.moe.router.expert_choice import ExpertChoiceConfig
from moedist.moe.router.replay import ReplayConfig
from moedist.moe.router.topk import TopKConfig
from moedist.moe.trace import LayerSizes, StepTrace, TraceError, open_trace, read_step, write_part

CONFIG = MoEConfig(num_experts=6, capacity=CapacityConfig(factor=1.0, overflow="next_best"))


def batch(rank: int, length: int = 4) -> tuple[torch.Tensor, TokenContext]:
    """Two rows of a rank, the last position padding."""
    x_TD = 1 + torch.randn(2 * length, 5, generator=torch.Generator().manual_seed(rank))
    ids_T = torch.arange(2 * length) + 10 * rank
    valid_T = torch.arange(2 * length) != 2 * length - 1
    sample_B = torch.tensor([7, 2]) + 20 * rank
    return x_TD, TokenContext.of_rows(2, length, id_T=ids_T, valid_T=valid_T, sample_B=sample_B)


def record(rank: int = 0, step: int = 3, micro_steps: int = 1) -> StepTrace:
    layer = CONFIG.build(5, layer=2)
    recorder = RoutingRecorder(layer)
    for micro_step in range(micro_steps):
        layer(*batch(99))  # nobody listens
        with recorder.listening():
            layer(*batch(rank + micro_step))
        with recorder.listening(False):
            layer(*batch(99))
    trace = recorder.take(step)
    assert recorder.take(step) is None
    return trace


def test_what_is_heard_is_what_the_layer_did():
    trace, (x_TD, ctx) = record(), batch(0)
    layer = CONFIG.build(5, layer=2)
    routing = layer.router(x_TD, ctx)
    heard = trace.layers[2]
    assert torch.equal(heard.expert_TK.reshape(-1), routing.expert_N)
    assert torch.equal(heard.gate_TK.reshape(-1), routing.gate_N.detach())
    report = layer(x_TD, ctx).report
    assert torch.bincount(heard.computed_TK[heard.kept_TK], minlength=6).tolist() == report.kept_E.tolist()
    assert torch.bincount(heard.expert_TK[ctx.valid_T].reshape(-1), minlength=6).tolist() == report.asked_E.tolist()
    assert (heard.computed_TK[heard.kept_TK] != heard.expert_TK[heard.kept_TK]).any(), "overflow moves some"
    assert not heard.kept_TK[~ctx.valid_T].any()


def test_micro_steps_follow_one_another():
    both, first, second = record(micro_steps=2), record(), record(rank=1)
    for field in ("sample_T", "position_T", "id_T", "valid_T"):
        assert torch.equal(getattr(both, field), torch.cat([getattr(first, field), getattr(second, field)]))
    assert torch.equal(both.layers[2].gate_TK, torch.cat([first.layers[2].gate_TK, second.layers[2].gate_TK]))


def test_written_and_read(tmp_path: Path):
    parts = [record(rank) for rank in range(3)]
    for rank in (2, 0, 1):
        write_part(tmp_path / "traces", parts[rank], rank, 3)
    assert not list(tmp_path.rglob(".*")), "a draft is left"
    for path in (tmp_path, tmp_path / "traces", tmp_path / "traces" / "step_00000003"):
        index = open_trace(path)
        assert index.layers == {2: LayerSizes(6, 2)} and list(index.steps) == [3]
    step = read_step(index.steps[3])
    assert step.step == 3 and step.layers[2].num_experts == 6
    for field in ("sample_T", "position_T", "id_T", "valid_T"):
        value = getattr(step, field)
        assert torch.equal(value, torch.cat([getattr(part, field) for part in parts])), field
        assert value.dtype == getattr(parts[0], field).dtype
    for field in ("expert_TK", "gate_TK", "computed_TK"):
        whole = torch.cat([getattr(part.layers[2], field) for part in parts])
        assert torch.equal(getattr(step.layers[2], field), whole), field
    assert read_step(index.steps[3], []).layers == {}


def test_a_start_on_other_ranks_replaces_the_files(tmp_path: Path):
    for rank in range(4):
        write_part(tmp_path, record(), rank, 4)
    for rank in (1, 0):
        write_part(tmp_path, record(), rank, 2)
    assert [path.name for path in open_trace(tmp_path).steps[3]] == [
        "rank_00000_of_00002.npz",
        "rank_00001_of_00002.npz",
    ]


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(file, **arrays):
        file.write(b"half")
        raise OSError("no space")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match="no space"):
        write_part(tmp_path, record(), 0, 1)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def damage(path: Path, how: str) -> None:
    if how == "cut":
        path.write_bytes(path.read_bytes()[:200])
    elif how == "missing":
        path.unlink()
    elif how == "pickle":
        np.savez(path.with_suffix(""), meta=np.array([{"format": 1}], dtype=object))
    else:
        arrays = dict(np.load(path))
        meta = json.loads(bytes(arrays["meta"]))
        meta |= {"format": 9} if how == "format" else {"layers": {"2": [7, 2]}}
        arrays["meta"] = np.frombuffer(json.dumps(meta).encode(), np.uint8)
        np.savez(path.with_suffix(""), **arrays)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("cut", "cannot be read"),
        ("missing", r"lacks the files of ranks \[1\] of 2"),
        ("pickle", "no readable meta"),
        ("format", "the format 9"),
        ("layers", "of another model"),
    ],
)
def test_damage_is_said(how: str, said: str, tmp_path: Path):
    files = [write_part(tmp_path, record(rank), rank, 2) for rank in range(2)]
    damage(files[1], how)
    with pytest.raises(TraceError, match=said):
        open_trace(tmp_path)


@pytest.mark.parametrize("name", ["nowhere", "."])
def test_no_trace_is_said(name: str, tmp_path: Path):
    with pytest.raises(TraceError, match="holds no recorded step"):
        open_trace(tmp_path / name)


def test_routers_without_choices_per_token_cannot_be_recorded():
    layer = MoEConfig(num_experts=4, router=ExpertChoiceConfig(), capacity=CapacityConfig(factor=None)).build(5)
    recorder = RoutingRecorder(layer)
    with recorder.listening():
        layer(*batch(0))
    with pytest.raises(TraceError, match="expert choice"):
        recorder.take(1)
    assert recorder.take(2) is None, "the next step starts anew"


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    for rank in range(2):
        write_part(tmp_path / "traces", record(rank), rank, 2)
    return tmp_path


def replaying(trace: Path, **changes):
    config = dataclasses.replace(CONFIG, router=ReplayConfig(trace=str(trace), **changes))
    return config.build(5, layer=2)


def test_a_replay_finds_each_token_by_its_name(trace: Path):
    """In any order of rows, on weights that would choose otherwise; the gates are those of the learned scores."""
    layer = replaying(trace)
    torch.nn.init.normal_(layer.router.weight, generator=torch.Generator().manual_seed(8))
    assert set(layer.state_dict()) == set(CONFIG.build(5).state_dict())
    order_T = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    for rank in (1, 0):
        x_TD, ctx = batch(rank)
        moved = dataclasses.replace(
            ctx,
            **{
                name: getattr(ctx, name)[order_T]
                for name in ("id_T", "valid_T", "sample_T", "position_T", "sequence_T")
            },
        )
        routing = layer.router(x_TD[order_T], moved)
        expected_TK = record(rank).layers[2].expert_TK[order_T]
        assert torch.equal(routing.expert_N.view(-1, 2)[moved.valid_T], expected_TK[moved.valid_T])
        score_TK = routing.score_TE.gather(1, expected_TK)
        expected_gate_TK = score_TK / score_TK.sum(1, keepdim=True)
        torch.testing.assert_close(routing.gate_N.view(-1, 2)[moved.valid_T], expected_gate_TK[moved.valid_T])
    routing.gate_N.square().sum().backward()
    assert layer.router.weight.grad.abs().max() > 0


def test_evaluation_is_learned(trace: Path):
    x_TD, ctx = batch(5)
    ctx = dataclasses.replace(ctx, training=False)
    assert torch.equal(replaying(trace).router(x_TD, ctx).expert_N, CONFIG.build(5, layer=2).router(x_TD, ctx).expert_N)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"sample_T": torch.full((8,), 3)}, "was not recorded"),
        ({"position_T": torch.arange(8)}, "was not recorded"),
        ({"valid_T": torch.ones(8, dtype=torch.bool)}, "was not recorded"),
        ({"id_T": torch.arange(8) + 1}, "another id"),
    ],
)
def test_a_token_that_the_trace_lacks_is_said(trace: Path, change: dict, said: str):
    x_TD, ctx = batch(0)
    with pytest.raises(RuntimeError, match=said):
        replaying(trace).router(x_TD, dataclasses.replace(ctx, **change))


def test_a_cycle_goes_round_the_recorded_rows(trace: Path):
    """Samples 2, 7, 22 and 27 were recorded: 22 is among them, 100 takes the first of them, 101 the second."""
    layer, (x_TD, _) = replaying(trace, cycle=True), batch(0)
    other = TokenContext.of_rows(2, 3, sample_B=torch.tensor([101, 22]), id_T=torch.full((6,), 40))
    routing = layer.router(x_TD[:6], other)
    recorded = [record(rank).layers[2].expert_TK.view(2, 4, 2) for rank in range(2)]
    expected = torch.cat([recorded[0][0, :3], recorded[1][1, :3]])  # rows of sample 7 and of sample 22
    assert torch.equal(routing.expert_N.view(-1, 2), expected)


def test_a_replay_does_not_ask_the_host_and_compiles(trace: Path):
    layer, (x_TD, ctx) = replaying(trace), batch(0)
    compiled = torch.compile(layer.router, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x_TD, ctx).expert_N, layer.router(x_TD, ctx).expert_N)


def test_what_does_not_go_with_a_replay(trace: Path):
    for config, key in (({"mode": "dense"}, "mode"), ({"groups": {}}, "groups")):
        with pytest.raises(ValueError, match=key):
            ReplayConfig(trace=str(trace), **config)
    with pytest.raises(ValueError, match="no selection"):
        MoEConfig(router=ReplayConfig(trace=str(trace)), balance={"bias": BiasConfig()})
    assert ReplayConfig(trace="x").label == "forced replay" and TopKConfig().label is None
