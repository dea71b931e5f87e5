# SPDX-License-Identifier: MIT
"""tools/figures.py: what is drawn, read back from matplotlib's objects and from pixels."""

import json

import numpy as np
import pytest
import torch
from helpers import write_images
from matplotlib.colors import to_hex
from PIL import Image
from torchvision.transforms import functional as TF

import common
import harness.images
import harness.look
import harness.pictures
import resim
import setsim
from common import UserError
from tools import figures

THRESHOLDS = [50, 55, 60, 65, 70, 75, 80, 85, 90, 95]


def drawn(*words):
    """The panels of a command's figure, before it is saved: {title: axis}."""
    args = figures.get_args([*map(str, words)])
    axes = figures.DRAWN[args.command](args).axes
    harness.pictures.pyplot().close("all")
    return {axis.get_title(): axis for axis in axes}


def write_lines(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path.parent


# ---------------------------------------------------------------------------------------------------------- curves


def log_of(start, **others):
    """A log as the scripts write it: header, measurement, three steps, measurement."""
    lines = [{"command": "python setsim.py", "settings": {"lr": 9.0}}]
    lines += [{"step": 0, "probe": {"hits": 0.2 + start / 100, "chance": 0.125, "count": 77}}]
    for step in (10, 20, 30):
        values = {"loss_image": start - step / 40, "lr": 0.5, "std_image": 0.01 * step, "images_per_s": 88.0}
        lines.append({"step": step, "epoch": 0.25, "std_spread": 0.0625, "bad_images": 0, **values, **others})
    return [*lines, {"step": 30, "probe": {"hits": 0.5 + start / 100, "chance": 0.125, "count": 77}}]


def test_curves_have_a_panel_for_each_value_and_a_line_for_each_run(tmp_path):
    one = write_lines(tmp_path / "one" / "log.jsonl", log_of(5.0, loss_chance=6.5, positives=4.0))
    two = write_lines(tmp_path / "two" / "log.jsonl", log_of(3.0))
    (two / "log.jsonl").open("a").write('{"step": 40, "lo')  # torn by a kill
    found = drawn("curves", one, two, "--names", "first", "second")
    assert list(found) == ["hits", "loss_image", "lr", "std_image", "positives"]
    solid, dashed, colours = {}, {}, set()
    for name, axis in found.items():
        for line in axis.get_lines():
            points = list(zip(*map(list, line.get_data()), strict=True))
            (dashed if line.get_linestyle() == "--" else solid)[name, to_hex(line.get_color())] = points
        colours.add(tuple(to_hex(line.get_color()) for line in axis.get_lines() if line.get_linestyle() != "--"))
    ((first, second),) = colours
    assert first != second
    for colour, start in ((first, 5.0), (second, 3.0)):
        assert solid["loss_image", colour] == [(step, start - step / 40) for step in (10, 20, 30)]
        assert solid["hits", colour] == [(0, 0.2 + start / 100), (30, 0.5 + start / 100)]
        assert dashed.pop(("std_image", colour)) == [(0, 0.0625), (1, 0.0625)]
        assert dashed.pop(("hits", colour)) == [(0, 0.125), (1, 0.125)]
    assert solid["positives", first] == [(10, 4.0), (20, 4.0), (30, 4.0)] and solid["positives", second] == []
    assert dashed == {("loss_image", first): [(0, 6.5), (1, 6.5)]}  # the second has none, as SimSiam
    (legend,) = found["hits"].figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["first", "second"]


@pytest.mark.parametrize(
    "names, wanted",
    [  # as the methods log them
        ("loss loss_image loss_set std_dense rows loss_chance std_spread", "None loss_chance loss_chance std_spread None"),
        ("loss loss_image loss_c4 std_c4 loss_chance chance_c4 std_spread spread_c4", "None loss_chance chance_c4 spread_c4"),
        ("loss loss_dc loss_dp std shift loss_chance std_spread", "loss_chance None None std_spread None"),
    ],
)  # fmt: skip
def test_yardsticks_belong_to_their_values(names, wanted):
    names = names.split()
    found = [figures.yardstick(name, names) for name in names]
    assert list(map(str, found))[: len(wanted.split())] == wanted.split()


# --------------------------------------------------------------------------------------------------------------- ap


def result(seed, protocol="scenes, protocol A", kinds=("box", "keypoints")):
    rng = np.random.default_rng(seed)
    values = {k: {"AP": 1.0, "AP_by_IoU": {str(t): rng.uniform(0, 50) for t in THRESHOLDS}} for k in kinds}
    return {"seed": seed, "step": 9, "weights": "random", "protocol": protocol, **values}


def runs_of(tmp_path, **runs):
    return [write_lines(tmp_path / name / "results.jsonl", lines) for name, lines in runs.items()]


def test_ap_is_the_mean_over_trials_and_the_gain_is_over_the_first_run(tmp_path):
    trials = {"base": [result(0)], "ours": [result(1), result(2), result(6)], "other": [result(3), result(4)]}
    runs = runs_of(tmp_path, **trials)

    def values(name):
        return np.array([[trial["box"]["AP_by_IoU"][str(t)] for t in THRESHOLDS] for trial in trials[name]])

    def curves(axis):
        """(line, half the length of each error bar that is drawn) of each run"""
        for line, _, bars in (container.lines for container in axis.containers):
            lengths = [np.ptp(x[:, 1]) / 2 for bar in bars for x in bar.get_segments() if len(x)]
            yield line, np.array(lengths, float)

    found = drawn("ap", *runs, "--names", *trials)
    assert [*found] == ["box: AP", "box: gain over base", "keypoints: AP", "keypoints: gain over base"]
    for name, (line, bars) in zip(trials, curves(found["box: AP"]), strict=True):
        assert np.allclose(line.get_xdata(), np.array(THRESHOLDS) / 100)
        assert np.allclose(line.get_ydata(), values(name).mean(0))
        assert np.allclose(bars, values(name).std(0, ddof=1)) if name != "base" else not bars.size  # of one trial
    for name, (line, bars) in zip(trials, curves(found["box: gain over base"]), strict=True):
        assert np.allclose(line.get_ydata(), values(name).mean(0) - values("base")[0]) and not bars.size
    texts = [text.get_text() for text in found["box: AP"].get_legend().get_texts()]
    assert texts == ["base, mean of 1", "ours, mean of 3", "other, mean of 2"]
    assert found["keypoints: AP"].get_xlabel() == "threshold of OKS"
    _, (line, bars) = curves(drawn("ap", *runs[1:], "--names", "ours", "other")["box: gain over ours"])
    assert np.allclose(line.get_ydata(), values("other").mean(0) - values("ours").mean(0))
    assert np.allclose(bars**2, values("ours").var(0, ddof=1) / 3 + values("other").var(0, ddof=1) / 2)


def test_ap_of_kinds_that_all_runs_have(tmp_path):
    boxes, masks = result(1, kinds=["box"]), result(2, kinds=["mask"])
    runs = runs_of(tmp_path, all=[result(0)], boxes=[boxes], masks=[masks])
    assert list(drawn("ap", *runs[:2])) == ["box: AP", f"box: gain over {runs[0]}"]
    assert list(drawn("ap", runs[0])) == ["box: AP", "keypoints: AP"]
    with pytest.raises(UserError, match="no AP over IoU thresholds of one kind"):
        drawn("ap", *runs[1:])


def test_differing_protocols_are_named_and_not_drawn(tmp_path):
    one, two = runs_of(tmp_path, one=[result(0, "A")], two=[result(1, "A"), result(2, "B")])
    for runs in ([one, two], [two]):
        with pytest.raises(UserError, match="not comparable: A; B"):
            drawn("ap", *runs)


# ------------------------------------------------------------------------------------------------------------ images


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Eight images, two of which are drawn by `--count 2`: numbers 0 and 4."""
    return write_images(tmp_path_factory.mktemp("photos"), 8, size=(96, 64))


def checkpoint(path, script, *flags):
    """checkpoint.pth of a run whose networks differ and have running statistics. Its fitted queue is not in the settings."""
    args = script.get_args(["--data", "x", "--arch", "resnet18", "--size", "96", *flags])
    args.queue_size = 8
    method = script.build(args, torch.device("cpu"))
    for place, (name, tensor) in enumerate(method.state_dict().items()):
        if name.endswith("running_mean"):
            tensor += 0.1 * torch.rand(tensor.shape, generator=torch.Generator().manual_seed(place))
    settings = vars(args) | {"queue_size": None}
    torch.save({"script": script.__name__, "settings": settings, "step": 7, "model": method.state_dict()}, path)
    return method.eval(), args


def views(script, photos, seed, size):
    """Two crops of each of the two images, as a batch."""
    rows = []
    for name in ("0000.png", "0004.png"):
        with common.drawing("figure", seed, name):
            rows.append(script.two_views(harness.images.read_image(photos / name), size))
    return [torch.stack(x) for x in zip(*rows, strict=True)]


@pytest.mark.parametrize("kind", ["moco", "simsiam", "random"])
def test_matches_are_those_of_setsims_matcher(tmp_path, photos, monkeypatch, kind):
    """Of a run with its own networks and settings, of any other backbone with the defaults: written out for each image."""
    path, seen = tmp_path / "checkpoint.pth", []
    monkeypatch.setattr(harness.look, "draw_matches", lambda *drawn: seen.append(drawn))
    if kind == "random":
        trunk = common.ResNetTrunk("resnet18").eval()
        torch.save(trunk.state_dict(), path)
        networks, rule, geometry = (trunk, trunk), "0.7", None
    else:
        flags = {"moco": ["--amp", "bf16", "--geometry", "0.6"], "simsiam": ["--framework", "simsiam"]}[kind]
        method, args = checkpoint(path, setsim, *flags)
        networks, rule = (method.query.trunk, (method.key or method.query).trunk), args.set
        geometry = args.geometry
    figures.main(
        ["matches", str(path), str(photos), "--count", "2", "--seed", "3", "--size", "64", "--arch", "resnet18"]
    )
    ((_, *drawn_views, found, H, W),) = seen
    view_q, view_k, window_q, window_k = views(setsim, photos, 3, 64)
    assert torch.equal(drawn_views[0], view_q) and torch.equal(drawn_views[1], view_k) and (H, W) == (2, 2)
    for row in range(2):
        one = slice(row, row + 1)
        with torch.no_grad():
            z = [net(common.normalise(x[one]))[-1] for net, x in zip(networks, (view_q, view_k), strict=True)]
        wanted = setsim.match(*z, window_q[one], window_k[one], "set2set-nn", rule, geometry, False)
        for ours, theirs in zip((*found[0], *found[1], *found[2:]), (*wanted[0], *wanted[1], *wanted[2:]), strict=True):
            assert torch.allclose(ours[one].float(), theirs.float(), atol=1e-4) and theirs.any()


def test_matches_of_a_run_of_resim_are_its_windows(tmp_path, photos):
    method, args = checkpoint(tmp_path / "checkpoint.pth", resim, "--levels", "c4")
    figures.main(["matches", f"{tmp_path}/checkpoint.pth", str(photos), "--count", "2", "--out", f"{tmp_path}/m.png"])
    with torch.no_grad():
        method.draw(tmp_path / "wanted.png", *views(resim, photos, 0, 96))
    assert (tmp_path / "m.png").read_bytes() == (tmp_path / "wanted.png").read_bytes()


@pytest.mark.parametrize("flags", ["--set 0.3 --preset official", "--set 40%", None])
def test_attention_is_drawn_in_its_colours_and_its_set_is_framed(tmp_path, photos, flags):
    """A run of setsim.py with its own statistic and set; of another script, 0.7 and the sum of |z|."""
    path, out = tmp_path / "checkpoint.pth", tmp_path / "a.png"
    script, more = (setsim, flags) if flags else (resim, "--preset official")
    trunk = checkpoint(path, script, *more.split())[0].query.trunk
    figures.main(["attention", str(path), str(photos), "--count", "2", "--size", "128", "--out", str(out)])
    sheet = np.asarray(Image.open(out)).astype(float)[16:].reshape(2, 134, -1, 3)[:, :128]
    for row, name in zip(sheet, ("0000.png", "0004.png"), strict=True):
        image = TF.resize(harness.images.read_image(photos / name), 128)  # 192 x 128
        with torch.no_grad():
            z = trunk(common.normalise(TF.pil_to_tensor(image)[None]))[-1][0].numpy()  # (C, H, W)
        A = (z**2).mean(0) if script is setsim and "official" in flags else abs(z).sum(0)
        A = (A - A.min()) / (A.max() - A.min())
        lowest = {"--set 40%": np.sort(A.ravel())[-int(0.4 * A.size + 0.5)], None: 0.7}.get(flags, 0.3)
        shown, grey = row[:, 204:396], np.asarray(image.convert("L"))
        assert np.array_equal(row[:, 6:198], np.asarray(image))
        centres = 0.4 * grey[16::32, 16::32] + 0.6 * 255 * A  # of cells, in red
        assert np.allclose(shown[16::32, 16::32, 0], centres, atol=2)
        framed = (shown[1::32, 16::32] == harness.look.ORANGE).all(2)
        assert np.array_equal(framed, A >= lowest) and 0 < framed.sum() < A.size


def test_predictions_of_runs_stand_side_by_side(tmp_path):
    """Those of a detector, and a segmenter's pictures, which are higher; of images that both have."""
    write_images(tmp_path / "det" / "predictions" / "sub", 3, size=(40, 48))
    write_images(tmp_path / "seg" / "predictions" / "pictures" / "sub", 2, size=(50, 90), seed=1)
    write_images(tmp_path / "seg" / "predictions" / "masks", 2)
    runs = [str(tmp_path / "det"), str(tmp_path / "seg")]
    figures.main(["predictions", *runs, "--names", "MoCo", "SetSim", "--out", str(tmp_path / "p.png")])
    sheet = np.asarray(Image.open(tmp_path / "p.png"))
    assert sheet.shape == (16 + 2 * 96, 6 + 46 + 56, 3) and (sheet[:16, 6:46] < 128).any()
    for row, name in enumerate(("sub/0000.png", "sub/0001.png")):
        for folder, x, w, h in (("det/predictions", 6, 40, 48), ("seg/predictions/pictures", 52, 50, 90)):
            wanted = np.asarray(Image.open(tmp_path / folder / name))
            assert np.array_equal(sheet[16 + 96 * row :][:h, x : x + w], wanted)


# -------------------------------------------------------------------------------------------------------- bad input


def test_images_are_spread_evenly_and_unreadable_ones_passed_over(tmp_path, capsys):
    assert figures.spread([*"abcdefghij"], 3) == ["a", "d", "g"] and figures.spread([*"ab"], 6) == ["a", "b"]
    folder = write_images(tmp_path, 3)
    (folder / "0001.png").write_bytes(b"no image")
    args = figures.get_args(["attention", "random", str(folder)])
    assert list(figures.read_images(args)) == ["0000.png", "0002.png"]
    assert capsys.readouterr().out.startswith("unreadable, passed over: 0001.png (")


BAD = {
    "curves nowhere": "nowhere/log.jsonl: no such file, or nothing logged yet: give the --output-dir of a run",
    "ap odd": "odd/results.jsonl: no such file, or nothing logged yet",
    "ap seg": "no AP over IoU thresholds",
    "attention strange.pth nowhere": "there is no ResNet in it",
    "attention random nowhere": "IMAGES nowhere: no such folder",
    "attention random broken": "IMAGES broken: none of the images that were tried can be read",
    "predictions odd photos": "first run the script of each RUN with --predict DIR",
    "curves odd --names a b": "--names: 2 names for 1 runs",
    "curves odd --out x.pdf": "--out x.pdf: the name has to end in .png",
    "matches strange.pth photos --count 7": "--count: 7: must be between 1 and 6",
}


@pytest.mark.parametrize("words", BAD)
def test_bad_input_is_named(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "photos", 1)
    (write_images(tmp_path / "broken", 1) / "0000.png").write_bytes(b"no image")
    write_lines(tmp_path / "odd" / "log.jsonl", [[1], 3, {"loss": 2.0}])
    write_lines(tmp_path / "odd" / "results.jsonl", [[1], {"box": 3}])
    write_lines(tmp_path / "seg" / "results.jsonl", [{"protocol": "p", "mIoU": 5.0, "IoU_by_class": {"sky": 5.0}}])
    torch.save({"weights": torch.zeros(3)}, "strange.pth")
    with pytest.raises((UserError, SystemExit)) as error:
        figures.main(words.split())
    assert BAD[words] in str(error.value) + capsys.readouterr().err
    assert not [*tmp_path.glob("*.png")]
