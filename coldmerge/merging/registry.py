"""Merge methods by name: ours are the modules of `methods/`, others come by entry point.

A package of a user's own registers a `Merger` in its pyproject.toml:

    [project.entry-points."coldmerge.mergers"]
    my_method = "my_package.my_module:MyMerger"
"""

from __future__ import annotations

import inspect
import pkgutil
from difflib import get_close_matches
from importlib import import_module
from typing import Any

from coldmerge.core.errors import ConfigError
from coldmerge.core.plugins import BrokenPluginError, plugin, plugin_names
from coldmerge.merging import methods
from coldmerge.merging.merger import Merger

GROUP = "coldmerge.mergers"


def merger_class(name: str) -> type[Merger]:
    """The merge method called `name`.

    Raises:
        ConfigError: there is none, or a package's entry point for it is broken.
    """
    modules = _modules()
    if name in modules:
        found = _mergers_in(modules[name])
        if name in found:
            return found[name]
    found = _ours()
    if name not in found:
        found = _plugins(name)
    if name not in found:
        close = get_close_matches(name, method_names(), 1)
        raise ConfigError(
            "merge.unknown_method",
            f"There is no merge method {name}.",
            expected=" | ".join(method_names()),
            got=name,
            hint=(f"Did you mean `{close[0]}`? " if close else "")
            + "`coldmerge methods` says what each one does.",
        )
    return found[name]


def merger(name: str, **parameters: Any) -> Merger:
    """The merge method called `name` with its own (not the inputs') parameters.

    Raises:
        ConfigError: there is none, or a parameter is unknown or out of range.
    """
    from coldmerge.merging.recipe import checked

    method = merger_class(name)
    return checked(method, parameters, method)


def method_names() -> list[str]:
    """Every merge method there is, sorted."""
    return sorted({*_ours(), *plugin_names(GROUP)})


def _modules() -> dict[str, str]:
    return {
        info.name: f"{methods.__name__}.{info.name}"
        for info in pkgutil.iter_modules(methods.__path__)
    }


def _ours() -> dict[str, type[Merger]]:
    found: dict[str, type[Merger]] = {}
    for module in _modules().values():
        found.update(_mergers_in(module))
    return found


def _mergers_in(module: str) -> dict[str, type[Merger]]:
    classes = vars(import_module(module)).values()
    return {
        item.name: item
        for item in classes
        if inspect.isclass(item)
        and issubclass(item, Merger)
        and not inspect.isabstract(item)
        and item.__module__ == module
        and hasattr(item, "name")
    }


def _plugins(name: str) -> dict[str, type[Merger]]:
    def fault(item: Any) -> str:
        sound = issubclass(item, Merger) and item.name == name and not inspect.isabstract(item)
        return "" if sound else "not a Merger of that name"

    try:
        found = plugin(GROUP, name, fault)
    except BrokenPluginError as error:
        raise ConfigError(
            "merge.broken_plugin",
            f"The merge method {name} of another package cannot be used.",
            expected=f"a subclass of coldmerge.merging.Merger at {error.target}",
            got=error.got,
            hint="Ask the package's author, or uninstall it.",
        ) from error
    return {} if found is None else {name: found}
