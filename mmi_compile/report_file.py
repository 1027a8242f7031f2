"""Reports that were saved as JSON: their schema, and reading them back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

from mmi_compile.decision import MMIError


@lru_cache(maxsize=1)
def report_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of ``Report.to_json()``; the package ships it as ``report.schema.json``."""
    text = resources.files("mmi_compile").joinpath("templates/report.schema.json").read_text(encoding="utf-8")
    schema: dict[str, Any] = json.loads(text)
    return schema


def load_report(path: str | Path) -> dict[str, Any]:
    """Read what ``Report.dumps()`` or ``mmi explain --json`` wrote.

    Raises:
        MMIError: there is no such file, it is no report, or it is one of another version of the format. The message
            is one sentence that names the mend.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise MMIError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise MMIError(f"{path}: is no JSON; give a file that `mmi explain --json` wrote") from None
    if not is_report(data):
        raise MMIError(f"{path}: is no report; give a file that `mmi explain --json` wrote")
    known = report_schema()["properties"]["schema"]["const"]
    if data["schema"] != known:
        writer = data.get("version", "of another version")
        raise MMIError(
            f"{path}: is a report of format {data['schema']!r}, written by mmi_compile {writer}, and this version "
            f"reads format {known}; explain the model again, or read it with the version that wrote it"
        )
    problem = _missing(data, report_schema())
    if problem:
        raise MMIError(f"{path}: is damaged: {problem}; explain the model again")
    report: dict[str, Any] = data
    return report


def is_report(data: Any) -> bool:
    """Whether JSON claims to be a report, of whatever version."""
    return isinstance(data, dict) and {"schema", "graphs", "summary"} <= data.keys()


_TYPES: Mapping[str, type | tuple[type, ...]] = {
    "object": dict, "array": list, "string": str, "boolean": bool, "integer": int, "number": (int, float),
    "null": type(None),
}  # fmt: skip


def _missing(value: Any, schema: Mapping[str, Any], place: str = "") -> str:
    """The first place where a value has not the type or the fields that the schema asks for; empty where all is well.
    Enough to be read safely; a validator of JSON Schema checks more."""
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kinds and not any(isinstance(value, _TYPES[kind]) for kind in kinds):
        return f"{place or 'the whole'} is no {' or '.join(kinds)}"
    if isinstance(value, dict):
        for name in schema.get("required", ()):
            if name not in value:
                return f"{place}.{name} is missing".lstrip(".")
        inner = schema.get("properties", {})
        found = (_missing(value[name], inner[name], f"{place}.{name}".lstrip(".")) for name in value if name in inner)
        return next(filter(None, found), "")
    if isinstance(value, list) and "items" in schema:
        return next(filter(None, (_missing(v, schema["items"], f"{place}[{i}]") for i, v in enumerate(value))), "")
    return ""


def saved_text(data: Mapping[str, Any]) -> str:
    """A saved report in a few lines: its summary, and each attention with its decision and mend."""
    lines = [f"mmi_compile {data['version']} · policy {data['options'].get('policy', '-')} · {data['summary']}"]
    lines += [f"of {data['subject']}"] if data.get("subject") else []
    for graph in data["graphs"]:
        if not graph["attentions"] and not graph["failure"]:
            continue
        lines += ["", f"graph {graph['key']} · {graph['nodes']['before']} → {graph['nodes']['after']} nodes"]
        lines += [f"    failed    {graph['failure']}"] if graph["failure"] else []
        for site in graph["attentions"]:
            layer = "" if site["layer"] is None else f"layer {site['layer']} · "
            lines.append(f"  ● {layer}{site['where'] or 'attention'}: {site['decision']}")
            lines += [f"    mend      {site['mend']}  [{site['anchor']}]"] if site["mend"] else []
            if site["run"]:
                run = site["run"]
                lines.append(f"    last run  {run['q_len']} × {run['kv_len']} tokens · density {run['density']:.1%}")
    for limit in data.get("limits", ()):  # a report of an older version has none
        lines += ["", f"{limit['place']}: {limit['limit']} {limit['value']} reached", f"    mend      {limit['mend']}"]
    return "\n".join(lines)
