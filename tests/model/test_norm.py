"""RMSNorm against its formula."""

from __future__ import annotations

import pytest
import torch

from moedist.config import ConfigError
from moedist.model.norm.rmsnorm import RMSNormConfig


def test_equals_the_formula():
    norm = RMSNormConfig(eps=0.1).build(6, dtype=torch.float64)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(3, 4, 6, dtype=torch.float64, requires_grad=True)
    want = x / (x.pow(2).mean(-1, keepdim=True) + 0.1).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), want, rtol=1e-13, atol=1e-13)
    assert torch.autograd.gradcheck(norm, (x,), fast_mode=True)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_narrow_inputs_are_normed_in_fp32(weight_dtype):
    norm = RMSNormConfig().build(4096, dtype=weight_dtype)
    torch.nn.init.ones_(norm.weight)
    x = (torch.randn(8, 4096) * 300).bfloat16()
    want = (x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()).bfloat16()
    got = norm(x)
    assert got.dtype == torch.bfloat16
    assert (got == want).float().mean() > 0.999  # rounded once; squares summed in bf16 miss nearly everywhere
    with torch.autocast("cpu", torch.bfloat16):
        assert norm(x).dtype == torch.bfloat16
        assert norm(x.float()).dtype == torch.float32


def test_eps_must_be_positive():
    with pytest.raises(ConfigError, match="eps = 0.0 divides by zero .* Set it above 0"):
        RMSNormConfig(eps=0.0)
