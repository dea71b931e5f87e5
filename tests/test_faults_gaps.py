# SPDX-License-Identifier: MIT
"""Small wrong behaviours that tests/faults.py plants and that no other quick test notices."""

import json
import runpy
import sys
from functools import partial

import numpy as np
import torch
from PIL import Image

import harness.images
import harness.proposals
import setsim
from probes import linear


def test_the_two_views_are_different_draws():
    """Of the same image, each with its own crop and colours."""
    pixels = np.random.default_rng(0).integers(0, 256, (60, 70, 3), np.uint8)
    views = harness.images.Views([(Image.fromarray(pixels), 0)], partial(setsim.two_views, size=32), 0)
    for epoch in range(3):
        view_q, view_k, window_q, window_k, *_ = views[epoch, 0]
        assert not torch.equal(view_q, view_k) and not torch.equal(window_q, window_k)


def test_linear_features_are_plain_means_over_cells():
    """Neither normalised nor scaled: the learning rate of 30 is right for these alone."""
    maps = torch.randn(2, 5, 3, 4, generator=torch.Generator().manual_seed(0))
    found = linear.features(lambda x: [None, maps], torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
    torch.testing.assert_close(found, sum(maps[:, :, i, j] for i in range(3) for j in range(4)) / 12)


def test_recall_of_proposals_at_its_two_limits(tmp_path, monkeypatch, capsys):
    """Four objects that boxes overlap by 1, 0.6, 0.4 and 0: half are found at 0.5, a quarter at 0.7."""
    Image.new("RGB", (100, 100)).save(tmp_path / "0.png")
    objects = [[0, 0, 20, 10], [0, 20, 20, 10], [0, 40, 20, 10], [60, 60, 20, 10]]  # x, y, w, h
    rows = [
        {"id": i, "image_id": 1, "category_id": 1, "bbox": x, "area": 200, "iscrowd": 0} for i, x in enumerate(objects)
    ]
    content = {"images": [{"id": 1, "file_name": "0.png", "width": 100, "height": 100}], "annotations": rows}
    (tmp_path / "a.json").write_text(json.dumps(content | {"categories": [{"id": 1, "name": "thing"}]}))
    found = np.array([[0, 0, 20, 10], [0, 20, 12, 30], [0, 40, 8, 50]])
    monkeypatch.setattr(harness.proposals, "search", lambda image, strategy: found)
    monkeypatch.setattr(harness.proposals, "keep", lambda boxes, width, height: (boxes, 0))
    monkeypatch.setattr(sys, "argv", ["recall", "--images", str(tmp_path), "--annotations", str(tmp_path / "a.json")])
    runpy.run_module("bench.recall", run_name="__main__")
    text = capsys.readouterr().out
    for limit, recall in ((0.5, 0.5), (0.7, 0.25)):
        assert f"all objects (4), IoU {limit}: recall {recall:.3f} of all boxes, {recall:.3f} of those kept" in text
