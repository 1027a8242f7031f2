"""Pages of the documentation that follow from the code: every reason, and the format of reports.

``python -m tests.report_docs --write`` writes them into ``docs/``; a test fails while they are out of date.
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmi_compile.decision import Reason
from mmi_compile.report_file import report_schema

DOCS = Path(__file__).resolve().parent.parent / "docs"

WHY: Mapping[Reason, str] = {
    Reason.BIDIRECTIONAL: """
        Sparse prefill is for causal attention, where later rows see ever more keys. Vision towers and encoders attend
        in both directions over few tokens; they are compiled by the inner backend as always. The same is said of a
        decoder whose mask was proved to let every token see every other.""",
    Reason.DECODE: """
        A decode step reads the whole cache for one row: its time is that of reading memory, and no plan would pay.
        The same compiled model rewrites the prefill and leaves these graphs alone.""",
    Reason.ONE_ROW: """
        A pooling head (SigLIP has one) asks one learned query of all patches. It is told from a decode step by its
        keys: they are computed in the graph, and nothing that was given to it is among them.""",
    Reason.UNKNOWN_MASK: """
        A mask goes away only when what it means is proved, as an expression over positions and padding. The detail
        names the node at which the proof stopped: a mask that is learned or looked up, a bias such as ALiBi, a mask
        that enters the graph ready made, or a term that the algebra does not know. What is not proved is kept, so
        results stay those of the model.""",
    Reason.MUTATED: """
        Queries, keys, values or scores are written to between the operations of an attention that is written out. To
        replace the whole, their values must be those that the first operation saw.""",
    Reason.UNKNOWN_OFFSET: """
        In chunked prefill the first row stands behind the tokens in the cache. The graph must tell how many there
        are: as a number, or as the difference of the lengths of keys and queries. A static cache that is filled
        further keeps that number in a tensor, where it cannot be read without waiting for the device. Rows before the
        first key, and under masks that group tokens rows behind the last one, have no place either: more query rows
        than keys are left alone there.""",
    Reason.SCALE: """
        Kernels hide keys by scores of minus infinity, which a scale of zero or less turns into NaN or into the best of
        all; PyTorch's own fused causal attention gives NaN there. A head that prefers unlike keys is the same with the
        sign in its queries.""",
    Reason.GRAD_ENABLED: "The operators have no backward. Attention under autograd stays as it is.",
    Reason.DROPOUT: """
        Dropping weights at random is training's business; the operators compute what the model computes in
        evaluation.""",
    Reason.WEIGHTS_USED: """
        Something else than the product with the values reads the N × N weights: the model returns them, or a hook
        does. They cannot be left out then. An implementation that never returns them is
        attn_implementation="sdpa".""",
    Reason.DTYPE: """
        Kernels work in one dtype for q, k, v and the result: float16 or bfloat16 on a GPU, also float32 and float64
        on a CPU. A cast between the two products of an attention that is written out, or autocast, may make them
        differ.""",
    Reason.HEAD_DIM: """
        Tiles are made for head dims that are multiples of 8 up to 256, the same for keys and values, known while
        compiling.""",
    Reason.SHAPE: """
        The operators take [batch, heads, tokens, head dim] with key heads that divide the query heads. Attention
        inside an operator that does more, such as PyTorch's fused encoder layer, is found and named, but cannot be
        taken out.""",
    Reason.DEVICE: "There are kernels for CUDA and ROCm, and a tile-sparse path for the CPU.",
    Reason.TRITON_MISSING: "Kernels for GPUs are generated as Triton, which PyTorch's CPU builds do not bring along.",
    Reason.HEAD_CONFIG_MISFIT: """
        A head config names the numbers of layers, query heads and key heads and the head dim of its model. With
        others, its patterns would be those of other heads; so the mask is still proved and removed, and all heads run
        dense. The detail says which number differs.""",
    Reason.LAYER_UNKNOWN: """
        Which layer of the head config an attention is follows from the paths of modules, or from the order where one
        graph holds all layers. Graph breaks between layers, or two decoders in one graph, leave a doubt; then all
        heads run dense.""",
    Reason.MASK_IS_INPUT: """
        Only a mask whose making a graph holds can be proved. Where the graph breaks before the attention (Qwen3-VL
        under the bare backend breaks inside its loop over layers), the finished mask comes in as data.""",
    Reason.GROUPED_MASK: """
        Documents packed side by side, chunks and bidirectional image blocks are lowered to one interval of keys for
        each row and run exactly. Patterns and boundaries are made for masks that are causal; under any policy such an
        attention drops nothing.""",
    Reason.SKIPPED: """
        skip_passes and passes_until are for finding faults. What the left-out passes would have found is not known,
        so the attention stays as it was. The detail names the pass.""",
    Reason.PASS_FAILED: """
        The passes work on a copy. When one raises an exception, the graph that Dynamo captured is compiled as if this
        backend did nothing, and the report holds the exception; under strict it is raised. The same holds where the
        inner backend cannot compile the rewritten graph.""",
}
"""What one should know of a reason beside its message and its mend."""

_REASONS = """# Reasons

Why an attention was left as it was, or runs densely although the policy asks for more. Reports name the reason with a
detail (the fact behind it), the user's source line, and the mend. This page is generated from
`mmi_compile.Reason` by `python -m tests.report_docs --write`.

| reason | what | mend |
| --- | --- | --- |
"""

_REPORT = """# Reports as JSON

`mmi explain script.py:build --json`, `Report.to_json()` and `Report.dumps()` give a report in the format below;
`mmi show FILE.json` prints one that was saved. The machine-readable form is the JSON Schema (draft 2020-12)
[report.schema.json](../mmi_compile/templates/report.schema.json), also as `mmi_compile.report_file.report_schema()`.
This page is generated from it by `python -m tests.report_docs --write`.

**Versions.** `schema` is the version of the format. It is raised by every change that could break a reader: a field
that is removed, renamed, or means something else. Fields may be added without raising it, so ignore those that you do
not know. `mmi show` and `mmi_compile.report_file.load_report` refuse a report of another version with a sentence that
names both versions.

**Units** are in the names (`seconds`, `milliseconds`) or below: lengths are tokens, densities and recalls are shares
from 0 to 1, errors are ratios. Numbers that could not be computed (NaN) are null.

A report holds what a bug report needs: versions, options, graphs and decisions. It holds no weights and no outputs, and
of prompts only which tokens are text, image or video.

## From a config

`mmi explain config.json`, or the folder that holds one, explains a Hugging Face model of which there is nothing but its
config: no weights are read and nothing is downloaded. transformers' own class is built with random weights and runs
once on the CPU, and `subject` names everything that is smaller than in the config:

```text
of config.json: Gemma3ForConditionalGeneration (gemma3), random weights, a prompt of 1088 tokens, 256 of them
   an image's; shrunk: text_config.num_hidden_layers 34 → 3 (layers 0, 1, 5), …
```

* **Kept**: numbers of heads, head dims, hidden sizes, kinds of masks, sliding windows, token ids, dtype.
* **Shrunk**: layers, to the first two and one of every kind that the config tells apart (`layer_types`, windowed layers
  of a vision tower, layers that share keys), so that numbers of layers in the report count those that are left; the
  widths of MLPs, outside vision towers; the memory of embeddings; the output layer.
* **The prompt** has an image wherever one is found that the model runs on, else it is text, and `subject` says so. Its
  length is `--tokens`, or more where an image, or a sliding window of up to 4096 tokens, would not be seen otherwise.

What is proved of masks, phases and shapes holds for the model itself. Patterns, densities and times are those of random
weights, and say nothing of it: for those, give a script that loads the weights, as `mmi search` and `mmi verify` want.
"""


def reasons_page() -> str:
    """``docs/reasons.md``: one heading, and so one anchor, for each reason."""
    rows = [f"| [{r.name.lower()}](#{r.name.lower()}) | {r.message} | {r.mend} |" for r in Reason]
    parts = [
        f"## {r.name.lower()}\n\n**{r.message[0].upper()}{r.message[1:]}.**\n{_filled(WHY[r])}\n\n*Mend:* {r.mend}.\n"
        for r in Reason
    ]
    return _REASONS + "\n".join(rows) + "\n\n" + "\n".join(parts)


def _filled(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), 120, break_on_hyphens=False, break_long_words=False)


def report_page() -> str:
    """``docs/report.md``."""
    return _REPORT + "\n" + "\n".join(_tables("Report", report_schema())).rstrip() + "\n"


def _tables(title: str, schema: Mapping[str, Any]) -> Iterator[str]:
    """A table for an object, then those of the objects inside it."""
    yield f"## {title}\n\n{schema['description']}\n\n| field | type | meaning |\n| --- | --- | --- |"
    inner: list[tuple[str, Mapping[str, Any]]] = []
    for name, field in schema["properties"].items():
        yield f"| `{name}` | {_kind(field)} | {field['description']} |"
        part = field
        while "items" in part:
            part = part["items"]
        if "properties" in part:
            inner.append((name if title == "Report" else f"{title}.{name}", part))
    yield ""
    for name, part in inner:
        yield from _tables(name, part)


def _kind(field: Mapping[str, Any]) -> str:
    if "const" in field:
        return f"always {field['const']}"
    kinds = [field["type"]] if isinstance(field["type"], str) else field["type"]
    words = [f"array of {_kind(field['items'])}" if kind == "array" and "items" in field else kind for kind in kinds]
    if "enum" in field:
        words = [", ".join(f"`{word}`" if word else "empty" for word in field["enum"])]
    return " or ".join(words)


PAGES = {"reasons.md": reasons_page, "report.md": report_page}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="write the pages instead of printing them")
    given = parser.parse_args()
    for name, page in PAGES.items():
        if given.write:
            (DOCS / name).write_text(page(), encoding="utf-8")
        else:
            print(page())


if __name__ == "__main__":
    main()
