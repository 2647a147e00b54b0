"""A user's DeepSpeed JSON meets the run. Knows DeepSpeed's keys, and does not import it.

Four things can happen to a key: the run fills it in (it is missing or ``"auto"``); the run and the key say different
things, which is refused; the key asks for something that moedist does itself or that would change the numbers, which is
refused with what to use instead; all else goes to DeepSpeed as it was written. A key that DeepSpeed does not know is
refused too: DeepSpeed would ignore it without a word.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from moedist.config import ConfigError, ConfigErrors
from moedist.engine.contract import TrainingStep

AUTO = "auto"
KEY = "engine.config"
"""Where the JSON stands in a run's configuration."""

PASSED = frozenset(
    {
        "comms_logger",
        "disable_python_gc",
        "dump_state",
        "log_level",
        "memory_breakdown",
        "optimizer",
        "scheduler",
        "steps_per_print",
        "timers",
        "vocabulary_size",
        "wall_clock_breakdown",
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
    }
)
"""Keys that DeepSpeed gets as they were written."""

REFUSED: dict[str, tuple[str, str]] = {
    "activation_checkpointing": ("would recompute routers", "Set train.activation_checkpointing."),
    "amp": ("keeps no router in fp32", "Set train.precision to bf16."),
    "aio": ("belongs to ZeRO 3", "Leave it out."),
    "autotuning": ("starts runs of its own", "Leave it out."),
    "checkpoint": ("is about checkpoints that are never written", "Set moedist's own checkpoint.* keys."),
    "comet": ("is a tracker of DeepSpeed's", "Choose sinks with log/sink."),
    "compile": ("compiles what DeepSpeed runs, and moedist runs the model", "Leave it out."),
    "csv_monitor": ("is a tracker of DeepSpeed's", "Choose sinks with log/sink; metrics.jsonl has every number."),
    "curriculum_learning": ("reads data in its own order", "Prepare the data in that order."),
    "data_efficiency": ("reads data in its own order", "Prepare the data in that order."),
    "data_parallel_size": ("lays out the ranks", "Set mesh.ep; all ranks are data parallel."),
    "dataloader_drop_last": ("is about a loader that is not used", "Leave it out."),
    "datastates": ("is about checkpoints that are never written", "Set moedist's own checkpoint.* keys."),
    "elasticity": ("changes the batch with the ranks", "Set train.global_batch_tokens."),
    "expert_parallel": ("replaces experts by DeepSpeed's own", "Set mesh.ep."),
    "flops_profiler": ("counts what DeepSpeed runs, and moedist runs the model", "Read train/mfu."),
    "fp16": ("overflows in routers and needs loss scaling", "Set train.precision to bf16."),
    "hybrid_engine": ("is for generation inside training", "Leave it out."),
    "nebula": ("is about checkpoints that are never written", "Set moedist's own checkpoint.* keys."),
    "pipeline": ("cuts the model by layers", "Leave it out: there is no pipeline axis yet."),
    "sequence_parallel_size": ("cuts sequences", "Leave it out: there is no context axis yet."),
    "tensor_parallel": ("cuts dense weights", "Leave it out: there is no tensor axis yet."),
    "tensorboard": ("is a tracker of DeepSpeed's", "Choose sinks with log/sink."),
    "torch_autocast": ("casts routers too", "Set train.precision to bf16, which keeps them in fp32."),
    "use_data_before_expert_parallelism": ("lays out the ranks", "Set mesh.ep; experts lie on neighbouring ranks."),
    "wandb": ("is a tracker of DeepSpeed's", "Choose log/sink=[wandb]."),
    "weight_quantization": ("changes the weights", "Leave it out."),
}
"""Keys of DeepSpeed that are refused while they are on: why, and what to use instead."""

ZERO_PASSED = frozenset(
    {
        "allgather_bucket_size",
        "allgather_partitions",
        "contiguous_gradients",
        "ignore_unused_parameters",
        "load_from_fp32_weights",
        "offload_optimizer",
        "overlap_comm",
        "parameter_alignment",
        "reduce_bucket_size",
        "reduce_scatter",
        "round_robin_gradients",
        "use_multi_rank_bucket_allreduce",
    }
)

OPTIMIZERS = ("Adam", "AdamW", "SGD")
"""Element by element, so that ZeRO may cut anywhere, and held to our own by tests."""

SCHEDULERS = ("LRRangeTest", "OneCycle", "WarmupLR", "WarmupDecayLR", "WarmupCosineLR")
"""Functions of the number of steps; a resume needs no more than that."""


@dataclasses.dataclass(frozen=True)
class Merged:
    """A JSON that fits the run.

    Attributes:
        settings: what DeepSpeed gets. Values of the optimizer may still be ``"auto"``: those of ``train.optimizer``.
        notes: what was filled in or changed, line by line.
    """

    settings: dict[str, Any]
    notes: tuple[str, ...]

    @property
    def stage(self) -> int:
        """Of ZeRO."""
        stage: int = self.settings["zero_optimization"]["stage"]
        return stage

    @property
    def has_optimizer(self) -> bool:
        """Whether DeepSpeed makes the optimizer."""
        return "optimizer" in self.settings

    @property
    def has_scheduler(self) -> bool:
        """Whether DeepSpeed moves the learning rates."""
        return "scheduler" in self.settings


def merge(config: Mapping[str, Any], zero_stage: int | None, step: TrainingStep, world_size: int) -> Merged:
    """Merges a user's JSON with what the run has decided.

    Args:
        config: the JSON; empty for none.
        zero_stage: ``engine.zero_stage``; None takes the JSON's, and 1 where that says nothing.
        step: what the run has decided.
        world_size: all ranks.

    Raises:
        ConfigErrors: every contradiction, every key that is refused or unknown.
    """
    return _Merge(config, step).run(zero_stage, world_size)


class _Merge:
    """One merging; collects notes and errors on the way."""

    def __init__(self, config: Mapping[str, Any], step: TrainingStep):
        self.left = copy.deepcopy(dict(config))
        self.step = step
        self.notes: list[str] = []
        self.errors: list[ConfigError] = []

    def run(self, zero_stage: int | None, world_size: int) -> Merged:
        step = self.step
        settings: dict[str, Any] = {
            "train_batch_size": self.decided(
                "train_batch_size",
                step.micro_batch * step.accumulation * world_size,
                f"the run's {step.micro_batch} rows x {step.accumulation} micro-steps x {world_size} ranks "
                "(train.micro_batch, train.global_batch_tokens)",
            ),
            "train_micro_batch_size_per_gpu": self.decided(
                "train_micro_batch_size_per_gpu", step.micro_batch, f"train.micro_batch = {step.micro_batch}"
            ),
            "gradient_accumulation_steps": self.decided(
                "gradient_accumulation_steps",
                step.accumulation,
                f"the {step.accumulation} micro-steps that train.global_batch_tokens makes",
            ),
            "zero_optimization": self.zero(zero_stage),
        }
        settings["gradient_clipping"] = self.clipping(settings["zero_optimization"]["stage"])
        self.precision()
        self.sums(settings)
        self.refuse()
        settings |= {key: self.left.pop(key) for key in list(self.left) if key in PASSED}
        self.optimizer(settings)
        self.scheduler(settings)
        known = {*settings, *PASSED, *REFUSED, "bf16", "data_types", "communication_data_type"}
        for key in self.left:
            self.unknown(key, self.left[key], known)
        if self.errors:
            raise ConfigErrors(self.errors)
        return Merged(settings, tuple(self.notes))

    def wrong(self, key: str, value: object, problem: str, remedy: str) -> None:
        self.errors.append(ConfigError(f"{KEY}.{key}", value, problem, remedy))

    def unknown(self, key: str, value: object, known: set[str]) -> None:
        name = key.rpartition(".")[2]
        near = difflib.get_close_matches(name, known, n=1)
        remedy = f"Did you mean {near[0]}?" if near else "Leave it out."
        self.wrong(key, value, "is no key of DeepSpeed's that this engine knows", remedy)

    def decided(self, key: str, value: Any, reason: str) -> Any:
        """A value that the run has decided; the JSON may say the same, ``"auto"`` or nothing."""
        given = self.left.pop(key, None)
        if given == AUTO:
            self.notes.append(f"{key}: {value}, filled in: {reason}")
        elif given is not None and given != value:
            self.wrong(key, given, f"contradicts {reason}", f'Set it to {value} or "auto", or change the run.')
        return value

    def zero(self, zero_stage: int | None) -> dict[str, Any]:
        """The section of ZeRO. Without ``"auto"``: those values have nothing to do with the run."""
        section = self.section("zero_optimization")
        given = section.pop("stage", None)
        given = None if given == AUTO else given
        stage = zero_stage if zero_stage is not None else 1 if given is None else given
        if given is not None and given != stage:
            problem = f"contradicts engine.zero_stage = {zero_stage}"
            self.wrong("zero_optimization.stage", given, problem, "Say it in one place.")
        elif stage not in (0, 1, 2):
            problem = "is no stage of this engine: DeepSpeed's own expert parallelism has none above 2"
            remedy = "Set it to 2, or use engine=native with mesh.fsdp, which shards the parameters too."
            self.wrong("zero_optimization.stage", stage, problem, remedy)
        for key, value in list(section.items()):
            place = f"zero_optimization.{key}"
            if value == AUTO:
                self.notes.append(f"{place}: DeepSpeed's default, for auto")
                del section[key]
            elif key in ("reduce_scatter", "contiguous_gradients") and value is False:
                problem = "sums experts over the wrong ranks"
                self.wrong(place, value, problem, "Set it to true, DeepSpeed's default.")
            elif key not in ZERO_PASSED and not key.startswith("stage3_"):
                self.unknown(place, value, set(ZERO_PASSED) | {"stage"})
        return {"stage": stage, **section}

    def clipping(self, stage: int) -> float:
        """DeepSpeed clips where it finds the whole model's norm."""
        clip_norm = self.step.clip_norm or 0.0
        self.decided("gradient_clipping", clip_norm, f"train.clip_norm = {self.step.clip_norm}")
        if stage == 0 and clip_norm > 0:
            self.notes.append("gradient_clipping: done by moedist at ZeRO 0, where DeepSpeed averages the ranks' norms")
            return 0.0
        return clip_norm

    def precision(self) -> None:
        """Weights and what is summed stay fp32; bf16 is autocast's, which leaves routers alone."""
        bf16 = self.section("bf16")
        enabled = bf16.get("enabled", True) if bf16 else None
        if isinstance(enabled, bool) and enabled != (self.step.precision == "bf16"):
            problem = f"contradicts train.precision = {self.step.precision}"
            self.wrong("bf16.enabled", enabled, problem, 'Set it to "auto", or change train.precision.')
        elif enabled is True:
            self.notes.append("bf16: off in DeepSpeed; moedist's autocast over fp32 weights keeps routers in fp32")
        for key, value in self.section("data_types").items():
            if value not in (AUTO, None, "fp32"):
                self.wrong(f"data_types.{key}", value, "rounds what is summed", 'Set it to "fp32" or leave it out.')
        given = self.left.pop("communication_data_type", None)
        if given not in (AUTO, None, "fp32"):
            self.wrong("communication_data_type", given, "rounds what is summed", 'Set it to "fp32" or leave it out.')

    def sums(self, settings: dict[str, Any]) -> None:
        """A rank's loss is its share of the global one, so a gradient is a sum and no divisor is DeepSpeed's."""
        settings["gradient_allreduce_op"] = "sum"
        if self.left.pop("gradient_allreduce_op", "sum") not in ("sum", AUTO):
            self.notes.append("gradient_allreduce_op: sum; a rank's loss is its share of the global mean already")
        for key in ("prescale_gradients", "gradient_predivide_factor", "managed_gradient_accumulation"):
            if self.left.pop(key, AUTO) != AUTO:
                self.notes.append(f"{key}: without effect, left out")

    def refuse(self) -> None:
        """What moedist does itself, or what would change the numbers; a section that is off goes unsaid."""
        for key, (problem, remedy) in REFUSED.items():
            value = self.left.pop(key, None)
            on = value.get("enabled", True) if isinstance(value, Mapping) else value
            if on and on != AUTO:
                self.wrong(key, value, problem, remedy)

    def optimizer(self, settings: dict[str, Any]) -> None:
        """Their optimizer takes the place of ours."""
        if "optimizer" not in settings:
            return
        section = settings["optimizer"]
        if not self.has_type("optimizer", section):
            return
        kind = section["type"]
        if kind.lower() not in map(str.lower, OPTIMIZERS):
            problem = "is none whose state this engine can save"
            self.wrong("optimizer.type", kind, problem, f"Set it to {' or '.join(OPTIMIZERS)}, or leave optimizer out.")
            return
        self.notes.append(f"optimizer: DeepSpeed's {kind}; train.optimizer is not used")
        if kind.lower() == "sgd" and "zero_allow_untested_optimizer" not in settings:
            settings["zero_allow_untested_optimizer"] = True
            self.notes.append("zero_allow_untested_optimizer: true, filled in for SGD")
        for key, value in section.setdefault("params", {}).items():
            if value == AUTO:
                self.notes.append(f"optimizer.params.{key}: that of train.optimizer, group by group, for auto")

    def scheduler(self, settings: dict[str, Any]) -> None:
        """Their scheduler takes the place of ours."""
        if "scheduler" not in settings:
            return
        section = settings["scheduler"]
        if not self.has_type("scheduler", section):
            return
        if section["type"] not in SCHEDULERS:
            near = difflib.get_close_matches(section["type"], SCHEDULERS, n=1) or SCHEDULERS
            problem = "is no scheduler that a resume could put back"
            self.wrong("scheduler.type", section["type"], problem, f"Set it to {' or '.join(near)}.")
            return
        self.notes.append(f"scheduler: DeepSpeed's {section['type']}; train.schedule is not used")
        params = section.setdefault("params", {})
        filled = {
            "total_num_steps": self.step.num_steps,
            "warmup_num_steps": max(self.step.warmup_steps, 1),  # DeepSpeed has no schedule without one
            "warmup_min_lr": 0.0,
        }
        for key, value in list(params.items()):
            if value != AUTO:
                continue
            if key in filled:
                params[key] = filled[key]
                self.notes.append(f"scheduler.params.{key}: {filled[key]}, filled in from the run")
            elif key != "warmup_max_lr":
                self.wrong(f"scheduler.params.{key}", AUTO, "is nothing that the run knows", "Give it a value.")

    def has_type(self, name: str, section: object) -> bool:
        good = (
            isinstance(section, dict)
            and isinstance(section.get("type"), str)
            and isinstance(section.get("params", {}), dict)
        )
        if not good:
            self.wrong(name, section, "says no type", f'Write {{"type": ..., "params": {{...}}}}, or leave {name} out.')
        return good

    def section(self, key: str) -> dict[str, Any]:
        """A section of the JSON, taken out."""
        value = self.left.pop(key, None)
        if isinstance(value, Mapping):
            return dict(value)
        if value not in (None, AUTO):
            self.wrong(key, value, "is no section", 'Write {"<key>": <value>}, or leave it out.')
        return {}
