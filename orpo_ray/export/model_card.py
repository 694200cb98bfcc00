"""A run's model card: what the model is, how well it does, how to load it, how it was made; no path of a machine."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import yaml

from orpo_ray import __version__
from orpo_ray.config.recipe import Recipe
from orpo_ray.tiny_models.build import is_tiny

Kind = Literal["merged", "adapter", "whole"]
HERE = "path/to/this/folder"
_SHOWN = ("name", "model", "data", "orpo", "optim", "deepspeed")
# What a run writes -> how the table calls it.
_METRICS = {
    "eval/rewards/accuracies": "preference accuracy",
    "eval/rewards/accuracies_exchanged": "preference accuracy, images exchanged between pairs",
    "eval/grounding_gap": "grounding gap",
    "eval/rewards/margins": "reward margin",
    "eval/nll_loss": "negative log-likelihood of the better answer",
}


@dataclass(frozen=True)
class CardFacts:
    """What the card of a run is written from.

    metrics: the latest of every metric. rows: of the training data, where that is known. bad: reason -> rows that
    could not be used. address: how the model is named in code. quantized: the options that the base was loaded in 4
    bits with. has_chat_template: whether prompts go through one.
    """

    recipe: Recipe
    kind: Kind
    metrics: Mapping[str, float]
    rows: int | None
    bad: Mapping[str, int]
    address: str = HERE
    quantized: Mapping[str, Any] | None = None
    has_chat_template: bool = True


def bad_by_reason(records: list[dict[str, Any]]) -> dict[str, int]:
    """reason -> how many, the most frequent first."""
    return dict(Counter(record["reason"] for record in records).most_common())


def model_card(facts: CardFacts) -> str:
    """The text of README.md: metadata as the hub reads it, then what people read."""
    name = facts.recipe.name.rsplit("/", 1)[-1]
    parts = [
        f"# {name}",
        _what_it_is(facts),
        "## How well it does",
        _results(facts),
        "## Load it",
        _in_transformers(facts),
        _in_vllm(facts),
        "## How it was made",
        _data(facts),
        "The recipe, without what stood at its default and without where things lay:",
        f"```yaml\n{public_recipe(facts.recipe)}```",
    ]
    return f"---\n{_metadata(facts, name)}---\n\n" + "\n\n".join(part for part in parts if part) + "\n"


def public_recipe(recipe: Recipe) -> str:
    """The parts of a recipe that make the model, as YAML; of paths and buckets only the last name is left."""
    raw = recipe.model_dump(mode="json", exclude_defaults=True)
    raw = {name: raw[name] for name in _SHOWN if name in raw}
    raw["model"]["id"] = public_name(recipe.model.id)
    raw["model"].pop("vision_cache", None)
    for split in ("train", "eval"):
        if split in raw["data"]:
            raw["data"][split] = _public_mix(raw["data"][split])
    if raw["data"].get("image_root"):
        raw["data"]["image_root"] = public_name(raw["data"]["image_root"])
    return yaml.safe_dump(raw, sort_keys=False, allow_unicode=True)


def public_name(source: str) -> str:
    """A name of the hub or of a built-in set as it is; of a path or another address its last part."""
    if source.startswith("hf://") or re.fullmatch(r"[a-z-]+:[\w-]+", source) or is_hub_id(source) or is_tiny(source):
        return source
    return source.rstrip("/").rsplit("/", 1)[-1]


def is_hub_id(name: str) -> bool:
    """Whether a model's name reads as one of the hub."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None and not is_tiny(name)


def _public_mix(mix: Mapping[str, float]) -> dict[str, float]:
    """Sources by their public names; two of one name are told apart by a number."""
    named: dict[str, float] = {}
    for source, weight in mix.items():
        name, number = public_name(source), 2
        while name in named:
            name, number = f"{public_name(source)} ({number})", number + 1
        named[name] = weight
    return named


def _metadata(facts: CardFacts, name: str) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    recipe = facts.recipe
    adapter = facts.kind == "adapter"
    held_out = ", ".join(_public_mix(recipe.data.eval)) or "held-out share of the training pairs"
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
        tags=["orpo", "orpo-ray", "preference-optimization", *(["lora"] if recipe.model.lora else [])],
        datasets=_hub_datasets(recipe.data.train) or None,
        model_name=name,
        eval_results=results or None,
        **extra,
    )
    return f"{data.to_yaml()}\n"


def _hub_datasets(mix: Mapping[str, float]) -> list[str]:
    """The data sets of the hub that are among the sources."""
    found = (re.match(r"hf://datasets/([\w.-]+/[\w.-]+)", source) for source in mix)
    return list(dict.fromkeys(match.group(1) for match in found if match))


def _what_it_is(facts: CardFacts) -> str:
    model = facts.recipe.model
    named = public_name(model.id)
    base = f"[{named}](https://huggingface.co/{named})" if is_hub_id(named) else f"`{named}`"
    revision = f" at revision `{model.revision}`" if model.revision else ""
    how = "all weights were trained"
    if model.lora:
        extras = [label for on, label in ((model.lora.use_rslora, "rsLoRA"), (model.lora.use_dora, "DoRA")) if on]
        how = f"LoRA adapters of rank {model.lora.r}" + "".join(f", {extra}" for extra in extras)
        if model.quantization:
            how += f", on the base model in 4 bits ({model.quantization.quant_type.upper()})"
    these = {
        "merged": "The adapters are merged: this is one plain model.",
        "adapter": "These are the adapters alone; the base model is loaded beside them.",
        "whole": "",
    }[facts.kind]
    if facts.kind == "merged" and model.quantization:
        these += " Its weights are the dequantised ones that were trained on, plus the adapters."
    orpo = "[ORPO](https://arxiv.org/abs/2403.07691)"
    tool = f"[orpo-ray](https://github.com/orpo-ray/orpo-ray) {__version__}"
    text = f"{base}{revision}, aligned to image-text preferences with {orpo} by {tool}; {how}. {these}"
    return text.strip()


def _results(facts: CardFacts) -> str:
    present = {label: facts.metrics[metric] for metric, label in _METRICS.items() if metric in facts.metrics}
    if not present:
        return "Not evaluated: the run had no held-out pairs."
    pairs = facts.metrics.get("eval/pairs")
    on = ", ".join(f"`{name}`" for name in _public_mix(facts.recipe.data.eval)) or "a share of the pairs, held out"
    counted = f"{int(pairs):,} held-out pairs" if pairs else "held-out pairs"
    rows = "\n".join(f"| {label} | {value:.4f} |" for label, value in present.items())
    text = f"On {counted} ({on}), at the end of training:\n\n| | |\n|---|---:|\n{rows}"
    if "eval/grounding_gap" in facts.metrics:
        text += (
            "\n\nPreference accuracy is how often the better answer is the likelier one. The grounding gap is what it "
            "loses when every pair is shown another pair's images: near 0, the model answers without looking."
        )
    return text


def _in_transformers(facts: CardFacts) -> str:
    loading = _LOADING[facts.kind].replace("ADDRESS", facts.address)
    if facts.kind == "adapter":
        loading = loading.replace("BASE", _base_in_code(facts)).replace("OPTIONS", _base_options(facts))
        if facts.quantized:
            options = "".join(f"    {name}={value!r},\n" for name, value in facts.quantized.items())
            loading = loading.replace("AutoProcessor\n", "AutoProcessor, BitsAndBytesConfig\n")
            loading = loading.replace("\nbase = ", f"\nin_4_bits = BitsAndBytesConfig(\n{options})\nbase = ")
    return f"In transformers:\n\n```python\n{loading}\n{_CHAT if facts.has_chat_template else _PLAIN}```"


def _base_in_code(facts: CardFacts) -> str:
    model_id = facts.recipe.model.id
    return model_id if is_hub_id(model_id) else f"path/to/{public_name(model_id)}"


def _base_options(facts: CardFacts) -> str:
    options = [f'revision="{facts.recipe.model.revision}", '] if facts.recipe.model.revision else []
    if facts.quantized:
        options.append("quantization_config=in_4_bits, ")
    return "".join(options)


def _in_vllm(facts: CardFacts) -> str:
    model = facts.recipe.model
    if facts.kind != "adapter":
        return f"In [vLLM](https://docs.vllm.ai):\n\n```bash\nvllm serve {facts.address}\n```"
    assert model.lora is not None
    why = {
        "they are DoRA": model.lora.use_dora,
        "modules were trained in full beside them": bool(model.lora.modules_to_save),
        "they were trained on a base model in 4 bits": model.quantization is not None,
    }
    if any(why.values()):
        because = " and ".join(reason for reason, holds in why.items() if holds)
        return f"For vLLM, export the run merged (`orpo-ray export RUN --merged`): {because}."
    name = facts.recipe.name.rsplit("/", 1)[-1]
    lora = f"--enable-lora --max-lora-rank {_vllm_rank(model.lora.r)} --lora-modules {name}={facts.address}"
    return f"In [vLLM](https://docs.vllm.ai):\n\n```bash\nvllm serve {_base_in_code(facts)} {lora}\n```"


def _vllm_rank(rank: int) -> int:
    """The smallest of the ranks that vLLM takes which holds this one."""
    return next((known for known in (8, 16, 32, 64, 128, 256, 320, 512) if known >= rank), rank)


def _data(facts: CardFacts) -> str:
    sources = ", ".join(f"`{name}`" for name in _public_mix(facts.recipe.data.train))
    rows = f", {facts.rows:,} pairs" if facts.rows else ""
    steps = facts.metrics.get("step")
    trained = f" in {int(steps):,} steps of {facts.recipe.optim.pairs_per_step:,} pairs" if steps else ""
    text = f"Trained on {sources}{rows}{trained}."
    if not facts.bad:
        return f"{text} Every row that came up could be used."
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in facts.bad.items())
    return f"{text} {sum(facts.bad.values()):,} row(s) could not be used and were left out: {reasons}."


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
