"""The key-value arena: one buffer for many layers, from which a tree's rejected nodes are dropped in place."""

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

GROWTH = 256  # positions by which the arena grows at least


class ArenaLayer(CacheLayerMixin):
    """One layer's view, `[batch, heads, capacity, head_dim]`, of an arena's buffers."""

    is_sliding = False  # windows are the mask's business: every layer stores every position

    def __init__(self, arena: "ArenaCache"):
        super().__init__()
        self.arena = arena

    def update(self, key_states, value_states, *args, **kwargs):
        start = self.arena.length
        end = start + key_states.shape[-2]
        if not self.is_initialized or end > self.keys.shape[-2]:
            self.arena.reserve(self, key_states, value_states, end)
        self.keys[..., start:end, :] = key_states
        self.values[..., start:end, :] = value_states
        return self.keys[..., :end, :], self.values[..., :end, :]

    def lazy_initialization(self, key_states, value_states):
        self.arena.reserve(self, key_states, value_states, self.arena.length + key_states.shape[-2])

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.arena.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.arena.length

    def get_max_length(self) -> int:
        return -1


class ArenaCache(Cache):
    """
    Layers of one shape share a K and a V buffer `[layers, batch, heads, capacity, head_dim]`.

    A forward appends its rows after `length`; they count only once [`~ArenaCache.keep`] says which of them stay.
    """

    def __init__(self, num_layers: int):
        self.length = 0
        self._groups: list[list[ArenaLayer]] = []
        self._buffers: list[tuple[torch.Tensor, torch.Tensor]] = []
        super().__init__(layers=[ArenaLayer(self) for _ in range(num_layers)])

    @classmethod
    def from_dynamic(cls, cache: DynamicCache) -> "ArenaCache":
        """
        Copies a prefilled `DynamicCache`. Positions that a sliding layer has already forgotten are left zero: the
        masks never show them again.
        """
        arena = cls(len(cache.layers))
        length = cache.get_seq_length()
        groups: dict[tuple, list[int]] = {}
        for index, layer in enumerate(cache.layers):
            if layer.is_initialized:
                keys, values = layer.keys, layer.values
                shape = (keys.shape[:2], keys.shape[3], values.shape[3], keys.dtype, keys.device)
                groups.setdefault(shape, []).append(index)
        for indices in groups.values():
            first = cache.layers[indices[0]]
            group = [arena.layers[i] for i in indices]
            arena._allocate(group, first.keys, first.values, length)
            for i, layer in zip(indices, group, strict=True):
                stored = cache.layers[i].keys.shape[-2]
                layer.keys[..., length - stored : length, :] = cache.layers[i].keys
                layer.values[..., length - stored : length, :] = cache.layers[i].values
        arena.length = length
        return arena

    def append_to(self, cache: DynamicCache):
        """Writes the positions that `cache` lacks back into it, each layer trimming to its own window."""
        start = cache.get_seq_length()
        if start < self.length:
            for index, layer in enumerate(self.layers):
                if layer.is_initialized:
                    cache.update(
                        layer.keys[..., start : self.length, :], layer.values[..., start : self.length, :], index
                    )

    def keep(self, slots: list[int]):
        """
        Of the rows appended by the last forward, keeps those at `slots` (ascending, counted from the first appended),
        moved together; forgets the rest.
        """
        if slots != list(range(len(slots))):
            start, end = self.length, self.length + len(slots)
            for pair in self._buffers:
                index = torch.tensor(slots, device=pair[0].device) + start
                for buffer in pair:
                    buffer[..., start:end, :] = buffer[..., index, :]
        self.length += len(slots)

    def reserve(self, layer: ArenaLayer, key_states: torch.Tensor, value_states: torch.Tensor, capacity: int):
        """Room for `capacity` positions in the layer and all that share its buffers."""
        group = next((g for g in self._groups if layer in g), [layer])
        self._allocate(group, key_states, value_states, capacity)

    def _allocate(self, group: list[ArenaLayer], keys: torch.Tensor, values: torch.Tensor, capacity: int):
        """New, larger buffers for a group of layers, shaped after `keys` and `values`; old contents are copied."""
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
        for layer, layer_keys, layer_values in zip(group, *pair, strict=True):
            layer.keys, layer.values, layer.is_initialized = layer_keys, layer_values, True
            layer.dtype, layer.device = layer_keys.dtype, layer_keys.device
