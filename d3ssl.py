# SPDX-License-Identifier: MIT
"""D3SSL: dense self-supervised pre-training on *regions*, freed from their surroundings and from their position.

Qiu et al., "De-coupling and De-positioning Dense Self-supervised Learning", 2023.
Boxes from selective search name regions of an image. Each region is seen three times: with other cuts and other
surroundings (de-coupling), and moved to another place on another image (de-positioning); all are pulled together, and
pushed from the regions of earlier images.

    image --whole, colour--> x1 --PRC, PRM--> x^1 --+---------------- student f_q --> z_s1
      |                                             +---------------- teacher f_k --> z_t1 --> bank of negatives
      +--crop, colour--> x2 --+--(clean)----------------------------- teacher f_k --> z_t2
      |                       +--half--> x2-s --PRC, PRM--> x^2-s --- student f_q --> z_s2
      |                       +--pixels of the boxes, moved by t, cut by PRC, on another image's x2
      |                            = x3, boxes moved ---------------- student f_q --> z_s3
      +--proposals--> boxes b_i in each view, jittered: f(x, b_i) = MLP(mean(res5(RoIAlign(C4(x), b_i)))), Eq. 1
    L_dc (Eqs. 4, 5): z_s1 with z_t2, z_s2 with z_t1.    L_dp (Eq. 9): z_s3 with z_t2, z_s3 with z_t1.    Eq. 10: their sum.

    B images of this process    K boxes an image    C channels    H, W a view's sides    D embedding (128)    M bank
    R = B K regions             m EMA of the teacher    tau temperature    t shift       S = H = W in square views

    python -m tools.proposals --data /coco/train2017 --out coco.proposals
    torchrun --nproc_per_node 8 d3ssl.py --data /coco/train2017 --proposals coco.proposals    Table 1's 57.8 AP
    python d3ssl.py --demo                        a laptop, minutes, nothing to download, proposals included
    ... --framework soco                          the baseline SoCo-C4 on the same views

No code of D3SSL was ever released, and its supplement cannot be had: tags AMBIGUOUS say where the paper is silent and
what is done here, DEVIATION where we differ, OFFICIAL where the code of the methods it builds on is followed, PAPER what
stands in the text; their ids are rows of README.md's table. What was measured, and what was not run, stands there too.
"""

import argparse
import copy
import math
import os
import sys
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter
from torch import nn
from torchvision import ops, transforms
from torchvision.transforms import functional as TF

import common
from common import UserError, print0

# ======================================================================================================================
# Settings: the paper's where it prints them, else those of the methods that it builds on (its supplement is not public)
# ======================================================================================================================

# What SoCo has in D3SSL's place; PRM and L_dp are none of its own (OFFICIAL: D39. The released SoCo-C4 jitters no boxes)
SOCO = dict(cutout="soco", jitter="none", prm="none", depositioning=False, ema=0.99, dim=256, mlp_norm=True)
SOCO_HIDDEN = 4096  # OFFICIAL: D39. Width of its projector and predictor
DEMO = dict(
    data="scenes:2048", arch="resnet18", size=136, batch_size=64, epochs=2, lr=0.15, queue_size=512, ema=0.9,
    temperature=0.1, mlp_norm=True,
)  # fmt: skip


def get_args(argv=None):
    # fmt: off
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flag, switch = parser.add_argument, argparse.BooleanOptionalAction
    flag("--data", default=None, metavar="DIR", help="folder of images, searched recursively (its train/ if there is one), or 'scenes[:COUNT]'")
    flag("--proposals", default=None, metavar="FILE", help="their boxes, made by python -m tools.proposals; those of scenes are made at the start if not given")
    flag("--output-dir", default="runs/d3ssl", help="checkpoint.pth, ARCH.pth, log.jsonl and pictures go there; a run found there is continued")
    flag("--demo", action="store_true", help="a small complete job on built-in scenes, minutes on two CPU cores; other flags win over its settings")
    flag("--framework", default="moco", choices=("moco", "soco"), help="D3SSL on MoCo's losses and memory bank, or its baseline SoCo-C4 (predictor, no negatives)")
    # the regions and their augmentations, section 4.1
    flag("--boxes", default=4, type=int, metavar="K", help="K of Eq. 10, regions of an image")
    flag("--cutout", default="prc", choices=("none", "soco", "prc"), help="cut a part of each region of x1 and x2-s: SoCo's squares, or proposal-based random cutout (x3's mask has that always)")
    flag("--jitter", default="rbj", choices=("none", "soco", "rbj"), help="move the boxes: SoCo's jitter, or restricted box jitter, never larger; default none on SoCo")
    flag("--prm", default="keep", nargs="?", const="keep", choices=("none", "keep", "erase"), help="proposal-based random mask: keep the background in one rectangle alone, or erase it there; default none on SoCo")
    flag("--depositioning", default=True, action=switch, help="L_dp, Eqs. 6 to 9, besides L_dc; default off on SoCo, which has none")
    # the losses. AMBIGUOUS: D11, D12, D15, D17. MoCo-v2's numbers, and below the optimiser of DenseCL on COCO
    flag("--temperature", default=0.2, type=float, help="tau of Eq. 5: the smaller, the more the hardest negatives count")
    flag("--dim", default=128, type=int, help="D, size of embeddings; default 256 on SoCo")
    flag("--mlp-norm", default=False, action=switch, help="batch norm in the MLP of Eq. 1; always on SoCo; short runs learn faster with it")
    flag("--queue-size", default=65536, type=int, help="size of the memory bank in regions, K for each image; larger than the data, it holds an image's own regions")
    flag("--bank", default="augmented", choices=("augmented", "both"), help="what the teacher puts into the bank: z_t1 of the augmented view, or z_t2 too")
    flag("--ema", default=0.999, type=float, help="m: teacher <- m teacher + (1 - m) student; on SoCo it starts at 0.99 and rises to 1")
    # the encoder and its images
    flag("--arch", default="resnet50", choices=common.ARCHS, help="torchvision ResNet")
    flag("--size", default=224, type=int, help="side of x1, x2 and x3 in pixels; x2-s has half of it")
    flag("--init", default=None, metavar="FILE", help="start from these weights: any checkpoint with a ResNet in it, or 'imagenet'")
    flag("--group-size", default=32, type=int, help="images whose batch statistics are taken together and that lend each other backgrounds, as on one GPU")
    # optimisation
    flag("--epochs", default=800, type=int, help="the schedule's length; ablations: 200")
    flag("--batch-size", default=256, type=int, help="images over all processes; must be divisible by their number")
    flag("--lr", default=0.3, type=float, help="at batch 256, scaled linearly with the batch")
    flag("--momentum", default=0.9, type=float, help="momentum of SGD")
    flag("--weight-decay", default=1e-4, type=float, help="on all parameters, norms and biases included")
    flag("--amp", default="none", choices=("none", "bf16", "fp16"), help="autocast of the encoders; losses and bank are fp32 always")
    flag("--seed", default=0, type=int, help="everything random is a function of it")
    # the run
    flag("--steps", default=None, type=int, help="stop after so many steps in all, schedule unchanged")
    flag("--workers", default=min(8, common.usable_cores()), type=int, help="loader processes for each training process; no influence on results")
    flag("--print-freq", default=10, type=int, help="steps between log lines")
    flag("--save-every", default=None, type=int, help="steps between checkpoints; default one epoch")
    flag("--resume", default=None, metavar="FILE", help="continue from this checkpoint; default OUTPUT_DIR/checkpoint.pth if it is there")
    # fmt: on
    args, given = parser.parse_args(argv), common.given_flags(parser, argv)

    chosen = DEMO if args.demo else {}
    if args.framework == "soco":
        chosen = chosen | SOCO
    for name, value in chosen.items():
        if name not in given:
            setattr(args, name, value)
    check_args(args, given)
    args.given = sorted(given)
    return args


def check_args(args, given):
    """One clear line for values out of range and for flags that would have no effect."""
    common.check_range(
        args, boxes=(1, 1024), temperature=(1e-3, None), dim=(4, None), queue_size=(1, None), ema=(0, 1), size=(64, None),
        group_size=(2, None), epochs=(1, None), batch_size=(2, None), lr=(0, None), momentum=(0, 1), weight_decay=(0, None),
        steps=(0, None), workers=(0, None), print_freq=(1, None), save_every=(1, None), seed=(0, None),
    )  # fmt: skip
    if args.size % 2:
        raise UserError(f"--size {args.size}: the small view x2-s has half of it, give an even number")
    useless = {name: "SoCo has no negatives" for name in ("queue_size", "bank", "temperature")}
    useless |= {"group_size": "SoCo's batch norm is over the batch", "mlp_norm": "SoCo's MLPs have batch norm"}
    for name in useless.keys() & given.keys() if args.framework == "soco" else ():
        raise UserError(f"--{name.replace('_', '-')} has no effect here, leave it out: {useless[name]}")
    if args.framework == "soco" and args.depositioning:
        raise UserError("--depositioning is a loss of D3SSL: leave it out, or --framework soco")
    if args.data is None:
        raise UserError("give --data DIR (a folder of images), or --demo for a small job on built-in scenes")
    if args.proposals is None and args.data.partition(":")[0] != "scenes":
        raise UserError(
            f"give --proposals FILE, the regions of --data {args.data}: "
            f"python -m tools.proposals --data {args.data} --out FILE makes them"
        )


# ======================================================================================================================
# Views and where the boxes lie in them. All boxes are (x0, y0, x1, y1); pixel (i, j) has its centre at x = j + 1/2.
# ======================================================================================================================

CELL = 16  # pixels of a view between two cells of C4


def distorted_view(image, crop, size):
    """A part of an image, resized, under MoCo-v2's colour operations and flip; draws from torch's global generator.

    AMBIGUOUS: D7, D8. The paper names no colour operation and no flip.

    Args:
        image: PIL RGB. crop: (4,) whole pixels of the image. size: side of the view in pixels; the aspect is not kept.
    Returns:
        (3, size, size) uint8, and whether it is flipped (bool).
    """
    x0, y0, x1, y1 = (int(x) for x in crop)
    view = TF.resized_crop(image, y0, x0, y1 - y0, x1 - x0, [size, size])
    if torch.rand(()).item() < 0.8:
        view = transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)(view)
    if torch.rand(()).item() < 0.2:
        view = TF.rgb_to_grayscale(view, 3)
    if torch.rand(()).item() < 0.5:  # OFFICIAL: B8. sigma is Pillow's radius, as in MoCo-v2
        view = view.filter(ImageFilter.GaussianBlur(torch.empty(()).uniform_(0.1, 2.0).item()))
    flipped = torch.rand(()).item() < 0.5
    return TF.pil_to_tensor(TF.hflip(view) if flipped else view), flipped


def boxes_in_view(boxes, crop, size):
    """Boxes of an image in the view that shows a crop of it, before its flip.

    Args:
        boxes: (n, 4) pixels of the image. crop: (4,), likewise. size: side of the view in pixels.
    Returns:
        (n, 4) pixels of the view; what reaches out of the crop reaches out of the view.
    """
    return (boxes - crop[:2].repeat(2)) * size / (crop[2:] - crop[:2]).repeat(2)


def flip_boxes(boxes, size):
    """(..., 4) boxes of a view of that size -> those of the view mirrored left to right"""
    x0, y0, x1, y1 = boxes.unbind(-1)
    return torch.stack([size - x1, y0, size - x0, y1], -1)


def choose_boxes(boxes, whole, crop, size, count, least):
    """K boxes that both views show, those wholly inside the crop first; draws from torch's global generator.

    OFFICIAL: D2. SoCo's number, drawn without replacement, filled up with repetitions. AMBIGUOUS: D3, D31, D42. At least
    `least` pixels of each side are seen in both views; where no box is left, the crop itself is the only region, however
    thin it may be.

    Args:
        boxes: (n, 4) pixels of the image, n may be 0. whole, crop: (4,), what x1 and x2 show. size: side of the views.
        count: K. least: pixels.
    Returns:
        (K, 4) boxes of the image, and how many different ones are among them (0: the crop stands in).
    """
    shown = boxes_in_view(boxes, crop, size)  # (n, 4)
    clipped = shown.clamp(0, size)
    sides = torch.cat([b[:, 2:] - b[:, :2] for b in (clipped, boxes_in_view(boxes, whole, size))], 1)  # (n, 4)
    wholly = ((shown - clipped).abs() < 1e-3).all(1)  # (n,)
    order = torch.randperm(len(boxes))
    order = order[(sides >= least).all(1)[order]]
    order = order[(~wholly[order]).int().argsort(stable=True)][:count]
    if not len(order):
        return crop.expand(count, 4), 0
    again = torch.randint(len(order), (count,))
    return boxes[torch.cat([order, order[again]])[:count]], len(order)


# ======================================================================================================================
# Region-level augmentations (section 4.1): pure functions of a view, or of a mask, and its boxes
# ======================================================================================================================


def pixel_slices(box, H, W):
    """The rows and columns of an H x W view whose pixel centres lie in a (4,) box, as two slices."""
    x0, y0, x1, y1 = (box - 0.5).ceil().int().tolist()
    return slice(min(max(y0, 0), H), min(max(y1, 0), H)), slice(min(max(x0, 0), W), min(max(x1, 0), W))


def foreground_mask(boxes, H, W):
    """PAPER: Eq. 6: the pixels of an H x W view that lie in any of the (K, 4) boxes, as (H, W) bool."""
    mask = torch.zeros(H, W, dtype=torch.bool)
    for box in boxes:
        mask[pixel_slices(box, H, W)] = True
    return mask


def proposal_cutout(view, boxes, low=0.2, high=0.5):
    """PAPER: section 4.1, proposal-based random cutout (PRC); draws from torch's global generator.

    From the largest box to the smallest, a rectangle of the box's aspect is cut out of it at a random place, as large as
    what earlier cuts leave of the share c. Where they alone took more than that from a box, all of it comes back first: a
    small region inside a large one keeps what it needs. From the smallest box never more than c is cut; later, smaller
    boxes may take more from a larger one.
    AMBIGUOUS: D19, D20, D21, D22. c, drawn evenly from [low, high] for each box, is a share of the area and the threshold
    as well; each box is cut; what is cut is 0, the mean colour after normalisation.

    Args:
        view: (..., H, W), numbers or bool. boxes: (K, 4) pixels of the view, half-open.
    Returns:
        the view, 0 (or False) where it is cut.
    """
    H, W = view.shape[-2:]
    keep = torch.ones(H, W, dtype=torch.bool)
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    for box in boxes[area.argsort(descending=True, stable=True)]:
        region = keep[pixel_slices(box, H, W)]  # a part of keep
        if not region.numel():
            continue
        share = low + (high - low) * torch.rand(()).item()
        cut = 1 - region.float().mean().item()
        if cut > share:
            region.fill_(True)
            cut = 0
        scale, (rows, columns) = math.sqrt(share - cut), region.shape
        h, w = round(scale * rows), round(scale * columns)
        u, v = torch.rand(2).tolist()
        top, left = int(u * (rows - h + 1)), int(v * (columns - w + 1))
        region[top : top + h, left : left + w] = False
    return view * keep


def proposal_mask(view, boxes, erase=False):
    """PAPER: section 4.1, proposal-based random mask (PRM); draws from torch's global generator.

    Of the background, everything outside all boxes, only what lies in one random rectangle is shown: now this side of a
    region, now that one. The rectangle has a share [0.2, 0.6] of the view's area and an aspect in [3/4, 4/3].
    AMBIGUOUS: D23, D24. One rectangle a view; with `erase` it is what is hidden, the other reading of the text.

    Args:
        view: (..., H, W), numbers or bool. boxes: (K, 4) pixels of the view.
    Returns:
        the view, 0 (or False) where it is hidden; never inside a box.
    """
    H, W = view.shape[-2:]
    top, left, h, w = transforms.RandomResizedCrop.get_params(view, (0.2, 0.6), (3 / 4, 4 / 3))
    shown = torch.zeros(H, W, dtype=torch.bool)
    shown[top : top + h, left : left + w] = True
    return view * (foreground_mask(boxes, H, W) | (~shown if erase else shown))


def restricted_jitter(boxes, shrink=0.2):
    """PAPER: section 4.1, restricted box jitter (RBJ): never larger than the box; draws from torch's global generator.

    AMBIGUOUS: D25. Each side becomes up to `shrink` shorter, at a random place inside the box.

    Args:
        boxes: (K, 4).
    Returns:
        (K, 4), inside the boxes given.
    """
    side = boxes[:, 2:] - boxes[:, :2]  # (K, 2)
    shorter = side * (1 - shrink * torch.rand_like(side))
    corner = boxes[:, :2] + (side - shorter) * torch.rand_like(side)
    return torch.cat([corner, torch.minimum(corner + shorter, boxes[:, 2:])], 1)


def soco_cutout(view, boxes):
    """SoCo's cutout, for Table 5: from every second box a square is cut; draws from torch's global generator.

    The square has [0.1, 0.3] of the box's area, lies around a random point of the box and may reach out of it.
    DEVIATION: D43. In PRC's place, in both augmented views. Arguments and result as proposal_cutout.
    """
    keep = torch.ones(view.shape[-2:], dtype=torch.bool)
    for box in boxes:
        x0, y0, x1, y1 = box.tolist()
        chance, share, u, v = torch.rand(4).tolist()
        half = math.sqrt((0.1 + 0.2 * share) * (x1 - x0) * (y1 - y0)) / 2
        x, y = x0 + u * (x1 - x0), y0 + v * (y1 - y0)
        if chance < 0.5:
            keep[pixel_slices(torch.tensor([x - half, y - half, x + half, y + half]), *keep.shape)] = False
    return view * keep


def soco_jitter(boxes, size, reach=0.1):
    """SoCo's box jitter, for Table 5: every second box is shifted and scaled; draws from torch's global generator.

    DEVIATION: D43. In RBJ's place, in both views.

    Args:
        boxes: (K, 4) pixels of the view. size: side of the view, to which boxes are clipped. reach: up to what share of
            its sides a box is shifted, and made larger or smaller.
    Returns:
        (K, 4)
    """
    side = boxes[:, 2:] - boxes[:, :2]  # (K, 2)
    shift, scale = (reach * (2 * torch.rand(2, *side.shape) - 1)).unbind()
    corner = boxes[:, :2] + shift * side
    moved = torch.cat([corner, corner + side * (1 + scale)], 1).clamp(0, size)
    return torch.where(torch.rand(len(boxes), 1) < 0.5, moved, boxes)


def shift_range(boxes, size):
    """PAPER: section 4.2: by how much all boxes of a view can move together without leaving it.

    Args:
        boxes: (..., K, 4) pixels of the view, inside it. size: its side.
    Returns:
        least, most: (..., 2) int64, whole pixels along x and y; 0 lies between them.
    """
    least = (-boxes[..., :2]).amax(-2).ceil().long()
    return least, (size - boxes[..., 2:]).amin(-2).floor().long()


def compose(view, shift, mask, background):
    """PAPER: Eq. 8's C: the view's pixels, moved, where the mask is set, the background's elsewhere.

    Args:
        view, background: (B, C, H, W). shift: (B, 2) int64, t along x and y in pixels. mask: (B, H, W) bool, already
            moved and cut.
    Returns:
        (B, C, H, W): result(p) = view(p - t) under the mask, background(p) elsewhere.
    """
    B, _, H, W = view.shape
    columns = (torch.arange(W, device=view.device) - shift[:, :1]) % W  # (B, W)
    rows = (torch.arange(H, device=view.device) - shift[:, 1:]) % H  # (B, H)
    image = torch.arange(B, device=view.device)[:, None, None]
    moved = view.permute(0, 2, 3, 1)[image, rows[:, :, None], columns[:, None, :]]  # (B, H, W, C)
    return torch.where(mask[:, None], moved.permute(0, 3, 1, 2), background)


class Drawn(NamedTuple):
    """All that is drawn for an image: its views and, in pixels of each view, where its regions are and what is cut."""

    view_1: torch.Tensor  # (3, S, S) uint8, x1
    view_2: torch.Tensor  # (3, S, S) uint8, x2
    boxes_1: torch.Tensor  # (K, 4), jittered
    boxes_2: torch.Tensor  # (K, 4), jittered by another draw
    keep_1: torch.Tensor  # (S, S) bool, PRM after PRC for x1
    keep_2: torch.Tensor  # (S/2, S/2) bool, for x2-s
    shift: torch.Tensor  # (2,) int64, t
    mask_3: torch.Tensor  # (S, S) bool, Eq. 7's mask
    found: int  # different proposals among the K regions; 0: the crop stands in for them


class RegionViews(torch.utils.data.Dataset):
    """(epoch, index) -> *Drawn, index, unreadable images passed over (see ImageFolder).

    Each kind of draw has a generator of its own: another augmentation leaves all others as they are.
    """

    def __init__(self, images, size, boxes, cutout, jitter, prm, seed):
        self.images, self.size, self.boxes, self.seed = images, size, boxes, seed
        self.cutout, self.jitter, self.prm = cutout, jitter, prm

    def __getitem__(self, key):
        epoch, index = key
        (image, boxes), passed = self.images[index]
        return *self.draw(image, boxes, self.seed, epoch, index), index, passed

    def draw(self, image, boxes, *key):
        """PIL image, its (n, 4) proposals, key of the draws -> Drawn"""
        size = self.size
        whole = torch.tensor([0.0, 0.0, *image.size])
        with common.drawing("crop", *key):  # PAPER: section 4, "Views construction". OFFICIAL: D5. Usual aspects
            y0, x0, h, w = transforms.RandomResizedCrop.get_params(image, scale=(0.4, 1.0), ratio=(3 / 4, 4 / 3))
            crop = torch.tensor([x0, y0, x0 + w, y0 + h], dtype=torch.float32)
        with common.drawing("boxes", *key):
            boxes, found = choose_boxes(boxes, whole, crop, size, self.boxes, least=CELL)
        views, boxes_in = [], []
        for number, shown in enumerate((whole, crop)):  # PAPER: x1 is the whole image, its aspect not kept
            with common.drawing("colour", number, *key):
                view, flipped = distorted_view(image, shown, size)
            inside = boxes_in_view(boxes, shown, size).clamp(0, size)
            inside = flip_boxes(inside, size) if flipped else inside
            with common.drawing("jitter", number, *key):  # AMBIGUOUS: D26. Student and teacher share a view's boxes
                if self.jitter == "rbj":
                    inside = restricted_jitter(inside)
                elif self.jitter == "soco":
                    inside = soco_jitter(inside, size)
            views.append(view)
            boxes_in.append(inside)
        boxes_1, boxes_2 = boxes_in
        keep_1 = self.augment(torch.ones(size, size, dtype=torch.bool), boxes_1, 1, *key)
        keep_2 = self.augment(torch.ones(size // 2, size // 2, dtype=torch.bool), boxes_2 / 2, 2, *key)
        with common.drawing("shift", *key):  # AMBIGUOUS: D27, D40. Drawn evenly, boxes not jittered again
            least, most = shift_range(boxes_2, size)
            shift = least + (torch.rand(2) * (most - least + 1)).long()
        boxes_3 = boxes_2 + shift.repeat(2)
        mask_3 = foreground_mask(boxes_3, size, size)
        with common.drawing("cutout", 3, *key):  # PAPER: Eq. 7. AMBIGUOUS: D29. Holes show the background
            mask_3 = proposal_cutout(mask_3, boxes_3)
        return Drawn(*views, boxes_1, boxes_2, keep_1, keep_2, shift, mask_3, found)

    def augment(self, view, boxes, number, *key):
        """PAPER: Eq. 2: PRM after PRC, or what stands in for them."""
        with common.drawing("cutout", number, *key):
            if self.cutout == "prc":
                view = proposal_cutout(view, boxes)
            elif self.cutout == "soco":
                view = soco_cutout(view, boxes)
        with common.drawing("mask", number, *key):
            return view if self.prm == "none" else proposal_mask(view, boxes, self.prm == "erase")


class WithProposals:
    """Images and their boxes: self[index] is (image, (n, 4) fp32 boxes in its pixels) and the unreadable images passed
    over, otherwise as common's images.

    Args:
        images: see common.open_images. proposals: a tools.proposals.Proposals.
    Errors:
        UserError: boxes are missing, or were made for other images.
    """

    def __init__(self, images, proposals):
        self.images, self.proposals, self.rows = images, proposals, proposals.check(images)
        self.held_out, self.name = images.held_out, images.name
        self.order = torch.randperm(len(images), generator=common.generator("probe"))  # whom pictures and probe show

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image, passed = self.images[index]
        boxes = self.proposals[self.rows[(index + passed) % len(self)]]
        return (image, torch.from_numpy(boxes).float()), passed

    def probe(self, index):
        """Image `index` of those that the closing measurement is made with, and its objects: the true boxes of a held-out
        scene, else the proposals."""
        if not self.held_out:
            return self[int(self.order[index % len(self)])][0]
        from tools.scenes import make_scene

        scene = make_scene(self.images.seed, self.images.count + index, self.images.size)
        return Image.fromarray(scene["image"]), torch.from_numpy(scene["boxes"])

    def fingerprint(self):
        """A name for these images and boxes: a resumed run must see the same ones."""
        return f"{self.images.fingerprint()}; {len(self.proposals.boxes)} boxes, {self.proposals.strategy}"


# ======================================================================================================================
# Networks
# ======================================================================================================================


def mlp(inputs, hidden, outputs, norm):
    """inputs-hidden-outputs with a ReLU between, and batch norm before it if `norm`."""
    between = [nn.BatchNorm1d(hidden), nn.ReLU()] if norm else [nn.ReLU()]
    return nn.Sequential(nn.Linear(inputs, hidden), *between, nn.Linear(hidden, outputs))


class Encoder(nn.Module):
    """Backbone and projector of regions: PAPER: Eq. 1, f(x, b) = MLP(mean(res5(RoIAlign(C4(x), b)))).

    OFFICIAL: D9. RoIAlign is aligned, to size // 16 cells a side: 14 x 14, and 7 x 7 in the small view, as in SoCo.
    AMBIGUOUS: D10. The MLP is MoCo-v2's, without norm.

    Args:
        dim: D. hidden: width of the MLP's hidden layer, None: that of C5. norm: see mlp. group_size: images whose batch
            statistics are taken together; None: all.
    """

    def __init__(self, arch, dim, hidden=None, norm=False, group_size=None, zero_init_residual=False):
        super().__init__()
        self.group_size = group_size
        self.trunk = common.ResNetTrunk(arch, zero_init_residual)
        C = self.trunk.widths[-1]
        self.projector = mlp(C, hidden or C, dim, norm)

    def features(self, x, boxes):
        """What the backbone makes of regions: (B, 3, s, s) normalised, (B, K, 4) pixels -> (B, K, C)"""
        x = x.contiguous(memory_format=torch.channels_last)
        c4 = self.trunk(x, stages=3)[-1]  # (B, C', H, W)
        image = torch.arange(len(boxes), device=boxes.device).repeat_interleave(boxes.shape[1])
        rows = torch.cat([image[:, None].to(boxes.dtype), boxes.flatten(0, 1)], 1)  # (R, 5), as roi_align wants them
        cells = max(1, x.shape[-1] // CELL)
        regions = ops.roi_align(c4, rows, cells, 1 / CELL, aligned=True)  # (R, C', cells, cells)
        regions = regions.contiguous(memory_format=torch.channels_last)  # RoIAlign forgets it
        return self.trunk.layer4(regions).mean((2, 3)).unflatten(0, boxes.shape[:2])

    def encode(self, x, boxes):
        z = self.projector(self.features(x, boxes).flatten(0, 1))  # (R, D)
        return (z.unflatten(0, boxes.shape[:2]),)

    def forward(self, *views):
        """(x (B, 3, s, s), boxes (B, K, 4)) of each view -> [z (B, K, D) of each view], unnormalised"""
        group_size = self.group_size or len(views[0][0])
        return [common.encode_in_groups(self.encode, group_size, x, boxes)[0] for x, boxes in views]


class SoCoStudent(nn.Module):
    """The online network of SoCo: an Encoder and a predictor."""

    def __init__(self, encoder, dim, hidden):
        super().__init__()
        self.encoder, self.predictor = encoder, mlp(dim, hidden, dim, norm=True)

    def forward(self, *views):
        """(x, boxes) of each view -> [prediction (B, K, D) of each view]"""
        return [self.predictor(z.flatten(0, 1)).unflatten(0, z.shape[:2]) for z in self.encoder(*views)]


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


def region_contrastive_loss(z, positive, bank, temperature):
    """PAPER: Eq. 5, L_nce, and Eq. 10's mean over regions: the positive is in the denominator, too.

    Negatives come from the bank alone, as printed: other regions of the batch are none.

    Args:
        z, positive: (..., D), the second without gradient. bank: (M, D). temperature: tau.
    Returns:
        scalar
    """
    z, positive = z.flatten(0, -2), positive.flatten(0, -2)  # (R, D)
    match = (z * positive).sum(1) / temperature  # (R,)
    return (torch.logaddexp(match, negative_logsumexp(z, bank, temperature)) - match).mean()


def region_cosine_loss(prediction, projection):
    """SoCo's loss (OFFICIAL: D39): -2 times the mean cosine of predictions and the teacher's projections, (..., D) each."""
    return -2 * F.cosine_similarity(prediction, projection.detach(), dim=-1).mean()


# ======================================================================================================================
# Method: one iteration, from views to the loss
# ======================================================================================================================


class Inputs(NamedTuple):
    """What the networks are given: views, normalised, (B, 3, s, s), each with its boxes, (B, K, 4) pixels of the view."""

    x1: tuple  # augmented: to student and teacher
    x2: tuple  # clean: to the teacher
    x2_s: tuple  # augmented, half the side: to the student
    x3: tuple  # composed, moved boxes: to the student


def network_inputs(drawn, background):
    """PAPER: Eqs. 2 and 8, for a batch at once, on its device.

    AMBIGUOUS: D6, D30, D41. The teacher's x2 has no PRC and no PRM; x3 has x2's size and its colours.

    Args:
        drawn: Drawn, each with a leading B. background: (B,) int64, whose x2 each image is composed upon.
    Returns:
        Inputs
    """
    x1, x2 = common.normalise(drawn.view_1), common.normalise(drawn.view_2)
    x2_s = F.avg_pool2d(x2, 2)
    x3 = compose(x2, drawn.shift, drawn.mask_3, x2[background])
    return Inputs(
        (x1 * drawn.keep_1[:, None], drawn.boxes_1),
        (x2, drawn.boxes_2),
        (x2_s * drawn.keep_2[:, None], drawn.boxes_2 / 2),
        (x3, drawn.boxes_2 + drawn.shift.repeat(1, 2)[:, None]),
    )


def other_images(batch, group_size, where):
    """For each image another one of its group, all by the same offset. AMBIGUOUS: D28.

    Args:
        batch: B. group_size: see common.encode_in_groups. where: number in [0, 1), to choose the offset with.
    Returns:
        (B,) int64
    """
    groups = torch.arange(batch).tensor_split(math.ceil(batch / group_size))
    return torch.cat([group.roll(1 + int(where * (len(group) - 1))) for group in groups])


def health(drawn, size, z):
    """The numbers of a log line that tell whether regions are alive and can move (scalars on the device).

    Args: drawn: Drawn, with a leading B. size: side of the views. z: (B, K, D), unit vectors.
    """
    least, most = shift_range(drawn.boxes_2, size)  # (B, 2) each
    return {
        "proposals": drawn.found.float().mean(),  # different regions of an image, at most K
        "empty": (drawn.found == 0).float().mean(),  # share of images without any
        "shift": drawn.shift.float().norm(dim=1).mean(),  # pixels
        "stuck": (most - least < CELL).all(1).float().mean(),  # share of images whose boxes cannot move by a cell of C4
        "std": z.flatten(0, 1).std(0, correction=0).mean(),
    }


class D3SSL(nn.Module):
    """D3SSL on MoCo's mechanics: momentum teacher, shuffling BN, a bank of region vectors as negatives.

    Args:
        encoder: an Encoder. size: side of the views. bank: see get_args. dim, queue_size, ema, temperature,
            depositioning, seed: see get_args. autocast: context manager factory for the encoders.
    """

    def __init__(self, encoder, size, dim, queue_size, bank, ema, temperature, depositioning, seed, autocast):
        super().__init__()
        self.query, self.key = encoder, copy.deepcopy(encoder).requires_grad_(False)
        self.bank = common.Queue(queue_size, dim, common.generator("bank", seed))
        self.size, self.both, self.ema, self.temperature = size, bank == "both", ema, temperature
        self.depositioning, self.seed, self.autocast = depositioning, seed, autocast

    @torch.no_grad()
    def teach(self, permutation, *views):
        """The teacher on shuffled images with their boxes, and its unit vectors back in order: [z (B, K, D) of each view].

        OFFICIAL: D16. MoCo's shuffling; as in InsLoc, boxes travel with their images.
        """
        shuffled = [(common.shuffle(x, permutation), common.shuffle(boxes, permutation)) for x, boxes in views]
        with self.autocast():
            z = self.key(*shuffled)
        return [common.unshuffle(F.normalize(z.float(), dim=2), permutation) for z in z]

    def forward(self, network, drawn, step):
        """One iteration.

        Args:
            network: self.query, wrapped in DistributedDataParallel where there are several processes.
            drawn: Drawn, each with a leading B. step: key of random draws.
        Returns:
            loss (scalar), {name: detached scalar}
        """
        B = len(drawn.view_1)
        # 1. the views of Eqs. 2 and 8
        where = torch.rand((), generator=common.generator("background", self.seed, step)).item()
        inputs = network_inputs(drawn, other_images(B, self.query.group_size, where))
        # 2. the student, PAPER: Eqs. 3 and 8
        views = [inputs.x1, inputs.x2_s] + ([inputs.x3] if self.depositioning else [])
        with self.autocast():
            z_s = network(*views)
        z_s = [F.normalize(z.float(), dim=2) for z in z_s]  # (B, K, D) each
        # 3. the teacher follows, once a step and before it is asked
        common.momentum_update(self.key, self.query, self.ema)
        # 4. the teacher, PAPER: Eq. 3: the augmented x1 and the clean x2
        permutation = torch.randperm(B * common.world_size(), generator=common.generator("shuffle", self.seed, step))
        z_t1, z_t2 = self.teach(permutation, inputs.x1, inputs.x2)
        # 5. compare each region with itself in the other views
        pairs = {"loss_dc": [(z_s[0], z_t2), (z_s[1], z_t1)]}  # PAPER: Eq. 4
        if self.depositioning:
            pairs["loss_dp"] = [(z_s[2], z_t2), (z_s[2], z_t1)]  # PAPER: Eq. 9
        losses = {
            name: sum(region_contrastive_loss(*pair, self.bank.vectors, self.temperature) for pair in both)
            for name, both in pairs.items()
        }
        loss = sum(losses.values())  # PAPER: Eq. 10
        # 6. this step's regions become negatives of later ones. AMBIGUOUS: D13
        self.bank.enqueue(common.all_gather(z_t1).flatten(0, 1))
        if self.both:
            self.bank.enqueue(common.all_gather(z_t2).flatten(0, 1))
        values = {name: value.detach() for name, value in losses.items()}
        return loss, {"loss": loss.detach(), **values, **health(drawn, self.size, z_t1)}

    @torch.no_grad()
    def see(self, drawn):
        """Inputs, and how similar (B, K, K) the student's regions of the last view are to the teacher's of x2."""
        inputs = network_inputs(drawn, other_images(len(drawn.view_1), self.query.group_size, 0.5))
        with self.autocast():
            student, teacher = self.query(inputs.x3 if self.depositioning else inputs.x2_s), self.key(inputs.x2)
        return inputs, cosines(student[0], teacher[0])


class SoCo(nn.Module):
    """The baseline SoCo-C4 on D3SSL's views: a predictor, a cosine loss, a teacher that ever more slowly follows.

    DEVIATION: D39. The released SoCo-C4 has two views alone, cuts in the second, crops [0.6, 1] anew where too few boxes
    overlap, counts repeated boxes as several positives, has other colours, and takes LARS with warm-up.

    Args:
        encoder: an Encoder with SoCo's projector. total: steps of the schedule. dim, ema: see get_args. hidden: width of
            the predictor. autocast: context manager factory for the encoders.
    """

    def __init__(self, encoder, size, dim, hidden, ema, total, autocast):
        super().__init__()
        self.key = copy.deepcopy(encoder).requires_grad_(False)
        self.query = SoCoStudent(encoder, dim, hidden)
        self.size, self.ema, self.total, self.autocast = size, ema, total, autocast

    def forward(self, network, drawn, step):
        """One iteration; arguments and results as D3SSL.forward."""
        inputs = network_inputs(drawn, torch.arange(len(drawn.view_1)))
        with self.autocast():
            p_1, p_2 = (p.float() for p in network(inputs.x1, inputs.x2_s))  # (B, K, D) each
        momentum = 1 - (1 - self.ema) * (1 + math.cos(math.pi * step / self.total)) / 2  # OFFICIAL: D39
        common.momentum_update(self.key, self.query.encoder, momentum)
        with torch.no_grad(), self.autocast():
            z_1, z_2 = (z.float() for z in self.key(inputs.x1, inputs.x2))  # (B, K, D) each
        loss = region_cosine_loss(p_1, z_2) + region_cosine_loss(p_2, z_1)
        return loss, {"loss": loss.detach(), **health(drawn, self.size, F.normalize(z_1, dim=2))}

    @torch.no_grad()
    def see(self, drawn):
        """As D3SSL.see, the student's last view being x2-s."""
        inputs = network_inputs(drawn, torch.arange(len(drawn.view_1)))
        with self.autocast():
            student, teacher = self.query(inputs.x2_s), self.key(inputs.x2)
        return inputs, cosines(student[0], teacher[0])


def cosines(a, b):
    """(B, K, D), (B, K, D) -> (B, K, K)"""
    a, b = (F.normalize(z.float(), dim=2) for z in (a, b))
    return a @ b.transpose(1, 2)


def build(args, world, total, init=None):
    """The method that the settings describe, on its device, equal on all processes; `init`: weights to start from.

    Args: total: steps of the schedule.
    """
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.amp, torch.float32)
    soco = args.framework == "soco"

    def autocast():
        return torch.autocast(world.device.type, dtype, enabled=args.amp != "none")

    with common.drawing("init", args.seed):
        if soco:
            encoder = Encoder(args.arch, args.dim, SOCO_HIDDEN, args.mlp_norm, zero_init_residual=True)
        else:
            encoder = Encoder(args.arch, args.dim, norm=args.mlp_norm, group_size=args.group_size)
        if init:
            weights, line = common.load_backbone(init, args.arch)
            encoder.trunk.load_state_dict(weights)
            print0(line)
        if soco:
            method = SoCo(encoder, args.size, args.dim, SOCO_HIDDEN, args.ema, total, autocast)
        else:
            method = D3SSL(
                encoder, args.size, args.dim, args.queue_size, args.bank, args.ema, args.temperature,
                args.depositioning, args.seed, autocast,
            )  # fmt: skip
    if soco and world.size > 1 and world.device.type == "cuda":
        method.query, method.key = map(nn.SyncBatchNorm.convert_sync_batchnorm, (method.query, method.key))
    elif soco and world.size > 1:
        print0("synchronised batch norm needs CUDA: each process takes the statistics of its own images")
    return method.to(world.device, memory_format=torch.channels_last)


# ======================================================================================================================
# What the networks see: a picture, and a number on fixed views
# ======================================================================================================================


def region_views(images, args):
    """The data set of the settings."""
    return RegionViews(images, args.size, args.boxes, args.cutout, args.jitter, args.prm, args.seed)


def draw_batch(views, items, device, *key):
    """Drawn, with a leading dimension, of [(image, boxes)]; item i has the key (*key, i)."""
    drawn = [views.draw(*item, *key, i) for i, item in enumerate(items)]
    return Drawn(*(torch.stack([torch.as_tensor(x) for x in field]).to(device) for field in zip(*drawn, strict=True)))


def online_encoder(method):
    """The student's Encoder, without SoCo's predictor."""
    return getattr(method.query, "encoder", method.query)


def exports(args, method):
    """{file name: weights} for others to take: the student's backbone."""
    return {f"{args.arch}.pth": online_encoder(method).trunk.state_dict()}


def found_again(student, teacher, known):
    """Of each region the most similar one of the same image in the other view: is it the same region?

    Args:
        student, teacher: (B, K, C), the regions of either view. known: (B, K) bool, which of them are different regions.
    Returns:
        (B, K) bool, False where not known; chance: (B, K) fp32, the share of guesses that would be right, likewise.
    """
    similarity = F.normalize(student.float(), dim=2) @ F.normalize(teacher.float(), dim=2).transpose(1, 2)  # (B, K, K)
    nearest = similarity.masked_fill(~known[:, None], -2).argmax(2)  # (B, K)
    same = nearest == torch.arange(known.shape[1], device=known.device)
    return same & known, known / known.sum(1, keepdim=True).clamp(min=1)


@torch.no_grad()
def probe(method, images, args, world, title):
    """On fixed views: draw OUTPUT_DIR/regions_<title>.png, print and return how often an object is found again.

    Of each object in x1 the most similar of the image's objects in x2, by the mean of res5 of the student and the teacher:
    the share that is the same object, and the same for a guess; up to K objects of an image, as they are, without jitter,
    cutout and mask. The networks are copies in training mode, so that batch statistics are what the loss sees and nothing
    is changed. All processes compute the same (synchronised batch norm waits for all); the first one draws.
    """
    method, views = copy.deepcopy(method), region_views(images, args)
    items = [images[int(images.order[i % len(images)])][0] for i in range(32)]
    drawn = draw_batch(views, items, world.device, "picture", args.seed)
    inputs, similarity = method.see(drawn)
    if world.rank == 0:
        path = os.path.join(args.output_dir, f"regions_{title}.png")
        draw_regions(path, items[:6], inputs, drawn.mask_3 if args.depositioning else None, similarity)

    plain = RegionViews(images, args.size, args.boxes, "none", "none", "none", args.seed)
    hits, chances, objects = 0.0, 0.0, 0
    for first in range(0, 256 if args.demo else 32, 32):
        items = [images.probe(i) for i in range(first, first + 32)]
        drawn = draw_batch(plain, items, world.device, "probe", args.seed, first)
        known = torch.arange(args.boxes, device=world.device) < drawn.found[:, None]  # (B, K), not the repeated ones
        with method.autocast():
            student = online_encoder(method).features(common.normalise(drawn.view_1), drawn.boxes_1)  # (B, K, C)
            teacher = method.key.features(common.normalise(drawn.view_2), drawn.boxes_2)
        hit, chance = found_again(student, teacher, known)
        hits, chances, objects = hits + hit.sum().item(), chances + chance.sum().item(), objects + known.sum().item()
    hits, chances = hits / max(objects, 1), chances / max(objects, 1)
    where = "objects of held-out scenes" if images.held_out else "regions of training images"
    print0(
        f"{title} of training: {hits:.1%} of {objects} {where} are found again in another view (chance {chances:.1%})"
    )
    return {"hits": hits, "chance": chances, "objects": objects}


COLOURS = ((255, 255, 255), (255, 176, 0), (64, 200, 255), (230, 60, 60), (110, 220, 90), (200, 120, 255))


def draw_regions(path, items, inputs, mask, similarity):
    """PAPER: Figures 2 and 5. A row per image: its proposals, then each view as the networks see it with its regions in
    matching colours, Eq. 7's mask, and how similar the student's regions (rows) in its last view are to the teacher's in
    x2 (columns): dark blue lowest, yellow highest.

    Args:
        items: n of (PIL image, (., 4) proposals). inputs: Inputs, of these images or of more. mask: (., S, S) bool, or
            None if there is no x3. similarity: (., K, K), cosines.
    """
    side, gap = 176, 6
    views = {"x1, to both": inputs.x1, "x2, clean, to the teacher": inputs.x2, "x2-s, to the student": inputs.x2_s}
    if mask is not None:
        views["x3, composed, to the student"] = inputs.x3
    titles = ["proposals", *views, *(["mask of x3, cut"] if mask is not None else []), "similarity to x2's regions"]
    canvas = Image.new("RGB", (len(titles) * (side + gap) + gap, len(items) * (side + gap) + 20), "white")
    draw = ImageDraw.Draw(canvas)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (common.PIXEL_MEAN, common.PIXEL_STD))

    def panel(row, column, picture, boxes=(), colours=COLOURS):
        """Paste a picture, squeezed to a square, with boxes given in its pixels."""
        left, top = gap + column * (side + gap), 20 + row * (side + gap)
        canvas.paste(picture.resize((side, side), Image.Resampling.NEAREST), (left, top))
        zoom = [side / picture.width, side / picture.height] * 2
        for number, box in reversed([*enumerate(boxes)]):
            x0, y0, x1, y1 = (round(x * z) for x, z in zip(box.tolist(), zoom, strict=True))
            draw.rectangle((left + x0, top + y0, left + x1 - 1, top + y1 - 1), None, colours[number % len(colours)], 2)

    for column, title in enumerate(titles):
        draw.text((gap + column * (side + gap), 4), title, fill="black")
    for row, (image, proposals) in enumerate(items):
        few = proposals[torch.linspace(0, len(proposals) - 1, min(24, len(proposals))).long()]
        panel(row, 0, image, few, [(255, 255, 160)])
        for column, (x, boxes) in enumerate(views.values(), 1):
            picture = ((x[row].float().cpu() * std + mean).clamp(0, 1) * 255).round().byte()
            panel(row, column, TF.to_pil_image(picture), boxes[row].cpu())
        if mask is not None:
            panel(row, len(views) + 1, TF.to_pil_image(mask[row].cpu().byte() * 255))
        low, high = similarity[row].min(), similarity[row].max()
        value = ((similarity[row] - low) / (high - low).clamp(min=1e-6)).cpu()[None]  # (1, K, K)
        panel(row, len(titles) - 1, TF.to_pil_image((255 * torch.cat([value, 0.8 * value, 0.5 - 0.5 * value])).byte()))
    canvas.save(path)


# ======================================================================================================================
# Training
# ======================================================================================================================

NAME = "d3ssl"
CURVES = {
    "losses": ["loss", "loss_dc", "loss_dp", "=loss_chance"],
    "std of unit embeddings (collapse: 0)": ["std", "=std_spread"],
    "different proposals of an image": ["proposals"],
    "shift t (pixels)": ["shift"],
    "share of images": ["stuck", "empty"],
    "learning rate": ["lr"],
}
FREE = ("data", "proposals", "output_dir", "demo", "steps", "workers", "print_freq", "save_every", "resume", "given")


def with_proposals(args, images, world, stop):
    """The images with their proposals; those of built-in scenes are made first if there are none.

    Errors:
        UserError: see common.make_output_dir, tools.proposals. SystemExit(0): after a signal; the next run goes on.
    """
    from tools import proposals

    path = args.proposals
    if path is None:
        common.make_output_dir(args.output_dir)
        path = os.path.join(args.output_dir, f"scenes-{images.count}-{images.size}-{images.seed}.proposals")
        made = world.rank > 0 or proposals.make(images, path, workers=args.workers, stop=stop)
        if sum(common.agree(int(not made))):
            print0("stopped by a signal; the same command continues")
            sys.exit()
    return WithProposals(images, proposals.Proposals(path))


def fit_batch_and_queue(args, images, world):
    """Check that batch, processes, groups and data go together; shrink a bank that nobody asked for to the data."""
    share = args.batch_size // world.size
    if args.batch_size % world.size:
        raise UserError(f"--batch-size {args.batch_size} is not divisible by {world.size} processes")
    if share < 2:
        raise UserError(f"--batch-size {args.batch_size} leaves one image for each process: batch norm needs two")
    if len(images) < args.batch_size:
        raise UserError(f"{len(images)} images are fewer than --batch-size {args.batch_size}: give a smaller one")
    if args.framework == "soco":
        return
    groups = -(-share // args.group_size)
    if share // groups < 2:
        raise UserError(
            f"{share} images a process in groups of {args.group_size} leave one alone: it has no other's background"
        )
    if share / groups != args.group_size:
        print0(f"batch norm: groups of {share // groups} images instead of {args.group_size}")
    if groups * world.size == 1:
        print0("warning: one group of images: shuffling batch norm does nothing, and keys may leak through it")
    keys = args.boxes * (2 if args.bank == "both" else 1)  # of an image
    fitting = max(1, len(images) // args.batch_size - 1) * args.batch_size * keys
    if args.queue_size > fitting and "queue_size" in args.given:
        print0(
            f"warning: --queue-size {args.queue_size} can hold an image's own regions (there are {len(images)} images)"
        )
    elif args.queue_size > fitting:
        print0(
            f"bank: {fitting} regions instead of {args.queue_size}, not to hold an image's own ({len(images)} images)"
        )
        args.queue_size = fitting


def yardsticks(args, method, world):
    """What stands beside the values of every log line: loss of a random guess, spread of evenly drawn directions."""
    terms = 4 if args.depositioning else 2
    chance = terms * math.log(args.queue_size + 1) if args.framework == "moco" else None
    return {"loss_chance": chance, "std_spread": args.dim**-0.5}


def main(argv=None):
    args = get_args(argv)
    world = common.start_processes()
    stop_signal = common.StopSignal()
    if args.demo and "amp" not in args.given and common.bf16_is_fast(world.device):
        args.amp = "bf16"

    # data -------------------------------------------------------------------------------------------------------------
    images = common.open_images(args.data, args.size, args.seed)
    fit_batch_and_queue(args, images, world)
    images = with_proposals(args, images, world, stop_signal)
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
    method = build(args, world, total, None if state else args.init)
    network = method.query
    lr = args.lr * args.batch_size / 256
    # OFFICIAL: B3. Weight decay on norms and biases too.
    optimizer = torch.optim.SGD(network.parameters(), lr, momentum=args.momentum, weight_decay=args.weight_decay)
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
        region_views(images, args),
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
        for group in optimizer.param_groups:
            group["lr"] = common.cosine_lr(lr, step // epoch_steps, args.epochs)
        drawn = Drawn(*(x.to(world.device, non_blocking=True) for x in batch))
        loss, values = method(network, drawn, step)
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
    names = [name for name in ("loss", "loss_dc", "loss_dp", "shift", "stuck") if name in line]
    return (
        f"epoch {line['epoch']:.2f} {' '.join(f'{name} {line[name]:.3f}' for name in names)} "
        f"{line['images_per_s']:.0f} img/s data {line['data_share']:.0%}"
    )


if __name__ == "__main__":
    common.run_main(main)
