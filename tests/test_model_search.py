"""``mmi_compile.search`` and ``mmi search``: whole models, interruption, bad input, and the config that comes out."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn

import mmi_compile
from mmi_compile import cli, head_search, model_search, record, runtime
from mmi_compile.cost_file import Calibration, Entry, save
from mmi_compile.head_config import HeadConfig
from mmi_compile.head_measure import HeadSearchError
from mmi_compile.head_search import Candidates
from mmi_compile.kernels import dispatch
from mmi_compile.kernels.cost import default_coefficients
from mmi_compile.kernels.dispatch import CPU_TILES
from mmi_compile.kernels.geometry import Geometry
from mmi_compile.kernels.patterns import AShape, ByModality, VerticalSlash
from mmi_compile.model_search import search
from tests import models

pytestmark = pytest.mark.fresh_dynamo

CANDIDATES = Candidates((AShape(64, 64), VerticalSlash(16, 16)), (AShape(0, 64),))
TOKENS = 512
SHAPE = models.Shape(layers=1)


@dataclasses.dataclass
class Call:
    """What an observer is shown."""

    key: str
    layer: int | None
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    geometry: Geometry
    scale: float
    modality: torch.Tensor | None
    names: dict[int, str]


@contextmanager
def observing_dispatch(callback: Callable[[Any], Any]) -> Iterator[None]:
    """Stands in for ``runtime.observing_attention``, with the ids that were given by hand."""
    original = dispatch.attention

    def attention(q: Any, k: Any, v: Any, geometry: Geometry, scale: float, *rest: Any, **named: Any) -> Any:
        ids = record.given(geometry.batch, geometry.kv_len, q.device).ids
        callback(Call("", None, q, k, v, geometry, scale, ids, dict(enumerate(record.LABELS))))
        return original(q, k, v, geometry, scale, *rest, **named)

    with patch.object(dispatch, "attention", attention):
        yield


@pytest.fixture(autouse=True)
def observer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MMI_CACHE_DIR", str(tmp_path / "cache"))
    torch.set_num_threads(1)
    # Costs as on a GPU, where sparse attention pays at these lengths too.
    costs = default_coefficients("portable", 16, CPU_TILES)
    entry = Entry("cpu", 16, CPU_TILES.block_m, CPU_TILES.block_n, costs, 0.1, 0.1, 10)
    save(Calibration("CPU", (entry,), {}, "2026-01-01"), torch.device("cpu"))
    if not hasattr(runtime, "observing_attention"):
        monkeypatch.setattr(runtime, "observing_attention", observing_dispatch, raising=False)


class Layers(nn.Module):
    """A few layers of plain causal attention, each with weights of its own."""

    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        made = [models.plain_causal(tokens=TOKENS, seed=seed, shape=SHAPE)[0] for seed in range(layers)]
        self.layers = nn.ModuleList(made)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def built(seed: int = 0, tokens: int = TOKENS) -> tuple[nn.Module, dict[str, Any]]:
    _, inputs = models.plain_causal(tokens=tokens, seed=seed)
    (x,) = inputs.values()
    return Layers().eval(), {"x": x}


def searched(model: nn.Module, inputs: Any, **settings: Any) -> HeadConfig:
    return search(model, inputs, **{"budget": 1.0, "candidates": CANDIDATES, "progress": False, **settings})


def undated(config: HeadConfig) -> HeadConfig:
    return dataclasses.replace(config, provenance=dataclasses.replace(config.provenance, date=None))


# --- what comes out


def test_every_head_of_every_layer_gets_an_entry(tmp_path: Path) -> None:
    model, inputs = built()
    config = searched(model, inputs, budget=0.99)
    shape = SHAPE
    found = config.fingerprint
    assert (found.layers, found.q_heads, found.kv_heads, found.head_dim) == (
        3,
        shape.heads,
        shape.kv_heads,
        shape.head_dim,
    )
    for entry in (entry for layer in config.layers for entry in layer):
        assert entry.score is not None
        assert 0 <= entry.score < 10
        assert 0 <= (entry.recall or 0) <= 1
    p = config.provenance
    assert (p.source, p.samples, p.tokens, p.budget, p.device) == ("search", 1, TOKENS, 0.99, "CPU")
    assert "torch" in p.versions
    config.save(tmp_path / "c.json")
    assert HeadConfig.load(tmp_path / "c.json") == config


def test_a_budget_of_tiles_is_a_density() -> None:
    model, inputs = built(tokens=1536)
    config = searched(model, inputs, budget=0.5, unit="tiles")
    densities = [entry.density or 0.0 for layer in config.layers for entry in layer]
    assert sum(densities) / len(densities) <= 0.5 + 1e-6


def test_the_model_is_left_as_it_was() -> None:
    model, inputs = built()
    before, state = set(vars(model)), {name: p.clone() for name, p in model.named_parameters()}
    searched(model, inputs)
    assert set(vars(model)) == before
    assert model._compiled_call_impl is None
    assert all(torch.equal(p, state[name]) for name, p in model.named_parameters())


def test_a_compiled_model_can_be_searched_and_stays_compiled() -> None:
    model, inputs = built()
    plain = undated(searched(model, inputs))
    model.compile(backend="eager")
    compiled = model._compiled_call_impl
    assert undated(searched(model, inputs)) == plain
    assert model._compiled_call_impl is compiled


def test_results_do_not_depend_on_the_run() -> None:
    assert undated(searched(*built())) == undated(searched(*built()))


def test_the_package_offers_it_by_name() -> None:
    assert mmi_compile.search is search
    assert "search" in mmi_compile.__all__


def test_modalities_given_by_hand_open_boundaries() -> None:
    model, inputs = built(tokens=1536)
    ids = torch.zeros(1, 1536, dtype=torch.int64)
    ids[:, 100:1400] = 2
    only = Candidates((), (AShape(64, 128),), ("q",))
    with mmi_compile.modality(ids):
        config = searched(model, inputs, candidates=only, budget=0.8, dense_tail=False)
    assert config.modalities == {0: "text", 2: "video"}
    bounded = [entry for layer in config.layers for entry in layer if isinstance(entry.pattern, ByModality)]
    assert bounded
    assert all(entry.boundary == "q" for entry in bounded)


def test_several_prompts_are_searched_together() -> None:
    model, first = built()
    _, second = built(seed=5)
    config = searched(model, [first, second])
    assert config.provenance.samples == 2
    assert undated(config) == undated(searched(model, [first, second]))


def test_a_transformer_is_searched_whole() -> None:
    model, inputs = models.qwen2(tokens=400)
    config = searched(model, inputs)
    assert (config.fingerprint.layers, config.fingerprint.kv_heads) == (2, 2)


@pytest.mark.parametrize("weigh", ["layers", "heads"])
def test_layers_that_do_not_change_the_output_get_less(weigh: str) -> None:
    class Muted(Layers):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer, gain in zip(self.layers, (1.0, 0.001, 1.0), strict=True):
                x = x + gain * layer(x)
            return x

    _, inputs = built(tokens=1536)
    settings: dict[str, Any] = {"budget": 0.5, "unit": "tiles"}
    alike, found = (searched(Muted().eval(), inputs, weigh=name, **settings) for name in ("equal", weigh))
    densities = [[sum(e.density or 0.0 for e in layer) for layer in config.layers] for config in (alike, found)]
    assert densities[1][1] < densities[0][1]
    assert sum(densities[1]) <= 0.5 * 3 * SHAPE.heads + 1e-6


def test_an_output_that_cannot_be_compared_is_no_hindrance() -> None:
    class Pooled(Layers):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).mean(1)

    _, inputs = built(tokens=1536)
    settings: dict[str, Any] = {"budget": 0.5, "unit": "tiles"}
    alike = undated(searched(Pooled().eval(), inputs, weigh="equal", **settings))
    assert undated(searched(Pooled().eval(), inputs, **settings)) == alike


# --- interruption


@pytest.mark.parametrize("prompts", [1, 2])
@pytest.mark.parametrize("interruption", [KeyboardInterrupt, MemoryError])
def test_an_interrupted_search_goes_on_where_it_was(
    prompts: int, interruption: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, first = built()
    inputs = [first, built(seed=5)[1]][:prompts]
    whole = undated(searched(model, inputs))
    path, original, calls = tmp_path / "partial", head_search.Searcher.survey_of, list[int]()

    def survey_of(self: Any, prompt: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise interruption("pulled the plug")
        return original(self, prompt)

    monkeypatch.setattr(head_search.Searcher, "survey_of", survey_of)
    with pytest.raises(interruption):
        searched(model, inputs, resume=path)
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["partial"]
    assert undated(searched(model, inputs, resume=path)) == whole
    assert len(calls) == 1 + 3 * prompts  # nothing that was finished is measured again


def test_another_budget_needs_no_new_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = built()
    path = tmp_path / "partial"
    searched(model, inputs, resume=path, weigh="equal")
    equal = undated(searched(model, inputs, budget=0.99, mode="equal", weigh="equal"))

    def refuse(*arguments: Any) -> None:
        raise AssertionError("the model ran again")

    monkeypatch.setattr(Layers, "forward", refuse)
    assert undated(searched(model, inputs, budget=0.99, mode="equal", weigh="equal", resume=path)) == equal


def test_a_search_that_is_done_does_not_run_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = built(tokens=1536)
    settings: dict[str, Any] = {"budget": 0.5, "unit": "tiles", "resume": tmp_path / "partial"}
    found = undated(searched(model, inputs, **settings))

    def refuse(*arguments: Any) -> None:
        raise AssertionError("the model ran again")

    monkeypatch.setattr(Layers, "forward", refuse)
    assert undated(searched(model, inputs, **settings)) == found


def test_a_file_of_another_search_is_refused(tmp_path: Path) -> None:
    model, inputs = built()
    path = tmp_path / "partial"
    searched(model, inputs, resume=path)
    before = path.read_bytes()
    changed = {"x": inputs["x"] + 1}
    with pytest.raises(HeadSearchError, match="another search"):
        searched(model, changed, resume=path)
    with pytest.raises(HeadSearchError, match="another search"):
        searched(model, inputs, resume=path, rows="last")
    with pytest.raises(HeadSearchError, match="another search"):
        searched(model, [inputs, changed], resume=path)
    with torch.no_grad():
        next(model.parameters()).mul_(2)
    with pytest.raises(HeadSearchError, match="another search"):
        searched(model, inputs, resume=path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("text", ["", "[]", "{", '{"schema": {"name": "mmi-search", "version": 0}}', "\x00"])
def test_a_damaged_file_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "partial"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(HeadSearchError, match="delete the file, or resume from another one"):
        searched(*built(), resume=path)
    assert path.read_text(encoding="utf-8") == text


def test_damaged_measurements_are_refused(tmp_path: Path) -> None:
    model, inputs = built()
    path = tmp_path / "partial"
    searched(model, inputs, resume=path)
    data = json.loads(path.read_text(encoding="utf-8"))
    for damage in ({"survey:0:1": {}}, {"survey:0:1": None}, {"combinations:0:0": {"shape": [3], "values": "AAAA"}}):
        path.write_text(json.dumps({**data, "parts": {**data["parts"], **damage}}), encoding="utf-8")
        with pytest.raises(HeadSearchError, match="delete the file"):
            searched(model, inputs, resume=path)


def test_a_search_that_cannot_be_written_down_does_not_begin(tmp_path: Path) -> None:
    with pytest.raises(HeadSearchError, match="there is no folder"):
        searched(*built(), resume=tmp_path / "nowhere" / "partial")


# --- bad input


def test_nan_in_a_layer_is_named() -> None:
    model, inputs = built()
    with torch.no_grad():
        next(model.layers[1].parameters()).fill_(float("nan"))
    with pytest.raises(HeadSearchError, match="layer 1: attention gives NaN"):
        searched(model, inputs)


def test_short_prompts_are_refused() -> None:
    model, inputs = built()
    with pytest.raises(HeadSearchError, match="layer 0: the calibration prompt is too short: 100 queries"):
        searched(model, {"x": inputs["x"][:, :100]})


def test_a_model_without_attention_is_refused() -> None:
    with pytest.raises(HeadSearchError, match=r"no attention of this model was rewritten; mmi_compile\.explain"):
        searched(nn.Sequential(nn.Linear(4, 4)).eval(), {"input": torch.ones(2, 4)})


def test_attention_that_cannot_be_rewritten_gives_the_reason() -> None:
    class Bidirectional(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.scaled_dot_product_attention(x, x, x)

    with pytest.raises(HeadSearchError, match="attends in both directions"):
        searched(Bidirectional().eval(), {"x": torch.randn(1, 2, 300, 16)})


def test_a_budget_that_cannot_be_met_leaves_the_measurements(tmp_path: Path) -> None:
    model, inputs = built()
    with pytest.raises(HeadSearchError, match="longer calibration prompts"):
        searched(model, inputs, budget=0.01, resume=tmp_path / "partial")
    assert (tmp_path / "partial").is_file()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget": 0.0}, "budget is 0.0"),
        ({"budget": 1.5}, "budget is 1.5"),
        ({"mode": "fair"}, "mode 'fair': give one of share, equal"),
        ({"unit": "joules"}, "unit 'joules': give one of time, tiles"),
        ({"rows": "some"}, "rows 'some': give one of all, last, both"),
        ({"merge": "sum"}, "merge 'sum': give one of mean, max"),
        ({"weigh": "rows"}, "weigh 'rows': give one of equal, layers, heads"),
        ({"candidates": None, "boundaries": ("3d",)}, "boundary '3d'"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        searched(*built(), **settings)


def test_prompts_must_be_dicts_and_the_model_in_eval_mode() -> None:
    model, inputs = built()
    with pytest.raises(ValueError, match="no calibration prompt"):
        searched(model, [])
    with pytest.raises(ValueError, match="must be a dict of forward arguments, is Tensor"):
        searched(model, [inputs["x"]])
    with pytest.raises(ValueError, match=r"call model\.eval"):
        searched(model.train(), inputs)


def test_layers_that_were_left_alone_are_dense() -> None:
    store = model_search.SearchStore(None, "", count=2, left_out=True, device="CPU")
    for place, number in enumerate((1, 3)):
        store.facts[str(place)] = {"layer": number, "shape": [1, 1, 8], "tokens": 300}
    run = model_search._Run(nn.Identity(), [{}], {}, None, store, lambda *x: None)
    scored = head_search.Scored(AShape(1, 2), 0.1, 0.9, 0.2, 0.2)
    config = run.config(model_search.Choice(((scored,), (scored,)), 0.2, 0.1), 0.5)
    assert [layer[0].pattern.to_json()["pattern"] for layer in config.layers] == [
        "dense",
        "a_shape",
        "dense",
        "a_shape",
    ]


def test_prompts_must_run_through_the_same_layers() -> None:
    run = model_search._Run(nn.Identity(), [{}, {}], {}, None, model_search.SearchStore(None, ""), lambda *x: None)
    run._count(3, 0)
    with pytest.raises(HeadSearchError, match="prompt 2 ran 2 attentions, and the ones before it 3"):
        run._count(2, 1)


def test_prompts_must_number_modalities_alike() -> None:
    run = model_search._Run(nn.Identity(), [{}, {}], {}, None, model_search.SearchStore(None, ""), lambda *x: None)
    call = Call("", 0, *(torch.ones(1),) * 3, Geometry(1, 1, 1, 2, 2), 1.0, torch.tensor([[0, 4]]), {4: "depth"})
    run._meet(call)
    assert (run.labels, run.names) == ((0, 4), {0: "text", 4: "depth"})
    with pytest.raises(HeadSearchError, match="modality 4 is 'depth' in one calibration prompt and 'heat'"):
        run._meet(dataclasses.replace(call, names={4: "heat"}))


# --- the command

SCRIPT = """
from tests.test_model_search import built

def build():
    return built()

def wrong():
    return 1

def fails():
    raise RuntimeError("no weights here")
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT, encoding="utf-8")
    return path


def test_the_command_writes_a_config_and_shows_it(
    script: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "config.json"
    assert cli.main(["search", f"{script}:build", "-o", str(out), "--budget", "1.0"]) == 0
    assert HeadConfig.load(out).fingerprint.layers == 3
    assert "3 layers" in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == ["config.json", "script.py"]
    assert cli.main(["show", str(out)]) == 0
    assert "3 layers" in capsys.readouterr().out
    assert cli.main(["show", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["fingerprint"]["layers"] == 3
    again = tmp_path / "again.json"
    assert cli.main(["search", f"{script}:build", "-o", str(again), "--budget", "1.0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(again.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("place", "code", "message"),
    [
        ("no.py:build", 2, "no script 'no.py'"),
        (":nothing", 2, "no function 'nothing'"),
        (":wrong", 2, "must return (model, inputs), returned int"),
        (":fails", 1, "RuntimeError: no weights here"),
    ],
)
def test_scripts_that_cannot_be_used(
    place: str, code: int, message: str, script: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = f"{script}{place}" if place.startswith(":") else place
    assert cli.main(["search", place, "-o", str(tmp_path / "c.json")]) == code
    assert message in capsys.readouterr().err
    assert not (tmp_path / "c.json").exists()


def test_an_interrupted_command_says_how_to_go_on(
    script: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: Any, **named: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(model_search, "search", interrupted)
    assert cli.main(["search", f"{script}:build", "-o", str(tmp_path / "c.json")]) == 1
    assert "the same command goes on" in capsys.readouterr().err
    assert cli.main(["search", f"{script}:build", "-o", str(tmp_path / "no" / "c.json")]) == 2
