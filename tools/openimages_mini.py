# SPDX-License-Identifier: MIT
"""A sample of Open Images made by the two criteria of D3SSL's OpenImage-MINI, and the numbers of Table 2 for it.

PAPER: section 5.1, Table 2. AMBIGUOUS: D38. The paper's list of images was never published: this is no copy of it, but
a sample by its rules. All images, in a seeded random order, are taken one by one if
    1. at least one of its objects is of a class that COCO has too (a shared class), and
    2. with it, no shared class has more objects in the sample than in COCO,
until there are 146,000. The first n lines of the list are what --count n would have given.

    python -m tools.openimages_mini --annotations oidv6-train-annotations-bbox.csv \\
        --classes class-descriptions-boxable.csv --coco instances_train2017.json
    sed 's|^|train/|' openimage-mini.txt > download.txt    the list as Open Images' own downloader.py wants it
    (the first command again) --images DIR                when DIR holds ID.jpg of every line: openimage-mini.json

Boxes in the CSV are fractions of the image and its size is nowhere in Open Images' CSVs (OriginalSize is in bytes),
while COCO's format counts in pixels. So the list is all that is written without --images; with it, sizes are read from
the files' headers, as `harness.images.read_image` turns the images: that the fractions are of the turned image is an assumption.
A list that is there already must be the same one.

Counted as one object: each box with a class of --classes, a box around a group (IsGroupOf 1, `iscrowd` 1 in the JSON)
and a crowd region of COCO too (AMBIGUOUS: D38). Other boxes are passed over. Objects and categories an image are means
over all images, for COCO with those without objects and again without them; categories are those that occur.

The CSV is read in chunks into arrays, whatever the order of its rows: image number, class, box and group bit take 23
bytes a row. Measured on one, two and four million made-up rows: at its peak the whole takes 42 MB for each million,
beside PyTorch's import and, for a moment before, 0.75 GB for a JSON of train2017's size; 7 s for each million.
"""

import argparse
import contextlib
import csv
import itertools
import json
import os
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image

import harness.images
import harness.legacy
import harness.pictures
import harness.run
import harness.weights
from common import UserError

# AMBIGUOUS: D38. COCO's classes and what Open Images calls them. It labels an object with the most specific of its
# classes (a woman is Woman, not Person as well), so kinds of a COCO class that COCO's annotators would call by its
# name count as it. Every COCO class has a counterpart; cup, dining table and potted plant have near ones alone. Old
# and new names of one class (Doughnut, Donut) stand side by side.
SHARED = {
    "person": ("Person", "Man", "Woman", "Boy", "Girl"),
    "bicycle": ("Bicycle",),
    "car": ("Car", "Limousine", "Taxi", "Van"),
    "motorcycle": ("Motorcycle",),
    "airplane": ("Airplane",),
    "bus": ("Bus",),
    "train": ("Train",),
    "truck": ("Truck",),
    "boat": ("Boat", "Barge", "Canoe", "Gondola"),
    "traffic light": ("Traffic light",),
    "fire hydrant": ("Fire hydrant",),
    "stop sign": ("Stop sign",),
    "parking meter": ("Parking meter",),
    "bench": ("Bench",),
    "bird": (
        "Bird", "Blue jay", "Canary", "Chicken", "Duck", "Eagle", "Falcon", "Goose", "Magpie", "Ostrich", "Owl", "Parrot",
        "Penguin", "Raven", "Sparrow", "Swan", "Turkey", "Woodpecker",
    ),
    "cat": ("Cat",),
    "dog": ("Dog",),
    "horse": ("Horse",),
    "sheep": ("Sheep",),
    "cow": ("Cattle", "Bull"),
    "elephant": ("Elephant",),
    "bear": ("Bear", "Brown bear", "Polar bear"),
    "zebra": ("Zebra",),
    "giraffe": ("Giraffe",),
    "backpack": ("Backpack",),
    "umbrella": ("Umbrella",),
    "handbag": ("Handbag",),
    "tie": ("Tie",),
    "suitcase": ("Suitcase",),
    "frisbee": ("Flying disc",),
    "skis": ("Ski",),
    "snowboard": ("Snowboard",),
    "sports ball": (
        "Ball", "Cricket ball", "Football", "Golf ball", "Rugby ball", "Tennis ball", "Volleyball", "Volleyball (Ball)",
    ),
    "kite": ("Kite",),
    "baseball bat": ("Baseball bat",),
    "baseball glove": ("Baseball glove",),
    "skateboard": ("Skateboard",),
    "surfboard": ("Surfboard",),
    "tennis racket": ("Tennis racket",),
    "bottle": ("Bottle",),
    "wine glass": ("Wine glass",),
    "cup": ("Coffee cup", "Mug"),
    "fork": ("Fork",),
    "knife": ("Knife", "Kitchen knife"),
    "spoon": ("Spoon",),
    "bowl": ("Bowl", "Mixing bowl"),
    "banana": ("Banana",),
    "apple": ("Apple",),
    "sandwich": ("Sandwich", "Hamburger", "Submarine sandwich"),
    "orange": ("Orange",),
    "broccoli": ("Broccoli",),
    "carrot": ("Carrot",),
    "hot dog": ("Hot dog",),
    "pizza": ("Pizza",),
    "donut": ("Doughnut", "Donut"),
    "cake": ("Cake",),
    "chair": ("Chair",),
    "couch": ("Couch", "Loveseat", "Sofa bed", "Studio couch"),
    "potted plant": ("Houseplant",),
    "bed": ("Bed", "Infant bed"),
    "dining table": ("Kitchen & dining room table",),
    "toilet": ("Toilet",),
    "tv": ("Television", "Computer monitor"),
    "laptop": ("Laptop",),
    "mouse": ("Computer mouse",),  # Mouse is the animal
    "remote": ("Remote control",),
    "keyboard": ("Computer keyboard",),
    "cell phone": ("Mobile phone",),
    "microwave": ("Microwave oven",),
    "oven": ("Oven",),
    "toaster": ("Toaster",),
    "sink": ("Sink",),
    "refrigerator": ("Refrigerator",),
    "book": ("Book",),
    "clock": ("Clock", "Alarm clock", "Digital clock", "Wall clock"),
    "vase": ("Vase",),
    "scissors": ("Scissors",),
    "teddy bear": ("Teddy bear",),
    "hair drier": ("Hair dryer",),
    "toothbrush": ("Toothbrush",),
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
    flag("--count", type=int, default=146_000, help="stop at so many images")
    flag("--seed", type=int, default=0, help="of the order in which images are looked at")
    # fmt: on
    args = parser.parse_args(argv)
    harness.legacy.check_range(args, count=(1, None), seed=(0, None))
    if not os.path.basename(args.out) or args.out.endswith((".txt", ".json")):
        raise UserError(f"--out {args.out}: give a name for the files, without .txt or .json")
    for path in (f"{args.out}.txt", f"{args.out}.json"):
        if os.path.exists(path) and not os.path.isfile(path):
            raise UserError(f"--out {args.out}: {path} is there and is no file")
    return args


# ======================================================================================================================
# Reading
# ======================================================================================================================


@contextlib.contextmanager
def opened(path, what):
    """A text file to read. Errors: UserError, it cannot be read, is no text, no CSV or no JSON."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            yield file
    except (OSError, UnicodeDecodeError, csv.Error, json.JSONDecodeError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read ({reason}): give {what}") from None


def read_classes(path):
    """Open Images' classes: {MID: display name}, in the order of the file, with or without a header.

    Errors:
        UserError: cannot be read, or a row that is not a MID and a name.
    """
    with opened(path, "class-descriptions-boxable.csv") as file:
        rows = list(csv.reader(file))
    first = 1 if rows and rows[0] == ["LabelName", "DisplayName"] else 0
    for number, row in enumerate(rows[first:], first + 1):
        if len(row) != 2 or not row[0].startswith("/"):
            raise UserError(
                f"{path}, line {number}: not a MID and a name ({','.join(row)[:80]!r}): give "
                "class-descriptions-boxable.csv"
            )
    return dict(rows[first:])


class Boxes(NamedTuple):
    """R boxes of N images, K classes."""

    ids: np.ndarray  # (N,) uint64, ascending: ImageIDs, which are 16 hexadecimal digits
    image: np.ndarray  # (R,) int32, a position in ids
    category: np.ndarray  # (R,) int16, 0 .. K - 1
    corners: np.ndarray  # (R, 4) float32: x0, y0, x1, y1 as fractions of the image
    group: np.ndarray  # (R,) bool: one box around several objects
    unknown: int  # rows whose class is not among the K


def parse_rows(rows, columns, width, classes):
    """Rows of the CSV as arrays.

    Args:
        rows: n lists of strings. columns: where COLUMNS stand in a row of `width` fields. classes: {MID: number}.
    Returns:
        (n,) uint64 ids, (n,) int16 categories (-1 unknown), (n, 4) float32 corners, (n,) bool group
    Errors:
        ValueError: one of the rows is malformed.
    """
    fields = list(zip(*rows, strict=True))
    if len(fields) != width:
        raise ValueError("number of fields")
    ids, labels, *edges, group = (fields[i] for i in columns)
    data = bytes.fromhex("".join(ids))
    if set(map(len, ids)) != {16} or len(data) != 8 * len(ids):  # fromhex passes over blanks
        raise ValueError("ImageID")
    corners = np.array([list(map(float, edge)) for edge in edges], np.float32).T  # (n, 4)
    low, high = corners[:, :2], corners[:, 2:]
    if not ((low >= -0.01) & (low <= high) & (high <= 1.01)).all():
        raise ValueError("box")
    corners = corners.clip(0, 1)  # a box may reach a rounding error beyond the image
    categories = np.array([classes.get(label, -1) for label in labels], np.int16)
    return np.frombuffer(data, ">u8").astype(np.uint64), categories, corners, np.array(group) == "1"


def is_row(row, columns, width):
    """Whether `parse_rows` can read this row."""
    try:
        parse_rows([row], columns, width, {})
    except ValueError:
        return False
    return True


def read_chunks(path, classes, rows_at_once):
    """Yield (whole megabytes, 0 of a pipe, and what parse_rows gives) of one chunk of the CSV after the other.

    Errors:
        UserError: cannot be read, lacks a column, or a malformed row: names its line.
    """
    what = "oidv6-train-annotations-bbox.csv"
    with opened(path, what) as file:
        reader = csv.reader(file)
        header = next(reader, [])
        lacking = [name for name in COLUMNS if name not in header]
        if lacking:
            raise UserError(f"{path}: the first line has no {', '.join(lacking)}: give {what}")
        columns, position = [header.index(name) for name in COLUMNS], 0
        while rows := list(itertools.islice(reader, rows_at_once)):
            try:
                chunk = parse_rows(rows, columns, len(header), classes)
            except ValueError:
                first = reader.line_num - len(rows) + 1
                number = next(i for i, row in enumerate(rows) if not is_row(row, columns, len(header)))
                raise UserError(
                    f"{path}, line {first + number}: not a row of Open Images' boxes ({','.join(rows[number])[:80]!r}): "
                    "mend or remove it, or download the file again"
                ) from None
            before, position = position, file.buffer.tell() if file.seekable() else 0
            yield position // 10**6 - before // 10**6, chunk


def read_boxes(path, mids, rows_at_once=20_000):
    """All boxes of the CSV with a class among `mids`, which stands for classes 0 .. K - 1.

    An image whose rows lie in several chunks gets a provisional number in each; they become one at the end.

    Returns:
        Boxes
    Errors:
        UserError: see read_chunks; or there is no such file.
    """
    classes = {mid: number for number, mid in enumerate(mids)}
    megabytes = os.path.getsize(path) // 10**6 if os.path.isfile(path) else 0
    columns = {"image": bytearray(), "category": bytearray(), "corners": bytearray(), "group": bytearray()}
    provisional, numbers, unknown = [np.zeros(0, np.uint64)], 0, 0
    chunks = read_chunks(path, classes, rows_at_once)
    chunks = harness.pictures.progress(chunks, megabytes, what="MB of boxes", size=lambda item: item[0])
    for _, (ids, category, corners, group) in chunks:
        known = category >= 0
        unknown += int((~known).sum())
        ids, image = np.unique(ids[known], return_inverse=True)
        columns["image"] += (numbers + image).astype(np.int32).tobytes()
        columns["category"] += category[known].tobytes()
        columns["corners"] += corners[known].tobytes()
        columns["group"] += group[known].tobytes()
        provisional.append(ids)
        numbers += len(ids)
    ids, final = np.unique(np.concatenate(provisional), return_inverse=True)
    return Boxes(
        ids,
        final.astype(np.int32)[np.frombuffer(columns["image"], np.int32)],
        np.frombuffer(columns["category"], np.int16),
        np.frombuffer(columns["corners"], np.float32).reshape(-1, 4),
        np.frombuffer(columns["group"], bool),
        unknown,
    )


class Coco(NamedTuple):
    """M objects of COCO."""

    names: list  # of the categories
    images: int  # in all, those without objects included
    image: np.ndarray  # (M,) int64 image ids
    category: np.ndarray  # (M,) int64, a position in names


def read_coco(path):
    """The objects of a COCO instances file. Errors: UserError, cannot be read, or no such file."""
    kept = ("images", "annotations", "categories", "id", "name", "image_id", "category_id")

    def without_outlines(entry):
        return {name: entry[name] for name in kept if name in entry}

    with opened(path, "instances_train2017.json") as file:
        found = json.load(file, object_hook=without_outlines)  # outlines would take gigabytes
    try:
        places = {category["id"]: place for place, category in enumerate(found["categories"])}
        images = len({image["id"] for image in found["images"]})
        if not images:
            raise ValueError("no images")
        return Coco(
            [str(category["name"]) for category in found["categories"]],
            images,
            np.array([entry["image_id"] for entry in found["annotations"]], np.int64),
            np.array([places[entry["category_id"]] for entry in found["annotations"]], np.int64),
        )
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path}: not COCO's instances: give instances_train2017.json") from None


# ======================================================================================================================
# The sample
# ======================================================================================================================


def shared_classes(names, coco_names):
    """For each of Open Images' K classes, the position of its counterpart in `coco_names`, or -1: (K,) int16."""
    counterpart = {ours: place for place, coco in enumerate(coco_names) for ours in SHARED.get(coco, ())}
    return np.array([counterpart.get(name, -1) for name in names], np.int16)


def sample(image, shared, limits, images, count, seed):
    """PAPER: section 5.1. AMBIGUOUS: D38. The greedy pass over all images in a seeded random order.

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
    kinds = len(np.unique(category))
    pairs = np.unique(image.astype(np.int64) * (int(category.max(initial=0)) + 1) + category)
    return images, len(image) / images, len(pairs) / images, kinds


# ======================================================================================================================
# Writing
# ======================================================================================================================


def image_sizes(folder, names):
    """Width and height of FOLDER/NAME as `harness.images.read_image` turns it, from the headers: (n, 2) list.

    Errors:
        UserError: files that are missing (how many, the first), or one that is no image.
    """
    missing = [name for name in names if not os.path.isfile(os.path.join(folder, name))]
    if missing:
        raise UserError(
            f"--images {folder}: lacks {len(missing)} of {len(names)} images, the first is {missing[0]}: download them"
        )

    def sizes():
        for name in names:
            try:
                with Image.open(os.path.join(folder, name)) as file:
                    size = file.size
                    turned = file.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)  # by a quarter
            except Exception as error:  # Pillow raises OSError, ValueError, SyntaxError, ... for broken files
                raise UserError(f"--images {folder}: {name} is no image ({error}): download it again") from None
            yield size[::-1] if turned else size

    return list(harness.pictures.progress(sizes(), len(names), what="sizes of images"))


def coco_json(boxes, names, taken, files, sizes):
    """Pieces of a JSON file in COCO's format, one image or object a line. Ids start at 1, in the order of the list.

    Args:
        boxes: Boxes. names: of the K classes. taken: (n,) images. files: n file names. sizes: (n, 2) pixels.
    """
    position = np.full(len(boxes.ids), -1)
    position[taken] = np.arange(len(taken))
    place = position[boxes.image]
    rows = np.flatnonzero(place >= 0)
    rows = rows[np.argsort(place[rows], kind="stable")]

    def images():
        for i, (file, (width, height)) in enumerate(zip(files, sizes, strict=True), 1):
            yield {"id": i, "file_name": file, "width": width, "height": height}

    def annotations():
        for i, row in enumerate(rows.tolist(), 1):
            image, (x0, y0, x1, y1) = int(place[row]), boxes.corners[row].tolist()
            width, height = sizes[image]
            w, h = (x1 - x0) * width, (y1 - y0) * height
            box = [round(value, 2) for value in (x0 * width, y0 * height, w, h)]
            entry = {"id": i, "image_id": image + 1, "category_id": int(boxes.category[row]) + 1, "bbox": box}
            yield entry | {"area": round(w * h, 2), "iscrowd": int(boxes.group[row])}

    def categories():
        for i, name in enumerate(names, 1):
            yield {"id": i, "name": name}

    for opening, entries in (("{", images()), ("],\n", annotations()), ("],\n", categories())):
        yield f'{opening}"{entries.__name__}": ['.encode()
        for i, entry in enumerate(entries):
            yield (",\n" if i else "\n").encode() + json.dumps(entry).encode()
    yield b"]}\n"


def table(rows):
    """Lines of Table 2 for {name: what `statistics` returned}."""
    lines = [f"{'':16}{'images':>10}{'objects an image':>20}{'categories an image':>22}{'categories':>14}"]
    for name, (images, objects, categories, kinds) in rows.items():
        lines.append(f"{name:16}{images:10}{objects:20.2f}{categories:22.2f}{kinds:14}")
    return "\n".join(lines)


def main(argv=None):
    args = get_args(argv)
    if args.images and not os.path.isdir(args.images):
        raise UserError(f"--images {args.images}: no such folder")
    if not os.access(os.path.dirname(args.out) or ".", os.W_OK):
        raise UserError(f"--out {args.out}: no folder that can be written")
    classes = read_classes(args.classes)
    names = list(classes.values())
    coco = read_coco(args.coco)
    shared = shared_classes(names, coco.names)
    lacking = [name for place, name in enumerate(coco.names) if place not in shared]
    if len(lacking) == len(coco.names):
        raise UserError(
            f"{args.classes} and {args.coco} share no class: give Open Images' class names and COCO's objects"
        )
    absent = [
        name for coco_name, ours in SHARED.items() for name in ours if name not in names and coco_name not in lacking
    ]
    print(f"shared: {len(coco.names) - len(lacking)} of COCO's {len(coco.names)} classes, {(shared >= 0).sum()} of "
          f"Open Images' {len(names)}; names of this script's map that the file has not: {', '.join(absent) or 'none'}",
          flush=True)  # fmt: skip
    if lacking:
        print(f"warning: --classes has no counterpart of {', '.join(lacking)} (another spelling than in SHARED here?)",
              flush=True)  # fmt: skip

    boxes = read_boxes(args.annotations, list(classes))
    print(f"boxes: {len(boxes.image)} in {len(boxes.ids)} images, {boxes.group.sum()} of them around a group; "
          f"{boxes.unknown} with other classes passed over", flush=True)  # fmt: skip
    limits = np.bincount(coco.category, minlength=len(coco.names)).tolist()
    taken, used = sample(boxes.image, shared[boxes.category], limits, len(boxes.ids), args.count, args.seed)
    if not len(taken):
        raise UserError(f"{args.annotations}: no image with an object of a shared class fits COCO's counts")
    if len(taken) < args.count:
        print(f"warning: all images looked at: {len(taken)} instead of {args.count}", flush=True)
    counted = [(n / limit, name, n, limit) for n, name, limit in zip(used, coco.names, limits, strict=True) if limit]
    print(f"sample: {len(taken)} images, {sum(used)} objects of shared classes (COCO: {sum(limits)}), "
          f"{sum(n == limit for *_, n, limit in counted)} of {len(counted)} classes as large as COCO's; furthest below: "
          f"{', '.join(f'{name} {n}/{limit}' for _, name, n, limit in sorted(counted)[:5])}", flush=True)  # fmt: skip

    ids = [f"{boxes.ids[i]:016x}" for i in taken]
    text = "".join(f"{name}\n" for name in ids)
    if os.path.isfile(f"{args.out}.txt"):
        with opened(f"{args.out}.txt", "another --out") as file:
            if file.read() != text:
                raise UserError(f"{args.out}.txt: another list is there: move it away or give another --out")
    elif os.path.isfile(f"{args.out}.json"):
        raise UserError(f"{args.out}.json: boxes of a list that is not there: move it away or give another --out")
    harness.weights.write_atomically(f"{args.out}.txt", [text.encode()])
    inside = np.isin(boxes.image, taken)
    rows = {
        "sample": statistics(boxes.image[inside], boxes.category[inside], len(taken)),
        "COCO": statistics(coco.image, coco.category, coco.images),
        "  with objects": statistics(coco.image, coco.category, len(np.unique(coco.image))),
    }
    print(table(rows), flush=True)
    if args.images is None:
        print(f"{args.out}.txt written; no {args.out}.json: pixels need the images' sizes. Download the images of the "
              "list, then run the same command with --images DIR", flush=True)  # fmt: skip
        return
    files = [f"{name}.jpg" for name in ids]
    harness.weights.write_atomically(
        f"{args.out}.json", coco_json(boxes, names, taken, files, image_sizes(args.images, files))
    )
    print(f"{args.out}.txt and {args.out}.json written", flush=True)


if __name__ == "__main__":
    harness.run.main(main)
