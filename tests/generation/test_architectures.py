import pytest
import torch

from fspad_hf.host import CACHE

from .. import tiny
from ..conftest import fresh_draft

# The host refuses sdpa for both: attention sinks, and a softcap.
EAGER_ONLY = {"gpt_oss", "gemma2"}
CASES = [(n, a) for n in tiny.CONFIGS for a in ("sdpa", "eager") if a == "eager" or n not in EAGER_ONLY]


@pytest.mark.parametrize(("name", "attention"), CASES)
def test_tokens_are_those_of_plain_generate(name, attention, same, prompt):
    model = tiny.build(name, attention)
    plain, fast = same(model, prompt)  # greedy; windows of 5 or 6 are shorter than the prompt
    same(model, prompt, do_sample=True, temperature=1.3, top_k=0, top_p=0.95, repetition_penalty=1.1, min_tau=2.0)
    for ours, theirs in zip(fast[CACHE].layers, plain[CACHE].layers, strict=True):
        assert type(ours) is type(theirs)
        torch.testing.assert_close(ours.keys, theirs.keys, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(ours.values, theirs.values, atol=1e-3, rtol=1e-3)
        assert ours.get_seq_length() == theirs.get_seq_length() == plain.sequences.shape[1] - 1


def test_fp64(same, prompt):
    same(tiny.build("llama", dtype=torch.float64), prompt)


def test_a_real_draft_speculates_on_every_architecture(prompt):
    for name in ("gemma2", "opt", "cohere2", "gpt_oss"):
        model = tiny.build(name, "eager")
        draft = fresh_draft(model, tree_depth=3, tree_top_k=4, tree_total_nodes=12)
        fast = model.generate(
            prompt, assistant_model=draft, max_new_tokens=12, eos_token_id=None, return_dict_in_generate=True
        )
        assert fast.speculation.rounds > 0
        assert fast.sequences.tolist() == model.generate(prompt, max_new_tokens=12, eos_token_id=None).tolist()


def test_longrope_never_crosses_its_boundary(same, prompt):
    from transformers import AutoModelForCausalLM, LlamaConfig

    for kind, extra in (
        ("longrope", {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4, "factor": 4.0}),
        ("dynamic", {"factor": 4.0}),
    ):
        rope = {"rope_type": kind, "rope_theta": 10_000.0, "original_max_position_embeddings": 20, **extra}
        config = LlamaConfig(**{**tiny.COMMON, "max_position_embeddings": 20 if kind == "dynamic" else 80})
        config.rope_parameters = rope
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
        same(model, prompt, max_new_tokens=25, min_tau=None)


def test_learned_positions_up_to_the_last_one(same):
    """gpt2's position table ends at 256: the tree must not reach past what plain decoding forwards."""
    model = tiny.build("gpt2")
    same(model, torch.arange(3, 63).repeat(4)[None, :236], max_length=256, max_new_tokens=None)
