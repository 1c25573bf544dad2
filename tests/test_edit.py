"""Repairs of adapters from anywhere: equal to the repair stage of a run, and refused for what is not plain LoRA."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from harmbench_vaccine.evaluation.records import load_run
from harmbench_vaccine.experiment.protocol import protocol_names
from harmbench_vaccine.export.edit import user_update
from harmbench_vaccine.export.models import stack_adapters
from harmbench_vaccine.export.peft_folders import read_adapter_folder
from harmbench_vaccine.training.adapters import Adapter
from support import tiny
from support.cli import CommandResult, hbv
from support.compare import close
from support.world import make_world

ALIGN = {"lora_rank": 4, "lora_alpha": 8, "epochs": 1}
USER = {"lora_rank": 2, "lora_alpha": 3, "epochs": 1, "lora_targets": ["q_proj", "v_proj", "down_proj"]}
SMALL = {
    "align": {"rows": 12, "settings": ALIGN},
    "finetune": {"samples": 12, "settings": USER},
    "answer": {"harmful": {"prompts": 2}, "benign": {"prompts": 2}, "task_items": 2},
    "score": {"drift_rows": 4},
}
REPAIRS = ("safe_lora:k=2", "antidote:scope=model", "resta:gamma=0.3")
SEED = 3


@dataclass(frozen=True)
class Repairs:
    """A home with runs of one attack, each with another repair, and the exported adapters."""

    home: Path
    protocol: Path
    runs: Mapping[str, Path]
    """Repair -> folder of the run."""

    def export(self, repair: str, stage: str) -> Path:
        """Return the exported adapter of a stage."""
        folder = self.home.parent / f"{repair.partition(':')[0]}-{stage}"
        if not folder.exists():
            outcome = hbv("export", self.runs[repair], folder, "--stage", stage, home=self.home)
            assert outcome.code == 0, outcome.err
        return folder

    def edit(self, defense: str, source: Path, folder: Path, *options: object) -> CommandResult:
        """Edit an adapter in a home of its own, so that no artifact of a run is reused."""
        options = ("--protocol", self.protocol, "--seed", SEED, *options)
        return hbv("edit", defense, source, "--out", folder, *options, home=self.home.parent / "second")


def make_repairs(folder: Path, topology: str) -> Repairs:
    protocol, home = make_world(folder / "world", SMALL | {"topology": topology}), folder / "home"
    options = [word for repair in REPAIRS for word in ("--defense", repair)]
    outcome = hbv(
        *("run", "--protocol", protocol, *options, "--attack", "ratio=0.25", "--seed", SEED, "--json"), home=home
    )
    assert outcome.code == 0, outcome.err
    runs = {repair: home / "runs" / row["run"] for repair, row in zip(REPAIRS, outcome.results, strict=True)}
    return Repairs(home, protocol, runs)


@pytest.fixture(scope="module")
def double(tmp_path_factory: pytest.TempPathFactory) -> Repairs:
    return make_repairs(tmp_path_factory.mktemp("double"), "double")


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Repairs:
    return make_repairs(tmp_path_factory.mktemp("single"), "single")


def same_weights(folder: Path, other: Path) -> bool:
    left, right = (read_adapter_folder(path).adapter for path in (folder, other))
    assert set(left.factors) == set(right.factors)
    return all(close(left.delta(module), right.delta(module)) for module in left.factors)


# ---------------------------------------------------------------------------------------------------------------------
# Equality with runs


@pytest.mark.parametrize("repair", REPAIRS)
@pytest.mark.parametrize("topology", ["double", pytest.param("single", marks=pytest.mark.slow)])
def test_edit_equals_the_repair_stage_of_a_run(
    repair: str, topology: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    repairs: Repairs = request.getfixturevalue(topology)
    source, aligned = repairs.export(repair, "finetune"), repairs.export(repair, "align")
    outcome = repairs.edit(repair, source, tmp_path / "edited", "--aligned", aligned)
    assert outcome.code == 0, outcome.err
    final = repairs.export(repair, "final")
    assert same_weights(tmp_path / "edited", final)
    assert not same_weights(source, final)  # the repair changes the adapter


def test_adapter_without_alignment_is_edited_alone(double: Repairs, tmp_path: Path) -> None:
    """Without --aligned the base model is the aligned one: no entry of the adapter is part of an alignment."""
    source = double.export(REPAIRS[1], "align")
    assert double.edit("antidote:alpha=1", source, tmp_path / "pruned").code == 0
    edited = read_adapter_folder(tmp_path / "pruned").adapter
    assert not any(edited.delta(module).any() for module in edited.factors)


def test_safe_lora_reads_no_data(double: Repairs, tmp_path: Path) -> None:
    source, aligned = (double.export(REPAIRS[0], stage) for stage in ("finetune", "align"))
    protocol = double.home.parent / "without-data.yaml"
    protocol.write_text(double.protocol.read_text().replace("/data/", "/missing/"), encoding="utf-8")
    options = ("--aligned", aligned, "--protocol", protocol, "--json")
    outcome = double.edit("safe_lora:k=2", source, tmp_path / "edited", *options)
    assert outcome.code == 0, outcome.err
    assert (json.loads(outcome.out)["rows"], json.loads(outcome.out)["data"]) == ([], {})
    outcome = double.edit("antidote", source, tmp_path / "other", *options)
    assert outcome.code == 2
    assert "missing" in outcome.sentence


def test_edit_reports_its_data_and_writes_a_card(double: Repairs, tmp_path: Path) -> None:
    source = double.export(REPAIRS[1], "align")
    outcome = double.edit("antidote=0.5", source, tmp_path / "edited")
    data = double.protocol.parent / "data"
    assert f"harmful rows, from {data / 'beavertails'}" in outcome.out
    assert f"hf upload OWNER/NAME {tmp_path / 'edited'}" in outcome.out
    card = ModelCard.load(tmp_path / "edited" / "README.md")
    assert {"antidote", "lora"} <= set(card.data.tags)
    for text in (
        "antidote: alpha=0.5, scope=row",
        str(source),
        "harmful rows",
        "was not evaluated",
        "also after a repair",
    ):
        assert text in card.text
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "edited")
    assert model(torch.tensor([[1, 5, 7]])).logits.isfinite().all()


def test_repair_from_a_file(double: Repairs, tmp_path: Path) -> None:
    file = tmp_path / "halve.py"
    file.write_text(
        "from harmbench_vaccine.plugins import Defense\n\n\n"
        "class Halve(Defense):\n"
        '    """Half of the update."""\n\n'
        '    stages = ("repair",)\n\n'
        "    def edit(self, stage, adapter):\n"
        "        return adapter.scaled(0.5)\n",
        encoding="utf-8",
    )
    source = double.export(REPAIRS[0], "align")
    outcome = double.edit(str(file), source, tmp_path / "edited")
    assert outcome.code == 0, outcome.err
    before, after = (read_adapter_folder(folder).adapter for folder in (source, tmp_path / "edited"))
    assert all(close(after.delta(module), before.delta(module) / 2) for module in before.factors)


# ---------------------------------------------------------------------------------------------------------------------
# The update of the user


def random_adapter(rank: int, scale: float, modules: str, seed: int) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    return Adapter(
        {
            module: (torch.randn(rank, 6, generator=generator), torch.randn(5, rank, generator=generator))
            for module in modules
        },
        scale,
    )


@pytest.mark.parametrize(("below", "above"), [("qv", "qv"), ("qvd", "q"), ("q", "qv")])
def test_update_of_stacked_adapters_is_exact(below: str, above: str, tmp_path: Path) -> None:
    aligned, update = random_adapter(3, 0.7, below, 1), random_adapter(2, 5 / 3, above, 2)
    for name, adapter in (("aligned", aligned), ("update", update)):
        adapter.save(tmp_path / name)
    stacked = stack_adapters([tmp_path / "aligned", tmp_path / "update"])
    recovered = user_update(stacked, aligned)
    assert set(recovered.factors) == set(above)
    assert recovered.scale == pytest.approx(update.scale)
    for module, factors in update.factors.items():
        assert all(factor.equal(part) for factor, part in zip(factors, recovered.factors[module], strict=True))


def test_update_of_other_factors_is_the_difference() -> None:
    aligned, total = random_adapter(3, 0.7, "qv", 1), random_adapter(4, 2.0, "qv", 2)
    update = user_update(total, aligned)
    for module in "qv":
        assert close(update.delta(module), total.delta(module) - aligned.delta(module))


# ---------------------------------------------------------------------------------------------------------------------
# Folders of any origin


@pytest.fixture(scope="module")
def base(double: Repairs) -> Path:
    return double.protocol.parent / "model"


def peft_folder(folder: Path, base: Path, *, stirred: float = 0.1, **options: Any) -> tuple[Path, Any]:
    """Save an adapter as a user of peft would, and return it with the model."""
    from transformers import AutoModelForCausalLM

    config = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **options}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**config))
    tiny.stir({name: value for name, value in model.named_parameters() if "lora_B" in name}, size=stirred)
    model.save_pretrained(str(folder))
    return folder, model.eval()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"layers.1.self_attn.q_proj": 17}},
        {"target_modules": "all-linear", "layers_to_transform": None},
        {"layers_to_transform": [1], "layers_pattern": "layers"},
    ],
)
def test_every_form_of_lora_is_read(options: dict[str, Any], base: Path, tmp_path: Path) -> None:
    folder, model = peft_folder(tmp_path / "adapter", base, **options)
    adapter = read_adapter_folder(folder).adapter
    layers = {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }
    assert set(layers) == set(adapter.factors)
    assert all(close(adapter.delta(name), layer.get_delta_weight("default")) for name, layer in layers.items())


def test_edit_of_a_foreign_adapter(double: Repairs, base: Path, tmp_path: Path) -> None:
    """With its mixed ranks; the source stays as it is, and has no tokenizer."""
    folder, model = peft_folder(tmp_path / "adapter", base, rank_pattern={"v_proj": 2})
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    outcome = double.edit("antidote:alpha=0", folder, tmp_path / "edited")
    assert outcome.code == 0, outcome.err
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    edited = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "edited")
    ids = torch.randint(3, 400, (2, 9))
    with torch.no_grad():
        assert close(edited(ids).logits, model(ids).logits)
    assert (tmp_path / "edited" / "tokenizer.json").is_file()


def change_config(folder: Path, **values: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


def remove_half(tensors: dict[str, Tensor]) -> None:
    del tensors[next(name for name in tensors if "lora_A" in name)]


FIRST_B = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "DoRA": (lambda folder: change_config(folder, use_dora=True), "uses use_dora = True; allowed: LoRA without"),
    "modules_to_save": (
        lambda folder: change_config(folder, modules_to_save=["lm_head"]),
        "uses modules_to_save = ['lm_head']",
    ),
    "bias": (lambda folder: change_config(folder, bias="all"), "uses bias = 'all'"),
    "PiSSA": (
        lambda folder: change_config(folder, init_lora_weights="pissa"),
        "was initialized by pissa, which changes the base model",
    ),
    "IA3": (lambda folder: change_config(folder, peft_type="IA3"), "is of type IA3; allowed: LORA."),
    "no configuration": (lambda folder: (folder / "adapter_config.json").unlink(), "has no adapter_config.json"),
    "pickle": (
        lambda folder: (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin"),
        "pickled weights (.bin) are not read",
    ),
    "embedding": (
        lambda folder: change_tensors(
            folder, lambda tensors: tensors.update({"base_model.model.model.embed.lora_embedding_A": torch.ones(2, 3)})
        ),
        "has the tensor base_model.model.model.embed.lora_embedding_A; allowed",
    ),
    "other sizes": (
        lambda folder: change_tensors(folder, lambda tensors: tensors.update({FIRST_B: torch.ones(8, 4)})),
        "where model.layers.0.self_attn.q_proj is 64 x 64 (adapter: 8 x 64)",
    ),
    "other modules": (
        lambda folder: change_tensors(
            folder,
            lambda tensors: [
                tensors.update({name.replace("q_proj", "query"): tensors.pop(name)})
                for name in list(tensors)
                if "q_proj" in name
            ],
        ),
        "there is no linear layer model.layers.0.self_attn.query",
    ),
    "no base": (
        lambda folder: change_config(folder, base_model_name_or_path=None),
        "does not name its base model: add --model ID or --model FOLDER",
    ),
    "base is gone": (
        lambda folder: change_config(folder, base_model_name_or_path="/gone/model"),
        "names the base model '/gone/model', which does not exist: add --model FOLDER.",
    ),
    "other rank": (
        lambda folder: change_config(folder, r=2),
        "has rank 4 in model.layers.0.self_attn.q_proj, but rank 2 in adapter_config.json: copy both files",
    ),
    "rank of a pattern": (
        lambda folder: change_config(folder, rank_pattern={"v_proj": 3}),
        "has rank 4 in model.layers.0.self_attn.v_proj, but rank 3 in adapter_config.json",
    ),
}
DAMAGED: dict[str, tuple[Callable[[Path], object], str]] = {
    "broken JSON": (
        lambda folder: (folder / "adapter_config.json").write_text("{"),
        "is not a configuration of peft",
    ),
    "broken weights": (
        lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"123456789"),
        "is damaged",
    ),
    "half": (lambda folder: change_tensors(folder, remove_half), "do not fit. Download or copy it again."),
    "not finite": (
        lambda folder: change_tensors(folder, lambda tensors: tensors[FIRST_B].fill_(math.nan)),
        "has a value that is not a finite number",
    ),
}


@pytest.fixture(scope="module")
def foreign(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return peft_folder(tmp_path_factory.mktemp("foreign") / "adapter", base)[0]


@pytest.mark.parametrize("problem", [*REFUSED, *DAMAGED])
def test_adapters_that_are_not_plain_lora_are_refused(
    problem: str, double: Repairs, foreign: Path, tmp_path: Path
) -> None:
    change, sentence = {**REFUSED, **DAMAGED}[problem]
    shutil.copytree(foreign, tmp_path / "adapter")
    change(tmp_path / "adapter")
    outcome = double.edit("antidote", tmp_path / "adapter", tmp_path / "edited")
    assert outcome.code == (2 if problem in REFUSED else 1), outcome.err
    assert sentence in outcome.sentence
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_adapter_on_the_hub_has_to_be_downloaded(double: Repairs, tmp_path: Path) -> None:
    outcome = double.edit("antidote", Path("owner/adapter"), tmp_path / "edited")
    assert outcome.code == 2
    assert "owner/adapter is not a folder" in outcome.sentence
    assert "hf download OWNER/NAME --local-dir FOLDER" in outcome.sentence


def test_settings_of_peft_that_are_read_exist() -> None:
    """A setting that peft renames would be refused for every adapter."""
    from harmbench_vaccine.export import peft_folders

    assert set(LoraConfig.__dataclass_fields__) >= peft_folders._SUPPORTED, peft.__version__


# ---------------------------------------------------------------------------------------------------------------------
# Options


@pytest.mark.parametrize(
    ("defense", "sentence"),
    [
        (
            "vaccine",
            "Defense 'vaccine' acts during training and cannot edit a finished adapter; "
            "allowed: antidote, random_perturbation, realign, resta, safe_delta, safe_lora, safemerge, "
            "task_arithmetic, wise_ft, or a file",
        ),
        ("resta+sft", "Defense 'sft' acts during training"),
        ("antidot", "Unknown defense 'antidot'. Did you mean 'antidote'?"),
        ("antidote=2", "alpha"),
        ("safe_lora", "needs the update of the alignment: add --aligned FOLDER"),
    ],
)
def test_defenses_that_cannot_edit_are_refused(
    defense: str, sentence: str, double: Repairs, foreign: Path, tmp_path: Path
) -> None:
    outcome = double.edit(defense, foreign, tmp_path / "edited")
    assert outcome.code == 2
    assert sentence in outcome.sentence
    assert not list(tmp_path.iterdir())


def test_protocol_is_required_for_other_models(foreign: Path, tmp_path: Path) -> None:
    outcome = hbv("edit", "antidote", foreign, "--out", tmp_path / "edited")
    assert outcome.code == 2
    names = ", ".join(protocol_names())
    assert f"add --protocol NAME; allowed: {names}" in outcome.sentence


def test_rows_that_are_too_long_for_the_model_are_refused(double: Repairs, foreign: Path, tmp_path: Path) -> None:
    protocol = tmp_path / "long.yaml"
    protocol.write_text(double.protocol.read_text().replace("max_length: 96", "max_length: 300"), encoding="utf-8")
    outcome = double.edit("antidote", foreign, tmp_path / "edited", "--protocol", protocol)
    assert outcome.code == 2
    assert "reads rows of up to 300 tokens, but model" in outcome.sentence
    assert "reads at most 256" in outcome.sentence


def test_folder_that_is_not_empty_is_refused(double: Repairs, foreign: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    outcome = double.edit("antidote", foreign, tmp_path)
    assert outcome.code == 2
    assert "is not empty" in outcome.sentence


def test_alignment_adapter_has_to_fit(double: Repairs, foreign: Path, tmp_path: Path) -> None:
    shutil.copytree(foreign, tmp_path / "aligned")
    change_tensors(tmp_path / "aligned", lambda tensors: tensors.update({FIRST_B: torch.ones(8, 4)}))
    outcome = double.edit("safe_lora", foreign, tmp_path / "edited", "--aligned", tmp_path / "aligned")
    assert outcome.code == 2
    assert f"Adapter {tmp_path / 'aligned'} does not fit" in outcome.sentence


def test_alignment_adapter_cannot_be_the_edited_one(double: Repairs, foreign: Path, tmp_path: Path) -> None:
    outcome = double.edit("safe_lora", foreign, tmp_path / "edited", "--aligned", foreign)
    assert outcome.code == 2
    assert "are the same adapter" in outcome.sentence
    assert not (tmp_path / "edited").exists()


# ---------------------------------------------------------------------------------------------------------------------
# The testbed


@pytest.mark.slow
def test_edit_on_the_testbed_needs_no_protocol(testbed_home: Path, tmp_path: Path) -> None:
    outcome = hbv("run", "--defense", "antidote", "--attack", "ratio=0.1", "--json", home=testbed_home)
    run = outcome.results[0]["run"]
    for stage in ("align", "finetune", "final"):
        assert hbv("export", run, tmp_path / stage, "--stage", stage, home=testbed_home).code == 0
    options = ("--aligned", tmp_path / "align", "--out", tmp_path / "edited")
    assert hbv("edit", "antidote", tmp_path / "finetune", *options, home=testbed_home).code == 0
    assert same_weights(tmp_path / "edited", tmp_path / "final")
    assert load_run(testbed_home / "runs" / run)[0].protocol == "testbed"
