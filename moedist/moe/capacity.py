"""How many pairs an expert takes."""

from __future__ import annotations

import dataclasses
import math
import warnings
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor

from moedist.config import Config, require

Rounding = Literal["ceil", "floor", "ceil_float32"]


@dataclasses.dataclass(frozen=True)
class CapacityConfig(Config):
    """How many pairs an expert takes from one capacity group, and which.

    The limit of a group with ``t`` valid tokens is ``max(min_capacity, ceil(factor * t * K / E))``, never above ``t``,
    in exact integer arithmetic on the factor as the decimal that was written (beyond six decimals the nearest fraction
    with a denominator up to 10^6, so that 4/3 is 4/3 and int64 holds every product).

    Attributes:
        factor: multiple of the even share ``t * K / E``; None takes every pair (dropless).
        final_factor: the factor from step ``factor_steps`` on, reached on a straight line; None for a constant. Both
            ends are then taken to three decimals, so that int64 holds every product.
        factor_steps: length of that line in optimizer steps.
        expert_capacity: a fixed limit per group in place of every factor's, in evaluations too; None for the factor's.
        eval_factor: the factor of evaluations during training; ``train`` for the same.
        min_capacity: lower bound of the limit.
        base: what an even share is a share of: ``pairs`` (``t * K / E``) or ``tokens`` (``t / E``; Switch, GShard,
            ST-MoE).
        rounding: ``ceil``, ``floor`` (Mesh TensorFlow) or ``ceil_float32`` (the product in fp32, as DeepSpeed takes
            it).
        group: tokens that share one limit: ``rank`` (a rank's tokens of one micro-batch, as DeepSpeed and Megatron do)
            or ``sequence`` (one row).
        drop_policy: who stays at a full expert: ``probability`` (highest unbiased score, ties by position), ``gate``
            (highest gate; Megatron), ``choice`` (all first choices in token order, then second ones; GShard, Lepikhin
            et al. 2021), ``token`` (token order, a token's choices in order) or ``random``.
        overflow: what becomes of the rest: ``drop`` leaves the token to the residual; ``next_best`` lets the pair ask,
            in rounds, its token's best expert that it has not tried and that has room (one round per expert: slow at
            many).
        renormalize_after_drop: whether a token's surviving gates are rescaled to the sum that its gates had before;
            ``one`` rescales to 1, with or without a limit (DeepSpeed).
    """

    factor: float | None = 1.25
    final_factor: float | None = None
    factor_steps: int = 1000
    expert_capacity: int | None = None
    eval_factor: float | None | Literal["train"] = "train"
    min_capacity: int = 1
    base: Literal["pairs", "tokens"] = "pairs"
    rounding: Rounding = "ceil"
    group: Literal["rank", "sequence"] = "rank"
    drop_policy: Literal["probability", "gate", "choice", "token", "random"] = "probability"
    overflow: Literal["drop", "next_best"] = "drop"
    renormalize_after_drop: bool | Literal["one"] = True

    def __post_init__(self) -> None:
        for key in ("factor", "eval_factor", "final_factor"):
            value = getattr(self, key)
            if value is None or isinstance(value, str):
                continue
            require(
                0 < value < 1e6,
                key,
                value,
                "is no multiple of the even share of pairs",
                "Set it above 0 (1.25 is common), or to null to drop nothing.",
            )
            if value < 1:
                warnings.warn(
                    f"moe.capacity.{key} = {value} is below 1: pairs are dropped even at perfect balance.", stacklevel=2
                )
        for key, least in (("expert_capacity", 1), ("min_capacity", 0), ("factor_steps", 1)):
            value = getattr(self, key)
            require(value is None or value >= least, key, value, "is too small", f"Set it to {least} or more.")
        require(
            self.final_factor is None or self.factor_steps <= 10**6,
            "factor_steps",
            self.factor_steps,
            "is too long a line",
            "Set it to 1000000 or less.",
        )
        require(
            self.final_factor is None or max(self.final_factor, self.factor or 0) <= 1000,
            "final_factor",
            self.final_factor,
            "cannot be part of a schedule that reaches above 1000",
            "Set both ends to 1000 or less.",
        )
        require(
            self.final_factor is None or (self.factor is not None and self.rounding != "ceil_float32"),
            "final_factor",
            self.final_factor,
            "needs a factor to start from, and exact rounding",
            "Set moe.capacity.factor, and rounding to ceil or floor; or leave final_factor at null.",
        )
        unused = self.factors_without_effect()
        if unused:
            warnings.warn(
                f"moe.capacity.expert_capacity = {self.expert_capacity} is the limit in training and in evaluation: "
                f"{' and '.join(unused)} {'has' if len(unused) == 1 else 'have'} no effect.",
                stacklevel=2,
            )

    def factors_without_effect(self) -> list[str]:
        """The keys below ``moe.capacity`` that say something else than a fixed ``expert_capacity`` does."""
        if self.expert_capacity is None:
            return []
        silent = {"factor": type(self).factor, "final_factor": None, "eval_factor": "train"}
        return [f"{key} = {getattr(self, key)}" for key, default in silent.items() if getattr(self, key) != default]

    def limit(self, training: bool) -> Limit | None:
        """The rule in force; None where nothing is dropped."""
        if self.expert_capacity is not None:
            return Limit(Fraction(0), self.expert_capacity)
        factor = self.factor if training or self.eval_factor == "train" else self.eval_factor
        assert not isinstance(factor, str)
        if factor is None:
            return None
        moving = self.final_factor is not None and (training or self.eval_factor == "train")
        return Limit(
            exact(factor, 3 if moving else None),
            self.min_capacity,
            base=self.base,
            rounding=self.rounding,
            final=exact(self.final_factor, 3) if moving and self.final_factor is not None else None,
            steps=self.factor_steps,
        )

    @property
    def dropless(self) -> bool:
        """Whether nothing is ever dropped, in training and in evaluation."""
        return self.limit(training=True) is None and self.limit(training=False) is None

    @property
    def causal(self) -> bool:
        """Whether no later token, and no neighbour in the batch, can evict an earlier one."""
        return self.dropless or (self.drop_policy == "token" and self.group == "sequence" and self.overflow == "drop")

    def without_limit(self) -> CapacityConfig:
        """The same, dropless: evaluation of a finished model, generation, exports."""
        return dataclasses.replace(self, factor=None, final_factor=None, eval_factor="train", expert_capacity=None)


def exact(factor: float, decimals: int | None = None) -> Fraction:
    """The decimal that was written, not its nearest binary number: 1.1 is 11 / 10; rounded to ``decimals`` if given."""
    written = Fraction(str(factor))
    return written.limit_denominator(10**6) if decimals is None else round(written, decimals)


@dataclasses.dataclass(frozen=True)
class Limit:
    """``min(t, max(least, round(factor * t * K / E)))`` for a group of t valid tokens, exactly.

    Attributes:
        factor: at step 0.
        least: lower bound.
        base, rounding: see `CapacityConfig`.
        final: factor from step ``steps`` on; None for a constant.
    """

    factor: Fraction
    least: int
    base: str = "pairs"
    rounding: Rounding = "ceil"
    final: Fraction | None = None
    steps: int = 1

    def of_shape(self, num_tokens: int, top_k: int, num_experts: int) -> int:
        """The largest limit that a group of ``num_tokens`` positions can have at any step: what buffers are sized for.

        >>> Limit(Fraction("1.1"), 1).of_shape(100, top_k=1, num_experts=10)
        11
        """
        # Integers alone: a compiled graph knows no fractions.
        factor, final = self.factor, self.final
        if final is not None and final.numerator * factor.denominator > factor.numerator * final.denominator:
            factor = final
        top_k = top_k if self.base == "pairs" else 1
        if self.rounding == "ceil_float32":
            share = ceil_float32(num_tokens, num_experts, factor.numerator, factor.denominator, top_k)
        else:
            numerator, denominator = factor.numerator * num_tokens * top_k, factor.denominator * num_experts
            share = numerator // denominator if self.rounding == "floor" else -(-numerator // denominator)
        return min(num_tokens, max(self.least, share))

    def of_counts(self, tokens_G: Tensor, top_k: int, num_experts: int, step: Tensor | None = None) -> Tensor:
        """int64 [G]: the limit of each group from its valid tokens, on the device; ``step`` is 0-dim int64."""
        top_k = top_k if self.base == "pairs" else 1
        if self.rounding == "ceil_float32":
            scale = self.factor.numerator / self.factor.denominator * top_k
            scale_0 = torch.full((), scale, dtype=torch.float32, device=tokens_G.device)
            share_G = ((tokens_G.double() / num_experts).float() * scale_0).ceil().to(torch.int64)
        else:
            numerator_G, denominator = tokens_G * top_k, self.factor.denominator * num_experts
            if self.final is None:
                numerator_G = numerator_G * self.factor.numerator
            else:
                assert step is not None, "a factor that changes needs the step"
                common = math.lcm(self.factor.denominator, self.final.denominator)
                first = self.factor.numerator * (common // self.factor.denominator)
                last = self.final.numerator * (common // self.final.denominator)
                numerator_G = numerator_G * (first * self.steps + (last - first) * step.clamp(0, self.steps))
                denominator = common * self.steps * num_experts
            sign = 1 if self.rounding == "floor" else -1
            share_G = sign * torch.div(sign * numerator_G, denominator, rounding_mode="floor")
        return torch.minimum(tokens_G, share_G.clamp_min(self.least))


def ceil_float32(num_tokens: int, num_experts: int, numerator: int, denominator: int, top_k: int) -> int:
    """``ceil(fp32(t / E) * fp32(factor * K))``, rounded as DeepSpeed rounds."""
    return math.ceil(float32(float32(num_tokens / num_experts) * float32(numerator / denominator * top_k)))


def float32(number: float) -> float:
    """The fp32 number nearest to a positive one, to even at a tie, by operations that a compiled graph knows.

    >>> float32(0.1) == torch.tensor(0.1, dtype=torch.float32).item()
    True
    """
    mantissa, exponent = math.frexp(number)
    return math.ldexp(round(math.ldexp(mantissa, 24)), exponent - 24)
