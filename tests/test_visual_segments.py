"""Strides of rows and frames from grid metadata, and what happens where it disagrees with the prompt."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import mmi_compile
from mmi_compile import cached_prompt
from mmi_compile.decision import MMIError
from mmi_compile.prompt_hook import PromptHook
from mmi_compile.record import Record
from mmi_compile.visual_segments import GridMismatch, Grids, VisualSegment, find_segments, to_host

TEXT, IMAGE, VIDEO, OPEN, CLOSE = 3, 7, 9, 5, 6


class _Config:
    image_token_id, video_token_id = IMAGE, VIDEO

    class vision_config:
        spatial_merge_size = 2


def hook(strict: bool = False, config: object = _Config) -> PromptHook:
    model = torch.nn.Module()
    model.config = config
    return PromptHook(model, strict=strict)


def prompt(*parts: tuple[int, int]) -> Tensor:
    return torch.tensor([[token for token, count in parts for _ in range(count)]])


media = st.tuples(st.sampled_from([1, 2]), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(0, 3))


@given(st.lists(st.lists(media, max_size=4), min_size=1, max_size=3), st.sampled_from([1, 2]))
def test_media_of_any_size_in_any_order(elements, merge):
    """``media``: modality, frames, rows, columns, tokens before each frame. Neighbours may touch."""
    rows: list[list[int]] = []
    expected: list[VisualSegment] = []
    sizes: dict[int, list[tuple[int, int, int]]] = {1: [], 2: []}
    for b, element in enumerate(elements):
        row = [0]
        for modality, frames, height, width, gap in element:
            frames = frames if modality == 2 else 1
            start, stride = len(row) + gap, height * width + gap
            for _ in range(frames):
                row += [0] * gap + [modality] * (height * width)
            name = f"grid {modality}"
            known = stride if frames > 1 else None
            expected.append(VisualSegment(b, start, len(row), modality, frames, height, width, known, name))
            sizes[modality].append((frames, height * merge, width * merge))
        rows.append(row)
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], dtype=torch.int8)
    found = []
    for modality, grids in sizes.items():
        segments, note = find_segments(ids, Grids(f"grid {modality}", modality, tuple(grids), (merge,) * len(grids)))
        assert not note
        found += segments
    assert sorted(found, key=lambda s: (s.batch, s.start)) == expected


def test_time_stamps_of_varying_length_have_no_frame_stride():
    ids = torch.tensor([[2, 2, 0, 2, 2, 0, 0, 2, 2]])
    (segment,), note = find_segments(ids, Grids("video_grid_thw", 2, ((3, 1, 2),), (1,)))
    assert (segment.frame_stride, segment.frames, segment.rows, segment.tokens_per_row) == (None, 3, 1, 2)
    assert (segment.start, segment.stop) == (0, 9)
    assert note == "video_grid_thw: frames at 0 lie 3 to 4 tokens apart"


def test_an_interrupted_frame_has_no_rows():
    segments, note = find_segments(torch.tensor([[1, 1, 0, 1, 1]]), Grids("image_grid_thw", 1, ((1, 2, 2),), (1,)))
    assert not segments
    assert "a frame of 4 tokens is interrupted at 0" in note


def test_many_notes_are_few_words():
    ids = torch.tensor([[2, 0, 2, 0, 0, 2] * 50])
    _, note = find_segments(ids, Grids("video_grid_thw", 2, ((3, 1, 1),) * 50, (1,) * 50))
    assert note.count("lie") == 2
    assert note.endswith("and 48 more")


def test_a_medium_lies_in_one_batch_element():
    with pytest.raises(GridMismatch, match="4 tokens, of which batch element 0 holds 1"):
        find_segments(torch.tensor([[0, 0, 0, 1], [1, 1, 1, 0]]), Grids("image_grid_thw", 1, ((1, 2, 2),), (1,)))


def test_many_segments_on_the_host():
    frames = 3000
    ids = torch.tensor([[0, 2, 2, 2, 2] * frames])
    (segment,), note = find_segments(ids, Grids("video_grid_thw", 2, ((frames, 4, 4),), (2,)))
    assert (segment.frames, segment.frame_stride, segment.stop, note) == (frames, 5, 5 * frames, "")


# --- through the hook ---------------------------------------------------------------------------------------------


def video_inputs(frames: int = 2, **changes: Any) -> dict[str, Any]:
    ids = prompt((TEXT, 2), (OPEN, 1), (VIDEO, 4), (CLOSE, 1), (OPEN, 1), (VIDEO, 4), (CLOSE, 1))
    return {"input_ids": ids, "video_grid_thw": torch.tensor([[frames, 4, 4]]), **changes}


def test_separators_are_measured():
    (segment,) = hook(strict=True).read((), video_inputs()).segments
    assert segment == VisualSegment(0, 3, 13, 2, 2, 2, 2, 6, "video_grid_thw")


def test_metadata_that_disagrees():
    found = hook().read((), video_inputs(frames=3))
    assert found.ids is not None
    assert found.segments == ()
    assert found.grid_note.startswith("video_grid_thw describes 12 tokens, the prompt holds 8 of modality 2")
    with pytest.raises(MMIError, match=r"describes 12 tokens, the prompt holds 8 .*; pass the grids of exactly"):
        hook(strict=True).read((), video_inputs(frames=3))


def test_one_kind_of_media_may_disagree_alone():
    inputs = {
        "input_ids": prompt((IMAGE, 4), (TEXT, 1), (VIDEO, 3)),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "video_grid_thw": torch.tensor([[1, 4, 4]]),
    }
    found = hook().read((), inputs)
    assert [segment.modality for segment in found.segments] == [1]
    assert "4 tokens, the prompt holds 3" in found.grid_note


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        (torch.tensor([4, 4]), r"int64 \(2,\)"),
        (torch.tensor([[1, 4]]), r"\(1, 2\)"),
        (torch.tensor([[1.0, 4.0, 4.0]]), "float32"),
    ],
)
def test_grids_of_another_form(grid, message):
    with pytest.raises(MMIError, match=message):
        hook(strict=True).read((), video_inputs(video_grid_thw=grid))
    assert hook().read((), video_inputs(video_grid_thw=grid)).grid_note


def test_merge_sizes_are_an_argument_or_in_the_config():
    class Silent:
        image_token_id, video_token_id = IMAGE, VIDEO

    assert "name spatial_merge_size" in hook(config=Silent).read((), video_inputs()).grid_note
    inputs = video_inputs(video_merge_sizes=torch.tensor([2]))
    (segment,) = hook(strict=True, config=Silent).read((), inputs).segments
    assert segment.tokens_per_row == 2
    zero = hook(config=Silent).read((), video_inputs(video_merge_sizes=torch.tensor([0])))
    assert "merge sizes are known" in zero.grid_note


def test_dropped_tokens_leave_no_strides_and_are_no_error():
    kept = torch.tensor([True] * 8 + [False] * 4)
    found = hook(strict=True).read((), video_inputs(frames=3, video_compression_mask=kept))
    assert (found.segments, found.grid_note) == ((), "video_grid_thw: the model dropped 4 of 12 tokens")


def test_a_later_chunk_of_a_cached_prompt_is_no_disagreement():
    class Cache:
        def get_seq_length(self) -> int:
            return 5

    cache = Cache()
    found = hook(strict=True).read((), video_inputs(frames=3, past_key_values=cache))
    assert found.segments == ()
    assert "the cache holds 5 tokens of which nothing is known" in found.source
    cached_prompt.remember(cache, Record("a hook", ids=torch.zeros(1, 5, dtype=torch.int8)), 5)
    found = hook(strict=True).read((), video_inputs(frames=3, past_key_values=cache))
    assert found.ids is not None
    assert found.ids.shape == (1, 5 + video_inputs()["input_ids"].shape[1])
    assert found.segments == ()
    assert "later part of a cached prompt" in found.grid_note
    (segment,) = hook(strict=True).read((), video_inputs(past_key_values=cache)).segments
    (alone,) = hook(strict=True).read((), video_inputs()).segments
    assert (segment.start, segment.stop) == (alone.start + 5, alone.stop + 5)


def test_a_decode_step_reads_no_grids():
    found = hook(strict=True).read((), {"input_ids": prompt((TEXT, 1)), "video_grid_thw": torch.tensor([[9, 4, 4]])})
    assert (found.segments, found.grid_note) == ((), "")


def test_text_without_media_has_no_segments():
    found = hook(strict=True).read((), {"input_ids": prompt((TEXT, 5)), "image_grid_thw": torch.zeros(0, 3).long()})
    assert (found.segments, found.grid_note) == ((), "")


@pytest.mark.parametrize("value", [-1, 16, 300])
def test_types_out_of_range(value):
    inputs = {"input_ids": prompt((TEXT, 2), (IMAGE, 2)), "mm_token_type_ids": torch.tensor([[0, 0, value, 1]])}
    with pytest.raises(MMIError, match=r"mm_token_type_ids must be 0 … 15, found .*; number your own"):
        hook(strict=True).read((), inputs)
    found = hook().read((), inputs)
    assert found.ids is not None
    assert found.ids.tolist() == [[0, 0, 1, 1]]
    assert "input_ids and config; ignored: mm_token_type_ids must be" in found.source


def test_ids_by_hand_must_fit_under_strict():
    ids = torch.zeros(1, 4, dtype=torch.int64)
    with mmi_compile.modality(ids):
        with pytest.raises(MMIError, match=r"shape \(1, 4\) is not \(1, 14\); give one id per token"):
            hook(strict=True).read((), video_inputs())
        assert hook().read((), video_inputs()).segments
        assert hook(strict=True).read((), {"input_ids": prompt((TEXT, 1))}).source == "a decode step"
    with pytest.raises(MMIError, match="meta"), mmi_compile.modality(ids.to("meta")):
        pass


def test_positions_of_features_and_embeddings():
    embeds = torch.zeros(1, 3, 4)
    where = torch.tensor([[False, True, True]])
    found = hook(config=None).read((), {"inputs_embeds": embeds, "visual_pos_masks": where})
    assert found.source.startswith("visual_pos_masks (image and video are not told apart)")
    assert found.ids is not None
    assert (found.ids.tolist(), found.names) == ([[0, 4, 4]], {4: "vision"})
    found = hook().read((), {"inputs_embeds": embeds, "mm_token_type_ids": torch.tensor([[0, 2, 2]])})
    assert (found.source, found.ids.tolist()) == ("mm_token_type_ids", [[0, 2, 2]])


def test_to_host_keeps_values_and_shapes():
    tensors = [torch.tensor([[1, 2]], dtype=torch.int8), torch.zeros(0, 3).long(), torch.tensor([7])]
    for before, after in zip(tensors, to_host(tensors), strict=True):
        assert after.dtype == torch.int64
        assert after.tolist() == before.tolist()
        assert after.shape == before.shape
