"""What tests/faults.py found that no quick test noticed: small wrong behaviours, each caught in seconds."""

import contextlib
import importlib
import json
import runpy
import sys
from functools import partial

import numpy as np
import pytest
import torch
from helpers import assert_same, checkpoint, keep_signals, log_lines  # noqa: F401
from PIL import Image

import common
import harness.images
import harness.legacy
import harness.pictures
import harness.proposals
import harness.run
import harness.weights
import setsim
from probes import linear

SMALL = "--data scenes:8 --arch resnet18 --size 64 --batch-size 4 --workers 0"
SMALL += " --epochs 2 --lr 0.5 --print-freq 1 --save-every 9"
MOCO = "--queue-size 5 --amp fp16"  # the queue wraps around; with fp16 there is a scale to be kept
RUNS = {
    "setsim": f"{SMALL} {MOCO}",
    "resim": f"{SMALL} {MOCO} --levels c4 --window 16 16",
    "d3ssl": f"{SMALL} {MOCO}",
}


@pytest.fixture
def training_alone(monkeypatch):
    """Nothing is measured or drawn, which takes most of the time. Groups are of two images."""
    monkeypatch.setattr(harness.run.Run, "measure", lambda *_: None)
    monkeypatch.setattr(harness.pictures, "draw_curves", lambda *_: None)
    monkeypatch.setattr(common, "GROUP", 2)


@pytest.mark.parametrize("script", RUNS)
def test_a_run_in_two_parts_is_the_whole_run(script, training_alone, tmp_path, monkeypatch):
    """Weights, queue, optimiser, scale and step, bit for bit; the learning rate stays as it is within an epoch."""
    module = importlib.import_module(script)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # CPUs are slow at fp16
    for name, parts in (("whole", (3,)), ("parts", (1, 3))):
        for steps in parts:
            module.train([*RUNS[script].split(), "--output-dir", str(tmp_path / name), "--steps", str(steps)])
    whole, parts = checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "parts")
    assert whole["step"] == 3 and whole["scaler"]["_growth_tracker"] == 3
    for name in ("model", "optimizer", "scaler", "step"):
        assert_same(parts[name], whole[name], name)
    rates = [line["lr"] for line in log_lines(tmp_path / "parts") if "loss" in line]
    assert rates == pytest.approx([0.5 * 4 / 256 * share for share in (1, 1, 0.5)])


def test_predictors_keep_their_rate_and_everything_decays(training_alone, tmp_path, monkeypatch):
    """SetSim on SimSiam after the second of two epochs: half the rate but for the predictors; weight decay on norms, too."""
    made, sgd = [], torch.optim.SGD
    monkeypatch.setattr(torch.optim, "SGD", lambda *args, **kwargs: made.append(sgd(*args, **kwargs)) or made[-1])
    setsim.train([*f"{SMALL} --framework simsiam --steps 3".split(), "--output-dir", str(tmp_path)])
    decaying, constant = made[0].param_groups
    lr = 0.5 * 4 / 256
    assert (decaying["lr"], constant["lr"]) == (pytest.approx(lr / 2), lr)
    assert sum(p.numel() for p in constant["params"]) == 2 * (512 * 128 + 2 * 128 + 128 * 512 + 512)
    assert [group["weight_decay"] for group in made[0].param_groups] == [1e-4, 1e-4]
    assert any(p.dim() == 1 for p in decaying["params"])


def test_the_two_views_are_different_draws():
    """Of the same image, each with its own crop and colours."""
    pixels = np.random.default_rng(0).integers(0, 256, (60, 70, 3), np.uint8)
    views = harness.images.Views([(Image.fromarray(pixels), 0)], partial(setsim.two_views, size=32), 0)
    for epoch in range(3):
        view_q, view_k, window_q, window_k, *_ = views[epoch, 0]
        assert not torch.equal(view_q, view_k) and not torch.equal(window_q, window_k)


def test_unshuffle_undoes_shuffle():
    """A cycle of five: its inverse is another permutation."""
    x, permutation = torch.arange(5.0), torch.tensor([1, 2, 3, 4, 0])
    assert torch.equal(common.shuffle(x, permutation), torch.tensor([1.0, 2, 3, 4, 0]))
    assert torch.equal(common.unshuffle(common.shuffle(x, permutation), permutation), x)


def load_of_a_method(folder, script, settings):
    return harness.weights.load_checkpoint(f"{folder}/checkpoint.pth", script, settings)


def load_of_a_transfer_script(folder, script, settings):
    return harness.legacy.Checkpoints(str(folder), script, settings).load()


@pytest.mark.parametrize("load", [load_of_a_method, load_of_a_transfer_script])
def test_a_checkpoint_of_other_settings_or_another_script_is_refused(load, tmp_path):
    settings = {"lr": 1.0, "mu": 0}
    harness.legacy.Checkpoints(str(tmp_path), "a", settings).save({}, step=2)
    assert load(tmp_path, "a", settings)["step"] == 2
    with pytest.raises(common.UserError, match="lr 1.0 -> 2.0"):
        load(tmp_path, "a", {"lr": 2.0, "mu": 0})
    with pytest.raises(common.UserError, match="a checkpoint of a.py"):
        load(tmp_path, "b", settings)


def test_linear_features_are_plain_means_over_cells():
    """Neither normalised nor scaled: the learning rate of 30 is right for these alone."""
    maps = torch.randn(2, 5, 3, 4, generator=torch.Generator().manual_seed(0))
    found = linear.features(lambda x: [None, maps], torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
    torch.testing.assert_close(found, torch.stack([sum(maps[:, :, i, j] for i in range(3) for j in range(4)) / 12])[0])


def test_recall_of_proposals_at_its_two_limits(tmp_path, monkeypatch, capsys):
    """Four objects that boxes overlap by 1, 0.6, 0.4 and 0: half are found at 0.5, a quarter at 0.7."""
    Image.new("RGB", (100, 100)).save(tmp_path / "0.png")
    boxes = [[0, 0, 20, 10], [0, 20, 20, 10], [0, 40, 20, 10], [60, 60, 20, 10]]  # x, y, w, h
    objects = [
        {"id": i + 1, "image_id": 1, "category_id": 1, "bbox": b, "area": 200, "iscrowd": 0}
        for i, b in enumerate(boxes)
    ]
    content = {"images": [{"id": 1, "file_name": "0.png", "width": 100, "height": 100}], "annotations": objects}
    (tmp_path / "a.json").write_text(json.dumps(content | {"categories": [{"id": 1, "name": "thing"}]}))
    found = np.array([[0, 0, 20, 10], [0, 20, 12, 30], [0, 40, 8, 50]])
    monkeypatch.setattr(harness.proposals, "search", lambda image, strategy: found)
    monkeypatch.setattr(harness.proposals, "keep", lambda boxes, width, height: (boxes, 0))
    monkeypatch.setattr(sys, "argv", ["recall", "--images", str(tmp_path), "--annotations", str(tmp_path / "a.json")])
    runpy.run_module("bench.recall", run_name="__main__")
    text = capsys.readouterr().out
    for limit, recall in ((0.5, 0.5), (0.7, 0.25)):
        assert f"all objects (4), IoU {limit}: recall {recall:.3f} of all boxes, {recall:.3f} of those kept" in text
