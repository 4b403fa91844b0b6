"""The draft in vLLM beside the draft in `generate`; tests/serving/environment makes what it needs."""

import gc
import json
import os
import subprocess
import sys

import pytest
import serving
import torch
import transformers as tf
from transformers import AutoTokenizer, DynamicCache
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from fspad_hf import FSPADConfig, FSPADDraftModel
from fspad_hf.demo_target import demo_target, released_draft
from fspad_hf.host import load_target
from fspad_hf.training.acceptance import draft_chains, measure_acceptance

vllm = pytest.importorskip("vllm", reason="vLLM is not installed; tests/serving/environment installs it")

from fspad_hf.serving.vllm import check_divides, rotary_angles  # noqa: E402

CHAIN = 3
SMALL = {
    "vocab_size": 96, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.2, "eos_token_id": None,
}  # fmt: skip
CONFIGS = {"llama": tf.LlamaConfig(**SMALL), "gemma2": tf.Gemma2Config(**SMALL, head_dim=32)}
ROPES = {
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "llama3": {
        "factor": 4.0, "original_max_position_embeddings": 16, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    },
    "longrope": {
        "factor": 4.0, "original_max_position_embeddings": 64,
        "short_factor": [1.0 + i / 16 for i in range(16)], "long_factor": [2.0 + i / 16 for i in range(16)],
    },
}  # fmt: skip
VARIANTS = {
    "fspad": {},
    "no-feature-sampling": {"feature_sampling": False},
    "no-partial-alignment": {"partial_alignment": False},
    "eagle-2": {"feature_sampling": False, "partial_alignment": False, "fc_bias": False},
    "biases": {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu_pytorch_tanh"},
    "some-ids": {"draft_vocab_size": 32},
    **{name: {"rope_parameters": {"rope_type": name, "rope_theta": 1e4, **rope}} for name, rope in ROPES.items()},
}


@pytest.fixture
def engine():
    """`engine(target, draft, **options)`: a `vllm.LLM`; the one before it is given back."""

    def make(target, draft=None, **options):
        close()
        spec = {"method": "eagle", "model": str(draft), "num_speculative_tokens": CHAIN} if draft else None
        options = {"dtype": "float32", "enforce_eager": True, "disable_log_stats": False, **options}
        made.append(vllm.LLM(str(target), speculative_config=spec, **options))
        return made[-1]

    def close():
        made.clear()
        gc.collect()
        vllm.distributed.cleanup_dist_env_and_memory()

    made = []
    yield make
    close()


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """`small(family, dtype, **overrides)`: folders of a small target and of a draft for it."""

    def make(family="llama", dtype=torch.float32, **overrides):
        folder = tmp_path_factory.mktemp(family)
        torch.manual_seed(0)
        target = tf.AutoModelForCausalLM.from_config(CONFIGS[family], dtype=dtype).eval()
        torch.manual_seed(1)
        draft = FSPADDraftModel.from_target(target, initializer_range=0.2, **overrides)
        for name, weight in draft.named_parameters():
            torch.nn.init.normal_(weight, mean=float("norm" in name), std=0.1)  # biases, too
        target.save_pretrained(folder / "target"), draft.save_pretrained(folder / "draft")
        return folder / "target", folder / "draft"

    return make


def answers(llm, prompts, max_tokens=20, **options):
    params = vllm.SamplingParams(temperature=0, max_tokens=max_tokens, **options)
    told = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
    return [list(one.outputs[0].token_ids) for one in told]


def metrics(llm, name):
    (metric,) = [metric for metric in llm.get_metrics() if metric.name == f"vllm:{name}"]
    return getattr(metric, "values", None) or metric.value


def recorded(llm) -> list:
    """The draft's calls from here on: (input_ids, positions, hidden_states), outputs."""
    calls = []

    def note(module, args, kwargs, outputs):
        given = [kwargs[name].clone() for name in ("input_ids", "positions", "hidden_states")]
        calls.append((*given, *(output.clone() for output in outputs)))

    llm.collective_rpc(
        lambda worker: worker.model_runner.drafter.model.register_forward_hook(note, with_kwargs=True) and 0
    )
    return calls


@pytest.mark.parametrize(
    "family, dtype, variant",
    [*(("llama", torch.float32, variant) for variant in VARIANTS), ("gemma2", torch.float32, "fspad"),
     ("llama", torch.bfloat16, "fspad"), ("gemma2", torch.bfloat16, "fspad")],
)  # fmt: skip
@torch.no_grad()
def test_the_network_is_ours(engine, small, family, dtype, variant):
    folders = small(family, dtype, **VARIANTS[variant])
    target, draft = load_target(str(folders[0]), dtype=dtype), FSPADDraftModel.from_pretrained(folders[1], dtype=dtype)
    llm = engine(*folders, dtype=str(dtype).removeprefix("torch."), max_model_len=256, skip_tokenizer_init=True)
    calls = recorded(llm)
    answers(llm, [[1, *range(5, 25)]], detokenize=False, ignore_eos=True)
    assert len(calls) > 15
    cache, guess = DynamicCache(), None
    error = 1e-5 if dtype == torch.float32 else 0.05
    for ids, positions, features, logit_features, fed_back in calls:
        cache.crop(int(positions[0]))
        if guess is not None and len(ids) == 1:  # the chain is greedy
            assert ids.item() == guess[int(positions[0]) - 1]
        mask = torch.ones(len(ids), cache.get_seq_length() + len(ids), dtype=torch.bool).tril(cache.get_seq_length())
        out = draft(
            target.get_input_embeddings()(ids)[None], features[None], positions[None], mask[None, None],
            cache=cache,
        )  # fmt: skip
        scale = out.features.abs().max()
        assert (out.logit_features[0] - logit_features).abs().max() < error * scale
        assert (out.features[0] - fed_back).abs().max() < error * scale
        likeliest = target.lm_head(logit_features).argmax(-1)
        guess = dict(zip(positions.tolist(), likeliest.tolist(), strict=True))


@pytest.mark.parametrize(
    "rope", [{"rope_type": "default"}, *({"rope_type": name, **rope} for name, rope in ROPES.items())]
)
def test_each_position_is_turned_as_at_the_end_of_a_text(rope):
    config = FSPADConfig(**{**SMALL, "num_hidden_layers": 1}, rope_parameters={"rope_theta": 1e4, **rope})
    config.max_position_embeddings = 48  # past which "dynamic" turns slower
    angles = rotary_angles(config, 80)
    for position in (0, 1, 31, 47, 48, 63, 64, 79):
        cos, sin = LlamaRotaryEmbedding(config)(torch.empty(0), torch.arange(position + 1)[None])
        torch.testing.assert_close(angles[position], torch.cat((cos[0, -1, :16], sin[0, -1, :16])))


def chat_prompts(texts):
    tokenizer = AutoTokenizer.from_pretrained(demo_target())
    chats = [[{"role": "user", "content": text}] for text in texts]
    return tokenizer, tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=True)["input_ids"]


TEXTS = [
    "Why is the sky blue?", "Write a limerick about a cat.", "What is 12 times 7? Explain.", "Name three rivers.",
    "Summarise: the cat sat on the mat, and the dog lay beside it.", "How do I boil an egg?", "Who was Ada Lovelace?",
    "List the planets.",
]  # fmt: skip


def test_answers_are_plain_ones_and_guesses_are_those_of_generate(engine):
    tokenizer, prompts = chat_prompts(TEXTS)
    plain = answers(engine(demo_target(), max_model_len=512), prompts, 64)
    llm = engine(demo_target(), released_draft(), max_model_len=512)
    assert answers(llm, prompts, 64) == plain
    target, draft = (
        load_target(str(demo_target()), dtype=torch.float32),
        FSPADDraftModel.from_pretrained(released_draft()),
    )
    draft_chains(draft, CHAIN)
    rows = measure_acceptance(target, tokenizer, draft, [("all", text) for text in TEXTS], 64)
    lengths = [length for row in rows if row["mode"] == "greedy" for length in row["accepted_lengths"]]
    # Both count alike but for an answer's last round, which may be cut.
    assert abs(metrics(llm, "spec_decode_num_drafts") - len(lengths)) <= len(TEXTS)
    for position, accepted in enumerate(metrics(llm, "spec_decode_num_accepted_tokens_per_pos")):
        assert abs(accepted - sum(length > position + 1 for length in lengths)) <= len(TEXTS)
    assert sum(lengths) / len(lengths) > 1.4


def test_compiled(engine):
    _, prompts = chat_prompts(TEXTS[:4])
    plain = answers(engine(demo_target(), max_model_len=512), prompts, 32)
    llm = engine(demo_target(), released_draft(), max_model_len=512, enforce_eager=False)
    assert answers(llm, prompts, 32) == plain and metrics(llm, "spec_decode_num_accepted_tokens") > 0


def test_prompts_in_chunks_and_out_of_the_cache_preempted_requests_and_the_longest_text(engine):
    _, prompts = chat_prompts([f"{' '.join(TEXTS)} Answer number {i % 6 + 1}." for i in range(8)])  # two of them twice
    options = {"max_model_len": 224, "block_size": 32, "max_num_batched_tokens": 64, "max_num_seqs": 8}
    options |= {"num_gpu_blocks_override": 32, "enable_prefix_caching": True, "enable_chunked_prefill": True}
    plain = answers(engine(demo_target(), **options), prompts, None, ignore_eos=True)
    llm = engine(demo_target(), released_draft(), **options)
    assert answers(llm, prompts, None, ignore_eos=True) == plain
    assert {len(prompt) + len(answer) for prompt, answer in zip(prompts, plain, strict=True)} == {224}
    assert len(prompts[0]) > 64 and metrics(llm, "prefix_cache_hits") > 0 and metrics(llm, "num_preemptions") > 0
    assert metrics(llm, "spec_decode_num_accepted_tokens") > 100


SPLIT = """
import sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    target, draft, size = sys.argv[1:]
    llm = LLM(
        target, dtype="float32", enforce_eager=True, skip_tokenizer_init=True, max_model_len=256,
        speculative_config={"method": "eagle", "model": draft, "num_speculative_tokens": 3}, disable_log_stats=False,
        tensor_parallel_size=int(size), distributed_executor_backend="mp",
    )
    params = SamplingParams(temperature=0, max_tokens=60, detokenize=False, ignore_eos=True)
    told = llm.generate([{"prompt_token_ids": [1, 7, 5 + i]} for i in range(8)], params)
    accepted = [metric.values for metric in llm.get_metrics() if "per_pos" in metric.name]
    print("TOLD", [list(one.outputs[0].token_ids) for one in told], accepted)
"""


def test_split_over_two_processes(small, tmp_path):
    (tmp_path / "split.py").write_text(SPLIT)
    told = []
    for size, cores in ((1, "0-1"), (2, "0|1")):
        command = [sys.executable, str(tmp_path / "split.py"), *map(str, small()), str(size)]
        run = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, "VLLM_CPU_OMP_THREADS_BIND": cores}
        )
        assert run.returncode == 0, run.stderr[-3000:]
        told += [line for line in run.stdout.splitlines() if line.startswith("TOLD")]
    assert told[0] == told[1] and "[[0, " not in told[0]  # some guesses were right


def test_the_script_that_compares_speeds(tmp_path, capfd, monkeypatch):
    asked = [{"category": "qa", "turns": [text]} for text in TEXTS[:3]]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, asked)))
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
    command = ["--target", demo_target(), "--draft", released_draft(), "--questions", tmp_path / "questions.jsonl"]
    command += ["--max-new-tokens", 16, "--dtype", "float32", "--enforce-eager", "--concurrency", 1, 2]
    results = serving.main([*map(str, command), "--json", str(tmp_path / "serving.json")])
    assert results == json.loads((tmp_path / "serving.json").read_text())
    lines = [line for line in capfd.readouterr().out.splitlines() if " at once: plain " in line]
    assert [line.split()[0] for line in lines] == ["1", "2"]
    assert all("3 of 3 answers identical" in line and "accepted by position 0." in line for line in lines)
    alone, together = results["draft"]["1"], results["plain"]["2"]
    assert alone["rounds"] < 45 and alone["answers"] == together["answers"]


def test_a_size_that_does_not_divide(small):
    config = FSPADDraftModel.from_pretrained(small()[1]).config
    check_divides(config, 1), check_divides(config, 4)  # key-value heads are copied
    with pytest.raises(ValueError, match=r"tensor_parallel_size=3 does not divide .* num_attention_heads=4"):
        check_divides(config, 3)
    config.intermediate_size = 190
    with pytest.raises(ValueError, match=r"tensor_parallel_size=4 does not divide .* intermediate_size=190"):
        check_divides(config, 4)


def test_a_draft_for_another_target(engine, small):
    with pytest.raises(ValueError, match=r"does not fit .*: its hidden_size is 128, the target's LM head reads 576"):
        engine(demo_target(), small()[1], max_model_len=256)
