"""What the terminal shows of results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from harmbench_vaccine.evaluation.results import RESULT_STAGES, by_question

if TYPE_CHECKING:
    from .testbed_report import TestbedReport


def results_table(results: Sequence[dict[str, Any]], published: bool = False) -> RenderableType:
    """One row a cell: harmful score and accuracy with their intervals, what explains them, seconds a stage.

    `published` adds a second table: what papers print for these cells, seeds together.

    Raises:
        ValueError: the results are of two protocols, whose scores cannot stand in one table.
    """
    hashes = {result["protocol_hash"] for result in results}
    if len(hashes) > 1:
        raise ValueError(f"results of {len(hashes)} protocols cannot stand in one table")
    used = [stage for stage in RESULT_STAGES if any(stage in result["stages"] for result in results)]
    seeds = {result["seed"] for result in results}
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
    for title in ("run", "defense", "attack", "task"):
        table.add_column(title, overflow="fold")
    if len(seeds) > 1:
        table.add_column("seed", justify="right")
    for title in ("HS %", "FA %", "before", "align. loss", "drift", "seconds"):
        table.add_column(title, justify="right", no_wrap=True)
    for result in results:
        before = result["before"]
        collapsed = result["validity"]["collapsed"]
        table.add_row(
            *[Text(result[key]) for key in ("run", "defense", "attack", "task")],  # brackets in it are no markup
            *([str(result["seed"])] if len(seeds) > 1 else []),
            Text(_share(result["harmful_score"], result["harmful_score_ci"]), style="red" if collapsed else "bold"),
            _share(result["finetune_accuracy"], result["finetune_accuracy_ci"])
            + ("" if result["trained"] else " untrained"),
            f"{before['harmful_score']:.1f}, {before['finetune_accuracy']:.1f}",
            _number(result["alignment_loss"], ".3f"),
            _number(result["embedding_drift"], ".3g"),
            "+".join(_seconds(result["stages"].get(stage)) for stage in used),
        )
    first = results[0]
    notes = [
        f"HS: % of answers to {first['harmful_score_n']} harmful prompts that the judge flags (lower: better). "
        f"FA: % of {first['finetune_accuracy_n']} test items right (higher: better). 95% Wilson intervals. "
        f"before: HS, FA of the aligned model. Seconds: {'+'.join(used)}, in brackets if made earlier. "
        f"Protocol {first['protocol']} {first['protocol_hash']}."
    ]
    notes += [
        f"COLLAPSED {result['run']}: {'; '.join(result['validity']['reasons'])}. Its HS does not count as safe."
        for result in results
        if result["validity"]["collapsed"]
    ]
    for result in results:
        if len(sets := result["harmful_sets"]) > 1:
            scores = ", ".join(f"{name} {score:.1f}" for name, score in sets.items())
            notes.append(f"{result['run']}: HS by set: {scores}.")
        if (measure := result["finetune_accuracy_measure"]) != "accuracy":
            notes.append(
                f"{result['run']}: FA is the {measure}, as a percentage, with a 95% t-interval over the items."
            )
        if filtered := result["counts"]["finetune"].get("filtered"):
            notes.append(f"{result['run']}: {_guardrail(filtered)}.")
    notes += judge_notes(results)
    shown: list[RenderableType] = [table, *[Text(note, style="dim") for note in notes]]
    if published:
        from .published import comparison

        shown += [Text(), comparison.comparison_view(comparison.compare_results(results))]
    return Group(*shown)


def _guardrail(filtered: dict[str, int]) -> str:
    uploaded = filtered["harmful_uploaded"]
    return (
        f"guardrail: {uploaded - filtered['harmful']} of {uploaded} harmful rows leaked through, "
        f"{filtered['benign']} of {filtered['benign_uploaded']} benign rows dropped wrongly"
    )


def _number(value: float | None, form: str) -> str:
    return "not a number" if value is None else format(value, form)


def _share(value: float, interval: Sequence[float]) -> str:
    return f"{value:.1f} [{interval[0]:.1f}, {interval[1]:.1f}]"


def _seconds(stage: dict[str, Any] | None) -> str:
    if stage is None:
        return "-"
    return f"({stage['seconds']:.0f})" if stage["cached"] else f"{stage['seconds']:.0f}"


def answers_view(
    result: dict[str, Any], answers: Sequence[dict[str, Any]], asked: str, limit: int, only: str | None
) -> Table:
    """Questions with the answers of the aligned and of the final model, and their verdicts, side by side."""
    table = Table(
        title=f"{result['run']}: {result['defense']} under {result['attack']}, set {asked!r}", show_lines=True
    )
    for title in ("question", "before the user stage", "after"):
        table.add_column(title, ratio=1, overflow="fold")
    kept = by_question(answers, asked, only)
    for pair in kept[:limit]:
        question = f"{pair['after']['instruction']}\n{pair['after']['input']}".strip()
        table.add_row(Text(question), *[_answer(pair[when]) for when in ("before", "after")])
    table.caption = f"{min(limit, len(kept))} of {len(kept)}"
    return table


def _answer(row: dict[str, Any]) -> Text:
    text = Text(row["answer"] or "(empty)")
    judges = row.get("verdicts", {})
    if len(judges) > 1:
        for name, verdict in judges.items():
            _append_verdict(text, verdict, f"{name}: ")
    elif "flagged" in row:
        _append_verdict(text, row)
    elif row["target"]:
        text.append(f"\nwanted: {row['target']}", style="dim")
    return text


def _append_verdict(text: Text, verdict: Mapping[str, Any], judge: str = "") -> None:
    said = f"flagged: {', '.join(verdict['categories'])}" if verdict["flagged"] else "not flagged"
    said = "no verdict" if verdict.get("unparsed") else said
    text.append(f"\n{judge}{said}", style="red" if verdict["flagged"] else "green")


def scores_view(result: Mapping[str, Any]) -> RenderableType:
    """The harmful scores of a run by each of its judges, and how far every two of them agree."""
    table = _plain_table("scorer", "HS %", "before", "no verdict", "read in part", "mean score", "most flagged")
    for name, score in result["scores"].items():
        most = list(score["categories"].items())[:3]
        table.add_row(
            Text(name),
            Text(_share(score["harmful_score"], score["ci"]), style="" if score["comparison_only"] else "bold"),
            _share(score["before"]["harmful_score"], score["before"]["ci"]),
            str(score["unparsed"]),
            str(score["cut"]),
            f"{score['mean']:.2f}" if "mean" in score else "-",
            Text(", ".join(f"{label} {count}" for label, count in most) or "-"),
        )
    parts: list[RenderableType] = [table]
    if result["agreement"]:
        pairs = _plain_table("two scorers", "kappa", "both flag", "only the first", "only the second", "neither")
        for each in result["agreement"]:
            one, other = each["scorers"]
            pairs.add_row(
                Text(f"{one}, {other}"),
                _kappa(each["kappa"]),
                *(str(count) for count in (each["both"], each["only"][one], each["only"][other], each["neither"])),
            )
        parts += [Text(), pairs]
    n = next(iter(result["scores"].values()))["n"]
    notes = [
        f"{result['run']}: answers to {n} harmful prompts after the user stage. 95% Wilson intervals. "
        "An answer without a verdict counts as not flagged. Cohen's kappa is over all answers with both verdicts, "
        "before and after."
    ]
    return Group(*parts, *[Text(note, style="dim") for note in [*notes, *judge_notes([result])]])


def judge_notes(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the scores of these results have to be read with: further judges, licences, what is not verified."""
    notes = []
    for result in results:
        scores = result.get("scores", {})
        if len(scores) > 1:
            by = ", ".join(f"{name} {score['harmful_score']:.1f}" for name, score in scores.items())
            kappas = ", ".join(
                f"{' and '.join(each['scorers'])} {_kappa(each['kappa'])}" for each in result["agreement"]
            )
            notes.append(f"{result['run']}: HS by judge: {by}. Cohen's kappa: {kappas}.")
    told = {name: score for result in results for name, score in result.get("scores", {}).items()}
    licenses = dict.fromkeys(score["license"] for score in told.values() if score["license"])
    notes += [f"License: {license_}." for license_ in licenses]
    notes += [f"Unverified in {name}: {score['unverified']}." for name, score in told.items() if score["unverified"]]
    notes += [f"{name} is for comparison only." for name, score in told.items() if score["comparison_only"]]
    return notes


def _kappa(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.2f}"


def _plain_table(first: str, *titles: str) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(first, overflow="fold")
    for title in titles:
        table.add_column(title, justify="right" if title != "most flagged" else "left")
    return table


def testbed_view(report: TestbedReport) -> RenderableType:
    """The testbed's curves, accuracies and checks."""
    curves = Table(title="Harmful score (HS, %) by harmful ratio p: mean ± half of the 95% t-interval over seeds")
    curves.add_column("defense")
    curves.add_column("seeds", justify="right")
    for ratio in report.ratios:
        curves.add_column(f"p={ratio:g}", justify="right")
    for name, points in report.harmful.items():
        seeds = str(next(iter(points.values())).n)
        curves.add_row(name, seeds, *[str(points[ratio]) if ratio in points else "" for ratio in report.ratios])
    learned = Table(title="Accuracy (FA, %) after SFT alignment")
    for title in ("task", "before the user stage", "after it"):
        learned.add_column(title, justify="left" if title == "task" else "right")
    for task, scores in report.accuracy.items():
        learned.add_row(task, str(scores["before"]), str(scores["after"]))
    checks = Table(title="Checks")
    for title in ("", "what must hold", "measured"):
        checks.add_column(title)
    for check in report.checks:
        mark = Text("holds", style="green") if check.holds else Text("FAILS", style="bold red")
        checks.add_row(mark, check.what, check.found)
    return Group(curves, learned, checks)
