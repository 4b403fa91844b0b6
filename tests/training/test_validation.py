import pytest
import torch

from fspad_hf.generation.drafting import Drafter
from fspad_hf.training.arguments import FSPADTrainingArguments
from fspad_hf.training.data import TrainingRows
from fspad_hf.training.validation import HindsightNoise, hindsight_noise, spans, validate

from ..conftest import Oracle, fresh_draft

CONFIG = FSPADTrainingArguments("unused", eval_rows=3, eval_tokens=90)


@pytest.fixture(scope="module")
def rows(llama):
    torch.manual_seed(0)
    ids = llama.generate(torch.randint(3, 64, (4, 4)), do_sample=False, max_new_tokens=36, min_new_tokens=36)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[:, 4:20] = mask[:, 26:] = True
    return TrainingRows(ids, mask, None)


def small_draft(llama, **fields):
    return fresh_draft(llama, tree_depth=3, tree_top_k=4, tree_total_nodes=12, **fields)


def test_noise_in_hindsight_is_the_noise_that_was():
    """Rows drawn forwards, and rows drawn backwards from the winners of those: one distribution, entry by entry."""
    generator = torch.Generator().manual_seed(0)
    p = torch.tensor([0.5, 0.3, 0.15, 0.05]).expand(40_000, 4)
    forwards = torch.empty_like(p).exponential_(generator=generator)
    winners = (p / forwards).argmax(-1)
    backwards = hindsight_noise(p, winners, generator)
    assert torch.equal((p / backwards).argmax(-1), winners)
    levels = torch.tensor([0.01, 0.1, 0.3, 0.7, 1.5, 3.0])
    for winner in range(4):  # given the winner, too: there the two could differ and still agree on the whole
        ours, theirs = (rows[winners == winner] for rows in (backwards, forwards))
        for column in range(4):
            a, b = ((rows[:, column, None] < levels).double().mean(0) for rows in (ours, theirs))
            assert ((a - b).abs() < 4.5 * (0.5 / len(ours)) ** 0.5).all(), (winner, column)
    correlated = torch.corrcoef(backwards.T) - torch.eye(4)
    assert correlated.abs().max() < 0.025  # the rows of the race are independent of each other again


def test_tokens_of_the_noise_go_on_with_fresh_rows():
    p = torch.full((3, 5), 0.2)
    noise = HindsightNoise(p, torch.tensor([4, 0, 2]), more=2, seed=1)
    assert (p / noise.rows[:3]).argmax(-1).tolist() == [4, 0, 2]
    assert noise.rows.shape == (5, 5) and (noise.rows > 0).all()


def test_rounds_are_counted_as_decoding_counts_them(llama, rows):
    """A greedy text is what `generate` emits: tau of its one stretch is that of the call."""
    draft, tokens = small_draft(llama), rows.ids[:1, 4:].shape[1]
    mask = torch.zeros_like(rows.ids[:1], dtype=torch.bool)
    mask[:, 4:] = True
    found = validate(draft, llama, TrainingRows(rows.ids[:1], mask, None), CONFIG)
    out = llama.generate(
        rows.ids[:1, :4], assistant_model=draft, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False,
        return_dict_in_generate=True,
    )  # fmt: skip
    assert out.sequences.tolist() == rows.ids[:1].tolist()
    # near max_new_tokens the call's trees are shallower than those of a text that was cut: no other difference
    assert found["tau"] == pytest.approx(out.speculation.tau, abs=0.1) and found["tau"] >= 1


class OraclesTrees:
    """Stands in for [`GrownTrees`]."""

    def __init__(self, oracle, places, shape):
        self.oracle, self.places, self.depth = oracle, places, shape.depth

    def cpu(self):
        return self

    def best(self, root, number, total):
        return self.oracle.grow(self.places[number] + 2, root, self.depth)


def test_a_draft_that_knows_the_text_is_accepted_to_the_full_depth(llama, rows, monkeypatch):
    document = rows.ids[0].tolist()

    def oracle(accuracy):
        known = Oracle(document, accuracy, 64)
        monkeypatch.setattr(
            Drafter, "grow_at", lambda self, read, at, shape, noise: OraclesTrees(known, at[0].tolist(), shape)
        )

    oracle(1.0)
    mask = torch.zeros_like(rows.ids[:1], dtype=torch.bool)
    mask[:, 4:37] = True  # 32 tokens after the first: 8 rounds of 3 accepted and a bonus
    found = validate(small_draft(llama), llama, TrainingRows(rows.ids[:1], mask, None), CONFIG)
    assert found["tau"] == found["coupled_tau"] == 4
    assert [found[f"acceptance_{depth}"] for depth in (1, 2, 3)] == [1, 1, 1]
    oracle(0.0)
    found = validate(small_draft(llama), llama, TrainingRows(rows.ids[:1], mask, None), CONFIG)
    assert found["tau"] == 1 and found["acceptance_1"] == 0 and "acceptance_2" not in found


def test_hits_and_losses_by_plain_forwards(llama, rows):
    draft = small_draft(llama)
    found, hits, agreed, known, positions = validate(draft, llama, rows, CONFIG), 0, 0, 0, 0
    ids, mask = rows.ids[:3], rows.mask[:3]  # eval_rows
    with torch.no_grad():
        hidden = llama.model(ids).last_hidden_state
        out = draft(inputs_embeds=llama.get_input_embeddings()(ids[:, 1:]), features=hidden[:, :-1])
        drafted, truth = llama.lm_head(out.logit_features), llama.lm_head(hidden)
    for row in range(3):
        for t in range(ids.shape[1] - 1):
            if mask[row, t + 1]:
                positions += 1
                agreed += int(drafted[row, t].argmax() == truth[row, t + 1].argmax())
            if t + 2 < ids.shape[1] and mask[row, t + 2]:
                known += 1
                hits += int(ids[row, t + 2] in drafted[row, t].topk(3).indices)
    assert found["hit_3"] == pytest.approx(hits / known) and found["top1"] == pytest.approx(agreed / positions)
    assert found["hit_1"] <= found["hit_3"] <= found["hit_10"]
    assert found["loss"] == pytest.approx(found["feature"] + 0.1 * found["logit"])


def test_tokens_that_are_not_drafted_are_no_hits(llama, rows):
    drafted = small_draft(llama, draft_vocab_size=10)
    drafted.draft_vocab_ids = torch.arange(10)
    found = validate(drafted, llama, rows, CONFIG)
    share = (rows.ids[:3][rows.mask[:3]] < 10).double().mean()
    assert found["hit_10"] == pytest.approx(float(share), abs=1e-6)


def test_sampled_text_is_measured_as_it_was_decoded(llama):
    """tau of a sampled text: uncoupled, the very rounds of `generate`; coupled, those of other noise alike it."""
    draft, rounds, tokens, ids = small_draft(llama), {}, {}, []
    for seed in range(5):
        prompt = torch.randint(3, 64, (1, 4), generator=torch.Generator().manual_seed(seed))
        for coupled in (True, False):
            draft.speculation_config.coupled_drafting = coupled
            torch.manual_seed(seed)
            out = llama.generate(
                prompt, assistant_model=draft, do_sample=True, top_k=0, temperature=1.0, max_new_tokens=61,
                min_new_tokens=61, return_dict_in_generate=True,
            )  # fmt: skip
            rounds[coupled] = rounds.get(coupled, 0) + out.speculation.rounds
            tokens[coupled] = tokens.get(coupled, 0) + sum(out.speculation.accepted_lengths)
        ids.append(out.sequences)
    ids = torch.cat(ids)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[:, 4:] = True
    config = FSPADTrainingArguments("unused", eval_rows=5, eval_tokens=2000)
    found = validate(draft, llama, TrainingRows(ids, mask, None), config)
    assert found["tau"] == pytest.approx(tokens[False] / rounds[False], abs=0.01)
    assert found["coupled_tau"] == pytest.approx(tokens[True] / rounds[True], rel=0.1)
    assert found["coupled_tau"] > 1.5 * found["tau"]


def test_parts_add_up(llama, rows):
    whole, shares = validate(small_draft(llama), llama, rows, CONFIG), []

    def keep(sums):
        shares.append(sums)
        return sums if len(shares) < 3 else sum(shares[:3])

    for part in (0, 1, 2):
        found = validate(small_draft(llama), llama, rows, CONFIG, part, 3, keep)
    assert found == pytest.approx(whole)
    assert all(share.any() for share in shares[:2])


def test_spans_stay_within_their_document_and_budget(rows):
    ids = torch.arange(20).repeat(2, 1)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[0, 3:8] = mask[0, 12:16] = True
    mask[1, :6] = mask[1, 19] = True
    segments = torch.tensor([[1] * 10 + [2] * 8 + [0] * 2, [1] * 20])
    found = spans(TrainingRows(ids, mask, segments), 100)
    assert sorted((span.ids[0].tolist(), span.first) for span in found) == [
        (list(range(6)), 1), (list(range(8)), 3), (list(range(10, 16)), 2),
    ]  # fmt: skip
    few = spans(rows, 30)
    assert sum(span.ids.shape[1] - span.first for span in few) in (29, 30)
    assert spans(TrainingRows(ids, torch.zeros_like(mask), None), 100) == []


def test_documents_are_measured_as_if_alone(llama, rows):
    ids, mask = rows.ids, rows.mask
    packed = TrainingRows(
        torch.cat((ids[:1], ids[1:2]), 1), torch.cat((mask[:1], mask[1:2]), 1),
        torch.tensor([[1] * 40 + [2] * 40]),
    )  # fmt: skip
    config = FSPADTrainingArguments("unused", eval_tokens=1000)
    together, apart = (validate(small_draft(llama), llama, r, config) for r in (packed, rows[:2]))
    assert together == pytest.approx(apart, rel=1e-4)
