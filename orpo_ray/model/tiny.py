"""Small random vision-language models with a real processor, made offline and deterministically.

They are named in a recipe like any other model (`model.id: orpo-ray/tiny-smolvlm`), so that the quickstart and the
tests run the real program: real transformers classes, a real tokenizer, a real image processor.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orpo_ray.data.easy_vqa import COLORS, SHAPES
from orpo_ray.errors import UserError

PREFIX = "orpo-ray/tiny-"

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


def is_tiny(model_id: str) -> bool:
    """Whether `model_id` names a model of this file rather than one of the hub or of a folder."""
    return model_id.startswith(PREFIX)


def tiny_model_path(model_id: str) -> Path:
    """The folder of a tiny model in the usual Hugging Face layout; it is made on first use and cached.

    The cache is `$ORPO_RAY_CACHE`, by default `~/.cache/orpo-ray`. Two processes may ask at once: each builds in a
    folder of its own and the first rename wins.
    """
    name = model_id.removeprefix(PREFIX)
    builder = _BUILDERS.get(name)
    if builder is None:
        known = ", ".join(PREFIX + n for n in sorted(_BUILDERS))
        raise UserError("no such tiny model", field="model.id", value=model_id, fix=f"use one of: {known}")
    source = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
    cache = Path(os.environ.get("ORPO_RAY_CACHE", Path.home() / ".cache" / "orpo-ray"))
    folder = cache / f"tiny-{name}-{source}"
    if not folder.is_dir():
        from transformers.utils.logging import disable_progress_bar

        cache.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=cache, prefix=f".tiny-{name}-"))
        model, processor = builder()
        disable_progress_bar()
        model.save_pretrained(scratch)
        processor.save_pretrained(scratch)
        try:
            scratch.rename(folder)
        except OSError:  # another process was first
            shutil.rmtree(scratch)
            if not folder.is_dir():
                raise
    return folder


def tiny_tokenizer(special_tokens: dict[str, str], extra_tokens: tuple[str, ...] = ()) -> Any:
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
        tokenizer_object=backend, additional_special_tokens=list(extra_tokens), padding_side="right", **special_tokens
    )


def _smolvlm() -> tuple[Any, Any]:
    """About 1.4 M parameters: 64 px, patches of 8, pixel shuffle by 2 to 16 image tokens, no tiles."""
    import torch
    from transformers import Idefics3Processor, SmolVLMConfig, SmolVLMForConditionalGeneration
    from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

    extra = ("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>")
    tokenizer = tiny_tokenizer(
        {"bos_token": "<|im_start|>", "eos_token": "<end_of_utterance>", "pad_token": "<pad>", "unk_token": "<unk>"},
        extra,
    )
    processor = Idefics3Processor(
        image_processor=SmolVLMImageProcessorPil(
            size={"longest_edge": 64},
            max_image_size={"longest_edge": 64},
            do_image_splitting=False,
            image_mean=[0.5, 0.5, 0.5],
            image_std=[0.5, 0.5, 0.5],
        ),
        tokenizer=tokenizer,
        image_seq_len=16,
        chat_template=_SMOLVLM_TEMPLATE,
    )
    config = SmolVLMConfig(
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        tie_word_embeddings=True,
        vision_config={
            "hidden_size": 128,
            "intermediate_size": 512,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": 64,
            "patch_size": 8,
            "initializer_range": _INIT,
        },
        text_config={
            "model_type": "llama",
            "vocab_size": len(tokenizer),
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": 2048,
            "initializer_range": _INIT,
            "tie_word_embeddings": True,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = SmolVLMForConditionalGeneration(config)
    return model, processor


_BUILDERS: dict[str, Callable[[], tuple[Any, Any]]] = {"smolvlm": _smolvlm}
