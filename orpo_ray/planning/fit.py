"""Whether a setting fits on a GPU, how long it takes and what it costs."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

from orpo_ray.config.field_types import Checkpointing
from orpo_ray.planning.activations import Activations
from orpo_ray.planning.gpus import GIB, Gpu
from orpo_ray.planning.states import Offload, Stage, Weights, states
from orpo_ray.planning.step_time import Load, Parts, Rates, StepTime, step_time

# Bytes for the CUDA context with library workspaces, bytes for NCCL buffers with several workers, and the fraction of
# temporary memory that the caching allocator loses to fragmentation. Assumptions, not measurements.
CONTEXT, NCCL, FRAGMENTATION = 1.0 * GIB, 0.5 * GIB, 0.1
# From the fastest to the one with the least memory.
MODES: tuple[Checkpointing, ...] = ("none", "selective", "full")
WORKERS = (1, 2, 4, 8, 16, 32, 64)
# Maximum fraction of GPU memory that is recommended, since the estimates have not been compared with a GPU.
MAX_FILL = 0.9


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU."""

    weights: float
    gradients: float
    optimizer: float
    """Optimizer states and float32 master weights."""
    buffers: float
    """Buffers of DeepSpeed."""
    activations: float
    """Activations saved for the backward pass."""
    head: float
    """Additional memory at the peak: logits and other temporary tensors."""
    overhead: float
    """CUDA context, NCCL and fragmentation."""
    total: float
    host: float
    """In the node's main memory, for each GPU."""


@dataclass(frozen=True)
class Setting:
    """The settings of a recipe that a plan varies."""

    workers: int
    stage: Stage
    checkpointing: Checkpointing
    budget: int
    """`optim.tokens_per_microbatch`."""


@dataclass(frozen=True)
class Estimate:
    """Memory, time and cost of a setting on a GPU type."""

    gpu: Gpu
    setting: Setting
    memory: Memory
    step: StepTime
    hours: float
    cost: float
    mfu: float
    """Model FLOPs, without recomputation, as a fraction of the peak."""


@dataclass(frozen=True)
class Planner:
    """Estimates memory, time and cost of settings from measurements of the model."""

    weights: Weights
    optimizer: str
    """`optim.optimizer`."""
    activations: dict[Checkpointing, Activations]
    """Activations of a full micro-batch, by mode of gradient checkpointing."""
    budget: int
    """`optim.tokens_per_microbatch` of the recipe."""
    row: int
    """Tokens of the longest pair, which a micro-batch must hold at least."""
    steps: int
    """Optimizer steps of the run."""
    pairs_per_step: int
    rates: Rates
    """What is assumed about speed."""
    recipe: Setting
    """The setting of the recipe."""
    mfu: float | None
    """Given by the user: model FLOPs of the recipe's setting as a fraction of the peak, on every GPU type."""
    quantized: bool
    """Whether the base model is in 4 bits."""
    offload: Offload
    """What the recipe keeps in main memory."""
    together: int = 1
    """`scaling.sequence_parallel`: workers of a group, which compute a micro-batch together."""
    _microbatches: dict[str, dict[tuple[Gpu, int], Parts]] = field(default_factory=dict, compare=False)
    _times: dict[tuple[Gpu, Setting], StepTime] = field(default_factory=dict, compare=False)
    _memory: dict[Setting, Memory] = field(default_factory=dict, compare=False)

    def memory(self, setting: Setting) -> Memory:
        """Estimate the memory of each GPU, which is the same for all GPU types."""
        if setting not in self._memory:
            self._memory[setting] = self._estimate_memory(setting)
        return self._memory[setting]

    def _estimate_memory(self, setting: Setting) -> Memory:
        held = states(self.weights, setting.stage, setting.workers, self.optimizer, self.offload)
        full = self.activations[setting.checkpointing]
        # Saved activations grow with the tokens, of which there are at least those of one pair; the logits do not,
        # since they are computed in chunks.
        tokens = max(self.row, self.together * min(setting.budget, self.budget))
        saved = full.saved * tokens / max(full.tokens, self.row)
        head: float = full.peak - full.saved + self.weights.largest_quantized
        temporary: float = saved + head + held.buffers
        # Activations are freed before the optimizer step; ZeRO-3 keeps its bucket.
        temporary = max(temporary, held.step + (held.buffers if setting.stage == 3 else 0))
        overhead = CONTEXT + (NCCL if setting.workers > 1 else 0) + FRAGMENTATION * temporary
        permanent = held.weights + held.gradients + held.optimizer
        total = max(permanent + temporary, held.start) + overhead
        head = temporary - saved - held.buffers if temporary > saved + held.buffers else head
        return Memory(
            held.weights, held.gradients, held.optimizer, held.buffers, saved, head, overhead, total, held.host
        )

    @cached_property
    def pair_flops(self) -> int:
        """FLOPs of a pair without recomputation: those of the activations that recompute least."""
        return min(self.flops(mode) for mode in self.activations)

    def flops(self, mode: Checkpointing) -> int:
        """FLOPs of a pair, recomputation included. The vision encoder counts once, though each of a group runs it."""
        full = self.activations[mode]
        return self.together * full.work.flops - (self.together - 1) * full.vision_work.flops

    def step_time(self, gpu: Gpu, setting: Setting) -> StepTime:
        """Estimate the seconds of an optimizer step."""
        if (gpu, setting) not in self._times:
            full = self.activations[setting.checkpointing]
            share = -(-self.pairs_per_step // (setting.workers // self.together))
            pairs = max(1, min(share, self.together * setting.budget * full.pairs // full.tokens))
            load = Load(setting.stage, setting.workers, share, pairs, self.together)
            known = self._microbatches.setdefault(setting.checkpointing, {})
            time = step_time(full.work, self.weights, self.optimizer, load, gpu, self.rates, known)
            self._times[gpu, setting] = time
        return self._times[gpu, setting]

    def seconds(self, gpu: Gpu, setting: Setting) -> float:
        """Estimate the seconds of an optimizer step; `mfu` corrects them by what it says about the recipe's setting."""
        seconds = self.step_time(gpu, setting).total
        if self.mfu is None:
            return seconds
        given = self.pair_flops * self.pairs_per_step / (self.recipe.workers * gpu.flops * self.mfu)
        return seconds * given / self.step_time(gpu, self.resolved(self.recipe, gpu.memory)).total

    def fits(self, gpu: Gpu, setting: Setting, fill: float = 1.0) -> bool:
        """Whether a setting fits in this fraction of a GPU's memory."""
        return self.memory(setting).total <= fill * gpu.memory * GIB

    def resolved(self, setting: Setting, gib: float) -> Setting:
        """Replace `auto` by the fastest mode that fits in a GPU's memory in GiB, or by `full` if none does."""
        if setting.checkpointing != "auto":
            return setting
        modes = [replace(setting, checkpointing=mode) for mode in MODES]
        return next((each for each in modes if self.memory(each).total <= MAX_FILL * gib * GIB), modes[-1])

    def estimate(self, gpu: Gpu, setting: Setting) -> Estimate:
        """Estimate memory, time and cost of a setting. The time is without loading and evaluation."""
        seconds = self.seconds(gpu, setting)
        hours = seconds * self.steps / 3600
        mfu = self.pair_flops * self.pairs_per_step / (setting.workers * gpu.flops * seconds)
        cost = hours * setting.workers * gpu.price
        return Estimate(gpu, setting, self.memory(setting), self.step_time(gpu, setting), hours, cost, mfu)

    def cheapest(self, gpu: Gpu) -> Estimate | None:
        """Return the cheapest setting that fits on a GPU type; None if there is none.

        Of settings with equal cost, the one with the fewest workers and then the lowest ZeRO stage is returned.
        """
        settings = [
            Setting(workers, stage, checkpointing, budget)
            for groups in WORKERS
            if groups <= self.pairs_per_step
            for workers in (groups * self.together,)
            for stage in (self.offload.stages if workers > 1 else self.offload.stages[:1])
            # Sharded 4-bit weights can be trained, but the estimate was never compared with an engine.
            if not (self.quantized and stage == 3)
            for checkpointing in MODES
            for budget in (self.budget, self.budget // 2, self.budget // 4)
        ]
        fitting = [setting for setting in settings if self.fits(gpu, setting, MAX_FILL)]
        found = min(fitting, key=lambda setting: self.seconds(gpu, setting) * setting.workers, default=None)
        return None if found is None else self.estimate(gpu, found)
