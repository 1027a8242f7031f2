"""Which call of a compiled function is running now, told by the Python stack.

Graphs of one forward run at different times, between graph breaks, and nothing that ``torch.compile`` hands to a
backend says which of them belong together. The frame through which Dynamo was entered does: it lives exactly as long as
the call. A mark kept among that frame's locals ends with it, also after an exception, and keeps nothing alive.
"""

from __future__ import annotations

import sys
from types import FrameType

_MODULE = "torch._dynamo.eval_frame"
_MARK = "__mmi_compiled_call__"


class CompiledCall:
    """The identity of one call. Hold it by weak reference only: it dies when the call returns."""

    __slots__ = ("__weakref__",)


def enclosing_calls() -> list[CompiledCall]:
    """The calls of compiled functions that are running in this thread, the innermost first."""
    dynamo = sys.modules.get(_MODULE)
    entered = getattr(dynamo, "OptimizeContext", None)
    if dynamo is None or entered is None:
        return []
    calls = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename == dynamo.__file__ and "self" in frame.f_code.co_freevars:
            local = frame.f_locals
            # torch.compiler.disable enters through the same file, and its frame may outlive many forwards.
            if isinstance(local.get("self"), entered):
                calls.append(local.setdefault(_MARK, CompiledCall()))
        frame = frame.f_back
    return calls
