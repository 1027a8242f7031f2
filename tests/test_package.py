"""What the installed package promises before any model is compiled."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mmi_compile

ROOT = Path(__file__).resolve().parent.parent


def modules() -> list[str]:
    """Every module of the package, found without importing the subpackages (one broken file, one failing test)."""
    packages = ["mmi_compile", "mmi_compile.passes", "mmi_compile.kernels"]
    found = list(packages)
    for package in packages:
        spec = importlib.util.find_spec(package)
        assert spec is not None
        found += [f"{package}.{item.name}" for item in pkgutil.iter_modules(spec.submodule_search_locations)]
    return sorted({*found} - {"mmi_compile.__main__"})


def run_python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=ROOT.anchor)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_import_is_light_and_without_side_effects():
    # torch itself may import triton's package lazily, so what counts is what our import adds.
    code = (
        "import os, sys, torch; before = set(sys.modules); environ = dict(os.environ); import mmi_compile; "
        "added = {name.partition('.')[0] for name in set(sys.modules) - before}; "
        "assert dict(os.environ) == environ; "
        "print(sorted(added & {'triton', 'transformers'}))"
    )
    assert run_python(code) == "[]"


def test_backend_is_found_without_importing_the_package():
    assert run_python("import torch; print('mminference' in torch.compiler.list_backends())") == "True"


def test_entry_point_loads():
    points = importlib.metadata.entry_points(group="torch_dynamo_backends", name="mminference")
    backends = [point.load() for point in points]
    assert len(backends) >= 1
    assert all(callable(backend) for backend in backends)


def test_version_is_the_distributions():
    assert mmi_compile.__version__ == importlib.metadata.version("mmi-compile")


def test_is_typed():
    assert Path(mmi_compile.__file__).with_name("py.typed").exists()


def test_nothing_generic_lands_in_site_packages():
    code = "import importlib.util as u; print([n for n in ('passes', 'kernels') if u.find_spec(n)])"
    assert run_python(code) == "[]"


@pytest.mark.parametrize("name", modules())
def test_every_module_imports_and_says_what_it_is(name):
    if name.rpartition(".")[2].startswith("triton"):
        pytest.importorskip("triton")
    assert (importlib.import_module(name).__doc__ or "").strip()


def test_every_pin_satisfies_what_the_package_accepts():
    declared = dict(re.findall(r'"([\w-]+)>=([\d.]+)', (ROOT / "pyproject.toml").read_text(encoding="utf-8")))
    pins = re.findall(r"^([\w-]+)==([\d.]+)", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert {"torch", "triton", "transformers"} <= {name for name, _ in pins}
    for name, version in pins:
        lower = declared.get(name, "0")
        assert torch.torch_version.TorchVersion(version) >= lower, f"{name}=={version}, but {name}>={lower}"


def test_constraints_name_versions_only():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    for line in lines:
        assert (
            not line or line.startswith("#") or re.fullmatch(r'[\w-]+==[\w.]+(; python_version [<>]=? "3\.\d+")?', line)
        )


def test_readme_lists_the_options_as_the_code_has_them():
    from mmi_compile.options import options_table

    assert options_table().strip() in (ROOT / "README.md").read_text()
