"""The blocks that all files of algorithms/ share, letter for letter, and the tool that copies them.

`python tests/shared_blocks.py` names the copies that drifted from the original, algorithms/bc.py
(algorithms/td3_bc.py for the critic); with `--write` it makes them equal again.
"""

import re
import sys
from pathlib import Path

ALGORITHMS = Path(__file__).resolve().parents[1] / "algorithms"

# name: (file with the original, pattern of the block, files that do without it)
BLOCKS = {
    "run flags and data set": (
        "bc.py",
        r"    # The run: the same flags in every file\.\n.*?(?=\n# -+ Networks\n)",
        (),
    ),
    "mlp": ("bc.py", r"def mlp\(.*?\n\n\n", ()),
    "twin critic": (
        "td3_bc.py",
        r"class TwinCritic\(.*?(?=\n\n\n)",
        ("bc.py", "decision_transformer.py", "flow_bc.py", "fql.py", "rebrac.py", "vae_bc.py"),
    ),
    # A policy with a memory is evaluated and filmed in its own way: decision_transformer.py.
    "evaluation": (
        "bc.py",
        r"# -+ Evaluation\n.*?(?=\n\n\ndef evaluate_checkpoint)",
        ("decision_transformer.py",),
    ),
    "evaluation of a checkpoint": (
        "bc.py",
        r"def evaluate_checkpoint\(.*?(?=\n\n\ndef record_video)",
        (),
    ),
    "video": (
        "bc.py",
        r"def record_video\(.*?(?=\n\n\n# -+ Training loop\n)",
        ("decision_transformer.py",),
    ),
    "training loop": ("bc.py", r"def train\(.*?(?=\n\n\ndef accelerate)", ("sac.py",)),
    "training helpers": ("bc.py", r"def accelerate\(.*\Z", ()),
}


def drifted() -> dict[str, dict[str, str]]:
    """File name -> {block name: text it should have} for every copy that is not the original's."""
    found = {}
    for block, (origin, pattern, without) in BLOCKS.items():
        original = re.search(pattern, (ALGORITHMS / origin).read_text(), re.DOTALL)[0]
        for path in sorted(ALGORITHMS.glob("*.py")):
            copy = re.search(pattern, path.read_text(), re.DOTALL)
            if path.name not in without and (copy is None or copy[0] != original):
                found.setdefault(path.name, {})[block] = original
    return found


if __name__ == "__main__":
    for name, blocks in drifted().items():
        for block, text in blocks.items():
            print(f"{name}: {block}")
            if "--write" in sys.argv:
                path = ALGORITHMS / name
                old = re.search(BLOCKS[block][1], path.read_text(), re.DOTALL)
                if old is None:
                    sys.exit(f"{name} has no {block}: put its first and last line in by hand.")
                path.write_text(path.read_text().replace(old[0], text))
