"""Find what a name refers to, of every kind, and describe it: `hbv info`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from rich.console import RenderableType

from harmbench_vaccine.core.errors import BadInput, unknown_name
from harmbench_vaccine.core.paths import home
from harmbench_vaccine.evaluation.records import find_run
from harmbench_vaccine.experiment.protocol import is_protocol_file, load_protocol, protocol_names
from harmbench_vaccine.plugins import Plugin
from harmbench_vaccine.plugins.registry import REGISTRIES, Registry, is_plugin_path

from .plugin_pages import plugin_details, plugin_page
from .protocol_pages import model_facts, model_page, protocol_details, protocol_page


def describe_name(name: str, protocol: str | None = None) -> list[dict[str, Any]]:
    """Describe everything that has a name, at most one thing of each kind.

    Args:
        name: The name of a plug-in, protocol or model, or the file of a plug-in or protocol.
        protocol: A protocol that overrides parameters of plug-ins.

    Raises:
        BadInput: The name is unknown, a plug-in cannot be imported, or a protocol is not valid.
    """
    loaded = load_protocol(protocol) if protocol else None
    models = {facts["name"]: facts for facts in model_facts()}
    if name in models:
        return [models[name]]
    if is_protocol_file(name):
        return [protocol_details(name)]
    if is_plugin_path(name):
        return [plugin_details(Registry(Plugin, "harmbench_vaccine").get(name), loaded)]
    plugins = [registry for registry in REGISTRIES if name.replace("-", "_") in registry.entries()]
    pages = [plugin_details(registry.get(name), loaded) for registry in plugins]
    if name in protocol_names():
        pages.append(protocol_details(name))
    if not pages:
        raise _unknown(name, [*protocol_names(), *models])
    return pages


def _unknown(name: str, further: list[str]) -> BadInput:
    """Return the error for a name that nothing has; the id of a run has its own commands."""
    if re.search("-[0-9a-f]+$", name):
        with suppress(BadInput):
            run = find_run(name, home() / "runs").name
            return BadInput(f"{name!r} is a stored run; describe it with `hbv show {run}` or `hbv why {run}`.")
    names = {known for registry in REGISTRIES for known in registry.entries()}
    return unknown_name("name", name, {*names, *further})


def info_page(details: Mapping[str, Any]) -> RenderableType:
    """Build the page of whatever `describe_name` found."""
    pages = {"protocol": protocol_page, "model": model_page}
    return pages.get(details["kind"], plugin_page)(details)
