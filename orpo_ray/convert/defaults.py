"""What other trainers train with where a config gives no value; only fields that change the training."""

from __future__ import annotations

from typing import Any

BETA = 0.1  # of every loss
# transformers' TrainingArguments
_TRAINING = {
    "learning_rate": 5e-5, "num_train_epochs": 3.0, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1,
    "warmup_steps": 0, "lr_scheduler_type": "linear", "weight_decay": 0.0, "max_grad_norm": 1.0,
}  # fmt: skip
DEFAULTS: dict[str, dict[str, Any]] = {
    # ORPOConfig, CPOConfig and ModelConfig
    "TRL": _TRAINING
    | {"learning_rate": 1e-6, "beta": BETA, "simpo_gamma": 0.5, "max_length": 1024, "lora_r": 16, "lora_alpha": 32,
       "lora_dropout": 0.05},
    # hparams/finetuning_args.py and data_args.py; lora_alpha is twice the rank
    "LLaMA-Factory": _TRAINING
    | {"pref_beta": BETA, "simpo_gamma": 0.5, "cutoff_len": 2048, "lora_rank": 8, "lora_dropout": 0.0},
    # trainers/arguments.py and tuner_args.py; learning rate and accumulation depend on other fields
    "ms-swift": _TRAINING
    | {"per_device_train_batch_size": 1, "lr_scheduler_type": "cosine", "weight_decay": 0.1, "adam_beta2": 0.95,
       "lora_rank": 8, "lora_alpha": 32, "lora_dropout": 0.05},
    # utils/schemas/training.py and config.py; a learning rate is required
    "axolotl": {"num_epochs": 1.0, "micro_batch_size": 1, "gradient_accumulation_steps": 1, "lr_scheduler": "cosine",
                "sequence_len": 512},
}  # fmt: skip
SWIFT_LEARNING_RATES = {"full": 1e-5, "lora": 1e-4}
SWIFT_PAIRS_PER_STEP = 16  # at least
