"""The whole layer: one device, many ranks, recomputation, compilation, types, and what it must not keep."""

from __future__ import annotations

import copy
import dataclasses
import gc
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from moedist.config import ConfigError
from moedist.mesh import MeshConfig
from moedist.mesh.fake import fake_mesh
from moedist.moe.balance.switch import SwitchConfig
from moedist.moe.balance.z_loss import ZLossConfig
from moedist.moe.bank.local import LocalConfig
from moedist.moe.capacity import CapacityConfig
from moedist.moe.context import TokenContext
from moedist.moe.dispatch.all_to_all import AllToAllConfig
from moedist.moe.dispatch.padded import PaddedConfig
from moedist.moe.experts.grouped import GroupedConfig
from moedist.moe.experts.loop import LoopConfig
from moedist.moe.layer import MoEConfig
from moedist.moe.plan import plan_capacity
from moedist.moe.report import MoEReport
from moedist.moe.router.topk import TopKConfig
from moedist.parallel import recompute_in_backward, spread
from tests.ranks import Here

DIM = 16
DISPATCHES = {"all_to_all": AllToAllConfig(), "padded": PaddedConfig()}
BALANCE = {"switch": SwitchConfig(0.3), "z_loss": ZLossConfig(0.2)}


def batch(rank: int = 0, rows: int = 3, length: int = 8, dtype=torch.float32, **kwargs):
    generator = torch.Generator().manual_seed(50 + rank)
    x_TD = torch.randn(rows * length, DIM, generator=generator).to(dtype)
    return x_TD, TokenContext.of_rows(rows, length, sample_B=torch.arange(rows) + rank * rows, **kwargs)


def objective(output) -> torch.Tensor:
    report: MoEReport = output.report
    balance = sum(report.coefficients[name] * loss for name, loss in report.losses.items())
    return output.out_TD.square().sum() + balance


def gradients(layer: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in layer.named_parameters()}


@pytest.mark.requirement("R0-04", "R0-05", "R0-06", "R0-07", "R0-09", "R0-10", "R3-12", "C16")
def test_defaults_are_the_documented_ones():
    config = MoEConfig()
    assert (config.num_experts, config.router.top_k, config.capacity.factor) == (8, 2, 1.25)
    assert config.balance["switch"].coefficient == 0.01 and config.balance["z_loss"].coefficient == 0.001
    assert config.balance["switch"].scope == "global"
    assert (config.capacity.drop_policy, config.capacity.group) == ("probability", "rank")
    assert config.capacity.min_capacity == 1 and config.capacity.renormalize_after_drop


@pytest.mark.requirement("R0-18")
@pytest.mark.pitfall("25")
@pytest.mark.parametrize("dispatch", DISPATCHES.values(), ids=DISPATCHES)
def test_two_runs_are_bitwise_equal(dispatch):
    """Pitfall 25: output and every gradient. Three choices per token: two are the same sum in either order."""
    config = MoEConfig(4, TopKConfig(top_k=3), capacity=CapacityConfig(factor=1.0), dispatch=dispatch)
    runs = []
    for _ in range(2):
        layer = config.build(DIM)
        x_TD, ctx = batch(rows=8, length=32)
        x_TD.requires_grad_()
        output = layer(x_TD, ctx)
        objective(output).backward()
        runs.append([output.out_TD, x_TD.grad, *gradients(layer).values()])
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


@pytest.mark.requirement("D5")
@pytest.mark.pitfall("8")
def test_the_balance_losses_reach_the_router():
    """Pitfall 8: without a task loss the router's gradient is coefficient x d loss, for each loss by itself."""
    x_TD, ctx = batch(dtype=torch.float64)
    for name, config in BALANCE.items():
        layer = MoEConfig(num_experts=4, balance={name: config}).build(DIM, dtype=torch.float64)
        output = layer(x_TD, ctx)
        (0 * output.out_TD.sum() + output.report.coefficients[name] * output.report.losses[name]).backward()
        got = layer.router.weight.grad
        routing = layer.router(x_TD, ctx)
        if name == "switch":
            share_E = torch.bincount(routing.expert_N, minlength=4).double() / routing.expert_N.numel()
            loss = 4 * (share_E * routing.probs_TE.mean(0)).sum()
        else:
            loss = routing.logits_TE.logsumexp(1).square().mean()
        (expected,) = torch.autograd.grad(loss, layer.router.weight)
        torch.testing.assert_close(got, config.coefficient * expected, atol=1e-14, rtol=0)
        assert got.abs().max() > 1e-4


@pytest.mark.requirement("C15", "D10")
@pytest.mark.pitfall("10", "12")
def test_values_as_logged():
    """Pitfalls 10 and 12: unscaled, the same with recomputation, and the sum of the shares of micro-batches."""
    config = MoEConfig(num_experts=4, balance={"switch": SwitchConfig(0.3, "sequence"), "z_loss": ZLossConfig(0.2)})
    x_TD, ctx = batch(rows=4, dtype=torch.float64)
    layer = config.build(DIM, dtype=torch.float64)
    routing = layer.router(x_TD, ctx)
    z_loss = routing.logits_TE.logsumexp(1).square().mean().item()
    switch = 0.0
    for row in range(4):
        part = slice(8 * row, 8 * row + 8)
        share_E = torch.bincount(routing.expert_N.view(-1, 2)[part].reshape(-1), minlength=4).double() / 16
        switch += 4 * (share_E * routing.probs_TE[part].mean(0)).sum().item() / 4
    entropy = (
        -(routing.probs_TE * routing.probs_TE.log()).sum(1).mean().item() / torch.tensor(4.0).double().log().item()
    )
    for pieces in (1, 4):
        for recompute in ("none", "full", "selective"):
            layer = config.build(DIM, dtype=torch.float64)
            if recompute != "none":
                recompute_in_backward(layer, recompute)
            losses, asked_E, heat = {"switch": 0.0, "z_loss": 0.0}, torch.zeros(4, dtype=torch.int64), 0.0
            for index, part_TD in enumerate(x_TD.chunk(pieces)):
                rows = 4 // pieces
                part_ctx = TokenContext.of_rows(
                    rows, 8, sample_B=torch.arange(rows) + index * rows, num_tokens=torch.tensor(32)
                )
                output = layer(part_TD, part_ctx)
                objective(output).backward()
                asked_E += output.report.asked_E
                heat += output.report.router_entropy.item()
                for name, value in output.report.losses.items():
                    losses[name] += value.item()
            assert losses["z_loss"] == pytest.approx(z_loss, abs=1e-12)
            assert losses["switch"] == pytest.approx(switch, abs=1e-12)
            assert heat == pytest.approx(entropy, abs=1e-12)
            assert asked_E.tolist() == torch.bincount(routing.expert_N, minlength=4).tolist()


@pytest.mark.requirement("C6", "D4")
@pytest.mark.pitfall("11")
@pytest.mark.parametrize("scope", ["global", "micro_batch", "sequence"])
def test_a_limit_changes_no_balance_loss(scope):
    """Pitfall 11, on the layer's own way: the same losses and gradients of the router as without a limit."""
    balance = {"switch": SwitchConfig(0.3, scope), "z_loss": ZLossConfig(0.2)}
    x_TD, ctx = batch(rows=4, dtype=torch.float64)
    found = []
    for factor in (None, 1.0):
        config = MoEConfig(num_experts=4, capacity=CapacityConfig(factor=factor), balance=balance)
        layer = config.build(DIM, dtype=torch.float64)
        report = layer(x_TD, ctx).report
        torch.stack(list(report.losses.values())).sum().backward()
        found.append((report.losses, layer.router.weight.grad))
    assert int(report.dropped_ME.sum()) > 0
    for name in balance:
        assert found[0][0][name].item() == found[1][0][name].item()
    assert torch.equal(found[0][1], found[1][1]) and found[0][1].abs().max() > 0


@pytest.mark.pitfall("13")
def test_counts_are_exact_in_a_bf16_model():
    """Pitfall 13: 40,970 is no bf16 number, however it is summed (40,960 ones in turn read 39,424)."""
    layer = MoEConfig(num_experts=2, router=TopKConfig(top_k=2)).build(8).bfloat16()
    x_TD = torch.randn(40_970, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad():
        output = layer(x_TD, TokenContext.of_rows(10, 4097))
    assert output.report.asked_E.dtype == output.report.kept_E.dtype == torch.int64
    assert output.report.asked_E.tolist() == [40_970, 40_970]
    assert output.out_TD.dtype == torch.bfloat16
    assert all(loss.dtype == torch.float32 for loss in output.report.losses.values())


@pytest.mark.pitfall("28")
@pytest.mark.parametrize("bank", [None, LocalConfig()], ids=["dispatched", "local"])
@pytest.mark.parametrize("experts", [LoopConfig(hidden_dim=16, bias=True), GroupedConfig(hidden_dim=16, bias=True)])
def test_autocast(experts, bank):
    """Pitfall 28: the router stays in fp32, the experts compute in bf16, the output has the caller's type."""
    config = MoEConfig(num_experts=4, experts=experts, shared_hidden_dim=8, capacity=CapacityConfig(factor=None))
    layer = (config if bank is None else dataclasses.replace(config, bank=bank)).build(DIM)
    x_TD, ctx = batch()
    plain = layer(x_TD, ctx)
    x_TD.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        cast = layer(x_TD, ctx)
    assert cast.out_TD.dtype == torch.float32
    assert cast.report.losses["z_loss"].item() == plain.report.losses["z_loss"].item()
    assert torch.equal(cast.report.asked_E, plain.report.asked_E)
    difference = (cast.out_TD - plain.out_TD).abs().max() / plain.out_TD.abs().max()
    assert 1e-5 < difference < 0.03
    cast.out_TD.sum().backward()
    assert all(grad.dtype == torch.float32 and grad.isfinite().all() for grad in gradients(layer).values())


@pytest.mark.requirement("R0-18")
@pytest.mark.pitfall("15", "27")
def test_evaluation_touches_nothing():
    """Property (k), pitfalls 15 and 27: bitwise repeatable, without losses; the layer is as before."""
    layer = MoEConfig(num_experts=4, router=TopKConfig(top_k=2, noise_std=1.0)).build(DIM)
    x_TD, ctx = batch(training=False)
    layer(*batch())  # a training pass leaves no counter that evaluation could move

    def everything():
        return {name: copy.copy(module.__dict__) for name, module in layer.named_modules()}

    state, attributes = copy.deepcopy(layer.state_dict()), everything()
    first, second = layer(x_TD, ctx), layer(x_TD, ctx)
    assert torch.equal(first.out_TD, second.out_TD) and first.report.losses == {}
    assert not list(layer.buffers())
    assert all(torch.equal(value, state[name]) for name, value in layer.state_dict().items())
    assert everything() == attributes
    assert first.report.asked_E.sum() == 48


@pytest.mark.pitfall("18")
def test_two_models_don_t_mix():
    """Pitfall 18: interleaved, each returns its own report, and nothing is left of one that is gone."""
    x_TD, ctx = batch()
    layers = [MoEConfig(num_experts=4, balance=BALANCE).build(DIM, layer=index) for index in range(2)]
    alone = [objective(layer(x_TD, ctx)) for layer in layers]
    outputs = [layer(x_TD, ctx) for layer in layers]
    for layer, output, expected in zip(layers, outputs, alone, strict=True):
        objective(output).backward()
        assert objective(output).item() == expected.item()
        assert all(grad is not None for grad in gradients(layer).values())
    assert alone[0].item() != alone[1].item()
    del alone, outputs, output, expected
    gc.collect()
    assert not [each for each in gc.get_objects() if type(each) is MoEReport]


TIES = MoEConfig(
    num_experts=4,
    router=TopKConfig(top_k=2, noise_std=0.7),
    capacity=CapacityConfig(factor=1.0, drop_policy="random"),
    balance=BALANCE,
)


def recomputed(here: Here, dispatch: str, fsdp: int | None) -> float:
    """Largest difference of a gradient with and without recomputation, on inputs full of ties, with noise and drops."""
    mesh = here.mesh_of(2, fsdp)
    found = []
    for recompute in ("none", "full", "selective"):
        layer = dataclasses.replace(TIES, dispatch=DISPATCHES[dispatch]).build(DIM, dtype=torch.float64)
        spread(layer, mesh)
        with torch.no_grad():
            layer.router.weight.copy_(layer.router.weight.mul(2).round().div(2))
        if recompute != "none":
            recompute_in_backward(layer, recompute)
        x_TD, ctx = batch(here.rank, dtype=torch.float64, seed=3, step=5)
        x_TD = x_TD.round().requires_grad_()
        objective(layer(x_TD, ctx)).backward()
        found.append(
            [x_TD.grad, *(p.grad.to_local() if hasattr(p.grad, "to_local") else p.grad for p in layer.parameters())]
        )
    assert found[0][0].abs().max() > 1e-3
    return max(
        (one - other).abs().max().item() for again in found[1:] for one, other in zip(found[0], again, strict=True)
    )


@pytest.mark.pitfall("17", "17b")
@pytest.mark.parametrize("fsdp", [None, 2])
@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_recomputation_routes_and_lays_out_the_same(ranks, dispatch, fsdp):
    """Pitfalls 17 and 17b."""
    assert ranks(2).run(recomputed, dispatch, fsdp) == [0.0, 0.0]


def work(recompute: str) -> tuple[int, int]:
    """Matrix products and exchanges of a backward pass on rank 0 of 2."""

    class Count(TorchDispatchMode):
        products = exchanges = 0

        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            self.products += op.name() in ("aten::mm", "aten::bmm", "aten::addmm", "moedist::host_experts")
            self.exchanges += op.name() == "moedist::all_to_all"
            return op(*args, **(kwargs or {}))

    layer = dataclasses.replace(TIES, dispatch=PaddedConfig()).build(DIM)
    with fake_mesh(MeshConfig(ep=2), rank=0, world_size=2) as mesh:
        spread(layer, mesh)
        if recompute != "none":
            recompute_in_backward(layer, recompute)
        x_TD, ctx = batch()
        loss = objective(layer(x_TD.requires_grad_(), ctx))
        with Count() as count:
            loss.backward()
        return count.products, count.exchanges


def test_what_backward_does_again():
    """``selective`` multiplies and exchanges no more than without recomputation; ``full`` as the forward did, too."""
    products, exchanges = work("none")
    assert work("selective") == (products, exchanges)
    again, also = work("full")
    assert also == exchanges + 2 and again > products


def starved(here: Here, ep: int, dispatch: str) -> list[str]:
    """Parameters with a wrong gradient where every token goes to expert 1 and three ranks bring only padding."""
    mesh = here.mesh_of(ep)
    config = MoEConfig(
        num_experts=4, router=TopKConfig(top_k=1), capacity=CapacityConfig(factor=None), dispatch=DISPATCHES[dispatch]
    )
    layer = config.build(DIM)
    table = spread(layer, mesh)
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[1, 0] = 1.0
    x_TD, _ = batch(here.rank)
    x_TD[:, 0] = 9.0
    valid_T = torch.full((24,), here.rank == 2)
    output = layer(x_TD.requires_grad_(), TokenContext.of_rows(3, 8, valid_T=valid_T, num_tokens=torch.tensor(24)))
    objective(output).backward()
    table.sum_copies(layer)
    wrong = []
    for name, parameter in layer.named_parameters():
        if parameter.grad is None:
            wrong.append(name)
        elif "experts" in name:
            alive = parameter.grad.full_tensor().flatten(1).abs().amax(1) > 0
            wrong += [name] if alive.tolist() != [False, True, False, False] else []
    return wrong


@pytest.mark.pitfall("4", "5")
@pytest.mark.parametrize("dispatch", DISPATCHES)
@pytest.mark.parametrize("ep", [1, 2, 4])
def test_empty_ranks_and_idle_experts(ranks, ep, dispatch):
    """Pitfalls 4 and 5, gate P10: no hang, zero gradients, never None."""
    assert ranks(4).run(starved, ep, dispatch) == [[]] * 4


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("factor", [1.0, None])
def test_the_padded_layer_compiles_whole(backend, factor):
    """No graph break, and the same to the bit, gradients included."""
    torch._dynamo.reset()
    config = MoEConfig(
        num_experts=4,
        capacity=CapacityConfig(factor=factor),
        dispatch=PaddedConfig(),
        experts=GroupedConfig(hidden_dim=16),
        balance=BALANCE,
    )
    layer = config.build(DIM)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    x_TD, ctx = batch(valid_T=torch.arange(24) % 8 < 6)
    results = []
    for each in (compiled, layer):
        layer.zero_grad()
        leaf = x_TD.clone().requires_grad_()
        output = each(leaf, ctx)
        objective(output).backward()
        results.append([output.out_TD, leaf.grad, output.report.kept_E, *gradients(layer).values()])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_the_packed_layer_compiles_in_pieces():
    """Its sizes are read by the host, so the graph breaks there; torch's shape rule for grouped_mm refuses fp32."""
    torch._dynamo.reset()
    layer = MoEConfig(num_experts=4, experts=GroupedConfig(hidden_dim=16), balance=BALANCE).build(8)
    compiled = torch.compile(layer, backend="eager")
    x_TD, ctx = torch.randn(24, 8), TokenContext.of_rows(3, 8)
    results = []
    for each in (compiled, layer):
        layer.zero_grad()
        output = each(x_TD, ctx)
        objective(output).backward()
        results.append([output.out_TD, *gradients(layer).values()])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("policy", ["probability", "gate", "choice", "token", "random"])
@pytest.mark.parametrize("group", ["rank", "sequence"])
@pytest.mark.parametrize("overflow", ["drop", "next_best"])
def test_the_plan_compiles_whole(policy, group, overflow):
    torch._dynamo.reset()
    config = CapacityConfig(factor=1.0, final_factor=0.5, drop_policy=policy, group=group, overflow=overflow)
    router = TopKConfig().build(DIM, 4)
    torch.nn.init.normal_(router.weight, generator=torch.Generator().manual_seed(0))
    x_TD, ctx = batch(valid_T=torch.arange(24) % 8 < 6)
    routing = router(x_TD, ctx)
    compiled = torch.compile(plan_capacity, fullgraph=True, backend="eager")
    got, expected = compiled(routing, ctx, config), plan_capacity(routing, ctx, config)
    for field in dataclasses.fields(expected):
        one, other = getattr(got, field.name), getattr(expected, field.name)
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


@pytest.mark.requirement("R1-34")
@pytest.mark.parametrize("policy", ["probability", "gate", "choice", "token", "random"])
@pytest.mark.parametrize("factor", [1.0, None])
def test_the_padded_layer_never_asks_the_host(policy, factor):
    """Fake tensors have no values to read; a packed layout needs some, which shows that the test can fail."""
    with FakeTensorMode(allow_non_fake_inputs=False):
        for group in ("rank", "sequence"):
            capacity = CapacityConfig(factor=factor, drop_policy=policy, group=group)
            layer = MoEConfig(num_experts=4, capacity=capacity, dispatch=PaddedConfig(), balance=BALANCE).build(DIM)
            x_TD = torch.randn(24, DIM, requires_grad=True)
            output = layer(x_TD, TokenContext.of_rows(3, 8))
            objective(output).backward()
            assert output.out_TD.shape == x_TD.grad.shape == (24, DIM)
            packed = MoEConfig(num_experts=4, capacity=capacity).build(DIM)
            with pytest.raises(DataDependentOutputException):
                packed(x_TD, TokenContext.of_rows(3, 8))


def test_shared_expert_adds_its_output():
    x_TD, ctx = batch()
    layer = MoEConfig(num_experts=4, shared_hidden_dim=8).build(DIM)
    plain = MoEConfig(num_experts=4).build(DIM)
    torch.testing.assert_close(layer(x_TD, ctx).out_TD - plain(x_TD, ctx).out_TD, layer.shared(x_TD))


def first_values(here: Here, ep: int) -> dict[str, torch.Tensor]:
    """All parameters, whole, of a layer that was spread on the meta device and then filled."""
    from moedist.moe.init import named_draw

    layer = MoEConfig(num_experts=12, shared_hidden_dim=4).build(DIM, device="meta")
    spread(layer, here.mesh_of(ep))
    layer.to_empty(device="cpu")
    layer.init_weights(named_draw(0, "layer.0"))
    return {n: p.full_tensor() if hasattr(p, "full_tensor") else p.detach() for n, p in layer.named_parameters()}


@pytest.mark.pitfall("7")
def test_the_initial_model_is_equal_at_any_layout(ranks):
    """Pitfall 7."""
    expected = dict(MoEConfig(num_experts=12, shared_hidden_dim=4).build(DIM).named_parameters())
    for ep in (1, 2, 4):
        for values in ranks(4).run(first_values, ep):
            assert values.keys() == expected.keys()
            assert all(torch.equal(value, expected[name]) for name, value in values.items())


def test_importing_the_heart_is_light():
    """Nothing heavy, and nothing that opens sockets."""
    code = "import moedist.moe, moedist.moe.layer, moedist.parallel, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules = set(done.stdout.split())
    assert "torch._dynamo" not in modules, "the compiler costs a second of a start, also where nothing is compiled"
    loaded = {name.partition(".")[0] for name in modules}
    assert "torch" in loaded
    assert not loaded & {"hydra", "omegaconf", "wandb", "deepspeed", "pydantic", "rich", "yaml", "tokenizers"}


@pytest.mark.requirement("R0-04", "R0-05")
@pytest.mark.parametrize(
    ("config", "key", "said"),
    [
        ({"num_experts": 0}, "num_experts", "Set it to 1 or more"),
        ({"shared_hidden_dim": 0}, "shared_hidden_dim", "null for no shared expert"),
        ({"num_experts": 2, "router": TopKConfig(top_k=3)}, "router.top_k", "Set moe.router.top_k to 2 or less"),
    ],
)
def test_errors(config, key, said):
    with pytest.raises(ConfigError, match=said) as caught:
        MoEConfig(**config)
    assert caught.value.key == key


def test_spread_errors():
    with pytest.raises(
        ConfigError, match=r"num_experts = 6 cannot be cut into 4 .*Set mesh.ep to one of \[1, 2, 3, 6\]"
    ):
        MoEConfig(num_experts=6).check_spread(4)
    with pytest.raises(ConfigError, match="Set moe.bank.kind to dispatched") as caught:
        MoEConfig(num_experts=4, bank=LocalConfig()).check_spread(2)
    assert caught.value.key == "bank.kind"


@pytest.mark.requirement("R0-16", "R0-22", "R0-33", "R0-34", "R3-08", "R3-10")
def test_R0_02_the_parts_join_to_the_layer():
    """Router, plan and experts, each built alone, give what the layer gives: output, and what became of every pair."""
    config = MoEConfig(num_experts=5, router=TopKConfig(top_k=2), capacity=CapacityConfig(factor=1.0))
    layer = config.build(DIM)
    x_TD, ctx = batch()
    output = layer(x_TD, ctx)
    router, experts = config.router.build(DIM, 5), config.experts.build(DIM, 5)
    router.load_state_dict(layer.router.state_dict())
    experts.load_state_dict(layer.bank.experts.state_dict())
    plan = plan_capacity(router(x_TD, ctx), ctx, config.capacity)
    out_TD = config.bank.build(experts, config.dispatch)(x_TD, plan)
    assert torch.equal(out_TD, output.out_TD) and out_TD.shape == x_TD.shape
    assert torch.equal(plan.kept_E, output.report.kept_E) and torch.equal(plan.asked_E, output.report.asked_E)
    assert experts.expert_ids == tuple(range(5)) and experts.up.shape[0] == 5


def test_R0_35_the_sum_of_a_plain_loop():
    """fp64, with drops: token by token, expert by expert."""
    config = MoEConfig(
        num_experts=4,
        router=TopKConfig(top_k=2),
        capacity=CapacityConfig(factor=1.0),
        experts=LoopConfig(hidden_dim=12, activation="relu", bias=True),
    )
    layer = config.build(DIM, dtype=torch.float64)
    for parameter in (layer.bank.experts.up_bias, layer.bank.experts.down_bias):
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    x_TD, ctx = batch(dtype=torch.float64)
    plan = plan_capacity(layer.router(x_TD, ctx), ctx, config.capacity)
    part = {name: value.detach() for name, value in layer.bank.experts.named_parameters()}
    expected_TD = torch.zeros_like(x_TD)
    for token, expert, gate, slot in zip(plan.token_N, plan.expert_N, plan.gate_N, plan.slot_N, strict=True):
        if slot >= 0:
            hidden = (x_TD[token] @ part["up"][expert] + part["up_bias"][expert]).clamp_min(0)
            expected_TD[token] += gate * (hidden @ part["down"][expert] + part["down_bias"][expert])
    assert (plan.slot_N < 0).any()
    torch.testing.assert_close(layer(x_TD, ctx).out_TD, expected_TD, atol=1e-12, rtol=0)


def test_R0_19_copies_live_on_their_own():
    layer = MoEConfig(num_experts=4, balance=BALANCE).build(DIM)
    x_TD, ctx = batch()
    before = layer(x_TD, ctx).out_TD.detach()
    for part in (layer, layer.router, layer.bank.experts):
        copied = copy.deepcopy(part)
        with torch.no_grad():
            for parameter in copied.parameters():
                parameter.add_(1)
        assert torch.equal(layer(x_TD, ctx).out_TD, before)


@pytest.mark.requirement("R0-16")
def test_R0_44_small_cases():
    generator = torch.Generator().manual_seed(0)
    alone = MoEConfig(num_experts=1, router=TopKConfig(top_k=1)).build(DIM)
    report = alone(*batch()).report
    assert report.asked_E.tolist() == [24] and report.losses["switch"].item() == pytest.approx(1, abs=1e-6)
    everywhere = MoEConfig(num_experts=4, router=TopKConfig(top_k=4), capacity=CapacityConfig(factor=None)).build(DIM)
    routing = everywhere.router(*batch())
    assert routing.expert_N.view(24, 4).sort(1).values.tolist() == [[0, 1, 2, 3]] * 24
    layer = MoEConfig(num_experts=8).build(DIM)
    one = layer(torch.randn(1, DIM, generator=generator), TokenContext.of_rows(1, 1))
    assert one.out_TD.shape == (1, DIM) and one.report.asked_E.sum() == 2
    output = layer(*batch(rows=8))
    assert (output.report.asked_E > 0).sum() > 1 and output.out_TD.abs().max() > 0
    for loss in output.report.losses.values():
        assert loss.isfinite() and loss > 0


@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_D7_dense_mode_compiles_to_the_dense_softmax(dispatch):
    torch._dynamo.reset()
    config = MoEConfig(
        num_experts=4,
        router=TopKConfig(top_k=0),
        capacity=CapacityConfig(factor=None),
        experts=GroupedConfig(hidden_dim=16),
        dispatch=DISPATCHES[dispatch],
    )
    layer = config.build(DIM)
    x_TD, ctx = batch()
    compiled = torch.compile(layer, fullgraph=dispatch == "padded", backend="eager")
    routing = torch.compile(layer.router, fullgraph=True, backend="eager")(x_TD, ctx)
    dense_TE = torch.zeros(24, 4).scatter(1, routing.expert_N.view(24, 4), routing.gate_N.view(24, 4))
    torch.testing.assert_close(dense_TE, layer.router(x_TD, ctx).logits_TE.softmax(1), atol=1e-6, rtol=0)
    torch.testing.assert_close(compiled(x_TD, ctx).out_TD, layer(x_TD, ctx).out_TD, atol=1e-6, rtol=1e-5)


def flops(num_experts: int, **router: object) -> tuple[int, int]:
    """Of the experts, and of the router, forward and backward."""
    config = MoEConfig(
        num_experts=num_experts,
        router=TopKConfig(**router),
        capacity=CapacityConfig(factor=None),
        experts=LoopConfig(hidden_dim=32),
        balance={},
    )
    layer = config.build(DIM)
    x_TD, ctx = batch(rows=8)
    x_TD.requires_grad_()
    with FlopCounterMode(display=False) as of_router:
        routing = layer.router(x_TD, ctx)
        routing.logits_TE.sum().backward()
    plan = plan_capacity(routing, ctx, config.capacity)
    plan = dataclasses.replace(plan, gate_N=plan.gate_N.detach())
    with FlopCounterMode(display=False) as of_experts:
        layer.bank(x_TD, plan).sum().backward()
    return of_experts.get_total_flops(), of_router.get_total_flops()


@pytest.mark.requirement("R0-01")
def test_R3_18_cost_grows_with_choices_and_not_with_experts():
    """2 of 8 experts cost a quarter of all 8; 2 of 32 cost as much. The router's share grows with E."""
    two_of_8, router_of_8 = flops(8, top_k=2)
    assert two_of_8 == 3 * 2 * 64 * 2 * 3 * DIM * 32, "forward and twice that in backward; swiglu has three matrices"
    assert flops(8, mode="dense")[0] == 4 * two_of_8 and flops(8, top_k=4)[0] == 2 * two_of_8
    two_of_32, router_of_32 = flops(32, top_k=2)
    assert two_of_32 == two_of_8 and router_of_32 == 4 * router_of_8


@pytest.mark.requirement("R0-08")
def test_R3_09_the_width_is_an_argument():
    for dim in (1, 64):
        layer = MoEConfig().build(dim)
        assert layer(torch.randn(6, dim), TokenContext.of_rows(1, 6)).out_TD.shape == (6, dim)
    assert layer.config == MoEConfig()
    with pytest.raises(ValueError, match="dim = 0 is no width of vectors. Set it to 1 or more"):
        MoEConfig().build(0)


def test_R3_20_dropout():
    """Of the whole output, in training only; drawn by the token's name, so a cut of the batch changes nothing."""
    assert MoEConfig().dropout == 0.0
    config = MoEConfig(num_experts=4, capacity=CapacityConfig(factor=None), shared_hidden_dim=8, balance={})
    plain, layer = config.build(DIM), dataclasses.replace(config, dropout=0.3).build(DIM)
    x_TD, ctx = batch(rows=40)
    quiet_TD, out_TD = plain(x_TD, ctx).out_TD, layer(x_TD, ctx).out_TD
    kept_TD = out_TD != 0
    torch.testing.assert_close(out_TD, torch.where(kept_TD, quiet_TD / 0.7, 0))
    assert kept_TD.float().mean().item() == pytest.approx(0.7, abs=0.03)
    assert ((kept_TD.float().mean(0) - 0.7).abs() < 0.12).all() and len(kept_TD.unique(dim=0)) > 250
    rows = [
        layer(part_TD, TokenContext.of_rows(20, 8, sample_B=torch.arange(20) + 20 * index)).out_TD
        for index, part_TD in enumerate(x_TD.chunk(2))
    ]
    torch.testing.assert_close(torch.cat(rows), out_TD)
    other = layer(*batch(rows=40, step=1)).out_TD
    assert not torch.equal(other != 0, kept_TD)
    eval_x_TD, eval_ctx = batch(rows=40, training=False)
    assert torch.equal(layer(eval_x_TD, eval_ctx).out_TD, plain(eval_x_TD, eval_ctx).out_TD)
    for dropout in (-0.1, 1.0):
        with pytest.raises(ConfigError, match="is no share to drop") as caught:
            MoEConfig(dropout=dropout)
        assert caught.value.key == "dropout"


def trained(seed: int, **balance: SwitchConfig) -> torch.Tensor:
    """Loads after 100 steps of a linear task, by a router that prefers the first expert to begin with."""
    generator = torch.Generator().manual_seed(seed)
    capacity, experts = CapacityConfig(factor=None), LoopConfig(hidden_dim=16)
    layer = MoEConfig(4, TopKConfig(top_k=1), capacity, experts=experts, balance=balance).build(8)
    with torch.no_grad():
        layer.router.weight[:, 0] = torch.tensor([1.0, 0, 0, 0])
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    task = torch.randn(8, 8, generator=generator)
    for _ in range(100):
        x_TD = torch.randn(64, 8, generator=generator)
        x_TD[:, 0] = 2.0
        output = layer(x_TD, TokenContext.of_rows(4, 16))
        loss = (output.out_TD - x_TD @ task).square().mean() / 8
        (loss + sum(balance[name].coefficient * value for name, value in output.report.losses.items())).backward()
        optimizer.step()
        optimizer.zero_grad()
    return output.report.asked_E


@pytest.mark.parametrize("seed", [0, 1])
def test_R2_59_balance_prevents_collapse(seed):
    """Left alone, some expert gets nothing any more; with the loss, each has its share."""
    assert trained(seed).min() == 0
    assert trained(seed, switch=SwitchConfig(0.3)).min() >= 5
