"""Create or update the virtual environment of ``make demo`` and ``make test``. Standard library only.

Where the interpreter that runs this already has a torch that drives a GPU, the environment sees that interpreter's
packages and pip adds only what is missing. Everywhere else all versions come from ``constraints.txt``.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import re
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def version_tuple(text: str) -> tuple[int, ...]:
    """``"2.11.0+cu130"`` -> ``(2, 11, 0)``; enough to compare releases."""
    found = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(part) for part in found.group().split(".")) if found else ()


def normal(name: str) -> str:
    """The form of a distribution's name in which two spellings are equal."""
    return re.sub(r"[-_.]+", "-", name).lower()


def minimum_versions() -> dict[str, tuple[int, ...]]:
    """The lower bounds in ``pyproject.toml`` (read as text: Python 3.10 has no TOML reader)."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return {normal(name): version_tuple(bound) for name, bound in re.findall(r'"([\w.-]+)>=([\d.]+)', text)}


def present_versions() -> dict[str, str]:
    """Distributions that this interpreter sees and that are new enough for us."""
    minimum = minimum_versions()
    found = {
        normal(name): item.version for item in importlib.metadata.distributions() if (name := item.metadata["Name"])
    }
    return {name: version for name, version in found.items() if version_tuple(version) >= minimum.get(name, ())}


def torch_folder(need_gpu: bool) -> Path | None:
    """The site-packages folder of a usable torch in this interpreter, or None with the reason printed."""
    if "torch" not in present_versions():
        return None
    try:
        import torch

        usable = torch.cuda.is_available() or not need_gpu
    except Exception as error:  # a broken torch may fail in any way, and is as good as none
        print(f"make_env: torch of {sys.executable} cannot be imported ({error!r}); installing the pinned one")
        return None
    spec = importlib.util.find_spec("torch")
    if not usable or spec is None or spec.origin is None:
        print(f"make_env: torch {torch.__version__} of {sys.executable} sees no GPU; installing the pinned one")
        return None
    return Path(spec.origin).parent.parent


def create(folder: Path, share: Path | None) -> Path:
    """Create ``folder`` (kept when it exists with the same sharing) and return its Python."""
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    inside_venv = sys.prefix != sys.base_prefix
    wanted = f"{sys.executable} {sys.version} {share}"
    record = folder / "made-for.txt"
    fresh = not (python.exists() and record.exists() and record.read_text(encoding="utf-8") == wanted)
    if fresh:
        # An environment made from an environment sees the base interpreter's packages, not its parent's.
        system = share is not None and not inside_venv
        venv.EnvBuilder(clear=True, with_pip=True, system_site_packages=system).create(folder)
        if share is not None and inside_venv:
            code = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
            own = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()
            Path(own, "parent.pth").write_text(f"{share}\n", encoding="utf-8")
        if share is not None:
            # The bundled setuptools of Python 3.10 and 3.11 is too old to build us and would hide the parent's.
            subprocess.run([python, "-m", "pip", "--quiet", "uninstall", "--yes", "setuptools"], check=True)
        record.write_text(wanted, encoding="utf-8")
    return python


def constraints(folder: Path, present: dict[str, str]) -> Path:
    """``constraints.txt``, in which the packages that are already there stay as they are."""
    source = ROOT / "constraints.txt"
    if not present:
        return source
    lines = source.read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if normal(re.split(r"[=;\s]", line, maxsplit=1)[0]) not in present]
    stay = [f"{name}=={present[name]}" for name in ("torch", "triton") if name in present]
    target = folder / "constraints.txt"
    target.write_text("\n".join(kept + stay) + "\n", encoding="utf-8")
    return target


def install(python: Path, folder: Path, extras: str, present: dict[str, str]) -> None:
    """Install the package, editable, with its ``extras``."""
    command = [python, "-m", "pip", "install", "--disable-pip-version-check", "--quiet"]
    command += ["--constraint", constraints(folder, present)]
    if "setuptools" in present:
        command.append("--no-build-isolation")
    print(f"make_env: installing [{extras}] into {folder} (the first time takes minutes)", flush=True)
    subprocess.run([*command, "--editable", f"{ROOT}[{extras}]"], check=True, cwd=ROOT)


def main() -> int:
    """Run the command line; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--extras", required=True, help="comma-separated extras of pyproject.toml")
    parser.add_argument(
        "--torch",
        choices=("auto", "present", "pinned"),
        default="auto",
        help="auto: the interpreter's torch if it drives a GPU; present: also if it does not; pinned: never",
    )
    arguments = parser.parse_args()
    if sys.version_info < (3, 10):  # noqa: UP036  (this file is what an older Python meets first)
        found = f"{sys.executable} is {sys.version.split()[0]}"
        print(f"make_env: needs Python 3.10 or newer, and {found}; name another with PYTHON=python3.12")
        return 1
    share = None if arguments.torch == "pinned" else torch_folder(need_gpu=arguments.torch == "auto")
    if share is None and arguments.torch == "present":
        print(f"make_env: {sys.executable} has no torch that is new enough; use --torch auto")
        return 1
    present = present_versions() if share else {}
    folder = arguments.folder.absolute()
    try:
        python = create(folder, share)
        install(python, folder, arguments.extras, present)
    except subprocess.CalledProcessError as error:
        print(f"make_env: failed with status {error.returncode}: {' '.join(map(str, error.cmd))}")
        print("make_env: on Debian and Ubuntu, creating an environment needs the package python3-venv")
        return 1
    report = "import torch; print(f'make_env: torch {torch.__version__}, GPU: {torch.cuda.is_available()}')"
    return subprocess.run([python, "-c", report], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
