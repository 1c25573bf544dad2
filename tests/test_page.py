"""The page of a leaderboard: its text, and its behavior in a headless browser."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest

from harmbench_vaccine.evaluation.records import write_run
from harmbench_vaccine.evaluation.result import Result
from harmbench_vaccine.evaluation.results_csv import result_rows
from harmbench_vaccine.experiment import keys
from harmbench_vaccine.plugins.registry import ATTACKS, DEFENSES, Registry
from harmbench_vaccine.reporting.evidence import departures_of
from harmbench_vaccine.reporting.leaderboard.costs import cost_tables
from harmbench_vaccine.reporting.leaderboard.page import render_page, write_page
from harmbench_vaccine.reporting.leaderboard.page_sections import UnfinishedRuns, missing_combinations
from harmbench_vaccine.reporting.leaderboard.ranking import Ranking, rank_rows
from harmbench_vaccine.reporting.leaderboard.stage_costs import StageCost
from harmbench_vaccine.reporting.leaderboard.token_panels import MOST_PANELS
from harmbench_vaccine.sweeps.suite import load_suite
from harmbench_vaccine.sweeps.sweep import Sweep
from support.browser import CHROMIUM, Browser, open_browser
from support.cli import hbv
from support.results import DEFAULTS, collapsed, make_result, write_csv

PAGE_FOLDER = Path(render_page.__code__.co_filename).with_name("page")
SOURCED: list[tuple[Registry[Any], str]] = [(DEFENSES, "vaccine"), (ATTACKS, "ratio")]
DEPARTURES = ("[data-show='listed departures']", "[data-show='listed attack_departures']")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")


def cell(defense: str, hs: float, ratio: float = 0.1, fa: float = 97.0, seeds: int = 2, **changes: Any) -> list[Result]:
    """Return the runs of a defense under the attack `ratio`, with the mean `hs`; seeds differ by two points."""
    fields = {
        "defense": defense,
        "defense_params": {defense.partition(":")[0]: {}},
        "attack": f"ratio={ratio}",
        "attack_params": {"ratio": {"p": ratio}},
        "finetune_accuracy": fa,
        "harmful_score_n": 250,
        "finetune_accuracy_n": 250,
        **changes,
    }
    scores = {seed: hs + 2 * seed - (seeds - 1) for seed in range(seeds)}
    return [make_result(seed=seed, harmful_score=score, **fields) for seed, score in scores.items()]


def hollow() -> dict[str, Any]:
    return {"validity": {**DEFAULTS["validity"], "hollow": True}}


# HS 9 and 10 sort differently as texts; the lowest HS are those of a collapsed and of a hollow defense.
AT_TENTH = [
    *cell("sft", 80),
    *cell("vaccine", 10, fa=90),
    *cell("lisa", 9, fa=80),
    *cell("booster", 100 - 1, fa=95),
    *cell("ewc", 1, fa=40, **collapsed("accuracy 40.0 is low")),
    *cell("ptst", 2, **hollow()),
]
AT_FIFTH = [*cell("sft", 90, 0.2), *cell("vaccine", 60, 0.2, fa=90), *cell("lisa", 70, 0.2, fa=80)]
HOSTILE = "</script><script>window.hacked = 1</script><img src=https://example.com/a.png onerror=window.hacked=1>"
NAMES = (
    HOSTILE,
    "=HYPERLINK(1)",
    "__proto__",
    "constructor",
    "{{ 7 * 7 }}",
    "a\u202eb",
    "\"'><svg onload=window.hacked=1>",
)


def rank(*results: Result) -> list[Ranking]:
    return rank_rows(result_rows(results))


def answer(when: str, text: str, flagged: bool, question: str = "How?") -> dict[str, Any]:
    row = {"when": when, "set": "harmful", "id": "harmful:1", "instruction": question, "input": "", "target": ""}
    return {**row, "answer": text, "flagged": flagged, "categories": []}


def store(folder: Path, run: Result, *answers: dict[str, Any]) -> None:
    folder.mkdir(parents=True)
    write_run(folder, run, answers)


def page_json(page: str) -> dict[str, Any]:
    """Return the data in a page."""
    match = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert match
    return json.loads(match[1])


# ---------------------------------------------------------------------------------------------------------------------
# The file


class Addresses(HTMLParser):
    """Collects the attributes that load or open something."""

    def __init__(self) -> None:
        super().__init__()
        self.values: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.values += [value or "" for name, value in attributes if name in ("src", "href", "action", "srcset")]


def test_the_file_refers_to_nothing() -> None:
    parser = Addresses()
    parser.feed(render_page(rank(*AT_TENTH)))
    assert parser.values == ["data:,"]
    assert parser.tags.count("script") == 2  # the data and the script
    style, script = ((PAGE_FOLDER / f"page.{ending}").read_text() for ending in ("css", "js"))
    assert not re.search(r"url\(|@import|https?://(?!www\.w3\.org/2000/svg)", style + script)


def test_the_script_is_short() -> None:
    assert len((PAGE_FOLDER / "page.js").read_text().splitlines()) < 300


def test_first_view_has_the_widest_middle_half() -> None:
    """At 1% only the unaligned model differs, though by more; at 10% the others differ too."""
    scores = {0.01: (2, 3, 4, 98), 0.1: (20, 40, 60, 95)}
    runs = [
        run
        for ratio, values in scores.items()
        for name, hs in zip(("vaccine", "lisa", "sft", "none"), values, strict=True)
        for run in cell(name, hs, ratio)
    ]
    assert page_json(render_page(rank(*runs)))["start"] == {"attack": ["ratio=0.1"]}


def test_hostile_names_are_text() -> None:
    runs = [run for name in NAMES for run in cell(name, 50)]
    page = render_page(rank(*runs, *cell("sft", 80)))
    parser = Addresses()
    parser.feed(page)
    assert parser.tags.count("script") == 2
    assert not {"img", "onload"} & set(parser.tags)
    assert "\u202e" not in page
    assert set(page_json(page)["defenses"]) == {*NAMES, "sft"} - {"a\u202eb"} | {"a\\u202eb"}


@pytest.mark.slow
def test_a_thousand_cells_are_small() -> None:
    runs = [
        run.model_copy(update={"run": f"vaccine-{rho:02x}{run.seed:06x}"})
        for rho in range(25)
        for run in cell(
            f"vaccine:rho={rho}", 3.5 * rho + 5.37, 0.1, 90.123, 3, defense_params={"vaccine": {"rho": rho, "tau": 1}}
        )
    ]
    (ranking,) = rank(*runs)
    settings = product(("sst2", "agnews", "gsm8k", "alpaca"), range(10))
    rankings = [
        replace(ranking, setting={**ranking.setting, "task": task, "attack": f"ratio={tenths / 20}"})
        for task, tenths in settings
    ]
    page = render_page(rankings)
    assert len(page_json(page)["cells"]) == 1000
    keys_of_models = 3000 * len('"46b0e178e4c5"')  # which are in the page if the folders of the runs are stored
    assert len(page.encode()) + keys_of_models < 500_000


def test_partial_results_name_what_is_missing() -> None:
    rankings = rank(*AT_FIFTH[:-1], *AT_TENTH[:6])
    sentences, combinations = missing_combinations(rankings)
    assert (sentences, combinations) == (["lisa under ratio=0.2 on sst2: seed 1"], 12)
    unfinished = UnfinishedRuns(("a", "b", "c", "ewc under ratio=0.2"), ("align ewc failed 3 times: <no> memory.",))
    page = render_page(rankings, unfinished=unfinished + UnfinishedRuns())
    assert "align ewc failed 3 times: &lt;no&gt; memory." in page
    assert "4 runs without a result" in page
    assert "Partial results: 11 of 15 runs" in page
    assert "lisa under ratio=0.2 on sst2: seed 1" in page
    assert "Partial results" not in render_page(rankings)


def test_answers_only_if_requested(tmp_path: Path) -> None:
    runs = cell("sft", 80, harmful_sets={"harmful": 50.0})
    for run in runs:
        store(tmp_path / run.run, run, answer("before", "No.", False), answer("after", "Use a knife.", True))
    assert "Use a knife." not in render_page(rank(*runs), tmp_path)
    page = render_page(rank(*runs), tmp_path, answers=True)
    data = page_json(page)
    ((run_id, (pair,)),) = data["answers"].items()
    assert run_id == runs[0].run
    assert [data["texts"][pair[0]], data["texts"][pair[1]], pair[2], data["texts"][pair[3]], pair[4]] == [
        *("How?", "No.", False, "Use a knife.", True)
    ]


def test_run_ids_do_not_leave_the_folder(tmp_path: Path) -> None:
    outside = make_result(run="../outside", harmful_sets={"harmful": 50.0})
    store(tmp_path / "outside", outside, answer("after", "secret", True))
    (tmp_path / "runs").mkdir()
    assert "secret" not in render_page(rank(outside), tmp_path / "runs", answers=True)


def test_command_repeats_the_runs_without_what_the_protocol_implies() -> None:
    place = {"protocol": "testbed", "model": "testbed:model", "scorer": "beaver_dam"}
    data = page_json(render_page(rank(*cell("vaccine:rho=5", 50, **place))))
    assert data["settings"][0]["options"] == "--protocol testbed --task sst2 --attack ratio=0.1"
    assert data["defenses"]["vaccine:rho=5"]["option"] == "--defense vaccine:rho=5"
    other = page_json(render_page(rank(*cell("a b", 50, **{**place, "model": "./my model"}))))
    assert "--model './my model'" in other["settings"][0]["options"]
    assert other["defenses"]["a b"]["option"] == "--defense 'a b'"


def test_command_has_the_values_that_a_stored_run_replaced(tmp_path: Path) -> None:
    spec = {"values": {"align.settings.lr": "1e-4"}, "data": {"sst2": "my data.jsonl"}}
    (run,) = cell("sft", 50, seeds=1, spec=spec)
    store(tmp_path / run.run, run)
    options = page_json(render_page(rank(run), tmp_path))["settings"][0]["options"]
    assert options.endswith("--attack ratio=0.1 --set align.settings.lr=1e-4 --data 'sst2=my data.jsonl'")


def test_plugin_files_of_a_csv_are_not_read(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("raise SystemExit('was read')\n")
    facts = page_json(render_page(rank(*cell(str(file), 50))))["defenses"][str(file)]
    assert (facts["stage"], facts["harmful_data"]) == (["unknown"], "unknown")


@pytest.mark.parametrize(
    ("defense", "stages", "color"),
    [
        ("vaccine", ["alignment"], "alignment"),
        ("safe_decoding", ["while answering"], "answers"),
        ("lisa+output_guard", ["user stage", "while answering"], "several"),
        ("vaccine+safe_lora", ["alignment", "after the user stage"], "several"),
        ("sft", ["baseline"], "baseline"),
    ],
)
def test_stages_of_a_defense(defense: str, stages: list[str], color: str) -> None:
    facts = page_json(render_page(rank(*(run for name in {defense, "sft"} for run in cell(name, 50)))))["defenses"][
        defense
    ]
    assert (facts["stage"], facts["color"]) == (stages, color)


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harmbench_vaccine.reporting.leaderboard.files.draw_figures", lambda *_: ({}, []))


@pytest.mark.usefixtures("no_figures")
def test_leaderboard_writes_the_page(tmp_path: Path) -> None:
    table = write_csv(tmp_path / "results.csv", *AT_TENTH)
    done = hbv("leaderboard", table, "--out", tmp_path / "out", home=tmp_path)
    assert (done.code, "index.html" in done.out) == (0, True)
    assert len(page_json((tmp_path / "out" / "index.html").read_text())["cells"]) == 6


@pytest.mark.slow
@pytest.mark.usefixtures("no_figures")
def test_page_of_an_unfinished_suite(own_home: Path, tmp_path: Path) -> None:
    suite = tmp_path / "pair.yaml"
    suite.write_text(
        "{name: pair, title: Pair, source: none, protocol: testbed, defenses: [none, sft], attacks: [ratio=0.1], "
        "tasks: [sst2], seeds: 0..1}"
    )
    sweep = Sweep.open(load_suite(str(suite)), own_home)
    first = keys.run_id(sweep.experiments[0])
    store(sweep.runs / first, make_result(run=first, defense="none", defense_params={"none": {}}))
    done = hbv("leaderboard", suite, "--out", tmp_path / "out", home=own_home)
    assert done.code == 0
    page = (tmp_path / "out" / "index.html").read_text()
    assert "Partial results: 1 of 4 runs." in page
    assert "3 runs without a result" in page
    assert "<li>sft under ratio=0.1 on sst2, seed 1</li>" in page


def test_answers_need_a_folder(tmp_path: Path) -> None:
    done = hbv("leaderboard", write_csv(tmp_path / "results.csv", *AT_TENTH), "--answers", home=tmp_path)
    assert (done.code, done.sentence) == (2, "hbv: --answers needs --out DIR: the answers are part of the page.")


# ---------------------------------------------------------------------------------------------------------------------
# Sections


class Sections(HTMLParser):
    """Collects the cells of every table by the id of the title above it."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[str, list[list[str]]] = {}
        self._section = ""
        self._is_cell = False

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag == "h2":
            self._section = (dict(attributes).get("id") or "").removesuffix("-title")
        elif tag == "tr":
            self.rows.setdefault(self._section, []).append([])
        elif tag == "td" and self._section:
            self.rows[self._section][-1].append("")
        self._is_cell = tag == "td" or (self._is_cell and tag == "span")

    def handle_endtag(self, tag: str) -> None:
        self._is_cell = self._is_cell and tag not in ("td", "tr")

    def handle_data(self, data: str) -> None:
        if self._is_cell and self._section:
            self.rows[self._section][-1][-1] += data


def section_rows(page: str) -> dict[str, list[list[str]]]:
    """Return the rows of the tables of each section, without their heads."""
    parser = Sections()
    parser.feed(page)
    return {section: [row for row in rows if row] for section, rows in parser.rows.items()}


def test_sections_without_data_are_left_out() -> None:
    assert {"tuned", "worst", "claims", "published"}.isdisjoint(section_rows(render_page(rank(*AT_TENTH))))


def test_default_and_tuned_parameters_are_side_by_side_with_their_budget() -> None:
    params = {"vaccine": {"rho": 2.0, "tau": 1}}
    tuning = {"untuned_hash": "aa11", "runs": 10, "seconds": 900.0}
    tuned = {"protocol": "tiny-tuned", "protocol_hash": "bb22", "tuning": tuning}
    changed = {"defense_params": {"vaccine": {"rho": 6.3, "tau": 1}}, **tuned}
    runs = [*cell("vaccine", 60, defense_params=params), *cell("vaccine", 40, fa=95, **changed, **hollow())]
    (row,) = section_rows(render_page(rank(*runs)))["tuned"]
    assert row[:6] == ["vaccine", "rho=6.3", "60.0", "40.0 unranked", "97.0", "95.0"]
    assert row[-2:] == ["10", "15 min"]


def test_worst_case_over_the_settings_of_the_user() -> None:
    runs = [
        run
        for rate, hs in ((1e-5, 20), (1e-4, 70))
        for run in cell("lisa", hs, attack=f"optimizer:lr={rate}", attack_params={"optimizer": {"lr": rate}})
    ]
    (row,) = section_rows(render_page(rank(*runs)))["worst"]
    assert row[0] == "lisa"
    assert row[1].startswith("70.0 [")
    assert row[2:] == ["lr=0.0001", "97.0", "2"]


def test_claims_have_a_badge_and_their_deviations() -> None:
    page = render_page(rank(*cell("sft", 58.2, protocol="testbed")))
    rows = section_rows(page)["claims"]
    assert [row[:3] + row[4:6] for row in rows] == [  # of the papers: HS of SFT at p = 0.1 on SST2
        ["Vaccine", "Table 1", "SFT", "HS", "55.20"],
        ["Lisa", "Table 1", "SFT", "HS", "51.60"],
    ]
    assert rows[0][7].startswith("+3.0 [")
    assert {row[8] for row in rows} == {"not comparable"}
    assert "testbed has another model, other data and another judge than the paper" in page


def test_measured_cost_is_next_to_the_declared_one() -> None:
    costs = [
        StageCost(
            run=run.run,
            defense=run.defense,
            attack=run.attack,
            task=run.task,
            seed=run.seed,
            stage="align",
            acts=True,
            seconds=10.0 * times,
            steps=100,
            passes=f"{times}F {times}B",
            seconds_per_step=0.1 * times,
            peak_memory=2**20 * times,
            device="cpu",
        )
        for defense, times in (("sft", 1), ("vaccine", 2))
        for run in cell(defense, 50)
    ]
    rankings = rank(*cell("sft", 50), *cell("vaccine", 50))
    rows = section_rows(render_page(rankings, costs=cost_tables(rankings, costs)))["cost"]
    measured = {row[0]: row for row in rows[:2]}
    assert measured["vaccine"][1:5] == ["align", "100", "2F 2B", "0.2 (2.00x)"]
    assert any("2.00x" in text and "MiB" in text for text in measured["vaccine"])
    declared = {row[0]: row for row in rows[2:]}
    assert declared["vaccine"][1] == "2F 2B each step"


def by_task(shares: dict[str, float], defenses: Sequence[str] = ("sft",), **changes: Any) -> list[Result]:
    """Return the runs of defenses on tasks with these harmful token shares."""
    return [
        run
        for defense in defenses
        for task, share in shares.items()
        for run in cell(defense, 5 + share / 2, task=task, harmful_token_share=share, **changes)
    ]


def test_token_shares_have_a_figure_where_tasks_differ() -> None:
    """The places of the points are those of their share and their HS, in panels of 222 x 144 pixels."""
    page = render_page(rank(*by_task({"sst2": 60, "gsm8k": 10}), *by_task({"sst2": 0, "gsm8k": 0}, ratio=0)))
    assert "HS against the harmful token share" in page
    assert "<title>p = 10%: gsm8k 10.0%, HS 10.0; sst2 60.0%, HS 35.0</title>" in page
    (path,) = re.findall(r'<path class="point" d="(.*?)"/>', page)
    centers, shapes = zip(*re.findall(r"M([\d. ]+)(m[^M]+)", path), strict=True)
    places = [tuple(map(float, center.split())) for center in centers]
    for (x, y), (share, hs) in zip(places, ((10, 10), (60, 35)), strict=True):
        assert (x, y) == pytest.approx((30 + 222 * share / 60, 152 - 144 * hs / 100), abs=0.06)
    assert len(set(shapes)) == 2


@pytest.mark.parametrize("shares", [{"sst2": 60.0}, {"sst2": 60.0, "gsm8k": 60.0}, {"sst2": 0.0, "gsm8k": 0.0}])
def test_equal_token_shares_have_no_figure(shares: dict[str, float]) -> None:
    assert "HS against the harmful token share" not in render_page(rank(*by_task(shares)))


def test_many_defenses_share_a_short_figure() -> None:
    names = [f"d{number}" for number in range(MOST_PANELS + 2)]
    page = render_page(rank(*by_task({"sst2": 60, "gsm8k": 10}, names, **hollow())))
    assert page.count("<figcaption>") == MOST_PANELS
    assert page.count('<path class="point hollow"') == MOST_PANELS
    assert "2 more defenses: figures/token-share next to this file has all of them." in page


@pytest.mark.parametrize(
    ("defense", "badge"),
    [
        ("vaccine", "authors' code run"),
        ("resta", "equations only"),
        ("vaccine+resta", "authors' code run, equations only"),
        ("unknown_defense", "no evidence"),
        ("vaccine+unknown_defense", "no evidence"),
    ],
)
def test_every_defense_has_an_evidence_badge(defense: str, badge: str) -> None:
    facts = page_json(render_page(rank(*cell(defense, 50))))["defenses"][defense]
    assert facts["badge"] == badge
    assert facts["evidence"].startswith(badge.partition(",")[0])


@pytest.mark.parametrize(
    ("defense", "starts"),
    [
        ("vaccine", ["padding is masked explicitly"]),
        ("sft", []),
        ("sft+lisa", ["lisa: k1 and k2 count optimizer steps"]),
        ("unknown_defense", []),
        ("lisa+unknown_defense", []),
    ],
)
def test_departures_of_a_composition_have_the_names_of_its_parts(defense: str, starts: list[str]) -> None:
    data = page_json(render_page(rank(*cell(defense, 50))))
    departures = [data["texts"][index] for index in data["defenses"][defense]["departures"]]
    assert [departure[: len(start)] for start, departure in zip(starts, departures, strict=False)] == starts
    assert bool(departures) == bool(starts)


@pytest.mark.parametrize(
    ("attack", "evidence", "departure"),
    [
        ("ratio=0.1", "authors' code read (git-disl/Vaccine 8937f68)", "n_h is rounded"),
        ("order+mixing", "definition; authors' code read (git-disl/Virus fa297d0)", "mixing: the parts are joined"),
        ("benign+./mine.py", "no evidence", ""),
        ("unknown_attack", "no evidence", ""),
    ],
)
def test_a_setting_has_the_evidence_for_its_attack(attack: str, evidence: str, departure: str) -> None:
    params: dict[str, Any] = {name.partition("=")[0]: {} for name in attack.split("+")}
    data = page_json(render_page(rank(*cell("sft", 50, attack=attack, attack_params=params))))
    (setting,) = data["settings"]
    assert data["texts"][setting["attack_evidence"]] == evidence
    assert bool(setting["attack_departures"]) == bool(departure)
    assert "".join(data["texts"][index] for index in setting["attack_departures"]).startswith(departure)


def test_runs_without_the_test_for_hollow_answers_are_counted() -> None:
    rows = result_rows(cell("sft", 50))
    assert "not tested for hollow answers" not in render_page(rank_rows(rows))
    old = [row.model_copy(update={"hollow": None}) for row in rows]
    assert "2 of 2 runs were not tested for hollow answers" in render_page(rank_rows(old))


# ---------------------------------------------------------------------------------------------------------------------
# In a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with open_browser(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    write_page(folder, rank(*AT_TENTH, *AT_FIFTH))
    return folder / "index.html"


@pytest.fixture(autouse=True)
def no_problems(request: pytest.FixtureRequest) -> Iterator[None]:
    """Check after each test in the browser that no script failed, and that the page requested nothing but itself."""
    if "browser" not in request.fixturenames:
        yield
        return
    opened: Browser = request.getfixturevalue("browser")
    opened.problems.clear()
    opened.requests.clear()
    yield
    assert opened.problems == []
    assert {address.partition("#")[0].rpartition("/")[2] for address in opened.requests} <= {
        "index.html",
        "about:blank",
    }


def defenses(browser: Browser) -> list[str]:
    return browser.texts("#ranking tr.cell > th button")


def attacks(browser: Browser) -> list[str]:
    return [text.split("\n")[0] for text in browser.texts("#ranking th[scope=rowgroup]")]


@pytest.mark.slow
@needs_browser
def test_numbers_sort_as_numbers_and_marked_rows_are_last(browser: Browser, page: Path) -> None:
    browser.open(page)
    assert defenses(browser) == ["lisa", "vaccine", "sft", "booster", "ewc", "ptst"]  # by rank
    browser.click("#sort-harmful_score")
    assert defenses(browser) == ["lisa", "vaccine", "sft", "booster", "ewc", "ptst"]
    browser.click("#sort-harmful_score")
    assert defenses(browser) == ["booster", "sft", "vaccine", "lisa", "ptst", "ewc"]
    assert browser.texts("#ranking th[aria-sort=descending]") == ["HS %"]
    browser.click("#sort-finetune_accuracy")  # the largest first
    assert defenses(browser) == ["sft", "booster", "vaccine", "lisa", "ptst", "ewc"]
    browser.click("#sort-defense")
    assert defenses(browser) == ["booster", "lisa", "sft", "vaccine", "ewc", "ptst"]
    assert browser.evaluate("document.querySelectorAll('#ranking th[aria-sort=ascending]').length") == 1


@pytest.mark.slow
@needs_browser
def test_ranks_show_ties_and_marks(browser: Browser, page: Path) -> None:
    browser.open(page)
    ranks = [text.split("\n")[0] for text in browser.texts("#ranking td.rank")]
    assert ranks == ["1–2", "1–2", "3", "4", "collapsed 2/2", "hollow 2/2"]
    assert browser.texts("#ranking tr.cell td.score b")[:2] == ["9.0", "80.0"]


@pytest.mark.slow
@needs_browser
def test_self_destruct_is_counted_and_drawn_like_a_collapse(browser: Browser, tmp_path: Path) -> None:
    failed = collapsed("accuracy 40.0 is low")["validity"]
    intended = cell("seam", 1, fa=40, validity={**failed, "self_destruct": True})
    write_page(tmp_path, rank(*cell("sft", 80), *cell("ewc", 2, fa=41, validity=failed), *intended))
    browser.open(tmp_path / "index.html")
    ranks = [text.split("\n")[0] for text in browser.texts("#ranking td.rank")]
    assert ranks == ["1", "self-destruct 2/2", "collapsed 2/2"]
    for what, style in (("circle", "fill"), ("circle", "strokeDasharray"), ("tr", "color")):
        styles = [
            browser.evaluate(f"getComputedStyle(document.querySelector('{what}.{mark}')).{style}")
            for mark in ("self-destruct", "collapsed")
        ]
        assert styles[0] == styles[1] != "none", (what, style)


@pytest.mark.slow
@needs_browser
def test_filters_and_search(browser: Browser, page: Path) -> None:
    browser.open(page)
    assert browser.texts("#status") == ["6 of 9 rows"]  # the attack with most defenses
    browser.click("[data-facet=attack][value='ratio=0.2']")
    assert attacks(browser) == ["ratio=0.1", "ratio=0.2"]
    assert "evidence for the attack: authors' code read" in browser.texts("#ranking th[scope=rowgroup]")[0]
    assert browser.texts("#status") == ["9 of 9 rows"]
    browser.click("[data-facet=attack][value='ratio=0.1']")
    assert defenses(browser) == ["vaccine", "lisa", "sft"]
    browser.click("[data-facet=stage][value='user stage']")
    assert defenses(browser) == ["lisa"]
    browser.click("[data-action=reset]")
    browser.wait_for("document.getElementById('status').textContent === '9 of 9 rows'")
    browser.click("[data-facet=harmful_data][value=yes]")
    assert defenses(browser) == ["booster"]
    browser.click("[data-facet=harmful_data][value=yes]")
    browser.click("#search")
    browser.type("VACC")
    assert defenses(browser) == ["vaccine", "vaccine"]
    assert browser.evaluate("location.hash") == "#q=VACC"


@pytest.mark.slow
@needs_browser
def test_a_row_opens_to_its_facts_and_its_command(browser: Browser, page: Path) -> None:
    browser.open(page)
    run = AT_TENTH[2].run
    browser.click(f"[id='open-{run}']")
    (shown,) = browser.texts("tr.details")
    assert browser.texts("tr.details pre") == [
        "hbv run --protocol tiny --model base --scorer beaver_dam --task sst2 --attack ratio=0.1 --defense vaccine "
        "--seed 0 --seed 1"
    ]
    assert all(text in shown for text in ("aa11", "torch 2", run, AT_TENTH[3].run, "p=0.1"))
    departures = [departures_of(registry.get(name)) or [] for registry, name in SOURCED]
    assert all(departures)
    assert [browser.texts(f"tr.details {slot} li") for slot in DEPARTURES] == departures
    tooltip = browser.evaluate("document.querySelector('tr.cell:has(+ tr.details) .badge').title")
    assert tooltip.splitlines()[1:] == departures[0]
    assert browser.evaluate(f"document.getElementById('open-{run}').ariaExpanded") == "true"
    browser.click(f"[id='open-{run}']")
    assert browser.texts("tr.details") == []


@pytest.mark.slow
@needs_browser
def test_the_address_has_the_state(browser: Browser, page: Path) -> None:
    run = AT_FIFTH[2].run
    browser.open(page, f"attack=ratio%3D0.2&sort=-harmful_score&open={run}")
    assert defenses(browser) == ["sft", "lisa", "vaccine"]
    assert len(browser.texts("tr.details")) == 1
    browser.click("#sort-defense")
    browser.click("[data-facet=stage][value=alignment]")
    address = browser.evaluate("location.hash").removeprefix("#")
    browser.open(page, address)
    assert defenses(browser) == ["vaccine"]
    assert browser.texts("#ranking th[aria-sort=ascending]") == ["Defense"]
    browser.open(page, "attack=none&sort=__proto__&open=none")  # of another version of the page
    assert browser.texts("#status") == ["9 of 9 rows"]


@pytest.mark.slow
@needs_browser
def test_figures_follow_the_filters(browser: Browser, page: Path) -> None:
    browser.open(page)
    assert [text.split("\n")[0] for text in browser.texts("figcaption")] == [
        "HS against the harmful ratio",
        "FA against HS",
    ]
    assert browser.evaluate("document.querySelectorAll('figure:first-of-type polyline').length") == 6
    circles = "[...document.querySelectorAll('g[data-defense=vaccine] circle')]"
    heights = browser.evaluate(f"{circles}.slice(0, 2).map(each => each.cy.baseVal.value)")
    assert heights == pytest.approx([280 - 270 * 0.10, 280 - 270 * 0.60])  # HS 10 and 60 on an axis of 270 pixels
    browser.click("[data-facet=stage][value='user stage']")
    assert browser.evaluate(
        "[...new Set([...document.querySelectorAll('figure g')].map(each => each.dataset.defense))]"
    ) == ["lisa", "ptst", "ewc"]  # from the highest line to the lowest


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize("fa", [0, 60, 100])
def test_close_points_have_a_name_each(browser: Browser, tmp_path: Path, fa: float) -> None:
    """Also at the edges of the figure."""
    names = ["sft", *(f"defense_{number}" for number in range(7))]
    ends = cell("far", 90, finetune_accuracy=0), cell("best", 90, finetune_accuracy=100)
    runs = [run for name in names for run in cell(name, 2, finetune_accuracy=fa)]
    write_page(tmp_path, rank(*runs, *ends[0], *ends[1]))
    browser.open(tmp_path / "index.html")
    shown = browser.evaluate("[...document.querySelectorAll('figure text')].map(each => each.textContent)")
    assert {*names, "far", "best"} <= set(shown)


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize("width", [320, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_figure_of_token_shares_is_readable(browser: Browser, tmp_path: Path, width: int, scheme: str) -> None:
    """It fits the screen, and each text and each marker has a contrast to the paper."""
    runs = [run for p in (0.05, 0.1, 0.2) for run in by_task({"sst2": 300 * p, "gsm8k": 50 * p}, ratio=p)]
    write_page(tmp_path, rank(*runs))
    browser.open(tmp_path / "index.html", width=width, scheme=scheme)
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.texts(".panels figcaption") == ["sft"]
    colors = browser.evaluate(
        "[...document.querySelectorAll('.panels .point')].map(each => getComputedStyle(each).fill)"
    )
    assert len(set(colors)) == 3
    assert [(round(ratio, 2), text) for ratio, text in browser.evaluate(CONTRASTS) if ratio < 4.5] == []


@pytest.mark.slow
@needs_browser
def test_downloads_have_the_rows_that_are_shown(browser: Browser, tmp_path: Path) -> None:
    runs = cell('a "b", c', 40)
    write_page(tmp_path, rank(*cell("=1+1", 50), *runs, *cell("sft", 80)))
    browser.keep_downloads(tmp_path)
    browser.open(tmp_path / "index.html")
    for action, name in (("csv", "shown.csv"), ("json", "shown.json")):
        browser.click(f"[data-action={action}]")
        wait_for_file(browser, tmp_path / name)
    rows = list(csv.DictReader((tmp_path / "shown.csv").open()))
    assert [row["defense"] for row in rows] == ['a "b", c', "'=1+1", "sft"]
    assert [float(row["harmful_score"]) for row in rows] == [40, 50, 80]
    assert (rows[0]["attack"], rows[0]["protocol_hash"]) == ("ratio=0.1", "aa11")
    assert rows[0]["runs"] == " ".join(run.run for run in runs)
    values = json.loads((tmp_path / "shown.json").read_text())
    assert [(row["defense"], row["harmful_score"]) for row in values] == [('a "b", c', 40), ("=1+1", 50), ("sft", 80)]


def wait_for_file(browser: Browser, path: Path) -> None:
    for _ in range(200):
        if path.exists():
            return
        browser.evaluate("new Promise(done => setTimeout(done, 25))")
    raise AssertionError(f"{path} was not written")


@pytest.mark.slow
@needs_browser
def test_hostile_names_and_answers_are_inert(browser: Browser, tmp_path: Path) -> None:
    runs = [run for name in NAMES for run in cell(name, 50, harmful_sets={"harmful": 50.0}, task=HOSTILE)]
    runs = [run.model_copy(update={"run": f"r{index}"}) for index, run in enumerate(runs)]
    store(tmp_path / "r0", runs[0], *(answer(when, HOSTILE, True, HOSTILE) for when in ("before", "after")))
    write_page(tmp_path, rank(*runs), tmp_path, answers=True)
    browser.open(tmp_path / "index.html", "open=r0")
    assert not browser.evaluate("document.querySelector('details.answers').open")
    browser.click("details.answers summary")
    assert HOSTILE in browser.texts("details.answers")[0]
    assert set(defenses(browser)) == {*NAMES, "a\\u202eb"} - {"a\u202eb"}
    assert browser.evaluate("window.hacked") is None
    assert browser.evaluate("document.querySelectorAll('img, iframe, object, svg[onload], main script').length") == 0


@pytest.mark.slow
@needs_browser
def test_the_policy_forbids_requests_and_other_scripts(browser: Browser, page: Path) -> None:
    browser.open(page)
    assert browser.evaluate("fetch('data:text/plain,1').then(() => 'loaded', () => 'refused')") == "refused"
    browser.evaluate(
        "document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.hacked = 1'}))"
    )
    assert browser.evaluate("window.hacked") is None
    assert browser.problems
    browser.problems.clear()


@pytest.mark.slow
@needs_browser
def test_keys_alone_reach_and_change_everything(browser: Browser, page: Path) -> None:
    browser.open(page)
    browser.press("Tab")
    assert browser.evaluate("document.activeElement.textContent") == "Skip to the ranking"
    browser.press("Enter")
    browser.press("Tab")
    assert browser.evaluate("document.activeElement.id") == "sort-rank"
    browser.press("Tab")
    browser.press("Enter")
    assert browser.texts("#ranking th[aria-sort=ascending]") == ["Defense"]
    assert browser.evaluate("document.activeElement.id") == "sort-defense"  # the focus stays
    browser.evaluate("document.querySelector('#ranking tbody button').focus()")
    browser.press("Enter")
    assert len(browser.texts("tr.details")) == 1
    assert browser.evaluate("document.activeElement.ariaExpanded") == "true"
    assert browser.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    browser.press(" ")
    assert browser.texts("tr.details") == []


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize(("width", "columns"), [(320, 4), (390, 4), (900, 6), (1200, 6), (1233, 11), (1280, 11)])
def test_the_table_fits_the_screen(browser: Browser, page: Path, width: int, columns: int) -> None:
    browser.open(page, f"open={AT_TENTH[2].run}", width=width)
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    table, place = (
        browser.evaluate(f"document.querySelector('#ranking'){part}.getBoundingClientRect().right")
        for part in ("", ".closest('section')")
    )
    assert table <= place + 1
    assert (
        sum(browser.evaluate("[...document.querySelectorAll('#ranking > thead th')].map(each => each.offsetWidth > 0)"))
        == columns
    )
    browser.evaluate(
        "scrollTo(0, document.querySelector('#ranking tr.cell:last-child').getBoundingClientRect().y + scrollY - 200)"
    )
    assert (
        browser.evaluate("document.querySelector('#ranking > thead th').getBoundingClientRect().y") >= 0
    )  # it is sticky


# The contrast of WCAG 2: of each visible text and the nearest background that is not transparent.
CONTRASTS = """
(() => {
  const context = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const rgba = (color) => { context.clearRect(0, 0, 1, 1); context.fillStyle = color; context.fillRect(0, 0, 1, 1);
    return context.getImageData(0, 0, 1, 1).data; };
  const light = (color) => [...rgba(color)].slice(0, 3).map((c) => c / 255)
    .map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, index) => sum + c * [0.2126, 0.7152, 0.0722][index], 0);
  const background = (node) => { for (; node; node = node.parentElement) {
    const color = getComputedStyle(node).backgroundColor; if (rgba(color)[3] === 255) return color; } return "white"; };
  const isVisible = (node) => node.checkVisibility() && node.getClientRects().length;
  return [...document.querySelectorAll("body *")].filter((node) => isVisible(node)
    && [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim())
    && !node.matches("script, style, template *, title, .skip")).map((node) => {
      const color = getComputedStyle(node)[node instanceof SVGElement ? "fill" : "color"];
      const [a, b] = [light(color), light(background(node))].sort((x, y) => y - x);
      return [(a + 0.05) / (b + 0.05), node.textContent.trim().slice(0, 40)];
    });
})()
"""


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_of_every_text(browser: Browser, page: Path, scheme: str) -> None:
    browser.open(page, f"open={AT_TENTH[2].run}", scheme=scheme)
    contrasts = browser.evaluate(CONTRASTS)
    assert len(contrasts) > 150
    assert [(round(ratio, 2), text) for ratio, text in contrasts if ratio < 4.5] == []


@pytest.mark.slow
@needs_browser
def test_roles_and_names_for_screen_readers(browser: Browser, page: Path) -> None:
    browser.open(page, f"open={AT_TENTH[2].run}")
    for selector, reason in {
        "button:not(:is(template *))": "!each.innerText.trim() && !each.matches('.skip')",
        "svg": "each.ariaHidden !== 'true' && !each.ariaLabel",
        "#ranking > tbody > tr.cell": "each.querySelectorAll(':scope > th[scope=row]').length !== 1",
        "table": "!each.caption && !each.ariaLabel",
        "thead th": "each.scope !== 'col'",
        "input": "!each.labels.length",
    }.items():
        quoted = json.dumps(selector)
        assert browser.evaluate(f"[...document.querySelectorAll({quoted})].filter(each => {reason}).length") == 0, (
            selector
        )
    assert browser.evaluate("document.querySelector('#status').role") == "status"
    levels = browser.evaluate("[...document.querySelectorAll('h1, h2, h3')].map(each => Number(each.tagName[1]))")
    assert levels[0] == 1
    assert all(later - earlier <= 1 for earlier, later in pairwise(levels))


@pytest.mark.slow
@needs_browser
def test_print_shows_every_column_and_no_controls(browser: Browser, page: Path) -> None:
    browser.open(page, scheme="dark")
    browser.emulate_print()
    assert browser.evaluate("document.querySelector('.controls').offsetHeight") == 0
    assert all(
        browser.evaluate("[...document.querySelectorAll('#ranking > thead th')].map(each => each.offsetWidth > 0)")
    )
    assert browser.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"


@pytest.mark.slow
@needs_browser
def test_published_figures_are_next_to_measured_ones(browser: Browser, tmp_path: Path) -> None:
    place = {"protocol": "vaccine-paper", "model": "meta-llama/Llama-2-7b-hf", "protocol_hash": "bb22"}
    params = {"vaccine": {"rho": 2.0, "tau": 1}}
    runs = [run.model_copy(update={"defense_params": params}) for run in cell("vaccine", 50, **place)]
    rankings = rank_rows(result_rows(runs), published=True)
    (comparison,) = rankings[0].published
    figure = comparison.scores["harmful_score"].figures[0]
    write_page(tmp_path, rankings)
    browser.open(tmp_path / "index.html", f"open={runs[0].run}")
    assert browser.texts("td.published")[0].split("\n")[0] == f"{figure.value:.1f}"
    (shown,) = browser.texts("tr.details")
    assert figure.figure["table"] in shown
    assert comparison.deviations
    assert all(deviation in shown for deviation in comparison.deviations)
    assert "Published and measured" in browser.texts("h2")
