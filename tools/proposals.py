# SPDX-License-Identifier: MIT
"""Selective-search boxes of every image of a data set, in one folder: the regions that D3SSL is trained on.

    python -m tools.proposals --data /coco/train2017 --out coco.proposals        all cores
    python -m tools.proposals --data photos --out photos.proposals --show 24     and photos.proposals/sheet.png

harness/proposals.py finds, keeps and reads the boxes, and describes the folder. The same command continues a killed run.
"""

import argparse
import os
import signal

import numpy as np
from PIL import Image, ImageDraw
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import make_grid

from common import number
from harness import run
from harness.images import open_images
from harness.proposals import RULES, STRATEGIES, UNREADABLE, make


def get_args(argv=None):
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    # fmt: off
    parser = argparse.ArgumentParser(prog="python -m tools.proposals", description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flag = parser.add_argument
    flag("--data", required=True, metavar="DIR", help="folder of images, searched recursively (its train/ if there is one), or 'scenes[:COUNT]'")
    flag("--out", required=True, metavar="DIR", help="the folder to make; a killed run goes on from what it holds")
    flag("--strategy", default="single", choices=STRATEGIES, help="one segmentation with SoCo's settings, or OpenCV's fast selective search: more boxes, several times slower")
    flag("--size", type=number(int, 16), default=136, help="scenes: side in pixels")
    flag("--seed", type=number(int, 0), default=0, help="scenes: which ones")
    flag("--workers", type=number(int, 0), default=cores, help="processes that search; 0: this one")
    flag("--show", type=number(int, 0), default=0, metavar="N", help="draw N images with some of their boxes: sheet.png in the folder")
    # fmt: on
    return parser.parse_args(argv)


def summary(proposals):
    """One line: how many boxes, and how many images with a fall-back or without any."""
    counts, rules = np.diff(proposals.offsets), np.bincount(proposals.rules, minlength=len(RULES))
    others = "".join(f"; {n} images: {rule}" for n, rule in zip(rules[1:], RULES[1:], strict=True) if n)
    return f"{proposals.folder}: {counts.mean():.1f} boxes an image, {counts.min()} to {counts.max()}{others}"


def contact_sheet(images, proposals, count, side=240, shown=12):
    """A PIL image of `count` images, spread evenly over the list (all, if they are fewer), `side` pixels large, with at
    most `shown` boxes each, spread evenly over their areas, small ones on top."""
    cells = []
    for index in np.unique(np.linspace(0, len(proposals) - 1, count).astype(int)).tolist():
        boxes, rule, (W, H) = proposals[index], proposals.rules[index], proposals.sizes[index].tolist()
        cell, zoom = Image.new("RGB", (side, side + 14), "white"), side / max(W, H, 1)
        draw = ImageDraw.Draw(cell)
        draw.text((0, side), f"{index}: {W} x {H}, {len(boxes)} boxes" + (f", {RULES[rule]}" if rule else ""), "black")
        if rule != UNREADABLE:
            cell.paste(images[index][0].resize([max(1, round(zoom * W)), max(1, round(zoom * H))]))
        boxes = boxes[np.argsort(-np.prod(boxes[:, 2:] - boxes[:, :2], 1), kind="stable")]
        for k in np.linspace(0, len(boxes) - 1, min(shown, len(boxes))).astype(int).tolist():
            colour = f"hsl({280 - 230 * k // len(boxes)}, 100%, 50%)"
            draw.rectangle((boxes[k] * zoom).tolist(), outline=colour, width=2)
        cells.append(pil_to_tensor(cell))
    return to_pil_image(make_grid(cells, round(len(cells) ** 0.5), padding=6, pad_value=255))


def main(argv=None):
    args, signals = get_args(argv), []
    images = open_images(args.data, args.size, args.seed)
    for kind in (signal.SIGTERM, signal.SIGINT):
        signal.signal(kind, lambda *_: signals.append(1))
    proposals = make(images, args.out, args.strategy, args.workers, stop=lambda: signals)
    print(summary(proposals) if proposals else "stopped by a signal; the same command continues", flush=True)
    if proposals and args.show:
        contact_sheet(images, proposals, args.show).save(proposals.folder / "sheet.png")
        print(f"contact sheet: {proposals.folder / 'sheet.png'}", flush=True)


if __name__ == "__main__":
    run.main(main)
