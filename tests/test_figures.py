# SPDX-License-Identifier: MIT
"""tools/figures.py: what is drawn, read back from matplotlib's objects and from pixels."""

import argparse
import json

import numpy as np
import pytest
import torch
from helpers import write_images
from matplotlib.colors import to_hex
from PIL import Image

import common
import resim
import setsim
from common import UserError
from harness import images, pictures
from tools import figures


def drawn(*words):
    """The panels of a command's figure, before it is saved: {title: axis}."""
    args = figures.get_args([*map(str, words)])
    axes = figures.DRAWN[args.command](args).axes
    pictures.pyplot().close("all")
    return {axis.get_title(): axis for axis in axes}


def write_lines(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path.parent


def test_curves_have_a_panel_for_each_value_and_a_line_for_each_run(tmp_path):
    """Measurements before and after training are among the values. Dashed: what a value is compared with."""
    ends = [{"step": step, "probe": {"hits": step / 40 + 0.1, "chance": 0.125, "count": 77}} for step in (0, 20)]
    steps = [{"step": step, "epoch": 0.25, "loss_image": 5 - step / 40, "bad_images": 0} for step in (10, 20)]
    one = [ends[0], *(x | {"loss_chance": 6.5, "std_image": 0.5, "std_spread": 0.0625} for x in steps), ends[1]]
    one = write_lines(tmp_path / "one" / "log.jsonl", [{"settings": {"lr": 9.0}}, *one])
    two = write_lines(tmp_path / "two" / "log.jsonl", [x | {"lr": 0.5, "images_per_s": 88.0} for x in steps])
    (two / "log.jsonl").open("a").write('{"step": 40, "lo')  # torn by a kill
    panels = drawn("curves", one, two, "--names", "first", "second")
    lines, run = [], {to_hex("C0"): 0, to_hex("C1"): 1}
    for name, axis in panels.items():
        lines += [(f"{name} {x.get_linestyle()}{run[to_hex(x.get_color())]}", x) for x in axis.get_lines()]
    assert {name: line.get_xydata().tolist() for name, line in lines} == {
        "hits -0": [[0, 0.1], [20, 0.6]], "hits --0": [[0, 0.125], [1, 0.125]], "hits -1": [],
        "loss_image -0": [[10, 4.75], [20, 4.5]], "loss_image --0": [[0, 6.5], [1, 6.5]],
        "loss_image -1": [[10, 4.75], [20, 4.5]], "lr -0": [], "lr -1": [[10, 0.5], [20, 0.5]],
        "std_image -0": [[10, 0.5], [20, 0.5]], "std_image --0": [[0, 0.0625], [1, 0.0625]], "std_image -1": [],
    }  # fmt: skip
    (legend,) = panels["hits"].figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["first", "second"]


def test_yardsticks_belong_to_their_values():
    for logged, wanted in {  # as the methods log them
        "loss loss_image loss_set std_dense rows loss_chance std_spread": "None loss_chance loss_chance std_spread",
        "loss loss_image loss_c4 std_c4 loss_chance chance_c4 spread_c4": "None loss_chance chance_c4 spread_c4",
        "loss loss_dc loss_dp std shift loss_chance std_spread": "loss_chance None None std_spread None",
    }.items():
        found = [str(figures.yardstick(name, logged.split())) for name in logged.split()]
        assert " ".join(found).startswith(wanted), logged


def results(folder, values, protocols="AAA", kinds=("box",)):
    """The folder of a run. values: (trials, thresholds), the AP of each trial."""
    curves = [{"AP": 1.0, "AP_by_IoU": dict(zip(range(50, 100, 5), row, strict=True))} for row in values.tolist()]
    lines = [dict.fromkeys(kinds, curve) | {"protocol": name} for curve, name in zip(curves, protocols, strict=False)]
    return write_lines(folder / "results.jsonl", lines)


def test_ap_is_the_mean_over_trials_and_the_gain_is_over_the_first_run(tmp_path):
    """Of kinds that all runs have."""
    ours, other, one = (np.random.default_rng(n).uniform(0, 50, (n, 10)) for n in (3, 2, 1))
    runs = [results(tmp_path / "ours", ours, kinds=("box", "keypoints")), results(tmp_path / "one", one)]
    runs.insert(1, results(tmp_path / "other", other, kinds=("mask", "box")))
    found = drawn("ap", *runs, "--names", "ours", "other", "one")
    assert [*found] == ["box: AP", "box: gain over ours"] and [*drawn("ap", runs[0])] == ["box: AP", "keypoints: AP"]
    gain, error = other.mean(0) - ours.mean(0), np.sqrt(ours.var(0, ddof=1) / 3 + other.var(0, ddof=1) / 2)
    for title, place, wanted, wanted_bars in (
        ("box: AP", 0, ours.mean(0), ours.std(0, ddof=1)),
        ("box: AP", 1, other.mean(0), other.std(0, ddof=1)),
        ("box: AP", 2, one[0], []),  # of one trial
        ("box: gain over ours", 0, 0 * gain, []),
        ("box: gain over ours", 1, gain, error),
        ("box: gain over ours", 2, one[0] - ours.mean(0), []),
    ):
        line, _, bars = found[title].containers[place].lines
        assert np.allclose(line.get_xydata().T, [np.arange(50, 100, 5) / 100, wanted])
        bars = [np.ptp(x[:, 1]) / 2 for bar in bars for x in bar.get_segments() if len(x)]
        assert len(bars) == len(wanted_bars) and np.allclose(bars, wanted_bars)
    texts = [text.get_text() for text in found["box: AP"].get_legend().get_texts()]
    assert texts == ["ours, mean of 3", "other, mean of 2", "one, mean of 1"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Twelve images. `--count 3` spreads over 0, 4 and 8, which is unreadable and passed over."""
    folder = write_images(tmp_path_factory.mktemp("photos"), 12, size=(96, 64))
    (folder / "0008.png").write_bytes(b"no image")
    return folder


def checkpoint(path, script, flags):
    """The method of a run whose networks differ and have running statistics; its checkpoint.pth, without its queue."""
    args = script.get_args(["--data", "x", "--arch", "resnet18", "--size", "96", *flags.split()])
    method = script.build(argparse.Namespace(**vars(args) | {"queue_size": 8}), torch.device("cpu"))
    for place, (name, tensor) in enumerate(method.state_dict().items()):
        if name.endswith("running_mean"):
            tensor += 0.1 * torch.rand(tensor.shape, generator=torch.Generator().manual_seed(place))
    kept = {"script": script.__name__, "settings": vars(args) | {"amp": "bf16"}, "step": 7}
    torch.save(kept | {"model": method.state_dict()}, path)
    return method.eval()


@pytest.mark.parametrize("kind", ["moco", "simsiam", "resim", "backbone"])
def test_matches_are_those_that_the_run_itself_draws(tmp_path, photos, kind, capsys):
    """In evaluation mode and fp32. Those of a backbone alone: SetSim's with the default settings."""
    script, path, rows = resim if kind == "resim" else setsim, tmp_path / "checkpoint.pth", []
    own = {"moco": "--geometry 0.6", "simsiam": "--framework simsiam", "resim": "--levels c4"}.get(kind, "")
    method, flags = checkpoint(path, script, own), "--count 3 --seed 3 --size 128 --arch resnet18 --out".split()
    if kind == "backbone":
        method.key.load_state_dict(method.query.state_dict())
        torch.save(method.query.trunk.state_dict(), path)
    figures.main(["matches", str(path), str(photos), *flags, str(tmp_path / "found.png")])
    for name in ("0000.png", "0004.png"):
        with common.drawing("figure", 3, name):
            rows.append(script.two_views(images.read_image(photos / name), 128))
    with torch.no_grad():
        method.draw(tmp_path / "wanted.png", *(torch.stack(x) for x in zip(*rows, strict=True)))
    assert (tmp_path / "found.png").read_bytes() == (tmp_path / "wanted.png").read_bytes()
    assert "unreadable, passed over: 0008.png (" in capsys.readouterr().out


def test_predictions_of_runs_stand_side_by_side(tmp_path):
    """Those of a detector, and a segmenter's pictures, which are higher; of images that both have."""
    write_images(tmp_path / "det" / "predictions" / "sub", 3, size=(40, 48))
    write_images(tmp_path / "seg" / "predictions" / "pictures" / "sub", 2, size=(50, 90), seed=1)
    write_images(tmp_path / "seg" / "predictions" / "masks", 2)
    figures.main(["predictions", f"{tmp_path}/det", f"{tmp_path}/seg", "--out", f"{tmp_path}/p.png"])
    sheet = np.asarray(Image.open(tmp_path / "p.png"))
    assert sheet.shape == (16 + 2 * 96, 6 + 46 + 56, 3) and (sheet[:16, 6:46] < 128).any()
    for row, name in enumerate(("sub/0000.png", "sub/0001.png")):
        for folder, x, w, h in (("det/predictions", 6, 40, 48), ("seg/predictions/pictures", 52, 50, 90)):
            wanted = np.asarray(Image.open(tmp_path / folder / name))
            assert np.array_equal(sheet[16 + 96 * row :][:h, x : x + w], wanted)


def test_bad_input_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "odd" / "results.jsonl", [[1], {"protocol": "p", "box": 3}])
    (tmp_path / "odd" / "0.png").write_bytes(b"no image")
    for name, protocols in (("one", "A"), ("two", "AB")):
        results(tmp_path / name, np.ones((len(protocols), 10)), protocols)
    for words, named in {
        "curves nowhere": "nowhere/log.jsonl: no such file, or nothing logged yet: give the --output-dir of a run",
        "ap odd": "no AP over IoU thresholds of one kind",
        "ap one two": "the runs have different protocols, not comparable: A; B",
        "ap two": "not comparable: A; B",
        "matches random odd": "IMAGES odd: none of the images that were tried can be read",
        "predictions odd odd": "first run the script of each RUN with --predict DIR",
        "curves odd --names a b": "--names: 2 names for 1 runs",
    }.items():
        with pytest.raises((UserError, SystemExit)) as error:
            figures.main(words.split())
        assert named in str(error.value) + capsys.readouterr().err and not [*tmp_path.glob("*.png")], words
