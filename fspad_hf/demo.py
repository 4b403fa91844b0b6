"""`fspad-hf demo`: plain `generate` and FSPAD side by side, streamed, compared token by token and timed."""

import contextlib
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from .configuration_fspad import FSPADConfig
from .demo_target import demo_target, quiet_transformers, released_draft, status
from .evaluation.divergence import Divergence, first_divergence
from .modeling_fspad import FSPADDraftModel

PROMPTS = (
    "Explain why the sky is blue, in simple words.",
    "Write a Python function that checks whether a string is a palindrome.",
    "Tell a short story about a lighthouse keeper and a lost whale.",
    "List the first ten square numbers and show how each is computed.",
)
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
MODES = {
    "greedy": {"num_beams": 1, "do_sample": False},
    "sampled": {"num_beams": 1, "do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0},
}
WARM_UP_TOKENS = 8
CPU_TREE = {"tree_depth": 3, "tree_top_k": 3, "tree_total_nodes": 8}  # a CPU pays for every row it verifies
ACCEPTED_STYLES, OWN_STYLE = ("bold green", "bold cyan"), "dim"
LEGEND = "[bold cyan]bold:[/] [bold green]drafted[/] and accepted, one colour a round; [dim]dim: the target's own[/]"


def run_demo(
    target: str | None = None,
    draft: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    prompts: Sequence[str] | None = None,
    max_new_tokens: int = 128,
    json_file: str | os.PathLike | None = None,
    seed: int = 0,
    tree_depth: int | None = None,
    tree_top_k: int | None = None,
    tree_nodes: int | None = None,
    console: Console | None = None,
) -> list[dict]:
    """
    Answers each prompt greedily and sampled, by plain `generate` and by FSPAD, and prints a table of the results.

    Everything that can be checked is checked before anything is downloaded or written.

    Args:
        target: path or Hub id; by default SmolLM2-135M-Instruct, see [`demo_target`].
        draft: path or Hub id of a draft for `target`; by default the released one of the default target.
        device, dtype: see [`resolve_device`] and [`resolve_dtype`].
        prompts: the user's messages; by default four short ones.
        json_file: where to write the rows.
        seed: given to `torch.manual_seed` before each answer.
        tree_depth, tree_top_k, tree_nodes: replace `tree_depth`, `tree_top_k`, `tree_total_nodes` of the draft; with
            none of them, a CPU gets the small `CPU_TREE`.

    Returns:
        A row for each prompt and mode: prompt, do_sample, new_tokens, identical, plain_tokens_per_second,
        fspad_tokens_per_second, speedup, tau (`None` without a verification round).

    Raises:
        ValueError, OSError: an argument is wrong, or a model or a file cannot be had.
    """
    place, precision = resolve_device(device), resolve_dtype(dtype, device)
    prompts = _checked_prompts(prompts)
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} leaves nothing to generate: expected 1 or more.")
    if json_file is not None:
        json_file = _checked_json_path(json_file)
    console = console or Console()
    with quiet_transformers():
        draft = draft or str(released_draft())
        trees = {"tree_depth": tree_depth, "tree_top_k": tree_top_k, "tree_total_nodes": tree_nodes}
        if place.type == "cpu" and all(value is None for value in trees.values()):
            trees = CPU_TREE
        config = _draft_config(draft, trees)
        target = target or str(demo_target())
        with status(f"Loading {target} and {draft}"):
            demo = _Demo(target, draft, config, place, precision, max_new_tokens, seed, console)
        with status("Warming up"):
            demo.warm_up(prompts[0])
        if console.is_terminal:
            console.print(LEGEND, highlight=False)
        rows = [row for prompt in prompts for row in demo.compare(prompt)]
    _print_table(rows, console)
    for note in demo.notes:
        console.out(note, highlight=False)
    if json_file is not None:
        _write_json(rows, json_file)
    return rows


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

    def on_round(self) -> None:
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


class _Demo:
    """The loaded models, and what every run of them shares."""

    def __init__(self, target: str, draft: str, config: FSPADConfig, device, dtype, max_new_tokens, seed, console):
        self.tokenizer = AutoTokenizer.from_pretrained(target)
        self.model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(target, dtype=dtype).to(device).eval()
        self.draft = FSPADDraftModel.from_pretrained(draft, config=config, dtype=dtype).to(device).eval()
        self.max_new_tokens, self.seed, self.console = max_new_tokens, seed, console
        self.notes: list[str] = []

    def warm_up(self, prompt: str) -> None:
        """A few tokens each way, not counted: first-use costs, and the probe that FSPAD runs once for a model."""
        inputs = self._inputs(prompt)
        for kwargs in MODES.values():
            for assistant in ({}, {"assistant_model": self.draft}):
                self.model.generate(**inputs, **kwargs, **assistant, max_new_tokens=WARM_UP_TOKENS)

    def compare(self, prompt: str) -> list[dict]:
        """The rows of one prompt."""
        inputs = self._inputs(prompt)
        self.console.out(f"\nPrompt: {prompt}", style="bold", highlight=False)
        rows = []
        for mode, kwargs in MODES.items():
            self.console.print(f"\n-- {mode}, plain generate", style="yellow", highlight=False)
            plain, plain_speed = self._run(inputs, kwargs)
            self.console.print(f"\n-- {mode}, FSPAD", style="yellow", highlight=False)
            fspad, fspad_speed = self._run(inputs, kwargs, assistant_model=self.draft)
            found = first_divergence(self.model, inputs, plain.sequences, fspad.sequences, seed=self.seed, **kwargs)
            if found is not None:
                self.notes.append(_describe(prompt, mode, found))
            record = getattr(fspad, "speculation", None)
            row = {
                "prompt": prompt,
                "do_sample": kwargs["do_sample"],
                "new_tokens": plain.sequences.shape[1] - inputs["input_ids"].shape[1],
                "identical": found is None,
                "plain_tokens_per_second": plain_speed,
                "fspad_tokens_per_second": fspad_speed,
                "speedup": fspad_speed / plain_speed,
                "tau": record.tau if record is not None else None,
            }
            rows.append(row)
            self.console.print(f"   {row['speedup']:.2f}x, tau {_number(row['tau'])}", style="yellow", highlight=False)
        return rows

    def _inputs(self, prompt: str) -> dict[str, torch.Tensor]:
        if getattr(self.tokenizer, "chat_template", None):
            chat = [{"role": "user", "content": prompt}]
            encoded = self.tokenizer.apply_chat_template(
                chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        else:
            encoded = self.tokenizer(prompt, return_tensors="pt")
        return {name: encoded[name].to(self.model.device) for name in ("input_ids", "attention_mask")}

    def _run(self, inputs: dict, kwargs: dict, **assistant):
        """The output of one timed, streamed `generate`, and its new tokens a second, prefill included."""
        streamer = RunStreamer(self.console, self.tokenizer, coloured=bool(assistant))
        torch.manual_seed(self.seed)
        start = time.perf_counter()
        output = self.model.generate(
            **inputs, **kwargs, **assistant, streamer=streamer, max_new_tokens=self.max_new_tokens,
            return_dict_in_generate=True,
        )  # fmt: skip
        elapsed = time.perf_counter() - start
        return output, (output.sequences.shape[1] - inputs["input_ids"].shape[1]) / elapsed


def _checked_prompts(prompts: Sequence[str] | None) -> list[str]:
    prompts = list(PROMPTS if prompts is None else prompts)
    if not prompts or not all(prompt.strip() for prompt in prompts):
        raise ValueError(f"prompts={prompts!r} holds an empty prompt, or none: expected text; leave out for defaults.")
    return prompts


def _draft_config(draft: str, trees: dict[str, int | None]) -> FSPADConfig:
    config = AutoConfig.from_pretrained(draft)
    if not isinstance(config, FSPADConfig):
        raise ValueError(
            f"draft={draft!r} is a {config.model_type!r} model: expected an FSPAD draft ('fspad'); pass the folder or "
            "Hub id that FSPADDraftModel.save_pretrained wrote."
        )
    for name, value in trees.items():
        if value is not None:
            setattr(config, name, value)
    config.validate_tree()
    return config


def _checked_json_path(path: str | os.PathLike) -> Path:
    final = Path(path).expanduser().resolve()
    if final.exists() and not final.is_file():
        raise ValueError(f"json_file={str(path)!r} is not a regular file: name a file to write.")
    try:
        _partial(final).touch()
        _partial(final).unlink()
    except OSError as error:
        raise OSError(
            f"json_file={str(path)!r} cannot be written ({error.strerror}): name a file in a folder that exists and "
            "that you may write to."
        ) from error
    return final


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}")


def _write_json(rows: list[dict], path: Path) -> None:
    try:
        _partial(path).write_text(json.dumps(rows, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        _partial(path).replace(path)
    finally:
        with contextlib.suppress(OSError):
            _partial(path).unlink()


def _describe(prompt: str, mode: str, found: Divergence) -> str:
    where = f"{_short(prompt)!r}, {mode}: the first difference is at new token {found.index}"
    if found.gap is None:
        return where
    what = "top-1 less top-2 logit" if mode == "greedy" else "difference in log p - log E"
    return f"{where}, {what} {found.gap:.3g} (FSPAD's token is the target's choice no. {found.other_rank + 1})"


def _short(prompt: str, length: int = 18) -> str:
    line = " ".join(prompt.split())
    return line if len(line) <= length else f"{line[: length - 3]}..."


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _print_table(rows: list[dict], console: Console) -> None:
    table = Table(box=box.SIMPLE, title="FSPAD against plain generate")
    table.add_column("prompt", no_wrap=True)
    table.add_column("mode", min_width=7)
    for name in ("tokens", "plain\ntok/s", "FSPAD\ntok/s", "speed-up", "tau"):
        table.add_column(name, justify="right", min_width=max(map(len, name.split("\n"))))
    table.add_column("identical", min_width=9)
    for row in rows:
        same = Text("yes", "green") if row["identical"] else Text("NO", "bold red")
        mode = "sampled" if row["do_sample"] else "greedy"
        table.add_row(Text(_short(row["prompt"])), mode, str(row["new_tokens"]), *_figures([row]), same)
    table.add_section()
    count = f"{sum(row['identical'] for row in rows)}/{len(rows)}"
    table.add_row("mean", "", _number(mean(row["new_tokens"] for row in rows), 0), *_figures(rows), count)
    console.print()
    console.print(table)


def _figures(rows: list[dict]) -> list[str]:
    """Means over the rows, as the table shows them: both speeds, the speed-up, tau."""
    speeds = [mean(row[f"{name}_tokens_per_second"] for row in rows) for name in ("plain", "fspad")]
    taus = [row["tau"] for row in rows if row["tau"] is not None]
    speedup = mean(row["speedup"] for row in rows)
    return [*(_number(speed, 1) for speed in speeds), f"{speedup:.2f}x", _number(mean(taus) if taus else None)]
