"""What a run tells while it runs: trackers through accelerate, a file of losses, and a line on the console."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, get_available_trackers
from accelerate.utils import LoggerType

from ..runtime import duration, write_file
from .config import TrainingConfig

SCALAR = (int, float, str, bool)
LOSSES = "losses.jsonl"  # in the output folder


def check_trackers(names: Sequence) -> None:
    """`ValueError` for a tracker that accelerate does not know, or whose package is not installed."""
    known = sorted(kind.value for kind in LoggerType if kind is not LoggerType.ALL)
    available = {str(getattr(kind, "value", kind)) for kind in get_available_trackers()}
    for name in (name for name in names if not isinstance(name, GeneralTracker)):
        if name not in known:
            raise ValueError(f"report_to={name!r} is unknown: expected any of {known}.")
        if name not in available:
            raise ValueError(f"report_to={name!r} needs a package that is not installed: pip install {name}.")


@contextmanager
def trackers(accelerator: Accelerator, config: TrainingConfig, step: int) -> Iterator[Callable[[dict], None]]:
    """
    Starts `config.report_to`, gives a function that logs a step's record, and ends them, also after an error.

    The main process also writes the records to `LOSSES`, a JSON line each. A run that goes on after `step` replaces
    those of later steps, which were lost with the process that made them.
    """
    losses = _begin_losses(Path(config.output_dir) / LOSSES, step) if accelerator.is_main_process else None
    if config.report_to:
        settings = {name: value for name, value in vars(config).items() if isinstance(value, SCALAR)}
        accelerator.init_trackers("fspad", config=settings)

    def track(record: dict) -> None:
        if losses is not None:
            with losses.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        if config.report_to:
            accelerator.log({name: value for name, value in record.items() if name != "step"}, step=record["step"])

    try:
        yield track
    finally:
        for tracker in accelerator.trackers if config.report_to else ():
            tracker.finish()


def _begin_losses(path: Path, step: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    whole = (line for line in lines if line.endswith("\n"))  # the last may have been cut off
    write_file(path, "".join(line for line in whole if json.loads(line)["step"] <= step))
    return path


class TrainingDisplay:
    """
    The run on the console, a context manager and a `report` for [`train`]: a bar that moves on a terminal, else a line
    every `config.log_every` steps; validations get a line of their own.

    Args:
        console: a rich console.
    """

    def __init__(self, config: TrainingConfig, console):
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self.config, self.console = config, console
        self.bar = None
        if console.is_terminal:
            text = TextColumn("{task.fields[shown]}", markup=False)
            self.bar = Progress(BarColumn(bar_width=20), MofNCompleteColumn(), text, console=console)
            self.task = self.bar.add_task("", total=config.steps, shown="")
        self.tokens = self.steps = 0
        self.since = time.perf_counter()

    def __enter__(self) -> "TrainingDisplay":
        if self.bar is not None:
            self.bar.start()
        self.since = time.perf_counter()
        return self

    def __exit__(self, *error) -> None:
        if self.bar is not None:
            self.bar.stop()

    def __call__(self, record: dict) -> None:
        self.tokens, self.steps = self.tokens + record["tokens"], self.steps + 1
        seconds, step, last = time.perf_counter() - self.since, record["step"], record["step"] == self.config.steps
        parts = [f"{name} {record[name]:.4f}" for name in ("loss", "feature", "logit", "top1")]
        left = f"{duration((self.config.steps - step) * seconds / self.steps)} left"
        speed = f"{self.tokens / seconds:,.0f} tokens/s"
        if self.bar is not None:  # which a narrow terminal cuts off at its right end
            self.bar.update(self.task, completed=step, shown="  ".join([parts[0], left, speed, *parts[1:]]))
        elif step % self.config.log_every == 0 or last:
            self._print("  ".join([f"step {step}/{self.config.steps}", *parts, speed, left]))
        if "validation_loss" in record:
            self._print(f"validated at step {step}: {_validation(record)}")

    def _print(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)


def _validation(record: dict) -> str:
    shown = {"loss": "loss", "top1": "top1", "tau": "tau", "coupled_tau": "tau at T = 1"}
    parts = [f"{label} {record[key]:.3f}" for name, label in shown.items() if (key := f"validation_{name}") in record]
    hits = [f"{record[key]:.2f}" for k in (1, 3, 10) if (key := f"validation_hit_{k}") in record]
    depths = [f"{value:.2f}" for name, value in record.items() if name.startswith("validation_acceptance_")]
    for label, shares in (("first level's best 1, 3, 10", hits), ("accepted by depth", depths)):
        parts += [f"{label}: {' '.join(shares)}"] if shares else []
    return "  ".join(parts)
