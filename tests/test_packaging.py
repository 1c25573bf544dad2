"""The package metadata and the wheel: their content, and an installation with the declared dependencies only."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PYPROJECT["tool"]["setuptools"]


def package_folder(package: str) -> Path:
    """Return the source folder of a package, by `package-dir` where it names the package."""
    folders = SETUPTOOLS["package-dir"]
    return ROOT / folders.get(package, package.replace(".", "/"))


def test_every_package_is_listed() -> None:
    folders = {path.parent for path in (ROOT / "harmbench_vaccine").rglob("__init__.py")}
    folders |= {package_folder(package) for package in SETUPTOOLS["package-dir"]}
    assert {package_folder(package) for package in SETUPTOOLS["packages"]} == folders


def test_every_data_file_is_listed() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    packages = {package_folder(package): package for package in SETUPTOOLS["packages"]}
    listed = {
        path
        for package, patterns in SETUPTOOLS["package-data"].items()
        for pattern in patterns
        for path in package_folder(package).glob(pattern)
    }
    for path in map(ROOT.joinpath, tracked):
        package = next((packages[folder] for folder in path.parents if folder in packages), None)
        is_result = package == "harmbench_vaccine.suites" and path.suffix != ".yaml"  # of a suite: not in the wheel
        if package and path.exists() and path.suffix not in (".py", ".md") and not is_result:
            assert path in listed, path


def test_every_direct_dependency_of_the_tests_is_pinned() -> None:
    pinned = {line.partition("==")[0].lower() for line in (ROOT / "constraints.txt").read_text("utf-8").split()}
    project = PYPROJECT["project"]
    extras = project["optional-dependencies"]
    requirements = [
        *project["dependencies"],
        *(item for extra in ("dev", "docs", "gguf", "notebook", "ray", "slurm") for item in extras[extra]),
    ]
    for requirement in requirements:
        name = re.split(r"[<>=!~\[; ]", requirement)[0].lower()
        assert name in pinned or name == project["name"], name


def test_license_text_is_apache_2() -> None:
    assert PYPROJECT["project"]["license"] == "Apache-2.0"
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert text.lstrip().startswith("Apache License\n                           Version 2.0, January 2004")
    assert "END OF TERMS AND CONDITIONS" in text


@pytest.mark.slow
def test_wheel_installs_alone_and_lists_the_defenses(tmp_path: Path) -> None:
    def run(*command: str) -> str:
        process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert process.returncode == 0, process.stderr
        return process.stdout

    # Build from a copy: setuptools would add the files that an earlier build left in build/.
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in tracked:
        (tmp_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / "source" / name)
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(tmp_path), str(tmp_path / "source"))
    (wheel,) = tmp_path.glob("*.whl")
    archive = zipfile.ZipFile(wheel)
    names = archive.namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"harmbench_vaccine"}
    assert "harmbench_vaccine/py.typed" in names
    assert "harmbench_vaccine/defenses/vaccine.py" in names
    assert "harmbench_vaccine/attacks/ratio.py" in names
    assert "harmbench_vaccine/experiment/protocols/testbed.yaml" in names
    assert "harmbench_vaccine/reporting/testbed_report.yaml" in names
    assert "harmbench_vaccine/reporting/dry_run/model_shapes.yaml" in names
    assert "harmbench_vaccine/export/run_card.md" in names
    assert "harmbench_vaccine/testbed/words/harmful.yaml" in names
    for table in ("results.csv", "overhead.csv", "names.yaml"):
        assert f"harmbench_vaccine/published/{table}" in names
    suites = {path.name for path in (ROOT / "leaderboards").glob("*.yaml")}
    assert suites == {Path(name).name for name in names if re.fullmatch(r"harmbench_vaccine/suites/[^/]*\.yaml", name)}
    (license_file,) = (name for name in names if name.endswith("licenses/LICENSE"))
    assert archive.read(license_file) == (ROOT / "LICENSE").read_bytes()
    (metadata,) = (name for name in names if name.endswith("METADATA"))
    assert "License-Expression: Apache-2.0" in archive.read(metadata).decode()

    venv.create(tmp_path / "env", with_pip=True)
    python = str(tmp_path / "env" / "bin" / "python")
    run(python, "-m", "pip", "install", "--quiet", "-c", str(ROOT / "constraints.txt"), str(wheel))
    hbv = str(tmp_path / "env" / "bin" / "hbv")
    defenses = json.loads(run(hbv, "list", "defenses", "--json"))
    built_in = {path.stem for path in (ROOT / "defenses").glob("[!_]*.py")}
    assert set(defenses) == built_in
    # Every defense imports, so the wheel contains all files that a defense needs.
    statement = (
        f"from harmbench_vaccine.plugins.registry import DEFENSES; assert set(DEFENSES.loadable()) == {built_in!r}"
    )
    run(python, "-c", statement)
