"""Learning curves: every algorithm learns what it is for, and beats what it claims to beat."""

import functools
import tempfile
from pathlib import Path

import pytest
import torch
from cases import CASES, run, summary
from conftest import robot_scene

pytestmark = pytest.mark.learning


@functools.cache
def scores(name: str) -> list[float]:
    """The curve of a case, run once, however many cases it is compared with."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        return run(CASES[name], 0, Path(folder) / "run")


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.end > -100])
def test_curve(name):
    case = CASES[name]
    if case.simulated:
        robot_scene()
    early, end = summary(case, scores(name))
    assert early >= case.early, scores(name)
    assert end >= case.end, scores(name)
    for other, margin in case.above.items():
        assert end >= summary(CASES[other], scores(other))[1] + margin, (other, scores(other))
