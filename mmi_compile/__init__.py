"""MMInference as a ``torch.compile`` backend: sparse prefill for long-context vision-language models.

::

    model = torch.compile(model, backend="mminference")          # no import needed
    model = mmi_compile.compile(model)                           # Hugging Face models, also for model.generate
    print(mmi_compile.explain(model, **inputs))                  # what would happen to each attention, and why

Importing this package imports neither Triton nor transformers; every name below is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_LOCATIONS = {
    "compile": "frontend",
    "explain": "frontend",
    "last_report": "backend",
    "modality": "record",
    "HeadConfig": "head_config",
    "MMIError": "decision",
    "Decision": "decision",
    "Reason": "decision",
    "Options": "options",
    "OwnPattern": "kernels.patterns",
    "OptionError": "options",
    "Report": "report",
    "register_pattern": "kernels.patterns",
    "search": "model_search",
}

__all__ = [
    "Decision",
    "HeadConfig",
    "MMIError",
    "OptionError",
    "Options",
    "OwnPattern",
    "Reason",
    "Report",
    "__version__",
    "compile",
    "explain",
    "last_report",
    "modality",
    "register_pattern",
    "search",
]

if TYPE_CHECKING:
    from mmi_compile.backend import last_report
    from mmi_compile.decision import Decision, MMIError, Reason
    from mmi_compile.frontend import compile, explain
    from mmi_compile.head_config import HeadConfig
    from mmi_compile.kernels.patterns import OwnPattern, register_pattern
    from mmi_compile.model_search import search
    from mmi_compile.options import OptionError, Options
    from mmi_compile.record import modality
    from mmi_compile.report import Report


def __getattr__(name: str) -> Any:
    if name not in _LOCATIONS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_LOCATIONS[name]}"), name)
    globals()[name] = value
    return value
