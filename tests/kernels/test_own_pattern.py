"""Patterns of the user's own: what they keep, in plans and in whole models, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import mmi_compile
from mmi_compile import OwnPattern, register_pattern, show
from mmi_compile.head_config import HeadConfig, HeadConfigError
from mmi_compile.head_search import Candidates
from mmi_compile.kernels import patterns as patterns_module
from mmi_compile.kernels.boundaries import build_bounded_plan
from mmi_compile.kernels.cost import expected_work
from mmi_compile.kernels.cpu import attention_cpu
from mmi_compile.kernels.frames import TileShape
from mmi_compile.kernels.geometry import Geometry
from mmi_compile.kernels.layer_heads import LayerHeads, parse_heads
from mmi_compile.kernels.patterns import AShape, ByModality, Pattern, from_json
from mmi_compile.kernels.planner import build_plan, lower_rules
from mmi_compile.kernels.reference import attention_reference
from mmi_compile.kernels.rules import estimate_rules
from mmi_compile.kernels.segments import segment
from mmi_compile.kernels.structured import Structure, structured_qkv
from tests import models
from tests.host_waits import NoHostWaits
from tests.kernels.test_boundaries import check
from tests.kernels.test_planner import assert_between
from tests.random_plans import check_contract
from tests.strategies import geometries, patterns, random_inputs, tile_shapes

SCALE = 0.3


@dataclass(frozen=True)
class Lines(OwnPattern):
    keys: tuple[int, ...] = ()
    back: tuple[int, ...] = ()
    sink: int = 0
    local: int = 1
    name: ClassVar[str] = "test_lines"

    def columns(self, keys: int) -> Iterable[int]:
        return self.keys

    def distances(self, positions: int) -> Iterable[int]:
        return self.back


@dataclass(frozen=True)
class Powers(OwnPattern):
    name: ClassVar[str] = "test_powers"

    def distances(self, positions: int) -> Iterable[int]:
        return (1 << bit for bit in range(positions.bit_length()))


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    with patch.dict(patterns_module._KINDS):
        register_pattern(Lines)
        register_pattern(Powers)
        yield


def own_patterns() -> st.SearchStrategy[Pattern]:
    places = st.lists(st.integers(-3, 120), max_size=6).map(tuple)
    lines = st.builds(Lines, places, places, st.integers(0, 20), st.integers(1, 20))
    return st.one_of(lines, st.builds(Lines), st.builds(Powers))


def formula(pattern: Any, g: Geometry) -> torch.Tensor:
    """What the head keeps, pair by pair, bool ``[B, q_len, kv_len]``, without the model's mask."""
    live = g.live_keys("cpu")
    keep = torch.zeros(g.batch, g.q_len, g.kv_len, dtype=torch.bool)
    for b in range(g.batch):
        alive = range(g.kv_len) if live is None else live[b].nonzero().flatten().tolist()
        first = min(alive, default=g.kv_len)
        for row in range(g.q_len):
            i = row + g.q_offset
            for j in range(g.kv_len):
                column = j - first in set(pattern.columns(g.kv_len)) and j >= first
                back = i - j in set(pattern.distances(g.q_len + g.q_offset))
                near = j < first + getattr(pattern, "sink", 0) or i - j < getattr(pattern, "local", 1)
                keep[b, row, j] = column or back or near
    return keep


@given(geometries(max_len=40), own_patterns())
def test_rules_are_the_formula(geometry: Geometry, pattern: Pattern) -> None:
    x = random_inputs(geometry)
    rules = estimate_rules([pattern] * geometry.q_heads, x.q, x.k, geometry, SCALE, TileShape(16, 16))
    expected = formula(pattern, geometry) & geometry.to_mask()
    assert torch.equal(rules.to_mask(geometry), expected[:, None].expand(-1, geometry.q_heads, -1, -1))


@given(geometries(), tile_shapes(), st.data())
def test_plans_cover_own_patterns_among_others(geometry: Geometry, tiles: TileShape, data: st.DataObject) -> None:
    chosen = [data.draw(st.one_of(own_patterns(), patterns())) for _ in range(geometry.q_heads)]
    x = random_inputs(geometry, seed=data.draw(st.integers(0, 99)))
    with NoHostWaits():
        rules = estimate_rules(chosen, x.q, x.k, geometry, SCALE, tiles)
        plan = lower_rules(rules, geometry, tiles)
    assert_between(rules, plan, geometry)
    mask = plan.to_mask()
    out = attention_cpu(x.q, x.k, x.v, plan, SCALE)
    torch.testing.assert_close(out, attention_reference(x.q, x.k, x.v, mask, SCALE))


@given(geometries(windows=False), tile_shapes(), st.data())
def test_they_hold_in_regions(geometry: Geometry, tiles: TileShape, data: st.DataObject) -> None:
    pairs = st.tuples(st.integers(0, 2), st.integers(0, 2))
    by_rows = st.lists(st.tuples(st.integers(0, 2), own_patterns()), max_size=2).map(tuple)
    by_region = st.lists(st.tuples(pairs, own_patterns()), max_size=3).map(tuple)
    heads = st.one_of(
        own_patterns(),
        st.builds(ByModality, st.just("q"), own_patterns(), by_rows),
        st.builds(ByModality, st.just("2d"), own_patterns(), by_region),
    )
    chosen = [data.draw(heads) for _ in range(geometry.q_heads)]
    flat = data.draw(st.lists(st.integers(0, 2), min_size=geometry.kv_len, max_size=geometry.kv_len))
    ids = torch.tensor(flat, dtype=torch.int8).expand(geometry.batch, -1)
    check_contract(check(chosen, ids, geometry, tiles, (0, 1, 2)))


def test_columns_of_a_region_are_ranks_of_its_keys() -> None:
    ids = (torch.arange(64) % 2).to(torch.int8)[None]  # every other token is of modality 1
    g, tiles = Geometry(1, 1, 1, 64, 64), TileShape(1, 1)
    x = random_inputs(g)
    head = ByModality("2d", Lines(), (((1, 1), Lines(keys=(3,))),))
    mask = build_bounded_plan([head], x.q, x.k, g, SCALE, tiles, segment(ids, (0, 1), g, tiles)).to_mask()[0, 0]
    assert mask[63, 7]  # the fourth key of modality 1
    assert not mask[63, 3]
    assert not mask[62, 7]  # a row of the other modality


def test_an_unchanged_a_shape_is_the_built_in_one() -> None:
    g, tiles = Geometry(1, 2, 1, 300, 300), TileShape(32, 32)
    x = random_inputs(g)
    plan = build_plan([Lines(sink=20, local=50), AShape(20, 50)], x.q, x.k, g, SCALE, tiles)
    mask = plan.to_mask()
    assert torch.equal(mask[:, 0], mask[:, 1])


def test_a_length_is_asked_once() -> None:
    asked = []

    @register_pattern
    @dataclass(frozen=True)
    class Counted(OwnPattern):
        name: ClassVar[str] = "test_counted"

        def columns(self, keys: int) -> Iterable[int]:
            asked.append(keys)
            return range(0, keys, 16)

    g, tiles = Geometry(1, 2, 1, 100, 100), TileShape(16, 16)
    x = random_inputs(g)
    for _ in range(3):
        build_plan([Counted()] * 2, x.q, x.k, g, SCALE, tiles)
    assert asked == [100, 100]  # by each head


# --- files and graphs ------------------------------------------------------------------------------------------------


@given(own_patterns())
def test_json_and_graph_constants_round_trip(pattern: Pattern) -> None:
    assert from_json(json.loads(json.dumps(pattern.to_json()))) == pattern
    heads = LayerHeads((pattern, AShape(1, 2), ByModality("q", AShape(1, 2), ((1, pattern),))))
    assert parse_heads(heads.to_text()) == heads


def config(head: dict[str, Any], layers: int = 2) -> dict[str, Any]:
    fingerprint = {"layers": layers, "q_heads": 4, "kv_heads": 2, "head_dim": 16}
    return {"version": 1, "fingerprint": fingerprint, "layers": [{"heads": [{"count": 4, **head}]}] * layers}


@pytest.mark.fresh_dynamo
def test_a_model_runs_one() -> None:
    head = {"pattern": {"pattern": "test_lines", "keys": [5, 70], "back": [64], "sink": 4, "local": 32}}
    model, inputs = models.qwen2(tokens=600)
    with torch.no_grad():
        dense = model(**inputs).logits
        mmi_compile.compile(
            model, policy="config", head_config=config(head), inner="eager", min_tokens=0, strict=True, verify=1.0
        )
        sparse = model(**inputs).logits
    report = mmi_compile.last_report()
    assert report is not None
    _, run = report.runs()[-1]
    assert run["patterns"][0][0].startswith("test_lines((5, 70), (64,), 4, 32): density")
    # Rows of the first tile see all that they may: only later ones differ.
    torch.testing.assert_close(sparse[:, :64], dense[:, :64], rtol=1e-4, atol=1e-4)
    assert not torch.equal(sparse, dense)


def test_a_search_takes_one_where_it_fits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MMI_CACHE_DIR", str(tmp_path))
    n = 768
    x = structured_qkv([Structure(columns=(3, 200), local=8)], n, head_dim=32)
    candidates = Candidates((AShape(64, 64), Lines(keys=(3, 200), sink=0, local=64)), boundaries=("none",))

    class One(torch.nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    found = mmi_compile.search(
        One().eval(), dict(zip("qkv", (x.q, x.k, x.v), strict=True)), budget=0.9, unit="tiles", candidates=candidates,
        dense_tail=False, resume=tmp_path / "measured.json", progress=False,
    )  # fmt: skip
    (entry,) = found.layers[0]
    assert entry.pattern == Lines(keys=(3, 200), sink=0, local=64)


def test_a_file_with_an_unknown_one_says_what_to_do() -> None:
    with pytest.raises(HeadConfigError, match="import the module that registers it"):
        HeadConfig.from_json(config({"pattern": {"pattern": "zzz"}}))
    with pytest.raises(HeadConfigError, match='did you mean "local"'):
        HeadConfig.from_json(config({"pattern": {"pattern": "test_lines", "locl": 3}}))


def test_a_map_shows_them() -> None:
    from rich.console import Console

    console = Console(width=100)
    with console.capture() as captured:
        console.print(show.terminal_map(HeadConfig.from_json(config({"pattern": {"pattern": "test_powers"}}))))
    assert "O test_powers × 8" in captured.get()


def test_registering_again_replaces_what_graphs_run() -> None:
    text = LayerHeads((Powers(),)).to_text()
    assert type(parse_heads(text).patterns[0]) is Powers

    @register_pattern
    @dataclass(frozen=True)
    class Again(OwnPattern):
        name: ClassVar[str] = "test_powers"

    assert type(parse_heads(text).patterns[0]) is Again


# --- bad input -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Nameless(OwnPattern):
    pass


@dataclass(frozen=True)
class Taken(OwnPattern):
    name: ClassVar[str] = "grid"


class Plain(OwnPattern):
    name: ClassVar[str] = "test_plain"


@dataclass(frozen=True)
class Ambiguous(OwnPattern):
    pattern: int = 0
    name: ClassVar[str] = "test_ambiguous"


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (Nameless, "has no name"),
        (Taken, "built in"),
        (Plain, "no frozen dataclass"),
        (AShape, "no subclass of OwnPattern"),
        (Ambiguous, 'a field "pattern"'),
        (3, "no subclass of OwnPattern"),
    ],
)
def test_classes_that_are_no_patterns_are_refused(kind: Any, says: str) -> None:
    with pytest.raises((TypeError, ValueError), match=says):
        register_pattern(kind)


def test_one_that_is_not_registered_is_refused_before_it_runs() -> None:
    @dataclass(frozen=True)
    class Unknown(OwnPattern):
        name: ClassVar[str] = "test_unknown"

    with pytest.raises(ValueError, match=r"test_unknown: .*Unknown is not registered"):
        LayerHeads((Unknown(),)).to_text()
    before = Powers()
    register_pattern(dataclass(frozen=True)(type("Powers", (OwnPattern,), {"name": "test_powers"})))
    with pytest.raises(ValueError, match="another class has taken its name"):
        before.to_json()


def test_parameters_are_checked() -> None:
    with pytest.raises(ValueError, match="test_lines: local is 0; give 1 or more"):
        Lines(local=0)
    with pytest.raises(TypeError, match="sink must be an int"):
        Lines(sink=1.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="test_lines: parameters must be hashable"):
        Lines(keys={3: 4})  # type: ignore[arg-type]


def test_lines_that_are_no_tokens_are_named() -> None:
    g, x = Geometry(1, 1, 1, 40, 40), random_inputs(Geometry(1, 1, 1, 40, 40))
    with pytest.raises(TypeError, match=r"test_lines.columns must give ints \(tokens\), gave 2.5"):
        build_plan([Lines(keys=(2.5,))], x.q, x.k, g, SCALE, TileShape(16, 16))  # type: ignore[arg-type]


def test_their_cost_is_not_guessed() -> None:
    with pytest.raises(ValueError, match="the cost of test_powers is known from its plan"):
        expected_work(Powers(), 1000, 1000, TileShape(64, 64))
