"""What the parts of FSPAD are worth: the figures of `fspad-hf ablate` judged, as report.md with plots."""

from pathlib import Path

from ..runtime import duration, write_file
from .paired import significance
from .report import MODE_TITLES, grouped_bars, save_svg, task_table

OURS, BASELINE = "FSPAD", "EAGLE-2"
GOAL = f"{OURS} above {BASELINE} at both temperatures and no task significantly below"
HOW = (
    "tau is tokens after the first / verification forwards, by exact simulation of the rounds over answers that all "
    "drafts share; of a task sum / sum over its prompts, the mean over seeds. T = 1 is temperature 1, top_k 0, top_p "
    "1. A difference is FSPAD's tau - the other's over the seeds that both have, added up, with a 95 % interval by "
    "paired bootstrap: prompts are resampled within tasks, the same for both. It is significant, and marked by an "
    "arrow, where the interval leaves zero out; intervals of single tasks are not corrected for their number. It "
    "tells how sure the difference is over prompts; how far trainings lie apart, the table of seeds tells."
)


def judge(figures: dict) -> dict:
    """
    Whether the goal held: in every mode the mean difference to EAGLE-2 is significantly above zero, and no task's is
    significantly below.

    Args:
        figures: `figures[mode][draft]`, each with `tasks` ({task: figures}), `mean` and `seeds` ({seed: mean tau});
            figures are `tau` and, but for FSPAD, `difference`.

    Returns:
        `held`, and `lines` that say so: one about each mode and the other drafts, the last about the goal.
    """
    lines, held = [], bool(figures)
    for mode, drafts in figures.items():
        for name, result in drafts.items():
            if name == OURS or not result["mean"]:
                continue
            difference = result["mean"]["difference"]
            found = {side: [] for side in ("above", "below", None)}
            for task, figure in result["tasks"].items():
                found[significance(figure["difference"])].append(task)
            side = significance(difference)
            lines.append(
                f"{MODE_TITLES[mode]}: {OURS} - {name} = {_spread(difference)}, "
                f"{f'significantly {side}' if side else 'not significant'}; tasks significantly above: "
                f"{', '.join(found['above']) or 'none'}; below: {', '.join(found['below']) or 'none'}."
            )
            if name == BASELINE:
                held = held and side == "above" and not found["below"]
        held = held and bool(drafts.get(BASELINE, {}).get("mean"))
    return {"held": held, "lines": [*lines, f'The goal "{GOAL}" {"held" if held else "did not hold"}.']}


def write_report(folder: Path, results: dict) -> None:
    """
    Writes report.md, and its plots as SVG beside it.

    Args:
        results: as results.json holds them.
    """
    lines = [f"# {results['title']}", "", results["verdict"]["lines"][-1], "", HOW, "", *_runs(results), ""]
    lines += ["```bash", results["command"], "```", ""]
    for mode, drafts in results["figures"].items():
        others = {name: result for name, result in drafts.items() if name != OURS}
        lines += [f"## {MODE_TITLES[mode]}", "", *task_table(drafts, "tau", "tau")]
        lines += [*task_table(others, "difference", f"{OURS} minus", _cell), *_seeds(drafts), ""]
        said = [line for line in results["verdict"]["lines"] if line.startswith(f"{MODE_TITLES[mode]}: ")]
        lines += [*(f"- {line}" for line in said), ""]
        for what, baseline, skip in (("tau", None, ()), ("difference", 0.0, (OURS,))):
            figure = grouped_bars(drafts, what, "tau" if what == "tau" else f"tau, {OURS} minus", baseline, skip)
            if figure is not None:
                title = f"{'tau' if what == 'tau' else f'tau, {OURS} minus the other'}, {MODE_TITLES[mode]}"
                save_svg(figure, folder / f"{what}-{mode}.svg", title)
                lines.append(f"![{title}]({what}-{mode}.svg)")
        lines.append("")
    write_file(folder / "report.md", "\n".join(lines))


def _runs(results: dict) -> list[str]:
    """The drafts, how they were trained and on what they were measured."""
    asked, drafts = results["measured"], results["drafts"]
    first = drafts[0]
    machine = ", ".join(f"{name} {value}" for name, value in results["machine"].items())
    lines = [
        f"Trained on the same {first['rows']} rows of {first['row_length']} tokens ({', '.join(first['data'])}) for "
        f"{first['steps']} steps of {first['batch_rows']} rows, learning rate {first['learning_rate']:g}; measured on "
        f"{asked['prompts']} first turns of Spec-Bench, {asked['max_new_tokens']} new tokens; the target in "
        f"{asked['dtype']}. Machine of the measurements: {machine}.",
        "",
        "| draft | seed | parameters | trained in | weights of step | device |",
        "|---|---|---|---|---|---|",
    ]
    return lines + [
        f"| {d['draft']} | {d['seed']} | {d['parameters']:,} | {duration(d['seconds'])} | {d['weights_of_step']} | "
        f"{d['device']} |"
        for d in drafts
    ]


def _seeds(drafts: dict) -> list[str]:
    """How far the trainings of one draft lie apart."""
    seeds = {name: result["seeds"] for name, result in drafts.items() if result["mean"]}
    if not seeds:
        return []
    first = next(iter(seeds.values()))
    lines = ["| mean tau | " + " | ".join(f"seed {seed}" for seed in first) + " |", "|---|" + "---|" * len(first)]
    return lines + [
        f"| {name} | " + " | ".join(f"{taus[seed]:.3f}" if seed in taus else "-" for seed in first) + " |"
        for name, taus in seeds.items()
    ]


def _cell(figure: dict | None) -> str:
    arrow = {"above": " ↑", "below": " ↓", None: ""}[significance(figure)]
    return "-" if figure is None else _spread(figure) + arrow


def _spread(figure: dict) -> str:
    if figure["low"] is None:
        return f"{figure['value']:+.3f}"
    return f"{figure['value']:+.3f} ({figure['low']:+.3f} to {figure['high']:+.3f})"
