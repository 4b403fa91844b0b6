"""Several sequences at once: as plain batched `generate`, token for token, and the generator at the end as well."""

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, LogitsProcessor, StoppingCriteria, pipeline
from transformers.generation.streamers import BaseStreamer

from fspad_hf.generation.drafting import Drafter
from fspad_hf.host import CACHE

from .. import tiny
from ..conftest import Oracle, fresh_draft, oracles_growth

SETTINGS = {
    "greedy": {},
    "sampled": {"do_sample": True, "temperature": 1.3, "top_k": 0},
    "penalty": {"do_sample": True, "temperature": 0.9, "top_p": 0.9, "repetition_penalty": 1.2},
}
ROW_WISE = {
    "min_p": {"do_sample": True, "min_p": 0.02},
    "typical_p": {"do_sample": True, "typical_p": 0.9},
    "epsilon_cutoff": {"do_sample": True, "epsilon_cutoff": 0.01},
    "eta_cutoff": {"do_sample": True, "eta_cutoff": 0.01},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "min_length": {"min_length": 24, "eos_token_id": [5, 9, 12]},
    "min_new_tokens": {"min_new_tokens": 9, "eos_token_id": [5, 9, 12]},
    "sequence_bias": {"sequence_bias": [[[7], 4.0], [[9, 11], -5.0]]},
    "bad_words_ids": {"bad_words_ids": [[7], [9, 11]]},
    "forced_bos_token_id": {"forced_bos_token_id": 6},
    "forced_eos_token_id": {"forced_eos_token_id": 6},
    "remove_invalid_values": {"remove_invalid_values": True},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (4, 1.1), "eos_token_id": [5]},
    "renormalize_logits": {"do_sample": True, "renormalize_logits": True},
    "suppress_tokens": {"suppress_tokens": [7, 9]},
    "begin_suppress_tokens": {"begin_suppress_tokens": [7, 9]},
}


def ragged(lengths, seed=0):
    """Left-padded prompts of these lengths."""
    rows = torch.randint(3, 64, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]).long()
    return rows * mask, mask


@pytest.mark.parametrize("mode", SETTINGS)
@pytest.mark.parametrize("lengths", [(6, 9), (8, 3, 11), (5, 5, 9, 2, 7)], ids=len)
@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_architectures(name, lengths, mode, same):
    ids, mask = ragged(lengths)
    same(tiny.build(name, "eager"), ids, attention_mask=mask, accuracies=(0.9,), **SETTINGS[mode])


@pytest.mark.parametrize("mode", SETTINGS)
def test_sequences_end_at_different_steps(llama, mode, same):
    ids, mask = ragged((6, 2, 9, 4))
    for eos in ([5, 9, 12, 30, 31, 32, 33], [7]):
        arguments = {"attention_mask": mask, "eos_token_id": eos, "min_tau": None, **SETTINGS[mode]}
        plain, fast = same(llama, ids, **arguments)
        for row, record in enumerate(fast.speculation.sequences):
            new = plain.sequences[row, ids.shape[1] :].tolist()
            ended = next((i + 1 for i, token in enumerate(new) if token in eos), len(new))
            assert sum(record.accepted_lengths) == ended - 1


@pytest.mark.parametrize("name", ROW_WISE)
def test_processors_that_look_at_one_sequence(name, llama, same):
    ids, mask = ragged((6, 9, 4))
    same(llama, ids, attention_mask=mask, min_tau=None, accuracies=(0.9,), **ROW_WISE[name])


@pytest.mark.parametrize("mode", ["sampled", "penalty"])
def test_return_sequences(llama, prompt, mode, same):
    same(llama, prompt, num_return_sequences=3, **SETTINGS[mode])
    ids, mask = ragged((6, 9))
    same(
        llama,
        ids,
        attention_mask=mask,
        num_return_sequences=2,
        eos_token_id=[5, 9, 12],
        min_tau=None,
        **SETTINGS[mode],
    )


@pytest.mark.parametrize("mode", SETTINGS)
@pytest.mark.parametrize(
    "overrides", [{}, {"tree_lookup_tokens": 6}, {"tree": "auto"}, {"draft_vocab_size": 40}], ids=str
)
def test_a_drafts_own_trees(llama, overrides, mode):
    """Not an oracle's: with lookup, sizes chosen as it goes, and fewer ids; coupled drafting accepts more."""
    draft = fresh_draft(llama, tree_depth=4, tree_top_k=4, tree_total_nodes=15, **overrides)
    ids, mask = ragged((6, 9, 4))
    for seed in range(4):
        outcomes = []
        for assistant in (None, draft):
            torch.manual_seed(seed)
            out = llama.generate(
                ids, attention_mask=mask, assistant_model=assistant, max_new_tokens=40, eos_token_id=[5, 9],
                pad_token_id=0, **SETTINGS[mode],
            )  # fmt: skip
            outcomes.append((out.tolist(), torch.get_rng_state().tolist()))
        assert outcomes[0] == outcomes[1]


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(1, 12), min_size=2, max_size=5), eos=st.sets(st.integers(3, 63), max_size=12),
    depth=st.integers(1, 6), top_k=st.integers(1, 5), nodes=st.integers(1, 24), mode=st.sampled_from(list(SETTINGS)),
    seed=st.integers(0, 99), new=st.integers(1, 30), wanted=st.booleans(),
)  # fmt: skip
def test_any_batch(lengths, eos, depth, top_k, nodes, mode, seed, new, wanted, llama):
    ids, mask = ragged(lengths, seed)
    draft = fresh_draft(llama, tree_depth=depth, tree_top_k=top_k, tree_total_nodes=nodes, tree_lookup_tokens=4)
    outcomes = []
    for assistant in (None, draft):
        torch.manual_seed(seed)
        out = llama.generate(
            ids, attention_mask=mask, assistant_model=assistant, max_new_tokens=new, pad_token_id=0,
            eos_token_id=sorted(eos) or None, return_dict_in_generate=wanted, **SETTINGS[mode],
        )  # fmt: skip
        tokens = out.sequences if wanted else out
        outcomes.append((tokens.tolist(), torch.get_rng_state().tolist()))
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2"])
@pytest.mark.parametrize("given_one", [False, True])
def test_the_cache_is_plain_decodings(name, given_one):
    """Also behind a sequence that ended: a continuation gives the same tokens."""
    model = tiny.build(name)
    draft, (ids, mask) = fresh_draft(model), ragged((6, 9, 4))
    caches = []
    for assistant in (None, draft):
        own = {CACHE: DynamicCache(config=model.config)} if given_one else {}
        out = model.generate(
            ids, attention_mask=mask, assistant_model=assistant, max_new_tokens=24, pad_token_id=0,
            eos_token_id=[5, 9, 12, 13, 14], return_dict_in_generate=not given_one, **own,
        )  # fmt: skip
        caches.append(own[CACHE] if given_one else out[CACHE])
    for plain, ours in zip(caches[0].layers, caches[1].layers, strict=True):
        assert plain.keys.shape == ours.keys.shape
        shown = mask[:, -plain.keys.shape[2] :] if plain.keys.shape[2] <= mask.shape[1] else mask
        real = torch.ones(plain.keys.shape[:1] + plain.keys.shape[2:3], dtype=torch.bool)
        if caches[0].get_seq_length() == plain.keys.shape[2]:
            real[:, : shown.shape[1]] = shown.bool()
        for theirs, mine in ((plain.keys, ours.keys), (plain.values, ours.values)):
            difference = (theirs - mine).abs().amax((1, 3))
            assert difference[real].max() < 1e-4


def test_a_row_is_not_computed_once_it_has_ended(llama, monkeypatch):
    from fspad_hf.generation.target import Target

    rows, verify = [], Target.verify
    monkeypatch.setattr(
        Target, "verify", lambda self, tree, *args: rows.append(len(tree.tokens)) or verify(self, tree, *args)
    )
    ids, mask = ragged((6, 9, 4, 7))
    plain = llama.generate(
        ids, attention_mask=mask, max_new_tokens=30, eos_token_id=[5, 9, 12, 13, 14], pad_token_id=0
    )
    rows.clear()
    out = llama.generate(
        ids, attention_mask=mask, assistant_model=fresh_draft(llama), max_new_tokens=30,
        eos_token_id=[5, 9, 12, 13, 14], pad_token_id=0,
    )  # fmt: skip
    assert out.tolist() == plain.tolist() and rows == sorted(rows, reverse=True) and rows[-1] < rows[0]


@pytest.mark.parametrize("mode", ["sampled", "penalty"])
def test_a_sampled_sequence_waits_for_the_others(llama, mode, monkeypatch):
    """So that the noise held is bounded."""
    from fspad_hf.generation import rounds
    from fspad_hf.generation.noise import NoiseQueue

    held, ahead = [], NoiseQueue._draw_ahead
    monkeypatch.setattr(
        NoiseQueue, "_draw_ahead", lambda self, more: (ahead(self, more), held.append(len(self._blocks)))[0]
    )
    monkeypatch.setattr(rounds, "LEAD", 2)
    ids, outcomes = ragged((9, 9, 9))[0], []
    for assistant in (None, fresh_draft(llama, tree_depth=4)):
        torch.manual_seed(1)
        out = llama.generate(
            ids, assistant_model=assistant, max_new_tokens=60, eos_token_id=None, pad_token_id=0, **SETTINGS[mode]
        )
        outcomes.append((out.tolist(), torch.get_rng_state().tolist()))
        if assistant is None:  # the first sequence is guessed, the others are not
            oracles = [Oracle(row, accuracy, 64) for row, accuracy in zip(out.tolist(), (1.0, 0.0, 0.0), strict=True)]
            monkeypatch.setattr(Drafter, "grow", oracles_growth(oracles, monkeypatch))
    assert outcomes[0] == outcomes[1] and 5 < max(held) <= 2 + 1 + 5 + 4  # and what the draft sees


class Steps(BaseStreamer):
    def __init__(self):
        self.seen, self.ended = [], False

    def put(self, value):
        self.seen.append(value.tolist())

    def end(self):
        self.ended = True


def test_a_streamer_sees_all_sequences_step_by_step(llama):
    ids, mask = ragged((6, 9, 4))
    seen = []
    for assistant in (None, fresh_draft(llama)):
        streamer = Steps()
        llama.generate(
            ids, attention_mask=mask, assistant_model=assistant, max_new_tokens=20, eos_token_id=[5, 9, 12],
            pad_token_id=0, streamer=streamer,
        )  # fmt: skip
        assert streamer.ended
        seen.append(streamer.seen)
    assert seen[0] == seen[1] and len(seen[0]) > 3


class Nothing(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores


class Never(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.zeros(len(input_ids), dtype=torch.bool)


class Judge(StoppingCriteria):
    """The user's own: it sees all sequences at every step, counts, and ends one by what the others say."""

    def __init__(self):
        self.seen = []

    def __call__(self, input_ids, scores, **kwargs):
        assert scores is None
        self.seen.append(input_ids.tolist())
        other = input_ids[:, -1].roll(1)
        return (input_ids[:, -1] + other + len(self.seen)) % 23 == 0


@pytest.mark.parametrize("mode", SETTINGS)
@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_criteria_that_see_all_sequences(name, mode, oracle, monkeypatch):
    """Step by step and together, as plain decoding shows them, also where a sequence has gone on meanwhile."""
    from fspad_hf.generation.verification import TokenEmitter

    model, (ids, mask), cuts = tiny.build(name), ragged((6, 9, 4, 7)), []
    cut = TokenEmitter.cut
    monkeypatch.setattr(TokenEmitter, "cut", lambda self, n: cuts.append(len(self.emitted) - n) or cut(self, n))
    for seed in range(6):
        found = []
        for assistant in (None, fresh_draft(model)):
            torch.manual_seed(seed)
            judge, steps = Judge(), Steps()
            out = model.generate(
                ids, attention_mask=mask, assistant_model=assistant, max_new_tokens=30, eos_token_id=[5, 9],
                pad_token_id=0, stopping_criteria=[judge], streamer=steps, **SETTINGS[mode],
            )  # fmt: skip
            found.append((out.tolist(), judge.seen, steps.seen, torch.get_rng_state().tolist()))
            if assistant is None:
                texts = [[t for t, m in zip(row, [*one, *[1] * 99], strict=False) if m] for row, one in zip(
                    out.tolist(), mask.tolist(), strict=True)]  # fmt: skip
                oracle(texts, 0.9, 64)
        assert found[0] == found[1]
    assert max(cuts) > 0  # some had


def test_a_judged_batch_gives_plain_decodings_cache_back(llama, oracle):
    draft, (ids, mask) = fresh_draft(llama), ragged((6, 9, 4))
    arguments = {"attention_mask": mask, "max_new_tokens": 24, "pad_token_id": 0, "eos_token_id": [5, 9]}
    judge = Judge()
    plain = llama.generate(ids, stopping_criteria=[judge], return_dict_in_generate=True, **arguments)
    texts = [[*row[9 - length :], *[3] * 9] for row, length in zip(plain.sequences.tolist(), (6, 9, 4), strict=True)]
    oracle(texts, 0.9, 64)
    arguments |= {"assistant_model": draft, "return_dict_in_generate": True}
    ours = llama.generate(ids, stopping_criteria=[Judge()], **arguments)
    assert plain.sequences.tolist() == ours.sequences.tolist()
    steps = torch.tensor(judge.seen[-1])[:, ids.shape[1] :]
    for row, record in enumerate(ours.speculation.sequences):  # what was thrown away does not count
        done = ((steps[row] + steps[row - 1] + torch.arange(1, steps.shape[1] + 1)) % 23 == 0) | torch.isin(
            steps[row], torch.tensor([5, 9])
        )
        ended = int(done.nonzero()[0]) + 1 if done.any() else steps.shape[1]
        assert sum(record.accepted_lengths) == ended - 1
    for theirs, mine in zip(plain[CACHE].layers, ours[CACHE].layers, strict=True):
        real = torch.cat((mask, torch.ones(3, theirs.keys.shape[2] - mask.shape[1])), dim=1).bool()
        assert (theirs.keys - mine.keys).abs().amax((1, 3))[real].max() < 1e-4


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"logits_processor": [Nothing()]}, "Nothing in a batch"),
        ({"stopping_criteria": [Never()], "eos_token_id": None}, "Never without an EOS"),
        ({"output_scores": True, "return_dict_in_generate": True}, "output_scores"),
        ({"max_time": 60.0, "eos_token_id": None}, "MaxTimeCriteria without an EOS"),
    ],
)
def test_what_looks_at_more_than_one_sequence_runs_plain(llama, arguments, why, monkeypatch):
    from fspad_hf.generation import hook

    said = []
    monkeypatch.setattr(hook.logger, "warning_once", said.append)
    ids, mask = ragged((6, 9))
    kwargs = {"attention_mask": mask, "max_new_tokens": 12, "pad_token_id": 0, **arguments}
    plain = llama.generate(ids, **kwargs)
    fast = llama.generate(ids, assistant_model=fresh_draft(llama), **kwargs)
    plain, fast = (out if torch.is_tensor(out) else out.sequences for out in (plain, fast))
    assert plain.tolist() == fast.tolist() and any(why in line for line in said)


@pytest.mark.parametrize("size", [2, 3])
def test_pipelines(llama, tokenizer, size):
    texts, answers = ["hello there", "why", "general greetings to you", "who", "hello"], []
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side = "left"
    for draft in (None, fresh_draft(llama)):
        pipe = pipeline("text-generation", llama, tokenizer=tokenizer, assistant_model=draft)
        torch.manual_seed(5)
        answers.append(pipe(texts, batch_size=size, do_sample=True, top_k=0, max_new_tokens=16, return_tensors=True))
    assert answers[0] == answers[1]


def test_draws_of_three_sequences_are_the_targets():
    """Each token of each sequence as often as its probability says, on a model with twelve tokens."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**tiny.COMMON, "vocab_size": 12})).eval()
    draft, ids = fresh_draft(model, tree_depth=3, tree_top_k=4, tree_total_nodes=10), torch.tensor([[3], [7], [3]])
    outs = [
        model.generate(
            ids, assistant_model=draft, do_sample=True, top_k=0, temperature=1.5, max_new_tokens=3, eos_token_id=None,
            pad_token_id=0,
        )
        for _ in range(700)
    ]  # fmt: skip
    pairs = torch.stack(outs)[:, :, 2:].flatten(0, 1)  # the second and third token, of a round of a tree
    first = torch.stack(outs)[:, :, 1].flatten()
    starts = ids[:, 0].repeat(700)
    with torch.no_grad():
        text = torch.stack((starts, first, pairs[:, 0]), dim=1)
        p = (model(text).logits / 1.5).softmax(-1)
    for place in (1, 2):
        expected, seen = p[:, place].sum(0), pairs[:, place - 1].bincount(minlength=12)
        statistic = ((seen - expected) ** 2 / expected).sum()
        assert statistic < 33.1  # 0.05 % of a chi-square with 11 degrees of freedom
