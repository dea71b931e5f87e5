# SPDX-License-Identifier: MIT
"""Detection, instance segmentation and keypoints from any pre-trained ResNet, by the protocols of the three papers.

Faster R-CNN (Ren et al., 2015), Mask and Keypoint R-CNN (He et al., 2017), with FPN (Lin et al., 2017) or on C4. Batch
norm is trained everywhere, as MoCo fine-tuned them with detectron2 and SetSim, ReSim and D3SSL after it. All parts are
torchvision's, except where detectron2 computes something else: see the list above the detector.

    image --PIL resize, flip--> ResNet -+- C4 -----------------> RPN -- boxes --> RoIAlign -- res5, norm --> class, box, mask
                                        +- C2..C5 -- FPN, norms -> RPN -- boxes --> RoIAlign -- heads ------> class, box,
                                                                                                 mask, keypoints
    N images of this process    A anchors    R RoIs of this process    K classes (label 0 is background)
    G objects of an image       S side of a pooled map    H, W pixels    boxes: x0 y0 x1 y1 in pixels, right edge exclusive

    python transfer_det.py --demo                                                        scenes, minutes on two cores
    torchrun --nproc_per_node 8 transfer_det.py --task voc --data /VOCdevkit --weights runs/setsim/resnet50.pth
    python transfer_det.py --task custom --train-json a.json --val-json b.json --images photos --weights W --batch-size 4
    python transfer_det.py --predict photos --output-dir runs/transfer_det               draw what the detector finds
    python transfer_det.py --task coco --model fpn --steps 0                             print settings and model

The last iterate is evaluated, nothing is picked. docs/transfer.md says what was measured and what was not run. Letters
with numbers, such as F1, name rows of its table of decisions.
"""

import argparse
import contextlib
import hashlib
import io
import json
import math
import os
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageFont
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn
from torchvision import ops
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection import roi_heads as stock
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads, KeypointRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.transforms.functional import pil_to_tensor

import common
from common import UserError, number, print0
from harness import finetune, metrics, pictures, weights
from harness.coco import CocoData, annotation, decode, read_coco
from harness.images import readable
from harness.run import Run, main

# ==== Protocols: a task's numbers, as in detectron2's configurations of MoCo, ReSim and SetSim; the command line ======

# Iterations, drops and warm-up count batches of `batch_size` images. All are scaled when --batch-size differs.
STANDARD = dict(
    model="fpn", batch_size=16, lr=0.02, warmup=1000, short_sides=[640, 672, 704, 736, 768, 800], test_side=800,
    max_side=1333, box_beta=0.0, post_nms=1000, rois=512, mask_convs=[256] * 4, keypoint_convs=[512] * 8, precise_bn=200,
)  # fmt: skip
# PAPER: SetSim section 4, ReSim section 4.1 and Table 4, D3SSL Table 1: VOC 07+12, 24k iterations.
VOC = STANDARD | dict(
    classes=20, outputs=["boxes"], model="c4", iterations=24000, drops=[18000, 22000], warmup=100,
    short_sides=[*range(480, 801, 32)],
)  # fmt: skip
TASKS = {
    "voc": VOC,
    # AMBIGUOUS: F6. ReSim prints no number for VOC 2007 alone. These are MoCo's, from memory.
    "voc07": VOC | dict(iterations=9000, drops=[6750, 8250]),
    # AMBIGUOUS: F18. SetSim's text and numbers are protocol A's, its released file for 1x has the heads of B.
    "coco": STANDARD | dict(classes=80, outputs=["boxes", "masks"], iterations=90000, drops=[60000, 80000]),
    # OFFICIAL: F16. detectron2's keypoint models: smooth L1 for boxes, 1500 proposals in training.
    "coco-keypoint": STANDARD | dict(
        classes=1, outputs=["boxes", "keypoints"], iterations=90000, drops=[60000, 80000], box_beta=0.5, post_nms=1500,
    ),
    # AMBIGUOUS: F8. Neither paper says what is frozen, nor the warm-up. Batch and schedule are detectron2's.
    "cityscapes": STANDARD | dict(
        classes=8, outputs=["boxes", "masks"], batch_size=8, lr=0.01, iterations=24000, drops=[18000],
        short_sides=[*range(800, 1025, 32)], test_side=1024, max_side=2048,
    ),
    "custom": STANDARD | dict(classes=None, outputs=None, iterations=1500, drops=[1000, 1333], warmup=100),
    "scenes": STANDARD | dict(
        classes=10, outputs=["boxes", "masks", "keypoints"], batch_size=4, iterations=600, drops=[450, 550], warmup=50,
        short_sides=[112, 128, 144], test_side=128, max_side=400, post_nms=200, rois=32, mask_convs=[64] * 2,
        keypoint_convs=[64] * 4, precise_bn=20,
    ),
}  # fmt: skip
NAMES = {
    "voc": "VOC 07+12",
    "voc07": "VOC 07",
    "coco": "COCO",
    "coco-keypoint": "COCO keypoints",
    "cityscapes": "Cityscapes",
}
HELP = {
    "voc": "a folder with VOC2007/ and VOC2012/ in it, each with Annotations, ImageSets/Main and JPEGImages",
    "voc07": "a folder with VOC2007/ in it, with Annotations, ImageSets/Main and JPEGImages",
    "coco": "a folder with annotations/instances_train2017.json, instances_val2017.json, train2017/ and val2017/",
    "coco-keypoint": "a folder with annotations/person_keypoints_train2017.json, ..._val2017.json, train2017/ and val2017/",
    "cityscapes": "a folder with leftImg8bit/{train,val}/CITY/*_leftImg8bit.png and gtFine/{train,val}/CITY/*_gtFine_instanceIds.png",
    "custom": "two annotation files in COCO's format and the folder of the images that they name",
}  # fmt: skip
MOMENTUM = 0.9  # of SGD


def get_args(argv=None):
    """(arguments; the checkpoint of --output-dir for --eval-only and --predict, else None)."""
    # fmt: off
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flag, side = parser.add_argument, number(int, 32)
    flag("--task", choices=TASKS, help="the protocol; voc07: trainval of 2007 alone; custom: any data in COCO's format; scenes: built-in ones")
    flag("--data", metavar="DIR", help="the data set in its usual layout (voc: with VOC2007 in it; coco: with annotations; cityscapes: with gtFine); 'scenes[:COUNT]'")
    flag("--train-json", metavar="FILE", help="custom: annotations to train on, COCO format; boxes, and masks and keypoints if it has them")
    flag("--val-json", metavar="FILE", help="custom: annotations to evaluate on")
    flag("--images", metavar="DIR", help="custom: the folder that the file names of both files start from, or its train/ and val/")
    flag("--fpn-weights", metavar="FILE", help="pre-trained pyramid besides: fpn.pth of resim.py, a released ReSim-FPN or SoCo checkpoint (ReSim's FPN^T)")
    flag("--model", choices=("fpn", "c4"), help="pyramid, or single map with res5 in the RoI head; default: the task's")
    flag("--heads", default="plain", choices=("plain", "4conv1fc"), help="of FPN models: MoCo's, ReSim's and by its numbers SetSim's (protocol A), or DenseCL's and PixPro's, with batch norm (protocol B); never to be mixed")
    flag("--freeze-at", default=0, type=number(int, 0, 5), metavar="N", help="freeze weights and batch norm of the stem (1), C2 (2) to C5 (5); 2 is what ReSim's released COCO files and SetSim's for 2x do; 4 is ReSim's Table 3b")
    flag("--weight-decay", default=1e-4, type=number(float, 0), help="on weights and biases, not on norms; SoCo fine-tunes with 2.5e-5")
    flag("--short-sides", type=side, nargs="+", help="short sides of training images in pixels, one is drawn at random; default: the task's")
    flag("--test-side", type=side, help="short side of test images in pixels; default: the task's")
    flag("--precise-bn", type=number(int, 0), metavar="N", help="before testing, measure batch statistics over N training batches; 0: keep the running means; default: the task's")
    finetune.run_flags(parser, "transfer_det", "detector")
    # fmt: on
    args, trained = finetune.parse(
        parser, argv, "transfer_det", presets=lambda args: TASKS[args.task], free=("test_side",)
    )
    wanted = ["train_json", "val_json", "images"] if args.task == "custom" else ["data"]
    for name in () if args.task == "scenes" or args.predict or args.steps == 0 and args.task != "custom" else wanted:
        if getattr(args, name) is None:
            parser.error(f"--task {args.task} wants --{name.replace('_', '-')}: {HELP[args.task]}")
    if args.model == "c4" and args.heads != "plain":
        parser.error("--heads 4conv1fc belongs to --model fpn: a C4 model has res5 as its head")
    if args.model == "c4" and args.fpn_weights:
        parser.error("--fpn-weights belong to --model fpn: a C4 model has no pyramid")
    if args.model == "c4" and args.task == "coco-keypoint":
        parser.error("--task coco-keypoint wants --model fpn: there is no keypoint head on C4")
    return args, trained


def plan(args):
    """The schedule in batches of --batch-size, by the linear rule: iterations, drops, warm-up, learning rate."""
    task = TASKS[args.task]
    iterations, lr = finetune.linear_rule(args, task)
    stretch, part = task["batch_size"] / args.batch_size, args.iterations / task["iterations"]
    drops, warmup = (
        [round(drop * part * stretch) for drop in task["drops"]],
        round(task["warmup"] * min(part, 1) * stretch),
    )
    return {"iterations": iterations, "drops": drops, "warmup": warmup, "lr": lr}


def title(args, outputs):
    """The line that a result carries: the protocol, and every number of it that was changed."""
    kinds = [kind for kind, output in (("Mask", "masks"), ("Keypoint", "keypoints")) if output in outputs] or ["Faster"]
    text = f"{NAMES.get(args.task, args.task)}, {' and '.join(kinds)} R-CNN {args.arch.replace('resnet', 'R')}-{args.model.upper()}"
    if args.model == "fpn" and args.task in ("coco", "coco-keypoint", "cityscapes"):
        text += f", protocol {'A' if args.heads == 'plain' else 'B'}"
    elif args.heads != "plain":
        text += f", heads {args.heads}"
    text += f", frozen to C{args.freeze_at}" if args.freeze_at else ""
    text += ", small heads" if args.task == "scenes" else ""
    names = "batch_size iterations lr weight_decay short_sides test_side precise_bn"
    return text + finetune.changed(args, TASKS[args.task] | {"weight_decay": 1e-4}, names)


# ==== Data sets: whatever the layout, they become harness.coco.CocoData: images, categories, annotations(i), read(i) ==


VOC_CLASSES = (
    "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person pottedplant sheep "
    "sofa train tvmonitor"
).split()


def read_voc(root, sets):
    """Pascal VOC, from its XML files: boxes (xmin - 1, ymin - 1, xmax, ymax); difficult objects are kept.

    Args:
        root: the folder with VOC2007/ and VOC2012/, or with VOCdevkit/ in it. sets: pairs like ("2007", "trainval").
    """
    root = os.path.join(root, "VOCdevkit") if os.path.isdir(os.path.join(root, "VOCdevkit")) else root
    images, rows = [], []
    for year, split in sets:
        path = os.path.join(root, f"VOC{year}", "ImageSets", "Main", f"{split}.txt")
        if not os.path.exists(path):
            raise UserError(f"{path}: no such file; --data must be {HELP['voc']}")
        with open(path) as file:
            names = file.read().split()
        for name in names:
            xml = os.path.join(root, f"VOC{year}", "Annotations", f"{name}.xml")
            try:
                told = torchvision.datasets.VOCDetection.parse_voc_xml(ElementTree.parse(xml).getroot())["annotation"]
                size = {side: int(told["size"][side]) for side in ("width", "height")}
                images.append({"id": len(images) + 1, "file_name": f"VOC{year}/JPEGImages/{name}.jpg", **size})
                for thing in told.get("object", []):
                    x0, y0, x1, y1 = (float(thing["bndbox"][side]) for side in ("xmin", "ymin", "xmax", "ymax"))
                    box, kind = [x0 - 1, y0 - 1, x1 - x0 + 1, y1 - y0 + 1], VOC_CLASSES.index(thing["name"]) + 1
                    rows.append(annotation(len(images), kind, box, difficult=int(thing.get("difficult", 0))))
            except (OSError, ElementTree.ParseError, KeyError, TypeError, ValueError) as error:
                raise UserError(f"{xml}: cannot be read as an annotation of VOC ({error})") from None
    categories = [{"id": k, "name": name} for k, name in enumerate(VOC_CLASSES, 1)]
    content = {"images": images, "annotations": rows, "categories": categories}
    return CocoData(content, root, f"VOC {' + '.join(' '.join(part) for part in sets)}")


class CityscapesData(CocoData):
    """Cityscapes' fine annotations. Masks come from the instance maps (OFFICIAL: F9. detectron2 draws them from polygons).

    A map holds 1000 x label + number for objects, and the label alone for groups, which are crowds.
    """

    def __init__(self, root, split):
        try:
            data = torchvision.datasets.Cityscapes(root, split, target_type="instance")
            pairs = sorted((path, target[0]) for path, target in zip(data.images, data.targets, strict=True))
            self.maps, images = [instances for _, instances in pairs], []
            for path, instances in pairs:
                with Image.open(path) as image, Image.open(instances):
                    size = dict(zip(("width", "height"), image.size, strict=True))
                images.append({"id": len(images) + 1, "file_name": os.path.relpath(path, root), **size})
        except (RuntimeError, OSError) as error:
            missing = getattr(error, "filename", None) or root
            raise UserError(f"{missing}: not there; --data must be {HELP['cityscapes']}") from None
        classes = [{"id": c.id, "name": c.name} for c in data.classes if c.has_instances and not c.ignore_in_eval]
        super().__init__({"images": images, "annotations": [], "categories": classes}, root, f"Cityscapes {split}")

    def instances(self, index):
        """(H, W) int32 instance map of an image, and its values. Errors: OSError."""
        with Image.open(self.maps[index]) as image:
            ids = np.asarray(image).astype(np.int32)
        return ids, np.flatnonzero(np.bincount(ids.clip(0).ravel())).tolist()

    def annotations(self, index):
        (ids, values), rows = self.instances(index), []
        for value in (value for value in values if metrics.class_of(value) in self.label):
            code = rle.encode(np.asfortranarray(ids == value, np.uint8))
            more = {"area": float(rle.area(code)), "iscrowd": int(value < 1000), "segmentation": code}
            rows.append(annotation(index + 1, metrics.class_of(value), rle.toBbox(code).tolist(), **more))
        return rows

    def usable(self, keypoints):
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            largest = list(pool.map(lambda i: self.instances(i)[1][-1], range(len(self))))
        return [i for i, value in enumerate(largest) if value >= 24000]  # 24, person, is the first class with objects


class SceneData(CocoData):
    """Built-in scenes number `first` to `first + count - 1`, with boxes, masks and landmarks."""

    def __init__(self, first, count):
        from harness.scenes import CLASSES, LANDMARKS

        self.first, self.title, self.keypoints, side = first, "scenes", list(LANDMARKS), finetune.SCENE
        self.images = [
            {"id": i + 1, "file_name": f"scene {first + i}", "width": side, "height": side} for i in range(count)
        ]
        self.categories = [{"id": k, "name": name, "keypoints": self.keypoints} for k, name in enumerate(CLASSES, 1)]
        self.label = {category["id"]: category["id"] for category in self.categories}
        self.digest = hashlib.sha256(repr((first, count, side)).encode()).hexdigest()

    def scene(self, index):
        from harness.scenes import make_scene

        return make_scene(0, self.first + index, finetune.SCENE)

    def read(self, index):
        return Image.fromarray(self.scene(index)["image"])

    def annotations(self, index):
        scene, rows = self.scene(index), []
        scene["keypoints"] = (scene["keypoints"] - [0.5, 0.5, 0]) * (scene["keypoints"][..., 2:] > 0)  # pixel corners
        for k, (x0, y0, x1, y1) in enumerate(scene["boxes"].tolist()):
            code = rle.encode(np.asfortranarray(scene["masks"][k], np.uint8))
            more = {
                "area": float(rle.area(code)),
                "segmentation": code,
                "keypoints": scene["keypoints"][k].ravel().tolist(),
            }
            rows.append(annotation(index + 1, int(scene["labels"][k]), [x0, y0, x1 - x0, y1 - y0], **more))
        return rows

    def usable(self, keypoints):
        return list(range(len(self)))


def open_data(args, split, categories=None):
    """The task's data for "train" or "val". categories: for val, those that the detector knows. Errors: UserError."""
    if args.task == "scenes":
        return SceneData(*finetune.scene_range(args.data, split))
    if args.task == "custom":
        path = args.train_json if split == "train" else args.val_json
        return read_coco(path, args.images, categories, split)
    if not os.path.isdir(args.data):
        raise UserError(f"--data {args.data}: no such folder; it must be {HELP[args.task]}")
    if args.task in ("voc", "voc07"):
        years = ["2007", "2012"] if args.task == "voc" else ["2007"]
        return read_voc(args.data, [(year, "trainval") for year in years] if split == "train" else [("2007", "test")])
    if args.task == "cityscapes":
        return CityscapesData(args.data, split)
    kind = "person_keypoints" if args.task == "coco-keypoint" else "instances"
    path = os.path.join(args.data, "annotations", f"{kind}_{split}2017.json")
    return read_coco(path, os.path.join(args.data, f"{split}2017"), categories)


def outputs_of(args, train):
    """What the detector gives: the task's outputs, or of custom data what its objects have."""
    outputs = args.outputs
    if args.task == "custom":
        objects, outputs = [row for i in range(len(train)) for row in train.objects(i)], ["boxes"]
        for name, field in (("masks", "segmentation"), ("keypoints", "keypoints")):
            have = sum(row[field] is not None for row in objects)
            print0(f"{train.title}: {have} of {len(objects)} objects have {name}")
            outputs += [name] if have else []
    if args.model == "c4" and "keypoints" in outputs:
        print0("no keypoints are learned: there is no such head on C4")
        outputs = [name for name in outputs if name != "keypoints"]
    return outputs


# ==== Training images: resize and flip ================================================================================


def resized(height, width, short_side, max_side):
    """(height, width) with the short side at `short_side`, unless the long one would exceed `max_side`; half rounds up."""
    scale = short_side / min(height, width)
    if max(height, width) * scale > max_side:
        scale = max_side / max(height, width)
    return max(int(height * scale + 0.5), 1), max(int(width * scale + 0.5), 1)


def flip_order(names):
    """Where each keypoint stands after a flip: left and right ones, known by these words in their names, change places."""
    names = [name.lower() for name in names]
    other = [name.replace("left", "R").replace("right", "left").replace("R", "right") for name in names]
    return [names.index(name) if name in names else place for place, name in enumerate(other)]


class View(NamedTuple):
    """How an image was resized and then flipped."""

    scale: tuple  # in x and y
    size: tuple  # (height, width) of the result
    flipped: bool

    def move(self, points):
        """(..., 2) x and y in the annotated image -> in the view."""
        points = np.asarray(points, np.float64) * self.scale
        return np.stack([self.size[1] - points[..., 0], points[..., 1]], -1) if self.flipped else points

    def back(self, points):
        """The inverse of `move`."""
        points = np.asarray(points, np.float64)
        points = np.stack([self.size[1] - points[..., 0], points[..., 1]], -1) if self.flipped else points
        return points / self.scale


def make_target(rows, label, view, order):
    """The objects of an image as the detector learns them. Those whose box left the image are gone.

    Args:
        rows: COCO's dicts without crowds. label: {category id: 1..K}. view: View. order: as `flip_order` gives it.
    Returns:
        dict of boxes (G, 4) float32, clipped to the view; labels (G,) int64; keypoints (G, n, 3) float32, pixel centres
        at .5, those that left the view invisible; masks, G of COCO's segmentations as annotated; view.
    """
    x, y, w, h = np.array([row["bbox"] for row in rows], np.float64).reshape(-1, 4).T
    corners = view.move(np.stack([x, y, x + w, y + h], 1).reshape(-1, 2, 2))  # (G, 2, 2)
    boxes = np.concatenate([corners.min(1), corners.max(1)], 1).clip(0, [*view.size[::-1], *view.size[::-1]])
    kept = np.flatnonzero((boxes[:, 2:] - boxes[:, :2] > 1e-5).all(1))
    rows = [rows[i] for i in kept]
    points = np.array([row["keypoints"] or [0] * 3 * len(order) for row in rows], np.float64)
    points = points.reshape(len(rows), len(order), 3)
    points[..., :2] = view.move(points[..., :2] + 0.5)  # a keypoint names its pixel: whole numbers are pixel centres
    points = points[:, order] if view.flipped else points
    inside = ((points[..., :2] >= 0) & (points[..., :2] <= view.size[::-1])).all(2) & (points[..., 2] > 0)
    return {
        "boxes": torch.tensor(boxes[kept], dtype=torch.float32),
        "labels": torch.tensor([label[row["category_id"]] for row in rows], dtype=torch.int64),
        "keypoints": torch.tensor(points * inside[..., None], dtype=torch.float32),
        "masks": [row["segmentation"] for row in rows],
        "view": view,
    }


class TrainingImages(torch.utils.data.Dataset):
    """self[epoch, index] -> (uint8 (3, H, W), target of `make_target`, index, unreadable neighbours passed over).

    A short side and a flip are drawn for each (seed, epoch, index). There is no other augmentation, as in detectron2.

    Attributes:
        kinds: (images,) bool, wider than high: a batch has one kind, so it needs little padding (DEVIATION: F4).
    """

    def __init__(self, data, args):
        self.data, self.seed, self.short_sides, self.max_side = data, args.seed, args.short_sides, args.max_side
        self.order, self.usable = flip_order(data.keypoints), np.array(data.usable(args.task == "coco-keypoint"), int)
        if not len(self.usable):
            raise UserError(f"{data.title}: no image with an object to train on")
        self.kinds = torch.tensor([data.images[i]["width"] > data.images[i]["height"] for i in self.usable])

    def __len__(self):
        return len(self.usable)

    def name(self, index):
        return self.data.name(self.usable[index])

    def fingerprint(self):
        return self.data.fingerprint()

    def image_and_objects(self, index):
        return self.data.read(self.usable[index]), self.data.objects(self.usable[index])

    def __getitem__(self, key):
        epoch, index = key
        found, passed = readable(self.image_and_objects, index, len(self))
        image, rows = found or (Image.new("RGB", (64, 64)), [])
        rng = common.generator("views", self.seed, epoch, index)
        short_side = self.short_sides[int(torch.randint(len(self.short_sides), (1,), generator=rng))]
        flipped = bool(torch.rand(1, generator=rng) < 0.5)
        size = resized(image.height, image.width, short_side, self.max_side)
        view = View((size[1] / image.width, size[0] / image.height), size, flipped)
        image = image.resize(size[::-1], Image.BILINEAR)  # PIL's is anti-aliased; torchvision's own is not
        image = image.transpose(Image.FLIP_LEFT_RIGHT) if flipped else image
        return pil_to_tensor(image), make_target(rows, self.data.label, view, self.order), index, passed

    @staticmethod
    def collate(batch):
        """Images of different sizes stay a list."""
        images, targets, index, passed = zip(*batch, strict=True)
        return list(images), list(targets), torch.tensor(index), torch.tensor(passed)


# ==== The detector ====================================================================================================
# It differs from torchvision's models where detectron2, which the papers used, computes something else:
#  1. Anchors are not rounded, and their strides are fixed. torchvision guesses strides from the padded size.
#  2. The box loss of the RPN is L1, that of the RoI heads L1 or smooth L1 (beta 0.5 for keypoints). torchvision: beta 1/9.
#  3. The losses of the RPN are divided by 256 an image, however many anchors were there to sample.
#  4. RoIAlign is aligned to half pixels, and takes as many samples as a bin has cells. torchvision: neither.
#  5. On C4, res5 runs once for boxes and masks in training, and an extra batch norm follows it (MoCo's).
#  6. Mask targets are drawn from the annotation on the grid of the RoI. Pasting samples at pixel centres.
#  7. Batch norm is trained everywhere, in the pyramid and the 4conv1fc heads too. torchvision's models freeze it.
#  8. Images are resized by PIL with anti-aliasing. Each kind of layer starts from detectron2's random weights.
# torchvision's way is kept where nothing is lost: boxes under 0.01 pixels are dropped before NMS (DEVIATION: F20).


class Anchors(AnchorGenerator):
    """Anchors as detectron2 has them: not rounded, at fixed strides, size outer and ratio inner, fp32.

    Args:
        sizes: pixels, a list for each map. strides: pixels, one for each map.
    """

    def __init__(self, sizes, strides):
        super().__init__(sizes, ((0.5, 1.0, 2.0),) * len(sizes))
        self.strides = strides

    def generate_anchors(self, scales, aspect_ratios, dtype=torch.float32, device="cpu"):
        """(sizes x ratios, 4) around the origin; ratio = height / width, area = size^2."""
        cells = []
        for size in scales:
            for ratio in aspect_ratios:
                width = math.sqrt(size**2 / ratio)
                cells.append([-width / 2, -width * ratio / 2, width / 2, width * ratio / 2])
        return torch.tensor(cells, dtype=dtype, device=device)

    def forward(self, images, maps):
        """[(A, 4)] for each image."""
        self.set_cell_anchors(torch.float32, maps[0].device)
        anchors = torch.cat(self.grid_anchors([x.shape[-2:] for x in maps], [(s, s) for s in self.strides]))
        return [anchors] * len(images.image_sizes)


class FloatRPNHead(RPNHead):
    """torchvision's, with fp32 outputs: bf16 cannot tell boxes of a thousand pixels apart (DEVIATION: F12)."""

    def forward(self, x):
        return tuple([y.float() for y in outputs] for outputs in super().forward(x))


class RPN(RegionProposalNetwork):
    """torchvision's region proposals, with detectron2's loss."""

    def compute_loss(self, objectness, pred_bbox_deltas, labels, regression_targets):
        """Binary cross-entropy of the sampled anchors and L1 of the positive ones, both divided by 256 an image.

        Args:
            objectness (N A, 1), pred_bbox_deltas (N A, 4); labels, regression_targets: N of (A,) and (A, 4).
        """
        positive, negative = (torch.cat(picked).bool() for picked in self.fg_bg_sampler(labels))
        sampled, total = positive | negative, self.fg_bg_sampler.batch_size_per_image * len(labels)
        truth, wanted = torch.cat(labels), torch.cat(regression_targets)
        loss_box = F.l1_loss(pred_bbox_deltas[positive], wanted[positive], reduction="sum") / total
        loss_class = F.binary_cross_entropy_with_logits(objectness.flatten()[sampled], truth[sampled], reduction="sum")
        return loss_class / total, loss_box


class AlignedRoIPool(nn.Module):
    """RoIAlign with half-pixel alignment and as many samples as a bin has cells; each box on its level of the pyramid.

    Args:
        strides: pixels, of the maps used. size: S, side of the result.
    """

    def __init__(self, strides, size):
        super().__init__()
        self.strides, self.size = strides, size

    def forward(self, maps, boxes):
        """dict of maps (N, C, H / stride, W / stride), list of N boxes (R_n, 4) -> (R, C, S, S)."""
        rois = torch.cat([F.pad(box, (1, 0), value=i) for i, box in enumerate(boxes)])  # (R, 5): image, box
        sides = ((rois[:, 3] - rois[:, 1]) * (rois[:, 4] - rois[:, 2])).sqrt()
        first, last = (round(math.log2(stride)) for stride in (self.strides[0], self.strides[-1]))
        levels = (4 + torch.log2(sides / 224 + 1e-8)).floor().clamp(first, last) - first  # (R,) FPN's Eq. 1
        rows = [(levels == level).nonzero().squeeze(1) for level in range(len(self.strides))]
        parts = [
            ops.roi_align(x, rois[here], self.size, 1 / stride, sampling_ratio=0, aligned=True)
            for x, stride, here in zip(maps.values(), self.strides, rows, strict=False)
        ]
        pooled = torch.cat(parts)[torch.cat(rows).argsort()] if len(parts) > 1 else parts[0]
        return pooled.contiguous(memory_format=torch.channels_last)


class C4Head(nn.Module):
    """res5 and MoCo's extra batch norm after it, without activation: (R, C4, S, S) -> (R, C5, S / 2, S / 2)."""

    def __init__(self, layer4, width):
        super().__init__()
        self.layer4, self.norm = layer4, nn.BatchNorm2d(width)

    def forward(self, x):
        return self.norm(self.layer4(x))


class BoxPredictor(FastRCNNPredictor):
    """Class scores and boxes of each class, fp32, from vectors (R, C) or the spatial mean of maps (R, C, S, S).

    torchvision's has boxes of the background, too, which nothing reads (DEVIATION: F11).
    """

    def __init__(self, in_channels, num_classes):
        super().__init__(in_channels, num_classes)
        for layer, std in ((self.cls_score, 0.01), (self.bbox_pred, 0.001)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def forward(self, x):
        scores, deltas = super().forward(x.mean((2, 3)) if x.dim() == 4 else x)
        return scores.float(), deltas.float()


def mask_predictor(in_channels, num_classes):
    """Transposed convolution, ReLU, 1x1: twice the side, one map a class. Weights and biases start as in detectron2."""
    predictor = MaskRCNNPredictor(in_channels, 256, num_classes)
    nn.init.normal_(predictor.mask_fcn_logits.weight, std=0.001)
    for layer in (predictor.conv5_mask, predictor.mask_fcn_logits):
        nn.init.zeros_(layer.bias)
    return predictor


def box_losses(scores, deltas, labels, wanted, beta):
    """Cross-entropy over all RoIs; smooth L1 (beta 0: L1) of the foreground's own class, summed, over all RoIs.

    Args:
        scores (R, K + 1), deltas (R, 4 (K + 1)), labels (R,) 0 = background, wanted (R, 4).
    """
    foreground = labels.nonzero().squeeze(1)
    own = deltas.view(len(labels), -1, 4)[foreground, labels[foreground]]
    loss_box = F.smooth_l1_loss(own, wanted[foreground], reduction="sum", beta=beta) / len(labels)
    return F.cross_entropy(scores, labels), loss_box


def mask_targets(mask, boxes, view, size):
    """What the mask head should say of one object: its mask inside boxes of the view, on a grid, binary.

    Boxes are mapped back to the annotation, which is not resized. Polygons are drawn on the grid itself. A bitmap is
    pooled onto it by aligned RoIAlign and cut at one half (DEVIATION: F10. detectron2 resizes the bitmap first).

    Args:
        mask: COCO's segmentation. boxes: (R, 4) in the view, on the CPU. view: View. size: S.
    Returns:
        float32 (R, S, S), zeros and ones.
    """
    corners = view.back(boxes.double().numpy().reshape(-1, 2, 2))
    low, high = corners.min(1), corners.max(1)  # (R, 2)
    if isinstance(mask, list):
        grids = []
        for start, sides in zip(low, np.maximum(high - low, 0.1), strict=True):
            parts = [((np.reshape(part, (-1, 2)) - start) * size / sides).ravel().tolist() for part in mask]
            grids.append(rle.decode(rle.merge(rle.frPyObjects(parts, size, size))))
        targets = torch.from_numpy(np.stack(grids)).float()
    else:
        bitmap = torch.from_numpy(rle.decode(mask))[None, None].float()
        rois = torch.from_numpy(np.concatenate([low, high], 1)).float()
        targets = (ops.roi_align(bitmap, [rois], size, sampling_ratio=0, aligned=True)[:, 0] >= 0.5).float()
    return targets.flip(2) if view.flipped else targets


def mask_loss(logits, boxes, owners, targets):
    """Binary cross-entropy over the foreground RoIs whose object has a mask (some custom objects have boxes alone).

    Args:
        logits: (R, S, S), of the RoIs' own classes. boxes, owners: N of (R_n, 4) and (R_n,), the object of each RoI.
        targets: N of `make_target`.
    """
    rows, truth, start = [], [], 0
    for box, owner, target in zip(boxes, owners, targets, strict=True):
        box, owner = box.detach().cpu(), owner.cpu()
        for i in owner.unique().tolist():
            here, mask = (owner == i).nonzero().squeeze(1), target["masks"][i]
            if mask is not None:
                rows.append(start + here)
                truth.append(mask_targets(mask, box[here], target["view"], logits.shape[-1]))
        start += len(box)
    if not rows:
        return 0 * logits.sum()
    return F.binary_cross_entropy_with_logits(logits[torch.cat(rows)], torch.cat(truth).to(logits.device))


class RoIHeads(stock.RoIHeads):
    """torchvision's sampling of RoIs and cleaning of detections, with detectron2's losses and one res5 for all C4 heads.

    A predictor that is None is not there. A mask_head that is None (C4) shares the maps of the box head.
    """

    def forward(self, maps, proposals, image_sizes, targets=None):
        """
        Args:
            maps: dict of (N, C, ., .). proposals: N of (R_n, 4). image_sizes: N of (H, W). targets: see `make_target`.
        Returns:
            training: dict of losses, RoIs of the foreground; else N dicts of boxes, scores, labels, masks (R_n, S, S) in
            [0, 1], keypoints (R_n, n, 3).
        """
        if self.training:
            proposals, owners, labels, wanted = self.select_training_samples(proposals, targets)
        shared = self.box_head(self.box_roi_pool(maps, proposals))
        scores, deltas = self.box_predictor(shared)
        if self.training:
            losses = box_losses(scores, deltas, torch.cat(labels), torch.cat(wanted), self.box_beta)
            losses = dict(zip(("loss_class", "loss_box"), losses, strict=True))
            objects = [label > 0 for label in labels]
            boxes, labels, owners = (
                [x[own] for x, own in zip(part, objects, strict=True)] for part in (proposals, labels, owners)
            )
            shared = shared[torch.cat(objects)]
        else:
            boxes, scores, labels = self.postprocess_detections(scores, deltas, proposals, image_sizes)
            found = [{"boxes": b, "scores": s, "labels": n} for b, s, n in zip(boxes, scores, labels, strict=True)]
        counts = [len(box) for box in boxes]

        if self.mask_predictor is not None:
            if self.mask_head is not None:
                shared = self.mask_head(self.mask_roi_pool(maps, boxes))
            elif not self.training:  # OFFICIAL: F14. On C4 res5 runs again on the final boxes.
                shared = self.box_head(self.box_roi_pool(maps, boxes))
            logits = self.mask_predictor(shared).float()  # (R, K + 1, S, S)
            logits = logits[torch.arange(len(logits), device=logits.device), torch.cat(labels)]
            if self.training:
                losses["loss_mask"] = mask_loss(logits, boxes, owners, targets)
            else:
                for one, mask in zip(found, logits.sigmoid().split(counts), strict=True):
                    one["masks"] = mask
        if self.keypoint_predictor is not None:
            logits = self.keypoint_predictor(self.keypoint_head(self.keypoint_roi_pool(maps, boxes))).float()
            logits = logits.contiguous()  # (R, n, S, S); torchvision's loss takes views of it
            if self.training:
                points = [target["keypoints"] for target in targets]
                losses["loss_keypoint"] = stock.keypointrcnn_loss(logits, boxes, points, owners)
            else:
                for one, part, box in zip(found, logits.split(counts), boxes, strict=True):
                    one["keypoints"] = stock.heatmaps_to_keypoints(part, box)[0]
        return (losses, sum(counts)) if self.training else found


class Detector(nn.Module):
    """Backbone, region proposals, RoI heads: modules and names as in torchvision's GeneralizedRCNN.

    Args:
        backbone: images -> dict of maps. divisor: the batch is padded to a multiple of it.
    """

    def __init__(self, backbone, rpn, roi_heads, divisor):
        super().__init__()
        self.backbone, self.rpn, self.roi_heads, self.divisor = backbone, rpn, roi_heads, divisor

    def forward(self, images, targets=None):
        """
        Args:
            images: N of uint8 (3, H_n, W_n). targets: N of `make_target`; wanted in training mode.
        Returns:
            training: (loss, {name: scalar} to log); else N dicts, see RoIHeads, in pixels of these images.
        """
        sizes = [tuple(image.shape[-2:]) for image in images]
        height, width = (math.ceil(max(side) / self.divisor) * self.divisor for side in zip(*sizes, strict=True))
        batch = torch.zeros(len(images), 3, height, width, device=images[0].device)
        batch = batch.contiguous(memory_format=torch.channels_last)
        for padded, image in zip(batch, images, strict=True):  # padding is 0 after normalisation, the mean colour
            padded[:, : image.shape[1], : image.shape[2]] = common.normalise(image[None])[0]
        maps = self.backbone(batch)
        proposals, losses = self.rpn(ImageList(batch, sizes), maps, targets)
        found = self.roi_heads(maps, proposals, sizes, targets)
        if not self.training:
            return found
        losses |= found[0]
        loss = sum(losses.values())
        return loss, {**losses, "foreground": loss.new_tensor(found[1] / len(images))}


def freeze(module):
    """Keep weights, and batch statistics too: batch norms become torchvision's frozen ones. Returns: the module."""
    if isinstance(module, nn.BatchNorm2d):
        frozen = ops.FrozenBatchNorm2d(module.num_features)
        frozen.load_state_dict(module.state_dict())
        return frozen
    for name, child in module.named_children():
        setattr(module, name, freeze(child))
    return module.requires_grad_(False)


def build_detector(args, classes, outputs, keypoints):
    """The task's detector on the CPU, heads at their random start, pre-trained weights loaded.

    Args:
        classes: K. outputs: of "boxes", "masks", "keypoints". keypoints: how many.
    """
    norm, trunk = nn.BatchNorm2d, common.ResNetTrunk(args.arch)
    if args.weights != "random":
        weights.load_into(trunk, args.weights, args.arch)
    # DEVIATION: F1. Nothing is frozen by default; released COCO files froze C2. AMBIGUOUS: F7. --freeze-at 4: C1 to C4.
    for name in ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4")[: args.freeze_at and args.freeze_at + 1]:
        setattr(trunk, name, freeze(getattr(trunk, name)))
    if args.model == "c4":
        backbone, head = IntermediateLayerGetter(trunk, {"layer3": "c4"}), C4Head(trunk.layer4, trunk.widths[3])
        anchors, divisor = Anchors([[32, 64, 128, 256, 512]], [16]), 1  # OFFICIAL: F13. no padding to a multiple
        channels, box_pool, box_width = trunk.widths[2], AlignedRoIPool([16], 14), trunk.widths[3]
        before, after = dict(training=12000, testing=6000), dict(training=2000, testing=1000)
    else:
        stages, strides = {f"layer{level - 1}": f"p{level}" for level in (2, 3, 4, 5)}, [4, 8, 16, 32]
        backbone = BackboneWithFPN(trunk, stages, trunk.widths, 256, norm_layer=norm)
        if args.fpn_weights:
            print0(weights.load_fpn(backbone.fpn, args.fpn_weights))
        anchors, divisor = Anchors([[32], [64], [128], [256], [512]], [*strides, 64]), 32
        channels, box_pool, box_width = 256, AlignedRoIPool(strides, 7), 1024
        if args.heads == "4conv1fc":
            head = FastRCNNConvFCHead((256, 7, 7), [256] * 4, [1024], norm_layer=norm)
        else:
            head = TwoMLPHead(256 * 7 * 7, 1024)
        for layer in (module for module in head.modules() if isinstance(module, nn.Linear)):
            nn.init.kaiming_uniform_(layer.weight, a=1)
            nn.init.zeros_(layer.bias)
        before = dict(training=2000, testing=1000)
        after = dict(training=args.post_nms, testing=min(args.post_nms, 1000))
    rpn_head = FloatRPNHead(channels, anchors.num_anchors_per_location()[0])
    rpn = RPN(anchors, rpn_head, 0.7, 0.3, 256, 0.5, before, after, nms_thresh=0.7)
    roi_heads = RoIHeads(
        box_pool, head, BoxPredictor(box_width, classes + 1), fg_iou_thresh=0.5, bg_iou_thresh=0.5,
        batch_size_per_image=args.rois, positive_fraction=0.25, bbox_reg_weights=(10.0, 10.0, 5.0, 5.0),
        score_thresh=0.05, nms_thresh=0.5, detections_per_img=100,
    )  # fmt: skip
    roi_heads.box_beta = args.box_beta
    if "masks" in outputs and args.model == "c4":
        roi_heads.mask_predictor = mask_predictor(trunk.widths[3], classes + 1)
    elif "masks" in outputs:
        mask_norm = norm if args.heads == "4conv1fc" else None
        roi_heads.mask_roi_pool = AlignedRoIPool(strides, 14)
        roi_heads.mask_head = MaskRCNNHeads(256, args.mask_convs, 1, norm_layer=mask_norm)
        roi_heads.mask_predictor = mask_predictor(args.mask_convs[-1], classes + 1)
    if "keypoints" in outputs:
        roi_heads.keypoint_roi_pool = AlignedRoIPool(strides, 14)
        roi_heads.keypoint_head = KeypointRCNNHeads(256, args.keypoint_convs)
        roi_heads.keypoint_predictor = KeypointRCNNPredictor(args.keypoint_convs[-1], keypoints)
    return Detector(backbone, rpn, roi_heads, divisor)


# ==== Testing: precise batch norm, detections =========================================================================


@torch.no_grad()
def precise_bn(model, batches, forward):
    """Give every batch norm that is trained the statistics of its inputs over all batches and processes.

    Every element counts alike, over the images of all processes, as in today's fvcore (OFFICIAL: F5).

    Args:
        model: in training mode. batches: iterable of argument tuples. forward: function of them that runs the model.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
    totals = {norm: torch.zeros(3, norm.num_features, dtype=torch.float64) for norm in norms}

    def note(norm, inputs):
        x = inputs[0].float()
        count = x.numel() // x.shape[1]
        variance, mean = torch.var_mean(x, [d for d in range(x.dim()) if d != 1], correction=0)
        variance, mean = variance.double().cpu(), mean.double().cpu()
        totals[norm] += torch.stack([torch.full_like(mean, count), count * mean, count * (variance + mean**2)])

    hooks = [norm.register_forward_pre_hook(note) for norm in norms]
    for arguments in batches:
        forward(*arguments)
    for hook in hooks:
        hook.remove()
    for norm in norms:
        count, mean, square = totals[norm]
        if dist.is_initialized():
            dist.all_reduce(totals[norm])
        if count[0] == 0:  # no batch came, or it was never used
            continue
        norm.running_mean.copy_(mean / count)
        norm.running_var.copy_((square / count - (mean / count) ** 2).clamp(min=0) * count / (count - 1))


def paste_mask(mask, box, height, width):
    """A mask of a box as a mask of the image: bilinear, cut at one half.

    Args:
        mask: (S, S) in [0, 1]. box: x0 y0 x1 y1 in pixels of the image.
    Returns:
        uint8 numpy (height, width).
    """
    x0, y0, x1, y1 = box
    left, top = max(math.floor(x0) - 1, 0), max(math.floor(y0) - 1, 0)
    right, bottom = min(math.ceil(x1) + 1, width), min(math.ceil(y1) + 1, height)
    xs = (torch.arange(left, right) + 0.5 - x0) / max(x1 - x0, 1e-6) * 2 - 1
    ys = (torch.arange(top, bottom) + 0.5 - y0) / max(y1 - y0, 1e-6) * 2 - 1
    grid = torch.stack(torch.meshgrid(xs, ys, indexing="xy"), 2)[None].float()
    pasted = np.zeros((height, width), np.uint8)
    pasted[top:bottom, left:right] = (F.grid_sample(mask[None, None], grid, align_corners=False)[0, 0] >= 0.5).numpy()
    return pasted


def at_test_size(image, args):
    """PIL RGB -> uint8 (3, H, W) with the short side at --test-side."""
    size = resized(image.height, image.width, args.test_side, args.max_side)
    return pil_to_tensor(image.resize(size[::-1], Image.BILINEAR))


@torch.no_grad()
def detect(model, image, size, categories):
    """One image's detections, in pixels of the original.

    Args:
        model: Detector in evaluation mode. image: uint8 (3, H, W). size: (height, width) of the original.
    Returns:
        list of COCO's dicts, best first: category_id, score, bbox, and segmentation (RLE), keypoints [x, y, 1, ...] (pixel
        centres are whole numbers) where the model gives them.
    """
    (height, width), (new_height, new_width) = size, image.shape[-2:]
    found = {name: value.float().cpu() for name, value in model([image])[0].items()}
    scale = torch.tensor([width / new_width, height / new_height])
    boxes = ops.clip_boxes_to_image(found["boxes"] * scale.repeat(2), size)
    results = []
    for i in (ops.box_area(boxes) > 0).nonzero().squeeze(1).tolist():
        x0, y0, x1, y1 = boxes[i].tolist()
        one = {"category_id": categories[int(found["labels"][i]) - 1]["id"], "score": float(found["scores"][i])}
        one["bbox"] = [x0, y0, x1 - x0, y1 - y0]
        if "masks" in found:
            code = rle.encode(np.asfortranarray(paste_mask(found["masks"][i], (x0, y0, x1, y1), height, width)))
            one["segmentation"] = {"size": code["size"], "counts": code["counts"].decode("ascii")}
        if "keypoints" in found:
            points = found["keypoints"][i]
            points[:, :2] = points[:, :2] * scale - 0.5
            one["keypoints"] = points.flatten().tolist()
        results.append(one)
    return results


# ==== Evaluation, in percent ==========================================================================================


def coco_truth(data, kind):
    """pycocotools' COCO of a data set. VOC's difficult objects become crowds, which is as near as its format comes.

    Args:
        kind: "segm": objects without a mask become crowds of their box's shape, which count neither way.
    """
    truth, annotations = COCO(), []
    for index in range(len(data)):
        for row in data.annotations(index):
            x, y, w, h = row["bbox"]
            row |= {"id": len(annotations) + 1, "iscrowd": int(row["iscrowd"] or row["difficult"])}
            if row["segmentation"] is None:
                row["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
                row["iscrowd"] |= kind == "segm"
            row["keypoints"] = row["keypoints"] or [0] * 3 * len(data.keypoints)
            annotations.append(row | {"num_keypoints": sum(v > 0 for v in row["keypoints"][2::3])})
    truth.dataset = {"images": data.images, "annotations": annotations, "categories": data.categories}
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
    return truth


def evaluate_coco(data, results, kind):
    """COCO's AP from pycocotools.

    Args:
        results: COCO's dicts. kind: "bbox", "segm" or "keypoints".
    Returns:
        `metrics.summary`, and AP of small, medium and large objects where pycocotools gives it.
    """
    if not results:
        return metrics.summary(np.zeros((10, 1)))
    if kind == "segm":  # with a box in it, the box's area would decide what counts as small
        results = [{name: value for name, value in result.items() if name != "bbox"} for result in results]
    truth = coco_truth(data, kind)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(truth, truth.loadRes(results), kind)
        if kind == "keypoints" and (len(data.keypoints) != 17 or data.keypoints[0] != "nose"):
            evaluation.params.kpt_oks_sigmas = np.full(len(data.keypoints), 0.065)  # AMBIGUOUS: F17. COCO's mean
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # (thresholds, recalls, K): all areas, most detections
    per_class = np.where(precision.mean(1) < 0, np.nan, precision.mean(1))
    sizes = dict(zip(("APs", "APm", "APl"), evaluation.stats[3:6], strict=True))
    if kind == "keypoints":
        sizes = dict(zip(("APm", "APl"), evaluation.stats[3:5], strict=True))
    return metrics.summary(per_class) | {name: 100 * float(value) for name, value in sizes.items() if value >= 0}


def evaluate(args, data, found, outputs):
    """{"box": {AP, ...}, "mask": ..., "keypoints": ...} of the task, percent. Args: found: {index: of `detect`}."""
    if args.task == "cityscapes":
        maps, names = (data.instances(i)[0] for i in sorted(found)), {c["id"]: c["name"] for c in data.categories}
        rows = [[(one["category_id"], one["score"], one["segmentation"]) for one in found[i]] for i in sorted(found)]
        return {"mask": metrics.evaluate_cityscapes(maps, rows, names)}
    results = [one | {"image_id": data.images[index]["id"]} for index in sorted(found) for one in found[index]]
    if args.task in ("voc", "voc07"):  # coco_style: not comparable with VOC's numbers, only a cross-check
        objects = [row for index in range(len(data)) for row in data.annotations(index)]
        box = metrics.evaluate_voc(objects, results, [c["id"] for c in data.categories])
        return {"box": box, "coco_style": evaluate_coco(data, results, "bbox")}
    kinds = {"boxes": ("box", "bbox"), "masks": ("mask", "segm"), "keypoints": ("keypoints", "keypoints")}
    return {kinds[name][0]: evaluate_coco(data, results, kinds[name][1]) for name in outputs}


# ==== Pictures ========================================================================================================


def draw(image, rows, categories, longest=None):
    """An image with boxes, names (scores), masks and keypoints drawn in.

    Args:
        image: PIL RGB. rows: COCO's dicts of annotations or detections. longest: long side of the result, pixels.
    Returns:
        PIL RGB.
    """
    scale = longest / max(image.size) if longest else 1.0
    size = max(round(image.width * scale), 1), max(round(image.height * scale), 1)
    canvas, place = pil_to_tensor(image.resize(size, Image.BILINEAR)), {c["id"]: k for k, c in enumerate(categories)}
    colours = [finetune.COLOURS[place[row["category_id"]] % len(finetune.COLOURS)] for row in rows]
    masks = [decode(row["segmentation"], image.height, image.width) for row in rows if row.get("segmentation")]
    if masks:
        masks = [np.asarray(Image.fromarray(mask).resize(size, Image.NEAREST)) for mask in masks]
        own = [colour for row, colour in zip(rows, colours, strict=True) if row.get("segmentation")]
        masks = torch.from_numpy(np.array(masks)).bool()
        canvas = torchvision.utils.draw_segmentation_masks(canvas, masks, alpha=0.5, colors=own)
    if rows:
        boxes = ops.box_convert(torch.tensor([row["bbox"] for row in rows]), "xywh", "xyxy") * scale
        canvas = torchvision.utils.draw_bounding_boxes(canvas, boxes, colors=colours, width=2)
    for row in rows:
        if row.get("keypoints"):
            points = torch.tensor(row["keypoints"]).view(-1, 3)
            points = (points[points[:, 2] > 0, :2] + 0.5) * scale
            canvas = torchvision.utils.draw_keypoints(canvas, points[None], colors="white", radius=3)
    picture = Image.fromarray(canvas.permute(1, 2, 0).numpy())
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(12)
    for row, colour in zip(rows, colours, strict=True):
        text = categories[place[row["category_id"]]]["name"] + (f" {row['score']:.2f}" if "score" in row else "")
        x, y = row["bbox"][0] * scale, max(row["bbox"][1] * scale - 15, 0)
        pen.rectangle(pen.textbbox((x + 2, y), text, font), colour)
        pen.text((x + 2, y), text, "black", font)
    return picture


def confident(rows):
    """The detections worth drawing: scores of at least one half, or else the best one."""
    return [row for row in rows if row["score"] >= 0.5] or rows[:1]


def predict(args, model, categories, device):
    """Draw detections on every image below --predict; `results.json` has them in COCO's format, `images.json` the ids."""
    folder, images, results = os.path.join(args.output_dir, "predictions"), [], []
    for name, image in finetune.folder_to_predict(args):
        images.append({"id": len(images) + 1, "file_name": name, "width": image.width, "height": image.height})
        found = detect(model, at_test_size(image, args).to(device), (image.height, image.width), categories)
        results += [{"image_id": len(images), **one} for one in found]
        finetune.save_picture(draw(image, confident(found), categories), folder, f"{name}.png")
    os.makedirs(folder, exist_ok=True)  # no image could be read
    for name, content in (("results", results), ("images", {"images": images, "categories": categories})):
        weights.write_atomically(os.path.join(folder, f"{name}.json"), [json.dumps(content).encode()])
    print0(f"{folder}: {len(images)} pictures, results.json with {len(results)} detections, images.json")


# ==== Training ========================================================================================================


def learning_rate(step, lr, warmup, drops):
    """Linear from a thousandth of `lr` over the warm-up, then a tenth of it after each drop."""
    factor = 0.1 ** sum(step >= drop for drop in drops)
    if step < warmup:
        factor *= 0.001 + 0.999 * step / warmup
    return lr * factor


def parameter_groups(model, weight_decay):
    """Two groups for SGD: norms without weight decay, all other weights and biases with it; nothing that is frozen."""
    norms = [p for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) for p in m.parameters()]
    norms = {id(p) for p in norms}
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if id(p) not in norms], "weight_decay": weight_decay},
        {"params": [p for p in trained if id(p) in norms], "weight_decay": 0.0},
    ]


def new_detector(args, device, classes, outputs, keypoints):
    """`build_detector` on a device, drawn from the seed, with batch norm over the images of all processes (F2)."""
    with common.drawing("model", args.seed):
        model = build_detector(args, classes, outputs, keypoints)
    # DEVIATION: F2. MoCo's later files average the processes' statistics.
    return common.synchronised_norms(model, device).to(device, memory_format=torch.channels_last)


def fine_tune(args, train, val, outputs):
    """One trial: train from the last checkpoint to the end, precise batch norm, evaluate.

    Returns:
        the trial's result as `results.jsonl` has it; None if a signal or --steps ended it before.
    """
    images, schedule = TrainingImages(train, args), plan(args)
    run = Run("transfer_det", args, images, schedule.pop("iterations"), least=1, val_files=val.fingerprint())
    start = args if not run.continued else argparse.Namespace(**vars(args) | {"weights": "random", "fpn_weights": None})
    model = new_detector(start, run.device, len(train.categories), outputs, len(train.keypoints))
    optimizer = torch.optim.SGD(parameter_groups(model, args.weight_decay), schedule["lr"], momentum=MOMENTUM)
    scaler = torch.amp.GradScaler(run.device.type, enabled=args.amp == "fp16")
    kept = dict(args=vars(args), categories=train.categories, outputs=outputs, keypoints=train.keypoints)
    run.resume(model, optimizer, scaler, {"detector.pth": model}, **kept)
    network = common.distributed(model, run.device)
    torch.backends.cudnn.benchmark = False  # nearly every batch has a size of its own
    print0(
        f"{title(args, outputs)}; {len(images)} of {len(train)} images to train on, {len(val)} to evaluate; "
        f"seed {args.seed}; drops at {schedule['drops']}, warm-up {schedule['warmup']}"
    )

    def forward(network, step, pixels, targets):
        """The loss of a batch; the RoIs and anchors that torchvision samples depend on (seed, step, rank) alone."""
        torch.manual_seed(common.key_seed("step", args.seed, step, run.rank))
        pixels = [image.to(run.device, non_blocking=True) for image in pixels]
        targets = [{k: v.to(run.device) if torch.is_tensor(v) else v for k, v in one.items()} for one in targets]
        with common.autocast(args.amp, run.device):
            return network(pixels, targets)

    model.train()
    for pixels, targets in run.steps(images):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(run.step, **schedule)
        loss, values = forward(network, run.step, pixels, targets)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        run.log(loss=loss, lr=group["lr"], **values)

    if run.result or not run.ended:
        return run.result
    if args.precise_bn:
        print0(f"precise batch norm over {args.precise_bn} batches")
        batches = run.loader(images, run.total, run.total + args.precise_bn)
        numbered = ((run.total + i, *batch[:2]) for i, batch in enumerate(batches))
        precise_bn(model, numbered, lambda *batch: forward(model, *batch))
        run.save()
    result = evaluated(args, model, val, outputs, run.device)
    run.write(result=result)
    return result


def evaluated(args, model, val, outputs, device):
    """Evaluate on the validation images: {"seed", "protocol", "box": {AP, ...}, ...}, printed; and predictions.png."""

    def prepare(index):
        image = val.read(index)
        return at_test_size(image, args), (image.height, image.width)

    model, found = finetune.ready_to_test(model), dict.fromkeys(range(common.rank(), len(val), common.processes()), ())
    for index, (image, size) in finetune.share_of(val, prepare, args.workers):
        found[index] = detect(model, image.to(device), size, val.categories)
    found = finetune.together(found)
    result = {"seed": args.seed, "protocol": title(args, outputs)}
    result |= {"weights": args.weights, "fpn_weights": args.fpn_weights}
    if common.rank() == 0:
        result |= evaluate(args, val, found, outputs)
        columns = [
            [draw(image, rows, val.categories, 400) for rows in (val.annotations(i), confident(found[i]))]
            for i, image in finetune.first_readable(val, val.annotations)
        ]
        pictures.save_columns(os.path.join(args.output_dir, "predictions.png"), columns)
        pyramid = f", pyramid {args.fpn_weights}" if args.fpn_weights else ""
        text = "; ".join(f"{name} {value:.1f}" for name, value in aps(result).items())
        print0(f"{result['protocol']}; weights {args.weights}{pyramid}: {text}")
    return result


def aps(result):
    """{"box AP": percent, "box AP50": ...} of a result."""
    kinds = {name: value for name, value in result.items() if isinstance(value, dict)}
    return {f"{name} {metric}": value[metric] for name, value in kinds.items() for metric in ("AP", "AP50", "AP75")}


def job(argv=None):
    """What the command line asks for."""
    args, trained = get_args(argv)
    if args.steps == 0:
        print_settings(args)
        return
    _, _, device = common.start_processes()
    torch.backends.cudnn.benchmark = False
    if trained:
        outputs, categories, keypoints = (trained[name] for name in ("outputs", "categories", "keypoints"))
        start = argparse.Namespace(**vars(args) | {"weights": "random", "fpn_weights": None})
        model = new_detector(start, device, len(categories), outputs, len(keypoints))
        model.load_state_dict(trained["model"])
        if args.predict:
            predict(args, model.eval(), categories, device)
            return
        result = evaluated(args, model, open_data(args, "val", categories), outputs, device)
        if common.rank() == 0:
            path = os.path.join(args.output_dir, "evaluation.json")
            weights.write_atomically(path, [json.dumps({"step": trained["step"], **result}).encode()])
        return
    train = open_data(args, "train")
    val, outputs = open_data(args, "val", train.categories), outputs_of(args, train)
    # AMBIGUOUS: F15. Nobody published the seeds of trials.
    finetune.run_trials(args, lambda args: fine_tune(args, train, val, outputs), aps)


def print_settings(args):
    """--steps 0: the settings and the model as built. Only custom data are opened."""
    classes, outputs, keypoints = args.classes, args.outputs, 17
    if args.task in ("custom", "scenes"):
        train = open_data(args, "train")
        outputs, classes, keypoints = outputs_of(args, train), len(train.categories), len(train.keypoints)
    rows = "\n".join(f"{name:16} {value}" for name, value in {**vars(args), **plan(args)}.items())
    print0(f"{title(args, outputs)}\n{rows}\n{build_detector(args, classes, outputs, keypoints)}")


if __name__ == "__main__":
    main(job)
