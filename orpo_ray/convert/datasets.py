"""Datasets that the configs of other trainers name, as sources of a recipe."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from orpo_ray.convert.draft import Draft

_NAME_FILES = "name the files of the configuration in {path}"
# [hub::]name[:subset][#rows]; a subset has no slash, so that a URI is a name.
_SWIFT_DATASET = re.compile(r"(?:(?:hf|ms)::)?(?P<name>[^#]+?)(?::(?P<subset>[^#/\\]+))?(?:#(?P<rows>.*))?", re.I)


def hub_source(name: str, split: str | None = None) -> str:
    """Return the source of a dataset: a file or folder as it is, a name of the hub as `hf://datasets/...`."""
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.endswith((".json", ".jsonl", ".parquet")):
        return f"hf://datasets/{name}" + (f"?split={split}" if split and split != "train" else "")
    return name


def put_entries(draft: Draft, field: str, path: str, split: str | None = None) -> list[str]:
    """Carry over datasets that are given as names, or as mappings with a path.

    Args:
        draft: the draft.
        field: their field: a name, a mapping or a list of these.
        path: field of the recipe.
        split: split of entries that name none.

    Returns:
        The names of the datasets that were carried over.
    """
    value = draft.take(field)
    names, sources = [], []
    for each in value if isinstance(value, list) else [] if value is None else [value]:
        entry = each if isinstance(each, dict) else {"path": each}
        name = entry.get("path")
        if not isinstance(name, str) or not name:
            draft.note(field, each, f"not understood; it would be a source in {path}")
            continue
        names.append(name)
        sources.append(_entry_source(draft, field, entry, split, path))
    draft.put(path, sources or None)
    return names


def _entry_source(draft: Draft, field: str, entry: Mapping[str, Any], split: str | None, path: str) -> str:
    """Return the source of an entry in a field of the recipe, and list what the source does not say."""
    name, given = str(entry["path"]), str(entry.get("split") or split or "train")
    whole = re.match(r"[\w.-]*", given)[0]  # type: ignore[index]  # matches every text
    source = hub_source(name, whole)
    if whole != given:
        draft.note(field, {"path": name, "split": given}, "a part of a split; the recipe has the whole split")
    elif given != "train" and "?split=" not in source:
        draft.note(field, {"path": name, "split": given}, f"name the files of the split in {path}")
    for other in ("name", "data_dir", "data_files"):
        if entry.get(other) not in (None, "", []):
            draft.note(field, {"path": name, other: entry[other]}, _NAME_FILES.format(path=path))
    columns = {key: value for key, value in entry.items() if str(key).startswith("field_")}
    if columns:
        draft.note(field, columns, "name other columns in data.columns")
    return source


def put_eval_fraction(draft: Draft, field: str) -> None:
    """Carry over the fraction of the rows that is held out."""
    size = draft.take_number((field,), "data.eval_fraction")
    if size is not None and 0 < size < 1:
        draft.put("data.eval_fraction", size)
    elif size is not None and size >= 1:
        draft.note(field, int(size), "a number of rows; data.eval_fraction is a fraction")


def put_trl_data(draft: Draft) -> None:
    """Carry over `dataset_name`, or the mixture in `datasets`, and the splits."""
    name = draft.take("dataset_name")
    if name is not None:
        draft.theirs.setdefault("datasets", name)
    split, held_out = draft.take("dataset_train_split"), draft.take("dataset_test_split")
    evaluates = draft.theirs.get("eval_strategy") not in (None, "no", False)
    names = put_entries(draft, "datasets", "data.train", split)
    if evaluates and names:
        source = _entry_source(draft, "dataset_test_split", {"path": names[0]}, str(held_out or "test"), "data.eval")
        if source not in draft.recipe["data"]["train"]:
            draft.put("data.eval", source)
    draft.drop({"dataset_config": _NAME_FILES.format(path="data.train"), "dataset_streaming": ""})


def put_llamafactory_data(draft: Draft, folder: Path) -> None:
    """Carry over `dataset`, with the files that a dataset_info.json names, and held-out rows."""
    where = folder / str(draft.take("dataset_dir") or "data")
    info = _dataset_info(where)
    sources = []
    for name in _names(draft, "dataset", ","):
        entry = info.get(name)
        entry = entry if isinstance(entry, dict) else {}
        source = entry.get("hf_hub_url") or entry.get("file_name") or name
        is_file = "hf_hub_url" not in entry and "file_name" in entry
        sources.append(str(where / str(source)) if is_file else hub_source(str(source)))
        if not entry and "/" not in name:
            draft.note("dataset", name, "a name in a dataset_info.json that is not here; name its file in data.train")
    draft.put("data.train", sources or None)
    draft.move(("media_dir", "image_dir"), "data.image_root", str)
    held_out = [hub_source(name) for name in _names(draft, "eval_dataset", ",")]
    draft.put("data.eval", held_out or None)
    if held_out:
        draft.take("val_size")
    put_eval_fraction(draft, "val_size")


def _names(draft: Draft, field: str, separator: str | None) -> list[str]:
    """Take names that are a list, or one text. Values of another kind are listed."""
    value = draft.take(field)
    parts: Iterable[Any] = value if isinstance(value, list) else [] if value is None else [value]
    if isinstance(value, str):
        parts = value.split(separator)
    names = []
    for part in parts:
        if isinstance(part, str) and part.strip():
            names.append(part.strip())
        else:
            draft.note(field, part, "not understood; it would be a source of the data")
    return names


def _dataset_info(folder: Path) -> Mapping[str, Any]:
    path = folder / "dataset_info.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def put_swift_data(draft: Draft) -> None:
    """Carry over `dataset` and `val_dataset`, whose names can end in `:subset` and `#rows`, and held-out rows."""
    for field, path in (("dataset", "data.train"), ("val_dataset", "data.eval")):
        sources = []
        for given in _names(draft, field, None):
            found = _SWIFT_DATASET.fullmatch(given)
            if found is None:
                draft.note(field, given, f"not understood; it would be a source in {path}")
                continue
            sources.append(hub_source(found["name"]))
            if found["subset"]:
                draft.note(field, given, f"the subset after : is not carried over; name its files in {path}")
            if found["rows"]:
                draft.note(field, given, "the number of rows after # is not carried over")
        draft.put(path, sources or None)
    if draft.recipe.get("data", {}).get("eval"):
        draft.take("split_dataset_ratio")
    put_eval_fraction(draft, "split_dataset_ratio")
