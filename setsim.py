# SPDX-License-Identifier: MIT
"""SetSim: dense self-supervised pre-training that matches *sets* of cells between two views, not single cells.

Wang et al., "Exploring Set Similarity for Dense Self-supervised Representation Learning", CVPR 2022.
Two crops of an image share objects, not places. Cells on which the network's own attention is high make up each crop's
set; every cell of one set is pulled to all cells of the other, and to its nearest neighbour anywhere in the other crop.

    image --crop, colour--> view q --f--> z_q --g_img--> q_img ---------------- image loss, Eq. 1 ---+
      |                              |      +---g_pix--> p_q --+                                     |
      |                              +-- attention A, Eq. 3    +-- matcher c_i, Eqs. 4-7 -- set      +-- total, Eq. 9
      |                              +-- attention A, Eq. 3    +                        loss, Eq. 8 -+
      |                              |      +---g_pix--> p_k --+
      +-----crop, colour----> view k --f'-> z_k --g_img--> k_img       f', g': momentum copies; queues: older keys

    B images of this process    C channels of z (2048)    H, W cells of z    S = H W    D embedding (128)    K queue
    q, k query and key          R rows: query cells that have a positive                m EMA    tau temperature

    python setsim.py --demo                                    a laptop, minutes, nothing to download
    torchrun --nproc_per_node 8 setsim.py --data /imagenet     section 3: Table 4's 58.2 AP
    ... --geometry 0.5 --symmetric                             the row of Tables 5-9: 59.1 AP
    ... --framework simsiam                                    Table 1's SimSiam + SetSim

What was measured with this file, and what was not run, stands in README.md; tags PAPER, OFFICIAL (the released code,
DerrickWang005/SetSim.pytorch 6a439e2), DEVIATION and AMBIGUOUS name rows of its table of decisions.
"""

import argparse
import copy
import os
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter
from scipy.optimize import linear_sum_assignment
from torch import nn
from torchvision import transforms
from torchvision.transforms import functional as TF

import common
from common import UserError, print0

# ======================================================================================================================
# Settings: every default is the paper's (section 4, "Pretraining Setting"), on MoCo-v2
# ======================================================================================================================

# PAPER: section 4, "Pretraining Setting" (lr 0.1). AMBIGUOUS: S24. Table 2 was run on SimSiam: there the set goes by ratio.
SIMSIAM = dict(lr=0.1, dim=2048, threshold=None, ratio=30.0)
# OFFICIAL: S1, S4, S6, S12. What the released training script sets, where it differs from the text.
OFFICIAL = dict(attention="square", threshold=0.7, ratio=None, mu=0.2, matcher="set2set", geometry=0.5)
DEMO = dict(
    data="scenes", arch="resnet18", size=136, batch_size=64, epochs=3, lr=0.6, queue_size=512, ema=0.99, temperature=0.1
)

SET_MATCHERS = ("set2set", "set2set-nn")
PIXEL_MATCHERS = ("random", "sort", "hungarian")
MATCHERS = (*PIXEL_MATCHERS, *SET_MATCHERS, "densecl", "geometry", "none")


def get_args(argv=None):
    # fmt: off
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flag, switch = parser.add_argument, argparse.BooleanOptionalAction
    flag("--data", default=None, metavar="DIR", help="folder of images, searched recursively (its train/ if there is one), or 'scenes[:COUNT]'")
    flag("--output-dir", default="runs/setsim", help="checkpoint.pth, ARCH.pth, log.jsonl and pictures go there; a run found there is continued")
    flag("--demo", action="store_true", help="a small complete job on built-in scenes, minutes on two CPU cores; other flags win over its settings")
    flag("--preset", default="paper", choices=("paper", "official"), help="settings of the text, or of the released training script")
    flag("--framework", default="moco", choices=("moco", "simsiam"), help="MoCo-v2 (queues, momentum keys) or SimSiam (predictor, no negatives)")
    # the matcher, section 3.3
    flag("--matcher", default="set2set-nn", choices=MATCHERS, help="Table 3's five; densecl: arg-max over all cells; geometry: same place; none: the baseline")
    flag("--attention", default="abs", choices=("abs", "square"), help="statistic over channels: sum of |z| (Eq. 3) or mean of z^2 (released code)")
    flag("--threshold", default=0.7, type=float, help="delta of Eq. 4: cells with attention of at least this are the set; 0 to 1")
    flag("--ratio", default=None, type=float, help="Delta of Table 2, percent of all cells, in place of delta; default 30 on SimSiam and for random, sort, hungarian")
    flag("--mu", default=0.0, type=float, help="mu of Eq. 6: pairs whose features have no higher cosine are dropped; 0 drops next to nothing, since z >= 0")
    flag("--geometry", default=None, type=float, metavar="T", help="Table 4's Geo: cells closer than T cell diagonals are positives too; the best row has 0.5")
    flag("--symmetric", default=False, action=switch, help="Table 4's Sym: mean of both directions; twice the encoding (SimSiam always is)")
    # the losses
    flag("--loss-weight", default=0.5, type=float, help="lambda of Eq. 9: share of the set loss; 0 to 1")
    flag("--temperature", default=0.2, type=float, help="tau of Eqs. 1 and 8: the smaller, the more the hardest negatives count")
    flag("--dim", default=128, type=int, help="D, size of embeddings; default 2048 on SimSiam")
    flag("--queue-size", default=65536, type=int, help="K, of each queue; more than the data has images holds several old keys of one image as negatives")
    flag("--ema", default=0.999, type=float, help="m: key encoder <- m key + (1 - m) query; short runs need a smaller one")
    # the encoder and its images
    flag("--arch", default="resnet50", choices=common.ARCHS, help="torchvision ResNet")
    flag("--size", default=224, type=int, help="side of a view in pixels; the map has size/32 cells a side, rounded up")
    flag("--init", default=None, metavar="FILE", help="start from these weights: any checkpoint with a ResNet in it, or 'imagenet'")
    flag("--group-size", default=32, type=int, help="images whose batch statistics are taken together, as on one of the paper's GPUs")
    # optimisation
    flag("--epochs", default=200, type=int, help="the schedule's length; Tables 1-3 use 100")
    flag("--batch-size", default=256, type=int, help="over all processes; must be divisible by their number")
    flag("--lr", default=0.03, type=float, help="at batch 256, scaled linearly with the batch; default 0.1 on SimSiam")
    flag("--fix-pred-lr", default=True, action=switch, help="SimSiam: no decay of the predictors' learning rate")
    flag("--momentum", default=0.9, type=float, help="momentum of SGD")
    flag("--weight-decay", default=1e-4, type=float, help="on all parameters, norms and biases included")
    flag("--amp", default="none", choices=("none", "bf16", "fp16"), help="autocast of the encoders; losses and queues are fp32 always")
    flag("--seed", default=0, type=int, help="everything random is a function of it")
    # the run
    flag("--steps", default=None, type=int, help="stop after so many steps in all, schedule unchanged")
    flag("--workers", default=min(8, common.usable_cores()), type=int, help="loader processes for each training process; no influence on results")
    flag("--print-freq", default=10, type=int, help="steps between log lines")
    flag("--save-every", default=None, type=int, help="steps between checkpoints; default one epoch")
    flag("--resume", default=None, metavar="FILE", help="continue from this checkpoint; default OUTPUT_DIR/checkpoint.pth if it is there")
    # fmt: on
    args, given = parser.parse_args(argv), common.given_flags(parser, argv)

    chosen = dict(SIMSIAM) if args.framework == "simsiam" else {}
    chosen |= OFFICIAL if args.preset == "official" else {}
    chosen |= DEMO if args.demo else {}
    if args.demo and args.framework == "simsiam":
        chosen |= dict(dim=512, lr=0.1)
    for name, value in chosen.items():
        if name not in given:
            setattr(args, name, value)
    if args.matcher in PIXEL_MATCHERS and "ratio" not in given:
        args.ratio, args.threshold = 30.0, None  # AMBIGUOUS: S20. Table 3 prints no number.
    if "ratio" in given:
        args.threshold = None
    elif "threshold" in given and args.matcher not in PIXEL_MATCHERS:
        args.ratio = None
    if args.matcher == "geometry" and args.geometry is None:
        args.geometry = 0.5
    if "geometry" not in given and args.matcher not in (*SET_MATCHERS, "geometry"):
        args.geometry = None
    check_args(args, given)
    args.given = sorted(given)
    return args


def check_args(args, given):
    """One clear line for values out of range and for flags that would have no effect."""
    common.check_range(
        args, threshold=(0, 1), ratio=(1, 100), mu=(-1, 1), geometry=(1e-6, None), loss_weight=(0, 1), temperature=(1e-3, None),
        dim=(4, None), queue_size=(1, None), ema=(0, 1), size=(32, None), group_size=(2, None), epochs=(1, None),
        batch_size=(2, None), lr=(0, None), momentum=(0, 1), weight_decay=(0, None), steps=(0, None), workers=(0, None),
        print_freq=(1, None), save_every=(1, None), seed=(0, None),
    )  # fmt: skip
    useless = {name: "SimSiam has no queue and no momentum encoder" for name in ("queue_size", "ema")}
    useless |= {"temperature": "SimSiam's loss has none", "group_size": "SimSiam's batch norm is over the batch"}
    useless |= {"symmetric": "SimSiam's loss always is"}
    if args.framework == "moco":
        useless = {"fix_pred_lr": "only SimSiam has a predictor"}
    if args.matcher not in (*SET_MATCHERS, *PIXEL_MATCHERS):
        useless |= dict.fromkeys(("threshold", "ratio", "attention"), f"--matcher {args.matcher} selects no set")
    if args.matcher not in SET_MATCHERS:
        useless |= {"mu": "it belongs to set2set and set2set-nn"}
    if args.matcher not in (*SET_MATCHERS, "geometry"):
        useless |= {"geometry": "it can be added to set2set and set2set-nn"}
    if args.matcher == "none":
        useless |= {"loss_weight": "--matcher none has no set loss"}
    if args.matcher in PIXEL_MATCHERS:
        useless |= {"threshold": f"--matcher {args.matcher} needs sets of one size: use --ratio"}
    for name in useless.keys() & given.keys():
        raise UserError(f"--{name.replace('_', '-')} has no effect here, leave it out: {useless[name]}")
    if {"threshold", "ratio"} <= given.keys():
        raise UserError("--threshold and --ratio are two ways to choose the set: give one")
    if args.data is None:
        raise UserError("give --data DIR (a folder of images), or --demo for a small job on built-in scenes")


# ======================================================================================================================
# Views: two random crops of an image, each with the window that it shows
# ======================================================================================================================


def random_view(image, size, flip_first):
    """MoCo-v2's augmentation, keeping track of the place; draws from torch's global generator.

    Args:
        image: PIL RGB. size: side of the view in pixels. flip_first: flip before the colours change, not after.
    Returns:
        view: (3, size, size) uint8.
        window: (4,) fp32, the image coordinates (x0, y0, x1, y1) that the view's left, top, right and bottom edges
            show, as fractions of the image's width and height. Of a flipped view x0 > x1.
    """
    width, height = image.size
    top, left, h, w = transforms.RandomResizedCrop.get_params(image, scale=(0.2, 1.0), ratio=(3 / 4, 4 / 3))
    view = TF.resized_crop(image, top, left, h, w, [size, size])
    x0, y0, x1, y1 = left / width, top / height, (left + w) / width, (top + h) / height

    flipped = torch.rand(()).item() < 0.5
    if flipped:
        x0, x1 = x1, x0
    if flipped and flip_first:  # OFFICIAL: S21. main_pretrain.py flips first; the distribution is the same.
        view = TF.hflip(view)
    if torch.rand(()).item() < 0.8:
        view = transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)(view)
    if torch.rand(()).item() < 0.2:
        view = TF.rgb_to_grayscale(view, 3)
    if torch.rand(()).item() < 0.5:  # OFFICIAL: B8. sigma is Pillow's radius, as in MoCo-v2
        view = view.filter(ImageFilter.GaussianBlur(torch.empty(()).uniform_(0.1, 2.0).item()))
    if flipped and not flip_first:
        view = TF.hflip(view)
    return TF.pil_to_tensor(view), torch.tensor([x0, y0, x1, y1])


class TwoViews(torch.utils.data.Dataset):
    """(epoch, index) -> view_q, view_k, window_q, window_k, index, unreadable images passed over (see ImageFolder)."""

    def __init__(self, images, size, flip_first, seed):
        self.images, self.size, self.flip_first, self.seed = images, size, flip_first, seed

    def __getitem__(self, key):
        epoch, index = key
        image, passed = self.images[index]
        with common.drawing("views", self.seed, epoch, index):
            view_q, window_q = random_view(image, self.size, self.flip_first)
            view_k, window_k = random_view(image, self.size, self.flip_first)
        return view_q, view_k, window_q, window_k, index, passed


# ======================================================================================================================
# Encoders: backbone f and the parallel projectors g_img, g_pix (section 3.2)
# ======================================================================================================================


class Encoded(NamedTuple):
    """What an Encoder makes of a view, unnormalised."""

    z: torch.Tensor  # (B, C, H, W)
    image: torch.Tensor  # (B, D)
    dense: torch.Tensor | None = None  # (B, D, H, W); None for the baseline


class Encoder(nn.Module):
    """Backbone with MoCo-v2's global projector and DenseCL's dense one. PAPER: Eq. 2 and section 3.2."""

    def __init__(self, arch, dim, group_size, dense=True):
        super().__init__()
        self.group_size, self.dense = group_size, dense
        self.trunk = common.ResNetTrunk(arch)
        C = self.trunk.widths[-1]
        self.image_head = nn.Sequential(nn.Linear(C, C), nn.ReLU(), nn.Linear(C, dim))
        if dense:
            self.dense_head = nn.Sequential(nn.Conv2d(C, C, 1), nn.ReLU(), nn.Conv2d(C, dim, 1))

    def encode(self, images):
        z = self.trunk(common.normalise(images))[-1]  # (B, C, H, W) OFFICIAL: S2. C5 after its ReLU
        image = self.image_head(z.mean((2, 3)))  # (B, D)
        if not self.dense:
            return z, image
        return z, image, self.dense_head(z)  # (B, D, H, W)

    def forward(self, *views):
        """Each view (B, 3, size, size) uint8 -> Encoded. Batch statistics are per group of images of one view."""
        return [Encoded(*common.encode_in_groups(self.encode, self.group_size, view)) for view in views]


class Predicted(NamedTuple):
    """What a SimSiamEncoder makes of a view, unnormalised."""

    z: torch.Tensor  # (B, C, H, W)
    projection: torch.Tensor  # (B, D)
    prediction: torch.Tensor  # (B, D)
    dense_projection: torch.Tensor | None = None  # (B, D, H, W); None for the baseline
    dense_prediction: torch.Tensor | None = None  # (B, D, H, W)


class SimSiamEncoder(nn.Module):
    """Backbone with SimSiam's projector and predictor, and 1x1-convolution copies of both for the cells.

    PAPER: section 4.1, "Comparisons with Baselines". AMBIGUOUS: S17. Layers of the dense branch.
    """

    def __init__(self, arch, dim, dense=True):
        super().__init__()
        self.dense = dense
        self.trunk = common.ResNetTrunk(arch, zero_init_residual=True)  # OFFICIAL: B16. SimSiam's
        C = self.trunk.widths[-1]
        self.projector, self.predictor = simsiam_heads(C, dim, nn.Linear, nn.BatchNorm1d)
        if dense:
            self.dense_projector, self.dense_predictor = simsiam_heads(C, dim, conv1x1, nn.BatchNorm2d)

    def forward(self, *views):
        """Each view (B, 3, size, size) uint8 -> Predicted."""
        return [Predicted(*self.encode(view)) for view in views]

    def encode(self, images):
        z = self.trunk(common.normalise(images))[-1]  # (B, C, H, W)
        projection = self.projector(z.mean((2, 3)))  # (B, D)
        if not self.dense:
            return z, projection, self.predictor(projection)
        dense = self.dense_projector(z)  # (B, D, H, W)
        return z, projection, self.predictor(projection), dense, self.dense_predictor(dense)


def conv1x1(inputs, outputs, bias=True):
    return nn.Conv2d(inputs, outputs, 1, bias=bias)


def simsiam_heads(C, dim, layer, norm):
    """SimSiam's projector C-C-C-D and predictor D-D/4-D."""
    projector = nn.Sequential(
        layer(C, C, bias=False), norm(C), nn.ReLU(),
        layer(C, C, bias=False), norm(C), nn.ReLU(),
        layer(C, dim, bias=False), norm(dim, affine=False),  # DEVIATION: B7. SimSiam freezes a bias that norm removes.
    )  # fmt: skip
    predictor = nn.Sequential(layer(dim, dim // 4, bias=False), norm(dim // 4), nn.ReLU(), layer(dim // 4, dim))
    return projector, predictor


# ======================================================================================================================
# Matcher: which key cells are positives of which query cells (section 3.3). No gradients, no parameters.
# ======================================================================================================================


def attention_map(z, statistic="abs"):
    """PAPER: Eq. 3, min-max normalised activity of the cells.

    Args:
        z: (B, C, S) feature maps. statistic: "abs", the sum of |z| over channels (the text), or "square", the mean of
            z^2 (OFFICIAL: S1, matcher.py).
    Returns:
        A: (B, S) in [0, 1]; NaN for a map without contrast, which then selects nothing (AMBIGUOUS: S26).
    """
    z = z.float()
    activity = z.abs().sum(1) if statistic == "abs" else z.square().mean(1)  # (B, S)
    low, high = activity.amin(1, keepdim=True), activity.amax(1, keepdim=True)
    return (activity - low) / (high - low)


def threshold_set(A, delta):
    """PAPER: Eq. 4, the cells with A(j) >= delta, as a mask (B, S). 1 keeps only the maximum, 0 everything."""
    return A >= delta


def ratio_set(A, percent):
    """PAPER: Table 2, the Delta percent of cells with the highest attention, as a mask (B, S).

    At least one cell; halves round up; equal values go by index (AMBIGUOUS: S19).
    """
    count = max(1, int(percent * A.shape[1] / 100 + 0.5))
    order = torch.argsort(A, dim=1, descending=True, stable=True)  # (B, S)
    chosen = torch.zeros_like(A, dtype=torch.bool).scatter(1, order[:, :count], True)
    return chosen & ~A.isnan()


def cosine_similarity(z_q, z_k):
    """PAPER: Eq. 5's sim: cosine between every query and every key cell, (B, C, S) x 2 -> (B, S, S)."""
    z_q, z_k = F.normalize(z_q.float(), dim=1), F.normalize(z_k.float(), dim=1)
    return torch.einsum("bci,bcj->bij", z_q, z_k)


def set_to_set(set_q, set_k, similarity, mu, nearest, kept_at_mu=False, geometry=None):
    """The matcher of the paper: Eqs. 5-7, c_i = (a_i \\ u_i) | s_i.

    Args:
        set_q, set_k: (B, S) bool, the two sets. similarity: (B, S, S) cosine of features.
        mu: threshold of Eq. 6. nearest: whether to join the nearest neighbours (Set2Set-NN) or not (Set2Set).
        kept_at_mu: False, the text: drop sim <= mu, and every row of the query set gets its neighbour. True, the
            released code (OFFICIAL: S4, S5): keep sim >= mu, and only rows that still have a member get it.
        geometry: None or (B, S, S) bool, positives by place to join before the neighbours (OFFICIAL: S12, S13).
    Returns:
        c: (B, S, S) bool, c[b, i, j]: key cell j is a positive of query cell i.
    """
    a = set_q[:, :, None] & set_k[:, None, :]  # every cell of one set with every cell of the other
    u = similarity < mu if kept_at_mu else similarity <= mu  # PAPER: Eq. 6
    c = a & ~u
    if geometry is not None:
        c = c | geometry
    if nearest:  # PAPER: Eq. 7. AMBIGUOUS: S5. The unbracketed a | s \ u is read as: neighbours are exempt from mu.
        rows = c.any(2) if kept_at_mu else c.any(2) | set_q
        s = F.one_hot(similarity.argmax(2), similarity.shape[2]).bool()
        c = c | (s & (rows & set_k.any(1, keepdim=True))[:, :, None])
    return c


def random_pairs(set_q, set_k, rng=None):
    """PAPER: Table 3's Random: the cells of two sets of one size paired at random, one to one.

    Args:
        set_q, set_k: (B, S) bool, equally many in both. rng: torch generator on the CPU.
    Returns:
        c: (B, S, S) bool, at most one member in each row and column.
    """
    c = torch.zeros_like(set_q[:, :, None] & set_k[:, None, :])
    for b in range(len(c)):
        i, j = set_q[b].nonzero()[:, 0], set_k[b].nonzero()[:, 0]  # (n,)
        j = j[torch.randperm(len(j), generator=rng).to(j.device)]
        n = min(len(i), len(j))  # 0 if one of the maps has no contrast
        c[b, i[:n], j[:n]] = True
    return c


def sorted_pairs(set_q, set_k, A_q, A_k):
    """PAPER: Table 3's Sort: the highest attention of one set with the highest of the other, and so on down.

    Args and result as random_pairs; A_q, A_k: (B, S), attention maps.
    """
    c = torch.zeros_like(set_q[:, :, None] & set_k[:, None, :])
    for b in range(len(c)):
        i, j = set_q[b].nonzero()[:, 0], set_k[b].nonzero()[:, 0]  # (n,)
        i = i[A_q[b, i].argsort(descending=True, stable=True)]
        j = j[A_k[b, j].argsort(descending=True, stable=True)]
        n = min(len(i), len(j))
        c[b, i[:n], j[:n]] = True
    return c


def hungarian_pairs(set_q, set_k, similarity):
    """PAPER: Table 3's Hungarian: the one-to-one assignment of two sets with the least total cosine distance.

    Args and result as random_pairs; similarity: (B, S, S), cosine of features.
    """
    c = torch.zeros_like(similarity, dtype=torch.bool)
    for b in range(len(c)):
        i, j = set_q[b].nonzero()[:, 0], set_k[b].nonzero()[:, 0]  # (n,)
        rows, columns = linear_sum_assignment(1 - similarity[b][i][:, j].cpu().numpy())
        c[b, i[rows], j[columns]] = True
    return c


def cell_centres(window, H, W):
    """Image coordinates of the centres of a view's H x W cells, row by row.

    Args:
        window: (B, 4) as random_view gives it; x0 > x1 of a flipped view makes the centres run from right to left.
    Returns:
        centres: (B, S, 2), x and y as fractions of the image. diagonal: (B,), length of a cell's diagonal.
    """
    x0, y0, x1, y1 = window.unbind(1)
    width, height = (x1 - x0) / W, (y1 - y0) / H
    # DEVIATION: S27. From edge to edge; PixPro's from pixel centre to pixel centre is 0/0 for a single pixel.
    x = x0[:, None] + (torch.arange(W, device=window.device) + 0.5) * width[:, None]  # (B, W)
    y = y0[:, None] + (torch.arange(H, device=window.device) + 0.5) * height[:, None]  # (B, H)
    x, y = x[:, None, :].expand(-1, H, -1), y[:, :, None].expand(-1, -1, W)
    return torch.stack([x, y], dim=3).flatten(1, 2), torch.hypot(width, height)


def geometry_pairs(window_q, window_k, H, W, T):
    """PAPER: Table 4's Geo, PixPro's rule: centres closer than T times the longer cell diagonal of the two views.

    Args:
        window_q, window_k: (B, 4), see random_view. H, W: cells. T: 0.5 in SetSim (OFFICIAL: S12), 0.7 in PixPro.
    Returns:
        (B, S, S) bool. For a window that is square in image fractions and itself, exactly the identity up to T = 0.7.
    """
    centres_q, diagonal_q = cell_centres(window_q, H, W)
    centres_k, diagonal_k = cell_centres(window_k, H, W)
    difference = centres_q[:, :, None] - centres_k[:, None, :]  # (B, S, S, 2)
    return difference.square().sum(3).sqrt() < T * torch.maximum(diagonal_q, diagonal_k)[:, None, None]


class Match(NamedTuple):
    """What the matcher found. attention, sets: (B, S) for both views; similarity, positives: (B, S, S)."""

    attention_q: torch.Tensor
    attention_k: torch.Tensor
    set_q: torch.Tensor
    set_k: torch.Tensor
    similarity: torch.Tensor
    positives: torch.Tensor


@torch.no_grad()
def match(z_q, z_k, window_q, window_k, matcher, statistic, threshold, ratio, mu, kept_at_mu, geometry, rng=None):
    """From two feature maps (B, C, H, W) and windows (B, 4) to the positives of every query cell; see MATCHERS."""
    H, W = z_q.shape[2:]
    z_q, z_k = z_q.flatten(2), z_k.flatten(2)  # (B, C, S)
    A_q, A_k = attention_map(z_q, statistic), attention_map(z_k, statistic)
    set_q, set_k = (threshold_set(A, threshold) if ratio is None else ratio_set(A, ratio) for A in (A_q, A_k))
    if matcher not in SET_MATCHERS + PIXEL_MATCHERS:
        set_q, set_k = set_q & False, set_k & False  # the others select no set: none is to be seen in the pictures
    similarity = cosine_similarity(z_q, z_k)
    same_place = None if geometry is None else geometry_pairs(window_q, window_k, H, W, geometry)
    if matcher in SET_MATCHERS:
        c = set_to_set(set_q, set_k, similarity, mu, matcher == "set2set-nn", kept_at_mu, same_place)
    elif matcher == "random":
        c = random_pairs(set_q, set_k, rng)
    elif matcher == "sort":
        c = sorted_pairs(set_q, set_k, A_q, A_k)
    elif matcher == "hungarian":
        c = hungarian_pairs(set_q, set_k, similarity)
    elif matcher == "densecl":
        c = F.one_hot(similarity.argmax(2), H * W).bool()
    elif matcher == "geometry":
        c = same_place
    else:
        c = torch.zeros_like(similarity, dtype=torch.bool)
    return Match(A_q, A_k, set_q, set_k, similarity, c)


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
    """PAPER: Eq. 1, MoCo's InfoNCE: -log( exp(q.k+) / (exp(q.k+) + sum exp(q.k-)) ), mean over images.

    Args:
        q, k: (B, D). queue: (K, D). temperature: tau.
    """
    positive = (q * k).sum(1) / temperature  # (B,)
    return (torch.logaddexp(positive, negative_logsumexp(q, queue, temperature)) - positive).mean()


def set_contrastive_loss(p_q, p_k, positives, queue, temperature):
    """PAPER: Eq. 8: - 1/|c_i| sum_{j in c_i} log( exp(p_i.p_j) / (sum_{j' in c_i} exp(p_i.p_j') + sum exp(p_i.k-)) ).

    Every positive of a row is in the denominator of each of them (OFFICIAL: S7); other cells of the same image are in
    none (OFFICIAL: S8). DEVIATION: S9. Mean over an image's rows, then over images, not the printed sum: that would
    grow with the set. Rows without positives do not count, images without rows count as 0 (OFFICIAL: S10).

    Args:
        p_q, p_k: (B, S, D), query and key cells. positives: (B, S, S) bool. queue: (K, D), pooled keys of other images.
    Returns:
        scalar; exactly 0, with zero gradients, if there is no positive at all.
    """
    has_positive = positives.any(2)  # (B, S)
    image, cell = has_positive.nonzero(as_tuple=True)  # (R,), the only rows that cost anything
    c = positives[image, cell]  # (R, S)
    logits = torch.einsum("bid,bjd->bij", p_q, p_k)[image, cell] / temperature  # (R, S)
    positive = logits.masked_fill(~c, -torch.inf).logsumexp(1)  # (R,)
    negative = negative_logsumexp(p_q[image, cell], queue, temperature)  # (R,)
    row_loss = torch.logaddexp(positive, negative) - (logits * c).sum(1) / c.sum(1)  # (R,)
    return (row_loss / has_positive.sum(1)[image]).sum() / len(p_q)


def image_cosine_loss(prediction, projection):
    """SimSiam: negative cosine of (B, D) predictions and (B, D) projections, through which no gradient flows."""
    return -F.cosine_similarity(prediction, projection.detach(), dim=1).mean()


def set_cosine_loss(prediction, projection, positives):
    """Eq. 8 without negatives: minus the mean over j in c_i of cos(prediction_i, stop-gradient(projection_j)).

    AMBIGUOUS: S18. Averaged as set_contrastive_loss. (B, S, D), (B, S, D), (B, S, S) bool -> scalar
    """
    cosine = torch.einsum("bid,bjd->bij", F.normalize(prediction, dim=2), F.normalize(projection.detach(), dim=2))
    row = (cosine * positives).sum(2) / positives.sum(2).clamp(min=1)  # (B, S)
    return -(row.sum(1) / positives.any(2).sum(1).clamp(min=1)).mean()


# ======================================================================================================================
# Method: one iteration, from views to the loss
# ======================================================================================================================


def cells(dense):
    """(B, D, H, W) -> (B, S, D), a row per cell."""
    return dense.flatten(2).transpose(1, 2)


def health(found, image, dense):
    """The numbers of a log line that tell whether matching and embeddings are alive (scalars on the device)."""
    rows = found.positives.any(2)  # (B, S)
    return {
        "positives": found.positives.sum() / rows.sum().clamp(min=1),  # a row's, |c_i|
        "rows": rows.sum(1).float().mean(),  # an image's
        "empty": (~rows.any(1)).float().mean(),  # share of images without rows
        "std_image": image.std(0, correction=0).mean(),
        "std_dense": dense.flatten(0, 1).std(0, correction=0).mean(),
    }


class SetSimMoCo(nn.Module):
    """SetSim on MoCo-v2: momentum encoder, shuffling BN, one queue of image keys and one of pooled dense keys.

    Args:
        encoder: an Encoder; without a dense head this is plain MoCo-v2.
        matcher: function (z_q, z_k, window_q, window_k, rng) -> Match.
        queue_size, ema, temperature, loss_weight, symmetric, seed: see get_args.
        autocast: context manager factory for the encoders.
    """

    def __init__(self, encoder, dim, matcher, queue_size, ema, temperature, loss_weight, symmetric, seed, autocast):
        super().__init__()
        self.query, self.key = encoder, copy.deepcopy(encoder).requires_grad_(False)
        self.image_queue = common.Queue(queue_size, dim, common.generator("image queue", seed))
        if encoder.dense:
            self.set_queue = common.Queue(queue_size, dim, common.generator("set queue", seed))
        self.matcher, self.ema, self.temperature, self.loss_weight = matcher, ema, temperature, loss_weight
        self.symmetric, self.seed, self.autocast = symmetric, seed, autocast

    @torch.no_grad()
    def encode_keys(self, views, permutation):
        """The key network on shuffled images, and its outputs back in order."""
        with self.autocast():
            outputs = self.key(*(common.shuffle(view, permutation) for view in views))
        return [Encoded(*(common.unshuffle(x, permutation) for x in output if x is not None)) for output in outputs]

    def direction(self, query, key, window_q, window_k, rng):
        """Both losses of one direction, view q -> view k, against the queues as they are."""
        q, k = F.normalize(query.image.float(), dim=1), F.normalize(key.image.float(), dim=1)  # (B, D)
        image_loss = image_contrastive_loss(q, k, self.image_queue.vectors, self.temperature)  # PAPER: Eq. 1
        if not self.query.dense:
            return image_loss, {"loss_image": image_loss.detach(), "std_image": q.detach().std(0, correction=0).mean()}
        p_q, p_k = (F.normalize(cells(x.dense.float()), dim=2) for x in (query, key))  # (B, S, D)
        found = self.matcher(query.z.detach(), key.z, window_q, window_k, rng)
        set_loss = set_contrastive_loss(p_q, p_k, found.positives, self.set_queue.vectors, self.temperature)
        loss = (1 - self.loss_weight) * image_loss + self.loss_weight * set_loss  # PAPER: Eq. 9
        values = {"loss_image": image_loss.detach(), "loss_set": set_loss.detach()}
        return loss, values | health(found, q.detach(), p_q.detach())

    def enqueue(self, keys):
        """Image keys, and dense keys averaged over their cells before they are normalised (OFFICIAL: S11)."""
        image = [F.normalize(key.image.float(), dim=1) for key in keys]  # (B, D) for each view
        self.image_queue.enqueue(torch.cat([common.all_gather(x) for x in image]))
        if self.query.dense:
            pooled = [F.normalize(key.dense.float().mean((2, 3)), dim=1) for key in keys]  # (B, D) for each view
            self.set_queue.enqueue(torch.cat([common.all_gather(x) for x in pooled]))

    def forward(self, network, view_q, view_k, window_q, window_k, step, rank=0):
        """One iteration.

        Args:
            network: self.query, wrapped in DistributedDataParallel where there are several processes.
            view_q, view_k: (B, 3, size, size) uint8. window_q, window_k: (B, 4). step, rank: keys of random draws.
        Returns:
            loss (scalar), {name: detached scalar}
        """
        views = [view_q, view_k]
        # 1. queries: one view, or both for the symmetric loss
        with self.autocast():
            queries = network(*views) if self.symmetric else network(view_q)
        # 2. the momentum encoder follows, once a step and before its keys are computed
        common.momentum_update(self.key, self.query, self.ema)
        # 3. keys, in other company than their queries
        batch = len(view_q) * common.world_size()
        permutation = torch.randperm(batch, generator=common.generator("shuffle", self.seed, step))
        keys = self.encode_keys(views if self.symmetric else views[1:], permutation)
        # 4. match and compare, both directions against the same queues (AMBIGUOUS: S14. their mean)
        rng = common.generator("match", self.seed, step, rank)
        if self.symmetric:
            forth, values = self.direction(queries[0], keys[1], window_q, window_k, rng)
            back, values_back = self.direction(queries[1], keys[0], window_k, window_q, rng)
            loss, values = (forth + back) / 2, {name: (values[name] + values_back[name]) / 2 for name in values}
        else:
            loss, values = self.direction(queries[0], keys[0], window_q, window_k, rng)
        # 5. the keys of this step become negatives of later ones
        self.enqueue(keys)
        return loss, {"loss": loss.detach(), **values}

    @torch.no_grad()
    def features(self, view_q, view_k):
        """(z_q, z_k) as the matcher sees them, with the batch statistics of these images."""
        with self.autocast():
            return self.query(view_q)[0].z.float(), self.key(view_k)[0].z.float()


class SetSimSimSiam(nn.Module):
    """SetSim on SimSiam: one network with predictors, both directions, no negatives. AMBIGUOUS: S18."""

    def __init__(self, encoder, matcher, loss_weight, seed, autocast):
        super().__init__()
        self.query = encoder
        self.matcher, self.loss_weight, self.seed, self.autocast = matcher, loss_weight, seed, autocast

    def direction(self, one, other, window_one, window_other, rng):
        """Both losses of one direction: predictions of one view, projections of the other."""
        image_loss = image_cosine_loss(one.prediction.float(), other.projection.float())
        image = F.normalize(other.projection.detach().float(), dim=1)
        if not self.query.dense:
            return image_loss, {"loss_image": image_loss.detach(), "std_image": image.std(0, correction=0).mean()}
        found = self.matcher(one.z.detach(), other.z.detach(), window_one, window_other, rng)
        dense = other.dense_projection.detach().float()  # (B, D, H, W)
        set_loss = set_cosine_loss(cells(one.dense_prediction.float()), cells(dense), found.positives)
        loss = (1 - self.loss_weight) * image_loss + self.loss_weight * set_loss  # PAPER: Eq. 9
        values = {"loss_image": image_loss.detach(), "loss_set": set_loss.detach()}
        return loss, values | health(found, image, F.normalize(cells(dense), dim=2))

    def forward(self, network, view_q, view_k, window_q, window_k, step, rank=0):
        """One iteration; arguments and results as SetSimMoCo.forward."""
        with self.autocast():
            one, other = network(view_q, view_k)
        rng = common.generator("match", self.seed, step, rank)
        forth, values = self.direction(one, other, window_q, window_k, rng)
        back, values_back = self.direction(other, one, window_k, window_q, rng)
        loss, values = (forth + back) / 2, {name: (values[name] + values_back[name]) / 2 for name in values}
        return loss, {"loss": loss.detach(), **values}

    @torch.no_grad()
    def features(self, view_q, view_k):
        """(z_q, z_k) as the matcher sees them, with the batch statistics of these images."""
        with self.autocast():
            return tuple(output.z.float() for output in self.query(view_q, view_k))


def build(args, world, init=None):
    """The method that the settings describe, on its device, equal on all processes; `init`: weights to start from."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.amp, torch.float32)

    def autocast():
        return torch.autocast(world.device.type, dtype, enabled=args.amp != "none")

    def matcher(z_q, z_k, window_q, window_k, rng):
        return match(
            z_q, z_k, window_q, window_k, args.matcher, args.attention, args.threshold, args.ratio, args.mu,
            args.preset == "official", args.geometry, rng,
        )  # fmt: skip

    dense = args.matcher != "none"
    with common.drawing("init", args.seed):
        if args.framework == "moco":
            encoder = Encoder(args.arch, args.dim, args.group_size, dense)
        else:
            encoder = SimSiamEncoder(args.arch, args.dim, dense)
    if init:
        weights, line = common.load_backbone(init, args.arch)
        encoder.trunk.load_state_dict(weights)
        print0(line)
    if args.framework == "moco":
        method = SetSimMoCo(
            encoder, args.dim, matcher, args.queue_size, args.ema, args.temperature,
            args.loss_weight, args.symmetric, args.seed, autocast,
        )  # fmt: skip
    else:
        if world.size > 1 and world.device.type == "cuda":
            encoder = nn.SyncBatchNorm.convert_sync_batchnorm(encoder)
        elif world.size > 1:
            print0("synchronised batch norm needs CUDA: each process takes the statistics of its own images")
        method = SetSimSimSiam(encoder, matcher, args.loss_weight, args.seed, autocast)
    return method.to(world.device, memory_format=torch.channels_last)


# ======================================================================================================================
# What the matcher sees: a picture and a number, on fixed crops
# ======================================================================================================================


def correspondence_accuracy(similarity, window_q, window_k, H, W):
    """How often the most similar key cell lies within one cell of the true place.

    Args:
        similarity: (B, S, S). window_q, window_k: (B, 4), see random_view.
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
    """On fixed pairs of crops: draw OUTPUT_DIR/matches_<title>.png, print and return the correspondence accuracy.

    The networks are copies in training mode, so that batch statistics are what the loss sees and nothing is changed.
    All processes compute the same (synchronised batch norm waits for all); the first one draws.
    """
    method = copy.deepcopy(method)
    hits, chances, cells = 0.0, 0.0, 0
    for first in range(0, 256 if args.demo else 32, 32):
        pairs = []
        for i in range(first, first + 32):
            with common.drawing("probe", args.seed, i):
                image = images.probe(i)
                pairs.append([*random_view(image, args.size, False), *random_view(image, args.size, False)])
        view_q, window_q, view_k, window_k = (torch.stack(x).to(world.device) for x in zip(*pairs, strict=True))
        z_q, z_k = method.features(view_q, view_k)
        H, W = z_q.shape[2:]
        found = method.matcher(z_q, z_k, window_q, window_k, common.generator("match", args.seed, "probe"))
        if first == 0 and world.rank == 0:
            draw_matches(os.path.join(args.output_dir, f"matches_{title}.png"), view_q[:6], view_k[:6], found, H, W)
        hit, chance, n = correspondence_accuracy(found.similarity, window_q, window_k, H, W)
        hits, chances, cells = hits + hit * n, chances + chance * n, cells + n
    hits, chances = hits / cells, chances / cells
    where = "held-out scenes" if images.held_out else "fixed crops of the training images"
    print0(
        f"{title} of training: best match within one cell of the true place for {hits:.1%} of {cells} cells on {where} "
        f"(chance {chances:.1%})"
    )
    return {"hits": hits, "chance": chances, "cells": cells}


def draw_matches(path, view_q, view_k, found, H, W):
    """PAPER: Figure 3. A row per image: view q, its attention and set, view k, its attention and set.

    One cell of view q (the most attentive with a positive) is linked to all its positives in view k; red circles are
    the nearest neighbours of all rows, Eq. 5.

    Args:
        view_q, view_k: (n, 3, size, size) uint8. found: Match of these images, or of more.
    """
    side, gap, orange, blue, red = 224, 6, (255, 176, 0), (64, 176, 255), (230, 40, 40)
    titles = ("view q, one cell", "attention and set q", "view k: its positives, neighbours red", "attention and set k")
    canvas = Image.new("RGB", (4 * (side + gap) + gap, len(view_q) * (side + gap) + 20), "white")
    draw = ImageDraw.Draw(canvas)
    found = Match(*(x.cpu() for x in found))

    def corner(row, column):
        return np.array([gap + column * (side + gap), 20 + row * (side + gap)])

    def centre(row, column, cell):
        return corner(row, column) + (np.array([cell % W, cell // W]) + 0.5) * side / (W, H)

    def disc(place, radius, **style):
        draw.ellipse((*(place - radius), *(place + radius)), **style)

    for column, title in enumerate(titles):
        draw.text((gap + column * (side + gap), 4), title, fill="black")
    for row in range(len(view_q)):
        sides = ((0, view_q, found.attention_q, found.set_q, orange), (2, view_k, found.attention_k, found.set_k, blue))
        for column, views, attention, chosen, colour in sides:
            picture = TF.to_pil_image(views[row].cpu()).resize((side, side))
            heat = attention[row].nan_to_num().view(H, W, 1).numpy()
            heat = 255 * np.concatenate([heat, 0.8 * heat, 0.5 - 0.5 * heat], 2)  # dark blue to yellow
            heat = Image.fromarray(heat.astype(np.uint8)).resize((side, side), Image.Resampling.NEAREST)
            canvas.paste(picture, tuple(corner(row, column)))
            canvas.paste(Image.blend(picture.convert("L").convert("RGB"), heat, 0.6), tuple(corner(row, column + 1)))
            for cell in chosen[row].nonzero()[:, 0].tolist():
                middle, half = centre(row, column + 1, cell), np.array([side / W, side / H]) / 2 - 1
                draw.rectangle((*(middle - half), *(middle + half)), outline=colour, width=3)
        linked = found.positives[row].any(1)
        if linked.any():
            start = found.attention_q[row].nan_to_num().masked_fill(~linked, -1).argmax().item()
            for cell in found.positives[row, start].nonzero()[:, 0].tolist():
                draw.line((*centre(row, 0, start), *centre(row, 2, cell)), fill=orange, width=2)
                disc(centre(row, 2, cell), 4, fill=blue, outline="black")
            disc(centre(row, 0, start), 6, fill=orange, outline="black")
        for cell in found.similarity[row].argmax(1)[linked].unique().tolist():
            disc(centre(row, 2, cell), 10, outline=red, width=3)
    canvas.save(path)


# ======================================================================================================================
# Training
# ======================================================================================================================

NAME = "setsim"
CURVES = {
    "losses": ["loss", "loss_image", "loss_set", "=loss_chance"],
    "std of unit embeddings (collapse: 0)": ["std_image", "std_dense", "=std_spread"],
    "matcher": ["positives", "rows"],
    "share of images without a row": ["empty"],
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
    """What stands beside the values of every log line: loss of a random guess, spread of evenly drawn directions."""
    chance = float(np.log(args.queue_size + 1)) if args.framework == "moco" else None
    return {"loss_chance": chance, "std_spread": args.dim**-0.5}


def exports(args, method):
    """{file name: weights} for others to take: the query backbone."""
    return {f"{args.arch}.pth": method.query.trunk.state_dict()}


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
    lr = args.lr * args.batch_size / 256  # DEVIATION: S15. once; the released script scales a number already scaled
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
    names = [name for name in ("loss", "loss_image", "loss_set", "positives", "empty") if name in line]
    return (
        f"epoch {line['epoch']:.2f} {' '.join(f'{name} {line[name]:.3f}' for name in names)} "
        f"{line['images_per_s']:.0f} img/s data {line['data_share']:.0%}"
    )


if __name__ == "__main__":
    common.run_main(main)
