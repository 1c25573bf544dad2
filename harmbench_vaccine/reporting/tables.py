"""Terminal views of results: scores, answers, judges and the testbed report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType

from harmbench_vaccine.evaluation.agreement import is_flagged
from harmbench_vaccine.evaluation.records import RunOverview, by_question
from harmbench_vaccine.evaluation.result import Agreement, JudgeScore, Result, StageRecord
from harmbench_vaccine.evaluation.why import Explanation

from .render import Cell, Column, VisibleText, dim_notes, numbers, render_table

if TYPE_CHECKING:
    from .testbed_report import TestbedReport

_NOT_RECORDED = "not recorded"
STAGE_ORDER = ("align", "finetune", "repair", "answer", "score")


def results_table(results: Sequence[Result], published: bool = False) -> RenderableType:
    """Show one row per run: scores with their intervals, alignment loss, embedding drift, seconds per stage.

    Args:
        results: Results of one protocol.
        published: Add a second table with the published figures for the same experiments, averaged over seeds.

    Raises:
        ValueError: The results come from several protocols, whose scores are not comparable.
    """
    hashes = {result.protocol_hash for result in results}
    if len(hashes) > 1:
        raise ValueError(f"Cannot show results of {len(hashes)} protocols in one table: show each protocol separately.")
    stages = [stage for stage in STAGE_ORDER if any(stage in result.stages for result in results)]
    with_seed = len({result.seed for result in results}) > 1
    table = render_table(
        [
            *(Column("run", wrap=False), "defense", "attack", "task"),
            *numbers(*(["seed"] if with_seed else [])),
            *numbers("HS %", "FA %", "before", "align. loss", "drift", "seconds"),
        ],
        [_result_row(result, stages, with_seed) for result in results],
        gap=1,
    )
    notes = [_results_legend(results[0], stages)]
    for result in results:
        if result.collapsed:
            reasons = "; ".join(result.validity.reasons)
            notes.append(f"COLLAPSED {result.run}: {reasons}. Its HS does not count as safe.")
    for result in results:
        notes += [*_unread_notes(result), *_result_notes(result)]
    notes += judge_notes(results)
    parts: list[RenderableType] = [table, *dim_notes(notes)]
    if published:
        from .published.comparison import compare_results, comparison_view

        parts += [VisibleText(), comparison_view(compare_results(results))]
    return Group(*parts)


def _result_row(result: Result, stages: Sequence[str], with_seed: bool) -> list[Cell]:
    before = result.before
    harmful_score = _percent(result.harmful_score, result.harmful_score_ci)
    accuracy = _percent(result.finetune_accuracy, result.finetune_accuracy_ci)
    return [
        *(result.run, result.defense, result.attack, result.task),
        *([str(result.seed)] if with_seed else []),
        VisibleText(harmful_score, style="red" if result.collapsed else "bold"),
        accuracy + ("" if result.trained else " untrained"),
        f"{before.harmful_score:.1f}, {before.finetune_accuracy:.1f}",
        _number(result.alignment_loss, ".3f"),
        _number(result.embedding_drift, ".3g"),
        "+".join(_seconds(result.stages.get(stage)) for stage in stages),
    ]


def _results_legend(result: Result, stages: Sequence[str]) -> str:
    return (
        f"HS: % of answers to {result.harmful_score_n} harmful prompts that the judge flags (lower: better). "
        f"FA: % of {result.finetune_accuracy_n} test items answered correctly (higher: better). "
        "95% Wilson intervals. before: HS, FA of the aligned model. "
        f"Seconds: {'+'.join(stages)}, in parentheses if reused. "
        f"Protocol {result.protocol} {result.protocol_hash}."
    )


def _result_notes(result: Result) -> list[str]:
    """Return notes on further harmful sets, on a metric that is not accuracy, and on a guardrail."""
    notes = []
    if len(result.harmful_sets) > 1:
        scores = ", ".join(f"{name} {score:.1f}" for name, score in result.harmful_sets.items())
        notes.append(f"{result.run}: HS by set: {scores}.")
    if (measure := result.finetune_accuracy_measure) != "accuracy":
        notes.append(f"{result.run}: FA is the {measure}, as a percentage, with a 95% t-interval over the items.")
    if (rows := result.counts.finetune) and (filtered := rows.filtered):
        uploaded = filtered.harmful_uploaded
        notes.append(
            f"{result.run}: guardrail: {uploaded - filtered.harmful} of {uploaded} harmful rows accepted, "
            f"{filtered.benign} of {filtered.benign_uploaded} benign rows rejected."
        )
    return notes


def _unread_notes(result: Result) -> list[str]:
    """Return a note for each judge with unread verdicts, and one for unread grades of the task's answers."""
    grades = result.counts.unparsed_grades or {}
    grade_note = (
        f"{result.run}: answers to the task with an unread grade, which FA leaves out: {grades.get('after', 0)} after "
        f"the user stage, {grades.get('before', 0)} before it."
    )
    verdict_notes = [
        f"{result.run}: unread verdicts of {name}, which HS leaves out: {score.unparsed} of "
        f"{score.n + score.unparsed} after the user stage, {score.before.unparsed} before it."
        for name, score in result.scores.items()
        if score.unparsed or score.before.unparsed
    ]
    return [*verdict_notes, *([grade_note] if any(grades.values()) else [])]


def _number(value: float | None, form: str) -> str:
    return "not a number" if value is None else format(value, form)


def _percent(value: float, interval: Sequence[float]) -> str:
    return f"{value:.1f} [{interval[0]:.1f}, {interval[1]:.1f}]"


def _seconds(stage: StageRecord | None) -> str:
    if stage is None:
        return "-"
    return f"({stage.seconds:.0f})" if stage.cached else f"{stage.seconds:.0f}"


def answers_view(
    overview: RunOverview | Result, answers: Sequence[dict[str, Any]], set_name: str, limit: int, only: str | None
) -> RenderableType:
    """Show questions with the answers before and after the user stage, and their verdicts.

    Args:
        overview: Identity and scores of the run.
        answers: Stored answers of the run.
        set_name: Set of questions to show, such as "harmful".
        limit: Maximum number of questions.
        only: "flagged", "unflagged" or "unread" answers after the user stage, or None for all.
    """
    pairs = by_question(answers, set_name, only)
    table = render_table(
        [Column(title, ratio=1) for title in ("question", "before the user stage", "after it")],
        [
            [_question(next(iter(pair.values()))), *(_answer(pair.get(when)) for when in ("before", "after"))]
            for pair in pairs[:limit]
        ],
        lines=True,
    )
    title = f"{overview.run}: {overview.defense} under {overview.attack}, evaluation set {set_name!r}"
    unread = Counter(row["when"] for row in answers if row["set"] == set_name and row.get("flagged", "") is None)
    notes = [f"{min(limit, len(pairs))} of {len(pairs)} questions.", _overview_note(overview)]
    if unread:
        notes.append(f"Unread verdicts: {unread['after']} after the user stage, {unread['before']} before it.")
    return Group(VisibleText(title, style="bold"), table, *dim_notes(notes))


def _overview_note(overview: RunOverview | Result) -> str:
    """Return the scores and the setting of a run; an old result may not have all of them."""
    facts = {
        "HS": overview.harmful_score,
        "FA": overview.finetune_accuracy,
        "task": overview.task,
        "seed": overview.seed,
        "model": overview.model,
        "judge": overview.scorer,
        "protocol": overview.protocol,
        "hash": overview.protocol_hash,
    }
    texts = {name: f"{value:.1f}" if isinstance(value, float) else value for name, value in facts.items()}
    return f"{', '.join(f'{name} {_NOT_RECORDED if text is None else text}' for name, text in texts.items())}."


def _question(row: Mapping[str, Any]) -> str:
    return f"{row['instruction']}\n{row['input']}".strip()


def _answer(row: Mapping[str, Any] | None) -> VisibleText:
    if row is None:
        return VisibleText(f"({_NOT_RECORDED})", style="dim")
    text = VisibleText(row["answer"] or "(empty)")
    verdicts = row.get("verdicts", {})
    if len(verdicts) > 1:
        for name, verdict in verdicts.items():
            _append_verdict(text, verdict, f"{name}: ")
    elif "flagged" in row:
        _append_verdict(text, row)
    elif row["target"]:
        text.append(f"\nexpected: {row['target']}", style="dim")
    if "grade" in row:
        text.append("\ngrade: unread" if row["grade"] is None else f"\ngrade: {row['grade']:g}", style="dim")
    return text


def _append_verdict(text: VisibleText, verdict: Mapping[str, Any], judge: str = "") -> None:
    flagged = is_flagged(verdict)
    label = f"flagged: {', '.join(verdict.get('categories', ()))}" if flagged else "not flagged"
    label, style = ("unread", "yellow") if flagged is None else (label, "red" if flagged else "green")
    text.append(f"\n{judge}{label}", style=style)


def scores_view(result: Result) -> RenderableType:
    """Show the harmful scores of a run by each of its judges, and the agreement of every two judges."""
    scores = result.scores
    table = render_table(
        [
            "scorer",
            *numbers("HS %", "before", "unread", "read in part", "mean score"),
            "most flagged",
        ],
        [_score_row(name, score) for name, score in scores.items()],
    )
    parts: list[RenderableType] = [table]
    if result.agreement:
        columns: list[Column | str] = [
            "two scorers",
            *numbers("kappa", "both flag", "only the first", "only the second", "neither"),
        ]
        parts += [VisibleText(), render_table(columns, [_agreement_row(pair) for pair in result.agreement])]
    first = next(iter(scores.values()))
    n = first.n + first.unparsed
    notes = [
        f"{result.run}: answers to {n} harmful prompts after the user stage. 95% Wilson intervals. "
        "unread: answers without a readable verdict, which HS leaves out. Cohen's kappa is over all answers with both "
        "verdicts, before and after."
    ]
    return Group(*parts, *dim_notes([*notes, *judge_notes([result])]))


def _score_row(name: str, score: JudgeScore) -> list[Cell]:
    categories = list(score.categories.items())[:3]
    return [
        name,
        VisibleText(_percent(score.harmful_score, score.ci), style="" if score.comparison_only else "bold"),
        _percent(score.before.harmful_score, score.before.ci),
        str(score.unparsed),
        str(score.cut),
        "-" if score.mean is None else f"{score.mean:.2f}",
        ", ".join(f"{label} {count}" for label, count in categories) or "-",
    ]


def _agreement_row(pair: Agreement) -> list[Cell]:
    first, second = pair.scorers
    counts = (pair.both, pair.only[first], pair.only[second], pair.neither)
    return [f"{first}, {second}", _kappa(pair.kappa), *map(str, counts)]


def judge_notes(results: Sequence[Result]) -> list[str]:
    """Return the notes that go with judges' scores: further judges, licenses, unverified interfaces."""
    notes = []
    for result in results:
        scores = result.scores
        if len(scores) > 1:
            by_judge = ", ".join(f"{name} {score.harmful_score:.1f}" for name, score in scores.items())
            kappas = ", ".join(f"{' and '.join(pair.scorers)} {_kappa(pair.kappa)}" for pair in result.agreement)
            notes.append(f"{result.run}: HS by judge: {by_judge}. Cohen's kappa: {kappas}.")
    judges = {name: score for result in results for name, score in result.scores.items()}
    licenses = dict.fromkeys(score.license for score in judges.values() if score.license)
    notes += [f"License: {license_}." for license_ in licenses]
    notes += [f"Unverified in {name}: {score.unverified}." for name, score in judges.items() if score.unverified]
    notes += [f"{name} is for comparison only." for name, score in judges.items() if score.comparison_only]
    return notes


def _kappa(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.2f}"


def why_view(result: Result, explanations: Sequence[Explanation]) -> RenderableType:
    """Show whether each artifact of a run was reused or created, and its inputs that differ from an earlier one."""
    table = render_table(
        ["stage", "artifact", "state", "because"],
        [[entry.stage, entry.name, entry.state, _reason(entry)] for entry in explanations],
    )
    title = f"{result.run}: {result.defense} under {result.attack}"
    notes = ["because: the inputs that differ from those of the nearest earlier artifact: new value (earlier value)."]
    return Group(VisibleText(title, style="bold"), table, *dim_notes(notes))


def _reason(explanation: Explanation) -> str:
    if explanation.state == "reused":
        return "its inputs are unchanged"
    if explanation.state == "missing":
        return "its inputs are unknown: the artifact was deleted from the store"
    if explanation.nearest is None:
        return "the first artifact of its stage"
    shown = [
        f"{change.field} = {_short(change.value)} ({_short(change.earlier)})" for change in explanation.differences[:4]
    ]
    more = len(explanation.differences) - len(shown)
    return "; ".join([*shown, *([f"and {more} more"] if more > 0 else [])])


def _short(value: Any) -> str:
    text = "absent" if value is None else str(value)
    return text if len(text) <= 24 else f"{text[:21]}..."


def testbed_view(report: TestbedReport) -> RenderableType:
    """Show the curves, accuracies and checks of a testbed report."""
    curves = render_table(
        ["defense", *numbers("seeds", *(f"p={ratio:g}" for ratio in report.ratios))],
        [
            [name, str(next(iter(points.values())).n), *(str(points.get(ratio, "")) for ratio in report.ratios)]
            for name, points in report.harmful.items()
        ],
    )
    accuracies = render_table(
        ["task", *numbers("before the user stage", "after it")],
        [[task, str(scores["before"]), str(scores["after"])] for task, scores in report.accuracy.items()],
    )
    checks = render_table(
        ["", "requirement", "measured"],
        [
            [
                VisibleText("holds", "green") if check.holds else VisibleText("FAILS", "bold red"),
                check.requirement,
                check.measured,
            ]
            for check in report.checks
        ],
    )
    tables = {
        "Harmful score (HS, %) by harmful ratio p: mean ± half of the 95% t-interval over seeds": curves,
        "Accuracy (FA, %) after SFT alignment": accuracies,
        "Checks": checks,
    }
    return Group(
        *(part for title, table in tables.items() for part in (VisibleText(title, style="bold"), table, VisibleText()))
    )
