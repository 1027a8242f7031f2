"""The HTML page of a report: one file, nothing from the network, everything that the report knows."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from itertools import groupby
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mmi_compile
from mmi_compile import report_html
from mmi_compile.passes import PIPELINE
from mmi_compile.report_html import render_html
from tests import families, models
from tests.test_report import OPTIONS, assert_golden, tiny

pytestmark = pytest.mark.fresh_dynamo

GOLDEN_SKELETON = "report_skeleton.txt"
_VOID = {"meta", "br", "link", "img", "hr", "input"}


class Page(HTMLParser):
    """Checks that tags nest; collects text, titles of coloured cells and links."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.titles: list[str] = []
        self.links: list[str] = []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in _VOID:
            self.open.append(tag)
        given = dict(attrs)
        self.titles += [value for name, value in given.items() if name == "title" and value]
        self.links += [value for name, value in given.items() if name in ("src", "href") and value]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


@pytest.fixture(scope="module", autouse=True)
def _no_kernels() -> Iterator[None]:
    """Pages show the kernels that this process has loaded, which depends on the tests before."""
    loaded = {name: sys.modules.pop(name) for name in list(sys.modules) if name.startswith("mmi_compile_kernel_")}
    yield
    sys.modules.update(loaded)


@pytest.fixture(scope="module")
def page() -> str:
    example = families.vision("qwen2_5_vl", shape=models.Shape(layers=2, heads=4, kv_heads=2))
    report = mmi_compile.explain(example.model, options={"min_tokens": 0, "recall": 0.5}, **example.inputs)
    return render_html(report)


def test_the_page_is_whole_and_needs_no_network(page: str) -> None:
    read = Page(page)
    assert not read.links
    # The name of SVG's namespace is looked up nowhere.
    assert not re.search(r"https?://|@import|url\(", page.replace("http://www.w3.org/2000/svg", ""))
    assert page.count("<section>") >= 3


def test_it_tells_what_the_report_knows(page: str) -> None:
    words = Page(page).words()
    assert "2 of " in words
    assert "attentions rewritten" in words
    assert "left alone: it attends in both directions" in words
    assert "mend: " in words
    assert "mm_token_type_ids" in words  # where modality was learned
    assert "video" in words
    assert "causal and padding" in words
    assert torch.__version__ in words


def test_graphs_that_were_changed_come_first(page: str) -> None:
    words = Page(page).words()
    assert words.index("causal and padding") < words.index("Graphs in which nothing was rewritten")
    assert words.count("Graphs in which nothing was rewritten") == 1


def test_every_head_and_run_has_a_cell(page: str) -> None:
    titles = Page(page).titles
    assert sum(title.startswith("head ") for title in titles) == 2 * 4
    assert any(title.startswith("video × ") for title in titles)


def test_names_of_the_user_are_escaped() -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)

    holder = nn.ModuleDict({"<b>": Odd()})

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = holder

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.parts["<b>"](x)
            return result

    report = mmi_compile.explain(Model(), torch.randn(1, 2, 40, 16))
    page = render_html(report)
    assert "<b>'" not in page
    Page(page)


def test_long_prompts_become_few_stretches() -> None:
    from mmi_compile.report_html import _strip

    runs = [["text", 6], ["video", 256]] * 5000
    strip = list(_strip(runs, {"text": 0, "video": 2}))
    assert len(strip) <= 400
    assert sum(part["length"] for part in strip) == 5000 * 262
    assert {part["colour"] for part in strip} == {2}


class Skeleton(HTMLParser):
    """Tags with their ids, classes and labels as a tree, without text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.root: list[tuple[str, list[object]]] = []
        self.open: list[list[object]] = [self.root]  # type: ignore[list-item]
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        told = [f"{name}={value}" for name, value in attrs if name in ("id", "class", "role", "data-label", "open")]
        inner: list[object] = []
        self.open[-1].append((" ".join([tag, *told]), inner))
        if tag not in _VOID:
            self.open.append(inner)

    def handle_endtag(self, tag: str) -> None:
        self.open.pop()

    def lines(self) -> list[str]:
        return list(_skeleton(self.root, 0))


def _skeleton(parts: list[Any], depth: int) -> Iterator[str]:
    """One line a tag; neighbours that are alike stand once, and what depends on versions of PyTorch not at all."""
    for (name, inner), group in groupby(parts):
        times = " ×" if len(list(group)) > 1 else ""
        volatile = name.startswith(("pre", "svg", "details class=pass", "details class=whole"))
        yield f"{'  ' * depth}{name}{times}{' …' if volatile and inner else ''}"
        if not volatile:
            yield from _skeleton(inner, depth + 1)


def test_golden_skeleton() -> None:
    model, inputs = tiny()
    report = mmi_compile.explain(model, options=OPTIONS, **inputs)
    assert_golden(GOLDEN_SKELETON, "\n".join(Skeleton(render_html(report)).lines()) + "\n")


def test_every_pass_has_its_diff_and_the_graph_its_picture(page: str) -> None:
    assert page.count('<details class="pass">') == len(PIPELINE)
    words = Page(page).words()
    for step in PIPELINE:
        assert re.search(rf"Pass {step.name} · ", words)
    assert "All passes together" in words
    assert '<span class="add">+' in page
    assert '<span class="cut">-' in page
    assert page.count('<svg xmlns="http://www.w3.org/2000/svg"') >= 2
    assert "None was loaded in this process" in words
    assert "docs/reasons.md#bidirectional" in words


def test_passes_that_cannot_run_again_are_no_reason_for_no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = tiny()
    report = mmi_compile.explain(model, options=OPTIONS, **inputs)

    def broken(graph: object) -> None:
        raise RuntimeError("gone\nsince")

    monkeypatch.setattr(report_html, "steps", broken)
    assert "since the passes could not run again: RuntimeError: gone " in Page(render_html(report)).words()


def test_kernels_that_were_loaded_are_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "attention_abc.py").write_text("x = 1 < 2  # & so on")
    module = ModuleType("mmi_compile_kernel_abc")
    module.__file__ = str(tmp_path / "attention_abc.py")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    page = render_html(mmi_compile.Report([]))
    assert "x = 1 &lt; 2  # &amp; so on" in page
    assert "attention_abc.py" in Page(page).words()


def test_a_report_without_attention() -> None:
    report = mmi_compile.explain(nn.Linear(4, 4), torch.randn(2, 4))
    assert "No attention was found" in Page(render_html(report)).words()
