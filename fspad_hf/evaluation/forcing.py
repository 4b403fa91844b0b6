"""Accepted lengths by decree: random weights accept nothing, and yet their rounds are to be timed at a given tau."""

import math
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from transformers import LogitsProcessor

from ..generation import rounds
from ..generation.drafting import Drafter
from ..generation.tree import CandidateTree
from ..speculation_config import SpeculationConfig
from .instrument import replaced

CERTAIN = 1e30  # a score beside which every other has probability 0; infinity would make NaN of the softmax


class ForcedTokens(LogitsProcessor):
    """Leaves the next token planned as the only possible one, greedy or sampled; with none planned, does nothing."""

    def __init__(self):
        self.planned: deque[int] = deque()

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if self.planned:
            scores[:, self.planned.popleft()] = CERTAIN
        return scores


class Schedule:
    """How many tokens each round is to emit: after n rounds, tau n in all, rounded."""

    def __init__(self, tau: float):
        self.tau, self.rounds, self.emitted = tau, 0, 0

    def next(self) -> int:
        self.rounds += 1
        tokens = max(total_tokens(self.tau, self.rounds) - self.emitted, 1)
        self.emitted += tokens
        return tokens


def total_tokens(tau: float, rounds: int) -> int:
    """Tokens emitted by so many rounds, half rounded up."""
    return math.floor(tau * rounds + 0.5)


def check_tau(tau: float, settings: SpeculationConfig) -> None:
    """`ValueError` if no tree of `settings` (resolved) can give rounds of `tau` tokens on average."""
    most = 1 + min(settings.tree_depth, settings.tree_total_nodes)
    if not 1 <= tau <= most:
        raise ValueError(
            f"tau={tau!r} cannot be had from trees of depth {settings.tree_depth} and {settings.tree_total_nodes} "
            f"nodes: expected 1 to {most}, the bonus token included; lower tau, or grow deeper trees (--tree-depth)."
        )


@contextmanager
def forced(tau: float, excluded: Callable[[], AbstractContextManager] = nullcontext) -> Iterator[ForcedTokens]:
    """
    This thread's rounds emit `tau` tokens on average inside the block. The whole path runs as ever: the network, the
    children, the walk and the draw; only the children's confidences and the tokens drawn are decreed.

    Args:
        tau: at least 1, the bonus token included; see [`check_tau`].
        excluded: put around the planning, which no real round does.

    Returns:
        What must be among the call's `logits_processor`.
    """
    processor, schedule, thread = ForcedTokens(), Schedule(tau), threading.get_ident()
    walk, children = rounds.walk, Drafter._children

    def planned_walk(tree, logits, emitter, path, ahead=()):
        if threading.get_ident() == thread:
            with excluded():
                tokens = plan(tree, schedule.next())
                if ahead:  # a captured walk, which has drawn already: its tokens are decreed instead
                    ahead = along(tree, tokens)
                else:
                    processor.planned = deque(tokens)
        walk(tree, logits, emitter, path, ahead)

    def confident_children(generator, *args):
        confidences, tokens = children(generator, *args)
        if threading.get_ident() != thread:
            return confidences, tokens
        return _confidences(confidences, generator.settings.tree_depth), tokens

    with (
        replaced(rounds, "walk", planned_walk),
        replaced(Drafter, "_children", confident_children),
    ):
        yield processor


def plan(tree: CandidateTree, tokens: int) -> list[int]:
    """
    The tokens of a path from the root to depth `tokens - 1` (or the deepest there is), and one that ends it: a token
    that is no child of the path's last node.
    """
    ids, parents, depths = (part[0].tolist() for part in (tree.tokens, tree.parents, tree.depths))
    node = depths.index(min(tokens - 1, max(depths)))
    taken = {ids[child] for child in range(1, len(ids)) if parents[child] == node}
    planned = [next(token for token in range(len(taken) + 1) if token not in taken)]
    while node:
        planned.append(ids[node])
        node = parents[node]
    return planned[::-1]


def along(tree: CandidateTree, tokens: list[int]) -> list[tuple[int, int]]:
    """(node, token) of a plan: the nodes at which its tokens are drawn."""
    children, nodes = tree.children(), [0]
    for token in tokens[:-1]:
        nodes.append(children[nodes[-1], token])
    return list(zip(nodes, tokens, strict=True))


def _confidences(like: torch.Tensor, depth: int) -> torch.Tensor:
    """
    Log-confidences in place of `like` (`[1, nodes, k]`): a first child so sure that the chain of first children is the
    last thing a tree of `depth` levels loses, the others falling off geometrically. Random weights, sure of nothing,
    would grow trees of two levels.
    """
    first = 0.5 ** (1 / depth)
    ranks = torch.arange(like.shape[-1], device=like.device, dtype=like.dtype)
    return (math.log(first) + math.log1p(-first) * ranks).expand_as(like)
