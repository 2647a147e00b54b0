"""How many groups of experts there are where groups follow nodes (``moe.router.groups.per_node``).

Routing depends on that number, so it may not depend on where a rank happens to run: the parent works it out once, from
the layout of the first start, and writes it to the run's configuration.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from moedist.config import Config, ConfigError
from moedist.launch.compose import Composed
from moedist.launch.folder import choose_folder, find_run
from moedist.launch.saved import CONFIG, decode_saved, read_mapping
from moedist.mesh.nodes import nodes_per_ep_group
from moedist.moe.token_choice import GroupLimit
from moedist.train.config import RunFolder

Place = tuple[str | int, ...]
"""Keys that lead to a value of nested mappings and lists."""


def follow_nodes(composed: Composed, ranks_per_node: int) -> Composed:
    """The configuration with ``num_groups`` filled in wherever groups follow nodes and nobody has set it.

    The number is that of the run which is resumed, where there is one, else how many nodes an expert-parallel group
    spans. Other configurations come back as they are.

    Args:
        composed: the configuration.
        ranks_per_node: ranks that are started on each node, where ``mesh.ranks_per_node`` says nothing else.

    Raises:
        ConfigError: an expert-parallel group begins or ends inside a node, or the number does not fit the experts.
    """
    places = list(find_open(composed.config))
    if not places:
        return composed
    mesh = composed.config.mesh
    ranks_per_node = mesh.ranks_per_node or ranks_per_node
    earlier = _earlier_mapping(composed.config.run)
    mapping = copy.deepcopy(composed.mapping)
    for place in places:
        number = _value_at(earlier, (*place, "num_groups"))
        if not isinstance(number, int):
            number = nodes_per_ep_group(mesh.ep, ranks_per_node)
        if number is None:
            raise ConfigError(
                "mesh.ep",
                mesh.ep,
                f"lets an expert-parallel group begin or end inside a node of {ranks_per_node} ranks, so groups of "
                "experts cannot follow nodes",
                f"Set mesh.ep to a divisor or a multiple of {ranks_per_node}, or {'.'.join(map(str, place))} to a "
                "num_groups without per_node.",
            )
        _value_at(mapping, place)["num_groups"] = number
    return Composed(decode_saved(mapping), mapping)


def find_open(config: Any, place: Place = ()) -> Iterator[Place]:
    """Where groups follow nodes and their number is still to be found, below ``config``."""
    if isinstance(config, GroupLimit):
        if config.num_groups is None:
            yield place
    elif isinstance(config, Config):
        for field in dataclasses.fields(config):
            yield from find_open(getattr(config, field.name), (*place, field.name))
    elif isinstance(config, dict):
        for key, value in config.items():
            yield from find_open(value, (*place, key))
    elif isinstance(config, Sequence) and not isinstance(config, str):
        for index, value in enumerate(config):
            yield from find_open(value, (*place, index))


def _earlier_mapping(run: RunFolder) -> Any:
    """The saved configuration of the run that is resumed; None for a fresh start."""
    folder: Path | None = None
    if run.resume == "auto" and run.dir is not None:
        folder = choose_folder(run)
    elif run.resume not in ("never", "auto"):
        folder = find_run(Path(run.resume))
    return read_mapping(folder / CONFIG) if folder is not None and (folder / CONFIG).is_file() else None


def _value_at(value: Any, place: Place) -> Any:
    """What stands at ``place``; None where there is nothing."""
    for key in place:
        try:
            value = value[key]
        except (KeyError, IndexError, TypeError):
            return None
    return value
