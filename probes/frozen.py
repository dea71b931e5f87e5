# SPDX-License-Identifier: MIT
"""What the three probes share: a network that no longer learns, annotated objects to try it on, results."""

import json
import os
import shlex
import sys
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

import common
import harness.images
import harness.legacy
import harness.run
import harness.weights
from common import UserError

HELD_OUT = 10**6  # the number of the first scene for probes: pre-training on scenes starts at 0


def one_process():
    """The device of a probe that is not spread over processes. Errors: UserError, torchrun started several."""
    world = harness.legacy.start_processes()
    if world.size > 1:
        raise UserError("this probe runs in one process: start it with python, without torchrun")
    return world.device


def frozen_trunk(weights, arch, seed, device):
    """The backbone to be probed, in eval mode and without gradients.

    Args:
        weights: a file that `harness.weights.load_backbone` reads, "imagenet" or "random". arch: one of common.ARCHS.
        seed: of random weights.
    Returns:
        (ResNetTrunk; a copy of its state dict, on the CPU; the line that says what was taken)
    Errors:
        UserError: a file without such a backbone.
    """
    with common.drawing("random weights", seed):
        trunk = common.ResNetTrunk(arch)
    line = f"backbone: {arch}, random, seed {seed}"
    if weights != "random":
        state, line = harness.weights.load_backbone(weights, arch)
        trunk.load_state_dict(state)
    state = {name: tensor.clone() for name, tensor in trunk.state_dict().items()}
    return trunk.to(device, memory_format=torch.channels_last).eval().requires_grad_(False), state, line


# ======================================================================================================================
# Annotated objects
# ======================================================================================================================


# What is read of a COCO-format file; train2017's outlines alone would take gigabytes as Python objects.
KEPT = frozenset(
    "images annotations id width height file_name image_id category_id bbox iscrowd segmentation counts size".split()
)


class Annotated(NamedTuple):
    """An image and its objects."""

    image: Image.Image  # RGB, W x H
    boxes: torch.Tensor  # (n, 4) float32: x0 y0 x1 y1 in pixels, within the image
    labels: torch.Tensor  # (n,) int64: ids of categories, as annotated
    mask: Callable  # mask(row) -> (H, W) bool, the object's own pixels; None if only its box is annotated


class WrongSize(OSError):
    """An image that is not as large as its annotations say: its boxes would lie elsewhere."""


class CocoObjects:
    """The images of one COCO-format file that have objects: DATA/annotations/instances_SPLIT.json, DATA/SPLIT/*.jpg.

    AMBIGUOUS: D34. Crowds, which are no single objects, are left out; so are boxes without area.

    `self[index]` is Annotated; OSError where the image cannot be read, WrongSize where it has not the annotated size.

    Args:
        root, split: DATA and SPLIT. masks: keep the outlines in memory too.
    Errors:
        UserError: no such files, not COCO's format, no objects; images are not as large as annotated.
    """

    def __init__(self, root, split, masks=False):
        path, self.folder = os.path.join(root, "annotations", f"instances_{split}.json"), os.path.join(root, split)
        wanted = "DATA needs annotations/instances_SPLIT.json and the images in SPLIT/, as COCO has them"
        for place in (path, self.folder):
            if not os.path.exists(place):
                raise UserError(f"{place}: no such file or folder; {wanted}, or give --data scenes")
        kept = KEPT if masks else KEPT - {"segmentation"}
        try:
            with open(path) as file:
                content = json.load(file, object_hook=lambda entry: {k: entry[k] for k in entry.keys() & kept})
            images = sorted(content["images"], key=lambda entry: entry["id"])
            row_of = {entry["id"]: row for row, entry in enumerate(images)}
            sizes = np.array([(entry["width"], entry["height"]) for entry in images], np.float32).reshape(-1, 2)
            files = [os.fsencode(entry["file_name"]) for entry in images]
            found = [a for a in content["annotations"] if not a.get("iscrowd", 0)]
            rows = np.array([row_of[a["image_id"]] for a in found], np.int64)
            labels = np.array([a["category_id"] for a in found], np.int64)
            boxes = np.array([a["bbox"] for a in found], np.float32).reshape(-1, 4)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            reason = str(error).splitlines()[0][:100]
            raise UserError(f"{path}: not annotations in COCO's format ({type(error).__name__}: {reason})") from None
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        boxes[:, 2:] += boxes[:, :2]
        boxes = boxes.clip(0, np.tile(sizes[rows], 2))
        order = np.argsort(rows, kind="stable")
        order = order[(boxes[order, 2:] > boxes[order, :2]).all(1)]
        if not len(order):
            raise UserError(f"{path}: no object in it (crowds and empty boxes are left out)")
        # A few arrays: lists of a million would be copied into every worker as their counters change.
        self.boxes, self.labels = boxes[order], labels[order]
        has, counts = np.unique(rows[order], return_counts=True)
        self.ends = np.cumsum(counts)
        self.sizes, self.files = sizes[has].astype(np.int64), np.array([files[row] for row in has])
        self.outlines = [found[row].get("segmentation") for row in order] if masks else None
        wrong, samples = [], {0, len(self) // 2, len(self) - 1}
        for index in samples:
            try:
                self[index]
            except WrongSize as error:
                wrong.append(f"{self.name(index)}: {error}")
            except OSError:
                pass  # said when it is its turn
        if len(wrong) == len(samples):
            raise UserError(f"{wrong[0]}, and others, too: give the images that {path} was made for")

    def __len__(self):
        return len(self.files)

    def name(self, index):
        return os.fsdecode(bytes(self.files[index]))

    def __getitem__(self, index):
        image = harness.images.read_image(os.path.join(self.folder, self.name(index)))
        if image.size != tuple(self.sizes[index]):
            raise WrongSize("{} x {} pixels, annotated as {} x {}".format(*image.size, *self.sizes[index]))
        first, end = self.ends[index - 1] if index else 0, self.ends[index]
        boxes, labels = torch.from_numpy(self.boxes[first:end]), torch.from_numpy(self.labels[first:end])
        return Annotated(image, boxes, labels, lambda row: self.mask(first + row, *image.size))

    def mask(self, row, width, height):
        """(H, W) bool of an outline (polygons, or run lengths), or None where there is none."""
        from pycocotools import mask as coco_mask

        outline = self.outlines[row] if self.outlines else None
        if isinstance(outline, list):
            outline = [polygon for polygon in outline if len(polygon) >= 6]
        if not outline:
            return None
        if isinstance(outline, list) or isinstance(outline["counts"], list):
            outline = coco_mask.frPyObjects(outline, height, width)
        return coco_mask.decode(coco_mask.merge(outline) if isinstance(outline, list) else outline).astype(bool)


class SceneObjects:
    """The same of built-in scenes `first` to `first + count - 1` of a seed, `size` pixels a side."""

    def __init__(self, first, count, size, seed):
        self.first, self.count, self.size, self.seed = first, count, size, seed

    def __len__(self):
        return self.count

    def name(self, index):
        return f"scene {self.first + index}"

    def __getitem__(self, index):
        from harness.scenes import make_scene

        scene = make_scene(self.seed, self.first + index, self.size)
        boxes, labels, masks = torch.from_numpy(scene["boxes"]), torch.from_numpy(scene["labels"]), scene["masks"]
        return Annotated(Image.fromarray(scene["image"]), boxes, labels, lambda row: masks[row])


def scene_count(data):
    """COUNT of `--data scenes:COUNT`; None where it names a folder."""
    return len(harness.images.open_images(data, 0, 0)) if data.partition(":")[0] == "scenes" else None


def readable(objects, index):
    """(objects[index], 0), or the next one whose image can be read and how many were passed over on the way to it.

    Where none of harness.images.TRIES can: an image without objects.
    """
    for passed in range(harness.images.TRIES):
        try:
            return objects[(index + passed) % len(objects)], passed
        except OSError:
            continue
    return Annotated(
        Image.new("RGB", (8, 8)), torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), None
    ), harness.images.TRIES


# ======================================================================================================================
# Results
# ======================================================================================================================


def header(module, argv, settings):
    """What tells how results came about: the command line, as it would be typed, the versions, the settings.

    Args:
        argv: as `main` was given it, None for the interpreter's.
    """
    command = shlex.join(["python", "-m", module, *(sys.argv[1:] if argv is None else argv)])
    return {"command": command, "versions": harness.run.versions(), "settings": settings}


def require_own_folder(folder, settings):
    """Make the output folder, and keep results of other settings from being replaced.

    Errors:
        UserError: no such folder can be made; it holds results.json of other settings or of another probe.
    """
    harness.weights.make_output_dir(folder)
    path = os.path.join(folder, "results.json")
    if not os.path.exists(path):
        return
    try:
        with open(path) as file:
            before = dict(json.load(file)["settings"])
    except (OSError, ValueError, KeyError, TypeError):
        before = {}
    if before.keys() != settings.keys():
        raise UserError(f"{path}: not the results of this probe: give another --output-dir")
    same = ("workers", "output_dir")  # they change no result
    differing = [name for name in settings if name not in same and settings[name] != before[name]]
    if differing:
        what = ", ".join(f"{name} {before[name]!r} -> {settings[name]!r}" for name in differing)
        raise UserError(f"{path}: results of other settings are there ({what}): give another --output-dir")


def write_results(folder, results):
    """`results.json` of plain values."""
    harness.weights.write_atomically(
        os.path.join(folder, "results.json"), [(json.dumps(results, indent=1) + "\n").encode()]
    )
