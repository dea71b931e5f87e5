# SPDX-License-Identifier: MIT
"""harness/: images, batches, weights, runs, fine-tuning, what a method sees, pictures."""

import argparse
import copy
import errno
import json
import os
import pathlib
import signal
import sys
import urllib.error
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from helpers import assert_same, checkpoint, log_lines, write_images
from PIL import Image
from torch import nn
from torchvision.transforms.functional import pil_to_tensor

import common
from common import UserError
from harness import finetune, look, pictures, weights
from harness import images as data
from harness import run as runs

# ---- images


def gradient(width=12, height=8):
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return np.stack([x, y, 255 - x], 2).astype(np.uint8)


def test_read_image_gives_rgb_for_every_mode(tmp_path):
    rgb, red = Image.fromarray(gradient()), gradient()[:, :, 0]
    palette, half = rgb.quantize(200), np.repeat([[0] * 6 + [255] * 6], 8, 0).astype(np.uint8)
    for name, image, wanted in (
        ("rgb.png", rgb, gradient()),
        ("grey.png", Image.fromarray(red), red[:, :, None]),
        ("grey16.png", Image.fromarray(red.astype(np.uint16) * 257), red[:, :, None]),
        ("palette.png", palette, palette.convert("RGB")),
        ("cmyk.jpg", rgb.convert("CMYK"), gradient()),
        ("alpha.png", Image.fromarray(np.dstack([gradient(), half])), np.where(half[:, :, None], gradient(), 255)),
        ("bits.png", Image.fromarray(red > 100), (red > 100)[:, :, None] * 255),
    ):
        image.save(tmp_path / name)
        found = data.read_image(tmp_path / name)
        distance = np.abs(np.asarray(found, int) - np.asarray(wanted, int)).mean()
        assert found.mode == "RGB" and distance <= (14 if name == "cmyk.jpg" else 0), name
    frames = [Image.new("RGB", (5, 5), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    red, _, blue = data.read_image(tmp_path / "moving.gif").getpixel((0, 0))
    assert red > 240 and blue < 10
    Image.new("L", (12000, 9000)).save(tmp_path / "huge.bmp")  # 108 megapixels: Pillow warns, and it is read
    assert data.read_image(tmp_path / "huge.bmp").size == (12000, 9000)


def test_read_image_turns_by_exif(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned a quarter clockwise
    Image.fromarray(gradient()).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(data.read_image(tmp_path / "turned.png"), np.rot90(gradient(), -1))


def test_broken_images_are_oserrors(tmp_path):
    Image.effect_noise((64, 64), 90).save(tmp_path / "a.jpg")
    for content in ((tmp_path / "a.jpg").read_bytes()[:900], b"", b"no image"):
        (tmp_path / "a.jpg").write_bytes(content)
        with pytest.raises(OSError):
            data.read_image(tmp_path / "a.jpg")


def test_folder_lists_images_recursively_in_order(tmp_path):
    write_images(tmp_path / "b", 2)
    write_images(tmp_path / "a" / "deep", 1)
    (tmp_path / "a" / "notes.txt").write_text("no image")
    (tmp_path / "b" / "._0000.png").write_bytes(b"hidden")
    (tmp_path / "b" / "again").symlink_to(tmp_path)  # a loop
    assert data.list_images(tmp_path) == ["a/deep/0000.png", "b/0000.png", "b/0001.png"]
    images = data.ImageFolder(tmp_path)
    assert len(images) == 3 and images.name(2) == "b/0001.png" and images[2][1] == 0
    write_images(tmp_path / "train" / "class", 4)
    assert len(data.ImageFolder(tmp_path)) == 4  # train/ alone, where there is one
    os.rename(tmp_path / "b" / "0000.png", os.fsencode(tmp_path) + b"/b/\xff caf\xc3\xa9.png")  # not even valid UTF-8
    assert data.ImageFolder(tmp_path / "b")[1][1] == 0
    for path in ("empty", "missing"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(UserError, match="images"):
            data.ImageFolder(tmp_path / path)


def test_fingerprint_knows_the_files_and_not_the_folder(tmp_path):
    one, two = (data.ImageFolder(write_images(tmp_path / name, 3)).fingerprint() for name in ("one", "two"))
    assert one == two
    os.rename(tmp_path / "two" / "0002.png", tmp_path / "two" / "0003.png")
    assert data.ImageFolder(tmp_path / "two").fingerprint() != one


def test_unreadable_images_are_replaced_named_and_counted(tmp_path, capsys):
    write_images(tmp_path, 200)
    for name in ("0000.png", "0199.png"):
        (tmp_path / name).write_bytes(b"broken")
    images = data.ImageFolder(tmp_path)
    image, passed = images[199]  # past the end, around, to the next good one
    assert passed == 2 and np.array_equal(image, images[1][0])
    bad = data.BadImages(images)
    for indices, counts in (([199, 5, 0], [2, 0, 1]), ([199], [2])):
        bad.note(torch.tensor(indices), torch.tensor(counts))
        bad.share()
    assert bad.found == {0, 199} and capsys.readouterr().out.count("unreadable image") == 2
    bad.note(torch.tensor([7]), torch.tensor([1]))
    with pytest.raises(UserError, match="3 of 200 images cannot be read"):
        bad.share()


@pytest.mark.parametrize("index, wanted, passed", [(23, 25, 2), (29, 29, 0), (28, 28, 0), (3, None, 20)])
def test_readable_tries_the_neighbours_twenty_times(index, wanted, passed):
    def read(index):
        tried.append(index)
        if index < 25:
            raise OSError
        return index

    tried = []
    assert data.readable(read, index, 30) == (wanted, passed)
    assert tried == [*range(index, index + passed + (wanted is not None))]


def test_the_word_scenes_names_the_built_in_ones(tmp_path, monkeypatch):
    assert len(data.open_images("scenes", 48, 3)) == 4096
    scenes = data.open_images("scenes:7", 48, 3)
    image, passed = scenes[6]
    assert len(scenes) == 7 and image.size == (48, 48) and passed == 0 and scenes.held_out
    assert np.array_equal(image, scenes.scene(6)["image"]) and scenes.fingerprint() == "7 scenes of 48 pixels, seed 3"
    assert np.array_equal(scenes.probe(2), scenes.scene(9)["image"])  # no training step sees it
    for word in ("scenes:0", "scenes:-1", "scenes:many", "scenes:1.5"):
        with pytest.raises(UserError, match=f"--data {word}: write scenes:4096"):
            data.open_images(word, 48, 3)
    write_images(tmp_path / "scenes", 2)
    monkeypatch.chdir(tmp_path)
    assert len(data.open_images("./scenes", 48, 3)) == 2


# ---- batches and views


def batches(rank, size, start=0, stop=9, kinds=None):
    return list(data.Batches(26, 8, rank, size, 3, start, stop, kinds))


def test_batches_are_the_same_for_any_number_of_processes_and_after_a_resume():
    whole = batches(0, 1)
    assert [a + b for a, b in zip(batches(0, 2), batches(1, 2), strict=True)] == whole
    assert batches(0, 1, start=4) == whole[4:]
    for epoch in range(3):  # three steps of 8 from 26 images, every image at most once an epoch
        seen = [key for batch in whole[3 * epoch : 3 * epoch + 3] for key in batch]
        assert len({index for _, index in seen}) == 24 and {e for e, _ in seen} == {epoch}
    assert [i for _, i in whole[0]] != [i for _, i in whole[3]] and whole[0][0][1] != 0


@pytest.mark.parametrize("count", [0, 1, 8, 13, 23, 26])
def test_batches_of_kinds(count):
    """As many steps an epoch as without kinds. A batch, of all processes, is of one kind, but at most one an epoch."""
    kinds = torch.randperm(26, generator=torch.Generator().manual_seed(0)) < count
    whole, orders = batches(0, 1, stop=18, kinds=kinds), set()
    for epoch in range(6):
        part = whole[3 * epoch : 3 * epoch + 3]
        assert len({i for batch in part for _, i in batch}) == 24 and {e for batch in part for e, _ in batch} == {epoch}
        orders.add(tuple(sum(bool(kinds[i]) for _, i in batch) for batch in part))
    assert all(sum(0 < n < 8 for n in order) <= 1 for order in orders)
    assert len(orders) > 1 or count in (0, 1, 26)  # the order of the batches is drawn, too
    shares = [batches(rank, 4, stop=18, kinds=kinds) for rank in range(4)]
    assert [sum(parts, []) for parts in zip(*shares, strict=True)] == whole
    assert batches(0, 1, 4, kinds=kinds) == whole[4:9] and batches(3, 4, 5, 7, kinds=kinds) == shares[3][5:7]


def test_draws_of_a_view_depend_on_neither_workers_nor_order():
    def draw(keys, workers=0, seed=5):
        views = data.Views(data.Scenes(6, 16, 0), noisy, seed)
        sampler = dict(batch_sampler=[[key] for key in keys], worker_init_fn=data.detach_worker)
        rows, loader = {}, torch.utils.data.DataLoader(views, num_workers=workers, **sampler)
        for key, (pixels, numbers, index, passed) in zip(keys, loader, strict=True):
            assert index.item() == key[1] and passed.item() == 0
            assert np.array_equal(pixels[0], pil_to_tensor(data.Scenes(6, 16, 0)[key[1]][0]))
            rows[key] = tuple(numbers[0].tolist())
        return rows

    keys = [(epoch, index) for epoch in range(2) for index in range(6)]
    state = torch.get_rng_state()
    data.Views(data.Scenes(6, 16, 0), noisy, 5)[0, 0]
    assert torch.equal(torch.get_rng_state(), state)
    want = draw(keys)
    assert len(set(want.values())) == 12  # other draws for another epoch and another image
    assert draw(keys[::-1]) == want and draw(keys, workers=2) == want and draw(keys[5:8]) == dict([*want.items()][5:8])
    assert not set(draw(keys, seed=6).values()) & set(want.values())


# ---- anybody's weights


def resnet_weights(seed):
    torch.manual_seed(seed)
    state = torchvision.models.resnet18().state_dict()
    return {name: tensor for name, tensor in state.items() if not name.startswith("fc.")}


def prefixed(prefix, state, **more):
    return {prefix + name: tensor for name, tensor in state.items()} | more


GOOD, OTHER = resnet_weights(0), resnet_weights(1)
BODY, STAGE = ({k: v for k, v in GOOD.items() if k.startswith("layer4.") == last} for last in (False, True))
HEAD = {"fc.0.weight": torch.zeros(2, 2), "fc.2.bias": torch.zeros(2)}
LAYOUTS = {  # of others: what stands in the file; how many tensors are left
    "plain": (GOOD | {"fc.weight": torch.zeros(10, 512)}, 1),
    "moco": ({"epoch": 200, "arch": "resnet18", "optimizer": {"state": {}}, "state_dict": prefixed("module.encoder_k.", OTHER)
              | prefixed("module.encoder_q.", GOOD | HEAD, **{"module.queue": torch.zeros(4)})}, 123),
    "setsim released": ({"state_dict": prefixed("module.encoder_q.0.", GOOD) | prefixed("module.encoder_k.0.", OTHER)
                         | prefixed("module.encoder_q.1.", HEAD)}, 122),
    "resim": ({"state_dict": prefixed("module.encoder_q.", GOOD | {"fpn_lateral5.weight": torch.zeros(2)})}, 1),
    "densecl raw": ({"state_dict": prefixed("backbone.", GOOD, **{"neck.mlp.0.weight": torch.zeros(2), "queue": torch.zeros(2)})}, 2),
    "pixpro": ({"model": prefixed("module.encoder_k.", OTHER) | prefixed("module.encoder.", GOOD)
                | prefixed("module.projector.", {"linear1.weight": torch.zeros(2)}), "opt": argparse.Namespace(arch="resnet18")}, 121),
    "soco": ({"model": prefixed("module.encoder.", GOOD) | prefixed("module.head.", {"conv1.weight": torch.zeros(3)}),
              "model_ema": prefixed("encoder.", OTHER)}, 1),
    "simsiam": ({"state_dict": prefixed("module.encoder.", GOOD | HEAD) | prefixed("module.predictor.", HEAD)}, 4),
    "swav": (prefixed("module.", GOOD | {"projection_head.0.weight": torch.zeros(2), "prototypes.weight": torch.zeros(2)}), 2),
    "dino": ({"student": prefixed("module.backbone.", OTHER), "teacher": prefixed("backbone.", GOOD),
              "args": argparse.Namespace(out=pathlib.PosixPath("x"))}, 0),
    "infomin": ({"model": prefixed("module.encoder.", GOOD) | prefixed("module.head.", HEAD), "best": np.float64(3)}, 2),
    "detector on C4": (prefixed("backbone.", BODY) | prefixed("roi_heads.box_head.", STAGE | HEAD), 2),
    "ours": ({"script": "setsim", "model": prefixed("key.trunk.", OTHER) | prefixed("query.trunk.", GOOD)}, 120),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_load_backbone_understands(layout, tmp_path, capsys):
    content, left = LAYOUTS[layout]
    torch.save(content, tmp_path / "file.pth", _use_new_zipfile_serialization=layout not in ("moco", "dino"))
    trunk = common.ResNetTrunk("resnet18")
    weights.load_into(trunk, tmp_path / "file.pth", "resnet18")
    assert_same(dict(trunk.state_dict()), GOOD)
    said, line = f"backbone: 120 tensors of resnet18 from {tmp_path / 'file.pth'}, ", capsys.readouterr().out
    assert line.startswith(said) and f"; {left} others beside" in line


def test_load_backbone_refuses_a_single_missing_or_misshapen_tensor(tmp_path):
    def refused(state, words, arch="resnet18"):
        torch.save({"state_dict": prefixed("module.", state)}, tmp_path / "file.pth")
        with pytest.raises(UserError, match=words) as error:
            weights.load_backbone(tmp_path / "file.pth", arch)
        assert "\n" not in str(error.value)

    for name in ("conv1.weight", "layer3.0.downsample.1.running_var", "layer4.1.bn2.weight"):
        refused({k: v for k, v in GOOD.items() if k != name}, name)
        refused(GOOD | {name: torch.zeros(3)}, name)
        refused(GOOD | {name: GOOD[name] * float("nan")}, name)
    refused(GOOD, "check --arch", "resnet50")
    for state in (  # whose last stage is it?
        prefixed("encoder_q.", BODY) | prefixed("encoder_k.", BODY) | prefixed("encoder_k.head.", STAGE),
        prefixed("a.", BODY) | prefixed("b.", STAGE) | prefixed("c.", STAGE),
        BODY,
    ):
        refused(state, "no ResNet in it")
    torch.save({k: v for k, v in GOOD.items() if "num_batches" not in k}, tmp_path / "file.pth")  # of old PyTorch
    state, line = weights.load_backbone(tmp_path / "file.pth", "resnet18")
    assert state.keys() == GOOD.keys() and "; 0 others" in line


class Evil:
    def __reduce__(self):
        return print, ("code from a checkpoint was run",)


def test_load_backbone_never_runs_code(tmp_path, capsys, monkeypatch):
    torch.save({"state_dict": GOOD, "evil": Evil()}, tmp_path / "evil.pth")
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "empty.pth").write_text("")
    for name in ("evil", "text", "empty", "missing"):
        with pytest.raises(UserError) as error:
            weights.load_backbone(tmp_path / f"{name}.pth", "resnet18")
        message = str(error.value)
        assert "\n" not in message and "two options" not in message  # torch's advice to trust the file
    assert capsys.readouterr().out == ""
    offline = mock.Mock(side_effect=urllib.error.URLError("no network"))
    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", offline)
    with pytest.raises(UserError, match="cannot be downloaded"):
        weights.load_backbone("imagenet", "resnet18")


# ---- files of weights


def test_saving_replaces_the_old_file_only_when_the_new_one_is_whole(tmp_path, monkeypatch):
    path = tmp_path / "x.pth"
    weights.save_atomically({"a": 1}, path)
    for place, error, raised in (
        ("fsync", OSError(errno.ENOSPC, "No space left on device"), UserError),
        ("replace", KeyboardInterrupt("no space left"), KeyboardInterrupt),  # killed before the renaming
    ):
        assert os.listdir(tmp_path) == ["x.pth"]
        monkeypatch.setattr(weights.os, place, mock.Mock(side_effect=error))
        with pytest.raises(raised, match="no space left"):
            weights.save_atomically({"a": 2}, path)
        assert torch.load(path) == {"a": 1}
        monkeypatch.undo()
    weights.save_atomically({"a": 3}, path)
    assert torch.load(path) == {"a": 3} and os.listdir(tmp_path) == ["x.pth"]


def test_weights_for_others_are_finite_and_contiguous(tmp_path):
    net = nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)
    weights.save_weights(net, tmp_path / "net.pth")
    saved = torch.load(tmp_path / "net.pth")
    assert not net.weight.is_contiguous() and saved["weight"].is_contiguous()
    assert_same(saved, {name: x.contiguous() for name, x in net.state_dict().items()})
    with torch.no_grad():
        net.bias[0] = float("inf")
    with pytest.raises(UserError, match="net.pth: the weights are no longer finite"):
        weights.save_weights(net, tmp_path / "net.pth")
    assert_same(torch.load(tmp_path / "net.pth"), saved)


# ---- runs: a small method on built-in scenes


class Tiny(nn.Module):
    """The least that a Run asks of a method. It notes what it is shown."""

    picture, measured, shown = "dots", "dots are found", []

    def __init__(self):
        super().__init__()
        with common.drawing("tiny"):
            self.query = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))

    def measure(self, pixels, noise):
        self.query(noise)  # changes running statistics, of the copy alone
        self.shown.append(("measure", self.training, pixels, noise))
        return 8, 2.0, 16

    def draw(self, path, pixels, noise):
        self.shown.append(("draw", self.training, pixels, noise))
        if path:
            pathlib.Path(path).write_bytes(b"picture")


def noisy(image):
    return pil_to_tensor(image), torch.rand(3)


def start(folder, *flags):
    """A Run of 16 scenes, 2 epochs of 4 steps if `flags` do not say otherwise."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--demo", action="store_true")
    common.run_flags(parser, "tiny")
    base = "--data scenes:16 --size 32 --batch-size 4 --epochs 2 --workers 0".split()
    return runs.Run("tiny", parser.parse_args([*base, "--output-dir", str(folder), *map(str, flags)]))


def train(folder, *flags, each=None, loss_at=None, plain_views=None, whole=False, **kept):
    """Train Tiny, as a method script does: the Run.

    each: called with the Run within each step. loss_at: what is logged as the loss of a step. whole: measure 32 images
    and draw the curves, which takes most of the time.
    """
    run, method = start(folder, *flags), Tiny()
    optimizer = torch.optim.SGD(method.query.parameters(), 0.1, momentum=0.9)
    run.resume(method, optimizer, torch.amp.GradScaler("cpu", enabled=False), {"tiny.pth": method.query}, **kept)
    Tiny.shown.clear()
    with pytest.MonkeyPatch.context() as patch:
        if not whole:
            patch.setattr(runs, "MEASURED", 4)
            patch.setattr(runs, "BATCH", 4)
            patch.setattr(pictures, "draw_curves", id)
        for _, noise in run.steps(noisy, plain_views):
            loss = method.query(noise).square().mean() + method.query[0].weight.square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if each:
                each(run)
            run.log(loss=loss_at(run.step) if loss_at else loss, lr=run.step / 10, std=noise.std(), std_spread=0.5)
    return run


def steps_of(folder, kind="loss"):
    return [line["step"] for line in log_lines(folder) if kind in line]


def test_lines_of_a_run_are_means_since_the_line_before(tmp_path, capsys):
    at, tens = [], [torch.tensor(10.0 * step) for step in range(8)]
    run = train(
        tmp_path, "--print-freq", 3, each=lambda r: at.append((r.step, r.epoch)), loss_at=tens.__getitem__, whole=True
    )
    assert at == [(step, step // 4) for step in range(8)]
    header, first, *lines, last = log_lines(tmp_path)
    assert header["settings"]["lr"] == 0.03 and header["settings"]["files"] == "16 scenes of 32 pixels, seed 0"
    assert set(header) == {"command", "versions", "settings"} and header["versions"]["torch"] == torch.__version__
    assert [line["step"] for line in lines] == [3, 6, 8] and [line["epoch"] for line in lines] == [0.75, 1.5, 2.0]
    assert [line["loss"] for line in lines] == [10, 40, 65]  # of steps 0 to 2, 3 to 5, 6 and 7
    assert [line["lr"] for line in lines] == [0.2, 0.5, 0.7]  # plain numbers: the last one
    assert all(line["images_per_s"] > 0 and 0 <= line["data_share"] <= 1 and line["bad_images"] == 0 for line in lines)
    assert first == {"step": 0, "probe": {"hits": 0.5, "chance": 0.125, "count": 16}} and last == first | {"step": 8}
    text = capsys.readouterr().out
    assert "start of training: 50.0% of 16 dots are found, in held-out scenes (chance 12.5%)" in text
    assert "step 3/8 epoch 0.75 loss 10.000 " in text and " std" not in text and " lr 0.2" not in text
    assert "4 steps an epoch, 8 in all; batch 4 = 1 x 4 on " in text and "lr 0.1 (--lr 0.03 scaled to " in text
    files = "checkpoint.pth curves.png dots_end.png dots_start.png log.jsonl tiny.pth".split()
    assert sorted(os.listdir(tmp_path)) == files
    assert_same(torch.load(tmp_path / "tiny.pth"), dict(run.method.query.state_dict()))


@pytest.mark.parametrize(
    "flags, wanted", [("", [4, 8]), ("--save-every 3", [3, 6, 8]), ("--steps 6", [4, 6]), ("--steps 0", [0])]
)
def test_checkpoints_come_every_epoch_or_as_told_and_at_the_end(flags, wanted, tmp_path, monkeypatch):
    save, saved = runs.Run.save, []
    monkeypatch.setattr(runs.Run, "save", lambda run: saved.append(run.step) or save(run))
    run = train(tmp_path, *flags.split(), results=[3.5], classes=["a"])
    assert saved == wanted and checkpoint(tmp_path)["step"] == run.step == wanted[-1]
    assert steps_of(tmp_path, "probe") == [0, run.step] and run.ended == (run.step == 8)
    assert train(tmp_path, *flags.split(), results=[], classes=[]).kept == {"results": [3.5], "classes": ["a"]}


def test_measuring_changes_nothing_and_shows_the_same_views_each_time(tmp_path, monkeypatch):
    def plain(image):
        return pil_to_tensor(image) // 2, torch.rand(3)

    def measure(run, *args):
        before = copy.deepcopy(run.method.state_dict()), torch.get_rng_state()
        original(run, *args)
        assert_same((dict(run.method.state_dict()), torch.get_rng_state()), (dict(before[0]), before[1]))

    original = runs.Run.measure
    monkeypatch.setattr(runs.Run, "measure", measure)
    monkeypatch.setattr(pictures, "draw_curves", id)
    run = train(tmp_path, "--steps", 3, plain_views=plain, whole=True)
    assert [shown[:2] for shown in Tiny.shown] == [("draw", True), ("measure", True)] * 2  # in training mode
    assert_same(Tiny.shown[:2], Tiny.shown[2:])
    _, _, pixels, noise = Tiny.shown[1]
    for i in (0, 31):
        assert np.array_equal(pixels[i], pil_to_tensor(run.images.probe(i)) // 2)  # held-out images, plain views
        with common.drawing("probe", 0, i):
            assert torch.equal(noise[i], torch.rand(3))
    monkeypatch.setattr(common, "start_processes", lambda: (1, 1, torch.device("cpu")))
    train(tmp_path / "demo", "--demo", "--steps", 0, whole=True)
    assert [kind for kind, *_ in Tiny.shown[:9]] == ["draw"] + ["measure"] * 8  # 256 images; all processes take part
    assert not torch.equal(Tiny.shown[1][2], Tiny.shown[2][2])
    assert os.listdir(tmp_path / "demo") == []  # the first process writes


def test_a_continued_run_drops_later_and_torn_lines(tmp_path):
    train(tmp_path, "--print-freq", 1, "--steps", 5)
    kept = log_lines(tmp_path)
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 6, "loss": 99}\n{"step": 7, "loss": 99}\n{"step": 8, "lo')
    train(tmp_path, "--print-freq", 1)
    lines = log_lines(tmp_path)
    assert lines[: len(kept)] == kept and 99 not in [line.get("loss") for line in lines]  # with their header
    assert steps_of(tmp_path) == [*range(1, 9)] and steps_of(tmp_path, "probe") == [0, 5, 8]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[:-1]))
    train(tmp_path, each=lambda run: pytest.fail("a step"))  # killed before the closing measurement
    assert log_lines(tmp_path) == lines
    os.remove(tmp_path / "checkpoint.pth")  # a run without a checkpoint starts anew
    train(tmp_path, "--steps", 1)
    assert steps_of(tmp_path) == [1] and sum("command" in line for line in log_lines(tmp_path)) == 1


@pytest.mark.parametrize(
    "flags, lost, lines", [("--save-every 2", "1 to 6", []), ("--print-freq 3 --save-every 4", "4 to 6", [3])]
)
def test_a_loss_that_is_not_finite_stops_the_run_before_it_is_saved(flags, lost, lines, tmp_path):
    """Between two lines of the log, and at a line."""
    train(tmp_path / "sound", "--steps", 4)
    with pytest.raises(UserError, match=rf"not finite \(steps {lost}\).*checkpoint saved before is kept"):
        train(tmp_path / "a", *flags.split(), loss_at=lambda step: torch.tensor(float("nan") if step == 5 else 1.0))
    assert checkpoint(tmp_path / "a")["step"] == 4 and steps_of(tmp_path / "a") == lines
    assert_same(*(checkpoint(tmp_path / name)["model"] for name in ("a", "sound")))
    assert_same(*(torch.load(tmp_path / name / "tiny.pth") for name in ("a", "sound")))


def test_weights_are_loaded_at_the_start_alone(tmp_path):
    assert start(tmp_path, "--init", "file").init == "file"
    train(tmp_path, "--steps", 1)
    assert start(tmp_path, "--init", "file").init is None  # the checkpoint has them


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(
    "place, name, call", [(runs.Run, "log", 3), (runs, "agree", 2), (runs.Run, "write", 2), (runs.Run, "measure", 1)]
)
def test_a_signal_at_any_moment_is_kept_and_the_run_saved(place, name, call, number, tmp_path, monkeypatch, capsys):
    """Within a step, while the processes agree, after that, and before the first step."""
    original, calls = getattr(place, name), []

    def signalled(*args, **values):
        result = original(*args, **values)
        calls.append(args)
        if len(calls) == call:
            signal.raise_signal(number)
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler  # a second Ctrl-C stops at once
        return result

    monkeypatch.setattr(place, name, signalled)
    run = train(tmp_path, "--print-freq", 2, "--save-every", 100)
    assert run.step <= 3 and not run.ended and (run.step == 3 or name != "log")
    assert f"stopped by a signal and saved at step {run.step}; the same command" in capsys.readouterr().out
    assert checkpoint(tmp_path)["step"] == run.step and (name == "measure" or steps_of(tmp_path)[-1] == run.step)


@pytest.mark.parametrize(
    "images, asked, values, size, said",
    [  # batches of 64
        (10**6, None, {}, 65536, ""),
        (65536 + 64, None, {}, 65536, ""),
        (65536, None, {}, 65536 - 64, "queue: 65472 keys instead of 65536, less than an epoch of 65536 images"),
        (200, None, {}, 2 * 64, "queue: 128 keys"),  # three steps an epoch
        (70, None, {}, 64, "queue: 64 keys"),  # one step an epoch
        (200, None, dict(keys=4), 4 * 2 * 64, "queue: 512 keys"),
        (10**6, None, dict(most=512), 512, ""),
        (10**6, 100, dict(most=512), 100, ""),
        (70, None, dict(most=512), 64, "queue: 64 keys instead of 512"),  # a demo on few images
        (200, 512, dict(keys=4), 512, ""),
        (200, 129, {}, 129, "warning: --queue-size 129 holds more than an epoch, so several keys of one image"),
        (200, 513, dict(keys=4), 513, "warning: --queue-size 513 holds more than an epoch"),
    ],
)
def test_a_queue_is_as_long_as_the_images_allow(images, asked, values, size, said, tmp_path, capsys):
    assert start(tmp_path, "--data", f"scenes:{images}", "--batch-size", 64).fit_queue(asked, **values) == size
    text = capsys.readouterr().out
    assert text.startswith(said) and bool(text) == bool(said)


@pytest.mark.parametrize(
    "batch, processes, words",
    [
        (96, 1, ""),
        (64, 2, ""),  # a group for each process: keys are shuffled between them
        (48, 1, "batch norm: groups of 24 images instead of 32"),
        (32, 1, "warning: one group of images: shuffling batch norm does nothing, and keys may leak through it"),
        (33, 1, "batch norm: groups of 16 images instead of 32"),
    ],
)
def test_groups_are_named(batch, processes, words, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(common, "start_processes", lambda: (0, processes, torch.device("cpu")))
    start(tmp_path, "--data", "scenes:1000000", "--batch-size", batch).fit_queue(64)
    assert capsys.readouterr().out.strip() == words


def test_what_processes_cannot_share_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "all_gather", lambda x: torch.cat([x, x + 1]))
    with pytest.raises(UserError, match="the processes see different images or checkpoints"):
        train(tmp_path)
    monkeypatch.setattr(common, "start_processes", lambda: (0, 4, torch.device("cpu")))
    for batch, words in ((6, "is not divisible by 4 processes"), (4, "leaves one image for each process")):
        with pytest.raises(UserError, match=f"--batch-size {batch} {words}"):
            start(tmp_path / "a", "--batch-size", batch)
    assert not (tmp_path / "a").exists() and start(tmp_path / "a", "--batch-size", 8).share == 2


@pytest.mark.parametrize("rank, who", [(None, "script.py"), ("3", "script.py (process 3)")])
def test_errors_of_users_and_full_disks_are_one_line(rank, who, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["folder/script.py"])
    if rank:
        monkeypatch.setenv("RANK", rank)
    full = OSError(errno.ENOSPC, "full", "log.jsonl")
    for error, words in ((full, "no space left to write log.jsonl: "), (UserError("mend it"), "mend it\n")):
        with pytest.raises(SystemExit) as exit:
            runs.main(mock.Mock(side_effect=error))
        assert exit.value.code == 2 and capsys.readouterr().err.startswith(f"{who}: error: {words}")
    for error in (OSError(errno.EACCES, "no"), RuntimeError("a bug")):
        with pytest.raises(type(error)):
            runs.main(mock.Mock(side_effect=error))


def test_bf16_is_fast_where_the_processor_has_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for found, fast in (({}, 0), ({"amx_bf16": True}, 1), ({"avx512_bf16": True, "amx_bf16": False}, 1)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=found: found, raising=False)
        assert runs.bf16_is_fast() is bool(fast)


# ---- fine-tuning


def parsed(line, folder="runs"):
    """Settings of a script with two tasks, and the run that they belong to."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--task", choices=("voc", "scenes"))
    parser.add_argument("--test-side", type=int)
    finetune.run_flags(parser, "transfer_x", "detector")
    presets = {"voc": dict(iterations=9, lr=0.5, test_side=800), "scenes": dict(iterations=3, lr=0.1, test_side=64)}
    words = [*line.split(), f"--output-dir={folder}"]
    return finetune.parse(parser, words, "transfer_x", lambda args: presets[args.task], free=("test_side",))


def test_settings_of_fine_tuning_are_the_tasks_the_given_or_those_of_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "bf16_is_fast", lambda: True)
    args, trained = parsed("--task voc --lr 0.2")
    assert (args.iterations, args.lr, args.test_side, args.arch, args.amp) == (9, 0.2, 800, "resnet50", "none")
    assert trained is None
    args, _ = parsed("--demo --arch resnet34")
    assert (args.task, args.iterations, args.arch, args.amp) == ("scenes", 3, "resnet34", "bf16")
    run, _ = parsed("--task voc --iterations 5 --seed 3 --workers 7 --trials 2", tmp_path)
    settings = {"task": "voc", "iterations": 5, "lr": 0.5, "seed": 3, "test_side": 800, "processes": 4}
    torch.save({"script": "transfer_x", "args": vars(run), "settings": settings}, tmp_path / "checkpoint.pth")
    args, trained = parsed("--eval-only --workers 1", tmp_path)
    assert (args.task, args.iterations, args.seed, args.workers, args.trials) == ("voc", 5, 3, 1, 1)
    assert args.eval_only and trained["settings"] == settings
    assert parsed("--predict photos --test-side 96", tmp_path)[0].test_side == 96
    with pytest.raises(UserError, match="--lr 0.25: the model in .* was trained with 0.5"):
        parsed("--eval-only --lr 0.25", tmp_path)
    torch.save({"script": "setsim"}, tmp_path / "checkpoint.pth")
    for folder, words in ((tmp_path, "not a checkpoint of transfer_x.py"), ("no", "want the --output-dir of a run")):
        with pytest.raises(UserError, match=words):
            parsed("--eval-only", folder)


def test_scenes_and_the_linear_rule():
    for text, count, tests in ((None, 512, 128), ("scenes", 512, 128), ("scenes:20", 20, 8), ("scenes:40", 40, 10)):
        assert finetune.scene_range(text, "train") == (0, count) and finetune.scene_range(text, "val") == (count, tests)
    with pytest.raises(UserError, match="--data photos: --task scenes wants 'scenes' or 'scenes:COUNT'"):
        finetune.scene_range("photos", "train")
    for batch, iterations, *wanted in ((16, 90, 90, 0.02), (4, 90, 360, 0.005), (32, 3, 2, 0.04), (64, 1, 1, 0.08)):
        args = argparse.Namespace(batch_size=batch, iterations=iterations, lr=0.02)
        assert finetune.linear_rule(args, {"batch_size": 16}) == pytest.approx(tuple(wanted))


def test_trials_are_averaged_and_end_where_one_does(tmp_path, capsys):
    def trial(args):
        seen.append((args.seed, args.output_dir))
        return {"protocol": "VOC", "AP": {4: 50.0, 5: 51.0, 6: 54.0}[args.seed]} if args.seed < 7 else None

    def run(**more):
        finetune.run_trials(
            argparse.Namespace(**args | more), trial, lambda result: {"AP": result["AP"], "twice": 2 * result["AP"]}
        )
        return [json.loads(line)["AP"] for line in (tmp_path / "results.jsonl").read_text().splitlines()]

    seen, args = [], dict(seed=4, trials=3, output_dir=str(tmp_path), weights="W")
    assert run() == [50, 51, 54] and seen == [(seed, f"{tmp_path}/seed{seed}") for seed in (4, 5, 6)]
    assert capsys.readouterr().out == "VOC; weights W; 3 trials: AP 51.67 +- 2.08; twice 103.33 +- 4.16\n"
    assert run(seed=6) == [54] and [seed for seed, _ in seen[3:]] == [6, 7]  # the second one is stopped
    assert run(trials=1) == [50] and seen[-1] == (4, str(tmp_path)) and capsys.readouterr().out == ""


@pytest.mark.parametrize("workers", [0, 1])
def test_each_process_tests_its_share(workers, monkeypatch, capsys):
    """Each of 250 images once; unreadable ones are named and left out, more than 1 % are refused."""

    def prepare(index):
        if index in broken:
            raise OSError("torn")
        return index**2

    def share(rank):
        monkeypatch.setattr(common, "rank", lambda: rank)
        images = mock.MagicMock(__len__=lambda _: 250)
        images.name = "image {}".format
        return dict(finetune.share_of(images, prepare, workers))

    broken = {7, 9}
    monkeypatch.setattr(common, "processes", lambda: 3)
    assert share(0) | share(1) | share(2) == {i: i**2 for i in range(250) if i not in broken}
    text = capsys.readouterr().out
    assert all(text.count(f"cannot be read, left out: image {i} (torn)") == 1 for i in broken)
    broken |= {0, 3}
    with pytest.raises(UserError, match=r"3 of 250 test images cannot be read \(more than 1 %\)"):
        share(0)


# ---- what a method sees


def literal_correspondence(similarity, window_q, window_k, H, W):
    """Cell by cell, as one says it: hits, chance, count."""
    hits, chance, count = 0, 0.0, 0
    for b in range(len(similarity)):
        (qx0, qy0, qx1, qy1), (kx0, ky0, kx1, ky1) = window_q[b].tolist(), window_k[b].tolist()
        for i in range(H * W):
            x = qx0 + (i % W + 0.5) / W * (qx1 - qx0)  # the centre of a query cell, in the image
            y = qy0 + (i // W + 0.5) / H * (qy1 - qy0)
            if min(kx0, kx1) < x < max(kx0, kx1) and min(ky0, ky1) < y < max(ky0, ky1):
                column, row = (x - kx0) / (kx1 - kx0) * W - 0.5, (y - ky0) / (ky1 - ky0) * H - 0.5  # in the key's cells
                near = [abs(column - j % W) < 1.001 and abs(row - j // W) < 1.001 for j in range(H * W)]
                hits += near[max(range(H * W), key=similarity[b, i].tolist().__getitem__)]
                chance, count = chance + sum(near) / (H * W), count + 1
    return hits, pytest.approx(chance, rel=1e-5), count


def test_correspondence_against_a_double_loop():
    rng, H, W = torch.Generator().manual_seed(0), 3, 4
    corner = torch.rand(2, 24, 2, generator=rng) * 0.4
    windows = torch.cat([corner, corner + 0.2 + 0.4 * torch.rand(2, 24, 2, generator=rng)], 2)
    windows[0, 8:16] = windows[0, 8:16][:, [2, 1, 0, 3]]  # flipped query views
    windows[1, 12:20] = windows[1, 12:20][:, [2, 1, 0, 3]]  # flipped key views
    similarity = torch.randn(24, H * W, H * W, generator=rng)
    for part in (slice(0, 8), slice(8, 12), slice(12, 16), slice(16, 20), slice(0, 24)):
        case = similarity[part], windows[0, part], windows[1, part], H, W
        hits, chance, count = look.correspondence(*case)
        assert (hits, chance, count) == literal_correspondence(*case)
        assert 0 < hits < count < len(similarity[part]) * H * W  # each outcome occurs


@pytest.mark.parametrize("flipped", [False, True])
def test_correspondence_allows_one_cell(flipped):
    """Both views show the same window, so the true place of a query cell is the same cell, or its mirror image."""
    H, W, window_q = 3, 5, torch.tensor([[0.1, 0.2, 0.6, 0.9]])
    window_k = window_q[:, [2, 1, 0, 3]] if flipped else window_q
    column, row = torch.arange(H * W) % W, torch.arange(H * W) // W
    column = W - 1 - column if flipped else column
    for right, down, hits in ((0, 0, 15), (1, 0, 15), (-1, 1, 15), (0, -1, 15), (2, 0, 6), (0, 2, 10), (2, 2, 4)):
        found = (row + down).clamp(0, H - 1) * W + (column + right).clamp(0, W - 1)
        got = look.correspondence(F.one_hot(found)[None].float(), window_q, window_k, H, W)
        assert got == (hits, pytest.approx(7 * 13 / 15), 15)
    apart = torch.tensor([[0.0, 0.0, 0.4, 1.0]]), torch.tensor([[0.5, 0.0, 1.0, 1.0]])
    assert look.correspondence(torch.rand(1, 16, 16), *apart, 4, 4) == (0, 0, 0)


def test_found_again_against_a_loop():
    rng = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 5, 4, 6, generator=rng)
    teacher[:3] = student[:3] + 0.3 * teacher[:3]
    known = torch.arange(4) < torch.tensor([4, 3, 1, 2, 0])[:, None]
    known[4] = torch.tensor([False, True, False, True])
    teacher[1, 3] = teacher[3, 2] = student[1, 0]  # a repeated box is no object, however similar
    hits = 0
    for b in range(5):
        places = known[b].nonzero()[:, 0].tolist()
        for k in places:
            hits += k == max(places, key=lambda j: F.cosine_similarity(student[b, k], teacher[b, j], dim=0).item())
    got = look.found_again(student * 3, teacher * torch.rand(5, 4, 1, generator=rng), known)
    assert got == (hits, pytest.approx(5), 12) and 8 <= hits < 12  # a guess finds one region of each image
    assert look.found_again(student, teacher, known & False) == (0, 0, 0)


def test_heat_is_dark_blue_at_the_lowest_and_yellow_at_the_highest():
    blue, middle, yellow = (0, 0, 127), (127, 102, 63), (255, 204, 0)
    picture = np.asarray(look.heat(torch.tensor([[-3.0, 1.0, 5.0], [5.0, -3.0, 1.0]]), (6, 2)))  # width, height
    assert np.array_equal(picture[:, ::2], [[blue, middle, yellow], [yellow, blue, middle]])
    assert np.array_equal(picture[:, 1::2], picture[:, ::2])
    assert look.heat(torch.full((2, 2), 7.0), (2, 2)).getcolors() == [(4, blue)]  # no contrast
    assert look.heat(torch.tensor([[float("nan"), 1.0, 2.0]]), (3, 1)).getpixel((0, 0)) == blue


# ---- progress and pictures


def test_progress_without_a_terminal_is_a_line_every_ten_seconds(monkeypatch, capsys):
    clock = iter(range(0, 1000, 6))  # seconds; twice looked at in each line, once without
    monkeypatch.setattr(pictures.time, "time", lambda: next(clock))
    assert list(pictures.progress("abcdef", 8, 2, what="letters")) == list("abcdef")
    assert capsys.readouterr().out.splitlines()[0] == "4/8 letters, 0.1 a second, eta 0:00:48"
    assert list(pictures.progress([1, 3, 0], 4, what="MB", size=lambda item: item)) == [1, 3, 0]
    assert capsys.readouterr().out.startswith("4/4 MB, 0.2 a second, eta 0:00:")


def test_curves_have_panels_by_the_names_of_the_values(tmp_path, monkeypatch):
    figures, lines = [], [{"command": "x", "settings": {"lr": 5}}, {"step": 0, "probe": {"hits": 0.5}}]
    monkeypatch.setattr(pictures, "save_figure", lambda figure, path, dpi: figures.append((figure, path)))
    for step in (1, 2, 3):
        values = {"loss": 3 - step, "loss_image": 1, "loss_chance": 6, "std_image": 0.1, "std_spread": 0.2, "lr": 0.5}
        values |= (
            {"rows": 4, "positives_p4": 2, "empty": 0.25, "stuck": 0, "shift": 7} if step > 1 else {}
        )  # logged later
        timing = {"epoch": step / 2, "images_per_s": 9, "data_share": 0, "bad_images": 0}
        lines.append({"step": step, **values, **timing, "note": "text"})
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    pictures.draw_curves(tmp_path)
    ((figure, path),) = figures
    panels = {axis.get_title(): {line.get_label(): line for line in axis.get_lines()} for axis in figure.axes}
    pictures.pyplot().close(figure)
    assert path == str(tmp_path / "curves.png") and {title: set(names) for title, names in panels.items()} == {
        "losses": {"loss", "loss_image", "loss_chance"},
        "std of unit embeddings (collapse: 0)": {"std_image", "std_spread"},
        "learning rate": {"lr"},
        "counts": {"rows", "positives_p4"},
        "shares of images or windows": {"empty", "stuck"},
        "shift (pixels)": {"shift"},
    }
    curves = {name: line for names in panels.values() for name, line in names.items()}
    assert {name for name, line in curves.items() if line.get_linestyle() == "--"} == {"loss_chance", "std_spread"}
    for name, x, y in (("loss", [1, 2, 3], [2, 1, 0]), ("rows", [2, 3], [4, 4])):
        assert (list(curves[name].get_xdata()), list(curves[name].get_ydata())) == (x, y)


def test_curves_without_values_or_matplotlib_and_torn_logs(tmp_path, monkeypatch, capsys):
    log = tmp_path / "log.jsonl"
    assert pictures.read_log(log) == []
    for text, drawn in (
        ('{"command": "x"}\n{"step": 0, "probe": {}}\n', False),
        ('{"step": 1, "loss": 2.0}\n{"step": 2, "lo', True),
    ):
        log.write_text(text)
        pictures.draw_curves(tmp_path)
        assert (tmp_path / "curves.png").exists() == drawn
    assert pictures.read_log(log) == [{"step": 1, "loss": 2}] and Image.open(tmp_path / "curves.png").size[0] > 300
    os.remove(tmp_path / "curves.png")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match="pip install matplotlib"):
        pictures.pyplot()
    pictures.draw_curves(tmp_path)
    assert "matplotlib is not installed" in capsys.readouterr().out and os.listdir(tmp_path) == ["log.jsonl"]
