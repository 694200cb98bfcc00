"""Shell scripts and YAML files of other trainers, as they are read."""

from __future__ import annotations

from pathlib import Path

import pytest

from orpo_ray.convert.convert import convert_config
from orpo_ray.convert.reading import read_config
from orpo_ray.errors import UserError

ARGUMENTS = "--model_name_or_path me/model --dataset_name me/pairs --beta 0.5"


def converted(folder: Path, text: str, name: str = "run.sh") -> str:
    (folder / name).write_text(text)
    return convert_config(folder / name)


@pytest.mark.parametrize(
    "program",
    ["accelerate launch examples/scripts/dpo_vlm.py", "python dpo.py", "trl dpo", "python -m trl.scripts.dpo"],
)
def test_a_script_that_trains_with_dpo_does_not_keep_its_beta(tmp_path: Path, program: str) -> None:
    text = converted(tmp_path, f"{program} {ARGUMENTS}")
    assert 'loss: "sigmoid", needs a reference model' in text
    assert 'beta: "0.5", the beta of sigmoid has another meaning' in text
    assert "  beta: 0.5" not in text


@pytest.mark.parametrize("program", ["accelerate launch --num_processes 2 examples/scripts/orpo.py", "trl orpo"])
def test_a_script_that_trains_with_orpo_keeps_its_beta(tmp_path: Path, program: str) -> None:
    text = converted(tmp_path, f"{program} {ARGUMENTS}")
    assert "  beta: 0.5" in text
    assert "which trainer" not in text


def test_other_methods_of_trl(tmp_path: Path) -> None:
    assert "objective:\n  name: cpo\n  beta: 0.5\n" in converted(tmp_path, f"trl cpo {ARGUMENTS}")
    assert "name: simpo" in converted(tmp_path, f"trl cpo {ARGUMENTS} --loss_type simpo")
    assert 'loss: "kto", needs a reference model or other data' in converted(tmp_path, f"trl kto {ARGUMENTS}")


def test_a_yaml_file_does_not_say_which_trainer_it_is_for(tmp_path: Path) -> None:
    theirs = "model_name_or_path: me/model\ndataset_name: me/pairs\nbeta: 0.5\n"
    text = converted(tmp_path, theirs, "theirs.yaml")
    assert "the config does not say which trainer it is for; ORPO is assumed" in text
    assert "  beta: 0.5" in text
    text = converted(tmp_path, theirs + "precompute_ref_log_probs: true\n", "theirs.yaml")
    assert 'loss: "sigmoid", needs a reference model' in text
    text = converted(tmp_path, theirs + "loss_type: [sigmoid, sft]\n", "theirs.yaml")
    assert 'loss: "sigmoid+sft", needs a reference model' in text


def test_options_of_the_launcher_end_at_the_program(tmp_path: Path) -> None:
    script = tmp_path / "run.sh"
    script.write_text(f"accelerate launch --config_file a/zero3.yaml --num_processes 4 x/orpo.py {ARGUMENTS} > log.txt")
    found = read_config(script)
    assert (found.gpus, found.trainer) == (4, "orpo")
    assert found.fields == {
        "config_file": "a/zero3.yaml", "model_name_or_path": "me/model", "dataset_name": "me/pairs", "beta": "0.5",
    }  # fmt: skip
    assert 'config_file: "a/zero3.yaml", accelerate\'s config is not read; set deepspeed.zero_stage' in convert_config(
        script
    )


def test_variables_of_the_script_are_filled_in(tmp_path: Path) -> None:
    script = tmp_path / "run.sh"
    script.write_text(
        "#!/bin/bash\n# don't stop here\nexport MODEL=me/model\nN=4\nRATE=1e-${E:-6}\nMORE='--lora_rank 8 --seed 1'\n"
        "echo start; NPROC_PER_NODE=$N swift rlhf --model $MODEL --dataset me/pairs#500 \\\n"
        "  --learning_rate ${RATE} \\\n  # a comment\n  --rlhf_type orpo $MORE --beta $BETA\necho end\n"
    )
    found = read_config(script)
    assert found.gpus == 4
    assert found.fields == {
        "model": "me/model", "dataset": "me/pairs#500", "learning_rate": "1e-6", "rlhf_type": "orpo", "lora_rank": "8",
        "seed": "1", "beta": "$BETA",
    }  # fmt: skip


def test_values_of_variables_stay_short(tmp_path: Path) -> None:
    script = tmp_path / "run.sh"
    doubled = "".join(f"A{n + 1}=$A{n}$A{n}\n" for n in range(60))
    script.write_text(f"A0=x\n{doubled}trl orpo --beta $A60")
    assert len(str(read_config(script).fields["beta"])) <= 20_000


def test_variables_without_a_value_are_listed(tmp_path: Path) -> None:
    text = converted(tmp_path, 'swift rlhf --rlhf_type orpo --model $MODEL --dataset "$DATA" --learning_rate --beta')
    assert 'model: "$MODEL", a variable of the shell; put in its value' in text
    assert 'dataset: "$DATA", a variable of the shell; put in its value' in text
    assert "learning_rate: true, not understood; it would be optim.learning_rate" in text
    assert "beta: true, not understood" in text
    assert "learning_rate: 1.0" not in text
    assert "$" not in "".join(line for line in text.splitlines() if not line.startswith("#"))


@pytest.mark.parametrize(
    "program", ["llamafactory-cli train", "torchrun --nproc_per_node 1 src/train.py", "python -m llamafactory.cli"]
)
def test_a_script_that_names_a_yaml_file(tmp_path: Path, program: str) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "lf.yaml").write_text(
        "model_name_or_path: me/model\nstage: dpo\npref_loss: orpo\ndataset: me/pairs\nlearning_rate: 1e-6\nseed: 7\n"
    )
    text = converted(tmp_path, f"FORCE_TORCHRUN=1 NNODES=2 {program} sub/lf.yaml learning_rate=3e-5")
    assert "learning_rate: 3.0e-05" in text
    assert "seed: 7" in text


def test_a_script_with_the_option_config(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("model_name_or_path: me/model\ndataset_name: me/pairs\nbeta: 0.5\n")
    text = converted(tmp_path, "trl dpo --config x.yaml --seed 3")
    assert 'loss: "sigmoid"' in text
    assert "seed: 3" in text


@pytest.mark.parametrize(
    "named", ["../out.yaml", "missing.yaml", "$CONFIG.yaml", "link.yaml", "/etc/x.yaml", "a" * 300 + ".yaml"]
)
def test_a_file_outside_of_the_scripts_folder_is_not_followed(tmp_path: Path, named: str) -> None:
    folder = tmp_path / "scripts"
    folder.mkdir()
    (tmp_path / "out.yaml").write_text("base_model: me/model\n")
    (folder / "link.yaml").symlink_to(tmp_path / "out.yaml")
    with pytest.raises(UserError, match="not in the folder of the script"):
        converted(folder, f"axolotl train {named}")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("q.sh", 'swift rlhf --model a/b --dataset "x', "cannot read the script: no closing quotation"),
        ("empty.sh", "", "the file is empty"),
        ("empty.yaml", "# nothing\n", "the file is empty"),
        ("broken.yaml", "a: [1,2\nb: }", "not valid YAML for a config"),
        ("list.yaml", "- a", "a config must be a mapping"),
    ],
)
def test_messages_about_their_file(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        converted(tmp_path, text, name)
    assert "recipe" not in str(caught.value).replace(str(tmp_path), "")


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such config file"):
        convert_config(tmp_path / "none.yaml")


def test_a_script_without_a_training_shows_no_empty_value(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"that names a model\n  fix: give"):
        converted(tmp_path, "echo hi")


def test_arrays_and_long_texts_of_options_are_filled_in(tmp_path: Path) -> None:
    array = "ARGS=(\n  --model_name_or_path me/model  # a comment\n  --dataset_name me/pairs\n)\nARGS+=(--beta 0.3)\n"
    text = converted(tmp_path, array + 'python orpo.py "${ARGS[@]}" --seed 3')
    assert "beta: 0.3" in text
    assert "seed: 3" in text
    options = "\n  --model_name_or_path me/model --dataset_name me/pairs --run_name " + 1500 * "x"
    assert "id: me/model" in converted(tmp_path, f'ARGS="{options}"\npython orpo.py $ARGS --seed 3')
    with pytest.raises(UserError, match="no config of TRL"):
        converted(tmp_path, 'python orpo.py "${OTHER[@]}"')
