"""Frozen dataclasses that check themselves, and their way to plain mappings."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from moedist.config.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Config:
    """The parent of every config: a frozen dataclass whose ``__post_init__`` raises `ConfigError`."""


@dataclasses.dataclass(frozen=True)
class Choice(Config):
    """A config that is one of several of a contract.

    A contract (``moedist/moe/router/contract.py``) derives its base with the path of its folder,
    ``class RouterConfig(Choice, path="moe.router")``; a choice (``moedist/moe/router/topk.py``) derives from that
    base, and its ``kind`` is its module's name. A plug-in package holds its choices under the same path.
    """

    path: ClassVar[str]
    """Where the choices of this contract lie below a package, dotted: ``moe.router``."""
    kind: ClassVar[str]
    """This choice's name: the last part of its module's name."""

    def __init_subclass__(cls, path: str | None = None, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if path is not None:
            cls.path = path
        cls.kind = cls.__module__.rpartition(".")[2]


def require(condition: bool, key: str, value: object, problem: str, remedy: str) -> None:
    """Raises `ConfigError` unless ``condition`` holds.

    >>> require(2 > 1, "top_k", 2, "is too small", "Set it to 1 or more.")
    """
    if not condition:
        raise ConfigError(key, value, problem, remedy)


def to_mapping(config: Any) -> Any:
    """A config as plain mappings, lists and scalars, each choice with its ``kind``; the decoder inverts it exactly."""
    if isinstance(config, Config):
        fields = {f.name: to_mapping(getattr(config, f.name)) for f in dataclasses.fields(config)}
        return {"kind": config.kind, **fields} if isinstance(config, Choice) else fields
    if isinstance(config, dict):
        return {key: to_mapping(value) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return [to_mapping(value) for value in config]
    return config
