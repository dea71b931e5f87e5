# SPDX-License-Identifier: MIT
"""Data sets in COCO's format, from file to evaluation: COCO's own dicts and nothing else.

data = read_coco("instances_val2017.json", "val2017")
data.read(7), data.annotations(7)                        PIL RGB, list of COCO's dicts
"""

import contextlib
import hashlib
import json
import math
import os
import pickle

import numpy as np
from PIL import Image
from pycocotools import mask as rle

from common import UserError, print0
from harness.images import read_image


def decode(segmentation, height, width):
    """COCO's polygons or run lengths as a uint8 array (H, W)."""
    if isinstance(segmentation, list) or isinstance(segmentation["counts"], list):
        segmentation = rle.frPyObjects(segmentation, height, width)
    return rle.decode(rle.merge(segmentation) if isinstance(segmentation, list) else segmentation)


def annotation(image_id, category_id, bbox, **more):
    """COCO's dict of an object, with every key that is read below. difficult: VOC's mark. bbox: x, y, width, height."""
    row = dict(image_id=image_id, category_id=category_id, bbox=bbox, area=bbox[2] * bbox[3], iscrowd=0, difficult=0)
    return row | dict(segmentation=None, keypoints=None) | more


def cleaned(row, keypoints):
    """`annotation` of what a file says; None if the box is empty. Polygons under three points are dropped.

    Args:
        row: COCO's dict. keypoints: names. Errors: KeyError, TypeError, ValueError, it is not COCO's format.
    """
    x, y, width, height = box = [float(value) for value in row["bbox"]]
    if not (width > 0 and height > 0 and math.isfinite(x + y + width + height)):
        return None
    segmentation, points = row.get("segmentation"), row.get("keypoints")
    if isinstance(segmentation, list):
        segmentation = [part for part in segmentation if len(part) >= 6 and len(part) % 2 == 0]
    if points and len(points) != 3 * len(keypoints):
        raise ValueError(f"annotation {row.get('id')} has {len(points)} numbers for {len(keypoints)} keypoints")
    more = {name: row[name] for name in ("area", "iscrowd", "difficult") if name in row}
    return annotation(
        row["image_id"], row["category_id"], box, segmentation=segmentation or None, keypoints=points or None, **more
    )


class CocoData:
    """A data set in COCO's format: from its file, or turned into it by one of the readers below.

    Attributes:
        images: dicts with id, file_name, width, height. categories: COCO's dicts (gaps between ids allowed), sorted by id:
        label k stands for categories[k - 1]. label: {category id: k}. keypoints: names, [] if there are none.

    Args:
        content: COCO's {"images", "annotations", "categories"}; annotations may have "difficult".
        folder: what file names start from. title: what messages call it. categories: those of the data that a detector
        was trained on, where these are to be evaluated with it.
    Errors:
        UserError: not COCO's format, other categories, or more than 1 % (and more than one) of the images missing or of
        the annotations without image. Fewer are passed over and counted.
    """

    def __init__(self, content, folder, title, categories=None):
        self.folder, self.title = folder, title
        try:
            own = sorted(content["categories"], key=lambda category: category["id"])
            self.categories = categories or own
            self.label = {category["id"]: k for k, category in enumerate(self.categories, 1)}
            names = {category["id"]: category["name"] for category in self.categories}
            strange = [category["name"] for category in own if names.get(category["id"]) != category["name"]]
            self.keypoints = list(next((c["keypoints"] for c in self.categories if c.get("keypoints")), []))
            images = {i["id"]: {k: i.get(k) for k in ("id", "file_name", "width", "height")} for i in content["images"]}
            rows = [cleaned(row, self.keypoints) for row in content["annotations"]]
            paths = {key: os.path.join(folder, image["file_name"]) for key, image in images.items()}
            unknown = {row["category_id"] for row in rows if row} - self.label.keys()
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{title}: not in COCO's format ({type(error).__name__}: {error})") from None
        if strange or unknown:
            what = f"{strange} are not those of the training data" if strange else f"{sorted(unknown)} are not declared"
            raise UserError(f"{title}: categories {what} (id and name)")
        if not images or not self.label:
            raise UserError(f"{title}: it has {len(images)} images and {len(self.label)} categories")
        missing = [key for key, path in paths.items() if not os.path.exists(path)]
        self.pass_over([paths[key] for key in missing], len(images), "images are not there")
        self.pass_over(
            [row for row in rows if row and row["image_id"] not in images], len(rows), "annotations have no image"
        )
        if None in rows:
            print0(f"{title}: {rows.count(None)} annotations have an empty box and are passed over")
        objects = {key: [] for key in images.keys() - set(missing)}
        for row in rows:
            if row and row["image_id"] in objects:
                objects[row["image_id"]].append(row)
        self.images = [image for key, image in images.items() if key in objects]
        for image in self.images:
            if not (image["width"] and image["height"]):
                with contextlib.suppress(OSError):
                    image["width"], image["height"] = read_image(paths[image["id"]]).size
        self.pack([objects[image["id"]] for image in self.images])

    def pass_over(self, bad, count, what):
        """Say how many of `count` things are bad. Errors: UserError, more than 1 % (and more than one), or all."""
        if len(bad) > max(1, count // 100) or count == len(bad) > 0:
            raise UserError(f"{self.title}: {len(bad)} of its {count} {what}, for instance {bad[0]}")
        if bad:
            print0(f"{self.title}: {len(bad)} {what} and are passed over, for instance {bad[0]}")

    def pack(self, objects):
        """Keep lists of dicts as one array of bytes: millions of small objects would be copied into every loader process."""
        packed, digest = [pickle.dumps(rows) for rows in objects], hashlib.sha256()
        self.ends, self.packed = np.cumsum([0, *map(len, packed)]), np.frombuffer(b"".join(packed), np.uint8)
        for image, rows in zip(self.images, objects, strict=True):
            found = [(row["bbox"], row["category_id"], row["iscrowd"]) for row in rows]
            digest.update(repr((image["file_name"], found)).encode())
        self.digest = digest.hexdigest()

    def __len__(self):
        return len(self.images)

    def name(self, index):
        return self.images[index]["file_name"]

    def annotations(self, index):
        """COCO's dicts of an image's objects, see `annotation`."""
        return pickle.loads(self.packed[self.ends[index] : self.ends[index + 1]].tobytes())

    def objects(self, index):
        """`annotations` without crowds."""
        return [row for row in self.annotations(index) if not row["iscrowd"]]

    def read(self, index):
        """The image, PIL RGB. Errors: OSError, unreadable or of another size than its annotations say."""
        image, path = self.images[index], os.path.join(self.folder, self.name(index))
        pixels = read_image(path)
        if pixels.size[::-1] == (image["width"], image["height"]):  # annotated without regard to its EXIF rotation
            with Image.open(path) as stored:
                pixels = stored.convert("RGB")
        if pixels.size != (image["width"], image["height"]):
            raise OSError(f"{path} is {pixels.size}, annotated are {image['width']} x {image['height']} pixels")
        return pixels

    def usable(self, keypoints):
        """Indices of images to train on: those with an object that is no crowd (with a visible keypoint)."""
        rows = ((i, self.objects(i)) for i in range(len(self)))
        if keypoints:
            return [i for i, found in rows if any(row["keypoints"] and any(row["keypoints"][2::3]) for row in found)]
        return [i for i, found in rows if found]

    def fingerprint(self):
        """A name for these images and objects, whatever folder they lie in."""
        return f"{len(self)} images, sha256 {self.digest[:16]}"


def read_coco(path, folder, categories=None, split=None, keep=None):
    """COCO's annotation file.

    Args:
        split: a subfolder to look in, if the first image is not in the folder itself. keep: a set, the only fields to keep
        while the file is parsed: the outlines of train2017 alone would take gigabytes.
    Errors:
        UserError: no such file or folder, no JSON, or see CocoData.
    """
    if not os.path.isdir(folder):
        raise UserError(f"{folder}: no such folder of images")
    try:
        with open(path) as file:
            content = json.load(
                file, object_hook=keep and (lambda row: {name: row[name] for name in row.keys() & keep})
            )
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a JSON file that can be read ({error})") from None
    with contextlib.suppress(KeyError, IndexError, TypeError):
        if split and not os.path.exists(os.path.join(folder, content["images"][0]["file_name"])):
            folder = os.path.join(folder, split) if os.path.isdir(os.path.join(folder, split)) else folder
    return CocoData(content, folder, path, categories)
