"""Documents of many lengths as rows of one length."""

from bisect import bisect_left, insort
from collections.abc import Sequence

import torch


def pack(
    documents: Sequence[tuple[Sequence[int], Sequence[bool]]], row_length: int, padding: int
) -> tuple[torch.LongTensor, torch.BoolTensor, torch.LongTensor]:
    """
    Packs documents into rows, longest first, each into the row with the least room that takes it. No document is
    split; one longer than a row keeps its beginning.

    Args:
        documents: (ids, loss mask) of each, none of them empty.
        row_length: tokens a row.
        padding: the id after the last document of a row.

    Returns:
        ids, mask and segments, each `[rows, row_length]`; a segment is the number of its document within the row,
        from 1, and 0 is padding, where the mask is False.
    """
    lengths = [min(len(ids), row_length) for ids, _ in documents]
    rows: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (free, row), ascending
    for number in sorted(range(len(documents)), key=lambda i: -lengths[i]):
        place = bisect_left(rooms, (lengths[number], 0))
        free, row = rooms.pop(place) if place < len(rooms) else (row_length, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(number)
        insort(rooms, (free - lengths[number], row))
    ids = torch.full((len(rows), row_length), padding)
    mask, segments = torch.zeros_like(ids, dtype=torch.bool), torch.zeros_like(ids)
    for row, numbers in enumerate(rows):
        start = 0
        for segment, number in enumerate(numbers, start=1):
            end = start + lengths[number]
            ids[row, start:end] = torch.tensor(documents[number][0][:row_length])
            mask[row, start:end] = torch.tensor(documents[number][1][:row_length])
            segments[row, start:end] = segment
            start = end
    return ids, mask, segments


def segment_positions(segments: torch.LongTensor) -> torch.LongTensor:
    """Positions `[rows, length]` that start again at 0 with every segment."""
    index = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)
    starts = torch.ones_like(segments, dtype=torch.bool)
    starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return index - torch.where(starts, index, 0).cummax(dim=1).values


def segment_mask(segments: torch.LongTensor, dtype: torch.dtype, window: int | None = None) -> torch.Tensor:
    """
    The additive mask `[rows, 1, length, length]` of causal attention within each segment.

    Args:
        segments (`[rows, length]`): as [`pack`] gives them; padding sees padding, so that no row is without a key.
        dtype: of the mask; additive, because eager and flex attention misread boolean ones.
        window: how far back a token sees, itself included; `None` is without end.
    """
    index = torch.arange(segments.shape[1], device=segments.device)
    back = index[:, None] - index[None]
    seen = (back >= 0) if window is None else (back >= 0) & (back < window)
    seen = seen & (segments[:, :, None] == segments[:, None, :])
    return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)[:, None]


def continues(segments: torch.LongTensor) -> torch.BoolTensor:
    """`[rows, length]`: True where a token goes on with the document of the token before it."""
    inside = segments > 0
    inside[:, 0] = False
    inside[:, 1:] &= segments[:, 1:] == segments[:, :-1]
    return inside
