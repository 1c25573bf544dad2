"""`hbv doctor`: the machine and its packages."""

from __future__ import annotations

import click

from .console import print_json, print_line


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list.")
def doctor(as_json: bool) -> None:
    """Check packages, device and cache folder.

    \b
    Example: hbv doctor
    """
    from harmbench_vaccine.reporting.doctor import inspect_machine

    findings = inspect_machine()
    if as_json:
        print_json(findings, indent=1)
    else:
        for finding in findings:
            print_line(f"{'ok  ' if finding['ok'] else '--  '}{finding['what']:<16} {finding['detail']}")
