"""Whether RT-2 listens in BabyAI's rooms, with questions about them and without: in other rooms
than it was measured in before, told the right sentence and told another. Needs matplotlib, minigrid
and the two runs of rt2's page, of which the committed curves are enough for the figure.

    python docs/figures/rooms.py --questions runs/rt2/babyai-gotolocal/seed0 \
        --no-questions runs/rt2_no_questions
    python docs/figures/rooms.py   # the figure alone

Written to docs/algorithms/rt2: babyai.csv and babyai.png.
"""

import csv
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "docs" / "algorithms" / "rt2"
RUNS = {"with questions": "rt2", "without": "rt2_no_questions"}  # in benchmark_results/runs
COLOURS = {"with questions": "#0072B2", "without": "#D55E00"}


@dataclass
class Args:
    """Draws the rooms' part of rt2's page."""

    questions: str = ""  # folder of the run with questions; empty: the figure alone
    no_questions: str = ""  # folder of the run without
    rooms: int = 200  # in which both are tried


def load(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    sys.modules[path.stem] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def successes(policy, babyai, rooms: int, another: bool) -> int:
    """In how many rooms the thing that the room asks for is reached; `another`: told another of the
    sentences, which is nothing that the room's own reward knows of."""
    rng, envs = np.random.default_rng(0), [babyai.BabyAI("GoToLocal") for _ in range(rooms)]
    seen = [env.reset(seed=10_000_000 + i)[0] for i, env in enumerate(envs)]
    sentences = policy.saved["task"]["instructions"]
    told = [x["instruction"] for x in seen]
    if another:
        told = [
            rng.choice([x for x in sentences if x.split()[-2:] != y.split()[-2:]]) for y in told
        ]
    running, reached = list(range(rooms)), 0
    for _ in range(babyai.LEVELS["GoToLocal"]):
        actions = policy.act([seen[i] | {"instruction": told[i]} for i in running])
        for i, a in zip(running[:], actions):
            seen[i], reward, done, _, _ = envs[i].step(a)
            if done:
                running.remove(i)
                reached += reward > 0
    return reached


def try_out(args: Args) -> None:
    sys.path.append(str(ROOT / "datasets"))
    import babyai

    rt2, rows = load(ROOT / "algorithms" / "rt2.py"), []
    for name, folder in zip(RUNS, (args.questions, args.no_questions)):
        policy = rt2.load_policy(folder)
        found = [successes(policy, babyai, args.rooms, another) for another in (False, True)]
        rows.append([name, args.rooms, *(f"{100 * x / args.rooms:.1f}" for x in found)])
        print(*rows[-1])
    head = ["run", "rooms", "told what is asked, %", "told another sentence, %"]
    with open(OUT / "babyai.csv", "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([head, *rows])


def draw() -> None:
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
    for name, folder in RUNS.items():
        path = ROOT / "benchmark_results" / "runs" / folder / "babyai-gotolocal-5000/seed0/eval.csv"
        with open(path) as file:
            rows = [{k: float(x or "nan") for k, x in row.items()} for row in csv.DictReader(file)]
        steps = [row["step"] / 1000 for row in rows]
        left.plot(steps, [row["score"] for row in rows], color=COLOURS[name], label=name)
        ways = {"": "-", "_other_words": ":"}
        for way, style in ways.items():
            error = [row[f"validation/plan_mse{way}"] for row in rows]
            of = f"{name}, told {'another' if way else 'the right one'}"
            right.plot(steps, error, style, color=COLOURS[name], label=of)
    left.set(xlabel="steps (thousands)", ylabel="does what it is told (%)", ylim=(0, 100))
    right.set(xlabel="steps (thousands)", ylabel="squared error of an action", ylim=(0, None))
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(OUT / "babyai.png", dpi=110)


if __name__ == "__main__":
    given = tyro.cli(Args)
    if given.questions:
        try_out(given)
    draw()
