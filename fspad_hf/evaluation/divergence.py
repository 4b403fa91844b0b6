"""Where two token sequences part, and how near the target was to a tie there.

Legend: p the target's processed distribution, E a draw's row of Exp(1) noise; the draw is argmax(log p - log E).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

# In half precision a forward of many rows rounds otherwise than one of a single row, so near ties may fall either way.
# Gaps seen there: greedy one unit in the last place of a logit, sampled up to 0.5 in log p - log E.
HALF_GAPS = {"greedy": 0.25, "sampled": 1.0}


@dataclass(frozen=True)
class Divergence:
    """
    Args:
        index: of the first token that differs, counted from 0 at the end of the prompt.
        plain_token, other_token: what stands there; `None` where a sequence has ended.
        gap: by how much the target prefers plain's token: greedy in logits after the processors, sampled in
            log p - log E. `None` if a sequence has ended, the processors rule the other token out, or the device's
            noise cannot be redrawn.
        other_rank: how many tokens the target prefers to `other_token`: 1 for the runner-up, as in a near tie.
    """

    index: int
    plain_token: int | None
    other_token: int | None
    gap: float | None
    other_rank: int | None

    def is_near_tie(self, mode: str) -> bool:
        """Whether rounding in half precision explains it; `mode` is "greedy" or "sampled"."""
        return self.gap is not None and abs(self.gap) <= HALF_GAPS[mode]


@dataclass(frozen=True)
class BitDifference:
    """
    Args:
        index: of the first new token whose forward differs, counted from 0 at the end of the prompt.
        layer: the first of the decoder's layers that differs there, counted from 1; 0 is the embeddings, `None` the
            logits alone.
        numbers: how many of its output's numbers (of the logits') differ.
    """

    index: int
    layer: int | None
    numbers: int


BIT_OUTPUTS = {"return_dict_in_generate": True, "output_logits": True, "output_hidden_states": True}


def first_different_bits(plain: ModelOutput, other: ModelOutput) -> BitDifference | None:
    """Compares two `generate`s of one sequence, made with `BIT_OUTPUTS`, up to the first token that differs."""
    for index, logits in enumerate(zip(plain.logits, other.logits, strict=False)):
        layers = zip(*(outputs.hidden_states[index] for outputs in (plain, other)), strict=True)
        for layer, (ours, theirs) in enumerate(layers):
            if not torch.equal(ours, theirs):
                return BitDifference(index, layer, int((ours != theirs).sum()))
        if not torch.equal(*logits):
            return BitDifference(index, None, int((logits[0] != logits[1]).sum()))
        if not torch.equal(*(outputs.sequences[0, -len(outputs.logits) :][index] for outputs in (plain, other))):
            return None
    return None


@torch.no_grad()
def first_divergence(
    model: PreTrainedModel,
    inputs: Mapping[str, torch.Tensor],
    plain: torch.LongTensor,
    other: torch.LongTensor,
    *,
    seed: int = 0,
    **generate_kwargs,
) -> Divergence | None:
    """
    Compares the tokens of plain `generate` with another run's; `None` if they are the same.

    If they differ, plain `generate` is run again up to the difference. The random state is left changed.

    Args:
        inputs: `input_ids` (`[1, prompt]`) and what else `generate` was given with it.
        plain, other (`[1, prompt + new]`): the two runs' sequences.
        seed: what `torch.manual_seed` was given before the plain run.
        generate_kwargs: the plain run's, without a length, a streamer or a draft.
    """
    prompt = inputs["input_ids"].shape[1]
    ours, theirs = plain[0, prompt:].tolist(), other[0, prompt:].tolist()
    shared = min(len(ours), len(theirs))
    index = next((i for i in range(shared) if ours[i] != theirs[i]), shared)
    if index == shared:
        if len(ours) == len(theirs):
            return None
        ended = [tokens[index] if index < len(tokens) else None for tokens in (ours, theirs)]
        return Divergence(index, *ended, gap=None, other_rank=None)
    scores = _scores(model, inputs, index, seed, generate_kwargs)
    if not generate_kwargs.get("do_sample"):
        return _held(scores, index, ours[index], theirs[index])
    if inputs["input_ids"].device.type not in ("cpu", "cuda"):  # elsewhere multinomial may be another algorithm
        return Divergence(index, ours[index], theirs[index], gap=None, other_rank=None)
    noise = _noise(model, inputs, index, len(scores), seed, generate_kwargs)
    race = torch.log_softmax(scores, dim=-1) - noise.log()
    return _held(race, index, ours[index], theirs[index])


def _held(preference: torch.Tensor, index: int, plain: int, other: int) -> Divergence:
    gap = float(preference[plain] - preference[other])
    return Divergence(index, plain, other, gap if math.isfinite(gap) else None, _rank(preference, other))


def _scores(model: PreTrainedModel, inputs: Mapping, index: int, seed: int, generate_kwargs: dict) -> torch.Tensor:
    """The processed logits of new token `index`, `[vocabulary]`."""
    torch.manual_seed(seed)
    wanted = {**generate_kwargs, "return_dict_in_generate": True, "output_scores": True}
    return model.generate(**inputs, **wanted, max_new_tokens=index + 1).scores[index][0].float()


def _noise(
    model: PreTrainedModel, inputs: Mapping, index: int, vocabulary: int, seed: int, generate_kwargs: dict
) -> torch.Tensor:
    """The Exp(1) row E with which new token `index` was drawn, `[vocabulary]`."""
    torch.manual_seed(seed)
    if index:
        model.generate(**inputs, **generate_kwargs, max_new_tokens=index)
    return torch.empty(1, vocabulary, device=inputs["input_ids"].device).exponential_()[0]


def _rank(preference: torch.Tensor, token: int) -> int:
    return int((preference > preference[token]).sum())
