"""d3ssl.py as its user starts it: proposals, outputs, killed runs, processes, ablations.

What all methods share is tested with setsim.py.
"""

import math
import os
import pickle
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
from harness import images, proposals
from harness.run import Run

SOCO = [*TINY, "--framework", "soco"]
SCENES = "scenes-32-64-0.proposals"


def train(*flags):
    """The script within this process, which saves the seconds that a new interpreter needs to import torch."""
    d3ssl.train([str(flag) for flag in flags])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of 8 steps (2 epochs of 4), never interrupted, of D3SSL on scenes whose proposals it makes."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    return folder, run("d3ssl.py", *TINY, "--output-dir", folder)


@pytest.fixture(scope="module")
def folder_of_images(tmp_path_factory):
    """16 images and the folder of their proposals."""
    folder = write_images(tmp_path_factory.mktemp("images"), 16, size=(90, 70))
    path = folder / "boxes.proposals"
    proposals.make(images.open_images(str(folder), 0, 0), str(path))
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
        assert 0 <= line["probe"]["hits"] <= 1 and line["probe"]["count"] > 50
        assert 0.25 <= line["probe"]["chance"] < 0.7
    values = "loss loss_dc loss_dp proposals empty shift stuck std lr bad_images loss_chance std_spread images_per_s data_share"
    assert all(set(values.split()) <= line.keys() for line in steps)
    for line in steps:
        assert line["loss"] == pytest.approx(line["loss_dc"] + line["loss_dp"], rel=1e-5)
        assert 1 < line["proposals"] <= 4 and line["shift"] > 1 and 0 <= line["stuck"] <= 1
    state = checkpoint(folder)
    assert state["script"] == "d3ssl" and state["model"]["bank.pointer"].item() == 8 * 8 * 4 % 24
    for title in ("start", "end"):
        assert (
            f"{title} of training: " in text and "regions are found again in another view, in held-out scenes" in text
        )
    backbone = torch.load(folder / "resnet18.pth")
    result = torchvision.models.resnet18().load_state_dict(backbone, strict=False)
    assert (result.missing_keys, result.unexpected_keys) == (["fc.weight", "fc.bias"], [])
    of_student = state["model"]["query.trunk.layer4.1.bn2.weight"]
    assert torch.equal(backbone["layer4.1.bn2.weight"], of_student)


def test_everything_is_trained(finished):
    """Stem, res5 and projector all move away from their start."""
    folder, _ = finished
    start = d3ssl.build(d3ssl.get_args(TINY), torch.device("cpu")).state_dict()
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


@pytest.mark.parametrize("framework", ["moco", "soco"])
def test_interrupted_equals_uninterrupted(framework, finished, tmp_path, monkeypatch):
    """Stopped between two checkpoints of epochs, every bit as if it had never stopped.

    SoCo's m rises over the schedule, not over the steps of one start.
    """
    flags, whole = {"moco": (TINY, finished[0]), "soco": (SOCO, tmp_path / "whole")}[framework]
    flags = [*flags, "--proposals", finished[0] / SCENES, "--print-freq", "4"]
    momenta, update = [], common.momentum_update
    monkeypatch.setattr(common, "momentum_update", lambda key, query, m: momenta.append(m) or update(key, query, m))
    monkeypatch.setattr(Run, "measure", lambda *_: None)
    if framework == "soco":
        train(*flags, "--output-dir", whole)
    for steps in (3, 8):
        train(*flags, "--output-dir", tmp_path / "parts", "--steps", steps)
    assert_same(checkpoint(tmp_path / "parts"), checkpoint(whole))
    backbone = checkpoint(whole)["model"]["query.trunk.conv1.weight"]
    assert torch.equal(torch.load(whole / "resnet18.pth")["conv1.weight"], backbone)
    rising = [1 - 0.01 * (math.cos(math.pi * step / 8) + 1) / 2 for step in range(8)]
    assert momenta[::2] == momenta[1::2]  # trunk and projector
    assert momenta[::2] == ([0.999] * 8 if framework == "moco" else pytest.approx(rising * 2))


@pytest.mark.slow
def test_killed_at_random_instants(finished, tmp_path):
    """SIGKILL while the proposals are made and between steps; then to the end with the same command."""
    folder, _ = finished
    rng = random.Random(1)
    flags = [*TINY, "--output-dir", str(tmp_path), "--save-every", "1", "--print-freq", "1"]
    process = subprocess.Popen(command("d3ssl.py", *flags), start_new_session=True, stdout=subprocess.DEVNULL)
    while process.poll() is None and not (tmp_path / SCENES).exists():
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for line in (rng.randrange(2, 6), rng.randrange(6, 10)):
        code, _ = signal_after("d3ssl.py", *flags, line=line, number=signal.SIGKILL)
        assert code in (-signal.SIGKILL, 0)
    run("d3ssl.py", *flags)
    for path in (folder / SCENES).iterdir():
        assert (tmp_path / SCENES / path.name).read_bytes() == path.read_bytes()
    for name in ("model", "optimizer", "step"):
        assert_same(checkpoint(tmp_path)[name], checkpoint(folder)[name])
    assert [line["step"] for line in log_lines(tmp_path) if "loss" in line] == list(range(1, 9))


def test_a_folder_with_its_proposals(folder_of_images, tmp_path):
    """Two processes, proposals made elsewhere, an unreadable image: named, and replaced together with its boxes."""
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


GROUPS_OF_FOUR = """
import common, d3ssl
from harness.run import Run, main
common.GROUP = 4
Run.measure = lambda *_: None
main(d3ssl.train)
"""


def test_settings_reach_views_and_optimiser(tmp_path, monkeypatch):
    """Size and augmentations of the views, none for the measurement; weight decay on everything (B3)."""
    views, optimisers = [], []
    steps, sgd = Run.steps, torch.optim.SGD
    monkeypatch.setattr(Run, "measure", lambda *_: None)
    monkeypatch.setattr(Run, "steps", lambda run, *a: views.extend(a) or steps(run, *a))
    monkeypatch.setattr(torch.optim, "SGD", lambda *a, **k: optimisers.append(sgd(*a, **k)) or optimisers[-1])
    flags = [*TINY, "--data", "scenes:8", "--output-dir", tmp_path, "--lr", "0.32"]  # one step an epoch, two epochs
    train(*flags, *"--size 96 --augment soco-jitter prm".split())
    item = Image.new("RGB", (90, 70)), torch.tensor([[5.0, 5, 60, 65], [20, 10, 80, 60]])
    for function, augment in zip(views, (["prm", "soco-jitter"], []), strict=True):
        function = pickle.loads(pickle.dumps(function))  # as workers get it where they do not fork
        for i in range(5):
            with common.drawing("reach", i):
                got = function(item)
            with common.drawing("reach", i):
                want = d3ssl.draw_views(item, 96, augment)
            assert all(torch.equal(*pair) for pair in zip(got, want, strict=True))
    (optimiser,) = optimisers
    (group,) = optimiser.param_groups
    assert group["lr"] == pytest.approx(0.32 * 8 / 256 / 2)  # of the last epoch
    assert (group["momentum"], group["weight_decay"]) == (0.9, 1e-4)
    state = checkpoint(tmp_path)["model"]
    learnt = [name for name in state if name.startswith("query") and "running" not in name and "tracked" not in name]
    assert sum(p.numel() for p in group["params"]) == sum(state[name].numel() for name in learnt)


def test_bad_input_in_one_clear_line(finished, folder_of_images, tmp_path):
    folder, (images, path) = finished[0], folder_of_images
    base = [flag for flag in TINY if flag not in ("--data", "scenes:32")]
    other = write_images(tmp_path / "other", 9)
    (other / "0000.png").rename(other / "new.png")
    torch.save({}, tmp_path / "x.pth")
    for flags, words in (
        (["--data", images, "--proposals", tmp_path / "nowhere"], "nowhere/meta.json: No such file"),
        (["--data", images, "--proposals", tmp_path / "x.pth"], "x.pth/meta.json: Not a directory.* delete it first"),
        (["--data", other, "--proposals", path], "new.png"),
        (["--data", "scenes:32", "--proposals", path], "scene"),
        (["--data", tmp_path / "none", "--proposals", path], "no such folder"),
        (["--data", "scenes:32", "--output-dir", folder / "log.jsonl"], "--output-dir .*log.jsonl: File exists"),
        (["--data", "scenes:32", "--batch-size", "64"], "32 images are fewer than --batch-size 64"),
    ):
        with pytest.raises(common.UserError, match=words) as error:
            train(*base, "--output-dir", tmp_path / "out", *flags)
        assert "\n" not in str(error.value)


def test_augmentations_of_a_continued_run_are_the_same_in_any_order(finished, capsys):
    folder, _ = finished
    before = checkpoint(folder)
    flags = [*TINY, "--output-dir", folder, "--augment"]
    train(*flags, "rbj", "prc", "prm")
    assert "finished, at step 8 of 8" in capsys.readouterr().out
    for names in ((), ("prc", "rbj"), ("rbj", "prm-erase", "prc")):
        with pytest.raises(common.UserError) as error:
            train(*flags, *names)
        assert f"augment ['prc', 'prm', 'rbj'] -> {sorted(names)}" in str(error.value)
    assert_same(checkpoint(folder), before)


@pytest.mark.parametrize(
    "flags",
    [
        "--no-depositioning --augment",
        "--amp bf16 --augment prc prm-erase rbj",
        "--framework soco --augment prc rbj prm",
    ],
)
def test_variants_run(flags, finished, tmp_path):
    scenes = finished[0] / SCENES
    train(*TINY, *flags.split(), "--steps", "2", "--output-dir", tmp_path, "--proposals", scenes)
    (line,) = (line for line in log_lines(tmp_path) if "loss" in line)
    assert line["step"] == 2 and ("loss_dp" in line) == ("erase" in flags) and -4 < line["loss"] < 20
    assert ("loss_chance" in line) == ("soco" not in flags)


@pytest.mark.slow
@pytest.mark.parametrize("framework", ["moco", "soco"])
def test_paper_size_takes_two_steps(framework, monkeypatch, tmp_path):
    """ResNet-50, 224 pixels, a bank of 65536: the paper's command with only --batch-size and --steps changed."""
    monkeypatch.setattr(Run, "measure", lambda *_: None)
    flags = "--data scenes:16 --batch-size 8 --steps 2".split()
    flags += ["--queue-size", "65536"] if framework == "moco" else ["--framework", "soco"]
    train(*flags, "--output-dir", tmp_path)
    line = [line for line in log_lines(tmp_path) if "loss" in line][-1]
    assert line["step"] == 2 and (tmp_path / "resnet50.pth").exists() and line["proposals"] > 3
    if framework == "moco":
        assert checkpoint(tmp_path)["model"]["bank.vectors"].shape == (65536, 128)
        assert line["loss_chance"] == pytest.approx(44.36, abs=0.01)
    shutil.rmtree(tmp_path)  # half a gigabyte
