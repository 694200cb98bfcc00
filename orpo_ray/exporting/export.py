"""`orpo-ray export`: write the model of a finished run as a folder, merged or as adapters, and upload it to the hub."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from orpo_ray.config.load import parse_recipe, read_mapping
from orpo_ray.config.recipe import Recipe
from orpo_ray.errors import UserError
from orpo_ray.exporting.hub import check_can_push, push
from orpo_ray.exporting.merging import load_full_model, load_merged_model, trained_dtype
from orpo_ray.exporting.model_card import FOLDER_IN_CODE, CardFacts, Kind, count_reasons, is_hub_id, render_model_card
from orpo_ray.model.adapter_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, is_adapter, quantized_base
from orpo_ray.storage.files import is_remote, parent_folder
from orpo_ray.storage.run_folder import BAD_ROWS_FILE, FINAL, RECIPE_FILE, RunFolder, not_a_run
from orpo_ray.tracking.jsonl import read_jsonl
from orpo_ray.tracking.metrics_file import last_metrics
from orpo_ray.training.checkpoint import newest_position

EXPORT = "export"
CARD = "README.md"
# Files that saving a model writes; all other files in `final/` belong to the processor.
_MODEL_FILES = (
    "*.safetensors",
    "*.safetensors.index.json",
    "adapter_*",
    "config.json",
    "generation_config.json",
    CARD,
)


@dataclass(frozen=True)
class ExportOptions:
    """Options of `orpo-ray export`."""

    adapter: bool = False
    """Export the adapters only, instead of a model with the adapters merged."""
    output: str | None = None
    """Folder or URI to write to. By default `<run>/export`, for adapters `<run>/export-adapter`."""
    push: str | None = None
    """Repository on the hub to upload to, as OWNER/NAME."""
    public: bool = False
    """Make a new repository public."""
    max_shard_size: str | None = None
    """Maximum size of a weights file, such as `5GB`. By default, that of transformers."""
    overwrite: bool = False
    """Replace an existing export."""


@dataclass(frozen=True)
class Exported:
    """A completed export."""

    kind: Kind
    uri: str
    """Path or URI of the folder."""
    files: list[str]
    """Names of the files."""
    num_bytes: int
    """Total size of the files."""
    url: str | None = None
    """URL of the repository on the hub, if the export was uploaded."""

    def summary(self) -> list[str]:
        """Describe the export in lines for the console: content, folder, how to load and serve it."""
        what = {"merged": "model with merged adapters", "adapter": "adapters only", "whole": "full model"}
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
    """Export the model of a finished run. The output folder is complete, or does not exist.

    Args:
        uri: the run folder.
        options: what to export, and where to.
        console: for progress messages.

    Raises:
        UserError: the run is not finished, the output exists, or the upload failed.
    """
    with contextlib.redirect_stdout(sys.stderr):
        run = RunFolder(uri.rstrip("/"))
        recipe = _finished_recipe(run)
        output = _output_uri(run, options)
        target, name = RunFolder(parent_folder(output)), output.rsplit("/", 1)[-1]
        _check_output(run, output, target, name, options.overwrite)
        if options.push:
            check_can_push(options.push)
        run.pull(FINAL)
        kind = _kind_of_export(run.path / FINAL, options.adapter)
        position = newest_position(
            run,
            lambda text: console.print(f"[yellow]warning:[/yellow] {escape(text)}", highlight=False, soft_wrap=True),
        )
        rows = position.num_rows if position else None
        if options.push and kind == "adapter" and not is_hub_id(recipe.model.id):
            fix = "push a merged model (--merged), or train a model from the hub"
            raise UserError(
                "the base model of the adapters is not on the hub", field="--push", value=options.push, fix=fix
            )
        console.print(f"exporting {run.uri}", highlight=False, soft_wrap=True)
        scratch = target.path / f".{name}"
        shutil.rmtree(scratch, ignore_errors=True)
        try:
            scratch.mkdir(parents=True)
            _write_files(scratch, run, recipe, kind, options, rows)
            written = [path for path in scratch.rglob("*") if path.is_file()]
            for path in written:
                path.chmod(scratch.stat().st_mode & 0o666)  # by the umask; safetensors lets only the owner read them
            files = sorted(str(path.relative_to(scratch)) for path in written)
            num_bytes = sum(path.stat().st_size for path in written)
            url, push_error = _try_push(scratch, options)
            target.move_model(scratch, name)
        except OSError as error:
            raise UserError(
                f"cannot write the export: {error}",
                field="--output",
                value=output,
                fix="give a folder you can write to",
            ) from None
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        if push_error:
            problem = f"{push_error.problem}; the export itself is complete, in {output}"
            raise UserError(problem, field="--push", value=options.push, fix=push_error.fix)
        return Exported(kind, output, files, num_bytes, url)


def _finished_recipe(run: RunFolder) -> Recipe:
    """Read the recipe of a run, and check that the run is finished."""
    run.pull(RECIPE_FILE)
    path = run.path / RECIPE_FILE
    if not os.path.isfile(path):
        raise not_a_run(run)
    if not run.has_model(FINAL):
        fix = "finish the training: orpo-ray train " + (f"{run.uri}/{RECIPE_FILE}" if not run.is_remote else "RECIPE")
        raise UserError("the run is not finished; it has no final model yet", field=run.uri, fix=fix)
    return parse_recipe(read_mapping(path), source=str(path))


def _output_uri(run: RunFolder, options: ExportOptions) -> str:
    default = f"{EXPORT}-adapter" if options.adapter else EXPORT
    output = (options.output or f"{run.uri}/{default}").rstrip("/")
    return output if is_remote(output) else str(Path(os.path.expanduser(output)).absolute())


def _check_output(run: RunFolder, output: str, target: RunFolder, name: str, overwrite: bool) -> None:
    """Raise UserError if the output exists, unless it is an export and may be overwritten."""
    run_uri = run.uri if run.is_remote else str(Path(run.uri).absolute())
    if output in (run_uri, f"{run_uri}/{FINAL}"):
        raise UserError("an export cannot replace the run", field="--output", value=output, fix="give another folder")
    is_empty = not target.is_remote and (target.path / name).is_dir() and not any((target.path / name).iterdir())
    if not target.has(name) or is_empty:
        return
    if not overwrite:
        fix = "give --overwrite, or another --output"
        raise UserError("the output folder already exists", field="--output", value=output, fix=fix)
    if not target.has_model(name):
        fix = "give another --output"
        raise UserError(
            "the output folder is not an export, so it is not overwritten", field="--output", value=output, fix=fix
        )


def _kind_of_export(final: Path, adapter: bool) -> Kind:
    if is_adapter(final):
        return "adapter" if adapter else "merged"
    if adapter:
        raise UserError(
            "the run trained the full model, not adapters", field="--adapter", fix="export without --adapter"
        )
    return "whole"


def _write_files(
    scratch: Path, run: RunFolder, recipe: Recipe, kind: Kind, options: ExportOptions, rows: int | None
) -> None:
    """Write processor, model card and weights. `rows` is the number of training rows, where it is known."""
    final = run.path / FINAL
    shutil.copytree(final, scratch, ignore=shutil.ignore_patterns(*_MODEL_FILES), dirs_exist_ok=True)
    (scratch / CARD).write_text(
        render_model_card(_card_facts(run, recipe, kind, options.push or FOLDER_IN_CODE, rows)), encoding="utf-8"
    )
    if kind == "adapter":
        for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG):
            shutil.copyfile(final / name, scratch / name)
        return
    load = load_merged_model if kind == "merged" else load_full_model
    sharding = {"max_shard_size": options.max_shard_size} if options.max_shard_size else {}
    load(recipe.model, final, recipe.optim.seed).save_pretrained(scratch, **sharding)


def _try_push(folder: Path, options: ExportOptions) -> tuple[str | None, UserError | None]:
    """Upload, and return the URL or the error. A failed upload must not discard the export."""
    if not options.push:
        return None, None
    try:
        return push(folder, options.push, options.public), None
    except UserError as error:
        return None, error


def _card_facts(run: RunFolder, recipe: Recipe, kind: Kind, address: str, rows: int | None) -> CardFacts:
    final = run.path / FINAL
    run.pull(BAD_ROWS_FILE)
    is_quantized = kind == "adapter" and recipe.model.quantization is not None
    return CardFacts(
        recipe=recipe,
        kind=kind,
        metrics=last_metrics(run),
        rows=rows,
        bad=count_reasons(read_jsonl(run.path / BAD_ROWS_FILE)),
        address=address,
        quantized=quantized_base(recipe.model, trained_dtype(recipe.model, final)) if is_quantized else None,
        has_chat_template=(final / "chat_template.jinja").is_file(),
    )
