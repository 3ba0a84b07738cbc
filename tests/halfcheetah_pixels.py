"""Writes tests/halfcheetah_pixels.hdf5, the pictures of the learning-curve case of S2P: of every
hundred steps of `python datasets/make.py halfcheetah-pixels` ten in a row, at half the size, as an
episode of their own. Needs no renderer to be read.

    python tests/halfcheetah_pixels.py
"""

from pathlib import Path

import h5py
import numpy as np

TESTS = Path(__file__).resolve().parent
EVERY, LENGTH = 100, 10


def main() -> None:
    source = TESTS.parent / "datasets" / "halfcheetah-pixels.hdf5"
    with h5py.File(source) as file, h5py.File(TESTS / "halfcheetah_pixels.hdf5", "w") as small:
        starts = np.arange(0, len(file["rewards"]), EVERY)  # its episodes have 1000 steps each
        rows = (starts[:, None] + np.arange(LENGTH)).ravel()
        for key in ("observations", "actions", "rewards", "terminals", "timeouts", "images"):
            values = file[key][()][rows]
            if key == "timeouts":
                values[LENGTH - 1 :: LENGTH] = True
            if key == "images":  # the means of four pixels
                values = values.reshape(-1, 32, 2, 32, 2, 3).mean((2, 4)).round().astype(np.uint8)
            options = dict(chunks=(100, *values.shape[1:])) if key == "images" else {}
            small.create_dataset(key, data=values, compression="gzip", **options)
        small.attrs.update(
            {k: v for k, v in file.attrs.items() if k[:4] in ("env_", "ref_", "acti")}
        )


if __name__ == "__main__":
    main()
