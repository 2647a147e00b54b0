"""SonicMoE behind the contract of experts, on a CPU: what is handed to the library, held against a stand-in with the
library's signature. No GPU has run it."""

from __future__ import annotations

import enum
import sys
import types
from unittest import mock

import pytest
import torch
from torch.nn import functional as F

from moedist.config import ConfigError
from moedist.moe.experts import sonic
from moedist.moe.experts.contract import Rows
from moedist.moe.experts.loop import LoopConfig
from moedist.moe.experts.sonic import SonicConfig
from moedist.moe.layer import MoEConfig, experts_notes
from tests.moe.test_experts import SIZES, filled, rows_of, run


class ActivationType(enum.Enum):
    """As ``sonicmoe.enums``, as far as it is used."""

    SWIGLU = "swiglu"


# sonic-moe 0.1.2.post1, sonicmoe/functional/__init__.py: the signature, and what its kernels want of their arguments
# ("Weight format requirements" there: stride order (2, 0, 1), gate and up rows interleaved; tokens ascending).
def moe_general_routing_inputs(
    x: torch.Tensor,
    router_scores: torch.Tensor,
    token_indices: torch.Tensor,
    expert_indices: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor | None,
    w2: torch.Tensor,
    b2: torch.Tensor | None,
    E: int,
    stream_id: int,
    activation_type: ActivationType,
    is_inference_mode_enabled: bool = False,
    concat_layout: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    dim, (hidden_2, _, num_experts) = x.shape[1], w1.shape
    hidden = hidden_2 // 2
    assert w1.shape == (2 * hidden, dim, num_experts) and w2.shape == (dim, hidden, num_experts) and num_experts == E
    assert w1.stride() == (dim, 1, 2 * hidden * dim) and w2.stride() == (hidden, 1, hidden * dim)
    assert x.is_contiguous() and x.dtype == w1.dtype == w2.dtype and router_scores.is_floating_point()
    assert b1 is None and b2 is None and not concat_layout and activation_type is ActivationType.SWIGLU
    assert token_indices.dtype == expert_indices.dtype == torch.int32 and isinstance(stream_id, int)
    assert bool((token_indices[1:] >= token_indices[:-1]).all())
    assert bool(((expert_indices >= 0) & (expert_indices < num_experts)).all())
    assert is_inference_mode_enabled is not torch.is_grad_enabled()
    # Every expert multiplies all pairs: a row that is no number spoils the weights' gradients, as in a product.
    pairs = x[token_indices.long()]
    products = torch.einsum("pd,fde->pef", pairs, w1)
    y = torch.einsum("pef,dfe->ped", F.silu(products[..., 0::2]) * products[..., 1::2], w2)
    own = F.one_hot(expert_indices.long(), num_experts).to(y.dtype)
    y = torch.einsum("ped,pe->pd", y, own) * router_scores[:, None].to(y.dtype)
    out = torch.zeros_like(x).index_add(0, token_indices.long(), y)
    return out, torch.bincount(expert_indices, minlength=E).int()


@pytest.fixture
def installed(monkeypatch):
    """The stand-in, where the library would be, and no look at the device."""
    package, enums = types.ModuleType("sonicmoe"), types.ModuleType("sonicmoe.enums")
    package.__spec__ = mock.Mock()
    package.moe_general_routing_inputs, enums.ActivationType = moe_general_routing_inputs, ActivationType
    monkeypatch.setitem(sys.modules, "sonicmoe", package)
    monkeypatch.setitem(sys.modules, "sonicmoe.enums", enums)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: types.SimpleNamespace(cuda_stream=7))
    monkeypatch.setattr(sonic, "why_not", lambda *_: None)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_outputs_and_gradients_are_the_loops(installed, sizes):
    expected = run(LoopConfig(hidden_dim=12), sizes, 20, torch.float64)
    for name, value in run(SonicConfig(hidden_dim=12), sizes, 20, torch.float64).items():
        torch.testing.assert_close(value, expected[name], atol=1e-13, rtol=0, msg=name)


def test_rows_that_carry_nothing_leave_no_trace(installed):
    """Poisoned rows behind the last end, whose number the device alone knows."""
    sizes, tail = (3, 0, 5), 4
    whole = rows_of((*sizes, tail), 20, torch.float64)
    x_RD, gate_R = whole.x_RD.detach().clone(), whole.gate_R.detach().clone()
    x_RD[8:] = gate_R[8:] = torch.nan
    rows = Rows(x_RD.requires_grad_(), gate_R.requires_grad_(), None, whole.ends_e[:3])
    experts, twin = (filled(config(hidden_dim=12), 20, 3, torch.float64) for config in (SonicConfig, LoopConfig))
    y_RD = experts(rows)
    y_RD.square().sum().backward()
    alone = Rows(x_RD.detach()[:8].requires_grad_(), gate_R.detach()[:8].requires_grad_(), sizes, rows.ends_e)
    twin(alone).square().sum().backward()
    assert not y_RD[8:].any() and not x_RD.grad[8:].any() and not gate_R.grad[8:].any()
    torch.testing.assert_close(x_RD.grad[:8], alone.x_RD.grad, atol=1e-13, rtol=0)
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(experts.get_parameter(name).grad, parameter.grad, atol=1e-13, rtol=0)


def test_nothing_is_kept_where_no_gradient_is_asked_for(installed):
    rows = rows_of((3, 0, 5), 20, torch.float64)
    experts = filled(SonicConfig(hidden_dim=12), 20, 3, torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(experts(rows), filled(LoopConfig(hidden_dim=12), 20, 3, torch.float64)(rows))


def test_what_is_missing_is_named():
    with pytest.raises(ConfigError, match="^moe.experts.kind = 'sonic' needs the package sonic-moe, which"):
        SonicConfig().build(16, 4, device="meta")
    with mock.patch("importlib.util.find_spec"), pytest.raises(ConfigError, match="sonic' needs a GPU"):
        SonicConfig().build(16, 4, device="meta")
    for key, value in (("activation", "gelu"), ("bias", True)):
        with pytest.raises(ConfigError, match=f"^{key} = {value!r} is not what moe/experts=sonic computes"):
            SonicConfig(**{key: value})


def test_other_rows_are_computed_by_the_loop():
    with mock.patch("importlib.util.find_spec"), mock.patch.object(torch.cuda, "is_available", lambda: True):
        layer = MoEConfig(4, experts=SonicConfig(hidden_dim=12)).build(20)
        got = run(SonicConfig(hidden_dim=12), (3, 0, 5, 2), 20, torch.float32)
    for name, expected in run(LoopConfig(hidden_dim=12), (3, 0, 5, 2), 20, torch.float32).items():
        assert torch.equal(got[name], expected), name
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    reason = "SonicMoE's kernels need a GPU, not cpu"
    assert experts_notes(layer, cpu, torch.bfloat16) == [f"moe/experts=sonic runs as loop: {reason}"]
    assert sonic.why_not(gpu, torch.float32) == "SonicMoE's kernels need bf16 or fp16, not float32"
    assert sonic.why_not(gpu, torch.bfloat16) is None
    (note,) = experts_notes(layer, gpu, torch.bfloat16)
    assert note.startswith("moe/experts=sonic: SonicMoE's kernels; weights are copied")
