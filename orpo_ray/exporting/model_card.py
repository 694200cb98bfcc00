"""The model card of a run: what the model is, evaluation results, usage, training. It contains no local paths."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import yaml

from orpo_ray import __version__
from orpo_ray.config.recipe import Recipe
from orpo_ray.data.sources import origins
from orpo_ray.tiny_models.build import is_tiny

Kind = Literal["merged", "adapter", "whole"]
FOLDER_IN_CODE = "path/to/this/folder"
_SHOWN = ("name", "model", "data", "objective", "orpo", "optim", "deepspeed")
# Metric name -> label in the table.
_METRICS = {
    "eval/rewards/accuracies": "preference accuracy",
    "eval/rewards/accuracies_exchanged": "preference accuracy with exchanged images",
    "eval/grounding_gap": "grounding gap",
    "eval/rewards/margins": "reward margin",
    "eval/nll_loss": "negative log-likelihood of the chosen answer",
}


@dataclass(frozen=True)
class CardFacts:
    """Facts about a run for its model card."""

    recipe: Recipe
    kind: Kind
    """merged: adapters merged into the base model. adapter: adapters only. whole: a fully fine-tuned model."""
    metrics: Mapping[str, float]
    """Latest value of each metric."""
    rows: int | None
    """Number of rows in the training data, if known."""
    bad: Mapping[str, int]
    """Reason -> number of rows that could not be used."""
    address: str = FOLDER_IN_CODE
    """Name or folder of the model in code examples."""
    quantized: Mapping[str, Any] | None = None
    """Options for loading the base model in 4 bits; None if it was not quantized."""
    has_chat_template: bool = True
    """Whether prompts are formatted with a chat template."""


def count_reasons(records: list[dict[str, Any]]) -> dict[str, int]:
    """Count bad rows by reason, most frequent first."""
    return dict(Counter(record["reason"] for record in records).most_common())


def render_model_card(facts: CardFacts) -> str:
    """Return the text of README.md: metadata for the hub, then the card itself."""
    name = facts.recipe.name.rsplit("/", 1)[-1]
    paragraphs = [
        f"# {name}",
        _summary(facts),
        "## Evaluation",
        _evaluation(facts),
        "## Usage",
        _usage_in_transformers(facts),
        _usage_in_vllm(facts),
        "## Training",
        _training(facts),
        "Recipe, without default values and local paths:",
        f"```yaml\n{public_recipe(facts.recipe)}```",
    ]
    return (
        f"---\n{_metadata(facts, name)}---\n\n" + "\n\n".join(paragraph for paragraph in paragraphs if paragraph) + "\n"
    )


def public_recipe(recipe: Recipe) -> str:
    """Return the sections of a recipe that affect the model, as YAML. Paths are reduced to their last component."""
    raw = recipe.model_dump(mode="json", exclude_defaults=True)
    raw = {name: raw[name] for name in _SHOWN if name in raw}
    raw["model"]["id"] = public_name(recipe.model.id)
    raw["model"].pop("vision_cache", None)
    for split in ("train", "eval"):
        if split in raw["data"]:
            raw["data"][split] = _public_sources(raw["data"][split])
    if raw["data"].get("image_root"):
        raw["data"]["image_root"] = public_name(raw["data"]["image_root"])
    return yaml.safe_dump(raw, sort_keys=False, allow_unicode=True)


def public_name(source: str) -> str:
    """Return a hub name or a built-in dataset unchanged, and the last component of any other path or URI."""
    if source.startswith("hf://") or re.fullmatch(r"[a-z-]+:[\w-]+", source) or is_hub_id(source) or is_tiny(source):
        return source
    return source.rstrip("/").rsplit("/", 1)[-1]


def is_hub_id(name: str) -> bool:
    """Whether a model name has the form of a hub name."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None and not is_tiny(name)


def _public_sources(sources: Mapping[str, float]) -> dict[str, float]:
    """Map public names of sources to weights. Equal names get a number; prepared data is named by its own sources."""
    named: dict[str, float] = {}
    for source, weight in ((origin, weight) for uri, weight in sources.items() for origin in origins(uri)):
        name, number = public_name(source), 2
        while name in named:
            name, number = f"{public_name(source)} ({number})", number + 1
        named[name] = weight
    return named


def _metadata(facts: CardFacts, name: str) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    recipe = facts.recipe
    adapter = facts.kind == "adapter"
    held_out = ", ".join(_public_sources(recipe.data.eval)) or "held-out training pairs"
    results = [
        EvalResult(
            task_type="image-text-to-text",
            dataset_type=next(iter(_hub_datasets(recipe.data.eval)), "preference-pairs"),
            dataset_name=held_out,
            metric_type="accuracy" if "accurac" in metric else metric.removeprefix("eval/"),
            metric_name=label,
            metric_value=round(facts.metrics[metric], 4),
        )
        for metric, label in _METRICS.items()
        if metric in facts.metrics
    ]
    hub = is_hub_id(recipe.model.id)
    extra: dict[str, Any] = {"base_model_relation": "adapter" if adapter else "finetune"} if hub else {}
    data = ModelCardData(
        base_model=recipe.model.id if hub else None,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="image-text-to-text",
        tags=[recipe.objective.name, "orpo-ray", "preference-optimization", *(["lora"] if recipe.model.lora else [])],
        datasets=_hub_datasets(recipe.data.train) or None,
        model_name=name,
        eval_results=results or None,
        **extra,
    )
    return f"{data.to_yaml()}\n"


def _hub_datasets(sources: Mapping[str, float]) -> list[str]:
    """Return the names of hub datasets among the sources."""
    found = (re.match(r"hf://datasets/([\w.-]+/[\w.-]+)", source) for source in sources)
    return list(dict.fromkeys(match.group(1) for match in found if match))


def _summary(facts: CardFacts) -> str:
    model = facts.recipe.model
    named = public_name(model.id)
    base = f"[{named}](https://huggingface.co/{named})" if is_hub_id(named) else f"`{named}`"
    revision = f" at revision `{model.revision}`" if model.revision else ""
    method = "full fine-tuning"
    if model.lora:
        extras = [label for on, label in ((model.lora.use_rslora, "rsLoRA"), (model.lora.use_dora, "DoRA")) if on]
        method = f"LoRA adapters of rank {model.lora.r}" + (f" ({', '.join(extras)})" if extras else "")
        if model.quantization:
            method += f" on the base model in 4 bits ({model.quantization.quant_type.upper()})"
    content = {
        "merged": "The adapters are merged into the weights, so no adapter library is needed to load the model.",
        "adapter": "These are the adapters only; load them on top of the base model.",
        "whole": "",
    }[facts.kind]
    if facts.kind == "merged" and model.quantization:
        content += " The base weights are the dequantized 4-bit weights that the adapters were trained on."
    objective = f"[{facts.recipe.objective.title}]({facts.recipe.objective.paper})"
    tool = f"[orpo-ray](https://github.com/orpo-ray/orpo-ray) {__version__}"
    text = (
        f"{base}{revision}, aligned to image-text preferences with {objective}, by {tool}. Method: {method}. {content}"
    )
    return text.strip()


def _evaluation(facts: CardFacts) -> str:
    present = {label: facts.metrics[metric] for metric, label in _METRICS.items() if metric in facts.metrics}
    if not present:
        return "The model was not evaluated: the run had no held-out pairs."
    pairs = facts.metrics.get("eval/pairs")
    sources = ", ".join(f"`{name}`" for name in _public_sources(facts.recipe.data.eval)) or "the training data"
    count = f"{int(pairs):,} held-out pairs" if pairs else "held-out pairs"
    rows = "\n".join(f"| {label} | {value:.4f} |" for label, value in present.items())
    text = f"On {count} from {sources}, at the end of training:\n\n| metric | value |\n|---|---:|\n{rows}"
    if "eval/grounding_gap" in facts.metrics:
        text += (
            "\n\nPreference accuracy is the fraction of pairs in which the model gives the chosen answer the higher "
            "likelihood. The grounding gap is the drop in this accuracy when each pair gets the images of another "
            "pair. A gap near 0 means that the model does not use the images."
        )
    return text


def _usage_in_transformers(facts: CardFacts) -> str:
    loading = _LOADING[facts.kind].replace("ADDRESS", facts.address)
    if facts.kind == "adapter":
        loading = loading.replace("BASE", _base_in_code(facts)).replace("OPTIONS", _base_options(facts))
        if facts.quantized:
            options = "".join(f"    {name}={value!r},\n" for name, value in facts.quantized.items())
            loading = loading.replace("AutoProcessor\n", "AutoProcessor, BitsAndBytesConfig\n")
            loading = loading.replace("\nbase = ", f"\nin_4_bits = BitsAndBytesConfig(\n{options})\nbase = ")
    return f"With transformers:\n\n```python\n{loading}\n{_CHAT if facts.has_chat_template else _PLAIN}```"


def _base_in_code(facts: CardFacts) -> str:
    model_id = facts.recipe.model.id
    return model_id if is_hub_id(model_id) else f"path/to/{public_name(model_id)}"


def _base_options(facts: CardFacts) -> str:
    options = [f'revision="{facts.recipe.model.revision}", '] if facts.recipe.model.revision else []
    if facts.quantized:
        options.append("quantization_config=in_4_bits, ")
    return "".join(options)


def _usage_in_vllm(facts: CardFacts) -> str:
    model = facts.recipe.model
    if facts.kind != "adapter":
        return f"With [vLLM](https://docs.vllm.ai):\n\n```bash\nvllm serve {facts.address}\n```"
    assert model.lora is not None
    obstacles = {
        "these are DoRA adapters": model.lora.use_dora,
        "other modules were trained in full": bool(model.lora.modules_to_save),
        "the base model is in 4 bits": model.quantization is not None,
    }
    if any(obstacles.values()):
        reasons = " and ".join(reason for reason, applies in obstacles.items() if applies)
        return f"vLLM cannot load these adapters: {reasons}. Export a merged model with `orpo-ray export RUN --merged`."
    name = facts.recipe.name.rsplit("/", 1)[-1]
    lora = f"--enable-lora --max-lora-rank {_vllm_rank(model.lora.r)} --lora-modules {name}={facts.address}"
    return f"With [vLLM](https://docs.vllm.ai):\n\n```bash\nvllm serve {_base_in_code(facts)} {lora}\n```"


def _vllm_rank(rank: int) -> int:
    """Return the smallest maximum rank that vLLM supports for adapters of this rank."""
    return next((known for known in (8, 16, 32, 64, 128, 256, 320, 512) if known >= rank), rank)


def _training(facts: CardFacts) -> str:
    sources = ", ".join(f"`{name}`" for name in _public_sources(facts.recipe.data.train))
    samples = facts.recipe.samples
    rows = f" ({facts.rows:,} {samples})" if facts.rows else ""
    steps = facts.metrics.get("step")
    trained = f", {int(steps):,} steps of {facts.recipe.optim.pairs_per_step:,} {samples}" if steps else ""
    text = f"Trained on {sources}{rows}{trained}."
    if not facts.bad:
        return f"{text} No row was left out."
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in facts.bad.items())
    return f"{text} Rows that could not be used and were left out: {sum(facts.bad.values()):,} ({reasons})."


_WHOLE = """\
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("ADDRESS", dtype="auto", device_map="auto")
processor = AutoProcessor.from_pretrained("ADDRESS")
"""
_ADAPTER = """\
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor

base = AutoModelForImageTextToText.from_pretrained("BASE", OPTIONSdtype="auto", device_map="auto")
model = PeftModel.from_pretrained(base, "ADDRESS")
processor = AutoProcessor.from_pretrained("ADDRESS")
"""
_LOADING: dict[Kind, str] = {"merged": _WHOLE, "whole": _WHOLE, "adapter": _ADAPTER}
_CHAT = """\
messages = [{
    "role": "user",
    "content": [{"type": "image", "path": "photo.jpg"}, {"type": "text", "text": "What is in this picture?"}],
}]
inputs = processor.apply_chat_template(
    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
).to(model.device, model.dtype)
answer = model.generate(**inputs, max_new_tokens=128)[0, inputs["input_ids"].shape[1]:]
print(processor.decode(answer, skip_special_tokens=True))
"""
_PLAIN = """\
from PIL import Image

inputs = processor(images=Image.open("photo.jpg"), text="What is in this picture?", return_tensors="pt")
inputs = inputs.to(model.device, model.dtype)
answer = model.generate(**inputs, max_new_tokens=128)[0, inputs["input_ids"].shape[1]:]
print(processor.decode(answer, skip_special_tokens=True))
"""
