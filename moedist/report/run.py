"""One run, read from its folder."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from moedist.config import ConfigError
from moedist.log.run_files import ATTENTION_EXPERTS, METRICS, ExpertsFile, read_metrics
from moedist.report.state import State, state_of
from moedist.train.identity import flatten
from moedist.train.status import Status, read_status

CONFIG, ENVIRONMENT = "config.yaml", "environment.json"
OLD_LOADS = re.compile(r"moe/layer_\d+/load")
"""Where rows of earlier versions kept the loads of experts, before ``experts.bin``."""


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run folder holds.

    Attributes:
        path: of the folder.
        name: for people: ``run.name`` of the configuration, or else the folder's.
        state: one word.
        status: how it ended; None for a run that has left no status.
        rows: one for each log step, by step; of a step that was done again the newest.
        replayed: steps that were done again after a resume.
        experts: arrays over MoE layers and experts.
        attention_experts: the same of attentions that route.
        config: the configuration by dotted keys, as the folder holds it: secrets are not in it.
        environment: what code ran on what machine, likewise by dotted keys.
        problems: what could not be read, as sentences.
    """

    path: Path
    name: str
    state: State
    status: Status | None
    rows: tuple[Mapping[str, Any], ...]
    replayed: tuple[int, ...]
    experts: ExpertsFile
    attention_experts: ExpertsFile
    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    problems: tuple[str, ...] = ()

    @property
    def step(self) -> int:
        """The last step with a row; 0 without one."""
        return int(self.rows[-1]["train/step"]) if self.rows else 0

    @property
    def num_steps(self) -> int | None:
        """How many it shall do."""
        steps = self.config.get("train.steps")
        return steps if isinstance(steps, int) else None

    @property
    def blocks(self) -> list[int]:
        """Of the layers with experts, from 0; empty for a model without any."""
        return next((row["moe/layers/block"] for row in reversed(self.rows) if "moe/layers/block" in row), [])

    def last(self, key: str) -> float | None:
        """The newest value of a metric that is a number; None where it was never measured."""
        return next((value for row in reversed(self.rows) if (value := number(row.get(key))) is not None), None)

    def notes(self) -> Iterator[str]:
        """What a reader should know of the run beside its numbers, as sentences."""
        if self.state == "failed" and self.status is not None:
            yield f"{self.status.message} {self.status.what_to_do}".strip()
        if self.state == "stopped":
            yield "It was stopped and has saved; run.resume=auto goes on with it."
        if self.state == "stale":
            yield "It left no status and nobody holds its folder: it was killed. Its logs may say more."
        if not self.rows:
            yield "It has recorded no log step yet." if self.state == "running" else "It has recorded no log step."
        elif not self.experts.steps and not self.attention_experts.steps:
            if any(OLD_LOADS.fullmatch(key) for key in self.rows[-1]):
                yield "An earlier version of moedist wrote it, in another form: the maps of its experts are left out."
            elif "moe/drop_rate" in self.rows[-1]:
                yield "It has no experts.bin, so the maps of its experts are left out."
            else:
                yield "Its model has no experts: what is said of them is left out."
        if self.replayed:
            first, last = self.replayed[0], self.replayed[-1]
            which = f"Step {first} was" if first == last else f"Steps {first} to {last} were"
            yield f"{which} done again after a resume; the newest numbers are shown."
        for key in dict.fromkeys(key for row in self.rows for key, value in row.items() if _is_not_finite(value)):
            steps = [row["train/step"] for row in self.rows if _is_not_finite(row.get(key))]
            times = "once" if len(steps) == 1 else f"{len(steps)} times"
            yield f"{key} was not finite {times}, first at step {steps[0]}."
        yield from self.problems


def is_run(folder: Path) -> bool:
    """Whether a folder is a run's."""
    return (folder / CONFIG).is_file() or (folder / METRICS).is_file()


def read_run(folder: Path) -> Run:
    """Reads a run folder, whole or not.

    Raises:
        ConfigError: there is no run in it.
    """
    if not is_run(folder):
        raise ConfigError(
            "RUN",
            str(folder),
            "holds no run" if folder.is_dir() else "is no folder",
            "Name a run folder, or the folder of a sweep; moedist runs lists the runs below a folder.",
        )
    problems = []
    try:
        config = flatten(_read_mapping(folder / CONFIG))
    except ValueError as error:
        config = {}
        problems.append(f"Its {CONFIG} {error}.")
    try:
        environment = flatten(_read_mapping(folder / ENVIRONMENT))
    except ValueError:
        environment = {}  # earlier versions wrote none
    try:
        written = read_metrics(folder)
    except OSError as error:
        written = []
        problems.append(f"Its {METRICS} cannot be read ({error.strerror}).")
    by_step = {row["train/step"]: row for row in written if isinstance(row["train/step"], int)}
    again = {row["train/step"] for row in by_step.values() if row.get("replayed")}
    name = config.get("run.name")
    return Run(
        path=folder,
        name=name if isinstance(name, str) and name else folder.absolute().name,
        state=state_of(folder),
        status=read_status(folder),
        rows=tuple(by_step[step] for step in sorted(by_step)),
        replayed=tuple(sorted(again)),
        experts=ExpertsFile(folder),
        attention_experts=ExpertsFile(folder, ATTENTION_EXPERTS),
        config=config,
        environment=environment,
        problems=tuple(problems),
    )


def _read_mapping(path: Path) -> Mapping[str, Any]:
    """A YAML or JSON file. Raises `ValueError` with the rest of a sentence where there is no mapping in it."""
    try:
        mapping = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError("is missing") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError("cannot be read") from error
    if not isinstance(mapping, dict):
        raise ValueError("holds no mapping of keys to values")
    return {str(key): value for key, value in mapping.items()}


def number(value: Any) -> float | None:
    """A metric's value as a finite number; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return value if math.isfinite(value) else None


def _is_not_finite(value: Any) -> bool:
    return isinstance(value, str) and value in ("NaN", "Infinity", "-Infinity")
