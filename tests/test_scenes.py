# SPDX-License-Identifier: MIT
"""Tests of harness/scenes.py, the procedural data set."""

import hashlib
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from harness import scenes
from harness.scenes import CLASSES, FLIP_PAIRS, LANDMARKS, make_scene

ROOT = Path(scenes.__file__).resolve().parents[1]
SIZES = ((136, 136), (32, 48), (16, 16), (96, 64), (16, 160), (240, 320))


def digest(scene):
    parts = [key.encode() + str((a.dtype, a.shape)).encode() + a.tobytes() for key, a in sorted(scene.items())]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def run(*args):
    return subprocess.run(
        [sys.executable, "-m", "harness.scenes", *map(str, args)], cwd=ROOT, capture_output=True, text=True, timeout=60
    )


@pytest.fixture(scope="module")
def many():
    return [make_scene(5, index) for index in range(300)]


def test_same_arguments_give_the_same_bits_in_any_order_and_process():
    forward = [digest(make_scene(3, index, 40, 56)) for index in range(6)]
    np.random.seed(1)
    backward = [digest(make_scene(3, index, 40, 56)) for index in reversed(range(6))]
    assert forward == backward[::-1]
    code = "from tests.test_scenes import *; print(*(digest(make_scene(3, i, 40, 56)) for i in range(6)))"
    env = {**os.environ, "PYTHONHASHSEED": "77"}
    other = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert other.stdout.split() == forward


def test_returned_arrays_belong_to_the_caller():
    scene = make_scene(0, 0, 32)
    before = digest(scene)
    for array in scene.values():
        array[...] = 0
    assert digest(make_scene(0, 0, 32)) == before


def test_other_index_or_seed_gives_a_clearly_different_image():
    images = [make_scene(seed, index)["image"].astype(int) for seed in (0, 1) for index in range(8)]
    for i, first in enumerate(images):
        for second in images[:i]:
            assert np.abs(first - second).mean() > 15


def test_another_size_shows_the_same_objects_at_the_same_places():
    same = 0
    for index in range(40):
        small, large = make_scene(2, index), make_scene(2, index, 272)
        if small["labels"].tolist() == large["labels"].tolist():
            same += 1
            assert np.abs(small["boxes"] * 2 - large["boxes"]).max() < 6
            shrunk = large["image"].reshape(136, 2, 136, 2, 3).mean((1, 3))
            assert np.corrcoef(shrunk.ravel(), small["image"].ravel())[0, 1] > 0.8
    assert same >= 38  # an object at the limit of visibility may be annotated at one size only


@pytest.mark.parametrize("height,width", SIZES)
def test_annotations_agree_with_each_other(height, width):
    for index in range(30):
        scene = make_scene(11, index, height, width)
        image, boxes, labels, masks, semantic, keypoints = (
            scene[key] for key in ("image", "boxes", "labels", "masks", "semantic", "keypoints")
        )
        n = len(labels)
        assert 2 <= n <= 8
        assert (image.shape, image.dtype) == ((height, width, 3), np.uint8)
        assert (boxes.shape, boxes.dtype) == ((n, 4), np.float32)
        assert (labels.shape, labels.dtype) == ((n,), np.int64)
        assert (masks.shape, masks.dtype) == ((n, height, width), bool)
        assert (semantic.shape, semantic.dtype) == ((height, width), np.uint8)
        assert (keypoints.shape, keypoints.dtype) == ((n, len(LANDMARKS), 3), np.float32)
        assert labels.min() >= 1 and labels.max() <= len(CLASSES)
        assert masks.sum(0).max() == 1  # disjoint
        assert np.array_equal(semantic, (masks * labels[:, None, None]).sum(0))
        for k in range(n):
            rows, columns = np.nonzero(masks[k])
            assert boxes[k].tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert len(rows) >= max(4, 25 / 136**2 * min(height, width) ** 2)
            for x, y, v in keypoints[k].tolist():
                assert v in (0, 1, 2)
                if v == 0:
                    assert (x, y) == (0, 0)
                else:
                    assert 0 <= x < width and 0 <= y < height
                if v == 2:
                    assert not np.delete(masks, k, 0)[:, int(y), int(x)].any()
                if v == 1:
                    assert not masks[k, int(y), int(x)]


def test_visible_landmarks_lie_on_their_object_and_all_visibilities_and_classes_occur(many):
    on_object, values = [], []
    for scene in many:
        for mask, keypoints in zip(scene["masks"], scene["keypoints"], strict=True):
            values += keypoints[:, 2].tolist()
            on_object += [mask[int(y), int(x)] for x, y, v in keypoints.tolist() if v == 2]
    assert np.mean(on_object) > 0.995
    share = np.bincount(np.array(values, int), minlength=3) / len(values)
    assert share[0] > 0.01 and share[1] > 0.02 and share[2] > 0.7
    counts = np.bincount(np.concatenate([scene["labels"] for scene in many]), minlength=len(CLASSES) + 1)[1:]
    assert counts.min() > 0.6 * counts.mean()
    assert {len(scene["labels"]) for scene in many} == set(range(2, 9))


def test_objects_are_large_enough_to_name(many):
    boxes = np.concatenate([scene["boxes"] for scene in many]) / 136
    extent = (boxes[:, 2:] - boxes[:, :2]).max(1)
    assert np.mean((extent > 0.2) & (extent < 0.6)) > 0.9
    areas = np.concatenate([scene["masks"].sum((1, 2)) for scene in many])
    assert areas.min() >= 25


def test_objects_hidden_too_much_or_too_small_are_not_annotated():
    owner = np.zeros((136, 136), np.int32)
    owner[10:20, 10:40] = 1  # 300 pixels of 1000: hidden too much
    owner[30:35, 50:55] = 2  # all of its 25 pixels: too small
    owner[60:80, 60:90] = 3  # 600 pixels of 1000
    corner = np.array([[61, 61], [15, 11], [500, 5], [100, 100]], float)
    found = scenes._annotate(owner, [1000, 25, 1000], [corner] * 3, [0, 1, 2])
    assert found["labels"].tolist() == [3]
    assert found["boxes"].tolist() == [[60, 60, 90, 80]]
    assert np.array_equal(found["masks"], [owner == 3])
    assert np.array_equal(found["semantic"], 3 * (owner == 3))
    assert found["keypoints"].tolist() == [[[61, 61, 2], [15, 11, 1], [0, 0, 0], [100, 100, 2]]]


def test_a_layout_with_fewer_than_two_visible_objects_is_drawn_anew(monkeypatch):
    layout, paint, layouts, canvases = scenes._layout, scenes._paint, [], []

    def first_call_hides_one(*args):
        layouts.append(args)
        shown = (1, 0.5, 0.5, 0.3, 0.0, 1.0, [0.5] * 4)
        return [shown, shown] if len(layouts) == 1 else layout(*args)

    def note_empty_canvas(canvas, owner, number, *args):
        if number == 1:
            canvases.append(canvas.copy())
        return paint(canvas, owner, number, *args)

    monkeypatch.setattr(scenes, "_layout", first_call_hides_one)
    monkeypatch.setattr(scenes, "_paint", note_empty_canvas)
    assert len(make_scene(0, 0)["labels"]) >= 2
    assert len(layouts) == len(canvases) == 2
    assert np.array_equal(*canvases)  # nothing of the first attempt is left over


def test_left_and_right_are_never_mirrored(many):
    signs, heads = set(), []
    for scene in many:
        for keypoints in scene["keypoints"]:
            if (keypoints[:, 2] > 0).all():
                head, left, right, tail = keypoints[:, :2].astype(float)
                down, across = tail - head, right - left
                signs.add(float(np.sign(down[0] * across[1] - down[1] * across[0])))
                heads.append(math.atan2(*down))
                flipped = keypoints.copy()  # a mirrored object with the pair swapped has the same handedness
                flipped[:, 0] = 136 - flipped[:, 0]
                for i, j in FLIP_PAIRS:
                    flipped[[i, j]] = flipped[[j, i]]
                head, left, right, tail = flipped[:, :2].astype(float)
                down, across = tail - head, right - left
                signs.add(float(np.sign(down[0] * across[1] - down[1] * across[0])))
    assert signs == {-1.0}
    assert np.histogram(heads, 8, (-math.pi, math.pi))[0].min() > 0.06 * len(heads)  # every rotation occurs


@pytest.mark.parametrize("name", CLASSES)
def test_shape_is_mirror_symmetric_has_a_top_and_contains_its_landmarks(name):
    drawer, half_width, points = scenes._SPECS[name]
    axis = (np.arange(121, dtype=np.float32) - 60) / 50  # from -1.2 to 1.2
    u, v = np.meshgrid(axis, axis)
    rng = np.random.default_rng(0)
    for p in [[0.0] * 4, [0.999] * 4, *rng.random((6, 4)).tolist()]:
        distance, second, third = drawer(u, v, np.abs(u), 0.02, p)
        shape = distance < 0
        assert np.mean(shape != shape[:, ::-1]) < 0.002
        assert (shape & shape[::-1]).sum() / (shape | shape[::-1]).sum() < 0.8
        rows, columns = np.nonzero(shape)
        assert np.abs(axis[columns]).max() <= half_width and np.abs(axis[rows]).max() <= 1.01
        for weights in (second, third):  # parts and texture are there
            assert weights.min() >= 0 and weights.max() <= 1
            assert 0.02 < np.mean(weights[shape]) < 0.98
        u_points, v_points = np.array(points, np.float32).T[:, None]
        assert drawer(u_points, v_points, np.abs(u_points), 0.02, p)[0].max() < -0.035
    left, right = points[1], points[2]
    assert left[0] < 0 and right == (-left[0], left[1]) and points[0][1] < 0 < points[3][1]


def test_colour_says_little_about_the_class_and_shape_says_much(many):
    histograms, shapes, labels = [], [], []
    grid = (np.arange(16) + 0.5) / 16 * 2.6 - 1.3
    right, down = (g.ravel() for g in np.meshgrid(grid, grid))
    for scene in many:
        bins = (scene["image"] // 64).astype(int) @ (16, 4, 1)
        for label, mask, keypoints in zip(scene["labels"], scene["masks"], scene["keypoints"], strict=True):
            if keypoints[0, 2] and keypoints[3, 2]:
                head, tail = keypoints[0, :2], keypoints[3, :2]
                center, axis = (head + tail) / 2, (tail - head) / 2
                x = np.floor(center[0] + right * axis[1] + down * axis[0]).astype(int)
                y = np.floor(center[1] - right * axis[0] + down * axis[1]).astype(int)
                inside = (x >= 0) & (x < 136) & (y >= 0) & (y < 136)
                shapes.append(mask[y.clip(0, 135), x.clip(0, 135)] & inside)
                histograms.append(np.bincount(bins[mask], minlength=64) / mask.sum())
                labels.append(label - 1)
    train, test, labels = slice(0, 600), slice(600, 1000), np.array(labels)
    assert len(labels) >= 1000

    def nearest(features):
        features = np.sqrt(np.array(features, np.float64))
        distance = ((features[test, None] - features[None, train]) ** 2).sum(-1)
        return np.mean(labels[train][distance.argmin(1)] == labels[test])

    def logistic(features, steps=300):
        features = np.sqrt(np.array(features, np.float64))
        features = (features - features[train].mean(0)) / (features[train].std(0) + 1e-6)
        weights, targets = np.zeros((features.shape[1], len(CLASSES))), np.eye(len(CLASSES))[labels]
        for _ in range(steps):
            scores = np.exp(features[train] @ weights)
            error = scores / scores.sum(1, keepdims=True) - targets[train]
            weights -= 0.5 * (features[train].T @ error / 600 + 1e-2 * weights)
        return np.mean((features[test] @ weights).argmax(1) == labels[test])

    chance = np.bincount(labels[test]).max() / len(labels[test])
    by_colour, by_colour_linear, by_shape = nearest(histograms), logistic(histograms), nearest(shapes)
    print(f"chance {chance:.3f}, colour {by_colour:.3f} / {by_colour_linear:.3f}, shape {by_shape:.3f}")
    assert max(by_colour, by_colour_linear) < chance + 0.1
    assert by_shape > 3 * chance


def test_bad_arguments_raise():
    with pytest.raises(ValueError, match="at least 16"):
        make_scene(0, 0, 15, 200)
    with pytest.raises(ValueError, match="negative"):
        make_scene(0, -1)


@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # from inside pycocotools
def test_written_data_set_opens_with_pycocotools_and_equals_the_scenes(tmp_path):
    coco_module = pytest.importorskip("pycocotools.coco")
    result = run("--write", tmp_path / "data", "--count", 5, "--seed", 4, "--height", 64, "--width", 80)
    assert result.returncode == 0, result.stderr
    assert "5 of 5" in result.stdout
    coco = coco_module.COCO(str(tmp_path / "data" / "annotations.json"))
    assert [c["name"] for c in coco.loadCats(coco.getCatIds())] == list(CLASSES)
    assert coco.loadCats(1)[0]["keypoints"] == list(LANDMARKS)
    assert len(coco.getImgIds()) == 5
    for index, image in enumerate(coco.loadImgs(sorted(coco.getImgIds()))):
        scene = make_scene(4, index, 64, 80)
        assert (image["height"], image["width"]) == (64, 80)
        assert np.array_equal(np.array(Image.open(tmp_path / "data/images" / image["file_name"])), scene["image"])
        semantic = np.array(Image.open(tmp_path / "data/semantic" / image["file_name"]))
        assert np.array_equal(semantic, scene["semantic"])
        annotations = coco.loadAnns(coco.getAnnIds(image["id"]))
        assert [a["category_id"] for a in annotations] == scene["labels"].tolist()
        for annotation, mask, box, keypoints in zip(
            annotations, scene["masks"], scene["boxes"], scene["keypoints"], strict=True
        ):
            assert isinstance(annotation["segmentation"]["counts"], str) and annotation["iscrowd"] == 0
            assert np.array_equal(coco.annToMask(annotation), mask)
            assert annotation["area"] == mask.sum()
            x, y, w, h = annotation["bbox"]
            assert [x, y, x + w, y + h] == box.tolist()
            assert annotation["keypoints"] == keypoints.ravel().tolist()
            assert annotation["num_keypoints"] == (keypoints[:, 2] > 0).sum()


def test_contact_sheet_is_a_readable_image(tmp_path):
    out = tmp_path / "new" / "sheet.png"
    result = run("--show", 3, "--out", out, "--height", 48, "--width", 64)
    assert result.returncode == 0, result.stderr
    sheet = Image.open(out)
    sheet.load()
    assert sheet.format == "PNG" and sheet.width >= 640 and sheet.height >= 2 * 48 * 4
    assert np.asarray(sheet).std() > 20


def test_bad_input_exits_2_with_one_line_and_leaves_nothing(tmp_path):
    file = tmp_path / "file"
    file.write_text("x")
    full = tmp_path / "full"
    full.mkdir()
    (full / "old.png").write_text("x")
    cases = {
        (): "--show N or --write DIR",
        ("--write", file): "is a file",
        ("--write", full): "not empty",
        ("--write", tmp_path / "a", "--count", 0): "at least 1",
        ("--show", 0): "at least 1",
        ("--show", 1, "--size", 15): "at least 16",
        ("--write", tmp_path / "a", "--height", 0): "at least 16",
        ("--write", tmp_path / "a", "--seed", -1): "negative",
        ("--show", "many"): "invalid int",
        ("--show", 1, "--out", full): str(full),
        ("--show", 1, "--out", file / "sheet.png"): str(file),
    }
    for args, words in cases.items():
        result = run(*args)
        assert result.returncode == 2, (args, result)
        assert result.stdout == "" and result.stderr.count("\n") == 1 and words in result.stderr, (args, result)
        assert result.stderr.startswith(f"python -m {scenes.__name__}: error: ")  # a command that exists
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full"]


def test_making_scenes_needs_neither_torch_nor_matplotlib_nor_pycocotools_nor_tqdm():
    code = (
        "import sys\n"
        "for name in ('torch', 'matplotlib', 'pycocotools', 'tqdm'): sys.modules[name] = None\n"
        "from harness.scenes import make_scene\n"
        "make_scene(0, 0, 32)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)
