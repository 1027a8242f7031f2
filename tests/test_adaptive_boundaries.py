"""The option ``boundaries`` of policy ``adaptive`` through whole compiled models."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mmi_compile
from mmi_compile import report
from mmi_compile.kernels.adaptive import Boundaries, adaptive_plan
from mmi_compile.kernels.geometry import Geometry
from mmi_compile.kernels.ops import VISION_LABELS
from mmi_compile.kernels.own_tiles import using_tiles
from mmi_compile.kernels.planner import TileShape
from mmi_compile.kernels.reference import attention_reference
from mmi_compile.kernels.segments import segment
from tests import harness, models
from tests.kernels.test_part_search import EXAMPLE, prompt

pytestmark = pytest.mark.fresh_dynamo

TOKENS = 640
TILES = TileShape(32, 32)
OPTIONS: dict[str, Any] = {"min_tokens": 0, "recall": 0.6, "boundaries": ("none", "q", "2d"), "dense_tail": False}


@pytest.fixture(autouse=True)
def small_tiles() -> Iterator[None]:
    report.forget()
    with using_tiles(TILES):
        yield


def decoder(**changes: Any) -> tuple[nn.Module, dict[str, Tensor], Tensor]:
    model, inputs = models.plain_causal(tokens=TOKENS, shape=models.Shape(layers=2), **changes)
    place = torch.arange(TOKENS)
    ids = torch.where((place % 40 < 24) & (place < TOKENS - 64), 1 + place // 300, 0)
    return model, inputs, ids.expand(inputs["x"].shape[0], -1).contiguous()


def reference(model: nn.Module, inputs: dict[str, Tensor], ids: Tensor) -> Tensor:
    """The model run eagerly, each attention over the mask of the plan that the policy makes for it."""
    used: list[Tensor] = []

    def masked(q: Tensor, k: Tensor, v: Tensor, **rest: Any) -> Tensor:
        step = k.shape[1] // models.Shape().kv_heads
        k, v = k[:, ::step], v[:, ::step]
        g = Geometry(q.shape[0], q.shape[1], k.shape[1], q.shape[2], q.shape[2])
        groups = segment((ids != 0).to(torch.int8), VISION_LABELS, g, TILES)
        plan, choice = adaptive_plan(
            q, k, g, q.shape[3] ** -0.5, TILES, recall=0.6, dense_tail=False,
            boundaries=Boundaries(("q", "2d"), groups, ("text", "vision")),
        )  # fmt: skip
        used.append(choice.boundary)
        return attention_reference(q, k, v, plan.to_mask(), q.shape[3] ** -0.5)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(F, "scaled_dot_product_attention", masked)
        out = model(**inputs)
    assert len(used) == 2
    return out


def compiled(model: nn.Module, *, dynamic: bool = False, **changes: Any) -> Any:
    options = {"inner": "eager", "strict": True, **OPTIONS, **changes}
    return torch.compile(model, backend="mminference", dynamic=dynamic, options=options)


def runs() -> list[dict[str, Any]]:
    made = mmi_compile.last_report()
    assert made is not None
    return [site.to_json()["run"] for site in made.sites if site.phase == "prefill"]


@pytest.mark.parametrize("batch", [1, 2])
def test_a_model_runs_what_the_policy_plans(batch):
    model, inputs, ids = decoder(batch=batch)
    expected = reference(model, inputs, ids)
    with torch.no_grad(), mmi_compile.modality(ids):
        assert harness.relative_error(compiled(model)(**inputs), expected) < 1e-5
    for run in runs():
        assert not run["notes"]
        assert len(run["patterns"]) == batch


def test_through_inductor_with_symbolic_lengths():
    model, inputs, ids = decoder()
    expected = reference(model, inputs, ids)
    fast = compiled(model, dynamic=True, inner="inductor")
    with torch.no_grad(), mmi_compile.modality(ids):
        assert harness.relative_error(fast(**inputs), expected) < 1e-5


def test_a_prompt_that_nothing_tells_apart_says_so():
    model, inputs, _ = decoder()
    with torch.no_grad():
        got = compiled(model)(**inputs)
        assert all("boundaries were not tried" in run["notes"][0] for run in runs())
        assert harness.relative_error(got, compiled(model, boundaries=("none",))(**inputs)) == 0


def test_a_short_prompt_says_so():
    model, inputs = models.plain_causal(tokens=500)
    with torch.no_grad(), mmi_compile.modality(torch.arange(500)[None] % 2):
        compiled(model)(**inputs)
    assert all(run["notes"] == ["boundaries were not tried: the prompt has fewer than 512 rows"] for run in runs())
    assert runs()


def test_padding_is_a_reason():
    model, inputs, ids = decoder(mask="padding", batch=2, padding="left")
    with torch.no_grad(), mmi_compile.modality(ids):
        compiled(model)(**inputs)
    for run in runs():
        assert run["notes"] == [
            "boundaries were not tried: boundaries are chosen for prompts without padding and sliding window"
        ]


class Attend(nn.Module):
    """One attention over what it is given."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True) * 2.0


@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_heads_that_are_regular_among_video_take_2d(inner):
    ids = prompt(2048, seed=0)
    q, k = EXAMPLE["attention"](ids, torch.Generator())
    q, v = 8 * q, torch.randn(1, 1, 2048, 64, generator=torch.Generator().manual_seed(0))
    g, scale = Geometry(1, 1, 1, 2048, 2048), 64**-0.5
    boundaries = Boundaries(("q", "2d"), segment(ids, VISION_LABELS, g, TILES), ("text", "vision"))
    plan, choice = adaptive_plan(q, k, g, scale, TILES, recall=0.9, dense_tail=False, boundaries=boundaries)
    assert choice.boundary.item() == 2
    fast = compiled(Attend().eval(), recall=0.9, inner=inner)
    with torch.no_grad(), mmi_compile.modality(ids):
        assert harness.relative_error(fast(q, k, v), 2.0 * attention_reference(q, k, v, plan.to_mask(), scale)) < 1e-5
    (run,) = runs()
    assert run["patterns"][0][0].startswith("2d(text→text: ")
    assert run["density"] < 0.4
