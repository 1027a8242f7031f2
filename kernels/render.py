"""From a spec to Triton source, and from source to an imported module.

Triton compiles functions that it can read back from a file, so the rendered source is written to a cache folder and
imported from there. The name of the file is a digest of everything the text depends on.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import sys
import tempfile
import threading
from dataclasses import asdict
from functools import lru_cache
from importlib import resources
from pathlib import Path
from types import ModuleType
from typing import TypeAlias

import jinja2

from mmi_compile.kernels.hopper_spec import HopperSpec
from mmi_compile.kernels.plan import RECORD
from mmi_compile.kernels.spec import KernelSpec

AnySpec: TypeAlias = KernelSpec | HopperSpec

_lock = threading.Lock()
_modules: dict[str, ModuleType] = {}


def rendered_source(spec: AnySpec) -> str:
    """The Triton source of the kernel for ``spec``; the same spec always gives the same text."""
    return _template(spec.template).render(spec=spec, digest=digest(spec), title=_title(spec), record=RECORD)


@lru_cache(maxsize=1024)
def digest(spec: AnySpec) -> str:
    """16 hexadecimal digits that name the spec and the template together."""
    text = json.dumps([asdict(spec), RECORD], sort_keys=True) + _template_text(spec.template)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def cache_folder() -> Path:
    """Where rendered sources live: ``MMI_CACHE_DIR`` if set, else ``~/.cache/mmi_compile``."""
    chosen = os.environ.get("MMI_CACHE_DIR")
    return Path(chosen) if chosen else Path.home() / ".cache" / "mmi_compile"


def source_path(spec: AnySpec) -> Path:
    """The file that holds the rendered source. It is written if it is missing or does not hold exactly that text.

    Raises:
        OSError: the cache folder cannot be written; set ``MMI_CACHE_DIR`` to one that can.
    """
    text = rendered_source(spec)
    path = cache_folder() / f"attention_{digest(spec)}.py"
    try:
        if path.read_text(encoding="utf-8") == text:
            return path
    except (OSError, UnicodeDecodeError):
        pass  # missing or damaged: written again below, where an error has a remedy to name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_atomically(path, text)
    except OSError as error:
        mend = "set MMI_CACHE_DIR to a writable folder"
        raise OSError(f"cannot write kernels to {path.parent}: {error}; {mend}") from error
    return path


def kernel_module(spec: AnySpec) -> ModuleType:
    """The imported module with the jitted ``attention`` and, for specs with columns, ``compact_columns``.

    Imports Triton. The module is kept for the life of the process.
    """
    name = f"mmi_compile_kernel_{digest(spec)}"
    with _lock:
        if name not in _modules:
            _modules[name] = _import_file(name, source_path(spec))
        return _modules[name]


def _import_file(name: str, path: Path) -> ModuleType:
    module_spec = importlib.util.spec_from_file_location(name, path)
    if module_spec is None or module_spec.loader is None:
        raise ImportError(f"cannot import {path}")
    module = importlib.util.module_from_spec(module_spec)
    # Tracebacks and pickles of compiled kernels look modules up by name.
    sys.modules[name] = module
    try:
        module_spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _write_atomically(path: Path, text: str) -> None:
    """Another process may write or read the same file at any moment: it sees all of the text or none."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _title(spec: AnySpec) -> str:
    parts = [f"head dim {spec.head_dim}", spec.dtype, f"{spec.block_m} x {spec.block_n} tiles"]
    names = [name.removeprefix("has_").replace("_", " ") for name, on in asdict(spec.features).items() if on]
    names = ["tensor descriptors" if name == "use descriptors" else name for name in names]
    return ", ".join(parts) + (f"; {', '.join(names)}" if names else "; causal window only")


@lru_cache(maxsize=8)
def _template_text(name: str) -> str:
    return resources.files("mmi_compile.kernels").joinpath("templates").joinpath(name).read_text(encoding="utf-8")


@lru_cache(maxsize=8)
def _template(name: str) -> jinja2.Template:
    return _environment().from_string(_template_text(name))


@lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
    # Python source, never HTML: nothing to escape.
    return jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True, autoescape=False)
