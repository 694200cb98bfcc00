"""The fields of a recipe, one class per section, each field with its type, its bounds and its documentation.

The docstring under a field is its entry in the reference documentation and in the JSON schema. Names follow TRL's
`ORPOConfig` and transformers' `TrainingArguments` where those have one.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from orpo_ray.config.field_types import (
    NUMBER,
    CheckpointingField,
    Float,
    Fraction,
    FrozenParts,
    Int,
    Names,
    NumWorkers,
    PairsFromRanking,
    PathText,
    RowFormat,
    Text,
    Weight,
    WeightedSources,
)


class Config(BaseModel):
    """Base class of all sections: unknown fields are errors, and field docstrings become the documentation."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class LoraConfig(Config):
    """Train low-rank adapters (LoRA, with peft). Without this section, the model is fully fine-tuned."""

    r: Int = Field(16, ge=1)
    """Rank of the adapters. A higher rank can learn more and takes more memory."""
    alpha: Float = Field(32, gt=0)
    """Scale of the adapters: their output is multiplied by `alpha / r`."""
    dropout: Float = Field(0.0, ge=0, lt=1)
    """Dropout probability on the adapters' input during training."""
    use_rslora: bool = False
    """Scale the adapters by `alpha / sqrt(r)` instead of `alpha / r` (rsLoRA). Use this for high ranks, which otherwise
    learn more slowly."""
    use_dora: bool = False
    """Train the magnitude and the direction of each weight separately (DoRA). Slower than LoRA; can improve results at
    low ranks."""
    target_modules: Names = Field(default_factory=list)
    """Linear layers that get an adapter. Give layer names (`q_proj` matches every layer with that name outside
    `model.freeze`) or parts of the model: `language`, `connector` and `vision` each stand for all linear layers of that
    part. By default, `language`. The output head gets an adapter only if it is named."""
    modules_to_save: Names = Field(default_factory=list)
    """Modules or parts of the model (`connector`) to train in full next to the adapters. Training changes a copy of
    their weights."""


class QuantizationConfig(Config):
    """Hold the frozen base model in 4 bits (bitsandbytes) and train adapters on it (QLoRA). Requires `model.lora`."""

    quant_type: Literal["nf4", "fp4"] = "nf4"
    """4-bit data type: `nf4` (NormalFloat, suited to normally distributed weights) or `fp4` (floating point)."""
    use_double_quant: bool = True
    """Quantize the quantization scales too. Saves 0.4 bits per weight."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type in which dequantized weights are multiplied. `auto` uses `model.dtype`."""
    quant_storage: Literal["uint8", "float32", "bfloat16"] = "uint8"
    """Type of the tensors that store the packed 4-bit weights: `uint8`, or the same type as `model.dtype`."""
    skip_modules: Names = Field(default_factory=list)
    """Additional modules to leave unquantized. The output head and all modules outside the language model are never
    quantized."""


class ModelConfig(Config):
    """The vision-language model to train."""

    id: PathText = Field(min_length=1)
    """Model to start from: a local folder, a name on the Hugging Face hub, or a small model that is built offline
    (`orpo-ray/tiny-smolvlm`)."""
    revision: Text | None = None
    """Branch, tag or commit of the model on the hub. By default, the main branch. Set a commit to make runs
    reproducible."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the weights and of the computation. `auto` uses bfloat16 on GPUs that support it, and float32
    elsewhere."""
    attention: Literal["auto", "shared_prefix", "concatenated"] = "auto"
    """How the two answers of a pair are computed. `shared_prefix` computes prompt and images once for both answers.
    `concatenated` computes the prompt twice, once per answer, as other trainers do. `auto` uses `shared_prefix` for
    model families that are tested to give the same result with it, and `concatenated` for all others."""
    freeze: FrozenParts = Field(default_factory=list)
    """Parts of the model that are not trained. With LoRA, which freezes all base weights, the parts that get no
    adapter."""
    gradient_checkpointing: CheckpointingField = "none"
    """Which activations the backward pass computes again instead of keeping them in memory. `none`: it keeps all.
    `selective`: it keeps the results of matrix products and of attention, and computes again what is cheap. `full`, or
    `true`: it computes whole layers again, and a step takes about a third longer. `auto`: the first of these that fits
    the memory of the run's GPUs by the estimate of `orpo-ray plan`; `full` on a CPU."""
    fused_layers: Literal["auto"] | bool = "auto"
    """Run norms, gated MLPs, rotary embeddings and LoRA in fewer passes over memory, for families where the results are
    the same. `auto`: on GPUs where Triton works."""
    lora: LoraConfig | None = None
    """Train LoRA adapters instead of all weights. `{}` uses the defaults."""
    quantization: QuantizationConfig | None = None
    """Hold the frozen base model in 4 bits. `{}` uses NF4 with double quantization."""
    vision_cache: PathText | None = None
    """Folder for the output of a frozen vision encoder and connector. Later epochs, runs and trials read the features
    of an image from this folder instead of computing them again. By default, features are not cached."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Read that code first. None of the documented families needs it."""
    allow_pickle: bool = False
    """Read weights from pickle files (`.bin`). Pickle files can run code when they are read; safetensors files
    cannot."""

    @model_validator(mode="after")
    def _check_something_is_trained(self) -> ModelConfig:
        if self.lora is None and set(self.freeze) == {"vision", "connector", "language"}:
            raise ValueError(
                "vision, connector and language are all frozen, so nothing would be trained; unfreeze one or add lora"
            )
        return self


class GroupWeights(Config):
    """Weights of training rows by their language and their domain, as a mapping from name to weight.

    As the weight of a source, that of a language is the number of times an epoch uses each of its rows: `{sw: 3}` uses
    each row in Swahili three times, 0.5 every second row. A row's weights are multiplied, and what has no weight counts
    1. Held-out pairs are not weighted.
    """

    language: dict[Text, Weight] = Field(default_factory=dict)
    """Weights by the names that `data.language` gives, such as `{ar: 2}`, or `{Arabic: 2}` with `language: script`."""
    domain: dict[Text, Weight] = Field(default_factory=dict)
    """Weights by the values of the column `data.domain`, such as `{charts: 3, photos: 0.5}`."""


class DataConfig(Config):
    """Sources of the preference pairs, and what to do with rows that cannot be used."""

    train: WeightedSources = Field(min_length=1)
    """Sources of the training pairs: a URI, a list of URIs, or a mapping from URI to weight. A weight is the number of
    times an epoch uses each row of that source; 0.5 uses every second row. A URI names a file (`.parquet`, `.jsonl`,
    `.json`, webdataset `.tar`), a folder or glob of such files, or the output of `datasets.save_to_disk`. It can be a
    local path, `s3://`, `gs://`, `hf://datasets/owner/name`, or `easy-vqa:train`."""
    eval: WeightedSources = Field(default_factory=dict)
    """Sources of the held-out pairs, given as for `train`. Weights are ignored."""
    eval_fraction: Float = Field(0.0, ge=0, lt=1)
    """Fraction of the training rows to hold out for evaluation when `eval` is not set. The selection is deterministic,
    and no image occurs on both sides of the split."""
    format: RowFormat = "auto"
    """Format of the rows. `auto` detects it from the columns and the first rows of each source. `module:function` names
    your own adapter, a function that takes a raw row and returns a row in one of the known formats."""
    columns: dict[str, Text] = Field(default_factory=dict)
    """Columns to rename, as a mapping from the name that the format expects to the name in your data, for example
    `{chosen: good_answer}`."""
    language: Text | None = None
    """Column that names the language of each row, by the name in your data; or `script`: the script of prompt and
    chosen answer together (Latin, Arabic, Han, ...). Evaluations, reports and `orpo-ray data check` then also give
    their figures by language. Without it, `data check` groups by script."""
    domain: Text | None = None
    """Column that names the domain, the task or the origin of each row. Evaluations, reports and `orpo-ray data check`
    then also give their figures by domain."""
    weights: GroupWeights = Field(default_factory=GroupWeights)
    """Weights of languages and domains."""
    image_root: PathText | None = None
    """Folder or URI that image paths are relative to. Paths that lead out of it are refused. By default, the folder of
    the file that contains the row."""
    max_frames: Int = Field(8, ge=1, le=1000)
    """Maximum number of frames of a video. Of a longer one, so many are taken at even distances, the first and the last
    among them. Each is an image with its own tokens, which `orpo-ray data check` counts."""
    allow_http: bool = False
    """Download images whose rows give an http or https URL. Private, loopback and link-local addresses are always
    refused."""
    max_length: Int = Field(1024, ge=8)
    """Maximum length of prompt plus answer in tokens, including image tokens. `orpo-ray data check` shows how many
    pairs are longer."""
    on_too_long: Literal["skip", "truncate_response", "error"] = "skip"
    """What to do with a pair that exceeds `max_length`: `skip` treats it as a bad row, `truncate_response` cuts the end
    of its answers (never the prompt), `error` stops the run. A text that is hopelessly too long is a bad row under
    `truncate_response` too: one with more characters than `max_length` times those of the tokenizer's longest token
    (64 at least)."""
    on_bad_row: Literal["skip", "error"] = "skip"
    """What to do with a row that cannot be used: `skip` leaves it out and records it in `bad_rows.jsonl`, `error` stops
    the run."""
    max_bad_fraction: Fraction = 0.05
    """Stop the run if more than this fraction of the rows read so far is bad. Checked from the tenth bad row on, and at
    the end."""
    shuffle_seed: Annotated[int, Field(ge=0), NUMBER] | None = 0
    """Seed for the order of the rows. The order differs from epoch to epoch. `null` keeps the order of the files."""
    shuffle_window: Annotated[int, Field(ge=1), NUMBER] | None = None
    """Number of rows in a shuffle window: rows are shuffled within a window, and files and row groups among each other.
    A reader holds one window in memory. By default 4096, or fewer if these rows exceed 128 MB."""

    pairs_from_ranking: PairsFromRanking = "best_worst"
    """Pairs of a training row with several rated answers (VLFeedback, NeMo-RL). `best_worst`: one, of the answers with
    the highest and the lowest rating. `best_rest`: the best answer with each one rated lower. `all`: every two answers
    with different ratings. The pairs of a row are in one step."""
    group: Literal["auto", "off"] = "off"
    """Order of training rows that share an image. `auto`: within a shuffle window, rows with the same images follow
    each other, and among them those with the same prompt, so that a step computes image, prompt and each answer once.
    A step then has fewer different images, and the first rows of a run wait until a whole window is read. `off`: the
    order does not depend on what rows hold."""

    @model_validator(mode="after")
    def _check_weights(self) -> DataConfig:
        for kind in ("language", "domain"):
            if getattr(self.weights, kind) and getattr(self, kind) is None:
                also = ", or to script" if kind == "language" else ""
                raise ValueError(
                    f"weights.{kind} needs data.{kind}: set it to the column that names the {kind} of a row{also}"
                )
        return self

    @field_validator("train", mode="before")
    @classmethod
    def _check_train(cls, value: Any) -> Any:
        if value is None or value == [] or value == {}:
            raise ValueError("give at least one source")
        return value


class OptimConfig(Config):
    """Optimizer, learning-rate schedule, and size of a step."""

    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = "adamw"
    """`adamw`, or 8-bit AdamW from bitsandbytes, which stores both moments in 8 bits (2 instead of 8 bytes per trained
    weight). `paged_adamw_8bit` can also move them to CPU memory when GPU memory runs out; without a GPU it equals
    `adamw_8bit`."""
    learning_rate: Float = Field(1e-6, gt=0)
    """Peak learning rate. Usual values for pretrained models: 1e-6 to 1e-5, with LoRA 1e-5 to 1e-4."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Learning rate after the warm-up: `linear` and `cosine` decay to 0, `constant` stays at the peak."""
    warmup: Float = Field(0.03, ge=0)
    """Length of the warm-up: a fraction of all steps if below 1, otherwise a number of steps."""
    weight_decay: Float = Field(0.0, ge=0)
    """Decoupled weight decay. Not applied to biases and norms."""
    adam_beta1: Float = Field(0.9, ge=0, lt=1)
    """Decay rate of AdamW's first moment."""
    adam_beta2: Float = Field(0.999, ge=0, lt=1)
    """Decay rate of AdamW's second moment."""
    adam_epsilon: Float = Field(1e-8, gt=0)
    """Term that AdamW adds to the denominator for numerical stability."""
    max_grad_norm: Float = Field(1.0, ge=0)
    """Maximum norm of the gradients over all parameters; larger gradients are scaled down. 0 disables clipping."""
    epochs: Float = Field(1.0, gt=0, le=10_000)
    """Number of passes over the training pairs. Can be a fraction."""
    max_steps: Annotated[int, Field(ge=1), NUMBER] | None = None
    """Maximum number of optimizer steps. By default, `epochs` alone determines the length of the run."""
    pairs_per_step: Int = Field(32, ge=1)
    """Pairs per optimizer step, summed over all workers. Changing the number of workers does not change it. If rows
    give several pairs (`data.pairs_from_ranking`), this is the number of rows; losses and metrics are averages over
    their pairs."""
    tokens_per_microbatch: Int = Field(8192, ge=1)
    """Maximum number of tokens (prompt, both answers, image tokens) in one micro-batch of a worker. Lower it if a GPU
    runs out of memory; the loss of a step does not depend on it. With concatenated attention, prompts count twice and
    padding counts."""
    seed: Int = Field(0, ge=0, lt=2**32)
    """Seed of the adapters' initial weights and of dropout."""


class DeepspeedConfig(Config):
    """ZeRO stage and settings of DeepSpeed. Stage 0, the default, runs on PyTorch without DeepSpeed."""

    zero_stage: Annotated[Literal[0, 1, 2, 3], NUMBER] = 0
    """ZeRO stage. 0 replicates everything on each worker; 1 shards the optimizer states; 2 shards gradients as well; 3
    shards parameters as well. A higher stage needs less memory and more communication."""
    offload_optimizer: Literal["none", "cpu"] = "none"
    """Where the optimizer states and the float32 copies of the weights are. `none`: on the GPU. `cpu`: in main memory,
    where AdamW then runs; requires `zero_stage` 1 to 3 and `optim.optimizer: adamw`. A step takes longer. No effect in
    a run without GPUs."""
    offload_param: Literal["none", "cpu"] = "none"
    """Where a worker keeps its part of the weights between uses. `none`: on the GPU. `cpu`: in main memory, from where
    each use copies them; requires `zero_stage` 3. A step takes much longer. No effect in a run without GPUs."""
    config: dict[str, Any] = Field(default_factory=dict)
    """Further settings of DeepSpeed, such as `{zero_optimization: {sub_group_size: 100000000}}`; requires `zero_stage`
    1 to 3. They are passed on as they are. Settings that another field of the recipe decides are refused."""


class ScalingConfig(Config):
    """Number of workers, and the resources of each."""

    num_workers: NumWorkers = 1
    """Number of training processes, or `[min, max]`. Each uses one GPU, or only CPUs if there are no GPUs. With
    `[min, max]`, a run starts with as many workers as the cluster has room for, takes more when nodes come, and goes on
    with fewer when one goes. The loss curve does not depend on it."""
    resize_interval_s: Annotated[float, Field(gt=0), NUMBER] = 60.0
    """With `num_workers: [min, max]`, seconds between looks for room for more workers. A change of their number
    restarts all of them."""
    gpus_per_worker: Literal["auto"] | Annotated[float, Field(ge=0, le=1), NUMBER] = "auto"
    """GPUs per worker: 0, 1, or a fraction. `auto` is 1 if the cluster has GPUs, otherwise 0. With a fraction, runs of
    one worker share a GPU, such as the trials of a search (`tune.max_concurrent`)."""
    cpus_per_worker: Annotated[float, Field(gt=0), NUMBER] | None = None
    """CPUs reserved per worker. By default 1, or less if that would leave no CPU for reading data. Without GPUs, a
    worker then uses at most as many threads to compute; by default, the workers share all CPUs of the machine."""
    sequence_parallel: Int = Field(1, ge=1)
    """Number of workers that compute the same pairs together, each a part of their tokens, for pairs that do not fit on
    one GPU; divides `num_workers`. Then `optim.tokens_per_microbatch` counts the tokens of each of them. Requires
    attention with a shared prefix, and a number of attention heads that can be divided."""
    accelerator_type: Text | None = None
    """Type of GPU that the workers need, by Ray's name for it, such as `H100` or `A100-80G`. An autoscaling cluster
    then starts nodes of the pool that has it. By default, any."""
    labels: dict[Text, Text] = Field(default_factory=dict)
    """Labels of nodes that the workers need, such as `{ray.io/market-type: spot}`. A value may be `!value`,
    `in(a,b)` or `!in(a,b)`, as in Ray's label selectors."""
    nodes_timeout_s: Annotated[float, Field(ge=0), NUMBER] = 0.0
    """Seconds that a run waits for nodes that an autoscaling cluster starts for its workers, before it ends. By
    default, 0: the workers must fit the cluster as it is."""
    max_failures: Int = Field(3, ge=0)
    """Number of worker failures after which the run ends. Before that, it resumes from the latest checkpoint."""
    max_preemptions: Annotated[int, Field(ge=0), NUMBER] | None = None
    """Number of announced losses of nodes (spot nodes that are taken back, nodes that are drained) after which the run
    ends. They do not count as failures. By default, any number."""
    timeout_s: Annotated[float, Field(gt=0), NUMBER] = 1800.0
    """Seconds that a worker waits for the others, before the run fails and resumes. Raise it if saving takes longer:
    for every checkpoint of ZeRO stage 0, the others wait for rank 0 to write the weights, and at the end also to
    upload them. A save waits for the upload of the checkpoint before."""

    @property
    def min_workers(self) -> int:
        """The least number of workers that a run trains with."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def max_workers(self) -> int:
        """The greatest number of workers that a run trains with."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]

    @property
    def workers_text(self) -> str:
        """The number of workers in words: `2 worker(s)` or `1 to 4 workers`."""
        if isinstance(self.num_workers, int):
            return f"{self.num_workers} worker(s)"
        return f"{self.min_workers} to {self.max_workers} workers"


class CheckpointConfig(Config):
    """Where runs are stored, and how often checkpoints are saved."""

    storage: PathText = Field("runs", min_length=1)
    """Folder that holds all runs: a path that every node can access, `s3://bucket/...` or `gs://bucket/...`. A run is
    stored in `<storage>/<name>`."""
    every_steps: Annotated[int, Field(ge=1), NUMBER] | None = None
    """Steps between checkpoints. By default, about ten checkpoints per run."""
    keep: Int = Field(2, ge=1)
    """Number of most recent checkpoints to keep. While one is saved, a disk holds one more."""
    stop_timeout_s: Annotated[float, Field(gt=0), NUMBER] = 600.0
    """Seconds that a run has to save a checkpoint and end, after SIGINT (Ctrl-C) or SIGTERM. A second signal ends the
    run at once."""
    scratch: PathText | None = None
    """Folder on the disk of each node, where workers write a checkpoint before they upload it to an object store. A run
    ends at its start if a checkpoint does not fit there. By default, the system's folder for temporary files
    (`TMPDIR`)."""

    @field_validator("scratch")
    @classmethod
    def _check_scratch(cls, value: str | None) -> str | None:
        if value is not None and "://" in value:
            raise ValueError("must be a folder on the disk of each node")
        return value

    @field_validator("storage")
    @classmethod
    def _check_storage(cls, value: str) -> str:
        if "://" in value and not re.match(r"(s3|gs)://[^/]", value):
            raise ValueError("must be a folder that every node can access, s3://bucket/... or gs://bucket/...")
        return value
