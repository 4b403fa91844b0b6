"""Training on a GPU for a given time: features made on the device, token ids from disk, tau at the end."""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import parts
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from fspad_hf import FSPADDraftModel
from fspad_hf.training.acceptance import mean_tau, measure_acceptance
from fspad_hf.training.data import TrainingRows, load_training_rows
from fspad_hf.training.frozen import FrozenTarget, TargetFeatures
from fspad_hf.training.losses import draft_loss

ROWS = 40  # a step, of 1,024 tokens each
LEARNING_RATE = 1e-3
WARM_UP = 30
NOISE = 0.1
STATE_MIB = 15  # a file that is sent back holds at most 16
VOCABULARY = 16384


class Timed:
    """Seconds by the part of a step; the device is waited for only while the first steps are looked at."""

    def __init__(self, device: torch.device):
        self.device, self.seconds, self.on = device, {}, True
        self.began = self._now()

    def _now(self) -> float:
        if self.on and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def part(self, name: str) -> None:
        """What has passed since the last call was `name`."""
        if self.on:
            now = self._now()
            self.seconds[name] = self.seconds.get(name, 0.0) + now - self.began
            self.began = now


def load(options) -> tuple[PreTrainedModel, object, TrainingRows]:
    """The target in bf16 (fp32 on a CPU), its tokenizer, and the rows that hold something of the assistant's."""
    dtype = torch.float32 if options.rehearse else torch.bfloat16
    target = AutoModelForCausalLM.from_pretrained(options.target, dtype=dtype).to(options.device).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.target)
    files = [str(file) for file in sorted(options.ids.glob("*.npy"))]
    rows = load_training_rows(files, tokenizer, vocab_size=target.config.get_text_config().vocab_size)
    train = rows[: len(rows.ids) - rows.held_out]
    taught = train.mask.any(1)
    print(f"{len(rows.ids)} rows, {rows.held_out} held out, {int((~taught).sum())} without the assistant", flush=True)
    return target.requires_grad_(False), tokenizer, train[taught.nonzero()[:, 0]]


def run(
    options, target: PreTrainedModel, rows: TrainingRows, draft: FSPADDraftModel, seconds: float,
    report: Callable[..., None], state: Path | None = None,
) -> None:  # fmt: skip
    """
    Trains `draft` for so many seconds, the learning rate falling to 0 by a cosine over them; tokens a second and the
    parts of a step are reported as it goes.

    Args:
        state: where weights and moments are kept; a run that finds some goes on from there.
    """
    batch = 4 if options.rehearse else ROWS
    frozen, features = FrozenTarget(target, options.device), TargetFeatures(target)
    optimizer = torch.optim.AdamW(draft.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    step = _restored(draft, optimizer, state) if state is not None else 0
    draft.train()
    order = torch.Generator().manual_seed(step)
    timed, began, first, losses = Timed(options.device), time.monotonic(), step, []
    while (passed := time.monotonic() - began) < seconds:
        timed.on = step - first < 20
        chosen = torch.randint(len(rows.ids), (batch,), generator=order)
        ids, mask = rows.ids[chosen].to(options.device).long(), rows.mask[chosen].to(options.device)
        timed.part("rows")
        known = features([], ids)
        timed.part("features of the target")
        with torch.autocast(options.device.type, torch.bfloat16, enabled=not options.rehearse):
            sums = draft_loss(draft, frozen.embed, frozen.head, ids, known, mask, NOISE)
            loss = (sums.feature + 0.1 * sums.logit) / sums.positions.clamp(min=1)
        timed.part("forward and losses")
        loss.backward()
        timed.part("backward")
        torch.nn.utils.clip_grad_value_(draft.parameters(), 0.5)
        for group in optimizer.param_groups:
            warm = min((step - first + 1) / WARM_UP, 1.0)
            group["lr"] = LEARNING_RATE * warm * 0.5 * (1 + np.cos(np.pi * min(passed / seconds, 1.0)))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        timed.part("optimizer")
        step += 1
        if step % 50 == 0 or step - first == 5:
            losses.append({"step": step, "loss": loss.item(), "logit": (sums.logit / sums.positions).item()})
            print(losses[-1], flush=True)
            if not np.isfinite(losses[-1]["loss"]):
                raise SystemExit(f"the loss at step {step} is {losses[-1]['loss']}")
            report(**_speed(step - first, began, ids, losses, timed))
    report(**_speed(step - first, began, ids, losses, timed), steps_in_all=step)
    if state is not None:
        _save(draft, optimizer, step, state)
    draft.eval()


def _speed(steps: int, began: float, ids: torch.Tensor, losses: list, timed: Timed) -> dict:
    whole = sum(timed.seconds.values())
    shares = {name: round(part / whole, 3) for name, part in timed.seconds.items()}
    speed = steps * ids.numel() / (time.monotonic() - began)
    return {"steps": steps, "tokens_per_second": speed, "share_of_a_step": shares, "losses": losses}


def new_draft(target: PreTrainedModel, rows: TrainingRows, **fields) -> FSPADDraftModel:
    torch.manual_seed(0)
    size = min(VOCABULARY, target.config.get_text_config().vocab_size)
    draft = FSPADDraftModel.from_target(target, draft_vocab_size=size, **fields).float()
    counts = rows.ids.flatten().long().bincount(minlength=size)
    draft.draft_vocab_ids.copy_(counts.argsort(descending=True, stable=True)[:size].sort().values)
    return draft


def train(options, figures, questions: list[tuple[str, str]]) -> None:
    """Most of the time is training's; tau needs the rest. The weights are left in `draft/`, in bf16."""
    target, tokenizer, rows = load(options)
    draft = new_draft(target, rows)
    seconds = 6 if options.rehearse else max(options.seconds - 110, 10)
    run(options, target, rows, draft, seconds, figures.save, options.out / "state" / "train.safetensors")
    draft = draft.to(target.dtype)
    draft.save_pretrained(options.out / "draft", tokenizer=tokenizer)
    figures.save(headline=f"{figures['tokens_per_second']:,.0f} tok/s, {figures['steps_in_all']} steps")
    taus = _taus(options, target, tokenizer, draft, questions)
    figures.save(tau=taus, headline=f"{figures['headline']}, tau " + _said(taus))


def ablation(options, figures, questions: list[tuple[str, str]]) -> None:
    """FSPAD and EAGLE-2 from the same seed, the same data in the same order, for the same time."""
    target, tokenizer, rows = load(options)
    seconds = 4 if options.rehearse else max((options.seconds - 80) / 2, 10)
    found = {}
    for name, fields in (("FSPAD", {}), ("EAGLE-2", {"feature_sampling": False, "partial_alignment": False})):
        draft = new_draft(target, rows, **fields)
        found[name] = {}
        run(options, target, rows, draft, seconds, lambda name=name, **told: found[name].update(told))
        figures.save(**found)
        found[name]["tau"] = _taus(options, target, tokenizer, draft.to(target.dtype), questions)
        figures.save(**found)
    figures.save(headline=", ".join(f"{name}: tau {_said(one['tau'])}" for name, one in found.items()))


def _taus(options, target, tokenizer, draft, questions) -> dict[str, dict]:
    """tau by task and the mean, greedy and at T = 1, of answers simulated round for round."""
    tokens = 16 if options.rehearse else 128
    rows = measure_acceptance(target, tokenizer, draft, questions, tokens)
    taus = {mode: mean_tau(rows, mode) for mode in ("greedy", "coupled", "uncoupled")}
    return {mode: {"tasks": tasks, "mean": mean} for mode, (tasks, mean) in taus.items()}


def _said(taus: dict[str, dict]) -> str:
    return f"{taus['greedy']['mean']:.2f} greedy, {taus['coupled']['mean']:.2f} at T = 1"


def _save(draft: FSPADDraftModel, optimizer: torch.optim.Optimizer, step: int, state: Path) -> None:
    """Weights and moments, whole and in parts small enough to be sent one by one."""
    tensors = {}
    for name, weight in draft.named_parameters():
        tensors[name] = weight.detach().cpu()
        tensors |= {f"{name}:{key}": optimizer.state[weight][key].cpu() for key in ("exp_avg", "exp_avg_sq", "step")}
    state.parent.mkdir(parents=True, exist_ok=True)
    partial = state.with_name(f".{state.name}.partial")
    save_file(tensors, partial, metadata={"step": str(step)})
    partial.replace(state)
    parts.split(state, STATE_MIB)


def _restored(draft: FSPADDraftModel, optimizer: torch.optim.Optimizer, state: Path) -> int:
    """Takes up what `_save` left, joined from its parts if need be; the steps done by then, 0 if there is nothing."""
    manifest = state.with_name(f"{state.name}.parts.json")
    if not state.is_file() and manifest.is_file():
        parts.join(manifest)
    if not state.is_file():
        return 0
    with safe_open(state, "pt") as kept, torch.no_grad():
        for name, weight in draft.named_parameters():
            weight.copy_(kept.get_tensor(name))
            moments = {key: kept.get_tensor(f"{name}:{key}") for key in ("exp_avg", "exp_avg_sq")}
            optimizer.state[weight] = {key: value.to(weight.device) for key, value in moments.items()}
            optimizer.state[weight]["step"] = kept.get_tensor(f"{name}:step").to(weight.device)
        step = int(kept.metadata()["step"])
    print(f"going on from step {step}", flush=True)
    return step
