"""tau without decoding: the rounds simulated over a continuation that is already known.

Exact, because a tree depends on the tokens so far and not on what else a forward computed: the target's features of
all tokens come from one forward, the trees are grown by the very generator that decodes, and walked along the known
tokens.
"""

from collections.abc import Callable, Iterable

import torch
from transformers import LogitsProcessorList, PreTrainedModel

from ..generation.candidate_generator import FSPADCandidateGenerator
from ..generation.decoding import SpeculationRecord, depth_limit
from ..generation.probe import probe
from ..generation.target import Target
from ..generation.verification import walk
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
    emitter, record, taken = KnownTokens(sequence[0].tolist(), prompt_length + 1), SpeculationRecord(), 0
    while not emitter.finished:
        length = emitter.at
        generator.accept(features[:, taken : length - 1], sequence[:, taken + 1 : length])
        taken = length - 1
        if noise is not None:
            noise.at = length - prompt_length
        depth = depth_limit(draft.config.tree_depth, length, 0, max_length, view.text_config)
        tree = generator.grow(sequence[:, length - 1 : length], depth)
        path: list[int] = []
        walk(tree, features.new_empty(1, len(tree), 0), emitter, path)
        record.accepted_lengths.append(len(path))
    return record


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
        report: called with each row: task, mode, tokens (after the first), rounds.
    """
    rows = []
    coupled = draft.config.coupled_drafting
    try:
        for task, prompt in prompts:
            chat = [{"role": "user", "content": prompt}]
            ids = tokenizer.apply_chat_template(
                chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            ids = ids["input_ids"].to(target.device)
            length = ids.shape[1]
            for do_sample in (False, True):
                torch.manual_seed(seed)
                sampling = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} if do_sample else {}
                sequence = target.generate(
                    ids, attention_mask=torch.ones_like(ids), do_sample=do_sample, max_new_tokens=max_new_tokens,
                    **sampling,
                )  # fmt: skip
                with torch.no_grad():
                    features = target.get_decoder()(input_ids=sequence, use_cache=False).last_hidden_state
                for mode in ("coupled", "uncoupled") if do_sample else ("greedy",):
                    draft.config.coupled_drafting = mode == "coupled"
                    new = sequence.shape[1] - length
                    noise = None
                    if mode == "coupled":
                        vocabulary = target.config.get_text_config().vocab_size
                        noise = KnownNoise(seed, max_new_tokens + draft.config.tree_depth, vocabulary, ids.device)
                    record = simulate(
                        target, draft, sequence, length, length + max_new_tokens, noise, features=features
                    )
                    rows.append({"task": task, "mode": mode, "tokens": new - 1, "rounds": record.rounds})
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
    from rich.progress import track
    from rich.table import Table

    from ..evaluation.spec_bench import load_questions
    from ..loading import load_models

    json_file = writable_file(json_file) if json_file is not None else None
    asked = [(task, turns[0]) for task, found in load_questions(questions, per_task).items() for turns in found]
    models = load_models(target, draft, device, dtype, cpu_tree=False)
    with quiet_transformers():
        progress = track(asked, "prompts", console=Console(stderr=True))
        rows = measure_acceptance(models.target, models.tokenizer, models.draft, progress, max_new_tokens, seed)
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
