"""`fspad-hf profile`: where a speculation round's time goes, and how far that is from what the machine could do."""

import copy
import dataclasses
import statistics
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from transformers import LogitsProcessorList, PreTrainedModel
from transformers.cache_utils import DynamicCache

from ..generation import capturing
from ..generation.cache import ArenaCache
from ..generation.probe import probe
from ..generation.tree import CandidateTree
from ..host import CACHE
from ..modeling_fspad import FSPADDraftModel
from ..speculation_config import SpeculationConfig
from .bench import WARM_UP_TOKENS, reason
from .forcing import check_tau, forced
from .instrument import EXCLUDED, PARTS, Round, RoundClock, device_busy, instrumented
from .peers import MODES, Answer, Method, make_methods
from .roofline import copy_bandwidth, weight_traffic

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
        tau: tokens a round by decree, for random weights, see [`forced`]; `None` is the draft's own doing.
    """

    max_new_tokens: int = 64
    repeats: int = 3
    modes: tuple[str, ...] = ("greedy", "sampled")
    methods: tuple[str, ...] = PEERS
    rows: tuple[int, ...] = (1, 8, 16, 32, 60)
    seed: int = 0
    tau: float | None = None

    def check(self, speculation: SpeculationConfig) -> None:
        """`ValueError` if these settings measure nothing with a draft that speculates so."""
        for name, known in (("modes", tuple(MODES)), ("methods", PEERS)):
            value = getattr(self, name)
            if set(value) - set(known) or len(set(value)) < len(value) or (name == "modes" and not value):
                raise ValueError(f"{name}={list(value)} must be some of {list(known)}, each once.")
        if self.repeats < 1:
            raise ValueError(f"repeats={self.repeats} measures nothing: expected 1 or more.")
        if not self.rows or min(self.rows) < 1 or len(set(self.rows)) < len(self.rows):
            raise ValueError(f"rows={list(self.rows)}: expected numbers of 1 or more, each once.")
        if self.tau is not None:
            check_tau(self.tau, speculation)
        # the first round reads the prompt, the last ones' trees are cut short: neither is counted
        least = 2 * speculation.tree_depth + 3
        if self.max_new_tokens < least:
            raise ValueError(
                f"{self.max_new_tokens} new tokens hold no round of a full tree: with "
                f"tree_depth={speculation.tree_depth} expected {least} or more; raise --max-new-tokens (with --shape, "
                "--rounds)."
            )


class ForcedMethod(Method):
    """FSPAD whose rounds emit `tau` tokens on average."""

    def __init__(self, name: str, draft: FSPADDraftModel, tau: float, clock: RoundClock | None = None):
        super().__init__(name, {"assistant_model": draft})
        self.tau, self.clock = tau, clock
        self.captured = (
            draft.speculation_config.cuda_graphs
        )  # a processor of ours would take the walk out of the graph

    def answer(self, *args, **kwargs) -> Answer:
        excluded = nullcontext if self.clock is None else lambda: self.clock.inside(EXCLUDED)
        with forced(self.tau, excluded) as processor:
            self.arguments["logits_processor"] = LogitsProcessorList([] if self.captured else [processor])
            return super().answer(*args, **kwargs)


def fspad_method(draft: FSPADDraftModel, tau: float | None, clock: RoundClock | None = None) -> Method:
    name = GRAPH if draft.speculation_config.cuda_graphs else FSPAD
    return Method(name, {"assistant_model": draft}) if tau is None else ForcedMethod(name, draft, tau, clock)


def variant(draft: FSPADDraftModel, cuda_graphs: bool) -> FSPADDraftModel:
    """The same draft, on the same weights, with and without graphs."""
    other = copy.copy(draft)
    other.speculation_config = dataclasses.replace(draft.speculation_config, cuda_graphs=cuda_graphs)
    return other


class VerifyCost:
    """Times verification forwards over trees of given sizes behind one prompt, by the function that decoding runs."""

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel, input_ids: torch.LongTensor, rows: Sequence[int]):
        found = probe(model)
        self.rows, self.seconds = tuple(rows), {count: [] for count in rows}
        self.target = found.view(model)
        self.prefix = torch.ones_like(input_ids, dtype=torch.bool)
        cache = DynamicCache(config=self.target.text_config)
        model.get_decoder()(input_ids=input_ids, use_cache=True, **{CACHE: cache})
        self.arena = ArenaCache.from_dynamic(cache)
        self._pass()  # warms up, and the arena grows to its size

    def measure(self) -> None:
        """One forward of each size."""
        for count, seconds in self._pass().items():
            self.seconds[count].append(seconds)

    @torch.no_grad()
    def _pass(self) -> dict[int, float]:
        clock, length = RoundClock(self.target.device), self.prefix.shape[1]
        with instrumented(clock), self.target.listening():
            for count in self.rows:
                tokens = torch.arange(count, device=self.prefix.device)[None] % self.target.text_config.vocab_size
                zeros = torch.zeros_like(tokens)
                tree = CandidateTree(tokens, zeros, (torch.arange(count, device=tokens.device)[None] > 0).long())
                clock.begin_round()
                self.target.verify(tree, self.arena, self.prefix, position=length)  # not kept: the next overwrites it
                clock.end_round()
        return {count: r.parts["verify"] for count, r in zip(self.rows, clock.rounds(), strict=True)}


class Profile:
    """
    A pair's measurements: construct, [`warm_up`], [`measure`] as often as wanted, [`results`].

    Args:
        inputs: prompts, each `input_ids` and `attention_mask` (`[1, prompt]`).

    Raises:
        ValueError: the settings measure nothing, or the target cannot verify trees.
    """

    def __init__(
        self, target: PreTrainedModel, draft: FSPADDraftModel, inputs: Sequence[dict], settings: ProfileSettings
    ):
        settings.check(draft.speculation_settings(target.device))
        if (why := probe(target).reason) is not None:
            raise ValueError(f"{type(target).__name__} generates without speculation, because {why}: nothing to time.")
        self.target, self.draft, self.inputs, self.settings = target, draft, list(inputs), settings
        drafts = [
            variant(draft, captured)
            for captured in ((False, True) if capturing.can_capture(target.device) else (False,))
        ]
        self.drafts = {fspad_method(one, None).name: one for one in drafts}
        fspad = [fspad_method(one, settings.tau) for one in drafts]
        self.methods = [*make_methods(list(settings.methods), {}, None), *fspad]
        runs = [(mode, name) for mode in settings.modes for name in self.drafts]
        self.clocks = {run: RoundClock(target.device) for run in runs}
        self.answers: dict[tuple[str, str], list[list[Answer]]] = {}
        self.errors: dict[str, str] = {}
        self.profiled: dict[tuple[str, str], list[Answer]] = {run: [] for run in runs}
        longest = max((one["input_ids"] for one in self.inputs), key=lambda ids: ids.shape[1])
        self.verify = VerifyCost(target, longest, settings.rows)
        self.bandwidth = copy_bandwidth(target.device)

    def warm_up(self) -> None:
        """A few tokens by every method; one of the peers that fails is left out, with its reason."""
        length = max(one["input_ids"].shape[1] for one in self.inputs) + self.settings.max_new_tokens
        tokens = min(WARM_UP_TOKENS, self.settings.max_new_tokens)
        for method in self.methods:
            try:
                method.prepare(self.target, length)
                for mode in self.settings.modes:
                    method.answer(self.target, self.inputs[0], mode, tokens, self.settings.seed)
            except Exception as error:
                self._failed(method, error)

    def measure(self, number: int = 0) -> None:
        """One pass over methods, modes and prompts, rounds and verification forwards; `number` says who goes first."""
        for mode in self.settings.modes:
            for i in range(len(self.methods)):
                self._time(self.methods[(i + number) % len(self.methods)], mode)
            for name, draft in self.drafts.items():
                clock = self.clocks[mode, name]
                with instrumented(clock):
                    self.profiled[mode, name] += self._answers(fspad_method(draft, self.settings.tau, clock), mode)
        self.verify.measure()

    def results(self) -> dict:
        """
        `rounds` (of each mode: seconds and their parts, tau), `graph_rounds` (the same of captured ones; empty where
        none can be), `verify` (seconds by rows), `roofline` (bytes, bandwidth and the bounds they set) and `speed` (a
        row a method of each mode). Seconds and bytes throughout.
        """
        rounds, graph_rounds = (
            {mode: self._rounds(mode, name) for mode in self.settings.modes if name in self.drafts}
            for name in (FSPAD, GRAPH)
        )
        costs = [{"rows": n, "seconds": statistics.median(s)} for n, s in self.verify.seconds.items()]
        speed = {mode: self._speed(mode) for mode in self.settings.modes}
        return {
            "rounds": rounds,
            "graph_rounds": graph_rounds,
            "verify": costs,
            "roofline": self._roofline(rounds),
            "speed": speed,
        }

    def _answers(self, method: Method, mode: str) -> list[Answer]:
        run = (self.settings.max_new_tokens, self.settings.seed)
        return [method.answer(self.target, one, mode, *run) for one in self.inputs]

    def _time(self, method: Method, mode: str) -> None:
        if method.name not in self.errors:
            try:
                self.answers.setdefault((mode, method.name), []).append(self._answers(method, mode))
            except Exception as error:
                self._failed(method, error)

    def _failed(self, method: Method, error: Exception) -> None:
        if method.name in self.drafts:
            raise error
        self.errors[method.name] = reason(error)
        if self.target.device.type == "cuda":
            torch.cuda.empty_cache()

    def _rounds(self, mode: str, name: str) -> dict:
        timed = self.clocks[mode, name].rounds()
        used = middle_half(full_rounds(timed))
        parts = {part: statistics.fmean(r.parts[part] for r in used) for part in PARTS}
        lengths = [length for answer in self.profiled[mode, name] for length in answer.accepted_lengths]
        result = {"seconds": sum(parts.values()), "parts": parts, "timed": len(timed), "used": len(used)}
        result |= {"tau": sum(lengths) / len(lengths), "gpu_busy_seconds": None}
        if self.target.device.type == "cuda":
            result["gpu_busy_seconds"] = device_busy(self.target.device, lambda clock: self._once(mode, name, clock))
        return result

    def _once(self, mode: str, name: str, clock: RoundClock) -> None:
        method = fspad_method(self.drafts[name], self.settings.tau, clock)
        method.answer(self.target, self.inputs[0], mode, self.settings.max_new_tokens, self.settings.seed)

    def _roofline(self, rounds: dict) -> dict:
        traffic = weight_traffic(self.target, self.draft)
        token, a_round = traffic.target / self.bandwidth, traffic.round / self.bandwidth
        return {
            "bandwidth": self.bandwidth, "target_bytes": traffic.target, "draft_bytes": traffic.draft,
            "head_bytes": traffic.head, "draft_forwards": traffic.depth, "round_bytes": traffic.round,
            "plain_token_seconds": token, "plain_tokens_per_second": 1 / token, "round_seconds": a_round,
            "fspad_tokens_per_second": {mode: found["tau"] / a_round for mode, found in rounds.items()},
        }  # fmt: skip

    def _speed(self, mode: str) -> list[dict]:
        rows, plain = [], None
        for method in self.methods:
            repeats = self.answers.get((mode, method.name), [])
            row = {"method": method.name, "tokens_per_second": None, "token_seconds": None, "ratio": None, "tau": None}
            row["error"] = self.errors.get(method.name)
            if repeats and row["error"] is None:
                row |= _figures(repeats, [one["input_ids"].shape[1] for one in self.inputs])
                plain = plain or row["tokens_per_second"]
                row["ratio"] = row["tokens_per_second"] / plain if self.methods[0].name not in self.errors else None
            rows.append(row)
        return rows


def _figures(repeats: list[list[Answer]], prompts: list[int]) -> dict:
    """Medians over the repeats: tokens a second of whole calls, and seconds a token after the first."""
    speeds, steps = [], []
    for answers in repeats:
        tokens = sum(a.sequences.shape[1] - prompt for a, prompt in zip(answers, prompts, strict=True))
        speeds.append(tokens / sum(a.seconds for a in answers))
        steps.append(sum(a.seconds - a.prefill_seconds for a in answers) / max(tokens - len(answers), 1))
    lengths = [length for answer in repeats[-1] for length in answer.accepted_lengths]
    tau = sum(lengths) / len(lengths) if lengths else None
    return {"tokens_per_second": statistics.median(speeds), "token_seconds": statistics.median(steps), "tau": tau}


def full_rounds(rounds: Sequence[Round]) -> list[Round]:
    """
    Those of a full tree, but for the first of each call, in which the draft reads the prompt.

    Raises:
        ValueError: there is none.
    """
    deepest = max((r.levels for r in rounds), default=0)
    full = [r for r in rounds if not r.first and r.levels == deepest]
    if not full:
        raise ValueError(
            f"None of the {len(rounds)} rounds timed was a later one of a full tree, because the answers ended early: "
            "pass prompts with longer answers (--prompt)."
        )
    return full


def middle_half(rounds: Sequence[Round]) -> list[Round]:
    """Without the fastest and the slowest quarter: what else the machine did shall not weigh on the means."""
    ordered = sorted(rounds, key=lambda r: r.seconds)
    cut = len(ordered) // 4
    return ordered[cut : len(ordered) - cut]


def profile(
    target: PreTrainedModel,
    draft: FSPADDraftModel,
    inputs: Sequence[dict],
    settings: ProfileSettings | None = None,
    report: Callable[[str], None] = lambda what: None,
) -> dict:
    """
    Measures a pair; see [`Profile.results`] for what it returns.

    Args:
        inputs: prompts, each `input_ids` and `attention_mask` (`[1, prompt]`).
        report: called with what is about to be done.
    """
    measured = Profile(target, draft, inputs, settings or ProfileSettings())
    report("Warming up")
    measured.warm_up()
    for number in range(measured.settings.repeats):
        report(f"Pass {number + 1} of {measured.settings.repeats}")
        measured.measure(number)
    return measured.results()
