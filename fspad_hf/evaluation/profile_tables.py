"""The tables of `fspad-hf profile`."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .report import MODE_TITLES, figure_table
from .trace import PARTS


def show_profile(result: dict) -> None:
    """Prints a result as tables."""
    console, tree = Console(), [number for number in result["tree"].values() if number]
    console.print(
        f"{result['target']}, draft {result['draft']}, {result['dtype']}, trees {tree}, prompts of "
        f"{result['context']} tokens, {result['machine']['device']}",
        highlight=False, markup=False, soft_wrap=True,
    )  # fmt: skip
    for title, table in profile_tables(result):
        console.print(f"\n{title}", table, sep="\n", highlight=False)


def profile_tables(result: dict) -> list[tuple[str, Table]]:
    """The tables of [`profile`]'s result under their titles, in reading order."""
    roof, tables = result["roofline"], []
    for title, rounds in (("A round", result["rounds"]), ("A round as CUDA graphs", result["graph_rounds"])):
        if rounds:
            tables.append((title, _round_table(rounds)))
    rows = figure_table("rows", "ms", "x the first")
    for cost in result["verify"]:
        ratio = cost["seconds"] / result["verify"][0]["seconds"]
        rows.add_row(str(cost["rows"]), f"{cost['seconds'] * 1e3:.2f}", f"{ratio:.2f}")
    tables.append(("A verification forward by its rows", rows))
    weights = figure_table("", "MB", "at least, ms", "measured", "x", "at most, tok/s")
    for mode, found in result["rounds"].items():
        plain = result["speed"][mode][0]["token_seconds"]
        lines = [("plain token", roof["target_bytes"], roof["plain_token_seconds"], plain, 1.0)]
        for name, one in (("round", found), ("graph round", result["graph_rounds"].get(mode))):
            if one is not None:
                lines.append((name, roof["round_bytes"], roof["round_seconds"], one["seconds"], one["tau"]))
        for name, size, bound, measured, tokens in lines:
            shown = ("-", "-") if measured is None else (f"{measured * 1e3:.2f}", f"{measured / bound:.1f}")
            label = f"{name}, {MODE_TITLES[mode]}"
            weights.add_row(label, f"{size / 1e6:.0f}", f"{bound * 1e3:.2f}", *shown, f"{tokens / bound:.1f}")
    bandwidth = roof["bandwidth"] / 1e9
    tables.append((f"Reading the weights alone, at {bandwidth:.0f} GB/s (copy, read + written)", weights))
    speed = figure_table("", "method", "tok/s", "x plain", "tau", words=2)
    for mode, methods in result["speed"].items():
        for number, row in enumerate(methods):
            values = (("tokens_per_second", ".1f"), ("ratio", ".2f"), ("tau", ".2f"))
            cells = ["-" if row[name] is None else f"{row[name]:{form}}" for name, form in values]
            cells[0] = cells[0] if row["error"] is None else Text(row["error"], "yellow")
            speed.add_row(MODE_TITLES[mode] if number == 0 else "", row["method"], *cells)
        speed.add_section()
    return [*tables, ("Whole answers", speed)]


def _round_table(rounds: dict) -> Table:
    table = figure_table("part", *(cell for mode in rounds for cell in (f"{MODE_TITLES[mode]}, ms", "share")))
    lines = {PARTS[part]: lambda found, part=part: found["parts"][part] for part in PARTS}
    lines = {title: line for title, line in lines.items() if any(line(found) for found in rounds.values())}
    totals = {"all": lambda found: found["seconds"]}
    if all(found["gpu_busy_seconds"] is not None for found in rounds.values()):
        totals["GPU busy"] = lambda found: found["gpu_busy_seconds"]
        totals["GPU idle"] = lambda found: max(found["seconds"] - found["gpu_busy_seconds"], 0.0)
    for group in (lines, totals):
        for title, line in group.items():
            shares = ((line(found), line(found) / found["seconds"]) for found in rounds.values())
            table.add_row(title, *(cell for ms, share in shares for cell in (f"{ms * 1e3:.2f}", f"{share:.1%}")))
        table.add_section()
    table.add_row("tau", *(cell for found in rounds.values() for cell in (f"{found['tau']:.2f}", "")))
    table.add_row("rounds used / timed", *(c for f in rounds.values() for c in (f"{f['used']}/{f['timed']}", "")))
    return table
