"""What holds where vLLM is not installed."""

import subprocess
import sys
from importlib.metadata import entry_points

import pytest
import torch

from fspad_hf.host import embedding_scale

from .. import families


def test_vllm_finds_the_draft_and_nothing_else_asks_for_vllm():
    (point,) = entry_points(group="vllm.general_plugins", name="fspad_hf")
    code = (
        f"import sys, {point.module}; assert callable({point.value.replace(':', '.')}) and 'vllm' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_old_vllm_is_told_to_be_too_old(tmp_path):
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text("")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import fspad_hf.serving.vllm"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode and "ImportError: This vLLM has not what an FSPAD draft is built of (No module" in run.stderr
    assert "expected vLLM 0.32 or newer" in run.stderr


@pytest.mark.parametrize("family", families.families())
def test_the_scale_of_the_embedding_is_known(family):
    try:
        model = families.build(family)
    except families.NotBuilt as error:
        pytest.skip(str(error))
    embedding, scale = model.get_input_embeddings(), embedding_scale(model.config.get_text_config())
    made, table = embedding(torch.tensor([3, 5])), embedding.weight[[3, 5]]
    if scale is None:
        assert not torch.allclose(made / table, made[0, 0] / table[0, 0])
    else:
        torch.testing.assert_close(made, table * scale)
