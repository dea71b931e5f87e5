# SPDX-License-Identifier: MIT
"""Pictures of runs: curves, AP over IoU thresholds, what a network attends to, predictions side by side.

    python -m tools.figures curves runs/setsim runs/resim --out curves.png          losses and health, a panel each
    python -m tools.figures ap runs/det_moco runs/det_resim --names MoCo-v2 ReSim   PAPER: ReSim Figure 4
    python -m tools.figures matches runs/setsim/checkpoint.pth photos               PAPER: SetSim Figure 3
    python -m tools.figures matches runs/resim/checkpoint.pth photos                PAPER: ReSim Figures 2 and 3
    python -m tools.figures predictions runs/det_moco runs/det_setsim               PAPER: SetSim Figures 4 to 9

A RUN is the --output-dir of a script. Networks are in evaluation mode: what is drawn of an image does not depend on the
other images.
"""

import argparse
import os
from pathlib import Path

import numpy as np
import torch

import common
import harness.run
import resim
import setsim
from common import UserError, number
from harness import images, look, pictures, weights

SIDE = 500  # pixels, the widest picture of predictions
NOT_DRAWN = "step epoch images_per_s data_share bad_images count".split()


def get_args(argv=None):
    parser = argparse.ArgumentParser(prog="python -m tools.figures", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    # fmt: off
    for name, draw in DRAWN.items():
        flag = commands.add_parser(name, help=draw.__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter).add_argument
        if name == "matches":
            flag("checkpoint", metavar="CHECKPOINT", help="any file with a ResNet in it, 'imagenet' or 'random'")
            flag("images", metavar="IMAGES", help="folder of images, searched recursively")
            flag("--arch", default="resnet50", choices=common.ARCHS, help="the ResNet in CHECKPOINT, if it does not say so itself")
            flag("--size", type=number(int, 32), help="side of a crop in pixels; default: CHECKPOINT's own, else 224")
            flag("--seed", default=0, type=number(int, 0), help="of the crops, and of random weights")
        else:
            flag("runs", nargs="+", metavar="RUN", help="output folder of a run")
            flag("--names", nargs="+", metavar="NAME", help="what the picture calls the runs; default: RUN")
        if name not in ("curves", "ap"):
            flag("--count", default=6, type=number(int, 1, look.SHOWN if name == "matches" else 40), help="images at most, evenly spread over all")
        flag("--out", default=f"{name}.png", metavar="FILE.png", help="the picture to write")
    # fmt: on
    args = parser.parse_args(argv)
    if "runs" in args:
        args.names = args.names or args.runs
        if len(args.names) != len(args.runs):
            parser.error(f"--names: {len(args.names)} names for {len(args.runs)} runs")
    return args


# ==== What runs have logged ===========================================================================================


def lines_with(run, name, key):
    """The JSON objects in a run's log that have `key`. Errors: UserError, none of them, no such file."""
    path = os.path.join(run, name)
    lines = [line for line in pictures.read_log(path) if isinstance(line, dict) and key in line]
    if not lines:
        trials = "with several trials, logs are in RUN/seed0, ... and results in RUN"
        raise UserError(f"{path}: no such file, or nothing logged yet: give the --output-dir of a run ({trials})")
    return lines


def panels(rows, columns, width, height):
    """A matplotlib figure with a grid of panels of so many inches each, and its axes (rows, columns)."""
    plt = pictures.pyplot()
    plt.style.use("tableau-colorblind10")  # C0, C1, ... are the colours of the runs
    size = (width * columns, height * rows + 0.8)
    return plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")


def yardstick(name, values):
    """The name among `values` of what a value is compared with (a random guess, evenly drawn directions), or None."""
    kind, _, part = name.partition("_")
    guess = ["loss_chance"] if part in ("image", "set") or not part and "loss_image" not in values else []
    names = {"loss": [f"chance_{part}", *guess], "std": [f"spread_{part}", "std_spread"], "hits": ["chance"]}
    return next((other for other in names.get(kind, ()) if other in values), None)


def draw_curves(args):
    """losses and health values, a panel each; dashed: of a random guess, or of evenly drawn directions"""
    runs = [{} for _ in args.runs]  # {name: [(step, number), ...]}, the measurement before and after training among it
    for run, values in zip(args.runs, runs, strict=True):
        for line in lines_with(run, "log.jsonl", "step"):
            for name, value in (line | line.get("probe", {})).items():
                if name not in NOT_DRAWN and isinstance(value, (int, float)):
                    values.setdefault(name, []).append((line["step"], value))
    beside = {yardstick(name, values) for values in runs for name in values}
    names = list(dict.fromkeys(name for values in runs for name in values if name not in beside))
    figure, axes = panels(-(-len(names) // 4), min(4, len(names)), 3.4, 2.5)
    for axis in axes.flat[len(names) :]:
        axis.remove()
    for axis, name in zip(axes.flat, names, strict=False):
        for place, (run, values) in enumerate(zip(args.names, runs, strict=True)):
            points, other = values.get(name, []), yardstick(name, values)
            style = {"marker": "." if len(points) < 20 else "", "label": run, "alpha": 0.8}
            axis.plot(*np.reshape(points, (-1, 2)).T, f"C{place}", **style)
            if points and other:
                axis.axhline(values[other][-1][1], color=f"C{place}", ls="--", lw=0.9)
        axis.set(title=name, xlabel="step")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return figure


def draw_ap(args):
    """AP over IoU thresholds of runs of transfer_det.py, and the gain over the first one

    A row for each kind (box, mask, ...) that all runs have. Bars: deviation (n - 1) over trials; of a gain the standard
    error of a difference of means. Errors: UserError, other protocols, whose numbers are not comparable; no common kind.
    """
    results = [lines_with(run, "results.jsonl", "protocol") for run in args.runs]
    protocols = {trial["protocol"] for trials in results for trial in trials}
    if len(protocols) > 1:
        raise UserError(f"the runs have different protocols, not comparable: {'; '.join(sorted(protocols))}")
    kinds = [kind for kind, value in results[0][0].items() if isinstance(value, dict) and "AP_by_IoU" in value]
    kinds = [kind for kind in kinds if all(kind in trial for trials in results for trial in trials)]
    if not kinds:
        raise UserError("the runs have no AP over IoU thresholds of one kind (transfer_det.py writes it)")
    figure, axes = panels(len(kinds), min(2, len(results)), 5, 3.4)
    for row, kind in zip(axes, kinds, strict=True):
        means, errors = [], []  # of each run, and the standard errors of its means
        for place, (name, trials) in enumerate(zip(args.names, results, strict=True)):
            thresholds, n = [int(percent) / 100 for percent in trials[0][kind]["AP_by_IoU"]], len(trials)
            values = np.array([[*trial[kind]["AP_by_IoU"].values()] for trial in trials])  # (trials, thresholds)
            deviation = values.std(0, ddof=1) if n > 1 else np.full(len(thresholds), np.nan)  # nan draws no bar
            means, errors = [*means, values.mean(0)], [*errors, deviation / n**0.5]
            style = {"fmt": f"C{place}.-", "capsize": 2, "label": f"{name}, mean of {n}"}
            row[0].errorbar(thresholds, means[-1], deviation, **style)
            for axis in row[1:]:
                error = np.hypot(errors[0], errors[-1]) if place else None
                axis.errorbar(thresholds, means[-1] - means[0], error, **style)
                axis.set(title=f"{kind}: gain over {args.names[0]}")
        row[0].set(title=f"{kind}: AP", ylabel="AP, percent")
        for axis in row:
            axis.set(xlabel=f"threshold of {'OKS' if kind == 'keypoints' else 'IoU'}")
    axes[0, 0].legend()
    figure.suptitle(*protocols, fontsize=10)
    return figure


# ==== Pictures of images ==============================================================================================


def spread(names, count):
    """`count` of the names, or all if there are fewer, evenly spread."""
    count = min(count, len(names))
    return [names[i * len(names) // count] for i in range(count)]


def read_images(args):
    """{name: PIL RGB} of --count images; unreadable ones are named and passed over. Errors: UserError, none is left."""
    found = {}
    for name in spread(images.list_images(args.images, "IMAGES"), args.count):
        try:
            found[name] = images.read_image(os.path.join(args.images, name))
        except OSError as error:
            print(f"unreadable, passed over: {name} ({error})", flush=True)
    if not found:
        raise UserError(f"IMAGES {args.images}: none of the images that were tried can be read")
    return found


def load(args):
    """CHECKPOINT as a method in evaluation mode: (setsim or resim, the method, its settings, the device).

    Of a run of setsim.py or resim.py it is that run's own. Any other backbone becomes a SetSim with the default settings.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    state = {} if args.checkpoint in ("imagenet", "random") else weights.load_checkpoint_file(args.checkpoint)
    state = state if isinstance(state, dict) and "script" in state else {"script": None, "settings": {}}
    script = {"setsim": setsim, "resim": resim}.get(state["script"])
    if script:
        queue = len(state["model"].get("image_queue.vectors", ()))
        settings = argparse.Namespace(**state["settings"] | {"amp": "none", "queue_size": queue})
        method = script.build(settings, device)
        method.load_state_dict(state["model"])
        print(f"a run of {state['script']}.py at step {state['step']}", flush=True)
    else:
        script, own = setsim, {"arch": args.arch, "size": 224} | state["settings"]
        flags = f"--data none --arch {own['arch']} --size {own['size']} --queue-size 1 --seed {args.seed}"
        settings = setsim.get_args(flags.split())
        method = setsim.build(settings, device, None if args.checkpoint == "random" else args.checkpoint)
    settings.size = args.size or settings.size
    return script, method.eval(), settings, device


@torch.no_grad()
def draw_matches(args):
    """two crops of each image as a run of setsim.py or resim.py sees them; any other backbone: with SetSim's matcher"""
    (script, method, settings, device), views = load(args), []
    for name, image in read_images(args).items():
        with common.drawing("figure", args.seed, name):
            views.append(script.two_views(image, settings.size))
    method.draw(args.out, *(torch.stack(x).to(device) for x in zip(*views, strict=True)))


def draw_predictions(args):
    """what --predict of transfer_det.py or transfer_seg.py drew for several runs, side by side"""
    folders = [os.path.join(run, "predictions") for run in args.runs]  # of a detector; of a segmenter pictures/ in it
    folders = [max(os.path.join(folder, "pictures"), folder, key=os.path.isdir) for folder in folders]
    found = [{str(path.relative_to(folder)) for path in Path(folder).rglob("*.png")} for folder in folders]
    names = sorted(set.intersection(*found))
    if not names:
        raise UserError("no pictures of the same images: first run the script of each RUN with --predict DIR")
    names = spread(names, args.count)
    columns = [[images.read_image(os.path.join(folder, name)) for name in names] for folder in folders]
    for image in sum(columns, []):
        image.thumbnail((SIDE, 3 * SIDE))
    pictures.save_columns(args.out, columns, args.names, gap=6)


FIGURES = draw_curves, draw_ap, draw_matches, draw_predictions
DRAWN = {draw.__name__.removeprefix("draw_"): draw for draw in FIGURES}


def main(argv=None):
    args = get_args(argv)
    figure = DRAWN[args.command](args)
    if figure is not None:
        pictures.save_figure(figure, args.out, dpi=150)
    print(f"picture: {args.out}", flush=True)


if __name__ == "__main__":
    harness.run.main(main)
