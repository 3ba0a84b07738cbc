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
    "mlp": ("bc.py", r"def mlp\(.*?\n\n\n", ALL, "diffusion_ql.py", "gciql.py"),
    "scaling": ("bc.py", r"class Scaling\(.*?(?=\n\n\n)", ALL),
    "twin critic, one or both": (
        "td3_bc.py",
        r"class TwinCritic\(.*?(?=\n\n\n)",
        ("td3_bc.py", "cvae_bcq.py"),
    ),
    "twin critic": (
        "sac.py",
        r"class TwinCritic\(.*?(?=\n\n\n)",
        ("sac.py", "iql.py", "cql.py", "diffusion_ql.py", "gan_world_model.py", "gan_irl.py"),
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
        ("sac.py", "gan_world_model.py"),
    ),
    "SAC's losses": (
        "sac.py",
        r"    def critic_loss\(.*?(?=\n\n    def validate)",
        ("sac.py", "gan_world_model.py"),
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
        "trajectory_transformer.py",
        "gciql.py",
    ),
    "load policy": ("bc.py", r"def load_policy\(.*?(?=\n\n\n)", ALL),
    "training loop": ("bc.py", r"def train\(.*?(?=\n\n\ndef )", ALL),
    "training helpers": ("bc.py", r"def adam\(.*\Z", ALL),
}
# What a copy may say instead: SAC's data may come from acting, S2P's has pictures.
VARIANTS = {
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
            '            keys = [key for key in f"{COLUMNS} {ABOUT} truncations env_id".split()'
            " if key in found]\n",
            '            keys = f"{COLUMNS} {ABOUT} truncations env_id images"\n'
            "            keys = [key for key in keys.split() if key in found]\n",
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
