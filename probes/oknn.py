# SPDX-License-Identifier: MIT
"""Object k-NN (O-KNN) and disturbed O-KNN: does a frozen backbone's feature of an object tell what it is?

Qiu et al., "De-coupling and De-positioning Dense Self-supervised Learning", 2023, section 5.3, Table 4. Every annotated
object of the evaluation set is classified by its k nearest neighbours among objects of the training set; disturbed: all
that lies outside the boxes of these objects is another image.

    image --(disturb)--> x --frozen ResNet--> C5 --RoIAlign 7x7 of each box--> mean over cells, unit length --> z
    z of an evaluation object --cosines with the bank of training objects--> k nearest, weighed exp(cosine/tau) --> classes

    V variants of an image: as it is, disturbed    n objects of an image    Q queries: evaluation objects    M a part of
    the bank    D channels    H, W an image's sides    k neighbours    tau temperature

    python -m probes.oknn --data /coco --weights runs/d3ssl/resnet50.pth        COCO train2017 and val2017: Table 4
    python -m probes.oknn --data scenes:512 --arch resnet18 --weights FILE      built-in scenes, nothing to download

DATA/annotations/instances_SPLIT.json and DATA/SPLIT/ are COCO's layout; any detection data so laid out will do. The bank
is never stored: its features are compared with all queries as they come, only each query's k best neighbours are kept.
OUTPUT_DIR/results.json holds the result; a folder with results of other settings is refused.

k, tau, N and the images' size are not printed in the paper (AMBIGUOUS: D32), so that accuracies of this script can be
compared with one another, at equal settings, but not with Table 4.
"""

import argparse
import math
import os

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torchvision import ops
from torchvision.transforms import functional as TF

import common
import harness.images
import harness.legacy
import harness.pictures
import harness.run
from common import UserError
from probes.frozen import (
    HELD_OUT,
    CocoObjects,
    SceneObjects,
    frozen_trunk,
    header,
    one_process,
    readable,
    require_own_folder,
    scene_count,
    write_results,
)

SMALLEST = 8  # AMBIGUOUS: D34. Pixels; objects with a shorter side in the resized image are left out
CELLS = 7  # PAPER: section 5.3, "RoI Align with a size of 7 x 7"
PART = 4096  # features of the bank, and queries, that are compared at once
NAMES = ("O-KNN", "disturbed O-KNN")


def get_args(argv=None):
    # fmt: off
    parser = argparse.ArgumentParser(prog="python -m probes.oknn", description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flag = parser.add_argument
    flag("--data", required=True, metavar="DIR", help="folder with annotations/instances_SPLIT.json and SPLIT/, as COCO has them; or 'scenes[:COUNT]': COUNT for the bank, a quarter more as queries")
    flag("--weights", required=True, metavar="FILE", help="backbone to be evaluated: any checkpoint with a ResNet in it, 'imagenet' or 'random'")
    flag("--output-dir", default="runs/oknn", help="results.json goes there")
    flag("--train", default="train2017", metavar="SPLIT", help="whose objects are the bank")
    flag("--val", default="val2017", metavar="SPLIT", help="whose objects are classified, all of them")
    flag("--arch", default="resnet50", choices=common.ARCHS, help="torchvision ResNet that the weights belong to")
    # AMBIGUOUS: D32, D33, D35
    flag("--objects", default=5, type=int, metavar="N", help="objects of a training image in the bank, drawn at random: all of them would fill it with crowded images' classes")
    flag("--neighbours", default=20, type=int, metavar="K", help="k, how many vote")
    flag("--temperature", default=0.07, type=float, help="tau, a vote weighs exp(cosine/tau): the smaller, the more the nearest count")
    flag("--size", default=448, type=int, help="short side of the images in pixels: 14 cells of C5; scenes are drawn at this size")
    flag("--features", default="c5", choices=("c5", "c4"), help="RoIAlign on C5, or on C4 with the last stage applied to each region, as detectors with a C4 backbone do")
    flag("--disturb", default="both", choices=("both", "queries"), help="disturbed O-KNN: other surroundings in bank and queries, or in the queries alone")
    flag("--seed", default=0, type=int, help="of the N objects, the other images, the scenes and random backbones")
    flag("--workers", default=min(8, harness.legacy.usable_cores()), type=int, help="loader processes; no influence on results")
    # fmt: on
    args = parser.parse_args(argv)
    harness.legacy.check_range(
        args, objects=(1, None), neighbours=(1, None), temperature=(1e-3, None), size=(64, None), seed=(0, None),
        workers=(0, None),
    )  # fmt: skip
    return args


# ======================================================================================================================
# Images and their disturbance
# ======================================================================================================================


def disturb(image, boxes, other):
    """Replace all that lies outside the boxes by another image (PAPER: section 5.3, "Disturbed Object-level KNN").

    Args:
        image, other: (3, H, W) of the same type. boxes: (n, 4) x0 y0 x1 y1 in pixels; a pixel that a box touches stays.
    Returns:
        (3, H, W)
    """
    inside = torch.zeros(image.shape[1:], dtype=torch.bool)  # (H, W)
    for x0, y0, x1, y1 in torch.cat([boxes[:, :2].floor(), boxes[:, 2:].ceil()], 1).int().tolist():
        inside[y0:y1, x0:x1] = True
    return torch.where(inside, image, other)


class Variants(torch.utils.data.Dataset):
    """Images with their objects, each as it is and disturbed, all drawn from (seed, split, index) and nothing else.

    `self[index]` is (x (V, 3, H, W) uint8, boxes (n, 4) in pixels of x, labels (n,), index, unreadable images passed over).

    Args:
        objects: CocoObjects or SceneObjects. size: short side in pixels. most: N, or None for all objects.
        disturbed: whether there is a second variant. key: seed and split.
    """

    def __init__(self, objects, size, most, disturbed, *key):
        self.objects, self.size, self.most, self.disturbed, self.key = objects, size, most, disturbed, key

    def __len__(self):
        return len(self.objects)

    def __getitem__(self, index):
        rng = common.generator("object k-NN", *self.key, index)
        (image, boxes, labels, _), passed = readable(self.objects, index)
        scale = self.size / min(image.size)
        resized = image.resize([max(self.size, round(side * scale)) for side in image.size], Image.Resampling.BILINEAR)
        boxes = boxes * torch.tensor(resized.size).div(torch.tensor(image.size)).repeat(2)
        large = ((boxes[:, 2:] - boxes[:, :2]).amin(1) >= SMALLEST).nonzero()[:, 0]
        chosen = large[torch.randperm(len(large), generator=rng)[: self.most]]  # PAPER: "N object features per image"
        boxes, labels, x = boxes[chosen], labels[chosen], TF.pil_to_tensor(resized)
        if not self.disturbed:
            return x[None], boxes, labels, index, passed
        # AMBIGUOUS: D35. The "randomly sampled image" is one of the same split, cut to the size from its middle.
        for _ in range(harness.images.TRIES):
            another = (index + 1 + torch.randint(len(self) - 1, (), generator=rng).item()) % len(self)
            other, further = readable(self.objects, another)
            if further < harness.images.TRIES and (another + further - index - passed) % len(self):
                break  # it is not the image itself, standing in for an unreadable one
        else:
            boxes, labels = boxes[:0], labels[:0]  # no other image can be read
        other = ImageOps.fit(other.image, resized.size, Image.Resampling.BILINEAR)
        return torch.stack([x, disturb(x, boxes, TF.pil_to_tensor(other))]), boxes, labels, index, passed


# ======================================================================================================================
# Features
# ======================================================================================================================


@torch.no_grad()
def object_features(trunk, x, boxes, where):
    """PAPER: section 5.3. The frozen backbone's feature of each object.

    AMBIGUOUS: D33. "From the C5 block" can also be read as the last stage applied to regions of C4 (`where` "c4"), as in
    section 4 and in detectors with a C4 backbone; that stage then sees nothing of what is outside the box on C4.

    Args:
        trunk: gives [C2, C3, C4, C5], strides 4, 8, 16, 32. x: (V, 3, H, W) uint8. boxes: (n, 4) in pixels, the same in
        all variants. where: "c5" or "c4".
    Returns:
        (V, n, D) float32, unit length.
    """
    rows = [boxes] * len(x)
    if where == "c5":
        regions = ops.roi_align(trunk(common.normalise(x))[3], rows, CELLS, 1 / 32, aligned=True)  # (V n, D, 7, 7)
    else:
        regions = ops.roi_align(trunk(common.normalise(x), stages=3)[2], rows, 2 * CELLS, 1 / 16, aligned=True)
        regions = trunk.layer4(regions.contiguous(memory_format=torch.channels_last))  # (V n, D, 7, 7)
    return F.normalize(regions.float().mean((2, 3)), dim=1).unflatten(0, (len(x), len(boxes)))


def all_features(trunk, variants, where, workers, device, title):
    """The features of a whole set of images, image by image: sizes differ.

    Yields:
        (V, n, D) features on the device and (n,) labels of each image that has objects.
    Errors:
        UserError: more than 1 % of the images cannot be read.
    """
    bad = harness.images.BadImages(variants.objects, outcome="it is left out")
    loader = torch.utils.data.DataLoader(
        variants,
        batch_size=None,
        num_workers=workers,
        worker_init_fn=harness.images.detach_worker,
        pin_memory=device.type == "cuda",
    )
    for x, boxes, labels, index, passed in harness.pictures.progress(
        loader, len(variants), what=f"images of the {title}"
    ):
        if passed:
            bad.note(torch.tensor([index]), torch.tensor([passed]))
            bad.share()
        if len(labels) and not passed:  # a stand-in would be counted twice
            features = object_features(trunk, x.to(device), boxes.to(device), where)
            yield features, labels.to(device, copy=True)  # a worker's own tensor would hold a file open


def in_parts(features, size):
    """Join the (V, n, D) and (n,) of `all_features` into parts of at least `size` objects; the last one may be smaller."""
    held = []
    for item in features:
        held.append(item)
        if sum(len(labels) for _, labels in held) >= size:
            yield torch.cat([z for z, _ in held], 1), torch.cat([labels for _, labels in held])
            held = []
    if held:
        yield torch.cat([z for z, _ in held], 1), torch.cat([labels for _, labels in held])


# ======================================================================================================================
# k-NN
# ======================================================================================================================


def nobody(queries, k):
    """`best` of `nearest` before any part of the bank: (similarity (Q, k), all -inf, which weighs nothing; labels)."""
    return queries.new_full((len(queries), k), -torch.inf), queries.new_zeros((len(queries), k), dtype=torch.int64)


def nearest(queries, bank, labels, best, rows=PART):
    """Each query's nearest neighbours in what was seen before and a further part of the bank.

    Args:
        queries: (Q, D), bank: (M, D), unit length. labels: (M,) int64 of the bank. best: (similarity (Q, k) descending,
        labels (Q, k)) so far; `nobody` at first. rows: queries compared at once, a matter of memory alone.
    Returns:
        The same as `best`, of both together: as if the whole bank had come at once.
    """
    found = []
    for q, similarity, known in zip(queries.split(rows), best[0].split(rows), best[1].split(rows), strict=True):
        everything = torch.cat([similarity, q @ bank.T], 1)  # (rows, k + M)
        similarity, place = everything.topk(similarity.shape[1])  # (rows, k)
        found.append((similarity, torch.cat([known, labels.expand(len(q), -1)], 1).gather(1, place)))
    return torch.cat([similarity for similarity, _ in found]), torch.cat([known for _, known in found])


def vote(similarity, labels, classes, temperature):
    """Weighted k-NN (AMBIGUOUS: D32): score of class c = sum of exp(similarity/tau) over the neighbours of class c.

    Args:
        similarity, labels: (Q, k) as `nearest` gives them. classes: their number.
    Returns:
        (Q, classes) scores, each query's relative to its nearest neighbour's weight (which changes no ranking); 0 where
        no neighbour has the class.
    """
    weights = ((similarity.double() - similarity.amax(1, keepdim=True)) / temperature).exp()
    return weights.new_zeros(len(weights), classes).scatter_add_(1, labels, weights)


def top(scores, labels, n):
    """Whether the true class is among the n of highest score; a class without a vote never is, ties count as lost.

    Args:
        scores: (Q, classes). labels: (Q,) int64.
    Returns:
        (Q,) bool
    """
    own = scores.gather(1, labels[:, None])  # (Q, 1)
    return (own[:, 0] > 0) & ((scores >= own).sum(1) <= n)


# ======================================================================================================================
# Evaluation
# ======================================================================================================================


def open_sets(args):
    """(objects of the bank, objects to classify, number of their categories), labels numbered from 0 on.

    Errors:
        UserError: no such data, or a single image, which has no other one to be disturbed with.
    """
    count = scene_count(args.data)
    if count:
        from harness.scenes import CLASSES

        starts = {HELD_OUT: count, HELD_OUT + count: -(-count // 4)}
        sets, classes = [SceneObjects(first, n, args.size, args.seed) for first, n in starts.items()], len(CLASSES) + 1
    else:
        sets = [CocoObjects(args.data, split) for split in (args.train, args.val)]
        categories = np.union1d(sets[0].labels, sets[1].labels)
        for objects in sets:
            objects.labels = np.searchsorted(categories, objects.labels)
        classes = len(categories)
    if min(map(len, sets)) < 2:
        raise UserError(f"--data {args.data}: a single image with objects; bank and queries need two images each")
    return *sets, classes


def main(argv=None):
    args = get_args(argv)
    device = one_process()
    require_own_folder(args.output_dir, vars(args))
    bank, queries, classes = open_sets(args)
    trunk, _, line = frozen_trunk(args.weights, args.arch, args.seed, device)
    print(
        f"{line}\nobject k-NN: {len(bank)} images with objects for the bank, {len(queries)} for queries; {device.type}",
        flush=True,
    )

    def features(objects, title, most, disturbed, part):
        variants = Variants(objects, args.size, most, disturbed, args.seed, title)
        return in_parts(all_features(trunk, variants, args.features, args.workers, device, title), part)

    # queries, all at once -----------------------------------------------------------------------------------------------
    parts = list(features(queries, "queries", None, True, math.inf))
    if not parts:
        raise UserError(f"--val {args.val}: no object of {SMALLEST} pixels a side at --size {args.size}")
    ((z, truth),) = parts  # (V, Q, D), (Q,)

    # bank, in parts -----------------------------------------------------------------------------------------------------
    best = [nobody(queries, args.neighbours) for queries in z]
    seen = torch.zeros(classes, dtype=torch.int64, device=device)  # objects of each class in the bank
    for keys, labels in features(bank, "bank", args.objects, args.disturb == "both", PART):
        best = [nearest(z[v], keys[min(v, len(keys) - 1)], labels, best[v]) for v in range(len(z))]
        seen += labels.bincount(minlength=classes)
    if not seen.any():
        raise UserError(f"--train {args.train}: no object of {SMALLEST} pixels a side at --size {args.size}")

    # results ------------------------------------------------------------------------------------------------------------
    truth, seen = truth.cpu(), seen.cpu()
    results = {"queries": len(truth), "bank": seen.sum().item()}
    results["majority"] = 100 * (truth == seen.argmax()).double().mean().item()
    for title, found in zip(NAMES, best, strict=True):
        scores = vote(*(part.cpu() for part in found), classes, args.temperature)  # a GPU adds up in any order
        results[title] = {f"top{n}": 100 * top(scores, truth, n).double().mean().item() for n in (1, 5)}
        print(f"{title}: top-1 {results[title]['top1']:.2f} top-5 {results[title]['top5']:.2f}")
    print(
        f"{results['queries']} queries, {results['bank']} objects in the bank; always its most frequent class: top-1 "
        f"{results['majority']:.2f}"
    )
    write_results(args.output_dir, header("probes.oknn", argv, vars(args)) | results)
    print(os.path.join(args.output_dir, "results.json"))


if __name__ == "__main__":
    harness.run.main(main)
