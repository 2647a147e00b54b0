"""Analyzing a checkpoint: as it is measured, on the run's held-out part or on other texts, beside its siblings."""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moedist.config import ConfigError, ConfigErrors, require
from moedist.data.check import open_data
from moedist.data.contract import DataConfig
from moedist.launch.compose import Composed
from moedist.launch.evaluation import plan_evaluation
from moedist.launch.saved import decode_saved
from moedist.launch.start import Ranks
from moedist.train.checkpoint import CheckpointError
from moedist.train.checkpoint.manifest import check_sizes

REQUEST = "request.json"


@dataclasses.dataclass(frozen=True)
class Analysis:
    """What to analyze, and as what.

    Attributes:
        checkpoint: its folder, absolute.
        others: the other whole checkpoints of its run, in the order of steps.
        corpora: the texts by name, as the ``data`` of a configuration; empty for the run's held-out part.
        composed: the configuration, dropless; ``run.dir`` is the folder of the analysis.
        ranks: of this machine, which analyze it.
    """

    checkpoint: Path
    others: tuple[Path, ...]
    corpora: Mapping[str, Mapping[str, Any]]
    composed: Composed
    ranks: Ranks

    def write_request(self, folder: Path) -> Path:
        """Leaves what the ranks must know in a file; returns it."""
        path = folder / REQUEST
        others = [str(other) for other in self.others]
        request = {"checkpoint": str(self.checkpoint), "others": others, "corpora": self.corpora}
        path.write_text(json.dumps(request, indent=2) + "\n", encoding="utf-8")
        return path


def plan_analysis(
    path: Path, corpora: Sequence[str] = (), overrides: Sequence[str] = (), now: datetime.datetime | None = None
) -> Analysis:
    """Reads what a checkpoint was trained with, and what its texts are.

    Args:
        path: a checkpoint, or a run folder for its newest one.
        corpora: ``name=files``, with commas between files, globs and folders.
        overrides: as on the command line.
        now: names the folder.

    Raises:
        ConfigErrors: there is no checkpoint, it is damaged, or the rest does not fit.
    """
    plan = plan_evaluation(path, overrides, now, room="analysis")
    texts: dict[str, Mapping[str, Any]] = {}
    for corpus in corpora:
        name, _, files = corpus.partition("=")
        require(bool(name and files), "--corpus", corpus, "is no name=files", "Write --corpus python='src/**/*.py'.")
        require(name not in texts, "--corpus", corpus, "has the name of another", "Give each corpus its own name.")
        texts[name] = text_corpus(plan.composed, files.split(","))
    others = [other for other in sorted(plan.checkpoint.parent.glob("step_*")) if other != plan.checkpoint]
    return Analysis(plan.checkpoint, tuple(filter(_is_whole, others)), texts, plan.composed, plan.ranks)


def text_corpus(composed: Composed, files: Sequence[str]) -> dict[str, Any]:
    """The ``data`` of texts that are read as the run's own text was, all of them.

    Raises:
        ConfigError: nothing says how the run turned text into ids.
    """
    config = composed.config.data
    data = composed.mapping["data"]
    require(
        config.kind in ("text", "python_stdlib"),
        "--corpus",
        ",".join(files),
        f"cannot be turned into ids: data={config.kind} does not say how its text became tokens",
        "Add data=text data.tokenizer=FILE data.files=FILE, with the tokenizer of the run.",
    )
    reading = {key: data[key] for key in ("tokenizer", "text_key", "eod_id") if key in data}
    shared = {"kind": "text", "cross_documents": config.cross_documents, **reading}
    return {**shared, "files": list(files), "valid_files": list(files), "holdout_every": None}


def decode_corpora(mapping: Mapping[str, Any], corpora: Mapping[str, Mapping[str, Any]]) -> dict[str, DataConfig]:
    """The corpora of a request.

    Args:
        mapping: the saved configuration that they stand beside.
        corpora: by name.
    """
    return {name: decode_saved({**mapping, "data": data}).data for name, data in corpora.items()}


def validate_analysis(analysis: Analysis) -> None:
    """Looks whether there are routers, and opens the texts, so that what is wrong is seen before a rank starts.

    Raises:
        ConfigErrors: of all of them.
    """
    errors, config = [], analysis.composed.config
    vocab_size = open_data(config.data).vocab_size
    if not config.model.build(vocab_size, config.moe, device="meta").moe_blocks:
        problem = "is of a model without MoE layers, in which nothing is routed"
        remedy = "Name a checkpoint of another one; moedist eval measures any."
        errors.append(ConfigError("CHECKPOINT", str(analysis.checkpoint), problem, remedy))
    for name, data in decode_corpora(analysis.composed.mapping, analysis.corpora).items():
        try:
            source = open_data(data)
            require(
                source.vocab_size == vocab_size,
                "--corpus",
                name,
                f"has {source.vocab_size} token ids, and the model {vocab_size}",
                "Set data.tokenizer to the tokenizer of the run.",
            )
        except ConfigError as error:
            errors.append(ConfigError(f"--corpus {name}", error.value, error.problem, error.remedy))
    if errors:
        raise ConfigErrors(errors)


def _is_whole(checkpoint: Path) -> bool:
    try:
        check_sizes(checkpoint)
    except CheckpointError:
        return False
    return True
