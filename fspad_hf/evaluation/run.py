"""`fspad-hf bench` from its command line to the report."""

import hashlib
import math
import os
import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..configuration_fspad import FSPADConfig
from ..generation import exact_mode
from ..generation.tree import TreeShape
from ..loading import Models, load_draft, load_models
from ..runtime import check_reachable, is_exact, quiet_transformers, status, time_left, write_json
from ..speculation_config import SpeculationConfig
from .bench import Bench, BenchConfig, RecordFile, describe_machine
from .peers import METHOD_NAMES, MODES, load_assistant, make_methods
from .report import MODE_TITLES, results_table, write_report
from .spec_bench import Question, read_prompts, read_questions
from .summary import summarise

SECONDS_A_REFRESH = 0.5  # summing up thousands of records takes a while


def run_bench(
    output: str,
    target: str | None = None,
    drafts: Sequence[str] | None = None,
    assistant: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    questions: str | None = None,
    prompts: str | None = None,
    tasks: Sequence[str] | None = None,
    per_task: int | None = None,
    turns: int | None = None,
    modes: Sequence[str] = ("greedy", "sampled"),
    methods: Sequence[str] = ("compile", "prompt-lookup", "fspad"),
    max_new_tokens: int = 128,
    seed: int = 0,
    raw_prompts: bool = False,
    bit_exact: bool = False,
    console: Console | None = None,
    **trees: int | str | None,
) -> dict:
    """
    Runs a bench, or goes on with one, and writes results.json, report.md and its plots to `output`.

    Args:
        target, device, dtype, trees (`tree_depth` ... `tree`): see [`load_models`].
        drafts: each a path or Hub id, or NAME=PATH_OR_HUB_ID to name it in tables; the first picks the target if there
            is none. By default the released draft.
        assistant: a model for stock assisted generation; adds that method.
        questions: Spec-Bench's question.jsonl; by default the published one, downloaded once.
        prompts: the user's own prompts instead, see [`read_prompts`].
        tasks, per_task, turns: only these tasks, so many questions of each, so many turns of each.
        raw_prompts: do without a chat template.
        bit_exact: all methods run inside [`bit_exact`], in which no tie excuses a difference.

    Returns:
        What results.json holds: title, command, config, machine, questions, summary (what a model card shows of
        it), figures (see [`summarise`]), verdict, exact, lossless, records.

    Raises:
        ValueError, OSError: an argument is wrong, or a model or a file cannot be had.
    """
    import matplotlib  # noqa: F401 -- told before the work that it is missing

    _check(modes, max_new_tokens, turns)
    named = _names(drafts or [""])
    folder = _writable_folder(output)
    asked = read_prompts(prompts) if prompts else read_questions(questions, per_task, tasks)
    for draft in named.values():
        if draft:
            check_reachable(draft, "draft")
            FSPADConfig.from_pretrained(draft)
    models = load_models(target, next(iter(named.values())) or None, device, dtype, **trees)
    loaded = {name: models.draft if i == 0 else load_draft(path, models, **trees)
              for i, (name, path) in enumerate(named.items())}  # fmt: skip
    if not raw_prompts and not getattr(models.tokenizer, "chat_template", None):
        raise ValueError(
            f"The target {models.target_name!r} has no chat template: pass --raw-prompts to ask without one."
        )
    chosen = [*methods, *(["assistant"] if assistant and "assistant" not in methods else [])]
    helper = load_assistant(assistant, models.target, models.tokenizer) if assistant else None
    ways = make_methods(chosen, loaded, helper)
    config = BenchConfig(
        target=models.target_name, drafts={name: path or models.draft_name for name, path in named.items()},
        assistant=assistant, source=Path(prompts).name if prompts else "spec-bench", tasks=tuple(tasks or ()),
        asked=_digest(asked), per_task=per_task, turns=turns,
        modes=tuple(modes), methods=tuple(way.name for way in ways),
        max_new_tokens=max_new_tokens, seed=seed, device=str(models.target.device),
        dtype=str(models.target.dtype).removeprefix("torch."), threads=torch.get_num_threads(),
        raw_prompts=raw_prompts, bit_exact=bit_exact,
        trees={name: tree_settings(draft.speculation_settings(draft.device)) for name, draft in loaded.items()},
    )  # fmt: skip
    file = RecordFile(folder, config)
    try:
        with exact_mode.bit_exact(models.target) if bit_exact else nullcontext():
            _ask_all(asked, models, ways, config, file, console or Console())
    finally:
        results = _results(file, config, models)
        if file.records:
            write_json(folder / "results.json", results)
            write_report(folder, results)
    console = console or Console()
    console.print(results_table(results["figures"], results["title"]), results["verdict"])
    console.print(f"The report is in {folder / 'report.md'}", highlight=False, markup=False, soft_wrap=True)
    return results


def _ask_all(asked: list[Question], models: Models, ways, config: BenchConfig, file: RecordFile, console: Console):
    done = file.done()
    left = [(order, question) for order, question in enumerate(asked) if question.number not in done]
    if not left:
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    columns += (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    progress = Progress(*columns, console=console, speed_estimate_period=math.inf)  # a question may take minutes
    bar = progress.add_task("questions", total=len(asked), completed=len(done))
    running: list[dict] = []
    shown, answers = 0.0, 1
    bench = Bench(models.target, models.tokenizer, ways, config)
    with quiet_transformers(), status("Warming up"):  # before the live table: two displays would hide each other
        bench.prepare(asked)
    for name, why in bench.broken.items():
        console.print(f"{name} does not run here: {why}", style="yellow", highlight=False, markup=False)
    began = time.perf_counter()
    with quiet_transformers(), Live(progress, console=console, auto_refresh=False, transient=True) as live:

        def show(record: dict | None = None):
            nonlocal shown
            if record is not None:
                running.append(record)
            progress.update(bar, completed=len(file.done()) + len(running) / answers)
            if console.is_terminal and (record is None or time.monotonic() - shown > SECONDS_A_REFRESH):
                shown = time.monotonic()
                known = file.records + running
                live.update(Group(results_table(summarise(known, resamples=20)), progress), refresh=True)

        bench.report = show
        for order, question in left:  # in the order of an uninterrupted run, in which methods take turns too
            answers = len(config.modes) * len(ways) * len(question.turns[: config.turns])
            records = bench.ask(question, order)
            running.clear()
            file.add(records)
            show()
            if not console.is_terminal:
                now = len(file.done())
                rest = time_left(began, now - len(done), len(asked) - len(done))
                print(f"question {now} of {len(asked)}, {rest}", file=sys.stderr, flush=True)


def _results(file: RecordFile, config: BenchConfig, models: Models) -> dict:
    from dataclasses import asdict

    figures = summarise(file.records)
    machine = describe_machine(models.target.device)
    exact = config.bit_exact or is_exact(str(models.target.device.type), models.target.dtype)
    return {
        "title": f"{Path(config.target).name} on {config.source}",
        "command": "fspad-hf " + shlex.join(sys.argv[1:]),
        "config": asdict(config),
        "machine": machine,
        "questions": len(file.done()),
        "summary": card_summary(figures, config, machine),
        "figures": figures,
        "verdict": verdict(figures, list(config.drafts), exact),
        "exact": exact,
        "lossless": all(0 < lossless["same"] == lossless["compared"] for lossless in (
            methods[name]["lossless"] for methods in figures.values() for name in config.drafts if name in methods)),
        "records": file.records,
    }  # fmt: skip


def card_summary(figures: dict, config: BenchConfig, machine: dict[str, str]) -> dict:
    """tau and speed-up of the first draft in the first mode, for [`fspad_hf.cards.read_results`]."""
    mode, name = config.modes[0], next(iter(config.drafts))
    tasks = figures.get(mode, {}).get(name, {}).get("tasks", {})
    shown = {task: {what: found[what]["value"] for what in ("tau", "speedup")} for task, found in tasks.items()}
    prompts = sum(found["prompts"] for found in tasks.values())
    settings = {"mode": MODE_TITLES[mode], "questions": prompts, "new tokens a turn": config.max_new_tokens}
    settings |= {"dtype": config.dtype, "tree (depth, top-k, nodes)": ", ".join(map(str, config.trees[name]))}
    return {"tasks": shown, **settings, **machine}


def verdict(figures: dict, names: Sequence[str], exact: bool) -> str:
    """One line on whether FSPAD gave plain generate's tokens."""
    counts = [methods[name]["lossless"] for methods in figures.values() for name in names if name in methods]
    same, compared = sum(c["same"] for c in counts), sum(c["compared"] for c in counts)
    if not compared:
        return "No answer of FSPAD's was compared with plain generate's."
    line = f"FSPAD gave plain generate's tokens in {same} of {compared} answers"
    if plain := sum(
        methods[name]["not_speculated"] for methods in figures.values() for name in names if name in methods
    ):
        line += f" ({plain} of them without speculation, which fspad_hf.generation.probe may explain)"
    if same == compared:
        return f"{line}."
    if exact:
        return f"{line}: NOT LOSSLESS."
    near = sum(c["near_ties"] for c in counts)
    beyond = compared - same - near
    line = f"{line}; {near} part at near ties, as half precision does"
    return f"{line}, {beyond} by more than rounding explains: NOT LOSSLESS." if beyond else f"{line}."


def tree_settings(settings: SpeculationConfig) -> list[int | str]:
    """
    Depth, top-k and nodes of a draft's trees; "lookup" and its tokens where text is looked up, "auto" where these are
    the most, and each round has its own.
    """
    depth, top_k, nodes, lookup = TreeShape.of(settings)
    words = {f"lookup {lookup}": lookup, "auto": settings.tree == "auto"}
    return [depth, top_k, nodes, *(word for word, holds in words.items() if holds)]


def _names(drafts: Sequence[str]) -> dict[str, str]:
    """Each draft by its name in tables."""
    named: dict[str, str] = {}
    for index, draft in enumerate(drafts):
        name, _, path = draft.partition("=")
        if not name or not path or "/" in name:  # a path may hold an equals sign
            name, path = ("FSPAD" if index == 0 else f"FSPAD {index + 1}"), draft
        if name in named or name in METHOD_NAMES:
            raise ValueError(f"draft={draft!r}: the name {name!r} is taken: give it another, NAME=PATH_OR_HUB_ID.")
        named[name] = path
    return named


def _digest(asked: Sequence[Question]) -> str:
    return hashlib.sha256(repr(asked).encode()).hexdigest()[:16]


def _writable_folder(output: str) -> Path:
    folder = Path(output).expanduser()
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise OSError(f"output={output!r} cannot be written, because of {str(there)!r}: name a folder that can be.")
    return folder


def _check(modes: Sequence[str], max_new_tokens: int, turns: int | None) -> None:
    unknown = [mode for mode in modes if mode not in MODES]
    if unknown or not modes:
        raise ValueError(f"modes={list(modes)} must be some of {list(MODES)}.")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} leaves nothing to generate: expected 1 or more.")
    if turns is not None and turns < 1:
        raise ValueError(f"turns={turns} leaves nothing to ask: expected 1 or more.")
