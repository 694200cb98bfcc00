"""A plan as tables: what fits where, at what price, in how long, seen in five seconds."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from orpo_ray.planning.fit import ROOM
from orpo_ray.planning.gpus import GIB

_ROWS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer, masters",
    "buffers": "ZeRO's buffers",
    "activations": "activations",
    "head": "logits, temporaries",
    "overhead": "CUDA, fragmentation",
    "total": "total",
}


def print_plan(report: dict[str, Any], console: Console) -> None:
    """All of it, the answer last."""
    model, step, setting = report["model"], report["step"], report["setting"]
    pair = step["pair"]
    trained = f"{_count(model['trained'])} trained ({model['trained'] / model['parameters']:.2%})"
    console.print(
        f"[bold]{model['id']}[/bold]  {_count(model['parameters'])} parameters, {trained}, {model['dtype']}",
        highlight=False,
        soft_wrap=True,
    )
    console.print(
        f"a pair  {pair['tokens']:,} tokens ({pair['image']:,} image, {pair['prompt']:,} text, {pair['chosen']:,} + "
        f"{pair['rejected']:,} answers), by {step['source']}", highlight=False, soft_wrap=True,
    )  # fmt: skip
    console.print(
        f"a step  {step['pairs']:,} pairs, {step['tokens']:,} tokens; {setting['workers']} worker(s) x "
        f"{step['microbatches_per_worker']} micro-batch(es) of {step['pairs_per_microbatch']} pairs; "
        f"{step['steps']:,} steps",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    console.print(_memory(report))
    for table in _gpus(report):
        console.print(table)
    best = report["cheapest"]
    if best is None:
        console.print("[red]nothing fits[/red]: train adapters (model.lora), on 4 bits (model.quantization)")
    else:
        console.print(f"[bold green]cheapest[/bold green]  {_answer(best)}", highlight=False)
        console.print(f"  {_overrides(best)}", highlight=False, soft_wrap=True)
    console.print("assumed", highlight=False)
    for line in report["assumptions"]:
        console.print(f"  - {line}", highlight=False, soft_wrap=True, style="dim", markup=False)


def _memory(report: dict[str, Any]) -> Table:
    setting = report["setting"]
    how = "gradient checkpointing" if setting["checkpointing"] else "no gradient checkpointing"
    title = f"\nGiB on each of {setting['workers']} GPU(s), {how}"
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2))
    table.add_column()
    for stage in report["memory"]:
        mine = int(stage) == setting["stage"]
        table.add_column(
            f"ZeRO {stage}" + (" (recipe)" if mine else ""), justify="right", style="bold" if mine else None
        )
    for name, label in _ROWS.items():
        style = "bold" if name == "total" else None
        table.add_row(label, *(f"{memory[name] / GIB:,.1f}" for memory in report["memory"].values()), style=style)
    return table


def _gpus(report: dict[str, Any]) -> tuple[Table, Table]:
    """This recipe on each type of GPU, and the cheapest that fits on it. Two tables, for terminals of 80 columns."""
    recipe = Table(title="\nthis recipe", title_justify="left", box=None, padding=(0, 2))
    for name, left in {"GPU": True, "GiB": False, "$/h": False, "fits": True, "time": False, "cost": False}.items():
        recipe.add_column(name, justify="left" if left else "right", no_wrap=True)
    least = Table(
        title="\nthe cheapest that fits each, at most 90% full", title_justify="left", box=None, padding=(0, 2)
    )
    for name in ("GPU", "setting", "time", "cost"):
        least.add_column(name, justify="left" if name in ("GPU", "setting") else "right", no_wrap=True)
    needed = report["memory"][str(report["setting"]["stage"])]["total"] / GIB
    for each in report["gpus"]:
        mine, found = each["recipe"], each["cheapest"]
        share = needed / each["memory_gib"]
        full = f"{'[green]fits[/green]' if share <= ROOM else '[yellow]tight[/yellow]'}, {share:.0%} full"
        facts = (each["gpu"], f"{each['memory_gib']:g}", f"{each['price_per_hour']:.2f}")
        recipe.add_row(*facts, full if mine else f"[red]no[/red], {needed:,.0f} GiB", *_time_and_cost(mine))
        style = "bold green" if found is not None and found == report["cheapest"] else None
        words = _words(found) if found else "[red]nothing[/red]"
        least.add_row(each["gpu"], words, *_time_and_cost(found), style=style)
    return recipe, least


def _time_and_cost(found: dict[str, Any] | None) -> tuple[str, str]:
    return (_hours(found["hours"]), _money(found["cost"])) if found else ("-", "-")


def _answer(found: dict[str, Any]) -> str:
    return f"{found['workers']} x {found['gpu']}: {_hours(found['hours'])}, {_money(found['cost'])}"


def _words(found: dict[str, Any]) -> str:
    parts = [f"{found['workers']} x ZeRO {found['stage']}"]
    if found["checkpointing"]:
        parts.append("checkpointing")
    parts.append(f"{found['budget']:,} tokens")
    return ", ".join(parts)


def _overrides(found: dict[str, Any]) -> str:
    checkpointing = str(found["checkpointing"]).lower()
    return (
        f"scaling.num_workers={found['workers']} deepspeed.zero_stage={found['stage']} "
        f"model.gradient_checkpointing={checkpointing} optim.tokens_per_microbatch={found['budget']}"
    )


def _count(number: int) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M")):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return f"{number:,}"


def _hours(hours: float) -> str:
    if hours < 1:
        return f"{max(1, round(hours * 60))} min"
    return f"{hours:,.1f} h" if hours < 48 else f"{hours / 24:,.1f} d"


def _money(dollars: float) -> str:
    return f"${dollars:,.2f}" if dollars < 100 else f"${dollars:,.0f}"
