"""A Hub repository whose `custom_generate` runs FSPAD: what it calls, and how it is written."""

import os
from pathlib import Path

from transformers import PreTrainedModel

from .generation.hook import as_draft, install
from .modeling_fspad import FSPADDraftModel
from .runtime import write_file


def generate(model: PreTrainedModel, assistant_model: FSPADDraftModel | str | None = None, **kwargs):
    """
    What `model.generate(custom_generate="user/fspad-generate", assistant_model=..., trust_remote_code=True)` runs.

    Args:
        model: the target.
        assistant_model: a draft for it, or a draft's path or Hub id. What a string names is loaded once in the
            target's dtype and on its device, and kept for as long as the target lives.
        kwargs: as `generate` takes them; transformers hands over all of them, `streamer` included.

    Returns:
        What `generate` returns.

    Raises:
        ValueError: `assistant_model` is neither.
    """
    install()
    assistant_model = as_draft(model, assistant_model)
    if not isinstance(assistant_model, FSPADDraftModel):
        raise ValueError(
            f"assistant_model={type(assistant_model).__name__} is no FSPAD draft: pass an FSPADDraftModel, or the "
            "path or Hub id of one; leave custom_generate out to generate without a draft."
        )
    # Not model.generate: a target loaded from a repository with custom_generate has this very function there.
    return type(model).generate(model, assistant_model=assistant_model, **kwargs)


def export_custom_generate(directory: str | os.PathLike) -> Path:
    """
    Writes a repository folder for `custom_generate`: `custom_generate/generate.py`, its requirements and a card.

    Args:
        directory: the folder; made if need be. Files of the same names are replaced, others left alone.

    Returns:
        The folder, as an absolute path.

    Raises:
        ValueError: a file is in the way.
    """
    from . import __version__

    directory = Path(directory).expanduser().resolve()
    for folder in (directory, directory / "custom_generate"):
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{str(folder)!r} is a file: expected a folder to write the repository in.")
    (directory / "custom_generate").mkdir(parents=True, exist_ok=True)
    write_file(directory / "custom_generate" / "generate.py", GENERATE)
    write_file(directory / "custom_generate" / "requirements.txt", f"fspad_hf>={__version__}\n")
    write_file(directory / "README.md", CARD)
    return directory


GENERATE = '''"""FSPAD tree speculation (arXiv 2408.15562); all of it is in the package fspad_hf."""

from fspad_hf.custom_generate import generate

__all__ = ["generate"]
'''

CARD = """---
library_name: transformers
license: apache-2.0
tags:
- custom_generate
- speculative-decoding
- fspad
---

# FSPAD for `generate`

Same seed, same tokens: tree speculation by a small draft network, for greedy decoding and sampling. In float32 and
float64 the output is token-identical to plain `generate`.

Needs the package, which holds all of the code: `pip install fspad_hf`.

```python
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/or/hub-id", dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained("path/or/hub-id")
inputs = tokenizer("Why is the sky blue?", return_tensors="pt")
output = model.generate(
    **inputs,
    custom_generate="user/this-repository",
    assistant_model="path/or/hub-id-of-its-draft",  # or an FSPADDraftModel
    trust_remote_code=True,
    max_new_tokens=64,
)
print(tokenizer.decode(output[0], skip_special_tokens=True))
```

## Arguments

- `assistant_model`: a draft made for the model, as an `fspad_hf.FSPADDraftModel` or as its path or Hub id. A string is
  loaded once and kept for as long as the model lives.
- All other arguments are those of `generate`, `streamer` and `return_dict_in_generate` included: with the latter the
  output carries `speculation` (rounds, accepted lengths, tau).

What cannot be speculated (batches, beams, recurrent models, ...) runs as plain `generate`, with one warning.

Method: *Boosting Lossless Speculative Decoding via Feature Sampling and Partial Alignment Distillation*
([arXiv 2408.15562](https://arxiv.org/abs/2408.15562)).
"""
