"""The training loop: the target's features online, the two losses, one AdamW step after another (accelerate)."""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel

from ..generation.target import attention_windows
from ..modeling_fspad import FSPADDraftModel
from .losses import LossSums, SampledHead, fspad_loss
from .packing import segment_mask, segment_positions


@dataclass
class TrainingConfig:
    """How a draft is trained. Defaults follow our own runs; the paper's are lr 5e-5, 2,000 warm-up steps, linear."""

    output_dir: str
    steps: int = 1000
    batch_rows: int = 8  # rows an optimiser step, over all processes
    micro_rows: int = 8  # rows a forward
    learning_rate: float = 1e-3
    warmup_steps: int = 30
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    clip_value: float = 0.5
    feature_weight: float = 1.0
    logit_weight: float = 0.1
    noise: float = 0.1  # U(-noise, noise) * 512 / row length, added to the input features
    head_sample: int = 0  # 0: the whole vocabulary; else the most frequent ids kept in a sampled softmax ...
    head_extra: int = 2048  # ... and how many others are drawn each step
    mixed_precision: str = "no"  # "bf16": autocast over fp32 weights
    checkpoint_every: int = 100
    seed: int = 0


class TargetFeatures:
    """
    The target's features f, computed on the fly; with `keep`, each row's are held in memory (fp16) for later epochs.

    Args:
        target: the frozen target.
        keep: hold rows of features: 2 * h bytes a token.
    """

    def __init__(self, target: PreTrainedModel, keep: bool = False):
        self.decoder, self.kept = target.get_decoder(), {} if keep else None
        self.text_config, self.dtype = target.config.get_text_config(), target.dtype

    @torch.no_grad()
    def __call__(
        self, rows: list[int], ids: torch.LongTensor, segments: torch.LongTensor | None = None
    ) -> torch.Tensor:
        """
        Row numbers, ids and segments `[rows, length]` in, features `[rows, length, hidden]` out.

        With segments no token sees another segment's, and positions start again with each.
        """
        if self.kept is None:
            return self._features(ids, segments)
        missing = [i for i, row in enumerate(rows) if row not in self.kept]
        if missing:
            features = self._features(ids[missing], None if segments is None else segments[missing])
            for i, row_features in zip(missing, features, strict=True):
                self.kept[rows[i]] = row_features.to("cpu", torch.float16)
        return torch.stack([self.kept[row] for row in rows]).to(ids.device, torch.float32)

    def _features(self, ids: torch.LongTensor, segments: torch.LongTensor | None) -> torch.Tensor:
        if segments is None:
            return self.decoder(input_ids=ids, use_cache=False).last_hidden_state
        windows = attention_windows(self.text_config)
        masks = {kind: segment_mask(segments, self.dtype, window) for kind, window in windows.items()}
        mask = masks if len(masks) > 1 else next(iter(masks.values()))
        positions = segment_positions(segments)
        return self.decoder(
            input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False
        ).last_hidden_state


def draft_loss(
    draft: nn.Module,
    embedding: nn.Module,
    head: Callable,
    ids: torch.LongTensor,
    features: torch.Tensor,
    mask: torch.BoolTensor,
    noise: float = 0.0,
    segments: torch.LongTensor | None = None,
) -> LossSums:
    """
    The loss sums of a batch of rows. Position t reads (f_t + noise, e_{t+1}), and is held against f_{t+1}.

    Args:
        ids (`[rows, length]`), features (`[rows, length, hidden]`): the rows and the target's features of them.
        mask (`[rows, length]`): True on the assistant's tokens.
        noise: half-width of the uniform noise at length 512; rows of another length get it scaled by 512 / length,
            packed documents each by their own length.
        segments (`[rows, length]`): the document of each token, see [`pack`]; a document's draft sees no other's.
    """
    inputs, packing = features[:, :-1], {}
    if segments is not None:
        packing["position_ids"] = segment_positions(segments)[:, :-1]
        packing["attention_mask"] = segment_mask(segments[:, :-1], inputs.dtype)
        mask = mask & _continues(segments)
    if noise:
        inputs = inputs + (torch.rand_like(inputs) * 2 - 1) * (noise * 512 / _document_lengths(ids, segments))
    with torch.no_grad():
        inputs_embeds = embedding(ids[:, 1:])
    out = draft(inputs_embeds=inputs_embeds, features=inputs, **packing)
    return fspad_loss(out.logit_features, out.features, features[:, 1:], mask[:, 1:], head)


def _continues(segments: torch.LongTensor) -> torch.BoolTensor:
    """`[rows, length]`: True where a token goes on with the document of the token before it."""
    inside = segments > 0
    inside[:, 0] = False
    inside[:, 1:] &= segments[:, 1:] == segments[:, :-1]
    return inside


def _document_lengths(ids: torch.LongTensor, segments: torch.LongTensor | None) -> int | torch.Tensor:
    """The length of a row, or `[rows, length - 1, 1]` of the document that each input belongs to."""
    if segments is None:
        return ids.shape[1]
    counts = torch.zeros_like(segments).scatter_add_(1, segments, torch.ones_like(segments))
    return counts.gather(1, segments)[:, :-1, None]


@torch.no_grad()
def warm_start(draft: FSPADDraftModel, embedding: nn.Module, batches: Iterable[tuple[torch.Tensor, ...]]):
    """
    Starts the draft at the best linear guess: `fc` solves the ridge regression f_{t+1} ~ W [e_{t+1}; f_t] + b in
    closed form, and every residual branch starts at zero.

    Args:
        batches: (ids `[rows, length]`, features `[rows, length, hidden]`) and, for packed rows, segments
            `[rows, length]` or `None`; some 100,000 tokens are plenty.
    """
    gram = cross = 0.0
    for ids, features, *rest in batches:
        segments = rest[0] if rest else None
        kept = torch.ones_like(ids, dtype=torch.bool) if segments is None else _continues(segments)
        kept = kept[:, 1:].to(features.device)
        x = torch.cat((embedding(ids[:, 1:]), features[:, :-1]), dim=-1)[kept].double()
        x = torch.cat((x, torch.ones_like(x[:, :1])), dim=-1)
        gram = gram + x.T @ x
        cross = cross + x.T @ features[:, 1:][kept].double()
    ridge = 1e-4 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    solution = torch.linalg.solve(gram + ridge, cross)
    fc = draft.feature_sampler.fc
    fc.weight.copy_(solution[:-1].T)
    if fc.bias is not None:
        fc.bias.copy_(solution[-1])
    if draft.config.feature_sampling:
        draft.feature_sampler.down_proj.weight.zero_()
    draft.layer.self_attn.o_proj.weight.zero_()
    draft.layer.mlp.down_proj.weight.zero_()


def learning_rate_at(step: int, config: TrainingConfig) -> float:
    """Linear warm-up, then a cosine to zero."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(config.steps - config.warmup_steps, 1)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def train(
    draft: FSPADDraftModel,
    target: PreTrainedModel,
    rows: torch.LongTensor,
    masks: torch.BoolTensor,
    config: TrainingConfig,
    features: Callable[[list[int], torch.LongTensor], torch.Tensor] | None = None,
    report: Callable[[dict], None] = lambda record: None,
    tokenizer=None,
    segments: torch.LongTensor | None = None,
) -> FSPADDraftModel:
    """
    Trains `draft` in place and saves it under `config.output_dir`; picks an interrupted run up where it stood.

    Args:
        draft: fp32 weights.
        target: frozen, in whatever precision it runs.
        rows (`[rows, length]`), masks (`[rows, length]`): token ids, and True on the assistant's tokens.
        features: as [`TargetFeatures`], which is the default.
        tokenizer: the target's, saved with the draft.
        segments (`[rows, length]`): of packed rows, see [`pack`]; `features` is then called with the batch's, too.
        report: called with a record (step, loss, feature, logit, top1, tokens) after each step.

    Raises:
        ValueError: nothing to train on, or masks that keep nothing.
        FloatingPointError: the loss is not a number; the last checkpoint stands.
    """
    if len(rows) == 0 or not masks[:, 1:].any():
        raise ValueError(f"Nothing to train on: {len(rows)} rows, {int(masks.sum())} of their tokens in the loss.")
    accelerator = Accelerator(mixed_precision=config.mixed_precision)
    if config.batch_rows % (config.micro_rows * accelerator.num_processes):
        raise ValueError(
            f"batch_rows={config.batch_rows} must be a multiple of micro_rows={config.micro_rows} times the "
            f"{accelerator.num_processes} processes."
        )
    device = accelerator.device
    target = target.eval().requires_grad_(False)
    features = features or TargetFeatures(target)
    embedding, head = target.get_input_embeddings(), target.get_output_embeddings()
    used = rows.flatten() if segments is None else rows[segments > 0]
    frequent = used.bincount(minlength=target.config.get_text_config().vocab_size).argsort(descending=True)
    optimizer = torch.optim.AdamW(draft.parameters(), betas=config.betas, weight_decay=config.weight_decay, fused=True)
    model, optimizer = accelerator.prepare(draft.train(), optimizer)
    output = Path(config.output_dir)
    first = _resume(accelerator, output / "checkpoint")

    for step in range(first, config.steps):
        torch.manual_seed(config.seed * 1_000_003 + step * accelerator.num_processes + accelerator.process_index)
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
        step_head = (
            SampledHead(head, frequent[: config.head_sample], config.head_extra, generator)
            if config.head_sample
            else head
        )
        chosen = _step_rows(len(rows), step, config)[accelerator.process_index :: accelerator.num_processes]
        micro_batches = [chosen[i : i + config.micro_rows] for i in range(0, len(chosen), config.micro_rows)]
        positions = accelerator.reduce(masks[chosen][:, 1:].sum().to(device), reduction="sum").clamp(min=1)

        record = {
            "step": step + 1,
            "loss": 0.0,
            "feature": 0.0,
            "logit": 0.0,
            "top1": 0.0,
            "tokens": rows[chosen].numel(),
        }
        for i, numbers in enumerate(micro_batches):
            ids, mask = rows[numbers].to(device).long(), masks[numbers].to(device)
            parts = None if segments is None else segments[numbers].to(device)
            known = features(numbers, ids) if parts is None else features(numbers, ids, parts)
            with accelerator.autocast(), _sync_on(accelerator, model, i == len(micro_batches) - 1):
                sums = draft_loss(model, embedding, step_head, ids, known, mask, config.noise, parts)
                loss = (config.feature_weight * sums.feature + config.logit_weight * sums.logit) / positions
                accelerator.backward(loss * accelerator.num_processes)  # DDP averages over processes
            for name in ("feature", "logit", "top1"):
                record[name] += float(getattr(sums, name).detach()) / int(positions)
            record["loss"] += float(loss.detach())
        if not math.isfinite(record["loss"]):
            raise FloatingPointError(
                f"The loss is {record['loss']} at step {step + 1}: lower learning_rate={config.learning_rate}; the "
                f"last good checkpoint stands in {output / 'checkpoint'}."
            )
        accelerator.clip_grad_value_(draft.parameters(), config.clip_value)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, config)
        optimizer.step()
        optimizer.zero_grad()
        report(record)
        if (step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps:
            _checkpoint(accelerator, output / "checkpoint", step + 1, config)
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).eval().save_pretrained(output, tokenizer=tokenizer)
    accelerator.wait_for_everyone()
    return draft.eval()


def _step_rows(count: int, step: int, config: TrainingConfig) -> list[int]:
    """The rows of one optimiser step: a new permutation every epoch, the same on every process and after a resume."""
    return list(_row_stream(count, config.seed, step * config.batch_rows, config.batch_rows))


def _row_stream(count: int, seed: int, start: int, length: int) -> Iterator[int]:
    for epoch in range(start // count, (start + length - 1) // count + 1):
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed + 7919 * epoch)).tolist()
        yield from order[max(start - epoch * count, 0) : start + length - epoch * count]


def _sync_on(accelerator: Accelerator, model: nn.Module, last: bool):
    """Gradients cross processes once a step, with the last micro-batch."""
    return accelerator.no_sync(model) if not last else accelerator.autocast()


def _checkpoint(accelerator: Accelerator, path: Path, step: int, config: TrainingConfig):
    partial = path.with_name(path.name + ".partial")
    accelerator.save_state(str(partial), safe_serialization=True)
    if accelerator.is_main_process:
        (partial / "progress.json").write_text(json.dumps({"step": step, "config": asdict(config)}))
        old = path.with_name(path.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        if path.exists():
            os.replace(path, old)
        os.replace(partial, path)
        shutil.rmtree(old, ignore_errors=True)
    accelerator.wait_for_everyone()


def _resume(accelerator: Accelerator, path: Path) -> int:
    old = path.with_name(path.name + ".old")
    path = path if path.exists() else old  # interrupted between the two renames
    if not path.exists():
        return 0
    accelerator.load_state(str(path))
    return json.loads((path / "progress.json").read_text())["step"]
