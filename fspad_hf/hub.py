"""Drafts on the Hub: a folder becomes a repository, in one commit."""

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RevisionNotFoundError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError

from .cards import count_parameters, make_card, read_provenance, read_results
from .configuration_fspad import FSPADConfig
from .speculation_config import FILE
from .weights import INDEX, check_weights, is_weights, weight_files

CARD, PROVENANCE = "README.md", "training.json"
UPLOADED = (  # besides the weights: what loading reads, and what tells where the draft comes from
    "config.json", FILE, "generation_config.json", INDEX, "tokenizer*.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "*.model", "chat_template.*",
    "additional_chat_templates/*.jinja",
    PROVENANCE, "LICENSE*",
)  # fmt: skip


def push_folder(
    folder: str | os.PathLike,
    repo_id: str | None = None,
    *,
    target_name: str | None = None,
    results: str | os.PathLike | None = None,
    license: str | None = None,
    datasets: list[str] | None = None,
    tags: list[str] | None = None,
    overwrite_card: bool = False,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    dry_run: bool = False,
) -> CommitInfo | list[CommitOperationAdd]:
    """
    Uploads a draft's folder in one commit: configuration, weights, tokenizer, provenance and a model card.

    A README.md in the folder is uploaded as it is; without one, the card that the repository already has is kept, and
    a new repository gets one made from the template. Weights in the repository that the new ones replace under other
    names are deleted. Everything that can be checked without the Hub is checked before it is asked for anything.

    Args:
        folder: what [`FSPADDraftModel.save_pretrained`] wrote; a flat training.json in it goes into the card.
        repo_id: `user/name`, or a name among the user's own repositories; by default the folder's name.
        target_name: the target's Hub id, for a draft whose configuration names a local folder.
        results: a JSON file with a `summary`, see [`read_results`]; tau and speed-up go into the card's model-index.
        license, datasets, tags: for the card's metadata; `tags` are added to this package's own.
        overwrite_card: make a new card even where there is one.
        commit_message, commit_description, private, token, revision, create_pr: as for
            `PreTrainedModel.push_to_hub`.
        dry_run: ask the Hub for nothing, and return what a new repository would be given.

    Raises:
        ValueError: the folder, an argument or a file that goes into the card is wrong.
        OSError: the weights are damaged, or the Hub cannot be reached or refuses.
    """
    folder = Path(folder)
    repo_id = repo_id or folder.resolve().name
    _check_repo_id(repo_id)
    config = _whole_draft(folder)
    target_name = check_target_name(target_name or config.target_name_or_path, given=target_name is not None)
    measured = None if results is None else read_results(results)
    provenance = read_provenance(folder / PROVENANCE) if (folder / PROVENANCE).exists() else {}
    local_card = (folder / CARD).is_file() and not overwrite_card
    if local_card and measured:
        raise ValueError(_kept_card(folder / CARD, results))
    about = {"license": license, "datasets": datasets, "tags": tags, "revision": revision}

    def card() -> CommitOperationAdd:
        if local_card:
            return CommitOperationAdd(CARD, folder / CARD)
        made = make_card(folder, repo_id, config, target_name, measured, provenance, **about)
        return CommitOperationAdd(CARD, str(made).encode())

    if dry_run:
        return [*_operations(folder, set(), target_name), card()]
    api = HfApi(token=token, library_name="fspad_hf")
    with _one_error(repo_id):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        remote = _remote_files(api, repo_id, revision)
        remote_card = CARD in remote and not overwrite_card and not local_card
        if remote_card and measured:
            raise ValueError(_kept_card(f"{repo_id}/{CARD}", results))
        operations = _operations(folder, remote, target_name)
        if local_card or not remote_card:
            operations.append(card())
        if revision is not None and not revision.startswith("refs/"):
            _create_branch(api, repo_id, revision, create_pr)
        return api.create_commit(
            repo_id,
            operations,
            commit_message=commit_message or "Upload FSPAD draft",
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
        )


def check_target_name(name: str | None, given: bool = False) -> str:
    """
    The name of a target that others can load: a Hub id, no folder of this machine. `ValueError` if it is none.

    Args:
        name: `target_name_or_path` of a draft's configuration, or what the user named in its place.
        given: the user named it, so that a folder of the same name here does not matter.
    """
    way_out = "name the target's Hub id: target_name (--target-name), or draft.config.target_name_or_path."
    if name is None:
        raise ValueError(f"The draft names no target, so nobody could use it: {way_out}")
    try:
        validate_repo_id(name)
        local = not given and Path(name).is_dir()
    except HFValidationError:
        local = True
    if local:
        raise ValueError(
            f"The draft's target {name!r} is a path on this machine, expected a Hub id that others can load; {way_out}"
        )
    return name


def _check_repo_id(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"repo_id={repo_id!r} is no Hub id: expected 'user/name' ({error}).") from error


def _whole_draft(folder: Path) -> FSPADConfig:
    """The configuration of the draft in `folder`, after checking that the draft is one that others can load."""
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{str(folder)!r} holds no draft (no config.json): expected a folder that save_pretrained or "
            "`fspad-hf train` wrote."
        )
    config, weights = FSPADConfig.from_pretrained(folder), weight_files(folder)
    if not weights:
        raise ValueError(f"{str(folder)!r} has no model.safetensors and no shards of one: save the draft again.")
    check_weights(weights, config.weights_sha256)
    try:
        count_parameters(weights)
    except SafetensorError as error:
        raise OSError(f"The weights in {str(folder)!r} are damaged ({error}): save the draft again.") from error
    return config


def _operations(folder: Path, remote: set[str], target_name: str) -> list[CommitOperationAdd | CommitOperationDelete]:
    """What makes the repository hold this folder's draft, card aside."""
    paths = {path for pattern in UPLOADED for path in folder.glob(pattern) if path.is_file()}
    added = {path.relative_to(folder).as_posix(): path for path in sorted({*paths, *weight_files(folder)})}
    config = {**json.loads((folder / "config.json").read_text()), "target_name_or_path": target_name}
    added["config.json"] = (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
    # transformers would load the old weights rather than the new ones under other names
    replaced = sorted(
        name for name in remote - added.keys() if name == INDEX or ("/" not in name and is_weights(name))
    )
    return [
        *(CommitOperationAdd(name, content) for name, content in added.items()),
        *(CommitOperationDelete(name) for name in replaced),
    ]


def _remote_files(api: HfApi, repo_id: str, revision: str | None) -> set[str]:
    """The files that a commit to `revision` starts from."""
    try:
        return set(api.list_repo_files(repo_id, revision=revision))
    except RevisionNotFoundError:  # a branch yet to be made, from the default one
        return set(api.list_repo_files(repo_id))


def _create_branch(api: HfApi, repo_id: str, revision: str, create_pr: bool) -> None:
    try:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    except HfHubHTTPError as error:  # whoever may not write can still open a pull request against a branch
        if not create_pr or error.response.status_code != 403:
            raise


def _kept_card(card: str | os.PathLike, results: str | os.PathLike) -> str:
    return (
        f"results={str(results)!r} would not be shown: {str(card)!r} is there already and is kept. Put them there by "
        "hand, or have a new card made with overwrite_card=True (--overwrite-card)."
    )


@contextlib.contextmanager
def _one_error(repo_id: str) -> Iterator[None]:
    """Whatever the Hub or the way to it refuses becomes one `OSError` with the way out."""
    way_out = {
        401: "log in with `hf auth login`, or pass a valid token",
        403: "pass a token that may write there, or push with create_pr=True (--create-pr)",
        404: "check the name, and that the token may see it",
    }
    try:
        yield
    except HfHubHTTPError as error:
        code = error.response.status_code if error.response is not None else None
        said = getattr(error, "server_message", None) or str(error).strip().splitlines()[0]
        raise OSError(
            f"The Hub did not take {repo_id!r} (HTTP {code}: {said}): {way_out.get(code, 'try again later')}."
        ) from error
    except _transport_errors() as error:
        raise OSError(
            f"The Hub could not be reached to push {repo_id!r} ({type(error).__name__}: {error}): go online, and push "
            "again; nothing was committed."
        ) from error


def _transport_errors() -> tuple[type[Exception], ...]:
    """What the HTTP client raises: huggingface_hub has changed clients, and either may be the one that it uses."""
    return tuple(sys.modules[name].TransportError for name in ("httpx", "httpx2") if name in sys.modules)
