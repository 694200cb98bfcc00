"""Common parts of the tiny models: a tokenizer trained on a few sentences, chat templates, sizes."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from orpo_ray.tiny_models.easy_vqa import COLORS, SHAPES

# Training text of the byte-level tokenizer. Words of the quickstart's questions become single tokens; any other text
# falls back to bytes.
_CORPUS = """
what color is the shape? what is the color of the shape? what shape is in the image? what shape is present?
what shape does the image contain? what is the red shape? what is the color of the circle? what color is the triangle?
the image is of a rectangle. a blue circle, a green rectangle, a teal triangle, a gray shape, a black circle,
a yellow rectangle, a brown triangle. is there a red shape in the image? yes, there is. no, there is not.
is this statement true of the image? yes, the statement is true. no, the statement is false.
describe the image. how many? which one? one two three four five six seven eight nine ten left right above below
User: Assistant: System: User: Assistant: System: User: Assistant: System:
"""
# The default of transformers, 0.02, suits models ten times as wide; here it costs the quickstart 0.03 of accuracy.
INIT = 0.06

SMOLVLM_TEMPLATE = (
    "<|im_start|>{% for m in messages %}{{ m['role'] | capitalize }}:"
    "{% if m['content'] is string %} {{ m['content'] }}{% else %}"
    "{% for part in m['content'] %}{% if part['type'] == 'image' %}<image>"
    "{% elif part['type'] == 'text' %}{{ '' if not loop.first and loop.previtem['type'] == 'image' else ' ' }}"
    "{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)

# Messages as ChatML. The image token differs between families.
CHATML = (
    "{{% for m in messages %}}<|im_start|>{{{{ m['role'] }}}}\n"
    "{{% if m['content'] is string %}}{{{{ m['content'] }}}}{{% else %}}"
    "{{% for part in m['content'] %}}{{% if part['type'] == 'image' %}}{image}\n"
    "{{% elif part['type'] == 'text' %}}{{{{ part['text'] }}}}{{% endif %}}{{% endfor %}}{{% endif %}}"
    "<|im_end|>\n{{% endfor %}}{{% if add_generation_prompt %}}<|im_start|>assistant\n{{% endif %}}"
)
CHATML_TOKENS = {"bos_token": "<bos>", "eos_token": "<|im_end|>", "pad_token": "<pad>", "unk_token": "<unk>"}


def tiny_tokenizer(special_tokens: dict[str, str], extra_tokens: tuple[str, ...] = (), **more: Any) -> Any:
    """Train a byte-level BPE tokenizer of 512 tokens.

    Args:
        special_tokens: `bos_token`, `eos_token`, `pad_token` and `unk_token` -> text.
        extra_tokens: further special tokens.
        more: further arguments of `PreTrainedTokenizerFast`.
    """
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
    """Builds a family's tiny model and processor, which are the same each time."""

    extra_norm_weight = 2.0
    """Added to the weight of the last norm. Otherwise a random, frozen output head of width 32 could give no token a
    probability above 0.1, however well the layers before it learn."""
    needs_torchvision = False
    """Whether the family's processor requires torchvision."""

    @cached_property
    def tokenizer(self) -> Any:
        """Tokenizer with the family's special tokens."""
        raise NotImplementedError

    def processor(self) -> Any:
        """Build the family's processor."""
        raise NotImplementedError

    def config(self) -> Any:
        """Build the model's config."""
        raise NotImplementedError

    def model(self) -> Any:
        """Build the model with random weights."""
        import torch
        from transformers import AutoModelForImageTextToText

        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            model = AutoModelForImageTextToText.from_config(self.config())
            model.model.get_decoder().norm.weight.add_(self.extra_norm_weight)
            return model

    def token(self, token: str) -> int:
        """Return the id of a token."""
        return int(self.tokenizer.convert_tokens_to_ids(token))

    def text(self, **more: Any) -> dict[str, Any]:
        """Return the options that all tiny language models have in common, updated with `more`."""
        return {
            "vocab_size": len(self.tokenizer),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
            "initializer_range": 2 * INIT,
            "bos_token_id": self.tokenizer.bos_token_id,
            "eos_token_id": self.tokenizer.eos_token_id,
            "pad_token_id": self.tokenizer.pad_token_id,
        } | more


# 32 px in patches of 8 px: 16 patches.
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
    "initializer_range": 2 * INIT,
}
