"""What holds for every kind of attention expert."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest
import torch
from torch import Tensor

from moedist.config import ConfigError
from moedist.launch.choices import list_choices
from moedist.launch.decode import decode
from moedist.model.attention.experts.contract import (
    AttentionExpertConfig,
    ExpertSite,
    RowNames,
    Sight,
    SparseEdges,
)
from moedist.model.attention.experts.edge_featured import EdgeFeaturedConfig
from moedist.model.attention.experts.hyperbolic import HyperbolicConfig
from moedist.model.attention.experts.linear import LinearConfig
from moedist.model.attention.experts.standard import StandardConfig
from moedist.moe.init import named_draw
from tests.model.attention.experts.made import (
    EDGED,
    KINDS,
    MASKED,
    B,
    D,
    E,
    H,
    S,
    build,
    documents,
    edges,
    random_mask,
    rows,
)

EVERY = pytest.mark.parametrize("name", list(KINDS))


def sight_of(name: str, sight: Sight) -> Sight:
    """With edges where the kind has a use for them."""
    return dataclasses.replace(sight, edges=edges()) if name in EDGED else sight


def close(got: Tensor, expected: Tensor, atol: float = 1e-12) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=atol)


def test_R2_02_the_four_kinds_have_their_names():
    found = list_choices(AttentionExpertConfig)
    assert set(found) == {"standard", "hyperbolic", "linear", "edge_featured"}
    for kind, config in found.items():
        assert config.kind == kind and decode(config, {}) == config()


@pytest.mark.requirement("R2-43", "R2-44", "R2-45", "R2-46", "C25")
def test_numbers_of_parameters():
    matrices, h = 3 * D * D, D // H
    counts = {
        "standard": matrices,
        "geodesic": matrices + H + 1,
        "squared_lorentz": matrices + H + 1,
        "elu": matrices,
        "favor": matrices,
        "key_value": matrices + D * E,
        "bias": matrices + H * E,
        "gated": matrices + 2 * H * E + 2 * H,
        "gatv2": 2 * D * D + D * E + H * h,
    }
    for name, count in counts.items():
        expert = build(name)
        assert (expert.num_parameters, expert.output_dim) == (count, D), name
    full = [config.build(ExpertSite(512, 8, device="meta")).num_parameters for config in KINDS.values()]
    assert full[0] == 786_432 and full[3] == 786_432


@EVERY
@pytest.mark.parametrize("case", ["all", "causal", "documents", "mask", "additive"])
def test_some_rows_get_what_they_get_among_all_and_so_do_their_gradients(name: str, case: str):
    if case in ("mask", "additive") and name not in MASKED:
        return
    additive = rows(1, H, S, S, seed=4).masked_fill(~random_mask()[:1], -torch.inf)
    sights = {
        "all": Sight(),
        "causal": Sight(causal=True),
        "documents": documents(),
        "mask": Sight(mask_BHQS=random_mask()),
        "additive": Sight(mask_BHQS=additive),
    }
    expert, sight = build(name), sight_of(name, sights[case])
    # More rows than a chunk of the linear kinds; the last of the second sequence only fills up, and stands there twice.
    row_BR = torch.tensor([[4, 1, 8, 6, 0], [0, 3, 5, 2, 3]])
    live_BR = torch.tensor([[True] * 5, [True] * 4 + [False]])
    index_BRD = row_BR[:, :, None].expand(-1, -1, D)
    weight_BRD = rows(B, 5, D, seed=5) * live_BR[:, :, None]

    def gradients(routed: bool) -> tuple[Tensor, list[Tensor]]:
        inputs = [rows(B, S, D, seed=n).requires_grad_() for n in range(3)]
        if routed:
            some = inputs[0].gather(1, index_BRD)
            out_BRD = expert(some, *inputs[1:], sight.of_rows(row_BR, live_BR, S)).out_BQD
        else:
            out_BRD = expert(*inputs, sight).out_BQD.gather(1, index_BRD)
        grads = torch.autograd.grad((out_BRD * weight_BRD).sum(), [*inputs, *expert.parameters()])
        return out_BRD, list(grads)

    (some, some_grads), (among, all_grads) = gradients(True), gradients(False)
    close(some * live_BR[:, :, None], among * live_BR[:, :, None])
    for one, other in zip(some_grads, all_grads, strict=True):
        close(one, other)


@EVERY
def test_documents_are_as_if_alone_and_padding_is_not_there(name: str):
    expert, sight = build(name), documents()
    query, key, value = (rows(B, S, D, seed=n) for n in range(3))
    edge = edges()
    whole = expert(query, key, value, dataclasses.replace(sight, edges=edge if name in EDGED else None)).out_BQD
    assert sight.document_BS is not None and sight.key_valid_BS is not None
    for row in range(B):
        for document in sight.document_BS[row].unique():
            place = ((sight.document_BS[row] == document) & sight.key_valid_BS[row]).nonzero()[:, 0]
            own = edge[row, place][None, :, place] if name in EDGED else None
            alone = expert(*(x[row, place][None] for x in (query, key, value)), Sight(causal=True, edges=own)).out_BQD
            close(whole[row, place], alone[0])


@EVERY
def test_documents_that_see_both_ways_are_as_if_alone(name: str):
    expert, sight = build(name), sight_of(name, dataclasses.replace(documents(), causal=False))
    query, key, value = (rows(B, S, D, seed=n) for n in range(3))
    whole = expert(query, key, value, sight).out_BQD
    own = edges()[:1, 5:7, 5:7] if name in EDGED else None
    alone = expert(query[:1, 5:7], key[:1, 5:7], value[:1, 5:7], Sight(edges=own)).out_BQD
    close(whole[0, 5:7], alone[0])


@EVERY
def test_nothing_depends_on_later_keys_where_attention_is_causal(name: str):
    expert, sight = build(name), sight_of(name, Sight(causal=True))
    query, key, value = (rows(B, S, D, seed=n) for n in range(3))
    before = expert(query, key, value, sight).out_BQD
    key[:, 6:], value[:, 6:] = 40 * rows(B, S - 6, D, seed=8), -value[:, 6:]
    after = expert(query, key, value, sight).out_BQD
    assert torch.equal(before[:, :6], after[:, :6])
    assert not torch.allclose(before[:, 6:], after[:, 6:])


@EVERY
def test_keys_have_no_order_and_constants_added_to_all_scores_no_effect(name: str):
    expert = build(name)
    query, key, value = (rows(B, S, D, seed=n) for n in range(3))
    order = torch.randperm(S, generator=torch.Generator().manual_seed(0))
    edge = edges()
    straight = expert(query, key, value, Sight(edges=edge)).out_BQD
    close(expert(query, key[:, order], value[:, order], Sight(edges=edge[:, :, order])).out_BQD, straight)
    if name in MASKED:
        added = torch.full((1, 1, S, S), 2.5, dtype=torch.float64)
        close(expert(query, key, value, Sight(mask_BHQS=added, edges=edge)).out_BQD, straight)


@EVERY
@pytest.mark.parametrize("case", ["mask", "documents"])
def test_a_query_that_sees_nothing_gets_zero_and_no_gradient_is_nan(name: str, case: str):
    expert = build(name)
    if case == "mask" and name not in MASKED:
        sight = Sight(key_valid_BS=torch.tensor([[False] * S, [True] * S]))
        blind = torch.tensor([[True] * S, [False] * S])
    elif case == "mask":
        sight = Sight(mask_BHQS=random_mask())
        blind = ~random_mask().any(3).any(1)
    else:
        sight = dataclasses.replace(documents(), document_BS=torch.arange(B * S).view(B, S))
        assert sight.key_valid_BS is not None
        blind = ~sight.key_valid_BS
    assert blind.any()
    sight = sight_of(name, sight)
    for need_weights in (False, True):
        inputs = [rows(B, S, D, seed=n).requires_grad_() for n in range(3)]
        attended = expert(*inputs, sight, need_weights=need_weights)
        assert not attended.out_BQD[blind].any() and attended.out_BQD.isfinite().all()
        grads = torch.autograd.grad(attended.out_BQD.square().sum(), [*inputs, *expert.parameters()])
        assert all(grad.isfinite().all() for grad in grads)
        assert not grads[0][blind].any()


@EVERY
@pytest.mark.parametrize("case", ["all", "documents", "causal"])
def test_weights_are_shown_on_request_and_sum_to_one(name: str, case: str):
    expert = build(name)
    sight = sight_of(name, {"all": Sight(), "causal": Sight(causal=True), "documents": documents()}[case])
    inputs = [rows(B, S, D, seed=n) for n in range(3)]
    plain, shown = expert(*inputs, sight), expert(*inputs, sight, need_weights=True)
    assert plain.weights_BHQS is None and shown.weights_BHQS is not None
    close(plain.out_BQD, shown.out_BQD)
    assert shown.weights_BHQS.shape == (B, H, S, S) and (shown.weights_BHQS >= 0).all()
    if name != "gated":
        total = shown.weights_BHQS.sum(3)
        assert (total.lt(1 + 1e-12) & (total.gt(1 - 1e-12) | total.eq(0))).all()
    seen = sight.seen(*inputs[:2])
    assert seen is None or not shown.weights_BHQS.masked_fill(seen, 0).any()


@EVERY
def test_gradients_are_those_of_differences(name: str):
    expert, sight = build(name), documents()
    small = dataclasses.replace(
        sight,
        document_BS=sight.document_BS[:, 3:8],
        key_valid_BS=sight.key_valid_BS[:, 3:8],
        edges=edges(5, 5) if name in EDGED else None,
    )
    names = [key for key, _ in expert.named_parameters()]

    def run(query: Tensor, key: Tensor, value: Tensor, *parameters: Tensor) -> Tensor:
        called = torch.func.functional_call(
            expert, dict(zip(names, parameters, strict=True)), (query, key, value, small)
        )
        return called.out_BQD

    inputs = [rows(B, 5, D, seed=n).requires_grad_() for n in range(3)]
    assert torch.autograd.gradcheck(run, (*inputs, *expert.parameters()), atol=1e-6, fast_mode=True)


@EVERY
@pytest.mark.parametrize("sizes", [(0, S), (S, 0), (0, 0)])
def test_parameters_without_anything_to_do_get_zero_gradients(name: str, sizes: tuple[int, int]):
    expert = build(name)
    query, key = (rows(B, size, D) for size in sizes)
    attended = expert(query, key, key, Sight())
    assert attended.out_BQD.shape == (B, sizes[0], D) and not attended.out_BQD.any()
    attended.out_BQD.sum().backward()
    for key_, parameter in expert.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), key_


@pytest.mark.parametrize("name", EDGED)
def test_edges_that_are_not_there_leave_zero_gradients(name: str):
    expert = build(name)
    expert(*(rows(B, S, D, seed=n) for n in range(3)), Sight()).out_BQD.sum().backward()
    for key, parameter in expert.named_parameters():
        assert parameter.grad is not None, key
        assert not (key.startswith("edge") and parameter.grad.any()), key


@EVERY
def test_first_values_depend_on_the_name_alone(name: str):
    one, other, third = (KINDS[name].build(ExpertSite(D, H)) for _ in range(3))
    for expert, prefix in ((one, "experts.3"), (other, "experts.3"), (third, "experts.4")):
        expert.init_weights(named_draw(0, prefix))
    for key, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[key])
    assert not torch.equal(one.query, third.query)
    bound = (6 / (2 * D)) ** 0.5
    assert 0.8 * bound < one.query.abs().max() <= bound


@pytest.mark.requirement("R2-04")
@EVERY
def test_can_be_copied_and_sent(name: str):
    expert = build(name)
    inputs = [rows(B, S, D, seed=n) for n in range(3)]
    expected = expert(*inputs, Sight()).out_BQD
    for twin in (copy.deepcopy(expert), pickle.loads(pickle.dumps(expert))):
        assert torch.equal(twin(*inputs, Sight()).out_BQD, expected)


@EVERY
def test_single_precision_and_autocast_stay_near_double(name: str):
    exact, single = build(name), build(name, torch.float32)
    single.load_state_dict(exact.state_dict())
    inputs = [rows(B, S, D, seed=n) for n in range(3)]
    sight = sight_of(name, Sight(causal=True))
    expected = exact(*inputs, sight).out_BQD
    narrow = [x.float().requires_grad_() for x in inputs]
    sight = dataclasses.replace(sight, edges=None if sight.edges is None else sight.edges.float())
    torch.testing.assert_close(single(*narrow, sight).out_BQD.double(), expected, rtol=0, atol=2e-5)
    with torch.autocast("cpu", torch.bfloat16):
        out = single(*narrow, sight).out_BQD
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=0.1)
    out.float().sum().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in [*narrow, *single.parameters()])


def names_of(step: int = 3, expert: int = 2) -> RowNames:
    return RowNames(seed=1, step=torch.tensor(step), layer=4, expert=expert, sample_B=torch.tensor([10, 11]))


@pytest.mark.requirement("R2-26")
@EVERY
def test_dropout_is_drawn_by_name_keeps_the_mean_and_ends_with_training(name: str):
    expert = build(name, dropout=0.5)
    inputs = [rows(B, S, D, seed=n) for n in range(3)]
    sight = sight_of(name, Sight(names=names_of()))
    first, second = (expert(*inputs, sight, need_weights=True) for _ in range(2))
    assert torch.equal(first.out_BQD, second.out_BQD)
    unlike = expert(*inputs, dataclasses.replace(sight, names=names_of(expert=3)), need_weights=True)
    assert not torch.equal(first.out_BQD, unlike.out_BQD)
    # A row drops the same wherever it stands, and whoever else is there.
    row_BR = torch.tensor([[7, 2], [0, 8]])
    index = row_BR[:, :, None].expand(-1, -1, D)
    some = expert(inputs[0].gather(1, index), *inputs[1:], sight.of_rows(row_BR, row_BR >= 0, S))
    close(some.out_BQD, first.out_BQD.gather(1, index))
    expert.eval()
    whole = expert(*inputs, sight, need_weights=True)
    expert.train()
    ratio = first.weights_BHQS / whole.weights_BHQS
    assert ((ratio - 2).abs() < 1e-9).logical_or(ratio == 0).all()
    kept = torch.stack(
        [
            expert(*inputs, dataclasses.replace(sight, names=names_of(step)), need_weights=True).weights_BHQS.gt(0)
            for step in range(40)
        ]
    )
    assert 0.45 < kept.double().mean() < 0.55
    without_names = expert(*inputs, dataclasses.replace(sight, names=None)).out_BQD
    assert without_names.isfinite().all()


ROTARY = {
    "standard": StandardConfig(rope_theta=100.0),
    "geodesic": HyperbolicConfig(rope_theta=100.0),
    "squared_lorentz": HyperbolicConfig(rope_theta=100.0, score="squared_lorentz"),
    "favor": LinearConfig(features="favor", rope_theta=100.0, num_features=4096),
    "bias": EdgeFeaturedConfig(edge_dim=E, mode="bias", rope_theta=100.0),
    "gated": EdgeFeaturedConfig(edge_dim=E, mode="gated", rope_theta=100.0),
}


@pytest.mark.parametrize("name", list(ROTARY))
def test_rotary_positions_are_relative(name: str):
    expert = build(ROTARY[name])
    inputs = [rows(B, S, D, seed=n) / 2 for n in range(3)]
    edge = edges()
    early = expert(*inputs, Sight(edges=edge)).out_BQD
    moved = [torch.cat([rows(B, 4, D, seed=20 + n), x], 1) for n, x in enumerate(inputs)]
    valid = torch.arange(S + 4).ge(4).expand(B, -1)
    padded = torch.zeros(B, S + 4, S + 4, E, dtype=torch.float64)
    padded[:, 4:, 4:] = edge
    late = expert(*moved, Sight(key_valid_BS=valid, edges=padded)).out_BQD[:, 4:]
    # Angles are fp32. Random features are not themselves invariant under rotation; what they estimate is.
    close(late, early, 0.05 if name == "favor" else 1e-6)
    swapped = [x[:, [1, 0, *range(2, S)]] for x in inputs[1:]]
    assert not torch.allclose(expert(inputs[0], *swapped, Sight(edges=edge)).out_BQD, early)


GROUPED = {
    "standard": StandardConfig(num_kv_heads=1),
    "geodesic": HyperbolicConfig(num_kv_heads=1),
    "elu": LinearConfig(num_kv_heads=1, chunk=4),
    "key_value": EdgeFeaturedConfig(edge_dim=E, num_kv_heads=1),
}


@pytest.mark.parametrize("name", list(GROUPED))
def test_grouped_heads_are_repeated_ones(name: str):
    grouped, full = build(GROUPED[name]), build(dataclasses.replace(GROUPED[name], num_kv_heads=None))
    with torch.no_grad():
        for key, value in full.named_parameters():
            own = grouped.get_parameter(key)
            value.copy_(own.repeat(H, 1) if key in ("key", "value") else own)
    inputs = [rows(B, S, D, seed=n) for n in range(3)]
    sight = sight_of(name, documents())
    close(grouped(*inputs, sight).out_BQD, full(*inputs, sight).out_BQD)
    assert grouped.num_parameters == full.num_parameters - 2 * D * (D - D // H)


@pytest.mark.parametrize("config", [StandardConfig(qk_norm=True), EdgeFeaturedConfig(edge_dim=E, qk_norm=True)])
def test_norms_make_scores_independent_of_the_scale_of_queries_and_keys(config: AttentionExpertConfig):
    expert = build(config)
    query, key, value = (rows(B, S, D, seed=n) for n in range(3))
    close(expert(5 * query, 3 * key, value, Sight()).out_BQD, expert(query, key, value, Sight()).out_BQD, 1e-5)


REFUSED = [
    (HyperbolicConfig, {"qk_norm": True}, "qk_norm = True cannot be had with hyperbolic attention: norms put all"),
    (LinearConfig, {"rope_theta": 1e4}, r"rope_theta = 10000.0 cannot be had with linear attention: elu\(x\)"),
    (LinearConfig, {"redraw_every": 5}, "redraw_every = 5 cannot be had with linear attention"),
    (EdgeFeaturedConfig, {"rope_theta": 1e4}, "rope_theta = 10000.0 cannot be had with edge_featured attention: what"),
    (EdgeFeaturedConfig, {"mode": "gatv2", "rope_theta": 1e4}, "rope_theta = 10000.0 cannot be had with edge_featured"),
    (EdgeFeaturedConfig, {"mode": "gatv2", "num_kv_heads": 2}, "num_kv_heads = 2 cannot be had with edge_featured"),
    (EdgeFeaturedConfig, {"mode": "gatv2", "qk_norm": True}, "qk_norm = True cannot be had with edge_featured"),
    (EdgeFeaturedConfig, {"edge_dim": 0}, "edge_dim = 0 is no width"),
    (HyperbolicConfig, {"curvature": 0.5}, "curvature = 0.5 is no curvature of a hyperbolic space"),
    (HyperbolicConfig, {"curvature": 0.0}, "curvature = 0.0 is no curvature"),
    (HyperbolicConfig, {"max_radius": 40.0}, "max_radius = 40.0 is not above 0, or so large"),
    (StandardConfig, {"num_kv_heads": 0}, "num_kv_heads = 0 is too small"),
    (StandardConfig, {"rope_theta": -1.0}, "rope_theta = -1.0 is not above 0"),
]


@pytest.mark.parametrize(("config", "keys", "message"), REFUSED)
def test_what_has_no_meaning_in_a_kind_is_refused_by_name(config: type, keys: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        config(**keys)


def test_heads_that_cannot_be_shared_or_turned_are_refused():
    with pytest.raises(ConfigError, match="num_kv_heads = 2 does not divide num_heads = 3"):
        build(StandardConfig(num_kv_heads=2))
    with pytest.raises(
        ConfigError, match="rope_theta = 100.0 turns the dims of a head in pairs, and dim / num_heads = 3"
    ):
        build(StandardConfig(rope_theta=100.0), num_heads=4)


@pytest.mark.parametrize("name", EDGED)
def test_edges_of_another_shape_are_refused_with_the_numbers(name: str):
    expert = build(name)
    inputs = [rows(B, S, D, seed=n) for n in range(3)]
    with pytest.raises(ValueError, match=r"shape \[2, 9, 8, 5\], and 9 queries and 9 keys .* need \[2, 9, 9, 5\]"):
        expert(*inputs, Sight(edges=edges(S, S - 1)))
    pair = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"shape \[1, 4\], .* edge_dim = 5 need \[1, 5\]"):
        expert(*inputs, Sight(edges=SparseEdges(pair, pair, pair, rows(1, 4))))
