# SPDX-License-Identifier: MIT
"""harness/proposals.py and its command line: selective search, SoCo's filter, and the folder that keeps the boxes."""

import functools
import math
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, keep_signals, write_images  # noqa: F401
from PIL import Image
from torchvision.ops import box_iou

import harness.images
from common import UserError
from harness import proposals, weights
from harness.images import ImageFolder, Scenes
from harness.proposals import NOTHING, RULES, UNREADABLE, Proposals, attach, keep, make, search
from harness.scenes import make_scene
from tools.proposals import main

FILES = ["boxes.npy", "meta.json", "names.txt", "offsets.npy", "rules.npy", "sizes.npy"]


def rectangle(width, height, box, tones=(200, 60)):
    """A plain image with one plain rectangle: the one region that a search cannot miss."""
    pixels = np.full((height, width, 3), tones[0], np.uint8)
    x0, y0, x1, y1 = box
    pixels[y0:y1, x0:x1] = tones[1]
    return Image.fromarray(pixels)


def nearest(boxes, box):
    """The largest difference, in pixels, between the edges of `box` and of the box that comes closest."""
    return int(np.abs(np.asarray(boxes) - box).max(1).min())


def scenes(count, size=48, seed=0):
    return Scenes(count, size, seed)


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def after(count):
    """A signal that arrives after a number of images."""
    images = iter(range(1, 1000))
    return lambda: next(images) >= count


@pytest.fixture
def searched(monkeypatch):
    """The images that were searched, as bytes; what a search finds is remembered."""
    found, remembered = (
        [],
        functools.cache(lambda size, content: search(Image.frombytes("RGB", size, content), "single")),
    )

    def note(image, strategy):
        found.append(image.tobytes())
        return remembered(image.size, found[-1])

    monkeypatch.setattr(proposals, "search", note)
    return found


# ---- boxes of one image ----------------------------------------------------------------------------------------------


def literal_filter(boxes, W, H):
    """The rules as one says them: a loop, square roots, one box at a time."""
    smallest = min(32, min(W, H) / 5)
    tests = {
        "side": lambda w, h: w >= smallest and h >= smallest,
        "ratio": lambda w, h: w <= 3 * h and h <= 3 * w,
        "size": lambda w, h: 0.3 - 1e-12 <= math.sqrt(w * h) / math.sqrt(W * H) <= 0.8 + 1e-12,
    }
    for rule, names in enumerate((("side", "ratio", "size"), ("ratio",), ("side",))):
        kept = [b for b in boxes.tolist() if all(tests[name](b[2] - b[0], b[3] - b[1]) for name in names)]
        if kept:
            return kept, rule
    return [], NOTHING


def test_filter_equals_a_literal_loop():
    rng, seen = np.random.default_rng(0), np.zeros(len(RULES), int)
    for _ in range(2000):
        W, H = rng.integers(1, 700, 2)
        corners = np.sort(rng.integers(0, [[W + 1], [H + 1]], (rng.integers(0, 4), 2, 2)), 2)
        boxes = corners.transpose(0, 2, 1).reshape(-1, 4)
        boxes = boxes[(boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])]
        kept, rule = keep(boxes, int(W), int(H))
        assert (kept.tolist(), rule) == literal_filter(boxes, W, H), (W, H, boxes)
        seen[rule] += 1
    assert seen[: NOTHING + 1].min() > 20  # each fall-back occurs


LIMITS = [
    (320, 320, [(96, 96), (256, 256), (32, 288)], 0, 2),  # 0.3 and 0.8 are in; 32 x 288 is too long
    (320, 320, [(96, 95), (256, 257)], 1, 2),  # just outside both: the ratio alone keeps them
    (60, 60, [(12, 27), (36, 12)], 0, 2),  # a fifth of the short side, ratio 3: in
    (60, 60, [(11, 33), (33, 11)], 1, 2),  # a pixel less, though large enough
    (160, 400, [(32, 96), (96, 32)], 1, 2),  # 32 x 96 is too small here
    (160, 300, [(32, 135), (31, 200)], 2, 1),  # too long: the side alone
    (400, 400, [(20, 100)], NOTHING, 0),
    (400, 400, [], NOTHING, 0),
]


@pytest.mark.parametrize("W, H, sides, rule, count", LIMITS)
def test_filter_at_its_limits(W, H, sides, rule, count):
    boxes = np.array([(3, 5, 3 + w, 5 + h) for w, h in sides], np.int64).reshape(-1, 4)
    kept, found = keep(boxes, W, H)
    assert (kept.tolist(), found) == literal_filter(boxes, W, H) == (boxes[:count].tolist(), rule)


def test_boxes_are_sorted_unique_inside_and_the_same_at_every_call():
    image = Image.fromarray(make_scene(0, 1, 96, 120)["image"])
    for strategy in proposals.STRATEGIES:
        calls = [search(image, strategy) for _ in range(4)]
        rows = calls[0].tolist()
        assert all(np.array_equal(calls[0], other) for other in calls)
        assert rows == [list(row) for row in sorted(set(map(tuple, rows)))]
        x0, y0, x1, y1 = calls[0].T
        assert (x0 >= 0).all() and (y0 >= 0).all() and (x1 > x0).all() and (y1 > y0).all()
        assert x1.max() == 120 and y1.max() == 96
    assert len(search(image, "fast")) > 2 * len(search(image, "single"))


@pytest.mark.parametrize("strategy", proposals.STRATEGIES)
def test_odd_sizes(strategy):
    for size in ((1, 1), (1, 9), (300, 2), (5000, 3), (7, 7)):
        assert search(Image.new("RGB", size, "red"), strategy).tolist() == [[0, 0, *size]]


def test_a_large_image_is_searched_smaller_and_its_boxes_scaled_back():
    box = (403, 301, 1201, 899)
    boxes = search(rectangle(1600, 1200, box), "single")
    assert nearest(boxes, (0, 0, 1600, 1200)) == 0  # the right and bottom edges are reached
    assert nearest(boxes, box) <= 4  # 2.5 pixels are one where it is searched
    assert boxes.max(0).tolist()[2:] == [1600, 1200]


def test_colours_go_to_opencv_as_it_wants_them(monkeypatch):
    seen, segmentation = [], proposals.opencv().ximgproc.segmentation
    stub = types.SimpleNamespace(
        setBaseImage=lambda pixels: seen.append(pixels[0, 0].tolist()),
        switchToSelectiveSearchFast=lambda: None,
        process=lambda: np.array([[1, 2, 3, 4]]),
    )
    monkeypatch.setattr(segmentation, "createSelectiveSearchSegmentation", lambda: stub)
    assert search(Image.new("RGB", (10, 10), (1, 2, 3)), "fast").tolist() == [[1, 2, 4, 6]]
    assert seen == [[3, 2, 1]]  # BGR


def test_boxes_of_scenes_lie_on_their_objects():
    """Against boxes of the same sizes at random places."""
    rng, hits = np.random.default_rng(0), {"single": [], "random": [], "fast": []}
    for index in range(70):
        scene = make_scene(0, index)
        truth = torch.from_numpy(scene["boxes"])
        for strategy in ("single", "fast") if index < 8 else ("single",):
            boxes, _ = keep(search(Image.fromarray(scene["image"]), strategy), 136, 136)
            hits[strategy] += (box_iou(truth, torch.from_numpy(boxes).float()).max(1).values >= 0.5).tolist()
            if strategy == "single":
                sides = boxes[:, 2:] - boxes[:, :2]
                start = rng.integers(0, 137 - sides)
                elsewhere = torch.from_numpy(np.concatenate([start, start + sides], 1)).float()
                hits["random"] += (box_iou(truth, elsewhere).max(1).values >= 0.5).tolist()
    shares = {name: np.mean(values) for name, values in hits.items()}
    assert shares["single"] > shares["random"] + 0.12 and shares["fast"] > shares["single"] + 0.12, shares


# ---- the folder ------------------------------------------------------------------------------------------------------


def test_boxes_lie_on_the_image_as_it_is_shown(tmp_path):
    box = (30, 60, 110, 130)
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side: to be shown turned a quarter clockwise
    shown = rectangle(150, 200, box)
    shown.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    found = make(ImageFolder(tmp_path), tmp_path / "found")
    assert found.sizes.tolist() == [[150, 200]]
    assert nearest(found[0], box) <= 1


def test_what_was_found_is_read_back(tmp_path, monkeypatch):
    """By the class, and by numpy alone; names in any bytes, images without boxes, coordinates above 65535."""
    names = sorted(["a/ü 雪.png", "a/b.png", "a.png", "long.png", "z.png", "two\nlines.png", os.fsdecode(b"y\xff.png")])
    rng, content, images = np.random.default_rng(1), {}, tmp_path / "images"
    for k, (name, count) in enumerate(zip(names, (0, 5000, 1, 2, 3, 4, 0), strict=True)):
        size = (70000, 1) if name == "long.png" else (20 + k, 30)
        content[size] = rng.integers(0, size[0], (count, 4))
        (images / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size).save(images / name)
    monkeypatch.setattr(proposals, "search", lambda image, strategy: content[image.size])
    monkeypatch.setattr(proposals, "keep", lambda boxes, W, H: (boxes, 0 if len(boxes) else NOTHING))
    found, folder = make(ImageFolder(images), str(tmp_path / "found"), part=3), tmp_path / "found"
    boxes, offsets, sizes, rules = (np.load(folder / f"{name}.npy") for name in "boxes offsets sizes rules".split())
    assert [x.dtype.str for x in (boxes, offsets, sizes, rules)] == ["<i4", "<i8", "<i4", "|u1"]
    assert all(isinstance(getattr(found, name[:-4]), np.memmap) for name in FILES if ".npy" in name)  # no copies
    lines = (folder / "names.txt").read_bytes().split(b"\n")
    assert [os.fsdecode(line.replace(b"\0", b"\n")) for line in lines] == [*names, ""]
    assert len(found) == len(names) == len(offsets) - 1 and sizes.tolist() == [list(size) for size in content]
    assert rules.tolist() == [0 if len(want) else NOTHING for want in content.values()]
    for i, want in enumerate(content.values()):
        assert type(found[i]) is np.ndarray and found[i].dtype == np.int32
        assert np.array_equal(found[i], want) and np.array_equal(boxes[offsets[i] : offsets[i + 1]], want)
    assert np.array_equal(found[-2], found[len(found) - 2])
    with pytest.raises(IndexError):
        found[len(found)]
    copy = pickle.dumps(found)
    assert np.array_equal(pickle.loads(copy)[1], found[1]) and len(copy) < 1000  # the folder's name, not the boxes
    found[1][:] = 0  # the caller's own
    assert np.array_equal(found[1], boxes[offsets[1] : offsets[2]]) and found[1].any()
    os.remove(images / "a.png")
    assert found.check(ImageFolder(images)).tolist() == [i for i, name in enumerate(names) if name != "a.png"]


def test_two_runs_and_any_number_of_workers_write_the_same_bytes(tmp_path):
    folder, found = write_images(tmp_path / "images", 9, (90, 70)), {}
    for k, workers in enumerate((0, 0, 1, 2)):
        main(["--data", str(folder), "--out", str(tmp_path / f"{k}" / "new"), "--workers", str(workers)])
        found[k] = contents(tmp_path / f"{k}" / "new")
    assert found[0] == found[1] == found[2] == found[3] and list(found[0]) == FILES
    boxes = Proposals(tmp_path / "0" / "new")
    assert boxes[4].tolist() == keep(search(ImageFolder(folder)[4][0], "single"), 90, 70)[0].tolist()


def test_workers_start_after_opencv_has_used_threads(tmp_path, monkeypatch):
    """Threads do not survive a fork: a worker that waits for them waits for ever."""
    cv2 = proposals.opencv()
    monkeypatch.setattr(harness.images, "detach_worker", lambda number: cv2.setNumThreads(1))
    cv2.setNumThreads(4)
    cv2.GaussianBlur(np.random.default_rng(0).random((2000, 2000, 3), np.float32), (0, 0), 5)
    search(scenes(1, 300)[0][0], "single")
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("a worker waits"))
    signal.alarm(20)
    try:
        assert len(make(scenes(2), tmp_path / "found", workers=1)) == 2
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# ---- interrupted runs ------------------------------------------------------------------------------------------------


def test_a_stopped_run_goes_on_where_it_was(tmp_path, searched):
    want, folder = contents(make(scenes(8), tmp_path / "whole").folder), tmp_path / "parts"
    for count, parts in ((1, (0,)), (4, (0, 1, 4))):  # images of this run; of a part at most three
        assert make(scenes(8), folder, stop=after(count), part=3) is None
        assert list(contents(folder)) == [f"part-{first:06}.npz" for first in parts]
    make(scenes(8), folder, part=3)
    assert contents(folder) == want and len(searched) == 8 + 8
    make(scenes(8), folder)
    assert len(searched) == 8 + 8  # finished


def test_killed_at_any_instant_a_run_ends_with_the_same_bytes(tmp_path, searched, monkeypatch):
    """Killed while it writes one of its files (three parts, the six of the result), or before it removes the parts."""
    want, write = contents(make(scenes(5), tmp_path / "whole").folder), weights.write_atomically

    def mortal(path, pieces):
        written.append(path)
        if len(written) > killed_at:
            Path(f"{path}.tmp").write_bytes(b"half")
            raise KeyboardInterrupt
        write(path, pieces)

    for killed_at in range(9):
        folder, written = tmp_path / f"{killed_at}", []
        monkeypatch.setattr(weights, "write_atomically", mortal)
        with pytest.raises(KeyboardInterrupt):
            make(scenes(5), folder, part=2)
        monkeypatch.setattr(weights, "write_atomically", write)
        assert not (folder / "meta.json").exists() and contents(make(scenes(5), folder, part=2).folder) == want
    (folder / "part-000002.npz").write_bytes(b"left")
    assert contents(make(scenes(5), folder).folder) == want


def test_a_damaged_part_is_searched_again(tmp_path, searched):
    want, folder = contents(make(scenes(5), tmp_path / "whole").folder), tmp_path / "parts"
    make(scenes(5), folder, stop=after(4), part=2)
    first, second = contents(folder).values()
    for k in range(0, len(second), len(second) // 20):
        for damaged in (second[:k], second[:k] + bytes([second[k] ^ 255]) + second[k + 1 :]):
            other = tmp_path / f"{k} {len(damaged)}"
            other.mkdir()
            (other / "part-000000.npz").write_bytes(first)
            (other / "part-000002.npz").write_bytes(damaged)
            assert contents(make(scenes(5), other).folder) == want


@pytest.mark.slow
def test_sigterm_saves_and_the_same_command_continues(tmp_path):
    flags = ["--data", "scenes:40", "--size", "300", "--workers", "2", "--out", str(tmp_path / "found")]
    command = [sys.executable, "-m", "tools.proposals", *flags]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True)
    process.stdout.readline()
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGTERM)  # workers too, as Ctrl-C in a terminal
    output, _ = process.communicate(timeout=30)
    assert (process.returncode, output) == (0, "stopped by a signal; the same command continues\n")
    assert list(contents(tmp_path / "found")) == ["part-000000.npz"]
    main(flags)
    assert list(contents(tmp_path / "found")) == FILES and len(Proposals(tmp_path / "found")) == 40


# ---- what can be wrong -----------------------------------------------------------------------------------------------


def test_unreadable_images_are_named_once_and_have_no_boxes(tmp_path, capsys):
    folder, names = write_images(tmp_path / "images", 6), ("0002.png", os.fsdecode(b"\xff.png"))
    (folder / names[0]).write_bytes((folder / "0002.png").read_bytes()[:60])
    (folder / names[1]).write_text("no image")
    main(f"--data {folder} --out {tmp_path}/found --show 7 --workers 0".split())
    text = capsys.readouterr().out
    assert text.count(names[0]) == text.count(ascii(names[1])[1:-1]) == 1 and "2 images: unreadable" in text
    found = Proposals(tmp_path / "found")
    assert [i for i in range(7) if len(found[i]) == 0] == np.flatnonzero(found.rules == UNREADABLE).tolist() == [2, 6]
    assert found.sizes.tolist() == [[0, 0] if i in (2, 6) else [40, 48] for i in range(7)]
    assert found.check(ImageFolder(folder)).tolist() == list(range(7))
    for k in (0, 1, 3, 4, 5):
        os.remove(folder / f"{k:04}.png")
    assert make(ImageFolder(folder), tmp_path / "none")[1].shape == (0, 4)  # no boxes at all


def test_a_folder_that_disappears_stops_the_run(tmp_path, searched):
    """Or the rest of a million images would be stored as unreadable while a disk is away. What was done is saved."""
    images = ImageFolder(write_images(tmp_path / "images", 4))
    want = contents(make(images, tmp_path / "whole").folder)
    os.rename(tmp_path / "images" / "0002.png", tmp_path / "away.png")
    with pytest.raises(UserError, match=r"0002.png is gone from .*images: bring it back"):
        make(images, tmp_path / "found")
    os.rename(tmp_path / "away.png", tmp_path / "images" / "0002.png")
    assert contents(make(images, tmp_path / "found").folder) == want and len(searched) == 4 + 2 + 2


def test_check_finds_the_images_of_a_part_and_names_what_is_missing(tmp_path, searched):
    folder = write_images(tmp_path / "images", 12)
    found, drawn = make(ImageFolder(folder), tmp_path / "found"), make(scenes(4), tmp_path / "drawn")
    for had, images in ((found, ImageFolder(folder)), (drawn, scenes(4))):
        assert had.check(images).tolist() == list(range(len(images)))
    for name in ("0000.png", "0004.png"):
        os.rename(folder / name, tmp_path / name)
    assert found.check(ImageFolder(folder)).tolist() == [1, 2, 3, 5, 6, 7, 8, 9, 10, 11]
    write_images(folder / "new", 2)
    other = ImageFolder(write_images(tmp_path / "other", 12, (50, 40)))
    assert other.fingerprint() == found.meta["fingerprint"]  # the same names
    scenes_of, lacks = "made for 4 scenes of 48 pixels, seed 0; lacks", "made for 12 images.*lacks"
    for had, images, words in (
        (found, ImageFolder(folder), f"{lacks} 2 of 12 images.*first is new/0000.png"),
        (found, scenes(12), f"{lacks} 12 of 12 scenes"),
        (found, other, r"made for other pictures, 0000.png has \(40, 48\) pixels there, \(50, 40\) here"),
        (drawn, scenes(3), f"{scenes_of} 3 of 3 scenes of 48 pixels, seed 0"),
        (drawn, scenes(4, 64), f"{scenes_of} 4 of 4 scenes of 64 pixels"),
        (drawn, scenes(4, 48, 1), f"{scenes_of} 4 of 4 scenes of 48 pixels, seed 1"),
    ):
        with pytest.raises(UserError, match=f"^{had.folder}: {words}.*: make proposals of these"):
            had.check(images)


BAD = {  # flags: what is said of them
    "--data missing --out a": "--data missing: no such folder",
    "--data empty --out a": "no images",
    "--data scenes:many --out a": "write scenes:4096",
    "--data images --out file": "file: File exists: .* delete it first",
    "--data images --out file/a": "file/a: Not a directory",
    "--data images --out images": "images: holds other files .* give a new folder",
    "--data scenes:8 --size 48 --out half --strategy fast": "half: made with .*strategy 'single' -> 'fast'",
    "--data scenes:8 --size 48 --out whole --strategy fast": "whole: made with .*strategy 'single' -> 'fast'",
    "--data scenes:8 --size 48 --out half --seed 1": "half: made with .*scenes .*seed 0' -> '8 scenes .*seed 1'",
    "--data images --out whole": "whole: made with .*8 scenes .* -> '2 images",
}


def test_bad_command_lines_in_one_clear_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "images", 2)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_bytes(b"of an earlier version")
    make(scenes(8), "whole")
    make(scenes(8), "half", stop=after(3))
    before = {name: contents(tmp_path / name) for name in ("images", "whole", "half", "empty")}
    for flags, words in BAD.items():
        with pytest.raises(UserError, match=words) as error:
            main([*flags.split(), "--workers", "0"])
        assert "\n" not in str(error.value) and "--out" not in str(error.value)
    assert before == {name: contents(tmp_path / name) for name in before} and not (tmp_path / "a").exists()
    for flag, value, least in (("--workers", -1, 0), ("--size", 15, 16), ("--seed", -1, 0), ("--show", -1, 0)):
        with pytest.raises(SystemExit):
            main(["--data", "scenes", "--out", "a", flag, str(value)])
        assert f"error: argument {flag}: {value}: must be at least {least}\n" in capsys.readouterr().err


def test_a_folder_that_is_none_or_damaged_is_named_with_the_file(tmp_path, searched):
    """Nothing there, an old file, not finished; then each file missing, cut, of other images."""
    whole, other = (contents(make(scenes(n), tmp_path / f"{n}").folder) for n in (3, 4))
    make(scenes(3), tmp_path / "half", stop=after(1))
    (tmp_path / "old").write_bytes(b"safetensors, once")
    cases = [(name, "meta.json", None) for name in ("nowhere", "half", "old")]
    cases += [("3", name, content) for name in FILES for content in (None, b"", whole[name][:-1], whole[name][:20])]
    cases += [("3", name, other[name]) for name in FILES if name != "meta.json"] + [("3", "meta.json", b"[1, 2]")]
    for folder, name, content in cases:
        path = tmp_path / folder / name
        if folder == "3":
            path.unlink() if content is None else path.write_bytes(content)
        with pytest.raises(UserError, match=rf"^{path}: .*: make it with python -m tools.proposals \(") as error:
            Proposals(tmp_path / folder)
        assert "\n" not in str(error.value)
        if folder == "3":
            path.write_bytes(whole[name])
    assert len(Proposals(tmp_path / "3")) == 3


def test_a_full_disk_loses_nothing(tmp_path, searched):
    want, folder = contents(make(scenes(8), tmp_path / "whole").folder), tmp_path / "found"
    make(scenes(8), folder, stop=after(2))
    saved, limits = contents(folder), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))
        with pytest.raises(UserError, match="no space left to write .*found/part-000002.npz"):
            make(scenes(8), folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert contents(folder) == saved
    assert contents(make(scenes(8), folder).folder) == want


def test_without_opencv_proposals_are_read_and_none_are_made(tmp_path, monkeypatch):
    make(scenes(2), tmp_path / "found")
    monkeypatch.setitem(sys.modules, "cv2", None)
    assert len(make(scenes(2), tmp_path / "found")[1]) > 0
    with pytest.raises(UserError, match="pip install opencv-contrib-python-headless"):
        make(scenes(2), tmp_path / "new")
    assert os.listdir(tmp_path) == ["found"]


# ---- pictures, and boxes of a run ------------------------------------------------------------------------------------


def test_the_contact_sheet_shows_images_and_boxes(tmp_path, capsys):
    (tmp_path / "images").mkdir()
    for k in range(3):
        rectangle(200, 100, (50, 20, 150, 80)).save(tmp_path / "images" / f"{k}.png")
    main(f"--data {tmp_path}/images --out {tmp_path}/found --show 20 --workers 0".split())
    assert f"{tmp_path}/found/sheet.png" in capsys.readouterr().out
    sheet = Image.open(tmp_path / "found" / "sheet.png")
    assert sheet.format == "PNG" and sheet.size == (2 * 246 + 6, 2 * 260 + 6)
    pixels = np.asarray(sheet).astype(int)
    assert (pixels == 60).all(2).sum() > 3 * 100 * 50  # the rectangles
    coloured = np.ptp(pixels, axis=2) > 50  # all else is grey: lines of boxes, in the images alone
    rows, columns = np.nonzero(coloured[:260, :250])
    boxes = Proposals(tmp_path / "found")[0]
    want = [*boxes.min(0)[:2], *boxes.max(0)[2:]] * np.array(240 / 200) + 6
    assert np.abs([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] - want).max() <= 2


def test_a_run_makes_the_boxes_of_its_scenes_once(tmp_path, capsys, searched):
    class Run(types.SimpleNamespace):
        images, rank, args, path = scenes(6), 0, types.SimpleNamespace(workers=0), tmp_path.joinpath
        signalled = property(lambda run: len(searched) == 3)

    folder = tmp_path / "scenes-6-48-0.proposals"
    with pytest.raises(SystemExit) as error:
        attach(Run(), None)
    assert not error.value.code and "stopped by a signal; the same command continues" in capsys.readouterr().out
    assert os.listdir(folder) == ["part-000000.npz"] and len(searched) == 3
    found = attach(Run(), None)
    assert sorted(os.listdir(folder)) == FILES and len(searched) == 6
    (image, boxes), _ = found[4]
    assert boxes.tolist() == keep(search(image, "single"), 48, 48)[0].tolist()
    for run, path in ((Run(), None), (Run(), str(folder)), (Run(rank=1), None)):
        attach(run, path)
    shutil.rmtree(folder)
    with pytest.raises(UserError, match="No such file"):
        attach(Run(rank=1), None)  # it waits for the first process
    assert len(searched) == 6
