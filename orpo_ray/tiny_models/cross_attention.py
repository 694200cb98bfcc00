"""Tiny models of the families whose language layers attend to images by cross-attention."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from orpo_ray.tiny_models.parts import CHATML, CHATML_TOKENS, INIT, VISION, TinyFamily, tiny_tokenizer


class Idefics(TinyFamily):
    """Idefics (open Flamingo): a perceiver, and a gated cross-attention layer before every second language layer."""

    @cached_property
    def tokenizer(self) -> Any:
        named = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
        tokenizer = tiny_tokenizer(named, ("<end_of_utterance>",))
        # Added last, since the model stores the embeddings of these two tokens in a separate table.
        tokenizer.add_tokens(["<fake_token_around_image>", "<image>"], special_tokens=True)
        return tokenizer

    def processor(self) -> Any:
        from transformers import IdeficsProcessor
        from transformers.models.idefics.image_processing_pil_idefics import IdeficsImageProcessorPil

        return IdeficsProcessor(IdeficsImageProcessorPil(image_size=32), self.tokenizer, image_size=32)

    def config(self) -> Any:
        from transformers import IdeficsConfig

        vision = {
            "embed_dim": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
            "image_size": 32, "patch_size": 8, "initializer_range": 2 * INIT,
        }  # fmt: skip
        perceiver = {
            "use_resampler": True, "resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 4,
            "resampler_head_dim": 8,
        }  # fmt: skip
        text = self.text(vocab_size=len(self.tokenizer) - 2)
        text.pop("num_key_value_heads")
        return IdeficsConfig(
            **text,
            additional_vocab_size=2,
            # Gates initialized to 0 would block the images at first.
            alpha_initializer="ones",
            cross_layer_interval=2,
            use_resampler=True,
            vision_config=vision,
            perceiver_config=perceiver,
        )


class Mllama(TinyFamily):
    """Llama-3.2-Vision: up to two tiles, one cross-attention layer among three language layers."""

    @cached_property
    def tokenizer(self) -> Any:
        return tiny_tokenizer(CHATML_TOKENS, ("<|im_start|>", "<|python_tag|>", "<|image|>"))

    def processor(self) -> Any:
        from transformers import MllamaProcessor
        from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

        return MllamaProcessor(
            image_processor=MllamaImageProcessorPil(size={"height": 32, "width": 32}, max_image_tiles=2),
            tokenizer=self.tokenizer,
            chat_template="{{ bos_token }}" + CHATML.format(image="<|image|>"),
        )

    def config(self) -> Any:
        from transformers import MllamaConfig

        vision = {
            **{name: VISION[name] for name in ("hidden_size", "intermediate_size", "image_size", "patch_size")},
            "num_hidden_layers": 2,
            "num_global_layers": 1,
            "attention_heads": 4,
            "intermediate_layers_indices": [0],
            "vision_output_dim": 64,
            "max_num_tiles": 2,
            "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
            "initializer_range": 2 * INIT,
        }
        text = self.text(num_hidden_layers=3, cross_attention_layers=[1])
        return MllamaConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=self.token("<|image|>"),
            tie_word_embeddings=False,
        )

    def model(self) -> Any:
        import torch

        model = super().model()
        # As in Idefics, gates initialized to 0 would block the images at first.
        for name, parameter in model.named_parameters():
            if name.endswith(("_gate", "gate_attn", "gate_ffn", "position_embedding.gate")):
                with torch.no_grad():
                    parameter.fill_(1.0)
        return model
