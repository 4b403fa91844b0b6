"""What happens between two steps: gradients are checked and clipped, Ctrl-C is acted on, progress is told."""

import math
import signal
import threading
import time

import torch
from transformers import PrinterCallback, TrainerCallback

from ..runtime import duration
from .arguments import FSPADTrainingArguments

SAME_CTRL_C = 2.0  # seconds: a launcher passes on the Ctrl-C that the terminal has sent to its workers already


class StepChecks(TrainerCallback):
    """
    Stops before an update that is no number, clips gradients by value, and logs and saves at the last step.

    Args:
        evaluates: evaluate there, too.
    """

    def __init__(self, evaluates: bool):
        self.evaluates = evaluates

    def on_pre_optimizer_step(self, args: FSPADTrainingArguments, state, control, model=None, **kwargs):
        gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
        ends = [end for gradient in gradients for end in torch.aminmax(gradient)]
        if ends and not (largest := float(torch.stack(ends).abs().max())) < math.inf:
            raise FloatingPointError(
                f"The largest gradient is {largest} at step {state.global_step + 1}: lower "
                f"learning_rate={args.learning_rate}; the last good checkpoint stands in {args.output_dir}."
            )
        torch.nn.utils.clip_grad_value_(model.parameters(), args.clip_grad_value)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps:
            control.should_evaluate = self.evaluates
            control.should_save = control.should_log = True
        return control

    def on_evaluate(self, args, state, control, **kwargs):
        control.should_save = True
        return control


class TrainingInterrupted(KeyboardInterrupt):
    """A run stopped by Ctrl-C or SIGTERM after its checkpoint was written; the text tells how to go on."""

    def __init__(self, state, args: FSPADTrainingArguments):
        super().__init__(
            f"Interrupted after step {state.global_step} of {state.max_steps}; saved in {args.output_dir}: run the "
            "same command again to go on."
        )


class Interrupts(TrainerCallback):
    """
    Notes SIGINT and SIGTERM while training; the step is finished, a checkpoint written, and the run ends. A second
    signal, seconds later, stops at once. With several processes one's signal is everyone's.
    """

    def __init__(self):
        self.came, self._first, self._before = False, 0.0, {}

    def on_train_begin(self, args, state, control, **kwargs):
        self.came = False
        if threading.current_thread() is threading.main_thread():  # only that one may handle signals
            self._before = {n: signal.signal(n, self._note) for n in (signal.SIGINT, signal.SIGTERM)}

    def _note(self, number: int, frame) -> None:
        now = time.monotonic()
        if self.came and now - self._first > SAME_CTRL_C:
            raise KeyboardInterrupt
        if not self.came:
            self.came, self._first = True, now

    def on_step_end(self, args, state, control, **kwargs):
        if args.world_size > 1:
            came = torch.tensor(float(self.came), device=args.device)
            torch.distributed.all_reduce(came)
            self.came = bool(came)
        if self.came:
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False
        return control

    def on_train_end(self, args, state, control, **kwargs):
        self.restore()

    def restore(self) -> None:
        """Signals do again what they did before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


class LogLines(PrinterCallback):
    """A line a log where there is no terminal to draw a bar on."""

    def __init__(self):
        self.began, self.first = time.perf_counter(), None

    def on_step_begin(self, args, state, control, **kwargs):
        if self.first is None:
            self.began, self.first = time.perf_counter(), state.global_step

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not logs:
            return
        if "loss" in logs:
            parts = [f"{name} {logs[name]:.4f}" for name in ("loss", "feature", "logit", "top1")]
            done = max(state.global_step - self.first, 1)
            left = (state.max_steps - state.global_step) * (time.perf_counter() - self.began) / done
            speed = f"{logs['train_tokens_per_second']:,.0f} tokens/s" if "train_tokens_per_second" in logs else ""
            print("  ".join([f"step {state.global_step}/{state.max_steps}", *parts, speed, f"{duration(left)} left"]))
        elif "eval_loss" in logs:
            print(f"evaluated at step {state.global_step}: {evaluation_line(logs)}")


def evaluation_line(logs: dict) -> str:
    """An evaluation in a line, for a person."""
    shown = {"loss": "loss", "top1": "top1", "tau": "tau", "coupled_tau": "tau at T = 1"}
    parts = [f"{label} {logs[key]:.3f}" for name, label in shown.items() if (key := f"eval_{name}") in logs]
    hits = [f"{logs[key]:.2f}" for k in (1, 3, 10) if (key := f"eval_hit_{k}") in logs]
    depths = [f"{value:.2f}" for name, value in logs.items() if name.startswith("eval_acceptance_")]
    for label, shares in (("first level's best 1, 3, 10", hits), ("accepted by depth", depths)):
        parts += [f"{label}: {' '.join(shares)}"] if shares else []
    return "  ".join(parts)
