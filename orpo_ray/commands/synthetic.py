"""The commands about synthetic pairs: `data synthesize` and `iterate`. Each imports what it needs."""

from __future__ import annotations

import json

import typer

from orpo_ray.commands.options import AsJson, Overrides, RecipeFile, load_for_ray
from orpo_ray.console import console, print_left_out, print_line, print_rounds, print_synthesized, stdout_to_stderr


def add_to(app: typer.Typer, data_app: typer.Typer) -> None:
    """Add these commands to the command line."""
    app.command()(iterate)
    data_app.command("synthesize")(data_synthesize)


def data_synthesize(recipe: RecipeFile, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Make preference pairs of images and prompts, as `synthesize` says; run it again to go on."""
    loaded = load_for_ray(recipe, overrides)
    from orpo_ray.synthesis.run import synthesize

    with stdout_to_stderr():
        made = synthesize(loaded, console)
    if as_json:
        print(json.dumps(made.as_json()))
    print_synthesized(made, str(recipe), overrides or [])


def iterate(recipe: RecipeFile, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Synthesize pairs, train on them and evaluate, for several rounds; run it again to go on."""
    loaded = load_for_ray(recipe, overrides)
    from orpo_ray.synthesis.rounds import iterate as run_rounds

    with stdout_to_stderr():
        found = run_rounds(loaded, console)
        from orpo_ray.report.page import write_report
        from orpo_ray.storage.run_folder import REPORT_FILE

        runs = [each.run_uri for each in found.rounds]
        page = write_report(runs, f"{found.uri}/{REPORT_FILE}", warn=print_left_out)
    if as_json:
        print(json.dumps(found.as_json()))
    print_rounds(found)
    print_line(f"report  {page}")
