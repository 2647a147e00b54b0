"""Everything that can stand on a command line as ``key=value`` or ``group=choice``, as lists for completion."""

from __future__ import annotations

import typing
from collections.abc import Iterator
from typing import Any, Literal

from moedist.config import Choice, Config
from moedist.launch.choices import list_choices
from moedist.launch.compose import ROOT, conf_folder, find_groups
from moedist.launch.decode import field_types, without_none
from moedist.train.config import RunConfig


def list_keys() -> dict[str, tuple[str, ...]]:
    """Every key of every choice, with the values that it may take where they can be counted."""
    keys = dict(_keys_of(RunConfig, ""))
    for group in find_groups():
        for kind, choice in list_choices(group.base).items():
            keys |= _keys_of(choice, f"{group.key}.{kind}." if group.many else f"{group.key}.")
    return dict(sorted(keys.items()))


def list_groups() -> dict[str, tuple[str, ...]]:
    """Every folder of ``conf/`` and what can be picked there: parts, presets (``moe``) and recipes (``experiment``)."""
    folder = conf_folder()
    assert folder is not None, "moedist has its conf/"
    groups: dict[str, list[str]] = {}
    for path in sorted(folder.rglob("*.yaml")):
        name = path.parent.relative_to(folder).as_posix()
        if path.stem != ROOT:
            groups.setdefault(name, []).append(path.stem)
    return {name: tuple(choices) for name, choices in sorted(groups.items())}


def _keys_of(config_class: type[Config], prefix: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    for name, annotation in field_types(config_class).items():
        inner = without_none(annotation)
        if isinstance(inner, type) and issubclass(inner, Config):
            if not issubclass(inner, Choice):
                yield from _keys_of(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", _values_of(inner)


def _values_of(annotation: Any) -> tuple[str, ...]:
    if annotation is bool:
        return ("true", "false")
    return tuple(map(str, typing.get_args(annotation))) if typing.get_origin(annotation) is Literal else ()
