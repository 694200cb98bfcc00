"""`orpo-ray export`: transformers loads the exported model, with the log-probs of the trained one."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from rich.console import Console
from safetensors.torch import load_file
from torch.nn.functional import log_softmax

from orpo_ray.errors import UserError
from orpo_ray.exporting.export import Exported, ExportOptions, export_run
from orpo_ray.model.adapter_folder import ADAPTER_WEIGHTS, load_adapted
from orpo_ray.model.loading import load_model
from orpo_ray.processing.processor import load_processor
from orpo_ray.storage.run_folder import COMPLETION_FILES
from orpo_ray.tiny_models.build import resolve
from orpo_ray.training.manifest import manifest_name, write_manifest
from support.finished_runs import CPU, called_directly, checkpoint_of, finished_run, trained
from support.tiny_runs import tiny_recipe

# Tolerance of log-probs after a merge in float32; 2e-6 was measured. It also holds for a 4-bit base, since the merged
# model has the dequantized weights. Adapters on the original weights of the base would be off by 0.5.
LOGPS = 1e-4


def logps(model: Any) -> torch.Tensor:
    """Return the log-probs of every next token of a prompt with an image: [T, V]."""
    processor = load_processor("orpo-ray/tiny-smolvlm", None)
    pixels = torch.rand(1, 1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    image = [processor.tokenizer.convert_tokens_to_ids(processor.image_token)] * 16
    ids = torch.tensor([[*range(20, 30), *image, *range(40, 80)]])
    with torch.no_grad():
        return log_softmax(model.eval()(input_ids=ids, pixel_values=pixels).logits[0], -1)


def export(run: Path, **options: Any) -> Exported:
    return export_run(str(run), ExportOptions(**options), Console(file=io.StringIO()))


def plainly(folder: str | Path, **options: Any) -> Any:
    """Load a model as users do; every weight must be found."""
    from transformers import AutoModelForImageTextToText

    model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True, **options)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model


def check_vllm_layout(folder: Path, shards: bool = False) -> None:
    """Check what vLLM reads from a model folder: class, names of the weights, processor. (vLLM is not installed.)"""
    config = json.loads((folder / "config.json").read_text())
    base = Path(resolve("orpo-ray/tiny-smolvlm"))
    assert config["architectures"] == json.loads((base / "config.json").read_text())["architectures"]
    assert "quantization_config" not in config
    assert {"tokenizer.json", "tokenizer_config.json", "processor_config.json", "chat_template.jinja"} <= {
        path.name for path in folder.iterdir()
    }
    found = {name for path in folder.glob("*.safetensors") for name in load_file(path)}
    assert found == set(load_file(base / "model.safetensors"))
    if shards:
        index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
        assert set(index) == found
        assert len(set(index.values())) > 1


def test_a_full_fine_tune_is_its_final_in_shards(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, "full")
    model = trained(recipe)
    run = finished_run(recipe, model)
    exported = export(run, max_shard_size="2MB")
    assert (exported.kind, exported.uri) == ("whole", f"{run}/export")
    check_vllm_layout(run / "export", shards=True)
    assert torch.equal(logps(plainly(exported.uri)), logps(model))
    with pytest.raises(UserError, match="full model, not adapters"):
        export(run, adapter=True, output=str(tmp_path / "adapter"))


def test_lora_merged_and_as_adapters(tmp_path: Path) -> None:
    from peft import PeftModel

    recipe = tiny_recipe(tmp_path, "lora", model={"lora": {"r": 4}})
    model = trained(recipe)
    expected = logps(model)
    run = finished_run(recipe, model)
    base = plainly(resolve(recipe.model.id))
    assert (logps(base) - expected).abs().max() > 0.1, "the adapters have no effect"
    merged = plainly(export(run).uri)
    check_vllm_layout(run / "export")
    assert (logps(merged) - expected).abs().max() < LOGPS
    assert merged.get_output_embeddings().weight is merged.get_input_embeddings().weight, "tied weights must stay tied"
    adapter = export(run, adapter=True, output=str(tmp_path / "adapter"))
    for folder in (run / "final", Path(adapter.uri)):
        # With a config.json, transformers would look for the weights of a full model.
        assert not (folder / "config.json").exists()
        assert all(
            name.startswith("base_model.model.model.text_model.") for name in load_file(folder / ADAPTER_WEIGHTS)
        )
        assert (logps(plainly(folder)) - expected).abs().max() < LOGPS
        assert (logps(PeftModel.from_pretrained(base, folder)) - expected).abs().max() < LOGPS
        assert type(load_processor(str(folder), None)).__name__ == "Idefics3Processor"
        base = plainly(resolve(recipe.model.id))


def test_rslora_dora_and_modules_trained_in_full(tmp_path: Path) -> None:
    from peft import PeftModel

    lora = {"r": 4, "alpha": 8, "use_rslora": True, "use_dora": True, "modules_to_save": ["connector"]}
    recipe = tiny_recipe(tmp_path, "dora", model={"lora": lora})
    model = trained(recipe)
    expected = logps(model)
    run = finished_run(recipe, model)
    names = set(load_file(run / "final" / ADAPTER_WEIGHTS))
    assert any("lora_magnitude_vector" in name for name in names)
    assert any("connector" in name for name in names)
    assert (logps(load_adapted(called_directly(recipe.model), run / "final", CPU, 1)) - expected).abs().max() < LOGPS
    # Without from_pretrained of the folder, since transformers 5.23 does not load DoRA's magnitudes.
    alone = PeftModel.from_pretrained(plainly(resolve(recipe.model.id)), run / "final")
    assert (logps(alone) - expected).abs().max() < LOGPS
    assert (logps(plainly(export(run).uri)) - expected).abs().max() < LOGPS
    check_vllm_layout(run / "export")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_qlora_merges_into_the_weights_it_was_trained_on(tmp_path: Path, dtype: str) -> None:
    recipe = tiny_recipe(tmp_path, "qlora", model={"lora": {"r": 4}, "quantization": {}, "dtype": dtype})
    model = trained(recipe)
    run = finished_run(recipe, model)
    merged = plainly(export(run).uri, dtype="auto")
    check_vllm_layout(run / "export")
    assert merged.dtype == getattr(torch, dtype)
    assert not any(type(parameter).__name__ == "Params4bit" for parameter in merged.parameters())
    off = (logps(merged).float() - logps(model).float()).abs()
    onto_original = (logps(plainly(run / "final", dtype=dtype)).float() - logps(model).float()).abs()
    if dtype == "float32":
        assert off.max() < LOGPS
    else:  # each weight is rounded once to 8 bits of precision; 0.007 was measured with and without quantization
        assert off.mean() < 0.02
    assert onto_original.max() > 0.1


def test_the_model_card_has_facts_and_no_secrets(tmp_path: Path) -> None:
    data = {
        "train": {"/secret/place/mine.jsonl": 1, "/secret/other/mine.jsonl": 2, "hf://datasets/some/pairs": 1,
                  "s3://bucket-of-ours/a/b.parquet": 1},
        "eval": "/secret/held.jsonl", "image_root": "/secret/photos",
    }  # fmt: skip
    recipe = tiny_recipe(tmp_path, "card", model={"lora": {"r": 4}}, data=data)
    run = finished_run(recipe, load_model(recipe.model, CPU, 0))
    for adapter in (False, True):
        folder = Path(export(run, adapter=adapter, overwrite=True).uri)
        text = (folder / "README.md").read_text()
        for hidden in ("secret", "bucket-of-ours", str(tmp_path), str(Path.home()), resolve(recipe.model.id)):
            assert hidden not in text
        card = ModelCard(text)
        assert card.data.pipeline_tag == "image-text-to-text"
        assert card.data.library_name == ("peft" if adapter else "transformers")
        assert card.data.datasets == ["some/pairs"]
        assert {"orpo", "lora"} <= set(card.data.tags)
        values = {result.metric_name: result.metric_value for result in card.data.eval_results}
        assert (values["preference accuracy"], values["grounding gap"]) == (0.875, 0.375)
        for said in ("1,234 pairs", "48 held-out", "too_long 1", "mine.jsonl (2)", "vllm serve", "beta: 0.5"):
            assert said in text
    # A folder must not contain both a full model and adapters.
    assert not (folder / "config.json").exists()


def test_the_card_takes_the_newest_checkpoint_that_is_whole(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, "card", model={"lora": {"r": 4}})
    run = finished_run(recipe, load_model(recipe.model, CPU, 0))
    torn = checkpoint_of(run, "checkpoint_2", num_rows=4321) / "position.json"
    torn.write_text(torn.read_text()[:-3])
    changed = checkpoint_of(run, "checkpoint_3", num_rows=4321) / "position.json"
    changed.write_text(changed.read_text().replace("4321", "9999"))
    out = io.StringIO()
    exported = export_run(str(run), ExportOptions(adapter=True), Console(file=out, width=1000))
    assert "1,234 pairs" in (Path(exported.uri) / "README.md").read_text()
    assert f"warning: checkpoint {run}/checkpoint_3 is not used: position.json has another checksum" in out.getvalue()
    assert f"warning: checkpoint {run}/checkpoint_2 is not used: position.json has 15 bytes" in out.getvalue()
    later = checkpoint_of(run, "checkpoint_4", num_rows=1)
    (later / "position.json").write_text('{"of": "another version"}')
    (later / manifest_name(0)).unlink()
    write_manifest(later, step=10, rank=0, num_workers=1)
    with pytest.raises(UserError, match=r"checkpoint_4/position\.json: .* written by another version"):
        export(run, adapter=True, overwrite=True)


def test_a_run_without_held_out_pairs_says_so(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, "run", model={"lora": {"r": 4}})
    run = finished_run(recipe, load_model(recipe.model, CPU, 0))
    (run / "metrics.jsonl").write_text('{"step": 10, "train/loss": 1.0}\n')
    shutil.rmtree(run / "checkpoint_1")
    text = (Path(export(run, adapter=True).uri) / "README.md").read_text()
    assert "not evaluated" in text
    assert ModelCard(text).data.eval_results is None


def test_nothing_is_overwritten_by_default_and_nothing_is_left_incomplete(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, "run", model={"lora": {"r": 4}})
    run = finished_run(recipe, load_model(recipe.model, CPU, 0))
    first = export(run, adapter=True)
    with pytest.raises(UserError, match="already exists"):
        export(run, adapter=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "photo.jpg").write_text("dear")
    for overwrite, said in ((False, "already exists"), (True, "not an export")):
        with pytest.raises(UserError, match=said):
            export(run, output=str(tmp_path / "mine"), overwrite=overwrite)
    assert (tmp_path / "mine" / "photo.jpg").exists()
    for own in (run, run / "final"):
        with pytest.raises(UserError, match="cannot replace the run"):
            export(run, output=str(own), overwrite=True)
    (run / "final" / ADAPTER_WEIGHTS).write_bytes(b"torn")
    with pytest.raises(UserError, match="cannot read the weights"):
        export(run, output=first.uri, overwrite=True)
    assert sorted(path.name for path in Path(first.uri).iterdir()) == first.files, "the old export must be unchanged"
    assert not (run / ".export-adapter").exists()


def test_an_unfinished_run_is_one_message(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, "run", model={"lora": {"r": 4}})
    run = finished_run(recipe, load_model(recipe.model, CPU, 0))
    for name in COMPLETION_FILES:
        (run / "final" / name).unlink(missing_ok=True)
    with pytest.raises(UserError, match=r"not finished(.|\n)*orpo-ray train"):
        export(run)
    with pytest.raises(UserError, match="the folder is no run"):
        export(tmp_path)
