"""A text that goes on in the next call, its cache passed in again: what the draft has read of it is kept with it."""

import weakref
from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache, DynamicCache

from ..host import length_of
from ..modeling_fspad import FSPADDraftModel
from ..runtime import common_prefix
from .cache import ArenaCache
from .remembered import Remembered

_read = Remembered()  # by the host's cache: it goes when that goes


@dataclass
class DraftState:
    """
    What a draft has read of a text without padding: (f_t, token t+1) for every t below `len(ids) - 1`.

    Args:
        ids: the text.
        cache: the draft's own keys and values, of the first pairs.
        pending: the other pairs: features (`[1, count, hidden]`) and tokens (`[1, count]`).
    """

    ids: list[int]
    cache: ArenaCache
    pending: list[tuple[torch.Tensor, torch.LongTensor]]

    def cut(self, pairs: int) -> None:
        """Forgets all but the first `pairs`."""
        self.cache.lengths = [min(self.cache.longest, pairs)]
        left, kept = pairs - self.cache.longest, []
        for features, tokens in self.pending:
            kept.append((features[:, :left], tokens[:, :left]))
            left -= kept[-1][1].shape[1]
        self.pending = [pair for pair in kept if pair[1].shape[1]]


def keep(cache: DynamicCache, draft: FSPADDraftModel, state: DraftState) -> None:
    """Remembers `state` for the next call with this cache and draft, for as long as the cache lives."""
    if state.cache.longest + sum(tokens.shape[1] for _, tokens in state.pending) == len(state.ids) - 1:
        _read.of(cache)[weakref.ref(draft)] = state


def take(cache: Cache | None, draft: FSPADDraftModel, input_ids: torch.LongTensor) -> DraftState | None:
    """
    What the draft has read of the tokens that `cache` holds, cut to those; `None` if that is not known or not all. A
    draft may then read the rest alone: it guesses worse for a while.
    """
    length = length_of(cache)
    state = _read.of(cache).pop(weakref.ref(draft), None) if length else None
    if state is None or (state.cache.is_inference and not torch.is_inference_mode_enabled()):
        return None
    if length >= common_prefix(state.ids, input_ids[0].tolist()):
        return None  # the pair of its last token lacks the token that follows now
    state.cut(length)
    return state
