"""Log-probs of single tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from orpo_ray.config.schema import ModelConfig
from orpo_ray.data.encoding import PairEncoder
from orpo_ray.data.from_recipe import held_out_data
from orpo_ray.evaluation.token_scores import pairs_to_show, pieces, score_tokens
from orpo_ray.model.loading import load_model
from orpo_ray.objective.logps import PairLogps
from orpo_ray.objective.orpo import ORPO
from orpo_ray.objective.pair_model import PairModel
from orpo_ray.objective.step_planner import StepPlanner
from orpo_ray.processing.pixel_norm import PixelNorm
from orpo_ray.processing.processor import load_processor
from support.planted_scores import planted
from support.tiny_runs import tiny_recipe, write_pairs

CPU = torch.device("cpu")


@pytest.mark.parametrize("attention", ["shared_prefix", "concatenated"])
def test_tokens_add_up_to_the_answers(tmp_path: Path, attention: str) -> None:
    recipe = tiny_recipe(tmp_path, "run", data={"train": "easy-vqa:train", "eval": str(write_pairs(tmp_path, 4))})
    held_out = held_out_data(recipe)
    assert held_out is not None
    encoder = PairEncoder(load_processor("orpo-ray/tiny-smolvlm", None), 512)
    config = ModelConfig(id="orpo-ray/tiny-smolvlm", attention=attention)  # type: ignore[arg-type]
    model = PairModel(load_model(config, CPU, 0), PixelNorm.of(encoder.processor))
    # With the prompt under the NLL too, its tokens are among the targets.
    planner = StepPlanner.of(ORPO(0.1, nll="prompt+response"), 512, encoder, model, CPU)
    sums: list[PairLogps] = []

    def forward(batch: object) -> PairLogps:
        sums.append(model(batch))
        return sums[-1]

    found = score_tokens(model, forward, encoder, planner, held_out, [0, 2])
    assert list(found) == [0, 2]
    for logps, sides in zip(sums, found.values(), strict=True):
        assert sum(logp for _, logp in sides["chosen"]) == pytest.approx(float(logps.chosen[0]), rel=1e-5)
        assert sum(logp for _, logp in sides["rejected"]) == pytest.approx(float(logps.rejected[0]), rel=1e-5)
        assert "".join(text for text, _ in sides["chosen"]).strip()
    assert not model.keeps_tokens
    assert model.token_logps is None
    assert model.training


def test_a_character_of_several_tokens_belongs_to_the_last() -> None:
    class Tokenizer:
        """Decodes bytes."""

        def decode(self, ids: list[int], **_: object) -> str:
            return bytes(ids).decode(errors="replace")

    text = "é ok ✓"
    found = pieces(list(text.encode()), Tokenizer())
    assert "".join(found) == text
    assert found[:3] == ["", "é", " "]


def test_which_pairs_are_shown() -> None:
    pairs, start = planted(40, 0.9), planted(40, 0.5, seed=1)
    rows = list(pairs_to_show(pairs, start))
    assert [row["why"] for row in rows] == ["improved most"] * 6 + ["improved least"] * 6
    assert {row["why"] for row in pairs_to_show(pairs, None)} == {"clearest", "most wrong"}
    assert list(pairs_to_show(pairs.drop_columns(["rewards/margins"]), start)) == []
