import itertools

import numpy as np
import pytest

from fspad_hf.evaluation.ablation_report import judge
from fspad_hf.evaluation.paired import paired_difference, significance


def tau(rows):
    return sum(row[0] for row in rows) / sum(row[1] for row in rows)


def test_intervals_are_those_of_all_resamples():
    """Every resample of three prompts of one task and two of another, enumerated: 27 * 4 equally likely outcomes."""
    ours = {"qa": [(10, 4), (30, 9), (20, 10)], "rag": [(8, 2), (9, 6)]}
    theirs = {"qa": [(10, 5), (30, 11), (20, 7)], "rag": [(8, 4), (9, 5)]}
    tasks = [task for task in ours for _ in ours[task]]
    found = paired_difference(*(np.array([*side["qa"], *side["rag"]]) for side in (ours, theirs)), tasks)
    outcomes = {}
    for task in ours:
        count = len(ours[task])
        outcomes[task] = [
            tau([ours[task][i] for i in picks]) - tau([theirs[task][i] for i in picks])
            for picks in itertools.product(range(count), repeat=count)
        ]
        assert found["tasks"][task]["value"] == pytest.approx(tau(ours[task]) - tau(theirs[task]), abs=1e-4)
    mean = sorted((a + b) / 2 for a, b in itertools.product(outcomes["qa"], outcomes["rag"]))
    for figure, exact in ((found["tasks"]["qa"], sorted(outcomes["qa"])), (found["mean"], mean)):
        # 2.5 % of 27 lies within the first outcome, of 108 within the third
        low, high = exact[int(0.025 * len(exact))], exact[-1 - int(0.025 * len(exact))]
        assert (figure["low"], figure["high"]) == pytest.approx((low, high), abs=1e-4)
    values = [figure["value"] for figure in found["tasks"].values()]
    assert found["mean"]["value"] == pytest.approx(sum(values) / 2, abs=1e-4)


def test_what_makes_a_prompt_hard_cancels_out():
    rounds = np.random.default_rng(0).integers(20, 100, 40)
    ours, theirs = (np.stack((rounds * times, rounds), 1) for times in (2.5, 2.4))
    found = paired_difference(ours, theirs, ["qa"] * 40)["mean"]
    assert found == {"value": 0.1, "low": 0.1, "high": 0.1} and significance(found) == "above"
    tokens = np.full(40, 127)  # the same answers, one round fewer each: far less than prompts differ
    ours, theirs = np.stack((tokens, rounds - 1), 1), np.stack((tokens, rounds), 1)
    found = paired_difference(ours, theirs, ["qa"] * 40)["mean"]
    assert 0 < found["low"] < found["value"] < found["high"]
    other = paired_difference(ours, theirs[::-1], ["qa"] * 20 + ["rag"] * 20)["mean"]  # the wrong pairs
    assert other["low"] < 0 < other["high"]


def test_prompts_stay_within_their_task():
    """No spread within tasks: none in the figures, however far the tasks lie apart."""
    ours = np.array([(10, 2)] * 3 + [(10, 10)] * 3)
    found = paired_difference(ours, np.array([(10, 5)] * 6), ["qa"] * 3 + ["rag"] * 3)
    assert found["mean"] == {"value": 1.0, "low": 1.0, "high": 1.0}  # (5 - 2 + 1 - 2) / 2
    assert [significance(figure) for figure in found["tasks"].values()] == ["above", "below"]


def test_too_little_to_tell():
    found = paired_difference(np.array([(4, 2), (0, 0), (6, 2)]), np.array([(4, 4), (0, 0), (6, 3)]), ["a", "b", "c"])
    assert found["tasks"].keys() == {"a", "c"} and found["mean"] == {"value": 1.0, "low": None, "high": None}
    assert significance(found["mean"]) is significance(None) is None
    assert paired_difference(np.zeros((1, 2)), np.zeros((1, 2)), ["a"]) == {"tasks": {}, "mean": None}


def result(mean, **tasks):
    """Figures of a draft by the bounds of its differences."""

    def figure(bounds):
        return {"difference": {"value": sum(bounds) / 2, "low": bounds[0], "high": bounds[1]}}

    return {"mean": figure(mean), "tasks": {task: figure(bounds) for task, bounds in tasks.items()}, "seeds": {}}


@pytest.mark.parametrize(
    ("mode", "eagle", "held"),
    [
        ("greedy", result((0.1, 0.2), qa=(0.1, 0.2), rag=(-0.1, 0.3)), True),
        ("coupled", result((-0.01, 0.2), qa=(0.1, 0.2)), False),  # not sure
        ("uncoupled", result((0.1, 0.2), qa=(0.5, 0.6), rag=(-0.3, -0.1)), False),  # a task is below
        ("uncoupled", {"mean": None, "tasks": {}, "seeds": {}}, False),
    ],
)
def test_the_goal(mode, eagle, held):
    good, ours = result((0.1, 0.2), qa=(0.1, 0.2)), {"mean": {}, "tasks": {}, "seeds": {}}
    worse = result((-0.2, -0.1), qa=(-0.2, -0.1))  # another draft than EAGLE-2 is not in the goal
    figures = {name: {"FSPAD": ours, "without partial alignment": worse, "EAGLE-2": good} for name in
               ("greedy", "coupled", "uncoupled")}  # fmt: skip
    figures[mode]["EAGLE-2"] = eagle
    verdict = judge(figures)
    assert verdict["held"] is held
    assert verdict["lines"][-1].endswith("at both temperatures and no task significantly below\" held."
                                         if held else "below\" did not hold.")  # fmt: skip
    said = "T = 0: FSPAD - without partial alignment = -0.150 (-0.200 to -0.100), significantly below; "
    assert verdict["lines"][0] == said + "tasks significantly above: none; below: qa."
    if mode == "uncoupled" and eagle["mean"]:
        assert verdict["lines"][-2].endswith("significantly above; tasks significantly above: qa; below: rag.")


def test_the_goal_of_nothing():
    assert judge({})["held"] is False
