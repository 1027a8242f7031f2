"""What every worker process does: one JSON request per line of standard input, one JSON answer per line of output."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from mmi_compile.kernels.launch import interpreting


def serve(answer: Callable[..., dict[str, Any]]) -> None:
    """Answer requests, whose entries are the arguments of ``answer``, until standard input ends."""
    assert interpreting()
    spare_idle_work()
    torch.set_num_threads(1)
    empty = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        t = empty(*args, **kwargs)
        return t.fill_(float("nan")) if t.is_floating_point() else t

    torch.empty = poisoned  # scratch that a kernel reads before it writes must not pass for zeros
    for line in sys.stdin:
        try:
            told = answer(**json.loads(line))
        except Exception:
            told = {"failure": traceback.format_exc()}
        print(json.dumps(told), flush=True)


def spare_idle_work() -> None:
    """Keep Triton's interpreter from work without effect, which takes most of its time."""
    from triton.runtime import interpreter

    # Sums for checks of overflow: what they find is dropped outside debug mode.
    builder = interpreter.interpreter_builder
    assert not builder.options.debug
    builder.options = replace(builder.options, sanitize_overflow=False)

    # Each call of a device function patches the language anew: once for each module and launch is enough.
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[str] = set()

    def patch_once(function: Any) -> Any:
        module = function.__globals__["__name__"]
        if module in patched:
            return None
        patched.add(module)
        return patch(function)

    def launch_patched(executor: Any, *args: Any, **kwargs: Any) -> None:
        patched.clear()
        launch(executor, *args, **kwargs)

    interpreter._patch_lang = patch_once
    interpreter.GridExecutor.__call__ = launch_patched
