"""Defects around a draft that an adversarial run has found, by their reproductions."""

import json
import pickle
import tempfile
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    ContinuousBatchingConfig,
    GenerationMixin,
    pipeline,
    pipelines,
)

import fspad_hf
from fspad_hf import FSPADConfig, FSPADDraftModel, custom_generate, hub

from . import tiny
from .conftest import fresh_draft

KWARGS = {"max_new_tokens": 20, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture
def model():
    return tiny.build("llama")


@pytest.fixture
def folder(model, tmp_path, tokenizer):
    fresh_draft(model).save_pretrained(tmp_path / "draft", tokenizer=tokenizer)
    return tmp_path / "draft"


@pytest.fixture
def loaded(monkeypatch):
    """The drafts that were loaded."""
    made, load = [], FSPADDraftModel.from_pretrained.__func__
    monkeypatch.setattr(
        FSPADDraftModel, "from_pretrained", classmethod(lambda *a, **k: made.append(load(*a, **k)) or made[-1])
    )
    return made


def speculated(model, ids, draft, **kwargs):
    """That plain decoding and decoding with the draft agree, and that it was used."""
    plain = model.generate(input_ids=ids, **KWARGS, **kwargs)
    fast = model.generate(input_ids=ids, assistant_model=draft, return_dict_in_generate=True, **KWARGS, **kwargs)
    return fast.sequences.equal(plain) and fast.speculation is not None


class TestAName:
    """`assistant_model="path/or/hub-id"`, as pipelines take it."""

    @pytest.mark.parametrize("kind", [str, lambda folder: folder])
    def test_it_is_loaded_once_and_kept_on_our_side(self, model, folder, prompt, loaded, kind):
        before = set(vars(model))
        assert speculated(model, prompt, kind(folder)) and speculated(model, prompt, kind(folder))
        assert len(loaded) == 1 and not loaded[0].training
        assert set(vars(model)) == before and b"fspad" not in pickle.dumps(model)
        model.double()
        assert speculated(model, prompt, kind(folder))
        assert [draft.dtype for draft in loaded] == [torch.float32, torch.float64]

    @pytest.mark.parametrize("name", ["target", "nowhere/to-be-found", "empty", "a bad/name/"])
    def test_of_anything_else_is_one_error(self, model, prompt, tmp_path, monkeypatch, name):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        model.save_pretrained(tmp_path / "target")
        (tmp_path / "empty").mkdir()
        with pytest.raises(
            ValueError, match=rf"assistant_model='{name}' .*expected a model object, or the path or Hub"
        ):
            model.generate(prompt, assistant_model=name)

    def test_weights_that_are_damaged_say_so(self, model, prompt, folder):
        (folder / "model.safetensors").write_bytes(b"no weights")
        with pytest.raises(OSError, match="damaged"):
            model.generate(prompt, assistant_model=str(folder))

    def test_custom_generate_leaves_nothing_on_the_target(self, model, prompt, folder, loaded):
        before = set(vars(model))
        for _ in range(2):
            custom_generate.generate(model, str(folder), inputs=prompt, **KWARGS)
        assert set(vars(model)) == before and len(loaded) == 1
        pickle.loads(pickle.dumps(model))

    def test_uninstall_undoes_it(self, model, prompt, folder):
        fspad_hf.uninstall()
        try:
            for function in (GenerationMixin.generate, pipelines.base.load_assistant_model):
                assert "fspad" not in function.__code__.co_filename
            with pytest.raises(AttributeError):
                model.generate(prompt, assistant_model=str(folder))
        finally:
            fspad_hf.install()
        assert speculated(model, prompt, str(folder))


@pytest.mark.parametrize("how", ["object", "compiled", "string"])
def test_a_pipeline_whose_target_pads_otherwise(model, folder, tokenizer, how):
    draft = fresh_draft(model)
    model.config.pad_token_id = 5
    draft = {"object": draft, "compiled": torch.compile(draft), "string": str(folder)}[how]
    texts = [
        pipeline("text-generation", model=model, tokenizer=tokenizer, assistant_model=assistant)(
            "abcab", max_new_tokens=12, do_sample=False
        )
        for assistant in (None, draft)
    ]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("how", ["object", "string"])
def test_continuous_batching_goes_without_a_draft(model, folder, prompt, how):
    draft = fresh_draft(model) if how == "object" else str(folder)
    small = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)  # by default most of the memory
    paged = {"cache_implementation": "paged", "continuous_batching_config": small, "do_sample": False, **KWARGS}
    plain, fast = (model.generate(prompt, assistant_model=assistant, **paged) for assistant in (None, draft))
    assert fast.equal(plain)


def test_a_compiled_draft(model, prompt):
    assert speculated(model, prompt, torch.compile(fresh_draft(model), backend="eager"))
    in_place = fresh_draft(model)
    in_place.compile(backend="eager")
    assert speculated(model, prompt, in_place)
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_key_value_heads": 0}, "num_key_value_heads=0 must be at least 1"),
        ({"hidden_act": "nope"}, "hidden_act='nope' is unknown: expected"),
        ({"rope_parameters": {"rope_type": "nope"}}, r"rope_type='nope' .*expected one of \['default', "),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "Missing required keys"),
        ({"quantization_config": {"quant_method": "nope"}}, "quantization_config=.*expected none"),
        ({"model_type": None}, "no config.json that names a model_type"),
        (["a list"], r"config.json' holds \[\"a list\"\]: expected a JSON object"),
    ],
)
def test_a_config_that_makes_no_draft(folder, fields, words):
    told = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(told | fields if isinstance(fields, dict) else fields))
    for load in (FSPADDraftModel.from_pretrained, FSPADDraftModel.load_pair):
        with pytest.raises(ValueError, match=words) as error:
            load(folder)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("ids", [[3, 5, 64, 7], [3, 5, -1, 7], [3, 5, 5, 7]])
def test_ids_that_the_target_lacks(model, tmp_path, tokenizer, ids):
    draft = fresh_draft(model, draft_vocab_size=4)
    draft.draft_vocab_ids = torch.tensor(ids)
    draft.save_pretrained(tmp_path, tokenizer=tokenizer)
    for load in (FSPADDraftModel.from_pretrained, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(
            ValueError, match=rf"model.safetensors of '{tmp_path}' hold {ids[2]}: expected 4 different"
        ):
            load(tmp_path)


@pytest.mark.parametrize(
    "how",
    [
        {"target_modules": ["embed_tokens", "q_proj", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]},
    ],
)
def test_adapters_on_the_embedding(prompt, how):
    peft = pytest.importorskip("peft")
    model = tiny.build("llama")
    tuned = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **how)).eval()
    draft = fresh_draft(tuned)
    assert draft.config.hidden_size == 32
    assert speculated(tuned, prompt, draft)


class TestSaving:
    def test_the_parent_need_not_be_writable(self, model, tmp_path, tokenizer, monkeypatch):
        """As a mounted volume's is not; the tests may run as one who may write anywhere."""
        made, make = [], tempfile.mkdtemp
        monkeypatch.setattr(tempfile, "mkdtemp", lambda *a, **k: made.append(make(*a, **k)) or made[-1])
        (tmp_path / "volume").mkdir()
        fresh_draft(model).save_pretrained(tmp_path / "volume", tokenizer=tokenizer)
        assert made and {Path(folder).parent for folder in made} == {tmp_path / "volume"}
        assert [path.name for path in tmp_path.rglob(".*")] == []
        fresh_draft(model).save_pretrained(tmp_path / "volume", tokenizer=tokenizer, max_shard_size="20KB")
        assert not (tmp_path / "volume" / "model.safetensors").exists()
        FSPADDraftModel.from_pretrained(tmp_path / "volume")

    def test_what_a_killed_save_left_is_ignored(self, model, folder, tokenizer):
        left = folder / ".partial-abc"
        left.mkdir()
        for name in ("model.safetensors", "model-00001-of-00002.safetensors", "tokenizer.json", "config.json"):
            (left / name).write_text("cut sho")
        FSPADDraftModel.from_pretrained(folder)
        AutoTokenizer.from_pretrained(folder)
        added = {operation.path_in_repo for operation in hub._operations(folder, set(), "user/target")}
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= added
        assert not [name for name in added if "partial" in name]
        fresh_draft(model).save_pretrained(folder, tokenizer=tokenizer)
        FSPADDraftModel.from_pretrained(folder)


class TestRemoteCode:
    """Of a repository that only the draft's config names: neither run nor asked about."""

    @pytest.fixture
    def remote(self, tmp_path, monkeypatch):
        asked = []
        monkeypatch.setattr("builtins.input", lambda prompt="": asked.append(prompt) or "y")
        remote, ran = tmp_path / "remote", tmp_path / "ran"
        remote.mkdir()
        auto = {"AutoConfig": "code.C", "AutoTokenizer": ["code.T", None], "AutoModelForCausalLM": "code.M"}
        (remote / "config.json").write_text(json.dumps({"model_type": "unheard_of", "auto_map": auto}))
        (remote / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T", "auto_map": auto}))
        (remote / "code.py").write_text(f"open({str(ran)!r}, 'w')\n")
        yield remote
        assert not asked and not ran.exists()

    def test_in_saving(self, model, remote, tmp_path):
        draft = fresh_draft(model, target_name_or_path=str(remote))
        with pytest.warns(UserWarning, match="No tokenizer found"):
            draft.save_pretrained(tmp_path / "draft")

    def test_in_loading(self, model, remote, tmp_path, tokenizer, prompt):
        fresh_draft(model, target_name_or_path=str(remote)).save_pretrained(tmp_path / "draft", tokenizer=tokenizer)
        with pytest.raises(ValueError, match="trust_remote_code=True"):
            FSPADDraftModel.load_pair(tmp_path / "draft")
        for load in (FSPADDraftModel.load_pair, FSPADConfig.from_pretrained):
            with pytest.raises(ValueError, match="is a 'unheard_of' model: expected an FSPAD draft"):
                load(remote)
        with pytest.raises(ValueError, match="is a 'unheard_of' model"):
            model.generate(prompt, assistant_model=str(remote))
