"""Finds the choices of a contract: modules of one folder, in moedist and in plug-in packages of the same layout."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import pkgutil
from collections.abc import Iterable, Sequence
from types import ModuleType

from moedist.config import Choice, ConfigError, require

ROOT = "moedist"
"""The package whose choices are always there; plug-ins add theirs below the same paths."""


def is_contract(annotation: object) -> bool:
    """Whether ``annotation`` is the base of a folder of choices (declared with ``path=``) and not one of them."""
    return inspect.isclass(annotation) and issubclass(annotation, Choice) and "path" in vars(annotation)


def exported_choice(module: ModuleType, base: type[Choice]) -> type[Choice] | None:
    """The one config of contract ``base`` that ``module`` defines; None for a module that is no choice.

    Raises:
        TypeError: it defines several, a mistake of the module's author.
    """
    found = [
        value
        for value in vars(module).values()
        if inspect.isclass(value) and issubclass(value, base) and value.__module__ == module.__name__
    ]
    found = [value for value in found if value is not base]
    if len(found) > 1:
        names = ", ".join(value.__name__ for value in found)
        raise TypeError(f"{module.__name__} defines several configs of {base.__name__} ({names}); a choice has one")
    return found[0] if found else None


def list_choices(base: type[Choice], plugins: Sequence[str] = ()) -> dict[str, type[Choice]]:
    """Every choice of a contract by its kind: moedist's own, then those of ``plugins``.

    Raises:
        ConfigError: a plug-in cannot be imported, or brings a kind that is there already.
    """
    choices: dict[str, type[Choice]] = {}
    for package in (ROOT, *plugins):
        for name in _module_names(f"{package}.{base.path}"):
            choice = exported_choice(importlib.import_module(name), base)
            if choice is None:
                continue
            require(
                choice.kind not in choices,
                "plugins",
                list(plugins),
                f"brings a second {base.path} of the kind {choice.kind!r}",
                f"Rename {name}: a kind is found in one package only.",
            )
            choices[choice.kind] = choice
    return choices


def find_choice(base: type[Choice], kind: str, plugins: Sequence[str] = ()) -> type[Choice]:
    """The config class of one choice: the module ``<package>.<base.path>.<kind>``.

    Raises:
        ConfigError: no package has it; the remedy names the known kinds.
    """
    for package in (ROOT, *plugins):
        name = f"{package}.{base.path}.{kind}"
        if kind.isidentifier() and name in _module_names(f"{package}.{base.path}"):
            choice = exported_choice(importlib.import_module(name), base)
            if choice is not None:
                return choice
    known = list(list_choices(base, plugins))
    raise ConfigError("kind", kind, f"is no choice of {base.path}", choose_one_of(kind, known))


def choose_one_of(wrong: str, known: Iterable[str]) -> str:
    """A remedy: the name that was probably meant, and all there are."""
    names = sorted(known)
    near = difflib.get_close_matches(wrong, names, n=1)
    listed = f"Choose one of: {', '.join(names)}." if names else "There is none."
    return f"Did you mean {near[0]}? {listed}" if near else listed


def check_plugins(plugins: Sequence[str]) -> None:
    """Raises `ConfigError` unless every plug-in can be imported."""
    for name in plugins:
        try:
            found = importlib.util.find_spec(name) is not None
        except (ImportError, ValueError):
            found = False
        require(
            found,
            "plugins",
            list(plugins),
            f"names {name!r}, which cannot be imported",
            "Install the package, or put its parent folder on PYTHONPATH.",
        )


def _module_names(package: str) -> list[str]:
    """Full names of the modules in ``package``; none where there is no such package."""
    try:
        spec = importlib.util.find_spec(package)
    except ModuleNotFoundError:  # a parent is missing: a plug-in has only the folders it adds to
        return []
    if spec is None or spec.submodule_search_locations is None:
        return []
    modules = pkgutil.iter_modules(spec.submodule_search_locations)
    return [f"{package}.{m.name}" for m in modules if not m.ispkg and m.name != "contract"]
