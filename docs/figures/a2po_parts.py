"""A2PO on Hopper with one part changed at a time: the table of "Part by part" on A2PO's page.

    python docs/figures/a2po_parts.py
    python benchmark_results/run.py --algorithms runs/a2po_own_xi.py runs/a2po_v_discount.py \
        --datasets hopper-medium-replay --steps 60000 --override eval-every=10000

The first line writes a2po_parts.md, from the runs in benchmark_results/study; the page has the flags
of each row. Two parts have no flag: for them it also writes versions of the file to --versions, in
which a line differs from algorithms/a2po.py. run.py trains those like any other file.
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
