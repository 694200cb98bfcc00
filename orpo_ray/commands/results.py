"""The commands about what a run reached: `evaluate`, `report`, `runs`, `chat`. Each imports what it needs."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from orpo_ray.commands.options import AsJson, Overrides
from orpo_ray.console import console, print_left_out, print_line
from orpo_ray.errors import UserError


def add_to(app: typer.Typer) -> None:
    """Add these commands to the command line."""
    app.command()(evaluate)
    app.command()(report)
    app.command("runs")(list_of_runs)
    app.command()(chat)


def evaluate(
    run_or_model: Annotated[
        str,
        typer.Argument(metavar="RUN_OR_MODEL", help="Folder of a run, a model or peft adapters.", show_default=False),
    ],
    overrides: Overrides = None,
    base: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL_OR_RUN",
            help="Compare with this run, model folder or hub model on the same pairs.",
            show_default=False,
        ),
    ] = None,
    by: Annotated[
        list[str] | None,
        typer.Option(metavar="COLUMN", help="Also show groups of pairs by this column, or by `script` (Latin, Han, "
                     "...); repeat for others.", show_default=False),
    ] = None,
    generate: Annotated[
        int, typer.Option(metavar="N", min=0, help="Also answer the prompts of the first N held-out pairs.")
    ] = 0,
    benchmark: Annotated[
        list[str] | None,
        typer.Option(metavar="KIND:FILE", help="Also answer a yes/no benchmark by log-probability: pope:FILE or "
                     "amber:FILE; repeat for others.", show_default=False),
    ] = None,
    images: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="Images of the benchmarks (default: the folder of each file).",
                     show_default=False),
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Address of an OpenAI-compatible server that runs the judge, with the key in "
                     "OPENAI_API_KEY.", show_default=False),
    ] = None,
    judge_model: Annotated[
        str,
        typer.Option(metavar="NAME", help="Have the answers compared with those of the base, or with the chosen ones, "
                     "by this model: a folder, a model of the hub, or one behind --judge.", show_default=False),
    ] = "",
    workers: Annotated[
        int | None,
        typer.Option(metavar="N", help="Measure on N workers of the cluster, each with its own GPU where there are "
                     "GPUs (default: in this process).", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Score a model on held-out pairs, with their own, with exchanged and with blank images."""
    from orpo_ray.evaluation.evaluate_run import EvaluateOptions, evaluate_run
    from orpo_ray.evaluation.judge import Judge, ServerJudge
    from orpo_ray.evaluation.local_judge import LocalJudge
    from orpo_ray.evaluation.measuring import measure
    from orpo_ray.evaluation.table import print_evaluation
    from orpo_ray.training.evaluation_workers import on_workers

    if judge and not judge_model:
        raise UserError(
            "the name of the judge's model is missing", field="--judge", value=judge, fix="add --judge-model NAME"
        )
    judged_by: Judge | None = ServerJudge(judge, judge_model) if judge else None
    if judge_model and not judge:
        judged_by = LocalJudge(judge_model)
    options = EvaluateOptions(base, by or (), generate, benchmark or (), images, judged_by)
    measuring = measure if workers is None else on_workers(workers)
    evaluation = evaluate_run(run_or_model, overrides or [], console, options, measuring)
    if as_json:
        print(json.dumps(evaluation.as_json()))
    else:
        print_evaluation(evaluation, console)


def report(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Folders of runs.", show_default=False)],
    output: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="File to write (default: report.html in the run's folder; for several runs, in this folder).",
            show_default=False,
        ),
    ] = None,
    pdf: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Print the page into this PDF file too, with a Chromium, Chrome or Edge of this machine.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Write a page about a run, or about several side by side: verdicts, curves, margins, pairs, answers."""
    from orpo_ray.report.page import write_report

    print_line(f"page  {write_report(runs, output, pdf, print_left_out)}")
    if pdf is not None:
        print_line(f"pdf   {pdf}")


def list_of_runs(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="Folder of runs.")] = "runs",
    as_json: AsJson = False,
) -> None:
    """List the runs in a folder, with their states and main figures."""
    from orpo_ray.report.run_list import list_runs, print_runs

    found = list_runs(folder)
    if as_json:
        print(json.dumps({"runs": [asdict(run) for run in found]}))
    else:
        print_runs(found, folder, console)


def chat(
    run_or_model: Annotated[
        str,
        typer.Argument(metavar="RUN_OR_MODEL", help="Folder of a run, a model or peft adapters.", show_default=False),
    ],
    overrides: Overrides = None,
    image: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE", help="Image for the first message; repeat for others.", show_default=False),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Most tokens of an answer.")] = 256,
    seed: Annotated[
        int | None,
        typer.Option(metavar="N", help="Draw answers with this seed (default: the most likely tokens).",
                     show_default=False),
    ] = None,
) -> None:  # fmt: skip
    """Talk with a model about images: in a terminal, or with lines from a pipe."""
    from orpo_ray.evaluation.chat import chat as talk

    talk(run_or_model, overrides or [], console, image or (), max_new_tokens, seed)
