"""``mmi bench --calibrate``: the fit, the file that keeps it, and a small calibration of the CPU."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmi_compile import calibrate, cli
from mmi_compile.bench_cases import parse_cases
from mmi_compile.calibrate import CalibrationOptions, Measurement, fit, held_out_errors, non_negative_least_squares
from mmi_compile.cost_file import (
    SCHEMA,
    Calibration,
    CostFileError,
    Entry,
    coefficients_for,
    cost_file,
    cost_model,
    load,
    save,
)
from mmi_compile.kernels.cost import Coefficients, Work, default_coefficients
from mmi_compile.kernels.dispatch import CPU_TILES

CPU = torch.device("cpu")
TRUTH = Coefficients(2e-4, 3e-5, 1e-5, 1.5e-5, 2e-5, 4e-6, 8e-6)
PRIOR = default_coefficients("cpu", 64, CPU_TILES)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MMI_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def measurements(count: int = 40, noise: float = 0.0, seed: int = 0) -> list[Measurement]:
    rng = np.random.default_rng(seed)
    found = []
    for i in range(count):
        work = Work(*(float(x) * 4 ** (i % 4) for x in rng.integers(0, 500, 6)))
        found.append(Measurement(i, "case", work, float(TRUTH.seconds(work)) * (1 + noise * rng.uniform(-1, 1))))
    return found


def entry(head_dim: int = 64, **changes: Any) -> Entry:
    return dataclasses.replace(Entry("cpu", head_dim, *dataclasses.astuple(CPU_TILES), TRUTH, 0.05, 0.2, 40), **changes)


def calibration(*entries: Entry) -> Calibration:
    return Calibration("CPU", entries, {"torch": "2"}, "2026-01-01")


# --- the fit


@given(
    rows=st.lists(st.lists(st.integers(-5, 5), min_size=4, max_size=4), min_size=4, max_size=8),
    target=st.lists(st.integers(-5, 5), min_size=8, max_size=8),
)
def test_least_squares_without_negative_values_is_optimal(rows: list[list[int]], target: list[int]) -> None:
    design, wanted = np.array(rows, dtype=float) + 0.01 * np.eye(len(rows), 4), np.array(target[: len(rows)], float)
    x = non_negative_least_squares(design, wanted)
    gradient = design.T @ (design @ x - wanted)
    assert (x >= 0).all()
    # At the optimum nothing can be raised with profit, and what is above 0 cannot be lowered either.
    assert (gradient >= -1e-6 * (1 + abs(gradient).max())).all()
    assert np.allclose(gradient[x > 1e-9], 0, atol=1e-6 * (1 + np.abs(design).max() ** 2 * np.abs(wanted).max()))


def test_the_fit_recovers_costs_from_exact_times() -> None:
    found = dataclasses.asdict(fit(measurements(), PRIOR))
    for name, value in dataclasses.asdict(TRUTH).items():
        assert found[name] == pytest.approx(value, rel=0.25), name
    assert max(held_out_errors(measurements(), PRIOR)) < 0.02


def test_noise_and_an_interruption_do_little_harm() -> None:
    noisy = measurements(60, noise=0.1)
    noisy[17] = dataclasses.replace(noisy[17], seconds=noisy[17].seconds * 20)
    errors = sorted(held_out_errors(noisy, PRIOR))
    assert errors[len(errors) // 2] < 0.1
    assert errors[-2] < 0.3  # all but the one that was interrupted


def test_what_was_not_measured_keeps_the_built_in_ratio() -> None:
    dense = [
        dataclasses.replace(m, work=(w := Work(rows=m.work.rows, dense=m.work.dense)), seconds=float(TRUTH.seconds(w)))
        for m in measurements()
    ]
    found = fit(dense, PRIOR)
    assert found.dense == pytest.approx(TRUTH.dense, rel=0.2)
    assert found.listed / found.columns == pytest.approx(PRIOR.listed / PRIOR.columns, rel=1e-6)


def test_the_fit_is_deterministic() -> None:
    assert fit(measurements(noise=0.2), PRIOR) == fit(measurements(noise=0.2), PRIOR)


# --- the file


def test_a_calibration_is_kept_per_device(cache: Path) -> None:
    assert load(CPU) is None
    path = save(calibration(entry()), CPU)
    assert path.parent == cache
    assert load(CPU) == calibration(entry())
    assert [p.name for p in cache.iterdir()] == [path.name]  # no temporary file stays


def test_other_head_dims_stay(cache: Path) -> None:
    save(calibration(entry(64)), CPU)
    save(calibration(entry(128), entry(64, error=0.5)), CPU)
    found = load(CPU)
    assert found is not None
    assert {(e.head_dim, e.error) for e in found.entries} == {(128, 0.05), (64, 0.5)}


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "null", '{"schema": {"name": "mmi-cost", "version": 0}}', "\x00",
        json.dumps({"schema": SCHEMA}),
        json.dumps({**calibration(entry()).to_json(), "entries": [{"family": "cpu"}]}),
        json.dumps(calibration(entry(coefficients=dataclasses.replace(TRUTH, tiles=-1.0))).to_json()),
        json.dumps(calibration(entry(coefficients=dataclasses.replace(TRUTH, tiles=float("inf")))).to_json()),
        json.dumps(calibration(entry(head_dim=0)).to_json()),
        json.dumps(calibration(entry()).to_json())[:-30],
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_used_is_refused_by_name_and_replaced(text: str) -> None:
    path = cost_file(CPU)
    path.parent.mkdir()
    path.write_text(text, encoding="utf-8")
    with pytest.raises(CostFileError, match="measure again with `mmi bench --calibrate`") as caught:
        cost_model(CPU, torch.float32, 64)
    assert str(path) in str(caught.value)
    save(calibration(entry()), CPU)
    assert load(CPU) == calibration(entry())


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("MMI_CACHE_DIR", str(tmp_path / "file" / "below"))
    with pytest.raises(CostFileError, match="set MMI_CACHE_DIR"):
        save(calibration(entry()), CPU)


def test_the_model_says_where_its_costs_come_from() -> None:
    assert "built-in" in cost_model(CPU, torch.float32, 64).source
    save(calibration(entry(64), entry(256)), CPU)
    assert cost_model(CPU, torch.float32, 64).coefficients == TRUTH
    assert "2026-01-01" in cost_model(CPU, torch.float32, 64).source
    assert cost_model(CPU, torch.float32, 80).coefficients == TRUTH.scaled(80 / 64)
    other = entry(coefficients=TRUTH, block_m=32)
    assert calibration(other).find("cpu", 64, CPU_TILES) is None


# --- measuring


def small(**changes: Any) -> CalibrationOptions:
    options = CalibrationOptions.for_device(
        CPU, tokens=(256, 384, 512), heads=2, kv_heads=1, head_dims=(32,), repeats=1
    )
    cases = parse_cases(["dense,a_shape(16,64),vertical_slash(32,32),q"])
    return dataclasses.replace(options, **{"cases": cases, **changes})


def test_a_small_calibration() -> None:
    steps: list[str] = []
    found = calibrate.calibrate(CPU, small(), on_step=steps.append)
    (only,) = found.entries
    assert (only.family, only.head_dim, only.samples) == ("cpu", 32, 12)
    assert len(steps) == calibrate.steps(small()) == 12
    work = Work(rows=8, tiles=40)
    assert 0 < float(only.coefficients.seconds(work)) < 60
    assert 0 <= only.error <= only.worst
    assert Calibration(**dataclasses.asdict(found) | {"entries": found.entries}) == found


@pytest.mark.gpu
def test_predictions_for_a_gpu_are_close() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    options = CalibrationOptions.for_device(device, tokens=(8192, 16384, 32768, 65536))
    for entry in calibrate.calibrate(device, options).entries:
        assert entry.error < 0.15, entry


def test_too_few_measurements_are_refused() -> None:
    with pytest.raises(ValueError, match="too few"):
        calibrate.calibrate(CPU, small(tokens=(256,)))
    with pytest.raises(ValueError, match="too few"):
        calibrate.calibrate(CPU, small(limit=-1.0))  # the first length is always measured


def test_the_adaptive_policy_has_no_fixed_plan_to_measure() -> None:
    with pytest.raises(ValueError, match="calibrate with patterns"):
        calibrate.calibrate(CPU, small(cases=parse_cases(["adaptive"])))


def test_the_command_measures_prints_and_keeps(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", "--calibrate", "--device", "cpu", "--tokens", "192", "--heads", "2", "--kv-heads", "1",
                 "--head-dim", "32", "--repeats", "1"]  # fmt: skip
    assert cli.main(arguments) == 0
    assert str(cost_file(CPU)) in capsys.readouterr().out
    assert cost_file(CPU).is_file()
    assert cli.main([*arguments, "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["schema"] == SCHEMA
    assert cli.main([*arguments, "--tune", "--cases", "dense"]) == 2
    assert "no use for --cases and --tune" in capsys.readouterr().err
    assert cli.main([*arguments, "--dtype", "int8"]) == 2
    assert "bf16" in capsys.readouterr().err


# --- what runs


def test_attention_is_planned_by_what_was_measured() -> None:
    assert coefficients_for(CPU, "cpu", 64, CPU_TILES).coefficients == PRIOR
    save(calibration(entry()), CPU)
    found = coefficients_for(CPU, "cpu", 64, CPU_TILES)
    assert found.measured
    assert found.coefficients == TRUTH
    assert not found.problem


def test_a_damaged_file_is_told_and_built_in_costs_serve() -> None:
    save(calibration(entry()), CPU)
    cost_file(CPU).write_text("{")
    found = coefficients_for(CPU, "cpu", 96, CPU_TILES)  # asked for the first time
    assert found.coefficients == default_coefficients("cpu", 96, CPU_TILES)
    assert "measure again" in found.problem
    assert not found.measured
