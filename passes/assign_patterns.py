"""Give every prefill attention its sparse pattern, as far as it can be known before the input is."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from itertools import pairwise

from torch import fx

from mmi_compile.decision import NO_PREFILL, Reason
from mmi_compile.head_config import Fingerprint, HeadConfig
from mmi_compile.passes.base import AttentionSite, PassContext
from mmi_compile.passes.layer_index import layer_indices
from mmi_compile.passes.nodes import tensor_of


@dataclass(frozen=True)
class AssignPatterns:
    """``exact`` keeps every pair the model's own mask allows; ``adaptive`` lets the probe choose at run time, per
    head and input, the cheapest pattern that reaches the recall target (paper, section 3.2); ``config`` gives each
    head the pattern that a search chose for it (section 3.3).

    A head config fits a graph when the shapes of its attentions are those of the config's model, each attention is
    known to be a certain one of its layers, and the last one is among them. What does not fit keeps its mask and runs
    dense, with a reason. So does attention whose mask groups tokens: patterns know causality, windows and padding.
    """

    name: str = "assign_patterns"

    def run(self, gm: fx.GraphModule, context: PassContext) -> None:
        options = context.options
        if options.policy == "config":
            assert options.head_config is not None, "checked by the options"
            _assign_config(gm, options.head_config, context)
        else:
            sites = context.open_sites()
            for site, index in zip(sites, layer_indices(sites), strict=True):
                site.policy, site.index = options.policy, index
                site.pattern = "dense" if options.policy == "exact" else f"adaptive(recall {options.recall:g})"
        for site in context.open_sites():
            if site.mask_fact is not None and site.mask_fact.clauses and site.policy != "exact":
                site.heads = None
                _fall_back(site, Reason.GROUPED_MASK, "")


def _assign_config(gm: fx.GraphModule, config: HeadConfig, context: PassContext) -> None:
    decoder: list[AttentionSite] = []
    for site in context.sites:
        if site.decision is not None and site.decision.reason in NO_PREFILL:
            continue
        misfit = _misfit(site, config.fingerprint)
        if not misfit:
            decoder.append(site)
        elif site.open:
            _fall_back(site, Reason.HEAD_CONFIG_MISFIT, misfit)
    layers = config.fingerprint.layers
    _number(gm, decoder, layers)
    seen = 1 + max((site.index for site in decoder if site.index is not None), default=-1)
    for site in decoder:
        if not site.open:
            continue
        if seen > layers:
            model = dataclasses.replace(config.fingerprint, layers=seen)
            _fall_back(site, Reason.HEAD_CONFIG_MISFIT, config.fingerprint.mismatch(model) or "")
        elif site.index is None or seen < layers:
            _fall_back(site, Reason.LAYER_UNKNOWN, _no_index(site, len(decoder), layers))
        else:
            site.policy, site.heads = "config", config.heads_of(site.index)
            site.pattern = f"config layer {site.index} ({config.describe_layer(site.index)})"


def _fall_back(site: AttentionSite, reason: Reason, detail: str) -> None:
    site.policy, site.pattern, site.fallback = "exact", "dense", (reason, detail)


def _number(gm: fx.GraphModule, decoder: list[AttentionSite], layers: int) -> None:
    """Number the attentions by their modules, or by their order where the graph holds all layers of the config.

    A config counts layers with attention: where a model has other layers in between, the numbers of modules skip some.
    Order does not count where only some modules have a number, or where these do not ascend.
    """
    indices = layer_indices(decoder)
    known = [index for index in indices if index is not None]
    if len(decoder) == layers and len(known) in (0, layers):
        order = {node: i for i, node in enumerate(gm.graph.nodes)}
        places = sorted(range(layers), key=lambda i: order[decoder[i].node])
        if not known or all(known[a] < known[b] for a, b in pairwise(places)):
            for rank, place in enumerate(places):
                indices[place] = rank
    for site, index in zip(decoder, indices, strict=True):
        site.index = index


def _misfit(site: AttentionSite, config: Fingerprint) -> str:
    """In what the attention differs from those of the config's model; empty where it does not."""
    q, k = tensor_of(site.q), tensor_of(site.k)
    if q is None or k is None or q.dim() != 4 or k.dim() != 4:
        return "its shapes are not known"
    sizes = (q.shape[1], k.shape[1], q.shape[3])
    if not all(isinstance(size, int) or size.node.has_hint() for size in sizes):
        return f"heads and head dim {sizes} depend on data"
    # Which heads there are decides what runs: a symbol among them is taken as the constant it is for this model.
    q_heads, kv_heads, head_dim = (int(size) for size in sizes)
    found = {"q_heads": q_heads, "kv_heads": kv_heads, "head_dim": head_dim}
    return "; ".join(
        f"{name} is {getattr(config, name)} in the config and {size} in the model"
        for name, size in found.items()
        if getattr(config, name) != size
    )


def _no_index(site: AttentionSite, attentions: int, layers: int) -> str:
    # A part of a model that is compiled on its own counts from 0 again, and one graph may then serve several parts.
    where = f"the graph ends before layer {layers - 1}"
    if site.index is None:
        where = f"the path {site.where!r} does not tell it" if site.where else "the graph names no modules"
    return f"{where}, and {layers} layers have {attentions} attentions in this graph"
