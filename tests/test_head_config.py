"""Head configs: what is written is what is read, what is refused names its place, and other formats come in."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmi_compile.decision import MMIError
from mmi_compile.head_config import Boundary, Fingerprint, HeadConfig, HeadConfigError, HeadEntry, Provenance
from mmi_compile.kernels.patterns import (
    AShape,
    BlockTopK,
    ByModality,
    Dense,
    Grid,
    PlacedError,
    TriShape,
    VerticalSlash,
    head_from_json,
)
from tests.strategies import patterns

NAMES = {0: "text", 1: "image", 2: "video"}
VIDEO = ByModality("2d", AShape(8, 16), (((2, 2), VerticalSlash(20, 30)), ((0, 2), Grid(None, 1, 2))))
ROWS = ByModality("q", Dense(), ((1, TriShape(1, 2, 3)),))

ids = st.sampled_from(sorted(NAMES))
in_regions = patterns().filter(lambda p: not (isinstance(p, Grid) and p.query_lines))
block_topk = st.one_of(
    st.builds(BlockTopK, k=st.integers(1, 512), scoring=st.sampled_from(["mean", "antidiagonal"])),
    st.builds(BlockTopK, mass=st.floats(0.01, 0.99), stride=st.integers(4, 32)),
)
by_rows = st.dictionaries(ids, in_regions, max_size=3).map(lambda found: tuple(found.items()))
by_regions = st.dictionaries(st.tuples(ids, ids), in_regions, max_size=4).map(lambda found: tuple(found.items()))
heads = st.one_of(
    patterns(),
    block_topk,
    st.builds(ByModality, st.just("q"), in_regions, by_rows),
    st.builds(ByModality, st.just("2d"), in_regions, by_regions),
)
numbers = st.none() | st.floats(allow_nan=False, allow_infinity=False)
shares = st.none() | st.floats(0, 1)


@st.composite
def entries(draw: st.DrawFn) -> HeadEntry:
    pattern = draw(heads)
    boundary: Boundary = pattern.boundary if isinstance(pattern, ByModality) else draw(st.sampled_from(["none", "k"]))
    return HeadEntry(pattern, boundary, draw(numbers), draw(shares), draw(shares))


@st.composite
def configs(draw: st.DrawFn) -> HeadConfig:
    layers, kv_heads = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    q_heads = kv_heads * draw(st.integers(1, 3))
    pool = draw(st.lists(entries(), min_size=1, max_size=3))  # few kinds, so that neighbours are equal
    layer = st.lists(st.sampled_from(pool), min_size=q_heads, max_size=q_heads).map(tuple)
    return HeadConfig(
        Fingerprint(layers, q_heads, kv_heads, 8, draw(st.none() | st.just(64)), draw(st.none() | st.text(max_size=5))),
        tuple(draw(st.lists(layer, min_size=layers, max_size=layers))),
        NAMES,
        draw(
            st.builds(
                Provenance,
                samples=st.none() | st.integers(0, 9),
                budget=st.none() | st.floats(0, 1),
                device=st.none() | st.text(max_size=5),
                versions=st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=2),
            )
        ),
    )


def example() -> HeadConfig:
    """Two layers of four heads with every boundary."""
    same = HeadEntry(VerticalSlash(1000, 1024), recall=0.9)
    layers = (
        (same, same, same, HeadEntry(VIDEO, density=0.25)),
        (HeadEntry(ROWS, score=-1.5), HeadEntry(AShape(1, 2), "k"), HeadEntry(BlockTopK(k=4)), HeadEntry(Dense())),
    )
    provenance = Provenance("search", 1, 4096, 0.2, "a GPU", {"torch": "2.11"}, "2025-01-31T10:00:00Z")
    return HeadConfig(Fingerprint(2, 4, 2, 64, 256, "qwen"), layers, NAMES, provenance)


# ---------------------------------------------------------------------------------------------------------------------
# What is written is what is read


@given(configs())
def test_round_trip_through_json(config: HeadConfig) -> None:
    data = json.loads(json.dumps(config.to_json(), allow_nan=False))
    assert HeadConfig.from_json(data) == config
    assert HeadConfig.load(data) == config
    assert hash(HeadConfig.from_json(data)) == hash(config)


@given(config=configs())
def test_round_trip_through_a_file(config: HeadConfig, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("heads") / "heads.json"
    config.save(path)
    first = path.read_bytes()
    assert HeadConfig.load(path) == HeadConfig.load(str(path)) == config
    assert list(json.loads(first)) == ["version", "fingerprint", "provenance", "modalities", "layers"]
    HeadConfig.load(path).save(path)
    assert path.read_bytes() == first
    assert [p.name for p in path.parent.iterdir()] == ["heads.json"]


@given(heads)
def test_patterns_of_heads_round_trip(pattern: Any) -> None:
    assert head_from_json(json.loads(json.dumps(pattern.to_json()))) == pattern


def test_one_line_for_equal_neighbours(tmp_path: Path) -> None:
    data = example().to_json()
    assert [head.get("count", 1) for head in data["layers"][0]["heads"]] == [3, 1]
    example().save(tmp_path / "c.json")
    lines = (tmp_path / "c.json").read_text().splitlines()
    assert sum('"pattern"' in line for line in lines) == 2 + 4
    assert any(line.strip().startswith('{"count": 3, "pattern": {"pattern": "vertical_slash"') for line in lines)


def test_boundaries_follow_from_patterns() -> None:
    found = [entry.boundary for layer in example().layers for entry in layer]
    assert found == ["none", "none", "none", "2d", "q", "k", "none", "none"]
    assert "boundary" not in HeadEntry(VIDEO).to_json()
    assert HeadEntry(Dense(), "k").to_json()["boundary"] == "k"
    with pytest.raises(HeadConfigError, match='boundary: is "k", but that of the pattern is 2d'):
        HeadEntry(VIDEO, "k")
    with pytest.raises(HeadConfigError, match='boundary: is "2d", but that of the pattern is none or k'):
        HeadEntry(Dense(), "2d")


def test_saving_replaces_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c.json"
    path.write_text("old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(HeadConfigError, match=r"c\.json: cannot be written: No space left"):
        example().save(path)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["c.json"]


def test_saving_into_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HeadConfigError, match="cannot be written: No such file or directory; give a folder"):
        example().save(tmp_path / "nowhere" / "c.json")


def test_saving_follows_links(tmp_path: Path) -> None:
    (tmp_path / "link.json").symlink_to(tmp_path / "real.json")
    example().save(tmp_path / "link.json")
    assert (tmp_path / "link.json").is_symlink()
    assert HeadConfig.load(tmp_path / "real.json") == example()


# ---------------------------------------------------------------------------------------------------------------------
# What is refused names its place


@given(st.data(), configs())
def test_a_corrupted_value_is_named(data: st.DataObject, config: HeadConfig) -> None:
    broken: Any = json.loads(json.dumps(config.to_json()))
    places = list(_places(broken))
    place, holder, key = data.draw(st.sampled_from(places))
    holder[key] = data.draw(st.sampled_from([value for value in _ALIENS if _alien(value, holder[key])]))
    with pytest.raises(HeadConfigError) as caught:
        HeadConfig.from_json(broken)
    # Of two fields that exclude each other, the pattern that holds both is named.
    assert caught.value.place in (place, place.rpartition(".")[0])
    assert caught.value.place == place or "give exactly one of them" in caught.value.problem


@given(st.data(), configs())
def test_an_unknown_key_is_named(data: st.DataObject, config: HeadConfig) -> None:
    broken: Any = json.loads(json.dumps(config.to_json()))
    objects = [(p, h[k]) for p, h, k in _places(broken) if isinstance(h[k], dict)] + [("", broken)]
    # Names and versions are free.
    objects = [(p, o) for p, o in objects if p not in ("modalities", "provenance.versions")]
    place, holder = data.draw(st.sampled_from(objects))
    holder["scroe"] = 1
    with pytest.raises(HeadConfigError, match=r"unknown (key|option)") as caught:
        HeadConfig.from_json(broken)
    assert caught.value.place == (f"{place}.scroe" if place else "scroe")


@given(st.data(), configs())
def test_a_missing_key_is_named_or_has_a_default(data: st.DataObject, config: HeadConfig) -> None:
    broken: Any = json.loads(json.dumps(config.to_json()))
    place, holder, key = data.draw(st.sampled_from([p for p in _places(broken) if isinstance(p[1], dict)]))
    del holder[key]
    error = _refusal(broken)
    if error is None:
        entry = ("provenance", "modalities", "hidden_size", "model_type", "score", "recall", "density", "boundary")
        pattern = ("query_lines", "same_phase", "scoring", "stride", "local", "sink", "k", "mass")
        assert place.startswith(("provenance.", "modalities.")) or key in entry + pattern
    elif place.startswith("modalities"):
        assert error.place.startswith("layers[")
        assert "has no name" in error.problem
    else:
        above = place.rpartition(".")[0]
        assert error.place in (place, above, above.rpartition("[")[0] if key == "count" else above)


def _refusal(data: dict[str, Any]) -> HeadConfigError | None:
    try:
        HeadConfig.from_json(data)
    except HeadConfigError as error:
        return error
    return None


@given(data=st.data(), config=configs())
def test_a_cut_file_is_refused(
    data: st.DataObject, config: HeadConfig, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("cut") / "c.json"
    config.save(path)
    raw = path.read_bytes()
    path.write_bytes(raw[: data.draw(st.integers(0, len(raw.rstrip()) - 1))])
    with pytest.raises(HeadConfigError, match=r"c\.json: (ends too early, in line \d+: it was cut short|is empty)"):
        HeadConfig.load(path)


@given(data=st.data(), config=configs())
def test_a_wrong_byte_never_raises_anything_else(
    data: st.DataObject, config: HeadConfig, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("byte") / "c.json"
    config.save(path)
    raw = bytearray(path.read_bytes())
    raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(raw))
    loaded = None
    with contextlib.suppress(HeadConfigError):
        loaded = HeadConfig.load(path)
    assert loaded is None or HeadConfig.from_json(loaded.to_json()) == loaded


H00, H01, H10, H11, H12 = (("layers", n, "heads", m) for n, m in ((0, 0), (0, 1), (1, 0), (1, 1), (1, 2)))
WRONG: list[tuple[tuple[str | int, ...], Any, str]] = [
    (
        (*H00, "pattern", "n_slash"),
        "many",
        'layers[0].heads[0].pattern.n_slash: must be an int of 1 or more, is "many"',
    ),
    ((*H00, "pattern", "n_slash"), 0, "layers[0].heads[0].pattern.n_slash: is 0; give 1 or more"),
    ((*H00, "pattern", "n_slsh"), 0, "layers[0].heads[0].pattern.n_slsh: unknown option "),
    ((*H00, "pattern", "n_slash"), ..., "layers[0].heads[0].pattern: pattern vertical_slash lacks n_slash; add it"),
    ((*H00, "count"), 10**12, "layers[0].heads: holds 1000000000001 heads, but fingerprint.q_heads is 4"),
    ((*H00, "count"), True, "layers[0].heads[0].count: must be an int of 1 or more, is true"),
    (
        (*H01, "pattern", "patterns", 0, "n_vertical"),
        None,
        "layers[0].heads[1].pattern.patterns[0].n_vertical: must be an",
    ),
    ((*H01, "pattern", "patterns", 0, "key"), 7, "layers[0].heads[1].pattern.patterns[0].key: is 7, which has no name"),
    ((*H01, "pattern", "patterns", 1, "query"), 2, "layers[0].heads[1].pattern.patterns[1]: names [2, 2] once more"),
    (
        (*H01, "pattern", "default"),
        {"pattern": "block_topk", "k": 1},
        "layers[0].heads[1].pattern.default: block_topk within a boundary is not built",
    ),
    ((*H10, "pattern", "patterns", 0, "key"), 1, "layers[1].heads[0].pattern.patterns[0].key: is only for boundary 2d"),
    ((*H10, "pattern", "boundary"), "k", 'layers[1].heads[0].pattern.boundary: must be "q" or "2d", is "k"'),
    ((*H10, "pattern", "boundary"), ..., 'layers[1].heads[0].pattern.boundary: must be "q" or "2d", is null'),
    ((*H10, "boundary"), "none", 'layers[1].heads[0].boundary: is "none", but that of the pattern is q; remove it'),
    ((*H10, "score"), math.nan, "layers[1].heads[0].score: must be a finite number, is NaN; leave it out"),
    ((*H10, "recall"), 1.5, "layers[1].heads[0].recall: must be a finite number from 0 to 1, is 1.5"),
    ((*H10, "recal"), 1, 'layers[1].heads[0].recal: unknown key; did you mean "recall"?'),
    (
        (*H11, "pattern", "pattern"),
        "a_shap",
        "layers[1].heads[1].pattern.pattern: unknown pattern 'a_shap'; did you mean",
    ),
    ((*H12, "pattern", "scoring"), "meen", "layers[1].heads[2].pattern.scoring: unknown scoring 'meen'; did you mean"),
    (
        (*H12, "pattern", "mass"),
        0.5,
        "layers[1].heads[2].pattern: block_topk: k is 4 and mass is 0.5; give exactly one",
    ),
    (H10, ..., "layers[1].heads: holds 3 heads, but fingerprint.q_heads is 4"),
    (("layers", 1), ..., "layers: holds 1 layers, but fingerprint.layers is 2"),
    (("fingerprint", "q_heads"), 4.0, "fingerprint.q_heads: must be an int of 1 or more, is 4.0"),
    (("fingerprint", "kv_heads"), 3, "fingerprint.kv_heads: must divide the 4 query heads, is 3"),
    (("fingerprint", "layers"), ..., "fingerprint: lacks layers"),
    (("fingerprnt",), {}, 'fingerprnt: unknown key; did you mean "fingerprint"?'),
    (("modalities", "image"), "1", "modalities.image: must be the id of a modality"),
    (
        ("modalities", "2"),
        ...,
        "layers[0].heads[1].pattern.patterns[0].query: is 2, which has no name; add it to modal",
    ),
    (("provenance", "date"), 2025, "provenance.date: must be a string, is 2025"),
    (("version",), 2, "version: is 2, and this package reads 1; upgrade mmi-compile to one that reads it, or write it"),
    (("version",), 0, "version: is 0, and this package reads 1; write it again with `mmi search`"),
    (("version",), ..., "lacks version"),
]


@pytest.mark.parametrize(("place", "value", "message"), WRONG)
def test_wrong_values_are_refused_with_their_place(place: tuple[str | int, ...], value: Any, message: str) -> None:
    data: Any = json.loads(json.dumps(example().to_json()))
    holder = data
    for key in place[:-1]:
        holder = holder[key]
    if value is ...:
        del holder[place[-1]]
    else:
        holder[place[-1]] = value
    with pytest.raises(HeadConfigError) as caught:
        HeadConfig.from_json(data)
    assert str(caught.value).startswith(message)
    assert isinstance(caught.value, MMIError)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no such file"),
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b"hello", "is not JSON: Expecting value in line 1, column 1"),
        (b'{"version": 1,}', "is not JSON"),
        (b'{"version": 1', "ends too early, in line 1: it was cut short"),
        (b'{"version": 1, "version": 1}', 'an object has the key "version" twice'),
        ('{"version": 1}'.encode("utf-16"), "is not UTF-8 text"),
        (b'{"version": "\xff"}', "is not UTF-8 text (byte 13)"),
        (b"[" * 100_000, "is not a head config"),
        (b"1" * 10_000, "is not a head config"),
        (b"[]", "is a list of layers, as MInference writes them; read it with HeadConfig.from_minference"),
        (b"3", "must be an object with version, fingerprint, layers, is 3"),
        (b"{}", "lacks version, fingerprint, layers"),
    ],
)
def test_files_that_are_no_config(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "c.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(HeadConfigError) as caught:
        HeadConfig.load(path)
    assert str(caught.value).startswith(f"{path}: {message}")


def test_a_folder_is_no_config(tmp_path: Path) -> None:
    with pytest.raises(HeadConfigError, match="cannot be read: Is a directory"):
        HeadConfig.load(tmp_path)


def test_a_byte_order_mark_is_read_over(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    example().save(path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert HeadConfig.load(path) == example()


def test_nan_in_a_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    example().save(path)
    path.write_text(path.read_text().replace("-1.5", "NaN"))
    with pytest.raises(
        HeadConfigError, match=r"c\.json: layers\[1\]\.heads\[0\]\.score: must be a finite number, is NaN"
    ):
        HeadConfig.load(path)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, True, "0.5"])
@pytest.mark.parametrize("name", ["score", "recall", "density"])
def test_numbers_of_entries_are_finite(name: str, value: Any) -> None:
    with pytest.raises(HeadConfigError, match=f"{name}: must be a"):
        HeadEntry(Dense(), **{name: value})


def test_layers_made_by_hand_are_checked_likewise() -> None:
    config = example()
    with pytest.raises(HeadConfigError, match=r"layers\[1\]\.heads: holds 3 heads"):
        dataclasses.replace(config, layers=(config.layers[0], config.layers[1][:3]))
    with pytest.raises(HeadConfigError, match=r"layers\[0\]\.heads\[3\]\.pattern\.patterns\[0\]\.query: is 2"):
        dataclasses.replace(config, modalities={0: "text"})


def test_errors_survive_pickling() -> None:
    for error in (HeadConfigError("version", "is 2", "c.json"), PlacedError("k", "is 2")):
        assert str(pickle.loads(pickle.dumps(error))) == str(error)


# ---------------------------------------------------------------------------------------------------------------------
# Fingerprints, slices, describe


def test_mismatch_names_every_difference() -> None:
    mine = Fingerprint(28, 28, 4, 128, 3584, "qwen2_5_vl")
    assert mine.mismatch(mine) is None
    assert mine.mismatch(Fingerprint(28, 28, 4, 128)) is None
    found = mine.mismatch(Fingerprint(32, 28, 2, 128, 4096))
    assert found == (
        "layers is 28 in the config and 32 in the model; kv_heads is 4 in the config and 2 in the model; "
        "hidden_size is 3584 in the config and 4096 in the model"
    )
    assert "world_size is 1 in the config and 2 in the model" in str(mine.mismatch(mine.slice(0, 2)))


@given(configs(), st.data())
def test_slices_partition_the_heads(config: HeadConfig, data: st.DataObject) -> None:
    whole = config.fingerprint
    fits = [
        n
        for n in range(1, whole.q_heads + 1)
        if whole.q_heads % n == 0 and (whole.kv_heads % n == 0 or n % whole.kv_heads == 0)
    ]
    world_size = data.draw(st.sampled_from(fits))
    slices = [config.slice(rank, world_size) for rank in range(world_size)]
    for number, layer in enumerate(config.layers):
        assert sum((part.layers[number] for part in slices), ()) == layer
    group = whole.q_heads // whole.kv_heads
    for rank, part in enumerate(slices):
        mine = part.fingerprint
        assert (mine.rank, mine.world_size) == (rank, world_size)
        assert HeadConfig.from_json(part.to_json()) == part
        # Each of the rank's query heads reads the kv head that it reads in the whole model.
        first = rank * mine.q_heads
        base = first // group
        for head in range(mine.q_heads):
            assert (first + head) // group == base + head // (mine.q_heads // mine.kv_heads)


def test_slices_that_do_not_fit_are_refused() -> None:
    config = example()
    with pytest.raises(HeadConfigError, match="world_size: must divide the 4 query heads, is 3"):
        config.slice(0, 3)
    with pytest.raises(HeadConfigError, match="rank: must be less than world_size 2, is 2"):
        config.slice(2, 2)
    with pytest.raises(HeadConfigError, match="this is slice 1 of 2 already"):
        config.slice(1, 2).slice(0, 2)
    many = HeadEntry(Dense())
    with pytest.raises(HeadConfigError, match="world_size: must divide the 6 kv heads or be a multiple, is 4"):
        HeadConfig(Fingerprint(1, 12, 6, 8), ((many,) * 12,)).slice(0, 4)


def test_describe() -> None:
    assert example().describe().splitlines() == [
        "2 layers of 4 query and 2 kv heads, head dim 64",
        "layer 0  none: 3 vertical_slash; 2d: 1 a_shape + grid + vertical_slash; density 0.250",
        "layer 1  none: 1 block_topk, 1 dense; k: 1 a_shape; q: 1 dense + tri_shape",
    ]
    assert example().slice(1, 2).describe().startswith("2 layers of 2 query and 1 kv heads, head dim 64, slice 1 of 2")


# ---------------------------------------------------------------------------------------------------------------------
# Other formats

MINFERENCE: list[dict[str, list[Any]]] = [
    {"0": ["vertical_and_slash", 1000, 6096, 336], "1": ["stream_llm", 100, 800, 0.96], "2": ["block_sparse", 8, 1, 2]},
    {"2": ["vertical_and_slash", 30, 800, 1.0], "0": ["vertical_and_slash", 3500, 10, 0], "1": ["stream_llm", 1, 0, 1]},
]


def test_provenance_is_one_line() -> None:
    assert Provenance().describe() == "unknown source"
    known = Provenance("search", 2, 32768, 0.25, "NVIDIA H100", {"torch": "2.11", "mmi-compile": "0.1.0"}, "2026-01-31")
    assert known.describe() == (
        "search · 2 samples of 32768 tokens · budget 0.25 · NVIDIA H100 · mmi-compile 0.1.0, torch 2.11 · 2026-01-31"
    )
    assert Provenance("MInference").describe() == "MInference"


def test_a_region_is_named_once() -> None:
    twice = ByModality("q", Dense(), ((1, Dense()), (0, Dense()), (1, AShape(1, 1))))
    with pytest.raises(HeadConfigError, match=r"pattern\.patterns\[2\]: names 1 once more; keep one of them"):
        HeadEntry(twice)


def test_heads_of_a_layer() -> None:
    by_rows = ByModality("q", Dense(), ((1, AShape(4, 8)),))
    layers = ((HeadEntry(Dense()), HeadEntry(Dense())), (HeadEntry(Dense()), HeadEntry(by_rows)))
    config = HeadConfig(Fingerprint(2, 2, 1, 8), layers, {1: "image", 0: "text"})
    assert config.bounded
    assert [config.heads_of(layer).bounded for layer in range(2)] == [False, True]
    assert config.heads_of(1).patterns == (Dense(), by_rows)
    assert config.heads_of(1).labels == (0, 1)
    assert config.heads_of(1).describe() == ("dense", "q(image: a_shape(4, 8), else: dense)")
    assert config.describe().endswith(f"layer 1  {config.describe_layer(1)}")


def test_minference(tmp_path: Path) -> None:
    config = HeadConfig.from_minference(MINFERENCE, kv_heads=1, head_dim=96, model_type="phi3")
    assert config.fingerprint == Fingerprint(2, 3, 1, 96, model_type="phi3")
    first, second = config.layers
    assert [entry.pattern for entry in first] == [VerticalSlash(1000, 6096), AShape(100, 800), BlockTopK(k=100)]
    assert [entry.pattern for entry in second] == [VerticalSlash(3500, 50), AShape(1, 1), VerticalSlash(30, 800)]
    assert [entry.score for entry in first] == [336.0, 0.96, 2.0]
    assert config.provenance.source == "MInference"
    (tmp_path / "m.json").write_text(json.dumps(MINFERENCE))
    assert HeadConfig.from_minference(tmp_path / "m.json", kv_heads=1, head_dim=96, model_type="phi3") == config


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([{"0": ["vertical_and_slash", 1000, 6096]}], r"^\[0\]\[0\]: must be \[pattern, number, number, score\], is "),
        ([{"0": ["vertical_slash", 1, 2, 3]}], r'^\[0\]\[0\]\[0\]: unknown pattern "vertical_slash"; did you mean'),
        ([{"0": ["flex_vertical_and_slash", [0.9, 4096], [0.9, 4096], 0.0]}], 'use policy="adaptive" with that recall'),
        ([{"0": ["vertical_and_slash", 1.5, 2, 3]}], r"^\[0\]\[0\]\[1\]: must be an int of 0 or more, is 1.5"),
        ([{"0": ["stream_llm", 1, 2, math.nan]}], r"^\[0\]\[0\]\[3\]: must be a finite number, is NaN"),
        ([{"0": MINFERENCE[0]["0"], "2": MINFERENCE[0]["0"]}], r"^\[0\]: holds 2 heads without number 1"),
        ([MINFERENCE[0], {"0": MINFERENCE[0]["0"]}], r"^\[1\]: holds 1 heads, but the layers before hold 3"),
        ([{"first": MINFERENCE[0]["0"]}], r'^\[0\]: must be heads by number, has the key "first"'),
        ([], "must be layers as a list or by number, is "),
        ([{}], r"^\[0\]: must be heads as a list or by number"),
        (example().to_json(), 'must be layers by number, has the key "version"'),
    ],
)
def test_what_minference_does_not_write(data: Any, message: str) -> None:
    with pytest.raises(HeadConfigError, match=message):
        HeadConfig.from_minference(data, kv_heads=1, head_dim=8)


QWEN: list[dict[str, Any]] = [
    {"0": ["vertical_and_slash", 30, 800, 0.99], "1": ["vertical_and_slash", 9192, 14288, 0.69]},
    {"0": ["vertical_and_slash", 1000, 6096, None], "1": ("vertical_and_slash", 10, 20, 1)},
]
DUAL_CHUNK = {"chunk_size": 262144, "local_size": 8192, "original_max_position_embeddings": 262144}
WHOLE = {
    "model_type": "qwen2", "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "hidden_size": 256, "dual_chunk_attention_config": {**DUAL_CHUNK, "sparse_attention_config": QWEN},
}  # fmt: skip


def test_qwen() -> None:
    config = HeadConfig.from_qwen_sparse_attention_config(WHOLE)
    assert config.fingerprint == Fingerprint(2, 2, 1, 128, 256, "qwen2")
    found = [entry.pattern for layer in config.layers for entry in layer]
    assert found == [VerticalSlash(n, m) for n, m in ((130, 800), (9192, 14288), (1000, 6096), (30, 50))]
    assert [entry.score for layer in config.layers for entry in layer] == [0.99, 0.69, None, 1.0]


@pytest.mark.parametrize("data", [QWEN, {"1": QWEN[1], "0": QWEN[0]}, {1: QWEN[1], 0: QWEN[0]}])
@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {**DUAL_CHUNK, "sparse_attention_config": x}])
def test_qwen_layers_alone(data: Any, wrap: Any) -> None:
    facts: dict[str, Any] = {"kv_heads": 1, "head_dim": 128, "hidden_size": 256, "model_type": "qwen2"}
    found = HeadConfig.from_qwen_sparse_attention_config(wrap(data), **facts)
    assert found == HeadConfig.from_qwen_sparse_attention_config(WHOLE)


def _whole(**changes: Any) -> dict[str, Any]:
    return {**WHOLE, **changes}


@pytest.mark.parametrize(
    ("data", "given", "message"),
    [
        (QWEN, {"head_dim": 8}, "^does not say kv_heads; give it as an argument"),
        (WHOLE, {"kv_heads": 2}, "^says that kv_heads is 1, but the argument is 2"),
        (_whole(num_hidden_layers=3), {}, "^layers: holds 2 layers, but fingerprint.layers is 3"),
        (_whole(num_attention_heads=4), {}, r"^layers\[0\].heads: holds 2 heads, but fingerprint.q_heads is 4"),
        (_whole(num_attention_heads="2"), {}, '^num_attention_heads: must be an int of 1 or more, is "2"'),
        (
            _whole(dual_chunk_attention_config=DUAL_CHUNK),
            {},
            "^dual_chunk_attention_config: holds no sparse_attention_",
        ),
        ([{"0": ["stream_llm", 1, 2, 3]}], {"kv_heads": 1, "head_dim": 8}, r'^\[0\]\[0\]\[0\]: unknown pattern "stre'),
        (
            _whole(dual_chunk_attention_config={"sparse_attention_config": [{"0": 1}]}),
            {},
            r"^dual_chunk_attention_config\.sparse_attention_config\[0\]\[0\]: must be \[pattern",
        ),
    ],
)
def test_what_qwen_does_not_write(data: Any, given: dict[str, Any], message: str) -> None:
    with pytest.raises(HeadConfigError, match=message):
        HeadConfig.from_qwen_sparse_attention_config(data, **given)


def test_importing_needs_no_triton_and_no_transformers() -> None:
    code = "import sys, mmi_compile.head_config; print({'triton', 'transformers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


# ---------------------------------------------------------------------------------------------------------------------

_ALIENS: tuple[Any, ...] = ("alien", 3.5, [], {}, None, True, -1)


def _alien(value: object, old: object) -> bool:
    """Whether ``value`` is of a kind that the place of ``old`` can never hold."""
    if isinstance(old, list | dict):
        return not isinstance(value, type(old))
    if old is None:  # of a string or of a number
        return isinstance(value, list | dict)
    if isinstance(old, float):
        return isinstance(value, str | list | dict)
    if value is None:  # means unknown in many places
        return False
    if isinstance(old, str | bool):
        return not isinstance(value, type(old))
    return value is True or value == -1 or not isinstance(value, int)


def _places(data: Any, place: str = "") -> Any:
    """Every place of JSON data below the top, with what holds it."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        inner = f"{place}[{key}]" if isinstance(data, list) else f"{place}.{key}" if place else str(key)
        yield inner, data, key
        yield from _places(value, inner)
