"""Arguments and options that several commands have, and how they load a recipe."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from orpo_ray.config.load import load_recipe
from orpo_ray.config.recipe import Recipe
from orpo_ray.fork_server.control import start_fork_server

RecipeFile = Annotated[
    Path, typer.Argument(metavar="RECIPE", help="Recipe file (YAML); recipes/ has examples.", show_default=False)
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="FIELD=VALUE",
        help="Recipe fields to override, for example optim.learning_rate=1e-5 name=second-try.",
        show_default=False,
    ),
]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print the result as one JSON object on stdout; everything else goes to stderr.")
]

Address = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="Address of the cluster (default: RAY_API_SERVER_ADDRESS, RAY_ADDRESS, or this machine).",
        show_default=False,
    ),
]
Prices = Annotated[
    list[str] | None,
    typer.Option(
        metavar="GPU=PRICE",
        help="Price of one GPU per hour, for example H100=2.50; repeat for other GPUs.",
        show_default=False,
    ),
]


def load_for_ray(recipe: Path, overrides: list[str] | None) -> Recipe:
    """Load a recipe, and start to import what Ray's processes need while this process imports what it needs."""
    loaded = load_recipe(recipe, overrides or [])
    if not os.environ.get("RAY_ADDRESS"):
        start_fork_server(["peft"] if loaded.model.lora is not None else [])
    return loaded
