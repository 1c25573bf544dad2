"""`hbv doctor`: the machine and its packages."""

from __future__ import annotations

import click

from .console import print_json, print_view


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list: one object per checked part.")
@click.pass_context
def doctor(context: click.Context, as_json: bool) -> None:
    """Check packages, hardware, disk and access to the Hub.

    Each part that fails or is missing has its fix. The exit code is 1 if a required part fails.

    \b
    Example: hbv doctor
    """
    from harmbench_vaccine.reporting.doctor import doctor_view, inspect_machine

    findings = inspect_machine()
    if as_json:
        print_json([finding.to_json() for finding in findings], indent=1)
    else:
        print_view(doctor_view(findings))
    context.exit(1 if any(finding.state == "fails" for finding in findings) else 0)
