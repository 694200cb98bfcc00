"""The objective in a recipe, and the protocol of every objective that a recipe can name."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch

from orpo_ray.config.load import apply_overrides, parse_recipe
from orpo_ray.config.objectives import OBJECTIVES, CpoObjective
from orpo_ray.config.recipe import Recipe
from orpo_ray.errors import UserError
from orpo_ray.objective.base import Normaliser, load_objective
from orpo_ray.objective.cpo import CPO
from orpo_ray.objective.logps import PairLogps
from orpo_ray.objective.orpo import ORPO

MINIMAL: dict[str, Any] = {"name": "a", "model": {"id": "m"}, "data": {"train": "t.jsonl"}}


def recipe_of(**sections: Any) -> Recipe:
    return parse_recipe(MINIMAL | sections)


def message(**sections: Any) -> str:
    with pytest.raises(UserError) as error:
        recipe_of(**sections)
    return str(error.value)


def test_orpo_is_the_default_and_reads_its_own_section() -> None:
    assert load_objective(recipe_of()) == ORPO(beta=0.1, nll="response")
    options = {"beta": 0.5, "nll": "prompt+response"}
    assert load_objective(recipe_of(objective="orpo", orpo=options)) == ORPO(beta=0.5, nll="prompt+response")


def test_others_have_their_options_beside_their_name() -> None:
    assert load_objective(recipe_of(objective="cpo")) == CPO()
    assert load_objective(recipe_of(objective={"name": "cpo", "beta": 0.3, "cpo_alpha": 0})) == CPO(0.3, 0.0)


def test_overrides_reach_the_options_behind_a_bare_name() -> None:
    raw = dict(MINIMAL)
    apply_overrides(raw, ["objective=cpo", "objective.beta=0.3"])
    assert load_objective(parse_recipe(raw)) == CPO(0.3)


@pytest.mark.parametrize("objective", [*OBJECTIVES, {"name": "cpo", "beta": 0.3}], ids=str)
def test_a_resolved_recipe_reads_back_equal(objective: Any) -> None:
    recipe = recipe_of(objective=objective)
    raw = recipe.model_dump(mode="json")
    assert parse_recipe(raw).model_dump() == recipe.model_dump()
    assert load_objective(parse_recipe(raw)) == load_objective(recipe)
    assert ("orpo" in raw) == (objective == "orpo")


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"objective": "cpoo"}, "objective: unknown objective; did you mean 'cpo'? (found 'cpoo')"),
        ({"objective": {"name": "dpo-x"}}, "unknown objective 'dpo-x'; did you mean"),
        ({"objective": "zzz"}, "unknown objective; choose from orpo, cpo"),
        ({"objective": {"name": ["cpo"]}}, "unknown objective '['cpo']'; "),
        ({"objective": 3}, "objective: Input should be a valid dictionary"),
        ({"objective": {"name": "cpo", "betta": 1}}, "objective.betta: unknown field; did you mean 'beta'?"),
        ({"objective": {"name": "cpo", "beta": -1}}, "objective.beta: Input should be greater than or equal to 0"),
        ({"objective": {"beta": 2}}, "options of ORPO belong in the section orpo: write orpo.beta"),
        ({"objective": "cpo", "orpo": {"beta": 0.1}}, "orpo.beta is set, but the objective is CPO"),
    ],
    ids=str,
)
def test_errors_say_what_to_write(sections: dict[str, Any], expected: str) -> None:
    assert expected in message(**sections)


@pytest.mark.parametrize(
    ("objective", "search", "metric", "expected"),
    [
        ("cpo", "orpo.beta", "eval/loss", "tune.search: 'orpo.beta' does not exist with the objective CPO"),
        ("cpo", "orpo.beta", "eval/loss", "; tune.search={} searches beta and the learning rate"),
        ("orpo", "objective.beta", "eval/loss", "choose from orpo.beta, orpo.nll, orpo.image_beta"),
        ("orpo", "orpo.bet", "eval/loss", "did you mean 'orpo.beta'?"),
        ("orpo", "orpo.beta", "eval/nll_los", "did you mean 'eval/nll_loss'?"),
        ("cpo", "objective.beta", "eval/log_odds_ratio", "tune.metric: 'eval/log_odds_ratio' does not exist with"),
    ],
)
def test_a_search_that_does_not_fit_the_objective_is_refused(
    objective: str, search: str, metric: str, expected: str
) -> None:
    recipe = recipe_of(objective=objective, tune={"search": {search: {"low": 1, "high": 2}}, "metric": metric})
    with pytest.raises(UserError) as error:
        _ = recipe.search
    assert expected in str(error.value)


def test_a_search_is_over_the_options_of_the_objective() -> None:
    assert list(recipe_of().search) == ["orpo.beta", "optim.learning_rate"]
    assert list(recipe_of(objective="cpo").search) == ["objective.beta", "optim.learning_rate"]
    search = {"objective.cpo_alpha": {"low": 0.1, "high": 1}, "objective.beta": {"choices": [0.1, 0.2]}}
    assert list(recipe_of(objective="cpo", tune={"search": search}).search) == list(search)


def test_a_trial_trains_with_the_options_it_was_given() -> None:
    from orpo_ray.sweep.space import with_params

    params = {"objective.beta": 0.4, "optim.learning_rate": 1e-5}
    assert load_objective(with_params(recipe_of(objective="cpo"), params, "a/trials/1")) == CPO(0.4)
    assert load_objective(with_params(recipe_of(), {"orpo.beta": 0.4}, "a/trials/1")) == ORPO(0.4)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_keeps_the_protocol(name: str) -> None:
    """Options have the same names and defaults in the recipe and in the loss; sums have fixed names and no gradient."""
    recipe = recipe_of(objective=name)
    objective: Any = load_objective(recipe)
    assert {field.name: field.default for field in fields(objective)} == recipe.objective_options
    assert objective.nll_span in ("none", "response", "prompt+response")
    assert objective.nll_average in ("pair", "token")
    chosen, rejected = torch.tensor([-2.0, -6.0], requires_grad=True), torch.tensor([-3.0, -5.0])
    tokens = torch.tensor([2.0, 4.0])
    logps = PairLogps(chosen, rejected, -chosen, tokens, tokens, tokens)
    both, one = torch.ones(2), torch.tensor([1.0, 0.0])
    loss, sums = objective.loss(logps, both, Normaliser(2.0))
    (gradient,) = torch.autograd.grad(loss, chosen)
    assert (gradient < 0).all()  # a likelier chosen answer is a lower loss
    assert not any(value.requires_grad for value in sums.values())
    assert (sums["pairs"], objective.loss(logps, one, Normaliser(2.0))[1]["pairs"]) == (2, 1)
    metrics = objective.metrics({name: float(value) for name, value in sums.items()})
    assert metrics["loss"] == pytest.approx(loss.item(), abs=1e-6)
    assert metrics["rewards/accuracies"] == 0.5
    preferred, other = objective.answer_logps(logps)
    assert (preferred > other).tolist() == [True, False]
    assert {metric.removeprefix("eval/") for metric in recipe.objective.search_metrics} <= set(metrics)


class NeedsReference(CPO):
    further_forwards = ("reference",)


def test_further_forwards_are_refused_until_something_runs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CpoObjective, "implementation", f"{__name__}:NeedsReference")
    with pytest.raises(UserError, match=r"objective: NeedsReference needs further forwards \(reference\)"):
        load_objective(recipe_of(objective="cpo"))
