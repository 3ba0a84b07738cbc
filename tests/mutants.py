"""Breaks the algorithms on purpose, a line at a time, and sees whether the fast tests notice.

    python tests/mutants.py                 # every mutant of every file
    python tests/mutants.py a2po sac        # of some files
    python tests/mutants.py a2po --jobs 2 --show

The mutants of algorithms/<file>.py are in tests/mutations/<file>.txt, as a line that says what is
wrong, the line as it is and the line as it is broken:

    # the target is not masked at terminals
    - y = r + self.args.gamma * (1 - d) * q_next
    + y = r + self.args.gamma * q_next

Lines are compared without their indentation; several lines may stand behind each sign. A mutant is
killed when tests/test_<file>.py fails on a copy of the file that is broken so, or else the tests
that all files share. Those of the shared blocks are in mutations/shared.txt and break bc.py.
"""

import contextlib
import io
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

os.environ["OMP_NUM_THREADS"] = "1"

import gymnasium.wrappers.vector  # noqa: F401
import minari  # noqa: F401
import pytest
import torch.utils.tensorboard  # noqa: F401
import tyro

TESTS = Path(__file__).resolve().parent
ALGORITHMS = TESTS.parent / "algorithms"
SHARED = ["test_units.py", "test_runs.py", "test_datasets.py"]


@dataclass
class Args:
    """Runs the fast tests on broken copies of the algorithms; every copy must fail."""

    files: Annotated[list[str], tyro.conf.Positional] = field(default_factory=list)
    """files of algorithms/ without .py, or: shared; empty: all"""
    jobs: int = 2
    """mutants tried at once"""
    show: bool = False
    """print which test noticed"""


@dataclass
class Mutant:
    """One broken line."""

    file: str
    what: str
    old: list[str]
    new: list[str]

    def text(self) -> str:
        """The file's text, broken; the old lines must stand in it exactly once."""
        lines = (ALGORITHMS / f"{self.file}.py").read_text().split("\n")
        bare, n = [line.strip() for line in lines], len(self.old)
        places = [i for i in range(len(lines)) if bare[i : i + n] == self.old]
        if len(places) != 1:
            raise SystemExit(
                f"{self.file}, {self.what}: its lines stand {len(places)} times there."
            )
        i = places[0]
        indents = [line[: len(line) - len(line.lstrip())] for line in lines[i : i + n]]
        new = [(indents[min(k, n - 1)] + line) for k, line in enumerate(self.new)]
        return "\n".join(lines[:i] + new + lines[i + n :])


def mutants(name: str) -> list[Mutant]:
    """Those of mutations/<name>.txt."""
    text = (TESTS / "mutations" / f"{name}.txt").read_text()
    found = []
    for part in re.split(r"^# ", text, flags=re.MULTILINE)[1:]:
        what, *rest = part.rstrip("\n").split("\n")
        old = [line[1:].strip() for line in rest if line.startswith("-")]
        new = [line[1:].strip() for line in rest if line.startswith("+")]
        found.append(Mutant("bc" if name == "shared" else name, what, old, new))
    return found


def noticed(job: tuple[str, Mutant]) -> str:
    """The first test that fails on the mutant, or nothing."""
    name, mutant = job
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("SIGTERM"))  # a mutant may not hear it
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "algorithms"
        shutil.copytree(ALGORITHMS, copy)
        (copy / f"{mutant.file}.py").write_text(mutant.text())
        os.environ["CLEANDGM_ALGORITHMS"] = str(copy)
        own = TESTS / f"test_{name}.py"
        names = [path.stem for path in ALGORITHMS.glob("*.py")]
        others = " and ".join(f"not {x}" for x in names if x not in mutant.file)
        shared = [*(TESTS / file for file in SHARED), "-k", others]
        for tests in ([own], shared) if own.exists() else (shared,):
            said = io.StringIO()
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                flags = ["-x", "-q", "-m", "not learning", "-p", "no:cacheprovider"]
                code = pytest.main([*flags, *map(str, tests)])
            if code == pytest.ExitCode.TESTS_FAILED:
                failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", said.getvalue(), re.MULTILINE)
                return failed[0] if failed else "a test"
            if code not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
                return f"pytest did not run: {said.getvalue()[-2000:]}"
            for module in [key for key in sys.modules if key.startswith(("test_", "algorithm_"))]:
                del sys.modules[module]
    return ""


def main(args: Args) -> None:
    os.chdir(TESTS.parent)
    names = args.files or sorted(path.stem for path in (TESTS / "mutations").glob("*.txt"))
    jobs = [(name, mutant) for name in names for mutant in mutants(name)]
    # A process of its own for each, which begins with the packages imported.
    with multiprocessing.get_context("fork").Pool(args.jobs, maxtasksperchild=1) as pool:
        alive = []
        for (name, mutant), test in zip(jobs, pool.imap(noticed, jobs)):
            if test.startswith("pytest did not run"):
                sys.exit(f"{name}, {mutant.what}: {test}")
            print(f"{'killed' if test else 'ALIVE '}  {name}: {mutant.what}", end="")
            print(f"  ({test})" if args.show and test else "", flush=True)
            alive += [] if test else [mutant]
    print(f"{len(jobs) - len(alive)} of {len(jobs)} mutants killed")
    sys.exit(1 if alive else 0)


if __name__ == "__main__":
    main(tyro.cli(Args))
