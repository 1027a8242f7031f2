"""Models that Dynamo has stopped compiling: noticed, told with the mend, and put off where this package may.

Dynamo compiles a function anew for what its guards have not met, and stops after a number of versions
(``torch._dynamo.config.recompile_limit``). What is new then runs as plain PyTorch, dense and slow, with one line in
Dynamo's log; under ``fullgraph=True`` it raises. Neither the backend nor a report would hear of it.
"""

from __future__ import annotations

import inspect
import logging
import re
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch._guards import CompileContext

VERSIONS = 64
"""Versions of a language model that :func:`mmi_compile.compile` allows: kinds of prompts, chunks, decode steps, caches,
batch sizes, and what Dynamo specialises before it makes a size a symbol. PyTorch allows 8."""

log = logging.getLogger("mmi_compile")


@dataclass(frozen=True)
class LimitReached:
    """A function of which Dynamo compiles no further version.

    Attributes:
        place: where it is defined, as ``file.py:line in function``.
        limit: the setting of ``torch._dynamo.config`` that was reached. value: what it stood at.
        reason: the guard that failed last, in one line; empty where Dynamo names none.
    """

    place: str
    limit: str
    value: int
    reason: str = ""

    @property
    def mend(self) -> str:
        """What to do about it."""
        return (
            f"compile with dynamic=True, or raise torch._dynamo.config.{self.limit} before compiling;"
            ' TORCH_LOGS="recompiles" says what changed each time'
        )

    def __str__(self) -> str:
        return (
            f"{self.place}: Dynamo's {self.limit} of {self.value} is reached. No further version is compiled: what is"
            " new runs without this backend, or raises under fullgraph=True"
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "place": self.place, "limit": self.limit, "value": self.value, "reason": self.reason, "mend": self.mend,
        }  # fmt: skip


def own_limit() -> dict[str, Any]:
    """Arguments that let ``torch.compile`` count the versions of one model apart from all others, up to
    :data:`VERSIONS` or the limit that is configured, whichever is more. PyTorch 2.11 and 2.12 may take none of them:
    there a limit can only be told of."""
    return _accepted(recompile_limit=max(VERSIONS, torch._dynamo.config.recompile_limit), isolate_recompiles=True)


def own_count() -> dict[str, Any]:
    """Arguments that let ``torch.compile`` count versions apart from those of the user's own compiled model."""
    return _accepted(isolate_recompiles=True)


def _accepted(**arguments: Any) -> dict[str, Any]:
    known = inspect.signature(torch.compile).parameters
    return {name: value for name, value in arguments.items() if name in known}


# --- noticing -----------------------------------------------------------------------------------------------------

_WORDS = re.compile(r"hit config\.(\w+) \((\d+)\)\s+function: '(.+)' \((.+):(\d+)\)(?:\s+last reason: (.*))?")
"""What Dynamo logs at a limit."""

_lock = threading.Lock()
_frames: set[int] = set()
_reached: dict[LimitReached, None] = {}


class _Notice(logging.Filter):
    """Reads what Dynamo logs, and lets all of it pass. A filter hears a record also where handlers show none."""

    def filter(self, record: logging.LogRecord) -> bool:
        try:
            _read(record.getMessage())
        except Exception:  # reading along must never disturb Dynamo's own work
            log.debug("a message of Dynamo could not be read", exc_info=True)
        return True


_notice = _Notice()


def watch() -> None:
    """Tell of a limit that the function which is being compiled reaches later. Called by the backend each time.

    Nothing is noticed where warnings of the logger ``torch._dynamo.convert_frame`` are switched off.
    """
    logging.getLogger("torch._dynamo.convert_frame").addFilter(_notice)  # the same one is not added twice
    frame = _frame()
    if frame is not None:
        with _lock:
            _frames.add(frame)


def limits_reached() -> tuple[LimitReached, ...]:
    """The limits that functions compiled by this backend have reached, first ones first."""
    with _lock:
        return tuple(_reached)


def forget() -> None:
    """Forget which functions were compiled, and what they reached."""
    with _lock:
        _frames.clear()
        _reached.clear()


def _frame() -> int | None:
    """Dynamo's number of the function that it is compiling in this thread."""
    compiling = CompileContext.current_compile_id()
    return None if compiling is None else compiling.frame_id


def _read(message: str) -> None:
    told = _WORDS.search(message)
    if told is None or _frame() not in _frames:  # other functions are the business of other backends
        return
    limit, value, function, file, line, reason = told.groups()
    place = f"{Path(file).name}:{line} in {function}"
    found = LimitReached(place, limit, int(value), (reason or "").strip())
    with _lock:
        if any(known.place == place and known.limit == limit for known in _reached):
            return
        _reached[found] = None
    log.warning("%s. %s", found, f"{found.mend[0].upper()}{found.mend[1:]}")
