"""n ranks equal one device: every router x capacity group x policy x factor x dispatcher x experts, dropping on."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import re
import warnings
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import pytest
import torch

from moedist.moe.balance.bias import BiasConfig
from moedist.moe.balance.importance import ImportanceConfig
from moedist.moe.balance.load import LoadConfig
from moedist.moe.balance.quantile import QuantileConfig
from moedist.moe.balance.switch import SwitchConfig
from moedist.moe.balance.z_loss import ZLossConfig
from moedist.moe.capacity import CapacityConfig
from moedist.moe.dispatch.all_to_all import AllToAllConfig
from moedist.moe.dispatch.padded import PaddedConfig
from moedist.moe.dispatch.rows import Reorder
from moedist.moe.experts.grouped import GroupedConfig
from moedist.moe.experts.loop import LoopConfig
from moedist.moe.layer import MoEConfig
from moedist.moe.router.cosine import CosineConfig
from moedist.moe.router.expert_choice import ExpertChoiceConfig
from moedist.moe.router.forced import ForcedConfig
from moedist.moe.router.hash import HashConfig
from moedist.moe.router.mlp import MLPConfig
from moedist.moe.router.noisy import NoisyConfig
from moedist.moe.router.sinkhorn import SinkhornConfig
from moedist.moe.router.topk import TopKConfig
from moedist.moe.token_choice import GroupLimit
from tests.parity import HIDDEN, NUM_EXPERTS, SCENES, Scene, compare, counted_bytes, many_ranks, one_device
from tests.ranks import Here

LAYOUTS = [*(pytest.param(*layout, marks=pytest.mark.slow) for layout in ((2, 2), (4, 1), (4, 4))), (4, 2)]
ROUTERS = (TopKConfig(top_k=1), TopKConfig(top_k=2), TopKConfig(top_k=3, noise_std=0.5, renormalize=False))
FACTORS = (0.5, 1.0, 1.25, None)
POLICIES = ("probability", "choice", "token", "random")


def cases() -> Iterator[tuple[MoEConfig, Scene]]:
    """The whole product of router, group, policy, factor, dispatcher and experts. What has few values of its own takes
    turns: scene, activation and bias, balance scope, rescaling, shared expert."""
    kinds = itertools.cycle(
        [
            ("swiglu", False, None),
            ("gelu", True, None),
            ("relu", True, 6),
            ("swiglu", True, None),
            ("relu", False, None),
        ]
    )
    scopes = itertools.cycle(("global", "micro_batch", "sequence"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # factors below 1 are the point here
        product = itertools.product(ROUTERS, ("rank", "sequence"), POLICIES, FACTORS)
        for number, (router, group, policy, factor) in enumerate(product):
            if factor is None and (group, policy) != ("rank", "token"):
                continue  # dropless has neither
            activation, bias, shared = next(kinds)
            switch = SwitchConfig(0.3, next(scopes))
            computed = itertools.product((AllToAllConfig(), PaddedConfig()), (LoopConfig, GroupedConfig))
            for turn, (dispatch, experts) in enumerate(computed):
                config = MoEConfig(
                    num_experts=NUM_EXPERTS,
                    router=router,
                    capacity=CapacityConfig(
                        factor=factor, group=group, drop_policy=policy, renormalize_after_drop=number % 3 > 0
                    ),
                    dispatch=dispatch,
                    experts=experts(hidden_dim=HIDDEN, activation=activation, bias=bias),
                    balance={"switch": switch, "z_loss": ZLossConfig(0.2)},
                    shared_hidden_dim=shared,
                )
                # Of the four ways to compute a plan two meet either scene, and every way meets both over the plans.
                yield config, SCENES[(number + turn + turn // 2) % 2]


ROUTERS_OF_THE_FIELD = {
    "deepseek": TopKConfig(
        top_k=2, score="sigmoid", renormalize=True, scale=2.5, bias=True, groups=GroupLimit(num_groups=4, top_groups=2)
    ),
    "groups by max": TopKConfig(
        top_k=3, score="sqrt_softplus", noise_std=0.3, groups=GroupLimit(num_groups=2, top_groups=1, score="max")
    ),
    "jitter": TopKConfig(top_k=2, input_jitter=0.1),
    "dense": TopKConfig(mode="dense"),
    "noisy": NoisyConfig(top_k=2),
    "mlp": MLPConfig(top_k=2, hidden_dim=6, temperature=2.0, final_temperature=0.5, temperature_steps=10),
    "cosine": CosineConfig(top_k=2),
    "hash": HashConfig(top_k=2),
    "sinkhorn": SinkhornConfig(top_k=2),
    "expert choice": ExpertChoiceConfig(),
    "forced": ForcedConfig(top_k=2, pattern="zipf"),
}
SCOPES = ("global", "micro_batch", "sequence")
OVERFLOWS = ("drop", "next_best", None)


def cases_of_the_field() -> Iterator[tuple[MoEConfig, Scene]]:
    """Every router x dispatcher x what becomes of pairs at a full expert (None: no expert is ever full); scopes,
    policies, rescaling, scenes and experts take turns."""
    experts = (LoopConfig(hidden_dim=HIDDEN, bias=True), GroupedConfig(hidden_dim=HIDDEN))
    policies = itertools.cycle(("token", "gate", "probability", "choice", "random"))
    rescales = itertools.cycle((True, "one", False))
    turn = 0
    for name, router in ROUTERS_OF_THE_FIELD.items():
        for overflow, dispatch in itertools.product(OVERFLOWS, (AllToAllConfig(), PaddedConfig())):
            if name == "expert choice" and overflow is not None:
                continue  # refused: it has its own capacity
            turn += 1
            scopes = [SCOPES[(turn + turn // 3 + part) % 3] for part in range(3)]
            first = "all" if name == "expert choice" else "first"
            balance = {
                "switch": SwitchConfig(0.3, scopes[0], first),
                "importance": ImportanceConfig(0.2, scopes[1]),
                "z_loss": ZLossConfig(0.2),
            }
            if name == "noisy":
                balance["load"] = LoadConfig(0.4, scopes[2])
            if name == "deepseek":
                balance["bias"] = BiasConfig()
            if name == "groups by max":
                balance["quantile"] = QuantileConfig()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a factor below 1 is the point here
                capacity = CapacityConfig(
                    factor=None if overflow is None else 0.75,
                    group=("rank", "sequence")[turn // 3 % 2],
                    drop_policy=next(policies),
                    overflow=overflow or "drop",
                    renormalize_after_drop=next(rescales),
                )
            yield (
                MoEConfig(
                    num_experts=NUM_EXPERTS,
                    router=router,
                    capacity=capacity,
                    dispatch=dispatch,
                    experts=experts[turn // 2 % 2],
                    balance=balance,
                ),
                SCENES[(turn + turn // 4) % 2],
            )


def cases_of_the_field_hold(here: Here, ep: int) -> dict[str, Any]:
    """Every case on this rank: the worst difference, and the pairs that each router and overflow dropped."""
    mesh = here.mesh_of(ep)
    worst, dropped = 0.0, {}
    for config, scene in cases_of_the_field():
        expected = one_device(config, scene, here.world)
        try:
            worst = max(worst, compare(many_ranks(config, scene, mesh), expected))
        except AssertionError as error:
            raise AssertionError(f"{error} in scene {scene.name}: {config}") from error
        key = (config.router.kind, None if config.capacity.dropless else config.capacity.overflow)
        asked = sum(int(scene.valid_T(rank).sum()) for rank in range(here.world))
        asked *= config.router.experts_per_token(NUM_EXPERTS)
        dropped[key] = dropped.get(key, 0) + asked - int(expected.kept_E.sum())
    return {"worst": worst, "dropped": dropped}


@pytest.mark.parametrize(("world", "ep"), LAYOUTS)
def test_every_router_on_ranks_equals_one_device(ranks, world, ep):
    for result in ranks(world).run(cases_of_the_field_hold, ep, limit_s=300):
        assert result["worst"] <= 1e-12
        dropped = result["dropped"]
        kinds = {kind for kind, _ in dropped} - {"expert_choice"}  # its average is no count
        assert all(dropped[kind, "drop"] > 0 and dropped[kind, None] == 0 for kind in kinds)
        # Limits are rounded up, so that a short sequence may have room for all that overflow sends on.
        assert 0 < sum(dropped[kind, "next_best"] for kind in kinds) < sum(dropped[kind, "drop"] for kind in kinds)


def gradients_at_each_ep(here: Here) -> int:
    """Every router x policy, dropping on: EP 2 or 4, in turn as overflow, against EP 1 of the same ranks, outputs and
    every gradient. Returns the number of cases."""
    number = 0
    for (name, router), policy in itertools.product(ROUTERS_OF_THE_FIELD.items(), (*POLICIES, "gate")):
        number += 1
        capacity = CapacityConfig(factor=1.0, drop_policy=policy, overflow=OVERFLOWS[number % 2])
        config = MoEConfig(
            num_experts=NUM_EXPERTS,
            router=router,
            capacity=capacity.without_limit() if router.has_own_capacity else capacity,
            experts=LoopConfig(hidden_dim=HIDDEN),
            balance={"switch": SwitchConfig(0.3), "z_loss": ZLossConfig(0.2)},
        )
        scene = SCENES[number // 2 % 2]
        expected = many_ranks(config, scene, here.mesh_of(1))
        ep = (2, 4)[number // 4 % 2]
        try:
            compare(many_ranks(config, scene, here.mesh_of(ep)), expected)
        except AssertionError as error:
            raise AssertionError(f"{error} at EP {ep}: {name}, {policy}, scene {scene.name}") from error
    return number


def test_gradients_of_every_router_and_policy_do_not_depend_on_ep(ranks):
    assert set(ranks(4).run(gradients_at_each_ep, limit_s=300)) == {len(ROUTERS_OF_THE_FIELD) * 5}


def all_cases_hold(here: Here, ep: int, sevenths: Sequence[int]) -> dict[str, Any]:
    """A share of the cases on this rank; the worst difference, pairs that were dropped and bytes that crossed ranks."""
    mesh = here.mesh_of(ep)
    worst, dropped, sent, number = 0.0, 0, 0, 0
    reference_of: dict[Any, Any] = {}
    for place, (config, scene) in enumerate(cases()):
        if place % 7 not in sevenths:
            continue
        number += 1
        key = (config.router, config.capacity)
        if key not in reference_of:
            reference_of = {key: {scene: one_device(config, scene, here.world) for scene in SCENES}}
        expected = reference_of[key][scene]
        with counted_bytes() as moved:
            got = many_ranks(config, scene, mesh)
        try:
            worst = max(worst, compare(got, expected))
        except AssertionError as error:
            raise AssertionError(f"{error} in scene {scene.name}: {config}") from error
        asked = sum(int(scene.valid_T(rank).sum()) for rank in range(here.world)) * config.router.top_k
        dropped += asked - int(expected.kept_E.sum())
        sent += sum(moved)
    return {"worst": worst, "dropped": dropped, "sent": sent, "cases": number}


# Sevenths, because no option of `cases` comes round after seven: so each share has all values of each.
WHOLE, SOME, OTHERS = range(7), (0,), (5,)


@pytest.mark.requirement("R3-19", "R0-35")
@pytest.mark.parametrize(
    ("world", "ep", "sevenths"),
    [
        (4, 2, SOME),
        (4, 4, OTHERS),
        *(pytest.param(*layout, WHOLE, marks=pytest.mark.slow) for layout in ((2, 2), (4, 1), (4, 2), (4, 4))),
    ],
)
def test_ranks_equal_one_device(ranks, world: int, ep: int, sevenths: Sequence[int]):
    results = ranks(world).run(all_cases_hold, ep, sevenths, limit_s=300)
    for result in results:
        assert result["cases"] == sum(place % 7 in sevenths for place in range(3 * (2 * 4 * 3 + 1) * 4))
        assert result["worst"] <= 1e-12
        assert result["dropped"] > 10 * result["cases"], "the suite must run with dropping on"
        assert (result["sent"] > 0) == (ep > 1), "expert parallelism must move rows, and one rank must not"


CONFIG = MoEConfig(
    num_experts=NUM_EXPERTS,
    router=TopKConfig(top_k=2),
    capacity=CapacityConfig(factor=1.0),
    experts=LoopConfig(hidden_dim=HIDDEN),
    balance={"switch": SwitchConfig(0.3), "z_loss": ZLossConfig(0.2)},
)


def faulty(here: Here, fault: str | None) -> str:
    """One case with a planted fault; what the comparison says of it, empty where it sees nothing."""
    scene = Scene("uneven")
    expected = one_device(CONFIG, scene, here.world)
    with plant(fault) if fault else contextlib.nullcontext():
        got = many_ranks(CONFIG, scene, here.mesh_of(2))
    try:
        compare(got, expected)
    except AssertionError as error:
        return str(error)
    return ""


def plant(fault: str) -> Any:
    """The faults that public projects had."""
    if fault == "wrong divisor":  # each expert's gradient already holds the tokens of all its ranks
        from moedist.parallel.gradients import GradientTable

        real_sum = GradientTable.sum_copies

        def divided(self: GradientTable, model: torch.nn.Module) -> None:
            real_sum(self, model)
            for name, parameter in model.named_parameters():
                if self.spread_of[name].role == "experts":
                    parameter.grad = parameter.grad / 2

        return mock.patch.object(GradientTable, "sum_copies", divided)
    if fault == "counts after the drop":
        from moedist.moe.layer import MoE

        real_report = MoE.report

        def after(self: MoE, routing: Any, plan: Any, ctx: Any) -> Any:
            return real_report(self, dataclasses.replace(routing, live_N=plan.slot_N >= 0), plan, ctx)

        return mock.patch.object(MoE, "report", after)
    assert fault == "missing un-permute"
    from moedist.moe.dispatch import all_to_all

    class Half:
        """Reorders rows on their way to the experts and not on their way back."""

        count = 0

        @classmethod
        def apply(cls, x: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
            cls.count += 1
            return x if cls.count == 3 else Reorder.apply(x, order, inverse)

    return mock.patch.object(all_to_all, "Reorder", Half)


@pytest.mark.parametrize(
    ("fault", "seen"),
    [
        ("wrong divisor", "grad bank.experts"),
        ("counts after the drop", "differs by|switch .* is not"),
        ("missing un-permute", "out . differs"),
    ],
)
def test_suite_sees_planted_fault(ranks, fault, seen):
    said = ranks(4).run(faulty, fault)
    assert any(re.search(seen, line) for line in said), said


def test_suite_passes_without_fault(ranks):
    assert ranks(4).run(faulty, None) == [""] * 4
