"""Every kernel compiled ahead of time, for GPUs that are not here: what Triton accepts, and that nothing is missing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}
TYPES = {
    "ends": "*i32",
    "sizes": "*i32",
    "allowed": "*i1",
    "selection_bias": "*fp32",
    **dict.fromkeys(("index", "expert", "bucket", "order", "place", "size_B"), "*i64"),
    **dict.fromkeys(("gate_R", "grad_weight", "logits", "score", "grad_score", "grad_gate", "grad_logits"), "*fp32"),
    **dict.fromkeys(("num_rows", "dim", "hidden_dim", "num_experts", "rows_class", "depth", "width", "height"), "i32"),
    **dict.fromkeys(
        ("stride_k", "stride_n", "num_terms", "num_tokens", "num_pairs", "num_buckets", "num_tiles"), "i32"
    ),
    "eps": "fp32",
}
"""Of arguments by name; all others point at numbers of the rows' type."""


def compiled(kernel: Any, target: str, dtype: str, **constants: Any) -> dict[str, Any]:
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = {name: constants.pop(name) for name in ("num_warps", "num_stages", "num_ctas") if name in constants}
    types = {name: TYPES.get(name, f"*{dtype}") for name in kernel.arg_names} | dict.fromkeys(constants, "constexpr")
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    # As launches with tensors from torch and widths of whole 16 bytes say.
    whole = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(kernel.arg_names)
        if types[name].startswith("*") or name in ("dim", "hidden_dim", "depth", "width", "height")
    }
    source = ASTSource(kernel, signature=types, constexprs=places, attrs=whole)
    return compile(source, target=GPUTarget(*TARGETS[target]), options=options).asm


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["swiglu", "gelu", "relu"])
@pytest.mark.parametrize("target", TARGETS)
def test_products_compile_ahead_of_time(target, activation):
    pytest.importorskip("triton")
    from moedist.moe.kernels import ffn_kernels as kernels

    biased = activation == "gelu"
    rules = {"ACTIVATION": activation, "BIASED": biased, "KEPT": True, "TWO": activation == "swiglu"}
    rules |= {"INDEXED": False, "PRECISION": "ieee", "EXPERTS": 128}
    none = {"token_R": None, **({} if biased else dict.fromkeys(("up_bias", "gate_bias", "bias", "bias_2")))}
    tuned = (kernels.up_products, kernels.row_products, kernels.hidden_gradients, kernels.weight_gradients)
    for dtype, place in (("bf16", 1), ("fp32", -1)):
        for kernel in tuned:
            known = {**rules, **none, **kernel.configs[place].all_kwargs()}
            constants = {name: value for name, value in known.items() if name in kernel.fn.arg_names}
            options = {name: known[name] for name in ("num_warps", "num_stages")}
            asm = compiled(kernel.fn, target, dtype, **constants, **options)
            assert asm["hsaco" if target.startswith("gfx") else "cubin"]
            if (target, dtype) == ("sm_90", "bf16"):
                assert "wgmma.mma_async" in asm["ptx"], "Hopper's tensor cores must be used"


def test_wide_types_try_fewer_tilings():
    pytest.importorskip("triton")
    from moedist.moe.kernels.ffn_kernels import row_products, up_products

    for kernel in (up_products, row_products):
        counts = []
        for dtype in (torch.bfloat16, torch.float32, torch.float64):
            kernel.nargs = {"x": torch.zeros(1, dtype=dtype), "dim": 1}
            chosen = kernel.prune_configs({})
            counts.append(len(chosen))
            assert chosen[-1] is kernel.configs[-1]
        assert counts[0] == len(kernel.configs) > counts[1] > counts[2] >= 1


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_kernels_around_the_experts_compile_ahead_of_time(target):
    pytest.importorskip("triton")
    from moedist.moe.kernels import pairs_kernels as kernels

    blocks = kernels.blocks_of_tokens(256, 8)
    choice = {"K": 8, "SCORE": "softmax", "RENORMALIZE": True, **blocks}
    free = {
        "selection_bias": None,
        "BIASED": False,
        "GROUPS": 0,
        "TOP_GROUPS": 0,
        "SUM_OF_TWO": False,
        "GROUP_PLACES": 1,
    }
    limited = {"BIASED": True, "GROUPS": 8, "TOP_GROUPS": 4, "SUM_OF_TWO": True, "GROUP_PLACES": 8}
    pairs = {"PAIRS": 64, "BUCKETS": 128}
    for kernel, constants in (
        (kernels.sum_rows_kernel, {"BLOCK": 1024}),
        (kernels.choose_kernel, choice | free),
        (kernels.choose_kernel, choice | limited | {"SCORE": "sigmoid"}),
        (kernels.choose_gradient_kernel, choice),
        (kernels.count_kernel, {**pairs, "ORDERED": True}),
        (kernels.place_kernel, {**pairs, "ORDERED": False, "PROGRAMS": 32}),
        (kernels.place_kernel, {**pairs, "ORDERED": True, "PROGRAMS": 32}),
    ):
        assert compiled(kernel, target, "bf16", **constants)["hsaco" if target == "gfx942" else "cubin"]
