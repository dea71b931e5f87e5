# SPDX-License-Identifier: MIT
"""Selective-search boxes of a data set: find them, keep them in one file, read them, attach them to images.

Uijlings et al., "Selective Search for Object Recognition", IJCV 2013, as OpenCV has it. Which boxes are kept follows
SoCo (Wei et al., NeurIPS 2021). The command line is tools/proposals.py.

    proposals = Proposals("coco.proposals")         # opens at once, whatever its size: it reads a header only
    proposals[7]                                    # (n, 4) int32: x0 y0 x1 y1 in image 7 of the sorted list
    proposals[proposals.index_of("000000000025.jpg")]

Boxes are whole pixels of the image as `harness.images.read_image` turns it (EXIF rotation applied). Right and bottom
edges are exclusive. Boxes are sorted, none twice. OpenCV lists the same boxes in another order at each call. Because
they are sorted here, two searches write the same bytes, whatever the number of workers (on the same kind of processor,
with the same versions).

A box is kept if all three hold; where that leaves none, by the second rule alone; where that leaves none, by the first:
    1. side: w >= 32 and h >= 32 pixels
    2. ratio: 1/3 <= w/h <= 3
    3. size: 0.3 <= sqrt(w h) / sqrt(W H) <= 0.8

DEVIATION: D1. SoCo's search is a Python program of its own that lists many boxes twice; ours is OpenCV's. `single` has
the settings of SoCo's segmentation. In an image whose short side is under 160 pixels a fifth of that side takes the
place of 32 pixels, or thumbnails would keep next to nothing. An image longer than 640 pixels (the longest side in
COCO) is searched at 640, its boxes rounded outwards.

A killed run goes on from FILE.partial when started again, and ends with the same bytes as one never interrupted. FILE
has the layout of safetensors (a length, a JSON header, raw little-endian arrays), so that other programs can read it:
    offsets       int64 (N + 1,)   boxes of image i: rows offsets[i] to offsets[i + 1]
    name_offsets  int64 (N + 1,)   the same for `names`
    order         int32 (N,)       image numbers in the order of their names' bytes, to find a name by bisection
    sizes         int32 (N, 2)     width and height, (0, 0) where unreadable
    boxes         uint16 (rows, 4) x0, y0, x1, y1 (int32 if a side is over 65535 pixels)
    rules         uint8 (N,)       what kept the boxes, a position in RULES
    names         uint8            relative paths, one after the other
"""

import bisect
import contextlib
import errno
import io
import json
import math
import os
import struct
import sys
import zlib

import numpy as np
import PIL
import torch
from PIL import Image

import common
from common import UserError, print0
from harness import images as data
from harness import pictures, weights
from harness.run import agree

FORMAT = "dense-ssl proposals 1"
STRATEGIES = ("single", "fast")
SCALE, SIGMA = 300, 0.9  # of `single`: SoCo's graph segmentation; `fast` has OpenCV's own scales and colour spaces
SIDE, SHARE, RATIO, SMALLEST, LARGEST = 32, 5, 3, 30, 80  # pixels; short side / SHARE; w / h; percent of sqrt(W H)
LONGEST = 640
FILTER = f"side {SIDE} or 1/{SHARE}, ratio {RATIO}, size 0.{SMALLEST} to 0.{LARGEST}, searched at {LONGEST}"
RULES = ("all three rules", "the ratio alone", "the side alone", "no box left", "unreadable")
NOTHING, UNREADABLE = 3, 4
# ======================================================================================================================
# Boxes of one image
# ======================================================================================================================


def opencv():
    """The cv2 module with selective search in it, set to one thread: its own would not survive the fork of a worker.

    Errors:
        UserError: OpenCV is not there, or without its contributed modules.
    """
    try:
        import cv2

        cv2.ximgproc.segmentation.createSelectiveSearchSegmentation  # noqa: B018
    except (ImportError, AttributeError):
        raise UserError(
            "selective search needs OpenCV with its contributed modules: pip install opencv-contrib-python-headless "
            "(and no other opencv package beside it)"
        ) from None
    cv2.setNumThreads(1)
    return cv2


def search(image, strategy):
    """All boxes that selective search finds, before any filter.

    Args:
        image: PIL image, RGB, W x H. strategy: one of STRATEGIES.
    Returns:
        (n, 4) int64: x0, y0, x1, y1 in pixels, 0 <= x0 < x1 <= W, 0 <= y0 < y1 <= H; sorted, none twice.
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

    Args:
        boxes: (n, 4) int64 x0, y0, x1, y1. W, H: width and height of the image in pixels.
    Returns:
        ((m, 4) the boxes kept, in the order given; which rule kept them: a position in RULES, 0 to 3)
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


# ======================================================================================================================
# The finished file
# ======================================================================================================================

DTYPES = {"I64": "<i8", "I32": "<i4", "U16": "<u2", "U8": "|u1"}  # safetensors' names


def write_file(path, arrays, boxes, metadata):
    """Write a safetensors file atomically: to a temporary file beside it, synced and renamed.

    Args:
        arrays: {name: (type of DTYPES, shape, array)}, widest type first, so that all lie aligned. The array of boxes is
        None: their bytes come from the iterable `boxes`, image by image. metadata: {str: str}.
    Errors:
        UserError: no space; OSError: no permission. The temporary file is removed.
    """
    header, end = {"__metadata__": metadata}, 0
    for name, (kind, shape, _) in arrays.items():
        start, end = end, end + math.prod(shape) * np.dtype(DTYPES[kind]).itemsize
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for kind, _, array in arrays.values():
                file.writelines(boxes if array is None else [np.ascontiguousarray(array, DTYPES[kind])])
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        if weights.is_disk_full(error):
            raise UserError(weights.disk_full_line(path)) from None
        raise


class Proposals:
    """The boxes of a data set, read from a file that this tool made. Works without OpenCV.

    `len(proposals)` is the number of images, `proposals[index]` the (n, 4) int32 boxes x0, y0, x1, y1 of one (n may be
    0), in pixels of the whole image, index as in `images.open_images`. Where ImageFolder passes over unreadable
    files, index + passed is the image that it returns.

    Opening maps the file into memory and reads its header alone; copies in other processes open it again.

    Attributes:
        fingerprint: of the list of images, as its `fingerprint()` gave it. strategy: "fast" or "single".
        metadata: these two and all else that the boxes depend on, {str: str}.
        sizes: (N, 2) int32 width, height, (0, 0) where unreadable. rules: (N,) uint8, positions in RULES.
    Errors:
        UserError: no such file, not such a file, or cut off.
    """

    def __init__(self, path):
        self.path = path
        try:
            with open(path, "rb") as file:
                total = os.fstat(file.fileno()).st_size
                length = int.from_bytes(file.read(8), "little")
                text = file.read(min(length, 1 << 16))
        except FileNotFoundError:
            raise UserError(f"{path}: no such file: make it with python -m tools.proposals") from None
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}): give a file of proposals") from None
        if not text.startswith(b'{"__metadata__":{"format":"%b"' % FORMAT.encode()):
            raise UserError(
                f"{path}: not a file of proposals: give another, or make one with python -m tools.proposals"
            )
        header = json.loads(text) if len(text) == length else {}
        wanted = 8 + length + max((entry["data_offsets"][1] for entry in list(header.values())[1:]), default=1)
        if total != wanted:
            raise UserError(
                f"{path}: cut off or damaged ({total} bytes of {wanted}): copy it again, or delete and remake it"
            )
        self.metadata = header.pop("__metadata__")
        self.fingerprint, self.strategy = self.metadata["fingerprint"], self.metadata["strategy"]
        data = np.memmap(path, np.uint8, "r", 8 + length)
        for name, entry in header.items():  # offsets, name_offsets, order, sizes, boxes, rules, names
            part = data[slice(*entry["data_offsets"])].view(DTYPES[entry["dtype"]])
            setattr(self, name, part.reshape(entry["shape"]).view(np.ndarray))

    def __reduce__(self):
        return Proposals, (self.path,)

    def __len__(self):
        return len(self.sizes)

    def __getitem__(self, index):
        index = range(len(self))[index]  # IndexError where there is no such image
        return self.boxes[self.offsets[index] : self.offsets[index + 1]].astype(np.int32)

    def name(self, index):
        """The relative path of an image, or `scene 7`."""
        index = range(len(self))[index]
        return os.fsdecode(self.names[self.name_offsets[index] : self.name_offsets[index + 1]].tobytes())

    def index_of(self, name):
        """The index of a relative path. Errors: KeyError, there is no such image."""
        wanted = os.fsencode(name)
        rank = bisect.bisect_left(self.order, wanted, key=lambda index: os.fsencode(self.name(index)))
        if rank == len(self) or self.name(self.order[rank]) != name:
            raise KeyError(name)
        return int(self.order[rank])

    def check(self, images):
        """Find a data set's images in this file. The file may hold more: one made for all serves a part of them.

        Args:
            images: what `images.open_images` returned.
        Returns:
            (len(images),) int64 rows: the boxes of images[i] are self[rows[i]].
        Errors:
            UserError: an image is missing here, scenes of another size, seed or count, or (seen in eight images) other
            pictures under the same names.
        """
        rows = np.arange(len(images))
        if self.fingerprint != images.fingerprint():
            own = {} if isinstance(images, data.Scenes) else {self.name(i): i for i in range(len(self))}
            rows = np.array([own.get(images.name(i), -1) for i in range(len(images))])
            lacking = np.flatnonzero(rows < 0)
            if len(lacking):
                raise UserError(
                    f"{self.path}: made for {self.fingerprint}; lacks {len(lacking)} of {images.fingerprint()}, the first "
                    f"is {images.name(lacking[0])}: make a file for these with python -m tools.proposals"
                )
        for index in np.unique(np.linspace(0, len(images) - 1, 8).astype(int)):
            image, passed = images[index]
            width, height = self.sizes[rows[index]].tolist()
            if not passed and width and image.size != (width, height):
                raise UserError(
                    f"{self.path}: made for other pictures: there {images.name(index)} is {width} x {height}, here it is "
                    f"{image.width} x {image.height}: make a file for these with python -m tools.proposals"
                )
        return rows


# ======================================================================================================================
# The unfinished file
# ======================================================================================================================

HEAD = struct.Struct("<IIIIB")  # checksum of all that follows, number of boxes, W, H, rule


def pack(boxes, W, H, rule):
    """One image as bytes, to be appended to the unfinished file."""
    data = HEAD.pack(0, len(boxes), W, H, rule)[4:] + boxes.astype("<i4").tobytes()
    return struct.pack("<I", zlib.crc32(data)) + data


class Partial:
    """`FILE.partial`: a line of JSON with the settings, then a record (see `pack`) for each image done, in their order.

    It only grows: what a kill can leave is a torn last record, which is cut off on opening. One process at a time may
    hold it.

    Args:
        path: the file, made if need be. settings: {str: str}; a file with others is refused.
    Attributes:
        heads: list of (number of boxes, W, H, rule) of the images done.
    Errors:
        UserError: held by another run, made with other settings, no such file at all; OSError: no permission.
    """

    def __init__(self, path, settings):
        self.path, self.heads, line = path, [], json.dumps(settings).encode() + b"\n"
        self.file = open(path, "a+b", buffering=0)  # noqa: SIM115  what a full disk refused shall not be tried again
        self.lock()
        self.file.seek(0)
        reader = io.BufferedReader(self.file)
        found, self.start = reader.readline(1 << 16), len(line)
        if found != line:
            if not line.startswith(found):
                self.refuse(found, settings)
            self.file.truncate(0)  # empty, or torn before the first image
            self.write(line)
            reader.seek(self.start)
        end = self.start
        while record := self.read(reader):
            self.heads.append(HEAD.unpack_from(record)[1:])
            end += len(record)
        reader.detach()  # a second handle would do, but closing it would end the lock
        self.file.truncate(end)

    def lock(self):
        try:
            import fcntl

            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:
            pass  # not on Windows
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):  # others: a file system without locks
                raise UserError(f"{self.path}: another run is writing it: wait for its end or stop it") from None

    def refuse(self, found, settings):
        with contextlib.suppress(ValueError):
            old = json.loads(found)
            if isinstance(old, dict) and old.get("format") == FORMAT:
                refuse_differences(self.path, old, settings)
        raise UserError(f"{self.path}: not written by this tool: move it away or give another --out")

    def read(self, reader):
        """The next record as bytes; b"" at the end or where it is torn."""
        head = reader.read(HEAD.size)
        if len(head) < HEAD.size:
            return b""
        checksum, count, *_ = HEAD.unpack(head)
        record = head + reader.read(16 * min(count, 1 << 24))
        return record if zlib.crc32(record[4:]) == checksum else b""

    def append(self, record):
        """Write what `pack` returned. Errors: UserError, no space."""
        self.write(record)
        self.heads.append(HEAD.unpack_from(record)[1:])

    def write(self, data):
        try:
            while data:
                data = data[self.file.write(data) :]
        except OSError as error:
            if weights.is_disk_full(error):
                raise UserError(weights.disk_full_line(self.path)) from None
            raise

    def boxes(self, dtype):
        """The boxes of one image after the other, as bytes."""
        self.file.seek(self.start)
        reader = io.BufferedReader(self.file)
        for _ in self.heads:
            yield np.frombuffer(self.read(reader), "<i4", offset=HEAD.size).astype(dtype).tobytes()
        reader.detach()


def refuse_differences(path, old, new):
    """Raise a UserError that names every setting in which `old` differs from `new`; return if none does."""
    changed = [f"{name} {old.get(name)!r} -> {new[name]!r}" for name in new if old.get(name) != new[name]]
    if changed:
        raise UserError(f"{path}: made with other settings ({'; '.join(changed)}): delete it or give another --out")


# ======================================================================================================================
# All images
# ======================================================================================================================


class Search(torch.utils.data.Dataset):
    """What the workers do: item k is the record of image first + k."""

    def __init__(self, images, first, strategy):
        self.images, self.first, self.strategy = images, first, strategy

    def __len__(self):
        return len(self.images) - self.first

    def __getitem__(self, k):
        image, passed = self.images[self.first + k]
        if passed:
            return pack(np.zeros((0, 4)), 0, 0, UNREADABLE)
        boxes, rule = keep(search(image, self.strategy), *image.size)
        return pack(boxes, *image.size, rule)


def search_all(images, partial, strategy, workers, stop):
    """Search all images that are not done and append their records, until the end or a signal.

    Unreadable images are named, and stored without boxes.

    Errors:
        UserError: a worker was killed; an image of the list is gone.
    """
    first, total = len(partial.heads), len(images)
    loader = torch.utils.data.DataLoader(
        Search(images, first, strategy),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=4 if workers else None,  # records come in order: while one is slow, the others go ahead
        worker_init_fn=data.detach_worker,
    )
    try:
        with contextlib.closing(pictures.progress(loader, total, first)) as records:
            for record in records:
                index = len(partial.heads)
                if HEAD.unpack_from(record)[-1] == UNREADABLE:
                    if not os.path.lexists(os.path.join(images.root, images.name(index))):
                        raise UserError(
                            f"{images.name(index)} is no longer in {images.root}: bring the folder back as it was, and the "
                            f"same command goes on ({index} of {total} images are saved)"
                        )
                    print(f"unreadable image, stored without boxes: {images.name(index)}", flush=True)
                partial.append(record)
                if stop is not None and stop():
                    return
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise UserError(
            f"a worker was killed, out of memory perhaps: the same command goes on, with fewer --workers if need be "
            f"({len(partial.heads)} of {total} images are saved)"
        ) from None


def finish(path, images, partial, settings):
    """Write the finished file from a complete unfinished one."""
    N = len(images)
    names = [os.fsencode(images.name(i)) for i in range(N)]
    counts, widths, heights, rules = np.array(partial.heads).T
    kind = "U16" if max(widths.max(), heights.max()) <= 65535 else "I32"
    arrays = {
        "offsets": ("I64", [N + 1], np.cumsum([0, *counts])),
        "name_offsets": ("I64", [N + 1], np.cumsum([0, *map(len, names)])),
        "order": ("I32", [N], sorted(range(N), key=names.__getitem__)),
        "sizes": ("I32", [N, 2], np.stack([widths, heights], 1)),
        "boxes": (kind, [int(counts.sum()), 4], None),
        "rules": ("U8", [N], rules),
        "names": ("U8", [sum(map(len, names))], np.frombuffer(b"".join(names), np.uint8)),
    }
    write_file(path, arrays, partial.boxes(DTYPES[kind]), settings)


def make(images, out, strategy="single", workers=0, stop=None):
    """Make the file of proposals if it is not there yet, or make the rest of it: what the command does.

    Args:
        images: what `images.open_images` returned. out: the file. strategy: one of STRATEGIES.
        workers: processes that search, 0 for this one. stop: function; true: stop after this image.
    Returns:
        Proposals; None after a signal, when FILE.partial holds what is done.
    Errors:
        UserError: no OpenCV; a file of other data or settings; no permission, no space; see `search_all`.
    """
    settings = {"format": FORMAT, "fingerprint": images.fingerprint(), "strategy": strategy, "filter": FILTER}
    if os.path.exists(out):
        proposals = Proposals(out)
        refuse_differences(out, proposals.metadata, settings)
        with contextlib.suppress(FileNotFoundError):
            os.remove(f"{out}.partial")  # left by a kill after the last byte
        return proposals
    settings["versions"] = f"opencv {opencv().__version__}, pillow {PIL.__version__}, numpy {np.__version__}"
    try:
        os.makedirs(os.path.dirname(out) or ".", exist_ok=True)
        partial = Partial(f"{out}.partial", settings)
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}: give a file that can be written") from None
    with contextlib.closing(partial.file):
        done = f", {len(partial.heads)} are done" if partial.heads else ""
        print(f"proposals: {images.fingerprint()}{done}; {strategy}; {workers} workers", flush=True)
        search_all(images, partial, strategy, workers, stop)
        if len(partial.heads) < len(images):
            return None
        finish(out, images, partial, settings)
    os.remove(partial.path)
    return Proposals(out)


# ======================================================================================================================
# Images with their proposals
# ======================================================================================================================


class WithProposals:
    """Images and their boxes: self[index] is (image, (n, 4) fp32 boxes in its pixels) and the unreadable images passed
    over, otherwise as the images of harness.images.

    Args:
        images: see images.open_images. proposals: Proposals.
    Errors:
        UserError: boxes are missing, or were made for other images.
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
        """Image `index` of those that are measured, and its objects: the true boxes of a held-out scene, else its
        proposals."""
        if not self.held_out:
            return self[int(self.order[index % len(self)])][0]
        scene = self.images.scene(self.images.count + index)
        return Image.fromarray(scene["image"]), torch.from_numpy(scene["boxes"])

    def fingerprint(self):
        """A name for these images and boxes: a resumed run must see the same ones."""
        return f"{self.images.fingerprint()}; {len(self.proposals.boxes)} boxes, {self.proposals.strategy}"


def attach(run, path):
    """The images of a Run with their proposals. Those of built-in scenes are made first if `path` is None.

    Errors:
        UserError: see make. SystemExit(0): after a signal; the same command continues.
    """
    if path is None:
        images = run.images
        path = run.path(f"scenes-{images.count}-{images.size}-{images.seed}.proposals")
        made = run.rank > 0 or make(images, path, workers=run.args.workers, stop=lambda: run.signalled)
        if sum(agree(int(not made))):
            print0("stopped by a signal; the same command continues")
            sys.exit()
    return WithProposals(run.images, Proposals(path))
