"""Tuning: adapters on 4-bit weights, every kind of adapter, frozen parts, 8-bit optimizers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn.modules import Linear4bit
from torch import nn

from orpo_ray.config.schema import ModelConfig
from orpo_ray.data.packing import PairBatch, build_batch
from orpo_ray.errors import UserError
from orpo_ray.model.families.registry import family_of
from orpo_ray.model.loading import load_model, without_adapters
from orpo_ray.objective.base import Normaliser
from orpo_ray.objective.orpo import ORPO
from orpo_ray.objective.pair_model import PairModel
from orpo_ray.tiny_models.families import TINY_FAMILIES
from support.engines_by_hand import CPU
from support.pairs_by_hand import NORM, make_pair

TINY = "orpo-ray/tiny-smolvlm"


def load(model_id: str = TINY, **section: Any) -> Any:
    return load_model(ModelConfig.model_validate({"id": model_id, **section}), CPU, seed=0)


def error_of(model_id: str = TINY, **section: Any) -> UserError:
    with pytest.raises(UserError) as error:
        load(model_id, **section)
    return error.value


def two_pairs() -> PairBatch:
    rng = np.random.default_rng(0)
    return build_batch(
        [make_pair("smolvlm", rng, 1, 6, 9, 7, sample_index) for sample_index in range(2)], "response", "shared_prefix"
    )


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


class Test4Bit:
    @pytest.mark.parametrize("family", TINY_FAMILIES)
    def test_takes_the_language_models_linear_layers_and_nothing_else(
        self, folders: dict[str, str], family: str
    ) -> None:
        plain = load(folders[family])
        base = without_adapters(load(folders[family], lora={"r": 4}, quantization={}))
        prefix = family_of(base.config).language
        head = base.get_output_embeddings()
        expected = {
            name
            for name, module in plain.named_modules()
            if isinstance(module, nn.Linear) and name.startswith(prefix) and module is not plain.get_output_embeddings()
        }
        found = {name.removesuffix(".base_layer") for name, m in base.named_modules() if isinstance(m, Linear4bit)}
        assert found == expected
        assert found
        for name, parameter in base.named_parameters():
            if "lora_" not in name and name.replace(".base_layer", "").rpartition(".")[0] not in found:
                assert torch.equal(parameter, plain.get_parameter(name.replace(".base_layer", ""))), name
        tied = plain.get_output_embeddings().weight is plain.get_input_embeddings().weight
        assert (head.weight is base.get_input_embeddings().weight) == tied

    def test_bytes_a_weight(self, folders: dict[str, str]) -> None:
        """Half a byte per weight, one byte of scale per 64 weights, 4 bytes per 256 scales; then tables per layer."""
        packed = weights = scales = 0
        for module in load(folders["smolvlm"], lora={"r": 4}, quantization={}).modules():
            if not isinstance(module, Linear4bit):
                continue
            weights += module.in_features * module.out_features
            packed += module.weight.untyped_storage().nbytes()
            state = module.weight.quant_state
            for scale in (state.absmax, state.state2.absmax, state.offset):
                scales += scale.untyped_storage().nbytes()
        assert weights > 500_000
        assert packed == weights / 2
        bound = 0.5 + 1 / 64 + 4 / (64 * 256)
        assert (packed + scales) / weights == pytest.approx(bound, abs=1e-3)  # plus an offset of 4 bytes per layer
        assert (packed + scales) / weights <= 0.6

    def test_trains_on_shared_prefixes_and_only_the_adapters(self) -> None:
        model = PairModel(load(lora={"r": 8, "dropout": 0.0}, quantization={}, gradient_checkpointing=True), NORM)
        assert model.layout == "shared_prefix"
        before = {name: parameter.clone() for name, parameter in model.named_parameters()}
        batch = two_pairs()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses = []
        for _ in range(6):
            loss, _ = ORPO(0.1).loss(model(batch), batch.weights, Normaliser(2.0))
            loss.backward()
            assert all((p.grad is not None) == ("lora_" in name) for name, p in model.named_parameters())
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        assert losses[-1] < losses[0] / 2
        moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
        assert moved == trained(model)

    @pytest.mark.parametrize(("dtype", "storage"), [("float32", "uint8"), ("bfloat16", "bfloat16")])
    def test_weights_saved_in_4_bits_are_the_same_when_loaded_again(
        self, tmp_path: Path, dtype: str, storage: str
    ) -> None:
        section = {"dtype": dtype, "lora": {"r": 4}, "quantization": {"quant_storage": storage}}
        first = load(**section).unload()
        first.save_pretrained(tmp_path)
        again = without_adapters(load(str(tmp_path), **section))
        kept = dict(first.named_modules())
        compared = 0
        for name, module in again.named_modules():
            if isinstance(module, Linear4bit):
                assert module.compute_dtype == getattr(torch, dtype)
                assert torch.equal(values(module), values(kept[name.removesuffix(".base_layer")]))
                compared += 1
        assert compared == 21
        assert error_of(str(tmp_path)).field == "model.quantization"
        other = section | {"quantization": {"quant_type": "fp4", "quant_storage": storage}}
        assert "nf4" in (error_of(str(tmp_path), **other).fix or "")

    def test_weights_quantised_otherwise_are_refused(self, folders: dict[str, str], tmp_path: Path) -> None:
        model = TINY_FAMILIES["llava"]().model()
        model.config.quantization_config = {"quant_method": "gptq", "bits": 4}
        model.config.save_pretrained(tmp_path)
        error = error_of(str(tmp_path), lora={}, quantization={})
        assert (error.field, "gptq" in str(error)) == ("model.id", True)

    @pytest.mark.parametrize(
        ("quantization", "field"),
        [
            ({"skip_modules": ["down_prj"]}, "model.quantization.skip_modules"),
            ({"skip_modules": ["layers"]}, "model.quantization.skip_modules"),
            ({"quant_storage": "bfloat16"}, "model.quantization.quant_storage"),
        ],
    )
    def test_what_does_not_fit_the_model_is_said(self, quantization: dict[str, Any], field: str) -> None:
        assert error_of(lora={}, quantization=quantization).field == field

    def test_named_modules_stay_as_they_are(self) -> None:
        model = load(lora={"target_modules": ["q_proj"]}, quantization={"skip_modules": ["down_proj"]})
        kinds = {name.rsplit(".", 1)[-1]: type(m) for name, m in model.named_modules() if name.endswith("_proj")}
        assert kinds["down_proj"] is nn.Linear
        assert kinds["up_proj"] is Linear4bit


def values(module: nn.Module) -> torch.Tensor:
    weight: Any = module.weight
    return dequantize_4bit(weight.data, weight.quant_state)


class TestAdapters:
    @pytest.mark.parametrize(
        ("lora", "freeze", "parts"),
        [
            ({}, [], {"text_model"}),
            ({}, ["vision", "connector"], {"text_model"}),
            ({"target_modules": "connector"}, [], {"connector"}),
            ({"target_modules": ["vision", "connector"]}, [], {"vision_model", "connector"}),
            ({"target_modules": ["q_proj"]}, [], {"vision_model", "text_model"}),
            ({"target_modules": ["q_proj"]}, ["vision"], {"text_model"}),
            ({"target_modules": ["vision"], "modules_to_save": ["connector"]}, [], {"vision_model", "connector"}),
        ],
    )
    def test_go_where_the_recipe_says(self, lora: dict[str, Any], freeze: list[str], parts: set[str]) -> None:
        names = trained(load(lora=lora, freeze=freeze))
        every = ("vision_model", "connector", "text_model", "lm_head")
        assert {part for part in every if any(f".{part}." in name for name in names)} == parts

    def test_rslora_scales_by_the_root_of_the_rank(self) -> None:
        for use_rslora, scale in ((False, 32 / 16), (True, 32 / math.sqrt(16))):
            model = load(lora={"r": 16, "alpha": 32, "use_rslora": use_rslora})
            found = {module.scaling["default"] for module in model.modules() if hasattr(module, "lora_A")}
            assert found == {scale}

    @pytest.mark.parametrize("quantization", [None, {}])
    def test_dora_begins_as_the_model_and_trains_its_magnitudes(self, quantization: dict[str, Any] | None) -> None:
        batch = two_pairs()
        both = {}
        for use_dora in (False, True):
            model = PairModel(load(lora={"r": 4, "use_dora": use_dora}, quantization=quantization), NORM)
            both[use_dora] = model(batch)
        assert torch.allclose(both[True].chosen, both[False].chosen, atol=1e-3)
        loss, _ = ORPO(0.1).loss(both[True], batch.weights, Normaliser(2.0))
        loss.backward()
        magnitudes = [p for name, p in model.named_parameters() if "magnitude" in name]
        assert len(magnitudes) == 21
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in magnitudes)

    def test_modules_to_save_are_trained_beside_them(self) -> None:
        model = load(lora={"modules_to_save": ["connector", "vision"]}, quantization={})
        names = trained(model)
        words = ("modules_to_save", "lora_A", "lora_B")
        assert all(any(f".{word}." in name for word in words) for name in names)
        assert all(any(f".{word}." in name for name in names) for word in words)
        assert {model.get_parameter(name).dtype for name in names} == {torch.float32}

    @pytest.mark.parametrize(
        ("family", "lora", "freeze", "field", "said"),
        [
            ("smolvlm", {"target_modules": ["q_prj"]}, [], "model.lora.target_modules", "did you mean q_proj?"),
            ("smolvlm", {"target_modules": ["conector"]}, [], "model.lora.target_modules", "did you mean connector?"),
            ("smolvlm", {"target_modules": ["patch_embedding"]}, [], "model.lora.target_modules", "no linear layer"),
            ("smolvlm", {"target_modules": ["lm_head"]}, [], "model.lora.target_modules", "embed_tokens"),
            ("smolvlm", {"modules_to_save": ["lm_head"]}, [], "model.lora.modules_to_save", "embed_tokens"),
            ("smolvlm", {"modules_to_save": ["nothing"]}, [], "model.lora.modules_to_save", "no module"),
            ("smolvlm", {"modules_to_save": ["down_proj"]}, [], "model.lora.modules_to_save", "also trained in full"),
            ("llava", {"modules_to_save": ["lm_head"]}, ["language"], "model.lora.modules_to_save", "model.freeze"),
            ("gemma3", {"target_modules": ["connector"]}, [], "model.lora.target_modules", "train it in full"),
            ("qwen2_5_vl", {"modules_to_save": ["vision"]}, [], "model.lora.modules_to_save", "connector"),
        ],
    )
    def test_names_that_do_not_fit_the_model(
        self, folders: dict[str, str], family: str, lora: dict[str, Any], freeze: list[str], field: str, said: str
    ) -> None:
        lora = {"target_modules": ["vision"]} | lora if "language" in freeze else lora
        error = error_of(folders[family], lora=lora, freeze=freeze)
        assert error.field == field
        assert said in str(error)

    def test_what_is_in_4_bits_cannot_be_trained_in_full(self) -> None:
        lora = {"modules_to_save": ["down_proj"], "target_modules": ["q_proj"]}
        assert "skip_modules" in (error_of(lora=lora, quantization={}).fix or "")
        assert any(
            "down_proj.modules" in n for n in trained(load(lora=lora, quantization={"skip_modules": "down_proj"}))
        )


@pytest.mark.parametrize("freeze", [["vision"], ["vision", "connector"]])
def test_a_frozen_part_gets_no_gradient_and_keeps_nothing_for_backward(freeze: list[str]) -> None:
    frozen = [f".{TINY_PARTS[part]}." for part in freeze]
    model, saved, outputs = saved_for_backward(freeze)
    assert not saved & outputs
    for name, parameter in model.named_parameters():
        if any(part in f".{name}" for part in frozen):
            assert parameter.grad is None, name
            assert parameter.untyped_storage().data_ptr() not in saved, name
    _, saved, outputs = saved_for_backward([])
    assert len(saved & outputs) > 10, "what is saved must be visible to this test"


TINY_PARTS = {"vision": "vision_model", "connector": "connector"}


def saved_for_backward(freeze: list[str]) -> tuple[PairModel, set[int], set[int]]:
    """Return a model after a step, the storages that autograd saved, and those that its vision modules returned.

    Not the last of the vision part where the connector is trained: that is the connector's input.
    """
    model = PairModel(load(freeze=freeze), NORM)
    batch = two_pairs()
    saved: dict[int, torch.Tensor] = {}
    outputs: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor  # keep a reference, so that the address is not used again
        return tensor

    def seen(_module: nn.Module, _inputs: Any, output: Any) -> None:
        for tensor in output if isinstance(output, tuple) else (output,):
            if isinstance(tensor, torch.Tensor):
                outputs[tensor.untyped_storage().data_ptr()] = tensor

    parts = (".vision_model.", ".connector.") if "connector" in freeze else (".vision_model.embeddings", ".encoder.")
    for name, module in model.named_modules():
        if any(part in name for part in parts):
            module.register_forward_hook(seen)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss, _ = ORPO(0.1).loss(model(batch), batch.weights, Normaliser(2.0))
    loss.backward()
    assert outputs
    return model, set(saved), set(outputs)
