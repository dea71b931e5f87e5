# SPDX-License-Identifier: MIT
"""Selective-search boxes of a data set: find them, keep them in a folder of numpy files, attach them to images.

Uijlings et al., "Selective Search for Object Recognition", IJCV 2013, as OpenCV has it. A box is kept as in SoCo (Wei
et al., NeurIPS 2021): if all three rules hold; if that leaves none, by the ratio alone; then by the side alone.
    side: w >= 32 and h >= 32 pixels; ratio: 1/3 <= w/h <= 3; size: 0.3 <= sqrt(w h) / sqrt(W H) <= 0.8

DEVIATION: D1. The search is OpenCV's instead of SoCo's, which lists many boxes twice; `single` has the settings of
SoCo's segmentation. Where a fifth of the image's short side is under 32 pixels, it takes their place, or thumbnails
would keep next to nothing. An image longer than 640 pixels, the longest side in COCO, is searched at 640.

The folder of N images, made by tools/proposals.py; np.load(FILE, mmap_mode="r") opens an array:
    boxes.npy    int32 (rows, 4)  x0, y0, x1, y1: whole pixels after EXIF rotation, right and bottom edges exclusive
    offsets.npy  int64 (N + 1,)   boxes of image i: rows offsets[i] to offsets[i + 1], sorted, none twice
    sizes.npy    int32 (N, 2)     width and height, (0, 0) where unreadable
    rules.npy    uint8 (N,)       what kept the boxes, a position in RULES
    names.npy    bytes (N,)       relative paths
    meta.json                     what the boxes depend on; written last, so a folder with it is complete
Until then part-001000.pth holds the images from number 1000 on, and so forth. The bytes are the same for any number of
workers and interruptions (on the same kind of processor, with the same versions).
"""

import contextlib
import functools
import io
import itertools
import json
import os
from pathlib import Path

import numpy as np
import PIL
import torch
from PIL import Image

import common
from common import UserError, print0
from harness import images as data
from harness import pictures, weights
from harness.run import agree

STRATEGIES = ("single", "fast")
SCALE, SIGMA = 300, 0.9  # of `single`: SoCo's graph segmentation; `fast` has OpenCV's own scales and colour spaces
SIDE, SHARE, RATIO, SMALLEST, LARGEST = 32, 5, 3, 30, 80  # pixels; short side / SHARE; w / h; percent of sqrt(W H)
LONGEST = 640
FILTER = f"side {SIDE} or 1/{SHARE}, ratio {RATIO}, size 0.{SMALLEST} to 0.{LARGEST}, searched at {LONGEST}"
RULES = ("all three rules", "the ratio alone", "the side alone", "no box left", "unreadable")
NOTHING, UNREADABLE = 3, 4
PART = 1000  # images that are saved together until all are searched

# ==== Boxes of one image ==============================================================================================


def opencv():
    """The cv2 module, set to one thread: its own would not survive the fork of a worker.

    Errors: UserError, OpenCV is not there, or without its contributed modules.
    """
    try:
        import cv2

        cv2.ximgproc.segmentation.createSelectiveSearchSegmentation  # noqa: B018
    except (ImportError, AttributeError):
        wanted = "pip install opencv-contrib-python-headless (and no other opencv package beside it)"
        raise UserError(f"selective search needs OpenCV with its contributed modules: {wanted}") from None
    cv2.setNumThreads(1)
    return cv2


def search(image, strategy):
    """All boxes that selective search finds, before any filter. OpenCV lists them in another order at each call.

    image: PIL image, RGB, W x H. strategy: of STRATEGIES. Returns (n, 4) int64 x0, y0, x1, y1 in pixels, 0 <= x0 < x1
    <= W, 0 <= y0 < y1 <= H; sorted, none twice.
    """
    W, H = image.size
    small = image
    if max(W, H) > LONGEST:  # DEVIATION: D1
        size = [max(1, round(side * LONGEST / max(W, H))) for side in (W, H)]
        small = image.resize(size, Image.Resampling.BILINEAR)
    segmentation = opencv().ximgproc.segmentation.createSelectiveSearchSegmentation()
    segmentation.setBaseImage(np.ascontiguousarray(np.asarray(small)[:, :, ::-1]))  # OpenCV's BGR
    if strategy == "fast":
        segmentation.switchToSelectiveSearchFast()
    else:
        segmentation.switchToSingleStrategy(SCALE, SIGMA)
    start, extent = np.asarray(segmentation.process(), np.int64).reshape(-1, 2, 2).transpose(1, 0, 2)  # (n, 2) each
    start, end = start * (W, H) // small.size, -(-(start + extent) * (W, H) // small.size)
    return np.unique(np.concatenate([start, end], 1), axis=0)


def keep(boxes, W, H):
    """SoCo's filter with its two fall-backs, in whole numbers: a box on a limit is in. The rules stand on top.

    boxes: (n, 4) int64 x0, y0, x1, y1. W, H: width and height of the image in pixels.
    Returns the boxes kept, (m, 4) in the order given, and which rule kept them, a position in RULES, 0 to 3.
    """
    w, h = (boxes[:, 2:] - boxes[:, :2]).T
    short, long = np.minimum(w, h), np.maximum(w, h)
    side = (short >= SIDE) | (short * SHARE >= min(W, H))  # DEVIATION: D1
    ratio = long <= RATIO * short
    size = (w * h * 100**2 >= SMALLEST**2 * W * H) & (w * h * 100**2 <= LARGEST**2 * W * H)
    for rule, kept in enumerate((side & ratio & size, ratio, side)):
        if kept.any():
            return boxes[kept], rule
    return boxes[:0], NOTHING


# ==== All images ======================================================================================================


def boxes_of(item, strategy):
    """What `images[index]` returned -> boxes (n, 4) int32, (width, height), rule. This is a worker's job."""
    image, passed = item
    if passed:
        return np.zeros((0, 4), np.int32), (0, 0), UNREADABLE
    boxes, rule = keep(search(image, strategy), *image.size)
    return boxes.astype(np.int32), image.size, rule


def search_from(first, images, strategy, workers, stop):
    """Yield `boxes_of` images `first`, `first` + 1, ..., the boxes as a tensor, until the end or a signal."""
    loader = torch.utils.data.DataLoader(
        images,
        batch_size=None,
        sampler=range(first, len(images)),
        collate_fn=functools.partial(boxes_of, strategy=strategy),  # no tensors: each would hold an open file
        num_workers=workers,
        prefetch_factor=4 if workers else None,  # results come in order: while one is slow, the others go ahead
        worker_init_fn=data.detach_worker,
    )
    for index, (boxes, size, rule) in enumerate(pictures.progress(loader, len(images), first), first):
        if rule == UNREADABLE:
            name = images.name(index)
            if not os.path.lexists(os.path.join(images.root, name)):
                raise UserError(f"{name} is gone from {images.root}: bring it back, run the same command again")
            print(f"unreadable image, stored without boxes: {name!r}", flush=True)  # not all names can be printed
        yield torch.from_numpy(boxes), size, rule
        if stop():
            return


def refuse_differences(folder, old, new):
    """Raise a UserError that names every setting in which `old` differs from `new`; return if none does."""
    changed = [f"{name} {old.get(name)!r} -> {new[name]!r}" for name in new if old.get(name) != new[name]]
    if changed:
        raise UserError(f"{folder}: made with other settings ({'; '.join(changed)}): delete it or give another folder")


def search_all(images, folder, settings, workers, stop):
    """Search the images that no part holds, then write the finished files. Returns False after a signal."""
    found, old = [], settings
    with contextlib.suppress(UserError):  # of the first part that is not there or cannot be read
        while True:
            old, part = weights.load_checkpoint_file(folder / f"part-{len(found):06}.pth")
            found += part
    refuse_differences(folder, old, settings)
    strategy, count = settings["strategy"], len(images)
    print(f"proposals: {settings['fingerprint']}; {strategy}; {len(found)} done; {workers} workers", flush=True)
    results = search_from(len(found), images, strategy, workers, stop)
    while part := list(itertools.islice(results, PART)):
        weights.save_atomically((settings, part), folder / f"part-{len(found):06}.pth")
        found += part
    if len(found) < count:
        return False
    boxes, sizes, rules = zip(*found, strict=True)
    arrays = {"boxes": torch.cat(boxes).numpy(), "offsets": np.cumsum([0, *map(len, boxes)])}
    arrays |= {"sizes": np.array(sizes, np.int32), "rules": np.array(rules, np.uint8)}
    arrays["names"] = np.array([os.fsencode(images.name(i)) for i in range(count)])
    for name, array in arrays.items():
        np.save(buffer := io.BytesIO(), array)
        weights.write_atomically(folder / f"{name}.npy", [buffer.getbuffer()])
    meta = settings | {"images": count, "boxes": len(arrays["boxes"])}
    weights.write_atomically(folder / "meta.json", [json.dumps(meta, indent=1).encode()])
    return True


def make(images, folder, strategy="single", workers=0, stop=lambda: False):
    """Make a folder of proposals, or what is left of it. Returns Proposals, or None after a signal.

    images: what `images.open_images` returned. strategy: one of STRATEGIES. workers: processes that search, 0 for this
    one. stop: function; true: stop after this image.
    Errors: UserError, no OpenCV; other settings or files there; an image is gone; no permission, no space.
    """
    folder = Path(folder)
    settings = {"fingerprint": images.fingerprint(), "strategy": strategy, "filter": FILTER}
    if not os.path.exists(folder / "meta.json"):
        versions = f"opencv {opencv().__version__}, pillow {PIL.__version__}, numpy {np.__version__}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{folder}: {error.strerror}: give a new folder") from None
        if any(folder.iterdir()) and not any(folder.glob("part-*")):
            raise UserError(f"{folder}: holds other files: give a new folder")
        if not search_all(images, folder, settings | {"versions": versions}, workers, stop):
            return None
    proposals = Proposals(folder)
    refuse_differences(folder, proposals.meta, settings)
    for path in folder.glob("part-*"):
        path.unlink()
    return proposals


# ==== The finished folder, and images with their proposals ============================================================


class Proposals:
    """The boxes of a data set, read from its folder: self[index] is (n, 4) int32, index as in `images.open_images`.

    boxes, offsets, sizes, rules, names: the arrays, in memory that all processes share. meta: content of meta.json.
    Errors: UserError, the folder is not there or not finished, or a file in it is missing or damaged.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        path = self.folder / "meta.json"
        try:
            self.meta = json.loads(path.read_bytes())
            N, rows = self.meta["images"], self.meta["boxes"]
            shapes = {"boxes": (rows, 4), "offsets": (N + 1,), "sizes": (N, 2), "rules": (N,), "names": (N,)}
            for name, shape in shapes.items():
                path = self.folder / f"{name}.npy"
                setattr(self, name, np.load(path, mmap_mode="r"))
                if getattr(self, name).shape != shape:
                    raise ValueError(f"shape {array.shape} instead of {shape}")
        except (OSError, ValueError, EOFError, KeyError, TypeError) as error:
            reason = getattr(error, "strerror", None) or error
            remedy = "python -m tools.proposals (a damaged folder, a file of an earlier version: delete it first)"
            raise UserError(f"{path}: {reason}: make it with {remedy}") from None

    def __reduce__(self):  # workers that are not forked open the arrays instead of copying them
        return Proposals, (self.folder,)

    def __len__(self):
        return len(self.sizes)

    def __getitem__(self, index):
        index = range(len(self))[index]  # IndexError where there is no such image
        return np.array(self.boxes[self.offsets[index] : self.offsets[index + 1]])

    def check(self, images):
        """Find a data set's images here. There may be more: proposals of all serve a part of them.

        Returns (len(images),) int64 rows: images[i] has the boxes self[rows[i]]. Errors: UserError, an image is missing
        here, scenes of another size, seed or count, or (seen in eight images) other pictures under the same names.
        """
        rows, remedy = np.arange(len(images)), "make proposals of these with python -m tools.proposals"
        own, wanted = self.meta["fingerprint"], images.fingerprint()
        if own != wanted:
            names = [] if isinstance(images, data.Scenes) else self.names.tolist()
            places = {name: i for i, name in enumerate(names)}
            rows = np.array([places.get(os.fsencode(images.name(i)), -1) for i in rows])
            missing = np.flatnonzero(rows < 0)
            if len(missing):
                lacks = f"{len(missing)} of {wanted}, the first is {images.name(missing[0])}"
                raise UserError(f"{self.folder}: made for {own}; lacks {lacks}: {remedy}")
        for index in np.unique(np.linspace(0, len(images) - 1, 8).astype(int)):
            image, passed = images[index]
            size = tuple(self.sizes[rows[index]].tolist())
            if not passed and any(size) and image.size != size:
                other = f"{images.name(index)} has {size} pixels there, {image.size} here"
                raise UserError(f"{self.folder}: made for other pictures, {other}: {remedy}")
        return rows


class WithProposals:
    """Images and their boxes: self[index] is (image, (n, 4) fp32 boxes in its pixels), unreadable images passed over.

    images: see images.open_images. proposals: Proposals. Errors: UserError, made for other images.
    """

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
        return Image.fromarray(scene["image"]), torch.from_numpy(scene["boxes"])

    def fingerprint(self):
        """A name for these images and boxes: a resumed run must see the same ones."""
        return f"{self.images.fingerprint()}; {len(self.proposals.boxes)} boxes, {self.proposals.meta['strategy']}"


def attach(run, folder):
    """The images of a Run with their proposals. Those of built-in scenes are made first if `folder` is None."""
    if folder is None:
        images = run.images
        folder = run.path(f"scenes-{images.count}-{images.size}-{images.seed}.proposals")
        made = run.rank > 0 or make(images, folder, workers=run.args.workers, stop=lambda: run.signalled)
        if sum(agree(int(not made))):
            print0("stopped by a signal; the same command continues")
            raise SystemExit
    return WithProposals(run.images, Proposals(folder))
