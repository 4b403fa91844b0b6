"""Training on a GPU within minutes: features kept on the device, recipes compared, then drafts and their tau."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import parts
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from fspad_hf import FSPADDraftModel
from fspad_hf.training.ablation import VARIANTS
from fspad_hf.training.acceptance import mean_tau, measure_acceptance
from fspad_hf.training.data import TrainingRows, load_training_rows
from fspad_hf.training.losses import Objective, draft_loss, step_losses
from fspad_hf.training.self_feeding import self_fed_outputs
from fspad_hf.training.targets import FrozenTarget, TargetOutputs

ROWS = 40  # a step, of 1,024 tokens each
WARM_UP = 30
NOISE = 0.1
STATE_MIB = 15  # a file that is sent back holds at most 16
VOCABULARY = 16384
LEVELS = 3  # of a draft's own features, for the score of a recipe


@dataclass(frozen=True)
class Recipe:
    """How a draft is trained."""

    learning_rate: float = 1e-3
    muon: bool = False  # for the matrices; AdamW for the rest
    logit_weight: float = 0.1
    objective: Objective = field(default_factory=Objective)


RECIPES = {
    "AdamW": Recipe(),
    "Muon": Recipe(2e-3, muon=True),
    "Muon, logit weight 1": Recipe(2e-3, muon=True, logit_weight=1.0),
}


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


class Features:
    """
    The target's features of all rows (`[rows, length, hidden]`), made once and kept on the device: 2 bytes a number.

    Args:
        held_out: rows that a recipe is scored on; their features are made, too.
    """

    def __init__(self, options, target: PreTrainedModel, rows: TrainingRows, held_out: TrainingRows):
        self.target, self.rows, self.frozen = target, rows, FrozenTarget(target, options.device)
        self.kept, self.held_out = self._made(rows), (held_out, self._made(held_out))

    def _made(self, rows: TrainingRows) -> torch.Tensor:
        device = self.frozen.device
        hidden = self.target.config.get_text_config().hidden_size
        kept = torch.empty(*rows.ids.shape, hidden, dtype=self.target.dtype, device=device)
        for start in range(0, len(kept), ROWS):
            part = slice(start, start + ROWS)
            kept[part] = self.frozen.features(rows.ids[part].to(device).long())
        return kept

    def batch(self, numbers: torch.LongTensor) -> tuple[torch.Tensor, TargetOutputs, torch.Tensor]:
        """Ids, the target's outputs and the loss mask of some rows."""
        device = self.frozen.device
        ids, mask = self.rows.ids[numbers].to(device).long(), self.rows.mask[numbers].to(device)
        return ids, self.frozen.outputs(self.kept[numbers.to(device)], mask), mask


def load(options) -> tuple[object, Features]:
    """The tokenizer, and the target (bf16; fp32 on a CPU) with the features of the rows that hold an answer."""
    dtype = torch.float32 if options.rehearse else torch.bfloat16
    target = AutoModelForCausalLM.from_pretrained(options.target, dtype=dtype).to(options.device).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.target)
    files = [str(file) for file in sorted(options.ids.glob("*.npy"))]
    rows = load_training_rows(files, tokenizer, vocab_size=target.config.get_text_config().vocab_size)
    train, held_out = rows[: len(rows.ids) - rows.held_out], rows[len(rows.ids) - rows.held_out :]
    taught = train.mask.any(1)
    print(f"{len(rows.ids)} rows, {rows.held_out} held out, {int((~taught).sum())} without the assistant", flush=True)
    began = time.monotonic()
    features = Features(options, target.requires_grad_(False), train[taught.nonzero()[:, 0]], held_out[:128])
    if options.device.type == "cuda":
        torch.cuda.synchronize()
    print(f"features of {features.rows.ids.numel():,} tokens in {time.monotonic() - began:.1f} s", flush=True)
    return tokenizer, features


def run(
    options, features: Features, draft: FSPADDraftModel, recipe: Recipe, seconds: float | None,
    report: Callable[..., None], state: Path | None = None, steps: int | None = None, seed: int = 0,
) -> None:  # fmt: skip
    """
    Trains `draft` for so many seconds or steps, the learning rate falling to 0 by a cosine over them; tokens a second
    and the parts of a step are reported as it goes.

    Args:
        state: where weights and moments are kept; a run that finds some goes on from there.
    """
    batch, frozen = min(4 if options.rehearse else ROWS, len(features.rows.ids)), features.frozen
    optimizers = make_optimizers(draft, recipe.muon)
    step = _restored(draft, optimizers, state) if state is not None else 0
    draft.train()
    order, queue = torch.Generator().manual_seed(seed + step), torch.empty(0, dtype=torch.long)
    timed, began, first, losses = Timed(options.device), time.monotonic(), step, []
    while (done := _share(step - first, steps, time.monotonic() - began, seconds)) < 1:
        timed.on = step - first < 20
        if len(queue) < batch:
            queue = torch.cat((queue, torch.randperm(len(features.rows.ids), generator=order)))
        chosen, queue = queue[:batch], queue[batch:]
        ids, known, mask = features.batch(chosen)
        timed.part("rows")
        with torch.autocast(options.device.type, torch.bfloat16, enabled=not options.rehearse):
            sums = draft_loss(
                draft, frozen, ids, known, mask, drafted=draft.draft_vocab_ids, noise=NOISE, objective=recipe.objective
            )
            loss = (sums.feature + recipe.logit_weight * sums.logit) / sums.positions.clamp(min=1)
        timed.part("forward and losses")
        loss.backward()
        timed.part("backward")
        torch.nn.utils.clip_grad_value_(draft.parameters(), 0.5)
        rate = recipe.learning_rate * min((step - first + 1) / WARM_UP, 1.0) * 0.5 * (1 + np.cos(np.pi * done))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        timed.part("optimizer")
        step += 1
        if step % 100 == 0 or step - first == 5:
            losses.append({"step": step, "loss": loss.item(), "logit": (sums.logit / sums.positions).item()})
            print(losses[-1], flush=True)
            if not np.isfinite(losses[-1]["loss"]):
                raise SystemExit(f"the loss at step {step} is {losses[-1]['loss']}")
            report(**_speed(step - first, began, ids, losses, timed))
    report(**_speed(step - first, began, ids, losses, timed), steps_in_all=step)
    if state is not None:
        _save(draft, optimizers, step, state)
    draft.eval()


def _share(step: int, steps: int | None, passed: float, seconds: float | None) -> float:
    """How much of a run is done, from 0 to 1."""
    return step / steps if steps is not None else min(passed / seconds, 1.0)


def make_optimizers(draft: FSPADDraftModel, muon: bool, rate: float = 0.0) -> list[torch.optim.Optimizer]:
    """AdamW, or with `muon` Muon for the matrices and AdamW for the rest."""
    others = [weight for weight in draft.parameters() if not muon or weight.ndim != 2]
    made = [torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)]
    if muon:
        matrices = [weight for weight in draft.parameters() if weight.ndim == 2]
        made.append(torch.optim.Muon(matrices, lr=rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"))
    return made


def _speed(steps: int, began: float, ids: torch.Tensor, losses: list, timed: Timed) -> dict:
    whole = sum(timed.seconds.values())
    shares = {name: round(part / whole, 3) for name, part in timed.seconds.items()}
    speed = steps * ids.numel() / (time.monotonic() - began)
    return {"steps": steps, "tokens_per_second": speed, "share_of_a_step": shares, "losses": losses}


@torch.no_grad()
def score(options, features: Features, draft: FSPADDraftModel) -> dict:
    """
    How a draft does on held-out rows: of its first step and of those fed by itself, the share of positions where it
    names the target's token, and the cross-entropy; `chain` is the mean number of tokens that a greedy chain as long
    would give, the target's own included.
    """
    held_out, kept = features.held_out
    frozen, sums = features.frozen, torch.zeros(3, LEVELS, dtype=torch.double)
    for start in range(0, len(kept), 16):
        part = slice(start, start + 16)
        ids = held_out.ids[part].to(options.device).long()
        mask = held_out.mask[part].to(options.device)[:, 1:]
        inputs = {"inputs_embeds": frozen.embed(ids[:, 1:]).float(), "features": kept[part][:, :-1].float()}
        outputs = self_fed_outputs(draft, inputs, LEVELS)
        at = torch.arange(mask.shape[1], device=mask.device)
        masks = [mask & (at >= step) for step in range(LEVELS)]
        known = frozen.outputs(kept[part], held_out.mask[part].to(options.device))
        for step, found in enumerate(step_losses(outputs, masks, known, frozen, draft.draft_vocab_ids)):
            sums[:, step] += torch.tensor([found.top1.item(), found.logit.item(), found.positions.item()])
    hits, losses = (sums[0] / sums[2]).tolist(), (sums[1] / sums[2]).tolist()
    return {"hits": hits, "cross_entropy": losses, "chain": 1 + sum(np.cumprod(hits).tolist())}


def new_draft(target: PreTrainedModel, rows: TrainingRows, seed: int = 0, **fields) -> FSPADDraftModel:
    torch.manual_seed(seed)
    size = min(VOCABULARY, target.config.get_text_config().vocab_size)
    draft = FSPADDraftModel.from_target(target, draft_vocab_size=size, **fields).float()
    counts = rows.ids[rows.mask].long().bincount(minlength=size)  # of what the assistant says
    draft.draft_vocab_ids.copy_(counts.argsort(descending=True, stable=True)[:size].sort().values)
    return draft


def train(options, figures, questions: list[tuple[str, str]]) -> None:
    """
    Recipes for a twentieth of the time each; the best one for 0.57 of it, its weights left in `draft/`; FSPAD's parts
    with the rest, in `ablation/`. tau is measured last, if there is time: any machine can do that.
    """
    began = time.monotonic()
    tokenizer, features = load(options)
    whole = 10 if options.rehearse else max(options.seconds - 20 - (time.monotonic() - began), 20)
    began, target, rows = time.monotonic(), features.target, features.rows
    recipes = {}
    for name, recipe in RECIPES.items():
        draft, recipes[name] = new_draft(target, rows), {}
        run(options, features, draft, recipe, whole / 20, recipes[name].update)
        recipes[name] |= score(options, features, draft)
        print(name, recipes[name], flush=True)
        figures.save(recipes=recipes)
    best = max(recipes, key=lambda name: recipes[name]["chain"])
    figures.save(best=best, headline=f"best recipe {best}")
    draft, state = new_draft(target, rows), options.out / "state" / "train.safetensors"
    run(options, features, draft, RECIPES[best], 0.57 * whole, figures.save, state)
    figures.save(**score(options, features, draft))
    draft.save_pretrained(options.out / "draft-fp32", tokenizer=tokenizer)
    parts.split(options.out / "draft-fp32" / "model.safetensors", STATE_MIB)
    draft = draft.to(torch.bfloat16)
    draft.save_pretrained(options.out / "draft", tokenizer=tokenizer)
    speed = f"{figures['tokens_per_second']:,.0f} tok/s, {figures['steps_in_all']} steps of {best}"
    figures.save(headline=f"{speed}, chain {figures['chain']:.2f}")
    runs = [("fspad", 0), ("eagle2", 0), ("fspad", 1), ("eagle2", 1), ("no-feature-sampling", 0)]
    runs.append(("no-partial-alignment", 0))
    left = whole - (time.monotonic() - began)
    steps = max(int(left / len(runs) * 0.9 * figures["tokens_per_second"] / (ROWS * rows.ids.shape[1])), 2)
    found = {}
    for variant, seed in runs:
        title = f"{variant}-seed{seed}"
        part, found[title] = new_draft(target, rows, seed, **VARIANTS[variant][1]), {}
        run(options, features, part, RECIPES["AdamW"], None, found[title].update, steps=steps, seed=seed)
        found[title] |= score(options, features, part)
        part.to(torch.bfloat16).save_pretrained(options.out / "ablation" / title, tokenizer=tokenizer)
        figures.save(ablation=found)
    if options.rehearse or time.monotonic() - began < whole - 60:
        taus = _taus(options, target, tokenizer, draft.to(target.dtype), questions)
        figures.save(tau=taus, headline=f"{figures['headline']}, tau " + _said(taus))


def _taus(options, target, tokenizer, draft, questions) -> dict[str, dict]:
    """tau by task and the mean, greedy and at T = 1, of answers simulated round for round."""
    tokens = 16 if options.rehearse else 128
    rows = measure_acceptance(target, tokenizer, draft, questions, tokens)
    taus = {mode: mean_tau(rows, mode) for mode in ("greedy", "coupled", "uncoupled")}
    return {mode: {"tasks": tasks, "mean": mean} for mode, (tasks, mean) in taus.items()}


def _said(taus: dict[str, dict]) -> str:
    return f"{taus['greedy']['mean']:.2f} greedy, {taus['coupled']['mean']:.2f} at T = 1"


def _save(draft: FSPADDraftModel, optimizers: list[torch.optim.Optimizer], step: int, state: Path) -> None:
    """Weights and moments, whole and in parts small enough to be sent one by one."""
    tensors = {}
    for name, weight in draft.named_parameters():
        tensors[name] = weight.detach().cpu()
        kept = next(optimizer.state[weight] for optimizer in optimizers if weight in optimizer.state)
        tensors |= {f"{name}:{key}": value.cpu() for key, value in kept.items() if torch.is_tensor(value)}
    state.parent.mkdir(parents=True, exist_ok=True)
    partial = state.with_name(f".{state.name}.partial")
    save_file(tensors, partial, metadata={"step": str(step)})
    partial.replace(state)
    parts.split(state, STATE_MIB)


def _restored(draft: FSPADDraftModel, optimizers: list[torch.optim.Optimizer], state: Path) -> int:
    """Takes up what `_save` left, joined from its parts if need be; the steps done by then, 0 if there is nothing."""
    manifest = state.with_name(f"{state.name}.parts.json")
    if not state.is_file() and manifest.is_file():
        parts.join(manifest)
    if not state.is_file():
        return 0
    names = {id(weight): name for name, weight in draft.named_parameters()}
    with safe_open(state, "pt") as kept, torch.no_grad():
        for optimizer in optimizers:
            for weight in (weight for group in optimizer.param_groups for weight in group["params"]):
                name = names[id(weight)]
                weight.copy_(kept.get_tensor(name))
                keys = [key for key in kept.keys() if key.startswith(f"{name}:")]  # noqa: SIM118  it is no dict
                values = {key.partition(":")[2]: kept.get_tensor(key) for key in keys}
                optimizer.state[weight] = {key: value.to(weight.device) for key, value in values.items()}
        step = int(kept.metadata()["step"])
    print(f"going on from step {step}", flush=True)
    return step
