"""Memory and FLOPs of one forward and backward pass, from a dry run of the real `PairModel` on a packed batch."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from orpo_ray.config.schema import ModelConfig
from orpo_ray.data.balance import Layout
from orpo_ray.data.encoding import EncodedPair
from orpo_ray.data.packing import PairBatch, build_batch
from orpo_ray.model import vision_attention
from orpo_ray.model.attention_kernel import PLANNED_GPU
from orpo_ray.model.families.registry import family_of
from orpo_ray.model.loading import own_attention, ready_to_train, without_adapters
from orpo_ray.model.sequence_group import SequenceGroup
from orpo_ray.model.shared_prefix import NAME as SHARED_PREFIX
from orpo_ray.model.shared_prefix import no_mask, shared_prefix_attention
from orpo_ray.model.shared_prefix import register as register_shared_prefix
from orpo_ray.objective.base import Normaliser
from orpo_ray.objective.logps import CHUNK_BYTES
from orpo_ray.objective.orpo import ORPO
from orpo_ray.objective.pair_model import PIXELS_AT_ONCE, PairModel
from orpo_ray.planning.depth import LAYERS_RUN, depths, is_deep, with_depth
from orpo_ray.planning.dry_run import Live, dry_run
from orpo_ray.planning.imports import import_peft
from orpo_ray.planning.planned_group import PlannedGroup
from orpo_ray.planning.work import Work
from orpo_ray.processing.pixel_norm import PixelNorm
from orpo_ray.processing.prompts import EncodedPrompt

AS_ON_CUDA = "orpo_ray_planned_for_cuda"
VISION_AS_ON_CUDA = "orpo_ray_vision_flash_planned_for_cuda"
NORM = PixelNorm(1 / 255, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@dataclass(frozen=True)
class PairShape:
    """The sizes of a pair that determine memory."""

    prompt: int
    """Text tokens in the prompt."""
    chosen: int
    """Tokens of the chosen answer."""
    rejected: int
    """Tokens of the rejected answer."""
    images: int
    """Images in the prompt."""
    image_tokens: int
    """Tokens per image."""
    vision: Mapping[str, np.ndarray]
    """Inputs of the vision encoder for one image, with values of 0."""
    has_other: bool = False
    """Whether the chosen answer is computed again, to other images of the same size."""

    def tokens(self, layout: Layout) -> int:
        """Return the tokens that count against `optim.tokens_per_microbatch`."""
        prompt = self.prompt + self.images * self.image_tokens
        if layout == "shared_prefix":
            return prompt + self.chosen + self.rejected + (prompt + self.chosen if self.has_other else 0)
        return (3 if self.has_other else 2) * (prompt + max(self.chosen, self.rejected))

    def pair(self, image_token: int, sample_index: int) -> EncodedPair:
        """Return a pair of these sizes, with meaningless content."""
        image = [1] + [image_token] * self.image_tokens if self.images else []
        ids = np.asarray([1] * max(0, self.prompt - self.images) + image * self.images, np.int32)
        chosen, rejected = np.ones(self.chosen, np.int32), np.ones(self.rejected, np.int32)
        images = {name: np.concatenate([value] * self.images) for name, value in self.vision.items()}
        prompt = EncodedPrompt(ids, ids != image_token, images if self.images else {})
        texts = (prompt.ids, chosen, rejected, prompt.is_text)
        other = prompt if self.has_other else None
        return EncodedPair(str(sample_index), *texts, prompt.images, sample_index, other_prompt=other)


# Phases of a forward and backward pass, in order. The output head belongs to the language backward.
PHASES = ("vision forward", "language forward", "language backward", "vision backward")


@dataclass(frozen=True)
class Activations:
    """Memory and FLOPs of one micro-batch on one worker, without weights and gradients.

    If workers compute pairs together, the worker's part of them. All of them run the vision encoder.
    """

    saved: int
    """Bytes saved for the backward pass when the output head starts."""
    peaks: tuple[int, ...]
    """Peak bytes in each of `PHASES`."""
    work: Work
    """Work for one pair, recomputation included."""
    pairs: int
    """Pairs in the micro-batch."""
    tokens: int
    """Tokens in the micro-batch."""
    vision_saved: int = 0
    """Bytes of `saved` when the language model starts."""
    vision_work: Work = field(default_factory=Work)
    """The part of `work` in the vision phases."""

    @property
    def peak(self) -> int:
        """Peak bytes over all phases."""
        return max(self.peaks)

    def deepened(self, deeper: Activations, language: int, vision: int) -> Activations:
        """Return the activations of a model with more layers.

        All layers of a part have the same sizes, so each adds the same. The phases tell the parts apart. During the
        language model's phases, a vision layer adds what it saved. During the vision encoder's phases, a language layer
        adds nothing.

        Args:
            deeper: the activations of the model with one more layer of both.
            language: how many layers of the language model to add.
            vision: how many layers of the vision encoder to add.
        """
        by_vision = deeper.vision_saved - self.vision_saved
        saved = self.saved + vision * by_vision + language * (deeper.saved - self.saved - by_vision)
        peaks = []
        for phase, less, more in zip(PHASES, self.peaks, deeper.peaks, strict=True):
            of_vision = more - less if phase.startswith("vision") else by_vision
            peaks.append(less + vision * of_vision + language * (more - less - of_vision))
        vision_layer = deeper.vision_work.plus(self.vision_work, -1)
        language_layer = deeper.work.plus(self.work, -1).plus(vision_layer, -1)
        work = self.work.plus(language_layer, language).plus(vision_layer, vision)
        vision_saved, vision_work = self.vision_saved + vision * by_vision, self.vision_work.plus(vision_layer, vision)
        return Activations(saved, tuple(peaks), work, self.pairs, self.tokens, vision_saved, vision_work)

    def with_pairs(self, pairs: int, chunked_vision: bool, more_logits: int = 0) -> Activations:
        """Return the activations of a micro-batch with `pairs` pairs.

        Saved activations grow with the pairs. The logits grow by `more_logits` bytes, until a chunk is full; with
        `chunked_vision`, what the vision encoder recomputes (`PIXELS_AT_ONCE`) does not grow.
        """
        ratio = pairs / self.pairs
        saved = round(self.saved * ratio)
        peaks = [round(peak * ratio) for peak in self.peaks]
        for phase in ("language backward", "vision backward") if chunked_vision else ("language backward",):
            index = PHASES.index(phase)
            peaks[index] = saved + max(0, self.peaks[index] - self.saved)
        peaks[PHASES.index("language backward")] += more_logits
        tokens = round(self.tokens * ratio)
        return Activations(saved, tuple(peaks), self.work, pairs, tokens, vision_work=self.vision_work)


def unloaded_model(
    model_config: ModelConfig, config: Any, dtype: torch.dtype, layout: Layout, device: str = "cuda"
) -> torch.nn.Module:
    """Return the model on the `meta` device, ready to train, as `load_model` would prepare it on `device`.

    Args:
        model_config: `model` section of the recipe.
        config: the model's config in transformers.
        dtype: of the weights.
        layout: attention layout of a pair.
        device: cpu or cuda; determines the attention kernel.
    """
    from transformers import AutoModelForImageTextToText

    if model_config.lora is not None:
        import_peft()  # here, since its module constants must not be created on meta
    language = own_attention(config)
    _register_as_on_cuda()
    if layout == "shared_prefix":
        register_shared_prefix()
        language = AS_ON_CUDA if device == "cuda" else SHARED_PREFIX
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(
            config, dtype=dtype, attn_implementation={"text_config": language, "vision_config": "sdpa"}
        )
        vision_attention.use_in(model, VISION_AS_ON_CUDA if device == "cuda" else vision_attention.NAME)
        wanted = model_config.fused_layers
        return ready_to_train(model, model_config, seed=0, fused=device == "cuda" if wanted == "auto" else wanted)


def batch_of(shape: PairShape, pairs: int, config: Any, nll: str, layout: Layout, together: int = 1) -> PairBatch:
    """Build a micro-batch of `pairs` pairs of this shape, as the first of `together` workers has it."""
    shaped = [shape.pair(config.image_token_id, sample_index) for sample_index in range(pairs)]
    batch = build_batch(shaped, nll, layout, collate=family_of(config).collate)
    return batch if together == 1 else SequenceGroup(together, 0, None).with_own_targets(batch)


def more_logits(targets: int, pairs: float, config: Any, dtype: torch.dtype) -> int:
    """Bytes by which the logits of one chunk on a GPU grow if `targets` target tokens become `pairs` times as many."""
    vocabulary: int = config.get_text_config().vocab_size
    chunk = CHUNK_BYTES["cuda"] // (4 * vocabulary)
    return (min(round(targets * pairs), chunk) - min(targets, chunk)) * vocabulary * dtype.itemsize


def measure(
    model_config: ModelConfig,
    config: Any,
    dtype: torch.dtype,
    layout: Layout,
    batch: PairBatch,
    bounded: bool,
    device: str,
) -> Activations:
    """Measure a forward and backward pass of a batch in a dry run.

    A deep model is measured with few layers, and then with one more of the language model and of the vision encoder.

    Args:
        model_config: `model` section of the recipe.
        config: the model's config in transformers.
        dtype: of the weights.
        layout: attention layout of a pair.
        batch: the micro-batch.
        bounded: whether the vision encoder processes at most `PIXELS_AT_ONCE` pixels at a time (not under ZeRO-3).
        device: cpu or cuda; determines the attention kernel.
    """
    depth = depths(config)
    if not is_deep(config):
        return _measure(model_config, config, dtype, layout, batch, bounded, device)

    def measure_layers(language: int, vision: int) -> Activations:
        return _measure(model_config, with_depth(config, language, vision), dtype, layout, batch, bounded, device)

    few, deeper = (measure_layers(layers, layers) for layers in (LAYERS_RUN, LAYERS_RUN + 1))
    return few.deepened(deeper, depth[0] - LAYERS_RUN, depth[1] - LAYERS_RUN)


def _measure(
    model_config: ModelConfig,
    config: Any,
    dtype: torch.dtype,
    layout: Layout,
    batch: PairBatch,
    bounded: bool,
    device: str,
) -> Activations:
    model = unloaded_model(model_config, config, dtype, layout, device)
    with dry_run() as dry:
        move_from_meta(model)
        dry.work.watch(model)
        for parameter in model.parameters():
            if parameter.requires_grad:  # gradients of an earlier micro-batch are accumulated
                parameter.grad = torch.empty_like(parameter)
        pixels_at_once = PIXELS_AT_ONCE[device] if bounded and model_config.gradient_checkpointing != "none" else None
        pair_model = PairModel(model, NORM, pixels_at_once)
        pair_model.layout, pair_model.head_device = layout, device
        if batch.workers > 1:
            pair_model.group = PlannedGroup(batch.workers, 0, dry.work)
        return step(pair_model, batch, dry)


def step(pair_model: PairModel, batch: PairBatch, live: Live) -> Activations:
    """Run forward and backward, in a dry run or for real, and measure what they add to `live`."""
    before, work = live.now, [live.work.total()]
    live.peak = before
    peaks: list[int] = []
    saved: list[int] = []
    vision_saved: list[int] = []

    def next_phase(*_: Any) -> None:
        peaks.append(live.peak - before)
        work.append(live.work.total())
        live.peak = live.now

    def language_begins(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        next_phase()
        vision_saved.append(live.now - before)
        if kwargs["inputs_embeds"].requires_grad:
            kwargs["inputs_embeds"].register_hook(next_phase)

    def head_begins(*_: Any) -> None:
        if not saved:
            saved.append(live.now - before)
            next_phase()

    base = without_adapters(pair_model.model)
    handles = [
        base.get_decoder().register_forward_pre_hook(language_begins, with_kwargs=True),
        base.get_output_embeddings().register_forward_pre_hook(head_begins),
    ]
    logps = pair_model(batch)
    # Any loss does: it computes with one number per pair.
    loss, _ = ORPO().loss(logps, batch.weights, Normaliser(float(batch.num_pairs)))
    loss.backward()
    next_phase()
    for handle in handles:
        handle.remove()
    peaks += [0] * (len(PHASES) - len(peaks))
    of_phases = [after.plus(start, -1) for start, after in itertools.pairwise(work)]
    vision_work = of_phases[0] if len(of_phases) < len(PHASES) else of_phases[0].plus(of_phases[-1])
    whole = work[-1].plus(work[0], -1)
    size = (batch.num_pairs, batch.input_ids.numel())
    return Activations(saved[0], tuple(peaks), whole, *size, vision_saved[0], vision_work)


def move_from_meta(model: torch.nn.Module) -> None:
    """Replace tensors on `meta` by tensors of the dry run. Tied weights stay tied."""
    moved: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in moved:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                moved[id(parameter)] = torch.nn.Parameter(empty, parameter.requires_grad)
            setattr(module, name, moved[id(parameter)])
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.zeros(buffer.shape, dtype=buffer.dtype))


def _register_as_on_cuda() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(AS_ON_CUDA, _attention_as_on_cuda)
    AttentionMaskInterface.register(AS_ON_CUDA, no_mask)
    AttentionInterface.register(VISION_AS_ON_CUDA, _vision_attention_as_on_cuda)


def _attention_as_on_cuda(*states: Any, **options: Any) -> tuple[torch.Tensor, None]:
    """Run the kernel that training would choose on a GPU."""
    return shared_prefix_attention(*states, **(options | {"hardware": PLANNED_GPU}))


def _vision_attention_as_on_cuda(*states: Any, **options: Any) -> tuple[torch.Tensor, None]:
    """Run the kernel that training would choose on a GPU."""
    return vision_attention.vision_attention(*states, **(options | {"hardware": PLANNED_GPU}))
