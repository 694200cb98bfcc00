"""What the parts of a run folder belong to, so that a resumed command adds only parts of the same set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import xxhash

from orpo_ray.config.recipe import Recipe
from orpo_ray.data_report.prepare import PREPARED
from orpo_ray.errors import UserError
from orpo_ray.evaluation.targets import Target
from orpo_ray.model.loading import commit_of
from orpo_ray.storage.run_folder import RunFolder
from orpo_ray.synthesis.source import SourceRows

FILE = f"{PREPARED}/synthesis.json"
# Of the section `synthesize`: how a set is made, or what else is done with it.
_MAY_CHANGE = {"num_workers", "rounds", "server.concurrency"}
_OF_MODEL = ("dtype", "attention", "quantization", "trust_remote_code")  # what an answer depends on, beside the weights
_CHUNK = 16 << 20


def identity_of(recipe: Recipe, source: SourceRows, target: Target) -> dict[str, Any]:
    """Return what decides a set: fields of the recipe by their keys, the data, the weights.

    Args:
        recipe: the recipe.
        source: the rows.
        target: the model that answers or scores.
    """
    found = _flat("synthesize", recipe.synthesize.model_dump(mode="json"))
    found = {key: value for key, value in found.items() if key.removeprefix("synthesize.") not in _MAY_CHANGE}
    data = recipe.data
    return found | {
        **{f"source.{name}": value for name, value in source.how_read.items()},
        **{f"model.{name}": getattr(recipe.model, name) for name in _OF_MODEL if name != "quantization"},
        "model.quantization": recipe.model.quantization and recipe.model.quantization.model_dump(mode="json"),
        "scaling.cpus_per_worker": recipe.scaling.cpus_per_worker,
        "data.max_length": data.max_length,
        "data.on_too_long": data.on_too_long,
        "data.language": source.grouping.columns.get("language"),
        "data.domain": source.grouping.columns.get("domain"),
        "data.eval": data.eval,
        "data.eval_fraction": data.eval_fraction,
        "model": target.title,
        "weights": weights_of(target),
        "rows": source.digest,
    }


def check_identity(folder: RunFolder, identity: dict[str, Any]) -> None:
    """Compare with what the folder's parts belong to; write that if the folder has no parts.

    Raises:
        UserError: the folder holds another set, or parts of one.
    """
    if not folder.has(FILE):
        folder.write(FILE, (json.dumps(identity, indent=2) + "\n").encode())
        return
    folder.pull(FILE)
    saved = json.loads((folder.path / FILE).read_text("utf-8"))
    now = json.loads(json.dumps(identity))
    differing = [key for key in sorted({*saved, *now}) if saved.get(key) != now.get(key)]
    if differing:
        raise UserError(
            f"the folder holds another synthetic set; the two differ in {', '.join(differing)}",
            field=f"{folder.uri}/{PREPARED}",
            fix="choose another name (name=...), or delete the folder",
        )


def weights_of(target: Target) -> str | None:
    """Return a hash of the weights of a model in a folder, or the commit of one on the hub; None for a tiny model."""
    folder = target.folder or Path(target.model.id)
    if not folder.is_dir():
        return commit_of(target.model) or target.model.revision
    digest = xxhash.xxh3_128()
    for path in sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin")):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    return digest.hexdigest()


def _flat(prefix: str, values: dict[str, Any]) -> dict[str, Any]:
    """Name the values of nested sections by their dotted keys. Mappings of the user, such as sources, stay whole."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if key in ("server", "judge"):
            found |= _flat(f"{prefix}.{key}", value)
        else:
            found[f"{prefix}.{key}"] = value
    return found
