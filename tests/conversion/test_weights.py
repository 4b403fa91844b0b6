"""Of a Hub repository no file is downloaded that is not needed."""

from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError

from fspad_hf.conversion import weights as weights_module
from fspad_hf.conversion.weights import StoredWeights, find_file

from . import reference


class Response:
    status_code, headers, request, url, text = 404, {}, None, "", ""


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub with the repositories written below `tmp_path`; gives the names of the files downloaded."""
    downloaded = []

    def hf_hub_download(repo, name):
        path = tmp_path / repo / name
        if not path.is_file():
            raise RemoteEntryNotFoundError("no such file", response=Response())
        downloaded.append(name)
        return str(path)

    monkeypatch.setattr(weights_module, "hf_hub_download", hf_hub_download)
    return downloaded


def test_only_the_shard_that_is_asked_for(hub, tmp_path):
    weights = reference.weights_of("fspad")
    reference.write(tmp_path / "me" / "draft", "fspad", weights, "safetensors sharded")
    stored = StoredWeights("me/draft")
    assert stored.names == set(weights)
    name = list(weights)[1]
    assert torch.equal(stored.rows(name, 2, 5), weights[name][2:5])
    assert set(hub) == {"model.safetensors.index.json", "model-00002-of-00002.safetensors"}


def test_a_pickle_is_not_even_downloaded_without_consent(hub, tmp_path):
    reference.write(tmp_path / "me" / "draft", "fspad", reference.weights_of("fspad"), "bin")
    with pytest.raises(ValueError, match="allow_pickle=True"):
        StoredWeights("me/draft")
    assert hub == []
    assert StoredWeights("me/draft", allow_pickle=True).shape("fc.fc.weight") == (32, 64)


@pytest.mark.parametrize(
    ("repo", "raised", "words"),
    [
        ("me/draft", LocalEntryNotFoundError("offline"), "no folder here, and the Hub cannot be reached"),
        ("no/such/folder", None, "neither a folder here nor a Hub id"),
    ],
)
def test_what_cannot_be_found(monkeypatch, repo, raised, words):
    def hf_hub_download(repo, name):
        raise raised

    if raised is not None:
        monkeypatch.setattr(weights_module, "hf_hub_download", hf_hub_download)
    assert not Path(repo).exists()
    with pytest.raises(OSError, match=words):
        find_file(repo, "config.json")
