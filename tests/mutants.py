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

import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

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
            raise SystemExit(f"{self.file}, {self.what}: its lines stand {len(places)} times there.")
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


def noticed(name: str, mutant: Mutant) -> str:
    """The first test that fails on the mutant, or nothing."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "algorithms"
        shutil.copytree(ALGORITHMS, copy)
        (copy / f"{mutant.file}.py").write_text(mutant.text())
        env = os.environ | {"CLEANDGM_ALGORITHMS": str(copy), "OMP_NUM_THREADS": "1"}
        own = TESTS / f"test_{name}.py"
        chosen = [[own]] if own.exists() else []
        chosen.append([TESTS / shared for shared in SHARED] + ["-k", mutant.file])
        for tests in chosen:
            command = [sys.executable, "-m", "pytest", "-x", "-q", "-m", "not learning", *tests]
            done = subprocess.run(
                list(map(str, command)), cwd=TESTS.parent, env=env, capture_output=True, text=True
            )
            if done.returncode == 1:
                failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
                return failed[0] if failed else "a test"
            if done.returncode not in (0, 5):
                raise SystemExit(f"pytest did not run: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return ""


def main(args: Args) -> None:
    names = args.files or sorted(path.stem for path in (TESTS / "mutations").glob("*.txt"))
    jobs = [(name, mutant) for name in names for mutant in mutants(name)]
    with ThreadPoolExecutor(args.jobs) as pool:
        results = pool.map(lambda job: noticed(*job), jobs)
        alive = []
        for (name, mutant), test in zip(jobs, results):
            print(f"{'killed' if test else 'ALIVE '}  {name}: {mutant.what}", end="")
            print(f"  ({test})" if args.show and test else "", flush=True)
            alive += [] if test else [mutant]
    print(f"{len(jobs) - len(alive)} of {len(jobs)} mutants killed")
    sys.exit(1 if alive else 0)


if __name__ == "__main__":
    main(tyro.cli(Args))
