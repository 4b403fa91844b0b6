"""A run of `fspad-hf train` on the tiny target: its files, and its console."""

import re

import numpy as np
import torch

from fspad_hf.training.templates import assistant_span


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
