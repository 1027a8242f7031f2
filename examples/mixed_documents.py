"""Documents that mix images of different sizes, videos and text: who says which token is what, and heads that use it.

    python examples/mixed_documents.py           # some ten seconds on a CPU

1. ``mmi_compile.compile`` reads it from the processor's output, before the model runs.
2. ``with mmi_compile.modality(ids):`` says it by hand, for models that nothing is known of, and for kinds of your own.
3. A head config with boundaries treats the rows of each kind in their own way (MMInference, section 3.3).
"""

from __future__ import annotations

from typing import Any

import torch
from quickstart import VIDEO, build_model
from torch import Tensor

import mmi_compile

IMAGE, HEADS, MERGE = 504, 6, 2
TEXT_KIND, IMAGE_KIND, VIDEO_KIND, TABLE_KIND = 0, 1, 2, 4  # the first of your own is 4

Grid = tuple[int, int, int]
"""Frames, rows and columns of patches; 2 × 2 patches become one token."""

DOCUMENT: list[tuple[str, Any]] = [
    ("text", 120), ("image", (1, 16, 24)), ("text", 300), ("image", (1, 8, 8)), ("text", 2), ("image", (1, 20, 12)),
    ("text", 500), ("video", (6, 12, 16)), ("text", 200), ("video", (4, 8, 8)), ("table", 180), ("text", 140),
]  # fmt: skip
"""Tables are text to the model, and a kind of their own to us."""


def build_document() -> tuple[dict[str, Tensor], Tensor]:
    """What a processor would make of ``DOCUMENT``, and the kind of every token, int8 ``[1, tokens]``."""
    generator = torch.Generator().manual_seed(0)
    ids: list[int] = []
    kinds: list[int] = []
    grids: dict[str, list[Grid]] = {"image": [], "video": []}
    for kind, size in DOCUMENT:
        if kind in grids:
            t, h, w = size
            count = t * (h // MERGE) * (w // MERGE)
            grids[kind].append(size)
            ids += [IMAGE if kind == "image" else VIDEO] * count
            kinds += [IMAGE_KIND if kind == "image" else VIDEO_KIND] * count
        else:
            ids += torch.randint(3, 480, (size,), generator=generator).tolist()
            kinds += [TABLE_KIND if kind == "table" else TEXT_KIND] * size

    def pixels(media: list[Grid]) -> Tensor:
        return torch.randn(sum(t * h * w for t, h, w in media), 3 * 2 * 4 * 4, generator=generator)

    input_ids = torch.tensor([ids])
    inputs = {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "mm_token_type_ids": torch.where(input_ids == IMAGE, 1, torch.where(input_ids == VIDEO, 2, 0)),
        "pixel_values": pixels(grids["image"]),
        "image_grid_thw": torch.tensor(grids["image"]),
        "pixel_values_videos": pixels(grids["video"]),
        "video_grid_thw": torch.tensor(grids["video"]),
    }
    return inputs, torch.tensor([kinds], dtype=torch.int8)


def run(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.inference_mode():
        return model(**inputs, use_cache=False).logits


def last_graph() -> dict[str, Any]:
    """The graph that was compiled last, as in the JSON report."""
    return mmi_compile.last_report().graphs[-1].to_json()


def from_the_processor(inputs: dict[str, Tensor], kinds: Tensor) -> None:
    dense, model = build_model(HEADS), build_model(HEADS)
    mmi_compile.compile(model, policy="exact", inner="eager", strict=True)
    torch.testing.assert_close(run(model, inputs), run(dense, inputs), rtol=1e-4, atol=1e-4)
    told = last_graph()["modality"]["prompt"]
    print(f"1. read from {told['source']}:")
    for grid in told["grids"]:
        frames = f"{grid['frames']} frames of " if grid["frames"] > 1 else ""
        stride = f", a frame every {grid['frame_stride']} tokens" if grid["frame_stride"] else ""
        size = f"{frames}{grid['rows']} × {grid['tokens_per_row']} tokens{stride}"
        print(f"   {grid['modality']:5} at {grid['start']:4} … {grid['stop']:4}: {size}")
    assert told["tokens"]["image"] == int((kinds == IMAGE_KIND).sum())
    assert told["tokens"]["video"] == int((kinds == VIDEO_KIND).sum())
    assert [grid["modality"] for grid in told["grids"]] == ["image", "image", "image", "video", "video"]


def by_hand(kinds: Tensor) -> None:
    """The language model alone, through the bare backend: nothing of its input says what a token is."""
    language_model = build_model(HEADS).model.language_model
    compiled = torch.compile(language_model, backend="mminference", options={"policy": "exact", "inner": "eager"})
    embeddings = torch.randn(1, kinds.shape[1], 64 * HEADS, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), mmi_compile.modality(kinds):
        compiled(inputs_embeds=embeddings, use_cache=False)
    told = last_graph()["modality"]["prompt"]
    print(f"\n2. {told['source']}: " + ", ".join(f"{count} {name}" for name, count in told["tokens"].items()))
    assert told["tokens"]["modality 4"] == int((kinds == TABLE_KIND).sum())

    with torch.no_grad(), mmi_compile.modality(kinds[:, :-1]):  # one token short
        compiled(inputs_embeds=embeddings, use_cache=False)
    told = last_graph()["modality"]["prompt"]
    print(f"   ids of another length: {told['source']}")
    assert "ignored" in told["source"]


HEAD_CONFIG: dict[str, Any] = {
    "version": 1,
    "fingerprint": {"layers": 2, "q_heads": HEADS, "kv_heads": HEADS // 2, "head_dim": 64},
    "modalities": {"0": "text", "1": "image", "2": "video", "4": "table"},
    "layers": [{"heads": [
        {"count": 2, "pattern": {"pattern": "a_shape", "sink": 64, "local": 256}},
        {"count": 2, "pattern": {
            "boundary": "q", "default": {"pattern": "a_shape", "sink": 64, "local": 128},
            "patterns": [{"query": 0, "pattern": "dense"}, {"query": 4, "pattern": "dense"}],
        }},
        {"count": 2, "pattern": {
            "boundary": "2d", "default": {"pattern": "a_shape", "sink": 16, "local": 64},
            "patterns": [{"query": 2, "key": 2, "pattern": "a_shape", "sink": 16, "local": 384},
                         {"query": 0, "key": 0, "pattern": "dense"}],
        }},
    ]}] * 2,
}  # fmt: skip


def heads_that_use_it(inputs: dict[str, Tensor], kinds: Tensor) -> None:
    """Rows of text and tables keep everything, those of images and videos little."""
    model = build_model(HEADS)
    mmi_compile.compile(model, policy="config", head_config=HEAD_CONFIG, min_tokens=0, inner="eager", strict=True)
    with mmi_compile.modality(kinds):
        run(model, inputs)
    print("\n3. layer 0 under the head config:")
    patterns = last_graph()["attentions"][0]["run"]["patterns"][0]
    for head, pattern in enumerate(patterns):
        print(f"   head {head}: {pattern}")
    assert patterns[0].startswith("a_shape(64, 256)")
    assert patterns[2].startswith("q(text: dense, table: dense, else: a_shape(64, 128))")


def main() -> None:
    inputs, kinds = build_document()
    print(f"a document of {kinds.shape[1]} tokens\n")
    from_the_processor(inputs, kinds)
    by_hand(kinds)
    heads_that_use_it(inputs, kinds)


if __name__ == "__main__":
    main()
