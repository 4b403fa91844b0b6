"""`fspad-hf profile`: where a speculation round's time goes, beside what reading the weights alone takes."""

import contextlib
import copy
import dataclasses
import statistics
from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from ..demo_target import released_draft
from ..generation import exact_mode, graphs
from ..generation.costs import Stopwatch
from ..generation.probe import probe
from ..generation.stateful import cache_of_rounds
from ..generation.tree import CandidateTree
from ..host import CACHE
from ..loading import encode_chat, load_models, tree_settings
from ..modeling_fspad import FSPADDraftModel
from ..runtime import quiet_transformers, resolve_device, resolve_dtype, status, writable_file, write_json
from ..speculation_config import RANGES, SpeculationConfig
from .bench import WARM_UP_TOKENS, describe_machine, reason
from .peers import MODES, Answer, Method, RoundTimer, make_methods
from .profile_tables import show_profile
from .shapes import Decree, random_pair, weight_bytes
from .trace import PARTS, Round, Tracer, middle_half
from .verify import PROMPTS, lengthen

FSPAD, GRAPH = "FSPAD eager", "FSPAD graph"
PEERS = ("compile", "prompt-lookup")


@dataclasses.dataclass(frozen=True)
class ProfileSettings:
    """
    What is measured, and how often.

    Args:
        max_new_tokens: of each answer.
        repeats: passes over everything; the methods take turns within each.
        modes: `greedy`, `sampled` (T = 1).
        methods: beside plain and FSPAD, any of `compile`, `prompt-lookup`.
        rows: of the verification forwards whose cost is measured on their own.
        tau: tokens a round by decree, for random weights, see [`Decree`]; `None` is the draft's own doing.
        bit_exact: everything inside [`bit_exact`].
    """

    max_new_tokens: int = 64
    repeats: int = 3
    modes: tuple[str, ...] = ("greedy", "sampled")
    methods: tuple[str, ...] = PEERS
    rows: tuple[int, ...] = (1, 8, 16, 32, 60)
    seed: int = 0
    tau: float | None = None
    bit_exact: bool = False

    def check(self, speculation: SpeculationConfig, positions: int | None = None, prompt: int = 0) -> None:
        """
        `ValueError` if these settings measure nothing with a draft that speculates so.

        Args:
            positions, prompt: of the target, and tokens of the longest prompt.
        """
        for name, known in (("modes", tuple(MODES)), ("methods", PEERS)):
            value = getattr(self, name)
            if set(value) - set(known) or len(set(value)) < len(value) or (name == "modes" and not value):
                raise ValueError(f"{name}={list(value)} must be some of {list(known)}, each once.")
        if self.repeats < 1:
            raise ValueError(f"repeats={self.repeats} measures nothing: expected 1 or more.")
        if not self.rows or min(self.rows) < 1 or len(set(self.rows)) < len(self.rows):
            raise ValueError(f"rows={list(self.rows)}: expected numbers of 1 or more, each once.")
        if self.tau is not None:
            Decree.check(self.tau, speculation)
        # the first round reads the prompt, the last ones' trees are cut short: neither is counted
        least, needed = 2 * speculation.tree_depth + 3, prompt + self.max_new_tokens + speculation.tree_depth
        if self.max_new_tokens < least:
            raise ValueError(
                f"{self.max_new_tokens} new tokens hold no round of a full tree: with "
                f"tree_depth={speculation.tree_depth} expected {least} or more; raise --max-new-tokens (with --shape, "
                "--rounds)."
            )
        if positions is not None and needed > positions:
            raise ValueError(
                f"A prompt of {prompt} tokens, {self.max_new_tokens} new ones and {speculation.tree_depth} tree "
                f"levels are more than the {positions} positions of the target: lower --context or --max-new-tokens "
                "(with --shape, --rounds or --tau)."
            )


class Watched(Method):
    """FSPAD whose rounds are traced, or emit as many tokens as decreed."""

    def __init__(self, draft: FSPADDraftModel, tau: float | None):
        name = GRAPH if draft.speculation_config.cuda_graphs else FSPAD
        super().__init__(name, {"assistant_model": draft})
        self.tau, self.tracer = tau, None

    def timer(self) -> RoundTimer:
        timer = RoundTimer()
        watching = [] if self.tau is None else [Decree(self.tau)]
        self.arguments["logits_processor"] = list(watching)
        watching += [] if self.tracer is None else [self.tracer]
        if watching:
            timer.on_round = lambda tree: [one.on_round(tree) for one in watching]
        return timer

    def traced(self, target: PreTrainedModel, *arguments) -> tuple[Answer, list[Round]]:
        self.tracer = Tracer(target.device)
        try:
            return self.answer(target, *arguments), self.tracer.read()
        finally:
            self.tracer.stop()
            self.tracer = None


def with_graphs(draft: FSPADDraftModel, cuda_graphs: bool) -> FSPADDraftModel:
    """The same draft, on the same weights, with and without graphs."""
    other = copy.copy(draft)
    other.speculation_config = dataclasses.replace(draft.speculation_config, cuda_graphs=cuda_graphs)
    return other


def profile(
    target: PreTrainedModel, draft: FSPADDraftModel, inputs: Sequence[dict], settings: ProfileSettings | None = None,
    report: Callable[[str], None] = lambda what: None,
) -> dict:  # fmt: skip
    """
    Measures a pair.

    Args:
        inputs: prompts, each `input_ids` and `attention_mask` (`[1, prompt]`).
        report: called with what is about to be done.

    Returns:
        `rounds` (of each mode: seconds and their parts, tau), `graph_rounds` (the same of captured ones; empty where
        none can be), `verify` (seconds by rows), `roofline` (bytes, bandwidth and the bounds they set) and `speed` (a
        row a method of each mode). Seconds and bytes throughout.

    Raises:
        ValueError: the settings measure nothing, or the target verifies nothing.
    """
    settings = settings or ProfileSettings()
    settings.check(draft.speculation_settings(target.device))
    if (why := probe(target).reason) is not None:
        raise ValueError(f"{type(target).__name__} generates without speculation, because {why}: nothing to time.")
    kinds = (False, True) if graphs.can_capture(target.device) else (False,)
    ours = [Watched(with_graphs(draft, captured), settings.tau) for captured in kinds]
    methods, errors = [*make_methods(list(settings.methods), {}, None), *ours], {}
    longest = max((one["input_ids"] for one in inputs), key=lambda ids: ids.shape[1])
    run = settings.max_new_tokens, settings.seed

    def tried(method: Method, work: Callable):
        try:
            return work() if method.name not in errors else None
        except Exception as error:
            if method in ours:
                raise
            errors[method.name] = reason(error)

    report("Warming up")
    verify = VerificationCost(target, longest, settings.rows)
    for method in methods:
        tried(method, lambda method=method: _warm_up(method, target, inputs, settings))
    answers, rounds, taus = {}, {}, {}
    for number in range(settings.repeats):
        report(f"Pass {number + 1} of {settings.repeats}")
        for mode in settings.modes:
            for method in methods[number % len(methods) :] + methods[: number % len(methods)]:
                made = tried(method, lambda m=method, mode=mode: [m.answer(target, i, mode, *run) for i in inputs])
                answers.setdefault((mode, method.name), []).append(made)
            for method in ours:
                for one in inputs:
                    answer, found = method.traced(target, one, mode, *run)
                    rounds.setdefault((mode, method.name), []).extend(found)
                    taus.setdefault((mode, method.name), []).extend(answer.accepted_lengths)
        verify.measure()
    found = [
        {mode: _rounds(rounds[mode, name], taus[mode, name]) for mode in settings.modes if (mode, name) in rounds}
        for name in (FSPAD, GRAPH)
    ]
    speed = {
        mode: _speed(mode, methods, answers, errors, [one["input_ids"].shape[1] for one in inputs])
        for mode in settings.modes
    }
    return {
        "rounds": found[0], "graph_rounds": found[1], "verify": verify.results(),
        "roofline": _roofline(target, draft, found[0]), "speed": speed,
    }  # fmt: skip


def _warm_up(method: Method, target: PreTrainedModel, inputs: Sequence[dict], settings: ProfileSettings) -> None:
    method.prepare(target, max(one["input_ids"].shape[1] for one in inputs) + settings.max_new_tokens)
    for mode in settings.modes:
        method.answer(target, inputs[0], mode, min(WARM_UP_TOKENS, settings.max_new_tokens), settings.seed)


class VerificationCost:
    """Times verification forwards over trees of given sizes behind one prompt, by the function that decoding runs."""

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel, input_ids: torch.LongTensor, rows: Sequence[int]):
        self.target, self.seconds = probe(model).view(model), {count: [] for count in rows}
        cache = DynamicCache(config=self.target.text_config)
        model.get_decoder()(input_ids=input_ids, use_cache=True, **{CACHE: cache})
        self.length = input_ids.shape[1]
        self.arena = cache_of_rounds(cache, self.length)
        self.measure()  # warms up, and the arena grows to its size
        self.seconds = {count: [] for count in rows}

    @torch.no_grad()
    def measure(self) -> None:
        """One forward of each size; none is kept, the next overwrites it."""
        device = self.target.device
        root, vocabulary = torch.full((1, 1), self.length, device=device), self.target.text_config.vocab_size
        with self.target.listening():
            for count, seconds in self.seconds.items():
                numbers = torch.arange(count, device=device)[None]
                tree = CandidateTree(numbers % vocabulary, torch.zeros_like(numbers), (numbers > 0).long())
                if self.target.chains_only:
                    tree = CandidateTree.chain(tree.tokens)
                shown = torch.ones(1, self.length + count, dtype=torch.bool, device=device)
                watch = Stopwatch(device)
                self.arena.place(root, self.length + count)
                self.target.verify(tree, self.arena, shown, root)
                seconds.append(watch.read())
                self.arena.keep([[]])

    def results(self) -> list[dict]:
        return [{"rows": count, "seconds": statistics.median(found)} for count, found in self.seconds.items()]


def _rounds(rounds: Sequence[Round], lengths: Sequence[int]) -> dict:
    deepest = max((one.levels for one in rounds), default=0)
    used = middle_half(one for one in rounds if one.levels == deepest)
    if not used:
        raise ValueError(
            "No round of a full tree was timed, because the answers ended early: pass prompts with longer answers "
            "(--prompt)."
        )
    parts = {part: statistics.fmean(one.parts[part] for one in used) for part in PARTS}
    busy = None if used[0].busy is None else statistics.fmean(one.busy for one in used)
    return {
        "seconds": sum(parts.values()), "parts": parts, "timed": len(rounds), "used": len(used),
        "tau": sum(lengths) / len(lengths), "gpu_busy_seconds": busy,
    }  # fmt: skip


def _roofline(target: PreTrainedModel, draft: FSPADDraftModel, rounds: dict) -> dict:
    """No round, and no plain token, takes less than reading the weights once."""
    size, depth = weight_bytes(target, draft), draft.speculation_settings(target.device).tree_depth
    bandwidth, read = copy_bandwidth(target.device), size["target"] + depth * (size["draft"] + size["head"])
    token, a_round = size["target"] / bandwidth, read / bandwidth
    return {
        "bandwidth": bandwidth, "target_bytes": size["target"], "draft_bytes": size["draft"],
        "head_bytes": size["head"], "draft_forwards": depth, "round_bytes": read, "plain_token_seconds": token,
        "plain_tokens_per_second": 1 / token, "round_seconds": a_round,
        "fspad_tokens_per_second": {mode: found["tau"] / a_round for mode, found in rounds.items()},
    }  # fmt: skip


def copy_bandwidth(device: torch.device, size: int = 1 << 28, repeats: int = 7) -> float:
    """Bytes a second, read and written, of the fastest of `repeats` copies of `size` bytes within the memory."""
    source = torch.ones(size // 4, dtype=torch.float32, device=device)  # written to: an untouched page is free
    copied, seconds = torch.empty_like(source).copy_(source), []
    for _ in range(repeats):
        watch = Stopwatch(device)
        copied.copy_(source)
        seconds.append(watch.read())
    return 2 * source.nbytes / min(seconds)


def _speed(mode: str, methods: Sequence[Method], answers: dict, errors: dict, prompts: Sequence[int]) -> list[dict]:
    """Medians over the repeats: tokens a second of whole calls, and seconds a token after the first."""
    rows, plain = [], None
    for method in methods:
        row = {"method": method.name, "tokens_per_second": None, "token_seconds": None, "ratio": None, "tau": None}
        row["error"] = errors.get(method.name)
        if row["error"] is None:
            speeds, steps = [], []
            for repeat in answers[mode, method.name]:
                tokens = sum(a.sequences.shape[1] - prompt for a, prompt in zip(repeat, prompts, strict=True))
                speeds.append(tokens / sum(a.seconds for a in repeat))
                steps.append(sum(a.seconds - a.prefill_seconds for a in repeat) / max(tokens - len(repeat), 1))
            lengths = [length for a in answers[mode, method.name][-1] for length in a.accepted_lengths]
            row |= {"tokens_per_second": statistics.median(speeds), "token_seconds": statistics.median(steps)}
            plain = plain or row["tokens_per_second"]
            row["tau"] = sum(lengths) / len(lengths) if lengths else None
            row["ratio"] = row["tokens_per_second"] / plain if methods[0].name not in errors else None
        rows.append(row)
    return rows


def run_profile(
    target: str | None = None, draft: str | None = None, device: str | None = None, dtype: str | None = None,
    shape: str | None = None, tau: float | None = None, rounds: int | None = None,
    draft_vocab_size: int | None = None, prompts: Sequence[str] | None = None, context: int | None = None,
    max_new_tokens: int | None = None, repeats: int = 3, modes: Sequence[str] = ("greedy", "sampled"),
    methods: Sequence[str] | None = None, rows: Sequence[int] = ProfileSettings.rows, seed: int = 0,
    bit_exact: bool = False, json_file: str | None = None, **trees: int | str | None,
) -> dict:  # fmt: skip
    """
    `fspad-hf profile`: prints where a round's time goes, and writes it to `json_file`.

    Args:
        target, draft, device, dtype, trees (`tree_depth` ... `tree`): see [`load_models`].
        shape: time random weights of this shape instead, see [`random_pair`]; with it `tau` (tokens a round by
            decree), `rounds` (of an answer, 20) and `draft_vocab_size`.
        prompts, max_new_tokens: of a real pair; by default 64 new tokens.
        context: tokens of the prompts, about; a shape's has exactly so many, by default 512.
        methods: beside plain and FSPAD: `compile`, `prompt-lookup` (which has nothing to look up in random text).
        repeats, modes, rows, seed, bit_exact: see [`ProfileSettings`].

    Returns:
        What the JSON file holds: see [`profile`], and target, draft, tree, dtype, context, settings, machine.

    Raises:
        ValueError, OSError: an argument is wrong, or a model cannot be had.
    """
    json_file = writable_file(json_file, "json_file") if json_file is not None else None
    told = {"repeats": repeats, "modes": tuple(modes), "rows": tuple(rows), "seed": seed, "bit_exact": bit_exact}
    place, precision = resolve_device(device), resolve_dtype(dtype, device)
    trees = {"tree": "fixed"} | tree_settings(**trees)
    with quiet_transformers():
        if shape is not None:
            _refuse("--shape", target=target, draft=draft, prompt=prompts, max_new_tokens=max_new_tokens)
            settings = ProfileSettings(
                **told, tau=tau, methods=tuple(["compile"] if methods is None else methods),
                max_new_tokens=Decree.tokens(tau, 20 if rounds is None else rounds),
            )  # fmt: skip
            context = 512 if context is None else context
            overrides = {k: v for k, v in {**trees, "draft_vocab_size": draft_vocab_size}.items() if v is not None}
            if "prompt-lookup" in settings.methods:
                raise ValueError("methods=['prompt-lookup'] finds nothing in what random weights write: leave it out.")
            if context < 1:
                raise ValueError(f"context={context}: expected 1 or more tokens.")

            def check(speculation: SpeculationConfig, positions: int | None) -> None:
                settings.check(speculation, positions, context)

            with status(f"Making random weights of {shape}"):
                pair = random_pair(shape, place, precision, overrides, check)
            ids = torch.arange(1, context + 1, device=place)[None] * 7919 % pair[1].config.vocab_size
            inputs = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]
            names = f"{shape} (random weights)", "random weights"
        else:
            _refuse("a real pair", tau=tau, rounds=rounds, draft_vocab_size=draft_vocab_size)
            settings = ProfileSettings(
                **told, methods=tuple(PEERS if methods is None else methods),
                max_new_tokens=64 if max_new_tokens is None else max_new_tokens,
            )  # fmt: skip
            texts = prompts or PROMPTS
            if not all(text.strip() for text in texts) or (context is not None and context < 1):
                raise ValueError(f"prompts={list(texts)!r}, context={context}: expected texts that say something.")
            saved = SpeculationConfig.from_pretrained(draft or str(released_draft()))
            settings.check(saved.update(**trees).resolved(place))
            models = load_models(target, draft, device, dtype, **trees)
            pair, names = (models.target, models.draft), (models.target_name, models.draft_name)
            inputs = [encode_chat(models.tokenizer, [{"role": "user", "content": text}], place) for text in texts]
            inputs = inputs if context is None else [lengthen(one, context) for one in inputs]
            positions = getattr(pair[0].config.get_text_config(), "max_position_embeddings", None)
            longest = max(one["input_ids"].shape[1] for one in inputs)
            settings.check(pair[1].speculation_settings(place), positions, longest)
        with contextlib.ExitStack() as stack:

            def report(what: str) -> None:
                stack.close()
                stack.enter_context(status(what))

            with exact_mode.bit_exact(pair[0]) if settings.bit_exact else contextlib.nullcontext():
                found = profile(*pair, inputs, settings, report)
    speculation = pair[1].speculation_settings(place)
    result = {
        "target": names[0], "draft": names[1], "tree": {name: getattr(speculation, name) for name in RANGES},
        "draft_vocab_size": pair[1].config.draft_vocab_size, "dtype": str(pair[0].dtype).removeprefix("torch."),
        "context": [one["input_ids"].shape[1] for one in inputs], "settings": dataclasses.asdict(settings),
        "machine": describe_machine(place), **found,
    }  # fmt: skip
    if json_file is not None:
        write_json(json_file, result)
    show_profile(result)
    return result


def _refuse(which: str, **given) -> None:
    wrong = [f"--{name.replace('_', '-')}" for name, value in given.items() if value is not None]
    if wrong:
        raise ValueError(f"{', '.join(wrong)} cannot go with {which}: leave out one or the other.")
