"""Same seed, same tokens, same generator state, same everything that `generate` returns or calls."""

import pytest
import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)
from transformers.generation.streamers import BaseStreamer

from fspad_hf.evaluation.divergence import first_divergence
from fspad_hf.host import CACHE

from .. import tiny
from ..conftest import fresh_draft

SETTINGS = {
    "greedy": {},
    "temperature": {"do_sample": True, "temperature": 0.8, "top_k": 0},
    "top_k": {"do_sample": True, "top_k": 7},
    "top_p": {"do_sample": True, "top_p": 0.8, "top_k": 0},
    "min_p": {"do_sample": True, "min_p": 0.05, "top_k": 0},
    "typical": {"do_sample": True, "typical_p": 0.9, "top_k": 0},
    "epsilon_eta": {"do_sample": True, "epsilon_cutoff": 0.01, "eta_cutoff": 0.01, "top_k": 0},
    "repetition": {"do_sample": True, "repetition_penalty": 1.4},
    "greedy_repetition": {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2},
    "bad_words": {"do_sample": True, "bad_words_ids": [[7], [4, 9]], "suppress_tokens": [11, 12]},
    "min_length": {"do_sample": True, "eos_token_id": [2, 5, 9], "min_new_tokens": 12},
    "forced": {"do_sample": True, "forced_eos_token_id": 2, "eos_token_id": 2, "max_new_tokens": 15},
    "renormalised": {"do_sample": True, "renormalize_logits": True, "top_p": 0.7},
    "sequence_bias": {"do_sample": True, "sequence_bias": [[[14, 15], 6.0], [[14], 4.0]]},
    "guidance": {"do_sample": True, "guidance_scale": 1.7},
    "exponential_decay": {"exponential_decay_length_penalty": (5, 1.2), "eos_token_id": [2, 3]},
    "watermark": {"do_sample": True, "watermarking_config": {"bias": 3.0, "greenlist_ratio": 0.5}},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings(name, llama, same, prompt):
    min_tau = None if "eos_token_id" in SETTINGS[name] else 2.0
    plain, fast = same(llama, prompt, output_scores=True, output_logits=True, min_tau=min_tau, **SETTINGS[name])
    assert len(fast.scores) == len(fast.logits) == len(plain.scores)
    for ours, theirs in zip(fast.scores + fast.logits, plain.scores + plain.logits, strict=True):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-3)
    assert list(fast.keys())[:-1] == list(plain.keys())


@pytest.mark.parametrize("coupled", [True, False])
@pytest.mark.parametrize("seed", range(6))
def test_real_draft(llama, prompt, seed, coupled):
    """Our own trees, shaped by the very noise that decides the draws: still the same tokens and the same state."""
    draft = fresh_draft(llama, coupled_drafting=coupled, tree_depth=4, tree_top_k=5, tree_total_nodes=20)
    kwargs = {"max_new_tokens": 30, "do_sample": True, "top_k": 0, "temperature": 0.9, "eos_token_id": None}
    torch.manual_seed(seed)
    plain, state = llama.generate(prompt, **kwargs), None
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    fast = llama.generate(prompt, assistant_model=draft, **kwargs)
    assert fast.tolist() == plain.tolist()
    assert torch.equal(torch.get_rng_state(), state)


def test_eos_inside_a_path_and_several_eos_ids(llama, same, prompt):
    reference = llama.generate(prompt, max_new_tokens=40, eos_token_id=None)[0, prompt.shape[1] :].tolist()
    for at in (0, 1, 2, 3, 5, 8, 13):
        plain, _ = same(llama, prompt, eos_token_id=[63, reference[at]], min_tau=None)
        assert plain.sequences.shape[1] <= prompt.shape[1] + at + 1


@pytest.mark.parametrize("new_tokens", range(1, 12))
def test_max_new_tokens_is_never_overrun(llama, same, prompt, new_tokens):
    _, fast = same(llama, prompt, max_new_tokens=new_tokens, min_tau=None)
    assert fast.sequences.shape[1] == prompt.shape[1] + new_tokens
    assert fast[CACHE].get_seq_length() == prompt.shape[1] + new_tokens - 1


class Recorder(BaseStreamer):
    def __init__(self):
        self.calls = []

    def put(self, value):
        self.calls.append(value.tolist())

    def end(self):
        self.calls.append("end")


class StopAfter(StoppingCriteria):
    """Stops at a length, and writes down every call."""

    def __init__(self, length, log):
        self.length, self.log = length, log

    def __call__(self, input_ids, scores, **kwargs):
        self.log.append((input_ids[0].tolist(), None if scores is None else len(scores)))
        return torch.full((1,), input_ids.shape[1] >= self.length, dtype=torch.bool)


class Watcher(LogitsProcessor):
    """A stateful processor: must see the true prefix, each length once and in order."""

    def __init__(self, log):
        self.log = log

    def __call__(self, input_ids, scores):
        self.log.append(input_ids[0].tolist())
        return scores + 0.1 * torch.sin(torch.arange(scores.shape[1]) * len(self.log))


def test_streamer_criteria_and_processors_see_each_token_once_and_in_order(llama, same, prompt):
    logs = []

    def each():
        logs.append(([], [], Recorder()))
        seen, stops, streamer = logs[-1]
        return {
            "streamer": streamer,
            "stopping_criteria": StoppingCriteriaList([StopAfter(prompt.shape[1] + 17, stops)]),
            "logits_processor": LogitsProcessorList([Watcher(seen)]),
        }

    same(llama, prompt, each=each, output_scores=True, do_sample=True)
    for seen, stops, streamer in logs[1:]:
        assert seen == logs[0][0] and stops == logs[0][1] and streamer.calls == logs[0][2].calls
    assert streamer.calls[-1] == "end" and len(streamer.calls) == 17 + 2  # the prompt, one put a token, the end


def test_stop_strings(llama, same, prompt, tokenizer):
    text = tokenizer.decode(llama.generate(prompt, max_new_tokens=30, eos_token_id=None)[0, prompt.shape[1] :])
    stop = text[9:11]
    plain, _ = same(llama, prompt, stop_strings=[stop], tokenizer=tokenizer, min_tau=None)
    assert plain.sequences.shape[1] < prompt.shape[1] + 40


def test_text_iterator_streamer(llama, prompt, tokenizer):
    plain, fast = (TextIteratorStreamer(tokenizer, skip_prompt=True) for _ in range(2))
    llama.generate(prompt, streamer=plain, max_new_tokens=20)
    llama.generate(prompt, streamer=fast, max_new_tokens=20, assistant_model=fresh_draft(llama))
    assert list(plain) == list(fast)


class Gambler(LogitsProcessor):
    """Foreign code that draws from the default generator, every so often."""

    def __init__(self, every):
        self.every, self.calls = every, 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        return scores + torch.rand(scores.shape[1]) if self.calls % self.every == 0 else scores


class Seeder(Recorder):
    """Foreign code that reseeds."""

    def put(self, value):
        super().put(value)
        if len(self.calls) == 9:
            torch.manual_seed(77)


class Roller(StopAfter):
    def __call__(self, input_ids, scores, **kwargs):
        if input_ids.shape[1] % 3 == 0:
            torch.rand(3)
        return super().__call__(input_ids, scores)


@pytest.mark.parametrize("every", [1, 2, 5])
def test_foreign_code_that_draws(llama, same, prompt, every):
    same(llama, prompt, do_sample=True, each=lambda: {"logits_processor": LogitsProcessorList([Gambler(every)])})
    same(llama, prompt, do_sample=True, each=lambda: {"streamer": Seeder()})
    same(llama, prompt, do_sample=True, each=lambda: {"stopping_criteria": StoppingCriteriaList([Roller(99, [])])})
    # and with our own, coupled trees
    draft = fresh_draft(llama)
    states, texts = [], []
    for assistant in (None, draft):
        torch.manual_seed(0)
        processors = LogitsProcessorList([Gambler(every)])
        texts.append(
            llama.generate(
                prompt, do_sample=True, max_new_tokens=20, logits_processor=processors, assistant_model=assistant,
                eos_token_id=None,
            ).tolist()
        )  # fmt: skip
        states.append(torch.get_rng_state())
    assert texts[0] == texts[1] and torch.equal(*states)


class Bomb(LogitsProcessor):
    def __init__(self, fuse):
        self.fuse = fuse

    def __call__(self, input_ids, scores):
        self.fuse -= 1
        if self.fuse == 0:
            raise KeyboardInterrupt
        return scores


@pytest.mark.parametrize("fuse", [1, 2, 7])
def test_an_exception_leaves_the_generator_where_plain_sampling_would(llama, llama_draft, prompt, fuse):
    states = []
    for assistant in (None, llama_draft):
        torch.manual_seed(0)
        with pytest.raises(KeyboardInterrupt):
            llama.generate(
                prompt, do_sample=True, max_new_tokens=20, logits_processor=LogitsProcessorList([Bomb(fuse)]),
                assistant_model=assistant, eos_token_id=None,
            )  # fmt: skip
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
    assert not llama.get_decoder()._forward_hooks


def test_prefix_allowed_tokens(llama, same, prompt):
    def even_then_odd(batch, ids):
        return list(range(len(ids) % 2, 64, 2))

    same(llama, prompt, prefix_allowed_tokens_fn=even_then_odd, do_sample=True)


def test_left_padding_and_chunked_prefill(llama, same, prompt):
    padded = torch.cat((torch.zeros(1, 4, dtype=torch.long), prompt), dim=1)
    mask = torch.cat((torch.zeros(1, 4, dtype=torch.long), torch.ones_like(prompt)), dim=1)
    plain, _ = same(llama, padded, attention_mask=mask)
    same(tiny.build("mistral"), padded, attention_mask=mask)
    assert plain.sequences[0, 4:].tolist() == llama.generate(prompt, max_new_tokens=40, eos_token_id=None)[0].tolist()
    same(llama, prompt, prefill_chunk_size=4)


def test_arena_growth(llama, same, prompt):
    same(llama, prompt, max_new_tokens=400, accuracies=(0.95,))


def test_users_own_empty_cache_is_filled(llama, llama_draft, prompt):
    from transformers import DynamicCache

    cache = DynamicCache(config=llama.config)
    fast = llama.generate(prompt, max_new_tokens=20, assistant_model=llama_draft, **{CACHE: cache})
    plain = llama.generate(prompt, max_new_tokens=20)
    assert fast.tolist() == plain.tolist() and cache.get_seq_length() == fast.shape[1] - 1
    again = llama.generate(fast, max_new_tokens=9, assistant_model=llama_draft, **{CACHE: cache})
    assert again.tolist() == llama.generate(fast, max_new_tokens=9).tolist()


def test_nan_logits_behave_as_in_plain_generate(prompt):
    model = tiny.build("llama")
    draft = fresh_draft(model)
    model.generate(prompt, max_new_tokens=2, assistant_model=draft)  # probed while sound
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    greedy = {"max_new_tokens": 6, "eos_token_id": None}
    assert (
        model.generate(prompt, assistant_model=draft, **greedy).tolist() == model.generate(prompt, **greedy).tolist()
    )
    errors = []
    for assistant in (None, draft):
        with pytest.raises(RuntimeError) as caught:
            model.generate(prompt, do_sample=True, assistant_model=assistant, **greedy)
        errors.append(str(caught.value))
    assert errors[0] == errors[1]


def test_max_time_stops_between_tokens(llama, llama_draft, prompt):
    out = llama.generate(prompt, max_new_tokens=200, max_time=1e-6, assistant_model=llama_draft, eos_token_id=None)
    assert out.shape[1] == prompt.shape[1] + 1  # as plain generate: after the first token


@pytest.mark.parametrize("do_sample", [False, True])
def test_bf16_parts_only_at_near_ties(prompt, do_sample):
    """In half precision compare by the gap at the first difference, never by equality."""
    model = tiny.build("llama", dtype=torch.bfloat16)
    draft = fresh_draft(model, tree_depth=4, tree_top_k=5, tree_total_nodes=20)
    kwargs = {"do_sample": do_sample, "eos_token_id": None, "top_k": 0}
    for seed in range(4):
        outs = []
        for assistant in (None, draft):
            torch.manual_seed(seed)
            wanted = {"return_dict_in_generate": True, "output_scores": True, "max_new_tokens": 30}
            outs.append(model.generate(prompt, assistant_model=assistant, **wanted, **kwargs))
        assert outs[1].speculation.rounds and outs[1].scores[0].dtype == torch.float32
        found = first_divergence(model, {"input_ids": prompt}, *(o.sequences for o in outs), seed=seed, **kwargs)
        assert found is None or (found.other_rank == 1 and found.gap < 0.5)
