"""Stacked experts and pairs of linear maps."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moedist.interop.linear_experts import from_linears, to_linears
from moedist.moe.experts.contract import Rows
from moedist.moe.experts.loop import LoopConfig
from moedist.moe.init import named_draw

DIM, HIDDEN, EXPERTS = 6, 10, 11


def built(activation: str = "relu", bias: bool = True) -> nn.Module:
    experts = LoopConfig(hidden_dim=HIDDEN, activation=activation, bias=bias).build(DIM, EXPERTS, dtype=torch.float64)
    experts.init_weights(named_draw(0))
    for name, parameter in experts.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    return experts


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_R0_12_linear_maps_compute_the_same(activation):
    """11 experts: sorted as text, expert 10 would come before 2."""
    experts = built(activation)
    assert (experts.up.shape, experts.up_bias.shape) == ((EXPERTS, DIM, HIDDEN), (EXPERTS, HIDDEN))
    assert (experts.down.shape, experts.down_bias.shape) == ((EXPERTS, HIDDEN, DIM), (EXPERTS, DIM))
    state = to_linears(experts.state_dict())
    x_RD = torch.randn(2 * EXPERTS, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ends_e = (2 * torch.arange(1, EXPERTS + 1)).to(torch.int32)
    y_RD = experts(Rows(x_RD, torch.ones(2 * EXPERTS).double(), (2,) * EXPERTS, ends_e))
    for expert in range(EXPERTS):
        pair = nn.ModuleDict({"fc1": nn.Linear(DIM, HIDDEN), "fc2": nn.Linear(HIDDEN, DIM)}).double()
        prefix = f"{expert}."
        pair.load_state_dict({key.removeprefix(prefix): v for key, v in state.items() if key.startswith(prefix)})
        x = x_RD[2 * expert : 2 * expert + 2]
        expected = pair["fc2"](getattr(nn.functional, activation)(pair["fc1"](x)))
        torch.testing.assert_close(y_RD[2 * expert : 2 * expert + 2], expected, atol=1e-13, rtol=0)


@pytest.mark.requirement("R0-12")
@pytest.mark.parametrize("bias", [False, True])
def test_there_and_back(bias):
    experts = built(bias=bias)
    state = experts.state_dict()
    again = from_linears(to_linears(state))
    assert again.keys() == state.keys() and all(torch.equal(again[name], state[name]) for name in state)
    other = LoopConfig(hidden_dim=HIDDEN, activation="relu", bias=bias).build(DIM, EXPERTS, dtype=torch.float64)
    other.load_state_dict(dict(reversed(again.items())))
    assert torch.equal(other.down, experts.down)


def test_errors():
    state = to_linears(built().state_dict())
    with pytest.raises(ValueError, match=r"no place for \['gate', 'gate_bias'\]"):
        to_linears(built("swiglu").state_dict())
    with pytest.raises(ValueError, match=r"of 11 experts, \[3\] have no fc2.bias"):
        from_linears({key: value for key, value in state.items() if key != "3.fc2.bias"})
    with pytest.raises(ValueError, match=r"fc1.bias has unlike shapes: \[\(4,\), \(10,\)\]"):
        from_linears({**state, "2.fc1.bias": torch.zeros(4)})
    with pytest.raises(ValueError, match="'fc1.weight' is no parameter of an expert"):
        from_linears({"fc1.weight": torch.zeros(2, 2)})
    assert from_linears({}) == {}
