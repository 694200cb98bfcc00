"""Let a model answer the prompts of held-out pairs: greedily, and with a seed.

Used by training and `orpo-ray evaluate` on every worker, and by `orpo-ray chat`.

Legend: P prompt tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image

from orpo_ray.data.encoding import PairEncoder
from orpo_ray.data.pairs import Message, PreferencePair
from orpo_ray.data.reading import ReadSpec, pair_of, read_windows
from orpo_ray.errors import RowError
from orpo_ray.evaluation.draws import Draw, Drawn, OneTokenEach
from orpo_ray.model.loading import own_attention, without_adapters
from orpo_ray.model.shared_prefix import NAME as SHARED_PREFIX
from orpo_ray.objective.collectives import gather_objects
from orpo_ray.pages.thumbnails import small_jpeg
from orpo_ray.storage.files import image_folder
from orpo_ray.tracking.generations import Generation

TEMPERATURE = 0.7
_PLAIN: dict[str, Any] = {"temperature": None, "top_p": None, "top_k": None}
"""No sampling options, whatever the model's own generation config says."""


class Answerer:
    """Generates answers with a model that is otherwise trained or scored."""

    def __init__(self, model: torch.nn.Module, encoder: PairEncoder, max_new_tokens: int, seed: int = 0) -> None:
        """Keep what all answers share.

        Args:
            model: transformers' model, or peft's wrapper around one, with whole weights (not ZeRO-3).
            encoder: encodes prompts for it.
            max_new_tokens: most tokens of an answer.
            seed: of sampled answers.
        """
        self.base, self.encoder = without_adapters(model), encoder
        self.max_new_tokens, self.seed = max_new_tokens, seed
        self.endings = _end_tokens(self.base, encoder)
        pad = encoder.tokenizer.pad_token_id
        # Nothing is padded, but transformers warns without one.
        self._pad = next(iter(self.endings), 0) if pad is None else pad

    def answer(self, text: str, images: list[Image.Image], seed: int | None = None, streamer: Any = None) -> str:
        """Answer a rendered prompt.

        Args:
            text: the prompt as the chat template renders it.
            images: its images.
            seed: of a sampled answer; None for the most likely tokens.
            streamer: takes the tokens as they come, such as transformers' `TextStreamer`.

        Raises:
            RowError: the processor refuses the prompt.
        """
        return self._generate(self.encoder.inputs_of(text, images), seed, streamer)

    def draw(self, text: str, images: list[Image.Image], draws: Sequence[Draw]) -> list[Drawn]:
        """Draw answers to a rendered prompt, all in one batch.

        Args:
            text: the prompt as the chat template renders it.
            images: its images.
            draws: temperature and seed of each answer.

        Raises:
            RowError: the processor refuses the prompt, or it is too long.
        """
        inputs = self.encoder.inputs_of(text, images)
        check_room(self.encoder, inputs)
        options = {"logits_processor": [OneTokenEach(draws, self.base.device)], "num_return_sequences": len(draws)}
        return [self._drawn(ids) for ids in self._answer_ids(inputs, 0, temperature=1.0, **options)]

    def _generate(self, inputs: dict[str, Any], seed: int | None, streamer: Any = None) -> str:
        (ids,) = self._answer_ids(inputs, seed, streamer=streamer)
        return self._text_of(ids)

    def _answer_ids(
        self, inputs: dict[str, Any], seed: int | None, temperature: float = TEMPERATURE, **options: Any
    ) -> torch.Tensor:
        """Return the tokens of answers, [answers, tokens], with what fills up the shorter ones."""
        device, dtype = self.base.device, self.base.dtype
        inputs = {
            name: value.to(device, dtype if value.is_floating_point() else value.dtype)
            for name, value in inputs.items()
        }
        sampling = _PLAIN if seed is None else {"temperature": temperature, "top_p": 1.0, "top_k": 0}
        devices = [device] if device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices), _for_generation(self.base):
            torch.manual_seed(self.seed + (seed or 0))
            ids: torch.Tensor = self.base.generate(
                **inputs,
                **sampling,
                **options,
                do_sample=seed is not None,
                max_new_tokens=self.max_new_tokens,
                use_cache=True,
                eos_token_id=self.endings or None,
                pad_token_id=self._pad,
            )
        return ids[:, inputs["input_ids"].shape[1] :]

    def _drawn(self, ids: torch.Tensor) -> Drawn:
        ends = torch.isin(ids.cpu(), torch.tensor(self.endings, dtype=ids.dtype)).nonzero().flatten().tolist()
        return Drawn(self._text_of(ids[: ends[0]] if ends else ids), bool(ends))

    def _text_of(self, ids: torch.Tensor) -> str:
        answer: str = self.encoder.tokenizer.decode(ids, skip_special_tokens=True)
        return answer.strip()

    def generation(self, place: _Place, data: str, allow_http: bool) -> Generation | None:
        """Answer the prompt of a pair; None if the pair cannot be encoded."""
        pair, root = place.pair, place.root
        try:
            inputs = self.encoder.inputs_of(*self.encoder.prompt_of(pair, image_folder(root)))
        except RowError:
            return None
        if inputs["input_ids"].shape[1] > self.encoder.max_length:
            return None
        small = (small_jpeg(image, root, allow_http) for image in pair.images)
        return Generation(
            place.sample_index,
            pair.id,
            data,
            text_of(pair.prompt),
            pair.chosen,
            pair.rejected,
            greedy=self._generate(inputs, None),
            sampled=self._generate(inputs, place.sample_index),
            images=tuple(each for each in small if each is not None),
        )


@dataclass(frozen=True)
class _Place:
    """A held-out pair, and where."""

    sample_index: int
    pair: PreferencePair
    root: str | None


def generate_held_out(
    answerer: Answerer, held_out: ReadSpec, count: int, rank: int = 0, num_workers: int = 1
) -> list[Generation]:
    """Answer the first held-out pairs, divided among the workers. A collective.

    Rows that are bad, or too long for the model, are left out.

    Args:
        answerer: of this worker.
        held_out: the held-out rows.
        count: number of rows.
        rank: of this worker.
        num_workers: how many workers call this.

    Returns:
        The answers of all workers, in order of the pairs.
    """
    was_training = answerer.base.training
    answerer.base.eval()
    try:
        places = _first_pairs(held_out, count)[rank::num_workers]
        allow_http = answerer.encoder.allow_http
        own = [answerer.generation(place, held_out.digest, allow_http) for place in places]
    finally:
        answerer.base.train(was_training)
    found = [each for part in gather_objects(own) for each in part if each is not None]
    return sorted(found, key=lambda each: each.sample_index)


def check_room(encoder: PairEncoder, inputs: dict[str, Any]) -> None:
    """Raise RowError if an encoded prompt leaves no room for an answer."""
    if (length := inputs["input_ids"].shape[1]) >= encoder.max_length:
        raise RowError("too_long", f"prompt of {length} tokens; data.max_length is {encoder.max_length}")


def text_of(messages: Sequence[Message]) -> str:
    """Return the text of messages, with the role before each unless there is only one."""
    texts = [
        (turn["role"], "\n".join(part["text"] for part in turn["content"] if part["type"] == "text"))
        for turn in messages
    ]
    return texts[0][1] if len(texts) == 1 else "\n".join(f"{role}: {text}" for role, text in texts)


def _first_pairs(held_out: ReadSpec, count: int) -> list[_Place]:
    read = replace(held_out, first_sample=0, end_sample=min(count, held_out.end_sample), other_image=None)
    rows = [
        row
        for table in read_windows(read, read.order.windows(0, read.end_sample))
        for row in table.to_pylist()
        if row["bad"] is None
    ]
    places = [(row["sample_index"], pair_of(row), row["image_root"]) for row in rows]
    return [_Place(index, pair, root) for index, pair, root in places if isinstance(pair, PreferencePair)]


def _end_tokens(base: Any, encoder: PairEncoder) -> list[int]:
    """The tokens that end an answer: the model's own, and the first special one that the chat template puts there."""
    tokenizer, found = encoder.tokenizer, list[int]()
    if tokenizer.eos_token_id is not None:
        found.append(tokenizer.eos_token_id)
    configured = base.generation_config.eos_token_id
    found += configured if isinstance(configured, list) else [] if configured is None else [configured]
    question: Message = {"role": "user", "content": [{"type": "text", "text": "?"}]}
    answer: Message = {"role": "assistant", "content": [{"type": "text", "text": "a"}]}
    asked = encoder.render([question], add_generation_prompt=True)
    answered = encoder.render([question, answer], add_generation_prompt=False)
    if answered.startswith(asked):
        (ids,) = encoder.prompts.tokenize([answered[len(asked) :]])
        found += [int(token) for token in ids if int(token) in tokenizer.all_special_ids][:1]
    return list(dict.fromkeys(found))


@contextmanager
def _for_generation(base: Any) -> Iterator[None]:
    """Let a model with attention over packed rows run as transformers calls it."""
    text = base.config.get_text_config()
    before = text._attn_implementation
    if before == SHARED_PREFIX:
        text._attn_implementation = own_attention(base.config)
    try:
        yield
    finally:
        if before == SHARED_PREFIX:
            text._attn_implementation = before
