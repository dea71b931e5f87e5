# SPDX-License-Identifier: MIT
"""tools/figures.py: what is drawn, read back from matplotlib's objects, is what runs logged and the scripts compute."""

import functools
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import ROOT, keep_signals, write_images
from PIL import Image
from torchvision.transforms import functional as TF

import common
import harness.images
import harness.legacy
import harness.look
import harness.pictures
import harness.run
import harness.weights
import setsim
import transfer_det as det
import transfer_seg as seg
from common import UserError
from tools import figures

assert keep_signals  # a fixture: it gives signals back that main() takes over
WORLD = harness.legacy.World(0, 1, 0, torch.device("cpu"))
THRESHOLDS = [50, 55, 60, 65, 70, 75, 80, 85, 90, 95]


@pytest.fixture(autouse=True)
def close_figures():
    yield
    harness.pictures.pyplot().close("all")


def drawn(*words):
    """The figure of a command, before it is saved."""
    args = figures.get_args([*map(str, words)])
    return figures.DRAWN[args.command](args)


def write_lines(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path.parent


def panels(figure):
    """{title without what is dashed: axis}"""
    return {axis.get_title().split(" (")[0]: axis for axis in figure.axes}


def lines_of(axis):
    """{label: [(x, y), ...]}"""
    return {line.get_label(): list(zip(*map(list, line.get_data()), strict=True)) for line in axis.get_lines()}


def pixels(axis, number=0):
    return np.asarray(axis.images[number].get_array())


# ---------------------------------------------------------------------------------------------------------- curves


def log_of(start, chance, **others):
    """A log as the scripts write it: header, probe, three steps, probe."""
    lines = [{"command": "python setsim.py", "settings": {"lr": 9.0}}]
    lines += [{"step": 0, "probe": {"hits": 0.2 + start / 100, "chance": 0.125, "cells": 77}}]
    for step in (10, 20, 30):
        values = {"loss": start - step / 40, "lr": 0.5, "std_image": 0.01 * step, "images_per_s": 88.0, "bad_images": 0}
        values |= {"loss_chance": chance and chance + step / 100, "std_spread": 0.0625, "data_share": 0.5, "objects": 9}
        lines.append({"step": step, "epoch": 0.25, **values, **others})
    return [*lines, {"step": 30, "probe": {"hits": 0.5 + start / 100, "chance": 0.125, "cells": 77}}]


def test_curves_have_a_panel_for_each_value_and_a_line_for_each_run(tmp_path):
    one = write_lines(tmp_path / "one" / "log.jsonl", log_of(5.0, 6.5, positives=4.0))
    two = write_lines(tmp_path / "two" / "log.jsonl", log_of(3.0, None))
    (two / "log.jsonl").open("a").write('{"step": 40, "lo')  # torn by a kill
    figure = drawn("curves", one, two, "--names", "first", "second")
    found = panels(figure)
    assert list(found) == ["hits", "loss", "std_image", "positives", "lr"]
    for name, start in (("first", 5.0), ("second", 3.0)):
        assert lines_of(found["loss"])[name] == [(step, start - step / 40) for step in (10, 20, 30)]
        assert lines_of(found["hits"])[name] == [(0, 0.2 + start / 100), (30, 0.5 + start / 100)]
        assert lines_of(found["std_image"])[name] == [(10, 0.1), (20, 0.2), (30, 0.3)]
    assert lines_of(found["positives"])["first"] == [(10, 4.0), (20, 4.0), (30, 4.0)]
    assert lines_of(found["positives"])["second"] == []
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["first", "second"]
    colours = [line.get_color() for line in legend.get_lines()]
    assert len(set(colours)) == 2
    for name, axis in found.items():
        drawn_in = {line.get_label(): line.get_color() for line in axis.get_lines()}
        assert [drawn_in["first"], drawn_in["second"]] == colours, name


def test_yardsticks_are_dashed_in_the_panels_they_belong_to(tmp_path):
    one = write_lines(tmp_path / "one" / "log.jsonl", log_of(5.0, 6.5))
    two = write_lines(tmp_path / "two" / "log.jsonl", log_of(3.0, None))
    figure = drawn("curves", one, two)
    dashed = {name: {k: v for k, v in lines_of(axis).items() if ": " in k} for name, axis in panels(figure).items()}
    assert dashed["loss"] == {"one: loss_chance": [(0, 6.8), (1, 6.8)]}  # the last; the second has none, as SimSiam
    assert dashed["std_image"] == {f"{name}: std_spread": [(0, 0.0625), (1, 0.0625)] for name in ("one", "two")}
    assert dashed["hits"] == {f"{name}: chance": [(0, 0.125), (1, 0.125)] for name in ("one", "two")}
    assert dashed["lr"] == {}
    assert figure.axes[1].get_title() == "loss (dashed: loss_chance)"
    for axis in figure.axes:
        for line in axis.get_lines():
            assert (line.get_linestyle() == "--") == (": " in line.get_label())
            assert line.get_linewidth() < 1 or ": " not in line.get_label()


def test_many_runs_are_told_apart():
    styles = [tuple(figures.line_of(place).values()) for place in range(20)]
    assert len(set(styles)) == 20


def test_each_methods_yardsticks_are_those_of_its_own_curves():
    """Names as the methods log them, against the panels of their curves.png."""
    of_setsim = ["loss", "loss_image", "loss_set", "loss_chance", "std_image", "std_dense", "std_spread", "rows"]
    found = {
        name: figures.yardstick(name, of_setsim) for name in of_setsim if "chance" not in name and "spread" not in name
    }
    assert found == {
        "loss": None, "loss_image": "loss_chance", "loss_set": "loss_chance", "std_image": "std_spread",
        "std_dense": "std_spread", "rows": None,
    }  # fmt: skip
    of_resim = "loss loss_image loss_c4 loss_chance chance_c4 std_image std_c4 std_spread spread_c4 valid_c4".split()
    found = {
        name: figures.yardstick(name, of_resim) for name in ("loss", "loss_image", "loss_c4", "std_image", "std_c4")
    }
    assert found == {
        "loss": None, "loss_image": "loss_chance", "loss_c4": "chance_c4", "std_image": "std_spread",
        "std_c4": "spread_c4",
    }  # fmt: skip
    of_d3ssl = "loss loss_dc loss_dp loss_chance std std_spread shift".split()
    found = {name: figures.yardstick(name, of_d3ssl) for name in ("loss", "loss_dc", "loss_dp", "std", "shift")}
    assert found == {"loss": "loss_chance", "loss_dc": None, "loss_dp": None, "std": "std_spread", "shift": None}


# --------------------------------------------------------------------------------------------------------------- ap


def result(seed, protocol="scenes, Mask R-CNN R18-FPN, protocol A", shift=0.0):
    rng = np.random.default_rng(seed)
    kinds = {
        kind: {"AP": 1.0, "AP_by_IoU": {str(t): float(rng.uniform(0, 50)) + shift for t in THRESHOLDS}}
        for kind in ("box", "mask", "keypoints")
    }
    return {"seed": seed, "step": 9, "weights": "random", "protocol": protocol, **kinds}


def values(trials, kind):
    return np.array([[trial[kind]["AP_by_IoU"][str(t)] for t in THRESHOLDS] for trial in trials])


def test_ap_is_the_mean_over_trials_and_the_gain_is_over_the_first_run(tmp_path):
    trials = {"base": [result(0)], "ours": [result(1), result(2), result(6)], "other": [result(3), result(4)]}

    def half(bars):
        """Half the length of each error bar that is drawn."""
        return np.array([np.ptp(segment[:, 1]) / 2 for bar in bars for segment in bar.get_segments() if len(segment)])

    runs = [write_lines(tmp_path / name / "results.jsonl", lines) for name, lines in trials.items()]
    figure = drawn("ap", *runs)
    found = panels(figure)
    assert list(found) == [f"{k}: {what}" for k in ("box", "mask", "keypoints") for what in ("AP", "gain over base")]
    for kind in ("box", "mask", "keypoints"):
        means = {name: values(lines, kind).mean(0) for name, lines in trials.items()}
        axis = found[f"{kind}: AP"]
        for container, name in zip(axis.containers, trials, strict=True):
            line, _, bars = container.lines
            assert np.allclose(line.get_xdata(), np.array(THRESHOLDS) / 100)
            assert np.allclose(line.get_ydata(), means[name])
            if name != "base":
                assert np.allclose(half(bars), values(trials[name], kind).std(0, ddof=1))
            else:
                assert not half(bars).size  # of one trial
        for container, name in zip(found[f"{kind}: gain over base"].containers, trials, strict=True):
            assert np.allclose(container.lines[0].get_ydata(), means[name] - means["base"])
            assert not half(container.lines[2]).size  # unknown with one trial of base
    assert [found[f"{kind}: AP"].get_xlabel() for kind in ("box", "keypoints")] == [
        "threshold of IoU",
        "threshold of OKS",
    ]
    texts = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert texts == ["base", "ours, mean of 3", "other, mean of 2"]
    assert figure.get_suptitle() == trials["base"][0]["protocol"]
    found = panels(drawn("ap", *runs[1:]))
    first, second = (values(trials[name], "box") for name in ("ours", "other"))
    ours, other = found["box: gain over ours"].containers
    assert not ours.lines[2] and np.allclose(other.lines[0].get_ydata(), second.mean(0) - first.mean(0))
    assert np.allclose(half(other.lines[2]) ** 2, first.var(0, ddof=1) / 3 + second.var(0, ddof=1) / 2)


def test_ap_of_one_run_has_no_gain(tmp_path):
    run = write_lines(tmp_path / "a" / "results.jsonl", [result(0)])
    assert [axis.get_title() for axis in drawn("ap", run).axes] == ["box: AP", "mask: AP", "keypoints: AP"]


def test_ap_of_kinds_that_all_runs_have(tmp_path):
    """A run with boxes alone beside one with masks too; nothing in common is an error."""
    boxes = {k: v for k, v in result(1).items() if k not in ("mask", "keypoints")}
    masks = {k: v for k, v in result(2).items() if k not in ("box", "keypoints")}
    lines = {"all": result(0), "boxes": boxes, "masks": masks}
    runs = [write_lines(tmp_path / name / "results.jsonl", [line]) for name, line in lines.items()]
    assert list(panels(drawn("ap", *runs[:2]))) == ["box: AP", "box: gain over all"]
    with pytest.raises(UserError, match="no results of one kind"):
        drawn("ap", *runs[1:])


def test_differing_protocols_are_named_and_not_drawn(tmp_path):
    one = write_lines(tmp_path / "one" / "results.jsonl", [result(0, "COCO, protocol A")])
    two = write_lines(
        tmp_path / "two" / "results.jsonl", [result(1, "COCO, protocol A"), result(2, "COCO, protocol B")]
    )
    with pytest.raises(
        UserError, match="not comparable.*X: COCO, protocol A; Y: COCO, protocol A and COCO, protocol B"
    ):
        drawn("ap", one, two, "--names", "X", "Y")
    with pytest.raises(UserError, match="not comparable"):
        drawn("ap", two)


# ---------------------------------------------------------------------------------------------------------- matches


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Eight images, two of which are drawn by `--count 2`: numbers 0 and 4."""
    folder = write_images(tmp_path_factory.mktemp("photos"), 8, size=(96, 64))
    (folder / "0007.png").rename(folder / "seven.jpg")
    return folder


def a_checkpoint(path, *flags):
    """checkpoint.pth of setsim.py, whose networks differ and have running statistics."""
    args = setsim.get_args(["--data", "x", "--arch", "resnet18", "--size", "96", *flags])
    method = setsim.build(args, WORLD.device)
    for place, (name, tensor) in enumerate(method.state_dict().items()):
        if name.endswith("running_mean"):
            tensor += 0.1 * torch.rand(tensor.shape, generator=torch.Generator().manual_seed(place))
    settings = {name: value for name, value in vars(args).items() if name not in harness.run.NO_INFLUENCE}
    settings |= {"files": "8 images", "processes": 1}
    torch.save({"script": "setsim", "settings": settings, "step": 7, "model": method.state_dict()}, path)
    return args, method


def assert_match(found, row, one):
    """One row of a Match is the Match of that image alone: attention and sets of both views, similarity, positives."""
    theirs, ours = ((*m.attention, *m.sets, m.similarity, m.positives) for m in (found, one))
    assert len(theirs) == len(ours) == 6
    for place, (a, b) in enumerate(zip(theirs, ours, strict=True)):
        assert torch.allclose(a[row].float(), b[0].float(), atol=1e-4), place


@pytest.mark.parametrize(
    "flags",
    [["--amp", "bf16", "--queue-size", "8"], ["--framework", "simsiam"]],
    ids=["moco", "simsiam"],
)
def test_matches_are_those_of_setsims_matcher_for_that_image(tmp_path, photos, monkeypatch, flags):
    args, method = a_checkpoint(tmp_path / "checkpoint.pth", *flags)
    seen = []
    draw = harness.look.draw_matches
    monkeypatch.setattr(harness.look, "draw_matches", lambda *a, **more: seen.append(a) or draw(*a, **more))
    figures.main(
        ["matches", str(tmp_path / "checkpoint.pth"), str(photos), "--count", "2", "--out", str(tmp_path / "m.png")]
    )
    ((path, view_q, view_k, found, H, W),) = seen
    assert (H, W) == (3, 3) and len(view_q) == 2
    method.eval()
    for row, name in enumerate(("0000.png", "0004.png")):
        with common.drawing("figure", 0, name):
            image = harness.images.read_image(photos / name)
            (q, window_q), (k, window_k) = (setsim.random_view(image, 96) for _ in range(2))
        assert torch.equal(view_q[row], q) and torch.equal(view_k[row], k) and not torch.equal(q, k)
        key = method.key if args.framework == "moco" else method.query
        with torch.no_grad():  # one image alone, the networks one after the other
            z_q, z_k = (f.trunk(common.normalise(x[None]))[-1] for f, x in ((method.query, q), (key, k)))
        one = setsim.match(z_q, z_k, window_q[None], window_k[None], args.matcher, args.set, args.geometry, False)
        assert_match(found, row, one)
        assert one.sets[0].any() and one.positives.any()
    assert not torch.equal(found.attention[0][0], found.attention[0][1])
    assert Image.open(tmp_path / "m.png").size == (5 * 230 + 6, 2 * 230 + 20)


def test_crops_are_framed_in_the_image_they_are_from():
    """Colours at the edges that a window says, left and right of a flipped one swapped; setsim's picture beside them."""
    matches = Image.new("RGB", (300, 2 * 100 + 20), "red")
    images = [Image.new("RGB", size, "white") for size in ((188, 40), (40, 160))]  # 94 x 20 and 20 x 80 in the picture
    half, whole = [0.4, 0.25, 0.8, 0.75], [1.0, 0.0, 0.0, 1.0]
    found = np.asarray(figures.draw_crops(matches, ["a", "b"], images, [half, whole], [whole, half])).astype(int)
    assert found.shape == (220, 400, 3) and (found[20:, 100:] == np.asarray(matches)[20:]).all()
    orange, blue = (255, 176, 0), (64, 176, 255)
    places = [(6, 20, 94, 20), (6, 120, 20, 80)]  # left, top, width, height
    for (left, top, width, height), colours in zip(places, ((orange, blue), (blue, orange)), strict=True):
        for (x0, y0, x1, y1), colour in zip(((0.4, 0.25, 0.8, 0.75), (0, 0, 1, 1)), colours, strict=True):
            y, x = round(top + (y0 + y1) / 2 * height), round(left + (x0 + x1) / 2 * width)
            rows = np.flatnonzero((found[:, x, :] == colour).all(1) & (abs(np.arange(220) - y) < 60))
            columns = np.flatnonzero((found[y, :100] == colour).all(1))
            assert abs(columns.min() - left - x0 * width) <= 1.5 and abs(columns.max() - left - x1 * width) <= 1.5
            assert abs(rows.min() - top - y0 * height) <= 1.5 and abs(rows.max() - top - y1 * height) <= 1.5


@pytest.mark.parametrize(
    "flags", [["--set", "0.3", "--preset", "official"], ["--set", "40%"]], ids=["threshold", "ratio"]
)
def test_attention_of_setsims_checkpoint_is_its_own(tmp_path, photos, flags):
    args, method = a_checkpoint(tmp_path / "checkpoint.pth", "--queue-size", "8", *flags)
    ratio = args.set == "40%"
    size = 128 if ratio else 96  # given, or the run's own
    more = ["--size", "128"] if ratio else []
    figure = drawn("attention", tmp_path / "checkpoint.pth", photos, "--count", 1, *more)
    image = TF.resize(harness.images.read_image(photos / "0000.png"), size)
    with torch.no_grad():
        z = method.eval().query.trunk(common.normalise(TF.pil_to_tensor(image)[None]))[-1]
    A = setsim.attention_map(z.flatten(2), square=not ratio)
    chosen = setsim.ratio_set(A, 40) if ratio else setsim.threshold_set(A, 0.3)
    statistic, framed = ("sum of |z|", "highest 40%") if ratio else ("mean of z^2", "at least 0.3")
    title = f"attention ({statistic}), framed: {framed}"
    axis = figure.axes[1]
    assert axis.get_title() == title and np.allclose(pixels(axis, 1).ravel(), A[0], atol=1e-5)
    assert len(axis.patches) == chosen.sum() > 0


@pytest.mark.parametrize("kind", ["bare", "resim", "baseline"])
def test_matches_of_any_other_backbone_are_those_of_setsims_defaults(tmp_path, photos, monkeypatch, kind):
    """Bare weights, another script's checkpoint with its own size, and setsim.py's baseline, whose key network is another."""
    side, args = (224, setsim.get_args(["--data", "x"])) if kind == "bare" else (96, None)
    path, flags = tmp_path / "weights.pth", ["--arch", "resnet18"] if kind == "bare" else []
    torch.manual_seed(0)
    trunk = common.ResNetTrunk("resnet18").eval()
    nets = trunk, trunk
    if kind == "bare":
        torch.save(trunk.state_dict(), path)
    elif kind == "resim":
        state = {f"query.trunk.{name}": tensor for name, tensor in trunk.state_dict().items()}
        torch.save({"script": "resim", "settings": {"arch": "resnet18", "size": side}, "model": state}, path)
    else:
        _, method = a_checkpoint(path, "--loss-weight", "0", "--queue-size", "8")
        nets = method.eval().query.trunk, method.key.trunk
    if args is not None:  # the defaults, as literals
        assert (args.matcher, args.set, args.geometry, args.preset) == ("set2set-nn", "0.7", None, "paper")
    seen, draw = [], harness.look.draw_matches
    monkeypatch.setattr(harness.look, "draw_matches", lambda *a, **more: seen.append(a) or draw(*a, **more))
    assert drawn("matches", path, photos, "--count", 2, "--seed", 3, "--out", tmp_path / "m.png", *flags) is None
    ((_, view_q, view_k, found, H, W),) = seen
    for row, name in enumerate(("0000.png", "0004.png")):
        with common.drawing("figure", 3, name):
            image = harness.images.read_image(photos / name)
            (q, window_q), (k, window_k) = (setsim.random_view(image, side) for _ in range(2))
        assert torch.equal(view_q[row], q) and torch.equal(view_k[row], k) and (H, W) == (side // 32, side // 32)
        with torch.no_grad():
            z = [net(common.normalise(x[None]))[-1] for net, x in zip(nets, (q, k), strict=True)]
        one = setsim.match(*z, window_q[None], window_k[None], "set2set-nn", "0.7", None, False)
        assert_match(found, row, one)
        assert one.positives.any()


@pytest.mark.parametrize("settings", [{"size": None, "arch": "r18"}, {"size": [224, 224]}, "none"])
def test_settings_of_foreign_checkpoints_do_no_harm(tmp_path, photos, settings):
    torch.save({"settings": settings, "model": common.ResNetTrunk("resnet18").state_dict()}, tmp_path / "weights.pth")
    flags = ["--arch", "resnet18", "--out", tmp_path / "m.png"]
    figure = drawn("attention", tmp_path / "weights.pth", photos, "--count", 1, *flags)
    assert pixels(figure.axes[0]).shape == (224, 336, 3)
    drawn("matches", tmp_path / "weights.pth", photos, "--count", 8, *flags)  # more than a run of setsim.py draws
    assert Image.open(tmp_path / "m.png").size == (5 * 230 + 6, 8 * 230 + 20)


@pytest.mark.parametrize("wrapped", [False, True])
def test_attention_of_a_plain_backbone_is_setsims_for_that_image(tmp_path, photos, wrapped):
    """Bare weights want --arch; a checkpoint of another script says it itself, and the size of its views."""
    torch.manual_seed(0)
    trunk = common.ResNetTrunk("resnet18").eval()
    trunk.layer4[1].bn2.weight.data *= 2
    state, flags = trunk.state_dict(), ["--arch", "resnet18"]
    if wrapped:
        state = {f"query.trunk.{name}": tensor for name, tensor in state.items()}
        state, flags = {"script": "resim", "settings": {"arch": "resnet18", "size": 128}, "model": state}, []
    torch.save(state, tmp_path / "weights.pth")
    figure = drawn("attention", tmp_path / "weights.pth", photos, "--count", 2, *flags)
    assert [axis.get_title() for axis in figure.axes[:2]] == ["image", "attention (sum of |z|), framed: at least 0.7"]
    assert [axis.get_ylabel() for axis in figure.axes[:4:2]] == ["0000.png", "0004.png"]
    side = 128 if wrapped else 224
    for row, name in enumerate(("0000.png", "0004.png")):
        image = TF.resize(harness.images.read_image(photos / name), side)
        assert image.size == (side * 3 // 2, side)
        with torch.no_grad():
            z = trunk(common.normalise(TF.pil_to_tensor(image)[None]))[-1]
        A = setsim.attention_map(z.flatten(2))[0].view(z.shape[2:])
        plain, axis = figure.axes[2 * row : 2 * row + 2]
        assert np.array_equal(pixels(plain), np.asarray(image)) and np.array_equal(pixels(axis), np.asarray(image))
        assert np.allclose(pixels(axis, 1), A, atol=1e-5)
        assert (axis.images[1].norm.vmin, axis.images[1].norm.vmax) == (0, 1)
        assert axis.images[1].get_extent() == [-0.5, image.width - 0.5, image.height - 0.5, -0.5]
        cell = np.array([image.width / A.shape[1], image.height / A.shape[0]])
        frames = sorted(tuple(np.round((np.add(patch.xy, 0.5)) / cell, 4)) for patch in axis.patches)
        assert frames == sorted((float(j), float(i)) for i, j in (A >= 0.7).nonzero().tolist()) and frames
        assert all(np.allclose([patch.get_width(), patch.get_height()], cell) for patch in axis.patches)


# ------------------------------------------------------------------------------------------------------ predictions

DET = "--task scenes --data scenes:8 --arch resnet18 --batch-size 2 --short-sides 64 --test-side 80".split()
SEG = "--task scenes --data scenes:8 --arch resnet18 --batch-size 2 --crop 32 --resize 160x40 --lr 0.0002 --test slide".split()


def two_runs(folder, script, flags):
    """Folders `a`, of a real run of one step, and `b`, with other weights."""
    script.main([*flags, "--workers", "0", "--steps", "1", "--output-dir", str(folder / "a")])
    state, rng = torch.load(folder / "a" / "checkpoint.pth"), torch.Generator().manual_seed(0)
    state["optimizer"] = {}  # as large as the rest
    torch.save(state, folder / "a" / "checkpoint.pth")
    for tensor in state["model"].values():
        if tensor.ndim > 1:
            tensor += 0.5 * tensor.std() * torch.randn(tensor.shape, generator=rng)
    (folder / "b").mkdir()
    torch.save(state, folder / "b" / "checkpoint.pth")
    return folder


@pytest.fixture(scope="module")
def detectors(tmp_path_factory):
    return two_runs(tmp_path_factory.mktemp("detectors"), det, DET)


@pytest.fixture(scope="module")
def segmenters(tmp_path_factory):
    return two_runs(tmp_path_factory.mktemp("segmenters"), seg, SEG)


def grid(figure, rows, columns):
    """Axes in rows, after a look at the titles' number."""
    assert len(figure.axes) == rows * columns
    return [figure.axes[row * columns : (row + 1) * columns] for row in range(rows)]


@functools.lru_cache(4)
def load(script, run):
    """A run's settings, checkpoint and model, as --eval-only has them."""
    args = script.get_args(["--output-dir", str(run), "--eval-only"])
    state = harness.weights.load_checkpoint_file(run / "checkpoint.pth")
    if script is det:
        sizes = len(state["categories"]), state["outputs"], len(state["keypoints"])
        return args, state, det.new_detector(args, 0, *sizes, WORLD, state)[0].eval()
    return args, state, seg.new_segmenter(args, 0, len(state["classes"]), WORLD, state)[0].eval()


def test_detections_stand_beside_image_and_truth_a_column_for_each_run(detectors):
    figure = drawn("predictions", detectors / "a", detectors / "b", "--names", "MoCo", "SetSim", "--count", 1)
    rows = grid(figure, 1, 4)
    assert [axis.get_title() for axis in rows[0]] == ["image", "truth", "MoCo", "SetSim"]
    assert [row[0].get_ylabel() for row in rows] == ["scene 8"]
    assert all(not np.array_equal(pixels(row[2]), pixels(row[3])) for row in rows)
    for column, name in ((2, "a"), (3, "b")):
        args, _, model = load(det, detectors / name)
        val = det.open_data(args, "val")
        for row, (index, small, size) in zip(rows, det.TestImages(val, [0], 80, args.max_side), strict=True):
            assert np.array_equal(pixels(row[0]), np.asarray(val.read(index)))
            truth = det.draw(val.read(index), val.annotations(index), val.categories, 400)
            assert np.array_equal(pixels(row[1]), np.asarray(truth))
            found = det.confident(det.detect(model, small, size))
            assert found
            picture = det.draw(val.read(index), found, val.categories, 400)
            assert np.array_equal(pixels(row[column]), np.asarray(picture))


def test_detections_on_ones_own_images_have_no_truth(detectors, photos):
    figure = drawn("predictions", detectors / "b", "--images", photos, "--count", 1)
    ((plain, axis),) = grid(figure, 1, 2)
    assert [plain.get_title(), axis.get_title(), plain.get_ylabel()] == ["image", "b", "0000.png"]
    _, state, model = load(det, detectors / "b")
    image = harness.images.read_image(photos / "0000.png")  # 96 x 64
    found = det.confident(det.detect(model, det.to_tensor(image.resize((120, 80), Image.BILINEAR)), (64, 96)))
    assert np.array_equal(pixels(plain), np.asarray(image))
    assert np.array_equal(pixels(axis), np.asarray(det.draw(image, found, state["categories"], 400)))


def test_label_maps_stand_beside_image_and_truth_with_a_legend(segmenters):
    figure = drawn("predictions", segmenters / "a", segmenters / "b", "--count", 3)
    rows = grid(figure, 3, 4)
    assert [axis.get_title() for axis in rows[0]] == ["image", "truth", "a", "b"]
    shown = set()
    for column, name in ((2, "a"), (3, "b")):
        args, state, model = load(seg, segmenters / name)
        val, palette = seg.open_data(args, "val"), state["palette"].numpy()
        for row, index in zip(rows, (0, 2, 5), strict=True):
            image, labels = val.read(index)
            _, small, _ = seg.TestImages(val, [index], args.resize)[0]
            found = seg.segment(model, small, labels.shape, args.crop, args.test)
            assert np.array_equal(pixels(row[0]), np.asarray(image)) and row[0].get_ylabel() == val.name(index)
            assert np.array_equal(pixels(row[1]), palette[labels])
            assert np.array_equal(pixels(row[column]), palette[found])
            shown |= {*labels.ravel().tolist(), *found.ravel().tolist()}
    assert any(not np.array_equal(pixels(row[2]), pixels(row[3])) for row in rows)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [state["classes"][k] for k in sorted(shown)]
    for patch, k in zip(legend.get_patches(), sorted(shown), strict=True):
        assert np.allclose(patch.get_facecolor()[:3], palette[k] / 255)


def test_ignored_pixels_of_the_truth_have_their_colour_and_no_name(segmenters, monkeypatch):
    """As in VOC and Cityscapes: label 255."""
    names, read = figures.fine_tuned(str(segmenters / "a"), None).validation()

    def with_ignored(self):
        def ignored(i):
            image, labels = read(i)
            labels = labels.copy()
            labels[:5] = 255
            return image, labels

        return names, ignored

    monkeypatch.setattr(figures.Segmentation, "validation", with_ignored)
    figure = drawn("predictions", segmenters / "a", "--count", 1)
    palette = torch.load(segmenters / "a" / "checkpoint.pth")["palette"].numpy()
    assert (pixels(figure.axes[1])[:5] == palette[255]).all()
    (legend,) = figure.legends
    assert 0 < len(legend.get_texts()) <= 11


def test_rows_are_as_high_as_their_images():
    names = ["a", "a rather long name of a folder/and.jpg"]
    rows = [[np.zeros((50, 100, 3))] * 2, [np.zeros((200, 100, 3))] * 2]
    figure = figures.draw_columns(harness.pictures.pyplot(), rows, ["one", "two"], names)
    assert figure.get_size_inches().tolist() == pytest.approx([5.9, 2.8 * 2.5 + 0.8])
    figure.canvas.draw()
    low, high = (figure.axes[place].get_position().height for place in (0, 2))
    assert high / low == pytest.approx(4, rel=0.1)
    assert figure.axes[2].get_ylabel() == "...e of a folder/and.jpg"


def test_label_maps_of_ones_own_images(segmenters, photos, capsys):
    figure = drawn("predictions", segmenters / "a", "--images", photos, "--count", 1)
    ((plain, axis),) = grid(figure, 1, 2)
    args, state, model = load(seg, segmenters / "a")
    image = harness.images.read_image(photos / "0000.png")
    small = seg.resize_image(seg.to_tensor(image), seg.resized(64, 96, 160, 40))
    labels = seg.segment(model, small, (64, 96), args.crop, args.test)
    assert np.array_equal(pixels(plain), np.asarray(image))
    assert np.array_equal(pixels(axis), state["palette"].numpy()[labels])
    assert "a: step 1, 1 images" in capsys.readouterr().out


# -------------------------------------------------------------------------------------------------------- bad input


def test_runs_of_several_tasks_or_classes_are_refused(detectors, segmenters, tmp_path):
    words = (
        "a is a run of transfer_det.py --task scenes with 10 classes, other of transfer_seg.py --task scenes with 11"
    )
    with pytest.raises(UserError, match=words):
        drawn("predictions", detectors / "a", segmenters / "b", "--count", 1, "--names", "a", "other")
    state = torch.load(segmenters / "b" / "checkpoint.pth")
    state["classes"] = ["sky", *state["classes"][1:]]
    (tmp_path / "c").mkdir()
    torch.save(state, tmp_path / "c" / "checkpoint.pth")
    with pytest.raises(UserError, match="same classes"):
        drawn("predictions", segmenters / "a", tmp_path / "c", "--count", 1)


def test_unreadable_images_are_passed_over(tmp_path, capsys):
    folder = write_images(tmp_path / "photos", 3)
    (folder / "0001.png").write_bytes(b"no image")
    names, images = figures.own_images(str(folder), 6, "IMAGES")
    assert names == ["0000.png", "0002.png"] and [image.size for image in images] == [(40, 48)] * 2
    assert capsys.readouterr().out.startswith("unreadable, passed over: 0001.png (")
    for name in names:
        (folder / name).unlink()
    with pytest.raises(UserError, match="IMAGES: none of the images that were tried can be read"):
        figures.own_images(str(folder), 6, "IMAGES")


def test_images_are_spread_evenly():
    assert figures.readable([*"abcdefghij"], lambda i: i, 3, "x") == (["a", "d", "g"], [0, 3, 6])
    assert figures.readable([*"ab"], lambda i: i, 6, "x") == (["a", "b"], [0, 1])


def test_runs_of_one_name_are_told_apart():
    assert figures.get_args(["curves", "x/a", "x/b/"]).names == ["a", "b"]
    assert figures.get_args(["curves", "x/a", "y/a"]).names == ["x/a", "y/a"]


BAD = {
    "curves nowhere": "nowhere: no such folder",
    "curves strange.pth": "strange.pth: a file: give the folder that it lies in",
    "attention strange.pth photos --size 8": "--size 8: must be at least 32",
    "curves empty": "empty: no log.jsonl in it$",
    "curves trials": "trials: no log.jsonl in it; give one of its trials: seed0, seed1",
    "curves header": "header: nothing is logged yet",
    "curves trials/seed0 --names a b": "--names: 2 names for 1 runs",
    "curves trials/seed0 --out x.pdf": "--out x.pdf: the name has to end in .png",
    "curves trials/seed0 --out nowhere/x.png": "--out nowhere/x.png: give a file in a folder that is there",
    "ap empty": "empty: no results.jsonl in it",
    "ap seg": "seg: no AP over IoU thresholds in its results.jsonl",
    "ap header": "header: no AP over IoU thresholds in its results.jsonl",
    "matches nothing.pth photos": "nothing.pth: no such file",
    "matches photos/0000.png photos": "photos/0000.png: not a checkpoint that can be read safely",
    "matches strange.pth photos": "strange.pth: there is no ResNet in it",
    "attention strange.pth photos": "strange.pth: there is no ResNet in it",
    "attention strange.pth empty": "IMAGES empty: no images in it or below",
    "matches strange.pth nowhere": "IMAGES nowhere: no such folder",
    "matches strange.pth empty": "IMAGES empty: no images in it or below",
    "matches strange.pth photos --count 0": "--count 0: must be between 1 and 40",
    "curves binary": "binary/log.jsonl: not a log of these scripts",
    "curves odd": "odd: nothing is logged yet",
    "ap odd": "odd: no AP over IoU thresholds in its results.jsonl",
    "ap trials/seed0": "trials/seed0: no results.jsonl in it; that of all trials is in .*trials$",
    "predictions empty": "empty: no checkpoint.pth in it",
    "predictions pretrained": "pretrained/checkpoint.pth: not a checkpoint of transfer_det.py or transfer_seg.py",
}


@pytest.mark.parametrize("words", BAD)
def test_bad_input_is_named(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "photos", 1)
    (tmp_path / "empty").mkdir()
    for trial in ("seed0", "seed1"):
        write_lines(tmp_path / "trials" / trial / "log.jsonl", log_of(5.0, 6.0))
    write_lines(tmp_path / "header" / "log.jsonl", log_of(5.0, 6.0)[:1])
    write_lines(tmp_path / "header" / "results.jsonl", [])
    write_lines(tmp_path / "trials" / "results.jsonl", [result(0), result(1)])
    write_lines(tmp_path / "odd" / "log.jsonl", [[1], 3, {"loss": 2.0}])
    write_lines(tmp_path / "odd" / "results.jsonl", [[1], {"box": 3}])
    (tmp_path / "binary").mkdir()
    (tmp_path / "binary" / "log.jsonl").write_bytes(b"\xff\xfe\x00")
    write_lines(tmp_path / "seg" / "results.jsonl", [{"protocol": "p", "mIoU": 5.0, "IoU_by_class": {"sky": 5.0}}])
    torch.save({"weights": torch.zeros(3)}, "strange.pth")
    (tmp_path / "pretrained").mkdir()
    torch.save({"script": "setsim", "settings": {}}, "pretrained/checkpoint.pth")
    before = sorted(tmp_path.rglob("*.png"))
    with pytest.raises(UserError, match=BAD[words]):
        figures.main(words.split())
    assert sorted(tmp_path.rglob("*.png")) == before


def test_data_that_a_run_remembers_but_that_is_gone(detectors, tmp_path):
    state = torch.load(detectors / "a" / "checkpoint.pth")
    state["given"] |= {"task": "voc", "data": str(tmp_path / "gone")}
    (tmp_path / "run").mkdir()
    torch.save(state, tmp_path / "run" / "checkpoint.pth")
    with pytest.raises(UserError, match="gone"):
        drawn("predictions", tmp_path / "run")


def test_without_matplotlib_one_line_says_so(tmp_path, monkeypatch):
    run = write_lines(tmp_path / "run" / "log.jsonl", log_of(5.0, 6.0))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match="pip install matplotlib"):
        drawn("curves", run)


def test_as_a_user_runs_it(tmp_path, capsys):
    """A picture and where it is; one line and exit code 2."""
    run = write_lines(tmp_path / "run" / "log.jsonl", log_of(5.0, 6.0))
    figures.main(["curves", str(run), "--out", str(tmp_path / "curves.png")])
    assert capsys.readouterr().out == f"picture: {tmp_path / 'curves.png'}\n"
    assert Image.open(tmp_path / "curves.png").width > 1000
    command, environment = [sys.executable, "-m", "tools.figures", "curves"], {**os.environ, "PYTHONPATH": str(ROOT)}
    bad = subprocess.run([*command, "nowhere"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert bad.returncode == 2 and bad.stdout == ""
    assert bad.stderr == "figures.py: error: nowhere: no such folder (give the --output-dir of a run)\n"
