"""A pattern of your own: write it, register it, run it in some heads, and see what it keeps.

    python examples/own_pattern.py               # some ten seconds on a CPU

A built-in grid keeps one key in every so many. Suppose that some heads read the *time stamp* before each clip, which is
several tokens long: ``Stamps`` keeps the first ``width`` tokens of every ``every``. Heads 4 and 5 of the small model
below do that (it was planted, see ``planted.py``), so that the pattern can be compared with a window that costs more.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from planted import mark_tokens
from quickstart import CLIP_END, CLIP_START, NOTE, VIDEO, build_model

import mmi_compile

HEADS, CLIPS, SIDE, STAMP = 6, 20, 16, 6
TOKENS_A_CLIP = STAMP + 2 + (SIDE // 2) ** 2


@mmi_compile.register_pattern
@dataclass(frozen=True)
class Stamps(mmi_compile.OwnPattern):
    """The first ``width`` of every ``every`` keys, besides ``sink`` and ``local``, which the base class knows."""

    every: int
    width: int
    sink: int
    local: int
    name: ClassVar[str] = "stamps"

    def columns(self, keys: int) -> Iterable[int]:
        return (start + place for start in range(0, keys, self.every) for place in range(self.width))


def build_inputs() -> dict[str, torch.Tensor]:
    """Clips of equal length, each after a stamp of ``STAMP`` tokens."""
    clip = [*[NOTE] * STAMP, CLIP_START, *[VIDEO] * (SIDE // 2) ** 2, CLIP_END]
    words = torch.randint(3, 480, (64,), generator=torch.Generator().manual_seed(0)).tolist()
    input_ids = torch.tensor([clip * CLIPS + words])
    pixels = torch.randn(CLIPS * SIDE * SIDE, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(0))
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "mm_token_type_ids": torch.where(input_ids == VIDEO, 2, 0),
        "pixel_values_videos": pixels,
        "video_grid_thw": torch.tensor([[1, SIDE, SIDE]] * CLIPS),
    }


def head_config(pattern: dict[str, Any]) -> dict[str, Any]:
    """Heads 4 and 5 run ``pattern``, the others everything; in a file it would look the same."""
    heads = [{"count": 4, "pattern": {"pattern": "dense"}}, {"count": 2, "pattern": pattern}]
    fingerprint = {"layers": 2, "q_heads": HEADS, "kv_heads": HEADS // 2, "head_dim": 64}
    return {"version": 1, "fingerprint": fingerprint, "layers": [{"heads": heads}] * 2}


def try_out(pattern: dict[str, Any], inputs: dict[str, torch.Tensor]) -> tuple[str, float]:
    """What heads 4 and 5 ran in layer 0, and the least recall of them on 64 rows of the prompt."""
    model = build_model(HEADS)
    mark_tokens(model.get_input_embeddings(), {"grid": NOTE})
    mmi_compile.compile(
        model, policy="config", head_config=head_config(pattern), verify=1.0, min_tokens=0, inner="eager", strict=True
    )
    with torch.inference_mode():
        model(**inputs, logits_to_keep=1, use_cache=False)
    _, run = mmi_compile.last_report().runs()[-2]
    return run["patterns"][0][4], min(run["guard"]["recall_per_head"][4:])


def main() -> None:
    inputs = build_inputs()
    tokens = inputs["input_ids"].shape[1]
    print(f"{tokens} tokens; the first {STAMP} of every {TOKENS_A_CLIP} are a time stamp\n")
    stamps = Stamps(TOKENS_A_CLIP, STAMP, sink=0, local=64)
    window = {"pattern": "a_shape", "sink": 64, "local": 192}
    found = {}
    for name, pattern in (("own", stamps.to_json()), ("a_shape", window)):
        text, found[name] = try_out(pattern, inputs)
        print(f"{text}\n   recall {found[name]:.3f} on rows of the whole prompt")
    assert found["own"] > 0.9
    assert found["own"] > found["a_shape"] + 0.3


if __name__ == "__main__":
    main()
