"""The claim in miniature, through the real command: harm comes back gradually, and the testbed is a fair place."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_quick_report_holds(own_home: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "harmbench_vaccine.cli", "testbed", "report", "--quick", "--json"],
        capture_output=True,
        text=True,
    )
    report = json.loads(done.stdout)
    print(json.dumps(report["checks"], indent=1))
    assert done.returncode == 0, [check for check in report["checks"] if not check["holds"]]
    assert report["holds"]
    assert len(report["checks"]) == 8
    # harm comes back with more harmful rows: the phenomenon that the testbed exists for
    curve = report["harmful"]["sft"]
    assert curve["0.1"]["mean"] > curve["0.0"]["mean"] + 20

    model = subprocess.run(
        [sys.executable, "-m", "harmbench_vaccine.cli", "testbed", "path"], capture_output=True, text=True, check=True
    ).stdout.strip()
    assert {path.name for path in Path(model).iterdir()} >= {"model", "judge", "data", "testbed.json"}
