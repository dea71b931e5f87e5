# SPDX-License-Identifier: MIT
"""Semantic segmentation from any pre-trained ResNet, by the FCN protocols of the papers.

A fully convolutional network (Long et al., 2015) on a ResNet of output stride 8, as DenseCL fine-tuned it with
mmsegmentation, and SetSim and others after it. With --linear-probe the backbone is frozen and one 1x1 convolution on its
normalised features is trained: the cheap test of dense features.

    image --resize x 0.5 to 2, crop, flip, colours--> ResNet, dilated -+- C4 -- conv, dropout, 1x1 --> 0.4 x loss
                                                                       +- C5 -- 2 convs, with C5: conv, dropout, 1x1 --> loss
    image --resize--> ResNet, dilated -- C5 -- head --> logits, whole or window by window --> at the original size: classes
    N images of this process    K classes, labels 0 .. K - 1, 255 is ignored    H, W pixels    C channels
    sizes: (height, width)      windows: slices of rows and of columns

    python transfer_seg.py --demo                                                        scenes, minutes on two cores
    torchrun --nproc_per_node 4 transfer_seg.py --task voc --data /VOCdevkit --weights runs/setsim/resnet50.pth
    python transfer_seg.py --task custom --images photos --masks masks --weights W --batch-size 4 --crop 256
    python transfer_seg.py --predict photos --output-dir runs/transfer_seg               colour a folder of images
    python transfer_seg.py --task cityscapes --crop 512x1024 --steps 0                   print settings and model

The last iterate is evaluated, nothing is picked. docs/transfer.md says what was measured and what was not run. Letters
with numbers, such as G1, name rows of its table of decisions.
"""

import argparse
import contextlib
import glob
import hashlib
import itertools
import json
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import scipy.io
import torch
import torch.nn.functional as F
from PIL import Image, ImageColor, ImageDraw, ImageFont
from torch import nn
from torchvision import datasets, ops
from torchvision.transforms.functional import pil_to_tensor

import common
from common import UserError, number, print0
from harness import finetune, pictures, scenes, weights
from harness.images import list_images, read_image, readable
from harness.run import Run, main

# ==== Protocols: a task's numbers, as in the configurations of DenseCL's mmsegmentation; the command line =============

# Iterations count batches of `batch_size` images. They are scaled when --batch-size differs. An image is fitted into the
# box `resize`, lying or upright. `crop` is (height, width).
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
NAMES = {"voc": "VOC 2012 train_aug", "cityscapes": "Cityscapes", "ade20k": "ADE20K"}
HELP = {
    "voc": "a folder with VOC2012/ (ImageSets/Segmentation, JPEGImages, SegmentationClass) and SBD's benchmark_RELEASE/dataset (cls, train.txt, val.txt) in it",
    "cityscapes": "a folder with leftImg8bit/{train,val}/CITY/*_leftImg8bit.png and gtFine/{train,val}/CITY/*_gtFine_labelTrainIds.png (or *_gtFine_labelIds.png)",
    "ade20k": "a folder with ADEChallengeData2016/{images,annotations}/{training,validation} in it",
    "custom": "a folder of images, and a folder of PNG masks of the same names",
}
IGNORED = 255
MOMENTUM = 0.9  # of SGD


def height_x_width(text):
    """An argparse type: '512x1024' -> [512, 1024], '769' -> [769, 769]."""
    sides = [number(int, 32)(side) for side in text.split("x")]
    if len(sides) > 2:
        raise ValueError(text)
    return [sides[0], sides[-1]]


def get_args(argv=None):
    """(arguments; the checkpoint of --output-dir for --eval-only and --predict, else None)."""
    # fmt: off
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flag = parser.add_argument
    flag("--task", choices=TASKS, help="the protocol; custom: your own images and masks; scenes: built-in ones")
    flag("--data", metavar="DIR", help="the data set in its usual layout (voc: with VOC2012 and SBD's benchmark_RELEASE in it; cityscapes: with gtFine; ade20k: with annotations); 'scenes[:COUNT]'")
    flag("--images", metavar="DIR", help="custom: images; if it and --masks have val/, their train/ and val/ are used, else a fifth is held out to evaluate")
    flag("--masks", metavar="DIR", help="custom: PNG files named like the images, one channel, its values are class numbers, 255 is ignored")
    flag("--classes", nargs="+", metavar="NAME", help="custom: names of classes 0, 1, ...; default: as many as the masks have, without names")
    flag("--ignore", default=[], type=number(int, 0, 255), nargs="+", metavar="VALUE", help="custom: values of masks that are ignored like 255; classes are numbered without them")
    flag("--linear-probe", action="store_true", help="freeze the backbone, its batch statistics too, and train one 1x1 convolution on normalised C5")
    flag("--crop", type=height_x_width, metavar="HxW", help="pixels: size of training crops and of sliding windows; cityscapes: 769 or 512x1024 is a protocol of its own; default: the task's")
    flag("--resize", type=height_x_width, metavar="LONGxSHORT", help="pixels: the box that images are fitted into, in training times 0.5 to 2; default: the task's")
    flag("--test", choices=("whole", "slide"), help="the image at once, or windows of --crop that overlap by a third, logits averaged; default: the task's")
    flag("--weight-decay", type=number(float, 0), help="on all parameters, norms among them; default: 5e-4, of the probe 0")
    finetune.run_flags(parser, "transfer_seg", "segmenter")
    # fmt: on
    args, trained = finetune.parse(parser, argv, "transfer_seg", presets=protocol, free=("test", "resize"))
    wanted = ["images", "masks"] if args.task == "custom" else ["data"]
    for name in () if args.task == "scenes" or args.predict or args.steps == 0 and args.task != "custom" else wanted:
        if getattr(args, name) is None:
            parser.error(f"--task {args.task} wants --{name}: {HELP[args.task]}")
    return args, trained


def protocol(args):
    """The numbers of the task, of Cityscapes' second crop, and of the probe: {setting: value}."""
    whole = args.task == "cityscapes" and args.crop == CITYSCAPES_WHOLE["crop"]
    return TASKS[args.task] | (CITYSCAPES_WHOLE if whole else {}) | (PROBE if args.linear_probe else {})


def title(args):
    """The line that a result carries: the protocol, and every number of it that was changed."""
    own, kind = protocol(args), "linear probe" if args.linear_probe else "FCN"
    text = f"{NAMES.get(args.task, args.task)}, {kind} {args.arch.replace('resnet', 'R')}-D8, "
    text += f"crop {own['crop'][0]}x{own['crop'][1]}, test {own['test']}"
    return text + finetune.changed(args, own, "batch_size iterations lr weight_decay resize crop test")


# ==== Data sets: whatever the layout, `classes`, `palette`, name(i) and read(i) =======================================


class MaskData:
    """Images, and a mask for each.

    Args:
        rows: list of (name, image file, mask file, table), see `table_of`. classes: K names; label k stands for
        classes[k]. palette: uint8 (256, 3), the colours of labels and, last, of ignored pixels. title: for messages.
    Errors: OSError, no images, or files that do not exist.
    """

    def __init__(self, rows, classes, palette, title):
        self.rows, self.classes, self.palette, self.title = rows, classes, palette, title
        missing = [path for row in rows for path in row[1:3] if not os.path.exists(path)]
        if missing or not rows:
            what = f"{len(missing)} files are not there, the first is {missing[0]}" if rows else "no images"
            raise OSError(f"{title}: {what}")

    def __len__(self):
        return len(self.rows)

    def name(self, index):
        return self.rows[index][0]

    def read(self, index):
        """(image, PIL RGB; labels, uint8 (H, W)). Errors: OSError, one unreadable, sizes differ, or a strange value."""
        _, image_file, mask_file, table = self.rows[index]
        image, mask = read_image(image_file), read_mask(mask_file)
        labels = table[mask]
        if mask.shape[::-1] != image.size or labels.min() < 0:
            raise OSError(f"{mask_file} has not the size of its image, or has a value that is no class")
        return image, labels.astype(np.uint8)

    def fingerprint(self):
        """A name for this list of images, whatever folder it lies in."""
        digest = hashlib.sha256(os.fsencode("|".join(row[0] for row in self.rows))).hexdigest()
        return f"{len(self)} images, sha256 {digest[:16]}"


def table_of(values, ignored):
    """int16 (256,), from a mask's value to its label: values[k] becomes k, ignored ones 255, others -1, an error."""
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
            values = np.asarray(image)
    except Exception as error:  # Pillow and scipy raise many kinds for broken files
        raise OSError(f"{path}: {error}") from error
    if values.ndim != 2 or values.dtype.kind not in "iub" or values.min() < 0 or values.max() > 255:
        raise OSError(f"{path}: a mask must have one channel of class numbers, 0 to 255")
    return values.astype(np.uint8)


def palette_of(colours):
    """Colours, (r, g, b) or '#rrggbb', as the first rows of a palette, uint8 (256, 3); the rest is black."""
    rows = [ImageColor.getrgb(colour) if isinstance(colour, str) else colour for colour in colours]
    return np.pad(np.array(rows, np.uint8), ((0, 256 - len(rows)), (0, 0)))


def voc_palette():
    """VOC's colours, uint8 (256, 3): the bits of a number are dealt out to red, green and blue, highest first."""
    numbers, palette = np.arange(256), np.zeros((256, 3), int)
    for bit, channel in itertools.product(range(8), range(3)):
        palette[:, channel] |= (numbers >> 3 * bit + channel & 1) << 7 - bit
    return palette.astype(np.uint8)


VOC_CLASSES = (
    "background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person "
    "pottedplant sheep sofa train tvmonitor"
).split()


def read_voc(root, split):
    """VOC 2012, "val", or "train" with SBD added: train_aug, 10582 images.

    OFFICIAL: G4. As DenseCL: SBD's train and val without VOC's train and val. VOC's own masks (with ignored borders) are
    kept where there are any, SBD's have no borders. torchvision's train_noval is another, smaller list.
    """
    root = f"{root}/VOCdevkit" if os.path.isdir(f"{root}/VOCdevkit") else root
    voc, sbd = f"{root}/VOC2012", f"{root}/benchmark_RELEASE/dataset"
    own = {part: np.loadtxt(f"{voc}/ImageSets/Segmentation/{part}.txt", str, ndmin=1) for part in ("train", "val")}
    masks = {name: f"{voc}/SegmentationClass/{name}.png" for name in own[split]}
    if split == "train":
        extra = {name for part in own for name in np.loadtxt(f"{sbd}/{part}.txt", str, ndmin=1)}
        extra -= {*own["train"], *own["val"]}
        masks |= {name: f"{sbd}/cls/{name}.mat" for name in sorted(extra)}
    table = table_of(range(21), [IGNORED])
    rows = [(name, f"{voc}/JPEGImages/{name}.jpg", mask, table) for name, mask in masks.items()]
    return MaskData(rows, VOC_CLASSES, voc_palette(), f"VOC 2012 {split}")


def read_cityscapes(root, split):
    """Cityscapes' fine annotations: 19 train ids, from *_labelTrainIds.png or, where it is missing, from *_labelIds.png."""
    classes = sorted((c for c in datasets.Cityscapes.classes if 0 <= c.train_id < IGNORED), key=lambda c: c.train_id)
    ids, images, rows = [c.id for c in classes], f"{root}/leftImg8bit/{split}", []
    train_ids, label_ids = table_of(range(19), [IGNORED]), table_of(ids, {*range(256)} - {*ids})
    for name in sorted(glob.glob("*/*_leftImg8bit.png", root_dir=images)):  # CITY/IMAGE
        mask = f"{root}/gtFine/{split}/{name.replace('leftImg8bit', 'gtFine_labelTrainIds')}"
        kinds = (mask, train_ids), (mask.replace("TrainIds", "Ids"), label_ids)
        rows.append((name, f"{images}/{name}", *kinds[not os.path.exists(mask)]))
    return MaskData(rows, [c.name for c in classes], palette_of(c.color for c in classes), f"Cityscapes {split}")


def read_ade20k(root, split):
    """ADE20K: 150 classes; the masks' 0 is ignored in training and testing, and the others move down by one."""
    with open(os.path.join(os.path.dirname(finetune.__file__), "ade20k.csv")) as file:
        classes, colours = zip(*(line.split(",") for line in file.read().splitlines()), strict=True)
    root = f"{root}/ADEChallengeData2016" if os.path.isdir(f"{root}/ADEChallengeData2016") else root
    table, part = table_of(range(1, 151), [0, IGNORED]), {"train": "training", "val": "validation"}[split]
    names = sorted(name[:-4] for name in glob.glob("*.jpg", root_dir=f"{root}/images/{part}"))
    rows = [(n, f"{root}/images/{part}/{n}.jpg", f"{root}/annotations/{part}/{n}.png", table) for n in names]
    return MaskData(rows, list(classes), palette_of(colours), f"ADE20K {split}")


def read_custom(args, split, names):
    """One's own masks. names: of the classes that the segmenter knows; None: --classes, or as many as the masks have."""
    parts, names = custom_rows(args, say=split == "val"), names or args.classes
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        values = pool.map(values_of, parts[split] if names else parts["train"] + parts["val"])
        found = set().union(*values) - {*args.ignore, IGNORED}
    numbers = [value for value in range(IGNORED) if value not in args.ignore]
    names = names or [str(n) for n in numbers[: max(map(numbers.index, found), default=0) + 1]]
    numbers = numbers[: len(names)]
    if len(names) < 2 or found - {*numbers}:
        raise OSError(f"masks hold {sorted(found)}, {len(names)} classes: number these from 0 on, --ignore others")
    palette, table = voc_palette(), table_of(numbers, [*args.ignore, IGNORED])
    with Image.open(parts[split][0][2]) as mask:
        if mask.mode == "P":  # the masks bring their own colours
            own = palette_of(np.reshape(mask.getpalette("RGB"), (-1, 3)))
            palette[: len(names)], palette[IGNORED] = own[numbers], own[IGNORED]
    return MaskData([(*row, table) for row in parts[split]], names, palette, f"custom {split}")


def custom_rows(args, say):
    """{"train", "val": list of (name, image file, mask file)}: folders of these names, or a fifth of the images held out."""
    inside = {part: [os.path.join(folder, part) for folder in (args.images, args.masks)] for part in ("train", "val")}
    if all(map(os.path.isdir, inside["val"])):
        return {part: matching(*folders, say) for part, folders in inside.items()}
    rows = matching(args.images, args.masks, say)
    order, count = torch.randperm(len(rows), generator=common.generator("held out")).tolist(), max(len(rows) // 5, 1)
    if say:
        print0(f"{count} of {len(rows)} images are held out to evaluate; to choose them, make train/ and val/ folders")
    return {"train": [rows[i] for i in sorted(order[count:])], "val": [rows[i] for i in sorted(order[:count])]}


def matching(images, masks, say):
    """Every PNG below `masks` with the image of the same name (and subfolder): list of (name, image file, mask file)."""
    names = [name for name in list_images(masks, "--masks") if name.lower().endswith(".png")]
    others = {*names} if os.path.realpath(images) == os.path.realpath(masks) else {}
    there = {os.path.splitext(name)[0]: name for name in list_images(images, "--images") if name not in others}
    found = [(there.get(os.path.splitext(name)[0]), name) for name in names]
    alone = [mask for image, mask in found if image is None]
    if alone or not names:
        what = f"{len(alone)} have no image of the same name, for instance {alone[0]}" if alone else "none are there"
        raise OSError(f"of the PNG files in {masks}, {what}")
    if say and len(names) < len(there):
        print0(f"{len(there) - len(names)} of {len(there)} images in {images} have no mask and are passed over")
    return [(image, os.path.join(images, image), os.path.join(masks, mask)) for image, mask in found]


def values_of(row):
    """The values of a mask, a set. Errors: OSError, unreadable, or not of the size of its image."""
    _, image_file, mask_file = row
    mask = read_mask(mask_file)
    size = mask.shape
    with contextlib.suppress(Exception), Image.open(image_file) as image:  # unreadable images are found in training
        size = image.size
    if sorted(mask.shape) != sorted(size):  # a photograph may still be turned by its EXIF data
        raise OSError(f"{mask_file} has {mask.shape[::-1]} pixels, its image {size}")
    return {*np.flatnonzero(np.bincount(mask.ravel())).tolist()}


class SceneData(MaskData):
    """Built-in scenes number `first` to `first + count - 1`; class 0 is the background."""

    def __init__(self, first, count):
        self.first, self.rows, self.title = first, [(f"scene {first + i}",) for i in range(count)], "scenes"
        self.classes, self.palette = ["background", *scenes.CLASSES], palette_of(["#000000", *finetune.COLOURS])

    def read(self, index):
        scene = scenes.make_scene(0, self.first + index, finetune.SCENE)
        return Image.fromarray(scene["image"]), scene["semantic"]


def open_data(args, split, classes=None):
    """The task's data for "train" or "val". classes: for val, those that the segmenter knows. Errors: UserError."""
    if args.task == "scenes":
        return SceneData(*finetune.scene_range(args.data, split))
    where = f"--images {args.images} --masks {args.masks}" if args.task == "custom" else f"--data {args.data}"
    readers = {"voc": read_voc, "cityscapes": read_cityscapes, "ade20k": read_ade20k}
    try:
        return readers[args.task](args.data, split) if args.task in readers else read_custom(args, split, classes)
    except OSError as error:
        raise UserError(f"{where}: {error}; wanted is {HELP[args.task]}") from None


# ==== Training images: resize, crop, flip, colours ====================================================================


def fit(image, labels, box):
    """Image and labels, as large as fits: the longer side within the longer one of the box, the shorter within its shorter.

    OFFICIAL: G5. As OpenCV does it: bilinear without anti-aliasing; the nearest label's place is rounded down.

    Args:
        image: PIL RGB. labels: uint8 numpy (H, W), or None. box: two sides in pixels. Returns uint8 tensors.
    """
    scale = min(max(box) / max(image.size), min(box) / min(image.size))
    size = max(int(image.height * scale + 0.5), 1), max(int(image.width * scale + 0.5), 1)
    image = F.interpolate(pil_to_tensor(image)[None], size, mode="bilinear")[0]
    if labels is not None:
        labels = F.interpolate(torch.from_numpy(labels)[None, None], size, mode="nearest")[0, 0]
    return image, labels


def crop_window(labels, crop, draws, most=0.75):
    """The first of the drawn crops that has two classes or more, none of them on `most` of its pixels or more.

    OFFICIAL: G6. If none is so, the last one is taken. Ignored pixels count neither way.

    Args:
        labels: uint8 (H, W). crop: (height, width); an image that is smaller is taken whole on that side.
        draws: (n, 2) numbers in [0, 1), places of n crops: down, right. Returns (rows, columns), slices.
    """
    for draw in draws:
        starts = [int(x * (max(side - c, 0) + 1)) for x, side, c in zip(draw, labels.shape, crop, strict=True)]
        window = tuple(slice(start, start + c) for start, c in zip(starts, crop, strict=True))
        counts = torch.bincount(labels[window].flatten(), minlength=256)[:IGNORED]
        if (counts > 0).sum() > 1 and counts.max() < most * counts.sum():
            break
    return window


def distort(image, coins, numbers):
    """Photometric distortion: brightness, contrast, saturation, hue; the contrast otherwise last. Eight bits throughout.

    DEVIATION: G7. Saturation and hue are Pillow's, whose hue has 256 steps. OpenCV's has 180.

    Args:
        image: uint8 (H, W, 3). numbers: four in [0, 1), how much the image changes in these respects.
        coins: five in [0, 1), under one half: that it does; that the contrast comes first.
    """
    brightness, contrast, saturation, hue, first = (coin < 0.5 for coin in coins)
    b, c, s, h = 64 * numbers[0] - 32, 0.5 + numbers[1], 0.5 + numbers[2], int(36 * numbers[3]) - 18

    def cut(x):
        return x.clip(0, 255).astype(np.uint8)

    def in_hsv(channel, change):
        hsv = np.array(Image.fromarray(image).convert("HSV"))
        hsv[..., channel] = change(hsv[..., channel])
        return np.array(Image.frombytes("HSV", hsv.shape[1::-1], hsv.tobytes()).convert("RGB"))

    if brightness:
        image = cut(image + np.float32(b))
    if contrast and first:
        image = cut(image * np.float32(c))
    if saturation:
        image = in_hsv(1, lambda x: cut(x * np.float32(s)))
    if hue:
        image = in_hsv(0, lambda x: (x.astype(int) + round(h * 256 / 180)) % 256)
    if contrast and not first:
        image = cut(image * np.float32(c))
    return image


class TrainingImages(torch.utils.data.Dataset):
    """self[epoch, index] -> (float (3, H, W), normalised; labels, uint8 (H, W); index, unreadable neighbours passed over).

    H, W are the crop's, smaller images padded below and on the right: with 0 after normalisation, and 255. Everything
    random is drawn for each (seed, epoch, index).
    """

    def __init__(self, data, args):
        self.data, self.seed, self.resize, self.crop = data, args.seed, args.resize, args.crop

    def __getitem__(self, key):
        epoch, index = key
        found, passed = readable(self.data.read, index, len(self.data))
        image, labels = found or (Image.new("RGB", self.crop[::-1]), np.full(self.crop, IGNORED, np.uint8))
        rng = common.generator("views", self.seed, epoch, index)
        ratio, flip, *draws = torch.rand(2 + 2 * 11, generator=rng).tolist()  # a crop and ten more
        image, labels = fit(image, labels, [int(side * (0.5 + 1.5 * ratio)) for side in self.resize])
        rows, columns = crop_window(labels, self.crop, zip(draws[::2], draws[1::2], strict=True))
        image, labels = image[:, rows, columns], labels[rows, columns]
        if flip < 0.5:
            image, labels = image.flip(2), labels.flip(1)
        coins, numbers = torch.rand(5, generator=rng).tolist(), torch.rand(4, generator=rng).tolist()
        image = distort(image.permute(1, 2, 0).contiguous().numpy(), coins, numbers)
        image = common.normalise(torch.from_numpy(image).permute(2, 0, 1)[None])[0]
        padding = 0, self.crop[1] - labels.shape[1], 0, self.crop[0] - labels.shape[0]
        return F.pad(image, padding), F.pad(labels, padding, value=IGNORED), index, passed


# ==== The segmenter ===================================================================================================


def dilate(trunk):
    """Give a ResNet output stride 8, in place. C4 and C5 keep their weights, but no longer shrink the map; instead their
    3x3 convolutions look 2 and 4 cells far, the first of each stage half as far.

    OFFICIAL: G8. mmsegmentation's contract_dilation, and torchvision's replace_stride_with_dilation for ResNet-50. Every
    fourth cell of the new C5 is exactly a cell of the old one. It serves ResNet-18 too, which torchvision does not dilate.
    """
    for stage, dilation in ((trunk.layer3, 2), (trunk.layer4, 4)):
        for conv in (module for module in stage.modules() if isinstance(module, nn.Conv2d)):
            if conv.kernel_size == (3, 3):
                here = dilation // 2 if conv.stride == (2, 2) else dilation
                conv.dilation = conv.padding = (here, here)
            conv.stride = (1, 1)
    return trunk


class FCNHead(nn.Module):
    """3x3 convolutions with norms, the last one beside the input if `concat`, then dropout of channels and a classifier.

    Args:
        channels: of the input. width: of everything between. classes: K. convs: how many before the concatenation.
    """

    def __init__(self, channels, width, classes, convs, concat):
        super().__init__()
        self.convs = nn.Sequential(*(ops.Conv2dNormActivation(width if i else channels, width) for i in range(convs)))
        self.concat = ops.Conv2dNormActivation(channels + width, width) if concat else None
        for conv in (module for module in self.modules() if isinstance(module, nn.Conv2d)):
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        self.dropout, self.classifier = nn.Dropout2d(0.1), nn.Conv2d(width, classes, 1)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x):
        """(N, C, H, W) -> logits (N, K, H, W)."""
        y = self.convs(x)
        if self.concat is not None:
            y = self.concat(torch.cat([x, y], 1))
        return self.classifier(self.dropout(y))


def pixel_loss(logits, labels):
    """Cross-entropy of (N, K, H, W) and (N, H, W) int64, 0 on ignored pixels, averaged over all pixels.

    OFFICIAL: G9. Over all of them, ignored ones included, as in DenseCL's mmsegmentation: crops with much padding weigh
    less. torch's own mean divides by the others alone.
    """
    return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none").mean()


class Segmenter(nn.Module):
    """A dilated ResNet and its heads; as a linear probe, frozen, with one convolution of normalised features."""

    def __init__(self, arch, classes, align_corners, probe):
        super().__init__()
        self.align_corners, self.probe = align_corners, probe
        self.backbone = dilate(common.ResNetTrunk(arch, zero_init_residual=True))
        c4, c5 = self.backbone.widths[2:]
        if probe:
            # The norm has no weights. Without it, each backbone's scale of features would want a learning rate of its own.
            classifier = FCNHead(c5, c5, classes, convs=0, concat=False).classifier
            self.head, self.auxiliary = nn.Sequential(nn.BatchNorm2d(c5, affine=False), classifier), None
            self.backbone.requires_grad_(False)
        else:
            self.head = FCNHead(c5, c5 // 4, classes, convs=2, concat=True)
            self.auxiliary = FCNHead(c4, c4 // 4, classes, convs=1, concat=False)

    def train(self, mode=True):
        """torch's, but the batch statistics of a probe's backbone stay frozen."""
        super().train(mode)
        self.backbone.train(mode and not self.probe)
        return self

    def upsample(self, logits, size):
        """(N, K, h, w) -> (N, K, *size), bilinear, fp32."""
        return F.interpolate(logits.float(), size, mode="bilinear", align_corners=self.align_corners)

    def forward(self, pixels, labels=None):
        """(N, 3, H, W), normalised -> logits (N, K, H, W), fp32. With labels, (N, H, W) int64: (loss, scalars to log)."""
        c4, c5 = self.backbone(pixels)[2:]
        logits = self.upsample(self.head(c5), pixels.shape[-2:])
        if labels is None:
            return logits
        right, valid = logits.detach().argmax(1) == labels, labels != IGNORED
        loss = pixel_loss(logits, labels)
        values = {"loss_head": loss, "accuracy": right.sum() / valid.sum().clamp(min=1)}
        if self.auxiliary is not None:
            values["loss_auxiliary"] = pixel_loss(self.upsample(self.auxiliary(c4), pixels.shape[-2:]), labels)
            loss = loss + 0.4 * values["loss_auxiliary"]
        return loss, values


# ==== Testing: whole or in windows, at the original size; mIoU in percent =============================================


def slide_windows(height, width, crop):
    """Windows of an image, list of (rows, columns), slices; the last of a row or column ends with the image.

    They overlap by a third: of DenseCL's 769 pixels, the next one begins 513 on. crop: (height, width) of windows.
    """
    grid = []
    for side, c in zip((height, width), crop, strict=True):
        stride = round(c * 2 / 3)
        ends = [min(i * stride + c, side) for i in range(max(side - c + stride - 1, 0) // stride + 1)]
        grid.append([slice(max(end - c, 0), end) for end in ends])
    return list(itertools.product(*grid))


def slide(network, pixels, crop):
    """Logits of an image, averaged over the windows that cover a pixel: (1, 3, H, W) -> (1, K, H, W), as of the network.

    network: function (1, 3, h, w) -> (1, K, h, w). crop: (height, width) of windows.
    """
    total, count = None, pixels.new_zeros(pixels.shape[-2:])
    for rows, columns in slide_windows(*pixels.shape[-2:], crop):
        logits = network(pixels[..., rows, columns])
        total = logits.new_zeros(1, logits.shape[1], *pixels.shape[-2:]) if total is None else total
        total[..., rows, columns] += logits
        count[rows, columns] += 1
    return total / count


@torch.no_grad()
def segment(model, image, size, args):
    """The class of each pixel of an image, uint8 numpy of the original `size`. image: uint8 (3, H, W) at the test size."""
    pixels = common.normalise(image[None])
    logits = slide(model, pixels, args.crop) if args.test == "slide" else model(pixels)
    return model.upsample(logits, size).argmax(1)[0].byte().cpu().numpy()


def confusion(predicted, labels, classes):
    """How often each class (row) was taken for each (column), int64 (K, K), ignored pixels left out. Args: uint8 maps; K."""
    kept = labels != IGNORED
    places = labels[kept].astype(np.int64) * classes + predicted[kept]
    return np.bincount(places, minlength=classes**2).reshape(classes, classes)


def scores(matrix, classes):
    """{"mIoU", "accuracy" of pixels, "mean_accuracy" of classes, "IoU_by_class"}, percent.

    matrix: (K, K), truth in rows. A class that is neither there nor predicted has no IoU and is in no mean.
    """
    right, truth, predicted = np.diag(matrix).astype(np.float64), matrix.sum(1), matrix.sum(0)
    union = truth + predicted - right
    iou = {name: float(100 * r / u) for name, r, u in zip(classes, right, union, strict=True) if u}
    recall = [100 * r / t for r, t in zip(right, truth, strict=True) if t]
    return {
        "mIoU": float(np.mean([*iou.values()] or 0)),
        "accuracy": float(100 * right.sum() / max(truth.sum(), 1)),
        "mean_accuracy": float(np.mean(recall or 0)),
        "IoU_by_class": iou,
    }


# ==== Pictures ========================================================================================================


def colour(labels, palette):
    """Labels, uint8 (H, W), as a PNG has them: PIL, mode P, with the data set's colours."""
    image = Image.fromarray(labels)
    image.putpalette(palette.flatten().tolist())
    return image


def draw(image, maps, classes, palette, longest=None):
    """PIL RGB: an image, label maps, uint8 (H, W), in colours, the names of their classes. longest: side of these panels."""
    scale = longest / max(image.size) if longest else 1.0
    width, height = (max(round(side * scale), 1) for side in image.size)
    panels = [image.resize((width, height), Image.BILINEAR)]
    panels += [colour(labels, palette).resize((width, height), Image.NEAREST).convert("RGB") for labels in maps]
    present = [k for k in range(len(classes)) if any((labels == k).any() for labels in maps)]
    y, font = (height + 5) * len(panels), ImageFont.load_default(12)
    sheet = Image.new("RGB", (width, y + 18 * len(present)), "white")
    for row, panel in enumerate(panels):
        sheet.paste(panel, (0, (height + 5) * row))
    pen = ImageDraw.Draw(sheet)
    for k in present:
        pen.rectangle((4, y, 17, y + 13), tuple(palette[k].tolist()), "black")
        pen.text((22, y), classes[k], "black", font)
        y += 18
    return sheet


def predict(args, model, classes, palette, device):
    """Segment every image below --predict: class numbers in `masks/`, their names in `classes.json`, and `pictures/`."""
    folder = os.path.join(args.output_dir, "predictions")
    os.makedirs(folder, exist_ok=True)
    for name, image in finetune.folder_to_predict(args):
        labels = segment(model, fit(image, None, args.resize)[0].to(device), image.size[::-1], args)
        finetune.save_picture(colour(labels, palette), folder, "masks", f"{name}.png")
        finetune.save_picture(draw(image, [labels], classes, palette), folder, "pictures", f"{name}.png")
    rows = [{"value": k, "name": name, "colour": palette[k].tolist()} for k, name in enumerate(classes)]
    weights.write_atomically(os.path.join(folder, "classes.json"), [json.dumps(rows).encode()])
    print0(f"{folder}: masks, pictures, classes.json")


# ==== Training ========================================================================================================


def learning_rate(step, lr, iterations):
    """From `lr` at step 0 to its floor at step `iterations`, as the power 0.9 of what is left of the way.

    DEVIATION: G10. The floor, 1e-4, is a hundredth of the protocol's rate and scaled with it.
    """
    return (lr - lr / 100) * (1 - step / iterations) ** 0.9 + lr / 100


def new_segmenter(args, device, classes, source):
    """The protocol's segmenter on a device, drawn from the seed. source: of the backbone, a value of --weights."""
    with common.drawing("model", args.seed):
        model = Segmenter(args.arch, classes, args.align_corners, args.linear_probe)
    if source != "random":
        weights.load_into(model.backbone, source, args.arch)
    # DEVIATION: G12. Batch norm is over the images of all processes, but not on CPUs.
    return common.synchronised_norms(model, device).to(device, memory_format=torch.channels_last)


def fine_tune(args, train, val):
    """One trial: train from the last checkpoint to the end, evaluate. None if a signal or --steps ended it before."""
    iterations, lr = finetune.linear_rule(args, protocol(args))
    run = Run("transfer_seg", args, train, iterations, least=1, val_files=val.fingerprint())
    model = new_segmenter(args, run.device, len(train.classes), "random" if run.continued else args.weights)
    # OFFICIAL: G11. One group: norms and biases have weight decay, too, and the heads the backbone's learning rate.
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr, momentum=MOMENTUM, weight_decay=args.weight_decay)
    scaler = torch.amp.GradScaler(run.device.type, enabled=args.amp == "fp16")
    kept = dict(args=vars(args), classes=list(train.classes), palette=train.palette.tolist())
    run.resume(model, optimizer, scaler, {"segmenter.pth": model}, **kept)
    network = common.distributed(model, run.device)
    torch.backends.cudnn.benchmark = True  # all crops have one size
    print0(f"{title(args)}; {len(train)} images to train on, {len(val)} to evaluate; seed {args.seed}")

    model.train()
    for pixels, labels in run.steps(TrainingImages(train, args)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(run.step, lr, iterations)
        torch.manual_seed(common.key_seed("step", args.seed, run.step, run.rank))  # of the dropout
        with common.autocast(args.amp, run.device):
            loss, values = network(pixels.contiguous(memory_format=torch.channels_last), labels.long())
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        run.log(loss=loss, lr=group["lr"], **values)
    if run.result or not run.ended:
        return run.result
    torch.backends.cudnn.benchmark = False  # images to test on have many sizes
    result = evaluated(args, model, val, run.device)
    run.write(result=result)
    return result


def evaluated(args, model, val, device):
    """Evaluate on the validation images: {"seed", "protocol", "mIoU", ...}, printed; and predictions.png."""

    def prepare(index):
        image, labels = val.read(index)
        return fit(image, None, args.resize)[0], labels

    model, found, matrix = finetune.ready_to_test(model), {}, np.zeros((len(val.classes),) * 2, int)
    for index, (image, labels) in finetune.share_of(val, prepare, args.workers):
        predicted = segment(model, image.to(device), labels.shape, args)
        matrix += confusion(predicted, labels, len(val.classes))
        found |= {index: predicted} if index < 6 else {}
    matrix, found = sum(finetune.together({common.rank(): matrix}).values()), finetune.together(found)
    result = {"seed": args.seed, "protocol": title(args), "weights": args.weights, **scores(matrix, val.classes)}
    if common.rank() == 0:
        shown = finetune.first_readable(val, found.__contains__)  # PAPER: SetSim Figures 4 to 6
        columns = [[draw(image, [labels, found[i]], val.classes, val.palette, 400)] for i, (image, labels) in shown]
        pictures.save_columns(os.path.join(args.output_dir, "predictions.png"), columns)
        print0(f"IoU: {', '.join(f'{name} {iou:.1f}' for name, iou in result['IoU_by_class'].items())}")
        text = ", ".join(f"{name} {value:.2f}" for name, value in means(result).items())
        print0(f"{result['protocol']}; weights {args.weights}: {text}")
    return result


def means(result):
    """{"mIoU": percent, ...} of a result."""
    return {name: result[name] for name in ("mIoU", "accuracy", "mean_accuracy")}


def job(argv=None):
    """What the command line asks for."""
    args, trained = get_args(argv)
    if args.steps == 0:
        print_settings(args)
        return
    _, _, device = common.start_processes()
    torch.backends.cudnn.benchmark = False
    if trained:
        classes, palette = trained["classes"], np.array(trained["palette"], np.uint8)
        model = new_segmenter(args, device, len(classes), "random")
        model.load_state_dict(trained["model"])
        if args.predict:
            predict(args, model.eval(), classes, palette, device)
            return
        result = evaluated(args, model, open_data(args, "val", classes), device)
        if common.rank() == 0:
            path = os.path.join(args.output_dir, "evaluation.json")
            weights.write_atomically(path, [json.dumps({"step": trained["step"], **result}).encode()])
        return
    train = open_data(args, "train")
    val = open_data(args, "val", train.classes)
    # AMBIGUOUS: G13. SetSim does not say how many; DenseCL: five on VOC.
    finetune.run_trials(args, lambda args: fine_tune(args, train, val), means)


def print_settings(args):
    """--steps 0: the settings and the model as built. Only custom data and scenes are opened."""
    classes = {"voc": 21, "cityscapes": 19, "ade20k": 150}.get(args.task) or len(open_data(args, "train").classes)
    settings = vars(args) | dict(zip(("iterations", "lr"), finetune.linear_rule(args, protocol(args)), strict=True))
    rows = "\n".join(f"{name:16} {value}" for name, value in settings.items())
    print0(f"{title(args)}\n{rows}\n{new_segmenter(args, torch.device('cpu'), classes, args.weights)}")


if __name__ == "__main__":
    main(job)
