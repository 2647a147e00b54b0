"""Token choice: each token picks its K best experts. What every such router shares, whatever makes its logits."""

from __future__ import annotations

import dataclasses
import math
import warnings
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moedist.config import Config, ConfigError, require
from moedist.moe.context import TokenContext
from moedist.moe.host import on_host
from moedist.moe.init import Draw
from moedist.moe.kernels.device import why_not
from moedist.moe.kernels.pairs import MOST_CHOICES, MOST_EXPERTS, ChoiceRules, Choose
from moedist.moe.noise import INPUT_JITTER, ROUTER_NOISE, draw_normal, draw_uniform
from moedist.moe.router.contract import Router, RouterConfig, RouterSite, Routing, wide

EPS = 1e-20

ScoreFunction = Literal["softmax", "sigmoid", "sqrt_softplus"]


@dataclasses.dataclass(frozen=True)
class GroupLimit(Config):
    """Group-limited selection: a token's experts come from its best few groups (DeepSeek-V2, section 2.2.2).

    Groups are equal blocks of neighbouring experts. With ``per_node`` a group is what one node holds of them, so that a
    token is sent to ``top_groups`` nodes at most, whatever the capacity's overflow does.

    Attributes:
        num_groups: how many groups the experts are cut into. With ``per_node``, None lets the launcher fill it in
            (`moedist.launch.node_groups`): routing depends on the number, so it is part of the run's configuration and
            stays what it is when the run goes on at another layout.
        top_groups: groups that a token may pick from; with ``per_node`` it may be more than there are.
        score: a group's score: the sum of its two best experts' (``top2_sum``, DeepSeek-V3) or its best's (``max``,
            V2).
        per_node: whether ``num_groups`` is the number of nodes that an expert-parallel group spans.
    """

    num_groups: int | None = None
    top_groups: int = 1
    score: Literal["top2_sum", "max"] = "top2_sum"
    per_node: bool = False

    def __post_init__(self) -> None:
        require(
            self.num_groups is not None or self.per_node,
            "num_groups",
            None,
            "says no number of groups",
            "Set it to a divisor of moe.num_experts, or per_node to true.",
        )
        num_groups = self.num_groups
        require(num_groups is None or num_groups >= 1, "num_groups", num_groups, "is no number", "Set it to 1 or more.")
        most = math.inf if self.per_node or num_groups is None else num_groups
        require(
            1 <= self.top_groups <= most,
            "top_groups",
            self.top_groups,
            "is too small" if self.top_groups < 1 else f"is more than the {num_groups} groups",
            "Set it to 1 or more." if most == math.inf else f"Set it to 1 to {num_groups}.",
        )

    def known(self) -> int:
        """`num_groups`.

        Raises:
            ConfigError: the groups follow nodes and nobody has said how many there are.
        """
        require(
            self.num_groups is not None,
            "moe.router.groups.num_groups",
            None,
            "is not known outside of a launched run",
            "Set it to the number of nodes that an expert-parallel group spans.",
        )
        assert self.num_groups is not None
        return self.num_groups

    def check(self, num_experts: int, top_k: int) -> None:
        """Raises `ConfigError` where the experts cannot be cut so, or too few are left to pick from."""
        if self.num_groups is None:
            return
        require(
            num_experts % self.num_groups == 0,
            "num_groups",
            self.num_groups,
            f"does not divide the {num_experts} experts",
            "Set it to a divisor of moe.num_experts.",
        )
        size = num_experts // self.num_groups
        left = size * min(self.top_groups, self.num_groups)
        require(
            top_k <= left,
            "top_groups",
            self.top_groups,
            f"leaves {left} experts for top_k = {top_k}",
            "Set it higher, or top_k lower.",
        )
        require(
            self.score != "top2_sum" or size >= 2,
            "score",
            self.score,
            "needs two experts in a group",
            "Set it to max, or num_groups lower.",
        )

    def note(self, num_nodes: int | None) -> str | None:
        """What a run should say at its start, where ``per_node``; None for nothing.

        Args:
            num_nodes: nodes that each expert-parallel group spans; None where groups begin or end inside a node.
        """
        if not self.per_node:
            return None
        if num_nodes != self.num_groups:
            here = "begins or ends inside a node" if num_nodes is None else f"spans {num_nodes} here"
            return (
                f"routing keeps the {self.num_groups} groups of experts of the run's first start, one per node; an "
                f"expert-parallel group {here}, so a group is not what one node holds"
            )
        if self.num_groups == 1:
            return "groups of experts follow nodes: expert parallelism stays inside one node, so nothing is limited"
        most = min(self.top_groups, self.num_groups or 1)
        return f"groups of experts follow nodes: a token is sent to at most {most} of {self.num_groups}"


@dataclasses.dataclass(frozen=True)
class TokenChoiceConfig(RouterConfig):
    """What token-choice routers share. Equal scores go to the lowest expert index.

    Attributes:
        mode: ``top_k``, or ``dense``: every token runs through every expert.
        top_k: experts per token (K); 0 is another way to say ``mode: dense``.
        score: what becomes of the logits: ``softmax`` over all experts, or for each expert alone ``sigmoid``
            (DeepSeek-V3) or ``sqrt_softplus`` (``sqrt(softplus(x))``).
        renormalize: whether a token's gates sum to 1. None: yes for K >= 2, no for K = 1, where a renormalised gate is
            the constant 1 and the router would get no gradient from the task (Switch keeps the probability).
        scale: factor on all gates, after renormalising (DeepSeek-V3: 2.5).
        groups: group-limited selection; None for none.
        noise_std: standard deviation of gaussian noise on the logits, in training only; 0 for none.
        selection_bias: whether a balancing bias may move the selection, beside the scores. ``refused`` where the chosen
            experts must be those of the highest scores: in the softmax routers that were published so.
        input_jitter: the router's copy of its input is multiplied by uniform numbers of [1 - jitter, 1 + jitter], in
            training only (Switch: 1e-2); 0 for none.
    """

    mode: Literal["top_k", "dense"] = "top_k"
    top_k: int = 2
    score: ScoreFunction = "softmax"
    renormalize: bool | None = None
    scale: float = 1.0
    groups: GroupLimit | None = None
    noise_std: float = 0.0
    input_jitter: float = 0.0
    selection_bias: Literal["allowed", "refused"] = "allowed"

    def __post_init__(self) -> None:
        require(self.top_k >= 0, "top_k", self.top_k, "picks no expert", "Set it to 1 or more, or mode to dense.")
        if self.top_k == 0:
            object.__setattr__(self, "mode", "dense")
        require(self.noise_std >= 0, "noise_std", self.noise_std, "is negative", "Set it to 0 (none) or more.")
        require(self.scale > 0, "scale", self.scale, "is no factor on gates", "Set it above 0; 1 changes nothing.")
        require(0 <= self.input_jitter < 1, "input_jitter", self.input_jitter, "is no small share", "Set it in [0, 1).")
        if self.mode == "top_k" and self.top_k == 1 and self.renormalize:
            warnings.warn(
                "moe.router.renormalize = True with top_k = 1 makes every gate the constant 1: the router learns from "
                "the balance losses only. Leave renormalize at null to keep the probability as the gate.",
                stacklevel=2,
            )

    @property
    def draws_noise(self) -> bool:
        """With gaussian noise or jitter."""
        return self.noise_std > 0 or self.input_jitter > 0

    def experts_per_token(self, num_experts: int) -> int:  # noqa: D102
        return num_experts if self.mode == "dense" else self.top_k

    def check(self, num_experts: int) -> None:
        """Raises `ConfigError` where the choice does not fit ``num_experts``."""
        top_k = self.experts_per_token(num_experts)
        require(
            top_k <= num_experts,
            "top_k",
            self.top_k,
            f"is more than the {num_experts} experts",
            f"Set moe.router.top_k to {num_experts} or less, or raise moe.num_experts.",
        )
        if self.groups is not None:
            try:
                self.groups.check(num_experts, top_k)
            except ConfigError as error:
                raise error.under("groups") from None


class TokenChoiceRouter(Router):
    """Scores by `logits`, selection, gates; a subclass makes the logits."""

    def __init__(self, config: TokenChoiceConfig, site: RouterSite):
        super().__init__(site)
        config.check(site.num_experts)
        self.config, self.top_k = config, config.experts_per_token(site.num_experts)
        self.renormalize = self.top_k > 1 if config.renormalize is None else config.renormalize
        kind = type(self)
        own = kind.select, kind.selection_order
        self.takes_best_logits = own == (TokenChoiceRouter.select, TokenChoiceRouter.selection_order)

    def add_selection_bias(self) -> None:
        """See the contract."""
        require(
            self.config.selection_bias == "allowed",
            "selection_bias",
            self.config.selection_bias,
            f"the router's selection_bias is refused: its experts are those of the highest {self.config.score} scores, "
            "and a bias would choose others",
            "Balance by a loss (moe/balance=switch), or let a bias choose: set moe.router.selection_bias to allowed, "
            "best with moe.router.score = sigmoid, whose scores don't share one sum (DeepSeek-V3).",
        )
        device = next(self.parameters()).device
        self.selection_bias = torch.zeros(self.num_experts, dtype=torch.float32, device=device)

    def shortfall(self, routing: Routing) -> Tensor:
        """See the contract."""
        assert self.selection_bias is not None, "there is nothing to fall short of"
        return shortfall(routing.score_TE.detach() + self.selection_bias, self.top_k, self.config.groups)

    def init_weights(self, draw: Draw) -> None:
        """Clears the bias; a subclass fills its parameters as well."""
        if self.selection_bias is not None:
            self.selection_bias.zero_()

    def logits(self, x_TD: Tensor, step: Tensor) -> Tensor:
        """[T, E] from vectors in fp32 or wider; ``step`` is 0-dim, for what changes with it."""
        raise NotImplementedError

    def forward(self, x_TD: Tensor, ctx: TokenContext) -> Routing:
        """Pairs in token order, each token's experts in falling order of score."""
        with torch.autocast(x_TD.device.type, enabled=False):
            x_TD = wide(x_TD)
            logits_TE = noisy_TE = self.logits(x_TD, ctx.step)
            load_TE = None
            if ctx.training:
                if self.config.input_jitter > 0:
                    x_TD = self.jittered(x_TD, ctx)
                    noisy_TE = self.logits(x_TD, ctx.step)
                noisy_TE, load_TE = self.with_noise(noisy_TE, x_TD, ctx)
            score_TE, allowed_TE, expert_TK, gate_TK = self.choose(noisy_TE, ctx)
            if self.config.scale != 1:
                gate_TK = gate_TK * self.config.scale
            probs_TE = score_TE
            if self.config.score != "softmax":
                probs_TE = score_TE / score_TE.sum(dim=1, keepdim=True).clamp_min(EPS)
        num_tokens = x_TD.shape[0]
        return Routing(
            token_N=torch.arange(num_tokens, device=x_TD.device).repeat_interleave(
                self.top_k, output_size=num_tokens * self.top_k
            ),
            expert_N=expert_TK.reshape(-1),
            gate_N=gate_TK.reshape(-1),
            score_TE=score_TE,
            logits_TE=logits_TE,
            probs_TE=probs_TE,
            pairs_per_token=self.top_k,
            load_TE=load_TE,
            allowed_TE=allowed_TE,
        )

    def choose(self, logits_TE: Tensor, ctx: TokenContext) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Scores [T, E], which experts are allowed, those that are chosen [T, K] and their gates [T, K]."""
        if self.chooses_in_kernel(logits_TE):
            score_TE, expert_TK, gate_TK, allowed_TE = Choose.apply(logits_TE, self.selection_bias, self.rules())
            return score_TE, None if self.config.groups is None else allowed_TE, expert_TK, gate_TK
        score_TE = scores(logits_TE, self.config.score)
        allowed_TE = self.allowed(score_TE.detach())
        expert_TK = self.select(logits_TE.detach(), score_TE.detach(), allowed_TE, ctx)
        gate_TK = score_TE.gather(1, expert_TK)
        if self.renormalize:
            gate_TK = gate_TK / gate_TK.sum(dim=1, keepdim=True).clamp_min(EPS)
        return score_TE, allowed_TE, expert_TK, gate_TK

    def chooses_in_kernel(self, logits_TE: Tensor) -> bool:
        """Whether a kernel chooses: by logits, or scores and a bias, where Triton runs."""
        groups = self.config.groups
        return (
            self.takes_best_logits
            and self.config.score in ("softmax", "sigmoid")
            and self.num_experts <= MOST_EXPERTS
            and max(self.top_k, 0 if groups is None else groups.num_groups or 0) <= MOST_CHOICES
            and why_not(logits_TE.device, "pairs") is None
        )

    def rules(self) -> ChoiceRules:
        """What a kernel must know to choose."""
        config, groups = self.config, self.config.groups
        rules = ChoiceRules(self.top_k, config.score, self.renormalize, EPS)
        if groups is None:
            return rules
        num_groups = groups.known()
        return rules._replace(
            num_groups=num_groups,
            top_groups=min(groups.top_groups, num_groups),
            sum_of_two=groups.score == "top2_sum",
        )

    def jittered(self, x_TD: Tensor, ctx: TokenContext) -> Tensor:
        """A copy of the vectors times factors drawn by name."""
        uniform_TD = draw_uniform(ctx, x_TD.shape[1], layer=self.layer, stream=INPUT_JITTER).to(x_TD.dtype)
        return x_TD * (1 + self.config.input_jitter * (2 * uniform_TD - 1))

    def with_noise(self, logits_TE: Tensor, x_TD: Tensor, ctx: TokenContext) -> tuple[Tensor, Tensor | None]:
        """Logits plus noise drawn by name (the logits themselves where there is none), and `Routing.load_TE`."""
        if self.config.noise_std == 0:
            return logits_TE, None
        noise_TE = draw_normal(ctx, self.num_experts, layer=self.layer, stream=ROUTER_NOISE)
        return logits_TE + self.config.noise_std * noise_TE.to(logits_TE.dtype), None

    def allowed(self, score_TE: Tensor) -> Tensor | None:
        """[T, E] bool: experts of each token's best groups; None where all are allowed."""
        if self.config.groups is None:
            return None
        return best_groups(
            score_TE if self.selection_bias is None else score_TE + self.selection_bias, self.config.groups
        )

    def select(self, logits_TE: Tensor, score_TE: Tensor, allowed_TE: Tensor | None, ctx: TokenContext) -> Tensor:
        """int64 [T, K]: the chosen experts."""
        order_TE = self.selection_order(logits_TE, score_TE, ctx)
        if allowed_TE is not None:
            order_TE = order_TE.masked_fill(~allowed_TE, -torch.inf)
        return best_experts(order_TE, self.top_k)

    def selection_order(self, logits_TE: Tensor, score_TE: Tensor, ctx: TokenContext) -> Tensor:
        """[T, E], without gradient: higher is chosen first."""
        # Every score grows with its logit, and logits keep apart what a score rounds to one value.
        return logits_TE if self.selection_bias is None else score_TE + self.selection_bias


def best_experts(order_TE: Tensor, top_k: int) -> Tensor:
    """int64 [T, K]: the experts of the K highest values in falling order, the lowest index first where they are equal.

    A stable sort, because torch.topk breaks ties as it likes; on a CPU only where there are any.
    """
    if on_host(order_TE) and top_k < order_TE.shape[1]:
        value_TK, expert_TK = order_TE.topk(top_k + 1, dim=1)
        if bool((value_TK[:, :-1] > value_TK[:, 1:]).all()):
            return expert_TK[:, :top_k]
    return order_TE.sort(dim=1, descending=True, stable=True).indices[:, :top_k]


def scores(logits_TE: Tensor, function: ScoreFunction) -> Tensor:
    """Unbiased scores from logits."""
    if function == "softmax":
        return logits_TE.softmax(dim=1)
    return logits_TE.sigmoid() if function == "sigmoid" else F.softplus(logits_TE).sqrt()


def best_groups(score_TE: Tensor, groups: GroupLimit) -> Tensor:
    """[T, E] bool: whether an expert is in one of its token's best groups; equal groups go to the lowest index."""
    score_TGM = by_group(score_TE, groups)
    group_TG = group_scores(score_TGM, groups)
    best = group_TG.sort(dim=1, descending=True, stable=True).indices[:, : groups.top_groups]
    allowed_TG = torch.zeros_like(group_TG, dtype=torch.bool).scatter_(1, best, True)
    return allowed_TG[:, :, None].expand_as(score_TGM).reshape(score_TE.shape)


def group_notes(model: nn.Module, num_nodes: int | None) -> list[str]:
    """`GroupLimit.note` of all routers of a model, each line once; ``num_nodes`` as there."""
    routers = (module for module in model.modules() if isinstance(module, TokenChoiceRouter))
    limits = dict.fromkeys(router.config.groups for router in routers)
    notes = (limit.note(num_nodes) for limit in limits if limit is not None)
    return [note for note in notes if note is not None]


def by_group(score_TE: Tensor, groups: GroupLimit) -> Tensor:
    """[T, G, M]: a view by the groups' M experts each."""
    num_tokens, num_experts = score_TE.shape
    num_groups = groups.known()
    return score_TE.view(num_tokens, num_groups, num_experts // num_groups)


def group_scores(score_TGM: Tensor, groups: GroupLimit) -> Tensor:
    """[T, G]: what each group is worth."""
    if groups.score == "max":
        return score_TGM.amax(2)
    return score_TGM.sort(dim=2, descending=True).values[:, :, :2].sum(2)


def shortfall(order_TE: Tensor, top_k: int, groups: GroupLimit | None) -> Tensor:
    """`Router.shortfall` of the scores that are compared; -inf where every expert is chosen anyway."""
    if top_k == order_TE.shape[1]:
        return torch.full_like(order_TE, -torch.inf)
    open_TE = order_TE if groups is None else order_TE.masked_fill(~best_groups(order_TE, groups), -torch.inf)
    first_out_T1 = open_TE.sort(dim=1, descending=True).values[:, top_k, None]
    short_TE = first_out_T1 - order_TE
    return short_TE if groups is None else torch.maximum(short_TE, group_shortfall(order_TE, groups))


def group_shortfall(score_TE: Tensor, groups: GroupLimit) -> Tensor:
    """[T, E]: by how much all experts of each one's group together fall short of bringing the group among the best."""
    score_TGM = by_group(score_TE, groups)
    group_TG = group_scores(score_TGM, groups)
    if groups.top_groups == group_TG.shape[1]:
        return torch.full_like(score_TE, -torch.inf)
    first_out_T1 = group_TG.sort(dim=1, descending=True).values[:, groups.top_groups, None]
    short_TG = (first_out_T1 - group_TG) / (1 if groups.score == "max" else 2)
    return short_TG[:, :, None].expand_as(score_TGM).reshape(score_TE.shape)
