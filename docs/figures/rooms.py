"""Whether RT-2 listens in BabyAI's rooms, with questions about them and without: in other rooms
than it was measured in before, told the right sentence and told another. Needs matplotlib, minigrid
and the two runs of rt2's page, of which the committed curves are enough for the figure.

    python docs/figures/rooms.py --questions runs/rt2/babyai-gotolocal/seed0 \
        --no-questions runs/rt2_no_questions
    python docs/figures/rooms.py   # the figure alone

And whether a colour that only the questions have is acted on: demonstrations without one, a run on
them, and that run in rooms that ask for a thing of each colour.

    python docs/figures/rooms.py --leave-out purple --demonstrations no-purple.hdf5
    python algorithms/rt2.py --dataset no-purple.hdf5 --env-id babyai:GoToLocal-v0 ...
    python docs/figures/rooms.py --leave-out purple --unheard runs/rt2/no-purple/seed0

Written to docs/algorithms/rt2: babyai.csv, babyai_unheard.csv and babyai.png.
"""

import csv
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path

import h5py
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
    rooms: int = 200  # in which each run is tried
    leave_out: str = ""  # a colour
    demonstrations: str = ""  # a new file: those of babyai-gotolocal whose sentences lack it
    unheard: str = ""  # folder of a run on that file


def load(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    sys.modules[path.stem] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def successes(policy, babyai, rooms: int, say=None, asking: str = "") -> int:
    """In how many rooms the thing that the room asks for is reached, of rooms whose sentence has
    the word `asking`; `say`: what is told instead of the sentence, a function of it."""
    envs, seen, seed = [], [], 10_000_000
    while len(envs) < rooms:
        env = babyai.BabyAI("GoToLocal")
        ob, seed = env.reset(seed=seed)[0], seed + 1
        if asking in ob["instruction"]:
            envs.append(env)
            seen.append(ob)
    told = [say(x["instruction"]) if say else x["instruction"] for x in seen]
    running, reached = list(range(rooms)), 0
    for _ in range(babyai.LEVELS["GoToLocal"]):
        actions = policy.act([seen[i] | {"instruction": told[i]} for i in running])
        for i, a in zip(running[:], actions):
            seen[i], reward, done, _, _ = envs[i].step(a)
            if done:
                running.remove(i)
                reached += reward > 0
    return reached


def another(policy):
    """Says another of the data's sentences, about another thing."""
    rng, sentences = np.random.default_rng(0), policy.saved["task"]["instructions"]
    thing = lambda sentence: sentence.split()[-2:]  # noqa: E731
    return lambda asked: rng.choice([x for x in sentences if thing(x) != thing(asked)])


def write(name: str, head: list[str], rows: list[list]) -> None:
    with open(OUT / name, "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([head, *rows])


def try_out(args: Args, rt2, babyai) -> None:
    rows = []
    for name, folder in zip(RUNS, (args.questions, args.no_questions)):
        policy = rt2.load_policy(folder)
        found = [successes(policy, babyai, args.rooms, say) for say in (None, another(policy))]
        rows.append([name, args.rooms, *(f"{100 * x / args.rooms:.1f}" for x in found)])
        print(*rows[-1])
    write("babyai.csv", ["run", "rooms", "told what is asked, %", "told another sentence, %"], rows)


def try_unheard(args: Args, rt2, babyai) -> None:
    """In rooms that ask for the colour that no demonstration names, and for each other colour."""
    policy, rows = rt2.load_policy(args.unheard), []
    for word in (args.leave_out, *(x for x in babyai.COLOR_NAMES if x != args.leave_out)):
        nameless = lambda asked, word=word: asked.replace(word, "nameless")  # noqa: E731
        ways = (None, nameless, another(policy))
        found = [successes(policy, babyai, args.rooms, say, word) for say in ways]
        rows.append([word, args.rooms, *(f"{100 * x / args.rooms:.1f}" for x in found)])
        print(*rows[-1])
    head = ["colour", "rooms", "told what is asked, %", "told a word that nothing has, %"]
    write("babyai_unheard.csv", [*head, "told another sentence, %"], rows)


def leave_out(word: str, path: str) -> None:
    """The demonstrations whose sentences lack a word, as a file of their own."""
    source = ROOT / "datasets" / "babyai-gotolocal.hdf5"
    with h5py.File(source) as file, h5py.File(path, "x") as other:
        said = list(file.attrs["instructions"])
        kept = [i for i, sentence in enumerate(said) if word not in sentence.split()]
        rows = np.isin(file["task_index"][()], kept)
        for key in file:
            column = file[key][()][rows]
            column = np.searchsorted(kept, column) if key == "task_index" else column
            other.create_dataset(key, data=column, compression="gzip")
        other.attrs.update(dict(file.attrs) | {"instructions": [said[i] for i in kept]})
        print(f"{path}: {rows.sum():,} of {len(rows):,} transitions, {len(kept)} sentences")


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
    if given.demonstrations:
        leave_out(given.leave_out, given.demonstrations)
        sys.exit()
    if given.questions or given.unheard:
        sys.path.append(str(ROOT / "datasets"))
        modules = load(ROOT / "algorithms" / "rt2.py"), importlib.import_module("babyai")
        (try_out if given.questions else try_unheard)(given, *modules)
    draw()
