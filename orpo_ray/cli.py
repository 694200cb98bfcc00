"""The command line. Heavy imports wait until a command needs them, so that `--help` answers at once."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from orpo_ray.errors import OrpoRayError, UserError
from orpo_ray.recipe import Recipe, load_recipe

app = typer.Typer(
    help="Align vision-language models to preferences with ORPO, from a laptop to a cluster.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
# All that is said goes to stderr; stdout is for results that a program may read (--json).
console = Console(stderr=True)

RecipeFile = Annotated[Path, typer.Argument(help="A recipe (YAML); see recipes/.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Overrides, e.g. optim.learning_rate=1e-5 name=second-try.", show_default=False),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, all else on stderr.")]


@app.command()
def train(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Train a model. The same command again resumes what its run folder holds."""
    loaded = load_recipe(recipe, overrides or [])
    from orpo_ray.training.launch import launch_training

    summary = launch_training(loaded, console)
    if summary.was_finished:
        console.print("this run was finished before; nothing to do (delete its folder or give another name)")
    _print_figures(summary.metrics, "train", ("train/loss", "train/rewards/accuracies", "train/rewards/margins"))
    _print_figures(summary.metrics, "held out", _EVAL_FIGURES)
    console.print(f"run folder  {summary.run_dir}", highlight=False, soft_wrap=True)
    console.print(f"model       {summary.run_dir / 'final'}", highlight=False, soft_wrap=True)


@app.command()
def tune(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Search beta and learning rate with Ray Tune around the very same training."""
    loaded = load_recipe(recipe, overrides or [])
    from orpo_ray.training.sweep import run_sweep

    sweep = run_sweep(loaded, console)
    table = Table(title=f"{len(sweep.trials)} trials by {loaded.tune.metric}")
    for column in ("trial", *loaded.tune.search, loaded.tune.metric, "steps", "status"):
        left = column in ("trial", "status")
        table.add_column(column.split(".")[-1].removeprefix("eval/"), justify="left" if left else "right")
    for trial in sweep.trials:
        best = "[green]" if trial.name == sweep.best else ""
        figures = [f"{value:.3g}" for value in trial.params.values()]
        metric = "-" if trial.metric is None else f"{trial.metric:.4f}"
        table.add_row(f"{best}{trial.name}", *figures, metric, str(trial.steps), trial.status)
    console.print(table)
    console.print(f"best recipe  {sweep.best_recipe}", highlight=False, soft_wrap=True)


@app.command()
def evaluate(
    run_or_model: Annotated[Path, typer.Argument(help="A run folder, or a model folder.", show_default=False)],
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Score held-out pairs, with and without exchanged images."""
    from orpo_ray.results.evaluate import evaluate_run

    metrics = evaluate_run(run_or_model, overrides or [], console)
    if as_json:
        print(json.dumps(metrics))
    else:
        _print_figures(metrics, "held out", _EVAL_FIGURES)


@app.command()
def schema() -> None:
    """Print the recipe's JSON schema, for editors."""
    print(json.dumps(Recipe.model_json_schema(), indent=2))


_EVAL_FIGURES = (
    "eval/rewards/accuracies",
    "eval/rewards/accuracies_exchanged",
    "eval/grounding_gap",
    "eval/rewards/margins",
    "eval/nll_loss",
)


def _print_figures(metrics: dict[str, Any], title: str, names: tuple[str, ...]) -> None:
    present = [name for name in names if name in metrics]
    if not present:
        return
    table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2))
    table.add_column()
    table.add_column(justify="right")
    for name in present:
        table.add_row(name, f"{metrics[name]:.4f}")
    console.print(table)


def _guarded(command: Callable[[], Any]) -> int:
    """Run, and turn what may go wrong into a message and an exit code: 2 the user's input, 1 anything else."""
    try:
        command()
    except UserError as error:
        console.print(f"[red]error:[/red] {_plain(error)}", highlight=False, soft_wrap=True)
        return 2
    except OrpoRayError as error:
        console.print(f"[red]failed:[/red] {_plain(error)}", highlight=False, soft_wrap=True)
        return 1
    return 0


def _plain(error: Exception) -> str:
    return str(error).replace("[", "\\[")


def main() -> None:
    """Entry point of `orpo-ray`."""
    sys.exit(_guarded(app))


if __name__ == "__main__":
    main()
