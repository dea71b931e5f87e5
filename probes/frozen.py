# SPDX-License-Identifier: MIT
"""What the three probes share: a network that no longer learns, annotated objects to try it on, results."""

import json
import os
import shlex
import sys

import numpy as np
import torch
from PIL import Image
from torchvision import ops

import common
from common import UserError
from harness import coco, images, run, scenes, weights

HELD_OUT = 10**6  # the number of the first scene for probes: pre-training on scenes starts at 0
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def start(args):
    """The device of a probe that runs in one process, with an output folder of its own. Errors: UserError."""
    _, processes, device = common.start_processes()
    if processes > 1:
        raise UserError("this probe runs in one process: start it with python, without torchrun")
    require_own_folder(args.output_dir, vars(args))
    return device


def frozen_trunk(source, arch, seed, device):
    """The backbone to be probed, a ResNetTrunk in eval mode and without gradients. Prints where it was found.

    source: a file, "imagenet" or "random" (drawn from the seed). Errors: UserError, a file without such a backbone.
    """
    with common.drawing("random weights", seed):
        trunk = common.ResNetTrunk(arch)
    if source == "random":
        common.print0(f"backbone: {arch}, random, seed {seed}")
    else:
        weights.load_into(trunk, source, arch)
    return trunk.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)


# What is read of a file, by default: the outlines of train2017 alone would take gigabytes.
FIELDS = {*"images annotations categories id name width height file_name image_id category_id bbox iscrowd".split()}


class CocoObjects:
    """The images with objects of DATA/annotations/instances_SPLIT.json, sorted by id. They lie in DATA/SPLIT/.

    AMBIGUOUS: D34. Crowds, which are no single objects, are left out; so are boxes without area.

    `self[index]` is (image: PIL RGB; boxes: (n, 4) float32, x0 y0 x1 y1 in pixels, within the image; labels: (n,) int64, k
    stands for the k-th of `categories`; mask: function from a row to (H, W) bool, or to None if there is no outline).
    OSError: the image cannot be read or is not as large as annotated. masks: whether outlines are kept. Errors: UserError,
    see harness.coco.read_coco; no objects; images that do not fit the annotations; other categories than the given ones.
    """

    def __init__(self, root, split, masks=False, categories=None):
        path = os.path.join(root, "annotations", f"instances_{split}.json")
        fields = FIELDS | {"segmentation", "counts", "size"} if masks else FIELDS
        self.data = coco.read_coco(path, os.path.join(root, split), categories, keep=fields)
        self.categories = self.data.categories
        order = sorted(range(len(self.data)), key=lambda i: self.data.images[i]["id"])
        self.indices = np.array([i for i in order if len(self.objects(i)[0])])
        if not len(self):
            raise UserError(f"{path}: no object in it (crowds and empty boxes are left out)")
        if images.readable(self.__getitem__, 0, len(self))[0] is None:
            try:
                self[0]
            except OSError as error:
                raise UserError(f"{error}: give the images that {path} was made for") from None

    def __len__(self):
        return len(self.indices)

    def name(self, index):
        return self.data.name(self.indices[index])

    def objects(self, i):
        """(boxes, COCO's dicts) of image i of the data."""
        rows, size = self.data.objects(i), [self.data.images[i][side] or 0 for side in ("height", "width")]
        boxes = ops.box_convert(torch.tensor([row["bbox"] for row in rows]).view(-1, 4), "xywh", "xyxy")
        boxes = ops.clip_boxes_to_image(boxes, size)
        real = (boxes[:, 2:] > boxes[:, :2]).all(1)
        return boxes[real], [row for row, kept in zip(rows, real, strict=True) if kept]

    def __getitem__(self, index):
        image, (boxes, rows) = self.data.read(self.indices[index]), self.objects(self.indices[index])
        labels = torch.tensor([self.data.label[row["category_id"]] for row in rows])

        def mask(row):
            outline = rows[row]["segmentation"]
            return outline and coco.decode(outline, image.height, image.width).astype(bool)

        return image, boxes, labels, mask


class SceneObjects(images.Scenes):
    """The same of built-in scenes from number `first` on, `size` pixels a side."""

    first, categories = HELD_OUT, scenes.CLASSES

    def name(self, index):
        return super().name(self.first + index)

    def __getitem__(self, index):
        scene = self.scene(self.first + index)
        boxes, labels = torch.from_numpy(scene["boxes"]), torch.from_numpy(scene["labels"])
        return Image.fromarray(scene["image"]), boxes, labels, scene["masks"].__getitem__


def open_objects(args, split, size, masks=False, bank=None):
    """The objects of --data; scenes have `size` pixels a side. With `bank`, opened before: others of its categories."""
    if args.data.partition(":")[0] != "scenes":
        return CocoObjects(args.data, split, masks, bank and bank.categories)
    found = SceneObjects(len(images.open_images(args.data, size, args.seed)), size, args.seed)
    if bank:
        found.first, found.count = HELD_OUT + len(bank), -(-len(bank) // 4)
    return found


def require_own_folder(folder, settings):
    """Make the output folder. Errors: UserError, it cannot be made, or has results.json of other settings."""
    weights.make_output_dir(folder)
    path = os.path.join(folder, "results.json")
    try:
        with open(path) as file:
            before = dict(json.load(file)["settings"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        before = settings if isinstance(error, FileNotFoundError) else {}
    names = [name for name in settings if name not in ("workers", "output_dir")]  # these change no result
    changed = [f"{n} {before.get(n)!r} -> {settings[n]!r}" for n in names if before.get(n) != settings[n]]
    if changed:
        raise UserError(f"{path}: of other settings ({'; '.join(changed[:5])}): give another --output-dir")


def write_results(folder, module, argv, settings, results):
    """results.json: the command line as it would be typed (argv None: the interpreter's), versions, settings, results."""
    command = shlex.join(["python", "-m", module, *(sys.argv[1:] if argv is None else argv)])
    content = {"command": command, "versions": run.versions(), "settings": settings, **results}
    weights.write_atomically(os.path.join(folder, "results.json"), [json.dumps(content, indent=1).encode() + b"\n"])
