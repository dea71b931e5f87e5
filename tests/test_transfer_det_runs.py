"""transfer_det.py as its users run it: protocols as built, small runs, kills, several processes, bad input."""

import json
import signal

import numpy as np
import pytest
import torch
from helpers import ROOT, assert_same, checkpoint, keep_signals, log_lines, run, signal_after, write_images
from PIL import Image
from test_transfer_det import FirstOnes, annotation, content, found_as_truth, settings

import common
import harness.legacy
import transfer_det as det

assert keep_signals  # a fixture: it gives signals back that main() takes over
TINY = "--task scenes --data scenes:24 --arch resnet18 --batch-size 2 --iterations 4 --short-sides 64 --test-side 64".split()
TINY += "--precise-bn 2 --print-freq 1 --workers 0".split()  # eight steps


# ------------------------------------------------------------------------------------------------ protocols as built

FPN_ANCHORS = "sizes [[32], [64], [128], [256], [512]], strides [4, 8, 16, 32, 64], 3 a cell"
FPN_SIDES = "short side [640, 672, 704, 736, 768, 800], testing 800, long side at most 1333; padded to a multiple of 32"
ROIS = "512 an image, 0.25 foreground, IoU 0.5; detections above 0.05, NMS 0.5, at most 100"
COCO_1X = {
    "protocol": "COCO, Mask R-CNN R50-FPN, 1x, protocol A",
    "gives": "boxes masks",
    "batch": "16 images",
    "iterations": "90000, drops at [60000, 80000], warm-up 1000",
    "learning rate": "2e-05 at 0, 0.01001 at 500, 0.02 at 1000, 0.002 at 60000, 0.0002 at 80000",
    "momentum": "0.9",
    "weight decay": "0.0001 on 87 tensors, 0 on 122 of norms",
    "images": FPN_SIDES,
    "anchors": FPN_ANCHORS,
    "proposals": "2000/1000 before, 1000/1000 after NMS 0.7 (training/testing)",
    "RoIs": ROIS,
    "losses": "an error of 0.1 costs the RPN 0.1 / 256, the box head 0.1 / RoIs",
    "pooling": "boxes 7 on strides [4, 8, 16, 32]",
    "box head": "fc 12544-1024, fc 1024-1024",
    "mask head": "14, conv3 256-256 x4, deconv2 256-256, conv1 256-81",
    "keypoint head": "none",
    "frozen": "nothing",
    "batch norms": "backbone 53 trained, 0 frozen; backbone.fpn 8 trained, 0 frozen; roi_heads 0 trained, 0 frozen",
    "precise BN": "200 batches",
}
C4 = {
    "anchors": "sizes [[32, 64, 128, 256, 512]], strides [16], 15 a cell",
    "proposals": "12000/6000 before, 2000/1000 after NMS 0.7 (training/testing)",
    "pooling": "boxes 14 on strides [16]",
    "box head": "res5 (11 norms), the last one after it 2048 wide",
    "batch norms": "backbone 43 trained, 0 frozen; backbone.fpn 0 trained, 0 frozen; roi_heads 11 trained, 0 frozen",
}
VOC = COCO_1X | C4 | {
    "protocol": "VOC 07+12, Faster R-CNN R50-C4",
    "gives": "boxes",
    "iterations": "24000, drops at [18000, 22000], warm-up 100",
    "learning rate": "2e-05 at 0, 0.01001 at 50, 0.02 at 100, 0.002 at 18000, 0.0002 at 22000",
    "weight decay": "0.0001 on 63 tensors, 0 on 108 of norms",
    "images": "short side [480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800], testing 800, long side at most 1333; "
    "padded to a multiple of 1",
    "mask head": "none",
}  # fmt: skip
SIDES_C4 = FPN_SIDES.replace("of 32", "of 1")
PROTOCOLS = {
    "--task voc": VOC,
    "--task voc --train-set 07": VOC | {
        "protocol": "VOC 07, Faster R-CNN R50-C4",
        "iterations": "9000, drops at [6750, 8250], warm-up 100",
        "learning rate": "2e-05 at 0, 0.01001 at 50, 0.02 at 100, 0.002 at 6750, 0.0002 at 8250",
    },
    "--task voc --freeze-backbone": VOC | {
        "protocol": "VOC 07+12, Faster R-CNN R50-C4, frozen to C4",
        "weight decay": "0.0001 on 20 tensors, 0 on 22 of norms",
        "frozen": "backbone.conv1, backbone.bn1, backbone.layer1, backbone.layer2, backbone.layer3",
        "batch norms": "backbone 0 trained, 43 frozen; backbone.fpn 0 trained, 0 frozen; roi_heads 11 trained, 0 frozen",
    },
    "--task coco --model fpn": COCO_1X,
    "--task coco --freeze-at 2": COCO_1X | {
        "protocol": "COCO, Mask R-CNN R50-FPN, 1x, protocol A, frozen to C2",
        "weight decay": "0.0001 on 76 tensors, 0 on 100 of norms",
        "frozen": "backbone.body.conv1, backbone.body.bn1, backbone.body.layer1",
        "batch norms": "backbone 42 trained, 11 frozen; backbone.fpn 8 trained, 0 frozen; roi_heads 0 trained, 0 frozen",
    },
    "--task coco --schedule 2x": COCO_1X | {
        "protocol": "COCO, Mask R-CNN R50-FPN, 2x, protocol A",
        "iterations": "180000, drops at [120000, 160000], warm-up 1000",
        "learning rate": "2e-05 at 0, 0.01001 at 500, 0.02 at 1000, 0.002 at 120000, 0.0002 at 160000",
    },
    "--task coco --heads 4conv1fc": COCO_1X | {
        "protocol": "COCO, Mask R-CNN R50-FPN, 1x, protocol B",
        "weight decay": "0.0001 on 85 tensors, 0 on 138 of norms",
        "box head": "conv3 256-256, norm, conv3 256-256, norm, conv3 256-256, norm, conv3 256-256, norm, fc 12544-1024",
        "mask head": "14, conv3 256-256, norm, conv3 256-256, norm, conv3 256-256, norm, conv3 256-256, norm, deconv2 256-256, "
        "conv1 256-81",
        "batch norms": "backbone 53 trained, 0 frozen; backbone.fpn 8 trained, 0 frozen; roi_heads 8 trained, 0 frozen",
    },
    "--task coco --model c4": COCO_1X | C4 | {
        "protocol": "COCO, Mask R-CNN R50-C4, 1x",
        "weight decay": "0.0001 on 67 tensors, 0 on 108 of norms",
        "images": SIDES_C4,
        "mask head": "the box head's maps, deconv2 2048-256, conv1 256-81",
    },
    "--task coco-keypoint": COCO_1X | {
        "protocol": "COCO keypoints, Keypoint R-CNN R50-FPN, 1x, protocol A",
        "gives": "boxes keypoints",
        "weight decay": "0.0001 on 93 tensors, 0 on 122 of norms",
        "proposals": "2000/1000 before, 1500/1000 after NMS 0.7 (training/testing)",
        "losses": "an error of 0.1 costs the RPN 0.1 / 256, the box head 0.01 / RoIs",
        "mask head": "none",
        "keypoint head": "14, conv3 256-512, conv3 512-512 x7, deconv4 512-17",
    },
    "--task coco-keypoint --schedule 2x --model fpn": COCO_1X | {
        "protocol": "COCO keypoints, Keypoint R-CNN R50-FPN, 2x, protocol A",
        "gives": "boxes keypoints",
        "iterations": "180000, drops at [120000, 160000], warm-up 1000",
        "learning rate": "2e-05 at 0, 0.01001 at 500, 0.02 at 1000, 0.002 at 120000, 0.0002 at 160000",
        "weight decay": "0.0001 on 93 tensors, 0 on 122 of norms",
        "proposals": "2000/1000 before, 1500/1000 after NMS 0.7 (training/testing)",
        "losses": "an error of 0.1 costs the RPN 0.1 / 256, the box head 0.01 / RoIs",
        "mask head": "none",
        "keypoint head": "14, conv3 256-512, conv3 512-512 x7, deconv4 512-17",
    },
    "--task scenes": COCO_1X | {
        "protocol": "scenes, Mask and Keypoint R-CNN R50-FPN, small heads",
        "gives": "boxes masks keypoints",
        "batch": "4 images",
        "iterations": "600, drops at [450, 550], warm-up 50",
        "learning rate": "2e-05 at 0, 0.01001 at 25, 0.02 at 50, 0.002 at 450, 0.0002 at 550",
        "weight decay": "0.0001 on 93 tensors, 0 on 122 of norms",
        "images": "short side [112, 128, 144], testing 128, long side at most 400; padded to a multiple of 32",
        "proposals": "2000/1000 before, 200/200 after NMS 0.7 (training/testing)",
        "RoIs": ROIS.replace("512", "32"),
        "mask head": "14, conv3 256-64, conv3 64-64, deconv2 64-256, conv1 256-11",
        "keypoint head": "14, conv3 256-64, conv3 64-64 x3, deconv4 64-4",
        "precise BN": "20 batches",
    },
    "--task cityscapes": COCO_1X | {
        "protocol": "Cityscapes, Mask R-CNN R50-FPN, protocol A",
        "batch": "8 images",
        "iterations": "24000, drops at [18000], warm-up 1000",
        "learning rate": "1e-05 at 0, 0.005005 at 500, 0.01 at 1000, 0.001 at 18000",
        "images": "short side [800, 832, 864, 896, 928, 960, 992, 1024], testing 1024, long side at most 2048; "
        "padded to a multiple of 32",
        "mask head": "14, conv3 256-256 x4, deconv2 256-256, conv1 256-9",
    },
}  # fmt: skip


@pytest.mark.parametrize("flags", PROTOCOLS)
def test_the_protocol_as_built(flags, capsys):
    """--steps 0 prints what is read off the model, at full size and without data."""
    det.main([*flags.split(), "--data", "scenes" if "scenes" in flags else "none", "--steps", "0"])
    printed = {line[:14].strip(): line[15:] for line in capsys.readouterr().out.splitlines()}
    assert {row: printed[row] for row in PROTOCOLS[flags]} == PROTOCOLS[flags]


def test_the_protocol_of_custom_data(tmp_path, capsys):
    det.main(["--task", "custom", *custom(tmp_path), "--steps", "0"])
    printed = {line[:14].strip(): line[15:] for line in capsys.readouterr().out.splitlines()}
    wanted = COCO_1X | {
        "protocol": "custom, Mask R-CNN R50-FPN",
        "iterations": "1500, drops at [1000, 1333], warm-up 100",
        "learning rate": "2e-05 at 0, 0.01001 at 50, 0.02 at 100, 0.002 at 1000, 0.0002 at 1333",
        "mask head": "14, conv3 256-256 x4, deconv2 256-256, conv1 256-3",
    }
    assert {row: printed[row] for row in wanted} == wanted


@pytest.mark.slow
@pytest.mark.parametrize("flags", [f for f in PROTOCOLS if "scenes" not in f and "2x" not in f])
def test_a_step_at_full_size(flags):
    args = settings(*flags.split(), "--data", "none")
    classes = {"voc": 20, "coco": 80, "coco-keypoint": 1, "cityscapes": 8}[args.task]
    model, _ = det.build_detector(args, classes, args.outputs, 17)
    model.train()
    rows = [
        {"box": [20.0, 30, 90, 100], "label": 1, "segmentation": [np.array([20.0, 30, 90, 30, 90, 100])],
         "keypoints": np.tile([50.0, 60, 2], (17, 1))}
    ]  # fmt: skip
    target = det.move_objects(rows, (128, 160), (128, 160), False, list(range(17)))
    pixels = torch.randint(0, 256, (3, 128, 160), dtype=torch.uint8)
    model.rpn._post_nms_top_n = dict(training=30, testing=30)
    optimizer = torch.optim.SGD(det.parameter_groups(model, 1e-4), 0.002, momentum=0.9)
    loss, values = model([pixels] * 2, [target] * 2)
    loss.backward()
    optimizer.step()
    assert loss.isfinite() and all(p.isfinite().all() for p in model.parameters())
    assert values["loss_class"] == pytest.approx(np.log(classes + 1), rel=0.2)


# ------------------------------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole tiny run, its folder and what it said."""
    folder = tmp_path_factory.mktemp("run") / "a"
    return folder, run("transfer_det.py", *TINY, "--output-dir", folder)


def test_a_run_writes_what_it_promises(finished):
    folder, text = finished
    assert sorted(p.name for p in folder.iterdir()) == (
        "checkpoint.pth curves.png detector.pth log.jsonl predictions.png results.jsonl".split()
    )
    (result,) = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert result["seed"] == 0 and result["step"] == 8 and result["weights"] == "random"
    assert set(result) == {"seed", "step", "weights", "fpn_weights", "protocol", "box", "mask", "keypoints"}
    assert result["protocol"].startswith(
        "scenes, Mask and Keypoint R-CNN R18-FPN, small heads; changed: batch_size 2, iterations 4"
    )
    lines = log_lines(folder)
    assert [line["step"] for line in lines if "loss" in line] == [*range(1, 9)]
    assert lines[-1]["result"] == result and "lr 0.01, 8 iterations, drops at [6, 7]" in text
    state = torch.load(folder / "detector.pth")
    assert_same(state, dict(checkpoint(folder)["model"]))
    assert {"backbone.body.conv1.weight", "backbone.fpn.inner_blocks.0.0.weight", "rpn.head.cls_logits.bias"} <= set(
        state
    )
    assert Image.open(folder / "predictions.png").size == (2470, 830)


def test_a_finished_run_says_so(finished):
    folder, _ = finished
    assert "finished, at step 8 of 8" in run("transfer_det.py", *TINY, "--output-dir", folder)


def test_eval_only_gives_the_same_numbers(finished):
    folder, _ = finished
    run("transfer_det.py", "--eval-only", "--output-dir", folder)  # everything else is remembered
    evaluation = json.loads((folder / "evaluation.json").read_text())
    (result,) = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert {k: evaluation[k] for k in ("box", "mask", "keypoints", "protocol", "step")} == {
        k: result[k] for k in ("box", "mask", "keypoints", "protocol", "step")
    }


def test_predict(finished, tmp_path):
    folder, _ = finished
    write_images(tmp_path / "photos" / "inner", 2, size=(50, 90))
    (tmp_path / "photos" / "broken.jpg").write_bytes(b"no image")
    text = run("transfer_det.py", "--predict", tmp_path / "photos", "--output-dir", folder)
    assert "unreadable, passed over: broken.jpg" in text and "2 pictures" in text
    assert Image.open(folder / "predictions" / "inner" / "0001.png.png").size == (50, 90)
    images = json.loads((folder / "predictions" / "images.json").read_text())
    assert [i["file_name"] for i in images["images"]] == ["inner/0000.png", "inner/0001.png"] and len(
        images["categories"]
    ) == 10
    results = json.loads((folder / "predictions" / "results.json").read_text())
    assert {r["image_id"] for r in results} <= {1, 2}
    for result in results:
        assert set(result) == {"image_id", "category_id", "bbox", "score", "segmentation", "keypoints"}
        assert result["segmentation"]["size"] == [90, 50] and len(result["keypoints"]) == 12


def test_precise_bn_is_what_is_saved(finished, tmp_path):
    """The checkpoint's statistics are those of the two training batches after the last step, here taken by hand."""
    folder, _ = finished
    state = checkpoint(folder)
    args = det.get_args([*TINY, "--output-dir", str(tmp_path)])
    train = det.open_data(args, "train")
    outputs, keypoints = det.outputs_of(args, train)
    world = harness.legacy.World(0, 1, 0, torch.device("cpu"))
    model, _ = det.new_detector(args, 0, 10, outputs, len(keypoints), world, state)
    model.train()
    images, seen = det.TrainingImages(train, args, 0, outputs), []
    model.backbone.body.bn1.register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0].transpose(0, 1).flatten(1))
    )
    for batch in det.GroupedBatches(images.wide(), 2, world, 0, 8, 10):
        pixels, targets, *_ = det.collate([images[key] for key in batch])
        model(pixels, targets)
    seen = torch.cat(seen, 1)
    assert torch.allclose(state["model"]["backbone.body.bn1.running_mean"], seen.mean(1), atol=1e-5)
    assert torch.allclose(state["model"]["backbone.body.bn1.running_var"], seen.var(1), rtol=1e-3)
    assert state["precise"] is True


@pytest.mark.slow
def test_killed_and_resumed_ends_the_same(finished, tmp_path):
    folder, _ = finished
    flags = [*TINY, "--save-every", "1", "--output-dir", str(tmp_path / "b")]
    code, _ = signal_after("transfer_det.py", *flags, line=4, number=signal.SIGKILL)
    assert code == -signal.SIGKILL and 2 <= checkpoint(tmp_path / "b")["step"] < 8
    text = run("transfer_det.py", *flags, "--workers", "2")
    assert "continued from step" in text
    assert_same(checkpoint(tmp_path / "b")["model"], checkpoint(folder)["model"])
    results = [(f / "results.jsonl").read_text() for f in (folder, tmp_path / "b")]
    assert results[0] == results[1]
    assert [line["step"] for line in log_lines(tmp_path / "b") if "loss" in line] == [*range(1, 9)]


@pytest.mark.slow
def test_sigterm_saves_and_exits_0(finished, tmp_path):
    flags = [*TINY, "--output-dir", str(tmp_path / "b")]
    code, text = signal_after("transfer_det.py", *flags, line=3, number=signal.SIGTERM)
    assert code == 0 and "stopped by a signal and saved at step" in text
    run("transfer_det.py", *flags)
    assert_same(checkpoint(tmp_path / "b")["model"], checkpoint(finished[0])["model"])


@pytest.mark.slow
def test_trials_have_their_own_seeds_and_a_mean(finished, tmp_path):
    folder, text = tmp_path / "b", run("transfer_det.py", *TINY, "--output-dir", tmp_path / "b", "--trials", "2")
    results = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert [r["seed"] for r in results] == [0, 1]
    assert_same(checkpoint(folder / "seed0")["model"], checkpoint(finished[0])["model"])
    other = checkpoint(folder / "seed1")["model"]
    assert not torch.equal(
        other["rpn.head.conv.0.0.weight"], checkpoint(folder / "seed0")["model"]["rpn.head.conv.0.0.weight"]
    )
    mean = np.mean([r["box"]["AP50"] for r in results])
    assert "2 trials: box AP" in text and f"box AP50 {mean:.2f} +- " in text
    assert text.splitlines()[-1].startswith("scenes, Mask and Keypoint R-CNN")


@pytest.mark.slow
def test_predict_wants_one_process(finished):
    folder, _ = finished
    assert "--predict is a job for one process" in run(
        "transfer_det.py", "--predict", folder, "--output-dir", folder, processes=2, expect=1
    )


def test_a_model_is_synchronised_where_it_was_not_frozen():
    args = settings(*TINY, "--freeze-at", 2)
    model, _ = det.build_detector(args, 10, ["boxes"], 0)
    model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model).train()
    norms = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.SyncBatchNorm)}
    assert len(norms) == 20 + 8
    for name, norm in norms.items():
        frozen = name.startswith(("backbone.body.bn1", "backbone.body.layer1"))
        assert norm.training != frozen and norm.weight.requires_grad != frozen, name
    assert len(det.parameter_groups(model, 1e-4)[1]["params"]) == 2 * (28 - 5)


def test_spread_by_hand():
    results = [
        {"seed": i, "protocol": "x", "box": {"AP": ap, "AP50": 2 * ap, "AP75": 0.0}}
        for i, ap in enumerate((50, 51, 54))
    ]
    assert det.spread(results) == "box AP 51.67 +- 2.08; box AP50 103.33 +- 4.16; box AP75 0.00 +- 0.00"


@pytest.mark.slow
def test_two_processes(tmp_path):
    flags = [*TINY, "--output-dir", tmp_path / "b", "--steps", "2"]
    text = run("transfer_det.py", *flags, processes=2)
    assert "batch 2 = 2 x 1" in text and "batch norm is not synchronised" in text
    flags = [*TINY, "--output-dir", tmp_path / "b"]
    text = run("transfer_det.py", *flags, processes=2)
    assert "continued from step 2" in text and "AP50" in text
    assert len((tmp_path / "b" / "results.jsonl").read_text().splitlines()) == 1
    evaluation = run("transfer_det.py", "--eval-only", "--output-dir", tmp_path / "b")
    assert (
        evaluation.splitlines()[-1] == [line for line in text.splitlines() if "AP50" in line][0]
    )  # however many share the work
    assert "other settings (processes 2 -> 1)" in run(
        "transfer_det.py", *TINY, "--output-dir", tmp_path / "b", expect=2
    )


GRADIENTS = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
import torch, torch.distributed as dist
import harness.legacy, transfer_det as det
from test_transfer_det import FirstOnes, demo_detector, scenes_args
world = harness.legacy.start_processes()
args = scenes_args("--data", "scenes:8")
train = det.open_data(args, "train")
images = det.TrainingImages(train, args, 0, ["boxes"])
images.short_sides = [128]
pixels, targets, *_ = det.collate([images[0, i] for i in range(4)])
model = demo_detector(args, ["boxes"], []).train()
for module in model.modules():  # statistics of the batch would differ between two and four images
    if isinstance(module, torch.nn.BatchNorm2d):
        module.eval()
model.rpn.fg_bg_sampler, model.roi_heads.fg_bg_sampler = FirstOnes(256), FirstOnes(16, 0.25)
network = harness.legacy.wrap_distributed(model, world)
share = 4 // world.size
mine = slice(world.rank * share, (world.rank + 1) * share)
loss, _ = network(pixels[mine], targets[mine])
loss.backward()
if world.rank == 0:
    torch.save({{name: p.grad for name, p in model.named_parameters()}}, sys.argv[1])
if dist.is_initialized():
    dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_have_the_gradient_of_one(tmp_path):
    script = tmp_path / "gradients.py"
    script.write_text(GRADIENTS.format(root=str(ROOT), tests=str(ROOT / "tests")))
    run(script, tmp_path / "one.pth")
    run(script, tmp_path / "two.pth", processes=2)
    one, two = torch.load(tmp_path / "one.pth"), torch.load(tmp_path / "two.pth")
    assert len(one) > 80
    for name, x in one.items():
        assert torch.allclose(x, two[name], rtol=1e-3, atol=1e-5 * float(x.abs().max()) + 1e-8), name


@pytest.mark.slow
def test_it_learns_eight_scenes_by_heart(tmp_path, monkeypatch):
    train = det.SceneData(0, 8, 96, 0)
    monkeypatch.setattr(det, "open_data", lambda *_: train)
    flags = "--demo --batch-size 4 --iterations 90 --lr 0.02 --short-sides 96 --test-side 96 --precise-bn 10 --model fpn".split()
    monkeypatch.setattr(det, "outputs_of", lambda args, train: (["boxes"], []))
    det.main([*flags, "--workers", "0", "--output-dir", str(tmp_path)])
    (result,) = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert result["box"]["AP50"] > 90


# --------------------------------------------------------------------------------------------------------- bad input


def custom(folder, rows=None):
    """Two annotation files and their images."""
    write_images(folder / "images", 4, size=(96, 64))
    for i in range(4):
        (folder / "images" / f"{i:04}.png").rename(folder / "images" / f"{i}.png")
    rows = rows or [annotation(10 * i, [5, 5, 40, 40], segmentation=[[5, 5, 45, 5, 45, 45, 5, 45]]) for i in range(4)]
    for name in ("train", "val"):
        (folder / f"{name}.json").write_text(json.dumps(content(rows, 4)))
    paths = {"train-json": "train.json", "val-json": "val.json", "images": "images"}
    return [word for name, path in paths.items() for word in (f"--{name}", str(folder / path))]


@pytest.fixture
def light(monkeypatch):
    """Custom data with the small heads of the scenes."""
    monkeypatch.setitem(det.TASKS, "custom", det.TASKS["scenes"] | {"outputs": None})


def test_custom_data_decide_what_is_learned(light, tmp_path, capsys):
    flags = custom(tmp_path)
    small = "--arch resnet18 --short-sides 64 --test-side 64 --batch-size 2 --iterations 1 --precise-bn 1 --workers 0".split()
    det.main(["--task", "custom", *flags, *small, "--steps", "1", "--output-dir", str(tmp_path / "out")])
    assert "custom, Mask R-CNN R18-FPN" in capsys.readouterr().out
    rows = [annotation(10 * i, [5, 5, 40, 40]) for i in range(4)]
    train = det.open_data(settings("--task", "custom", *custom(tmp_path / "b", rows)), "train")
    assert det.outputs_of(settings("--task", "custom", *flags), train) == (["boxes"], [])
    rows = [annotation(10 * i, [5, 5, 40, 40], keypoints=[9, 9, 2, 8, 8, 0]) for i in range(4)]
    flags = custom(tmp_path / "c", rows)
    for name in ("train", "val"):
        told = json.loads((tmp_path / "c" / f"{name}.json").read_text())
        told["categories"] = [c | {"keypoints": ["left", "right"]} for c in told["categories"]]
        (tmp_path / "c" / f"{name}.json").write_text(json.dumps(told))
    args = settings("--task", "custom", *flags)
    train = det.open_data(args, "train")
    val = det.open_data(args, "val", train.categories)
    assert det.outputs_of(args, train) == (["boxes", "keypoints"], ["left", "right"])
    assert det.outputs_of(settings("--task", "custom", *flags, "--model", "c4"), train) == (["boxes"], [])
    assert det.evaluate_coco(val, found_as_truth(val), "keypoints")["AP"] == pytest.approx(100)  # two keypoints, not 17


def test_corrupt_images_are_replaced_named_and_limited(light, tmp_path, capsys):
    flags = custom(tmp_path)
    (tmp_path / "images" / "2.png").write_bytes(b"no image")
    small = "--arch resnet18 --short-sides 64 --test-side 64 --batch-size 2 --iterations 1 --precise-bn 1 --workers 0".split()
    det.main(["--task", "custom", *flags, *small, "--print-freq", "4", "--output-dir", str(tmp_path / "out")])
    text = capsys.readouterr().out
    assert text.count("unreadable image, another one takes its place: 2.png") == 1
    assert "cannot be read, counts as without detections: 2.png" in text
    assert log_lines(tmp_path / "out")[-2]["bad_images"] == 1
    (tmp_path / "images" / "1.png").write_bytes(b"no image")
    with pytest.raises(common.UserError, match="2 of 4 images cannot be read"):
        det.main(["--task", "custom", *flags, *small, "--output-dir", str(tmp_path / "out2")])


BAD = {
    "": "give --task {voc,coco,",
    "--task voc": "--task voc wants --data: a folder with VOC2007/",
    "--task voc --data nowhere": "--data nowhere: no such folder; it must be a folder with VOC2007/",
    "--task coco --data {tmp}": "it must be a folder with annotations/instances_train2017.json",
    "--task cityscapes --data {tmp}": "leftImg8bit/train: not there; --data must be",
    "--task custom --train-json a.json": "--task custom wants --val-json",
    "--task custom --train-json a.json --val-json b.json --images {tmp}": "a.json: No such file or directory",
    "--task custom --train-json {tmp}/text --val-json b.json --images {tmp}": "text: not a JSON file",
    "--task custom --train-json {tmp}/text --val-json b.json --images nowhere": "nowhere: no such folder of images",
    "--task voc --data x --schedule 2x": "--schedule has no meaning for --task voc",
    "--demo --train-set 07": "--train-set has no meaning for --task scenes",
    "--task coco --data x --model c4 --heads 4conv1fc": "--heads 4conv1fc belongs to --model fpn",
    "--task voc --data x --fpn-weights y": "--fpn-weights belong to --model fpn",
    "--task coco-keypoint --data x --model c4": "there is no keypoint head on C4",
    "--demo --batch-size 0": "--batch-size 0: must be at least 1",
    "--demo --freeze-at 6": "--freeze-at 6: must be between 0 and 5",
    "--demo --short-sides 8": "--short-sides 8: must be at least 32",
    "--demo --data {tmp}": "--task scenes wants 'scenes'",
    "--demo --weights nowhere.pth": "nowhere.pth: no such file",
    "--demo --weights {tmp}/text": "not a checkpoint",
    "--demo --output-dir {tmp}/text": "File exists",
    "--eval-only --output-dir {tmp}": "want the --output-dir of a run",
    "--predict {tmp} --output-dir {tmp}": "want the --output-dir of a run",
    "--demo --resume nowhere.pth": "--resume nowhere.pth: no such file",
}


@pytest.mark.parametrize("flags", BAD)
def test_bad_input_gets_one_clear_line(flags, tmp_path):
    (tmp_path / "text").write_text("no json")
    words = [word.format(tmp=tmp_path) for word in flags.split()]
    words += [] if "--output-dir" in words else ["--output-dir", str(tmp_path / "out")]
    with pytest.raises(common.UserError) as error:
        det.main([*words, *([] if "--data" in words else "--data scenes:8".split() if "--demo" in words else [])])
    assert BAD[flags] in str(error.value) and "\n" not in str(error.value)


def test_the_exit_code_is_2(tmp_path):
    text = run("transfer_det.py", "--task", "voc", "--data", tmp_path, "--output-dir", tmp_path / "out", expect=2)
    assert text.strip().count("\n") == 0 and text.startswith("transfer_det.py: error: ")


def test_what_was_not_trained_is_not_evaluated(finished, tmp_path):
    folder, _ = finished
    for flags in ("--model c4", "--lr 5", "--arch resnet50", "--task voc --data x"):
        with pytest.raises(common.UserError, match="was made with another"):
            det.main(["--eval-only", *flags.split(), "--output-dir", str(folder)])
    with pytest.raises(common.UserError, match="two jobs"):
        det.main(["--eval-only", "--predict", str(tmp_path), "--output-dir", str(folder)])
    with pytest.raises(common.UserError, match="--resume goes with one trial"):
        det.main([*TINY, "--trials", "2", "--resume", str(folder / "checkpoint.pth"), "--output-dir", str(tmp_path)])


def test_another_methods_checkpoint_is_refused(finished, tmp_path):
    state = checkpoint(finished[0]) | {"script": "setsim"}
    (tmp_path / "b").mkdir()
    torch.save(state, tmp_path / "b" / "checkpoint.pth")
    for flags in (["--eval-only"], TINY):
        with pytest.raises(common.UserError, match="checkpoint of"):
            det.main([*flags, "--output-dir", str(tmp_path / "b")])


def test_samplers_for_tests_pick_the_first():
    positive, negative = FirstOnes(4)([torch.tensor([1.0, 0, 1, 1, 0, 0, -1])])
    assert positive[0].tolist() == [1, 0, 1, 0, 0, 0, 0] and negative[0].tolist() == [0, 1, 0, 0, 1, 0, 0]
