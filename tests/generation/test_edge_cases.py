"""Models and calls at the edges: same tokens, same generator state, and no error where plain generate has none."""

import pytest
import torch
import transformers as tf
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from fspad_hf import FSPADConfig, FSPADDraftModel
from fspad_hf.generation.cache import ArenaCache
from fspad_hf.generation.noise import NoiseQueue
from fspad_hf.generation.probe import probe
from fspad_hf.host import CACHE

from .. import tiny
from ..conftest import fresh_draft


def check(model, draft, ids, speculated=None, **kwargs):
    """Plain and with the draft, greedy and sampled; `speculated` says whether the draft must have been used."""
    kwargs = {"max_new_tokens": 25, "eos_token_id": None, "pad_token_id": 0, **kwargs}
    for do_sample in (False, True):
        outs, states = [], []
        for assistant in (None, draft):
            torch.manual_seed(11)
            outs.append(
                model.generate(
                    ids, assistant_model=assistant, do_sample=do_sample, return_dict_in_generate=True, **kwargs
                )
            )
            states.append(torch.get_rng_state())
        assert outs[1].sequences.tolist() == outs[0].sequences.tolist()
        assert torch.equal(*states)
        if speculated is not None:
            assert (outs[1].speculation is not None) == speculated


def with_weights_of(kind, llama):
    model = kind(llama.config).eval()
    model.load_state_dict(llama.state_dict())
    return model


def test_phi3_that_outgrows_its_original_context(prompt):
    """Its own prepare_inputs_for_generation drops the cache there and recomputes everything."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 20}
    rope |= {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4}
    config = tf.Phi3Config(
        **{**tiny.COMMON, "max_position_embeddings": 80}, original_max_position_embeddings=20, rope_parameters=rope
    )
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config).eval()
    draft = fresh_draft(model)
    check(model, draft, prompt, speculated=False)
    check(model, draft, prompt, speculated=True, max_new_tokens=8)


def test_a_window_hidden_in_the_models_code(prompt):
    config = tf.GPTNeoConfig(
        vocab_size=64, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]],
        window_size=32, max_position_embeddings=256, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = tf.AutoModelForCausalLM.from_config(config).eval()
    assert probe(model).chains_only  # a tree's siblings would count as tokens of its window
    check(model, fresh_draft(model), prompt, speculated=True)


class DoubledPositions(tf.LlamaForCausalLM):
    def prepare_inputs_for_generation(self, *args, **kwargs):
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        inputs["position_ids"] = inputs["position_ids"] * 2
        return inputs


class OwnLoop(tf.LlamaForCausalLM):
    def _sample(self, input_ids, *args, **kwargs):
        out = super()._sample(input_ids, *args, **kwargs)
        out.sequences = torch.cat((out.sequences, torch.full((1, 3), 42)), dim=1)
        return out


@pytest.mark.parametrize("kind", [DoubledPositions, OwnLoop])
def test_models_with_a_loop_of_their_own(kind, llama, prompt):
    model = with_weights_of(kind, llama)
    check(model, fresh_draft(llama), prompt, speculated=False)


def test_a_hook_added_after_the_probe(llama, prompt):
    model = with_weights_of(tf.LlamaForCausalLM, llama)
    draft = fresh_draft(model)
    check(model, draft, prompt, speculated=True)

    def steer(module, args, output):  # on the last row only: a tree has many
        output = output.clone()
        output[:, -1] += 3.0
        return output

    handle = model.model.layers[0].mlp.register_forward_hook(steer)
    check(model, draft, prompt, speculated=False)
    handle.remove()
    check(model, draft, prompt, speculated=True)


def test_nothing_but_padding(llama, llama_draft):
    check(llama, llama_draft, torch.tensor([[0]]), attention_mask=torch.tensor([[0]]), speculated=False)
    check(llama, llama_draft, torch.tensor([[1]]), speculated=True)


class StopAt(StoppingCriteria):
    def __init__(self, length):
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        return torch.tensor([input_ids.shape[1] >= self.length])


@pytest.mark.parametrize("returned", [False, True])
def test_keys_and_values_are_held_once(llama, prompt, returned, monkeypatch):
    """Decoding takes them over from the prefill's cache, which nobody else asked for."""
    made, from_dynamic = [], ArenaCache.from_dynamic.__func__

    def noted(cls, cache, *args, **kwargs):
        if len(cache.layers) == len(llama.model.layers) and cache.get_seq_length() == prompt.shape[1]:
            made.append(cache)
        return from_dynamic(cls, cache, *args, **kwargs)

    draft = fresh_draft(llama)
    llama.generate(prompt, assistant_model=draft, max_new_tokens=3)  # what the probe holds is another matter
    monkeypatch.setattr(ArenaCache, "from_dynamic", classmethod(noted))
    out = llama.generate(
        prompt, assistant_model=draft, max_new_tokens=12, eos_token_id=None, return_dict_in_generate=returned
    )
    (cache,) = made
    assert all((layer.keys is None) != returned for layer in cache.layers)
    assert not returned or cache.get_seq_length() == out.sequences.shape[1] - 1


def test_a_position_table_that_ends_before_max_length():
    model = tiny.build("gpt2")
    ids = torch.arange(3, 63).repeat(5)[None, :246]
    for length in (250, 256, 257):
        criteria = StoppingCriteriaList([StopAt(length)])
        check(model, fresh_draft(model), ids, True, stopping_criteria=criteria, max_new_tokens=300)


class Packed(torch.nn.Module):
    """An LM head whose weight is not a matrix anyone can read."""

    def __init__(self, linear):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
        self.inner = [linear]

    def forward(self, features):
        return self.inner[0](features)


@pytest.mark.parametrize("drafted", [None, 30])
def test_a_packed_head(llama, prompt, drafted):
    model = with_weights_of(tf.LlamaForCausalLM, llama)
    draft = fresh_draft(model, draft_vocab_size=drafted)
    model.lm_head = Packed(model.lm_head).eval()
    check(model, draft, prompt, speculated=True)


def test_more_logits_than_vocabulary(llama, prompt):
    model = with_weights_of(tf.LlamaForCausalLM, llama)
    draft = fresh_draft(model)
    wide = torch.nn.Linear(32, 70, bias=True)
    with torch.no_grad():
        wide.bias[64:] = -1e9
    model.lm_head = wide.eval()
    check(model, draft, prompt, speculated=False)


def test_dropout_in_a_part_of_the_target(prompt):
    model = tiny.build("gpt2")
    draft = fresh_draft(model)
    model.transformer.train()
    check(model, draft, prompt, speculated=False)


def test_the_probe_leaves_the_generator_alone(prompt):
    model = tiny.build("llama")
    handle = model.model.layers[0].register_forward_hook(lambda m, a, o: (torch.rand(1), o)[1])
    state = torch.get_rng_state()
    assert "random" in probe(model).reason
    assert torch.equal(torch.get_rng_state(), state)
    handle.remove()
    assert probe(model).reason is None


def test_a_thread_that_draws_while_rows_are_drawn_ahead():
    queue = NoiseQueue(torch.device("cpu"), 50)

    class Proxy:
        """Another thread draws between our last row and our look at the state."""

        def __init__(self, generator):
            self.generator, self.calls = generator, 0

        def get_state(self):
            self.calls += 1
            if self.calls == 5:
                torch.rand(2)
            return self.generator.get_state()

        def set_state(self, state):
            self.generator.set_state(state)

    proxy = queue.generator = Proxy(queue.generator)
    assert queue.peek(3) is None and not queue.coupled
    after = torch.get_rng_state()
    assert proxy.calls == 5 and queue.peek(1) is None and torch.equal(torch.get_rng_state(), after)


class Halve(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores.to(torch.bfloat16)


def test_processors_that_return_half_precision(llama, llama_draft, prompt):
    check(llama, llama_draft, prompt, True, logits_processor=LogitsProcessorList([Halve()]), max_new_tokens=60)


class Raises(BaseStreamer):
    def __init__(self, at):
        self.left = at

    def put(self, value):
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt

    def end(self):
        pass


@pytest.mark.parametrize("at", [2, 5, 9])
def test_the_users_cache_after_an_exception(llama, llama_draft, prompt, at):
    lengths = []
    for assistant in (None, llama_draft):
        cache = DynamicCache(config=llama.config)
        with pytest.raises(KeyboardInterrupt):
            llama.generate(
                prompt, streamer=Raises(at), assistant_model=assistant, max_new_tokens=20, **{CACHE: cache},
                eos_token_id=None,
            )  # fmt: skip
        lengths.append(cache.get_seq_length())
    assert lengths[0] == lengths[1]


def test_outputs_declined_by_name_do_not_stop_speculation(llama, llama_draft, prompt):
    check(llama, llama_draft, prompt, speculated=True, output_hidden_states=False, output_attentions=False)


def test_a_damaged_draft_is_lossless(llama, prompt):
    for value in (float("nan"), float("inf"), 1e18):
        draft = fresh_draft(llama)
        torch.nn.init.constant_(draft.layer.mlp.down_proj.weight, value)
        check(llama, draft, prompt, speculated=True)


def test_fewer_finite_candidates_than_children(llama, prompt):
    for top_k in (1, 3):
        check(llama, fresh_draft(llama), prompt, speculated=True, top_k=top_k)


def test_prefill_in_chunks_on_a_compiled_target(prompt):
    model = tiny.build("llama")
    draft = FSPADDraftModel(FSPADConfig(**fresh_draft(model).config.to_diff_dict())).eval()
    model.compile(backend="eager", dynamic=True)
    out = model.generate(prompt, assistant_model=draft, prefill_chunk_size=4, max_new_tokens=5)
    assert out.tolist() == model.generate(prompt, prefill_chunk_size=4, max_new_tokens=5).tolist()
    torch.compiler.reset()
