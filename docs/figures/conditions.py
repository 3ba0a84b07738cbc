"""The film at the top of README.md: one trained A2PO policy, asked for three conditions.

    python datasets/make.py hopper-random-medium-expert
    python algorithms/a2po.py --dataset hopper-random-medium-expert --steps 20000
    MUJOCO_GL=osmesa python docs/figures/conditions.py

Writes docs/assets/conditions.gif. MuJoCo draws it without a screen: MUJOCO_GL=egl with a GPU,
MUJOCO_GL=osmesa without one (on Debian `apt install libosmesa6`).
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import mujoco
import numpy as np
import tyro
from matplotlib import get_data_path
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "algorithms"))
RATE = 125  # Hopper's steps per second


@dataclass
class Args:
    """Draws one policy at three conditions, side by side, in real time."""

    checkpoint: str = "runs/a2po/hopper-random-medium-expert/seed0"  # on Hopper
    xi: tuple[float, ...] = (-1.0, 0.0, 1.0)  # the conditions to ask for
    seed: int = 0  # of the start, the same for all
    seconds: float = 5.0  # of the film
    every: int = 6  # steps per picture
    width: int = 184  # pixels of one picture
    height: int = 200
    out: str = str(ROOT / "docs" / "assets" / "conditions.gif")


def pictures(policy, xi: float, args: Args) -> tuple[list[np.ndarray], list[float], int]:
    """The pictures, the return at each, and the step at which the robot fell (or one too many)."""
    env = gym.make("Hopper-v5", terminate_when_unhealthy=False)  # it is seen to fall
    s, _ = env.reset(seed=args.seed)
    model, data = env.unwrapped.model, env.unwrapped.data
    model.vis.quality.offsamples = 4
    renderer = mujoco.Renderer(model, args.height, args.width)
    # Shadows and reflections cost most of the time and most of the file.
    for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
        renderer.scene.flags[flag] = 0
    camera = mujoco.MjvCamera()
    camera.distance, camera.azimuth, camera.elevation = 3.6, 90, -8
    shown, returns, total, steps = [], [], 0.0, int(args.seconds * RATE)
    fell = steps
    for step in range(steps):
        if step % args.every == 0:
            camera.lookat[:] = data.qpos[0], 0, 0.75
            if step < fell + RATE:  # a second later nothing new is to be seen
                renderer.update_scene(data, camera)
                picture = renderer.render().copy()
            shown.append(picture)
            returns.append(total)
        s, reward, *_ = env.step(policy.act(s, xi=xi))
        fell = min(fell, step + 1) if not env.unwrapped.is_healthy else fell
        total += reward if fell == steps else 0
    env.close()
    return shown, returns, fell


def main(args: Args) -> None:
    import a2po

    policy = a2po.load_policy(args.checkpoint)
    font = ImageFont.truetype(Path(get_data_path(), "fonts/ttf/DejaVuSans.ttf"), 13)
    panels = []
    for xi in args.xi:
        shown, returns, fell = pictures(policy, xi, args)
        panel, stands = [], fell == int(args.seconds * RATE)
        print(f"xi {xi:g}: return {returns[-1]:.0f}, {'stands' if stands else f'fell at {fell}'}")
        for k, (picture, total) in enumerate(zip(shown, returns)):
            image, down = Image.fromarray(picture), k * args.every >= fell
            if k * args.every >= fell + RATE:
                image = Image.blend(image, Image.new("RGB", image.size, "white"), 0.4)
            draw = ImageDraw.Draw(image)
            draw.rectangle((0, 0, args.width, 42), fill="white")
            draw.text((8, 4), f"asked for ξ = {xi:g}", "black", font)
            words = f"return {total:.0f}" + f", fell after {fell / RATE:.1f} s" * down
            draw.text((8, 22), words, "firebrick" if down else "dimgray", font)
            panel.append(image)
        panels.append(panel)
    frames = []
    for row in zip(*panels):
        frame = Image.new("RGB", ((args.width + 4) * len(row) - 4, args.height), "white")
        for k, image in enumerate(row):
            frame.paste(image, (k * (args.width + 4), 0))
        frames.append(frame)
    # One palette for all pictures: what does not move costs nothing.
    palette = frames[len(frames) // 4].quantize(32, method=Image.Quantize.MEDIANCUT)
    frames = [x.quantize(palette=palette, dither=Image.Dither.NONE) for x in frames]
    duration = 1000 * args.every // RATE
    times = [duration] * (len(frames) - 1) + [1500]
    frames[0].save(
        args.out, save_all=True, append_images=frames[1:], duration=times, loop=0, optimize=True
    )
    print(f"{args.out}: {len(frames)} pictures, {Path(args.out).stat().st_size / 1000:.0f} KB")


if __name__ == "__main__":
    main(tyro.cli(Args))
