"""Fitting coupled drafting to a draft: how far to trust its log-probabilities, and how sure to be of the outcome.

A coupled child is chosen by argmax(a log q - log E) and believed in by softmax(kappa (a log q - log E)). Were the
draft q the target p, a = 1 would be right, and any kappa too small. A draft hedges where the target knows, so a
sharper q (a > 1) guesses more draws, and a smaller kappa admits that it is a guess. Both are fitted by maximum
likelihood of draws at T = 1 on held-out text; nothing is decoded.

Legend: p the target's distribution, q the draft's, E a row of Exp(1) noise, x = argmax(log p - log E) the draw.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from ..demo_target import DRAFT_NAME
from ..generation.drafting import coupled_scores
from ..generation.probe import probe
from ..loading import load_models
from ..modeling_fspad import FSPADDraftModel
from ..runtime import status
from ..speculation_config import FILE
from .data import load_training_rows
from .losses import places_of
from .targets import LOGITS_AT_ONCE

SHARPNESS = (0.8, 1.0, 1.15, 1.3, 1.5, 1.75, 2.0, 2.5)
KAPPA = (0.4, 0.5, 0.6, 0.7, 0.8, 1.0, 1.3, 2.0, 4.0)


@torch.no_grad()
def fit_coupling(
    draft: FSPADDraftModel,
    target: PreTrainedModel,
    rows: torch.LongTensor,
    masks: torch.BoolTensor,
    positions: int = 2048,
    seed: int = 0,
) -> dict[str, float]:
    """
    Sets `coupling_sharpness` and `coupling_kappa` of the draft's settings to the values under which draws at T = 1 are
    likeliest.

    Args:
        rows (`[rows, length]`), masks (`[rows, length]`): held-out text that the target wrote at T = 1 (a colder text
            asks for less sharpness), and True on the assistant's tokens.
        positions: draw at about so many of those tokens, evenly spread.

    Returns:
        sharpness, kappa, positions, the share of draws that the first child is right about: hit (fitted), hit_before
        (with the values the draft came with), hit_uncoupled; and gain, the log-likelihood of a draw (nats) above that
        under the values the draft came with, each half of the rows by what fits the other half, with twice its
        standard error over rows, gain_error.

    Raises:
        ValueError: the masks keep nothing.
    """
    total = int(masks[:, 2:].sum())
    if not total:
        raise ValueError(f"Nothing to fit coupled drafting on: {len(rows)} rows without a token of the assistant's.")
    settings = draft.speculation_settings()
    before = (float(settings.coupling_sharpness), float(settings.coupling_kappa))
    grid = list(dict.fromkeys([before, *((a, k) for a in SHARPNESS for k in KAPPA)]))
    table = []  # [rows, grid]: log-likelihoods
    hits = dict.fromkeys([a for a, _ in grid], 0)
    uncoupled = seen = 0
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for p, q in _distributions(draft, target, rows, masks, max(total // positions, 1)):
            noise = torch.empty_like(p).exponential_().clamp(min=torch.finfo(p.dtype).tiny)
            x = (p / noise).argmax(-1, keepdim=True)
            seen += len(x)
            if draft.draft_vocab_ids is not None:  # a token that is not drafted is missed under all values
                x = places_of(x, draft.draft_vocab_ids, p.shape[1])
                drafted = x[:, 0] >= 0
                q, noise, x = q[drafted], noise[drafted][:, draft.draft_vocab_ids], x[drafted]
            uncoupled += int((q.argmax(-1, keepdim=True) == x).sum())
            likelihood = {}
            for a in hits:
                race = coupled_scores(q, noise, a, 1.0)
                hits[a] += int((race.argmax(-1, keepdim=True) == x).sum())
                for k in (k for sharpness, k in grid if sharpness == a):
                    scores = k * race
                    likelihood[a, k] = float((scores.gather(1, x)[:, 0] - scores.logsumexp(-1)).double().sum())
            table.append([likelihood[values] for values in grid])
    table = torch.tensor(table, dtype=torch.float64)
    sharpness, kappa = grid[int(table.sum(0).argmax())]
    halves = [(table[half::2], int(table[1 - half :: 2].sum(0).argmax())) for half in (0, 1)]
    gains = torch.cat([mine[:, fitted] - mine[:, 0] for mine, fitted in halves])
    draft.speculation_config.update(coupling_sharpness=sharpness, coupling_kappa=kappa)
    return {
        "sharpness": sharpness, "kappa": kappa, "positions": seen, "hit": hits[sharpness] / seen,
        "hit_before": hits[before[0]] / seen, "hit_uncoupled": uncoupled / seen,
        "gain": float(gains.sum()) / seen,
        "gain_error": 2 * float(gains.std(correction=0)) * math.sqrt(len(gains)) / seen,
    }  # fmt: skip


def _distributions(draft, target, rows, masks, stride: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """p `[positions, V]` and log q `[positions, drafted]` at every `stride`-th masked position, a row at a time."""
    found = probe(target)
    view = found.view(target)
    most = max(LOGITS_AT_ONCE // target.config.get_text_config().vocab_size, 1)  # of a row
    for ids, mask in zip(rows.to(target.device).split(1), masks.to(target.device).split(1), strict=True):
        at = mask[0, 2:].nonzero()[::stride, 0]  # the draft's output t is about token t + 2
        at = at[:: -(-len(at) // most) or 1]
        if not len(at):
            continue
        features = target.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
        inputs = view.embed(ids[:, 1:]).to(draft.device, draft.dtype), features[:, :-1].to(draft.device, draft.dtype)
        drafted = draft(*inputs).logit_features[0, at.to(draft.device)].to(features)
        q = view.draft_logits(drafted, draft.draft_vocab_ids).float().log_softmax(-1)
        yield view.draft_logits(features[0, at + 1]).float().softmax(-1), q


def run_calibration(
    target: str | None, draft: str, data: Sequence[str], rows: int, positions: int, seed: int = 0,
    device: str | None = None, dtype: str | None = None,
) -> dict[str, float]:  # fmt: skip
    """
    `fspad-hf calibrate`: [`fit_coupling`] on the last rows of `data`. The draft's settings are saved if the
    fitted values gain more than their `gain_error`, else left as it is.

    Args:
        draft: the draft's folder; not the one that came with the package.
        data: rows of token ids, see [`load_training_rows`].
        rows: use so many rows, from the end, where [`run_training`] holds some out.
    """
    from rich.console import Console

    _check_folder(draft)
    if rows < 2:
        raise ValueError(f"rows={rows} leaves no text to fit to and to check the fit on: expected 2 or more.")
    models = load_models(target, draft, device, dtype)
    vocab_size = models.target.config.get_text_config().vocab_size
    found = load_training_rows(data, models.tokenizer, vocab_size=vocab_size, last=rows)
    if found.segments is not None:
        raise ValueError(f"data={list(data)} are conversations: expected rows of token ids; write them with selfplay.")
    settings = models.draft.speculation_settings()
    before = {"sharpness": settings.coupling_sharpness, "kappa": settings.coupling_kappa}
    with status(f"Drawing at {positions} tokens of {len(found)} rows"):
        fitted = fit_coupling(models.draft, models.target, found.ids, found.mask, positions, seed)
    better = fitted["gain"] > fitted["gain_error"] and any(fitted[name] != before[name] for name in before)
    if better:
        models.draft.speculation_config.save_pretrained(models.draft_name)
    kept = "written" if better else f"left as it is, no gain over its {_listed(before)}"
    line = f"{models.draft_name}/{FILE}: {_listed(fitted)}: {kept}"
    Console().print(line, highlight=False, markup=False, soft_wrap=True)
    return fitted


def _listed(values: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in values.items())


def _check_folder(draft: str) -> None:
    if not Path(draft).is_dir():
        raise ValueError(f"draft={draft!r} is not a folder: expected a local draft, whose {FILE} is rewritten.")
    folder, package = Path(draft).resolve(), Path(__file__).resolve().parents[1]
    if package in folder.parents or folder == package.parent / "hub_cards" / DRAFT_NAME:
        raise ValueError(
            f"draft={draft!r} is the draft that came with fspad_hf, and stays as it is: copy it (cp -r {draft} "
            "my-draft) and pass the copy, --draft my-draft."
        )
