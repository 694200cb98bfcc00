"""`orpo-ray iterate`: rounds of synthesizing pairs with a model, training it on them, and evaluating what came out.

Each round has a run folder, `<name>/round-1` and on. Its model answers and trains in the next round. Held-out pairs
are those of `data.eval`, the same in all rounds; rows that show their images become no pairs. The same command goes on
where an interrupted one ended, since each of the steps does.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
from rich.console import Console

from orpo_ray.config.recipe import Recipe
from orpo_ray.errors import UserError
from orpo_ray.evaluation.pair_scores import read_pair_scores
from orpo_ray.evaluation.statistics import Comparison, Estimate
from orpo_ray.evaluation.summary import ACCURACIES, GAP, compare_tables, estimates_of
from orpo_ray.exporting.export import EXPORT, ExportOptions, export_run
from orpo_ray.storage.files import is_remote
from orpo_ray.storage.run_folder import EVAL_PAIRS_FILE, EVAL_PAIRS_START_FILE, FINAL, ROUNDS_FILE, RunFolder
from orpo_ray.synthesis.outcome import Synthesized
from orpo_ray.synthesis.run import synthesize
from orpo_ray.training.launch import launch_training


@dataclass(frozen=True)
class Round:
    """What one round made and reached."""

    number: int
    run_uri: str
    made: Synthesized
    accuracy: Estimate
    """Of the model after the round, on the held-out pairs."""
    grounding_gap: Estimate | None
    """None unless the recipe evaluates with exchanged images."""
    against_start: Comparison | None
    """The model after the round against the one before the first round; None without common pairs."""

    def as_json(self) -> dict[str, Any]:
        """Return the fields, for `--json` and the file of rounds."""
        return {
            "round": self.number,
            "run": self.run_uri,
            "synthesized": self.made.as_json(),
            "accuracy": self.accuracy.as_json(),
            "grounding_gap": self.grounding_gap and self.grounding_gap.as_json(),
            "against_start": self.against_start and self.against_start.as_json(),
        }


@dataclass(frozen=True)
class Rounds:
    """The result of `orpo-ray iterate`."""

    uri: str
    """Path or URI of the folder that holds the rounds."""
    start: Estimate
    """Accuracy on the held-out pairs before the first round."""
    rounds: list[Round]

    def as_json(self) -> dict[str, Any]:
        """Return what `--json` prints, and what `rounds.json` holds."""
        return {
            "uri": self.uri,
            "start": {"accuracy": self.start.as_json()},
            "rounds": [each.as_json() for each in self.rounds],
        }


def iterate(recipe: Recipe, console: Console) -> Rounds:
    """Run the rounds of a recipe, or go on with them.

    Args:
        recipe: the recipe. Each round trains as it says, from the model of the round before.
        console: for progress.

    Raises:
        UserError: the recipe has no held-out pairs of its own, or a round cannot be run.
        TrainingFailed: the run of a round failed.
    """
    recipe = recipe.with_absolute_paths()
    check_can_iterate(recipe)
    folder = RunFolder(recipe.run_uri)
    rounds: list[Round] = []
    start: pa.Table | None = None
    model = recipe.model.id
    for number in range(1, recipe.synthesize.rounds + 1):
        console.print(f"[bold]round {number}[/bold] of {recipe.synthesize.rounds}", highlight=False)
        one = recipe_of_round(recipe, number, model)
        made = synthesize(one, console)
        launch_training(trained_on(one, made), console)
        if start is None:
            start = _scores(one, EVAL_PAIRS_START_FILE)
        rounds.append(_round(number, one, made, start))
        model = _model_of(one, console)
        folder.write(ROUNDS_FILE, (json.dumps(_result(recipe, start, rounds).as_json(), indent=2) + "\n").encode())
    assert start is not None
    return _result(recipe, start, rounds)


def check_can_iterate(recipe: Recipe) -> None:
    """Raise UserError if the rounds of a recipe cannot be compared, or cannot read its data."""
    data = recipe.data
    if is_remote(recipe.run_uri):
        raise UserError(
            "each round loads the model of the round before from its run folder",
            field="checkpoint.storage",
            value=recipe.checkpoint.storage,
            fix="give a path that every node can access",
        )
    if not data.eval:
        raise UserError(
            "rounds are compared on held-out pairs of their own, and there are none",
            field="data.eval",
            fix="set data.eval; with data.eval_fraction alone, each round would hold out synthetic pairs",
        )
    if data.format != "auto" or data.columns:
        raise UserError(
            "a round reads synthetic pairs and held-out ones with the same data.format and data.columns",
            field="data.format" if data.format != "auto" else "data.columns",
            value=data.format if data.format != "auto" else data.columns,
            fix="write the held-out pairs with orpo-ray data prepare, give them as data.eval, and leave the two fields "
            "out; how source rows are read is said by synthesize.source, format and columns",
        )
    own = recipe.synthesize
    if own.engine == "server" and own.label != "grounding":
        raise UserError(
            f"the server answers in every round, and label {own.label} does not ask the model of the round before",
            field="synthesize.engine",
            value=own.engine,
            fix="set engine: transformers, or label: grounding, by which that model scores the answers; or run data "
            "synthesize and train once",
        )
    if recipe.synthesize.model is not None:
        raise UserError(
            "each round begins with the model of the round before",
            field="synthesize.model",
            value=recipe.synthesize.model,
            fix="give the first one as model.id, and remove synthesize.model",
        )


def recipe_of_round(recipe: Recipe, number: int, model: str) -> Recipe:
    """Return the recipe by which a round synthesizes.

    Args:
        recipe: of all rounds, with absolute paths.
        number: of the round, from 1.
        model: id or folder of the model before the round.
    """
    raw = recipe.model_dump(mode="json")
    raw["name"] = f"{recipe.name}/round-{number}"
    if number > 1:
        raw["model"] |= {"id": model, "revision": None}
    # Other rows first, other candidates and other images in each round.
    raw["synthesize"] |= {"seed": (recipe.synthesize.seed + number - 1) % 2**32, "rounds": 1}
    raw["synthesize"]["source"] = raw["synthesize"]["source"] or raw["data"]["train"]
    if not recipe.synthesize.source:
        raw["synthesize"]["image_root"] = raw["data"]["image_root"]
    raw["eval"]["on_start"] = recipe.eval.on_start or number == 1
    return Recipe.model_validate(raw)


def trained_on(recipe: Recipe, made: Synthesized) -> Recipe:
    """Return the recipe by which a round trains."""
    raw = recipe.model_dump(mode="json")
    raw["data"] |= {"train": {made.uri: 1.0}, "eval_fraction": 0.0, "pairs_from_ranking": "best_worst"}
    return Recipe.model_validate(raw)


def _round(number: int, recipe: Recipe, made: Synthesized, start: pa.Table) -> Round:
    scores = _scores(recipe, EVAL_PAIRS_FILE)
    figures = estimates_of(scores)
    made = replace(made, was_finished=False)
    compared = compare_tables(scores, start)
    return Round(number, recipe.run_uri, made, figures[ACCURACIES], figures.get(GAP), compared)


def _scores(recipe: Recipe, name: str) -> pa.Table:
    found = read_pair_scores(RunFolder(recipe.run_uri), name)
    if found is None:
        fix = "delete the folder of this round and of later ones, and run the same command again"
        raise UserError(f"the run of the round has no {name}", field=recipe.run_uri, fix=fix)
    return found


def _model_of(recipe: Recipe, console: Console) -> str:
    """Return the model of a round for the next one: what was trained, or adapters merged into a model."""
    if recipe.model.lora is None:
        return f"{recipe.run_uri}/{FINAL}"
    if not RunFolder(recipe.run_uri).has_model(EXPORT):
        export_run(recipe.run_uri, ExportOptions(), console)
    return f"{recipe.run_uri}/{EXPORT}"


def _result(recipe: Recipe, start: pa.Table, rounds: list[Round]) -> Rounds:
    return Rounds(recipe.run_uri, estimates_of(start)[ACCURACIES], list(rounds))
