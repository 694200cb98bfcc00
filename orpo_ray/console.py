"""Output of the commands. Everything goes to stderr, except results for programs (`--json`), which go to stdout."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:  # `orpo-ray --help` must not import these
    from orpo_ray.config.shipped_recipes import ShippedRecipe
    from orpo_ray.data_report.prepare import Prepared
    from orpo_ray.doctor.finding import Finding
    from orpo_ray.exporting.export import Exported
    from orpo_ray.sweep.outcome import Sweep
    from orpo_ray.synthesis.outcome import Synthesized
    from orpo_ray.synthesis.rounds import Rounds
    from orpo_ray.training.launch import RunSummary

console = Console(stderr=True)
# How a recipe reads a set that was written in one format, and without pairs that it would hold out.
_SPLIT_ALREADY = {
    "data.format": "auto", "data.columns": "{}", "data.eval_fraction": "0", "data.pairs_from_ranking": "best_worst"
}  # fmt: skip

GROUPS_SHOWN = 12  # languages, or domains, of a split
_TRAIN_FIGURES = ("train/loss", "train/rewards/accuracies", "train/rewards/margins")
_EVAL_FIGURES = (
    "eval/rewards/accuracies",
    "eval/rewards/accuracies_exchanged",
    "eval/grounding_gap",
    "eval/rewards/margins",
    "eval/nll_loss",
)


def stdout_to_stderr() -> contextlib.redirect_stdout[Any]:
    """Send what libraries print to stderr, so that stdout holds nothing but the result."""
    return contextlib.redirect_stdout(sys.stderr)


def print_line(text: str) -> None:
    """Print a line unchanged: without colored numbers, and without line breaks in paths."""
    console.print(text, highlight=False, soft_wrap=True, markup=False)


def print_error(title: str, error: Exception) -> None:
    """Print an error, its title in red."""
    console.print(f"[red]{title}:[/red] {escape(str(error))}", highlight=False, soft_wrap=True)


def print_left_out(problem: str) -> None:
    """Print a warning about a damaged file that a report leaves out."""
    text = f"[yellow]warning:[/yellow] left out of the report: {escape(problem)}"
    console.print(text, highlight=False, soft_wrap=True)


def print_trained(summary: RunSummary, page: str) -> None:
    """Print what a run reached, where it is, and what to do next.

    Args:
        summary: of the run.
        page: where its report is, or why there is none.
    """
    if summary.was_finished:
        print_line("This run is finished already. To train again, choose another name (name=...) or delete its folder.")
    _print_figures(summary.metrics, "training, last step", _TRAIN_FIGURES)
    _print_figures(summary.metrics, "held-out pairs", _EVAL_FIGURES)
    for line in _troubles(summary.metrics):
        print_line(line)
    print_line(f"run folder  {summary.run_uri}")
    print_line(f"model       {summary.run_uri}/final")
    print_line(f"report      {page}")
    print_line("next")
    for command, purpose in _next_steps(summary):
        print_line(f"  {shlex.join(command)}   {purpose}")


def _next_steps(summary: RunSummary) -> list[tuple[list[str], str]]:
    """Say what a user can do with a finished run."""
    if any(name.startswith("eval/") for name in summary.metrics):
        first = (["orpo-ray", "evaluate", summary.run_uri], "intervals, groups of pairs; --base MODEL compares")
    else:
        first = (["orpo-ray", "evaluate", summary.run_uri, "data.eval=FILE"], "score it on held-out pairs")
    return [first, (["orpo-ray", "export", summary.run_uri], "one folder for transformers and vLLM")]


def print_recipes(recipes: Sequence[ShippedRecipe]) -> None:
    """Print the recipes that come with the package."""
    table = Table(box=None, padding=(0, 2))
    for column in ("recipe", "hardware", "memory"):
        table.add_column(column, no_wrap=column != "hardware")
    for recipe in recipes:
        table.add_row(recipe.name, escape(recipe.hardware), escape(recipe.memory))
    console.print(table)
    print_line("write one with  orpo-ray init NAME")


def print_next_to_recipe(path: str) -> None:
    """Print where a recipe was written, and what to do with it."""
    print_line(f"recipe  {path}")
    for command, purpose in (("data check", "check its data"), ("plan", "predict memory and time"), ("train", "train")):
        print_line(f"next    {shlex.join(['orpo-ray', *command.split(), path])}   {purpose}")


def print_sweep(sweep: Sweep, fields: Sequence[str], metric_name: str) -> None:
    """Print the trials of a sweep, best first, and where the best recipe is.

    Args:
        sweep: the result of the search.
        fields: the recipe fields that were searched.
        metric_name: the metric that ranks the trials.
    """
    title = f"{len(sweep.trials)} trials by {metric_name}"
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1))
    for column in ("trial", *fields, metric_name, "steps", "status"):
        justify: Any = "left" if column in ("trial", "status") else "right"
        table.add_column(_header(column), justify=justify)
    for trial in sweep.trials:
        figures = [escape(value) for value in trial.params.values()]
        metric = "-" if trial.metric is None else f"{trial.metric:.4f}"
        style = "green" if trial.name == sweep.best else None
        table.add_row(trial.name, *figures, metric, str(trial.steps), escape(trial.status), style=style)
    console.print(table)
    if sweep.ended_by:
        higher = " with a higher value" if "tune.max_" in sweep.ended_by else ""
        text = f"the search ended before its trials did: {sweep.ended_by}; the same command{higher} goes on"
        console.print(f"[yellow]warning:[/yellow] {escape(text)}", highlight=False, soft_wrap=True)
    if sweep.front:
        print_line(f"not beaten in both metrics: {', '.join(sweep.front)}")
    if sweep.doubt:
        console.print(f"[yellow]warning:[/yellow] {escape(sweep.doubt)}", highlight=False, soft_wrap=True)
    print_line(f"page         {sweep.page}")
    print_line(f"best recipe  {sweep.best_recipe}")
    print_line(f"train it     {shlex.join(['orpo-ray', 'train', sweep.best_recipe])}")


def _header(column: str) -> str:
    """Name a column of a sweep; on several lines, so that a long name is not cut."""
    return column.split(".")[-1].removeprefix("eval/").replace("_", "_\n").replace("/", "/\n")


def print_exported(exported: Exported) -> None:
    """Print what was written, where it is, and how to load it."""
    for line in exported.summary():
        print_line(line)


def print_prepared(written: Mapping[str, Prepared], recipe: str, overrides: Sequence[str]) -> None:
    """Print what was written for each split, and the command that trains from it."""
    for name, split in written.items():
        shards = f"{split.rows:,} pairs in {len(split.shards)} shard(s), {len(split.bad):,} bad row(s) left out"
        print_line(f"{name:5}  {shards}")
    # The written data has one format with its own columns, is split already, and holds its images.
    own = {f"data.{name}": split.uri for name, split in written.items()} | {"data.image_root": "null"} | _SPLIT_ALREADY
    print_line(f"next   {_train_command(recipe, overrides, own)}")


def print_synthesized(made: Synthesized, recipe: str, overrides: Sequence[str]) -> None:
    """Print what became of the rows, and the command that trains from the pairs."""
    if made.was_finished:
        print_line(
            "This set is complete already. For another one, choose another name (name=...) or delete its folder."
        )
    reasons = "".join(f", {count:,} {reason}" for reason, count in made.thrown_away.items())
    print_line(f"rows        {made.rows:,}, of which {len(made.bad):,} bad")
    print_line(f"pairs       {made.pairs:,}, mean margin {made.mean_margin:.4g}")
    print_line(f"thrown away {made.thrown_away_fraction:.1%}{reasons}")
    print_line(f"candidates  {made.candidates:,}, and {made.left_out:,} empty, repeated or cut off")
    own = {"data.train": made.uri}
    if made.eval_uri is not None:
        own |= {"data.eval": made.eval_uri, "data.image_root": "null"}
    print_line(f"next        {_train_command(recipe, overrides, own | _SPLIT_ALREADY)}")


def print_rounds(found: Rounds) -> None:
    """Print a table of the rounds of `orpo-ray iterate`."""
    title = "held-out pairs; change: against the start"
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1))
    for name in ("round", "pairs", "thrown", "accuracy", "95 %", "change", "p", "gap"):
        table.add_column(name, justify="left" if name == "round" else "right")
    start = found.start
    table.add_row("start", "", "", f"{start.value:.4f}", f"{start.low:.4f} to {start.high:.4f}")
    for each in found.rounds:
        own, gap, compared = each.accuracy, each.grounding_gap, each.against_start
        table.add_row(
            str(each.number),
            f"{each.made.pairs:,}",
            f"{each.made.thrown_away_fraction:.1%}",
            f"{own.value:.4f}",
            f"{own.low:.4f} to {own.high:.4f}",
            "-" if compared is None else f"{compared.accuracy.value:+.4f}",
            "-" if compared is None else f"{compared.p_accuracy:.2g}",
            "-" if gap is None else f"{gap.value:.4f}",
        )
    console.print(table)
    print_line(f"rounds  {found.uri}")


def _train_command(recipe: str, overrides: Sequence[str], own: Mapping[str, str]) -> str:
    """Return the command that trains a recipe with other data."""
    kept = [each for each in overrides if each.partition("=")[0] not in own and not each.startswith("data.columns.")]
    return shlex.join(["orpo-ray", "train", recipe, *kept, *(f"{name}={value}" for name, value in own.items())])


def print_findings(findings: Sequence[Finding]) -> None:
    """Print a line for each finding: what was checked, what was found, and the fix."""
    width = max((len(finding.check) for finding in findings), default=0)
    styles = {"ok": "[green]ok[/green]     ", "warning": "[yellow]warning[/yellow]", "fix": "[red]fix[/red]    "}
    for each in findings:
        fix = f"; fix: {each.fix}" if each.fix else ""
        line = f"{styles[each.status]}  {each.check:{width}}  {escape(each.value + fix)}"
        console.print(line, highlight=False, soft_wrap=True)


def print_check(report: Mapping[str, Any]) -> None:
    """Print a report of `data check` as one table with a column for each split."""
    table = Table(title="data check", title_justify="left", box=None, padding=(0, 2))
    splits = [name for name in ("train", "eval") if report[name]]
    table.add_column()
    for name in splits:
        table.add_column(name, justify="right")

    def row(label: str, value: Callable[[dict[str, Any]], str]) -> None:
        table.add_row(escape(label), *(escape(value(report[name])) for name in splits))

    row("rows", lambda split: f"{split['rows']:,}")
    row("usable pairs", lambda split: f"{split['pairs']:,}")
    row("format", lambda split: ", ".join(split["formats"]))
    reasons = {reason: None for name in splits for reason in report[name]["bad"]["by_reason"]}
    for reason in reasons:
        row(f"bad: {reason}", lambda split, reason=reason: f"{split['bad']['by_reason'].get(reason, 0):,}")  # type: ignore[misc]
    row(f"longer than {report['max_length']:,} tokens", lambda split: f"{split['too_long']['count']:,}")
    for name in ("prompt", "image", "chosen", "rejected"):
        row(f"{name} tokens, p50 / p95 / max", lambda split, name=name: _spread(split["tokens"], name))  # type: ignore[misc]
    row("duplicate pairs", lambda split: f"{split['duplicates']['pairs']:,}")
    row("chosen longer / shorter", lambda split: _sides(split["length_bias"]))
    row("text-only accuracy", lambda split: _percentage(split["text_only"], "accuracy"))
    console.print(table)
    for kind, groups in ((report["language"], "languages"), (report["domain"], "domains")):
        if kind is not None:
            _print_groups(kind, {name: report[name][groups] for name in splits})
    for name in splits:
        for text in report[name]["warnings"]:
            console.print(f"[yellow]warning:[/yellow] {name}: {escape(text)}", highlight=False, soft_wrap=True)
    if report["images_on_both_sides"]:
        shared = f"{report['images_on_both_sides']:,} image(s) are in both the training and the held-out pairs"
        console.print(f"[yellow]warning:[/yellow] {shared}", highlight=False, soft_wrap=True)


def _print_groups(title: str, splits: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Print the figures of each language, or each domain, of the splits."""
    table = Table(title=f"by {escape(title)}", title_justify="left", box=None, padding=(0, 2))
    for column in ("", "", "rows", "tokens per character", "too long"):
        table.add_column(column, justify="right" if column else "left")
    for name, groups in splits.items():
        for group in groups[:GROUPS_SHOWN]:
            density = group["tokens_per_character"]
            figures = (f"{group['rows']:,}", "-" if density is None else f"{density:.2f}", f"{group['fraction']:.0%}")
            table.add_row(escape(group["name"]), name, *figures)
    if table.row_count:
        console.print(table)


def _print_figures(metrics: Mapping[str, float], title: str, names: Sequence[str]) -> None:
    present = [name for name in names if name in metrics]
    if not present:
        return
    table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2))
    table.add_column()
    table.add_column(justify="right")
    for name in present:
        table.add_row(name, f"{metrics[name]:.4f}")
    console.print(table)


def _troubles(metrics: Mapping[str, float]) -> list[str]:
    """Say what a run went through; nothing of one without restarts, skipped updates and slow workers."""
    restarts, repeated, skipped, slow_steps = (
        int(metrics.get(f"train/{name}", 0))
        for name in ("restarts", "repeated_steps", "skipped_updates", "slow_worker_steps")
    )
    return [
        *([f"restarts    {restarts:,}, {repeated:,} step(s) repeated"] if restarts else []),
        *([f"skipped     {skipped:,} update(s) whose gradient was not finite"] if skipped else []),
        *([f"slow        worker {metrics['train/slow_worker']:.0f}, in {slow_steps:,} step(s)"] if slow_steps else []),
    ]


def _spread(tokens: Mapping[str, Any] | None, name: str) -> str:
    return " / ".join(f"{tokens[name][point]:,.0f}" for point in ("p50", "p95", "max")) if tokens else "-"


def _sides(bias: Mapping[str, float] | None) -> str:
    if not bias:
        return "-"
    return f"{bias['chosen_longer']:.0%} / {max(0.0, 1 - bias['chosen_longer'] - bias['equal']):.0%}"


def _percentage(figures: Mapping[str, float] | None, name: str) -> str:
    return f"{figures[name]:.0%}" if figures else "-"
