"""`orpo-ray data synthesize`: make preference pairs of images and prompts, and write them as a prepared set.

The set is made in parts. The same command goes on with the parts that are missing, and the set is the same as if it had
never been interrupted.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

import ray
from rich.console import Console

from orpo_ray.config.recipe import Recipe
from orpo_ray.data.bad_rows import BadRow, check_bad_fraction, refuse_rows
from orpo_ray.data.sources import MANIFEST_FILE
from orpo_ray.data_report.prepare import PREPARED
from orpo_ray.data_report.progress import RowProgress
from orpo_ray.errors import OrpoRayError, UserError
from orpo_ray.ray_cluster.start import start_ray
from orpo_ray.storage.lease import Lease, LeaseLost
from orpo_ray.storage.run_folder import RunFolder
from orpo_ray.synthesis.ahead import draw_ahead
from orpo_ray.synthesis.distribute import iter_parts
from orpo_ray.synthesis.engines.drafts import DRAFTS
from orpo_ray.synthesis.engines.vllm_engine import vllm_processor
from orpo_ray.synthesis.held_out import EVAL, held_out_keys, write_held_out
from orpo_ray.synthesis.identity import FILE, check_identity, identity_of
from orpo_ray.synthesis.local_model import LocalModel
from orpo_ray.synthesis.outcome import Synthesized, manifest_of
from orpo_ray.synthesis.part import Job, PartMaker
from orpo_ray.synthesis.part_files import PAIRS, PartFacts, read_facts
from orpo_ray.synthesis.source import source_rows
from orpo_ray.tracking.bad_rows_file import write_bad_rows

MANIFEST = f"{PREPARED}/{MANIFEST_FILE}"


class SynthesisFailed(OrpoRayError):
    """The command ended with an error that is not caused by the user's input."""


def synthesize(recipe: Recipe, console: Console) -> Synthesized:
    """Make the pairs of a recipe, or go on with them, and write them to its run folder.

    Args:
        recipe: the recipe.
        console: for progress.

    Raises:
        UserError: a source or a model cannot be used, a server does not answer, more rows are bad than the recipe
            allows, no row became a pair, or the folder holds another set.
        PartFailed: a part ended its worker more often than the recipe allows.
        SynthesisFailed: the workers were lost.
        LeaseLost: another command took over the run folder.
    """
    recipe = recipe.with_absolute_paths()
    folder, source = RunFolder(recipe.run_uri), source_rows(recipe)
    if folder.has(MANIFEST) and not folder.has(FILE):
        fix = "choose another name (name=...), or delete the folder"
        raise UserError("the folder holds pairs of `data prepare`", field=f"{folder.uri}/{PREPARED}", fix=fix)
    job = Job(recipe.model_dump(mode="json"), source, held_out_keys(recipe))
    PartMaker(job).check()
    identity = identity_of(recipe, source, LocalModel(recipe).target)
    folder.make()
    lost: list[LeaseLost] = []
    with Lease(folder, lost.append, console.print):
        check_identity(folder, identity)
        found = {part: facts for part in range(source.num_parts) if (facts := read_facts(folder, part)) is not None}
        if folder.has(MANIFEST):
            made = Synthesized.of(f"{folder.uri}/{PAIRS}", list(found.values()), was_finished=True)
            return replace(made, eval_uri=f"{folder.uri}/{EVAL}" if _has_held_out(folder) else None)
        parts = _all_parts(recipe, job, found, lost, console)
        made = Synthesized.of(f"{folder.uri}/{PAIRS}", parts)
        write_bad_rows(folder, made.bad)
        check_bad_fraction(recipe, len(made.bad), made.rows, made.bad, at_end=True)
        if not made.pairs:
            raise UserError(
                f"none of the {made.rows:,} rows became a pair: {_counted(made.thrown_away) or 'all rows are bad'}",
                field="synthesize",
                fix=f"read the answers in {folder.uri}/{PREPARED}/candidates, and change temperatures, max_new_tokens, "
                "min_margin or the model",
            )
        held_out = write_held_out(recipe, folder, console)
        if held_out is not None:
            made = replace(made, eval_uri=held_out.uri)
            known = {row.source for row in made.bad}
            write_bad_rows(folder, [*made.bad, *(row for row in held_out.bad if row.source not in known)])
        _drop_scratch(folder)
        folder.delete(DRAFTS)
        # Written last, so that a folder with a manifest is complete.
        manifest = manifest_of(recipe, made, parts, identity, held_out)
        folder.write(MANIFEST, (json.dumps(manifest, indent=2) + "\n").encode())
    return made


def _all_parts(
    recipe: Recipe, job: Job, found: dict[int, PartFacts], lost: Sequence[LeaseLost], console: Console
) -> list[PartFacts]:
    """Make the missing parts; return the facts of all, in order."""
    missing = [part for part in range(job.source.num_parts) if part not in found]
    bad: list[BadRow] = [row for facts in found.values() for row in facts.bad_rows]
    with RowProgress(console, "synthesizing", job.source.num_rows) as progress:
        progress.advance(sum(facts.rows for facts in found.values()))
        if missing:
            start_ray()
            try:
                if recipe.synthesize.engine == "vllm":
                    processor = vllm_processor(recipe, LocalModel(recipe))
                    draw_ahead(RunFolder(recipe.run_uri), job, missing, processor)
                for facts in iter_parts(job, missing):
                    if lost:
                        raise lost[0]
                    found[facts.part] = facts
                    bad += facts.bad_rows
                    refuse_rows(recipe, facts.bad_rows)
                    seen = sum(each.rows for each in found.values())
                    check_bad_fraction(recipe, len(bad), seen, bad, at_end=False)
                    progress.advance(facts.rows)
            except ray.exceptions.RayError as error:
                raise SynthesisFailed(
                    f"the workers were lost: {str(error).strip().splitlines()[0]}\n"
                    "  fix: run the same command again, which keeps the parts that are complete"
                ) from error
    return [found[part] for part in sorted(found)]


def _has_held_out(folder: RunFolder) -> bool:
    """Whether a complete set holds the held-out pairs too."""
    folder.pull(MANIFEST)
    return "eval" in json.loads((folder.path / MANIFEST).read_text("utf-8"))["splits"]


def _counted(reasons: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in reasons.items())


def _drop_scratch(folder: RunFolder) -> None:
    """Delete what killed workers of earlier attempts were writing."""
    for scratch in (folder.path / PREPARED).rglob(".*.tmp"):
        scratch.unlink()
