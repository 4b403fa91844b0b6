"""What cannot be converted is one clear error, before anything is written; embeddings are compared."""

import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

import fspad_hf_cli as cli
from fspad_hf.conversion import convert_checkpoint
from fspad_hf.conversion import weights as weights_module

from .. import tiny
from . import reference


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    folder = tmp_path_factory.mktemp("target")
    tiny.build("llama").save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def embedding(target):
    return load_file(target / "model.safetensors")["model.embed_tokens.weight"]


@pytest.fixture
def refused(target, tmp_path):
    """`refused(weights, words)`: the conversion raises exactly that and writes nothing."""

    def check(weights, words, layout="vicuna", config=None):
        checkpoint = tmp_path / "checkpoint"
        reference.write(checkpoint, layout, weights)
        if config is not None:
            (checkpoint / "config.json").write_text(json.dumps({**reference.config_of(layout), **config}))
        with pytest.raises(ValueError, match=words):
            convert_checkpoint(checkpoint, target, tmp_path / "draft")
        assert not (tmp_path / "draft").exists()

    return check


EAGLE3 = {  # eagle/model/cnets.py
    "midlayer.self_attn.q_proj.weight": torch.ones(32, 64),
    "midlayer.hidden_norm.weight": torch.ones(32),
    "norm.weight": torch.ones(32),
    "lm_head.weight": torch.ones(16, 32),
    "fc.weight": torch.ones(32, 96),
    "d2t": torch.ones(16, dtype=torch.int64),
    "t2d": torch.ones(64, dtype=torch.bool),
}


@pytest.mark.parametrize(
    ("weights", "mark"),
    [
        (EAGLE3, "d2t"),
        ({"fc.weight": EAGLE3["fc.weight"]}, r"fc\.weight of shape \[32, 96\]"),
        ({"layers.0.hidden_norm.weight": torch.ones(32)}, "hidden_norm"),  # as speculators saves it
    ],
)
def test_eagle3_is_another_kind(refused, weights, mark):
    refused(weights, f"EAGLE-3 draft .*{mark}.*would need another network.*fspad-hf train")


def test_missing_and_unknown_names_are_named_together(refused):
    weights = reference.weights_of("vicuna")
    del weights["layers.0.mlp.up_proj.weight"]
    weights["layers.0.input_layernorm.weight"] = torch.ones(32)
    weights["layers.1.mlp.up_proj.weight"] = torch.ones(40, 32)
    refused(
        weights,
        r"lacks \['layers.0.mlp.up_proj.weight'\] and has the unknown "
        r"\['layers.0.input_layernorm.weight', 'layers.1.mlp.up_proj.weight'\]",
    )


def test_half_of_the_attention_biases(refused):
    weights = reference.weights_of("qwen2")
    del weights["layers.0.self_attn.k_proj.bias"]
    refused(weights, r"lacks \['layers.0.self_attn.k_proj.bias'\]", "qwen2")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"hidden_size": 48}, "hidden_size=48, the LM head of .* reads 32"),
        ({"num_hidden_layers": 2}, "num_hidden_layers=2: expected a draft of one layer"),
        ({"num_key_value_heads": 2}, r"k_proj.weight is \[32, 32\], expected \[16, 32\]; .*v_proj"),
        ({"num_key_value_heads": 3}, "describes no draft: .*num_attention_heads=4"),
        ({"intermediate_size": 41}, r"gate_proj.weight is \[40, 32\], expected \[41, 32\]"),
    ],
)
def test_a_config_that_does_not_fit(refused, config, words):
    refused(reference.weights_of("vicuna"), words, config=config)


def test_an_embedding_of_another_vocabulary_is_another_target(refused):
    refused(reference.weights_of("vicuna", torch.ones(65, 32)), r"embed_tokens.weight is \[65, 32\], .* \[64, 32\]")


@pytest.mark.parametrize("rows", [1, 4096])
def test_an_embedding_that_differs(target, tmp_path, embedding, rows, monkeypatch):
    monkeypatch.setattr("fspad_hf.conversion.convert.ROWS", rows)
    embedding[[3, 40, 63], 5] += 0.25
    checkpoint = reference.write(tmp_path / "c", "vicuna", reference.weights_of("vicuna", embedding))
    words = r"not that of .*: 3 of 64 rows differ, by up to 0.25\."
    with pytest.raises(ValueError, match=words):
        convert_checkpoint(checkpoint, target, tmp_path / "draft", strict=True)
    assert not (tmp_path / "draft").exists()
    with pytest.warns(UserWarning, match=words):
        done = convert_checkpoint(checkpoint, target, tmp_path / "draft")
    assert len(done.remarks) == 1 and (tmp_path / "draft" / "model.safetensors").exists()
    assert not any("embed" in name for name in load_file(tmp_path / "draft" / "model.safetensors"))


def test_an_embedding_rounded_to_the_drafts_dtype_is_the_same(target, tmp_path, embedding):
    weights = {k: v.half() for k, v in reference.weights_of("vicuna", embedding).items()}
    checkpoint = reference.write(tmp_path / "checkpoint", "vicuna", weights)
    assert convert_checkpoint(checkpoint, target, tmp_path / "draft", strict=True).remarks == ()


def test_of_the_target_only_the_embedding_is_read(target, tmp_path, embedding, monkeypatch):
    read = []
    rows = weights_module.StoredWeights.rows
    monkeypatch.setattr(
        weights_module.StoredWeights,
        "rows",
        lambda self, name, *a: read.append((self.repo, name)) or rows(self, name, *a),
    )
    tensor = weights_module.StoredWeights.tensor
    monkeypatch.setattr(
        weights_module.StoredWeights, "tensor", lambda self, name: read.append((self.repo, name)) or tensor(self, name)
    )
    checkpoint = reference.write(tmp_path / "checkpoint", "vicuna", reference.weights_of("vicuna", embedding))
    convert_checkpoint(checkpoint, target, tmp_path / "draft")
    assert {name for repo, name in read if repo == str(target)} == {"model.embed_tokens.weight"}


def test_a_target_without_readable_weights(target, tmp_path, embedding):
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((target / "config.json").read_bytes())
    checkpoint = reference.write(tmp_path / "checkpoint", "vicuna", reference.weights_of("vicuna", embedding))
    with pytest.raises(ValueError, match=r"was not compared .*has no model.safetensors"):
        convert_checkpoint(checkpoint, bare, tmp_path / "draft", strict=True)
    with pytest.warns(UserWarning) as caught:
        convert_checkpoint(checkpoint, bare, tmp_path / "draft")
    assert [str(w.message).split(":")[0] for w in caught] == [
        f"No tokenizer found at the target {str(bare)!r}",
        "The checkpoint's embedding was not compared with the target's",
    ]
    save_file({"wte.weight": embedding}, bare / "model.safetensors")
    with pytest.warns(UserWarning, match=r"no embedding found among the weights"):
        convert_checkpoint(checkpoint, bare, tmp_path / "draft")
    save_file({"language_model.embed_tokens.weight": embedding}, bare / "model.safetensors")
    assert convert_checkpoint(checkpoint, bare, tmp_path / "draft", strict=True).remarks == ()


def test_places(target, tmp_path):
    weights = reference.weights_of("vicuna")
    checkpoint = tmp_path / "checkpoint"
    reference.write(checkpoint, "vicuna", weights)
    (tmp_path / "file").write_text("")
    for output, words in (
        (tmp_path / "file", "is a file"),
        (checkpoint, "checkpoint's own folder"),
        (target, "target's own folder"),
    ):
        with pytest.raises(ValueError, match=words):
            convert_checkpoint(checkpoint, target, output)
    with pytest.raises(FileNotFoundError, match=r"has no config.json"):
        convert_checkpoint(tmp_path, target, tmp_path / "draft")
    (checkpoint / "model.safetensors").rename(checkpoint / "weights.safetensors")
    with pytest.raises(FileNotFoundError, match=r"has no weights: expected model.safetensors"):
        convert_checkpoint(checkpoint, target, tmp_path / "draft", allow_pickle=True)
    (checkpoint / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    with pytest.raises(OSError, match=r"is damaged or incomplete"):
        convert_checkpoint(checkpoint, target, tmp_path / "draft")
    (checkpoint / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"is not JSON"):
        convert_checkpoint(checkpoint, target, tmp_path / "draft")


def test_a_missing_shard_is_named(target, tmp_path):
    checkpoint = reference.write(tmp_path / "c", "vicuna", reference.weights_of("vicuna"), "safetensors sharded")
    (tmp_path / "c" / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks model-00002-of-00002.safetensors"):
        convert_checkpoint(checkpoint, target, tmp_path / "draft")


class Boom:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code in a pickle ran')",))


@pytest.mark.parametrize("kind", ["code", "module", "nothing"])
def test_a_pickle_of_anything_but_tensors_is_refused(target, tmp_path, kind):
    checkpoint = tmp_path / "checkpoint"
    reference.write(checkpoint, "vicuna", {}, "bin")
    path = checkpoint / "pytorch_model.bin"
    if kind == "code":
        path.write_bytes(pickle.dumps(Boom()))
    else:
        torch.save(torch.nn.Linear(2, 2) if kind == "module" else [1, 2], path)
    with pytest.raises((OSError, ValueError), match=r"holds no state dict|cannot be read as plain tensors") as refused:
        convert_checkpoint(checkpoint, target, tmp_path / "draft", allow_pickle=True)
    assert "weights_only" not in str(refused.value)  # no advice on how to run it


def test_the_command(target, tmp_path, embedding, capsys):
    embedding[0] += 1
    checkpoint = reference.write(tmp_path / "checkpoint", "qwen2", reference.weights_of("qwen2", embedding), "bin")
    arguments = ["convert", checkpoint, "--target", str(target), "--output", str(tmp_path / "draft")]
    assert cli.main(arguments) == 2
    assert "--allow-pickle" in capsys.readouterr().err and not (tmp_path / "draft").exists()
    assert cli.main([*arguments, "--allow-pickle", "--strict"]) == 2
    assert "1 of 64 rows differ" in capsys.readouterr().err and not (tmp_path / "draft").exists()
    assert cli.main([*arguments, "--allow-pickle", "--target-name", "me/target"]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith(
        "EAGLE / EAGLE-2: feature_sampling=False, partial_alignment=False, fc_bias=True, attention_bias=True;"
    )
    assert printed.err.startswith("fspad-hf: warning: The checkpoint's embedding is not that of")
    assert json.loads((tmp_path / "draft" / "config.json").read_text())["target_name_or_path"] == "me/target"
