"""Learning curves: every algorithm learns what it is for, and beats what it claims to beat."""

import functools
import tempfile
from pathlib import Path

import pytest
from cases import CASES, run

pytestmark = pytest.mark.learning


@functools.cache
def scores(name: str) -> list[float]:
    """The curve of a case, run once, however many cases it is compared with."""
    with tempfile.TemporaryDirectory() as folder:
        return run(CASES[name], 0, Path(folder) / "run")


def end(name: str) -> float:
    return sum(scores(name)[-2:]) / 2


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.end])
def test_curve(name):
    case, curve = CASES[name], scores(name)
    assert curve[(len(curve) + 3) // 4 - 1] >= case.quarter, curve
    assert end(name) >= case.end, curve
    if case.above:
        assert end(name) >= end(case.above) + case.margin, (curve, scores(case.above))
