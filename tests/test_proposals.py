# SPDX-License-Identifier: MIT
"""harness/proposals.py and its command line: selective search, SoCo's filter, and the folder that keeps the boxes."""

import os
import pickle
import signal
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, write_images
from PIL import Image
from torchvision.ops import box_iou

from common import UserError
from harness import proposals
from harness.images import ImageFolder, Scenes
from harness.proposals import NOTHING, RULES, UNREADABLE, Proposals, attach, keep, make, search
from harness.scenes import make_scene
from tools.proposals import main

FILES = ["boxes.npy", "meta.json", "names.npy", "offsets.npy", "rules.npy", "sizes.npy"]


def made(folder, count=5, **settings):
    return make(Scenes(count, 48, 0), folder, **settings)


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


@pytest.fixture
def searched(monkeypatch):
    """What was searched. A part has two images."""
    found = []
    monkeypatch.setattr(proposals, "search", lambda *image: found.append(image) or search(*image))
    monkeypatch.setattr(proposals, "PART", 2)
    return found


def rectangle(width, height, box):
    """A plain image with one plain rectangle: the one region that a search cannot miss."""
    image = Image.new("RGB", (width, height), (200, 200, 200))
    image.paste((60, 60, 60), box)
    return image


def literal_filter(boxes, W, H):
    """The rules as one says them: a loop, square roots, one box at a time."""
    tests = {
        "side": lambda w, h: min(w, h) >= min(32, min(W, H) / 5),
        "ratio": lambda w, h: w <= 3 * h and h <= 3 * w,
        "size": lambda w, h: 0.3 - 1e-12 <= (w * h) ** 0.5 / (W * H) ** 0.5 <= 0.8 + 1e-12,
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
        start = rng.integers(0, (W, H), (rng.integers(0, 4), 2))
        boxes = np.concatenate([start, rng.integers(start + 1, (W + 1, H + 1))], 1)
        kept, rule = keep(boxes, int(W), int(H))
        assert (kept.tolist(), rule) == literal_filter(boxes, W, H), (W, H, boxes)
        seen[rule] += 1
    assert seen[: NOTHING + 1].min() > 20  # each fall-back occurs


def test_filter_at_its_limits():
    for W, H, sides, rule, count in (
        (320, 320, [(96, 96), (256, 256), (32, 288)], 0, 2),  # 0.3 and 0.8 are in; 32 x 288 is too long
        (320, 320, [(96, 95), (256, 257)], 1, 2),  # just outside both: the ratio alone keeps them
        (60, 60, [(12, 27), (36, 12)], 0, 2),  # a fifth of the short side, ratio 3: in
        (60, 60, [(11, 33), (33, 11)], 1, 2),  # a pixel less, though large enough
        (160, 300, [(32, 135), (31, 200)], 2, 1),  # too long: the side alone
    ):
        boxes = np.array([(3, 5, 3 + w, 5 + h) for w, h in sides])
        kept, found = keep(boxes, W, H)
        assert (kept.tolist(), found) == (boxes[:count].tolist(), rule)


@pytest.mark.parametrize("strategy", proposals.STRATEGIES)
def test_boxes_are_those_of_opencv_sorted_at_every_call(strategy):
    image, cv2 = Image.fromarray(make_scene(0, 1, 96, 120)["image"]), proposals.opencv()
    theirs = cv2.ximgproc.segmentation.createSelectiveSearchSegmentation()
    theirs.setBaseImage(cv2.cvtColor(np.asarray(image), cv2.COLOR_RGB2BGR))
    theirs.switchToSelectiveSearchFast() if strategy == "fast" else theirs.switchToSingleStrategy(300, 0.9)
    want = sorted({(x, y, x + w, y + h) for x, y, w, h in theirs.process().tolist()})
    assert [[*map(tuple, search(image, strategy).tolist())] for _ in range(3)] == [want] * 3
    for size in ((1, 1), (1, 9), (300, 2), (5000, 3), (7, 7)):
        assert search(Image.new("RGB", size, "red"), strategy).tolist() == [[0, 0, *size]]


def test_a_large_image_is_searched_smaller_and_its_boxes_scaled_back():
    boxes = search(rectangle(1600, 1200, (403, 301, 1201, 899)), "single")
    assert np.abs(boxes - (403, 301, 1201, 899)).max(1).min() <= 4  # 2.5 pixels are one where it is searched
    assert [0, 0, 1600, 1200] in boxes.tolist() and boxes.max(0).tolist()[2:] == [1600, 1200]


def test_boxes_of_scenes_lie_on_their_objects():
    """Rather than boxes of the same sizes at random places."""
    rng, hits = np.random.default_rng(0), []
    for index in range(70):
        scene = make_scene(0, index)
        boxes, _ = keep(search(Image.fromarray(scene["image"]), "single"), 136, 136)
        sides = boxes[:, 2:] - boxes[:, :2]
        start = rng.integers(0, 137 - sides)
        both = torch.from_numpy(np.stack([boxes, np.concatenate([start, start + sides], 1)])).float()
        hits += [[(box_iou(x, truth[None]) >= 0.5).any() for x in both] for truth in torch.from_numpy(scene["boxes"])]
    ours, random = np.mean(hits, 0)
    assert ours > random + 0.12, (ours, random)


def test_what_was_found_is_read_back(tmp_path, monkeypatch, searched):
    """By the class, and by numpy alone; names in any bytes, images without boxes, coordinates above 65535."""
    names = sorted(["a/ü 雪.png", "a/b.png", "a.png", "long.png", "two\nlines.png", os.fsdecode(b"y\xff.png")])
    rng, content, images, folder = np.random.default_rng(1), {}, tmp_path / "images", tmp_path / "found"
    for k, (name, count) in enumerate(zip(names, (0, 5000, 1, 2, 3, 0), strict=True)):
        size = (70000, 1) if name == "long.png" else (20 + k, 30)
        content[size] = rng.integers(0, size[0], (count, 4))
        (images / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size).save(images / name)
    monkeypatch.setattr(proposals, "search", lambda image, strategy: content[image.size])
    monkeypatch.setattr(proposals, "keep", lambda boxes, W, H: (boxes, 0 if len(boxes) else NOTHING))
    found = make(ImageFolder(images), str(folder))
    assert all(isinstance(getattr(found, name[:-4]), np.memmap) for name in FILES if ".npy" in name)  # no copies
    boxes, named, offsets, rules, sizes = arrays = [np.load(folder / name) for name in FILES if ".npy" in name]
    assert [x.dtype.str for x in arrays] == ["<i4", "|S13", "<i8", "|u1", "<i4"]
    assert [os.fsdecode(name) for name in named.tolist()] == names and len(found) == len(names)
    assert sizes.tolist() == [[*size] for size in content] and rules.tolist() == [3, 0, 0, 0, 0, 3]
    for i, want in enumerate(content.values()):
        assert np.array_equal(found[i], want) and np.array_equal(boxes[offsets[i] : offsets[i + 1]], want)
    copy = pickle.dumps(found)
    assert np.array_equal(pickle.loads(copy)[1], found[1]) and len(copy) < 1000  # the folder's name, not the boxes
    os.remove(images / "a.png")
    assert found.check(ImageFolder(images)).tolist() == [i for i, name in enumerate(names) if name != "a.png"]


def test_workers_write_the_same_bytes_and_unreadable_images_are_named(tmp_path, capsys):
    folder, names, found = write_images(tmp_path / "images", 6, (90, 70)), ("0002.png", os.fsdecode(b"\xff.png")), []
    (folder / names[0]).write_bytes((folder / names[0]).read_bytes()[:60])
    (folder / names[1]).write_text("no image")
    images, cv2 = ImageFolder(folder), proposals.opencv()
    cv2.setNumThreads(4)
    cv2.GaussianBlur(np.zeros((2000, 2000, 3), np.float32), (0, 0), 5)
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("a worker waits for threads that did not survive its fork"))
    signal.alarm(60)
    for workers in (2, 0, 1):
        main(f"--data {folder} --out {tmp_path}/{workers} --show 7 --workers {workers}".split())
        text = capsys.readouterr().out
        assert text.count(names[0]) == text.count(ascii(names[1])[1:-1]) == 1 and "2 images: unreadable" in text
        found.append(contents(tmp_path / str(workers)))
    signal.alarm(0)
    assert found[0] == found[1] == found[2] and {*found[0]} == {*FILES, "sheet.png"}
    boxes = Proposals(tmp_path / "0")
    assert boxes[4].tolist() == keep(search(images[4][0], "single"), 90, 70)[0].tolist()
    for i, rule in enumerate(boxes.rules):
        assert (i in (2, 6)) == (rule == UNREADABLE) == (len(boxes[i]) == 0) == (boxes.sizes[i].tolist() != [90, 70])
    os.remove(folder / names[0])
    with pytest.raises(UserError, match="0002.png is gone from .*images: bring it back"):
        make(images, tmp_path / "new")  # or all images would be stored as unreadable while a disk is away


def test_a_stopped_run_goes_on_where_it_was(tmp_path, searched, monkeypatch):
    """Stopped by signals, with a part damaged, and killed while it writes any of its files: the bytes are the same."""
    want, folder, left = contents(made(tmp_path / "whole").folder), tmp_path / "parts", []
    for stop, parts in ((6, (0,)), (9, (0, 1, 3))):  # images searched in all, first images of the parts
        assert made(folder, stop=lambda stop=stop: len(searched) == stop) is None
        assert [*contents(folder)] == [f"part-{first:06}.pth" for first in parts]
    (folder / "part-000003.pth").write_bytes((folder / "part-000003.pth").read_bytes()[:-500])
    for _ in range(2):
        assert contents(made(folder).folder) == want and len(searched) == 11
    for killed_at in range(9):  # three parts, six files
        folder, left[:] = tmp_path / f"{killed_at}", [0] * killed_at
        with monkeypatch.context() as patch, pytest.raises(IndexError):
            patch.setattr(os, "replace", lambda *paths: left.pop() or os.rename(*paths))
            made(folder)
        assert not (folder / "meta.json").exists() and contents(made(folder).folder) == want


@pytest.mark.slow
def test_sigterm_saves_and_the_same_command_continues(tmp_path):
    folder = write_images(tmp_path / "images", 40, (300, 300))
    (folder / "0000.png").write_text("no image")  # said once the worker is there
    flags = ["--data", str(folder), "--workers", "1", "--out", str(tmp_path / "found")]
    command = [sys.executable, "-m", "tools.proposals", *flags]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert [process.stdout.readline()[:10] for _ in range(2)] == ["proposals:", "unreadable"]
    os.killpg(process.pid, signal.SIGTERM)  # the worker too, as Ctrl-C in a terminal
    output, _ = process.communicate(timeout=30)
    assert (process.returncode, output) == (0, "stopped by a signal; the same command continues\n")
    assert [*contents(tmp_path / "found")] == ["part-000000.pth"]
    main(flags)
    assert [*contents(tmp_path / "found")] == FILES


def test_bad_command_lines_in_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "images", 2)
    (tmp_path / "file").write_bytes(b"of an earlier version")
    assert made("whole") and not made("half", stop=lambda: True)
    before, scenes = [contents(name) for name in ("images", "whole", "half")], "--data scenes:5 --size 48 --out"
    for flags, words in {
        "--data images --out file": "file: File exists: give a new folder",
        "--data images --out images": "images: holds other files: give a new folder",
        f"{scenes} half --strategy fast --seed 1": "half: made with .*seed 0' -> '5 scenes .*seed 1'; strategy 'single' -> 'fast'",
        f"{scenes} whole --strategy fast": "whole: made with .*strategy 'single' -> 'fast'",
    }.items():
        with pytest.raises(UserError, match=f"^{words}.*$"):
            main([*flags.split(), "--workers", "0"])
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(UserError, match="pip install opencv-contrib-python-headless"):
        made("new")
    assert made("whole") and len(os.listdir()) == 4
    assert before == [contents(name) for name in ("images", "whole", "half")]


def test_a_damaged_folder_is_named_with_the_file(tmp_path):
    """Each file missing, empty, cut, of other images."""
    whole, other = (contents(made(tmp_path / f"{n}", n).folder) for n in (3, 4))
    cases = [(name, x) for name in FILES for x in (None, b"", whole[name][:-1], other[name] + b"}")]
    for path, content in ((tmp_path / "3" / name, content) for name, content in cases):
        path.unlink() if content is None else path.write_bytes(content)
        with pytest.raises(UserError, match=f"^{path}: .*: make it with python -m tools.proposals.*$"):
            Proposals(tmp_path / "3")
        path.write_bytes(whole[path.name])


def test_the_contact_sheet_shows_images_and_boxes(tmp_path):
    """As they are shown: they are stored lying on their side."""
    exif, box, folder = Image.Exif(), (50, 20, 150, 80), write_images(tmp_path / "images", 0)
    exif[0x0112] = 6  # to be turned a quarter clockwise
    for k in range(3):
        rectangle(200, 100, box).transpose(Image.Transpose.ROTATE_90).save(folder / f"{k}.png", exif=exif)
    main(f"--data {folder} --out {tmp_path}/found --show 20 --workers 0".split())
    found, sheet = Proposals(tmp_path / "found"), Image.open(tmp_path / "found" / "sheet.png")
    assert found.sizes.tolist() == [[200, 100]] * 3 and np.abs(found[0] - box).max(1).min() <= 1
    assert sheet.getpixel((126, 66)) == (60, 60, 60) and sheet.size == (2 * 246 + 6, 2 * 260 + 6)
    rows, columns = np.nonzero(np.ptp(np.asarray(sheet), axis=2)[:260, :250] > 50)  # all but the lines of boxes is grey
    want = [*found[0].min(0)[:2], *found[0].max(0)[2:]] * np.array(240 / 200) + 6
    assert np.abs([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] - want).max() <= 2
    rectangle(100, 50, box).save(folder / "0.png")
    with pytest.raises(UserError, match=r"made for another 0.png, of \(200, 100\) pixels: make proposals of these"):
        found.check(ImageFolder(folder))


def test_a_run_makes_the_boxes_of_its_scenes_once(tmp_path, capsys, searched):
    class Run(types.SimpleNamespace):
        images, rank, args, path = Scenes(6, 48, 0), 0, types.SimpleNamespace(workers=0), tmp_path.joinpath
        signalled = property(lambda run: len(searched) == 3)

    with pytest.raises(UserError, match="No such file"):
        attach(Run(rank=1), None)  # it waits for the first process
    with pytest.raises(SystemExit) as error:
        attach(Run(), None)
    assert not error.value.code and "stopped by a signal; the same command continues" in capsys.readouterr().out
    data, *_ = attach(Run(), None), attach(Run(), None), attach(Run(rank=1), None)
    assert len(searched) == 6
    with pytest.raises(UserError, match="made for 6 scenes of 48 pixels, seed 0; lacks some of 4 scenes"):
        data.proposals.check(Scenes(4, 48, 0))
