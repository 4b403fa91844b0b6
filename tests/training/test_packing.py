import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fspad_hf.training.conversations import tokenize
from fspad_hf.training.data import TrainingRows
from fspad_hf.training.losses import draft_loss
from fspad_hf.training.packing import pack, segment_mask, segment_positions
from fspad_hf.training.targets import FrozenTarget
from fspad_hf.training.warm_start import warm_start

from .. import tiny
from ..conftest import fresh_draft
from .chat import CHAT, chat_tokenizer
from .runs import known, logged, trained


@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(8, 24))
@settings(max_examples=80, deadline=None)
def test_packing_keeps_every_document_whole_and_apart(lengths, row_length):
    documents = [([number + 1] * n, [(number + i) % 3 == 0 for i in range(n)]) for number, n in enumerate(lengths)]
    ids, mask, segments = pack(documents, row_length, padding=0)
    assert ids.shape == mask.shape == segments.shape and ids.shape[1] == row_length
    seen = {}
    for row in range(len(ids)):
        last = int(segments[row].max())
        inside = segments[row][segments[row] > 0].tolist()
        assert inside == sorted(inside) and set(inside) == set(range(1, last + 1))  # in order, padding after them
        assert not segments[row, len(inside) :].any() and not mask[row, len(inside) :].any()
        assert not ids[row, len(inside) :].any()
        for segment in range(1, last + 1):
            here = segments[row] == segment
            (number,) = set(ids[row, here].tolist())
            assert number not in seen
            seen[number] = mask[row, here].tolist()
    assert seen == {number + 1: document[1][:row_length] for number, document in enumerate(documents)}
    used = sum(min(n, row_length) for n in lengths)
    assert len(ids) <= max(1, 2 * used / row_length + 1)  # two rows at most half full would have been one


def test_positions_and_masks_of_segments():
    segments = torch.tensor([[1, 1, 1, 2, 2, 0], [1, 2, 2, 2, 3, 3]])
    assert segment_positions(segments).tolist() == [[0, 1, 2, 0, 1, 0], [0, 0, 1, 2, 0, 1]]
    seen = segment_mask(segments, torch.float32) == 0
    assert seen.shape == (2, 1, 6, 6)
    for row in range(2):
        for query in range(6):
            for key in range(6):
                same = segments[row, query] == segments[row, key]
                assert seen[row, 0, query, key] == (same and key <= query)
    assert (segment_mask(segments, torch.float32, 2) == 0)[0, 0, 2].tolist() == [
        False,
        True,
        True,
        False,
        False,
        False,
    ]


# the trainer on packed rows


def packed_rows(tokenizer):
    documents = [tokenize(tokenizer, chat) for chat in (CHAT, CHAT[:2], CHAT[2:], CHAT[2:] + CHAT[:2])]
    return documents, *pack(documents, 200, tokenizer.eos_token_id)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "opt"])
def test_a_packed_row_has_the_loss_of_its_documents_apart(name):
    tokenizer, model = chat_tokenizer("gemma"), tiny.build(name)
    draft, target = fresh_draft(model), FrozenTarget(model)
    documents, ids, mask, segments = packed_rows(tokenizer)
    assert len(ids) < len(documents)
    torch.manual_seed(0)
    for weight in draft.layer.self_attn.parameters():  # a fresh draft hardly attends to anything
        torch.nn.init.normal_(weight, std=0.5)
    with torch.no_grad():
        made = target(ids, mask, segments)
        packed = draft_loss(draft, target, ids, made, mask, segments)
        apart = []
        for tokens, kept in documents:
            tokens, kept = torch.tensor([tokens]), torch.tensor([kept])
            apart.append(draft_loss(draft, target, tokens, target(tokens, kept), kept))
    for part in ("feature", "logit", "top1", "positions"):
        torch.testing.assert_close(
            getattr(packed, part).float(), sum(getattr(sums, part) for sums in apart).float(), rtol=1e-4, atol=1e-3
        )
    with torch.no_grad():
        leaky = draft_loss(draft, target, ids, target(ids, mask), mask)
        half = draft_loss(draft, target, ids, made, mask)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = draft_loss(draft, target, ids, made, mask, segments)
    for sums in (leaky, half):  # neither the target nor the draft may see across
        assert abs(float(sums.logit - packed.logit)) > 0.02
    torch.testing.assert_close(rounded.logit, packed.logit, rtol=0.02, atol=0)


def test_noise_is_scaled_by_each_document_s_own_length(llama, monkeypatch):
    seen = []
    segments = torch.tensor([[1] * 4 + [2] * 10 + [0] * 2])
    ids = torch.ones_like(segments)
    frozen, found = known(llama, ids, segments > 0)
    found.features.zero_()
    draft = fresh_draft(llama)
    monkeypatch.setattr(draft, "forward", lambda **kwargs: seen.append(kwargs["features"]) or real(**kwargs))
    real = type(draft).forward.__get__(draft)
    draft_loss(draft, frozen, ids, found, segments > 0, segments, noise=0.1)
    widths = seen[0][0].abs().amax(-1)
    assert (widths[:4] <= 12.8).all() and (widths[:4] > 10).all()
    assert (widths[4:14] <= 5.12).all() and (widths[4:14] > 4).all()


def test_warm_start_does_not_see_across_documents(llama):
    tokenizer = chat_tokenizer("gemma")
    documents, ids, _, segments = packed_rows(tokenizer)
    embedding, target = llama.get_input_embeddings(), FrozenTarget(llama)
    drafts = [fresh_draft(llama), fresh_draft(llama)]
    warm_start(drafts[0], embedding, [(ids, target.features(ids, segments), segments)])
    apart = [torch.tensor([tokens]) for tokens, _ in documents]
    warm_start(drafts[1], embedding, [(tokens, target.features(tokens), None) for tokens in apart])
    a, b = (draft.feature_sampler.fc.weight for draft in drafts)
    torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)


@pytest.mark.filterwarnings("ignore:No tokenizer")
def test_training_on_packed_rows(llama, tmp_path):
    _, ids, mask, segments = packed_rows(chat_tokenizer("gemma"))
    ids, mask, segments = (x.repeat(4, 1) for x in (ids, mask, segments))
    made = trained(
        fresh_draft(llama), llama, TrainingRows(ids, mask, segments), tmp_path, batch_rows=2, max_steps=12,
        keep_features=True,
    )  # fmt: skip
    losses = [log["loss"] for log in logged(made)]
    assert losses[-1] < losses[0]
    kept, online = made.kept[0]["features"], FrozenTarget(llama).features(ids[:1], segments[:1])
    torch.testing.assert_close(kept[None].float(), online, atol=5e-3, rtol=5e-3)
