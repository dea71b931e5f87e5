# SPDX-License-Identifier: MIT
"""A sample of Open Images by the two criteria of D3SSL's OpenImage-MINI, and the numbers of Table 2 for it.

PAPER: section 5.1, Table 2. Its list of images was never published: this is a sample by its rules, no copy (D38). All
images, in a seeded random order, are taken one by one if (1) at least one object is of a class that COCO has too, and
(2) with it no such class has more objects in the sample than in COCO. --count n gives the first n lines of the list.

    python -m tools.openimages_mini --annotations oidv6-train-annotations-bbox.csv \\
        --classes class-descriptions-boxable.csv --coco instances_train2017.json
    sed 's|^|train/|' openimage-mini.txt > download.txt    the list as Open Images' own downloader.py wants it
    (the first command again) --images DIR                 when DIR holds ID.jpg of each line: openimage-mini.json

Boxes in the CSV are fractions of the image, COCO's are pixels, and no CSV has the sizes of images: with --images they
come from the files' headers, turned as `harness.images.read_image` turns them (an assumption). One object is a box with
a class of --classes, a box around a group (IsGroupOf 1, `iscrowd` 1 in the JSON), a crowd region of COCO (D38).
"""

import argparse
import contextlib
import csv
import json
import operator
import os
import re
from array import array

import numpy as np
from PIL import ExifTags, Image

import harness.run
import harness.weights
from common import UserError, number, print0
from harness.pictures import progress

# Open Images' names of COCO's classes, where there are others than COCO's (D38). It labels an object with the most
# specific class (a woman is Woman, not Person as well). So kinds count that COCO's annotators would call by the name of
# the class. Cup, dining table and potted plant have near classes alone. Old and new names stand side by side.
KINDS = {
    "person": "Person, Man, Woman, Boy, Girl", "car": "Car, Limousine, Taxi, Van", "boat": "Boat, Barge, Canoe, Gondola",
    "bird": "Bird, Blue jay, Canary, Chicken, Duck, Eagle, Falcon, Goose, Magpie, Ostrich, "
    "Owl, Parrot, Penguin, Raven, Sparrow, Swan, Turkey, Woodpecker", "cow": "Cattle, Bull",
    "bear": "Bear, Brown bear, Polar bear", "frisbee": "Flying disc", "skis": "Ski",
    "sports ball": "Ball, Cricket ball, Football, Golf ball, Rugby ball, Tennis ball, Volleyball, Volleyball (Ball)",
    "cup": "Coffee cup, Mug", "knife": "Knife, Kitchen knife", "bowl": "Bowl, Mixing bowl",
    "sandwich": "Sandwich, Hamburger, Submarine sandwich", "donut": "Doughnut, Donut",
    "couch": "Couch, Loveseat, Sofa bed, Studio couch", "potted plant": "Houseplant", "bed": "Bed, Infant bed",
    "dining table": "Kitchen & dining room table", "tv": "Television, Computer monitor", "mouse": "Computer mouse",
    "remote": "Remote control", "keyboard": "Computer keyboard", "cell phone": "Mobile phone",
    "microwave": "Microwave oven", "clock": "Clock, Alarm clock, Digital clock, Wall clock", "hair drier": "Hair dryer",
}  # fmt: skip
COLUMNS = ("ImageID", "LabelName", "XMin", "YMin", "XMax", "YMax", "IsGroupOf")


def get_args(argv=None):
    # fmt: off
    parser = argparse.ArgumentParser(prog="python -m tools.openimages_mini", description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flag = parser.add_argument
    flag("--annotations", required=True, metavar="CSV", help="boxes of Open Images: oidv6-train-annotations-bbox.csv")
    flag("--classes", required=True, metavar="CSV", help="names of its classes: class-descriptions-boxable.csv")
    flag("--coco", required=True, metavar="JSON", help="objects of COCO: instances_train2017.json")
    flag("--images", metavar="DIR", help="the images of the list, ID.jpg each, to read sizes from: writes the JSON too")
    flag("--out", default="openimage-mini", metavar="NAME", help="NAME.txt is the list, NAME.json its boxes in COCO's format")
    flag("--count", default=146_000, type=number(int, 1), help="stop at so many images")
    flag("--seed", default=0, type=number(int, 0), help="of the order in which images are looked at")
    # fmt: on
    return parser.parse_args(argv)


@contextlib.contextmanager
def reading(path, what):
    """A text file. Errors: UserError, it cannot be read, or the code inside meets something that it does not expect."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            yield file
    except (OSError, ValueError, LookupError, TypeError, csv.Error, RecursionError) as error:
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise UserError(f"{path}: cannot be read ({reason}): give {what}") from None


def read_boxes(path, mids):
    """R boxes of N images from Open Images' CSV, in its order. `mids`: names of classes 0 .. K - 1, others are left out.

    Returns:
        (N,) uint64 ids of images, ascending; of each box its image, (R,) a position in ids; its class, (R,) int16; its
        corners x0, y0, x1, y1 as fractions of the image, (R, 4) float32; (R,) bool, it is around a group
    """
    classes = {mid: place for place, mid in enumerate(mids)}
    # Numbers alone are kept, 27 bytes a row: as Python's objects, 14 million rows would take gigabytes.
    ids, category, corners, group = array("Q"), array("h"), array("f"), array("b")
    with reading(path, "oidv6-train-annotations-bbox.csv") as file:
        reader = csv.reader(progress(file, os.path.getsize(path), what="bytes of boxes", size=len))
        header = next(reader, [])
        columns = operator.itemgetter(*map(header.index, COLUMNS))
        for row in reader:
            try:
                name, mid, *edges, is_group = columns(row)
                x0, y0, x1, y1 = box = [float(edge) for edge in edges]
                inside = -0.01 <= x0 <= x1 <= 1.01 and -0.01 <= y0 <= y1 <= 1.01  # but for a rounding error
                if not inside or len(row) != len(header) or not re.fullmatch("[0-9a-f]{16}", name):
                    raise ValueError
            except (ValueError, LookupError):
                line = f"{path}, line {reader.line_num}: no row of boxes ({','.join(row)[:80]!r})"
                raise UserError(f"{line}: download the file again") from None
            if mid in classes:
                ids.append(int(name, 16))
                category.append(classes[mid])
                corners.extend(box)
                group.append(is_group == "1")
    ids, image = np.unique(np.frombuffer(ids, np.uint64), return_inverse=True)
    corners = np.frombuffer(corners, np.float32).reshape(-1, 4).clip(0, 1)
    return ids, image, np.frombuffer(category, np.int16), corners, np.frombuffer(group, bool)


def read_coco(path):
    """COCO's instances: names of categories; number of images; of each of M objects its image's id and its category's
    place among the names, (M,) int64 each."""
    kept = {"images", "annotations", "categories", "id", "name", "image_id", "category_id"}  # no outlines: gigabytes
    with reading(path, "instances_train2017.json") as file:
        found = json.load(file, object_hook=lambda entry: {name: entry[name] for name in kept & entry.keys()})
        places = {category["id"]: place for place, category in enumerate(found["categories"])}
        objects = [(entry["image_id"], places[entry["category_id"]]) for entry in found["annotations"]]
        image, category = np.array(objects, np.int64).reshape(-1, 2).T
        images = {entry["id"] for entry in found["images"]} | {*image.tolist()}
        return [entry["name"] for entry in found["categories"]], len(images), image, category


def shared_classes(names, coco_names):
    """For each of Open Images' K classes, the position of its counterpart in `coco_names`, or -1: (K,) int16."""
    kinds = [KINDS.get(coco, coco.capitalize()).split(", ") for coco in coco_names]
    counterpart = {name: place for place, of_class in enumerate(kinds) for name in of_class}
    return np.array([counterpart.get(name, -1) for name in names], np.int16)


def sample(image, shared, limits, images, count, seed):
    """PAPER: section 5.1. The greedy pass over all images in a seeded random order (D38).

    Args:
        image: (R,) the image of each object, 0 .. images - 1. shared: (R,) its shared class, or -1: none.
        limits: C numbers of objects, at most so many are taken of each shared class. count: of images to stop at.
    Returns:
        (n,) int64 images in the order taken, n <= count; [C] numbers of objects in them
    """
    of_shared = shared >= 0
    key = image[of_shared].astype(np.int64) * len(limits) + shared[of_shared]
    key, objects = np.unique(key, return_counts=True)  # one entry for each shared class of an image
    owner, kind = np.divmod(key, len(limits))
    start = np.searchsorted(owner, np.arange(images + 1))
    taken, used = [], [0] * len(limits)
    for i in np.random.default_rng(seed).permutation(images):
        here = slice(start[i], start[i + 1])
        found = list(zip(kind[here].tolist(), objects[here].tolist(), strict=True))
        if found and all(used[c] + n <= limits[c] for c, n in found):  # criteria 1 and 2
            taken.append(i)
            for c, n in found:
                used[c] += n
            if len(taken) == count:
                break
    return np.array(taken, np.int64), used


def statistics(image, category, images):
    """PAPER: Table 2. (number of images, objects an image, categories an image, categories that occur).

    Args:
        image, category: (R,) integers >= 0 of each object. images: how many there are, with objects or without.
    """
    pairs = np.unique(image.astype(np.int64) * (int(category.max(initial=0)) + 1) + category)
    return images, len(image) / images, len(pairs) / images, len(np.unique(category))


def image_size(path):
    """Width and height of an image as `harness.images.read_image` turns it, from the header."""
    try:
        with Image.open(path) as file:
            turned = file.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)  # by a quarter
            return file.size[::-1] if turned else file.size
    except Exception as error:  # Pillow raises OSError, ValueError, SyntaxError, ... for broken files
        raise UserError(f"{path}: no image ({getattr(error, 'strerror', None) or error}): download it again") from None


def coco_json(boxes, names, taken, folder):
    """The sample in COCO's format, a dict. Ids start at 1, in the order of the list.

    Args:
        boxes: what `read_boxes` returns. names: of the K classes. taken: (n,) images, of which `folder` holds ID.jpg.
    """
    ids, image, category, corners, group = boxes
    order = np.argsort(image, kind="stable")
    start = np.searchsorted(image[order], np.arange(len(ids) + 1))
    images, annotations = [], []
    for i, place in enumerate(progress(taken, len(taken), what="sizes of images"), 1):
        name = f"{ids[place]:016x}.jpg"
        width, height = image_size(f"{folder}/{name}")
        images.append({"id": i, "file_name": name, "width": width, "height": height})
        for row in order[start[place] : start[place + 1]]:
            x0, y0, x1, y1 = corners[row].tolist()
            w, h = (x1 - x0) * width, (y1 - y0) * height
            box = [round(value, 2) for value in (x0 * width, y0 * height, w, h)]
            entry = {"id": len(annotations) + 1, "image_id": i, "category_id": int(category[row]) + 1, "bbox": box}
            annotations.append(entry | {"area": round(w * h, 2), "iscrowd": int(group[row])})
    categories = [{"id": i, "name": name} for i, name in enumerate(names, 1)]
    return {"images": images, "annotations": annotations, "categories": categories}


def main(argv=None):
    args = get_args(argv)
    if not os.path.isdir(os.path.dirname(args.out) or "."):
        raise UserError(f"--out {args.out}: no such folder")
    with reading(args.classes, "class-descriptions-boxable.csv") as file:
        classes = {mid: name for mid, name in csv.reader(file) if mid != "LabelName"}  # there may be a header
    coco_names, coco_images, coco_image, coco_category = read_coco(args.coco)
    shared = shared_classes(classes.values(), coco_names)
    lacking = [name for place, name in enumerate(coco_names) if place not in shared]
    print0(f"{len(coco_names)} classes of COCO; without a counterpart in --classes: {', '.join(lacking) or 'none'}")
    boxes = ids, image, category, *_ = read_boxes(args.annotations, classes)
    limits = np.bincount(coco_category, minlength=len(coco_names)).tolist()
    taken, used = sample(image, shared[category], limits, len(ids), args.count, args.seed)
    if not len(taken):
        raise UserError("no image has an object of a shared class within COCO's counts: check the three files")
    counts = zip(coco_names, used, limits, strict=True)
    shares = sorted((n / limit, f"{name} {n}/{limit}") for name, n, limit in counts if limit)
    print(f"{len(taken)} of {len(ids)} images; furthest below COCO: {', '.join(text for _, text in shares[:5])}")
    print(f"{'':16}{'images':>10}{'objects an image':>20}{'categories an image':>22}{'categories':>14}")
    inside = np.isin(image, taken)
    rows = {"sample": (image[inside], category[inside], len(taken)), "COCO": (coco_image, coco_category, coco_images)}
    rows["  with objects"] = coco_image, coco_category, len(np.unique(coco_image))
    for title, values in rows.items():
        images, objects, categories, kinds = statistics(*values)
        print(f"{title:16}{images:10}{objects:20.2f}{categories:22.2f}{kinds:14}")
    harness.weights.write_atomically(f"{args.out}.txt", [f"{ids[place]:016x}\n".encode() for place in taken])
    if args.images is None:
        print(f"{args.out}.txt written. For {args.out}.json, download its images and add --images DIR")
        return
    content = coco_json(boxes, classes.values(), taken, args.images)
    harness.weights.write_atomically(f"{args.out}.json", [json.dumps(content).encode()])
    print(f"{args.out}.txt and {args.out}.json written")


if __name__ == "__main__":
    harness.run.main(main)
