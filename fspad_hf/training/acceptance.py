"""tau without decoding: the rounds simulated over a continuation that is already known.

Exact, because a tree depends on the tokens so far and not on what else a forward computed: the target's features of
all tokens come from one forward, the trees are grown by the very generator that decodes, and walked along the known
tokens.
"""

from collections.abc import Callable, Iterable, Iterator

import torch
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

from ..generation.candidate_generator import FSPADCandidateGenerator
from ..generation.decoding import SpeculationRecord, depth_limit
from ..generation.probe import probe
from ..generation.target import Target
from ..generation.tree import TreeShape
from ..generation.verification import walk
from ..loading import encode_chat, load_models
from ..modeling_fspad import FSPADDraftModel
from ..runtime import quiet_transformers, writable_file, write_json


class KnownNoise:
    """A [`NoiseQueue`] of rows already drawn, `[tokens, V]`: row i decided token i of the continuation."""

    def __init__(self, seed: int, tokens: int, vocab_size: int, device: torch.device):
        torch.manual_seed(seed)  # as before the plain run: one [1, V] row a token, in order
        self.rows = torch.cat([torch.empty(1, vocab_size, device=device).exponential_() for _ in range(tokens)])
        self.at = 0

    def peek(self, count: int) -> torch.Tensor:
        return self.rows[self.at : self.at + count]


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
) -> SpeculationRecord:
    """
    The record that `generate(assistant_model=draft)` would have made of emitting `sequence`, round for round.

    Args:
        sequence (`[1, length]`): prompt and continuation.
        max_length: what the call would have had; trees near it are shallower.
        noise: the rows of a sampled continuation, for coupled drafting; its first row decided the first new token.
        logits_processor: the call's static warpers, for coupled drafting.
        features (`[1, length, hidden]`): the target's, if already at hand.
    """
    found = probe(target)
    view = Target(target, found.use_hook, found.logit_transform)
    if features is None:
        features = target.get_decoder()(input_ids=sequence, use_cache=False).last_hidden_state
    generator = FSPADCandidateGenerator(draft, view, logits_processor, noise)
    shape = TreeShape.of(draft.config)
    emitter, record, taken = KnownTokens(sequence[0].tolist(), prompt_length + 1), SpeculationRecord(), 0
    while not emitter.finished:
        length = emitter.at
        generator.accept(features[:, taken : length - 1], sequence[:, taken + 1 : length])
        taken = length - 1
        if noise is not None:
            noise.at = length - prompt_length
        depth = depth_limit(shape.depth, length, 0, max_length, view.text_config)
        tree = generator.grow(sequence[:, length - 1 : length], shape._replace(depth=depth))
        path: list[int] = []
        walk(tree, features.new_empty(1, len(tree), 0), emitter, path)
        record.accepted_lengths.append(len(path))
    return record


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


def measure_acceptance(
    target: PreTrainedModel,
    tokenizer,
    draft: FSPADDraftModel,
    prompts: Iterable[tuple[str, str]],
    max_new_tokens: int = 128,
    seed: int = 0,
    report: Callable[[dict], None] = lambda row: None,
) -> list[dict]:
    """
    tau of a draft on each prompt, greedy, and at T = 1 (top_k 0, top_p 1) with coupled and with uncoupled drafting.

    Args:
        prompts: (task, user message) pairs; the chat template is applied.
        seed: prompt number n is sampled with `seed + n`.
        report: called with each row: prompt, task, mode, tokens (after the first), rounds, accepted_lengths.
    """
    prompts = list(prompts)
    ids = [
        encode_chat(tokenizer, [{"role": "user", "content": text}], target.device)["input_ids"] for _, text in prompts
    ]
    seeds = [seed + number for number in range(len(prompts))]
    rows, coupled = [], draft.config.coupled_drafting
    vocabulary, reach = target.config.get_text_config().vocab_size, max_new_tokens + draft.config.tree_depth
    try:
        for sampled in (False, True):
            for number, sequence in known_continuations(target, ids, max_new_tokens, seeds if sampled else None):
                with torch.no_grad():
                    features = target.get_decoder()(input_ids=sequence, use_cache=False).last_hidden_state
                length = ids[number].shape[1]
                for mode in ("coupled", "uncoupled") if sampled else ("greedy",):
                    draft.config.coupled_drafting = mode == "coupled"
                    noise = KnownNoise(seeds[number], reach, vocabulary, target.device) if mode == "coupled" else None
                    record = simulate(
                        target, draft, sequence, length, length + max_new_tokens, noise, features=features
                    )
                    row = {"prompt": number, "task": prompts[number][0], "mode": mode}
                    row |= {"tokens": sequence.shape[1] - length - 1, "rounds": record.rounds}
                    rows.append(row | {"accepted_lengths": record.accepted_lengths})
                    report(rows[-1])
    finally:
        draft.config.coupled_drafting = coupled
    return rows


def mean_tau(rows: list[dict], mode: str) -> tuple[dict[str, float], float]:
    """tau of each task (sum of tokens / sum of rounds), and the mean over the tasks."""
    taus = {}
    for task in dict.fromkeys(row["task"] for row in rows):
        chosen = [row for row in rows if row["task"] == task and row["mode"] == mode and row["rounds"]]
        if chosen:
            taus[task] = sum(row["tokens"] for row in chosen) / sum(row["rounds"] for row in chosen)
    return taus, sum(taus.values()) / len(taus) if taus else float("nan")


def run_acceptance(
    target: str | None, draft: str | None, questions: str, per_task: int, max_new_tokens: int, dtype: str | None,
    device: str | None, json_file: str | None, seed: int = 0,
) -> list[dict]:  # fmt: skip
    """`fspad-hf acceptance`: tau on the first turns of Spec-Bench questions, printed as a table."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress
    from rich.table import Table

    from ..evaluation.spec_bench import read_questions

    json_file = writable_file(json_file) if json_file is not None else None
    asked = [(question.task, question.turns[0]) for question in read_questions(questions, per_task)]
    models = load_models(target, draft, device, dtype, cpu_tree=False)
    bar = Progress(*Progress.get_default_columns(), MofNCompleteColumn(), console=Console(stderr=True))
    with quiet_transformers(), bar:
        done = bar.add_task("simulated", total=3 * len(asked))
        rows = measure_acceptance(
            models.target, models.tokenizer, models.draft, asked, max_new_tokens, seed, lambda row: bar.advance(done)
        )
    table = Table(title="tau (tokens after the first / verification forwards)")
    tasks = list(mean_tau(rows, "greedy")[0])
    for name in ("", *tasks, "mean"):
        table.add_column(name, justify="right" if name else "left")
    for mode, label in (("greedy", "T = 0"), ("coupled", "T = 1, coupled"), ("uncoupled", "T = 1, uncoupled")):
        taus, mean = mean_tau(rows, mode)
        table.add_row(label, *(f"{taus[task]:.2f}" if task in taus else "-" for task in tasks), f"{mean:.2f}")
    Console().print(table)
    if json_file is not None:
        write_json(json_file, rows)
    return rows
