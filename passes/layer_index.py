"""Which decoder layer an attention is, by the place of its module: facts of the graph, never names of classes."""

from __future__ import annotations

from collections.abc import Sequence

from mmi_compile.passes.base import AttentionSite

_Place = tuple[str, ...]


def layer_indices(sites: Sequence[AttentionSite]) -> list[int | None]:
    """The number of each attention's layer among its like; None where paths leave a doubt.

    Modules of layers stand in a list, so that their paths differ in one number: ``layers.0.self_attn``,
    ``layers.1.self_attn``. The list is that whose numbers differ between the attentions. Where it is the only list
    on the path, one attention is enough (graphs may break between layers).

    There is a doubt where two numbers differ (lists of lists), where attentions stand in different lists (two
    decoders), or where two modules of one layer attend (self and cross attention).
    """
    paths = [tuple(site.where.split(".")) for site in sites]
    lists = [_list_of(path, paths) for path in paths]
    if len({place for place in lists if place is not None}) > 1:
        return [None] * len(sites)
    modules: dict[int, set[_Place]] = {}
    found: list[int | None] = []
    for path, place in zip(paths, lists, strict=True):
        index = None if place is None else int(path[len(place)])
        found.append(index)
        if index is not None:
            modules.setdefault(index, set()).add(path)
    return [index if index is not None and len(modules[index]) == 1 else None for index in found]


def _list_of(path: _Place, paths: Sequence[_Place]) -> _Place | None:
    """The path of the list of layers on ``path``."""
    lists = [path[:at] for at, part in enumerate(path) if part.isdecimal()]
    if len(lists) == 1:
        return lists[0]
    varying = [place for place in lists if len({p[len(place)] for p in paths if _is_in(p, place)}) > 1]
    return varying[0] if len(varying) == 1 else None


def _is_in(path: _Place, place: _Place) -> bool:
    return len(path) > len(place) and path[: len(place)] == place and path[len(place)].isdecimal()
