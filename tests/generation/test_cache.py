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
    arena.update(new, new, 0)
    arena.update(new, new, 1)
    arena.keep([[1, 5]])
    for index in range(2):
        expected = torch.cat((cache.layers[index].keys, new[..., [1, 5], :]), -2)
        torch.testing.assert_close(arena.layers[index].keys[..., :GROWTH, :], expected)


def test_written_back_into_the_hosts_own_sliding_cache():
    config = tiny.CONFIGS["gemma3_text"]()
    cache = DynamicCache(config=config)
    for index in range(2):
        cache.update(torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8), index)
    arena = ArenaCache.from_dynamic(cache)
    new = torch.randn(1, 2, 4, 8)
    for index in range(2):
        arena.update(new, new, index)
    arena.keep([[0, 3]])
    arena.append_to(cache)
    for index, kept in ((0, 11), (1, 5)):  # a window of 6 keeps 5
        assert cache.layers[index].get_seq_length() == 11
        assert cache.layers[index].keys.shape[-2] == kept
        torch.testing.assert_close(cache.layers[index].keys[..., -2:, :], new[..., [0, 3], :])
