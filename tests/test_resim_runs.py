"""resim.py as its user starts it: outputs, killed runs, export; what it shares with setsim.py is tested there."""

import os
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

FPN = [*BASE, *"--window 16 12 --stride 16 12".split()]
C4 = [*BASE, *"--levels c4 --window 16 --stride 16".split()]


def train(*flags):
    """The script within this process, which saves the seconds that a new interpreter needs to import torch."""
    resim.main([str(flag) for flag in flags])


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    """Runs within this process draw no curves and wait for no disk; what they leave, gigabytes together, is removed.

    Both happen in `finished` and in killed runs, which are processes of their own.
    """
    monkeypatch.setattr(common, "draw_curves", lambda *_: None)
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
    assert header["command"].split()[1].endswith("resim.py") and header["settings"]["window"] == [16, 12]
    assert [line["step"] for line in steps] == [2, 4, 6, 8]
    for line in (start, end):
        assert 0 <= line["probe"]["hits"] <= 1 and 0 < line["probe"]["chance"] < 0.7 and line["probe"]["cells"] > 100
    values = "loss loss_image loss_p4 loss_p3 valid_p4 valid_p3 empty_p4 empty_p3 std_image std_p4 std_p3 lr bad_images"
    values += " loss_chance chance_p4 chance_p3 std_spread spread_p4 spread_p3 images_per_s data_share"
    assert all(set(values.split()) <= line.keys() for line in steps)
    assert all(0.1 < line["valid_p4"] < 0.9 for line in steps) and "valid_p4 0." in text
    state = checkpoint(folder)
    assert state["script"] == "resim" and state["model"]["image_queue.pointer"].item() == 8 * 8 % 24
    message = "best match on C4 within one cell of the true place"
    assert f"start of training: {message}" in text and f"end of training: {message}" in text


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
    for i, name in ((1, "c3"), (2, "c4"), (3, "c5")):
        assert torch.equal(detector.fpn.inner_blocks[i][0].weight, model[f"query.pyramid.laterals.{name}.weight"])
    args = resim.get_args([*FPN, "--init", str(folder / "resnet18.pth")])
    method = resim.build(args, common.World(0, 1, 0, torch.device("cpu")), args.init)
    for network in (method.query, method.key):
        assert torch.equal(network.trunk.layer4[1].conv2.weight, backbone["layer4.1.conv2.weight"])


@pytest.mark.parametrize("name", ["fpn", "c4", "simsiam", "official"])
def test_interrupted_equals_uninterrupted(name, finished, tmp_path, monkeypatch):
    """Stopped between two checkpoints of epochs, every bit as if it had never stopped; FPN into the second epoch."""
    flags = {
        "fpn": FPN,
        "c4": C4,
        "simsiam": [*C4, "--framework", "simsiam"],
        "official": [*FPN, "--preset", "official", "--amp", "bf16"],
    }[name]
    if name == "simsiam":
        flags = [flag for flag in flags if flag not in ("--queue-size", "24", "--group-size", "4")]
    first, last = (3, 8) if name == "fpn" else (1, 2)
    whole = finished[0]
    if name != "fpn":
        whole = tmp_path / "whole"
        train(*flags, "--output-dir", whole, "--steps", last)
        assert {"regions_start.png", "regions_end.png"} <= set(os.listdir(whole))
        (line,) = (line for line in log_lines(whole) if "loss" in line)
        assert line["step"] == 2 and line["valid_p4" if name == "official" else "valid_c4"] > 0.1
    monkeypatch.setattr(resim, "draw_regions", lambda *_: None)
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
    for flags, words in (
        (["--data", tmp_path / "nowhere"], "no such folder"),
        (["--output-dir", folder, "--stride", "16", "24"], r"stride \[16, 12\] -> \[16, 24\]"),
        (["--output-dir", folder, "--preset", "official"], "preset 'paper' -> 'official'"),
        (["--init", folder / "log.jsonl"], "not a checkpoint"),
        (["--arch", "resnet34", "--init", folder / "resnet18.pth"], "check --arch"),
        (["--resume", folder / "fpn.pth"], "go to --init"),
    ):
        with pytest.raises(common.UserError, match=words) as error:
            train(*FPN, "--output-dir", tmp_path / "out", *flags)
        assert "\n" not in str(error.value)
    torch.save(checkpoint(folder) | {"script": "setsim"}, tmp_path / "setsim.pth")
    with pytest.raises(common.UserError, match="a checkpoint of setsim.py"):
        train(*FPN, "--output-dir", tmp_path / "out", "--resume", tmp_path / "setsim.pth")


def test_settings_reach_views_and_optimiser(tmp_path, monkeypatch):
    """The preset's order of colours; weight decay on everything (B3); SimSiam's predictors keep their lr (B6)."""
    views, optimisers = [], []
    two_views, sgd = resim.TwoViews, torch.optim.SGD
    monkeypatch.setattr(resim, "TwoViews", lambda *a: views.append(a[2]) or two_views(*a))
    monkeypatch.setattr(torch.optim, "SGD", lambda *a, **k: optimisers.append(sgd(*a, **k)) or optimisers[-1])
    flags = (
        "--data scenes:8 --arch resnet18 --size 64 --batch-size 8 --workers 0 --epochs 2 --lr 0.32 --weight-decay 0.01"
    )
    flags = [*flags.split(), "--window", "16", "12", "--stride", "16", "12", "--save-every", "9"]
    train(*flags, "--framework", "simsiam", "--output-dir", tmp_path / "simsiam")
    train(*flags, "--preset", "official", "--queue-size", "8", "--output-dir", tmp_path / "official")
    assert views == [False, True]
    assert len(torch.load(tmp_path / "simsiam" / "fpn.pth")) == 6  # laterals alone
    simsiam, moco = optimisers
    assert [group["lr"] for group in simsiam.param_groups] == pytest.approx([0.005, 0.01])  # second of two epochs
    assert [group["lr"] for group in moco.param_groups] == pytest.approx([0.005])
    widths = (512, 256, 128)  # image, P4, P3: predictors E - E/4 - E with a norm between
    assert sum(p.numel() for p in simsiam.param_groups[1]["params"]) == sum(
        E * E // 4 + 2 * E // 4 + E // 4 * E + E for E in widths
    )
    for optimiser in optimisers:
        assert all((group["weight_decay"], group["momentum"]) == (0.01, 0.9) for group in optimiser.param_groups)


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
        monkeypatch.setattr(resim, "probe", lambda *_: {})
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
