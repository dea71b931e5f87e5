"""d3ssl.py as its user starts it: proposals first, outputs, killed runs, ablations; what all methods share is tested with setsim.py."""

import os
import random
import shutil
import signal
import subprocess
import time

import pytest
import torch
import torchvision
from helpers import (
    TINY,
    assert_same,
    checkpoint,
    command,
    keep_signals,  # noqa: F401
    log_lines,
    run,
    signal_after,
    write_images,
)
from PIL import Image

import common
import d3ssl
from tools import proposals

SOCO = [flag for flag in TINY if flag not in ("--queue-size", "24", "--group-size", "4")] + ["--framework", "soco"]


SCENES = "scenes-32-64-0.proposals"


def train(*flags):
    """The script within this process, which saves the seconds that a new interpreter needs to import torch."""
    d3ssl.main([str(flag) for flag in flags])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of 8 steps (2 epochs of 4), never interrupted, of D3SSL on scenes whose proposals it makes."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    return folder, run("d3ssl.py", *TINY, "--output-dir", folder)


@pytest.fixture(scope="module")
def folder_of_images(tmp_path_factory):
    """16 images and the file of their proposals."""
    folder = write_images(tmp_path_factory.mktemp("images"), 16, size=(90, 70))
    path = folder / "boxes.proposals"
    proposals.make(common.open_images(str(folder), 0, 0), str(path), "single", 0)
    return folder, path


def test_outputs(finished):
    folder, text = finished
    pictures = {"curves.png", "regions_start.png", "regions_end.png"}
    files = {"checkpoint.pth", "resnet18.pth", "log.jsonl", SCENES, *pictures}
    assert set(os.listdir(folder)) == files and all(name in text.splitlines()[-1] for name in files)
    for name in pictures:
        assert min(Image.open(folder / name).size) > 200
    header, start, *steps, end = log_lines(folder)
    assert header["command"].split()[1].endswith("d3ssl.py") and "boxes, single" in header["settings"]["files"]
    assert [line["step"] for line in steps] == [2, 4, 6, 8]
    for line in (start, end):
        assert 0 <= line["probe"]["hits"] <= 1 and line["probe"]["objects"] > 50
        assert 0.25 <= line["probe"]["chance"] < 0.7
    values = "loss loss_dc loss_dp proposals empty shift stuck std lr bad_images loss_chance std_spread images_per_s data_share"
    assert all(set(values.split()) <= line.keys() for line in steps)
    for line in steps:
        assert line["loss"] == pytest.approx(line["loss_dc"] + line["loss_dp"], rel=1e-5)
        assert 1 < line["proposals"] <= 4 and line["shift"] > 1 and 0 <= line["stuck"] <= 1
    state = checkpoint(folder)
    assert state["script"] == "d3ssl" and state["model"]["bank.pointer"].item() == 8 * 8 * 4 % 24
    for title in ("start", "end"):
        assert f"{title} of training: " in text and "objects of held-out scenes are found again in another view" in text
    backbone = torch.load(folder / "resnet18.pth")
    result = torchvision.models.resnet18().load_state_dict(backbone, strict=False)
    assert (result.missing_keys, result.unexpected_keys) == (["fc.weight", "fc.bias"], [])
    assert torch.equal(
        backbone["layer4.1.bn2.weight"], state["model"]["query.trunk.layer4.1.bn2.weight"]
    )  # the student's


def test_everything_is_trained(finished):
    """Stem, res5 and projector all move away from their start."""
    folder, _ = finished
    args = d3ssl.get_args(TINY)
    start = d3ssl.build(args, common.World(0, 1, 0, torch.device("cpu")), 8).state_dict()
    end = checkpoint(folder)["model"]
    for name in (
        "trunk.conv1.weight",
        "trunk.layer3.0.conv1.weight",
        "trunk.layer4.1.conv2.weight",
        "projector.2.weight",
    ):
        moved = (end[f"query.{name}"] - start[f"query.{name}"]).norm()
        followed = (end[f"key.{name}"] - start[f"key.{name}"]).norm()
        assert moved > 0 and 0 < followed < 0.1 * moved  # the teacher slowly follows


@pytest.mark.parametrize("name", ["moco", "soco"])
def test_interrupted_equals_uninterrupted(name, finished, tmp_path):
    """Stopped between two checkpoints of epochs, every bit as if it had never stopped."""
    flags, whole = {"moco": (TINY, finished[0]), "soco": (SOCO, tmp_path / "whole")}[name]
    flags = [*flags, "--print-freq", "4"]
    if name == "soco":
        train(*flags, "--output-dir", whole)
    for steps in (3, 8):
        train(*flags, "--output-dir", tmp_path / "parts", "--steps", steps)
    assert_same(checkpoint(tmp_path / "parts"), checkpoint(whole))
    backbone = "query.encoder.trunk.conv1.weight" if name == "soco" else "query.trunk.conv1.weight"
    assert torch.equal(torch.load(whole / "resnet18.pth")["conv1.weight"], checkpoint(whole)["model"][backbone])


@pytest.mark.slow
def test_killed_at_random_instants(finished, tmp_path):
    """SIGKILL while the proposals are made and between steps; then to the end with the same command."""
    folder, _ = finished
    rng = random.Random(1)
    flags = [*TINY, "--output-dir", str(tmp_path), "--save-every", "1", "--print-freq", "1"]
    process = subprocess.Popen(command("d3ssl.py", *flags), start_new_session=True, stdout=subprocess.DEVNULL)
    unfinished = tmp_path / "scenes-32-64-0.proposals.partial"
    while process.poll() is None and not (unfinished.exists() and unfinished.stat().st_size > 1000):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for line in (rng.randrange(2, 6), rng.randrange(6, 10)):
        code, _ = signal_after("d3ssl.py", *flags, line=line, number=signal.SIGKILL)
        assert code in (-signal.SIGKILL, 0)
    run("d3ssl.py", *flags)
    assert (tmp_path / SCENES).read_bytes() == (folder / SCENES).read_bytes()
    for name in ("model", "optimizer", "step"):
        assert_same(checkpoint(tmp_path)[name], checkpoint(folder)[name])
    assert [line["step"] for line in log_lines(tmp_path) if "loss" in line] == list(range(1, 9))


def test_a_folder_with_its_file_of_proposals(folder_of_images, tmp_path):
    """Two processes, the file made elsewhere, an unreadable image: named, and replaced together with its boxes."""
    images, path = folder_of_images
    copy = tmp_path / "copy"
    shutil.copytree(images, copy)
    (copy / "0003.png").write_bytes(b"torn")
    flags = [flag for flag in TINY if flag not in ("--data", "scenes:32")]
    flags += ["--data", copy, "--proposals", path, "--output-dir", tmp_path / "run", "--steps", "2"]
    text = run("d3ssl.py", *flags, processes=2)
    assert "batch 8 = 2 x 4 on cpu" in text and "unreadable image, another one takes its place: 0003.png" in text
    (line,) = (line for line in log_lines(tmp_path / "run") if "loss" in line)
    assert line["step"] == 2 and line["bad_images"] == 1


def test_bad_input_in_one_clear_line(finished, folder_of_images, tmp_path):
    folder, (images, path) = finished[0], folder_of_images
    base = [flag for flag in TINY if flag not in ("--data", "scenes:32")]
    other = write_images(tmp_path / "other", 9)
    (other / "0000.png").rename(other / "new.png")
    torch.save({}, tmp_path / "x.pth")
    for flags, words in (
        (["--data", images, "--proposals", tmp_path / "nowhere"], "no such file"),
        (["--data", images, "--proposals", tmp_path / "x.pth"], "not a file of proposals"),
        (["--data", other, "--proposals", path], "new.png"),
        (["--data", "scenes:32", "--proposals", path], "scene"),
        (["--data", tmp_path / "none", "--proposals", path], "no such folder"),
        (["--data", "scenes:32", "--output-dir", folder, "--cutout", "none"], "cutout 'prc' -> 'none'"),
        (["--data", "scenes:32", "--output-dir", folder, "--boxes", "3"], "boxes 4 -> 3"),
        (["--data", "scenes:32", "--output-dir", folder / "log.jsonl"], "--output-dir .*log.jsonl: File exists"),
        (["--data", "scenes:32", "--batch-size", "64"], "32 images are fewer than --batch-size 64"),
    ):
        with pytest.raises(common.UserError, match=words) as error:
            train(*base, "--output-dir", tmp_path / "out", *flags)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "flags",
    [
        "--no-depositioning --cutout none --jitter none --prm none",
        "--amp bf16 --prm erase --bank both",
        "--framework soco --cutout prc --jitter rbj --prm",
    ],
)
def test_variants_run(flags, finished, tmp_path):
    base, scenes = (SOCO if "soco" in flags else TINY), finished[0] / SCENES
    train(*base, *flags.split(), "--steps", "2", "--output-dir", tmp_path, "--proposals", scenes)
    (line,) = (line for line in log_lines(tmp_path) if "loss" in line)
    assert line["step"] == 2 and ("loss_dp" in line) == ("erase" in flags) and -4 < line["loss"] < 20


@pytest.mark.slow
@pytest.mark.parametrize("framework", ["moco", "soco"])
def test_paper_size_takes_two_steps(framework, monkeypatch, tmp_path):
    """ResNet-50, 224 pixels, a bank of 65536: the paper's command with only --batch-size and --steps changed."""
    monkeypatch.setattr(d3ssl, "probe", lambda *_: {})
    flags = "--data scenes:16 --batch-size 8 --steps 2".split()
    flags += ["--queue-size", "65536"] if framework == "moco" else ["--framework", "soco"]
    train(*flags, "--output-dir", tmp_path)
    line = [line for line in log_lines(tmp_path) if "loss" in line][-1]
    assert line["step"] == 2 and (tmp_path / "resnet50.pth").exists() and line["proposals"] > 3
    if framework == "moco":
        assert checkpoint(tmp_path)["model"]["bank.vectors"].shape == (65536, 128)
        assert line["loss_chance"] == pytest.approx(44.36, abs=0.01)
    shutil.rmtree(tmp_path)  # half a gigabyte
