# SPDX-License-Identifier: MIT
"""How much memory the object k-NN needs for COCO: the real probe, on made-up annotations and random features.

python -m bench.memory

Writes annotations as many and as large as those of train2017 and val2017 to a temporary folder (480 MB), and runs
`probes.oknn` there; only the network is replaced. The bank streams by, so its first --bank features tell for all.
Prints the highest resident memory of the process after the import, the queries and the bank; loaders come on top.
"""

import argparse
import json
import os
import resource
import sys
import tempfile

import torch
import torch.nn.functional as F

from probes import oknn

COCO = {"train2017": (118_287, 860_001), "val2017": (5_000, 36_781)}  # images, objects
PAGE = "http://images.cocodataset.org/a-name-as-long-as-coco-has-them.jpg"


def write_annotations(folder, split, images, objects):
    """instances_SPLIT.json with outlines of 46 numbers, so that it is as large as COCO's."""
    rng = torch.Generator().manual_seed(0)
    with open(os.path.join(folder, "annotations", f"instances_{split}.json"), "w") as file:
        entries = (
            {"id": i, "file_name": f"{i:012}.jpg", "width": 640, "height": 480, "coco_url": PAGE, "flickr_url": PAGE,
             "license": 3, "date_captured": "2013-11-14 11:18:45"}
            for i in range(images)
        )  # fmt: skip
        file.write('{"categories": [], "images": [' + ",\n".join(map(json.dumps, entries)) + '], "annotations": [')
        for i in range(objects):
            outline = [round(x, 2) for x in (300 * torch.rand(46, generator=rng)).tolist()]
            entry = {"id": i, "image_id": i % images, "category_id": i % 80 + 1, "bbox": [*outline[:2], 90.5, 80.25]}
            file.write(
                (",\n" if i else "") + json.dumps(entry | {"area": 702.1, "iscrowd": 0, "segmentation": [outline]})
            )
        file.write("]}")


def random_features(bank):
    """In the place of `probes.oknn.all_features`: two variants of 7 objects a query image, 5 a bank image, D 2048."""

    def features(trunk, variants, where, workers, device, title):
        rng, n = torch.Generator().manual_seed(0), 7 if title == "queries" else 5
        for _ in range(len(variants) if title == "queries" else min(len(variants), bank // n)):
            z = F.normalize(torch.randn(2, n, 2048, generator=rng), dim=2)
            yield z, torch.randint(80, (n,), generator=rng)
        print(f"after the {title}: {peak():.2f} GB", flush=True)

    return features


def peak():
    """Highest resident memory so far, in GB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--bank", default=30_000, type=int, help="features of the bank")
    parser.add_argument("--scale", default=1.0, type=float, help="share of COCO's images and objects")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        for split, counts in COCO.items():
            os.makedirs(os.path.join(folder, split))
            os.makedirs(os.path.join(folder, "annotations"), exist_ok=True)
            write_annotations(folder, split, *(max(2, int(args.scale * count)) for count in counts))
        print(f"after the import: {peak():.2f} GB", flush=True)
        oknn.all_features = random_features(args.bank)
        oknn.main(["--data", folder, "--weights", "random", "--output-dir", os.path.join(folder, "out")])


if __name__ == "__main__":
    main()
