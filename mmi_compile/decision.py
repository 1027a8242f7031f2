"""One :class:`Decision` per attention: rewritten with what, or left alone and why."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Reason(Enum):
    """Why an attention was left as it was, or runs densely against the policy.

    The value is ``(message, mend)``; both are shown to users.
    """

    BIDIRECTIONAL = (
        "it attends in both directions, so it is not a language model's prefill",
        "nothing to do: encoders (vision towers) are left to the inner backend",
    )
    DECODE = ("one query token: a decode step", "nothing to do: decoding is memory bound and left alone")
    ONE_ROW = (
        "it has one query row over keys without a cache: a pooling head, or a prompt of one token",
        "nothing to do: one row reads every key once, and no plan would pay",
    )
    UNKNOWN_MASK = (
        "the meaning of its mask could not be proved",
        "express the mask as causal, sliding window and padding terms, or pass is_causal=True",
    )
    MUTATED = (
        "something changes one of its operands in place while it is computed",
        "write the changed values to a new tensor, such as masked_fill instead of masked_fill_",
    )
    MASK_IS_INPUT = (
        "its mask is an input of the graph, made where this graph does not see it",
        "compile mask and attention in one graph (mmi_compile.compile does so), or pass is_causal=True",
    )
    UNKNOWN_OFFSET = (
        "its query rows could not be proved to stand at positions of its keys",
        "use a DynamicCache, or prefill a StaticCache from its start",
    )
    GRAD_ENABLED = (
        "gradients are enabled and an input requires them",
        "run under torch.no_grad() or torch.inference_mode()",
    )
    SCALE = (
        "its scale is not a positive number",
        "give its absolute value as the scale, and its sign to the queries",
    )
    DROPOUT = ("it drops out attention weights", "call model.eval(), or set the attention dropout to 0")
    WEIGHTS_USED = (
        "its attention weights are used elsewhere, so they must exist",
        "turn output_attentions off",
    )
    DTYPE = ("its dtype has no kernel", "use float16, bfloat16 or float32")
    HEAD_DIM = ("its head dimension has no kernel", "use a head dimension that is a multiple of 8, at most 256")
    SHAPE = ("its shapes are not [batch, heads, tokens, head dim]", "call attention on 4-D tensors")
    DEVICE = ("its device has no kernel", "run on CUDA, ROCm or the CPU")
    TRITON_MISSING = ("Triton is not installed, and this device needs it", "pip install triton")
    HEAD_CONFIG_MISFIT = (
        "the head config is for another model, so all heads run dense",
        "search a head config for this model, or give each tensor-parallel rank its slice (HeadConfig.slice)",
    )
    LAYER_UNKNOWN = (
        "which layer of the head config it is could not be told, so all heads run dense",
        "compile all decoder layers in one graph (mmi_compile.compile does), with a config that has as many",
    )
    GROUPED_MASK = (
        "its mask groups tokens (documents, chunks or blocks), so all heads run dense, with no pair beyond the mask",
        "nothing to do: patterns are for causal masks, with a window or padding",
    )
    SKIPPED = (
        "a pass that it needs was left out by the option skip_passes or passes_until",
        "remove the pass from skip_passes, or name it or a later one in passes_until",
    )
    PASS_FAILED = ("a pass raised an exception", "please report it with the text shown; the graph ran untouched")

    @property
    def message(self) -> str:
        return self.value[0]

    @property
    def mend(self) -> str:
        return self.value[1]

    @property
    def anchor(self) -> str:
        """Where the documentation says more: a heading of docs/reasons.md."""
        return f"docs/reasons.md#{self.name.lower()}"


NO_PREFILL = frozenset({Reason.BIDIRECTIONAL, Reason.DECODE, Reason.ONE_ROW})
"""Reasons of attentions that are no language model's prefill, which nobody expects to be rewritten."""

GROUPED_ATTENTION = "mmi::grouped_attention"
"""The operator that exact attention under such a mask runs as."""


@dataclass(frozen=True)
class Decision:
    """What became of one attention.

    Attributes:
        rewritten: the attention now runs as one of our operators.
        what: for a rewritten one, what it runs as, in words.
        reason: for one left alone, why; for a rewritten one that runs dense although the policy asks for more, why;
            else None.
        detail: the fact behind the reason, naming the node, dtype or size.
    """

    rewritten: bool
    what: str = ""
    reason: Reason | None = None
    detail: str = ""

    @property
    def fell_back(self) -> bool:
        """It does not get what the options ask for."""
        return self.reason is not None

    @property
    def is_grouped(self) -> bool:
        """It runs exactly under a mask that groups tokens, for which there are no patterns."""
        return self.rewritten and self.what.startswith(GROUPED_ATTENTION)

    @classmethod
    def left(cls, reason: Reason, detail: str = "") -> Decision:
        return cls(rewritten=False, reason=reason, detail=detail)

    def __str__(self) -> str:
        if self.reason is None:
            return f"rewritten: {self.what}" if self.rewritten else "undecided"
        why = self.reason.message + (f" ({self.detail})" if self.detail else "")
        return f"rewritten: {self.what}; {why}" if self.rewritten else f"left alone: {why}"


class MMIError(RuntimeError):
    """Raised under ``strict=True`` where the backend would otherwise fall back, and for requests it cannot serve."""
