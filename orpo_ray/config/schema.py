"""The sections of a recipe: every field typed, bounded and documented where it is defined.

Names follow TRL's `ORPOConfig` and transformers' `TrainingArguments` where those have one.
"""

from __future__ import annotations

import difflib
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

Fraction = Annotated[float, Field(ge=0, le=1)]
_AsList = BeforeValidator(lambda value: [value] if isinstance(value, str) else value)
Names = Annotated[list[str], _AsList]
PARTS = ("language", "connector", "vision")


def _as_weighted_sources(value: Any) -> Any:
    if value is None:
        return {}
    if isinstance(value, str):
        return {value: 1.0}
    if isinstance(value, list) and all(isinstance(uri, str) for uri in value):
        return {uri: float(value.count(uri)) for uri in value}
    return value


Weight = Annotated[float, Field(gt=0, le=1000)]
WeightedSources = Annotated[
    dict[str, Weight], BeforeValidator(_as_weighted_sources, json_schema_input_type=str | list[str] | dict[str, Weight])
]
FORMATS = ("trl", "plain", "sharegpt", "alpaca", "swift", "rlaif-v", "rlhf-v", "vlfeedback", "mmpr", "nemo-rl")


def _known_format(value: str) -> str:
    if value == "auto" or value in FORMATS or re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", value):
        return value
    near = difflib.get_close_matches(value, FORMATS, n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'?" if near else f"one of auto, {', '.join(FORMATS)}, or module:function"
    raise ValueError(f"unknown format; {hint}")


RowFormat = Annotated[str, AfterValidator(_known_format)]


class Config(BaseModel):
    """A part of the recipe: unknown keys are errors, and a field's docstring is its documentation."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class LoraConfig(Config):
    """Low-rank adapters (peft). Without this section the model is fully fine-tuned."""

    r: int = Field(16, ge=1)
    """Rank of the adapters."""
    alpha: float = Field(32, gt=0)
    """Scale of the adapters: their output is multiplied by alpha / r."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the adapters' input."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(r) instead, so that a higher rank does not train less (rsLoRA)."""
    use_dora: bool = False
    """Train magnitude and direction of each weight apart (DoRA): a little better at low ranks, and slower."""
    target_modules: Names = Field(default_factory=list)
    """Names of the linear layers to adapt (`q_proj`: wherever one is called so, outside `model.freeze`), or parts:
    `language`, `connector`, `vision` stand for all of a part's. Empty is `language`. Never the output head, unless
    named."""
    modules_to_save: Names = Field(default_factory=list)
    """Modules or parts (`connector`) that are trained in full beside the adapters, on a copy of their weights."""


class QuantizationConfig(Config):
    """The frozen base model in 4 bits (bitsandbytes), adapters trained on it: QLoRA. Needs `model.lora`."""

    quant_type: Literal["nf4", "fp4"] = "nf4"
    """4-bit NormalFloat, or 4-bit float."""
    use_double_quant: bool = True
    """Quantise the scales too: 0.4 bits a weight less."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What weights are multiplied in; auto is `model.dtype`."""
    quant_storage: Literal["uint8", "float32", "bfloat16"] = "uint8"
    """Type of the tensors that hold the packed weights: uint8, or the model's own type."""
    skip_modules: Names = Field(default_factory=list)
    """Modules that stay unquantised, besides the output head and all outside the language model."""


class ModelConfig(Config):
    """The vision-language model to train."""

    id: str = Field(min_length=1)
    """A folder, a name on the Hugging Face hub, or a small offline model (`orpo-ray/tiny-smolvlm`)."""
    revision: str | None = None
    """Branch, tag or commit on the hub; pin a commit for a reproducible run."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Weights and compute; auto is bfloat16 on a GPU that has it and float32 elsewhere."""
    attention: Literal["auto", "shared_prefix", "concatenated"] = "auto"
    """shared_prefix computes prompt and image once for both answers; concatenated runs prompt + answer twice, as other
    trainers do. auto shares wherever that is proven equal for the model's family."""
    freeze: Annotated[list[Literal["vision", "connector", "language"]], _AsList] = Field(default_factory=list)
    """Parts that are not trained; with LoRA, which freezes every weight, parts that take no adapter."""
    gradient_checkpointing: bool = False
    """Recompute activations in backward: less memory, about a third more time."""
    lora: LoraConfig | None = None
    """Train adapters instead of the weights."""
    quantization: QuantizationConfig | None = None
    """Hold the frozen base model in 4 bits; `{}` takes NF4 with double quantisation."""
    vision_cache: str | None = None
    """Folder in which features of a frozen vision part and connector are kept, for further epochs, runs and trials."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Never needed for the families in the README."""
    allow_pickle: bool = False
    """Read weights that are pickled (`.bin`), which may run code when read. safetensors needs none of it."""

    @model_validator(mode="after")
    def _something_is_trained(self) -> ModelConfig:
        if self.lora is None and set(self.freeze) == {"vision", "connector", "language"}:
            raise ValueError("every part is frozen and there is no lora section: nothing would be trained")
        return self


class DataConfig(Config):
    """Where the preference pairs come from, and what happens to rows that cannot be used."""

    train: WeightedSources = Field(min_length=1)
    """Where the pairs are: a URI, a list, or a mapping of URIs to weights (how often an epoch takes their rows: 0.5 is
    every second of them). A URI is a file (`.parquet`, `.jsonl`, `.json`, webdataset `.tar`), a folder or glob of
    them, or what `datasets.save_to_disk` wrote; here or in `s3://`, `gs://`, `hf://datasets/owner/name`; or
    `easy-vqa:train`."""
    eval: WeightedSources = Field(default_factory=dict)
    """Held-out pairs, likewise; weights count for nothing here."""
    eval_fraction: float = Field(0.0, ge=0, lt=1)
    """Without `eval`: hold out this share of the training rows, always the same ones, with no image on both sides."""
    format: RowFormat = "auto"
    """Layout of a row; auto recognises it from the columns. `module:function` names an adapter of your own: it takes a
    raw row and returns one in any of these formats."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Renames: the format's name of a column -> its name in your data, e.g. `{chosen: good_answer}`."""
    image_root: str | None = None
    """Folder or URI that image paths are relative to and never leave; by default the folder of the file that names
    them."""
    allow_http: bool = False
    """Fetch images that rows name by http(s) address; never from private addresses."""
    max_length: int = Field(1024, ge=8)
    """Longest prompt + response in tokens, image tokens included."""
    on_too_long: Literal["skip", "truncate_response", "error"] = "skip"
    """A longer pair is a bad row, or has its answers cut (never its prompt), or ends the run."""
    on_bad_row: Literal["skip", "error"] = "skip"
    """A row that can't be used is skipped and written to `bad_rows.jsonl`, or ends the run."""
    max_bad_fraction: Fraction = 0.05
    """A larger share of bad rows among those seen stops the run (judged once ten rows were bad, and at the end)."""
    shuffle_seed: int | None = Field(0, ge=0)
    """Seed of the order, which differs by epoch; null keeps the order of the files."""
    shuffle_window: int | None = Field(None, ge=1)
    """Rows are shuffled within windows of this many, files and row groups among each other. It is what a reader holds
    in memory; by default 4096 rows, or fewer where those weigh more than 128 MB."""


class OrpoConfig(Config):
    """The objective: loss = NLL(chosen) + beta * -log sigmoid(log odds(chosen) - log odds(rejected))."""

    beta: float = Field(0.1, ge=0)
    """Weight of the odds-ratio term."""
    nll: Literal["response", "prompt+response"] = "response"
    """What the NLL term covers. response: the chosen answer, averaged per pair (LLaMA-Factory, ms-swift).
    prompt+response: the prompt's text too, averaged over the step's tokens (TRL). Image placeholders never count."""


class OptimConfig(Config):
    """Optimizer, schedule, and the size of a step."""

    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = "adamw"
    """adamw_8bit holds both moments in 8 bits (bitsandbytes): 2 bytes a trained weight instead of 8. paged_ lets them
    go to the CPU's memory when the GPU's is short; on a CPU it is the same as adamw_8bit."""
    learning_rate: float = Field(1e-6, gt=0)
    """Peak learning rate of AdamW."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Shape of the learning rate after warm-up; linear and cosine end at 0."""
    warmup: float = Field(0.03, ge=0)
    """Warm-up: a share of all steps if below 1, else a number of steps."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay (not on biases and norms)."""
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    """AdamW's first moment decay."""
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    """AdamW's second moment decay."""
    adam_epsilon: float = Field(1e-8, gt=0)
    """AdamW's epsilon."""
    max_grad_norm: float = Field(1.0, ge=0)
    """Clip the global gradient norm to this; 0 does not clip."""
    epochs: float = Field(1.0, gt=0)
    """Passes over the training pairs."""
    max_steps: int | None = Field(None, ge=1)
    """Stop after this many steps, if that is earlier."""
    pairs_per_step: int = Field(32, ge=1)
    """Pairs per optimizer step over all workers, whatever their number."""
    tokens_per_microbatch: int = Field(8192, ge=1)
    """Most tokens (prompt, both answers, image tokens) that one forward holds on one worker; memory follows it. Where
    attention is concatenated, a prompt counts twice, and padding counts."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Seed of the adapters' initialisation and of dropout."""


class DeepspeedConfig(Config):
    """How training state is spread over the workers."""

    zero_stage: Literal[0, 1, 2, 3] = 0
    """0 replicates, 1 shards optimizer states, 2 gradients too, 3 parameters too."""


class ScalingConfig(Config):
    """Workers and what each of them holds."""

    num_workers: int = Field(1, ge=1)
    """Training processes, one GPU each where GPUs are used."""
    gpus_per_worker: Literal["auto", 0, 1] = "auto"
    """1, 0, or auto: 1 if the cluster has GPUs."""
    cpus_per_worker: float | None = Field(None, gt=0)
    """CPUs reserved per worker; by default 1, or less where that would leave none for the data."""
    max_failures: int = Field(3, ge=0)
    """Worker failures after which a run gives up; each one before resumes from the latest checkpoint."""


class CheckpointConfig(Config):
    """What is kept of a run, and where."""

    storage: str = Field("runs", min_length=1)
    """Folder of all runs, which every node must see, or `s3://` or `gs://`; the run's own is `<storage>/<name>`."""
    every_steps: int | None = Field(None, ge=1)
    """Steps between checkpoints; by default about ten in a run."""
    keep: int = Field(2, ge=1)
    """How many checkpoints are kept."""

    @field_validator("storage")
    @classmethod
    def _known_store(cls, value: str) -> str:
        if "://" in value and not re.match(r"(s3|gs)://[^/]", value):
            raise ValueError("must be a folder that every node sees, or s3://bucket/... or gs://bucket/...")
        return value


class EvalConfig(Config):
    """Evaluation on the held-out pairs."""

    every_steps: int | None = Field(None, ge=1)
    """Steps between evaluations during training; by default only at the end."""
    max_pairs: int | None = Field(None, ge=2)
    """Evaluate this many pairs, the first of the (shuffled) held-out set; by default all."""
    grounding: bool = True
    """At the end also score the pairs with exchanged images, which proves that the images are used."""


class WandbConfig(Config):
    """Weights & Biases. The key is read from WANDB_API_KEY or `wandb login`, never from a recipe."""

    enabled: bool | Literal["auto"] = "auto"
    """auto: on if WANDB_API_KEY is set."""
    mode: Literal["online", "offline"] = "online"
    """offline writes below the run folder; upload later with `wandb sync`."""
    project: str = "orpo-ray"
    """W&B project."""
    entity: str | None = None
    """W&B team or user."""


class TrackingConfig(Config):
    """Where metrics go besides `metrics.jsonl`."""

    wandb: WandbConfig = Field(default_factory=WandbConfig)
    """Weights & Biases."""


class SearchRange(Config):
    """One searched parameter: either `choices`, or a range from `low` to `high`."""

    low: float | None = None
    """Smallest value."""
    high: float | None = None
    """Largest value."""
    log: bool = True
    """Sample the range uniformly in the logarithm."""
    choices: list[float] | None = None
    """Sample from this list instead."""

    @model_validator(mode="after")
    def _range_or_choices(self) -> SearchRange:
        if self.choices:
            if self.low is not None or self.high is not None:
                raise ValueError("give either choices or low and high, not both")
        elif self.low is None or self.high is None:
            raise ValueError("give low and high, or choices")
        elif not self.low < self.high:
            raise ValueError(f"low ({self.low}) must be below high ({self.high})")
        elif self.log and self.low <= 0:
            raise ValueError(f"low ({self.low}) must be above 0 on a logarithmic scale; or set log: false")
        return self


class TuneConfig(Config):
    """A search with Ray Tune around the very same training (`orpo-ray tune`)."""

    search: dict[Literal["orpo.beta", "optim.learning_rate"], SearchRange] = Field(
        default={
            "orpo.beta": SearchRange(low=0.05, high=0.5),
            "optim.learning_rate": SearchRange(low=1e-6, high=1e-4),
        },
        min_length=1,
    )
    """What is searched: a recipe key -> its range."""
    metric: Literal[
        "eval/rewards/accuracies", "eval/rewards/margins", "eval/loss", "eval/nll_loss", "eval/log_odds_ratio"
    ] = "eval/rewards/accuracies"
    """The metric that ranks the trials; for the losses set `mode: min`."""
    mode: Literal["max", "min"] = "max"
    """Whether more of the metric is better."""
    num_trials: int = Field(8, ge=1)
    """Trials in all."""
    max_concurrent: int = Field(1, ge=1)
    """Trials at a time; each takes `scaling.num_workers` workers."""
    scheduler: Literal["asha", "none"] = "asha"
    """asha stops the weak trials early, at evaluations; none runs all to the end."""
    grace_evals: int = Field(1, ge=1)
    """Evaluations that every trial is given before asha may stop it."""
    seed: int = Field(0, ge=0)
    """Seed of the search."""
