"""The blocks that files of algorithms/ share, letter for letter, and the tool that copies them.

`python tests/shared_blocks.py` names the copies that drifted from the original, most of them in
algorithms/bc.py; with `--write` it makes them equal again.
"""

import re
import sys
from pathlib import Path

ALGORITHMS = Path(__file__).resolve().parents[1] / "algorithms"

# name: (file with the original, pattern of the block, the files that have it, files without it...);
# ALL but those files, where the third says so
ALL = None
BLOCKS = {
    "run flags": (
        "bc.py",
        r"    # The run: the same flags in every file\.\n.*?capture_video.*?\n",
        ALL,
    ),
    "mlp": (
        "bc.py",
        r"def mlp\(.*?\n\n\n",
        ALL,
        "diffuser.py",
        "diffusion_ql.py",
        "gciql.py",
        "hiql.py",
    ),
    "scaling": ("bc.py", r"class Scaling\(.*?(?=\n\n\n)", ALL),
    "twin critic, one or both": (
        "td3_bc.py",
        r"class TwinCritic\(.*?(?=\n\n\n)",
        ("td3_bc.py", "cvae_bcq.py"),
    ),
    "twin critic": (
        "sac.py",
        r"class TwinCritic\(.*?(?=\n\n\n)",
        ("sac.py", "iql.py", "cql.py", "diffusion_ql.py", "gan_world_model.py", "gan_irl.py")
        + ("transformer_mbrl.py",),
    ),
    "IQL's policy": ("iql.py", r"class Policy\(.*?(?=\n\n\n)", ("iql.py", "gan_irl.py")),
    "demonstrations": (
        "gan_irl.py",
        r"def demonstrations\(.*?(?=\n\n\n)",
        ("gan_irl.py", "dwbc.py"),
    ),
    "SAC's policy": (
        "sac.py",
        r"class Policy\(.*?(?=\n\n\n)",
        ("sac.py", "gan_world_model.py", "transformer_mbrl.py"),
    ),
    "SAC's losses": (
        "sac.py",
        r"    def critic_loss\(.*?(?=\n\n    def validate)",
        ("sac.py", "gan_world_model.py", "transformer_mbrl.py"),
    ),
    "data set": (
        "bc.py",
        r"# From here on every file is the same.*?(?=\n# -+ Evaluation\n)",
        ALL,
    ),
    "environment": ("bc.py", r"def make_env\(.*?(?=\n\n\ndef evaluate)", ALL),
    # A policy with a memory is evaluated in its own way, and one with goals.
    "evaluation": (
        "bc.py",
        r"def evaluate\(.*?(?=\n\n\ndef )",
        ALL,
        "decision_transformer.py",
        "diffuser.py",
        "trajectory_transformer.py",
        "gciql.py",
        "hiql.py",
        "pi0.py",
        "rt1.py",
        "rt2.py",
    ),
    "evaluation with goals": (
        "gciql.py",
        r"def evaluate\(.*?(?=\n\n\ndef )",
        ("gciql.py", "hiql.py"),
    ),
    # What the two with goals have in common.
    "OGBench's network": ("gciql.py", r"def network\(.*?(?=\n\n\n)", ("gciql.py", "hiql.py")),
    "hindsight": (
        "gciql.py",
        r"    # Hindsight: which.*?(?=    def batch\()",
        ("gciql.py", "hiql.py"),
    ),
    "evaluation of robots": (
        "pi0.py",
        r"def evaluate\(.*?(?=\n\n\ndef )",
        ("pi0.py", "rt1.py", "rt2.py"),
    ),
    # What robots have in common.
    "vocabulary": ("pi0.py", r"def vocabulary\(.*?(?=\n\n\n)", ("pi0.py", "rt1.py")),
    "words": ("pi0.py", r"    def words\(.*?(?=\n\n    def )", ("pi0.py", "rt2.py")),
    "look": ("pi0.py", r"    def look\(.*?(?=\n\n    @torch)", ("pi0.py", "rt1.py", "rt2.py")),
    "AdamW's schedule": (
        "pi0.py",
        r"        # The step size is a tensor: a graph.*?\.optimizer\.step\(\)\n",
        ("pi0.py", "rt1.py", "rt2.py"),
    ),
    "load policy": ("bc.py", r"def load_policy\(.*?(?=\n\n\n)", ALL),
    "training loop": ("bc.py", r"def train\(.*?(?=\n\n\ndef )", ALL),
    "training helpers": ("bc.py", r"def adam\(.*\Z", ALL),
}
LEROBOT = re.search(
    r"def read_lerobot\(.*?(?=def load_dataset)", (ALGORITHMS / "pi0.py").read_text(), re.DOTALL
)[0]
ROBOTS = [  # pictures and instructions; a LeRobot data set; environments that give them
    ('    dataset: str = "hopper-medium-replay"', '    dataset: str = "scene-language"'),
    (
        'KNOWN |= {"ref_min_score", "ref_max_score"}',
        'KNOWN |= {"ref_min_score", "ref_max_score", "images", "task_index", "instructions"}',
    ),
    (
        '    folder = next((p for p in (name, f"{name}/data")',
        '    if Path(name, "meta/info.json").exists():\n'
        "        return read_lerobot(Path(name))\n"
        '    folder = next((p for p in (name, f"{name}/data")',
    ),
    (
        ' | {"episodes": episodes[keep]}\n',
        ' | {"episodes": episodes[keep]}\n'
        '    if "images" in raw:  # bytes, and bytes they stay until a batch is drawn\n'
        '        ok = np.shape(raw["images"])[:1] == (n,)'
        ' and np.asarray(raw["images"]).dtype == np.uint8\n'
        '        check(ok and np.ndim(raw["images"]) == 4,'
        " f\"{of}: 'images' is not (N, H, W, 3) of bytes.\")\n"
        '        data["images"] = np.asarray(raw["images"])[keep]\n'
        '        task["image"] = list(data["images"].shape[1:])\n'
        '    if "task_index" in raw:  # which of the instructions a row carries out\n'
        '        task["instructions"] = [str(x).lower() for x in raw.get("instructions", [])]\n'
        '        rows, known = np.ravel(raw["task_index"]), np.arange(len(task["instructions"]))\n'
        "        ok = len(rows) == n and np.isin(rows, known)\n"
        "        check(ok, f\"{of}: 'task_index' is not (N,), numbers of its 'instructions'.\")\n"
        '        data["task_index"] = rows[keep].astype(np.int64)\n',
    ),
    ("def load_dataset(", f"{LEROBOT}def load_dataset("),
    (  # dictionaries stay what they are
        "        env = gym.wrappers.FlattenObservation(env)\n",
        "",
    ),
    (
        "        spaces, shapes = (env.observation_space, env.action_space), ",
        "        seen = env.observation_space\n"
        '        seen = getattr(seen, "spaces", {"state": seen}).get("state")\n'
        "        spaces, shapes = (seen, env.action_space), ",
    ),
]
# What a copy may say instead: SAC's data may come from acting, S2P's and robots' have pictures.
VARIANTS = {
    "pi0.py": ROBOTS,
    "rt2.py": ROBOTS,
    "rt1.py": [
        *ROBOTS,
        (  # what a sentence encoder makes of the instructions
            '        data["task_index"] = rows[keep].astype(np.int64)\n',
            '        data["task_index"] = rows[keep].astype(np.int64)\n'
            '        if "sentence_vectors" in raw:  # ways to say them, and their vectors\n'
            '            task["sentences"] = [str(x).lower() for x in raw["sentences"]]\n'
            '            task["sentence_vectors"] = np.float32(raw["sentence_vectors"])\n'
            '            ok = np.shape(task["sentence_vectors"]) == (len(task["sentences"]), 512)\n'
            "            check(ok, f\"{of}: 'sentence_vectors' is not (N, 512), a row for each of"
            " 'sentences'.\")\n",
        ),
    ],
    "sac.py": [
        (
            "    data, task = load_dataset(args.dataset, args.env_id)\n",
            "    data, task = load_dataset(args.dataset, args.env_id) if args.offline else"
            " empty_buffer(args)\n",
        )
    ],
    "s2p.py": [
        ('    dataset: str = "hopper-medium-replay"', '    dataset: str = "halfcheetah-pixels"'),
        (
            'KNOWN |= {"ref_min_score", "ref_max_score"}',
            'KNOWN |= {"ref_min_score", "ref_max_score", "images"}',
        ),
        (
            '    task = {"env": env_id or own, "env_id": "none", "sizes": [s.shape[1], ',
            '    size = 2 * raw["images"][0].size if "images" in raw else s.shape[1]'
            '  # what a policy sees\n    task = {"env": env_id or own, "env_id": "none",'
            ' "sizes": [size, ',
        ),
        (
            ' | {"episodes": episodes[keep]}\n',
            ' | {"episodes": episodes[keep]}\n'
            '    if "images" in raw:  # bytes, and bytes they stay until a batch is drawn\n'
            '        ok = np.shape(raw["images"])[:1] == (n,)'
            ' and np.asarray(raw["images"]).dtype == np.uint8\n'
            '        check(ok and np.ndim(raw["images"]) == 4,'
            " f\"{of}: 'images' is not (N, H, W, 3) of bytes.\")\n"
            '        data["images"] = np.asarray(raw["images"])[keep]\n',
        ),
    ],
}


def original(block: str, file: str) -> str:
    """The text of a block that a file should have."""
    origin, pattern, *_ = BLOCKS[block]
    text = re.search(pattern, (ALGORITHMS / origin).read_text(), re.DOTALL)[0]
    for found, instead in VARIANTS.get(file, []):
        text = text.replace(found, instead)
    return text


def drifted() -> dict[str, dict[str, str]]:
    """File name -> {block name: text it should have} for every copy that is not the original's."""
    found = {}
    for block, (_, pattern, files, *without) in BLOCKS.items():
        for path in sorted(ALGORITHMS.glob("*.py")):
            if path.name in without or (files and path.name not in files):
                continue
            copy = re.search(pattern, path.read_text(), re.DOTALL)
            if copy is None or copy[0] != original(block, path.name):
                found.setdefault(path.name, {})[block] = original(block, path.name)
    return found


if __name__ == "__main__":
    for name, blocks in drifted().items():
        for block, text in blocks.items():
            print(f"{name}: {block}")
            if "--write" in sys.argv:
                path = ALGORITHMS / name
                old = re.search(BLOCKS[block][1], path.read_text(), re.DOTALL)
                if old is None:
                    sys.exit(f"{name} has no {block}: put its first and last line in by hand.")
                path.write_text(path.read_text().replace(old[0], text))
