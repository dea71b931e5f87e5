# SPDX-License-Identifier: MIT
"""Coupling rate (CR) and mean cosine similarity (MCS): what an object's feature holds of its neighbour and of its place.

Qiu et al., "De-coupling and De-positioning Dense Self-supervised Learning", 2023, section 3, Figures 3 and 4, Tables 6
and 7. Canvases are put together from annotated objects; each stage of a frozen ResNet is looked at by itself.

    CR     canvases "A beside B" and "A alone", black elsewhere: f is the mean over an object's box of a stage's map
           CR = cos(f(A beside B), f(B)) / cos(f(A alone), f(B));  1: B does not touch the feature of A
    MCS    the same object in all places of a 3 x 3 grid: mean cosine of the middle one's feature with the eight others
           1: a feature does not tell where its object stands (zero-padding does)

    N canvases    s, g side of an object's square in pixels    C channels of a stage    H, W a map's sides

    python -m probes.bias --data /coco --weights ours=runs/d3ssl/resnet50.pth moco=moco.pth      Figures 3b and 4b
    python -m probes.bias --data scenes --arch resnet18 --weights FILE                           nothing to download

OUTPUT_DIR gets results.json, bias.png (Figures 3b and 4b), coupling.png and position.png (canvases, Figures 3a and 4a).
The paper does not print sizes, the objects, and what exactly is divided (AMBIGUOUS: D36, D37). Values of this script can
be compared with one another, at equal settings, and with the paper's in their order alone.
"""

import argparse
import math
import os

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision import ops, utils
from torchvision.transforms import functional as TF

import common
from common import UserError, number
from harness import images, pictures, run
from probes import frozen

STAGES = ("C2", "C3", "C4", "C5")
KINDS = {"CR": "coupling rate", "MCS": "mean cosine similarity"}
SMALLEST = 32  # AMBIGUOUS: D36. Pixels; objects with a shorter side are left out, they would be little but blur
SCENE = 448  # pixels a side: objects of scenes are then about as large as the squares that they go into
BATCH, SHOWN, DRAWS = 16, 6, 100  # canvases at once; in a picture; images tried for one object


def get_args(argv=None):
    # fmt: off
    parser = argparse.ArgumentParser(prog="python -m probes.bias", description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flag = parser.add_argument
    flag("--data", required=True, metavar="DIR", help="folder with annotations/instances_SPLIT.json and SPLIT/, as COCO has them; or 'scenes[:COUNT]'")
    flag("--weights", required=True, nargs="+", metavar="NAME=FILE", help="backbones to be compared, each any checkpoint with a ResNet in it, 'imagenet' or 'random' (which is added if it is not there); a FILE without NAME is called by its own")
    flag("--output-dir", default="runs/bias", help="results.json and pictures go there")
    flag("--split", default="val2017", help="whose objects are used")
    flag("--arch", default="resnet50", choices=common.ARCHS, help="torchvision ResNet that the weights belong to, all of them")
    flag("--count", default=500, type=number(int, 1), metavar="N", help="pairs for CR, and as many objects for MCS")
    flag("--cut", default="mask", choices=("mask", "box"), help="an object is what is inside its outline (its box where it has none), black around it; or all that is in its box")
    flag("--pair-size", default=128, type=number(int, 32), help="CR: side of an object's square in pixels, the canvas has twice as much; multiples of 64 put its edges onto edges of cells in all stages")
    flag("--grid-size", default=96, type=number(int, 32), help="MCS: side of an object's square in pixels, a multiple of 32; the canvas has three times as much")
    flag("--seed", default=0, type=number(int, 0), help="of the objects, the scenes and random backbones")
    # fmt: on
    args = parser.parse_args(argv)
    for name, step in (("pair_size", 16), ("grid_size", 32)):
        if getattr(args, name) % step:
            parser.error(f"--{name.replace('_', '-')} must be a multiple of {step}, so that the canvas is one of 32")
    return args


def parse_weights(words):
    """["ours=a.pth", "b.pth"] -> {"ours": "a.pth", "b": "b.pth", "random": "random"}. Errors: UserError, bad names."""
    found = {}
    for word in words:
        name, source = word.split("=", 1) if "=" in word else (os.path.splitext(os.path.basename(word))[0], word)
        if not (name and source) or name in found or name == "random" != source:
            raise UserError(f"--weights {word}: write NAME=FILE with names of their own")
        found[name] = source
    # PAPER: section 3.2 sets the others against random initialisation
    return found if "random" in found.values() else found | {"random": "random"}


def cut_out(image, box, mask, side):
    """An object, stretched to a square, black outside of its mask (H, W), if there is one: (3, side, side) uint8.

    image: PIL. box: x0 y0 x1 y1 in pixels, taken to whole ones outwards.
    """
    if mask is not None:
        image = Image.composite(image, Image.new("RGB", image.size), Image.fromarray(mask))
    box = *map(math.floor, box[:2]), *map(math.ceil, box[2:])
    return TF.pil_to_tensor(image.crop(box).resize((side, side), Image.Resampling.BILINEAR))


def pair_canvases(a, b):
    """PAPER: section 3.1, Figure 3a. Two objects next to each other on black, and the first alone in the same place.

    AMBIGUOUS: D36. Two squares that touch in the middle of a canvas of twice their side, A to the left.
    a, b: (3, s, s) uint8. Returns (A beside B, A alone), (3, 2s, 2s) each.
    """
    side, top = a.shape[-1], a.shape[-1] // 2
    alone = F.pad(a, (0, side, top, side - top))
    return alone + F.pad(b, (side, 0, top, side - top)), alone


class Canvases:
    """What N pairs of objects are made into; pair i is drawn from (seed, i) and nothing else.

    PAPER: section 3.1, "pairs of objects (A and B) belonging to different categories". AMBIGUOUS: D36. An object is drawn
    by its image, then among those of the image that are large enough. pair_side, grid_side: s, g. cut: "mask" or "box".
    """

    def __init__(self, objects, pair_side, grid_side, cut, seed):
        self.objects, self.sides, self.cut, self.seed = objects, (pair_side, grid_side), cut, seed
        self.bad = images.BadImages(objects, outcome="it is passed over")

    def __getitem__(self, i):
        """(A beside B, A alone (3, 2s, 2s), A in all places of a grid (3, 3g, 3g)), uint8. Errors: see `draw`."""
        rng = common.generator("pair", self.seed, i)
        label, a, grid = self.draw(rng, 0, self.sides)
        _, b = self.draw(rng, label, self.sides[:1])
        return *pair_canvases(a, b), grid.repeat(1, 3, 3)  # PAPER: section 3.2, Figure 4a

    def draw(self, rng, label, sides):
        """An object of another category than `label`: (its label, *squares of these sides). Errors: UserError, none found."""
        for _ in range(DRAWS):
            index = torch.randint(len(self.objects), (), generator=rng)
            try:
                image, boxes, labels, mask = self.objects[index.item()]
            except OSError:
                self.bad.note(index[None], torch.ones(1, dtype=torch.int64))
                self.bad.share()
                continue
            fits = ((boxes[:, 2:] - boxes[:, :2]).amin(1) >= SMALLEST) & (labels != label)
            rows = fits.nonzero()[:, 0]
            if len(rows):
                row = rows[torch.randint(len(rows), (), generator=rng)].item()
                inside = mask(row) if self.cut == "mask" else None
                return labels[row], *(cut_out(image, boxes[row].tolist(), inside, side) for side in sides)
        second = "" if label == 0 else " and of a second category"
        raise UserError(f"{DRAWS} images without an object of {SMALLEST} pixels a side{second}: they give no pairs")


def box_features(maps, box, side):
    """The mean of a stage's maps over a box: RoIAlign's (AMBIGUOUS: D36), with as many bins as the box has cells.

    So a box on whole cells gives the mean of these and nothing of the cells around it; 7 x 7 bins would read from them.
    maps: (N, C, H, W) of square canvases. box: x0 y0 x1 y1 in pixels. side: of the canvases. Returns (N, C) float32.
    """
    scale, (x0, y0, x1, y1) = maps.shape[-1] / side, box
    rows = [torch.tensor([box], dtype=maps.dtype, device=maps.device)] * len(maps)
    bins = math.ceil((y1 - y0) * scale), math.ceil((x1 - x0) * scale)
    return ops.roi_align(maps, rows, bins, scale, aligned=True).float().mean((2, 3))


def coupling_rate(a_beside_b, a_alone, b):
    """PAPER: section 3.1. CR of each pair: the ratio of two cosines; 1 where B leaves the feature of A as it is.

    AMBIGUOUS: D36. b is the feature of B beside A, as only two canvases are described. The paper's values over 1 that rise
    with depth fit this order alone. (N, C) each -> (N,); not finite where A alone has nothing in common with B.
    """
    return F.cosine_similarity(a_beside_b, b) / F.cosine_similarity(a_alone, b)


def mean_cosine(maps):
    """PAPER: section 3.2. MCS of each canvas: mean cosine of the middle place's feature with the eight others.

    (N, C, H, W), H and W divisible by 3 -> (N,), at most 1. The feature of a place is the mean of its cells.
    """
    places = F.normalize(F.adaptive_avg_pool2d(maps.float(), 3).flatten(2), dim=1)  # (N, C, 9)
    cosines = (places[:, :, 4:5] * places).sum(1)  # (N, 9), its own of 1 in the middle
    return (cosines.sum(1) - cosines[:, 4]) / 8


@torch.no_grad()
def measure(trunk, beside, alone, grid):
    """CR and MCS in each stage, (N, stages) each. beside, alone: (N, 3, 2s, 2s), grid: (N, 3, 3g, 3g), uint8 canvases."""
    side, rates = beside.shape[-1], []
    middle, top, bottom = side // 2, side // 4, side // 4 + side // 2
    a, b = (0, top, middle, bottom), (middle, top, side, bottom)  # see pair_canvases
    for together, single in zip(trunk(common.normalise(beside)), trunk(common.normalise(alone)), strict=True):
        boxes = (together, a), (single, a), (together, b)
        rates.append(coupling_rate(*(box_features(maps, box, side) for maps, box in boxes)))
    # AMBIGUOUS: D37. An object's side is a multiple of all strides: only the borders tell one place from another.
    similarities = [mean_cosine(maps) for maps in trunk(common.normalise(grid))]
    return torch.stack(rates, 1), torch.stack(similarities, 1)


def statistics(values):
    """(N, stages) -> {stage: {"mean", "error": standard error, "count"}} of what is finite; None where that is too little."""
    result = {}
    for stage, column in zip(STAGES, values.double().T, strict=True):
        column = column[column.isfinite()]
        count = len(column)
        error = column.std().item() / count**0.5 if count > 1 else None
        result[stage] = {"mean": column.mean().item() if count else None, "error": error, "count": count}
    return result


def draw_plots(path, results):
    """PAPER: Figures 3b and 4b, side by side: CR and MCS by stage, a line for each backbone, two standard errors as bars."""
    figure, axes = pictures.pyplot().subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axis, (kind, title) in zip(axes, KINDS.items(), strict=True):
        for name, result in results.items():
            values = [(result[kind][stage]["mean"], result[kind][stage]["error"]) for stage in STAGES]
            means, errors = np.array(values, float).T  # None becomes nan, which is not drawn
            axis.errorbar(STAGES, means, 2 * errors, marker="o", ms=4, lw=1.4, capsize=3, label=name)
        axis.axhline(1, color="k", ls="--", lw=0.8)
        axis.set(title=title, xlabel="stage (bars: two standard errors)")
        axis.legend(fontsize=8)
    pictures.save_figure(figure, path, dpi=120)


def draw_canvases(path, *rows):
    """PAPER: Figures 3a and 4a. Args: rows of pictures, (n, 3, side, side) uint8 each."""
    sheet = utils.make_grid(torch.cat(rows), len(rows[0]), padding=8, pad_value=255)
    Image.fromarray(sheet.permute(1, 2, 0).numpy()).save(path)


def job(argv=None):
    args = get_args(argv)
    device = frozen.start(args)
    pictures.pyplot()  # to miss it now and not after the work
    objects = frozen.open_objects(args, args.split, SCENE, masks=True)
    canvases = Canvases(objects, args.pair_size, args.grid_size, args.cut, args.seed)
    trunks, found, path = {}, {}, os.path.join(args.output_dir, "{}.png").format
    for name, source in parse_weights(args.weights).items():
        print(name, end=": ")
        trunks[name], found[name] = frozen.frozen_trunk(source, args.arch, args.seed, device), []

    for first in pictures.progress(range(0, args.count, BATCH), -(-args.count // BATCH), what="batches"):
        batch = [canvases[i] for i in range(first, min(first + BATCH, args.count))]
        batch = beside, alone, grid = [torch.stack(some) for some in zip(*batch, strict=True)]
        if first == 0:
            draw_canvases(path("coupling"), beside[:SHOWN], alone[:SHOWN])
            draw_canvases(path("position"), grid[:SHOWN])
        for name, trunk in trunks.items():
            found[name].append(torch.stack(measure(trunk, *(x.to(device) for x in batch))).cpu())  # (2, N, stages)

    results = {}
    for name, parts in found.items():
        results[name] = {kind: statistics(values) for kind, values in zip(KINDS, torch.cat(parts, 1), strict=True)}
        for kind, stages in results[name].items():
            values = {stage: np.array([value["mean"], value["error"]], float) for stage, value in stages.items()}
            line = "  ".join("{} {:.4f} +- {:.4f}".format(stage, *pair) for stage, pair in values.items())
            print(f"{kind:3} {line}  {name}")
    draw_plots(path("bias"), results)
    frozen.write_results(args.output_dir, "probes.bias", argv, vars(args), {"results": results})


if __name__ == "__main__":
    run.main(job)
