"""`fspad-hf explain`: what each round of a real `generate` call drafted, accepted and rejected, as a picture."""

import os
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from .evaluation.peers import MODES
from .generation.probe import probe
from .generation.tree import CandidateTree
from .loading import encode_chat, load_models
from .modeling_fspad import FSPADDraftModel
from .runtime import quiet_transformers, writable_file, write_file
from .tree_drawing import Explanation, Round, html_page, svg_picture

SVG_ROUNDS = 3


class RoundRecorder(BaseStreamer):
    """A streamer that keeps the tree of each round, and the tokens put after it."""

    def __init__(self):
        self._prompt_seen = False
        self._trees: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
        self._emitted: list[list[int]] = [[]]  # before the first round, then of each

    def put(self, value: torch.Tensor) -> None:
        if self._prompt_seen:  # `generate` hands over the prompt first
            self._emitted[-1] += value.flatten().tolist()
        self._prompt_seen = True

    def on_round(self, tree: CandidateTree) -> None:
        self._trees.append((tuple(tree.tokens[0].tolist()), tuple(tree.parents[0].tolist())))
        self._emitted.append([])

    def end(self) -> None:
        pass

    @property
    def tokens(self) -> list[int]:
        """All that was generated."""
        return [token for part in self._emitted for token in part]

    @property
    def rounds(self) -> tuple[Round, ...]:
        return tuple(
            Round(*tree, tuple(emitted)) for tree, emitted in zip(self._trees, self._emitted[1:], strict=True)
        )


def explain(
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    draft: FSPADDraftModel,
    prompt: str,
    max_new_tokens: int = 32,
    sampled: bool = False,
    seed: int = 0,
    name: str | None = None,
) -> Explanation:
    """
    Generates an answer and keeps what each round did.

    Args:
        prompt: the user's message; the chat template is applied if there is one.
        sampled: at temperature 1 from all tokens, after `torch.manual_seed(seed)`; else greedy.
        name: the target's, for the title.

    Raises:
        ValueError: the call had no round to draw.
    """
    recorder, mode = RoundRecorder(), "sampled" if sampled else "greedy"
    inputs = encode_chat(tokenizer, [{"role": "user", "content": prompt}], target.device)
    torch.manual_seed(seed)
    target.generate(**inputs, **MODES[mode], assistant_model=draft, max_new_tokens=max_new_tokens, streamer=recorder)
    if not recorder.rounds:
        reason = probe(target).reason
        why = f"it cannot speculate, because {reason}" if reason else "the answer ended with its first token"
        raise ValueError(
            f"{type(target).__name__} had no round to draw: {why}; expected a model that verifies trees, and an "
            "answer of two tokens or more."
        )
    tokens = recorder.tokens
    known = {token for made in recorder.rounds for token in (*made.tokens, *made.emitted)}
    return Explanation(
        title=f"{name or type(target).__name__}, {f'T = 1, seed {seed}' if sampled else 'greedy'}",
        prompt=prompt,
        texts=tuple(_whole(tokenizer.decode(tokens[:count])) for count in range(len(tokens) + 1)),
        pieces={token: _piece(tokenizer, token) for token in known},
        rounds=recorder.rounds,
    )


def run_explain(
    prompt: str,
    output: str | os.PathLike,
    rounds: int | None = None,
    target: str | None = None,
    draft: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    max_new_tokens: int = 32,
    sampled: bool = False,
    seed: int = 0,
    **trees: int | str | None,
) -> Explanation:
    """
    `fspad-hf explain`: draws the rounds of one answer into a file, which is written whole or not at all.

    Args:
        output: a .svg file, or an .html file that shows the text growing as well.
        rounds: draw the first so many (default: 3 in an SVG, all in HTML).
        target, draft, device, dtype, trees (`tree_depth` ... `tree`): see [`load_models`].
        prompt, max_new_tokens, sampled, seed: see [`explain`].

    Raises:
        ValueError, OSError: an argument is wrong, or a model or the file cannot be had.
    """
    draw = {".svg": svg_picture, ".html": html_page}.get(suffix := Path(output).suffix.lower())
    if draw is None:
        raise ValueError(f"output={str(output)!r} ends in {suffix!r}: expected a name that ends in .svg or .html.")
    for option, value in (("rounds", rounds), ("max_new_tokens", max_new_tokens)):
        if value is not None and value < 1:
            raise ValueError(f"{option}={value} leaves nothing to draw: expected 1 or more.")
    if not prompt.strip():
        raise ValueError(f"prompt={prompt!r} is empty: expected text.")
    output = writable_file(output, "output")
    models = load_models(target, draft, device, dtype, **trees)
    with quiet_transformers():
        name = Path(models.target_name).name
        made = explain(models.target, models.tokenizer, models.draft, prompt, max_new_tokens, sampled, seed, name)
    shown = rounds or (SVG_ROUNDS if suffix == ".svg" else len(made.rounds))
    write_file(output, draw(made, shown))
    return made


def _whole(text: str) -> str:
    return text.rstrip("\N{REPLACEMENT CHARACTER}")


def _piece(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """The text of a token within a text; some decoders strip the space of whatever comes first."""
    return tokenizer.decode([token, token])[len(tokenizer.decode([token])) :]
