"""The losses of 20-step stages through the real command line, against a committed reference.

If these numbers change, the method changes: batches, masks, gradients, optimizer or schedule. After an intended change,
write a new reference, and give the reason in the commit:

    python tests/test_trajectory.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from support.world import make_world

REFERENCE = Path(__file__).parent / "reference" / "trajectory.json"
DEFENSES = ("sft", "vaccine")


def trajectories(folder: Path) -> dict[str, dict[str, list[dict[str, float]]]]:
    """Return defense -> stage -> log of one `hbv run` in a separate process."""
    protocol, home = make_world(folder / "world"), folder / "home"
    command = [sys.executable, "-m", "harmbench_vaccine", "run", "--protocol", str(protocol), "--json"]
    command += ["--attack", "ratio=0.25", *(word for defense in DEFENSES for word in ("--defense", defense))]
    environment = {**os.environ, "HBV_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr
    results = [json.loads(line) for line in ran.stdout.splitlines()]
    assert [result["defense"] for result in results] == list(DEFENSES)
    logs: dict[str, dict[str, Any]] = {defense: {} for defense in DEFENSES}
    aligned: dict[str, str] = {}  # key of the alignment artifact -> defense
    for stage in ("align", "finetune"):
        for file in sorted((home / "store" / stage).glob("*/artifact.json")):
            artifact = json.loads(file.read_text(encoding="utf-8"))
            inputs = artifact["inputs"]
            if stage == "align":
                # `sft` has no defense that acts in this stage.
                aligned[artifact["key"]] = defense = inputs["defense"][0]["name"] if inputs["defense"] else "sft"
            else:
                defense = aligned[inputs["model"]["align"]]
            assert stage not in logs[defense]
            logs[defense][stage] = json.loads((file.parent / "log.json").read_text(encoding="utf-8"))
    return logs


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, list[dict[str, float]]]]:
    return trajectories(tmp_path_factory.mktemp("trajectory"))


@pytest.mark.cpu_numbers
@pytest.mark.parametrize("stage", ["align", "finetune"])
@pytest.mark.parametrize("defense", DEFENSES)
def test_losses_equal_the_reference(logs: Any, defense: str, stage: str) -> None:
    reference = json.loads(REFERENCE.read_text(encoding="utf-8"))[defense][stage]
    log = logs[defense][stage]
    assert len(log) == len(reference) == 20
    for key in ("step", "learning_rate", "loss", "grad_norm"):
        # Processors sum in different orders, and 20 steps amplify the difference.
        tolerance = 1e-3 if key == "grad_norm" else 1e-4
        assert [entry[key] for entry in log] == pytest.approx([entry[key] for entry in reference], rel=tolerance), key


def test_defenses_differ_from_the_first_alignment_step(logs: Any) -> None:
    sft, vaccine = logs["sft"]["align"], logs["vaccine"]["align"]
    assert vaccine[0]["loss"] > sft[0]["loss"] * 1.01  # the same batch and weights, with a perturbation
    assert logs["sft"]["finetune"][0]["loss"] != logs["vaccine"]["finetune"][0]["loss"]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        REFERENCE.parent.mkdir(exist_ok=True)
        REFERENCE.write_text(json.dumps(trajectories(Path(scratch)), indent=1) + "\n", encoding="utf-8")
    print(REFERENCE)
