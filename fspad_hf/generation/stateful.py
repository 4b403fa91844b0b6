"""The cache of a target with recurrent layers: states hold a text as a whole, and no token is taken out again."""

from collections.abc import Sequence

import torch
from transformers.cache_utils import DynamicCache, LinearAttentionCacheLayerMixin

from .cache import ArenaCache

MOST_PENDING = 16  # tokens that are read again and again; with more of them comes a plain step, which takes them in


class StatefulCache(ArenaCache):
    """
    The host's own cache, at the last place that is sure; of a single sequence.

    A forward over a chain begins there. Where all of it is accepted, the cache stays as the forward has left it. Else
    the cache goes back, and the tokens accepted since are `pending`: the next forward reads them before its chain.
    Where all states are of convolutions, the cache is cropped, as transformers does it, and nothing is ever pending.

    Args:
        cache: prefilled with `length` tokens.
    """

    def __init__(self, cache: DynamicCache, length: int):
        super().__init__(0)
        self.host, self.lengths = cache, [length]
        self.pending: torch.LongTensor | None = None  # [1, count]
        self._read: torch.LongTensor | None = None  # by the last forward, what was pending included
        self._before: list[dict] | None = None
        states = [layer for layer in cache.layers if isinstance(layer, LinearAttentionCacheLayerMixin)]
        self.crops = not any(any(layer.is_recurrent_states_initialized.values()) for layer in states)
        if self.crops:
            cache.activate_past_recording()

    @property
    def reread_rows(self) -> int:
        return 0 if self.pending is None else self.pending.shape[1]

    @property
    def needs_plain_step(self) -> bool:
        return self.reread_rows > MOST_PENDING

    def begin(self, tokens: torch.LongTensor) -> tuple[DynamicCache, torch.LongTensor]:
        self._read = tokens if self.pending is None else torch.cat((self.pending, tokens), dim=1)
        if not self.crops:
            self._before = [_state_of(layer) for layer in self.host.layers]
        return self.host, self._read

    def keep(self, paths: Sequence[list[int]]) -> None:
        (path,) = paths
        rows, kept = self._read.shape[1], self.reread_rows + len(path)
        if self.crops:
            self.host.crop(kept - rows)
        elif kept == rows:
            self.pending, self._before = None, None
        else:
            self._go_back()
            self.pending = self._read[:, :kept]
        self.advance([len(path)])

    def forget_pending(self) -> None:
        """Counts what is pending no longer."""
        self.lengths, self.pending = [self.longest - self.reread_rows], None

    def append_to(self, cache: DynamicCache) -> None:
        if self._before is not None:
            self._go_back()
        for layer in cache.layers:
            if self.crops and hasattr(layer, "record_past"):
                layer.record_past = False

    def _go_back(self) -> None:
        for layer, state in zip(self.host.layers, self._before, strict=True):
            for name, was in state.items():
                if isinstance(was, dict):
                    _put_back(vars(layer)[name], was)
                else:
                    setattr(layer, name, was)
        self._before = None


def cache_of_rounds(cache: DynamicCache, length: int, in_its_place: bool = False) -> ArenaCache:
    """
    What rounds hold of a prefilled cache: a copy in an arena, or the cache itself where it has recurrent states.

    Args:
        length: tokens in it.
        in_its_place: empties it, see [`~ArenaCache.load`].
    """
    if is_stateful(cache):
        return StatefulCache(cache, length)
    return ArenaCache.from_dynamic(cache, in_its_place=in_its_place)


def is_stateful(cache: DynamicCache) -> bool:
    return any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in cache.layers)


def _state_of(layer) -> dict:
    """What a forward changes of a layer. Keys and values are replaced by longer ones; states are written over."""
    return {
        name: {i: part.clone() if isinstance(part, torch.Tensor) else part for i, part in value.items()}
        if isinstance(value, dict)
        else value
        for name, value in vars(layer).items()
    }


def _put_back(states: dict, was: dict) -> None:
    for i, part in was.items():
        if isinstance(part, torch.Tensor):
            states[i].copy_(part)  # compiled code knows its address
        else:
            states[i] = part
