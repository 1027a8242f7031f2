"""What ``mmi bench`` was asked and what it found: options, one row per measurement, and the results file."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch

from mmi_compile.bench_cases import DEFAULT_CASES, QUICK_CASES, TUNE_CASES, Case, parse_cases
from mmi_compile.bench_peers import peers_for

SCHEMA = {"name": "mmi-bench", "version": 1}
"""Goes into every results file. The version rises when a field changes its meaning or goes."""

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TOLERANCE = {"bf16": 2e-2, "fp16": 5e-3, "fp32": 1e-3}
"""Relative error of sampled rows above which a result counts as wrong."""

OK, SKIPPED, FAILED = "ok", "skipped", "failed"


@dataclass(frozen=True)
class BenchOptions:
    """What to measure; ``for_device`` fills in what fits the machine.

    Attributes:
        tokens: prompt lengths. heads, kv_heads, head_dim, batch: of q, k, v. dtype: a key of ``DTYPES``.
        cases: what to plan. peers: keys of ``PEERS``; the first dense one is what ratios refer to.
        repeats: timed calls for every median. seed: of the inputs. tune: time candidate tiles instead of peers.
    """

    tokens: tuple[int, ...]
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    cases: tuple[Case, ...]
    peers: tuple[str, ...]
    batch: int = 1
    repeats: int = 7
    seed: int = 0
    tune: bool = False
    quick: bool = False

    @classmethod
    def for_device(cls, device: torch.device, *, quick: bool = False, tune: bool = False, **given: Any) -> BenchOptions:
        """The options in ``given`` that are not None, and defaults for the others: small ones on a CPU.

        Raises:
            ValueError: options that contradict each other.
        """
        gpu = device.type == "cuda"
        names = TUNE_CASES if tune else QUICK_CASES if quick else DEFAULT_CASES
        defaults: dict[str, Any] = {
            "tokens": ((16384,) if quick else (16384, 131072)) if gpu else ((1024,) if quick else (1024, 4096)),
            "heads": 28 if gpu else 8,
            "kv_heads": 4 if gpu else 2,
            "head_dim": 128 if gpu else 64,
            "dtype": "bf16" if gpu else "fp32",
            "cases": parse_cases(names),
            "repeats": 3 if quick else 7,
        }
        chosen = defaults | {key: value for key, value in given.items() if value is not None}
        chosen.setdefault("peers", peers_for(device, chosen["dtype"]))
        options = cls(quick=quick, tune=tune, **chosen)
        options.check()
        return options

    def check(self) -> None:
        """Raise ValueError, naming the mend, where options contradict each other."""
        if self.heads < 1 or self.kv_heads < 1 or self.heads % self.kv_heads:
            raise ValueError(
                f"{self.heads} heads cannot share {self.kv_heads} kv heads; give a divisor of {self.heads}"
            )
        if self.batch < 1 or self.repeats < 1 or self.head_dim < 1:
            raise ValueError("batch, repeats and head dim must be 1 or more")
        if self.dtype not in DTYPES:
            raise ValueError(f"unknown dtype {self.dtype!r}; known: {', '.join(DTYPES)}")


@dataclass(frozen=True)
class Row:
    """One implementation on one case at one length. Fields that do not apply, or were not measured, are None.

    Attributes:
        tokens, case, kernel: what was measured. ours: whether it is one of our kernels.
        status: "ok", "skipped" (not possible here) or "failed"; reason: why.
        density: share of the dense tiles that the plan computes. pairs: query-key pairs computed, all heads.
        probe_ms, plan_ms, kernel_ms: device times apart; op_ms: of the whole operator, all three in one go.
        host_ms: time in which the host queues the whole operator.
        tflops: ``4 * head_dim`` operations for each of ``pairs``, divided by ``kernel_ms``.
        speedup: time of the dense peer divided by ``op_ms``.
        error: relative error of sampled rows against float32.
        scratch: peak memory beside inputs and output, as a share of the bytes of q, k and v.
        repeats: calls behind the medians.
    """

    tokens: int
    case: str
    kernel: str
    ours: bool
    status: str = OK
    reason: str = ""
    density: float | None = None
    pairs: int | None = None
    probe_ms: float | None = None
    plan_ms: float | None = None
    kernel_ms: float | None = None
    op_ms: float | None = None
    host_ms: float | None = None
    tflops: float | None = None
    speedup: float | None = None
    error: float | None = None
    scratch: float | None = None
    repeats: int | None = None


@dataclass
class Results:
    """All rows, and what they were measured with."""

    options: BenchOptions
    device: dict[str, Any]
    versions: dict[str, str]
    rows: list[Row] = field(default_factory=list)

    @property
    def failed(self) -> list[Row]:
        """Measurements of our own kernels that did not succeed."""
        return [row for row in self.rows if row.ours and row.status == FAILED]

    def to_json(self) -> dict[str, Any]:
        """JSON values only: schema, device, versions, options, rows."""
        options = dataclasses.asdict(self.options) | {"cases": [case.name for case in self.options.cases]}
        return {
            "schema": SCHEMA,
            "device": self.device,
            "versions": self.versions,
            "options": options,
            "rows": [dataclasses.asdict(row) for row in self.rows],
        }


def rows_from_json(data: dict[str, Any]) -> list[Row]:
    """The rows of a results file.

    Raises:
        ValueError: another kind of file, or a version that this one does not know.
    """
    schema = data.get("schema") if isinstance(data, dict) else None
    if not isinstance(schema, dict) or schema.get("name") != SCHEMA["name"]:
        raise ValueError("not a results file of mmi bench: it has no schema named mmi-bench")
    if schema.get("version") != SCHEMA["version"]:
        raise ValueError(f"results of schema version {schema.get('version')}; this version reads {SCHEMA['version']}")
    return [Row(**row) for row in data["rows"]]
