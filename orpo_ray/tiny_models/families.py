"""Tiny models of all families, one class per family, built from the classes of transformers.

Each consists of a tokenizer trained on a few sentences, a model of two or three layers with a width of 32 to 128, and
the family's own processor. Special features of a family are scaled down so that short sequences exercise them: a
sliding window of 8 tokens, soft-capped scores, key heads shared by query heads.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

from orpo_ray.tiny_models.any_resolution import (
    Idefics2,
    LlavaNext,
    LlavaOnevision,
    Mistral3,
    Pixtral,
    Qwen2_5_VL,
    Qwen3_VL,
)
from orpo_ray.tiny_models.cross_attention import Idefics, Mllama
from orpo_ray.tiny_models.parts import CHATML, CHATML_TOKENS, INIT, SMOLVLM_TEMPLATE, VISION, TinyFamily, tiny_tokenizer


class _SmolVLM(TinyFamily):
    """SmolVLM, for the quickstart: 1.4 M parameters, 64 px, pixel shuffle by 2 to 16 image tokens, no tiles."""

    extra_norm_weight = 0.0

    @cached_property
    def tokenizer(self) -> Any:
        return tiny_tokenizer(
            {
                "bos_token": "<|im_start|>",
                "eos_token": "<end_of_utterance>",
                "pad_token": "<pad>",
                "unk_token": "<unk>",
            },
            ("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"),
        )

    def processor(self) -> Any:
        from transformers import Idefics3Processor
        from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

        return Idefics3Processor(
            image_processor=self._image_processor(SmolVLMImageProcessorPil), **self._processor_options()
        )

    def config(self) -> Any:
        from transformers import SmolVLMConfig

        return SmolVLMConfig(**self._config_options())

    def _image_processor(self, kind: Any) -> Any:
        return kind(
            size={"longest_edge": 64},
            max_image_size={"longest_edge": 64},
            do_image_splitting=False,
            image_mean=[0.5, 0.5, 0.5],
            image_std=[0.5, 0.5, 0.5],
        )

    def _processor_options(self) -> dict[str, Any]:
        return {"tokenizer": self.tokenizer, "image_seq_len": 16, "chat_template": SMOLVLM_TEMPLATE}

    def _config_options(self) -> dict[str, Any]:
        special = {name: getattr(self.tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        vision = {
            "hidden_size": 128,
            "intermediate_size": 512,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": 64,
            "patch_size": 8,
            "initializer_range": INIT,
        }
        text = {
            "model_type": "llama",
            "vocab_size": len(self.tokenizer),
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": 2048,
            "initializer_range": INIT,
            "tie_word_embeddings": True,
        }
        return {
            "image_token_id": self.token("<image>"),
            "scale_factor": 2,
            "tie_word_embeddings": True,
            "vision_config": vision,
            "text_config": text | special,
        } | special


class _Idefics3(_SmolVLM):
    """The same model with the classes of Idefics3."""

    def processor(self) -> Any:
        from transformers import Idefics3Processor
        from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

        return Idefics3Processor(
            image_processor=self._image_processor(Idefics3ImageProcessorPil), **self._processor_options()
        )

    def config(self) -> Any:
        from transformers import Idefics3Config

        return Idefics3Config(**self._config_options())


class _Llava(TinyFamily):
    """LLaVA-1.5: CLIP, two query heads per key head, untied output head."""

    @cached_property
    def tokenizer(self) -> Any:
        return tiny_tokenizer(CHATML_TOKENS, ("<image>", "<|im_start|>"))

    def processor(self) -> Any:
        from transformers import LlavaProcessor
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
        return LlavaProcessor(
            image_processor=images,
            tokenizer=self.tokenizer,
            patch_size=8,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=CHATML.format(image="<image>"),
        )

    def config(self) -> Any:
        from transformers import LlavaConfig

        return LlavaConfig(
            vision_config={"model_type": "clip_vision_model", "projection_dim": 32, **VISION},
            text_config=self.text(model_type="llama"),
            image_token_index=self.token("<image>"),
            tie_word_embeddings=False,
        )


class _Gemma3(TinyFamily):
    """Gemma 3: bidirectional attention within an image; two layers of three have a sliding window of 8 tokens."""

    @cached_property
    def tokenizer(self) -> Any:
        named = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
        return tiny_tokenizer(CHATML_TOKENS, ("<|im_start|>", *named.values()), extra_special_tokens=named)

    def processor(self) -> Any:
        from transformers import Gemma3Processor
        from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

        return Gemma3Processor(
            image_processor=Gemma3ImageProcessorPil(size={"height": 32, "width": 32}),
            tokenizer=self.tokenizer,
            image_seq_length=4,
            chat_template=CHATML.format(image="<start_of_image>"),
        )

    def config(self) -> Any:
        from transformers import Gemma3Config

        text = self.text(
            num_hidden_layers=3,
            head_dim=8,
            query_pre_attn_scalar=8,
            sliding_window=8,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        )
        return Gemma3Config(
            vision_config=VISION,
            text_config=text,
            mm_tokens_per_image=4,
            image_token_index=self.token("<image_soft_token>"),
            boi_token_index=self.token("<start_of_image>"),
            eoi_token_index=self.token("<end_of_image>"),
        )

    def model(self) -> Any:
        import torch

        model = super().model()
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(1)
            # transformers initializes this weight to 0, so images would have no effect.
            model.model.multi_modal_projector.mm_input_projection_weight.normal_(std=2 * INIT)
        return model


class _PaliGemma(TinyFamily):
    """PaliGemma 2: bidirectional attention in the prompt, soft-capped scores and logits, a window of 8 tokens."""

    @cached_property
    def tokenizer(self) -> Any:
        named = {"image_token": "<image>"}
        return tiny_tokenizer(CHATML_TOKENS, ("<image>", "<|im_start|>"), extra_special_tokens=named)

    def processor(self) -> Any:
        from transformers import PaliGemmaProcessor
        from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

        images = SiglipImageProcessorPil(size={"height": 32, "width": 32})
        images.image_seq_length = 16
        template = CHATML.format(image="<image>")
        return PaliGemmaProcessor(image_processor=images, tokenizer=self.tokenizer, chat_template=template)

    def config(self) -> Any:
        from transformers import PaliGemmaConfig

        # The processor adds location tokens to the tokenizer, which the vocabulary size must include.
        self.processor()
        text = self.text(
            model_type="gemma2",
            head_dim=8,
            query_pre_attn_scalar=8,
            sliding_window=8,
            attn_logit_softcapping=2.0,
            final_logit_softcapping=15.0,
        )
        return PaliGemmaConfig(
            vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, **VISION},
            text_config=text,
            projection_dim=32,
            image_token_index=self.token("<image>"),
        )


class _InternVL(TinyFamily):
    """InternVL: pixel shuffle by 2, tiles of 32 px plus a thumbnail, Qwen2."""

    needs_torchvision = True

    @cached_property
    def tokenizer(self) -> Any:
        named = {
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        }
        return tiny_tokenizer(CHATML_TOKENS, ("<|im_start|>", *named.values()), extra_special_tokens=named)

    def processor(self) -> Any:
        from transformers import InternVLProcessor
        from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
        from transformers.models.internvl.video_processing_internvl import InternVLVideoProcessor

        return InternVLProcessor(
            image_processor=GotOcr2ImageProcessorPil(
                size={"height": 32, "width": 32}, crop_to_patches=True, min_patches=1, max_patches=2
            ),
            tokenizer=self.tokenizer,
            video_processor=InternVLVideoProcessor(size={"height": 32, "width": 32}),
            image_seq_length=4,
            chat_template=CHATML.format(image="<IMG_CONTEXT>"),
        )

    def config(self) -> Any:
        from transformers import InternVLConfig

        return InternVLConfig(
            vision_config={
                **VISION,
                "model_type": "internvl_vision",
                "image_size": [32, 32],
                "patch_size": [8, 8],
                # With 0, the vision encoder would have no effect at the start.
                "layer_scale_init_value": 1.0,
            },
            text_config=self.text(model_type="qwen2"),
            image_token_id=self.token("<IMG_CONTEXT>"),
            image_seq_length=4,
            downsample_ratio=0.5,
            tie_word_embeddings=False,
        )


TINY_FAMILIES: dict[str, type[TinyFamily]] = {
    "smolvlm": _SmolVLM,
    "idefics": Idefics,
    "idefics2": Idefics2,
    "idefics3": _Idefics3,
    "llava": _Llava,
    "llava_next": LlavaNext,
    "llava_onevision": LlavaOnevision,
    "pixtral": Pixtral,
    "mistral3": Mistral3,
    "gemma3": _Gemma3,
    "paligemma": _PaliGemma,
    "internvl": _InternVL,
    "mllama": Mllama,
    "qwen2_5_vl": Qwen2_5_VL,
    "qwen3_vl": Qwen3_VL,
}
