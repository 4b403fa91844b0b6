"""The real huggingface_hub client against a hub on the loopback interface."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub.repocard import metadata_load

from .hub_clients import CHUNK
from .hub_server import Fault, HubServer

ROOT = Path(__file__).parents[1]
WEIGHTS = "model.safetensors"


def client(hub, folder, *command, **env) -> subprocess.CompletedProcess:
    """A Python process that knows no hub but `hub`, with `folder` as its home."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    env = {
        **kept, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(folder / "home"), "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "NO_PROXY": "*", **env,
    }  # fmt: skip
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True, timeout=200)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def part(name, hub, folder, **env) -> dict:
    done = client(hub, folder, "-m", "tests.hub_clients", name, str(folder), **env)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def naming(target: str, files: dict[str, bytes]) -> dict[str, bytes]:
    config = {**json.loads(files["config.json"]), "target_name_or_path": target}
    return {**files, "config.json": json.dumps(config).encode()}


@pytest.fixture(scope="module")
def hub():
    with HubServer({"hf_alice": "alice", "hf_bob": "bob"}) as server:
        yield server


@pytest.fixture(scope="module")
def published(hub, tmp_path_factory):
    """What alice's process says; her first upload meets a hub that is down for a moment."""
    hub.faults.append(Fault("POST /api/models/alice/draft/preupload/main", status=503))
    return part("publish", hub, tmp_path_factory.mktemp("alice"), HF_TOKEN="hf_alice")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("visitor")


@pytest.fixture(scope="module")
def interrupted(hub, published, home):
    """The exit status of a process that is killed in the middle of the weights."""
    code = (
        f"import os, time; from huggingface_hub import constants, hf_hub_download\n"
        f"constants.DOWNLOAD_CHUNK_SIZE = {CHUNK}\n"
        f"time.sleep = lambda seconds: os.kill(os.getpid(), 9)  # where the client would wait and try again\n"
        f"hf_hub_download('alice/draft', {WEIGHTS!r})"
    )
    hub.faults.append(Fault(f"GET /alice/draft/resolve/.*/{WEIGHTS}", drop=10 * CHUNK + 1))
    return client(hub, home, "-c", code).returncode


@pytest.fixture(scope="module")
def consumed(hub, published, interrupted, home):
    """What the visitor's process says of what alice published, and of what went wrong with it since."""
    draft = hub.repos["alice/draft"].files()
    flipped = bytearray(draft[WEIGHTS])
    flipped[-1] ^= 1
    hub.create("alice/changed", {**draft, WEIGHTS: bytes(flipped)})
    hub.create("alice/truncated", {**draft, WEIGHTS: draft[WEIGHTS][:2000]})
    several = {f"drafts/one/{path}": content for path, content in draft.items()}
    several |= {f"drafts/changed/{path}": content for path, content in hub.repos["alice/changed"].files().items()}
    hub.create("alice/many", several)
    shards = hub.repos["alice/sharded"].files()
    last = max(path for path in shards if path.endswith(".safetensors"))
    hub.create("alice/bad-shard", {**shards, last: shards[last][:-1] + bytes([shards[last][-1] ^ 1])})
    hub.create("alice/hidden", hub.repos["alice/target"].files(), private=True)
    hub.create("alice/hidden-draft", naming("alice/hidden", draft), private=True)
    hub.create("alice/changed-pair", naming("alice/never-asked", hub.repos["alice/changed"].files()))
    hub.create("alice/cut", draft)
    hub.create("alice/down", draft)
    hub.faults.append(Fault(f"GET /alice/cut/resolve/.*/{WEIGHTS}", drop=10 * CHUNK + 1))
    hub.faults.append(Fault("alice/down", status=503, times=float("inf"), until="alice/down/refs"))
    try:
        return part("consume", hub, home)
    finally:
        hub.faults.clear()


@pytest.fixture(scope="module")
def offline(hub, consumed, home):
    """What the visitor's next process says without a network, and what it asked of the hub all the same."""
    before = len(hub.log)
    return part("offline", hub, home, HF_HUB_OFFLINE="1"), hub.log[before:]


def failed(step, kind, *words) -> bool:
    return step["error"] == kind and all(word in step["message"] for word in words)


class TestPush:
    def test_draft_tokenizer_and_card_in_one_commit(self, hub, published):
        repo, said = hub.repos["alice/draft"], published["first"]
        assert list(repo.messages.values())[:2] == ["initial commit", "the first"]
        files = repo.files()
        assert {"config.json", WEIGHTS, "tokenizer.json", "tokenizer_config.json", "README.md"} <= files.keys()
        assert json.loads(files["config.json"])["weights_sha256"] == said["sha256"] == sha256(files[WEIGHTS])
        assert said["url"].endswith(f"/alice/draft/commit/{repo.refs['main']}")
        assert not repo.private

    def test_a_503_during_the_upload_is_tried_again(self, hub, published):
        uploads = [entry for entry in hub.seen("POST /api/models/alice/draft/preupload/main") if "pr" not in entry[0]]
        assert len(hub.seen(r"POST /api/models/alice/draft/preupload/main$")) == 2, uploads
        assert "error" not in published["first"]

    def test_a_branch_and_a_pull_request_leave_main_alone(self, hub, published):
        repo = hub.repos["alice/draft"]
        assert sorted(repo.refs) == ["main", "refs/pr/1", "wide"]
        depths = {ref: json.loads(repo.files(ref)["speculation_config.json"]).get("tree_depth") for ref in repo.refs}
        assert depths == {"main": None, "refs/pr/1": 2, "wide": 2}
        assert published["pull_request"].endswith("/alice/draft/discussions/1")
        assert repo.files("wide")["README.md"] == repo.files("main")["README.md"]  # kept: it was there

    def test_private_and_the_options_of_a_push_while_saving(self, hub, published):
        assert published["secret"] is None and published["while_saving"] is None
        saved = hub.repos["alice/saved"]
        assert hub.repos["alice/secret"].private and saved.private
        assert saved.files("main") == {} and saved.messages[saved.refs["dev"]] == "from save"
        assert b'load_pair("alice/saved", revision="dev")' in saved.files("dev")["README.md"]

    def test_shards_replace_the_whole_file(self, hub, published):
        files = hub.repos["alice/sharded"].files()
        shards = sorted(path for path in files if path.endswith(".safetensors"))
        assert len(shards) > 1 and WEIGHTS not in files and "model.safetensors.index.json" in files
        joined = b"".join(files[path] for path in shards)
        assert published["shards_replace_a_whole_file"] == sha256(joined)

    def test_the_command_pushes_a_folder_with_its_results(self, hub, published, tmp_path):
        code, printed = published["command_line"]
        repo = hub.repos["alice/card"]
        assert code == 0 and printed == f"{hub.endpoint}/alice/card/commit/{repo.refs['main']}\n" and repo.private
        files = repo.files()
        assert {"training.json", WEIGHTS} <= files.keys() and "optimizer.bin" not in files
        (tmp_path / "README.md").write_bytes(files["README.md"])
        data = metadata_load(tmp_path / "README.md")
        assert (data["base_model"], data["datasets"]) == ("alice/target", ["alice/rows"])
        metrics = {
            (result["dataset"]["config"], metric["type"]): metric["value"]
            for result in data["model-index"][0]["results"]
            for metric in result["metrics"]
        }
        assert metrics == {("qa", "tau"): 2.5, ("qa", "speedup"): 1.25, ("math", "tau"): 3.5}
        text = files["README.md"].decode()
        for line in (
            "| qa | 2.50 | 1.25 x |",
            "| math | 3.50 |  |",
            "**3.00**",
            "machine: a \\| b",
            "| data | a, b\\|c |",
        ):
            assert line in text


class TestLoad:
    def test_pair_auto_class_pipeline_and_quick_start(self, hub, published, consumed):
        whole = consumed["after_a_killed_download"]
        assert (whole["sha256"], whole["depth"]) == (published["first"]["sha256"], None)
        assert consumed["auto"] == whole["sum"]
        assert consumed["pair"] == ["alice/target", "rs", True]
        assert consumed["pipelines"] is True
        assert consumed["commits"] == [hub.repos["alice/target"].refs["main"], None]

    @pytest.mark.parametrize(
        ("repo", "branch", "token"), [("alice/draft", "main", {}), ("alice/saved", "dev", {"HF_TOKEN": "hf_alice"})]
    )
    def test_the_quick_start_runs_as_pasted(self, hub, published, tmp_path, repo, branch, token):
        card = hub.repos[repo].files(branch)["README.md"].decode()
        (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
        done = client(hub, tmp_path, "-c", code, **token)
        assert done.returncode == 0 and "SpeculationRecord(rounds=" in done.stdout, done.stderr[-4000:]

    def test_custom_generate_runs_as_its_card_says(self, hub, published, tmp_path):
        card = hub.repos["alice/fspad-generate"].files()["README.md"].decode()
        (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
        for shown, name in (
            ("user/this-repository", "alice/fspad-generate"),
            ("path/or/hub-id-of-its-draft", "alice/draft"),
            ("path/or/hub-id", "alice/target"),
        ):
            code = code.replace(shown, name)
        code += "assert output.tolist() == model.generate(**inputs, max_new_tokens=64).tolist()\n"
        done = client(hub, tmp_path, "-c", code)
        assert done.returncode == 0, done.stderr[-4000:]
        assert hub.seen("GET /alice/fspad-generate/resolve/.*/custom_generate/generate.py")

    def test_a_checkpoint_is_converted_from_the_hub(self, consumed):
        assert consumed["converted"] == [True, True]

    def test_revision_subfolder_and_cache_dir(self, published, consumed):
        loaded, depth = consumed["revision"]
        assert (loaded["sha256"], loaded["depth"], depth) == (published["branch"], 2, 2)
        loaded, exact = consumed["subfolder"]
        assert loaded["sha256"] == published["first"]["sha256"] and exact
        same, cached = consumed["cache_dir"]
        files = {("alice--draft", WEIGHTS), ("alice--target", WEIGHTS), ("alice--target", "tokenizer.json")}
        assert same and files <= {tuple(file) for file in cached}
        assert failed(consumed["cache_dir_empty"], "OSError", "offline mode")
        assert consumed["local_files_only"] == [published["first"]["sha256"]] * 2
        assert consumed["sharded"]["sha256"] == published["shards_replace_a_whole_file"]

    def test_a_private_draft_needs_the_token(self, published, consumed):
        assert failed(consumed["no_token"], "OSError", "alice/secret", "token")
        loaded, exact = consumed["token"]
        assert loaded["sha256"] == published["first"]["sha256"] and exact

    def test_a_cut_connection_goes_on_where_it_stood(self, hub, interrupted, consumed):
        asked = [ranged for _, ranged in hub.seen(f"GET /alice/cut/resolve/.*/{WEIGHTS}")]
        assert asked == [None, f"bytes={10 * CHUNK}-"]
        assert consumed["cut_connection"] == consumed["after_a_killed_download"]

    def test_a_killed_download_is_never_taken_for_the_file(self, hub, home, published, interrupted, consumed):
        assert interrupted == -signal.SIGKILL
        partial = [path.stat().st_size for path in (home / "home").rglob("*.incomplete")]
        # huggingface_hub names it anew each time, so no later process goes on there: it asks for the whole file
        assert len(partial) == 1 and 0 < partial[0] <= 10 * CHUNK
        revision = f"(main|{hub.repos['alice/draft'].refs['main']})"
        asked = [ranged for _, ranged in hub.seen(f"GET /alice/draft/resolve/{revision}/{WEIGHTS}")]
        assert asked[:2] == [None, None]
        assert consumed["after_a_killed_download"]["sha256"] == published["first"]["sha256"]

    @pytest.mark.parametrize(
        ("step", "kind"),
        [
            ("changed", "OSError"),
            ("truncated", "OSError"),
            ("bad-shard", "OSError"),
            ("changed_subfolder", "OSError"),
            ("changed_pair", "OSError"),
            ("changed_auto", "OSError"),
            ("changed_pipeline", "ValueError"),  # which is how a pipeline passes on what stopped it
        ],
    )
    def test_other_weights_are_refused(self, hub, published, consumed, step, kind):
        expected = published["shards_replace_a_whole_file" if step == "bad-shard" else "first"]
        expected = expected if step == "bad-shard" else expected["sha256"]
        assert failed(consumed[step], kind, "were changed", f"weights_sha256={expected}", "force_download=True")
        if step == "changed_pair":
            assert hub.seen("never-asked") == []  # a damaged draft costs no download of its target
        if step == "changed":
            assert sha256(hub.repos["alice/changed"].files()[WEIGHTS]) in consumed[step]["message"]

    def test_a_hub_that_is_down_or_does_not_know(self, consumed):
        assert failed(consumed["down"], "OSError", "couldn't connect")
        assert consumed["up_again"] == consumed["after_a_killed_download"]
        assert failed(consumed["missing"], "OSError", "alice/nobody is not a local folder")
        assert failed(consumed["missing_revision"], "OSError", "nowhere is not a valid git identifier")
        assert failed(consumed["no_draft"], "ValueError", "'alice/target' is a 'llama' model")

    def test_offline(self, consumed, offline):
        said, asked = offline
        assert asked == []
        assert said["pair"] == ["rs", consumed["after_a_killed_download"]["sum"]]
        assert said["pipelines"] == ["FSPADDraftModel", 1]
        assert said["commands"] == ["alice/target", "alice/target", "auto"]
        assert failed(said["missing"], "OSError", "offline mode")
        assert failed(said["changed_in_the_cache"], "OSError", "were changed", "weights_sha256=")
