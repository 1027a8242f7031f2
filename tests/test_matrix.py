"""The model matrix: a subset in every run, the cover of all pairs of settings where slow tests are asked for."""

from __future__ import annotations

import itertools

import pytest

from tests import families, matrix, modules
from tests.matrix import Cell, Setting

pytestmark = pytest.mark.fresh_dynamo


def causal(name: str) -> int:
    """Attentions of a prompt that ``mmi_compile.compile`` is to rewrite."""
    return modules.MODULES[name].causal if name in modules.MODULES else 1 if name == "qwen3_5" else 2


def check(cell: Cell) -> None:
    assert not cell.failure or cell.stock, cell.failure
    assert cell.rewritten + sum(cell.left.values()) == cell.found
    if cell.setting.through == "mmi_compile.compile":
        # Gemma 3's masks are made around its language model, between graph breaks.
        assert cell.graphs == (4 if cell.model == "gemma3" else 1)
        assert cell.rewritten == causal(cell.model), cell.details
        assert cell.found > 0


def through(call: str, attn: str, cache: str, batch: str, dynamic: bool) -> Setting:
    return Setting(
        attn, {"compile": "mmi_compile.compile", "bare": "torch.compile"}.get(call, call), cache, batch, dynamic
    )


SUBSET = [
    ("qwen3_vl", through("compile", "sdpa", "dynamic", "3, left padding", False)),
    ("qwen3_5", through("compile", "sdpa", "none", "1", False)),
    ("glm4v", through("compile", "sdpa", "dynamic", "1", False)),
    ("llava", through("model.compile", "sdpa", "none", "3, left padding", False)),
    ("gemma3", through("compile", "sdpa", "dynamic", "3, right padding", False)),
    ("mistral", through("bare", "sdpa", "dynamic", "3, left padding", True)),
    ("mistral", through("compile", "eager", "static", "1", True)),
    ("phi3", through("compile", "sdpa", "static", "3, left padding", False)),
    *((name, through("bare", "own", "none", "3", False)) for name in ("multihead", "decoder", "encoder", "baddbmm")),
    *((name, through("bare", "own", "none", "1", True)) for name in ("grouped_queries", "einsum_tokens", "flattened")),
    ("flex_causal", through("bare", "own", "none", "1", False)),
]


@pytest.mark.parametrize(("name", "setting"), SUBSET, ids=lambda value: value if isinstance(value, str) else "")
def test_a_cell(name, setting):
    check(matrix.run(name, setting))


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.parametrize("name", matrix.names())
def test_every_pair_of_settings(name):
    for setting in matrix.settings(name, everything=False):
        check(matrix.run(name, setting))


@pytest.mark.parametrize("name", ["llama", pytest.param("qwen2_vl", marks=pytest.mark.slow)])
def test_ten_prompts_take_two_compilations(name):
    assert matrix.compilations(name, count=4 if name == "llama" else 10) <= 2


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.parametrize("name", [*families.VISION, *families.TEXT])
def test_ten_prompts_of_every_family_take_two_compilations(name):
    # PyTorch's fallback for the linear attention of Qwen3.5 is a loop over chunks, unrolled by their number.
    assert matrix.compilations(name) <= (3 if name == "qwen3_5" else 2)


def test_settings_cover_every_pair():
    chosen = matrix.settings("llama", everything=False)
    everything = matrix.settings("llama", everything=True)
    assert len(everything) == 108
    assert len(chosen) <= 16
    for a, b in itertools.combinations(("attn", "through", "cache", "batch", "dynamic"), 2):
        pairs = [{(getattr(s, a), getattr(s, b)) for s in some} for some in (chosen, everything)]
        assert pairs[0] == pairs[1]


def test_the_table_has_a_row_for_every_outcome():
    settings = matrix.settings("llama", everything=True)
    cells = [Cell("llama", setting, 1, 2, 2 if setting.cache != "static" else 0) for setting in settings]
    for cell in cells:
        if cell.setting.cache == "static":
            cell.left = {"UNKNOWN_MASK": 2}
    rows = matrix.table(cells).splitlines()[2:]
    assert len(rows) == 6
    assert sum("| static cache |" in row and "unknown mask" in row for row in rows) == 3
    assert [Cell.from_json(cell.to_json()) for cell in cells] == cells


def test_a_modality_that_nobody_asks_for_is_no_empty_cell():
    setting = matrix.settings("gemma3", everything=False)[0]
    asked, not_asked = (Cell("gemma3", setting, 1, 2, 2, source=source) for source in ("input_ids (guessed)", ""))
    text, left = Cell("llama", setting, 1, 2, 2), Cell("gemma3", setting, 1, 2, 0)
    told = [row.split("|")[8].strip() for row in matrix.table([asked, not_asked, text, left]).splitlines()[2:]]
    assert told == ["input_ids", "not asked for", "–", "–"]
    assert '"not asked for"' in matrix.HEAD


def test_a_wrong_result_is_a_failure(monkeypatch):
    monkeypatch.setattr(matrix, "LARGEST_ERROR", -1.0)
    cell = matrix.run("fused_projection", matrix.settings("fused_projection", everything=False)[0])
    assert cell.failure.startswith("wrong by")
