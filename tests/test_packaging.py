"""The wheel: what it holds, and that it works with nothing but its dependencies."""

from __future__ import annotations

import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_wheel_installs_alone_and_lists_the_defenses(tmp_path: Path) -> None:
    def run(*command: str) -> str:
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    # A copy, since setuptools would put what an earlier build left in build/ into this wheel.
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in tracked:
        (tmp_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / "source" / name)
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(tmp_path), str(tmp_path / "source"))
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"harmbench_vaccine"}
    assert "harmbench_vaccine/defenses/vaccine.py" in names
    assert "harmbench_vaccine/attacks/ratio.py" in names
    assert "harmbench_vaccine/protocols/testbed.yaml" in names
    assert "harmbench_vaccine/testbed/report.yaml" in names
    for table in ("results.csv", "overhead.csv", "names.yaml"):
        assert f"harmbench_vaccine/published/{table}" in names

    venv.create(tmp_path / "env", with_pip=True)
    python = str(tmp_path / "env" / "bin" / "python")
    run(python, "-m", "pip", "install", "--quiet", "-c", str(ROOT / "constraints.txt"), str(wheel))
    hbv = str(tmp_path / "env" / "bin" / "hbv")
    listed = run(hbv, "list", "defenses").split()
    built_in = {path.stem for path in (ROOT / "defenses").glob("[!_]*.py")}
    assert set(listed) == built_in
    # every defense imports, so nothing that it needs was left out of the wheel
    run(
        python, "-c", f"from harmbench_vaccine.registry import DEFENSES; assert set(DEFENSES.healthy()) == {built_in!r}"
    )
