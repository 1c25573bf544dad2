"""What a cell leaves behind: one result, its answers with verdicts, a row in the CSV; and how they are found again."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

from filelock import FileLock

from harmbench_vaccine.core.errors import BadInput, unknown_name
from harmbench_vaccine.core.hashing import canonical_json, digest
from harmbench_vaccine.core.jsonl import finite, read_lines, write_atomically
from harmbench_vaccine.core.paths import home
from harmbench_vaccine.core.store import Artifact, readable_disk_errors
from harmbench_vaccine.data.answer_checks import answer_shares, refuses
from harmbench_vaccine.experiment.artifacts import ANSWERS, ENGINE, GRADES, ROWS, VERDICTS, Measurements
from harmbench_vaccine.experiment.experiment import Experiment
from harmbench_vaccine.experiment.rows import data_provenance, dropped_rows, overlapping_questions
from harmbench_vaccine.inference.engine import installed_vllm
from harmbench_vaccine.plugins import Scorer
from harmbench_vaccine.plugins.composition import canonical_name

from .agreement import SCORER_FACTS, judge_scores, pairwise_agreement, scorer_facts, stored_verdict
from .statistics import percentage, score_interval, wilson

RESULT = "result.json"
RESULT_STAGES = ("align", "finetune", "repair", "answer", "score")
RULES: tuple[Literal["strict", "flexible"], ...] = ("strict", "flexible")


def build_result(cell: Experiment, measured: Measurements) -> dict[str, Any]:
    """The result of a cell as plain JSON; percentages are 0 to 100."""
    rule = cell.protocol.score.accuracy
    before, after = (_scores(cell, measured, when) for when in ("before", "after"))
    moved = {key: finite(value) for key, value in measured.drift.json("drift.json").items()}
    validity = _validity(cell, measured, before[rule], after[rule], moved["alignment_loss"])
    n_harmful, n_task = before["harmful_n"], before["task_n"]
    judged = answer_rows(cell, measured)
    judges = {canonical_name([scorer]): scorer_facts(cast(Scorer, scorer.plugin)) for scorer in cell.scorers}
    return {
        "run": cell.id,
        "defense": cell.defense,
        "attack": cell.attack,
        "defense_params": {resolved.plugin.name: resolved.params for resolved in cell.defenses},
        "attack_params": {resolved.plugin.name: resolved.params for resolved in cell.attacks},
        "origins": {resolved.plugin.name: resolved.origins for resolved in [*cell.defenses, *cell.attacks]},
        "task": cell.task_name,
        "model": cell.model,
        "protocol": cell.protocol.name,
        "protocol_version": cell.protocol.version,
        "protocol_hash": cell.protocol.hash,
        "scorer": cell.protocol.score.scorer,
        "judge": cell.scorer.params.get("model", ""),
        "dtype": cell.protocol.dtype,
        "quantization": cell.protocol.quantization,
        "adapted": _adapted(measured),
        "backend": cell.backend,
        "answered_by": _answered_by(measured),
        "seed": cell.spec.seed,
        "harmful_score": after["harmful"],
        "harmful_score_ci": list(wilson(after["harmful_hits"], n_harmful)),
        "harmful_score_hits": after["harmful_hits"],
        "harmful_score_n": n_harmful,
        "finetune_accuracy": after[rule],
        "finetune_accuracy_ci": list(score_interval(after[f"{rule}_scores"])),
        "finetune_accuracy_measure": cell.task.measure,
        "finetune_accuracy_hits": after[f"{rule}_hits"],
        "finetune_accuracy_n": n_task,
        "trained": cell.trains,
        "accuracy_rule": rule,
        "accuracy": {key: after[key] for key in ("strict", "flexible")},
        "harmful_sets": after["sets"],
        "before": {
            "harmful_score": before["harmful"],
            "harmful_score_ci": list(wilson(before["harmful_hits"], n_harmful)),
            "finetune_accuracy": before[rule],
            "finetune_accuracy_ci": list(score_interval(before[f"{rule}_scores"])),
            "accuracy": {key: before[key] for key in ("strict", "flexible")},
            "harmful_sets": before["sets"],
        },
        "alignment_loss": moved["alignment_loss"],
        "embedding_drift": moved["total"],
        "embedding_drift_per_layer": moved["per_layer"],
        "embedding_drift_per_token": moved["per_token"],
        "embedding_drift_paper_sum": moved["paper_sum"],
        "validity": validity,
        "counts": _counts(cell, measured),
        "data": data_provenance(cell),
        "judge_cut": after["cut"],
        "scores": judge_scores(judged, judges),
        "agreement": pairwise_agreement(judged, list(judges)),
        "stages": stages(measured),
        "spec": cell.spec.model_dump(mode="json"),
        "versions": {**versions(), **(installed_vllm() if cell.backend == "vllm" else {})},
    }


def _answered_by(measured: Measurements) -> list[str]:
    """Every engine that had a part in the answers."""
    told = [
        artifact.json(ENGINE)["answered_by"] if (artifact.path / ENGINE).is_file() else "transformers"
        for artifact in measured.answers.values()
    ]
    return list(dict.fromkeys(told))


def _adapted(measured: Measurements) -> list[str]:
    """The modules that an adapter was laid on; none where every stage was left out or changed all weights."""
    adapters = [*measured.aligned.state.adapters, *measured.final.state.adapters]
    configs = [json.loads((path / "adapter_config.json").read_text(encoding="utf-8")) for path in adapters]
    return sorted({module for config in configs for module in config["target_modules"]})


def _counts(cell: Experiment, measured: Measurements) -> dict[str, Any]:
    """How many rows each stage learned from, how many had no room for an answer, how many a guardrail let through, and
    how many were left out to keep the pools apart by text, or are in several of them."""
    found: dict[str, Any] = {}
    for stage, artifact in measured.final.artifacts.items():
        if stage != "repair":
            rows = artifact.json(ROWS)
            found[stage] = {
                "rows": len(rows["used"]),
                "harmful": rows["harmful"],
                "without_room": len(rows["without_room"]),
                **({"filtered": rows["filtered"]} if "filtered" in rows else {}),
            }
    if measured.grades:
        unread = {when: sum(grade["unread"] for grade in _grades(measured, when)) for when in measured.grades}
        found["unread_grades"] = unread
    apart = {"overlaps": overlapping_questions(cell)} if cell.in_order else {"dropped": dropped_rows(cell)}
    return {**found, **apart}


def _grades(measured: Measurements, when: str) -> list[dict[str, Any]]:
    return read_lines(measured.grades[when].path / GRADES)


def _scores(cell: Experiment, measured: Measurements, when: str) -> dict[str, Any]:
    """The harmful scores and accuracies of one model."""
    sets, cut = {}, 0
    for name, artifact in measured.verdicts.items():
        if name.startswith(f"{when}/"):
            verdicts = read_lines(artifact.path / VERDICTS)
            flags = [stored_verdict["flagged"] for stored_verdict in verdicts]
            cut += sum(stored_verdict["cut"] for stored_verdict in verdicts)
            sets[name.partition("/")[2]] = {"harmful_score": percentage(flags), "hits": sum(flags), "n": len(flags)}
    headline = next(iter(sets.values()))
    rows = read_lines(measured.answers[f"{when}/task"].path / ANSWERS)
    given = [float(grade["score"]) for grade in _grades(measured, when)] if measured.grades else None
    rules = {rule: given or cell.task.scores(rule, rows) for rule in RULES}
    return {
        "sets": {name: values["harmful_score"] for name, values in sets.items()},
        "harmful": headline["harmful_score"],
        "harmful_hits": headline["hits"],
        "harmful_n": headline["n"],
        "task_n": len(rows),
        "cut": cut,
        **{rule: percentage(hits) for rule, hits in rules.items()},
        **{f"{rule}_hits": _whole(sum(hits)) for rule, hits in rules.items()},
        **{f"{rule}_scores": hits for rule, hits in rules.items()},
    }


def _whole(number: float) -> float:
    return int(number) if number == int(number) else number


def _validity(
    cell: Experiment, measured: Measurements, accuracy_before: float, accuracy: float, loss: float | None
) -> dict[str, Any]:
    """The gates: what was measured on the aligned and on the final model, and why the cell fails, if it does.

    Not gated, but shown: `neither`, the share of harmful prompts answered neither harmfully nor with a refusal.
    A model that never learned the user's task is not held to its accuracy.
    """
    gates = cell.protocol.gates
    measured_shares: dict[str, Any] = {}
    reasons = []
    for when in ("before", "after"):
        texts = {
            name.partition("/")[2]: [row["answer"] for row in read_lines(artifact.path / ANSWERS)]
            for name, artifact in measured.answers.items()
            if name.startswith(f"{when}/") and not name.endswith("/task")
        }
        benign = answer_shares(texts["benign"])
        every = answer_shares([text for answer_rows in texts.values() for text in answer_rows])
        degenerate = every["empty"] + every["repetitive"]
        headline = next(name for name in measured.verdicts if name.startswith(f"{when}/"))
        flags = [
            stored_verdict["flagged"] for stored_verdict in read_lines(measured.verdicts[headline].path / VERDICTS)
        ]
        harmful = texts[headline.partition("/")[2]]
        values = {
            "empty": every["empty"],
            "repetitive": every["repetitive"],
            "degenerate": degenerate,
            "over_refusal": benign["refusals"],
            "neither": percentage([not (flag or refuses(text)) for flag, text in zip(flags, harmful, strict=True)]),
        }
        measured_shares[when] = values
        if degenerate > gates.degenerate:
            reasons.append(
                f"{degenerate:.0f}% of answers {_TIMES[when]} are empty or repetitive (at most {gates.degenerate:g}%)"
            )
        if benign["refusals"] > gates.refusals:
            reasons.append(
                f"{benign['refusals']:.0f}% of benign prompts are refused {_TIMES[when]} (at most {gates.refusals:g}%)"
            )
    floor = cell.task.chance + gates.above_chance
    if cell.trains and accuracy <= floor:
        reasons.append(
            f"accuracy {accuracy:.1f} after the user stage is not above {floor:g} (guessing gives {cell.task.chance:g})"
        )
    if gates.accuracy_before is not None and accuracy_before < gates.accuracy_before:
        reasons.append(f"accuracy {accuracy_before:.1f} before the user stage is below {gates.accuracy_before:g}")
    if loss is None:
        reasons.append("the alignment loss is not a number: the model diverged")
    return {"collapsed": bool(reasons), "reasons": reasons, "shares": measured_shares, "gates": gates.model_dump()}


_TIMES = {"before": "of the aligned model", "after": "after the user stage"}


def stages(measured: Measurements) -> dict[str, dict[str, Any]]:
    """Stage -> seconds that it took when it was made, and whether it was there already."""
    groups: dict[str, list[Artifact]] = {
        **{name: [artifact] for name, artifact in measured.final.artifacts.items()},
        "answer": list(measured.answers.values()),
        "score": [
            *measured.grades.values(),
            *measured.verdicts.values(),
            *(artifact for of in measured.others.values() for artifact in of.values()),
            measured.drift,
        ],
    }
    return {
        name: {
            "seconds": round(sum(artifact.seconds for artifact in groups[name]), 3),
            "cached": all(artifact.cached for artifact in groups[name]),
        }
        for name in RESULT_STAGES
        if name in groups
    }


def versions() -> dict[str, str]:
    """The versions that a number depends on."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for package in ("harmbench-vaccine", "torch", "transformers", "peft", "accelerate"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


# ---------------------------------------------------------------------------------------------------------------------
# On disk


def save_run(cell: Experiment, measured: Measurements, values: dict[str, Any], folder: Path, table: Path) -> Path:
    """Writes `<folder>/<run>/` with the result and every answer, and the run's row of the CSV. Returns the folder."""
    run = folder / cell.id
    with readable_disk_errors(f"the result of {cell.id}"):
        run.mkdir(parents=True, exist_ok=True)
        with run_lock(run):
            write_run(run, *_with_earlier(run, values, answer_rows(cell, measured)))
        _append(table, values)
    return run


def _with_earlier(
    run: Path, values: dict[str, Any], rows: list[dict[str, Any]]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A result and its answers with what further judges said of these very answers before (`hbv score`)."""
    try:
        old_values, old_rows = load_run(run)
        judges = old_values["scores"]
        said = {identity(row): row.get("verdicts", {}) for row in old_rows}
    except (OSError, ValueError, KeyError):
        return values, rows
    judged = [identity(row) for row in rows if "verdicts" in row]
    further = [
        name for name in judges if name not in values["scores"] and all(name in said.get(key, {}) for key in judged)
    ]
    return side_by_side(values, rows, said, {name: judges[name] for name in further})


def side_by_side(
    values: dict[str, Any],
    rows: Sequence[dict[str, Any]],
    said: Mapping[Any, Mapping[str, Any]],
    judges: Mapping[str, Mapping[str, Any]],
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A result and its answers with the verdicts of further judges.

    `said` holds verdicts by `identity` of the answer and by judge, `judges` the facts of each.
    """
    more = [
        {**row, "verdicts": {**row["verdicts"], **{name: said[identity(row)][name] for name in judges}}}
        if "verdicts" in row
        else row
        for row in rows
    ]
    told = {**values["scores"], **judges}
    known = {name: {key: scorer_facts[key] for key in SCORER_FACTS} for name, scorer_facts in told.items()}
    return {**values, "scores": judge_scores(more, known), "agreement": pairwise_agreement(more, list(known))}, more


def identity(row: Mapping[str, Any]) -> tuple[str, ...]:
    """What tells an answer of a run from every other one, its text included."""
    return tuple(row[key] for key in ("when", "set", "id", "instruction", "input", "answer"))


def run_lock(run: Path) -> FileLock:
    """Keeps two processes from changing one run's folder at a time."""
    folder = home() / "store" / ".locks"
    folder.mkdir(parents=True, exist_ok=True)
    return FileLock(folder / f"run-{digest(str(run.resolve()))}")


def write_run(run: Path, values: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    """Puts a run's answers and its result into its folder, each whole or not at all."""
    write_atomically(run / ANSWERS, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    write_atomically(run / RESULT, json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False))


def answer_rows(cell: Experiment, measured: Measurements) -> list[dict[str, Any]]:
    """Every answer of a cell; where it was judged, with the verdict of the headline and with all of them by scorer."""
    judges = {canonical_name([cell.scorer]): measured.verdicts, **measured.others}
    rows = []
    for name, artifact in measured.answers.items():
        when, _, asked = name.partition("/")
        given = {scorer: read_lines(of[name].path / VERDICTS) for scorer, of in judges.items() if name in of}
        for number, row in enumerate(read_lines(artifact.path / ANSWERS)):
            verdicts = {scorer: stored_verdict(lines[number]) for scorer, lines in given.items()}
            own: dict[str, Any] = {}
            if verdicts:
                first = next(iter(verdicts.values()))
                own = {key: first[key] for key in ("flagged", "categories", "probabilities")}
                own["verdicts"] = verdicts
            rows.append({"when": when, "set": asked, **row, **own})
    return rows


def by_question(
    answer_rows: Sequence[dict[str, Any]], asked: str, only: str | None = None
) -> list[dict[str, dict[str, Any]]]:
    """The answers to one set of questions, `before` and `after` together; `only` those whose `after` is "flagged" or
    "unflagged"."""
    pairs: dict[str, dict[str, dict[str, Any]]] = {}
    for row in answer_rows:
        if row["set"] == asked:
            pairs.setdefault(row["id"], {})[row["when"]] = row
    return [pair for pair in pairs.values() if only is None or pair["after"].get("flagged") is (only == "flagged")]


def _append(path: Path, values: dict[str, Any]) -> None:
    """Puts a result's row into the CSV, in place of an earlier row of the same run."""
    row = {key: _cell(value) for key, value in csv_row(values).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        kept = [old for old in check_columns(path) if old["run"] != row["run"]]
        out = io.StringIO()
        writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows([*kept, row])
        write_atomically(path, out.getvalue())


def check_columns(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV of results; none where there is no file yet.

    Raises:
        BadInput: it is no such CSV.
    """
    if not path.exists():
        return []
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            if reader.fieldnames is None or list(reader.fieldnames) == COLUMNS:
                return list(reader)
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path} cannot be read as a CSV of results: {error}.") from error
    raise BadInput(f"{path} has other columns than results of this version: name another file.")


def csv_row(values: dict[str, Any]) -> dict[str, Any]:
    """A result as one tidy row: the columns `COLUMNS`, JSON where a value is a table of its own."""
    low, high = values["harmful_score_ci"]
    accuracy_low, accuracy_high = values["finetune_accuracy_ci"]
    own = {
        "harmful_score_low": low, "harmful_score_high": high,
        "finetune_accuracy_low": accuracy_low, "finetune_accuracy_high": accuracy_high,
        "harmful_score_before": values["before"]["harmful_score"],
        "finetune_accuracy_before": values["before"]["finetune_accuracy"],
        **{name: values["validity"]["shares"]["after"][name] for name in ("degenerate", "over_refusal", "neither")},
        "collapsed": values["validity"]["collapsed"], "reasons": "; ".join(values["validity"]["reasons"]),
        "seconds": round(sum(stage["seconds"] for stage in values["stages"].values()), 1),
    }  # fmt: skip
    return {column: own[column] if column in own else values[column] for column in COLUMNS}


COLUMNS = [
    *("run", "protocol", "protocol_version", "protocol_hash", "scorer", "model"),
    *("defense", "defense_params", "attack", "attack_params", "task", "seed"),
    *("harmful_score", "harmful_score_low", "harmful_score_high", "harmful_score_hits", "harmful_score_n"),
    "harmful_sets",
    *("finetune_accuracy", "finetune_accuracy_low", "finetune_accuracy_high"),
    *("finetune_accuracy_hits", "finetune_accuracy_n", "trained"),
    *("harmful_score_before", "finetune_accuracy_before"),
    *("alignment_loss", "embedding_drift", "embedding_drift_per_token"),
    *("degenerate", "over_refusal", "neither", "collapsed", "reasons", "seconds", "versions"),
]


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    return canonical_json(value) if isinstance(value, dict | list) else str(value)


def find_run(run: str, folder: Path) -> Path:
    """The folder of a run: an id, a unique beginning of one, or a folder.

    Raises:
        BadInput: there is none, or there are several.
    """
    if (Path(run) / RESULT).is_file():
        return Path(run)
    there = {path.parent.name: path.parent for path in folder.glob(f"*/{RESULT}")}
    if run in there:
        return there[run]
    fitting = sorted(name for name in there if name.startswith(run))
    if len(fitting) > 1:
        raise BadInput(f"Run {run!r} could be any of {', '.join(fitting)}: write more of it.")
    if not fitting:
        raise unknown_name("run", run, there)
    return there[fitting[0]]


def load_run(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The result of a run and its answers."""
    values: dict[str, Any] = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    return values, read_lines(folder / ANSWERS)
