"""`hbv why` and `hbv schema`: what a stored run depends on, and the schema of its result."""

from __future__ import annotations

from dataclasses import asdict

import click

from .completion import stored_run
from .console import print_json, print_view


@click.command()
@click.argument("run", shell_complete=stored_run)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list: one object per artifact.")
def why(run: str, as_json: bool) -> None:
    """Explain why each stage of a run was reused or created.

    A created artifact is compared with the earlier artifact of its stage that differs in the fewest fields. RUN is a
    run id, a unique prefix of one, or a folder.

    \b
    Example: hbv why vaccine-d2
    """
    from harmbench_vaccine.core.paths import home
    from harmbench_vaccine.core.store import Store
    from harmbench_vaccine.evaluation.records import find_run, load_run, require_keys
    from harmbench_vaccine.evaluation.why import explain_run
    from harmbench_vaccine.reporting.why_view import why_view

    result, _ = load_run(find_run(run, home() / "runs"))
    require_keys(result)
    explanations = explain_run(result, Store(home() / "store"))
    if as_json:
        print_json([asdict(explanation) for explanation in explanations])
    else:
        print_view(why_view(result, explanations))


@click.command()
def schema() -> None:
    """Print the JSON schema of result.json.

    \b
    Example: hbv schema > result.schema.json
    """
    from harmbench_vaccine.evaluation.result import Result

    print_json(Result.model_json_schema(), indent=1)
