# SPDX-License-Identifier: MIT
"""harness/proposals.py and its command line: selective search, SoCo's filter, and the file that keeps the boxes."""

import json
import math
import os
import pickle
import resource
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest
import torch
from helpers import ROOT, keep_signals, write_images  # noqa: F401
from PIL import Image
from torchvision.ops import box_iou

import harness.images
from common import UserError
from harness import proposals
from harness.images import ImageFolder, Scenes
from harness.proposals import NOTHING, RULES, UNREADABLE, Partial, Proposals, attach, keep, make, search
from harness.scenes import make_scene
from tools.proposals import main

COMMAND = [sys.executable, "-m", "tools.proposals"]


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


def run(*flags):
    return main([*map(str, flags), "--strategy", "single", *([] if "--workers" in flags else ["--workers", "0"])])


def one_line(error):
    return "\n" not in str(error.value) and str(error.value)


# ----------------------------------------------------------------------------------------------------------------------
# boxes of one image
# ----------------------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    "W, H, sides, rule",
    [
        (320, 320, [(96, 96), (256, 256), (32, 288)], 1),  # 0.3 and 0.8 are in; 32 x 288 is too long
        (320, 320, [(96, 95), (256, 257)], 1),  # just outside both: the ratio alone keeps them
        (60, 60, [(12, 27), (36, 12)], 0),  # a fifth of the short side, ratio 3: in
        (60, 60, [(11, 33), (33, 11)], 1),  # a pixel less, though large enough
        (160, 400, [(32, 96), (96, 32)], 1),  # 32 x 96 is too small here
        (160, 300, [(32, 135), (31, 200)], 2),  # too long: the side alone
        (400, 400, [(20, 100)], 3),
        (400, 400, [], 3),
    ],
)
def test_filter_at_its_limits(W, H, sides, rule):
    boxes = np.array([(3, 5, 3 + w, 5 + h) for w, h in sides], np.int64).reshape(-1, 4)
    kept, found = keep(boxes, W, H)
    assert (kept.tolist(), found) == literal_filter(boxes, W, H)
    if W == 320 and len(sides) == 3:
        assert found == 0 and kept.tolist() == boxes[:2].tolist()
    else:
        assert found == rule


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


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (300, 2), (5000, 3), (7, 7)])
def test_odd_sizes(size):
    for strategy in proposals.STRATEGIES:
        boxes = search(Image.new("RGB", size, "red"), strategy)
        assert boxes.tolist() == [[0, 0, *size]]


def test_a_large_image_is_searched_smaller_and_its_boxes_scaled_back():
    box = (403, 301, 1201, 899)
    boxes = search(rectangle(1600, 1200, box), "single")
    assert nearest(boxes, (0, 0, 1600, 1200)) == 0  # the right and bottom edges are reached
    assert nearest(boxes, box) <= 4  # 2.5 pixels are one where it is searched
    assert boxes.max(0).tolist()[2:] == [1600, 1200]


def test_colours_go_to_opencv_as_it_wants_them(monkeypatch):
    cv2, seen = proposals.opencv(), []

    class Stub:
        def setBaseImage(self, pixels):
            seen.append(pixels[0, 0].tolist())

        def switchToSelectiveSearchFast(self):
            pass

        def process(self):
            return np.array([[1, 2, 3, 4]])

    monkeypatch.setattr(cv2.ximgproc.segmentation, "createSelectiveSearchSegmentation", Stub)
    assert search(Image.new("RGB", (10, 10), (1, 2, 3)), "fast").tolist() == [[1, 2, 4, 6]]
    assert seen == [[3, 2, 1]]  # BGR


# ----------------------------------------------------------------------------------------------------------------------
# from images to the file
# ----------------------------------------------------------------------------------------------------------------------


def test_boxes_lie_on_the_image_as_it_is_shown(tmp_path):
    box = (30, 60, 110, 130)
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side: to be shown turned a quarter clockwise
    shown = rectangle(150, 200, box)
    shown.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    found = make(ImageFolder(tmp_path), str(tmp_path / "file"), "single")
    assert found.sizes.tolist() == [[150, 200]]
    assert nearest(found[0], box) <= 1


def test_two_runs_and_any_number_of_workers_write_the_same_bytes(tmp_path):
    folder = write_images(tmp_path / "images", 9, (90, 70))
    for k, workers in enumerate((0, 0, 1, 2)):
        run("--data", folder, "--out", tmp_path / f"{k}", "--workers", workers)
    first, *others = [(tmp_path / f"{k}").read_bytes() for k in range(4)]
    assert all(other == first for other in others)
    found = Proposals(tmp_path / "0")
    assert len(found) == 9 and min(len(found[i]) for i in range(9)) > 0
    assert found[4].tolist() == keep(search(ImageFolder(folder)[4][0], "single"), 90, 70)[0].tolist()
    assert sorted(os.listdir(tmp_path)) == ["0", "1", "2", "3", "images"]  # nothing else is left


def test_workers_start_after_opencv_has_used_threads(tmp_path, monkeypatch):
    """Threads do not survive a fork: a worker that waits for them waits for ever."""
    cv2 = proposals.opencv()

    def too_late(*_):
        raise TimeoutError

    monkeypatch.setattr(harness.images, "detach_worker", lambda number: cv2.setNumThreads(1))
    cv2.setNumThreads(4)
    cv2.GaussianBlur(np.random.default_rng(0).random((2000, 2000, 3), np.float32), (0, 0), 5)
    search(scenes(1, 300)[0][0], "single")
    before = signal.signal(signal.SIGALRM, too_late)
    signal.alarm(20)
    try:
        assert len(make(scenes(2), str(tmp_path / "file"), "single", workers=1)) == 2
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture
def written(tmp_path, monkeypatch):
    """A file with chosen boxes, and what is in it: {name: (boxes, size)}."""
    rng, content, folder = np.random.default_rng(1), {}, tmp_path / "images"
    names = ["b.png", "a/ü 雪.png", "a/b.png", "a.png", "long.png", "z.png", "y𝄞.png"]
    names += [os.fsdecode(b"y\xff.png")]  # as text before the one above it, as bytes after it
    for k, name in enumerate(names):
        size = (70000, 1) if name == "long.png" else (20 + k, 30)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size).save(folder / name)
        boxes = rng.integers(0, size[0], (0 if name in ("a.png", "z.png") else 5000 if k == 2 else k + 1, 4))
        content[name] = boxes, size
    by_size = {size: boxes for boxes, size in content.values()}
    monkeypatch.setattr(proposals, "search", lambda image, strategy: by_size[image.size])
    monkeypatch.setattr(proposals, "keep", lambda boxes, W, H: (boxes, 0 if len(boxes) else NOTHING))
    return make(ImageFolder(folder), str(tmp_path / "file"), "single"), content


def test_reader_gives_back_what_was_written(written):
    found, content = written
    names = sorted(content)
    assert len(found) == len(content) and [found.name(i) for i in range(len(found))] == names
    for index, name in enumerate(names):
        boxes, size = content[name]
        assert found[index].dtype == np.int32 and found[index].shape == boxes.shape
        assert np.array_equal(found[index], boxes) and found.sizes[index].tolist() == list(size)
        assert found.index_of(name) == index
    assert found.rules.tolist() == [0 if len(content[name][0]) else NOTHING for name in names]
    assert np.array_equal(found[-1], found[len(found) - 1])
    for index in (len(found), -len(found) - 1):
        with pytest.raises(IndexError):
            found[index]
    for name in ("", "a", "b.pn", "zz.png"):
        with pytest.raises(KeyError):
            found.index_of(name)
    copy = pickle.loads(pickle.dumps(found))
    assert np.array_equal(copy[1], found[1]) and len(pickle.dumps(found)) < 1000  # a path, not the boxes
    found[1][:] = 0  # the caller's own
    assert np.array_equal(found[1], content[names[1]][0])


def test_layout_is_what_the_docstring_says(written):
    """Read with nothing but the description of safetensors; coordinates above 65535 are in it."""
    found, content = written
    with open(found.path, "rb") as file:
        data = file.read()
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    assert all(isinstance(value, str) for value in header.pop("__metadata__").values())
    types = {"I64": "<i8", "I32": "<i4", "U8": "u1"}
    arrays, end = {}, 0
    for name, entry in header.items():
        start, stop = entry["data_offsets"]
        assert start == end and f"\n    {name} " in proposals.__doc__
        arrays[name] = np.frombuffer(body[start:stop], types[entry["dtype"]]).reshape(entry["shape"])
        assert (8 + length + start) % arrays[name].itemsize == 0
        end = stop
    assert end == len(body)
    assert np.array_equal(arrays["boxes"], np.concatenate([content[name][0] for name in sorted(content)]))
    names = bytes(arrays["names"])
    parts = [names[a:b] for a, b in zip(arrays["name_offsets"], arrays["name_offsets"][1:], strict=False)]
    assert [parts[k] for k in arrays["order"]] == sorted(map(os.fsencode, content))


def test_usual_images_take_two_bytes_a_number(tmp_path):
    make(scenes(2), str(tmp_path / "file"), "single")
    assert b'"boxes":{"dtype":"U16"' in (tmp_path / "file").read_bytes()


def test_a_file_for_a_million_images_opens_at_once(tmp_path):
    """A sparse file with the header of a large one: opening touches none of its three gigabytes."""
    make(scenes(2), str(tmp_path / "small"), "single")
    data = (tmp_path / "small").read_bytes()
    header, end = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]), 0
    N, rows, sizes = 1_300_000, 300_000_000, {"I64": 8, "I32": 4, "U16": 2, "U8": 1}
    for name, entry in header.items():
        if name != "__metadata__":
            entry["shape"][0] = {"boxes": rows, "names": 30 * N}.get(name, N + (entry["shape"][0] == 3))
            start, end = end, end + math.prod(entry["shape"]) * sizes[entry["dtype"]]
            entry["data_offsets"] = [start, end]
    text = json.dumps(header, separators=(",", ":")).encode()
    with open(tmp_path / "large", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)

    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()

    before, started = resident(), time.time()
    found = Proposals(tmp_path / "large")
    assert len(found) == N and found[N - 1].shape == (0, 4)
    assert time.time() - started < 0.5
    assert resident() - before < 20e6


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
    print(shares)
    assert shares["single"] > shares["random"] + 0.12 and shares["fast"] > shares["single"] + 0.12


# ----------------------------------------------------------------------------------------------------------------------
# interrupted runs
# ----------------------------------------------------------------------------------------------------------------------


class StopAfter:
    """A signal that arrives after a number of images."""

    def __init__(self, count):
        self.count = count

    def __call__(self):
        self.count -= 1
        return self.count < 0


def whole_and_half(tmp_path, count=8, done=5):
    """(bytes of an uninterrupted run, path of a file with `done` images in its FILE.partial)"""
    make(scenes(count), str(tmp_path / "whole"), "single")
    out = tmp_path / "half"
    assert make(scenes(count), str(out), "single", stop=StopAfter(done - 1)) is None and not out.exists()
    return (tmp_path / "whole").read_bytes(), out


def test_a_stopped_run_goes_on_where_it_was(tmp_path, monkeypatch):
    want, out = whole_and_half(tmp_path)
    searched = []
    monkeypatch.setattr(proposals, "search", lambda *a: searched.append(a) or search(*a))
    make(scenes(8), str(out), "single")
    assert len(searched) == 3 and out.read_bytes() == want and not (tmp_path / "half.partial").exists()
    make(scenes(8), str(out), "single")
    assert len(searched) == 3  # finished


def test_cut_at_any_byte_a_run_ends_with_the_same_bytes(tmp_path):
    want, out = whole_and_half(tmp_path)
    partial, data = tmp_path / "half.partial", (tmp_path / "half.partial").read_bytes()
    first = data.index(b"\n") + 1
    settings, ends = json.loads(data[:first]), [first]
    while ends[-1] < len(data):
        ends.append(ends[-1] + 17 + 16 * int.from_bytes(data[ends[-1] + 4 : ends[-1] + 8], "little"))
    assert len(ends) == 6
    for length in range(len(data) + 1):
        partial.write_bytes(data[:length])
        held = Partial(str(partial), settings)
        whole = sum(end <= length for end in ends[1:])
        assert len(held.heads) == whole and partial.read_bytes() == data[: ends[whole]]
        held.file.close()
    for length in (0, first // 2, first, ends[2] - 1, ends[2] + 9):
        partial.write_bytes(data[:length])
        make(scenes(8), str(out), "single")
        assert out.read_bytes() == want
        out.unlink()
    damaged = bytearray(data)
    damaged[ends[2] + 30] ^= 1  # as a power failure may leave it
    partial.write_bytes(damaged)
    make(scenes(8), str(out), "single")
    assert out.read_bytes() == want


def test_killed_while_finishing(tmp_path):
    want, out = whole_and_half(tmp_path)
    rest = (tmp_path / "half.partial").read_bytes()
    (tmp_path / "half.tmp").write_bytes(want[: len(want) // 2])  # killed before the renaming
    make(scenes(8), str(out), "single")
    assert out.read_bytes() == want and sorted(os.listdir(tmp_path)) == ["half", "whole"]
    (tmp_path / "half.partial").write_bytes(rest)  # killed after it
    make(scenes(8), str(out), "single")
    assert out.read_bytes() == want and sorted(os.listdir(tmp_path)) == ["half", "whole"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_killed_and_started_again(tmp_path, number):
    flags = ["--data", "scenes:30", "--size", "96", "--strategy", "fast", "--workers", "2"]
    out, partial = tmp_path / "killed", tmp_path / "killed.partial"
    process = subprocess.Popen(
        [*COMMAND, *flags, "--out", str(out)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    deadline = time.time() + 60
    while not (partial.exists() and partial.stat().st_size > 4000) and time.time() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, number)  # as Ctrl-C in a terminal
    output, _ = process.communicate(timeout=30)
    assert partial.exists() and not out.exists()
    if number == signal.SIGINT:
        assert process.returncode == 0 and output.splitlines()[1:] == [
            "stopped by a signal; the same command continues"
        ]
    else:
        assert process.returncode == -signal.SIGKILL and len(output.splitlines()) == 1
    main([*flags, "--out", str(out)])
    main([*flags, "--out", str(tmp_path / "whole")])
    assert out.read_bytes() == (tmp_path / "whole").read_bytes()


def test_a_killed_worker_is_told(tmp_path, monkeypatch):
    parent = os.getpid()

    def killed_at_the_third(image, strategy):
        if os.getpid() != parent and image.tobytes() == scenes(6)[2][0].tobytes():
            os.kill(os.getpid(), signal.SIGKILL)
        return search(image, strategy)

    monkeypatch.setattr(proposals, "search", killed_at_the_third)
    with pytest.raises(UserError, match=r"a worker was killed.*of 6 images are saved") as error:
        make(scenes(6), str(tmp_path / "file"), "single", workers=1)
    assert one_line(error)
    monkeypatch.undo()
    assert len(make(scenes(6), str(tmp_path / "file"), "single")) == 6


def test_two_runs_at_once_are_refused(tmp_path):
    _, out = whole_and_half(tmp_path)
    code = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    command = [sys.executable, "-c", code, f"{out}.partial"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        other.stdout.readline()
        with pytest.raises(UserError, match="another run is writing it"):
            make(scenes(8), str(out), "single")
        other.communicate("\n")
    # while a run holds it (workers started and the file read again), others are kept out
    held = Partial(f"{out}.partial", json.loads(out.with_name("half.partial").read_bytes().split(b"\n")[0]))
    list(held.boxes("<u2"))
    probe = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'a'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    assert subprocess.run([sys.executable, "-c", probe, f"{out}.partial"], stderr=subprocess.DEVNULL).returncode == 1
    held.file.close()


# ----------------------------------------------------------------------------------------------------------------------
# errors
# ----------------------------------------------------------------------------------------------------------------------


def test_unreadable_images_are_named_once_and_have_no_boxes(tmp_path, capsys):
    folder = write_images(tmp_path / "images", 6)
    (folder / "0002.png").write_bytes((folder / "0002.png").read_bytes()[:60])
    (folder / "0005.png").write_text("no image")
    run("--data", folder, "--out", tmp_path / "file", "--show", 6)
    text = capsys.readouterr().out
    assert text.count("0002.png") == text.count("0005.png") == 1 and "2 images: unreadable" in text
    found = Proposals(tmp_path / "file")
    assert [i for i in range(6) if len(found[i]) == 0] == np.flatnonzero(found.rules == UNREADABLE).tolist() == [2, 5]
    assert found.sizes.tolist() == [[0, 0] if i in (2, 5) else [40, 48] for i in range(6)]
    assert found.check(ImageFolder(folder)).tolist() == list(range(6))
    assert Image.open(tmp_path / "file.png").format == "PNG"


def test_a_folder_that_disappears_stops_the_run(tmp_path):
    """Or the rest of a million images would be stored as unreadable while a disk is away."""
    images = ImageFolder(write_images(tmp_path / "images", 4))
    make(images, str(tmp_path / "whole"), "single")
    os.rename(tmp_path / "images" / "0002.png", tmp_path / "away.png")
    with pytest.raises(UserError, match=r"0002.png is no longer in .*\(2 of 4 images are saved\)"):
        make(images, str(tmp_path / "file"), "single")
    os.rename(tmp_path / "away.png", tmp_path / "images" / "0002.png")
    make(images, str(tmp_path / "file"), "single")
    assert (tmp_path / "file").read_bytes() == (tmp_path / "whole").read_bytes()


def test_check_finds_the_images_of_a_part_and_names_what_is_missing(tmp_path):
    folder = write_images(tmp_path / "images", 12)
    found = make(ImageFolder(folder), str(tmp_path / "file"), "single")
    assert found.check(ImageFolder(folder)).tolist() == list(range(12))
    for name in ("0000.png", "0004.png"):
        os.rename(folder / name, tmp_path / name)
    assert found.check(ImageFolder(folder)).tolist() == [1, 2, 3, 5, 6, 7, 8, 9, 10, 11]
    write_images(folder / "new", 2)
    with pytest.raises(UserError, match=r"lacks 2 of 12 images.*first is new/0000.png") as error:
        found.check(ImageFolder(folder))
    assert one_line(error)
    with pytest.raises(UserError, match=r"made for 12 images.*lacks 12 of 12 scenes"):
        found.check(scenes(12))
    other = ImageFolder(write_images(tmp_path / "other", 12, (50, 40)))
    assert other.fingerprint() == found.fingerprint  # the same names
    with pytest.raises(UserError, match=r"other pictures: there 0000.png is 40 x 48, here it is 50 x 40") as error:
        found.check(other)
    assert one_line(error)


def test_check_wants_the_same_scenes(tmp_path):
    found = make(scenes(4), str(tmp_path / "file"), "single")
    assert found.check(scenes(4)).tolist() == [0, 1, 2, 3]
    for other in (scenes(3), scenes(4, 64), scenes(4, 48, 1)):
        with pytest.raises(UserError, match="made for 4 scenes of 48 pixels, seed 0; lacks") as error:
            found.check(other)
        assert other.fingerprint() in one_line(error)


def test_finished_and_unfinished_files_of_other_settings_are_refused_by_name(tmp_path):
    _, out = whole_and_half(tmp_path)
    for path, unfinished in ((out, out.with_name("half.partial")), (tmp_path / "whole", None)):
        before = (unfinished or path).read_bytes()
        with pytest.raises(UserError, match="strategy 'single' -> 'fast'") as error:
            make(scenes(8), str(path), "fast")
        assert one_line(error)
        with pytest.raises(UserError, match="8 scenes of 48 pixels, seed 0' -> '8 scenes of 48 pixels, seed 1'"):
            make(scenes(8, seed=1), str(path), "single")
        assert (unfinished or path).read_bytes() == before
    for content in ("my own file", "my own file\n", '{"a": 1}\n'):
        (tmp_path / "half.partial").write_text(content)
        with pytest.raises(UserError, match="not written by this tool"):
            make(scenes(8), str(out), "single")
        assert (tmp_path / "half.partial").read_text() == content


def test_files_that_are_none(tmp_path):
    make(scenes(3), str(tmp_path / "file"), "single")
    data = (tmp_path / "file").read_bytes()
    cases = {
        "no such file": None,
        "not a file of proposals": (b"", b"\0" * 300, data[:5], data[:40], b"text", b"\xff" * 20 + data[20:]),
        "cut off or damaged": (data[:200], data[:-1], data + b"\0", data[: len(data) // 2]),
    }
    for words, contents in cases.items():
        for content in contents or [None]:
            path = tmp_path / "bad"
            if content is not None:
                path.write_bytes(content)
            with pytest.raises(UserError, match=words) as error:
                Proposals(path)
            assert one_line(error)
    with pytest.raises(UserError, match="Is a directory"):
        Proposals(tmp_path)


def test_bad_command_lines(tmp_path):
    images, file = write_images(tmp_path / "images", 1), tmp_path / "text"
    file.write_text("text")
    (tmp_path / "empty").mkdir()
    cases = [
        ("no such folder", "--data", tmp_path / "missing", "--out", tmp_path / "a"),
        ("no images", "--data", tmp_path / "empty", "--out", tmp_path / "a"),
        ("write scenes:4096", "--data", "scenes:many", "--out", tmp_path / "a"),
        ("Is a directory", "--data", images, "--out", tmp_path / "empty"),
        ("Not a directory|File exists", "--data", images, "--out", file / "a"),
        ("not a file of proposals", "--data", images, "--out", file),
        ("not a file of proposals", "--data", images, "--out", "/dev/full"),
        ("--workers -1: must be at least 0", "--data", images, "--out", tmp_path / "a", "--workers", "-1"),
        ("--size 15: must be at least 16", "--data", "scenes", "--out", tmp_path / "a", "--size", "15"),
        ("--show -1: must be at least 0", "--data", images, "--out", tmp_path / "a", "--show", "-1"),
    ]
    for words, *flags in cases:
        with pytest.raises(UserError, match=words) as error:
            run(*flags)
        assert one_line(error), flags
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "images", "text"]


def test_an_error_is_one_line_and_exit_code_2(tmp_path):
    flags = ["--data", str(tmp_path / "missing"), "--out", str(tmp_path / "file")]
    done = subprocess.run([*COMMAND, *flags], cwd=ROOT, capture_output=True, text=True)
    assert (
        done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1 and "no such folder" in done.stderr
    )


def test_a_full_disk_loses_nothing(tmp_path):
    want, out = whole_and_half(tmp_path)
    saved = (tmp_path / "half.partial").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(saved) + 100, limits[1]))
        with pytest.raises(UserError, match="no space left to write .*half.partial"):
            make(scenes(8), str(out), "single")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "half.partial").read_bytes().startswith(saved)
    os.symlink("/dev/full", tmp_path / "half.tmp")  # full when the finished file is written
    with pytest.raises(UserError, match="no space left to write .*half"):
        make(scenes(8), str(out), "single")
    assert not out.exists() and sorted(os.listdir(tmp_path)) == ["half.partial", "whole"]
    make(scenes(8), str(out), "single")
    assert out.read_bytes() == want


def test_without_opencv_files_are_read_and_none_is_made(tmp_path, monkeypatch):
    make(scenes(2), str(tmp_path / "file"), "single")
    monkeypatch.setitem(sys.modules, "cv2", None)
    assert len(make(scenes(2), str(tmp_path / "file"), "single")[1]) > 0
    with pytest.raises(UserError, match="pip install opencv-contrib-python-headless"):
        make(scenes(2), str(tmp_path / "new"), "single")
    assert sorted(os.listdir(tmp_path)) == ["file"]


def test_the_contact_sheet_shows_images_and_boxes(tmp_path, capsys):
    (tmp_path / "images").mkdir()
    for k in range(3):
        rectangle(200, 100, (50, 20, 150, 80)).save(tmp_path / "images" / f"{k}.png")
    run("--data", tmp_path / "images", "--out", tmp_path / "file", "--show", 20)
    assert f"{tmp_path / 'file'}.png" in capsys.readouterr().out
    sheet = Image.open(tmp_path / "file.png")
    assert sheet.format == "PNG" and sheet.size == (2 * 246 + 6, 2 * 260 + 6)
    pixels = np.asarray(sheet).astype(int)
    assert (pixels == 60).all(2).sum() > 3 * 100 * 50  # the rectangles
    coloured = np.ptp(pixels, axis=2) > 50  # all else is grey: lines of boxes, in the images alone
    rows, columns = np.nonzero(coloured[:260, :250])
    boxes = Proposals(tmp_path / "file")[0]
    want = [*boxes.min(0)[:2], *boxes.max(0)[2:]] * np.array(240 / 200) + 6
    assert np.abs([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] - want).max() <= 2


# ----------------------------------------------------------------------------------------------------------------------
# boxes of a run
# ----------------------------------------------------------------------------------------------------------------------


def test_a_run_makes_the_boxes_of_its_scenes_once(tmp_path, monkeypatch, capsys):
    run_ = types.SimpleNamespace(
        images=scenes(6),
        rank=0,
        signalled=0,
        args=types.SimpleNamespace(workers=0),
        path=lambda name: str(tmp_path / name),
    )
    searched = []

    def search_and_stop(image, strategy):
        searched.append(image)
        run_.signalled = int(len(searched) == 3)
        return search(image, strategy)

    monkeypatch.setattr(proposals, "search", search_and_stop)
    with pytest.raises(SystemExit) as error:  # a signal arrived
        attach(run_, None)
    assert not error.value.code and "stopped by a signal; the same command continues" in capsys.readouterr().out
    assert os.listdir(tmp_path) == ["scenes-6-48-0.proposals.partial"] and len(searched) == 3
    run_.signalled = 0
    found = attach(run_, None)
    assert os.listdir(tmp_path) == ["scenes-6-48-0.proposals"] and len(searched) == 6
    (image, boxes), _ = found[4]
    assert boxes.tolist() == keep(search(image, "single"), 48, 48)[0].tolist()
    attach(run_, None)
    attach(run_, str(tmp_path / "scenes-6-48-0.proposals"))
    run_.rank = 1  # it waits for the first process
    attach(run_, None)
    assert len(searched) == 6
    os.remove(tmp_path / "scenes-6-48-0.proposals")
    with pytest.raises(UserError, match="no such file"):
        attach(run_, None)
    assert len(searched) == 6
