"""``python -m mmi_compile``: the command ``mmi``."""

from __future__ import annotations

from mmi_compile.cli import run

run()
