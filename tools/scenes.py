# SPDX-License-Identifier: MIT
"""The built-in scenes as pictures: a sheet that shows their annotations, or a data set in COCO's format.

python -m tools.scenes --show 16 --out scenes.png       the first 16 scenes with boxes, outlines and landmarks
python -m tools.scenes --write DIR --count 100          images/, semantic/ (class ids as PNG) and annotations.json
"""

import argparse
import io
import json
import math
import os

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from pycocotools import mask as coco_mask
from scipy import ndimage
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks, make_grid

import harness.run
import harness.weights
from common import UserError, number
from harness.finetune import COLOURS
from harness.pictures import progress
from harness.scenes import CLASSES, LANDMARKS, MIN_SIZE, make_scene

SKELETON = ((1, 2), (1, 3), (2, 4), (3, 4))  # COCO counts landmarks from 1


def get_args(argv=None):
    # fmt: off
    parser = argparse.ArgumentParser(prog="python -m tools.scenes", description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flag = parser.add_argument
    flag("--show", type=number(int, 1), metavar="N", help="draw N scenes with their annotations")
    flag("--out", default="scenes.png", metavar="PNG", help="the picture of --show")
    flag("--write", metavar="DIR", help="write a data set into a new or empty folder")
    flag("--count", default=100, type=number(int, 1), help="scenes of --write")
    flag("--seed", default=0, type=number(int, 0), help="which scenes")
    flag("--size", default=136, type=number(int, MIN_SIZE), help="side in pixels")
    # fmt: on
    args = parser.parse_args(argv)
    if args.show is None and args.write is None:
        parser.error("give --show N or --write DIR")
    return args


def picture(scene, zoom):
    """A scene enlarged by an integer, with its annotations: uint8 (3, zoom H, zoom W)."""
    image = pil_to_tensor(ImageOps.scale(Image.fromarray(scene["image"]), zoom, Image.Resampling.LANCZOS))
    masks = scene["masks"].repeat(zoom, 1).repeat(zoom, 2)
    rims = np.stack([mask & ~ndimage.binary_erosion(mask, iterations=2) for mask in masks])
    names, colours = ([table[label - 1] for label in scene["labels"]] for table in (CLASSES, COLOURS))
    image = draw_segmentation_masks(image, torch.from_numpy(rims), alpha=1, colors=colours)
    boxes = torch.from_numpy(scene["boxes"] * zoom)
    image = to_pil_image(draw_bounding_boxes(image, boxes, colors=colours))
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(11)
    for name, (x, y, _, _) in zip(names, boxes.tolist(), strict=True):
        draw.rectangle(draw.textbbox((x + 2, y + 1), name, font), "black")
        draw.text((x + 2, y + 1), name, "white", font)
    for keypoints in (scene["keypoints"] * (zoom, zoom, 1)).tolist():
        for letter, (x, y, visible) in zip("HLRT", keypoints, strict=True):
            if visible:
                fill, ink = ("white", "black") if visible == 2 else ("black", "white")
                draw.ellipse((x - 7, y - 7, x + 7, y + 7), fill, ink)
                draw.text((x, y), letter, ink, font, anchor="mm")
    return pil_to_tensor(image)


def contact_sheet(seed, count, size):
    """Pictures of scenes 0 .. count - 1 of `seed`, about 400 pixels wide each, as one PIL image."""
    pictures = [picture(make_scene(seed, index, size), max(1, round(400 / size))) for index in range(count)]
    return to_pil_image(make_grid(pictures, math.ceil(math.sqrt(count)), padding=8, pad_value=255))


def write_coco(folder, seed, count, size):
    """Write scenes 0 .. count - 1 of `seed` to images/, semantic/ and annotations.json, which is complete when there.

    Errors: UserError, `folder` cannot be made or holds something.
    """
    try:
        if os.path.exists(folder) and os.listdir(folder):
            raise UserError(f"--write {folder}: not empty: give a new folder, or old and new scenes would be mixed")
        os.makedirs(f"{folder}/images")
        os.makedirs(f"{folder}/semantic")
    except OSError as error:
        raise UserError(f"--write {folder}: {error.strerror}: give a folder that can be written") from None
    images, annotations = [], []
    for index in progress(range(count), count, what="scenes"):
        scene, name = make_scene(seed, index, size), f"{index:06}.png"
        Image.fromarray(scene["image"]).save(f"{folder}/images/{name}")
        Image.fromarray(scene["semantic"]).save(f"{folder}/semantic/{name}")
        images.append({"id": index + 1, "file_name": name, "height": size, "width": size})
        codes = coco_mask.encode(np.asfortranarray(scene["masks"].transpose(1, 2, 0), np.uint8))
        boxes, keypoints = scene["boxes"].tolist(), scene["keypoints"]
        for label, (x0, y0, x1, y1), code, points in zip(scene["labels"], boxes, codes, keypoints, strict=True):
            entry = {"id": len(annotations) + 1, "image_id": index + 1, "category_id": int(label), "iscrowd": 0}
            entry |= {"bbox": [x0, y0, x1 - x0, y1 - y0], "area": int(coco_mask.area(code))}
            entry |= {"segmentation": code | {"counts": code["counts"].decode()}}
            entry |= {"keypoints": points.ravel().tolist(), "num_keypoints": int((points[:, 2] > 0).sum())}
            annotations.append(entry)
    pose = {"supercategory": "object", "keypoints": LANDMARKS, "skeleton": SKELETON}
    categories = [{"id": i, "name": name} | pose for i, name in enumerate(CLASSES, 1)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    harness.weights.write_atomically(f"{folder}/annotations.json", [json.dumps(content).encode()])
    print(f"{count} scenes written to {folder}")


def main(argv=None):
    args = get_args(argv)
    if args.show is not None:
        png = io.BytesIO()
        contact_sheet(args.seed, args.show, args.size).save(png, format="PNG")
        harness.weights.write_atomically(args.out, [png.getbuffer()])
        print(f"{args.out}: H head, L left side, R right side, T tail; black: hidden by another object")
    if args.write is not None:
        write_coco(args.write, args.seed, args.count, args.size)


if __name__ == "__main__":
    harness.run.main(main)
