"""Head search: try every pattern on every head of a small model, spend one budget on them, and run what it found.

    python examples/search_heads.py              # some twenty seconds on a CPU
    python examples/search_heads.py --keep heads # keeps the config, and what was measured, in a folder

The model is a small Qwen2 with planted heads (``planted.py``): two look at their neighbourhood, two at marked tokens
that lie anywhere, two at marked tokens in even steps. The search is told none of that. ``head_search.py`` does the same
on a model with trained weights, in a quarter of an hour.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from planted import MARK, STRUCTURES, mark_tokens, plant
from rich.console import Console
from transformers import Qwen2Config, Qwen2ForCausalLM

import mmi_compile
from mmi_compile.head_search import Candidates
from mmi_compile.kernels.patterns import AShape, Grid, VerticalSlash
from mmi_compile.show import terminal_map

TOKENS, STRIDE = 2048, 128
WORDS, NOTES, LINES = range(3, 448), range(448, 480), range(480, 512)
"""Ids of words, and of the tokens that the heads with planted attention look for."""
BUDGET = 0.3
"""Tiles that all heads may compute together, as a share of dense attention."""
TRIED = Candidates(
    (AShape(64, 64), AShape(64, 256), AShape(64, 512), VerticalSlash(64, 64), VerticalSlash(256, 64),
     Grid(STRIDE, 64, 64), Grid(None, 64, 64)),
    boundaries=("none",),
)  # fmt: skip
"""A few, for a short example. By default the search tries a ladder of some forty, and the boundaries."""


def build_model() -> Any:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=512, hidden_size=192, intermediate_size=256, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=3, max_position_embeddings=1 << 15, rope_theta=1e6, tie_word_embeddings=False,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).eval()
    plant(model.model)
    embedding = model.get_input_embeddings()
    mark_tokens(embedding, {"vertical": NOTES[0], "grid": LINES[0]})
    with torch.no_grad():
        for kind, ids in (("vertical", NOTES), ("grid", LINES)):
            embedding.weight[list(ids), STRUCTURES.index(kind)] = MARK
        for layer in model.model.layers:  # marked tokens are found alike, and say different things
            layer.self_attn.v_proj.weight[:, : len(STRUCTURES)] = 0
    return model


def build_prompt(seed: int) -> dict[str, torch.Tensor]:
    """Random words, notes here and there, and a line break every ``STRIDE`` tokens."""
    generator = torch.Generator().manual_seed(seed)

    def some(ids: range, count: int) -> torch.Tensor:
        return torch.randint(ids.start, ids.stop, (count,), generator=generator)

    ids = some(WORDS, TOKENS)[None]
    ids[0, torch.randperm(TOKENS, generator=generator)[:40]] = some(NOTES, 40)
    ids[0, STRIDE // 2 :: STRIDE] = some(LINES, TOKENS // STRIDE)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def run(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.inference_mode():
        return model(**inputs, use_cache=False).logits


def error_of(head_config: Any, inputs: dict[str, torch.Tensor], expected: torch.Tensor) -> tuple[float, float]:
    """Relative error of the logits under a head config, and the mean density of its heads."""
    model = build_model()
    mmi_compile.compile(
        model, policy="config", head_config=head_config, min_tokens=0, dense_tail=False, inner="eager", strict=True
    )
    found = run(model, inputs)
    densities = [density for _, last in mmi_compile.last_report().runs()[-2:] for density in last["density_per_head"]]
    return float((found - expected).norm() / expected.norm()), sum(densities) / len(densities)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--keep", type=Path, help="folder for the config and the measurements")
    given = parser.parse_args()
    model, calibration, other = build_model(), build_prompt(0), build_prompt(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        # Budgets of tiles are densities; unit="time" asks the cost model of this device instead. With `resume`, the
        # second call below measures nothing anew.
        options: dict[str, Any] = {
            "unit": "tiles", "candidates": TRIED, "dense_tail": False, "rows_at_most": 512,
            "resume": folder / "measured.json", "progress": False,
        }  # fmt: skip
        searched = mmi_compile.search(model, calibration, budget=BUDGET, **options)
        double = mmi_compile.search(model, calibration, budget=2 * BUDGET, **options)
        searched.save(folder / "heads.json")
        Console().print(terminal_map(searched))  # as `mmi show heads.json` does
        for number, layer in enumerate(searched.layers):
            for head, entry in enumerate(layer):
                print(f"layer {number} head {head}: {entry.pattern.describe()}, error {entry.score:.1e}")

        expected = run(model, other)
        fingerprint = searched.fingerprint.to_json()
        uniform = {
            "version": 1, "fingerprint": fingerprint,
            "layers": [{"heads": [{"count": 6, "pattern": {"pattern": "a_shape", "sink": 64, "local": 256}}]}] * 2,
        }  # fmt: skip
        print("\non another prompt           error  density")
        rows = {}
        configs = {
            f"searched, budget {BUDGET:.0%}": folder / "heads.json",
            f"searched, budget {2 * BUDGET:.0%}": double,
            "a_shape(64, 256) everywhere": uniform,
        }
        for name, config in configs.items():
            rows[name] = error_of(config, other, expected)
            print(f"{name:27} {rows[name][0]:.1e}  {rows[name][1]:.1%}")
    (small, _), (large, _), (window, _) = rows.values()
    assert large <= small, "a larger budget buys a smaller error"
    assert small < window, "heads that differ need patterns that differ"
    assert {entry.pattern.name for layer in searched.layers for entry in layer} >= {"vertical_slash", "grid"}


if __name__ == "__main__":
    main()
