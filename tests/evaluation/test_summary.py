import pytest

from fspad_hf.evaluation.summary import acceptance_by_depth, summarise


def record(question, method, tokens, seconds, lengths=(), task="qa", turn=0, mode="greedy", **changes):
    return {
        "question": question, "task": task, "turn": turn, "mode": mode, "method": method, "prompt_tokens": 5,
        "new_tokens": tokens, "seconds": seconds, "prefill_seconds": 0.1, "accepted_lengths": list(lengths),
        "identical": None, "divergence": None, "error": None, **changes,
    }  # fmt: skip


def test_figures_by_hand():
    records = [
        record(1, "plain", 10, 2.0, [1] * 9), record(1, "fast", 10, 1.0, [3, 3, 3], identical=True),
        record(2, "plain", 20, 6.0, [1] * 19), record(2, "fast", 20, 2.0, [9, 10], identical=True),
        record(3, "plain", 8, 4.0, [1] * 7, task="rag"), record(3, "fast", 8, 1.0, [7], task="rag", identical=True),
    ]  # fmt: skip
    found = summarise(records)["greedy"]
    qa, rag, mean = found["fast"]["tasks"]["qa"], found["fast"]["tasks"]["rag"], found["fast"]["mean"]
    assert qa["tokens_per_second"]["value"] == 30 / 3 and rag["tokens_per_second"]["value"] == 8
    assert qa["speedup"]["value"] == pytest.approx((30 / 3) / (30 / 8), abs=1e-3) and rag["speedup"]["value"] == 4
    assert qa["tau"]["value"] == pytest.approx(28 / 5) and rag["tau"]["value"] == 7
    assert mean["speedup"]["value"] == pytest.approx((8 / 3 + 4) / 2, abs=1e-3) and mean["prompts"] == 3
    assert qa["speedup"]["low"] == pytest.approx(2.0) and qa["speedup"]["high"] == pytest.approx(3.0)
    assert rag["speedup"]["low"] is None  # one prompt tells nothing of the spread
    assert found["fast"]["lossless"] == {"same": 3, "compared": 3, "near_ties": 0, "first_differences": []}
    assert found["fast"]["accepted_lengths"] == {3: 3, 7: 1, 9: 1, 10: 1}
    assert found["fast"]["seconds"] == pytest.approx({"prefill": 0.3, "decode": 3.7})
    assert found["plain"]["mean"]["speedup"] == {"value": 1.0, "low": None, "high": None}


def test_turns_of_a_question_are_resampled_together():
    """Two turns that cancel out: the question's speed is certain, whatever is drawn."""
    records = []
    for question in (1, 2, 3):
        for turn, seconds in ((0, 1.0), (1, 3.0)):
            records.append(record(question, "plain", 10, 4.0, turn=turn))
            records.append(record(question, "fast", 10, seconds, [2], turn=turn))
    speedup = summarise(records)["greedy"]["fast"]["tasks"]["qa"]["speedup"]
    assert speedup == {"value": 2.0, "low": 2.0, "high": 2.0}


def test_failures_leave_the_prompt_out_of_both_sides():
    records = [
        record(1, "plain", 10, 1.0), record(1, "fast", 10, 1.0, [2]),
        record(2, "plain", 10, 9.0), record(2, "fast", 0, 0.0, error="OutOfMemoryError: no"),
    ]  # fmt: skip
    fast = summarise(records)["greedy"]["fast"]
    assert fast["mean"]["speedup"]["value"] == 1.0 and fast["errors"] == {"OutOfMemoryError: no": 1}
    dead = summarise([record(1, "plain", 1, 1.0), record(1, "dead", 0, 0.0, error="E")])["greedy"]["dead"]
    assert dead["mean"] is None and dead["tasks"] == {}


def test_differences_are_kept():
    different = record(4, "fast", 10, 1.0, [2], turn=1, identical=False, divergence={"index": 3})
    lossless = summarise([record(4, "plain", 10, 1.0, turn=1), different])["greedy"]["fast"]["lossless"]
    assert lossless["first_differences"] == [{"question": 4, "turn": 1, "divergence": {"index": 3}}]


def test_acceptance_by_depth():
    assert acceptance_by_depth({1: 2, 2: 1, 4: 1}) == [0.5, 0.25, 0.25]
    assert acceptance_by_depth({}) == [] and acceptance_by_depth({1: 5}) == []
