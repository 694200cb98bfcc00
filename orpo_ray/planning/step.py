"""How large a step is: the pairs by the data check or by assumption, the micro-batch that fills the token budget."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any

from orpo_ray.config.recipe import Recipe
from orpo_ray.data.packing import Layout
from orpo_ray.errors import UserError
from orpo_ray.planning.activations import PairShape
from orpo_ray.planning.images import HEIGHT, WIDTH, image_shape
from orpo_ray.storage.run_folder import DATA_CHECK_FILE, RunFolder

# Without a data check: tokens of a question's text with the chat template, and of an answer; pairs of a usual set.
PROMPT, ANSWER, PAIRS = 60, 120, 10_000


@dataclass(frozen=True)
class Workload:
    """shape: the usual pair. longest: tokens of the longest row that data.max_length admits. pairs: to train on.

    assumptions: all of it that nobody measured, in words. source: where the figures come from.
    """

    shape: PairShape
    longest: int
    pairs: int
    source: str
    assumptions: tuple[str, ...] = field(default=())

    def steps(self, recipe: Recipe) -> int:
        """Optimizer steps of the run."""
        steps = math.ceil(self.pairs * recipe.optim.epochs / recipe.optim.pairs_per_step)
        return min(steps, recipe.optim.max_steps or steps)


def workload(recipe: Recipe, config: Any, layout: Layout, pairs: int | None) -> Workload:
    """By the run folder's data check if there is one. pairs: the user's own figure. Raises UserError."""
    report = _data_check(recipe)
    if report is None or not report["train"]["tokens"]:
        return _assumed(recipe, config, layout, pairs)
    train = report["train"]
    means = {name: train["tokens"][name]["mean"] for name in ("prompt", "image", "chosen", "rejected")}
    counted = {int(n): count for n, count in train["images_per_pair"].items()}
    images = max(counted, key=lambda n: counted[n])
    each = round(means["image"] / max(1e-9, sum(n * c for n, c in counted.items()) / sum(counted.values())))
    image = image_shape(config, each or None)
    shape = PairShape(
        round(means["prompt"] - means["image"]),
        round(means["chosen"]),
        round(means["rejected"]),
        images,
        image.tokens,
        image.vision,
    )
    longest = min(recipe.data.max_length, int(train["tokens"]["sequence"]["max"]))
    notes = [] if report["model"] == recipe.model.id else [f"the data check counted tokens of {report['model']}"]
    return Workload(shape, longest, pairs or train["pairs"], "the run folder's data check", tuple(notes))


def _assumed(recipe: Recipe, config: Any, layout: Layout, pairs: int | None) -> Workload:
    image = image_shape(config)
    room = recipe.data.max_length - image.tokens
    shape = PairShape(min(PROMPT, max(2, room // 3)), ANSWER, ANSWER, 1, image.tokens, image.vision)
    assumptions = [
        f"one image a pair, a photo of {WIDTH} x {HEIGHT}: {image.tokens:,} tokens ({image.how})",
        f"{shape.prompt} tokens of text in a prompt, {ANSWER} in an answer",
    ]
    if image.tokens + PROMPT + ANSWER > recipe.data.max_length:
        assumptions.append(
            f"such a pair is longer than data.max_length ({recipe.data.max_length:,}) and would be a bad row"
        )
    if pairs is None:
        assumptions.append(f"{PAIRS:,} training pairs (--pairs says how many)")
    assumptions.append("`orpo-ray data check` with this recipe puts your data's figures in the place of these")
    return Workload(shape, recipe.data.max_length, pairs or PAIRS, "assumptions", tuple(assumptions))


def _data_check(recipe: Recipe) -> dict[str, Any] | None:
    folder = RunFolder(recipe.run_uri)
    folder.pull(DATA_CHECK_FILE)
    path = folder.path / DATA_CHECK_FILE
    if not path.exists():
        return None
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(
            f"is not a data check's report: {error}", field=str(path), fix="run orpo-ray data check again"
        ) from None
    return report if isinstance(report, dict) and report.get("train") else None


def pairs_at_once(recipe: Recipe, work: Workload, layout: Layout, budget: int, workers: int) -> int:
    """Pairs of a full micro-batch on one worker."""
    share = -(-recipe.optim.pairs_per_step // workers)
    return max(1, min(share, budget // work.shape.tokens(layout)))
