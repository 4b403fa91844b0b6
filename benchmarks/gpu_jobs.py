"""The jobs of gpu.py. Each is a function of the options and of the figures that it fills in as it goes."""

import json
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import gpu_kernels
import gpu_training
import torch
import transformers
from gpu import ROOT, write_json
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from fspad_hf import FSPADDraftModel, bit_exact
from fspad_hf.evaluation.peers import MODES, CompiledMethod, RoundTimer
from fspad_hf.evaluation.profile import with_graphs
from fspad_hf.evaluation.shapes import Decree, random_pair, shape_config
from fspad_hf.evaluation.spec_bench import read_questions
from fspad_hf.evaluation.trace import Tracer
from fspad_hf.generation.graphs import GraphPool
from fspad_hf.loading import encode_chat

SEED = 3
PROMPTS = (
    "Write a short story about a lighthouse keeper who finds a letter.",
    "Explain how a heat pump works to a ten-year-old.",
    "Translate into French: The train leaves at half past seven.",
    "A shop sells pens at 3 for $2. How much do 18 pens cost? Show your steps.",
    "Summarise the causes of the First World War in five sentences.",
    "Write a Python function that returns the n-th Fibonacci number.",
)


@dataclass
class Options:
    """What gpu.py was asked for."""

    rehearse: bool
    seconds: float  # of this job
    out: Path
    target: Path | None = None
    draft: Path | None = None
    ids: Path | None = None

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.rehearse else "cuda")


class Figures(dict):
    """Written to a file at each [`~Figures.save`], so that a job which is stopped leaves what it had."""

    def __init__(self, path: Path, device: torch.device):
        super().__init__()
        self.path = path
        cuda = device.type == "cuda"
        self.about = {
            "card": torch.cuda.get_device_name(device) if cuda else f"none ({platform.machine()} CPU)",
            "memory_gib": round(torch.cuda.mem_get_info(device)[1] / 2**30, 1) if cuda else None,
            "versions": {
                "python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda,
                "transformers": transformers.__version__,
            },
        }  # fmt: skip

    def save(self, **figures) -> None:
        self.update(figures)
        write_json(self.path, {"figures": dict(self), **self.about})


# ---- correctness


def eager(options: Options, figures: Figures) -> None:
    check_tokens(options, figures, graphs=False)


def graphs(options: Options, figures: Figures) -> None:
    check_tokens(options, figures, graphs=True)


def check_tokens(options: Options, figures: Figures, graphs: bool) -> None:
    """
    Tokens and generator state against plain generate's. In fp32 a difference is a failure; in bf16 a near tie may fall
    the other way, so where the first difference lies is written down.
    """
    from tests import tiny

    def tiny_model(name: str) -> Callable[[torch.dtype], PreTrainedModel]:
        return lambda dtype: tiny.build(name, dtype=dtype).to(options.device)

    def small(dtype: torch.dtype) -> PreTrainedModel:
        config = shape_config("smollm2-135m")
        if options.rehearse:
            config.num_hidden_layers, config.vocab_size = 2, 512
        return random_pair(config, options.device, dtype, {})[0]

    makers = {name: tiny_model(name) for name in ("llama", "gemma3_text", "gpt2", "mixtral")} | {"smollm2-135m": small}
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for name, make in makers.items():
            model = make(dtype)
            drafted = FSPADDraftModel.from_target(
                model, tree_depth=4, tree_top_k=3, tree_total_nodes=12, tree_lookup_tokens=8, cuda_graphs=graphs
            )
            for mode, sampling in MODES.items():
                found = _compared(model, drafted, sampling)
                rows.append({"model": name, "dtype": str(dtype).removeprefix("torch."), "mode": mode, **found})
                print(rows[-1], flush=True)
                same = sum(row["identical"] for row in rows)
                figures.save(rows=rows, headline=f"{same} of {len(rows)} answers identical to plain generate's")
            if graphs and (refused := GraphPool.of(drafted).refused):
                figures.save(refused=figures.get("refused", []) + sorted(set(refused.values())))
    wrong = [row for row in rows if row["dtype"] == "float32" and not (row["identical"] and row["state_equal"])]
    if wrong or figures.get("refused"):
        raise SystemExit(f"{len(wrong)} answers differ in float32; graphs refused: {figures.get('refused', [])}")


def _compared(model: PreTrainedModel, drafted: FSPADDraftModel, sampling: dict) -> dict:
    ids = torch.tensor([[1, 17, 5, 40, 9, 33, 21, 8, 50, 12, 3]], device=model.device)
    outcomes = []
    for assistant in (None, drafted, drafted):  # the second speculative call finds everything captured
        torch.manual_seed(SEED)
        out = model.generate(
            ids, assistant_model=assistant, max_new_tokens=48, eos_token_id=None, pad_token_id=0,
            return_dict_in_generate=True, **sampling,
        )  # fmt: skip
        state = torch.cuda.get_rng_state() if ids.is_cuda else torch.get_rng_state()
        outcomes.append((out.sequences[0].tolist(), state, getattr(out, "speculation", None)))
    (plain, state, _), *ours = outcomes
    differing = [i for tokens, *_ in ours for i, (a, b) in enumerate(zip(plain, tokens, strict=True)) if a != b]
    record = ours[-1][2]
    return {
        "identical": not differing, "state_equal": all(torch.equal(state, theirs) for _, theirs, _ in ours),
        "first_difference": min(differing) - ids.shape[1] if differing else None,
        "tau": round(record.tau, 3) if record is not None else None, "fell_back": record is None,
    }  # fmt: skip


def tests(options: Options, figures: Figures) -> None:
    """Eager before graphs, so that a stop says which of them is slow."""
    for part, chosen in (("eager", "not graph and not captured"), ("graphs", "graph or captured")):
        figures.save(**{part: _pytest("tests/generation/test_cuda.py", "-k", chosen)})
    figures.save(headline="; ".join(f"{part}: {figures[part]}" for part in ("eager", "graphs")))


def selfplay_tests(options: Options, figures: Figures) -> None:
    figures.save(headline=_pytest("tests/training/test_selfplay.py", "-k", "graph"))


def _pytest(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *arguments], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    print(done.stdout, flush=True)
    if done.returncode:
        raise SystemExit(f"pytest {' '.join(arguments)} ended with {done.returncode}")
    return done.stdout.strip().splitlines()[-1]


# ---- speed


def speed_8b(options: Options, figures: Figures) -> None:
    """Rounds of an 8B target at a given tau: what the machine makes of them, whatever a draft is worth."""
    config = shape_config("smollm2-135m" if options.rehearse else "llama-3-8b")
    if options.rehearse:
        config.num_hidden_layers, config.vocab_size = 2, 512
    overrides = {"draft_vocab_size": min(32000, config.vocab_size)}
    target, drafted = random_pair(config, options.device, torch.bfloat16, overrides)
    prompt = torch.arange(3, 3 + (32 if options.rehearse else 512), device=options.device)[None] % config.vocab_size
    modes = ("greedy",)
    _measure_speed(options, figures, target, drafted, [prompt], modes, 24 if options.rehearse else 128, tau=4.0)


def speed(options: Options, figures: Figures) -> None:
    """The target with its draft on real prompts, both dtypes; the answers are compared, too."""
    for dtype in (torch.bfloat16, torch.float32):
        target, drafted, prompts, tokens = _real_pair(options, dtype, 1)
        part = str(dtype).removeprefix("torch.")
        _measure_speed(options, figures, target, drafted, prompts, tuple(MODES), tokens, part=part)


def exact(options: Options, figures: Figures) -> None:
    """The same inside `bit_exact`, in bf16: every answer is plain's."""
    target, drafted, prompts, tokens = _real_pair(options, torch.bfloat16, 5)
    with bit_exact(target):
        _measure_speed(
            options, figures, target, drafted, prompts, tuple(MODES), tokens, part="bit exact", others=False
        )
    told = [
        t.get("identical", "0 of 1").split(" of ")
        for mode in MODES
        for t in figures.get(f"bit exact, {mode}", {}).values()
    ]
    if any(same != compared for same, compared in told):
        raise SystemExit("some answers are not plain's")


def _real_pair(options: Options, dtype: torch.dtype, per_task: int) -> tuple:
    """Target, draft, prompts, tokens an answer."""
    tokenizer = AutoTokenizer.from_pretrained(options.target)
    folder = options.draft or ROOT / "hub_cards" / "SmolLM2-135M-Instruct-FSPAD"
    target = AutoModelForCausalLM.from_pretrained(options.target, dtype=dtype).to(options.device).eval()
    drafted = FSPADDraftModel.from_pretrained(folder, dtype=dtype).to(options.device).eval()
    prompts = [
        encode_chat(tokenizer, [{"role": "user", "content": text}], options.device)["input_ids"]
        for _, text in questions(options, per_task)
    ]
    return target, drafted, prompts[: 1 if options.rehearse else None], 16 if options.rehearse else 128


def questions(options: Options, per_task: int) -> list[tuple[str, str]]:
    """(task, text): Spec-Bench's if they lie beside the ids, else those above."""
    file = options.ids / "question.jsonl" if options.ids else None
    if file is None or not file.is_file():
        return [("own", text) for text in PROMPTS]
    return [(question.task, question.turns[0]) for question in read_questions(file, per_task)]


def _measure_speed(
    options, figures, target, drafted, prompts, modes, tokens, tau=None, part=None, others=True
) -> None:
    """
    Every method answers every prompt, one after the other, the device synchronised around each call; then a round's
    (or a plain step's) time is split into what the device computes and what it waits for the host.
    """
    ours = {"ours, eager": with_graphs(drafted, False)}
    if options.device.type == "cuda":
        ours["ours, graphs"] = with_graphs(drafted, True)
    methods = {"plain": lambda: {}}
    methods |= {name: (lambda model=model: {"assistant_model": model}) for name, model in ours.items()}
    if others:  # last, as nobody knows how long that takes
        compiled = CompiledMethod()
        compiled.prepare(target, max(ids.shape[1] for ids in prompts) + tokens)
        methods["plain, static cache + compile"] = compiled.call_arguments

    def answer(name: str, ids: torch.Tensor, mode: str, tokens: int, tracer: Tracer | None = None):
        arguments, streamer = methods[name](), RoundTimer()
        watching = [tracer] if tracer is not None else []
        if tau is not None and name in ours:
            watching.append(Decree(tau))
            arguments["logits_processor"] = watching[-1:]
        if watching:
            streamer.on_round = lambda tree: [one.on_round(tree) for one in watching]
            arguments["streamer"] = streamer
        return _timed(target, ids, mode, tokens, **arguments)

    for mode in modes:
        told, plain = {}, None
        for name in methods:
            try:
                answers = [answer(name, ids, mode, tokens) for ids in [prompts[0], *prompts]]
            except RuntimeError as error:  # out of memory, or a compiler that is missing
                told[name] = {"error": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
                print(mode, name, told[name], flush=True)
                continue
            used = answers[1:]  # the first time warms up: compiles, captures
            plain = plain or used
            told[name] = {"tokens_per_second": sum(a["tokens"] for a in used) / sum(a["seconds"] for a in used)}
            records = [a["record"] for a in used if a["record"] is not None]
            if records:
                told[name]["tau"] = sum(sum(r.accepted_lengths) for r in records) / sum(r.rounds for r in records)
            if tau is None:
                pairs = zip(used, plain, strict=True)
                told[name]["identical"] = f"{sum(a['sequence'] == b['sequence'] for a, b in pairs)} of {len(used)}"
            told[name] |= _round_parts(options, lambda *n, name=name, m=mode: answer(name, prompts[0], m, *n), tokens)
            print(mode, name, told[name], flush=True)
            said = ", ".join(f"{n} {t['tokens_per_second']:.0f}" for n, t in told.items() if "tokens_per_second" in t)
            heading = f"{part + ', ' if part else ''}{mode}"
            figures.save(**{heading: told}, headline=f"{heading}, tok/s: {said}")


def _timed(target: PreTrainedModel, ids: torch.Tensor, mode: str, tokens: int, **arguments) -> dict:
    torch.manual_seed(SEED)
    _synchronize(ids.device)
    began = time.perf_counter()
    out = target.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, return_dict_in_generate=True, **arguments,
        **MODES[mode],
    )  # fmt: skip
    _synchronize(ids.device)
    record = getattr(out, "speculation", None)
    new = out.sequences.shape[1] - ids.shape[1]
    rounds = record.rounds if record is not None else new - 1
    return {
        "seconds": time.perf_counter() - began, "tokens": new, "rounds": rounds, "record": record,
        "sequence": out.sequences[0].tolist(),
    }  # fmt: skip


def _round_parts(options: Options, answer: Callable[..., dict], tokens: int) -> dict:
    """
    Milliseconds a round (of plain decoding, a step), by the difference of a long and a short answer, which the prefill
    drops out of; on CUDA also how long the device computes in one of ours, and waits for the host.
    """
    short, long = answer(max(tokens // 4, 2)), answer(tokens)
    rounds = long["rounds"] - short["rounds"]
    if rounds < 1:
        return {}
    wall = 1e3 * (long["seconds"] - short["seconds"]) / rounds
    tracer = Tracer(options.device, rounds=4)
    if options.device.type == "cuda" and long["record"] is not None:
        answer(tokens, tracer)
    busy = [one.busy for one in tracer.read()]
    device = 1e3 * sum(busy) / len(busy) if busy else None
    return {"round_ms": wall, "device_ms": device, "host_ms": None if device is None else max(wall - device, 0.0)}


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ---- training


def train(options: Options, figures: Figures) -> None:
    gpu_training.train(options, figures, questions(options, 1 if options.rehearse else 16))


JOBS = {
    "eager": eager, "graphs": graphs, "tests": tests, "speed-8b": speed_8b, "selfplay-tests": selfplay_tests,
    "speed": speed, "kernels": gpu_kernels.kernels, "bit-exact": exact, "train": train,
}  # fmt: skip


def prepare(folder: Path) -> None:
    """What a rehearsal uses in place of a real target: a tiny model with a chat template, a draft, rows of ids."""
    import numpy as np

    from tests import tiny

    shutil.rmtree(folder, ignore_errors=True)
    model, tokenizer = tiny.build("llama"), tiny.tokenizer()
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder / "target")
    tokenizer.save_pretrained(folder / "target")
    FSPADDraftModel.from_target(model).save_pretrained(folder / "draft", tokenizer=tokenizer)
    chat = [{"role": "user", "content": "hello there"}, {"role": "assistant", "content": "general greetings to you"}]
    ids = tokenizer.apply_chat_template(chat * 8, tokenize=True, return_dict=False)
    (folder / "ids").mkdir()
    np.save(folder / "ids" / "ids.npy", np.array([ids[:128]] * 32, dtype=np.uint16))


def main(arguments: list[str]) -> None:
    if arguments[0] == "--prepare":
        return prepare(Path(arguments[1]))
    name, told, path = arguments
    given = json.loads(told)
    folders = {key: Path(given[key]) for key in ("target", "draft", "ids") if given[key] is not None}
    options = Options(given["rehearse"], given["seconds"], Path(given["out"]), **folders)
    figures = Figures(Path(path), options.device)
    figures.save()
    JOBS[name](options, figures)


if __name__ == "__main__":
    main(sys.argv[1:])
