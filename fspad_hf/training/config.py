"""What a training run is: its settings, checked before any work starts, and files of them."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

CHOICES = {"schedule": ("cosine", "linear"), "mixed_precision": ("no", "bf16"), "best_by": ("tau", "loss")}
AT_LEAST = {
    "steps": 1, "batch_rows": 1, "micro_rows": 1, "warmup_steps": 0, "weight_decay": 0, "feature_weight": 0,
    "logit_weight": 0, "self_steps": 1, "top_k_weight": 0, "top_k": 1, "noise": 0, "head_sample": 0, "head_extra": 0,
    "checkpoint_every": 1, "validate_every": 0, "validate_rows": 1, "validate_tokens": 1, "coupling_positions": 0,
    "log_every": 1, "seed": 0,
}  # fmt: skip
# The curve of losses is the same whatever these are, so a run may go on with others.
MAY_CHANGE = ("output_dir", "micro_rows", "checkpoint_every", "log_every", "report_to")


@dataclass
class TrainingConfig:
    """
    How a draft is trained. Defaults follow our own runs; the paper's are lr 5e-5, 2,000 warm-up steps, linear.

    Raises:
        ValueError: a value that makes no sense; the message names it.
    """

    output_dir: str
    steps: int = 1000
    batch_rows: int = 8  # rows an optimiser step, over all processes
    micro_rows: int = 8  # rows a forward, at most
    learning_rate: float = 1e-3
    schedule: str = "cosine"  # or "linear"; after the warm-up, down to zero
    warmup_steps: int = 30
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    clip_value: float = 0.5
    feature_weight: float = 1.0
    logit_weight: float = 0.1
    self_steps: int = 1  # runs of the draft a row, all but the first on features of its own; beyond the paper ...
    self_step_decay: float = 1.0  # ... the j-th weighs decay^(j-1) in their mean
    top_k_weight: float = 0.0  # of the target's likeliest tokens once more in the logit part; beyond the paper ...
    top_k: int = 10  # ... how many
    noise: float = 0.1  # U(-noise, noise) * 512 / row length, added to the input features
    head_sample: int = 0  # 0: the whole vocabulary; else the most frequent ids kept in a sampled softmax ...
    head_extra: int = 2048  # ... and how many others are drawn each step
    mixed_precision: str = "no"  # "bf16": autocast over fp32 weights
    checkpoint_every: int = 100
    validate_every: int = 500  # steps; 0: at the end alone
    validate_rows: int = 32  # held-out rows, at most ...
    validate_tokens: int = 512  # ... and about so many of their tokens in simulated rounds
    best_by: str = "tau"  # the best validated weights end in output_dir: highest "tau" or lowest "loss"
    coupling_positions: int = 2048  # fit coupled drafting at so many held-out tokens; 0: leave it as it is
    log_every: int = 10  # steps a line, where the console is no terminal
    report_to: Sequence = ()  # trackers that accelerate knows by name, or `GeneralTracker`s
    seed: int = 0

    def __post_init__(self):
        self.output_dir = str(self.output_dir)
        self.betas = tuple(_number("betas", beta, float) for beta in _sequence("betas", self.betas))
        self.report_to = tuple(_sequence("report_to", self.report_to))
        for field in fields(self):
            if field.type in (int, float):
                setattr(self, field.name, _number(field.name, getattr(self, field.name), field.type))
        for name, least in AT_LEAST.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} is too small: expected {least} or more.")
        for name in ("learning_rate", "clip_value"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} would train nothing: expected more than 0.")
        if not 0 < self.self_step_decay <= 1:
            raise ValueError(f"self_step_decay={self.self_step_decay}: expected more than 0, at most 1.")
        if self.top_k_weight and self.head_sample:
            raise ValueError(
                f"top_k_weight={self.top_k_weight} with head_sample={self.head_sample}: the target's likeliest tokens "
                "are only known over the whole vocabulary; expected one of them to be 0."
            )
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas={self.betas}: expected AdamW's two, each at least 0 and below 1.")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown: expected one of {list(choices)}.")


@dataclass
class DataConfig:
    """Which data, and how conversations become rows."""

    data: Sequence[str]  # see [`load_training_rows`]
    row_length: int = 1024  # of packed conversations
    split: str = "train"  # of a Hub data set
    exclude: Sequence[str] = ()  # files of prompts; conversations that hold one are dropped
    regenerate: bool = False  # replace the answers of conversations by the target's own ...
    regenerate_temperature: float = 0.0  # ... drawn so
    regenerate_tokens: int = 512  # ... and at most so long
    regenerate_rows: int = 16  # ... and so many at once

    def __post_init__(self):
        self.data, self.exclude = ([str(x) for x in _sequence(n, getattr(self, n))] for n in ("data", "exclude"))
        for field in fields(self):
            if field.type in (int, float):
                setattr(self, field.name, _number(field.name, getattr(self, field.name), field.type))
        if not self.data:
            raise ValueError("data=[] names nothing to train on: expected files, folders or Hub data set ids.")


def read_config_file(path: str | Path, known: Iterable[str]) -> dict[str, object]:
    """
    The options in a YAML or JSON file: a mapping of names, spelt with - or _, to values.

    Args:
        known: the names there are, spelt with _.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds something else, or a name that is not known.
    """
    import yaml

    text, known = Path(path).read_text(encoding="utf-8"), sorted(known)
    try:
        found = json.loads(text) if Path(path).suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"config={str(path)!r} is neither YAML nor JSON: {error}.") from error
    if not isinstance(found, dict):
        raise ValueError(f"config={str(path)!r} holds a {type(found).__name__}: expected names and values.")
    options = {str(name).replace("-", "_"): value for name, value in found.items()}
    if unknown := sorted(options.keys() - set(known)):
        raise ValueError(f"config={str(path)!r} has the unknown keys {unknown}: expected any of {known}.")
    return options


def _sequence(name: str, value) -> Sequence:
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, Sequence):
        raise ValueError(f"{name}={value!r}: expected a list.")
    return value


def _number(name: str, value, kind: type) -> int | float:
    """YAML reads `1e-3` as text, and JSON has no integers: what is meant is taken, anything else refused."""
    try:
        number = float(value) if not isinstance(value, bool) else math.nan
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number) or (kind is int and not number.is_integer()):
        expected = "a whole number" if kind is int else "a number"
        raise ValueError(f"{name}={value!r}: expected {expected}.")
    return kind(number)
