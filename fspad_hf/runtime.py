"""What the commands share: devices, dtypes and models by name, quiet loading, files written whole."""

import contextlib
import functools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile
from pathlib import Path

import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError
from transformers.utils import logging

PROGRESS_LINES = 20
LABELS = "fspad: "
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_device(device: str | None = None) -> torch.device:
    """The device by its name; by default CUDA if there is one, else the CPU. `ValueError` if this machine lacks it."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    counts = {"cpu": 1}
    if accelerator := torch.accelerator.current_accelerator(check_available=True):
        counts[accelerator.type] = torch.accelerator.device_count()
    try:
        found = torch.device(device)
        if (found.index or 0) < counts.get(found.type, 0):
            return found
    except RuntimeError:
        pass
    raise ValueError(
        f"device={device!r} is not on this machine: expected one of {list(counts)}; leave it out for the default."
    )


def resolve_dtype(dtype: str | torch.dtype | None = None, device: str | None = None) -> torch.dtype:
    """The dtype by its name; by default float32 on the CPU, else bfloat16."""
    if dtype is None:
        return torch.float32 if resolve_device(device).type == "cpu" else torch.bfloat16
    found = dtype if isinstance(dtype, torch.dtype) else DTYPES.get(dtype)
    if found not in DTYPES.values():
        raise ValueError(f"dtype={dtype!r} is unknown: expected one of {list(DTYPES)}; leave it out for the default.")
    return found


def is_exact(device: str | None = None, dtype: str | None = None) -> bool:
    """Whether a differing token is a failure, as in float32 and float64; below them near ties may fall either way."""
    return resolve_dtype(dtype, device) in (torch.float32, torch.float64)


def check_reachable(name: str | os.PathLike, option: str) -> None:
    """
    That a path or Hub id is a folder here, in the cache, or on a Hub that answers. It is asked once, where loading
    would ask a Hub that cannot be reached a dozen times.

    Args:
        option: what the name was given as, for the message.

    Raises:
        OSError: it is none of them. What a Hub that answers lacks or refuses, loading tells.
    """
    if Path(name).exists():
        return
    try:
        if try_to_load_from_cache(str(name), "config.json") is None:
            get_hf_file_metadata(hf_hub_url(str(name), "config.json"))
    except HfHubHTTPError:
        return
    except Exception as error:  # of an id that is none, of offline mode, of the HTTP library that the Hub's client has
        raise OSError(
            f"{option}={str(name)!r} is no folder here, is not in the cache, and the Hub cannot be asked for it "
            f"({error}): check the path or Hub id, or go online."
        ) from error


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars, and errors only, from transformers inside the block; as before after it."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def status(message: str) -> Iterator[None]:
    """A spinner on stderr while the block runs; one plain line where stderr is no terminal."""
    from rich.console import Console
    from rich.text import Text

    console = Console(file=sys.stderr)
    if not console.is_terminal:
        console.out(f"{message} ...", highlight=False)
        yield
        return
    with console.status(Text(message)):
        yield


def cache_folder(cache_dir: str | os.PathLike | None = None) -> Path:
    """Where files are kept that can be had again: `cache_dir`, `$FSPAD_HF_CACHE` or `~/.cache/fspad_hf`."""
    return Path(cache_dir or os.environ.get("FSPAD_HF_CACHE") or "~/.cache/fspad_hf").expanduser()


@contextlib.contextmanager
def counted(what: str, total: int) -> Iterator[Callable[[], None]]:
    """
    Gives a function to call whenever one of `total` is done: a bar on stderr, with the time left; `PROGRESS_LINES`
    plain lines where stderr is no terminal.
    """
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress

    console, done, began = Console(stderr=True), 0, time.perf_counter()
    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    bar = Progress(*columns, console=console, speed_estimate_period=math.inf)  # by default no time left after 30 s
    task = bar.add_task(what, total=total)

    def advance() -> None:
        nonlocal done
        done += 1
        if console.is_terminal:
            bar.advance(task)
        elif done * PROGRESS_LINES // total > (done - 1) * PROGRESS_LINES // total:
            console.out(f"{what} {done}/{total}, {time_left(began, done, total)}", highlight=False)

    with bar if console.is_terminal else contextlib.nullcontext():
        yield advance


def time_left(began: float, done: int, total: int) -> str:
    """ "3 min 05 s left", by `done` of `total` since `began` (of `time.perf_counter`)."""
    return f"{duration((total - done) * (time.perf_counter() - began) / done)} left"


def duration(seconds: float) -> str:
    """As a person would say it: 40 s, 3 min 05 s, 2 h 10 min."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"


def writable_file(path: str | os.PathLike, option: str = "json_file") -> Path:
    """The file as an absolute path, after checking that it can be written. `ValueError` or `OSError` if not."""
    final = Path(path).expanduser().resolve()
    if final.exists() and not final.is_file():
        raise ValueError(f"{option}={str(path)!r} is not a regular file: name a file to write.")
    try:
        _partial(final).touch()
        _partial(final).unlink()
    except OSError as error:
        raise OSError(
            f"{option}={str(path)!r} cannot be written ({error.strerror}): name a file in a folder that exists and "
            "that you may write to."
        ) from error
    return final


def write_file(path: Path, content: str | bytes) -> None:
    """Writes a whole file or nothing: to a temporary name beside it, then renamed."""
    content = content.encode("utf-8") if isinstance(content, str) else content
    try:
        _partial(path).write_bytes(content)
        _partial(path).replace(path)
    finally:
        with contextlib.suppress(OSError):
            _partial(path).unlink()


def write_json(path: Path, value) -> None:
    """[`write_file`] of `value` as indented JSON."""
    write_file(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def changed_settings(theirs: dict, ours: dict) -> str:
    """How the settings of work begun differ from those asked for now, as "seed 0 -> 5, ..."; empty if not at all."""
    differing = [name for name in {**theirs, **ours} if theirs.get(name) != ours.get(name)]
    return ", ".join(f"{name} {_short(theirs.get(name))} -> {_short(ours.get(name))}" for name in differing)


def _short(value) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:18] + "..." + text[-18:]


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}")


def common_prefix(these: Sequence[int], those: Sequence[int]) -> int:
    """Length of the common beginning."""
    return len(list(takewhile(lambda pair: pair[0] == pair[1], zip(these, those, strict=False))))


def label(name: str) -> torch.profiler.record_function:
    """Around what traces of torch.profiler shall show under this name."""
    return torch.profiler.record_function(LABELS + name)


def labelled(name: str) -> Callable:
    """[`label`] for a whole function."""

    def wrap(function: Callable) -> Callable:
        @functools.wraps(function)
        def labelled(*args, **kwargs):
            with label(name):
                return function(*args, **kwargs)

        return labelled

    return wrap
