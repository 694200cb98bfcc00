"""Whether a setting fits on a GPU, how long it takes and what it costs."""

from __future__ import annotations

from dataclasses import dataclass, replace

from orpo_ray.config.schema import Checkpointing
from orpo_ray.planning.activations import Activations
from orpo_ray.planning.gpus import GIB, Gpu
from orpo_ray.planning.states import STAGES, Stage, Weights, states

# Bytes for the CUDA context with library workspaces, bytes for NCCL buffers with several workers, and the fraction of
# temporary memory that the caching allocator loses to fragmentation. Assumptions, not measurements.
CONTEXT, NCCL, FRAGMENTATION = 1.0 * GIB, 0.5 * GIB, 0.1
# FLOPs utilization, recomputation included: a usual value for well-tuned training of models of some billion parameters.
MFU = 0.30
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
    hours: float
    cost: float


@dataclass(frozen=True)
class Planner:
    """Estimates memory, time and cost of settings from measurements of the model."""

    weights: Weights
    optimizer: str
    """`optim.optimizer`."""
    activations: dict[Checkpointing, Activations]
    """Activations of a full micro-batch, by mode of gradient checkpointing."""
    budget: int
    """Tokens of a full micro-batch."""
    row: int
    """Tokens of the longest pair, which a micro-batch must hold at least."""
    steps: int
    """Optimizer steps of the run."""
    pairs_per_step: int
    mfu: float
    """Fraction of the GPU's peak FLOPs that is reached."""
    quantized: bool
    """Whether the base model is in 4 bits."""

    def memory(self, setting: Setting) -> Memory:
        """Estimate the memory of each GPU."""
        held = states(self.weights, setting.stage, setting.workers, self.optimizer)
        full = self.activations[setting.checkpointing]
        # Saved activations grow with the tokens, of which there are at least those of one pair; the logits do not,
        # since they are computed in chunks.
        tokens = max(self.row, min(setting.budget, self.budget))
        saved = full.saved * tokens / max(full.tokens, self.row)
        head: float = full.peak - full.saved + self.weights.largest_quantized
        temporary: float = saved + head + held.buffers
        # Activations are freed before the optimizer step; ZeRO-3 keeps its bucket.
        temporary = max(temporary, held.step + (held.buffers if setting.stage == 3 else 0))
        overhead = CONTEXT + (NCCL if setting.workers > 1 else 0) + FRAGMENTATION * temporary
        permanent = held.weights + held.gradients + held.optimizer
        total = max(permanent + temporary, held.start) + overhead
        head = temporary - saved - held.buffers if temporary > saved + held.buffers else head
        return Memory(held.weights, held.gradients, held.optimizer, held.buffers, saved, head, overhead, total)

    def hours(self, gpu: Gpu, setting: Setting) -> float:
        """Estimate the hours of training, without loading and evaluation."""
        full = self.activations[setting.checkpointing]
        flops = full.flops / full.pairs * self.pairs_per_step * self.steps
        return flops / (setting.workers * gpu.flops * self.mfu) / 3600

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
        """Estimate memory, time and cost of a setting."""
        hours = self.hours(gpu, setting)
        return Estimate(gpu, setting, self.memory(setting), hours, hours * setting.workers * gpu.price)

    def cheapest(self, gpu: Gpu) -> Estimate | None:
        """Return the cheapest setting that fits on a GPU type; None if there is none.

        By these estimates, the number of workers changes the time but not the cost. Of settings with equal cost, the
        one with the fewest workers and then the lowest ZeRO stage is returned.
        """
        for checkpointing in MODES:
            for workers in (n for n in WORKERS if n <= self.pairs_per_step):
                for budget in (self.budget, self.budget // 2, self.budget // 4):
                    for stage in STAGES if workers > 1 else STAGES[:1]:
                        setting = Setting(workers, stage, checkpointing, budget)
                        # Sharded 4-bit weights can be trained, but the estimate was never compared with an engine.
                        if not (self.quantized and stage == 3) and self.fits(gpu, setting, MAX_FILL):
                            return self.estimate(gpu, setting)
        return None
