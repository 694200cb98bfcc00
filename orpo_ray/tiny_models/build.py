"""Build small models with random weights and a real processor, offline, on first use; cache them.

A recipe names them like any other model (`model.id: orpo-ray/tiny-smolvlm`), so that the quickstart and the tests run
the same code as other models.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path

from orpo_ray.errors import UserError
from orpo_ray.tiny_models.families import TINY_FAMILIES

PREFIX = "orpo-ray/tiny-"


def is_tiny(model_id: str) -> bool:
    """Whether `model_id` names a tiny model, rather than a hub model or a folder."""
    return model_id.startswith(PREFIX)


def tiny_model_path(model_id: str) -> Path:
    """Return the folder of a tiny model, in the usual Hugging Face layout. Builds the model on first use.

    The cache is `$ORPO_RAY_CACHE`, by default `~/.cache/orpo-ray`. Several processes can call this at the same time:
    each builds in its own temporary folder, and the first one to rename it wins.

    Raises:
        UserError: there is no such model, or a package that its processor needs is missing.
    """
    name = model_id.removeprefix(PREFIX)
    if name not in TINY_FAMILIES:
        known = ", ".join(PREFIX + n for n in sorted(TINY_FAMILIES))
        raise UserError("unknown tiny model", field="model.id", value=model_id, fix=f"use one of: {known}")
    # The folder name contains a hash of this package, so that a changed model is built again.
    modules = sorted(Path(__file__).parent.glob("*.py"))
    source = hashlib.sha256(b"".join(module.read_bytes() for module in modules)).hexdigest()[:12]
    cache = Path(os.environ.get("ORPO_RAY_CACHE", Path.home() / ".cache" / "orpo-ray"))
    folder = cache / f"tiny-{name}-{source}"
    if not folder.is_dir():
        from transformers.utils.logging import disable_progress_bar

        family = TINY_FAMILIES[name]()
        if family.needs_torchvision and find_spec("torchvision") is None:
            raise UserError(
                "the processor of this model family requires torchvision",
                field="model.id",
                value=model_id,
                fix="pip install torchvision",
            )
        processor = family.processor()
        cache.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=cache, prefix=f".tiny-{name}-"))
        disable_progress_bar()
        model = family.model()
        # In a process group, transformers would write the files on rank 0 alone.
        model.should_save_on_this_rank = lambda is_main_process: True
        model.save_pretrained(scratch)
        processor.save_pretrained(scratch)
        try:
            scratch.rename(folder)
        except OSError:  # another process finished first
            shutil.rmtree(scratch)
            if not folder.is_dir():
                raise
    return folder


def resolve(model_id: str) -> str:
    """Return a name that transformers can load: the local folder of a tiny model, and any other name unchanged."""
    return str(tiny_model_path(model_id)) if is_tiny(model_id) else model_id
