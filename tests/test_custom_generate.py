"""The exported repository, loaded by transformers from a folder as it would be from the Hub."""

import copy
import functools
import importlib.metadata

import pytest
import torch
import transformers.dynamic_module_utils
from transformers.generation.streamers import BaseStreamer

import fspad_hf
import fspad_hf_cli as cli
from fspad_hf import install, uninstall

from . import tiny
from .conftest import fresh_draft

SAMPLED = {"do_sample": True, "temperature": 0.9, "top_k": 20}


class Collector(BaseStreamer):
    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens += value.reshape(-1).tolist()

    def end(self):
        self.ended = True


@pytest.fixture(autouse=True)
def modules_cache(tmp_path, monkeypatch):
    """transformers copies remote code to a folder of its own and imports it from there."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))


@pytest.fixture(autouse=True)
def distribution(tmp_path_factory, monkeypatch):
    """transformers checks the requirements by the installed distributions; a source tree on the path is none."""
    try:
        importlib.metadata.version("fspad_hf")
    except importlib.metadata.PackageNotFoundError:
        site = tmp_path_factory.mktemp("site")
        metadata = site / f"fspad_hf-{fspad_hf.__version__}.dist-info" / "METADATA"
        metadata.parent.mkdir()
        metadata.write_text(f"Metadata-Version: 2.1\nName: fspad_hf\nVersion: {fspad_hf.__version__}\n")
        monkeypatch.syspath_prepend(site)


@pytest.fixture
def repository(tmp_path, capsys):
    assert cli.main(["export-custom-generate", str(tmp_path / "fspad-generate")]) == 0
    assert str(tmp_path / "fspad-generate") in capsys.readouterr().out
    return tmp_path / "fspad-generate"


@pytest.fixture
def model():
    return tiny.build("llama")


def test_the_folder(repository):
    files = {str(path.relative_to(repository)) for path in repository.rglob("*") if path.is_file()}
    assert files == {"README.md", "custom_generate/generate.py", "custom_generate/requirements.txt"}
    assert (repository / "custom_generate/requirements.txt").read_text() == f"fspad_hf>={fspad_hf.__version__}\n"
    front = (repository / "README.md").read_text().split("---")[1]
    assert "\n- custom_generate\n" in front and "library_name: transformers" in front


@pytest.mark.parametrize("kwargs", [{"do_sample": False}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("how", ["draft", "path"])
def test_it_is_plain_generate_with_speculation(repository, model, prompt, tmp_path, tokenizer, kwargs, how):
    draft = fresh_draft(model)
    if how == "path":
        draft.save_pretrained(tmp_path / "draft", tokenizer=tokenizer)
        draft = str(tmp_path / "draft")
    kwargs = {**kwargs, "max_new_tokens": 24, "eos_token_id": None, "return_dict_in_generate": True}
    torch.manual_seed(5)
    plain = model.generate(prompt, **kwargs)
    state = torch.get_rng_state()
    streamer = Collector()
    torch.manual_seed(5)
    fast = model.generate(
        prompt, **kwargs, streamer=streamer, assistant_model=draft,
        custom_generate=str(repository), trust_remote_code=True,
    )  # fmt: skip
    assert fast.sequences.tolist() == plain.sequences.tolist()
    assert fast.speculation is not None and fast.speculation.rounds > 0
    assert torch.equal(torch.get_rng_state(), state)
    assert streamer.tokens == plain.sequences[0].tolist() and streamer.ended


def test_a_named_draft_is_loaded_once(repository, model, prompt, tmp_path, tokenizer, monkeypatch):
    fresh_draft(model).save_pretrained(tmp_path / "draft", tokenizer=tokenizer)
    loaded = []
    load = fspad_hf.FSPADDraftModel.from_pretrained.__func__
    monkeypatch.setattr(
        fspad_hf.FSPADDraftModel,
        "from_pretrained",
        classmethod(lambda cls, *a, **k: loaded.append(load(cls, *a, **k)) or loaded[-1]),
    )
    call = functools.partial(
        model.generate, prompt, max_new_tokens=4, custom_generate=str(repository), trust_remote_code=True,
        assistant_model=str(tmp_path / "draft"),
    )  # fmt: skip
    assert call().tolist() == call().tolist() and len(loaded) == 1
    model.double()
    call()
    assert [draft.dtype for draft in loaded] == [torch.float32, torch.float64]
    copy.deepcopy(model).save_pretrained(tmp_path / "saved")  # what is kept does not get in the way


def test_a_target_whose_own_repository_has_it(repository, model, prompt):
    """`from_pretrained` then replaces `model.generate` by the repository's function."""
    draft = fresh_draft(model)
    plain = model.generate(prompt, max_new_tokens=8)
    model.generate = functools.partial(
        model.load_custom_generate(str(repository), trust_remote_code=True), model=model
    )
    assert model.generate(inputs=prompt, max_new_tokens=8, assistant_model=draft).tolist() == plain.tolist()


def test_it_works_after_uninstall(repository, model, prompt):
    draft = fresh_draft(model)
    uninstall()
    try:
        output = model.generate(
            prompt, max_new_tokens=8, assistant_model=draft, custom_generate=str(repository), trust_remote_code=True,
            return_dict_in_generate=True,
        )  # fmt: skip
        assert output.speculation is not None
    finally:
        install()


@pytest.mark.parametrize("given", [None, 3])
def test_without_a_draft_it_is_one_clear_error(repository, model, prompt, given):
    with pytest.raises(ValueError, match=rf"assistant_model={type(given).__name__} is no FSPAD draft: pass"):
        model.generate(prompt, custom_generate=str(repository), trust_remote_code=True, assistant_model=given)
    with pytest.raises(ValueError, match="trust_remote_code"):
        model.generate(prompt, custom_generate=str(repository), trust_remote_code=False, assistant_model=given)


def test_a_file_in_the_way(tmp_path, capsys):
    (tmp_path / "custom_generate").write_text("")
    for place in (tmp_path, tmp_path / "custom_generate"):
        assert cli.main(["export-custom-generate", str(place)]) == 2
        assert "is a file" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["custom_generate"]
