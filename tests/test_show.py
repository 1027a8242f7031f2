"""``mmi show``: the map of a head config in the terminal and as a picture."""

from __future__ import annotations

import importlib.util
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from mmi_compile import cli, show
from mmi_compile.decision import MMIError
from mmi_compile.head_config import Fingerprint, HeadConfig, HeadEntry, Provenance
from mmi_compile.kernels import patterns
from mmi_compile.kernels.patterns import AShape, BlockTopK, ByModality, Dense, Grid, TriShape, VerticalSlash

ENTRIES = (
    HeadEntry(Dense(), density=1.0, recall=1.0),
    HeadEntry(AShape(1, 2), boundary="k", density=0.1, recall=0.91),
    HeadEntry(ByModality("q", Dense(), ((0, Grid(4, 1, 1)), (2, Grid(8, 1, 1)), (3, AShape(1, 1)))), density=0.2),
    HeadEntry(ByModality("2d", Dense(), (((0, 0), VerticalSlash(1, 1)),)), density=1.3),
    HeadEntry(BlockTopK(k=2)),
    HeadEntry(TriShape(1, 1, 1)),
)
CONFIG = HeadConfig(
    Fingerprint(2, 6, 2, 64), (ENTRIES, ENTRIES[::-1]), {0: "text", 2: "video", 3: "audio"},
    Provenance("search", 3, 4096, 0.12, "a GPU"),
)  # fmt: skip


def text(config: HeadConfig) -> str:
    file = io.StringIO()
    Console(file=file, width=200).print(show.terminal_map(config))
    return file.getvalue()


def test_the_map_has_a_letter_and_a_mark_for_every_head() -> None:
    lines = [" ".join(line.split()) for line in text(CONFIG).splitlines()]
    assert any(line.startswith("0 D AkGqV2B T") for line in lines)
    assert any(line.startswith("1 T B V2GqAkD") for line in lines)
    whole = "\n".join(lines)
    for words in (
        "2 layers of 6 query", "search, 3 prompts, 4096 tokens, budget 0.12, a GPU", "A a_shape × 2", "T tri_shape × 2",
        "boundary 2d × 2", "density: mean 0.650, least 0.100, most 1.300", "recall: mean 0.955",
    ):  # fmt: skip
        assert words in whole


def test_what_is_not_known_is_left_out() -> None:
    bare = HeadConfig(Fingerprint(1, 1, 1, 8), ((HeadEntry(Dense()),),))
    found = text(bare)
    assert "recall" not in found
    assert "density" not in found
    assert "budget" not in found


def test_the_main_pattern_is_the_most_frequent_that_is_sparse() -> None:
    assert [show.main_pattern(entry) for entry in ENTRIES] == [
        "dense", "a_shape", "grid", "vertical_slash", "block_topk", "tri_shape"
    ]  # fmt: skip
    assert show.main_pattern(HeadEntry(ByModality("q", AShape(1, 1)))) == "a_shape"


@given(numbers=st.lists(st.floats(0, 2)), bins=st.integers(1, 20))
def test_histograms_count_every_number_once(numbers: list[float], bins: int) -> None:
    counts = show.histogram(numbers, bins)
    assert len(counts) == bins
    assert sum(counts) == len(numbers)
    assert counts[-1] >= sum(number >= 1 for number in numbers)


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib")
def test_the_picture_is_written(tmp_path: Path) -> None:
    for config, name in ((CONFIG, "a.png"), (HeadConfig(Fingerprint(1, 1, 1, 8), ((HeadEntry(Dense()),),)), "b.png")):
        show.save_png(config, tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    with pytest.raises(MMIError, match="cannot be written"):
        show.save_png(CONFIG, tmp_path / "nowhere" / "a.png")


def test_the_command_refuses_what_is_no_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["show", str(tmp_path / "none.json")]) == 2
    assert "no such file" in capsys.readouterr().err
    (tmp_path / "bad.json").write_text('{"version": 1', encoding="utf-8")
    assert cli.main(["show", str(tmp_path / "bad.json")]) == 2
    assert "bad.json" in capsys.readouterr().err
    CONFIG.save(tmp_path / "good.json")
    assert cli.main(["show", str(tmp_path / "good.json")]) == 0


PATTERNS = """
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import neighbour
import mmi_compile

@mmi_compile.register_pattern
@dataclass(frozen=True)
class Every(mmi_compile.OwnPattern):
    step: int
    name: ClassVar[str] = neighbour.NAME

    def columns(self, keys: int) -> range:
        return range(0, keys, self.step)
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a head config that names a pattern, and the file that registers it; forgotten afterwards."""
    monkeypatch.setattr(patterns, "_KINDS", dict(patterns._KINDS))
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "own_patterns.py").write_text(PATTERNS)
    (tmp_path / "neighbour.py").write_text('NAME = "every"')
    heads = [{"count": 2, "pattern": {"pattern": "every", "step": 7}}]
    data = {"version": 1, "fingerprint": {"layers": 1, "q_heads": 2, "kv_heads": 1, "head_dim": 8}}
    (tmp_path / "heads.json").write_text(json.dumps({**data, "layers": [{"heads": heads}]}))
    yield tmp_path
    for name in ("own_patterns", "neighbour"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("place", ["own_patterns", "own_patterns.py"])
def test_patterns_of_ones_own_are_imported_first(
    place: str, own: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(own)
    assert cli.main(["show", "heads.json"]) == 2
    assert "pattern 'every'" in capsys.readouterr().err
    assert cli.main(["show", "heads.json", "--import", place]) == 0
    assert "every × 2" in capsys.readouterr().out


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib")
def test_patterns_of_ones_own_are_drawn(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(own)
    assert cli.main(["show", "heads.json", "--import", "own_patterns.py", "--png", "map.png"]) == 0
    assert Path("map.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("place", "words", "code"),
    [("absent.py", "no file 'absent.py'", 2), ("no_such_module", "No module named", 1), ("bad.py", "SyntaxError", 1)],
)
def test_what_cannot_be_imported_is_said_in_one_line(
    place: str, words: str, code: int, own: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(own)
    Path("bad.py").write_text("def")
    assert cli.main(["show", "heads.json", "--import", place]) == code
    error = capsys.readouterr().err
    assert words in error
    assert len(error.strip().splitlines()) == 1


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib")
def test_the_command_writes_the_picture(tmp_path: Path) -> None:
    CONFIG.save(tmp_path / "good.json")
    assert cli.main(["show", str(tmp_path / "good.json"), "--png", str(tmp_path / "map.png")]) == 0
    assert (tmp_path / "map.png").is_file()
