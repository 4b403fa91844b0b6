"""The key-value arena: one buffer for many layers, from which a tree's rejected nodes are dropped in place."""

import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

GROWTH = 256  # positions by which the arena grows at least


class ArenaLayer(CacheLayerMixin):
    """One layer's view, `[batch, heads, capacity, head_dim]`, of an arena's buffers."""

    is_sliding = False  # windows are the mask's business
    window: int | None = None

    def __init__(self, arena: "ArenaCache"):
        super().__init__()
        self._arena = weakref.ref(arena)  # not a cycle: what a call has used is gone with it, collector or not

    @property
    def arena(self) -> "ArenaCache":
        return self._arena()

    def update(self, key_states, value_states, *args, **kwargs):
        width = self.arena.width(self.window)
        if not self.is_initialized or width > self.keys.shape[-2]:
            self.arena.reserve(self, key_states, value_states, width)
        rows, slots = self.arena.slots(key_states, self.window)
        for buffer, states in ((self.keys, key_states), (self.values, value_states)):
            buffer[rows, :, slots] = states.transpose(1, 2)
        return self.keys[..., :width, :], self.values[..., :width, :]

    def lazy_initialization(self, key_states, value_states):
        self.arena.reserve(self, key_states, value_states, key_states.shape[-2])

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.arena.width(self.window), self.arena.offset(self.window)

    def get_seq_length(self) -> int:
        return 0 if self.arena.is_fixed else self.arena.longest  # the same in all rounds: a graph would freeze it

    def get_max_length(self) -> int:
        return -1


@dataclass
class Buffers:
    """K and V of layers of one shape and window, `[layers, batch, heads, capacity, head_dim]` each."""

    layers: list[ArenaLayer]
    keys: torch.Tensor
    values: torch.Tensor

    def __post_init__(self):
        for layer, layer.keys, layer.values in zip(self.layers, self.keys, self.values, strict=True):
            layer.dtype, layer.device, layer.is_initialized = layer.keys.dtype, layer.keys.device, True

    @property
    def window(self) -> int | None:
        return self.layers[0].window

    @property
    def pair(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.keys, self.values


class ArenaCache(Cache):
    """
    What a batch of sequences has of keys and values: of each its own number of positions, `lengths`.

    A forward's rows go where [`~ArenaCache.place`] says, behind each sequence; they count only once
    [`~ArenaCache.keep`] or [`~ArenaCache.advance`] says so. Of a layer with a sliding window no more than the last two
    windows are kept.

    For a graph shapes are fixed (`is_fixed`): attention sees the whole buffers, and masks hide what is not filled.

    Args:
        num_layers: how many layers.
        sequences: how many sequences.
        capacity: positions for which there is room from the start; more are made as needed.
        spare: rows that a forward may add, beside the two windows of a sliding layer of a fixed shape.
    """

    def __init__(self, num_layers: int, sequences: int = 1, capacity: int = 0, spare: int = 0):
        self.lengths, self.is_fixed, self.capacity, self.spare = [0] * sequences, False, capacity, spare
        self.kv_length = 0  # so many positions the last forward has seen
        self._first: dict[int, list[int]] = {}  # of each window: the position of the buffers' first column
        self._groups: list[Buffers] = []
        self._at: torch.LongTensor | None = None
        self._firsts: torch.LongTensor | None = None
        self._slots: dict[tuple, tuple[torch.LongTensor, torch.LongTensor]] = {}
        self._broken: list[ArenaLayer] = []
        super().__init__(layers=[ArenaLayer(self) for _ in range(num_layers)])

    @classmethod
    def from_dynamic(
        cls, cache: DynamicCache, capacity: int = 0, spare: int = 0, in_its_place: bool = False
    ) -> "ArenaCache":
        """A copy of a prefilled `DynamicCache`, see [`~ArenaCache.load`]."""
        layers = [layer for layer in cache.layers if layer.keys is not None]
        arena = cls(len(cache.layers), len(layers[0].keys) if layers else 1, capacity, spare)
        groups: dict[tuple, list[int]] = {}
        for index, layer in enumerate(cache.layers):
            arena.layers[index].window = window = getattr(layer, "sliding_window", None)
            if layer.keys is not None:
                keys, values = layer.keys, layer.values
                shape = (keys.shape[:2], keys.shape[3], values.shape[3], keys.dtype, keys.device, window)
                groups.setdefault(shape, []).append(index)
        for indices in groups.values():
            first = cache.layers[indices[0]]
            arena._allocate([arena.layers[i] for i in indices], first.keys, first.values, first.keys.shape[-2])
        arena.load(cache, in_its_place)
        return arena

    def load(self, cache: DynamicCache, in_its_place: bool = False) -> None:
        """
        Copies a prefilled cache of as many layers of the same shapes into the buffers.

        Args:
            in_its_place: empties that one, layer by layer.
        """
        length = cache.get_seq_length()
        self.lengths, self._first = [length] * len(self.lengths), {}
        for mine, layer in zip(self.layers, cache.layers, strict=True):
            if layer.keys is not None:
                held = layer.keys.shape[-2]
                if mine.window is not None:
                    self._first[mine.window] = [length - held] * len(self.lengths)
                mine.keys[..., :held, :] = layer.keys
                mine.values[..., :held, :] = layer.values
                if in_its_place:
                    layer.keys, layer.values, layer.is_initialized = None, None, False

    @property
    def longest(self) -> int:
        return max(self.lengths)

    @property
    def windows(self) -> list[int]:
        return sorted(self._first)

    @property
    def is_inference(self) -> bool:
        """Whether it was made in inference mode, so that nothing can be written to it outside."""
        return any(group.keys.is_inference() for group in self._groups)

    def begin(self, tokens: torch.LongTensor) -> tuple[Cache, torch.LongTensor]:
        """What a forward over `tokens` (`[batch, rows]`) is given: the cache, and the tokens that it reads for it."""
        return self, tokens

    @property
    def reread_rows(self) -> int:
        """The rows by which these are more, of tokens that were read before."""
        return 0

    def forget_pending(self) -> None:
        """Holds no more than what need not be read again."""

    # where a forward's rows go

    def behind(self, device: torch.device) -> torch.LongTensor:
        """The lengths, `[batch, 1]`."""
        return torch.tensor(self.lengths, device=device)[:, None]

    def firsts(self) -> list[list[int]]:
        """Of each sequence, for each of `windows`: the position of the first column."""
        return [[self._first[window][row] for window in self.windows] for row in range(len(self.lengths))]

    def place(self, at: torch.LongTensor, kv_length: int, firsts: torch.LongTensor | None = None) -> None:
        """
        The next forward's rows go to the positions from `at` (`[batch, 1]`) on, and attention sees the first so many.

        Args:
            firsts (`[batch, windows]`): [`~ArenaCache.firsts`] on the device, if they are there already.
        """
        if firsts is None and self._first:
            firsts = torch.tensor(self.firsts(), device=at.device)
        self._at, self.kv_length, self._firsts, self._slots = at, kv_length, firsts, {}

    def width(self, window: int | None = None) -> int:
        """The columns that layers of this window see."""
        if self.is_fixed:
            return self._fixed_capacity(window)
        return self.kv_length - min(self._first.get(window, (0,)))

    def offset(self, window: int | None) -> int:
        """The position of their first column, where all sequences have one."""
        return 0 if self.is_fixed else min(self._first.get(window, (0,)))

    def columns(self, window: int | None) -> torch.LongTensor:
        """The column at which each sequence's rows go to layers of this window, `[batch, 1]`."""
        if window not in self._first:
            return self._at
        index = self.windows.index(window)
        return self._at - self._firsts[:, index : index + 1]

    def shown(self, shown: torch.BoolTensor, window: int | None) -> torch.BoolTensor:
        """Of `shown` (`[batch, positions]`) what such a layer has as columns, `[batch, width]`."""
        width = self.width(window)
        if window not in self._first or not (self.is_fixed or any(self._first[window])):
            return shown[:, :width]
        index = self.windows.index(window)
        positions = self._firsts[:, index : index + 1] + torch.arange(width, device=shown.device)
        return shown.gather(1, positions.clamp(max=shown.shape[1] - 1))

    def slots(self, states: torch.Tensor, window: int | None) -> tuple[torch.LongTensor, torch.LongTensor]:
        """The sequences `[batch, 1]` and columns `[batch, rows]` of a layer's new states. Made once for all layers."""
        key = states.shape[-2], window, states.device
        if key not in self._slots:
            columns = self.columns(window).to(states.device)
            steps, batch = (torch.arange(size, device=states.device) for size in (key[0], len(columns)))
            self._slots[key] = batch[:, None], columns + steps
        return self._slots[key]

    # what stays of them

    def advance(self, counts: Iterable[int]) -> None:
        """Of each sequence so many of the rows just added count."""
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]

    def keep(self, paths: Sequence[list[int]]) -> None:
        """
        Of the rows that the last forward added, keeps those of each sequence's path (ascending, counted from the first
        added), moved together behind what it has; forgets the rest.
        """
        counts = [len(path) for path in paths]
        if any(path != list(range(len(path))) for path in paths):
            padded = torch.tensor([[*path, *range(len(path), max(counts))] for path in paths], device="cpu")
            for group in self._groups:
                end = self._ends(group.window)
                _move(group.pair, padded, end, end)
        self.advance(counts)

    def align(self) -> list[int]:
        """
        Lets all sequences end at the same position: the shorter ones begin later, behind zeros. Returns by how much,
        for [`~ArenaCache.unalign`].
        """
        shifts = [self.longest - length for length in self.lengths]
        if any(shifts):
            for group in self._groups:
                width = self.longest - min(self._first.get(group.window, (0,)))
                for layer in group.layers:  # one by one, for the sake of memory
                    pair = layer.keys, layer.values
                    _move(pair, torch.arange(width, device="cpu"), [-shift for shift in shifts], [0] * len(shifts))
                    for row, shift in enumerate(shifts):
                        layer.keys[row, :, :shift], layer.values[row, :, :shift] = 0, 0
            self.advance(shifts)
        return shifts

    def unalign(self, shifts: Sequence[int]) -> None:
        """Lets each sequence begin earlier by its shift."""
        for group in self._groups:
            if group.window not in self._first and any(shifts):
                columns = torch.arange(self.longest - min(shifts), device="cpu")
                for layer in group.layers:
                    _move((layer.keys, layer.values), columns, list(shifts), [0] * len(shifts))
        for window, first in self._first.items():
            self._first[window] = [start - shift for start, shift in zip(first, shifts, strict=True)]
        self.advance(-shift for shift in shifts)

    def _ends(self, window: int | None) -> list[int]:
        """Of each sequence the column behind what such a layer has."""
        first = self._first.get(window, [0] * len(self.lengths))
        return [length - start for length, start in zip(self.lengths, first, strict=True)]

    def make_room(self) -> None:
        """Where a sliding layer has more than two windows, keeps the last of them."""
        for window, first in self._first.items():
            if max(self._ends(window)) > 2 * window:
                now = [max(length - window, start) for length, start in zip(self.lengths, first, strict=True)]
                moved = [new - old for new, old in zip(now, first, strict=True)]
                most = max(length - start for length, start in zip(self.lengths, now, strict=True))
                for group in self._groups:
                    if group.window == window:
                        for layer in group.layers:  # one by one, for the sake of memory
                            _move((layer.keys, layer.values), torch.arange(most, device="cpu"), moved, [0] * len(now))
                self._first[window] = now

    def select(self, sequences: list[int]) -> None:
        """Keeps these sequences of the batch."""
        self.lengths = [self.lengths[i] for i in sequences]
        self._first = {window: [first[i] for i in sequences] for window, first in self._first.items()}
        self._groups = [Buffers(g.layers, *(buffer[:, sequences] for buffer in g.pair)) for g in self._groups]

    def append_to(self, cache: DynamicCache) -> None:
        """Writes the positions that `cache` lacks back into it; of sequences of one length."""
        start, (length,) = cache.get_seq_length(), set(self.lengths)
        if start >= length:
            return
        for index, (mine, layer) in enumerate(zip(self.layers, cache.layers, strict=True)):
            if not mine.is_initialized:
                continue
            if mine.window is None:
                cache.update(mine.keys[..., start:length, :], mine.values[..., start:length, :], index)
            else:  # of which it holds one position less than the window
                held, ends = min(mine.window - 1, length), self._ends(mine.window)
                layer.keys, layer.values = (
                    torch.stack([one[:, end - held : end] for one, end in zip(part, ends, strict=True)])
                    for part in (mine.keys, mine.values)
                )
                layer.cumulative_length = length

    # padding that is not a number

    def watch_padding(self) -> None:
        """See [`~ArenaCache.needs_plain_step`]."""
        self._broken = [layer for layer in self.layers if layer.is_initialized and layer.window]

    @property
    def needs_plain_step(self) -> bool:
        """
        Whether a sliding layer's window holds a key or value that is not a number, as padding may leave them. A mask
        does not hide these, for 0 times NaN is NaN; plain decoding is rid of them once they leave the window.
        """
        broken = []
        for layer in self._broken:
            lengths = self._ends(layer.window)
            gone = max(min(lengths) + 1 - layer.window, 0)
            for part in (layer.keys, layer.values):
                part[..., :gone, :] = 0
            if not all(part[..., gone : max(lengths), :].isfinite().all() for part in (layer.keys, layer.values)):
                broken.append(layer)
        self._broken = broken
        return bool(broken)

    # the buffers

    def resized(self, capacity: int) -> "ArenaCache":
        """An empty arena of the same layers, with room for `capacity` positions."""
        arena = ArenaCache(len(self.layers), len(self.lengths), capacity, self.spare)
        for mine, other in zip(arena.layers, self.layers, strict=True):
            mine.window = other.window
        for group in self._groups:
            layers = [arena.layers[self.layers.index(layer)] for layer in group.layers]
            arena._allocate(layers, *(buffer[0][..., :0, :] for buffer in group.pair), 0)
        return arena

    def copy_from(self, other: "ArenaCache") -> None:
        """Holds what `other`, an arena of the same layers, holds."""
        self.lengths, self._first = list(other.lengths), {k: list(v) for k, v in other._first.items()}
        for group, smaller in zip(self._groups, other._groups, strict=True):
            for buffer, old in zip(group.pair, smaller.pair, strict=True):
                held = min(old.shape[-2], buffer.shape[-2])
                buffer[..., :held, :] = old[..., :held, :]

    def clear(self) -> None:
        """Forgets everything; the buffers stay."""
        self.lengths, self._first = [0] * len(self.lengths), {}
        for buffer in (buffer for group in self._groups for buffer in group.pair):
            buffer.zero_()

    def reserve(self, layer: ArenaLayer, key_states: torch.Tensor, value_states: torch.Tensor, capacity: int) -> None:
        """Room for `capacity` positions in the layer and all that share its buffers."""
        number = next((n for n, group in enumerate(self._groups) if layer in group.layers), None)
        if number is None:
            self._allocate([layer], key_states, value_states, capacity)
            return
        group = self._groups[number]
        more = self._room(capacity, group.window) - group.keys.shape[-2]
        self._groups[number] = Buffers(group.layers, *(functional.pad(b, (0, 0, 0, more)) for b in group.pair))

    def _allocate(self, layers: list[ArenaLayer], keys: torch.Tensor, values: torch.Tensor, capacity: int) -> None:
        """Buffers for a group of layers, shaped after one layer's `keys` and `values`."""
        room = self._room(capacity, layers[0].window)
        pair = (x.new_zeros((len(layers), *x.shape[:2], room, x.shape[-1])) for x in (keys, values))
        self._groups.append(Buffers(layers, *pair))

    def _room(self, needed: int, window: int | None) -> int:
        if needed < self._fixed_capacity(window):
            return self._fixed_capacity(window)
        room = (max(needed + 1, int(1.25 * needed)) + GROWTH - 1) // GROWTH * GROWTH
        return room if window is None else min(room, max(needed, 2 * window + GROWTH))

    def _fixed_capacity(self, window: int | None) -> int:
        return self.capacity if window is None else min(self.capacity, 2 * window + self.spare)


def _move(buffers: Sequence[torch.Tensor], paths: torch.LongTensor, source: list[int], target: list[int]) -> None:
    """
    Within buffers `[..., batch, heads, columns, head_dim]`, the columns `source + paths` to those from `target` on.

    Args:
        paths (`[batch or 1, count]`), source, target (`[batch]`): on the host.
    """
    sequences, steps = torch.arange(len(source), device="cpu")[:, None], torch.arange(paths.shape[-1], device="cpu")
    source, target = (torch.tensor(s, device="cpu")[:, None] + add for s, add in ((source, paths), (target, steps)))
    last = buffers[0].shape[-2] - 1
    for device in {buffer.device for buffer in buffers}:
        to, rows, origin = (index.to(device) for index in (target, sequences, source.clamp(0, last)))
        for buffer in buffers:
            if buffer.device == device:
                buffer[..., rows, :, to, :] = buffer[..., rows, :, origin, :]
