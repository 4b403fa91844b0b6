"""How good a draft is on held-out text, at a bounded cost and without decoding.

The losses and the hits of the tree's first level come from one forward over true features. tau and the acceptance of
each depth come from the rounds of decoding, simulated over the known tokens: as at T = 0, and as at T = 1, where
coupled drafting sees the noise of the draws. That noise is drawn in hindsight (see [`hindsight_noise`]).

Legend: p the target's distribution, x the known token, E a row of Exp(1) noise, x = argmax(p / E) the draw.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from ..generation.probe import probe
from ..modeling_fspad import FSPADDraftModel
from .acceptance import KnownNoise, simulate
from .arguments import FSPADTrainingArguments
from .data import TrainingRows
from .losses import draft_outputs, places_of, step_losses
from .packing import continues
from .targets import FrozenTarget, module_device

HITS = (1, 3, 10)
SPAN_TOKENS = 128  # more of one answer tells less than some of another
ROWS_AT_ONCE = 4
POSITIONS_AT_ONCE = 512


@dataclass
class Span:
    """
    A stretch of one document that the assistant wrote.

    Args:
        ids (`[1, end]`): the document up to the end of the stretch.
        first: where the stretch begins; what is before is the prompt.
    """

    ids: torch.LongTensor
    first: int


@torch.no_grad()
def validate(
    draft: FSPADDraftModel,
    target: PreTrainedModel,
    rows: TrainingRows,
    args: FSPADTrainingArguments,
    part: int = 0,
    parts: int = 1,
    reduce: Callable[[torch.Tensor], torch.Tensor] = lambda sums: sums,
) -> dict[str, float]:
    """
    Measures a copy of `draft` in the target's dtype, beside its LM head.

    Args:
        rows: held-out text; at most `args.eval_rows` of it are read, about `args.eval_tokens` simulated.
        part, parts, reduce: measure one share of several, and how to add up the sums (`[sums]`, float64) of all.

    Returns:
        loss, feature, logit, top1 (draft and target name the same token); hit_1, hit_3, hit_10 (the known token is
        among the first k of the tree's first level); tau and acceptance_1, ... (depth d is accepted, given depth
        d - 1 was), and both again with `coupled_` before them; only what there were tokens for.
    """
    measured = copy.deepcopy(draft).eval().to(module_device(target.get_output_embeddings(), target.device))
    measured = measured.to(target.dtype)
    measured.speculation_config.coupled_drafting = True
    rows, depth = rows[: args.eval_rows], draft.speculation_settings().tree_depth
    sums, frozen = _Sums(depth), FrozenTarget(target, measured.device, args.target_top_k)
    for start in range(part * ROWS_AT_ONCE, len(rows), parts * ROWS_AT_ONCE):
        _teacher_forced(measured, frozen, rows[start : start + ROWS_AT_ONCE], sums)
    for number, span in enumerate(spans(rows, args.eval_tokens)):
        if number % parts == part:
            _simulated(measured, target, span, args.seed + number, sums)
    return sums.ratios(reduce, args)


def _teacher_forced(draft, frozen: FrozenTarget, rows: TrainingRows, sums: "_Sums") -> None:
    rows, drafted = rows.counted(), draft.draft_vocab_ids
    ids, mask = rows.ids.to(draft.device).long(), rows.mask.to(draft.device)
    segments = None if rows.segments is None else rows.segments.to(draft.device)
    known = frozen(ids, mask, segments)
    out = draft_outputs(draft, frozen, ids, known.features, segments)
    losses = step_losses([out], [mask[:, 1:]], known, frozen, drafted)[0]
    sums.add(**{name: float(getattr(losses, name)) for name in ("feature", "logit", "top1", "positions")})
    inside = torch.ones_like(mask[:, 1:-1]) if segments is None else continues(segments)[:, 1:-1]
    counted = mask[:, 2:] & inside  # the draft's output t is about token t + 2
    guesses, tokens = out.logit_features[:, :-1][counted], ids[:, 2:][counted]
    if drafted is not None:
        tokens = places_of(tokens, drafted, frozen.view.text_config.vocab_size)
    for some, truth in zip(guesses.split(POSITIONS_AT_ONCE), tokens.split(POSITIONS_AT_ONCE), strict=True):
        logits = frozen.logits(some, drafted).float()
        truth = truth.to(logits.device)[:, None]
        theirs = logits.gather(1, truth.clamp(min=0)).masked_fill(truth < 0, -torch.inf)
        ranks = (logits > theirs).sum(-1)
        sums.add(known=len(ranks), **{f"hit_{k}": int((ranks < k).sum()) for k in HITS})


def _simulated(draft, target, span: Span, seed: int, sums: "_Sums") -> None:
    found, depth = probe(target), draft.speculation_settings().tree_depth
    ids = span.ids.to(module_device(target.get_input_embeddings(), target.device))
    features = target.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    view = found.view(target)
    p = view.draft_logits(features[0, span.first - 1 : -1]).float().softmax(-1)
    noise = HindsightNoise(p, ids[0, span.first :].to(p.device), depth, seed)
    room = ids.shape[1] + depth + 1  # the text was cut here, decoding would have gone on: trees are as deep as ever
    for name, known in (("", None), ("coupled_", noise)):
        record = simulate(target, draft, ids, span.first, room, known, features=features)
        sums.add_rounds(name, record.accepted_lengths)


class HindsightNoise(KnownNoise):
    """
    Rows of noise under which known tokens are the draws: [`hindsight_noise`], and fresh rows after them.

    Args:
        p (`[tokens, V]`), tokens (`[tokens]`): the target's distributions, and what was drawn.
        more: how many fresh rows follow; a tree may look past the last known token.
    """

    def __init__(self, p: torch.Tensor, tokens: torch.LongTensor, more: int, seed: int):
        generator = torch.Generator(p.device).manual_seed(seed)
        fresh = torch.empty(more, p.shape[1], device=p.device).exponential_(generator=generator)
        self.rows = torch.cat((hindsight_noise(p, tokens, generator), fresh))


def hindsight_noise(p: torch.Tensor, tokens: torch.LongTensor, generator: torch.Generator) -> torch.Tensor:
    """
    An exact sample of the rows E, given that each token was drawn as argmax(p / E).

    The E_i / p_i are a race of independent exponentials of rates p_i. Its winning time Z is Exp(1) whoever wins, and
    by the lack of memory every other runner still has a fresh Exp of its own to go: E_x = p_x Z, E_i = p_i Z + E'_i.

    Args:
        p (`[tokens, V]`): each row sums to 1.
        tokens (`[tokens]`): the winners.
    """
    z = torch.empty_like(p[:, :1]).exponential_(generator=generator)
    others = torch.empty_like(p).exponential_(generator=generator)
    return p * z + others.scatter(1, tokens[:, None], 0.0)


def spans(rows: TrainingRows, tokens: int) -> list[Span]:
    """The assistant's stretches in the documents of `rows`, in a fixed mixed order, until they hold `tokens`."""
    found = [span for document, mask in documents(rows) for span in _stretches(document, mask)]
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0)).tolist()
    chosen = []
    for number in order:
        span = found[number]
        left = min(tokens, SPAN_TOKENS)
        if left < 2:
            break
        span.ids = span.ids[:, : span.first + left]
        tokens -= span.ids.shape[1] - span.first
        chosen.append(span)
    return chosen


def documents(rows: TrainingRows) -> Iterator[tuple[torch.LongTensor, torch.BoolTensor]]:
    """Ids and mask (`[tokens]`) of each document by itself."""
    for number, (ids, mask) in enumerate(zip(rows.ids, rows.mask, strict=True)):
        if rows.segments is None:
            yield ids.long(), mask
            continue
        for segment in range(1, int(rows.segments[number].max()) + 1):
            inside = rows.segments[number] == segment
            yield ids[inside].long(), mask[inside]


def _stretches(ids: torch.LongTensor, mask: torch.BoolTensor) -> Iterator[Span]:
    edges = torch.diff(mask.int(), prepend=mask.new_zeros(1).int(), append=mask.new_zeros(1).int())
    for first, end in zip((edges == 1).nonzero()[:, 0].tolist(), (edges == -1).nonzero()[:, 0].tolist(), strict=True):
        first = max(first, 1)  # the first token of a document has no prompt
        if end - first >= 2:  # one token is the prefill's: no round
            yield Span(ids[None, :end], first)


class _Sums:
    """Sums by name, the same names on every process."""

    def __init__(self, depth: int):
        names = ["feature", "logit", "top1", "positions", "known", *(f"hit_{k}" for k in HITS)]
        self.modes, self.depth = ("", "coupled_"), depth
        for mode in self.modes:
            names += [f"{mode}tokens", f"{mode}rounds"]
            names += [f"{mode}{what}_{d}" for what in ("tried", "accepted") for d in range(1, depth + 1)]
        self.values = dict.fromkeys(names, 0.0)

    def add(self, **values: float) -> None:
        for name, value in values.items():
            self.values[name] += value

    def add_rounds(self, mode: str, lengths: list[int]) -> None:
        """The rounds of one span; whether the last one would have gone on is not known."""
        self.add(**{f"{mode}tokens": sum(lengths), f"{mode}rounds": len(lengths)})
        for number, length in enumerate(lengths):
            accepted, cut = length - 1, number == len(lengths) - 1
            for d in range(1, min(accepted + (not cut), self.depth) + 1):
                self.add(**{f"{mode}tried_{d}": 1, f"{mode}accepted_{d}": d <= accepted})

    def ratios(self, reduce, args: FSPADTrainingArguments) -> dict[str, float]:
        total = reduce(torch.tensor(list(self.values.values()), dtype=torch.float64)).tolist()
        s, found = dict(zip(self.values, total, strict=True)), {}
        if s["positions"]:
            found |= {name: s[name] / s["positions"] for name in ("feature", "logit", "top1")}
            found["loss"] = args.feature_weight * found["feature"] + args.logit_weight * found["logit"]
        if s["known"]:
            found |= {f"hit_{k}": s[f"hit_{k}"] / s["known"] for k in HITS}
        for mode in self.modes:
            if s[f"{mode}rounds"]:
                found[f"{mode}tau"] = s[f"{mode}tokens"] / s[f"{mode}rounds"]
            for d in range(1, self.depth + 1):
                if s[f"{mode}tried_{d}"]:
                    found[f"{mode}acceptance_{d}"] = s[f"{mode}accepted_{d}"] / s[f"{mode}tried_{d}"]
        return found
