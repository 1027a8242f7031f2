"""Pictures of graphs: what is drawn, where, and that nothing of the user's is taken for markup."""

from __future__ import annotations

from itertools import combinations
from xml.etree import ElementTree

import networkx as nx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import mmi_compile
from mmi_compile import report_graph, report_svg
from mmi_compile.report import Report
from mmi_compile.report_graph import BOX_HEIGHT, BOX_WIDTH, Box, Edge, Picture, picture
from tests import models
from tests.test_report import OPTIONS, tiny

pytestmark = pytest.mark.fresh_dynamo


def check(found: Picture) -> None:
    """Boxes do not overlap and lie inside; edges join boxes, downwards."""
    for box in found.boxes:
        assert BOX_WIDTH / 2 - 0.1 <= box.x <= found.width - BOX_WIDTH / 2 + 0.1
        assert BOX_HEIGHT / 2 <= box.y <= found.height - BOX_HEIGHT / 2
    for a, b in combinations(found.boxes, 2):
        assert abs(a.x - b.x) >= BOX_WIDTH or abs(a.y - b.y) >= BOX_HEIGHT
    known = {box.key: box for box in found.boxes}
    for edge in found.edges:
        heights = [y for _, y in edge.points]
        assert heights == sorted(heights)
        assert edge.points[0][0] == known[edge.start].x
        assert edge.points[-1][0] == known[edge.stop].x


def named(found: Picture, kind: str, state: str) -> list[str]:
    return [box.label for box in found.boxes if (box.kind, box.state) == (kind, state)]


def test_what_the_passes_did_is_drawn() -> None:
    model, inputs = tiny()
    (graph,) = mmi_compile.explain(model, options=OPTIONS, **inputs).graphs
    found = picture(graph)
    assert found is not None
    check(found)
    assert found == picture(graph)
    # Two of three layers are alike and drawn once; the encoder and the layer with another mask were left alone.
    assert named(found, "attention", "new") == ["mmi::attention"]
    assert named(found, "attention", "died") == ["sdpa"]
    assert named(found, "attention", "kept") == ["sdpa", "sdpa"]
    assert "mmi::key_bounds" in named(found, "mask", "new")
    assert {"mmi::modality", "mmi::begin_prompt"} == set(named(found, "modality", "new"))
    assert "eq" in named(found, "modality", "kept")
    assert "le" in named(found, "mask", "kept")  # the third layer still needs it
    (rewritten,) = [box for box in found.boxes if box.label == "mmi::attention"]
    assert rewritten.detail == "layer 0 · × 2 alike"
    assert "rewritten: mmi::attention, dense, causal and padding" in rewritten.title
    assert any(edge.died and edge.stop == rewritten.key for edge in found.edges) is False


def test_masks_that_died_are_dashed() -> None:
    model, inputs = models.build("qwen2", batch=2, padding="left", shape=models.Shape(layers=2))
    report = mmi_compile.explain(model, options=OPTIONS, **inputs)
    found = picture(report.graphs[0])
    assert found is not None
    check(found)
    assert {"arange", "le", "expand"} <= set(named(found, "mask", "died"))
    assert "expand" in named(found, "operand", "died")  # key heads that were repeated
    svg = report.svg()
    assert '<g class="mask died">' in svg
    assert '<path class="died"' in svg
    assert report.svg() == svg


def test_thirty_layers_are_drawn_as_one() -> None:
    counts = []
    for layers in (2, 30):
        model, inputs = models.build("qwen2", shape=models.Shape(layers=layers))
        (graph,) = mmi_compile.explain(model, options=OPTIONS, **inputs).graphs
        found = picture(graph)
        assert found is not None
        counts.append(len(found.boxes))
        assert any(box.detail.endswith(f"× {layers} alike") for box in found.boxes)
        rest = sum(int(box.label.split()[0]) for box in found.boxes if box.kind == "rest")
        assert rest + sum(box.kind != "rest" for box in found.boxes) >= graph.nodes_before
    assert counts[0] == counts[1] < 50


def test_sorts_of_attention_that_are_not_drawn_are_counted() -> None:
    class Mixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            n = x.shape[2]
            position = torch.arange(n)
            distance = position[:, None] - position[None, :]
            for window in range(2, 8):
                mask = (distance >= 0) & (distance < window)
                x = x + nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=mask)
            return x

    report = mmi_compile.explain(Mixed(), torch.randn(1, 2, 40, 16), options=OPTIONS)
    assert len(report.rewritten) == 6
    found = picture(report.graphs[0])
    assert found is not None
    check(found)
    assert found.notes == ["3 attentions of 3 other sorts are not drawn"]
    assert found.notes[0] in report.svg()


def test_what_is_not_rewritten_is_drawn_as_it_is() -> None:
    model, inputs = tiny()
    report = mmi_compile.explain(model, options={**OPTIONS, "passes_until": "classify_phase"}, **inputs)
    found = picture(report.graphs[0])
    assert found is not None
    check(found)
    assert {box.state for box in found.boxes} == {"kept"}


def test_svg_is_xml_and_names_are_escaped() -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleDict({"<b>&": Odd()})

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.parts["<b>&"](x)
            return result

    svg = mmi_compile.explain(Model(), torch.randn(1, 2, 40, 16), options=OPTIONS).svg()
    assert "<b>" not in svg
    assert ElementTree.fromstring(svg).tag == "{http://www.w3.org/2000/svg}svg"
    assert "url(" not in svg
    assert "href" not in svg


def test_without_attention_it_says_so() -> None:
    assert "No attention was found in any graph." in mmi_compile.explain(nn.Linear(4, 4), torch.randn(2, 4)).svg()
    assert ElementTree.fromstring(Report([]).svg()) is not None


def test_of_very_many_graphs_some_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = tiny()
    (graph,) = mmi_compile.explain(model, options=OPTIONS, **inputs).graphs
    svg = Report([graph] * (report_svg.MOST_GRAPHS + 3)).svg()
    assert svg.count(f"graph {graph.key}: ") == report_svg.MOST_GRAPHS
    assert "3 more graphs with attention are not drawn" in svg


@given(st.data())
def test_any_graph_is_laid_out_without_overlap(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 14))
    pairs = data.draw(st.sets(st.tuples(st.integers(0, count - 1), st.integers(0, count - 1)), max_size=30))
    boxes = {str(i): Box(str(i), str(i), "", "", "operand", "kept") for i in range(count)}
    edges = [Edge(str(a), str(b), False) for a, b in sorted(pairs) if a < b]
    found = report_graph._laid_out(boxes, edges, [])
    check(found)
    assert nx.is_directed_acyclic_graph(nx.DiGraph((edge.start, edge.stop) for edge in found.edges))
    assert report_graph._laid_out(boxes, edges, []) == found
