# SPDX-License-Identifier: MIT
"""D3SSL: dense self-supervised pre-training on *regions*, freed from their surroundings and from their position.

Qiu et al., "De-coupling and De-positioning Dense Self-supervised Learning", 2023.

Boxes from selective search name the regions of an image. The network sees each region three times: twice with other
cuts and other surroundings (de-coupling), once at another place on another image (de-positioning). The embeddings of
one region are pulled together, and pushed away from the regions of earlier images.

    image --whole, colour--> x1 --PRC, PRM--> x^1 --+---------------- student f_q --> z_s1
      |                                             +---------------- teacher f_k --> z_t1 --> bank of negatives
      +--crop, colour--> x2 --+--(clean)----------------------------- teacher f_k --> z_t2
      |                       +--half--> x2-s --PRC, PRM--> x^2-s --- student f_q --> z_s2
      |                       +--pixels of the boxes, moved by t, cut by PRC, on another image's x2
      |                            = x3, boxes moved ---------------- student f_q --> z_s3
      +--proposals--> boxes b_i in each view, jittered: f(x, b_i) = MLP(mean(res5(RoIAlign(C4(x), b_i)))), Eq. 1
    L_dc (Eqs. 4, 5): z_s1 with z_t2, z_s2 with z_t1.   L_dp (Eq. 9): z_s3 with z_t2, z_s3 with z_t1.   Eq. 10: the sum

    B images of this process    K boxes an image    C channels    H, W a view's sides    D embedding (128)    M bank
    R = B K regions             m EMA of the teacher    tau temperature    t shift       S = H = W in square views

    python d3ssl.py --demo                        a laptop, minutes, nothing to download, proposals included
    python -m tools.proposals --data /coco/train2017 --out coco.proposals
    torchrun --nproc_per_node 8 d3ssl.py --data /coco/train2017 --proposals coco.proposals    Table 1 (57.8 AP)
    ... --framework soco                          the baseline SoCo-C4 on the same views

D3SSL's code and supplement are not public. Where the paper is silent, a clause such as (D20) names the row of
docs/d3ssl.md that gives our choice. That page also has the usage, what each logged value means, and the measurements.
"""

import argparse
import copy
import math
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import ImageFilter
from torch import nn
from torchvision import ops, transforms
from torchvision.transforms import functional as TF

import common
from common import all_gather, negative_logsumexp, number
from harness import look, proposals, weights
from harness.run import Run, bf16_is_fast, main

# ==== Settings ========================================================================================================

BOXES, DIM = 4, 128  # K of Eq. 10 as in SoCo (D2), D as in MoCo-v2 (D10)
SOCO_DIM, SOCO_HIDDEN = 256, 4096  # D, and the hidden width of SoCo's projector and predictor (D39)
AUGMENTATIONS = (("prc", "soco-cutout"), ("prm", "prm-erase"), ("rbj", "soco-jitter"))  # at most one of a pair
PAPER = dict(epochs=800, lr=0.3)  # section 5 follows DenseCL's protocol; lr and SGD are DenseCL's on COCO (D17)
DEMO = dict(data="scenes:2048", arch="resnet18", size=136, batch_size=64, epochs=2, lr=0.15, ema=0.9,
            temperature=0.1, mlp_norm=True)  # fmt: skip
SOCO = dict(augment=["soco-cutout"], depositioning=False, ema=0.99, mlp_norm=True)  # SoCo-C4 jitters no boxes (D39)


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], usage="%(prog)s --data DIR [more, see --help]",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)  # fmt: skip
    flag, switch = parser.add_argument, argparse.BooleanOptionalAction
    # The defaults of --temperature, --queue-size and --ema are MoCo-v2's (D11, D12, D15).
    # fmt: off
    flag("--demo", action="store_true", help="a small complete job on built-in scenes, minutes on two CPU cores; other flags win over its settings")
    flag("--proposals", metavar="DIR", help="the boxes of --data, a folder made by python -m tools.proposals; those of built-in scenes are made at the start if none are given")
    flag("--framework", default="moco", choices=("moco", "soco"), help="D3SSL on MoCo's loss and memory bank, or its baseline SoCo-C4 (predictor, no negatives)")
    flag("--augment", default=["prc", "prm", "rbj"], nargs="*", choices=sum(AUGMENTATIONS, ()), help="the columns of Table 5: prc or soco-cutout cuts a part of each region; prm shows background in one rectangle alone, prm-erase hides it there; rbj or soco-jitter moves the boxes; no name: none of them; on SoCo soco-cutout if not given")
    flag("--depositioning", default=True, action=switch, help="L_dp (Eqs. 6 to 9) besides L_dc; SoCo has none")
    flag("--temperature", default=0.2, type=number(float, 1e-3), help="tau of Eq. 5 (MoCo); the smaller, the more the hardest negatives count")
    flag("--queue-size", type=number(int, 1), help="M, regions in the memory bank (MoCo), K of each image; default 65536, or less than an epoch of regions")
    flag("--ema", default=0.999, type=number(float, 0, 1), help="m: teacher <- m teacher + (1 - m) student; on SoCo m starts at 0.99 and rises to 1")
    flag("--mlp-norm", default=False, action=switch, help="batch norm in the MLP of Eq. 1; always on SoCo; short runs learn faster with it")
    # fmt: on
    common.run_flags(parser, "d3ssl")
    parser.set_defaults(**PAPER)

    args = common.parse(parser, argv, presets)
    args.augment = sorted(set(args.augment))
    for pair in AUGMENTATIONS:
        if set(pair) <= set(args.augment):
            parser.error(f"--augment {' '.join(pair)}: one takes the place of the other, give one of them")
    if args.size % 2 or args.size < 64:
        parser.error(f"--size {args.size}: must be even and at least 64, because x2-s has half of it")
    if args.framework == "soco" and args.depositioning:
        parser.error("--depositioning is a loss of D3SSL: leave it out, or --framework soco")
    if args.proposals is None and args.data.partition(":")[0] != "scenes":
        parser.error(f"give --proposals DIR, made by: python -m tools.proposals --data {args.data} --out DIR")
    return args


def presets(args):
    """The defaults of --demo and of SoCo; where both set one, SoCo's wins."""
    demo = DEMO | dict(amp="bf16" if bf16_is_fast() else "none") if args.demo else {}
    return demo | (SOCO if args.framework == "soco" else {})


# ==== Views and boxes (x0, y0, x1, y1). Pixel (i, j) has its centre at x = j + 1/2, y = i + 1/2. ======================

CELL = 16  # pixels of a view between two cells of C4


def distorted_view(image, crop, size):
    """A crop of an image, resized, with MoCo-v2's colours (D7) and flip (D8). Draws from torch's global generator.

    Args:
        image: PIL RGB. crop: (4,) whole pixels of the image. size: side of the view in pixels; the aspect is not kept.
    Returns:
        view: (3, size, size) uint8. flipped: bool.
    """
    x0, y0, x1, y1 = (int(x) for x in crop)
    view = TF.resized_crop(image, y0, x0, y1 - y0, x1 - x0, [size, size])
    if torch.rand(()).item() < 0.8:
        view = transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)(view)
    if torch.rand(()).item() < 0.2:
        view = TF.rgb_to_grayscale(view, 3)
    if torch.rand(()).item() < 0.5:
        view = view.filter(ImageFilter.GaussianBlur(torch.empty(()).uniform_(0.1, 2.0).item()))
    flipped = torch.rand(()).item() < 0.5
    return TF.pil_to_tensor(TF.hflip(view) if flipped else view), flipped


def boxes_in_view(boxes, crop, size):
    """(n, 4) boxes of an image -> those of the view, `size` pixels a side, that shows a crop (4,) of it, unflipped."""
    return (boxes - crop[:2].repeat(2)) * size / (crop[2:] - crop[:2]).repeat(2)


def flip_boxes(boxes, size):
    """(..., 4) boxes of a view of that size -> those of the view mirrored left to right."""
    x0, y0, x1, y1 = boxes.unbind(-1)
    return torch.stack([size - x1, y0, size - x0, y1], -1)


def choose_boxes(boxes, whole, crop, size, count, least):
    """K random boxes that both views show; those wholly inside the crop come first (D42).

    Both views show `least` pixels of each side of a box (D3), so no region is empty (D31). Boxes are drawn without
    replacement, and repeated if there are fewer than K. If there are none, the crop is the region, however thin.

    boxes: (n, 4) pixels of the image. whole, crop: (4,), what x1 and x2 show. size: side of the views. count: K.
    Returns the boxes, (K, 4), and how many different ones of those given are among them.
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


# ==== Augmentations of regions (section 4.1) and de-positioning (4.2). Draws are from torch's global generator. ======


def pixel_slices(box, H, W):
    """The rows and columns of an H x W view whose pixel centres lie in a (4,) box, as two slices."""
    x0, y0, x1, y1 = (box - 0.5).ceil().int().tolist()
    return slice(min(max(y0, 0), H), min(max(y1, 0), H)), slice(min(max(x0, 0), W), min(max(x1, 0), W))


def foreground_mask(boxes, H, W):
    """PAPER: Eq. 6, the pixels of an H x W view that lie in any of the (K, 4) boxes: (H, W) bool."""
    mask = torch.zeros(H, W, dtype=torch.bool)
    for box in boxes:
        mask[pixel_slices(box, H, W)] = True
    return mask


def proposal_cutout(view, boxes, low=0.2, high=0.5):
    """PAPER: section 4.1, proposal-based random cutout (PRC).

    Each box is cut once (D21), by a rectangle of its aspect at a random place inside it. A share c of the area is drawn
    evenly from [low, high] for each box. Boxes are cut from the largest to the smallest. If earlier cuts already
    removed more than c of a box, its pixels are restored first (D20). The new cut has the size that is left of c. The
    smallest box thus loses about c at most; a larger box can lose more to the boxes inside it.

    Along each axis the start and the end of a cut are rounded to pixels, so the size of a cut depends on its place.
    The code of RCC, a later method of the same first author, rounds so too (D19).

    view: (..., H, W), numbers or bool. boxes: (K, 4) pixels of the view. Returns the view, 0 where it is cut, which is
    the mean colour after normalisation (D22).
    """
    keep = torch.ones(view.shape[-2:], dtype=torch.bool)
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    for box in boxes[area.argsort(descending=True, stable=True)]:
        region = keep[pixel_slices(box, *keep.shape)]  # a part of keep
        if not region.numel():
            continue
        share = low + (high - low) * torch.rand(()).item()
        cut = 1 - region.float().mean().item()
        if cut > share:
            region.fill_(True)
            cut = 0
        scale, (rows, columns) = math.sqrt(share - cut), region.shape
        u, v = torch.rand(2).tolist()
        top, left = u * (1 - scale) * rows, v * (1 - scale) * columns
        region[round(top) : round(top + scale * rows), round(left) : round(left + scale * columns)] = False
    return view * keep


def proposal_mask(view, boxes, erase=False):
    """PAPER: section 4.1, proposal-based random mask (PRM). Arguments as in proposal_cutout.

    The background, everything outside all boxes, is shown in one random rectangle a view (D24) and hidden elsewhere.
    The rectangle has a share [0.2, 0.6] of the view's area and an aspect in [3/4, 4/3]. With `erase` the background is
    hidden in the rectangle and shown elsewhere, the other reading of the text (D23). Boxes are never hidden.
    """
    top, left, h, w = transforms.RandomResizedCrop.get_params(view, (0.2, 0.6), (3 / 4, 4 / 3))
    shown = torch.zeros(view.shape[-2:], dtype=torch.bool)
    shown[top : top + h, left : left + w] = True
    return view * (foreground_mask(boxes, *shown.shape) | (~shown if erase else shown))


def restricted_jitter(boxes, shrink=0.2):
    """PAPER: section 4.1, restricted box jitter (RBJ) of (K, 4): sides up to `shrink` shorter, inside the box (D25)."""
    side = boxes[:, 2:] - boxes[:, :2]  # (K, 2)
    shorter = side * (1 - shrink * torch.rand_like(side))
    corner = boxes[:, :2] + (side - shorter) * torch.rand_like(side)
    return torch.cat([corner, torch.minimum(corner + shorter, boxes[:, 2:])], 1)


def soco_cutout(view, boxes):
    """SoCo's cutout, for Table 5: each box is cut, by a square, with probability 1/2. Arguments as in proposal_cutout.

    The square has [0.1, 0.3] of the box's area, lies around a random point of the box, and may reach out of the box.
    DEVIATION: D43, in PRC's place, in both augmented views. Likewise soco_jitter in RBJ's place.
    """
    keep = torch.ones(view.shape[-2:], dtype=torch.bool)
    for (x0, y0, x1, y1), (chance, share, u, v) in zip(boxes.tolist(), torch.rand(len(boxes), 4).tolist(), strict=True):
        half = math.sqrt((0.1 + 0.2 * share) * (x1 - x0) * (y1 - y0)) / 2
        x, y = x0 + u * (x1 - x0), y0 + v * (y1 - y0)
        if chance < 0.5:
            keep[pixel_slices(torch.tensor([x - half, y - half, x + half, y + half]), *keep.shape)] = False
    return view * keep


def soco_jitter(boxes, size, reach=0.1):
    """SoCo's jitter of (K, 4), for Table 5: a random half is moved and scaled by up to `reach` of its sides."""
    side = boxes[:, 2:] - boxes[:, :2]  # (K, 2)
    shift, scale = (reach * (2 * torch.rand(2, *side.shape) - 1)).unbind()
    corner = boxes[:, :2] + shift * side
    moved = torch.cat([corner, corner + side * (1 + scale)], 1).clamp(0, size)
    return torch.where(torch.rand(len(boxes), 1) < 0.5, moved, boxes)


def shift_range(boxes, size):
    """PAPER: section 4.2, how far (..., K, 4) boxes of a view can move together: least, most (..., 2) int64 pixels."""
    least = (-boxes[..., :2]).amax(-2).ceil().long()
    return least, (size - boxes[..., 2:]).amin(-2).floor().long()


def compose(view, shift, mask, background):
    """PAPER: Eq. 8's C: result(p) = view(p - t) under the mask, background(p) elsewhere.

    Args:
        view, background: (B, C, H, W). shift: (B, 2) int64, t along x and y. mask: (B, H, W) bool, moved and cut.
    """
    B, _, H, W = view.shape
    columns = (torch.arange(W, device=view.device) - shift[:, :1]) % W  # (B, W)
    rows = (torch.arange(H, device=view.device) - shift[:, 1:]) % H  # (B, H)
    image = torch.arange(B, device=view.device)[:, None, None]
    moved = view.permute(0, 2, 3, 1)[image, rows[:, :, None], columns[:, None, :]]  # (B, H, W, C)
    return torch.where(mask[:, None], moved.permute(0, 3, 1, 2), background)


class Drawn(NamedTuple):
    """All that is drawn for an image. Boxes and t are in pixels of their view. Batches have a leading B."""

    view_1: torch.Tensor  # (3, S, S) uint8, x1
    view_2: torch.Tensor  # (3, S, S) uint8, x2
    boxes_1: torch.Tensor  # (K, 4), jittered
    boxes_2: torch.Tensor  # (K, 4), jittered by another draw
    keep_1: torch.Tensor  # (S, S) bool, PRM after PRC for x1
    keep_2: torch.Tensor  # (S/2, S/2) bool, for x2-s
    shift: torch.Tensor  # (2,) int64, t
    mask_3: torch.Tensor  # (S, S) bool, Eq. 7's mask
    found: torch.Tensor  # int64, different proposals among the K regions; 0: the crop stands in for them


def draw_views(item, size, augment, boxes=BOXES):
    """(image, PIL RGB; its proposals, (n, 4) pixels) -> Drawn. augment: names, see --augment. boxes: K.

    One number of torch's global generator is the key of all draws. Each kind of draw has a generator of its own, so
    another augmentation leaves all other draws as they are.
    """
    (image, candidates), key = item, torch.randint(2**62, ()).item()
    whole = torch.tensor([0.0, 0.0, *image.size])  # PAPER: x1 is the whole image, its aspect not kept
    with common.drawing("crop", key):  # PAPER: section 4, "Views construction"; the usual aspects (D5)
        y0, x0, h, w = transforms.RandomResizedCrop.get_params(image, scale=(0.4, 1.0), ratio=(3 / 4, 4 / 3))
    crop = torch.tensor([x0, y0, x0 + w, y0 + h], dtype=torch.float32)
    with common.drawing("boxes", key):
        chosen, found = choose_boxes(candidates, whole, crop, size, boxes, least=CELL)
    view_1, boxes_1, keep_1 = draw_view(image, whole, chosen, size, 1, augment, "x1", key)
    view_2, boxes_2, keep_2 = draw_view(image, crop, chosen, size, 2, augment, "x2", key)
    with common.drawing("shift", key):  # even over its range (D27)
        least, most = shift_range(boxes_2, size)
        shift = least + (torch.rand(2) * (most - least + 1)).long()
    boxes_3 = boxes_2 + shift.repeat(2)  # not jittered again (D40)
    with common.drawing("cutout", "x3", key):  # PAPER: Eq. 7, PRC always; its holes show the background (D29)
        mask_3 = proposal_cutout(foreground_mask(boxes_3, size, size), boxes_3)
    return Drawn(view_1, view_2, boxes_1, boxes_2, keep_1, keep_2, shift, mask_3, torch.tensor(found))


def draw_view(image, crop, boxes, size, divisor, augment, *key):
    """A view, its jittered boxes, which student and teacher share (D26), and the pixels that the student sees (Eq. 2).

    The student sees the view at 1 / divisor of its size; the mask of pixels has that size.
    """
    with common.drawing("colour", *key):
        view, flipped = distorted_view(image, crop, size)
    boxes = boxes_in_view(boxes, crop, size).clamp(0, size)
    boxes = flip_boxes(boxes, size) if flipped else boxes
    with common.drawing("jitter", *key):
        if "rbj" in augment:
            boxes = restricted_jitter(boxes)
        elif "soco-jitter" in augment:
            boxes = soco_jitter(boxes, size)
    keep, within = torch.ones(size // divisor, size // divisor, dtype=torch.bool), boxes / divisor
    with common.drawing("cutout", *key):  # PAPER: Eq. 2, PRM after PRC
        if "prc" in augment:
            keep = proposal_cutout(keep, within)
        elif "soco-cutout" in augment:
            keep = soco_cutout(keep, within)
    with common.drawing("mask", *key):
        if "prm" in augment or "prm-erase" in augment:
            keep = proposal_mask(keep, within, erase="prm-erase" in augment)
    return view, boxes, keep


# ==== Networks ========================================================================================================


def mlp(inputs, hidden, outputs, norm):
    """inputs-hidden-outputs with a ReLU between, and batch norm before it if `norm`."""
    between = [nn.BatchNorm1d(hidden), nn.ReLU()] if norm else [nn.ReLU()]
    return nn.Sequential(nn.Linear(inputs, hidden), *between, nn.Linear(hidden, outputs))


class Encoder(nn.Module):
    """Backbone and projector of regions. PAPER: Eq. 1, f(x, b) = MLP(mean(res5(RoIAlign(C4(x), b)))).

    The MLP is MoCo-v2's, without norm (D10). SoCo's is wider, and a predictor follows (D39). norm: see mlp.
    """

    def __init__(self, arch, framework="moco", norm=False, amp="none"):
        super().__init__()
        self.soco, self.amp = framework == "soco", amp
        self.trunk = common.ResNetTrunk(arch, zero_init_residual=self.soco)  # as SoCo does (B16)
        C = self.trunk.widths[-1]
        hidden, D = (SOCO_HIDDEN, SOCO_DIM) if self.soco else (C, DIM)
        self.projector = mlp(C, hidden, D, norm or self.soco)
        self.predictor = mlp(D, hidden, D, norm=True) if self.soco else nn.Identity()

    def forward(self, *views):
        """(x, boxes) of each view -> (features, z) of each. Batch statistics are per group, on SoCo per batch."""
        group = len(views[0][0]) if self.soco else common.GROUP
        with common.autocast(self.amp, views[0][0].device):
            return [common.encode_in_groups(self, group, *view) for view in views]

    def encode(self, x, boxes):
        """One group, x (B, 3, s, s) and boxes (B, K, 4) -> features (B, K, C) after res5, z (B, K, D), not normalised.

        As in SoCo, RoIAlign is aligned and gives s / 16 cells a side: 14 x 14, and 7 x 7 in x2-s (D9).
        """
        c4 = self.trunk(x.contiguous(memory_format=torch.channels_last), stages=3)[-1]  # (B, C', H, W)
        regions = ops.roi_align(c4, [*boxes], x.shape[-1] // CELL, 1 / CELL, aligned=True)  # (R, C', cells, cells)
        features = self.trunk.layer4(regions.contiguous(memory_format=torch.channels_last)).mean((2, 3))  # (R, C)
        z = self.predictor(self.projector(features))  # (R, D)
        return [rows.unflatten(0, boxes.shape[:2]) for rows in (features, z)]


# ==== Losses ==========================================================================================================


def region_contrastive_loss(z, positive, bank, temperature):
    """PAPER: Eq. 5, L_nce: -log( exp(z.z+/tau) / (exp(z.z+/tau) + sum exp(z.z-/tau)) ), and Eq. 10's mean over regions.

    z, positive: (..., D) unit vectors, the second without gradient. bank: (M, D) unit vectors, the only negatives, as
    printed: other regions of the batch are none. temperature: tau.
    """
    z, positive = z.flatten(0, -2), positive.flatten(0, -2)  # (R, D)
    match = (z * positive).sum(1) / temperature  # (R,)
    return (torch.logaddexp(match, negative_logsumexp(z, bank, temperature)) - match).mean()


def region_cosine_loss(prediction, projection):
    """SoCo's loss (D39): -2 times the mean cosine of predictions and the teacher's projections, (..., D) each."""
    return -2 * F.cosine_similarity(prediction, projection.detach(), dim=-1).mean()


# ==== Method: one iteration, from views to the loss ===================================================================


class Inputs(NamedTuple):
    """What the networks are given: views (B, 3, s, s), normalised, each with its boxes (B, K, 4) in its pixels."""

    x1: tuple  # augmented: to student and teacher
    x2: tuple  # clean: to the teacher
    x2_s: tuple  # augmented, half the side: to the student
    x3: tuple  # composed, moved boxes: to the student


def network_inputs(drawn, background):
    """PAPER: Eqs. 2 and 8, for a batch of Drawn at once, on its device -> Inputs

    The teacher's x2 has no PRC and no PRM (D6). x3 has the size (D30) and the colours (D41) of x2.
    background: (B,) int64, the image whose x2 is the background of each x3.
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


def other_images(batch, group, where):
    """For each of B images another one of its group (D28): (B,) int64. `where` in [0, 1) chooses the offset of all."""
    groups = torch.arange(batch).tensor_split(math.ceil(batch / group))
    return torch.cat([images.roll(1 + int(where * (len(images) - 1))) for images in groups])


def health(drawn, z):
    """Whether regions are alive and can move, for the log. drawn: a batch of Drawn. z: (B, K, D) unit vectors."""
    least, most = shift_range(drawn.boxes_2, drawn.view_2.shape[-1])  # (B, 2) each
    return {
        "proposals": drawn.found.float().mean(),  # different regions of an image, at most K
        "empty": (drawn.found == 0).float().mean(),  # share of images without any
        "shift": drawn.shift.float().norm(dim=1).mean(),  # pixels
        "stuck": (most - least < CELL).all(1).float().mean(),  # share of images whose boxes cannot move by a cell of C4
        "std": z.flatten(0, 1).std(0, correction=0).mean(),
        "std_spread": z.shape[2] ** -0.5,  # of evenly drawn directions
    }


class D3SSL(nn.Module):
    """D3SSL (momentum teacher, shuffling BN, a bank of region vectors as negatives) or, without a bank, SoCo-C4.

    DEVIATION: D39, SoCo has D3SSL's views, choice of boxes, colours and optimiser here, not its own.

    Args:
        encoder: Encoder. depositioning: L_dp too. queue_size, ema, temperature: M, m, tau; a queue_size of 0 means
            SoCo. total: steps of the schedule, in which SoCo's m rises to 1.
    """

    picture, measured = "regions", "regions are found again in another view"

    def __init__(self, encoder, depositioning=True, queue_size=0, ema=0.999, temperature=0.2, total=1, seed=0):
        super().__init__()
        self.query, self.key = encoder, copy.deepcopy(encoder).requires_grad_(False)
        self.key.predictor = nn.Identity()  # SoCo's teacher has none
        self.bank = common.Queue(queue_size, DIM, common.generator("bank", seed)) if queue_size else None
        self.depositioning, self.ema, self.temperature = depositioning, ema, temperature
        self.total, self.seed = total, seed

    def forward(self, network, drawn, step):
        """One iteration: loss, {name: scalar tensor, or number to compare with}. drawn: a batch of Drawn.

        network: self.query, wrapped in DistributedDataParallel if there are several processes. step: key of draws.
        """
        # 1. the views of Eqs. 2 and 8
        where = torch.rand((), generator=common.generator("background", self.seed, step)).item()
        inputs = network_inputs(drawn, other_images(len(drawn.view_1), common.GROUP, where))
        # 2. student, PAPER: Eqs. 3 and 8: the augmented x1 and x2-s, and x3
        views = [inputs.x1, inputs.x2_s] + ([inputs.x3] if self.depositioning else [])
        z_s = [z for _, z in network(*views)]  # (B, K, D) each
        # 3. teacher, PAPER: Eq. 3: the augmented x1 and the clean x2
        z_t = self.teach(step, inputs.x1, inputs.x2)  # (B, K, D) each
        # 4. compare each region with itself in the other views
        compare = region_cosine_loss
        if self.bank:
            compare = partial(region_contrastive_loss, bank=self.bank.vectors, temperature=self.temperature)
            z_s, z_t = ([F.normalize(z, dim=2) for z in part] for part in (z_s, z_t))
        losses = {"loss_dc": compare(z_s[0], z_t[1]) + compare(z_s[1], z_t[0])}  # PAPER: Eq. 4
        if self.depositioning:
            losses["loss_dp"] = compare(z_s[2], z_t[1]) + compare(z_s[2], z_t[0])  # PAPER: Eq. 9
        values = losses | health(drawn, F.normalize(z_t[0], dim=2))
        # 5. z_t1 of this step, the teacher's augmented view (D13), becomes negatives of later steps
        if self.bank:
            values["loss_chance"] = 2 * len(losses) * math.log(len(self.bank.vectors) + 1)  # of a random guess
            self.bank.enqueue(all_gather(z_t[0]).flatten(0, 1))
        return sum(losses.values()), values  # PAPER: Eq. 10

    @torch.no_grad()
    def teach(self, step, *views):
        """The teacher's z of each view. The teacher follows the student once a step, before it encodes.

        With a bank, images are shuffled over all groups, with their boxes (D16): batch statistics must not give the
        positive away.
        """
        m = self.ema if self.bank else 1 - (1 - self.ema) * (1 + math.cos(math.pi * step / self.total)) / 2  # (D39)
        common.momentum_update(self.key.trunk, self.query.trunk, m)
        common.momentum_update(self.key.projector, self.query.projector, m)
        if not self.bank:
            return [z for _, z in self.key(*views)]
        batch = len(views[0][0]) * common.processes()
        permutation = torch.randperm(batch, generator=common.generator("shuffle", self.seed, step))
        shuffled = [[common.shuffle(x, permutation) for x in view] for view in views]
        return [common.unshuffle(z, permutation) for _, z in self.key(*shuffled)]

    def measure(self, *batch):
        drawn = Drawn(*batch)
        ((student, _),) = self.query((common.normalise(drawn.view_1), drawn.boxes_1))  # (B, K, C)
        ((teacher, _),) = self.key((common.normalise(drawn.view_2), drawn.boxes_2))
        known = torch.arange(student.shape[1], device=student.device) < drawn.found[:, None]  # the rest are repeated
        return look.found_again(student, teacher, known)

    def draw(self, path, *batch):
        drawn = Drawn(*batch)
        inputs = network_inputs(drawn, other_images(len(drawn.view_1), common.GROUP, where=0.5))
        views = {"x1, to both": inputs.x1, "x2, clean, to the teacher": inputs.x2, "x2-s, to the student": inputs.x2_s}
        if self.depositioning:
            views["x3, composed, to the student"] = inputs.x3
        ((_, student),), ((_, teacher),) = self.query([*views.values()][-1]), self.key(inputs.x2)
        similarity = F.normalize(student, dim=2) @ F.normalize(teacher, dim=2).transpose(1, 2)  # (B, K, K)
        look.draw_regions(path, views, drawn.mask_3 if self.depositioning else None, similarity)


def build(args, device, init=None, total=1):
    """The method that the settings describe, equal on all processes. init: see --init. total: steps of the schedule."""
    moco = args.framework == "moco"
    with common.drawing("init", args.seed):
        encoder = Encoder(args.arch, args.framework, args.mlp_norm, args.amp)
    if init:
        weights.load_into(encoder.trunk, init, args.arch)
    encoder = encoder if moco else common.synchronised_norms(encoder, device)
    queue_size = (args.queue_size or 65536) if moco else 0
    method = D3SSL(encoder, args.depositioning, queue_size, args.ema, args.temperature, total, args.seed)
    return method.to(device, memory_format=torch.channels_last)


# ==== Training ========================================================================================================


def train(argv=None):
    args = get_args(argv)
    run = Run("d3ssl", args)  # processes, images, output folder, log, checkpoints, signals: harness/run.py
    run.images = proposals.attach(run, args.proposals)
    if args.framework == "moco":
        args.queue_size = run.fit_queue(args.queue_size, 512 if args.demo else 65536, keys=BOXES)
    method = build(args, run.device, run.init, run.total)
    network = method.query

    lr = args.lr * args.batch_size / 256  # weight decay on norms and biases too (B3)
    optimizer = torch.optim.SGD(network.parameters(), lr, momentum=0.9, weight_decay=1e-4)
    scaler = torch.amp.GradScaler(run.device.type, enabled=args.amp == "fp16")
    run.resume(method, optimizer, scaler, exports={f"{args.arch}.pth": network.trunk})
    network = common.distributed(network, run.device)

    views, plain_views = (partial(draw_views, size=args.size, augment=names) for names in (args.augment, ()))
    for batch in run.steps(views, plain_views):
        optimizer.param_groups[0]["lr"] = common.cosine_lr(lr, run.epoch, args.epochs)
        loss, values = method(network, Drawn(*batch), run.step)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        run.log(loss=loss, lr=optimizer.param_groups[0]["lr"], **values)


if __name__ == "__main__":
    main(train)
