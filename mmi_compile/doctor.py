"""``mmi doctor``: whether this installation works, and the facts that a bug report needs.

Every check says what it found and, where it failed, how to mend it. The self-tests compare with float64 attention and
name the number that they should stay below.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmi_compile.environment import describe_device, versions
from mmi_compile.kernels.boundaries import build_bounded_plan
from mmi_compile.kernels.cpu import attention_cpu
from mmi_compile.kernels.frames import TileShape
from mmi_compile.kernels.geometry import Geometry
from mmi_compile.kernels.patterns import AShape, ByModality, Grid, HeadPattern, VerticalSlash
from mmi_compile.kernels.reference import attention_reference
from mmi_compile.kernels.segments import segment

SCHEMA = 1
LEAST = {"torch": (2, 11), "triton": (3, 6), "transformers": (5, 17)}
"""Oldest supported versions; only transformers may be absent."""

LIMITS = {torch.float32: 1e-5, torch.bfloat16: 1.5e-2}
"""Relative error that a self-test stays below, by dtype."""

TOKENS = 1111
_PATTERNS: tuple[HeadPattern, ...] = (
    AShape(16, 100),
    VerticalSlash(40, 120),
    Grid(32, 4, 64),
    ByModality("2d", AShape(16, 64), (((1, 1), VerticalSlash(20, 64)),)),
)


@dataclass(frozen=True)
class Check:
    """One finding.

    Attributes:
        ok: False when something is broken; None for a fact that is neither good nor bad.
        mend: what to do when it is broken.
    """

    name: str
    ok: bool | None
    detail: str
    mend: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """All findings; ``healthy`` when none is broken."""

    versions: dict[str, str]
    devices: list[dict[str, Any]]
    checks: list[Check]

    @property
    def healthy(self) -> bool:
        return all(check.ok is not False for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        """JSON values only."""
        return {
            "schema": SCHEMA,
            "healthy": self.healthy,
            "versions": self.versions,
            "devices": self.devices,
            "checks": [asdict(check) for check in self.checks],
        }


def diagnose() -> Diagnosis:
    """Look at everything. A check that raises is a finding too, so nothing is raised."""
    devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    devices.append(torch.device("cpu"))
    checks = [*_version_checks(), _caught("backend", _backend), _caught("cache folder", _cache_folder)]
    for device in devices:
        for name, test in _self_tests(device):
            checks.append(_caught(name, test))
    checks.append(_caught("compile", _compile))
    return Diagnosis(versions(), [describe_device(device) for device in devices], checks)


def _caught(name: str, test: Callable[[], Check]) -> Check:
    try:
        return test()
    except Exception as error:
        first = (str(error).strip() or "no message").splitlines()[0]
        mend = "report this with the output of `mmi doctor --json`"
        return Check(name, False, f"{type(error).__name__}: {first}", mend)


def _version_checks() -> Iterator[Check]:
    found = versions()
    for name, least in LEAST.items():
        wanted = ".".join(map(str, least))
        if name not in found:
            optional = name == "transformers"
            detail = "not installed" + ("; needed for Hugging Face models only" if optional else "")
            yield Check(name, None if optional else False, detail, f"pip install '{name}>={wanted}'")
            continue
        numbers = tuple(int(part) for part in re.findall(r"\d+", found[name])[:2])
        yield Check(name, numbers >= least, found[name], f"pip install '{name}>={wanted}'")


def _backend() -> Check:
    known = "mminference" in torch._dynamo.list_backends(exclude_tags=())
    mend = "reinstall mmi-compile, so that its entry point torch_dynamo_backends is registered"
    return Check("backend", known, 'torch.compile(model, backend="mminference")', mend)


def _cache_folder() -> Check:
    from mmi_compile.kernels.render import cache_folder

    folder = cache_folder()
    mend = "set MMI_CACHE_DIR to a writable folder"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            kernels = len(list(folder.glob("attention_*.py")))
    except OSError as error:
        return Check("cache folder", False, f"{folder}: {error.strerror}", mend)
    return Check("cache folder", True, f"{folder}, {kernels} generated kernels", mend)


def _self_tests(device: torch.device) -> Iterator[tuple[str, Callable[[], Check]]]:
    """Name and test of every kernel that would run on ``device``."""
    if device.type == "cpu":
        name = "self-test, CPU"
        yield name, lambda: _attention_test(name, device, torch.float32, TileShape(128, 64), attention_cpu)
        return
    from mmi_compile.kernels.run import families, family_tiles, run_plan

    known = families(device, torch.bfloat16, 128)
    if not known:
        name = f"self-test, {device}"
        detail = "no kernel for this architecture; attention runs dense here"
        yield name, lambda: Check(name, None, detail)
    for family in known:

        def run(q: Tensor, k: Tensor, v: Tensor, plan: Any, scale: float, family: Any = family) -> Tensor:
            return run_plan(q, k, v, plan, scale, family=family)

        def test(family: Any = family, run: Any = run) -> Check:
            tiles = family_tiles(family, device, torch.bfloat16, 128)
            return _attention_test(f"self-test, {family} kernel on {device}", device, torch.bfloat16, tiles, run)

        yield f"self-test, {family} kernel on {device}", test


def _attention_test(
    name: str, device: torch.device, dtype: torch.dtype, tiles: TileShape, run: Callable[..., Tensor]
) -> Check:
    """Four heads with different patterns and a boundary, against float64 over the plan's exact mask."""
    generator = torch.Generator().manual_seed(0)
    heads, scale = len(_PATTERNS), 128**-0.5
    q, k, v = (
        torch.randn(1, n, TOKENS, 128, generator=generator).to(device, dtype) for n in (heads, heads // 2, heads // 2)
    )
    g = Geometry(1, heads, heads // 2, TOKENS, TOKENS)
    ids = (torch.arange(TOKENS, device=device) % 50 > 9).to(torch.int8)[None]
    plan = build_bounded_plan(_PATTERNS, q, k, g, scale, tiles, segment(ids, (0, 1), g, tiles))
    out = run(q, k, v, plan, scale)
    want = attention_reference(q.double(), k.double(), v.double(), plan.to_mask(), scale)
    error = float((out.double() - want).norm() / want.norm())
    density = float(plan.density().mean())
    detail = f"relative error {error:.1e}, below {LIMITS[dtype]:.0e} is right; density {density:.2f}"
    return Check(name, error < LIMITS[dtype], detail, "report this with the output of `mmi doctor --json`")


class _Attention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        heads = x.unflatten(-1, (4, 32)).transpose(1, 2)
        return nn.functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True)


def _compile() -> Check:
    """The whole way: Dynamo, all passes, the operator; and the model's own numbers."""
    from mmi_compile.backend import last_report

    model, x = _Attention(), torch.randn(1, 300, 128, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(model, backend="mminference", options={"policy": "exact", "inner": "eager"})
    with torch.no_grad():
        error = float((compiled(x) - model(x)).norm() / model(x).norm())
    report = last_report()
    sites = report.graphs[-1].sites if report is not None else []
    rewritten = sum(site.decision is not None and site.decision.rewritten for site in sites)
    detail = f"{rewritten} of 1 attentions rewritten, relative error {error:.1e}, below 1e-05 is right"
    return Check("compile", rewritten == 1 and error < 1e-5, detail, "see `mmi_compile.last_report()` for the reason")
