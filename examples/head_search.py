"""Head search on a small video-language model with trained weights, and what its configs are worth, on a CPU.

    python examples/head_search.py                                  # a quarter of an hour: 32 frames, one prompt
    python examples/head_search.py --budget 0.1 --budget 0.15 --boundaries none
    python examples/head_search.py --keep measured.json             # again with it: only scores are computed anew
    python examples/head_search.py --device cuda --frames 64 --boundaries none --boundaries none,q,2d

Every head tries every pattern and boundary on prompts about photographs that the model was trained on; each budget then
gives a head config, which answers the questions of ``video_needles.py`` about other photographs. A budget is a density,
counted in tiles. What it needs is told there.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import torch
import typer
from needle.measure import score
from needle.model import load_video_model, on_device
from needle.packages import MissingPackage
from needle.policies import Policy, parse_tiles
from needle.task import MOST_FRAMES, Prompt
from rich.console import Console
from video_needles import build_prompts, table, write_scores

import mmi_compile
from mmi_compile.head_config import HeadConfig
from mmi_compile.kernels.own_tiles import using_tiles


def main(
    budget: Annotated[list[float] | None, typer.Option(help="Density; repeatable [0.1, 0.15].")] = None,
    frames: Annotated[int, typer.Option(help="Frames of each video: 42 tokens each.", min=5, max=MOST_FRAMES)] = 32,
    calibrate: Annotated[int, typer.Option(help="Prompts that heads are searched on.", min=1)] = 1,
    prompts: Annotated[int, typer.Option(help="Videos that configs are scored on.", min=1)] = 4,
    boundaries: Annotated[
        list[str] | None, typer.Option(help="Some of none, q and 2d, with commas; repeatable [none,q,2d].")
    ] = None,
    weigh: Annotated[str, typer.Option(help="How much errors count: layers, heads or equal.")] = "layers",
    tail: Annotated[bool, typer.Option(help="Keep every key for the last 64 rows, which hold the questions.")] = True,
    tiles: Annotated[str, typer.Option(help="Rows and keys of a tile.")] = "32,32",
    device: Annotated[str, typer.Option(help="cpu in float32, or cuda in bfloat16.")] = "cpu",
    threads: Annotated[int, typer.Option(help="Threads of PyTorch; 0 for its own number.", min=0)] = 0,
    keep: Annotated[Path | None, typer.Option(help="File for what has been measured.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder that receives the configs.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the scores there as well.")] = None,
) -> None:
    """Search, then score."""
    if threads:
        torch.set_num_threads(threads)
    try:
        tokenizer, model = load_video_model()
        model = on_device(model, device)
        known = build_prompts(tokenizer, model, frames, range(calibrate), "train")
        asked = build_prompts(tokenizer, model, frames, range(prompts), "test")
        found = [score(model, Policy("dense", "dense"), asked)]
        with using_tiles(parse_tiles(tiles)), TemporaryDirectory() as folder:
            measured = keep or Path(folder) / "measured.json"  # all budgets choose among what was measured once
            for names in boundaries or ["none,q,2d"]:
                kept = measured.with_name(f"{measured.stem}_{names.replace(',', '_')}{measured.suffix}")
                for share in budget or [0.1, 0.15]:
                    config = mmi_compile.search(
                        model, [_inputs(prompt) for prompt in known], budget=share, unit="tiles",
                        boundaries=names.split(","), weigh=weigh, dense_tail=tail, resume=kept,
                    )  # fmt: skip
                    name = f"{names}, budget {share:g}"
                    if output is not None:
                        output.mkdir(parents=True, exist_ok=True)
                        config.save(output / f"heads_{names.replace(',', '_')}_{share:g}.json")
                    policy = Policy(name, "config", config=config, dense_tail=tail)
                    found.append(score(model, policy, asked))
                    print(f"{found[-1]}; heads by boundary: {boundaries_of(config)}", file=sys.stderr)
    except (MissingPackage, ValueError, mmi_compile.MMIError) as error:
        print(error, file=sys.stderr)
        raise typer.Exit(2) from None
    Console().print(table(found))
    if json_file is not None:
        write_scores(json_file, found)


def boundaries_of(config: HeadConfig) -> str:
    """How many heads have each boundary."""
    found = Counter(entry.boundary for layer in config.layers for entry in layer)
    return ", ".join(f"{name} {count}" for name, count in sorted(found.items()))


def _inputs(prompt: Prompt) -> dict[str, object]:
    return {"input_ids": prompt.input_ids, "pixel_values": prompt.pixel_values, "use_cache": False}


if __name__ == "__main__":
    typer.run(main)
