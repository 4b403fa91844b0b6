"""From a bench's records to its figures: speed, speed-up, tau, losslessness, with bootstrap confidence intervals.

One definition everywhere: tok/s is new tokens / seconds of the whole call, prefill included; tau is tokens after the
first / forwards after the prefill. Within a task both are sum / sum over its prompts; a mean is over the tasks.
"""

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .divergence import HALF_GAPS

REFERENCE = "plain"
RESAMPLES = 2000


@dataclass(frozen=True)
class Figure:
    """A value and its 95 % confidence interval (bootstrap over prompts); NaN where there is none."""

    value: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float | None]:
        bounds = {"value": self.value, "low": self.low, "high": self.high}
        return {name: (None if np.isnan(bound) else round(float(bound), 4)) for name, bound in bounds.items()}


def summarise(records: Sequence[dict], resamples: int = RESAMPLES, seed: int = 0) -> dict[str, dict[str, dict]]:
    """
    The figures of each mode and method: `figures[mode][method]`, in the order in which they occur.

    Each has `tasks` ({task: figures}), `mean` (over the tasks), `errors` (text: count), `lossless` ({"same",
    "compared", "near_ties", "first_differences"}), `not_speculated` (answers), `accepted_lengths` ({length: count})
    and `seconds` ({"prefill", "decode"}).
    Figures are `tokens_per_second`, `speedup` (against plain on the same prompts) and `tau`, each as
    [`Figure.as_dict`], and `prompts`.

    Args:
        records: as a bench writes them, one for each question, turn, mode and method.
    """
    summary: dict[str, dict[str, dict]] = {}
    for mode in dict.fromkeys(record["mode"] for record in records):
        of_mode = [record for record in records if record["mode"] == mode]
        for method in dict.fromkeys(record["method"] for record in of_mode):
            mine = [record for record in of_mode if record["method"] == method]
            reference = {_key(r): r for r in of_mode if r["method"] == REFERENCE and not r["error"]}
            pairs = [(r, reference[_key(r)]) for r in mine if not r["error"] and _key(r) in reference]
            summary.setdefault(mode, {})[method] = {
                **_figures(pairs, 0 if method == REFERENCE else resamples, seed),
                "errors": dict(Counter(record["error"] for record in mine if record["error"])),
                "lossless": _losslessness(mine),
                "not_speculated": sum(record.get("speculated") is False for record in mine),
                "accepted_lengths": _histogram(mine),
                "seconds": {
                    "prefill": sum(r["prefill_seconds"] for r, _ in pairs),
                    "decode": sum(r["seconds"] - r["prefill_seconds"] for r, _ in pairs),
                },
            }
    return summary


def acceptance_by_depth(accepted_lengths: dict[int, int]) -> list[float]:
    """The share of rounds that accepted a drafted token at depth 1, 2, ...; a round of length n accepted n - 1."""
    rounds = sum(accepted_lengths.values())
    deepest = max(accepted_lengths, default=1)
    return [
        sum(count for length, count in accepted_lengths.items() if length > depth) / rounds
        for depth in range(1, deepest)
    ]


def _figures(pairs: list[tuple[dict, dict]], resamples: int, seed: int) -> dict:
    """`tasks` and `mean` of a method's records, each beside plain's of the same prompt."""
    random = np.random.default_rng(seed)
    tasks, totals = {}, []
    for task in dict.fromkeys(record["task"] for record, _ in pairs):
        sums = _sums_by_question([pair for pair in pairs if pair[0]["task"] == task])  # [questions, 6]
        picks = random.integers(0, len(sums), (resamples, len(sums)))
        totals.append((sums.sum(0), sums[picks].sum(1)))
        known = resamples > 0 and len(sums) > 1
        tasks[task] = {"prompts": len(sums), **_figure_set(*map(_ratios, totals[-1]), known)}
    if not tasks:
        return {"tasks": {}, "mean": None}
    value = np.mean([_ratios(total) for total, _ in totals], axis=0)
    spread = np.mean([_ratios(samples) for _, samples in totals], axis=0)
    known = resamples > 0 and all(task["prompts"] > 1 for task in tasks.values())
    prompts = sum(task["prompts"] for task in tasks.values())
    return {"tasks": tasks, "mean": {"prompts": prompts, **_figure_set(value, spread, known)}}


def _sums_by_question(pairs: list[tuple[dict, dict]]) -> np.ndarray:
    """Tokens, seconds, plain's tokens and seconds, accepted tokens and rounds of each question, its turns added."""
    sums: dict[int, np.ndarray] = {}
    for record, plain in pairs:
        row = [record["new_tokens"], record["seconds"], plain["new_tokens"], plain["seconds"]]
        row += [sum(record["accepted_lengths"]), len(record["accepted_lengths"])]
        sums[record["question"]] = sums.get(record["question"], 0) + np.array(row, dtype=float)
    return np.stack(list(sums.values()))


def _ratios(sums: np.ndarray) -> np.ndarray:
    """tok/s, speed-up and tau, `[..., 3]`, of sums `[..., 6]`."""
    tokens, seconds, plain_tokens, plain_seconds, accepted, rounds = np.moveaxis(sums, -1, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        speed = tokens / seconds
        return np.stack((speed, speed / (plain_tokens / plain_seconds), accepted / rounds), axis=-1)


def _figure_set(value: np.ndarray, samples: np.ndarray, known: bool) -> dict[str, dict]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a figure without any value: no bounds
        low, high = np.nanpercentile(samples, [2.5, 97.5], axis=0) if known else np.full((2, 3), np.nan)
    names = ("tokens_per_second", "speedup", "tau")
    return {name: Figure(value[i], low[i], high[i]).as_dict() for i, name in enumerate(names)}


def _losslessness(records: list[dict]) -> dict:
    compared = [record for record in records if record["identical"] is not None]
    differences = [record for record in compared if not record["identical"]]
    gaps = [(record["mode"], (record["divergence"] or {}).get("gap")) for record in differences]
    return {
        "same": len(compared) - len(differences),
        "compared": len(compared),
        "near_ties": sum(abs(gap) <= HALF_GAPS[mode] for mode, gap in gaps if gap is not None),
        "first_differences": [
            {name: record[name] for name in ("question", "turn", "divergence")} for record in differences
        ],
    }


def _histogram(records: list[dict]) -> dict[int, int]:
    lengths = Counter(length for record in records if not record["error"] for length in record["accepted_lengths"])
    return dict(sorted(lengths.items()))


def _key(record: dict) -> tuple:
    return record["question"], record["turn"]
