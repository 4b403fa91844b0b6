"""What each step does, as a function of its number alone, so that a resumed run goes on as if never stopped."""

import math
from collections.abc import Iterator

import torch

from .config import TrainingConfig


def learning_rate_at(step: int, config: TrainingConfig) -> float:
    """Linear warm-up, then a cosine or a straight line to zero."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = min((step - config.warmup_steps) / max(config.steps - config.warmup_steps, 1), 1.0)
    left = 1 - progress if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return config.learning_rate * left


def step_rows(count: int, step: int, config: TrainingConfig) -> list[int]:
    """The rows of one optimiser step out of `count`: a new permutation every epoch, the same on every process."""
    return list(_row_stream(count, config.seed, step * config.batch_rows, config.batch_rows))


def noise_seeds(step: int, config: TrainingConfig) -> list[int]:
    """A seed for each row of a step: the noise is the same however the rows are spread over processes."""
    first = (config.seed << 32) + step * config.batch_rows
    return [(first + place) % (1 << 63) for place in range(config.batch_rows)]


def _row_stream(count: int, seed: int, start: int, length: int) -> Iterator[int]:
    for epoch in range(start // count, (start + length - 1) // count + 1):
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed + 7919 * epoch)).tolist()
        yield from order[max(start - epoch * count, 0) : start + length - epoch * count]
