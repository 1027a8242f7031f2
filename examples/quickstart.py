"""Compile a small video-language model, see what happens to its attention, and time it. Runs on a CPU in a minute.

    python examples/quickstart.py              # about 8 K tokens of text and video; 128 K on a GPU
    python examples/quickstart.py --clips 60   # longer
    python examples/quickstart.py --code       # also print the rewritten FX graph

The model is Qwen2.5-VL as transformers builds it, with small random weights. Real weights cannot be downloaded here, so
the structure that trained attention shows is planted (see ``planted.py``): some heads look at their own clip, some at a
few notes in the text, some at the start of every clip.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import time
from typing import Any

import torch
from planted import STRUCTURES, mark_tokens, plant
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

import mmi_compile

VIDEO, CLIP_START, CLIP_END, NOTE = 500, 501, 502, 503
SIZES = {"cpu": (31, 32, 6), "cuda": (124, 64, 24)}
"""Clips, patches per side of a frame (2 × 2 of them become one token), and attention heads, by device."""
INNER = "inductor" if shutil.which("g++") else "eager"


def build_model(heads: int) -> Any:
    """A two-layer Qwen2.5-VL with planted attention, half as many key/value heads as query heads, 64 wide each."""
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 512, "hidden_size": 64 * heads, "intermediate_size": 128 * heads, "num_hidden_layers": 2,
            "num_attention_heads": heads, "num_key_value_heads": heads // 2, "max_position_embeddings": 1 << 17,
            "rope_parameters": {"rope_type": "default", "mrope_section": [8, 12, 12], "rope_theta": 1e6},
            "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
        },
        vision_config={
            "depth": 1, "hidden_size": 32, "out_hidden_size": 64 * heads, "intermediate_size": 64, "num_heads": 2,
            "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 32,
            "fullatt_block_indexes": [0], "tokens_per_second": 2,
        },
        image_token_id=504, video_token_id=VIDEO, vision_start_token_id=CLIP_START, vision_end_token_id=CLIP_END,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    plant(model.model.language_model, local=slice(0, 8))
    mark_tokens(model.get_input_embeddings(), {"vertical": NOTE, "grid": CLIP_START})
    with torch.no_grad():  # vision features carry no marks
        last = model.model.visual.merger.mlp[-1]
        last.weight[: len(STRUCTURES)] = 0
        last.bias[: len(STRUCTURES)] = 0
    return model


def build_inputs(clips: int, side: int) -> dict[str, torch.Tensor]:
    """A prompt of ``clips`` clips of two frames, each after its time stamp, with a note now and then."""
    generator = torch.Generator().manual_seed(0)

    def words(count: int) -> list[int]:
        return torch.randint(3, 480, (count,), generator=generator).tolist()

    ids = words(20)
    for clip in range(clips):
        ids += [*words(6), CLIP_START, *[VIDEO] * (side // 2) ** 2, CLIP_END]
        if clip % 5 == 2:
            ids += [*words(4), NOTE, NOTE, *words(4)]
    ids += words(40)
    input_ids = torch.tensor([ids])
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "mm_token_type_ids": torch.where(input_ids == VIDEO, 2, 0),
        "pixel_values_videos": torch.randn(clips * side * side, 3 * 2 * 4 * 4, generator=generator),
        "video_grid_thw": torch.tensor([[1, side, side]] * clips),
    }


def place() -> tuple[str, torch.dtype]:
    """A GPU in bfloat16 if there is one, else the CPU in float32."""
    return ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)


def moved(inputs: dict[str, torch.Tensor], device: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The inputs on a device, floating-point ones in ``dtype``."""
    return {n: x.to(device, dtype) if x.is_floating_point() else x.to(device) for n, x in inputs.items()}


def language_model_inputs(model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
    """What the vision-language model hands to its language model."""
    seen: list[dict[str, Any]] = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda _, __, kwargs: seen.append(kwargs), with_kwargs=True
    )
    with torch.inference_mode():
        model(**inputs, logits_to_keep=1)
    hook.remove()
    return {**seen[0], "past_key_values": None}


def prefill(language_model: Any, inputs: dict[str, Any], repeats: int) -> tuple[float, torch.Tensor]:
    """Median seconds of a prefill, and the last hidden state."""
    times = []
    with torch.inference_mode():
        out = language_model(**inputs)  # compiles
        for _ in range(repeats):
            synchronize()
            start = time.perf_counter()
            out = language_model(**inputs)
            synchronize()
            times.append(time.perf_counter() - start)
    return statistics.median(times), out.last_hidden_state


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main() -> None:
    """Explain, then compare dense, exact and adaptive side by side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, help="clips of two frames (31 on a CPU, 124 larger ones on a GPU)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--code", action="store_true", help="print the rewritten FX graph")
    parser.add_argument("--inner", default=INNER)
    args = parser.parse_args()

    device, dtype = place()
    clips, side, heads = SIZES[device]
    clips = args.clips or clips
    inputs = moved(build_inputs(clips, side), device, dtype)
    tokens = inputs["input_ids"].shape[1]
    print(f"a prompt of {tokens} tokens, {clips} clips of video, on {device} in {str(dtype)[6:]}\n")

    report = mmi_compile.explain(build_model(heads).to(device, dtype), **inputs)
    print(report)
    if args.code:
        print(report.code())

    rows = {}
    prompt = language_model_inputs(build_model(heads).to(device, dtype), inputs)
    for name in ("dense", "exact", "adaptive"):
        model = build_model(heads).to(device, dtype)
        if name != "dense":
            mmi_compile.compile(model, policy=name, inner=args.inner)
        rows[name] = prefill(model.model.language_model, prompt, args.repeats)
    dense_seconds, dense_state = rows["dense"]
    print(f"\nprefill of the language model, {tokens} tokens, median of {args.repeats}")
    print(f"{'':26}{'seconds':>8}{'speed-up':>10}{'relative error':>17}")
    labels = {"dense": "eager, dense attention", "exact": "mminference, exact", "adaptive": "mminference, adaptive"}
    for name, (seconds, state) in rows.items():
        error = float((state - dense_state).float().norm() / dense_state.float().norm())
        print(f"{labels[name]:26}{seconds:8.3f}{dense_seconds / seconds:9.2f}×{error:17.1e}")


if __name__ == "__main__":
    main()
