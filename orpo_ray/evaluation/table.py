"""Print the result of `orpo-ray evaluate`: the verdicts first, then averages with intervals, then groups of pairs."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from orpo_ray.evaluation.evaluate_run import Evaluation
from orpo_ray.evaluation.statistics import Estimate
from orpo_ray.evaluation.summary import Group, Summary

_COLORS = {"good": "green", "warning": "yellow", "problem": "red", "none": "default"}
# Shown in this order; the others follow in alphabetical order. `--json` has all.
_FIRST = (
    "rewards/accuracies", "rewards/accuracies_exchanged", "rewards/accuracies_blank", "grounding_gap",
    "grounding_blank_gap", "rewards/margins", "log_odds_chosen", "nll_loss",
)  # fmt: skip


def print_evaluation(evaluation: Evaluation, console: Console) -> None:
    """Print verdicts and tables."""
    if evaluation.summary is not None:
        _print_summary(evaluation.summary, int(evaluation.metrics["eval/pairs"]), console)
    _print_benchmarks(evaluation, console)
    _print_answers(evaluation, console)
    if (judged := evaluation.judged) is not None:
        wins, losses, ties = (judged.verdicts.count(name) for name in ("win", "loss", "tie"))
        console.print(
            f"judged against {judged.against}: {wins:,} wins, {losses:,} losses, {ties:,} ties, of which "
            f"{judged.swapped:,} by position; win rate {' ('.join(_cells(judged.win_rate))})",
            highlight=False, markup=False,
        )  # fmt: skip


def _print_summary(summary: Summary, pairs: int, console: Console) -> None:
    for verdict in summary.verdicts:
        console.print(escape(verdict.text), style=_COLORS[verdict.level], highlight=False)
    columns = ("average", "95 % interval", *(["pairs"] if summary.partial else []))
    table = _table(f"{pairs:,} held-out pairs", columns)
    for name in [*filter(summary.figures.__contains__, _FIRST), *sorted(summary.figures.keys() - set(_FIRST))]:
        count = [f"{summary.figures[name].pairs:,}"] if name in summary.partial else []
        table.add_row(f"eval/{name}", *_cells(summary.figures[name]), *count)
    console.print(table)
    if (found := summary.comparison) is not None:
        table = _table(f"against {escape(str(summary.base))}", ("difference", "95 % interval", "p"))
        table.add_row("accuracy", *_cells(found.accuracy), f"{found.p_accuracy:.2g}")
        table.add_row("margin", *_cells(found.margin), f"{found.p_margin:.2g}")
        console.print(table)
        console.print(f"  {found.better:,} pairs are right only here, {found.worse:,} only there", highlight=False)
    for title, groups in summary.breakdowns.items():
        if len(groups) > 1:
            console.print(_breakdown(title, groups))


def _print_benchmarks(evaluation: Evaluation, console: Console) -> None:
    base = {each.name: each for each in evaluation.base_benchmarks}
    for own in evaluation.benchmarks:
        other = base.get(own.name)
        questions = own.figures["accuracy"].pairs
        title = f"{questions:,} questions of {escape(own.name)}" + (
            f", {own.bad:,} could not be asked" if own.bad else ""
        )
        columns = ("average", "95 % interval", *(["base", "95 % interval"] if other else []))
        table = _table(title, columns)
        for name, estimate in own.figures.items():
            label = "share of yes" if name == "yes" else name
            table.add_row(label, *_cells(estimate), *(_cells(other.figures[name]) if other else ()))
        for kind, estimate in own.kinds.items():
            table.add_row(f"  {escape(kind)}", *_cells(estimate), *(_cells(other.kinds[kind]) if other else ()))
        console.print(table)


def _print_answers(evaluation: Evaluation, console: Console) -> None:
    base = {each.sample_index: each for each in evaluation.base_answers}
    for own in evaluation.answers:
        table = Table(title=escape(f"{own.id}: {own.prompt}"), title_justify="left", box=None, padding=(0, 2))
        rows = [("chosen", own.chosen), ("rejected", own.rejected)]
        if (before := base.get(own.sample_index)) is not None:
            rows += [("base, greedy", before.greedy), ("base, sampled", before.sampled)]
        for name, text in (*rows, ("greedy", own.greedy), ("sampled", own.sampled)):
            table.add_row(name, escape(text) or "(nothing)")
        console.print(table)


def _breakdown(title: str, groups: list[Group]) -> Table:
    has_gap = any(group.gap for group in groups)
    table = _table(
        f"by {escape(title)}", ("pairs", "accuracy", "95 % interval", *(["grounding gap"] if has_gap else []))
    )
    for group in groups:
        gap = [f"{group.gap.value:.3f}" if group.gap else "-"] if has_gap else []
        table.add_row(escape(group.name), f"{group.accuracy.pairs:,}", *_cells(group.accuracy), *gap)
    return table


def _cells(estimate: Estimate) -> tuple[str, str]:
    return f"{estimate.value:.4f}", f"{estimate.low:.4f} to {estimate.high:.4f}"


def _table(title: str, columns: tuple[str, ...]) -> Table:
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2))
    table.add_column()
    for column in columns:
        table.add_column(column, justify="right")
    return table
