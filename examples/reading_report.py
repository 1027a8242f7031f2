"""Reading a report: what was found, what became of it and why, what ran, and how far it was from exact.

    python examples/reading_report.py                 # some ten seconds on a CPU
    python examples/reading_report.py --keep report   # keeps the JSON, the page and the graphs in a folder

``mmi_compile.explain(model, **inputs)`` gives a report before anything is compiled; ``mmi_compile.last_report()`` gives
one of what was compiled in this process, with what its heads did when they last ran.
"""

from __future__ import annotations

import argparse
import difflib
import json
import tempfile
from pathlib import Path

import torch
from search_heads import build_model, build_prompt
from torch._dynamo.utils import counters

import mmi_compile
from mmi_compile import Report


def by_attention(report: Report) -> None:
    """The facts of every attention that was found at compile time."""
    for site in report.sites:
        print(f"  {site.where}, written as {site.form}, {site.phase}")
        print(f"    its mask means      {site.mask}")
        print(f"    which was proved of {site.expression}")
        print(f"    decision            {site.decision}")
        decision = site.decision
        assert decision is not None
        assert decision.rewritten  # otherwise decision.reason has a message and a mend


def by_head(report: Report) -> float:
    """What ran last, and the least recall of a head that the guard saw."""
    least = 1.0
    for site, run in report.runs():
        print(f"  {site.where}: {run['path']}, {run['density']:.0%} of the dense tiles, call {run['calls']}")
        guard = run["guard"]
        for head, pattern in enumerate(run["patterns"][0]):
            recall, error = guard["recall_per_head"][head], guard["error_per_head"][head]
            print(f"    head {head}: {pattern}\n{'':12}on {guard['rows']} rows: recall {recall:.3f}, error {error:.1e}")
            least = min(least, recall)
    return least


def changed_lines(report: Report) -> list[str]:
    """What the passes did to the graph."""
    before, after = report.code(before=True).splitlines(), report.code().splitlines()
    return list(difflib.unified_diff(before, after, "captured", "rewritten", n=0, lineterm=""))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--keep", type=Path, help="folder for what is written")
    given = parser.parse_args()
    model, prompt = build_model(), build_prompt(0)

    report = mmi_compile.explain(model, **prompt, use_cache=False)
    print(f"before: {report.summary()}")
    by_attention(report)
    changes = changed_lines(report)
    removed, added = (sum(line.startswith(sign) for line in changes) for sign in "-+")
    call = next(line for line in changes if line.startswith("+") and "mmi.attention" in line)
    print(f"\n  {removed} lines of the graph removed, {added} added, among them\n  {call.strip()[:110]}…")

    with tempfile.TemporaryDirectory() as temporary:
        folder = given.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        # verify=1.0 compares every call with exact attention on some rows; in production 0.02 is enough.
        mmi_compile.compile(model, verify=1.0, min_tokens=0, inner="eager", strict=True, dump=folder / "graphs")
        with torch.inference_mode():
            model(**prompt, use_cache=False)
        report = mmi_compile.last_report()
        assert report is not None
        print(f"\nafter: {report.summary()}")
        least = by_head(report)

        (folder / "report.json").write_text(report.dumps())
        (folder / "report.html").write_text(report.html())  # one page, which needs no network
        read = json.loads((folder / "report.json").read_text())
        print("\nfiles")
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            print(f"  {path.relative_to(folder)}  {path.stat().st_size:,} bytes")
        graphs = [path.stem for path in (folder / "graphs").rglob("*.py")]
    print(f'\nthe JSON report has schema {read["schema"]}; counters["mmi"] is {dict(counters["mmi"])}')

    assert read["graphs"][0]["attentions"][0]["rewritten"] is True
    assert any("rewrite" in name for name in graphs)
    assert least > 0.5


if __name__ == "__main__":
    main()
