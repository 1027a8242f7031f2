"""What patterns and boundaries look like: draws the plan of one head each.

    python examples/pictures.py                 # as text
    python examples/pictures.py --png plans.png

The prompt interleaves text and video frames; heads of inputs with planted structure give the patterns what they look
for. Each picture is made of sampled rows, so that a prompt of a million tokens takes no more memory than its keys.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from mmi_compile.kernels.boundaries import build_bounded_plan
from mmi_compile.kernels.frames import TileShape
from mmi_compile.kernels.geometry import Geometry
from mmi_compile.kernels.patterns import AShape, ByModality, Grid, HeadPattern, VerticalSlash
from mmi_compile.kernels.segments import segment
from mmi_compile.kernels.structured import Structure, structured_qkv
from mmi_compile.picture import as_text, save_png

TEXT, VIDEO = 0, 1
HEADS: dict[str, tuple[Structure, HeadPattern]] = {
    "a_shape": (Structure(columns=(0, 1, 2), local=200), AShape(64, 256)),
    "vertical_slash": (Structure(columns=(3, 700, 1900), distances=(0, 900)), VerticalSlash(40, 100)),
    "grid": (Structure(stride=256, phase=40, local=100), Grid(256, 0, 128)),
    "q boundary": (
        Structure(columns=(3, 700), distances=(0, 900)),
        ByModality("q", AShape(64, 128), ((VIDEO, VerticalSlash(40, 100)),)),
    ),
    "2d boundary": (
        Structure(columns=(3, 700), local=60),
        ByModality("2d", AShape(32, 64), (((VIDEO, VIDEO), VerticalSlash(40, 8)), ((TEXT, TEXT), AShape(64, 256)))),
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--order", choices=("prompt", "plan"), default="prompt", help="plan: grouped by modality")
    parser.add_argument("--png", type=Path, help="write a picture instead of text")
    given = parser.parse_args()
    n, tiles = given.tokens, TileShape(32, 32)
    x = structured_qkv([structure for structure, _ in HEADS.values()], n, head_dim=128)
    g = Geometry(1, len(HEADS), len(HEADS), n, n)
    ids = (torch.arange(n) % 340 >= 84).to(torch.int8)[None]
    patterns = [pattern for _, pattern in HEADS.values()]
    plan = build_bounded_plan(patterns, x.q, x.k, g, 128**-0.5, tiles, segment(ids, (TEXT, VIDEO), g, tiles))
    names = {name: head for head, name in enumerate(HEADS)}
    if given.png is not None:
        save_png(plan, names, given.png, order=given.order)
        return
    for name, head in names.items():
        print(f"{name}: {float(plan.density()[0, head]):.1%} of the pairs")
        print(as_text(plan, head, size=32, order=given.order), end="\n\n")


if __name__ == "__main__":
    main()
