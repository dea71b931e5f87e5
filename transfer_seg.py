# SPDX-License-Identifier: MIT
"""Semantic segmentation from any pre-trained ResNet, by the FCN protocols of the papers.

A fully convolutional network (Long et al., 2015) on a ResNet of output stride 8, as DenseCL fine-tuned it with
mmsegmentation, and SetSim and others after it. Built from torch and torchvision alone. With --linear-probe the backbone
is frozen and one 1x1 convolution on its normalised features is trained: the cheap test of dense features.

    image --resize x 0.5 to 2, crop, flip, colours--> ResNet, dilated -+- C4 -- conv, dropout, 1x1 --> 0.4 x loss
                                                                       +- C5 -- 2 convs, beside C5, conv, dropout, 1x1 --> loss
    image --resize--> ResNet, dilated -- C5 -- head --> logits, whole or window by window --> at the original size: classes

    N images of this process    K classes, labels 0 .. K - 1, 255 is ignored    H, W pixels    C channels
    sizes are (height, width)   windows: top, left, bottom, right in pixels, bottom and right exclusive

    python transfer_seg.py --demo                                                        scenes, minutes on two cores
    torchrun --nproc_per_node 4 transfer_seg.py --task voc --data /VOCdevkit --weights runs/setsim/resnet50.pth
    python transfer_seg.py --task custom --images photos --masks masks --weights W --batch-size 4 --crop 256
    python transfer_seg.py --task custom --images photos --masks masks --weights W --linear-probe
    python transfer_seg.py --predict photos --output-dir runs/transfer_seg               colour a folder of images
    python transfer_seg.py --task cityscapes --crop 512x1024 --steps 0                   print the protocol as built

The last iterate is evaluated, nothing is picked. What was measured, and what was not run, stands in docs/transfer.md; tags name
rows of its table of decisions.
"""

import argparse
import contextlib
import glob
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import scipy.io
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageColor, ImageDraw, ImageFont
from torch import nn

import common
import harness.images
import harness.legacy
import harness.pictures
import harness.run
import harness.weights
from common import UserError, print0

# ======================================================================================================================
# Protocols: a task's numbers, as the configurations of DenseCL's mmsegmentation have them; and the command line
# ======================================================================================================================

# Iterations count batches of `batch_size` images, and are scaled when --batch-size differs. Sizes: resize is (long side,
# short side) of the box that an image is fitted into, crop is (height, width).
STANDARD = dict(
    batch_size=16, lr=0.01, weight_decay=5e-4, resize=[2048, 512], crop=[512, 512], test="whole", align_corners=False,
)  # fmt: skip
TASKS = {
    # PAPER: SetSim section 4.2 and Table 6, "following" DenseCL: VOC train_aug 20k, Cityscapes 40k; ADE20K 80k.
    "voc": STANDARD | dict(iterations=20000),
    # AMBIGUOUS: G1. SetSim does not say which crop; DenseCL's has 769, sliding windows, and aligned corners.
    "cityscapes": STANDARD | dict(
        batch_size=8, iterations=40000, resize=[2049, 1025], crop=[769, 769], test="slide", align_corners=True,
    ),
    "ade20k": STANDARD | dict(iterations=80000),  # AMBIGUOUS: G2. DenseCL has no such task: mmsegmentation's own
    "custom": STANDARD | dict(iterations=2000),
    "scenes": STANDARD | dict(batch_size=8, lr=0.04, iterations=800, resize=[544, 136], crop=[96, 96]),
}  # fmt: skip
CITYSCAPES_WHOLE = dict(resize=[2048, 1024], crop=[512, 1024], test="whole", align_corners=False)
PROBE = dict(lr=0.01, weight_decay=0.0)  # AMBIGUOUS: G3. No paper has a linear probe of dense features
SCENE = 136  # pixels a side
DEMO = dict(task="scenes", arch="resnet18")
MOMENTUM = 0.9  # of SGD, in all of them
IGNORED = 255


def height_x_width(text):
    """'512x1024' -> [512, 1024], '769' -> [769, 769]. Errors: ValueError."""
    sides = [int(part) for part in text.split("x")]
    if len(sides) not in (1, 2):
        raise ValueError(text)
    return [sides[0], sides[-1]]


def get_args(argv=None):
    # fmt: off
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flag = parser.add_argument
    flag("--task", default=None, choices=TASKS, help="the protocol; custom: one's own images and masks; scenes: built-in ones")
    flag("--data", default=None, metavar="DIR", help="the data set in its usual layout (voc: with VOC2012 and SBD's benchmark_RELEASE in it; cityscapes: with gtFine; ade20k: with annotations); 'scenes[:COUNT]'")
    flag("--images", default=None, metavar="DIR", help="custom: images; if it and --masks have train/ and val/, these are used")
    flag("--masks", default=None, metavar="DIR", help="custom: PNG files named like the images, one channel, its values are class numbers, 255 is ignored")
    flag("--val-images", default=None, metavar="DIR", help="custom: images to evaluate on; default: a fifth of --images is held out")
    flag("--val-masks", default=None, metavar="DIR", help="custom: their masks")
    flag("--classes", default=None, nargs="+", metavar="NAME", help="custom: names of classes 0, 1, ...; default: as many as the masks have, without names")
    flag("--ignore", default=[], type=int, nargs="+", metavar="VALUE", help="custom: values of masks that are ignored like 255; classes are numbered without them")
    flag("--output-dir", default="runs/transfer_seg", help="checkpoint.pth, segmenter.pth, log.jsonl, results.jsonl and pictures go there; a run found there is continued")
    flag("--demo", action="store_true", help="ResNet-18 on built-in scenes, minutes on two CPU cores; other flags win over its settings")
    # what starts the segmenter
    flag("--weights", default="random", metavar="FILE", help="the pre-trained backbone: any checkpoint with a ResNet in it, 'imagenet' (torchvision's supervised weights) or 'random'")
    flag("--arch", default="resnet50", choices=common.ARCHS, help="torchvision ResNet")
    # the protocol
    flag("--linear-probe", action="store_true", help="freeze the backbone, its batch statistics too, and train one 1x1 convolution on normalised C5")
    flag("--crop", default=None, type=height_x_width, metavar="HxW", help="pixels: size of training crops and of sliding windows; cityscapes: 769 or 512x1024 is a protocol of its own; default the task's")
    flag("--resize", default=None, type=height_x_width, metavar="LONGxSHORT", help="pixels: the box that images are fitted into, in training times 0.5 to 2; default the task's")
    flag("--test", default=None, choices=("whole", "slide"), help="the image at once, or windows of --crop that overlap by a third, logits averaged; default the task's")
    flag("--iterations", default=None, type=int, help="length of the schedule in the task's batches; default the task's")
    flag("--batch-size", default=None, type=int, help="over all processes; the learning rate is scaled with it and the iterations against it; default the task's")
    flag("--lr", default=None, type=float, help="at the task's batch, scaled linearly; default the task's, of the probe 0.01")
    flag("--weight-decay", default=None, type=float, help="on all parameters, norms among them; default 5e-4, of the probe 0")
    flag("--amp", default="none", choices=("none", "bf16", "fp16"), help="autocast in training; losses and testing are fp32 always")
    flag("--seed", default=0, type=int, help="everything random is a function of it")
    flag("--trials", default=1, type=int, help="so many runs with seeds SEED, SEED + 1, ...; their mean and deviation at the end")
    # the run
    flag("--eval-only", action="store_true", help="evaluate the segmenter in --output-dir, do not train")
    flag("--predict", default=None, metavar="DIR", help="segment a folder of images with what is in --output-dir: masks and pictures")
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
    if args.task == "cityscapes" and args.crop == CITYSCAPES_WHOLE["crop"]:
        chosen |= CITYSCAPES_WHOLE
    if args.linear_probe:
        chosen |= PROBE
    args.protocol = chosen
    for name, value in chosen.items():
        if name not in given:
            setattr(args, name, value)
    args.given = sorted(given)
    check_args(args, given)
    return args


def remembered(args, given):
    """The settings that the segmenter in --output-dir was made with, where the command line does not say otherwise."""
    path = args.resume or os.path.join(args.output_dir, "checkpoint.pth")
    if not os.path.exists(path):
        raise UserError(
            f"{path}: no such file; --eval-only and --predict want the --output-dir of a run (seed0, ... of trials)"
        )
    found = harness.weights.load_checkpoint_file(path)
    if not isinstance(found, dict) or found.get("script") != NAME:
        raise UserError(f"{path}: not a checkpoint of {NAME}.py")
    for name in given.keys() - {*FREE, "test", "resize"}:
        if given[name] != found["settings"].get(name):
            raise UserError(
                f"--{name.replace('_', '-')} {given[name]}: the segmenter in {args.output_dir} was made with another"
            )
    return {name: value for name, value in found["given"].items() if name not in given}


def check_args(args, given):
    """One clear line for values out of range, for what is missing, and for flags that would have no effect."""
    harness.legacy.check_range(
        args, iterations=(1, None), batch_size=(1, None), lr=(0, None), weight_decay=(0, None), seed=(0, None),
        trials=(1, None), steps=(0, None), workers=(0, None), print_freq=(1, None), save_every=(1, None),
    )  # fmt: skip
    for name in ("crop", "resize"):
        if min(getattr(args, name)) < 32:
            raise UserError(f"--{name} {by(getattr(args, name))}: must be at least 32")
    if args.resize[0] < args.resize[1]:
        raise UserError(f"--resize {by(args.resize)}: the limit of the long side comes first")
    if not all(0 <= value <= 255 for value in args.ignore):
        raise UserError("--ignore: masks have values between 0 and 255")
    wanted = {"voc": ["data"], "cityscapes": ["data"], "ade20k": ["data"], "scenes": [], "custom": ["images", "masks"]}
    if args.steps != 0 or args.task == "custom":
        for name in wanted[args.task]:
            if getattr(args, name) is None and not args.predict:
                raise UserError(f"--task {args.task} wants --{name.replace('_', '-')}: {HELP[args.task]}")
    if args.trials > 1 and args.resume:
        raise UserError("--resume goes with one trial: each of several continues from its own folder")
    useless = dict.fromkeys(("images", "masks", "val_images", "val_masks", "classes", "ignore"), "custom")
    useless |= {"data": "voc cityscapes ade20k scenes"}
    for name, tasks in useless.items():
        if name in given and args.task not in tasks.split():
            raise UserError(f"--{name.replace('_', '-')} has no meaning for --task {args.task}")
    if (args.val_images is None) != (args.val_masks is None):
        raise UserError("--val-images and --val-masks go together")


def by(sides):
    """[512, 1024] -> '512x1024'."""
    return "x".join(map(str, sides))


NAME = "transfer_seg"
HELP = {
    "voc": "a folder with VOC2012/ (ImageSets/Segmentation, JPEGImages, SegmentationClass) and SBD's benchmark_RELEASE/dataset (cls, train.txt, val.txt) in it",
    "cityscapes": "a folder with leftImg8bit/{train,val}/CITY/*_leftImg8bit.png and gtFine/{train,val}/CITY/*_gtFine_labelTrainIds.png (or *_gtFine_labelIds.png)",
    "ade20k": "a folder with ADEChallengeData2016/{images,annotations}/{training,validation} in it",
    "custom": "a folder of images, and a folder of PNG masks of the same names",
    "scenes": "nothing: they are built in",
}
# Not part of what a resumed run must share with its beginning.
FREE = ("data", "images", "masks", "val_images", "val_masks", "output_dir", "demo", "eval_only", "predict", "steps")
FREE += ("workers", "print_freq", "save_every", "resume", "trials", "given", "protocol")
# Not part of what --eval-only and --predict remember of a run.
FORGOTTEN = ("output_dir", "resume", "trials", "steps", "eval_only", "predict")


# ======================================================================================================================
# Data sets: whatever the layout, `classes`, `palette`, name(i) and read(i)
# ======================================================================================================================


class MaskData:
    """Images, and a mask for each.

    Attributes:
        classes: K names; label k stands for classes[k]. palette: uint8 (256, 3), the colour of each label; row 255 is
        that of ignored pixels. title: what messages call the data.

    Args:
        pairs: list of (image file, mask file, table), the files relative to root; table as `table_of` makes it.
        layout: what the data should look like, for messages.
    Errors:
        UserError: no images, or files that do not exist.
    """

    def __init__(self, root, pairs, classes, palette, title, layout):
        self.root, self.pairs, self.classes, self.palette, self.title = root, pairs, classes, palette, title
        if not pairs:
            raise UserError(f"{title}: no images in {root}; it must be {layout}")
        files = [name for pair in pairs for name in pair[:2]]
        missing = [name for name in files if not os.path.exists(os.path.join(root, name))]
        if missing:
            raise UserError(
                f"{title}: {len(missing)} of its {len(files)} files are not there, for instance "
                f"{os.path.join(root, missing[0])}; {root} must be {layout}"
            )

    def __len__(self):
        return len(self.pairs)

    def name(self, index):
        return self.pairs[index][0]

    def read(self, index):
        """(image, PIL RGB; labels, uint8 (H, W)). Errors: OSError, one unreadable, sizes differ, or a strange value."""
        image_file, mask_file, table = self.pairs[index]
        image = harness.images.read_image(os.path.join(self.root, image_file))
        mask = read_mask(os.path.join(self.root, mask_file))
        if mask.shape[::-1] != image.size:
            raise OSError(f"{image_file} has {image.size} pixels, {mask_file} {mask.shape[::-1]}")
        labels = table[mask]
        if labels.min() < 0:
            raise OSError(f"{mask_file} has the value {mask[labels < 0][0]}, which is no class")
        return image, labels.astype(np.uint8)

    def fingerprint(self):
        """A name for this list of images, whatever folder it lies in."""
        names = "|".join(os.path.basename(image) for image, _, _ in self.pairs)
        return f"{len(self)} images, sha256 {hashlib.sha256(names.encode()).hexdigest()[:16]}"


def table_of(values, ignored):
    """From a mask's value to its label: values[k] becomes k, ignored ones 255, all others -1, which is an error.

    Returns:
        int16 (256,).
    """
    table = np.full(256, -1, np.int16)
    table[list(ignored)] = IGNORED
    table[list(values)] = np.arange(len(values))
    return table


def read_mask(path):
    """The values of a mask: a PNG with one channel or a palette, or SBD's .mat. Returns: uint8 (H, W). Errors: OSError."""
    try:
        if path.endswith(".mat"):
            return scipy.io.loadmat(path)["GTcls"][0]["Segmentation"][0]
        with Image.open(path) as image:
            if len(image.getbands()) > 1:
                raise OSError(f"{path} is {image.mode}: a mask has one channel, its values are class numbers")
            values = np.asarray(image)
    except Exception as error:  # Pillow and scipy raise many kinds for broken files
        raise OSError(f"{path}: {error}") from error
    if values.dtype.kind not in "iub":
        raise OSError(f"{path} has values of kind {values.dtype}: they must be whole numbers")
    if values.min() < 0 or values.max() > 255:
        raise OSError(f"{path} has values from {values.min()} to {values.max()}: they must be between 0 and 255")
    return values.astype(np.uint8)


def voc_palette():
    """VOC's colours, uint8 (256, 3): the bits of a number are dealt out to red, green and blue, highest first."""
    numbers = np.arange(256)
    colours = np.zeros((256, 3), int)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= (numbers >> 3 * bit + channel & 1) << 7 - bit
    return colours.astype(np.uint8)


def palette_of(colours):
    """Colours, (r, g, b) or '#rrggbb' or 'rrggbb', as the first rows of a palette, uint8 (256, 3); the rest is black."""
    palette = np.zeros((256, 3), np.uint8)
    for row, colour in enumerate(colours):
        palette[row] = ImageColor.getrgb(f"#{colour.lstrip('#')}") if isinstance(colour, str) else colour
    return palette


VOC_CLASSES = (
    "background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person "
    "pottedplant sheep sofa train tvmonitor"
).split()


def read_voc(root, split):
    """VOC 2012, "val", or "train" with SBD added: train_aug, 10582 images.

    OFFICIAL: G4. As DenseCL: SBD's train and val without VOC's train and val. VOC's own masks (with ignored borders) are
    kept where there are any, SBD's have no borders. torchvision's train_noval is another, smaller list.
    """
    base = next((b for b in (root, os.path.join(root, "VOCdevkit")) if os.path.isdir(os.path.join(b, "VOC2012"))), root)
    sbd = next((b for b in (root, base) if os.path.isdir(os.path.join(b, "benchmark_RELEASE"))), root)
    sbd = os.path.relpath(os.path.join(sbd, "benchmark_RELEASE", "dataset"), base)

    def names(*path):
        path = os.path.join(base, *path)
        if not os.path.exists(path):
            raise UserError(f"{path}: no such file; --data must be {HELP['voc']}")
        with open(path) as file:
            return file.read().split()

    table = table_of(range(21), [IGNORED])
    own = {part: names("VOC2012", "ImageSets", "Segmentation", f"{part}.txt") for part in ("train", "val")}
    pairs = [(f"VOC2012/JPEGImages/{name}.jpg", f"VOC2012/SegmentationClass/{name}.png", table) for name in own[split]]
    if split == "train":
        extra = {name for part in ("train", "val") for name in names(sbd, f"{part}.txt")}
        extra -= {*own["train"], *own["val"]}
        pairs += [(f"VOC2012/JPEGImages/{name}.jpg", f"{sbd}/cls/{name}.mat", table) for name in sorted(extra)]
    title = {"train": "VOC 2012 train_aug", "val": "VOC 2012 val"}[split]
    return MaskData(base, pairs, VOC_CLASSES, voc_palette(), title, HELP["voc"])


# label id, name, colour, in the order of train ids, as in cityscapesScripts
CITYSCAPES = {
    7: ("road", "804080"), 8: ("sidewalk", "f423e8"), 11: ("building", "464646"), 12: ("wall", "66669c"),
    13: ("fence", "be9999"), 17: ("pole", "999999"), 19: ("traffic light", "faaa1e"), 20: ("traffic sign", "dcdc00"),
    21: ("vegetation", "6b8e23"), 22: ("terrain", "98fb98"), 23: ("sky", "4682b4"), 24: ("person", "dc143c"),
    25: ("rider", "ff0000"), 26: ("car", "00008e"), 27: ("truck", "000046"), 28: ("bus", "003c64"), 31: ("train", "005064"),
    32: ("motorcycle", "0000e6"), 33: ("bicycle", "770b20"),
}  # fmt: skip


def read_cityscapes(root, split):
    """Cityscapes' fine annotations: 19 train ids, from *_labelTrainIds.png or, where it is missing, from *_labelIds.png."""
    tables = {
        "labelTrainIds": table_of(range(19), [IGNORED]),
        "labelIds": table_of(CITYSCAPES, set(range(256)) - CITYSCAPES.keys()),
    }
    pairs, images = [], os.path.join(root, "leftImg8bit", split)
    for name in sorted(glob.glob(os.path.join("*", "*_leftImg8bit.png"), root_dir=images)):  # CITY/IMAGE
        stem = os.path.join("gtFine", split, name.replace("_leftImg8bit.png", "_gtFine"))
        kind = "labelTrainIds" if os.path.exists(os.path.join(root, f"{stem}_labelTrainIds.png")) else "labelIds"
        pairs.append((os.path.join("leftImg8bit", split, name), f"{stem}_{kind}.png", tables[kind]))
    names, colours = zip(*CITYSCAPES.values(), strict=True)
    return MaskData(root, pairs, list(names), palette_of(colours), f"Cityscapes {split}", HELP["cityscapes"])


ADE20K_CLASSES = (
    "wall,building,sky,floor,tree,ceiling,road,bed,windowpane,grass,cabinet,sidewalk,person,earth,door,table,mountain,"
    "plant,curtain,chair,car,water,painting,sofa,shelf,house,sea,mirror,rug,field,armchair,seat,fence,desk,rock,wardrobe,"
    "lamp,bathtub,railing,cushion,base,box,column,signboard,chest of drawers,counter,sand,sink,skyscraper,fireplace,"
    "refrigerator,grandstand,path,stairs,runway,case,pool table,pillow,screen door,stairway,river,bridge,bookcase,blind,"
    "coffee table,toilet,flower,book,hill,bench,countertop,stove,palm,kitchen island,computer,swivel chair,boat,bar,"
    "arcade machine,hovel,bus,towel,light,truck,tower,chandelier,awning,streetlight,booth,television receiver,airplane,"
    "dirt track,apparel,pole,land,bannister,escalator,ottoman,bottle,buffet,poster,stage,van,ship,fountain,conveyer belt,"
    "canopy,washer,plaything,swimming pool,stool,barrel,basket,waterfall,tent,bag,minibike,cradle,oven,ball,food,step,tank,"
    "trade name,microwave,pot,animal,bicycle,lake,dishwasher,screen,blanket,sculpture,hood,sconce,vase,traffic light,tray,"
    "ashcan,fan,pier,crt screen,plate,monitor,bulletin board,shower,radiator,glass,clock,flag"
).split(",")
ADE20K_COLOURS = (
    "787878 b47878 06e6e6 503232 04c803 787850 8c8c8c cc05ff e6e6e6 04fa07 e005ff ebff07 96053d 787846 08ff33 ff0652 "
    "8fff8c ccff04 ff3307 cc4603 0066c8 3de6fa ff0633 0b66ff ff0747 ff09e0 0907e6 dcdcdc ff095c 7009ff 08ffd6 07ffe0 "
    "ffb806 0aff47 ff290a 07ffff e0ff08 6608ff ff3d06 ffc207 ff7a08 00ff14 ff0829 ff0599 0633ff eb0cff a09614 00a3ff "
    "8c8c8c fa0a0f 14ff00 1fff00 ff1f00 ffe000 99ff00 0000ff ff4700 00ebff 00adff 1f00ff 0bc8c8 ff5200 00fff5 003dff "
    "00ff70 00ff85 ff0000 ffa300 ff6600 c2ff00 008fff 33ff00 0052ff 00ff29 00ffad 0a00ff adff00 00ff99 ff5c00 ff00ff "
    "ff00f5 ff0066 ffad00 ff0014 ffb8b8 001fff 00ff3d 0047ff ff00cc 00ffc2 00ff52 000aff 0070ff 3300ff 00c2ff 007aff "
    "00ffa3 ff9900 00ff0a ff7000 8fff00 5200ff a3ff00 ffeb00 08b8aa 8500ff 00ff5c b800ff ff001f 00b8ff 00d6ff ff0070 "
    "5cff00 00e0ff 70e0ff 46b8a0 a300ff 9900ff 47ff00 ff00a3 ffcc00 ff008f 00ffeb 85ff00 ff00eb f500ff ff007a fff500 "
    "0abed4 d6ff00 00ccff 1400ff ffff00 0099ff 0029ff 00ffcc 2900ff 29ff00 ad00ff 00f5ff 4700ff 7a00ff 00ffb8 005cff "
    "b8ff00 0085ff ffd600 19c2c2 66ff00 5c00ff"
).split()


def read_ade20k(root, split):
    """ADE20K: 150 classes; the masks' 0 is ignored in training and testing, and the others move down by one."""
    base = os.path.join(root, "ADEChallengeData2016")
    base = base if os.path.isdir(base) else root
    folder, table = os.path.join(base, "images", split), table_of(range(1, 151), [0, IGNORED])
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    pairs = [
        (f"images/{split}/{name}", f"annotations/{split}/{os.path.splitext(name)[0]}.png", table)
        for name in names
        if os.path.splitext(name)[1].lower() in harness.images.EXTENSIONS
    ]
    return MaskData(base, pairs, ADE20K_CLASSES, palette_of(ADE20K_COLOURS), f"ADE20K {split}", HELP["ade20k"])


def read_custom(args, split, classes):
    """One's own masks, "train" or "val".

    Args:
        classes: names of those that the segmenter knows; None: --classes, or as many as the masks have.
    """
    folders, parts = (args.images, args.masks), {}
    inside = {part: [os.path.join(folder, part) for folder in folders] for part in ("train", "val")}
    if args.val_images is not None:
        parts[split] = matching(*(folders if split == "train" else (args.val_images, args.val_masks)))
    elif all(os.path.isdir(folder) for pair in inside.values() for folder in pair):
        parts = {part: matching(*pair) for part, pair in inside.items()}
    else:
        found = matching(*folders)
        order = torch.randperm(len(found), generator=common.generator("held out")).tolist()
        count = max(len(found) // 5, 1)
        parts = {"train": [found[i] for i in sorted(order[count:])], "val": [found[i] for i in sorted(order[:count])]}
        if split == "val":
            print0(
                f"{count} of {len(found)} images are held out to evaluate, the same in every run; to choose them, give "
                "--val-images and --val-masks, or make train/ and val/ in --images and --masks"
            )
    names, numbers = classes or args.classes, [value for value in range(255) if value not in args.ignore]
    if not all(parts.values()):
        raise UserError(f"--images {args.images}: a single image; give more, or --val-images and --val-masks")
    with ThreadPoolExecutor(harness.legacy.usable_cores()) as pool:
        pairs = sum(parts.values(), []) if names is None else parts[split]
        values = set().union(*pool.map(values_of, pairs))
    wrong = sorted(value for value in values if isinstance(value, str))
    if len(wrong) > max(1, len(pairs) // 100):
        raise UserError(f"{len(wrong)} masks cannot be used, for instance: {wrong[0]}")
    found = {value for value in values if not isinstance(value, str)} - {*args.ignore, IGNORED}
    count = len(names) if names else max((numbers.index(value) for value in found), default=0) + 1
    strange = sorted(found - {*numbers[:count]})
    if strange or count < 2:
        raise UserError(
            f"the masks have the values {sorted(found)} besides 255 and --ignore, that is "
            + (f"{strange} beyond the {count} classes" if strange else "a single class")
            + ": give each class a number from 0 on, and --ignore what is no class"
        )
    table, palette = table_of(numbers[:count], [*args.ignore, IGNORED]), voc_palette()
    with contextlib.suppress(OSError), Image.open(pairs[0][1]) as mask:
        if mask.mode == "P":  # the masks bring their own colours
            own = palette_of(np.reshape(mask.getpalette("RGB"), (-1, 3)))
            palette[:count], palette[IGNORED] = own[numbers[:count]], own[IGNORED]
    pairs = [(*pair, table) for pair in parts[split]]
    return MaskData("", pairs, names or [str(n) for n in numbers[:count]], palette, f"custom {split}", HELP["custom"])


def matching(images, masks):
    """Every PNG below `masks` with the image of the same name (and subfolder): list of (image file, mask file)."""
    names = [name for name in harness.images.list_images(masks, "--masks") if name.lower().endswith(".png")]
    same = os.path.realpath(images) == os.path.realpath(masks)
    there = {
        os.path.splitext(name)[0]: name
        for name in harness.images.list_images(images, "--images")
        if not (same and name.lower().endswith(".png"))
    }
    alone = [name for name in names if os.path.splitext(name)[0] not in there]
    if alone or not names:
        what = (
            f"{len(alone)} have no image of the same name in {images}, for instance {alone[0]}" if alone else "no PNG"
        )
        raise UserError(f"--masks {masks}: {what}; they must be {HELP['custom']}")
    if len(names) < len(there):
        print0(f"{len(there) - len(names)} of {len(there)} images in {images} have no mask and are passed over")
    return [(os.path.join(images, there[os.path.splitext(name)[0]]), os.path.join(masks, name)) for name in names]


def values_of(pair):
    """{values of a mask}; or {what is wrong with it}, a text."""
    image_file, mask_file = pair
    try:
        mask = read_mask(mask_file)
        with Image.open(image_file) as image:
            size = image.size
            if image.getexif().get(0x0112, 1) >= 5:  # lies on its side
                size = size[::-1]
    except OSError as error:
        return {str(error)}
    if mask.shape[::-1] != size:
        return {f"{mask_file} has {mask.shape[::-1]} pixels, its image {size}"}
    return set(np.flatnonzero(np.bincount(mask.ravel())).tolist())


COLOURS = "#E69F00 #56B4E9 #009E73 #F0E442 #0072B2 #D55E00 #CC79A7 #AA4499 #88CCEE #999999".split()


class SceneData(MaskData):
    """Built-in scenes number `first` to `first + count - 1`; class 0 is the background."""

    def __init__(self, first, count, side, seed):
        from harness.scenes import CLASSES

        self.first, self.count, self.side, self.seed, self.title = first, count, side, seed, "scenes"
        self.classes, self.palette = ["background", *CLASSES], palette_of(["#000000", *COLOURS])

    def __len__(self):
        return self.count

    def name(self, index):
        return f"scene {self.first + index}"

    def read(self, index):
        from harness.scenes import make_scene

        scene = make_scene(self.seed, self.first + index, self.side)
        return Image.fromarray(scene["image"]), scene["semantic"]

    def fingerprint(self):
        return f"scenes {self.first} to {self.first + self.count - 1} of {self.side} pixels, seed {self.seed}"


def open_data(args, split, classes=None):
    """The task's data for "train" or "val". Errors: UserError, names the layout that is expected.

    Args:
        classes: val: those that the segmenter knows.
    """
    training = split == "train"
    if args.task == "scenes":
        data = args.data or "scenes"
        if data.partition(":")[0] != "scenes":
            raise UserError(f"--data {data}: --task scenes wants 'scenes' or 'scenes:COUNT'")
        count = 512 if data == "scenes" else len(harness.images.open_images(data, SCENE, 0))
        return SceneData(0, count, SCENE, 0) if training else SceneData(count, max(count // 4, 8), SCENE, 0)
    if args.task == "custom":
        return read_custom(args, split, classes)
    if not os.path.isdir(args.data):
        raise UserError(f"--data {args.data}: no such folder; it must be {HELP[args.task]}")
    if args.task == "voc":
        return read_voc(args.data, split)
    if args.task == "cityscapes":
        return read_cityscapes(args.data, split)
    return read_ade20k(args.data, "training" if training else "validation")


# ======================================================================================================================
# Training images: resize, crop, flip, colours
# ======================================================================================================================

SCALES = (0.5, 2.0)
REDRAWS = 10


def resized(height, width, long_side, short_side):
    """(height, width), as large as fits with the longer one within `long_side` and the shorter within `short_side`."""
    scale = min(long_side / max(height, width), short_side / min(height, width))
    return max(int(height * scale + 0.5), 1), max(int(width * scale + 0.5), 1)


def resize_image(image, size):
    """uint8 (3, H, W) -> uint8 (3, *size), bilinear. OFFICIAL: G5. As OpenCV does it: no anti-aliasing when shrinking."""
    return F.interpolate(image[None], size, mode="bilinear", align_corners=False)[0]


def resize_labels(labels, size):
    """uint8 (H, W) -> uint8 size, the nearest pixel as OpenCV has it: its place rounded down."""
    return F.interpolate(labels[None, None], size, mode="nearest")[0, 0]


def crop_window(labels, crop, draws, most=0.75):
    """The first of the drawn crops that has two classes or more, none of them on `most` of its pixels or more.

    OFFICIAL: G6. If none is so, the last one is taken. Ignored pixels count neither way.

    Args:
        labels: uint8 (H, W). crop: (height, width); an image that is smaller is taken whole on that side.
        draws: (n, 2) numbers in [0, 1), places of n crops.
    Returns:
        top, left, bottom, right.
    """
    height, width = labels.shape
    for down, right in draws:
        top = int(down * (max(height - crop[0], 0) + 1))
        left = int(right * (max(width - crop[1], 0) + 1))
        window = top, left, min(top + crop[0], height), min(left + crop[1], width)
        inside = labels[window[0] : window[2], window[1] : window[3]]
        counts = torch.bincount(inside.flatten(), minlength=256)[:255]
        if (counts > 0).sum() > 1 and counts.max() < most * counts.sum():
            break
    return window


def draw_colours(rng):
    """The numbers of one photometric distortion: None where a coin says that there is none of its kind.

    Returns:
        dict of brightness in [-32, 32), contrast and saturation in [0.5, 1.5), hue in -18 .. 17, contrast_first.
    """
    coins, numbers = torch.rand(5, generator=rng).tolist(), torch.rand(4, generator=rng).tolist()
    kinds = {"brightness": 64 * numbers[0] - 32, "contrast": 0.5 + numbers[1], "saturation": 0.5 + numbers[2]}
    kinds |= {"hue": int(36 * numbers[3]) - 18}
    drawn = {name: value if coin < 0.5 else None for (name, value), coin in zip(kinds.items(), coins[:4], strict=True)}
    return drawn | {"contrast_first": coins[4] < 0.5}


def distort(image, brightness, contrast, saturation, hue, contrast_first):
    """Photometric distortion: brightness, contrast, saturation, hue; the contrast otherwise last. Eight bits throughout.

    DEVIATION: G7. Hue has Pillow's 256 steps, not OpenCV's 180, in whose steps `hue` is counted.

    Args:
        image: uint8 (H, W, 3). brightness: added. contrast, saturation: factors. None: left as it is.
    Returns:
        uint8 (H, W, 3).
    """

    def cut(x):
        return x.clip(0, 255).astype(np.uint8)

    def in_hsv(x, channel, change):
        hsv = np.array(Image.fromarray(x).convert("HSV"))
        hsv[..., channel] = change(hsv[..., channel])
        return np.asarray(Image.frombytes("HSV", hsv.shape[1::-1], hsv.tobytes()).convert("RGB"))

    if brightness is not None:
        image = cut(image + np.float32(brightness))
    if contrast is not None and contrast_first:
        image = cut(image * np.float32(contrast))
    if saturation is not None:
        image = in_hsv(image, 1, lambda x: cut(x * np.float32(saturation)))
    if hue is not None:
        image = in_hsv(image, 0, lambda x: (x.astype(int) + round(hue * 256 / 180)) % 256)
    if contrast is not None and not contrast_first:
        image = cut(image * np.float32(contrast))
    return image


def to_tensor(image):
    """PIL RGB -> uint8 (3, H, W)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


class TrainingImages(torch.utils.data.Dataset):
    """self[epoch, index] -> (float (3, H, W), normalised; labels, uint8 (H, W); index, unreadable neighbours passed over).

    H, W are the crop's, smaller images padded below and on the right: with 0 after normalisation, and 255. Everything
    random is drawn for each (seed, epoch, index).
    """

    def __init__(self, data, args, seed):
        self.data, self.resize, self.crop, self.seed = data, args.resize, args.crop, seed

    def __len__(self):
        return len(self.data)

    def name(self, index):
        return self.data.name(index)

    def __getitem__(self, key):
        epoch, index = key
        for passed in range(harness.images.TRIES):
            try:
                image, labels = self.data.read((index + passed) % len(self))
                break
            except OSError:
                continue
        else:
            return torch.zeros(3, *self.crop), torch.full(self.crop, IGNORED, dtype=torch.uint8), index, passed + 1
        rng = common.generator("views", self.seed, epoch, index)
        ratio, flip, *draws = torch.rand(2 + 2 * (1 + REDRAWS), generator=rng).tolist()
        ratio = SCALES[0] + (SCALES[1] - SCALES[0]) * ratio
        size = resized(image.height, image.width, *(side * ratio for side in self.resize))
        image, labels = resize_image(to_tensor(image), size), resize_labels(torch.from_numpy(labels), size)
        draws = zip(draws[::2], draws[1::2], strict=True)
        top, left, bottom, right = crop_window(labels, self.crop, draws)
        image, labels = image[:, top:bottom, left:right], labels[top:bottom, left:right]
        if flip < 0.5:
            image, labels = image.flip(2), labels.flip(1)
        image = to_tensor(distort(image.permute(1, 2, 0).contiguous().numpy(), **draw_colours(rng)))
        padding = 0, self.crop[1] - labels.shape[1], 0, self.crop[0] - labels.shape[0]
        image = F.pad(common.normalise(image[None])[0], padding)
        return image, F.pad(labels, padding, value=IGNORED), index, passed


# ======================================================================================================================
# The segmenter
# ======================================================================================================================


def dilate(trunk):
    """Give a ResNet output stride 8: C4 and C5 keep their weights, but no longer shrink the map; instead their 3x3
    convolutions look 2 and 4 cells far, the first of each stage half as far.

    OFFICIAL: G8. mmsegmentation's contract_dilation, and torchvision's replace_stride_with_dilation for ResNet-50. By this
    rule every fourth cell of the new C5 is exactly a cell of the old one; it also serves ResNet-18, which torchvision
    refuses to dilate.

    Args:
        trunk: common.ResNetTrunk, changed in place and returned.
    """
    for stage, dilation in ((trunk.layer3, 2), (trunk.layer4, 4)):
        for conv in (module for module in stage.modules() if isinstance(module, nn.Conv2d)):
            if conv.kernel_size == (3, 3):
                here = dilation // 2 if conv.stride == (2, 2) else dilation
                conv.dilation = conv.padding = (here, here)
            conv.stride = (1, 1)
    return trunk


def classifier(channels, classes):
    """The last 1x1 convolution of any head."""
    conv = nn.Conv2d(channels, classes, 1)
    nn.init.normal_(conv.weight, std=0.01)
    nn.init.zeros_(conv.bias)
    return conv


class FCNHead(nn.Module):
    """3x3 convolutions with norms, the last one beside the input if `concat`, then dropout of channels and a classifier.

    Args:
        channels: of the input. width: of everything between. classes: K. convs: how many before the concatenation.
    """

    def __init__(self, channels, width, classes, convs, concat):
        super().__init__()
        self.convs = nn.Sequential(*(self.conv(width if i else channels, width) for i in range(convs)))
        self.concat = self.conv(channels + width, width) if concat else None
        self.dropout = nn.Dropout2d(0.1)
        self.classifier = classifier(width, classes)

    @staticmethod
    def conv(channels, width):
        conv = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        return nn.Sequential(conv, nn.BatchNorm2d(width), nn.ReLU(inplace=True))

    def forward(self, x):
        """(N, C, H, W) -> logits (N, K, H, W)."""
        y = self.convs(x)
        if self.concat is not None:
            y = self.concat(torch.cat([x, y], 1))
        return self.classifier(self.dropout(y))


def upsample(logits, size, align_corners):
    """(N, K, h, w) -> (N, K, *size), bilinear, fp32."""
    return F.interpolate(logits.float(), size, mode="bilinear", align_corners=align_corners)


def pixel_loss(logits, labels):
    """Cross-entropy, 0 on ignored pixels, averaged over all pixels.

    OFFICIAL: G9. Over all of them, ignored ones included, as in DenseCL's mmsegmentation: crops with much padding weigh
    less. torch's own mean divides by the others alone.

    Args:
        logits: (N, K, H, W). labels: (N, H, W) int64, 0 .. K - 1 or 255.
    """
    return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none").mean()


class Segmenter(nn.Module):
    """A dilated ResNet and its heads; as a linear probe, frozen, with one convolution of normalised features.

    Attributes:
        auxiliary_weight: of the loss on C4 beside that on C5.
    """

    def __init__(self, arch, classes, align_corners, probe):
        super().__init__()
        self.align_corners, self.probe, self.auxiliary_weight = align_corners, probe, 0.4
        self.backbone = dilate(common.ResNetTrunk(arch))
        c4, c5 = self.backbone.widths[2:]
        if probe:
            # The norm has no weights. Without it, each backbone's scale of features would want a learning rate of its own.
            self.head, self.auxiliary = nn.Sequential(nn.BatchNorm2d(c5, affine=False), classifier(c5, classes)), None
            self.backbone.requires_grad_(False)
        else:
            self.head = FCNHead(c5, c5 // 4, classes, convs=2, concat=True)
            self.auxiliary = FCNHead(c4, c4 // 4, classes, convs=1, concat=False)

    def train(self, mode=True):
        super().train(mode)
        if self.probe:
            self.backbone.eval()  # batch statistics are frozen, too
        return self

    def forward(self, pixels, labels=None):
        """Logits at the size of the images; with labels, the loss and what to log.

        Args:
            pixels: (N, 3, H, W), normalised. labels: (N, H, W) int64.
        Returns:
            (N, K, H, W) fp32, or (loss, {name: scalar}).
        """
        c4, c5 = self.backbone(pixels)[2:]
        logits = upsample(self.head(c5), pixels.shape[-2:], self.align_corners)
        if labels is None:
            return logits
        loss = pixel_loss(logits, labels)
        right, valid = logits.detach().argmax(1) == labels, labels != IGNORED
        values = {"loss_head": loss, "accuracy": right.sum() / valid.sum().clamp(min=1)}
        if self.auxiliary is not None:
            auxiliary = upsample(self.auxiliary(c4), pixels.shape[-2:], self.align_corners)
            values["loss_auxiliary"] = pixel_loss(auxiliary, labels)
            loss = loss + self.auxiliary_weight * values["loss_auxiliary"]
        return loss, {"loss": loss, **values}


def build_segmenter(args, classes):
    """A `Segmenter` as the protocol has it, from --weights; and the lines that say what was taken."""
    model = Segmenter(args.arch, classes, args.align_corners, args.linear_probe)
    if args.weights == "random":
        return model, []
    state, line = harness.weights.load_backbone(args.weights, args.arch)
    model.backbone.load_state_dict(state)
    return model, [line]


# ======================================================================================================================
# Testing: whole or in windows, at the original size
# ======================================================================================================================


def slide_windows(height, width, crop, stride):
    """Windows of a grid over an image, the last of each row and column moved back to end with the image.

    Args:
        crop: (height, width) of windows, at most the image's are taken. stride: (down, right) between them.
    Returns:
        list of (top, left, bottom, right).
    """
    windows = []
    for row in range(max(height - crop[0] + stride[0] - 1, 0) // stride[0] + 1):
        for column in range(max(width - crop[1] + stride[1] - 1, 0) // stride[1] + 1):
            bottom, right = min(row * stride[0] + crop[0], height), min(column * stride[1] + crop[1], width)
            windows.append((max(bottom - crop[0], 0), max(right - crop[1], 0), bottom, right))
    return windows


def slide_stride(crop):
    """Windows overlap by a third: of DenseCL's 769 pixels, the next one begins 513 on."""
    return [round(side * 2 / 3) for side in crop]


def slide(network, pixels, windows):
    """Logits of an image, averaged over the windows that cover a pixel.

    Args:
        network: function (1, 3, h, w) -> (1, K, h, w). pixels: (1, 3, H, W). windows: covering the image.
    Returns:
        (1, K, H, W).
    """
    total, count = None, pixels.new_zeros(pixels.shape[-2:])
    for top, left, bottom, right in windows:
        logits = network(pixels[..., top:bottom, left:right])
        if total is None:
            total = logits.new_zeros(1, logits.shape[1], *pixels.shape[-2:])
        total[..., top:bottom, left:right] += logits
        count[top:bottom, left:right] += 1
    return total / count


@torch.no_grad()
def segment(model, image, size, crop, test):
    """The class of each pixel of an image.

    Args:
        model: Segmenter in evaluation mode. image: uint8 (3, H, W) at the test size. size: (height, width) of the original.
        crop: (height, width) of sliding windows. test: "whole" or "slide".
    Returns:
        uint8 numpy of the original size.
    """
    pixels = common.normalise(image[None])
    if test == "slide":
        logits = slide(model, pixels, slide_windows(*pixels.shape[-2:], crop, slide_stride(crop)))
    else:
        logits = model(pixels)
    return upsample(logits, size, model.align_corners).argmax(1)[0].byte().cpu().numpy()


class TestImages(torch.utils.data.Dataset):
    """self[place] -> (index, uint8 (3, H, W) at the test size, labels, uint8 of the original size); (index, None, why)
    where one cannot be read."""

    def __init__(self, data, indices, resize):
        self.data, self.indices, self.resize = data, indices, resize

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, place):
        index = self.indices[place]
        try:
            image, labels = self.data.read(index)
        except OSError as error:
            return index, None, str(error)
        return index, resize_image(to_tensor(image), resized(*labels.shape, *self.resize)), labels


def segment_all(model, data, args, world, count=6):
    """Segment all images of `data`, each process taking its share.

    Returns:
        confusion: int64 (K, K) over all images, {index: uint8 (H, W)} of the first `count`; equal on all processes.
    """
    model.eval()
    if world.size > 1:  # on CPUs each process has its own running statistics: the first one's, which are saved, count
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
    images = TestImages(data, range(world.rank, len(data), world.size), args.resize)
    loader = torch.utils.data.DataLoader(
        images, batch_size=None, num_workers=args.workers, worker_init_fn=harness.images.detach_worker
    )
    total, found, skipped = np.zeros((len(data.classes),) * 2, np.int64), {}, 0
    for index, image, labels in harness.pictures.progress(loader, len(images)) if world.rank == 0 else loader:
        if image is None:
            print(f"cannot be read, not counted: {data.name(index)} ({labels})", flush=True)
            skipped += 1
            continue
        labels = np.asarray(labels)
        predicted = segment(model, image.to(world.device), labels.shape, args.crop, args.test)
        total += confusion(predicted, labels, len(data.classes))
        if index < count:
            found[index] = predicted
    (skipped,) = harness.run.agree(skipped)
    if skipped > max(1, len(data) // 100):
        raise UserError(
            f"{skipped} of {len(data)} images to evaluate on cannot be read (more than 1 %): mend or remove them"
        )
    if world.size == 1:
        return total, found
    summed, parts = torch.from_numpy(total), [None] * world.size
    dist.all_reduce(summed)
    dist.all_gather_object(parts, found)
    return summed.numpy(), {index: one for part in parts for index, one in part.items()}


# ======================================================================================================================
# Evaluation, in percent
# ======================================================================================================================


def confusion(predicted, labels, classes):
    """How often each class (row) was taken for each (column); ignored pixels are left out.

    Args:
        predicted, labels: uint8 of equal shape. classes: K.
    Returns:
        int64 (K, K).
    """
    kept = labels != IGNORED
    places = labels[kept].astype(np.int64) * classes + predicted[kept]
    return np.bincount(places, minlength=classes**2).reshape(classes, classes)


def scores(matrix, classes):
    """mIoU, accuracy of pixels, mean accuracy of classes, percent, and the IoU of each class.

    Args:
        matrix: (K, K), truth in rows. classes: K names.
    Returns:
        dict; a class that is neither there nor predicted has no IoU and is in no mean.
    """
    right, truth, predicted = np.diag(matrix).astype(np.float64), matrix.sum(1), matrix.sum(0)
    union = truth + predicted - right
    with np.errstate(invalid="ignore", divide="ignore"):
        iou, recall = 100 * right / union, 100 * right / truth
    return {
        "mIoU": float(np.mean(iou[union > 0])) if union.any() else 0.0,
        "accuracy": float(100 * right.sum() / max(truth.sum(), 1)),
        "mean_accuracy": float(np.mean(recall[truth > 0])) if truth.any() else 0.0,
        "IoU_by_class": {name: float(x) for name, x, there in zip(classes, iou, union > 0, strict=True) if there},
    }


# ======================================================================================================================
# Pictures
# ======================================================================================================================


def colour(labels, palette):
    """Labels, uint8 (H, W), as a PNG has them: PIL, mode P, with the data set's colours."""
    image = Image.fromarray(labels)
    image.putpalette(palette.flatten().tolist())
    return image


def draw(image, maps, classes, palette, longest=None):
    """An image, and below it label maps in colours, and below them the names of their classes.

    Args:
        image: PIL RGB. maps: list of uint8 (H, W). longest: long side of the panels, pixels.
    Returns:
        PIL RGB.
    """
    scale = longest / max(image.size) if longest else 1.0
    size = max(round(image.width * scale), 1), max(round(image.height * scale), 1)
    panels = [image.resize(size, Image.BILINEAR)]
    panels += [colour(labels, palette).resize(size, Image.NEAREST).convert("RGB") for labels in maps]
    present = [k for k in range(len(classes)) if any((labels == k).any() for labels in maps)]
    font, x, y, places = ImageFont.load_default(12), 4, 4, []
    for k in present:
        width = 18 + int(font.getlength(classes[k])) + 8
        if x > 4 and x + width > size[0]:
            x, y = 4, y + 18
        places.append((k, x, y))
        x += width
    sheet = Image.new("RGB", (size[0], (size[1] + 5) * len(panels) + y + 20), "white")
    for row, panel in enumerate(panels):
        sheet.paste(panel, (0, (size[1] + 5) * row))
    pen, base = ImageDraw.Draw(sheet), (size[1] + 5) * len(panels)
    for k, x, y in places:
        pen.rectangle((x, base + y, x + 13, base + y + 13), tuple(palette[k].tolist()), "black")
        pen.text((x + 18, base + y), classes[k], "black", font)
    return sheet


def draw_predictions(data, found, path):
    """`path`: images, their truth and what was predicted, below one another. PAPER: SetSim Figures 4 to 6."""
    columns = []
    for index in sorted(found):
        image, labels = data.read(index)
        columns.append(draw(image, [labels, found[index]], data.classes, data.palette, 400))
    if not columns:
        return
    sheet = Image.new("RGB", (sum(column.width + 10 for column in columns), max(c.height for c in columns)), "white")
    x = 5
    for column in columns:
        sheet.paste(column, (x, 0))
        x += column.width + 10
    sheet.save(path)


def predict(args, model, classes, palette, world):
    """Segment every image below --predict: `masks/` with class numbers in the data set's colours, `pictures/` to look at,
    `classes.json` with the names."""
    names = harness.images.list_images(args.predict, "--predict")
    folder, count = os.path.join(args.output_dir, "predictions"), 0
    for name in harness.pictures.progress(names, len(names)):
        try:
            image = harness.images.read_image(os.path.join(args.predict, name))
        except OSError as error:
            print0(f"unreadable, passed over: {name} ({error})")
            continue
        size = image.height, image.width
        pixels = resize_image(to_tensor(image), resized(*size, *args.resize)).to(world.device)
        labels = segment(model, pixels, size, args.crop, args.test)
        pictures = {"masks": colour(labels, palette), "pictures": draw(image, [labels], classes, palette)}
        for kind, picture in pictures.items():
            path = os.path.join(folder, kind, f"{name}.png")
            os.makedirs(os.path.dirname(path), exist_ok=True)
            picture.save(path)
        count += 1
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "classes.json"), "w") as file:
        json.dump([{"value": k, "name": name, "colour": palette[k].tolist()} for k, name in enumerate(classes)], file)
    print0(f"{folder}: {count} masks and pictures, classes.json")


# ======================================================================================================================
# Training
# ======================================================================================================================

CURVES = {
    "loss": ["loss", "loss_head", "loss_auxiliary"],
    "accuracy in training": ["accuracy"],
    "learning rate": ["lr"],
}


def plan(args):
    """The schedule in batches of --batch-size, by the linear rule: iterations, the learning rate and its floor.

    DEVIATION: G10. The floor, 1e-4, is a hundredth of the protocol's rate and scaled with it.
    """
    batch = args.protocol["batch_size"]
    lr = args.lr * args.batch_size / batch
    return {"iterations": max(round(args.iterations * batch / args.batch_size), 1), "lr": lr, "floor": lr / 100}


def learning_rate(step, lr, floor, iterations):
    """From `lr` at step 0 to `floor` at step `iterations`, as the power 0.9 of what is left of the way."""
    return (lr - floor) * (1 - step / iterations) ** 0.9 + floor


def new_optimizer(model, lr, weight_decay):
    """SGD over all that is trained. OFFICIAL: G11. One group: norms and biases have weight decay, too, and the heads the
    backbone's learning rate."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.SGD(trained, lr, momentum=MOMENTUM, weight_decay=weight_decay)


def protocol_name(args):
    """The line that a result carries: the protocol, and every number of it that was changed."""
    task = {"voc": "VOC 2012 train_aug", "cityscapes": "Cityscapes", "ade20k": "ADE20K"}
    name = f"{task.get(args.task, args.task)}, {'linear probe' if args.linear_probe else 'FCN'} "
    name += f"{args.arch.replace('resnet', 'R')}-D8, crop {by(args.protocol['crop'])}, test {args.protocol['test']}"
    changed = [
        f"{key} {by(getattr(args, key)) if key in ('crop', 'resize') else getattr(args, key)}"
        for key in ("batch_size", "iterations", "lr", "weight_decay", "resize", "crop", "test")
        if getattr(args, key) != args.protocol[key]
    ]
    changed += [f"amp {args.amp}"] if args.amp != "none" else []
    return name + (f"; changed: {', '.join(changed)}" if changed else "")


def protocol_table(args, model):
    """{row: text}: the protocol, read off the model as built."""
    schedule = plan(args)
    steps = [0, schedule["iterations"] // 2, schedule["iterations"]]
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    (group,) = new_optimizer(model, schedule["lr"], args.weight_decay).param_groups
    of_norms = {id(p) for m in norms for p in m.parameters()}
    backbone = model.backbone
    dilations = {
        stage: [m.dilation[0] for m in getattr(backbone, stage).modules() if getattr(m, "kernel_size", 0) == (3, 3)]
        for stage in ("layer1", "layer2", "layer3", "layer4")
    }
    strides = [
        max(m.stride[0] for m in getattr(backbone, stage).modules() if isinstance(m, nn.Conv2d)) for stage in dilations
    ]
    windows = f"windows of {by(args.crop)}, {by(slide_stride(args.crop))} apart"
    table = {
        "protocol": protocol_name(args),
        "classes": str([m for m in model.head.modules() if isinstance(m, nn.Conv2d)][-1].out_channels),
        "batch": f"{args.batch_size} images",
        "iterations": str(schedule["iterations"]),
        "learning rate": ", ".join(f"{learning_rate(step, **schedule):.6g} at {step}" for step in steps),
        "weight decay": f"{group['weight_decay']:g} on {len(group['params'])} tensors, "
        f"{sum(id(p) in of_norms for p in group['params'])} of norms among them; momentum {group['momentum']:g}",
        "images": f"within {by(args.resize)} times {SCALES[0]:g} to {SCALES[1]:g}, crop {by(args.crop)}, flip, colours",
        "testing": f"within {by(args.resize)}, {windows if args.test == 'slide' else 'whole'}",
        "backbone": f"{args.arch}, strides {strides}, dilations {dilations['layer3']} in C4, {dilations['layer4']} in C5",
        "head": describe(model.head),
        "auxiliary": "none" if model.auxiliary is None else describe(model.auxiliary),
        "upsampling": f"bilinear, corners {'' if model.align_corners else 'not '}aligned",
        "loss": "cross-entropy over all pixels, 255 counts as 0"
        + ("" if model.auxiliary is None else f"; + {model.auxiliary_weight:g} of the auxiliary head"),
        "frozen": "nothing" if next(backbone.parameters()).requires_grad else "backbone",
        "batch norms": f"{sum(m.training for m in norms)} trained, {sum(not m.training for m in norms)} frozen",
    }
    return table


def describe(module):
    """The layers with weights, and dropout, in order: 'conv3 2048-512, norm, ...'."""
    names = []
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            names.append(f"conv{layer.kernel_size[0]} {layer.in_channels}-{layer.out_channels}")
        elif isinstance(layer, nn.modules.batchnorm._BatchNorm):
            names.append("norm" if layer.affine else "norm without weights")
        elif isinstance(layer, nn.Dropout2d):
            names.append(f"dropout of channels {layer.p:g}")
    return ", ".join(names)


def fine_tune(args, seed, folder, data, world, stop_signal):
    """One trial: train from the last checkpoint to the end, evaluate.

    Args:
        data: (training, validation). folder: where it is written.
    Returns:
        the trial's result as `results.jsonl` has it; None if a signal or --steps ended it before.
    """
    train, val = data
    images = TrainingImages(train, args, seed)
    if len(images) < args.batch_size:
        raise UserError(f"{train.title}: {len(images)} images to train on: --batch-size must be at most that")
    schedule = plan(args)
    total = schedule["iterations"]
    last = total if args.steps is None else min(total, args.steps)

    stop_signal.listen()
    # model, optimiser, resume -----------------------------------------------------------------------------------------
    settings = {name: value for name, value in vars(args).items() if name not in FREE}
    settings |= {"seed": seed, "files": train.fingerprint(), "val_files": val.fingerprint(), "processes": world.size}
    checkpoints = harness.legacy.Checkpoints(folder, NAME, settings)
    state = checkpoints.load(args.resume)
    harness.legacy.require_agreement(
        (settings["files"], state and state["step"]),
        "the processes see different images or checkpoints: data and --output-dir must be the same on all machines",
    )
    model, lines = new_segmenter(args, seed, len(train.classes), world, state)
    optimizer = new_optimizer(model, schedule["lr"], args.weight_decay)
    scaler = torch.amp.GradScaler(world.device.type, enabled=args.amp == "fp16")
    step, bad = 0, harness.images.BadImages(images)
    if state:
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        step, bad = state["step"], harness.images.BadImages(images, state["bad_images"])
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
        f"{protocol_name(args)}; {len(images)} images to train on, {len(val)} to evaluate; seed {seed}\n"
        f"batch {args.batch_size} = {world.size} x {share} on {world.device.type}; lr {schedule['lr']:g} to "
        f"{schedule['floor']:g}, {total} iterations; amp {args.amp}"
    )
    header = {"command": harness.run.command(), "versions": harness.run.versions(), "settings": settings}
    log = harness.legacy.RunLog(folder, header, step, last, world.rank == 0)
    model.train()
    loader = torch.utils.data.DataLoader(
        images,
        batch_sampler=harness.legacy.Batches(len(images), args.batch_size, world, seed, step, last),
        num_workers=args.workers,
        worker_init_fn=harness.images.detach_worker,
        pin_memory=world.device.type == "cuda",
    )

    def forward(network, number, pixels, labels):
        """The loss of a batch; the dropout depends on (seed, number, rank) alone."""
        torch.manual_seed(common.key_seed("step", seed, number, world.rank))
        pixels = pixels.to(world.device, memory_format=torch.channels_last, non_blocking=True)
        labels = labels.to(world.device, non_blocking=True).long()
        dtype = torch.float16 if args.amp == "fp16" else torch.bfloat16
        with torch.autocast(world.device.type, dtype, enabled=args.amp != "none"):
            return network(pixels, labels)

    def save():
        if world.rank == 0:
            checkpoints.save(
                {"segmenter.pth": model.state_dict()}, step=step, model=model.state_dict(), optimizer=optimizer.state_dict(),
                scaler=scaler.state_dict(), bad_images=sorted(bad.found),
                given={name: getattr(args, name) for name in args.given if name not in FORGOTTEN},
                classes=list(train.classes), palette=torch.from_numpy(train.palette),
            )  # fmt: skip

    # steps ------------------------------------------------------------------------------------------------------------
    meter, stop = harness.legacy.Meter(args.batch_size), 0
    for pixels, labels, index, passed in meter.timed(loader):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, schedule["lr"], schedule["floor"], total)
        loss, values = forward(network, step, pixels, labels)
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
    result = evaluated(args, model, val, world, folder)
    result = {"seed": seed, "step": step, "weights": args.weights, **result}
    log.write({"step": step, "result": result})
    log.close()
    if world.rank == 0:
        harness.legacy.draw_curves(folder, CURVES)
        print0(f"{folder}: {', '.join(sorted(os.listdir(folder)))}")
    return result


def new_segmenter(args, seed, classes, world, state):
    """The segmenter on its device, from pre-trained weights or from a checkpoint's `state`; and what was loaded."""
    with common.drawing("model", seed):
        if state:
            args = argparse.Namespace(**vars(args) | {"weights": "random"})
        model, lines = build_segmenter(args, classes)
    if state:
        model.load_state_dict(state["model"])
    if world.size > 1 and world.device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    elif world.size > 1:  # DEVIATION: G12.
        print0("batch norm is not synchronised between processes on a CPU")
    return model.to(world.device, memory_format=torch.channels_last), lines


def evaluated(args, model, val, world, folder):
    """Evaluate on the validation images: {"protocol", "mIoU", ...}, printed; and predictions.png."""
    torch.backends.cudnn.benchmark = False  # images to test on have many sizes
    matrix, found = segment_all(model, val, args, world)
    result = {"protocol": protocol_name(args)}
    if world.rank == 0:
        result |= scores(matrix, val.classes)
        draw_predictions(val, found, os.path.join(folder, "predictions.png"))
        print0(f"IoU: {', '.join(f'{name} {iou:.1f}' for name, iou in result['IoU_by_class'].items())}")
        print0(f"{result['protocol']}; weights {args.weights}: {numbers(result)}")
    return result


def numbers(result):
    """The means of a result for the eye."""
    return f"mIoU {result['mIoU']:.2f}, accuracy {result['accuracy']:.2f}, of classes {result['mean_accuracy']:.2f}"


def shown(line):
    """The part of a log line that the eye follows."""
    names = [name for name in line if name.startswith("loss")]
    return (
        f"{' '.join(f'{name} {line[name]:.3f}' for name in names)} accuracy {line['accuracy']:.3f} "
        f"{line['images_per_s']:.1f} img/s data {line['data_share']:.0%}"
    )


def print_protocol(args):
    """--steps 0: the protocol as built, without data (custom: with it)."""
    classes = {"voc": 21, "cityscapes": 19, "ade20k": 150, "scenes": 11}.get(args.task)
    if args.task == "custom":
        classes = len(open_data(args, "train").classes)
    model, lines = build_segmenter(args, classes)
    for row, text in protocol_table(args, model.train()).items():
        print0(f"{row:14} {text}")
    for line in lines:
        print0(line)


def main(argv=None):
    args = get_args(argv)
    if args.steps == 0:
        print_protocol(args)
        return
    world = harness.legacy.start_processes()
    if args.demo and "amp" not in args.given and harness.run.bf16_is_fast():
        args.amp = "bf16"
    if args.eval_only or args.predict:
        state = harness.weights.load_checkpoint_file(args.resume or os.path.join(args.output_dir, "checkpoint.pth"))
        classes, palette = state["classes"], state["palette"].numpy()
        if args.predict and world.size > 1:
            raise UserError("--predict is a job for one process: start it without torchrun")
        model, _ = new_segmenter(args, args.seed, len(classes), world, state)
        model.eval()
        if args.predict:
            predict(args, model, classes, palette, world)
            return
        val = open_data(args, "val", classes)
        if list(val.classes) != classes:
            raise UserError(f"{val.title} has other classes than the segmenter in {args.output_dir} was trained for")
        result = {"step": state["step"], **evaluated(args, model, val, world, args.output_dir)}
        if world.rank == 0:
            with open(os.path.join(args.output_dir, "evaluation.json"), "w") as file:
                json.dump(result, file)
        return

    if args.batch_size % world.size:
        raise UserError(f"--batch-size {args.batch_size}: must be divisible by the {world.size} processes")
    train = open_data(args, "train")
    data, results, stop_signal = (train, open_data(args, "val", train.classes)), [], harness.legacy.StopSignal()
    for seed in range(args.seed, args.seed + args.trials):  # AMBIGUOUS: G13. SetSim does not say; DenseCL: 5 for VOC
        folder = args.output_dir if args.trials == 1 else os.path.join(args.output_dir, f"seed{seed}")
        result = fine_tune(args, seed, folder, data, world, stop_signal)
        if result is None:
            return
        results.append(result)
        if world.rank == 0:  # as many lines as trials are finished, also after a kill
            with open(os.path.join(args.output_dir, "results.jsonl"), "w") as file:
                file.writelines(json.dumps(one) + "\n" for one in results)
    if args.trials > 1 and world.rank == 0:
        print0(f"{results[0]['protocol']}; weights {args.weights}; {len(results)} trials: {spread(results)}")


def spread(results):
    """Mean and standard deviation (n - 1) of the three means over trials, for the eye."""
    texts = []
    for metric in ("mIoU", "accuracy", "mean_accuracy"):
        values = [result[metric] for result in results]
        texts.append(f"{metric} {np.mean(values):.2f} +- {np.std(values, ddof=1):.2f}")
    return "; ".join(texts)


if __name__ == "__main__":
    harness.run.main(main)
