import subprocess
import sys
import threading

import pytest
import torch
from transformers import GenerationConfig, GenerationMixin

import fspad_hf
from fspad_hf import FSPADDraftModel
from fspad_hf.generation import decoding

from .. import tiny
from ..conftest import fresh_draft


def test_install_is_idempotent_and_removable(llama, prompt):
    patched = GenerationMixin._assisted_decoding
    fspad_hf.install()
    assert GenerationMixin._assisted_decoding is patched
    fspad_hf.uninstall()
    try:
        assert "fspad" not in GenerationMixin._assisted_decoding.__module__
        assert "fspad" not in GenerationMixin._validate_generation_mode.__module__
        fspad_hf.uninstall()
    finally:
        fspad_hf.install()
    assert hasattr(GenerationMixin._assisted_decoding, "_fspad_original")


def test_import_is_silent_and_stays_off_cuda():
    code = (
        "import fspad_hf, torch, sys; assert not torch.cuda.is_initialized();"
        "assert not {'fspad_hf.demo', 'fspad_hf.training', 'matplotlib', 'datasets'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_two_threads_share_a_draft_over_two_targets(prompt):
    targets = [tiny.build("llama", seed=s) for s in (0, 1)]
    draft = fresh_draft(targets[0])
    expected = [t.generate(prompt, max_new_tokens=40, eos_token_id=None).tolist() for t in targets]
    results, barrier = [[], []], threading.Barrier(2)

    def run(i):
        barrier.wait()
        for _ in range(5):
            results[i].append(
                targets[i].generate(prompt, assistant_model=draft, max_new_tokens=40, eos_token_id=None).tolist()
            )

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert results == [[expected[0]] * 5, [expected[1]] * 5]


def test_two_threads_on_one_target(llama, llama_draft, prompt):
    prompts = [prompt, prompt.flip(1)]
    expected = [llama.generate(p, max_new_tokens=40, eos_token_id=None).tolist() for p in prompts]
    results = [None, None]

    def run(i):
        results[i] = llama.generate(
            prompts[i], assistant_model=llama_draft, max_new_tokens=40, eos_token_id=None
        ).tolist()

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert results == expected


@pytest.mark.parametrize("how", ["compile", "forward"])
def test_a_target_compiled_in_place(how, same, prompt):
    model = tiny.build("llama")
    if how == "compile":
        model.compile(backend="eager", dynamic=True)
    else:
        model.forward = torch.compile(model.forward, backend="eager", dynamic=True)
    same(model, prompt, max_new_tokens=16, accuracies=(0.95,))
    torch.compiler.reset()


def test_no_state_stays_on_draft_or_target(llama, prompt):
    draft = fresh_draft(llama)
    llama.generate(prompt, max_new_tokens=3, assistant_model=draft)
    before, on_target = set(draft.__dict__), set(llama.__dict__)
    llama.generate(prompt, max_new_tokens=9, assistant_model=draft, do_sample=True)
    assert set(draft.__dict__) == before and set(llama.__dict__) == on_target
    assert not llama.get_decoder()._forward_hooks


class TestMisfits:
    """Each says so in one sentence, before decoding."""

    def check(self, target, draft, prompt, *words):
        with pytest.raises(ValueError) as error:
            target.generate(prompt, assistant_model=draft)
        message = str(error.value)
        assert "\n" not in message and all(word in message for word in words), message

    def test_hidden_size(self, llama, prompt):
        draft = fresh_draft(llama, hidden_size=64, head_dim=16)
        self.check(llama, draft, prompt, "hidden_size is 64", "reads 32", "from_target")

    def test_vocabulary(self, llama, prompt):
        self.check(llama, fresh_draft(llama, vocab_size=65), prompt, "vocab_size is 65", "64")

    def test_special_tokens(self, llama, prompt):
        self.check(llama, fresh_draft(llama, eos_token_id=9), prompt, "eos_token_id is [9]", "[2]")

    def test_meta(self, llama, prompt):
        config = fresh_draft(llama).config
        with torch.device("meta"):
            draft = FSPADDraftModel(config)
        self.check(llama, draft, prompt, "meta", "from_pretrained")

    def test_empty_prompt_is_as_in_plain_generate(self, llama, llama_draft):
        outcomes = []
        for assistant in (None, llama_draft):
            try:
                outcomes.append(
                    llama.generate(
                        torch.zeros(1, 0, dtype=torch.long), max_new_tokens=3, assistant_model=assistant
                    ).tolist()
                )
            except Exception as error:
                outcomes.append((type(error), str(error)))
        assert outcomes[0] == outcomes[1]

    def test_prompt_longer_than_the_context_is_as_in_plain_generate(self, prompt):
        model = tiny.build("gpt2")
        draft, ids = fresh_draft(model), prompt.repeat(1, 30)
        errors = []
        for assistant in (None, draft):
            with pytest.raises(IndexError) as caught:
                model.generate(ids, max_new_tokens=3, assistant_model=assistant)
            errors.append(str(caught.value))
        assert errors[0] == errors[1]


def test_a_draft_in_another_dtype_is_cast_for_the_call(llama, prompt):
    draft = fresh_draft(llama).to(torch.bfloat16)
    fast = llama.generate(prompt, assistant_model=draft, max_new_tokens=12)
    assert fast.tolist() == llama.generate(prompt, max_new_tokens=12).tolist()
    assert draft.dtype == torch.bfloat16


@pytest.mark.parametrize("how", ["cpu", "disk"])
def test_an_offloaded_target(how, same, prompt, tmp_path):
    """Between forwards its weights stand on `meta`, embedding and LM head included."""
    from accelerate import cpu_offload, disk_offload

    model = tiny.build("llama")
    draft = fresh_draft(model)
    if how == "cpu":
        cpu_offload(model, execution_device="cpu")
    else:
        disk_offload(model, str(tmp_path), execution_device="cpu")
    assert model.device.type == "meta"
    same(model, prompt, draft=draft, max_new_tokens=16, min_tau=1.5)
    fast = model.generate(prompt, assistant_model=draft, max_new_tokens=9, return_dict_in_generate=True)
    assert fast.speculation.rounds and fast.sequences.tolist() == model.generate(prompt, max_new_tokens=9).tolist()


def test_what_a_call_says_to_stock_assistants(llama, prompt, oracle, monkeypatch):
    seen = []
    monkeypatch.setattr(decoding.logger, "warning_once", seen.append)
    kwargs = {"max_new_tokens": 40, "eos_token_id": None, "pad_token_id": 0, "return_dict_in_generate": True}
    plain = llama.generate(prompt, **kwargs).sequences
    oracle(plain.tolist(), 1.0, 64)
    draft = fresh_draft(llama)
    deep = llama.generate(prompt, assistant_model=draft, **kwargs)
    assert max(deep.speculation.accepted_lengths) == 7 and not seen
    for where in ("call", "draft"):
        draft.generation_config = GenerationConfig(num_assistant_tokens=2) if where == "draft" else None
        asked = {"num_assistant_tokens": 2} if where == "call" else {}
        flat = llama.generate(prompt, assistant_model=draft, **kwargs, **asked)
        assert flat.sequences.equal(plain) and max(flat.speculation.accepted_lengths) == 3 and not seen
    draft.generation_config = None
    out = llama.generate(prompt, assistant_model=draft, assistant_confidence_threshold=0.9, **kwargs)
    assert out.sequences.equal(plain) and len(seen) == 1 and "assistant_confidence_threshold" in seen[0]
