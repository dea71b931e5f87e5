"""setsim.py as its user starts it: whole runs, killed runs, wrong input, several processes."""

import os
import pathlib
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


def train(*flags):
    """The script within this process, which saves the seconds that a new interpreter needs to import torch."""
    setsim.main([str(flag) for flag in flags])


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
    assert lines[1]["probe"]["cells"] > 50 and lines[-1]["probe"]["cells"] == lines[1]["probe"]["cells"]
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


def test_queue_shrinks_to_the_data(tmp_path, capsys):
    flags = "--data scenes:32 --arch resnet18 --size 64 --batch-size 8 --group-size 4 --workers 0 --steps 0".split()
    train(*flags, "--output-dir", tmp_path / "a")
    assert "queue: 24 keys instead of 65536" in capsys.readouterr().out
    train(*flags, "--queue-size", "100", "--output-dir", tmp_path / "b")
    assert "warning: --queue-size 100 can hold several keys of one image" in capsys.readouterr().out
    train(*flags, "--group-size", "8", "--output-dir", tmp_path / "c")
    assert "warning: one group of images" in capsys.readouterr().out


def test_finished_run_says_so(finished, capsys):
    folder, _ = finished
    before = (folder / "checkpoint.pth").stat().st_mtime_ns
    train(*TINY, "--output-dir", folder)
    assert "finished" in capsys.readouterr().out
    elsewhere = folder.parent / "elsewhere"  # a finished run's checkpoint gives a new folder all its files
    train(*TINY, "--output-dir", elsewhere, "--resume", folder / "checkpoint.pth")
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


def test_resume_with_other_settings_is_refused_and_named(finished, tmp_path):
    folder, _ = finished
    before = checkpoint(folder)
    message = in_process(*TINY, "--output-dir", folder, "--mu", "0.3", "--lr", "0.2")
    assert "mu 0.0 -> 0.3" in message and "lr 0.1 -> 0.2" in message
    write_images(tmp_path / "images", 32)
    assert "files '32 scenes" in in_process(*TINY, "--output-dir", folder, "--data", tmp_path / "images")
    torch.save(before | {"settings": before["settings"] | {"processes": 2}}, tmp_path / "of_two.pth")
    assert "processes 2 -> 1" in in_process(*TINY, "--output-dir", tmp_path / "x", "--resume", tmp_path / "of_two.pth")
    train(*TINY, "--output-dir", folder, "--print-freq", "7", "--save-every", "5", "--workers", "2")  # these may differ
    assert_same(before, checkpoint(folder))


def test_explicit_resume(finished, tmp_path, capsys):
    folder, _ = finished
    train(*TINY, "--steps", "2", "--output-dir", tmp_path / "own")
    moved = [*TINY, "--output-dir", tmp_path / "new", "--resume", tmp_path / "own" / "checkpoint.pth"]
    train(*moved, "--steps", "3")
    train(*moved)  # the same command again: from step 3 of its own, not from step 2
    assert "continued from step 3" in capsys.readouterr().out
    assert_same(checkpoint(tmp_path / "new"), checkpoint(folder))
    flags = [*TINY, "--output-dir", tmp_path / "x", "--resume", "nowhere.pth"]
    assert in_process(*flags) == "--resume nowhere.pth: no such file"


def in_process(*flags):
    """main() in this process, for the many errors: the message of its UserError."""
    with pytest.raises(common.UserError) as error:
        setsim.main([str(flag) for flag in flags])
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
    for kind, content in {"garbage": b"garbage", "empty": b""}.items():
        (tmp_path / f"{kind}.pth").write_bytes(content)
        assert "not a checkpoint" in in_process(*tiny, "--resume", tmp_path / f"{kind}.pth")
        assert "not a checkpoint" in in_process(*tiny, "--init", tmp_path / f"{kind}.pth")
    assert "go to --init" in in_process(*tiny, "--resume", folder / "resnet18.pth")
    state = checkpoint(folder)
    torch.save(state | {"script": "resim"}, tmp_path / "resim.pth")
    assert "a checkpoint of resim.py" in in_process(*tiny, "--resume", tmp_path / "resim.pth")
    assert "check --arch" in in_process(*tiny, "--arch", "resnet34", "--init", folder / "resnet18.pth")
    assert "resnet18' -> 'resnet34" in in_process(*tiny, "--arch", "resnet34", "--resume", folder / "checkpoint.pth")
    if os.getuid() != 0:
        (tmp_path / "locked").mkdir(mode=0)
        assert "cannot read the folder" in in_process("--data", tmp_path / "locked", *out)


def test_exit_code_of_bad_input():
    text = run("setsim.py", "--data", "/nowhere/at/all", expect=2)
    assert text.startswith("setsim.py: error: --data /nowhere/at/all: no such folder") and len(text.splitlines()) == 1


def test_batch_that_processes_cannot_share(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "start_processes", lambda: common.World(0, 2, 0, torch.device("cpu")))
    message = in_process(*TINY, "--batch-size", "9", "--output-dir", tmp_path)
    assert message == "--batch-size 9 is not divisible by 2 processes"


def test_batches_that_batch_norm_cannot_do(tmp_path):
    flags = [*TINY, "--output-dir", tmp_path]
    assert "leave one alone" in in_process(*flags, "--batch-size", "3", "--group-size", "2")


def test_settings_reach_views_and_optimiser(tmp_path, monkeypatch):
    """The preset's order of the flip; weight decay on everything (B3); SimSiam's predictors keep their lr (B6)."""
    views, optimisers = [], []
    two_views, sgd = setsim.TwoViews, torch.optim.SGD
    monkeypatch.setattr(setsim, "TwoViews", lambda *a: views.append(a[2]) or two_views(*a))

    def record(groups, *args, **kwargs):
        optimisers.append(sgd(groups, *args, **kwargs))
        return optimisers[-1]

    monkeypatch.setattr(torch.optim, "SGD", record)
    flags = (
        "--data scenes:16 --arch resnet18 --size 64 --batch-size 8 --workers 0 --epochs 2 --lr 0.32 --weight-decay 0.01"
    )
    for name, extra in {
        "paper": "--framework simsiam --dim 16",
        "official": "--preset official --queue-size 8",
    }.items():
        train(*flags.split(), *extra.split(), "--momentum", "0.5", "--output-dir", tmp_path / name)
    assert views == [False, True]
    simsiam, moco = optimisers
    assert [group["lr"] for group in simsiam.param_groups] == pytest.approx([0.005, 0.01])  # second of two epochs
    assert [group["lr"] for group in moco.param_groups] == pytest.approx([0.005])
    predictors = sum(p.numel() for p in simsiam.param_groups[1]["params"])
    assert predictors == 2 * (16 * 4 + 2 * 4 + 4 * 16 + 16)  # image and cells: 16-4-16 with a norm between
    for optimiser, network in ((simsiam, "paper"), (moco, "official")):
        state = checkpoint(tmp_path / network)["model"]
        learnt = sum(
            t.numel() for n, t in state.items() if n.startswith("query") and "running" not in n and "tracked" not in n
        )
        assert sum(p.numel() for group in optimiser.param_groups for p in group["params"]) == learnt
        assert all((group["weight_decay"], group["momentum"]) == (0.01, 0.5) for group in optimiser.param_groups)


def test_other_ranks_take_part_and_write_nothing(tmp_path, monkeypatch):
    """Synchronised batch norm waits for all processes, so the probe has to be run by all; files are the first one's."""
    probed, original = [], setsim.probe
    monkeypatch.setattr(setsim, "probe", lambda *a: probed.append(a[-1]) or original(*a))
    monkeypatch.setattr(common, "start_processes", lambda: common.World(1, 1, 0, torch.device("cpu")))
    train(*TINY, "--steps", "1", "--output-dir", tmp_path)
    assert probed == ["start", "end"] and os.listdir(tmp_path) == []


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
    method = setsim.build(args, common.World(0, 1, 0, torch.device("cpu")), args.init)
    for name, tensor in torch.load(folder / "resnet18.pth").items():
        for network in (method.query, method.key):
            assert torch.equal(network.trunk.state_dict()[name], tensor)
    train(*flags, "--steps", "1")
    assert "backbone: 120 tensors of resnet18" in capsys.readouterr().out
    torch.testing.assert_close(  # a checkpoint serves as well
        common.load_backbone(folder / "checkpoint.pth", "resnet18")[0],
        torch.load(folder / "resnet18.pth"),
        rtol=0,
        atol=0,
    )


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
        "--framework simsiam --batch-size 8 --dim 16",
        "--matcher none",
        "--matcher hungarian --symmetric",
        "--preset official --amp bf16",
        pytest.param("--amp fp16", marks=pytest.mark.slow),  # emulated on most CPUs
    ],
)
def test_variants_run(flags, tmp_path):
    base = list(TINY)
    if "simsiam" in flags:
        for name in ("--queue-size", "24", "--group-size", "4"):
            base.remove(name)
    train(*base, *flags.split(), "--steps", "2", "--output-dir", tmp_path)
    assert checkpoint(tmp_path)["step"] == 2
    train(*base, *flags.split(), "--steps", "4", "--output-dir", tmp_path)
    lines = [line for line in log_lines(tmp_path) if "loss" in line]
    assert len(lines) == 2 and ("loss_set" in lines[0]) == ("none" not in flags)


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
        monkeypatch.setattr(setsim, "probe", lambda *_: {})
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
