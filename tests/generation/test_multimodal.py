"""Targets that see: the image is read in the prefill, and rounds are text."""

import functools

import numpy as np
import pytest
import torch
import transformers as tf
from PIL import Image
from transformers import pipeline

from fspad_hf import FSPADDraftModel
from fspad_hf.generation import hook
from fspad_hf_cli import main

from .. import tiny, tiny_vision
from ..conftest import fresh_draft
from ..training.runs import write_files

MODES = {"greedy": {"do_sample": False}, "sampled": {"do_sample": True, "temperature": 1.2, "top_k": 0}}
PROMPTS = [(0,), (1,), (2,), (1, 1), (2, 2)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("images", PROMPTS, ids=str)
@pytest.mark.parametrize("name", tiny_vision.CONFIGS)
def test_the_same_tokens(name, images, mode, same):
    if len(images) > 1 and name in tiny_vision.RECURRENT:
        pytest.skip("recurrent models run plain in a batch")
    model, inputs = tiny_vision.build(name), tiny_vision.inputs(name, images)
    same(model, inputs.pop("input_ids"), accuracies=(0.9,), **inputs, **MODES[mode])
    if sum(images) and mode == "greedy":  # and they are of this image
        other = tiny_vision.inputs(name, images, seed=1)
        assert not torch.equal(inputs["pixel_values"], other["pixel_values"])
        with torch.no_grad():
            seen = [model(**{**other, **one}).logits[:, -1] for one in (inputs, other)]
        assert (seen[0] - seen[1]).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["gemma3", "qwen2_5_vl"])
def test_prompts_of_different_lengths(name, same):
    """One has an image, the other none."""
    model, inputs = tiny_vision.build(name), tiny_vision.inputs(name, (1, 0))
    same(model, inputs.pop("input_ids"), accuracies=(0.9,), **inputs)


@pytest.mark.parametrize("name", ["llava", "qwen3_vl"])
def test_return_sequences(name, same):
    model, inputs = tiny_vision.build(name), tiny_vision.inputs(name, (1,))
    same(model, inputs.pop("input_ids"), accuracies=(0.9,), num_return_sequences=2, **inputs, **MODES["sampled"])


def test_a_conversation_goes_on_with_its_cache():
    """The second turn has no image of its own."""
    name = "qwen2_5_vl"
    model, first = tiny_vision.build(name), tiny_vision.inputs(name, (1,))
    draft, answers = fresh_draft(model), []
    for assistant in (None, draft):
        arguments = {"max_new_tokens": 9, "eos_token_id": None, "pad_token_id": 0, "return_dict_in_generate": True}
        out = model.generate(**first, assistant_model=assistant, **arguments)
        ids = torch.cat((out.sequences, torch.tensor([[7, 30, 2, 44]])), dim=1)
        kinds = torch.zeros_like(ids)
        kinds[:, : first["mm_token_type_ids"].shape[1]] = first["mm_token_type_ids"]
        again = {**first, "input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": kinds}
        again = model.generate(**again, assistant_model=assistant, **arguments)
        answers.append((out.sequences.tolist(), again.sequences.tolist()))
    assert answers[0] == answers[1]


def test_a_pipeline(tokenizer, monkeypatch):
    said = []
    monkeypatch.setattr(hook.logger, "warning_once", said.append)
    model = tiny_vision.build("llava")
    vision = tf.CLIPImageProcessor(size={"height": 28, "width": 28}, do_center_crop=False)
    processor = tf.LlavaProcessor(
        vision, tokenizer, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        image_token=tokenizer.decode([60]),
    )  # fmt: skip
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (28, 28, 3), dtype=np.uint8))
    text = tokenizer.decode([60]) + "hello there"
    answers = []
    for draft in (None, fresh_draft(model)):
        pipe = pipeline("image-text-to-text", model, processor=processor, assistant_model=draft)
        torch.manual_seed(5)
        answers.append(pipe(image, text=text, do_sample=True, top_k=0, max_new_tokens=16))
    assert answers[0] == answers[1] and not said


def test_an_image_without_the_tokens_for_it_is_the_models_own_error():
    model, inputs = tiny_vision.build("llava"), tiny_vision.inputs("llava", (1,))
    inputs["input_ids"] = inputs["input_ids"].clamp(max=59)
    errors = []
    for assistant in (None, fresh_draft(model)):
        with pytest.raises(ValueError) as error:
            model.generate(**inputs, assistant_model=assistant, max_new_tokens=4)
        errors.append(str(error.value))
    assert errors[0] == errors[1]


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava", "qwen3_5"])
def test_a_draft_is_made_trained_and_loaded_with_such_a_target(name, tokenizer, tmp_path):
    """On text, by the commands, which load the target as a model that sees where it is no other."""
    model = tiny_vision.build(name)
    files = write_files(tmp_path, model, tokenizer)
    options = "--steps 3 --batch-rows 2 --warmup-steps 1 --validate-tokens 40"
    assert main(["train", *files, "--output", str(tmp_path / "draft"), *options.split()]) == 0
    target, _, draft = FSPADDraftModel.load_pair(tmp_path / "draft", target=tmp_path / "target")
    inputs = tiny_vision.inputs(name, (1,))
    if type(target) is not type(model):  # its text model alone, which transformers has for some
        inputs = {key: value for key, value in inputs.items() if key in ("input_ids", "attention_mask")}
    kwargs = {**inputs, "max_new_tokens": 12, "pad_token_id": 0, "eos_token_id": None}
    fast = target.generate(**kwargs, assistant_model=draft, return_dict_in_generate=True)
    assert fast.speculation.rounds and fast.sequences.tolist() == target.generate(**kwargs).tolist()


def test_a_draft_of_another_vocabulary_is_refused():
    model = tiny_vision.build("llava")
    draft = FSPADDraftModel.from_target(tiny.build("llama"))
    draft.config.vocab_size = 80
    with pytest.raises(ValueError, match=r"its vocab_size is 80, the target's 64; pass a draft"):
        model.generate(**tiny_vision.inputs("llava", (1,)), assistant_model=draft, max_new_tokens=4)


def test_a_probe_that_raises_is_one_warning(monkeypatch):
    said, model = [], tiny_vision.build("llava")
    monkeypatch.setattr(hook.logger, "warning_once", said.append)
    forward = type(model).forward

    @functools.wraps(forward)
    def picky(self, *args, **kwargs):
        if kwargs["input_ids"].shape[1] in (3, 4):
            raise RuntimeError("no tokens without an image")
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", picky)
    kwargs = {**tiny_vision.inputs("llava", (1,)), "max_new_tokens": 9, "pad_token_id": 0}
    fast = model.generate(**kwargs, assistant_model=fresh_draft(model))
    assert fast.tolist() == model.generate(**kwargs).tolist()
    assert len(said) == 1 and "RuntimeError on a trial tree: no tokens without an image" in said[0]
