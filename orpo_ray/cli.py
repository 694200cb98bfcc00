"""The command line: parses arguments and dispatches. Each command imports what it needs, so `--help` is fast."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from orpo_ray import __version__
from orpo_ray.commands import results, synthetic
from orpo_ray.commands.options import Address, AsJson, Overrides, Prices, RecipeFile, load_for_ray
from orpo_ray.config.load import load_recipe
from orpo_ray.config.recipe import Recipe
from orpo_ray.console import (
    console,
    print_check,
    print_error,
    print_exported,
    print_findings,
    print_left_out,
    print_line,
    print_next_to_recipe,
    print_prepared,
    print_recipes,
    print_sweep,
    print_trained,
    stdout_to_stderr,
)
from orpo_ray.errors import OrpoRayError, UserError

app = typer.Typer(
    help="Align vision-language models to preferences with ORPO, from a laptop to a cluster.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Check a recipe's data, or write a clean copy of it.", no_args_is_help=True)
app.add_typer(data_app, name="data")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"orpo-ray {__version__}")
        raise typer.Exit


@app.callback()
def common(
    show_version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Take the options that belong to no command."""


@app.command()
def train(
    recipe: RecipeFile,
    overrides: Overrides = None,
    from_checkpoint: Annotated[
        str | None,
        typer.Option(
            metavar="CHECKPOINT",
            help="Resume from this checkpoint of the run, by name or path, instead of the newest whole one. Newer ones "
            "are deleted.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Train a model; run the same command again to resume."""
    loaded = load_for_ray(recipe, overrides)
    from orpo_ray.training.launch import launch_training

    summary = launch_training(loaded, console, from_checkpoint=from_checkpoint)
    from orpo_ray.report.page import write_report

    try:
        with stdout_to_stderr():
            page = write_report([summary.run_uri], warn=print_left_out)
    except (UserError, OSError) as error:  # the run itself is whole
        page = f"not written: {error}"
    print_trained(summary, page)


@app.command()
def tune(recipe: RecipeFile, overrides: Overrides = None, price_per_hour: Prices = None) -> None:
    """Search recipe fields with Ray Tune; run the same command again to go on. Every trial is an ordinary run."""
    loaded = load_for_ray(recipe, overrides)
    searched = list(loaded.search)
    from orpo_ray.sweep.board import INTERRUPTED
    from orpo_ray.sweep.run import run_sweep

    sweep = run_sweep(loaded, console, price_per_hour or ())
    print_sweep(sweep, searched, loaded.tune.metric)
    if sweep.ended_by == INTERRUPTED:
        raise typer.Exit(128 + signal.SIGINT)


results.add_to(app)


@app.command()
def init(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Recipe to write.", show_default=False)] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="File to write (default: NAME.yaml).", show_default=False)
    ] = None,
) -> None:
    """List the recipes that come with orpo-ray, or write one of them to a file."""
    from orpo_ray.config.shipped_recipes import shipped_recipes, write_recipe

    if name is None:
        print_recipes(shipped_recipes())
    else:
        print_next_to_recipe(str(write_recipe(name, output)))


@app.command()
def convert(
    config: Annotated[
        Path,
        typer.Argument(
            metavar="THEIR_CONFIG",
            help="YAML file of TRL, LLaMA-Factory, ms-swift or axolotl, or a shell script that starts one of them.",
            show_default=False,
        ),
    ],
) -> None:
    """Print a recipe made of another trainer's config; comments list what has no counterpart."""
    from orpo_ray.convert.convert import convert_config

    print(convert_config(config), end="")


@app.command()
def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Folder of a finished run.", show_default=False)],
    adapter: Annotated[
        bool,
        typer.Option(
            "--adapter/--merged",
            help="Write the adapters alone, or one model with adapters merged (default: merged).",
            show_default=False,
        ),
    ] = False,
    output: Annotated[
        str | None,
        typer.Option(help="Folder or URI to write to (default: RUN/export or RUN/export-adapter).", show_default=False),
    ] = None,
    push: Annotated[
        str | None,
        typer.Option(metavar="OWNER/NAME", help="Also upload to this Hugging Face repository.", show_default=False),
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public rather than private.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing export.")] = False,
    max_shard_size: Annotated[
        str | None,
        typer.Option(help="Largest size of one weight file, for example 5GB (default: that of transformers).",
                     show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Write a finished run's model as a folder for transformers and vLLM, with a model card."""
    from orpo_ray.exporting.export import ExportOptions, export_run

    exported = export_run(run, ExportOptions(adapter, output, push, public, max_shard_size, overwrite), console)
    if as_json:
        print(json.dumps(asdict(exported)))
    print_exported(exported)


@data_app.command("check")
def data_check(recipe: RecipeFile, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Check every row for errors, lengths, duplicates and biases, and write a page with plots and examples."""
    loaded = load_for_ray(recipe, overrides)
    from orpo_ray.data_report.check import check_data

    with stdout_to_stderr():
        report, page = check_data(loaded, console)
    if as_json:
        print(json.dumps(report))
    else:
        print_check(report)
    print_line(f"page  {page}")


@data_app.command("prepare")
def data_prepare(recipe: RecipeFile, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Write all usable pairs, with their images, as sharded parquet to train from."""
    loaded = load_for_ray(recipe, overrides)
    from orpo_ray.data_report.prepare import prepare_data

    with stdout_to_stderr():
        written = prepare_data(loaded, console)
    if as_json:
        print(json.dumps({name: {"uri": split.uri, "rows": split.rows} for name, split in written.items()}))
    print_prepared(written, str(recipe), overrides or [])


synthetic.add_to(app, data_app)


@app.command()
def plan(
    recipe: RecipeFile,
    overrides: Overrides = None,
    price_per_hour: Prices = None,
    mfu: Annotated[
        float | None,
        typer.Option(
            help="Fraction of a GPU's peak FLOP/s that the recipe reaches, 0 to 1, without recomputation (default: "
            "estimated for each GPU type).",
            show_default=False,
        ),
    ] = None,
    assume: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="A rate that the estimate of time assumes, for example overlap=0.8; repeat for others.",
            show_default=False,
        ),
    ] = None,
    pairs: Annotated[
        int | None,
        typer.Option(help="Number of training pairs (default: as counted by `data check`).", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Predict memory, time and cost per GPU type from the model's config alone."""
    loaded = load_recipe(recipe, overrides or [])
    is_own_process = "torch" not in sys.modules  # rather than a notebook or a test, which may have run anything
    from orpo_ray.planning.imports import uncollected

    with uncollected():
        from orpo_ray.planning.plan import Options
        from orpo_ray.planning.plan import plan as make_plan
        from orpo_ray.planning.table import print_plan

    with stdout_to_stderr():
        options = Options(price_per_hour or (), mfu, assume or (), pairs, can_fork=is_own_process)
        report = make_plan(loaded, options)
    if as_json:
        print(json.dumps(report))
    else:
        print_plan(report, console)


@app.command()
def submit(
    recipe: RecipeFile,
    overrides: Overrides = None,
    address: Address = None,
    command: Annotated[
        str,
        typer.Option(
            metavar="COMMAND",
            help="What to run, with its options: train, tune, iterate, `data check`, `data prepare`, "
            "`data synthesize` or doctor; or evaluate or export, which take the recipe's run.",
        ),
    ] = "train",
    working_dir: Annotated[
        str, typer.Option(metavar="FOLDER", help="Folder to upload, with the recipe in it; 512 MiB at most.")
    ] = ".",
    runtime_env: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="YAML file with Ray's runtime environment, or `none` if the nodes have orpo-ray (default: "
            "cluster/runtime_env.yaml, if there is one in the folder).",
            show_default=False,
        ),
    ] = None,
    price_per_hour: Prices = None,
    cost: Annotated[bool, typer.Option("--cost/--no-cost", help="Estimate time and cost before the upload.")] = True,
    follow: Annotated[bool, typer.Option("--follow/--no-follow", help="Print the job's log until it ends.")] = True,
) -> None:
    """Run a recipe on a Ray cluster: upload this folder, print the cost and the job's id, and follow the log."""
    from orpo_ray.jobs.follow import after_interrupt, follow_job
    from orpo_ray.jobs.submit import JobOptions, submit_job

    options = JobOptions(address, command, working_dir, runtime_env, price_per_hour or (), cost)
    client, job = submit_job(recipe, overrides or [], options, console)
    print(job, flush=True)
    if follow:
        try:
            follow_job(client, job)
        except KeyboardInterrupt:
            raise after_interrupt(client, job) from None


@app.command()
def doctor(
    recipe: Annotated[
        Path | None,
        typer.Argument(metavar="[RECIPE]", help="Recipe whose storage and sizes to check.", show_default=False),
    ] = None,
    overrides: Overrides = None,
    address: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT", help="Cluster to check (default: RAY_ADDRESS, or the one that runs on this machine).",
            show_default=False,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Check a cluster before a run: versions, GPUs, network, storage, memory, disks, clocks, and who can reach it."""
    loaded = None if recipe is None else load_recipe(recipe, overrides or [])
    from orpo_ray.doctor.examine import examine

    with stdout_to_stderr():
        findings = examine(loaded, address)
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings]))
    print_findings(findings)
    if any(finding.status == "fix" for finding in findings):
        raise typer.Exit(1)


@app.command()
def schema() -> None:
    """Print the JSON schema of recipes, for editors."""
    print(json.dumps(Recipe.model_json_schema(), indent=2))


def _guarded(command: Callable[[], Any]) -> int:
    """Run a command; return the exit code. An error of this package is one message."""
    try:
        command()
    except OrpoRayError as error:
        print_error(error.title, error)
        return error.exit_code
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


def main() -> None:
    """Run `orpo-ray`."""
    sys.exit(_guarded(app))


if __name__ == "__main__":
    main()
