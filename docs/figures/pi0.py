"""What the demonstrations of scene-language look like, what a trained pi0 does with instructions,
and where the mean of two demonstrations fails. Needs matplotlib and requirements-goals.txt.

    python algorithms/pi0.py --eval-episodes 48
    python docs/figures/pi0.py runs/pi0/scene-language/seed0

The pictures and tables of pi0's page are written to docs/algorithms/pi0: demonstrations.png,
films.gif, instructions.csv, late.csv, late.md, detour.png, detour.csv. The detour is trained here,
three minutes on a CPU; --films-only leaves it and the late chunks out, --late-only all but these.
"""

import csv
import importlib.util
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import h5py
import matplotlib.pyplot as plt
import numpy as np
import torch
import tyro
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "docs" / "algorithms" / "pi0"
EPISODES = 120  # of every table here
HEADS = {"flow": "flow matching", "mse": "squared error", "tokens": "bins"}


@dataclass
class Args:
    """Draws pi0's page."""

    run: Annotated[str, tyro.conf.Positional]  # folder of a run on scene-language
    films_only: bool = False  # no training on the detour, no late chunks
    late_only: bool = False  # only the chunks that come late


def load():
    spec = importlib.util.spec_from_file_location("pi0", ROOT / "algorithms" / "pi0.py")
    sys.modules["pi0"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write(name: str, rows: list[list]) -> None:
    with open(OUT / name, "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def demonstrations() -> None:
    """Eight moments of one demonstration of each instruction."""
    with h5py.File(ROOT / "datasets" / "scene-language.hdf5") as file:
        texts, index = list(file.attrs["instructions"]), file["task_index"][()]
        ends = np.flatnonzero(file["terminals"][()])
        starts = np.append(0, ends[:-1] + 1)
        figure, axes = plt.subplots(6, 1, figsize=(8, 6.9), layout="constrained")
        for task, (axis, text) in enumerate(zip(axes, texts)):
            k = np.flatnonzero(index[ends] == task)[0]
            moments = np.linspace(starts[k], ends[k], 8).astype(int)
            axis.imshow(np.concatenate([file["images"][i] for i in moments], axis=1))
            axis.set_title(text, fontsize=9, loc="left")
            axis.axis("off")
    figure.savefig(OUT / "demonstrations.png", dpi=110)


def obey(policy, env, seed: int, instruction: str = "", film: list | None = None) -> dict:
    """One episode: what came of it, and how long the plans took."""
    options = {"instruction": instruction} if instruction else None
    observation, info = env.reset(seed=seed, options=options)
    done, seconds, plans = False, 0.0, 0
    while not done:
        began = time.time()
        plan = policy.plan(observation)[0]
        seconds, plans = seconds + time.time() - began, plans + 1
        for action in plan:
            if film is not None:
                film.append(env.render())
            observation, _, terminated, truncated, info = env.step(action)
            done = terminated or truncated
            if done:
                break
    if film is not None:
        film.extend([env.render()] * 6)
    return {"success": info["success"], "other": info["other"], "ms": 1000 * seconds / plans}


def scene(policy) -> None:
    """Success by instruction, in the data's words and in others; films of the first ones."""
    import gymnasium as gym

    sys.path.append(str(ROOT / "datasets"))
    import scene

    rows, ms = [["instruction", "success", "another thing", "success, unseen words"]], []
    films = []
    for instruction in scene.INSTRUCTIONS:
        found = {}
        for words in ("SceneLanguage-v0", "SceneLanguageUnseen-v0"):
            env = gym.make(f"scene:{words}", render_mode="rgb_array")
            found[words] = [
                obey(policy, env, seed, instruction)
                for seed in range(EPISODES // len(scene.INSTRUCTIONS))
            ]
            ms += [x["ms"] for x in found[words]]
        seen, unseen = found.values()
        rows.append(
            [instruction]
            + [f"{np.mean([x[key] for x in seen]):.2f}" for key in ("success", "other")]
            + [f"{np.mean([x['success'] for x in unseen]):.2f}"]
        )
        film, env = [], gym.make("scene:SceneLanguage-v0", render_mode="rgb_array")
        obey(policy, env, 1000, instruction, film)
        films.append(film)
        print(*rows[-1], flush=True)
    means = np.mean([[float(x) for x in row[1:]] for row in rows[1:]], axis=0)
    rows.append(["all", *(f"{x:.2f}" for x in means)])
    rows.append(["milliseconds of a plan", f"{np.median(ms):.1f}", "", ""])
    write("instructions.csv", rows)
    length = max(map(len, films))
    films = [film + [film[-1]] * (length - len(film)) for film in films]
    frames = []
    for shown in zip(*films):
        small = [np.asarray(Image.fromarray(x).resize((192, 192), Image.NEAREST)) for x in shown]
        grid = np.concatenate([np.concatenate(small[i : i + 3], axis=1) for i in (0, 3)])
        frames.append(Image.fromarray(grid).quantize(64))
    frames[0].save(OUT / "films.gif", save_all=True, append_images=frames[1:], duration=100, loop=0)


def late(module, run: str) -> None:
    """Success with chunks that are ready some actions late, and how far the new chunk's first own
    action is from what the old one had meant for that moment: squared, per dimension."""
    rows = [["delay", "real-time chunking", "success", "steps", "seam"]]
    for delay, rtc in ((d, rtc) for d in (0, 1, 2) for rtc in (False, True)):
        policy, seams = module.load_policy(run, execute=3, delay=delay, rtc=rtc), []
        torch.manual_seed(0)

        def act(observations, memory=None, policy=policy, delay=delay, seams=seams):
            a, kept = policy.go_on(observations, memory)
            if memory:
                seams.append(np.square(a[:, delay] - memory[0][:, delay].numpy()).mean())
            return a, kept

        policy.actors = lambda act=act: {"": act}
        found = module.evaluate(policy, policy.saved["task"], EPISODES, seed=0)
        row = [delay, "yes" if rtc else "no", f"{found['return_mean']:.2f}"]
        rows.append([*row, f"{found['length_mean']:.1f}", f"{np.mean(seams):.3f}"])
        print(*rows[-1], flush=True)
    write("late.csv", rows)
    names = "delay $d$", "real-time chunking", "success", "steps", "seam"
    lines = [" | ".join(map(str, row)) for row in ([*names], ["--:"] * 5, *rows[1:])]
    (OUT / "late.md").write_text("".join(f"| {line} |\n" for line in lines))


def detour(module) -> None:
    """Trajectories of three heads around an obstacle that demonstrations pass on either side."""
    sys.path.insert(0, str(ROOT))
    from tests.detour import RADIUS, Detour

    rows = [["head", "actions carried out", "success"]]
    figure, axes = plt.subplots(
        2, 3, figsize=(9, 4.6), layout="constrained", sharex=True, sharey=True
    )
    for column, (head, name) in enumerate(HEADS.items()):
        flags = dict(dataset=str(ROOT / "tests" / "detour.npz"), head=head, chunk=8, execute=8)
        flags |= dict(layers=2, learning_rate=1e-3, steps=1500, decay_steps=1500, eval_every=0)
        flags |= dict(validation_fraction=0.0, device="cpu", save_every=0)
        with tempfile.TemporaryDirectory() as folder:
            module.train(module.Args(**flags, run_dir=f"{folder}/run"))
            for line, execute in enumerate((8, 1)):
                policy = module.load_policy(f"{folder}/run", execute=execute)
                torch.manual_seed(0)
                axis, reached, env = axes[line, column], [], Detour()
                for seed in range(EPISODES):
                    s, _ = env.reset(seed=seed)
                    path, done = [s], False
                    while not done and len(path) <= 40:
                        for action in policy.plan(s[None])[0]:
                            s, reward, done, _, _ = env.step(action)
                            path.append(s)
                            if done:
                                break
                    reached.append(done and reward)
                    if seed < 30:
                        axis.plot(*np.array(path).T, color="C0" if reached[-1] else "C3", lw=0.7)
                axis.add_patch(plt.Circle((0, 0), RADIUS, color="0.6"))
                axis.set(xlim=(-1.1, 1.2), ylim=(-0.9, 0.9), aspect="equal")
                axis.set_title(f"{name}, {execute} of 8 actions carried out", fontsize=9)
                rows.append([head, execute, f"{np.mean(reached):.2f}"])
                print(*rows[-1], flush=True)
    figure.savefig(OUT / "detour.png", dpi=120)
    write("detour.csv", rows)


def main(args: Args) -> None:
    torch.set_num_threads(1)
    OUT.mkdir(exist_ok=True)
    module = load()
    if not args.films_only:
        late(module, args.run)
    if args.late_only:
        return
    demonstrations()
    if not args.films_only:
        detour(module)
    torch.manual_seed(0)
    scene(module.load_policy(args.run))


if __name__ == "__main__":
    main(tyro.cli(Args))
