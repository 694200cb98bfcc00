"""Render `sweep.html`: what a search found, for whoever was not there. One file, without a network."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from orpo_ray import __version__
from orpo_ray.pages.curves import short
from orpo_ray.pages.environment import page_template
from orpo_ray.sweep.charts import curves_of, front_of, kinds_of, map_of, parallel_of
from orpo_ray.sweep.importance import LEAST_TRIALS, Importance, importances
from orpo_ray.sweep.live import duration
from orpo_ray.sweep.record import Record, Trial
from orpo_ray.sweep.space import Space, short_keys

TEMPLATE = Path(__file__).with_name("sweep_page.html")
SCHEDULERS = {
    "asha": "Weak trials were stopped early (ASHA)",
    "median": "Trials below the median were stopped early",
    "pbt": "The worst trials went on from checkpoints of the best (population-based training)",
    "none": "No trial was stopped early",
}
SEARCHERS = {"random": "at random", "grid": "from a grid", "tpe": "near those of good trials (Optuna's TPE)"}
LEVELS = {"finished": "good", "failed": "problem", "stopped early": "none", "replaced": "none"}


@dataclass(frozen=True)
class Figure:
    """A key figure."""

    title: str
    value: str
    unit: str
    text: str
    level: str = "none"


@dataclass(frozen=True)
class Line:
    """A trial in the table."""

    name: str
    kind: str
    values: list[str]
    metric: str
    second: str
    step: str
    state: str
    level: str
    time: str
    cost: str
    note: str


def render_sweep(record: Record, space: Space, doubt: str | None = None, ended_by: str = "") -> str:
    """Render the page. At least one trial has a value of the metric.

    Args:
        record: of the sweep.
        space: of the search.
        doubt: why the best trial may not be the best.
        ended_by: why the search ended before its trials did.
    """
    kinds = kinds_of(record)
    ranked = record.ranked()
    found, compared, step = importances(record, space)
    tune = record.tune
    return page_template(TEMPLATE).render(
        title=record.recipe.name,
        facts=_facts(record),
        headline=_headline(ranked[0], record, space),
        warnings=_warnings(record, doubt, ended_by),
        cards=_cards(record),
        metric=tune.metric,
        second=tune.second_metric,
        is_best_high=tune.direction == "max",
        keys=list(zip(short_keys(space.keys), space.keys, strict=True)),
        lines=[_line(trial, record, space, kinds[trial.number]) for trial in ranked],
        has_cost=bool(record.price_per_hour),
        parallel=parallel_of(record, space, kinds),
        curves=curves_of(record, kinds),
        places=map_of(record, space, kinds),
        front=front_of(record, space, kinds),
        importance=found,
        conclusion=_conclusion(found),
        compared=compared,
        least_trials=LEAST_TRIALS,
        step=step,
        how=f"Values were chosen {SEARCHERS[tune.searcher]}. {SCHEDULERS[tune.scheduler]}.",
        best_command=f"orpo-ray train {record.recipe.run_uri}/best_recipe.yaml",
        recipe=record.recipe.to_yaml(),
        version=__version__,
        short=short,
    )


def _facts(record: Record) -> list[tuple[str, str]]:
    recipe = record.recipe
    return [
        ("Model", recipe.model.id),
        ("Objective", recipe.objective.title),
        ("Steps of a trial", f"{record.num_steps:,} of {recipe.optim.pairs_per_step} {recipe.samples}"),
        ("Ranked by", f"{record.tune.metric}, {'highest' if record.tune.direction == 'max' else 'lowest'} first"),
    ]


def _headline(best: Trial, record: Record, space: Space) -> str:
    fields = zip(short_keys(space.keys), space.labels(best.params), strict=True)
    values = [f"{name.replace('_', ' ')} {text}" for name, text in fields]
    shown = " and ".join([", ".join(values[:-1]), values[-1]] if len(values) > 1 else values)
    return f"Best: {shown}"


def _warnings(record: Record, doubt: str | None, ended_by: str) -> list[tuple[str, str]]:
    found = []
    if ended_by:
        found.append(("warning", f"The search ended before its trials did: {ended_by}. The same command goes on."))
    if doubt:
        found.append(("warning", f"{doubt}."))
    failed = [trial for trial in record.trials if trial.state == "failed"]
    if failed:
        found.append(("problem", f"{len(failed)} of {len(record.trials)} trials failed; the table says why."))
    return found


def _cards(record: Record) -> list[Figure]:
    best, tune = record.ranked()[0], record.tune
    states = Counter(trial.state for trial in record.trials)
    value = best.value(tune.metric)
    assert value is not None
    counts = ", ".join(f"{count} {state}" for state, count in states.most_common())
    trained = sum(trial.seconds for trial in record.trials)
    cards = [
        Figure("Best", f"{value:.4f}", tune.metric.removeprefix("eval/"), f"Trial {best.name}, at step {best.step:,}."),
        Figure("Trials", f"{len(record.trials):,}", "", f"{counts.capitalize()}.",
               "problem" if states["failed"] else "good"),
        Figure("Time", duration(record.seconds), "", f"{duration(trained)} of training in all trials together."),
    ]  # fmt: skip
    if record.price_per_hour:
        text = f"{record.hours:,.1f} GPU hours at ${record.price_per_hour:,.2f}."
        cards.append(Figure("Cost", f"${record.cost:,.2f}", "", text))
    else:
        made = sum(trial.step - trial.parent_step for trial in record.trials)
        whole = record.num_steps * sum(trial.parent is None for trial in record.trials)
        text = f"of {whole:,} that all trials would have made to their ends."
        cards.append(Figure("Steps", f"{made:,}", "", text))
    return cards


def _line(trial: Trial, record: Record, space: Space, kind: str) -> Line:
    second = None if record.tune.second_metric is None else trial.value(record.tune.second_metric)
    value = trial.value(record.tune.metric)
    note = trial.error
    if trial.parent is not None:
        note = f"from {trial.parent:04d} at step {trial.parent_step:,}" + (f"; {note}" if note else "")
    return Line(
        trial.name,
        kind,
        space.labels(trial.params),
        "\u2013" if value is None else f"{value:.4f}",
        "\u2013" if second is None else f"{second:.4f}",
        f"{trial.step:,}",
        trial.state,
        LEVELS.get(trial.state, "warning"),
        duration(trial.seconds),
        f"${trial.own_seconds / 3600 * record.gpus_per_trial * record.price_per_hour:,.2f}",
        note,
    )


def _conclusion(found: list[Importance]) -> str:
    """Say which fields matter."""
    clear = [each.key for each in found if each.is_clear]
    if not found:
        return ""
    if not clear:
        return "No field can be told from one without effect; more trials can tell."
    names = " and ".join([", ".join(clear[:-1]), clear[-1]] if len(clear) > 1 else clear)
    return f"{names} matter{'s' if len(clear) == 1 else ''} beyond chance."
