"""On a GPU, eager path, fp32: tokens and generator state are plain generate's. Skipped where there is none.

The full-precision promise needs full-precision matmuls: TF32 is off, as it is by default.
"""

import pytest
import torch

from .. import tiny
from ..conftest import fresh_draft
from .test_exactness import SETTINGS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_architectures(name, same, prompt):
    model, ids = tiny.build(name, "eager").to("cuda"), prompt.to("cuda")
    same(model, ids)
    same(model, ids, do_sample=True, temperature=1.3, top_k=0, top_p=0.95, repetition_penalty=1.1)


@pytest.mark.parametrize("name", SETTINGS)
def test_settings(name, same, prompt):
    min_tau = None if "eos_token_id" in SETTINGS[name] else 2.0
    same(tiny.build("llama").to("cuda"), prompt.to("cuda"), min_tau=min_tau, **SETTINGS[name])


@pytest.mark.parametrize("coupled", [True, False])
def test_real_draft(prompt, coupled):
    model, ids = tiny.build("llama").to("cuda"), prompt.to("cuda")
    draft = fresh_draft(model, coupled_drafting=coupled, tree_depth=4, tree_top_k=5, tree_total_nodes=20)
    for seed in range(6):
        outcomes = []
        for assistant in (None, draft):
            torch.manual_seed(seed)
            out = model.generate(
                ids, assistant_model=assistant, do_sample=True, top_k=0, max_new_tokens=40, eos_token_id=None
            )
            outcomes.append((out.tolist(), torch.cuda.get_rng_state().tolist()))
        assert outcomes[0] == outcomes[1]
