"""What a decode step costs with and without this package: the same graphs, so it should be nothing but a hook.

    python examples/bench_decode.py                 # a minute on a CPU
    python examples/bench_decode.py --tokens 256    # more decode steps

The small Qwen2.5-VL of ``quickstart.py`` answers a prompt with a video. Its language model is compiled by Inductor
alone, and by mminference; a step takes what ``--tokens`` more tokens of an answer take, over their number. Both are
timed in turns, and the medians are printed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from quickstart import INNER, build_inputs, build_model, moved, place, synchronize

import mmi_compile
from mmi_compile.frontend import find_language_model

CLIPS, SIDE, HEADS = 4, 16, 6


def stock(model: Any, inner: str) -> Any:
    """The language model compiled as :func:`mmi_compile.compile` compiles it, without this package."""
    find_language_model(model).compile(backend=inner)
    return model


def answer(model: Any, inputs: dict[str, torch.Tensor], tokens: int) -> float:
    """Seconds that an answer of so many tokens takes."""
    synchronize()
    start = time.perf_counter()
    model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)
    synchronize()
    return time.perf_counter() - start


def main() -> None:
    """Time both in turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=64, help="decode steps of an answer")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--inner", default=INNER)
    args = parser.parse_args()
    device, dtype = place()
    inputs = moved(build_inputs(CLIPS, SIDE), device, dtype)
    models = {args.inner: stock(build_model(HEADS).to(device, dtype), args.inner)}
    models["mminference"] = mmi_compile.compile(build_model(HEADS).to(device, dtype), inner=args.inner)
    steps: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for model in models.values():  # compiles
            answer(model, inputs, args.tokens + 1)
            answer(model, inputs, 1)
        for _ in range(args.repeats):
            for name, model in models.items():
                more = answer(model, inputs, args.tokens + 1) - answer(model, inputs, 1)
                steps[name].append(more / args.tokens)
    first = statistics.median(steps[args.inner])
    for name, seconds in steps.items():
        median = statistics.median(seconds)
        spread = f"{1e3 * min(seconds):.2f}–{1e3 * max(seconds):.2f}"
        print(f"{name:12} {1e3 * median:6.2f} ms a step   {median / first:.3f} ×   ({spread})")


if __name__ == "__main__":
    main()
