"""The reference of the command line, from the typer application itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import typer.main

from orpo_ray.cli import app

HEAD = """---
description: Every command with its arguments and options.
---

# Command reference

Commands take a recipe and any number of overrides (`FIELD=VALUE`; the value is YAML). Messages go to stderr;
`--json` prints one JSON object to stdout.

| Exit code | Meaning |
|---|---|
| 0 | The command did its work. |
| 1 | The run or the command failed. |
| 2 | Your input is wrong. One message names the field, the value and the fix; there is no traceback. |
| 130, 143 | SIGINT or SIGTERM ended the run ([stopping](../reliability.md#stopping)). |

| Environment variable | Meaning |
|---|---|
| `RAY_ADDRESS` | Address of the Ray cluster to join. Without it, a command starts Ray on this machine. |
| `ORPO_RAY_CACHE` | Folder for the small models that are built offline. By default `~/.cache/orpo-ray`. |
| `ORPO_RAY_FORK` | `0` lets Ray start each process anew instead of forking it from one with all imports; slower. |
| `WANDB_API_KEY` | Key of Weights & Biases. Metrics also go there, unless `tracking.wandb.enabled=false`. |
| `WANDB_INIT_TIMEOUT` | Seconds that the start of a run waits for Weights & Biases. By default 30. |

"""


def command_reference() -> str:
    """The page as Markdown: one heading per command."""
    root = typer.main.get_command(app)
    return HEAD + "".join(_command(path, command) for path, command in _commands("orpo-ray", root))


def _commands(path: str, command: Any) -> Iterator[tuple[str, Any]]:
    if not hasattr(command, "commands"):
        yield path, command
        return
    for name, inner in command.commands.items():
        yield from _commands(f"{path} {name}", inner)


def _command(path: str, command: Any) -> str:
    arguments = [each for each in command.params if each.param_type_name == "argument"]
    options = [each for each in command.params if each.param_type_name == "option" and each.name != "help"]
    usage = " ".join([path, *(_placeholder(each) for each in arguments), *(["[OPTIONS]"] if options else [])])
    anchor = path.removeprefix("orpo-ray ").replace(" ", "-")
    text = f"## `{path}` {{ #{anchor} }}\n\n{command.help}\n\n```text\n{usage}\n```\n\n"
    if arguments or options:
        text += "| Argument or option | Meaning |\n|---|---|\n"
        text += "".join(f"| {_name(each)} | {_meaning(each)} |\n" for each in (*arguments, *options)) + "\n"
    return text


def _placeholder(argument: Any) -> str:
    name = argument.name.upper()
    shown = "FIELD=VALUE" if name == "OVERRIDES" else name
    return f"[{shown} ...]" if argument.nargs == -1 else shown if argument.required else f"[{shown}]"


def _name(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return f"`{_placeholder(parameter)}`"
    names = ", ".join(f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts))
    return names if parameter.is_flag else f"{names} `{parameter.metavar or 'VALUE'}`"


def _meaning(parameter: Any) -> str:
    return (parameter.help or "").replace("|", "\\|")
