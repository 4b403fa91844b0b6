"""`fspad-hf profile` from its command line to its tables."""

import contextlib
import gc
import math
from collections.abc import Sequence
from dataclasses import asdict

import torch
from huggingface_hub.errors import StrictDataclassError

from ..demo_target import released_draft
from ..loading import encode_chat, load_models, tree_settings
from ..modeling_fspad import config_for_target
from ..runtime import quiet_transformers, resolve_device, resolve_dtype, status, writable_file, write_json
from ..speculation_config import FIELDS, RANGES, SpeculationConfig
from .bench import describe_machine
from .forcing import total_tokens
from .profile import PEERS, ProfileSettings, profile
from .profile_report import profile_tables, save_plot
from .shapes import random_draft, random_target, shape_config
from .verify import PROMPTS, lengthen

MAX_NEW_TOKENS, ROUNDS, CONTEXT = 64, 20, 512


def run_profile(
    target: str | None = None, draft: str | None = None, device: str | None = None, dtype: str | None = None,
    shape: str | None = None, tau: float | None = None, rounds: int | None = None,
    draft_vocab_size: int | None = None, prompts: Sequence[str] | None = None, context: int | None = None,
    max_new_tokens: int | None = None, repeats: int = 3, modes: Sequence[str] = ("greedy", "sampled"),
    methods: Sequence[str] | None = None, rows: Sequence[int] = ProfileSettings.rows, seed: int = 0,
    json_file: str | None = None, plot: str | None = None,
    **trees: int | str | None,
) -> dict:  # fmt: skip
    """
    `fspad-hf profile`: prints where a round's time goes, and writes it to `json_file` and, as an SVG, to `plot`.

    Args:
        target, draft, device, dtype, trees (`tree_depth` ... `tree`): see [`load_models`].
        shape: time random weights of this shape instead, see [`shape_config`]; with it `tau` (tokens a round by
            decree), `rounds` (of an answer) and `draft_vocab_size`.
        prompts, max_new_tokens: of a real pair.
        context: tokens of the prompts, about; a shape's has exactly so many.
        methods: beside plain and FSPAD: `compile`, `prompt-lookup` (which has nothing to look up in random text).
        repeats, modes, rows, seed: see [`ProfileSettings`].

    Returns:
        What the JSON file holds: see [`profile`], and target, draft, tree, dtype, context, settings, machine.

    Raises:
        ValueError, OSError: an argument is wrong, or a model cannot be had.
    """
    files = [writable_file(path, option) if path is not None else None
             for path, option in ((json_file, "json_file"), (plot, "plot"))]  # fmt: skip
    if plot is not None:
        _check_plot(plot)
    common = {"repeats": repeats, "modes": tuple(modes), "rows": tuple(rows), "seed": seed}
    place, precision = resolve_device(device), resolve_dtype(dtype, device)
    try:
        with quiet_transformers():
            if shape is not None:
                _refuse("--shape", target=target, draft=draft, prompts=prompts, max_new_tokens=max_new_tokens)
                common["methods"] = tuple(["compile"] if methods is None else methods)
                made = _shape(shape, tau, rounds, context, draft_vocab_size, place, precision, trees, common)
            else:
                _refuse("a real pair", tau=tau, rounds=rounds, draft_vocab_size=draft_vocab_size)
                common["methods"] = tuple(PEERS if methods is None else methods)
                common["max_new_tokens"] = MAX_NEW_TOKENS if max_new_tokens is None else max_new_tokens
                made = _pair(target, draft, device, dtype, prompts, context, place, trees, common)
            result = _measured(*made)
            del made
    finally:
        _free(place)
    _show(result, *files)
    return result


def _pair(target, draft, device, dtype, prompts, context, place, trees, common):
    """What to measure of a target and a draft that exist, after the checks that need no weights."""
    settings = ProfileSettings(**common)
    saved = SpeculationConfig.from_pretrained(draft or str(released_draft()))
    settings.check(saved.update(tree="fixed", **tree_settings(**trees)).resolved(place))
    texts = prompts or PROMPTS
    if not all(text.strip() for text in texts) or (context is not None and context < 1):
        raise ValueError(f"prompts={list(texts)!r}, context={context}: expected texts that say something, and tokens.")
    models = load_models(target, draft, device, dtype, **{"tree": "fixed", **trees})
    inputs = [encode_chat(models.tokenizer, [{"role": "user", "content": text}], place) for text in texts]
    if context is not None:
        inputs = [lengthen(one, context) for one in inputs]
    _check_room(
        models.target,
        max(one["input_ids"].shape[1] for one in inputs),
        settings,
        models.draft.speculation_settings(place),
    )
    return models.target, models.draft, inputs, settings, models.target_name, models.draft_name


def _shape(shape, tau, rounds, context, draft_vocab_size, place, precision, trees, common):
    """What to measure of random weights."""
    rounds, context = ROUNDS if rounds is None else rounds, CONTEXT if context is None else context
    if tau is None or not math.isfinite(tau):
        raise ValueError(
            f"tau={tau}: a random draft accepts nothing, so say how many tokens a round shall emit, such as --tau 2.5."
        )
    if rounds < 1 or context < 1:
        raise ValueError(f"rounds={rounds}, context={context}: expected 1 or more of each.")
    if "prompt-lookup" in common["methods"]:
        raise ValueError("methods=['prompt-lookup'] finds nothing in what random weights write: leave it out.")
    config = shape_config(shape)
    settings = ProfileSettings(**common, tau=tau, max_new_tokens=1 + total_tokens(tau, rounds))
    options = {"tree": "fixed"} | tree_settings(**trees) | {"draft_vocab_size": draft_vocab_size}
    options = {name: value for name, value in options.items() if value is not None}
    with status(f"Making random weights of {shape}"):
        target = random_target(config, place, precision, lambda meta: _check_shape(meta, options, context, settings))
        draft = random_draft(target, **options)
    vocabulary = target.config.get_text_config().vocab_size
    ids = torch.arange(1, context + 1, device=place)[None] * 7919 % vocabulary
    inputs = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]
    return target, draft, inputs, settings, f"{shape} (random weights)", "random weights"


def _check_shape(meta, options, context, settings):
    try:
        config_for_target(meta, **{name: value for name, value in options.items() if name not in FIELDS})
    except StrictDataclassError as error:  # which is no ValueError, and says the same at greater length
        raise ValueError(str(error.__cause__ or error)) from error
    trees = SpeculationConfig(**{name: value for name, value in options.items() if name in FIELDS}).resolved()
    settings.check(trees)
    _check_room(meta, context, settings, trees)


def _check_room(target, prompt: int, settings: ProfileSettings, speculation: SpeculationConfig) -> None:
    """Prompt, answer and a last tree must fit the target's positions, so that no tree is cut short by their end."""
    table = getattr(target.config.get_text_config(), "max_position_embeddings", None)
    needed = prompt + settings.max_new_tokens + speculation.tree_depth
    if table is not None and needed > table:
        raise ValueError(
            f"A prompt of {prompt} tokens, {settings.max_new_tokens} new ones and {speculation.tree_depth} tree "
            f"levels are more than the {table} positions of {type(target).__name__}: lower --context or "
            "--max-new-tokens (with --shape, --rounds or --tau)."
        )


def _measured(target, draft, inputs, settings, target_name, draft_name) -> dict:
    with contextlib.ExitStack() as stack:

        def report(what: str):
            stack.close()
            stack.enter_context(status(what))

        found = profile(target, draft, inputs, settings, report)
    speculation = draft.speculation_settings(target.device)
    tree = {name: getattr(speculation, name) for name in RANGES}
    return {
        "target": target_name, "draft": draft_name, "tree": tree, "draft_vocab_size": draft.config.draft_vocab_size,
        "dtype": str(target.dtype).removeprefix("torch."),
        "context": [one["input_ids"].shape[1] for one in inputs],
        "settings": asdict(settings), "machine": describe_machine(target.device), **found,
    }  # fmt: skip


def _show(result: dict, json_file, plot) -> None:
    from rich.console import Console

    if json_file is not None:
        write_json(json_file, result)
    if plot is not None:
        save_plot(result, plot)
    console, tree = Console(), [number for number in result["tree"].values() if number]
    console.print(
        f"{result['target']}, draft {result['draft']}, {result['dtype']}, trees {tree}, prompts of "
        f"{result['context']} tokens, {result['machine']['device']}",
        highlight=False, markup=False, soft_wrap=True,
    )  # fmt: skip
    for title, table in profile_tables(result):
        console.print(f"\n{title}", table, sep="\n", highlight=False)


def _refuse(which: str, **given) -> None:
    wrong = [f"--{name.replace('_', '-').removesuffix('s') if name == 'prompts' else name.replace('_', '-')}"
             for name, value in given.items() if value is not None]  # fmt: skip
    if wrong:
        raise ValueError(f"{', '.join(wrong)} cannot go with {which}: leave out one or the other.")


def _check_plot(plot: str) -> None:
    if not str(plot).endswith(".svg"):
        raise ValueError(f"plot={str(plot)!r} would be an SVG: expected a name that ends in .svg.")
    import matplotlib  # noqa: F401 -- told before the work that it is missing


def _free(place: torch.device) -> None:
    """What compiled graphs and freed models still hold."""
    torch.compiler.reset()
    gc.collect()
    if place.type == "cuda":
        torch.cuda.empty_cache()
