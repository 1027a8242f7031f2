"""Head search on a small video-language model with trained weights, and what its configs are worth, on a CPU.

    python examples/head_search.py                                  # a quarter of an hour: 32 frames, one prompt
    python examples/head_search.py --budget 0.1 --budget 0.15 --boundaries none
    python examples/head_search.py --keep measured.json             # again with it: only scores are computed anew

Every head tries every pattern and boundary on prompts about photographs that the model was trained on; each budget then
gives a head config, which answers the questions of ``video_needles.py`` about other photographs. A budget is a density,
counted in tiles. What it needs is told there.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from needle.measure import score
from needle.model import load_video_model
from needle.packages import MissingPackage
from needle.policies import Policy, cpu_tiles
from needle.task import MOST_FRAMES, Prompt
from rich.console import Console
from video_needles import build_prompts, table

import mmi_compile


def main(
    budget: Annotated[list[float] | None, typer.Option(help="Density; repeatable [0.1, 0.15].")] = None,
    frames: Annotated[int, typer.Option(help="Frames of each video: 42 tokens each.", min=5, max=MOST_FRAMES)] = 32,
    calibrate: Annotated[int, typer.Option(help="Prompts that heads are searched on.", min=1)] = 1,
    prompts: Annotated[int, typer.Option(help="Videos that configs are scored on.", min=1)] = 4,
    boundaries: Annotated[str, typer.Option(help="Some of none, q and 2d, with commas.")] = "none,q,2d",
    tail: Annotated[bool, typer.Option(help="Keep every key for the last 64 rows, which hold the questions.")] = True,
    tiles: Annotated[str, typer.Option(help="Rows and keys of a tile.")] = "32,32",
    threads: Annotated[int, typer.Option(help="Threads of PyTorch; 0 for its own number.", min=0)] = 0,
    keep: Annotated[Path | None, typer.Option(help="File for what has been measured.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder that receives the configs.")] = None,
) -> None:
    """Search, then score."""
    if threads:
        torch.set_num_threads(threads)
    try:
        tokenizer, model = load_video_model()
        known = build_prompts(tokenizer, model, frames, range(calibrate), "train")
        asked = build_prompts(tokenizer, model, frames, range(prompts), "test")
        found = [score(model, Policy("dense", "dense"), asked)]
        with cpu_tiles(tiles):
            for share in budget or [0.1, 0.15]:
                config = mmi_compile.search(
                    model, [_inputs(prompt) for prompt in known], budget=share, unit="tiles",
                    boundaries=boundaries.split(","), dense_tail=tail, resume=keep,
                )  # fmt: skip
                if output is not None:
                    output.mkdir(parents=True, exist_ok=True)
                    config.save(output / f"heads_{share:g}.json")
                policy = Policy(f"searched, budget {share:g}", "config", config=config, dense_tail=tail)
                found.append(score(model, policy, asked))
                print(f"{policy.text}: {found[-1].density:.1%}", file=sys.stderr)
    except (MissingPackage, ValueError, mmi_compile.MMIError) as error:
        print(error, file=sys.stderr)
        raise typer.Exit(2) from None
    Console().print(table(found))


def _inputs(prompt: Prompt) -> dict[str, object]:
    return {"input_ids": prompt.input_ids, "pixel_values": prompt.pixel_values, "use_cache": False}


if __name__ == "__main__":
    typer.run(main)
