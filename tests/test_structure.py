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

import numpy as np
import pytest
import shared_blocks
import torch
import tyro
from conftest import FILES, ROOT, load, tiny

SECTIONS = ["Args", "Dataset", "Networks", "Algorithm", "Evaluation", "Training loop"]
ALLOWED = set("torch numpy gymnasium minari h5py tyro tensorboard tqdm".split())
ALLOWED |= sys.stdlib_module_names

every_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


def arguments(path) -> dict[str, str | None]:
    """Field of Args -> the docstring under it."""
    tree = ast.parse(path.read_text())
    body = next(x for x in tree.body if isinstance(x, ast.ClassDef) and x.name == "Args").body
    found = {}
    for node, below in zip(body, [*body[1:], None]):
        if isinstance(node, ast.AnnAssign):
            text = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
            found[node.target.id] = below.value.value if text else None
    return found


def commands(path) -> list[str]:
    doc = ast.get_docstring(ast.parse(path.read_text()), clean=False)
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


@every_file
def test_docstring_commands_are_valid(path):
    assert len(commands(path)) == 2
    for flags in commands(path):
        tyro.cli(load(path.stem).Args, args=shlex.split(flags))  # SystemExit if a flag is unknown


@every_file
def test_sections_in_order(path):
    dividers = re.findall(r"^(# -{5,} (.+))$", path.read_text(), re.MULTILINE)
    assert [name for _, name in dividers] == SECTIONS
    assert {len(line) for line, _ in dividers} == {95}
    assert path.read_text().endswith(
        '\n\n\nif __name__ == "__main__":\n    train(tyro.cli(Args))\n'
    )


@every_file
def test_shared_blocks_are_identical(path):
    drifted = sorted(shared_blocks.drifted().get(path.name, {}))
    assert not drifted, "python tests/shared_blocks.py --write makes them equal again"


@pytest.mark.parametrize("old, new", [("episodes: int, seed", "seed, episodes: int"), ("fuse", "")])
def test_drift_is_noticed(old, new, tmp_path, monkeypatch):
    shutil.copytree(ROOT / "algorithms", tmp_path / "algorithms")
    file = tmp_path / "algorithms" / "a2po.py"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))
    monkeypatch.setattr(shared_blocks, "ALGORITHMS", tmp_path / "algorithms")
    assert "a2po.py" in shared_blocks.drifted()


@every_file
def test_imports_only_what_every_user_has(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} <= ALLOWED
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module.split(".")[0] in ALLOWED


@every_file
def test_every_argument_is_explained_and_read(path):
    read = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            owner = node.value
            name = getattr(owner, "id", None) or getattr(owner, "attr", None)
            read |= {node.attr} if name == "args" else set()
    fields = arguments(path)
    assert len(fields) > 15
    assert [name for name, text in fields.items() if not text] == []
    assert [name for name in fields if name not in read] == []


@every_file
def test_import_has_no_side_effects(path, tmp_path, monkeypatch, capfd):
    def state():
        rng = torch.get_rng_state().tolist(), random.getstate()
        rng += (np.random.get_state()[1].tolist(),)  # noqa: NPY002 (nobody may touch it)
        torch_is = torch.get_float32_matmul_precision(), torch.get_default_dtype()
        return rng, torch_is, torch.get_num_threads(), os.environ.copy(), list(tmp_path.iterdir())

    monkeypatch.chdir(tmp_path)
    before = state()
    load(path.stem, fresh=True)
    assert state() == before
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
def test_runs_alone(path, pendulum_file, tmp_path):
    """A copy in an empty folder trains: nothing of this repository is needed."""
    shutil.copy(path, tmp_path)
    shutil.copy(pendulum_file, tmp_path)
    command = [sys.executable, path.name, "--dataset", pendulum_file.name]
    for key, value in tiny(path.stem).items():
        flag = f"--{key.replace('_', '-')}"
        command += [flag] if value is True else [flag, str(value)]
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / path.stem / "tiny-pendulum" / "seed0"
    assert {"config.json", "eval.csv", "checkpoint.pt"} <= {file.name for file in run.iterdir()}
    assert list(run.glob("events.out.tfevents.*"))
    assert "it/s" not in done.stderr and "step/s" not in done.stderr, "a progress bar in a pipe"
    left = {file.name for file in tmp_path.iterdir()} - {"__pycache__"}
    assert left == {path.name, pendulum_file.name, "runs"}


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
