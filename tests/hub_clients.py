"""
What users do with the Hub, each part in a process of its own:  python -m tests.hub_clients publish|consume|offline

A part prints one JSON object: the name of each step -> what it returned, or {"error": type, "message": text}.
"""

import contextlib
import io
import json
import os
import sys
import time
from pathlib import Path

import torch
from huggingface_hub import constants

CHUNK = 4096
TOKEN = "hf_alice"
IDS = torch.tensor([[5, 9, 20, 33]])


def publish(step, folder: Path) -> None:
    """Everything that alice puts on the Hub; she is logged in through $HF_TOKEN."""
    from huggingface_hub import HfApi

    import fspad_hf_cli as cli
    from fspad_hf import FSPADDraftModel

    from . import tiny
    from .conversion import reference

    target, tokenizer = tiny.build("llama"), tiny.tokenizer()
    target.push_to_hub("alice/target")
    tokenizer.push_to_hub("alice/target")
    torch.manual_seed(0)
    draft = FSPADDraftModel.from_target(target, target_name_or_path="alice/target")
    wide = FSPADDraftModel.from_target(target, target_name_or_path="alice/target", tree_depth=2)

    @step
    def first():
        commit = draft.push_to_hub("alice/draft", license="mit", tags=["tiny"], commit_message="the first")
        return {"url": str(commit.commit_url), "sha256": draft.config.weights_sha256}

    @step
    def branch():
        wide.push_to_hub("alice/draft", revision="wide")
        return wide.config.weights_sha256

    @step
    def secret():
        draft.push_to_hub("alice/secret", private=True, commit_description="hush")

    @step
    def pull_request():
        return wide.push_to_hub("alice/draft", create_pr=True).pr_url

    @step
    def while_saving():
        options = {"repo_id": "alice/saved", "private": True, "commit_message": "from save", "revision": "dev"}
        draft.save_pretrained(folder / "draft", push_to_hub=True, **options)

    @step
    def shards_replace_a_whole_file():
        draft.push_to_hub("alice/sharded")
        wide.push_to_hub("alice/sharded", max_shard_size="20KB")
        return wide.config.weights_sha256

    @step
    def command_line():
        summary = {"tasks": {"qa": {"tau": 2.5, "speedup": 1.25}, "math": {"tau": 3.5}}, "machine": "a | b"}
        (folder / "results.json").write_text(json.dumps({"rows": [], "summary": summary}))
        (folder / "draft" / "training.json").write_text(json.dumps({"steps": 10, "data": ["a", "b|c"]}))
        (folder / "draft" / "optimizer.bin").write_bytes(b"stays here")
        options = ["--results", str(folder / "results.json"), "--dataset", "alice/rows", "--private"]
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            code = cli.main(["push", str(folder / "draft"), "--repo-id", "alice/card", *options])
        return code, printed.getvalue()

    @step
    def custom_generate():
        assert cli.main(["export-custom-generate", str(folder / "fspad-generate")]) == 0
        HfApi().create_repo("alice/fspad-generate")
        HfApi().upload_folder(repo_id="alice/fspad-generate", folder_path=folder / "fspad-generate")

    @step
    def eagle():
        weights = reference.weights_of("vicuna", target.get_input_embeddings().weight)
        for kind in ("safetensors", "bin"):
            HfApi().create_repo(f"alice/eagle-{kind}")
            written = reference.write(folder / kind, "vicuna", weights, kind)
            HfApi().upload_folder(repo_id=f"alice/eagle-{kind}", folder_path=written)


def consume(step, folder: Path) -> None:
    """Everything that somebody without an account and with an empty cache does."""
    from huggingface_hub import HfApi
    from transformers import AutoModelForCausalLM, pipeline

    import fspad_hf
    import fspad_hf_cli as cli
    from fspad_hf import FSPADDraftModel
    from fspad_hf.host import note_commit

    from .conversion import reference

    def load(name, **kwargs):
        draft = FSPADDraftModel.from_pretrained(name, **kwargs)
        assert type(draft) is FSPADDraftModel and not draft.training
        return {
            "sha256": draft.config.weights_sha256,
            "depth": draft.speculation_config.tree_depth,
            "sum": _sum(draft),
        }

    def generates(target, draft):
        plain = target.generate(IDS, max_new_tokens=12)
        output = target.generate(IDS, max_new_tokens=12, assistant_model=draft, return_dict_in_generate=True)
        return torch.equal(plain, output.sequences) and output.speculation is not None

    @step
    def after_a_killed_download():
        return load("alice/draft")

    @step
    def auto():
        return _sum(AutoModelForCausalLM.from_pretrained("alice/draft"))

    @step
    def pair():
        target, tokenizer, draft = FSPADDraftModel.load_pair("alice/draft", dtype=torch.float64)
        assert (target.dtype, draft.dtype) == (torch.float64, torch.float64) and not target.training
        return target.name_or_path, tokenizer.decode([20, 21]), generates(target, draft)

    @step
    def commits():
        places = ("alice/target", str(folder / "saved"))
        AutoModelForCausalLM.from_pretrained("alice/target").save_pretrained(places[1])
        return [note_commit(AutoModelForCausalLM.from_pretrained(place)).config._commit_hash for place in places]

    @step
    def pipelines():
        texts = []
        for kwargs in ({}, {"assistant_model": "alice/draft"}):
            torch.manual_seed(0)
            pipe = pipeline("text-generation", model="alice/target", **kwargs)
            texts.append(pipe("abcab", max_new_tokens=12, do_sample=True))
        assert type(pipe.assistant_model) is FSPADDraftModel
        return texts[0] == texts[1]

    @step
    def revision():
        _, _, draft = FSPADDraftModel.load_pair("alice/draft", revision="wide")
        return load("alice/draft", revision="wide"), draft.speculation_config.tree_depth

    @step
    def no_token():
        load("alice/secret")

    @step
    def token():
        target, _, draft = FSPADDraftModel.load_pair("alice/hidden-draft", token=TOKEN)  # of a hidden target
        return load("alice/secret", token=TOKEN), generates(target, draft)

    @step
    def subfolder():
        target, _, draft = FSPADDraftModel.load_pair("alice/many", subfolder="drafts/one")
        return load("alice/many", subfolder="drafts/one"), generates(target, draft)

    @step
    def cache_dir():
        places = {"cache_dir": folder / "elsewhere"}
        online = FSPADDraftModel.load_pair("alice/draft", **places)
        offline = FSPADDraftModel.load_pair("alice/draft", **places, local_files_only=True)
        cached = [path.relative_to(folder / "elsewhere") for path in (folder / "elsewhere").glob("*/snapshots/*/*")]
        files = [(path.parts[0].removeprefix("models--"), path.name) for path in cached]
        return _sum(online[2]) == _sum(offline[2]), files

    @step
    def local_files_only():
        drafts = {"alice/draft": {}, "alice/many": {"subfolder": "drafts/one"}}
        return [load(name, local_files_only=True, **where)["sha256"] for name, where in drafts.items()]

    @step
    def converted():
        weights = reference.weights_of("vicuna")
        embeds, features = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(3))
        expected = reference.forward("vicuna", weights, embeds, features)
        same = []
        for kind in ("safetensors", "bin"):
            options = ["--target", "alice/target", "--output", str(folder / kind), "--allow-pickle", "--strict"]
            assert cli.main(["convert", f"alice/eagle-{kind}", *options]) == 0
            target, _, draft = FSPADDraftModel.load_pair(folder / kind)
            with torch.no_grad():
                out = draft(inputs_embeds=embeds[None], features=features[None])
            same.append(torch.allclose(out.features[0], expected[1], atol=1e-4) and generates(target, draft))
        return same

    @step
    def cache_dir_empty():
        FSPADDraftModel.load_pair("alice/draft", cache_dir=folder / "nowhere", local_files_only=True)

    @step
    def cut_connection():
        return load("alice/cut")

    @step
    def sharded():
        return load("alice/sharded")

    for name in ("changed", "truncated", "bad-shard"):
        step(lambda name=name: load(f"alice/{name}"), name)
    step(lambda: load("alice/many", subfolder="drafts/changed"), "changed_subfolder")
    step(lambda: FSPADDraftModel.load_pair("alice/changed-pair"), "changed_pair")
    step(lambda: AutoModelForCausalLM.from_pretrained("alice/changed"), "changed_auto")
    step(lambda: pipeline("text-generation", "alice/target", assistant_model="alice/changed"), "changed_pipeline")
    step(lambda: load("alice/nobody"), "missing")
    step(lambda: load("alice/draft", revision="nowhere"), "missing_revision")
    step(lambda: FSPADDraftModel.load_pair("alice/target"), "no_draft")
    step(lambda: load("alice/down"), "down")
    HfApi().list_repo_refs("alice/down")  # which is what this hub waits for
    step(lambda: load("alice/down"), "up_again")
    assert fspad_hf.__file__.startswith(os.getcwd())


def offline(step, folder: Path) -> None:
    """The consumer's cache, and HF_HUB_OFFLINE=1."""
    from transformers import pipeline

    from fspad_hf import FSPADDraftModel, loading

    @step
    def pair():
        _, tokenizer, draft = FSPADDraftModel.load_pair("alice/draft")
        return tokenizer.decode([20, 21]), _sum(draft)

    @step
    def pipelines():
        pipe = pipeline("text-generation", "alice/target", assistant_model="alice/draft")
        return type(pipe.assistant_model).__name__, len(pipe("abcab", max_new_tokens=4))

    @step
    def commands():
        models = loading.load_models(draft="alice/draft", device="cpu", dtype="float32")
        return (
            models.target_name,
            models.target.name_or_path,
            models.draft.speculation_settings(models.target.device).tree,
        )

    step(lambda: FSPADDraftModel.load_pair("alice/nobody"), "missing")

    @step
    def changed_in_the_cache():
        from huggingface_hub import hf_hub_download

        path = Path(hf_hub_download("alice/draft", "model.safetensors")).resolve()
        path.write_bytes(path.read_bytes()[:-1] + b"\xff")
        FSPADDraftModel.from_pretrained("alice/draft")


def _sum(model) -> float:
    return sum(float(p.double().sum()) for p in model.parameters())


def main() -> None:
    results = {}

    def step(run, name=None):
        try:
            results[name or run.__name__] = run()
        except Exception as error:
            results[name or run.__name__] = {"error": type(error).__name__, "message": str(error)}

    torch.set_num_threads(1)
    sleep = time.sleep
    time.sleep = lambda seconds: sleep(min(seconds, 0.01))  # the client's waits between its tries
    constants.DOWNLOAD_CHUNK_SIZE = CHUNK  # it writes whole chunks only, of 10 MB: more than these weights
    parts = {"publish": publish, "consume": consume, "offline": offline}
    parts[sys.argv[1]](step, Path(sys.argv[2]))
    print("\n" + json.dumps(results))


if __name__ == "__main__":
    main()
