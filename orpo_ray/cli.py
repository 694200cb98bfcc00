"""The command line. Heavy imports wait until a command needs them, so that `--help` answers at once."""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from orpo_ray.config.load import load_recipe
from orpo_ray.config.recipe import Recipe
from orpo_ray.errors import OrpoRayError, UserError

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
    console.print(f"run folder  {summary.run_uri}", highlight=False, soft_wrap=True)
    console.print(f"model       {summary.run_uri}/final", highlight=False, soft_wrap=True)
    line = shlex.join(["orpo-ray", "export", summary.run_uri])
    console.print(f"take it     {line}", highlight=False, soft_wrap=True)


@app.command()
def tune(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Search beta and learning rate with Ray Tune around the very same training."""
    loaded = load_recipe(recipe, overrides or [])
    from orpo_ray.training.sweep import run_sweep

    sweep = run_sweep(loaded, console)
    table = Table(title=f"{len(sweep.trials)} trials by {loaded.tune.metric}")
    for column in ("trial", *loaded.search, loaded.tune.metric, "steps", "status"):
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
    run_or_model: Annotated[str, typer.Argument(help="A run folder, or a model folder.", show_default=False)],
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Score held-out pairs, with and without exchanged images."""
    from orpo_ray.evaluation.evaluate import evaluate_run

    metrics = evaluate_run(run_or_model, overrides or [], console)
    if as_json:
        print(json.dumps(metrics))
    else:
        _print_figures(metrics, "held out", _EVAL_FIGURES)


@app.command()
def export(
    run: Annotated[str, typer.Argument(help="The folder of a finished run.", show_default=False)],
    adapter: Annotated[
        bool, typer.Option("--adapter/--merged", help="The adapters alone, or one plain model with them merged in.")
    ] = False,
    output: Annotated[
        str | None, typer.Option(help="Where to; RUN/export or RUN/export-adapter unless given.", show_default=False)
    ] = None,
    push: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="Upload it to the hub too.", show_default=False)
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="Let everybody see it there; private otherwise.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an export that stands there.")] = False,
    max_shard_size: Annotated[
        str | None, typer.Option(help="Most that one file of weights holds, e.g. 5GB.", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a finished run's model as a folder for transformers and vLLM, with a model card."""
    from orpo_ray.export.export import ExportOptions, export_run

    options = ExportOptions(adapter, output, push, public, max_shard_size, overwrite)
    exported = export_run(run, options, console)
    if as_json:
        print(json.dumps(asdict(exported)))
    for line in exported.summary():
        console.print(line, highlight=False, soft_wrap=True)


data_app = typer.Typer(help="Look at a recipe's data, or write it down cleaned.", no_args_is_help=True)
app.add_typer(data_app, name="data")


@data_app.command("check")
def data_check(recipe: RecipeFile, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Check every row before any GPU is rented: bad rows, lengths, duplicates, biases, and a page to look at."""
    loaded = load_recipe(recipe, overrides or [])
    from orpo_ray.data_report.check import check_data

    with contextlib.redirect_stdout(sys.stderr):
        report, page = check_data(loaded, console)
    if as_json:
        print(json.dumps(report))
    else:
        _print_check(report)
    console.print(f"page  {page}", highlight=False, soft_wrap=True)


@data_app.command("prepare")
def data_prepare(recipe: RecipeFile, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Write the pairs that can be trained on once, as sharded parquet that training and sweeps stream from."""
    loaded = load_recipe(recipe, overrides or [])
    from orpo_ray.data_report.prepare import prepare_data

    with contextlib.redirect_stdout(sys.stderr):
        written = prepare_data(loaded, console)
    if as_json:
        print(json.dumps({name: {"uri": split.uri, "rows": split.rows} for name, split in written.items()}))
    for name, split in written.items():
        shards = f"{split.rows:,} pairs in {len(split.shards)} shard(s), {len(split.bad):,} bad row(s) left out"
        console.print(f"{name}: {shards}", highlight=False, soft_wrap=True)
    options = [*(overrides or []), *(f"data.{name}={split.uri}" for name, split in written.items())]
    # What was written is in one format with its own columns, split already, with its images in it.
    options += ["data.format=auto", "data.columns={}", "data.eval_fraction=0", "data.image_root=null"]
    line = shlex.join(["orpo-ray", "train", str(recipe), *options])
    console.print(f"train from it:  {line}", highlight=False, soft_wrap=True)


@app.command()
def plan(
    recipe: RecipeFile,
    overrides: Overrides = None,
    price_per_hour: Annotated[
        list[str] | None, typer.Option(help="Price of one GPU, e.g. H100=2.50; may be given for several types.")
    ] = None,
    mfu: Annotated[float | None, typer.Option(help="Share of a GPU's peak that is reached; 0.3 if not given.")] = None,
    pairs: Annotated[int | None, typer.Option(help="Training pairs, where no data check has counted them.")] = None,
    as_json: AsJson = False,
) -> None:
    """Memory, time and price before a GPU is rented: what fits where, from the model's config alone."""
    loaded = load_recipe(recipe, overrides or [])
    from orpo_ray.planning.fit import MFU
    from orpo_ray.planning.plan import Options
    from orpo_ray.planning.plan import plan as make_plan
    from orpo_ray.planning.table import print_plan

    with contextlib.redirect_stdout(sys.stderr):
        report = make_plan(loaded, Options(price_per_hour or (), MFU if mfu is None else mfu, pairs))
    if as_json:
        print(json.dumps(report))
    else:
        print_plan(report, console)


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


def _print_check(report: dict[str, Any]) -> None:
    """A report of `data check` in a few lines."""
    table = Table(title="data check", title_justify="left", box=None, padding=(0, 2))
    splits = [name for name in ("train", "eval") if report[name]]
    table.add_column()
    for name in splits:
        table.add_column(name, justify="right")

    def row(label: str, value: Callable[[dict[str, Any]], str]) -> None:
        table.add_row(label, *(value(report[name]) for name in splits))

    row("rows", lambda split: f"{split['rows']:,}")
    row("can be trained on", lambda split: f"{split['pairs']:,}")
    row("format", lambda split: ", ".join(split["formats"]))
    reasons = {reason: None for name in splits for reason in report[name]["bad"]["by_reason"]}
    for reason in reasons:
        row(f"bad: {reason}", lambda split, reason=reason: f"{split['bad']['by_reason'].get(reason, 0):,}")  # type: ignore[misc]
    row(f"longer than {report['max_length']:,}", lambda split: f"{split['too_long']['count']:,}")
    for name in ("prompt", "image", "chosen", "rejected"):
        row(f"{name} tokens p50 / p95 / max", lambda split, name=name: _spread(split["tokens"], name))  # type: ignore[misc]
    row("repeated rows", lambda split: f"{split['duplicates']['pairs']:,}")
    row("chosen is longer", lambda split: _share(split["length_bias"], "chosen_longer"))
    row("text-only accuracy", lambda split: _share(split["text_only"], "accuracy"))
    console.print(table)
    if report["images_on_both_sides"]:
        console.print(f"[yellow]{report['images_on_both_sides']:,} image(s) stand on both sides of the split[/yellow]")


def _spread(tokens: dict[str, Any] | None, name: str) -> str:
    return " / ".join(f"{tokens[name][point]:,.0f}" for point in ("p50", "p95", "max")) if tokens else "-"


def _share(figures: dict[str, float] | None, name: str) -> str:
    return f"{figures[name]:.0%}" if figures else "-"


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
