# SPDX-License-Identifier: MIT
"""ReSim: dense self-supervised pre-training that compares the *regions* that two views of an image share.

Xiao et al., "Region Similarity Representation Learning", ICCV 2021.

A window slides over one crop of an image. Its place in the other crop follows from the two crops alone. The features
pooled over the window in both crops are pulled together, and pushed away from the other regions of the batch.

    image --flip or not--+--crop, colour--> view q --f--> C5 --mean, MLP--> q ---------------- image loss, Eqs. 3, 4 --+
                         |                    |           C3..C5 --top-down--> P4, P3 --g--> map q --+                 |
                         |                windows u_q ---------------------------- pooled at u_q ----+                 |
                         |                    | R_q->k                                               +-- region loss,  +-- total,
                         |                windows u_k ---------------------------- pooled at u_k ----+   Eqs. 1, 2     |   Eq. 5
                         |                    |           as above, momentum copies                  |                 |
                         +--crop, colour--> view k --f'-----------------------> P4, P3 --g'-> map k -+                 |
                                                          C5 --mean, MLP--> k, into a queue ---------------------------+

    B images of this process    C channels of a map    H, W its cells    D embedding    K queue    M negative regions
    A windows of a view (36 on C4 and P4, 64 on P3)    R valid windows of all images    m momentum    tau temperature

    python resim.py --demo                                     a laptop, minutes, nothing to download
    torchrun --nproc_per_node 8 resim.py --data /imagenet      ReSim-FPN: Table 4's 59.2 AP
    ... --levels c4                                            ReSim-C4, g on C4, no top-down path: Table 4's 58.7 AP
    resim.py --data /in100 --epochs 500 --levels c4 --framework simsiam      Table 2's SimSiam + ReSim-C4

docs/resim.md has the usage, what each logged value means, the measurements, and the decisions: where the paper is
silent or the released code (Tete-Xiao/ReSim b6a36ee) differs, a clause here names the row, as in (R9).
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
from harness import look, weights
from harness.run import Run, bf16_is_fast, main

# ==== Settings ========================================================================================================

SIMSIAM = dict(lr=0.1)  # PAPER: Table 7; twice what SimSiam's own rule gives (R21)
DEMO = dict(data="scenes", arch="resnet18", size=136, batch_size=64, epochs=3, lr=0.6, ema=0.99, temperature=0.1)
PYRAMID = 256  # channels of P3..P5, as in the detectors that load them


class Level(NamedTuple):
    """A feature map on which regions are compared."""

    name: str  # c4 (output of a stage), or p4, p3 (after the top-down path)
    stage: int  # the stage it belongs to, counted from C2
    stride: int  # pixels of the view between two cells
    window: int  # side of a window in pixels
    step: int  # pixels between two windows
    kernel: int  # side of a negative in cells: window / stride, but 3 on P3 (R9)
    gathered: bool  # negatives from all processes, or from the image's own group only (R10)


# PAPER: section 3.4. ReSim-C4 compares on C4 alone (R18).
LEVELS = {"c4": [Level("c4", stage=2, stride=16, window=48, step=32, kernel=3, gathered=True)],
          "fpn": [Level("p4", 2, 16, 48, 32, 3, gathered=True), Level("p3", 1, 8, 32, 24, 3, gathered=False)]}  # fmt: skip


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], usage="%(prog)s --data DIR [more, see --help]",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)  # fmt: skip
    flag = parser.add_argument
    # fmt: off
    flag("--demo", action="store_true", help="a small complete job on built-in scenes, minutes on two CPU cores; other flags win over its settings")
    flag("--preset", default="paper", choices=("paper", "official"), help="the text, or the released code: the pyramid's output convolutions as the only heads, mean over all valid windows of a group")
    flag("--framework", default="moco", choices=("moco", "simsiam"), help="MoCo-v2 (queue, momentum keys) or SimSiam (predictors, no negatives, lr 0.1)")
    flag("--levels", default="fpn", choices=tuple(LEVELS), help="c4: ReSim-C4, on C4; fpn: ReSim-FPN, on P4 and P3 of a feature pyramid")
    flag("--window", default=[48, 32], type=number(int, 1), nargs=2, metavar=("W", "S"), help="Table 3: side of a window on C4 or P4 and distance to the next, in pixels; P3 keeps 32 and 24")
    flag("--pool", default="prroi", choices=("prroi", "roi_align"), help="Precise RoI Pooling, or RoIAlign (section 4.1's comparison)")
    flag("--loss-weight", default=1.0, type=number(float, 0), help="lambda of Eq. 5, weight of the image loss; 0: regions alone (the baseline, images alone, is setsim.py --loss-weight 0)")
    flag("--temperature", default=0.2, type=number(float, 1e-3), help="tau of Eqs. 1 and 3 (MoCo); the smaller, the more the hardest negatives count")
    flag("--queue-size", type=number(int, 1), help="K of the queue (MoCo); default 65536, or less than an epoch of keys; IN-100: 16384")
    flag("--ema", default=0.999, type=number(float, 0, 1), help="m: key network <- m key + (1 - m) query (MoCo); short runs need a smaller one")
    # fmt: on
    common.run_flags(parser, "resim")
    args = common.parse(parser, argv, presets)
    if args.preset == "official" and (args.levels, args.framework) != ("fpn", "moco"):
        parser.error("--preset official is ReSim-FPN on MoCo-v2, nothing else was released: drop --levels, --framework")
    for level in make_levels(args):
        if level.window >= args.size:
            parser.error(f"--size {args.size}: a window of {level.window} pixels must be smaller than the view (R2)")
    return args


def presets(args):
    """The defaults that replace those of the flags; the last one wins."""
    chosen = DEMO | dict(amp="bf16" if bf16_is_fast() else "none") if args.demo else {}
    return chosen | (SIMSIAM if args.framework == "simsiam" else {})


def make_levels(args):
    """LEVELS[args.levels]. --window sets window, step and kernel of the first; P3 keeps its own (R26)."""
    (first, *others), (window, step) = LEVELS[args.levels], args.window
    return [first._replace(window=window, step=step, kernel=max(1, int(window / first.stride + 0.5))), *others]


# ==== Views: two random crops of an image, flipped alike, each with the box of the image that it shows ================


def two_views(image, size):
    """MoCo-v2's augmentation, except that both views share the flip. Draws from torch's global generator.

    PAPER: section 3.3, "Aligning corresponding regions". The flip comes before the crops (R15). Returns view_q, view_k,
    (3, size, size) uint8, and crop_q, crop_k, (4,) fp32: the boxes that they show, in pixels of the flipped image.
    """
    if torch.rand(()).item() < 0.5:
        image = TF.hflip(image)
    views, crops = [], []
    for _ in "qk":
        top, left, h, w = transforms.RandomResizedCrop.get_params(image, scale=(0.2, 1.0), ratio=(3 / 4, 4 / 3))
        view = TF.resized_crop(image, top, left, h, w, [size, size])
        if torch.rand(()).item() < 0.8:
            view = transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)(view)
        if torch.rand(()).item() < 0.2:
            view = TF.rgb_to_grayscale(view, 3)
        if torch.rand(()).item() < 0.5:
            view = view.filter(ImageFilter.GaussianBlur(torch.empty(()).uniform_(0.1, 2.0).item()))
        views.append(TF.pil_to_tensor(view))
        crops.append(torch.tensor([left, top, left + w, top + h], dtype=torch.float32))
    return *views, *crops


# ==== Regions: windows of the query view and their places in the key view (section 3.3). Boxes are (x0, y0, x1, y1). ==


def window_grid(size, window, stride):
    """The windows that slide over a view, row by row: (A, 4) fp32. Each ends before the view does (R2)."""
    start = torch.arange(0, size - window, stride, dtype=torch.float32)
    y, x = torch.meshgrid(start, start, indexing="ij")
    return torch.stack([x, y, x + window, y + window], 2).flatten(0, 1)


def map_boxes(boxes, crop_q, crop_k, size):
    """PAPER: section 3.3, R_q->k = R_k(R_q^-1): from pixels of the query view to the image, and on to the key view.

    boxes (A, 4) or (B, A, 4), crops (B, 4) as in two_views -> (B, A, 4); exactly `boxes` where both crops are the same.
    """
    side_q, side_k = crop_q[:, 2:] - crop_q[:, :2], crop_k[:, 2:] - crop_k[:, :2]  # (B, 2), width and height
    zoom = side_q / side_k
    shift = (crop_q[:, :2] - crop_k[:, :2]) * size / side_k
    return boxes * zoom.repeat(1, 2)[:, None] + shift.repeat(1, 2)[:, None]


class Pairs(NamedTuple):
    """Corresponding regions of two views."""

    boxes_q: torch.Tensor  # (B, A, 4)
    boxes_k: torch.Tensor  # (B, A, 4), zeros where not valid
    valid: torch.Tensor  # (B, A) bool


def region_pairs(crop_q, crop_k, size, window, stride):
    """PAPER: section 3.3, "Generating candidate regions": the windows of the query view that the key view shows whole.

    The grid covers the query view. Windows outside the overlap are not valid, so all shapes are constant (R1). A window
    is valid if x0, y0 >= 0 and x1, y1 < size in the key view (R2). None is drawn in place of an invalid one (R3).
    """
    grid = window_grid(size, window, stride).to(crop_q.device)  # (A, 4)
    boxes = map_boxes(grid, crop_q, crop_k, size)  # (B, A, 4)
    valid = (boxes[..., :2] >= 0).all(2) & (boxes[..., 2:] < size).all(2)  # (B, A)
    return Pairs(grid.expand_as(boxes), boxes * valid[..., None], valid)


# ==== Precise RoI Pooling: the mean of the interpolated feature map over a box, in closed form ========================


def hat_integrals(start, end, samples):
    """The integral of hat(t - j) = max(0, 1 - |t - j|) from start to end, for j = 0, 1, ...: (...) -> (..., samples)

    Cut to the hat's support, the ends are u = start - j and v = end - j in [-1, 1]. The trapezoid rule gives
    (v - u) (hat(u) + hat(v)) / 2, which is exact unless the peak at 0 lies between u and v; then it leaves out the
    triangle from u over the peak to v, whose area is |u v|. No differences of large numbers: tiny boxes stay accurate.
    """
    j = torch.arange(samples, dtype=start.dtype, device=start.device)
    u, v = ((t[..., None] - j).clamp(-1, 1) for t in (start, end))
    trapezoid = (v - u) * (2 - u.abs() - v.abs()) / 2
    triangle = ((u * v).abs() - u * v) / 2  # |uv| if u < 0 < v, else 0; unlike clamp, with the right slope at 0
    return trapezoid + triangle


def bin_weights(start, end, bins, samples):
    """What each sample weighs in the mean over each of `bins` equal parts of [start, end].

    start, end: (...), in units of samples -> (..., bins, samples); all 0 if the interval is empty or runs backwards.
    """
    edge = torch.linspace(0, 1, bins + 1, dtype=start.dtype, device=start.device)
    edges = torch.lerp(start[..., None], end[..., None], edge)  # (..., bins + 1)
    length = (edges[..., 1:] - edges[..., :-1])[..., None]  # (..., bins, 1)
    integrals = hat_integrals(edges[..., :-1], edges[..., 1:], samples)  # (..., bins, samples)
    return torch.where(length > 0, integrals / length.where(length > 0, 1), 0)


def prroi_pool(input, boxes, output_size, spatial_scale=1.0):
    """Precise RoI Pooling (Jiang et al., ECCV 2018): exact, without sampling points, differentiable in boxes too.

    The feature map is read as a continuous function: its samples sit at whole coordinates (sample (i, j) at x = j,
    y = i, no half-pixel shift), are interpolated bilinearly, and are 0 beyond the map:
        f(x, y) = sum_ij input[i, j] hat(y - i) hat(x - j),        hat(t) = max(0, 1 - |t|)
    Each output is the mean of f over one bin [x0, x1] x [y0, y1] of the box. f is a sum of products of a function of
    x and one of y, so the double integral of each term is a product of two integrals of hats (see hat_integrals):
        mean = sum_ij input[i, j] wy[i] wx[j],        wx[j] = 1 / (x1 - x0) * integral of hat(x - j) from x0 to x1
    A box of 3 cells at a whole coordinate weighs four samples by 1/6, 1/3, 1/3, 1/6. RoIAlign, and the average of a
    neighbourhood, weigh the first three by 1/3: their centre lies half a cell further to the upper left (R11).

    input: (N, C, H, W), any floating type; computed in fp32 at least, also under autocast. boxes: (N, L, 4). An empty
    box, or one with x1 < x0, gives 0 and no gradient. output_size: int or (rows, columns). spatial_scale: from the
    coordinates of boxes to those of the map, e.g. 1 / 16. Returns (N, L, C, rows, columns).
    """
    rows, columns = (output_size, output_size) if isinstance(output_size, int) else output_size
    H, W = input.shape[2:]
    dtype = torch.promote_types(input.dtype, torch.float32)
    x0, y0, x1, y1 = (boxes.to(dtype) * spatial_scale).unbind(2)  # (N, L)
    wy, wx = bin_weights(y0, y1, rows, H), bin_weights(x0, x1, columns, W)  # (N, L, rows, H), (N, L, columns, W)
    with torch.autocast(input.device.type, enabled=False):
        return torch.einsum("nlyh,nlxw,nchw->nlcyx", wy, wx, input.to(dtype)).to(input.dtype)


def pool_regions(feature_map, boxes, stride, pool="prroi"):
    """The mean of a map over each box: (B, C, H, W), (B, A, 4) in pixels of the view -> (B, A, C) fp32.

    stride: pixels between two cells. pool: "prroi", or "roi_align", aligned, with a sampling point for each cell (R12).
    """
    if pool == "roi_align":
        return ops.roi_align(feature_map.float(), list(boxes), 1, 1 / stride, aligned=True).view(*boxes.shape[:2], -1)
    return prroi_pool(feature_map.float(), boxes, 1, 1 / stride).flatten(2)


def neighbourhoods(feature_map, kernel):
    """PAPER: appendix A.1, "stride one average pooling", (B, C, H, W) -> (B, H' W', C), H' = H - kernel + 1"""
    return F.avg_pool2d(feature_map.float(), kernel, stride=1).flatten(2).transpose(1, 2)


# ==== Encoders: backbone f, top-down path, and the heads g of images and regions (sections 3.3, 3.4) ==================


class Pyramid(nn.Module):
    """The trained part of a feature pyramid. PAPER: section 3.3, "Region similarity on feature pyramids".

    torchvision's FeaturePyramidNetwork loads it with strict=False; one with norms has no place for its biases (R17).
    widths: channels of C2..C5. outputs: with output convolutions, which are the heads of the released code (R5).
    """

    def __init__(self, widths, outputs=False):
        super().__init__()
        inner = {str(i): nn.Sequential(nn.Conv2d(widths[i], PYRAMID, 1)) for i in (1, 2, 3)}
        layer = {str(i): nn.Sequential(nn.Conv2d(PYRAMID, PYRAMID, 3, padding=1)) for i in (1, 2) if outputs}
        self.inner_blocks, self.layer_blocks = nn.ModuleDict(inner), nn.ModuleDict(layer)
        for block in (*inner.values(), *layer.values()):
            nn.init.kaiming_uniform_(block[0].weight, a=1)  # variance 1 / fan-in, as detectors start their pyramids
            nn.init.zeros_(block[0].bias)

    def forward(self, c3, c4, c5):
        """(B, C, H, W) of each stage -> {"p4": (B, 256, H, W), "p3": (B, 256, H, W)}"""
        p4 = self.inner_blocks["2"](c4) + F.interpolate(self.inner_blocks["3"](c5), c4.shape[2:])  # nearest neighbour
        p3 = self.inner_blocks["1"](c3) + F.interpolate(p4, c3.shape[2:])
        if self.layer_blocks:
            p4, p3 = self.layer_blocks["2"](p4), self.layer_blocks["1"](p3)
        return {"p4": p4, "p3": p3}


class Backbone(nn.Module):
    """ResNet and, for P4 and P3, a pyramid. levels: list of Level. amp: see --amp. outputs: see Pyramid."""

    def __init__(self, arch, levels, amp, outputs=False, zero_init_residual=False):
        super().__init__()
        self.levels, self.amp, self.trunk = levels, amp, common.ResNetTrunk(arch, zero_init_residual)
        self.pyramid = Pyramid(self.trunk.widths, outputs) if levels[0].name == "p4" else None
        self.channels = PYRAMID if self.pyramid else self.trunk.widths[levels[0].stage]  # of the map of each level

    def feature_maps(self, images):
        """(B, 3, size, size) uint8 -> [C2, C3, C4, C5], {name of a level: the map that its regions are pooled from}"""
        stages = self.trunk(common.normalise(images))  # (B, C, H, W) each
        return stages, self.pyramid(*stages[1:]) if self.pyramid else {"c4": stages[2]}


class Encoder(Backbone):
    """Backbone with MoCo-v2's projector C-C-128 for images and a convolutional head for the map of each level.

    PAPER: section 3.4, "two 3x3 convolutions" to 128 channels; BN and ReLU between, 128 channels there too (R24, R25).
    """

    def __init__(self, arch, levels, amp="none", official=False):
        super().__init__(arch, levels, amp, outputs=official)
        C = self.trunk.widths[-1]
        self.image_head = nn.Sequential(nn.Linear(C, C), nn.ReLU(), nn.Linear(C, 128))
        self.region_heads = nn.ModuleDict()
        for level in levels:
            first, last = nn.Conv2d(self.channels, 128, 3, padding=1, bias=False), nn.Conv2d(128, 128, 3, padding=1)
            head = nn.Sequential(first, nn.BatchNorm2d(128), nn.ReLU(), last)
            self.region_heads[level.name] = nn.Identity() if official else head  # official: the pyramid has the heads

    def feature_maps(self, images):
        stages, maps = super().feature_maps(images)
        return stages, {name: head(maps[name]) for name, head in self.region_heads.items()}

    def encode(self, images):
        stages, maps = self.feature_maps(images)
        return self.image_head(stages[-1].mean((2, 3))), *maps.values()

    def forward(self, view):
        """(B, 3, size, size) uint8 -> (B, D), [(B, D, H, W) of each level], in fp32. Batch statistics are per group."""
        with common.autocast(self.amp, view.device):
            image, *maps = common.encode_in_groups(self, common.GROUP, view)
        return image, maps


class SimSiamEncoder(Backbone):
    """Backbone with SimSiam's projector and predictor for images, and such a pair for the regions of each level.

    PAPER: section 4.1, "Self-supervised learning frameworks", and Table 7, which prints the widths of C5, C4, C3. The
    MLPs of regions come after pooling, from C4 or from the merged maps (R19). pool: see pool_regions.
    """

    def __init__(self, arch, levels, amp="none", pool="prroi"):
        super().__init__(arch, levels, amp, zero_init_residual=True)  # as SimSiam does (B16, R27)
        self.pool, widths = pool, self.trunk.widths
        self.image_head, self.image_predictor = simsiam_heads(widths[-1], widths[-1])
        self.region_heads, self.region_predictors = nn.ModuleDict(), nn.ModuleDict()
        for level in levels:
            heads = simsiam_heads(self.channels, widths[level.stage])
            self.region_heads[level.name], self.region_predictors[level.name] = heads

    def encode(self, images, boxes, valid):
        stages, maps = self.feature_maps(images)
        image, regions = self.image_head(stages[-1].mean((2, 3))), []  # (B, D)
        for level, b, v in zip(self.levels, boxes, valid, strict=True):
            vectors = pool_regions(maps[level.name], b, level.stride, self.pool)  # (B, A, C)
            z = self.region_heads[level.name](vectors[v])  # (R, D); the others stay out of batch statistics (R22)
            regions.append((z.float(), self.region_predictors[level.name](z).float()))
        return (image.float(), self.image_predictor(image).float()), regions

    def forward(self, view_q, view_k, pairs):
        """-> of each view the image and [regions of each level], all as (projection, prediction), (B, D) or (R, D)."""
        boxes_q, boxes_k, valid = zip(*pairs, strict=True)
        with common.autocast(self.amp, view_q.device):
            return self.encode(view_q, boxes_q, valid), self.encode(view_k, boxes_k, valid)


def simsiam_heads(C, D):
    """PAPER: Table 7. SimSiam's projector C-D-D-D, three layers (R20), and its predictor D-D/4-D."""
    layer, norm = partial(nn.Linear, bias=False), nn.BatchNorm1d
    projector = nn.Sequential(
        layer(C, D), norm(D), nn.ReLU(),
        layer(D, D), norm(D), nn.ReLU(),
        layer(D, D), norm(D, affine=False),  # no bias: SimSiam freezes it, norm cancels it (DEVIATION: B7)
    )  # fmt: skip
    return projector, nn.Sequential(layer(D, D // 4), norm(D // 4), nn.ReLU(), nn.Linear(D // 4, D))


# ==== Losses. Embeddings are fp32; those of contrastive losses are unit vectors. ======================================


def image_contrastive_loss(q, k, queue, temperature):
    """PAPER: Eqs. 3 and 4, MoCo's InfoNCE: -log( exp(q.k+) / (exp(q.k+) + sum exp(q.k-)) ), mean over images.

    q, k: (B, D). queue: (K, D). temperature: tau. DEVIATION: R28. Eq. 4 is printed without its -log.
    """
    positive = (q * k).sum(1) / temperature  # (B,)
    return (torch.logaddexp(positive, negative_logsumexp(q, queue, temperature)) - positive).mean()


def mean_over_regions(values, valid, per_image=True):
    """The mean of Eq. 2 over images and their valid regions; exactly 0, with zero gradients, if there are none (R3).

    values: (R,), in the order of valid.nonzero(). valid: (B, A) bool. per_image: True, PAPER: Eq. 2's 1/n, mean over an
    image's regions, then over the images that have any. False, as released: mean over all regions alike (R4).
    """
    if not per_image:
        return values.sum() / valid.sum().clamp(min=1)
    image = valid.nonzero()[:, 0]  # (R,)
    return (values / valid.sum(1)[image]).sum() / valid.any(1).sum().clamp(min=1)


def region_contrastive_loss(q, k, valid, negatives, temperature, per_image=True):
    """PAPER: Eqs. 1 and 2: -log( E_ii / (E_ii + sum_j!=i E_ij + sum_kj E_ij) ), E_ij = exp(q_i . k_j / tau).

    DEVIATION: R28. Eq. 2 is printed without its -log. Its two sums are one here, over the same negatives for all rows.
    None is masked, not even the neighbourhood at the place of the positive (R8).
    q, k: (B, A, D), regions and their counterparts. valid: (B, A) bool. negatives: (M, D), without gradient.
    """
    q, k = q[valid], k[valid]  # (R, D)
    positive = (q * k).sum(1) / temperature  # (R,)
    row_loss = torch.logaddexp(positive, negative_logsumexp(q, negatives, temperature)) - positive  # (R,)
    return mean_over_regions(row_loss, valid, per_image)


def image_cosine_loss(prediction, projection):
    """SimSiam: negative cosine of (B, D) predictions and (B, D) projections, through which no gradient flows."""
    return -F.cosine_similarity(prediction, projection.detach(), dim=1).mean()


def region_cosine_loss(prediction, projection, valid, per_image=True):
    """The same for (R, D) predictions and projections of valid regions, averaged as in Eq. 2. valid: (B, A) bool."""
    return mean_over_regions(-F.cosine_similarity(prediction, projection.detach(), dim=1), valid, per_image)


# ==== Method: one iteration, from views to the loss ===================================================================


class ReSim(nn.Module):
    """ReSim on MoCo-v2 (momentum keys, shuffling BN, a queue of image keys) or, without a queue, on SimSiam.

    encoder: Encoder, or SimSiamEncoder. loss_weight: lambda of Eq. 5. pool: see pool_regions. per_image: see
    mean_over_regions. queue_size, ema, temperature: K, m, tau of MoCo; a queue_size of 0 means SimSiam.
    """

    picture, measured = "regions", "cells of C4 have their best match within one cell of the true place"

    def __init__(self, encoder, loss_weight, pool, per_image=True, queue_size=0, ema=0.999, temperature=0.2, seed=0):
        super().__init__()
        self.query, self.key, self.levels = encoder, None, encoder.levels
        self.loss_weight, self.pool, self.per_image = loss_weight, pool, per_image
        self.ema, self.temperature, self.seed = ema, temperature, seed
        if queue_size:  # of images; a batch has enough regions without one (section 3.4)
            self.key = copy.deepcopy(encoder).requires_grad_(False)
            self.image_queue = common.Queue(queue_size, 128, common.generator("image queue", seed))

    def forward(self, network, view_q, view_k, crop_q, crop_k, step):
        """One iteration -> loss, {name: scalar tensor, or number to compare with}. step: seeds the draws.

        network: self.query, or DistributedDataParallel of it. view_q, view_k: (B, 3, size, size) uint8. crops: (B, 4).
        """
        # 1. the windows of view q and their places in view k; on SimSiam they serve both directions (R27)
        pairs = [region_pairs(crop_q, crop_k, view_q.shape[2], level.window, level.step) for level in self.levels]
        # 2. encode both views; the keys are those of the momentum network, or SimSiam's own projections
        if self.key:
            (image_q, levels_q), (image_k, levels_k) = network(view_q), self.momentum_key(view_k, step)
        else:
            pairs = [x._replace(valid=x.valid & (x.valid.sum() > 1)) for x in pairs]  # batch norm needs two rows (R22)
            (image_q, levels_q), (image_k, levels_k) = network(view_q, view_k, pairs)
        # 3. compare the images, then the regions level by level; the losses of levels are added (R13)
        (image_loss, values), region_loss = self.compare_images(image_q, image_k), 0
        for level_loss, more in map(self.compare_regions, self.levels, pairs, levels_q, levels_k):
            region_loss, values = region_loss + level_loss, values | more
        # 4. the image keys of this step become negatives of later ones
        if self.key:
            self.image_queue.enqueue(all_gather(F.normalize(image_k, dim=1)))
        return region_loss + self.loss_weight * image_loss, values  # PAPER: Eq. 5

    @torch.no_grad()
    def momentum_key(self, view, step):
        """The key of a view, of images shuffled over all groups: batch statistics must not give the positive away."""
        common.momentum_update(self.key, self.query, self.ema)  # once a step, before its keys
        order = torch.randperm(len(view) * common.processes(), generator=common.generator("shuffle", self.seed, step))
        image, maps = self.key(common.shuffle(view, order))
        return common.unshuffle(image, order), [common.unshuffle(x, order) for x in maps]

    def compare_images(self, query, key):
        """The loss of the images, and the numbers that tell whether their embeddings are alive."""
        if self.key:
            unit, queue = F.normalize(query, dim=1), self.image_queue.vectors  # (B, D), (K, D)
            loss = image_contrastive_loss(unit, F.normalize(key, dim=1), queue, self.temperature)
            values = {"loss_chance": math.log(len(queue) + 1)}  # of a random guess
        else:
            (z_q, p_q), (z_k, p_k), values = query, key, {}  # (B, D)
            loss = (image_cosine_loss(p_q, z_k) + image_cosine_loss(p_k, z_q)) / 2
            unit = F.normalize(z_k, dim=1)
        std, spread = unit.std(0, correction=0).mean(), unit.shape[1] ** -0.5  # spread: std of evenly drawn directions
        return loss, values | dict(loss_image=loss, std_image=std, std_spread=spread)

    def compare_regions(self, level, pairs, query, key):
        """The same for the regions of one level. MoCo's loss is the mean over groups of images."""
        valid, losses, values = pairs.valid, [], {}
        if self.key:
            q, k, near = self.embed(level, pairs, query, key)
            everywhere, groups = all_gather(near) if level.gathered else None, math.ceil(len(q) / common.GROUP)
            for *group, local in zip(*(x.tensor_split(groups) for x in (q, k, valid, near)), strict=True):
                negatives = (everywhere if level.gathered else local).flatten(0, 1)  # (M, D)
                losses.append(region_contrastive_loss(*group, negatives, self.temperature, self.per_image))
            loss, unit, values["chance"] = torch.stack(losses).mean(), q[valid], math.log(len(negatives) + 1)
        else:
            (z_q, p_q), (z_k, p_k) = query, key  # (R, D)
            loss = (region_cosine_loss(p_q, z_k, valid) + region_cosine_loss(p_k, z_q, valid)) / 2
            unit = F.normalize(z_k, dim=1)
        empty = (~valid.any(1)).float().mean()  # share of images without a valid window
        std = unit.std(0, correction=0).mean() if len(unit) else loss.new_zeros(())
        values |= dict(loss=loss, valid=valid.float().mean(), empty=empty, std=std, spread=unit.shape[1] ** -0.5)
        return loss, {f"{word}_{level.name}": value for word, value in values.items()}

    def embed(self, level, pairs, map_q, map_k):
        """Unit vectors of the windows in both views, (B, A, D), and of all neighbourhoods in view k, (B, H' W', D)."""
        q, k = (pool_regions(x, b, level.stride, self.pool) for x, b in ((map_q, pairs[0]), (map_k, pairs[1])))
        near = neighbourhoods(map_k, level.kernel)
        if not self.key:  # for pictures alone
            head, predictor = self.query.region_heads[level.name], self.query.region_predictors[level.name]
            q, near = (head(x.flatten(0, 1)).unflatten(0, x.shape[:2]) for x in (q, near))
            q = predictor(q.flatten(0, 1)).unflatten(0, q.shape[:2])
        return (F.normalize(x, dim=2) for x in (q, k, near))  # averaged first, normalised afterwards (R11)

    def see(self, view_q, view_k):
        """The stages and the maps of both views, of images that share their batch statistics."""
        with common.autocast(self.query.amp, view_q.device):
            return self.query.feature_maps(view_q), (self.key or self.query).feature_maps(view_k)

    def measure(self, view_q, view_k, crop_q, crop_k):
        q, k = (F.normalize(stages[2].float().flatten(2), dim=1) for stages, _ in self.see(view_q, view_k))
        return look.correspondence(q.transpose(1, 2) @ k, crop_q, crop_k, *[math.isqrt(q.shape[2])] * 2)

    def draw(self, path, view_q, view_k, crop_q, crop_k):
        (_, maps_q), (_, maps_k) = self.see(view_q, view_k)
        size, levels = view_q.shape[2], []
        for level in self.levels:
            pairs = region_pairs(crop_q, crop_k, size, level.window, level.step)
            q, _, near = self.embed(level, pairs, maps_q[level.name], maps_k[level.name])
            similarity = (q @ near.transpose(1, 2)).unflatten(2, [math.isqrt(near.shape[1])] * 2)
            levels.append((level.name, level.stride, level.kernel, pairs, similarity))
        view = crop_q.new_tensor([[0, 0, size, size]])
        shared_q, shared_k = map_boxes(view, crop_k, crop_q, size), map_boxes(view, crop_q, crop_k, size)  # (B, 1, 4)
        look.draw_windows(path, view_q, view_k, shared_q[:, 0], shared_k[:, 0], levels)


def build(args, device, init=None):
    """The method that the settings describe, equal on all processes. init: weights to start from, see --init."""
    moco, official = args.framework == "moco", args.preset == "official"
    settings, K = (args.arch, make_levels(args), args.amp), (args.queue_size or 65536) if moco else 0
    with common.drawing("init", args.seed):
        encoder = Encoder(*settings, official) if moco else SimSiamEncoder(*settings, args.pool)
    if init:
        weights.load_into(encoder.trunk, init, args.arch)
    encoder = encoder if moco else common.synchronised_norms(encoder, device)
    method = ReSim(encoder, args.loss_weight, args.pool, not official, K, args.ema, args.temperature, args.seed)
    return method.to(device, memory_format=torch.channels_last)


# ==== Training ========================================================================================================


def train(argv=None):
    args = get_args(argv)
    run = Run("resim", args)  # processes, images, output folder, log, checkpoints, signals: harness/run.py
    if args.framework == "moco":
        args.queue_size = run.fit_queue(args.queue_size, 512 if args.demo else 65536)
    method = build(args, run.device, run.init)
    network = method.query

    # Weight decay on norms and biases too (B3). SimSiam's predictors keep their learning rate (B6).
    lr = args.lr * args.batch_size / 256  # MoCo and released ReSim leave the scaling to their user (DEVIATION: B4)
    predictors = [p for name, p in network.named_parameters() if "predictor" in name]
    others = [p for name, p in network.named_parameters() if "predictor" not in name]
    optimizer = torch.optim.SGD([{"params": others}, {"params": predictors}], lr, momentum=0.9, weight_decay=1e-4)
    scaler = torch.amp.GradScaler(run.device.type, enabled=args.amp == "fp16")
    exports = {f"{args.arch}.pth": network.trunk} | ({"fpn.pth": network.pyramid} if network.pyramid else {})
    run.resume(method, optimizer, scaler, exports)
    network = common.distributed(network, run.device)

    for batch in run.steps(partial(two_views, size=args.size)):
        optimizer.param_groups[0]["lr"] = common.cosine_lr(lr, run.epoch, args.epochs)  # PAPER: section 4
        loss, values = method(network, *batch, run.step)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        run.log(loss=loss, lr=optimizer.param_groups[0]["lr"], **values)


if __name__ == "__main__":
    main(train)
