"""A profile as tables in the terminal and as a plot."""

from pathlib import Path

from rich.table import Table
from rich.text import Text

from .instrument import PARTS
from .report import COLOURS, INK, MODE_TITLES, figure_table, make_axes, save_svg


def profile_tables(result: dict) -> list[tuple[str, Table]]:
    """The tables of [`fspad_hf.evaluation.profile.profile`]'s result under their titles, in reading order."""
    bandwidth = result["roofline"]["bandwidth"] / 1e9
    rounds = {"A round": result["rounds"], "A round as CUDA graphs": result["graph_rounds"]}
    return [
        *((title, _rounds(found)) for title, found in rounds.items() if found),
        ("A verification forward by its rows", _verify(result["verify"])),
        (f"Reading the weights alone, at {bandwidth:.0f} GB/s (copy, read + written)", _roofline(result)),
        ("Whole answers", _speed(result["speed"])),
    ]


def titled_rounds(result: dict) -> dict[str, dict]:
    """Eager rounds and captured ones, by their titles."""
    titled = {MODE_TITLES[mode]: found for mode, found in result["rounds"].items()}
    return titled | {f"{MODE_TITLES[mode]}, graph": found for mode, found in result["graph_rounds"].items()}


def save_plot(result: dict, path: Path) -> None:
    """Writes an SVG: a round's time by part, a bar a part and a colour a mode, captured or not."""
    rounds = titled_rounds(result)
    parts = [part for part in PARTS if any(found["parts"][part] > 0 for found in rounds.values())]
    figure, axes = make_axes("")
    height = 0.8 / len(rounds)
    for i, (title, found) in enumerate(rounds.items()):
        places = [y + (i - (len(rounds) - 1) / 2) * height for y in range(len(parts))]
        label = f"{title}: {found['seconds'] * 1e3:.1f} ms, tau {found['tau']:.2f}"
        times = [found["parts"][part] * 1e3 for part in parts]
        axes.barh(places, times, height * 0.9, color=COLOURS[(4, 1, 2, 3)[i % 4]], label=label)
    axes.set_yticks(range(len(parts)), [PARTS[part] for part in parts])
    axes.invert_yaxis()
    axes.xaxis.grid(True, color=INK, alpha=0.25)
    axes.yaxis.grid(False)
    axes.set_xlabel("ms a round", color=INK)
    axes.legend(frameon=False, labelcolor=INK, loc="lower right", fontsize=9)
    save_svg(figure, path, "time of a round by part")


def _rounds(rounds: dict) -> Table:
    table = figure_table("part", *(cell for mode in rounds for cell in (f"{MODE_TITLES[mode]}, ms", "share")))
    shown = [part for part in PARTS if any(found["parts"][part] for found in rounds.values())]
    for part, title in ((part, PARTS[part]) for part in shown):
        cells = []
        for found in rounds.values():
            seconds = found["parts"][part]
            cells += [f"{seconds * 1e3:.2f}", f"{seconds / found['seconds']:.1%}"]
        table.add_row(title, *cells)
    table.add_section()
    table.add_row("all", *(c for found in rounds.values() for c in (f"{found['seconds'] * 1e3:.2f}", "")))
    if all(found["gpu_busy_seconds"] is not None for found in rounds.values()):
        for title, idle in (("GPU busy", False), ("GPU idle (host)", True)):
            cells = []
            for found in rounds.values():
                busy = found["gpu_busy_seconds"]
                seconds = max(found["seconds"] - busy, 0.0) if idle else busy
                cells += [f"{seconds * 1e3:.2f}", f"{seconds / found['seconds']:.1%}"]
            table.add_row(title, *cells)
    table.add_row("tau", *(c for found in rounds.values() for c in (f"{found['tau']:.2f}", "")))
    table.add_row("rounds used / timed", *(c for f in rounds.values() for c in (f"{f['used']}/{f['timed']}", "")))
    return table


def _verify(costs: list[dict]) -> Table:
    table = figure_table("rows", "ms", "x the first")
    for cost in costs:
        ratio = cost["seconds"] / costs[0]["seconds"]
        table.add_row(str(cost["rows"]), f"{cost['seconds'] * 1e3:.2f}", f"{ratio:.2f}")
    return table


def _roofline(result: dict) -> Table:
    """What is measured beside what reading the weights alone takes."""
    roof = result["roofline"]
    table = figure_table("", "MB", "at least, ms", "measured", "x", "at most, tok/s")
    for mode, found in result["rounds"].items():
        plain = result["speed"][mode][0]["token_seconds"]
        rows = [("plain token", roof["target_bytes"], roof["plain_token_seconds"], plain, 1.0)]
        rows += [("round", roof["round_bytes"], roof["round_seconds"], found["seconds"], found["tau"])]
        if mode in result["graph_rounds"]:
            captured = result["graph_rounds"][mode]
            rows += [("graph round", roof["round_bytes"], roof["round_seconds"], captured["seconds"], captured["tau"])]
        for name, size, bound, measured, tokens in rows:
            shown = ("-", "-") if measured is None else (f"{measured * 1e3:.2f}", f"{measured / bound:.1f}")
            label = f"{name}, {MODE_TITLES[mode]}"
            table.add_row(label, f"{size / 1e6:.0f}", f"{bound * 1e3:.2f}", *shown, f"{tokens / bound:.1f}")
    return table


def _speed(speed: dict) -> Table:
    table = figure_table("", "method", "tok/s", "x plain", "tau", words=2)
    for mode, rows in speed.items():
        for i, row in enumerate(rows):
            values = (("tokens_per_second", ".1f"), ("ratio", ".2f"), ("tau", ".2f"))
            cells = ["-" if row[name] is None else f"{row[name]:{form}}" for name, form in values]
            if row["error"] is not None:
                cells[0] = Text(row["error"], "yellow")
            table.add_row(MODE_TITLES[mode] if i == 0 else "", row["method"], *cells)
        table.add_section()
    return table
