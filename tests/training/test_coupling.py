import json

import numpy as np
import pytest
import torch

from fspad_hf import FSPADConfig
from fspad_hf.demo_target import released_draft
from fspad_hf.training import coupling
from fspad_hf.training.coupling import fit_coupling
from fspad_hf_cli import main

from ..conftest import fresh_draft


def given(monkeypatch, draft, factor, noise=0.0):
    """Fits a draft whose log-probabilities are the target's over `factor`, plus noise."""

    def distributions(*_):
        with torch.random.fork_rng():
            torch.manual_seed(7)
            for _ in range(8):
                logits = 3 * torch.randn(500, 64)
                wrong = logits / factor + noise * torch.randn(500, 64)
                wrong = wrong if draft.draft_vocab_ids is None else wrong[:, draft.draft_vocab_ids]
                yield logits.softmax(-1), wrong.log_softmax(-1)

    monkeypatch.setattr(coupling, "_distributions", distributions)
    return fit_coupling(draft, None, torch.zeros(1, 8), torch.ones(1, 8, dtype=torch.bool))


def test_a_draft_that_is_the_target_is_trusted(llama, monkeypatch):
    draft = fresh_draft(llama)
    fitted = given(monkeypatch, draft, factor=1.0)
    assert fitted["sharpness"] == 1.0 and fitted["kappa"] == max(coupling.KAPPA) and fitted["hit"] == 1.0
    assert fitted["hit_uncoupled"] < 0.9 and fitted["positions"] == 4000


def test_a_flat_draft_is_sharpened(llama, monkeypatch):
    draft = fresh_draft(llama)
    fitted = given(monkeypatch, draft, factor=2.0)
    assert fitted["sharpness"] == 2.0 and fitted["hit"] == 1.0 > fitted["hit_before"]
    assert (
        draft.speculation_config.coupling_sharpness == 2.0
        and draft.speculation_config.coupling_kappa == fitted["kappa"]
    )


def test_an_unreliable_draft_is_believed_less(llama, monkeypatch):
    kappas = [given(monkeypatch, fresh_draft(llama), 1.0, noise)["kappa"] for noise in (1.0, 3.0)]
    assert max(coupling.KAPPA) > kappas[0] > kappas[1]


def test_a_token_that_is_not_drafted_is_a_miss(llama, monkeypatch):
    draft = fresh_draft(llama, draft_vocab_size=16)
    fitted = given(monkeypatch, draft, factor=1.0)
    assert fitted["sharpness"] == 1.0 and 0.1 < fitted["hit"] < 0.4


@pytest.mark.parametrize("drafted", [None, 32])
def test_the_distributions_are_those_that_decoding_sees(llama, drafted):
    """Position by position against plain forwards: p of the target, and q of the draft on its true features."""
    draft = fresh_draft(llama, draft_vocab_size=drafted)
    rows = torch.randint(3, 64, (3, 20), generator=torch.Generator().manual_seed(0))
    masks = torch.zeros_like(rows, dtype=torch.bool)
    masks[0, 5:9] = masks[2, 12:] = True
    seen = list(coupling._distributions(draft, llama, rows, masks, stride=1))
    assert [len(p) for p, _ in seen] == [4, 8]
    for row, positions, (p, q) in zip((0, 2), (range(5, 9), range(12, 20)), seen, strict=True):
        hidden = llama.model(rows[row : row + 1]).last_hidden_state
        out = draft(llama.get_input_embeddings()(rows[row : row + 1, 1:]), hidden[:, :-1])
        for i, position in enumerate(positions):
            truth = llama(rows[row : row + 1, :position]).logits[0, -1].softmax(-1)
            torch.testing.assert_close(p[i], truth)
            logits = llama.lm_head(out.logit_features[0, position - 2])
            logits = logits if drafted is None else logits[draft.draft_vocab_ids]
            torch.testing.assert_close(q[i], logits.log_softmax(-1))


def test_few_rows_of_a_large_vocabulary_are_held_at_once(llama, monkeypatch):
    monkeypatch.setattr(coupling, "LOGITS_AT_ONCE", 64 * 5)
    rows, masks = torch.randint(3, 64, (2, 30)), torch.ones(2, 30, dtype=torch.bool)
    seen = [len(p) for p, _ in coupling._distributions(fresh_draft(llama), llama, rows, masks, stride=1)]
    assert seen == [5, 5]


def test_nothing_to_fit_on(llama):
    with pytest.raises(ValueError, match="without a token"):
        fit_coupling(fresh_draft(llama), llama, torch.ones(2, 9).long(), torch.zeros(2, 9, dtype=torch.bool))


@pytest.fixture
def files(llama, tokenizer, tmp_path):
    """The command's arguments, for a draft in tmp_path/draft."""
    target, rows = tmp_path / "target", tokenizer("<u>what|<a>the answer to that is no.>|").input_ids
    llama.save_pretrained(target), tokenizer.save_pretrained(target)
    draft = fresh_draft(llama, coupling_sharpness=2.5, coupling_kappa=4.0)  # far too sure of itself
    draft.save_pretrained(tmp_path / "draft", tokenizer=tokenizer)
    np.save(tmp_path / "rows.npy", np.tile(rows, (4, 1)).astype(np.uint16))
    options = {"--target": target, "--draft": tmp_path / "draft", "--data": tmp_path / "rows.npy", "--device": "cpu"}
    return ["calibrate", *(str(word) for option in options.items() for word in option)]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_command_rewrites_the_settings_alone(files, tmp_path, capsys):
    folder, before = tmp_path / "draft", contents(tmp_path / "draft")
    assert main(files) == 0 and ": written\n" in capsys.readouterr().out
    after = contents(folder)
    assert [name for name in before if before[name] != after[name]] == ["speculation_config.json"]
    config = json.loads(after["speculation_config.json"])
    assert (config["coupling_sharpness"], config["coupling_kappa"]) != (2.5, 4.0)
    assert {k: v for k, v in config.items() if "coupling" not in k} == {
        k: v for k, v in json.loads(before["speculation_config.json"]).items() if "coupling" not in k
    }
    assert FSPADConfig.from_pretrained(folder).architectures == ["FSPADDraftModel", "AutoModelForCausalLM"]
    assert main([*files, "--data", str(tmp_path / "none.npy")]) == 2
    assert "none.npy" in capsys.readouterr().err


def test_values_that_are_no_gain_are_not_written(files, tmp_path, capsys):
    assert main(files) == 0
    capsys.readouterr()
    before = contents(tmp_path / "draft")
    assert main(files) == 0 and contents(tmp_path / "draft") == before
    assert "left as it is, no gain over its sharpness" in capsys.readouterr().out
    assert main([*files, "--rows", "1"]) == 2 and "rows=1" in capsys.readouterr().err


def test_a_gain_is_one_on_other_rows(llama, monkeypatch):
    """Values for another draft are a gain to replace; to replace the fitted ones again is none."""
    draft = fresh_draft(llama)
    first = given(monkeypatch, draft, factor=2.0)
    again = given(monkeypatch, draft, factor=2.0)
    assert first["gain"] > first["gain_error"] > 0 and again["gain"] <= again["gain_error"]


def test_the_draft_of_the_package_is_left_alone(files, capsys):
    with pytest.raises(SystemExit):
        main([word for word in files if word != "--draft" and not word.endswith("draft")])
    assert "required: --draft" in capsys.readouterr().err
    draft = released_draft()
    before = contents(draft)
    assert main([*files, "--draft", str(draft)]) == 2 and contents(draft) == before
    assert "copy it (cp -r" in capsys.readouterr().err
