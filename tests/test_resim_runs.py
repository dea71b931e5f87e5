"""resim.py as its user starts it: outputs, killed runs, export; what it shares with setsim.py is tested there."""

import os
import pickle
import random
import shutil
import signal

import pytest
import torch
import torchvision
from helpers import (
    TINY as BASE,
)
from helpers import (
    assert_same,
    checkpoint,
    keep_signals,  # noqa: F401
    log_lines,
    run,
    signal_after,
    write_images,
)
from PIL import Image

import common
import resim
from harness import look, pictures
from harness.run import Run

FPN = [*BASE, *"--window 16 16".split()]
C4 = [*FPN, *"--levels c4".split()]


def train(*flags):
    """The script within this process, which saves the seconds that a new interpreter needs to import torch."""
    resim.train([str(flag) for flag in flags])


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    """Runs within this process draw no curves and wait for no disk; what they leave, gigabytes together, is removed.

    Both happen in `finished` and in killed runs, which are processes of their own.
    """
    monkeypatch.setattr(pictures, "draw_curves", lambda *_: None)
    monkeypatch.setattr(os, "fsync", lambda _: None)
    yield
    shutil.rmtree(tmp_path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of 8 steps (2 epochs of 4), never interrupted, of ReSim-FPN."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    return folder, run("resim.py", *FPN, "--output-dir", folder)


def test_outputs(finished):
    folder, text = finished
    pictures = {"curves.png", "regions_start.png", "regions_end.png"}
    assert set(os.listdir(folder)) == {"checkpoint.pth", "resnet18.pth", "fpn.pth", "log.jsonl", *pictures}
    assert all(name in text.splitlines()[-1] for name in os.listdir(folder))
    for name in pictures:
        assert min(Image.open(folder / name).size) > 200
    header, start, *steps, end = log_lines(folder)
    assert header["command"].split()[1].endswith("resim.py") and header["settings"]["window"] == [16, 16]
    assert [line["step"] for line in steps] == [2, 4, 6, 8]
    for line in (start, end):
        assert 0 <= line["probe"]["hits"] <= 1 and 0 < line["probe"]["chance"] < 0.7 and line["probe"]["count"] > 100
    values = "loss loss_image loss_p4 loss_p3 valid_p4 valid_p3 empty_p4 empty_p3 std_image std_p4 std_p3 lr bad_images"
    values += " loss_chance chance_p4 chance_p3 std_spread spread_p4 spread_p3 images_per_s data_share"
    assert all(set(values.split()) <= line.keys() for line in steps)
    assert all(0.1 < line[name] < 0.9 for line in steps for name in ("valid_p4", "valid_p3"))
    shown = next(line for line in text.splitlines() if line.startswith("step 8/8 "))
    assert all(f" {name} " in shown for name in ("loss", "loss_image", "loss_p4", "loss_p3", "valid_p4", "empty_p3"))
    assert "chance" not in shown and "std" not in shown
    state = checkpoint(folder)
    assert state["script"] == "resim" and state["model"]["image_queue.pointer"].item() == 8 * 8 % 24
    message = "cells of C4 have their best match within one cell of the true place, in held-out scenes (chance "
    for title, line in (("start", start), ("end", end)):
        hits, count = line["probe"]["hits"], line["probe"]["count"]
        assert f"{title} of training: {hits:.1%} of {count} {message}" in text


def test_exports_reload(finished):
    """The backbone into torchvision's ResNet with only fc missing, and into a detector together with the pyramid."""
    folder, _ = finished
    backbone, fpn = torch.load(folder / "resnet18.pth"), torch.load(folder / "fpn.pth")
    result = torchvision.models.resnet18().load_state_dict(backbone, strict=False)
    assert (result.missing_keys, result.unexpected_keys) == (["fc.weight", "fc.bias"], [])
    model = checkpoint(folder)["model"]
    assert torch.equal(backbone["layer3.1.bn2.weight"], model["query.trunk.layer3.1.bn2.weight"])  # the query's
    assert not torch.equal(backbone["conv1.weight"], model["key.trunk.conv1.weight"])
    detector = torchvision.models.detection.backbone_utils.resnet_fpn_backbone(backbone_name="resnet18", weights=None)
    assert detector.fpn.load_state_dict(fpn, strict=False).unexpected_keys == [] and len(fpn) == 6
    for i in (1, 2, 3):
        assert torch.equal(detector.fpn.inner_blocks[i][0].weight, model[f"query.pyramid.inner_blocks.{i}.0.weight"])
    args = resim.get_args([*FPN, "--init", str(folder / "resnet18.pth")])
    method = resim.build(args, torch.device("cpu"), args.init)
    for network in (method.query, method.key):
        assert torch.equal(network.trunk.layer4[1].conv2.weight, backbone["layer4.1.conv2.weight"])


@pytest.mark.parametrize("kind", ["paper", "official", "simsiam"])
def test_exported_pyramid_of_every_kind_loads_into_torchvision(kind, tmp_path, monkeypatch):
    """fpn.pth has nothing that a FeaturePyramidNetwork does not expect, and every tensor is the query network's."""
    monkeypatch.setattr(Run, "measure", lambda *_: None)
    flags = {"paper": "", "official": "--preset official", "simsiam": "--framework simsiam"}[kind]
    train(*FPN, *flags.split(), "--steps", "0", "--output-dir", tmp_path)
    exported, model = torch.load(tmp_path / "fpn.pth"), checkpoint(tmp_path)["model"]
    fpn = torchvision.ops.FeaturePyramidNetwork([64, 128, 256, 512], 256)
    result = fpn.load_state_dict(exported, strict=False)
    trained = [f"inner_blocks.{i}.0" for i in (1, 2, 3)]
    trained += [f"layer_blocks.{i}.0" for i in (1, 2) if kind == "official"]
    assert result.unexpected_keys == []
    assert {*exported} == {f"{block}.{part}" for block in trained for part in ("weight", "bias")}
    assert {*result.missing_keys} == fpn.state_dict().keys() - exported.keys()
    assert all(torch.equal(fpn.state_dict()[name], model[f"query.pyramid.{name}"]) for name in exported)


@pytest.mark.parametrize("name", ["fpn", "c4", "simsiam", "official"])
def test_interrupted_equals_uninterrupted(name, finished, tmp_path, monkeypatch):
    """Stopped between two checkpoints of epochs, every bit as if it had never stopped; FPN into the second epoch."""
    flags = {
        "fpn": FPN,
        "c4": C4,
        "simsiam": [*C4, "--framework", "simsiam"],
        "official": [*FPN, "--preset", "official", "--amp", "bf16"],
    }[name]
    first, last = (3, 8) if name == "fpn" else (1, 2)
    whole = finished[0]
    if name != "fpn":
        whole = tmp_path / "whole"
        train(*flags, "--output-dir", whole, "--steps", last)
        assert {"regions_start.png", "regions_end.png"} <= set(os.listdir(whole))
        (line,) = (line for line in log_lines(whole) if "loss" in line)
        assert line["step"] == 2 and line["valid_p4" if name == "official" else "valid_c4"] > 0.1
    monkeypatch.setattr(look, "draw_windows", lambda *_: None)
    for steps in (first, last):
        train(*flags, "--output-dir", tmp_path / "parts", "--steps", steps)
    assert_same(checkpoint(tmp_path / "parts"), checkpoint(whole))
    exported = {"fpn": 6, "official": 10}.get(name, 0)
    assert exported == (len(torch.load(whole / "fpn.pth")) if (whole / "fpn.pth").exists() else 0)


@pytest.mark.slow
def test_killed_at_random_instants(finished, tmp_path):
    folder, _ = finished
    rng = random.Random(1)
    flags = [*FPN, "--output-dir", str(tmp_path), "--save-every", "1", "--print-freq", "1"]
    for line in (rng.randrange(2, 6), rng.randrange(6, 10)):
        code, _ = signal_after("resim.py", *flags, line=line, number=signal.SIGKILL)
        assert code in (-signal.SIGKILL, 0)
    run("resim.py", *flags)
    for name in ("model", "optimizer", "step"):
        assert_same(checkpoint(tmp_path)[name], checkpoint(folder)[name])
    assert [line["step"] for line in log_lines(tmp_path) if "loss" in line] == list(range(1, 9))


def test_bad_input_in_one_clear_line(finished, tmp_path):
    folder, _ = finished
    for name, state in (
        ("setsim", checkpoint(folder) | {"script": "setsim"}),
        ("weights", torch.load(folder / "fpn.pth")),
    ):
        (tmp_path / name).mkdir()
        torch.save(state, tmp_path / name / "checkpoint.pth")
    for flags, words in (
        (["--data", tmp_path / "nowhere"], "no such folder"),
        (["--output-dir", folder, "--window", "16", "24"], r"window \[16, 16\] -> \[16, 24\]"),
        (["--output-dir", folder, "--preset", "official"], "preset 'paper' -> 'official'"),
        (["--output-dir", tmp_path / "setsim"], "a checkpoint of setsim.py"),
        (["--output-dir", tmp_path / "weights"], "go to --init"),
        (["--init", folder / "log.jsonl"], "not a checkpoint"),
        (["--arch", "resnet34", "--init", folder / "resnet18.pth"], "check --arch"),
    ):
        with pytest.raises(common.UserError, match=words) as error:
            train(*FPN, "--output-dir", tmp_path / "out", *flags)
        assert "\n" not in str(error.value)


def test_settings_reach_views_and_optimiser(tmp_path, monkeypatch):
    """Size of the views; weight decay on everything (B3); SimSiam's predictors keep their lr (B6)."""
    views, optimisers = [], []
    steps, sgd = Run.steps, torch.optim.SGD
    monkeypatch.setattr(Run, "steps", lambda run, *a: views.append(a) or steps(run, *a))
    monkeypatch.setattr(torch.optim, "SGD", lambda *a, **k: optimisers.append(sgd(*a, **k)) or optimisers[-1])
    flags = "--data scenes:8 --arch resnet18 --size 64 --batch-size 8 --workers 0 --epochs 2 --lr 0.32 --window 16 16"
    flags = [*flags.split(), "--save-every", "9"]
    train(*flags, "--framework", "simsiam", "--output-dir", tmp_path / "simsiam")
    train(*flags, "--preset", "official", "--queue-size", "8", "--output-dir", tmp_path / "official")
    assert len(views) == 2
    for (function,) in views:
        function = pickle.loads(pickle.dumps(function))  # as workers get it where they do not fork
        view_q, view_k, crop_q, crop_k = function(Image.new("RGB", (90, 70)))
        assert view_q.shape == view_k.shape == (3, 64, 64) and crop_q.shape == crop_k.shape == (4,)
    simsiam, moco = optimisers
    assert [group["lr"] for group in simsiam.param_groups] == pytest.approx([0.005, 0.01])  # second of two epochs
    assert moco.param_groups[0]["lr"] == pytest.approx(0.005) and not moco.param_groups[1]["params"]
    widths = (512, 256, 128)  # image, P4, P3: predictors E - E/4 - E with a norm between
    assert sum(p.numel() for p in simsiam.param_groups[1]["params"]) == sum(
        E * E // 4 + 2 * E // 4 + E // 4 * E + E for E in widths
    )
    for optimiser, name in ((simsiam, "simsiam"), (moco, "official")):
        state = checkpoint(tmp_path / name)["model"]
        learnt = sum(
            x.numel() for n, x in state.items() if n.startswith("query") and "running" not in n and "tracked" not in n
        )
        assert sum(p.numel() for group in optimiser.param_groups for p in group["params"]) == learnt
        assert all((group["weight_decay"], group["momentum"]) == (1e-4, 0.9) for group in optimiser.param_groups)


@pytest.mark.parametrize(
    "flags, given", [("", (None, 65536)), ("--demo", (None, 512)), ("--demo --queue-size 70", (70, 512))]
)
def test_queues_are_shorter_in_the_demo(flags, given, tmp_path, monkeypatch):
    """A queue without --queue-size has at most 512 keys in the demo. What fit_queue returns is built and saved."""
    asked = []
    monkeypatch.setattr(Run, "fit_queue", lambda run, *a: asked.append(a) or 17)
    monkeypatch.setattr(Run, "measure", lambda *_: None)
    small = "--data scenes:8 --arch resnet18 --size 64 --batch-size 8 --workers 0 --steps 0 --window 16 16 --amp none"
    train(*small.split(), *flags.split(), "--output-dir", tmp_path)
    assert asked == [given]
    state = checkpoint(tmp_path)
    assert state["settings"]["queue_size"] == 17 and state["model"]["image_queue.vectors"].shape == (17, 128)


def test_trains_with_the_cards_packages_alone(tmp_path):
    """matplotlib, tqdm, OpenCV blocked: a folder trains all the same, without its curves; and on two processes."""
    write_images(tmp_path / "images", 16)
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(
        "import sys\nfor name in ('matplotlib', 'tqdm', 'cv2', 'pycocotools'):\n    sys.modules[name] = None\n"
    )
    flags = [flag for flag in FPN if flag not in ("scenes:32", "--data")]
    flags += ["--data", tmp_path / "images", "--steps", "2", "--output-dir", tmp_path / "run"]
    text = run("resim.py", *flags, env={"PYTHONPATH": str(tmp_path / "site")}, processes=2)
    assert "matplotlib is not installed: no curves.png" in text and "batch 8 = 2 x 4 on cpu" in text
    assert "curves.png" not in os.listdir(tmp_path / "run") and "regions_end.png" in os.listdir(tmp_path / "run")


def test_pool_changes_what_is_compared(finished, tmp_path):
    train(*FPN, "--pool", "roi_align", "--steps", "2", "--output-dir", tmp_path)
    one, other = (log_lines(folder)[2] for folder in (finished[0], tmp_path))
    assert one["step"] == other["step"] == 2 and other["valid_p3"] > 0.1
    assert one["loss_p4"] != other["loss_p4"] and one["loss_p3"] != other["loss_p3"]


PAPER_SIZE = [
    "",
    "--levels c4",
    "--framework simsiam",
    "--preset official",
]


@pytest.mark.slow
@pytest.mark.parametrize("flags", PAPER_SIZE, ids=[flags or "bare" for flags in PAPER_SIZE])
def test_paper_size_takes_two_steps(flags, monkeypatch, tmp_path):
    """ResNet-50, 224 pixels, K 65536: the paper's command with only --batch-size and --steps changed; one with pictures."""
    if flags:
        monkeypatch.setattr(Run, "measure", lambda *_: None)
    k = [] if "simsiam" in flags else ["--queue-size", "65536"]
    flags = [*"--data scenes:16 --batch-size 8 --steps 2".split(), *flags.split(), *k]
    train(*flags, "--output-dir", tmp_path)
    line = [line for line in log_lines(tmp_path) if "loss" in line][-1]
    levels = ["c4"] if "c4" in flags else ["p4", "p3"]
    assert line["step"] == 2 and (tmp_path / "resnet50.pth").exists()
    assert all(0.2 < line[f"valid_{name}"] < 0.95 for name in levels)
    if k:
        assert checkpoint(tmp_path)["model"]["image_queue.vectors"].shape == (65536, 128)
        assert line["loss_chance"] == pytest.approx(11.09, abs=0.01)
