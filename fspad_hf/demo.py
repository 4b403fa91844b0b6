"""`fspad-hf demo`: plain `generate` and FSPAD side by side, streamed, compared token by token and timed."""

import os
import time
from collections.abc import Sequence
from statistics import mean

import torch
from rich.console import Console
from rich.text import Text

from .evaluation.divergence import Divergence, first_divergence
from .evaluation.report import figure_table
from .loading import Models, encode_chat, load_models
from .runtime import quiet_transformers, status, writable_file, write_json
from .streaming import LEGEND, RunStreamer

PROMPTS = (
    "Explain why the sky is blue, in simple words.",
    "Write a Python function that checks whether a string is a palindrome.",
    "Tell a short story about a lighthouse keeper and a lost whale.",
    "List the first ten square numbers and show how each is computed.",
)
MODES = {
    "greedy": {"num_beams": 1, "do_sample": False},
    "sampled": {"num_beams": 1, "do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0},
}
WARM_UP_TOKENS = 8


def run_demo(
    target: str | None = None,
    draft: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    prompts: Sequence[str] | None = None,
    max_new_tokens: int = 128,
    json_file: str | os.PathLike | None = None,
    seed: int = 0,
    console: Console | None = None,
    **trees: int | str | None,
) -> list[dict]:
    """
    Answers each prompt greedily and sampled, by plain `generate` and by FSPAD, and prints a table of the results.

    Everything that can be checked is checked before anything is downloaded or written.

    Args:
        target, draft, device, dtype, trees (`tree_depth` ... `tree`): see [`load_models`].
        prompts: the user's messages; by default four short ones.
        json_file: where to write the rows.
        seed: given to `torch.manual_seed` before each answer.

    Returns:
        A row for each prompt and mode: prompt, do_sample, new_tokens, identical, plain_tokens_per_second,
        fspad_tokens_per_second, speedup, tau (`None` without a verification round).

    Raises:
        ValueError, OSError: an argument is wrong, or a model or a file cannot be had.
    """
    prompts = _checked_prompts(prompts)
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} leaves nothing to generate: expected 1 or more.")
    if json_file is not None:
        json_file = writable_file(json_file)
    console = console or Console()
    models = load_models(target, draft, device, dtype, **trees)
    with quiet_transformers():
        demo = _Demo(models, max_new_tokens, seed, console)
        with status("Warming up"):
            demo.warm_up(prompts[0])
        if console.is_terminal:
            console.print(LEGEND, highlight=False)
        rows = [row for prompt in prompts for row in demo.compare(prompt)]
    _print_table(rows, console)
    for note in demo.notes:
        console.out(note, highlight=False)
    if json_file is not None:
        write_json(json_file, rows)
    return rows


class _Demo:
    """The loaded models, and what every run of them shares."""

    def __init__(self, models: Models, max_new_tokens: int, seed: int, console: Console):
        self.tokenizer, self.model, self.draft = models.tokenizer, models.target, models.draft
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
        return encode_chat(self.tokenizer, [{"role": "user", "content": prompt}], self.model.device)

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


def _describe(prompt: str, mode: str, found: Divergence) -> str:
    where = f"{_short(prompt)!r}, {mode}: the first difference is at new token {found.index}"
    if found.gap is None:
        return where
    what = "difference in logits" if mode == "greedy" else "difference in log p - log E"
    return f"{where}, {what} {found.gap:.3g} (FSPAD's token is the target's choice no. {found.other_rank + 1})"


def _short(prompt: str, length: int = 15) -> str:
    line = " ".join(prompt.split())
    return line if len(line) <= length else f"{line[: length - 3]}..."


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _print_table(rows: list[dict], console: Console) -> None:
    columns = ("prompt", "mode", "tokens", "plain\ntok/s", "FSPAD\ntok/s", "speed-up", "tau", "identical")
    table = figure_table(*columns, words=2, title="FSPAD against plain generate")
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
