"""A2PO on Hopper with one part changed at a time: the table of "Part by part" on A2PO's page.

    python docs/figures/a2po_parts.py
    python benchmark_results/run.py --algorithms runs/a2po_own_xi.py runs/a2po_v_discount.py \
        --datasets hopper-medium-replay --steps 60000 --override eval-every=10000

The first line writes a2po_parts.md, from the runs in benchmark_results/study; the page has the
flags of each row. Two parts have no flag: for them it also writes versions of the file to
--versions, in which a line differs from algorithms/a2po.py. run.py trains those like any other.
"""

import csv
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
LINES = {  # version: (a line of algorithms/a2po.py, what stands there instead)
    "a2po_own_xi": (  # the target asks in s' for the condition that the logged action has in s
        "            a_star = self.policy(s_next, torch.ones_like(r), self.actor_target)\n",
        "            q, (v, size) = self.critic(s, a), self.v(s).split(1, dim=-1)\n"
        "            xi = self.condition(q.mean(0) - v, 1.25 * F.softplus(size) + 1e-3)\n"
        "            a_star = self.policy(s_next, xi, self.actor_target)\n",
    ),
    "a2po_v_discount": (  # V looks half as far ahead as Q
        "        loss = (q - y).square().mean((1, 2)).sum() + (v - y).square().mean()\n",
        "        y_v = r + 0.98 * (1 - d) * q_next\n"
        "        loss = (q - y).square().mean((1, 2)).sum() + (v - y_v).square().mean()\n",
    ),
}
ROWS = {  # folder of benchmark_results/study: what the row of the table says
    "a2po": "as shipped",
    "a2po_no_local": "one σ for all states",
    "a2po_no_mean": "ξ from the smaller critic",
    "a2po_no_layer_norm": "critics without LayerNorm",
    "a2po_beta_0.1": "β = 0.1",
    "a2po_beta_2": "β = 2",
    "a2po_k_short": "K: the CVAE frozen after a fifth",
    "a2po_v_discount": "V's discount 0.98, Q's 0.99",
    "a2po_own_xi": "the target at the transition's own ξ",
    "td3_bc": "TD3+BC",
    "td3_bc_tau_0.02": "TD3+BC with A2PO's τ",
}
DATASETS = {  # data set: heading of its column
    "hopper-random-expert-10": "a tenth expert",
    "hopper-random-medium-expert": "a third each",
    "hopper-medium-replay": "replay",
}
STEPS = range(10_000, 60_001, 10_000)


@dataclass
class Args:
    """Writes the table of A2PO's parts, and the versions of a2po.py that have no flag."""

    versions: str = "runs"  # folder of the versions


def finals(name: str, dataset: str) -> list[float]:
    """Of each seed: the mean of the last five evaluations of 60,000 steps; of the study, or, where
    it has no such run, of the long runs, cut there."""
    for place in ("study", "runs"):
        folder, found = ROOT / "benchmark_results" / place / name / dataset, []
        for path in sorted(folder.glob("*/eval.csv")):
            with open(path) as file:
                scores = {int(row["step"]): float(row["score"]) for row in csv.DictReader(file)}
            if all(step in scores for step in STEPS):
                found.append(float(np.mean([scores[step] for step in STEPS[1:]])))
        if found:
            return found
    return []


def main(args: Args) -> None:
    source = (ROOT / "algorithms" / "a2po.py").read_text()
    for name, (old, new) in LINES.items():
        if source.count(old) != 1:
            sys.exit(f"algorithms/a2po.py no longer has this line, or has it twice: {old.strip()}")
        path = Path(args.versions, f"{name}.py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source.replace(old, new))
    lines = ["| one thing changed | " + " | ".join(DATASETS.values()) + " |"]
    lines.append("|---|" + "--:|" * len(DATASETS))
    for name, label in ROWS.items():
        cells = []
        for dataset in DATASETS:
            seeds = finals(name, dataset)
            each = ", ".join(f"{x:.0f}" for x in seeds)
            cells.append(f"{np.mean(seeds):.0f} ({each})" if seeds else "-")
        lines.append(f"| {label} | {' | '.join(cells)} |")
    (FOLDER / "a2po_parts.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args))
