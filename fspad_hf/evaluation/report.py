"""A bench's results as a table in the terminal, and as report.md with plots."""

from collections.abc import Callable, Collection
from pathlib import Path

from rich import box
from rich.table import Table
from rich.text import Text

from ..runtime import write_file
from .summary import acceptance_by_depth

INK = "#6e7781"  # reads on white and on black
ERROR, HALO = "#1f2328", "#f6f8fa"  # of error bars: one of the two stands out from every bar and every page
COLOURS = ("#8b949e", "#bf8700", "#8250df", "#2da44e", "#0969da", "#cf222e", "#1b7c83")
MODE_TITLES = {
    "greedy": "T = 0", "sampled": "T = 1", "coupled": "T = 1, coupled", "uncoupled": "T = 1, uncoupled",
}  # fmt: skip
DEPTHS_SHOWN = 10


def figure_table(*columns: str, words: int = 1, title: str = "") -> Table:
    """
    A table for the terminal, without rows yet.

    Args:
        columns: the first `words` wrap where the terminal is narrow; the others hold figures and are never cut.
    """
    table = Table(box=box.SIMPLE, title=title or None)
    for i, name in enumerate(columns):
        justify = "right" if i >= words else "left"
        table.add_column(name, justify=justify, no_wrap=i >= words, overflow="fold")
    return table


def results_table(summary: dict, title: str = "") -> Table:
    """One row a mode and method: tok/s, speed-up, tau, identical, and why it failed if it did."""
    table = figure_table("", "method", "tok/s", "speed-up", "95 %", "tau", "identical", words=2, title=title)
    for mode, methods in summary.items():
        for i, (name, result) in enumerate(methods.items()):
            lossless = result["lossless"]
            same = f"{lossless['same']}/{lossless['compared']}" if lossless["compared"] else "-"
            style = "bold red" if lossless["same"] < lossless["compared"] else ""
            cells = _cells(result["mean"]) if result["mean"] else ("failed", "", "", "")
            why = "" if result["mean"] else f"\n{_short(result['errors'])}"
            table.add_row(MODE_TITLES[mode] if i == 0 else "", Text(name + why), *cells, Text(same, style))
        table.add_section()
    return table


def write_report(folder: Path, results: dict) -> None:
    """
    Writes report.md, and its plots as SVG beside it.

    Args:
        results: as results.json holds them.
    """
    figures, plots = results["figures"], {}
    for mode in figures:
        for name, draw in _PLOTS.items():
            figure = draw(figures[mode])
            if figure is not None:
                title = f"{TITLES[name]}, {MODE_TITLES[mode]}"
                figure.suptitle(title, color=INK, fontsize=11, y=1.08)
                plots[mode, name] = f"{name}-{mode}.svg"
                save_svg(figure, folder / plots[mode, name], title)
    write_file(folder / "report.md", "\n".join(_markdown(results, plots)) + "\n")


def headline(results: dict) -> list[str]:
    """The one table that a README shows: every mode and method, over all tasks."""
    lines = ["| | method | tok/s | speed-up (95 %) | tau | identical |", "|---|---|---|---|---|---|"]
    for mode, methods in results["figures"].items():
        for name, result in methods.items():
            lossless = result["lossless"]
            same = f"{lossless['same']}/{lossless['compared']}" if lossless["compared"] else "-"
            speed, speedup, spread, tau = _cells(result["mean"]) if result["mean"] else (_failed(result), "", "", "")
            spread = f" ({spread})" if spread not in ("", "-") else ""
            lines.append(f"| {MODE_TITLES[mode]} | {name} | {speed} | {speedup}{spread} | {tau} | {same} |")
    return lines


def _markdown(results: dict, plots: dict[tuple[str, str], str]) -> list[str]:
    config, machine, figures = results["config"], results["machine"], results["figures"]
    lines = [f"# {results['title']}", "", results["verdict"], "", *headline(results), ""]
    lines += [
        "tok/s counts new tokens over the whole call, prefill included. tau is tokens after the first / forwards "
        "after the prefill. Figures of a task are sums over its prompts, the table's are means over the tasks; "
        "intervals by bootstrap over prompts. T = 1 is temperature 1, top_k 0, top_p 1. Methods are interleaved "
        f"prompt by prompt. {results['questions']} questions of {config['source']}, {config['max_new_tokens']} new "
        f"tokens a turn, seed {config['seed']}, {config['dtype']}. The prefill's time ends with the first tokens out; "
        "of prompt lookup and stock assistance these are a first round's.",
        "",
        "Machine: " + ", ".join(f"{name} {value}" for name, value in machine.items()) + ".",
        "",
    ]
    trees = "; ".join(f"{name} {', '.join(map(str, tree))}" for name, tree in config["trees"].items())
    lines += [f"Trees (depth, top-k, nodes): {trees}.", "", "```bash", results["command"], "```", ""]
    for mode, methods in figures.items():
        lines += [f"## {MODE_TITLES[mode]}", ""]
        for what, title in (("speedup", "Speed-up"), ("tau", "tau")):
            lines += task_table(methods, what, title)
        lines += _time_table(methods)
        lines += [
            f"![{TITLES[name]}, {MODE_TITLES[mode]}]({path})" for (at, name), path in plots.items() if at == mode
        ] + [""]
        failures = [(name, why) for name, result in methods.items() for why in result["errors"].items()]
        lines += [f"- {name} failed on {count} prompts: {why}" for name, (why, count) in failures]
        lines += ["", *_differences(methods, mode), ""]
    return lines


def _time_table(methods: dict) -> list[str]:
    lines = ["| Seconds in all | prefill | decoding | prefill's share |", "|---|---|---|---|"]
    for name, result in methods.items():
        prefill, decode = result["seconds"]["prefill"], result["seconds"]["decode"]
        if result["mean"]:
            lines.append(f"| {name} | {prefill:.1f} | {decode:.1f} | {prefill / (prefill + decode):.0%} |")
    return [*lines, ""]


def _differences(methods: dict, mode: str) -> list[str]:
    """Where answers part from plain generate's, folded away: in half precision there may be hundreds."""
    gap_of = "logits" if mode == "greedy" else "log p - log E"
    rows = []
    for name, result in methods.items():
        for found in result["lossless"]["first_differences"]:
            d = found["divergence"]
            gap = d.get("error") or ("-" if d["gap"] is None else f"{d['gap']:.3g}")
            if bits := d.get("bits"):
                layer = "the logits" if bits["layer"] is None else f"layer {bits['layer']}"
                gap += f"; bits from {layer} of token {bits['index']} on"
            cells = [name, found["question"], found["turn"] + 1, d.get("index", "-"), gap]
            rows.append("| " + " | ".join(map(str, cells)) + " |")
    if not rows:
        return []
    head = ["<details>", f"<summary>First differences from plain generate ({len(rows)} answers)</summary>", ""]
    head += [f"| method | question | turn | at new token | gap in {gap_of} |", "|---|---|---|---|---|"]
    return [*head, *rows, "", "</details>"]


def task_table(methods: dict, what: str, title: str, show: Callable[[dict | None], str] | None = None) -> list[str]:
    """A figure of each task, and their mean, as a Markdown table of a row a method; `show` writes a cell."""
    show = show or _value
    tasks = list(dict.fromkeys(task for result in methods.values() for task in result["tasks"]))
    lines = [f"| {title} | " + " | ".join(tasks) + " | mean |", "|---|" + "---|" * (len(tasks) + 1)]
    for name, result in methods.items():
        if result["mean"]:
            cells = [show(result["tasks"].get(task, {}).get(what)) for task in tasks]
            lines.append(f"| {name} | " + " | ".join(cells) + f" | **{show(result['mean'][what])}** |")
    return [*lines, ""]


def _cells(figures: dict) -> tuple[str, str, str, str]:
    """tok/s, speed-up, its interval, tau."""
    speedup = figures["speedup"]
    spread = "-" if speedup["low"] is None else f"{speedup['low']:.2f} - {speedup['high']:.2f}"
    return (
        _value(figures["tokens_per_second"], 1),
        f"{_value(speedup)}x",
        spread,
        _value(figures["tau"]),
    )


def _value(figure: dict | None, digits: int = 2) -> str:
    return "-" if figure is None or figure["value"] is None else f"{figure['value']:.{digits}f}"


def _failed(result: dict) -> str:
    return "failed: " + next(iter(result["errors"]), "no result").replace("|", "\\|")


def _short(errors: dict[str, int]) -> str:
    return next(iter(errors), "no result")[:48]


def save_svg(figure, path: Path, title: str) -> None:
    """Writes the figure; `title` is what a screen reader says, and the picture's alt text where it is embedded."""
    import io

    buffer = io.BytesIO()
    figure.savefig(
        buffer, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None, "Title": title}
    )
    write_file(path, buffer.getvalue())


def make_axes(ylabel: str, width: float = 8.0):
    """A figure and axes that read on a light and on a dark page."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "fspad_hf"
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 3.2))
    axes = figure.subplots()
    axes.set_facecolor("none")
    axes.set_ylabel(ylabel, color=INK)
    axes.tick_params(colors=INK)
    for side, spine in axes.spines.items():
        spine.set_color(INK)
        spine.set_visible(side in ("left", "bottom"))
    axes.yaxis.grid(True, color=INK, alpha=0.25)
    axes.set_axisbelow(True)
    return figure, axes


def add_legend(axes, columns: int) -> None:
    axes.legend(
        frameon=False, labelcolor=INK, ncols=min(columns, 5), loc="lower left", bbox_to_anchor=(0, 1.0), fontsize=9
    )


def grouped_bars(methods: dict, what: str, ylabel: str, baseline: float | None, skip: Collection[str] = ()):
    """Bars of each task (and the mean) side by side, a colour a method, with intervals."""
    from matplotlib.patheffects import withStroke

    shown = {name: result for name, result in methods.items() if result["mean"] and name not in skip}
    if not shown:
        return None
    tasks = list(dict.fromkeys(task for result in shown.values() for task in result["tasks"]))
    figure, axes = make_axes(ylabel, width=1.6 + 1.1 * (len(tasks) + 1))
    width = 0.8 / len(shown)
    for i, (name, result) in enumerate(shown.items()):
        figures = [result["tasks"].get(task, {}).get(what) for task in tasks] + [result["mean"][what]]
        places = [x + (i - (len(shown) - 1) / 2) * width for x in range(len(tasks) + 1)]
        drawn = [(x, f) for x, f in zip(places, figures, strict=True) if f and f["value"] is not None]
        colour = COLOURS[list(methods).index(name) % len(COLOURS)]
        axes.bar([x for x, _ in drawn], [f["value"] for _, f in drawn], width * 0.9, color=colour, label=name)
        ranged = [(x, f) for x, f in drawn if f["low"] is not None]
        errors = [[f["value"] - f["low"] for _, f in ranged], [f["high"] - f["value"] for _, f in ranged]]
        if ranged:
            middles = [x for x, _ in ranged], [f["value"] for _, f in ranged]
            axes.errorbar(
                *middles, yerr=errors, fmt="none", ecolor=ERROR, elinewidth=1, capsize=2.5, zorder=3,
                path_effects=[withStroke(linewidth=3, foreground=HALO)],
            )  # fmt: skip
    if baseline is not None:
        axes.axhline(baseline, color=INK, linewidth=1, linestyle="--")
    axes.set_xticks(range(len(tasks) + 1), [*(task.replace("_", "\n") for task in tasks), "mean"])
    add_legend(axes, len(shown))
    return figure


def _speculative(methods: dict) -> dict:
    """With the lengths as numbers, which results.json has as texts."""
    counted = {
        name: r | {"accepted_lengths": {int(n): c for n, c in r["accepted_lengths"].items()}}
        for name, r in methods.items()
    }
    return {name: r for name, r in counted.items() if max(r["accepted_lengths"], default=1) > 1}


def _histogram(methods: dict):
    shown = _speculative(methods)
    if not shown:
        return None
    figure, axes = make_axes("share of rounds")
    width = 0.8 / len(shown)
    for i, (name, result) in enumerate(shown.items()):
        total = sum(result["accepted_lengths"].values())
        shares = {n: c / total for n, c in result["accepted_lengths"].items() if n <= DEPTHS_SHOWN}
        colour = COLOURS[list(methods).index(name) % len(COLOURS)]
        places = [n + (i - (len(shown) - 1) / 2) * width for n in shares]
        axes.bar(places, list(shares.values()), width * 0.9, color=colour, label=name)
    longest = min(DEPTHS_SHOWN, max(max(result["accepted_lengths"]) for result in shown.values()))
    axes.set_xlim(0.5, longest + 0.5)  # a round emits one token at least
    axes.set_xticks(range(1, longest + 1))
    axes.set_xlabel("tokens emitted in a round, the bonus token included", color=INK)
    add_legend(axes, len(shown))
    return figure


def _by_depth(methods: dict):
    shown = _speculative(methods)
    if not shown:
        return None
    figure, axes = make_axes("rounds that got so deep")
    for name, result in shown.items():
        shares = acceptance_by_depth(result["accepted_lengths"])[:DEPTHS_SHOWN]
        colour = COLOURS[list(methods).index(name) % len(COLOURS)]
        axes.plot(range(1, len(shares) + 1), shares, marker="o", color=colour, label=name)
    axes.set_ylim(0, 1)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("drafted tokens accepted, at least", color=INK)
    add_legend(axes, len(shown))
    return figure


def _time_split(methods: dict):
    shown = {name: result["seconds"] for name, result in methods.items() if result["mean"]}
    if not shown:
        return None
    figure, axes = make_axes("seconds")
    names = list(shown)
    prefill, decode = ([shown[name][part] for name in names] for part in ("prefill", "decode"))
    axes.bar(names, prefill, 0.6, color=COLOURS[1], label="prefill")
    axes.bar(names, decode, 0.6, bottom=prefill, color=COLOURS[4], label="decoding")
    add_legend(axes, 2)
    return figure


TITLES = {
    "speedup": "Speed-up over plain generate", "tau": "tau", "accepted-lengths": "Tokens a round",
    "acceptance-by-depth": "Acceptance by depth", "time": "Where the time went",
}  # fmt: skip
_PLOTS = {
    "speedup": lambda methods: grouped_bars(methods, "speedup", "speed-up over plain", 1.0, skip=("plain",)),
    "tau": lambda methods: grouped_bars(methods, "tau", "tau", None, skip=methods.keys() - _speculative(methods)),
    "accepted-lengths": _histogram,
    "acceptance-by-depth": _by_depth,
    "time": _time_split,
}
