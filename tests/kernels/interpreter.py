"""Processes in which Triton interprets kernels on the CPU: it reads ``TRITON_INTERPRET`` when it is first imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeAlias

import pytest

ROOT = Path(__file__).resolve().parents[2]


class Interpreter:
    """A worker process with ``TRITON_INTERPRET=1`` that answers one request at a time."""

    def __init__(self, script: str, **environment: str) -> None:
        given = os.environ | environment | {
            "TRITON_INTERPRET": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
        }  # fmt: skip
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name(script))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=given,
        )  # fmt: skip

    def __call__(self, **request: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, f"the worker died with exit status {self.process.wait()} on {request}"
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)


@contextmanager
def running(script: str, **environment: str) -> Iterator[Interpreter]:
    """A worker that runs ``script`` of this folder; skips the test where Triton's interpreter cannot run."""
    versions = [tuple(map(int, version(name).split(".")[:2])) for name in ("triton", "numpy")]
    if versions[0] < (3, 7) and versions[1] >= (2, 4):
        pytest.skip("the interpreter of triton 3.6 needs numpy < 2.4")
    worker = Interpreter(script, **environment)
    try:
        yield worker
    finally:
        worker.close()


Worker: TypeAlias = Callable[..., dict[str, Any]]


@contextmanager
def asking(script: str) -> Iterator[Worker]:
    """The same as a function of the request, of whose arguments a positional one is called ``kind``; it fails the test
    where the worker could not answer. Skips the test where there is no Triton."""
    pytest.importorskip("triton", reason="triton is published for Linux only")
    with running(script) as process:

        def ask(*kind: str, **request: Any) -> dict[str, Any]:
            answer = process(**dict(zip(["kind"], kind, strict=False)), **request)
            assert "failure" not in answer, answer["failure"]
            return answer

        yield ask
