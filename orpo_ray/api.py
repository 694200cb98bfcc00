"""The functions of the commands, for Python: `from orpo_ray import train, evaluate`.

What they return shows in a notebook. Each takes a recipe as a file, a mapping or a `Recipe`, and overrides such as
`{"optim.learning_rate": 1e-5}` or `["optim.learning_rate=1e-5"]`.
"""

from __future__ import annotations

import html
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from orpo_ray.config.load import apply_overrides, load_recipe, parse_recipe
from orpo_ray.config.recipe import Recipe
from orpo_ray.console import console, print_left_out
from orpo_ray.errors import UserError

if TYPE_CHECKING:
    from orpo_ray.evaluation.evaluate_run import Evaluation as Scored
    from orpo_ray.exporting.export import Exported
    from orpo_ray.sweep.outcome import Sweep
    from orpo_ray.synthesis.outcome import Synthesized
    from orpo_ray.synthesis.rounds import Rounds

RecipeLike = Recipe | str | Path | Mapping[str, Any]
Overrides = Mapping[str, Any] | Sequence[str]
NOTEBOOK_WIDTH = 110  # characters of a table in a notebook


@dataclass(frozen=True)
class Run:
    """A finished run. A notebook shows its report."""

    uri: str
    """The run folder."""
    metrics: dict[str, float]
    """The latest value of every metric."""
    report: str
    """Path or URI of the report."""

    def history(self) -> list[dict[str, Any]]:
        """Return the lines of `metrics.jsonl`, for example for `pandas.DataFrame`."""
        from orpo_ray.report.run_data import read_run
        from orpo_ray.storage.run_folder import RunFolder

        return read_run(RunFolder(self.uri), with_pairs=False).lines

    def _repr_html_(self) -> str:
        from orpo_ray.report.page import render_report
        from orpo_ray.report.run_data import read_run
        from orpo_ray.storage.run_folder import RunFolder

        return _frame(render_report([read_run(RunFolder(self.uri))]))


@dataclass(frozen=True)
class Evaluation:
    """Scores of held-out pairs. A notebook shows the verdicts and tables of `orpo-ray evaluate`."""

    metrics: dict[str, float]
    """The metrics as `eval/...`."""
    scored: Scored
    """With intervals, groups of pairs, verdicts and a comparison in `scored.summary`."""

    def as_json(self) -> dict[str, Any]:
        """Return what `orpo-ray evaluate --json` prints."""
        return self.scored.as_json()

    def _repr_html_(self) -> str:
        from orpo_ray.evaluation.table import print_evaluation

        recorded = _recorder()
        print_evaluation(self.scored, recorded)
        return _as_html(recorded)


@dataclass(frozen=True)
class DataCheck:
    """A check of a recipe's data. A notebook shows its page."""

    report: dict[str, Any]
    """What `orpo-ray data check --json` prints."""
    page: str
    """Path or URI of the page."""

    def _repr_html_(self) -> str:
        from orpo_ray.storage.files import read_bytes

        return _frame(read_bytes(self.page).decode())


@dataclass(frozen=True, repr=False)
class Plan:
    """A prediction of memory, time and cost. A notebook shows the tables of `orpo-ray plan`."""

    report: dict[str, Any]
    """What `orpo-ray plan --json` prints; memory in bytes, time in seconds and hours."""

    def __repr__(self) -> str:
        from orpo_ray.planning.table import print_plan

        recorded = _recorder()
        print_plan(self.report, recorded)
        return recorded.export_text()

    def _repr_html_(self) -> str:
        from orpo_ray.planning.table import print_plan

        recorded = _recorder()
        print_plan(self.report, recorded)
        return _as_html(recorded)


def train(recipe: RecipeLike, overrides: Overrides | None = None, *, from_checkpoint: str | None = None) -> Run:
    """Train a model, or resume its run.

    Args:
        recipe: the recipe.
        overrides: fields to override.
        from_checkpoint: checkpoint of the run to resume from, instead of the newest whole one; newer ones are deleted.

    Raises:
        UserError: the recipe, its data, model or cluster do not work, or another run writes to the run folder.
        TrainingFailed: the run ended with another error.
    """
    from orpo_ray.report.page import write_report
    from orpo_ray.training.launch import launch_training

    summary = launch_training(as_recipe(recipe, overrides), console, from_checkpoint=from_checkpoint)
    return Run(summary.run_uri, summary.metrics, write_report([summary.run_uri], warn=print_left_out))


def tune(recipe: RecipeLike, overrides: Overrides | None = None, *, price_per_hour: Sequence[str] = ()) -> Sweep:
    """Search recipe fields, as the recipe's section `tune` says, or go on with a search that was interrupted.

    Args:
        recipe: the recipe.
        overrides: fields to override.
        price_per_hour: prices of GPUs for `tune.max_cost`, such as `H100=2.50`.

    Raises:
        UserError: the search, the data or the cluster do not work.
        TrainingFailed: no trial was evaluated.
    """
    from orpo_ray.sweep.run import run_sweep

    return run_sweep(as_recipe(recipe, overrides), console, price_per_hour)


def evaluate(
    run_or_model: str | Path | Run,
    overrides: Overrides | None = None,
    *,
    base: str | Path | Run | None = None,
    by: Sequence[str] = (),
    generate: int = 0,
    benchmarks: Sequence[str] = (),
    images: str | None = None,
    workers: int | None = None,
) -> Evaluation:
    """Score held-out pairs, with their own, with exchanged and with blank images.

    Args:
        run_or_model: a run, or the folder of a run, a model or peft adapters.
        overrides: fields of its recipe to override, such as `{"data.eval": "pairs.jsonl"}`.
        base: a run, a model folder or a hub model to compare with on the same pairs.
        by: columns of the data by which the pairs are grouped.
        generate: number of held-out pairs whose prompts the model answers, and the base.
        benchmarks: yes/no benchmarks to answer, as `pope:FILE` or `amber:FILE`.
        images: folder of their images; by default that of each file.
        workers: number of workers of the cluster to measure on; by default, this process does.

    Raises:
        UserError: the folder, the recipe or an argument cannot be used, there are no held-out pairs, or no room for
            the workers.
    """
    generate = _check_number("generate", generate, 0)
    workers = None if workers is None else _check_number("workers", workers, 1)
    from orpo_ray.evaluation.evaluate_run import EvaluateOptions, evaluate_run
    from orpo_ray.evaluation.measuring import measure
    from orpo_ray.training.evaluation_workers import on_workers

    options = EvaluateOptions(None if base is None else _uri(base), by, generate, benchmarks, images)
    measuring = measure if workers is None else on_workers(workers)
    scored = evaluate_run(_uri(run_or_model), _as_options(overrides), console, options, measuring)
    return Evaluation(scored.metrics, scored)


def synthesize(recipe: RecipeLike, overrides: Overrides | None = None) -> Synthesized:
    """Make preference pairs of images and prompts, as the recipe's section `synthesize` says, or go on with them.

    Args:
        recipe: the recipe.
        overrides: fields to override.

    Raises:
        UserError: a source or a model cannot be used, no row became a pair, or the folder holds another set.
    """
    from orpo_ray.synthesis.run import synthesize as make_pairs

    return make_pairs(as_recipe(recipe, overrides), console)


def iterate(recipe: RecipeLike, overrides: Overrides | None = None) -> Rounds:
    """Synthesize pairs, train on them and evaluate, for several rounds, or go on with them.

    Args:
        recipe: the recipe.
        overrides: fields to override.

    Raises:
        UserError: the recipe has no held-out pairs of its own, or a round cannot be run.
        TrainingFailed: the run of a round failed.
    """
    from orpo_ray.synthesis.rounds import iterate as run_rounds

    return run_rounds(as_recipe(recipe, overrides), console)


def plan(recipe: RecipeLike, overrides: Overrides | None = None, *, pairs: int | None = None) -> Plan:
    """Predict memory, time and cost of a recipe for each GPU type, without a GPU.

    Args:
        recipe: the recipe.
        overrides: fields to override.
        pairs: number of training pairs; by default, as counted by the data check.

    Raises:
        UserError: the recipe or an argument is wrong, or the model's config cannot be read.
    """
    pairs = None if pairs is None else _check_number("pairs", pairs, 1)
    from orpo_ray.planning.plan import Options
    from orpo_ray.planning.plan import plan as make_plan

    return Plan(make_plan(as_recipe(recipe, overrides), Options(pairs=pairs)))


def check_data(recipe: RecipeLike, overrides: Overrides | None = None) -> DataCheck:
    """Check every row of a recipe's data.

    Args:
        recipe: the recipe.
        overrides: fields to override.

    Raises:
        UserError: a source or the model's processor cannot be read.
    """
    from orpo_ray.data_report.check import check_data as check

    return DataCheck(*check(as_recipe(recipe, overrides), console))


def export(
    run: str | Path | Run, output: str | None = None, *, adapter: bool = False, overwrite: bool = False
) -> Exported:
    """Write the model of a finished run as one folder for transformers and vLLM.

    Args:
        run: the run or its folder.
        output: folder or URI to write to; by default `export` in the run's folder.
        adapter: write the adapters alone, instead of a model with the adapters merged.
        overwrite: replace an existing export.

    Raises:
        UserError: the run is not finished, or the folder exists.
    """
    from orpo_ray.exporting.export import ExportOptions, export_run

    return export_run(_uri(run), ExportOptions(adapter=adapter, output=output, overwrite=overwrite), console)


def as_recipe(recipe: RecipeLike, overrides: Overrides | None = None) -> Recipe:
    """Make a recipe of what the functions take. Raises UserError."""
    if isinstance(recipe, str | Path):
        return load_recipe(recipe, _as_options(overrides))
    if not isinstance(recipe, Recipe | Mapping):
        fix = "give the path of a recipe file, a mapping or a Recipe"
        raise UserError("this is no recipe", field="recipe", value=type(recipe).__name__, fix=fix)
    raw = recipe.model_dump(mode="json") if isinstance(recipe, Recipe) else json.loads(_as_json(dict(recipe), "recipe"))
    apply_overrides(raw, _as_options(overrides))
    return parse_recipe(raw)


def _as_options(overrides: Overrides | None) -> list[str]:
    """Write overrides as on the command line, whose values are YAML, which JSON is a part of."""
    if overrides is None:
        return []
    if isinstance(overrides, Mapping):
        return [f"{name}={_as_json(value, 'overrides')}" for name, value in overrides.items()]
    if isinstance(overrides, list | tuple) and all(isinstance(each, str) for each in overrides):
        return list(overrides)
    fix = 'give a mapping such as {"optim.max_steps": 3}, or a list such as ["optim.max_steps=3"]'
    raise UserError("overrides must be a mapping or a list of texts", field="overrides", value=overrides, fix=fix)


def _as_json(value: object, field: str) -> str:
    """Write what a caller gave as JSON. Raises UserError."""
    try:
        return json.dumps(value)
    except (TypeError, ValueError) as error:
        fix = "give texts, numbers, booleans, lists and mappings"
        raise UserError(f"a value cannot be part of a recipe: {error}", field=field, fix=fix) from None


def _check_number(name: str, value: object, at_least: int) -> int:
    """Check an argument, and return it as an int (numpy has its own). Raises UserError."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < at_least:
        fix = f"give {name}={at_least} or more"
        raise UserError(f"must be a whole number of at least {at_least}", field=name, value=value, fix=fix)
    return int(value)


def _uri(run: str | Path | Run) -> str:
    return run.uri if isinstance(run, Run) else str(run)


def _recorder() -> Console:
    return Console(record=True, width=NOTEBOOK_WIDTH, file=io.StringIO(), force_jupyter=False)


def _as_html(recorded: Console) -> str:
    code = '<pre style="line-height:1.3;white-space:pre;overflow-x:auto">{code}</pre>'
    return recorded.export_html(inline_styles=True, code_format=code)


def _frame(page: str) -> str:
    """Show a page inside a notebook, apart from the notebook's own styles and scripts."""
    style = "width:100%;height:720px;border:0"
    return f'<iframe sandbox="allow-scripts" style="{style}" srcdoc="{html.escape(page)}"></iframe>'
