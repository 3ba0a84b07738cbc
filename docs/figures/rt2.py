"""What a trained RT-2 says of pictures that it has not seen, how often it is right, and what the
arm does with instructions, also in words that only the questions have. Needs matplotlib, and for
the second half requirements-goals.txt.

    python algorithms/rt2.py --eval-episodes 48
    python docs/figures/rt2.py runs/rt2/scene-language/seed0

The pictures and tables of rt2's page are written to docs/algorithms/rt2: answers.png, answers.csv,
instructions.csv, time.csv. Several runs: their mean; the pictures are the first one's.
"""

import csv
import importlib.util
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import h5py
import numpy as np
import torch
import tyro

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "docs" / "algorithms" / "rt2"
# What is asked for, and the same with the questions' word, with a word that nothing has.
SYNONYMS = {
    "open the drawer": ("open the tray", "open the thing"),
    "close the drawer": ("close the tray", "close the thing"),
    "open the window": ("open the pane", "open the thing"),
    "close the window": ("close the pane", "close the thing"),
}


@dataclass
class Args:
    """Draws rt2's page."""

    runs: Annotated[list[str], tyro.conf.Positional]  # folders of runs on scene-language
    episodes: int = 20  # of each instruction
    no_simulator: bool = False  # answers alone


def load():
    spec = importlib.util.spec_from_file_location("rt2", ROOT / "algorithms" / "rt2.py")
    sys.modules["rt2"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write(name: str, rows: list[list]) -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    with open(OUT / name, "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def held_out(policy) -> dict:
    """The questions about the pictures that a run has not trained on."""
    args = policy.saved["args"]
    path = ROOT / "datasets" / f"{args['questions']}.hdf5"
    with h5py.File(path) as file:
        found = {key: file[key][()] for key in ("picture", "question", "answer")}
        texts = {key: list(file.attrs[key]) for key in ("questions", "answers", "kinds")}
        count = int(np.ceil(args["validation_fraction"] * len(file["images"])))
        first = len(file["images"]) - count
        images = file["images"][first:]
    train, held = found["picture"] < first, found["picture"] >= first
    said, often = found["answer"], {}
    for q in range(len(texts["questions"])):
        counts = np.bincount(
            said[train & (found["question"] == q)], minlength=len(texts["answers"])
        )
        often[texts["questions"][q]] = texts["answers"][counts.argmax()]
    rows = [
        (p - first, texts["questions"][q], texts["answers"][a], texts["kinds"][q])
        for p, q, a in zip(*(found[key][held] for key in ("picture", "question", "answer")))
    ]
    return {"images": images, "rows": rows, "often": often}


@torch.no_grad()
def answers(policy, asked) -> list[dict]:
    """What a policy answers, and how probable it finds that."""
    found = []
    for picture, question, right, kind in asked["rows"]:
        image = torch.as_tensor(asked["images"][picture])[None]
        words, n = policy.words([question]), len(policy.net.target_position)
        s = torch.zeros_like(policy.scaling.mean)[None]
        y = policy.net.decode(image, words, s, n, ~policy.is_action)
        logits = policy.net.logits(image, words, s, y)
        logits = logits.masked_fill(policy.is_action, -torch.inf).log_softmax(-1)
        said = policy.text_of(y[0])
        end = len(said.split()) + 1
        p = logits[0, torch.arange(end), y[0, :end]].sum().exp().item()
        found.append(dict(picture=picture, question=question, right=right, said=said, p=p))
        found[-1] |= dict(kind=kind, majority=asked["often"][question] == right)
    return found


def sheet(asked, found) -> None:
    """Twelve pictures: eight answered right, four wrong where there are so many."""
    import matplotlib.pyplot as plt

    rng = np.random.default_rng(0)
    found = [found[i] for i in rng.permutation(len(found))]
    wrong = [x for x in found if x["said"] != x["right"]][:4]
    right, kinds = [], ["drawer", "window", "buttons", "gripper"]
    for k in range(12 - len(wrong)):
        left = [x for x in found if x["said"] == x["right"] and x["kind"] == kinds[k % 4]]
        right += left[k // 4 : k // 4 + 1]
    figure, axes = plt.subplots(3, 4, figsize=(9, 8.2), layout="constrained")
    for axis, x in zip(axes.flat, right + wrong):
        axis.imshow(asked["images"][x["picture"]])
        good = x["said"] == x["right"]
        said = f"{x['said']}, {x['p']:.2f}" + ("" if good else f"\nit is: {x['right']}")
        axis.set_title(f"{x['question']}?\n{said}", fontsize=8, color="black" if good else "C3")
        axis.axis("off")
    [axis.axis("off") for axis in axes.flat]
    figure.savefig(OUT / "answers.png", dpi=110)


def obey(policy, env, seed: int, instruction: str, words: str) -> dict | None:
    """One episode in a scene where drawer and window are both open or both closed, so that the
    first word leaves two things to do; None where they are not."""
    observation, info = env.reset(seed=seed, options={"instruction": instruction})
    drawer, _, window, *_ = env.unwrapped.before
    if drawer != window:
        return None
    done = False
    while not done:
        action = policy.act(observation | {"instruction": words})
        observation, _, terminated, truncated, info = env.step(action)
        done = terminated or truncated
    return {key: float(info[key]) for key in ("success", "other")}


def scene(policies, episodes: int) -> None:
    """Success by instruction, and with words that no demonstration has."""
    import gymnasium as gym

    sys.path.append(str(ROOT / "datasets"))
    rows = [["instruction", "said", "success", "another thing"]]
    env = gym.make("scene:SceneLanguage-v0")
    for instruction, others in SYNONYMS.items():
        for words in (instruction, *others):
            found = []
            for policy in policies:
                seed, before = 0, len(found)
                while len(found) < before + episodes:
                    found += [x for x in [obey(policy, env, seed, instruction, words)] if x]
                    seed += 1
            means = [np.mean([x[key] for x in found]) for key in ("success", "other")]
            rows.append([instruction, words, *(f"{x:.2f}" for x in means)])
            print(*rows[-1], sep=", ", flush=True)
    write("instructions.csv", rows)


def milliseconds(policy) -> None:
    """Of a decision and of an answer, one picture on one CPU thread, with the cache and without."""
    torch.set_num_threads(1)
    task = policy.saved["task"]
    image = np.zeros(task["image"], np.uint8)
    state = np.zeros(task["sizes"][0], np.float32)
    seen = {"image": image, "state": state, "instruction": task["instructions"][0]}

    @torch.no_grad()
    def anew():
        images, words, s = policy.look(seen)
        y = torch.zeros(1, policy.action_size, dtype=torch.long)
        for t in range(policy.action_size):
            y[:, t] = policy.net.logits(images, words, s, y[:, : t + 1])[:, -1].argmax(-1)

    calls = {
        "a decision": lambda: policy.act(seen),
        "without the cache": anew,
        "an answer": lambda: policy.answer(image, task["questions"][0]),
    }
    rows = [["what", "milliseconds"]]
    for name, call in calls.items():
        times = []
        for _ in range(60):
            began = time.perf_counter()
            call()
            times.append(1000 * (time.perf_counter() - began))
        rows.append([name, f"{np.median(times[10:]):.1f}"])
    print(*rows, sep="\n")
    write("time.csv", rows)


def main(args: Args) -> None:
    module, rows = load(), [["kind", "questions", "right", "commonest answer"]]
    policies = [module.load_policy(run) for run in args.runs]
    asked = held_out(policies[0])
    found = [answers(policy, asked) for policy in policies]
    sheet(asked, found[0])
    every = [x for of in found for x in of]
    for kind in (*dict.fromkeys(x["kind"] for x in every), "all"):
        of = [x for x in every if kind in (x["kind"], "all")]
        shares = [np.mean([x["said"] == x["right"] for x in of])]
        shares += [np.mean([x["majority"] for x in of])]
        rows.append([kind, len(of) // len(policies), *(f"{x:.3f}" for x in shares)])
    print(*rows, sep="\n")
    write("answers.csv", rows)
    milliseconds(policies[0])
    if not args.no_simulator:
        scene(policies, args.episodes)


if __name__ == "__main__":
    main(tyro.cli(Args))
