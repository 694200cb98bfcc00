"""The shared-prefix path equals the concatenated path; which tokens attend to which."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import varlen
from transformers import LlavaConfig

from orpo_ray.config.field_types import Checkpointing
from orpo_ray.config.schema import ModelConfig
from orpo_ray.data.encoded_columns import from_arrow, to_arrow
from orpo_ray.data.packing import IMAGE, RESPONSE, TEXT, build_batch
from orpo_ray.data.varlen_index import VarlenIndex
from orpo_ray.errors import OrpoRayError, UserError
from orpo_ray.model import shared_prefix
from orpo_ray.model.families.base import TESTED_LANGUAGE_MODELS
from orpo_ray.model.families.registry import FAMILIES
from orpo_ray.model.loading import Attention, load_model, pick_attention
from orpo_ray.model.prefix_layout import Bidirectional, PrefixLayout
from orpo_ray.model.shared_prefix import ScoreOptions, attend
from orpo_ray.objective.pair_model import PairModel
from orpo_ray.tiny_models.build import resolve
from orpo_ray.tiny_models.families import TINY_FAMILIES
from support.cover import cover
from support.pairs_by_hand import (
    CROSS,
    NORM,
    assert_equal,
    make_pair,
    make_row,
    relative_distance,
    run,
    run_as,
    tiny_pair_model,
)
from support.rows_by_hand import Token, Tree, row_of

# (images, prompt, chosen, rejected) of each pair of a row
ROWS = {
    "one pair": [(1, 5, 7, 3)],
    "four images": [(4, 9, 2, 11), (2, 3, 6, 6)],
    "long answers": [(1, 20, 40, 25), (3, 2, 1, 30), (1, 30, 12, 1)],
    "eight pairs, some without images": [(i % 5, 2 + 3 * i, 1 + 2 * i, 17 - 2 * i) for i in range(8)],
    "no image at all": [(0, 12, 9, 14), (0, 1, 1, 1)],
}


SHARING = [family for family in TINY_FAMILIES if family not in CROSS]


def test_every_family_has_a_tiny_model() -> None:
    # Pixtral is LLaVA with another vision encoder.
    assert set(FAMILIES) | {"pixtral"} == set(TINY_FAMILIES)


@pytest.mark.parametrize(("family", "row"), cover(SHARING, list(ROWS)))
def test_equals_the_concatenated_path(family: str, row: str) -> None:
    model = tiny_pair_model(family)
    pairs = make_row(family, ROWS[row])
    assert_equal(run(model, pairs, "shared_prefix"), run(model, pairs, "concatenated"))


@pytest.mark.parametrize(("family", "how"), cover(SHARING, ["checkpointing", "LoRA", "LoRA and checkpointing"]))
def test_equals_it_with_lora_and_gradient_checkpointing(family: str, how: str) -> None:
    lora, checkpointing = "LoRA" in how, cast(Checkpointing, "full" if "checkpointing" in how else "none")
    model = tiny_pair_model(family, lora, checkpointing)
    pairs = make_row(family, ROWS["four images"])
    packed = run(model, pairs, "shared_prefix", "prompt+response", targets=8)
    assert_equal(packed, run(model, pairs, "concatenated", "prompt+response"))


@pytest.mark.parametrize("family", SHARING)
def test_answers_that_were_given_to_different_images(family: str) -> None:
    """A pair with a separate prompt per answer, between ordinary pairs: both layouts, and each answer alone."""
    rng = np.random.default_rng(0)
    plain = [
        make_pair(family, rng, *lengths, sample_index)
        for sample_index, lengths in enumerate([(1, 4, 3, 5), (0, 6, 2, 2)])
    ]
    one, other = make_pair(family, rng, 2, 5, 6, 4, sample_index=2), make_pair(family, rng, 2, 8, 6, 4, sample_index=3)
    double = replace(one, rejected_prompt=other.prompt)
    pairs = [plain[0], double, plain[1]]
    model = tiny_pair_model(family)
    packed, padded = run(model, pairs, "shared_prefix"), run(model, pairs, "concatenated")
    assert_equal(packed, padded)
    alone = run(model, [one, replace(other, rejected_ids=one.rejected_ids)], "concatenated")
    torch.testing.assert_close(packed[0].chosen[1], alone[0].chosen[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(packed[0].rejected[1], alone[0].rejected[1], rtol=1e-5, atol=1e-5)
    (again,) = from_arrow(to_arrow([pairs[1].sample_index], pairs[1:2]))
    torch.testing.assert_close(run(model, [plain[0], again, plain[1]], "shared_prefix")[1], packed[1])


some = st.integers(1, 9)
pairs_of = st.lists(st.tuples(st.integers(1, 12), some, some), min_size=1, max_size=8)
one_prompt = st.lists(st.tuples(st.just(0), st.lists(some, min_size=1, max_size=4)), min_size=1, max_size=1)
several_prompts = st.lists(st.tuples(some, st.lists(some, min_size=1, max_size=3)), min_size=1, max_size=3)
trees_of = st.lists(st.tuples(st.integers(1, 12), one_prompt | several_prompts), min_size=1, max_size=4)
kinds = st.sampled_from([None, Bidirectional("images", True), Bidirectional("images", False),
                         Bidirectional("prompt", True), Bidirectional("prompt", False)])  # fmt: skip


def layout_of(trees: list[Tree], bidirectional: Bidirectional | None, seed: int) -> tuple[PrefixLayout, list[Token]]:
    """Images are in what several prompts begin with. Where a prompt sees all of itself, it is not divided."""
    if bidirectional is not None and bidirectional.scope == "prompt":
        trees = [(prefix + rest, [(0, answers)]) for prefix, questions in trees for rest, answers in questions]
    branches, tokens = row_of(trees)
    rng = np.random.default_rng(seed)
    prompt_kinds = [[TEXT, IMAGE] if len(token.path) == 1 else [TEXT] for token in tokens]
    kinds = [
        rng.choice(kinds) if token.in_prompt else RESPONSE for token, kinds in zip(tokens, prompt_kinds, strict=True)
    ]
    return PrefixLayout(branches, torch.tensor([kinds]), bidirectional), tokens


def may_see(layout: PrefixLayout, tokens: list[Token], query: int, key: int, window: int | None) -> bool:
    """Whether a token of the row attends to another one."""
    own, other = tokens[query], tokens[key]
    both_in_prompt = own.in_prompt and other.in_prompt
    block = False
    if layout.bidirectional is not None and both_in_prompt and own.path[0] == other.path[0]:
        between = layout.token_kind[0, min(query, key) : max(query, key) + 1]
        block = layout.bidirectional.scope == "prompt" or bool((between == IMAGE).all())
    causal = own.follows(other) and other.place <= own.place
    near = window is None or other.place > own.place - window
    if layout.bidirectional is not None and layout.bidirectional.within_window:
        return (causal or block) and near
    return (causal and near) or block


@given(trees_of, kinds, st.sampled_from([None, 1, 3, 8]), st.integers(0, 99))
@settings(deadline=None)
def test_masks_say_who_sees_whom(
    trees: list[Tree], bidirectional: Bidirectional | None, window: int | None, seed: int
) -> None:
    layout, tokens = layout_of(trees, bidirectional, seed)
    total = len(tokens)
    seen = torch.zeros(total, total, dtype=torch.bool)
    for index, branch in enumerate(layout.branches):
        own = range(branch.start, branch.end)
        keys = [place for each in branch.ranges for place in range(*each)]
        mask = layout.mask(index, window)
        seen[torch.tensor(own).unsqueeze(1), torch.tensor(keys)] = (
            torch.ones(len(own), len(own), dtype=torch.bool).tril() if mask is None else mask
        )
    assert seen.tolist() == [[may_see(layout, tokens, q, k, window) for k in range(total)] for q in range(total)]


def reference_varlen(query: Any, key: Any, value: Any, index: VarlenIndex, window: int | None) -> torch.Tensor:
    """Attention per sequence as `varlen_attn` documents it: causal, aligned at the end, window includes the token."""
    out = []
    for number in range(len(index.cu_queries) - 1):
        queries = query[index.cu_queries[number] : index.cu_queries[number + 1]]
        rows = index.keys[index.cu_keys[number] : index.cu_keys[number + 1]]
        at = torch.arange(len(rows) - len(queries), len(rows)).unsqueeze(1)
        mask = (torch.arange(len(rows)) <= at) & (torch.arange(len(rows)) > at - (window or 10**9))
        parts = (states.transpose(0, 1).unsqueeze(0) for states in (queries, key[rows], value[rows]))
        out.append(F.scaled_dot_product_attention(*parts, attn_mask=mask, enable_gqa=True)[0].transpose(0, 1))
    return torch.cat(out)


@given(trees_of, st.sampled_from([None, 3]))
@settings(deadline=None, max_examples=25)
def test_the_index_of_variable_length_kernels_means_the_same(trees: list[Tree], window: int | None) -> None:
    """Only the kernel needs a GPU, not the check of its input."""
    layout, tokens = layout_of(trees, None, 0)
    query, key, value = (torch.randn(len(tokens), heads, 8) for heads in (4, 2, 2))
    index = layout.varlen_index
    assert index.longest_query == max(layout.lengths)
    assert index.longest_key == int((index.cu_keys[1:] - index.cu_keys[:-1]).max())
    expected = reference_varlen(query, key, value, index, window)
    states = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))
    got, _ = shared_prefix.shared_prefix_attention(
        torch.nn.Module(), *states, None, sliding_window=window, shared_prefix=layout
    )
    torch.testing.assert_close(got[0], expected)


@pytest.fixture(scope="module")
def llava() -> PairModel:
    model = tiny_pair_model("llava")
    run_as(model, "shared_prefix")
    return model.eval()


@given(pairs_of, st.data())
@settings(deadline=None, max_examples=25)
def test_no_answer_hears_of_another(llava: PairModel, lengths: list[tuple[int, int, int]], data: Any) -> None:
    rng = np.random.default_rng(len(lengths))
    pairs = [make_pair("llava", rng, i % 2, *each, i) for i, each in enumerate(lengths)]
    victim = data.draw(st.integers(0, len(pairs) - 1))
    part = data.draw(st.sampled_from(["prompt_ids", "chosen_ids", "rejected_ids"]))
    with torch.no_grad():
        before = llava(build_batch(pairs, "response", "shared_prefix"))
        ids = getattr(pairs[victim], part)
        ids[0] = 251 if ids[0] != 251 else 252  # the first token, which its whole sequence attends to
        after = llava(build_batch(pairs, "response", "shared_prefix"))
    for answer in ("chosen", "rejected"):
        old, new = getattr(before, answer), getattr(after, answer)
        for index in range(len(pairs)):
            hears = index == victim and part in ("prompt_ids", f"{answer}_ids")
            assert bool(old[index] != new[index]) == hears, (answer, index)


def test_an_image_is_encoded_once_per_pair_in_a_row_of_many(llava: PairModel) -> None:
    seen: list[int] = []
    vision = llava.model.model.vision_tower
    handle = vision.register_forward_hook(lambda *args: seen.append(args[2].last_hidden_state.shape[0]))
    llava(build_batch(make_row("llava", ROWS["four images"]), "response", "shared_prefix"))
    handle.remove()
    assert seen == [6]


def test_a_model_called_without_a_layout_says_so(llava: PairModel) -> None:
    with pytest.raises(OrpoRayError, match="set_attn_implementation"):
        llava.model(input_ids=torch.ones(1, 4, dtype=torch.long))


def test_bfloat16_is_as_near_as_the_concatenated_path() -> None:
    """Both paths round to 8 bits of precision, so their distances to float32 are similar."""
    pairs = make_row("llava", ROWS["long answers"])
    exact = run(tiny_pair_model("llava"), pairs, "concatenated")[0]
    model = tiny_pair_model("llava")
    model.model.to(torch.bfloat16)
    packed, padded = (run(model, pairs, layout)[0] for layout in ("shared_prefix", "concatenated"))
    for name in ("chosen", "rejected"):
        values = [getattr(logps, name).detach() for logps in (packed, padded, exact)]
        ours, theirs = (relative_distance(value, values[2]) for value in values[:2])
        assert ours < 0.01
        assert theirs < 0.01


def test_four_bit_weights_with_lora() -> None:
    """NF4 language model with trained adapters: both layouts are equal, and the weights are packed."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=["lm_head", "vision_tower", "multi_modal_projector"],
    )  # fmt: skip
    model = AutoModelForImageTextToText.from_pretrained(resolve("orpo-ray/tiny-llava"), quantization_config=config)
    shared_prefix.register()
    quantised = [m for m in model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert quantised
    assert all(module.weight.dtype == torch.uint8 for module in quantised)
    adapted = LoraConfig(r=4, target_modules=r".*language_model.*\.(q_proj|v_proj)", init_lora_weights=False)
    pair_model = PairModel(get_peft_model(model, adapted).train(), NORM)
    pairs = make_row("llava", ROWS["four images"])
    assert_equal(run(pair_model, pairs, "shared_prefix"), run(pair_model, pairs, "concatenated"))


@pytest.fixture
def recurrent(tmp_path: Path) -> Path:
    """Save the config of a LLaVA whose language model has recurrent layers."""
    text = {"model_type": "qwen3_next", "num_hidden_layers": 4}
    LlavaConfig(vision_config={"model_type": "clip_vision_model"}, text_config=text).save_pretrained(tmp_path)
    return tmp_path


def test_auto_shares_where_that_is_proven_and_says_where_not(recurrent: Path) -> None:
    assert pick_attention(ModelConfig(id="orpo-ray/tiny-gemma3")) == Attention("shared_prefix")
    assert pick_attention(ModelConfig(id="orpo-ray/tiny-gemma3", attention="concatenated")) == Attention("concatenated")
    fallback = pick_attention(ModelConfig(id=str(recurrent)))
    assert fallback.layout == "concatenated"
    assert "linear_attention" in (fallback.why or "")


def test_what_cannot_share_a_prefix_is_refused_when_asked_to(recurrent: Path) -> None:
    with pytest.raises(UserError, match=r"model.attention.*linear_attention"):
        pick_attention(ModelConfig(id=str(recurrent), attention="shared_prefix"))


@pytest.mark.parametrize("attention", ["shared_prefix", "concatenated"])
def test_load_model_gives_the_attention_asked_for(attention: Any) -> None:
    model = load_model(ModelConfig(id="orpo-ray/tiny-paligemma", attention=attention), torch.device("cpu"), seed=0)
    pair_model = PairModel(model, NORM)
    assert pair_model.layout == attention
    pairs = make_row("paligemma", ROWS["one pair"])
    assert torch.isfinite(pair_model(build_batch(pairs, "response", attention)).chosen).all()


def states_of(layout: PrefixLayout) -> list[torch.Tensor]:
    total = layout.branches[-1].end
    return [torch.randn(1, heads, total, 8, requires_grad=True) for heads in (4, 2, 2)]


@given(trees_of, kinds, st.sampled_from([None, 3]), st.sampled_from([None, 1e6]))
@settings(deadline=None, max_examples=40)
def test_all_ways_to_attend_are_one(
    trees: list[Tree], bidirectional: Bidirectional | None, window: int | None, softcap: float | None
) -> None:
    """The implementations without a CPU flash kernel (masks on CUDA, soft-capped scores) equal the one on a CPU."""
    layout, _ = layout_of(trees, bidirectional, 1)
    states = states_of(layout)
    expected, _ = shared_prefix.shared_prefix_attention(
        torch.nn.Module(), *states, None, sliding_window=window, scaling=0.3, shared_prefix=layout
    )
    got = attend("sdpa_per_sequence", *states, layout, ScoreOptions(0.3, window, softcap))
    torch.testing.assert_close(got, expected)
    weights = torch.randn_like(got)
    theirs = torch.autograd.grad((expected * weights).sum(), states)
    for mine, their in zip(torch.autograd.grad((got * weights).sum(), states), theirs, strict=True):
        torch.testing.assert_close(mine, their)


def documented_varlen(
    query: Any, key: Any, value: Any, cu_q: Any, cu_k: Any, max_q: int, max_k: int, *, scale: float | None,
    window_size: tuple[int, int], enable_gqa: bool,
) -> torch.Tensor:  # fmt: skip
    """`torch.nn.attention.varlen.varlen_attn` as documented, for machines without its kernel."""
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert max_q == int(cu_q.diff().max())
    assert max_k == int(cu_k.diff().max())
    assert query.is_contiguous()
    assert key.is_contiguous()
    out = []
    left, right = (reach if reach >= 0 else 10**9 for reach in window_size)
    for (q0, q1), (k0, k1) in zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True):
        distance = torch.arange(k1 - k0) - torch.arange(k1 - k0 - (q1 - q0), k1 - k0).unsqueeze(1)
        mask = (distance <= right) & (distance >= -left)
        parts = (states.transpose(0, 1).unsqueeze(0) for states in (query[q0:q1], key[k0:k1], value[k0:k1]))
        attended = F.scaled_dot_product_attention(*parts, attn_mask=mask, scale=scale, enable_gqa=enable_gqa)
        out.append(attended[0].transpose(0, 1))
    return torch.cat(out)


@pytest.mark.parametrize("window", [None, 3])
def test_the_call_of_the_variable_length_kernel(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's kernel needs a GPU, but its arguments can be checked without one."""
    monkeypatch.setattr(varlen, "varlen_attn", documented_varlen)
    layout, _ = layout_of([(5, [(0, [4, 3])]), (1, [(0, [1, 1])]), (7, [(2, [2, 9, 4]), (3, [1, 6])])], None, 0)
    states = states_of(layout)
    got = attend("varlen", *states, layout, ScoreOptions(0.3, window))
    expected, _ = shared_prefix.shared_prefix_attention(
        torch.nn.Module(), *states, None, sliding_window=window, scaling=0.3, shared_prefix=layout
    )
    torch.testing.assert_close(got, expected)


def test_attention_s_dropout_is_not_forgotten() -> None:
    layout, _ = layout_of([(30, [(0, [10, 10])])], None, 0)
    states = [*(each.detach() for each in states_of(layout)[:2]), torch.ones(1, 2, 50, 8)]
    torch.manual_seed(0)
    out, _ = shared_prefix.shared_prefix_attention(torch.nn.Module(), *states, None, dropout=0.5, shared_prefix=layout)
    assert out.std() > 0.05  # without dropout, the mean of ones is 1
    assert out.mean() == pytest.approx(1.0, abs=0.1)


def test_what_a_model_adds_to_attention_is_refused_and_not_dropped() -> None:
    layout, _ = layout_of([(3, [(0, [2, 2])])], None, 0)
    with pytest.raises(OrpoRayError, match="s_aux"):
        shared_prefix.shared_prefix_attention(
            torch.nn.Module(), *states_of(layout), None, shared_prefix=layout, s_aux=torch.zeros(4)
        )


@pytest.mark.parametrize(
    "language_model", sorted(TESTED_LANGUAGE_MODELS - {"gemma3_text", "qwen2_5_vl_text", "qwen3_vl_text"})
)
def test_language_models_that_llava_may_have(language_model: str) -> None:
    """Language models that have their own family are left out."""
    from transformers import LlavaForConditionalGeneration

    config = TINY_FAMILIES["llava"]().config().to_dict()
    config["text_config"] = TINY_FAMILIES["llava"]().text(model_type=language_model, sliding_window=8, head_dim=8)
    shared_prefix.register()
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(LlavaConfig(**config)).train()
    assert FAMILIES["llava"].why_not_shared_prefix(model.config) is None
    pairs = make_row("llava", ROWS["long answers"])
    pair_model = PairModel(model, NORM)
    assert_equal(run(pair_model, pairs, "shared_prefix"), run(pair_model, pairs, "concatenated"))


def test_an_unproven_language_model_takes_the_concatenated_path() -> None:
    config = LlavaConfig(vision_config={"model_type": "clip_vision_model"}, text_config={"model_type": "bloom"})
    assert "bloom" in (FAMILIES["llava"].why_not_shared_prefix(config) or "")
