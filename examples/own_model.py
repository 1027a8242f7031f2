"""A model of your own: attention is found by what it computes, and where it is left alone the report says why.

    python examples/own_model.py                 # some seconds on a CPU

``Decoder`` is a plain ``nn.Module`` that writes attention out with ``einsum``. Nothing registers it anywhere: the
passes find the two products around a softmax, prove that the mask is causal, and put the sparse operator there. Then
come variants that cannot be rewritten, each with the reason that the report gives and with the mend applied.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mmi_compile
from mmi_compile import MMIError, Report

WIDTH, HEADS, TOKENS = 64, 4, 320


def causal(n: int) -> Tensor:
    return torch.full((n, n), float("-inf")).triu(1)


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of ``[batch, tokens, heads, dim]``, by hand."""
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(q.shape[-1])
    return torch.einsum("bhij,bjhd->bihd", (scores + causal(q.shape[1])).softmax(-1), v)


class Decoder(nn.Module):
    """One block: ``[batch, tokens, WIDTH]`` to the same."""

    def __init__(self, attend: Callable[..., Tensor] = plain, heads: int = HEADS) -> None:
        super().__init__()
        self.attend, self.heads = attend, heads
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, *more: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in self.qkv(x).chunk(3, -1))
        return x + self.out(self.attend(q, k, v, *more).flatten(2))


# --- what is left alone, and its mend --------------------------------------------------------------------------------


def soft_capped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Gemma 2 bounds its scores. No kernel here can, and leaving it out would be another model: there is no mend."""
    scores = 30 * torch.tanh(torch.einsum("bihd,bjhd->bhij", q, k) / 30)
    return torch.einsum("bhij,bjhd->bihd", (scores + causal(q.shape[1])).softmax(-1), v)


def mask_given(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """A mask that comes in as data may hold anything, so nothing can be proved of it."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def mask_made(q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    """The mend: say what it means."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def measured(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Weights that something else reads must exist, and a fused kernel has none."""
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(q.shape[-1])
    weights = (scores + causal(q.shape[1])).softmax(-1)
    heaviest = weights.amax(-1).mean()
    return torch.einsum("bhij,bjhd->bihd", weights, v) * heaviest


def only_report(model: nn.Module, *inputs: Tensor) -> Report:
    return mmi_compile.explain(model, *inputs)


def with_gradients(model: nn.Module, *inputs: Tensor) -> Report:
    """As in training: the compiled model runs outside ``torch.no_grad()``."""
    torch.compile(model, backend="mminference", options={"inner": "eager"})(*inputs)
    report = mmi_compile.last_report()
    assert report is not None
    return Report(report.graphs[-1:])


def without_gradients(model: nn.Module, *inputs: Tensor) -> Report:
    with torch.inference_mode():
        return with_gradients(model, *inputs)


Case = tuple[str, nn.Module, Callable[..., Report], "tuple[nn.Module, Callable[..., Report]] | None", tuple[Any, ...]]


def cases() -> list[Case]:
    """Name, model, how it runs, the mended ones, and further inputs."""
    mask = causal(TOKENS)
    return [
        ("scores are capped", Decoder(soft_capped), only_report, None, ()),
        ("the mask is an input", Decoder(mask_given), only_report, (Decoder(mask_made), only_report), (mask,)),
        ("weights are read", Decoder(measured), only_report, (Decoder(), only_report), ()),
        ("heads of 4 dimensions", Decoder(heads=16), only_report, (Decoder(heads=8), only_report), ()),
        ("gradients are on", Decoder(), with_gradients, (Decoder(), without_gradients), ()),
    ]


def main() -> None:
    torch.manual_seed(0)
    model, x = Decoder().eval(), torch.randn(1, TOKENS, WIDTH)
    report = mmi_compile.explain(model, x)
    print(report)
    assert report.summary() == "1 of 1 attentions rewritten in 1 graph"
    assert report.sites[0].mask == "causal"

    compiled = torch.compile(model, backend="mminference", options={"policy": "exact", "inner": "eager"})
    with torch.inference_mode():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    print("\nexact, compiled: equal to the model\n")

    for name, left, run, mended, more in cases():
        torch._dynamo.reset()
        (site,) = run(left, x, *more).sites
        decision = site.decision
        assert decision is not None
        assert decision.reason is not None
        assert not decision.rewritten
        print(f"{name}: {decision.reason.name}\n  why   {decision}\n  mend  {decision.reason.mend}")
        if mended is not None:
            again, how = mended
            torch._dynamo.reset()
            assert len(how(again, x, *more).rewritten) == 1
            print("  then  rewritten")

    torch._dynamo.reset()
    strict = torch.compile(Decoder(soft_capped), backend="mminference", options={"strict": True, "inner": "eager"})
    raised: Exception | None = None
    try:
        with torch.inference_mode():
            strict(x)
    except torch._dynamo.exc.BackendCompilerFailed as error:  # Dynamo wraps what a backend raises
        raised = error.inner_exception
    print(f"\nunder strict=True, {type(raised).__name__}:\n  {raised}")
    assert isinstance(raised, MMIError)


if __name__ == "__main__":
    main()
