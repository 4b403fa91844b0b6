"""The key-value arena: one buffer for many layers, from which a tree's rejected nodes are dropped in place."""

import weakref
from collections.abc import Sequence

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

GROWTH = 256  # positions by which the arena grows at least


class ArenaLayer(CacheLayerMixin):
    """One layer's view, `[batch, heads, capacity, head_dim]`, of an arena's buffers."""

    is_sliding = False  # windows are the mask's business: every layer stores every position
    window: int | None = None

    def __init__(self, arena: "ArenaCache"):
        super().__init__()
        self._arena = weakref.ref(arena)  # not a cycle: what a call has used is gone with it, collector or not

    @property
    def arena(self) -> "ArenaCache":
        return self._arena()

    def update(self, key_states, value_states, *args, **kwargs):
        if self.arena.is_fixed:
            slots = self.arena.slots(key_states.shape[-2])
            return self.keys.index_copy_(2, slots, key_states), self.values.index_copy_(2, slots, value_states)
        start = self.arena.length
        end = start + key_states.shape[-2]
        if not self.is_initialized or end > self.keys.shape[-2]:
            self.arena.reserve(self, key_states, value_states, end)
        self.keys[..., start:end, :] = key_states
        self.values[..., start:end, :] = value_states
        return self.keys[..., :end, :], self.values[..., :end, :]

    def lazy_initialization(self, key_states, value_states):
        self.arena.reserve(self, key_states, value_states, self.arena.length + key_states.shape[-2])

    def is_broken(self) -> bool:
        """Whether something in a window is not a number."""
        used = slice(max(min(self.arena.lengths) + 1 - self.window, 0), self.arena.length)
        return not all(bool(part[..., used, :].isfinite().all()) for part in (self.keys, self.values))

    def forget(self) -> None:
        """Leaves nothing of what is no longer in the window of a next token."""
        gone = slice(0, max(min(self.arena.lengths) + 1 - self.window, 0))
        self.keys[..., gone, :] = 0
        self.values[..., gone, :] = 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.arena.width(query_length), 0

    def get_seq_length(self) -> int:
        return 0 if self.arena.is_fixed else self.arena.length  # the same in all rounds: a graph would freeze it

    def get_max_length(self) -> int:
        return -1


class ArenaCache(Cache):
    """
    Layers of one shape share a K and a V buffer `[layers, batch, heads, capacity, head_dim]`.

    A forward appends its rows after `length`; they count only once [`~ArenaCache.keep`] says which of them stay. A
    batch holds `lengths` of them, and what lies between a shorter sequence and `length` is for the masks to hide.

    While a graph is captured `length` is a tensor `[1]`. All shapes are fixed then: attention sees the whole buffers,
    and the mask hides what is not filled.

    Args:
        num_layers: how many layers.
        capacity: positions for which there is room from the start; more are made as needed.
    """

    def __init__(self, num_layers: int, capacity: int = 0):
        self._own_lengths: list[int] | None = None
        self.length = 0
        self.least_capacity = capacity
        self._groups: list[list[ArenaLayer]] = []
        self._buffers: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._broken: list[ArenaLayer] = []
        super().__init__(layers=[ArenaLayer(self) for _ in range(num_layers)])

    @classmethod
    def from_dynamic(cls, cache: DynamicCache, capacity: int = 0) -> "ArenaCache":
        """A copy of a prefilled `DynamicCache`, see [`~ArenaCache.load`]."""
        arena = cls(len(cache.layers), capacity)
        groups: dict[tuple, list[int]] = {}
        for index, layer in enumerate(cache.layers):
            if layer.is_initialized:
                keys, values = layer.keys, layer.values
                shape = (keys.shape[:2], keys.shape[3], values.shape[3], keys.dtype, keys.device)
                groups.setdefault(shape, []).append(index)
        for indices in groups.values():
            first = cache.layers[indices[0]]
            arena._allocate([arena.layers[i] for i in indices], first.keys, first.values, cache.get_seq_length())
        arena.load(cache)
        return arena

    def load(self, cache: DynamicCache):
        """
        Copies a prefilled cache of as many layers of the same shapes into the buffers. Positions that a sliding layer
        has already forgotten are left as they are: the masks never show them again.
        """
        self._own_lengths, self.length = None, cache.get_seq_length()
        for mine, layer in zip(self.layers, cache.layers, strict=True):
            if layer.is_initialized:
                start = self.length - layer.keys.shape[-2]
                mine.keys[..., start : self.length, :] = layer.keys
                mine.values[..., start : self.length, :] = layer.values
                mine.window = getattr(layer, "sliding_window", None)

    def watch_padding(self) -> None:
        """See [`is_broken`]."""
        self._broken = [layer for layer in self.layers if layer.is_initialized and layer.window]

    @property
    def is_broken(self) -> bool:
        """
        Whether a sliding layer's window holds a key or value that is not a number, as padding may leave them. A mask
        does not hide these, for 0 times NaN is NaN; plain decoding is rid of them once they leave the window.
        """
        for layer in self._broken:
            layer.forget()
        self._broken = [layer for layer in self._broken if layer.is_broken()]
        return bool(self._broken)

    @property
    def length(self) -> int | torch.LongTensor:
        """Positions that count, in the longest sequence."""
        return self._length

    @length.setter
    def length(self, length: int | torch.LongTensor):
        self._length = length
        self._slots: tuple[int, torch.LongTensor | None] = (0, None)

    @property
    def lengths(self) -> list[int]:
        """Positions that count, of each sequence."""
        return [self.length] if self._own_lengths is None else self._own_lengths

    @lengths.setter
    def lengths(self, lengths: list[int]):
        self._own_lengths = lengths if len(lengths) > 1 else None
        self.length = max(lengths)

    def select(self, sequences: list[int]) -> None:
        """Keeps these sequences of the batch."""
        lengths = [self.lengths[i] for i in sequences]
        for number, (group, pair) in enumerate(zip(self._groups, self._buffers, strict=True)):
            self._buffers[number] = tuple(buffer[:, sequences] for buffer in pair)
            self._show(group, self._buffers[number])
        self.lengths = lengths

    @property
    def is_fixed(self) -> bool:
        """Whether shapes are those of the buffers, and `length` a tensor."""
        return isinstance(self.length, torch.Tensor)

    @property
    def is_inference(self) -> bool:
        """Whether it was made in inference mode, so that nothing can be written to it outside."""
        return any(keys.is_inference() for keys, _ in self._buffers)

    @property
    def capacity(self) -> int:
        return min((pair[0].shape[-2] for pair in self._buffers), default=0)

    def width(self, rows: int) -> int:
        """How many columns a mask has in a forward that appends so many rows."""
        return self.capacity if self.is_fixed else self.length + rows

    def slots(self, rows: int) -> torch.LongTensor:
        """Where a forward puts its rows, `[rows]`; with `length` a tensor. Made once for all layers."""
        if self._slots[0] != rows:
            self._slots = rows, torch.arange(rows, device=self.length.device) + self.length
        return self._slots[1]

    def resized(self, capacity: int) -> "ArenaCache":
        """An empty arena of the same layers, with room for `capacity` positions."""
        arena = ArenaCache(len(self.layers), capacity)
        for group, buffers in zip(self._groups, self._buffers, strict=True):
            nothing = [buffer[0][..., :0, :] for buffer in buffers]
            arena._allocate([arena.layers[self.layers.index(layer)] for layer in group], *nothing, 0)
        return arena

    def copy_from(self, other: "ArenaCache"):
        """Holds what `other`, an arena of the same layers, holds."""
        self.length = other.length
        for pair, others in zip(self._buffers, other._buffers, strict=True):
            for buffer, old in zip(pair, others, strict=True):
                buffer[..., : self.length, :] = old[..., : self.length, :]

    def clear(self):
        """Forgets everything; the buffers stay."""
        self.length = 0
        for pair in self._buffers:
            for buffer in pair:
                buffer.zero_()

    def append_to(self, cache: DynamicCache):
        """Writes the positions that `cache` lacks back into it, each layer trimming to its own window."""
        start = cache.get_seq_length()
        if start < self.length:
            for index, layer in enumerate(self.layers):
                if layer.is_initialized:
                    cache.update(
                        layer.keys[..., start : self.length, :], layer.values[..., start : self.length, :], index
                    )

    def keep(self, slots: Sequence[list[int]]):
        """
        Of the rows appended by the last forward, keeps of each sequence those at its `slots` (ascending, counted from
        the first appended), moved together behind what it has; forgets the rest.
        """
        start, lengths = self.length, self.lengths
        for sequence, (kept, length) in enumerate(zip(slots, lengths, strict=True)):
            if kept and (length, kept) != (start, list(range(len(kept)))):
                source = torch.tensor(kept, device=self._buffers[0][0].device) + start
                for buffer in (buffer for pair in self._buffers for buffer in pair):
                    moved = buffer[:, sequence].index_select(2, source.to(buffer.device))
                    buffer[:, sequence, :, length : length + len(kept)] = moved
        self.lengths = [length + len(kept) for length, kept in zip(lengths, slots, strict=True)]

    def gather(self, slots: torch.LongTensor):
        """[`~ArenaCache.keep`] of a single sequence, on tensors alone: `slots` is `[count]`, and `length` stays."""
        for pair in self._buffers:
            source = slots.to(pair[0].device) + self.length
            target = torch.arange(len(slots), device=source.device) + self.length
            for buffer in pair:
                buffer.index_copy_(3, target, buffer.index_select(3, source))

    def reserve(self, layer: ArenaLayer, key_states: torch.Tensor, value_states: torch.Tensor, capacity: int):
        """Room for `capacity` positions in the layer and all that share its buffers."""
        group = next((g for g in self._groups if layer in g), [layer])
        self._allocate(group, key_states, value_states, capacity)

    def _allocate(self, group: list[ArenaLayer], keys: torch.Tensor, values: torch.Tensor, capacity: int):
        """New, larger buffers for a group of layers, shaped after `keys` and `values`; old contents are copied."""
        if capacity < self.least_capacity:
            capacity = self.least_capacity
        else:
            capacity = (max(capacity + 1, int(1.25 * capacity)) + GROWTH - 1) // GROWTH * GROWTH
        number = self._groups.index(group) if group in self._groups else None
        pair = tuple(x.new_zeros((len(group), *x.shape[:2], capacity, x.shape[-1])) for x in (keys, values))
        if number is None:
            self._groups.append(group)
            self._buffers.append(pair)
        else:
            for new, old in zip(pair, self._buffers[number], strict=True):
                new[..., : self.length, :] = old[..., : self.length, :]
            self._buffers[number] = pair
        self._show(group, pair)

    @staticmethod
    def _show(group: list[ArenaLayer], pair: tuple[torch.Tensor, torch.Tensor]):
        for layer, layer_keys, layer_values in zip(group, *pair, strict=True):
            layer.keys, layer.values, layer.is_initialized = layer_keys, layer_values, True
            layer.dtype, layer.device = layer_keys.dtype, layer_keys.device
