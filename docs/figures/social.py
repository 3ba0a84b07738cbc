"""Draws docs/assets/social.png, shown where a page is shared, and docs/assets/favicon.png.

    pip install matplotlib
    python docs/figures/social.py

Two modes of the data, the density that squared error sees between them, and one that has both.
"""

from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np

matplotlib.use("Agg")
ASSETS = Path(__file__).resolve().parents[1] / "assets"
INK, GREY, ACCENT = "#1a237e", "#9e9e9e", "#3f51b5"


def density(x: np.ndarray, *modes: tuple[float, float, float]) -> np.ndarray:
    return sum(
        share * np.exp(-0.5 * ((x - mean) / deviation) ** 2) / deviation
        for share, mean, deviation in modes
    )


def main() -> None:
    x = np.linspace(-3, 3, 600)
    both = density(x, (0.65, -1.1, 0.35), (0.35, 1.2, 0.35))

    figure = plt.figure(figsize=(12, 6.3), dpi=100, facecolor="white")
    axes = figure.add_axes([0, 0.04, 1, 0.46])
    axes.fill_between(x, both, color=ACCENT, alpha=0.18)
    axes.plot(x, both, color=ACCENT, lw=5)
    axes.plot(x, density(x, (1, -0.3, 1.15)), color=GREY, lw=3, ls="--")
    axes.set(xlim=(-3, 3), ylim=(-0.02, 2.0))
    axes.axis("off")
    figure.text(0.06, 0.8, "CleanDGM", fontsize=76, weight="bold", color=INK, va="center")
    figure.text(
        0.062,
        0.62,
        "Deep generative models for offline policy learning,\none readable file per algorithm",
        fontsize=27,
        color="#424242",
        va="center",
        linespacing=1.4,
    )
    figure.savefig(ASSETS / "social.png")

    icon = plt.figure(figsize=(0.64, 0.64), dpi=100)
    icon.patch.set_alpha(0)
    axes = icon.add_axes([0.02, 0.1, 0.96, 0.8])
    axes.fill_between(x, both, color=ACCENT)
    axes.set(xlim=(-2.4, 2.4), ylim=(0, 1.95))
    axes.axis("off")
    icon.savefig(ASSETS / "favicon.png", transparent=True)


if __name__ == "__main__":
    main()
