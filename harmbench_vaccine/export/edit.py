"""Apply a defense of the repair stage to a LoRA adapter of any origin.

The defense receives what it receives in a run: the update that the user's training added to the aligned model. An
adapter that contains the alignment is therefore divided before the edit and joined after it.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.core.paths import ensure_writable, home
from harmbench_vaccine.core.progress import SILENT, Progress
from harmbench_vaccine.core.store import Artifact, Store
from harmbench_vaccine.core.types import Pools
from harmbench_vaccine.data.model_limits import position_limit
from harmbench_vaccine.data.sources import TESTBED, check_testbed_part, local_path, testbed_folder
from harmbench_vaccine.experiment.artifacts import ADAPTER, TrainedModel
from harmbench_vaccine.experiment.context import RunContext
from harmbench_vaccine.experiment.experiment import Experiment
from harmbench_vaccine.experiment.protocol import protocol_models, protocol_names
from harmbench_vaccine.experiment.rows import HARM_DATA
from harmbench_vaccine.experiment.session import TrainingSession
from harmbench_vaccine.experiment.spec import RunSpec
from harmbench_vaccine.inference.dequantization import check_gguf, ensure_dequantized, mark_dequantized
from harmbench_vaccine.inference.loading import (
    check_model,
    check_quantization,
    load_tokenizer_and_config,
    readable_load_errors,
)
from harmbench_vaccine.inference.model_pool import ModelPool, ModelSpec
from harmbench_vaccine.plugins.composition import parse_plugins
from harmbench_vaccine.plugins.registry import DEFENSES
from harmbench_vaccine.testbed import ensure_testbed

from .adapter_edit import AdapterEdit, EditRequest
from .folders import check_new_folder, new_folder, save_adapter
from .model_card import edit_card
from .models import stack_adapters
from .peft_folders import PeftFolder, check_fit, read_adapter_folder

if TYPE_CHECKING:
    from harmbench_vaccine.training.adapters import Adapter


def edit_adapter_folder(request: EditRequest, folder: Path, progress: Progress = SILENT) -> AdapterEdit:
    """Write an adapter after the edit of a defense to a new folder, with a tokenizer and a model card.

    Args:
        request: The request.
        folder: The folder to write; it must be empty or absent.
        progress: Where progress is reported.

    Raises:
        BadInput: The defense cannot edit a finished adapter, the adapter is not plain LoRA or does not fit the base
            model, or a required option is missing.
        HbvError: A failure while running.
    """
    _check_defense(request.defense)
    folder = check_new_folder(folder)
    source = read_adapter_folder(request.source)
    aligned = read_adapter_folder(request.aligned) if request.aligned else None
    base = _base_model(request, source)
    protocol = request.protocol or _default_protocol(request.defense, base)
    spec = RunSpec(
        protocol=protocol, defense=parse_plugins(request.defense), model=base, task=request.task, seed=request.seed
    )
    experiment = Experiment.settle(spec)
    _check_alignment(experiment, aligned)
    _check_locations(experiment, base, progress)
    for path, peft_folder in ((request.source, source), (request.aligned, aligned)):
        if path and peft_folder:
            check_fit(peft_folder.adapter, base, path)
    if aligned and source.adapter.rank == aligned.adapter.rank and _begins_with(source.adapter, aligned.adapter):
        raise BadInput(
            f"{request.source} and {request.aligned} are the same adapter: nothing was added after the alignment. "
            "Allowed for --aligned: the adapter of the alignment alone (hbv export RUN FOLDER --stage align)."
        )
    store = Store(ensure_writable(home() / "store", "The store"), progress)
    mark_dequantized([base], store)
    context = RunContext(store, ModelPool(progress), progress)
    edit = _description(request, experiment, folder)
    with tempfile.TemporaryDirectory() as work, new_folder(folder, "the edited adapter") as temporary:
        edited = _edited(experiment, context, source.adapter, aligned.adapter if aligned else None, Path(work))
        save_adapter(edited, base, temporary)
        _save_tokenizer(request.source, base, context.models, temporary)
        edit_card(edit).save(temporary / "README.md")
    return edit


def user_update(adapter: Adapter, aligned: Adapter) -> Adapter:
    """Return what the user's training added to the aligned model.

    Args:
        adapter: The sum of alignment and update: both factors side by side, as `stack_adapters` joins them (double
            topology), or any other factors (an alignment adapter that was trained further).
        aligned: The alignment adapter.

    Returns:
        In the first case the exact factors of the update; otherwise `adapter` minus `aligned`.
    """
    from harmbench_vaccine.training.adapters import Adapter, concatenate

    rank = aligned.rank
    if rank < adapter.rank and _begins_with(adapter, aligned):
        rest = {module: (a[rank:], b[:, rank:]) for module, (a, b) in adapter.factors.items()}
        changed = {module: (a, b) for module, (a, b) in rest.items() if a.any() or b.any()}  # the others were filled
        return Adapter(changed or rest, adapter.scale)
    return concatenate([adapter, aligned.scaled(-1.0)])


# ---------------------------------------------------------------------------------------------------------------------


def _begins_with(adapter: Adapter, aligned: Adapter) -> bool:
    """Return whether the first factors of every module are those of the aligned adapter, or zeros where it has none."""
    rank, scale = aligned.rank, aligned.scale / (adapter.scale or 1.0)
    for module, (a, b) in adapter.factors.items():
        if module not in aligned.factors:
            if a[:rank].any() or b[:, :rank].any():
                return False
            continue
        first_a, first_b = aligned.factors[module]
        if not (a[:rank].equal(first_a) and b[:, :rank].allclose(scale * first_b, rtol=1e-5, atol=0.0)):
            return False
    return set(aligned.factors) <= set(adapter.factors)


def _edited(
    experiment: Experiment, context: RunContext, adapter: Adapter, aligned: Adapter | None, work: Path
) -> Adapter:
    """Edit an adapter in the repair stage of an experiment."""
    spec = ModelSpec(experiment.model, experiment.protocol.dtype, quantization=experiment.protocol.quantization)
    below = TrainedModel(experiment.model, spec, {})
    if aligned:
        aligned.save(work / "aligned")
        artifact = Artifact("align", aligned.digest(), work / "aligned", 0.0, cached=True)
        below = below.after("align", artifact, spec.on_top(artifact.path))
        adapter = user_update(adapter, aligned)
    pools = None if _rows(experiment) else Pools()
    session = TrainingSession.open(experiment, context, experiment.stages["repair"], below, pools)
    session.edit_adapter(adapter, work)
    return stack_adapters([*below.spec.adapters, work / ADAPTER])


def _check_defense(defense: str) -> None:
    for component in parse_plugins(defense):
        if "repair" not in DEFENSES.get(component.name).stages:
            allowed = sorted(name for name, cls in DEFENSES.loadable().items() if "repair" in cls.stages)
            raise BadInput(
                f"Defense {component.name!r} acts during training and cannot edit a finished adapter; "
                f"allowed: {', '.join(allowed)}, or a file with a defense of the repair stage."
            )


def _check_alignment(experiment: Experiment, aligned: PeftFolder | None) -> None:
    for resolved in experiment.defenses:
        if resolved.plugin.needs_alignment and aligned is None:
            raise BadInput(
                f"Defense {resolved.plugin.name!r} needs the update of the alignment: add --aligned FOLDER, the "
                "alignment adapter that the adapter contains (hbv export RUN FOLDER --stage align)."
            )


def _base_model(request: EditRequest, source: PeftFolder) -> str:
    base = request.model or source.base
    if base is None:
        raise BadInput(f"Adapter {request.source} does not name its base model: add --model ID or --model FOLDER.")
    if request.model is None and Path(base).is_absolute() and not Path(base).exists():
        raise BadInput(
            f"Adapter {request.source} names the base model {base!r}, which does not exist: add --model FOLDER."
        )
    return base


def _default_protocol(defense: str, base: str) -> str:
    """Return the protocol of the testbed for its own model: for another model the user has to choose."""
    if base == f"{TESTBED}model" or local_path(base) == testbed_folder() / "model":
        return "testbed"
    raise BadInput(
        f"The protocol gives {defense!r} its parameters, data and data type: add --protocol NAME; "
        f"allowed: {', '.join(protocol_names())}, or a YAML file."
    )


def _check_locations(experiment: Experiment, base: str, progress: Progress) -> None:
    """Check the base model and the data; build the testbed and dequantize the model where they need it.

    Raises:
        BadInput: The base model does not exist, or it cannot read the rows of the defense.
    """
    locations = [base, *_data(experiment).values()]
    for location in locations:
        check_testbed_part(location)
    if any(location.startswith(TESTBED) for location in locations):
        ensure_testbed(progress)
    check_gguf(base)
    ensure_dequantized([base], Store(home() / "store", progress))
    check_quantization(experiment.protocol.quantization)
    check_model(base, protocol_models())
    positions = position_limit(load_tokenizer_and_config(base, "Base model")[1])
    length = experiment.stages["repair"].settings.max_length
    if _rows(experiment) and positions and length > positions:
        raise BadInput(
            f"Defense {experiment.defense!r} reads rows of up to {length} tokens, but model {base!r} reads at most "
            f"{positions}: choose a protocol whose finetune.settings.max_length is not larger."
        )


def _rows(experiment: Experiment) -> list[str]:
    """Return the kinds of rows that the defenses declare to read."""
    return sorted({kind for resolved in experiment.acting("repair") for kind in resolved.plugin.data})


def _data(experiment: Experiment) -> dict[str, str]:
    return {name: experiment.location(name) for name in HARM_DATA} if _rows(experiment) else {}


def _description(request: EditRequest, experiment: Experiment, folder: Path) -> AdapterEdit:
    protocol = experiment.protocol
    return AdapterEdit(
        folder=str(folder),
        defense=experiment.defense,
        params={resolved.plugin.name: resolved.params for resolved in experiment.defenses},
        source=str(request.source.resolve()),
        aligned=str(request.aligned.resolve()) if request.aligned else None,
        base=experiment.model,
        dtype=protocol.dtype,
        quantization=protocol.quantization,
        protocol=protocol.name,
        protocol_hash=protocol.hash,
        task=experiment.task_name,
        seed=experiment.spec.seed,
        rows=_rows(experiment),
        data=_data(experiment),
    )


def _save_tokenizer(source: Path, base: str, models: ModelPool, folder: Path) -> None:
    """Save the tokenizer of the source, or that of the base model where the source has none."""
    from transformers import AutoTokenizer

    if not (source / "tokenizer_config.json").is_file():
        models.tokenizer_and_config(base)[0].save_pretrained(folder)
        return
    with readable_load_errors(str(source), "Tokenizer") as arguments:
        AutoTokenizer.from_pretrained(**arguments).save_pretrained(folder)
