"""What a user could pick: plain generate, a static cache with compile, prompt lookup, stock assistance, and FSPAD."""

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, CompileConfig, PreTrainedModel, StaticCache
from transformers.generation.streamers import BaseStreamer

from ..host import CACHE
from ..modeling_fspad import FSPADDraftModel

MODES: dict[str, dict[str, Any]] = {
    "greedy": {"num_beams": 1, "do_sample": False},
    "sampled": {"num_beams": 1, "do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0},
}
PROMPT_LOOKUP_TOKENS = 10
METHOD_NAMES = ("plain", "static+compile", "prompt lookup", "assisted")  # those of drafts must be others


@dataclass(frozen=True)
class Answer:
    """
    One timed `generate`.

    Args:
        sequences (`[1, prompt + new]`): on the CPU.
        seconds: of the whole call, prefill included; prefill_seconds: until the first token was out.
        accepted_lengths: tokens of each forward after the prefill; one each in plain decoding.
        speculated: whether a draft of ours was used; `None` of a method without one.
    """

    sequences: torch.LongTensor
    seconds: float
    prefill_seconds: float
    accepted_lengths: list[int]
    speculated: bool | None = None


class RoundTimer(BaseStreamer):
    """Notes when the first token comes and how many come at a time: plain decoding and stock assistance put rounds."""

    def __init__(self):
        self.first: float | None = None
        self.puts: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        self.puts.append(value.numel())
        if len(self.puts) == 2:  # the first is the prompt
            self.first = time.perf_counter()

    def end(self) -> None:
        pass


@dataclass
class Method:
    """A way to call `generate`: a name for tables, and the arguments that make the difference."""

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    lossless: tuple[str, ...] = ("greedy", "sampled")  # the modes in which the same seed gives plain's tokens

    def prepare(self, target: PreTrainedModel, max_length: int) -> None:
        """Called once, with the length of the longest sequence to come."""

    def timer(self) -> RoundTimer:
        """A call's streamer."""
        return RoundTimer()

    def answer(
        self, target: PreTrainedModel, inputs: dict[str, torch.Tensor], mode: str, max_new_tokens: int, seed: int
    ) -> Answer:
        """Runs and times one `generate`, after `torch.manual_seed(seed)`."""
        timer = self.timer()
        _synchronize(target.device)
        start = time.perf_counter()
        output = self.outputs(target, inputs, mode, max_new_tokens, seed, streamer=timer, return_dict_in_generate=True)
        _synchronize(target.device)
        end = time.perf_counter()
        record = getattr(output, "speculation", None)
        accepted = record.accepted_lengths if record is not None else timer.puts[2:]
        ours = isinstance(self.arguments.get("assistant_model"), FSPADDraftModel)
        speculated = record is not None if ours else None
        return Answer(output.sequences.cpu(), end - start, (timer.first or end) - start, accepted, speculated)

    def outputs(self, target: PreTrainedModel, inputs: dict, mode: str, max_new_tokens: int, seed: int, **options):
        """What `generate` gives after `torch.manual_seed(seed)`."""
        torch.manual_seed(seed)
        options |= MODES[mode] | self.call_arguments()
        return target.generate(**inputs, **options, max_new_tokens=max_new_tokens)

    def call_arguments(self) -> dict[str, Any]:
        return self.arguments


class CompiledMethod(Method):
    """Plain decoding over one static cache, its one-token forward compiled (the host's own way)."""

    def __init__(self):
        super().__init__("static+compile")
        self.cache: StaticCache | None = None

    def prepare(self, target: PreTrainedModel, max_length: int) -> None:
        self.cache = StaticCache(config=target.config.get_text_config(), max_cache_len=max_length)
        config = CompileConfig()
        config._compile_all_devices = True  # the host compiles on CUDA only unless told
        self.arguments = {CACHE: self.cache, "compile_config": config}

    def call_arguments(self) -> dict[str, Any]:
        self.cache.reset()
        return self.arguments


def make_methods(
    names: list[str], drafts: dict[str, FSPADDraftModel], assistant: dict[str, Any] | None
) -> list[Method]:
    """
    The methods of a run, plain first.

    Args:
        names: any of `plain`, `compile`, `prompt-lookup`, `assistant`, `fspad`.
        drafts: by the name that tables show; each is a method of its own.
        assistant: what [`load_assistant`] gives.

    Raises:
        ValueError: an unknown name, or `assistant` without a model.
    """
    known = ("plain", "compile", "prompt-lookup", "assistant", "fspad")
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"methods={unknown} are unknown: expected some of {list(known)}.")
    if "assistant" in names and assistant is None:
        raise ValueError("The method 'assistant' needs a model: pass --assistant PATH_OR_HUB_ID, or leave it out.")
    made = [Method("plain")]
    if "compile" in names:
        made.append(CompiledMethod())
    if "prompt-lookup" in names:  # sampled, it keeps the distribution but not the draws
        made.append(Method("prompt lookup", {"prompt_lookup_num_tokens": PROMPT_LOOKUP_TOKENS}, ("greedy",)))
    if "assistant" in names:
        made.append(Method("assisted", assistant, ("greedy",)))
    if "fspad" in names:
        made += [Method(name, {"assistant_model": draft}) for name, draft in drafts.items()]
    return made


def load_assistant(name: str, target: PreTrainedModel, tokenizer) -> dict[str, Any]:
    """
    The arguments of stock assisted generation: a model in the target's dtype and on its device, and, if its
    vocabulary is another, both tokenizers.
    """
    made = AutoModelForCausalLM.from_pretrained(name, dtype=target.dtype).to(target.device).eval()
    if made.config.get_text_config().vocab_size == target.config.get_text_config().vocab_size:  # the host's own rule
        return {"assistant_model": made}
    theirs = AutoTokenizer.from_pretrained(name)
    return {"assistant_model": made, "tokenizer": tokenizer, "assistant_tokenizer": theirs}


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
