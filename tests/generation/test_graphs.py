"""Captured rounds, by a recorder in a graph's place: the same tokens, whatever Python would have decided anew."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation.streamers import BaseStreamer

from fspad_hf import FSPADDraftModel
from fspad_hf.generation import graphs
from fspad_hf.generation.candidate_generator import FSPADCandidateGenerator
from fspad_hf.generation.graphs import WorkspacePool
from fspad_hf.generation.tree import CandidateTree

from .. import tiny
from ..conftest import fresh_draft, rng_state
from ..recorder import record

SAMPLED = {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9}


@pytest.fixture
def captured(monkeypatch):
    """Graphs on the CPU; the list grows by each capture."""
    made = []

    def capture(step, device):
        made.append(step)
        return record(step, device)

    monkeypatch.setattr(graphs, "capture", capture)
    monkeypatch.setattr(graphs, "can_capture", lambda device: True)
    monkeypatch.setattr(graphs, "SMALLEST_BUCKET", 64)
    return made


@pytest.fixture
def teach(monkeypatch):
    """`teach(reference, accuracy, vocab_size)`: trees that hold the reference's next tokens, scattered over the slots."""

    def use(reference, accuracy, vocab_size):
        truth = torch.tensor([*reference, *[0] * 64])
        right = torch.rand(len(truth), generator=torch.Generator().manual_seed(5)) < accuracy

        def grow_padded(self, root, shape, rows):
            here = self.cache.length + 1 + torch.arange(shape.depth) if shape.depth else None
            tokens, parents, depths, parent = [root[0]], [0], [0], 0
            for level in range(shape.depth):
                place = here[level : level + 1]
                true = torch.where(right[place], truth[place], (truth[place] + 3) % vocab_size)
                children = [(truth[place] + 1) % vocab_size, (truth[place] + 2) % vocab_size]
                children.insert(level % 3, true)
                parents += [parent] * 3
                depths += [level + 1] * 3
                parent = len(parents) - 3 + level % 3
                tokens += children
            numbers = [torch.arange(len(parents)) * 0]
            for values in (parents, depths):  # without constants made on the host
                numbers.append(sum((torch.arange(len(values)) == i) * v for i, v in enumerate(values)))
            scores = -torch.arange(len(parents), dtype=torch.float32)[None]
            return CandidateTree(torch.cat(tokens)[None], numbers[1][None], numbers[2][None], scores)

        monkeypatch.setattr(FSPADCandidateGenerator, "grow_padded", grow_padded)

    return use


@pytest.fixture
def check(captured, teach):
    """As the fixture `same`, on captured rounds."""

    def run(model, ids, *, accuracies=(0.0, 0.9), seed=3, each=None, refused=False, draft=None, **kwargs):
        draft = draft or fresh_draft(model, cuda_graphs=True, tree_depth=4, tree_top_k=3, tree_total_nodes=12)
        kwargs = {"max_new_tokens": 40, "eos_token_id": None, "pad_token_id": 0, **kwargs}
        kwargs["return_dict_in_generate"] = True
        make = each or (lambda: {})
        torch.manual_seed(seed)
        plain = model.generate(ids, **kwargs, **make())
        state = rng_state(ids.device)
        for accuracy in accuracies:
            mask = kwargs.get("attention_mask")
            shown = plain.sequences[0].tolist()[0 if mask is None else int((mask == 0).sum()) :]
            teach(shown, accuracy, model.config.get_text_config().vocab_size)
            WorkspacePool.of(draft).idle.clear()  # the graphs hold the other accuracy's trees
            torch.manual_seed(seed)
            fast = model.generate(ids, assistant_model=draft, **kwargs, **make())
            assert fast.speculation is not None
            assert fast.sequences.tolist() == plain.sequences.tolist()
            assert torch.equal(rng_state(ids.device), state)
        assert bool(WorkspacePool.of(draft).refused) == refused
        assert bool(captured) or refused
        return draft, plain, fast

    return run


@pytest.fixture
def prompt():
    return torch.randint(3, 64, (1, 9), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("settings", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", sorted(tiny.CONFIGS))
def test_the_same_tokens(check, prompt, name, settings):
    model = tiny.build(name, "eager" if name in ("gemma2", "gpt_oss") else "sdpa")
    _, _, fast = check(model, prompt, **settings)
    assert fast.speculation.tau > 2
