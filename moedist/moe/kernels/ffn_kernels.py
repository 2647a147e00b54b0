"""Grouped matrix products of feed-forward experts: what stands before and after a product is done in its kernel.

Rows lie expert by expert; where each expert's rows end is read on the device (``ends_e``), so nothing here depends on
what the host knows, but the number of rows R. Rows past the last end belong to nobody: outputs are zero there. All sums
are taken in fp32 (fp64 of fp64), in one order, and every output element is written by one program: no atomics.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from moedist.moe.kernels.launch import on

INTERPRETED = knobs.runtime.interpret
"""Whether kernels run on the host, line by line (``TRITON_INTERPRET=1``): for tests."""
WIDEN = tl.constexpr(INTERPRETED)
"""Whether factors are widened first. The interpreter multiplies the bits of bf16 as if they were integers; a product of
two narrow numbers is exact in the wide type, so this changes nothing."""


def tiles(*sizes: tuple[int, int, int, int, int]) -> list[triton.Config]:
    """Configurations to choose from: rows, columns and depth of a tile, warps, stages of the pipeline."""
    if INTERPRETED:
        return [triton.Config({"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16})]
    return [
        triton.Config({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k}, num_warps=warps, num_stages=stages)
        for m, n, k, warps, stages in sizes
    ]


TWO_SUMS = tiles((128, 128, 64, 8, 3), (128, 64, 64, 8, 3), (64, 128, 64, 4, 3), (64, 64, 64, 4, 3), (32, 32, 32, 4, 2))
ONE_SUM = tiles(
    (128, 256, 64, 8, 3), (128, 128, 64, 8, 3), (128, 64, 64, 4, 4), (64, 128, 64, 4, 4), (64, 64, 64, 4, 3),
    (32, 32, 32, 4, 2),
)  # fmt: skip
NARROWEST = min(config.kwargs["BLOCK_N"] for config in ONE_SUM)
MOST_ROOM = 160 * 1024
"""Bytes that the tiles of a pipeline may take: Hopper has 227 KiB, and some kernels load two matrices at once."""
KEY = ["dim", "hidden_dim", "num_experts", "rows_class"]
"""What the fastest configuration is chosen for, beside the dtypes; `rows_class` says the rows per expert."""


@triton.jit
def find_rows(ends, block, num_rows, num_experts, EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr):
    """Expert, first row and end of the rows of the block-th tile of rows. The rows past the last end stand for one
    more expert, number ``num_experts``; a block behind those has a higher number."""
    expert = tl.arange(0, EXPERTS)
    end = tl.load(ends + expert, mask=expert < num_experts, other=num_rows)
    start = tl.load(ends + expert - 1, mask=(expert > 0) & (expert <= num_experts), other=0)
    start = tl.where(expert > num_experts, num_rows, start)
    blocks = (end - start + BLOCK_M - 1) // BLOCK_M
    last = tl.cumsum(blocks, 0)
    own = tl.sum((last <= block).to(tl.int32), 0)
    is_own = expert == own
    first = tl.sum(tl.where(is_own, start + (block - last + blocks) * BLOCK_M, 0), 0)
    return own, first, tl.sum(tl.where(is_own, end, 0), 0)


@triton.jit
def tile_of(program, num_blocks, num_columns):
    """Block of rows and block of columns; eight blocks of rows at a time meet all columns, so that both stay near."""
    in_band = 8 * num_columns
    first = (program // in_band) * 8
    height = tl.minimum(num_blocks - first, 8)
    return first + (program % in_band) % height, (program % in_band) // height


@triton.jit
def add_product(left, right, total, PRECISION: tl.constexpr):
    """``total + left right``."""
    if WIDEN:
        left = left.to(total.dtype)
        right = right.to(total.dtype)
    return tl.dot(left, right, total, input_precision=PRECISION, out_dtype=total.dtype)


@triton.jit
def up_kernel(
    x, ends, gate_R, up, gate, up_bias, gate_bias, up_out, gate_out, hidden,
    num_rows, dim, hidden_dim, num_experts, rows_class,
    ACTIVATION: tl.constexpr, BIASED: tl.constexpr, KEPT: tl.constexpr,
    PRECISION: tl.constexpr, EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``hidden = gate_R * act(x W)``, and the products in front of the activation where they are kept."""
    num_blocks = num_rows // BLOCK_M + num_experts + 1
    block, column = tile_of(tl.program_id(0), num_blocks, tl.cdiv(hidden_dim, BLOCK_N))
    expert, first, end = find_rows(ends, block, num_rows, num_experts, EXPERTS, BLOCK_M)
    if expert >= num_experts:
        return
    wide = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    row = first + tl.arange(0, BLOCK_M)
    is_row = row < end
    f = column * BLOCK_N + tl.arange(0, BLOCK_N)
    is_f = f < hidden_dim
    k = tl.arange(0, BLOCK_K)
    x_tile = x + row[:, None].to(tl.int64) * dim + k[None, :]
    of_weight = expert.to(tl.int64) * dim * hidden_dim + k[:, None] * hidden_dim + f[None, :]
    up_tile = up + of_weight
    gate_tile = gate + of_weight
    up_sum = tl.zeros((BLOCK_M, BLOCK_N), dtype=wide)
    gate_sum = tl.zeros((BLOCK_M, BLOCK_N), dtype=wide)
    for done in range(0, dim, BLOCK_K):
        is_k = k < dim - done
        x_MK = tl.load(x_tile, mask=is_row[:, None] & is_k[None, :], other=0)
        is_weight = is_k[:, None] & is_f[None, :]
        up_sum = add_product(x_MK, tl.load(up_tile, mask=is_weight, other=0), up_sum, PRECISION)
        if ACTIVATION == "swiglu":
            gate_KN = tl.load(gate_tile, mask=is_weight, other=0)
            gate_sum = add_product(x_MK, gate_KN, gate_sum, PRECISION)
            gate_tile += BLOCK_K * hidden_dim
        x_tile += BLOCK_K
        up_tile += BLOCK_K * hidden_dim
    if BIASED:
        up_sum += tl.load(up_bias + expert * hidden_dim + f, mask=is_f, other=0).to(wide)[None, :]
        if ACTIVATION == "swiglu":
            gate_sum += tl.load(gate_bias + expert * hidden_dim + f, mask=is_f, other=0).to(wide)[None, :]
    # The activation is that of the rounded products, because backward has those.
    up_MN = up_sum.to(x.dtype.element_ty)
    gate_MN = gate_sum.to(x.dtype.element_ty)
    place = row[:, None].to(tl.int64) * hidden_dim + f[None, :]
    is_out = is_row[:, None] & is_f[None, :]
    if KEPT:
        tl.store(up_out + place, up_MN, mask=is_out)
        if ACTIVATION == "swiglu":
            tl.store(gate_out + place, gate_MN, mask=is_out)
    up_MN = up_MN.to(wide)
    gate_MN = gate_MN.to(wide)
    if ACTIVATION == "swiglu":
        active = gate_MN * tl.sigmoid(gate_MN) * up_MN
    elif ACTIVATION == "gelu":
        active = 0.5 * up_MN * (1 + tl.erf(up_MN * 0.7071067811865476))
    else:
        active = tl.maximum(up_MN, 0)
    weight = tl.load(gate_R + row, mask=is_row, other=0).to(wide)
    tl.store(hidden + place, (active * weight[:, None]).to(x.dtype.element_ty), mask=is_out)


@triton.jit
def product_kernel(
    left, left_2, ends, weight, weight_2, out,
    num_rows, dim, hidden_dim, num_experts, rows_class, depth, width, stride_k, stride_n,
    TWO: tl.constexpr, PRECISION: tl.constexpr, EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``out = left W``, plus ``left_2 W_2`` where there are two; each expert's W is [depth, width] by its strides."""
    num_blocks = num_rows // BLOCK_M + num_experts + 1
    block, column = tile_of(tl.program_id(0), num_blocks, tl.cdiv(width, BLOCK_N))
    expert, first, end = find_rows(ends, block, num_rows, num_experts, EXPERTS, BLOCK_M)
    if expert > num_experts:
        return
    wide = tl.float64 if left.dtype.element_ty == tl.float64 else tl.float32
    row = first + tl.arange(0, BLOCK_M)
    is_row = row < end
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    is_n = n < width
    k = tl.arange(0, BLOCK_K)
    of_left = row[:, None].to(tl.int64) * depth + k[None, :]
    of_weight = expert.to(tl.int64) * depth * width + k[:, None] * stride_k + n[None, :] * stride_n
    left_tile = left + of_left
    left_2_tile = left_2 + of_left
    weight_tile = weight + of_weight
    weight_2_tile = weight_2 + of_weight
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=wide)
    # Rows past the last end meet no weight: their sum stays zero.
    for done in range(0, tl.where(expert < num_experts, depth, 0), BLOCK_K):
        is_k = k < depth - done
        is_left = is_row[:, None] & is_k[None, :]
        is_weight = is_k[:, None] & is_n[None, :]
        left_MK = tl.load(left_tile, mask=is_left, other=0)
        total = add_product(left_MK, tl.load(weight_tile, mask=is_weight, other=0), total, PRECISION)
        if TWO:
            left_MK = tl.load(left_2_tile, mask=is_left, other=0)
            weight_KN = tl.load(weight_2_tile, mask=is_weight, other=0)
            total = add_product(left_MK, weight_KN, total, PRECISION)
            left_2_tile += BLOCK_K
            weight_2_tile += BLOCK_K * stride_k
        left_tile += BLOCK_K
        weight_tile += BLOCK_K * stride_k
    place = row[:, None].to(tl.int64) * width + n[None, :]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=is_row[:, None] & is_n[None, :])


@triton.jit
def hidden_gradient_kernel(
    grad_y, ends, gate_R, down, up_out, gate_out, hidden, grad_up_out, grad_gate_out, grad_weight,
    num_rows, dim, hidden_dim, num_experts, rows_class,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """From the output's gradient and the products in front of the activation: ``hidden`` once more, the products'
    gradients, and each block of columns' part of the row weights' gradients."""
    num_blocks = num_rows // BLOCK_M + num_experts + 1
    block, column = tile_of(tl.program_id(0), num_blocks, tl.cdiv(hidden_dim, BLOCK_N))
    expert, first, end = find_rows(ends, block, num_rows, num_experts, EXPERTS, BLOCK_M)
    if expert >= num_experts:
        return
    wide = tl.float64 if grad_y.dtype.element_ty == tl.float64 else tl.float32
    row = first + tl.arange(0, BLOCK_M)
    is_row = row < end
    f = column * BLOCK_N + tl.arange(0, BLOCK_N)
    is_f = f < hidden_dim
    k = tl.arange(0, BLOCK_K)
    grad_tile = grad_y + row[:, None].to(tl.int64) * dim + k[None, :]
    down_tile = down + expert.to(tl.int64) * dim * hidden_dim + f[None, :] * dim + k[:, None]
    grad_hidden = tl.zeros((BLOCK_M, BLOCK_N), dtype=wide)
    for done in range(0, dim, BLOCK_K):
        is_k = k < dim - done
        grad_MK = tl.load(grad_tile, mask=is_row[:, None] & is_k[None, :], other=0)
        down_KN = tl.load(down_tile, mask=is_k[:, None] & is_f[None, :], other=0)
        grad_hidden = add_product(grad_MK, down_KN, grad_hidden, PRECISION)
        grad_tile += BLOCK_K
        down_tile += BLOCK_K
    place = row[:, None].to(tl.int64) * hidden_dim + f[None, :]
    is_out = is_row[:, None] & is_f[None, :]
    narrow = grad_y.dtype.element_ty
    weight = tl.load(gate_R + row, mask=is_row, other=0).to(wide)
    up_MN = tl.load(up_out + place, mask=is_out, other=0).to(wide)
    grad_active = grad_hidden * weight[:, None]
    if ACTIVATION == "swiglu":
        gate_MN = tl.load(gate_out + place, mask=is_out, other=0).to(wide)
        sigmoid = tl.sigmoid(gate_MN)
        silu = gate_MN * sigmoid
        active = silu * up_MN
        grad_up = grad_active * silu
        grad_gate_MN = grad_active * up_MN * (sigmoid + silu * (1 - sigmoid))
        tl.store(grad_gate_out + place, grad_gate_MN.to(narrow), mask=is_out)
    elif ACTIVATION == "gelu":
        below = 0.5 * (1 + tl.erf(up_MN * 0.7071067811865476))
        active = up_MN * below
        grad_up = grad_active * (below + up_MN * 0.3989422804014327 * tl.exp(-0.5 * up_MN * up_MN))
    else:
        active = tl.maximum(up_MN, 0)
        grad_up = tl.where(up_MN > 0, grad_active, 0)
    tl.store(grad_up_out + place, grad_up.to(narrow), mask=is_out)
    tl.store(hidden + place, (active * weight[:, None]).to(narrow), mask=is_out)
    tl.store(grad_weight + column.to(tl.int64) * num_rows + row, tl.sum(grad_hidden * active, 1), mask=is_row)


@triton.jit
def weight_gradient_kernel(
    left, token_R, ends, right, right_2, out, out_2, bias, bias_2,
    dim, hidden_dim, num_experts, rows_class, height, width,
    INDEXED: tl.constexpr, TWO: tl.constexpr, BIASED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``out[e] = left^T right`` [height, width] over each expert's rows, likewise ``out_2`` where there are two, and
    the sums of ``right`` over rows where there are biases. Zero for an expert without rows."""
    blocks = tl.cdiv(height, BLOCK_M)
    columns = tl.cdiv(width, BLOCK_N)
    program = tl.program_id(0)
    expert = program // (blocks * columns)
    block, column = tile_of(program % (blocks * columns), blocks, columns)
    wide = tl.float64 if left.dtype.element_ty == tl.float64 else tl.float32
    end = tl.load(ends + expert)
    start = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    is_m = m < height
    is_n = n < width
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=wide)
    total_2 = tl.zeros((BLOCK_M, BLOCK_N), dtype=wide)
    bias_sum = tl.zeros((BLOCK_N,), dtype=wide)
    bias_sum_2 = tl.zeros((BLOCK_N,), dtype=wide)
    for first in range(start, end, BLOCK_K):
        row = first + tl.arange(0, BLOCK_K)
        is_row = row < end
        if INDEXED:
            source = tl.load(token_R + row, mask=is_row, other=-1)
            is_source = source >= 0
        else:
            source = row.to(tl.int64)
            is_source = is_row
        place = source[None, :] * height + m[:, None]
        left_MK = tl.load(left + place, mask=is_m[:, None] & is_source[None, :], other=0)
        place = row[:, None].to(tl.int64) * width + n[None, :]
        is_right = is_row[:, None] & is_n[None, :]
        right_KN = tl.load(right + place, mask=is_right, other=0)
        total = add_product(left_MK, right_KN, total, PRECISION)
        if BIASED:
            bias_sum += tl.sum(right_KN.to(wide), 0)
        if TWO:
            right_KN = tl.load(right_2 + place, mask=is_right, other=0)
            total_2 = add_product(left_MK, right_KN, total_2, PRECISION)
            if BIASED:
                bias_sum_2 += tl.sum(right_KN.to(wide), 0)
    place = expert.to(tl.int64) * height * width + m[:, None].to(tl.int64) * width + n[None, :]
    is_out = is_m[:, None] & is_n[None, :]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=is_out)
    if TWO:
        tl.store(out_2 + place, total_2.to(out.dtype.element_ty), mask=is_out)
    if BIASED:
        is_bias = is_n & (block == 0)
        tl.store(bias + expert * width + n, bias_sum.to(out.dtype.element_ty), mask=is_bias)
        if TWO:
            tl.store(bias_2 + expert * width + n, bias_sum_2.to(out.dtype.element_ty), mask=is_bias)


def fitting(configs: list[triton.Config], arguments: dict[str, Any], **_: Any) -> list[triton.Config]:
    """Those whose tiles have room beside a processor; of wide types the others would only be compiled, for minutes, to
    be refused. The last always stays."""
    itemsize = next(value.element_size() for value in arguments.values() if isinstance(value, Tensor))

    def room(config: triton.Config) -> int:
        tile = config.kwargs
        return (tile["BLOCK_M"] + tile["BLOCK_N"]) * tile["BLOCK_K"] * itemsize * config.num_stages

    return [config for config in configs[:-1] if room(config) <= MOST_ROOM] + configs[-1:]


def tuned(kernel: Any, configs: list[triton.Config], reset: list[str] | None = None) -> Any:
    """The kernel in the fastest of these configurations for each `KEY`, found at its first call and kept on disk by
    Triton."""
    prune = {"early_config_prune": fitting}
    return triton.autotune(configs, key=KEY, prune_configs_by=prune, reset_to_zero=reset, cache_results=True)(kernel)


up_products = tuned(up_kernel, TWO_SUMS)
row_products = tuned(product_kernel, ONE_SUM)
hidden_gradients = tuned(hidden_gradient_kernel, ONE_SUM, reset=["grad_weight"])
weight_gradients = tuned(weight_gradient_kernel, TWO_SUMS)


def forward(
    x: Tensor,
    gate_R: Tensor,
    ends_e: Tensor,
    up: Tensor,
    gate: Tensor | None,
    down: Tensor,
    up_bias: Tensor | None,
    gate_bias: Tensor | None,
    activation: str,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """See `moedist.moe.kernels.ffn.ffn_forward`."""
    (num_experts, dim, hidden_dim), num_rows = up.shape, gate_R.shape[0]
    products = x.new_empty(num_products(gate) if keep else 0, num_rows, hidden_dim)
    hidden_RF, y_RD = x.new_empty(num_rows, hidden_dim), x.new_empty(num_rows, dim)
    shape = shape_of(num_rows, num_experts, dim, hidden_dim)
    with on(x):
        up_products[by_rows(num_rows, num_experts, hidden_dim)](
            x, ends_e, gate_R, up, or_any(gate, up), up_bias, gate_bias,
            *(two(products) if keep else (None, None)), hidden_RF, **shape,
            ACTIVATION=activation, BIASED=up_bias is not None, KEPT=keep,
        )  # fmt: skip
        row_products[by_rows(num_rows, num_experts, dim)](
            hidden_RF, hidden_RF, ends_e, down, down, y_RD, **shape,
            depth=hidden_dim, width=dim, stride_k=dim, stride_n=1, TWO=False,
        )  # fmt: skip
    return y_RD, products


def backward(
    grad_y_RD: Tensor,
    x: Tensor,
    token_R: Tensor | None,
    gate_R: Tensor,
    ends_e: Tensor,
    up: Tensor,
    gate: Tensor | None,
    down: Tensor,
    products: Tensor,
    activation: str,
    biased: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `moedist.moe.kernels.ffn.ffn_backward`."""
    (num_experts, dim, hidden_dim), num_rows = up.shape, gate_R.shape[0]
    shape = shape_of(num_rows, num_experts, dim, hidden_dim)
    by_expert = {name: value for name, value in shape.items() if name not in ("num_rows", "EXPERTS")}
    hidden_RF, grad_products = x.new_empty(num_rows, hidden_dim), torch.empty_like(products)
    # One row of sums per block of columns, added up behind the kernel: in one order, without atomics.
    grad_gate_BR = gate_R.new_zeros(triton.cdiv(hidden_dim, NARROWEST), num_rows)
    grad_x_RD = x.new_empty(num_rows, dim)
    grad_up, grad_down = torch.empty_like(up), torch.empty_like(down)
    grad_gate = None if gate is None else torch.empty_like(gate)
    grad_up_bias = up.new_empty(num_experts, hidden_dim) if biased else None
    grad_gate_bias = up.new_empty(num_experts, hidden_dim) if biased and gate is not None else None
    gated, grads_of_products = gate is not None, two(grad_products)
    with on(x):
        hidden_gradients[by_rows(num_rows, num_experts, hidden_dim)](
            grad_y_RD, ends_e, gate_R, down, *two(products), hidden_RF, *grads_of_products, grad_gate_BR, **shape,
            ACTIVATION=activation,
        )  # fmt: skip
        row_products[by_rows(num_rows, num_experts, dim)](
            *grads_of_products, ends_e, up, or_any(gate, up), grad_x_RD, **shape,
            depth=hidden_dim, width=dim, stride_k=1, stride_n=hidden_dim, TWO=gated,
        )  # fmt: skip
        weight_gradients[by_weight(num_experts, dim, hidden_dim)](
            x, token_R, ends_e, *grads_of_products, grad_up, grad_gate, grad_up_bias, grad_gate_bias, **by_expert,
            height=dim, width=hidden_dim, INDEXED=token_R is not None, TWO=gated, BIASED=biased,
        )  # fmt: skip
        weight_gradients[by_weight(num_experts, hidden_dim, dim)](
            hidden_RF, None, ends_e, grad_y_RD, grad_y_RD, grad_down, None, None, None, **by_expert,
            height=hidden_dim, width=dim, INDEXED=False, TWO=False, BIASED=False,
        )  # fmt: skip

    def there(grad: Tensor | None) -> Tensor:
        return x.new_empty(0) if grad is None else grad

    grads_of_biases = there(grad_up_bias), there(grad_gate_bias)
    return grad_x_RD, grad_gate_BR.sum(0), grad_up, there(grad_gate), grad_down, *grads_of_biases


def probe(device: torch.device) -> bool:
    """Whether a small product comes out right on a device; nothing is tuned for it."""
    left = torch.arange(8 * 24, device=device, dtype=torch.float32).view(8, 24) % 7
    weight = torch.arange(2 * 24 * 40, device=device, dtype=torch.float32).view(2, 24, 40) % 5
    out = torch.full((8, 40), torch.nan, device=device)
    ends_e = torch.tensor([3, 6], device=device, dtype=torch.int32)  # and two rows of nobody
    shape = shape_of(8, 2, 24, 40)
    config = ONE_SUM[-1]
    with on(left):
        product_kernel[by_rows(8, 2, 40)](
            left, left, ends_e, weight, weight, out, **shape, depth=24, width=40, stride_k=40, stride_n=1, TWO=False,
            **config.all_kwargs(),
        )  # fmt: skip
    expected = torch.cat([left[:3] @ weight[0], left[3:6] @ weight[1], torch.zeros(2, 40, device=device)])
    return torch.equal(out, expected)


def num_products(gate: Tensor | None) -> int:
    """Products in front of an activation."""
    return 1 if gate is None else 2


def two(products: Tensor) -> tuple[Tensor, Tensor]:
    """The first and the last of one or two."""
    return products[0], products[-1]


def or_any(value: Tensor | None, other: Tensor) -> Tensor:
    """What stands for a matrix that a kernel computes places in and never loads."""
    return other if value is None else value


def shape_of(num_rows: int, num_experts: int, dim: int, hidden_dim: int) -> dict[str, Any]:
    """What kernels over rows know of the layer."""
    return {
        "num_rows": num_rows,
        "dim": dim,
        "hidden_dim": hidden_dim,
        "num_experts": num_experts,
        "rows_class": triton.next_power_of_2(num_rows // num_experts + 1),
        "EXPERTS": triton.next_power_of_2(num_experts + 1),
        "PRECISION": "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32",
    }


def by_rows(num_rows: int, num_experts: int, width: int) -> Any:
    """One program per tile of an output [R, width]; every expert, and the rest, may end in a tile of its own."""
    return lambda meta: (
        (num_rows // meta["BLOCK_M"] + num_experts + 1) * triton.cdiv(width, meta["BLOCK_N"]),
    )  # fmt: skip


def by_weight(num_experts: int, height: int, width: int) -> Any:
    """One program per tile of a stack of matrices."""
    return lambda meta: (num_experts * triton.cdiv(height, meta["BLOCK_M"]) * triton.cdiv(width, meta["BLOCK_N"]),)
