# SPDX-License-Identifier: MIT
"""harness/scenes.py, the built-in data set; tools/scenes.py, which shows and writes it."""

import hashlib
import inspect
import math
import os
import subprocess
import sys

import numpy as np
import pytest
from helpers import ROOT, write_images
from PIL import Image, ImageColor
from pycocotools.coco import COCO
from scipy import ndimage

import tools.scenes
from common import UserError
from harness import scenes
from harness.scenes import CLASSES, LANDMARKS, make_scene


def digest(scene):
    parts = [key.encode() + str((a.dtype, a.shape)).encode() + a.tobytes() for key, a in sorted(scene.items())]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def objects(scene):
    """(label, box, mask, keypoints) of each object."""
    return zip(*(scene[key] for key in ("labels", "boxes", "masks", "keypoints")), strict=True)


@pytest.fixture(scope="module")
def many():
    return [make_scene(5, index) for index in range(300)]


def test_same_arguments_give_the_same_bits_in_any_order_and_process():
    made = [make_scene(3, index, 40, 56) for index in range(6)]
    forward = [digest(scene) for scene in made]
    for array in (array for scene in made for array in scene.values()):
        array[...] = 0  # they belong to the caller
    np.random.seed(1)
    assert [digest(make_scene(3, index, 40, 56)) for index in reversed(range(6))] == forward[::-1]
    code = f"""import hashlib, sys
sys.modules.update(dict.fromkeys(("torch", "matplotlib", "pycocotools", "tqdm")))  # they are not needed
from harness.scenes import make_scene
{inspect.getsource(digest)}
print(*(digest(make_scene(3, i, 40, 56)) for i in range(6)))"""
    env = {**os.environ, "PYTHONHASHSEED": "77"}
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, env=env, text=True).split() == forward


def test_the_first_scenes_are_those_of_the_recorded_results():
    found = [make_scene(*key) for key in ((0, 0), (0, 1), (0, 2), (1, 0))]
    labels = [[8, 3, 6, 8, 1, 3, 4], [6, 5, 7, 3, 1, 10, 3], [3, 10, 7, 1, 4, 7], [10, 5, 5, 1, 10, 4, 7, 5]]
    assert [scene["labels"].tolist() for scene in found] == labels
    assert [scene["image"].mean() for scene in found] == pytest.approx([115.6, 118.4, 139.3, 107.5], abs=0.5)


def test_another_size_shows_the_same_objects_at_the_same_places():
    pairs = [(make_scene(2, index), make_scene(2, index, 272)) for index in range(40)]
    pairs = [(a, b) for a, b in pairs if a["labels"].tolist() == b["labels"].tolist()]
    assert len(pairs) >= 38  # an object at the limit of visibility may be annotated at one size only
    for small, large in pairs:
        assert np.abs(small["boxes"] * 2 - large["boxes"]).max() < 6
        shrunk = large["image"].reshape(136, 2, 136, 2, 3).mean((1, 3))
        assert np.corrcoef(shrunk.ravel(), small["image"].ravel())[0, 1] > 0.8


@pytest.mark.parametrize("height, width", [(136, 136), (32, 48), (16, 16), (96, 64), (16, 160), (240, 320)])
def test_annotations_agree_with_each_other(height, width):
    for index in range(30):
        scene = make_scene(11, index, height, width)
        n, shapes = len(scene["labels"]), [array.shape for array in scene.values()]
        kinds = " ".join(str(array.dtype) for array in scene.values())
        assert 2 <= n <= 8 and kinds == "uint8 float32 int64 bool uint8 float32"
        assert shapes == [(height, width, 3), (n, 4), (n,), (n, height, width), (height, width), (n, 4, 3)]
        assert scene["masks"].sum(0).max() == 1  # disjoint
        assert np.array_equal(scene["semantic"], (scene["masks"] * scene["labels"][:, None, None]).sum(0))
        anything = scene["masks"].any(0)
        for _, box, mask, keypoints in objects(scene):
            rows, columns = np.nonzero(mask)
            assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert len(rows) >= max(4, 25 / 136**2 * min(height, width) ** 2)
            for x, y, v in keypoints.tolist():
                inside = 0 <= x < width and 0 <= y < height
                assert inside and v in (1, 2) or (x, y, v) == (0, 0, 0)
                assert v == 0 or mask[int(y), int(x)] == (v == 2) or v == 2 and not anything[int(y), int(x)]


def test_visible_landmarks_lie_on_their_object_and_all_visibilities_and_classes_occur(many):
    points = [(mask, *point) for scene in many for _, _, mask, keypoints in objects(scene) for point in keypoints]
    assert np.mean([mask[int(y), int(x)] for mask, x, y, v in points if v == 2]) > 0.995
    share = np.bincount([int(v) for *_, v in points], minlength=3) / len(points)
    assert share[0] > 0.01 and share[1] > 0.02 and share[2] > 0.7
    counts = np.bincount(np.concatenate([scene["labels"] for scene in many]), minlength=len(CLASSES) + 1)[1:]
    assert counts.min() > 0.6 * counts.mean()
    assert {len(scene["labels"]) for scene in many} == set(range(2, 9))


def test_objects_hidden_too_much_or_too_small_are_not_annotated():
    owner = np.zeros((136, 136), np.int32)
    owner[10:20, 10:40] = 1  # 300 pixels of 1000: hidden too much
    owner[30:35, 50:55] = 2  # all of its 25 pixels: too small
    owner[60:80, 60:90] = 3  # 600 pixels of 1000
    corner = np.array([[61, 61], [15, 11], [500, 5], [100, 100]], float)
    found = scenes._annotate(owner, [1000, 25, 1000], [corner] * 3, [0, 1, 2])
    assert found["labels"].tolist() == [3] and found["boxes"].tolist() == [[60, 60, 90, 80]]
    assert np.array_equal(found["masks"], [owner == 3]) and np.array_equal(found["semantic"], 3 * (owner == 3))
    assert found["keypoints"].tolist() == [[[61, 61, 2], [15, 11, 1], [0, 0, 0], [100, 100, 2]]]


def test_a_layout_with_fewer_than_two_visible_objects_is_drawn_anew(monkeypatch):
    layout, paint, canvases = scenes._layout, scenes._paint, []
    hidden = [(1, 0.5, 0.5, 0.3, 0.0, 1.0, [0.5] * 4)] * 2  # one object upon the other
    layouts = iter([lambda *_: hidden, layout])
    monkeypatch.setattr(scenes, "_layout", lambda *args: next(layouts)(*args))
    monkeypatch.setattr(scenes, "_paint", lambda canvas, *args: canvases.append(canvas.copy()) or paint(canvas, *args))
    assert len(make_scene(0, 0)["labels"]) >= 2 and not list(layouts)
    assert np.array_equal(canvases[0], canvases[2])  # nothing of the first attempt is left over


def test_left_and_right_are_never_mirrored_and_every_rotation_occurs(many):
    heads = []
    for points in np.concatenate([scene["keypoints"] for scene in many]).astype(float):
        if points[:, 2].all():
            (down_x, down_y), (across_x, across_y) = points[3, :2] - points[0, :2], points[2, :2] - points[1, :2]
            assert down_x * across_y - down_y * across_x < 0
            heads.append(math.atan2(down_x, down_y))
    assert np.histogram(heads, 8, (-math.pi, math.pi))[0].min() > 0.06 * len(heads)


@pytest.mark.parametrize("name", CLASSES)
def test_shapes_are_mirror_symmetric_have_a_top_and_stay_within_their_bounds(name):
    drawer, half_width, (head, left, right, tail) = scenes._SPECS[name]
    assert left[0] < 0 and right == (-left[0], left[1]) and head[1] < 0 < tail[1]
    axis = (np.arange(121, dtype=np.float32) - 60) / 50  # from -1.2 to 1.2
    u, v = np.meshgrid(axis, axis)
    for p in [[0.0] * 4, [0.999] * 4, *np.random.default_rng(0).random((6, 4)).tolist()]:
        distance, *parts = drawer(u, v, np.abs(u), 0.02, p)
        shape = distance < 0
        assert np.mean(shape != shape[:, ::-1]) < 0.002
        assert (shape & shape[::-1]).sum() / (shape | shape[::-1]).sum() < 0.8
        assert np.abs(u[shape]).max() <= half_width and np.abs(v[shape]).max() <= 1.01
        assert all(x.min() >= 0 and x.max() <= 1 and 0.02 < x[shape].mean() < 0.98 for x in parts)  # there is texture


def test_colour_says_little_about_the_class_and_shape_says_much(many):
    colours, shapes, labels = [], [], []
    right, down = np.meshgrid(*[(np.arange(16) + 0.5) / 16 * 2.6 - 1.3] * 2)
    for scene in many:
        bins = (scene["image"] // 64).astype(int) @ (16, 4, 1)
        for label, _, mask, keypoints in objects(scene):
            head, tail = keypoints[0, :2], keypoints[3, :2]
            if keypoints[0, 2] and keypoints[3, 2]:
                center, axis = (head + tail) / 2, (tail - head) / 2  # the mask is turned upright
                places = center[1] - right * axis[0] + down * axis[1], center[0] + right * axis[1] + down * axis[0]
                shapes.append(ndimage.map_coordinates(mask.astype(float), places, order=0).ravel())
                colours.append(np.sqrt(np.bincount(bins[mask], minlength=64) / mask.sum()))
                labels.append(label - 1)
    train, test, labels = slice(0, 600), slice(600, 1000), np.array(labels)
    colours, shapes, wanted = np.array(colours), np.array(shapes), labels[test]

    def nearest(features):
        distance = (features[train] ** 2).sum(1) - 2 * features[test] @ features[train].T  # less a constant of each row
        return np.mean(labels[train][distance.argmin(1)] == wanted)

    weights = np.linalg.lstsq(colours[train], np.eye(len(CLASSES))[labels[train]], rcond=1e-3)[0]
    linear, chance = np.mean((colours[test] @ weights).argmax(1) == wanted), np.bincount(wanted).max() / len(wanted)
    assert max(nearest(colours), linear) < chance + 0.1 and nearest(shapes) > 0.9 and len(labels) >= 1000


def test_written_data_set_opens_with_pycocotools_and_equals_the_scenes(tmp_path):
    tools.scenes.main(["--write", str(tmp_path / "data"), *"--count 5 --seed 4 --size 64".split()])
    coco = COCO(str(tmp_path / "data" / "annotations.json"))
    assert [coco.cats[i + 1]["name"] for i in range(len(coco.cats))] == list(CLASSES)
    assert coco.cats[1]["keypoints"] == list(LANDMARKS) and len(coco.imgs) == 5
    for index, image in enumerate(coco.loadImgs(sorted(coco.imgs))):
        scene = make_scene(4, index, 64)
        for folder, name in (("images", "image"), ("semantic", "semantic")):
            assert np.array_equal(np.array(Image.open(tmp_path / "data" / folder / image["file_name"])), scene[name])
        annotations = coco.loadAnns(coco.getAnnIds(image["id"]))
        for annotation, (label, box, mask, keypoints) in zip(annotations, objects(scene), strict=True):
            assert np.array_equal(coco.annToMask(annotation), mask)
            wanted = {"category_id": label, "iscrowd": 0, "area": mask.sum(), "keypoints": keypoints.ravel().tolist()}
            wanted |= {"bbox": [*box[:2], *(box[2:] - box[:2])], "num_keypoints": (keypoints[:, 2] > 0).sum()}
            assert {name: annotation[name] for name in wanted} == wanted


def test_the_sheet_outlines_objects_in_the_colours_of_their_classes(tmp_path):
    tools.scenes.main(["--show", "3", "--out", str(tmp_path / "sheet.png"), "--size", "48"])
    sheet, side = np.array(Image.open(tmp_path / "sheet.png")), 8 * 48
    assert sheet.shape == (2 * side + 24, 2 * side + 24, 3)
    for index, (top, left) in enumerate(((8, 8), (8, side + 16), (side + 16, 8))):
        for label, _, mask, _ in objects(make_scene(0, index, 48)):
            mask = mask.repeat(8, 0).repeat(8, 1)
            rim = sheet[top : top + side, left : left + side][mask & ~ndimage.binary_erosion(mask)]
            assert (rim == ImageColor.getrgb(tools.scenes.COLOURS[label - 1])).all(1).mean() > 0.4


def test_bad_input_is_refused_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "full", 1)
    for flags, words in {
        "--size 32": "--show N or --write DIR", "--write full": "not empty", "--show 1 --size 15": "at least 16",
        "--show 1 --out missing/sheet.png": "missing/sheet.png: No such file",
    }.items():  # fmt: skip
        with pytest.raises((UserError, SystemExit)) as error:
            tools.scenes.main(flags.split())
        assert words in f"{error.value}{capsys.readouterr().err}", flags
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["full", "full/0000.png"]
