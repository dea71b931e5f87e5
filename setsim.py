# SPDX-License-Identifier: MIT
"""SetSim: dense self-supervised pre-training that matches *sets* of cells between two views.

Wang et al., "Exploring Set Similarity for Dense Self-supervised Representation Learning", CVPR 2022.

Two crops of an image show the same objects in different places. The cells where the network's own attention is high
form the set of each crop. Every cell of one set is pulled towards all cells of the other set, and towards its nearest
neighbour in the other crop.

    image --crop, colour--> view_q --f--> z_q --g_img--> q -------------- image loss (Eq. 1) ---+
      |                              |      +---g_pix--> p_q --+                                +-- total (Eq. 9)
      |                              +-- attention (Eq. 3) --+ +-- set loss (Eq. 8) ------------+
      |                              +-- attention (Eq. 3) --+-|-- matcher (Eqs. 4-7): which cells are positives
      |                              |      +---g_pix--> p_k --+
      +-----crop, colour--> view_k --f'-> z_k --g_img--> k        f', g': momentum copies, keys go into queues

    B images    C channels of z    H x W = S cells    D embedding    K queue    R query cells that have a positive
    q, k query and key    m momentum of the key network    tau temperature

    python setsim.py --demo                                    a laptop, minutes, nothing to download
    torchrun --nproc_per_node 8 setsim.py --data /imagenet     the paper's section 3 (58.2 AP in Table 4)
    ... --geometry --symmetric                                 its best row (59.1 AP)
    ... --framework simsiam                                    on SimSiam instead of MoCo-v2
    ... --loss-weight 0                                        the baseline, MoCo-v2 or SimSiam alone

docs/setsim.md has the usage, what each logged value means, the measurements, and the decisions: where the paper is
silent or the released code (DerrickWang005/SetSim.pytorch 6a439e2) differs, a clause here names the row, as in (S9).
"""

import argparse
import copy
import math
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import ImageFilter
from scipy.optimize import linear_sum_assignment
from torch import nn
from torchvision import transforms
from torchvision.transforms import functional as TF

import common
from common import all_gather, negative_logsumexp, number
from harness import look, weights
from harness.run import Run, bf16_is_fast, main

# ==== Settings ========================================================================================================

SIMSIAM = dict(lr=0.1, set="30%", symmetric=True)  # section 4; Table 2's Delta, as in Table 1's SimSiam row (S24)
OFFICIAL = dict(set="0.7", matcher="set2set", geometry=0.5)  # the released script (S6, S12); S1, S4, S5: see match
DEMO = dict(data="scenes", arch="resnet18", size=136, batch_size=64, epochs=3, ema=0.99, temperature=0.1)
PIXEL_MATCHERS = ("random", "sort", "hungarian")  # one to one, Table 3
MATCHERS = ("set2set", "set2set-nn", *PIXEL_MATCHERS, "densecl", "geometry")


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], usage="%(prog)s --data DIR [more, see --help]",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)  # fmt: skip
    flag, share = parser.add_argument, number(float, 0, 1)
    # fmt: off
    flag("--demo", action="store_true", help="a small complete job on built-in scenes, minutes on two CPU cores; other flags win over its settings")
    flag("--preset", default="paper", choices=("paper", "official"), help="the text, or the released script: mean of z^2 in Eq. 3, mu 0.2, set2set, Geo 0.5")
    flag("--framework", default="moco", choices=("moco", "simsiam"), help="MoCo-v2 (queues, momentum keys) or SimSiam (predictor, no negatives, lr 0.1)")
    flag("--matcher", default="set2set-nn", choices=MATCHERS, help="Table 3's five; densecl: the nearest neighbour of each cell; geometry: the cells at the same place")
    flag("--set", default="0.7", type=set_rule, help="cells of a set: 0.7 takes attention >= delta (Eq. 4); 30%% takes the Delta highest (Table 2), default for random, sort, hungarian, and on SimSiam with --preset paper")
    flag("--geometry", nargs="?", const=0.5, type=number(float, 0), help="Table 4's Geo: cells closer than this many cell diagonals are positives too; 0.5 if no number is given; 0: off")
    flag("--symmetric", default=False, action=argparse.BooleanOptionalAction, help="Table 4's Sym: mean of both directions, twice the encoding; SimSiam always does it")
    flag("--loss-weight", default=0.5, type=share, help="lambda of Eq. 9, the share of the set loss; 0: no dense branch, the baseline MoCo-v2 or SimSiam")
    flag("--temperature", default=0.2, type=number(float, 1e-3), help="tau of Eqs. 1 and 8 (MoCo); the smaller, the more the hardest negatives count")
    flag("--queue-size", type=number(int, 1), help="K of each queue (MoCo); default 65536, or less than an epoch of keys")
    flag("--ema", default=0.999, type=share, help="m: key network <- m key + (1 - m) query (MoCo); short runs need a smaller one")
    # fmt: on
    common.run_flags(parser, "setsim")

    args = common.parse(parser, argv, presets)
    if args.geometry and args.matcher in (*PIXEL_MATCHERS, "densecl"):
        parser.error(f"--geometry adds positives to set2set and set2set-nn, not to --matcher {args.matcher}")
    if args.matcher in PIXEL_MATCHERS and not args.set.endswith("%"):
        parser.error(f"--matcher {args.matcher} pairs cells one to one, in sets of one size: give --set in percent")
    return args


def presets(args):
    """The defaults that replace those of the flags; the last one wins."""
    chosen = SIMSIAM if args.framework == "simsiam" else {}
    chosen = chosen | (OFFICIAL if args.preset == "official" else {})
    if args.matcher in PIXEL_MATCHERS:
        chosen = chosen | dict(set="30%")  # Table 3 prints no number (S20)
    if args.matcher in (*PIXEL_MATCHERS, "densecl"):
        chosen = chosen | dict(geometry=None)
    if args.demo:
        lr = 0.6 if args.framework == "moco" else 0.1
        chosen = chosen | DEMO | dict(lr=lr, amp="bf16" if bf16_is_fast() else "none")
    return chosen


def set_rule(text):
    """Check '0.7' or '30%' and return it as it is."""
    try:
        number(float, *((1, 100) if text.endswith("%") else (0, 1)))(text.removesuffix("%"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: give an attention such as 0.7, or a share such as 30%") from None
    return text


# ==== Views: two random crops of an image, each with the window that it shows =========================================


def random_view(image, size):
    """MoCo-v2's augmentation, and the place of the crop. Draws from torch's global generator.

    Args:
        image: PIL RGB. size: side of the view in pixels.
    Returns:
        view: (3, size, size) uint8.
        window: (4,), the image coordinates x0, y0, x1, y1 of the view's left, top, right and bottom edge, as fractions
            of the image's width and height. A flipped view has x0 > x1.
    """
    width, height = image.size
    top, left, h, w = transforms.RandomResizedCrop.get_params(image, scale=(0.2, 1.0), ratio=(3 / 4, 4 / 3))
    view = TF.resized_crop(image, top, left, h, w, [size, size])
    x0, y0, x1, y1 = left / width, top / height, (left + w) / width, (top + h) / height
    if torch.rand(()).item() < 0.8:
        view = transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)(view)
    if torch.rand(()).item() < 0.2:
        view = TF.rgb_to_grayscale(view, 3)
    if torch.rand(()).item() < 0.5:
        view = view.filter(ImageFilter.GaussianBlur(torch.empty(()).uniform_(0.1, 2.0).item()))
    if torch.rand(()).item() < 0.5:
        view, x0, x1 = TF.hflip(view), x1, x0
    return TF.pil_to_tensor(view), torch.tensor([x0, y0, x1, y1])


def two_views(image, size):
    """PIL RGB -> view_q, view_k, window_q, window_k"""
    (view_q, window_q), (view_k, window_k) = random_view(image, size), random_view(image, size)
    return view_q, view_k, window_q, window_k


# ==== Encoder: backbone f with parallel heads g_img and g_pix (section 3.2) ===========================================


class Encoded(NamedTuple):
    """An encoded view, not normalised. On MoCo the predictions are the projections themselves."""

    z: torch.Tensor  # (B, C, H, W)
    image: torch.Tensor  # (B, D)
    image_prediction: torch.Tensor  # (B, D)
    cells: torch.Tensor | None = None  # (B, S, D); None for the baseline
    cells_prediction: torch.Tensor | None = None  # (B, S, D)


class Encoder(nn.Module):
    """ResNet with a head for the image and, if `dense`, one for its cells. PAPER: Eq. 2, section 3.2.

    Heads are MoCo-v2's and DenseCL's, or SimSiam's and copies of them in 1x1 convolutions (section 4.1, S17).

    Args:
        framework: "moco" or "simsiam". dense: False for the baseline. amp: see --amp.
    """

    def __init__(self, arch, framework, dense=True, amp="none"):
        super().__init__()
        self.simsiam, self.dense, self.amp = framework == "simsiam", dense, amp
        self.trunk = common.ResNetTrunk(arch, zero_init_residual=self.simsiam)  # as SimSiam does (B16)
        heads = simsiam_heads if self.simsiam else moco_heads
        self.image_head, self.image_predictor = heads(self.trunk.widths[-1], nn.Linear, nn.BatchNorm1d)
        if dense:
            conv1x1 = partial(nn.Conv2d, kernel_size=1)
            self.cell_head, self.cell_predictor = heads(self.trunk.widths[-1], conv1x1, nn.BatchNorm2d)

    def forward(self, *views):
        """(B, 3, size, size) uint8 each -> Encoded of each. Batch statistics are per group, on SimSiam per batch."""
        group = len(views[0]) if self.simsiam else common.GROUP
        with common.autocast(self.amp, views[0].device):
            return [Encoded(*common.encode_in_groups(self, group, view)) for view in views]

    def encode(self, images):
        """One group of images -> the tensors of Encoded."""
        z = self.trunk(common.normalise(images))[-1]  # (B, C, H, W)
        image = self.image_head(z.mean((2, 3)))  # (B, D)
        outputs = [z, image, self.image_predictor(image)]
        if self.dense:
            cells = self.cell_head(z)  # (B, D, H, W)
            outputs += [x.flatten(2).transpose(1, 2) for x in (cells, self.cell_predictor(cells))]  # (B, S, D)
        return outputs


def moco_heads(C, layer, norm):
    """MoCo-v2's projector C-C-128, and no predictor."""
    return nn.Sequential(layer(C, C), nn.ReLU(), layer(C, 128)), nn.Identity()


def simsiam_heads(C, layer, norm):
    """SimSiam's projector C-C-C-C and predictor C-C/4-C."""
    projector = nn.Sequential(
        layer(C, C, bias=False), norm(C), nn.ReLU(),
        layer(C, C, bias=False), norm(C), nn.ReLU(),
        layer(C, C, bias=False), norm(C, affine=False),  # no bias: SimSiam freezes it, norm cancels it (DEVIATION: B7)
    )  # fmt: skip
    return projector, nn.Sequential(layer(C, C // 4, bias=False), norm(C // 4), nn.ReLU(), layer(C // 4, C))


# ==== Matcher: which key cells are positives of which query cells (section 3.3). No gradient, no parameters. ==========


def attention_map(z, square=False):
    """PAPER: Eq. 3, how active each cell is, min-max normalised.

    Args:
        z: (B, C, S). square: mean of z^2 over the channels, as released (S1), instead of the sum of |z|.
    Returns:
        A: (B, S) in [0, 1]; NaN for a map without contrast, which then selects nothing (S26).
    """
    activity = z.square().mean(1) if square else z.abs().sum(1)  # (B, S)
    low, high = activity.amin(1, keepdim=True), activity.amax(1, keepdim=True)
    return (activity - low) / (high - low)


def threshold_set(A, delta):
    """PAPER: Eq. 4, the cells with A(j) >= delta: (B, S) bool."""
    return A >= delta


def ratio_set(A, percent):
    """PAPER: Table 2, the Delta percent of cells with the highest attention: (B, S) bool.

    At least one cell; halves round up; equal values go by index (S19).
    """
    count = max(1, int(percent * A.shape[1] / 100 + 0.5))
    order = A.argsort(dim=1, descending=True, stable=True)
    chosen = torch.zeros_like(A, dtype=torch.bool).scatter(1, order[:, :count], True)
    return chosen & ~A.isnan()


def select(A, rule):
    """The set that --set names: '0.7' is threshold_set, '30%' is ratio_set. (B, S) -> (B, S) bool"""
    return ratio_set(A, float(rule[:-1])) if rule.endswith("%") else threshold_set(A, float(rule))


def cosine_similarity(z_q, z_k):
    """PAPER: Eq. 5's sim, every query cell with every key cell: (B, C, S), (B, C, S) -> (B, S, S)"""
    return torch.einsum("bci,bcj->bij", F.normalize(z_q, dim=1), F.normalize(z_k, dim=1))


def set_to_set(set_q, set_k, similarity, mu=0.0, nearest=True, geometry=None, official=False):
    """PAPER: Eqs. 5-7, c_i = (a_i \\ u_i) | s_i: the other set, without misleading cells, and the nearest neighbour.

    Args:
        set_q, set_k: (B, S) bool. similarity: (B, S, S).
        mu: cells with sim <= mu are misleading (Eq. 6). nearest: join s (Set2Set-NN) or not (Set2Set).
        geometry: None or (B, S, S) bool, positives by place, joined before the neighbours (S12, S13).
        official: as released (S4, S5): keep sim >= mu, and give a neighbour only to rows that still have a positive.
    Returns:
        c: (B, S, S) bool. c[b, i, j]: key cell j is a positive of query cell i.
    """
    a = set_q[:, :, None] & set_k[:, None, :]
    u = similarity < mu if official else similarity <= mu  # PAPER: Eq. 6
    c = a & ~u if geometry is None else (a & ~u) | geometry
    if nearest:  # PAPER: Eqs. 5 and 7. Neighbours are exempt from mu (S5).
        s = F.one_hot(similarity.argmax(2), similarity.shape[2]).bool()
        rows = c.any(2) if official else c.any(2) | set_q
        c = c | (s & (rows & set_k.any(1, keepdim=True))[:, :, None])  # no neighbour if the key set is empty
    return c


def one_to_one(kind, set_q, set_k, A_q, A_k, similarity, rng=None):
    """PAPER: Table 3's matchers of pixels, between two sets of equally many cells.

    Args:
        kind: random; sort: highest attention with highest attention, and so on down; hungarian: least total cosine
            distance. A_q, A_k: (B, S) attention. The rest as in set_to_set. rng: CPU generator for random.
    Returns:
        c: (B, S, S) bool, at most one positive in each row and column.
    """
    c = torch.zeros_like(similarity, dtype=torch.bool)
    for b in range(len(c)):
        i, j = set_q[b].nonzero()[:, 0], set_k[b].nonzero()[:, 0]
        if kind == "random":
            j = j[torch.randperm(len(j), generator=rng).to(j.device)]
        elif kind == "sort":
            i, j = (x[A[b, x].argsort(descending=True, stable=True)] for x, A in ((i, A_q), (j, A_k)))
        else:
            rows, columns = linear_sum_assignment(1 - similarity[b][i][:, j].cpu().numpy())
            i, j = i[rows], j[columns]
        n = min(len(i), len(j))  # 0 where a map has no contrast
        c[b, i[:n], j[:n]] = True
    return c


def cell_centres(window, H, W):
    """Where the cells of a view lie in the image.

    Args:
        window: (B, 4), see random_view; of a flipped view the centres run from right to left.
    Returns:
        centres: (B, S, 2), x and y, row by row. diagonal: (B,), length of a cell's diagonal.
    """
    x0, y0, x1, y1 = window.unbind(1)
    width, height = (x1 - x0) / W, (y1 - y0) / H
    x = x0[:, None] + (torch.arange(W, device=window.device) + 0.5) * width[:, None]  # (B, W)
    y = y0[:, None] + (torch.arange(H, device=window.device) + 0.5) * height[:, None]  # (B, H)
    centres = torch.stack([x[:, None, :].expand(-1, H, -1), y[:, :, None].expand(-1, -1, W)], 3)
    return centres.flatten(1, 2), torch.hypot(width, height)


def geometry_pairs(window_q, window_k, H, W, T=0.5):
    """PAPER: Table 4's Geo, PixPro's rule: centres closer than T times the longer cell diagonal of the two views.

    (B, 4), (B, 4) -> (B, S, S) bool. T is 0.5 in SetSim (S12), 0.7 in PixPro.
    """
    (centres_q, diagonal_q), (centres_k, diagonal_k) = (cell_centres(w, H, W) for w in (window_q, window_k))
    distance = (centres_q[:, :, None] - centres_k[:, None, :]).square().sum(3).sqrt()  # (B, S, S)
    return distance < T * torch.maximum(diagonal_q, diagonal_k)[:, None, None]


class Match(NamedTuple):
    """What the matcher found."""

    attention: tuple  # of (B, S), for view q and view k
    sets: tuple  # of (B, S) bool, likewise
    similarity: torch.Tensor  # (B, S, S)
    positives: torch.Tensor  # (B, S, S) bool


@torch.no_grad()
def match(z_q, z_k, window_q, window_k, matcher="set2set-nn", rule="0.7", geometry=None, official=False, rng=None):
    """(B, C, H, W) maps and (B, 4) windows of two views -> Match. See get_args for matcher, rule (--set), geometry."""
    H, W = z_q.shape[2:]
    z_q, z_k = z_q.flatten(2), z_k.flatten(2)  # (B, C, S)
    A = attention_map(z_q, official), attention_map(z_k, official)
    sets = tuple(select(a, rule) & (matcher not in ("densecl", "geometry")) for a in A)  # these two use no set
    similarity = cosine_similarity(z_q, z_k)
    if geometry or matcher == "geometry":
        same_place = geometry_pairs(window_q, window_k, H, W, geometry or 0.5)
    if matcher in PIXEL_MATCHERS:
        c = one_to_one(matcher, *sets, *A, similarity, rng)
    elif matcher == "densecl":
        c = F.one_hot(similarity.argmax(2), H * W).bool()
    elif matcher == "geometry":
        c = same_place
    else:  # mu of Eq. 6 is 0 in the text, 0.2 in the released script (S4)
        mu, nearest = 0.2 if official else 0.0, matcher == "set2set-nn"
        c = set_to_set(*sets, similarity, mu, nearest, same_place if geometry else None, official)
    return Match(A, sets, similarity, c)


# ==== Losses. Embeddings are fp32; those of contrastive losses are unit vectors. ======================================


def image_contrastive_loss(q, k, queue, temperature):
    """PAPER: Eq. 1, MoCo's InfoNCE: -log( exp(q.k+) / (exp(q.k+) + sum exp(q.k-)) ), mean over images.

    Args:
        q, k: (B, D). queue: (K, D). temperature: tau.
    """
    positive = (q * k).sum(1) / temperature  # (B,)
    return (torch.logaddexp(positive, negative_logsumexp(q, queue, temperature)) - positive).mean()


def set_contrastive_loss(p_q, p_k, positives, queue, temperature):
    """PAPER: Eq. 8: - 1/|c_i| sum_{j in c_i} log( exp(p_i.p_j) / (sum_{j' in c_i} exp(p_i.p_j') + sum exp(p_i.k-)) ).

    Every positive of a row is in the denominator of each of them; other cells of the image are in none (S7, S8).
    DEVIATION: S9, mean over an image's rows, then over images: the printed sum would grow with the set. Rows without
    positives do not count, images without rows count as 0 (S10).

    Args:
        p_q, p_k: (B, S, D). positives: (B, S, S) bool. queue: (K, D), pooled keys of other images.
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
    """Eq. 8 without negatives: minus the mean over j in c_i of cos(prediction_i, projection_j), averaged as Eq. 8 is.

    (B, S, D), (B, S, D), (B, S, S) bool -> scalar. No gradient flows through projections. The paper is silent (S18).
    """
    cosine = torch.einsum("bid,bjd->bij", F.normalize(prediction, dim=2), F.normalize(projection.detach(), dim=2))
    row = (cosine * positives).sum(2) / positives.sum(2).clamp(min=1)  # (B, S)
    return -(row.sum(1) / positives.any(2).sum(1).clamp(min=1)).mean()


# ==== Method: one iteration, from views to the loss ===================================================================


class SetSim(nn.Module):
    """SetSim on MoCo-v2 (momentum keys, shuffling BN, two queues) or, without a queue, on SimSiam.

    Args:
        encoder: Encoder. match: the function of that name, its settings filled in. loss_weight: lambda of Eq. 9.
        symmetric: both directions; always on SimSiam. queue_size, ema, temperature: K, m, tau of MoCo; a queue_size of
            0 means SimSiam.
    """

    picture, measured = "matches", "cells have their best match within one cell of the true place"

    def __init__(self, encoder, match, loss_weight, symmetric, queue_size=0, ema=0.999, temperature=0.2, seed=0):
        super().__init__()
        self.query, self.key = encoder, None
        self.match, self.loss_weight, self.symmetric = match, loss_weight, symmetric or not queue_size
        self.ema, self.temperature, self.seed = ema, temperature, seed
        if queue_size:
            self.key = copy.deepcopy(encoder).requires_grad_(False)
            self.image_queue = common.Queue(queue_size, 128, common.generator("image queue", seed))
            if encoder.dense:
                self.set_queue = common.Queue(queue_size, 128, common.generator("set queue", seed))

    def forward(self, network, view_q, view_k, window_q, window_k, step):
        """One iteration.

        Args:
            network: self.query, wrapped in DistributedDataParallel if there are several processes.
            view_q, view_k: (B, 3, size, size) uint8. window_q, window_k: (B, 4). step: seeds the draws.
        Returns:
            loss, {name: scalar tensor, or number to compare with}
        """
        # 1. queries: view q; for both directions view k too
        queries = network(view_q, view_k) if self.symmetric else network(view_q)
        # 2. keys: of the momentum network, or SimSiam's own projections
        keys = queries
        if self.key:
            keys = self.momentum_keys(step, *((view_q, view_k) if self.symmetric else (view_k,)))
        # 3. match each query with the key of the other view and compare; mean of the directions (S14)
        windows = (window_q, window_k), (window_k, window_q)
        rng = common.generator("match", self.seed, step, common.rank())
        pairs = zip(queries, keys[::-1], windows)  # noqa: B905  one direction has one query, one key
        losses, values = zip(*(self.compare(query, key, *w, rng) for query, key, w in pairs), strict=True)
        # 4. the keys of this step become negatives of later ones
        if self.key:
            for key in keys:
                self.image_queue.enqueue(all_gather(F.normalize(key.image, dim=1)))
                if self.query.dense:  # averaged over the cells, then normalised (S11)
                    self.set_queue.enqueue(all_gather(F.normalize(key.cells.mean(1), dim=1)))
        values = {name: sum(v[name] for v in values) / len(values) for name in values[0]}
        return sum(losses) / len(losses), values

    @torch.no_grad()
    def momentum_keys(self, step, *views):
        """Encoded of each view, of images shuffled over all groups: batch statistics must not give the positive away.

        The momentum network follows once a step, before its keys are computed.
        """
        common.momentum_update(self.key, self.query, self.ema)
        batch = len(views[0]) * common.processes()
        permutation = torch.randperm(batch, generator=common.generator("shuffle", self.seed, step))
        keys = self.key(*(common.shuffle(view, permutation) for view in views))
        return [Encoded(*(common.unshuffle(x, permutation) for x in key if x is not None)) for key in keys]

    def compare(self, query, key, window_q, window_k, rng):
        """The loss of one direction, and the numbers that tell whether matching and embeddings are alive."""
        q, k = F.normalize(query.image, dim=1), F.normalize(key.image.detach(), dim=1)  # (B, D)
        if self.key:
            image_loss = image_contrastive_loss(q, k, self.image_queue.vectors, self.temperature)  # PAPER: Eq. 1
        else:
            image_loss = image_cosine_loss(query.image_prediction, key.image)
        values = {"loss_image": image_loss, "std_image": (q if self.key else k).std(0, correction=0).mean()}
        values["std_spread"] = k.shape[1] ** -0.5  # of evenly drawn directions
        if self.key:
            values["loss_chance"] = math.log(len(self.image_queue.vectors) + 1)  # of a random guess
        if not self.query.dense:
            return image_loss, values
        found = self.match(query.z.detach(), key.z.detach(), window_q, window_k, rng=rng)
        p_q, p_k = F.normalize(query.cells, dim=2), F.normalize(key.cells, dim=2)  # (B, S, D)
        if self.key:
            set_loss = set_contrastive_loss(p_q, p_k, found.positives, self.set_queue.vectors, self.temperature)
        else:
            set_loss = set_cosine_loss(query.cells_prediction, key.cells, found.positives)
        rows = found.positives.any(2)  # (B, S)
        values |= {
            "loss_set": set_loss,
            "positives": found.positives.sum() / rows.sum().clamp(min=1),  # of a row
            "rows": rows.sum(1).float().mean(),  # of an image
            "empty": (~rows.any(1)).float().mean(),  # share of images without rows
            "std_dense": (p_q if self.key else p_k).flatten(0, 1).std(0, correction=0).mean(),
        }
        return (1 - self.loss_weight) * image_loss + self.loss_weight * set_loss, values  # PAPER: Eq. 9

    def see(self, view_q, view_k, window_q, window_k):
        """Match of fixed views, and the size H, W of their maps."""
        (query,), (key,) = self.query(view_q), (self.key or self.query)(view_k)
        found = self.match(query.z, key.z, window_q, window_k, rng=common.generator("see", self.seed))
        return found, *query.z.shape[2:]

    def measure(self, view_q, view_k, window_q, window_k):
        found, H, W = self.see(view_q, view_k, window_q, window_k)
        return look.correspondence(found.similarity, window_q, window_k, H, W)

    def draw(self, path, view_q, view_k, window_q, window_k):
        look.draw_matches(path, view_q, view_k, *self.see(view_q, view_k, window_q, window_k))


def build(args, device, init=None):
    """The method that the settings describe, equal on all processes. init: weights to start from, see --init."""
    moco = args.framework == "moco"
    with common.drawing("init", args.seed):
        encoder = Encoder(args.arch, args.framework, args.loss_weight > 0, args.amp)
    if init:
        weights.load_into(encoder.trunk, init, args.arch)
    encoder = encoder if moco else common.synchronised_norms(encoder, device)
    settings = dict(matcher=args.matcher, rule=args.set, geometry=args.geometry, official=args.preset == "official")
    method = SetSim(
        encoder, partial(match, **settings), args.loss_weight, args.symmetric,
        (args.queue_size or 65536) if moco else 0, args.ema, args.temperature, args.seed,
    )  # fmt: skip
    return method.to(device, memory_format=torch.channels_last)


# ==== Training ========================================================================================================


def train(argv=None):
    args = get_args(argv)
    run = Run("setsim", args)  # processes, images, output folder, log, checkpoints, signals: harness/run.py
    if args.framework == "moco":
        args.queue_size = run.fit_queue(args.queue_size, 512 if args.demo else 65536, keys=1 + args.symmetric)
    method = build(args, run.device, run.init)
    network = method.query

    # Weight decay on norms and biases too (B3). SimSiam's predictors keep their learning rate (B6).
    lr = args.lr * args.batch_size / 256  # once; the released script scales a number already scaled (DEVIATION: S15)
    predictors = [p for name, p in network.named_parameters() if "predictor" in name]
    others = [p for name, p in network.named_parameters() if "predictor" not in name]
    optimizer = torch.optim.SGD([{"params": others}, {"params": predictors}], lr, momentum=0.9, weight_decay=1e-4)
    scaler = torch.amp.GradScaler(run.device.type, enabled=args.amp == "fp16")
    run.resume(method, optimizer, scaler, exports={f"{args.arch}.pth": network.trunk})
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
