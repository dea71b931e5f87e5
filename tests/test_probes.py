# SPDX-License-Identifier: MIT
"""probes/: linear evaluation, object k-NN, coupling rate and positional bias."""

import json
import math
import os
import random
import shutil
import signal
import sys
import tracemalloc
from types import SimpleNamespace

import helpers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from helpers import ROOT, LargestTensor, assert_same, checkpoint, log_lines, signals_given_back
from PIL import Image, ImageOps
from torch import nn
from torchvision import transforms
from torchvision.transforms import functional as TF

import common
import harness.run
from common import UserError
from harness.images import BadImages, Scenes
from probes import bias, frozen, linear, oknn

pytestmark = pytest.mark.usefixtures("tiny_resnet", "quick")
COLOURS, CPU = [(200, 40, 40), (40, 180, 60), (50, 60, 210)], torch.device("cpu")


def noisy(colour, size, rng):
    """A picture of one colour with a little noise."""
    return Image.fromarray((np.array(colour) + rng.integers(-25, 26, (*size[::-1], 3))).clip(0, 255).astype(np.uint8))


def results_of(folder):
    return json.loads((folder / "results.json").read_text())


# ---- linear evaluation

TINY = "--arch resnet18 --size 32 --batch-size 8 --lr 1 --epochs 3 --workers 0 --print-freq 1 --weights random".split()


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


@pytest.fixture(scope="module")
def finished(classes, tiny_resnet, tmp_path_factory):
    """A run of 9 steps (3 epochs of 3), never interrupted."""
    with signals_given_back():
        probe(classes, folder := tmp_path_factory.mktemp("linear"))
    return folder


def evaluations_of(folder):
    return [line["result"] for line in log_lines(folder) if "result" in line]


def test_linear_probe_on_separable_features_reaches_100_percent(finished):
    results, lines = results_of(finished), log_lines(finished)
    assert (results["top1"], results["top5"], results["best_top1"], results["images"]) == (100, 100, 100, 21)
    assert [(e["epoch"], e["step"]) for e in results["evaluations"]] == [(1, 3), (2, 6), (3, 9)]
    assert evaluations_of(finished) == results["evaluations"] and results["settings"] == lines[0]["settings"]
    cosine = [(1 + math.cos(math.pi * epoch / 3)) / 2 for epoch in range(3) for _ in range(3)]
    assert [32 * line["lr"] for line in lines if "loss" in line] == pytest.approx(cosine)  # 8 of 256 images


def test_linear_results_are_those_of_the_exported_classifier(classes, tmp_path):
    """fc.pth on torchvision's own ResNet and transforms, image by image; after one step, not yet perfect."""
    probe(classes, tmp_path, "--steps", 1, "--lr", 0.02)
    network, found = torchvision.models.resnet18(), results_of(tmp_path)
    network.fc = nn.Linear(128, 3)
    trunk = frozen.frozen_trunk("random", "resnet18", 0, CPU).state_dict()
    network.eval().load_state_dict(trunk | torch.load(tmp_path / "fc.pth"))
    normalise = transforms.Normalize(common.PIXEL_MEAN, common.PIXEL_STD)
    cut = transforms.Compose([transforms.Resize(37), transforms.CenterCrop(32), transforms.ToTensor(), normalise])
    files = [(k, f"{name}/{i}.png") for k, name in enumerate(("a", "b/deep", "train")) for i in range(7)]
    right = [network(cut(Image.open(classes / "val" / file))[None]).argmax() == k for k, file in files]
    assert found["top1"] == pytest.approx(100 * np.mean(right)) and 0 < found["top1"] < 100
    assert found["evaluations"][0]["epoch"] == pytest.approx(1 / 3)


def test_linear_schedules():
    """Values of the papers: 90 epochs of cosine; MoCo's 100 epochs with steps at 60 and 80."""
    setsim, moco = (linear.get_args(f"--data x --weights random{x}".split()) for x in ("", " --preset moco"))
    assert [(a.epochs, a.lr, a.batch_size, a.size) for a in (setsim, moco)] == [(90, 30, 256, 224), (100, 30, 256, 224)]
    rates = [linear.learning_rate("moco", 30, epoch, 100) for epoch in (0, 59, 60, 79, 80, 99)]
    assert rates == pytest.approx([30, 30, 3, 3, 0.3, 0.3])
    assert [linear.learning_rate("setsim", 30, e, 90) for e in (0, 45, 60)] == pytest.approx([30, 15, 7.5])


def test_linear_counts_what_is_right(monkeypatch, capsys):
    """Top-1 and top-5 of seven classes against a loop; what stands in for an unreadable image is not counted."""
    rng, names = torch.Generator().manual_seed(0), SimpleNamespace(name=str)
    logits, labels = torch.randn(50, 7, generator=rng), torch.randint(7, (50,), generator=rng)
    rows = logits, labels, torch.arange(50), (torch.arange(50) == 20).long()
    monkeypatch.setattr(linear, "features", lambda trunk, x, amp: x)
    run = SimpleNamespace(rank=0, device=CPU, args=SimpleNamespace(amp="none"), signalled=0)
    bad = BadImages(OneOfMany(50), outcome="it is left out")
    found = linear.evaluate(run, None, nn.Identity(), list(zip(*(x.split(8) for x in rows), strict=True)), bad)
    ranks = [sum(row[c] > row[label] for c in range(7)) for row, label in zip(logits, labels, strict=True)]
    wanted = {f"top{n}": 100 * sum(rank < n for i, rank in enumerate(ranks) if i != 20) / 49 for n in (1, 5)}
    assert found == {name: pytest.approx(value) for name, value in wanted.items()} | {"images": 49}
    assert 0 < found["top1"] < found["top5"] < 100
    assert capsys.readouterr().out == "unreadable image, it is left out: 20\n"
    with pytest.raises(UserError, match="none of the 1 test images can be read"):
        linear.evaluate(run, None, nn.Identity(), [[x[20:21] for x in rows]], BadImages(OneOfMany(1)))
