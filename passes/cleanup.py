"""Remove what only the old attention needed: masks, expanded heads, N×N scores."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from mmi_compile.passes.base import PassContext
from mmi_compile.passes.dataflow import erase_dead
from mmi_compile.passes.flex import erase_dead_block_masks


@dataclass(frozen=True)
class Cleanup:
    """Erase pure nodes in the cones of rewritten attentions that nothing reads any more, then check the graph.

    Nothing outside those cones is touched: an unused in-place call may still matter to someone.
    """

    name: str = "cleanup"

    def run(self, gm: fx.GraphModule, context: PassContext) -> None:
        erase_dead(gm.graph, context.dead_candidates)
        if any(site.form == "flex" and not site.open for site in context.sites):
            erase_dead_block_masks(gm.graph)
            erase_dead(gm.graph, context.dead_candidates)
        gm.graph.lint()
        gm.recompile()
