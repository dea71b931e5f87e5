# SPDX-License-Identifier: MIT
# ruff: noqa: E402
"""What tests share: one thread a process, a data set for all scripts, fast runs, and the order of the files."""

import json
import os

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # processes side by side would wait for one another's threads

import numpy as np
import pytest
import torchvision
from helpers import keep_signals  # noqa: F401
from PIL import Image
from tiny import TinyResNet

LONGEST = ["test_paper_size.py", "test_runs.py", "test_own_images.py", "test_transfer_det.py"]


def pytest_collection_modifyitems(items):
    """The longest files first, so that the processes end together."""
    items.sort(key=lambda item: (LONGEST + [item.path.name]).index(item.path.name))


@pytest.fixture
def quick(monkeypatch):
    """Runs within this process draw no curves and wait for no disk."""
    monkeypatch.setattr("harness.pictures.draw_curves", lambda *_: None)
    monkeypatch.setattr("os.fsync", lambda _: None)


@pytest.fixture
def tiny_resnet(monkeypatch):
    """torchvision's resnet18 is a TinyResNet."""
    monkeypatch.setattr(torchvision.models, "resnet18", TinyResNet)


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """A folder that every script can train on, of 12 images, and evaluate on, 4 images, in two class folders:

    images/{train,val}/{a,b}/NNNN.png, grey, palette, alpha and EXIF-turned ones among them; masks/ with the same names;
    train.json, val.json: COCO's format, boxes and polygons; boxes: proposals of the images to train on.
    """
    from harness import images, proposals

    root, rng, turned = tmp_path_factory.mktemp("photos"), np.random.default_rng(0), Image.Exif()
    turned[0x0112] = 8
    categories = [{"id": 3, "name": "dog"}, {"id": 7, "name": "cat"}]
    for split, count in (("train", 12), ("val", 4)):
        told = {"images": [], "annotations": [], "categories": categories}
        for i in range(count):
            kind = "ab"[i % 2]
            name = f"{kind}/{i:04}.png"
            for folder in ("images", "masks"):
                (root / folder / split / kind).mkdir(parents=True, exist_ok=True)
            image = Image.fromarray(rng.integers(0, 256, (5, 6, 3), np.uint8)).resize((64, 64), Image.NEAREST)
            x, y = rng.integers(0, 24, 2).tolist()
            image.paste((250, 20, 20) if kind == "a" else (20, 20, 250), (x, y, x + 40, y + 32))
            image = image.convert(["RGB", "L", "P", "RGBA"][i % 4])
            image.save(root / "images" / split / name, exif=turned if i == 5 else None)
            mask = Image.new("L", (64, 64))
            mask.paste(1 + i % 2, (x, y, x + 40, y + 32))
            mask.save(root / "masks" / split / name)
            told["images"].append({"id": i, "file_name": name, "width": 64, "height": 64})
            polygon = [x, y, x + 40, y, x + 40, y + 32, x, y + 32]
            row = {"id": i, "image_id": i, "category_id": 3 + 4 * (i % 2), "iscrowd": 0, "segmentation": [polygon]}
            told["annotations"].append(row | {"bbox": [x, y, 40, 32], "area": 40 * 32})
        (root / f"{split}.json").write_text(json.dumps(told))
    proposals.make(images.open_images(str(root / "images"), 0, 0), str(root / "boxes"))
    return root
