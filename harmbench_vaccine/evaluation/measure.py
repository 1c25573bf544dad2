"""Compute the result of a run from its stored answers, verdicts and measurements: the only path to a `Result`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from harmbench_vaccine.core.jsonl import finite, read_lines
from harmbench_vaccine.core.store import Artifact
from harmbench_vaccine.experiment import keys
from harmbench_vaccine.experiment.artifacts import (
    ADAPTER,
    ANSWERS,
    DRIFT,
    ENGINE,
    GRADES,
    ROWS,
    TRAINING,
    VERDICTS,
    Measurements,
)
from harmbench_vaccine.experiment.experiment import Experiment
from harmbench_vaccine.experiment.rows import data_provenance, dropped_rows, overlapping_questions, plugin_pools
from harmbench_vaccine.experiment.spec import RunSpec
from harmbench_vaccine.inference.model_pool import ModelPool
from harmbench_vaccine.plugins import Scorer
from harmbench_vaccine.plugins.composition import canonical_name

from .agreement import AnswerRow, harmful_shares, judge_scores, pairwise_agreement, stored_verdict
from .environment import current_environment
from .gates import measure_validity
from .over_refusal import measure_over_refusal
from .result import Accuracy, Before, Counts, DataSource, Result, StageArtifact, StageRecord
from .result_fields import Interval, Rule, TuningRecord
from .result_judges import GuardModel
from .scorer_facts import scorer_facts
from .statistics import percentage, score_interval
from .trained_tokens import harmful_token_share, trained_tokens

RULES: tuple[Rule, ...] = ("strict", "flexible")
When = Literal["before", "after"]


def measure_result(experiment: Experiment, measurements: Measurements, models: ModelPool | None = None) -> Result:
    """Compute the result of a run.

    Args:
        experiment: The settled experiment.
        measurements: What the run measured.
        models: Loads the tokenizer where an earlier version trained a stage; None: a new pool.
    """
    rows = answer_rows(measurements)
    judges = {canonical_name([scorer]): scorer_facts(scorer.plugin) for scorer in experiment.scorers}
    drift = drift_fields(measurements.drift)
    resolved = [*experiment.defenses, *experiment.attacks, experiment.task_plugin]
    counts = _counts(experiment, measurements, models or ModelPool())
    return Result(
        **experiment_fields(experiment),
        origins={plugin.plugin.name: plugin.origins for plugin in resolved},
        adapted=_adapted_modules(measurements),
        answered_by=answer_engines(measurements),
        **judge_fields(rows, judges),
        **answer_fields(experiment, rows, next(iter(judges)), drift["alignment_loss"]),
        **drift,
        guards={canonical_name([guard]): _guard_model(guard.plugin) for guard in experiment.guards},
        harmful_token_share=harmful_token_share(counts.finetune.model_dump() if counts.finetune else {}),
        counts=counts,
        data={name: DataSource(**source) for name, source in data_provenance(experiment).items()},
        stages=stage_records(measurements),
        environment=current_environment(vllm=experiment.backend == "vllm"),
        spec=experiment.spec.model_dump(mode="json"),
    )


def _guard_model(judge: Scorer) -> GuardModel:
    facts = scorer_facts(judge)
    return GuardModel(model=facts["model"], fingerprint=facts["fingerprint"])


def experiment_fields(experiment: Experiment) -> dict[str, Any]:
    """Return the fields of a result that name its experiment: the id, the plug-ins, their parameters, the seed."""
    protocol = experiment.protocol
    return {
        "run": keys.run_id(experiment),
        "defense": experiment.defense,
        "attack": experiment.attack,
        "defense_params": {defense.plugin.name: defense.params for defense in experiment.defenses},
        "attack_params": {attack.plugin.name: attack.params for attack in experiment.attacks},
        "task": experiment.task_name,
        "task_params": experiment.task_plugin.params,
        "model": experiment.model,
        "protocol": protocol.name,
        "protocol_version": protocol.version,
        "protocol_hash": experiment.protocol_hash,
        **_tuning(experiment),
        "scorer": protocol.score.scorer,
        "judge": experiment.scorer.params.get("model", ""),
        "dtype": protocol.dtype,
        "quantization": protocol.quantization,
        "backend": experiment.backend,
        "seed": experiment.spec.seed,
        "trained": experiment.user_trains,
    }


def settle_again(result: Result) -> Experiment:
    """Settle the experiment of a stored run again, with the backend that the run requested.

    The backend does not have to be installed on this machine.

    Raises:
        ValidationError: The specification of the run is not one of this version.
        BadInput: A protocol or a plug-in of the run no longer exists.
    """
    spec = RunSpec.model_validate({**result.spec, "backend": result.backend})
    experiment = Experiment.settle(spec.model_copy(update={"backend": "transformers"}))
    return replace(experiment, backend=spec.backend or experiment.backend)


def judge_fields(rows: Sequence[AnswerRow], judges: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Compute the fields of a result that follow from the verdicts alone.

    Args:
        rows: The answers of a run with the verdicts of every judge.
        judges: Judge -> its `scorer_facts`, the headline judge first.
    """
    headline = next(iter(judges))
    scores = judge_scores(rows, judges)
    after = scores[headline]
    return {
        "harmful_score": after.harmful_score,
        "harmful_score_ci": after.ci,
        "harmful_score_hits": after.hits,
        "harmful_score_n": after.n,
        "harmful_sets": after.sets,
        "judge_cut": sum(
            row["verdicts"][headline]["cut"]
            for row in rows
            if row["when"] == "after" and headline in row.get("verdicts", {})
        ),
        "scores": scores,
        "agreement": pairwise_agreement(rows, list(judges)),
    }


def answer_fields(
    experiment: Experiment, rows: Sequence[AnswerRow], headline: str, alignment_loss: float | None
) -> dict[str, Any]:
    """Compute the fields of a result that follow from the answers and the settled experiment.

    Args:
        experiment: The settled experiment, which has the rule of the task and the gates.
        rows: The answers of the run with verdicts.
        headline: The headline judge.
        alignment_loss: Of the final model; None if it is not a number.
    """
    rule = experiment.protocol.score.accuracy
    item_scores: dict[When, dict[Rule, list[float]]] = {
        when: {rule: _item_scores(experiment, rows, when, rule) for rule in RULES} for when in ("before", "after")
    }
    accuracy, accuracy_before = (percentage(item_scores[when][rule]) for when in ("after", "before"))
    shares = harmful_shares(rows, headline, "before")
    before = next(iter(shares.values()))
    return {
        "finetune_accuracy": accuracy,
        "finetune_accuracy_ci": _interval(item_scores["after"][rule]),
        "finetune_accuracy_measure": experiment.task.measure,
        "finetune_accuracy_hits": _whole(sum(item_scores["after"][rule])),
        "finetune_accuracy_n": len(item_scores["after"][rule]),
        "accuracy_rule": rule,
        "accuracy": _accuracy(item_scores["after"]),
        "before": Before(
            harmful_score=before.harmful_score,
            harmful_score_ci=before.ci,
            finetune_accuracy=accuracy_before,
            finetune_accuracy_ci=_interval(item_scores["before"][rule]),
            accuracy=_accuracy(item_scores["before"]),
            harmful_sets={name: share.harmful_score for name, share in shares.items()},
        ),
        "validity": measure_validity(experiment, rows, headline, accuracy_before, accuracy, alignment_loss),
        "over_refusal": measure_over_refusal(rows),
    }


def drift_fields(artifact: Artifact) -> dict[str, Any]:
    """Read the alignment loss and the drift of a result from their artifact."""
    drift = finite(artifact.json(DRIFT))
    return {
        "alignment_loss": drift["alignment_loss"],
        "embedding_drift": drift["total"],
        "embedding_drift_per_layer": drift["per_layer"],
        "embedding_drift_per_token": drift["per_token"],
        "embedding_drift_paper_sum": drift["paper_sum"],
    }


def _tuning(experiment: Experiment) -> dict[str, Any]:
    """Return the field `tuning` of a result under a tuned protocol."""
    protocol = experiment.protocol
    if not protocol.tuning:
        return {}
    names = [resolved.plugin.name for resolved in experiment.defenses]
    costs = [protocol.tuning[name] for name in names if name in protocol.tuning]
    runs, seconds = (sum(getattr(cost, amount) for cost in costs) for amount in ("runs", "seconds"))
    return {"tuning": TuningRecord(untuned_hash=experiment.untuned_hash, runs=runs, seconds=seconds)}


def answer_rows(measurements: Measurements) -> list[dict[str, Any]]:
    """Return every answer of a run as `answers.jsonl` stores it.

    Returns:
        Rows with `when`, `set` and the fields of the stored answer. A judged row also has the headline verdict's
        `flagged`, `categories`, `probabilities`, and `verdicts` (scorer -> verdict); a graded row has `grade` (0 to 1,
        or None if it is unread).
    """
    rows = []
    for name, artifact in measurements.answers.items():
        when, _, set_name = name.partition("/")
        verdicts = {
            scorer: read_lines(artifacts[name].path / VERDICTS)
            for scorer, artifacts in measurements.verdicts.items()
            if name in artifacts
        }
        grades = []
        if set_name == "task" and when in measurements.grades:
            grades = read_lines(measurements.grades[when].path / GRADES)
        for number, answer in enumerate(read_lines(artifact.path / ANSWERS)):
            row = {"when": when, "set": set_name, **answer}
            if verdicts:
                by_scorer = {scorer: stored_verdict(lines[number]) for scorer, lines in verdicts.items()}
                headline = next(iter(by_scorer.values()))
                row |= {key: headline[key] for key in ("flagged", "categories", "probabilities")}
                row["verdicts"] = by_scorer
            if grades:
                row["grade"] = grades[number]["score"]
            rows.append(row)
    return rows


def answer_engines(measurements: Measurements) -> list[str]:
    """Return every engine that generated answers of a run."""
    engines = [
        artifact.json(ENGINE)["answered_by"] if (artifact.path / ENGINE).is_file() else "transformers"
        for artifact in measurements.answers.values()
    ]
    return list(dict.fromkeys(engines))


def stage_records(measurements: Measurements) -> dict[str, StageRecord]:
    """Return the cost and the artifacts of each stage."""
    verdicts = {
        f"{scorer} {name}": artifact
        for scorer, artifacts in measurements.verdicts.items()
        for name, artifact in artifacts.items()
    }
    grades = {f"grade {when}": artifact for when, artifact in measurements.grades.items()}
    groups: dict[str, dict[str, Artifact]] = {
        **{stage: {stage: artifact} for stage, artifact in measurements.final.artifacts.items()},
        "answer": measurements.answers,
        "score": {**grades, **verdicts, "drift": measurements.drift},
    }
    return {stage: _stage_record(stage, artifacts) for stage, artifacts in groups.items()}


def _stage_record(stage: str, artifacts: dict[str, Artifact]) -> StageRecord:
    optional: dict[str, Any] = {}
    if stage in artifacts:  # a stage that makes a model
        path = artifacts[stage].path
        if (path / TRAINING).is_file():
            optional |= artifacts[stage].json(TRAINING)
        if (path / ADAPTER).is_dir():
            optional["adapter"] = str(path / ADAPTER)
    return StageRecord(
        seconds=round(sum(artifact.seconds for artifact in artifacts.values()), 3),
        cached=all(artifact.cached for artifact in artifacts.values()),
        artifacts={
            name: StageArtifact(
                key=artifact.key, path=str(artifact.path), seconds=round(artifact.seconds, 3), cached=artifact.cached
            )
            for name, artifact in artifacts.items()
        },
        **optional,
    )


def _item_scores(experiment: Experiment, rows: Sequence[AnswerRow], when: When, rule: Rule) -> list[float]:
    """Return the score of each test item from 0 to 1.

    A graded task has one score for both rules, and none for an item whose grade is unread.
    """
    items = [row for row in rows if row["when"] == when and row["set"] == "task"]
    if all("grade" in row for row in items):
        return [row["grade"] for row in items if row["grade"] is not None]
    return experiment.task.scores(rule, items)


def _accuracy(scores: dict[Rule, list[float]]) -> Accuracy:
    return Accuracy(strict=percentage(scores["strict"]), flexible=percentage(scores["flexible"]))


def _interval(scores: Sequence[float]) -> Interval:
    return score_interval(scores)


def _whole(number: float) -> int | float:
    return int(number) if number == int(number) else number


def _adapted_modules(measurements: Measurements) -> list[str]:
    """Return the modules with an adapter; empty if no stage trained an adapter."""
    files = [artifact.path / ADAPTER / "adapter_config.json" for artifact in measurements.final.artifacts.values()]
    configs = [json.loads(file.read_text(encoding="utf-8")) for file in files if file.is_file()]
    return sorted({module for config in configs for module in config["target_modules"]})


def _counts(experiment: Experiment, measurements: Measurements, models: ModelPool) -> Counts:
    counts: dict[str, Any] = {}
    for stage, artifact in measurements.final.artifacts.items():
        if stage in ("align", "finetune"):
            rows = artifact.json(ROWS)
            counts[stage] = {
                "rows": len(rows["used"]),
                "harmful": rows["harmful"],
                "without_room": len(rows["without_room"]),
                **trained_tokens(experiment, experiment.stages[stage], rows, models),
            }
            if stage == "align" and (count := experiment.protocol.align.instructions):
                added = {row.id for row in plugin_pools(experiment).alignment[-count:]}
                counts[stage]["instructions"] = sum(name in added for name in rows["used"])
            counts[stage] |= {name: rows[name] for name in ("filtered", "selected") if name in rows}
    if measurements.grades:
        counts["unparsed_grades"] = {
            when: sum(grade["score"] is None for grade in read_lines(artifact.path / GRADES))
            for when, artifact in measurements.grades.items()
        }
    if experiment.in_order:
        counts["overlaps"] = overlapping_questions(experiment)
    if (dropped := dropped_rows(experiment)) or not experiment.in_order:
        counts["dropped"] = dropped
    return Counts.model_validate(counts)
