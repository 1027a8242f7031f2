"""What work costs on a device: coefficients of the cost model (``kernels/cost.py``).

``mmi bench --calibrate`` measures them, and they are kept per device in the user's cache folder (``MMI_CACHE_DIR``);
built-in ratios stand in.
"""

from __future__ import annotations

import json
import math
import re
import secrets
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmi_compile.decision import MMIError
from mmi_compile.environment import describe_device
from mmi_compile.kernels.cost import EVEN, Coefficients, Work, default_coefficients
from mmi_compile.kernels.frames import TileShape
from mmi_compile.kernels.render import cache_folder

SCHEMA = {"name": "mmi-cost", "version": 1}
"""Goes into every file. The version rises when a coefficient changes its meaning."""


class CostFileError(MMIError):
    """A file of measured costs that cannot be used. The message names it and the mend."""


@dataclass(frozen=True)
class Entry:
    """Fitted coefficients of one kernel family at one head dim.

    Attributes:
        error, worst: median and largest relative error of predictions for measurements left out of the fit.
        samples: measurements.
    """

    family: str
    head_dim: int
    block_m: int
    block_n: int
    coefficients: Coefficients
    error: float
    worst: float
    samples: int

    @property
    def tiles(self) -> TileShape:
        """Tile shape of the plans that were measured."""
        return TileShape(self.block_m, self.block_n)


@dataclass(frozen=True)
class Calibration:
    """What is known of one device."""

    device: str
    entries: tuple[Entry, ...]
    versions: Mapping[str, str]
    date: str

    def find(self, family: str, head_dim: int, tiles: TileShape) -> Entry | None:
        """The entry for these kernels; of another head dim, the nearest, with the work of a tile scaled to it."""
        known = [e for e in self.entries if e.family == family and e.tiles == tiles]
        if not known:
            return None
        best = min(known, key=lambda e: (abs(math.log(e.head_dim / head_dim)), e.head_dim))
        if best.head_dim == head_dim:
            return best
        return replace(best, head_dim=head_dim, coefficients=best.coefficients.scaled(head_dim / best.head_dim))

    def to_json(self) -> dict[str, Any]:
        """JSON values in the order of the file."""
        return {
            "schema": SCHEMA, "device": self.device, "date": self.date, "versions": dict(self.versions),
            "entries": [asdict(entry) for entry in self.entries],
        }  # fmt: skip


@dataclass(frozen=True)
class CostModel:
    """Coefficients for one device, kernel family and head dim, and where they come from, in words."""

    family: str
    head_dim: int
    tiles: TileShape
    coefficients: Coefficients
    source: str

    def seconds(self, work: Work) -> float | Tensor:
        """Predicted seconds of one call, or of each head where ``work`` holds tensors; without its launch there."""
        calls = 0 if any(isinstance(part, Tensor) for part in work) else 1
        return self.coefficients.seconds(work, calls=calls)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> CostModel:
        """From what ``dataclasses.asdict`` made of one."""
        parts = {"tiles": TileShape(**data["tiles"]), "coefficients": Coefficients(**data["coefficients"])}
        return cls(**{**data, **parts})


def cost_model(device: torch.device, dtype: torch.dtype, head_dim: int) -> CostModel:
    """The cost model of the kernels that run here: as calibrated, else built-in ratios.

    Raises:
        ValueError: no kernel serves this device, dtype and head dim.
        CostFileError: the device's file is damaged or of another version.
    """
    name, tiles = _kernels_for(device, dtype, head_dim)
    calibration = load(device)
    entry = None if calibration is None else calibration.find(name, head_dim, tiles)
    if calibration is None or entry is None:
        built_in = default_coefficients(name, head_dim, tiles)
        return CostModel(name, head_dim, tiles, built_in, "built-in ratios; `mmi bench --calibrate` measures")
    return CostModel(name, head_dim, tiles, entry.coefficients, f"calibrated {calibration.date}")


def tile_counts(device: torch.device, dtype: torch.dtype, head_dim: int) -> CostModel:
    """A stand-in for :func:`cost_model` under which every key tile costs 1 and nothing else costs: shares of it are
    densities.

    Raises:
        ValueError: no kernel serves this device, dtype and head dim.
    """
    name, tiles = _kernels_for(device, dtype, head_dim)
    return CostModel(name, head_dim, tiles, EVEN, "numbers of key tiles")


def _kernels_for(device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[str, TileShape]:
    """The kernel family that runs here, and the tiles of its plans.

    Raises:
        ValueError: there is none.
    """
    from mmi_compile.bench_peers import kernel_families

    known = kernel_families(device, dtype, head_dim)
    if not known:
        raise ValueError(f"no kernel for {device}, {dtype} and head dim {head_dim}")
    return known[0].name, known[0].tiles


@dataclass(frozen=True)
class Costs:
    """Coefficients of the kernels that are about to run.

    Attributes:
        measured: whether they were calibrated. problem: what is wrong with the device's file, in words, or empty.
    """

    coefficients: Coefficients
    measured: bool
    problem: str = ""


def coefficients_for(device: torch.device, family: str, head_dim: int, tiles: TileShape) -> Costs:
    """As calibrated, else built-in ratios; read once per process, or until something is saved."""
    index = torch.cuda.current_device() if device.type == "cuda" and device.index is None else device.index
    return _coefficients(torch.device(device.type, index), family, head_dim, tiles, cache_folder())


@lru_cache(maxsize=256)
def _coefficients(device: torch.device, family: str, head_dim: int, tiles: TileShape, folder: Path) -> Costs:
    problem, entry = "", None
    try:
        calibration = load(device)
    except CostFileError as error:
        problem = f"{error}; built-in costs serve until then"
    else:
        entry = None if calibration is None else calibration.find(family, head_dim, tiles)
    if entry is None:
        return Costs(default_coefficients(family, head_dim, tiles), False, problem)
    return Costs(entry.coefficients, True)


# ---------------------------------------------------------------------------------------------------------------------
# Files


def device_name(device: torch.device) -> str:
    """Name of the device; of a CPU, with the number of threads, which its times depend on."""
    facts = describe_device(device)
    return str(facts["name"]) if device.type == "cuda" else f"CPU, {facts['threads']} threads"


def cost_file(device: torch.device) -> Path:
    """Where what is known of the device is kept."""
    slug = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    return cache_folder() / f"cost_{slug}.json"


def save(calibration: Calibration, device: torch.device) -> Path:
    """Write the device's file, at once or not at all. Entries for other head dims that are in it stay.

    Raises:
        CostFileError: it cannot be written.
    """
    try:
        before = load(device)
    except CostFileError:
        before = None  # what cannot be read is replaced
    if before is not None:
        new = {(e.family, e.head_dim, e.tiles) for e in calibration.entries}
        kept = tuple(e for e in before.entries if (e.family, e.head_dim, e.tiles) not in new)
        calibration = replace(calibration, entries=calibration.entries + kept)
    path = cost_file(device)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(calibration.to_json(), indent=1, allow_nan=False), encoding="utf-8")
        temporary.replace(path)
        _coefficients.cache_clear()
    except (OSError, ValueError) as error:
        raise CostFileError(f"{path}: cannot be written: {error}; set MMI_CACHE_DIR to a writable folder") from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    return path


def load(device: torch.device) -> Calibration | None:
    """What was measured on this device; None when nothing was.

    Raises:
        CostFileError: the file is damaged or of another version.
    """
    path = cost_file(device)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise _unusable(path, str(error)) from None
    try:
        return _from_json(json.loads(text))
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise _unusable(path, str(error)) from None


def _from_json(data: Any) -> Calibration:
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise ValueError(f"is no file of version {SCHEMA['version']}")
    entries = []
    for item in data["entries"]:
        coefficients = {name: float(value) for name, value in item["coefficients"].items()}
        if any(not math.isfinite(x) or x < 0 for x in coefficients.values()) or not any(coefficients.values()):
            raise ValueError("holds a cost that is negative or no number")
        entry = Entry(**{**item, "coefficients": Coefficients(**coefficients)})
        if min(entry.head_dim, entry.block_m, entry.block_n) < 1:
            raise ValueError("holds a size below 1")
        entries.append(entry)
    return Calibration(str(data["device"]), tuple(entries), dict(data["versions"]), str(data["date"]))


def _unusable(path: Path, why: str) -> CostFileError:
    return CostFileError(f"{path}: {why}; measure again with `mmi bench --calibrate`, or delete the file")
