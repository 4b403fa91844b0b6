"""Guesses that the text itself makes: prompt lookup (Saxena, 2023), here a path of the draft tree."""

from collections.abc import Container, Iterable
from itertools import takewhile
from typing import NamedTuple

LONGEST_MATCH = 3  # tokens at the text's end that are looked for; then fewer


class Found(NamedTuple):
    """
    Args:
        tokens: that may come next.
        match: how many tokens at the text's end were found before, 0 if none.
    """

    tokens: list[int] = []
    match: int = 0


class PromptLookup:
    """
    What followed the last time that the text ended as it does now.

    Args:
        tokens: of the text so far.
        ends: tokens that end the answer: what follows one, and the token itself, is never looked up.
    """

    def __init__(self, tokens: Iterable[int], ends: Container[int] = ()):
        self._tokens, self._ends = list(tokens), ends
        self._after: dict[tuple[int, ...], int] = {}  # n-gram -> where the token after its last occurrence stands
        self._indexed = 0  # a text that is never asked about costs nothing

    def extend(self, tokens: Iterable[int]):
        self._tokens.extend(tokens)

    def continuation(self, most: int) -> Found:
        """
        `most` tokens that may come next, fewer before one that ends the answer; none if the last token is new. A
        repetition that reaches the text's end is taken to go on.
        """
        if most < 1:
            return Found()
        self._index()
        text = self._tokens
        for size in range(min(LONGEST_MATCH, len(text)), 0, -1):
            start = self._after.get(tuple(text[-size:]))
            if start is not None:
                period = len(text) - start
                guesses = (text[start + i % period] for i in range(most))
                return Found(list(takewhile(lambda token: token not in self._ends, guesses)), size)
        return Found()

    def _index(self):
        """The n-gram at the very end has no token after it yet, so it is not in."""
        for end in range(self._indexed, len(self._tokens)):
            for size in range(1, min(LONGEST_MATCH, end) + 1):
                self._after[tuple(self._tokens[end - size : end])] = end
        self._indexed = len(self._tokens)
