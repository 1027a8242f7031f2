"""A long video: where its tokens lie in the prompt, what each head keeps of them, and how that grows with length.

    python examples/long_video.py                # a quarter, a half, and a whole hour; under half a minute on a CPU
    python examples/long_video.py --minutes 120

An hour is scaled down to fit a CPU: one clip a minute, 100 tokens a clip, each after its time stamp. The model is the
small Qwen2.5-VL of ``quickstart.py``, whose heads look for what trained heads look for: their own minute, some notes in
the text, and the start of every clip.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from quickstart import build_inputs, build_model

import mmi_compile

SIDE, HEADS = 20, 6  # patches along a side of a frame, four of them to a token; query heads


def prefill(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The logits of all tokens."""
    with torch.inference_mode():
        return model(**inputs, use_cache=False).logits


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def where_tokens_lie(prompt: dict[str, Any]) -> None:
    """What the report knows of the last prompt: runs of one modality, and the grids of clips."""
    counts = ", ".join(f"{count} {name} in {prompt['segments'][name]} runs" for name, count in prompt["tokens"].items())
    print(f"  tokens: {counts}; known from {prompt['source']}")
    for name, length in prompt["runs"][0][:4]:
        print(f"    {length:4} {name}")
    print(f"    … {len(prompt['runs'][0]) - 4} more runs")
    clip = prompt["grids"][0]
    where = f"tokens {clip['start']} to {clip['stop']}"
    print(f"  the first clip: {where}, {clip['rows']} rows of {clip['tokens_per_row']} tokens")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=int, default=60)
    minutes = parser.parse_args().minutes
    lengths = [minutes // 4, minutes // 2, minutes]

    dense, exact, adaptive = (build_model(HEADS) for _ in range(3))
    # inner="eager" runs the rewritten graph without Inductor: sparsity is what this is about. Without min_tokens=0,
    # prompts below 6144 tokens would run dense on a CPU. dynamic=True: one graph for all lengths.
    options: dict[str, Any] = {"inner": "eager", "dynamic": True, "strict": True}
    mmi_compile.compile(exact, policy="exact", **options)
    mmi_compile.compile(adaptive, policy="adaptive", min_tokens=0, **options)

    rows, prompts = [], {}
    for length in lengths:
        inputs = prompts[length] = build_inputs(length, SIDE)
        expected, found = prefill(dense, inputs), prefill(adaptive, inputs)
        runs = mmi_compile.last_report().runs()
        density = sum(run["density"] for _, run in runs[-2:]) / 2
        rows.append((length, inputs["input_ids"].shape[1], density, difference(found, expected)))

    print(f"{minutes} minutes of video\n")
    graph = mmi_compile.last_report().graphs[-1].to_json()
    where_tokens_lie(graph["modality"]["prompt"])
    for attention in graph["attentions"]:
        print(f"\n  {attention['where']}")
        for head, pattern in enumerate(attention["run"]["patterns"][0]):
            print(f"    head {head}: {pattern}")

    print("\nminutes   tokens   density   difference from dense")
    for length, tokens, density, error in rows:
        print(f"{length:7}  {tokens:7}  {density:7.1%}   {error:.1e}")
    same = difference(prefill(exact, prompts[lengths[0]]), prefill(dense, prompts[lengths[0]]))
    print(f"\npolicy exact, {lengths[0]} minutes: difference from dense {same:.1e}")

    densities = [density for _, _, density, _ in rows]
    assert same < 1e-5, "exact keeps the model's mathematics"
    assert densities == sorted(densities, reverse=True), "the longer the prompt, the smaller the share"
    assert max(error for *_, error in rows) < 0.1, "adaptive stays near"


if __name__ == "__main__":
    main()
