"""``mmi explain config.json``: models and prompts from configs alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import mmi_compile
from mmi_compile import cli
from mmi_compile.hf_config import ConfigFileError, Sample, is_config, kept_layers, sample
from tests import families
from tests.prompts import Shape

pytestmark = pytest.mark.fresh_dynamo

MANY = Shape(layers=6)
MISTRAL = {
    "model_type": "mistral", "architectures": ["MistralForCausalLM"], "dtype": "bfloat16", "vocab_size": 40000,
    "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 4000,
    "num_hidden_layers": 40, "sliding_window": 700,
}  # fmt: skip


def written(folder: Path, data: Any, name: str = "config.json") -> Path:
    path = folder / name
    path.write_text(data if isinstance(data, str) else json.dumps(data, default=str), encoding="utf-8")
    return path


def config_of(name: str, shape: Shape = MANY) -> dict[str, Any]:
    data: dict[str, Any] = families.VISION[name].config(shape).to_dict()
    return {**data, "architectures": [families.VISION[name].model]}


@pytest.mark.parametrize(
    ("count", "kinds", "kept"),
    [
        (28, [], [0, 1]),
        (1, [], [0]),
        (12, [*"sssssf"] * 2, [0, 1, 5]),
        (12, ["f", *["s"] * 11], [0, 1]),
        (4, [*"abcd"], [0, 1, 2, 3]),
    ],
)
def test_the_first_layers_and_one_of_every_kind_are_kept(count: int, kinds: list[str], kept: list[int]) -> None:
    assert kept_layers(count, kinds) == kept


@pytest.mark.parametrize("name", families.VISION)
def test_every_family_gets_a_prompt_with_an_image(name: str, tmp_path: Path) -> None:
    data = config_of(name)
    made = sample(written(tmp_path, data), tokens=64)
    assert type(made.model).__name__ == families.VISION[name].model
    token = made.model.config.image_token_id
    assert token == data.get("image_token_id", data.get("image_token_index"))
    assert int((made.inputs["input_ids"] == token).sum()) > 3
    assert "an image's" in made.subject
    text, given = made.model.config.get_text_config(), families.VISION[name].config(MANY).get_text_config()
    for same in ("num_attention_heads", "num_key_value_heads", "hidden_size", "vocab_size"):
        assert getattr(text, same) == getattr(given, same)
    assert text.num_hidden_layers < 6
    assert any(f"num_hidden_layers 6 → {text.num_hidden_layers}" in change for change in made.shrunk)


@pytest.mark.parametrize("name", ["gemma3", "qwen3_5"])
def test_a_layer_of_every_kind_is_among_them(name: str, tmp_path: Path) -> None:
    data = config_of(name)
    kinds = ["full_attention" if layer == 4 else "sliding_attention" for layer in range(6)]
    if name == "gemma3":
        data["text_config"]["layer_types"] = kinds
    text = sample(written(tmp_path, data), tokens=64).model.config.get_text_config()
    assert set(text.layer_types) == set(data["text_config"]["layer_types"])
    assert len(text.layer_types) == text.num_hidden_layers == len(set(text.layer_types)) + (name == "gemma3")


def test_windows_of_a_vision_tower_are_kept_in_some_layers_only(tmp_path: Path) -> None:
    data = config_of("qwen2_5_vl")
    data["vision_config"].update(depth=9, fullatt_block_indexes=[3, 8])
    vision = sample(written(tmp_path, data), tokens=64).model.config.vision_config
    assert (vision.depth, list(vision.fullatt_block_indexes)) == (3, [2])


def test_layers_that_share_keys_stay_the_last_ones(tmp_path: Path) -> None:
    from transformers import Gemma3nTextConfig

    own = {name: value for name, value in MANY.config().items() if "rope" not in name}  # a rope for each kind of layer
    shape = {**own, "head_dim": 16, "num_key_value_heads": 1, "num_hidden_layers": 8}
    kinds = ["sliding_attention", "full_attention"] * 4
    config = Gemma3nTextConfig(
        **shape, layer_types=kinds, num_kv_shared_layers=4, vocab_size_per_layer_input=shape["vocab_size"],
        hidden_size_per_layer_input=8, laurel_rank=4, activation_sparsity_pattern=[0.0] * 8,
    )  # fmt: skip
    text = sample(written(tmp_path, {**config.to_dict(), "architectures": None}), tokens=32).model.config
    assert text.layer_types == kinds[:2] + kinds[4:6]
    assert text.num_kv_shared_layers == 2


def test_heads_dtype_and_windows_are_the_configs_and_vocabularies_take_no_memory(tmp_path: Path) -> None:
    made = sample(written(tmp_path, MISTRAL))
    config, weight = made.model.config, made.model.get_input_embeddings().weight  # type: ignore[operator]
    assert (config.num_attention_heads, config.head_dim, config.sliding_window) == (4, 16, 700)
    assert (weight.dtype, tuple(weight.shape)) == (torch.bfloat16, (40000, 64))
    assert weight.untyped_storage().nbytes() < 2 * 41000
    assert len({tuple(row.tolist()) for row in weight[:50]}) == 50
    assert not any(p.is_meta for p in made.model.parameters())
    assert sum(p.untyped_storage().nbytes() for p in made.model.parameters()) < 1e6
    assert made.inputs["input_ids"].shape == (1, 764)  # more than the window, so that it is seen
    assert made.shrunk == (
        "num_hidden_layers 40 → 2", "intermediate_size 4000 → 128", "output layer of 40000 tokens → 64",
        "embeddings of 40000 tokens share their memory",
    )  # fmt: skip
    report = mmi_compile.explain(made.model, **made.inputs)
    assert [site.mask for site in report.sites] == ["causal and sliding window 700 and padding"] * 2
    assert all("q [1, 4, 764, 16] · k [1, 2, 764, 16]" in site.shapes for site in report.sites)


def test_a_window_beyond_the_prompt_is_told(tmp_path: Path) -> None:
    made = sample(written(tmp_path, {**MISTRAL, "sliding_window": 5000}), tokens=40)
    assert "40 tokens (shorter than the window of 5000)" in made.subject


def test_the_same_config_gives_the_same_and_random_numbers_go_on(tmp_path: Path) -> None:
    path = written(tmp_path, MISTRAL)
    torch.manual_seed(3)
    first = sample(path, tokens=20)
    after = torch.rand(1)
    second = sample(tmp_path, tokens=20)  # the folder
    assert torch.equal(first.inputs["input_ids"], second.inputs["input_ids"])
    for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(1), after)


@pytest.mark.parametrize(
    ("kind", "sizes", "arguments"),
    [
        ("bert", {"hidden_size": 64, "num_attention_heads": 4}, {"input_ids", "attention_mask"}),
        ("t5", {"d_model": 64, "num_heads": 4, "d_kv": 16}, {"input_ids", "attention_mask", "decoder_input_ids"}),
        ("siglip_vision_model", {"hidden_size": 64, "num_attention_heads": 4, "image_size": 32}, {"pixel_values"}),
        ("whisper", {"d_model": 64, "encoder_attention_heads": 4, "decoder_attention_heads": 4},
         {"input_features", "decoder_input_ids"}),
        ("llava", {}, {"input_ids", "attention_mask"}),
    ],
)  # fmt: skip
def test_models_without_images_or_text(kind: str, sizes: dict[str, Any], arguments: set[str], tmp_path: Path) -> None:
    """Encoders, both, towers alone; and a vision-language model whose image token is not in its vocabulary."""
    if kind == "llava":
        sizes = {**config_of("llava"), "image_token_index": 999_999}
    made = sample(written(tmp_path, {**sizes, "model_type": kind}), tokens=24)
    assert set(made.inputs) == arguments
    with torch.no_grad():
        made.model(**made.inputs)


def test_configs_are_told_from_scripts(tmp_path: Path) -> None:
    assert is_config("x/config.json")
    assert is_config(tmp_path)
    assert not is_config("script.py:build")


def test_what_was_left_out_is_in_the_words() -> None:
    assert str(Sample(torch.nn.Linear(1, 1), {}, "a thing", ())) == "a thing"
    assert str(Sample(torch.nn.Linear(1, 1), {}, "a thing", ("x 2 → 1", "y"))) == "a thing; shrunk: x 2 → 1, y"


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_report_says_what_it_is_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, page = written(tmp_path, config_of("llava")), tmp_path / "report.html"
    assert cli.main(["explain", str(tmp_path), "--tokens", "40", "--html", str(page)]) == 0
    text = capsys.readouterr().out
    first, second = text.splitlines()[:2]
    assert "2 of 4 attentions rewritten" in first
    assert second.startswith(f"of {path}: LlavaForConditionalGeneration (llava)"[:80])
    assert "num_hidden_layers 6 → 2" in text
    assert "num_hidden_layers 6 → 2" in page.read_text()
    assert cli.main(["explain", str(path), "--json"]) == 0
    saved = written(tmp_path, capsys.readouterr().out, "report.json")
    subject = json.loads(saved.read_text())["subject"]
    assert subject.startswith(f"{path}: LlavaForConditionalGeneration (llava), random weights, a prompt of 512 tokens")
    assert cli.main(["show", str(saved)]) == 0
    assert f"of {subject}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("data", "words", "code"),
    [
        (None, "there is no such file", 2),
        ("{", "is no JSON", 2),
        ("[1]", "names no model_type", 2),
        ("{}", "names no model_type", 2),
        ({"version": 1, "fingerprint": {}, "layers": []}, "`mmi show` shows head configs", 2),
        ({"model_type": "qwen2_5_lv"}, 'did you mean "qwen2_5_vl"?', 1),
        ({"model_type": "of a kind of its own"}, "explain a script", 1),
        ({"model_type": "llama", "hidden_size": "wide"}, "is no valid config of type 'llama'", 1),
        ({"model_type": "llama", "num_attention_heads": 7, "hidden_size": 64}, "", 1),
        ({"model_type": "qwen2", "hidden_size": 2**16, "num_attention_heads": 2**9}, "GiB even with few layers", 1),
        ({"model_type": "resnet", "hidden_sizes": [8, 8], "depths": [1, 1], "embedding_size": 8},
         "no attention was found in", 1),
        ({"model_type": "mamba", "hidden_size": 32, "state_size": 4}, "no attention was found in", 1),
    ],
)  # fmt: skip
def test_what_cannot_be_explained_is_said_in_one_sentence(
    data: Any, words: str, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.json"
    if data is not None:
        written(tmp_path, data)
    assert cli.main(["explain", str(path), "--tokens", "24"]) == code
    error = capsys.readouterr().err
    assert words in error
    assert len(error.strip().splitlines()) == 1


def test_folders_and_scripts_that_are_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A config and a script that are missing are the same mistake."""
    for place in (tmp_path, tmp_path / "none.json", tmp_path / "none.py"):
        assert cli.main(["explain", str(place)]) == 2
        assert capsys.readouterr().err.startswith("mmi: ")
    with pytest.raises(ConfigFileError, match=r"holds no config\.json"):
        sample(tmp_path)
    written(tmp_path, MISTRAL)
    assert cli.main(["verify", str(tmp_path / "config.json")]) == 2
    assert "a config has no weights" in capsys.readouterr().err
    (tmp_path / "script.py").write_text("")
    assert cli.main(["explain", str(tmp_path / "script.py"), "--tokens", "9"]) == 2
    assert "--tokens is for configs" in capsys.readouterr().err
