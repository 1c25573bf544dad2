"""Compare the inputs of the stored artifacts of a run with those that its experiment leads to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace

from harmbench_vaccine.core.store import Artifact
from harmbench_vaccine.core.types import MODEL_STAGES
from harmbench_vaccine.experiment import keys
from harmbench_vaccine.experiment.artifacts import TrainedModel
from harmbench_vaccine.experiment.experiment import Experiment
from harmbench_vaccine.experiment.rows import eval_sets
from harmbench_vaccine.inference.model_pool import ModelSpec

from .why import Difference, Inputs, compare_inputs

_NOT_COMPARED = {f"{model}.{field}" for model in ("model", "aligned", "final") for field in ("base", "method")}
"""Inputs that differ between machines and versions: each machine builds the testbed itself."""


def differing_inputs(
    experiment: Experiment, artifacts: Mapping[str, Artifact], stored: Mapping[str, Inputs]
) -> list[Difference]:
    """Return the inputs in which the artifacts of a run differ from those of its experiment.

    Args:
        experiment: The settled experiment.
        artifacts: Name in the result (`finetune`, `after/harmful`, `drift`) -> artifact of a model, of answers or of
            the drift.
        stored: Name -> the inputs that the artifact was created from, for those that are compared.

    Returns:
        Differences: `value` follows from the experiment, `earlier` is stored. A stage that differs does not mark the
        stages after it, which are compared under the keys in the result.
    """
    inputs = _expected_inputs(experiment, artifacts)
    if experiment.answer_team.members:  # the key of the generated answers differs between machines, as `_NOT_COMPARED`
        for name in stored.keys() & inputs.keys() - {*MODEL_STAGES, "drift"}:
            inputs[name] = keys.defended_answer_key(experiment, stored[name].get("answers", ""))
    return [
        replace(difference, field=f"inputs of {name}: {difference.field}")
        for name, expected in inputs.items()
        if name in stored
        for difference in compare_inputs(json.loads(json.dumps(expected)), stored[name])
        if difference.field not in _NOT_COMPARED
    ]


def _expected_inputs(experiment: Experiment, artifacts: Mapping[str, Artifact]) -> dict[str, Inputs]:
    """Return the inputs of the artifacts, as `pipeline` requests them."""
    protocol = experiment.protocol
    spec = ModelSpec(experiment.model, protocol.dtype, quantization=protocol.quantization)
    base = model = TrainedModel(experiment.model, spec, {})
    models = {}
    for stage in MODEL_STAGES:
        model = model.after(stage, artifacts[stage], spec) if stage in artifacts else model
        models[stage] = model
    aligned, tuned, repaired, final = (models[stage] for stage in MODEL_STAGES)
    inputs = {
        "align": lambda: keys.align_key(experiment, base),
        "finetune": lambda: keys.finetune_key(experiment, aligned),
        "repair": lambda: keys.repair_key(experiment, aligned, tuned),
        "stress": lambda: keys.stress_key(experiment, repaired),
        "drift": lambda: keys.drift_key(experiment, aligned, final),
    }
    expected = {name: compute() for name, compute in inputs.items() if name in artifacts}
    for eval_set in eval_sets(experiment):
        prompts = [eval_set.template.render(example) for example in eval_set.examples]
        for when, answering in (("before", aligned), ("after", final)):
            expected[f"{when}/{eval_set.name}"] = keys.answer_key(experiment, answering, aligned, eval_set, prompts)
    return expected
