"""What errors of heads do to the output of the model: how much each layer's error counts, and which choice is best.

Head search measures errors of attention. Of two layers with the same error, one may change what the model says and the
other may not. So each layer runs sparse alone, and its error counts as much as the output then changes. At the end a
few choices of the same budget run as a whole, and the one that changes the output least is taken.

The output is compared without labels: logits by their Kullback-Leibler divergence, other outputs by squared error.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from mmi_compile.head_choice import Choice, LayerResult, choose
from mmi_compile.head_measure import LAST_ROWS, Rows, share_of_all
from mmi_compile.kernels.patterns import Dense, HeadPattern

Weigh: TypeAlias = Literal["equal", "layers", "heads"]

Heads: TypeAlias = Mapping[int, Sequence[HeadPattern]]
"""What the heads of some attentions run, by place in the forward; the others are exact."""

SPACED_ROWS = 256
"""Rows from all over the prompt whose output is compared, besides the last ones."""

WEIGHED_PROMPTS = 2
"""Prompts by which layers are weighed, at most; choices are compared on all of them."""

MARGIN = 0.1
"""Share by which the output must change less for a choice to be taken before that by errors alone: a few prompts and
rounding tell no smaller differences."""

LEAST_WEIGHT = 0.02
"""Of a layer or head, where the mean is 1: that the output did not change on a few prompts is no proof."""


@dataclass(frozen=True)
class Shown:
    """Some rows of a model's output, float32 ``[R, C]``, and how much each counts, ``[R]``."""

    rows: Tensor
    weight: Tensor
    logits: bool

    @classmethod
    def of(cls, output: Any, mask: Tensor | None, rows: Rows) -> Shown | None:
        """Rows of what a forward returned; None where it holds no tensor ``[B, N, C]`` of floats.

        Args:
            mask: ``[B, N]`` of live tokens, or None for all.
            rows: as in head search; the output's own last rows where it holds fewer than the prompt.
        """
        tensor, logits = _tensor_of(output)
        if tensor is None:
            return None
        batch, count, _ = tensor.shape
        live = torch.ones(batch, count, dtype=torch.bool, device=tensor.device)
        if mask is not None and mask.dim() == 2 and mask.shape[0] == batch and mask.shape[1] >= count:
            live = mask[:, -count:].to(tensor.device) != 0
        share, picked, weights = share_of_all(rows), [], []
        for b in range(batch):
            places = live[b].nonzero()[:, 0]
            last = places[-LAST_ROWS:]
            spaced = places[torch.linspace(0, max(0, len(places) - 1), min(SPACED_ROWS, len(places))).long()]
            for chosen, part in ((spaced, share), (last, 1 - share)):
                if part > 0 and len(chosen):
                    picked.append(tensor[b, chosen].float())
                    weights.append(torch.full((len(chosen),), part / len(chosen) / batch, device=tensor.device))
        return cls(torch.cat(picked), torch.cat(weights), logits) if picked else None

    def divergence(self, other: Shown) -> float:
        """How far ``other`` is from this, the exact output: mean over rows."""
        if self.logits:
            exact, found = (torch.log_softmax(x, -1) for x in (self.rows, other.rows))
            # What the model rules out has no probability; minus infinity from itself would be NaN.
            each = (exact.exp() * (exact - found)).masked_fill(exact == float("-inf"), 0.0).sum(-1)
            return float((each * self.weight).sum())
        energy = (self.rows.square().sum(-1) * self.weight).sum().clamp(min=1e-30)
        return float(((other.rows - self.rows).square().sum(-1) * self.weight).sum() / energy)


def _tensor_of(output: Any) -> tuple[Tensor | None, bool]:
    """The logits, or else the first tensor ``[B, N, C]``; and whether it is logits."""
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if isinstance(found, Tensor) and found.dim() == 3:
        return found, True
    parts = output.values() if isinstance(output, Mapping) else output
    for part in parts if isinstance(output, Mapping | list | tuple) else (output,):
        if isinstance(part, Tensor) and part.dim() == 3 and part.is_floating_point():
            return part, False
    return None, False


@dataclass
class OutputError:
    """Divergence of the output where some heads are sparse.

    Attributes:
        run: a forward of a prompt under some heads, and its output's rows. prompts: how many there are.
        known: what has been measured, by prompt and heads; keep: told of each new one.
    """

    run: Callable[[int, Heads], Shown | None]
    prompts: int
    known: Callable[[str, int], float | None]
    keep: Callable[[str, int, float], None]
    _exact: dict[int, Shown | None] = field(default_factory=dict)

    def of(self, heads: Heads, prompts: int | None = None, *, most: bool = False) -> float | None:
        """Mean over the first prompts, or the ``most`` of any; None where the model's output cannot be compared."""
        found = []
        for number in range(min(self.prompts, prompts or self.prompts)):
            name = _name(heads)
            value = self.known(name, number)
            if value is None:
                if number not in self._exact:
                    self._exact[number] = self.run(number, {})
                exact = self._exact[number]
                shown = None if exact is None else self.run(number, heads)
                if exact is None or shown is None:
                    return None
                value = exact.divergence(shown)
                value = max(0.0, value) if value < float("inf") else 1e30  # NaN as well
                self.keep(name, number, value)
            found.append(value)
        return max(found) if most else sum(found) / len(found)


def _name(heads: Heads) -> str:
    """Names what was run."""
    text = json.dumps([[place, [p.to_json() for p in heads[place]]] for place in sorted(heads)])
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def weighed(layers: Sequence[LayerResult], budget: float, output: OutputError, by: Weigh) -> list[LayerResult]:
    """The layers with weights by which squared errors add up to what the output would change.

    Args:
        by: ``layers``: each one runs alone what it would choose under the budget; ``heads``: each head alone its
            cheapest pattern, which costs as many forwards as there are heads.
    """
    dense = {place: [Dense()] * len(layer.heads) for place, layer in enumerate(layers)}
    noise = output.of(dense, WEIGHED_PROMPTS)  # of rounding alone, in the kernels that run plans
    if noise is None:
        return list(layers)
    found: list[list[float | None]] = []
    for place, layer in enumerate(layers):
        count = len(layer.heads)
        if by == "heads":
            picks = [scored[0] for scored in layer.heads]
        else:
            least = sum(scored[0].cost for scored in layer.heads) / count
            picks = list(choose([layer], min(1.0, max(budget, least * (1 + 1e-9)))).heads[0])
        weights: list[float | None] = []
        for unit in [[h] for h in range(count)] if by == "heads" else [list(range(count))]:
            patterns = [picks[h].pattern if h in unit else Dense() for h in range(count)]
            error = sum(layer.weights[h] * picks[h].error ** 2 for h in unit)
            change = output.of({place: patterns}, WEIGHED_PROMPTS)
            weights.append(None if change is None or error <= 1e-9 else max(0.0, change - noise) / error)
        found.append(weights)
    measured = [w for weights in found for w in weights if w is not None]
    mean = sum(measured) / max(1, len(measured))
    if mean <= 0:
        return list(layers)
    return [_times(layer, [1.0 if w is None else max(LEAST_WEIGHT, w / mean) for w in weights])
            for layer, weights in zip(layers, found, strict=True)]  # fmt: skip


def _times(layer: LayerResult, factors: Sequence[float]) -> LayerResult:
    each = factors if len(factors) == len(layer.weights) else list(factors) * len(layer.weights)
    return dataclasses.replace(layer, weights=tuple(w * f for w, f in zip(layer.weights, each, strict=True)))


def best(choices: Sequence[Choice], output: OutputError, *, most: bool = False) -> Choice:
    """The one that changes the output least; the first unless another changes it less by ``MARGIN``.

    The first is also taken where outputs cannot be compared.
    """
    first, *others = choices
    found, least = first, (1 - MARGIN) * _change(first, output, most)
    for choice in others:
        change = _change(choice, output, most)
        if change < least:
            found, least = choice, change
    return found


def _change(choice: Choice, output: OutputError, most: bool) -> float:
    heads = {place: [s.pattern for s in layer] for place, layer in enumerate(choice.heads)}
    return output.of(heads, most=most) or 0.0
