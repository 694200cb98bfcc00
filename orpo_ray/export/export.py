"""`orpo-ray export`: what a run ended with as a folder to take away: one plain model, or adapters; and to the hub."""

from __future__ import annotations

import contextlib
import json
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from orpo_ray.config.load import parse_recipe, read_mapping
from orpo_ray.config.recipe import Recipe
from orpo_ray.errors import UserError
from orpo_ray.export.hub import check_can_push, push
from orpo_ray.export.merging import merged_model, trained_dtype, whole_model
from orpo_ray.export.model_card import HERE, CardFacts, Kind, bad_by_reason, is_hub_id, model_card
from orpo_ray.model.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, is_adapter, quantized_base
from orpo_ray.storage.files import is_remote, parent_folder
from orpo_ray.storage.run_folder import BAD_ROWS_FILE, FINAL, RECIPE_FILE, RunFolder
from orpo_ray.tracking.tracker import last_metrics, read_jsonl
from orpo_ray.training.checkpoint import POSITION_FILE

EXPORT = "export"
CARD = "README.md"
# What a model's own saving writes; all else in `final/` belongs to the processor.
_OF_THE_MODEL = (
    "*.safetensors",
    "*.safetensors.index.json",
    "adapter_*",
    "config.json",
    "generation_config.json",
    CARD,
)


@dataclass(frozen=True)
class ExportOptions:
    """adapter: the adapters alone instead of one merged model. output: a folder or URI, by default `<run>/export`, of
    adapters `<run>/export-adapter`.

    push: OWNER/NAME on the hub. public: for a repository that is new. max_shard_size: of one file of weights, `5GB`;
    by default transformers'. overwrite: an export that stands there.
    """

    adapter: bool = False
    output: str | None = None
    push: str | None = None
    public: bool = False
    max_shard_size: str | None = None
    overwrite: bool = False


@dataclass(frozen=True)
class Exported:
    """What was written: where, which files, their bytes in all, and the hub's address of it if it was pushed."""

    kind: Kind
    uri: str
    files: list[str]
    num_bytes: int
    url: str | None = None

    def summary(self) -> list[str]:
        """What, where, how large, how to load it: a line each."""
        what = {"merged": "one model, adapters merged", "adapter": "adapters alone", "whole": "the whole model"}
        size = f"{self.num_bytes / 1e9:,.2f} GB" if self.num_bytes >= 1e8 else f"{self.num_bytes / 1e6:,.1f} MB"
        lines = [
            f"exported    {what[self.kind]}, {size} in {len(self.files)} files",
            f"folder      {self.uri}",
            *([f"hub         {self.url}"] if self.url else []),
        ]
        if self.kind != "adapter" and not is_remote(self.uri):
            lines.append(f'load it     AutoModelForImageTextToText.from_pretrained("{self.uri}", dtype="auto")')
            lines.append(f"serve it    vllm serve {shlex.quote(self.uri)}")
        return [*lines, f"model card  {self.uri}/{CARD}"]


def export_run(uri: str, options: ExportOptions, console: Console) -> Exported:
    """Export what a finished run ended with; the output appears whole or not at all. Raises UserError."""
    with contextlib.redirect_stdout(sys.stderr):
        run = RunFolder(uri.rstrip("/"))
        recipe = _finished_recipe(run)
        output = _output(run, options)
        target, name = RunFolder(parent_folder(output)), output.rsplit("/", 1)[-1]
        _check_output(run, output, target, name, options.overwrite)
        if options.push:
            check_can_push(options.push)
        run.pull(FINAL)
        kind = _kind(run.path / FINAL, options.adapter)
        if options.push and kind == "adapter" and not is_hub_id(recipe.model.id):
            fix = "push one merged model (--merged), or train from a model of the hub"
            raise UserError("the adapters' base model is not on the hub", field="--push", value=options.push, fix=fix)
        console.print(f"exporting {run.uri}", highlight=False, soft_wrap=True)
        scratch = target.path / f".{name}"
        shutil.rmtree(scratch, ignore_errors=True)
        try:
            scratch.mkdir(parents=True)
            _write(scratch, run, recipe, kind, options)
            written = [path for path in scratch.rglob("*") if path.is_file()]
            for path in written:
                path.chmod(0o644)  # safetensors writes for the owner alone
            files = sorted(str(path.relative_to(scratch)) for path in written)
            num_bytes = sum(path.stat().st_size for path in written)
            url, refused = _push(scratch, options)
            target.move_model(scratch, name)
        except OSError as error:
            raise UserError(f"cannot be written: {error}", field="--output", value=output) from None
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        if refused:
            problem = f"{refused.problem}; the export itself is whole, at {output}"
            raise UserError(problem, field="--push", value=options.push, fix=refused.fix)
        return Exported(kind, output, files, num_bytes, url)


def _finished_recipe(run: RunFolder) -> Recipe:
    """The recipe of a run that has come to its end."""
    run.pull(RECIPE_FILE)
    path = run.path / RECIPE_FILE
    if not path.is_file():
        raise UserError(f"is not a run: it has no {RECIPE_FILE}", field=run.uri, fix="give the folder of a run")
    if not run.has_model(FINAL):
        fix = "train it to its end: orpo-ray train " + (f"{run.uri}/{RECIPE_FILE}" if not run.is_remote else "RECIPE")
        raise UserError("the run is not finished: it has no final model yet", field=run.uri, fix=fix)
    return parse_recipe(read_mapping(path), source=str(path))


def _output(run: RunFolder, options: ExportOptions) -> str:
    own = f"{EXPORT}-adapter" if options.adapter else EXPORT
    output = (options.output or f"{run.uri}/{own}").rstrip("/")
    return output if is_remote(output) else str(Path(output).expanduser().absolute())


def _check_output(run: RunFolder, output: str, target: RunFolder, name: str, overwrite: bool) -> None:
    """Raises UserError where something stands that an export would replace, unless that is an old export."""
    here = run.uri if run.is_remote else str(Path(run.uri).absolute())
    if output in (here, f"{here}/{FINAL}"):
        raise UserError("is the run's own folder", field="--output", value=output, fix="give another one")
    is_empty = not target.is_remote and (target.path / name).is_dir() and not any((target.path / name).iterdir())
    if not target.has(name) or is_empty:
        return
    if not overwrite:
        fix = "give --overwrite, or another --output"
        raise UserError("stands there already", field="--output", value=output, fix=fix)
    if not target.has_model(name):
        fix = "give another --output"
        raise UserError("is not an export, and is not overwritten", field="--output", value=output, fix=fix)


def _kind(final: Path, adapter: bool) -> Kind:
    if is_adapter(final):
        return "adapter" if adapter else "merged"
    if adapter:
        fix = "export without --adapter"
        raise UserError("the run ended with a whole model, not with adapters", field="--adapter", fix=fix)
    return "whole"


def _write(scratch: Path, run: RunFolder, recipe: Recipe, kind: Kind, options: ExportOptions) -> None:
    """Processor, model card, weights."""
    final = run.path / FINAL
    shutil.copytree(final, scratch, ignore=shutil.ignore_patterns(*_OF_THE_MODEL), dirs_exist_ok=True)
    (scratch / CARD).write_text(model_card(_facts(run, recipe, kind, options.push or HERE)), encoding="utf-8")
    if kind == "adapter":
        for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG):
            shutil.copyfile(final / name, scratch / name)
        return
    load = merged_model if kind == "merged" else whole_model
    sharding = {"max_shard_size": options.max_shard_size} if options.max_shard_size else {}
    load(recipe.model, final, recipe.optim.seed).save_pretrained(scratch, **sharding)


def _push(folder: Path, options: ExportOptions) -> tuple[str | None, UserError | None]:
    """The hub's address, or why it would not have it: the export is worth keeping either way."""
    if not options.push:
        return None, None
    try:
        return push(folder, options.push, options.public), None
    except UserError as error:
        return None, error


def _facts(run: RunFolder, recipe: Recipe, kind: Kind, address: str) -> CardFacts:
    final = run.path / FINAL
    run.pull(BAD_ROWS_FILE)
    position = run.read_last(f"checkpoint_*/{POSITION_FILE}")
    quantized = kind == "adapter" and recipe.model.quantization is not None
    return CardFacts(
        recipe=recipe,
        kind=kind,
        metrics=last_metrics(run),
        rows=json.loads(position)["num_rows"] if position else None,
        bad=bad_by_reason(read_jsonl(run.path / BAD_ROWS_FILE)),
        address=address,
        quantized=quantized_base(recipe.model, trained_dtype(recipe.model, final)) if quantized else None,
        has_chat_template=(final / "chat_template.jinja").is_file(),
    )
