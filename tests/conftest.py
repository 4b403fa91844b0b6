import os
import random
import signal

import pytest
import torch
from huggingface_hub import constants, hf_api
from transformers.utils import hub

from fspad_hf import FSPADDraftModel
from fspad_hf.generation import graphs
from fspad_hf.generation.drafting import Drafter, latest
from fspad_hf.generation.rounds import Rounds
from fspad_hf.generation.tree import CandidateTree

from . import tiny
from .hub_server import HubServer
from .recorder import record

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell's background jobs have it, and their children
    signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)  # tiny tensors: a second thread only waits
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports it


@pytest.fixture(scope="session")
def llama():
    return tiny.build("llama")


@pytest.fixture(scope="session")
def llama_draft(llama):
    return fresh_draft(llama)


@pytest.fixture(scope="session")
def tokenizer():
    return tiny.tokenizer()


@pytest.fixture(scope="session")
def pair(tmp_path_factory, tokenizer):
    """A target whose answers have a known length, and a draft for it: their folders, as the commands' options."""
    folder, model = tmp_path_factory.mktemp("pair"), tiny.build("llama")
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder / "target")
    tokenizer.save_pretrained(folder / "target")
    fresh_draft(model, tree_total_nodes=6, tree_top_k=3).save_pretrained(folder / "draft", tokenizer=tokenizer)
    return {"target": str(folder / "target"), "draft": str(folder / "draft"), "device": "cpu"}


@pytest.fixture
def captured(monkeypatch):
    """Graphs on the CPU; the list grows by each capture."""
    made = []

    def capture(step, device, pool=None):
        made.append(None)
        return record(step)

    monkeypatch.setattr(graphs, "capture", capture)
    monkeypatch.setattr(graphs, "can_capture", lambda device: True)
    monkeypatch.setattr(graphs, "SMALLEST_BUCKET", 64)
    return made


@pytest.fixture
def teach(monkeypatch):
    """
    `teach(reference, accuracy, vocab_size, device)`: an oracle that a graph can hold, whose trees have the reference's
    next tokens, scattered over the slots.
    """

    def use(reference, accuracy, vocab_size, device="cpu"):
        truth = torch.tensor([*reference, *[0] * 64], device=device)
        right = (torch.rand(len(truth), generator=torch.Generator().manual_seed(5)) < accuracy).to(device)

        def numbers(values):
            """Without a constant made on the host."""
            places = torch.arange(len(values), device=device)
            return sum(((places == i) * value for i, value in enumerate(values)), torch.zeros_like(places))[None]

        def grow(self, read, ends, roots, shape, noise=None):
            here = torch.arange(shape.depth, device=device) + ends[0] + 1
            tokens, parents, depths, parent = [roots[0]], [0], [0], 0
            for level in range(shape.depth):
                place = here[level : level + 1]
                true = torch.where(right[place], truth[place], (truth[place] + 3) % vocab_size)
                children = [(truth[place] + 1) % vocab_size, (truth[place] + 2) % vocab_size]
                children.insert(level % 3, true)
                parents += [parent] * 3
                depths += [level + 1] * 3
                parent = len(parents) - 3 + level % 3
                tokens += children
            scores = -torch.arange(len(parents), dtype=torch.float32, device=device)[None]
            return CandidateTree(torch.cat(tokens)[None], numbers(parents), numbers(depths), scores)

        monkeypatch.setattr(Drafter, "grow", grow)

    return use


@pytest.fixture
def local_hub(monkeypatch, tmp_path):
    """A hub that this process knows instead of the real one, with an empty cache; alice is logged in."""
    with HubServer({"hf_alice": "alice", "hf_bob": "bob"}) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        monkeypatch.setattr(hf_api.api, "endpoint", server.endpoint)  # both keep the endpoint that they began with
        monkeypatch.setattr(hub, "_hf_api", None, raising=False)
        template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", "hf_alice")
        yield server


@pytest.fixture
def prompt():
    return torch.tensor([[1, 17, 5, 40, 9, 33, 21, 8, 50, 12, 3]])


def fresh_draft(target, **overrides) -> FSPADDraftModel:
    """With the paper's trees unless told otherwise, so that tests meet trees however little they would pay."""
    overrides = {"tree": "fixed", "tree_lookup_tokens": 0, **overrides}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return FSPADDraftModel.from_target(target, **overrides)


def grown(drafter, read, roots, shape, noise=None) -> CandidateTree:
    """A tree behind all that `drafter` has accepted, `read` being what came of it last."""
    counts = torch.full_like(roots, read.features.shape[1])
    return drafter.grow(latest(read, counts), drafter.cache.behind(roots.device), roots, shape, noise).trimmed()


def rng_state(device: torch.device) -> torch.Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def plain_run(model, ids, seed, make, kwargs):
    """Plain generate: its arguments but for those that `make` makes for each call, its output, the state after it."""
    kwargs = {"max_new_tokens": 40, "eos_token_id": None, "pad_token_id": 0, **kwargs}
    kwargs["return_dict_in_generate"] = True
    torch.manual_seed(seed)
    plain = model.generate(ids, **kwargs, **make())
    return kwargs, plain, rng_state(ids.device)


class Oracle:
    """
    Grows trees around a known continuation: the true next token with probability `accuracy`, plus distractors.

    Distractors come before and after the true child and have children of their own, so that an accepted path is
    scattered over the slots: a random draft would hardly ever exercise the compaction of such paths.
    """

    def __init__(self, reference: list[int], accuracy: float, vocab_size: int):
        self.reference, self.accuracy, self.vocab_size = reference, accuracy, vocab_size
        self.random = random.Random(0)

    def grow(self, length, root, depth):
        """Behind a text of so many tokens, of which `root` is the last."""
        tokens, parents, depths, true_nodes = [int(root)], [0], [0], {0}
        level = [0]
        for d in range(1, depth + 1):
            grown = []
            for parent in self.random.sample(level, min(3, len(level))) + [n for n in level if n in true_nodes]:
                if any(parents[n] == parent for n in grown):
                    continue
                truth = self.reference[length + d - 1] if length + d - 1 < len(self.reference) else None
                children = set(self.random.sample(range(self.vocab_size), 2)) - {truth}
                right = parent in true_nodes and truth is not None and self.random.random() < self.accuracy
                for token in self.random.sample([*children, truth] if right else [*children], len(children) + right):
                    grown.append(len(tokens))
                    if right and token == truth:
                        true_nodes.add(len(tokens))
                    tokens.append(token), parents.append(parent), depths.append(d)
            level = grown
        return self._tree(tokens, parents, depths, root)

    def chain(self, length, root, depth):
        """One path, of which each token is right with probability `accuracy`."""
        known = self.reference[length : length + depth] + [0] * depth
        tokens = [t if self.random.random() < self.accuracy else (t + 1) % self.vocab_size for t in known[:depth]]
        steps = list(range(depth + 1))
        return self._tree([int(root), *tokens], [max(step - 1, 0) for step in steps], steps, root)

    @staticmethod
    def _tree(tokens, parents, depths, root):
        scores = torch.arange(0.0, -len(tokens), -1)[None]
        return CandidateTree(
            *(torch.tensor([x], device=root.device) for x in (tokens, parents, depths)), scores.to(root.device)
        )


def oracles_growth(oracles, monkeypatch):
    """In place of `Drafter.grow`: the trees of the sequences that still go on, by the oracle of each."""
    going, draft = [], Rounds.draft

    def drafted(self, told):
        going[:] = [emitter.sequence for emitter in self.emitters]
        return draft(self, told)

    monkeypatch.setattr(Rounds, "draft", drafted)

    def grow(self, read, ends, roots, shape, noise=None):
        rows = zip(going, ends[:, 0].tolist(), roots, strict=True)
        kind = Oracle.chain if shape.top_k == 1 else Oracle.grow
        return CandidateTree.stacked([kind(oracles[n], length + 1, root, shape.depth) for n, length, root in rows])

    return grow


@pytest.fixture
def oracle(monkeypatch):
    """Replaces the draft's trees by [`Oracle`]s': `oracle(references, accuracy, vocab_size)`, one a sequence."""

    def use(references, accuracy, vocab_size):
        made = [Oracle(reference, accuracy, vocab_size) for reference in references]

        monkeypatch.setattr(Drafter, "grow", oracles_growth(made, monkeypatch))

    yield use


@pytest.fixture
def same(oracle):
    """
    `same(model, ids, ...)`: plain generate and speculative generate give the same tokens and the same generator state,
    for three accuracies of the oracle, without a fall-back and with tau > 2 at the best. Returns the last pair.
    """

    def check(model, ids, *, draft=None, accuracies=(0.0, 0.5, 0.95), seed=3, min_tau=2.0, each=None, **kwargs):
        draft = draft if draft is not None else fresh_draft(model)
        make = each or (lambda: {})
        kwargs, plain, state = plain_run(model, ids, seed, make, kwargs)
        references = plain.sequences.tolist()
        if "attention_mask" in kwargs:  # the oracle counts tokens, not padding
            masks = kwargs["attention_mask"].tolist()
            masks = [mask for mask in masks for _ in range(len(references) // len(masks))]
            references = [
                [t for t, m in zip(tokens, mask + [1] * (len(tokens) - len(mask)), strict=True) if m]
                for tokens, mask in zip(references, masks, strict=True)
            ]
        for accuracy in accuracies:
            oracle(references, accuracy, model.config.get_text_config().vocab_size)
            torch.manual_seed(seed)
            fast = model.generate(ids, assistant_model=draft, **kwargs, **make())
            assert fast.speculation is not None, "fell back to plain decoding"
            assert fast.sequences.tolist() == plain.sequences.tolist()
            assert torch.equal(rng_state(ids.device), state)
        if min_tau and fast.speculation.rounds:
            assert fast.speculation.tau > min_tau
        return plain, fast

    return check
