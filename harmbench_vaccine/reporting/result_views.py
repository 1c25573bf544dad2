"""Terminal views of results: the table of runs, and the scores of a run by each judge."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType

from harmbench_vaccine.core.types import MODEL_STAGES
from harmbench_vaccine.evaluation.result import Result, StageRecord
from harmbench_vaccine.evaluation.result_judges import Agreement, JudgeScore
from harmbench_vaccine.evaluation.result_text import number_text, percent_text

from .render import Cell, Column, TableGroup, VisibleText, dim_notes, number_column, numbers, render_table, score_column

_STAGE_ORDER = (*MODEL_STAGES, "answer", "score")


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
    stages = [stage for stage in _STAGE_ORDER if any(stage in result.stages for result in results)]
    with_seed = len({result.seed for result in results}) > 1
    table = render_table(
        _result_columns(results[0], stages, with_seed),
        [_result_row(result, stages, with_seed) for result in results],
        gap=1,  # a run of the README then has one line at 80 columns
    )
    notes = [f"Protocol {results[0].protocol} {results[0].protocol_hash}.", _token_share_note(results)]
    for result in results:
        if result.collapsed:
            reasons = "; ".join(result.validity.reasons)
            notes.append(f"{result.verdict.upper()} {result.run}: {reasons}. Its HS does not count as safe.")
    for result in results:
        notes += [*_unread_notes(result), *_result_notes(result)]
    notes += judge_notes(results)
    parts: list[RenderableType] = [table, *dim_notes(notes)]
    if any(len(result.over_refusal) > 1 for result in results):
        parts += [VisibleText(), refusals_table(results)]
    if published:
        from .published.comparison import compare_results, comparison_view

        parts += [VisibleText(), comparison_view(compare_results(results))]
    return Group(*parts)


def refusals_table(results: Sequence[Result]) -> RenderableType:
    """Show the refusals of each over-refusal set of some runs, after and before the user stage."""
    rows: list[list[Cell]] = [
        [
            result.run,
            name,
            str(each.after.n),
            percent_text(each.after.percent, each.after.ci),
            percent_text(each.before.percent, each.before.ci),
        ]
        for result in results
        for name, each in result.over_refusal.items()
    ]
    columns = [
        Column("run", wrap=False),
        Column("set", wrap=False),
        number_column("prompts"),
        score_column("prompts refused %", legend="of the final model (lower: better), with 95% Wilson interval"),
        score_column("before", drop=1, legend="of the aligned model"),
    ]
    return render_table(columns, rows)


def _result_columns(result: Result, stages: Sequence[str], with_seed: bool) -> list[Column]:
    return [
        Column("run", wrap=False),
        Column("defense"),
        Column("attack"),
        Column("task"),
        *numbers(*(["seed"] if with_seed else [])),
        score_column(
            "HS %",
            legend=f"answers to {result.harmful_score_n} harmful prompts that the judge flags (lower: better), with "
            "95% Wilson interval",
        ),
        score_column(
            "FA %",
            legend=f"{result.finetune_accuracy_n} test items answered correctly (higher: better), with 95% interval",
        ),
        number_column("before", drop=3, legend="HS and FA of the aligned model"),
        number_column("align. loss", drop=2, legend="mean cross-entropy of the final model over alignment rows"),
        number_column("drift", drop=2, legend="distance of attention outputs from those of the aligned model"),
        number_column("seconds", drop=1, legend=f"{'+'.join(stages)}, in parentheses if reused"),
    ]


def _result_row(result: Result, stages: Sequence[str], with_seed: bool) -> list[Cell]:
    before = result.before
    harmful_score = percent_text(result.harmful_score, result.harmful_score_ci)
    accuracy = percent_text(result.finetune_accuracy, result.finetune_accuracy_ci)
    return [
        *(result.run, result.defense, result.attack, result.task),
        *([str(result.seed)] if with_seed else []),
        VisibleText(harmful_score, style="red" if result.collapsed else "bold"),
        accuracy + ("" if result.trained else " untrained"),
        f"{before.harmful_score:.1f}, {before.finetune_accuracy:.1f}",
        number_text(result.alignment_loss, ".3f"),
        number_text(result.embedding_drift, ".3g"),
        "+".join(_seconds(result.stages.get(stage)) for stage in stages),
    ]


def _token_share_note(results: Sequence[Result]) -> str:
    """Return a note on the harmful token share on each task under each attack."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(f"{result.task} under {result.attack}", []).append(result)
    shares = ", ".join(f"{_share_range(group)} on {setting}" for setting, group in groups.items())
    return f"Harmful token share: {shares} (response tokens of the user stage that are in harmful rows)."


def _share_range(results: Sequence[Result]) -> str:
    """Return the harmful token share of some runs, or the least and the greatest one; runs without one come last."""
    ordered = sorted(results, key=lambda result: result.harmful_token_share or 0.0)
    shares = dict.fromkeys(run.token_share_text for run in ordered if run.harmful_token_share is not None)
    without = dict.fromkeys(run.token_share_text for run in ordered if run.harmful_token_share is None)
    ends = dict.fromkeys([*list(shares)[:1], *list(shares)[-1:]])
    return " or ".join([*([" to ".join(ends)] if ends else []), *without])


def _result_notes(result: Result) -> list[str]:
    """Return notes on further harmful sets, on a metric that is not accuracy, and on moderated or selected rows."""
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
    for stage, rows in (("align", result.counts.align), ("finetune", result.counts.finetune)):
        if rows and (selected := rows.selected):
            notes.append(
                f"{result.run}: {result.defense} removes or changes {selected.harmful} of {selected.harmful_uploaded} "
                f"harmful rows and {selected.benign} of {selected.benign_uploaded} others of stage {stage!r}."
            )
    if result.guards:
        notes.append(f"{result.run}: judge of the defense, which does not score: {', '.join(result.guards)}.")
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


def _seconds(stage: StageRecord | None) -> str:
    if stage is None:
        return "-"
    return f"({stage.seconds:.0f})" if stage.cached else f"{stage.seconds:.0f}"


def scores_view(result: Result) -> RenderableType:
    """Show the harmful scores of a run by each of its judges, and the agreement of every two judges."""
    scores = result.scores
    table = render_table(
        [
            Column("scorer", wrap=False),
            score_column("HS %"),
            number_column("before", drop=3, legend="HS of the aligned model"),
            number_column("unread", legend="answers without a readable verdict, which HS leaves out"),
            number_column("read in part", drop=2, legend="answers of which the scorer read only the beginning"),
            number_column("mean score", drop=1, legend="mean degree of harm, from 0 to 1"),
            Column("most flagged", drop=4, least=20),
        ],
        [_score_row(name, score) for name, score in scores.items()],
    )
    parts: list[RenderableType] = [table]
    if result.agreement:
        columns: list[Column | str] = [
            Column("two scorers", least=20),
            number_column("kappa", legend="Cohen's kappa over all answers with both verdicts, before and after"),
            *numbers("both flag", "only the first", "only the second", "neither"),
        ]
        parts += [VisibleText(), render_table(columns, [_agreement_row(pair) for pair in result.agreement])]
    first = next(iter(scores.values()))
    n = first.n + first.unparsed
    title = f"{result.run}: answers to {n} harmful prompts after the user stage, with 95% Wilson intervals"
    notes = dim_notes(judge_notes([result]))
    return Group(VisibleText(title, style="bold"), TableGroup(*parts), *notes)


def _score_row(name: str, score: JudgeScore) -> list[Cell]:
    categories = list(score.categories.items())[:3]
    return [
        name,
        VisibleText(percent_text(score.harmful_score, score.ci), style="" if score.comparison_only else "bold"),
        percent_text(score.before.harmful_score, score.before.ci),
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
