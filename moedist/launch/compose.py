"""Composes a run's configuration with Hydra, once, in one process.

Hydra never sees the dataclasses: their defaults are registered as plain mappings (``<kind>_defaults`` of each group,
``run_defaults`` for all that is no choice), so that every key shows and an override needs no ``+``. Types and values
are checked afterwards (moedist.launch.decode).
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import typing
import warnings
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.plugins.config_source import ConfigLoadError
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from omegaconf.resolvers import oc

import moedist
from moedist.config import Choice, Config, ConfigError, ConfigErrors, names_secret, to_mapping
from moedist.launch.choices import check_plugins, choose_one_of, is_contract, list_choices
from moedist.launch.decode import MISSING, decode, field_types, has_default, without_none
from moedist.launch.saved import interpolation_error
from moedist.train.config import RunConfig

ROOT = "config"
"""Name of the root of conf/."""

MARK = "<from the environment>"

BEHAVIOUR: Any = {"version_base": "1.3"} if hydra.__version__.startswith("1.3.") else {}
"""Which version's behaviour Hydra shall have: 1.3 asks, 1.4 has one only and warns of the answer."""


@dataclasses.dataclass(frozen=True)
class Composed:
    """A composed configuration.

    Attributes:
        config: decoded; what the run does.
        mapping: the same as plain mappings, for `<run>/config.yaml`. A value that came from ``${oc.env:...}`` stays
            unresolved, so that no secret is written to disk (moedist.launch.saved resolves it).
    """

    config: RunConfig
    mapping: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Group:
    """One place of a configuration that is a choice.

    Attributes:
        base: the contract.
        key: dotted key of the value (``moe.router``).
        many: whether the value maps names to choices (``moe.balance``).
    """

    base: type[Choice]
    key: str
    many: bool

    @property
    def name(self) -> str:
        """Hydra's name of the group (``moe/router``)."""
        return self.base.path.replace(".", "/")


def conf_folder(package: str = "moedist") -> Path | None:
    """The folder ``conf/`` of a package: inside an installed one, beside it in a checkout; None where it has none."""
    if package == "moedist":
        root = Path(moedist.__file__).parent
        return next(path for path in (root / "conf", root.parent / "conf") if (path / f"{ROOT}.yaml").is_file())
    spec = find_spec(package)
    for location in (spec.submodule_search_locations if spec else None) or ():
        for path in (Path(location) / "conf", Path(location).parent / "conf"):
            if path.is_dir():
                return path
    return None


def compose(overrides: Sequence[str] = ()) -> Composed:
    """Composes, resolves and decodes ``conf/`` with overrides as on the command line.

    Raises:
        ConfigErrors: everything that is wrong with the overrides or with the values.
    """
    return _settle(compose_yaml(overrides))


def compose_onto(saved: Mapping[str, Any], overrides: Sequence[str] = ()) -> Composed:
    """A saved configuration with overrides: values by their keys, choices by their groups.

    Args:
        saved: plain mappings, as `Composed.mapping`.
        overrides: as on the command line; recipes (``experiment=``) are none of a saved configuration.

    Raises:
        ConfigErrors: everything that is wrong with the overrides or with the values.
    """
    parsed = parse_overrides(overrides)
    plugins = list(dict.fromkeys([*saved.get("plugins", ()), *_plugins(parsed)]))
    check_plugins(plugins)
    groups = {group.name: group.key for group in find_groups(plugins=plugins)}
    chosen = [override for override in parsed if override.key_or_group in groups]
    composed = OmegaConf.create(dict(saved))
    composed.plugins = plugins
    OmegaConf.set_struct(composed, True)
    if chosen:
        lines = [str(override.input_line) for override in chosen]
        fresh = compose_yaml(["experiment=null", f"plugins=[{','.join(plugins)}]", *lines])
        for override in chosen:
            key = groups[override.key_or_group]
            OmegaConf.update(composed, key, OmegaConf.select(fresh, key), merge=False, force_add=True)
    errors = []
    for override in parsed:
        if override in chosen or override.key_or_group == "plugins":
            continue
        error = None if override.is_add() else _unknown_key(composed, override)
        if error is not None:
            errors.append(error)
        elif override.is_delete():
            parent, _, name = override.key_or_group.rpartition(".")
            with open_dict(composed):
                del OmegaConf.select(composed, parent or "")[name]
        else:
            OmegaConf.update(composed, override.key_or_group, override.value(), merge=True, force_add=override.is_add())
    if errors:
        raise ConfigErrors(errors)
    return _settle(composed)


def _settle(composed: DictConfig) -> Composed:
    """Completes, resolves and decodes what was composed."""
    composed = with_layers_completed(composed)
    try:
        resolved = typing.cast("dict[str, Any]", OmegaConf.to_container(composed, resolve=True))
        mapping = typing.cast("dict[str, Any]", _without_secrets(composed, resolved))
    except OmegaConfBaseException as error:
        raise ConfigErrors([interpolation_error(error)]) from error
    try:
        config = decode(RunConfig, resolved, resolved["plugins"])
    except ConfigErrors as errors:
        raise ConfigErrors(_hide_secret(error, mapping) for error in errors.errors) from None
    if found := list(_open_secrets(mapping, "")):
        raise ConfigErrors(found)
    return Composed(config, mapping)


def with_layers_completed(composed: DictConfig) -> DictConfig:
    """Fills up the MoE layers of single blocks: what such a ``moe`` leaves out is the run's own ``moe``, so that a
    block names only what differs (``{ffn: {kind: moe, moe: {capacity: {factor: 2.0}}}}``). A part of another kind is
    not mixed with the run's. ``{balance: {switch: null}}`` leaves one way to balance out, ``{balance: {}}`` all.
    """
    plain = typing.cast("dict[str, Any]", OmegaConf.to_container(composed, resolve=False))

    def complete(value: Any) -> Any:
        if isinstance(value, list):
            return [complete(inner) for inner in value]
        if not isinstance(value, dict):
            return value
        completed = {key: complete(inner) for key, inner in value.items()}
        own = completed.get("moe")
        if isinstance(own, dict):
            completed["moe"] = moe = _changed(plain["moe"], own)
            # The block of a saved run is whole already: what it lacks was left out there.
            if own.keys() >= plain["moe"].keys():
                moe["balance"] = own["balance"]
            elif isinstance(own.get("balance"), dict):
                methods = moe["balance"].items() if own["balance"] else ()
                moe["balance"] = {name: method for name, method in methods if method is not None}
        return completed

    return OmegaConf.create({**plain, "model": complete(plain["model"])})


def _changed(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with other values, branch by branch."""

    def value_of(key: str) -> Any:
        was, now = base.get(key), changes[key]
        if not isinstance(was, dict) or not isinstance(now, dict) or now.get("kind") not in (None, was.get("kind")):
            return now
        return _changed(was, now)

    return {**base, **{key: value_of(key) for key in changes}}


def compose_yaml(overrides: Sequence[str] = ()) -> DictConfig:
    """The composed configuration with every key and default, unresolved: what ``--cfg job`` prints.

    Raises:
        ConfigErrors: keys or choices that do not exist, each with the nearest one that does.
    """
    parsed = parse_overrides(overrides)
    with open_conf(parsed) as fixed:
        try:
            return hydra.compose(ROOT, overrides=fixed)
        except (HydraException, OmegaConfBaseException, ValueError) as error:
            _check_names(parsed, fixed)
            raise ConfigErrors([hydra_error(error)]) from error


@contextlib.contextmanager
def open_conf(parsed: Sequence[Override]) -> Iterator[list[str]]:
    """Hydra at ``conf/``, with every default registered and the plug-ins' folders found.

    Yields:
        the overrides as Hydra wants them, with what plug-ins add.
    """
    plugins = _plugins(parsed)
    if plugins and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # where the ranks, started with `python -m`, find modules too
    check_plugins(plugins)
    register_defaults(plugins)
    folders = [folder for folder in map(conf_folder, plugins) if folder is not None]
    fixed = [_plain(override) for override in parsed]
    if folders:
        quoted = ",".join(f"'file://{folder}'" for folder in folders)
        fixed.append(f"hydra.searchpath=[{quoted}]")
    if plugins:
        fixed.append(f"plugins=[{','.join(plugins)}]")
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(conf_folder()), job_name="moedist", **BEHAVIOUR):
        yield fixed


def find_groups(config_class: type[Config] = RunConfig, key: str = "", plugins: Sequence[str] = ()) -> Iterator[Group]:
    """Every place below ``key`` that is chosen by a group of ``conf/``, those inside choices too.

    A choice that lies elsewhere than its contract's path (one spec in a list of layers) has no group: it is written
    out as a mapping.
    """
    for name, annotation in field_types(config_class).items():
        place, inner = f"{key}.{name}" if key else name, without_none(annotation)
        group = _as_group(inner, place)
        if group is not None:
            yield group
            for choice in list_choices(group.base, plugins).values():
                yield from find_groups(choice, group.base.path, plugins)
        elif _is_plain_config(annotation):
            yield from find_groups(inner, place, plugins)


def register_defaults(plugins: Sequence[str] = ()) -> None:
    """Puts the defaults of the run and of each choice into Hydra's store as plain mappings."""
    register(None, "run_defaults", default_mapping(RunConfig, ""))
    for group in find_groups(plugins=plugins):
        for kind, choice in list_choices(group.base, plugins).items():
            node = {"kind": kind, **default_mapping(choice, group.base.path)}
            register(group.name, f"{kind}_defaults", node)


def register(group: str | None, name: str, node: dict[str, Any]) -> None:
    """Puts plain mappings into Hydra's store, once: it warns of what is stored again."""
    store = ConfigStore.instance()
    try:
        stored = store.load(f"{group}/{name}.yaml" if group else f"{name}.yaml").node
    except ConfigLoadError:
        stored = None
    if stored is None or OmegaConf.to_container(stored) != node:
        store.store(group=group, name=name, node=node)


def default_mapping(config_class: type[Config], key: str) -> dict[str, Any]:
    """A config's defaults as plain mappings, without what a group of ``conf/`` chooses; ``???`` where there is none.

    Made from the fields, not from an instance: a config may refuse its own defaults (a list of files that is empty).
    """
    mapping: dict[str, Any] = {}
    hints = field_types(config_class)
    for field in dataclasses.fields(config_class):
        place, inner = f"{key}.{field.name}" if key else field.name, without_none(hints[field.name])
        group = _as_group(inner, place)
        if group is not None:
            if group.many:
                mapping[field.name] = {}
            elif inner is not hints[field.name]:
                mapping[field.name] = None
        elif _is_plain_config(hints[field.name]):
            mapping[field.name] = default_mapping(inner, place)
        elif not has_default(field):
            mapping[field.name] = MISSING
        elif field.default is not dataclasses.MISSING:
            mapping[field.name] = to_mapping(field.default)
        else:
            mapping[field.name] = to_mapping(typing.cast(Any, field.default_factory)())
    return mapping


def _is_plain_config(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Config) and not issubclass(annotation, Choice)


def _as_group(annotation: Any, place: str) -> Group | None:
    """The group that chooses the value at ``place``, if one does."""
    if is_contract(annotation) and annotation.path == place:
        return Group(annotation, place, many=False)
    if typing.get_origin(annotation) is dict and is_contract(typing.get_args(annotation)[1]):
        base = typing.get_args(annotation)[1]
        if place in (base.path, f"{base.path}s"):  # log.sinks maps names to choices of log.sink
            return Group(base, place, many=True)
    return None


def parse_overrides(overrides: Sequence[str], *, several: bool = False) -> list[Override]:
    """The overrides in Hydra's grammar.

    Args:
        several: whether one may name several values, as in a sweep.

    Raises:
        ConfigErrors: those that are none.
    """
    parsed, errors = [], []
    for text in overrides:
        try:
            override = OverridesParser.create().parse_override(text)
        except HydraException as error:
            key, _, value = text.partition("=")
            problem = f"cannot be read ({str(error).splitlines()[0]})"
            errors.append(ConfigError(key, value, problem, "Write key=value, and odd text as 'key=\"odd text\"'."))
            continue
        if override.is_sweep_override() and not several:
            errors.append(
                ConfigError(
                    override.key_or_group,
                    text.partition("=")[2],
                    "names several values, and this command makes one run",
                    "Give one value, or add -m for a sweep with a run for each; a list is written [a,b].",
                )
            )
        parsed.append(override)
    if errors:
        raise ConfigErrors(errors)
    return parsed


def _plain(override: Override) -> str:
    """The override as Hydra wants it: ``experiment=null`` takes the group's default away."""
    if override.key_or_group == "experiment" and override.value() is None:
        return "~experiment"
    return str(override.input_line)


def _plugins(parsed: Sequence[Override]) -> list[str]:
    """Plug-in packages of the environment and of the command line, in this order, each once."""
    named = [name.strip() for name in os.environ.get("MOEDIST_PLUGINS", "").split(",")]
    for override in parsed:
        if override.key_or_group == "plugins":
            value = override.value()
            if not isinstance(value, list):
                raise ConfigErrors([ConfigError("plugins", value, "is not a list", f"Write plugins=[{value}].")])
            named += [str(name) for name in value]
    return list(dict.fromkeys(name for name in named if name))


def _check_names(parsed: Sequence[Override], fixed: Sequence[str]) -> None:
    """Raises `ConfigErrors` for overrides of keys or choices that don't exist: all, where Hydra stops at the first."""
    loader = GlobalHydra.instance().config_loader()
    errors: list[ConfigError] = []
    values: list[Override] = []
    for override in parsed:
        name = override.key_or_group
        options = loader.get_group_options(
            name, config_name=ROOT, overrides=[f for f in fixed if f.startswith("hydra.")]
        )
        options = [option for option in options if not option.endswith("_defaults")]
        if not options:
            values.append(override)
            continue
        value = override.value()
        wanted = value if isinstance(value, list) else [] if value is None else [value]
        for choice in wanted:
            if str(choice) not in options:
                remedy = choose_one_of(str(choice), options)
                errors.append(ConfigError(name, choice, f"is no choice of {name}", remedy))
    if errors:
        raise ConfigErrors(errors)
    groups = [text for text, override in zip(fixed, parsed, strict=False) if override not in values]
    extra = list(fixed[len(parsed) :])
    try:
        composed = hydra.compose(ROOT, overrides=[*groups, *extra])
    except (HydraException, OmegaConfBaseException, ValueError):
        return  # said better by the composition proper
    for override in values:
        key = override.key_or_group
        if not override.is_add() and not override.is_force_add() and not key.startswith("hydra."):
            error = _unknown_key(composed, override)
            errors += [error] if error else []
    if errors:
        raise ConfigErrors(errors)


def _unknown_key(composed: DictConfig, override: Override) -> ConfigError | None:
    """What is wrong with the key of an override, if it leads nowhere."""
    key = override.key_or_group
    node: Any = composed
    parts = key.split(".")
    for i, part in enumerate(parts):
        if not isinstance(node, DictConfig):
            return None  # a value inside a list or text: the decoder's matter
        if part not in node:
            known = {".".join([*parts[:i], str(name)]) for name in node}
            remedy = choose_one_of(".".join(parts[: i + 1]), known)
            value = None if override.is_delete() else override.value()
            return ConfigError(key, value, "is not a known key", remedy.replace("Choose one of", "Known keys here"))
        if OmegaConf.is_interpolation(node, part) or OmegaConf.is_missing(node, part):
            return None
        node = node[part]
    return None


def hydra_error(error: Exception) -> ConfigError:
    """What Hydra refused, in one sentence."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    problem = (lines[0] if lines else type(error).__name__).rstrip(".")
    return ConfigError("configuration", ROOT, f"cannot be composed: {problem}", "See `moedist train --cfg job`.")


def _without_secrets(composed: DictConfig, resolved: Any) -> Any:
    """``resolved`` with every value that depends on the environment as it was written.

    Found by resolving once more with ``oc.env`` giving a mark, so that a reference to such a value counts too.
    """

    def mark(key: str, default: object = None) -> str:
        return MARK

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="register_new_resolver", category=UserWarning)  # its name in 2.3
        OmegaConf.register_new_resolver("oc.env", mark, replace=True)
        try:
            marked = OmegaConf.to_container(composed, resolve=True)
        finally:
            OmegaConf.register_new_resolver("oc.env", oc.env, replace=True)

    def choose(raw: Any, value: Any, marked_value: Any) -> Any:
        if isinstance(raw, dict):
            return {key: choose(raw[key], value[key], marked_value[key]) for key in raw}
        if isinstance(raw, list):
            return [choose(*items) for items in zip(raw, value, marked_value, strict=True)]
        literal = isinstance(value, str) and "${" in value  # was escaped, and will be read as YAML again
        return raw if literal or value != marked_value else value

    return choose(OmegaConf.to_container(composed, resolve=False), resolved, marked)


def _open_secrets(value: Any, key: str) -> Iterator[ConfigError]:
    """An error for each text that stands in the open below a key that names a secret. Parts of one's own may have such
    keys: what they hold would go to the run folder, to trackers and into every checkpoint."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _open_secrets(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for place, inner in enumerate(value):
            yield from _open_secrets(inner, f"{key}.{place}" if isinstance(inner, dict) else key)
    elif isinstance(value, str) and value and names_secret(key) and "${" not in value:
        remedy = f"Set an environment variable and name it: {key}='${{oc.env:NAME}}'."
        yield ConfigError(key, value, "is a secret in the open, and would be written to the run folder", remedy)


def _hide_secret(error: ConfigError, mapping: Any) -> ConfigError:
    """The error, naming the variable instead of a value that came from the environment."""
    written = mapping
    for part in error.key.split("."):
        written = written.get(part) if isinstance(written, dict) else None
    if isinstance(written, str) and "${" in written:
        return ConfigError(error.key, written, error.problem, error.remedy)
    return error
