"""The plan of a dry run with its cost, as plain JSON: seconds and bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from harmbench_vaccine.core.errors import BadInput, HbvError
from harmbench_vaccine.core.store import Store
from harmbench_vaccine.core.types import MODEL_STAGES, STAGES
from harmbench_vaccine.experiment.experiment import Experiment
from harmbench_vaccine.experiment.keys import run_id
from harmbench_vaccine.experiment.protocol import leaf_values
from harmbench_vaccine.experiment.separate_trainings import requested_trainings
from harmbench_vaccine.experiment.spec import RunSpec
from harmbench_vaccine.plugins.composition import parse_plugins

from .costs import Kind
from .devices import HERE, THIS_MACHINE, Target
from .plan import Plan, plan_runs


def dry_run_json(
    plan: Plan, store: Store, target: Target = THIS_MACHINE, gradient_checkpointing: bool = False
) -> dict[str, Any]:
    """Return a plan with the cost of the stages that are not stored.

    Args:
        plan: The plan.
        store: The store, whose testbed run shows the error of estimates on this machine.
        target: The device to estimate for.
        gradient_checkpointing: As in `hbv run`.
    """
    experiments = [
        _experiment_json(plan, index, target, gradient_checkpointing) for index in range(len(plan.experiments))
    ]
    estimates = [estimate for experiment in experiments for estimate in experiment["estimate"]]
    first = plan.experiments[0]
    return {
        "device": _device_json(target) if estimates or target.rates else None,
        "protocol": {"hash": first.protocol_hash, "values": list(protocol_values(first))},
        "experiments": experiments,
        "sources": [vars(source) for source in plan.sources],
        "unknown": plan.unknown,
        "testbed": compare_testbed_estimate(store) if any(estimate["timed"] for estimate in estimates) else [],
    }


def _device_json(target: Target) -> dict[str, Any]:
    rates = target.rates
    return {
        "name": rates.name if rates else HERE,
        "memory": target.memory,
        "source": rates.source if rates else "",
    }


def _experiment_json(plan: Plan, index: int, target: Target, gradient_checkpointing: bool) -> dict[str, Any]:
    experiment = plan.experiments[index]
    artifacts = plan.stages[index] if plan.stages else []
    missing = Counter(plan.kind_of(artifact) for artifact in artifacts if not artifact.cached) if plan.stages else None
    earlier = plan.experiments[:index]
    estimates, no_estimate = _estimates(experiment, earlier, missing, target, gradient_checkpointing)
    plugins = {
        resolved.plugin.name: {key: [value, resolved.origins[key]] for key, value in resolved.params.items()}
        for resolved in [*experiment.defenses, *experiment.attacks, experiment.task_plugin, *experiment.scorers]
    }
    return {
        "run": run_id(experiment) if plan.stages else None,
        "defense": experiment.defense,
        "attack": experiment.attack,
        "task": experiment.task.name,
        "seed": experiment.spec.seed,
        "backend": experiment.backend,
        "plugins": plugins,
        "stages": [
            {
                "stage": artifact.stage,
                "training": plan.trainings.get(artifact.key, ""),
                "key": artifact.key,
                "cached": artifact.cached,
                "seconds": artifact.seconds,
            }
            for artifact in artifacts
        ],
        "over_refusal": _over_refusal_prompts(experiment, read_rows=bool(plan.stages)),
        "estimate": estimates,
        "no_estimate": no_estimate,
    }


def _over_refusal_prompts(experiment: Experiment, read_rows: bool) -> dict[str, int]:
    """Return set -> number of prompts whose refusals are counted."""
    from .evaluation_estimates import over_refusal_sizes

    return {name: size.count for name, size in over_refusal_sizes(experiment, read_rows).items()}


def _estimates(
    experiment: Experiment,
    earlier: Sequence[Experiment],
    missing: Mapping[Kind, int] | None,
    target: Target,
    gradient_checkpointing: bool,
) -> tuple[list[dict[str, Any]], str]:
    """Return the estimates of the missing artifacts, or why there is none.

    Args:
        experiment: The experiment.
        earlier: The experiments before it, which create the artifacts that it shares with them.
        missing: Kind -> number of missing artifacts; None: they are unknown, so all that no earlier experiment has.
        target: As in `dry_run_json`.
        gradient_checkpointing: As in `dry_run_json`.
    """
    if missing is not None and not missing:
        return [], ""
    from .estimate import ESTIMATED, estimate_costs

    shares = _unshared(experiment, earlier) if missing is None else {}
    kinds = missing if missing is not None else [kind for kind, share in shares.items() if share]
    needed = {stage for stage, _ in kinds}
    estimate = partial(
        estimate_costs,
        experiment,
        target,
        read_rows=missing is not None,
        gradient_checkpointing=gradient_checkpointing,
    )
    problem = ""
    try:
        costs = estimate(stages=needed - {"score"})
    except HbvError as error:
        if missing is not None and isinstance(error, BadInput):  # everything is on this machine: the run is refused too
            raise
        return [], str(error)
    try:
        costs += estimate(stages=needed & {"score"})
    except HbvError as error:  # the configuration of a judge is not on this machine
        problem = str(error)
    costs.sort(key=lambda cost: ESTIMATED.index(cost.stage))
    if missing is not None:
        shares = {cost.kind: missing[cost.kind] / cost.artifacts for cost in costs if cost.kind in missing}
    costs = [cost for cost in costs if shares.get(cost.kind)]
    return [vars(replace(cost, seconds=cost.seconds * shares[cost.kind])) for cost in costs], problem


def _unshared(experiment: Experiment, earlier: Sequence[Experiment]) -> dict[Kind, float]:
    """Return kind -> share of its artifacts that no earlier experiment has, without reading rows or models."""
    models = _model_inputs(experiment)
    shared = [_model_inputs(other) for other in earlier]
    shares: dict[Kind, float] = {
        (stage, ""): float(all(models[stage] != other[stage] for other in shared)) for stage in MODEL_STAGES
    }
    requested = [inputs for other in earlier for inputs in _separate_inputs(other).values()]
    for name, inputs in _separate_inputs(experiment).items():
        shares["nested", name] = float(inputs not in requested)
    questions = _answer_inputs(experiment)
    judged = [model for model, run in zip(shared, earlier, strict=True) if _answer_inputs(run) == questions]
    answered = [
        model
        for model, run in zip(shared, earlier, strict=True)
        if _answer_inputs(run) == questions and run.task_name == experiment.task_name
    ]

    def unshared(others: Sequence[dict[str, list[Any]]]) -> float:
        """Return the share of the answers of both models that no other run has."""
        return sum(all(models[stage] != other[stage] for other in others) for stage in ("align", "stress")) / 2

    # the harmful prompts are those of every task
    others = {"answer": unshared(answered), "score": unshared(judged), "drift": shares["stress", ""]}
    return shares | {(stage, ""): share for stage, share in others.items()}


def _answer_inputs(experiment: Experiment) -> list[Any]:
    """Return everything that the answers of a model depend on, except the model and what all runs share."""
    answering = [
        resolved.identity
        for resolved in experiment.defenses
        if resolved.plugin.changes_generation or resolved.plugin.changes_answers
    ]
    return [answering, [attack.identity for attack in experiment.attacks if attack.plugin.changes_questions]]


def _model_inputs(experiment: Experiment) -> dict[str, list[Any]]:
    """Return stage -> everything that its model depends on, except what all runs of a command share."""
    inputs: list[Any] = [experiment.spec.seed]
    models: dict[str, list[Any]] = {}
    for stage in STAGES:
        config = experiment.stages[stage]
        defenses = [defense.identity for defense in experiment.acting(stage) if not defense.plugin.is_plain]
        inputs = [*inputs, config.defenses.runs, defenses, config.settings]
        if stage == "finetune":
            attacks = [attack.identity for attack in experiment.attacks if attack.plugin.changes_training]
            inputs += [config.topology, attacks, experiment.task_plugin.identity]
        models[stage] = inputs
    stresses = [attack.identity for attack in experiment.attacks if attack.plugin.stresses_weights]
    return {**models, "stress": [*inputs, stresses]}


def _separate_inputs(experiment: Experiment) -> dict[str, list[Any]]:
    """Return name -> everything that a separate training depends on, as in `_model_inputs`; else that of its stage."""
    models = _model_inputs(experiment)
    inputs: dict[str, list[Any]] = {}
    for requested in requested_trainings(experiment):
        stage, training = requested.stage, requested.training
        config = experiment.stages[stage]
        start = [experiment.spec.seed] if training.on_base or stage == "align" else models["align"]
        known = [start, config.settings, config.template] if training.uses_pool else models[stage]
        inputs[requested.name] = [stage, training, known]
    return inputs


def protocol_values(experiment: Experiment) -> Iterator[dict[str, Any]]:
    """Yield every value of the resolved protocol: its dotted path, the value, and its source."""
    protocol, spec = experiment.protocol, experiment.spec
    written = {*spec.values, *(f"data.{name}" for name in spec.data)}
    if spec.model:
        yield {"path": "model", "value": experiment.model, "source": f"written, instead of {protocol.model}"}
    for path, value in leaf_values(protocol):
        if path == "model" and spec.model:
            continue
        source = protocol.source_of(path)
        if any(path == key or path.startswith(f"{key}.") for key in written):
            source = "written"
        yield {"path": path, "value": value, "source": source}


def compare_testbed_estimate(store: Store) -> list[dict[str, Any]]:
    """Compare estimated and measured seconds for the stages of a testbed run that is stored on this machine.

    Returns:
        One entry per stage; empty if no such run is stored.
    """
    from .estimate import estimate_costs

    for attack in ("ratio=0.1", "ratio=0"):
        experiment = Experiment.settle(RunSpec(attack=parse_plugins(attack)))
        stages = plan_runs([experiment], store.root).stages
        measured: dict[str, float] = {}
        for artifact in stages[0] if stages else []:
            if artifact.cached:
                measured[artifact.stage] = measured.get(artifact.stage, 0.0) + artifact.seconds
        if "align" in measured:
            return [
                {"stage": estimate.stage, "estimated": estimate.seconds, "measured": measured[estimate.stage]}
                for estimate in estimate_costs(experiment)
                if estimate.stage in measured
            ]
    return []
