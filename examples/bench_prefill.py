"""Prefill of four decoder layers of Qwen2.5-VL-7B's shape, compared in one run: eager, Inductor and mminference.

    python examples/bench_prefill.py                      # one H100 or better: 128 K tokens, bfloat16
    python examples/bench_prefill.py --tokens 16384       # smaller
    python examples/bench_prefill.py --model mistral      # Mistral-7B's shape, sliding window of 4096 tokens
    python examples/bench_prefill.py --search 0.12 --layers 28 --tokens 32768    # how long head search takes
    python examples/bench_prefill.py --json out.json

Weights are random; structure is planted in the attention (see ``planted.py``), since without any there is nothing for a
sparse method to find. Every variant reads the same tensors. Times are medians of CUDA events; memory is the peak that
PyTorch allocated during a run, with the weights and inputs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from planted import mark, plant
from torch.nn.attention import SDPBackend, sdpa_kernel

SHAPE = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 1024,
    "max_position_embeddings": 1 << 20,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


MISTRAL_SHAPE = SHAPE | {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "sliding_window": 4096,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}


def build(layers: int, planted: bool, name: str = "qwen") -> torch.nn.Module:
    """The decoder of ``Qwen2_5_VLForConditionalGeneration`` or Mistral, random weights, in bfloat16 on the GPU."""
    import transformers
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig

    torch.manual_seed(0)
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        if name == "mistral":
            model = transformers.MistralModel(transformers.MistralConfig(**MISTRAL_SHAPE, num_hidden_layers=layers))
        else:
            model = transformers.Qwen2_5_VLTextModel(Qwen2_5_VLTextConfig(**SHAPE, num_hidden_layers=layers))
        torch.set_default_dtype(torch.float32)
    model.eval()
    if planted:
        plant(model)
    return model


def measure(run: Callable[[], torch.Tensor], repeats: int) -> tuple[dict[str, float], torch.Tensor]:
    """Median seconds, peak GiB, and the output of the last run."""
    run()
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        out = run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return {"seconds": statistics.median(times), "gib": torch.cuda.max_memory_allocated() / 2**30}, out


def variants(layers: int, planted: bool, wanted: list[str], name: str) -> dict[str, Callable[[], Any]]:
    """Name → a function that makes a fresh model ready to run."""
    import mmi_compile

    def eager() -> Any:
        return build(layers, planted, name)

    def inductor() -> Any:
        model = build(layers, planted, name)
        model.compile()
        return model

    def ours(policy: str) -> Callable[[], Any]:
        return lambda: mmi_compile.compile(build(layers, planted, name), policy=policy)

    table = {
        "eager, cuDNN": eager,
        "torch.compile": inductor,
        "mminference exact": ours("exact"),
        "mminference adaptive": ours("adaptive"),
    }
    return {name: make for name, make in table.items() if not wanted or any(w in name for w in wanted)}


def main() -> None:
    """Run all variants and print the table last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="*", default=[], help="variants whose name contains one of these words")
    parser.add_argument("--random", action="store_true", help="plant nothing: no head has a pattern to find")
    parser.add_argument("--model", default="qwen", choices=["qwen", "mistral"], help="whose shape; mistral: --random")
    parser.add_argument("--search", type=float, metavar="BUDGET", help="time a head search for this budget instead")
    parser.add_argument("--weigh", default="layers", choices=["equal", "layers", "heads"], help="of that search")
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--report", action="store_true", help="print the report of each compiled variant")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench_prefill needs a CUDA GPU with 40 GiB or more; examples/quickstart.py runs on a CPU")

    args.random = args.random or args.model == "mistral"
    hidden = (MISTRAL_SHAPE if args.model == "mistral" else SHAPE)["hidden_size"]
    torch.manual_seed(1)
    embeddings = torch.randn(1, args.tokens, hidden, device="cuda", dtype=torch.bfloat16)
    if not args.random:
        embeddings = mark(embeddings)
    if args.search is not None:
        search(build(args.layers, not args.random, args.model), embeddings, args.search, args.weigh)
        return
    rows: dict[str, dict[str, float]] = {}
    reference: torch.Tensor | None = None
    for name, make in variants(args.layers, not args.random, args.only, args.model).items():
        torch.compiler.reset()
        model = make()
        cudnn = sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if name.startswith("eager") else nullcontext()

        def run(model: Any = model) -> torch.Tensor:
            # The first ids of the cache are made anew in every run, as in a real prefill.
            return model(inputs_embeds=embeddings, use_cache=True).last_hidden_state

        with torch.inference_mode(), cudnn:
            try:
                rows[name], out = measure(run, args.repeats)
            except torch.OutOfMemoryError as error:
                print(f"{name}: out of memory ({str(error).splitlines()[0]})")
                continue
        if reference is None:
            reference = out.float().cpu()
        difference = out.float().cpu() - reference
        rows[name]["error"] = float(difference.norm() / reference.norm())
        if args.report and name.startswith("mmi"):
            from mmi_compile import last_report, report

            print(last_report())
            report.forget()
        print(f"{name}: {rows[name]}", flush=True)
        del model, run, out, difference
        torch.cuda.empty_cache()
    print_table(rows, args)
    if args.json:
        figures = {"device": torch.cuda.get_device_name(), "tokens": args.tokens, "rows": rows}
        Path(args.json).write_text(json.dumps(figures, indent=1))


def search(model: torch.nn.Module, embeddings: torch.Tensor, budget: float, weigh: Any) -> None:
    """Search the heads of all layers on one prompt, and print how long it took, compilation included."""
    import mmi_compile

    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    inputs = {"inputs_embeds": embeddings, "use_cache": False}
    config = mmi_compile.search(model, inputs, budget=budget, weigh=weigh)
    seconds = time.perf_counter() - start
    print(f"{torch.cuda.get_device_name()} · torch {torch.__version__} · {embeddings.shape[1]} tokens")
    print(config.fingerprint.describe())
    print(f"head search: {seconds:.1f} s, peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")


def print_table(rows: dict[str, dict[str, float]], args: argparse.Namespace) -> None:
    """A table whose last columns compare with the first row."""
    print(f"\n{torch.cuda.get_device_name()} · torch {torch.__version__} · {args.tokens} tokens · {args.layers} layers")
    print(f"{'':24}{'seconds':>9}{'GiB':>8}{'speed-up':>10}{'memory':>9}{'error':>10}")
    if not rows:
        return
    first = next(iter(rows.values()))
    for name, row in rows.items():
        print(
            f"{name:24}{row['seconds']:9.3f}{row['gib']:8.1f}{first['seconds'] / row['seconds']:9.2f}×"
            f"{row['gib'] / first['gib']:8.2f}×{row['error']:10.1e}"
        )


if __name__ == "__main__":
    main()
