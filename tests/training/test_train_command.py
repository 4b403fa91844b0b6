"""`fspad-hf train`: its options and files of them, its plan, what it refuses and what it leaves behind."""

import io
import json
import os
import re
import shlex
import signal

import numpy as np
import pytest
import torch
from accelerate.tracking import GeneralTracker
from rich.console import Console

from fspad_hf import FSPADConfig, FSPADDraftModel
from fspad_hf.cards import read_provenance
from fspad_hf.training import checkpoints, run, tracking, trainer
from fspad_hf.training.config import TrainingConfig, read_config_file
from fspad_hf.training.schedule import learning_rate_at
from fspad_hf_cli import main, make_parser

from .runs import shown_steps, write_files

OPTIONS = "--steps 6 --batch-rows 2 --warmup-steps 2 --validate-tokens 40 --coupling-positions 50"


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
    beyond = ["--self-steps", "2", "--self-step-decay", "0.5", "--top-k-weight", "0.3", "--top-k", "5"]
    assert main([*command, "--validate-every", "2", "--schedule", "linear", "--keep-features", *beyond]) == 0
    told = read_provenance(tmp_path / "draft" / "training.json")
    draft = FSPADDraftModel.from_pretrained(tmp_path / "draft")
    assert told["weights_sha256"] == draft.config.weights_sha256 and told["weights_of_step"] == told["best_step"]
    assert told["coupling_kappa"] == draft.speculation_config.coupling_kappa
    assert 0 < told["coupling_positions"] < 100
    assert told["coupling_sharpness"] == draft.speculation_config.coupling_sharpness
    assert told["target"] == "target" and told["data"] == ["ids.npy"] and told["schedule"] == "linear"
    assert (told["rows"], told["held_out_rows"], told["tokens"], told["epochs"]) == (38, 2, 38 * 40, 0.32)
    assert [told[option.strip("-").replace("-", "_")] for option in beyond[::2]] == [2, 0.5, 0.3, 5]
    assert told["validation_tau"] >= 1 and told["best_step"] in (2, 4, 6) and told["final_loss"] > 0
    assert told["seconds"] > 0 and told["torch"] == torch.__version__ and "tokens/s" not in told
    assert told["parameters"] == sum(p.numel() for p in draft.parameters())
    shown = capsys.readouterr().out
    assert shown_steps(shown)[-1][0] == "6" and shown.count("validated at step") == 3
    assert re.search(r"^step 6/6 .*  [\d,]+ tokens/s  0 s left$", shown, re.MULTILINE)
    measured = r"tau [\d.]+  tau at T = 1 [\d.]+  first level's best 1, 3, 10:( [\d.]+){3}  accepted by depth:"
    assert (
        len(re.findall(rf"^validated at step \d: loss .*  top1 .*  {measured}( [\d.]+)+$", shown, re.MULTILINE)) == 3
    )


def test_the_line_on_a_terminal():
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=200, color_system=None)
    with tracking.TrainingDisplay(TrainingConfig("x", steps=4), console) as display:
        display.since -= 10
        display({"step": 1, "loss": 1.5, "feature": 1, "logit": 5, "top1": 0.25, "tokens": 1000})
    line = "1/4 loss 1.5000  30 s left  100 tokens/s  feature 1.0000  logit 5.0000  top1 0.2500"
    assert line in " ".join(text.getvalue().split(" ")) and "validated" not in text.getvalue()


def test_the_best_validated_weights_are_saved_not_the_last(command, tmp_path, monkeypatch):
    taus = {2: 1.5, 4: 1.2, 6: 1.4}
    monkeypatch.setattr(trainer, "validate", lambda *args: {"loss": 1.0, "tau": taus.pop(min(taus))})
    assert main([*command, "--validate-every", "2", "--checkpoint-every", "2"]) == 0
    folder = tmp_path / "draft"
    saved, told = FSPADDraftModel.from_pretrained(folder).state_dict(), read_provenance(folder / "training.json")
    assert (told["best_step"], told["weights_of_step"], told["validation_tau"]) == (2, 2, 1.5)
    kept = {path.name: checkpoints._read(path)[0] for path in (folder / "checkpoint").iterdir()}
    assert sorted(kept) == [f"step-{step:08d}.safetensors" for step in (2, 4, 6)]
    best, last = kept["step-00000002.safetensors"], kept["step-00000006.safetensors"]
    assert all(torch.equal(saved[name], best[f"weights.{name}"]) for name in saved)
    assert any(not torch.equal(saved[name], last[f"weights.{name}"]) for name in saved)


def test_best_by():
    first, second = {"tau": 2.0, "loss": 1.0}, {"tau": 1.9, "loss": 0.5}
    assert not trainer._better(second, first, TrainingConfig("x"))
    assert trainer._better(second, first, TrainingConfig("x", best_by="loss"))
    assert trainer._better({"tau": 2.0, "loss": 0.9}, first, TrainingConfig("x")) and trainer._better(first, {}, None)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_saves_first_and_tells_how_to_go_on(command, tmp_path, monkeypatch, capsys, number):
    shown = run.TrainingDisplay.__call__

    def interrupted(self, record):
        shown(self, record)
        if record["step"] == 3:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    monkeypatch.setattr(run.TrainingDisplay, "__call__", interrupted)
    assert main([*command, "--log-every", "1"]) == 130
    told = capsys.readouterr()
    assert "Interrupted after step 4 of 6" in told.err and "run the same command again" in told.err
    assert signal.getsignal(number) == before and not (tmp_path / "draft" / "model.safetensors").exists()
    monkeypatch.setattr(run.TrainingDisplay, "__call__", shown)
    with (tmp_path / "draft" / "losses.jsonl").open("a") as file:  # as a process leaves it that was killed later
        file.write('{"step": 5, "loss": 0}\n{"step": 6, "lo')
    assert main([*command, "--log-every", "1"]) == 0
    rest = shown_steps(capsys.readouterr().out)
    assert [line[0] for line in rest] == ["5", "6"]
    whole = [*command, "--log-every", "1", "--output", str(tmp_path / "whole")]
    assert main(whole) == 0
    assert shown_steps(capsys.readouterr().out)[4:] == rest
    logs = [(tmp_path / name / "losses.jsonl").read_text() for name in ("draft", "whole")]
    records = [json.loads(line) for line in logs[0].splitlines()]
    assert logs[0] == logs[1] and [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert {"loss", "feature", "logit", "top1", "learning_rate"} < records[0].keys()
    assert "validation_loss" in records[5] and f"{records[5]['loss']:.4f}" == rest[1][1]


def test_the_end_names_the_draft_and_commands_that_run(command, files, tmp_path, capsys):
    assert main([*command, "--steps", "1"]) == 0
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


def test_an_interrupt_in_the_last_validation_is_not_lost(command, tmp_path, monkeypatch, capsys):
    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGINT)
        return {"loss": 1.0}

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "validate", interrupted)
        assert main(command) == 130
    assert not (tmp_path / "draft" / "model.safetensors").exists()
    capsys.readouterr()
    assert main(command) == 0 and not shown_steps(capsys.readouterr().out)  # no step was left to do
    assert read_provenance(tmp_path / "draft" / "training.json")["best_step"] == 6


def test_a_checkpoint_of_another_run_is_refused(command, files, tmp_path, capsys):
    assert main([*command, "--coupling-positions", "0"]) == 0
    said = refused(capsys, [*command, "--coupling-positions", "0", "--learning-rate", "0.01", "--seed", "3"])
    assert "learning_rate 0.001 -> 0.01, seed 0 -> 3, data_sha256" in said
    rows = np.load(files[3])
    rows[0, 30] += 1
    np.save(tmp_path / "other.npy", rows)
    said = refused(capsys, [*command, "--coupling-positions", "0", "--data", str(tmp_path / "other.npy")])
    assert "(data_sha256 " in said and "learning_rate" not in said
    said = refused(capsys, [*command, "--coupling-positions", "0", "--draft-vocab-size", "40"])
    assert "(draft_vocab_size null -> 40)" in said
    assert main([*command, "--coupling-positions", "0", "--micro-rows", "1", "--checkpoint-every", "9"]) == 0


def test_a_loss_that_is_no_number_is_one_line(command, monkeypatch, capsys):
    def spoilt(draft, *args):
        torch.nn.init.constant_(draft.feature_sampler.fc.weight, float("nan"))

    monkeypatch.setattr(run, "warm_start", spoilt)
    assert "The loss is nan at step 1: lower learning_rate" in refused(capsys, command)


def test_a_full_disk_is_one_line(command, tmp_path, monkeypatch, capsys):
    def full(tensors, path, metadata):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", full)
    assert "checkpoint of step 6 cannot be written" in refused(capsys, command)
    assert not list((tmp_path / "draft" / "checkpoint").iterdir())


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), checkpoints.SafetensorError("os error 28")])
def test_a_disk_that_is_full_at_the_end_is_one_line(command, tmp_path, monkeypatch, capsys, error):
    def full(self, folder, **kwargs):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(FSPADDraftModel, "save_pretrained", full)
        said = refused(capsys, command)
    assert "draft cannot be written to" in said and "checkpoint of the last step stands" in said
    assert main(command) == 0  # the trained weights are there still
    assert not shown_steps(capsys.readouterr().out) and (tmp_path / "draft" / "model.safetensors").exists()


def test_bad_options_are_one_line(command, files, tmp_path, capsys, tokenizer):
    (tmp_path / "file.yaml").write_text("learning-rate: 1e-3\nlerning_rate: 1\nsteps: 3\n")
    said = refused(capsys, [*command, "--config", str(tmp_path / "file.yaml")])
    assert "unknown keys ['lerning_rate']" in said and "'learning_rate'" in said
    for content, expected in {
        "steps: soon": "steps='soon': expected a whole number",
        "steps: 2.5": "steps=2.5: expected a whole number",
        "schedule: step": "schedule='step' is unknown: expected one of ['cosine', 'linear']",
        "clip_value: 0": "clip_value=0.0 would train nothing",
        "batch_rows: -1": "batch_rows=-1 is too small",
        "self_steps: 0": "self_steps=0 is too small: expected 1 or more",
        "self_step_decay: 2": "self_step_decay=2.0: expected more than 0, at most 1",
        "top_k_weight: much": "top_k_weight='much': expected a number",
        "{top_k_weight: 1, head_sample: 9}": "are only known over the whole vocabulary",
        "keep_features: maybe": "keep_features='maybe': expected true or false",
        "- 3": "holds a list",
        "a: [": "neither YAML nor JSON",
    }.items():
        (tmp_path / "file.yaml").write_text(content)
        bare = ["train", *files, "--output", str(tmp_path / "x"), "--config", str(tmp_path / "file.yaml")]
        assert expected in refused(capsys, bare), content
    assert "--data, --output is missing" in refused(capsys, ["train", "--target", "x"])
    assert "report_to='wandb' needs a package" in refused_without(capsys, command, "wandb")
    assert "report_to='paper' is unknown" in refused(capsys, [*command, "--report-to", "paper"])
    np.save(tmp_path / "none.npy", np.zeros((0, 40), dtype=np.uint16))
    empty = ["train", *files[:2], "--data", str(tmp_path / "none.npy"), "--output", str(tmp_path / "x")]
    assert "holds no rows" in refused(capsys, empty)
    np.save(tmp_path / "high.npy", np.full((4, 40), 64, dtype=np.uint16))
    empty[4] = str(tmp_path / "high.npy")
    assert "another target's tokenizer" in refused(capsys, empty)
    assert not (tmp_path / "x").exists()


def refused_without(capsys, command, package):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracking, "get_available_trackers", lambda: [])
        return refused(capsys, [*command, "--report-to", package])


def test_a_file_of_options_gives_way_to_the_command_line(files, tmp_path, capsys):
    options = {"target": files[1], "data": files[3], "output": str(tmp_path / "draft"), "steps": 99, "noise": 0.2}
    (tmp_path / "file.json").write_text(json.dumps(options))
    assert main(["train", "--config", str(tmp_path / "file.json"), "--steps", "7", "--plan"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "steps 7 " in shown and "noise 0.2 " in shown and f"data {files[3]} " in shown
    assert not (tmp_path / "draft").exists()
    (tmp_path / "file.yml").write_text("learning-rate: 1e-4\nbetas: [0.8, 0.9]")
    read = read_config_file(tmp_path / "file.yml", TrainingConfig.__dataclass_fields__)
    assert TrainingConfig("x", **read).learning_rate == 1e-4 and TrainingConfig("x", **read).betas == (0.8, 0.9)


def test_the_plan_is_the_whole_run_and_writes_nothing(command, files, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "load_target", lambda *args: pytest.fail("read the target's weights"))
    assert main([*command, "--plan", "--rows", "20"]) == 0
    shown = capsys.readouterr().out
    assert [name for name in TrainingConfig.__dataclass_fields__ if f"\n{name:<22} " not in shown] == []
    assert "20 of 40 tokens, 2 more held out" in shown and "tokens                 800, " in shown
    assert "epochs                 0.60" in shown and "parameters, " in shown and not (tmp_path / "draft").exists()


STILL = ["--steps", "1", "--learning-rate", "1e-30", "--coupling-positions", "0"]  # leaves the weights as they are


@pytest.fixture
def begun(llama, tokenizer, tmp_path):
    """A draft unlike the fresh ones: of another shape and vocabulary, and made for another target of this width."""
    torch.manual_seed(77)
    draft = FSPADDraftModel.from_target(
        llama, intermediate_size=24, partial_alignment=False, draft_vocab_size=30, tree_depth=3, tree_top_k=4,
        tree_total_nodes=9, coupling_kappa=0.6, eos_token_id=5, target_name_or_path="org/base",
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
def test_start_from_drafts_the_ids_that_this_data_has_if_told(command, files, begun, tmp_path, count):
    options = {"start-from": str(begun), "draft-vocab-size": count}
    (tmp_path / "file.json").write_text(json.dumps(options))
    assert main([*command, *STILL, "--config", str(tmp_path / "file.json")]) == 0
    started, made = (FSPADDraftModel.from_pretrained(path) for path in (begun, tmp_path / "draft"))
    counts = np.bincount(np.load(files[3])[:-2].ravel(), minlength=64)
    chosen = np.sort(np.argsort(-counts, kind="stable")[:count])
    assert made.draft_vocab_ids.tolist() == chosen.tolist() != started.draft_vocab_ids.tolist()
    assert made.config.draft_vocab_size == count
    weights = started.feature_sampler.fc.weight
    torch.testing.assert_close(made.feature_sampler.fc.weight, weights, rtol=0, atol=1e-20)


def test_a_run_of_another_start_is_another_run(command, begun, tmp_path, tokenizer, monkeypatch, capsys):
    started = [*command, "--coupling-positions", "0", "--log-every", "1", "--start-from", str(begun)]
    saved, show = [], run.TrainingDisplay.__call__

    def interrupted(self, record):
        show(self, record)
        if record["step"] == 3:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(run.TrainingDisplay, "__call__", interrupted)
    assert main(started) == 130
    monkeypatch.setattr(run.TrainingDisplay, "__call__", show)
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
        config = TrainingConfig(str(tmp_path / "x"))
        run.run_training(command[2], [command[4]], config, draft_overrides={"fc_bias": False}, start_from=str(begun))
    assert not (tmp_path / "draft").exists()


def test_the_plan_names_the_start(command, begun, monkeypatch, capsys):
    monkeypatch.setattr(run, "load_target", lambda *args: pytest.fail("read the target's weights"))
    for options, shown in (([], "None"), (["--start-from", str(begun)], str(begun))):
        assert main([*command, "--plan", *options]) == 0
        assert f"\nstart_from             {shown}\n" in capsys.readouterr().out


def test_trackers_are_told_every_step(llama, command, tmp_path, monkeypatch):
    class Kept(GeneralTracker):
        name, requires_logging_directory, main_process_only = "kept", False, True

        def __init__(self):
            super().__init__()
            self.values, self.about, self.finished = [], None, False

        tracker = property(lambda self: self)

        def store_init_configuration(self, values):
            self.about = values

        def log(self, values, step=None, **kwargs):
            self.values.append((step, values))

        def finish(self):
            self.finished = True

    kept, made = Kept(), run.TrainingConfig
    config = made(str(tmp_path / "draft"), steps=3, batch_rows=2, report_to=[kept], validate_tokens=20)
    run.run_training(command[2], [command[4]], config)
    assert [step for step, _ in kept.values] == [1, 2, 3] and kept.finished and kept.about["steps"] == 3
    assert kept.values[2][1]["validation_tau"] >= 1 and "validation_tau" not in kept.values[1][1]
    assert {"loss", "feature", "logit", "top1", "learning_rate", "tokens"} <= kept.values[0][1].keys()


def test_schedules():
    cosine, linear = (
        [learning_rate_at(step, TrainingConfig("x", steps=110, warmup_steps=10, learning_rate=1.0, schedule=name))
         for step in range(110)]
        for name in ("cosine", "linear")
    )  # fmt: skip
    assert cosine[:10] == linear[:10] == [(step + 1) / 10 for step in range(10)]
    assert cosine[60] == pytest.approx(0.5) and linear[60] == pytest.approx(0.5)
    assert linear[35] == pytest.approx(0.75) and cosine[35] == pytest.approx(0.854, abs=1e-3)
    assert 0 < linear[-1] == pytest.approx(0.01) and 0 < cosine[-1] < 0.001
