"""Model cards: a README with YAML metadata of the Hub, as text of results and without new numbers."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.core.visible import visible_json
from harmbench_vaccine.data.sources import local_path, name_and_revision
from harmbench_vaccine.evaluation.result import Result, StageRows
from harmbench_vaccine.evaluation.result_fields import Interval
from harmbench_vaccine.evaluation.result_text import interval_ends
from harmbench_vaccine.inference.model_pool import ModelSpec
from harmbench_vaccine.plugins.composition import parse_plugins
from harmbench_vaccine.plugins.registry import TASKS
from harmbench_vaccine.reporting.markdown import markdown_row, markdown_text

from .adapter_edit import AdapterEdit

if TYPE_CHECKING:
    from huggingface_hub import ModelCard


TAGS = ("harmbench-vaccine", "harmful-fine-tuning")
_TITLES = {
    "align": "the model after alignment",
    "finetune": "the model after fine-tuning on the user's rows",
    "final": "the final model",
}
_TEMPLATES = Path(__file__).parent


@dataclass(frozen=True)
class CardFormat:
    """The kind of a folder, its base model and its data type: the parts that every card has."""

    base: str
    """Location of the base model."""
    is_adapter: bool
    """False: the folder has all weights of a model."""
    dtype: str
    quantization: str = "none"

    def metadata(self, tags: Sequence[str]) -> dict[str, Any]:
        """Return the YAML metadata; a base that is not on the Hub, and a license that is not known, are left out."""
        on_hub = local_path(self.base) is None
        return {
            **({"base_model": name_and_revision(self.base)[0]} if on_hub else {}),
            "library_name": "peft" if self.is_adapter else "transformers",
            "pipeline_tag": "text-generation",
            "tags": [*TAGS, *(["lora"] if self.is_adapter else []), *tags],
            **_license(self.base),
        }

    def description(self) -> str:
        """Return one sentence about the content of the folder."""
        path = local_path(self.base)
        name, revision = (str(path), None) if path else name_and_revision(self.base)
        at = f" at revision `{revision}`" if revision else ""
        content = "A LoRA adapter for" if self.is_adapter else "All weights of a model that started from"
        return f"{content} {markdown_text(name)}{at}. The license and the limits of the base model apply."

    def snippet(self) -> str:
        """Return Python code that loads the folder."""
        if self.is_adapter:
            package, name = "peft", "AutoPeftModelForCausalLM"
            lines = [f"from {package} import {name}", "from transformers import AutoTokenizer"]
        else:
            name = "AutoModelForCausalLM"
            lines = [f"from transformers import {name}, AutoTokenizer"]
        return "\n".join(
            [
                *lines,
                "",
                'folder = "."  # this folder, or its name on the Hub',
                f'model = {name}.from_pretrained(folder, dtype="{self.dtype}")',
                "tokenizer = AutoTokenizer.from_pretrained(folder)",
            ]
        )

    def load_notes(self) -> str:
        """Return what a reader of the card has to do to load the folder elsewhere."""
        notes = []
        if self.is_adapter and local_path(self.base) is not None:
            notes.append(
                "The base model is on the disk of the machine that wrote this card. To load the adapter elsewhere, set "
                "`base_model_name_or_path` in `adapter_config.json`."
            )
        if self.quantization != "none":
            notes.append(
                f"The adapter was trained on a base quantized to {self.quantization}, and its scores are of this "
                "base: load it with the `quantization_config` of bitsandbytes."
            )
        return " ".join(notes)


def run_card(result: Result, answers: Sequence[dict[str, Any]], stage: str, spec: ModelSpec, merged: bool) -> ModelCard:
    """Return the card of a model of a stored run.

    Args:
        result: The result of the run.
        answers: Its answers.
        stage: "align", "finetune" or "final".
        spec: The model.
        merged: Whether the folder has all weights.
    """
    base = spec.base if spec.adapters else result.model
    form = CardFormat(base, not merged, result.dtype, result.quantization)
    names = [*result.defense_params, *result.attack_params]
    when = "before" if stage == "align" else "after"
    prompts = [row["prompt"] for row in answers if row["set"] == "task" and row["when"] == when]
    return _render(
        "run_card.md",
        form,
        tags=names,
        title=markdown_text(f"{result.defense} under {result.attack}: {_TITLES[stage]}"),
        warnings=[markdown_text(warning) for warning in _warnings(result, stage)],
        origin=_table(["", ""], _origin(result, stage)),
        scores=_scores(result, stage),
        prompt=_python_text(prompts[0]),
    )


def edit_card(edit: AdapterEdit) -> ModelCard:
    """Return the card of an edited adapter."""
    params = [
        f"{name}: {', '.join(f'{key}={value}' for key, value in values.items()) or 'none'}"
        for name, values in edit.params.items()
    ]
    rows = [
        ("defense", edit.defense),
        ("parameters", "; ".join(params)),
        ("adapter before the edit", edit.source),
        ("alignment adapter", edit.aligned or "none: the base model is the aligned model"),
        ("protocol", f"{edit.protocol}, hash {edit.protocol_hash}"),
        ("task", edit.task),
        ("seed", str(edit.seed)),
        ("data that the defense read", edit.data_text()),
    ]
    return _render(
        "edit_card.md",
        CardFormat(edit.base, True, edit.dtype, edit.quantization),
        tags=list(edit.params),
        title=markdown_text(f"An adapter after the repair by {edit.defense}"),
        origin=_table(["", ""], rows),
    )


# ---------------------------------------------------------------------------------------------------------------------


def _render(template: str, form: CardFormat, tags: Sequence[str], **values: Any) -> ModelCard:
    from huggingface_hub import ModelCard, ModelCardData

    card: ModelCard = ModelCard.from_template(
        ModelCardData(**form.metadata(tags)),
        template_path=str(_TEMPLATES / template),
        description=form.description(),
        snippet=form.snippet(),
        load_notes=form.load_notes(),
        **values,
    )
    return card


def _origin(result: Result, stage: str) -> list[tuple[str, str]]:
    rows = [
        ("run", result.run),
        ("model", _TITLES[stage]),
        ("protocol", f"{result.protocol}, version {result.protocol_version}, hash {result.protocol_hash}"),
        ("defense", result.defense),
    ]
    if stage != "align":
        rows += [("attack", result.attack), ("task", result.task)]
    rows.append(("seed", str(result.seed)))
    trained = {"alignment rows": result.counts.align}
    if stage != "align":
        trained["rows of the user stage"] = result.counts.finetune
    rows += [(name, f"{count.rows}, of which {count.harmful} are harmful") for name, count in trained.items() if count]
    if stage != "align":
        rows.append(("harmful rows in the response tokens of the user stage", result.token_share_text))
    version = result.environment.versions.get("harmbench-vaccine", "")
    return [*rows, ("made by", f"harmbench-vaccine {version}".strip())]


def _warnings(result: Result, stage: str) -> list[str]:
    """Return the reasons why a reader must not use the model as an assistant."""
    warnings = []
    stages: dict[str, StageRows | None] = {"alignment": result.counts.align}
    if stage != "align":
        stages["user"] = result.counts.finetune
    for name, rows in stages.items():
        if rows and rows.harmful:
            warnings.append(
                f"The {name} stage trained on harmful rows ({rows.harmful} of {rows.rows}), so the model may give "
                "harmful answers. Use it only for research on defenses."
            )
    if stage != "align" and not result.trained:
        warnings.append(
            f"The attack {result.attack} edited the weights, so the model may give harmful answers. Use it only for "
            "research on defenses."
        )
    if _is_measured(result, stage) and stage != "align" and result.collapsed:
        warnings.append(f"The model collapsed: it fails a validity gate. {' '.join(result.validity.reasons)}")
    return warnings


def _is_measured(result: Result, stage: str) -> bool:
    """Return whether the scores of a run are those of this model: not of one that a later stage changed."""
    return stage != "finetune" or not {"repair", "stress"} & result.stages.keys()


def _scores(result: Result, stage: str) -> str:
    if not _is_measured(result, stage):
        last = "the attack on its weights" if "stress" in result.stages else "the repair"
        return f"This model was not evaluated: the scores of the run are of the model after {last}."
    judge, before = result.scores[result.scorer], result.before
    limits = f" License of the judge: {judge.license}." if judge.license else ""
    if stage == "align":
        prompts, items = judge.before.n, "the test items"
        harm, harm_ci = before.harmful_score, before.harmful_score_ci
        accuracy, accuracy_ci = before.finetune_accuracy, before.finetune_accuracy_ci
    else:
        prompts, items = result.harmful_score_n, f"{result.finetune_accuracy_n} test items"
        harm, harm_ci = result.harmful_score, result.harmful_score_ci
        accuracy, accuracy_ci = result.finetune_accuracy, result.finetune_accuracy_ci
    table = _table(
        ["score", "value", "95% interval"],
        [
            ("harmful score (HS)", *_percent(harm, harm_ci)),
            ("finetune accuracy (FA)", *_percent(accuracy, accuracy_ci)),
        ],
    )
    model = f" ({result.judge})" if result.judge else ""
    sentences = (
        f"HS is the percentage of answers to {prompts} held-out harmful prompts that the judge "
        f"{result.scorer}{model} flags; lower is safer.{limits} FA is the {result.finetune_accuracy_measure} on "
        f"{items} of {result.task} by {_accuracy_rule(result)}; higher is "
        f"better. Answers are greedy, by {' and '.join(result.answered_by)}. Results of other protocols are not "
        "comparable."
    )
    return f"{table}\n\n{markdown_text(sentences)}"


def _accuracy_rule(result: Result) -> str:
    """Describe the rule that reads an answer to the task, with the text of the task if it has several rules."""
    if result.accuracy_rule == "strict":
        return "the strict rule of the task"
    name = str(result.task_params.get("rule", ""))
    description = ""
    with suppress(BadInput, KeyError):  # the task is not installed here
        description = TASKS.get(parse_plugins(result.task)[0].name).model_fields["rule"].description or ""
    meaning = description.partition(f"{name}: ")[2].partition("; ")[0]
    return "the rule of the task" + (f" ({name}: {meaning})" if meaning else f" ({name})" if name else "")


def _percent(value: float, interval: Interval) -> tuple[str, str]:
    return f"{value:.1f}%", " to ".join(interval_ends(*interval))


def _python_text(text: str) -> str:
    """Return a text as an indented block with a Python expression, one line for each line of the text."""
    lines = [f"        {visible_json(line)}" for line in text.splitlines(keepends=True)]
    return "\n".join(["    prompt = (", *lines, "    )", ""])


def _table(heading: Sequence[str], rows: Sequence[tuple[str, ...]]) -> str:
    return "\n".join([markdown_row(heading), "|---" * len(heading) + "|", *map(markdown_row, rows)])


def _license(base: str) -> dict[str, str]:
    """Return the license fields of the base model's own card; nothing if it has none or cannot be reached."""
    from huggingface_hub import ModelCard, hf_hub_download

    name, revision = name_and_revision(base)
    try:
        path = Path(name, "README.md") if local_path(base) else hf_hub_download(name, "README.md", revision=revision)
        values = ModelCard.load(path, ignore_metadata_errors=True).data.to_dict()
    except Exception:  # the Hub, a file or its YAML: the export does not depend on it
        return {}
    return {key: values[key] for key in ("license", "license_name", "license_link") if values.get(key)}
