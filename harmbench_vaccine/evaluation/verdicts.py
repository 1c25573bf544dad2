"""From answers to verdicts: each pair is read once by each judge, whatever run it is in, and decided as often as asked.

Readings are kept in one file beside the artifacts, under the hash of the question, the answer and everything that a
judge's reading depends on: its code, its parameters but the threshold, the files that it names, its model and what
runs it. They are written as they come, so that judging that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from harmbench_vaccine.core.errors import HbvError
from harmbench_vaccine.core.hashing import digest
from harmbench_vaccine.core.progress import SILENT, Progress
from harmbench_vaccine.core.types import RawJudgment, Verdict
from harmbench_vaccine.data.sources import TESTBED, fingerprint
from harmbench_vaccine.plugins import Scorer

READING = 1
"""Counts up when shared code changes what judges read: what was read before is then read again."""

AT_ONCE = 128
"""Pairs that are read before they are written down."""
NONSENSE = 0.9
"""A judge without a verdict on this share of its answers is no judge of them."""


def raw_judgment_inputs(scorer: Scorer) -> dict[str, Any]:
    """What a reading of this scorer depends on, besides what it reads."""
    params = scorer.model_dump(mode="json")
    model = params.get("model")
    remote = not model or params.get("base_url")
    return {
        "scorer": scorer.name,
        "code": [READING, type(scorer).fingerprint()],
        "params": {
            key: fingerprint(value) if key in scorer.files and value else value
            for key, value in params.items()
            if key not in (*scorer.deciding, *scorer.irrelevant_params, "model")
        },
        "model": model if remote else fingerprint(str(model)),
        **({"backend": scorer.backend} if scorer.backend != "transformers" else {}),
    }


def check_scorer(scorer: Scorer) -> None:
    """Looks whether a scorer can be run, before any work is spent.

    Raises:
        BadInput: its parameters do not fit together, or there is no such model.
    """
    from harmbench_vaccine.inference.model_pool import check_model

    scorer.check()
    for model in scorer_models(scorer):
        if not model.startswith(TESTBED):
            check_model(model)


def scorer_models(scorer: Scorer) -> list[str]:
    """The folders and hub ids that a scorer loads a model from."""
    model = getattr(scorer, "model", "")
    return [model] if model and not getattr(scorer, "base_url", "") else []


def judge_answers(
    scorer: Scorer, pairs: Sequence[tuple[str, str]], root: Path, progress: Progress = SILENT
) -> list[Verdict]:
    """A verdict for each (question, answer), reading only those that were never read; `root` is the store's folder.

    Raises:
        HbvError: the judge cannot be run, or says nothing that is a verdict.
    """
    own = raw_judgment_inputs(scorer)
    keys = [digest([own, question, answer], 32) for question, answer in pairs]
    with _kept(root, progress) as kept:
        found = kept.get(keys)
        missing = {key: pair for key, pair in zip(keys, pairs, strict=True) if key not in found}
        todo = list(missing.items())
        with progress.bar(f"score: {scorer.name}", len(todo)) as advance:
            for start in range(0, len(todo), AT_ONCE):
                part = todo[start : start + AT_ONCE]
                read = dict(zip((key for key, _ in part), scorer.read([pair for _, pair in part]), strict=True))
                found |= read
                # What no verdict can be read from may be a server's bad moment: it is asked again next time.
                kept.put({key: reading for key, reading in read.items() if not scorer.decide(reading).unparsed})
                advance(len(part))
    verdicts = [scorer.decide(found[key]) for key in keys]
    unparsed = [key for key, verdict in zip(keys, verdicts, strict=True) if verdict.unparsed]
    if pairs and len(unparsed) >= NONSENSE * len(pairs):
        raise HbvError(_nonsense(scorer, found[unparsed[0]], len(unparsed), len(pairs)))
    return verdicts


def _nonsense(scorer: Scorer, reading: RawJudgment, count: int, n: int) -> str:
    said = " ".join(reading.text.split())
    example = (
        f"writes {said[:60]!r}" if said or not reading.probabilities else "gives probabilities that are no numbers"
    )
    model = getattr(scorer, "model", "")
    return (
        f"Scorer {scorer.name!r}{model and f' with model {model!r}'} has no verdict on {count} of {n} answers: it "
        f"{example}. Such a model is no such judge, or is not asked by the prompt that it was trained with."
    )


# ---------------------------------------------------------------------------------------------------------------------


class _Kept:
    """Readings in an SQLite file: one row each, no write-ahead log, which network file systems do not take."""

    def __init__(self, connection: sqlite3.Connection | None, progress: Progress) -> None:
        self._connection, self._progress = connection, progress

    def get(self, keys: Sequence[str]) -> dict[str, RawJudgment]:
        found: dict[str, RawJudgment] = {}
        with self._spared():
            for key in dict.fromkeys(keys):
                row = (
                    self._connection
                    and self._connection.execute("SELECT reading FROM readings WHERE key = ?", (key,)).fetchone()
                )
                if row:
                    found[key] = RawJudgment(**json.loads(row[0]))
        return found

    def put(self, readings: Mapping[str, RawJudgment]) -> None:
        with self._spared():
            if self._connection and readings:
                with self._connection:
                    self._connection.executemany(
                        "INSERT OR REPLACE INTO readings VALUES (?, ?)",
                        [(key, json.dumps(asdict(reading), ensure_ascii=False)) for key, reading in readings.items()],
                    )

    @contextmanager
    def _spared(self) -> Iterator[None]:
        """A file that cannot be used costs time, not the run."""
        try:
            yield
        except (sqlite3.Error, ValueError, TypeError) as error:
            self._progress.note(f"verdicts are not kept for other runs: {error}")
            self._connection = None


@contextmanager
def _kept(root: Path, progress: Progress) -> Iterator[_Kept]:
    path = root / ".readings.sqlite"
    try:
        root.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(path, timeout=60)
    except (OSError, sqlite3.Error) as error:
        progress.note(f"verdicts are not kept for other runs: {error}")
        yield _Kept(None, progress)
        return
    with closing(connection):
        kept = _Kept(connection, progress)
        with kept._spared():
            connection.execute("CREATE TABLE IF NOT EXISTS readings (key TEXT PRIMARY KEY, reading TEXT) WITHOUT ROWID")
        yield kept
