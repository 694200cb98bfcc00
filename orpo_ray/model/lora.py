"""Add low-rank adapters (peft) to a model: choose the layers, and the modules that are trained in full.

A recipe names parts (`language`, `connector`, `vision`) or modules: `q_proj`, `self_attn.q_proj`, or the whole
path. Parts that `model.freeze` names get no adapters.
"""

from __future__ import annotations

import copy
import difflib
from typing import Any

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from orpo_ray.config.field_types import PARTS
from orpo_ray.config.schema import LoraConfig, ModelConfig
from orpo_ray.errors import UserError
from orpo_ray.model.families.base import Family
from orpo_ray.model.gradient_checkpointing import deprecated_names_allowed

TARGETS = "model.lora.target_modules"
SAVED = "model.lora.modules_to_save"
FIRST_ADAPTER = "default"
"""peft's name of a model's only adapter."""


def add_adapters(model: Any, model_config: ModelConfig, family: Family, seed: int) -> Any:
    """Wrap a model with peft: freeze its weights, and train adapters and `modules_to_save`.

    Args:
        model: the transformers model.
        model_config: the recipe's, with lora.
        family: the model's.
        seed: of the adapters' first weights.

    Raises:
        UserError: a name in the recipe does not fit the model.
    """
    from peft import LoraConfig, get_peft_model

    lora = model_config.lora
    assert lora is not None
    modules = _ModuleIndex(model, family)
    saved = _modules_to_save(modules, lora, model_config)
    targets = _target_modules(modules, lora, model_config)
    if overlapping := [name for name in targets if _is_within(name, saved)]:
        raise UserError(
            f"{overlapping[0]} would be adapted and also trained in full",
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
        # Adapters stay in the model's dtype, because ZeRO-3 gathers parameters of one dtype only.
        with deprecated_names_allowed():
            adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    for parameter in adapted.parameters():
        if parameter.requires_grad:  # peft makes those beside 4-bit weights in float32
            parameter.data = parameter.data.to(model.dtype)
    return adapted


def add_adapter_beside(adapted: Any, name: str, lora: LoraConfig, seed: int) -> None:
    """Give every adapted layer another adapter, with the first weights that `add_adapters` would give it.

    Args:
        adapted: peft's wrapper around a model.
        name: of the new adapter.
        lora: its rank and scale; all else is as in the first adapter.
        seed: of its first weights.
    """
    config = copy.deepcopy(adapted.peft_config[FIRST_ADAPTER])
    config.r, config.lora_alpha = lora.r, lora.alpha
    with torch.random.fork_rng(devices=[]), deprecated_names_allowed():
        torch.manual_seed(seed)
        adapted.add_adapter(name, config, autocast_adapter_dtype=False)
    dtype = adapted.get_base_model().dtype
    for parameter in adapter_weights(adapted, name).values():
        parameter.data = parameter.data.to(dtype)


def adapter_weights(adapted: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """One adapter's weights, by the names that they have where it is the only one."""
    found: dict[str, nn.Parameter] = {}
    for path, parameter in adapted.named_parameters():
        layer, _, own = path.rpartition(".lora_")
        matrix, _, rest = own.partition(f".{name}.")
        if layer and rest:
            found[f"{layer}.lora_{matrix}.{FIRST_ADAPTER}.{rest}"] = parameter
    return found


class _ModuleIndex:
    """A model's modules, by name and by part. The output head counts as part of the language model."""

    def __init__(self, model: Any, family: Family) -> None:
        self.family = family
        self.modules: dict[str, nn.Module] = dict(model.named_modules())
        head = model.get_output_embeddings()
        self.head = next((name for name, module in self.modules.items() if module is head), None)
        shared: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            shared.setdefault(id(parameter), []).append(name)
        self.tied = {name: names for names in shared.values() if len(names) > 1 for name in names}

    def part_of(self, name: str) -> str | None:
        """`vision`, `connector` or `language`; None for a module in none of them."""
        if name == self.head:
            return "language"
        # Qwen2.5-VL's connector lies inside its vision encoder, so it comes first.
        for part in ("connector", "vision", "language"):
            if f"{name}.".startswith(self.family.prefixes(part)):
                return part
        return None

    def named(self, wanted: str) -> list[str]:
        """Paths of the modules that a recipe's name matches, parts aside."""
        return [name for name in self.modules if name == wanted or name.endswith(f".{wanted}")]

    def tied_to(self, name: str) -> str | None:
        """A weight outside a module that is the same tensor as one inside it; None if there is none."""
        for own, names in self.tied.items():
            if own.startswith(f"{name}."):
                for other in names:
                    if not other.startswith(f"{name}."):
                        return other
        return None


def _target_modules(modules: _ModuleIndex, lora: LoraConfig, model_config: ModelConfig) -> list[str]:
    """Paths of the linear layers that get adapters."""
    linears = [
        name
        for name, module in modules.modules.items()
        # torch's own attention reads its projection's weight and never calls the layer.
        if isinstance(module, nn.Linear) and not isinstance(module, NonDynamicallyQuantizableLinear)
    ]
    free = [name for name in linears if modules.part_of(name) not in model_config.freeze]
    found: dict[str, None] = {}
    for wanted in lora.target_modules or ["language"]:
        if wanted in PARTS:
            matching = [name for name in free if modules.part_of(name) == wanted and name != modules.head]
        else:
            matching = [name for name in modules.named(wanted) if name in free]
        if not matching and wanted in PARTS:
            fix = f"train it in full: {SAVED}: [{wanted}]"
            raise UserError("this part of the model has no linear layer", field=TARGETS, value=wanted, fix=fix)
        if not matching:
            raise _no_match(wanted, TARGETS, "linear layer", linears, model_config)
        found |= dict.fromkeys(matching)
    for name in found:
        _refuse_tied(modules, name, TARGETS)
    return list(found)


def _modules_to_save(modules: _ModuleIndex, lora: LoraConfig, model_config: ModelConfig) -> list[str]:
    """Paths of the modules that are trained in full."""
    found: dict[str, None] = {}
    for wanted in lora.modules_to_save:
        if wanted in PARTS:
            paths = [prefix.removesuffix(".") for prefix in modules.family.prefixes(wanted)]
            matching = [
                inner for path in paths if path in modules.modules for inner in _wrappable(path, modules.modules[path])
            ]
        else:
            matching = [name for name in modules.named(wanted) if modules.part_of(name) not in model_config.freeze]
            matching = [name for name in matching if any(True for _ in modules.modules[name].parameters())]
        if not matching:
            raise _no_match(wanted, SAVED, "module with weights", list(modules.modules), model_config)
        found |= dict.fromkeys(matching)
    # A module inside another one that is trained anyway would be wrapped twice.
    outer = [name for name in found if not _is_within(name, [other for other in found if other != name])]
    for name in outer:
        _check_saved_module(modules, name, lora)
    return outer


def _check_saved_module(modules: _ModuleIndex, name: str, lora: LoraConfig) -> None:
    """Raises UserError if a module cannot be trained in full."""
    _refuse_tied(modules, name, SAVED)
    inner = {modules.part_of(module) for module in modules.modules if module.startswith(f"{name}.")}
    declared = {modules.part_of(name), *lora.modules_to_save}
    if undeclared := [part for part in PARTS if part in inner - declared]:
        raise UserError(
            f"{name} also contains this model's {undeclared[0]}, which would be trained with it",
            field=SAVED,
            value=lora.modules_to_save,
            fix=f"name {undeclared[0]} as well, or modules inside {name}",
        )
    if any(type(parameter).__name__ == "Params4bit" for parameter in modules.modules[name].parameters()):
        raise UserError(
            f"{name} is in 4 bits and cannot be trained in full",
            field=SAVED,
            value=lora.modules_to_save,
            fix=f"add it to model.quantization.skip_modules, or adapt it: {TARGETS}",
        )


def _wrappable(name: str, module: nn.Module) -> list[str]:
    """The path of a module, or of the modules in a list: peft does not wrap lists."""
    if not isinstance(module, nn.ModuleList):
        return [name]
    return [f"{name}.{index}" for index, _ in module.named_children()]


def _is_within(name: str, others: list[str]) -> bool:
    return any(name == other or name.startswith(f"{other}.") for other in others)


def _refuse_tied(modules: _ModuleIndex, name: str, field: str) -> None:
    if (other := modules.tied_to(name)) is not None:
        raise UserError(
            f"{name} shares its weight with {other}; training it would untie the two, and merging would lose it",
            field=field,
            value=name.rsplit(".", 1)[-1],
            fix="leave it out",
        )


def _no_match(wanted: str, field: str, what: str, paths: list[str], model_config: ModelConfig) -> UserError:
    names = [*PARTS, *sorted({path.rsplit(".", 1)[-1] for path in paths if path})]
    near = difflib.get_close_matches(wanted, names, n=1, cutoff=0.5)
    where = (
        f" outside the frozen parts ({', '.join(model_config.freeze)}, see model.freeze)" if model_config.freeze else ""
    )
    parts = ", ".join(PARTS)
    fix = f"did you mean {near[0]}?" if near and near[0] != wanted else f"name a part ({parts}) or a module"
    return UserError(f"no {what}{where} has this name", field=field, value=wanted, fix=fix)
