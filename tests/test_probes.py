# SPDX-License-Identifier: MIT
"""probes/: linear evaluation, object k-NN, coupling rate and positional bias."""

import json
import math
import os
import shutil
import signal
import sys
from types import SimpleNamespace

import helpers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from helpers import LargestTensor, assert_same, checkpoint, log_lines, signals_given_back
from PIL import Image, ImageOps
from tiny import TinyResNet
from torch import nn
from torchvision import transforms
from torchvision.transforms.functional import pil_to_tensor

import common
from common import UserError
from harness.images import BadImages, Scenes
from probes import bias, frozen, linear, oknn

pytestmark = pytest.mark.usefixtures("tiny_resnet", "quick")
COLOURS, CPU = [(200, 40, 40), (40, 180, 60), (50, 60, 210)], torch.device("cpu")
TINY = "--arch resnet18 --size 32 --batch-size 8 --lr .2 --epochs 3 --print-freq 1 --workers 0 --weights random".split()


def noisy(colour, size, rng):
    """A picture of one colour with a little noise."""
    return Image.fromarray((colour + rng.integers(-25, 26, (*size[::-1], 3))).clip(0, 255).astype(np.uint8))


def results_of(folder):
    return json.loads((folder / "results.json").read_text())


def random_images(*shape):
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    """DATA with 10 + 7 images in each of three classes that differ in colour, one class in subfolders, one called train."""
    root, rng = tmp_path_factory.mktemp("classes"), np.random.default_rng(0)
    for split, count in (("train", 10), ("val", 7)):
        for name, colour in zip(("a", "b/deep", "train"), COLOURS, strict=True):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                noisy(colour, (48, 40), rng).save(root / split / name / f"{i}.png")
    return root


def probe(data, out, *flags):
    linear.job(["--data", str(data), "--output-dir", str(out), *TINY, *map(str, flags)])
    return results_of(out)


@pytest.fixture(scope="module")
def finished(classes, tmp_path_factory):
    """A run of 9 steps (3 epochs of 3), never interrupted."""
    with signals_given_back(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torchvision.models, "resnet18", TinyResNet)
        probe(classes, folder := tmp_path_factory.mktemp("linear"))
    return folder


def test_linear_probe_on_separable_features_reaches_100_percent(finished):
    results, (header, *lines), (group,) = (
        results_of(finished),
        log_lines(finished),
        checkpoint(finished)["optimizer"]["param_groups"],
    )
    assert (results["top1"], results["top5"], results["images"], results["best_top1"]) == (100, 100, 21, 100)
    evaluations = [line["result"] for line in lines if "result" in line]
    assert evaluations == results["evaluations"] and results["settings"] == header["settings"]
    assert results["best_epoch"] == [e["top1"] for e in evaluations].index(100) + 1 < 3
    assert [(e["epoch"], e["step"]) for e in evaluations] == [(1, 3), (2, 6), (3, 9)]
    assert (group["momentum"], group["weight_decay"], group["nesterov"]) == (0.9, 0, False)
    cosine = [(1 + math.cos(math.pi * epoch / 3)) / 2 for epoch in range(3) for _ in range(3)]
    assert [32 / 0.2 * line["lr"] for line in lines if "loss" in line] == pytest.approx(cosine)  # 8 of 256 images


def test_linear_results_are_those_of_the_exported_classifier(classes, tmp_path):
    """fc.pth on torchvision's own ResNet and transforms, image by image; after one step, not yet perfect."""
    probe(classes, tmp_path, "--steps", 0)
    weight, bias_ = torch.load(tmp_path / "fc.pth").values()
    assert weight.shape == (3, 128) and 0.009 < weight.std() < 0.011 and abs(weight.mean()) < 0.002 and not bias_.any()
    results = probe(classes, tmp_path, "--steps", 1)
    network = torchvision.models.resnet18()
    network.fc = nn.Linear(128, 3)
    trunk = frozen.frozen_trunk("random", "resnet18", 0, CPU).state_dict()
    network.eval().load_state_dict(trunk | torch.load(tmp_path / "fc.pth"))
    normalise = transforms.Normalize(common.PIXEL_MEAN, common.PIXEL_STD)
    cut = transforms.Compose([transforms.Resize(37), transforms.CenterCrop(32), transforms.ToTensor(), normalise])
    files = [(k, f"{name}/{i}.png") for k, name in enumerate(("a", "b/deep", "train")) for i in range(7)]
    right = [network(cut(Image.open(classes / "val" / file))[None]).argmax() == k for k, file in files]
    assert results["top1"] == pytest.approx(100 * np.mean(right)) and 0 < results["top1"] < 100
    assert results["epoch"] == pytest.approx(1 / 3)


def test_linear_schedules():
    """Values of the papers: 90 epochs of cosine; MoCo's 100 epochs with steps at 60 and 80."""
    for preset, epochs, rates in (
        ("setsim", 90, {0: 30, 45: 15, 60: 7.5}), ("moco", 100, {0: 30, 59: 30, 60: 3, 79: 3, 80: 0.3, 99: 0.3}),
    ):  # fmt: skip
        args = linear.get_args(f"--data x --weights random --preset {preset}".split())
        assert (args.epochs, args.lr, args.batch_size, args.size) == (epochs, 30, 256, 224)
        assert {e: linear.learning_rate(preset, 30, e, epochs) for e in rates} == pytest.approx(rates)


def test_linear_counts_what_is_right(monkeypatch, capsys):
    """Top-1 and top-5 of seven classes against a loop; what stands in for an unreadable image is not counted."""
    rng = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(50, 7, generator=rng), torch.randint(7, (50,), generator=rng)
    rows = logits, labels, torch.arange(50), (torch.arange(50) == 20).long()
    monkeypatch.setattr(linear, "features", lambda trunk, x, amp: x)
    monkeypatch.setattr(linear, "agree", lambda *numbers: [3 * n for n in numbers])  # two more processes find the same
    run = SimpleNamespace(rank=0, device=CPU, args=SimpleNamespace(amp="none"), signalled=0)
    bad = BadImages(Scenes(50, 64, 0), outcome="it is left out")
    found = linear.evaluate(run, None, nn.Identity(), list(zip(*(x.split(8) for x in rows), strict=True)), bad)
    ranks = [sum(row[c] > row[label] for c in range(7)) for row, label in zip(logits, labels, strict=True)]
    wanted = {f"top{n}": 100 * sum(rank < n for i, rank in enumerate(ranks) if i != 20) / 49 for n in (1, 5)}
    assert found == {name: pytest.approx(value) for name, value in wanted.items()} | {"images": 3 * 49}
    assert 0 < found["top1"] < found["top5"] < 100
    assert capsys.readouterr().out == "unreadable image, it is left out: scene 20\n"
    with pytest.raises(UserError, match="none of the 1 test images can be read"):
        linear.evaluate(run, None, nn.Identity(), [[x[20:21] for x in rows]], BadImages(Scenes(1, 64, 0)))


@pytest.mark.parametrize("flags", [[], ["--save-every", "2"]])
def test_linear_evaluates_each_epoch_once_if_stopped(flags, classes, finished, tmp_path, monkeypatch):
    """Killed between an epoch's last step and its evaluation; a signal during this evaluation, and during the last one."""
    evaluate, steps = linear.evaluate, []

    def stopped(run, *rest):
        steps.append(run.step)
        if len(steps) == 1:
            raise KeyboardInterrupt
        if len(steps) in (2, 5):
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(run, *rest)

    monkeypatch.setattr(linear, "evaluate", stopped)
    parts = (2 if flags else 3, KeyboardInterrupt), (3, FileNotFoundError), (9, SystemExit)
    for step, error in parts:  # the second part is saved without results.json
        with pytest.raises(error):
            probe(classes, tmp_path, *flags)
        assert checkpoint(tmp_path)["step"] == step
    assert probe(classes, tmp_path, *flags)["evaluations"] == results_of(finished)["evaluations"]
    assert steps == [3, 3, 3, 6, 9, 9]
    assert_same(*([checkpoint(folder)[name] for name in ("model", "optimizer")] for folder in (tmp_path, finished)))


def test_linear_learns_on_frozen_features_in_the_precision_asked_for(classes, finished, tmp_path, monkeypatch):
    """Autocast is of the backbone alone; it stays in eval mode, and one that moves, or another one, is noticed."""
    x, seen, real, path = random_images(4, 3, 64, 64), [], linear.features, tmp_path / "weights.pth"
    trunk, other = (frozen.frozen_trunk("random", "resnet18", seed, CPU) for seed in (0, 1))
    assert real(trunk, x, "bf16").dtype == torch.float32 and not torch.equal(real(trunk, x), real(trunk, x, "bf16"))
    torch.save(trunk.state_dict(), path)
    probe(classes, finished, "--weights", path)  # the same ones
    torch.save(other.state_dict(), path)
    with pytest.raises(UserError, match="had other settings .weights 'sha256 "):
        probe(classes, finished, "--weights", path)
    monkeypatch.setattr(linear, "features", lambda t, x, amp: seen.append((t.training, amp)) or real(t, x, amp))
    probe(classes, tmp_path / "bf16", "--amp", "bf16", "--steps", 2)
    assert seen == [(False, "bf16")] * (2 + 3)  # two steps, three batches of test images
    for name, move in {"norms": nn.Module.train, "weights": lambda trunk: trunk.conv1.weight.mul_(1.001)}.items():
        monkeypatch.setattr(linear, "features", lambda trunk, *x, move=move: (move(trunk), real(trunk, *x))[1])
        with pytest.raises(RuntimeError, match="frozen backbone has changed"):
            probe(classes, tmp_path / name, "--steps", 3)


def test_linear_crops_are_drawn_from_seed_epoch_and_index_alone(classes, tmp_path):
    """The label is that of the image that is shown."""
    images = linear.ClassFolder(str(classes / "train"))
    assert images.classes == ["a", "b", "train"] and images.labels.tolist() == [0] * 10 + [1] * 10 + [2] * 10
    assert images.name(12) == os.path.join("b", "deep", "2.png")
    draws = [(0, 0, 3), (0, 0, 3), (0, 1, 3), (1, 0, 3), (0, 0, 4)]  # seed, epoch, index
    x, again, *others = (linear.Crops(images, 32, seed, True)[epoch, index][0] for seed, epoch, index in draws)
    assert x.shape == (3, 32, 32) and torch.equal(x, again) and not any(torch.equal(x, other) for other in others)
    shutil.copytree(classes / "train", tmp_path, dirs_exist_ok=True)
    (tmp_path / "a" / "9.png").write_bytes(b"broken")  # the last of its class: the next one is of class b
    assert linear.Crops(linear.ClassFolder(str(tmp_path)), 32, 0, False)[0, 9][1:] == (1, 9, 1)


def test_linear_crops_cover_what_the_protocol_says(tmp_path):
    """Shares of the area from 0.08 to 1, half of them flipped; the middle 7/8 when testing."""
    (tmp_path / "a").mkdir()
    helpers.coordinate_image(256, 256).save(tmp_path / "a" / "0.png")
    images = linear.ClassFolder(str(tmp_path))
    x = torch.stack([linear.Crops(images, 64, 0, True)[epoch, 0][0] for epoch in range(300)]).float()
    width, height = (x[:, 0, :, -1] - x[:, 0, :, 0]).mean(1), (x[:, 1, -1] - x[:, 1, 0]).mean(1)
    shares = width.abs() * height / 256**2 * (64 / 63) ** 2
    assert 0.06 < shares.min() < 0.14 and 0.9 < shares.max() < 1.02 and 0.45 < shares.mean() < 0.6
    x = linear.Crops(images, 224, 0, False)[7, 0][0]
    assert 0.4 < (width < 0).float().mean() < 0.6 and x[:2, 0, 0].tolist() == [16, 16] and x[0, 9, -1] == 239


def write_coco(root, split, count, rng, extra=()):
    """`count` images of three squares of different colours on noise; category ids 3, 7 and 40 by colour."""
    (root / split).mkdir(parents=True)
    (root / "annotations").mkdir(exist_ok=True)
    images, rows, categories = [], list(extra), [{"id": i, "name": str(i)} for i in (40, 3, 7)]
    for i in range(count):
        width, height = [(96, 72), (72, 96), (80, 80)][i % 3]
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
        for j, k in enumerate(rng.permutation(3).tolist()):
            x, y, w, h = 2 + width // 3 * j, int(rng.integers(2, 30)), 22, 38
            image.paste(noisy(COLOURS[k], (w, h), rng), (x, y))
            upper = [[x, y, x + w, y, x + w, y + h / 2, x, y + h / 2]]  # the outline is the upper half of the box
            rows.append({"image_id": 10 * i, "category_id": [3, 7, 40][k], "bbox": [x, y, w, h], "segmentation": upper})
        image.save(root / split / f"{i:03}.png")
        images.append({"id": 10 * i, "file_name": f"{i:03}.png", "width": width, "height": height})
    content = {"images": images[::-1], "annotations": rows, "categories": categories}
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp("coco"), np.random.default_rng(0)
    boxes = [[0, 0, 2, 60], [90, 50, 30, 30], [100, 5, 9, 5], [10, 5, 0, 5]]  # thin, cut, beside the image, empty
    rows = [{"image_id": 0, "category_id": 7, "iscrowd": 0, "bbox": box, "segmentation": []} for box in boxes]
    counts = {"size": [72, 96], "counts": [30 * 72 + 10, *[10, 62] * 19, 10, 46 * 72 + 52]}  # run lengths
    write_coco(root, "train2017", 14, rng, [*rows, rows[0] | {"iscrowd": 1, "segmentation": counts}])
    write_coco(root, "val2017", 9, rng, [rows[0] | {"category_id": 3, "bbox": [80, 40, 11, 30]}])
    write_coco(root, "two", 2, rng, [rows[0] | {"segmentation": counts}])
    return root


def test_coco_objects(coco):
    """Crowds and empty boxes are out, boxes end at the image, outlines are decoded, images sorted by id."""
    objects = frozen.CocoObjects(str(coco), "train2017", masks=True)
    assert len(objects) == 14 and [objects.name(i) for i in (0, 13)] == ["000.png", "013.png"]
    _, boxes, labels, mask = objects[0]
    assert boxes[:2].tolist() == [[0, 0, 2, 60], [90, 50, 96, 72]] and len(boxes) == 5 and labels[0] == 2
    image, boxes, labels, outline = objects[5]
    for row, (x0, y0, x1, y1) in enumerate(boxes.int().tolist()):  # of this image, not of another
        wanted = np.zeros((80, 80), bool)
        wanted[y0 : (y0 + y1) // 2, x0:x1] = True
        assert (outline(row) == wanted).mean() > 0.99 and image.getpixel((x0 + 5, y0 + 5))[labels[row] - 1] > 150
    wanted = np.zeros((72, 96), bool)
    wanted[10:20, 30:50] = True
    assert (frozen.CocoObjects(str(coco), "two", masks=True)[0][3](0) == wanted).all() and mask(0) is None
    assert frozen.CocoObjects(str(coco), "two")[0][3](1) is None  # outlines of train2017 would take gigabytes


def test_images_that_do_not_fit_their_annotations(coco, tmp_path, capsys):
    """One is an unreadable image, which is named and left out. All of them: these are other images."""
    shutil.copytree(coco, tmp_path, dirs_exist_ok=True)
    files = sorted((tmp_path / "val2017").iterdir())
    Image.new("RGB", (50, 50)).save(files[4])
    assert object_knn(tmp_path, tmp_path / "out")["queries"] == 28 - 3
    assert "unreadable image, it is left out: 004.png" in capsys.readouterr().out
    for file in files:
        Image.new("RGB", (50, 50)).save(file)
    with pytest.raises(UserError, match=r"000.png is \(50, 50\), annotated are 96 x 72 .* give the images that"):
        frozen.CocoObjects(str(tmp_path), "val2017")


def nearest(queries, bank, labels, k, part=99):
    """oknn.nearest of a bank that comes in parts."""
    best = queries.new_full((len(queries), k), -torch.inf), torch.zeros(len(queries), k, dtype=torch.int64)
    for z, c in zip(bank.split(part), labels.split(part), strict=True):
        best = oknn.nearest(queries, z, c, best, rows=10)
    return best


@pytest.mark.parametrize("k, tau, part", [(1, 0.07, 50), (20, 0.07, 7), (5, 1.0, 13), (80, 0.3, 50)])
def test_knn_against_a_loop(k, tau, part):
    """Also more neighbours than the bank has, and a bank that comes in uneven parts. Classes without a vote are left out."""
    rngs = {n: torch.Generator().manual_seed(n) for n in (50, 23)}
    bank, queries = (F.normalize(torch.randn(n, 6, generator=rng, dtype=torch.float64)) for n, rng in rngs.items())
    labels, truth = (torch.randint(9, (n,), generator=rng) for n, rng in rngs.items())
    scores, rankings = oknn.vote(*nearest(queries, bank, labels, k, part), 9, tau), []
    for cosines, row in zip((queries @ bank.T).tolist(), scores, strict=True):
        votes = {}
        for cosine, label in sorted(zip(cosines, labels.tolist(), strict=True))[::-1][:k]:
            votes[label] = votes.get(label, 0) + math.exp(cosine / tau)
        rankings.append(sorted(votes, key=lambda c: -votes[c]))
        assert row.argsort(descending=True)[: (row > 0).sum()].tolist() == rankings[-1]
    for n in (1, 5):
        hits = [c in ranking[:n] for c, ranking in zip(truth.tolist(), rankings, strict=True)]
        assert oknn.top(scores, truth, n).tolist() == hits and 0 < sum(hits) < 23


def test_knn_on_features_with_a_known_answer():
    """Neighbours at cosines 0.9, 0.8, 0.8 of classes 0, 1, 1: class 1 wins iff 2 exp(0.8/tau) > exp(0.9/tau)."""
    cosines, labels = torch.tensor([0.9, 0.8, 0.8, 0.1]), torch.tensor([0, 1, 1, 2])
    best = nearest(torch.tensor([[1.0, 0.0]]), torch.stack([cosines, (1 - cosines**2).sqrt()], 1), labels, 3)
    for tau, winner in ((0.1 / math.log(2) * 1.01, 1), (0.1 / math.log(2) * 0.99, 0)):
        scores = oknn.vote(*best, 5, tau)
        assert scores[0].tolist() == pytest.approx([1, 2 * math.exp(-0.1 / tau), 0, 0, 0], abs=1e-5)
        assert scores.argmax() == winner and oknn.top(scores, torch.tensor([winner]), 1)
        assert not oknn.top(scores, torch.tensor([2]), 5)  # five classes, but no vote: no lucky hit
    assert not oknn.top(torch.tensor([[0.5, 0.5]]), torch.tensor([0]), 1)  # a tie


def test_variants(coco):
    """Short side, boxes that move along and stay as they are, N objects, small ones left out, drawn from the seed."""
    objects = frozen.CocoObjects(str(coco), "train2017")
    x, boxes, labels, *rest = oknn.Variants(objects, 150, 2, True, 0, "bank")[4]
    assert x.shape == (2, 3, 200, 150) and boxes.shape == (2, 4) and rest == [4, True]
    rows = torch.cdist(boxes, objects[4][1] * 150 / 72).argmin(1)
    assert torch.allclose(boxes, objects[4][1][rows] * 150 / 72) and torch.equal(labels, objects[4][2][rows])
    touched = lambda x, y: any(x + 1 > a and x < c and y + 1 > b and y < d for a, b, c, d in boxes.tolist())  # noqa: E731
    changed, inside = (x[0] != x[1]).any(0), torch.tensor([[touched(x, y) for x in range(150)] for y in range(200)])
    assert not changed[inside].any() and changed[~inside].float().mean() > 0.9
    for seed in (0, 1):
        assert torch.equal(oknn.Variants(objects, 150, 2, True, seed, "bank")[4][0], x) == (seed == 0)
    x, _, labels, *_ = oknn.Variants(objects, 144, None, False, 0, "bank")[0]
    assert len(x) == 1 and len(labels) == 4  # the box of 2 x 60 is 4 pixels wide
    assert len({oknn.Variants(objects, 144, 1, False, seed, "bank")[4][2].item() for seed in range(20)}) == 3


def test_the_other_image_is_drawn_and_never_the_image_itself(coco, tmp_path):
    """Also where the one that was drawn cannot be read. Where none can be, there are no objects."""
    shutil.copytree(coco, tmp_path, dirs_exist_ok=True)
    for file in ("val2017/000.png", "two/001.png"):
        (tmp_path / file).write_bytes(b"broken")
    objects, seen = frozen.CocoObjects(str(tmp_path), "val2017"), set()
    for seed in range(40):
        x = oknn.Variants(objects, 64, None, True, seed, "queries")[1][0]
        others = [ImageOps.fit(objects[i][0], x.shape[:1:-1], Image.Resampling.BILINEAR) for i in range(1, 9)]
        same = [(x[1] == pil_to_tensor(other)).all(0).float().mean().item() for other in others]
        seen.add(1 + same.index(max(same)))
        assert 0.2 < max(same) < 1
    assert seen == {2, 3, 4, 5, 6, 7, 8}
    alone = oknn.Variants(frozen.CocoObjects(str(tmp_path), "two"), 64, None, True, 0, "queries")
    assert [(len(boxes), read) for _, boxes, _, _, read in (alone[0], alone[1])] == [(0, True), (0, False)]


MIX = torch.randn(8, 3, 1, 1, generator=torch.Generator().manual_seed(0))


def blocks(x, stages=4):
    """A trunk whose cells see their own pixels alone: colours averaged over squares of the stride, then mixed."""
    return [F.conv2d(F.avg_pool2d(x, stride), MIX).relu() for stride in (4, 8, 16, 32)[:stages]]


@torch.no_grad()
def test_object_features():
    """A box on whole cells gives their mean. C4 of a whole image gives what the network does."""
    x = random_images(2, 3, 224, 256)
    z = oknn.object_features(blocks, x, torch.tensor([[0.0, 0, 224, 224], [32, 0, 256, 224]]), "c5")
    C5 = blocks(common.normalise(x))[3]  # (2, 8, 7, 8)
    wanted = torch.stack([C5[:, :, :, :7].mean((2, 3)), C5[:, :, :, 1:].mean((2, 3))], 1)
    torch.testing.assert_close(z, F.normalize(wanted, dim=2))
    trunk, x = frozen.frozen_trunk("random", "resnet18", 0, CPU), x[:, :, :, :224]
    z, C5 = oknn.object_features(trunk, x, torch.tensor([[0.0, 0, 224, 224]]), "c4"), trunk(common.normalise(x))[3]
    torch.testing.assert_close(z[:, 0], F.normalize(C5.mean((2, 3)), dim=1), rtol=1e-3, atol=1e-5)
    # PAPER: 7 x 7. The mean of a parabola over seven samples, between cells interpolated, is not that over six.
    maps = torch.stack([torch.ones(14, 14), torch.arange(14.0).expand(14, 14) ** 2])[None]
    box = torch.tensor([[64.0, 64, 256, 256]])  # cells 2 to 8; cell i has its middle at i + 0.5
    z = oknn.object_features(lambda x: [maps] * 4, random_images(1, 3, 448, 448), box, "c5")[0, 0]
    wanted = np.interp([2 + 6 * (i + 0.5) / 7 - 0.5 for i in range(7)], np.arange(14), np.arange(14) ** 2).mean()
    assert (z[1] / z[0]).item() == pytest.approx(wanted, rel=1e-4)


def object_knn(data, out, *flags):
    shutil.rmtree(out, ignore_errors=True)  # of other settings
    small = "--arch resnet18 --weights random --size 96 --neighbours 5 --workers 0".split()
    oknn.job(["--data", str(data), "--output-dir", str(out), *small, *flags])
    return {k: v for k, v in results_of(out).items() if k not in ("command", "settings")}


def test_oknn_is_reproducible(coco, tmp_path, monkeypatch):
    """Same seed, same numbers, whatever workers and parts; another seed, other objects. k and tau as given."""
    found, seen, vote, two = object_knn(coco, tmp_path / "out"), [], oknn.vote, ["--objects", "2"]
    assert found["queries"] == 28 and found["bank"] == 14 * 3 + 1
    assert found["majority"] == pytest.approx(100 * 9 / 28)  # of the bank's most frequent class
    fewer, other = (object_knn(coco, tmp_path / "out", *two, "--seed", seed) for seed in "01")
    assert fewer["bank"] == 28 and fewer == object_knn(coco, tmp_path / "out", *two) != other
    monkeypatch.setattr(oknn, "PART", 10)
    assert object_knn(coco, tmp_path / "out", "--workers", "2") == found
    monkeypatch.setattr(oknn, "vote", lambda *args: seen.append((args[0].shape[1], args[3])) or vote(*args))
    flags = "--neighbours 3 --temperature 0.5 --features c4".split()
    assert object_knn(coco, tmp_path / "out", *flags)["O-KNN"] != found["O-KNN"] and seen == [(3, 0.5)] * 2


def test_oknn_compares_like_with_like(coco, tmp_path, monkeypatch):
    """Features that name the box's colour, moved on by one in disturbed images: right where the bank is disturbed, too."""

    def colour(trunk, x, boxes, where):
        inner = [[view[:, b + 4 : d - 4, a + 4 : c - 4] for a, b, c, d in boxes.int().tolist()] for view in x]
        rows = torch.tensor([[part.float().mean((1, 2)).argmax() for part in row] for row in inner])
        return F.one_hot((rows + torch.arange(len(x))[:, None]) % 3, 3).float()

    monkeypatch.setattr(oknn, "object_features", colour)
    monkeypatch.setattr(oknn, "SMALLEST", 16)
    for side, disturbed in (("both", 100), ("queries", 0)):
        found = object_knn(coco, tmp_path / "out", "--disturb", side)
        assert found["O-KNN"]["top1"] == 100 and found["disturbed O-KNN"]["top1"] == disturbed


def test_the_bank_is_never_held_as_a_whole(coco, tmp_path, monkeypatch):
    """No tensor is as large as its 43 objects: they come in parts of 8 to 10. No label holds a worker's file open."""
    sizes, shared, real, length = [], [], oknn.nearest, 50_000

    def features(trunk, x, boxes, where):
        shared.extend(labels.is_shared() for _, labels in sys._getframe(1).f_locals["found"])
        return torch.rand(len(x), len(boxes), length)

    monkeypatch.setattr(oknn, "object_features", features)
    monkeypatch.setattr(oknn, "nearest", lambda *args: sizes.append(len(args[1])) or real(*args))
    monkeypatch.setattr(oknn, "PART", 8)
    with LargestTensor() as largest:
        object_knn(coco, tmp_path / "out", "--val", "two", "--workers", "1")
    assert largest.elements <= 2 * 10 * length and max(sizes) <= 10 and sum(sizes) == 2 * 43 and not any(shared)


def test_scenes_of_bank_and_queries_are_different_ones():
    """And none that a network was trained on."""
    args = SimpleNamespace(data="scenes:8", seed=0)
    bank = frozen.open_objects(args, "", 64)
    queries = frozen.open_objects(args, "", 64, bank=bank)
    names = [{objects.name(i) for i in range(len(objects))} for objects in (bank, queries, Scenes(4096, 64, 0))]
    assert [len(some) for some in names] == [8, 2, 4096] and len(set().union(*names)) == 8 + 2 + 4096
    assert np.array_equal(queries[1][0], Scenes(1, 64, 0)[10**6 + 9][0]) and queries[1][3](0).shape == (64, 64)


def test_canvases():
    """Two squares side by side, and what is cut out of an image for them: a box, or what a mask leaves of it."""
    beside, alone = bias.pair_canvases(*(torch.full((3, 4, 4), value, dtype=torch.uint8) for value in (50, 90)))
    black = 2 * [[0] * 8]
    assert alone[0].tolist() == black + 4 * [[50, 50, 50, 50, 0, 0, 0, 0]] + black and (alone == alone[:1]).all()
    assert beside[2].tolist() == black + 4 * [[50, 50, 50, 50, 90, 90, 90, 90]] + black
    image, mask = helpers.coordinate_image(256, 200), np.zeros((200, 256), bool)
    wanted = image.crop((10, 20, 13, 22)).resize((6, 6), Image.Resampling.BILINEAR)
    assert torch.equal(bias.cut_out(image, (10.6, 20.5, 12.2, 22.0), None, 6), pil_to_tensor(wanted))
    mask[50:100, 64:128] = True
    patch, masked = (bias.cut_out(image, (64, 50, 128, 150), outline, 64) for outline in (None, mask))
    assert (masked[:, 34:] == 0).all() and torch.equal(masked[:, :30], patch[:, :30])


def test_pairs_are_of_two_categories_and_drawn_from_seed_and_number(coco, monkeypatch):
    objects = frozen.CocoObjects(str(coco), "val2017", masks=True)
    monkeypatch.setattr(bias, "SMALLEST", 20)
    canvases = bias.Canvases(objects, 32, 32, "box", 0)
    for i in range(12):
        beside, alone, grid = canvases[i]
        a, b = (beside[:, 16:48, x : x + 32].float().mean((1, 2)).argmax() for x in (0, 32))
        assert a != b and not alone[:, :, 32:].any() and torch.equal(alone[:, :, :32], beside[:, :, :32])
        assert torch.equal(grid, torch.cat(3 * [torch.cat(3 * [alone[:, 16:48, :32]], 1)], 2))
    for seed in (0, 1):
        assert torch.equal(bias.Canvases(objects, 32, 32, "box", seed)[7][0], canvases[7][0]) == (seed == 0)
    masked = bias.Canvases(objects, 32, 32, "mask", 0)[7][0]
    assert canvases[7][0][:, 36:48].any() and masked[:, 16:30].any()
    assert not masked[:, 36:48].any()  # the lower half of a box is outside its outline
    objects.data.label = dict.fromkeys(objects.data.label, 1)
    with pytest.raises(UserError, match="without an object of 20 pixels a side and of a second category"):
        canvases[0]


def test_measures_in_closed_form_and_against_loops():
    angle, b, line = torch.tensor([[0.3, 0.8], [1.1, 0.8]]), torch.tensor([[1.0, 0], [2, 0]]), torch.linspace(0, 0.8, 9)
    rate = bias.coupling_rate(*(3 * torch.stack([a.cos(), a.sin()], 1) for a in angle), b)
    assert rate.tolist() == pytest.approx([math.cos(0.3) / math.cos(1.1), 1])
    places = 7 * torch.stack([line.cos(), line.sin()]).view(1, 2, 3, 3)
    for maps in (places, places.repeat_interleave(2, 2).repeat_interleave(2, 3)):  # one cell a place, and four
        others = [math.cos(0.4 - 0.1 * i) for i in range(9) if i != 4]
        assert bias.mean_cosine(maps).tolist() == pytest.approx([sum(others) / 8])
    maps = torch.randn(2, 5, 12, 12, generator=torch.Generator().manual_seed(0))
    found = bias.box_features(maps, (8, 16, 24, 40), 48)  # cells 2 to 5 across, 4 to 9 down
    torch.testing.assert_close(found, sum(maps[:, :, y, x] for y in range(4, 10) for x in range(2, 6)) / 24)
    ramp = torch.stack([torch.ones(8, 8), torch.arange(8.0).expand(8, 8)])[None]
    assert bias.box_features(ramp, (8, 8, 22, 22), 32).tolist() == [pytest.approx([1, 3.25])]  # from 2 to 5.5 cells
    nan, inf = torch.nan, torch.inf
    table = [*bias.statistics(torch.tensor([[1.0, 2, nan, 4], [3, 2, inf, nan], [5, 2, inf, nan]])).values()]
    wanted = [(3, pytest.approx(2 / 3**0.5), 3), (2, 0, 3), (None, None, 0), (4, None, 1)]
    assert table == [{"mean": mean, "error": error, "count": count} for mean, error, count in wanted]


def test_borders_and_neighbours_show_in_the_measures(monkeypatch):
    """Cells that see their own pixels alone: both are 1 in all stages. Zero-padding lowers MCS, the more the fewer cells
    there are, and without a border it is 1. A neighbour moves CR, and raises it if it is added to the feature of A.
    """
    a, b = random_images(2, 3, 3, 128, 128)
    a[:, 0] //= 4  # A is less red than B
    pairs, kernel = map(bias.pair_canvases, a, b), torch.randn(8, 8, 3, 3, generator=torch.Generator().manual_seed(0))
    canvases = *(torch.stack(x) for x in zip(*pairs, strict=True)), a[..., :96, :96].repeat(1, 1, 3, 3)

    def padded(mode):
        convolve = lambda x: F.conv2d(F.pad(x, (1, 1, 1, 1), mode), kernel)  # noqa: E731
        return lambda x: [convolve(convolve(maps).relu()) for maps in blocks(x)]

    torch.testing.assert_close(torch.stack(bias.measure(blocks, *canvases)), torch.ones(2, 3, 4), rtol=0, atol=1e-6)
    rates, similarities = bias.measure(padded("constant"), *canvases)
    assert (similarities < 1 - 1e-5).all() and (similarities[:, 3] < similarities[:, 0]).all()
    assert ((rates - 1).abs() > 1e-5).all() and ((rates[:, 3] - 1).abs() > (rates[:, 0] - 1).abs()).all()
    _, similarities = bias.measure(padded("circular"), *canvases)
    torch.testing.assert_close(similarities, torch.ones(3, 4), rtol=0, atol=1e-6)
    rates, _ = bias.measure(lambda x: [maps + 0.3 * maps.flip(3) for maps in blocks(x)], *canvases)
    assert (rates > 1.001).all()
    boxes, A, B = [], ((0, 64, 128, 192), 256), ((128, 64, 256, 192), 256)
    monkeypatch.setattr(bias, "box_features", lambda maps, *box: boxes.append(box) or torch.ones(3, 1))
    bias.measure(blocks, *canvases)
    assert boxes == [A, A, B] * 4


def test_bias_compares_backbones_and_draws_what_it_measures(coco, tmp_path, capsys, monkeypatch):
    """Random initialisation is added. Each plot has the curves of its own measure. What does not exist is nowhere."""
    torch.save(common.ResNetTrunk("resnet18").state_dict(), tmp_path / "other.pth")
    figures, measure, out, asked, canvases = [], bias.measure, tmp_path / "out", [], bias.Canvases
    monkeypatch.setattr(bias, "Canvases", lambda *args: asked.extend(args) or canvases(*args))
    monkeypatch.setattr("harness.pictures.save_figure", lambda figure, path, dpi: figures.append(figure))
    monkeypatch.setattr(bias, "measure", lambda *args: (torch.full((len(args[1]), 4), torch.nan), measure(*args)[1]))
    monkeypatch.setattr(bias, "SMALLEST", 16)
    flags = f"--arch resnet18 --count 18 --pair-size 64 --grid-size 32 --weights {tmp_path}/other.pth --data {coco}"
    bias.job([*flags.split(), "--output-dir", str(out)])
    assert [Image.open(out / f"{name}.png").size for name in ("coupling", "position")] == [(824, 280), (632, 112)]
    results, text, (figure,) = results_of(out)["results"], capsys.readouterr().out, figures
    assert asked[1:] == [64, 32, "mask", 0] and asked[0][0][3](1) is not None
    assert [*results] == ["other", "random"] and results["other"]["MCS"] != results["random"]["MCS"]
    for axis, kind, title in zip(figure.axes, ("CR", "MCS"), ("coupling rate", "mean cosine similarity"), strict=True):
        assert axis.get_title() == title and [x.get_label() for x in axis.containers] == [*results]
        means = [stage["mean"] for stage in results["random"][kind].values()]
        assert np.array_equal(axis.containers[1].lines[0].get_ydata(), np.array(means, float), equal_nan=True)
    bars = [np.ptp(segment[:, 1]) / 4 for segment in axis.containers[1].lines[2][0].get_segments()]
    assert bars == pytest.approx([stage["error"] for stage in results["random"]["MCS"].values()])
    assert f"MCS C2 {means[0]:.4f} +- {bars[0]:.4f}" in text and "CR  C2 nan +- nan" in text


def test_results_of_other_settings_are_not_replaced(tmp_path, monkeypatch):
    settings, path = {"data": "scenes:5", "seed": 0, "workers": 2, "output_dir": "out"}, tmp_path / "results.json"
    frozen.write_results(tmp_path, "probes.oknn", ["--data", "a b"], settings, {"top1": 3})
    assert results_of(tmp_path).items() >= {"command": "python -m probes.oknn --data 'a b'", "top1": 3}.items()
    frozen.require_own_folder(tmp_path, settings | {"workers": 0, "output_dir": "./out"})
    for content, old in ((path.read_text(), "0"), ("[]", "None"), ("{", "None")):
        path.write_text(content)
        with pytest.raises(UserError, match=f"of other settings .*seed {old} -> 1.: give another --output-dir"):
            frozen.require_own_folder(tmp_path, settings | {"seed": 1})
    monkeypatch.setattr(common, "start_processes", lambda: (0, 2, CPU))
    with pytest.raises(UserError, match="without torchrun"):
        frozen.start(None)


def test_names_of_weights():
    words, found = ["ours=a=b.pth", "dir/r50.pth"], {"ours": "a=b.pth", "r50": "dir/r50.pth", "random": "random"}
    assert bias.parse_weights(words) == bias.parse_weights([*words, "random"]) == found
    assert bias.parse_weights(["init=random"]) == {"init": "random"}
    for words in (["random=a.pth"], ["a/b.pth", "c/b.pth"], ["=x.pth"]):
        with pytest.raises(UserError, match="write NAME=FILE"):
            bias.parse_weights(words)


BAD = {  # a probe, --data and more; a part of the line with which it is refused
    "oknn {coco}/nowhere": "train2017: no such folder of images",
    "oknn scenes:1": "a single image with objects",
    "bias scenes:8 --grid-size 48": "--grid-size must be a multiple of 32",
}


@pytest.mark.parametrize("words", BAD)
def test_bad_input_in_one_clear_line(words, coco, tmp_path, capsys):
    name, *flags = f"{words} --arch resnet18 --output-dir {tmp_path}".format(coco=coco).split()
    with pytest.raises((UserError, SystemExit)) as error:
        globals()[name].job(["--weights", "random", "--data", *flags])
    assert BAD[words] in (str(error.value) + capsys.readouterr().err).splitlines()[-1]
