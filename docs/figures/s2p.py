"""The sheet of pictures of docs/algorithms/s2p.md and what is read back from them, of one run. Ten
seconds on one CPU thread; the numbers are written beside this file, to s2p.csv.

    python docs/figures/s2p.py --run runs/s2p/halfcheetah-pixels/seed0
"""

import csv
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import torch
import tyro

DOCS = Path(__file__).resolve().parents[1]
NAMES = "height pitch back_thigh back_shin back_foot front_thigh front_shin front_foot".split()


@dataclass
class Args:
    """Draws what a trained generator paints of held-out states, and reads them back."""

    run: str = "runs/s2p/halfcheetah-pixels/seed0"  # folder of a run of s2p.py
    columns: int = 12  # pictures beside each other


def load_algorithm():
    path = DOCS.parent / "algorithms" / "s2p.py"
    spec = importlib.util.spec_from_file_location("s2p", path)
    sys.modules["s2p"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["s2p"])
    return sys.modules["s2p"]


@torch.no_grad()
def main(given: Args) -> None:
    """Rows of the sheet: the picture before, the true one, the painted one, one off the data."""
    module = load_algorithm()
    saved = torch.load(Path(given.run) / "checkpoint.pt", weights_only=True)
    args = module.Args(**saved["args"] | {"device": "cpu"})
    data, _ = module.load_dataset(args.dataset, "none")
    count = data["episodes"].max() + 1
    held_out = np.random.default_rng(args.seed).permutation(count)
    held_out = held_out[: int(np.ceil(args.validation_fraction * count))]
    of = np.isin(data["episodes"], held_out)
    train, held = ({k: torch.as_tensor(v[r]) for k, v in data.items()} for r in (~of, of))
    learner = module.Learner(train, saved["task"], args)
    learner.load_state_dict(saved["learner"])
    learner.eval()

    after = module.neighbours(held["episodes"])[1]
    i = (after > torch.arange(len(after))).nonzero()[:, 0]
    i = i[:: len(i) // 1000 + 1]
    o, true = (learner.pictures(held["images"][x]) for x in (i, after[i]))
    s_next = learner.standardise(held["observations"][after[i]])
    painted = learner.generator(o, s_next)
    variance, rows = s_next.var(0, correction=0), []
    for kind, x in (("true", true), ("painted", painted), ("copied", o)):
        r2 = 1 - (learner.reader(x) - s_next).square().mean(0) / variance
        rows += [[kind, name, f"{value:.3f}"] for name, value in zip(NAMES, r2)]

    # Off the data: a uniform action at the same states, by the state model.
    torch.manual_seed(0)
    learner.s, learner.images = learner.standardise(held["observations"]), held["images"]
    learner.a = held["actions"]
    imagined = learner.imagine(i)[3]
    some = torch.linspace(0, len(i) - 1, given.columns).long()
    shown = [x[some].permute(0, 2, 3, 1) for x in (o, true, painted)]
    shown = [((x + 1) * 127.5).round().byte().numpy() for x in shown] + [imagined[some].numpy()]
    picture = np.concatenate([np.concatenate(list(row), axis=1) for row in shown])
    imageio.imwrite(DOCS / "assets" / "s2p.png", picture)
    with open(DOCS / "figures" / "s2p.csv", "w", newline="") as file:
        csv.writer(file).writerows([["picture", "number", "R2"], *rows])
    print(*rows, sep="\n")


if __name__ == "__main__":
    main(tyro.cli(Args))
