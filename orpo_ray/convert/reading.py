"""Read the config of another trainer: a YAML file, or a shell script with the arguments of a command."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any

from orpo_ray.config.yaml_text import parse_yaml, read_text
from orpo_ray.errors import UserError

GIVE = "give the YAML file or the shell script that you start their training with"
_KIND = "config"  # in messages about the file
_YAML = (".yaml", ".yml", ".json")
_MAX_WORD = 20_000  # characters of a word with the values of its variables
_GPUS = re.compile(r"(?i)\b(?:nproc[_-]per[_-]node|num[_-]processes|nproc)[= ]+(\d{1,5})\b")
_COMMENT = re.compile(r"(\"(?:\\[\s\S]|[^\"\\])*\"|'[^']*')|(?<!\S)#[^\n]*")
_ENDS = "\n;&|"  # of a command
_ARRAY = re.compile(r"(?m)^[ \t]*(?:export |declare -a )?([A-Za-z_]\w*)(\+?)=\(([^()]*)\)")
_ARRAY_USE = re.compile(r"\"?\$\{(\w+)\[[@*]\]\}\"?")
_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)=([\s\S]*)")
_VARIABLE = re.compile(r"\$(?:\{(\w+)(?::?-([^{}]*))?\}|(\w+))")
_PROGRAM = re.compile(r"(?:^|/)(?:trl|swift|axolotl|llamafactory-cli)$|\.py$|^(?:trl|swift|axolotl|llamafactory)\.")
_TRAINER = re.compile(r"(?<![a-z])(orpo|dpo|cpo|kto|sft|grpo|ppo|rloo|reward|prm|gkd|bco)(?![a-z])")


@dataclass
class TheirConfig:
    """What a config says, before it is known whose config it is."""

    fields: dict[str, Any]
    gpus: int = 1
    """GPUs of the run, as far as the config says."""
    trainer: str | None = None
    """Method that the script's program trains with, such as `dpo`. None if the program does not say."""


def read_config(path: Path) -> TheirConfig:
    """Read a YAML file or a shell script. Raises UserError if the file cannot be read."""
    return _read_script(path) if path.suffix in (".sh", ".bash") else TheirConfig(_read_fields(path))


def _read_fields(path: Path) -> dict[str, Any]:
    raw = parse_yaml(read_text(path, _KIND), field=str(path), kind=_KIND)
    if raw is None:
        raise UserError("the file is empty", field=str(path), fix=GIVE)
    if not isinstance(raw, dict):
        raise UserError("a config must be a mapping", field=str(path), value=type(raw).__name__, fix=GIVE)
    return {str(name): value for name, value in raw.items()}


def _read_script(path: Path) -> TheirConfig:
    """Read the arguments of the command that trains, and the YAML file that the command names."""
    text = read_text(path, _KIND).replace("\r\n", "\n")
    found = _GPUS.search(text)
    gpus = max(1, int(found[1])) if found else 1
    text = re.sub(r"\$\(expr (\d{1,9}) / \$\w+\)", lambda match: str(int(match[1]) // gpus), text)
    try:
        commands = _commands(text)
    except ValueError as error:
        problem = f"cannot read the script: {str(error).lower()}"
        raise UserError(problem, field=str(path), fix="close the quote, or give the YAML file") from None
    if not any(commands):
        raise UserError("the file is empty", field=str(path), fix=GIVE)
    words = max(commands, key=lambda words: (any(map(_PROGRAM.search, words)), sum(map(_is_option, words))))
    if found := _GPUS.search(" ".join(words)):
        gpus = max(1, int(found[1]))
    fields, file, overrides = _arguments(words)
    if file is None and str(fields.get("config")).endswith(_YAML):
        file = str(fields.pop("config"))
    if file is not None:
        fields = _read_fields(_beside(path, file)) | overrides | fields
    return TheirConfig(fields, gpus, _trainer(words))


def _commands(text: str) -> list[list[str]]:
    """Split a script into commands of words, with the script's own variables filled in. Raises ValueError."""
    text = _with_arrays(_COMMENT.sub(lambda match: match[1] or "", text).replace("\\\n", " "))
    lexer = shlex.shlex(text, posix=True, punctuation_chars=_ENDS)
    lexer.whitespace, lexer.commenters, lexer.whitespace_split = " \t\r", "", True
    commands: list[list[str]] = [[]]
    variables: dict[str, str] = {}
    for word in lexer:
        if word and not word.strip(_ENDS):
            commands.append([])
            continue
        while _is_option(word) and len(commands) > 1 and not commands[-1]:
            commands.pop()  # options that a comment or an empty line separates from their command
        filled = _filled(word, variables)
        assigned = _ASSIGNMENT.fullmatch(filled)
        if assigned and all(before == "export" or _ASSIGNMENT.fullmatch(before) for before in commands[-1]):
            variables[assigned[1]] = assigned[2]
        holds_options = filled != word and word[0] == "$" and _is_option(filled.lstrip())
        commands[-1] += filled.split() if holds_options else [filled]
    return commands


def _with_arrays(text: str) -> str:
    """Put the words of an array, `ARGS=(--seed 1)`, where the script uses the array, as `"${ARGS[@]}"`."""
    arrays: dict[str, str] = {}

    def keep(match: re.Match[str]) -> str:
        before = arrays.get(match[1], "") if match[2] else ""
        arrays[match[1]] = f"{before} {match[3]}".replace("\n", " ")
        return ""

    text = _ARRAY.sub(keep, text)
    return _ARRAY_USE.sub(lambda match: arrays.get(match[1], match[0]), text, count=20)


def _filled(word: str, variables: dict[str, str]) -> str:
    """Replace variables that have a value, or a default as in `${NAME:-8}`."""

    def value(match: re.Match[str]) -> str:
        default = match[0] if match[2] is None else match[2]
        return variables.get(match[1] or match[3], default)

    filled = _VARIABLE.sub(value, word, count=20)
    return filled if len(filled) <= _MAX_WORD else word


def _is_option(word: str) -> bool:
    return word.startswith("--")


def _arguments(words: Sequence[str]) -> tuple[dict[str, Any], str | None, dict[str, Any]]:
    """Return the `--name value` arguments, the YAML file among the others, and the `name=value` words after that."""
    fields: dict[str, Any] = {}
    overrides: dict[str, Any] = {}
    name = file = program = None
    for word in words:
        if re.match(r"\d*[<>]", word):
            break  # output that goes to a file
        if _is_option(word):
            name, given, value = word[2:].partition("=")
            name = name.replace("-", "_")
            fields[name] = value if given else True
            name = None if given else name
        elif word.endswith(".py") and program is None:
            program, name = word, None  # what comes before are options of the launcher
        elif re.fullmatch(r"-[A-Za-z]\S*", word):
            name = None
        elif name is not None and fields[name] is True:
            fields[name] = word
        elif name is not None:
            fields[name] = [*(fields[name] if isinstance(fields[name], list) else [fields[name]]), word]
        elif file is None and word.endswith(_YAML) and "=" not in word:
            file = word
        elif file is not None and (found := _ASSIGNMENT.fullmatch(word)):
            overrides[found[1]] = parse_yaml(found[2], field=found[1], kind=_KIND)
    for launcher in ("num_processes", "nproc_per_node", "nproc"):
        fields.pop(launcher, None)  # counted as GPUs
    return fields, file, overrides


def _beside(script: Path, named: str) -> Path:
    """Return the file that a script names. Raises UserError unless the file lies in the folder of the script."""
    path = script.parent / named
    try:
        if path.is_file() and path.resolve().is_relative_to(script.parent.resolve()):
            return path
    except (OSError, ValueError, RuntimeError):  # a name that no file can have, or links in a circle
        pass
    raise UserError(
        "the script trains with a file that is not in the folder of the script",
        field=str(script),
        value=named,
        fix=f"give {named} itself",
    )


def _trainer(words: Sequence[str]) -> str | None:
    """Return the method in the name of the program: `trl dpo`, `dpo_vlm.py` or `-m trl.scripts.dpo`."""
    for before, word in pairwise(["", *words]):
        name = PurePosixPath(word).name
        if PurePosixPath(before).name != "trl" and not name.endswith(".py") and not word.startswith("trl."):
            continue
        if found := _TRAINER.search(name.lower()):
            return found[1]
    return None
