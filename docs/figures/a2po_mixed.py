"""Data of known origin, for docs/a2po_studied.md: A2PO, TD3+BC and IQL on mixtures of a random and
an expert policy's transitions of Pendulum, and what A2PO's condition knows of whose they are. Needs
matplotlib.

    python docs/figures/a2po_mixed.py

The data are mixed by datasets/make.py: 20,000 transitions each, one of 2,000. The 140 runs, nearly
all of 4,000 steps, take 5 to 25 seconds each on one CPU thread; runs that are there already are
kept. a2po_mixed.csv has what was measured of every run, a2po_mixed_points.csv the transitions of
the picture. --draw draws again from both without training.
"""

import csv
import functools
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path

import h5py
import matplotlib.pyplot as plt
import numpy as np
import torch
import tyro

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
FLAGS = dict(steps=4000, eval_every=1000, hidden_dim=64, batch_size=128, learning_rate=1e-3)
FLAGS |= dict(gamma=0.97, tau=0.01, eval_episodes=20, validation_fraction=0.0, device="cpu")
DEFAULT = dict(cvae_dim=64)
A2PO = DEFAULT | dict(xi_norm="running", xi_critic="min", layer_norm=False)  # the paper's ξ
VERSIONS = {  # name: file, flags
    "a2po": ("a2po", A2PO),
    "td3_bc": ("td3_bc", {}),
    "td3_bc long": ("td3_bc", dict(steps=12_000, eval_every=4000)),
    "iql": ("iql", {}),
    "a2po local": ("a2po", DEFAULT),
    "iql 0": ("iql", dict(beta=0.0)),
    "iql 0.3": ("iql", dict(beta=0.3)),
    "iql 1": ("iql", dict(beta=1.0)),
    "iql 10": ("iql", dict(beta=10.0)),
    "iql unbounded": ("iql", dict(max_weight=1e9)),
}
SHARES = ("0", "2", "5", "10", "30", "100")  # of the expert's transitions, in per cent
SCARCE, THIRDS = "10", "thirds"  # thirds: as many random as medium as expert transitions
FEW = "10-few"  # 10 % as well, but of 2,000 transitions: ten episodes
RUNS = [(version, share) for share in SHARES for version in ("a2po", "td3_bc", "iql")]
RUNS += [("td3_bc long", SCARCE), ("a2po local", SCARCE), ("a2po", THIRDS), ("a2po", FEW)]
RUNS += [(version, FEW) for version in VERSIONS if version.startswith("iql")]
LABELS = {"a2po": "A2PO", "td3_bc": "TD3+BC", "iql": "IQL: cloning weighted by the advantage"}
COLOURS = {"random": "0.6", "medium": "C0", "expert": "C3"}
POINTS = ("source", "angle", "speed", "action", "xi", "z0", "z1", "asked for 1", "for -1")
Rows = list[list]


@dataclass
class Args:
    """Trains on data of known origin and draws what became of it."""

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    runs: str = "runs/a2po_mixed"  # where the runs are, and go
    draw: bool = False  # only draw again


def load(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    sys.modules[path.stem] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_algorithm(name: str):
    return load(ROOT / "algorithms" / f"{name}.py")


def dataset(share: str) -> str:
    """The name of a data set, which is made if it is not there."""
    maker = load(ROOT / "datasets" / "make.py")
    name = {"0": "pendulum-random", "100": "pendulum-expert"}.get(share, f"pendulum-expert-{share}")
    options = dict(name=name, transitions=2_000 if share == FEW else 20_000)
    if maker.path_of(name).exists():
        return name
    if share in ("0", "100"):
        maker.main(maker.Args(names=[name]))
    elif share == THIRDS:
        third = 1 / 3
        mix = f"pendulum-random:{third},pendulum-medium:{third},pendulum-expert:{third}"
        maker.main(maker.Args(mix=mix, **options))
    else:
        expert = float(share.split("-")[0]) / 100
        mix = f"pendulum-random:{1 - expert},pendulum-expert:{expert}"
        maker.main(maker.Args(mix=mix, **options))
    return name


def finished(file: str, flags: dict, folder: Path) -> Path:
    """The folder of a run, which is made, or made whole, if it is not there."""
    done = folder / "eval.csv"
    if not done.exists() or f"\n{flags['steps']}," not in done.read_text():
        module, resume = load_algorithm(file), (folder / "checkpoint.pt").exists()
        module.train(module.Args(**flags, run_dir=str(folder), resume=resume))
    return folder


def train(version: str, share: str, seed: int, args: Args) -> Path:
    """The folder of one of the runs."""
    file, flags = VERSIONS[version]
    folder = Path(args.runs, version.replace(" ", "_"), share, f"seed{seed}")
    return finished(file, FLAGS | flags | dict(dataset=dataset(share), seed=seed), folder)


# ------------------------------------------------------------------------------- What is measured


def sources_of(name: str) -> np.ndarray:
    """Whose each transition is."""
    with h5py.File(ROOT / "datasets" / f"{name}.hdf5") as file:
        names = [x.rsplit("-", 1)[1] for x in file.attrs["source_names"].split(",")]
        return np.array(names)[file["sources"][:]]


def auroc(positive: np.ndarray, negative: np.ndarray) -> float:
    """The chance that one of the first is above one of the second; a tie counts half."""
    negative = np.sort(negative)
    below, not_above = (np.searchsorted(negative, positive, side) for side in ("left", "right"))
    return float((below + not_above).mean() / 2 / len(negative))


def told(inputs: np.ndarray, truth: np.ndarray, episodes: np.ndarray, seed: int) -> float:
    """AUROC of a small network that was told the origin of every other episode's transitions, on
    the others."""
    torch.manual_seed(seed)
    x = torch.as_tensor((inputs - inputs.mean(0)) / inputs.std(0), dtype=torch.float32)
    y, learns = torch.as_tensor(truth, dtype=torch.float32), torch.as_tensor(episodes % 2 == 0)
    net = torch.nn.Sequential(
        torch.nn.Linear(x.shape[1], 64), torch.nn.ReLU(), torch.nn.Linear(64, 64), torch.nn.ReLU()
    )
    net.append(torch.nn.Linear(64, 1))
    optimizer, rows = torch.optim.Adam(net.parameters(), 1e-3), learns.nonzero()[:, 0]
    for _ in range(1500):
        i = rows[torch.randint(len(rows), (256,))]
        loss = torch.nn.functional.binary_cross_entropy_with_logits(net(x[i])[:, 0], y[i])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        score = net(x)[:, 0].numpy()
    rest = ~learns.numpy()
    return auroc(score[rest & truth], score[rest & ~truth])


def restored(folder: Path, file: str, name: str):
    """The learner of a run with its data, and the data as arrays."""
    module = load_algorithm(file)
    saved = module.load_policy(folder).saved
    arrays, task = module.load_dataset(name)
    data = {key: torch.as_tensor(array) for key, array in arrays.items()}
    learner = module.Learner(data, task, module.Args(**saved["args"]))
    learner.load_state_dict(saved["learner"])
    return learner, arrays


@torch.no_grad()
def judged(learner, arrays) -> dict[str, np.ndarray]:
    """A2PO's Q, advantage and ξ of logged actions, and the encoder's mean of z."""
    s = learner.policy.scaling.state(arrays["observations"])
    a, zero = torch.as_tensor(arrays["actions"]), torch.zeros(len(s), 1)
    _, advantage, sigma = learner.critic_loss(s, a, zero, s, zero)
    xi = learner.condition(advantage, sigma)
    z = learner.policy.encoder(torch.cat([s, xi, a], dim=-1)).chunk(2, dim=-1)[0]
    acts = learner.policy(s, xi, learner.policy.actor)
    found = {"xi": xi, "advantage": advantage, "q": learner.critic(s, a).amin(0)}
    found = {key: value[:, 0].numpy() for key, value in found.items()}
    return found | {"z": z.numpy(), "error": (acts - a).square().mean(1).numpy()}


def swing(state, torque):
    """One step of Pendulum-v1: states (N, 2), angle and speed, and torques (N,)."""
    angle, speed = state.T
    reward = -(((angle + np.pi) % (2 * np.pi) - np.pi) ** 2 + 0.1 * speed**2 + 0.001 * torque**2)
    speed = np.clip(speed + 0.05 * (15 * np.sin(angle) + 3 * torque), -8, 8)
    return np.stack([angle + 0.05 * speed, speed], axis=1), reward


@functools.cache
def true_advantage(name: str, rows: tuple[int, ...]) -> np.ndarray:
    """How much more the expert returns after the logged action than after a random one, (N,)."""
    maker = load(ROOT / "datasets" / "make.py")
    policies = maker.load_policies("pendulum")
    expert = maker.policy_at(policies, policies["steps"]["expert"])
    arrays, _ = load_algorithm("a2po").load_dataset(name)
    cos, sin, speed = arrays["observations"][list(rows)].T
    others = np.linspace(-2, 2, 17)  # in place of all actions
    torque = np.vstack([2 * arrays["actions"][list(rows), 0], *(0 * cos + x for x in others)])
    state = np.stack([np.arctan2(sin, cos), speed], axis=1)
    state, torque = np.tile(state, (len(torque), 1)), torque.ravel()
    returns, discount = np.zeros(len(torque)), 1.0
    for _ in range(150):
        state, reward = swing(state, torque)
        returns, discount = returns + discount * reward, discount * FLAGS["gamma"]
        seen = np.stack([np.cos(state[:, 0]), np.sin(state[:, 0]), state[:, 1]], axis=1)
        torque = expert.act(seen.astype(np.float32))[:, 0]
    returns = returns.reshape(len(others) + 1, -1)
    return returns[0] - returns[1:].mean(0)


def rank_correlation(x: np.ndarray, y: np.ndarray) -> float:
    x, y = (np.argsort(np.argsort(values)) for values in (x, y))
    return float(np.corrcoef(x, y)[0, 1])


def origin_rows(learner, arrays, name: str, seed: int) -> Rows:
    """How well the origin is read off what A2PO knows: AUROC, in all states and in some. And how
    well the true advantage is: rank correlation, over 1,500 transitions of each origin."""
    found, sources = judged(learner, arrays), sources_of(name)
    s, a, episodes = arrays["observations"], arrays["actions"], arrays["episodes"]
    upright, names = (s[:, 0] > 0.9) & (np.abs(s[:, 2]) < 1), list(dict.fromkeys(COLOURS))
    names = [x for x in names if x in sources]
    rows = []
    for i, worse in enumerate(names):
        for better in names[i + 1 :]:
            pair = f"{better} against {worse}"
            for where, here in (("all", upright | True), ("upright", upright), ("else", ~upright)):
                above, below = (here & (sources == x) for x in (better, worse))
                for key in ("xi", "advantage", "q"):
                    value = auroc(found[key][above], found[key][below])
                    rows.append([f"auroc {key}, {pair}, {where}", value])
            either = np.isin(sources, (worse, better))
            inputs, truth = np.hstack([s, a])[either], (sources == better)[either]
            rows.append([f"auroc told, {pair}, all", told(inputs, truth, episodes[either], seed)])
            inputs = found["z"][either]  # the same network, told the origin, sees z alone
            rows.append([f"auroc z, {pair}, all", told(inputs, truth, episodes[either], seed)])
    rng = np.random.default_rng(0)
    for x in names:
        some = rng.choice(np.flatnonzero(sources == x), 1500, replace=False)
        true = true_advantage(name, tuple(some.tolist()))
        for key in ("xi", "advantage", "q"):
            rows.append([f"rank {key}, {x}", rank_correlation(found[key][some], true)])
        rows.append([f"mean xi, {x}", found["xi"][sources == x].mean()])
    return rows


def unseen_by(mixture) -> dict[str, np.ndarray]:
    """The transitions of the large mixture whose episodes the small one has not."""
    other, _ = load_algorithm("a2po").load_dataset(dataset(SCARCE))
    seen = {row.tobytes() for row in mixture["observations"]}
    new = np.array([row.tobytes() not in seen for row in other["observations"]])
    return {key: array[new] for key, array in other.items()}


@torch.no_grad()
def weights(learner, arrays) -> tuple[np.ndarray, np.ndarray]:
    """IQL's weights of logged actions, and the squared distance of its own from them."""
    s, a = learner.policy.scaling.state(arrays["observations"]), torch.as_tensor(arrays["actions"])
    u = learner.critic_target(s, a).amin(0) - learner.v(s)
    w = (learner.args.beta * u).exp().clamp(max=learner.args.max_weight)[:, 0]
    acts = learner.policy.act(arrays["observations"]) / learner.policy.scaling.bounds[1].numpy()
    return w.double().numpy(), np.square(acts - arrays["actions"]).mean(1)


def attention_rows(learner, arrays, file: str) -> Rows:
    """Of how many transitions a policy is made, and how far it is from those: in the episodes that
    it learnt from and in others. IQL's distance is weighted as its cloning is, A2PO's is that of
    the action at the transition's own ξ."""
    rows = []
    for where, of in (("seen", arrays), ("unseen", unseen_by(arrays))):
        if file == "iql":
            w, error = weights(learner, of)
            rows += [[f"effective rows, {where}", w.sum() ** 2 / (w**2).sum()]]
            rows += [[f"error, {where}", (w * error).sum() / w.sum()]]
        else:
            found = judged(learner, of)
            high = found["xi"] > 0.9
            rows += [[f"effective rows, {where}", len(high)], [f"xi > 0.9, {where}", high.sum()]]
            rows += [[f"error, {where}", found["error"].mean()]]
            rows += [[f"error of xi > 0.9, {where}", found["error"][high].mean()]]
    return rows


def points_of(learner, arrays, sources) -> Rows:
    """Transitions for the picture: of each origin 100 where it is upright, 250 elsewhere."""
    found, rng, rows = judged(learner, arrays), np.random.default_rng(0), []
    s, scaled = arrays["observations"], learner.data[0]
    upright, one = (s[:, 0] > 0.9) & (np.abs(s[:, 2]) < 1), torch.ones(len(s), 1)
    with torch.no_grad():
        acts = [learner.policy(scaled, xi, learner.policy.actor)[:, 0] for xi in (one, -one)]
    angle = np.arctan2(s[:, 1], s[:, 0])
    columns = angle, s[:, 2], arrays["actions"][:, 0], found["xi"], *found["z"].T, *acts
    for name in ("random", "expert"):
        for here, number in ((upright, 100), (~upright, 250)):
            chosen = rng.choice(np.flatnonzero(here & (sources == name)), number, replace=False)
            rows += [[name, *(f"{float(column[i]):.4g}" for column in columns)] for i in chosen]
    return rows


def rows_of(version: str, share: str, seed: int, args: Args) -> Rows:
    """Everything that is measured of a run."""
    file, folder = VERSIONS[version][0], train(version, share, seed, args)
    with open(folder / "eval.csv") as lines:
        evaluations = list(csv.DictReader(lines))
    rows = [[f"score at {row['step']}", float(row["score"])] for row in evaluations[1:]]
    name = dataset(share)
    if file == "a2po" and share in (SCARCE, THIRDS):
        learner, arrays = restored(folder, file, name)
        rows += origin_rows(learner, arrays, name, seed)
        high = judged(learner, arrays)["xi"] > 0.9
        rows += [["rows of xi > 0.9", high.sum()]]
        rows += [["the expert's share of them", (sources_of(name) == "expert")[high].mean()]]
        if (version, share, seed) == ("a2po", SCARCE, 0):
            with open(FOLDER / "a2po_mixed_points.csv", "w", newline="") as lines:
                points = points_of(learner, arrays, sources_of(name))
                csv.writer(lines).writerows([POINTS, *points])
    if share == FEW:
        rows += attention_rows(*restored(folder, file, name), file)
    return [[version, share, seed, what, f"{value:.5g}"] for what, value in rows]


# ------------------------------------------------------------------------------------- The figures


def cell(values: list[float], form: str = ".2f") -> str:
    """Mean (lowest to highest)."""
    return f"{np.mean(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def write(name: str, lines: list[list[str]]) -> None:
    """A table for the page, its first line the head."""
    lines = [f"| {' | '.join(line)} |" for line in lines]
    lines.insert(1, "|---|" + "--:|" * (lines[0].count("|") - 2))
    (FOLDER / f"a2po_studied_{name}.md").write_text("\n".join(lines) + "\n")


def tables(found: dict) -> None:
    def of(version, share, what, form=".2f"):
        return cell(found[version, share, what], form)

    # Whose a transition is.
    pair, keys = "expert against random", {"xi": "ξ, or $Q - V$", "q": "$Q$ alone"}
    lines = [["", "all states", "upright", "elsewhere"]]
    kinds = [("a2po", "xi", keys["xi"]), ("a2po", "q", keys["q"])]
    kinds += [
        ("a2po local", "xi", "ξ, by σ(s)"),
        ("a2po local", "advantage", "its $Q - V$"),
    ]
    for version, key, label in kinds:
        whats = [f"auroc {key}, {pair}, {where}" for where in ("all", "upright", "else")]
        lines.append([label, *(of(version, SCARCE, what) for what in whats)])
    for key, label in {"z": "latent, told", "told": "state and action, told"}.items():
        lines.append([label, of("a2po", SCARCE, f"auroc {key}, {pair}, all"), "-", "-"])
    write("origin", lines)

    # How good its action is.
    lines = [["", "random's actions", "expert's actions"]]
    for version, key, label in kinds:
        whats = [f"rank {key}, {source}" for source in ("random", "expert")]
        lines.append([label, *(of(version, SCARCE, what) for what in whats)])
    write("goodness", lines)

    pairs = ("medium against random", "expert against random", "expert against medium")
    lines = [["", *(x.replace("against", "or") for x in pairs)]]
    for key, label in (keys | {"told": "state and action, told"}).items():
        lines.append([label, *(of("a2po", THIRDS, f"auroc {key}, {x}, all") for x in pairs)])
    write("thirds", lines)

    lines = [["expert's share", *(label.split(":")[0] for label in LABELS.values())]]
    for share in SHARES:
        ends = [of(version, share, "score at 4000", ".0f") for version in LABELS]
        lines.append([f"{share} %", *ends])
    longer = of("td3_bc long", SCARCE, "score at 12000", ".0f")
    lines.append([f"{SCARCE} %, 12,000 steps", "-", longer, "-"])
    write("shares", lines)

    lines = [["", "score", "effective rows", "distance, seen", "unseen"]]
    kinds = {"iql 0": "IQL, β = 0", "iql 0.3": "β = 0.3", "iql 1": "β = 1", "iql": "β = 3, default"}
    kinds |= {"iql unbounded": "β = 3, weights unbounded", "iql 10": "β = 10", "a2po": "A2PO"}
    for version, label in kinds.items():
        whats = {"score at 4000": ".0f", "effective rows, seen": ",.0f"}
        whats |= {"error, seen": ".3f", "error, unseen": ".3f"}
        lines.append([label, *(of(version, FEW, what, form) for what, form in whats.items())])
    whats = ("xi > 0.9, seen", "error of xi > 0.9, seen", "error of xi > 0.9, unseen")
    forms = [of("a2po", FEW, what, form) for what, form in zip(whats, (",.0f", ".3f", ".3f"))]
    lines.append(["its rows of ξ > 0.9", "-", *forms])
    write("rows", lines)


def draw_points() -> None:
    """The same transitions four times: whose, their ξ, what the policy would do, their latents."""
    with open(FOLDER / "a2po_mixed_points.csv") as file:
        points = list(csv.DictReader(file))
    x = {key: np.array([float(row[key]) for row in points]) for key in POINTS[1:]}
    whose = np.array([row["source"] for row in points])
    below = np.abs(x["angle"]) > np.pi / 2
    figure, axes = plt.subplots(2, 2, figsize=(9, 6.6), layout="constrained")
    for name in ("random", "expert"):
        mine, options = whose == name, dict(s=10, color=COLOURS[name], label=name, alpha=0.7)
        axes[0, 0].scatter(x["angle"][mine], x["action"][mine], **options)
        axes[1, 1].scatter(x["z0"][mine], x["z1"][mine], **options)
        mine &= below
        axes[0, 1].scatter((x["action"] * np.sign(x["speed"]))[mine], x["xi"][mine], **options)
    for key, label, colour in (("for -1", "ξ = -1", "k"), ("asked for 1", "ξ = 1", "C1")):
        along = (x[key] * np.sign(x["speed"]))[below]
        bins = np.linspace(-1, 1, 21)
        axes[1, 0].hist(along, bins, color=colour, alpha=0.6, label=f"asked for {label}")
    axes[0, 0].set(title="logged actions, by whose they are", ylabel="action")
    axes[0, 0].set(xticks=[-np.pi, 0, np.pi], xticklabels=["-π", "0", "π"])
    axes[0, 0].set(xlabel="angle, 0: upright")
    axes[0, 1].set(title="hanging: ξ and the push", ylabel="ξ", ylim=(-1.05, 1.05))
    axes[0, 1].set(xlabel="action in the direction of motion")
    axes[1, 0].set(title="hanging: the policy's push", ylabel="states")
    axes[1, 0].set(xlabel="action in the direction of motion")
    axes[1, 1].set(title="latents of the logged actions", xlabel="$z_0$", ylabel="$z_1$")
    for axis in axes.flat:
        axis.legend(fontsize=8, framealpha=0.95)
    figure.savefig(FOLDER / "a2po_studied_origin.png", dpi=110)


def draw_shares(found: dict) -> None:
    figure, axis = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    for (version, label), colour in zip(LABELS.items(), ("C3", "0.3", "C0")):
        values = np.array([found[version, share, "score at 4000"] for share in SHARES])
        axis.plot(range(len(SHARES)), values.mean(1), color=colour, label=label, lw=1.8)
        for one in values.T:
            axis.plot(range(len(SHARES)), one, "o", ms=3.5, alpha=0.5, color=colour)
    axis.set_xticks(range(len(SHARES)), [f"{share} %" for share in SHARES])
    axis.set(xlabel="share of the expert's transitions", ylabel="score")
    axis.grid(alpha=0.3)
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(FOLDER / "a2po_studied_shares.png", dpi=110)


def main(args: Args) -> None:
    torch.set_num_threads(1)
    path = FOLDER / "a2po_mixed.csv"
    if not args.draw:
        rows = [row for seed in args.seeds for run in RUNS for row in rows_of(*run, seed, args)]
        with open(path, "w", newline="") as file:
            csv.writer(file).writerows([["version", "share", "seed", "what", "value"], *rows])
    found = {}
    with open(path) as file:
        for row in csv.DictReader(file):
            key = row["version"], row["share"], row["what"]
            found.setdefault(key, []).append(float(row["value"]))
    tables(found)
    draw_points()
    draw_shares(found)


if __name__ == "__main__":
    main(tyro.cli(Args))
