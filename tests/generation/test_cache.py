import pytest
import torch
from transformers import DynamicCache

from fspad_hf.generation.cache import GROWTH, ArenaCache

from .. import tiny


def filled(shapes, length):
    cache = DynamicCache()
    for index, (heads, key_dim, value_dim) in enumerate(shapes):
        cache.update(torch.randn(1, heads, length, key_dim), torch.randn(1, heads, length, value_dim), index)
    return cache


@pytest.mark.parametrize("shapes", [[(2, 4, 4)] * 3, [(2, 4, 6), (1, 8, 8), (2, 4, 6)]])
def test_a_scattered_path_is_compacted_in_every_layer(shapes):
    cache = filled(shapes, 5)
    arena = ArenaCache.from_dynamic(cache)
    arena.place(torch.tensor([[5]]), 9)
    rows = [(torch.randn(1, h, 4, k), torch.randn(1, h, 4, v)) for h, k, v in shapes]
    for index, (keys, values) in enumerate(rows):
        seen_keys, seen_values = arena.update(keys, values, index)
        assert seen_keys.shape[-2] == seen_values.shape[-2] == 9
    arena.keep([[0, 2, 3]])
    assert arena.get_seq_length() == 8
    for index, (keys, values) in enumerate(rows):
        layer, before = arena.layers[index], cache.layers[index]
        torch.testing.assert_close(layer.keys[..., :8, :], torch.cat((before.keys, keys[..., [0, 2, 3], :]), -2))
        torch.testing.assert_close(layer.values[..., :8, :], torch.cat((before.values, values[..., [0, 2, 3], :]), -2))


def test_growth_keeps_the_contents_of_layers_not_yet_written():
    shapes = [(2, 4, 4)] * 2
    cache = filled(shapes, GROWTH - 2)
    arena = ArenaCache.from_dynamic(cache)
    new = torch.randn(1, 2, 2 * GROWTH, 4)
    arena.place(torch.tensor([[GROWTH - 2]]), 3 * GROWTH - 2)
    arena.update(new, new, 0)
    arena.update(new, new, 1)
    arena.keep([[1, 5]])
    for index in range(2):
        expected = torch.cat((cache.layers[index].keys, new[..., [1, 5], :]), -2)
        torch.testing.assert_close(arena.layers[index].keys[..., :GROWTH, :], expected)


def positions_of(arena, layer):
    """Of each sequence, the positions that a layer holds, told by its keys."""
    first = arena._first[layer.window]
    return [[int(x) for x in layer.keys[row, 0, : arena.lengths[row] - first[row], 0]] for row in range(len(first))]


@pytest.mark.parametrize("in_its_place", [False, True])
def test_a_sliding_layer_holds_two_windows_and_a_tree(in_its_place):
    """Two sequences at their own pace; each always has its last window, and a host's cache can be emptied."""
    config, window, rows = tiny.CONFIGS["gemma3_text"](), 6, 3
    config.sliding_window = window
    cache = DynamicCache(config=config)
    shown = torch.arange(20.0)[None, None, :, None].expand(2, 2, 20, 8)
    for index in range(2):
        cache.update(shown, shown, index)
    arena = ArenaCache.from_dynamic(cache, in_its_place=in_its_place)
    assert all((layer.keys is None) == in_its_place for layer in cache.layers)
    sliding = next(layer for layer in arena.layers if layer.window == window)
    for step in range(60):
        arena.make_room()
        ends = arena.behind(torch.device("cpu"))
        arena.place(ends, arena.longest + rows)
        new = (ends + torch.arange(rows))[:, None, :, None].float().expand(2, 2, rows, 8)
        for index in range(2):
            keys, values = arena.update(new, new, index)
            assert keys.shape == values.shape
        arena.keep([list(range(1 + step % rows)), [0]])
        for row, held in enumerate(positions_of(arena, sliding)):
            end = arena.lengths[row]
            assert held[-window:] == list(range(end - window, end)) and len(held) <= 2 * window + rows
    assert arena.lengths == [140, 80] and sliding.keys.shape[2] <= 2 * window + GROWTH
    fixed = ArenaCache(2, 1, capacity=512, spare=rows)
    fixed.layers[0].window = window
    for layer in fixed.layers:
        layer.lazy_initialization(new[:1, :, :0], new[:1, :, :0])
    assert [layer.keys.shape[2] for layer in fixed.layers] == [2 * window + rows, 512]


def test_written_back_into_the_hosts_own_sliding_cache():
    config = tiny.CONFIGS["gemma3_text"]()
    cache = DynamicCache(config=config)
    for index in range(2):
        cache.update(torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8), index)
    arena = ArenaCache.from_dynamic(cache)
    arena.place(torch.tensor([[9]]), 13)
    new = torch.randn(1, 2, 4, 8)
    for index in range(2):
        arena.update(new, new, index)
    arena.keep([[0, 3]])
    arena.append_to(cache)
    for index, kept in ((0, 11), (1, 5)):  # a window of 6 keeps 5
        assert cache.layers[index].get_seq_length() == 11
        assert cache.layers[index].keys.shape[-2] == kept
        torch.testing.assert_close(cache.layers[index].keys[..., -2:, :], new[..., [0, 3], :])
