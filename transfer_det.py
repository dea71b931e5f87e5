# SPDX-License-Identifier: MIT
"""Detection, instance segmentation and keypoints from any pre-trained ResNet, by the protocols of the three papers.

Faster R-CNN (Ren et al., 2015), Mask and Keypoint R-CNN (He et al., 2017), with FPN (Lin et al., 2017) or on C4, with
trainable batch norm everywhere, as MoCo fine-tuned them with detectron2 and SetSim, ReSim and D3SSL after it. Built
from torchvision's parts; where those compute something else than detectron2, a small class below does it its way.

    image --PIL resize, flip--> ResNet -+- C4 -----------------> RPN -- boxes --> RoIAlign -- res5, norm --> class, box, mask
                                        +- C2..C5 -- FPN, norms -> RPN -- boxes --> RoIAlign -- heads ------> class, box,
                                                                                                 mask, keypoints
    N images of this process    A anchors    R RoIs of this process    K classes (label 0 is background)
    G objects of an image       S side of a pooled map    H, W pixels    boxes: x0 y0 x1 y1 in pixels, right edge exclusive

    python transfer_det.py --demo                                                        scenes, minutes on two cores
    torchrun --nproc_per_node 8 transfer_det.py --task voc --data /VOCdevkit --weights runs/setsim/resnet50.pth
    python transfer_det.py --task custom --train-json a.json --val-json b.json --images photos --weights W --batch-size 4
    python transfer_det.py --predict photos --output-dir runs/transfer_det               draw what the detector finds
    python transfer_det.py --task coco --model fpn --steps 0                             print the protocol as built

The last iterate is evaluated, nothing is picked. What was measured, and what was not run, stands in docs/transfer.md; tags name
rows of its table of decisions.
"""

import argparse
import contextlib
import hashlib
import io
import json
import math
import os
import pickle
import re
import xml.etree.ElementTree
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image
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

import common
import harness.images
import harness.legacy
import harness.pictures
import harness.run
import harness.weights
from common import UserError, print0

# ======================================================================================================================
# Protocols: a task's numbers, as detectron2's configurations of MoCo, ReSim and SetSim have them; and the command line
# ======================================================================================================================

# Iterations, drops and warm-up count batches of `batch_size` images; all are scaled when --batch-size differs.
STANDARD = dict(
    model="fpn", heads="plain", batch_size=16, lr=0.02, warmup=1000, short_sides=[640, 672, 704, 736, 768, 800],
    test_side=800, max_side=1333, box_beta=0.0, post_nms=1000, rois=512, mask_convs=[256] * 4, keypoint_convs=[512] * 8,
    precise_bn=200,
)  # fmt: skip
SCHEDULES = {"1x": (90000, [60000, 80000]), "2x": (180000, [120000, 160000])}
TASKS = {
    # PAPER: SetSim section 4, ReSim section 4.1 and Table 4, D3SSL Table 1: VOC 07+12, 24k iterations.
    "voc": STANDARD | dict(
        outputs=["boxes"], model="c4", iterations=24000, drops=[18000, 22000], warmup=100,
        short_sides=[*range(480, 801, 32)],
    ),
    # AMBIGUOUS: F18. SetSim's text and numbers are protocol A's, its released file for 1x has the heads of B.
    "coco": STANDARD | dict(outputs=["boxes", "masks"], iterations=90000, drops=[60000, 80000]),
    # OFFICIAL: F16. detectron2's keypoint models: smooth L1 for boxes, 1500 proposals in training.
    "coco-keypoint": STANDARD | dict(
        outputs=["boxes", "keypoints"], iterations=90000, drops=[60000, 80000], box_beta=0.5, post_nms=1500,
    ),
    # AMBIGUOUS: F8. Neither paper says what is frozen, nor the warm-up; batch and schedule are detectron2's.
    "cityscapes": STANDARD | dict(
        outputs=["boxes", "masks"], batch_size=8, lr=0.01, iterations=24000, drops=[18000],
        short_sides=[*range(800, 1025, 32)], test_side=1024, max_side=2048,
    ),
    "custom": STANDARD | dict(outputs=None, iterations=1500, drops=[1000, 1333], warmup=100),
    "scenes": STANDARD | dict(
        outputs=["boxes", "masks", "keypoints"], batch_size=4, lr=0.02, iterations=600, drops=[450, 550], warmup=50,
        short_sides=[112, 128, 144], test_side=128, max_side=400, post_nms=200, rois=32, mask_convs=[64] * 2,
        keypoint_convs=[64] * 4, precise_bn=20,
    ),
}  # fmt: skip
SCENE = 136  # pixels a side
DEMO = dict(task="scenes", arch="resnet18")
MOMENTUM = 0.9  # of SGD, in all of them
TRAIN_SET_07 = dict(iterations=9000, drops=[6750, 8250])  # AMBIGUOUS: F6. ReSim prints no number; MoCo's, from memory


def get_args(argv=None):
    # fmt: off
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flag = parser.add_argument
    flag("--task", default=None, choices=TASKS, help="the protocol; custom: any data in COCO's format; scenes: built-in ones")
    flag("--data", default=None, metavar="DIR", help="the data set in its usual layout (voc: with VOC2007 in it; coco: with annotations; cityscapes: with gtFine); 'scenes[:COUNT]'")
    flag("--train-json", default=None, metavar="FILE", help="custom: annotations to train on, COCO format; boxes, and masks and keypoints if it has them")
    flag("--val-json", default=None, metavar="FILE", help="custom: annotations to evaluate on")
    flag("--images", default=None, metavar="DIR", help="custom: the folder that file names start from")
    flag("--val-images", default=None, metavar="DIR", help="custom: the same for --val-json; default --images")
    flag("--output-dir", default="runs/transfer_det", help="checkpoint.pth, detector.pth, log.jsonl, results.jsonl and pictures go there; a run found there is continued")
    flag("--demo", action="store_true", help="ResNet-18 on built-in scenes, minutes on two CPU cores; other flags win over its settings")
    # what starts the detector
    flag("--weights", default="random", metavar="FILE", help="the pre-trained backbone: any checkpoint with a ResNet in it, 'imagenet' (torchvision's supervised weights) or 'random'")
    flag("--fpn-weights", default=None, metavar="FILE", help="pre-trained pyramid besides: fpn.pth of resim.py, a released ReSim-FPN or SoCo checkpoint (ReSim's FPN^T)")
    flag("--arch", default="resnet50", choices=common.ARCHS, help="torchvision ResNet")
    # the protocol
    flag("--train-set", default="07+12", choices=("07+12", "07"), help="voc: trainval of 2007 and 2012, or of 2007 alone with its own schedule")
    flag("--schedule", default="1x", choices=SCHEDULES, help="coco, coco-keypoint: 90000 or 180000 iterations")
    flag("--model", default=None, choices=("fpn", "c4"), help="pyramid, or single map with res5 in the RoI head; default the task's")
    flag("--heads", default="plain", choices=("plain", "4conv1fc"), help="of FPN models: MoCo's, ReSim's and by its numbers SetSim's (protocol A), or DenseCL's and PixPro's, with batch norm (protocol B); never to be mixed")
    flag("--freeze-at", default=0, type=int, metavar="N", help="freeze weights and batch norm of the stem (1), C2 (2) to C5 (5); 2 is what ReSim's released COCO files and SetSim's for 2x do")
    flag("--freeze-backbone", dest="freeze_at", action="store_const", const=4, default=0, help="the same as --freeze-at 4: C1 to C4, ReSim's Table 3b")
    flag("--iterations", default=None, type=int, help="length of the schedule in the task's batches, drops and warm-up in proportion; default the task's")
    flag("--batch-size", default=None, type=int, help="over all processes; the learning rate is scaled with it and the iterations against it; default the task's")
    flag("--lr", default=None, type=float, help="at the task's batch, scaled linearly; default the task's")
    flag("--weight-decay", default=1e-4, type=float, help="on weights and biases, not on norms; SoCo fine-tunes with 2.5e-5")
    flag("--short-sides", default=None, type=int, nargs="+", help="pixels: the image's short side in training, one drawn at random; default the task's")
    flag("--test-side", default=None, type=int, help="pixels: the short side in testing; default the task's")
    flag("--max-side", default=None, type=int, help="pixels: limit of the long side; default the task's")
    flag("--precise-bn", default=None, type=int, metavar="N", help="before testing, measure batch statistics over N training batches; 0: keep the running means; default the task's")
    flag("--amp", default="none", choices=("none", "bf16", "fp16"), help="autocast in training; losses, boxes and testing are fp32 always")
    flag("--seed", default=0, type=int, help="everything random is a function of it")
    flag("--trials", default=1, type=int, help="so many runs with seeds SEED, SEED + 1, ...; their mean and deviation at the end")
    # the run
    flag("--eval-only", action="store_true", help="evaluate the detector in --output-dir, do not train")
    flag("--predict", default=None, metavar="DIR", help="draw what the detector in --output-dir finds on a folder of images, write COCO results")
    flag("--steps", default=None, type=int, help="stop after so many steps in all, schedule unchanged; 0: print the protocol as built")
    flag("--workers", default=min(4, harness.legacy.usable_cores()), type=int, help="loader processes for each training process; no influence on results")
    flag("--print-freq", default=20, type=int, help="steps between log lines")
    flag("--save-every", default=1000, type=int, help="steps between checkpoints")
    flag("--resume", default=None, metavar="FILE", help="continue from this checkpoint; default OUTPUT_DIR/checkpoint.pth if it is there")
    # fmt: on
    args, given = parser.parse_args(argv), harness.legacy.given_flags(parser, argv)
    if args.eval_only and args.predict:
        raise UserError("--eval-only and --predict are two jobs: give one of them")
    if args.eval_only or args.predict:
        given |= remembered(args, given)
    if args.demo:
        given = DEMO | given
    for name, value in given.items():
        setattr(args, name, value)
    if args.task is None:
        raise UserError(f"give --task {{{','.join(TASKS)}}}, or --demo for a small complete job")

    chosen = dict(TASKS[args.task])
    if args.task.startswith("coco"):
        chosen["iterations"], chosen["drops"] = SCHEDULES[args.schedule]
    if args.train_set == "07":
        chosen |= TRAIN_SET_07
    args.protocol = chosen
    for name, value in chosen.items():
        if name not in given:
            setattr(args, name, value)
    args.given = sorted(given)
    check_args(args, given)
    return args


def remembered(args, given):
    """The settings that the detector in --output-dir was made with, where the command line does not say otherwise."""
    path = args.resume or os.path.join(args.output_dir, "checkpoint.pth")
    if not os.path.exists(path):
        raise UserError(
            f"{path}: no such file; --eval-only and --predict want the --output-dir of a run (seed0, ... of trials)"
        )
    found = harness.weights.load_checkpoint_file(path)
    if not isinstance(found, dict) or found.get("script") != NAME:
        raise UserError(f"{path}: not a checkpoint of {NAME}.py")
    for name in given.keys() - {*FREE, "test_side", "max_side"}:
        if given[name] != found["settings"].get(name):
            raise UserError(
                f"--{name.replace('_', '-')} {given[name]}: the detector in {args.output_dir} was made with another"
            )
    return {name: value for name, value in found["given"].items() if name not in given}


def check_args(args, given):
    """One clear line for values out of range, for what is missing, and for flags that would have no effect."""
    harness.legacy.check_range(
        args, freeze_at=(0, 5), iterations=(1, None), batch_size=(1, None), lr=(0, None), weight_decay=(0, None),
        test_side=(32, None), max_side=(32, None), precise_bn=(0, None), seed=(0, None), trials=(1, None), steps=(0, None),
        workers=(0, None), print_freq=(1, None), save_every=(1, None),
    )  # fmt: skip
    if min(args.short_sides) < 32:
        raise UserError(f"--short-sides {min(args.short_sides)}: must be at least 32")
    wanted = {"voc": ["data"], "coco": ["data"], "coco-keypoint": ["data"], "cityscapes": ["data"], "scenes": []}
    wanted["custom"] = ["train_json", "val_json", "images"]
    if args.steps != 0 or args.task == "custom":
        for name in wanted[args.task]:
            if getattr(args, name) is None and not args.predict:
                raise UserError(f"--task {args.task} wants --{name.replace('_', '-')}: {HELP[args.task]}")
    if args.trials > 1 and args.resume:
        raise UserError("--resume goes with one trial: each of several continues from its own folder")
    useless = {"train_set": "voc", "schedule": "coco coco-keypoint", "train_json": "custom", "val_json": "custom"}
    useless |= {"images": "custom", "val_images": "custom", "data": "voc coco coco-keypoint cityscapes scenes"}
    for name, tasks in useless.items():
        if name in given and args.task not in tasks.split():
            raise UserError(f"--{name.replace('_', '-')} has no meaning for --task {args.task}")
    if args.model == "c4" and args.heads != "plain":
        raise UserError("--heads 4conv1fc belongs to --model fpn: a C4 model has res5 as its head")
    if args.model == "c4" and args.fpn_weights:
        raise UserError("--fpn-weights belong to --model fpn: a C4 model has no pyramid")
    if args.model == "c4" and args.task == "coco-keypoint":
        raise UserError("--task coco-keypoint wants --model fpn: there is no keypoint head on C4")


NAME = "transfer_det"
HELP = {
    "voc": "a folder with VOC2007/ and VOC2012/ in it, each with Annotations, ImageSets/Main and JPEGImages",
    "coco": "a folder with annotations/instances_train2017.json, instances_val2017.json, train2017/ and val2017/",
    "coco-keypoint": "a folder with annotations/person_keypoints_train2017.json, ..._val2017.json, train2017/ and val2017/",
    "cityscapes": "a folder with leftImg8bit/{train,val}/CITY/*_leftImg8bit.png and gtFine/{train,val}/CITY/*_gtFine_instanceIds.png",
    "custom": "two annotation files in COCO's format and the folder of the images that they name",
    "scenes": "nothing: they are built in",
}
# Not part of what a resumed run must share with its beginning.
FREE = ("data", "train_json", "val_json", "images", "val_images", "output_dir", "demo", "eval_only", "predict", "steps")
FREE += ("workers", "print_freq", "save_every", "resume", "trials", "given", "protocol")
# Not part of what --eval-only and --predict remember of a run.
FORGOTTEN = ("output_dir", "resume", "trials", "steps", "eval_only", "predict")


# ======================================================================================================================
# Data sets: whatever the layout, `images` (COCO's dicts), `categories`, read(i) and annotations(i)
# ======================================================================================================================


class CocoData:
    """A data set in COCO's format, from its file or turned into it.

    Attributes:
        images: dicts with id, file_name, width, height. categories: dicts with id (gaps allowed) and name, sorted by id:
        label k stands for categories[k - 1]. keypoints: names of a category's keypoints, [] if there are none.

    Args:
        content: COCO's {"images", "annotations", "categories"}; annotations may have "difficult".
        folder: what file names start from. title: what messages call it. categories: those of the data that a detector
        was trained on, where these are to be evaluated with it.
    Errors:
        UserError: not COCO's format, other categories, or more than 1 % (and more than one) of the images missing or of
        the annotations without image; fewer are passed over and named.
    """

    def __init__(self, content, folder, title, categories=None):
        self.folder, self.title = folder, title
        try:
            self.categories = sorted(content["categories"], key=lambda category: category["id"])
            known = {category["id"]: category["name"] for category in categories or self.categories}
            strange = [c["name"] for c in self.categories if known.get(c["id"]) != c["name"]]
            if strange:
                raise UserError(f"{title}: categories {strange} are not those of the training data (id and name)")
            self.categories = categories or self.categories
            label = {category["id"]: number for number, category in enumerate(self.categories, 1)}
            keys = ("id", "file_name", "width", "height")
            images = {image["id"]: {key: image.get(key) for key in keys} for image in content["images"]}
            raw, lost = {key: [] for key in images}, []
            for annotation in content["annotations"]:
                raw.get(annotation["image_id"], lost).append(annotation)
            self.keypoints = list(next((c["keypoints"] for c in self.categories if c.get("keypoints")), []))
            rows = {key: [clean_annotation(a, label, self.keypoints) for a in found] for key, found in raw.items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{title}: not in COCO's format ({type(error).__name__}: {error})") from None
        if not images or not label:
            raise UserError(f"{title}: it has {len(images)} images and {len(label)} categories")
        if len(lost) > max(1, len(content["annotations"]) // 100):
            raise UserError(
                f"{title}: {len(lost)} annotations name images that are not in it, e.g. {lost[0]['image_id']}"
            )
        missing = [key for key, image in images.items() if not os.path.exists(os.path.join(folder, image["file_name"]))]
        for key, image in images.items():
            if key not in missing and not (image["width"] and image["height"]):
                try:
                    image["width"], image["height"] = harness.images.read_image(
                        os.path.join(folder, image["file_name"])
                    ).size
                except OSError:
                    missing.append(key)
        if len(missing) > max(1, len(images) // 100) or len(missing) == len(images):
            raise UserError(
                f"{title}: {len(missing)} of its {len(images)} images are not in {folder}, "
                f"for instance {images[missing[0]]['file_name']}"
            )
        for key in missing:
            print0(f"{title}: {images[key]['file_name']} is not in {folder}; passed over")
            del images[key], rows[key]
        empty = sum(found.count(None) for found in rows.values())
        for count, what in ((empty, "have an empty box"), (len(lost), "name an image that is not in it")):
            if count:
                print0(f"{title}: {count} annotations {what} and are passed over")
        # One array of bytes: millions of small objects would be copied into every loader process.
        self.images = list(images.values())
        rows = [[row for row in rows[key] if row is not None] for key in images]
        packed = [pickle.dumps(found) for found in rows]
        self.ends = np.cumsum([0, *map(len, packed)])
        self.packed = np.frombuffer(b"".join(packed), np.uint8)
        digest = hashlib.sha256()
        for image, found in zip(self.images, rows, strict=True):
            digest.update(
                repr([image["file_name"], [(row["box"], row["label"], row["crowd"]) for row in found]]).encode()
            )
        self.digest = digest.hexdigest()

    def __len__(self):
        return len(self.images)

    def annotations(self, index):
        """The objects of an image: dicts with box (x0 y0 x1 y1), label (1..K), crowd, difficult, area, segmentation
        (list of polygons as flat float arrays, COCO's RLE dict, bool (H, W), or None) and keypoints ((n, 3) array of x,
        y, visibility with whole numbers in pixel centres, or None)."""
        return pickle.loads(self.packed[self.ends[index] : self.ends[index + 1]].tobytes())

    def read(self, index):
        """The image, RGB. Errors: OSError, unreadable or of another size than its annotations say."""
        image, path = self.images[index], os.path.join(self.folder, self.images[index]["file_name"])
        pixels = harness.images.read_image(path)
        if pixels.size[::-1] == (image["width"], image["height"]):  # annotated without regard to its EXIF rotation
            with Image.open(path) as stored:
                pixels = stored.convert("RGB")
        if pixels.size != (image["width"], image["height"]):
            raise OSError(f"{path} is {pixels.size}, annotated are {image['width']} x {image['height']} pixels")
        return pixels

    def usable(self, index, keypoints):
        """Whether an image can be trained on: it has an object that is no crowd (with a visible keypoint)."""
        rows = [row for row in self.annotations(index) if not row["crowd"]]
        if keypoints:
            rows = [row for row in rows if row["keypoints"] is not None and (row["keypoints"][:, 2] > 0).any()]
        return len(rows) > 0

    def count(self, field):
        """(objects that have this field, segmentation or keypoints; objects), crowds left out."""
        rows = [row for i in range(len(self)) for row in self.annotations(i) if not row["crowd"]]
        return sum(row[field] is not None for row in rows), len(rows)

    def fingerprint(self):
        """A name for this list of images, whatever folder it lies in."""
        return f"{len(self)} images, sha256 {self.digest[:16]}"


def clean_annotation(annotation, label, names):
    """One object as `CocoData.annotations` gives it, None if its box is empty. Polygons under three points are dropped.

    Args:
        annotation: COCO's dict. label: {category id: 1..K}. names: of the keypoints.
    """
    from pycocotools import mask as rle

    x, y, width, height = (float(value) for value in annotation["bbox"])
    if not (width > 0 and height > 0 and math.isfinite(x + y + width + height)):
        return None
    segmentation, keypoints = annotation.get("segmentation"), annotation.get("keypoints")
    if isinstance(segmentation, list):
        polygons = [np.asarray(part, np.float64) for part in segmentation if len(part) >= 6 and len(part) % 2 == 0]
        segmentation = polygons or None
    elif isinstance(segmentation, dict) and isinstance(segmentation["counts"], list):
        segmentation = rle.frPyObjects(segmentation, *segmentation["size"])
    if keypoints and len(keypoints) != 3 * len(names):
        raise ValueError(f"annotation {annotation.get('id')} has {len(keypoints)} numbers for {len(names)} keypoints")
    return {
        "box": [x, y, x + width, y + height],
        "label": label[annotation["category_id"]],
        "crowd": bool(annotation.get("iscrowd", 0)),
        "difficult": bool(annotation.get("difficult", 0)),
        "area": float(annotation.get("area", width * height)),
        "segmentation": segmentation or None,
        "keypoints": np.asarray(keypoints, np.float64).reshape(-1, 3) if keypoints else None,
    }


def read_coco(path, folder, categories=None):
    """COCO's annotation file. Errors: UserError, no such file or folder, or no JSON."""
    if not os.path.isdir(folder):
        raise UserError(f"{folder}: no such folder of images")
    try:
        with open(path) as file:
            content = json.load(file)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path}: not a JSON file ({error})") from None
    return CocoData(content, folder, path, categories)


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
    images, annotations = [], []
    for year, split in sets:
        folder = f"VOC{year}"
        path = os.path.join(root, folder, "ImageSets", "Main", f"{split}.txt")
        if not os.path.exists(path):
            raise UserError(f"{path}: no such file; --data must be {HELP['voc']}")
        with open(path) as file:
            names = file.read().split()
        for name in names:
            xml_path = os.path.join(root, folder, "Annotations", f"{name}.xml")
            try:
                tree = xml.etree.ElementTree.parse(xml_path)
                width, height = (int(tree.findtext(f"size/{side}")) for side in ("width", "height"))
                for thing in tree.findall("object"):
                    sides = ("xmin", "ymin", "xmax", "ymax")
                    left, top, right, bottom = (float(thing.findtext(f"bndbox/{side}")) for side in sides)
                    annotations.append(
                        {
                            "image_id": len(images) + 1,
                            "category_id": VOC_CLASSES.index(thing.findtext("name")) + 1,
                            "bbox": [left - 1, top - 1, right - left + 1, bottom - top + 1],
                            "difficult": int(thing.findtext("difficult") or 0),
                        }
                    )
            except (OSError, xml.etree.ElementTree.ParseError, TypeError, ValueError) as error:
                raise UserError(f"{xml_path}: cannot be read as an annotation of VOC ({error})") from None
            file_name = f"{folder}/JPEGImages/{name}.jpg"
            images.append({"id": len(images) + 1, "file_name": file_name, "width": width, "height": height})
    categories = [{"id": number, "name": name} for number, name in enumerate(VOC_CLASSES, 1)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    return CocoData(content, root, f"VOC {' + '.join(' '.join(part) for part in sets)}")


class CityscapesData(CocoData):
    """Cityscapes' fine annotations, masks from the instance maps. OFFICIAL: F9. detectron2 draws them from polygons.

    A map holds 1000 x label + number for objects, and the label alone for groups, which are crowds.
    """

    def __init__(self, root, split):
        # label ids of cityscapesScripts
        names = {
            24: "person",
            25: "rider",
            26: "car",
            27: "truck",
            28: "bus",
            31: "train",
            32: "motorcycle",
            33: "bicycle",
        }
        self.folder, self.title, self.keypoints = root, f"Cityscapes {split}", []
        self.categories = [{"id": number, "name": name} for number, name in names.items()]
        self.label = {number: place for place, number in enumerate(names, 1)}
        self.images = []
        base = os.path.join(root, "leftImg8bit", split)
        for city in sorted(os.listdir(base)) if os.path.isdir(base) else []:
            for name in sorted(os.listdir(os.path.join(base, city))):
                if name.endswith("_leftImg8bit.png"):
                    file_name = os.path.join("leftImg8bit", split, city, name)
                    with Image.open(os.path.join(root, file_name)) as image:
                        width, height = image.size
                    image = {"id": len(self.images) + 1, "file_name": file_name, "width": width, "height": height}
                    self.images.append(image)
        missing = [i for i in range(len(self)) if not os.path.exists(self.truth(i))]
        if missing or not self.images:
            what = self.truth(missing[0]) if missing else base
            raise UserError(f"{what}: not there; --data must be {HELP['cityscapes']}")
        self.digest = hashlib.sha256(repr([image["file_name"] for image in self.images]).encode()).hexdigest()
        with ThreadPoolExecutor(harness.legacy.usable_cores()) as pool:
            self.has_objects = list(pool.map(lambda index: max(self.instances(index)[1]) >= 24000, range(len(self))))

    def truth(self, index):
        """Path of the instance map of an image."""
        name = self.images[index]["file_name"].replace("_leftImg8bit.png", "_gtFine_instanceIds.png")
        return os.path.join(self.folder, name.replace("leftImg8bit", "gtFine", 1))

    def instances(self, index):
        """(H, W) int32 instance map of an image, and its values among 0 and those of the eight classes."""
        try:
            with Image.open(self.truth(index)) as image:
                ids = np.asarray(image).astype(np.int32)
        except OSError as error:
            raise UserError(f"{self.truth(index)}: cannot be read ({error})") from None
        found = np.flatnonzero(np.bincount(ids.clip(0).ravel()))
        return ids, [0, *(int(i) for i in found if (i // 1000 if i >= 1000 else i) in self.label)]

    def annotations(self, index):
        ids, found = self.instances(index)
        rows = []
        for number in found[1:]:
            mask = ids == number
            ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            rows.append(
                {
                    "box": [float(xs[0]), float(ys[0]), float(xs[-1] + 1), float(ys[-1] + 1)],
                    "label": self.label[number // 1000 if number >= 1000 else number],
                    "crowd": number < 1000,
                    "difficult": False,
                    "area": float(mask.sum()),
                    "segmentation": mask,
                    "keypoints": None,
                }
            )
        return rows

    def usable(self, index, keypoints):
        return self.has_objects[index]


class SceneData(CocoData):
    """Built-in scenes number `first` to `first + count - 1`, with boxes, masks and landmarks."""

    def __init__(self, first, count, side, seed):
        from harness.scenes import CLASSES, LANDMARKS

        self.first, self.side, self.seed, self.title, self.keypoints = first, side, seed, "scenes", list(LANDMARKS)
        self.categories = [{"id": number, "name": name} for number, name in enumerate(CLASSES, 1)]
        self.images = [
            {"id": i + 1, "file_name": f"scene {first + i}", "width": side, "height": side} for i in range(count)
        ]
        self.digest = hashlib.sha256(repr((first, count, side, seed)).encode()).hexdigest()

    def scene(self, index):
        from harness.scenes import make_scene

        return make_scene(self.seed, self.first + index, self.side)

    def read(self, index):
        return Image.fromarray(self.scene(index)["image"])

    def annotations(self, index):
        scene = self.scene(index)
        return [
            {
                "box": box.tolist(),
                "label": int(label),
                "crowd": False,
                "difficult": False,
                "area": float(mask.sum()),
                "segmentation": mask,
                "keypoints": (points - [0.5, 0.5, 0]) * (points[:, 2:] > 0),  # scenes count from the pixel's corner
            }
            for box, label, mask, points in zip(
                scene["boxes"], scene["labels"], scene["masks"], scene["keypoints"], strict=True
            )
        ]

    def usable(self, index, keypoints):
        return True


def open_data(args, split, categories=None):
    """The task's data for "train" or "val". Errors: UserError, names the layout that is expected.

    Args:
        categories: val: those that the detector knows.
    """
    training = split == "train"
    if args.task == "scenes":
        data = args.data or "scenes"
        if data.partition(":")[0] != "scenes":
            raise UserError(f"--data {data}: --task scenes wants 'scenes' or 'scenes:COUNT'")
        count = 512 if data == "scenes" else len(harness.images.open_images(data, SCENE, 0))
        return SceneData(0, count, SCENE, 0) if training else SceneData(count, max(count // 4, 8), SCENE, 0)
    if args.task == "custom":
        if training:
            return read_coco(args.train_json, args.images)
        return read_coco(args.val_json, args.val_images or args.images, categories)
    if not os.path.isdir(args.data):
        raise UserError(f"--data {args.data}: no such folder; it must be {HELP[args.task]}")
    if args.task == "voc":
        years = ["2007"] if args.train_set == "07" else ["2007", "2012"]
        return read_voc(args.data, [(year, "trainval") for year in years] if training else [("2007", "test")])
    if args.task == "cityscapes":
        return CityscapesData(args.data, split)
    kind = "person_keypoints" if args.task == "coco-keypoint" else "instances"
    path, folder = (
        os.path.join(args.data, "annotations", f"{kind}_{split}2017.json"),
        os.path.join(args.data, f"{split}2017"),
    )
    if not os.path.exists(path) or not os.path.isdir(folder):
        raise UserError(f"--data {args.data}: it must be {HELP[args.task]}")
    return read_coco(path, folder, categories)


def outputs_of(args, train):
    """What the detector gives: the task's, or what objects of custom data have; and the keypoints' names."""
    outputs = args.outputs
    if args.task == "custom":
        outputs = ["boxes"]
        for name, field in (("masks", "segmentation"), ("keypoints", "keypoints")):
            have, objects = train.count(field)
            print0(f"{train.title}: {have} of {objects} objects have {name}")
            outputs += [name] if have else []
    if args.model == "c4" and "keypoints" in outputs:
        print0("no keypoints are learned: there is no such head on C4")
        outputs = [name for name in outputs if name != "keypoints"]
    return outputs, train.keypoints if "keypoints" in outputs else []


# ======================================================================================================================
# Training images: resize, flip; and their order
# ======================================================================================================================


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


def move_objects(rows, size, new_size, flip, order):
    """Bring an image's objects along when it is resized and then flipped.

    Args:
        rows: as `CocoData.annotations` gives them, without crowds. size, new_size: (height, width). flip: bool.
        order: as `flip_order` gives it.
    Returns:
        dict of boxes (G, 4) float32, clipped to the image; labels (G,) int64; masks, a list of G, see `move_mask`;
        keypoints (G, n, 3) float32, pixel centres at .5, those that left the image invisible. Objects whose box or bitmap
        is empty by then are gone.
    """
    (height, width), (new_height, new_width) = size, new_size
    scale = np.array([new_width / width, new_height / height])
    boxes = np.array([row["box"] for row in rows], np.float64).reshape(-1, 2, 2) * scale
    if flip:
        boxes[..., 0] = new_width - boxes[:, ::-1, 0]
    boxes = boxes.reshape(-1, 4).clip(0, [new_width, new_height, new_width, new_height])
    kept = [i for i, box in enumerate(boxes) if box[2] - box[0] > 1e-5 and box[3] - box[1] > 1e-5]
    masks = {i: move_mask(rows[i]["segmentation"], size, new_size, flip) for i in kept}
    kept = [i for i in kept if not (isinstance(masks[i], tuple) and masks[i][0].size == 0)]
    points = []
    for i in kept:
        known = rows[i]["keypoints"] is not None and len(order)
        moved = rows[i]["keypoints"].copy() if known else np.zeros((len(order), 3))
        moved[:, :2] = (moved[:, :2] + 0.5) * scale  # a keypoint names its pixel: whole numbers are pixel centres
        if flip:
            moved[:, 0] = new_width - moved[:, 0]
            moved = moved[order]
        inside = (moved[:, :2] >= 0).all(1) & (moved[:, :2] <= [new_width, new_height]).all(1)
        points.append(moved * (inside & (moved[:, 2] > 0))[:, None])
    return {
        "boxes": torch.tensor(boxes[kept], dtype=torch.float32),
        "labels": torch.tensor([rows[i]["label"] for i in kept], dtype=torch.int64),
        "masks": [masks[i] for i in kept],
        "keypoints": torch.tensor(np.array(points).reshape(len(kept), len(order), 3), dtype=torch.float32),
    }


def move_mask(segmentation, size, new_size, flip):
    """A mask after resizing and flipping: polygons stay polygons, everything else becomes its part that is not empty.

    Returns:
        None, a list of flat float arrays, or (uint8 array, left, top): the bitmap inside its own extent, in pixels.
    """
    from pycocotools import mask as rle

    if segmentation is None:
        return None
    if isinstance(segmentation, list):
        moved = [part.reshape(-1, 2) * [new_size[1] / size[1], new_size[0] / size[0]] for part in segmentation]
        if flip:
            moved = [part * [-1, 1] + [new_size[1], 0] for part in moved]
        return [part.ravel() for part in moved]
    bitmap = rle.decode(segmentation) if isinstance(segmentation, dict) else segmentation.astype(np.uint8)
    bitmap = np.asarray(Image.fromarray(bitmap).resize(new_size[::-1], Image.NEAREST))
    bitmap = bitmap[:, ::-1] if flip else bitmap
    ys, xs = np.flatnonzero(bitmap.any(1)), np.flatnonzero(bitmap.any(0))
    top, bottom, left, right = (ys[0], ys[-1] + 1, xs[0], xs[-1] + 1) if len(ys) else (0, 0, 0, 0)
    return np.ascontiguousarray(bitmap[top:bottom, left:right]), int(left), int(top)


def to_tensor(image):
    """PIL RGB -> uint8 (3, H, W)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


class TrainingImages(torch.utils.data.Dataset):
    """self[epoch, index] -> (uint8 (3, H, W), targets of `move_objects`, index, unreadable neighbours passed over).

    One of the short sides and the flip are drawn for each (seed, epoch, index); no other augmentation, as in detectron2.
    """

    def __init__(self, data, args, seed, outputs):
        self.data, self.short_sides, self.max_side, self.seed = data, args.short_sides, args.max_side, seed
        self.order, self.outputs = flip_order(data.keypoints), outputs
        self.usable = np.array([i for i in range(len(data)) if data.usable(i, args.task == "coco-keypoint")])
        if not len(self.usable):
            raise UserError(f"{data.title}: no image with an object to train on")

    def __len__(self):
        return len(self.usable)

    def name(self, index):
        return self.data.images[self.usable[index]]["file_name"]

    def wide(self):
        """(images,) bool: wider than high."""
        return np.array([self.data.images[i]["width"] > self.data.images[i]["height"] for i in self.usable])

    def __getitem__(self, key):
        epoch, index = key
        for passed in range(harness.images.TRIES):
            place = int(self.usable[(index + passed) % len(self)])
            try:
                image = self.data.read(place)
                break
            except OSError:
                continue
        else:
            return (
                torch.zeros(3, 64, 64, dtype=torch.uint8),
                move_objects([], (1, 1), (1, 1), False, []),
                index,
                passed + 1,
            )
        rng = common.generator("views", self.seed, epoch, index)
        short_side = self.short_sides[int(torch.randint(len(self.short_sides), (1,), generator=rng))]
        flip = bool(torch.rand(1, generator=rng) < 0.5)
        size = image.height, image.width
        new_size = resized(*size, short_side, self.max_side)
        image = image.resize(new_size[::-1], Image.BILINEAR)  # PIL's is anti-aliased; torchvision's own is not
        image = image.transpose(Image.FLIP_LEFT_RIGHT) if flip else image
        rows = [row for row in self.data.annotations(place) if not row["crowd"]]
        target = move_objects(rows, size, new_size, flip, self.order)
        target = {name: value for name, value in target.items() if name in ("labels", *self.outputs)}
        return to_tensor(image), target, index, passed


def collate(batch):
    """Images of different sizes stay a list."""
    images, targets, index, passed = zip(*batch, strict=True)
    return list(images), list(targets), torch.tensor(index), torch.tensor(passed)


class GroupedBatches(torch.utils.data.Sampler):
    """This process's batches from step `start` to `stop`, each of wide images alone or of the others, as (epoch, index).

    OFFICIAL: F4. As in detectron2: processes take turns in one endless shuffled stream, and each fills two baskets of its
    own. All a function of (seed, rank, world), replayed from the beginning when a run is resumed.
    """

    def __init__(self, wide, share, world, seed, start, stop):
        self.wide, self.share, self.world, self.seed, self.start, self.stop = wide, share, world, seed, start, stop

    def __len__(self):
        return self.stop - self.start

    def __iter__(self):
        step, position, current, baskets = 0, self.world.rank, None, {True: [], False: []}
        while step < self.stop:
            epoch, place = divmod(position, len(self.wide))
            if epoch != current:
                rng = common.generator("order", self.seed, epoch)
                order, current = torch.randperm(len(self.wide), generator=rng).tolist(), epoch
            basket = baskets[bool(self.wide[order[place]])]
            basket.append((epoch, order[place]))
            position += self.world.size
            if len(basket) == self.share:
                if step >= self.start:
                    yield list(basket)
                basket.clear()
                step += 1


# ======================================================================================================================
# The detector: torchvision's parts, and small classes where detectron2 computes something else
# ======================================================================================================================


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
        """[(A, 4)] for each image. torchvision guesses the stride from the padded size, and may be a pixel off."""
        self.set_cell_anchors(torch.float32, maps[0].device)
        anchors = torch.cat(self.grid_anchors([x.shape[-2:] for x in maps], [(s, s) for s in self.strides]))
        return [anchors] * len(images.image_sizes)


class FloatRPNHead(RPNHead):
    """torchvision's. DEVIATION: F12. With fp32 outputs: boxes of a thousand pixels have no room in bf16."""

    def forward(self, x):
        return tuple([y.float() for y in outputs] for outputs in super().forward(x))


class RPN(RegionProposalNetwork):
    """torchvision's region proposals, with detectron2's loss."""

    def compute_loss(self, objectness, pred_bbox_deltas, labels, regression_targets):
        """Binary cross-entropy of the sampled anchors and L1 of the positive ones, both over 256 for each image, however
        many were there to sample; torchvision has smooth L1 with beta 1/9, over the number sampled.

        Args:
            objectness (N A, 1), pred_bbox_deltas (N A, 4); labels, regression_targets: N of (A,) and (A, 4).
        """
        positive, negative = (torch.cat(picked).bool() for picked in self.fg_bg_sampler(labels))
        sampled = positive | negative
        total = self.fg_bg_sampler.batch_size_per_image * len(labels)
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
        maps = list(maps.values())[: len(self.strides)]
        rois = torch.cat([F.pad(box, (1, 0), value=i) for i, box in enumerate(boxes)])  # (R, 5): image, box
        sides = ((rois[:, 3] - rois[:, 1]) * (rois[:, 4] - rois[:, 2])).sqrt()
        first, last = (round(math.log2(stride)) for stride in (self.strides[0], self.strides[-1]))
        levels = (4 + torch.log2(sides / 224 + 1e-8)).floor().clamp(first, last) - first  # (R,) FPN's Eq. 1
        order, parts = [], []
        for level, (x, stride) in enumerate(zip(maps, self.strides, strict=True)):
            here = (levels == level).nonzero().squeeze(1)
            parts.append(ops.roi_align(x, rois[here], self.size, 1 / stride, sampling_ratio=0, aligned=True))
            order.append(here)
        pooled = torch.cat(parts)[torch.cat(order).argsort()] if len(maps) > 1 else parts[0]
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

    DEVIATION: F11. torchvision's has boxes of the background, too; nothing reads them.
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
    """Transposed convolution, ReLU, 1x1: twice the side, one map a class; weights and biases start as in detectron2."""
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
    return F.cross_entropy(scores, labels), F.smooth_l1_loss(own, wanted[foreground], reduction="sum", beta=beta) / len(
        labels
    )


def mask_targets(masks, boxes, size):
    """What the mask head should say: objects inside boxes, on a grid, binary.

    OFFICIAL: F10. Polygons are drawn on the grid itself; a bitmap is pooled onto it (aligned RoIAlign) and cut at one half.

    Args:
        masks: R of what `move_mask` gives. boxes: (R, 4) on the CPU. size: S.
    Returns:
        float32 (R, S, S), zeros and ones.
    """
    from pycocotools import mask as rle

    targets = torch.zeros(len(masks), size, size)
    for target, mask, box in zip(targets, masks, boxes, strict=True):
        if isinstance(mask, list):
            x0, y0, x1, y1 = box.double().tolist()
            scale = size / np.maximum([x1 - x0, y1 - y0], 0.1)
            parts = [((part.reshape(-1, 2) - [x0, y0]) * scale).ravel().tolist() for part in mask]
            target += torch.from_numpy(rle.decode(rle.merge(rle.frPyObjects(parts, size, size))))
        else:
            bitmap, left, top = mask
            bitmap = F.pad(torch.from_numpy(bitmap)[None, None].float(), (1, 1, 1, 1))  # around it there is nothing
            box = box[None].float() - torch.tensor([left - 1.0, top - 1.0]).repeat(2)
            target += ops.roi_align(bitmap, [box], size, sampling_ratio=0, aligned=True)[0, 0] >= 0.5
    return targets


class RoIHeads(stock.RoIHeads):
    """torchvision's sampling of RoIs and cleaning of detections, with detectron2's losses and one res5 for all C4 heads.

    The heads are attributes: box_head and box_predictor; mask_head (None on C4: the mask predictor shares the box head's
    maps), mask_predictor; keypoint_head, keypoint_predictor. A predictor that is None is not there.
    """

    def forward(self, maps, proposals, image_sizes, targets=None):
        """
        Args:
            maps: dict of (N, C, ., .). proposals: N of (R_n, 4). image_sizes: N of (H, W).
            targets: training: N dicts of boxes, labels, masks (lists, see `move_mask`), keypoints.
        Returns:
            training: dict of losses, RoIs of the foreground; else N dicts of boxes, scores, labels, masks (R_n, S, S) in
            [0, 1], keypoints (R_n, n, 3).
        """
        if self.training:
            proposals, matches, labels, wanted = self.select_training_samples(proposals, targets)
        shared = self.box_head(self.box_roi_pool(maps, proposals))
        scores, deltas = self.box_predictor(shared)
        if self.training:
            losses = box_losses(scores, deltas, torch.cat(labels), torch.cat(wanted), self.box_beta)
            losses = dict(zip(("loss_class", "loss_box"), losses, strict=True))
            foreground = [label.nonzero().squeeze(1) for label in labels]
            count = sum(map(len, foreground))
            boxes = [box[here] for box, here in zip(proposals, foreground, strict=True)]
            classes = torch.cat([label[here] for label, here in zip(labels, foreground, strict=True)])
            owners = [match[here] for match, here in zip(matches, foreground, strict=True)]
            starts = np.cumsum([0, *map(len, proposals)])[:-1].tolist()
            rows = torch.cat([start + here for start, here in zip(starts, foreground, strict=True)])
        else:
            boxes, scores, labels = self.postprocess_detections(scores, deltas, proposals, image_sizes)
            found = [{"boxes": b, "scores": s, "labels": n} for b, s, n in zip(boxes, scores, labels, strict=True)]
            classes, rows = torch.cat(labels), None

        if self.mask_predictor is not None:
            logits = self.mask_predictor(self.mask_maps(maps, boxes, shared, rows)).float()  # (R, K + 1, S, S)
            logits = logits[torch.arange(len(classes), device=classes.device), classes]
            if self.training:
                masks = [
                    target["masks"][i] for target, owner in zip(targets, owners, strict=True) for i in owner.tolist()
                ]
                known = [i for i, mask in enumerate(masks) if mask is not None]  # some custom objects have boxes alone
                masks, corners = [masks[i] for i in known], torch.cat(boxes)[known].cpu()
                truth = mask_targets(masks, corners, logits.shape[-1]).to(logits.device)
                loss = F.binary_cross_entropy_with_logits(logits[known], truth) if known else 0 * logits.sum()
                losses["loss_mask"] = loss
            else:
                for one, mask in zip(found, logits.sigmoid().split([len(box) for box in boxes]), strict=True):
                    one["masks"] = mask
        if self.keypoint_predictor is not None:
            logits = self.keypoint_predictor(self.keypoint_head(self.keypoint_roi_pool(maps, boxes))).float()
            logits = logits.contiguous()  # (R, n, S, S); torchvision's loss takes views of it
            if self.training:
                points = [target["keypoints"] for target in targets]
                losses["loss_keypoint"] = stock.keypointrcnn_loss(logits, boxes, points, owners)
            else:
                for one, part, box in zip(found, logits.split([len(box) for box in boxes]), boxes, strict=True):
                    one["keypoints"] = stock.heatmaps_to_keypoints(part, box)[0]
        return (losses, count) if self.training else found

    def mask_maps(self, maps, boxes, shared, rows):
        """What the mask predictor sees. OFFICIAL: F14. On C4 the box head's own maps in training; in testing res5 runs
        again on the final boxes."""
        if self.mask_head is not None:
            return self.mask_head(self.mask_roi_pool(maps, boxes))
        return shared[rows] if self.training else self.box_head(self.box_roi_pool(maps, boxes))


class Detector(nn.Module):
    """Backbone, region proposals, RoI heads: modules and names as in torchvision's GeneralizedRCNN.

    Args:
        backbone: images -> dict of maps. divisor: the batch is padded to a multiple of it. frozen: modules that keep
        their weights and their batch statistics.
    """

    def __init__(self, backbone, rpn, roi_heads, divisor, frozen):
        super().__init__()
        self.backbone, self.rpn, self.roi_heads, self.divisor = backbone, rpn, roi_heads, divisor
        self.frozen = frozen  # names, so that converting modules to synchronised ones cannot leave old ones here
        for module in self.frozen_modules():
            module.requires_grad_(False)

    def frozen_modules(self):
        return [self.get_submodule(name) for name in self.frozen]

    def train(self, mode=True):
        """As always, but what is frozen stays in evaluation mode: its batch statistics do not move."""
        super().train(mode)
        for module in self.frozen_modules():
            module.eval()
        return self

    def forward(self, images, targets=None):
        """
        Args:
            images: N of uint8 (3, H_n, W_n). targets: N dicts, see RoIHeads; wanted in training mode.
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
        values = {name: value.detach() for name, value in losses.items()}
        return loss, {"loss": loss.detach(), **values, "foreground": loss.new_tensor(found[1] / len(images))}


def build_detector(args, classes, outputs, keypoints):
    """The task's detector, heads at their random start, pre-trained weights loaded.

    Args:
        classes: K. outputs: of "boxes", "masks", "keypoints". keypoints: how many.
    Returns:
        (Detector on the CPU, lines that say what was taken from files)
    """
    norm = nn.BatchNorm2d
    trunk, lines = common.ResNetTrunk(args.arch), [f"backbone: {args.arch} at random"]
    if args.weights != "random":
        state, line = harness.weights.load_backbone(args.weights, args.arch)
        trunk.load_state_dict(state)
        lines = [line]
    # DEVIATION: F1. Nothing is frozen by default; released COCO files froze C2. AMBIGUOUS: F7. --freeze-backbone: C1 to C4.
    frozen = ["conv1", "bn1", "layer1", "layer2", "layer3", "layer4"][: args.freeze_at and args.freeze_at + 1]
    if args.model == "c4":
        backbone, head = IntermediateLayerGetter(trunk, {"layer3": "c4"}), C4Head(trunk.layer4, trunk.widths[3])
        places = {"layer4": "roi_heads.box_head.layer4"}
        anchors, divisor = Anchors([[32, 64, 128, 256, 512]], [16]), 1  # OFFICIAL: F13. no padding to a multiple
        channels, box_pool, box_width = trunk.widths[2], AlignedRoIPool([16], 14), trunk.widths[3]
        before, after = dict(training=12000, testing=6000), dict(training=2000, testing=1000)
    else:
        stages = {f"layer{level - 1}": f"p{level}" for level in (2, 3, 4, 5)}
        backbone = BackboneWithFPN(trunk, stages, trunk.widths, 256, norm_layer=norm)
        if args.fpn_weights:
            lines.append(load_fpn(backbone.fpn, args.fpn_weights))
        places, channels, box_width = {name: f"backbone.body.{name}" for name in frozen}, 256, 1024
        anchors, divisor = Anchors([[32], [64], [128], [256], [512]], [4, 8, 16, 32, 64]), 32
        strides = [4, 8, 16, 32]
        box_pool = AlignedRoIPool(strides, 7)
        if args.heads == "4conv1fc":
            head = FastRCNNConvFCHead((256, 7, 7), [256] * 4, [1024], norm_layer=norm)
        else:
            head = TwoMLPHead(256 * 7 * 7, 1024)
        for layer in (module for module in head.modules() if isinstance(module, nn.Linear)):
            nn.init.kaiming_uniform_(layer.weight, a=1)
            nn.init.zeros_(layer.bias)
        before, after = (
            dict(training=2000, testing=1000),
            dict(training=args.post_nms, testing=min(args.post_nms, 1000)),
        )

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
    frozen = [places.get(name, f"backbone.{name}") for name in frozen]
    return Detector(backbone, rpn, roi_heads, divisor, frozen), lines


def load_fpn(fpn, source):
    """Copy a pre-trained pyramid into a detector's, and say what had no place: biases, where norms follow.

    Understood are `fpn.pth` and `checkpoint.pth` of resim.py (torchvision's names), released ReSim-FPN checkpoints
    (fpn_lateral3 to 5, fpn_output3 and 4, with or without norms) and SoCo's (neck.lateral_convs, neck.fpn_convs with
    their norms).

    Errors:
        UserError: no pyramid in the file, laterals of C3 to C5 missing, another width, not finite.
    """
    found = harness.weights.load_checkpoint_file(source)
    for container in ("state_dict", "model", "model_ema"):
        found = found.get(container, found) if isinstance(found, dict) else {}
    theirs = {}
    for name, tensor in found.items():
        if "encoder_k" in name or name.startswith("key.") or not isinstance(tensor, torch.Tensor):
            continue
        ours = re.search(r"(inner_blocks|layer_blocks)\.\d\.[01]\.\w+$", name)
        resim = re.search(r"fpn_(lateral|output)(\d)\.(?:([01])\.)?(\w+)$", name)
        soco = re.search(r"neck\.(lateral|fpn)_convs\.(\d)\.(conv|bn)\.(\w+)$", name)
        if ours:
            theirs[ours[0]] = tensor
        elif resim:
            block = "inner_blocks" if resim[1] == "lateral" else "layer_blocks"
            theirs[f"{block}.{int(resim[2]) - 2}.{resim[3] or 0}.{resim[4]}"] = tensor
        elif soco:
            block = "inner_blocks" if soco[1] == "lateral" else "layer_blocks"
            theirs[f"{block}.{soco[2]}.{int(soco[3] == 'bn')}.{soco[4]}"] = tensor
    ours = fpn.state_dict()
    taken = {name: tensor for name, tensor in theirs.items() if name in ours}
    if not taken:
        raise UserError(f"{source}: there is no pyramid in it (inner_blocks, fpn_lateral or neck.lateral_convs)")
    absent = [f"inner_blocks.{level}.0.weight" for level in (1, 2, 3) if f"inner_blocks.{level}.0.weight" not in taken]
    if absent:
        raise UserError(f"{source}: not a whole pyramid, {', '.join(absent)} (laterals of C3 to C5) are missing")
    for name, tensor in taken.items():
        if tensor.shape != ours[name].shape:
            raise UserError(f"{source}: {name} is {tuple(tensor.shape)}, the detector's is {tuple(ours[name].shape)}")
        if not tensor.isfinite().all():
            raise UserError(f"{source}: {name} is not finite")
    fpn.load_state_dict(taken, strict=False)
    homeless = sorted(theirs.keys() - taken.keys())
    line = f"pyramid: {', '.join(sorted(taken))} from {source}"
    return line + (f"; no place in the detector (norms have its biases) for {', '.join(homeless)}" if homeless else "")


# ======================================================================================================================
# Precise batch norm
# ======================================================================================================================


@torch.no_grad()
def precise_bn(model, batches, forward):
    """Give every batch norm that is in training mode the statistics of its inputs over all batches and processes.

    OFFICIAL: F5. As fvcore does it now, every element counts alike; here over the images of all processes.

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
        total = totals[norm]
        if dist.is_initialized():
            dist.all_reduce(total)
        if total[0, 0] == 0:  # no batch came, or it was never used
            continue
        mean = total[1] / total[0]
        variance = (total[2] / total[0] - mean**2).clamp(min=0) * total[0] / (total[0] - 1)
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)


# ======================================================================================================================
# Detections: a network's output for an image as COCO results
# ======================================================================================================================


class TestImages(torch.utils.data.Dataset):
    """self[index] -> (index, uint8 (3, H, W) at the test size, (height, width) of the original); (index, None, why) where
    an image cannot be read."""

    def __init__(self, data, indices, test_side, max_side):
        self.data, self.indices, self.test_side, self.max_side = data, indices, test_side, max_side

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, place):
        index = self.indices[place]
        try:
            image = self.data.read(index)
        except OSError as error:
            return index, None, str(error)
        size = image.height, image.width
        new_size = resized(*size, self.test_side, self.max_side)
        return index, to_tensor(image.resize(new_size[::-1], Image.BILINEAR)), size


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
    here = F.grid_sample(mask[None, None], grid, align_corners=False)[0, 0] >= 0.5
    pasted = np.zeros((height, width), np.uint8)
    pasted[top:bottom, left:right] = here.numpy()
    return pasted


@torch.no_grad()
def detect(model, image, size):
    """One image's detections, in pixels of the original.

    Args:
        model: Detector in evaluation mode. image: uint8 (3, H, W). size: (height, width) of the original.
    Returns:
        list of dicts: label (1..K), score, box [x0, y0, x1, y1], segmentation (COCO RLE) and keypoints [x, y, 1, ...]
        (pixel centres are whole numbers) where the model gives them; best first.
    """
    from pycocotools import mask as rle

    (height, width), (new_height, new_width) = size, image.shape[-2:]
    found = {name: value.float().cpu() for name, value in model([image])[0].items()}
    scale = torch.tensor([width / new_width, height / new_height])
    boxes = ops.clip_boxes_to_image(found["boxes"] * scale.repeat(2), size)
    detections = []
    for i in (ops.box_area(boxes) > 0).nonzero().squeeze(1).tolist():
        one = {"label": int(found["labels"][i]), "score": float(found["scores"][i]), "box": boxes[i].tolist()}
        if "masks" in found:
            code = rle.encode(np.asfortranarray(paste_mask(found["masks"][i], one["box"], height, width)))
            one["segmentation"] = {"size": code["size"], "counts": code["counts"].decode("ascii")}
        if "keypoints" in found:
            points = found["keypoints"][i]
            points[:, :2] = points[:, :2] * scale - 0.5
            one["keypoints"] = points.flatten().tolist()
        detections.append(one)
    return detections


def detect_all(model, data, args, world):
    """{index: detections} of all images of `data`, each process taking its share; equal on all processes."""
    model.eval()
    if world.size > 1:  # on CPUs each process has its own running statistics: the first one's, which are saved, count
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
    images = TestImages(data, range(world.rank, len(data), world.size), args.test_side, args.max_side)
    loader = torch.utils.data.DataLoader(
        images, batch_size=None, num_workers=args.workers, worker_init_fn=harness.images.detach_worker
    )
    found = {}
    for index, image, size in harness.pictures.progress(loader, len(images)) if world.rank == 0 else loader:
        found[index] = [] if image is None else detect(model, image.to(world.device), size)
        if image is None:
            print(
                f"cannot be read, counts as without detections: {data.images[index]['file_name']} ({size})", flush=True
            )
    parts = [found]
    if world.size > 1:
        parts = [None] * world.size
        dist.all_gather_object(parts, found)
    return {index: one for part in parts for index, one in part.items()}


def coco_results(images, categories, found):
    """Detections, {index: as `detect` gives them}, as COCO's list of results: image_id, category_id, bbox [x, y, width,
    height], score, ..."""
    results = []
    for index in sorted(found):
        for one in found[index]:
            x0, y0, x1, y1 = one["box"]
            result = {"image_id": images[index]["id"], "category_id": categories[one["label"] - 1]["id"]}
            result |= {"bbox": [x0, y0, x1 - x0, y1 - y0], "score": one["score"]}
            results.append(result | {k: one[k] for k in ("segmentation", "keypoints") if k in one})
    return results


# ======================================================================================================================
# Evaluation, in percent
# ======================================================================================================================

THRESHOLDS = [0.5 + 0.05 * i for i in range(10)]


def summary(per_class):
    """AP (mean over classes and thresholds), AP50, AP75, and AP at each threshold, percent.

    Args:
        per_class: (thresholds, K) in [0, 1]; nan where a class does not occur.
    """
    per_class = np.asarray(per_class, np.float64)
    if np.isnan(per_class).all():
        by_threshold = np.full(len(per_class), np.nan)
    else:
        by_threshold = 100 * np.nanmean(per_class, axis=1)
    curve = {f"{100 * t:.0f}": float(ap) for t, ap in zip(THRESHOLDS, by_threshold, strict=True)}
    return {"AP": float(by_threshold.mean()), "AP50": curve["50"], "AP75": curve["75"], "AP_by_IoU": curve}


# ---- Pascal VOC


def voc_ap(recall, precision):
    """VOC 2007's eleven points: the mean over recall 0, .1, ..., 1 of the best precision at that recall or more."""
    best = [precision[recall >= point].max(initial=0) for point in np.arange(0, 1.1, 0.1)]
    return float(np.mean(best))


def voc_match(detections, truth, threshold):
    """Which detections of one class are right, by VOC's rules as detectron2 follows them.

    Sorted by score, each takes the object of its image that it overlaps most (pixels counted inclusively), right if the
    overlap is more than `threshold` and the object is not taken; difficult objects make neither right nor wrong.

    Args:
        detections: list of (image, score, box). truth: {image: list of (box, difficult)}; boxes x0 y0 x1 y1 as in VOC's
        files, both ends inclusive.
    Returns:
        (right, wrong): bool arrays, best score first.
    """
    order = np.argsort([-score for _, score, _ in detections], kind="stable")
    right, wrong, taken = np.zeros(len(order), bool), np.zeros(len(order), bool), set()
    for place, number in enumerate(order):
        image, _, box = detections[number]
        objects = truth.get(image, [])
        best = -1.0
        for i, (other, _) in enumerate(objects):
            sides = np.minimum(box[2:], other[2:]) - np.maximum(box[:2], other[:2]) + 1
            shared = np.prod(sides.clip(0))
            overlap = shared / (np.prod(box[2:] - box[:2] + 1) + np.prod(other[2:] - other[:2] + 1) - shared)
            if overlap > best:
                best, chosen = overlap, i
        if best <= threshold:
            wrong[place] = True
        elif not objects[chosen][1]:
            right[place] = (image, chosen) not in taken
            wrong[place] = not right[place]
            taken.add((image, chosen))
    return right, wrong


def evaluate_voc(data, found):
    """OFFICIAL: F3. detectron2's VOC evaluator: scores to three decimals, boxes to one, eleven points at every threshold."""
    per_class = np.full((len(THRESHOLDS), len(data.categories)), np.nan)
    rows = [data.annotations(index) for index in range(len(data))]
    for label in range(1, len(data.categories) + 1):
        truth = {
            index: [(np.array(row["box"]) + [1, 1, 0, 0], row["difficult"]) for row in objects if row["label"] == label]
            for index, objects in enumerate(rows)
        }
        objects = sum(not difficult for part in truth.values() for _, difficult in part)
        if objects == 0:
            continue
        detections = [
            (
                index,
                float(f"{one['score']:.3f}"),
                np.array([float(f"{x:.1f}") for x in np.array(one["box"]) + [1, 1, 0, 0]]),
            )
            for index in sorted(found)
            for one in found[index]
            if one["label"] == label
        ]
        for row, threshold in enumerate(THRESHOLDS):
            right, wrong = (np.cumsum(x) for x in voc_match(detections, truth, threshold))
            per_class[row, label - 1] = voc_ap(right / objects, right / np.maximum(right + wrong, 1e-12))
    return summary(per_class)


# ---- COCO


def coco_truth(data):
    """COCO's own object of a data set; VOC's difficult objects become crowds, which is as near as its format comes.

    Where masks are evaluated, objects without one are crowds of their box's shape: not counted either way.
    """
    from pycocotools.coco import COCO

    truth, annotations = COCO(), []
    for index, image in enumerate(data.images):
        for row in data.annotations(index):
            x0, y0, x1, y1 = row["box"]
            annotation = {"id": len(annotations) + 1, "image_id": image["id"], "area": row["area"]}
            annotation |= {"bbox": [x0, y0, x1 - x0, y1 - y0], "iscrowd": int(row["crowd"] or row["difficult"])}
            annotation["category_id"] = data.categories[row["label"] - 1]["id"]
            if row["segmentation"] is not None:
                annotation["segmentation"] = to_rle(row["segmentation"], image["height"], image["width"])
            points = row["keypoints"] if row["keypoints"] is not None else np.zeros((len(data.keypoints), 3))
            annotation["keypoints"] = points.flatten().tolist()
            annotation["num_keypoints"] = int((points[:, 2] > 0).sum())
            annotations.append(annotation)
    truth.dataset = {"images": data.images, "annotations": annotations, "categories": data.categories}
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
    return truth


def to_rle(segmentation, height, width):
    """Polygons, a bitmap or an RLE as COCO's compressed RLE."""
    from pycocotools import mask as rle

    if isinstance(segmentation, list):
        return rle.merge(rle.frPyObjects([part.tolist() for part in segmentation], height, width))
    return (
        rle.encode(np.asfortranarray(segmentation, np.uint8)) if isinstance(segmentation, np.ndarray) else segmentation
    )


def evaluate_coco(data, found, kind, truth=None):
    """COCO's AP from pycocotools.

    Args:
        kind: "bbox", "segm" or "keypoints". truth: `coco_truth(data)` if it is at hand.
    Returns:
        `summary`, and AP of small, medium and large objects where pycocotools gives it.
    """
    from pycocotools.cocoeval import COCOeval

    results = coco_results(data.images, data.categories, found)
    if not results:
        return {"AP": 0.0, "AP50": 0.0, "AP75": 0.0, "AP_by_IoU": {f"{100 * t:.0f}": 0.0 for t in THRESHOLDS}}
    truth = truth or coco_truth(data)
    if kind == "segm":  # with a box in it, the box's area would decide what counts as small
        results = [{name: value for name, value in result.items() if name != "bbox"} for result in results]
        for annotation in truth.anns.values():
            if "segmentation" not in annotation:
                x0, y0, width, height = annotation["bbox"]
                size = [truth.imgs[annotation["image_id"]][side] for side in ("height", "width")]
                corners = [x0, y0, x0 + width, y0, x0 + width, y0 + height, x0, y0 + height]
                annotation |= {"segmentation": to_rle([np.array(corners)], *size), "iscrowd": 1}
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
    return summary(per_class) | {name: 100 * float(value) for name, value in sizes.items() if value >= 0}


# ---- Cityscapes


def cityscapes_ap(matched, wrong, missed):
    """Area under the precision-recall curve in steps, every distinct score a point, as cityscapesScripts has it.

    Args:
        matched, wrong: scores of right and wrong detections. missed: number of objects that no detection matches.
    """
    scores = np.concatenate([matched, wrong])
    if not len(scores):
        return 0.0
    points = np.unique(scores)  # ascending; at each, all detections with this score or more count
    right = np.array([(matched >= point).sum() for point in points], np.float64)
    precision = right / np.array([(scores >= point).sum() for point in points])
    recall = right / max(len(matched) + missed, 1)
    precision, recall = np.append(precision, 1.0), np.append(recall, 0.0)  # the curve's artificial last point
    edges = np.concatenate([recall[:1], recall, [0.0]])
    return float((precision * (edges[:-2] - edges[2:]) / 2).sum())


def cityscapes_overlaps(ids, void, masks):
    """What the rules need to know of one image and one class.

    Args:
        ids: (H, W) instance map. void: (H, W) bool, labels that evaluation ignores. masks: list of bool (H, W), detections.
    Returns:
        list of (pixels, pixels on void, {object: shared pixels}) of each detection that is not empty, else None.
    """
    found = []
    for mask in masks:
        inside = ids[mask]
        shared = dict(zip(*(x.tolist() for x in np.unique(inside, return_counts=True)), strict=True))
        found.append((len(inside), int(void[mask].sum()), shared) if len(inside) else None)
    return found


CITYSCAPES_VOID = [0, 1, 2, 3, 4, 5, 6, 9, 10, 14, 15, 16, 18, 29, 30, -1]  # cityscapesScripts' ignoreInEval


def evaluate_cityscapes(data, found):
    """Cityscapes' instance AP and AP50: the metric of cityscapesScripts 2.3.0, which itself stops on current numpy.

    An object (1000 or more in the instance map, at least 100 pixels) is found by a detection of its class that overlaps
    it by more than the threshold; of several, all but the best are wrong. A detection without object is wrong unless more
    than the threshold's share of it lies on void, groups and small objects.
    """
    from pycocotools import mask as rle

    per_class = np.full((len(THRESHOLDS), len(data.categories)), np.nan)
    images = []  # for each: sizes of objects, and for each detection its label, score and overlaps
    for index in range(len(data)):
        ids, present = data.instances(index)
        sizes = {number: int((ids == number).sum()) for number in present[1:]}
        masks = [rle.decode(one["segmentation"]).astype(bool) for one in found[index]]
        overlaps = cityscapes_overlaps(ids, np.isin(ids, CITYSCAPES_VOID), masks)
        rows = [
            (one["label"], one["score"], *o) for one, o in zip(found[index], overlaps, strict=True) if o is not None
        ]
        images.append((sizes, rows))
    for place, category in enumerate(data.categories):
        for row, threshold in enumerate(THRESHOLDS):
            matched, wrong, missed, objects, detections = [], [], 0, 0, 0
            for sizes, rows in images:
                own = {n: size for n, size in sizes.items() if (n // 1000 if n >= 1000 else n) == category["id"]}
                real = {n: size for n, size in own.items() if n >= 1000 and size >= 100}
                rows = [r for r in rows if r[0] == place + 1]
                objects, detections = objects + len(real), detections + len(rows)

                def overlap(pixels, shared, n, own=own):
                    return shared.get(n, 0) / (own[n] + pixels - shared.get(n, 0))

                for n in real:
                    scores = sorted(r[1] for r in rows if overlap(r[2], r[4], n) > threshold)
                    missed += not scores
                    matched += scores[-1:]
                    wrong += scores[:-1]
                for _, score, pixels, on_void, shared in rows:
                    if any(overlap(pixels, shared, n) > threshold for n in own):
                        continue
                    ignored = on_void + sum(shared.get(n, 0) * ((n < 1000) + (own[n] < 100)) for n in own)
                    if ignored / pixels <= threshold:
                        wrong.append(score)
            if objects:
                scores = cityscapes_ap(np.array(matched), np.array(wrong), missed) if detections else 0.0
                per_class[row, place] = scores
    classes = {c["name"]: float(100 * ap) for c, ap in zip(data.categories, per_class.mean(0), strict=True)}
    return summary(per_class) | {"AP_by_class": {name: ap for name, ap in classes.items() if ap == ap}}


def evaluate(args, data, found, outputs):
    """{"box": {AP, ...}, "mask": ..., "keypoints": ...} of the task, percent."""
    if args.task == "cityscapes":
        return {"mask": evaluate_cityscapes(data, found)}
    truth = coco_truth(data)
    if args.task == "voc":
        # coco_style: not comparable with VOC's numbers, only a cross-check
        return {"box": evaluate_voc(data, found), "coco_style": evaluate_coco(data, found, "bbox", truth)}
    kinds = {"boxes": ("box", "bbox"), "masks": ("mask", "segm"), "keypoints": ("keypoints", "keypoints")}
    return {kinds[name][0]: evaluate_coco(data, found, kinds[name][1], truth) for name in outputs}


# ======================================================================================================================
# Pictures
# ======================================================================================================================

COLOURS = "#E69F00 #56B4E9 #009E73 #F0E442 #0072B2 #D55E00 #CC79A7 #AA4499 #88CCEE #999999".split()


def draw(image, rows, categories, longest=None):
    """An image with boxes, names (scores), masks and keypoints drawn in.

    Args:
        image: PIL RGB. rows: annotations, or detections as `detect` gives them. longest: long side of the result, pixels.
    Returns:
        PIL RGB.
    """
    scale = longest / max(image.size) if longest else 1.0
    size = max(round(image.width * scale), 1), max(round(image.height * scale), 1)
    canvas = to_tensor(image.resize(size, Image.BILINEAR))
    if not rows:
        return image.resize(size, Image.BILINEAR)
    colours = [COLOURS[(row["label"] - 1) % len(COLOURS)] for row in rows]
    masks = [row.get("segmentation") for row in rows]
    if any(mask is not None for mask in masks):
        blank = np.zeros((image.height, image.width), np.uint8)
        masks = [blank if mask is None else bitmap(mask, image.height, image.width) for mask in masks]
        masks = [np.asarray(Image.fromarray(mask).resize(size, Image.NEAREST)) for mask in masks]
        masks = torch.from_numpy(np.array(masks)).bool()
        canvas = torchvision.utils.draw_segmentation_masks(canvas, masks, alpha=0.5, colors=colours)
    boxes = torch.tensor([row["box"] for row in rows]) * scale
    names = [categories[row["label"] - 1]["name"] + (f" {row['score']:.2f}" if "score" in row else "") for row in rows]
    canvas = torchvision.utils.draw_bounding_boxes(
        canvas, boxes, names, colours, width=2, label_colors="black", fill_labels=True
    )
    for row in rows:
        points = row.get("keypoints")
        if points is not None:
            points = torch.as_tensor(np.asarray(points, np.float32)).view(-1, 3)
            points = (points[points[:, 2] > 0, :2] + 0.5) * scale
            canvas = torchvision.utils.draw_keypoints(canvas, points[None], colors="white", radius=3)
    return Image.fromarray(canvas.permute(1, 2, 0).numpy())


def bitmap(segmentation, height, width):
    """Polygons, a bitmap or an RLE as a uint8 array (H, W)."""
    from pycocotools import mask as rle

    return rle.decode(to_rle(segmentation, height, width))


def confident(rows):
    """The detections worth drawing: scores of at least one half, or else the best one."""
    return [row for row in rows if row["score"] >= 0.5] or rows[:1]


def draw_predictions(data, found, path, count=6):
    """`path`: the first images with objects, truth above and detections below."""
    columns = []
    for index in range(len(data)):
        if len(columns) == count:
            break
        truth = data.annotations(index)
        if truth:
            with contextlib.suppress(OSError):
                image = data.read(index)
                columns.append([draw(image, rows, data.categories, 400) for rows in (truth, confident(found[index]))])
    height = max((column[0].height for column in columns), default=0) + 10
    sheet = Image.new("RGB", (410 * len(columns) + 10, 2 * height + 10), "white")
    for place, column in enumerate(columns):
        for row, picture in enumerate(column):
            sheet.paste(picture, (410 * place + 10, height * row + 10))
    sheet.save(path)


def predict(args, model, categories, world):
    """Draw detections on every image below --predict; `results.json` has them in COCO's format, `images.json` the ids."""
    names = harness.images.list_images(args.predict, "--predict")
    folder = os.path.join(args.output_dir, "predictions")
    images, all_found = [], {}
    for name in harness.pictures.progress(names, len(names)):
        try:
            image = harness.images.read_image(os.path.join(args.predict, name))
        except OSError as error:
            print0(f"unreadable, passed over: {name} ({error})")
            continue
        size = image.height, image.width
        new_size = resized(*size, args.test_side, args.max_side)
        found = detect(model, to_tensor(image.resize(new_size[::-1], Image.BILINEAR)).to(world.device), size)
        all_found[len(images)] = found
        images.append({"id": len(images) + 1, "file_name": name, "width": image.width, "height": image.height})
        path = os.path.join(folder, f"{name}.png")
        os.makedirs(os.path.dirname(path), exist_ok=True)
        draw(image, confident(found), categories).save(path)
    results = coco_results(images, categories, all_found)
    for name, content in (("results", results), ("images", {"images": images, "categories": categories})):
        with open(os.path.join(folder, f"{name}.json"), "w") as file:
            json.dump(content, file)
    print0(f"{folder}: {len(images)} pictures, results.json with {len(results)} detections, images.json")


# ======================================================================================================================
# Training
# ======================================================================================================================

CURVES = {"loss": ["loss"], "proposals": ["loss_objectness", "loss_rpn_box_reg"], "foreground RoIs": ["foreground"]}
CURVES |= {"heads": ["loss_class", "loss_box", "loss_mask", "loss_keypoint"]}


def plan(args):
    """The schedule in batches of --batch-size, by the linear rule: iterations, drops, warm-up, and the learning rate."""
    batch = args.protocol["batch_size"]
    stretch, part = batch / args.batch_size, args.iterations / args.protocol["iterations"]
    return {
        "iterations": max(round(args.iterations * stretch), 1),
        "drops": [round(drop * part * stretch) for drop in args.protocol["drops"]],
        "warmup": round(args.protocol["warmup"] * min(part, 1) * stretch),
        "lr": args.lr * args.batch_size / batch,
    }


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


def protocol_name(args, outputs):
    """The line that a result carries: the protocol, and every number of it that was changed."""
    task = {
        "voc": f"VOC {args.train_set}",
        "coco": "COCO",
        "coco-keypoint": "COCO keypoints",
        "cityscapes": "Cityscapes",
    }
    kinds = [kind for kind, output in (("Mask", "masks"), ("Keypoint", "keypoints")) if output in outputs] or ["Faster"]
    name = f"{task.get(args.task, args.task)}, {' and '.join(kinds)} R-CNN {args.arch.replace('resnet', 'R')}-{args.model.upper()}"
    name += f", {args.schedule}" if args.task.startswith("coco") else ""
    if args.model == "fpn" and args.task in ("coco", "coco-keypoint", "cityscapes"):
        name += f", protocol {'A' if args.heads == 'plain' else 'B'}"
    elif args.heads != "plain":
        name += f", heads {args.heads}"
    name += f", frozen to C{args.freeze_at}" if args.freeze_at else ""
    name += ", small heads" if args.task == "scenes" else ""
    changed = [
        f"{key} {getattr(args, key)}"
        for key in ("batch_size", "iterations", "lr", "short_sides", "test_side", "max_side", "precise_bn")
        if getattr(args, key) != args.protocol[key]
    ]
    changed += [f"weight_decay {args.weight_decay}"] if args.weight_decay != 1e-4 else []
    changed += [f"amp {args.amp}"] if args.amp != "none" else []
    return name + (f"; changed: {', '.join(changed)}" if changed else "")


def protocol_table(args, model, outputs):
    """{row: text}: the protocol: schedule and images from the settings, all else read off the model as built."""
    schedule, rpn, heads = plan(args), model.rpn, model.roi_heads
    lr = [schedule["lr"], schedule["warmup"], schedule["drops"]]
    steps = [0, schedule["warmup"] // 2, schedule["warmup"], *schedule["drops"]]
    norms = {name: m for name, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    decayed, free = (group["params"] for group in parameter_groups(model, args.weight_decay))
    places = {"backbone": "", "backbone.fpn": "", "roi_heads": ""}
    for place in places:
        inside = [name for name in norms if name.startswith(place) and not (place == "backbone" and ".fpn." in name)]
        trained = [name for name in inside if norms[name].training]
        places[place] = f"{place} {len(trained)} trained, {len(inside) - len(trained)} frozen"
    anchors = rpn.anchor_generator
    # The losses of an error of 0.1 in one number of one of two boxes tell which losses they are.
    error, none = torch.tensor([[0.1, 0, 0, 0], [0, 0, 0, 0]]), torch.zeros(2, 4)
    rpn_loss = rpn.compute_loss(torch.zeros(2, 1), error, [torch.ones(2)], [none])[1]
    box_loss = box_losses(torch.zeros(2, 2), error.repeat(1, 2), torch.tensor([1, 1]), none, heads.box_beta)[1]
    table = {
        "protocol": protocol_name(args, outputs),
        "gives": " ".join(outputs),
        "batch": f"{args.batch_size} images",
        "iterations": f"{schedule['iterations']}, drops at {schedule['drops']}, warm-up {schedule['warmup']}",
        "learning rate": ", ".join(f"{learning_rate(step, *lr):.6g} at {step}" for step in steps),
        "momentum": f"{MOMENTUM}",
        "weight decay": f"{args.weight_decay:g} on {len(decayed)} tensors, 0 on {len(free)} of norms",
        "images": f"short side {args.short_sides}, testing {args.test_side}, long side at most {args.max_side}; "
        f"padded to a multiple of {model.divisor}",
        "anchors": f"sizes {[list(size) for size in anchors.sizes]}, strides {anchors.strides}, "
        f"{anchors.num_anchors_per_location()[0]} a cell",
        "proposals": f"{rpn._pre_nms_top_n['training']}/{rpn._pre_nms_top_n['testing']} before, "
        f"{rpn._post_nms_top_n['training']}/{rpn._post_nms_top_n['testing']} after NMS {rpn.nms_thresh} (training/testing)",
        "RoIs": f"{heads.fg_bg_sampler.batch_size_per_image} an image, {heads.fg_bg_sampler.positive_fraction} foreground, "
        f"IoU {heads.proposal_matcher.high_threshold}; detections above {heads.score_thresh}, NMS {heads.nms_thresh}, "
        f"at most {heads.detections_per_img}",
        "losses": f"an error of 0.1 costs the RPN {256 * rpn_loss:.3g} / 256, the box head {2 * box_loss:.3g} / RoIs",
        "pooling": f"boxes {heads.box_roi_pool.size} on strides {heads.box_roi_pool.strides}",
        "box head": describe(heads.box_head),
        "mask head": "none",
        "keypoint head": "none",
        "frozen": ", ".join(model.frozen) or "nothing",
        "batch norms": "; ".join(places.values()),
        "precise BN": f"{args.precise_bn} batches",
    }
    if heads.mask_predictor is not None:
        head = (
            "the box head's maps"
            if heads.mask_head is None
            else f"{heads.mask_roi_pool.size}, {describe(heads.mask_head)}"
        )
        table["mask head"] = f"{head}, {describe(heads.mask_predictor)}"
    if heads.keypoint_predictor is not None:
        head = f"{heads.keypoint_roi_pool.size}, {describe(heads.keypoint_head)}"
        table["keypoint head"] = f"{head}, {describe(heads.keypoint_predictor)}"
    return table


def describe(module):
    """The layers with weights, in order: 'conv 256-256 x4, ...'."""
    names = []
    for layer in module.modules():
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            kind = "conv" if isinstance(layer, nn.Conv2d) else "deconv"
            names.append(f"{kind}{layer.kernel_size[0]} {layer.in_channels}-{layer.out_channels}")
        elif isinstance(layer, nn.Linear):
            names.append(f"fc {layer.in_features}-{layer.out_features}")
        elif isinstance(layer, nn.modules.batchnorm._BatchNorm):
            names.append("norm")
    if isinstance(module, C4Head):
        return f"res5 ({names.count('norm')} norms), the last one after it {module.norm.num_features} wide"
    runs = []
    for name in names:
        if runs and runs[-1][0] == name:
            runs[-1][1] += 1
        else:
            runs.append([name, 1])
    return ", ".join(name + (f" x{count}" if count > 1 else "") for name, count in runs)


def fine_tune(args, seed, folder, data, world, stop_signal):
    """One trial: train from the last checkpoint to the end, precise batch norm, evaluate.

    Args:
        data: (training, validation). folder: where it is written.
    Returns:
        the trial's result as `results.jsonl` has it; None if a signal or --steps ended it before.
    """
    train, val = data
    outputs, keypoints = outputs_of(args, train)
    images = TrainingImages(train, args, seed, outputs)
    schedule = plan(args)
    total = schedule["iterations"]
    last = total if args.steps is None else min(total, args.steps)

    # model, optimiser, resume -----------------------------------------------------------------------------------------
    stop_signal.listen()
    settings = {name: value for name, value in vars(args).items() if name not in FREE}
    settings |= {"seed": seed, "files": train.fingerprint(), "val_files": val.fingerprint(), "processes": world.size}
    checkpoints = harness.legacy.Checkpoints(folder, NAME, settings)
    state = checkpoints.load(args.resume)
    harness.legacy.require_agreement(
        (settings["files"], state and state["step"]),
        "the processes see different images or checkpoints: data and --output-dir must be the same on all machines",
    )
    model, lines = new_detector(args, seed, len(train.categories), outputs, len(keypoints), world, state)
    optimizer = torch.optim.SGD(parameter_groups(model, args.weight_decay), schedule["lr"], momentum=MOMENTUM)
    scaler = torch.amp.GradScaler(world.device.type, enabled=args.amp == "fp16")
    step, bad, precise = 0, harness.images.BadImages(images), False
    if state:
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        step, bad, precise = state["step"], harness.images.BadImages(images, state["bad_images"]), state["precise"]
        for line in harness.pictures.read_log(os.path.join(folder, "log.jsonl")):
            if "result" in line and step >= last:
                print0(f"{folder}: finished, at step {step} of {last}; give another --output-dir for a new run")
                return line["result"]
        print0(f"continued from step {step}")
    network = harness.legacy.wrap_distributed(model, world)
    share = args.batch_size // world.size

    # start ------------------------------------------------------------------------------------------------------------
    for line in () if state else lines:
        print0(line)
    print0(
        f"{protocol_name(args, outputs)}; {len(images)} of {len(train)} images to train on, {len(val)} to evaluate; seed {seed}\n"
        f"batch {args.batch_size} = {world.size} x {share} on {world.device.type}; lr {schedule['lr']:g}, "
        f"{total} iterations, drops at {schedule['drops']}, warm-up {schedule['warmup']}; amp {args.amp}"
    )
    header = {"command": harness.run.command(), "versions": harness.run.versions(), "settings": settings}
    log = harness.legacy.RunLog(folder, header, step, last, world.rank == 0)
    model.train()

    def batches(start, stop):
        return torch.utils.data.DataLoader(
            images,
            batch_sampler=GroupedBatches(images.wide(), share, world, seed, start, stop),
            collate_fn=collate,
            num_workers=args.workers,
            worker_init_fn=harness.images.detach_worker,
            pin_memory=world.device.type == "cuda",
        )

    def forward(network, number, pixels, targets):
        """The loss of a batch; the RoIs and anchors that torchvision samples depend on (seed, number, rank) alone."""
        torch.manual_seed(common.key_seed("step", seed, number, world.rank))
        pixels = [image.to(world.device, non_blocking=True) for image in pixels]
        targets = [{k: v if k == "masks" else v.to(world.device) for k, v in target.items()} for target in targets]
        dtype = torch.float16 if args.amp == "fp16" else torch.bfloat16
        with torch.autocast(world.device.type, dtype, enabled=args.amp != "none"):
            return network(pixels, targets)

    def save():
        if world.rank == 0:
            checkpoints.save(
                {"detector.pth": model.state_dict()}, step=step, model=model.state_dict(), optimizer=optimizer.state_dict(),
                scaler=scaler.state_dict(), bad_images=sorted(bad.found), precise=precise,
                given={name: getattr(args, name) for name in args.given if name not in FORGOTTEN},
                categories=train.categories, outputs=outputs, keypoints=keypoints,
            )  # fmt: skip

    # steps ------------------------------------------------------------------------------------------------------------
    meter, stop = harness.legacy.Meter(args.batch_size), 0
    for pixels, targets, index, passed in meter.timed(batches(step, last)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, schedule["lr"], schedule["warmup"], schedule["drops"])
        loss, values = forward(network, step, pixels, targets)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        step += 1

        meter.add(values)
        bad.note(index, passed)
        stop, unreadable = harness.run.agree(stop_signal.arrived, len(bad.new))
        if unreadable:
            bad.share()
        ending = stop > 0 or step == last
        saving, logging = ending or step % args.save_every == 0, ending or step % args.print_freq == 0
        if saving or logging:
            means = meter.means(step)
        if logging:
            line = {"lr": optimizer.param_groups[0]["lr"], **means, "bad_images": len(bad.found)}
            log.step(step, line, shown(line))
            meter.reset()
        if saving:
            save()
        if stop:
            print0(f"stopped by a signal and saved at step {step}; the same command continues")
            break
    if step < total or stop:
        log.close()
        return None

    # evaluation -------------------------------------------------------------------------------------------------------
    stop_signal.exit_at_once()  # all is saved; what follows is done again by the same command
    if args.precise_bn and not precise:
        loader = batches(total, total + args.precise_bn)
        print0(f"precise batch norm over {args.precise_bn} batches")
        told = harness.pictures.progress(loader, args.precise_bn, what="batches") if world.rank == 0 else loader
        numbered = enumerate(told, total)
        precise_bn(model, ((number, *batch[:2]) for number, batch in numbered), lambda *a: forward(model, *a))
        precise = True
        save()
    result = evaluated(args, model, val, outputs, world, folder)
    result = {"seed": seed, "step": step, "weights": args.weights, "fpn_weights": args.fpn_weights, **result}
    log.write({"step": step, "result": result})
    log.close()
    if world.rank == 0:
        harness.legacy.draw_curves(folder, CURVES)
        print0(f"{folder}: {', '.join(sorted(os.listdir(folder)))}")
    return result


def new_detector(args, seed, classes, outputs, keypoints, world, state):
    """The detector on its device, from pre-trained weights or from a checkpoint's `state`; and what was loaded."""
    with common.drawing("model", seed):
        if state:
            args = argparse.Namespace(**vars(args) | {"weights": "random", "fpn_weights": None})
        model, lines = build_detector(args, classes, outputs, keypoints)
    if state:
        model.load_state_dict(state["model"])
    if (
        world.size > 1 and world.device.type == "cuda"
    ):  # DEVIATION: F2. MoCo's later files average the processes' statistics
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    elif world.size > 1:
        print0("batch norm is not synchronised between processes on a CPU")
    return model.to(world.device, memory_format=torch.channels_last), lines


def evaluated(args, model, val, outputs, world, folder):
    """Evaluate on the validation images: {"protocol", "box": {AP, ...}, ...}, printed; and predictions.png."""
    found = detect_all(model, val, args, world)
    result = {"protocol": protocol_name(args, outputs)}
    if world.rank == 0:
        result |= evaluate(args, val, found, outputs)
        draw_predictions(val, found, os.path.join(folder, "predictions.png"))
        print0(f"{result['protocol']}; {origin(args)}: {numbers(result)}")
    return result


def origin(args):
    """Where the weights came from, for the eye."""
    return f"weights {args.weights}" + (f", pyramid {args.fpn_weights}" if args.fpn_weights else "")


def numbers(result):
    """The AP, AP50 and AP75 of a result for the eye."""
    kinds = [(name, value) for name, value in result.items() if isinstance(value, dict)]
    return "; ".join(f"{n} AP {v['AP']:.1f} AP50 {v['AP50']:.1f} AP75 {v['AP75']:.1f}" for n, v in kinds)


def shown(line):
    """The part of a log line that the eye follows."""
    names = [name for name in line if name.startswith("loss")]
    return (
        f"{' '.join(f'{name} {line[name]:.3f}' for name in names)} foreground {line['foreground']:.0f} "
        f"{line['images_per_s']:.1f} img/s data {line['data_share']:.0%}"
    )


def print_protocol(args):
    """--steps 0: the protocol as built, without data (custom: with it)."""
    classes, outputs, keypoints = (
        {"voc": 20, "coco": 80, "coco-keypoint": 1, "cityscapes": 8, "scenes": 10}.get(args.task),
        args.outputs,
        17,
    )
    if args.task in ("custom", "scenes"):
        train = open_data(args, "train")
        outputs, names = outputs_of(args, train)
        classes, keypoints = len(train.categories), len(names)
    model, lines = build_detector(args, classes, outputs, keypoints)
    for row, text in protocol_table(args, model.train(), outputs).items():
        print0(f"{row:14} {text}")
    for line in lines:
        print0(line)


def main(argv=None):
    args = get_args(argv)
    if args.steps == 0:
        print_protocol(args)
        return
    world = harness.legacy.start_processes()
    torch.backends.cudnn.benchmark = False  # nearly every batch has a size of its own
    if args.demo and "amp" not in args.given and harness.run.bf16_is_fast():
        args.amp = "bf16"
    if args.eval_only or args.predict:
        state = harness.weights.load_checkpoint_file(args.resume or os.path.join(args.output_dir, "checkpoint.pth"))
        outputs, keypoints, categories = state["outputs"], state["keypoints"], state["categories"]
        if args.predict and world.size > 1:
            raise UserError("--predict is a job for one process: start it without torchrun")
        model, _ = new_detector(args, args.seed, len(categories), outputs, len(keypoints), world, state)
        model.eval()
        if args.predict:
            predict(args, model, categories, world)
            return
        val = open_data(args, "val", categories)
        result = {"step": state["step"], **evaluated(args, model, val, outputs, world, args.output_dir)}
        if world.rank == 0:
            with open(os.path.join(args.output_dir, "evaluation.json"), "w") as file:
                json.dump(result, file)
        return

    if args.batch_size % world.size:
        raise UserError(f"--batch-size {args.batch_size}: must be divisible by the {world.size} processes")
    train = open_data(args, "train")
    data, results, stop_signal = (train, open_data(args, "val", train.categories)), [], harness.legacy.StopSignal()
    for seed in range(args.seed, args.seed + args.trials):  # AMBIGUOUS: F15. nobody published seeds
        folder = args.output_dir if args.trials == 1 else os.path.join(args.output_dir, f"seed{seed}")
        result = fine_tune(args, seed, folder, data, world, stop_signal)
        if result is None:
            return
        results.append(result)
        if world.rank == 0:  # as many lines as trials are finished, also after a kill
            with open(os.path.join(args.output_dir, "results.jsonl"), "w") as file:
                file.writelines(json.dumps(one) + "\n" for one in results)
    if args.trials > 1 and world.rank == 0:
        print0(f"{results[0]['protocol']}; {origin(args)}; {len(results)} trials: {spread(results)}")


def spread(results):
    """Mean and standard deviation (n - 1) of AP, AP50, AP75 over trials, for the eye."""
    texts = []
    for kind in (name for name, value in results[0].items() if isinstance(value, dict)):
        for metric in ("AP", "AP50", "AP75"):
            values = [result[kind][metric] for result in results]
            texts.append(f"{kind} {metric} {np.mean(values):.2f} +- {np.std(values, ddof=1):.2f}")
    return "; ".join(texts)


if __name__ == "__main__":
    harness.run.main(main)
