"""Several plug-ins in one stage: what conflicts, in which order hooks run, whose state is whose."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations
from typing import Any, ClassVar
from unittest.mock import Mock, call

import pytest
import torch

from harmbench_vaccine.core.errors import BadInput
from harmbench_vaccine.core.types import Example, Mix, Pools, TrainSettings
from harmbench_vaccine.data.prompts import EvalSet, PromptTemplate
from harmbench_vaccine.experiment.experiment import Experiment
from harmbench_vaccine.experiment.spec import RunSpec
from harmbench_vaccine.plugins import Attack, Defense
from harmbench_vaccine.plugins.composition import parse_plugins
from harmbench_vaccine.plugins.teams import AttackTeam, DefenseTeam

SETTINGS = TrainSettings(lr=1.0, epochs=1, batch=1)
TEMPLATE = PromptTemplate("{instruction}", "{instruction}{input}")


class First(Defense):
    """Marks everything that passes through it."""

    name: ClassVar[str] = "first"
    _restored: Any = None

    def train_on(self, stage: Any, rows: list[Example], pools: Pools) -> list[Example]:
        return [*rows, Example(self.name, "")]

    def settings(self, stage: Any, settings: TrainSettings) -> TrainSettings:
        return replace(settings, lr=settings.lr * 10 + 1)

    def template(self, use: Any, template: PromptTemplate) -> PromptTemplate:
        return replace(template, no_input=template.no_input + self.name)

    def before(self, stage: Any) -> None:
        stage.append(f"before {self.name}")

    def before_step(self, stage: Any) -> None:
        stage.append(f"before_step {self.name}")

    def after_step(self, stage: Any) -> None:
        stage.append(f"after_step {self.name}")

    def edit(self, stage: Any, adapter: Any) -> Any:
        return f"{adapter}>{self.name}"

    def evaluations(self, sets: list[EvalSet]) -> list[EvalSet]:
        return [*sets, EvalSet(self.name, (), TEMPLATE, 1)]

    def state(self) -> dict[str, torch.Tensor]:
        return {"seen": torch.tensor(float(len(self.name)))}

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        self._restored = state


class Second(First):
    """The same under another name."""

    name: ClassVar[str] = "second"

    def settings(self, stage: Any, settings: TrainSettings) -> TrainSettings:
        return replace(settings, lr=settings.lr * 10 + 2)


class Pusher(Defense):
    """Decides the gradient."""

    name: ClassVar[str] = "pusher"

    def gradient(self, stage: Any, batch: Any) -> Any:
        return f"gradient of {self.name}"


class Puller(Pusher):
    """Another that does."""

    name: ClassVar[str] = "puller"


class Single(Defense):
    """Demands a topology."""

    name: ClassVar[str] = "single_one"
    topology: ClassVar[Any] = "single"


class Double(Defense):
    """Demands the other."""

    name: ClassVar[str] = "double_one"
    topology: ClassVar[Any] = "double"


class Elsewhere(Pusher):
    """Decides the gradient of the user stage only."""

    name: ClassVar[str] = "elsewhere"

    def takes_gradient(self, stage: Any) -> bool:
        return bool(stage == "finetune")


class Off(Defense):
    """Leaves its stage out."""

    name: ClassVar[str] = "off"
    trains: ClassVar[bool] = False


def test_hooks_chain_in_the_order_written() -> None:
    team, turned = DefenseTeam(members=(First(), Second())), DefenseTeam(members=(Second(), First()))
    assert [row.id for row in team.train_on("align", [Example("start", "")], Pools())] == ["start", "first", "second"]
    assert [row.id for row in turned.train_on("align", [], Pools())] == ["second", "first"]
    assert team.settings("align", SETTINGS).lr == 112  # (1 * 10 + 1) * 10 + 2
    assert turned.settings("align", SETTINGS).lr == 121
    assert team.template("train", TEMPLATE).no_input == "{instruction}firstsecond"
    stage = Mock()
    assert team.edit(stage, "adapter") == "adapter>first>second"  # type: ignore[arg-type]
    assert stage.mock_calls == [
        call.replace_adapter("adapter>first"),
        call.replace_adapter("adapter>first>second"),
    ]  # the model runs with it
    assert [one.name for one in team.evaluations([])] == ["first", "second"]


def test_hooks_around_steps_reach_every_member_once() -> None:
    calls: Any = []
    team = DefenseTeam(members=(First(), Second()))
    team.before(calls)
    team.before_step(calls)
    team.after_step(calls)
    assert calls == [
        f"{hook} {name}" for hook in ("before", "before_step", "after_step") for name in ("first", "second")
    ]


def test_the_member_that_owns_the_gradient_gives_it() -> None:
    class Stage:
        def gradient(self, batch: Any) -> str:
            return "plain gradient"

    stage: Any = Stage()
    for members in ((First(), Pusher(), Second()), (Pusher(),)):
        assert DefenseTeam(members=members).gradient(stage, {}) == "gradient of pusher"
    assert DefenseTeam(members=(First(), Second())).gradient(stage, {}) == "plain gradient"
    assert DefenseTeam().gradient(stage, {}) == "plain gradient"


def test_state_is_kept_apart_by_member() -> None:
    first, second = First(), Second()
    team = DefenseTeam(members=(first, second))
    state = team.state()
    assert {key: value.item() for key, value in state.items()} == {"first/seen": 5.0, "second/seen": 6.0}
    team.restore(state)
    assert {key: value.item() for key, value in first._restored.items()} == {"seen": 5.0}
    assert {key: value.item() for key, value in second._restored.items()} == {"seen": 6.0}


def test_no_member_is_plain_fine_tuning() -> None:
    team = DefenseTeam()
    assert team.runs
    assert team.settings("align", SETTINGS) == SETTINGS
    assert team.required_topology is None


def test_the_demanded_topology_is_the_members() -> None:
    assert DefenseTeam(members=(First(), Single())).required_topology == "single"


def test_who_takes_the_gradient() -> None:
    assert Pusher().takes_gradient("align")
    assert not First().takes_gradient("align")


# ---------------------------------------------------------------------------------------------------------------------
# Conflicts


@pytest.mark.parametrize("members", list(permutations((Pusher(), First(), Puller()))))
def test_two_owners_of_a_gradient_are_refused_by_name(members: tuple[Defense, ...]) -> None:
    with pytest.raises(BadInput, match="gradient") as refusal:
        DefenseTeam(members=members)
    assert "'pusher'" in str(refusal.value)
    assert "'puller'" in str(refusal.value)
    assert "'first'" not in str(refusal.value)


@pytest.mark.parametrize("members", list(permutations((Off(), First(), Second()))))
def test_leaving_a_stage_out_conflicts_with_acting_in_it(members: tuple[Defense, ...]) -> None:
    with pytest.raises(BadInput) as refusal:
        DefenseTeam(members=members)
    assert "'off'" in str(refusal.value)


def test_alone_it_may_leave_its_stage_out() -> None:
    assert not DefenseTeam(members=(Off(),)).runs


def test_two_topologies_are_refused() -> None:
    with pytest.raises(BadInput, match="topology"):
        DefenseTeam(members=(Single(), First(), Double()))
    assert DefenseTeam(members=(Single(), First(), Single())).required_topology == "single"


def test_a_gradient_that_is_taken_in_another_stage_does_not_conflict() -> None:
    with pytest.raises(BadInput, match="gradient"):
        DefenseTeam(members=(Pusher(), Elsewhere()), stage="finetune")
    team = DefenseTeam(members=(Pusher(), Elsewhere()), stage="align")
    assert team.gradient(None, None) == "gradient of pusher"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("none+vaccine", ("none", "vaccine")),
        ("vaccine+none", ("none", "vaccine")),
        ("vaccine+random_vaccine", ("vaccine", "random_vaccine")),
    ],
)
def test_built_in_conflicts_are_told_before_anything_runs(text: str, names: tuple[str, str]) -> None:
    with pytest.raises(BadInput, match="cannot be combined") as refusal:
        Experiment.settle(RunSpec(defense=parse_plugins(text)))
    assert all(repr(name) in str(refusal.value) for name in names)
    assert "the whether" not in str(refusal.value)  # a sentence that reads


def test_what_does_not_conflict_settles() -> None:
    cell = Experiment.settle(
        RunSpec(defense=parse_plugins("sft+vaccine=5"), attack=parse_plugins("ratio=0.2,samples=100"))
    )
    assert (cell.defense, cell.attack) == ("sft+vaccine=5", "ratio=0.2+samples=100")


# ---------------------------------------------------------------------------------------------------------------------
# Attacks


class Swap(Attack):
    """Marks rows and sets."""

    name: ClassVar[str] = "swap"

    def upload(self, rows: list[Example], pools: Pools) -> list[Example]:
        return [*rows, Example("swap", "")]

    def settings(self, settings: TrainSettings) -> TrainSettings:
        return replace(settings, epochs=settings.epochs * 2)

    def evaluations(self, sets: list[EvalSet]) -> list[EvalSet]:
        return [replace(sets[0], name="swapped", examples=()), *sets]


def test_attacks_compose() -> None:
    cell = Experiment.settle(RunSpec(attack=parse_plugins("ratio=0.25,samples=80")))
    mix = cell.attackers().mix(Mix(10))
    assert (mix.samples, mix.harmful, mix.task) == (80, 20, 60)
    turned = Experiment.settle(RunSpec(attack=parse_plugins("samples=80+ratio=0.25"))).attackers().mix(Mix(10))
    assert turned == mix


def test_attack_hooks_chain() -> None:
    team = AttackTeam(members=(Swap(), Swap()))
    assert [row.id for row in team.upload([], Pools())] == ["swap", "swap"]
    assert team.settings(SETTINGS).epochs == 4
    sets = team.evaluations([EvalSet("harmful", (), TEMPLATE, 1)])
    assert [one.name for one in sets] == ["swapped", "swapped", "harmful"]


def test_every_stage_gets_fresh_members() -> None:
    cell = Experiment.settle(RunSpec(defense=parse_plugins("vaccine=5")))
    one, other = cell.team("align").members[0], cell.team("align").members[0]
    assert one is not other
    assert one == other
    assert cell.team("finetune").members == ()
