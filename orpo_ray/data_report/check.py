"""`orpo-ray data check`: check all rows before training, and write a report and a page with charts and pairs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import ray
from rich.console import Console

from orpo_ray.config.recipe import Recipe
from orpo_ray.data.encoding import EncoderSpec
from orpo_ray.data.from_recipe import all_data, encoder_of
from orpo_ray.data.groups import SCRIPT
from orpo_ray.data.pairs import PreferencePair
from orpo_ray.data.reading import ReadSpec, pair_at
from orpo_ray.data_report.facts import PairFacts
from orpo_ray.data_report.page import render_page
from orpo_ray.data_report.progress import RowProgress
from orpo_ray.data_report.report import SplitCheck, images_on_both_sides, warnings_of
from orpo_ray.data_report.scan import iter_checked
from orpo_ray.extras import install_command, is_installed
from orpo_ray.pages.thumbnails import thumbnail
from orpo_ray.ray_cluster.start import start_ray
from orpo_ray.storage.run_folder import DATA_CHECK_FILE, RunFolder
from orpo_ray.tracking.bad_rows_file import write_bad_rows

PAGE_FILE = "data_check.html"
# Pairs are encoded without a length limit, so that the page can show the lengths of those that are too long. Only what
# training would not tokenize is not tokenized here either.
ANY_LENGTH = 10**9


def check_data(recipe: Recipe, console: Console) -> tuple[dict[str, Any], str]:
    """Check the training and held-out pairs of a recipe. Writes report, page and bad rows to the run folder.

    Args:
        recipe: the recipe.
        console: for progress.

    Returns:
        The report that `orpo-ray data check --json` prints, and the path or URI of the page.

    Raises:
        UserError: a source or the model's processor cannot be read.
    """
    recipe = recipe.with_absolute_paths()
    train, held_out = (each and _grouped(each) for each in all_data(recipe))
    assert train is not None
    encoder = replace(encoder_of(recipe), max_length=ANY_LENGTH, bound_length=recipe.data.max_length)
    encoder.build()
    folder = RunFolder(recipe.run_uri)
    folder.make()
    if not is_installed("sklearn"):
        console.print(f"text-only baseline not measured; to measure it: {install_command('sklearn')}", markup=False)
    start_ray()
    splits = {"train": train} | ({"eval": held_out} if held_out else {})
    checks = {name: _check_split(recipe, read, encoder, console, name) for name, read in splits.items()}
    report = {
        "name": recipe.name,
        "model": recipe.model.id,
        "max_length": recipe.data.max_length,
        "language": train.grouping.language,
        "domain": train.grouping.domain,
        "max_bad_fraction": recipe.data.max_bad_fraction,
        "train": checks["train"].report(),
        "eval": checks["eval"].report() if held_out else None,
        "images_on_both_sides": images_on_both_sides(checks["train"], checks.get("eval")),
    }
    gallery = list(_gallery(recipe, train, checks["train"]))
    (folder.path / PAGE_FILE).write_text(render_page(report, gallery), encoding="utf-8")
    (folder.path / DATA_CHECK_FILE).write_text(json.dumps(report, indent=2), encoding="utf-8")
    folder.push(PAGE_FILE, DATA_CHECK_FILE)
    write_bad_rows(folder, (row for check in checks.values() for row in check.bad))
    return report, f"{recipe.run_uri}/{PAGE_FILE}"


def _grouped(read: ReadSpec) -> ReadSpec:
    """Group the rows by script unless the recipe names their language."""
    return replace(read, grouping=replace(read.grouping, language=read.grouping.language or SCRIPT))


def _check_split(recipe: Recipe, read: ReadSpec, encoder: EncoderSpec, console: Console, name: str) -> SplitCheck:
    formats: Counter[str] = Counter()
    for rows, kind in zip(read.order.shard_rows, read.format_names, strict=True):
        formats[kind] += rows
    check = SplitCheck(recipe.data.max_length, recipe.data.on_too_long, dict(formats))
    encoders = max(1, int(ray.cluster_resources().get("CPU", 1)))
    with RowProgress(console, f"reading {name}", read.end_sample) as progress:
        for facts in iter_checked(read, encoder, encoders):
            check.add(facts)
            progress.advance()
    check.sort()
    return check


def _gallery(recipe: Recipe, read: ReadSpec, check: SplitCheck) -> Iterator[dict[str, Any]]:
    """Yield the selected pairs with their images. A pair with several reasons appears once, under the first."""
    facts = {each.sample_index: each for each in check.facts}
    shown: set[int] = set()
    for reason, sample_indices in check.gallery().items():
        for sample_index in sample_indices:
            if sample_index not in shown:
                shown.add(sample_index)
                shard, pair = pair_at(read, sample_index)
                if isinstance(pair, PreferencePair):
                    yield _gallery_entry(recipe, pair, read.root_of(shard), facts[sample_index], reason)


def _gallery_entry(
    recipe: Recipe, pair: PreferencePair, root: str | None, facts: PairFacts, reason: str
) -> dict[str, Any]:
    prompt, image, chosen, rejected = facts.tokens
    return {
        "id": pair.id,
        "source": pair.source,
        "why": reason,
        "images": [thumbnail(image, root, recipe.data.allow_http) for image in pair.images],
        "rejected_images": [thumbnail(image, root, recipe.data.allow_http) for image in pair.rejected_images or ()],
        "prompt": [
            {
                "role": turn["role"],
                "text": "\n".join(part["text"] for part in turn["content"] if part["type"] == "text"),
            }
            for turn in pair.prompt
        ],
        "chosen": pair.chosen,
        "rejected": pair.rejected,
        "tokens": {"prompt": prompt, "image": image, "chosen": chosen, "rejected": rejected},
        "warnings": warnings_of(facts, recipe.data.max_length),
    }
