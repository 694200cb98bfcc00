"""Arguments and options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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
