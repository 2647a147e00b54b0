"""The routers beside top-k: what each is for, in numbers."""

from __future__ import annotations

import math

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode

from moedist.config import ConfigError
from moedist.model.decoder import DecoderConfig
from moedist.moe.balance.bias import BiasConfig
from moedist.moe.balance.load import LoadConfig
from moedist.moe.balance.switch import SwitchConfig
from moedist.moe.capacity import CapacityConfig
from moedist.moe.context import TokenContext
from moedist.moe.dispatch.padded import PaddedConfig
from moedist.moe.init import named_draw
from moedist.moe.layer import MoEConfig
from moedist.moe.plan import plan_capacity
from moedist.moe.router.cosine import CosineConfig
from moedist.moe.router.expert_choice import ExpertChoiceConfig
from moedist.moe.router.forced import ForcedConfig
from moedist.moe.router.hash import HashConfig
from moedist.moe.router.mlp import MLPConfig
from moedist.moe.router.noisy import NoisyConfig
from moedist.moe.router.sinkhorn import SinkhornConfig, balance
from moedist.moe.router.topk import TopKConfig
from moedist.moe.token_choice import GroupLimit

DIM = 8
FIELD = [NoisyConfig(), MLPConfig(), CosineConfig(), HashConfig(), SinkhornConfig(), ExpertChoiceConfig()]
FIELD += [ForcedConfig(pattern="zipf"), TopKConfig(score="sigmoid", bias=True, noise_std=0.2, input_jitter=0.1)]


def built(config, num_experts=8, seed=0, layer=0):
    router = config.build(DIM, num_experts, layer=layer, dtype=torch.float64)
    router.init_weights(named_draw(seed))
    return router


def vectors(num_tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_tokens, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.requirement("R0-21", "C2")
@pytest.mark.pitfall("16", "27", "28")
@pytest.mark.parametrize("config", FIELD, ids=lambda config: config.kind)
def test_every_router(config):
    """Pitfalls 16, 27, 28: inputs stay, evaluation repeats, scores are fp32 in a bf16 model under autocast, rows of
    probabilities sum to 1, and padding changes nothing."""
    router = config.build(DIM, 8)
    router.init_weights(named_draw(0))
    x_TD = vectors(24).float()
    ids_T = torch.arange(24)
    before, state = x_TD.clone(), torch.get_rng_state()
    ctx = TokenContext.of_rows(3, 8, id_T=ids_T)
    routing = router(x_TD, ctx)
    assert torch.equal(x_TD, before) and torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(routing.probs_TE.sum(1), torch.ones(24))
    with torch.autocast("cpu", torch.bfloat16):
        again = router(x_TD, ctx)
    for name in ("logits_TE", "probs_TE", "score_TE", "gate_N"):
        assert torch.equal(getattr(again, name), getattr(routing, name)), name
    quiet = TokenContext.of_rows(3, 8, id_T=ids_T, training=False)
    if config.kind != "forced":
        later = TokenContext.of_rows(3, 8, id_T=ids_T, training=False, step=7)
        assert torch.equal(router(x_TD, quiet).expert_N, router(x_TD, later).expert_N)
    router.bfloat16()
    assert router(x_TD.bfloat16(), ctx).probs_TE.dtype == torch.float32
    router.float()
    valid_T = torch.arange(24) % 8 < 5
    layer = MoEConfig(num_experts=8, router=config, capacity=CapacityConfig(factor=None), balance={}).build(DIM)
    reports = []
    for junk in (0.0, 50.0):
        padded_TD = torch.where(valid_T[:, None], x_TD, junk)
        output = layer(padded_TD, TokenContext.of_rows(3, 8, id_T=ids_T, valid_T=valid_T))
        assert (output.out_TD[~valid_T] == 0).all()
        reports.append((output.out_TD, output.report.asked_E))
    torch.testing.assert_close(reports[0][0], reports[1][0], atol=1e-6, rtol=0)
    assert torch.equal(reports[0][1], reports[1][1])


class TestNoisy:
    @pytest.mark.requirement("R3-07")
    def test_evaluation_has_no_noise(self):
        router = built(NoisyConfig(top_k=2))
        x_TD = vectors(50)
        quiet = router(x_TD, TokenContext.of_rows(1, 50, training=False))
        plain = built(TopKConfig(top_k=2))
        with torch.no_grad():
            plain.weight.copy_(router.weight)
        expected = plain(x_TD, TokenContext.of_rows(1, 50))
        assert torch.equal(quiet.expert_N, expected.expert_N) and torch.equal(quiet.gate_N, expected.gate_N)
        assert quiet.load_TE is None
        noisy = router(x_TD, TokenContext.of_rows(1, 50))
        assert not torch.equal(noisy.expert_N, quiet.expert_N) and torch.equal(noisy.logits_TE, quiet.logits_TE)

    @pytest.mark.requirement("R3-07", "C14")
    def test_noise_begins_at_ln_2_and_follows_its_weights(self):
        router = built(NoisyConfig(top_k=2))
        x_TD, ctx = vectors(20_000), TokenContext.of_rows(1, 20_000)
        for weight, std in ((0.0, math.log(2)), (1.0, math.log(1 + math.e))):
            with torch.no_grad():
                router.noise_weight[:, 0] = weight
                x_TD[:, 0] = 1.0
                noise_TE = router.with_noise(torch.zeros(20_000, 8).double(), x_TD, ctx)[0]
            assert noise_TE.std().item() == pytest.approx(std, rel=0.01)

    @pytest.mark.requirement("R3-07")
    def test_load_is_the_probability_of_being_chosen(self):
        """Against a Monte-Carlo estimate: one expert's noise is drawn anew, the others' stays (equation 8)."""
        router = built(NoisyConfig(top_k=2), num_experts=5)
        torch.nn.init.normal_(router.noise_weight, std=0.3, generator=torch.Generator().manual_seed(3))
        x_TD, ctx = vectors(6, seed=4), TokenContext.of_rows(1, 6)
        routing = router(x_TD, ctx)
        with torch.no_grad():
            noisy_TE = router.with_noise(routing.logits_TE, x_TD, ctx)[0]
            std_TE = torch.nn.functional.softplus(x_TD @ router.noise_weight.t())
        generator = torch.Generator().manual_seed(5)
        for expert in range(5):
            normal_MT = torch.randn(40_000, 6, dtype=torch.float64, generator=generator)
            fresh_MT = routing.logits_TE[:, expert] + std_TE[:, expert] * normal_MT
            others_TE = noisy_TE.clone()
            others_TE[:, expert] = -torch.inf
            second_T = others_TE.sort(dim=1, descending=True).values[:, 1]
            share_T = (fresh_MT > second_T).double().mean(0)
            torch.testing.assert_close(routing.load_TE[:, expert], share_T, atol=0.012, rtol=0)
        assert routing.load_TE.requires_grad

    def test_load_loss_needs_it(self):
        with pytest.raises(ConfigError, match="Set moe/router=noisy") as caught:
            MoEConfig(balance={"load": LoadConfig()})
        assert caught.value.key == "balance.load.kind" and caught.value.value == "load"


class TestMLP:
    @pytest.mark.requirement("C2", "R2-08", "R2-09", "R2-12")
    def test_by_hand(self):
        router = built(MLPConfig(top_k=2, hidden_dim=5, temperature=0.5), num_experts=4)
        with torch.no_grad():
            router.hidden_bias.normal_(generator=torch.Generator().manual_seed(1))
            router.bias.normal_(generator=torch.Generator().manual_seed(2))
        x_TD = vectors(3)
        logits_TE = router(x_TD, TokenContext.of_rows(1, 3)).logits_TE
        for token in range(3):
            hidden = (router.hidden_weight @ x_TD[token] + router.hidden_bias).clamp_min(0)
            expected = (router.weight @ hidden + router.bias) / 0.5
            torch.testing.assert_close(logits_TE[token], expected)

    def test_R2_10_first_values(self):
        """Within the bounds of Xavier uniform, and near them; zero biases."""
        router = MLPConfig(hidden_dim=256).build(512, 4)
        router.init_weights(named_draw(0))
        for weight, bound in ((router.hidden_weight, 0.088388), (router.weight, 0.151911)):
            assert 0.98 * bound < weight.abs().max().item() <= bound * (1 + 1e-5)
        assert not router.hidden_bias.any() and not router.bias.any()

    def test_R2_17_extreme_zero_and_equal_input(self):
        router = built(MLPConfig(top_k=2), num_experts=4)
        for value in (100.0, 1e4, 0.0, -100.0):
            routing = router(torch.full((5, DIM), value, dtype=torch.float64), TokenContext.of_rows(1, 5))
            assert routing.gate_N.isfinite().all() and (routing.gate_N >= 0).all()
            torch.testing.assert_close(routing.gate_N.view(5, 2).sum(1), torch.ones(5).double(), atol=1e-12, rtol=0)
            assert (routing.expert_N.view(5, 2) == routing.expert_N[:2]).all(), "equal vectors go alike"
            plan = plan_capacity(routing, TokenContext.of_rows(1, 5), CapacityConfig(factor=None))
            assert plan.asked_E.sum() == 10

    @pytest.mark.requirement("R2-11")
    def test_temperature_schedule(self):
        """From 4 to 1 in 6 steps, linearly, and constant after; chosen experts don't depend on it."""
        router = built(MLPConfig(top_k=2, temperature=4.0, final_temperature=1.0, temperature_steps=6))
        x_TD = vectors(10)

        def at(step: int):
            return router(x_TD, TokenContext.of_rows(1, 10, step=step))

        for step, temperature in ((0, 4.0), (1, 3.5), (3, 2.5), (6, 1.0), (100, 1.0)):
            torch.testing.assert_close(at(step).logits_TE * temperature, at(6).logits_TE, atol=1e-14, rtol=1e-14)
            assert torch.equal(at(step).expert_N, at(6).expert_N)

    def test_a_schedule_recompiles_nothing(self):
        torch._dynamo.reset()
        router = built(MLPConfig(top_k=2, final_temperature=2.0, temperature_steps=6))
        compiled = torch.compile(router, fullgraph=True, backend=(counter := CompileCounter()))
        for step in (0, 1, 5):
            routing = compiled(vectors(6), TokenContext.of_rows(1, 6, step=step))
            expected = router(vectors(6), TokenContext.of_rows(1, 6, step=step))
            torch.testing.assert_close(routing.probs_TE, expected.probs_TE)
        assert counter.frame_count == 1

    @pytest.mark.parametrize(
        ("config", "key", "said"),
        [
            ({"hidden_dim": 0}, "hidden_dim", "Set it to 1 or more"),
            ({"temperature": 0.0}, "temperature", "Set it above 0"),
            ({"final_temperature": -1.0}, "final_temperature", "Set it above 0"),
            ({"temperature_steps": 0}, "temperature_steps", "Set 1 or more"),
        ],
    )
    def test_errors(self, config, key, said):
        with pytest.raises(ConfigError, match=said) as caught:
            MLPConfig(**config)
        assert caught.value.key == key and caught.value.value == config[key]


class TestCosine:
    def test_lengths_don_t_matter(self):
        router = built(CosineConfig(top_k=2), num_experts=6)
        x_TD, ctx = vectors(9), TokenContext.of_rows(1, 9)
        expected = router(x_TD, ctx).logits_TE
        point_TP = x_TD @ router.projection.t()
        cosine_TE = torch.cosine_similarity(point_TP[:, None], router.weight[None], dim=2)
        torch.testing.assert_close(expected, cosine_TE / 0.07)
        with torch.no_grad():
            router.weight *= torch.arange(1.0, 7.0)[:, None]
        torch.testing.assert_close(router(5 * x_TD, ctx).logits_TE, expected)
        assert router.projection.shape == (3, DIM), "half the number of experts"

    def test_the_scale_is_learned_and_bounded(self):
        router = built(CosineConfig(top_k=1))
        routing = router(vectors(9), TokenContext.of_rows(1, 9))
        routing.gate_N.sum().backward()
        assert router.log_scale.grad.abs() > 0
        with torch.no_grad():
            router.log_scale.fill_(50.0)
        assert router(vectors(9), TokenContext.of_rows(1, 9)).logits_TE.abs().max() <= 100.0 + 1e-9

    @pytest.mark.parametrize(
        ("config", "key"), [({"projection_dim": 0}, "projection_dim"), ({"temperature": 1e-3}, "temperature")]
    )
    def test_errors(self, config, key):
        with pytest.raises(ConfigError, match="Set it ") as caught:
            CosineConfig(**config)
        assert caught.value.key == key and caught.value.value == config[key]


class TestHash:
    def test_an_id_has_its_experts_for_ever(self):
        ids_T = torch.tensor([5, 9, 5, 1000, 9])
        router = built(HashConfig(top_k=2))
        first = router(vectors(5), TokenContext.of_rows(1, 5, id_T=ids_T))
        other = router(vectors(5, seed=1), TokenContext.of_rows(1, 5, id_T=ids_T, step=9, seed=3, training=False))
        assert torch.equal(first.expert_N, other.expert_N)
        rows = first.expert_N.view(5, 2).tolist()
        assert rows[0] == rows[2] and rows[1] == rows[4]
        assert first.gate_N.tolist() == [0.5] * 10

    def test_layers_and_seeds_have_tables_of_their_own_and_tables_are_even(self):
        ids_T = torch.arange(8000)
        ctx = TokenContext.of_rows(1, 8000, id_T=ids_T)
        tables = [
            built(HashConfig(top_k=2, table_seed=seed), layer=layer)(vectors(8000), ctx).expert_N
            for seed, layer in ((0, 0), (0, 1), (1, 0))
        ]
        for table in tables:
            assert (table.view(-1, 2)[:, 0] != table.view(-1, 2)[:, 1]).all()
            count_E = torch.bincount(table, minlength=8)
            assert (count_E - 2000).abs().max() < 5 * math.sqrt(2000)
        assert not torch.equal(tables[0], tables[1]) and not torch.equal(tables[0], tables[2])

    @pytest.mark.parametrize(("top_k", "said"), [(0, "Set it to 1"), (9, "Set moe.router.top_k to 8 or less")])
    def test_errors(self, top_k, said):
        with pytest.raises(ConfigError, match=said) as caught:
            HashConfig(top_k=top_k).build(DIM, 8)
        assert (caught.value.key, caught.value.value) == ("top_k", top_k)


class TestSinkhorn:
    def test_marginals(self):
        """Rows sum to 1 and columns to an even share, on scores that all prefer one expert; padding has no mass."""
        logits_TE = torch.randn(60, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        logits_TE[:, 2] += 3.0
        valid_T = torch.arange(60) < 48
        mass_TE = balance(logits_TE, valid_T, 200).exp()
        torch.testing.assert_close(mass_TE[valid_T].sum(1), torch.ones(48).double(), atol=1e-7, rtol=0)
        torch.testing.assert_close(mass_TE[valid_T].sum(0), torch.full((6,), 8.0).double(), atol=1e-6, rtol=0)

    def test_training_is_balanced_and_evaluation_is_the_tokens_own(self):
        router = built(SinkhornConfig(iterations=50))
        x_TD = vectors(400)
        x_TD[:, 0] = 2.0
        with torch.no_grad():
            router.weight[3, 0] = 2.0
        loads = {}
        for training in (True, False):
            routing = router(x_TD, TokenContext.of_rows(1, 400, training=training))
            loads[training] = torch.bincount(routing.expert_N, minlength=8).max().item()
            if not training:
                assert torch.equal(routing.expert_N, routing.logits_TE.argmax(1))
            gate_T = routing.logits_TE.sigmoid().gather(1, routing.expert_N[:, None])[:, 0]
            assert torch.equal(routing.gate_N, gate_T)
        assert loads[True] < 85 < 200 < loads[False]

    def test_empty_batch(self):
        ctx = TokenContext.of_rows(1, 3, valid_T=torch.zeros(3, dtype=torch.bool))
        assert balance(torch.randn(3, 4), ctx.valid_T, 3).isfinite().all()
        assert built(SinkhornConfig())(vectors(0), TokenContext.of_rows(1, 0)).expert_N.shape == (0,)

    @pytest.mark.parametrize(
        ("config", "key"), [({"iterations": 0}, "iterations"), ({"groups": GroupLimit(2, 1)}, "groups")]
    )
    def test_errors(self, config, key):
        with pytest.raises(ConfigError, match="Set it ") as caught:
            SinkhornConfig(**config)
        assert caught.value.key == key


class TestExpertChoice:
    @pytest.mark.parametrize(("num_valid", "capacity"), [(24, 6), (10, 3), (1, 1), (0, 0)])
    def test_exact_load(self, num_valid, capacity):
        """Every expert takes its ceil(2 * T / E) best tokens."""
        valid_T = torch.arange(24) < num_valid
        layer = MoEConfig(
            num_experts=8, router=ExpertChoiceConfig(), capacity=CapacityConfig(factor=None), balance={}
        ).build(DIM, dtype=torch.float64)
        x_TD, ctx = vectors(24), TokenContext.of_rows(3, 8, valid_T=valid_T)
        report = layer(x_TD, ctx).report
        assert report.asked_E.tolist() == report.kept_E.tolist() == [capacity] * 8
        assert report.dropped_ME.tolist() == [[0] * 8] * 3
        routing = layer.router(x_TD, ctx)
        for expert in range(8):
            mine = [
                (t, gate)
                for t, e, gate, lives in zip(
                    *(v.tolist() for v in (routing.token_N, routing.expert_N, routing.gate_N, routing.live_N)),
                    strict=True,
                )
                if e == expert and lives
            ]
            best = sorted(range(num_valid), key=lambda t: -routing.probs_TE[t, expert].item())[:capacity]
            assert [t for t, _ in mine] == best
            assert [gate for _, gate in mine] == routing.probs_TE[best, expert].tolist()

    def test_it_has_its_own_capacity(self):
        with pytest.raises(ConfigError, match="Set moe.capacity.factor to null") as caught:
            MoEConfig(router=ExpertChoiceConfig())
        assert (caught.value.key, caught.value.value) == ("capacity.factor", 1.25)

    def test_it_has_no_first_choices(self):
        with pytest.raises(ConfigError, match="Set it to all") as caught:
            MoEConfig(
                router=ExpertChoiceConfig(),
                capacity=CapacityConfig(factor=None),
                balance={"switch": SwitchConfig(count="first")},
            )
        assert (caught.value.key, caught.value.value) == ("balance.switch.count", "first")

    @pytest.mark.parametrize("factor", [0.0, -1.0, math.nan, math.inf])
    def test_errors(self, factor):
        with pytest.raises(ConfigError, match="factor = .*Set it above 0"):
            ExpertChoiceConfig(factor=factor)


class TestForced:
    def load(self, config: ForcedConfig, num_tokens: int = 4000, **kwargs) -> list[int]:
        routing = built(config)(vectors(num_tokens), TokenContext.of_rows(1, num_tokens, **kwargs))
        experts_TK = routing.expert_N.view(num_tokens, -1)
        assert all(len(set(row)) == len(row) for row in experts_TK.tolist())
        valid_T = kwargs.get("valid_T", torch.ones(num_tokens, dtype=torch.bool))
        return torch.bincount(experts_TK[valid_T].reshape(-1), minlength=8).tolist()

    def test_balanced(self):
        assert self.load(ForcedConfig(top_k=2)) == [1000] * 8
        valid_T = torch.arange(64) % 3 > 0
        load = self.load(ForcedConfig(top_k=2), 64, valid_T=valid_T)
        assert sum(load) == 2 * int(valid_T.sum()) and max(load) - min(load) <= 1

    def test_one_empty(self):
        load = self.load(ForcedConfig(top_k=3, pattern="one_empty"), 700)
        assert load == [300] * 7 + [0]

    def test_zipf(self):
        shares = [1 / rank for rank in range(1, 9)]
        load = self.load(ForcedConfig(top_k=1, pattern="zipf"))
        for got, share in zip(load, shares, strict=True):
            expected = 4000 * share / sum(shares)
            assert abs(got - expected) < 5 * math.sqrt(expected)
        assert self.load(ForcedConfig(top_k=1, pattern="zipf")) == load
        assert self.load(ForcedConfig(top_k=1, pattern="zipf"), step=1) != load
        even = self.load(ForcedConfig(top_k=1, pattern="zipf", exponent=0.0))
        assert max(even) < 620

    def test_gates_are_learned(self):
        router = built(ForcedConfig(top_k=1))
        routing = router(vectors(20), TokenContext.of_rows(1, 20))
        routing.gate_N.sum().backward()
        assert router.weight.grad.abs().max() > 1e-3

    def test_label(self):
        for pattern in ("balanced", "zipf", "one_empty"):
            assert ForcedConfig(pattern=pattern).label == f"forced {pattern}"
        assert TopKConfig().label is None

    def test_errors(self):
        with pytest.raises(ConfigError, match="pattern = 'one_empty' leaves 7 experts for top_k = 8. Set top_k lower"):
            ForcedConfig(pattern="one_empty", top_k=8).build(DIM, 8)
        with pytest.raises(ConfigError, match="exponent = -1.0 is negative. Set it to 0"):
            ForcedConfig(exponent=-1.0)


@pytest.mark.parametrize(
    "router", [HashConfig(), ExpertChoiceConfig(), SinkhornConfig(), ForcedConfig()], ids=lambda router: router.kind
)
def test_a_bias_needs_a_selection_to_move(router):
    with pytest.raises(ConfigError, match="Choose a token-choice router") as caught:
        MoEConfig(router=router, capacity=CapacityConfig(factor=None), balance={"bias": BiasConfig()})
    assert caught.value.key == "balance.bias.kind" and "bias" in str(caught.value)


@pytest.mark.requirement("R2-61")
@pytest.mark.parametrize("router", [SinkhornConfig(), ExpertChoiceConfig()], ids=lambda router: router.kind)
def test_routers_that_look_at_other_tokens_are_refused_in_a_causal_model(router):
    moe = MoEConfig(router=router, capacity=CapacityConfig(factor=None), balance={})
    with pytest.raises(ConfigError, match="the model is causal") as caught:
        DecoderConfig().build(64, moe, device="meta")
    assert (caught.value.key, caught.value.value) == ("moe.router.kind", router.kind)
    assert "moe/router=topk" in caught.value.remedy


@pytest.mark.parametrize("config", FIELD, ids=lambda config: config.kind)
@pytest.mark.parametrize("overflow", ["drop", "next_best"])
def test_no_router_asks_the_host_or_breaks_the_graph(config, overflow):
    """Fake tensors have no values to read."""
    own = config.kind == "expert_choice"
    capacity = CapacityConfig(factor=None if own else 1.0, overflow="drop" if own else overflow)
    moe = MoEConfig(num_experts=8, router=config, capacity=capacity, dispatch=PaddedConfig())
    with FakeTensorMode(allow_non_fake_inputs=False):
        output = moe.build(DIM)(torch.randn(24, DIM), TokenContext.of_rows(3, 8))
        assert output.out_TD.shape == (24, DIM)
    if overflow == "drop":
        torch._dynamo.reset()
        router = built(config)
        ctx = TokenContext.of_rows(3, 8, id_T=torch.arange(24))
        got = torch.compile(router, fullgraph=True, backend="eager")(vectors(24), ctx)
        assert torch.equal(got.expert_N, router(vectors(24), ctx).expert_N)


GROUPED = TopKConfig(score="sigmoid", groups=GroupLimit(4, 2))


@pytest.mark.requirement("R0-42")
@pytest.mark.pitfall("4")
@pytest.mark.parametrize("config", [*FIELD, GROUPED], ids=lambda config: config.kind)
@pytest.mark.parametrize(("rows", "length"), [(0, 6), (1, 0)])
def test_an_empty_batch_gives_zero_gradients(config, rows, length):
    """Pitfall 4: a rank without a token takes part like the others."""
    factors = [None] if config.has_own_capacity else [None, 0.75]
    for factor in factors:
        capacity = CapacityConfig(factor=factor, group="sequence", overflow="next_best")
        layer = MoEConfig(num_experts=8, router=config, capacity=capacity).build(DIM)
        output = layer(torch.zeros(0, DIM, requires_grad=True), TokenContext.of_rows(rows, length))
        (sum(output.report.losses.values()) + output.out_TD.sum()).backward()
        assert output.out_TD.shape == (0, DIM)
        assert all(not parameter.grad.any() for parameter in layer.parameters())
