"""`fspad-hf train`: its options and files of them, its plan, what it refuses and what it leaves behind."""

import json
import os
import re
import shlex
import signal
import time

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from fspad_hf import FSPADConfig, FSPADDraftModel
from fspad_hf.cards import read_provenance
from fspad_hf.training import callbacks, provenance, run, trainer
from fspad_hf.training.arguments import FSPADTrainingArguments, read_arguments_file
from fspad_hf.training.data import span_mask
from fspad_hf.training.plan import SHOWN
from fspad_hf.training.templates import assistant_span
from fspad_hf_cli import main, make_parser

from ..conftest import fresh_draft
from .runs import all_counted, shown_steps, trained, write_files

OPTIONS = "--max-steps 6 --batch-rows 2 --warmup-steps 2 --eval-tokens 40"


@pytest.fixture(scope="module")
def files(llama, tokenizer, tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("files"), llama, tokenizer)


@pytest.fixture
def command(files, tmp_path):
    return ["train", *files, "--output", str(tmp_path / "draft"), *OPTIONS.split()]


def refused(capsys, arguments, code=2):
    """The one line on stderr of a command that is refused."""
    capsys.readouterr()
    assert main(arguments) == code
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_provenance(command, files, tmp_path, capsys):
    began = time.perf_counter()
    beyond = ["--self-steps", "2", "--self-step-decay", "0.5", "--top-k-weight", "0.3", "--top-k", "5"]
    assert main([*command, "--validate-every", "2", "--schedule", "linear", "--keep-features", *beyond]) == 0
    told = read_provenance(tmp_path / "draft" / "training.json")
    draft = FSPADDraftModel.from_pretrained(tmp_path / "draft")
    assert told["weights_sha256"] == draft.config.weights_sha256 and told["weights_of_step"] == told["best_step"]
    assert told["target"] == "target" and told["data"] == ["ids.npy"] and told["lr_scheduler_type"] == "linear"
    assert (told["rows"], told["held_out_rows"], told["tokens"], told["epochs"]) == (38, 2, 38 * 40, 0.32)
    assert [told[option.strip("-").replace("-", "_")] for option in beyond[::2]] == [2, 0.5, 0.3, 5]
    assert told["validation_tau"] >= 1 and told["best_step"] in (2, 4, 6) and told["final_loss"] > 0
    assert (
        0 < told["seconds"] < time.perf_counter() - began
        and told["torch"] == torch.__version__
        and "tokens/s" not in told
    )
    assert told["parameters"] == sum(p.numel() for p in draft.parameters())
    shown = capsys.readouterr().out
    assert shown_steps(shown)[-1][0] == "6" and shown.count("evaluated at step") == 3
    assert re.search(r"^step 6/6 .*  [\d,]+ tokens/s  0 s left$", shown, re.MULTILINE)
    assert re.search(r"^[\d,]+ tokens/s: .*the draft \d+%", shown, re.MULTILINE)
    assert "what is trained on in green and between [[ and ]]" in shown and "]]" in shown.split("[[ and ]]")[1]
    assert (tmp_path / "draft" / "loss.svg").read_text().count("<path") > 10
    measured = r"tau [\d.]+  tau at T = 1 [\d.]+  first level's best 1, 3, 10:( [\d.]+){3}  accepted by depth:"
    assert (
        len(re.findall(rf"^evaluated at step \d: loss .*  top1 .*  {measured}( [\d.]+)+$", shown, re.MULTILINE)) == 3
    )


@pytest.mark.parametrize("metric", ["tau", "loss"])
def test_the_best_evaluated_weights_are_saved_not_the_last(command, tmp_path, monkeypatch, metric):
    found = {2: {"loss": 1.0, "tau": 1.5}, 4: {"loss": 0.5, "tau": 1.2}, 6: {"loss": 0.7, "tau": 1.4}}
    monkeypatch.setattr(trainer, "validate", lambda *args: found.pop(min(found)))
    assert main([*command, "--eval-steps", "2", "--save-steps", "5", "--best-by", metric]) == 0
    folder, best = tmp_path / "draft", 2 if metric == "tau" else 4
    saved, told = FSPADDraftModel.from_pretrained(folder).state_dict(), read_provenance(folder / "training.json")
    assert (told["best_step"], told["weights_of_step"]) == (best, best)
    assert told["validation_tau"] == (1.5 if metric == "tau" else 1.2)
    kept = {path.name: FSPADDraftModel.from_pretrained(path).state_dict() for path in folder.glob("checkpoint-*")}
    assert sorted(kept) == [f"checkpoint-{best}", "checkpoint-6"]
    assert all(torch.equal(saved[name], kept[f"checkpoint-{best}"][name]) for name in saved)
    assert any(not torch.equal(saved[name], kept["checkpoint-6"][name]) for name in saved)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_saves_first_and_tells_how_to_go_on(command, tmp_path, monkeypatch, capsys, number):
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3, number)
        assert main([*command, "--log-every", "1"]) == 130
    told = capsys.readouterr()
    assert "Interrupted after step 4 of 6" in told.err and "run the same command again" in told.err
    assert signal.getsignal(number) == before and not (tmp_path / "draft" / "model.safetensors").exists()
    assert main([*command, "--log-every", "1"]) == 0
    rest = shown_steps(capsys.readouterr().out)
    assert [line[0] for line in rest] == ["5", "6"]
    whole = [*command, "--log-every", "1", "--output", str(tmp_path / "whole")]
    assert main(whole) == 0
    assert shown_steps(capsys.readouterr().out)[4:] == rest
    states = [last_state(tmp_path / name) for name in ("draft", "whole")]
    steps = [[{k: v for k, v in log.items() if "train_" not in k} for log in state["log_history"]] for state in states]
    assert steps[0] == steps[1] and [log["step"] for log in steps[0]] == [1, 2, 3, 4, 5, 6, 6]
    assert {"loss", "feature", "logit", "top1", "learning_rate"} < steps[0][0].keys() and "eval_loss" in steps[0][6]
    assert f"{steps[0][5]['loss']:.4f}" == rest[1][1]


def interrupt_after(patch, step, number=signal.SIGINT):
    """A signal in the step after this one."""
    shown = callbacks.LogLines.on_log

    def interrupted(self, args, state, control, **kwargs):
        shown(self, args, state, control, **kwargs)
        if state.global_step == step:
            os.kill(os.getpid(), number)

    patch.setattr(callbacks.LogLines, "on_log", interrupted)


def last_state(folder):
    return json.loads((folder / "checkpoint-6" / "trainer_state.json").read_text())


def test_a_tau_that_is_not_known_is_none(command, tmp_path, monkeypatch):
    """Nothing was long enough to simulate: no figure is made up, and the last weights are the ones saved."""
    monkeypatch.setattr(trainer, "validate", lambda *args: {"loss": 1.0})
    assert main([*command, "--eval-steps", "3"]) == 0
    told = read_provenance(tmp_path / "draft" / "training.json")
    assert told["weights_of_step"] == 6 and not {"best_step", "validation_tau"} & told.keys()
    assert not any("eval_tau" in log for log in last_state(tmp_path / "draft")["log_history"])


def test_the_end_names_the_draft_and_commands_that_run(command, files, tmp_path, capsys):
    assert main([*command, "--max-steps", "1"]) == 0
    last = capsys.readouterr().out.splitlines()[-3:]
    assert last[0].startswith(f"The draft is in {tmp_path / 'draft'}.")
    for line, name in zip(last[1:], ("demo", "bench"), strict=True):
        program, *words = shlex.split(line)
        options = vars(make_parser().parse_args(words))
        assert (program, words[0], options["target"]) == ("fspad-hf", name, files[1])
        assert (options.get("draft") or options["drafts"][0]) == str(tmp_path / "draft")


def test_rows_too_few_to_hold_any_out_are_told_once(command, files, tmp_path, capsys):
    np.save(tmp_path / "few.npy", np.load(files[3])[:19])
    assert main([*command, "--data", str(tmp_path / "few.npy"), "--steps", "1"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("Warning: of 19 rows none is held out") == 1 and "Take 20 rows or more" in shown
    assert main([*command, "--steps", "1", "--output", str(tmp_path / "other")]) == 0
    assert "Warning" not in capsys.readouterr().out


def test_an_interrupt_in_the_last_evaluation_is_not_lost(command, tmp_path, monkeypatch, capsys):
    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGINT)
        return {"loss": 1.0, "tau": 1.0}

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "validate", interrupted)
        assert main(command) == 130
    assert not (tmp_path / "draft" / "model.safetensors").exists()
    capsys.readouterr()
    assert main(command) == 0 and not shown_steps(capsys.readouterr().out)  # no step was left to do
    assert read_provenance(tmp_path / "draft" / "training.json")["best_step"] == 6


def test_a_checkpoint_of_another_run_is_refused(command, files, tmp_path, capsys):
    assert main(command) == 0
    said = refused(capsys, [*command, "--learning-rate", "0.01", "--seed", "3"])
    assert "learning_rate 0.001 -> 0.01, seed 0 -> 3)" in said
    rows = np.load(files[3])
    rows[0, 30] += 1
    np.save(tmp_path / "other.npy", rows)
    said = refused(capsys, [*command, "--data", str(tmp_path / "other.npy")])
    assert "(data_sha256 " in said and "learning_rate" not in said
    said = refused(capsys, [*command, "--draft-vocab-size", "40"])
    assert "draft_vocab_size null -> 40)" in said
    assert main([*command, "--micro-rows", "1", "--checkpoint-every", "9"]) == 0


def test_a_loss_that_is_no_number_is_one_line(command, monkeypatch, capsys):
    def spoilt(draft, *args):
        torch.nn.init.constant_(draft.feature_sampler.fc.weight, float("nan"))

    monkeypatch.setattr(trainer, "warm_start", spoilt)
    assert "The largest gradient is nan at step 1: lower learning_rate" in refused(capsys, command)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), provenance.SafetensorError("os error 28")])
def test_a_full_disk_is_one_line(command, tmp_path, monkeypatch, capsys, error):
    """That is full at the second checkpoint, and later at the end."""
    saved = FSPADDraftModel.save_pretrained

    def full(at):
        def save(self, folder, **kwargs):
            saved(self, folder, **kwargs)
            if str(folder).endswith(at):
                raise error

        return save

    with monkeypatch.context() as patch:
        patch.setattr(FSPADDraftModel, "save_pretrained", full("checkpoint-6"))
        said = refused(capsys, [*command, "--save-steps", "3"])
        assert "checkpoint-6' cannot be written" in said and "checkpoint-3' stands. Make room" in said
        assert [path.name for path in (tmp_path / "draft").glob("checkpoint-*")] == ["checkpoint-3"]
        patch.setattr(FSPADDraftModel, "save_pretrained", full("draft"))
        said = refused(capsys, command)
    assert "draft cannot be written to" in said and "the last checkpoint stands" in said
    capsys.readouterr()
    assert main(command) == 0  # the trained weights are there still
    assert not shown_steps(capsys.readouterr().out) and (tmp_path / "draft" / "model.safetensors").exists()


def test_bad_options_are_one_line(command, files, tmp_path, capsys, tokenizer):
    (tmp_path / "file.yaml").write_text("learning-rate: 1e-3\nlerning_rate: 1\nsteps: 3\n")
    said = refused(capsys, [*command, "--config", str(tmp_path / "file.yaml")])
    assert "unknown keys ['lerning_rate']" in said and "'learning_rate'" in said
    for content, expected in {
        "steps: soon": "max_steps='soon': expected a whole number",
        "max_steps: 2.5": "max_steps=2.5: expected a whole number",
        "schedule: step": "step is not a valid SchedulerType",
        "clip_value: 0": "clip_grad_value=0.0: expected more than 0",
        "batch_rows: -1": "batch_rows=-1 cannot be shared by 1 processes",
        "self_steps: 0": "self_steps=0 is too small: expected 1 or more",
        "self_step_decay: 2": "self_step_decay=2.0: expected more than 0, at most 1",
        "top_k_weight: much": "top_k_weight='much': expected a number",
        "linear_start: maybe": "linear_start='maybe': expected true or false",
        "regenerate: maybe": "regenerate='maybe': expected true or false",
        "head_sample: 9": "unknown keys ['head_sample']",
        "- 3": "holds a list",
        "a: [": "neither YAML nor JSON",
    }.items():
        (tmp_path / "file.yaml").write_text(content)
        bare = ["train", *files, "--output", str(tmp_path / "x"), "--config", str(tmp_path / "file.yaml")]
        assert expected in refused(capsys, bare), content
    assert "--data, --output is missing" in refused(capsys, ["train", "--target", "x"])
    assert "paper is not supported" in refused(capsys, [*command, "--report-to", "paper"])
    assert "report_to=['wandb']: WandbCallback requires wandb" in refused(capsys, [*command, "--report-to", "wandb"])
    np.save(tmp_path / "none.npy", np.zeros((0, 40), dtype=np.uint16))
    empty = ["train", *files[:2], "--data", str(tmp_path / "none.npy"), "--output", str(tmp_path / "x")]
    assert "holds no rows" in refused(capsys, empty)
    np.save(tmp_path / "high.npy", np.full((4, 40), 64, dtype=np.uint16))
    empty[4] = str(tmp_path / "high.npy")
    assert "another target's tokenizer" in refused(capsys, empty)
    assert not (tmp_path / "x").exists()


def test_a_file_of_options_gives_way_to_the_command_line(files, tmp_path, capsys):
    options = {"target": files[1], "data": files[3], "output": str(tmp_path / "draft"), "steps": 99, "noise": 0.2}
    (tmp_path / "file.json").write_text(json.dumps(options))
    assert main(["train", "--config", str(tmp_path / "file.json"), "--steps", "7", "--plan", "--optim", "sgd"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert (
        "max_steps 7 " in shown
        and "optim OptimizerNames.SGD" in shown
        and "noise 0.2 " in shown
        and f"data {files[3]} " in shown
    )
    assert not (tmp_path / "draft").exists()
    (tmp_path / "file.yml").write_text("learning-rate: 1e-4\nmicro_rows: 3\nkeep_features: true\nvalidate_every: 9")
    read = read_arguments_file(tmp_path / "file.yml")
    assert read == {
        "learning_rate": 1e-4, "per_device_train_batch_size": 3, "keep_features": True, "eval_steps": 9.0,
    }  # fmt: skip


def test_the_plan_is_the_whole_run_and_writes_nothing(command, files, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "load_target", lambda *args: pytest.fail("read the target's weights"))
    assert main([*command, "--plan", "--rows", "20"]) == 0
    shown = capsys.readouterr().out
    assert [name for name in SHOWN if f"\n{name:<27} " not in shown] == []
    shown = " ".join(shown.split())
    assert "20 of 40 tokens, 2 more held out" in shown and "tokens 800, " in shown and "[[" in shown
    assert "steps 6 of 2 rows, 0.60 epochs" in shown and "parameters, " in shown and not (tmp_path / "draft").exists()


STILL = ["--max-steps", "1", "--learning-rate", "1e-30"]  # leaves the weights as they are


@pytest.fixture
def begun(llama, tokenizer, tmp_path):
    """A draft unlike the fresh ones: of another shape and vocabulary, and made for another target of this width."""
    torch.manual_seed(77)
    draft = FSPADDraftModel.from_target(
        llama, intermediate_size=24, partial_alignment=False, draft_vocab_size=30, tree_depth=3, tree_top_k=4,
        tree_total_nodes=9, coupled_drafting=False, eos_token_id=5, target_name_or_path="org/base",
    )  # fmt: skip
    draft.draft_vocab_ids = torch.arange(1, 60, 2)
    draft.save_pretrained(tmp_path / "begun", tokenizer=tokenizer)
    return tmp_path / "begun"


def test_start_from_begins_with_the_drafts_weights_and_shape(command, files, begun, tmp_path, capsys):
    assert main([*command, *STILL, "--start-from", str(begun)]) == 0
    started, made = (FSPADDraftModel.from_pretrained(path) for path in (begun, tmp_path / "draft"))
    for name, value in started.state_dict().items():
        torch.testing.assert_close(made.state_dict()[name], value, rtol=0, atol=1e-20, msg=name)
    fields = FSPADConfig.__annotations__.keys() - {"weights_sha256"}
    different = {name for name in fields if getattr(started.config, name) != getattr(made.config, name)}
    assert different == {"target_name_or_path", "eos_token_id"}
    assert made.config.target_name_or_path == files[1] and made.config.eos_token_id != 5  # its target's own
    told = read_provenance(tmp_path / "draft" / "training.json")
    assert (told["start_from"], told["start_sha256"]) == ("begun", started.config.weights_sha256)
    assert told["linear_start"] is False
    assert main([*command, *STILL, "--output", str(tmp_path / "fresh")]) == 0
    assert not {"start_from", "start_sha256"} & read_provenance(tmp_path / "fresh" / "training.json").keys()


@pytest.mark.parametrize("count", [30, 20])
def test_start_from_drafts_the_ids_that_this_data_has_if_told(command, files, begun, tmp_path, tokenizer, count):
    options = {"start-from": str(begun), "draft-vocab-size": count}
    (tmp_path / "file.json").write_text(json.dumps(options))
    assert main([*command, *STILL, "--config", str(tmp_path / "file.json")]) == 0
    started, made = (FSPADDraftModel.from_pretrained(path) for path in (begun, tmp_path / "draft"))
    data = torch.from_numpy(np.load(files[3])[:-2].astype(np.int64))
    counts = np.bincount(data[span_mask(data, *assistant_span(tokenizer))].numpy(), minlength=64)
    chosen = np.sort(np.argsort(-counts, kind="stable")[:count])
    assert made.draft_vocab_ids.tolist() == chosen.tolist() != started.draft_vocab_ids.tolist()
    assert made.config.draft_vocab_size == count
    weights = started.feature_sampler.fc.weight
    torch.testing.assert_close(made.feature_sampler.fc.weight, weights, rtol=0, atol=1e-20)


def test_a_run_of_another_start_is_another_run(command, begun, tmp_path, tokenizer, monkeypatch, capsys):
    started = [*command, "--log-every", "1", "--start-from", str(begun)]
    saved = []
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3)
        assert main(started) == 130
    other = FSPADDraftModel.from_pretrained(begun)
    other.feature_sampler.fc.weight.data += 1
    other.save_pretrained(tmp_path / "other", tokenizer=tokenizer)
    said = refused(capsys, [*started[:-1], str(tmp_path / "other")])
    assert "is of other settings (start_sha256 " in said and said.count("->") == 1
    assert main(started) == 0
    rest = shown_steps(capsys.readouterr().out)
    assert [line[0] for line in rest] == ["5", "6"]
    for folder in ("draft", "whole"):
        assert main([*started, "--output", str(tmp_path / folder)]) == 0
        saved.append(FSPADDraftModel.from_pretrained(tmp_path / folder).state_dict())
    assert shown_steps(capsys.readouterr().out)[-2:] == rest
    assert all(torch.equal(saved[0][name], saved[1][name]) for name in saved[0])


def test_a_start_that_does_not_fit_is_refused_before_work(command, begun, tmp_path, tokenizer, monkeypatch, capsys):
    monkeypatch.setattr(run, "load_training_rows", lambda *args: pytest.fail("read the data"))
    monkeypatch.setattr(run, "load_target", lambda *args: pytest.fail("read the target's weights"))
    started = [*command, "--start-from"]
    for name, value in {"hidden_size": 48, "vocab_size": 65}.items():
        config = FSPADDraftModel.from_pretrained(begun).config
        setattr(config, name, value)
        FSPADDraftModel(config).save_pretrained(tmp_path / name, tokenizer=tokenizer)
        said = refused(capsys, [*started, str(tmp_path / name)])
        assert f"start_from='{tmp_path / name}' has {name}={value}, a draft for" in said
    assert "is a 'llama' model: expected an FSPAD draft" in refused(capsys, [*started, command[2]])
    assert "nowhere" in refused(capsys, [*started, str(tmp_path / "nowhere")])
    weights = begun / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\xff")
    assert "were changed" in refused(capsys, [*started, str(begun)])
    with pytest.raises(ValueError, match=r"\['fc_bias'\] cannot be chosen with start_from"):
        begun.joinpath("config.json").write_text(
            json.dumps({**json.loads((begun / "config.json").read_text()), "weights_sha256": None})
        )
        args = FSPADTrainingArguments(str(tmp_path / "x"))
        run.run_training(command[2], [command[4]], args, draft_overrides={"fc_bias": False}, start_from=str(begun))
    assert not (tmp_path / "draft").exists()


def test_the_plan_names_the_start(command, begun, monkeypatch, capsys):
    monkeypatch.setattr(run, "load_target", lambda *args: pytest.fail("read the target's weights"))
    for options, shown in (([], "None"), (["--start-from", str(begun)], str(begun))):
        assert main([*command, "--plan", *options]) == 0
        assert f"\n{'start_from':<27} {shown}\n" in capsys.readouterr().out


def test_trackers_are_told(llama, tmp_path):
    class Kept(TrainerCallback):
        def __init__(self):
            self.logs = []

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.logs.append((state.global_step, dict(logs)))

    kept, rows = Kept(), all_counted(torch.randint(3, 64, (8, 24)))
    trained(fresh_draft(llama), llama, rows[:6], tmp_path, rows[6:], [kept], logging_steps=2)
    assert [step for step, _ in kept.logs] == [2, 3, 3, 3]
    assert {"loss", "feature", "logit", "top1", "learning_rate", "train_tokens_per_second"} <= kept.logs[0][1].keys()
    assert kept.logs[2][1]["eval_tau"] >= 1 and kept.logs[1][1]["num_input_tokens_seen"] == (4 + 2 + 4) * 24
