# SPDX-License-Identifier: MIT
"""ReSim: dense self-supervised pre-training that compares the *regions* that two views of an image share.

Xiao et al., "Region Similarity Representation Learning", ICCV 2021.
A window slides over one crop of an image; where it lies in the other crop follows from the two crops alone. Features
pooled over the window in both are pulled together, and pushed from all other regions of the batch.

    image --flip or not--+--crop, colour--> view q --f--> C5 --mean, MLP--> q ---------------- image loss, Eqs. 3, 4 --+
                         |                    |           C3..C5 --top-down--> P4, P3 --g--> map q --+                 |
                         |                windows u_q ---------------------------- pooled at u_q ----+                 |
                         |                    | R_q->k                                               +-- region loss,  +-- total,
                         |                windows u_k ---------------------------- pooled at u_k ----+   Eqs. 1, 2     |   Eq. 5
                         |                    |           as above, momentum copies                  |                 |
                         +--crop, colour--> view k --f'-----------------------> P4, P3 --g'-> map k -+                 |
                                                          C5 --mean, MLP--> k, into a queue ---------------------------+
    ReSim-C4 (--levels c4) has no top-down path: g works on C4. Negatives of regions: all neighbourhoods, as large as a
    window, of map k of all images (C4, P4) or of an image's group (P3).

    B images of this process    C channels of a map    H, W its cells    D embedding (128)    K queue    q, k query, key
    A windows of a view (36 on C4 and P4, 64 on P3)    R regions, those of all images that are valid     m EMA
    M negative regions, H' x W' of them an image       E width of a SimSiam head      S = H W    tau temperature

    python resim.py --demo                                     a laptop, minutes, nothing to download
    torchrun --nproc_per_node 8 resim.py --data /imagenet      ReSim-FPN: Table 4's 59.2 AP
    ... --levels c4                                            ReSim-C4: Table 4's 58.7 AP
    ... --data /in100 --epochs 500 --levels c4 --framework simsiam      Table 2's SimSiam + ReSim-C4

What was measured with this file, and what was not run, stands in README.md; tags PAPER, OFFICIAL (the released code of
ReSim-FPN on MoCo-v2, Tete-Xiao/ReSim b6a36ee), DEVIATION and AMBIGUOUS name rows of its table of decisions.
"""

import argparse
import copy
import math
import os
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter
from torch import nn
from torchvision import ops, transforms
from torchvision.transforms import functional as TF

import common
from common import UserError, print0

# ======================================================================================================================
# Settings: every default is the paper's (section 4, "Training", and Table 7), for ReSim-FPN on MoCo-v2
# ======================================================================================================================

SIMSIAM = dict(lr=0.1)  # PAPER: Table 7. DEVIATION: R21. Twice what SimSiam's own rule gives.
DEMO = dict(
    data="scenes", arch="resnet18", size=136, batch_size=64, epochs=3, lr=0.6, queue_size=512, ema=0.99, temperature=0.1
)
PYRAMID = 256  # channels of P3..P5, OFFICIAL: R16, as in every detector that takes them over


class Level(NamedTuple):
    """A feature map on which regions are compared."""

    name: str  # c4 (a stage's output), p4, p3 (after the top-down path)
    stride: int  # pixels of the view between two cells
    window: int  # side of a window in pixels
    step: int  # pixels between two windows
    gathered: bool  # negatives from all processes, or from the image's own group only (R10)

    @property
    def stage(self):
        """Which of the trunk's stages C2..C5 it belongs to, counted from C2."""
        return int(self.name[1]) - 2

    def channels(self, widths):
        """Channels of its map, of a trunk with stages as wide as `widths`."""
        return PYRAMID if self.name[0] == "p" else widths[self.stage]

    @property
    def kernel(self):
        """Side in cells of the neighbourhoods that are negatives. OFFICIAL: R9. 3 on P3. AMBIGUOUS: R26. A window's, halves
        up, elsewhere."""
        return 3 if self.name == "p3" else max(1, int(self.window / self.stride + 0.5))


# PAPER: section 3.4. AMBIGUOUS: R18. ReSim-C4 compares on C4 alone.
LEVELS = {
    "c4": [Level("c4", 16, 48, 32, gathered=True)],
    "fpn": [Level("p4", 16, 48, 32, gathered=True), Level("p3", 8, 32, 24, gathered=False)],
}


def get_args(argv=None):
    # fmt: off
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flag, switch = parser.add_argument, argparse.BooleanOptionalAction
    flag("--data", default=None, metavar="DIR", help="folder of images, searched recursively (its train/ if there is one), or 'scenes[:COUNT]'")
    flag("--output-dir", default="runs/resim", help="checkpoint.pth, ARCH.pth, fpn.pth, log.jsonl and pictures go there; a run found there is continued")
    flag("--demo", action="store_true", help="a small complete job on built-in scenes, minutes on two CPU cores; other flags win over its settings")
    flag("--preset", default="paper", choices=("paper", "official"), help="the text, or the released code: FPN convolutions as the only heads, mean over all windows of a group, blur first")
    flag("--framework", default="moco", choices=("moco", "simsiam"), help="MoCo-v2 (queue, momentum keys) or SimSiam (predictors, no negatives)")
    # the regions, sections 3.3 and 3.4
    flag("--levels", default="fpn", choices=tuple(LEVELS), help="c4: ReSim-C4, on C4; fpn: ReSim-FPN, on P4 and P3 of a feature pyramid")
    flag("--window", default=None, type=int, nargs="+", metavar="PIXELS", help="W of Table 3, for each level; default 48 on C4 and P4, 32 on P3")
    flag("--stride", default=None, type=int, nargs="+", metavar="PIXELS", help="S of Table 3, for each level; default 32 on C4 and P4, 24 on P3")
    flag("--pool", default="prroi", choices=("prroi", "roi_align"), help="Precise RoI Pooling, or RoIAlign (section 4.1's comparison)")
    # the losses
    flag("--loss-weight", default=1.0, type=float, help="lambda of Eq. 5: weight of the image loss beside the regions'")
    flag("--temperature", default=0.2, type=float, help="tau of Eqs. 1 and 3: the smaller, the more the hardest negatives count")
    flag("--dim", default=128, type=int, help="D, size of embeddings (of images alone with --preset official: its regions have 256)")
    flag("--queue-size", default=65536, type=int, help="K; more than the data has images holds several old keys of one image as negatives; IN-100: 16384")
    flag("--ema", default=0.999, type=float, help="m: key encoder <- m key + (1 - m) query; short runs need a smaller one")
    # the encoder and its images
    flag("--arch", default="resnet50", choices=common.ARCHS, help="torchvision ResNet")
    flag("--size", default=224, type=int, help="side of a view in pixels; C4 has size/16 cells a side, rounded up")
    flag("--init", default=None, metavar="FILE", help="start from these weights: any checkpoint with a ResNet in it, or 'imagenet'; with --preset official the whole query network of a released one")
    flag("--group-size", default=32, type=int, help="images whose batch statistics, means and P3 negatives are taken together, as on one of the paper's GPUs")
    # optimisation
    flag("--epochs", default=200, type=int, help="the schedule's length; IN-100: 500")
    flag("--batch-size", default=256, type=int, help="over all processes; must be divisible by their number")
    flag("--lr", default=0.03, type=float, help="at batch 256, scaled linearly with the batch; default 0.1 on SimSiam")
    flag("--fix-pred-lr", default=True, action=switch, help="SimSiam: no decay of the predictors' learning rate")
    flag("--momentum", default=0.9, type=float, help="momentum of SGD")
    flag("--weight-decay", default=1e-4, type=float, help="on all parameters, norms and biases included")
    flag("--amp", default="none", choices=("none", "bf16", "fp16"), help="autocast of the encoders; pooling, losses and queue are fp32 always")
    flag("--seed", default=0, type=int, help="everything random is a function of it")
    # the run
    flag("--steps", default=None, type=int, help="stop after so many steps in all, schedule unchanged")
    flag("--workers", default=min(8, common.usable_cores()), type=int, help="loader processes for each training process; no influence on results")
    flag("--print-freq", default=10, type=int, help="steps between log lines")
    flag("--save-every", default=None, type=int, help="steps between checkpoints; default one epoch")
    flag("--resume", default=None, metavar="FILE", help="continue from this checkpoint; default OUTPUT_DIR/checkpoint.pth if it is there")
    # fmt: on
    args, given = parser.parse_args(argv), common.given_flags(parser, argv)

    chosen = (DEMO if args.demo else {}) | (SIMSIAM if args.framework == "simsiam" else {})
    for name, value in chosen.items():
        if name not in given:
            setattr(args, name, value)
    if args.window is None:
        args.window = [level.window for level in LEVELS[args.levels]]
    if args.stride is None:
        args.stride = [level.step for level in LEVELS[args.levels]]
    check_args(args, given)
    args.given = sorted(given)
    return args


def check_args(args, given):
    """One clear line for values out of range and for flags that would have no effect."""
    common.check_range(
        args, loss_weight=(0, None), temperature=(1e-3, None), dim=(4, None), queue_size=(1, None), ema=(0, 1), size=(32, None),
        group_size=(2, None), epochs=(1, None), batch_size=(2, None), lr=(0, None), momentum=(0, 1), weight_decay=(0, None),
        steps=(0, None), workers=(0, None), print_freq=(1, None), save_every=(1, None), seed=(0, None),
    )  # fmt: skip
    useless = {name: "SimSiam has no queue and no momentum encoder" for name in ("queue_size", "ema")}
    useless |= {"temperature": "SimSiam's loss has none", "group_size": "SimSiam's batch norm is over the batch"}
    useless |= {"dim": "SimSiam's heads are as wide as the stages"}
    if args.framework == "moco":
        useless = {"fix_pred_lr": "only SimSiam has predictors"}
    for name in useless.keys() & given.keys():
        raise UserError(f"--{name.replace('_', '-')} has no effect here, leave it out: {useless[name]}")
    if args.preset == "official" and (args.levels, args.framework) != ("fpn", "moco"):
        raise UserError(
            "--preset official is ReSim-FPN on MoCo-v2, nothing else was released: leave out --levels, --framework"
        )
    names = [level.name.upper() for level in LEVELS[args.levels]]
    for flag, values in (("--window", args.window), ("--stride", args.stride)):
        if len(values) != len(names) or min(values) < 1:
            raise UserError(
                f"{flag} {' '.join(map(str, values))}: give one positive number for each of {', '.join(names)}"
            )
    for level in make_levels(args):
        if level.window >= args.size or level.kernel > math.ceil(args.size / level.stride):
            raise UserError(f"--size {args.size}: a window of {level.window} pixels does not fit into the view")
    if args.data is None:
        raise UserError("give --data DIR (a folder of images), or --demo for a small job on built-in scenes")


def make_levels(args):
    """The levels of the settings, with their windows."""
    changes = zip(LEVELS[args.levels], args.window, args.stride, strict=True)
    return [level._replace(window=window, step=step) for level, window, step in changes]


# ======================================================================================================================
# Views: two random crops of an image, flipped alike, each with the box of the image that it shows
# ======================================================================================================================


def distort(view, blur_first):
    """MoCo-v2's colour operations on a PIL image; draws from torch's global generator.

    Args:
        blur_first: blur before the colours change (OFFICIAL: R14), not after them as in MoCo-v2.
    """

    def blur(view):
        if torch.rand(()).item() < 0.5:  # OFFICIAL: B8. sigma is Pillow's radius, as in MoCo-v2
            view = view.filter(ImageFilter.GaussianBlur(torch.empty(()).uniform_(0.1, 2.0).item()))
        return view

    if blur_first:
        view = blur(view)
    if torch.rand(()).item() < 0.8:
        view = transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)(view)
    if torch.rand(()).item() < 0.2:
        view = TF.rgb_to_grayscale(view, 3)
    return view if blur_first else blur(view)


def two_views(image, size, blur_first):
    """MoCo-v2's augmentation but for the flip, which both views share; draws from torch's global generator.

    PAPER: section 3.3, "Aligning corresponding regions". OFFICIAL: R15. The flip comes before the crops, which
    leaves a shift and a scaling between the two views.

    Args:
        image: PIL RGB. size: side of a view in pixels. blur_first: see distort.
    Returns:
        view_q, view_k: (3, size, size) uint8.
        crop_q, crop_k: (4,) fp32, what the view shows: (x0, y0, x1, y1) in pixels of the (perhaps flipped) image.
    """
    if torch.rand(()).item() < 0.5:
        image = TF.hflip(image)
    views, crops = [], []
    for _ in "qk":
        top, left, h, w = transforms.RandomResizedCrop.get_params(image, scale=(0.2, 1.0), ratio=(3 / 4, 4 / 3))
        view = distort(TF.resized_crop(image, top, left, h, w, [size, size]), blur_first)
        views.append(TF.pil_to_tensor(view))
        crops.append(torch.tensor([left, top, left + w, top + h], dtype=torch.float32))
    return *views, *crops


class TwoViews(torch.utils.data.Dataset):
    """(epoch, index) -> view_q, view_k, crop_q, crop_k, index, unreadable images passed over (see ImageFolder)."""

    def __init__(self, images, size, blur_first, seed):
        self.images, self.size, self.blur_first, self.seed = images, size, blur_first, seed

    def __getitem__(self, key):
        epoch, index = key
        image, passed = self.images[index]
        with common.drawing("views", self.seed, epoch, index):
            view_q, view_k, crop_q, crop_k = two_views(image, self.size, self.blur_first)
        return view_q, view_k, crop_q, crop_k, index, passed


# ======================================================================================================================
# Regions: windows of the query view and where they lie in the key view (section 3.3). All boxes are (x0, y0, x1, y1).
# ======================================================================================================================


def window_grid(size, window, stride):
    """The windows that slide over a view, row by row; each ends before the view does (OFFICIAL: R1, R2).

    Args:
        size, window, stride: sides of the view and of a window, and the distance between windows, in pixels.
    Returns:
        (A, 4) fp32, boxes in pixels of the view.
    """
    start = torch.arange(0, size - window, stride, dtype=torch.float32)
    y, x = torch.meshgrid(start, start, indexing="ij")
    return torch.stack([x, y, x + window, y + window], 2).flatten(0, 1)


def map_boxes(boxes, crop_q, crop_k, size):
    """PAPER: section 3.3, R_q->k = R_k(R_q^-1): from pixels of the query view to the image, and on to the key view.

    Args:
        boxes: (A, 4) or (B, A, 4), in pixels of the query views. crop_q, crop_k: (B, 4), see two_views.
        size: side of the views in pixels.
    Returns:
        (B, A, 4), in pixels of the key views, wherever that is. Exactly `boxes` where both crops are the same.
    """
    side_q, side_k = crop_q[:, 2:] - crop_q[:, :2], crop_k[:, 2:] - crop_k[:, :2]  # (B, 2), width and height
    zoom = side_q / side_k
    shift = (crop_q[:, :2] - crop_k[:, :2]) * size / side_k
    return boxes * zoom.repeat(1, 2)[:, None] + shift.repeat(1, 2)[:, None]


class Pairs(NamedTuple):
    """Corresponding regions of two views. Where not valid, the key's box is a dummy."""

    boxes_q: torch.Tensor  # (B, A, 4)
    boxes_k: torch.Tensor  # (B, A, 4)
    valid: torch.Tensor  # (B, A) bool


def region_pairs(crop_q, crop_k, size, window, stride):
    """PAPER: section 3.3, "Generating candidate regions": the windows of the query view that the key view shows whole.

    OFFICIAL: R1. The grid covers the query view and windows outside the overlap are dropped, so all shapes are constant.
    OFFICIAL: R2, R3. Inside means x0, y0 >= 0 and x1, y1 < size; the rest is marked, nothing is drawn anew.

    Args:
        crop_q, crop_k: (B, 4), see two_views. size, window, stride: in pixels, see window_grid.
    Returns:
        Pairs
    """
    grid = window_grid(size, window, stride).to(crop_q.device)  # (A, 4)
    boxes = map_boxes(grid, crop_q, crop_k, size)  # (B, A, 4)
    valid = (boxes[..., :2] >= 0).all(2) & (boxes[..., 2:] < size).all(2)  # (B, A)
    dummy = boxes.new_tensor([0, 0, 1, 1])
    return Pairs(grid.expand_as(boxes), torch.where(valid[..., None], boxes, dummy), valid)


# ======================================================================================================================
# Precise RoI Pooling: the mean of the interpolated feature map over a box, in closed form
# ======================================================================================================================


def hat_integrals(start, end, samples):
    """The integral of hat(t - j) = max(0, 1 - |t - j|) over t from start to end, for each sample j = 0, 1, ...

    Cut to the hat's support, the ends are u = start - j and v = end - j in [-1, 1]. The trapezoid rule gives
    (v - u) (hat(u) + hat(v)) / 2, which is exact unless the peak at 0 lies between u and v; then it leaves out the
    triangle from u over the peak to v, whose area is |u v|. No differences of large numbers: tiny boxes stay accurate.

    Args:
        start, end: (...), start <= end. samples: their number.
    Returns:
        (..., samples)
    """
    j = torch.arange(samples, dtype=start.dtype, device=start.device)
    u, v = ((t[..., None] - j).clamp(-1, 1) for t in (start, end))
    trapezoid = (v - u) * (2 - u.abs() - v.abs()) / 2
    triangle = ((u * v).abs() - u * v) / 2  # |uv| if u < 0 < v, else 0; unlike clamp, with the right slope at 0
    return trapezoid + triangle


def bin_weights(start, end, bins, samples):
    """What each sample weighs in the mean over each of `bins` equal parts of [start, end].

    Args:
        start, end: (R,), in units of samples. An interval that is empty or runs backwards has no weight at all.
    Returns:
        (R, bins, samples)
    """
    edge = torch.linspace(0, 1, bins + 1, dtype=start.dtype, device=start.device)
    edges = torch.lerp(start[:, None], end[:, None], edge)  # (R, bins + 1)
    length = (edges[:, 1:] - edges[:, :-1])[..., None]  # (R, bins, 1)
    integrals = hat_integrals(edges[:, :-1], edges[:, 1:], samples)  # (R, bins, samples)
    return torch.where(length > 0, integrals / length.where(length > 0, 1), 0)


def prroi_pool(input, boxes, output_size, spatial_scale=1.0):
    """Precise RoI Pooling (Jiang et al., ECCV 2018): exact, without sampling points, differentiable in boxes too.

    The feature map is read as a continuous function: its samples sit at whole coordinates (sample (i, j) at x = j,
    y = i, no half-pixel shift), are interpolated bilinearly, and are 0 beyond the map:

        f(x, y) = sum_ij input[i, j] hat(y - i) hat(x - j),        hat(t) = max(0, 1 - |t|)

    Each output is the mean of f over one bin [x0, x1] x [y0, y1] of the box. f is a sum of products of a function of
    x and one of y, so the double integral of each term is a product of two integrals of hats (see hat_integrals):

        mean = sum_ij input[i, j] wy[i] wx[j],        wx[j] = 1 / (x1 - x0) * integral of hat(x - j) from x0 to x1

    and pooling all boxes of all images is one einsum. An average over a bin of one cell, say [2, 3] x [5, 6], is
    the average of the 2 x 2 samples at its corners. A box of 3 cells at a whole coordinate weighs four samples by 1/6,
    1/3, 1/3, 1/6, where RoIAlign, which takes sample j for the centre of cell j, weighs the first three by 1/3: its centre
    lies half a cell further to the lower right, and it reaches half a cell further to both sides of it (R11).

    Made for many boxes on small maps: costs N x L x outputs x H x W x C, L boxes in the image that has most.

    Args:
        input: (N, C, H, W), any floating type; computed in fp32 at least, whatever autocast says.
        boxes: as in torchvision.ops.roi_align: (R, 5) rows (index of the image, x0, y0, x1, y1), or a list with an
            (L, 4) tensor for each image. An empty box, or one with x1 < x0, gives 0 and no gradient.
        output_size: int or (rows, columns). spatial_scale: from the boxes' coordinates to the map's, e.g. 1 / 16.
    Returns:
        (R, C, rows, columns)
    Errors:
        ValueError: boxes of another shape, or a list of another length than N.
    """
    rows, columns = (output_size, output_size) if isinstance(output_size, int) else output_size
    N, _, H, W = input.shape
    tensor = isinstance(boxes, torch.Tensor)
    if any(b.dim() != 2 or b.shape[1] != 4 + tensor for b in ([boxes] if tensor else boxes)):
        raise ValueError("boxes: give a tensor (R, 5), the image's index first, or a list of (L, 4) tensors")
    if not tensor and len(boxes) != N:
        raise ValueError(f"boxes: a list of {len(boxes)} for {N} images")
    if tensor:
        image, boxes = boxes[:, 0].long(), boxes[:, 1:]
    else:
        counts = torch.tensor([len(b) for b in boxes], device=input.device)
        image, boxes = torch.arange(N, device=input.device).repeat_interleave(counts), torch.cat(list(boxes))
    dtype = torch.promote_types(input.dtype, torch.float32)
    x0, y0, x1, y1 = (boxes.to(dtype) * spatial_scale).unbind(1)  # (R,)
    wy, wx = bin_weights(y0, y1, rows, H), bin_weights(x0, x1, columns, W)  # (R, rows, H), (R, columns, W)

    # the boxes of each image side by side: box r is number place[r] of its image, which has up to L
    order = image.argsort(stable=True)
    counts = image.bincount(minlength=N)
    place = torch.empty_like(image)
    place[order] = torch.arange(len(image), device=image.device) - (counts.cumsum(0) - counts)[image[order]]
    L = max(counts.tolist(), default=0)
    wy = wy.new_zeros(N, L, rows, H).index_put((image, place), wy)
    wx = wx.new_zeros(N, L, columns, W).index_put((image, place), wx)
    with torch.autocast(input.device.type, enabled=False):
        pooled = torch.einsum("nlyh,nlxw,nchw->nlcyx", wy, wx, input.to(dtype))
    return pooled[image, place].to(input.dtype)


def pool_regions(feature_map, boxes, stride, operator):
    """The mean of a map over each box, as a vector.

    Args:
        feature_map: (B, C, H, W). boxes: (B, A, 4) in pixels of the view. stride: pixels between two cells.
        operator: "prroi", or "roi_align" (PAPER: section 4.1; AMBIGUOUS: R12. aligned, as many points as cells).
    Returns:
        (B, A, C) fp32
    """
    if operator == "roi_align":
        pooled = ops.roi_align(feature_map.float(), list(boxes), 1, 1 / stride, aligned=True)
    else:
        pooled = prroi_pool(feature_map.float(), list(boxes), 1, 1 / stride)
    return pooled.view(*boxes.shape[:2], -1)


def neighbourhoods(feature_map, kernel):
    """Every kernel x kernel neighbourhood of a map, averaged: "stride one average pooling", appendix A.1.

    OFFICIAL: R11. Averages first, normalised afterwards. (B, C, H, W) -> (B, H' W', C), H' = H - kernel + 1
    """
    return F.avg_pool2d(feature_map.float(), kernel, stride=1).flatten(2).transpose(1, 2)


# ======================================================================================================================
# Encoders: backbone f, top-down path, and the heads g of images and regions (sections 3.3, 3.4)
# ======================================================================================================================


class Pyramid(nn.Module):
    """The lateral convolutions and the top-down path of a feature pyramid. OFFICIAL: R16. Biases, no norms.

    PAPER: section 3.3, "Region similarity on feature pyramids". Output convolutions, if any, are the regions' heads.
    """

    def __init__(self, widths):
        super().__init__()
        self.laterals = nn.ModuleDict({f"c{i}": nn.Conv2d(widths[i - 2], PYRAMID, 1) for i in (3, 4, 5)})
        init_as_pyramid(self.laterals.values())

    def forward(self, c3, c4, c5):
        """(B, C, H, W) of each stage -> {"p4": (B, 256, H, W), "p3": (B, 256, H, W)}"""
        p5 = self.laterals["c5"](c5)
        p4 = self.laterals["c4"](c4) + F.interpolate(p5, c4.shape[2:])  # nearest neighbour: each cell twice a side
        p3 = self.laterals["c3"](c3) + F.interpolate(p4, c3.shape[2:])
        return {"p4": p4, "p3": p3}


def level_maps(stages, pyramid):
    """From C2..C5 to {name of a level: the map that its regions come from}: P4 and P3, or C4 if there is no pyramid."""
    _, c3, c4, c5 = stages
    return pyramid(c3, c4, c5) if pyramid else {"c4": c4}


def init_as_pyramid(convolutions):
    """Uniform with variance 1 / fan-in, no bias, as torchvision and Detectron2 start the convolutions of a pyramid."""
    for convolution in convolutions:
        nn.init.kaiming_uniform_(convolution.weight, a=1)
        nn.init.zeros_(convolution.bias)


class Encoded(NamedTuple):
    """What an Encoder makes of a view, unnormalised."""

    image: torch.Tensor  # (B, D)
    maps: tuple  # of (B, D, H, W), one for each level


class Encoder(nn.Module):
    """Backbone with MoCo-v2's projector for images and convolutional heads for the maps that regions are pooled from.

    PAPER: section 3.4, "two 3x3 convolutions ... to 128 channels" with BN and ReLU between (AMBIGUOUS: R6, R7, R24, R25).
    OFFICIAL: R5. The released code has a pyramid's one output convolution in their place, to 256 channels.
    """

    def __init__(self, arch, dim, levels, official, group_size):
        super().__init__()
        self.group_size, self.names = group_size, [level.name for level in levels]
        self.trunk = common.ResNetTrunk(arch)
        C = self.trunk.widths[-1]
        self.image_head = nn.Sequential(nn.Linear(C, C), nn.ReLU(), nn.Linear(C, dim))
        self.pyramid = Pyramid(self.trunk.widths) if "p4" in self.names else None
        self.region_heads = nn.ModuleDict()
        for level in levels:
            C = level.channels(self.trunk.widths)
            if official:
                self.region_heads[level.name] = nn.Conv2d(C, PYRAMID, 3, padding=1)
                init_as_pyramid([self.region_heads[level.name]])
            else:
                self.region_heads[level.name] = nn.Sequential(
                    nn.Conv2d(C, dim, 3, padding=1, bias=False), nn.BatchNorm2d(dim), nn.ReLU(), nn.Conv2d(dim, dim, 3, padding=1)
                )  # fmt: skip

    def encode(self, images):
        return self.project(self.trunk(common.normalise(images)))

    def project(self, stages):
        """C2..C5, (B, C, H, W) each -> image (B, D), and the map (B, D, H, W) of each level"""
        image = self.image_head(stages[-1].mean((2, 3)))
        maps = level_maps(stages, self.pyramid)
        return image, *(self.region_heads[name](maps[name]) for name in self.names)

    def forward(self, view):
        """(B, 3, size, size) uint8 -> Encoded. Batch statistics are per group of images."""
        image, *maps = common.encode_in_groups(self.encode, self.group_size, view)
        return Encoded(image, tuple(maps))


class Predicted(NamedTuple):
    """What a SimSiamEncoder makes of a view, unnormalised. E is a head's width."""

    projection: torch.Tensor  # (B, E)
    prediction: torch.Tensor  # (B, E)
    regions: tuple  # of (projection, prediction), (R, E) each, one for each level


class SimSiamEncoder(nn.Module):
    """Backbone with SimSiam's projector and predictor for images, and the same for the pooled regions of each level.

    PAPER: section 4.1, "Self-supervised learning frameworks", and Table 7's widths: those of the stages C5, C4, C3.
    AMBIGUOUS: R19, R20. Regions are pooled first, from C4 or the merged maps of the pyramid, and then go through
    SimSiam's three-layer projector and its predictor.
    """

    def __init__(self, arch, levels, operator):
        super().__init__()
        self.levels, self.operator = levels, operator
        self.trunk = common.ResNetTrunk(arch, zero_init_residual=True)  # OFFICIAL: B16, R27. SimSiam's
        C = self.trunk.widths[-1]
        self.projector, self.predictor = simsiam_heads(C, C)
        self.pyramid = Pyramid(self.trunk.widths) if "p4" in [level.name for level in levels] else None
        self.region_projectors, self.region_predictors = nn.ModuleDict(), nn.ModuleDict()
        for level in levels:
            E = self.trunk.widths[level.stage]
            heads = simsiam_heads(level.channels(self.trunk.widths), E)
            self.region_projectors[level.name], self.region_predictors[level.name] = heads

    def encode(self, images, boxes, valid):
        stages = self.trunk(common.normalise(images))  # (B, C, H, W) each
        maps = level_maps(stages, self.pyramid)
        projection = self.projector(stages[-1].mean((2, 3)))  # (B, E)
        regions = []
        for level, b, v in zip(self.levels, boxes, valid, strict=True):
            vectors = pool_regions(maps[level.name], b, level.stride, self.operator)  # (B, A, C)
            rows = vectors[v]  # (R, C) AMBIGUOUS: R22. The others stay out of the batch statistics.
            projected = self.region_projectors[level.name](rows)  # (R, E)
            regions.append((projected, self.region_predictors[level.name](projected)))
        return Predicted(projection, self.predictor(projection), tuple(regions))

    def forward(self, view_q, view_k, pairs):
        """(B, 3, size, size) uint8 each, [Pairs of each level] -> Predicted of each view"""
        valid = [pair.valid for pair in pairs]
        query = self.encode(view_q, [pair.boxes_q for pair in pairs], valid)
        return query, self.encode(view_k, [pair.boxes_k for pair in pairs], valid)


def simsiam_heads(inputs, E):
    """SimSiam's projector inputs-E-E-E and predictor E-E/4-E. PAPER: Table 7."""
    projector = nn.Sequential(
        nn.Linear(inputs, E, bias=False), nn.BatchNorm1d(E), nn.ReLU(),
        nn.Linear(E, E, bias=False), nn.BatchNorm1d(E), nn.ReLU(),
        nn.Linear(E, E, bias=False), nn.BatchNorm1d(E, affine=False),  # DEVIATION: B7. SimSiam freezes a bias that norm removes.
    )  # fmt: skip
    predictor = nn.Sequential(nn.Linear(E, E // 4, bias=False), nn.BatchNorm1d(E // 4), nn.ReLU(), nn.Linear(E // 4, E))
    return projector, predictor


# ======================================================================================================================
# Losses. All embeddings that come in are unit vectors in fp32.
# ======================================================================================================================


class NegativeLogSumExp(torch.autograd.Function):
    """log sum_k exp(q . k / tau) over a queue that needs no gradient, in memory that does not grow with R x K.

    Its gradient is the softmax-weighted mean of the queue, (R, D), so the forward pass computes it chunk by chunk and
    no logit has to be kept for the backward pass: the same two matrix products as plain autograd.
    """

    @staticmethod
    def forward(ctx, q, queue, temperature, elements):
        values, gradients = [], []
        for rows in q.split(max(1, elements // len(queue))):
            logits = rows @ queue.T / temperature  # (r, K)
            values.append(logits.logsumexp(1))
            gradients.append((logits - values[-1][:, None]).exp_() @ queue / temperature)  # (r, D)
        ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(values)

    @staticmethod
    def backward(ctx, gradient):
        return gradient[:, None] * ctx.saved_tensors[0], None, None, None


def negative_logsumexp(q, queue, temperature, elements=2**24):
    """The negatives' part of a contrastive denominator: log sum_k exp(q . k / tau).

    Args:
        q: (R, D), with gradient. queue: (K, D), without. elements: size limit of the largest tensor on the way.
    Returns:
        (R,)
    """
    return NegativeLogSumExp.apply(q, queue, temperature, elements)


def image_contrastive_loss(q, k, queue, temperature):
    """PAPER: Eqs. 3 and 4, MoCo's InfoNCE: -log( exp(q.k+) / (exp(q.k+) + sum exp(q.k-)) ), mean over images.

    DEVIATION: R28. Eq. 4 is printed without its -log.

    Args:
        q, k: (B, D). queue: (K, D). temperature: tau.
    """
    positive = (q * k).sum(1) / temperature  # (B,)
    return (torch.logaddexp(positive, negative_logsumexp(q, queue, temperature)) - positive).mean()


def mean_over_regions(values, valid, per_image):
    """The average of Eq. 2 over all images and their valid regions.

    Args:
        values: (R,), of the valid regions in the order of valid.nonzero(). valid: (B, A) bool.
        per_image: True, PAPER: Eq. 2's 1/n: an image's valid regions first, then the images that have any. False,
            OFFICIAL: R4: all valid regions alike, whosever they are.
    Returns:
        scalar; exactly 0, with zero gradients, if no region is valid (OFFICIAL: R3).
    """
    if not per_image:
        return values.sum() / valid.sum().clamp(min=1)
    image = valid.nonzero()[:, 0]  # (R,)
    return (values / valid.sum(1)[image]).sum() / valid.any(1).sum().clamp(min=1)


def region_contrastive_loss(q, k, valid, negatives, temperature, per_image=True):
    """PAPER: Eqs. 1 and 2: -log( E_ii / (E_ii + sum_j!=i E_ij + sum_kj E_ij) ), E_ij = exp(q_i . k_j / tau).

    DEVIATION: R28. Eq. 2 is printed without its -log.
    OFFICIAL: R8. The two sums, over other regions of the same image and over those of other images, are one sum over the
    same negatives for every row, none masked: the place of its own positive is among them.

    Args:
        q, k: (B, A, D), regions and their counterparts. valid: (B, A) bool. negatives: (M, D), without gradient.
        temperature: tau. per_image: see mean_over_regions.
    Returns:
        scalar; exactly 0 if no region is valid.
    """
    q, k = q[valid], k[valid]  # (R, D)
    positive = (q * k).sum(1) / temperature  # (R,)
    row_loss = torch.logaddexp(positive, negative_logsumexp(q, negatives, temperature)) - positive  # (R,)
    return mean_over_regions(row_loss, valid, per_image)


def image_cosine_loss(prediction, projection):
    """SimSiam: negative cosine of (B, D) predictions and (B, D) projections, through which no gradient flows."""
    return -F.cosine_similarity(prediction, projection.detach(), dim=1).mean()


def region_cosine_loss(prediction, projection, valid, per_image=True):
    """SimSiam's loss on regions: (R, D) predictions and projections of the valid ones, averaged as in Eq. 2.

    valid: (B, A) bool -> scalar; exactly 0 if no region is valid.
    """
    cosine = F.cosine_similarity(prediction, projection.detach(), dim=1)  # (R,)
    return mean_over_regions(-cosine, valid, per_image)


# ======================================================================================================================
# Method: one iteration, from views to the loss
# ======================================================================================================================


def health(name, valid, vectors):
    """The numbers of a log line that tell whether a level's regions are alive (scalars on the device).

    Args: valid: (B, A) bool. vectors: (R, D), unit vectors of valid regions.
    """
    return {
        f"valid_{name}": valid.float().mean(),  # share of windows
        f"empty_{name}": (~valid.any(1)).float().mean(),  # share of images without any
        f"std_{name}": vectors.std(0, correction=0).mean() if len(vectors) else vectors.new_zeros(()),
    }


class Seen(NamedTuple):
    """What one level makes of two views, for the pictures."""

    pairs: Pairs
    similarity: torch.Tensor  # (B, A, H', W'), of each window of view q to each neighbourhood of view k


class ReSimMoCo(nn.Module):
    """ReSim on MoCo-v2: momentum encoder, shuffling BN, a queue of image keys; regions need none (section 3.4).

    Args:
        encoder: an Encoder. levels: its Levels. size: side of a view. operator: see pool_regions.
        per_image: see mean_over_regions. queue_size, dim, ema, temperature, loss_weight, seed: see get_args.
        autocast: context manager factory for the encoders.
    """

    def __init__(
        self, encoder, levels, size, operator, per_image, dim, queue_size, ema, temperature, loss_weight, seed, autocast
    ):
        super().__init__()
        self.query, self.key = encoder, copy.deepcopy(encoder).requires_grad_(False)
        self.image_queue = common.Queue(queue_size, dim, common.generator("image queue", seed))
        self.levels, self.size, self.operator, self.per_image = levels, size, operator, per_image
        self.ema, self.temperature, self.loss_weight, self.seed = ema, temperature, loss_weight, seed
        self.autocast = autocast

    @torch.no_grad()
    def encode_keys(self, view, permutation):
        """The key network on shuffled images, and its outputs back in order."""
        with self.autocast():
            key = self.key(common.shuffle(view, permutation))
        return Encoded(
            common.unshuffle(key.image, permutation), tuple(common.unshuffle(m, permutation) for m in key.maps)
        )

    def compare(self, level, map_q, map_k, pairs):
        """One level's loss: PAPER: Eqs. 1 and 2, in groups of images, then the mean over groups."""
        q = F.normalize(pool_regions(map_q, pairs.boxes_q, level.stride, self.operator), dim=2)  # (B, A, D)
        k = F.normalize(pool_regions(map_k, pairs.boxes_k, level.stride, self.operator), dim=2)  # (B, A, D)
        near = F.normalize(neighbourhoods(map_k, level.kernel), dim=2)  # (B, H' W', D)
        far = common.all_gather(near) if level.gathered else None  # OFFICIAL: R10
        losses = []
        for group in torch.arange(len(q), device=q.device).tensor_split(math.ceil(len(q) / self.query.group_size)):
            negatives = (far if level.gathered else near[group]).flatten(0, 1)  # (M, D)
            valid = pairs.valid[group]
            losses.append(
                region_contrastive_loss(q[group], k[group], valid, negatives, self.temperature, self.per_image)
            )
        loss = torch.stack(losses).mean()
        return loss, {f"loss_{level.name}": loss.detach()} | health(level.name, pairs.valid, q.detach()[pairs.valid])

    def forward(self, network, view_q, view_k, crop_q, crop_k, step, rank=0):
        """One iteration.

        Args:
            network: self.query, wrapped in DistributedDataParallel where there are several processes.
            view_q, view_k: (B, 3, size, size) uint8. crop_q, crop_k: (B, 4). step: key of random draws.
        Returns:
            loss (scalar), {name: detached scalar}
        """
        # 1. queries
        with self.autocast():
            query = network(view_q)
        # 2. the momentum encoder follows, once a step and before its keys are computed
        common.momentum_update(self.key, self.query, self.ema)
        # 3. keys, in other company than their queries
        batch = len(view_q) * common.world_size()
        permutation = torch.randperm(batch, generator=common.generator("shuffle", self.seed, step))
        key = self.encode_keys(view_k, permutation)
        # 4. compare the images
        q, k = F.normalize(query.image.float(), dim=1), F.normalize(key.image.float(), dim=1)  # (B, D)
        image_loss = image_contrastive_loss(q, k, self.image_queue.vectors, self.temperature)
        values = {"loss_image": image_loss.detach(), "std_image": q.detach().std(0, correction=0).mean()}
        # 5. compare the regions, level by level (OFFICIAL: R13, R23. Their losses are added, tau is shared)
        region_loss = 0
        for level, map_q, map_k in zip(self.levels, query.maps, key.maps, strict=True):
            pairs = region_pairs(crop_q, crop_k, self.size, level.window, level.step)
            level_loss, level_values = self.compare(level, map_q, map_k, pairs)
            region_loss, values = region_loss + level_loss, values | level_values
        loss = region_loss + self.loss_weight * image_loss  # PAPER: Eq. 5
        # 6. the image keys of this step become negatives of later ones
        self.image_queue.enqueue(common.all_gather(k))
        return loss, {"loss": loss.detach(), **values}

    @torch.no_grad()
    def see(self, view_q, view_k, crop_q, crop_k):
        """C4 of both views, (B, C, H, W), and [Seen of each level]; batch statistics are these images' together."""
        with self.autocast():
            stages_q, stages_k = self.query.trunk(common.normalise(view_q)), self.key.trunk(common.normalise(view_k))
            _, *maps_q = self.query.project(stages_q)
            _, *maps_k = self.key.project(stages_k)
        seen = []
        for level, map_q, map_k in zip(self.levels, maps_q, maps_k, strict=True):
            pairs = region_pairs(crop_q, crop_k, self.size, level.window, level.step)
            q = F.normalize(pool_regions(map_q, pairs.boxes_q, level.stride, self.operator), dim=2)  # (B, A, D)
            near = F.normalize(neighbourhoods(map_k, level.kernel), dim=2)  # (B, H' W', D)
            seen.append(Seen(pairs, as_grid(q @ near.transpose(1, 2))))
        return stages_q[2].float(), stages_k[2].float(), seen


def as_grid(similarity):
    """(B, A, n n) -> (B, A, n, n)"""
    side = math.isqrt(similarity.shape[2])
    return similarity.unflatten(2, (side, side))


class ReSimSimSiam(nn.Module):
    """ReSim on SimSiam: one network with predictors, no negatives. AMBIGUOUS: R27. The same pairs serve both directions."""

    def __init__(self, encoder, levels, size, loss_weight, autocast):
        super().__init__()
        self.query = encoder
        self.levels, self.size, self.loss_weight, self.autocast = levels, size, loss_weight, autocast

    def forward(self, network, view_q, view_k, crop_q, crop_k, step, rank=0):
        """One iteration; arguments and results as ReSimMoCo.forward."""
        pairs = [region_pairs(crop_q, crop_k, self.size, level.window, level.step) for level in self.levels]
        pairs = [pair._replace(valid=pair.valid & (pair.valid.sum() > 1)) for pair in pairs]  # batch norm needs two
        with self.autocast():
            q, k = network(view_q, view_k, pairs)
        forth = image_cosine_loss(q.prediction.float(), k.projection.float())
        image_loss = (forth + image_cosine_loss(k.prediction.float(), q.projection.float())) / 2
        image = F.normalize(k.projection.detach().float(), dim=1)
        values = {"loss_image": image_loss.detach(), "std_image": image.std(0, correction=0).mean()}
        region_loss = 0
        for level, pair, region_q, region_k in zip(self.levels, pairs, q.regions, k.regions, strict=True):
            (z_q, p_q), (z_k, p_k) = ([x.float() for x in region] for region in (region_q, region_k))  # (R, E)
            level_loss = (region_cosine_loss(p_q, z_k, pair.valid) + region_cosine_loss(p_k, z_q, pair.valid)) / 2
            region_loss, values[f"loss_{level.name}"] = region_loss + level_loss, level_loss.detach()
            values |= health(level.name, pair.valid, F.normalize(z_k.detach(), dim=1))
        loss = region_loss + self.loss_weight * image_loss  # PAPER: Eq. 5
        return loss, {"loss": loss.detach(), **values}

    @torch.no_grad()
    def see(self, view_q, view_k, crop_q, crop_k):
        """As ReSimMoCo.see; the similarities are those of predictions to projections."""
        with self.autocast():
            stages_q, stages_k = (self.query.trunk(common.normalise(view)) for view in (view_q, view_k))
            maps_q, maps_k = (level_maps(stages, self.query.pyramid) for stages in (stages_q, stages_k))
        seen = []
        for level in self.levels:
            pairs = region_pairs(crop_q, crop_k, self.size, level.window, level.step)
            project, predict = self.query.region_projectors[level.name], self.query.region_predictors[level.name]
            q = pool_regions(maps_q[level.name], pairs.boxes_q, level.stride, self.query.operator)  # (B, A, C)
            near = neighbourhoods(maps_k[level.name], level.kernel)  # (B, H' W', C)
            q = F.normalize(predict(project(q.flatten(0, 1))), dim=1).view(*q.shape[:2], -1)  # (B, A, E)
            near = F.normalize(project(near.flatten(0, 1)), dim=1).view(*near.shape[:2], -1)  # (B, H' W', E)
            seen.append(Seen(pairs, as_grid(q @ near.transpose(1, 2))))
        return stages_q[2].float(), stages_k[2].float(), seen


# ======================================================================================================================
# Weights for others: the released layout, and the pyramid under torchvision's names
# ======================================================================================================================

# OFFICIAL: R5. Ours with --preset official, and what the released code calls it.
RELEASED = {
    "query.": "module.encoder_q.", "key.": "module.encoder_k.", "trunk.": "", "image_head.": "fc.",
    "pyramid.laterals.c": "fpn_lateral", "region_heads.p": "fpn_output",
    "image_queue.vectors": "module.queue", "image_queue.pointer": "module.queue_ptr",
}  # fmt: skip


def released_name(name):
    """query.pyramid.laterals.c4.weight -> module.encoder_q.fpn_lateral4.weight, and so on."""
    for ours, theirs in RELEASED.items():
        name = name.replace(ours, theirs)
    return name


def to_released(state):
    """The state_dict of a released checkpoint from that of a ReSimMoCo with --preset official."""
    return {
        released_name(name): tensor.T if name == "image_queue.vectors" else tensor for name, tensor in state.items()
    }


def from_released(state, names):
    """The tensors `names` (ours) of a ReSimMoCo with --preset official from a released checkpoint's state_dict.

    Errors:
        KeyError: the released name of a tensor that is not there.
    """
    found = {name: state[released_name(name)] for name in names}
    return {name: tensor.T if name == "image_queue.vectors" else tensor for name, tensor in found.items()}


def load_init(encoder, source, arch):
    """Start from given weights: the backbone of any checkpoint; the whole query network of a released one, if it fits.

    Errors:
        UserError: see common.load_backbone; or a released checkpoint whose other tensors are missing or misshapen.
    """
    weights, line = common.load_backbone(source, arch)
    encoder.trunk.load_state_dict(weights)
    print0(line)
    state = {} if source == "imagenet" else common.load_checkpoint_file(source)
    if isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    names = [f"query.{name}" for name in encoder.state_dict()]
    head = "query.region_heads.p4.weight"  # of --preset official alone
    if head in names and released_name(head) in state:
        try:
            weights = from_released(state, names)
            encoder.load_state_dict({name.removeprefix("query."): tensor for name, tensor in weights.items()})
        except KeyError as error:
            raise UserError(
                f"{source}: {error.args[0]} is missing, so this is not a whole released checkpoint"
            ) from None
        except RuntimeError as error:
            raise UserError(f"{source}: not of this --dim ({' '.join(str(error).split())[:200]})") from None
        print0("a released checkpoint: its projector and its FPN convolutions are taken as well")


def fpn_weights(network):
    """What a torchvision FPN over C2..C5 can take over: `detector.backbone.fpn.load_state_dict(..., strict=False)`.

    OFFICIAL: R17. Laterals of C3..C5, and output convolutions of P3 and P4 where the regions' heads are such
    (--preset official); those of other levels have not been trained. The biases have no place in an FPN with norms.
    """
    convolutions = {f"inner_blocks.{i - 2}": network.pyramid.laterals[f"c{i}"] for i in (3, 4, 5)}
    for name, head in getattr(network, "region_heads", {}).items():
        if isinstance(head, nn.Conv2d):
            convolutions[f"layer_blocks.{int(name[1]) - 2}"] = head
    return {
        f"{block}.0.{name}": tensor
        for block, convolution in convolutions.items()
        for name, tensor in convolution.state_dict().items()
    }


def build(args, world, init=None):
    """The method that the settings describe, on its device, equal on all processes; `init`: weights to start from."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.amp, torch.float32)

    def autocast():
        return torch.autocast(world.device.type, dtype, enabled=args.amp != "none")

    levels, official = make_levels(args), args.preset == "official"
    with common.drawing("init", args.seed):
        if args.framework == "moco":
            encoder = Encoder(args.arch, args.dim, levels, official, args.group_size)
        else:
            encoder = SimSiamEncoder(args.arch, levels, args.pool)
    if init:
        load_init(encoder, init, args.arch)
    if args.framework == "moco":
        method = ReSimMoCo(
            encoder, levels, args.size, args.pool, per_image=not official, dim=args.dim, queue_size=args.queue_size,
            ema=args.ema, temperature=args.temperature, loss_weight=args.loss_weight, seed=args.seed, autocast=autocast,
        )  # fmt: skip
    else:
        if world.size > 1 and world.device.type == "cuda":
            encoder = nn.SyncBatchNorm.convert_sync_batchnorm(encoder)
        elif world.size > 1:
            print0("synchronised batch norm needs CUDA: each process takes the statistics of its own images")
        method = ReSimSimSiam(encoder, levels, args.size, args.loss_weight, autocast)
    return method.to(world.device, memory_format=torch.channels_last)


# ======================================================================================================================
# What the regions see: a picture and a number, on fixed crops
# ======================================================================================================================


def cell_centres(window, H, W):
    """Image coordinates of the centres of a view's H x W cells, row by row.

    Args:
        window: (B, 4), what the view shows, as two_views gives it.
    Returns:
        centres: (B, S, 2), x and y. diagonal: (B,), length of a cell's diagonal.
    """
    x0, y0, x1, y1 = window.unbind(1)
    width, height = (x1 - x0) / W, (y1 - y0) / H
    x = x0[:, None] + (torch.arange(W, device=window.device) + 0.5) * width[:, None]  # (B, W)
    y = y0[:, None] + (torch.arange(H, device=window.device) + 0.5) * height[:, None]  # (B, H)
    x, y = x[:, None, :].expand(-1, H, -1), y[:, :, None].expand(-1, -1, W)
    return torch.stack([x, y], dim=3).flatten(1, 2), torch.hypot(width, height)


def correspondence_accuracy(similarity, window_q, window_k, H, W):
    """How often the most similar key cell lies within one cell of the true place.

    Args:
        similarity: (B, S, S). window_q, window_k: (B, 4), what the views show, see two_views.
    Returns:
        hits, chance, cells: the share of query cells whose arg-max is at most one row and one column away from where
        their centre lies in the key view; the same for an arg-max drawn evenly; and how many query cells have their
        centre in the key view (only those count).
    """
    centres, _ = cell_centres(window_q, H, W)  # (B, S, 2)
    start, end = window_k[:, None, :2], window_k[:, None, 2:]
    place = (centres - start) / (end - start)  # (B, S, 2), 0 to 1 across the key view
    inside = ((place >= 0) & (place < 1)).all(2)  # (B, S)
    true = place * torch.tensor([W, H], device=place.device) - 0.5  # in cells, an integer at a cell's centre
    cell = torch.arange(H * W, device=place.device)
    offset = true[:, :, None] - torch.stack([cell % W, cell // W], 1)  # (B, S, S, 2)
    near = (offset.abs() < 1.001).all(3)  # (B, S, S)
    hit = near.gather(2, similarity.argmax(2, keepdim=True))[:, :, 0]
    return hit[inside].float().mean().item(), near[inside].float().mean().item(), int(inside.sum())


def probe(method, images, args, world, title):
    """On fixed pairs of crops: draw OUTPUT_DIR/regions_<title>.png, print and return the correspondence accuracy.

    The accuracy is that of the backbones' C4. The networks are copies in training mode, so that batch statistics are
    what the loss sees and nothing is changed. All processes compute the same (synchronised batch norm waits for all);
    the first one draws.
    """
    method = copy.deepcopy(method)
    hits, chances, cells, alive = 0.0, 0.0, 0, set()
    for first in range(0, 256 if args.demo else 32, 32):
        pairs = []
        for i in range(first, first + 32):
            with common.drawing("probe", args.seed, i):
                pairs.append(two_views(images.probe(i), args.size, False))
        view_q, view_k, crop_q, crop_k = (torch.stack(x).to(world.device) for x in zip(*pairs, strict=True))
        c4_q, c4_k, seen = method.see(view_q, view_k, crop_q, crop_k)
        alive |= {level.name for level, (found, _) in zip(method.levels, seen, strict=True) if found.valid.any()}
        if first == 0 and world.rank == 0:
            path = os.path.join(args.output_dir, f"regions_{title}.png")
            draw_regions(path, view_q[:6], view_k[:6], crop_q[:6], crop_k[:6], seen, method.levels)
        H, W = c4_q.shape[2:]
        c4_q, c4_k = (F.normalize(c4.flatten(2), dim=1) for c4 in (c4_q, c4_k))  # (B, C, S)
        hit, chance, n = correspondence_accuracy(c4_q.transpose(1, 2) @ c4_k, crop_q, crop_k, H, W)
        hits, chances, cells = hits + hit * n, chances + chance * n, cells + n
    for level in method.levels:
        if level.name not in alive:
            print0(f"warning: no window of {level.window} pixels is valid on {level.name.upper()}: it has no loss")
    hits, chances = hits / cells, chances / cells
    where = "held-out scenes" if images.held_out else "fixed crops of the training images"
    print0(
        f"{title} of training: best match on C4 within one cell of the true place for {hits:.1%} of {cells} cells on "
        f"{where} (chance {chances:.1%})"
    )
    return {"hits": hits, "chance": chances, "cells": cells}


COLOURS = ((255, 255, 255), (255, 176, 0), (64, 200, 255), (230, 60, 60), (110, 220, 90))


def draw_regions(path, view_q, view_k, crop_q, crop_k, seen, levels):
    """PAPER: Figures 2 and 3. A row per image and, for each level, three panels: view q, view k, similarities.

    What a view does not share with the other is dark. Up to five valid windows and where they lie in view k have
    matching colours. The third panel is view k again, with the similarity of the white window to each neighbourhood
    of the key map, at the neighbourhood's centre: dark blue lowest, yellow highest.

    Args:
        view_q, view_k: (n, 3, size, size) uint8. crop_q, crop_k: (n, 4). seen: [Seen of each level], of these images
        or of more. levels: their Levels.
    """
    side, gap, size = 224, 6, view_q.shape[2]
    canvas = Image.new("RGB", (3 * len(levels) * (side + gap) + gap, len(view_q) * (side + gap) + 20), "white")
    draw = ImageDraw.Draw(canvas)
    whole = torch.tensor([[0.0, 0.0, size, size]], device=crop_q.device)
    shared_q, shared_k = map_boxes(whole, crop_k, crop_q, size), map_boxes(whole, crop_q, crop_k, size)  # (n, 1, 4)

    def corner(row, column):
        return gap + column * (side + gap), 20 + row * (side + gap)

    def panel(row, column, picture, shared):
        """Paste a view, dark outside the shared box."""
        dark = Image.eval(picture, lambda value: value // 3)
        x0, y0, x1, y1 = (round(x) for x in shared.clamp(0, size).tolist())
        if x0 < x1 and y0 < y1:
            dark.paste(picture.crop((x0, y0, x1, y1)), (x0, y0))
        canvas.paste(dark.resize((side, side)), corner(row, column))

    def outline(row, column, box, colour):
        left, top = corner(row, column)
        x0, y0, x1, y1 = (x * side / size for x in box.tolist())
        draw.rectangle((left + x0, top + y0, left + x1 - 1, top + y1 - 1), outline=colour, width=2)

    def heat(picture, similarity, level):
        """A view under the similarities, (H', W'), each a square of one cell around its neighbourhood's centre."""
        low, high = similarity.min(), similarity.max()
        value = ((similarity - low) / (high - low).clamp(min=1e-6)).cpu().numpy()[..., None]
        value = 255 * np.concatenate([value, 0.8 * value, 0.5 - 0.5 * value], 2)  # dark blue to yellow
        colours = Image.fromarray(value.astype(np.uint8)).resize([level.stride * n for n in value.shape[1::-1]], 0)
        under, first = picture.convert("L").convert("RGB"), round(level.stride * (level.kernel - 2) / 2)
        over = under.copy()
        over.paste(colours, (first, first))
        return Image.blend(under, over, 0.6)

    for i, (level, (pairs, similarity)) in enumerate(zip(levels, seen, strict=True)):
        titles = (f"{level.name.upper()}: view q", "view k, the same windows", "view k, similarity to the white one")
        for column, title in enumerate(titles, 3 * i):
            draw.text((corner(0, column)[0], 4), title, fill="black")
        for row in range(len(view_q)):
            picture_q, picture_k = (TF.to_pil_image(view[row].cpu()) for view in (view_q, view_k))
            panel(row, 3 * i, picture_q, shared_q[row, 0])
            panel(row, 3 * i + 1, picture_k, shared_k[row, 0])
            valid = pairs.valid[row].nonzero()[:, 0].tolist()
            if not valid:
                panel(row, 3 * i + 2, picture_k, whole[0])
                continue
            drawn = torch.randperm(len(valid), generator=common.generator("windows", row))[: len(COLOURS)]
            chosen = [valid[i] for i in drawn.tolist()]
            panel(row, 3 * i + 2, heat(picture_k, similarity[row, chosen[0]], level), whole[0])
            for window, colour in reversed([*zip(chosen, COLOURS, strict=False)]):
                outline(row, 3 * i, pairs.boxes_q[row, window], colour)
                outline(row, 3 * i + 1, pairs.boxes_k[row, window], colour)
            outline(row, 3 * i + 2, pairs.boxes_k[row, chosen[0]], COLOURS[0])
    canvas.save(path)


# ======================================================================================================================
# Training
# ======================================================================================================================

NAME = "resim"
EVERY_LEVEL = ("c4", "p4", "p3")
CURVES = {
    "loss of images": ["loss_image", "=loss_chance"],
    "losses of regions": [*(f"loss_{name}" for name in EVERY_LEVEL), *(f"=chance_{name}" for name in EVERY_LEVEL)],
    "std of unit embeddings (collapse: 0)": ["std_image", *(f"std_{name}" for name in EVERY_LEVEL), "=std_spread"],
    "share of windows that are valid": [f"valid_{name}" for name in EVERY_LEVEL],
    "share of images without a valid window": [f"empty_{name}" for name in EVERY_LEVEL],
    "learning rate": ["lr"],
}
FREE = ("data", "output_dir", "demo", "steps", "workers", "print_freq", "save_every", "resume", "given")


def fit_batch_and_queue(args, images, world):
    """Check that batch, processes, groups and data go together; shrink a queue that nobody asked for to the data."""
    share = args.batch_size // world.size
    if args.batch_size % world.size:
        raise UserError(f"--batch-size {args.batch_size} is not divisible by {world.size} processes")
    if share < 2:
        raise UserError(f"--batch-size {args.batch_size} leaves one image for each process: batch norm needs two")
    if len(images) < args.batch_size:
        raise UserError(f"{len(images)} images are fewer than --batch-size {args.batch_size}: give a smaller one")
    if args.framework == "simsiam":
        return
    groups = -(-share // args.group_size)
    if share // groups < 2:
        raise UserError(
            f"{share} images a process in groups of {args.group_size} leave one alone: batch norm needs two"
        )
    if share / groups != args.group_size:
        print0(f"batch norm: groups of {share // groups} images instead of {args.group_size}")
    if groups * world.size == 1:
        print0("warning: one group of images: shuffling batch norm does nothing, and keys may leak through it")
    fitting = max(1, len(images) // args.batch_size - 1) * args.batch_size
    if args.queue_size > fitting and "queue_size" in args.given:
        print0(f"warning: --queue-size {args.queue_size} can hold several keys of one image (there are {len(images)})")
    elif args.queue_size > fitting:
        print0(
            f"queue: {fitting} keys instead of {args.queue_size}, not to hold two of one image ({len(images)} images)"
        )
        args.queue_size = fitting


def yardsticks(args, method, world):
    """What stands beside the values of every log line: losses of a random guess, spreads of evenly drawn directions."""
    share = args.batch_size // world.size
    group = share // math.ceil(share / args.group_size)
    moco, widths = args.framework == "moco", method.query.trunk.widths
    found = {"loss_chance": math.log(args.queue_size + 1) if moco else None}
    found["std_spread"] = (args.dim if moco else widths[-1]) ** -0.5
    for level in method.levels:
        side = math.ceil(args.size / level.stride) - level.kernel + 1
        negatives = side**2 * (args.batch_size if level.gathered else group)
        width = widths[level.stage] if not moco else PYRAMID if args.preset == "official" else args.dim
        found[f"chance_{level.name}"] = math.log(negatives + 1) if moco else None
        found[f"spread_{level.name}"] = width**-0.5
    return found


def exports(args, method):
    """{file name: weights} for others to take: the query backbone, and its pyramid if it has one."""
    weights = {f"{args.arch}.pth": method.query.trunk.state_dict()}
    return weights | ({"fpn.pth": fpn_weights(method.query)} if args.levels == "fpn" else {})


def main(argv=None):
    args = get_args(argv)
    world = common.start_processes()
    stop_signal = common.StopSignal()
    if args.demo and "amp" not in args.given and common.bf16_is_fast(world.device):
        args.amp = "bf16"

    # data -------------------------------------------------------------------------------------------------------------
    images = common.open_images(args.data, args.size, args.seed)
    fit_batch_and_queue(args, images, world)
    epoch_steps = len(images) // args.batch_size
    total = args.epochs * epoch_steps
    last = total if args.steps is None else min(total, args.steps)

    # method, optimiser, resume ----------------------------------------------------------------------------------------
    settings = {name: value for name, value in vars(args).items() if name not in FREE}
    settings |= {"files": images.fingerprint(), "processes": world.size}
    checkpoints = common.Checkpoints(args.output_dir, NAME, settings)
    state = checkpoints.load(args.resume)
    common.require_agreement(
        (settings["files"], state and state["step"]),
        "the processes see different images or checkpoints: --data and --output-dir must be the same on all machines",
    )
    method = build(args, world, None if state else args.init)
    network = method.query
    lr = args.lr * args.batch_size / 256  # DEVIATION: B4. MoCo and released ReSim leave scaling to their user
    parameters = {"decaying": [], "constant": []}  # OFFICIAL: B6. SimSiam's predictors keep their learning rate
    for name, parameter in network.named_parameters():
        constant = args.framework == "simsiam" and args.fix_pred_lr and "predictor" in name
        parameters["constant" if constant else "decaying"].append(parameter)
    groups = [{"params": params, "schedule": schedule} for schedule, params in parameters.items() if params]
    # OFFICIAL: B3. Weight decay on norms and biases too.
    optimizer = torch.optim.SGD(groups, lr, momentum=args.momentum, weight_decay=args.weight_decay)
    scaler = torch.amp.GradScaler(world.device.type, enabled=args.amp == "fp16")
    step, bad = 0, common.BadImages(images)
    if state:
        method.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        step, bad = state["step"], common.BadImages(images, state["bad_images"])
        log_file = common.read_log(os.path.join(args.output_dir, "log.jsonl"))
        if step >= last and any("probe" in line and line["step"] == step for line in log_file):
            print0(f"{args.output_dir}: finished, at step {step} of {last}; give another --output-dir for a new run")
            return
        print0(f"continued from step {step}")
        del state  # as large as everything else together
    network = common.wrap_distributed(network, world)

    # start ------------------------------------------------------------------------------------------------------------
    yardstick = yardsticks(args, method, world)
    print0(
        f"{NAME}: {images.fingerprint()}; {epoch_steps} steps an epoch, {last} in all; "
        f"batch {args.batch_size} = {world.size} x {args.batch_size // world.size} on {world.device.type}; "
        f"lr {lr:g} = {args.lr:g} x {args.batch_size}/256; amp {args.amp}"
    )
    header = {"command": common.command(), "versions": common.versions(), "settings": settings}
    log = common.RunLog(args.output_dir, header, step, last, world.rank == 0)
    if step == 0:
        log.write({"step": 0, "probe": probe(method, images, args, world, "start")})

    # steps ------------------------------------------------------------------------------------------------------------
    loader = torch.utils.data.DataLoader(
        TwoViews(images, args.size, args.preset == "official", args.seed),
        batch_sampler=common.Batches(len(images), args.batch_size, world, args.seed, step, last),
        num_workers=args.workers,
        worker_init_fn=common.detach_worker,
        pin_memory=world.device.type == "cuda",
    )
    save_every, first = args.save_every or epoch_steps, step

    def save():
        if world.rank == 0:
            checkpoints.save(
                exports(args, method), step=step, model=method.state_dict(), optimizer=optimizer.state_dict(),
                scaler=scaler.state_dict(), bad_images=sorted(bad.found),
            )  # fmt: skip

    meter = common.Meter(args.batch_size)
    for *batch, index, passed in meter.timed(loader):
        for group in optimizer.param_groups:  # PAPER: section 4, cosine decay
            constant = group["schedule"] == "constant"
            group["lr"] = lr if constant else common.cosine_lr(lr, step // epoch_steps, args.epochs)
        batch = [x.to(world.device, non_blocking=True) for x in batch]
        loss, values = method(network, *batch, step, world.rank)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        step += 1

        meter.add(values)
        bad.note(index, passed)
        stop, unreadable = common.agree(stop_signal.arrived, len(bad.new))
        if unreadable:
            bad.share()
        ending = stop > 0 or step == last
        saving, logging = ending or step % save_every == 0, ending or step % args.print_freq == 0
        if saving or logging:
            means = meter.means(step)
        if logging:
            line = {"epoch": step / epoch_steps, "lr": optimizer.param_groups[0]["lr"], **means, **yardstick}
            log.step(step, line | {"bad_images": len(bad.found)}, shown(line))
            meter.reset()
        if saving:
            save()
        if stop:
            print0(f"stopped by a signal and saved at step {step}; the same command continues")
            break

    # results ----------------------------------------------------------------------------------------------------------
    log.close()
    if step == first:  # nothing was left to do, but for what follows
        save()
    if step >= last:
        log.write({"step": step, "probe": probe(method, images, args, world, "end")})
    if world.rank == 0:
        common.draw_curves(args.output_dir, CURVES)
        print0(f"{args.output_dir}: {', '.join(sorted(os.listdir(args.output_dir)))}")


def shown(line):
    """The part of a log line that the eye follows."""
    names = [name for name in line if name.startswith(("loss", "valid")) and name != "loss_chance"]
    return (
        f"epoch {line['epoch']:.2f} {' '.join(f'{name} {line[name]:.3f}' for name in names)} "
        f"{line['images_per_s']:.0f} img/s data {line['data_share']:.0%}"
    )


if __name__ == "__main__":
    common.run_main(main)
