"""probes/: linear evaluation, object k-NN, coupling rate and positional bias."""

import argparse
import json
import math
import os
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tracemalloc

import helpers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT, assert_same, checkpoint, keep_signals, log_lines, signal_after  # noqa: F401
from PIL import Image, ImageOps
from torch import nn
from torchvision.transforms import functional as TF

import common
import harness.images
import harness.legacy
import harness.pictures
from probes import bias, frozen, linear, oknn

COLOURS = {"red": (200, 40, 40), "green": (40, 180, 60), "blue": (50, 60, 210)}


def run(module, *flags, processes=0, expect=0):
    """A probe as its user starts it; stdout + stderr."""
    done = subprocess.run(
        module_command(module, *flags, processes=processes), capture_output=True, text=True, cwd=ROOT, timeout=400
    )
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout + done.stderr


def module_command(module, *flags, processes=0):
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes else []
    return [sys.executable, *launcher, "-m", module, *map(str, flags)]


def error_of(main, *flags):
    """The message of the UserError that main() ends with."""
    with pytest.raises(common.UserError) as error:
        main([str(flag) for flag in flags])
    message = str(error.value)
    assert "\n" not in message and len(message) < 400
    return message


def noisy(colour, size, rng):
    """A picture of one colour with a little noise."""
    pixels = np.array(colour) + rng.integers(-25, 26, (size[1], size[0], 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


# ======================================================================================================================
# linear
# ======================================================================================================================

TINY = "--arch resnet18 --size 32 --batch-size 8 --lr 1 --epochs 3 --workers 0 --print-freq 2 --weights random".split()


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    """DATA with 10 + 7 images in each of three classes that differ in colour, one class in subfolders, one called train."""
    root, rng = tmp_path_factory.mktemp("classes"), np.random.default_rng(0)
    for split, count in (("train", 10), ("val", 7)):
        for name, colour in zip(("a", "b/deep", "train"), COLOURS.values(), strict=True):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                noisy(colour, (48, 40), rng).save(root / split / name / f"{i}.png")
    return root


def probe(data, out, *flags):
    linear.main(["--data", str(data), "--output-dir", str(out), *TINY, *map(str, flags)])


@pytest.fixture(scope="module")
def finished(classes, tmp_path_factory):
    """A run of 9 steps (3 epochs of 3), never interrupted."""
    folder = tmp_path_factory.mktemp("linear")
    probe(classes, folder)
    return folder


def test_linear_probe_on_separable_features_reaches_100_percent(classes, finished):
    results = json.loads((finished / "results.json").read_text())
    assert (results["top1"], results["top5"], results["best_top1"]) == (100, 100, 100)
    assert [e["step"] for e in results["evaluations"]] == [3, 6, 9] and results["images"] == 21
    assert results["evaluations"][-1]["epoch"] == 3
    assert set(os.listdir(finished)) == {"checkpoint.pth", "fc.pth", "log.jsonl", "results.json", "curves.png"}
    lines = log_lines(finished)
    assert f"-m probes.linear --data {classes}" in lines[0]["command"] and lines[0]["settings"]["weights"].startswith(
        "sha256"
    )
    assert [line["step"] for line in lines if "loss" in line] == [2, 3, 4, 6, 8, 9]
    assert [line["top1"] for line in lines if "images" in line] == [e["top1"] for e in results["evaluations"]]


def test_linear_results_are_those_of_the_exported_classifier(classes, finished, tmp_path):
    """fc.pth on torchvision's own ResNet and transforms, image by image."""
    from torchvision import models, transforms

    out = tmp_path / "early"
    probe(classes, out, "--steps", "1", "--lr", "0.02")  # not yet perfect
    with common.drawing("random weights", 0):
        trunk = common.ResNetTrunk("resnet18")
    network = models.resnet18(num_classes=3)
    result = network.load_state_dict(trunk.state_dict() | torch.load(out / "fc.pth"), strict=True)
    assert not result.missing_keys
    cut = transforms.Compose([transforms.Resize(37), transforms.CenterCrop(32), transforms.ToTensor(),
                              transforms.Normalize(common.PIXEL_MEAN, common.PIXEL_STD)])  # fmt: skip
    right = []
    for label, name in enumerate(("a", "b/deep", "train")):
        for i in range(7):
            image = cut(Image.open(classes / "val" / name / f"{i}.png"))
            with torch.no_grad():
                right.append(network.eval()(image[None]).argmax().item() == label)
    found = json.loads((out / "results.json").read_text())
    assert found["top1"] == pytest.approx(100 * np.mean(right)) and 0 < found["top1"] < 100
    assert found["evaluations"][0]["epoch"] == pytest.approx(1 / 3)


def test_linear_schedules():
    """Values of the papers: 90 epochs of cosine; MoCo's 100 epochs with steps at 60 and 80."""
    setsim = linear.get_args("--data x --weights random".split())
    moco = linear.get_args("--data x --weights random --preset moco".split())
    assert (setsim.epochs, setsim.lr, setsim.batch_size, setsim.size) == (90, 30, 256, 224)
    assert (moco.epochs, moco.lr, moco.batch_size) == (100, 30, 256)
    rates = [linear.learning_rate("moco", 30, epoch, 100) for epoch in (0, 59, 60, 79, 80, 99)]
    assert rates == pytest.approx([30, 30, 3, 3, 0.3, 0.3])
    assert linear.learning_rate("moco", 30, 6, 10) == pytest.approx(3)
    assert [linear.learning_rate("setsim", 30, e, 90) for e in (0, 45, 60)] == pytest.approx([30, 15, 7.5])


def test_linear_trains_at_the_schedules_rates(classes, finished, tmp_path):
    """Each step at the rate of its epoch; 8 of 256 images make 1/32 of --lr."""
    rates = [(line["step"], 32 * line["lr"]) for line in log_lines(finished) if "loss" in line]
    cosine = [(1 + math.cos(math.pi * epoch / 3)) / 2 for epoch in range(3)]
    assert rates == [(step, pytest.approx(cosine[(step - 1) // 3])) for step in (2, 3, 4, 6, 8, 9)]
    probe(classes, tmp_path, "--preset", "moco", "--epochs", "5", "--print-freq", "3")
    rates = [32 * line["lr"] for line in log_lines(tmp_path) if "loss" in line]
    assert rates == pytest.approx([1, 1, 1, 0.1, 0.01])  # 60 and 80 % of five epochs


def test_linear_counts_what_is_right(monkeypatch, capsys):
    """Top-1 and top-5 of seven classes against a loop; what stands in for an unreadable image is not counted."""
    rng = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(50, 7, generator=rng), torch.randint(7, (50,), generator=rng)
    passed = torch.zeros(50, dtype=torch.int64)
    passed[20] = 1
    batches = [
        (logits[i : i + 8], labels[i : i + 8], torch.arange(i, min(i + 8, 50)), passed[i : i + 8])
        for i in range(0, 50, 8)
    ]
    monkeypatch.setattr(linear, "features", lambda trunk, x, amp: x)
    world = harness.legacy.World(0, 1, 0, torch.device("cpu"))
    bad = harness.images.BadImages(Numbers(50), outcome="it is left out")
    found = linear.evaluate(None, nn.Identity(), batches, "none", bad, world, argparse.Namespace(arrived=False))
    ranks = [sum(row[c] > row[label] for c in range(7)) for row, label in zip(logits, labels, strict=True)]
    ranks = [rank for i, rank in enumerate(ranks) if i != 20]
    wanted = {f"top{n}": 100 * sum(rank < n for rank in ranks) / 49 for n in (1, 5)}
    assert found == {name: pytest.approx(value) for name, value in wanted.items()} | {"images": 49}
    assert 0 < found["top1"] < found["top5"] < 100
    assert capsys.readouterr().out == "unreadable image, it is left out: 20\n"
    with pytest.raises(common.UserError, match="none of the 1 test images can be read"):
        bad = harness.images.BadImages(Numbers(1))
        one = [(logits[:1], labels[:1], torch.tensor([0]), torch.tensor([1]))]
        linear.evaluate(None, nn.Identity(), one, "none", bad, world, argparse.Namespace(arrived=False))


class Numbers:
    """Images whose names are their numbers."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def name(self, index):
        return str(index)


def test_linear_reports_the_last_and_the_best_evaluation():
    results = [
        {"epoch": e, "step": 3 * e, "top1": top1, "top5": 90 + e, "images": 7}
        for e, top1 in ((1, 50), (2, 70), (3, 60))
    ]
    report = linear.report(results)
    assert (report["top1"], report["top5"], report["best_top1"], report["best_epoch"]) == (60, 93, 70, 2)
    assert report["evaluations"] == results
    assert (
        linear.summary(results) == "top-1 60.00 top-5 93.00 on 7 images after epoch 3, best top-1 70.00 after epoch 2"
    )


def test_linear_saves_within_an_epoch(classes, tmp_path, monkeypatch):
    real, calls = linear.features, []

    def third_time_killed(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(linear, "features", third_time_killed)
    with pytest.raises(KeyboardInterrupt):
        probe(classes, tmp_path, "--save-every", "2")
    assert checkpoint(tmp_path)["step"] == 2


def test_linear_optimiser_and_first_weights(classes, tmp_path, monkeypatch, capsys):
    made, sgd = [], torch.optim.SGD

    def record(parameters, *args, **kwargs):
        parameters = list(parameters)
        made.append(([p.detach().clone() for p in parameters], sgd(parameters, *args, **kwargs)))
        return made[-1][1]

    monkeypatch.setattr(torch.optim, "SGD", record)
    probe(classes, tmp_path, "--lr", "3.2", "--steps", "4", "--preset", "moco", "--epochs", "2")
    (((weight, bias_), optimiser),) = made
    assert weight.shape == (3, 512) and 0.0095 < weight.std() < 0.0105 and abs(weight.mean()) < 0.001
    assert not bias_.any()
    (group,) = optimiser.param_groups
    assert (group["momentum"], group["weight_decay"], group["nesterov"], group["lr"]) == (0.9, 0, False, 0.1)
    assert "lr 0.1 = 3.2 x 8/256" in capsys.readouterr().out


def test_linear_autocast_is_of_the_backbone_alone(classes, tmp_path, monkeypatch):
    x = torch.randint(0, 256, (4, 3, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    trunk = frozen.frozen_trunk("random", "resnet18", 0, torch.device("cpu"))[0]
    full, half = linear.features(trunk, x), linear.features(trunk, x, "bf16")
    assert half.dtype == torch.float32 and not torch.equal(full, half)
    torch.testing.assert_close(half, full, rtol=0.05, atol=0.01)
    real, seen = linear.features, []
    monkeypatch.setattr(linear, "features", lambda trunk, x, amp: seen.append(amp) or real(trunk, x, amp))
    probe(classes, tmp_path, "--amp", "bf16", "--steps", "2")
    assert seen == ["bf16"] * (2 + 3)  # two steps, three batches of test images
    state = torch.load(tmp_path / "checkpoint.pth")
    assert state["model"]["weight"].dtype == torch.float32 and state["settings"]["amp"] == "bf16"
    assert "amp 'bf16' -> 'none'" in error_of(linear.main, "--data", classes, "--output-dir", tmp_path, *TINY)


def test_linear_crops_are_drawn_from_seed_epoch_and_index_alone(classes):
    images = linear.ClassFolder(str(classes / "train"))
    assert images.classes == ["a", "b", "train"] and images.labels.tolist() == [0] * 10 + [1] * 10 + [2] * 10
    assert images.name(12) == os.path.join("b", "deep", "2.png")
    x = {}
    for seed, epoch, index in ((0, 0, 3), (0, 1, 3), (1, 0, 3), (0, 0, 4)):
        torch.manual_seed(random.randrange(1000))
        x[seed, epoch, index], label, *_ = linear.Crops(images, 32, seed, True)[epoch, index]
        assert label == 0 and x[seed, epoch, index].shape == (3, 32, 32)
    assert torch.equal(x[0, 0, 3], linear.Crops(images, 32, 0, True)[0, 3][0])
    assert not any(torch.equal(x[0, 0, 3], x[key]) for key in x if key != (0, 0, 3))
    tests = linear.Crops(images, 32, 0, False)
    assert torch.equal(tests[0, 3][0], tests[5, 3][0])


def test_linear_crops_cover_what_the_protocol_says(tmp_path):
    """Shares of the area from 0.08 to 1, half of them flipped; the middle 7/8 when testing."""
    (tmp_path / "a").mkdir()
    helpers.coordinate_image(256, 256).save(tmp_path / "a" / "0.png")
    images = linear.ClassFolder(str(tmp_path))
    crops, shares, flipped = linear.Crops(images, 64, 0, True), [], []
    for epoch in range(300):
        x = crops[epoch, 0][0].float()
        width, height = x[0, :, -1].mean() - x[0, :, 0].mean(), x[1, -1].mean() - x[1, 0].mean()
        shares.append((abs(width) * height / 256**2 * (64 / 63) ** 2).item())
        flipped.append(width.item() < 0)
    assert 0.06 < min(shares) < 0.14 and 0.9 < max(shares) < 1.02 and 0.45 < np.mean(shares) < 0.6
    assert 0.4 < np.mean(flipped) < 0.6
    x = linear.Crops(images, 224, 0, False)[0, 0][0]
    assert (x[0, :, 0] == 16).all() and (x[0, :, -1] == 239).all() and (x[1, 0] == 16).all()


def test_linear_hits():
    logits = torch.tensor([[5.0, 4, 3, 2, 1, 0], [0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]])
    assert linear.hits(logits, torch.tensor([0, 1, 0])).tolist() == [[True, True], [False, True], [False, False]]
    assert linear.hits(logits[:, :2], torch.tensor([0, 1, 0])).tolist() == [[True, True], [True, True], [False, True]]


def test_linear_learns_on_frozen_batch_norm_and_says_if_the_backbone_moves(classes, finished, tmp_path, monkeypatch):
    real, modes = linear.features, []
    monkeypatch.setattr(linear, "features", lambda trunk, *x: modes.append(trunk.training) or real(trunk, *x))
    probe(classes, tmp_path / "a", "--steps", "1")
    assert modes and not any(modes)
    assert_same(checkpoint(tmp_path / "a")["settings"]["weights"], checkpoint(finished)["settings"]["weights"])
    for change in (lambda trunk: trunk.train(), lambda trunk: trunk.conv1.weight.mul_(1.001)):
        monkeypatch.setattr(linear, "features", lambda trunk, *x, change=change: (change(trunk), real(trunk, *x))[1])
        with pytest.raises(RuntimeError, match="frozen backbone has changed"):
            probe(classes, tmp_path / "b", "--steps", "3")
        shutil.rmtree(tmp_path / "b")


def same_run(a, b):
    """Weights, optimiser and all evaluations, bit for bit."""
    a, b = checkpoint(a), checkpoint(b)
    for name in ("model", "optimizer", "step", "results"):
        assert_same(a[name], b[name], name)


def test_linear_interrupted_equals_uninterrupted(classes, finished, tmp_path, capsys):
    """Stopped at the end of an epoch, before that epoch was evaluated; other workers; a finished run stays as it is."""
    evaluate = linear.evaluate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear, "evaluate", lambda *args: None)  # as if a signal came during the evaluation
        probe(classes, tmp_path)
    assert checkpoint(tmp_path)["step"] == 3 and checkpoint(tmp_path)["results"] == []
    assert "stopped by a signal and saved at step 3" in capsys.readouterr().out
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            linear, "evaluate", lambda *args: calls.append(1) or (evaluate(*args) if len(calls) < 3 else None)
        )
        probe(classes, tmp_path, "--workers", "2")
    assert checkpoint(tmp_path)["step"] == 9
    probe(classes, tmp_path)
    same_run(tmp_path, finished)
    before = checkpoint(tmp_path)
    probe(classes, tmp_path)
    assert "finished, at step 9 of 9: top-1 100.00 top-5 100.00 on 21 images after epoch 3" in capsys.readouterr().out
    assert_same(before, checkpoint(tmp_path))
    assert [line["step"] for line in log_lines(tmp_path) if "images" in line] == [3, 6, 9]
    assert [line["step"] for line in log_lines(tmp_path) if "top1" in line] == [3, 6, 9]


def test_linear_signal_between_two_steps(classes, finished, tmp_path, monkeypatch):
    real, calls = linear.features, []

    def signalling(trunk, x, amp):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(trunk, x, amp)

    monkeypatch.setattr(linear, "features", signalling)
    probe(classes, tmp_path)
    assert checkpoint(tmp_path)["step"] == 2
    monkeypatch.setattr(linear, "features", real)
    probe(classes, tmp_path)
    same_run(tmp_path, finished)


@pytest.mark.slow
def test_linear_killed_at_random_instants(classes, finished, tmp_path, monkeypatch):
    monkeypatch.setattr(helpers, "command", module_command)
    rng = random.Random(0)
    flags = ["--data", classes, "--output-dir", tmp_path, *TINY]
    for line in (2, rng.randrange(3, 6), rng.randrange(6, 9)):
        code, _ = signal_after("probes.linear", *flags, "--save-every", "1", line=line, number=signal.SIGKILL)
        assert code in (-signal.SIGKILL, 0)
    run("probes.linear", *flags)
    same_run(tmp_path, finished)


@pytest.mark.slow
def test_linear_on_two_processes_is_the_same_run(classes, finished, tmp_path):
    text = run("probes.linear", "--data", classes, "--output-dir", tmp_path, *TINY, processes=2)
    assert "batch 8 = 2 x 4 on cpu" in text and text.count("step 9/9") == 1
    one, two = checkpoint(finished), checkpoint(tmp_path)
    assert two["results"] == one["results"]  # 21 images on two processes: each once
    torch.testing.assert_close(two["model"], one["model"], rtol=1e-4, atol=1e-6)


def test_linear_unreadable_images_lend_no_label(classes, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(classes, data)
    (data / "train" / "a" / "9.png").write_bytes(b"broken")  # the last of its class: the next one is of class b
    images = linear.ClassFolder(str(data / "train"))
    x, label, index, passed = linear.Crops(images, 32, 0, False)[0, 9]
    assert (label, index, passed) == (1, 9, 1)
    probe(data, tmp_path / "out", "--steps", "4")
    probe(data, tmp_path / "out")  # what was named is not named again
    text = capsys.readouterr().out
    assert text.count("unreadable image") == 1 and "unreadable image, another one takes its place: a" in text


def test_linear_bad_input(classes, finished, tmp_path):
    out = ["--output-dir", tmp_path / "out", *TINY]
    (tmp_path / "empty" / "train").mkdir(parents=True)
    assert "no such folder: --data needs train/CLASS/IMAGE" in error_of(linear.main, "--data", "/nowhere", *out)
    assert "no images in it" in error_of(linear.main, "--data", tmp_path / "empty", *out)
    flat = tmp_path / "flat"
    shutil.copytree(classes, flat)
    shutil.copy(flat / "val" / "a" / "0.png", flat / "val" / "0.png")
    assert "in no class folder" in error_of(linear.main, "--data", flat, *out)
    (flat / "val" / "0.png").unlink()
    shutil.copytree(flat / "val" / "a", flat / "val" / "other")
    assert "that train/ has not" in error_of(linear.main, "--data", flat, *out)
    shutil.rmtree(flat / "val" / "other")
    shutil.rmtree(flat / "train" / "b")
    shutil.rmtree(flat / "train" / "train")
    shutil.rmtree(flat / "val" / "b")
    shutil.rmtree(flat / "val" / "train")
    assert "one class alone" in error_of(linear.main, "--data", flat, *out)
    data = ["--data", classes, *out]
    (tmp_path / "out").mkdir(exist_ok=True)
    (tmp_path / "out" / "results.json").write_text('{"settings": {"count": 3}}')  # of another probe
    assert "not the results of this probe" in error_of(linear.main, *data)
    (tmp_path / "out" / "results.json").unlink()
    assert "30 images are fewer than --batch-size 64" in error_of(linear.main, *data, "--batch-size", "64")
    assert "--epochs 0: must be at least 1" in error_of(linear.main, *data, "--epochs", "0")
    assert "no such file" in error_of(linear.main, *data, "--weights", "nowhere.pth")
    assert "not a checkpoint" in error_of(linear.main, *data, "--weights", classes / "val" / "a" / "0.png")
    message = error_of(linear.main, *data, "--output-dir", finished, "--lr", "2", "--seed", "3")
    assert "lr 1.0 -> 2.0" in message and "seed 0 -> 3" in message and "weights 'sha256" in message
    torch.save(checkpoint(finished) | {"script": "setsim"}, tmp_path / "checkpoint.pth")
    assert "a checkpoint of setsim.py" in error_of(linear.main, *data, "--output-dir", tmp_path)
    assert "not finite" in error_of(linear.main, *data, "--lr", "1e38")


# ======================================================================================================================
# Annotated objects
# ======================================================================================================================


def write_coco(root, split, count, rng, extra=()):
    """`count` images of three squares of different colours on noise; category ids 3, 7 and 40 by colour."""
    (root / split).mkdir(parents=True)
    (root / "annotations").mkdir(exist_ok=True)
    images, annotations = [], list(extra)
    for i in range(count):
        size = [(96, 72), (72, 96), (80, 80)][i % 3]
        image = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), np.uint8))
        for j, category in enumerate(rng.permutation([3, 7, 40]).tolist()):
            x, y, w, h = 2 + size[0] // 3 * j, int(rng.integers(2, 30)), 22, 38
            colour = list(COLOURS.values())[[3, 7, 40].index(category)]
            image.paste(noisy(colour, (w, h), rng), (x, y))
            middle = [x, y, x + w, y, x + w, y + h / 2, x, y + h / 2]  # the upper half of the box
            annotations.append(
                {"id": len(annotations) + 1, "image_id": 10 * i, "category_id": category, "bbox": [x, y, w, h],
                 "iscrowd": 0, "segmentation": [middle]}
            )  # fmt: skip
        image.save(root / split / f"{i:03}.png")
        images.append({"id": 10 * i, "file_name": f"{i:03}.png", "width": size[0], "height": size[1]})
    content = {"images": images[::-1], "annotations": annotations, "categories": []}
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp("coco"), np.random.default_rng(0)
    crowd = {"image_id": 0, "category_id": 3, "bbox": [0, 0, 90, 60], "iscrowd": 1, "segmentation": {}}
    thin = {"image_id": 0, "category_id": 7, "bbox": [0, 0, 2, 60], "iscrowd": 0, "segmentation": []}
    outside = {"image_id": 0, "category_id": 7, "bbox": [90, 50, 30, 30], "iscrowd": 0}
    empty = {"image_id": 0, "category_id": 7, "bbox": [100, 5, 0, 5], "iscrowd": 0}
    write_coco(root, "train2017", 14, rng, (crowd, thin, outside, empty))
    write_coco(root, "val2017", 9, rng)
    write_coco(root, "two", 2, rng)
    return root


def test_coco_objects(coco):
    """Crowds and empty boxes are out, boxes end at the image, outlines are decoded, images sorted by id."""
    objects = frozen.CocoObjects(str(coco), "train2017", masks=True)
    assert len(objects) == 14 and objects.name(0) == "000.png"
    item = objects[0]
    assert item.boxes[:2].tolist() == [[0, 0, 2, 60], [90, 50, 96, 72]] and len(item.boxes) == 5
    assert item.mask(0) is None and item.mask(1) is None  # no polygon; no entry at all
    x0, y0, x1, y1 = item.boxes[2].int().tolist()
    wanted = np.zeros((72, 96), bool)
    wanted[y0 : (y0 + y1) // 2, x0:x1] = True
    assert (item.mask(2) == wanted).mean() > 0.99
    item = objects[5]
    for row, (x0, y0, x1, y1) in enumerate(item.boxes.int().tolist()):  # the outlines of this image, not of another
        mask = item.mask(row)
        assert mask[y0 : (y0 + y1) // 2, x0:x1].all() and mask.sum() <= (x1 - x0 + 1) * ((y1 - y0) // 2 + 1)
    pixel = np.asarray(item.image)[int(item.boxes[0, 1]) + 5, int(item.boxes[0, 0]) + 5]
    assert np.argmax(pixel) == [3, 7, 40].index(item.labels[0])  # of this image, not of another
    assert frozen.CocoObjects(str(coco), "train2017")[5].mask(0) is None


def test_coco_objects_with_run_lengths(tmp_path):
    from pycocotools import mask as coco_mask

    root = tmp_path
    write_coco(root, "val", 1, np.random.default_rng(0))
    wanted = np.zeros((72, 96), np.uint8)
    wanted[10:20, 30:50] = 1
    path = root / "annotations" / "instances_val.json"
    content = json.loads(path.read_text())
    code = coco_mask.encode(np.asfortranarray(wanted))
    content["annotations"][0]["segmentation"] = {"size": [72, 96], "counts": code["counts"].decode()}
    counts = [30 * 72 + 10, *[10, 62] * 19, 10, 46 * 72 + 52]
    content["annotations"][1]["segmentation"] = {"size": [72, 96], "counts": counts}
    path.write_text(json.dumps(content))
    item = frozen.CocoObjects(str(root), "val", masks=True)[0]
    assert (item.mask(0) == wanted).all() and (item.mask(1) == wanted).all()


def test_outlines_are_not_kept_in_memory_without_need(coco, tmp_path):
    """COCO train2017's take gigabytes as Python objects; here 2000 outlines of 400 numbers take 25 MB."""
    shutil.copytree(coco, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "annotations" / "instances_val2017.json"
    content = json.loads(path.read_text())
    content["annotations"][:] = [
        content["annotations"][0] | {"id": i, "segmentation": [[i + k / 7 for k in range(400)]]} for i in range(2000)
    ]
    path.write_text(json.dumps(content))
    peaks = {}
    for masks in (False, True):
        tracemalloc.start()
        assert len(frozen.CocoObjects(str(tmp_path), "val2017", masks).boxes) == 2000
        peaks[masks] = tracemalloc.get_traced_memory()[1] / path.stat().st_size
        tracemalloc.stop()
    assert peaks[True] > 2.5 and peaks[False] < 2.1  # the text is held twice, as bytes and decoded, while it is read


def test_images_that_do_not_fit_their_annotations(coco, tmp_path):
    shutil.copytree(coco, tmp_path / "coco")
    Image.new("RGB", (50, 50)).save(tmp_path / "coco" / "val2017" / "004.png")
    objects = frozen.CocoObjects(str(tmp_path / "coco"), "val2017")
    with pytest.raises(OSError, match="annotated as"):
        objects[4]
    item, passed = frozen.readable(objects, 4)
    assert passed == 1 and torch.equal(item.boxes, objects[5].boxes)
    shutil.rmtree(tmp_path / "coco" / "val2017")
    (tmp_path / "coco" / "val2017").mkdir()
    item, passed = frozen.readable(objects, 4)
    assert passed == harness.images.TRIES and len(item.boxes) == len(item.labels) == 0


def test_resized_images_beside_their_old_annotations_are_named(coco, tmp_path):
    shutil.copytree(coco, tmp_path, dirs_exist_ok=True)
    for i in (0, 4, 8):
        frozen.CocoObjects(str(tmp_path), "val2017")  # single ones are passed over
        Image.new("RGB", (50, 50)).save(tmp_path / "val2017" / f"{i:03}.png")
    with pytest.raises(
        common.UserError, match=r"0.png: 50 x 50 pixels, annotated as .* give the images that .*2017.json"
    ):
        frozen.CocoObjects(str(tmp_path), "val2017")


@pytest.mark.parametrize("main, flags", [(oknn.main, "--train val2017"), (bias.main, "--count 4")])
def test_bad_annotations(main, flags, coco, tmp_path):
    flags = [*flags.split(), "--arch", "resnet18", "--weights", "random", "--output-dir", tmp_path / "out"]
    assert "no such file or folder; DATA needs" in error_of(main, "--data", tmp_path, *flags)
    path = tmp_path / "annotations" / "instances_val2017.json"
    path.parent.mkdir()
    (tmp_path / "val2017").mkdir()
    for text in ("garbage", "[]", '{"images": []}', '{"images": [{"id": 1}], "annotations": []}'):
        path.write_text(text)
        assert "not annotations in COCO's format" in error_of(main, "--data", tmp_path, *flags)
    path.write_text('{"images": [], "annotations": []}')
    assert "no object in it" in error_of(main, "--data", tmp_path, *flags)
    shutil.copy(coco / "annotations" / "instances_val2017.json", path)  # its images are missing
    flags += ["--workers", "0"] if main is oknn.main else []
    assert "cannot be read (more than 1 %)" in error_of(main, "--data", tmp_path, *flags)
    assert "scenes:4096" in error_of(main, "--data", "scenes:many", *flags)
    assert "--output-dir" in error_of(main, "--data", coco, *flags[:-2], "--output-dir", path)


@pytest.mark.parametrize("module", ["probes.linear", "probes.oknn", "probes.bias"])
def test_bad_input_is_one_line_and_exit_code_2(module, tmp_path, monkeypatch, capsys):
    flags = ["--data", "/nowhere", "--weights", "random", "--output-dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [module, *flags])
    monkeypatch.delitem(sys.modules, module)
    with pytest.raises(SystemExit) as stop:
        runpy.run_module(module, run_name="__main__")
    text = capsys.readouterr().err
    assert stop.value.code == 2 and text.startswith(f"{module}: error: /nowhere") and len(text.splitlines()) == 1


# ======================================================================================================================
# Object k-NN
# ======================================================================================================================


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=-1)


def knn_by_hand(queries, bank, labels, k, tau, classes):
    """Loops alone: for each query the classes in order of their votes, those without a vote left out."""
    ranking = []
    for q in queries:
        pairs = sorted(((sum(a * b for a, b in zip(q, z, strict=True)), c) for z, c in zip(bank, labels, strict=True)))
        votes = {}
        for cosine, label in pairs[::-1][:k]:
            votes[label] = votes.get(label, 0) + math.exp(cosine / tau)
        ranking.append(sorted(votes, key=lambda c: -votes[c]))
    return ranking


@pytest.mark.parametrize("k, tau, part", [(1, 0.07, 50), (20, 0.07, 7), (5, 1.0, 13), (80, 0.3, 50)])
def test_knn_against_a_loop(k, tau, part):
    """Also more neighbours than the bank has, and a bank that comes in uneven parts."""
    classes = 9
    bank, queries = unit(50, 6), unit(23, 6, seed=1)
    labels = torch.randint(classes, (50,), generator=torch.Generator().manual_seed(2))
    truth = torch.randint(classes, (23,), generator=torch.Generator().manual_seed(3))
    best = oknn.nobody(queries, k)
    for z, c in zip(bank.split(part), labels.split(part), strict=True):
        best = oknn.nearest(queries, z, c, best, rows=10)
    scores = oknn.vote(*best, classes, tau)
    wanted = knn_by_hand(queries.tolist(), bank.tolist(), labels.tolist(), k, tau, classes)
    for n in (1, 5):
        hits = [c in ranking[:n] for c, ranking in zip(truth.tolist(), wanted, strict=True)]
        assert oknn.top(scores, truth, n).tolist() == hits
        assert 0 < sum(hits) < 23
    for row, ranking in zip(scores, wanted, strict=True):
        assert (row > 0).sum() == len(ranking)
        assert row.argsort(descending=True)[: len(ranking)].tolist() == ranking


def test_knn_on_features_with_a_known_answer():
    """Neighbours at cosines 0.9, 0.8, 0.8 of classes 0, 1, 1: class 1 wins iff 2 exp(0.8/tau) > exp(0.9/tau)."""
    query = torch.tensor([[1.0, 0.0]])
    cosines = torch.tensor([0.9, 0.8, 0.8, 0.1])
    bank, labels = torch.stack([cosines, (1 - cosines**2).sqrt()], 1), torch.tensor([0, 1, 1, 2])
    for tau, winner in ((0.1 / math.log(2) * 1.01, 1), (0.1 / math.log(2) * 0.99, 0)):
        best = oknn.nearest(query, bank, labels, oknn.nobody(query, 3))
        assert best[0].tolist() == [pytest.approx([0.9, 0.8, 0.8])] and best[1].tolist() == [[0, 1, 1]]
        scores = oknn.vote(*best, 5, tau)
        assert scores.argmax() == winner
        assert scores[0].tolist() == pytest.approx([1, 2 * math.exp(-0.1 / tau), 0, 0, 0], abs=1e-5)
        assert oknn.top(scores, torch.tensor([winner]), 1).item()
        assert not oknn.top(scores, torch.tensor([2]), 5).item()  # five classes, but no vote: no lucky hit
    assert not oknn.top(torch.tensor([[0.5, 0.5]]), torch.tensor([0]), 1).item()  # a tie
    classes = torch.arange(40) % 8
    z = F.normalize(F.one_hot(classes, 8).double() + 0.05 * unit(40, 8), dim=1)  # separate classes: all right
    best = oknn.nearest(z[:16], z[16:], classes[16:], oknn.nobody(z[:16], 3))
    assert oknn.top(oknn.vote(*best, 8, 0.07), classes[:16], 1).all()


def test_disturbing_leaves_box_pixels_unchanged():
    rng = torch.Generator().manual_seed(0)
    image, other = (torch.randint(0, 256, (3, 40, 60), generator=rng, dtype=torch.uint8) for _ in range(2))
    boxes = torch.tensor([[3.0, 5, 20, 15], [10.4, 8.6, 30.2, 25.1], [50, 30, 60, 40]])
    inside = torch.zeros(40, 60, dtype=torch.bool)
    for x0, y0, x1, y1 in boxes.tolist():
        for y in range(40):
            for x in range(60):
                inside[y, x] |= x + 1 > x0 and x < x1 and y + 1 > y0 and y < y1  # the pixel and the box share area
    found = oknn.disturb(image, boxes, other)
    assert torch.equal(found[:, inside], image[:, inside]) and torch.equal(found[:, ~inside], other[:, ~inside])
    assert torch.equal(oknn.disturb(image, boxes[:0], other), other)


def test_variants(coco):
    """Short side, boxes that move along, N objects, small ones left out, the other image from another index."""
    objects = frozen.CocoObjects(str(coco), "train2017")
    variants = oknn.Variants(objects, 144, 2, True, 0, "bank")
    x, boxes, labels, index, passed = variants[4]
    assert x.shape == (2, 3, 192, 144) and boxes.shape == (2, 4) and labels.shape == (2,) and (index, passed) == (4, 0)
    rows = [(2 * objects[4].boxes).tolist().index(box) for box in boxes.tolist()]
    assert objects[4].labels[rows].tolist() == labels.tolist()
    inside = torch.zeros(192, 144, dtype=torch.bool)
    for x0, y0, x1, y1 in boxes.int().tolist():
        inside[y0:y1, x0:x1] = True
    assert torch.equal(x[0][:, inside], x[1][:, inside])
    assert (x[0] != x[1]).any(0)[~inside].float().mean() > 0.9
    for again, same in ((variants[4], True), (oknn.Variants(objects, 144, 2, True, 1, "bank")[4], False)):
        assert torch.equal(again[0], x) == same
    two = oknn.Variants(frozen.CocoObjects(str(coco), "two"), 144, None, True, 0, "bank")
    for index in (0, 1):  # of two images the other one is taken
        (image, disturbed), boxes, *_ = two[index]
        other = ImageOps.fit(two.objects[1 - index].image, image.shape[:0:-1], Image.Resampling.BILINEAR)
        assert torch.equal(disturbed, oknn.disturb(image, boxes, TF.pil_to_tensor(other)))
    everything = oknn.Variants(objects, 144, None, False, 0, "bank")
    assert everything[0][0].shape[0] == 1 and len(everything[0][2]) == 4  # the box of 2 x 60 is 4 pixels wide
    assert len(everything[1][2]) == 3
    chosen = {tuple(oknn.Variants(objects, 144, 1, False, seed, "bank")[4][2].tolist()) for seed in range(20)}
    assert len(chosen) == 3  # each object has its turn


def test_the_other_image_is_drawn_and_never_the_image_itself(coco, tmp_path, monkeypatch):
    """Also where the one that was drawn cannot be read, and its neighbour would be the image itself."""
    shutil.copytree(coco, tmp_path, dirs_exist_ok=True)
    (tmp_path / "val2017" / "000.png").write_bytes(b"broken")
    objects, real, drawn = frozen.CocoObjects(str(tmp_path), "val2017"), oknn.readable, []
    monkeypatch.setattr(oknn, "readable", lambda *args: drawn.append((args[1], real(*args)[1])) or real(*args))
    others = set()
    for seed in range(40):
        drawn.clear()
        variants = oknn.Variants(objects, 64, None, True, seed, "queries")
        x = variants[1][0]
        index, passed = drawn[-1]
        others.add((index + passed) % 9)
        other = ImageOps.fit(objects[(index + passed) % 9].image, x.shape[:1:-1], Image.Resampling.BILINEAR)
        changed = (x[1] != x[0]).any(0)
        assert torch.equal(x[1][:, changed], TF.pil_to_tensor(other)[:, changed]) and changed.float().mean() > 0.2
    assert others == {2, 3, 4, 5, 6, 7, 8}


def test_where_no_other_image_can_be_read_there_are_no_objects(coco, tmp_path):
    """And an image that stands in for an unreadable one is not disturbed with itself."""
    shutil.copytree(coco, tmp_path, dirs_exist_ok=True)
    (tmp_path / "two" / "000.png").write_bytes(b"broken")
    (tmp_path / "train2017" / "000.png").write_bytes(b"broken")
    objects = frozen.CocoObjects(str(tmp_path), "two")
    for index in (0, 1):
        x, boxes, labels, _, passed = oknn.Variants(objects, 64, None, True, 0, "queries")[index]
        assert len(x) == 2 and len(boxes) == len(labels) == 0 and passed == 1 - index
    good = objects[1]

    class OneOfThirty(Numbers):
        def __getitem__(self, index):
            if index:
                raise OSError("broken")
            return good

    x, boxes, _, _, passed = oknn.Variants(OneOfThirty(30), 64, None, True, 0, "queries")[0]
    assert len(x) == 2 and len(boxes) == passed == 0
    objects = frozen.CocoObjects(str(tmp_path), "train2017")
    for seed in range(30):  # index 0 shows image 1
        x, _, labels, _, passed = oknn.Variants(objects, 64, None, True, seed, "bank")[0]
        assert passed == 1 and len(labels) == 3 and (x[0] != x[1]).any(0).float().mean() > 0.2


def test_scenes_of_bank_and_queries_are_different_ones():
    bank, queries, classes = oknn.open_sets(oknn.get_args("--data scenes:8 --weights random".split()))
    names = [{objects.name(i) for i in range(len(objects))} for objects in (bank, queries)]
    assert len(names[0]) == 8 and len(names[1]) == 2 and not names[0] & names[1] and classes == 11


class Blocks(nn.Module):
    """A trunk whose cells see their own pixels alone: colours averaged over squares of the stride, then mixed."""

    def __init__(self, strides=(4, 8, 16, 32)):
        super().__init__()
        self.strides = strides
        self.mix = nn.Conv2d(3, 8, 1)

    def forward(self, x, stages=4):
        return [F.relu(self.mix(F.avg_pool2d(x, s))) for s in self.strides[:stages]]


@torch.no_grad()
def test_object_features():
    """On cells that see their own pixels alone, a box on whole cells gives their mean; C4 of a whole image gives C5's."""
    torch.manual_seed(0)
    x = torch.randint(0, 256, (2, 3, 224, 256), dtype=torch.uint8)
    trunk = Blocks()
    boxes = torch.tensor([[0.0, 0, 224, 224], [32, 0, 256, 224]])
    z = oknn.object_features(trunk, x, boxes, "c5")
    maps = trunk(common.normalise(x))[3]  # (2, 8, 7, 8)
    wanted = torch.stack([maps[:, :, :, :7].mean((2, 3)), maps[:, :, :, 1:].mean((2, 3))], 1)
    torch.testing.assert_close(z, F.normalize(wanted, dim=2))
    trunk, _, _ = frozen.frozen_trunk("random", "resnet18", 0, torch.device("cpu"))
    x = x[:, :, :, :224]
    z = oknn.object_features(trunk, x, torch.tensor([[0.0, 0, 224, 224]]), "c4")
    torch.testing.assert_close(
        z[:, 0], F.normalize(trunk(common.normalise(x))[3].mean((2, 3)), dim=1), rtol=1e-3, atol=1e-5
    )
    y = x.clone()
    y[:, :, :, 160:] = 0  # far outside of the box: seen by C4's receptive field alone
    box = torch.tensor([[0.0, 0, 112, 112]])
    assert not torch.equal(*(oknn.object_features(trunk, v, box, "c5") for v in (x, y)))


def test_object_features_are_pooled_from_seven_by_seven():
    """PAPER: 7 x 7. A parabola across C5: its mean over seven samples, between cells interpolated, is not that over six."""

    class Parabola(nn.Module):
        def forward(self, x, stages=4):
            return [None, None, None, torch.stack([torch.ones(14, 14), torch.arange(14.0).expand(14, 14) ** 2])[None]]

    box = torch.tensor([[64.0, 64, 256, 256]])  # cells 2 to 8
    z = oknn.object_features(Parabola(), torch.zeros(1, 3, 448, 448, dtype=torch.uint8), box, "c5")[0, 0]
    places = [2 + 6 * (i + 0.5) / 7 - 0.5 for i in range(7)]  # cell i has its middle at i + 0.5
    wanted = np.interp(places, np.arange(14), np.arange(14) ** 2).mean()
    assert (z[1] / z[0]).item() == pytest.approx(wanted, rel=1e-4)


def test_labels_hold_no_file_of_a_worker_open(coco):
    """A tensor of a worker is a file that is open: thousands of queries would be too many of them."""
    objects, trunk = frozen.CocoObjects(str(coco), "val2017"), Blocks((4, 8, 16, 32))
    for workers in (0, 1):
        variants = oknn.Variants(objects, 64, None, True, 0, "queries")
        found = list(oknn.all_features(trunk, variants, "c5", workers, torch.device("cpu"), "queries"))
        assert len(found) == 9 and not any(labels.is_shared() for _, labels in found)


OKNN = "--arch resnet18 --weights random --size 96 --neighbours 5 --workers 0".split()


def object_knn(data, out, *flags):
    (out / "results.json").unlink(missing_ok=True)  # of other settings
    oknn.main(["--data", str(data), "--output-dir", str(out), *OKNN, *flags])
    return {k: v for k, v in json.loads((out / "results.json").read_text()).items() if k not in ("command", "settings")}


def test_oknn_finds_objects_and_is_reproducible(coco, tmp_path, monkeypatch):
    """Same seed, same numbers, whatever workers and parts; another seed, other objects. Colours are easily told apart."""
    found = object_knn(coco, tmp_path)
    assert found["queries"] == 27 and found["bank"] == 14 * 3 + 1 and 33 < found["majority"] < 34
    fewer = object_knn(coco, tmp_path, "--objects", "2")
    assert fewer["bank"] == 28 and fewer != object_knn(coco, tmp_path, "--objects", "2", "--seed", "1")
    assert object_knn(coco, tmp_path, "--objects", "2") == fewer
    with monkeypatch.context() as patch:
        patch.setattr(oknn, "PART", 10)
        assert object_knn(coco, tmp_path, "--workers", "2") == found
    assert object_knn(coco, tmp_path, "--features", "c4")["O-KNN"] != found["O-KNN"]
    torch.manual_seed(0)
    monkeypatch.setattr(oknn, "frozen_trunk", lambda *_: (Blocks((4, 8, 16, 32)), None, "blocks"))
    found = object_knn(coco, tmp_path, "--size", "256")
    assert found["O-KNN"]["top1"] == 100 and found["O-KNN"]["top5"] == 100


def test_oknn_settings_reach_the_vote(coco, tmp_path, monkeypatch):
    """k and tau as given; the most frequent class is the bank's, not that of the queries."""
    shutil.copytree(coco, tmp_path / "coco")
    for split, instead in (("train2017", 7), ("val2017", 3)):  # of 40: so that each split has another majority
        path = tmp_path / "coco" / "annotations" / f"instances_{split}.json"
        content = json.loads(path.read_text())
        for annotation in content["annotations"]:
            annotation["category_id"] = instead if annotation["category_id"] == 40 else annotation["category_id"]
        path.write_text(json.dumps(content))
    seen, nobody, vote = [], oknn.nobody, oknn.vote
    monkeypatch.setattr(oknn, "nobody", lambda queries, k: seen.append(k) or nobody(queries, k))
    monkeypatch.setattr(oknn, "vote", lambda *args: seen.append(args[-1]) or vote(*args))
    found = object_knn(tmp_path / "coco", tmp_path / "out", "--neighbours", "3", "--temperature", "0.5")
    assert seen == [3, 3, 0.5, 0.5] and found["majority"] == pytest.approx(100 / 3)


def test_oknn_leaves_unreadable_images_out(coco, tmp_path, capsys):
    shutil.copytree(coco, tmp_path / "coco")
    (tmp_path / "coco" / "val2017" / "004.png").write_bytes(b"broken")
    found = object_knn(tmp_path / "coco", tmp_path / "out")
    assert found["queries"] == 27 - 3 and "unreadable image, it is left out: 004.png" in capsys.readouterr().out


def test_oknn_disturbs_bank_and_queries_or_the_queries_alone(coco, tmp_path, monkeypatch):
    views, real = {}, oknn.object_features
    monkeypatch.setattr(oknn, "object_features", lambda t, x, *rest: views[side].append(len(x)) or real(t, x, *rest))
    for side in ("both", "queries"):
        views[side] = []
        object_knn(coco, tmp_path, "--disturb", side)
    assert views == {"both": [2] * 9 + [2] * 14, "queries": [2] * 9 + [1] * 14}


def test_oknn_compares_like_with_like(coco, tmp_path, monkeypatch):
    """Features that name the box's colour, moved on by one in disturbed images: right where the bank is disturbed, too."""

    def colour(trunk, x, boxes, where):
        rows = [
            [
                view[:, y0 + 4 : y1 - 4, x0 + 4 : x1 - 4].float().mean((1, 2)).argmax()
                for x0, y0, x1, y1 in boxes.int().tolist()
            ]
            for view in x
        ]
        return F.one_hot((torch.tensor(rows) + torch.arange(len(x))[:, None]) % 3, 3).float()

    monkeypatch.setattr(oknn, "object_features", colour)
    monkeypatch.setattr(oknn, "SMALLEST", 16)
    for side, disturbed in (("both", 100), ("queries", 0)):
        found = object_knn(coco, tmp_path, "--disturb", side)
        assert found["O-KNN"]["top1"] == 100 and found["disturbed O-KNN"]["top1"] == disturbed


def test_oknn_on_scenes(tmp_path, capsys):
    found = object_knn("scenes:6", tmp_path, "--objects", "1", "--size", "96")
    assert found["bank"] == 6 and found["queries"] >= 4
    assert "6 images with objects for the bank, 2 for queries" in capsys.readouterr().out
    assert "a single image with objects" in error_of(
        oknn.main, "--data", "scenes:1", "--output-dir", tmp_path / "one", *OKNN
    )
    assert "--neighbours 0" in error_of(oknn.main, "--data", "scenes:6", *OKNN, "--neighbours", "0")
    scenes, earlier = frozen.SceneObjects(frozen.HELD_OUT, 4, 64, 0), harness.images.Scenes(4096, 64, 0)
    assert not np.array_equal(np.asarray(scenes[0].image), np.asarray(earlier[0][0]))
    assert (scenes[1].mask(0) == scenes[1].mask(0)).all() and scenes[1].mask(0).shape == (64, 64)


# ======================================================================================================================
# Coupling and position
# ======================================================================================================================


def test_canvases_of_pairs_and_grids():
    a, b = torch.full((3, 4, 4), 50, dtype=torch.uint8), torch.full((3, 4, 4), 90, dtype=torch.uint8)
    beside, alone = bias.pair_canvases(a, b)
    wanted = np.zeros((8, 8), int)
    wanted[2:6, :4] = 50
    assert (alone.numpy() == wanted).all()
    wanted[2:6, 4:] = 90
    assert (beside.numpy() == wanted).all()
    for (x0, y0, x1, y1), value in zip(bias.pair_boxes(4), (50, 90), strict=True):
        assert (beside[:, y0:y1, x0:x1] == value).all() and (beside == value).sum() == 3 * 16
    patch = torch.arange(12, dtype=torch.uint8).view(3, 2, 2)
    grid = bias.grid_canvas(patch)
    assert grid.shape == (3, 6, 6)
    assert all(torch.equal(grid[:, y : y + 2, x : x + 2], patch) for y in (0, 2, 4) for x in (0, 2, 4))


def test_cut_out():
    image = helpers.coordinate_image(256, 200)
    patch = bias.cut_out(image, (64, 50, 128, 150), None, 64)
    assert patch.shape == (3, 64, 64) and patch.dtype == torch.uint8
    assert abs(int(patch[0, 0, 0]) - 64) <= 1 and abs(int(patch[0, 0, -1]) - 127) <= 1
    assert abs(int(patch[1, -1, 0]) / 256 * 200 - 149) <= 2
    mask = np.zeros((200, 256), bool)
    mask[50:100, 64:128] = True
    masked = bias.cut_out(image, (64, 50, 128, 150), mask, 64)
    assert (masked[:, 34:] == 0).all() and torch.equal(masked[:, :30], patch[:, :30])
    assert bias.cut_out(image, (3.6, 4.2, 4.1, 5.0), None, 8).shape == (3, 8, 8)


def test_pairs_are_of_two_categories_and_drawn_from_seed_and_number(coco, tmp_path):
    objects = frozen.CocoObjects(str(coco), "val2017", masks=True)
    bias_min, bias.SMALLEST = bias.SMALLEST, 20
    try:
        canvases = bias.Canvases(objects, 32, 32, "box", 0)
        for i in range(12):
            beside, alone, grid = canvases[i]
            a, b = (beside[:, 16:48, x : x + 32].float().mean((1, 2)).argmax() for x in (0, 32))
            assert a != b and not alone[:, :, 32:].any() and torch.equal(alone[:, :, :32], beside[:, :, :32])
            assert torch.equal(grid[:, :32, :32], beside[:, 16:48, :32])
        assert torch.equal(bias.Canvases(objects, 32, 32, "box", 0)[7][0], canvases[7][0])
        assert not torch.equal(bias.Canvases(objects, 32, 32, "box", 1)[7][0], canvases[7][0])
        masked = bias.Canvases(objects, 32, 32, "mask", 0)[7][0]
        assert (
            not masked[:, 36:48].any() and masked[:, 16:30].any()
        )  # the lower half of each box is outside its outline
        objects.labels[:] = 3
        with pytest.raises(common.UserError, match="and of a second category: the data do for no pairs"):
            canvases[0]
        bias.SMALLEST = 200
        with pytest.raises(common.UserError, match="without an object of 200 pixels"):
            canvases[0]
    finally:
        bias.SMALLEST = bias_min


def test_coupling_rate_and_mean_cosine_in_closed_form():
    angle = torch.tensor([0.3, 0.8])
    b = torch.tensor([[1.0, 0], [2, 0]])
    at = lambda a: 3 * torch.stack([a.cos(), a.sin()], 1)  # noqa: E731
    rate = bias.coupling_rate(at(angle), at(torch.tensor([1.1, 0.8])), b)
    assert rate.tolist() == pytest.approx([math.cos(0.3) / math.cos(1.1), 1])
    places = torch.stack([torch.linspace(0, 0.8, 9).cos(), torch.linspace(0, 0.8, 9).sin()]).view(1, 2, 3, 3)
    others = [math.cos(0.4 - 0.1 * i) for i in range(9) if i != 4]
    assert bias.mean_cosine(7 * places).tolist() == pytest.approx([sum(others) / 8])
    table = bias.statistics(torch.tensor([[1.0, 2, 3, 4], [3, 2, 3, 4], [5, 2, 3, torch.inf]]))
    assert table["C2"] == {"mean": 3, "error": pytest.approx(2 / 3**0.5), "count": 3}
    assert table["C3"]["error"] == 0 and table["C5"] == {"mean": 4, "error": 0, "count": 2}
    table = bias.statistics(torch.tensor([[1.0, torch.nan, 3, 4]]))
    assert table["C2"] == {"mean": 1, "error": None, "count": 1}
    assert table["C3"] == {"mean": None, "error": None, "count": 0}


def test_box_and_grid_features_against_loops():
    maps = torch.randn(2, 5, 12, 12, generator=torch.Generator().manual_seed(0))
    found = bias.box_features(maps, (8, 16, 24, 40), 48)  # cells 2 to 5 across, 4 to 9 down
    wanted = torch.stack([maps[:, :, y, x] for y in range(4, 10) for x in range(2, 6)]).mean(0)
    torch.testing.assert_close(found, wanted)
    ramp = torch.stack([torch.ones(8, 8), torch.arange(8.0).expand(8, 8)])[None]
    found = bias.box_features(ramp, (8, 8, 22, 22), 32)  # from 2 to 5.5 cells; cell i covers i to i + 1
    assert found.tolist() == [pytest.approx([1, 3.25])]
    places = bias.grid_features(maps)
    for y in range(3):
        for x in range(3):
            cells = maps[:, :, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4]
            torch.testing.assert_close(places[:, :, y, x], cells.mean((2, 3)))


def random_canvases(side=128, count=3):
    rng = torch.Generator().manual_seed(0)
    a, b = (torch.randint(0, 256, (count, 3, side, side), generator=rng, dtype=torch.uint8) for _ in range(2))
    beside, alone = (torch.stack(x) for x in zip(*map(bias.pair_canvases, a, b), strict=True))
    return beside, alone, torch.stack([bias.grid_canvas(x[:, :96, :96]) for x in a])


class Padded(nn.Module):
    """Two 3 x 3 convolutions on top of Blocks, at all strides, with the given padding."""

    def __init__(self, mode):
        super().__init__()
        self.blocks = Blocks()
        convolution = lambda: nn.Conv2d(8, 8, 3, padding=1, padding_mode=mode)  # noqa: E731
        self.mix = nn.Sequential(convolution(), nn.ReLU(), convolution())

    def forward(self, x):
        return [self.mix(maps) for maps in self.blocks(x)]


def test_cells_that_see_their_own_pixels_alone_have_cr_1_and_mcs_1():
    """Exact in all stages, C5 included: 128 pixels end between two of its cells."""
    torch.manual_seed(0)
    rates, similarities = bias.measure(Blocks(), *random_canvases())
    assert rates.shape == similarities.shape == (3, 4)
    torch.testing.assert_close(rates, torch.ones(3, 4), rtol=0, atol=1e-6)
    torch.testing.assert_close(similarities, torch.ones(3, 4), rtol=0, atol=1e-6)


def test_padding_and_neighbours_show():
    """Zero-padding lowers MCS, the more the fewer cells there are; without a border it is 1. A neighbour moves CR."""
    torch.manual_seed(0)
    canvases = random_canvases()
    rates, similarities = bias.measure(Padded("zeros"), *canvases)
    assert (similarities < 1 - 1e-5).all() and (similarities[:, 3] < similarities[:, 0]).all()
    assert ((rates - 1).abs() > 1e-5).all() and ((rates[:, 3] - 1).abs() > (rates[:, 0] - 1).abs()).all()
    _, similarities = bias.measure(Padded("circular"), *canvases)
    torch.testing.assert_close(similarities, torch.ones(3, 4), rtol=0, atol=1e-6)


def test_a_neighbour_in_the_feature_of_a_raises_cr():
    """A trunk that adds a share of B's square to A's: the cosine with B rises, so the ratio is over 1."""

    class Mixing(Blocks):
        def forward(self, x, stages=4):
            return [maps + 0.3 * maps.flip(3) for maps in super().forward(x)]

    torch.manual_seed(0)
    canvases = random_canvases()
    canvases[0][:, 0, :, :128] //= 4  # A is less red than B
    canvases[1][:, 0, :, :128] //= 4
    rates, _ = bias.measure(Mixing(), *canvases)
    assert (rates > 1.001).all()


def test_names_of_weights():
    words = ["ours=runs/a=b.pth", "dir/resnet50.pth", "x=imagenet"]
    found = {"ours": "runs/a=b.pth", "resnet50": "dir/resnet50.pth", "x": "imagenet", "random": "random"}
    assert bias.parse_weights(words) == bias.parse_weights([*words, "random"]) == found
    assert bias.parse_weights(["init=random"]) == {"init": "random"}
    for words in (["a/resnet50.pth", "b/resnet50.pth"], ["=x.pth"], ["x="], ["random=a.pth"]):
        with pytest.raises(common.UserError, match="write NAME=FILE"):
            bias.parse_weights(words)


BIAS = "--arch resnet18 --count 18 --pair-size 64 --grid-size 32".split()


def test_bias_compares_backbones_and_draws(tmp_path, capsys):
    torch.save(common.ResNetTrunk("resnet18").state_dict(), tmp_path / "other.pth")
    flags = ["--data", "scenes:8", *BIAS, "--output-dir", str(tmp_path / "out")]
    bias.main([*flags, "--weights", f"other={tmp_path / 'other.pth'}", "random"])
    assert set(os.listdir(tmp_path / "out")) == {"bias.png", "coupling.png", "position.png", "results.json"}
    for name in ("bias.png", "coupling.png", "position.png"):
        assert min(Image.open(tmp_path / "out" / name).size) > 200
    results = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    assert list(results) == ["other", "random"] and results["other"] != results["random"]
    for result in results.values():
        assert all(result[kind][stage]["count"] == 18 for kind in ("CR", "MCS") for stage in ("C2", "C3", "C4", "C5"))
        means = [stage["mean"] for stage in result["MCS"].values()]
        assert means == sorted(means, reverse=True) and means[-1] < 0.99  # deeper stages tell more of the place
    text = capsys.readouterr().out
    assert text.count("CR ") == 2 and f"{results['random']['CR']['C5']['mean']:.4f} +-" in text
    (tmp_path / "out" / "results.json").unlink()
    bias.main([*flags, "--weights", f"other={tmp_path / 'other.pth'}"])  # random initialisation comes by itself
    assert json.loads((tmp_path / "out" / "results.json").read_text())["results"] == results
    assert not harness.pictures.pyplot().get_fignums()
    assert "multiple of 32" in error_of(bias.main, *flags, "--weights", "random", "--grid-size", "48")


def test_bias_draws_what_it_measures_on_the_canvases_asked_for(coco, tmp_path, monkeypatch):
    """Each plot has the curves of its own measure; flags reach the canvases; pairs need two categories."""
    figures, asked = {}, []
    monkeypatch.setattr(
        harness.pictures, "save_figure", lambda figure, path, dpi: figures.update({os.path.basename(path): figure})
    )
    canvases = bias.Canvases
    monkeypatch.setattr(bias, "Canvases", lambda *args: asked.append(args[1:]) or canvases(*args))
    flags = ["--data", str(coco), *BIAS, "--count", "3", "--output-dir", str(tmp_path), "--weights", "random"]
    monkeypatch.setattr(bias, "SMALLEST", 16)
    bias.main([*flags, "--cut", "box", "--seed", "5"])
    (tmp_path / "results.json").unlink()
    bias.main(flags)
    assert asked == [(64, 32, "box", 5), (64, 32, "mask", 0)]
    result = json.loads((tmp_path / "results.json").read_text())["results"]["random"]
    for axis, kind, title in zip(
        figures["bias.png"].axes, ("CR", "MCS"), ("coupling rate", "mean cosine similarity"), strict=True
    ):
        (container,) = axis.containers
        assert axis.get_title() == title and container.get_label() == "random"
        assert container.lines[0].get_ydata().tolist() == [stage["mean"] for stage in result[kind].values()]
        bars = [np.ptp(segment[:, 1]) / 4 for segment in container.lines[2][0].get_segments()]
        assert bars == pytest.approx([stage["error"] for stage in result[kind].values()])
    path = tmp_path / "coco" / "annotations" / "instances_val2017.json"
    shutil.copytree(coco, tmp_path / "coco")
    path.write_text(re.sub('"category_id": [0-9]+', '"category_id": 3', path.read_text()))
    message = error_of(
        bias.main, "--data", tmp_path / "coco", *BIAS, "--output-dir", tmp_path / "out", "--weights", "random"
    )
    assert "all objects are of one category, a pair needs two" in message
    harness.pictures.pyplot().close("all")


def test_bias_where_a_measure_does_not_exist(tmp_path, capsys, monkeypatch):
    """Features of A alone and B that have nothing in common: no CR, neither in the line nor in the plot nor in the file."""
    nothing = torch.full((1, 4), torch.nan)
    monkeypatch.setattr(bias, "measure", lambda *_: (nothing, torch.ones(1, 4)))
    bias.main(["--data", "scenes:8", *BIAS, "--count", "1", "--weights", "random", "--output-dir", str(tmp_path)])
    text = (tmp_path / "results.json").read_text()
    assert json.loads(text)["results"]["random"]["CR"]["C2"] == {"mean": None, "error": None, "count": 0}
    assert "NaN" not in text and "CR  C2 nan +- nan" in capsys.readouterr().out and (tmp_path / "bias.png").exists()


# ======================================================================================================================
# All probes
# ======================================================================================================================


def test_frozen_trunk(tmp_path):
    device = torch.device("cpu")
    trunk, state, line = frozen.frozen_trunk("random", "resnet18", 0, device)
    assert not trunk.training and not any(p.requires_grad for p in trunk.parameters()) and "random" in line
    assert_same(dict(frozen.frozen_trunk("random", "resnet18", 0, device)[1]), state)
    assert not torch.equal(
        frozen.frozen_trunk("random", "resnet18", 1, device)[1]["conv1.weight"], state["conv1.weight"]
    )
    half = {f"module.encoder_q.{name}": t.half() if t.is_floating_point() else t for name, t in state.items()}
    torch.save({"state_dict": half}, tmp_path / "moco.pth.tar")
    loaded, copy, _ = frozen.frozen_trunk(str(tmp_path / "moco.pth.tar"), "resnet18", 0, device)
    assert torch.equal(loaded.conv1.weight, state["conv1.weight"].half().float())
    linear.require_frozen(loaded, copy)
    loaded.bn1.running_mean += 1
    with pytest.raises(RuntimeError, match="1 tensors, the first is bn1.running_mean"):
        linear.require_frozen(loaded, copy)


@pytest.mark.parametrize("main, flags", [(oknn.main, OKNN), (bias.main, [*BIAS, "--weights", "random"])])
def test_results_of_other_settings_are_not_replaced(main, flags, tmp_path):
    flags = ["--data", "scenes:5", *flags, "--output-dir", str(tmp_path)]
    main(flags)
    before = (tmp_path / "results.json").read_bytes()
    message = error_of(main, *flags, "--seed", "3", "--data", "scenes:6")
    assert "results of other settings are there (data 'scenes:5' -> 'scenes:6', seed 0 -> 3)" in message
    assert (tmp_path / "results.json").read_bytes() == before
    main([*flags, "--workers", "1"] if main is oknn.main else flags)  # the same, again
    main([*flags[:-1], f"{tmp_path}/."])  # the folder in other words
    for other in ("[]", '{"settings": ["a"]}', "{"):
        (tmp_path / "results.json").write_text(other)
        assert "not the results of this probe" in error_of(main, *flags)


def test_probes_of_one_process_refuse_several(monkeypatch, tmp_path):
    monkeypatch.setattr(harness.legacy, "start_processes", lambda: harness.legacy.World(0, 2, 0, torch.device("cpu")))
    for main in (oknn.main, bias.main):
        message = error_of(main, "--data", "scenes:4", "--weights", "random", "--output-dir", tmp_path)
        assert "without torchrun" in message


@pytest.mark.parametrize("module", [linear, oknn, bias])
def test_no_dead_flags_and_help_for_every_flag(module):
    source = (ROOT / module.__name__.replace(".", "/")).with_suffix(".py").read_text()
    body = source.split("    return args\n", 1)[1]
    names = re.findall(r'flag\("--([a-z-]+)".*help="([^"]{9,})', source)
    assert len(names) == len(re.findall(r'flag\("--', source)) >= 10
    for name, _ in names:
        name = name.replace("-", "_")
        assert f"args.{name}" in body or module is linear and name in linear.SETTINGS, name


def test_memory_of_the_object_knn_is_measured_on_the_real_probe():
    text = run("bench.memory", "--scale", "0.001", "--bank", "50")
    for line in ("after the import", "after the queries", "after the bank"):
        assert re.search(rf"{line}: [0-9.]+ GB", text)
    assert "118 images with objects for the bank, 5 for queries" in text
    assert "35 queries, 50 objects in the bank" in text
