# SPDX-License-Identifier: MIT
"""From a folder to batches: one decoder for every kind of image file, keyed random draws, unreadable files.

    images = open_images("photos", size=224, seed=0)      a folder, or "scenes:4096", the built-in scenes
    image, passed = images[7]                             PIL RGB; unreadable files passed over to get one

Every draw depends on (seed, epoch, index) alone, so results are the same for any number of workers.
"""

import hashlib
import os
import warnings

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageOps

import common
from common import UserError, print0

EXTENSIONS = set(".jpg .jpeg .jpe .jfif .png .bmp .webp .tif .tiff .gif .ppm .pgm .jp2 .avif".split())
TRIES = 20  # neighbours to try in place of an unreadable image


def read_image(path):
    """Decode an image file to RGB: EXIF rotation applied, grey, 16-bit, palette, alpha and CMYK converted.

    Transparent pixels come out white. Of an animation the first frame is taken.

    Returns:
        PIL.Image.Image, mode RGB.
    Errors:
        OSError (with its many relatives of Pillow's decoders turned into it): unreadable, truncated, or above
        Pillow's limit of 179 million pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of large images and odd metadata; both decode well
            with Image.open(path) as image:
                image.load()
                image = ImageOps.exif_transpose(image)
                if image.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion to RGB would clip it at 255
                    image = Image.fromarray((np.asarray(image, np.int64).clip(0, 65535) >> 8).astype(np.uint8))
                if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
                    image = image.convert("RGBA")
                    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
                return image.convert("RGB")
    except Exception as error:  # Pillow raises OSError, ValueError, SyntaxError, struct.error, ... for broken files
        raise OSError(f"{type(error).__name__}: {error}") from error


def readable(read, index, count):
    """read(index), or what the next index (modulo `count`) gives whose image can be read.

    Returns:
        (what `read` gave, indices passed over); (None, TRIES) if all of TRIES raised OSError.
    """
    for passed in range(TRIES):
        try:
            return read((index + passed) % count), passed
        except OSError:
            continue
    return None, TRIES


def list_images(root, flag="--data"):
    """Relative paths of all images below a folder, sorted; hidden files are passed over, links are followed once.

    Errors:
        UserError: not a folder, a folder that may not be read, or no image in it.
    """

    def refuse(error):
        raise UserError(f"cannot read the folder {error.filename}: {error.strerror}")

    if not os.path.isdir(root):
        raise UserError(f"{flag} {root}: no such folder (give a folder of images)")
    found, seen = [], set()
    for folder, subfolders, files in os.walk(root, onerror=refuse, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:  # a link back to a folder above would never end
            subfolders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        found += [
            os.path.relpath(os.path.join(folder, name), root)
            for name in files
            if os.path.splitext(name)[1].lower() in EXTENSIONS and not name.startswith(".")
        ]
    if not found:
        raise UserError(f"{flag} {root}: no images in it or below (looked for {' '.join(sorted(EXTENSIONS))})")
    return sorted(found)


class ImageFolder:
    """All images below a folder (its `train/` if there is one), with or without class folders, labels unused.

    `self[index]` is an RGB image and the number of unreadable neighbours passed over to get one: 0 nearly always; n
    means that files index .. index + n - 1 (modulo the length) could not be read.
    """

    held_out = False

    def __init__(self, root):
        train = os.path.join(root, "train")
        self.root = train if os.path.isdir(train) else root
        # One array of bytes: a list of a million strings would be copied into every worker as its counters change.
        self.paths = np.array([os.fsencode(path) for path in list_images(self.root)])

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        image, passed = readable(lambda i: read_image(os.path.join(self.root, self.name(i))), index, len(self))
        return image or Image.new("RGB", (8, 8)), passed

    def name(self, index):
        return os.fsdecode(bytes(self.paths[index]))

    def probe(self, index):
        """Image `index` of those that pictures and the closing measurement are made with."""
        return self[common.key_seed("probe", index) % len(self)][0]

    def fingerprint(self):
        """A name for this list of files, whatever folder it lies in: a resumed run must see the same one."""
        return f"{len(self)} images, sha256 {hashlib.sha256(b'|'.join(self.paths.tolist())).hexdigest()[:16]}"


class Scenes:
    """The built-in procedural scenes, in place of a folder."""

    held_out = True

    def __init__(self, count, size, seed):
        self.count, self.size, self.seed = count, size, seed

    def __len__(self):
        return self.count

    def scene(self, index):
        """The dict that harness.scenes.make_scene draws: image, boxes and more."""
        from harness.scenes import make_scene

        return make_scene(self.seed, index, self.size)

    def __getitem__(self, index):
        return Image.fromarray(self.scene(index)["image"]), 0

    def name(self, index):
        return f"scene {index}"

    def probe(self, index):
        """Scene `index` of those that no training step sees."""
        return self[self.count + index][0]

    def fingerprint(self):
        return f"{self.count} scenes of {self.size} pixels, seed {self.seed}"


def open_images(data, size, seed):
    """The images that `--data` names: 'scenes' or 'scenes:COUNT' (procedural), else a folder ('./scenes' is one)."""
    word, _, count = data.partition(":")
    if word == "scenes":
        if count and not (count.isdecimal() and int(count) > 0):
            raise UserError(f"--data {data}: write scenes:4096 for 4096 scenes")
        return Scenes(int(count or 4096), size, seed)
    return ImageFolder(data)


class Views(torch.utils.data.Dataset):
    """(epoch, index) -> *views(image), index, unreadable images passed over (see ImageFolder).

    `views` draws from torch's global generator. Its draws depend on (seed, epoch, index) alone.
    """

    def __init__(self, images, views, seed):
        self.images, self.views, self.seed = images, views, seed

    def __getitem__(self, key):
        epoch, index = key
        image, passed = self.images[index]
        with common.drawing("views", self.seed, epoch, index):
            return *self.views(image), index, passed


class Batches(torch.utils.data.Sampler):
    """This process's batches from step `start` to `stop`, as lists of (epoch, index), over as many epochs as needed.

    Each epoch has its own permutation, which depends on (seed, epoch) alone. The last incomplete batch is dropped. The
    global batch is cut into consecutive shares, rank by rank: one process and several see the same images in order.

    Args:
        images: how many. kinds: (images,) bool tensor. A batch then holds images of one kind; one batch an epoch may mix
        what is left of both.
    """

    def __init__(self, images, batch_size, rank, processes, seed, start, stop, kinds=None):
        self.images, self.batch_size, self.rank, self.processes = images, batch_size, rank, processes
        self.seed, self.start, self.stop, self.kinds = seed, start, stop, kinds

    def __len__(self):
        return self.stop - self.start

    def __iter__(self):
        share = self.batch_size // self.processes
        current = None
        for step in range(self.start, self.stop):
            epoch, batch = divmod(step, self.images // self.batch_size)
            if epoch != current:
                order, current = self.order(epoch), epoch
            first = batch * self.batch_size + self.rank * share
            yield [(epoch, index) for index in order[first : first + share].tolist()]

    def order(self, epoch):
        """(n,) int64: the images of an epoch, batch after batch."""
        rng = common.generator("order", self.seed, epoch)
        order = torch.randperm(self.images, generator=rng)
        if self.kinds is None:
            return order
        batches, rest = [], []
        for kind in (False, True):
            own = order[self.kinds[order] == kind]
            full = len(own) // self.batch_size * self.batch_size
            batches, rest = [*batches, *own[:full].split(self.batch_size)], [*rest, own[full:]]
        batches += [b for b in torch.cat(rest).split(self.batch_size) if len(b) == self.batch_size]
        return torch.cat([batches[i] for i in torch.randperm(len(batches), generator=rng)])


def detach_worker(_):
    """worker_init_fn: a process group of its own. A SIGTERM or Ctrl-C for the training then does not kill the loader's
    workers before the step is finished and saved."""
    if os.name == "posix":
        os.setpgrp()


class BadImages:
    """Names every unreadable image once, and stops the run if more than 1 % (and more than one) cannot be read.

    Args:
        source: of the images. found: those named before. outcome: what happens to one, for the message.
    """

    def __init__(self, source, found=(), outcome="another one takes its place"):
        self.source, self.found, self.new, self.outcome = source, set(found), set(), outcome

    def note(self, indices, passed):
        """(N,) int64 each, as the loader returns them: see ImageFolder."""
        for index, count in zip(indices.tolist(), passed.tolist(), strict=True):
            self.new |= {(index + i) % len(self.source) for i in range(count)} - self.found

    def share(self):
        """Exchange new ones with the other processes and name them. All processes must call this together."""
        new = [sorted(self.new)]
        if common.processes() > 1:
            new = [None] * common.processes()
            dist.all_gather_object(new, sorted(self.new))
        new = {index for part in new for index in part} - self.found
        self.found |= new
        self.new = set()
        for index in sorted(new):
            print0(f"unreadable image, {self.outcome}: {self.source.name(index)}")
        if len(self.found) > max(1, len(self.source) // 100):
            raise UserError(
                f"{len(self.found)} of {len(self.source)} images cannot be read (more than 1 %): mend or remove them; "
                f"the last is {self.source.name(max(new))}"
            )
