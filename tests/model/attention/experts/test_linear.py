"""Linear attention against its quadratic form, softmax, numbers, and what a chunk may not see."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from moedist.model.attention.experts.contract import RowNames, Sight
from moedist.model.attention.experts.linear import LinearConfig, LinearExpert
from moedist.model.random_features import log_positive_features
from tests.model.attention.experts.made import B, D, H, Largest, S, build, documents, edges, golden, random_mask, rows

FEATURES = pytest.mark.parametrize("features", ["elu", "favor"])


def number(value: object) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def close(got: Tensor, expected: Tensor, atol: float = 1e-12) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=atol)


def written_out(expert: LinearExpert, query: Tensor, key: Tensor, value: Tensor, sight: Sight) -> Tensor:
    """phi(q) phi(k)^T of all pairs, divided by its sums, without any scale taken out."""

    def heads(x: Tensor, matrix: Tensor) -> Tensor:
        return (x @ matrix.T).unflatten(2, (H, -1)).transpose(1, 2)

    def phi(x: Tensor) -> Tensor:
        if expert.directions_mh is None:
            return torch.nn.functional.elu(x) + 1
        return log_positive_features(x, expert.directions_mh).exp()

    products = phi(heads(query, expert.query)) @ phi(heads(key, expert.key)).transpose(2, 3)
    seen = sight.seen(query, key)
    products = products if seen is None else products * seen
    out = products / products.sum(3, keepdim=True).clamp_min(1e-300) @ heads(value, expert.value)
    return out.transpose(1, 2).flatten(2)


@FEATURES
@pytest.mark.parametrize("case", ["all", "padding", "causal", "documents", "documents both ways"])
@pytest.mark.parametrize("chunk", [1, 2, 4, 5, 100])
def test_R2_45_equals_the_quadratic_form(features: str, case: str, chunk: int):
    expert = build(LinearConfig(features=features, num_features=16, chunk=chunk))
    assert isinstance(expert, LinearExpert)
    sight = {
        "all": Sight(),
        "padding": Sight(key_valid_BS=documents().key_valid_BS),
        "causal": Sight(causal=True),
        "documents": documents(),
        "documents both ways": dataclasses.replace(documents(), causal=False),
    }[case]
    inputs = [rows(B, S, D, seed=n).requires_grad_() for n in range(3)]
    expected, got = written_out(expert, *inputs, sight), expert(*inputs, sight)
    shown = expert(*inputs, sight, need_weights=True)
    close(got.out_BQD, expected)
    close(shown.out_BQD, expected)
    tensors, weight = [*inputs, *expert.parameters()], rows(B, S, D, seed=5)
    for one, other in zip(
        torch.autograd.grad((got.out_BQD * weight).sum(), tensors),
        torch.autograd.grad((expected * weight).sum(), tensors),
        strict=True,
    ):
        close(one, other, 1e-11)


def test_golden_elu():
    numbers = golden()
    for case, inputs in (("elu", numbers), ("elu_by_hand", numbers["elu_by_hand"])):
        expert = build(LinearConfig(), dim=2, num_heads=1)
        with torch.no_grad():
            for matrix in (expert.query, expert.key, expert.value):
                matrix.copy_(torch.eye(2))
        shown = expert(*(number(inputs[key])[None] for key in "qkv"), Sight(), need_weights=True)
        close(shown.out_BQD[0], number(numbers[case]["out"]), 1e-9)
        if "weights" in numbers[case]:
            close(shown.weights_BHQS[0, 0], number(numbers[case]["weights"]), 1e-9)
        else:
            products = number(numbers[case]["products"])
            close(shown.weights_BHQS[0, 0, 0], products / products.sum(), 1e-9)


def test_D14_elu_features_are_positive_and_so_is_every_divisor():
    """Without the 1 that is added to elu, a divisor of -9 has been seen."""
    expert = build(LinearConfig())
    inputs = [-5 * rows(B, S, D, seed=n).abs() for n in range(3)]
    weights = expert(*inputs, Sight(causal=True), need_weights=True).weights_BHQS
    assert (weights >= 0).all()
    close(weights.sum(3), torch.ones(B, H, S).double())


def test_random_features_come_near_softmax():
    """Of inputs that are not large: the variance grows as exp(|q + k|^2)."""
    expert = build(LinearConfig(features="favor", num_features=2048), dim=16, num_heads=1)
    query, key, value = (rows(4, 32, 16, seed=n) / 2 for n in range(3))
    got = expert(query, key, value, Sight(causal=True)).out_BQD
    q, k, v = query @ expert.query.T, key @ expert.key.T, value @ expert.value.T
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert (got - expected).square().mean().sqrt() < 0.12 * expected.square().mean().sqrt()


@pytest.mark.parametrize("chunk", [3, 100])
def test_a_huge_later_key_does_not_reach_back_through_underflow(chunk: int):
    """One scale for the keys of a whole sequence would set all earlier features to zero."""
    expert = build(LinearConfig(features="favor", num_features=16, chunk=chunk), torch.float32)
    query, key, value = (rows(B, S, D, seed=n, dtype=torch.float32) for n in range(3))
    before = expert(query, key, value, Sight(causal=True)).out_BQD
    # The largest feature of a key far along a direction is exp(hundreds).
    assert isinstance(expert, LinearExpert) and expert.directions_mh is not None
    key[:, 7] = 60 * torch.linalg.lstsq(expert.key, expert.directions_mh[0].repeat(H)[:, None]).solution[:, 0]
    after = expert(query, key, value, Sight(causal=True))
    assert torch.equal(before[:, :7], after.out_BQD[:, :7]) and after.out_BQD.isfinite().all()


def test_padding_may_hold_anything():
    sight = documents()
    for features in ("elu", "favor"):
        expert = build(LinearConfig(features=features, num_features=16, chunk=4))
        query, key, value = (rows(B, S, D, seed=n) for n in range(3))
        before = expert(query, key, value, sight).out_BQD
        for x in (key, value):
            x[1, 7:] = 1e3
        assert torch.equal(before, expert(query, key, value, sight).out_BQD)


@FEATURES
def test_masks_are_refused_and_edges_left_aside(features: str):
    expert = build(LinearConfig(features=features))
    inputs = [rows(B, S, D, seed=n) for n in range(3)]
    with pytest.raises(ValueError, match=r"a mask of shape \[2, 3, 9, 9\] cannot be kept. Say causal, key_valid_BS"):
        expert(*inputs, Sight(mask_BHQS=random_mask()))
    assert torch.equal(expert(*inputs, Sight(edges=edges())).out_BQD, expert(*inputs, Sight()).out_BQD)


def names_of(step: int, expert: int = 0) -> RowNames:
    return RowNames(seed=1, step=torch.tensor(step), layer=0, expert=expert, sample_B=torch.arange(B))


def test_directions_are_a_saved_buffer_and_drawn_anew_by_the_name_of_step_and_expert():
    expert = build(LinearConfig(features="favor", num_features=16, redraw_every=10))
    assert "directions_mh" in expert.state_dict() and expert.num_parameters == 3 * D * D
    inputs = [rows(B, S, D, seed=n) for n in range(3)]

    def out(step: int, id_: int = 0) -> Tensor:
        return expert(*inputs, Sight(names=names_of(step, id_))).out_BQD

    assert torch.equal(out(10), out(19)) and not torch.equal(out(9), out(10))
    assert not torch.equal(out(10), out(10, 1))
    twin = build(LinearConfig(features="favor", num_features=16, redraw_every=10))
    assert torch.equal(twin(*inputs, Sight(names=names_of(13))).out_BQD, out(13))
    fixed = build(LinearConfig(features="favor", num_features=16))
    assert torch.equal(
        fixed(*inputs, Sight(names=names_of(0))).out_BQD, fixed(*inputs, Sight(names=names_of(99))).out_BQD
    )


@FEATURES
@pytest.mark.parametrize("causal", [False, True])
def test_cost_grows_with_the_length_and_no_tensor_with_its_square(features: str, causal: bool):
    expert = build(LinearConfig(features=features, num_features=16, chunk=16), torch.float32)
    flops = []
    for length in (256, 512):
        x = rows(1, length, D, dtype=torch.float32)
        with Largest() as seen, FlopCounterMode(display=False) as counter, torch.no_grad():
            expert(x, x, x, Sight(causal=causal))
        flops.append(counter.get_total_flops())
        assert seen.numel <= length * 16 * 16
    assert flops[1] == 2 * flops[0]
    if causal:
        # What is counted leaves out half of the products within a chunk, which causality hides.
        width, num = D // H, 16 if features == "favor" else D // H
        hidden = 2 * H * (num + width + 1) * 16 / 2
        assert flops[1] == 512 * (2 * expert.num_parameters + expert.score_flops(512) + hidden)


def test_single_precision_holds_over_long_sequences():
    exact, single = (build(LinearConfig(chunk=64), dtype) for dtype in (torch.float64, torch.float32))
    single.load_state_dict(exact.state_dict())
    inputs = [rows(1, 2000, D, seed=n) for n in range(3)]
    expected = exact(*inputs, Sight(causal=True)).out_BQD
    close(single(*(x.float() for x in inputs), Sight(causal=True)).out_BQD.double(), expected, 2e-5)


@FEATURES
def test_causal_rows_at_places_behind_the_last_key_see_all_keys(features: str):
    """In cross attention of more queries than keys, rows in any order, as a mixture hands them over."""
    expert = build(LinearConfig(features=features, num_features=16, chunk=2))
    query, key = rows(B, S + 7, D, seed=1), rows(B, S, D, seed=2)
    row_BR = torch.tensor([S + 6, 0, S, 3, S + 2, S - 1]).expand(B, -1)
    taken = query.gather(1, row_BR[:, :, None].expand(-1, -1, D))
    sight = Sight(causal=True).of_rows(row_BR, torch.ones_like(row_BR, dtype=torch.bool), query.shape[1])
    whole = written_out(expert, query, key, key, Sight(causal=True))
    close(expert(taken, key, key, sight).out_BQD, whole.gather(1, row_BR[:, :, None].expand(-1, -1, D)))
