"""`hbv store`: space is counted once, a cleanup keeps what runs and processes need, and damage is found."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from harmbench_vaccine.core.store import META, Store
from harmbench_vaccine.data.sources import TESTBED_VERSION
from harmbench_vaccine.evaluation.records import save_run
from harmbench_vaccine.evaluation.run_overview import RESULT
from support.cli import hbv
from support.results import make_result

ROW = {"when": "after", "set": "harmful", "id": "1", "instruction": "a", "input": "", "target": "", "answer": "b"}


def write(text: str) -> Callable[[Path, Path], None]:
    return lambda folder, checkpoints: (folder / "file").write_text(text) and None


@dataclass
class Shop:
    """A home with artifacts written by hand, and the artifacts that each of its runs needs."""

    home: Path
    needs: dict[str, set[str]] = field(default_factory=dict)
    """Run -> its artifacts, as `stage/key`."""

    @property
    def store(self) -> Store:
        return Store(self.home / "store")

    def add(self, stage: str, **inputs: Any) -> str:
        """Create an artifact of 1000 bytes, and return its key."""
        return self.store.get_or_create(stage, inputs, write("x" * 1000)).key

    def chain(self, name: str, align: str = "a", *, seed: int = 0) -> set[str]:
        """Create the artifacts of one run; runs with the same `align` share those of the alignment stage."""
        base = {"base": "b", "align": self.add("align", name=align, model={"base": "b"}, settings={})}
        tuned = {**base, "finetune": self.add("finetune", name=name, seed=seed, model=base, settings={})}
        before, after = self.add("answer", model=base), self.add("answer", model=tuned)
        return {
            f"align/{base['align']}",
            f"finetune/{tuned['finetune']}",
            f"answer/{before}",
            f"answer/{after}",
            f"score/{self.add('score', answers=before)}",
            f"score/{self.add('score', answers=after)}",
            f"drift/{self.add('drift', aligned=base, final=tuned)}",
        }

    def run(self, name: str, align: str = "a", *, folder: Path | None = None, **fields: Any) -> None:
        """Store a run; its result names only its verdicts and its drift, which depend on everything else."""
        names = self.chain(name, align)
        self.needs[name] = names
        artifacts = {
            f"{number}": {"key": Path(path).name, "path": str(self.store.root / path), "seconds": 1.0, "cached": False}
            for number, path in enumerate(sorted(names))
            if path.startswith(("score/", "drift/"))
        }
        result = make_result(run=name, stages={"score": {"seconds": 1, "cached": False, "artifacts": artifacts}})
        result = result.model_copy(update=fields)
        save_run(result, [ROW], folder or self.home / "runs", self.home / "results.csv")

    def names(self) -> set[str]:
        """List the artifacts in the store."""
        paths = [path for path in self.store.root.glob("*/*") if not path.parent.name.startswith(".")]
        return {f"{path.parent.name}/{path.name}" for path in paths}

    def command(self, *args: object) -> Any:
        done = hbv("store", *args, "--json", home=self.home)
        assert done.code == 0, done.err
        return json.loads(done.out)

    def set_age(self, name: str, days: float) -> None:
        """Change the time in the description of an artifact, which is not part of a checksum that is tested here."""
        file = self.store.root / name / META
        values = json.loads(file.read_text())
        file.write_text(json.dumps({**values, "created": (datetime.now(UTC) - timedelta(days=days)).isoformat()}))


@pytest.fixture
def shop(own_home: Path) -> Shop:
    return Shop(own_home)


# ---------------------------------------------------------------------------------------------------------------------
# Cleanup


@pytest.mark.parametrize("seed", range(5))
def test_no_selection_removes_what_a_kept_run_needs(seed: int, shop: Shop, tmp_path: Path) -> None:
    draw = random.Random(seed)
    protocols = {}
    for number in range(4):
        name, protocols[f"run-{number}"] = f"run-{number}", draw.choice(["p", "q"])
        folder = draw.choice([None, tmp_path / "out"])
        shop.run(name, draw.choice(["a", "b"]), folder=folder, protocol=protocols[name])
    unused = shop.chain("interrupted", draw.choice(["a", "c"])) - set().union(*shop.needs.values())
    unused.add(f"nested/{shop.add('nested', model={'base': 'other'})}")
    dropped = draw.sample(sorted(shop.needs), draw.randrange(3))
    by_protocol = draw.choice([[], [draw.choice(list(protocols.values()))]])
    is_kept = {run: run not in dropped and protocols[run] not in by_protocol for run in shop.needs}
    needed = set().union(*(shop.needs[run] for run in shop.needs if is_kept[run]))
    selected = set().union(*(shop.needs[run] for run in shop.needs if not is_kept[run])) - needed
    expected = selected if dropped or by_protocol else unused
    age = draw.choice([None, 30])
    everything = shop.names()
    if age:
        old = set(draw.sample(sorted(everything), len(everything) // 2))
        expected &= old
        for name in old:
            shop.set_age(name, 31)
    options = [*(f"--run={run}" for run in dropped), *(f"--protocol={name}" for name in by_protocol)]
    options += [f"--older-than={age}d"] if age else []
    plan = shop.command("gc", *options)
    assert (plan["removed"], set(plan["artifacts"])) == (False, expected)
    assert shop.names() == everything
    done = shop.command("gc", *options, "--yes")
    assert (done["removed"], set(done["artifacts"])) == (True, expected)
    assert shop.names() == everything - expected
    assert needed <= shop.names()
    assert shop.command("gc", *options, "--yes")["artifacts"] == []


def test_cleanup_reports_the_bytes_that_become_free(shop: Shop) -> None:
    shop.run("a")
    name = f"align/{shop.add('align', number=1)}"
    linked = shop.store.root / f"align/{shop.add('align', number=2)}"
    size = sum(path.stat().st_size for path in (shop.store.root / name).iterdir())
    (shop.home / "copy").mkdir()
    os.link(linked / "file", shop.home / "copy" / "file")
    plan = shop.command("gc")
    assert len(plan["artifacts"]) == 2
    assert plan["size"] == size + (linked / META).stat().st_size  # the other file has a further link
    text = hbv("store", "gc").out
    assert "Add --yes to remove them." in text
    assert "Removed 2 folders" in hbv("store", "gc", "--yes").out
    assert hbv("store", "gc", "--yes").out == "Nothing to remove.\n"


def test_an_artifact_that_another_process_creates_stays_and_is_not_counted(shop: Shop) -> None:
    free, locked = (shop.add("align", number=number) for number in (1, 2))
    size = sum(path.stat().st_size for path in (shop.store.root / "align" / free).iterdir())
    with shop.store.locked("align", locked):
        done = shop.command("gc", "--yes")
    assert (done["artifacts"], done["in_use"], done["size"]) == ([f"align/{free}"], [f"align/{locked}"], size)
    assert shop.names() == {f"align/{locked}"}


def test_results_and_answers_of_a_dropped_run_stay(shop: Shop) -> None:
    shop.run("first")
    shop.run("second")
    assert shop.command("gc", "--run", "fir", "--yes")["dropped"] == ["first"]
    assert (shop.home / "runs" / "first" / RESULT).exists()
    assert hbv("show", "first").code == 0
    assert shop.needs["second"] <= shop.names()
    assert not (shop.needs["first"] - shop.needs["second"]) & shop.names()


def test_nested_training_stays_with_a_run_that_starts_from_its_model(shop: Shop) -> None:
    shop.run("a")
    nested = shop.add("nested", model={"base": "b"})
    assert shop.command("gc")["artifacts"] == []
    assert set(shop.command("gc", "--run", "a")["artifacts"]) == {*shop.needs["a"], f"nested/{nested}"}


@pytest.mark.parametrize("place", ["{store}/{name}/model", "store/{name}/model", "/moved/store/{name}/model", "{link}"])
def test_base_model_in_the_store_stays(place: str, shop: Shop, tmp_path: Path) -> None:
    align = shop.add("align", name="below")
    name = f"finetune/{shop.add('finetune', model={'base': 'b', 'align': align})}"
    (tmp_path / "link").symlink_to(shop.store.root / name / "model")
    assert set(shop.command("gc")["artifacts"]) == {name, f"align/{align}"}
    shop.run("a", model=place.format(store=shop.store.root, name=name, link=tmp_path / "link"))
    assert shop.command("gc")["artifacts"] == []


def test_testbed_stays(shop: Shop) -> None:
    shop.add("testbed", version=TESTBED_VERSION)
    old = f"testbed/{shop.add('testbed', version=-1)}"
    shop.run("a")
    assert shop.command("gc")["artifacts"] == [old]
    shop.run("b", judge="testbed:judge")  # of an unknown version
    assert shop.command("gc")["artifacts"] == []


def test_a_link_to_a_shared_artifact_is_removed_without_its_target(shop: Shop, tmp_path: Path) -> None:
    artifact = shop.store.root / "align" / shop.add("align", number=1)
    shared = tmp_path / "shared" / artifact.name
    shared.parent.mkdir()
    shutil.move(artifact, shared)
    artifact.symlink_to(shared)
    assert shop.command("verify")["faults"] == []
    assert shop.command("gc", "--yes")["size"] == 0
    assert not os.path.lexists(artifact)
    assert (shared / META).exists()


def test_a_shared_store_keeps_the_artifacts_of_every_home(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop.run("a")
    other = Shop(tmp_path / "other")
    other.home.mkdir()
    (other.home / "store").symlink_to(shop.store.root)
    assert other.command("gc")["artifacts"] == []
    monkeypatch.setenv("HBV_HOME", str(other.home))
    other.run("b")
    assert other.needs["b"] <= shop.names()
    assert shop.command("gc")["artifacts"] == []
    shutil.rmtree(other.home / "runs")
    assert set(shop.command("gc")["artifacts"]) == other.needs["b"] - shop.needs["a"]


def test_runs_of_the_table_without_a_folder_are_named(shop: Shop) -> None:
    shop.run("a")
    shop.run("b", align="b")
    shutil.rmtree(shop.home / "runs" / "b")
    plan = shop.command("gc")
    assert "runs without a folder (1): b." in plan["notes"][0]
    assert set(plan["artifacts"]) == shop.needs["b"]


def test_nothing_is_removed_if_the_needs_of_a_run_are_not_known(shop: Shop) -> None:
    shop.run("a")
    name = f"align/{shop.add('align', number=1)}"
    result = shop.home / "runs" / "a" / RESULT
    text = result.read_text()
    result.write_text(text[:50])
    for damaged in (text[:50], json.dumps({**json.loads(text), "stages": {}})):
        result.write_text(damaged)
        refused = hbv("store", "gc", "--yes")
        assert (refused.code, refused.out) == (1, "")
        assert str(result.parent) in refused.sentence
        assert "nothing is removed" in refused.sentence
        assert name in shop.names()


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (("gc", "--run", "nothing"), ("Unknown run 'nothing'", "first, second")),
        (("gc", "--protocol", "tine"), ("Unknown protocol 'tine'", "Did you mean 'tiny'?")),
        (("gc", "--older-than", "30"), ("'30' is not an age", "12h or 30d")),
        (("gc", "--older-than", "-1d"), ("'-1d' is not an age",)),
        (("ls", "--stage", "finetun"), ("Unknown stage 'finetun'", "Did you mean 'finetune'?")),
        (("ls", "--protocol", "x"), ("Unknown protocol 'x'", "tiny")),
        (("du", "--by", "size"), ("Unknown value 'size' of --by", "age, protocol, run, stage")),
        (("dux",), ("Unknown command 'dux'", "Did you mean 'du'?")),
    ],
)
def test_bad_input(args: tuple[str, ...], parts: tuple[str, ...], shop: Shop) -> None:
    shop.run("first")
    shop.run("second")
    before = sorted(shop.home.rglob("*"))
    refused = hbv("store", *args, home=shop.home)
    assert (refused.code, refused.out) == (2, "")
    assert all(part in refused.sentence for part in parts), refused.sentence
    assert sorted(shop.home.rglob("*")) == before


@pytest.mark.parametrize("command", ["du", "ls", "gc", "verify"])
def test_a_home_without_a_store(command: str, own_home: Path) -> None:
    done = hbv("store", command)
    assert done.code == 0
    assert not own_home.exists()


# ---------------------------------------------------------------------------------------------------------------------
# Other processes


@pytest.fixture
def process(shop: Shop) -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    """Start a process that uses the store and prints a line when it is ready; it ends with the test."""
    started = []

    def start(script: str) -> subprocess.Popen[str]:
        head = "import sys, time\nfrom pathlib import Path\nfrom harmbench_vaccine.core.store import Store\n"
        head += "store = Store(Path(sys.argv[1]))\n"
        child = subprocess.Popen(
            [sys.executable, "-c", head + textwrap.dedent(script), str(shop.store.root)],
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(child)
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        return child

    yield start
    for child in started:
        child.kill()
        child.communicate()


def test_artifacts_of_a_running_process_stay_until_it_ends(
    shop: Shop, process: Callable[[str], subprocess.Popen[str]]
) -> None:
    align = shop.add("align", number=1)
    answers = shop.add("answer", model={"align": align})
    other = shop.add("align", number=2)
    child = process(
        f"""
        store.get_or_create("answer", {{"model": {{"align": "{align}"}}}}, None)
        print("ready", flush=True)
        time.sleep(60)
        """
    )
    plan = shop.command("gc", "--yes")
    assert plan["artifacts"] == [f"align/{other}"]
    assert plan["in_use"] == [f"align/{align}", f"answer/{answers}"]  # with the artifact that it depends on
    assert shop.names() == {f"align/{align}", f"answer/{answers}"}
    child.kill()
    child.wait()
    assert set(shop.command("gc", "--yes")["artifacts"]) == {f"align/{align}", f"answer/{answers}"}
    assert not list((shop.store.root / ".use").glob("*.marks"))


def test_a_plan_leaves_the_marks_that_a_process_is_about_to_lock(shop: Shop) -> None:
    marks = shop.store.root / ".use" / "0123.marks"  # as between the creation of the file and its lock
    marks.parent.mkdir(parents=True)
    marks.touch()
    unused = shop.add("align", number=1)
    assert shop.command("gc")["artifacts"] == [f"align/{unused}"]
    assert marks.exists()
    shop.command("gc", "--yes")  # which no process marks meanwhile
    assert not marks.exists()


def test_unfinished_work_of_a_running_process_stays(
    shop: Shop, process: Callable[[str], subprocess.Popen[str]]
) -> None:
    child = process(
        """
        def create(folder, checkpoints):
            (folder / "part").write_text("x")
            (checkpoints / "checkpoint").write_text("x")
            print("ready", flush=True)
            time.sleep(60)
        store.get_or_create("align", {"a": 1}, create)
        """
    )
    folders = [path for name in (".aside", ".work") for path in (shop.store.root / name).iterdir()]
    for folder in folders:
        for path in (folder, *folder.rglob("*")):
            os.utime(path, (0, 0))
    assert shop.command("gc", "--checkpoints", "--yes")["unfinished"] == []
    child.kill()
    child.wait()
    assert shop.command("gc", "--yes")["unfinished"] == [str(folders[0])]
    assert not folders[0].exists()
    assert folders[1].exists()
    assert shop.command("gc", "--checkpoints", "--yes")["unfinished"] == [str(folders[1])]
    assert not folders[1].exists()


def test_young_unfinished_work_stays(shop: Shop) -> None:
    folder = shop.store.root / ".work" / "align-0123"
    folder.mkdir(parents=True)
    assert shop.command("gc", "--checkpoints", "--yes")["unfinished"] == []
    os.utime(folder, (0, 0))
    assert shop.command("gc", "--checkpoints", "--older-than=30d")["unfinished"] == [str(folder)]


def test_a_process_that_reads_and_creates_meanwhile_never_fails(
    shop: Shop, process: Callable[[str], subprocess.Popen[str]]
) -> None:
    child = process(
        """
        def create(folder, checkpoints):
            (folder / "file").write_text("x" * 1000)
        print("ready", flush=True)
        end = time.monotonic() + 1
        number = 0
        while time.monotonic() < end:
            store = Store(Path(sys.argv[1]))  # the marks of the earlier one end
            artifact = store.get_or_create("align", {"number": number % 3}, create)
            assert (artifact.path / "file").read_text() == "x" * 1000
            assert len(artifact.json("artifact.json")["files"]) == 1
            number += 1
        """
    )
    removed = 0
    while child.poll() is None:
        removed += len(shop.command("gc", "--yes")["artifacts"])
    assert child.returncode == 0
    assert removed > 3


# ---------------------------------------------------------------------------------------------------------------------
# Space


def test_space_counts_every_file_once(shop: Shop, tmp_path: Path) -> None:
    shop.run("a")
    first, second = (shop.store.root / "align" / shop.add("align", number=number) for number in range(2))
    (second / "file").unlink()
    os.link(first / "file", second / "file")
    (shop.home / "link").symlink_to(first)
    files = {path.stat().st_ino: path.stat().st_size for path in shop.store.root.rglob("*") if path.is_file()}
    aligned = [path for path in (shop.store.root / "align").rglob("*") if path.is_file()]
    assert len({path.stat().st_ino for path in aligned}) == len(aligned) - 1
    space = shop.command("du")
    assert space["size"] == sum(files.values())
    rows = {row["name"]: row for row in space["rows"]}
    assert rows["align"]["size"] == sum({path.stat().st_ino: path.stat().st_size for path in aligned}.values())
    assert rows["align"]["artifacts"] == 3
    shutil.move(shop.home, tmp_path / "elsewhere")
    shop.home.symlink_to(tmp_path / "elsewhere")
    assert shop.command("du")["size"] == space["size"]


def test_space_of_runs_and_protocols(shop: Shop) -> None:
    shop.run("a", protocol="p")
    shop.run("b", protocol="p")
    shop.run("c", align="c", protocol="q")
    unused = shop.store.root / "align" / shop.add("align", number=1)

    def size(names: set[str]) -> int:
        return sum(path.stat().st_size for name in names for path in (shop.store.root / name).iterdir())

    rows = {row["name"]: (row["size"], row["exclusive"]) for row in shop.command("du", "--by", "run")["rows"]}
    assert rows == {
        "a": (size(shop.needs["a"]), size(shop.needs["a"] - shop.needs["b"])),
        "b": (size(shop.needs["b"]), size(shop.needs["b"] - shop.needs["a"])),
        "c": (size(shop.needs["c"]), size(shop.needs["c"])),
        "no run": (size({f"align/{unused.name}"}),) * 2,
    }
    rows = {row["name"]: row["exclusive"] for row in shop.command("du", "--by", "protocol")["rows"]}
    assert rows["p"] == size(shop.needs["a"] | shop.needs["b"])
    shop.set_age(f"align/{unused.name}", 8)
    counts = {row["name"]: row["artifacts"] for row in shop.command("du", "--by", "age")["rows"]}
    assert counts == {"up to 1 day": len(shop.names()) - 1, "up to 30 days": 1}


def test_list_filters(shop: Shop) -> None:
    shop.run("a", protocol="p")
    shop.run("b", align="b", protocol="q")
    unused = shop.add("align", number=1)
    shop.set_age(f"align/{unused}", 31)

    def listed(*args: str) -> set[str]:
        return {f"{row['stage']}/{row['key']}" for row in shop.command("ls", *args)}

    assert listed() == shop.names()
    assert listed("--unused") == listed("--older-than", "30d") == {f"align/{unused}"}
    assert listed("--protocol", "p") == shop.needs["a"]
    assert listed("--protocol", "q", "--stage", "drift") == {n for n in shop.needs["b"] if n.startswith("drift")}
    (row,) = [row for row in shop.command("ls") if row["key"] == unused]
    assert (row["runs"], row["path"]) == ([], str(shop.store.root / "align" / unused))
    assert hbv("store", "ls", "--protocol", "p", "--older-than", "1d").out == "No artifact matches.\n"


def test_views_fit_80_columns(shop: Shop) -> None:
    for number in range(6):
        shop.run(f"constrained_sft+random_vaccine-{number:08x}", align=str(number % 2))
    shop.add("align", number=1)
    for command in ("du", "du --by run", "ls", "gc", "verify"):
        text = hbv("store", *command.split(), COLUMNS="80").out
        assert max(map(len, text.splitlines())) <= 80, text
        assert all(name.split("/")[1] in text for name in shop.names() if command == "ls"), text


# ---------------------------------------------------------------------------------------------------------------------
# Verification


def test_damaged_artifacts_are_named_and_repaired(shop: Shop) -> None:
    shop.run("a")
    assert hbv("store", "verify").out == f"{len(shop.names())} artifacts, 0 damaged.\n"
    damaged = next(name for name in shop.needs["a"] if name.startswith("align/"))
    (shop.store.root / damaged / "file").write_text("y")
    report = hbv("store", "verify", "--json")
    assert report.code == 1
    (fault,) = json.loads(report.out)["faults"]
    assert (fault["state"], fault["name"], fault["runs"]) == ("damaged", damaged, ["a"])
    assert "1 damaged" in hbv("store", "verify").out
    assert damaged in shop.names()
    repaired = hbv("store", "verify", "--repair", "--json")
    assert repaired.code == 0
    assert damaged not in shop.names()
    faults = shop.command("verify")["faults"]  # its readers are orphaned, and a run misses it
    assert {fault["state"] for fault in faults} == {"orphaned", "missing"}
    assert [fault["name"] for fault in faults if fault["state"] == "missing"] == [damaged]
    shop.chain("a")
    assert shop.command("verify")["faults"] == []


def test_an_unreadable_artifact_is_not_removed(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"align/{shop.add('align', number=1)}"

    def fail(*args: object) -> None:
        raise PermissionError(13, "Permission denied", "file")

    monkeypatch.setattr("harmbench_vaccine.core.store.read_sealed", fail)
    report = hbv("store", "verify", "--repair", "--json")
    assert report.code == 1
    (fault,) = json.loads(report.out)["faults"]
    assert (fault["state"], fault["detail"], fault["repaired"]) == ("unreadable", "file: Permission denied", False)
    assert name in shop.names()


# ---------------------------------------------------------------------------------------------------------------------
# The page, and real runs


def test_commands_of_the_page_run(shop: Shop) -> None:
    page = (Path(__file__).parents[1] / "docs" / "store.md").read_text(encoding="utf-8")
    commands = re.findall(r"^(hbv store [^#\n]*?) *(?:#.*)?$", page, re.MULTILINE)
    assert {line.split()[2] for line in commands} == {"du", "ls", "gc", "verify"}
    shop.run("a")
    shop.add("align", number=1)
    for line in commands:
        done = hbv(*line.split()[1:])
        assert done.code == 0, line
    assert shop.names() == shop.needs["a"]


@pytest.mark.slow
def test_kept_runs_are_complete_after_a_cleanup(world: Path, own_home: Path, tmp_path: Path) -> None:
    setting = ("--protocol", world, "--attack", "ratio=0.1", "--json")

    def run(defense: str, *args: object) -> dict[str, Any]:
        (result,) = hbv("run", "--defense", defense, *setting, *args).results
        return result

    runs = {name: run(name) for name in ("sft", "vaccine", "resta")}
    outside = run("ewc", "--out", tmp_path / "out")
    assert json.loads(hbv("store", "gc", "--json").out)["artifacts"] == []
    done = json.loads(hbv("store", "gc", "--run", runs["resta"]["run"], "--yes", "--json").out)
    stages = {name.split("/")[0] for name in done["artifacts"]}
    assert stages == {"repair", "answer", "score", "drift"}
    for name in ("sft", "vaccine"):
        assert hbv("why", runs[name]["run"]).code == 0
        assert hbv("show", runs[name]["run"]).code == 0
        assert hbv("export", runs[name]["run"], tmp_path / name).code == 0
        assert all(stage["cached"] for stage in run(name)["stages"].values())
    assert all(stage["cached"] for stage in run("ewc", "--out", tmp_path / "out")["stages"].values())
    assert outside["run"] not in done["dropped"]
    assert hbv("store", "verify").code == 0
    again = run("resta")
    assert again["harmful_score"] == runs["resta"]["harmful_score"]
    assert {name for name, stage in again["stages"].items() if not stage["cached"]} == {"repair", "answer", "score"}
