"""Answers by vLLM, through `ray.data.llm`. Its pipeline draws the answers of all parts ahead (`synthesis/ahead.py`).

Prompts are rendered and tokenized as for the other engines, and given to vLLM with their images. `ray.data.llm` and
vLLM are imported only when this engine is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import ray.data

from orpo_ray.config.recipe import Recipe
from orpo_ray.data.images import load_image
from orpo_ray.errors import UserError
from orpo_ray.model.adapter_folder import is_adapter
from orpo_ray.synthesis.local_model import LocalModel
from orpo_ray.tiny_models.build import resolve

ENGINE = "synthesize.engine"
BATCH_ROWS = 64
OWN = ("part", "of", "key")
"""Columns of a request that travel along with it."""
Processor = Callable[[ray.data.Dataset], ray.data.Dataset]
"""Requests (`synthesis/ahead.py`) -> rows of part, of, key, text, finished."""


def check_vllm(recipe: Recipe, model: LocalModel) -> None:
    """Check that vLLM is there and can run what the recipe asks. Raises UserError."""
    if find_spec("vllm") is None:
        fix = 'pip install "ray[llm]" on the nodes with GPUs, or use engine: transformers or server'
        raise UserError("vLLM is not installed", field=ENGINE, value="vllm", fix=fix)
    config = recipe.synthesize
    if recipe.model.quantization is not None:
        fix = "remove model.quantization, or use engine: transformers"
        found = recipe.model.quantization.model_dump()
        raise UserError("vLLM loads whole weights here", field="model.quantization", value=found, fix=fix)
    degraded = {"crop", "noise", "blank"} & set(config.corruptions)
    if config.label == "corruption" and degraded:
        fix = "use engine: server with a vLLM server, or object, count, color and place alone"
        problem = "answers to degraded images cannot be drawn ahead"
        raise UserError(problem, field="synthesize.corruptions", value=config.corruptions, fix=fix)
    folder = model.target.folder
    if folder is not None and is_adapter(folder):
        fix = "merge the adapters: orpo-ray export RUN, and give the folder that it writes"
        raise UserError("vLLM runs whole models here", field="synthesize.model", value=str(folder), fix=fix)


def vllm_processor(recipe: Recipe, model: LocalModel) -> Processor:
    """Make the pipeline of `ray.data.llm`: requests -> answers."""
    from ray.data.llm import build_processor

    config = vllm_config(recipe, model)
    processor: Processor = build_processor(
        config, preprocess=partial(vllm_request, recipe.synthesize.max_new_tokens), postprocess=vllm_answer
    )
    return processor


def vllm_config(recipe: Recipe, model: LocalModel) -> Any:
    """Return what `ray.data.llm` starts: engines that take tokenized prompts, as many as workers are asked for."""
    from ray.data.llm import vLLMEngineProcessorConfig

    target, workers = model.target, recipe.synthesize.num_workers
    engine: dict[str, Any] = {
        "max_model_len": recipe.data.max_length + recipe.synthesize.max_new_tokens,
        "trust_remote_code": target.model.trust_remote_code,
    }
    if target.model.revision is not None:
        engine["revision"] = target.model.revision
    if target.model.dtype != "auto":
        engine["dtype"] = target.model.dtype
    return vLLMEngineProcessorConfig(
        model_source=resolve(target.model.id),
        engine_kwargs=engine,
        concurrency=1 if workers == "auto" else workers,
        batch_size=BATCH_ROWS,
        accelerator_type=recipe.scaling.accelerator_type,
        chat_template_stage=False,
        tokenize_stage=False,
        detokenize_stage=False,
        prepare_multimodal_stage=False,
    )


def vllm_request(max_tokens: int, row: dict[str, Any]) -> dict[str, Any]:
    """Turn a request into what vLLM's stage takes; its own columns travel along."""
    images = [load_image({"bytes": image, "path": None}, None) for image in row["images"]]
    sampling = {"temperature": row["temperature"], "seed": row["seed"], "max_tokens": max_tokens, "top_p": 1.0}
    # As tokens: of a text, vLLM makes tokens with special ones before it, which the chat template has written already.
    taken = {"tokenized_prompt": row["tokens"], "sampling_params": sampling, "max_tokens": max_tokens}
    own = {name: row[name] for name in OWN}
    return own | taken | ({"multimodal_data": {"image": images}} if images else {})


def vllm_answer(row: dict[str, Any]) -> dict[str, Any]:
    """Turn what vLLM's stage gives into an answer. vLLM ends one that is cut off at the most tokens."""
    finished = row["num_generated_tokens"] < row["max_tokens"]
    own = {name: row[name] for name in OWN}
    return own | {"text": str(row["generated_text"]).strip(), "finished": bool(finished)}
