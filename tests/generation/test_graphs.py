"""Captured rounds, by a recorder in a graph's place: the same tokens, whatever Python would have decided anew."""

import functools
import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache, LlamaForCausalLM, LogitsProcessor, LogitsProcessorList
from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
from transformers.generation.streamers import BaseStreamer

from fspad_hf.generation import decoding, tuning
from fspad_hf.generation.costs import costs_of
from fspad_hf.generation.drafting import Drafter
from fspad_hf.generation.graphs import GraphPool
from fspad_hf.generation.probe import probe
from fspad_hf.generation.rounds import Rounds
from fspad_hf.generation.target import Target
from fspad_hf.generation.tree import PLAIN, TreeShape
from fspad_hf.host import CACHE

from .. import tiny
from ..conftest import fresh_draft, plain_run, rng_state

SAMPLED = {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9}


@pytest.fixture
def check(captured, teach):
    """As the fixture `same`, on captured rounds."""

    def run(model, ids, *, accuracies=(0.0, 0.9), seed=3, each=None, refused=False, draft=None, **kwargs):
        draft = draft or fresh_draft(model, cuda_graphs=True, tree_depth=4, tree_top_k=3, tree_total_nodes=12)
        make = each or (lambda: {})
        kwargs, plain, state = plain_run(model, ids, seed, make, kwargs)
        for accuracy in accuracies:
            mask = kwargs.get("attention_mask")
            shown = plain.sequences[0].tolist()[0 if mask is None else int((mask == 0).sum()) :]
            teach(shown, accuracy, model.config.get_text_config().vocab_size)
            GraphPool.of(draft).idle.clear()  # the graphs hold the other accuracy's trees
            torch.manual_seed(seed)
            fast = model.generate(ids, assistant_model=draft, **kwargs, **make())
            assert fast.speculation is not None
            assert fast.sequences.tolist() == plain.sequences.tolist()
            assert torch.equal(rng_state(ids.device), state)
        assert bool(GraphPool.of(draft).refused) == refused
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


@pytest.mark.parametrize(
    "settings", [{}, SAMPLED, {**SAMPLED, "repetition_penalty": 1.2}], ids=["greedy", "sampled", "penalty"]
)
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2"])
def test_a_batch(captured, oracle, name, settings):
    """Left-padded prompts that end at different steps; a second call captures nothing."""
    model, lengths = tiny.build(name), torch.tensor([9, 4, 7])
    ids = torch.randint(3, 64, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(9) >= 9 - lengths[:, None]).long()
    draft = fresh_draft(model, cuda_graphs=True, tree_depth=4, tree_top_k=3, tree_total_nodes=12)
    for eos in (None, [5, 9, 12]):
        kwargs = {"attention_mask": mask, "eos_token_id": eos, "max_new_tokens": 70, **settings}
        kwargs, plain, state = plain_run(model, ids * mask, 3, dict, kwargs)
        made = []
        for _ in range(2):
            torch.manual_seed(3)
            fast = model.generate(ids * mask, assistant_model=draft, **kwargs)
            assert fast.sequences.tolist() == plain.sequences.tolist()
            assert torch.equal(rng_state(ids.device), state)
            assert len(fast.speculation.sequences) == 3
            made.append(len(captured))
        assert made[0] == made[1] > 0
    assert not GraphPool.of(draft).refused


def test_left_padding(check, prompt):
    ids = torch.cat((torch.zeros(1, 4, dtype=torch.long), prompt), dim=-1)
    check(tiny.build("llama"), ids, attention_mask=(torch.arange(13) >= 4).long()[None], **SAMPLED)


class DrawingProcessor(LogitsProcessor):
    """The user's own: it looks at the tokens before and draws from the global generator."""

    def __call__(self, input_ids, scores):
        return scores + 0.3 * torch.rand(1) * (torch.arange(scores.shape[-1]) == (input_ids[0, -1] + 1) % 64)


class DrawingStreamer(BaseStreamer):
    def __init__(self):
        self.seen = []

    def put(self, value):
        self.seen += value.flatten().tolist()
        if len(self.seen) % 3 == 0:
            torch.rand(1)

    def end(self):
        self.seen.append("end")


@pytest.mark.parametrize(
    "make",
    [
        lambda: {"repetition_penalty": 1.3},
        lambda: {"no_repeat_ngram_size": 2},
        lambda: {"logits_processor": LogitsProcessorList([DrawingProcessor()])},
        lambda: {"streamer": DrawingStreamer()},
        lambda: {
            "stopping_criteria": [lambda ids, scores, **_: torch.full((1,), ids.shape[1] > 30 and ids[0, -1] > 9)]
        },
        lambda: {"output_scores": True, "output_logits": True},
    ],
    ids=["penalty", "ngrams", "processor", "streamer", "criterion", "scores"],
)
@pytest.mark.parametrize("settings", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_code_between_the_graphs(check, prompt, make, settings):
    made = []

    def each():
        made.append(make())
        return made[-1]

    _, plain, fast = check(tiny.build("llama"), prompt, each=each, **settings)
    if "streamer" in made[0]:
        assert made[0]["streamer"].seen == made[-1]["streamer"].seen
    if "output_scores" in made[0]:
        for ours, theirs in ((fast.scores, plain.scores), (fast.logits, plain.logits)):
            assert len(ours) == len(theirs)
            torch.testing.assert_close(torch.cat(ours), torch.cat(theirs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("settings", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_eos_within_a_path(check, prompt, settings):
    model = tiny.build("llama")
    torch.manual_seed(3)
    plain = model.generate(prompt, max_new_tokens=40, eos_token_id=None, pad_token_id=0, **settings)
    for place in (10, 11, 13, 20):
        _, plain_too, _ = check(model, prompt, eos_token_id=[int(plain[0, place]), 63], **settings)
        assert plain_too.sequences.shape[1] <= place + 1


@pytest.mark.parametrize("settings", [{}, {"do_sample": True, "temperature": 0.1}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("shape", [(3, 3, 8), (0, 0, 0)], ids=["on a tree", "alone"])
def test_tokens_looked_up(captured, prompt, settings, shape, monkeypatch):
    """The same rounds as without graphs, whether the walk is captured or the user's own processors have their say."""
    model = tiny.build("llama")
    for weight in model.model.layers.parameters():
        weight.data.mul_(0.1)  # the last token says what comes next, so a text soon goes in circles
    fixed = SimpleNamespace(
        choose=lambda found, reread: TreeShape(*shape, 9 if found.tokens else 0), observe=lambda *_: None
    )
    monkeypatch.setattr(decoding, "trees_of", lambda *_: fixed)
    for each in (dict, lambda: {"logits_processor": LogitsProcessorList([DrawingProcessor()])}):
        kwargs, plain, state = plain_run(model, prompt, 3, each, {"max_new_tokens": 80, **settings})
        lengths = []
        for cuda_graphs in (False, True, True):
            draft = fresh_draft(
                model, cuda_graphs=cuda_graphs, tree_depth=3, tree_top_k=3, tree_total_nodes=17, tree_lookup_tokens=9
            )
            torch.manual_seed(3)
            fast = model.generate(prompt, assistant_model=draft, **kwargs, **each())
            assert fast.sequences.tolist() == plain.sequences.tolist()
            assert torch.equal(rng_state(prompt.device), state)
            lengths.append(fast.speculation.accepted_lengths)
        assert lengths[0][:-4] == lengths[1][: len(lengths[0]) - 4] and lengths[1] == lengths[2]
        assert max(lengths[0]) == 10 or each is not dict
        assert captured and not GraphPool.of(draft).refused


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3_text"])
def test_a_text_outgrows_its_buckets(check, prompt, name):
    draft, *_ = check(tiny.build(name), prompt, max_new_tokens=140, accuracies=(0.9,), **SAMPLED)
    assert [sorted(one.buckets) for one in GraphPool.of(draft).idle] == [[64, 128, 256]]


@pytest.mark.parametrize("settings", [{}, {"do_sample": True}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("overrides", [{}, {"draft_vocab_size": 30}, {"coupled_drafting": False}], ids=str)
def test_the_drafts_own_trees(captured, prompt, overrides, settings):
    """The same trees as without graphs: the same accepted lengths."""
    model = tiny.build("llama")
    shape = {"tree_depth": 3, "tree_top_k": 4, "tree_total_nodes": 11}
    found = []
    for cuda_graphs in (False, True):
        draft = fresh_draft(model, **shape, **overrides, cuda_graphs=cuda_graphs)
        torch.manual_seed(0)
        for _ in range(2):
            out = model.generate(
                prompt, assistant_model=draft, max_new_tokens=60, eos_token_id=None, pad_token_id=0,
                return_dict_in_generate=True, top_k=64, **settings,
            )  # fmt: skip
        found.append((out.sequences.tolist(), out.speculation.accepted_lengths[:-4]))
    assert found[0][0] == found[1][0]
    assert found[0][1] == found[1][1][: len(found[0][1])]  # near the end the trees of eager rounds are shallower
    assert captured and not GraphPool.of(draft).refused


def generate(model, draft, prompt, **kwargs):
    return model.generate(
        prompt, assistant_model=draft, max_new_tokens=30, eos_token_id=None, pad_token_id=0, **kwargs
    )


def test_a_model_that_reads_the_length_in_python_is_found_out(check, prompt, caplog):
    model = tiny.build("llama")
    original = LlamaForCausalLM.forward

    class Peeping(LlamaForCausalLM):
        @functools.wraps(original)
        def forward(self, *args, **kwargs):
            if kwargs.get("position_ids") is not None and kwargs[CACHE] is not None:
                kwargs["position_ids"] = kwargs["position_ids"] + kwargs[CACHE].get_seq_length() // 8
            return original(self, *args, **kwargs)

    Peeping.__module__ = "transformers.models.peeping"
    model.__class__ = Peeping
    draft = fresh_draft(model, cuda_graphs=True)
    before = generate(model, fresh_draft(model), prompt)
    assert generate(model, draft, prompt).tolist() == before.tolist()
    (reason,) = set(GraphPool.of(draft).refused.values())
    assert "a replay's logits are off by" in reason


def test_what_cannot_be_captured_runs_eagerly(check, prompt):
    model = tiny.build("llama")
    model.model.rotary_emb.rope_type = "dynamic"  # looks at the largest position
    draft, *_ = check(model, prompt, refused=True, draft=fresh_draft(model, cuda_graphs=True), accuracies=(0.9,))
    (reason,) = GraphPool.of(draft).refused.values()
    assert "waits for the device" in reason


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_a_default_dtype_of_half_precision(captured, prompt, cuda_graphs):
    model = tiny.build("llama")
    with torch.no_grad():
        model.lm_head.weight.zero_()  # all tokens alike: many near ties of p / E
    draft = fresh_draft(model, cuda_graphs=cuda_graphs)
    probe(model)
    torch.set_default_dtype(torch.bfloat16)
    try:
        for seed in range(10):
            found = []
            for assistant in (None, draft):
                torch.manual_seed(seed)
                found.append(generate(model, assistant, prompt, do_sample=True, top_k=0).tolist())
            assert found[0] == found[1]
    finally:
        torch.set_default_dtype(torch.float32)


class Annealing(BaseStreamer):
    def __init__(self, warper):
        self.warper, self.count = warper, 0

    def put(self, value):
        self.count += 1
        self.warper.temperature = 0.3 if self.count % 2 else 3.0

    def end(self):
        pass


def test_a_streamer_that_turns_the_temperature(check, prompt):
    def each():
        warper = TemperatureLogitsWarper(1.0)
        return {"logits_processor": LogitsProcessorList([warper]), "streamer": Annealing(warper)}

    check(tiny.build("llama"), prompt, each=each, do_sample=True, top_k=0)


def test_a_streamer_that_swaps_a_weight(check, prompt):
    model = tiny.build("llama")
    weight = model.lm_head.weight.data

    class Swapping(BaseStreamer):
        def __init__(self):
            self.count = 0
            model.lm_head.weight.data = weight

        def put(self, value):
            self.count += 1
            if self.count == 20:  # where a round happens to end with plain decoding too, at accuracy 0
                model.lm_head.weight.data = weight.flip(0)

        def end(self):
            pass

    check(model, prompt, each=lambda: {"streamer": Swapping()}, accuracies=(0.0,))
    model.lm_head.weight.data = weight


@pytest.mark.parametrize("settings", [{"eta_cutoff": 0.01}, {"guidance_scale": 1.5}], ids=str)
def test_processors_that_are_not_captured(captured, prompt, settings):
    """They run between the graphs, leave the pair as it is, and nothing holds on to them."""
    model = tiny.build("llama")
    draft = fresh_draft(model, cuda_graphs=True)
    for do_sample in (True, False):
        found = []
        for assistant in (None, draft):
            torch.manual_seed(2)
            found.append(generate(model, assistant, prompt, do_sample=do_sample, **settings).tolist())
        assert found[0] == found[1]
    assert not GraphPool.of(draft).refused
    generate(model, draft, prompt)
    assert captured
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_a_warper_with_a_name_of_its_own(captured, prompt):
    model, warper = tiny.build("llama"), TopKLogitsWarper(5)
    warper.name, warper.table = "mine", {"any": "thing"}
    plain, fast = (
        generate(model, assistant, prompt, logits_processor=LogitsProcessorList([warper])).tolist()
        for assistant in (None, fresh_draft(model, cuda_graphs=True))
    )
    assert plain == fast


def test_trees_of_many_shapes(captured, prompt, monkeypatch):
    """`tree="auto"`, with costs at which every size is tried, plain steps among them."""
    model = tiny.build("llama")
    draft = fresh_draft(model, cuda_graphs=True, tree="auto", tree_depth=3, tree_top_k=3, tree_total_nodes=8)
    shapes = [TreeShape(*shape) for shape in ((3, 3, 8), (0, 0, 0), (0, 0, 0), (2, 2, 4), (1, 3, 3), (0, 0, 0))]

    class Turns(tuning.FixedTrees):
        def __init__(self, *_):
            self.rounds = 0

        def choose(self, found, reread):
            self.rounds += 1
            return shapes[self.rounds % len(shapes)]

    monkeypatch.setattr(decoding, "trees_of", Turns)
    for settings in ({}, {"do_sample": True}):
        torch.manual_seed(1)
        plain = model.generate(prompt, max_new_tokens=50, eos_token_id=None, pad_token_id=0, **settings)
        torch.manual_seed(1)
        fast = model.generate(
            prompt, assistant_model=draft, max_new_tokens=50, eos_token_id=None, pad_token_id=0, **settings
        )
        assert fast.tolist() == plain.tolist()
    assert not GraphPool.of(draft).refused and len(captured) > 10


class NothingFromTheHost(TorchDispatchMode):
    """Refuses what a capture on CUDA refuses beside waiting: copies between host and device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, torch.Tensor) and t.dim()]
        assert all(t.device.type == "meta" for t in tensors), func
        return result


@pytest.mark.parametrize("lookup", [0, 5])
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "opt", "gpt2"])
def test_a_step_copies_nothing_between_host_and_device(name, lookup):
    """On the meta device, where a look at a value raises, and tensors of the CPU are the host's."""
    model = tiny.build(name).to("meta")
    shape = {"tree_depth": 3, "tree_top_k": 3, "tree_total_nodes": 9, "tree_lookup_tokens": lookup}
    draft = fresh_draft(model, draft_vocab_size=40, **shape).to("meta")
    warpers = LogitsProcessorList([TemperatureLogitsWarper(0.7), TopKLogitsWarper(9), TopPLogitsWarper(0.9)])
    with torch.device("meta"):
        ids, cache = torch.zeros(1, 7, dtype=torch.long), DynamicCache(config=model.config.get_text_config())
        target = Target(model)
        target.device = torch.device("meta")
        generator = Drafter(draft, target, warpers)
        with target.listening(), target._armed() as caught, torch.no_grad():
            explicit = {"attention_mask": torch.zeros(1, 1, 7, 7), "position_ids": torch.zeros_like(ids)}
            model(ids, use_cache=True, **explicit, **{CACHE: cache})
            features = target._features(None, caught)
    emitter = SimpleNamespace(input_ids=torch.zeros(1, 8, dtype=torch.long), emitted=[1], sequence=0, finished=False)
    emitter.scores = emitter.raw_logits = emitter.streamer = None
    emitter.plain_criteria, emitter.ends, emitter.length = True, (), 8
    emitter.logits_processor, shape = warpers, TreeShape.of(draft.speculation_settings(ids.device))
    prompt, device, steps = torch.ones(1, 7, dtype=torch.bool), torch.device("meta"), []
    queue = SimpleNamespace(peek=lambda count, _: torch.ones(count, 1, 64, device=device))
    graphs = GraphPool.of(draft).take((), model)

    def run(step, key, inputs, checked=None):
        with graphs.bucket.fixed(), NothingFromTheHost():
            steps.append(step(*inputs))
        return steps[-1]

    graphs.run = run
    rounds = Rounds(target, generator, [emitter], queue, cache, features, prompt, [[0]], graphs=graphs)
    rounds.can_walk_ahead = True
    generator.draft, generator._network = draft, draft  # no copy of what is on no device
    with target.listening(), torch.no_grad():
        inputs = rounds.prepare(shape._replace(lookup=lookup), [[3, 4]] if lookup else [])
        rounds.verify(inputs, rounds.draft(inputs))
    (tree, _), (logits, _, walked) = steps
    nodes, drawable = 10 + lookup, 1 + max(3, lookup)
    assert tree.tokens.shape == (1, nodes) and logits.shape == (1, nodes, 64)
    assert walked.shape == (1, 1 + 2 * drawable)


def test_costs_are_those_of_replays(captured, prompt):
    """Tokens as plain, whatever shapes are tried, and what was learned is not mixed with eager rounds'."""
    model = tiny.build("llama")
    shape = {"tree_depth": 3, "tree_top_k": 3, "tree_total_nodes": 8, "draft_vocab_size": 40}
    draft = fresh_draft(model, cuda_graphs=True, tree="auto", **shape)
    plain = model.generate(prompt, max_new_tokens=60, eos_token_id=None, pad_token_id=0)
    for _ in range(2):
        fast = model.generate(prompt, assistant_model=draft, max_new_tokens=60, eos_token_id=None, pad_token_id=0)
        assert fast.tolist() == plain.tolist()
    assert not GraphPool.of(draft).refused and len(captured) >= 4
    assert (
        costs_of(Target(model), draft, 1, True).round(PLAIN)
        > 0
        == costs_of(Target(model), draft, 1, False).round(PLAIN)
    )
