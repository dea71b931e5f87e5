# SPDX-License-Identifier: MIT
"""How many annotated objects the boxes of selective search hold, before and after the filter, and how fast they come.

python -m bench.recall --images /coco/val2017 --annotations instances_val2017.json --strategy single

Prints, for IoU 0.5 and 0.7, the share of objects (without crowds) that some box overlaps so much, of all objects and of
those whose size lies within the filter's; boxes an image; images a second of processor time on one core.
"""

import argparse
import os
import time

import numpy as np
import torch
from pycocotools.coco import COCO
from torchvision.ops import box_iou

import harness.images
from harness.proposals import LARGEST, SMALLEST, STRATEGIES, keep, search


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", required=True, metavar="DIR", help="folder of the files that annotations name")
    parser.add_argument("--annotations", required=True, metavar="JSON", help="boxes in COCO's format")
    parser.add_argument("--strategy", default="single", choices=STRATEGIES)
    args = parser.parse_args()
    coco = COCO(args.annotations)
    overlaps, medium, counts, seconds = [], [], [], 0.0
    for entry in coco.loadImgs(coco.getImgIds()):
        objects = [a["bbox"] for a in coco.loadAnns(coco.getAnnIds(entry["id"], iscrowd=False))]
        image = harness.images.read_image(os.path.join(args.images, entry["file_name"]))
        started = time.process_time()
        boxes = search(image, args.strategy)
        kept, _ = keep(boxes, *image.size)
        seconds += time.process_time() - started
        counts.append((len(boxes), len(kept)))
        if objects:
            x, y, w, h = torch.tensor(objects).float().unbind(1)
            truth = torch.stack([x, y, x + w, y + h], 1)
            found = [box_iou(truth, torch.from_numpy(b).float()).amax(1) if len(b) else 0 * x for b in (boxes, kept)]
            overlaps.append(torch.stack(found, 1))
            size = 100 * (w * h / (image.width * image.height)).sqrt()
            medium.append((size >= SMALLEST) & (size <= LARGEST))
    overlaps, medium = torch.cat(overlaps), torch.cat(medium)  # (objects, 2), (objects,)
    all_boxes, kept = np.mean(counts, 0)
    pace = f"{len(counts) / seconds:.2f} images/s"
    print(f"{args.strategy}: {len(counts)} images, {all_boxes:.0f} boxes an image, {kept:.1f} kept; {pace}")
    for title, chosen in (("all objects", overlaps), ("those of the filter's size", overlaps[medium])):
        for limit in (0.5, 0.7):
            before, after = (chosen >= limit).float().mean(0).tolist()
            print(f"{title} ({len(chosen)}), IoU {limit}: recall {before:.3f} of all boxes, {after:.3f} of those kept")


if __name__ == "__main__":
    main()
