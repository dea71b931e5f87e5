# SPDX-License-Identifier: MIT
"""Pictures that compare runs: curves, AP over IoU thresholds, what a network attends to, predictions side by side.

    python -m tools.figures curves runs/setsim runs/resim --out curves.png          losses and health, a panel each
    python -m tools.figures ap runs/det_moco runs/det_resim --names MoCo-v2 ReSim   PAPER: ReSim Figure 4
    python -m tools.figures matches runs/setsim/checkpoint.pth photos               PAPER: SetSim Figure 3
    python -m tools.figures attention runs/resim/resnet50.pth photos                whole images, any backbone
    python -m tools.figures predictions runs/det_moco runs/det_setsim               PAPER: SetSim Figures 4 to 9
    python -m tools.figures predictions runs/seg_moco runs/seg_setsim --images photos

A RUN is the --output-dir of a script. Of several trials, `ap` takes the means; `curves` and `predictions` want one of the
folders seed0, seed1, ... in it. `curves` draws what is logged over steps: final results are for `ap`. Networks are in
evaluation mode: what is drawn of an image does not depend on the others.
"""

import argparse
import io
import os
import tempfile

import numpy as np
import torch
from PIL import Image, ImageDraw
from torchvision.transforms import functional as TF

import common
import harness.images
import harness.legacy
import harness.pictures
import harness.run
import harness.weights
import setsim
from common import UserError
from harness import look
from probes.frozen import frozen_trunk

COLOURS = "#0072B2 #D55E00 #009E73 #CC79A7 #E69F00 #56B4E9 #000000".split()  # Okabe and Ito's, without the yellow
STYLES = ("-", "--", ":")  # where there are more runs than colours
NOT_DRAWN = "step epoch images_per_s data_share bad_images images cells objects".split()
SET = "0.7"  # PAPER: SetSim's delta, for backbones that come without one
LONG_SIDE = 400  # pixels of a picture in a column
MOST = 40  # images in a picture: more would make one that few programs open


def get_args(argv=None):
    # fmt: off
    parser = argparse.ArgumentParser(prog="python -m tools.figures", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name, text):
        flag = commands.add_parser(name, help=text, description=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter).add_argument
        flag("--out", default=f"{name}.png", metavar="FILE.png", help="the picture to write")
        if name in ("curves", "ap", "predictions"):
            flag("runs", nargs="+", metavar="RUN", help="output folder of a run")
            flag("--names", nargs="+", metavar="NAME", help="what the picture calls the runs; default: their folders' names")
        else:
            flag("checkpoint", metavar="CHECKPOINT", help="any file with a ResNet in it, 'imagenet' or 'random'")
            flag("images", metavar="IMAGES", help="folder of images, searched recursively")
            flag("--arch", default="resnet50", choices=common.ARCHS, help="the ResNet in CHECKPOINT, if it does not say so itself")
            flag("--size", default=None, type=int, help="side of a crop, short side of a whole image, in pixels; default CHECKPOINT's own, else 224")
            flag("--seed", default=0, type=int, help="of the crops of `matches`, and of random weights")
        if name not in ("curves", "ap"):
            flag("--count", default=6, type=int, metavar="N", help="so many images at most, spread evenly over all there are")
        return flag

    command("curves", "every loss and health value that runs of any script have logged")
    command("ap", "AP over IoU thresholds of runs of transfer_det.py, and the gain over the first one")
    command("matches", "two random crops of each of one's own images: their attention, sets and correspondences")
    command("attention", "one's own images whole, beside what the backbone attends to")
    flag = command("predictions", "predictions of runs of transfer_det.py or transfer_seg.py in columns beside image and truth")
    flag("--images", metavar="DIR", help="one's own images, without truth; default: the first run's validation data")
    # fmt: on
    args = parser.parse_args(argv)
    if not args.out.lower().endswith(".png"):
        raise UserError(f"--out {args.out}: the name has to end in .png")
    limits = {"count": (1, MOST), "size": (32, None), "seed": (0, None)}
    harness.legacy.check_range(args, **{name: limit for name, limit in limits.items() if name in args})
    if "runs" in args:
        folders = [os.path.basename(os.path.normpath(run)) for run in args.runs]
        args.names = args.names or (folders if len(set(folders)) == len(folders) else args.runs)
        if len(args.names) != len(args.runs):
            raise UserError(f"--names: {len(args.names)} names for {len(args.runs)} runs")
    return args


# ======================================================================================================================
# What runs leave behind, and images
# ======================================================================================================================


def file_of(run, name):
    """The path of a run's file. Errors: UserError, no such folder or file."""
    path = os.path.join(run, name)
    if not os.path.isdir(run):
        if os.path.exists(run):
            raise UserError(f"{run}: a file: give the folder that it lies in")
        raise UserError(f"{run}: no such folder (give the --output-dir of a run)")
    if not os.path.exists(path):
        trials = sorted(part for part in os.listdir(run) if os.path.exists(os.path.join(run, part, name)))
        instead = f"; give one of its trials: {', '.join(trials)}" if trials else ""
        parent = os.path.dirname(os.path.abspath(run))
        if os.path.exists(os.path.join(parent, name)):
            instead = f"; that of all trials is in {parent}"
        raise UserError(f"{run}: no {name} in it{instead}")
    return path


def lines_with(run, name, key):
    """The JSON objects of a run's log that have `key`. Errors: UserError, as `file_of`; no text."""
    path = file_of(run, name)
    try:
        lines = harness.pictures.read_log(path)
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a log of these scripts") from None
    return [line for line in lines if isinstance(line, dict) and key in line]


def readable(names, read, count, source):
    """Up to `count` images spread evenly over a list; unreadable ones are named and passed over.

    Args:
        names: of all images. read: function of an image's place in the list. source: what the error message calls it.
    Returns:
        names of the chosen images, [read(place), ...]
    Errors:
        UserError: none can be read.
    """
    chosen, found = [], []
    for place in sorted({number * len(names) // count for number in range(count)}):
        try:
            found.append(read(place))
            chosen.append(names[place])
        except OSError as error:
            print(f"unreadable, passed over: {names[place]} ({error})", flush=True)
    if not found:
        raise UserError(f"{source}: none of the images that were tried can be read")
    return chosen, found


def own_images(folder, count, source):
    """One's own images: their names, and [PIL RGB, ...]."""
    names = harness.images.list_images(folder, source)
    return readable(names, lambda i: harness.images.read_image(os.path.join(folder, names[i])), count, source)


# ======================================================================================================================
# Figures. Each function takes the parsed command line and returns a matplotlib figure, or None if it wrote --out itself.
# ======================================================================================================================


def line_of(place):
    """Colour and style of run number `place`."""
    return {"color": COLOURS[place % len(COLOURS)], "ls": STYLES[place // len(COLOURS) % len(STYLES)]}


def logged(run):
    """{name: [(step, number), ...]} of all that a run has logged, the probe before and after training among it."""
    values = {}
    for line in lines_with(run, "log.jsonl", "step"):
        for name, value in (line | line.get("probe", {})).items():
            if name not in NOT_DRAWN and isinstance(value, (int, float)):
                values.setdefault(name, []).append((line["step"], value))
    if not values:
        raise UserError(f"{run}: nothing is logged yet")
    return values


def yardstick(name, values):
    """The name among `values` of what a value is compared with (a random guess, evenly drawn directions), or None."""
    kind, _, part = name.partition("_")
    if kind in ("loss", "std"):
        own = f"{'chance' if kind == 'loss' else 'spread'}_{part}"
        whole = part in ("image", "set") or name == "loss" and "loss_image" not in values
        found = own if own in values else "std_spread" if kind == "std" else "loss_chance" if whole else None
    else:
        found = "chance" if name == "hits" else None
    return found if found in values else None


def draw_curves(args):
    """A panel for each value that is logged, a line for each run; dashed and thin: its yardstick."""
    plt, runs = harness.pictures.pyplot(), [logged(run) for run in args.runs]
    names = list(dict.fromkeys(name for values in runs for name in values))
    names = [name for name in names if not {"chance", "spread"} & set(name.split("_"))]
    names.sort(key=lambda name: name == "lr")  # the last one, as in the runs' own curves.png
    columns = min(4, len(names))
    rows = -(-len(names) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(3.4 * columns, 2.5 * rows + 0.5), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(names) :]:
        axis.remove()
    for axis, name in zip(axes.flat, names, strict=False):
        compared = [place for place, values in enumerate(runs) if yardstick(name, values) and name in values]
        beside = {yardstick(name, runs[place]) for place in compared}
        for place, values in enumerate(runs):
            points = values.get(name, [])
            marker = "." if len(points) < 20 else ""
            # of equal curves the later one lies thinner on the earlier
            style = line_of(place) | {"lw": 1.4 + min(0.8 * (len(runs) - 1 - place), 2), "marker": marker}
            axis.plot(*np.reshape(points, (-1, 2)).T, label=args.names[place], **style)
            if place in compared:
                other, turn = yardstick(name, values), compared.index(place)
                style = line_of(place) | {"ls": (6 * turn, (6, 6 * max(1, len(compared) - 1))), "lw": 0.9}  # in turn
                axis.axhline(values[other][-1][1], label=f"{args.names[place]}: {other}", **style)
        axis.set_title(name + "".join(f" (dashed: {other})" for other in sorted(beside)), fontsize=9)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
    handles = [plt.Line2D([], [], lw=2, label=name, **line_of(place)) for place, name in enumerate(args.names)]
    figure.legend(handles=handles, loc="outside upper center", ncols=4)
    return figure


def by_threshold(trial):
    """{kind (box, mask, ...): {IoU in percent: AP}} of a trial's result."""
    kinds = {kind: value for kind, value in trial.items() if isinstance(value, dict)}
    return {kind: value["AP_by_IoU"] for kind, value in kinds.items() if "AP_by_IoU" in value}


def draw_ap(args):
    """A row for each kind: AP over thresholds, mean and deviation (n - 1) of the trials; gain over the first run, with
    the standard error of a difference of means where both have several trials.

    Errors:
        UserError: other protocols, whose numbers are not comparable; no such results; none of a kind that all have.
    """
    plt, results = harness.pictures.pyplot(), [lines_with(run, "results.jsonl", "protocol") for run in args.runs]
    runs = [[by_threshold(trial) for trial in trials] for trials in results]
    for run, trials in zip(args.runs, runs, strict=True):
        if not trials or not trials[0]:
            raise UserError(f"{run}: no AP over IoU thresholds in its results.jsonl (transfer_det.py writes it)")
    protocols = [{trial["protocol"] for trial in trials} for trials in results]
    if len(set.union(*protocols)) > 1:
        which = "; ".join(f"{n}: {' and '.join(sorted(p))}" for n, p in zip(args.names, protocols, strict=True))
        raise UserError(f"the runs have different protocols, their numbers are not comparable ({which})")
    kinds = [kind for kind in runs[0][0] if all(kind in trials[0] for trials in runs)]
    if not kinds:
        raise UserError("the runs have no results of one kind (box, mask, ...): compare others")
    shape = len(kinds), 2 if len(runs) > 1 else 1
    figure, axes = plt.subplots(
        *shape, figsize=(5 * shape[1], 3.4 * shape[0] + 0.8), squeeze=False, layout="constrained"
    )
    for row, kind in zip(axes, kinds, strict=True):
        means, errors = [], []  # of each run, and the standard errors of its means
        for place, trials in enumerate(runs):
            thresholds = [int(threshold) / 100 for threshold in trials[0][kind]]
            values = np.array([list(trial[kind].values()) for trial in trials])  # (trials, thresholds)
            means.append(values.mean(0))
            n = len(trials)
            deviation = values.std(0, ddof=1) if n > 1 else np.full(len(thresholds), np.nan)  # nan draws no bar
            errors.append(deviation / n**0.5)
            style = line_of(place) | {"marker": "osD^vP*"[place % 7], "ms": 4, "lw": 1.4}
            label = args.names[place] + (f", mean of {n}" if n > 1 else "")
            row[0].errorbar(thresholds, means[-1], deviation, capsize=2, label=label, **style)
            for axis in row[1:]:
                error = np.hypot(errors[0], errors[-1]) if place else None
                axis.errorbar(thresholds, means[-1] - means[0], error, capsize=2, label=label, **style)
                axis.set_title(f"{kind}: gain over {args.names[0]}")
        row[0].set(title=f"{kind}: AP", ylabel="AP, percent")
        for axis in row:
            axis.set_xlabel("threshold of OKS" if kind == "keypoints" else "threshold of IoU")
            axis.grid(alpha=0.3)
    axes[0, 0].legend()
    figure.suptitle(*protocols[0], fontsize=10)
    return figure


def shortened(name, length):
    """The end of a long name."""
    return name if len(name) <= length else f"...{name[3 - length :]}"


def draw_columns(plt, rows, titles, names):
    """Pictures in columns.

    Args:
        rows: a list of pictures (PIL or arrays) for each image. titles: of the columns. names: of the images.
    """
    shapes = [np.asarray(row[0]).shape for row in rows]
    ratios = [height / width for height, width, *_ in shapes]
    figure, axes = plt.subplots(
        len(rows), len(titles), figsize=(2.8 * len(titles) + 0.3, 2.8 * sum(ratios) + 0.8), squeeze=False,
        height_ratios=ratios, layout="constrained",
    )  # fmt: skip
    for line, row, name in zip(axes, rows, names, strict=True):
        for axis, picture in zip(line, row, strict=True):
            axis.imshow(np.asarray(picture))
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(shortened(name, 24), fontsize=7)
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=10)
    return figure


def device():
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pretrained(args):
    """What CHECKPOINT says of itself: (its content, settings of its run, `size` and `arch` always among them)."""
    named = args.checkpoint in ("imagenet", "random")
    state = {} if named else harness.weights.load_checkpoint_file(args.checkpoint)
    state = state if isinstance(state, dict) else {}
    settings = state.get("settings")
    settings = settings if isinstance(settings, dict) else {}
    if state.get("script") == "setsim" and "set" not in settings:
        raise UserError(
            f"{args.checkpoint}: a checkpoint of an earlier version of setsim.py: give its exported weights"
        )
    size, arch = settings.get("size"), settings.get("arch")
    size = args.size or (size if isinstance(size, int) else 224)
    return state, settings | {"size": size, "arch": arch if arch in common.ARCHS else args.arch}


def backbone(args, settings):
    """The frozen backbone in CHECKPOINT."""
    trunk, _, line = frozen_trunk(args.checkpoint, settings["arch"], args.seed, device())
    print(line, flush=True)
    return trunk


@torch.no_grad()
def draw_attention(args):
    """Whole images beside their attention on C5 (PAPER: SetSim's Eq. 3), its set (Eq. 4) framed.

    A checkpoint of setsim.py is drawn with its own statistic and set, others with the paper's.
    """
    state, settings = pretrained(args)
    square, rule = False, SET
    if state.get("script") == "setsim":
        square, rule = settings["preset"] == "official", settings["set"]
    names, images = own_images(args.images, args.count, "IMAGES")
    plt, trunk = harness.pictures.pyplot(), backbone(args, settings)
    images = [TF.resize(image, settings["size"]) for image in images]  # short side
    framed = f"highest {rule}" if rule.endswith("%") else f"at least {rule}"
    titles = ["image", f"attention ({'mean of z^2' if square else 'sum of |z|'}), framed: {framed}"]
    figure = draw_columns(plt, [[image, image] for image in images], titles, names)
    for axis, image in zip(figure.axes[1::2], images, strict=True):
        z = trunk(common.normalise(TF.pil_to_tensor(image)[None].to(device())))[-1]  # (1, C, H, W)
        H, W = z.shape[2:]
        A = setsim.attention_map(z.flatten(2), square)  # (1, S)
        chosen = setsim.select(A, rule)
        A, chosen = A.view(H, W).cpu(), chosen.view(H, W).cpu()
        edges = (-0.5, image.width - 0.5, image.height - 0.5, -0.5)
        shown = axis.imshow(A.numpy(), "cividis", vmin=0, vmax=1, alpha=0.65, extent=edges, interpolation="nearest")
        width, height = image.width / W, image.height / H
        for i, j in chosen.nonzero().tolist():
            corner = (j * width - 0.5, i * height - 0.5)
            axis.add_patch(plt.Rectangle(corner, width, height, fill=False, ec="#E69F00", lw=1.5))
    # the bar is as thick in a high picture as in a low one; all in inches
    height = figure.get_figheight() + 0.3
    figure.set_figheight(height)
    bar = {"location": "bottom", "shrink": 0.5, "fraction": 0.12 / height, "pad": 0.1 / height}
    figure.colorbar(shown, ax=figure.axes, label="attention", **bar)
    return figure


@torch.no_grad()
def draw_matches(args):
    """PAPER: SetSim Figure 3. Each image with two random crops in it, and look.draw_matches of the crops; writes --out.

    A checkpoint.pth of setsim.py is drawn with its own two networks and matcher. Any other backbone sees both crops and
    is matched as setsim.py does by default.
    """
    state, settings = pretrained(args)
    names, images = own_images(args.images, args.count, "IMAGES")
    views = []
    for name, image in zip(names, images, strict=True):
        with common.drawing("figure", args.seed, name):
            views.append(setsim.two_views(image, settings["size"]))

    if state.get("script") == "setsim":
        method = setsim.build(argparse.Namespace(**settings | {"amp": "none"}), device())
        method.load_state_dict(state["model"])
        print(f"a run of setsim.py at step {state['step']}: its own networks and matcher", flush=True)
        see = method.eval().see
    else:
        trunk = backbone(args, settings)

        def see(view_q, view_k, window_q, window_k):
            z_q, z_k = (trunk(common.normalise(view))[-1] for view in (view_q, view_k))  # (1, C, H, W)
            return setsim.match(z_q, z_k, window_q, window_k), *z_q.shape[2:]

    found = []
    for one in views:  # each pair alone: all of them together may not fit into memory
        matched, H, W = see(*(x[None].to(device()) for x in one))
        found.append(matched)
    attention, sets = (
        [torch.cat(x) for x in zip(*part, strict=True)] for part in zip(*(m[:2] for m in found), strict=True)
    )
    similarity, positives = (torch.cat(x) for x in zip(*(m[2:] for m in found), strict=True))
    found = setsim.Match(attention, sets, similarity, positives)
    view_q, view_k, window_q, window_k = (torch.stack(x) for x in zip(*views, strict=True))
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "matches.png")
        look.draw_matches(path, view_q, view_k, found, H, W, rows=len(images))
        matches = Image.open(path).convert("RGB")
    buffer = io.BytesIO()
    draw_crops(matches, names, images, window_q.tolist(), window_k.tolist()).save(buffer, "png")
    harness.weights.write_atomically(args.out, [buffer.getvalue()])


def draw_crops(matches, names, images, windows_q, windows_k):
    """The picture `matches` with one more column at its left: each image, its name, and what the two views show of it."""
    head = 20  # pixels above the rows, as in look.draw_matches
    step = (matches.height - head) // len(images)
    canvas = Image.new("RGB", (step + matches.width, matches.height), "white")
    canvas.paste(matches, (step, 0))
    draw = ImageDraw.Draw(canvas)
    draw.text((6, 4), "image; crop q orange, k blue", fill="black")
    for row, (name, image, *windows) in enumerate(zip(names, images, windows_q, windows_k, strict=True)):
        small = image.copy()
        small.thumbnail((step - 6, step - 6 - 14))  # the name below it
        left, top = 6, head + row * step
        canvas.paste(small, (left, top))
        for (x0, y0, x1, y1), colour in zip(windows, ((255, 176, 0), (64, 176, 255)), strict=True):
            x0, x1 = sorted((x0, x1))  # of a flipped view they are swapped
            right, bottom = small.width - 1, small.height - 1
            edges = (left + x0 * right, top + y0 * bottom, left + x1 * right, top + y1 * bottom)
            draw.rectangle(edges, outline=colour, width=2)
        draw.text((left, top + small.height + 2), shortened(name, 36), fill="black")
    return canvas


class Detection:
    """What `draw_predictions` needs of transfer_det.py; truth and predictions are rows, as its `draw` takes them.

    Args:
        flags: that give the run's settings. state: its checkpoint.
    """

    def __init__(self, flags, state):
        import transfer_det as script

        self.script, self.state, self.categories = script, state, state["categories"]
        self.args, self.classes = script.get_args(flags), [category["name"] for category in self.categories]

    def validation(self):
        """Names, and a function of the place in their list that gives (PIL RGB, truth)."""
        data = self.script.open_data(self.args, "val", self.categories)
        return [image["file_name"] for image in data.images], lambda i: (data.read(i), data.annotations(i))

    def predict(self, images, world):
        """What the model finds in each image, as --predict has it."""
        script, args, state, found = self.script, self.args, self.state, []
        sizes = len(self.categories), state["outputs"], len(state["keypoints"])
        model = script.new_detector(args, args.seed, *sizes, world, state)[0].eval()
        for image in images:
            size = image.height, image.width
            new_size = script.resized(*size, args.test_side, args.max_side)
            pixels = script.to_tensor(image.resize(new_size[::-1], Image.BILINEAR)).to(world.device)
            found.append(script.confident(script.detect(model, pixels, size)))
        return found

    def draw(self, image, rows):
        return self.script.draw(image, rows, self.categories, LONG_SIDE)


class Segmentation:
    """The same of transfer_seg.py; truth and predictions are label maps, uint8 (H, W)."""

    def __init__(self, flags, state):
        import transfer_seg as script

        self.script, self.state, self.palette = script, state, state["palette"].numpy()
        self.args, self.classes = script.get_args(flags), list(state["classes"])

    def validation(self):
        data = self.script.open_data(self.args, "val", self.classes)
        return [data.name(i) for i in range(len(data))], data.read

    def predict(self, images, world):
        script, args, found = self.script, self.args, []
        model = script.new_segmenter(args, args.seed, len(self.classes), world, self.state)[0].eval()
        for image in images:
            size = image.height, image.width
            pixels = script.resize_image(script.to_tensor(image), script.resized(*size, *args.resize)).to(world.device)
            found.append(script.segment(model, pixels, size, args.crop, args.test))
        return found

    def draw(self, image, labels):
        return self.script.colour(labels, self.palette).convert("RGB")


def fine_tuned(run, images):
    """A run as Detection or Segmentation. images: one's own folder, or None. Errors: UserError, neither of them."""
    path = file_of(run, "checkpoint.pth")
    state = harness.weights.load_checkpoint_file(path)
    kinds = {"transfer_det": Detection, "transfer_seg": Segmentation}
    if not isinstance(state, dict) or state.get("script") not in kinds:
        raise UserError(f"{path}: not a checkpoint of transfer_det.py or transfer_seg.py")
    state.pop("optimizer", None)  # as large as the model
    return kinds[state["script"]](["--output-dir", run, *(["--predict", images] if images else ["--eval-only"])], state)


def draw_predictions(args):
    """A row for each image: the image, the truth if it is known, what each run predicts.

    Errors:
        UserError: no fine-tuned model, models of other tasks or classes, validation data that is no longer there.
    """
    plt, world = harness.pictures.pyplot(), harness.legacy.World(0, 1, 0, device())
    runs = [fine_tuned(run, args.images) for run in args.runs]
    tasks = [f"{run.state['script']}.py --task {run.args.task} with {len(run.classes)} classes" for run in runs]
    for name, task, run in zip(args.names, tasks, runs, strict=True):
        if (task, run.classes) != (tasks[0], runs[0].classes):
            raise UserError(
                f"{args.names[0]} is a run of {tasks[0]}, {name} of {task}: give runs of one task with the same classes"
            )
    kind, columns = runs[0], []
    if args.images:
        names, images = own_images(args.images, args.count, "--images")
    else:
        names, pairs = readable(*kind.validation(), args.count, "the validation data")
        images, truth = zip(*pairs, strict=True)
        columns.append(truth)
    for name, run in zip(args.names, runs, strict=True):
        columns.append(run.predict(images, world))
        print(f"{name}: step {run.state['step']}, {len(images)} images", flush=True)
    rows = [[image, *(kind.draw(image, one) for one in shown)] for image, *shown in zip(images, *columns, strict=True)]
    figure = draw_columns(plt, rows, ["image", *([] if args.images else ["truth"]), *args.names], names)
    if isinstance(kind, Segmentation):  # detections have their names at the boxes
        present = np.unique(np.concatenate([labels.ravel() for column in columns for labels in column]))
        handles = [
            plt.Rectangle((0, 0), 1, 1, fc=kind.palette[k] / 255, ec="black", label=kind.classes[k])
            for k in present
            if k < len(kind.classes)
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=2 + len(rows[0]), fontsize=8)
    return figure


DRAWN = {
    "curves": draw_curves, "ap": draw_ap, "matches": draw_matches, "attention": draw_attention,
    "predictions": draw_predictions,
}  # fmt: skip


def main(argv=None):
    args = get_args(argv)
    folder = os.path.dirname(args.out) or "."
    if os.path.isdir(args.out) or not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        raise UserError(f"--out {args.out}: give a file in a folder that is there and can be written")
    figure = DRAWN[args.command](args)
    if figure is not None:
        harness.pictures.save_figure(figure, args.out, dpi=150)
    print(f"picture: {args.out}", flush=True)


if __name__ == "__main__":
    harness.run.main(main)
