"""Size of a step: the typical pair, from the data check or by assumption, and the pairs per micro-batch."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any

from orpo_ray.config.recipe import Recipe
from orpo_ray.data.balance import Layout
from orpo_ray.errors import UserError
from orpo_ray.planning.activations import PairShape
from orpo_ray.planning.images import HEIGHT, WIDTH, image_shape
from orpo_ray.storage.run_folder import DATA_CHECK_FILE, RunFolder

# Assumptions without a data check: text tokens of a prompt with chat template, tokens of an answer, training pairs.
PROMPT, ANSWER, PAIRS = 60, 120, 10_000


@dataclass(frozen=True)
class Workload:
    """The data of a run, as a plan sees it."""

    shape: PairShape
    """The typical pair."""
    longest: int
    """Tokens of the longest pair that is trained on."""
    pairs: int
    """Training pairs."""
    source: str
    """Where the figures come from."""
    assumptions: tuple[str, ...] = field(default=())
    """Figures that are assumed, in words."""

    def steps(self, recipe: Recipe) -> int:
        """Return the number of optimizer steps of the run."""
        steps = math.ceil(self.pairs * recipe.optim.epochs / recipe.optim.pairs_per_step)
        return min(steps, recipe.optim.max_steps or steps)


def estimate_workload(recipe: Recipe, config: Any, pairs: int | None) -> Workload:
    """Take the figures from the data check in the run folder, or assume them if there is none.

    Args:
        recipe: the recipe.
        config: the model's config in transformers.
        pairs: number of training pairs given by the user.

    Raises:
        UserError: the data check cannot be read.
    """
    report = _read_data_check(recipe)
    if report is None or not report["train"]["tokens"]:
        return _assume_workload(recipe, config, pairs)
    train = report["train"]
    means = {name: train["tokens"][name]["mean"] for name in ("prompt", "image", "chosen", "rejected")}
    counts = {int(images): pairs for images, pairs in train["images_per_pair"].items()}
    images = max(counts, key=lambda n: counts[n])
    mean_images = sum(n * count for n, count in counts.items()) / sum(counts.values())
    image = image_shape(config, round(means["image"] / max(1e-9, mean_images)) or None)
    shape = PairShape(
        round(means["prompt"] - means["image"]),
        round(means["chosen"]),
        round(means["rejected"]),
        images,
        image.tokens,
        image.vision,
        has_other=bool(images) and recipe.other_image is not None,
    )
    longest = min(recipe.data.max_length, int(train["tokens"]["sequence"]["max"]))
    assumptions = _uncounted_pairs(recipe)
    if report["model"] != recipe.model.id:
        assumptions.append(f"token counts are from a data check with another model, {report['model']}")
    return Workload(shape, longest, pairs or train["pairs"], "data check", tuple(assumptions))


def _assume_workload(recipe: Recipe, config: Any, pairs: int | None) -> Workload:
    image = image_shape(config)
    available = recipe.data.max_length - image.tokens
    has_other = recipe.other_image is not None
    shape = PairShape(min(PROMPT, max(2, available // 3)), ANSWER, ANSWER, 1, image.tokens, image.vision, has_other)
    assumptions = [
        f"one image per pair, a photo of {WIDTH} x {HEIGHT}: {image.tokens:,} tokens ({image.description})",
        f"{shape.prompt} text tokens per prompt, {ANSWER} tokens per answer",
        *_uncounted_pairs(recipe),
    ]
    if image.tokens + PROMPT + ANSWER > recipe.data.max_length:
        assumptions.append(
            f"a pair of this length would be skipped: it exceeds data.max_length ({recipe.data.max_length:,})"
        )
    if pairs is None:
        assumptions.append(f"{PAIRS:,} training pairs (change with --pairs)")
    assumptions.append("run `orpo-ray data check` with this recipe to replace these assumptions by your data's figures")
    return Workload(shape, recipe.data.max_length, pairs or PAIRS, "assumptions", tuple(assumptions))


def _uncounted_pairs(recipe: Recipe) -> list[str]:
    kind = recipe.data.pairs_from_ranking
    return [] if kind == "best_worst" else [f"one pair per row; data.pairs_from_ranking is {kind}, so a step has more"]


def _read_data_check(recipe: Recipe) -> dict[str, Any] | None:
    folder = RunFolder(recipe.run_uri)
    folder.pull(DATA_CHECK_FILE)
    path = folder.path / DATA_CHECK_FILE
    if not path.exists():
        return None
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(
            f"not a data check report: {error}", field=str(path), fix="run orpo-ray data check again"
        ) from None
    return report if isinstance(report, dict) and report.get("train") else None


def pairs_per_microbatch(recipe: Recipe, work: Workload, layout: Layout, budget: int, workers: int) -> int:
    """Return the pairs in a full micro-batch of a worker, or of a group of workers that compute it together."""
    together = recipe.scaling.sequence_parallel
    step_shard = -(-recipe.optim.pairs_per_step // (workers // together))
    return max(1, min(step_shard, budget * together // work.shape.tokens(layout)))
