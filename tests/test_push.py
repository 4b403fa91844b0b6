"""Model cards, and what `fspad-hf push` refuses before and after it asks the Hub."""

import hashlib
import inspect
import json
import shutil

import pytest
from huggingface_hub import EvalResult, ModelCard
from huggingface_hub.repocard import metadata_load
from transformers.utils import PushToHubMixin

import fspad_hf_cli as cli
from fspad_hf import FSPADConfig, FSPADDraftModel, cards, hub, pretrained
from fspad_hf.weights import fingerprint, weight_files

from . import tiny
from .conftest import fresh_draft
from .hub_server import Fault

SUMMARY = {"tasks": {"qa": {"tau": 2.0, "speedup": None}, "math": {"tau": 4, "speedup": 1.5}}, "machine": "a CPU"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("saved") / "tiny-FSPAD"
    draft = fresh_draft(tiny.build("llama"), target_name_or_path="alice/target", draft_vocab_size=32)
    draft.save_pretrained(folder, tokenizer=tokenizer)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / saved.name)


@pytest.fixture
def no_hub(monkeypatch):
    monkeypatch.setattr(hub, "HfApi", lambda **_: pytest.fail("asks the Hub"))


def results_file(tmp_path, value):
    path = tmp_path / "results.json"
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


class TestCard:
    def card(self, saved, **kwargs) -> ModelCard:
        config = FSPADConfig.from_pretrained(saved)
        return cards.make_card(saved, "alice/tiny-FSPAD", config, "alice/target", **kwargs)

    def test_metadata_round_trip(self, saved, tmp_path):
        results = cards.read_results(results_file(tmp_path, {"summary": SUMMARY}))
        card = self.card(saved, results=results, license="mit", datasets=["alice/rows"], tags=["tiny", "fspad"])
        card.save(tmp_path / "README.md")
        data = metadata_load(tmp_path / "README.md")
        assert data.pop("model-index")[0]["name"] == "tiny-FSPAD"
        assert data == {
            "library_name": "transformers", "base_model": "alice/target", "base_model_relation": "adapter",
            "pipeline_tag": "text-generation", "license": "mit", "datasets": ["alice/rows"],
            "tags": ["fspad", "eagle", "speculative-decoding", "assisted-generation", "tiny"],
        }  # fmt: skip
        read = ModelCard.load(tmp_path / "README.md").data.eval_results
        assert all(isinstance(result, EvalResult) for result in read)
        values = {(r.dataset_config, r.metric_type): r.metric_value for r in read}
        assert values == {("qa", "tau"): 2.0, ("math", "tau"): 4, ("math", "speedup"): 1.5}

    def test_what_is_unknown_is_left_out(self, saved, tmp_path):
        text = str(self.card(saved))
        assert "## Results" not in text and "model-index" not in text and "license" not in text
        assert "not recorded" in text and "32 of the target's 64 ids" in text
        results = cards.read_results(results_file(tmp_path, {"summary": SUMMARY}))
        told = str(self.card(saved, results=results, provenance={"steps": 7, "rows": None}))
        assert (
            "| qa | 2.00 |  |\n| math | 4.00 | 1.50 x |" in told and "**3.00**. Measured with: machine: a CPU." in told
        )
        assert "| steps | 7 |\n| rows | - |" in told and "not recorded" not in told
        tau_only = cards.Results({"qa": {"tau": 2.0}})
        assert "| task | tau |\n|---|---|\n| qa | 2.00 |\n" in str(self.card(saved, results=tau_only))

    def test_without_a_chat_template_the_quick_start_has_none(self, folder):
        assert "apply_chat_template" in str(self.card(folder))
        (folder / "chat_template.jinja").unlink(missing_ok=True)
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": None}))
        assert "apply_chat_template" not in str(self.card(folder))

    def test_one_summary_a_method(self, tmp_path):
        outer = {"machine": "a CPU", "plain": {"tasks": {}}, "fspad": {"tasks": SUMMARY["tasks"], "dtype": "float32"}}
        results = cards.read_results(results_file(tmp_path, {"summary": outer}))
        assert results.tasks == {"qa": {"tau": 2.0}, "math": {"tau": 4, "speedup": 1.5}}
        assert results.settings == {"machine": "a CPU", "dtype": "float32"}

    @pytest.mark.parametrize(("source", "shown"), [("spec-bench", "Spec-Bench"), ("mine.jsonl", "mine.jsonl")])
    def test_results_on_own_prompts_are_not_called_spec_bench(self, saved, tmp_path, source, shown):
        results = cards.read_results(results_file(tmp_path, {"config": {"source": source}, "summary": SUMMARY}))
        card = self.card(saved, results=results)
        assert f"## Results on {shown}\n" in str(card)
        assert card.data.eval_results[0].dataset_name == f"{shown} (qa)"
        assert (card.data.eval_results[0].dataset_type == "hemingkx/Spec-Bench") == (shown == "Spec-Bench")

    @pytest.mark.parametrize(
        ("value", "words"),
        [
            ("{", "is no JSON"),
            ([1], "holds a list"),
            ({}, "has no results"),
            ({"summary": {"tasks": {}}}, "has no results"),
            ({"summary": {"tasks": {"qa": {"tau": "2"}}}}, "tau='2' of task 'qa'"),
            ({"summary": {"tasks": {"qa": {"tau": 0}}}}, "tau=0 of task 'qa'"),
            ({"summary": {"tasks": {"qa": {"speedup": True}}}}, "speedup=True of task 'qa'"),
            ('{"summary": {"tasks": {"qa": {"tau": NaN}}}}', "tau=nan of task 'qa'"),
            ({"summary": {"tasks": {"qa": {"rounds": 3}}}}, "'qa' has neither"),
        ],
    )
    def test_results_that_are_none(self, tmp_path, value, words):
        with pytest.raises(ValueError, match=words):
            cards.read_results(results_file(tmp_path, value))

    def test_no_template(self, monkeypatch, tmp_path):
        monkeypatch.setattr(cards, "files", lambda package: tmp_path / package)
        with pytest.raises(OSError, match=r"card template is in neither .*fspad_hf/card.md.jinja"):
            cards.card_template()


@pytest.mark.usefixtures("no_hub")
class TestBeforeTheHubIsAsked:
    def refuses(self, folder, words, error=ValueError, **options):
        with pytest.raises(error, match=words):
            hub.push_folder(folder, **{"repo_id": "alice/x", **options})

    def test_names(self, folder, tmp_path):
        self.refuses(folder, "repo_id='a/b/c' is no Hub id", repo_id="a/b/c")
        self.refuses(tmp_path, r"holds no draft \(no config.json\)")
        self.refuses(folder, "target '/home/x' is a path on this machine", target_name="/home/x")

    @pytest.mark.parametrize(("name", "words"), [(None, "names no target"), ("/home/me/target", "is a path")])
    def test_a_target_that_others_cannot_load(self, folder, name, words, monkeypatch):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "target_name_or_path": name}))
        self.refuses(folder, f"{words}.*--target-name")
        draft = FSPADDraftModel.from_pretrained(folder)
        with pytest.raises(ValueError, match=words):
            draft.push_to_hub("alice/x")
        with pytest.raises(ValueError, match=words):
            draft.save_pretrained(folder.parent / "new", push_to_hub=True, repo_id="alice/x")
        assert not (folder.parent / "new").exists()
        monkeypatch.chdir(folder.parent)
        assert hub.check_target_name("org/model") == "org/model"
        (folder.parent / "org" / "model").mkdir(parents=True)
        with pytest.raises(ValueError, match="'org/model' is a path"):
            hub.check_target_name("org/model")
        assert hub.check_target_name("org/model", given=True) == "org/model"

    def test_another_kind_of_model(self, folder):
        (folder / "config.json").write_text('{"model_type": "llama"}')
        self.refuses(folder, "is a 'llama' model")

    def test_damaged_or_missing_weights(self, folder):
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1])
        self.refuses(folder, "were changed", OSError)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "weights_sha256": None}))
        self.refuses(folder, "are damaged", OSError)
        weights.unlink()
        self.refuses(folder, r"has no model.safetensors")

    def test_results_and_provenance(self, folder, tmp_path):
        self.refuses(folder, "nothing.json", OSError, results=tmp_path / "nothing.json")
        results = results_file(tmp_path, {"summary": SUMMARY})
        (folder / "README.md").write_text("mine")
        self.refuses(folder, "README.md' is there already and is kept.*--overwrite-card", results=results)
        (folder / "training.json").write_text('{"data": {"rows": 3}}')
        self.refuses(folder, r"data=\{'rows': 3\} does not fit in a table")

    def test_an_unknown_option(self, folder):
        with pytest.raises(ValueError, match=r"takes no \['privat'\]"):
            FSPADDraftModel.from_pretrained(folder).push_to_hub("alice/x", privat=True)
        options = inspect.signature(hub.push_folder).parameters.keys() - {"folder", "repo_id", "dry_run"}
        assert options == set(pretrained.PUSH_OPTIONS)
        theirs = inspect.signature(PushToHubMixin.push_to_hub).parameters.keys()
        ours = inspect.signature(FSPADDraftModel.push_to_hub).parameters.keys()
        assert theirs <= options | ours


class TestPush:
    def test_settings_go_along(self, folder, local_hub):
        draft = FSPADDraftModel.from_pretrained(folder)
        draft.speculation_config.tree_depth, draft.speculation_config.coupled_drafting = 3, False
        draft.push_to_hub("alice/x")
        (folder / "generation_config.json").write_text('{"temperature": 0.6}')
        hub.push_folder(folder, "alice/y")
        config = json.loads(local_hub.repos["alice/x"].files()["speculation_config.json"])
        assert (config["tree_depth"], config["coupled_drafting"], config["tree"]) == (3, False, "fixed")
        assert json.loads(local_hub.repos["alice/y"].files()["generation_config.json"]) == {"temperature": 0.6}

    def test_an_existing_card_is_kept_unless_told(self, folder, local_hub, tmp_path):
        results = results_file(tmp_path, {"summary": SUMMARY})
        (folder / "README.md").write_text("---\nlicense: mit\n---\nmine")
        hub.push_folder(folder)
        repo = local_hub.repos["alice/tiny-FSPAD"]  # the folder's name, as the user's own
        assert repo.files()["README.md"] == (folder / "README.md").read_bytes()
        (folder / "README.md").unlink()
        commits = len(repo.commits)
        hub.push_folder(folder)
        assert repo.files()["README.md"].endswith(b"mine")
        with pytest.raises(ValueError, match=r"'alice/tiny-FSPAD/README.md' is there already and is kept"):
            hub.push_folder(folder, results=results)
        assert len(repo.commits) == commits + 1
        (folder / "README.md").write_text("mine, here")
        hub.push_folder(folder, results=results, overwrite_card=True)
        assert b"model-index" in repo.files()["README.md"]

    def test_metadata_that_the_hub_refuses_is_refused_before_the_upload(self, folder, local_hub):
        (folder / "README.md").write_text("---\nbase_model: /home/me/target\n---\nmine")
        with pytest.raises(ValueError, match=r'Invalid metadata in README.md(.|\n)*"base_model" is no model id'):
            hub.push_folder(folder, "alice/x")
        assert local_hub.repos["alice/x"].files() == {} and local_hub.objects == {}

    def test_a_target_named_for_others(self, folder, local_hub):
        hub.push_folder(folder, "alice/x", target_name="org/Target-7B")
        files = local_hub.repos["alice/x"].files()
        assert json.loads(files["config.json"])["target_name_or_path"] == "org/Target-7B"
        assert b"base_model: org/Target-7B" in files["README.md"]
        assert json.loads((folder / "config.json").read_text())["target_name_or_path"] == "alice/target"

    def test_bob_may_only_propose(self, folder, local_hub):
        repo = local_hub.create("alice/x")
        for options in ({}, {"revision": "dev"}):
            with pytest.raises(OSError, match=r"did not take 'alice/x' \(HTTP 403: .*--create-pr"):
                hub.push_folder(folder, "alice/x", token="hf_bob", **options)
        hub.push_folder(folder, "alice/x", token="hf_bob", create_pr=True)
        assert repo.files() == {} and "config.json" in repo.files("refs/pr/1")
        repo.refs["dev"] = repo.refs["main"]
        hub.push_folder(folder, "alice/x", token="hf_bob", create_pr=True, revision="dev")
        assert "config.json" in repo.files("refs/pr/2")

    @pytest.mark.parametrize(
        ("status", "words"), [(401, "HTTP 401: .*hf auth login"), (503, "HTTP 503: .*try again later")]
    )
    def test_a_refusal_is_one_line(self, folder, local_hub, capsys, status, words):
        local_hub.faults.append(Fault("POST /api/repos/create", status=status, times=float("inf")))
        assert cli.main(["push", str(folder), "--repo-id", "alice/x"]) == 2
        printed = capsys.readouterr()
        assert printed.out == "" and printed.err.count("\n") == 1
        with pytest.raises(OSError, match=words):
            hub.push_folder(folder, "alice/x")

    def test_no_hub_at_all(self, folder, local_hub, capsys):
        local_hub.__exit__()
        assert cli.main(["push", str(folder), "--repo-id", "alice/x"]) == 2
        assert "could not be reached to push 'alice/x'" in capsys.readouterr().err


@pytest.mark.usefixtures("no_hub")
def test_a_dry_run_shows_the_files_and_sends_none(folder, tmp_path, capsys):
    assert cli.main(["push", str(folder), "--repo-id", "alice/tiny", "--dry-run"]) == 0
    shown = {line.split()[-1]: line.split()[0] for line in capsys.readouterr().out.splitlines()}
    assert shown.keys() > {"config.json", "model.safetensors", "tokenizer.json", "README.md"}
    assert shown["model.safetensors"] == f"{(folder / 'model.safetensors').stat().st_size:,}"
    assert not (folder / "README.md").exists()


def test_options_reach_push(monkeypatch, capsys):
    seen = {}

    class Commit:
        pr_url, commit_url = None, "https://hub/commit"

    monkeypatch.setattr(hub, "push_folder", lambda **options: seen.update(options) or Commit)
    arguments = (
        "push d --repo-id a/b --target-name o/t --revision r --private --create-pr --commit-message m "
        "--overwrite-card --results f --license mit --dataset x --dataset y --tag z"
    )
    assert cli.main(arguments.split()) == 0 and capsys.readouterr().out == "https://hub/commit\n"
    assert seen == {
        "folder": "d", "repo_id": "a/b", "target_name": "o/t", "revision": "r", "private": True, "create_pr": True,
        "commit_message": "m", "overwrite_card": True, "results": "f", "license": "mit", "datasets": ["x", "y"],
        "tags": ["z"], "dry_run": False,
    }  # fmt: skip
    Commit.pr_url = "https://hub/discussions/1"
    assert cli.main(["push", "d"]) == 0 and capsys.readouterr().out == "https://hub/discussions/1\n"
    assert seen["private"] is None and seen["create_pr"] is False


class TestFingerprint:
    def test_whole_shards_and_back(self, folder, tokenizer):
        draft = FSPADDraftModel.from_pretrained(folder)
        whole = draft.config.weights_sha256
        assert whole == fingerprint([folder / "model.safetensors"])
        draft.save_pretrained(folder, tokenizer=tokenizer, max_shard_size="20KB")
        assert not (folder / "model.safetensors").exists() and len(weight_files(folder)) > 1
        loaded = FSPADDraftModel.from_pretrained(folder)
        joined = b"".join(path.read_bytes() for path in sorted(folder.glob("model-*.safetensors")))
        assert loaded.config.weights_sha256 == hashlib.sha256(joined).hexdigest() != whole
        loaded.save_pretrained(folder, tokenizer=tokenizer)
        assert [path.name for path in folder.glob("model*")] == ["model.safetensors"]
        assert FSPADDraftModel.from_pretrained(folder).config.weights_sha256 == whole

    def test_a_variant_leaves_the_fingerprint_of_the_main_file(self, folder, tokenizer):
        draft = FSPADDraftModel.from_pretrained(folder)
        whole = draft.config.weights_sha256
        draft.bfloat16().save_pretrained(folder, tokenizer=tokenizer, variant="bf16")
        assert FSPADDraftModel.from_pretrained(folder).config.weights_sha256 == whole
        FSPADDraftModel.from_pretrained(folder, variant="bf16")

    def test_the_tokenizer_is_looked_for_at_the_target_and_where_the_draft_came_from(self, folder, monkeypatch):
        draft, asked = FSPADDraftModel.from_pretrained(folder), []

        def find(name, token, trust_remote_code):
            asked.append((name, token))
            if name == "alice/target":
                raise OSError("not to be had")
            return tiny.tokenizer()

        monkeypatch.setattr(pretrained.AutoTokenizer, "from_pretrained", find)
        draft.save_pretrained(folder.parent / "copy", token="hf_alice")
        assert asked == [("alice/target", "hf_alice"), (str(folder), "hf_alice")]
        assert (folder.parent / "copy" / "tokenizer.json").is_file()

    def test_a_load_that_goes_past_the_check_is_told(self, folder, monkeypatch, recwarn):
        FSPADDraftModel.from_pretrained(folder)
        assert not recwarn.list
        theirs = staticmethod(pretrained.PreTrainedModel._load_pretrained_model)
        monkeypatch.setattr(pretrained.FSPADPreTrainedModel, "_load_pretrained_model", theirs)
        with pytest.warns(UserWarning, match="were not compared with weights_sha256"):
            FSPADDraftModel.from_pretrained(folder)

    def test_a_meant_change_is_saved_again(self, folder, tokenizer):
        draft = FSPADDraftModel.from_pretrained(folder)
        before = draft.config.weights_sha256
        draft.feature_sampler.fc.weight.data += 1
        draft.save_pretrained(folder, tokenizer=tokenizer)
        loaded = FSPADDraftModel.from_pretrained(folder)
        assert loaded.config.weights_sha256 not in (None, before)
