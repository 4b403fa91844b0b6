import pytest
import torch

from fspad_hf.training.acceptance import KnownNoise, known_continuations, mean_tau, measure_acceptance, simulate

from ..conftest import fresh_draft


@pytest.mark.parametrize("mode", ["greedy", "coupled", "uncoupled"])
@pytest.mark.parametrize("eos", [None, 2])
def test_simulation_equals_decoding_round_for_round(llama, prompt, mode, eos):
    draft = fresh_draft(llama, tree_depth=4, tree_top_k=4, tree_total_nodes=15, coupled_drafting=mode == "coupled")
    kwargs = {"do_sample": mode != "greedy", "max_new_tokens": 40, "eos_token_id": eos}
    if mode != "greedy":
        kwargs |= {"temperature": 1.0, "top_k": 0}
    seen = 0
    for seed in range(4):
        torch.manual_seed(seed)
        out = llama.generate(prompt, assistant_model=draft, return_dict_in_generate=True, **kwargs)
        noise = KnownNoise(seed, 50, 64, prompt.device) if mode == "coupled" else None
        length = prompt.shape[1]
        record = simulate(llama, draft, out.sequences, length, length + 40, noise)
        assert record.accepted_lengths == out.speculation.accepted_lengths
        seen += record.rounds
    assert seen


def test_measure(llama, tokenizer):
    draft = fresh_draft(llama, tree_depth=3, tree_top_k=4, tree_total_nodes=12)
    rows = measure_acceptance(llama, tokenizer, draft, [("qa", "why"), ("rag", "who")], max_new_tokens=20)
    assert {row["mode"] for row in rows} == {"greedy", "coupled", "uncoupled"} and len(rows) == 6
    taus, mean = mean_tau(rows, "greedy")
    assert set(taus) == {"qa", "rag"} and mean == pytest.approx(sum(taus.values()) / 2) and mean >= 1
    assert draft.config.coupled_drafting


def test_batched_continuations_are_what_plain_generate_makes(llama):
    prompts = [torch.tensor([[1, 17, 5, 40, 9][:n]]) for n in (5, 2, 4, 3)]
    plain, seeds = {"max_new_tokens": 30, "pad_token_id": 0}, [3, 1, 4, 2]
    for sampled in (False, True):
        made = dict(known_continuations(llama, prompts, 30, seeds if sampled else None, batch_size=3))
        for number, prompt in enumerate(prompts):
            torch.manual_seed(seeds[number])
            truth = llama.generate(prompt, do_sample=sampled, temperature=1.0, top_k=0, top_p=1.0, **plain)
            assert made[number].tolist() == truth.tolist()
        lengths = {made[number].shape[1] - prompts[number].shape[1] for number in made}
        assert not sampled or min(lengths) < 30  # some end with EOS
