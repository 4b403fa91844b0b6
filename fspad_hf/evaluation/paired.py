"""Is one draft better than another on the same prompts? Differences of tau, with paired bootstrap intervals."""

from collections.abc import Sequence

import numpy as np

from .summary import Figure

RESAMPLES = 10_000


def paired_difference(
    ours: np.ndarray, theirs: np.ndarray, tasks: Sequence[str], resamples: int = RESAMPLES, seed: int = 0
) -> dict:
    """
    tau of `ours` - tau of `theirs`, with 95 % intervals.

    tau of a task is sum of tokens / sum of rounds over its prompts. A resample draws as many prompts of each task as
    there are, with replacement, the same for both sides: what makes a prompt hard for both cancels out.

    Args:
        ours, theirs (`[prompts, 2]`): tokens and rounds of each prompt, added up over runs; a prompt without a round
            counts for nothing.
        tasks: of each prompt.

    Returns:
        `tasks` ({task: figure}) and `mean` (a figure: over the tasks; `None` without any), each as
        [`Figure.as_dict`]. One prompt tells nothing of the spread: without bounds.
    """
    random = np.random.default_rng(seed)
    pairs, figures, spreads = np.stack((ours, theirs)).astype(float), {}, []
    counted = (pairs[:, :, 1] > 0).all(0)
    for task in dict.fromkeys(tasks):
        sums = pairs[:, counted & (np.array(tasks) == task)]  # [2, prompts, 2]
        if not (count := sums.shape[1]):
            continue
        picks = random.integers(0, count, (resamples, count))
        spreads.append(_difference(sums[:, picks].sum(2)) if count > 1 else np.full(resamples, np.nan))
        figures[task] = _figure(_difference(sums.sum(1)), spreads[-1])
    if not figures:
        return {"tasks": {}, "mean": None}
    mean = _figure(np.mean([figure.value for figure in figures.values()]), np.mean(spreads, axis=0))
    return {"tasks": {task: figure.as_dict() for task, figure in figures.items()}, "mean": mean.as_dict()}


def significance(figure: dict | None) -> str | None:
    """Which side of zero the whole interval is on: "above", "below", or `None`."""
    if figure is None or figure["low"] is None:
        return None
    return "above" if figure["low"] > 0 else "below" if figure["high"] < 0 else None


def _difference(sums: np.ndarray) -> np.ndarray:
    """Of tokens and rounds `[2, ..., 2]`."""
    tau = sums[..., 0] / sums[..., 1]
    return tau[0] - tau[1]


def _figure(value: float, spread: np.ndarray) -> Figure:
    return Figure(float(value), *np.percentile(spread, [2.5, 97.5]))
