# SPDX-License-Identifier: MIT
"""tools/openimages_mini.py: D3SSL's sampler and Table 2; tools/to_detectron2.py: names and values of what it writes."""

import collections
import csv
import inspect
import json
import os
import pathlib
import pickle
import pickletools
import random
import subprocess
import sys
import threading
import tracemalloc

import numpy as np
import pytest
import torch
import torchvision
from helpers import ROOT
from PIL import Image
from pycocotools.coco import COCO
from torchvision.models._meta import _COCO_CATEGORIES

import common
import harness.images
import harness.weights
import resim
from common import UserError
from tools import openimages_mini, released, to_detectron2
from tools.openimages_mini import SHARED, coco_json, read_boxes, read_coco, sample, shared_classes, statistics

HEADER = "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside"
NAMES = ["Man", "Woman", "Girl", "Cat", "Mouse", "Computer mouse", "Tree", "Kitchen & dining room table", "Doughnut"]
MIDS = {f"/m/0{place}": name for place, name in enumerate(NAMES)}
OTHER = "/m/0other"  # a class that is not among the boxable ones
PERSONS = ("Man", "Woman", "Girl")


class Row(collections.namedtuple("Row", "id mid x0 x1 y0 y1 group")):
    """One object of a made-up CSV; numbers are the strings that stand in it."""

    def line(self):
        return f"{self.id},xclick,{self.mid},1,{self.x0},{self.x1},{self.y0},{self.y1},-1,0,{self.group},0,0\n"


def made_up(images=60, seed=0):
    """Rows of random images in random order: every class, unknown ones, groups; some images without a shared class."""
    rng, rows = random.Random(seed), []
    for _ in range(images):
        name = f"{rng.getrandbits(64):016x}"
        mids = rng.sample([*MIDS, OTHER], rng.randint(1, 3))
        for _ in range(rng.randint(1, 7)):
            corners = [f"{value:.6f}" for _ in "xy" for value in sorted((rng.random(), rng.random()))]
            rows.append(Row(name, rng.choice(mids), *corners, rng.choice("00001") if rng.random() < 0.9 else "-1"))
    rng.shuffle(rows)
    return rows


def coco_file(path, counts, empty_images=3):
    """A COCO file with so many objects of each class, in images of four, and some images without any."""
    categories = [{"id": 10 * place + 7, "name": name} for place, name in enumerate(counts)]
    kinds = [category["id"] for category in categories for _ in range(counts[category["name"]])]
    annotations = [
        {"id": i, "image_id": 100 + i // 4, "category_id": kind, "bbox": [0, 0, 1, 1], "area": 1, "iscrowd": i % 5 == 0}
        | {"segmentation": {"counts": [1, 2], "size": [1, 1]} if i % 5 == 0 else [[0.5, 1, 1, 0, 1, 1]]}
        for i, kind in enumerate(kinds)
    ]
    images = [{"id": 100 + i, "file_name": f"{i}.jpg"} for i in range(-(-len(kinds) // 4) + empty_images)]
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path


COUNTS = {"person": 40, "cat": 9, "mouse": 12, "dining table": 5, "donut": 200, "toaster": 3}


@pytest.fixture
def files(tmp_path):
    """Flags for a small sample: 60 images, some classes of COCO soon full."""
    rows = made_up()
    (tmp_path / "boxes.csv").write_text(HEADER + "\n" + "".join(row.line() for row in rows))
    (tmp_path / "classes.csv").write_text("".join(f'{mid},"{name}"\n' for mid, name in MIDS.items()))
    coco_file(tmp_path / "coco.json", COUNTS)
    flags = ["--annotations", "boxes.csv", "--classes", "classes.csv", "--coco", "coco.json", "--out", "mini"]
    return tmp_path, rows, [str(tmp_path / flag) if i % 2 else flag for i, flag in enumerate(flags)]


def taken(flags, *more):
    """Run the sampler, return its list."""
    openimages_mini.main([*flags, *map(str, more)])
    return (open(f"{flags[7]}.txt").read()).splitlines()


def counts_by_hand(rows, ids):
    """Objects of each of COCO's classes in some images, by the names of this file alone."""
    place = {
        "Cat": "cat",
        "Computer mouse": "mouse",
        "Kitchen & dining room table": "dining table",
        "Doughnut": "donut",
    }
    place |= dict.fromkeys(PERSONS, "person")
    chosen = set(ids)
    return collections.Counter(place[MIDS[row.mid]] for row in rows if row.id in chosen and MIDS.get(row.mid) in place)


def one_line(error):
    return "\n" not in str(error.value) and str(error.value)


# ----------------------------------------------------------------------------------------------------------------------
# Open Images: the sample
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_the_sample_keeps_both_criteria_and_leaves_nothing_out_that_fits(files, seed):
    _, rows, flags = files
    ids = taken(flags, "--seed", seed)
    assert len(set(ids)) == len(ids) and set(ids) < {row.id for row in rows}
    for name in ids:
        assert counts_by_hand(rows, [name])  # at least one object of a shared class
    used = counts_by_hand(rows, ids)
    assert all(used[name] <= COUNTS[name] for name in used)
    for name in {row.id for row in rows} - set(ids):
        with_it = counts_by_hand(rows, [*ids, name])
        assert with_it == used or any(with_it[kind] > COUNTS[kind] for kind in with_it)
    left_out = {row.id for row in rows} - set(ids)
    assert any(counts_by_hand(rows, [name]) for name in left_out)  # some for the counts
    assert any(not counts_by_hand(rows, [name]) for name in left_out)  # some for want of a shared class


def test_a_class_may_be_filled_to_cocos_count_and_not_beyond():
    image, shared = np.array([0, 0, 1, 1, 2, 3]), np.array([0, 0, 0, 0, 0, -1])
    for limit, total in ((5, 5), (4, 4), (3, 3), (2, 2), (1, 1), (0, 0)):
        found, used = sample(image, shared, [limit], 4, 9, seed=1)
        assert used == [sum(int((image == i).sum()) for i in found)] and used[0] <= limit and 3 not in found
        best = max(used[0], *(sample(image, shared, [limit], 4, 9, seed)[1][0] for seed in range(30)))
        assert best == total


def test_the_seed_alone_decides_and_a_smaller_count_is_the_lists_beginning(files):
    folder, rows, flags = files
    whole = taken(flags)
    assert taken(flags) == whole  # over the same list
    flags[7] = str(folder / "other")
    assert taken(flags, "--seed", 1) != whole
    flags[7] = str(folder / "fewer")
    assert taken(flags, "--count", 11) == whole[:11] and len(whole) > 15
    assert whole != sorted(whole) and whole != sorted(whole, reverse=True)
    order = list(dict.fromkeys(row.id for row in rows))
    assert whole != [name for name in order if name in set(whole)]  # nor that of the file


def test_images_come_in_any_order_with_equal_chances():
    image = np.arange(50)
    firsts = collections.Counter(int(sample(image, image * 0, [100], 50, 5, seed)[0][0]) for seed in range(500))
    assert len(firsts) > 45 and max(firsts.values()) < 30
    assert sorted(sample(image, image * 0, [100], 50, 500, 0)[0]) == image.tolist()


def test_neither_the_size_of_chunks_nor_the_order_of_rows_changes_anything(files):
    folder, rows, flags = files
    want = read_boxes(folder / "boxes.csv", list(MIDS))
    for size in (1, 2, 7, 64, len(rows), len(rows) + 1):
        found = read_boxes(folder / "boxes.csv", list(MIDS), rows_at_once=size)
        for name in want._fields:
            assert np.array_equal(getattr(found, name), getattr(want, name)), (size, name)
            assert getattr(getattr(found, name), "dtype", int) == getattr(getattr(want, name), "dtype", int)
    whole = taken(flags)
    random.Random(5).shuffle(rows)
    (folder / "boxes.csv").write_text(HEADER + "\n" + "".join(row.line() for row in rows))
    flags[7] = str(folder / "again")
    assert taken(flags) == whole


def test_boxes_are_what_stands_in_the_csv(files):
    """Against a loop over csv.DictReader; other classes are passed over and counted, groups kept and marked."""
    folder, rows, _ = files
    found = read_boxes(folder / "boxes.csv", list(MIDS), rows_at_once=13)
    with open(folder / "boxes.csv") as file:
        lines = list(csv.DictReader(file))
    known = [line for line in lines if line["LabelName"] in MIDS]
    ids = sorted({line["ImageID"] for line in known})
    assert [f"{value:016x}" for value in found.ids.tolist()] == ids and len(ids) < len({row.id for row in rows})
    assert found.unknown == len(lines) - len(known) > 0
    for row, line in enumerate(known):
        assert ids[found.image[row]] == line["ImageID"] and list(MIDS)[found.category[row]] == line["LabelName"]
        edges = [float(line[name]) for name in ("XMin", "YMin", "XMax", "YMax")]
        assert np.array_equal(found.corners[row], np.array(edges, np.float32))
        assert found.group[row] == (line["IsGroupOf"] == "1")
    assert 0 < found.group.sum() < len(known) == len(found.group)
    assert {line["IsGroupOf"] for line in known} == {"0", "1", "-1"}


def test_columns_are_found_by_name(files):
    folder, rows, _ = files
    want = read_boxes(folder / "boxes.csv", list(MIDS))
    with open(folder / "boxes.csv") as file:
        lines = list(csv.DictReader(file))
    names = [*reversed(HEADER.split(",")), "XClick1X"]
    with open(folder / "turned.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, names, restval="0.5")
        writer.writeheader()
        writer.writerows(lines)
    found = read_boxes(folder / "turned.csv", list(MIDS))
    assert all(np.array_equal(getattr(found, name), getattr(want, name)) for name in want._fields)


def test_rows_are_held_as_small_numbers_and_never_all_as_objects(tmp_path):
    rows, line = 30_000, Row("0123456789abcdef", "/m/00", "0.125", "0.25", "0.5", "0.75", "0").line()
    (tmp_path / "boxes.csv").write_text(HEADER + "\n" + line * rows)
    tracemalloc.start()
    found = read_boxes(tmp_path / "boxes.csv", list(MIDS), rows_at_once=500)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sum(getattr(found, name).nbytes for name in ("image", "category", "corners", "group")) == 23 * rows
    assert peak < 3e6  # as objects they take more than 20 MB


def test_a_group_counts_as_one_object(files):
    folder, _, flags = files
    rows = [Row(f"{i:016x}", "/m/00", "0", "1", "0", "1", "1") for i in range(COUNTS["person"] + 2)]
    (folder / "boxes.csv").write_text(HEADER + "\n" + "".join(row.line() for row in rows))
    assert len(taken(flags)) == COUNTS["person"]


def test_cocos_objects_are_counted_with_crowds_and_images_without_any(tmp_path):
    found = read_coco(coco_file(tmp_path / "coco.json", COUNTS, empty_images=4))
    assert found.names == list(COUNTS) and found.images == -(-sum(COUNTS.values()) // 4) + 4
    assert np.bincount(found.category).tolist() == list(COUNTS.values())
    assert found.image.tolist() == [100 + i // 4 for i in range(sum(COUNTS.values()))]


# ----------------------------------------------------------------------------------------------------------------------
# Open Images: the table of classes, Table 2
# ----------------------------------------------------------------------------------------------------------------------


def test_every_class_of_coco_has_a_counterpart_and_no_name_stands_twice():
    coco = [name for name in _COCO_CATEGORIES if name not in ("__background__", "N/A")]  # torchvision's list
    assert len(coco) == 80 and list(SHARED) == coco and all(SHARED.values())
    names = [name for kinds in SHARED.values() for name in kinds]
    assert len(set(names)) == len(names)
    for trap in ("Mouse", "Musical keyboard", "Table tennis racket", "Human face", "Bat (Animal)", "Vehicle", "Toy"):
        assert trap not in names


def test_shared_classes_are_matched_by_name():
    found = shared_classes(NAMES, ["donut", "person", "mouse", "cat", "a class of its own", "dining table"])
    assert found.tolist() == [1, 1, 1, 3, -1, 2, -1, 5, 0]
    assert shared_classes(["Donut", "Volleyball (Ball)", "Ball"], ["sports ball", "donut"]).tolist() == [1, 0, 0]


def statistics_by_hand(pairs, images):
    kinds = collections.defaultdict(set)
    for image, kind in pairs:
        kinds[image].add(kind)
    return images, len(pairs) / images, sum(map(len, kinds.values())) / images, len({kind for _, kind in pairs})


def test_statistics_against_a_loop(files, capsys):
    rng = np.random.default_rng(0)
    for images, kinds, objects in ((1, 1, 1), (7, 600, 90), (40, 3, 200), (9, 5, 0)):
        image, category = rng.integers(0, images, objects), rng.integers(0, kinds, objects)
        pairs = list(zip(image.tolist(), category.tolist(), strict=True))
        for kind in (np.int16, np.int64):  # keys must not overflow what they are made of
            found = statistics(image.astype(np.int32), category.astype(kind), images + 2)
            assert found == pytest.approx(statistics_by_hand(pairs, images + 2))
    far = np.array([0, 1 << 20], np.int32)  # times 4096 they are equal in 32 bits
    assert statistics(far, np.array([4095, 4095], np.int16), 2) == (2, 1, 1, 1)
    _, rows, flags = files
    ids = taken(flags)
    inside = [(row.id, row.mid) for row in rows if row.id in set(ids) and row.mid in MIDS]
    text = capsys.readouterr().out
    table = text[text.index("categories an image") :].splitlines()[1:4]
    printed = {line[:16].strip(): line[16:].split() for line in table}
    images, objects, categories, kinds = statistics_by_hand(inside, len(ids))
    assert printed["sample"] == [str(images), f"{objects:.2f}", f"{categories:.2f}", str(kinds)]
    coco = json.loads((files[0] / "coco.json").read_text())
    pairs = [(entry["image_id"], entry["category_id"]) for entry in coco["annotations"]]
    images, objects, categories, kinds = statistics_by_hand(pairs, len(coco["images"]))
    assert printed["COCO"] == [str(images), f"{objects:.2f}", f"{categories:.2f}", str(kinds)] and kinds == 6
    images = len({image for image, _ in pairs})
    images, objects, categories, kinds = statistics_by_hand(pairs, images)
    assert printed["with objects"] == [str(images), f"{objects:.2f}", f"{categories:.2f}", str(kinds)]
    assert images < len(coco["images"])
    used = counts_by_hand(rows, ids)
    lowest = sorted((used[name] / limit, name, limit) for name, limit in COUNTS.items())[:5]
    assert f"furthest below: {', '.join(f'{name} {used[name]}/{limit}' for _, name, limit in lowest)}\n" in text
    assert "that the file has not: Person, Boy, Bicycle, Car, " in text and " Donut, Cake" in text
    assert " Cat, " not in text and "Toaster" not in text
    assert "5 of COCO's 6 classes, 7 of Open Images' 9; names" in text
    assert "warning: --classes has no counterpart of toaster (" in text
    assert f"; {sum(row.mid == OTHER for row in rows)} with other classes passed over" in text
    assert f"warning: all images looked at: {len(ids)} instead of 146000" in text


# ----------------------------------------------------------------------------------------------------------------------
# Open Images: the JSON
# ----------------------------------------------------------------------------------------------------------------------


def test_the_json_holds_the_boxes_in_pixels(files, capsys):
    folder, rows, flags = files
    ids = taken(flags)
    assert "no " + str(folder / "mini.json") in capsys.readouterr().out
    assert not (folder / "mini.json").exists()
    (folder / "images").mkdir()
    sizes, exif = {}, Image.Exif()
    for k, name in enumerate(ids):
        sizes[name] = 30 + k, 200 - k
        exif[0x0112] = k % 8 + 1  # of 5 to 8 it lies on its side
        stored = sizes[name][::-1] if k % 8 + 1 >= 5 else sizes[name]
        Image.new("RGB", stored).save(folder / "images" / f"{name}.jpg", exif=exif)
        assert harness.images.read_image(folder / "images" / f"{name}.jpg").size == sizes[name]
    assert taken(flags, "--images", folder / "images") == ids
    coco = COCO(str(folder / "mini.json"))
    assert [coco.imgs[i + 1]["file_name"] for i in range(len(coco.imgs))] == [f"{name}.jpg" for name in ids]
    assert [coco.cats[i + 1]["name"] for i in range(len(coco.cats))] == NAMES
    total = 0
    for i, name in enumerate(ids, 1):
        W, H = coco.imgs[i]["width"], coco.imgs[i]["height"]
        assert (W, H) == sizes[name]
        of_image = [row for row in rows if row.id == name and row.mid in MIDS]
        found = coco.loadAnns(coco.getAnnIds(i, iscrowd=None))
        assert len(found) == len(of_image)
        for row, entry in zip(of_image, found, strict=True):  # in the order of the CSV
            x0, x1, y0, y1 = float(row.x0) * W, float(row.x1) * W, float(row.y0) * H, float(row.y1) * H
            assert entry["bbox"] == pytest.approx([x0, y0, x1 - x0, y1 - y0], abs=0.006)
            assert entry["area"] == pytest.approx((x1 - x0) * (y1 - y0), abs=0.01)
            assert entry["iscrowd"] == int(row.group == "1")
            assert coco.cats[entry["category_id"]]["name"] == MIDS[row.mid]
        total += len(found)
    assert sorted(coco.anns) == list(range(1, total + 1))
    assert {path.name for path in folder.iterdir()} >= {"mini.txt", "mini.json"}
    assert not list(folder.glob("*.tmp"))


def test_the_json_is_written_piece_by_piece(files):
    folder, _, _ = files
    boxes = read_boxes(folder / "boxes.csv", list(MIDS))
    pieces = coco_json(boxes, NAMES, np.array([3]), ["a.jpg"], [(10, 20)])
    assert inspect.isgenerator(pieces)
    text = b"".join(pieces)
    assert [entry["id"] for entry in json.loads(text)["images"]] == [1] and text.count(b"\n") > 12


def test_images_that_are_missing_or_none(files):
    folder, _, flags = files
    ids = taken(flags)
    (folder / "images").mkdir()
    for name in ids[:1] + ids[3:]:
        Image.new("RGB", (9, 9)).save(folder / "images" / f"{name}.jpg")
    with pytest.raises(UserError, match=rf"lacks 2 of {len(ids)} images, the first is {ids[1]}.jpg") as error:
        taken(flags, "--images", folder / "images")
    assert one_line(error)
    for name in ids[1:3]:
        (folder / "images" / f"{name}.jpg").write_text("none")
    with pytest.raises(UserError, match=f"{ids[1]}.jpg is no image") as error:
        taken(flags, "--images", folder / "images")
    assert one_line(error) and not (folder / "mini.json").exists() and not list(folder.glob("*.tmp"))


# ----------------------------------------------------------------------------------------------------------------------
# Open Images: errors
# ----------------------------------------------------------------------------------------------------------------------

GOOD = "0123456789abcdef,xclick,/m/00,1,0.1,0.2,0.3,0.4,0,0,0,0,0"


@pytest.mark.parametrize(
    "bad",
    [
        "0123456789abcdef,xclick,/m/00,1,0.1,0.2,0.3",  # cut off
        GOOD + ",0.5",  # a field too many
        "",
        GOOD.replace("0.2", "half"),
        GOOD.replace("0.2", ""),
        GOOD.replace("0.2", "nan"),
        GOOD.replace("0.2", "1.02"),
        GOOD.replace("0.3", "-0.3"),
        GOOD.replace("0.1", "0.21"),  # XMin > XMax
        GOOD.replace("0.3", "0.41"),
        GOOD.replace("abcdef", "abcde"),
        GOOD.replace("abcdef", "abcdef0"),
        GOOD.replace("abcdef", "abcdeg"),
        GOOD.replace("abcdef", "ab  ef"),
        GOOD.replace("0123456789abcdef", " " * 16),
        GOOD.replace("89abcdef", "8 9 abcdef"),
        GOOD.replace("abcdef", "abcd") + "\n" + GOOD.replace("abcdef", "abcdef01"),  # right in the sum of their digits
        GOOD.replace("/m/00", OTHER).replace("0.2", "?"),  # of an unknown class
    ],
)
def test_a_malformed_row_is_named_by_its_line(tmp_path, bad):
    path = tmp_path / "boxes.csv"
    for before, after in ((0, 0), (2, 3), (9, 1)):
        path.write_text("\n".join([HEADER, *[GOOD] * before, bad, *[GOOD] * after]) + "\n")
        with pytest.raises(UserError, match=rf"boxes.csv, line {before + 2}: not a row") as error:
            read_boxes(path, list(MIDS), rows_at_once=4)
        assert one_line(error)
    path.write_text("\n".join([HEADER, *[GOOD] * 9]))  # the last line may lack its end
    assert len(read_boxes(path, list(MIDS), rows_at_once=4).image) == 9


def test_a_box_may_touch_the_edges_and_be_a_line(tmp_path):
    row = GOOD.replace("0.1,0.2,0.3,0.4", "0,1.000000,0.5,0.5")
    (tmp_path / "boxes.csv").write_text(f"{HEADER}\n{row}\n")
    assert read_boxes(tmp_path / "boxes.csv", list(MIDS)).corners.tolist() == [[0, 0.5, 1, 0.5]]
    beyond = GOOD.replace("0.1,0.2,0.3,0.4", "-0.004,0.5,0.5,1.004")  # by a rounding error
    (tmp_path / "boxes.csv").write_text(f"{HEADER}\n{beyond}\n")
    assert read_boxes(tmp_path / "boxes.csv", list(MIDS)).corners.tolist() == [[0, 0.5, 0.5, 1]]
    for far in ("-0.02,0.5,0.5,0.9", "0.1,0.5,0.5,1.02"):
        (tmp_path / "boxes.csv").write_text(f"{HEADER}\n{GOOD.replace('0.1,0.2,0.3,0.4', far)}\n")
        with pytest.raises(UserError, match="line 2: not a row"):
            read_boxes(tmp_path / "boxes.csv", list(MIDS))


def test_bad_files_and_flags(files):
    folder, _, flags = files
    (folder / "binary").write_bytes(b"\x1f\x8b\x08\xff" * 9)
    (folder / "empty").write_text("")
    (folder / "header").write_text(HEADER.replace("XMin", "X").replace("IsGroupOf,", "") + "\n")
    (folder / "no_rows").write_text(HEADER + "\n")
    (folder / "mids").write_text("/m/00,Man\nTree,/m/0x\n")
    (folder / "three").write_text("LabelName,DisplayName\n/m/00,Man,1\n")
    (folder / "foreign").write_text("/m/00,Accordion\n")
    (folder / "list.json").write_text("[1]")
    (folder / "captions.json").write_text('{"images": [], "annotations": [{"image_id": 1}], "categories": []}')
    (folder / "stray.json").write_text(
        '{"images": [], "annotations": [{"image_id": 1, "category_id": 2}], "categories": []}'
    )
    (folder / "others.json").write_text('{"images": [], "annotations": [], "categories": [{"id": 1, "name": "hat"}]}')
    coco_file(folder / "none.json", dict.fromkeys(COUNTS, 0), empty_images=1)
    (folder / "deep.json").write_text("[" * 100_000)
    (folder / "folder.txt").mkdir()
    cases = [
        ("--annotations", "missing", "cannot be read .No such file"),
        ("--annotations", "binary", "cannot be read"),
        ("--annotations", "empty", "no ImageID, LabelName"),
        ("--annotations", "header", "the first line has no XMin, IsGroupOf"),
        ("--annotations", "classes.csv", "the first line has no ImageID"),
        ("--annotations", "no_rows", "no image with an object of a shared class"),
        ("--annotations", ".", "cannot be read .Is a directory"),
        ("--classes", "missing", "cannot be read .No such file"),
        ("--classes", "boxes.csv", "line 1: not a MID and a name"),
        ("--classes", "mids", "mids, line 2: not a MID and a name"),
        ("--classes", "three", "three, line 2: not a MID and a name"),
        ("--classes", "foreign", "share no class"),
        ("--classes", "empty", "share no class"),
        ("--coco", "missing", "cannot be read .No such file"),
        ("--coco", "boxes.csv", "cannot be read"),
        ("--coco", "binary", "cannot be read"),
        ("--coco", "list.json", "not COCO's instances"),
        ("--coco", "captions.json", "not COCO's instances"),
        ("--coco", "stray.json", "not COCO's instances"),
        ("--coco", "others.json", "not COCO's instances"),
        ("--coco", "deep.json", "cannot be read"),
        ("--coco", "none.json", "no image with an object of a shared class fits"),
        ("--images", "missing", "no such folder"),
        ("--out", "missing/mini", "no folder that can be written"),
        ("--out", "folder", "folder.txt is there and is no file"),
        ("--out", "mini.txt", "without .txt or .json"),
        ("--out", "missing/", "give a name for the files"),
        ("--count", 0, "--count 0: must be at least 1"),
        ("--seed", -1, "--seed -1: must be at least 0"),
    ]
    before = sorted(os.listdir(folder))
    for flag, value, words in cases:
        with pytest.raises(UserError, match=words) as error:
            openimages_mini.main([*flags, flag, f"{folder}/{value}" if isinstance(value, str) else str(value)])
        assert one_line(error), (flag, value)
    assert sorted(os.listdir(folder)) == before


def test_classes_may_have_a_header(files):
    folder, _, flags = files
    whole = taken(flags)
    (folder / "classes.csv").write_text("LabelName,DisplayName\n" + (folder / "classes.csv").read_text())
    assert taken(flags) == whole


def test_another_list_is_never_overwritten(files):
    """Or a JSON of the old one would stand beside it."""
    folder, _, flags = files
    taken(flags)
    before = (folder / "mini.txt").read_bytes()
    with pytest.raises(UserError, match="mini.txt: another list is there") as error:
        taken(flags, "--seed", 1)
    assert one_line(error) and (folder / "mini.txt").read_bytes() == before
    (folder / "mini.txt").rename(folder / "old.txt")
    (folder / "mini.json").write_text("boxes of the old list")
    with pytest.raises(UserError, match="mini.json: boxes of a list that is not there"):
        taken(flags, "--seed", 1)
    assert not (folder / "mini.txt").exists() and (folder / "mini.json").read_text() == "boxes of the old list"


def test_a_class_without_objects_in_coco_is_neither_full_nor_behind(files, capsys):
    folder, _, flags = files
    coco_file(folder / "coco.json", COUNTS | {"cat": 0})
    taken(flags)
    text = capsys.readouterr().out
    assert " of 5 classes as large as COCO's; furthest below: " in text and "cat 0/0" not in text


def test_the_boxes_may_come_through_a_pipe(files):
    folder, _, flags = files
    whole = taken(flags)
    os.mkfifo(folder / "pipe")
    writer = threading.Thread(target=lambda: (folder / "pipe").write_text((folder / "boxes.csv").read_text()))
    writer.start()
    flags[1] = str(folder / "pipe")
    assert taken(flags, "--out", folder / "other") == whole
    writer.join()
    assert (folder / "other.txt").read_text() == (folder / "mini.txt").read_text()


AMBIGUOUS_NAMES = {
    "cow": ["Bull", "Cattle"], "couch": ["Couch", "Loveseat", "Sofa bed", "Studio couch"], "mouse": ["Computer mouse"],
    "person": ["Boy", "Girl", "Man", "Person", "Woman"], "bear": ["Bear", "Brown bear", "Polar bear"], "keyboard": ["Computer keyboard"],
    "donut": ["Donut", "Doughnut"], "tv": ["Computer monitor", "Television"], "frisbee": ["Flying disc"], "car": ["Car", "Limousine", "Taxi", "Van"],
    "cup": ["Coffee cup", "Mug"], "potted plant": ["Houseplant"], "dining table": ["Kitchen & dining room table"], "cell phone": ["Mobile phone"],
    "sandwich": ["Hamburger", "Sandwich", "Submarine sandwich"], "hair drier": ["Hair dryer"], "skis": ["Ski"], "remote": ["Remote control"],
}  # fmt: skip


def test_kinds_of_ambiguous_classes_are_these():
    """Classes that Open Images calls otherwise or divides, written out a second time: nothing slips in or out unseen."""
    assert {name: sorted(SHARED[name]) for name in AMBIGUOUS_NAMES} == AMBIGUOUS_NAMES
    plain = {name for name in SHARED if [kind.lower() for kind in SHARED[name]] == [name]}
    assert len(plain) == 54


def run(tool, *flags):
    """The exit code and the output of a tool that is started as its users start it."""
    done = subprocess.run(
        [sys.executable, "-m", f"tools.{tool}", *map(str, flags)], cwd=ROOT, capture_output=True, text=True
    )
    return done.returncode, done.stdout, done.stderr


def test_the_sampler_as_a_command(files):
    folder, _, flags = files
    assert openimages_mini.get_args(flags).count == 146_000
    with open(folder / "boxes.csv", "a") as file:
        file.write("torn")
    code, _, errors = run("openimages_mini", *flags)
    assert code == 2 and errors.count("\n") == 1 and "boxes.csv, line " in errors


# ----------------------------------------------------------------------------------------------------------------------
# detectron2: names and values
# ----------------------------------------------------------------------------------------------------------------------

DEPTHS = {"resnet18": ((2, 2, 2, 2), 2), "resnet50": ((3, 4, 6, 3), 3)}  # blocks of res2..res5, convolutions of a block
FPN_NAMES = [
    f"fpn_{name}.{kind}"
    for name in ("lateral3", "lateral4", "lateral5", "output3", "output4")
    for kind in ("weight", "bias")
]


def convolutions(arch):
    """(detectron2's name, convolution, norm) of a ResNet with torchvision's modules, by its stages' depths alone."""
    torch.manual_seed(0)
    model = getattr(torchvision.models, arch)()
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.randn_like(tensor))
    depths, count = DEPTHS[arch]
    found = [("stem.conv1", model.conv1, model.bn1)]
    for stage, blocks in enumerate(depths, 2):
        for b in range(blocks):
            block = getattr(model, f"layer{stage - 1}")[b]
            found += [(f"res{stage}.{b}.conv{k}", block.get_submodule(f"conv{k}"), block.get_submodule(f"bn{k}")) for k in range(1, count + 1)]  # fmt: skip
            if b == 0 and (stage > 2 or count == 3):
                found.append((f"res{stage}.0.shortcut", *block.downsample))
    return model, found


def export(*flags):
    """Run the tool, return what its file holds (which this test has just made)."""
    to_detectron2.main([*map(str, flags)])
    with open(flags[1], "rb") as file:
        return pickle.load(file)


@pytest.mark.parametrize("arch, tensors", [("resnet50", 265), ("resnet18", 100)])
def test_names_and_values_of_the_backbone(tmp_path, arch, tensors, capsys):
    model, wanted = convolutions(arch)
    expected = {}
    for name, convolution, norm in wanted:
        expected[f"{name}.weight"] = convolution.weight
        for kind in ("weight", "bias", "running_mean", "running_var"):
            expected[f"{name}.norm.{kind}"] = getattr(norm, kind)
    state = {f"module.encoder_q.{name}": tensor for name, tensor in model.state_dict().items()}
    state |= {f"module.encoder_k.{name}": 0 * tensor for name, tensor in model.state_dict().items()}
    torch.save({"epoch": 200, "state_dict": state | {"module.queue": torch.zeros(8, 9)}}, tmp_path / "moco.pth.tar")
    found = export(tmp_path / "moco.pth.tar", tmp_path / "moco.pkl", "--arch", arch)
    assert found.keys() == {"model", "__author__", "matching_heuristics"} and found["matching_heuristics"] is True
    assert found["model"].keys() == expected.keys() and len(expected) == tensors
    for name, tensor in expected.items():
        array = found["model"][name]
        assert type(array) is np.ndarray and array.dtype == np.float32 and array.flags.writeable
        assert torch.equal(torch.from_numpy(array), tensor.detach()), name
    text = capsys.readouterr().out
    assert f"{tensors} tensors; left out: {tensors // 5} batch counters" in text and "pyramid: none" in text
    assert os.listdir(tmp_path).count("moco.pkl.tmp") == 0


def test_each_parameter_of_a_detector_finds_its_one_array(tmp_path):
    """detectron2 takes the longest name that ends a parameter's own: here that of a C4 and of an FPN detector."""
    model, wanted = convolutions("resnet50")
    torch.save(model.state_dict(), tmp_path / "model.pth")
    names = set(export(tmp_path / "model.pth", tmp_path / "model.pkl")["model"]) | set(FPN_NAMES)
    for prefix in ("backbone.bottom_up.", "backbone."):
        for name, _, _ in wanted:
            head = "roi_heads." if prefix == "backbone." and name.startswith("res5") else prefix  # C4's res5
            for kind in ("weight", "norm.running_var"):
                ends = [ours for ours in names if f"{head}{name}.{kind}".endswith("." + ours)]
                assert ends == [f"{name}.{kind}"]
    for name in (
        "stem.conv1.weight",
        "res2.0.shortcut.norm.running_mean",
        "res4.5.conv3.norm.bias",
        "res5.2.conv2.weight",
    ):
        assert name in names


def test_values_are_float32_whatever_they_were(tmp_path):
    model, wanted = convolutions("resnet18")
    state = {
        name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in model.state_dict().items()
    }
    state["conv1.weight"] = torch.nn.Parameter(state["conv1.weight"].to(memory_format=torch.channels_last))
    state["layer1.0.conv1.weight"] = state["layer1.0.conv1.weight"].bfloat16()
    torch.save(state, tmp_path / "model.pth")
    found = export(tmp_path / "model.pth", tmp_path / "model.pkl", "--arch", "resnet18")["model"]
    assert {array.dtype for array in found.values()} == {np.dtype(np.float32)}
    assert np.array_equal(found["stem.conv1.weight"], model.conv1.weight.detach().half().float().numpy())
    assert np.array_equal(found["res2.0.conv1.weight"], state["layer1.0.conv1.weight"].float().numpy())


def test_the_pickle_calls_nothing_that_only_some_versions_of_numpy_have(tmp_path):
    data = to_detectron2.to_pickle({"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(3.0), "c": torch.zeros(0, 2)})
    strings, called = [], set()
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name == "STACK_GLOBAL":
            called.add(tuple(strings[-2:]))
        elif isinstance(argument, str):
            strings.append(argument)
        assert opcode.name != "GLOBAL"
    assert called == {("numpy", "ndarray"), ("builtins", "bytearray")}
    found = pickle.loads(data)["model"]
    assert found["a"].tolist() == [[0, 1, 2], [3, 4, 5]] and found["b"].shape == () and found["c"].shape == (0, 2)


# ----------------------------------------------------------------------------------------------------------------------
# detectron2: the pyramid
# ----------------------------------------------------------------------------------------------------------------------


def resim_files(folder, preset, *flags):
    """What resim.py leaves behind, and the same in the released layout; the key network is another than the query."""
    args = resim.get_args(["--data", "x", "--arch", "resnet18", "--preset", preset, *flags])
    method = resim.build(args, torch.device("cpu"))
    for name, tensor in method.state_dict().items():
        if name.startswith("query.") and tensor.is_floating_point():
            tensor.copy_(torch.randn_like(tensor))
    for name, module in {"resnet18.pth": method.query.trunk, "fpn.pth": method.query.pyramid}.items():
        harness.weights.save_weights(module, folder / name)
    torch.save({"script": "resim", "settings": {}, "model": method.state_dict()}, folder / "checkpoint.pth")
    torch.save({"epoch": 200, "state_dict": released.to_released(method.state_dict())}, folder / "released.pth.tar")
    return method.query


def test_the_pyramid_of_every_kind_of_file(tmp_path, capsys):
    query = resim_files(tmp_path, "official", "--queue-size", "8")
    expected = {f"fpn_lateral{i}": query.pyramid.inner_blocks[f"{i - 2}"][0] for i in (3, 4, 5)}
    expected |= {f"fpn_output{i}": query.pyramid.layer_blocks[f"{i - 2}"][0] for i in (3, 4)}
    for file, flags in (
        ("resnet18.pth", ("--fpn", tmp_path / "fpn.pth")),
        ("checkpoint.pth", ()),
        ("released.pth.tar", ()),
        ("resnet18.pth", ("--fpn", tmp_path / "released.pth.tar")),
    ):
        found = export(tmp_path / file, tmp_path / "resim.pkl", "--arch", "resnet18", *flags)["model"]
        assert sorted(name for name in found if name.startswith("fpn")) == sorted(FPN_NAMES)
        assert len(found) == 100 + 10
        for name, convolution in expected.items():
            assert torch.equal(torch.from_numpy(found[f"{name}.weight"]), convolution.weight.detach()), (file, name)
            assert torch.equal(torch.from_numpy(found[f"{name}.bias"]), convolution.bias.detach()), (file, name)
        assert torch.equal(torch.from_numpy(found["stem.conv1.weight"]), query.trunk.conv1.weight.detach())
        text = capsys.readouterr().out
        assert "fpn_lateral3 fpn_lateral4 fpn_lateral5 fpn_output3 fpn_output4" in text and ": 110 tensors" in text
    found = export(tmp_path / "resnet18.pth", tmp_path / "resim.pkl", "--arch", "resnet18")["model"]
    text = capsys.readouterr().out
    assert len(found) == 100 and "pyramid: none" in text and "fpn.pth is there and was not taken: add --fpn" in text


@pytest.mark.parametrize("flags", [("--queue-size", "8"), ("--framework", "simsiam")], ids=["moco", "simsiam"])
def test_heads_that_are_no_output_convolutions_stay_behind(tmp_path, flags):
    """The paper's heads have a hidden layer; SimSiam's are multi-layer perceptrons: laterals are all there is to take."""
    query = resim_files(tmp_path, "paper", *flags)
    for file, flags in (("checkpoint.pth", ()), ("resnet18.pth", ("--fpn", tmp_path / "fpn.pth"))):
        found = export(tmp_path / file, tmp_path / "resim.pkl", "--arch", "resnet18", *flags)["model"]
        assert sorted(name for name in found if name.startswith("fpn")) == sorted(FPN_NAMES[:6])
        lateral = query.pyramid.inner_blocks["2"][0].weight.detach()
        assert torch.equal(torch.from_numpy(found["fpn_lateral4.weight"]), lateral)


def test_torchvisions_pyramid_has_these_levels():
    """inner_blocks.0 belongs to C2: all four levels of an FPN of torchvision under detectron2's names."""
    fpn = torchvision.ops.FeaturePyramidNetwork([64, 128, 256, 512], 256)
    found = to_detectron2.pyramid(fpn.state_dict())
    assert len(found) == 16
    for i in (2, 3, 4, 5):
        assert torch.equal(found[f"fpn_lateral{i}.weight"], fpn.inner_blocks[i - 2][0].weight)
        assert torch.equal(found[f"fpn_output{i}.bias"], fpn.layer_blocks[i - 2][0].bias)
    to_detectron2.check_pyramid(found, [64, 128, 256, 512], "file")


def test_weights_of_torchvision_need_no_file(tmp_path, monkeypatch):
    model, _ = convolutions("resnet18")
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("fc")}
    monkeypatch.setattr(harness.weights, "load_backbone", lambda source, arch: (state, f"{source} {arch}"))
    assert len(export("imagenet", tmp_path / "supervised.pkl", "--arch", "resnet18")["model"]) == 100


# ----------------------------------------------------------------------------------------------------------------------
# detectron2: errors
# ----------------------------------------------------------------------------------------------------------------------


class Trap:
    """What a pickle may do when it is opened."""

    def __reduce__(self):
        return os.system, (f"touch {pathlib.Path(os.environ['TRAP'])}",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_bad_files_leave_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setenv("TRAP", str(tmp_path / "sprung"))
    resim_files(tmp_path, "official", "--queue-size", "8")
    model, weights = tmp_path / "resnet18.pth", torch.load(tmp_path / "fpn.pth")
    out, small = tmp_path / "out.pkl", ("--arch", "resnet18")
    with open(tmp_path / "trap.pkl", "wb") as file:
        pickle.dump(Trap(), file)
    with open(tmp_path / "own.pkl", "wb") as file:
        file.write(to_detectron2.to_pickle(torch.load(model)))
    torch.save([1], tmp_path / "list.pth")
    torch.save(weights | {"inner_blocks.2.0.weight": torch.zeros(256, 1024, 1, 1)}, tmp_path / "wide.pth")
    torch.save(weights | {"layer_blocks.1.0.bias": torch.zeros(128)}, tmp_path / "narrow.pth")
    torch.save(weights | {"layer_blocks.1.0.weight": torch.full((256, 256, 3, 3), torch.nan)}, tmp_path / "nan.pth")
    (tmp_path / "folder.pkl").mkdir()
    before = sorted(os.listdir(tmp_path))
    cases = [
        ("has to end in .pkl", model, tmp_path / "out.pth", *small),
        ("no such file", tmp_path / "missing", out),
        ("not a checkpoint that can be read safely", tmp_path / "trap.pkl", out),
        ("not a checkpoint that can be read safely", tmp_path / "own.pkl", out, *small),
        ("there is no ResNet in it", tmp_path / "fpn.pth", out),
        ("check --arch", model, out),  # resnet50
        ("no such file", model, out, *small, "--fpn", tmp_path / "missing"),
        ("no convolutions of a pyramid in it", model, out, *small, "--fpn", model),
        ("no convolutions of a pyramid in it", model, out, *small, "--fpn", tmp_path / "list.pth"),
        (r"fpn_lateral4.weight is \(256, 1024, 1, 1\), wanted \(256, 256, 1, 1\)", model, out, *small, "--fpn", tmp_path / "wide.pth"),
        (r"fpn_output3.bias is \(128,\), wanted \(256,\)", model, out, *small, "--fpn", tmp_path / "narrow.pth"),
        ("fpn_output3.weight is not finite", model, out, *small, "--fpn", tmp_path / "nan.pth"),
        ("give a file that can be written", model, tmp_path / "nowhere" / "out.pkl", *small),
        ("give a file that can be written", model, tmp_path / "folder.pkl", *small),
    ]  # fmt: skip
    for words, *flags in cases:
        with pytest.raises(UserError, match=words) as error:
            to_detectron2.main([*map(str, flags)])
        assert one_line(error), flags
    assert sorted(os.listdir(tmp_path)) == before


def test_the_converter_as_a_command(tmp_path):
    torch.save(common.ResNetTrunk("resnet18").state_dict(), tmp_path / "resnet18.pth")
    code, output, errors = run("to_detectron2", tmp_path / "resnet18.pth", tmp_path / "out.pkl")
    assert code == 2 and output == "" and errors.count("\n") == 1 and "check --arch" in errors
    assert to_detectron2.get_args(["a", "b.pkl"]).arch == "resnet50"


# ----------------------------------------------------------------------------------------------------------------------
# both
# ----------------------------------------------------------------------------------------------------------------------


def test_files_are_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    harness.weights.write_atomically(path, [b"one ", b"whole"])
    assert path.read_bytes() == b"one whole"

    def broken():
        yield b"half"
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="no space left to write .*file") as error:
        harness.weights.write_atomically(path, broken())
    assert one_line(error)
    os.symlink("/dev/full", tmp_path / "file.tmp")
    with pytest.raises(UserError, match="no space left to write .*file"):
        harness.weights.write_atomically(path, [b"x" * 9])
    assert path.read_bytes() == b"one whole" and os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("tool", [openimages_mini, to_detectron2])
def test_flags_are_used_and_explained(tool, capsys):
    with pytest.raises(SystemExit):
        tool.get_args(["--help"])
    capsys.readouterr()
    main = inspect.getsource(tool.main)
    flags = [
        word.split('"')[1] for word in inspect.getsource(tool.get_args).splitlines() if word.startswith("    flag(")
    ]
    assert len(flags) in (4, 7)
    for name in flags:
        assert f"args.{name.removeprefix('--')}" in main, name


@pytest.mark.parametrize("layout", ["detector", "soco", "resim-bn"])
def test_pyramids_with_norms_keep_them(layout):
    fpn = torchvision.ops.FeaturePyramidNetwork([64, 128, 256, 512], 256, norm_layer=torch.nn.BatchNorm2d)
    state = {}
    for name, tensor in fpn.state_dict().items():
        block, level, layer, kind = name.split(".")
        lateral = block == "inner_blocks"
        state[{
            "detector": f"backbone.fpn.{name}",
            "soco": f"module.neck.{'lateral' if lateral else 'fpn'}_convs.{level}.{'bn' if layer == '1' else 'conv'}.{kind}",
            "resim-bn": f"module.encoder_q.fpn_{'lateral' if lateral else 'output'}{int(level) + 2}.{layer}.{kind}",
        }[layout]] = tensor  # fmt: skip
    found = to_detectron2.pyramid(state)
    norms = ["norm.weight", "norm.bias", "norm.running_mean", "norm.running_var"]
    assert len(found) == 8 * (1 + len(norms))
    assert torch.equal(found["fpn_lateral4.weight"], fpn.inner_blocks[2][0].weight)
    for kind in norms:
        assert torch.equal(found[f"fpn_output3.{kind}"], fpn.state_dict()[f"layer_blocks.1.1.{kind.split('.')[1]}"])
    to_detectron2.check_pyramid(found, [64, 128, 256, 512], "file")


def test_socos_momentum_network_with_its_pyramid(tmp_path, capsys):
    """A file of `model_ema` alone, whose names have no `module.`."""
    torch.manual_seed(0)
    trunk = common.ResNetTrunk("resnet18").state_dict()
    neck = {}
    for level, width in enumerate((64, 128, 256, 512)):
        neck |= {
            f"neck.lateral_convs.{level}.conv.weight": torch.randn(256, width, 1, 1),
            f"neck.lateral_convs.{level}.bn.weight": torch.rand(256),
        }
        neck |= {
            f"neck.fpn_convs.{level}.conv.weight": torch.randn(256, 256, 3, 3),
            f"neck.fpn_convs.{level}.bn.bias": torch.rand(256),
        }
    state = {f"encoder.{name}": tensor for name, tensor in trunk.items()} | neck
    torch.save({"model_ema": state}, tmp_path / "soco.pth")
    model = export(tmp_path / "soco.pth", tmp_path / "soco.pkl", "--arch", "resnet18")["model"]
    for level in range(4):
        assert np.array_equal(model[f"fpn_lateral{level + 2}.weight"], neck[f"neck.lateral_convs.{level}.conv.weight"])
        assert np.array_equal(
            model[f"fpn_lateral{level + 2}.norm.weight"], neck[f"neck.lateral_convs.{level}.bn.weight"]
        )
        assert np.array_equal(model[f"fpn_output{level + 2}.weight"], neck[f"neck.fpn_convs.{level}.conv.weight"])
        assert np.array_equal(model[f"fpn_output{level + 2}.norm.bias"], neck[f"neck.fpn_convs.{level}.bn.bias"])
    text = capsys.readouterr().out
    assert "DEPTH 18, MODEL.RESNETS.RES2_OUT_CHANNELS 64, MODEL.RESNETS.NORM SyncBN, MODEL.BACKBONE.FREEZE_AT 0" in text
