# SPDX-License-Identifier: MIT
"""Selective-search boxes of a data set: find them, keep them in a folder of numpy files, attach them to images.

Uijlings et al., "Selective Search for Object Recognition", IJCV 2013, as OpenCV has it. A box is kept as in SoCo (Wei
et al., NeurIPS 2021): if all three rules hold; if that leaves none, by the ratio alone; then by the side alone.
    side: w >= 32 and h >= 32 pixels; ratio: 1/3 <= w/h <= 3; size: 0.3 <= sqrt(w h) / sqrt(W H) <= 0.8

DEVIATION: D1. The search is OpenCV's instead of SoCo's, which lists many boxes twice; `single` has the settings of
SoCo's segmentation. Where a fifth of the image's short side is under 32 pixels, it takes their place, or thumbnails
would keep next to nothing. An image longer than 640 pixels, the longest side in COCO, is searched at 640, and its boxes
are rounded outwards.

The folder of N images, made by tools/proposals.py; np.load(FILE, mmap_mode="r") opens an array:
    boxes.npy    int32 (rows, 4)  x0, y0, x1, y1: whole pixels after EXIF rotation, right and bottom edges exclusive
    offsets.npy  int64 (N + 1,)   boxes of image i: rows offsets[i] to offsets[i + 1], sorted, none twice
    sizes.npy    int32 (N, 2)     width and height, (0, 0) where unreadable
    rules.npy    uint8 (N,)       what kept the boxes, a position in RULES
    names.txt                     a line for each image: its relative path, as bytes, with a zero for each line break
    meta.json                     what the boxes depend on; written last, so a folder with it is complete
Until then part-001000.npz holds the images from number 1000 on, and so forth. The arrays are the same bytes for any
number of workers and interruptions (on the same kind of processor, with the same versions).
"""

import io
import json
import os
import sys
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

# ==== Boxes of one image ==============================================================================================


def opencv():
    """The cv2 module with selective search in it, set to one thread: its own would not survive the fork of a worker.

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


# ==== The folder ======================================================================================================


class Proposals:
    """The boxes of a data set, read from its folder: self[index] is (n, 4) int32, index as in `images.open_images`.

    boxes, offsets, sizes, rules: the arrays, in memory that all processes share. meta: the content of meta.json.
    Errors: UserError, no such folder, not finished, or a file in it is missing or cut off.
    """

    def __init__(self, folder):
        self.folder, name = Path(folder), "meta.json"
        try:
            self.meta = json.loads((self.folder / name).read_bytes())
            N, rows, size = (self.meta[key] for key in ("images", "boxes", "bytes of names"))
            shapes = {"boxes.npy": (rows, 4), "offsets.npy": (N + 1,), "sizes.npy": (N, 2), "rules.npy": (N,)}
            for name, shape in shapes.items():
                array = np.load(self.folder / name, mmap_mode="r")
                if array.shape != shape:
                    raise ValueError(f"shape {array.shape} instead of {shape}")
                setattr(self, name.removesuffix(".npy"), array)
            name = "names.txt"
            if (self.folder / name).stat().st_size != size:
                raise ValueError(f"not {size} bytes")
        except (OSError, ValueError, EOFError, KeyError, TypeError) as error:
            reason = getattr(error, "strerror", None) or error
            remedy = "python -m tools.proposals (a damaged folder, a file of an earlier version: delete it first)"
            raise UserError(f"{self.folder / name}: {reason}: make it with {remedy}") from None

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
            lines = [] if isinstance(images, data.Scenes) else (self.folder / "names.txt").read_bytes().split(b"\n")
            places = {line: i for i, line in enumerate(lines)}
            rows = np.array([places.get(line_of(images.name(i)), -1) for i in range(len(images))])
            missing = np.flatnonzero(rows < 0)
            if len(missing):
                lacking = f"{len(missing)} of {wanted}, the first is {images.name(missing[0])}"
                raise UserError(f"{self.folder}: made for {own}; lacks {lacking}: {remedy}")
        for index in np.unique(np.linspace(0, len(images) - 1, 8).astype(int)):
            image, passed = images[index]
            size = tuple(self.sizes[rows[index]].tolist())
            if not passed and any(size) and image.size != size:
                other = f"{images.name(index)} has {size} pixels there, {image.size} here"
                raise UserError(f"{self.folder}: made for other pictures, {other}: {remedy}")
        return rows


def line_of(name):
    """The line of a path in names.txt. No path has a zero byte, so it can stand for a line break."""
    return os.fsencode(name).replace(b"\n", b"\0")


def refuse_differences(folder, old, new):
    """Raise a UserError that names every setting in which `old` differs from `new`; return if none does."""
    changed = [f"{name} {old.get(name)!r} -> {new[name]!r}" for name in new if old.get(name) != new[name]]
    if changed:
        raise UserError(f"{folder}: made with other settings ({'; '.join(changed)}): delete it or give another folder")


# ==== All images ======================================================================================================


class Search(torch.utils.data.Dataset):
    """What the workers do: the boxes, (width, height) and rule of an image."""

    def __init__(self, images, strategy):
        self.images, self.strategy = images, strategy

    def __getitem__(self, index):
        image, passed = self.images[index]
        if passed:
            return np.zeros((0, 4), np.int32), (0, 0), UNREADABLE
        boxes, rule = keep(search(image, self.strategy), *image.size)
        return boxes.astype(np.int32), image.size, rule


def save(path, function, *args, **arrays):
    """np.save or np.savez, atomically."""
    buffer = io.BytesIO()
    function(buffer, *args, **arrays)
    weights.write_atomically(path, [buffer.getbuffer()])


def save_part(folder, first, found, settings):
    """Save what Search found in images `first`, first + 1, ... Returns: the number of the next image."""
    boxes, sizes, rules = zip(*found, strict=True)
    arrays = {"boxes": np.concatenate(boxes), "counts": [len(b) for b in boxes]}
    arrays |= {"sizes": np.array(sizes, np.int32), "rules": np.array(rules, np.uint8)}
    save(folder / f"part-{first:06}.npz", np.savez, settings=json.dumps(settings), **arrays)
    return first + len(found)


def saved_parts(folder, settings):
    """What an unfinished search has saved: [{name: array}], and of how many images. Errors: UserError, other settings."""
    parts, done = [], 0
    while True:
        try:
            with np.load(folder / f"part-{done:06}.npz") as file:
                part = dict(file)
            old = json.loads(str(part["settings"]))
        except Exception:  # there is no such part, or it is damaged and its images are searched again
            return parts, done
        refuse_differences(folder, old, settings)
        parts.append(part)
        done += len(part["rules"])


def search_rest(images, folder, settings, workers, stop, part):
    """Search the images that no part has, until the end or a signal. Name unreadable ones. Returns: images done.

    Errors: UserError, an image of the list is gone, no space. What was found before any error is saved.
    """
    (_, done), found = saved_parts(folder, settings), []
    print(f"proposals: {settings['fingerprint']}; {settings['strategy']}; {done} done; {workers} workers", flush=True)
    loader = torch.utils.data.DataLoader(
        Search(images, settings["strategy"]),
        batch_size=None,
        sampler=range(done, len(images)),
        collate_fn=tuple,  # arrays stay arrays: each tensor of a worker would hold an open file
        num_workers=workers,
        prefetch_factor=4 if workers else None,  # results come in order: while one is slow, the others go ahead
        worker_init_fn=data.detach_worker,
    )
    try:
        for boxes, size, rule in pictures.progress(loader, len(images), done):
            name = images.name(done + len(found))
            if rule == UNREADABLE:
                if not os.path.lexists(os.path.join(images.root, name)):
                    raise UserError(f"{name} is gone from {images.root}: bring it back, run the same command again")
                print(f"unreadable image, stored without boxes: {name!r}", flush=True)  # not all names can be printed
            found.append((boxes, size, rule))
            if len(found) == part:
                done, found = save_part(folder, done, found, settings), []
            if stop():
                break
    finally:
        if found:
            done = save_part(folder, done, found, settings)
    return done


def finish(images, folder, settings):
    """Make the finished files from the parts."""
    parts, _ = saved_parts(folder, settings)
    arrays = {name: np.concatenate([part[name] for part in parts]) for name in ("boxes", "sizes", "rules")}
    arrays["offsets"] = np.cumsum(np.concatenate([[0], *(part["counts"] for part in parts)]))
    for name, array in arrays.items():
        save(folder / f"{name}.npy", np.save, array)
    names = b"".join(line_of(images.name(i)) + b"\n" for i in range(len(images)))
    weights.write_atomically(folder / "names.txt", [names])
    meta = settings | {"images": len(images), "boxes": len(arrays["boxes"]), "bytes of names": len(names)}
    weights.write_atomically(folder / "meta.json", [json.dumps(meta, indent=1).encode()])


def make(images, folder, strategy="single", workers=0, stop=lambda: False, part=1000):
    """Make a folder of proposals, or what is left of it. Returns Proposals, or None after a signal.

    images: what `images.open_images` returned. strategy: one of STRATEGIES. workers: processes that search, 0 for this
    one. stop: function; true: stop after this image. part: images that are saved together.
    Errors: UserError, no OpenCV; other images, settings or files there; no permission, no space; see `search_rest`.
    """
    folder = Path(folder)
    settings = {"fingerprint": images.fingerprint(), "strategy": strategy, "filter": FILTER}
    if not os.path.exists(folder / "meta.json"):
        versions = f"opencv {opencv().__version__}, pillow {PIL.__version__}, numpy {np.__version__}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            names = os.listdir(folder)
        except OSError as error:
            remedy = "give a folder that can be written (a file of an earlier version: delete it first)"
            raise UserError(f"{folder}: {error.strerror}: {remedy}") from None
        if names and not any(name.startswith("part-") for name in names):
            raise UserError(f"{folder}: holds other files ({names[0]}): give a new folder")
        unfinished = settings | {"versions": versions}
        if search_rest(images, folder, unfinished, workers, stop, part) < len(images):
            return None
        finish(images, folder, unfinished)
    proposals = Proposals(folder)
    refuse_differences(folder, proposals.meta, settings)
    for path in folder.glob("part-*"):
        path.unlink()
    return proposals


# ==== Images with their proposals =====================================================================================


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
    """The images of a Run with their proposals. Those of built-in scenes are made first if `folder` is None. A signal
    then ends the process, and the same command continues."""
    if folder is None:
        images = run.images
        folder = run.path(f"scenes-{images.count}-{images.size}-{images.seed}.proposals")
        made = run.rank > 0 or make(images, folder, workers=run.args.workers, stop=lambda: run.signalled)
        if sum(agree(int(not made))):
            print0("stopped by a signal; the same command continues")
            sys.exit()
    return WithProposals(run.images, Proposals(folder))
