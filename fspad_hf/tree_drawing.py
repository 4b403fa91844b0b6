"""What a `generate` call did, and pictures of it: SVG that reads on light and dark pages, and an HTML page."""

import unicodedata
from dataclasses import dataclass
from html import escape
from itertools import takewhile
from xml.etree import ElementTree as ET

WIDTH = 900  # of a README's column; a tree that cannot be squeezed into it makes the picture wider
ROW, BOX, GAP, PADDING, MARGIN = 24, 19, 24, 7, 12
COLUMN = (WIDTH - 3 * MARGIN) // 2  # narrow trees stand two in a row
TREE_TOP = 46  # below a round's two lines of text
SIZE, CELL = 12, 7.5  # of the font, and how wide a character of it is at most in the usual monospace fonts
LONGEST, SHORTEST = 22, 4  # label lengths in characters, as the columns have room
FONT = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"
# Each colour has a contrast above 4 with a white page and with GitHub's dark one.
INK, ACCEPTED, BONUS = "#6e7781", "#21883f", "#c2560c"
DARK = {INK: "#9198a1", ACCEPTED: "#3fb950", BONUS: "#f0883e"}  # for text on the HTML page
INKS = {"ink": INK, "accepted": ACCEPTED, "bonus": BONUS}
PILLS = {
    "root": {"fill": INK},
    "accepted": {"fill": ACCEPTED},
    "bonus": {"fill": BONUS},
    "rejected": {"fill": "none", "stroke": INK, "stroke-opacity": ".55"},
}
EDGES = {
    "accepted": {"stroke": ACCEPTED, "stroke-width": "2"},
    "bonus": {"stroke": BONUS, "stroke-width": "2", "stroke-dasharray": "4 3"},
    "rejected": {"stroke": INK, "stroke-opacity": ".55"},
}
SEEN = {" ": "␣", "\n": "⏎", "\r": "␍", "\t": "⇥", "\N{NO-BREAK SPACE}": "⍽"}
LEGEND = (
    ("root", "last token of the text"),
    ("accepted", "guess accepted"),
    ("bonus", "the target's own token, no guess met it"),
    ("rejected", "guess rejected"),
)


@dataclass(frozen=True)
class Round:
    """
    One forward of the target over a draft tree, and the tokens that it gave.

    Args:
        tokens, parents: of the tree's nodes, the root first, as in [`CandidateTree`].
        emitted: what the target drew, in order: the guesses it accepted, then its own token, if there was room for it.
    """

    tokens: tuple[int, ...]
    parents: tuple[int, ...]
    emitted: tuple[int, ...]

    @property
    def path(self) -> tuple[int, ...]:
        """The nodes whose tokens were accepted, the root not counted."""
        children = {(self.parents[i], self.tokens[i]): i for i in range(1, len(self.tokens))}
        path, node = [], 0
        for token in self.emitted:
            if (node := children.get((node, token))) is None:
                break
            path.append(node)
        return tuple(path)

    @property
    def bonus(self) -> int | None:
        """The target's own token that no guess met; `None` if the text ended on an accepted one."""
        return self.emitted[-1] if len(self.path) < len(self.emitted) else None


@dataclass(frozen=True)
class Explanation:
    """
    A `generate` call as it went.

    Args:
        title: the target's name and the mode.
        texts: the generated text after 0, 1, 2, ... tokens, without a character of which only a part is there.
        pieces: each token of the trees and of the text by itself.
        rounds: in order. The first generated token comes from the prefill, before them.
    """

    title: str
    prompt: str
    texts: tuple[str, ...]
    pieces: dict[int, str]
    rounds: tuple[Round, ...]

    def start(self, number: int) -> int:
        """How many tokens had been generated when round `number` (from 0) began."""
        return 1 + sum(len(made.emitted) for made in self.rounds[:number])


@dataclass(frozen=True)
class Box:
    """A token in its place: `column` is its depth, and the first child of a node stands in its row."""

    kind: str
    token: int
    column: int
    row: int
    parent: "Box | None"


def visible(text: str) -> str:
    """The text with its white space, and everything that has no glyph or no place in XML, made visible."""
    return "".join(SEEN.get(c) or (f"<U+{ord(c):04X}>" if unicodedata.category(c)[0] in "CZ" else c) for c in text)


def layout(made: Round) -> list[Box]:
    """The boxes of a round. What was accepted, and the bonus token behind it, is one straight line in row 0."""
    children: list[list[int]] = [[] for _ in made.tokens]
    for node in range(1, len(made.tokens)):
        children[made.parents[node]].append(node)
    path = (0, *made.path)
    boxes, rows = [], 0

    def place(node: int, column: int, parent: Box | None) -> None:
        nonlocal rows
        kind = "root" if node == 0 else "accepted" if node in path else "rejected"
        boxes.append(box := Box(kind, made.tokens[node], column, rows, parent))
        below = sorted(children[node], key=lambda child: child not in path)
        if node == path[-1] and made.bonus is not None:
            boxes.append(Box("bonus", made.bonus, column + 1, rows, box))
            rows += 1
        elif not below:
            rows += 1
        for child in below:
            place(child, column + 1, box)

    place(0, 0, None)
    return boxes


def svg_picture(explanation: Explanation, rounds: int) -> str:
    """An SVG file of the first `rounds` rounds, two side by side where both are narrow."""
    root = _svg(f"{explanation.title}: {explanation.prompt}")
    _text(root, MARGIN, 22, _cut(f"{explanation.title}: “{visible_line(explanation.prompt)}”", 110), bold=True)
    _legend(root, 44)
    shown = explanation.rounds[:rounds]
    groups = [ET.SubElement(root, "g") for _ in shown]
    drawn = [_draw_tree(group, made, explanation.pieces, TREE_TOP) for group, made in zip(groups, shown, strict=True)]
    top, number = 64.0, 0
    while number < len(shown):
        pair = drawn[number : number + 2]
        count = len(pair) if all(width <= COLUMN for width, _ in pair) else 1
        for column in range(count):
            group = groups[number + column]
            group.set("transform", f"translate({MARGIN + column * (COLUMN + MARGIN)} {top:g})")
            _text(group, 0, 12, f"Round {number + column + 1}", bold=True)
            _text(group, 76, 12, _summary(shown[number + column]))
            room = COLUMN if count == 2 else WIDTH - 2 * MARGIN
            _growing_text(group, 34, _parts(explanation, number + column), room)
        top += max(height for _, height in pair[:count]) + 22
        number += count
    return _serialise(root, max(WIDTH, max(width for width, _ in drawn) + 2 * MARGIN), top)


def html_page(explanation: Explanation, rounds: int) -> str:
    """An HTML page of the first `rounds` rounds, each with the text so far."""
    legend = _svg("The colours of the trees")
    _legend(legend, 14)
    sections = []
    for number, made in enumerate(explanation.rounds[:rounds]):
        picture = _svg(f"The tree of round {number + 1}: {_summary(made)}")
        group = ET.SubElement(picture, "g", transform=f"translate({MARGIN} 4)")
        width, height = _draw_tree(group, made, explanation.pieces)
        before, accepted, bonus = map(escape, map(_printable, _parts(explanation, number)))
        sections.append(
            f'<section id="round-{number + 1}">\n<h2>Round {number + 1}</h2>\n<p class="ink">{_summary(made)}</p>\n'
            f'<p class="text">{before}<b class="accepted">{accepted}</b><b class="bonus">{bonus}</b></p>\n'
            f"<figure>{_serialise(picture, width + 2 * MARGIN, height + 8)}</figure>\n</section>"
        )
    tokens = sum(len(made.emitted) for made in explanation.rounds)
    count, prompt = len(explanation.rounds), escape(_printable(explanation.prompt))
    dark = "".join(f".{name}{{color:{DARK[colour]}}}" for name, colour in INKS.items())
    light = "".join(f".{name}{{color:{colour}}}" for name, colour in INKS.items())
    title = escape(_printable(explanation.title))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}: {prompt}</title>
<style>
:root{{color-scheme:light dark}}
body{{max-width:{WIDTH + 60}px;margin:2rem auto;padding:0 1rem;font:15px/1.5 system-ui,sans-serif}}
h1{{font-size:1.2rem}} h2{{font-size:1rem;margin:2.2rem 0 0}} p{{margin:.2rem 0}}
.text{{white-space:pre-wrap;overflow-wrap:anywhere;border-left:3px solid {INK};padding-left:.8rem;margin:.6rem 0}}
figure{{margin:0;overflow-x:auto}}
{light}
@media (prefers-color-scheme:dark){{{dark}svg .rejected text,svg .note{{fill:{DARK[INK]}}}}}
</style>
</head>
<body>
<h1>{title}</h1>
<p class="text">{prompt}</p>
<p>{count} rounds gave {tokens} tokens: tau {tokens / count:.2f}. The first token came from the prompt's forward.</p>
{_serialise(legend, WIDTH, 24)}
{chr(10).join(sections)}
</body>
</html>
"""


def visible_line(text: str) -> str:
    """As [`visible`], with plain spaces left as they are."""
    return visible(text).replace("␣", " ")


def _printable(text: str) -> str:
    """Running text: lines and spaces as they are, all else that has no glyph made visible."""
    return "\n".join(visible_line(line) for line in text.split("\n"))


def _parts(explanation: Explanation, number: int) -> tuple[str, str, str]:
    """The text before a round, what it accepted, and its bonus token."""
    start, made = explanation.start(number), explanation.rounds[number]
    counts = (start, start + len(made.path), start + len(made.emitted))
    before, accepted, after = (explanation.texts[count] for count in counts)
    if not (accepted.startswith(before) and after.startswith(accepted)):  # a decoder that rewrites what it has said
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(before, after, strict=False)))
        return before[:same], after[same:], ""
    return before, accepted[len(before) :], after[len(accepted) :]


def _summary(made: Round) -> str:
    guesses, accepted, total = len(made.tokens) - 1, len(made.path), len(made.emitted)
    own = " + bonus" if made.bonus is not None else ""
    return f"{accepted} of {guesses} accepted{own} = {total} token{'s' * (total > 1)}"


def _draw_tree(parent: ET.Element, made: Round, pieces: dict[int, str], top: int = 0) -> tuple[float, float]:
    """Draws a round's tree at the left edge, from `top` on; gives how far to the right and down it reaches."""
    group = ET.SubElement(parent, "g", transform=f"translate(0 {top})")
    boxes = layout(made)
    columns = 1 + max(box.column for box in boxes)
    for longest in range(LONGEST, SHORTEST - 1, -1):
        labels = [_cut(visible(pieces[box.token]) or "∅", longest) for box in boxes]
        widths = [0.0] * columns
        for box, label in zip(boxes, labels, strict=True):
            widths[box.column] = max(widths[box.column], _cells(label) * CELL + 2 * PADDING)
        width = sum(widths) + GAP * (columns - 1)
        if width <= WIDTH - 2 * MARGIN:
            break
    left = [sum(widths[:column]) + GAP * column for column in range(columns)]
    right = {box: left[box.column] + _cells(label) * CELL + 2 * PADDING
             for box, label in zip(boxes, labels, strict=True)}  # fmt: skip
    # Muted edges first: where two share a trunk the accepted one stays on top.
    for box in sorted(boxes, key=lambda box: box.kind != "rejected"):
        if box.parent is not None:
            ET.SubElement(group, "path", {"d": _edge(box, left, right), "fill": "none", **EDGES[box.kind]})
    for box, label in zip(boxes, labels, strict=True):
        _pill(group, box.kind, left[box.column], box.row * ROW + 2, right[box] - left[box.column], label,
              f"{visible(pieces[box.token])} (token {box.token}, {box.kind})")  # fmt: skip
    return width, top + ROW * (1 + max(box.row for box in boxes))


def _edge(box: Box, left: list[float], right: dict[Box, float]) -> str:
    """From the parent's right side, through the gap before the box's column, to the box's left side."""
    start, end, y = right[box.parent], left[box.column], ROW / 2 - 0.5
    above, below = box.parent.row * ROW + y, box.row * ROW + y
    if above == below:
        return f"M{start:g} {above:g}H{end:g}"
    trunk = end - GAP / 2
    return f"M{start:g} {above:g}H{trunk - 6:g}q6 0 6 6V{below - 6:g}q0 6 6 6H{end:g}"


def _pill(parent: ET.Element, kind: str, x: float, y: float, width: float, label: str, title: str) -> None:
    group = ET.SubElement(parent, "g", {"class": kind})
    ET.SubElement(group, "title").text = title
    radius = {"bonus": 2, "root": 2}.get(kind, BOX / 2)
    shape = {"x": f"{x:g}", "y": f"{y:g}", "width": f"{width:g}", "height": f"{BOX}", "rx": f"{radius:g}"}
    ET.SubElement(group, "rect", shape | PILLS[kind])
    text = {"x": f"{x + width / 2:g}", "y": f"{y + 13.6:g}", "text-anchor": "middle"}
    text["fill"] = INK if kind == "rejected" else "#fff"
    ET.SubElement(group, "text", text).text = label


def _legend(root: ET.Element, y: float) -> None:
    x = float(MARGIN)
    for kind, meaning in LEGEND:
        _pill(root, kind, x, y - BOX / 2 - 4, 26, "", meaning)
        _text(root, x + 33, y, meaning)
        x += 33 + _cells(meaning) * CELL + 18


def _growing_text(root: ET.Element, y: float, parts: tuple[str, str, str], width: float) -> None:
    """One line: the end of the text so far, and what the round added."""
    before, accepted, bonus = map(visible_line, parts)
    room = int(width / CELL)
    bonus = _cut(bonus, room // 3)
    accepted = _cut(accepted, room // 2)
    room -= int(_cells(accepted + bonus)) + 1
    if _cells(before) > room:
        before = "…" + _cut(before[::-1], room, "")[::-1]
    # A tspan's outer spaces count; no-break spaces in their place are dropped by some renderers.
    line = ET.SubElement(root, "text", {"x": "0", "y": f"{y:g}", "xml:space": "preserve"})
    for part, colour in ((before, INK), (accepted, ACCEPTED), (bonus, BONUS)):
        weight = {} if colour == INK else {"font-weight": "bold"}
        ET.SubElement(line, "tspan", {"fill": colour, **weight}).text = part


def _text(parent: ET.Element, x: float, y: float, text: str, bold: bool = False) -> None:
    weight = {"font-weight": "bold"} if bold else {}
    made = ET.SubElement(parent, "text", {"class": "note", "x": f"{x:g}", "y": f"{y:g}", "fill": INK, **weight})
    made.text = text


def _cells(text: str) -> float:
    """At most so many characters of a monospace font is the text wide; what such a font may lack counts more."""
    wide = {"W": 2.0, "F": 2.0}
    return sum(1.0 if c.isascii() else wide.get(unicodedata.east_asian_width(c), 1.4) for c in text)


def _cut(text: str, longest: int, mark: str = "…") -> str:
    if _cells(text) <= longest:
        return text
    while text and _cells(text) > longest - len(mark):
        text = text[:-1]
    return text + mark


def _svg(title: str) -> ET.Element:
    font = {"font-family": FONT, "font-size": f"{SIZE}"}
    root = ET.Element("svg", {"xmlns": "http://www.w3.org/2000/svg", "role": "img", **font})
    ET.SubElement(root, "title").text = visible_line(" ".join(title.split()))
    return root


def _serialise(root: ET.Element, width: float, height: float) -> str:
    root.set("viewBox", f"0 0 {width:g} {height:g}")
    root.set("width", f"{width:g}")
    root.set("height", f"{height:g}")
    for element in root.iter():
        if element.tag != "tspan":  # white space between those would show
            element.tail = "\n"
    return ET.tostring(root, encoding="unicode")
