"""What can be known to be wrong before a rank starts: the parts of a configuration against each other and the world."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from moedist.config import ConfigError, ConfigErrors, require
from moedist.data.check import check_data, open_data
from moedist.data.contract import Source
from moedist.engine.contract import TrainingStep
from moedist.launch.folder import check_folder
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
    errors = check_folder(config.run, mapping)
    errors += _check("mesh", config.mesh.check_world, world_size)
    errors += _check("moe", config.moe.check_spread, config.mesh.ep)
    steps: list[TrainingStep] = []
    errors += _check("train", lambda: steps.append(config.train.optimizer_step(world_size)))
    if steps:
        errors += _check("", config.engine.check, steps[0], config.mesh, world_size)
    sources: list[Source] = []
    errors += _check("", lambda: sources.append(open_data(config.data)))
    if sources and steps:
        errors += _check("", _check_length, config, sources[0], steps[0].accumulation * world_size)
    if sources:
        errors += _check("model", config.model.build, sources[0].vocab_size, config.moe, device="meta")
    if errors:
        raise ConfigErrors(errors)
    return sources[0]


def validate_evaluation(config: RunConfig, mapping: Mapping[str, Any], world_size: int) -> None:
    """Checks a configuration for measuring a checkpoint on ``world_size`` ranks.

    Raises:
        ConfigErrors: all that is wrong, at once.
    """
    errors = check_folder(config.run, mapping)
    errors += _check("mesh", config.mesh.check_world, world_size)
    errors += _check("moe", config.moe.check_spread, config.mesh.ep)
    errors += _check("", _check_held_out, config)
    if errors:
        raise ConfigErrors(errors)


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
