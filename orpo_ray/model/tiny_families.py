"""How small random vision-language models are made: one class a family, real transformers classes throughout.

Each has a tokenizer trained here on a few sentences, a model of some layers at a width of 32 to 128, and the family's
own processor. What makes the family special is in it and small enough to matter: a sliding window of 8 tokens, caps
on scores, key heads shared by query heads.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

from orpo_ray.data.easy_vqa import COLORS, SHAPES

# What the byte-level tokenizer learns its merges from. Any text tokenises (bytes are the fallback); the words of the
# quickstart's questions become whole tokens.
_CORPUS = """
what color is the shape? what is the color of the shape? what shape is in the image? what shape is present?
what shape does the image contain? what is the red shape? what is the color of the circle? what color is the triangle?
the image is of a rectangle. a blue circle, a green rectangle, a teal triangle, a gray shape, a black circle,
a yellow rectangle, a brown triangle. is there a red shape in the image? yes, there is. no, there is not.
is this statement true of the image? yes, the statement is true. no, the statement is false.
describe the image. how many? which one? one two three four five six seven eight nine ten left right above below
User: Assistant: System: User: Assistant: System: User: Assistant: System:
"""
# transformers' 0.02 is made for models ten times as wide; at this width it costs the quickstart 0.03 of accuracy.
_INIT = 0.06

_SMOLVLM_TEMPLATE = (
    "<|im_start|>{% for m in messages %}{{ m['role'] | capitalize }}:"
    "{% if m['content'] is string %} {{ m['content'] }}{% else %}"
    "{% for part in m['content'] %}{% if part['type'] == 'image' %}<image>"
    "{% elif part['type'] == 'text' %}{{ '' if not loop.first and loop.previtem['type'] == 'image' else ' ' }}"
    "{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)

# Turns as ChatML, an image in place of its part; what stands for an image differs by family.
_CHATML = (
    "{{% for m in messages %}}<|im_start|>{{{{ m['role'] }}}}\n"
    "{{% if m['content'] is string %}}{{{{ m['content'] }}}}{{% else %}}"
    "{{% for part in m['content'] %}}{{% if part['type'] == 'image' %}}{image}\n"
    "{{% elif part['type'] == 'text' %}}{{{{ part['text'] }}}}{{% endif %}}{{% endfor %}}{{% endif %}}"
    "<|im_end|>\n{{% endfor %}}{{% if add_generation_prompt %}}<|im_start|>assistant\n{{% endif %}}"
)
_CHATML_TOKENS = {"bos_token": "<bos>", "eos_token": "<|im_end|>", "pad_token": "<pad>", "unk_token": "<unk>"}


def tiny_tokenizer(special_tokens: dict[str, str], extra_tokens: tuple[str, ...] = (), **more: Any) -> Any:
    """A byte-level BPE tokenizer of 512 tokens plus `extra_tokens`; `special_tokens` names bos, eos, pad and unk."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=[*dict.fromkeys(special_tokens.values()), *extra_tokens],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    words = [f" {word} {word}." for word in (*SHAPES, *COLORS, "yes", "no", "true", "false")] * 8
    backend.train_from_iterator([*_CORPUS.strip().splitlines(), *words], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        additional_special_tokens=list(extra_tokens),
        padding_side="right",
        **special_tokens,
        **more,
    )


class TinyFamily:
    """A family's small model and processor. Subclasses say how; both are the same every time."""

    @cached_property
    def tokenizer(self) -> Any:
        """A byte-level tokenizer with the family's special tokens."""
        raise NotImplementedError

    def processor(self) -> Any:
        """The family's own processor. Raises ImportError where it needs what is not installed."""
        raise NotImplementedError

    def config(self) -> Any:
        """The model's config."""
        raise NotImplementedError

    def model(self) -> Any:
        """The model with random weights."""
        import torch
        from transformers import AutoModelForImageTextToText

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return AutoModelForImageTextToText.from_config(self.config())

    def _token(self, token: str) -> int:
        return int(self.tokenizer.convert_tokens_to_ids(token))

    def _text(self, **more: Any) -> dict[str, Any]:
        """What all language models here have in common."""
        return {
            "vocab_size": len(self.tokenizer),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
            "initializer_range": 2 * _INIT,
            "bos_token_id": self.tokenizer.bos_token_id,
            "eos_token_id": self.tokenizer.eos_token_id,
            "pad_token_id": self.tokenizer.pad_token_id,
        } | more


# 32 px in patches of 8: 16 of them.
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
    "initializer_range": 2 * _INIT,
}


class _SmolVLM(TinyFamily):
    """About 1.4 M parameters, what the quickstart trains: 64 px, pixel shuffle by 2 to 16 image tokens, no tiles."""

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

        return Idefics3Processor(image_processor=self._images(SmolVLMImageProcessorPil), **self._rest())

    def config(self) -> Any:
        from transformers import SmolVLMConfig

        return SmolVLMConfig(**self._sections())

    def _images(self, kind: Any) -> Any:
        return kind(
            size={"longest_edge": 64},
            max_image_size={"longest_edge": 64},
            do_image_splitting=False,
            image_mean=[0.5, 0.5, 0.5],
            image_std=[0.5, 0.5, 0.5],
        )

    def _rest(self) -> dict[str, Any]:
        return {"tokenizer": self.tokenizer, "image_seq_len": 16, "chat_template": _SMOLVLM_TEMPLATE}

    def _sections(self) -> dict[str, Any]:
        special = {name: getattr(self.tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        vision = {
            "hidden_size": 128,
            "intermediate_size": 512,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": 64,
            "patch_size": 8,
            "initializer_range": _INIT,
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
            "initializer_range": _INIT,
            "tie_word_embeddings": True,
        }
        return {
            "image_token_id": self._token("<image>"),
            "scale_factor": 2,
            "tie_word_embeddings": True,
            "vision_config": vision,
            "text_config": text | special,
        } | special


class _Idefics3(_SmolVLM):
    """The same in Idefics3's classes."""

    def processor(self) -> Any:
        from transformers import Idefics3Processor
        from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

        return Idefics3Processor(image_processor=self._images(Idefics3ImageProcessorPil), **self._rest())

    def config(self) -> Any:
        from transformers import Idefics3Config

        return Idefics3Config(**self._sections())


class _Llava(TinyFamily):
    """CLIP, two query heads a key head, a head of its own (untied)."""

    @cached_property
    def tokenizer(self) -> Any:
        return tiny_tokenizer(_CHATML_TOKENS, ("<image>", "<|im_start|>"))

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
            chat_template=_CHATML.format(image="<image>"),
        )

    def config(self) -> Any:
        from transformers import LlavaConfig

        return LlavaConfig(
            vision_config={"model_type": "clip_vision_model", "projection_dim": 32, **_VISION},
            text_config=self._text(model_type="llama"),
            image_token_index=self._token("<image>"),
            tie_word_embeddings=False,
        )


class _Gemma3(TinyFamily):
    """Image tokens see each other; two layers of three look 8 tokens back."""

    @cached_property
    def tokenizer(self) -> Any:
        named = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
        return tiny_tokenizer(_CHATML_TOKENS, ("<|im_start|>", *named.values()), extra_special_tokens=named)

    def processor(self) -> Any:
        from transformers import Gemma3Processor
        from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

        return Gemma3Processor(
            image_processor=Gemma3ImageProcessorPil(size={"height": 32, "width": 32}),
            tokenizer=self.tokenizer,
            image_seq_length=4,
            chat_template=_CHATML.format(image="<start_of_image>"),
        )

    def config(self) -> Any:
        from transformers import Gemma3Config

        text = self._text(
            num_hidden_layers=3,
            head_dim=8,
            query_pre_attn_scalar=8,
            sliding_window=8,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        )
        return Gemma3Config(
            vision_config=_VISION,
            text_config=text,
            mm_tokens_per_image=4,
            image_token_index=self._token("<image_soft_token>"),
            boi_token_index=self._token("<start_of_image>"),
            eoi_token_index=self._token("<end_of_image>"),
        )


class _PaliGemma(TinyFamily):
    """PaliGemma 2: the whole prompt sees itself, scores and logits are capped, one layer of two looks 8 tokens back."""

    @cached_property
    def tokenizer(self) -> Any:
        named = {"image_token": "<image>"}
        return tiny_tokenizer(_CHATML_TOKENS, ("<image>", "<|im_start|>"), extra_special_tokens=named)

    def processor(self) -> Any:
        from transformers import PaliGemmaProcessor
        from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

        images = SiglipImageProcessorPil(size={"height": 32, "width": 32})
        images.image_seq_length = 16
        template = _CHATML.format(image="<image>")
        return PaliGemmaProcessor(image_processor=images, tokenizer=self.tokenizer, chat_template=template)

    def config(self) -> Any:
        from transformers import PaliGemmaConfig

        # The processor adds its tokens for places to the tokenizer, so they must be counted.
        self.processor()
        text = self._text(
            model_type="gemma2",
            head_dim=8,
            query_pre_attn_scalar=8,
            sliding_window=8,
            attn_logit_softcapping=2.0,
            final_logit_softcapping=5.0,
        )
        return PaliGemmaConfig(
            vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, **_VISION},
            text_config=text,
            projection_dim=32,
            image_token_index=self._token("<image>"),
        )


class _Qwen2_5_VL(TinyFamily):  # noqa: N801 - the family's name
    """Images of any size, positions with three axes, windows in the vision part."""

    @cached_property
    def tokenizer(self) -> Any:
        return tiny_tokenizer(
            _CHATML_TOKENS, ("<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
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
            chat_template=_CHATML.format(image="<|vision_start|><|image_pad|><|vision_end|>"),
        )

    def config(self) -> Any:
        from transformers import Qwen2_5_VLConfig

        vision = {
            "hidden_size": 32, "intermediate_size": 64, "depth": 2, "num_heads": 4, "patch_size": 8,
            "out_hidden_size": 32, "window_size": 32, "fullatt_block_indexes": [1], "initializer_range": 2 * _INIT,
        }  # fmt: skip
        rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
        return Qwen2_5_VLConfig(
            vision_config=vision,
            text_config=self._text(rope_parameters=rope),
            image_token_id=self._token("<|image_pad|>"),
            video_token_id=self._token("<|video_pad|>"),
            vision_start_token_id=self._token("<|vision_start|>"),
            vision_end_token_id=self._token("<|vision_end|>"),
            tie_word_embeddings=False,
        )


TINY_FAMILIES: dict[str, type[TinyFamily]] = {
    "smolvlm": _SmolVLM,
    "idefics3": _Idefics3,
    "llava": _Llava,
    "gemma3": _Gemma3,
    "paligemma": _PaliGemma,
    "qwen2_5_vl": _Qwen2_5_VL,
}
