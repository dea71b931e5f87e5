"""setsim.py as its user starts it: whole runs, killed runs, wrong input, several processes."""

import os
import pathlib
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess

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
import setsim
from harness import weights
from harness.run import Run


def train(*flags):
    """The script within this process, which saves the seconds that a new interpreter needs to import torch."""
    setsim.train([str(flag) for flag in flags])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of 8 steps (2 epochs of 4), never interrupted."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    text = run("setsim.py", *TINY, "--output-dir", folder)
    return folder, text


def test_outputs(finished):
    folder, text = finished
    names = {"checkpoint.pth", "resnet18.pth", "log.jsonl", "curves.png", "matches_start.png", "matches_end.png"}
    assert set(os.listdir(folder)) == names
    for name in names:
        if name.endswith(".png"):
            assert min(Image.open(folder / name).size) > 200
    resnet = torchvision.models.resnet18()
    missing, unexpected = resnet.load_state_dict(torch.load(folder / "resnet18.pth"), strict=False)
    assert missing == ["fc.weight", "fc.bias"] and unexpected == []
    state = checkpoint(folder)["model"]
    assert all(
        torch.equal(tensor, state[f"query.trunk.{name}"])
        for name, tensor in torch.load(folder / "resnet18.pth").items()
    )

    lines = log_lines(folder)
    assert lines[0]["command"].endswith(str(folder)) and lines[0]["versions"]["torch"] == torch.__version__
    assert "32 scenes" in lines[0]["settings"]["files"]
    start, end = lines[1]["probe"], lines[-1]["probe"]
    assert start["count"] == end["count"] > 50 and start["chance"] == end["chance"] and 0 < start["hits"] < 1
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [2, 4, 6, 8]
    assert steps[0]["loss_chance"] == pytest.approx(3.2189, abs=1e-4)  # ln 25
    health = {
        "loss_image",
        "loss_set",
        "positives",
        "rows",
        "empty",
        "std_image",
        "std_dense",
        "std_spread",
        "lr",
        "images_per_s",
    }
    assert health <= steps[0].keys()
    assert [line["lr"] for line in steps] == pytest.approx([0.1 * 8 / 256 * x for x in (1, 1, 0.5, 0.5)])
    assert "lr 0.003125 = 0.1 x 8/256" in text and "step 8/8" in text and "eta 0:00:00" in text
    shown = next(line for line in text.splitlines() if line.startswith("step 8/8 "))
    assert all(f" {name} " in shown for name in ("loss", "loss_image", "loss_set", "positives", "rows", "empty"))
    assert "chance" not in shown and "std" not in shown


def test_queue_shrinks_to_the_data(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(common, "GROUP", 4)
    flags = "--data scenes:32 --arch resnet18 --size 64 --batch-size 8 --workers 0 --steps 0".split()
    train(*flags, "--output-dir", tmp_path / "a")
    text = capsys.readouterr().out
    assert "queue: 24 keys instead of 65536" in text and "one group" not in text
    state = checkpoint(tmp_path / "a")
    assert state["model"]["set_queue.vectors"].shape == (24, 128) and state["settings"]["queue_size"] == 24
    train(*flags, "--queue-size", "100", "--output-dir", tmp_path / "b")
    assert "warning: --queue-size 100 holds more than an epoch" in capsys.readouterr().out
    monkeypatch.setattr(common, "GROUP", 8)
    train(*flags, "--output-dir", tmp_path / "c")
    assert "warning: one group of images" in capsys.readouterr().out


def test_finished_run_says_so(finished, capsys):
    folder, _ = finished
    before = (folder / "checkpoint.pth").stat().st_mtime_ns
    train(*TINY, "--output-dir", folder)
    assert "finished" in capsys.readouterr().out
    elsewhere = folder.parent / "elsewhere"  # a finished run's checkpoint alone gives a new folder all its files
    elsewhere.mkdir()
    shutil.copy(folder / "checkpoint.pth", elsewhere)
    train(*TINY, "--output-dir", elsewhere)
    assert {"checkpoint.pth", "resnet18.pth", "matches_end.png"} <= set(os.listdir(elsewhere))
    assert_same(checkpoint(elsewhere)["model"], checkpoint(folder)["model"])
    assert (folder / "checkpoint.pth").stat().st_mtime_ns == before


def test_workers_do_not_change_results_and_data_may_move(tmp_path):
    write_images(tmp_path / "one", 16)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    flags = [flag for flag in TINY if flag not in ("scenes:32", "--data", "--workers", "0")]
    for name, workers in (("one", 0), ("two", 2)):
        out = ["--output-dir", tmp_path / f"run_{name}"]
        train(*flags, "--data", tmp_path / name, "--workers", workers, "--steps", "3", *out)
    a, b = checkpoint(tmp_path / "run_one"), checkpoint(tmp_path / "run_two")
    assert_same(a, b)
    train(*flags, "--data", tmp_path / "two", "--workers", "0", "--steps", "4", "--output-dir", tmp_path / "run_one")


def test_interrupted_equals_uninterrupted(finished, tmp_path):
    """Stopped by --steps between two checkpoints of epochs and again at one: every bit as if it had never stopped."""
    folder, _ = finished
    for steps in (3, 4, 8):
        train(*TINY, "--output-dir", tmp_path, "--steps", steps)
    assert_same(checkpoint(tmp_path), checkpoint(folder))
    a, b = (
        [{k: v for k, v in line.items() if k not in ("images_per_s", "data_share")} for line in log_lines(f)[1:]]
        for f in (tmp_path, folder)
    )
    by_step = {line["step"]: line for line in a if "loss" in line}
    assert all(
        by_step[line["step"]] == line for line in b if "loss" in line and line["step"] != 4
    )  # 4: mean of one step, not two


@pytest.mark.slow
def test_killed_at_random_instants(finished, tmp_path):
    folder, _ = finished
    rng = random.Random(0)
    flags = [*TINY, "--output-dir", str(tmp_path), "--save-every", "1", "--print-freq", "1"]
    for line in (2, rng.randrange(3, 6), rng.randrange(6, 10)):
        code, _ = signal_after("setsim.py", *flags, line=line, number=signal.SIGKILL)
        assert code in (-signal.SIGKILL, 0)
        if (tmp_path / "checkpoint.pth").exists():
            checkpoint(tmp_path)  # whole at any time
    run("setsim.py", *flags)
    a, b = checkpoint(tmp_path), checkpoint(folder)
    for name in ("model", "optimizer", "step"):
        assert_same(a[name], b[name])
    steps = [line["step"] for line in log_lines(tmp_path) if "loss" in line]
    assert steps == list(range(1, 9))


def test_sigterm_saves_and_exits_0(tmp_path):
    """Sent to the whole process group, as launchers and terminals do: loader workers must not die of it first."""
    flags = [*TINY, "--workers", "1", "--output-dir", str(tmp_path), "--epochs", "100", "--print-freq", "1"]
    code, text = signal_after("setsim.py", *flags, line=4, number=signal.SIGTERM)
    assert code == 0 and "saved at step" in text
    step = int(re.search(r"saved at step (\d+)", text)[1])
    assert checkpoint(tmp_path)["step"] == step and log_lines(tmp_path)[-1]["step"] == step < 400


@pytest.mark.slow
def test_sigterm_under_torchrun(tmp_path):
    flags = [*TINY, "--workers", "1", "--output-dir", str(tmp_path), "--epochs", "200", "--print-freq", "1"]
    _, text = signal_after("setsim.py", *flags, line=4, number=signal.SIGTERM, processes=2)
    step = int(re.search(r"saved at step (\d+)", text)[1])
    assert checkpoint(tmp_path)["step"] == step


@pytest.mark.slow
def test_torchrun_restarts_a_killed_worker(tmp_path):
    """--max-restarts: all go on from the last checkpoint and end with the same weights, with three processes as well."""
    flags = [*TINY, "--batch-size", "9", "--epochs", "3", "--save-every", "1", "--output-dir"]
    run("setsim.py", *flags, tmp_path / "whole", processes=3)
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(  # kills rank 1 once, when five steps are saved
        "import os, threading, time\n"
        f"folder, mark = {str(tmp_path / 'broken')!r}, {str(tmp_path / 'killed')!r}\n"
        "def watch():\n"
        "    while not (os.path.exists(folder + '/log.jsonl') and open(folder + '/log.jsonl').read().count('\\n') > 3):\n"
        "        time.sleep(0.01)\n"
        "    open(mark, 'w').close()\n"
        "    os._exit(1)\n"
        "if os.environ.get('RANK') == '1' and not os.path.exists(mark):\n"
        "    threading.Thread(target=watch, daemon=True).start()\n"
    )
    restarting = command("setsim.py", *flags, tmp_path / "broken", processes=3)
    restarting.insert(restarting.index("--standalone"), "--max-restarts=2")
    env = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(restarting, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and (tmp_path / "killed").exists(), done.stderr
    assert "continued from step" in done.stdout
    for name in ("model", "optimizer", "step"):
        assert_same(checkpoint(tmp_path / "broken")[name], checkpoint(tmp_path / "whole")[name])


def test_two_processes_on_a_cpu(tmp_path):
    text = run("setsim.py", "--demo", *TINY, "--steps", "2", "--output-dir", tmp_path, processes=2)
    assert "batch 8 = 2 x 4 on cpu" in text and text.count("step 2/2 ") == 1
    assert checkpoint(tmp_path)["settings"]["processes"] == 2


def test_one_process_equals_two_in_every_tensor(tmp_path):
    """64 images in one process, or 32 in each of two: all that rank 0 saves, running statistics included (B15, B17).

    The keys are shuffled over all 64 images. Two steps of the symmetric loss: each network has seen four groups.
    """
    flags = "--data scenes:64 --batch-size 64 --queue-size 200 --symmetric --geometry --lr 0.5 --steps 2".split()
    flags = [*TINY, *flags, "--output-dir"]
    run("setsim.py", *flags, tmp_path / "two", processes=2)
    train(*flags, tmp_path / "one")
    one, two = checkpoint(tmp_path / "one"), checkpoint(tmp_path / "two")
    assert one["settings"] | {"processes": 2} == two["settings"]
    assert one["model"].keys() == two["model"].keys()
    moved = 0
    for name, tensor in one["model"].items():
        if name.endswith(("num_batches_tracked", "pointer")):
            assert torch.equal(two["model"][name], tensor)
            assert tensor == (2 * 2 * 64 % 200 if "pointer" in name else 4)
        else:  # fp32, sums in another order
            torch.testing.assert_close(
                two["model"][name], tensor, rtol=1e-3, atol=1e-5, msg=lambda text, n=name: n + text
            )
            moved += "running_mean" in name and (tensor.abs() > 1e-3).any().item()
    assert moved == 40
    for line, other in zip(*(log_lines(tmp_path / name) for name in ("one", "two")), strict=True):
        if "loss" in line:  # means over the processes
            for name in ("loss", "loss_image", "loss_set", "rows", "empty", "loss_chance"):
                assert other[name] == pytest.approx(line[name], rel=1e-4)


def test_resume_with_other_settings_is_refused_and_named(finished, tmp_path):
    folder, _ = finished
    before = checkpoint(folder)
    message = in_process(*TINY, "--output-dir", folder, "--set", "0.6", "--lr", "0.2")
    assert "set '0.7' -> '0.6'" in message and "lr 0.1 -> 0.2" in message
    write_images(tmp_path / "images", 32)
    assert "files '32 scenes" in in_process(*TINY, "--output-dir", folder, "--data", tmp_path / "images")
    of_two = before | {"settings": before["settings"] | {"processes": 2}}
    assert "processes 2 -> 1" in in_process(*TINY, "--output-dir", folder_with(tmp_path / "of_two", of_two))
    train(*TINY, "--output-dir", folder, "--print-freq", "7", "--save-every", "5", "--workers", "2")  # these may differ
    assert_same(before, checkpoint(folder))


def test_a_copied_folder_goes_on_by_itself(finished, tmp_path, capsys):
    """How to branch off. The same command again goes on from the copy's own step."""
    folder, _ = finished
    train(*TINY, "--steps", "2", "--output-dir", tmp_path / "own")
    shutil.copytree(tmp_path / "own", tmp_path / "new")
    train(*TINY, "--steps", "3", "--output-dir", tmp_path / "new")
    train(*TINY, "--output-dir", tmp_path / "new")
    assert "continued from step 3" in capsys.readouterr().out
    assert_same(checkpoint(tmp_path / "new"), checkpoint(folder))
    assert checkpoint(tmp_path / "own")["step"] == 2


def folder_with(folder, state):
    """A folder whose checkpoint.pth holds bytes as they are, or anything else by torch.save."""
    folder.mkdir()
    if isinstance(state, bytes):
        (folder / "checkpoint.pth").write_bytes(state)
    else:
        torch.save(state, folder / "checkpoint.pth")
    return folder


def in_process(*flags):
    """The message of the UserError with which a run within this process ends."""
    with pytest.raises(common.UserError) as error:
        train(*flags)
    message = str(error.value)
    assert "\n" not in message and len(message) < 400
    return message


def test_bad_input_in_one_clear_line(finished, tmp_path):
    folder, _ = finished
    out = ["--output-dir", tmp_path / "out"]
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("not a folder")
    tiny = [*TINY, *out]
    assert "no images in it" in in_process("--data", tmp_path / "empty", *out)
    assert "no such folder" in in_process("--data", tmp_path / "nowhere", *out)
    assert "scenes:4096" in in_process("--data", "scenes:many", *out)
    assert "32 images are fewer than --batch-size 64" in in_process(*tiny, "--batch-size", "64")
    assert "--output-dir" in in_process(*TINY, "--output-dir", tmp_path / "file")
    assert "--output-dir" in in_process(*TINY, "--output-dir", tmp_path / "file" / "below")
    for kind, content in {"garbage": b"garbage", "empty_file": b""}.items():
        broken = folder_with(tmp_path / kind, content)
        assert "not a checkpoint" in in_process(*TINY, "--output-dir", broken)
        assert "not a checkpoint" in in_process(*tiny, "--init", broken / "checkpoint.pth")
    weights_alone = torch.load(folder / "resnet18.pth")
    assert "go to --init" in in_process(*TINY, "--output-dir", folder_with(tmp_path / "weights", weights_alone))
    of_resim = folder_with(tmp_path / "resim", checkpoint(folder) | {"script": "resim"})
    assert "a checkpoint of resim.py" in in_process(*TINY, "--output-dir", of_resim)
    assert "check --arch" in in_process(*tiny, "--arch", "resnet34", "--init", folder / "resnet18.pth")
    assert "resnet18' -> 'resnet34" in in_process(*TINY, "--arch", "resnet34", "--output-dir", folder)
    assert in_process(*tiny, "--init", "nowhere.pth") == "nowhere.pth: no such file"
    if os.getuid() != 0:
        (tmp_path / "locked").mkdir(mode=0)
        assert "cannot read the folder" in in_process("--data", tmp_path / "locked", *out)


def test_exit_code_of_bad_input():
    text = run("setsim.py", "--data", "/nowhere/at/all", expect=2)
    assert text.startswith("setsim.py: error: --data /nowhere/at/all: no such folder") and len(text.splitlines()) == 1
    usage, message = run("setsim.py", "--data", "x", "--epochs", "0", expect=2).splitlines()
    assert usage.startswith("usage: setsim.py --data DIR")
    assert message == "setsim.py: error: argument --epochs: 0: must be at least 1"


def test_batch_that_processes_cannot_share(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "start_processes", lambda: (0, 2, torch.device("cpu")))
    message = in_process(*TINY, "--batch-size", "9", "--output-dir", tmp_path)
    assert message == "--batch-size 9 is not divisible by 2 processes"


def test_batches_that_batch_norm_cannot_do(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "start_processes", lambda: (0, 2, torch.device("cpu")))
    message = in_process(*TINY, "--batch-size", "2", "--output-dir", tmp_path)
    assert message == "--batch-size 2 leaves one image for each process: batch norm needs two"


def test_settings_reach_views_and_optimiser(tmp_path, monkeypatch):
    """Size of the views; weight decay on everything (B3); SimSiam's predictors keep their lr (B6)."""
    views, optimisers = [], []
    steps, sgd = Run.steps, torch.optim.SGD
    monkeypatch.setattr(Run, "steps", lambda run, *a: views.append(a) or steps(run, *a))

    def record(groups, *args, **kwargs):
        optimisers.append(sgd(groups, *args, **kwargs))
        return optimisers[-1]

    monkeypatch.setattr(torch.optim, "SGD", record)
    flags = "--data scenes:16 --arch resnet18 --size 64 --batch-size 8 --workers 0 --epochs 2 --lr 0.32".split()
    for name, extra in {"paper": "--framework simsiam", "official": "--preset official --queue-size 8"}.items():
        train(*flags, *extra.split(), "--output-dir", tmp_path / name)
    for (function,) in views:
        function = pickle.loads(pickle.dumps(function))  # as workers get it where they do not fork
        view_q, view_k, window_q, window_k = function(Image.new("RGB", (90, 70)))
        assert view_q.shape == view_k.shape == (3, 64, 64) and window_q.shape == window_k.shape == (4,)
    simsiam, moco = optimisers
    assert [group["lr"] for group in simsiam.param_groups] == pytest.approx([0.005, 0.01])  # second of two epochs
    assert moco.param_groups[0]["lr"] == pytest.approx(0.005) and not moco.param_groups[1]["params"]
    predictors = sum(p.numel() for p in simsiam.param_groups[1]["params"])
    assert predictors == 2 * (512 * 128 + 2 * 128 + 128 * 512 + 512)  # image and cells: 512-128-512, a norm between
    for optimiser, network in ((simsiam, "paper"), (moco, "official")):
        state = checkpoint(tmp_path / network)["model"]
        learnt = sum(
            t.numel() for n, t in state.items() if n.startswith("query") and "running" not in n and "tracked" not in n
        )
        assert sum(p.numel() for group in optimiser.param_groups for p in group["params"]) == learnt
        assert all((group["weight_decay"], group["momentum"]) == (1e-4, 0.9) for group in optimiser.param_groups)


def test_other_ranks_take_part_and_write_nothing(tmp_path, monkeypatch):
    """Synchronised batch norm waits for all processes, so all must measure. Files are the first one's."""
    measured, original = [], Run.measure
    monkeypatch.setattr(Run, "measure", lambda run, title, *a: measured.append(title) or original(run, title, *a))
    monkeypatch.setattr(common, "start_processes", lambda: (1, 1, torch.device("cpu")))
    train(*TINY, "--steps", "1", "--output-dir", tmp_path)
    assert measured == ["start", "end"] and os.listdir(tmp_path) == []


def test_full_disk_keeps_the_last_checkpoint(tmp_path):
    """A limit on the size of files stands for the full disk: the write fails inside the operating system."""
    flags = [*TINY, "--output-dir", tmp_path]
    train(*flags, "--steps", "2")
    before = checkpoint(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, hard))
    try:
        message = in_process(*flags)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "no space left to write" in message and "resnet18.pth" in message
    assert_same(checkpoint(tmp_path), before)
    assert not list(tmp_path.glob("*.tmp"))
    train(*flags, "--steps", "4")


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    flags = [*TINY, "--output-dir", tmp_path, "--save-every", "1"]
    original = setsim.set_contrastive_loss
    calls = []
    monkeypatch.setattr(
        setsim,
        "set_contrastive_loss",
        lambda *a: calls.append(1) or original(*a) * (float("nan") if len(calls) > 3 else 1),
    )
    assert "not finite (steps 3 to 4)" in in_process(*flags)
    assert checkpoint(tmp_path)["step"] == 3
    assert all(tensor.isfinite().all() for tensor in checkpoint(tmp_path)["model"].values())


def test_exploding_weights_stop_the_run(tmp_path):
    assert "finite" in in_process(*TINY, "--output-dir", tmp_path, "--lr", "1e30")


def test_real_folders(tmp_path, capsys):
    """Odd files among many: EXIF, grey, palette, CMYK, one pixel, a corrupt one that is named, counted and replaced."""
    folder = write_images(tmp_path / "images" / "some class", 110)
    Image.new("L", (30, 60), 77).save(folder / "grey.jpg")
    Image.new("CMYK", (60, 30), 77).save(folder / "cmyk.jpg")
    Image.new("P", (60, 30), 77).save(folder / "palette.png")
    Image.new("RGB", (1, 1), 77).save(folder / "pixel.png")
    exif = Image.Exif()
    exif[0x0112] = 8
    Image.new("RGB", (50, 30)).save(folder / "turned.jpg", exif=exif)
    (folder / "0007.png").write_bytes(b"broken")
    flags = [flag for flag in TINY if flag not in ("scenes:32", "--data")]
    flags += ["--data", tmp_path / "images", "--epochs", "2", "--batch-size", "23"]
    train(*flags, "--output-dir", tmp_path / "run")
    text = capsys.readouterr().out
    assert text.count("unreadable image, another one takes its place: some class/0007.png") == 1
    assert log_lines(tmp_path / "run")[-2]["bad_images"] == 1
    for name in sorted(os.listdir(folder))[:3]:
        (folder / name).write_bytes(b"broken")
    assert "of 115 images cannot be read" in in_process(*flags, "--output-dir", tmp_path / "second")


def test_init_starts_both_encoders(finished, tmp_path, capsys):
    folder, _ = finished
    flags = [*TINY, "--output-dir", tmp_path, "--init", folder / "resnet18.pth"]
    args = setsim.get_args([str(flag) for flag in flags])
    method = setsim.build(args, torch.device("cpu"), args.init)
    for name, tensor in torch.load(folder / "resnet18.pth").items():
        for network in (method.query, method.key):
            assert torch.equal(network.trunk.state_dict()[name], tensor)
    assert capsys.readouterr().out.count("backbone: ") == 1
    train(*flags, "--steps", "1")
    assert "backbone: 120 tensors of resnet18" in capsys.readouterr().out
    torch.testing.assert_close(  # a checkpoint serves as well
        weights.load_backbone(folder / "checkpoint.pth", "resnet18")[0],
        torch.load(folder / "resnet18.pth"),
        rtol=0,
        atol=0,
    )


def test_init_is_not_read_again_on_resume(finished, tmp_path, capsys):
    """The checkpoint holds everything: the file may be gone, and the weights are those of an uninterrupted run."""
    start = shutil.copy(finished[0] / "resnet18.pth", tmp_path / "start.pth")
    flags = [*TINY, "--init", start, "--output-dir"]
    train(*flags, tmp_path / "whole", "--steps", "3")
    train(*flags, tmp_path / "broken", "--steps", "2")
    assert capsys.readouterr().out.count("backbone: ") == 2
    os.remove(start)
    train(*flags, tmp_path / "broken", "--steps", "3")
    text = capsys.readouterr().out
    assert "continued from step 2" in text and "backbone" not in text
    assert_same(checkpoint(tmp_path / "broken"), checkpoint(tmp_path / "whole"))
    other = [flag if flag != start else finished[0] / "resnet18.pth" for flag in flags]
    assert "init " in in_process(*other, tmp_path / "broken")  # another start is another run


def test_trains_with_the_cards_packages_alone(tmp_path):
    """matplotlib, tqdm, OpenCV blocked: a folder trains all the same, without its curves."""
    write_images(tmp_path / "images", 16)
    blocker = tmp_path / "site"
    blocker.mkdir()
    (blocker / "sitecustomize.py").write_text(
        "import sys\nfor name in ('matplotlib', 'tqdm', 'cv2', 'pycocotools'):\n    sys.modules[name] = None\n"
    )
    flags = [flag for flag in TINY if flag not in ("scenes:32", "--data")]
    text = run(
        "setsim.py",
        *flags,
        "--data",
        tmp_path / "images",
        "--steps",
        "2",
        "--output-dir",
        tmp_path / "run",
        env={"PYTHONPATH": str(blocker)},
    )
    assert "matplotlib is not installed: no curves.png" in text
    assert "curves.png" not in os.listdir(tmp_path / "run") and "matches_end.png" in os.listdir(tmp_path / "run")


@pytest.mark.parametrize(
    "flags",
    [
        "--framework simsiam --batch-size 8",
        "--loss-weight 0",
        "--matcher hungarian --symmetric",
        "--preset official --amp bf16",
        pytest.param("--amp fp16", marks=pytest.mark.slow),  # emulated on most CPUs
    ],
)
def test_variants_run(flags, tmp_path):
    train(*TINY, *flags.split(), "--steps", "2", "--output-dir", tmp_path)
    assert checkpoint(tmp_path)["step"] == 2
    train(*TINY, *flags.split(), "--steps", "4", "--output-dir", tmp_path)
    lines = [line for line in log_lines(tmp_path) if "loss" in line]
    assert len(lines) == 2 and ("loss_set" in lines[0]) == ("--loss-weight 0" not in flags)


PAPER_SIZE = [
    "",
    "--framework simsiam",
    "--preset official",
]


@pytest.mark.slow
@pytest.mark.parametrize("flags", PAPER_SIZE, ids=[flags or "bare" for flags in PAPER_SIZE])
def test_paper_size_takes_two_steps(flags, tmp_path, monkeypatch):
    """ResNet-50, 224 pixels, K 65536: the paper's command with only --batch-size and --steps changed; one with pictures."""
    if flags:
        monkeypatch.setattr(Run, "measure", lambda *_: None)
    k = [] if "simsiam" in flags else ["--queue-size", "65536"]
    train(*"--data scenes:16 --batch-size 8 --steps 2".split(), *flags.split(), *k, "--output-dir", tmp_path)
    line = [line for line in log_lines(tmp_path) if "loss" in line][-1]
    assert line["step"] == 2 and line["rows"] > 1 and (tmp_path / "resnet50.pth").exists()
    if k:
        assert checkpoint(tmp_path)["model"]["set_queue.vectors"].shape == (65536, 128)
    shutil.rmtree(tmp_path)  # half a gigabyte


@pytest.mark.skipif(not os.environ.get("DENSE_SSL_DATA"), reason="set DENSE_SSL_DATA to a folder of photographs")
def test_real_photographs(tmp_path):
    run(
        "setsim.py",
        "--demo",
        "--data",
        pathlib.Path(os.environ["DENSE_SSL_DATA"]),
        "--steps",
        "4",
        "--output-dir",
        tmp_path,
    )
