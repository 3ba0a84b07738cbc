"""The worked example of docs/reading.md: docs/weighted_bc.py, and its difference from the file that
it was made of, docs/weighted_bc.diff, which `git apply` turns a copy of algorithms/bc.py into.

`python tests/worked_example.py` says whether they belong together. When bc.py has changed,
`--write` copies into the example what all files share, and writes the difference anew.
"""

import difflib
import re
import sys
from pathlib import Path

import shared_blocks

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "docs" / "weighted_bc.py"
DIFF = ROOT / "docs" / "weighted_bc.diff"


def original() -> str:
    return (ROOT / "algorithms" / "bc.py").read_text()


def updated() -> str:
    """The example with the shared blocks of today."""
    text = EXAMPLE.read_text()
    for _, pattern, *_ in (block for block in shared_blocks.BLOCKS.values() if block[0] == "bc.py"):
        old, new = (re.search(pattern, x, re.DOTALL) for x in (text, original()))
        text = text.replace(old[0], new[0])
    return text


def difference() -> str:
    """As `git diff` would write it, one line of context."""
    old, new = (text.splitlines(keepends=True) for text in (original(), EXAMPLE.read_text()))
    name = "algorithms/weighted_bc.py"
    return "".join(difflib.unified_diff(old, new, f"a/{name}", f"b/{name}", n=1))


if __name__ == "__main__":
    if "--write" in sys.argv:
        EXAMPLE.write_text(updated())
        DIFF.write_text(difference())
    fits = updated() == EXAMPLE.read_text() and difference() == DIFF.read_text()
    print("They belong together." if fits else "They do not: run it with --write.")
