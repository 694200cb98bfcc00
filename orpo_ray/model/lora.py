"""Low-rank adapters on a model (peft): which layers they go on, and what is trained in full beside them.

Names in a recipe are parts (`language`, `connector`, `vision`), or names of modules: `q_proj`, `self_attn.q_proj`, or
the whole path. What `model.freeze` names takes no adapter.
"""

from __future__ import annotations

import difflib
from typing import Any

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from orpo_ray.config.schema import PARTS, LoraConfig, ModelConfig
from orpo_ray.errors import UserError
from orpo_ray.model.families import Family

TARGETS = "model.lora.target_modules"
SAVED = "model.lora.modules_to_save"


def add_adapters(model: Any, section: ModelConfig, family: Family, seed: int) -> Any:
    """The model wrapped by peft: its weights frozen, adapters and `modules_to_save` trained. Raises UserError."""
    from peft import LoraConfig, get_peft_model

    lora = section.lora
    assert lora is not None
    parts = _Parts(model, family)
    saved = _modules_to_save(parts, lora, section)
    targets = _targets(parts, lora, section)
    if overlapping := [name for name in targets if _is_within(name, saved)]:
        raise UserError(
            f"{overlapping[0]} would be trained in full and adapted too",
            field=SAVED,
            value=lora.modules_to_save,
            fix=f"leave it out here, or out of {TARGETS}",
        )
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        target_modules=targets,
        modules_to_save=saved or None,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # Adapters stay in the model's dtype: ZeRO-3 gathers parameters of one dtype only.
        adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    for parameter in adapted.parameters():
        if parameter.requires_grad:  # those beside 4-bit weights were made in float32
            parameter.data = parameter.data.to(model.dtype)
    return adapted


class _Parts:
    """A model's modules by the part that they belong to. The output head counts to the language model."""

    def __init__(self, model: Any, family: Family) -> None:
        self.family = family
        self.modules: dict[str, nn.Module] = dict(model.named_modules())
        head = model.get_output_embeddings()
        self.head = next((name for name, module in self.modules.items() if module is head), None)
        shared: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            shared.setdefault(id(parameter), []).append(name)
        self.tied = {name: names for names in shared.values() if len(names) > 1 for name in names}

    def of(self, name: str) -> str | None:
        """`vision`, `connector`, `language`, or None for what is in none of them."""
        if name == self.head:
            return "language"
        # Qwen2.5-VL's connector lies inside its vision part, so it is asked for first.
        for part in ("connector", "vision", "language"):
            if f"{name}.".startswith(self.family.prefix(part)):
                return part
        return None

    def named(self, wanted: str) -> list[str]:
        """Paths of the modules that a recipe's name stands for, parts aside."""
        return [name for name in self.modules if name == wanted or name.endswith(f".{wanted}")]

    def tied_to(self, name: str) -> str | None:
        """A weight outside a module that is one of its own."""
        for own, names in self.tied.items():
            if own.startswith(f"{name}."):
                for other in names:
                    if not other.startswith(f"{name}."):
                        return other
        return None


def _targets(parts: _Parts, lora: LoraConfig, section: ModelConfig) -> list[str]:
    linears = [
        name
        for name, module in parts.modules.items()
        # torch's own attention reads its projection's weight and never calls the layer.
        if isinstance(module, nn.Linear) and not isinstance(module, NonDynamicallyQuantizableLinear)
    ]
    free = [name for name in linears if parts.of(name) not in section.freeze]
    found: dict[str, None] = {}
    for wanted in lora.target_modules or ["language"]:
        if wanted in PARTS:
            mine = [name for name in free if parts.of(name) == wanted and name != parts.head]
        else:
            mine = [name for name in parts.named(wanted) if name in free]
        if not mine and wanted in PARTS:
            fix = f"train it in full: {SAVED}: [{wanted}]"
            raise UserError("this part of the model has no linear layer", field=TARGETS, value=wanted, fix=fix)
        if not mine:
            raise _names_nothing(wanted, TARGETS, "linear layer", linears, section)
        found |= dict.fromkeys(mine)
    for name in found:
        _refuse_tied(parts, name, TARGETS)
    return list(found)


def _modules_to_save(parts: _Parts, lora: LoraConfig, section: ModelConfig) -> list[str]:
    found: dict[str, None] = {}
    for wanted in lora.modules_to_save:
        if wanted in PARTS:
            paths = [prefix.removesuffix(".") for prefix in parts.family.prefix(wanted)]
            mine = [inner for path in paths if path in parts.modules for inner in _wrappable(path, parts.modules[path])]
        else:
            mine = [name for name in parts.named(wanted) if parts.of(name) not in section.freeze]
            mine = [name for name in mine if any(True for _ in parts.modules[name].parameters())]
        if not mine:
            raise _names_nothing(wanted, SAVED, "module with weights", list(parts.modules), section)
        found |= dict.fromkeys(mine)
    # What lies within another that is trained anyway would be wrapped twice.
    outer = [name for name in found if not _is_within(name, [other for other in found if other != name])]
    for name in outer:
        _refuse_tied(parts, name, SAVED)
        inner = {parts.of(module) for module in parts.modules if module.startswith(f"{name}.")}
        if undeclared := [part for part in PARTS if part in inner - {parts.of(name), *lora.modules_to_save}]:
            raise UserError(
                f"{name} holds this model's {undeclared[0]} too, which would be trained with it",
                field=SAVED,
                value=lora.modules_to_save,
                fix=f"name {undeclared[0]} as well, or modules inside {name}",
            )
        if any(type(parameter).__name__ == "Params4bit" for parameter in parts.modules[name].parameters()):
            raise UserError(
                f"{name} is in 4 bits, and can't be trained in full",
                field=SAVED,
                value=lora.modules_to_save,
                fix=f"add it to model.quantization.skip_modules, or adapt it: {TARGETS}",
            )
    return outer


def _wrappable(name: str, module: nn.Module) -> list[str]:
    """A module, or what a list of them holds: peft wraps no list."""
    if not isinstance(module, nn.ModuleList):
        return [name]
    return [f"{name}.{index}" for index, _ in module.named_children()]


def _is_within(name: str, others: list[str]) -> bool:
    return any(name == other or name.startswith(f"{other}.") for other in others)


def _refuse_tied(parts: _Parts, name: str, field: str) -> None:
    if (other := parts.tied_to(name)) is not None:
        raise UserError(
            f"{name} has the weight that is {other} too, which would be trained apart from it and lost when merged",
            field=field,
            value=name.rsplit(".", 1)[-1],
            fix="leave it out",
        )


def _names_nothing(wanted: str, field: str, what: str, paths: list[str], section: ModelConfig) -> UserError:
    leaves = [*PARTS, *sorted({path.rsplit(".", 1)[-1] for path in paths if path})]
    near = difflib.get_close_matches(wanted, leaves, n=1, cutoff=0.5)
    where = f" outside what model.freeze names ({', '.join(section.freeze)})" if section.freeze else ""
    fix = f"did you mean {near[0]}?" if near and near[0] != wanted else f"a part ({', '.join(PARTS)}), or a name"
    return UserError(f"no {what}{where} has this name", field=field, value=wanted, fix=fix)
