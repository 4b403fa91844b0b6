"""Every decoder-only family that transformers has gives the same tokens, and docs/support.md says how."""

import re
from pathlib import Path

import pytest
import transformers

from .. import families

FOUND = {}
SUPPORT = Path(__file__).parents[2] / "docs" / "support.md"


@pytest.mark.parametrize("family", [name for name in families.families() if name not in families.UNANSWERED])
def test_a_family(family):
    FOUND[family] = families.asked(family)


def test_the_table_is_of_today():
    """`python -m tests.families --write docs/support.md` makes it."""
    text = SUPPORT.read_text(encoding="utf-8")
    written = re.search("<!-- families: .* -->\n(.*)\n<!-- families -->", text, re.DOTALL)[1]
    if f"transformers {transformers.__version__} |" not in written:
        pytest.skip("it was made with another transformers")
    if len(FOUND) + len(families.UNANSWERED) < len(families.families()):
        pytest.skip("not all families were asked in this process")
    assert written == families.table(FOUND)
    assert sum("chain" in cells.values() or "tree" in cells.values() for cells in FOUND.values()) >= 60
