"""Several plug-ins in one stage: conflicts, the order of hooks, the state of each member."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations
from typing import Any, ClassVar, cast
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
    """Marks every value that its hooks return."""

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
    """The same defense with a different name."""

    name: ClassVar[str] = "second"

    def settings(self, stage: Any, settings: TrainSettings) -> TrainSettings:
        return replace(settings, lr=settings.lr * 10 + 2)


class Pusher(Defense):
    """Replaces the gradient."""

    name: ClassVar[str] = "pusher"

    def gradient(self, stage: Any, batch: Any) -> Any:
        return f"gradient of {self.name}"


class Puller(Pusher):
    """Replaces the gradient too."""

    name: ClassVar[str] = "puller"


class Single(Defense):
    """Needs the single topology."""

    name: ClassVar[str] = "single_one"
    topology: ClassVar[Any] = "single"


class Double(Defense):
    """Needs the double topology."""

    name: ClassVar[str] = "double_one"
    topology: ClassVar[Any] = "double"


class Elsewhere(Pusher):
    """Replaces the gradient only in the user stage."""

    name: ClassVar[str] = "elsewhere"

    def takes_gradient(self, stage: Any) -> bool:
        return bool(stage == "finetune")


class Off(Defense):
    """Skips its stage."""

    name: ClassVar[str] = "off"
    trains: ClassVar[bool] = False


def test_hooks_run_in_the_order_of_the_command_line() -> None:
    team, reverse = DefenseTeam(members=(First(), Second())), DefenseTeam(members=(Second(), First()))
    assert [row.id for row in team.train_on("align", [Example("start", "")], Pools())] == ["start", "first", "second"]
    assert [row.id for row in reverse.train_on("align", [], Pools())] == ["second", "first"]
    assert team.settings("align", SETTINGS).lr == 112  # (1 * 10 + 1) * 10 + 2
    assert reverse.settings("align", SETTINGS).lr == 121
    assert team.template("train", TEMPLATE).no_input == "{instruction}firstsecond"
    stage, adapter = Mock(), cast(Any, "adapter")
    assert team.edit(stage, adapter) == "adapter>first>second"
    assert stage.mock_calls == [
        call.replace_adapter("adapter>first"),
        call.replace_adapter("adapter>first>second"),
    ]  # the model runs with it
    assert [eval_set.name for eval_set in team.evaluations([])] == ["first", "second"]


def test_step_hooks_call_every_member_once() -> None:
    calls: Any = []
    team = DefenseTeam(members=(First(), Second()))
    team.before(calls)
    team.before_step(calls)
    team.after_step(calls)
    assert calls == [
        f"{hook} {name}" for hook in ("before", "before_step", "after_step") for name in ("first", "second")
    ]


def test_gradient_of_the_replacing_member_is_used() -> None:
    class Stage:
        def gradient(self, batch: Any) -> str:
            return "plain gradient"

    stage: Any = Stage()
    for members in ((First(), Pusher(), Second()), (Pusher(),)):
        assert DefenseTeam(members=members).gradient(stage, {}) == "gradient of pusher"
    assert DefenseTeam(members=(First(), Second())).gradient(stage, {}) == "plain gradient"
    assert DefenseTeam().gradient(stage, {}) == "plain gradient"


def test_state_is_separate_for_each_member() -> None:
    first, second = First(), Second()
    team = DefenseTeam(members=(first, second))
    state = team.state()
    assert {key: value.item() for key, value in state.items()} == {"first/seen": 5.0, "second/seen": 6.0}
    team.restore(state)
    assert {key: value.item() for key, value in first._restored.items()} == {"seen": 5.0}
    assert {key: value.item() for key, value in second._restored.items()} == {"seen": 6.0}


def test_team_without_members_is_plain_fine_tuning() -> None:
    team = DefenseTeam()
    assert team.runs
    assert team.settings("align", SETTINGS) == SETTINGS
    assert team.required_topology is None


def test_topology_of_a_member_is_required() -> None:
    assert DefenseTeam(members=(First(), Single())).required_topology == "single"


def test_takes_gradient_if_the_hook_is_overridden() -> None:
    assert Pusher().takes_gradient("align")
    assert not First().takes_gradient("align")


# ---------------------------------------------------------------------------------------------------------------------
# Conflicts


@pytest.mark.parametrize("members", list(permutations((Pusher(), First(), Puller()))))
def test_two_gradients_are_refused_by_name(members: tuple[Defense, ...]) -> None:
    with pytest.raises(BadInput, match="gradient") as refusal:
        DefenseTeam(members=members)
    assert "'pusher'" in str(refusal.value)
    assert "'puller'" in str(refusal.value)
    assert "'first'" not in str(refusal.value)


@pytest.mark.parametrize("members", list(permutations((Off(), First(), Second()))))
def test_skipping_a_stage_conflicts_with_acting_in_it(members: tuple[Defense, ...]) -> None:
    with pytest.raises(BadInput) as refusal:
        DefenseTeam(members=members)
    assert "'off'" in str(refusal.value)


def test_single_member_may_skip_its_stage() -> None:
    assert not DefenseTeam(members=(Off(),)).runs


def test_two_topologies_are_refused() -> None:
    with pytest.raises(BadInput, match="topology"):
        DefenseTeam(members=(Single(), First(), Double()))
    assert DefenseTeam(members=(Single(), First(), Single())).required_topology == "single"


def test_gradient_of_another_stage_does_not_conflict() -> None:
    with pytest.raises(BadInput, match="gradient"):
        DefenseTeam(members=(Pusher(), Elsewhere()), stage="finetune")
    team = DefenseTeam(members=(Pusher(), Elsewhere()), stage="align")
    assert team.gradient(Mock(), Mock()) == "gradient of pusher"


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("none+vaccine", ("none", "vaccine")),
        ("vaccine+none", ("none", "vaccine")),
        ("vaccine+random_vaccine", ("vaccine", "random_vaccine")),
    ],
)
def test_built_in_conflicts_are_refused_before_any_work(text: str, names: tuple[str, str]) -> None:
    with pytest.raises(BadInput, match="cannot be combined") as refusal:
        Experiment.settle(RunSpec(defense=parse_plugins(text)))
    assert all(repr(name) in str(refusal.value) for name in names)
    assert "the whether" not in str(refusal.value)  # a correct sentence


def test_compatible_plugins_are_accepted() -> None:
    experiment = Experiment.settle(
        RunSpec(defense=parse_plugins("sft+vaccine=5"), attack=parse_plugins("ratio=0.2,samples=100"))
    )
    assert (experiment.defense, experiment.attack) == ("sft+vaccine=5", "ratio=0.2+samples=100")


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


def test_order_of_attacks_does_not_change_the_mix() -> None:
    experiment = Experiment.settle(RunSpec(attack=parse_plugins("ratio=0.25,samples=80")))
    mix = experiment.attack_team.mix(Mix(10))
    assert (mix.samples, mix.harmful, mix.task) == (80, 20, 60)
    reverse = Experiment.settle(RunSpec(attack=parse_plugins("samples=80+ratio=0.25"))).attack_team.mix(Mix(10))
    assert reverse == mix


def test_attack_hooks_run_in_order() -> None:
    team = AttackTeam(members=(Swap(), Swap()))
    assert [row.id for row in team.upload([], Pools())] == ["swap", "swap"]
    assert team.settings(SETTINGS).epochs == 4
    sets = team.evaluations([EvalSet("harmful", (), TEMPLATE, 1)])
    assert [eval_set.name for eval_set in sets] == ["swapped", "swapped", "harmful"]


def test_every_session_gets_a_copy_of_the_members() -> None:
    experiment = Experiment.settle(RunSpec(defense=parse_plugins("vaccine=5")))
    team = experiment.stages["align"].defenses
    first, second = team.fresh().members[0], team.fresh().members[0]
    assert first is not second
    assert first is not team.members[0]
    assert first == second == team.members[0]
    assert experiment.stages["finetune"].defenses.members == ()
