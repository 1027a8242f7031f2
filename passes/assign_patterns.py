"""Give every prefill attention its sparse pattern, as far as it can be known before the input is."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from mmi_compile.passes.base import PassContext


@dataclass(frozen=True)
class AssignPatterns:
    """``exact`` keeps every pair the model's own mask allows; ``adaptive`` lets the probe choose at run time, per
    head and input, the cheapest pattern that reaches the recall target (paper, section 3.2)."""

    name: str = "assign_patterns"

    def run(self, gm: fx.GraphModule, context: PassContext) -> None:
        options = context.options
        for site in context.open_sites():
            if options.policy == "exact":
                site.pattern = "dense"
            else:
                site.pattern = f"adaptive(recall {options.recall:g})"
