"""Where the tokens of a trained RT-1 look when it is told different things, and what it does, by
instruction, in the data's words and in others. Needs matplotlib and requirements-goals.txt.

    python algorithms/rt1.py --eval-episodes 48
    python docs/figures/rt1.py runs/rt1/scene-language/seed0

Written to docs/algorithms/rt1: attention.png and instructions.csv. Other runs' folders behind the
first (of --text use, say) are evaluated too, into instructions_<folder>.csv.
"""

import csv
import importlib.util
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import h5py
import matplotlib.pyplot as plt
import numpy as np
import torch
import tyro

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "docs" / "algorithms" / "rt1"
EPISODES = 20  # of each instruction, in either kind of words


@dataclass
class Args:
    """Draws RT-1's page."""

    runs: Annotated[list[str], tyro.conf.Positional]  # folders of runs on scene-language
    picture_only: bool = False  # no evaluation


def load():
    spec = importlib.util.spec_from_file_location("rt1", ROOT / "algorithms" / "rt1.py")
    sys.modules["rt1"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@torch.no_grad()
def attention(policy) -> None:
    """TokenLearner's weights of one picture, by instruction."""
    with h5py.File(ROOT / "datasets" / "scene-language.hdf5") as file:
        texts, index = list(file.attrs["instructions"]), file["task_index"][()]
        ends = np.flatnonzero(file["terminals"][()])
        # The middle of the first demonstration that opens a drawer: all is still to be seen.
        k = np.flatnonzero(index[ends] == 0)[0]
        start = ends[k - 1] + 1 if k else 0
        picture = file["images"][(start + ends[k]) // 2]
    net, shown = policy.net, [text for text in texts if not text.startswith("close")]
    n, size = policy.args.tokens, len(picture)
    grid = -(-size // 8)
    figure, axes = plt.subplots(
        len(shown), 1 + n, figsize=(1.15 * (1 + n), 1.3 * len(shown)), layout="constrained"
    )
    for line, text in zip(axes, shown):
        features = net.eyes(torch.as_tensor(picture)[None], net.embed_text(policy.words([text])))
        maps = net.learn_tokens.weights(features)[0].view(n, grid, grid).numpy()
        line[0].imshow(picture)
        line[0].set_ylabel(text.replace(" the ", "\nthe "), fontsize=8)
        for axis, weights in zip(line[1:], maps):
            axis.imshow(picture.mean(-1), cmap="gray", vmin=0, vmax=255)
            large = weights.repeat(8, axis=0).repeat(8, axis=1)[:size, :size]
            axis.imshow(large, cmap="inferno", alpha=0.6, vmin=0)
        for axis in line:
            axis.set(xticks=[], yticks=[])
    axes[0, 0].set_title("picture", fontsize=8)
    for i, axis in enumerate(axes[0, 1:]):
        axis.set_title(f"token {i + 1}", fontsize=8)
    figure.savefig(OUT / "attention.png", dpi=120)


def obey(policy, env, seed: int, instruction: str) -> dict:
    """One episode: what came of it, and how long a decision took."""
    observation, info = env.reset(seed=seed, options={"instruction": instruction})
    memory, done, seconds = None, False, []
    while not done:
        began = time.time()
        action, memory = policy.act(observation, memory)
        seconds.append(time.time() - began)
        observation, _, terminated, truncated, info = env.step(action)
        done = terminated or truncated
    return {"success": info["success"], "other": info["other"], "ms": 1000 * np.median(seconds)}


def scene(policy, path: Path) -> None:
    """Success by instruction, in the data's words and in others."""
    import gymnasium as gym

    sys.path.append(str(ROOT / "datasets"))
    import scene

    rows, ms = [["instruction", "success", "another thing", "success, unseen words"]], []
    for instruction in scene.INSTRUCTIONS:
        found = {}
        for words in ("SceneLanguage-v0", "SceneLanguageUnseen-v0"):
            env = gym.make(f"scene:{words}")
            found[words] = [obey(policy, env, seed, instruction) for seed in range(EPISODES)]
            ms += [x["ms"] for x in found[words]]
        seen, unseen = found.values()
        numbers = [np.mean([x[key] for x in seen]) for key in ("success", "other")]
        numbers.append(np.mean([x["success"] for x in unseen]))
        rows.append([instruction, *(f"{x:.2f}" for x in numbers)])
        print(*rows[-1], flush=True)
    means = np.mean([[float(x) for x in row[1:]] for row in rows[1:]], axis=0)
    rows.append(["all", *(f"{x:.2f}" for x in means)])
    rows.append(["milliseconds of a decision", f"{np.median(ms):.1f}", "", ""])
    print(*rows[-2], *rows[-1])
    with open(path, "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def main(args: Args) -> None:
    torch.set_num_threads(1)
    OUT.mkdir(exist_ok=True)
    module = load()
    for i, run in enumerate(args.runs):
        policy = module.load_policy(run)
        if i == 0:
            attention(policy)
        if not args.picture_only:
            name = f"instructions_{Path(run).name}" if i else "instructions"
            scene(policy, OUT / f"{name}.csv")


if __name__ == "__main__":
    main(tyro.cli(Args))
