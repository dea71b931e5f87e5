# SPDX-License-Identifier: MIT
"""What a run shows on the way: a bar or lines of progress, and curves.png from its log. Works without matplotlib."""

import contextlib
import io
import json
import os
import sys
import time

import numpy as np
from PIL import Image, ImageDraw

from common import UserError, print0
from harness.weights import write_atomically


def read_log(path):
    """The JSON objects of a log file, without a torn last line; [] if there is no file."""
    if not os.path.exists(path):
        return []
    lines = []
    with open(path) as file:
        for line in file:
            with contextlib.suppress(json.JSONDecodeError):
                lines.append(json.loads(line))
    return lines


def progress(items, total, done=0, what="images", size=lambda item: 1):
    """Yield the items; meanwhile one bar on a terminal (if tqdm is there), elsewhere a line every ten seconds.

    Args:
        total: what the sizes of all items add up to, those that were done before (`done`) included. what: the unit.
        size: of an item.
    """
    bar = contextlib.nullcontext()
    if sys.stderr.isatty():
        with contextlib.suppress(ImportError):
            from tqdm import tqdm

            bar = tqdm(initial=done, total=total, unit=f" {what}", dynamic_ncols=True)
    first, started, said = done, time.time(), time.time()
    with bar as shown:
        for item in items:
            yield item
            done += size(item)
            if shown is not None:
                shown.update(done - shown.n)
            elif time.time() - said >= 10:
                said = time.time()
                pace = max(done - first, 1e-9) / (said - started)
                left = int((total - done) / pace)
                eta = f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02}"
                print(f"{done}/{total} {what}, {pace:.1f} a second, eta {eta}", flush=True)


def pyplot():
    """matplotlib's pyplot, which draws to files alone. Errors: UserError, it is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("matplotlib is needed to draw: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save_figure(figure, path, dpi):
    """Write a matplotlib figure to a PNG file by `write_atomically`, and close it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    pyplot().close(figure)
    write_atomically(path, [buffer.getvalue()])


def save_columns(path, columns, titles=None, gap=10):
    """Write one picture of columns of PIL images, in rows, under titles. Does nothing without columns."""
    if not columns:
        return
    lefts = np.cumsum([gap, *(gap + max(image.width for image in column) for column in columns)]).tolist()
    tops = [16 if titles else gap, *(gap + max(image.height for image in row) for row in zip(*columns, strict=True))]
    tops = np.cumsum(tops).tolist()
    sheet = Image.new("RGB", (lefts[-1], tops[-1]), "white")
    for left, column, title in zip(lefts, columns, titles or [""] * len(columns), strict=False):
        ImageDraw.Draw(sheet).text((left, 2), title, fill="black")
        for top, image in zip(tops, column, strict=False):
            sheet.paste(image, (left, top))
    sheet.save(buffer := io.BytesIO(), "png")
    write_atomically(path, [buffer.getbuffer()])


PANELS = {  # title of a panel: first words of the names of its values
    "losses": ("loss", "chance"),
    "std of unit embeddings (collapse: 0)": ("std", "spread"),
    "shares of images or windows": ("empty", "valid", "stuck"),
    "counts": ("positives", "rows", "proposals", "foreground"),
    "accuracy": ("accuracy", "train", "top1", "top5"),
    "shift (pixels)": ("shift",),
    "learning rate": ("lr",),
}


def draw_curves(folder):
    """`curves.png` from `log.jsonl`, with a panel for each kind of value. Does nothing without matplotlib.

    Dashed lines are values to compare with: losses of a random guess, spreads of evenly drawn directions.
    """
    try:
        plt = pyplot()
    except UserError:
        print0("matplotlib is not installed: no curves.png")
        return
    lines = [line for line in read_log(os.path.join(folder, "log.jsonl")) if "step" in line]
    names = dict.fromkeys(name for line in lines for name in line)
    panels = {title: [name for name in names if name.split("_")[0] in words] for title, words in PANELS.items()}
    panels = {title: shown for title, shown in panels.items() if shown}
    if not panels:
        return
    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.4), layout="constrained", squeeze=False)
    for axis, (title, shown) in zip(axes[0], panels.items(), strict=True):
        for name in shown:
            points = [(line["step"], line[name]) for line in lines if name in line]
            style = "--" if "chance" in name or "spread" in name else "-" if len(points) > 20 else ".-"
            axis.plot(*zip(*points, strict=True), style, lw=1.2, label=name)
        axis.legend(fontsize=7)
        axis.set(title=title, xlabel="step")
    save_figure(figure, os.path.join(folder, "curves.png"), dpi=110)
