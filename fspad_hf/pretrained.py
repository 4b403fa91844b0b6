"""Saving, loading and pushing drafts: what [`FSPADDraftModel`] is besides a network."""

import os
import tempfile
import warnings
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import transformers
from safetensors import SafetensorError
from transformers import AutoTokenizer, PreTrainedModel

from .configuration_fspad import FSPADConfig
from .host import load_target
from .speculation_config import FIELDS, SpeculationConfig
from .weights import INDEX, check_weights, fingerprint, weight_files

PUSH_OPTIONS = (
    "commit_message", "commit_description", "private", "token", "revision", "create_pr", "tags", "license", "datasets",
    "results", "overwrite_card", "target_name",
)  # fmt: skip


HUB_OPTIONS = ("revision", "subfolder", "token", "cache_dir", "local_files_only")


class FSPADPreTrainedModel(PreTrainedModel):
    """A draft as transformers and the Hub know it; its weights are checked against the sha256 in its config.json."""

    config_class = FSPADConfig
    base_model_prefix = ""
    main_input_name = "inputs_embeds"
    _supports_sdpa = True
    _supports_attention_backend = True
    _no_split_modules = ["FSPADDecoderLayer"]

    def can_generate(self) -> bool:
        return False  # it drafts; only its target generates

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """
        As `PreTrainedModel.from_pretrained` (`revision`, `token`, `cache_dir`, `subfolder`, `local_files_only`, ...),
        safetensors only. A weight that the file lacks is an error, and so is a file that is not the one saved with the
        configuration (`weights_sha256`), wherever it came from: a folder, the cache or the Hub. Fields of
        [`SpeculationConfig`] may be given, too: `tree_depth=4`.

        Raises:
            OSError: the weights are missing, damaged or not those of the configuration.
            ValueError: the file lacks a weight that the configuration asks for, or drafts ids that the target lacks.
        """
        settings = {name: kwargs.pop(name) for name in FIELDS if name in kwargs}
        saved = SpeculationConfig.from_pretrained(
            pretrained_model_name_or_path, **{name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
        )
        with_info = kwargs.pop("output_loading_info", False)
        kwargs["use_safetensors"] = True
        try:
            draft, info = super().from_pretrained(
                pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
            )
        except SafetensorError as error:
            raise OSError(
                f"The draft weights in {str(pretrained_model_name_or_path)!r} are damaged ({error}): expected a whole "
                "model.safetensors; download or save the draft again."
            ) from error
        if info["missing_keys"]:
            raise ValueError(
                f"{str(pretrained_model_name_or_path)!r} lacks the draft weights {sorted(info['missing_keys'])}, "
                "which its config.json asks for: the file is incomplete or belongs to another configuration; save the "
                "draft again, or convert the checkpoint it came from."
            )
        _check_ids(draft, pretrained_model_name_or_path)
        if not draft.__dict__.pop("_weights_checked", False) and draft.config.weights_sha256 is not None:
            warnings.warn(
                f"transformers {transformers.__version__} loads weights in a way that is not known here, so those "
                f"of {str(pretrained_model_name_or_path)!r} were not compared with weights_sha256 in its config.json: "
                "install a newer fspad_hf, or compare with sha256sum.",
                stacklevel=2,
            )
        draft.speculation_config.update(**asdict(saved)).update(**settings)
        return (draft, info) if with_info else draft

    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, *args, **kwargs):
        # Only here are the very files known that will be read: revision, subfolder, cache and shards are resolved,
        # and Auto classes and pipelines come this way too. It is private to transformers, so `from_pretrained` makes
        # sure that it was called.
        check_weights(checkpoint_files, model.config.weights_sha256)
        model._weights_checked = True
        return PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, *args, **kwargs)

    @classmethod
    def load_pair(
        cls,
        draft: str | os.PathLike,
        *,
        target: str | os.PathLike | None = None,
        revision: str = "main",
        subfolder: str = "",
        dtype="auto",
        token: str | bool | None = None,
        cache_dir: str | os.PathLike | None = None,
        local_files_only: bool = False,
        trust_remote_code: bool = False,
        **target_kwargs,
    ):
        """
        A draft with the target that its configuration names: all that `generate` needs.

        The draft is loaded first, so a damaged one costs no download of its target; it ends in the target's dtype and
        on the device of the target's LM head.

        Args:
            draft: path or Hub id.
            target: path or Hub id of another target than the one named, such as a local copy or a fine-tune of it.
            revision, subfolder: of the draft; the target is read at its default branch.
            dtype: of target and draft; by default what the target was saved in.
            token, cache_dir, local_files_only: for target, tokenizer and draft alike.
            trust_remote_code: run code from the target's repository, where its model or tokenizer needs it; never
                asked on stdin, for it may be the draft that names the target.
            target_kwargs: whatever else the target's `from_pretrained` takes: `device_map`, `attn_implementation`, ...

        Returns:
            `(target, tokenizer, draft)`, both models in eval mode.

        Raises:
            ValueError: `draft` is no FSPAD draft, or names no target and none is passed.
            OSError: one of them cannot be had, or the draft's weights are damaged.
        """
        hub = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        own = {**hub, "revision": revision, "subfolder": subfolder}
        config = FSPADConfig.from_pretrained(draft, **own)
        name = target if target is not None else named_target(draft, config)
        loaded_draft = cls.from_pretrained(draft, config=config, **own)
        hub["trust_remote_code"] = trust_remote_code
        tokenizer = AutoTokenizer.from_pretrained(name, **hub)
        model = load_target(name, dtype=dtype, **hub, **target_kwargs)
        head = getattr(model.get_output_embeddings(), "weight", None)
        device = model.device if head is None else head.device
        loaded_draft = loaded_draft.to(model.dtype)
        return model, tokenizer, loaded_draft if device.type == "meta" else loaded_draft.to(device)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        *,
        tokenizer=None,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **kwargs,
    ):
        """
        Writes config.json, model.safetensors (the draft's own weights) and the target's tokenizer files.

        Files are written to a hidden folder in the output and renamed one by one, so an interrupted save leaves the
        old ones standing. The sha256 of the weights goes into config.json as `weights_sha256`, see
        [`fspad_hf.weights.fingerprint`].

        Args:
            save_directory: the folder; made if need be.
            tokenizer: the target's tokenizer; by default read from `config.target_name_or_path`, or from where the
                draft came. Without one the draft is saved all the same, with a warning: a pipeline cannot load it
                from a string.
            push_to_hub: push the folder afterwards, see [`fspad_hf.hub.push_folder`].
            repo_id: where to; by default the folder's name, among the user's own repositories.
            kwargs: as for [`push_folder`] and for `PreTrainedModel.save_pretrained`.
        """
        save_directory = Path(save_directory)
        if save_directory.is_file():
            raise ValueError(
                f"save_directory={str(save_directory)!r} is a file: expected a folder to save the draft in."
            )
        push = {name: kwargs.pop(name) for name in PUSH_OPTIONS if name in kwargs}
        if push_to_hub:
            self._check_push(push)
        save_directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=save_directory, prefix=".partial-") as partial:
            super().save_pretrained(partial, **kwargs)
            if (Path(partial) / "config.json").exists():  # of several processes only the main one writes
                written = weight_files(partial) or weight_files(save_directory)  # a variant leaves the main file be
                self.config.weights_sha256 = fingerprint(written)
                self.config.save_pretrained(partial)
                self.speculation_config.save_pretrained(partial)
            if tokenizer is None:
                tokenizer = _find_tokenizer(self.config.target_name_or_path, self.name_or_path, push.get("token"))
            if tokenizer is not None:
                tokenizer.save_pretrained(partial)
            _replace_files(Path(partial), save_directory)
        if push_to_hub:
            from .hub import push_folder

            push_folder(save_directory, repo_id, **push)

    def push_to_hub(self, repo_id: str, *, tokenizer=None, max_shard_size: int | str = "50GB", **kwargs):
        """
        Uploads the draft, the target's tokenizer and a model card: `draft.push_to_hub("user/name")`.

        Args:
            repo_id: `user/name`, or a name among the user's own repositories; made if need be.
            tokenizer: see [`save_pretrained`].
            max_shard_size: weights above it are split into several files.
            kwargs: `commit_message`, `commit_description`, `private`, `token`, `revision`, `create_pr`, `tags`, as
                `PreTrainedModel.push_to_hub` has them, and those of the card: see [`fspad_hf.hub.push_folder`].

        Returns:
            `huggingface_hub.CommitInfo`.

        Raises:
            ValueError: an argument is wrong, or the configuration names no target that others could load.
            OSError: the Hub cannot be reached, or refuses.
        """
        from .hub import push_folder

        self._check_push(kwargs)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(
                Path(folder) / "draft", tokenizer=tokenizer, max_shard_size=max_shard_size, token=kwargs.get("token")
            )
            return push_folder(Path(folder) / "draft", repo_id, **kwargs)

    def _check_push(self, options: dict) -> None:
        from .hub import check_target_name

        unknown = sorted(options.keys() - set(PUSH_OPTIONS))
        if unknown:
            raise ValueError(f"push_to_hub takes no {unknown}: expected any of {sorted(PUSH_OPTIONS)}.")
        name = options.get("target_name")
        check_target_name(name or self.config.target_name_or_path, given=name is not None)


def named_target(draft: str | os.PathLike, config: FSPADConfig) -> str:
    """The target that a draft's configuration names; `ValueError` if it names none."""
    if config.target_name_or_path is None:
        raise ValueError(
            f"The draft {str(draft)!r} names no target: expected target_name_or_path in its config.json; pass the "
            "model that it was trained for (target=..., on the command line --target)."
        )
    return config.target_name_or_path


def _check_ids(draft: FSPADPreTrainedModel, name: str | os.PathLike) -> None:
    """What indexes the target's embedding and head: an id out of range would only fail in the middle of a call."""
    if draft.draft_vocab_ids is None or draft.device.type == "meta":
        return
    ids, end = draft.draft_vocab_ids.tolist(), draft.config.vocab_size
    wrong = [token for token, times in Counter(ids).items() if times > 1 or token not in range(end)]
    if wrong:
        some = ", ".join(map(str, wrong[:5])) + (", ..." if len(wrong) > 5 else "")
        raise ValueError(
            f"draft_vocab_ids in model.safetensors of {str(name)!r} hold {some}: expected {len(ids)} different ids "
            f"from 0 to {end - 1}, the target's vocabulary; download the draft again, or train it again."
        )


def _replace_files(source: Path, folder: Path) -> None:
    """Moves every file of `source` to `folder`; weights there that the new ones replace under other names are gone."""
    replaced = {*weight_files(folder), *folder.glob(INDEX)} if weight_files(source) else set()
    for path in sorted(source.rglob("*")):
        if path.is_file():
            final = folder / path.relative_to(source)
            final.parent.mkdir(parents=True, exist_ok=True)
            path.replace(final)
            replaced.discard(final)
    for path in replaced:  # a whole file left beside new shards would be loaded instead of them
        path.unlink()


def _find_tokenizer(target_name_or_path: str | None, draft_name_or_path: str | None, token=None):
    for name in filter(None, (target_name_or_path, draft_name_or_path)):
        try:
            return AutoTokenizer.from_pretrained(name, token=token, trust_remote_code=False)
        except Exception:  # whatever stands in the way, the draft itself can be saved
            continue
    warnings.warn(
        f"No tokenizer found at the target {target_name_or_path!r}: the draft is saved without one, and "
        "pipeline(assistant_model='path') will not load it. Pass `tokenizer=` to save_pretrained.",
        stacklevel=3,
    )
    return None
