"""Tiny models of the families that take images of any size, as tiles or as a variable number of patches."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from orpo_ray.tiny_models.parts import CHATML, CHATML_TOKENS, INIT, SMOLVLM_TEMPLATE, VISION, TinyFamily, tiny_tokenizer

# Grids of tiles in pixels (height, width): one tile, two side by side, two on top of each other.
_GRIDS = [[32, 32], [32, 64], [64, 32]]


class LlavaNext(TinyFamily):
    """LLaVA-1.6: up to two CLIP tiles plus a thumbnail, no padding, a token at the end of each row; Mistral."""

    @cached_property
    def tokenizer(self) -> Any:
        return tiny_tokenizer(CHATML_TOKENS, ("<image>", "<|im_start|>"))

    def processor(self) -> Any:
        from transformers import LlavaNextProcessor
        from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

        images = LlavaNextImageProcessorPil(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_grid_pinpoints=_GRIDS
        )
        return LlavaNextProcessor(
            image_processor=images,
            tokenizer=self.tokenizer,
            patch_size=8,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=CHATML.format(image="<image>"),
        )

    def config(self) -> Any:
        from transformers import LlavaNextConfig

        return LlavaNextConfig(
            vision_config={"model_type": "clip_vision_model", "projection_dim": 32, **VISION},
            text_config=self.text(model_type="mistral", sliding_window=None),
            image_token_index=self.token("<image>"),
            image_grid_pinpoints=_GRIDS,
            image_seq_length=16,
            tie_word_embeddings=False,
        )


class LlavaOnevision(TinyFamily):
    """LLaVA-OneVision: SigLIP tiles for a single image, one tile per image for several images; Qwen2."""

    needs_torchvision = True

    @cached_property
    def tokenizer(self) -> Any:
        return tiny_tokenizer(CHATML_TOKENS, ("<image>", "<video>", "<|im_start|>"))

    def processor(self) -> Any:
        from transformers import LlavaOnevisionProcessor
        from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
            LlavaOnevisionImageProcessorPil,
        )
        from transformers.models.llava_onevision.video_processing_llava_onevision import LlavaOnevisionVideoProcessor

        return LlavaOnevisionProcessor(
            image_processor=LlavaOnevisionImageProcessorPil(
                size={"height": 32, "width": 32}, image_grid_pinpoints=_GRIDS
            ),
            tokenizer=self.tokenizer,
            video_processor=LlavaOnevisionVideoProcessor(size={"height": 32, "width": 32}),
            num_image_tokens=16,
            vision_feature_select_strategy="full",
            chat_template=CHATML.format(image="<image>"),
        )

    def config(self) -> Any:
        from transformers import LlavaOnevisionConfig

        return LlavaOnevisionConfig(
            vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, **VISION},
            text_config=self.text(model_type="qwen2"),
            image_token_index=self.token("<image>"),
            video_token_index=self.token("<video>"),
            image_grid_pinpoints=_GRIDS,
            tie_word_embeddings=False,
        )


class Idefics2(TinyFamily):
    """Idefics2: images keep their aspect ratio and are padded; a perceiver reduces each to 4 tokens; Mistral."""

    @cached_property
    def tokenizer(self) -> Any:
        return tiny_tokenizer(
            {
                "bos_token": "<|im_start|>",
                "eos_token": "<end_of_utterance>",
                "pad_token": "<pad>",
                "unk_token": "<unk>",
            },
            ("<image>", "<fake_token_around_image>", "<end_of_utterance>"),
        )

    def processor(self) -> Any:
        from transformers import Idefics2Processor
        from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil

        images = Idefics2ImageProcessorPil(
            size={"shortest_edge": 16, "longest_edge": 32}, do_image_splitting=False, image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
        )  # fmt: skip
        return Idefics2Processor(
            image_processor=images, tokenizer=self.tokenizer, image_seq_len=4, chat_template=SMOLVLM_TEMPLATE
        )

    def config(self) -> Any:
        from transformers import Idefics2Config

        perceiver = {
            "hidden_size": 32, "resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 4,
            "resampler_head_dim": 8, "num_key_value_heads": 2,
        }  # fmt: skip
        return Idefics2Config(
            vision_config=VISION,
            perceiver_config=perceiver,
            text_config=self.text(model_type="mistral", sliding_window=None),
            image_token_id=self.token("<image>"),
            tie_word_embeddings=False,
        )


_PIXTRAL = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32,
    "patch_size": 8, "initializer_range": 2 * INIT, "model_type": "pixtral",
}  # fmt: skip


class Pixtral(TinyFamily):
    """Pixtral: LLaVA's classes with Pixtral's vision encoder, and a token at the end of each row of patches."""

    needs_torchvision = True
    merge = 1

    @cached_property
    def tokenizer(self) -> Any:
        return tiny_tokenizer(CHATML_TOKENS, ("[IMG]", "[IMG_BREAK]", "[IMG_END]", "<|im_start|>"))

    def processor(self) -> Any:
        from transformers import PixtralProcessor
        from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

        images = PixtralImageProcessorPil(size={"longest_edge": 32}, patch_size={"height": 8, "width": 8})
        return PixtralProcessor(
            image_processor=images,
            tokenizer=self.tokenizer,
            patch_size=8,
            spatial_merge_size=self.merge,
            chat_template=CHATML.format(image="[IMG]"),
        )

    def config(self) -> Any:
        from transformers import LlavaConfig

        return LlavaConfig(
            vision_config=_PIXTRAL,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
            text_config=self.text(model_type="mistral", sliding_window=None),
            image_token_index=self.token("[IMG]"),
            tie_word_embeddings=False,
        )


class Mistral3(Pixtral):
    """Mistral 3: Pixtral's vision encoder, with four patches merged into one token."""

    merge = 2

    def config(self) -> Any:
        from transformers import Mistral3Config

        return Mistral3Config(
            vision_config=_PIXTRAL,
            text_config=self.text(model_type="mistral", sliding_window=None, head_dim=8),
            image_token_index=self.token("[IMG]"),
            spatial_merge_size=2,
            tie_word_embeddings=False,
        )


class Qwen2_5_VL(TinyFamily):  # noqa: N801 - the family's name
    """Qwen2.5-VL: positions with three axes, window attention in the vision encoder."""

    needs_torchvision = True

    @cached_property
    def tokenizer(self) -> Any:
        return tiny_tokenizer(
            CHATML_TOKENS, ("<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
        )

    def processor(self) -> Any:
        from transformers import Qwen2_5_VLProcessor
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
        from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

        sizes = {"patch_size": 8, "merge_size": 2, "size": {"shortest_edge": 32 * 32, "longest_edge": 64 * 64}}
        return Qwen2_5_VLProcessor(
            image_processor=Qwen2VLImageProcessor(**sizes),
            tokenizer=self.tokenizer,
            video_processor=Qwen2VLVideoProcessor(**sizes),
            chat_template=CHATML.format(image="<|vision_start|><|image_pad|><|vision_end|>"),
        )

    def config(self) -> Any:
        from transformers import Qwen2_5_VLConfig

        vision = {
            "hidden_size": 32, "intermediate_size": 64, "depth": 2, "num_heads": 4, "patch_size": 8,
            "out_hidden_size": 32, "window_size": 32, "fullatt_block_indexes": [1], "initializer_range": 2 * INIT,
        }  # fmt: skip
        rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
        return Qwen2_5_VLConfig(
            vision_config=vision,
            text_config=self.text(rope_parameters=rope),
            image_token_id=self.token("<|image_pad|>"),
            video_token_id=self.token("<|video_pad|>"),
            vision_start_token_id=self.token("<|vision_start|>"),
            vision_end_token_id=self.token("<|vision_end|>"),
            tie_word_embeddings=False,
        )


class Qwen3_VL(Qwen2_5_VL):  # noqa: N801 - the family's name
    """Qwen3-VL: features of inner vision layers are also added to the first language layers."""

    def processor(self) -> Any:
        from transformers import Qwen3VLProcessor
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
        from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

        sizes = {"patch_size": 8, "merge_size": 2, "size": {"shortest_edge": 32 * 32, "longest_edge": 64 * 64}}
        return Qwen3VLProcessor(
            image_processor=Qwen2VLImageProcessor(**sizes),
            tokenizer=self.tokenizer,
            video_processor=Qwen3VLVideoProcessor(**sizes),
            chat_template=CHATML.format(image="<|vision_start|><|image_pad|><|vision_end|>"),
        )

    def config(self) -> Any:
        from transformers import Qwen3VLConfig

        vision = {
            "hidden_size": 32, "intermediate_size": 64, "depth": 2, "num_heads": 4, "patch_size": 8,
            "out_hidden_size": 32, "num_position_embeddings": 64, "deepstack_visual_indexes": [0],
            "initializer_range": 2 * INIT,
        }  # fmt: skip
        rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
        return Qwen3VLConfig(
            vision_config=vision,
            text_config=self.text(rope_parameters=rope, head_dim=8),
            image_token_id=self.token("<|image_pad|>"),
            video_token_id=self.token("<|video_pad|>"),
            vision_start_token_id=self.token("<|vision_start|>"),
            vision_end_token_id=self.token("<|vision_end|>"),
            tie_word_embeddings=False,
        )
