"""What boundaries are for: a head whose attention is regular among video tokens, but not in positions.

    python examples/boundaries.py

A prompt interleaves video frames with stretches of text of different lengths. Video tokens attend to the token a fixed
number of *video* tokens back, text to the text before it. In positions that distance is never the same twice, so one
pattern for the whole matrix misses most of it at any price, while a pattern for each pair of modalities (boundary `2d`)
has it with a few diagonals. The table shows the share of the attention's probability that each plan keeps (recall) and
the share of the dense work that it costs (density), both measured on the plan's exact mask. Runs on a CPU in seconds.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from mmi_compile.kernels.boundaries import build_bounded_plan
from mmi_compile.kernels.frames import TileShape
from mmi_compile.kernels.geometry import Geometry
from mmi_compile.kernels.patterns import AShape, ByModality, HeadPattern, VerticalSlash
from mmi_compile.kernels.reference import probabilities_reference
from mmi_compile.kernels.segments import segment

TEXT, VIDEO = 0, 1
FRAME, LONGEST_TEXT, BACK = 64, 80, 320  # tokens; BACK counts video tokens alone


def prompt(tokens: int, generator: torch.Generator) -> Tensor:
    """Modality ids int8 ``[1, tokens]``."""
    row: list[int] = []
    while len(row) < tokens:
        row += [VIDEO] * FRAME + [TEXT] * int(torch.randint(1, LONGEST_TEXT, (), generator=generator))
    return torch.tensor(row[:tokens], dtype=torch.int8)[None]


def attention(ids: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """q and k, float ``[1, 1, tokens, 64]``, of a head that attends as the docstring of this file says."""
    video = ids[0] == VIDEO
    rank = torch.where(video, video.cumsum(0), (~video).cumsum(0)).double()
    frequencies = 3.1 * torch.rand(31, generator=generator, dtype=torch.float64)

    def turned(place: Tensor) -> Tensor:
        angle = place[:, None] * frequencies
        return torch.cat([angle.cos(), angle.sin()], -1).float()

    kind = torch.stack([video, ~video], -1).float()
    k = torch.cat([turned(rank), kind], -1)
    q = torch.cat([turned(rank - BACK * video.double()) * 0.6, kind * 6], -1)
    return q[None, None], k[None, None]


def heads(diagonals: int) -> dict[str, HeadPattern]:
    """The same number of diagonals under each boundary."""
    slashes = VerticalSlash(0, diagonals)
    return {
        "none": slashes,
        "q": ByModality("q", AShape(0, 16), ((VIDEO, slashes),)),
        "2d": ByModality("2d", AShape(0, 1), (((VIDEO, VIDEO), slashes), ((TEXT, TEXT), AShape(0, 16)))),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=4600)
    parser.add_argument("--seed", type=int, default=3)
    given = parser.parse_args()
    generator = torch.Generator().manual_seed(given.seed)
    ids = prompt(given.tokens, generator)
    q, k = attention(ids, generator)
    g, tiles = Geometry(1, 1, 1, given.tokens, given.tokens), TileShape(16, 16)
    segments = segment(ids, (TEXT, VIDEO), g, tiles)
    truth = probabilities_reference(q, k, g.to_mask()[:, None], 1.0)
    late = slice(given.tokens // 3, None)  # rows that have that many video tokens behind them
    print(f"{given.tokens} tokens, {int((ids[0].diff() != 0).sum()) + 1} segments, tiles of 16 x 16")
    print("boundary  diagonals  recall  density")
    for diagonals in (2, 4, 8, 32, 128):
        for boundary, head in heads(diagonals).items():
            plan = build_bounded_plan([head], q, k, g, 1.0, tiles, segments)
            recall = float((truth * plan.to_mask()).sum(-1)[0, 0, late].mean())
            print(f"{boundary:8}  {diagonals:9}  {recall:6.3f}  {float(plan.density()):7.3f}")


if __name__ == "__main__":
    main()
