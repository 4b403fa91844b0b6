"""A streamer that shows speculation at work."""

import torch
from rich.console import Console
from transformers.generation.streamers import BaseStreamer

ACCEPTED_STYLES, OWN_STYLE = ("bold green", "bold cyan"), "dim"
LEGEND = "[bold cyan]bold:[/] [bold green]drafted[/] and accepted, one colour a round; [dim]dim: the target's own[/]"


class RunStreamer(BaseStreamer):
    """
    Prints tokens as they come: those accepted in one round in one colour, the target's own, which end a round, dim.

    A token is printed once the next event tells which it was.
    """

    def __init__(self, console: Console, tokenizer, coloured: bool):
        self.console, self.tokenizer, self.coloured = console, tokenizer, coloured
        self._tokens: list[int] = []
        self._context = self._shown = 0  # decoding starts at the first, printing at the second
        self._prompt_seen, self._held, self._rounds = False, None, 0

    def put(self, value: torch.Tensor) -> None:
        if not self._prompt_seen:  # `generate` hands over the prompt first
            self._prompt_seen = True
            return
        self._flush(ACCEPTED_STYLES[self._rounds % len(ACCEPTED_STYLES)])
        self._held = int(value)

    def on_round(self, tree=None) -> None:
        """Called by FSPAD before each round's first token."""
        self._flush(OWN_STYLE)
        self._rounds += 1

    def end(self) -> None:
        self._flush(OWN_STYLE, last=True)
        self.console.out()

    def _flush(self, style: str, last: bool = False) -> None:
        if self._held is None:
            return
        self._tokens.append(self._held)
        self._held = None
        before = self._decode(self._tokens[self._context : self._shown])
        text = self._decode(self._tokens[self._context :])
        if text.endswith("\N{REPLACEMENT CHARACTER}") and not last:  # half a character
            return
        self._context, self._shown = self._shown, len(self._tokens)
        self.console.out(text[len(before) :], style=style if self.coloured else None, end="", highlight=False)

    def _decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)
