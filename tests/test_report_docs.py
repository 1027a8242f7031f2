"""Generated pages are up to date, and every reason has what its reader needs."""

from __future__ import annotations

import re

import pytest

from mmi_compile.decision import Decision, Reason
from tests import report_docs
from tests.report_docs import DOCS, PAGES, WHY


@pytest.mark.parametrize("name", PAGES)
def test_pages_are_what_the_code_says(name: str) -> None:
    text = (DOCS / name).read_text(encoding="utf-8")
    assert text == PAGES[name](), f"docs/{name} is out of date; run: python -m tests.report_docs --write"


@pytest.mark.parametrize("reason", Reason, ids=lambda reason: reason.name)
def test_every_reason_has_a_message_a_mend_and_an_anchor(reason: Reason) -> None:
    assert reason.message
    assert reason.mend
    assert not reason.message.endswith(".")
    assert not reason.mend.endswith(".")
    assert WHY[reason].strip().endswith(".")
    page, _, anchor = reason.anchor.partition("#")
    headings = re.findall(r"^## (.*)$", (DOCS.parent / page).read_text(encoding="utf-8"), re.MULTILINE)
    # GitHub's anchor of a heading of one word is that word in lower case.
    assert headings.count(anchor) == 1
    assert re.fullmatch(r"[a-z_]+", anchor)
    assert str(Decision.left(reason)).endswith(reason.message)


def test_every_field_of_the_schema_is_on_the_page() -> None:
    page = report_docs.report_page()

    def fields(schema: dict[str, object]) -> list[str]:
        found = list(schema.get("properties", {}))  # type: ignore[call-overload]
        for part in [*schema.get("properties", {}).values(), schema.get("items")]:  # type: ignore[attr-defined]
            found += fields(part) if isinstance(part, dict) else []
        return found

    names = fields(report_docs.report_schema())
    assert len(names) > 60
    assert all(f"| `{name}` |" in page for name in names)
