"""Prove what each attention's mask means, so that it need never be built."""

from __future__ import annotations

from dataclasses import dataclass

import sympy
from torch import fx

from mmi_compile.passes.base import AttentionSite, PassContext
from mmi_compile.passes.mask_algebra import Prover, Size
from mmi_compile.passes.mask_fact import MaskFact
from mmi_compile.passes.nodes import tensor_of


@dataclass(frozen=True)
class ProveMask:
    """Attach a :class:`MaskFact` to every open site. Layers share mask nodes, so each mask is proved once.

    ::

        mask = (kv_arange <= q_arange) & attention_mask.bool()[b, kv]
        → MaskFact(causal=True, offset=0, padding=attention_mask.bool())
    """

    name: str = "prove_mask"

    def run(self, gm: fx.GraphModule, context: PassContext) -> None:
        prover = Prover()
        proved: dict[tuple[object, ...], MaskFact] = {}
        # In graph order: what is proved of a site then names only nodes that come before it.
        position = {node: i for i, node in enumerate(gm.graph.nodes)}
        for site in sorted(context.open_sites(), key=lambda site: position[site.node]):
            key = (site.mask, site.is_causal, str(_sizes(site)))  # a SymInt cannot be hashed
            if key not in proved:
                proved[key] = _prove(site, prover)
            site.mask_fact = proved[key]


def _sizes(site: AttentionSite) -> tuple[Size, Size, Size]:
    """Batch, query rows and keys."""
    q, k = tensor_of(site.q), tensor_of(site.k)
    if q is None or k is None:
        raise TypeError(f"`{site.node.name}` has operands without a traced value, which find_attention leaves alone")
    return q.shape[0], q.shape[2], k.shape[2]


def _prove(site: AttentionSite, prover: Prover) -> MaskFact:
    batch, q_len, kv_len = _sizes(site)
    if site.mask is None:
        # SDPA aligns is_causal to the top left: row 0 sees key 0 only, whatever kv_len is.
        expression = "j <= i" if site.is_causal else "True"
        return MaskFact(known=True, causal=site.is_causal, offset=sympy.Integer(0), expression=expression)
    if site.is_causal:
        return MaskFact(known=False, detail="is_causal=True and attn_mask are both given")
    if not isinstance(site.mask, fx.Node):
        return MaskFact(known=False, detail=f"attn_mask is {site.mask!r}")
    return prover.prove(site.mask, q_len=q_len, kv_len=kv_len, batch=batch)
