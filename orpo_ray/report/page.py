"""Render `report.html`: what a run reached, and how; or several runs side by side. One file, without a network."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from orpo_ray import __version__
from orpo_ray.errors import UserError
from orpo_ray.evaluation.pair_scores import facts_of_table
from orpo_ray.evaluation.statistics import Estimate
from orpo_ray.evaluation.summary import ACCURACIES, ACCURATE, GAP, MARGINS, Summary, Verdict, percent, summarize
from orpo_ray.pages.curves import short
from orpo_ray.pages.environment import page_template
from orpo_ray.report.charts import color, curves_of, margins_of
from orpo_ray.report.generations import compared_generations, shown_generations
from orpo_ray.report.pairs import shown_pairs
from orpo_ray.report.pdf import print_pdf
from orpo_ray.report.run_data import RunData, read_run
from orpo_ray.storage.run_folder import REPORT_FILE, RunFolder

TEMPLATE = Path(__file__).with_name("report_page.html")
START = "the model before training"
BAD_ROWS_SHOWN = 20
POINTS = "points of accuracy"


@dataclass(frozen=True)
class Card:
    """A key figure."""

    title: str
    value: str
    unit: str
    text: str
    level: str = "none"


def write_report(
    uris: Sequence[str],
    output: str | None = None,
    pdf: str | None = None,
    warn: Callable[[str], None] | None = None,
) -> str:
    """Write the report of a run into its folder, or of several runs into `report.html` here.

    Args:
        uris: run folders.
        output: the file to write instead.
        pdf: a file to print the page into as well.
        warn: called with a message for each damaged file, which the page leaves out and names.

    Returns:
        Path or URI of the page.

    Raises:
        UserError: a folder holds no run, or a file cannot be written.
    """
    runs = [read_run(RunFolder(uri.rstrip("/"))) for uri in uris]
    if warn is not None:
        for problem in (problem for run in runs for problem in run.problems):
            warn(str(problem))
    page = render_report(runs)
    folder = runs[0].folder if output is None and len(runs) == 1 else None
    path = Path(output or REPORT_FILE) if folder is None else folder.path / REPORT_FILE
    uri = str(path) if folder is None else f"{folder.uri}/{REPORT_FILE}"
    try:
        path.write_text(page, encoding="utf-8")
        if folder is not None:
            folder.push(REPORT_FILE)
    except OSError as error:
        fix = "make room there, or write it elsewhere: orpo-ray report RUN --output FILE"
        raise UserError(f"cannot write the report: {error}", field=uri, fix=fix) from None
    if pdf is not None:
        print_pdf(path, Path(pdf))
    return uri


def render_report(runs: Sequence[RunData]) -> str:
    """Render the page. Texts of recipes and data need not be trusted."""
    if len({run.name for run in runs}) < len(runs):
        runs = [replace(run, label=run.folder.uri) for run in runs]
    summaries = [_summary(run) for run in runs]
    single, summary = runs[0], summaries[0]
    verdicts = _verdicts(single, summary) if len(runs) == 1 else [_ranking(runs, summaries)]
    pairs, no_pairs = shown_pairs(single) if len(runs) == 1 else ([], None)
    return page_template(TEMPLATE).render(
        title=", ".join(run.name for run in runs),
        runs=[
            {"run": run, "color": color(place), "figures": _figures(run, summaries[place])}
            for place, run in enumerate(runs)
        ],
        single=single if len(runs) == 1 else None,
        facts=_facts(single) if len(runs) == 1 else [],
        verdicts=verdicts,
        headline=_headline(verdicts),
        cards=_cards(single, summary) if len(runs) == 1 else [],
        curves=curves_of(runs),
        margins=margins_of(single) if len(runs) == 1 else None,
        pairs=pairs,
        no_pairs=no_pairs,
        generations=shown_generations(single) if len(runs) == 1 else compared_generations(runs),
        whys=[(why, sum(pair["why"] == why for pair in pairs)) for why in dict.fromkeys(pair["why"] for pair in pairs)],
        breakdowns=summary.breakdowns if summary and len(runs) == 1 else {},
        estimate=_estimate_text,
        bad_rows=single.bad_rows[:BAD_ROWS_SHOWN],
        bad_reasons=single.bad_reasons,
        differences=_differences(runs) if len(runs) > 1 else [],
        environment=single.environment,
        data_files=single.data_files,
        problems=[problem for run in runs for problem in run.problems],
        version=__version__,
        short=short,
    )


def _summary(run: RunData) -> Summary | None:
    if run.pairs is None:
        return None
    return summarize(run.pairs, base=None if run.start_pairs is None else (START, run.start_pairs))


def _verdicts(run: RunData, summary: Summary | None) -> list[Verdict]:
    """Say what the run reached, the most important first."""
    if summary is not None and run.state == "finished":
        return summary.verdicts
    unfinished = {
        "running": Verdict("none", f"The run is at step {run.step:,}"),
        "stopped": Verdict("warning", f"The run stopped after step {run.step:,}", "the same train command resumes it"),
        "not started": Verdict("none", "The run has made no step yet"),
    }
    if run.state in unfinished:
        return [unfinished[run.state], *(summary.verdicts if summary else [])]
    return [Verdict("none", f"The run finished after {run.step:,} steps", "it has no scores of held-out pairs")]


def _headline(verdicts: Sequence[Verdict]) -> str:
    """Join the headlines; a model that is better than another one need not be said to be good."""
    said = [each.headline for each in verdicts]
    return ". ".join(each for place, each in enumerate(said) if each != ACCURATE or place == 0)


def _ranking(runs: Sequence[RunData], summaries: Sequence[Summary | None]) -> Verdict:
    """Name the run with the highest accuracy, if the intervals say so."""
    found = sorted(
        ((each.figures[ACCURACIES], run.name) for run, each in zip(runs, summaries, strict=True) if each is not None),
        key=lambda item: -item[0].value,
    )
    if len(found) < 2:
        return Verdict("none", f"{len(runs)} runs side by side")
    if len({facts_of_table(run.pairs).get("data") for run in runs if run.pairs is not None}) > 1:
        return Verdict("none", f"{len(runs)} runs side by side", "they were scored on different pairs")
    (first, name), (second, _) = found[:2]
    if first.low > second.high:
        return Verdict("good", f"{name} is the most accurate", f"{percent(first.value)} of the held-out pairs")
    return Verdict("none", "No run is clearly the most accurate", f"{name} is ahead within the intervals")


def _cards(run: RunData, summary: Summary | None) -> list[Card]:
    """Make the key figures."""
    cards, latest = [], run.latest
    for title, name, unit in (
        ("Accuracy", ACCURACIES, "of held-out pairs"),
        ("Grounding gap", GAP, POINTS),
        ("Margin", MARGINS, "mean"),
    ):
        estimate = summary.figures.get(name) if summary else None
        average = estimate.value if estimate else latest.get(f"eval/{name}")
        if average is not None:
            value = {MARGINS: f"{average:.3f}", GAP: f"{100 * average:.1f}"}.get(name, percent(average))
            text = f"95 % interval {_interval(estimate, name)}" if estimate else "Without interval: no scores of pairs."
            if summary is not None and estimate is not None and name in summary.partial:
                text += f", over {estimate.pairs:,} pairs"
            cards.append(Card(title, value, unit, text))
    if summary is not None and summary.comparison is not None:
        found = summary.comparison
        text = f"{found.better:,} pairs became right, {found.worse:,} became wrong."
        cards.append(Card("Against the start", f"{100 * found.accuracy.value:+.1f}", POINTS, text))
    speeds = run.series("train/pairs_per_second")[1]
    if speeds:
        middle = sorted(speeds)[len(speeds) // 2]
        wait = sum(run.series("train/data_wait_fraction")[1]) / len(speeds)
        cards.append(Card("Throughput", short(middle), "pairs/s, median", f"{percent(wait)} of a step waits for data."))
    bad = len(run.bad_rows)
    text = "All rows were used." if not bad else "Skipped; the reasons are below."
    cards.append(Card("Bad rows", f"{bad:,}", "rows", text, "warning" if bad else "good"))
    restarts, repeated, skipped = (
        int(latest.get(f"train/{name}", 0)) for name in ("restarts", "repeated_steps", "skipped_updates")
    )
    text = f"{repeated:,} steps repeated, {skipped:,} updates skipped."
    cards.append(Card("Restarts", f"{restarts:,}", "", text, "warning" if restarts or skipped else "good"))
    return cards


def _interval(estimate: Estimate, name: str) -> str:
    if name == MARGINS:
        return f"{estimate.low:.3f} to {estimate.high:.3f}"
    if name == GAP:
        return f"{100 * estimate.low:.1f} to {100 * estimate.high:.1f}"
    return f"{percent(estimate.low)} to {percent(estimate.high)}"


def _estimate_text(estimate: Estimate | None, digits: int = 3) -> str:
    return "\u2013" if estimate is None else f"{estimate.value:.{digits}f}"


def _facts(run: RunData) -> list[tuple[str, str]]:
    recipe = run.recipe
    lora = recipe.model.lora
    tuning = "full fine-tuning" if lora is None else ("QLoRA" if recipe.model.quantization else "LoRA") + f" r={lora.r}"
    return [
        ("Model", recipe.model.id),
        ("Tuning", tuning),
        ("Objective", recipe.objective.title),
        ("Steps", f"{run.step:,} of {recipe.optim.pairs_per_step:,} {recipe.samples}"),
        ("State", run.state),
    ]


def _figures(run: RunData, summary: Summary | None) -> list[str]:
    """Return a row of the table of runs: accuracy, gap, margin, loss, pairs per second, steps, state."""
    latest, figures = run.latest, summary.figures if summary else {}

    def with_interval(name: str) -> str:
        estimate = figures.get(name)
        if estimate is not None:
            return f"{estimate.value:.3f} ({estimate.low:.3f} to {estimate.high:.3f})"
        return f"{latest[f'eval/{name}']:.3f}" if f"eval/{name}" in latest else "\u2013"

    loss = latest.get("eval/loss")  # the table is of held-out pairs
    speed = latest.get("train/pairs_per_second")
    return [
        *(with_interval(name) for name in (ACCURACIES, GAP, MARGINS)),
        "\u2013" if loss is None else short(loss),
        "\u2013" if speed is None else short(speed),
        f"{run.step:,}",
        run.state,
    ]


def _differences(runs: Sequence[RunData]) -> list[tuple[str, list[str]]]:
    """Return the recipe fields in which the runs differ, with each run's value."""
    # A run does not depend on the section `tune`, nor does a trial: what was searched is in its other fields.
    flat = [_flat(run.recipe.model_dump(mode="json", exclude={"tune"})) for run in runs]
    names = sorted(set().union(*flat) - {"name", "checkpoint.storage"})
    rows = [(name, [json.dumps(each.get(name), ensure_ascii=False) for each in flat]) for name in names]
    return [(name, values) for name, values in rows if len(set(values)) > 1]


def _flat(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in section.items():
        if isinstance(value, dict) and value:
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found
