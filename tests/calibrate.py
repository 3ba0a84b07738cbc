"""Measures a learning-curve case over seeds, and its ablations, to set its thresholds.

    python tests/calibrate.py a2po
    python tests/calibrate.py a2po --seeds 0 1 2 3 4

writes tests/calibration/a2po.csv: one row per run, its early score and the mean of its last two
evaluations, which is what tests/test_learning.py asserts.
"""

import csv
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from cases import CASES, run, summary


@dataclass
class Args:
    """Runs a case and its ablations over seeds."""

    case: Annotated[str, tyro.conf.Positional]
    """name of the case, one of tests/cases.py"""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """seeds of both"""


def main(args: Args) -> None:
    if args.case not in CASES:
        raise SystemExit(f"No case '{args.case}'; there are {', '.join(CASES)}.")
    torch.set_num_threads(1)
    case = CASES[args.case]
    path = Path(__file__).parent / "calibration" / f"{args.case}.csv"
    path.parent.mkdir(exist_ok=True)
    rows = []
    for ablation in ("", *case.ablations):
        for seed in args.seeds:
            with tempfile.TemporaryDirectory() as folder:
                scores = run(case, seed, Path(folder) / "run", ablation)
            early, end = summary(case, scores)
            rows.append([ablation or "none", seed, f"{early:.1f}", f"{end:.1f}"])
            print(*rows[-1], "  curve:", *(f"{score:.0f}" for score in scores), flush=True)
            with open(path, "w", newline="") as file:
                csv.writer(file).writerows([["ablation", "seed", "early", "end"], *rows])


if __name__ == "__main__":
    main(tyro.cli(Args))
