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

The bank is never stored: its features are compared with all queries as they come, and only each query's k best neighbours
are kept. The paper does not print k, tau, N and the images' size (AMBIGUOUS: D32). Accuracies of this script can be
compared with one another, at equal settings, but not with Table 4.
"""

import argparse
import contextlib
import math

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torchvision import ops
from torchvision.transforms import functional as TF

import common
from common import UserError, number
from harness import images, pictures, run
from probes import frozen

SMALLEST = 8  # AMBIGUOUS: D34. Pixels; objects with a shorter side in the resized image are left out
CELLS = 7  # PAPER: section 5.3, "RoI Align with a size of 7 x 7"
PART = 4096  # features of the bank, and queries, that are compared at once


def get_args(argv=None):
    # fmt: off
    parser = argparse.ArgumentParser(prog="python -m probes.oknn", description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flag, some = parser.add_argument, number(int, 1)
    flag("--data", required=True, metavar="DIR", help="folder with annotations/instances_SPLIT.json and SPLIT/, as COCO has them; or 'scenes[:COUNT]': COUNT for the bank, a quarter more as queries")
    flag("--weights", required=True, metavar="FILE", help="backbone to be evaluated: any checkpoint with a ResNet in it, 'imagenet' or 'random'")
    flag("--output-dir", default="runs/oknn", help="results.json goes there")
    flag("--train", default="train2017", metavar="SPLIT", help="whose objects are the bank")
    flag("--val", default="val2017", metavar="SPLIT", help="whose objects are classified, all of them")
    flag("--arch", default="resnet50", choices=common.ARCHS, help="torchvision ResNet that the weights belong to")
    flag("--objects", default=5, type=some, metavar="N", help="objects of a training image in the bank, drawn at random: all of them would fill it with crowded images' classes")
    flag("--neighbours", default=20, type=some, metavar="K", help="k, how many vote")
    flag("--temperature", default=0.07, type=number(float, 1e-3), help="tau, a vote weighs exp(cosine/tau): the smaller, the more the nearest count")
    flag("--size", default=448, type=number(int, 64), help="short side of the images in pixels: 14 cells of C5; scenes are drawn at this size")
    flag("--features", default="c5", choices=("c5", "c4"), help="RoIAlign on C5, or on C4 with the last stage applied to each region, as detectors with a C4 backbone do")
    flag("--disturb", default="both", choices=("both", "queries"), help="disturbed O-KNN: other surroundings in bank and queries, or in the queries alone")
    flag("--seed", default=0, type=number(int, 0), help="of the N objects, the other images, the scenes and random backbones")
    flag("--workers", default=min(8, frozen.CORES), type=number(int, 0), help="loader processes; results do not depend on it")
    # fmt: on
    return parser.parse_args(argv)


def disturb(image, boxes, other):
    """Replace all that lies outside the boxes by another image (PAPER: section 5.3, "Disturbed Object-level KNN").

    image, other: (3, H, W) of the same type. boxes: (n, 4) x0 y0 x1 y1 in pixels; a pixel that a box touches stays.
    """
    inside = torch.zeros(image.shape[1:], dtype=torch.bool)  # (H, W)
    for x0, y0, x1, y1 in torch.cat([boxes[:, :2].floor(), boxes[:, 2:].ceil()], 1).int().tolist():
        inside[y0:y1, x0:x1] = True
    return torch.where(inside, image, other)


class Variants(torch.utils.data.Dataset):
    """Images with their objects, each as it is and disturbed, all drawn from (seed, split, index) and nothing else.

    `self[index]` is (x (V, 3, H, W) uint8, boxes (n, 4) in pixels of x, labels (n,), index, whether it can be read).
    size: short side in pixels. most: N, or None for all objects. disturbed: is there a second variant? key: seed, split.
    """

    def __init__(self, objects, size, most, disturbed, *key):
        self.objects, self.size, self.most, self.disturbed, self.key = objects, size, most, disturbed, key

    def __len__(self):
        return len(self.objects)

    def __getitem__(self, index):
        rng, nothing = common.generator("object k-NN", *self.key, index), torch.zeros(0)
        try:
            image, boxes, labels, _ = self.objects[index]
        except OSError:
            return nothing, nothing, nothing, index, False
        scale = self.size / min(image.size)
        resized = image.resize([max(self.size, round(side * scale)) for side in image.size], Image.Resampling.BILINEAR)
        boxes = boxes * torch.tensor(resized.size).div(torch.tensor(image.size)).repeat(2)
        large = ((boxes[:, 2:] - boxes[:, :2]).amin(1) >= SMALLEST).nonzero()[:, 0]
        chosen = large[torch.randperm(len(large), generator=rng)[: self.most]]  # PAPER: "N object features per image"
        boxes, labels, x = boxes[chosen], labels[chosen], TF.pil_to_tensor(resized)
        if not self.disturbed:
            return x[None], boxes, labels, index, True
        # AMBIGUOUS: D35. The "randomly sampled image" is another one of the split, cut to the size from its middle.
        for _ in range(images.TRIES):
            another = (index + 1 + torch.randint(len(self) - 1, (), generator=rng).item()) % len(self)
            with contextlib.suppress(OSError):
                other = ImageOps.fit(self.objects[another][0], resized.size, Image.Resampling.BILINEAR)
                return torch.stack([x, disturb(x, boxes, TF.pil_to_tensor(other))]), boxes, labels, index, True
        return nothing, nothing, nothing, index, True  # no other image can be read


@torch.no_grad()
def object_features(trunk, x, boxes, where):
    """PAPER: section 5.3. The frozen backbone's feature of each object: (V, n, D) float32, unit length.

    AMBIGUOUS: D33. "From the C5 block" can also be read as the last stage applied to regions of C4 (`where` "c4"), as in
    section 4 and in detectors with a C4 backbone; that stage then sees nothing of what is outside the box on C4.
    trunk: gives [C2, C3, C4, C5]. x: (V, 3, H, W) uint8. boxes: (n, 4) in pixels, the same in all variants.
    """
    rows = [boxes] * len(x)
    if where == "c5":
        regions = ops.roi_align(trunk(common.normalise(x))[3], rows, CELLS, 1 / 32, aligned=True)  # (V n, D, 7, 7)
    else:
        regions = ops.roi_align(trunk(common.normalise(x), stages=3)[2], rows, 2 * CELLS, 1 / 16, aligned=True)
        regions = trunk.layer4(regions.contiguous(memory_format=torch.channels_last))  # (V n, D, 7, 7)
    return F.normalize(regions.float().mean((2, 3)), dim=1).unflatten(0, (len(x), len(boxes)))


def all_features(trunk, variants, where, workers, part):
    """The features of a whole set of images, a `Variants`, one at a time, as sizes differ.

    Yields (V, n, D) features and (n,) labels of so many images that n is at least `part`; the last of fewer.
    Errors: UserError, more than 1 % of the images cannot be read, or there are no objects.
    """
    bad, found, features = images.BadImages(variants.objects, outcome="it is left out"), [], None
    device, title = next(trunk.parameters()).device, f"images of the {variants.key[-1]}"
    loader = torch.utils.data.DataLoader(variants, None, num_workers=workers, worker_init_fn=images.detach_worker)
    for x, boxes, labels, index, read in pictures.progress(loader, len(variants), what=title):
        if not read:
            bad.note(torch.tensor([index]), torch.tensor([1]))
            bad.share()
        if len(labels):
            features = object_features(trunk, x.to(device), boxes.to(device), where)
            found.append((features, labels.to(device, copy=True)))  # a worker's own tensor would hold a file open
        if found and (index == len(variants) - 1 or sum(len(labels) for _, labels in found) >= part):
            features, labels = zip(*found, strict=True)
            yield torch.cat(features, 1), torch.cat(labels)
            found = []
    if features is None:
        raise UserError(f"no object of {SMALLEST} pixels a side in the {title}")


def nearest(queries, bank, labels, best, rows=PART):
    """Each query's nearest neighbours in what was seen before and a further part of the bank.

    queries: (Q, D), bank: (M, D), unit length. labels: (M,) int64 of the bank. best: (similarity (Q, k) descending, labels
    (Q, k)) so far; at first -inf and 0. rows: queries compared at once, a matter of memory alone. Returns the same as
    `best`, of both together: as if the whole bank had come at once.
    """
    found = []
    for q, similarity, known in zip(queries.split(rows), best[0].split(rows), best[1].split(rows), strict=True):
        everything = torch.cat([similarity, q @ bank.T], 1)  # (rows, k + M)
        similarity, place = everything.topk(similarity.shape[1])  # (rows, k)
        found.append((similarity, torch.cat([known, labels.expand(len(q), -1)], 1).gather(1, place)))
    return torch.cat([similarity for similarity, _ in found]), torch.cat([known for _, known in found])


def vote(similarity, labels, classes, temperature):
    """Weighted k-NN (AMBIGUOUS: D32): score of class c = sum of exp(similarity/tau) over the neighbours of class c.

    similarity, labels: (Q, k) as `nearest` gives them. Returns (Q, classes) scores, each query's relative to its nearest
    neighbour's weight (which changes no ranking); 0 where no neighbour has the class.
    """
    weights = ((similarity.double() - similarity.amax(1, keepdim=True)) / temperature).exp()
    return weights.new_zeros(len(weights), classes).scatter_add_(1, labels, weights)


def top(scores, labels, n):
    """Whether the true class is among the n of highest score; a class without a vote never is, ties count as lost.

    scores: (Q, classes). labels: (Q,) int64. Returns (Q,) bool.
    """
    own = scores.gather(1, labels[:, None])  # (Q, 1)
    return (own[:, 0] > 0) & ((scores >= own).sum(1) <= n)


def job(argv=None):
    args = get_args(argv)
    device = frozen.start(args)
    bank = frozen.open_objects(args, args.train, args.size)
    queries = frozen.open_objects(args, args.val, args.size, bank=bank)
    if min(len(bank), len(queries)) < 2:
        raise UserError(f"--data {args.data}: a single image with objects; bank and queries need two images each")
    trunk = frozen.frozen_trunk(args.weights, args.arch, args.seed, device)
    print(f"object k-NN: {len(bank)} images with objects for the bank, {len(queries)} for queries; {device.type}")

    variants = Variants(queries, args.size, None, True, args.seed, "queries")
    ((z, truth),) = all_features(trunk, variants, args.features, args.workers, math.inf)  # (V, Q, D), (Q,)
    best = torch.full((*z.shape[:2], args.neighbours), -torch.inf, device=device)  # (V, Q, k)
    best = [(similarity, torch.zeros_like(similarity, dtype=torch.int64)) for similarity in best]
    seen = truth.new_zeros(len(bank.categories) + 1)  # objects of each class in the bank
    variants = Variants(bank, args.size, args.objects, args.disturb == "both", args.seed, "bank")
    for keys, labels in all_features(trunk, variants, args.features, args.workers, PART):
        rows = zip(z, keys.expand(len(z), -1, -1), best, strict=True)
        best = [nearest(own, key, labels, found) for own, key, found in rows]
        seen += labels.bincount(minlength=len(seen))

    truth, seen = truth.cpu(), seen.cpu()
    majority = 100 * (truth == seen.argmax()).double().mean().item()
    results = {"queries": len(truth), "bank": seen.sum().item(), "majority": majority}
    for title, found in zip(("O-KNN", "disturbed O-KNN"), best, strict=True):
        scores = vote(*(part.cpu() for part in found), len(seen), args.temperature)  # a GPU adds up in any order
        results[title] = {f"top{n}": 100 * top(scores, truth, n).double().mean().item() for n in (1, 5)}
        print("{}: top-1 {top1:.2f} top-5 {top5:.2f}".format(title, **results[title]))
    print("{queries} queries, {bank} objects in the bank; its largest class: top-1 {majority:.2f}".format(**results))
    frozen.write_results(args.output_dir, "probes.oknn", argv, vars(args), results)


if __name__ == "__main__":
    run.main(job)
