"""The figure of docs/algorithms/gan_irl.md: what the rewards of discriminators say of each kind of
data in a mixture that datasets/make.py made. Needs matplotlib; the numbers go to a CSV file.

    python docs/figures/gan_irl.py --runs runs/gan_irl/NAME/seed0 runs/dwbc/NAME/seed0
"""

import csv
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path

import h5py
import matplotlib.pyplot as plt
import numpy as np
import torch
import tyro

DOCS = Path(__file__).resolve().parents[1]
FOLDER = DOCS / "algorithms" / "gan_irl"


@dataclass
class Args:
    """Draws what trained discriminators say of each source of a mixture."""

    runs: tuple[str, ...]  # folders of runs of gan_irl.py and dwbc.py on mixtures of make.py
    out: str = str(FOLDER / "sources")  # path of the figure and the table, without their suffix


def load_algorithm(name: str):
    spec = importlib.util.spec_from_file_location(name, DOCS.parent / "algorithms" / f"{name}.py")
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@torch.no_grad()
def judged(folder: str) -> tuple[str, dict[str, np.ndarray]]:
    """Name of the algorithm; what its discriminator says of the rows of each source; their own
    rewards with it, (2, N) each."""
    kind = torch.load(Path(folder, "checkpoint.pt"), weights_only=True)["algorithm"]
    name = {"GANIRL": "gan_irl", "DWBC": "dwbc"}[kind]
    module = load_algorithm(name)
    saved = module.load_policy(folder).saved
    args = module.Args(**saved["args"] | {"device": "cpu"})
    path = next(
        p
        for p in (Path(args.dataset), DOCS.parent / "datasets" / f"{args.dataset}.hdf5")
        if p.is_file()
    )
    with h5py.File(path) as file:  # the loader has no use for these
        sources, names = file["sources"][()], file.attrs["source_names"].split(",")
    found, task = module.load_dataset(args.dataset, args.env_id)
    data = {key: torch.as_tensor(array) for key, array in found.items()}
    learner = module.Learner(data, task, args)
    learner.load_state_dict(saved["learner"])
    s, a, *rest = learner.columns(data)
    if name == "gan_irl":
        said = learner.reward(s, a, rest[0])
    else:
        said = learner.discriminator(s, a, learner.policy.log_prob(s, a))
    both = np.stack([said[:, 0].numpy(), found["rewards"].ravel()])
    return name, {x: both[:, sources == i] for i, x in enumerate(names)}


def auroc(high, low) -> float:
    """The chance that a row of `high` is above one of `low`."""
    ranks = np.argsort(np.argsort(np.concatenate([high, low]))) + 1
    n, m = len(high), len(low)
    return float((ranks[:n].sum() - n * (n + 1) / 2) / (n * m))


def main(args: Args) -> None:
    figure, axes = plt.subplots(1, len(args.runs), figsize=(4.5 * len(args.runs), 3), squeeze=False)
    rows = []
    for axis, folder in zip(axes[0], args.runs):
        name, kinds = judged(folder)
        edges = np.histogram_bin_edges(np.concatenate([x[0] for x in kinds.values()]), 60)
        for kind, (said, own) in kinds.items():
            axis.hist(said, edges, density=True, alpha=0.6, label=f"{kind}, {len(said):,} rows")
            correlation = np.corrcoef(*(np.argsort(np.argsort(x)) for x in (said, own)))[0, 1]
            rows.append([name, kind, len(said), said.mean(), said.std(), correlation])
        axis.set(title=name, xlabel="reward" if name == "gan_irl" else "d", yticks=[])
        axis.legend(fontsize=7)
        *others, best = kinds  # the mixture names the best kind last
        for other in others:
            chance = auroc(kinds[best][0], kinds[other][0])
            rows.append([name, f"{best} above {other}", "", chance, "", ""])
        both = np.concatenate(list(kinds.values()), axis=1)
        correlation = np.corrcoef(*(np.argsort(np.argsort(x)) for x in both))[0, 1]
        rows.append([name, "all", both.shape[1], both[0].mean(), both[0].std(), correlation])
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(f"{args.out}.png", dpi=110)
    head = ["file", "rows", "number", "mean, or chance", "deviation", "rank correlation"]
    with open(f"{args.out}.csv", "w", newline="") as file:
        shown = [[f"{x:.4g}" if isinstance(x, float) else x for x in row] for row in rows]
        csv.writer(file).writerows([head, *shown])
    for row in rows:
        print(*row)


if __name__ == "__main__":
    main(tyro.cli(Args))
