"""The pages of docs/: their code runs, their links lead somewhere, and what is generated is up to date.

A block that is not to run says so after its language: ``` ```python no-run ```.
"""

from __future__ import annotations

import re
import runpy
import sys
import types
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from mmi_compile import Options, Reason
from mmi_compile.kernels import patterns as patterns_module
from mmi_compile.passes import PIPELINE

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(path.name for path in DOCS.glob("*.md"))
BLOCK = re.compile(r"^```python([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: str) -> list[tuple[int, str]]:
    """Line and text of every block that runs."""
    text = (DOCS / page).read_text(encoding="utf-8")
    found = []
    for match in BLOCK.finditer(text):
        assert match[1] in ("", " no-run"), f"{page}: unknown mark {match[1]!r}"
        if not match[1]:
            found.append((text.count("\n", 0, match.start(2)), match[2]))
    return found


def test_pages_have_code() -> None:
    assert sum(len(blocks(page)) for page in PAGES) >= 6


@pytest.mark.fresh_dynamo
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)])
def test_code_blocks_run(page: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """All blocks of a page in one namespace, in order; errors show the page and its line."""
    monkeypatch.setattr(patterns_module, "_KINDS", dict(patterns_module._KINDS))
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    module = types.ModuleType("docs_page")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # dataclasses look their module up
    for line, code in blocks(page):
        exec(compile("\n" * line + code, str(DOCS / page), "exec", dont_inherit=True), vars(module))


@pytest.mark.parametrize("reason", Reason)
def test_the_limits_list_every_reason(reason: Reason) -> None:
    assert f"`{reason.name.lower()}`" in (DOCS / "limits.md").read_text(encoding="utf-8")


def anchors(text: str) -> set[str]:
    """Anchors of headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", ["examples/README.md", *(f"docs/{page}" for page in PAGES)])
def test_links_lead_somewhere(page: str) -> None:
    path = ROOT / page
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        other = (path.parent / name).resolve() if name else path
        assert other.exists(), f"{page} links to {target}"
        if anchor:
            assert anchor in anchors(other.read_text(encoding="utf-8")), f"{page} links to {target}"


def test_the_index_names_every_page() -> None:
    linked = set(re.findall(r"\]\((\w[\w-]*\.md)\)", (DOCS / "index.md").read_text(encoding="utf-8")))
    assert linked == set(PAGES) - {"index.md"}


def test_the_options_page_is_what_the_code_says() -> None:
    made = runpy.run_path(str(DOCS / "write_options.py"))["page"]()
    written = (DOCS / "options.md").read_text(encoding="utf-8")
    assert written == made, "run python docs/write_options.py"
    for item in fields(Options):
        assert f"## `{item.name}`\n" in written


def test_the_plot_of_the_experiments_reads_their_tables() -> None:
    plot = runpy.run_path(str(DOCS / "plot_experiments.py"))
    pages = list(plot["tables"]((DOCS / "experiments.md").read_text(encoding="utf-8")))
    for points in (plot["needles"](pages), plot["perplexities"](pages[-1])):
        assert len(points) >= 4
        assert all(len(of_method) >= 2 for of_method in points.values())
        assert all(0 < density < 100 for of_method in points.values() for density, _ in of_method)


def test_the_pages_know_every_pass_and_pattern() -> None:
    passes = (DOCS / "adding-a-pass.md").read_text(encoding="utf-8")
    order = " → ".join(step.name for step in PIPELINE)
    assert order in re.sub(r"\s+", " ", passes)
    concepts = (DOCS / "concepts.md").read_text(encoding="utf-8")
    for name in patterns_module._BUILT_IN:
        assert re.search(rf"^\| `{name}\b", concepts, re.MULTILINE), f"concepts.md lacks {name}"


@pytest.mark.parametrize("page", PAGES)
def test_paths_that_pages_name_exist(page: str) -> None:
    text = (DOCS / page).read_text(encoding="utf-8")
    for name in re.findall(r"`((?:passes|kernels|mmi_compile|tests|docs|examples)/[\w/]+\.\w+)`", text):
        if name != "passes/need_heads.py":  # the example of adding-a-pass.md
            assert (ROOT / name).exists(), f"{page} names {name}"
