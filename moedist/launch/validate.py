"""What can be known to be wrong before a rank starts: the parts of a configuration against each other and the world."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable, Mapping
from typing import Any

from moedist.config import ConfigError, ConfigErrors, require
from moedist.data.check import check_data, open_data, stated_vocab_size
from moedist.data.contract import Source
from moedist.engine.contract import TrainingStep
from moedist.launch.folder import check_folder
from moedist.launch.resume import check_resume
from moedist.model.contract import LanguageModel
from moedist.moe.layer import MoE
from moedist.moe.routed import RoutedLayer
from moedist.train.build import PARAMETER_DTYPES
from moedist.train.config import RunConfig


def validate(config: RunConfig, mapping: Mapping[str, Any], world_size: int) -> Source:
    """Checks a configuration for a run on ``world_size`` ranks; changes nothing on disk.

    Each config has checked itself when it was decoded; here they meet: mesh and world, experts and mesh, batch and
    world, engine and step, data and batch, model and data, folder and what lies in it.

    Args:
        config: decoded.
        mapping: the same as plain mappings (`Composed.mapping`), to compare with a run that is resumed.
        world_size: all ranks.

    Returns:
        the opened corpus.

    Raises:
        ConfigErrors: all that is wrong, at once.
    """
    errors = _check_parts(config, mapping, world_size) + _check("launch", config.launch.check_start)
    errors += _check("train", _check_compiler, config.train.compile)
    source, data_errors = _check_data(config, world_size)
    errors += data_errors
    if source is not None:
        errors += _check_model(config, mapping, source.vocab_size)
    if errors:
        raise ConfigErrors(errors)
    assert source is not None
    return source


@dataclasses.dataclass(frozen=True)
class Data:
    """What is known of the data on a machine that need not have it.

    Attributes:
        vocab_size: number of token ids.
        source: the opened corpus; None where it cannot be opened here.
        errors: what keeps a run from using it here.
    """

    vocab_size: int
    source: Source | None
    errors: tuple[ConfigError, ...] = ()

    def describe(self) -> str:
        """One line."""
        if self.errors or self.source is None:
            return f"not ready on this machine: {' '.join(map(str, self.errors))}"
        return self.source.describe()


def validate_dry_run(config: RunConfig, mapping: Mapping[str, Any], world_size: int) -> Data:
    """Checks a configuration for a dry run of ``world_size`` ranks; changes nothing on disk.

    On one node as `validate`. A run of several nodes may be planned where none of them is: `validate_elsewhere`.

    Raises:
        ConfigErrors: all that is wrong, at once.
    """
    if config.launch.nnodes > 1:
        return validate_elsewhere(config, mapping, world_size)
    source = validate(config, mapping, world_size)
    return Data(source.vocab_size, source)


def validate_elsewhere(config: RunConfig, mapping: Mapping[str, Any], world_size: int) -> Data:
    """Checks a configuration on a machine that will not run it: it needs no rendezvous, and what is wrong with its data
    is told and not refused, if the configuration says the number of token ids.

    Raises:
        ConfigErrors: all else that is wrong, at once.
    """
    errors = _check_parts(config, mapping, world_size)
    source, data_errors = _check_data(config, world_size)
    vocab_size = source.vocab_size if source is not None else stated_vocab_size(config.data)
    if vocab_size is None:
        raise ConfigErrors([*errors, *data_errors])
    errors += _check_model(config, mapping, vocab_size)
    if errors:
        raise ConfigErrors(errors)
    return Data(vocab_size, source, tuple(data_errors))


def validate_estimate(config: RunConfig, world_size: int) -> int:
    """Checks a configuration that nobody starts: neither its folder nor its rendezvous matter, nor its data if the
    configuration says the number of token ids. Returns that number.

    Raises:
        ConfigErrors: all else that is wrong, at once.
    """
    errors, sizes = _check_layout(config, world_size), list[int]()
    errors += _check("", lambda: sizes.append(vocab_size_of(config)))
    if errors:
        raise ConfigErrors(errors)
    return sizes[0]


def vocab_size_of(config: RunConfig) -> int:
    """The number of token ids: as stated, or that of the opened corpus.

    Raises:
        ConfigError: neither is there.
    """
    return stated_vocab_size(config.data) or open_data(config.data).vocab_size


def accepts(config: RunConfig, world_size: int) -> bool:
    """Whether a run could lay itself out so."""
    return not _check_layout(config, world_size)


def _check_parts(config: RunConfig, mapping: Mapping[str, Any], world_size: int) -> list[ConfigError]:
    """What is wrong beside the data, and what depends on it."""
    return check_folder(config.run, mapping) + _check_layout(config, world_size)


def _check_layout(config: RunConfig, world_size: int) -> list[ConfigError]:
    """What is wrong with the ranks: mesh and world, experts and mesh, batch and world, engine and step."""
    errors = _check("mesh", config.mesh.check_world, world_size)
    layout = config.mesh.ep, config.ranks_per_node(world_size)
    errors += _check("moe", config.moe.check_spread, *layout)
    errors += _check("model", config.model.check_spread, *layout)
    if config.alike is not None and config.mesh.ep > 1:
        errors += _check("model", config.model.check_alike, config.alike)
    for name, sink in config.log.sinks.items():
        errors += _check(f"log.sinks.{name}", sink.check)
    step, step_errors = _optimizer_step(config, world_size)
    errors += step_errors
    if step is not None:
        engine_errors = _check("", config.engine.check, step, config.mesh, world_size)
        errors += engine_errors
        if not engine_errors and (reason := config.engine.one_order(step, world_size)) is not None:
            errors += _check("model", config.model.check_order, reason)
    errors += _check("train.optimizer", _check_optimizer, config)
    return errors


def _check_optimizer(config: RunConfig) -> None:
    reason = config.engine.cuts_anywhere
    require(
        config.train.optimizer.element_by_element or reason is None,
        "kind",
        config.train.optimizer.kind,
        f"does not update each number for itself, and {reason}",
        "Set train/optimizer to adamw, or engine to native without engine.offload.",
    )


def _optimizer_step(config: RunConfig, world_size: int) -> tuple[TrainingStep | None, list[ConfigError]]:
    steps: list[TrainingStep] = []
    errors = _check("train", lambda: steps.append(config.train.optimizer_step(world_size)))
    return (steps[0] if steps else None), errors


def _check_data(config: RunConfig, world_size: int) -> tuple[Source | None, list[ConfigError]]:
    """The opened corpus, if there is one, and what is wrong with it."""
    opened: list[Source] = []
    errors = _check("", lambda: opened.append(open_data(config.data)))
    step, _ = _optimizer_step(config, world_size)
    if opened and step is not None:
        errors += _check("", _check_length, config, opened[0], step.accumulation * world_size)
    return (opened[0] if opened else None), errors


def _check_model(config: RunConfig, mapping: Mapping[str, Any], vocab_size: int) -> list[ConfigError]:
    """What is wrong with the model, and with a checkpoint to fill it from."""
    built: list[LanguageModel] = []
    dtype = PARAMETER_DTYPES[config.train.precision]

    def build() -> None:
        model = config.model.build(vocab_size, config.moe, device="meta", dtype=dtype)
        for layer in model.modules():
            if isinstance(layer, RoutedLayer):  # no trace speaks of the layers of attentions
                layer.router.check_model(model.moe_blocks if isinstance(layer, MoE) else ())
        built.append(model)

    errors = _check("model", build)
    return errors + [error for model in built for error in _check("", check_resume, config, mapping, model)]


def validate_evaluation(config: RunConfig, mapping: Mapping[str, Any], world_size: int) -> None:
    """Checks a configuration for measuring a checkpoint on ``world_size`` ranks.

    Raises:
        ConfigErrors: all that is wrong, at once.
    """
    errors = check_folder(config.run, mapping)
    errors += _check("mesh", config.mesh.check_world, world_size)
    errors += _check("moe", config.moe.check_spread, config.mesh.ep, config.ranks_per_node(world_size))
    errors += _check("", _check_held_out, config)
    if errors:
        raise ConfigErrors(errors)


def _check_compiler(what: str) -> None:
    names = (*os.environ.get("CXX", "").split()[:1], "g++", "clang++")
    require(
        what == "none" or any(map(shutil.which, names)),
        "compile",
        what,
        f"needs a C++ compiler, and this machine has none of {', '.join(names)}",
        "Install g++, or set train.compile to none.",
    )


def _check_held_out(config: RunConfig) -> None:
    held_out = open_data(config.data).documents("valid").num_tokens
    require(
        held_out >= 2,
        "data",
        config.data.kind,
        f"holds out {held_out} tokens, and an evaluation needs at least 2",
        "Set data.valid_files or data.holdout_every, or measure on other data.",
    )


def _check_length(config: RunConfig, source: Source, micro_batches: int) -> None:
    check_data(
        config.data,
        source,
        sequence_length=config.train.sequence_length,
        global_samples=micro_batches * config.train.micro_batch,
        evaluates=config.train.eval_every is not None,
    )


def _check(prefix: str, function: Callable[..., object], *args: object, **kwargs: object) -> list[ConfigError]:
    """What ``function`` refuses, its keys below ``prefix`` unless they are there already."""
    try:
        function(*args, **kwargs)
    except ConfigErrors as errors:
        return [_under(prefix, error) for error in errors.errors]
    except ConfigError as error:
        return [_under(prefix, error)]
    return []


def _under(prefix: str, error: ConfigError) -> ConfigError:
    known = error.key.startswith((f"{prefix}.", "moe."))  # a model speaks of the run's MoE layer by its full key
    return error if known else error.under(prefix)
