"""Print a plan as tables: memory by ZeRO stage, and for each GPU type whether it fits, time and cost."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from orpo_ray.planning.fit import MAX_FILL
from orpo_ray.planning.gpus import GIB

# Parts of a step's time, by their short names in the table.
_PARTS = {
    "matmul": "matmul",
    "attention": "attn",
    "memory": "other",
    "dequantization": "4-bit",
    "launch": "launch",
    "optimizer": "update",
    "communication": "network",
    "imbalance": "wait",
}
_ROWS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer states",
    "buffers": "ZeRO buffers",
    "activations": "activations",
    "head": "logits, temporary",
    "overhead": "CUDA, fragmentation",
    "total": "total",
}


def print_plan(report: dict[str, Any], console: Console) -> None:
    """Print all tables, then the cheapest setting and the assumptions."""
    model, step, setting = report["model"], report["step"], report["setting"]
    pair = step["pair"]
    trained = f"{_count(model['trained'])} trained ({model['trained'] / model['parameters']:.2%})"
    console.print(
        f"[bold]{model['id']}[/bold]  {_count(model['parameters'])} parameters, {trained}, {model['dtype']}",
        highlight=False,
        soft_wrap=True,
    )
    console.print(
        f"pair  {pair['tokens']:,} tokens: image {pair['image']:,}, text {pair['prompt']:,}, "
        f"chosen {pair['chosen']:,}, rejected {pair['rejected']:,} (from {step['source']})",
        highlight=False,
        soft_wrap=True,
    )
    groups = f" in groups of {step['workers_per_microbatch']}" if step["workers_per_microbatch"] > 1 else ""
    console.print(
        f"step  {step['pairs']:,} pairs, {step['tokens']:,} tokens: {_counted(setting['workers'], 'worker')}{groups} x "
        f"{_counted(step['microbatches_per_worker'], 'micro-batch', 'es')} of "
        f"{_counted(step['pairs_per_microbatch'], 'pair')}\n"
        f"run   {step['steps']:,} steps, {step['training_pairs']:,} training pairs",
        highlight=False,
        soft_wrap=True,
    )
    console.print(_memory_table(report))
    for table in _gpu_tables(report):
        console.print(table)
    best = report["cheapest"]
    if best is None:
        console.print("[red]nothing fits[/red]: train adapters (model.lora), on a 4-bit base (model.quantization)")
    else:
        console.print(f"\n[bold green]cheapest[/bold green]  {_describe_cheapest(best)}", highlight=False)
        console.print(f"overrides  {_overrides(best)}", highlight=False, soft_wrap=True)
    if (cached := report["vision_cache"]) is not None:
        console.print(_vision_cache(cached), highlight=False, soft_wrap=True)
    _print_rates(report["rates"], console)
    console.print("\nassumptions", highlight=False)
    for line in report["assumptions"]:
        console.print(f"  - {line}", highlight=False, soft_wrap=True, style="dim", markup=False)


def _memory_table(report: dict[str, Any]) -> Table:
    setting = report["setting"]
    how = f"gradient checkpointing {setting['checkpointing']}"
    title = f"\nmemory per GPU in GiB: {_counted(setting['workers'], 'GPU')}, {how}"
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2))
    table.add_column()
    for stage in report["memory"]:
        is_recipe = int(stage) == setting["stage"]
        table.add_column(
            f"ZeRO {stage}" + (" (recipe)" if is_recipe else ""), justify="right", style="bold" if is_recipe else None
        )
    for name, label in _ROWS.items():
        style = "bold" if name == "total" else None
        table.add_row(label, *(f"{memory[name] / GIB:,.1f}" for memory in report["memory"].values()), style=style)
    if any(memory["host"] for memory in report["memory"].values()):
        table.add_row("in main memory", *(f"{memory['host'] / GIB:,.1f}" for memory in report["memory"].values()))
    return table


def _print_rates(rates: dict[str, Any], console: Console) -> None:
    """Print what the estimate of time assumes."""
    console.print("\nspeed is assumed (change with --assume NAME=VALUE; docs/plan.md explains each)", highlight=False)
    given = [f"{name}={value:g}" for name, value in rates.items() if isinstance(value, int | float)]
    matmul = ", ".join(f"{gpu} {value:g}" for gpu, value in rates["matmul"].items())
    for line in (" ".join(given), f"matmul, by GPU type: {matmul}"):
        console.print(f"  {line}", highlight=False, soft_wrap=True, style="dim", markup=False)


def _step_table(report: dict[str, Any]) -> Table:
    """Where the time of a step goes, for each GPU type."""
    table = Table(title="\ntime of a step, in % of its seconds", title_justify="left", box=None, padding=(0, 1))
    for name in ("GPU", "step", *_PARTS.values()):
        table.add_column(name, justify="left" if name == "GPU" else "right", no_wrap=True)
    for each in report["gpus"]:
        parts = each["step_seconds"]
        total = sum(parts.values())
        shares = (f"{parts[name] / total:.0%}" if parts[name] else "-" for name in _PARTS)
        table.add_row(each["gpu"], f"{total:.3g} s", *shares)
    return table


def _gpu_tables(report: dict[str, Any]) -> tuple[Table, Table, Table]:
    """Tables of the recipe, of its step, and of the cheapest setting, for each GPU type. None exceeds 80 columns."""
    recipe = Table(title="\nthis recipe by GPU type", title_justify="left", box=None, padding=(0, 2))
    columns = {"GPU": True, "GiB": False, "$/h": False, "fits": True, "MFU": False, "time": False, "cost": False}
    for name, left in columns.items():
        recipe.add_column(name, justify="left" if left else "right", no_wrap=True)
    cheapest = Table(
        title=f"\ncheapest setting that fills at most {MAX_FILL:.0%} of the memory",
        title_justify="left",
        box=None,
        padding=(0, 2),
    )
    for name in ("GPU", "GPUs", "ZeRO", "checkpointing", "tokens", "time", "cost"):
        cheapest.add_column(name, justify="left" if name == "GPU" else "right", no_wrap=True)
    needed = report["memory"][str(report["setting"]["stage"])]["total"] / GIB
    for each in report["gpus"]:
        in_recipe, found = each["recipe"], each["cheapest"]
        fill = (in_recipe["memory"] / GIB if in_recipe else needed) / each["memory_gib"]
        fits = f"{'[green]yes[/green]' if fill <= MAX_FILL else '[yellow]barely[/yellow]'}, {fill:.0%} full"
        facts = (each["gpu"], f"{each['memory_gib']:g}", f"{each['price_per_hour']:.2f}")
        if not in_recipe:
            fits = f"[red]no[/red], needs {needed:,.0f} GiB"
        recipe.add_row(*facts, fits, f"{each['mfu']:.0%}", *_time_and_cost(in_recipe))
        style = "bold green" if found is not None and found == report["cheapest"] else None
        cheapest.add_row(each["gpu"], *_setting(found), *_time_and_cost(found), style=style)
    return recipe, _step_table(report), cheapest


def _time_and_cost(found: dict[str, Any] | None) -> tuple[str, str]:
    return (_hours(found["hours"]), _money(found["cost"])) if found else ("-", "-")


def _describe_cheapest(found: dict[str, Any]) -> str:
    return f"{found['workers']} x {found['gpu']}: {_hours(found['hours'])}, {_money(found['cost'])}"


def _setting(found: dict[str, Any] | None) -> tuple[str, ...]:
    """Cells of a setting: GPUs, ZeRO stage, checkpointing, tokens per micro-batch."""
    if found is None:
        return ("[red]none[/red]", "-", "-", "-")
    return (str(found["workers"]), str(found["stage"]), found["checkpointing"], f"{found['budget']:,}")


def _overrides(found: dict[str, Any]) -> str:
    return (
        f"scaling.num_workers={found['workers']} deepspeed.zero_stage={found['stage']} "
        f"model.gradient_checkpointing={found['checkpointing']} optim.tokens_per_microbatch={found['budget']}"
    )


def _vision_cache(found: dict[str, Any]) -> str:
    """Say whether reading features is worth it, by GPU type."""
    times = ", ".join(f"{name} {1000 * seconds:.3g}" for name, seconds in found["compute_seconds"].items())
    line = (
        f"\n[bold]model.vision_cache[/bold]  a pair has {found['bytes_per_pair'] / 1e6:,.1f} MB of features, read in "
        f"{1000 * found['read_seconds']:.3g} ms; computed in, by GPU type, ms: {times}"
    )
    if slower := found["slower_on"]:
        line += f"\n[yellow]slower with the cache[/yellow] on {', '.join(slower)}: remove it there"
    return line


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
    if dollars < 0.01:
        return "< $0.01"
    return f"${dollars:,.2f}" if dollars < 100 else f"${dollars:,.0f}"


def _counted(count: int, noun: str, plural: str = "s") -> str:
    return f"{count:,} {noun}{plural if count != 1 else ''}"
