"""How much errors count for the output of a model, and which choice changes it least."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from mmi_compile.head_choice import Choice, LayerResult, Scored, choose, choose_uniform
from mmi_compile.head_measure import LAST_ROWS
from mmi_compile.kernels.patterns import AShape, Dense, HeadPattern
from mmi_compile.output_error import LEAST_WEIGHT, Heads, OutputError, Shown, best, weighed

CHEAP, MIDDLE = AShape(16, 64), AShape(16, 256)


def shown(output: Any, rows: Any = "all", mask: Tensor | None = None) -> Shown:
    found = Shown.of(output, mask, rows)
    assert found is not None
    return found


# --- outputs


class Logits:
    """Stands in for what a transformer returns."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


@pytest.mark.parametrize("wrap", [Logits, lambda x: {"hidden": x[..., :3], "logits": x}])
def test_logits_are_compared_by_their_divergence(wrap: Callable[[Tensor], Any]) -> None:
    a, b = torch.randn(2, 1, 40, 11)
    expected = torch.nn.functional.kl_div(
        b[0].log_softmax(-1), a[0].log_softmax(-1), reduction="batchmean", log_target=True
    )
    assert shown(wrap(a)).divergence(shown(wrap(b))) == pytest.approx(float(expected), rel=1e-5)
    assert shown(wrap(a)).divergence(shown(wrap(a + 3))) == pytest.approx(0, abs=1e-6)  # the same probabilities


def test_words_that_the_model_rules_out_do_not_count() -> None:
    a, b = torch.randn(2, 1, 40, 11)
    ruled_out = torch.zeros(11, dtype=torch.bool)
    ruled_out[[0, 7]] = True
    less = [x[..., ~ruled_out] for x in (a, b)]
    given = [x.masked_fill(ruled_out, float("-inf")) for x in (a, b)]
    expected = shown(Logits(less[0])).divergence(shown(Logits(less[1])))
    assert shown(Logits(given[0])).divergence(shown(Logits(given[1]))) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_an_output_that_is_no_number_is_far_off(wrong: float) -> None:
    def run(number: int, heads: Heads) -> Shown:
        return Shown(torch.full((1, 3), wrong if heads else 1.0), torch.ones(1), False)

    output = OutputError(run, 1, lambda *key: None, lambda *at: None)
    assert output.of({0: [CHEAP]}) == 1e30


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (torch.zeros(3), x), lambda x: {"hidden": x}])
def test_other_outputs_are_compared_by_their_error(wrap: Callable[[Tensor], Any]) -> None:
    a = torch.randn(1, 40, 11)
    assert shown(wrap(a)).divergence(shown(wrap(1.5 * a))) == pytest.approx(0.25, rel=1e-5)


@pytest.mark.parametrize("output", [None, torch.ones(4, 4), "text", {"ids": torch.ones(1, 4, 4, dtype=torch.int64)}])
def test_some_outputs_cannot_be_compared(output: Any) -> None:
    assert Shown.of(output, None, "both") is None


def test_the_last_rows_can_be_all_that_counts() -> None:
    a = torch.randn(1, 3 * LAST_ROWS, 5)
    early, late = a.clone(), a.clone()
    early[:, :LAST_ROWS] += 1
    late[:, -10:] += 1
    assert shown(a, "last").divergence(shown(early, "last")) == 0
    by_rows = [shown(a, rows).divergence(shown(late, rows)) for rows in ("all", "both", "last")]
    assert by_rows == sorted(by_rows)
    assert 0 < by_rows[0] < by_rows[2]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_count(side: str) -> None:
    a, mask = torch.randn(2, 100, 5), torch.ones(2, 100)
    dead = slice(0, 60) if side == "left" else slice(40, 100)
    mask[1, dead] = 0
    b = a.clone()
    b[1, dead] += 100
    assert shown(a, "both", mask).divergence(shown(b, "both", mask)) == 0
    assert shown(a, "both").divergence(shown(b, "both")) > 0


def test_an_output_may_hold_the_last_rows_only() -> None:
    a, mask = torch.randn(1, 1, 5), torch.ones(1, 100)
    assert shown(a, "both", mask).divergence(shown(2 * a, "both", mask)) == pytest.approx(1)


# --- weights


def layer(*errors: float) -> LayerResult:
    heads = [
        (Scored(CHEAP, e, 0.5, 0.1, 0.1), Scored(MIDDLE, e / 2, 0.8, 0.4, 0.4), Scored(Dense(), 0, 1, 1, 1))
        for e in errors
    ]
    return LayerResult(tuple(heads), (1.0,) * len(errors))


def output_of(change: Callable[[Heads], float | None], prompts: int = 1) -> tuple[OutputError, list[Heads]]:
    """Outputs whose divergence is known, and what has run."""
    ran: list[Heads] = []

    def run(number: int, heads: Heads) -> Shown | None:
        ran.append(heads)
        value = change(heads) if heads else 0.0
        return None if value is None else Shown(torch.tensor([[1.0 + value**0.5]]), torch.ones(1), False)

    kept: dict[tuple[str, int], float] = {}
    return OutputError(run, prompts, lambda *key: kept.get(key), lambda *at: kept.update({at[:2]: at[2]})), ran


def sparse(heads: Heads) -> Mapping[int, list[HeadPattern]]:
    return {place: [p for p in row if not isinstance(p, Dense)] for place, row in heads.items()}


def test_layers_count_by_what_they_change() -> None:
    layers = [layer(0.2, 0.2), layer(0.2, 0.2), layer(0.2, 0.2)]
    matters = {0: 0.3, 1: 0.0, 2: 0.1}
    output, ran = output_of(lambda heads: sum(matters[place] * bool(p) for place, p in sparse(heads).items()))
    found = weighed(layers, 0.1, output, "layers")
    assert found[0].weights[0] == pytest.approx(3 * found[2].weights[0], rel=1e-3)
    assert found[1].weights == (LEAST_WEIGHT, LEAST_WEIGHT)
    assert len(ran) == 1 + 1 + 3  # exact, by the kernels that run plans, and each layer
    picked = choose(found, 0.3).heads
    assert sum(s.cost for s in picked[0]) > sum(s.cost for s in picked[1])


def test_heads_count_by_what_they_change() -> None:
    layers = [layer(0.2, 0.2), layer(0.4, 0.2)]

    def change(heads: Heads) -> float:
        return 0.1 * any(not isinstance(row[0], Dense) for row in heads.values())

    output, ran = output_of(change)
    found = weighed(layers, 0.1, output, "heads")
    assert found[0].weights[0] == pytest.approx(4 * found[1].weights[0], rel=1e-3)  # the same change by half the error
    assert found[0].weights[1] == found[1].weights[1] == LEAST_WEIGHT
    assert len(ran) == 1 + 1 + 4


def test_what_rounding_alone_changes_does_not_count() -> None:
    layers = [layer(0.2), layer(0.2)]
    output, _ = output_of(lambda heads: 0.05 + 0.1 * bool(sparse(heads).get(0)))
    found = weighed(layers, 0.1, output, "layers")
    assert found[0].weights == pytest.approx((2.0,), rel=1e-3)
    assert found[1].weights == (LEAST_WEIGHT,)


@pytest.mark.parametrize("change", [None, 0.0])
def test_layers_count_alike_where_the_output_says_nothing(change: float | None) -> None:
    layers = [layer(0.2), layer(0.4)]
    output, _ = output_of(lambda heads: change)
    assert weighed(layers, 0.1, output, "layers") == layers


def test_nothing_runs_twice() -> None:
    layers = [layer(0.2), layer(0.2)]
    output, ran = output_of(lambda heads: 0.1, prompts=2)
    first = weighed(layers, 0.1, output, "layers")
    count = len(ran)
    assert weighed(layers, 0.1, output, "layers") == first
    assert len(ran) == count


# --- the best choice


def of_all(pattern: HeadPattern, *changes: float) -> Choice:
    return Choice(tuple((Scored(pattern, 0.1, 0.5, 0.1, 0.1),) for _ in range(2)), 0.1, 0.1)


@pytest.mark.parametrize(("others", "expected"), [(0.05, MIDDLE), (0.098, CHEAP), (0.2, CHEAP)])
def test_another_choice_must_change_the_output_less(others: float, expected: HeadPattern) -> None:
    output, _ = output_of(lambda heads: 0.1 if heads[0][0] == CHEAP else others)
    found = best([of_all(CHEAP), of_all(MIDDLE)], output)
    assert found.heads[0][0].pattern == expected


def test_the_first_choice_is_taken_where_outputs_cannot_be_compared() -> None:
    output, _ = output_of(lambda heads: None)
    assert best([of_all(CHEAP), of_all(MIDDLE)], output).heads[0][0].pattern == CHEAP


@pytest.mark.parametrize(("mode", "budget", "expected"), [
    ("share", 0.25, MIDDLE), ("share", 0.15, CHEAP), ("equal", 0.25, CHEAP), ("share", 0.05, None),
])  # fmt: skip
def test_one_pattern_for_all_heads_keeps_the_budget(mode: Any, budget: float, expected: HeadPattern | None) -> None:
    layers = [layer(0.2, 0.2)]
    options = [
        [[Scored(CHEAP, 0.2, 0.5, 0.1, 0.1)] * 2],
        [[Scored(MIDDLE, 0.1, 0.5, 0.1, 0.1), Scored(MIDDLE, 0.1, 0.5, 0.4, 0.4)]],
    ]
    found = choose_uniform(options, layers, budget, mode=mode)
    assert (None if found is None else found.heads[0][0].pattern) == expected
