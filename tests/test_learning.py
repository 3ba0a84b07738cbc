"""Learning curves: every algorithm learns what it is for, and beats what it claims to beat."""

import contextlib
import hashlib
import os
import tempfile
from pathlib import Path

import pytest
import torch
from cases import CASES, judge, load, summary, train
from conftest import robot_scene

pytestmark = pytest.mark.learning


@pytest.fixture
def scores(tmp_path_factory):
    """scores(name): the curve of a case. What several cases judge is trained once, by whichever
    worker comes first."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def scores(name: str) -> list[float]:
        case = CASES[name]
        run = f"{case.file} {sorted(case.flags.items())} {case.dataset}"
        folder = base / f"curve-{hashlib.md5(run.encode()).hexdigest()}"
        if not folder.exists():
            torch.set_num_threads(1)
            mine = Path(tempfile.mkdtemp(dir=base)) / "run"
            train(case, 0, mine)
            with contextlib.suppress(OSError):  # the other one was as fast
                mine.rename(folder)
        return judge(case, load(case.file), folder)

    return scores


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.end > -100])
def test_curve(name, scores):
    case = CASES[name]
    if case.simulated:
        robot_scene()
    early, end = summary(case, scores(name))
    assert early >= case.early, scores(name)
    assert end >= case.end, scores(name)
    for other, margin in case.above.items():
        assert end >= summary(CASES[other], scores(other))[1] + margin, (other, scores(other))
