"""Does a model look more with an image preference? Accuracy and grounding gap on held-out pairs, by variant and seed.

    python benchmarks/grounding.py RECIPE [--variant NAME FIELD=VALUE ...]... [--seeds N] [--every STEPS] [--json]
    python benchmarks/grounding.py --reports FILE... [--plot FILE.svg] [--json]

Each variant is the recipe with overrides, trained in this process on one device, without Ray. A seed changes the order
of the training pairs (`data.shuffle_seed`), the adapters' first weights and dropout (`optim.seed`). In full training
without dropout, only the order differs: all seeds start from the same weights. The held-out pairs are the same for all
seeds. They are scored with their own images and with exchanged ones, as by `orpo-ray evaluate`.
The second form joins the JSON of earlier commands, whose variants may have run side by side.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from dot_plot import dot_plot
from machine import provenance

from orpo_ray.config.load import apply_overrides, parse_recipe, read_mapping
from orpo_ray.config.recipe import Recipe
from orpo_ray.data.bad_rows import BadRow
from orpo_ray.data.balance import StepShare
from orpo_ray.data.encoding import EncodedPair, PairEncoder
from orpo_ray.data.from_recipe import encoder_of, run_data
from orpo_ray.data.order import step_samples
from orpo_ray.data.reading import ReadSpec, read_windows
from orpo_ray.evaluation.evaluator import EXCHANGED, score, with_pass
from orpo_ray.objective.base import load_objective
from orpo_ray.objective.collectives import add_sums
from orpo_ray.objective.pair_model import PairModel
from orpo_ray.objective.step_planner import StepPlanner
from orpo_ray.processing.pixel_norm import PixelNorm
from orpo_ray.streaming.pipeline import encode_rows
from orpo_ray.training.optimizer import adamw, schedule
from orpo_ray.training.sharded_loading import load_for_training

# Two-sided 95 % quantiles of Student's t by degrees of freedom.
_T = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}
_SHOWN = ("rewards/accuracies", "rewards/accuracies_exchanged", "grounding_gap", "nll_loss", "rewards/image_accuracies")


class Experiment:
    """One variant with one seed."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.device = recipe, torch.device("cuda" if torch.cuda.is_available() else "cpu")
        train, held_out = run_data(recipe)
        assert held_out is not None, "the recipe needs held-out pairs"
        self.train, self.held_out = train, held_out
        self.encoder = encoder_of(recipe).build()
        self.model = PairModel(load_for_training(recipe, self.device), PixelNorm.of(self.encoder.processor))
        self.objective = load_objective(recipe)
        budget = recipe.optim.tokens_per_microbatch
        self.planner = StepPlanner.of(self.objective, budget, self.encoder, self.model, self.device)

    def run(self, every: int | None, log: Callable[[str], None]) -> dict[str, float]:
        """Train; every so many steps, and at the end, return or log the metrics of the held-out pairs."""
        optim, per_step = self.recipe.optim, self.recipe.optim.pairs_per_step
        weights = [weight for weight in self.model.parameters() if weight.requires_grad]
        steps = -(-self.train.end_sample // per_step)
        optimizer = adamw(weights, optim)
        rates = schedule(optimizer, optim, steps)
        torch.manual_seed(optim.seed)  # of dropout
        seconds = 0.0
        for share in shares(self.train, self.encoder, self.planner):
            started = time.perf_counter()
            plan = self.planner.plan(share)
            sums: dict[str, torch.Tensor] = {}
            for batch in plan.batches:
                logps = self.model.train()(batch.to(self.device))
                loss, more = self.objective.loss(logps, batch.weights.to(self.device), plan.normaliser)
                loss.backward()  # type: ignore[no-untyped-call]
                sums = add_sums(sums, more)
            torch.nn.utils.clip_grad_norm_(weights, optim.max_grad_norm or float("inf"))
            optimizer.step()
            rates.step()
            optimizer.zero_grad(set_to_none=True)
            seconds += time.perf_counter() - started
            if every and (share.step + 1) % every == 0:
                train = self.objective.metrics({name: float(value) for name, value in sums.items()})
                log(f"  step {share.step + 1}: train {_short(train)} held out {_short(self.evaluate())}")
        return self.evaluate() | {"training_seconds": seconds}

    def evaluate(self) -> dict[str, float]:
        """Score the held-out pairs with their own images and with exchanged ones."""
        self.model.eval()
        exchanged = replace(self.held_out, exchange_images=True)
        own, other = (
            score(self.model, shares(read, self.encoder, self.planner), self.planner)
            for read in (self.held_out, exchanged)
        )
        return with_pass(own, other, EXCHANGED).metrics


def shares(read: ReadSpec, encoder: PairEncoder, planner: StepPlanner) -> Iterator[StepShare]:
    """Read and encode the steps of a run in this process."""
    rows = (row for table in read_windows(read, read.order.windows(0, read.end_sample)) for row in table.to_pylist())
    for step in range(-(-read.end_sample // read.pairs_per_step)):
        first, end = step_samples(step, read.pairs_per_step, read.end_sample)
        of_step = [next(rows) for _ in range(end - first)]
        encoded = encode_rows(of_step, encoder)
        pairs = [
            replace(item, sample_index=row["sample_index"])
            for row, item in zip(of_step, encoded, strict=True)
            if isinstance(item, EncodedPair)
        ]
        yield planner.share(pairs, [item for item in encoded if isinstance(item, BadRow)], step)


def interval(values: Sequence[float]) -> list[float]:
    """Mean and half the width of its 95 % interval (Student's t)."""
    if len(values) < 2:
        return [values[0], float("nan")]
    return [statistics.fmean(values), _T[len(values) - 1] * statistics.stdev(values) / len(values) ** 0.5]


def summary(results: Mapping[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Means by variant, and the differences from the first variant, seed by seed.

    `held_out_pairs` are those scored with their own images and with exchanged ones; several numbers if runs differ.
    """
    base = next(iter(results))
    out: dict[str, Any] = {}
    for name, runs in results.items():
        out[name] = {key: interval([run[key] for run in runs]) for key in _SHOWN if all(key in run for run in runs)}
        pairs = list(zip(runs, results[base], strict=True))
        out[name]["against"] = {
            key: interval([run[key] - plain[key] for run, plain in pairs])
            for key in ("rewards/accuracies", "grounding_gap")
        }
        out[name]["held_out_pairs"] = {
            title: sorted({int(run[key]) for run in runs if key in run})
            for title, key in (("own images", "pairs"), ("exchanged images", "grounding_pairs"))
        }
        seconds = [sum(run["training_seconds"] for run in each) for each in (runs, results[base])]
        out[name]["seconds_ratio"] = seconds[0] / seconds[1]
    return out


def train_variants(
    recipe: Path, variants: Sequence[Sequence[str]], seeds: int, every: int | None
) -> dict[str, list[dict[str, float]]]:
    """Train all variants with all seeds, and return the metrics of each run by variant."""
    results: dict[str, list[dict[str, float]]] = {}
    for seed, (name, *overrides) in ((seed, variant) for variant in variants for seed in range(seeds)):
        found = Experiment(seeded(recipe, overrides, seed)).run(every, log)
        scored = f"{found['pairs']:,.0f} held-out pairs"
        log(f"{name}, seed {seed}: {_short(found)} of {scored} in {found['training_seconds']:.0f} s")
        results.setdefault(name, []).append(found)
    return results


def seeded(recipe: Path, overrides: Sequence[str], seed: int) -> Recipe:
    """Return the recipe of a variant with a seed, which takes the place of those that the recipe has."""
    raw = read_mapping(recipe)
    apply_overrides(raw, [*overrides, f"data.shuffle_seed={seed}", f"optim.seed={seed}"])
    return parse_recipe(raw)


def joined(reports: Sequence[Mapping[str, Any]]) -> tuple[dict[str, list[dict[str, float]]], list[Any]]:
    """Join the runs of reports, those of one variant in the order of the reports; and where each was measured."""
    results: dict[str, list[dict[str, float]]] = {}
    for report in reports:
        for name, runs in report["runs"].items():
            results.setdefault(name, []).extend(runs)
    return results, [source for report in reports for source in report["measured"]]


def log(text: str) -> None:
    """Print to stderr at once."""
    print(text, file=sys.stderr, flush=True)


def _short(metrics: Mapping[str, float]) -> str:
    return " ".join(f"{name.removeprefix('rewards/')} {metrics[name]:.4f}" for name in _SHOWN if name in metrics)


def main() -> None:
    """Train, or join reports; then print and plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, nargs="?")
    parser.add_argument("--variant", nargs="+", action="append", metavar=("NAME", "FIELD=VALUE"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--every", type=int, help="steps between scores on stderr")
    parser.add_argument("--reports", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, help="write accuracy and gap of the variants as an SVG file")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if (options.recipe is None) == (options.reports is None):
        parser.error("give a recipe or --reports")

    if options.reports:
        results, sources = joined([json.loads(path.read_text()) for path in options.reports])
    else:
        sources = [provenance()]
        results = train_variants(options.recipe, options.variant or [["recipe"]], options.seeds, options.every)
    report = {"summary": summary(results), "runs": results, "measured": sources}
    print(json.dumps(report, indent=None if options.json else 2))
    if options.plot:
        shown = {"held-out accuracy": "rewards/accuracies", "grounding gap": "grounding_gap"}
        values = {
            title: {name: [run[key] for run in runs] for name, runs in results.items()} for title, key in shown.items()
        }
        dot_plot(
            {title: {name: (each, interval(each)) for name, each in found.items()} for title, found in values.items()},
            options.plot,
        )


if __name__ == "__main__":
    main()
