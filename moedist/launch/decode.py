"""Plain mappings to typed configs, every error at once.

The walk over nested configs is ours, because a choice is found by its ``kind`` (moedist.launch.choices) and every
error must carry its full dotted key; single values are checked by pydantic, strictly: ``"4"`` is not 4.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import json
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import pydantic

from moedist.config import Choice, Config, ConfigError, ConfigErrors
from moedist.launch.choices import find_choice, is_contract

ConfigT = TypeVar("ConfigT", bound=Config)

MISSING = "???"
"""OmegaConf's mark of a mandatory value that nobody gave."""


def decode(config_class: type[ConfigT], mapping: Mapping[str, Any], plugins: Sequence[str] = ()) -> ConfigT:
    """A config from plain mappings, as `moedist.config.to_mapping` or a composed YAML gives them.

    Keys that are left out take their defaults. Inverts `to_mapping` exactly: lists become tuples where a field says
    so, and ``kind`` names the class of a choice.

    Args:
        plugins: packages that hold further choices.

    Raises:
        ConfigErrors: unknown keys, wrong types, unknown kinds and what the configs themselves refuse, all at once.
    """
    decoder = _Decoder(tuple(plugins))
    value = decoder.config(config_class, mapping, "")
    if decoder.errors:
        raise ConfigErrors(decoder.errors)
    return typing.cast(ConfigT, value)


class _Bad:
    """Stands for a value that could not be decoded; its error has been noted."""


_BAD = _Bad()


class _Decoder:
    """One decoding: collects errors on the way."""

    def __init__(self, plugins: tuple[str, ...]):
        self.plugins = plugins
        self.errors: list[ConfigError] = []

    def wrong(self, key: str, value: object, problem: str, remedy: str) -> _Bad:
        self.errors.append(ConfigError(key or "configuration", value, problem, remedy))
        return _BAD

    def config(self, config_class: type[Config], mapping: object, key: str) -> Any:
        """One config of a known class."""
        if not isinstance(mapping, Mapping):
            return self.wrong(key, mapping, "is not a mapping of keys to values", f"Write {key}.<key>=<value>.")
        fields = {field.name: field for field in dataclasses.fields(config_class) if field.init}
        for name in mapping:
            if name not in fields:
                self.wrong(_join(key, name), mapping[name], "is not a known key", _nearest(str(name), fields, key))
        values = {}
        hints = field_types(config_class)
        for name, field in fields.items():
            given = mapping.get(name, MISSING)
            if isinstance(given, str) and given == MISSING:
                if name in mapping or not has_default(field):
                    values[name] = self.wrong(
                        _join(key, name), None, "is not set and has no default", f"Write {_join(key, name)}=<value>."
                    )
                continue
            values[name] = self.value(hints[name], given, _join(key, name))
        if any(value is _BAD for value in values.values()) or any(name not in fields for name in mapping):
            return _BAD
        try:
            return config_class(**values)
        except ConfigErrors as errors:
            self.errors += [error.under(key) for error in errors.errors]
        except ConfigError as error:
            self.errors.append(error.under(key))
        return _BAD

    def choice(self, base: type[Choice], mapping: object, key: str) -> Any:
        """One config of a contract, its class named by ``kind``."""
        group = base.path.replace(".", "/")
        if isinstance(mapping, str):
            return self.wrong(
                key, mapping, "is not a mapping with a kind", f"Choose with a slash: {group}={mapping or '<kind>'}."
            )
        if not isinstance(mapping, Mapping) or not isinstance(mapping.get("kind"), str):
            return self.wrong(key, mapping, "says no kind", f"Write {key}.kind=<kind>, or choose with {group}=<kind>.")
        kind = mapping["kind"]
        if is_contract(base):
            try:
                choice = find_choice(base, kind, self.plugins)
            except ConfigError as error:
                self.errors.append(error.under(key))
                return _BAD
        elif kind == base.kind:
            choice = base
        else:
            return self.wrong(_join(key, "kind"), kind, "cannot be chosen here", f"Set it to {base.kind}.")
        return self.config(choice, {name: value for name, value in mapping.items() if name != "kind"}, key)

    def value(self, annotation: Any, value: object, key: str) -> Any:
        """One field's value."""
        if not _holds_config(annotation):
            return self.leaf(annotation, value, key)
        origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
        if inspect.isclass(annotation) and issubclass(annotation, Choice):
            return self.choice(annotation, value, key)
        if inspect.isclass(annotation) and issubclass(annotation, Config):
            return self.config(annotation, value, key)
        if origin in (typing.Union, types.UnionType):
            if value is None and type(None) in arguments:
                return None
            (inner,) = (argument for argument in arguments if argument is not type(None))
            return self.value(inner, value, key)
        if origin is dict:
            if not isinstance(value, Mapping):
                return self.wrong(key, value, "is not a mapping of names", f"Write {key}.<name>=<value>.")
            decoded = {name: self.value(arguments[1], inner, _join(key, name)) for name, inner in value.items()}
            return _BAD if any(inner is _BAD for inner in decoded.values()) else decoded
        if origin in (tuple, list):
            if not isinstance(value, Sequence) or isinstance(value, str):
                return self.wrong(key, value, "is not a list", f"Write {key}=[...].")
            items = [self.value(arguments[0], inner, f"{key}.{i}") for i, inner in enumerate(value)]
            return _BAD if any(item is _BAD for item in items) else origin(items)
        raise TypeError(f"{key}: a config cannot hold {annotation}")

    def leaf(self, annotation: Any, value: object, key: str) -> Any:
        """A value without configs in it: pydantic checks it as JSON, where a list may become a tuple."""
        try:
            return _adapter(annotation).validate_json(json.dumps(value))
        except pydantic.ValidationError as problems:
            return self.wrong(key, value, *_explain(annotation, problems))
        except TypeError:
            return self.wrong(key, value, f"is a {type(value).__name__}, which no key takes", "Write a plain value.")


def field_types(config_class: type[Config]) -> dict[str, Any]:
    """The resolved annotations of a config's fields, by name."""
    hints = typing.get_type_hints(config_class)
    return {field.name: hints[field.name] for field in dataclasses.fields(config_class)}


def has_default(field: dataclasses.Field[Any]) -> bool:
    """Whether a field may be left out."""
    return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING


def without_none(annotation: Any) -> Any:
    """``X`` of ``X | None``; any other annotation as it is."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        inner = [argument for argument in typing.get_args(annotation) if argument is not type(None)]
        if len(inner) == 1:
            return inner[0]
    return annotation


def _holds_config(annotation: Any) -> bool:
    if inspect.isclass(annotation) and issubclass(annotation, Config):
        return True
    return any(_holds_config(argument) for argument in typing.get_args(annotation))


@functools.cache
def _adapter(annotation: Any) -> pydantic.TypeAdapter[Any]:
    return pydantic.TypeAdapter(annotation, config=pydantic.ConfigDict(strict=True))


def _join(key: str, name: object) -> str:
    return f"{key}.{name}" if key else str(name)


def _nearest(name: str, known: Mapping[str, object], key: str) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    if near:
        return f"Did you mean {_join(key, near[0])}?"
    return f"Known keys here: {', '.join(known)}." if known else "There are no keys here: leave it out."


def _describe(annotation: Any) -> str:
    """A type in users' words."""
    if annotation is None or annotation is type(None):
        return "null"
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_describe(argument) for argument in arguments)
    if origin is typing.Literal:
        return " or ".join("null" if argument is None else str(argument) for argument in arguments)
    if origin in (tuple, list):
        inner = [argument for argument in arguments if argument is not Ellipsis]
        names = ", ".join(dict.fromkeys(_describe(argument) for argument in inner))
        return f"a list ({names})" if origin is list or Ellipsis in arguments else f"a list of {len(inner)} ({names})"
    if origin is dict:
        return f"a mapping of names to values ({_describe(arguments[1])})"
    plain = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return plain.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _explain(annotation: Any, problems: pydantic.ValidationError) -> tuple[str, str]:
    """Problem and remedy of a value that its field does not take."""
    if typing.get_origin(without_none(annotation)) is typing.Literal:
        return "is not one of its choices", f"Set it to {_describe(annotation)}."
    places = {".".join(str(part) for part in error["loc"] if isinstance(part, int)) for error in problems.errors()}
    place = next(iter(sorted(places)), "")
    where = f" (at place {place})" if place else ""
    return f"has the wrong type{where}", f"Set it to {_describe(annotation)}."
