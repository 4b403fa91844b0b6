"""The settings of speculation: chosen at the call unless set, refused where they make no sense, saved with a draft."""

import copy
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fspad_hf import FSPADDraftModel, SpeculationConfig

from .conftest import fresh_draft

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_what_is_chosen_with_nothing_set():
    assert all(value is None for value in vars(SpeculationConfig()).values())
    cpu, cuda, paper = (SpeculationConfig().resolved(device) for device in (CPU, CUDA, None))
    assert (cpu.tree, cuda.tree, paper.tree) == ("auto", "fixed", "fixed")
    assert (paper.tree_depth, paper.tree_top_k, paper.tree_total_nodes, paper.tree_lookup_tokens) == (6, 10, 59, 0)
    assert 1 + cpu.tree_total_nodes == 32 and cpu.tree_lookup_tokens > 0 < cuda.tree_lookup_tokens
    for chosen in (cpu, cuda, paper):
        assert chosen.coupled_drafting and None not in vars(chosen).values()
        assert chosen.resolved(CPU) == chosen


def test_a_tree_that_was_asked_for_is_the_one_grown():
    for settings in ({"tree_depth": 2}, {"tree_total_nodes": 5}, {"tree_top_k": 4}):
        chosen = SpeculationConfig(**settings).resolved(CPU)
        assert chosen.tree == "fixed" and settings.items() <= vars(chosen).items()
    assert SpeculationConfig("auto", tree_depth=2).resolved(CPU).tree == "auto"


@given(
    st.builds(
        SpeculationConfig,
        st.sampled_from([None, "auto", "fixed"]),
        *(st.none() | st.integers(low, high) for low, high in ((1, 64), (1, 256), (1, 1024), (0, 256))),
    ),
    st.sampled_from([None, CPU, CUDA]),
    st.none() | st.integers(1, 300),
)
def test_what_is_chosen_can_always_grow(config, device, vocabulary):
    """Too many nodes for a depth and a width are no error; what is looked up shares their number."""
    chosen = config.resolved(device, vocabulary)
    k = chosen.tree_top_k
    assert 1 <= chosen.tree_total_nodes <= k + (chosen.tree_depth - 1) * k**2 and k <= (vocabulary or 256)
    assert 0 <= chosen.tree_lookup_tokens <= chosen.tree_total_nodes


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("tree_depth", 0, "tree_depth=0 .*integer from 1 to 64"),
        ("tree_depth", "six", "tree_depth='six'"),
        ("tree_top_k", True, "tree_top_k=True"),
        ("tree_total_nodes", 4096, "tree_total_nodes=4096 .*from 1 to 1024"),
        ("tree_lookup_tokens", -1, "tree_lookup_tokens=-1"),
        ("tree", "best", "tree='best' is unknown: expected 'auto' or 'fixed'"),
        ("cuda_graphs", 1, "cuda_graphs=1 must be True, False"),
    ],
)
def test_nonsense_is_one_error_where_it_is_set(name, value, words):
    for attempt in (lambda: SpeculationConfig(**{name: value}), lambda: setattr(SpeculationConfig(), name, value)):
        with pytest.raises(ValueError, match=words):
            attempt()


def test_a_slip_of_the_pen_is_named():
    with pytest.raises(AttributeError, match="no field 'tree_dept': did you mean 'tree_depth'"):
        SpeculationConfig().tree_dept = 3
    with pytest.raises(AttributeError, match="expected one of"):
        SpeculationConfig().zzz = 3


def test_settings_travel_with_the_draft(llama, tmp_path, tokenizer):
    draft = FSPADDraftModel.from_target(llama, tree_depth=3)
    draft.save_pretrained(tmp_path, tokenizer=tokenizer)
    assert json.loads((tmp_path / "speculation_config.json").read_text()) == {"tree_depth": 3}
    assert not [
        name for name in json.loads((tmp_path / "config.json").read_text()) if "tree" in name or "specul" in name
    ]
    assert FSPADDraftModel.from_pretrained(tmp_path).speculation_config == SpeculationConfig(tree_depth=3)
    assert FSPADDraftModel.from_pretrained(
        tmp_path, tree_depth=5, tree="auto"
    ).speculation_config == SpeculationConfig("auto", 5)
    assert copy.deepcopy(draft).speculation_config == draft.speculation_config
    assert copy.deepcopy(draft).speculation_config is not draft.speculation_config
    draft.speculation_config.tree_depth = None
    draft.save_pretrained(tmp_path, tokenizer=tokenizer)
    assert json.loads((tmp_path / "speculation_config.json").read_text()) == {}
    assert FSPADDraftModel.from_pretrained(tmp_path).speculation_config == SpeculationConfig()


@pytest.mark.parametrize(
    ("written", "words"), [("[", "unusable"), ("[]", "unusable"), ('{"tree_depth": 0}', "unusable: tree_depth=0")]
)
def test_a_damaged_file_is_one_error(llama, tmp_path, tokenizer, written, words):
    fresh_draft(llama).save_pretrained(tmp_path, tokenizer=tokenizer)
    (tmp_path / "speculation_config.json").write_text(written)
    with pytest.raises(ValueError, match=words):
        FSPADDraftModel.from_pretrained(tmp_path)


def test_a_draft_of_an_older_version_loads(llama, tmp_path, tokenizer):
    """Its settings stood in config.json; those that were the defaults nobody had chosen."""
    FSPADDraftModel.from_target(llama).save_pretrained(tmp_path, tokenizer=tokenizer)
    told = json.loads((tmp_path / "config.json").read_text())
    old = {"tree_depth": 6, "tree_top_k": 10, "tree_total_nodes": 59, "tree_lookup_tokens": 0, "tree": "fixed"}
    old |= {"prepack_linears": True, "cuda_graphs": False, "coupled_drafting": False, "coupling_sharpness": 1.5}
    (tmp_path / "config.json").write_text(json.dumps(told | old))
    draft = FSPADDraftModel.from_pretrained(tmp_path)
    assert draft.speculation_config == SpeculationConfig(coupled_drafting=False)
    draft.save_pretrained(tmp_path, tokenizer=tokenizer)
    assert json.loads((tmp_path / "speculation_config.json").read_text()) == {"coupled_drafting": False}
    assert json.loads((tmp_path / "config.json").read_text()).keys().isdisjoint(old)


@pytest.mark.parametrize(("device", "most"), [("cpu", 32), ("cuda", 128)])
def test_trees_shrink_as_a_batch_grows(device, most):
    """All trees of a batch together, roots included, have no more nodes than that; a number that is set stays."""
    alone = SpeculationConfig().resolved(device).tree_total_nodes
    for batch in (1, 2, 3, 4, 8, 16):
        nodes = SpeculationConfig().resolved(device, batch=batch).tree_total_nodes
        assert nodes == min(alone, most // batch - 1)
        assert SpeculationConfig(tree_total_nodes=20).resolved(device, batch=batch).tree_total_nodes == 20
    assert SpeculationConfig().resolved(device, batch=500).tree_total_nodes == 1
