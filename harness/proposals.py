# SPDX-License-Identifier: MIT
"""Selective-search boxes of a data set: find them, keep them in a folder of numpy files, attach them to images.

Uijlings et al., "Selective Search for Object Recognition", IJCV 2013, as OpenCV has it. A box is kept as in SoCo (Wei
et al., NeurIPS 2021): if all three rules hold; if that leaves none, by the ratio alone; then by the side alone.
    side: w >= 32 and h >= 32 pixels; ratio: 1/3 <= w/h <= 3; size: 0.3 <= sqrt(w h) / sqrt(W H) <= 0.8

DEVIATION: D1. SoCo's own search lists many boxes twice; `single` has the settings of its segmentation. In thumbnails a
fifth of the short side takes the place of 32 pixels. Images over 640 pixels, COCO's longest side, are searched at 640.

The folder of N images, made by tools/proposals.py:
    boxes.npy    int32 (rows, 4)  x0, y0, x1, y1: whole pixels after EXIF rotation, right and bottom edges exclusive
    offsets.npy  int64 (N + 1,)   boxes of image i: rows offsets[i] to offsets[i + 1], sorted, none twice
    rules.npy    uint8 (N,)       what kept the boxes, a position in RULES
    sizes.npy    int32 (N, 2)     width and height, (0, 0) where unreadable
    names.npy    bytes (N,)       relative paths
    meta.json                     what the boxes depend on; written last, so a folder with it is complete
Until then part-001000.pth holds the images from number 1000 on, and so forth. The finished bytes depend on the kind of
processor and on versions, not on the number of workers or on interruptions.
"""

import contextlib
import functools
import io
import itertools
import json
import os
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from torch.utils.data import DataLoader

import common
from common import UserError, print0
from harness import images as data
from harness import pictures, weights
from harness.run import agree

STRATEGIES = ("single", "fast")
SCALE, SIGMA = 300, 0.9  # of `single`: SoCo's graph segmentation; `fast` has OpenCV's own scales and colour spaces
FILTER = SIDE, SHARE, RATIO, SMALLEST, LARGEST, LONGEST = [32, 5, 3, 30, 80, 640]  # see above; sizes in percent
RULES = ("all three rules", "the ratio alone", "the side alone", "no box left", "unreadable")
NOTHING, UNREADABLE = 3, 4
PART = 1000  # images that are saved together


def opencv():
    """The module cv2, set to one thread: its own would not survive a fork. UserError: it has no selective search."""
    try:
        import cv2

        cv2.ximgproc.segmentation.createSelectiveSearchSegmentation  # noqa: B018
    except (ImportError, AttributeError):
        raise UserError("no selective search: pip install opencv-contrib-python-headless, no other opencv") from None
    cv2.setNumThreads(1)
    return cv2


def search(image, strategy):
    """All boxes that selective search finds, before any filter; sorted, none twice: OpenCV's order varies.

    image: PIL image, RGB, W x H. strategy: of STRATEGIES. Returns (n, 4) int64 x0, y0, x1, y1, pixels from 0 to W or H.
    """
    W, H = image.size
    shrink = min(1, LONGEST / max(W, H))  # DEVIATION: D1
    small = image.resize([max(1, round(shrink * side)) for side in (W, H)], PIL.Image.Resampling.BILINEAR)
    segmentation = opencv().ximgproc.segmentation.createSelectiveSearchSegmentation()
    segmentation.setBaseImage(np.ascontiguousarray(np.asarray(small)[:, :, ::-1]))  # OpenCV's BGR
    if strategy == "fast":
        segmentation.switchToSelectiveSearchFast()
    else:
        segmentation.switchToSingleStrategy(SCALE, SIGMA)
    start, extent = np.asarray(segmentation.process(), np.int64).reshape(-1, 2, 2).transpose(1, 0, 2)  # (n, 2) each
    start, end = start * (W, H) // small.size, -(-(start + extent) * (W, H) // small.size)  # rounded outwards
    return np.unique(np.concatenate([start, end], 1), axis=0)


def keep(boxes, W, H):
    """SoCo's filter with its two fall-backs (see the top), in whole numbers: a box on a limit is in.

    boxes: (n, 4) int64 x0, y0, x1, y1 in an image of W x H pixels. Returns (m, 4), those kept, and a position in RULES."""
    w, h = (boxes[:, 2:] - boxes[:, :2]).T
    short, long = np.minimum(w, h), np.maximum(w, h)
    side = (short >= SIDE) | (short * SHARE >= min(W, H))  # DEVIATION: D1
    ratio = long <= RATIO * short
    size = (w * h * 100**2 >= SMALLEST**2 * W * H) & (w * h * 100**2 <= LARGEST**2 * W * H)
    for rule, kept in enumerate((side & ratio & size, ratio, side)):
        if kept.any():
            return boxes[kept], rule
    return boxes[:0], NOTHING


def boxes_of(item, strategy):
    """What `images[index]` returned -> boxes (n, 4), rule, (width, height). The workers do this."""
    image, passed = item
    if passed:
        return np.zeros((0, 4), np.int64), UNREADABLE, (0, 0)
    return *keep(search(image, strategy), *image.size), image.size


def search_from(first, images, strategy, workers, stop):
    """Yield `boxes_of` the images from number `first` on, boxes as int32 tensors, until the end or a signal."""
    rest, job = range(first, len(images)), functools.partial(boxes_of, strategy=strategy)
    # Results come in order: while one image is slow, each worker goes on by up to 4 others.
    options = {"prefetch_factor": 4, "worker_init_fn": data.detach_worker} if workers else {}
    loader = DataLoader(images, batch_size=None, sampler=rest, collate_fn=job, num_workers=workers, **options)
    for index, (boxes, rule, size) in enumerate(pictures.progress(loader, len(images), first), first):
        if rule == UNREADABLE:
            if not os.path.lexists(os.path.join(images.root, images.name(index))):
                raise UserError(f"{images.name(index)} is gone from {images.root}: bring it back and start again")
            print(f"unreadable image, stored without boxes: {images.name(index)!r}", flush=True)
        yield torch.from_numpy(boxes).int(), rule, size
        if stop():
            return


def make(images, folder, strategy="single", workers=0, stop=lambda: False):
    """Make a folder of proposals, or what is left of it. Returns Proposals, or None if it was stopped.

    images: of `images.open_images`. strategy: of STRATEGIES. workers: processes, 0: this one. stop: function, called
    after each image. Errors: UserError, no OpenCV; other settings or files there; an image is gone; no space."""
    folder, found = Path(folder), []
    settings = {"fingerprint": images.fingerprint(), "strategy": strategy, "filter": FILTER}
    finished = os.path.exists(folder / "meta.json")
    if not finished:
        settings["versions"] = f"opencv {opencv().__version__}, pillow {PIL.__version__}, numpy {np.__version__}"
    old = Proposals(folder).meta if finished else settings
    with contextlib.suppress(UserError):  # of the first part that is not there or cannot be read
        while not finished:
            old, part = weights.load_checkpoint_file(folder / f"part-{len(found):06}.pth")
            found += part
    changed = [f"{name} {old.get(name)!r} -> {new!r}" for name, new in settings.items() if old.get(name) != new]
    if changed:
        raise UserError(f"{folder}: made with other settings ({'; '.join(changed)}): delete it or give another folder")
    if finished:
        return Proposals(folder)

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}: give a new folder") from None
    if any(folder.iterdir()) and not any(folder.glob("part-*")):
        raise UserError(f"{folder}: holds other files: give a new folder")
    print(f"proposals: {settings['fingerprint']}; {strategy}; {len(found)} done; {workers} workers", flush=True)
    results = search_from(len(found), images, strategy, workers, stop)
    while part := list(itertools.islice(results, PART)):
        weights.save_atomically((settings, part), folder / f"part-{len(found):06}.pth")
        found += part
    if len(found) < len(images):
        return None

    boxes, rules, sizes = zip(*found, strict=True)
    arrays = {"boxes": torch.cat(boxes).numpy(), "offsets": np.cumsum([0, *map(len, boxes)])}
    arrays |= {"rules": np.array(rules, np.uint8), "sizes": np.array(sizes, np.int32)}
    arrays["names"] = np.array([os.fsencode(images.name(i)) for i in range(len(images))])
    for name, array in arrays.items():
        np.save(buffer := io.BytesIO(), array)
        weights.write_atomically(folder / f"{name}.npy", [buffer.getbuffer()])
    meta = settings | {name: array.shape for name, array in arrays.items()}
    weights.write_atomically(folder / "meta.json", [json.dumps(meta, indent=1).encode()])
    for path in folder.glob("part-*"):
        path.unlink()
    return Proposals(folder)


class Proposals:
    """A finished folder: self[index] is (n, 4) int32, the boxes of an image. Its files are the attributes; the memory of
    arrays is shared by all processes. Errors: UserError, not finished, or a file is missing or damaged."""

    def __init__(self, folder):
        self.folder = Path(folder)
        path = self.folder / "meta.json"
        try:
            self.meta = json.loads(path.read_bytes())
            for name in ("boxes", "offsets", "rules", "sizes", "names"):
                path = self.folder / f"{name}.npy"
                array = np.load(path, mmap_mode="r")
                if [*array.shape] != self.meta[name]:
                    raise ValueError(f"shape {array.shape}, not {self.meta[name]}")
                setattr(self, name, array)
        except (OSError, ValueError, EOFError, KeyError, TypeError) as error:
            remedy = "make it with python -m tools.proposals (if it is damaged, delete it first)"
            raise UserError(f"{path}: {getattr(error, 'strerror', None) or error}: {remedy}") from None

    def __reduce__(self):  # workers that are not forked open the arrays instead of copying them
        return Proposals, (self.folder,)

    def __len__(self):
        return len(self.sizes)

    def __getitem__(self, index):
        return np.array(self.boxes[self.offsets[index] : self.offsets[index + 1]])

    def check(self, images):
        """rows, (len(images),) int64: images[i] has the boxes self[rows[i]]. More images may be here than those. Errors:
        UserError, one is missing, the scenes are others, or a picture has another size (eight are looked at)."""
        own, wanted = self.meta["fingerprint"], images.fingerprint()
        remedy = "make proposals of these with python -m tools.proposals"
        places = {name: i for i, name in enumerate(self.names.tolist())}
        rows = np.array([places.get(os.fsencode(images.name(i)), -1) for i in range(len(images))])
        if rows.min() < 0 or (images.held_out and own != wanted):
            lacking = f"lacks some of {wanted}, the first is {images.name(rows.argmin())}"
            raise UserError(f"{self.folder}: made for {own}; {lacking}: {remedy}")
        for i in np.linspace(0, len(images) - 1, 8).astype(int):
            (image, passed), size = images[i], tuple(self.sizes[rows[i]].tolist())
            if not passed and any(size) and image.size != size:
                raise UserError(f"{self.folder}: made for another {images.name(i)}, of {size} pixels: {remedy}")
        return rows


class WithProposals:
    """Images and their boxes: self[index] is (image, (n, 4) fp32 boxes in its pixels), unreadable images passed over.
    Errors: see Proposals.check."""

    def __init__(self, images, proposals):
        self.images, self.proposals, self.rows = images, proposals, proposals.check(images)
        self.held_out, self.name = images.held_out, images.name
        self.order = torch.randperm(len(images), generator=common.generator("probe"))  # images that are measured

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image, passed = self.images[index]
        boxes = self.proposals[self.rows[(index + passed) % len(self)]]
        return (image, torch.from_numpy(boxes).float()), passed

    def probe(self, index):
        """Image `index` of those that are measured, and its objects: a held-out scene's true boxes, else proposals."""
        if not self.held_out:
            return self[int(self.order[index % len(self)])][0]
        scene = self.images.scene(self.images.count + index)
        return PIL.Image.fromarray(scene["image"]), torch.from_numpy(scene["boxes"])

    def fingerprint(self):
        """A name for these images and boxes: a resumed run must see the same ones."""
        return f"{self.images.fingerprint()}; {len(self.proposals.boxes)} boxes, {self.proposals.meta['strategy']}"


def attach(run, folder):
    """The images of a Run with their proposals. Those of built-in scenes are made first if `folder` is None."""
    if folder is None:
        folder = run.path(f"scenes-{run.images.count}-{run.images.size}-{run.images.seed}.proposals")
        made = run.rank > 0 or make(run.images, folder, workers=run.args.workers, stop=lambda: run.signalled)
        if sum(agree(int(not made))):
            print0("stopped by a signal; the same command continues")
            raise SystemExit
    return WithProposals(run.images, Proposals(folder))
