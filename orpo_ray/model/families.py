"""The few facts that differ by family of vision-language model, one entry each.

A family is named by its config's `model_type`. What transformers states itself (image token, head, processor) is
asked there and does not stand here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

# Layers that attend from token to token, and to nothing else: the ones that can share a prefix.
_ATTENTION_LAYERS = {"full_attention", "sliding_attention"}
# Language models shown equal on both paths by the tests. Others may add to scores what the path does not know of
# (sinks, ALiBi), or not ask for the registered attention at all.
PROVEN_LANGUAGE_MODELS = {
    "llama", "mistral", "ministral3", "qwen2", "qwen3", "phi3", "gemma", "gemma2", "gemma3_text", "qwen2_5_vl_text",
    "qwen3_vl_text", "smollm3",
}  # fmt: skip


@dataclass(frozen=True)
class Bidirectional:
    """Which tokens of a prompt see those behind them: the ones of the same image, or the whole prompt's.

    within_window: whether a sliding window limits that too.
    """

    what: Literal["images", "prompt"]
    within_window: bool


Prefixes = tuple[str, ...]


@dataclass(frozen=True)
class Family:
    """Where the parts are, as names below the `...ForConditionalGeneration` model, and what is not plainly causal.

    vision, connector, language: prefixes of parameter names; the connector's may lie inside the vision part's.
    cross_attention: no image tokens in the row; layers of the language model look at the images. nested_images: the
    vision input has a leading batch dimension, [1, tiles, 3, H, W]. image_inputs: which tensors of the processor the
    vision part takes. bidirectional: what is exempt from the causal mask. token_types: how the model's own forward
    calls the tensor that tells it so. first_position: position of a sequence's first token. multi_axis_positions:
    positions have three axes, which the model's `get_rope_index` gives. softcaps_logits: the head caps by
    `final_logit_softcapping`. is_derived: not one of the families below, but read off its class.
    """

    vision: Prefixes
    connector: Prefixes
    language: Prefixes
    cross_attention: bool = False
    nested_images: bool = False
    image_inputs: tuple[str, ...] = ("pixel_values",)
    bidirectional: Bidirectional | None = None
    token_types: str | None = None
    first_position: int = 0
    multi_axis_positions: bool = False
    softcaps_logits: bool = False
    is_derived: bool = False

    def prefix(self, part: str) -> Prefixes:
        """Parameter prefixes of `vision`, `connector` or `language`, as `str.startswith` takes them."""
        return {"vision": self.vision, "connector": self.connector, "language": self.language}[part]


_LLAVA = Family(
    vision=("model.vision_tower.",),
    connector=("model.multi_modal_projector.",),
    language=("model.language_model.",),
    image_inputs=("pixel_values", "image_sizes"),
)
_LLAVA_NEXT = replace(_LLAVA, connector=("model.multi_modal_projector.", "model.image_newline"))
_IDEFICS3 = Family(
    vision=("model.vision_model.",),
    connector=("model.connector.",),
    language=("model.text_model.",),
    nested_images=True,
    image_inputs=("pixel_values", "pixel_attention_mask"),
)
_QWEN_VL = Family(
    vision=("model.visual.",),
    connector=("model.visual.merger.", "model.visual.deepstack_merger_list."),
    language=("model.language_model.",),
    image_inputs=("pixel_values", "image_grid_thw"),
    token_types="mm_token_type_ids",
    multi_axis_positions=True,
)

FAMILIES: dict[str, Family] = {
    "smolvlm": _IDEFICS3,
    "idefics": Family(
        vision=("model.vision_model.",),
        connector=("model.perceiver_resampler.", "model.gated_cross_attn_layers."),
        language=("model.layers.", "model.embed_tokens.", "model.norm."),
        cross_attention=True,
    ),
    "idefics2": _IDEFICS3,
    "idefics3": _IDEFICS3,
    "llava": _LLAVA,
    "llava_next": _LLAVA_NEXT,
    "llava_onevision": replace(_LLAVA_NEXT, image_inputs=("pixel_values", "image_sizes", "batch_num_images")),
    "mistral3": _LLAVA,
    "internvl": _LLAVA,
    "gemma3": replace(_LLAVA, bidirectional=Bidirectional("images", within_window=True), token_types="token_type_ids"),
    "paligemma": replace(
        _LLAVA,
        bidirectional=Bidirectional("prompt", within_window=False),
        token_types="token_type_ids",
        first_position=1,
        softcaps_logits=True,
    ),
    "mllama": replace(
        _LLAVA,
        vision=("model.vision_model.",),
        image_inputs=("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask"),
        cross_attention=True,
    ),
    "qwen2_5_vl": _QWEN_VL,
    "qwen3_vl": _QWEN_VL,
}


def why_not_shared_prefix(config: Any, family: Family) -> str | None:
    """Why a model with this transformers config must take the concatenated path; None if it need not."""
    if family.is_derived:
        return f"the family {config.model_type} is not known, what is needed of it was derived"
    if family.cross_attention:
        return "its language model looks at images by cross-attention"
    text = config.get_text_config()
    if others := set(getattr(text, "layer_types", None) or ()) - _ATTENTION_LAYERS:
        return f"the language model has layers of type {', '.join(sorted(others))}"
    if text.model_type not in PROVEN_LANGUAGE_MODELS:
        return f"it is not proven for the language model {text.model_type}"
    if getattr(text, "use_bidirectional_attention", False) and family.bidirectional is None:
        return "the language model is bidirectional"
    return None
