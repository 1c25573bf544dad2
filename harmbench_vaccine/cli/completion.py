"""Names that shell completion offers for options and arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress

import click

from harmbench_vaccine.core.errors import HbvError

Completer = Callable[[click.Context, click.Parameter, str], list[str]]


def _completer(names: Callable[[], Iterable[str]]) -> Completer:
    def complete(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
        with suppress(HbvError, OSError):
            return [name for name in names() if name.startswith(incomplete)]
        return []

    return complete


def plugin_names(*kinds: str) -> Completer:
    """Return a completer of the installed plug-ins of some kinds, such as "defenses"."""

    def names() -> Iterable[str]:
        from harmbench_vaccine.plugins import registry

        return [name for kind in kinds for name in getattr(registry, kind.upper()).entries()]

    return _completer(names)


@_completer
def protocol_name() -> Iterable[str]:
    """Complete the name of a built-in protocol."""
    from harmbench_vaccine.experiment.protocol import protocol_names

    return protocol_names()


@_completer
def suite_name() -> Iterable[str]:
    """Complete the name of a suite that ships with the package."""
    from harmbench_vaccine.sweeps.suite import suite_names

    return suite_names()


@_completer
def described_name() -> Iterable[str]:
    """Complete a name that `hbv info` describes: a plug-in, a protocol or a model."""
    from harmbench_vaccine.experiment.protocol import protocol_models, protocol_names
    from harmbench_vaccine.plugins.registry import REGISTRIES

    plugins = [name for registry in REGISTRIES for name in registry.entries()]
    return sorted({*plugins, *protocol_names(), *protocol_models()})


@_completer
def over_refusal_name() -> Iterable[str]:
    """Complete the name of an over-refusal set."""
    from harmbench_vaccine.data.over_refusal import OVER_REFUSAL

    return list(OVER_REFUSAL)


@_completer
def stored_run() -> Iterable[str]:
    """Complete the id of a stored run."""
    from harmbench_vaccine.core.paths import home
    from harmbench_vaccine.evaluation.run_overview import RESULT

    return sorted(path.parent.name for path in (home() / "runs").glob(f"*/{RESULT}"))
