"""`fspad-hf ablate`: the drafts differ in their parts alone, everything is done once, and the figures are right."""

import json
import re
import shutil
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from fspad_hf import FSPADDraftModel
from fspad_hf.training import ablation, acceptance, plan
from fspad_hf.training.ablation import VARIANTS, run_ablation
from fspad_hf.training.acceptance import mean_tau, measure_acceptance
from fspad_hf.training.arguments import FSPADTrainingArguments
from fspad_hf_cli import main

from .runs import write_files

TREE = {"tree_depth": 2, "tree_top_k": 3, "tree_total_nodes": 6}
NAMES = [*(f"{variant}-seed3" for variant in VARIANTS), "fspad-seed5", "eagle2-seed5"]
TOKENS = 8


@pytest.fixture(scope="module")
def files(llama, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    write_files(folder, llama, tokenizer)
    asked = [{"category": c, "turns": [f"{c} {w}", "x"]} for c in ("qa", "writing") for w in ("why", "who", "how")]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, asked)))
    return folder


def ablate(files, output, **changes):
    """The ablation of these tests, and how often the slow parts were called."""
    calls = SimpleNamespace(trained=[], decoded=0, simulated=0, loaded=0)

    def counting(name, function):
        def counted(*args, **kwargs):
            if name == "trained":
                calls.trained.append(args[2].output_dir.rsplit("/", 1)[-1])
            else:
                setattr(calls, name, getattr(calls, name) + 1)
            return function(*args, **kwargs)

        return counted

    settings = {"max_steps": 2, "warmup_steps": 1, "eval_tokens": 20, "linear_start": True}
    settings |= {"per_device_train_batch_size": 2}
    settings |= {name: changes.pop(name) for name in FSPADTrainingArguments.__dataclass_fields__ if name in changes}
    options = {"questions": str(files / "questions.jsonl"), "seeds": (3, 5), "per_task": 3, "max_new_tokens": TOKENS}
    options |= {"draft_overrides": TREE, "data": [str(files / "ids.npy")], **changes}
    with pytest.MonkeyPatch.context() as patch:
        for module, function, name in (
            (ablation, "run_training", "trained"), (ablation, "load_target", "loaded"),
            (ablation, "simulate_answer", "simulated"), (acceptance, "known_continuations", "decoded"),
        ):  # fmt: skip
            patch.setattr(module, function, counting(name, getattr(module, function)))
        calls.results = run_ablation(
            str(files / "target"), args=FSPADTrainingArguments(str(output), **settings), **options
        )
    return calls


@pytest.fixture(scope="module")
def done(files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("done") / "ablation"
    return folder, ablate(files, folder)


@pytest.fixture
def folder(done, tmp_path):
    """A copy of the finished ablation, to spoil."""
    return shutil.copytree(done[0], tmp_path / "ablation")


def told(folder, name, file="training.json"):
    return json.loads((folder / name / file).read_text())


def test_the_drafts_differ_in_their_parts_alone(done):
    folder, calls = done
    assert calls.trained == NAMES
    configs = {name: told(folder, name, "config.json") for name in NAMES}
    parts = [(configs[name]["feature_sampling"], configs[name]["partial_alignment"]) for name in NAMES[:4]]
    assert parts == [(True, True), (False, True), (True, False), (False, False)]
    shapes = {}
    for name in NAMES:
        made = FSPADDraftModel.from_pretrained(folder / name).state_dict()
        shapes[name] = {key: tuple(x.shape) for key, x in made.items()}
    fspad, sampler, alignment, eagle = (shapes[name] for name in NAMES[:4])
    assert fspad.keys() - sampler.keys() == fspad.keys() - eagle.keys() and fspad.keys() > eagle.keys()
    assert fspad.keys() == alignment.keys() and fspad != alignment
    assert shapes[NAMES[0]] == shapes[NAMES[4]]
    same = ("data_sha256", "held_out_sha256", "steps", "batch_rows", "learning_rate", "rows", "tokens_seen")
    for seed in (3, 5):
        trained = [told(folder, name) for name in NAMES if name.endswith(str(seed))]
        assert {about["seed"] for about in trained} == {seed}
        assert len({tuple(about[name] for name in same) for about in trained}) == 1
    assert len({told(folder, name)["weights_sha256"] for name in NAMES}) == 6
    for name in NAMES:
        assert told(folder, name, "speculation_config.json").items() >= TREE.items()


def test_answers_are_decoded_once_a_temperature_and_simulated_by_every_draft(done, files, llama, tokenizer):
    folder, calls = done
    assert (calls.decoded, calls.loaded, calls.simulated) == (2, 1, 6 * 2 * 6)
    asked = [("mt_bench", f"writing {w}") for w in ("why", "who", "how")] + [("qa", f"qa {w}") for w in
                                                                            ("why", "who", "how")]  # fmt: skip
    for name in (NAMES[0], NAMES[5]):  # as the draft is measured by itself
        draft = FSPADDraftModel.from_pretrained(folder / name)
        expected = measure_acceptance(llama, tokenizer, draft, asked, TOKENS)
        kept = told(folder, "measured", f"{name}.json")["kept"]

        def order(row):
            return row["mode"], row["prompt"]

        assert sorted(kept, key=order) == sorted(expected, key=order) and len(kept) == 18


def test_the_figures(done):
    folder, calls = done
    results = json.loads((folder / "results.json").read_text())
    assert results == json.loads(json.dumps(calls.results))
    rows = {name: told(folder, "measured", f"{name}.json")["kept"] for name in NAMES}
    for mode in ("greedy", "coupled", "uncoupled"):
        for (title, _), name in zip(VARIANTS.values(), NAMES[:4], strict=True):
            found = results["figures"][mode][title]
            second = name.replace("seed3", "seed5")
            (taus, mean), (others, other) = (
                mean_tau(rows[each if each in rows else name], mode) for each in (name, second)
            )
            assert list(found["tasks"]) == ["mt_bench", "qa"]
            for task in taus:
                assert found["tasks"][task]["tau"]["value"] == pytest.approx((taus[task] + others[task]) / 2, abs=1e-4)
            assert found["mean"]["tau"]["value"] == pytest.approx((mean + other) / 2, abs=1e-4)
            seeds = {"3": mean} | ({"5": other} if second in rows else {})
            assert found["seeds"] == pytest.approx(seeds, abs=1e-4)
            assert ("difference" in found["mean"]) == (title != "FSPAD")


def made_up(rounds, tokens=60):
    return [
        {"prompt": n, "task": "qa", "mode": "greedy", "tokens": tokens, "rounds": count, "accepted_lengths": []}
        for n, count in enumerate(rounds)
    ]


def test_differences_pool_the_seeds_and_pair_the_prompts():
    measured = [
        ("FSPAD", 0, made_up([20, 30])), ("EAGLE-2", 0, made_up([30, 40])),
        ("FSPAD", 1, made_up([30, 20])), ("EAGLE-2", 1, made_up([20, 60])[::-1]),  # in another order
        ("without feature sampling", 0, made_up([24, 36])),
    ]  # fmt: skip
    found = ablation.figures_of(measured)["greedy"]
    assert found["FSPAD"]["seeds"] == {"0": 2.4, "1": 2.4} and found["EAGLE-2"]["seeds"] == {"0": 1.7143, "1": 1.5}
    assert found["EAGLE-2"]["mean"]["tau"]["value"] == pytest.approx((120 / 70 + 120 / 80) / 2, abs=1e-4)
    difference = found["EAGLE-2"]["mean"]["difference"]  # by prompt: 120/50 - 120/50 and 120/50 - 120/100
    assert difference == {"value": 0.8, "low": 0.0, "high": 1.2}  # 240/100 - 240/150
    difference = found["without feature sampling"]["mean"]["difference"]  # to the draft of its own seed
    assert difference == {"value": 0.4, "low": 0.3333, "high": 0.5}


def test_finished_work_is_not_done_again(files, folder):
    before = (folder / "results.json").read_bytes()
    again = ablate(files, folder)
    assert (again.trained, again.decoded, again.simulated, again.loaded) == ([], 0, 0, 0)
    assert json.loads(before)["figures"] == again.results["figures"]
    (folder / "measured" / f"{NAMES[2]}.json").unlink()
    again = ablate(files, folder)
    assert (again.trained, again.decoded, again.simulated) == ([], 0, 12)
    assert json.loads(before)["figures"] == again.results["figures"]
    (folder / "measured" / "answers-sampled.json").unlink()
    (folder / "measured" / f"{NAMES[2]}.json").unlink()
    assert ablate(files, folder).decoded == 1
    shutil.rmtree(folder / NAMES[5])
    again = ablate(files, folder)
    assert again.trained == [NAMES[5]] and again.simulated == 0  # the same weights once more
    assert not list(folder.rglob(".*"))


def test_the_drafts_in_between_may_be_left_out(files, folder, capsys):
    before = json.loads((folder / "results.json").read_text())["figures"]
    found = ablate(files, folder, between=())
    assert found.trained == [] and found.simulated == 0
    for mode, drafts in before.items():
        assert found.results["figures"][mode] == {name: drafts[name] for name in ("FSPAD", "EAGLE-2")}
    one = ablate(files, folder, between=["no-partial-alignment"]).results["figures"]["greedy"]
    assert list(one) == ["FSPAD", "without partial alignment", "EAGLE-2"]
    capsys.readouterr()
    assert main(command(files, folder / "x", "--plan", "--between", "--seeds", "3")) == 0
    assert re.findall(r"^(\S+)-seed3 ", capsys.readouterr().out, re.MULTILINE) == ["fspad", "eagle2"]


def test_other_weights_are_measured_anew(files, folder):
    path = folder / "measured" / f"{NAMES[1]}.json"
    kept = json.loads(path.read_text())
    path.write_text(json.dumps(kept | {"weights_sha256": "0" * 64, "kept": []}))
    assert ablate(files, folder).simulated == 12
    assert json.loads(path.read_text()) == kept


def test_an_interrupted_ablation_goes_on(files, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(plan, "DRAFTED", 40)  # the default drafts a part of the vocabulary, as of a real target
    train, simulate = ablation.run_training, ablation.simulate_answer
    left = {"trainings": 2, "answers": 15}

    def stopping(name, function):
        def work(*args, **kwargs):
            if left[name] == 0:
                raise KeyboardInterrupt
            left[name] -= 1
            return function(*args, **kwargs)

        return work

    monkeypatch.setattr(ablation, "run_training", stopping("trainings", train))
    monkeypatch.setattr(ablation, "simulate_answer", stopping("answers", simulate))
    with pytest.raises(KeyboardInterrupt):
        ablate(files, tmp_path, seeds=(3,))
    left["trainings"] = -1  # no more
    capsys.readouterr()
    with pytest.raises(KeyboardInterrupt):
        ablate(files, tmp_path, seeds=(3,))
    shown = capsys.readouterr()
    assert re.findall(r"^Training (\S+), (\d) of 4, about .* of training left$", shown.out, re.MULTILINE) == [
        ("no-partial-alignment-seed3", "3"), ("eagle2-seed3", "4")
    ]  # fmt: skip
    assert "answers simulated 15/48, " in shown.err and not (tmp_path / "results.json").exists()
    monkeypatch.setattr(ablation, "simulate_answer", simulate)
    last = ablate(files, tmp_path, seeds=(3,))
    assert (last.trained, last.decoded, last.simulated) == ([], 0, 36)  # one draft of four was measured
    more = ablate(files, tmp_path)  # another seed beside it
    assert more.trained == NAMES[4:] and (more.decoded, more.simulated) == (0, 24)


def test_work_under_other_settings_is_refused_before_any(files, folder, monkeypatch):
    monkeypatch.setattr(ablation, "_train", lambda *args: pytest.fail("trains"))
    with pytest.raises(
        ValueError, match=r"fspad-seed3' was trained with .*\(max_steps 2 -> 3, learning_rate 0.001 -> 0.1\)"
    ):
        ablate(files, folder, max_steps=3, learning_rate=0.1)
    with pytest.raises(ValueError, match=r"\(target_dtype \"float32\" -> \"bfloat16\"\)"):
        ablate(files, folder, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"\(rows 38 -> 20\)"):
        ablate(files, folder, rows=20)
    with pytest.raises(ValueError, match=r"\(draft_tree_depth 2 -> 3\)"):
        ablate(files, folder, draft_overrides=TREE | {"tree_depth": 3})
    with pytest.raises(
        ValueError, match=r"measured with other settings \(max_new_tokens 8 -> 9\).*delete '.*measured'"
    ):
        ablate(files, folder, max_new_tokens=9)
    for name in NAMES:
        (folder / "measured" / f"{name}.json").unlink()
    with pytest.raises(ValueError, match=r"answers-greedy.json' was measured with .*\(max_new_tokens 8 -> 9\)"):
        ablate(files, folder, max_new_tokens=9)
    shutil.rmtree(folder / "fspad-seed3")
    shutil.copytree(folder / "no-feature-sampling-seed3", folder / "fspad-seed3")
    with pytest.raises(ValueError, match=r"\(draft_feature_sampling false -> true\)"):
        ablate(files, folder)


def test_drafts_of_other_rows_are_not_compared(files, folder, tmp_path):
    (tmp_path / "other").mkdir()
    rows = np.load(files / "ids.npy")
    rows[0, 30] += 1
    np.save(tmp_path / "other" / "ids.npy", rows)
    shutil.rmtree(folder / "eagle2-seed5")
    with pytest.raises(ValueError, match=r"fspad-seed5' and '.*eagle2-seed5' cannot be compared \(data_sha256"):
        ablate(files, folder, data=[str(tmp_path / "other" / "ids.npy")])


def command(files, output, *options):
    given = ["--target", files / "target", "--data", files / "ids.npy", "--questions", files / "questions.jsonl"]
    return ["ablate", *map(str, given), "--output", str(output), *options]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--seeds 1 1", "seeds=[1, 1]: expected one or more, each once"),
        ("--seeds -1", "seeds=[-1]"),
        ("--between eagle2", "between=['eagle2']: expected some of ['no-feature-sampling', 'no-partial-alignment']"),
        ("--max-new-tokens 1", "max_new_tokens=1 leaves nothing to draft"),
        ("--per-task 0", "per_task=0"),
        ("--batch-rows 0", "batch_rows=0 cannot be shared"),
        ("--questions nowhere.jsonl", "nowhere.jsonl"),
        ("--data nowhere.npy", "No .npy files"),
        ("--target nowhere/at/all", "target='nowhere/at/all' is no folder here"),
        ("--rows 999", "rows=999, but the data has 38"),
        ("--dtype float3", "dtype='float3' is unknown"),
    ],
)
def test_bad_input_is_one_line_before_any_work(files, tmp_path, capsys, monkeypatch, options, said):
    monkeypatch.setattr("fspad_hf.training.run.load_target", lambda *args: pytest.fail("read the target's weights"))
    assert main(command(files, tmp_path / "x", *options.split())) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert said in lines[-1] and len([line for line in lines if line.startswith("fspad-hf: error: ")]) == 1
    assert not (tmp_path / "x").exists()


def test_an_output_that_is_a_file_and_regeneration_are_refused(files, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file: expected a folder"):
        ablate(files, tmp_path / "file")
    with pytest.raises(ValueError, match="regenerate once with train"):
        ablate(files, tmp_path / "x", data=ablation.DataConfig([str(files / "ids.npy")], regenerate=True))


def test_the_plan_writes_nothing(files, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("fspad_hf.training.run.load_target", lambda *args: pytest.fail("read the target's weights"))
    assert main(command(files, tmp_path / "x", "--plan", "--steps", "7", "--seeds", "3")) == 0
    shown = capsys.readouterr().out
    assert "max_steps                   7\n" in shown and "6 prompts, 128 new tokens" in shown
    lines = re.findall(r"^(\S+-seed3) +.*, ([\d,]+) parameters, seed 3: to train$", shown, re.MULTILINE)
    assert [name for name, _ in lines] == NAMES[:4]
    sizes = [int(count.replace(",", "")) for _, count in lines]
    assert sizes[0] == max(sizes) and sizes[3] == min(sizes) and len(set(sizes)) == 4
    assert not (tmp_path / "x").exists()
    shutil.rmtree(folder / NAMES[3])
    (folder / "measured" / f"{NAMES[1]}.json").unlink()
    before = sorted(folder.rglob("*"))
    ablate(files, folder, plan=True)
    states = re.findall(r"seed \d: (.*)$", capsys.readouterr().out, re.MULTILINE)
    assert states == ["trained and measured", "trained", "trained and measured", "to train"] + 2 * [states[0]]
    assert sorted(folder.rglob("*")) == before


def test_the_report_and_its_plots(done):
    folder, calls = done
    text = (folder / "report.md").read_text()
    plots = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert plots == [f"{what}-{mode}.svg" for mode in ("greedy", "coupled", "uncoupled") for what in
                     ("tau", "difference")]  # fmt: skip
    for alt, plot in re.findall(r"!\[(.*?)\]\((.*?)\)", text):
        root = ElementTree.parse(folder / plot).getroot()
        assert root[0].tag.endswith("}title") and root[0].text == alt and ", T = " in alt
        assert root.tag.endswith("svg") and "#ffffff" not in (folder / plot).read_text()  # no white card on black
    verdict = calls.results["verdict"]
    assert all(line in text for line in verdict["lines"]) and len(verdict["lines"]) == 3 * 3 + 1
    assert re.search(r'^The goal "FSPAD above EAGLE-2 .*" (held|did not hold)\.$', text, re.MULTILINE)
    mean = calls.results["figures"]["greedy"]["EAGLE-2"]["mean"]
    assert f"| EAGLE-2 | {mean['tau']['value']:.2f}" not in text.split("## T = 0")[0]
    assert f" | **{mean['tau']['value']:.2f}** |" in text and f"{mean['difference']['value']:+.3f} (" in text
    assert re.search(r"^\| without partial alignment \| \d\.\d{3} \| - \|$", text, re.MULTILINE)
    assert "| mean tau | seed 3 | seed 5 |" in text and "38 rows of 40 tokens (ids.npy) for 2 steps of 2 rows" in text
