"""Runs of the trainer and of `fspad-hf train` on the tiny target: their rows, files and consoles."""

import re

import numpy as np
import torch

from fspad_hf.training.arguments import FSPADTrainingArguments
from fspad_hf.training.data import TrainingRows
from fspad_hf.training.targets import FrozenTarget
from fspad_hf.training.templates import assistant_span
from fspad_hf.training.trainer import FSPADTrainer


def write_files(folder, target, tokenizer, rows=40, length=40):
    """The target and rows that it wrote, each with an opening of the assistant's; what `train` is told of them."""
    target.save_pretrained(folder / "target")
    tokenizer.save_pretrained(folder / "target")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        prompts = torch.randint(3, 64, (rows, 4))
        ids = target.generate(prompts, do_sample=True, max_new_tokens=length - 4, min_new_tokens=length - 4)
    opening = assistant_span(tokenizer)[0]
    ids[:, 6 : 6 + len(opening)] = torch.tensor(opening)
    np.save(folder / "ids.npy", ids.numpy().astype(np.uint16))
    return ["--target", str(folder / "target"), "--data", str(folder / "ids.npy")]


def shown_steps(text):
    """(step, loss, feature, logit, top1) of each line about a step, as printed."""
    return re.findall(r"^step (\d+)/\d+  loss (\S+)  feature (\S+)  logit (\S+)  top1 (\S+)", text, re.MULTILINE)


def all_counted(ids):
    """Rows of which every token is the assistant's."""
    return TrainingRows(ids, torch.ones_like(ids, dtype=torch.bool), None)


def arguments(path="unused", batch_rows=4, micro_rows=2, **fields):
    fields = {
        "max_steps": 3, "warmup_steps": 2, "learning_rate": 3e-3, "logging_steps": 1, "eval_tokens": 40,
        "disable_tqdm": True, "eval_steps": 1000, **fields,
    }  # fmt: skip
    return FSPADTrainingArguments(str(path), per_device_train_batch_size=micro_rows, **fields).with_batch(batch_rows)


def trained(draft, target, rows, path, held_out=None, callbacks=(), resume=None, **fields):
    """A trainer that has run; its records are the steps of `logged`."""
    trainer = FSPADTrainer(draft, target, arguments(path, **fields), rows, held_out, callbacks=callbacks)
    trainer.train(resume)
    trainer.save_model()
    return trainer


def logged(trainer):
    """The log of each step."""
    return [log for log in trainer.state.log_history if "loss" in log]


def known(target, ids, mask, segments=None, top_k=1000):
    """The target as losses take it, and what it makes of rows: of all its tokens."""
    frozen = FrozenTarget(target, top_k=top_k)
    return frozen, frozen(ids, mask, segments)
