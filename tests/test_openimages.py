# SPDX-License-Identifier: MIT
"""tools/openimages_mini.py: D3SSL's sample of Open Images, its numbers for Table 2, its boxes in COCO's format."""

import collections
import csv
import json
import random

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from torchvision.models._meta import _COCO_CATEGORIES

import harness.images
from common import UserError
from tools import openimages_mini
from tools.openimages_mini import KINDS, read_boxes, shared_classes, statistics

HEADER = "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside"
NAMES = {"Man": "person", "Woman": "person", "Girl": "person", "Cat": "cat", "Mouse": None, "Computer mouse": "mouse"}
NAMES |= {"Tree": None, "Kitchen & dining room table": "dining table", "Doughnut": "donut"}
MIDS = {f"/m/0{place}": name for place, name in enumerate(NAMES)}
COUNTS = {"person": 40, "cat": 9, "mouse": 12, "dining table": 5, "donut": 200, "toaster": 3}  # of COCO's objects


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Rows of boxes.csv, whose columns stand in another order: every class, one not boxable, groups. In the folder
    of the files; COCO's has crowds and images without objects."""
    monkeypatch.chdir(tmp_path)
    rng, rows = random.Random(0), []
    for _ in range(60):
        name, mids = f"{rng.getrandbits(64):016x}", rng.sample([*MIDS, "/m/0other"], rng.randint(1, 3))
        for _ in range(rng.randint(1, 7)):
            edges = [f"{edge:.6f}" for _ in "XY" for edge in sorted((rng.random(), rng.random()))]
            row = dict(zip(("XMin", "XMax", "YMin", "YMax"), edges, strict=True))
            rows.append(row | {"ImageID": name, "LabelName": rng.choice(mids), "IsGroupOf": rng.choice("00001")})
    rng.shuffle(rows)
    with open("boxes.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, [*reversed(HEADER.split(",")), "XClick1X"], restval="0.5")
        writer.writeheader()
        writer.writerows(rows)
    (tmp_path / "classes.csv").write_text("".join(f'{mid},"{name}"\n' for mid, name in MIDS.items()))
    kinds = [10 * place + 7 for place, count in enumerate(COUNTS.values()) for _ in range(count)]
    objects = [{"image_id": i // 4, "category_id": kind, "iscrowd": i % 5 == 0} for i, kind in enumerate(kinds)]
    coco = {"images": [{"id": i} for i in range(len(kinds) // 4 + 4)], "annotations": objects}
    coco["categories"] = [{"id": 10 * place + 7, "name": name} for place, name in enumerate(COUNTS)]
    (tmp_path / "coco.json").write_text(json.dumps(coco))
    return rows


def taken(*flags):
    """Run the sampler, return its list."""
    files = "--annotations boxes.csv --classes classes.csv --coco coco.json --out mini".split()
    openimages_mini.main([*files, *flags])
    return open("mini.txt").read().split()


def shared_objects(rows, ids):
    """How many objects of each of COCO's classes some images have, by the table of this file."""
    kinds = [NAMES.get(MIDS.get(row["LabelName"])) for row in rows if row["ImageID"] in ids]
    return collections.Counter(filter(None, kinds))


@pytest.mark.parametrize("seed, count", [(0, 146_000), (1, 146_000), (1, 11)])
def test_the_list_against_a_slow_loop(files, seed, count):
    images = sorted({row["ImageID"] for row in files if row["LabelName"] in MIDS})
    want, used, full = [], collections.Counter(), 0
    for i in np.random.default_rng(seed).permutation(len(images)):
        more = used + shared_objects(files, [images[i]])
        fits = all(more[kind] <= COUNTS[kind] for kind in more)
        full += not fits
        if more != used and fits and len(want) < count:
            want, used = [*want, images[i]], more
    assert taken("--seed", str(seed), "--count", str(count)) == want
    assert full and (len(want) == count or sum(used[kind] == COUNTS[kind] for kind in used) > 1)


def test_every_class_of_coco_has_a_counterpart_and_no_name_stands_twice():
    coco = [name for name in _COCO_CATEGORIES if name not in ("__background__", "N/A")]  # torchvision's list
    kinds = [KINDS.get(name, name.capitalize()).split(", ") for name in coco]
    assert len(coco) == 80 and set(KINDS) < set(coco) and len(KINDS) == 26
    names = [name for of_class in kinds for name in of_class]
    assert len(set(names)) == len(names)
    assert shared_classes(names, coco).tolist() == [place for place, of_class in enumerate(kinds) for _ in of_class]
    traps = ["Mouse", "Musical keyboard", "Table tennis racket", "Human face", "Bat (Animal)", "Vehicle", "Toy"]
    assert shared_classes(traps, coco).tolist() == [-1] * len(traps)


def test_table_2_against_a_loop(files, capsys):
    far = np.array([0, 1 << 20], np.int32)  # times 4096 they are equal in 32 bits
    assert statistics(far, np.array([4095, 4095], np.int16), 2) == (2, 1, 1, 1)
    ids, coco = taken(), json.load(open("coco.json"))
    text, used = capsys.readouterr().out, shared_objects(files, ids)
    inside = [(row["ImageID"], row["LabelName"]) for row in files if row["ImageID"] in ids and row["LabelName"] in MIDS]
    pairs = [(entry["image_id"], entry["category_id"]) for entry in coco["annotations"]]
    printed = {line[:16].strip(): line[16:].split() for line in text.splitlines()}
    filled = len({image for image, _ in pairs})
    rows = ("sample", inside, len(ids)), ("COCO", pairs, len(coco["images"])), ("with objects", pairs, filled)
    for title, objects, images in rows:
        means = [f"{len(x) / images:.2f}" for x in (objects, set(objects))]
        assert printed[title] == [str(images), *means, str(len({kind for _, kind in objects}))]
    lowest = sorted((used[name] / limit, f"{name} {used[name]}/{limit}") for name, limit in COUNTS.items())[:5]
    assert ", ".join(words for _, words in lowest) in text and "counterpart in --classes: toaster\n" in text


def test_the_json_holds_the_boxes_in_pixels(files, tmp_path):
    ids, sizes, exif = taken(), {}, Image.Exif()
    (tmp_path / "images").mkdir()
    for k, name in enumerate(ids):
        sizes[name], exif[0x0112] = (30 + k, 200 - k), k % 8 + 1  # of 5 to 8 it lies on its side
        Image.new("RGB", sizes[name][:: -1 if k % 8 >= 4 else 1]).save(f"images/{name}.jpg", exif=exif)
        assert harness.images.read_image(f"images/{name}.jpg").size == sizes[name]
    assert taken("--images", "images") == ids
    coco = COCO("mini.json")
    assert [coco.imgs[i + 1]["file_name"] for i in range(len(coco.imgs))] == [f"{name}.jpg" for name in ids]
    assert [coco.cats[i + 1]["name"] for i in range(len(coco.cats))] == list(NAMES)
    for i, name in enumerate(ids, 1):
        W, H = sizes[name]
        assert (coco.imgs[i]["width"], coco.imgs[i]["height"]) == (W, H)
        rows = [row for row in files if row["ImageID"] == name and row["LabelName"] in MIDS]
        for row, entry in zip(rows, coco.loadAnns(coco.getAnnIds(i, iscrowd=None)), strict=True):
            x0, x1, y0, y1 = (float(row[edge]) * (W if "X" in edge else H) for edge in ("XMin", "XMax", "YMin", "YMax"))
            assert entry["bbox"] == pytest.approx([x0, y0, x1 - x0, y1 - y0], abs=0.006)
            assert entry["area"] == pytest.approx((x1 - x0) * (y1 - y0), abs=0.01)
            assert entry["iscrowd"] == int(row["IsGroupOf"] == "1")
            assert coco.cats[entry["category_id"]]["name"] == MIDS[row["LabelName"]]
    (tmp_path / "images" / f"{ids[1]}.jpg").write_text("none")
    with pytest.raises(UserError, match=f"{ids[1]}.jpg: no image"):
        taken("--images", "images")


def test_a_malformed_row_is_named_by_its_line(tmp_path):
    path, good = tmp_path / "boxes.csv", "0123456789abcdef,xclick,/m/00,1,0.1,0.2,0.3,0.4,0,0,0,0,0"
    bad = [good.replace("0.2", other) for other in ("half", "nan", "1.02", "0.05")]
    bad += [good.replace("abcdef", other) for other in ("abcdeg", "abcdef0")]
    for row in (*bad, good[:44], good + ",0.5", ""):
        path.write_text("\n".join([HEADER, good, good, row, good]))
        with pytest.raises(UserError, match="boxes.csv, line 4: no row of boxes[^\n]*download the file again$"):
            read_boxes(path, MIDS)
    path.write_text(f"{HEADER}\n{good.replace('0.1,0.2,0.3,0.4', '-0.004,0.5,0.5,1.004')}")  # by a rounding error
    assert read_boxes(path, MIDS)[3].tolist() == [[0, 0.5, 0.5, 1]]


def test_bad_files_and_flags(files, tmp_path):
    (tmp_path / "other.csv").write_text("/m/00,Accordion\n")
    for flags, words in {
        "--annotations classes.csv": "'ImageID' is not in", "--out missing/mini": "no such folder",
        "--classes other.csv": "no image has an object of a shared class", "--coco boxes.csv": "(JSONDecodeError",
    }.items():  # fmt: skip
        with pytest.raises(UserError) as error:
            taken(*flags.split())
        assert words in str(error.value) and not list(tmp_path.glob("mini*")), flags
