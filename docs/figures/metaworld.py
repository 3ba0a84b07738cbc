"""The picture of Meta-World's ten tasks in datasets/README.md, from their demonstrations.

    pip install --no-deps metaworld==3.1.1 scipy
    python datasets/make.py metaworld-mt10
    python docs/figures/metaworld.py

Writes docs/assets/metaworld.png: of each task one demonstration's first, middle and last picture.
"""

from pathlib import Path

import h5py
import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    with h5py.File(ROOT / "datasets" / "metaworld-mt10.hdf5") as file:
        ends = np.flatnonzero(file["terminals"][:])[:10]  # the tasks take turns
        starts = np.append(0, ends[:-1] + 1)
        rows = [
            np.concatenate([file["images"][i] for i in (start, (start + end) // 2, end)], axis=1)
            for start, end in zip(starts, ends)
        ]
    # Two tasks side by side, each picture twice as large.
    sheet = np.concatenate([np.concatenate(rows[i : i + 2], axis=1) for i in range(0, 10, 2)])
    sheet = Image.fromarray(sheet.repeat(2, axis=0).repeat(2, axis=1))
    sheet.save(ROOT / "docs" / "assets" / "metaworld.png", optimize=True)


if __name__ == "__main__":
    main()
