"""`moedist.nn.MoELayer` on one device: what a library user may rely on."""

from __future__ import annotations

import copy
import gc
import itertools
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn import functional as F

from moedist.moe.capacity import CapacityConfig
from moedist.moe.context import TokenContext
from moedist.moe.dispatch.padded import PaddedConfig
from moedist.moe.router.noisy import NoisyConfig
from moedist.moe.router.topk import TopKConfig
from moedist.nn import AuxLossModule, DiagnosticsProvider, MoELayer, MoELayerConfig


class Scaled(nn.Module):
    """An expert that is no stack of linear maps, and gives another width than it takes."""

    def __init__(self, in_features: int, out_features: int, dtype: torch.dtype):
        super().__init__()
        self.norm = nn.LayerNorm(in_features, dtype=dtype)
        self.map = nn.Linear(in_features, out_features, bias=False, dtype=dtype)
        self.scale = nn.Parameter(torch.ones((), dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.map(self.norm(x))) * self.scale


def unlike_experts(count: int, in_features: int = 6, out_features: int = 5, dtype=torch.float64) -> list[nn.Module]:
    """Unlike types and widths inside."""
    makers = itertools.cycle(
        (
            lambda: nn.Linear(in_features, out_features, dtype=dtype),
            lambda: Scaled(in_features, out_features, dtype),
            lambda: nn.Sequential(
                nn.Linear(in_features, 7, dtype=dtype), nn.ReLU(), nn.Linear(7, out_features, dtype=dtype)
            ),
        )
    )
    return [make() for make in itertools.islice(makers, count)]


def layer_of(
    count: int = 4, top_k: int | None = 2, dtype: torch.dtype = torch.float64, seed: int = 0, **kwargs
) -> MoELayer:
    torch.manual_seed(seed)
    experts = unlike_experts(count, dtype=dtype)
    return MoELayer(experts, nn.Linear(6, count, dtype=dtype), 6, 5, top_k=top_k, **kwargs)


def vectors(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    return torch.randn(*shape, 6, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def modules_of(layer: MoELayer) -> tuple[nn.Module, list[nn.Module]]:
    return layer.moe.router.scorer, list(layer.moe.bank.experts.expert.values())


def by_hand(layer: MoELayer, x_TD: Tensor, top_k: int) -> Tensor:
    """The sum, token by token and expert by expert."""
    router, experts = modules_of(layer)
    probs_TE = router(x_TD).softmax(1)
    out = []
    for x, probs in zip(x_TD, probs_TE, strict=True):
        gates, chosen = probs.topk(top_k)
        if top_k > 1:
            gates = gates / gates.sum()
        out.append(sum(gate * experts[int(e)](x[None])[0] for gate, e in zip(gates, chosen, strict=True)))
    return torch.stack(out)


def test_R1_01_types():
    """fp64 by gradcheck; fp32 and bf16 against it."""
    layer, x = layer_of(dtype=torch.float64), vectors(5)
    assert torch.autograd.gradcheck(layer, x.clone().requires_grad_())
    expected = layer(x)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.05)):
        other = layer_of(dtype=dtype)
        other.set_flat_parameters(layer.get_flat_parameters())
        out = other(x.to(dtype))
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer_of(dtype=torch.float32)(x.float())
    assert out.dtype == torch.float32 and out.isfinite().all()


def test_R1_02_protocols():
    layer = layer_of()
    assert isinstance(layer, AuxLossModule) and isinstance(layer, DiagnosticsProvider)
    assert not isinstance(nn.Linear(2, 2), AuxLossModule)


@pytest.mark.parametrize("count", [1, 2, 3, 8, 64])
def test_R1_03_any_number_of_experts(count: int):
    layer, x = layer_of(count, top_k=None), vectors(4)
    torch.testing.assert_close(layer(x), by_hand(layer, x, count))


@pytest.mark.requirement("R1-04", "C21", "R1-22")
def test_R1_04_dense_is_every_expert():
    """``top_k`` 0 and None are one thing: the softmax's weighted mean."""
    x = vectors(7)
    for top_k in (0, None):
        layer = layer_of(top_k=top_k)
        router, experts = modules_of(layer)
        probs_TE = router(x).softmax(1)
        expected = sum(probs_TE[:, e, None] * expert(x) for e, expert in enumerate(experts))
        torch.testing.assert_close(layer(x), expected, atol=1e-12, rtol=0)
        assert layer.top_k == 4


@pytest.mark.requirement("R1-05", "R1-22")
def test_R1_05_idle_experts_are_not_called():
    layer, called = layer_of(top_k=1), []
    router, experts = modules_of(layer)
    with torch.no_grad():
        router.weight.zero_()
        router.bias.copy_(torch.tensor([0.0, 3.0, 0.0, 0.0]))
    for place, expert in enumerate(experts):
        expert.register_forward_hook(lambda *_, place=place: called.append(place))
    layer(vectors(9))
    assert called == [1]


def test_R1_06_wrong_widths():
    """Numbers in every message; a width that differs inside, or between input and output, is none."""
    narrow = [nn.Linear(6, 5), nn.Linear(4, 5)]
    with pytest.raises(ValueError, match=r"expert 1 does not take \[2, 6\]"):
        MoELayer(narrow, nn.Linear(6, 2), 6, 5)
    with pytest.raises(ValueError, match=r"expert 0 makes \[2, 5\] of \[2, 6\]; it must make \[2, 6\]"):
        MoELayer([nn.Linear(6, 5)], nn.Linear(6, 1), 6)
    with pytest.raises(ValueError, match="in_features = 0"):
        MoELayer([nn.Linear(6, 5)], nn.Linear(6, 1), 0)
    with pytest.raises(ValueError, match=r"in_features = 6, got \[3, 5\]"):
        layer_of()(torch.zeros(3, 5, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"got \[\]"):
        layer_of()(torch.zeros(()))
    with pytest.raises(TypeError, match="expert 0 is no nn.Module but float"):
        MoELayer([3.0], nn.Linear(6, 1), 6)
    shared = nn.Linear(6, 6)
    with pytest.raises(ValueError, match="experts 0 and 1 share a parameter"):
        MoELayer([shared, shared], nn.Linear(6, 2), 6)
    assert MoELayer.from_config(MoELayerConfig(in_features=8, out_features=3))(torch.zeros(2, 8)).shape == (2, 3)


def test_trying_widths_leaves_modules_as_they_are():
    experts = [nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 6), nn.Dropout(0.5)) for _ in range(2)]
    experts[1].eval()
    router, before, state = nn.Linear(6, 2), copy.deepcopy(experts[0].state_dict()), torch.get_rng_state()
    MoELayer(experts, router, 6)
    torch.testing.assert_close(experts[0].state_dict(), before)
    assert experts[0][0].training and not experts[1][0].training and torch.equal(torch.get_rng_state(), state)


def test_R1_07_one_score_per_expert():
    with pytest.raises(ValueError, match=r"the router makes \[2, 3\] of \[2, 6\]; it must make \[2, 4\]"):
        MoELayer(unlike_experts(4), nn.Linear(6, 3, dtype=torch.float64), 6, 5)
    layer = layer_of()
    layer.moe.router.scorer = nn.Linear(6, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"made \[2, 3\] of \[2, 6\]; it must give one score for each of the 4"):
        layer(vectors(2))


@pytest.mark.requirement("C1")
def test_R1_08_output_activation():
    plain, active = layer_of(), layer_of(output_activation=nn.Tanh())
    x = vectors(3)
    torch.testing.assert_close(active(x), plain(x).tanh())
    assert active.get_diagnostics()["layer.activation"] == "Tanh"
    assert plain.get_diagnostics()["layer.activation"] == "none"


def test_R1_09_balancing_is_off_by_default():
    layer = layer_of()
    assert layer.use_aux_loss is False and layer.aux_loss_weight == 0.01


@pytest.mark.parametrize("top_k", [-1, 5])
def test_R1_11_bad_numbers(top_k: int):
    with pytest.raises(ValueError, match="experts is empty"):
        MoELayer([], nn.Linear(6, 1), 6)
    with pytest.raises(ValueError, match=f"top_k = {top_k} is outside of 0 to 4"):
        layer_of(top_k=top_k)
    with pytest.raises(ValueError, match="top_k = 2 is the router's own to say: set it in TopKConfig"):
        MoELayer(unlike_experts(4), TopKConfig(), 6, 5, top_k=2)


def test_R1_12_no_router():
    with pytest.raises(TypeError, match="router is no nn.Module and no RouterConfig but NoneType"):
        MoELayer(unlike_experts(4), None, 6, 5)


def test_R1_13_weight_changes_at_run_time():
    layer = layer_of(use_aux_loss=True)
    layer(vectors(4))
    unscaled = layer.aux_loss
    layer.aux_loss_weight = 0.05
    assert layer.aux_loss_weight == 0.05 and layer.aux_loss is unscaled
    with pytest.raises(ValueError, match="aux_loss_weight = -0.1"):
        layer.aux_loss_weight = -0.1


def test_R1_15_number_of_experts():
    layer = layer_of(8)
    assert layer.num_experts == layer.num_local_experts == 8
    with pytest.raises(AttributeError):
        layer.num_experts = 3


@pytest.mark.requirement("R1-16", "R1-10", "R1-45")
def test_R1_16_number_of_parameters():
    """The example of the dense experts, the defaults of the builder, and 1000 + 8 x 5000."""
    experts = [nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU()) for _ in range(4)]
    assert MoELayer(experts, nn.Linear(128, 4), 128, top_k=2).num_parameters() == 264_196
    assert MoELayer.from_config(MoELayerConfig()).num_parameters() == 527_364
    experts = [nn.Linear(125, 40, bias=False) for _ in range(8)]
    layer = MoELayer(experts, nn.Linear(125, 8, bias=False), 125, 40)
    assert layer.num_parameters() == layer.num_parameters(local=True) == 1000 + 8 * 5000


@pytest.mark.requirement("R1-17", "D7")
@pytest.mark.parametrize("top_k", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_R1_17_compiles_into_one_graph(top_k: int):
    """Dense routing too, where a graph once held a top-0 softmax of zeros; balance loss and diagnostics included."""
    layer = layer_of(top_k=top_k, use_aux_loss=True, dispatch=PaddedConfig())
    assert layer.supports_compile and not layer_of().supports_compile
    twin, x = layer.clone(), vectors(2, 4)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for module, call in ((layer, compiled), (twin, twin)):
        (call(x).square().sum() + module.aux_loss).backward()
    torch.testing.assert_close(compiled(x), twin(x))
    for (name, got), expected in zip(layer.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad, msg=name)
    assert layer.get_diagnostics() == twin.get_diagnostics()
    expert = modules_of(layer)[1][1]
    expert.supports_compile = False
    assert not layer.supports_compile


def test_R1_18_supports_training():
    layer = layer_of()
    router, experts = modules_of(layer)
    assert layer.supports_training
    for parameter in layer.parameters():
        parameter.requires_grad_(False)
    assert not layer.supports_training
    experts[2].requires_grad_(True)
    assert layer.supports_training
    x = vectors(12)
    layer(x).sum().backward()
    assert experts[2].get_parameter("0.weight").grad is not None and router.weight.grad is None


@pytest.mark.requirement("R1-19", "R1-32", "C9", "R1-48")
def test_R1_19_aux_loss_switch():
    """Off: nothing is computed, the trainer's view is 0 without a graph, an explicit call says why."""
    layer, x = layer_of(), vectors(4)
    with pytest.raises(RuntimeError, match="the auxiliary loss is off: set use_aux_loss"):
        layer.compute_auxiliary_loss()
    layer(x)
    assert layer.aux_loss == 0 and not layer.aux_loss.requires_grad and layer.z_loss == 0
    layer.use_aux_loss = True
    with pytest.raises(RuntimeError, match="run a forward pass first"):
        layer_of(use_aux_loss=True).compute_auxiliary_loss()
    out = layer(x)
    assert layer.compute_auxiliary_loss().requires_grad and layer.aux_loss > 0 and layer.z_loss > 0
    layer.eval()
    layer(x)
    assert layer.aux_loss == 0
    with pytest.raises(RuntimeError, match="off in evaluation"):
        layer.compute_auxiliary_loss()
    del out


@pytest.mark.requirement("R0-15", "R3-15", "D8")
def test_R1_23_any_rank():
    layer, x = layer_of(), vectors(2, 3, 4)
    flat = layer(x.view(-1, 6))
    for shape in ((24,), (4, 6), (2, 3, 4), (1, 2, 3, 4)):
        assert torch.equal(layer(x.view(*shape, 6)), flat.view(*shape, 5))
    torch.testing.assert_close(layer(x[0, 0, 0]), flat[0])


@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0), (2, 0, 3)])
def test_R1_23_empty_batches(shape: tuple[int, ...]):
    layer = layer_of(use_aux_loss=True)
    x = torch.zeros(*shape, 6, dtype=torch.float64, requires_grad=True)
    out = layer(x)
    assert out.shape == (*shape, 5) and layer.aux_loss == 0
    (out.sum() + layer.aux_loss).backward()
    assert all(parameter.grad.abs().max() == 0 for parameter in layer.parameters())
    assert layer.get_auxiliary_loss_diagnostics()["expert_0_tokens"] == 0


@pytest.mark.requirement("R1-24", "R1-20", "R1-05")
def test_R1_24_gradients_by_hand():
    """dL/dw_i = <g, Expert_i(x)>, through the softmax's Jacobian; an idle expert's gradient is 0."""
    layer, x, g = layer_of(top_k=None), vectors(1), torch.linspace(-1, 1, 5, dtype=torch.float64)
    router, experts = modules_of(layer)
    (layer(x)[0] * g).sum().backward()
    probs = router(x)[0].softmax(0).detach()
    by_weight = torch.stack([(expert(x)[0] * g).sum() for expert in experts]).detach()
    by_logit = probs * (by_weight - (probs * by_weight).sum())
    torch.testing.assert_close(router.weight.grad, by_logit[:, None] * x)
    torch.testing.assert_close(experts[0].bias.grad, probs[0] * g)
    layer = layer_of(top_k=1)
    layer(vectors(1)).sum().backward()
    gradients = [max(p.grad.abs().max().item() for p in expert.parameters()) for expert in modules_of(layer)[1]]
    assert gradients.count(0.0) == 3


@pytest.mark.requirement("R1-25", "R1-26")
def test_R1_26_backward_changes_no_weights():
    layer, x = layer_of(), vectors(4)
    before = layer.get_flat_parameters()
    with pytest.raises(RuntimeError):
        x.sum().backward()
    layer(x).sum().backward()
    assert torch.equal(layer.get_flat_parameters(), before)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_R1_27_idle_experts_under_an_optimizer(optimizer: str):
    """A gradient of 0, never None, alike at every layout: SGD leaves an idle expert where it is, AdamW decays it."""
    layer, x = layer_of(top_k=1), vectors(1)
    made = torch.optim.SGD(layer.parameters(), 0.01)
    if optimizer == "adamw":
        made = torch.optim.AdamW(layer.parameters(), 0.01, weight_decay=0.1)
    before = [[p.detach().clone() for p in expert.parameters()] for expert in modules_of(layer)[1]]
    layer(x).square().sum().backward()
    made.step()
    idle = 0
    for old, expert in zip(before, modules_of(layer)[1], strict=True):
        new = [parameter.detach() for parameter in expert.parameters()]
        if all(parameter.grad.abs().max() == 0 for parameter in expert.parameters()):
            idle += 1
            factor = 1 - 0.01 * 0.1 if optimizer == "adamw" else 1
            torch.testing.assert_close(new, [value * factor for value in old])
        else:
            assert not all(torch.equal(a, b) for a, b in zip(old, new, strict=True))
    assert idle == 3


def given_routing(probs_TE: Tensor, top_k: int | None) -> MoELayer:
    """A layer that routes its one-hot inputs with these probabilities."""
    count = probs_TE.shape[1]
    router = nn.Linear(probs_TE.shape[0], count, bias=False, dtype=torch.float64)
    with torch.no_grad():
        router.weight.copy_(probs_TE.log().t())
    experts = [nn.Linear(probs_TE.shape[0], 2, dtype=torch.float64) for _ in range(count)]
    return MoELayer(experts, router, probs_TE.shape[0], 2, top_k=top_k, use_aux_loss=True)


def test_R1_28_auxiliary_loss():
    """tokens [3, 2, 2, 1] / 8 and mass [0.4, 0.3, 0.2, 0.1]: 1.15."""
    mass = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    probs_TE = torch.full((8, 4), 0.0, dtype=torch.float64)
    for token, expert in enumerate([0, 0, 0, 1, 1, 2, 2, 3]):
        probs_TE[token, expert] = 1.0
    # Rows that choose as wanted and whose mean is the mass: mix one-hot rows with what is left of the mass.
    share = torch.tensor([3, 2, 2, 1], dtype=torch.float64) / 8
    keep = 0.5
    probs_TE = keep * probs_TE + (mass - keep * share)
    layer = given_routing(probs_TE, 1)
    layer(torch.eye(8, dtype=torch.float64))
    assert layer.compute_auxiliary_loss().item() == pytest.approx(1.15, abs=1e-12)


@pytest.mark.requirement("R1-29", "C10", "D9")
def test_R1_29_dense_counts_what_is_used():
    """A fixed threshold of 0.01 would count nothing of 128 even experts; 1 / (2 E) counts all."""
    layer = given_routing(torch.full((2, 128), 1 / 128, dtype=torch.float64), None)
    layer(torch.eye(2, dtype=torch.float64))
    assert layer.usage.tokens_E.tolist() == [2.0] * 128
    assert layer.aux_loss.item() == pytest.approx(1)
    probs_TE = torch.tensor([[0.88, 0.04, 0.04, 0.04], [0.48, 0.48, 0.02, 0.02]], dtype=torch.float64)
    layer = given_routing(probs_TE, None)
    out = layer(torch.eye(2, dtype=torch.float64))
    assert layer.usage.tokens_E.tolist() == [2, 1, 0, 0]
    expected = 4 * (2 / 3 * 0.68 + 1 / 3 * 0.26)
    assert layer.aux_loss.item() == pytest.approx(expected)
    (0 * out.sum() + layer.aux_loss).backward()
    assert layer.moe.router.scorer.weight.grad.abs().max() > 0


@pytest.mark.requirement("R1-30", "R1-31", "C5", "C7")
def test_R1_31_uniform_is_one():
    layer = given_routing(torch.full((4, 4), 0.25, dtype=torch.float64), None)
    layer(torch.eye(4, dtype=torch.float64))
    assert layer.aux_loss.item() == pytest.approx(1) == layer.usage.balance_loss().item()


@pytest.mark.requirement("R1-33", "D7")
@pytest.mark.parametrize("top_k", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_R1_33_export_round_trip(top_k: int, tmp_path):
    layer, x = layer_of(top_k=top_k, dispatch=PaddedConfig()).eval(), vectors(2, 4)
    program = torch.export.export(layer, (x,))
    torch.export.save(program, tmp_path / "layer.pt2")
    again = torch.export.load(tmp_path / "layer.pt2").module()
    torch.testing.assert_close(again(x), layer(x))
    layer.reset_state()
    torch.export.export(layer, (x,))
    assert layer.usage is None


@pytest.mark.parametrize("top_k", [0, 2])
def test_R1_34_fixed_slots_ask_nothing_of_the_host(top_k: int):
    """Tensors without data: whoever wants a number of one raises. (The default dispatcher wants its sizes.)"""
    with FakeTensorMode():
        layer = layer_of(top_k=top_k, use_aux_loss=True, dispatch=PaddedConfig())
        (layer(torch.empty(2, 4, 6, dtype=torch.float64)).sum() + layer.aux_loss).backward()
        with pytest.raises(DataDependentOutputException):
            layer_of(top_k=top_k)(torch.empty(8, 6, dtype=torch.float64))


SAMPLE = torch.tensor(
    [
        [0.7, 0.1, 0.1, 0.1],
        [0.6, 0.2, 0.1, 0.1],
        [0.4, 0.35, 0.05, 0.2],
        [0.1, 0.5, 0.1, 0.3],
    ],
    dtype=torch.float64,
)


@pytest.mark.requirement("R1-35", "R1-36", "C11", "C12")
def test_R1_35_diagnostics():
    """Exact names; total weight, mean weight when selected, population variance, most over least."""
    layer = given_routing(SAMPLE, 2)
    layer(torch.eye(4, dtype=torch.float64))
    found = layer.get_auxiliary_loss_diagnostics()
    # Choices: (0, 1), (0, 1), (0, 1), (1, 3); ties of the first row go to the lowest index.
    weight_0 = 0.7 / 0.8 + 0.6 / 0.8 + 0.4 / 0.75
    weight_3 = 0.3 / 0.8
    assert [found[f"expert_{e}_tokens"] for e in range(4)] == [3, 4, 0, 1]
    assert found["expert_0_prob_mass"] == pytest.approx(weight_0)
    assert found["expert_0_avg_weight"] == pytest.approx(weight_0 / 3)
    assert found["expert_3_prob_fraction"] == pytest.approx(weight_3 / 4)
    assert found["expert_2_avg_weight"] == 0 and found["max_min_ratio"] == float("inf")
    assert found["usage_variance"] == pytest.approx(2.5)
    assert found["usage_variance_fraction"] == pytest.approx(2.5 / 64)
    expected = 4 * (3 / 8 * 1.8 / 4 + 4 / 8 * 1.15 / 4 + 1 / 8 * 0.7 / 4)
    assert found["load_balance_loss"] == pytest.approx(expected) == layer.aux_loss.item()
    of_experts = {f"expert_{e}_{of}" for e in range(4) for of in ("tokens", "prob_mass", "prob_fraction", "avg_weight")}
    totals = {"load_balance_loss", "usage_variance", "usage_variance_fraction", "max_min_ratio"}
    assert set(found) == of_experts | totals | {"num_experts", "batch_size", "top_k"}


def test_R1_37_diagnostics_as_text():
    layer = given_routing(SAMPLE, 2)
    assert layer.get_auxiliary_loss_diagnostics() == {"status": "no forward pass since the last reset"}
    layer(torch.eye(4, dtype=torch.float64))
    text = layer.get_auxiliary_loss_diagnostics().as_strings()
    assert (text["num_experts"], text["batch_size"], text["top_k"]) == ("4", "4", "2")
    assert (text["expert_0_tokens"], text["expert_0_prob_mass"]) == ("3", "2.1583")
    assert (text["expert_0_avg_weight"], text["usage_variance"]) == ("0.7194", "2.500000")
    assert (text["max_min_ratio"], text["load_balance_loss"]) == ("inf", "1.337500")
    layer.use_aux_loss = False
    assert "load_balance_loss" not in layer.get_auxiliary_loss_diagnostics()


def test_R1_38_clone_is_independent():
    layer, x = layer_of(use_aux_loss=True, aux_loss_weight=0.3), vectors(4)
    layer(x)
    twin = layer.clone()
    before = twin.get_flat_parameters()
    assert torch.equal(before, layer.get_flat_parameters()) and twin.usage is None
    assert twin.use_aux_loss and twin.aux_loss_weight == 0.3 and twin.top_k == 2
    layer(x).sum().backward()
    torch.optim.SGD(layer.parameters(), 0.1).step()
    assert torch.equal(twin.get_flat_parameters(), before)
    twin.use_aux_loss = False
    assert layer.use_aux_loss and len(layer.moe.losses) == 2


def test_R1_39_all_diagnostics():
    layer = layer_of()
    found = layer.get_diagnostics()
    assert found == {
        "layer.type": "MoELayer",
        "layer.input_shape": "[..., 6]",
        "layer.output_shape": "[..., 5]",
        "layer.parameter_count": layer.num_parameters(),
        "layer.supports_training": "True",
        "layer.activation": "none",
        "status": "no forward pass since the last reset",
    }
    layer(vectors(3))
    assert layer.get_diagnostics()["num_experts"] == 4 and "status" not in layer.get_diagnostics()


@pytest.mark.requirement("R1-40", "R1-41")
def test_R1_41_flat_parameters():
    """Router, expert 0, expert 1, ...; back bit by bit; a wrong length changes nothing."""
    layer = layer_of(use_aux_loss=True)
    router, experts = modules_of(layer)
    by_hand = [p.detach().reshape(-1) for module in (router, *experts) for p in module.parameters()]
    flat = layer.get_flat_parameters()
    assert torch.equal(flat, torch.cat(by_hand)) and flat.numel() == layer.num_parameters()
    layer.set_flat_parameters(torch.zeros_like(flat))
    assert all(not parameter.any() for parameter in layer.parameters())
    layer.set_flat_parameters(flat)
    assert torch.equal(layer.get_flat_parameters(), flat)
    for wrong in (flat[:-1], torch.cat([flat, flat[:1]]), flat[None]):
        with pytest.raises(ValueError, match=f"expected a vector of {flat.numel()} numbers, got one of shape"):
            layer.set_flat_parameters(wrong + 1)
        assert torch.equal(layer.get_flat_parameters(), flat)
    half = layer_of(dtype=torch.bfloat16)
    assert half.get_flat_parameters().dtype == torch.bfloat16


def test_R1_42_reset_state():
    class Remembers(nn.Linear):
        seen = None

        def reset_state(self) -> None:
            self.seen = None

    expert = Remembers(6, 6)
    layer = MoELayer([expert, nn.Linear(6, 6)], nn.Linear(6, 2), 6, use_aux_loss=True)
    for forget in (layer.reset_state, layer.eval, layer.train):
        expert.seen = 3
        layer(torch.randn(4, 6))
        assert layer.usage is not None
        forget()
        assert layer.usage is None and expert.seen is None
        assert list(layer.get_auxiliary_loss_diagnostics()) == ["status"]
        layer.train()
        with pytest.raises(RuntimeError, match="run a forward pass first"):
            layer.compute_auxiliary_loss()


def test_R1_43_nothing_leaks():
    """Over accumulated micro-batches no graph outlives its loss, though the numbers stay."""
    layer = layer_of(use_aux_loss=True)
    graphs = []
    for step in range(3):
        x = vectors(4, seed=step)
        out = layer(x)
        loss = out.square().sum() + layer.aux_loss_weight * layer.aux_loss
        graphs.append((weakref.ref(out), weakref.ref(layer.aux_loss), weakref.ref(x)))
        loss.backward()
        del x, out, loss
        gc.collect()
        assert all(reference() is None for graph in graphs for reference in graph)
        assert layer.aux_loss > 0 and not layer.aux_loss.requires_grad and layer.z_loss > 0
    out = layer(vectors(4))
    del out  # a forward pass that nobody goes on with
    assert not layer.aux_loss.requires_grad
    with torch.no_grad():
        layer(vectors(4))
    assert layer.aux_loss > 0


def test_losses_live_as_long_as_the_output_s_graph():
    """Also where the output itself is gone: a residual keeps its graph alone."""
    layer = layer_of(use_aux_loss=True)
    x = vectors(4)
    total = (F.pad(layer(x), (0, 1)) + x).sum()
    assert layer.aux_loss.requires_grad
    (total + layer.aux_loss).backward()
    router = modules_of(layer)[0]
    assert router.weight.grad.abs().max() > 0


def test_R1_44_training_end_to_end():
    """50 steps of SGD on MSE + weight x balance loss; routing uses several experts."""
    torch.manual_seed(0)
    for top_k in (0, 2):
        layer = MoELayer.from_config(MoELayerConfig(in_features=8, out_features=4, top_k=top_k))
        x, target = torch.randn(32, 8), torch.randn(32, 4)
        optimizer, totals = torch.optim.SGD(layer.parameters(), 0.05), []
        for _ in range(50):
            primary = F.mse_loss(layer(x), target)
            total = primary + layer.aux_loss_weight * layer.aux_loss
            totals.append(total.item())
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
        found = layer.get_auxiliary_loss_diagnostics()
        assert totals[-1] < 0.9 * totals[0]
        masses = [found[f"expert_{e}_prob_mass"] for e in range(4)]
        assert sum(mass > 0 for mass in masses) >= (4 if top_k == 0 else 2)


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_experts": 1},
        {"in_features": 0},
        {"out_features": -1},
        {"hidden_features": 0},
        {"expansion": 0.5},
        {"top_k": 5},
        {"top_k": -1},
        {"aux_loss_weight": -0.1},
        {"activation": "sine"},
    ],
)
def test_R1_45_builder(wrong: dict):
    (key, value), *_ = wrong.items()
    with pytest.raises(ValueError, match=f"{key} = {value!r}"):
        MoELayerConfig(**wrong)
    layer = MoELayer.from_config(MoELayerConfig())
    assert (layer.num_experts, layer.top_k, layer.use_aux_loss, layer.aux_loss_weight) == (4, 4, True, 0.01)


def test_R1_46_whole_model():
    """With an output layer where widths differ; one seed, one model; Adam with AMSGrad, and the clip."""

    def model() -> nn.Module:
        torch.manual_seed(3)
        return nn.Sequential(MoELayer.from_config(MoELayerConfig(in_features=8, top_k=2)), nn.Linear(8, 3))

    first, second, x = model(), model(), torch.ones(2, 8)
    optimizer = torch.optim.Adam(first.parameters(), 1e-4, amsgrad=True)
    assert torch.equal(first(x), second(x))
    first(x).square().sum().backward()
    nn.utils.clip_grad_norm_(first.parameters(), 1.0)
    optimizer.step()
    assert not torch.equal(first(x), second(x))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(x), second(x))
    assert first[0].get_diagnostics()["layer.parameter_count"] == first[0].num_parameters()


def test_capacity_and_padding():
    """A limit drops as the core layer does; padding takes part in nothing."""
    layer = layer_of(top_k=1, capacity=CapacityConfig(expert_capacity=2), use_aux_loss=True)
    router = modules_of(layer)[0]
    nn.init.zeros_(router.weight)
    nn.init.zeros_(router.bias)
    out = layer(vectors(6))
    assert (out.abs().sum(1) > 0).sum() == 2 and layer.usage.tokens_E.tolist() == [6, 0, 0, 0]
    valid = torch.tensor([True, False, True])
    layer(vectors(3), TokenContext.of_rows(1, 3, valid_T=valid))
    assert layer.usage.num_tokens == 2


def test_noise_needs_the_step():
    layer = MoELayer(unlike_experts(4, dtype=torch.float32), NoisyConfig(top_k=2), 6, 5)
    x = vectors(3, dtype=torch.float32)
    with pytest.raises(ValueError, match="draws numbers by the step: pass ctx"):
        layer(x)
    outputs = [layer(x, TokenContext.of_rows(1, 3, step=step)) for step in (0, 0, 1)]
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])
    layer.eval()(x)


def test_a_router_of_moedist():
    """The same numbers as with the module that holds the same weights."""
    layer = MoELayer(unlike_experts(4), TopKConfig(top_k=2), 6, 5)
    router = nn.Linear(6, 4, bias=False, dtype=torch.float64)
    with torch.no_grad():
        router.weight.copy_(layer.moe.router.weight)
    twin = MoELayer(copy.deepcopy(list(layer.moe.bank.experts.expert.values())), router, 6, 5, top_k=2)
    assert torch.equal(layer(vectors(5)), twin(vectors(5)))
