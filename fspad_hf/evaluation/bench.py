"""`fspad-hf bench`: every way to generate, on the same prompts, one after another, so that machine drift cancels."""

import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import transformers

from ..loading import encode_chat
from ..runtime import changed_settings, write_file, write_json
from .divergence import BIT_OUTPUTS, first_different_bits, first_divergence
from .peers import MODES, Answer, Method
from .spec_bench import Question

WARM_UP_TOKENS = 8


@dataclass(frozen=True)
class BenchConfig:
    """What a run measures; a run is resumed only under the same one."""

    target: str
    drafts: dict[str, str]
    assistant: str | None = None
    source: str = "spec-bench"
    asked: str = ""  # digest of the questions
    tasks: tuple[str, ...] = ()
    per_task: int | None = None
    turns: int | None = None
    modes: tuple[str, ...] = ("greedy", "sampled")
    methods: tuple[str, ...] = ()
    max_new_tokens: int = 128
    seed: int = 0
    device: str = "cpu"
    dtype: str = "float32"
    trees: dict[str, list[int]] = field(default_factory=dict)
    threads: int = 1
    raw_prompts: bool = False
    bit_exact: bool = False


class RecordFile:
    """
    The records on disk, `records.jsonl`: a question's are written together once all of them are there, so that an
    interrupted run goes on with the first unfinished question.

    Raises:
        ValueError: the folder holds a run of another configuration.
    """

    def __init__(self, folder: Path, config: BenchConfig):
        self.path = folder / "records.jsonl"
        wanted = json.loads(json.dumps(asdict(config)))
        self.records: list[dict] = []
        if (folder / "config.json").is_file():
            found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            if changes := changed_settings(found, wanted):
                raise ValueError(
                    f"output={str(folder)!r} holds a run with other settings ({changes}): name another folder, or "
                    "repeat the settings to resume."
                )
            self._read()
        else:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / "config.json", wanted)

    def add(self, records: list[dict]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(records) + "\n")
        self.records += records

    def done(self) -> set[int]:
        return {record["question"] for record in self.records}

    def _read(self) -> None:
        whole = []
        for line in self.path.read_bytes().splitlines(keepends=True) if self.path.is_file() else ():
            if line.endswith(b"\n"):  # the last may have been cut off
                whole.append(line)
                self.records += json.loads(line)
        if self.path.is_file():
            write_file(self.path, b"".join(whole))


class Bench:
    """
    Asks questions of one target by several methods.

    Args:
        methods: plain first; the others are held against it.
        report: called with each record as it comes.
    """

    def __init__(
        self, target, tokenizer, methods: Sequence[Method], config: BenchConfig, report: Callable = lambda record: None
    ):
        self.target, self.tokenizer, self.config, self.report = target, tokenizer, config, report
        self.methods = list(methods)
        self.broken: dict[str, str] = {}  # methods that failed while warming up, and why

    def prepare(self, questions: Sequence[Question]) -> None:
        """Lets every method run a few tokens, not counted; one that fails is left out, with its reason."""
        length = max(self._longest(question) for question in questions)
        inputs = self._encode([*questions[0].opening, {"role": "user", "content": questions[0].turns[0]}])
        tokens = min(WARM_UP_TOKENS, self.config.max_new_tokens)
        for method in self.methods:
            try:
                method.prepare(self.target, length)
                for mode in self.config.modes:
                    method.answer(self.target, inputs, mode, tokens, self.config.seed)
            except Exception as error:
                self.broken[method.name] = reason(error)

    def ask(self, question: Question, order: int = 0) -> list[dict]:
        """
        All records of one question. Each turn's prompt holds plain's answers to the turns before it, for all methods.

        Args:
            order: the methods take turns in going first.
        """
        records = []
        for mode in self.config.modes:
            messages = list(question.opening)
            for turn, text in enumerate(question.turns[: self.config.turns]):
                messages.append({"role": "user", "content": text})
                answers = self._answers(self._encode(messages), mode, order + turn)
                for name, result in answers.items():
                    record = {"question": question.number, "task": question.task, "turn": turn, "mode": mode}
                    records.append(record | {"method": name, **result["record"]})
                    self.report(records[-1])
                said = next((r["text"] for r in answers.values() if r["text"] is not None), "")
                messages.append({"role": "assistant", "content": said})
        return records

    def _answers(self, inputs: dict, mode: str, order: int) -> dict[str, dict]:
        """Each method's record and text, in the methods' order; run in rotated order."""
        count, prompt = len(self.methods), inputs["input_ids"].shape[1]
        results: dict[str, Answer | str] = {}
        for i in range(count):
            method = self.methods[(i + order) % count]
            results[method.name] = self.broken.get(method.name) or self._run(method, inputs, mode)
        plain = results[self.methods[0].name]
        made = {}
        for method in self.methods:
            result = results[method.name]
            failed = isinstance(result, str)
            record = {
                "prompt_tokens": prompt,
                "new_tokens": 0 if failed else self._count(result.sequences[0, prompt:]),
                "seconds": 0.0 if failed else result.seconds,
                "prefill_seconds": 0.0 if failed else result.prefill_seconds,
                "accepted_lengths": [] if failed else result.accepted_lengths,
                "speculated": None if failed else result.speculated,
                "identical": None,
                "divergence": None,
                "error": result if failed else None,
            }
            if not failed and isinstance(plain, Answer) and method is not self.methods[0]:
                record |= self._compare(method, inputs, mode, plain, result)
            text = None if failed else self.tokenizer.decode(result.sequences[0, prompt:], skip_special_tokens=True)
            made[method.name] = {"record": record, "text": text}
        return made

    def _run(self, method: Method, inputs: dict, mode: str) -> Answer | str:
        try:
            return method.answer(self.target, inputs, mode, self.config.max_new_tokens, self.config.seed)
        except Exception as error:  # out of memory on one prompt, say: it is recorded, and the run goes on
            failure = reason(error)
        if self.target.device.type == "cuda":  # now that the traceback no longer holds its tensors
            torch.cuda.empty_cache()
        return failure

    def _compare(self, method: Method, inputs: dict, mode: str, plain: Answer, result: Answer) -> dict:
        if mode not in method.lossless:
            return {}
        sequences = (plain.sequences, result.sequences)
        try:
            found = first_divergence(self.target, inputs, *sequences, seed=self.config.seed, **MODES[mode])
            bits = self._bits(method, inputs, mode) if found is not None and self.config.bit_exact else {}
        except Exception as error:  # they differ, and plain generate could not be run again to see by how much
            return {"identical": False, "divergence": {"error": reason(error)}}
        return {"identical": found is None, "divergence": None if found is None else asdict(found) | bits}

    def _bits(self, method: Method, inputs: dict, mode: str) -> dict:
        """The first layer whose bits differ, from two more runs."""
        tokens, seed = self.config.max_new_tokens, self.config.seed
        runs = [
            way.outputs(self.target, inputs, mode, tokens, seed, **BIT_OUTPUTS) for way in (self.methods[0], method)
        ]
        differing = first_different_bits(*runs)
        return {"bits": None if differing is None else asdict(differing)}

    def _count(self, tokens: torch.LongTensor) -> int:
        """Up to the first EOS, itself counted, whatever a method puts after it."""
        eos = self.target.generation_config.eos_token_id
        ends = torch.isin(tokens, torch.tensor(eos if isinstance(eos, list) else [eos])) if eos is not None else None
        return int(ends.int().argmax()) + 1 if ends is not None and ends.any() else len(tokens)

    def _encode(self, messages: list[dict[str, str]]) -> dict[str, torch.Tensor]:
        if self.config.raw_prompts:
            text = "\n".join(message["content"] for message in messages)
            encoded = self.tokenizer(text, return_tensors="pt")
            return {name: encoded[name].to(self.target.device) for name in ("input_ids", "attention_mask")}
        return encode_chat(self.tokenizer, messages, self.target.device)

    def _longest(self, question: Question) -> int:
        """At most so many tokens will its last sequence have: every turn asked, and each answered in full."""
        turns = question.turns[: self.config.turns]
        messages = list(question.opening)
        for text in turns:
            messages += [{"role": "user", "content": text}, {"role": "assistant", "content": ""}]
        # an answer re-encoded within the chat may take a few tokens more than it was decoded in
        return self._encode(messages[:-1])["input_ids"].shape[1] + len(turns) * (self.config.max_new_tokens + 32)


def describe_machine(device: torch.device) -> dict[str, str]:
    """What figures depend on: the device, its threads, and the versions that ran."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{_processor()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    from .. import __version__

    return {
        "device": name,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "fspad_hf": __version__,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def reason(error: Exception) -> str:
    first = (str(error).strip() or "no message").splitlines()[0]
    return f"{type(error).__name__}: {first[:200]}"
