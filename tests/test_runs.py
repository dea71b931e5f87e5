# SPDX-License-Identifier: MIT
"""What all runs have in common, whatever script they are of: files, log, exact resume, refusals, signals, processes."""

import contextlib
import importlib
import io
import itertools
import json
import os
import pathlib
import pickle
import random
import resource
import runpy
import shutil
import signal
import subprocess
import sys
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torchvision
from bad_inputs import BAD
from helpers import (
    ROOT,
    assert_same,
    checkpoint,
    command,
    log_lines,
    run,
    signal_after,
    signals_given_back,
    write_images,
)
from PIL import Image
from scripts import METHODS, SCRIPTS, TIMES, TRANSFERS, flags_of, job, train
from several import SHARED, run_all
from tiny import TinyResNet

import common
import transfer_det
from harness import run as runs
from harness import weights
from harness.run import Run

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module", autouse=True)
def tiny_throughout():
    """torchvision's resnet18 is a TinyResNet."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torchvision.models, "resnet18", TinyResNet)
        yield


class Finished(NamedTuple):
    name: str
    folder: pathlib.Path
    text: str  # what it printed


@pytest.fixture(scope="module", params=SCRIPTS)
def finished(request, photos, tiny_throughout, tmp_path_factory):
    """A whole run of a script, never interrupted."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    with contextlib.redirect_stdout(io.StringIO()) as text, signals_given_back():
        train(request.param, photos, folder)
    return Finished(request.param, folder, text.getvalue())


def of(*names):
    """`finished` of these scripts alone."""
    return pytest.mark.parametrize("finished", names, indirect=True)


def assert_same_run(a, b):
    """Weights, queues, optimiser, step and settings of two checkpoints are equal, bit for bit."""
    a, b = checkpoint(a), checkpoint(b)
    for name in ("model", "optimizer", "scaler", "step", "settings", "bad_images"):
        assert_same(a[name], b[name], name)


def steps_of(folder):
    """{step: logged values}, without times."""
    lines = [line for line in log_lines(folder) if "loss" in line]
    return {line["step"]: {k: v for k, v in line.items() if k not in ("images_per_s", "data_share")} for line in lines}


def refusal(name, *where_and_flags):
    """The message of the UserError with which a run ends."""
    with pytest.raises(common.UserError) as error:
        train(name, *where_and_flags)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500
    return str(error.value)


# ---- a run that nothing disturbs


def test_a_run_leaves_what_it_promises(finished, photos):
    (name, folder, text), script = finished, SCRIPTS[finished.name]
    wanted = {"checkpoint.pth", "log.jsonl", "curves.png", *script.exports, *script.files.split()}
    assert {*os.listdir(folder)} == wanted and all(file in text for file in script.exports)
    assert all(min(Image.open(path).size) > 200 for path in folder.glob("*.png"))
    header, *lines = log_lines(folder)
    steps, state = [line for line in lines if "loss" in line], checkpoint(folder)
    assert header["versions"]["torch"] == torch.__version__ and header["settings"]["files"].startswith("12 images")
    assert [line["step"] for line in steps] == [*range(1, state["step"] + 1)] and state["step"] in (5, 6)
    assert all({*line} == {*TIMES.split(), *script.values.split()} for line in steps)
    assert state["script"] == name.split(".")[-1] and all(x.isfinite().all() for x in state["model"].values())
    shown = next(line for line in text.splitlines() if line.startswith(f"step {state['step']}/{state['step']} "))
    quiet = {v for v in script.values.split() if v == "loss_chance" or v.split("_")[0] in ("std", "spread", "chance")}
    assert all((f" {value} " in shown) == (value not in quiet) for value in script.values.split())
    assert "eta 0:00:00" in shown and "batch 6 = 1 x 6 on " in text
    for file, place in script.exports.items():
        assert_same(torch.load(folder / file), {k: state["model"][place + k] for k in torch.load(folder / file)})
    if name in METHODS:
        resnet = torchvision.models.resnet18().load_state_dict(torch.load(folder / "resnet18.pth"), strict=False)
        assert (resnet.missing_keys, resnet.unexpected_keys) == (["fc.weight", "fc.bias"], [])
        start, end = lines[0]["probe"], lines[-1]["probe"]
        assert start["count"] == end["count"] > 20 and start["chance"] == end["chance"] and 0 < start["hits"] < 1
        for title, found in (("start", start), ("end", end)):
            assert f"{title} of training: {found['hits']:.1%} of {found['count']} " in text
        chance, rates = np.log(21) * (4 if name == "d3ssl" else 1), np.array([1, 1, 0.75, 0.75, 0.25, 0.25])
        assert [line["loss_chance"] for line in steps] == pytest.approx([chance] * 6)
        assert [line["lr"] for line in steps] == pytest.approx(0.1 * 6 / 256 * rates)
    else:
        result, file = lines[-1]["result"], folder / script.files.split()[-1]
        assert json.loads(file.read_text()).items() >= result.items() and lines[-1]["step"] == state["step"]


@of(*METHODS)
def test_everything_is_trained(finished, photos):
    """Each parameter of the query network moves away from its start; the key network slowly follows."""
    name, folder, _ = finished
    module = importlib.import_module(name)
    method = module.build(module.get_args(flags_of(name, photos, folder)), torch.device("cpu"))
    start, end = method.state_dict(), checkpoint(folder)["model"]
    for parameter, _ in method.query.named_parameters():
        moved, followed = ((end[f"{n}.{parameter}"] - start[f"{n}.{parameter}"]).norm() for n in ("query", "key"))
        assert moved > 0 and followed < 0.1 * moved, parameter


def test_a_finished_run_says_so_and_changes_nothing(finished, photos, tmp_path, capsys):
    name, folder, _ = finished
    before = {path: path.read_bytes() for path in folder.iterdir()}
    train(name, photos, folder, "--print-freq", 7, "--save-every", 5, "--workers", 1)  # these may differ
    step = checkpoint(folder)["step"]
    assert f"{folder}: finished, at step {step} of {step}; give another --output-dir" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    shutil.copy(folder / "checkpoint.pth", tmp_path)  # alone it gives a new folder all files
    train(name, photos, tmp_path)
    assert {*os.listdir(tmp_path)} >= {path.name for path in before if "start" not in path.name} - {"curves.png"}
    model, again = (checkpoint(place)["model"] for place in (folder, tmp_path))
    if name == "transfer_det":  # a result that is lost takes precise batch norm once more, which counts its batches
        again |= {n: x for n, x in model.items() if n.endswith("num_batches_tracked")}
    assert_same(again, model)


# ---- a run in parts


def test_interrupted_equals_uninterrupted(finished, photos, tmp_path, capsys):
    """Stopped within an epoch and at its end, branched off by copying the folder, with loader processes, data moved."""
    name, folder, _ = finished
    train(name, photos, tmp_path / "parts", "--steps", 1)
    shutil.copytree(tmp_path / "parts", tmp_path / "copy")
    shutil.copytree(photos, tmp_path / "data")
    train(name, tmp_path / "data", tmp_path / "copy", "--steps", 2, "--workers", 1)
    train(name, tmp_path / "data", tmp_path / "copy", "--workers", 2)
    assert "continued from step 2" in capsys.readouterr().out and checkpoint(tmp_path / "parts")["step"] == 1
    assert_same_run(tmp_path / "copy", folder)
    assert steps_of(tmp_path / "copy") == steps_of(folder)
    assert log_lines(tmp_path / "copy")[-1].get("result") == log_lines(folder)[-1].get("result")


VARIANTS = {  # script: flags: a value that its log has, or "-" and one that it has not
    "setsim": {
        "--framework simsiam": "-loss_chance", "--loss-weight 0": "-loss_set", "--matcher hungarian --symmetric": "loss_set",
        "--preset official --amp bf16": "loss_set", "--amp fp16": "loss_set",
    },
    "resim": {
        "--levels c4": "loss_c4", "--levels c4 --framework simsiam": "-loss_chance", "--framework simsiam": "loss_p3",
        "--preset official --amp bf16": "loss_p3", "--pool roi_align": "loss_p3",
    },
    "d3ssl": {
        "--no-depositioning --augment": "-loss_dp", "--amp bf16 --augment prc prm-erase rbj": "loss_dp",
        "--framework soco --augment prc rbj prm": "-loss_chance",
    },
    "transfer_det": {
        "--task scenes --data scenes:12 --iterations 8 --batch-size 2 --model fpn": "loss_keypoint",
        "--task scenes --data scenes:12 --iterations 8 --batch-size 2": "-loss_keypoint",
    },
    "transfer_seg": {"--linear-probe": "-loss_auxiliary", "--task scenes --data scenes:12": "loss_auxiliary"},
}  # fmt: skip


@pytest.mark.parametrize("name, flags", [(name, flags) for name, rows in VARIANTS.items() for flags in rows])
def test_variants_run_and_resume(name, flags, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(Run, "measure", lambda *_: None)
    wanted = VARIANTS[name][flags]
    for folder, parts in (("whole", [2]), ("parts", [1, 2])):
        for steps in parts:
            train(name, photos, tmp_path / folder, *flags.split(), "--steps", steps)
    assert_same_run(tmp_path / "parts", tmp_path / "whole")
    line = steps_of(tmp_path / "whole")[2]
    assert np.isfinite(line["loss"]) and (wanted.strip("-") in line) == (wanted[0] != "-")


def test_first_weights_are_read_once(finished, photos, tmp_path, capsys):
    """With a learning rate of 0 they stay. The checkpoint holds everything: on resume the file may be gone."""
    (name, *_), (flag, *places) = finished, SCRIPTS[finished.name].init
    start = common.ResNetTrunk("resnet18")
    weights.save_weights(start, tmp_path / "start.pth")
    flags = [photos, tmp_path / "run", flag, tmp_path / "start.pth", "--lr", 0, "--steps"]
    train(name, *flags, 1)
    model = checkpoint(tmp_path / "run")["model"]
    for place in places:
        names = [n for n, _ in start.named_parameters() if place + n in model]
        assert len(names) > 20 and all(torch.equal(model[place + n], start.state_dict()[n]) for n in names)
    if name != "probes.linear":  # it knows its backbone by the file alone
        os.remove(tmp_path / "start.pth")
        train(name, *flags, 2)
        assert refusal(name, *flags[:3], tmp_path / "new.pth", *flags[4:], 2).count("start.pth' -> ") == 1
    assert capsys.readouterr().out.count("backbone: ") == 1


# ---- what is refused


def test_another_run_in_the_folder_is_refused_and_named(finished, photos, tmp_path):
    (name, folder, _), script = finished, SCRIPTS[finished.name]
    before, state = (folder / "checkpoint.pth").read_bytes(), checkpoint(folder)
    path = tmp_path / "checkpoint.pth"
    assert script.named in refusal(name, photos, folder, *script.other.split())
    assert "seed 0 -> 1" in refusal(name, photos, folder, "--seed", 1)
    for key, value in {"files": "13 images", "processes": 2}.items():
        torch.save(state | {"settings": state["settings"] | {key: value}}, path)
        assert f"had other settings ({key} {value!r} -> " in refusal(name, photos, tmp_path)
    torch.save(state | {"script": "other"}, path)
    assert f"{path}: a checkpoint of other.py" in refusal(name, photos, tmp_path)
    torch.save(state["model"], path)
    assert "not a checkpoint to continue from" in refusal(name, photos, tmp_path)
    for content in (b"garbage", b"", before[: len(before) // 2]):
        path.write_bytes(content)
        assert "not a checkpoint" in refusal(name, photos, tmp_path)
    assert (folder / "checkpoint.pth").read_bytes() == before


@pytest.mark.parametrize("name", SCRIPTS)
def test_unreadable_images_are_named_once_and_too_many_stop_the_run(name, photos, tmp_path, capsys):
    shutil.copytree(photos, tmp_path / "data")
    for image in ("train/a/0002.png", "val/b/0001.png"):
        (tmp_path / "data" / "images" / image).write_bytes(b"broken")
    train(name, tmp_path / "data", tmp_path / "run", "--steps", 2)
    train(name, tmp_path / "data", tmp_path / "run")
    text = capsys.readouterr().out
    assert text.count("unreadable image, another one takes its place: a/0002.png") == 1
    left_out = {"probes.linear": "unreadable image, it is left out"}.get(name, "cannot be read, left out")
    assert (f"{left_out}: b/0001.png" in text) == (name not in METHODS)
    assert steps_of(tmp_path / "run")[5]["bad_images"] == len(checkpoint(tmp_path / "run")["bad_images"]) == 1
    (tmp_path / "data" / "images" / "train" / "b" / "0007.png").write_bytes(b"broken")
    assert "2 of 12 images cannot be read (more than 1 %)" in refusal(name, tmp_path / "data", tmp_path / "other")


@pytest.mark.parametrize("name, flags", [(name, flags) for name, rows in BAD.items() for flags in rows])
def test_bad_input_in_one_clear_line(name, flags, photos, tmp_path, monkeypatch, capsys):
    """Exit code 2, and beside argparse's usage one line that says what to do."""
    (tmp_path / "text").write_text("no json")
    (tmp_path / "empty" / "train").mkdir(parents=True)
    for folder in ("others/train", "one/train/a", "one/val/a"):
        write_images(tmp_path / folder, 2)
    monkeypatch.setattr(Run, "steps", lambda *_: pytest.fail("a run has begun"))
    given = flags.format(tmp=tmp_path, data=photos).split()
    given += [] if "--output-dir" in given else ["--output-dir", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", [name])
    with pytest.raises(SystemExit) as stop:
        runs.main(lambda: job(name)(given))
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith(("usage:", " "))]
    assert stop.value.code == 2 and len(lines) == 1 and ": error: " in lines[0] and BAD[name][flags] in lines[0]


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_file_itself_starts_the_job(name, tmp_path, monkeypatch, capsys):
    file = f"{name.replace('.', '/')}.py"
    monkeypatch.setattr(sys, "argv", [str(ROOT / file), *flags_of(name, tmp_path / "none", tmp_path)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / file), run_name="__main__")
    assert stop.value.code == 2 and capsys.readouterr().err.startswith(f"{file.split('/')[-1]}: error: ")


# ---- the three methods


@pytest.mark.parametrize("name, other", [("setsim", "simsiam"), ("resim", "simsiam"), ("d3ssl", "soco")])
def test_settings_reach_views_and_optimiser(name, other, photos, tmp_path, monkeypatch):
    """Size of the views; weight decay on everything (B3); SimSiam's predictors keep their lr (B6)."""
    views, optimisers, steps, sgd = [], [], Run.steps, torch.optim.SGD
    monkeypatch.setattr(Run, "measure", lambda *_: None)
    monkeypatch.setattr(Run, "steps", lambda run, *a: views.extend(a) or steps(run, *a))
    monkeypatch.setattr(torch.optim, "SGD", lambda *a, **k: optimisers.append(sgd(*a, **k)) or optimisers[-1])
    for framework in ("moco", other):
        train(name, photos, tmp_path / framework, "--framework", framework, "--size", 96, "--lr", 0.256)
    images = [(Image.new("RGB", size), torch.tensor([[0.0, 0, *size]])) for size in ((90, 70), (1, 1))]
    for function, image in itertools.product(views, images):
        function = pickle.loads(pickle.dumps(function))  # as workers get it where they do not fork
        view_q, view_k, place_q, place_k, *_ = function(image if name == "d3ssl" else image[0])
        assert view_q.shape == view_k.shape == (3, 96, 96) and place_q.shape == place_k.shape
    for framework, optimiser in zip(("moco", other), optimisers, strict=True):
        model = checkpoint(tmp_path / framework)["model"]
        learned = {
            n: x.numel() for n, x in model.items() if n.startswith("query") and not n.endswith(("mean", "var", "d"))
        }
        constant = sum(x for n, x in learned.items() if "predictor" in n and framework == "simsiam")
        sizes = {group["lr"]: sum(p.numel() for p in group["params"]) for group in optimiser.param_groups}
        assert sizes.pop(0.006, 0) == constant and [*sizes] == pytest.approx([0.0015])  # of the last of three epochs
        assert sum(sizes.values()) == sum(learned.values()) - constant
        assert all((group["weight_decay"], group["momentum"]) == (1e-4, 0.9) for group in optimiser.param_groups)


class Built(Exception):
    """Ends a run when its method is built."""


@pytest.mark.parametrize("flags, most", [("", 65536), ("--demo --amp none", 512)])
@pytest.mark.parametrize("name, keys", [("setsim", 1), ("setsim --symmetric", 2), ("resim", 1), ("d3ssl", 4)])
def test_queues_are_as_long_as_the_data_allow(name, keys, flags, most, photos, tmp_path, monkeypatch):
    """What fit_queue returns for --queue-size, the longest queue and the keys of an image is what is built."""
    asked, (name, *more) = [], name.split()
    monkeypatch.setattr(Run, "fit_queue", lambda run, size, most, keys=1: asked.append((size, most, keys)) or 17)
    monkeypatch.setattr(Run, "resume", lambda run, method, *_, **__: (_ for _ in ()).throw(Built(method)))
    with pytest.raises(Built) as built:
        train(name, photos, tmp_path, *more, *flags.split())
    queues = [module for module in built.value.args[0].modules() if isinstance(module, common.Queue)]
    assert asked == [(20, most, keys)] and queues and all(queue.vectors.shape == (17, 128) for queue in queues)


@pytest.mark.parametrize("name", ["setsim", "resim"])
def test_trains_with_the_cards_packages_alone(name, photos, tmp_path, monkeypatch, capsys):
    """matplotlib, tqdm, OpenCV and pycocotools blocked: a folder trains all the same, without its curves."""
    monkeypatch.undo()
    for package in ("matplotlib", "tqdm", "cv2", "pycocotools"):
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *flags_of(name, photos, tmp_path, "--steps", 1)])
    runpy.run_path(str(ROOT / f"{name}.py"), run_name="__main__")
    assert "matplotlib is not installed: no curves.png" in capsys.readouterr().out
    assert {"resnet18.pth", "checkpoint.pth"} <= {*os.listdir(tmp_path)} and not (tmp_path / "curves.png").exists()


# ---- the two transfer scripts


@of(*TRANSFERS)
def test_evaluation_alone_says_the_same(finished, tmp_path):
    name, folder, _ = finished
    job(name)(["--eval-only", "--output-dir", str(folder)])  # everything else is remembered
    evaluation, result = json.loads((folder / "evaluation.json").read_text()), log_lines(folder)[-1]["result"]
    os.remove(folder / "evaluation.json")
    assert evaluation == {"step": checkpoint(folder)["step"], **result}
    for flags, words in {"--arch resnet50": "was trained with resnet18", "--lr 5": "was trained with"}.items():
        with pytest.raises(common.UserError, match=words):
            job(name)(["--eval-only", *flags.split(), "--output-dir", str(folder)])
    shutil.copytree(folder, tmp_path / "copy")
    torch.save(checkpoint(folder) | {"script": "setsim"}, tmp_path / "copy" / "checkpoint.pth")
    with pytest.raises(common.UserError, match=f"not a checkpoint of {name}.py"):
        job(name)(["--eval-only", "--output-dir", str(tmp_path / "copy")])


@of("transfer_det")
def test_trials_have_their_own_seeds_and_a_mean(finished, photos, tmp_path, capsys):
    """Also that --steps ends all trials, and that finished ones are not run again."""
    name, folder, _ = finished
    train(name, photos, tmp_path, "--trials", 2, "--steps", 1)
    assert os.listdir(tmp_path) == ["seed0"]
    train(name, photos, tmp_path, "--trials", 2)
    text = capsys.readouterr().out
    results = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [result["seed"] for result in results] == [0, 1] and results[0] == log_lines(folder)[-1]["result"]
    assert_same(checkpoint(tmp_path / "seed0")["model"], checkpoint(folder)["model"])
    first, second = (checkpoint(tmp_path / f"seed{i}")["model"]["rpn.head.cls_logits.weight"] for i in (0, 1))
    assert not torch.equal(first, second)
    values = [result["box"]["AP50"] for result in results]
    assert f"box AP50 {np.mean(values):.2f} +- {abs(values[0] - values[1]) / 2**0.5:.2f}" in text.splitlines()[-1]
    before = (tmp_path / "results.jsonl").read_bytes()
    train(name, photos, tmp_path, "--trials", 2)
    assert capsys.readouterr().out.count(": finished, at step 5 of 5") == 2
    assert (tmp_path / "results.jsonl").read_bytes() == before


@of("transfer_det")
def test_predictions_are_in_cocos_format(finished, photos, tmp_path, capsys, monkeypatch):
    _, folder, _ = finished
    shutil.copytree(photos / "images" / "val", tmp_path / "own")
    (tmp_path / "own" / "broken.jpg").write_bytes(b"no image")
    shutil.copytree(folder, tmp_path / "run")
    transfer_det.job(["--predict", str(tmp_path / "own"), "--output-dir", str(tmp_path / "run")])
    assert "unreadable, passed over: broken.jpg" in capsys.readouterr().out
    folder = tmp_path / "run" / "predictions"
    assert Image.open(folder / "a" / "0000.png.png").size == (64, 64)
    told, results = (json.loads((folder / f"{name}.json").read_text()) for name in ("images", "results"))
    assert [i["file_name"] for i in told["images"]] == ["a/0000.png", "a/0002.png", "b/0001.png", "b/0003.png"]
    assert [c["name"] for c in told["categories"]] == ["dog", "cat"]
    assert {r["image_id"] for r in results} <= {1, 2, 3, 4} and {r["category_id"] for r in results} <= {3, 7}
    for result in results:
        assert {*result} == {"image_id", "category_id", "bbox", "score", "segmentation"}
        assert result["segmentation"]["size"] == [64, 64]
    monkeypatch.setattr(common, "processes", lambda: 2)
    with pytest.raises(common.UserError, match="--predict is a job for one process"):
        transfer_det.job(["--predict", str(tmp_path / "own"), "--output-dir", str(tmp_path / "run")])


@of("transfer_det")
def test_precise_batch_norm_is_what_is_saved(finished, photos):
    """The statistics are those of the two training batches after the last step, here taken by hand."""
    name, folder, _ = finished
    args, _ = transfer_det.get_args(flags_of(name, photos, folder))
    train_data, state, seen = transfer_det.open_data(args, "train"), checkpoint(folder)["model"], []
    model = transfer_det.new_detector(args, torch.device("cpu"), 2, ["boxes", "masks"], 0)
    model.load_state_dict(state)
    model.train().backbone.bn1.register_forward_pre_hook(lambda _, x: seen.append(x[0].transpose(0, 1).flatten(1)))
    dataset = transfer_det.TrainingImages(train_data, args)
    for batch in transfer_det.Run("transfer_det", args, dataset, 5).loader(dataset, 5, 7):
        model(*batch[:2])
    seen = torch.cat(seen, 1)
    torch.testing.assert_close(state["backbone.bn1.running_mean"], seen.mean(1), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(state["backbone.bn1.running_var"], seen.var(1, correction=0), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "name, task, model", [("transfer_det", "coco", "Detector("), ("transfer_seg", "voc", "Segmenter(")]
)
def test_settings_and_model_are_printed_without_data(name, task, model, capsys):
    job(name)(f"--task {task} --arch resnet18 --lr 0.5 --steps 0".split())
    text = capsys.readouterr().out
    assert "; changed: lr 0.5\n" in text and model in text and "weight_decay" in text


# ---- trouble, on one script each: harness/run.py handles it


def test_full_disk_keeps_the_last_checkpoint(photos, tmp_path):
    """A limit on the size of files stands for the full disk: the write fails inside the operating system."""
    train("setsim", photos, tmp_path, "--steps", 2)
    before, (soft, hard) = checkpoint(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**5, hard))
    try:
        message = refusal("setsim", photos, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "no space left to write" in message and "resnet18.pth" in message
    assert_same(checkpoint(tmp_path), before)
    assert not list(tmp_path.glob("*.tmp"))
    train("setsim", photos, tmp_path, "--steps", 4)


def test_exploding_weights_stop_the_run(photos, tmp_path):
    assert "finite" in refusal("setsim", photos, tmp_path, "--lr", "1e30")
    assert not (tmp_path / "checkpoint.pth").exists()


# ---- real processes


@pytest.mark.slow
@pytest.mark.parametrize("name, long, processes", [("transfer_det", "--iterations", 0), ("setsim", "--epochs", 2)])
def test_sigterm_saves_and_exits_0(name, long, processes, photos, tmp_path):
    """Sent to the whole process group, as launchers and terminals do: loader workers must not die of it first."""
    flags = [f"{name}.py", *flags_of(name, photos, tmp_path, "--workers", 1, "--save-every", 999, long, 999)]
    code, text = signal_after("tests/tiny.py", *flags, line=4, number=signal.SIGTERM, processes=processes)
    step = checkpoint(tmp_path)["step"]
    assert f"stopped by a signal and saved at step {step}; the same command continues" in text
    assert (code == 0 or processes) and log_lines(tmp_path)[-1]["step"] == step < 500


@pytest.mark.slow
@of("d3ssl", "transfer_seg")
def test_killed_at_random_instants(finished, photos, tmp_path):
    name, folder, _ = finished
    flags, rng = ["--save-every", 1, "--print-freq", 1], random.Random(name)
    for line in (2, rng.randrange(4, 7)):
        command_line = [f"{name}.py", *flags_of(name, photos, tmp_path, *flags)]
        code, _ = signal_after("tests/tiny.py", *command_line, line=line, number=signal.SIGKILL)
        assert code in (-signal.SIGKILL, 0)
        assert not (tmp_path / "checkpoint.pth").exists() or checkpoint(tmp_path)  # whole at any time
    train(name, photos, tmp_path, *flags)
    assert_same_run(tmp_path, folder)
    assert [*steps_of(tmp_path)] == [*steps_of(folder)]


@pytest.fixture(scope="module")
def by_one_and_three(photos, tmp_path_factory):
    """The folders of what `run_all` leaves in one process and in three."""
    one, three = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("three")
    with signals_given_back():
        run_all(one, photos)
    run("tests/several.py", "all", three, photos, processes=3, env={"PYTHONPATH": str(ROOT)})
    return one, three


@pytest.mark.slow
@pytest.mark.parametrize("label", SHARED)
def test_three_processes_do_what_one_does(label, by_one_and_three, photos):
    """Twelve images in one process, or four in each of three; gradients of the first step, and losses.

    Methods: every tensor, running statistics of the first group and their counters included (B15, B17), and what is
    logged. ReSim's negatives on P4 are gathered, those on P3 are the group's own, as D3SSL's backgrounds.
    """
    (one, three), (name, *flags) = (folder / label for folder in by_one_and_three), SHARED[label].split()
    assert {*os.listdir(one)} == {*os.listdir(three)}
    a, b = (checkpoint(f"{folder} first") for folder in (one, three))
    assert a["settings"] | {"processes": 3} == b["settings"] and a["step"] == b["step"] == 1
    a, b = a["optimizer"]["state"], b["optimizer"]["state"]
    for key, x in {key: x["momentum_buffer"] for key, x in a.items()}.items():
        torch.testing.assert_close(b[key]["momentum_buffer"], x, rtol=1e-3, atol=1e-3 * float(x.abs().max()) + 1e-8)
    values = [[*steps_of(folder).values()] for folder in (one, three)]
    for i, (x, y) in enumerate(zip(*values, strict=True)):
        rel = (
            1e-7 if name in METHODS else 0.02 if name == "transfer_det" and i else 1e-3
        )  # the order of boxes may change
        same = [n for n in x if n == "loss" or name in METHODS and not n.startswith(("std", "positives"))]
        assert {n: x[n] for n in same} == pytest.approx({n: y[n] for n in same}, rel=rel)
    if name in METHODS:
        torch.testing.assert_close(checkpoint(three)["model"], checkpoint(one)["model"], rtol=1e-7, atol=1e-9)
    if name in TRANSFERS:
        job(name)(["--eval-only", "--output-dir", str(three)])
        result = log_lines(three)[-1]["result"]
        assert json.loads((three / "evaluation.json").read_text()) == {"step": 3, **result}
    assert "processes 3 -> 1" in refusal(name, photos, three, "--batch-size", 12, *flags)


@pytest.mark.slow
def test_torchrun_restarts_a_killed_worker(by_one_and_three, photos, tmp_path):
    """--max-restarts: all go on from the last checkpoint and end with the same weights."""
    flags = flags_of("setsim", photos, tmp_path, "--save-every", 1)
    words = command("tests/several.py", 1, tmp_path, "setsim.py", *flags, processes=3)
    words.insert(words.index("--standalone"), "--max-restarts=2")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and (tmp_path / "killed").exists(), done.stderr
    assert "continued from step" in done.stdout
    assert_same_run(tmp_path, by_one_and_three[1] / "whole")
