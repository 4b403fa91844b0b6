"""tau without decoding: the rounds simulated over a continuation that is already known.

Exact, because a tree depends on the tokens so far and not on what else a forward computed: the target's features of
all tokens come from one forward, and the trees are grown as decoding grows them, many side by side, and walked along
the known tokens.
"""

from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass

import torch
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

from ..evaluation.spec_bench import read_questions
from ..generation.decoding import SpeculationRecord
from ..generation.drafting import Drafter
from ..generation.lookup import PromptLookup
from ..generation.probe import probe
from ..generation.target import depth_limit
from ..generation.tree import CandidateTree
from ..generation.tuning import FixedTrees
from ..generation.verification import walk_and_emit
from ..loading import encode_chat, load_models
from ..modeling_fspad import FSPADDraftModel, FSPADDraftOutput
from ..runtime import counted, quiet_transformers, writable_file, write_json
from .targets import LOGITS_AT_ONCE

TREES_AT_ONCE = 64


class KnownNoise:
    """Rows already drawn, `[tokens, V]`: row i decided token i of the continuation."""

    def __init__(self, seed: int, tokens: int, vocab_size: int, device: torch.device):
        torch.manual_seed(seed)  # as before the plain run: one [1, V] row a token, in order
        self.rows = torch.cat([torch.empty(1, vocab_size, device=device).exponential_() for _ in range(tokens)])


class KnownTokens:
    """A [`TokenEmitter`] that reads from a known sequence."""

    def __init__(self, tokens: list[int], start: int):
        self.tokens, self.at = tokens, start

    @property
    def finished(self) -> bool:
        return self.at >= len(self.tokens)

    def emit(self, logits: torch.Tensor) -> int:
        self.at += 1
        return self.tokens[self.at - 1]


@torch.no_grad()
def simulate(
    target: PreTrainedModel,
    draft: FSPADDraftModel,
    sequence: torch.LongTensor,
    prompt_length: int,
    max_length: int,
    noise: KnownNoise | None = None,
    logits_processor: LogitsProcessorList | None = None,
    features: torch.Tensor | None = None,
    ends: Container[int] | None = None,
) -> SpeculationRecord:
    """
    The record that `generate(assistant_model=draft)` would have made of emitting `sequence`, round for round, with the
    paper's trees unless the draft's settings say otherwise.

    Args:
        sequence (`[1, length]`): prompt and continuation.
        max_length: what the call would have had; trees near it are shallower.
        noise: the rows of a sampled continuation, for coupled drafting; its first row decided the first new token.
        logits_processor: the call's static warpers, for coupled drafting.
        features (`[1, length, hidden]`): the target's, if already at hand.
        ends: the tokens that end an answer; by default those of the target's generation config.
    """
    found = probe(target)
    view = found.view(target)
    if features is None:
        features = target.get_decoder()(input_ids=sequence, use_cache=False).last_hidden_state
    drafter = Drafter(draft, view, logits_processor, draft.speculation_settings())
    read = drafter.accept(features[:, :-1], sequence[:, 1:])
    rows = noise.rows if noise is not None and drafter.settings.coupled_drafting else None

    fixed = FixedTrees(drafter.settings)
    logits = fixed.shape.top_k * (draft.config.draft_vocab_size or draft.config.vocab_size)  # of a level of a tree
    at_once = min(max(LOGITS_AT_ONCE // logits, 1), TREES_AT_ONCE)

    def limit(length: int, depth: int = fixed.shape.depth) -> int:
        return depth_limit(depth, length, 0, max_length, view.text_config)

    lookup = PromptLookup(sequence[0, : prompt_length + 1].tolist(), _ends(target) if ends is None else ends)
    emitter, record = KnownTokens(sequence[0].tolist(), prompt_length + 1), SpeculationRecord()
    grown, trees = range(0), None
    while not emitter.finished:
        length = emitter.at
        if length not in grown:  # all trees of a depth from here on, of which a walk visits some
            end = min(length + at_once, sequence.shape[1])
            grown = range(length, next((n for n in range(length, end) if limit(n) != limit(length)), end))
            trees = _trees_at(drafter, read, grown, fixed.shape._replace(depth=limit(length)), rows, prompt_length)
        found = lookup.continuation(drafter.settings.tree_lookup_tokens)
        chosen, root = fixed.choose(found), torch.tensor([[emitter.tokens[length - 1]]])
        if trees is None or not chosen.total_nodes:
            tree = CandidateTree.chain(root)
        else:
            tree = trees.best(root, length - grown.start, chosen.total_nodes).trimmed()
        if chain := found.tokens[: limit(length, chosen.lookup)]:
            tree = tree.grafted(torch.tensor([chain])).trimmed()
        path: list[int] = []
        walk_and_emit(tree, features.new_empty(1, len(tree), 0), [emitter], [path], len(tree), [0])
        record.accepted_lengths.append(len(path))
        lookup.extend(emitter.tokens[length : emitter.at])
    return record


def _trees_at(drafter, read, lengths: range, shape, rows: torch.Tensor | None, prompt_length: int):
    """The trees behind texts of these lengths, on the CPU; `rows` (`[tokens, V]`): the continuation's noise."""
    if shape.depth < 1:
        return None
    here = slice(lengths.start - 2, lengths.stop - 2)  # pair t holds token t + 1
    at = torch.arange(here.start, here.stop, device=drafter.draft.device)[None]
    if rows is not None:
        first = lengths.start - prompt_length
        rows = torch.stack([rows[first + level :][: len(lengths)] for level in range(shape.depth)])
    outputs = FSPADDraftOutput(read.logit_features[:, here], read.features[:, here])
    return drafter.grow_at(outputs, at, shape, rows).cpu()


def _ends(target: PreTrainedModel) -> list[int]:
    ends = target.generation_config.eos_token_id
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


class SeededDraws(LogitsProcessor):
    """
    Makes greedy batched decoding sample: row b draws its tokens as plain sampling does after `manual_seed(seeds[b])`.
    """

    def __init__(self, seeds: list[int], device: torch.device):
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor) -> torch.Tensor:
        noise = [torch.empty_like(scores[:1]).exponential_(generator=generator) for generator in self.generators]
        return scores.softmax(-1).log() - torch.cat(noise).log()


def known_continuations(
    target: PreTrainedModel,
    prompts: list[torch.LongTensor],
    max_new_tokens: int,
    seeds: list[int] | None = None,
    batch_size: int = 16,
) -> Iterator[tuple[int, torch.LongTensor]]:
    """
    What plain `generate` makes of each prompt, decoded in batches of like lengths; (number of the prompt, sequence).

    Args:
        prompts: each `[1, length]`; the sequences are `[1, length + new]`, up to the first EOS.
        seeds: one a prompt: sampled at T = 1 (top_k 0, top_p 1) as after `torch.manual_seed` of it; `None`: greedy.
    """
    eos = target.generation_config.eos_token_id
    eos = set(eos if isinstance(eos, list) else [eos])
    order = sorted(range(len(prompts)), key=lambda number: prompts[number].shape[1])
    for batch in (order[i : i + batch_size] for i in range(0, len(order), batch_size)):
        width = prompts[batch[-1]].shape[1]
        rows = [torch.nn.functional.pad(prompts[n], (width - prompts[n].shape[1], 0)) for n in batch]
        shown = [torch.arange(width)[None] >= width - prompts[n].shape[1] for n in batch]
        draws = [SeededDraws([seeds[n] for n in batch], target.device)] if seeds is not None else []
        out = target.generate(
            torch.cat(rows), attention_mask=torch.cat(shown).long().to(target.device), do_sample=False,
            max_new_tokens=max_new_tokens, logits_processor=LogitsProcessorList(draws),
            pad_token_id=target.generation_config.pad_token_id or 0,
        )  # fmt: skip
        for number, tokens in zip(batch, out[:, width:].tolist(), strict=True):
            new = next((i + 1 for i, token in enumerate(tokens) if token in eos), len(tokens))
            yield number, torch.cat((prompts[number], prompts[number].new_tensor([tokens[:new]])), dim=-1)


@dataclass(frozen=True)
class KnownAnswer:
    """
    What the target says to one prompt.

    Args:
        prompt: its number.
        tokens: of prompt and answer, the first `prompt_length` the prompt's.
        seed: what it was sampled with; `None`: greedy.
    """

    prompt: int
    task: str
    tokens: list[int]
    prompt_length: int
    seed: int | None


def known_answers(
    target: PreTrainedModel, tokenizer, prompts: list[tuple[str, str]], max_new_tokens: int, seed: int | None = None
) -> Iterator[KnownAnswer]:
    """
    [`known_continuations`] of (task, user message) pairs in the chat template, greedy or at T = 1.

    Args:
        seed: prompt number n is sampled with `seed + n`; `None`: greedy.
    """
    ids = [
        encode_chat(tokenizer, [{"role": "user", "content": text}], target.device)["input_ids"] for _, text in prompts
    ]
    seeds = None if seed is None else [seed + number for number in range(len(prompts))]
    for number, sequence in known_continuations(target, ids, max_new_tokens, seeds):
        own = None if seeds is None else seeds[number]
        yield KnownAnswer(number, prompts[number][0], sequence[0].tolist(), ids[number].shape[1], own)


@torch.no_grad()
def simulate_answer(
    target: PreTrainedModel, draft: FSPADDraftModel, answer: KnownAnswer, max_new_tokens: int
) -> list[dict]:
    """
    The rounds of a draft over one answer: greedy, or with coupled and with uncoupled drafting.

    Returns:
        A row a mode: prompt, task, mode, tokens (after the first), rounds, accepted_lengths.
    """
    sequence, length = torch.tensor([answer.tokens], device=target.device), answer.prompt_length
    features = target.get_decoder()(input_ids=sequence, use_cache=False).last_hidden_state
    settings, vocabulary = draft.speculation_config, target.config.get_text_config().vocab_size
    most = max_new_tokens + draft.speculation_settings().tree_depth
    rows, coupled = [], settings.coupled_drafting
    try:
        for mode in ("greedy",) if answer.seed is None else ("coupled", "uncoupled"):
            settings.coupled_drafting = mode == "coupled"
            noise = KnownNoise(answer.seed, most, vocabulary, target.device) if mode == "coupled" else None
            record = simulate(target, draft, sequence, length, length + max_new_tokens, noise, features=features)
            row = {"prompt": answer.prompt, "task": answer.task, "mode": mode}
            row |= {"tokens": len(answer.tokens) - length - 1, "rounds": record.rounds}
            rows.append(row | {"accepted_lengths": record.accepted_lengths})
    finally:
        settings.coupled_drafting = coupled
    return rows


def measure_acceptance(
    target: PreTrainedModel,
    tokenizer,
    draft: FSPADDraftModel,
    prompts: Iterable[tuple[str, str]],
    max_new_tokens: int = 128,
    seed: int = 0,
    report: Callable[[], None] = lambda: None,
) -> list[dict]:
    """
    tau of a draft on each prompt, greedy, and at T = 1 (top_k 0, top_p 1) with coupled and with uncoupled drafting.

    Args:
        prompts: (task, user message) pairs; the chat template is applied.
        seed: prompt number n is sampled with `seed + n`.
        report: called after each answer, of which every prompt has two.

    Returns:
        The rows of [`simulate_answer`].
    """
    prompts, rows = list(prompts), []
    for its_seed in (None, seed):
        for answer in known_answers(target, tokenizer, prompts, max_new_tokens, its_seed):
            rows += simulate_answer(target, draft, answer, max_new_tokens)
            report()
    return rows


def mean_tau(rows: list[dict], mode: str) -> tuple[dict[str, float], float]:
    """tau of each task (sum of tokens / sum of rounds), and the mean over the tasks."""
    taus = {}
    for task in dict.fromkeys(row["task"] for row in rows):
        chosen = [row for row in rows if row["task"] == task and row["mode"] == mode and row["rounds"]]
        if chosen:
            taus[task] = sum(row["tokens"] for row in chosen) / sum(row["rounds"] for row in chosen)
    return taus, sum(taus.values()) / len(taus) if taus else float("nan")


def draft_chains(draft: FSPADDraftModel, length: int):
    """Makes a draft guess as engines without trees let it: `length` tokens in a row, any of the target's ids."""
    draft.speculation_config.update(
        tree="fixed", tree_depth=length, tree_top_k=1, tree_total_nodes=length, tree_lookup_tokens=0
    )
    draft.config.draft_vocab_size = draft.draft_vocab_ids = None


def run_acceptance(
    target: str | None, draft: str | None, questions: str | None, per_task: int, max_new_tokens: int,
    dtype: str | None, device: str | None, json_file: str | None, seed: int = 0, chain: int | None = None,
) -> list[dict]:  # fmt: skip
    """
    `fspad-hf acceptance`: tau on the first turns of Spec-Bench questions, printed as a table.

    Args:
        chain: guess so many tokens in a row instead of a tree, see [`draft_chains`]; the table then says, too, what
            share of the rounds accepted the first of them, the second, ...
    """
    from rich.console import Console

    from ..evaluation.report import MODE_TITLES, figure_table

    if chain is not None and chain < 1:
        raise ValueError(f"--chain {chain}: expected 1 or more tokens to guess; without --chain trees are drafted.")
    json_file = writable_file(json_file) if json_file is not None else None
    asked = [(question.task, question.turns[0]) for question in read_questions(questions, per_task)]
    models = load_models(target, draft, device, dtype)
    if chain is not None:
        draft_chains(models.draft, chain)
    with quiet_transformers(), counted("answers simulated", 2 * len(asked)) as advance:
        rows = measure_acceptance(models.target, models.tokenizer, models.draft, asked, max_new_tokens, seed, advance)
    taus = {mode: mean_tau(rows, mode) for mode in dict.fromkeys(row["mode"] for row in rows)}
    title = "tau (tokens after the first / verification forwards)"
    table = figure_table("", *(MODE_TITLES[mode] for mode in taus), title=title)
    for task in dict.fromkeys(task for task, _ in asked):
        table.add_row(task, *(f"{found[task]:.2f}" if task in found else "-" for found, _ in taus.values()))
    table.add_section()
    table.add_row("mean", *(f"{mean:.2f}" for _, mean in taus.values()))
    if chain is not None:
        table.add_section()
        lengths = [Counter(n for row in rows if row["mode"] == mode for n in row["accepted_lengths"]) for mode in taus]
        for position in range(1, chain + 1):
            shares = (sum(of[n] for n in of if n > position) / max(of.total(), 1) for of in lengths)
            table.add_row(f"accepted at {position}", *(f"{share:.3f}" for share in shares))
    Console().print(table)
    if json_file is not None:
        write_json(json_file, rows)
    return rows
