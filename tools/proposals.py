# SPDX-License-Identifier: MIT
"""Selective-search boxes of every image of a data set, in one file: the regions that D3SSL is trained on.

    python -m tools.proposals --data /coco/train2017 --out coco.proposals               all cores
    python -m tools.proposals --data photos --out photos.proposals --show 24            and photos.proposals.png
    python -m tools.proposals --data scenes:4096 --out scenes.proposals                 the built-in scenes

harness/proposals.py searches, keeps and reads the boxes, and says how. A killed run continues from FILE.partial and ends
with the same bytes as one never interrupted.
"""

import argparse
import math
import os

import numpy as np
from PIL import Image, ImageDraw

import harness.images
import harness.legacy
import harness.run
from harness.proposals import RULES, STRATEGIES, UNREADABLE, make


def get_args(argv=None):
    # fmt: off
    parser = argparse.ArgumentParser(prog="python -m tools.proposals", description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flag = parser.add_argument
    flag("--data", required=True, metavar="DIR", help="folder of images, searched recursively (its train/ if there is one), or 'scenes[:COUNT]'")
    flag("--out", required=True, metavar="FILE", help="the file to make; FILE.partial beside it is what a killed run goes on from")
    flag("--strategy", default="single", choices=STRATEGIES, help="one segmentation with SoCo's settings, or OpenCV's fast selective search: more boxes, several times slower")
    flag("--size", type=int, default=136, help="scenes: side in pixels")
    flag("--seed", type=int, default=0, help="scenes: which ones")
    flag("--workers", type=int, default=harness.legacy.usable_cores(), help="processes that search; 0: this one")
    flag("--show", type=int, default=0, metavar="N", help="draw N images with some of their boxes: FILE.png")
    # fmt: on
    args = parser.parse_args(argv)
    harness.legacy.check_range(args, size=(16, None), seed=(0, None), workers=(0, None), show=(0, None))
    return args


def summary(proposals):
    """One line: how many boxes, and how many images with a fall-back or without any."""
    counts, rules = np.diff(proposals.offsets), np.bincount(proposals.rules, minlength=len(RULES))
    others = "".join(f"; {n} images: {rule}" for n, rule in zip(rules[1:], RULES[1:], strict=True) if n)
    return (
        f"{proposals.path}: {proposals.fingerprint}; {proposals.strategy}; {os.path.getsize(proposals.path) / 1e6:.1f} MB; "
        f"{counts.mean():.1f} boxes an image, {counts.min()} to {counts.max()}{others}"
    )


def contact_sheet(images, proposals, count, shown=12):
    """Draw images spread evenly over the list, with boxes spread evenly over their areas, large ones in dark colours.

    Args:
        count: number of images, at most all are drawn. shown: at most so many boxes on each.
    Returns:
        PIL.Image.Image, RGB
    """
    side, gap, line = 240, 6, 14
    count = min(count, len(proposals))
    columns = math.ceil(math.sqrt(count))
    rows = -(-count // columns)
    sheet = Image.new("RGB", (gap + columns * (side + gap), gap + rows * (side + line + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    for cell in range(count):
        index = cell * len(proposals) // count
        left, top = gap + cell % columns * (side + gap), gap + cell // columns * (side + line + gap)
        boxes, rule, (W, H) = proposals[index], proposals.rules[index], proposals.sizes[index].tolist()
        why = f", {RULES[rule]}" if rule else ""
        draw.text((left, top + side), f"{index}: {W} x {H}, {len(boxes)} boxes{why}", "black")
        if rule == UNREADABLE:
            continue
        zoom = side / max(W, H)
        sheet.paste(images[index][0].resize([max(1, round(zoom * W)), max(1, round(zoom * H))]), (left, top))
        w, h = (boxes[:, 2:] - boxes[:, :2]).T
        boxes = boxes[np.argsort(-w * h, kind="stable")]
        for k in np.linspace(0, len(boxes) - 1, min(shown, len(boxes))).astype(int).tolist():
            x0, y0, x1, y1 = (boxes[k] * zoom + (left, top, left, top)).tolist()
            colour = f"hsl({280 - 230 * k // len(boxes)}, 100%, {40 + 15 * k // len(boxes)}%)"
            draw.rectangle((x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)), outline=colour, width=2)
    return sheet


def main(argv=None):
    args = get_args(argv)
    stop = harness.legacy.StopSignal()
    images = harness.images.open_images(args.data, args.size, args.seed)
    proposals = make(images, args.out, args.strategy, args.workers, lambda: stop.arrived)
    if proposals is None:
        print("stopped by a signal; the same command continues", flush=True)
        return
    print(summary(proposals), flush=True)
    if args.show:
        contact_sheet(images, proposals, args.show).save(f"{args.out}.png")
        print(f"contact sheet: {args.out}.png", flush=True)


if __name__ == "__main__":
    harness.run.main(main)
