"""Configs of well-known models, used by `orpo-ray plan` when the hub cannot be reached.

Values that determine sizes are from each model's config.json on the Hugging Face hub; all others are the defaults of
transformers. tests/unit/planning/test_planning.py compares the resulting number of parameters with the one that the hub
publishes for the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class KnownShape:
    """The config of a well-known model."""

    model_type: str
    """Name of the config class in transformers."""
    options: dict[str, Any]
    """Arguments of the config class."""
    parameters: int
    """Number of parameters according to the hub."""

    def config(self) -> Any:
        """Build the config."""
        from transformers import AutoConfig

        return AutoConfig.for_model(self.model_type, **self.options)


# SigLIP so400m (google/siglip-so400m-patch14-384) and base (google/siglip-base-patch16-512), CLIP ViT-L/14 at 336 px
# (openai/clip-vit-large-patch14-336): vision encoders.
_SO400M = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
_SIGLIP_BASE = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
_CLIP_L = {
    "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
    "num_attention_heads": 16, "image_size": 336, "patch_size": 14, "projection_dim": 768, "vocab_size": 32000,
}  # fmt: skip


def _text(
    model_type: str, hidden: int, inner: int, layers: int, heads: int, key_heads: int, vocab: int, **more: Any
) -> dict[str, Any]:
    return {
        "model_type": model_type, "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": key_heads, "vocab_size": vocab,
        "max_position_embeddings": 8192, "pad_token_id": 0, **more,
    }  # fmt: skip


def _smolvlm(
    text: dict[str, Any], vision: dict[str, Any], image: int, patch: int, scale: int, parameters: int
) -> KnownShape:
    # HuggingFaceTB/SmolVLM-*: classes of Idefics3 with SmolLM2 and SigLIP.
    options = {
        "text_config": text, "vision_config": vision | {"image_size": image, "patch_size": patch},
        "scale_factor": scale, "tie_word_embeddings": False, "image_token_id": 7, "pad_token_id": 0,
    }  # fmt: skip
    return KnownShape("idefics3", options, parameters)


def _llava_next(text: dict[str, Any], parameters: int) -> KnownShape:
    pinpoints = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
    options = {
        "text_config": text, "vision_config": _CLIP_L, "image_grid_pinpoints": pinpoints, "image_token_index": 7,
        "tie_word_embeddings": False, "projector_hidden_act": "gelu",
    }  # fmt: skip
    return KnownShape("llava_next", options, parameters)


def _gemma3(
    hidden: int, inner: int, layers: int, heads: int, key_heads: int, head: int, scalar: int, parameters: int
) -> KnownShape:
    text = _text("gemma3_text", hidden, inner, layers, heads, key_heads, 262208)
    text |= {"head_dim": head, "query_pre_attn_scalar": scalar, "sliding_window": 1024}
    vision = _SO400M | {
        "model_type": "siglip_vision_model",
        "image_size": 896,
        "patch_size": 14,
        "vision_use_head": False,
    }
    options = {"text_config": text, "vision_config": vision, "mm_tokens_per_image": 256, "image_token_index": 262144}
    return KnownShape("gemma3", options, parameters)


def _qwen2_5_vl(text: tuple[int, int, int, int, int], inner: int, parameters: int) -> KnownShape:
    rope = {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [16, 24, 24]}
    vision = {
        "depth": 32, "hidden_size": 1280, "intermediate_size": inner, "num_heads": 16, "out_hidden_size": text[0],
        "patch_size": 14, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31],
    }  # fmt: skip
    options = {
        "text_config": _text("qwen2_5_vl_text", *text, 152064, rope_parameters=rope), "vision_config": vision,
        "tie_word_embeddings": False, "image_token_id": 151655, "video_token_id": 151656,
        "vision_start_token_id": 151652, "vision_end_token_id": 151653,
    }  # fmt: skip
    return KnownShape("qwen2_5_vl", options, parameters)


_IDEFICS2 = KnownShape(
    "idefics2",
    {
        "text_config": _text("mistral", 4096, 14336, 32, 32, 8, 32003),
        "vision_config": _SO400M | {"image_size": 980, "patch_size": 14},
        "perceiver_config": {
            "hidden_size": 4096, "resampler_n_latents": 64, "resampler_depth": 3, "resampler_n_heads": 16,
            "resampler_head_dim": 96, "num_key_value_heads": 4,
        },
        "tie_word_embeddings": False, "image_token_id": 7,
    },
    8_402_768_112,
)  # fmt: skip

KNOWN_SHAPES: dict[str, KnownShape] = {
    "HuggingFaceTB/SmolVLM-256M-Instruct": _smolvlm(
        _text("llama", 576, 1536, 30, 9, 3, 49280), _SIGLIP_BASE, 512, 16, 4, 256_484_928
    ),
    "HuggingFaceTB/SmolVLM-500M-Instruct": _smolvlm(
        _text("llama", 960, 2560, 32, 15, 5, 49280), _SIGLIP_BASE, 512, 16, 4, 507_482_304
    ),
    "HuggingFaceTB/SmolVLM-Instruct": _smolvlm(
        _text("llama", 2048, 8192, 24, 32, 32, 49155), _SO400M, 384, 14, 3, 2_246_272_880
    ),
    "llava-hf/llava-v1.6-mistral-7b-hf": _llava_next(_text("mistral", 4096, 14336, 32, 32, 8, 32064), 7_566_747_648),
    "llava-hf/llava-v1.6-vicuna-7b-hf": _llava_next(_text("llama", 4096, 11008, 32, 32, 32, 32064), 7_063_431_168),
    "google/gemma-3-4b-it": _gemma3(2560, 10240, 34, 8, 4, 256, 256, 4_300_079_472),
    "google/gemma-3-12b-it": _gemma3(3840, 15360, 48, 16, 8, 256, 256, 12_187_325_040),
    "google/gemma-3-27b-it": _gemma3(5376, 21504, 62, 32, 16, 128, 168, 27_432_406_640),
    "HuggingFaceM4/idefics2-8b": _IDEFICS2,
    "Qwen/Qwen2.5-VL-7B-Instruct": _qwen2_5_vl((3584, 18944, 28, 28, 4), 3420, 8_292_166_656),
    "Qwen/Qwen2.5-VL-72B-Instruct": _qwen2_5_vl((8192, 29568, 80, 64, 8), 3456, 73_410_777_344),
}
