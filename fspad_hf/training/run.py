"""`fspad-hf train`: a draft for a target, from rows of token ids."""

from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..loading import load_models
from ..modeling_fspad import FSPADDraftModel
from ..pretrained import draft_config
from ..runtime import status, write_file
from .coupling import fit_coupling
from .data import load_token_rows, span_mask
from .trainer import TargetFeatures, TrainingConfig, train, warm_start

HELD_OUT_ROWS = 512  # the last rows of the data are never trained on
WARM_START_ROWS = 128


def run_training(
    target: str,
    data: list[str],
    config: TrainingConfig,
    rows: int | None = None,
    keep_features: bool = False,
    linear_start: bool = True,
    draft_vocab_size: int | None = None,
    draft_overrides: dict | None = None,
    target_name: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> FSPADDraftModel:
    """
    Trains a draft for `target` and saves it, with the target's tokenizer, in `config.output_dir`.

    Args:
        target: path or Hub id; its chat template tells which tokens are the assistant's.
        data: .npy files of token ids, `[rows, length]`, or folders of them.
        rows: train on so many, chosen by `config.seed`; default all but the held-out last 512.
        keep_features: hold the target's features in memory (2 h bytes a token) for later epochs.
        linear_start: begin at the best linear guess, see [`warm_start`].
        draft_vocab_size: draft only the most frequent ids of the data.
        draft_overrides: other fields of [`FSPADConfig`].
        target_name: what the draft's config names as its target, if not `target`.
    """
    from rich.console import Console

    console = Console()
    tokenizer = AutoTokenizer.from_pretrained(target)
    opening, closing = assistant_span(tokenizer)
    tokens = load_token_rows(data)
    available = max(len(tokens) - HELD_OUT_ROWS, 0)
    if rows is not None and rows > available:
        raise ValueError(f"rows={rows}, but the data has {available} (and {HELD_OUT_ROWS} held out).")
    chosen = np.random.default_rng(config.seed).permutation(available)[:rows]
    ids = torch.from_numpy(tokens[chosen].astype(np.int64))
    masks = span_mask(ids, opening, closing)
    model = AutoModelForCausalLM.from_pretrained(target, dtype=dtype)
    if len(ids) and int(ids.max()) >= model.config.get_text_config().vocab_size:
        raise ValueError(f"The data holds token id {int(ids.max())}: it was made with another target's tokenizer.")
    torch.manual_seed(config.seed)
    draft = FSPADDraftModel.from_target(model, **(draft_overrides or {}), draft_vocab_size=draft_vocab_size).float()
    if draft.config.draft_vocab_size is not None:
        draft.draft_vocab_ids = frequent_ids(tokens[:available], draft.config.draft_vocab_size)
    if target_name:
        draft.config.target_name_or_path = target_name
    features = TargetFeatures(model, keep=keep_features)
    if linear_start and not (Path(config.output_dir) / "checkpoint").exists():
        batches = [list(range(i, min(i + 8, len(ids)))) for i in range(0, min(WARM_START_ROWS, len(ids)), 8)]
        warm_start(draft, model.get_input_embeddings(), ((ids[b], features(b, ids[b])) for b in batches))

    def report(record: dict):
        values = "  ".join(f"{k} {record[k]:.3f}" for k in ("loss", "feature", "logit", "top1"))
        console.print(f"step {record['step']}/{config.steps}  {values}", highlight=False)

    console.print(
        f"{len(ids)} rows of {ids.shape[1]}, {float(masks.float().mean()):.0%} in the loss; {asdict(config)}"
    )
    return train(draft, model, ids, masks, config, features, report, tokenizer)


def run_calibration(
    target: str | None, draft: str | None, data: list[str], rows: int, positions: int, seed: int = 0,
    device: str | None = None, dtype: str | None = None,
) -> dict[str, float]:  # fmt: skip
    """
    `fspad-hf calibrate`: [`fit_coupling`] on the last rows of `data`; the draft's config.json is rewritten.

    Args:
        draft: the draft's folder.
        rows: use so many rows, from the end: those that [`run_training`] holds out.
    """
    from rich.console import Console

    if draft is not None and not Path(draft).is_dir():
        raise ValueError(f"draft={draft!r} is not a folder: expected a local draft, whose config.json is rewritten.")
    if rows < 1:
        raise ValueError(f"rows={rows} leaves no text to fit to: expected 1 or more.")
    tokens = torch.from_numpy(load_token_rows(data)[-rows:].astype(np.int64))
    models = load_models(target, draft, device, dtype, cpu_tree=False)
    masks = span_mask(tokens, *assistant_span(models.tokenizer))
    with status(f"Drawing at {positions} tokens of {len(tokens)} rows"):
        fitted = fit_coupling(models.draft, models.target, tokens, masks, positions, seed)
    config = draft_config(models.draft_name)
    config.coupling_sharpness, config.coupling_kappa = fitted["sharpness"], fitted["kappa"]
    write_file(Path(models.draft_name) / "config.json", config.to_json_string())
    values = "  ".join(f"{name} {value:.3g}" for name, value in fitted.items())
    Console().print(f"{models.draft_name}/config.json: {values}", highlight=False, soft_wrap=True)
    return fitted


def frequent_ids(tokens: np.ndarray, count: int) -> torch.LongTensor:
    """The `count` most frequent ids of `tokens`, ascending; ties and ids never seen go to the smaller id."""
    counts = np.bincount(tokens.ravel(), minlength=count)
    return torch.from_numpy(np.sort(np.argsort(-counts, kind="stable")[:count]))


def assistant_span(tokenizer) -> tuple[list[int], list[int]]:
    """
    The ids that open an assistant's turn in the tokenizer's chat template, and those that close it.

    Raises:
        ValueError: no chat template, or one that adds no generation prompt.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("The target's tokenizer has no chat template: expected one that marks the assistant's turns.")
    chat = [{"role": "user", "content": "x"}]
    without = tokenizer.apply_chat_template(chat, tokenize=False)
    prompted = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    if prompted == without or not prompted.startswith(without):
        raise ValueError(
            "The target's chat template adds no generation prompt: the assistant's turns cannot be found."
        )
    opening = tokenizer.encode(prompted[len(without) :], add_special_tokens=False)
    return opening, [tokenizer.eos_token_id]
