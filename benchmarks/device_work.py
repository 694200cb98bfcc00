"""Count what a step asks of a GPU, without one: kernels, bytes that they read and write, and waits of the host.

    python benchmarks/device_work.py [--against TREE] [--json]

Forward and backward pass of a micro-batch run without values (the dry run of `orpo-ray plan`), with the kernels that
training chooses on CUDA, for the shapes of `gpu.py`. With `--against`, another working tree of this repository counts
too, for a comparison in the same run. The models run with few layers; the other layers are extrapolated.

  kernels: operations that are neither views nor allocations; fused kernels of this package count as one
  gb:      bytes of the tensors that kernels read and write, in 1e9
  reads:   calls such as `tolist()` or `nonzero()` on tensors, after which the host would wait for a GPU; those on
           tensors in main memory included, so this is an upper bound (tests/unit/model/test_device_waits.py shows
           that none of them is on a device now)
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from machine import ROOT, provenance

sys.path.append(str(ROOT / "tests"))  # the list of calls that read values, which tests use too

from support.device_waits import reads_values

LLAVA, QWEN, SMOLVLM = (
    "llava-hf/llava-v1.6-mistral-7b-hf",
    "Qwen/Qwen2.5-VL-7B-Instruct",
    "HuggingFaceTB/SmolVLM-256M-Instruct",
)
GEMMA = "google/gemma-3-12b-it"
# Name, model, whether it has LoRA, pairs of a micro-batch.
SHAPES = (
    ("smolvlm-256m-full", SMOLVLM, False, 2),
    ("llava-1.6-7b-lora", LLAVA, True, 2),
    ("qwen2.5-vl-7b-lora", QWEN, True, 2),
    ("gemma-3-12b-lora", GEMMA, True, 2),
)
PROMPT, ANSWER = 60, 120
LAYERS = 2
whole_calls: dict[tuple[str, str], Any] = {}  # of fused operations, as they were before `fuse`


def modes(counts: Counter[str]) -> tuple[Any, Any]:
    """Return the modes that count operations, and reads of values."""
    import torch
    from torch.overrides import TorchFunctionMode
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    aten = torch.ops.aten
    free = {
        aten.detach.default, aten.alias.default, aten._unsafe_view.default, aten.empty.memory_format,
        aten.empty_like.default, aten.new_empty.default, aten.empty_strided.default, aten.new_empty_strided.default,
        torch.ops.prim.device.default, aten._local_scalar_dense.default,
    }  # fmt: skip

    class Operations(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if not func.is_view and func not in free and not counts["within"]:
                tensors = [each for each in tree_leaves((args, kwargs, out)) if isinstance(each, torch.Tensor)]
                if any(each.is_floating_point() for each in tensors):
                    counts["kernels"] += 1
                    counts["bytes"] += sum({id(each): each.nbytes for each in tensors}.values())
                    counts["attention"] += "attention" in str(func) or "varlen" in str(func)
            return out

    class Reads(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            counts["reads"] += reads_values(func, args, kwargs or {})
            return func(*args, **(kwargs or {}))

    return Operations(), Reads()


def fuse(counts: Counter[str]) -> None:
    """Let operations count as the one kernel that they are on a GPU, where a dry run computes them in PyTorch."""
    import torch

    try:
        from orpo_ray.model import fused_ops
    except ImportError:  # a tree without them
        return

    def as_one(call: Any) -> Any:
        def run(context: Any, *args: Any) -> Any:
            counts["within"] += 1
            out = call(context, *args)
            counts["within"] -= 1
            outs = out if isinstance(out, tuple) else (out,)
            tensors = [each for each in (*args, *outs) if isinstance(each, torch.Tensor)]
            counts["kernels"] += 1
            counts["bytes"] += sum(each.nbytes for each in tensors)
            return out

        return staticmethod(run)

    for name in ("_SiluMul", "_Rotate", "_RmsNorm"):
        kind = vars(fused_ops)[name]
        for which in ("forward", "backward"):
            kind_call = whole_calls.setdefault((name, which), getattr(kind, which))
            setattr(kind, which, as_one(kind_call))


def count(model_id: str, lora: bool, pairs: int) -> dict[str, float]:
    """Count the work of a micro-batch in the tree that is imported."""
    import torch

    from orpo_ray.config.schema import LoraConfig, ModelConfig
    from orpo_ray.planning import activations
    from orpo_ray.planning.images import image_shape
    from orpo_ray.planning.known_shapes import KNOWN_SHAPES

    config = KNOWN_SHAPES[model_id].config()
    image = image_shape(config)
    shape = activations.PairShape(PROMPT, ANSWER, ANSWER, 1, image.tokens, image.vision)
    section = ModelConfig(id=model_id, lora=LoraConfig(r=16) if lora else None, gradient_checkpointing=False)
    batch = activations.batch_of(shape, pairs, config, "response", "shared_prefix")
    with_depth = vars(activations).get("_with_depth") or vars(activations)["with_depth"]
    whole_step = activations.step

    def counted(language: int, vision: int) -> Counter[str]:
        counts: Counter[str] = Counter()
        fuse(counts)

        def step(*arguments: Any) -> Any:
            operations, reads = modes(counts)
            with reads, operations:
                return whole_step(*arguments)

        activations.step = step
        shallow = with_depth(config, language, vision)
        activations._measure(section, shallow, torch.bfloat16, "shared_prefix", batch, True, "cuda")
        return counts

    language = config.get_text_config().num_hidden_layers
    vision = getattr(config.vision_config, "num_hidden_layers", None) or config.vision_config.depth
    few = counted(LAYERS, LAYERS)
    by_language, by_vision = counted(LAYERS + 1, LAYERS), counted(LAYERS, LAYERS + 1)
    found = {
        name: few[name]
        + (language - LAYERS) * (by_language[name] - few[name])
        + (vision - LAYERS) * (by_vision[name] - few[name])
        for name in ("kernels", "attention", "bytes", "reads")
    }
    found["gb"] = round(found.pop("bytes") / 1e9, 1)
    return found


def count_tree(tree: Path, shape: str) -> dict[str, float]:
    """Count in a working tree, in a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(tree), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, "--shape", shape]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Count and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="another working tree")
    parser.add_argument("--shape", choices=[name for name, *_ in SHAPES], help="only this one, in this process")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    arguments = parser.parse_args()
    shapes = {name: rest for name, *rest in SHAPES}
    if arguments.shape:
        print(json.dumps(count(*shapes[arguments.shape])))
        return
    trees = {"now": ROOT} | ({"before": arguments.against.resolve()} if arguments.against else {})
    rows = []
    for name in shapes:
        for which, tree in trees.items():
            rows.append({"shape": name, "tree": which} | count_tree(tree, name))
            if not arguments.json:
                print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    result = provenance() | {"rows": rows}
    for now, before in zip(rows[::2], rows[1::2], strict=True) if arguments.against else ():
        result |= {f"{now['shape']}/{name}_ratio": now[name] / before[name] for name in ("kernels", "gb")}
    print(json.dumps(result) if arguments.json else "\n".join(f"{k:12} {v}" for k, v in provenance().items()))


if __name__ == "__main__":
    main()
