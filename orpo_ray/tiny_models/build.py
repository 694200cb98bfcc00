"""Small random models with a real processor, made offline on first use and cached.

They are named in a recipe like any other model (`model.id: orpo-ray/tiny-smolvlm`), so that the quickstart and the
tests run the real program.
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
    """Whether `model_id` names a model of this file rather than one of the hub or of a folder."""
    return model_id.startswith(PREFIX)


def tiny_model_path(model_id: str) -> Path:
    """The folder of a tiny model in the usual Hugging Face layout; it is made on first use and cached.

    The cache is `$ORPO_RAY_CACHE`, by default `~/.cache/orpo-ray`. Two processes may ask at once: each builds in a
    folder of its own and the first rename wins.
    """
    name = model_id.removeprefix(PREFIX)
    if name not in TINY_FAMILIES:
        known = ", ".join(PREFIX + n for n in sorted(TINY_FAMILIES))
        raise UserError("no such tiny model", field="model.id", value=model_id, fix=f"use one of: {known}")
    rooms = sorted(Path(__file__).parent.glob("*.py"))
    source = hashlib.sha256(b"".join(room.read_bytes() for room in rooms)).hexdigest()[:12]
    cache = Path(os.environ.get("ORPO_RAY_CACHE", Path.home() / ".cache" / "orpo-ray"))
    folder = cache / f"tiny-{name}-{source}"
    if not folder.is_dir():
        from transformers.utils.logging import disable_progress_bar

        family = TINY_FAMILIES[name]()
        if family.wants_torchvision and find_spec("torchvision") is None:
            raise UserError(
                "transformers' processor of this family needs torchvision",
                field="model.id",
                value=model_id,
                fix="pip install torchvision",
            )
        processor = family.processor()
        cache.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=cache, prefix=f".tiny-{name}-"))
        disable_progress_bar()
        family.model().save_pretrained(scratch)
        processor.save_pretrained(scratch)
        try:
            scratch.rename(folder)
        except OSError:  # another process was first
            shutil.rmtree(scratch)
            if not folder.is_dir():
                raise
    return folder


def resolve(model_id: str) -> str:
    """What transformers can load: tiny models become their folder on this machine, all else stays."""
    return str(tiny_model_path(model_id)) if is_tiny(model_id) else model_id
