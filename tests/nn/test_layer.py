"""`moedist.nn.MoELayer` on one device: what a library user may rely on."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn import functional as F

from moedist.moe.capacity import CapacityConfig
from moedist.moe.context import TokenContext
from moedist.moe.dispatch.all_to_all import AllToAllConfig
from moedist.moe.dispatch.contract import DispatchConfig
from moedist.moe.dispatch.padded import PaddedConfig
from moedist.moe.router.noisy import NoisyConfig
from moedist.moe.router.topk import TopKConfig
from moedist.nn import AuxLossModule, DiagnosticsProvider, MoELayer, MoELayerConfig
from tests.nn.made import layer_of, modules_of, unlike_experts, vectors


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
    with pytest.raises(TypeError, match=r"expert 0 makes a tuple of \[2, 6\]; it must make one tensor"):
        MoELayer([nn.LSTM(6, 6)], nn.Linear(6, 1), 6)
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


@pytest.mark.requirement("R1-02", "R1-17", "D7")
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


def test_the_output_may_be_changed_in_place():
    """As residual streams and ReLUs do; with the losses' graph hanging on it, too."""
    gradients = []
    for in_place in (False, True):
        layer, x = layer_of(top_k=2, use_aux_loss=True), vectors(7)
        out = layer(x)
        bonus = x[:, :5]
        out = F.relu_(out.add_(bonus)) if in_place else F.relu(out + bonus)
        (out.square().sum() + layer.aux_loss).backward()
        gradients.append([parameter.grad for parameter in layer.parameters()])
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


@pytest.mark.parametrize("dispatch", [AllToAllConfig(), PaddedConfig()])
def test_gradients_have_gradients(dispatch: DispatchConfig):
    """For penalties on gradients; what is taken of the second order was silently incomplete once."""
    experts = [nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double() for _ in range(3)]
    layer = MoELayer(experts, nn.Linear(3, 3).double(), 3, 2, top_k=2, use_aux_loss=True, dispatch=dispatch)
    x = torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.autograd.gradgradcheck(layer, (x,))


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


@pytest.mark.requirement("R1-02", "R1-33", "D7")
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


@pytest.mark.requirement("R1-02")
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
