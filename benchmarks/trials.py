"""
Which way of training a draft is best in equal time: short trainings on the same rows, compared on held-out ones.

    python benchmarks/trials.py --target DIR_OR_HUB_ID --data ROWS --keep-features DIR --output trials.jsonl

Every trial begins at the same linear guess and gets `--seconds` of training, whatever a step of it costs; the cosine
ends with them. A trial that stands in `--output` with the same options is not run again.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from gpu_training import make_optimizers, new_draft
from transformers import AutoTokenizer, PrinterCallback, TrainerCallback

from fspad_hf import FSPADTrainer, FSPADTrainingArguments
from fspad_hf.runtime import quiet_transformers
from fspad_hf.training.callbacks import LogLines
from fspad_hf.training.data import load_training_rows
from fspad_hf.training.run import choose_rows, load_target

BASE = {"learning_rate": 1e-3, "per_device_train_batch_size": 2}
TRIALS = {
    "AdamW, 1e-3, 2 rows a step": {},
    "rate 5e-4": {"learning_rate": 5e-4},
    "rate 2e-3": {"learning_rate": 2e-3},
    "Muon for matrices, rate 2e-3": {"muon": True, "learning_rate": 2e-3},
    "Muon for matrices, rate 5e-3": {"muon": True, "learning_rate": 5e-3},
    "1 row a step": {"per_device_train_batch_size": 1},
    "4 rows a step": {"per_device_train_batch_size": 4},
    "logit weight 0.3": {"logit_weight": 0.3},
    "logit weight 1": {"logit_weight": 1.0},
    "top-k loss, weight 0.3": {"top_k_weight": 0.3},
    "top-k loss, weight 1": {"top_k_weight": 1.0},
    "self-feeding, 2 runs": {"self_steps": 2},
    "self-feeding, 3 runs": {"self_steps": 3},
}
WARM_UP_STEPS, TIMED_STEPS = 3, 8
SHOWN = ("tau", "coupled_tau", "loss", "logit", "top1")


class Clock(TrainerCallback):
    """When each step ended."""

    def __init__(self):
        self.times = []

    def on_step_end(self, args, state, control, **kwargs):
        self.times.append(time.perf_counter())


class Together(torch.optim.Optimizer):
    """Several optimisers as one."""

    def __init__(self, *optimizers: torch.optim.Optimizer):
        self.optimizers = optimizers
        super().__init__([group for optimizer in optimizers for group in optimizer.param_groups], {})

    def step(self, closure=None):
        for optimizer in self.optimizers:
            optimizer.step()


def main(argv: list[str] | None = None) -> None:
    options = make_parser().parse_args(argv)
    asked = {name: getattr(options, name) for name in ("target", "data", "rows", "seconds", "eval_tokens", "dtype")}
    lines = options.output.read_text().splitlines() if options.output.exists() else []
    done = {told["trial"]: told for told in map(json.loads, lines) if told["options"] == asked}
    bf16 = options.dtype == "bfloat16"
    tokenizer = AutoTokenizer.from_pretrained(options.target)
    target = load_target(options.target, getattr(torch, options.dtype), None, torch.device("cpu"))
    found = load_training_rows(options.data, tokenizer, vocab_size=target.config.get_text_config().vocab_size)
    rows, held_out, _ = choose_rows(found, options.rows)

    def trainer(steps: int, fields: dict, folder: str, evaluate: bool) -> FSPADTrainer:
        fields = BASE | fields
        uses_muon = fields.pop("muon", False)
        args = FSPADTrainingArguments(
            folder, max_steps=steps, bf16=bf16, linear_start=True, keep_features=options.keep_features,
            eval_steps=10**9, save_strategy="no", load_best_model_at_end=False, disable_tqdm=True, logging_steps=50,
            eval_rows=48, eval_tokens=options.eval_tokens, **fields,
        )  # fmt: skip
        draft = new_draft(target, rows)
        optimizer = Together(*make_optimizers(draft, True, args.learning_rate)) if uses_muon else None
        held = held_out if evaluate else None
        made = FSPADTrainer(draft, target, args, rows, held, optimizers=(optimizer, None))
        made.remove_callback(PrinterCallback)
        if evaluate:
            made.add_callback(LogLines())
        return made

    for name, fields in TRIALS.items():
        if name in done or (options.only and name not in options.only):
            continue
        print(f"== {name}", flush=True)
        with tempfile.TemporaryDirectory() as folder, quiet_transformers():
            timed = trainer(WARM_UP_STEPS + TIMED_STEPS, fields | {"warmup_steps": 1}, folder, evaluate=False)
            clock = Clock()
            timed.add_callback(clock)
            timed.train()
            each = (clock.times[-1] - clock.times[WARM_UP_STEPS - 1]) / TIMED_STEPS
            steps = max(int(options.seconds / each), 1)
            run = trainer(steps, fields, folder, evaluate=True)
            run.train()
            told = next(line for line in reversed(run.state.log_history) if "eval_loss" in line)
        figures = {what: round(told[f"eval_{what}"], 4) for what in SHOWN if f"eval_{what}" in told}
        done[name] = {"trial": name, "steps": steps, "seconds": round(run.sitting), "seconds_a_step": round(each, 3)}
        done[name] |= figures | {"options": asked}
        with options.output.open("a") as file:
            file.write(json.dumps(done[name]) + "\n")
    print(f"| trial | steps | {' | '.join(SHOWN)} |\n|---|---|{'---|' * len(SHOWN)}")
    for name in (name for name in TRIALS if name in done):
        cells = (f"{done[name][what]:.3f}" if what in done[name] else "-" for what in SHOWN)
        print(f"| {name} | {done[name]['steps']} | {' | '.join(cells)} |")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True)
    parser.add_argument("--data", required=True, nargs="+", help="a folder that selfplay wrote, or .npy files")
    parser.add_argument("--keep-features", required=True, help="a folder, made if it is not there")
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--seconds", type=float, default=180, help="of each training")
    parser.add_argument("--eval-tokens", type=int, default=4096, help="of held-out text, in simulated rounds")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--only", nargs="+", choices=TRIALS, metavar="TRIAL")
    return parser


if __name__ == "__main__":
    main()
