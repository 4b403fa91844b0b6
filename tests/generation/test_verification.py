import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fspad_hf.generation.noise import NoiseQueue

from .. import tiny
from ..conftest import fresh_draft


@pytest.mark.parametrize("vocab", [5, 101, 50_000])
def test_a_queued_draw_is_multinomial(vocab):
    for seed in range(20):
        probabilities = torch.rand(1, vocab).softmax(-1)
        torch.manual_seed(seed)
        expected = [int(torch.multinomial(probabilities, 1)) for _ in range(5)]
        state = torch.get_rng_state()
        torch.manual_seed(seed)
        queue = NoiseQueue(torch.device("cpu"), vocab)
        before = torch.get_rng_state()
        rows = queue.peek(3)[:, 0]
        assert rows.shape == (3, vocab) and torch.equal(torch.get_rng_state(), before)
        drawn = [int(queue.draw(probabilities)) for _ in range(2)]
        torch.testing.assert_close(queue.peek(3)[0, 0], rows[2], rtol=0, atol=0)  # what is left over is kept
        drawn += [int(queue.draw(probabilities)) for _ in range(3)]
        assert drawn == expected and torch.equal(torch.get_rng_state(), state)


def test_a_foreign_draw_turns_the_queue_off():
    torch.manual_seed(0)
    queue = NoiseQueue(torch.device("cpu"), 11)
    probabilities = torch.full((1, 11), 1 / 11)
    queue.peek(4)
    torch.rand(1)
    state = torch.get_rng_state()
    token = queue.draw(probabilities)
    torch.set_rng_state(state)
    assert int(token) == int(torch.multinomial(probabilities, 1)) and queue.peek(2) is None


def test_bad_distributions_raise_as_multinomial_does():
    queue = NoiseQueue(torch.device("cpu"), 4)
    queue.peek(2)
    with pytest.raises(RuntimeError, match="probability tensor contains"):
        queue.draw(torch.full((1, 4), float("nan")))


@pytest.mark.parametrize("coupled", [True, False])
def test_chi_square_of_the_first_two_tokens(coupled):
    """Frequencies of the first two tokens over a 12-token vocabulary against their exact probabilities."""
    config = LlamaConfig(**{**tiny.COMMON, "vocab_size": 12})
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    draft = fresh_draft(model, coupled_drafting=coupled, tree_depth=2, tree_top_k=3, tree_total_nodes=8)
    prompt, temperature, runs = torch.tensor([[1, 4, 7]]), 1.7, 1000
    pairs = torch.cartesian_prod(torch.arange(12), torch.arange(12))
    with torch.no_grad():
        logits = model(torch.cat((prompt.expand(144, -1), pairs), dim=1)).logits / temperature
    log_p = logits.log_softmax(-1)
    exact = (log_p[:, 2].gather(1, pairs[:, :1]) + log_p[:, 3].gather(1, pairs[:, 1:]))[:, 0].exp()
    counts, rounds = torch.zeros(144), 0
    for seed in range(runs):
        torch.manual_seed(seed + 10_000)
        out = model.generate(
            prompt, assistant_model=draft, do_sample=True, temperature=temperature, top_k=0, max_new_tokens=3,
            eos_token_id=None, pad_token_id=0, return_dict_in_generate=True,
        )  # fmt: skip
        counts[int(out.sequences[0, 3]) * 12 + int(out.sequences[0, 4])] += 1
        rounds += out.speculation.rounds
    assert rounds < 2 * runs  # drafts were accepted, so the test is of trees and not of plain sampling
    expected = exact * runs
    big = expected >= 5
    chi2 = ((counts - expected)[big] ** 2 / expected[big]).sum() + (
        counts[~big].sum() - expected[~big].sum()
    ) ** 2 / expected[~big].sum()
    freedom = int(big.sum())
    assert chi2 < freedom + 4 * (2 * freedom) ** 0.5
