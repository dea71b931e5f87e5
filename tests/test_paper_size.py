# SPDX-License-Identifier: MIT
"""The papers' sizes: every protocol as built, on the device that computes nothing; two steps of each kind of model."""

import argparse
import math

import pytest
import torch
import torchvision
from helpers import log_lines

import d3ssl
import resim
import setsim
import transfer_det
import transfer_seg
from harness import coco
from harness.run import Run

# fmt: off
TRUNK, MLP = 23_508_032, 2048 * (2048 + 1 + 128) + 128  # weights of ResNet-50 without fc; of MoCo-v2's 2048-2048-128
REGIONS = {C: 9 * 128 * (C + 128) + 3 * 128 for C in (256, 1024)}  # ReSim: 3x3 convolution, norm, 3x3 convolution
# SimSiam's projector C-D-D-D and predictor D-D/4-D. One bias, at the end. The projector's last norm learns nothing.
SIMSIAM = {(C, D): D * (C + 2 * D + 4) + D // 4 * (2 * D + 2) + D for C, D in ((2048, 2048), (256, 1024), (256, 512))}
LATERALS, OUTPUTS = 256 * (512 + 1024 + 2048 + 3), 2 * 256 * (9 * 256 + 1)  # ReSim's pyramid: C3 to C5; P4 and P3
METHODS = {  # script, flags: weights that are learned; how many queues of 65536 keys
    (setsim, ""): (TRUNK + 2 * MLP, 2),
    (setsim, "--preset official"): (TRUNK + 2 * MLP, 2),
    (setsim, "--loss-weight 0"): (TRUNK + MLP, 1),
    (setsim, "--framework simsiam"): (TRUNK + 2 * SIMSIAM[2048, 2048], 0),
    (resim, ""): (TRUNK + MLP + LATERALS + 2 * REGIONS[256], 1),
    (resim, "--preset official"): (TRUNK + MLP + LATERALS + OUTPUTS, 1),
    (resim, "--levels c4"): (TRUNK + MLP + REGIONS[1024], 1),
    (resim, "--framework simsiam"): (TRUNK + LATERALS + sum(SIMSIAM.values()), 0),
    (d3ssl, "--proposals x"): (TRUNK + MLP, 1),
    (d3ssl, "--proposals x --mlp-norm"): (TRUNK + MLP + 2 * 2048, 1),
    (d3ssl, "--proposals x --framework soco"): (TRUNK + 4096 * (2048 + 3 * 256 + 2 * 3) + 2 * 256, 0),  # 2048-4096-256 twice
}
# RPN on C4 with 15 anchors; res5 in the head with a norm after it; scores and boxes of K classes and background; masks.
C4 = {K: TRUNK + 9 * 1024**2 + 1024 + 75 * 1025 + 2 * 2048 + 5 * (K + 1) * 2049 for K in (20, 80)}
C4_MASKS = 4 * 2048 * 256 + 256 + 81 * 257
CONVOLUTIONS = 4 * (9 * 256**2 + 512) - 1024 * 1025 + 4 * 256  # protocol B: for a linear layer; norms for masks' biases
FPN_SIDES, VOC_SIDES = [640, 800, 800, 1333], [480, 800, 800, 1333]
ONCE, MASKS = [90000, 60000, 80000, 1000, 0.02], ("maskrcnn", 81)
DETECTORS = {  # flags: title; weights, or torchvision's model and more; schedule; sides; tensors with, without weight decay
    "--task voc": ("VOC 07+12, Faster R-CNN R50-C4", C4[20], [24000, 18000, 22000, 100, 0.02], VOC_SIDES, (63, 108)),
    "--task voc07": ("VOC 07, Faster R-CNN R50-C4", C4[20], [9000, 6750, 8250, 100, 0.02], VOC_SIDES, (63, 108)),
    "--task voc --freeze-at 4": ("VOC 07+12, Faster R-CNN R50-C4, frozen to C4", None, None, VOC_SIDES, (20, 22)),
    "--task coco": ("COCO, Mask R-CNN R50-FPN, protocol A", (*MASKS, 0), ONCE, FPN_SIDES, (87, 122)),
    "--task coco --iterations 180000": (
        "COCO, Mask R-CNN R50-FPN, protocol A; changed: iterations 180000",
        (*MASKS, 0), [180000, 120000, 160000, 1000, 0.02], FPN_SIDES, (87, 122),
    ),
    "--task coco --freeze-at 2": ("COCO, Mask R-CNN R50-FPN, protocol A, frozen to C2", None, ONCE, FPN_SIDES, (76, 100)),
    "--task coco --heads 4conv1fc": (
        "COCO, Mask R-CNN R50-FPN, protocol B", (*MASKS, CONVOLUTIONS), ONCE, FPN_SIDES, (85, 138),
    ),
    "--task coco --model c4": ("COCO, Mask R-CNN R50-C4", C4[80] + C4_MASKS, ONCE, FPN_SIDES, (67, 108)),
    "--task coco-keypoint": (
        "COCO keypoints, Keypoint R-CNN R50-FPN, protocol A", ("keypointrcnn", 2, 0), ONCE, FPN_SIDES, (93, 122),
    ),
    "--task cityscapes": (
        "Cityscapes, Mask R-CNN R50-FPN, protocol A",
        ("maskrcnn", 9, 0), [24000, 18000, 1000, 0.01], [800, 1024, 1024, 2048], (87, 122),
    ),
}
SEGMENTERS = {  # flags: title, classes, iterations
    "--task voc": ("VOC 2012 train_aug, FCN R50-D8, crop 512x512, test whole", 21, 20000),
    "--task cityscapes": ("Cityscapes, FCN R50-D8, crop 769x769, test slide", 19, 40000),
    "--task cityscapes --crop 512x1024": ("Cityscapes, FCN R50-D8, crop 512x1024, test whole", 19, 40000),
    "--task ade20k": ("ADE20K, FCN R50-D8, crop 512x512, test whole", 150, 80000),
    "--task voc --linear-probe": ("VOC 2012 train_aug, linear probe R50-D8, crop 512x512, test whole", 21, 20000),
}
K = "--queue-size 65536"
RUNS = {  # script, flags: values of the first step and their ranges
    (setsim, K): {"loss_chance": (11.09, 11.1), "rows": (1, 49)},
    (setsim, "--framework simsiam"): {"rows": (1, 49), "loss_image": (-1, 1)},
    (resim, K): {"loss_chance": (11.09, 11.1), "valid_p4": (0.2, 0.95), "valid_p3": (0.2, 0.95)},
    (d3ssl, f"{K} --proposals {{data}}/boxes"): {"loss_chance": (44.36, 44.37), "proposals": (3, 4)},
    (transfer_det, "--task coco"): {"loss_class": (3.5, 5.3), "loss_mask": (0.6, 0.8)},  # ln 81
    (transfer_det, "--task voc"): {"loss_class": (2.4, 3.7)},  # ln 21
    (transfer_seg, "--task voc"): {"loss_head": (2.4, 3.7)},
    (transfer_seg, "--task cityscapes"): {"loss_head": (2.3, 3.6)},  # ln 19
}
# fmt: on


def weights(model):
    return sum(p.numel() for p in model.parameters())


def torchvisions(place, name, classes, **more):
    """The number of weights of a model that torchvision builds."""
    with torch.device("meta"):
        return weights(getattr(place, name)(weights=None, weights_backbone=None, num_classes=classes, **more))


@pytest.mark.parametrize("script, flags", METHODS)
def test_methods_as_built(script, flags):
    with torch.device("meta"):
        method = script.build(script.get_args(["--data", "x", *flags.split()]), torch.device("meta"))
    queues = [buffer.shape for name, buffer in method.named_buffers() if name.endswith("vectors")]
    learned, count = METHODS[script, flags]
    assert weights(method.query) == learned and queues == [(65536, 128)] * count


@pytest.mark.parametrize("flags", DETECTORS)
def test_detectors_as_built(flags):
    """FPN models have torchvision's weights, but norms where it has biases in the pyramid's 8 convolutions."""
    title, wanted, schedule, sides, tensors = DETECTORS[flags]
    args, _ = transfer_det.get_args(["--data", "x", *flags.split()])
    with torch.device("meta"):
        model = transfer_det.build_detector(args, args.classes, args.outputs, 17)
    plan, groups = transfer_det.plan(args), transfer_det.parameter_groups(model, args.weight_decay)
    if isinstance(wanted, tuple):
        name, classes, more = wanted
        norm, place = {"norm_layer": torch.nn.BatchNorm2d}, torchvision.models.detection
        wanted = torchvisions(place, f"{name}_resnet50_fpn", classes, **norm) + 8 * 256 + more
    assert transfer_det.title(args, args.outputs) == title and wanted in (None, weights(model))
    assert schedule in (None, [plan["iterations"], *plan["drops"], plan["warmup"], plan["lr"]])
    assert sides == [args.short_sides[0], args.short_sides[-1], args.test_side, args.max_side]
    assert tensors == tuple(len(group["params"]) for group in groups) and groups[1]["weight_decay"] == 0
    assert (args.box_beta, args.post_nms) == ((0.5, 1500) if "keypoint" in flags else (0, 1000))
    assert (args.rois, args.precise_bn, groups[0]["weight_decay"]) == (512, 200, 1e-4)


@pytest.mark.parametrize("flags", SEGMENTERS)
def test_segmenters_as_built(flags):
    """torchvision's FCN with a second convolution in its head, and a third that sees C5 beside it."""
    title, classes, iterations = SEGMENTERS[flags]
    args, _ = transfer_seg.get_args(["--data", "x", *flags.split()])
    with torch.device("meta"):
        model = transfer_seg.Segmenter(args.arch, classes, args.align_corners, args.linear_probe)
    fcn = torchvisions(torchvision.models.segmentation, "fcn_resnet50", classes, aux_loss=True)
    wanted = TRUNK + 2049 * classes if args.linear_probe else fcn + 9 * 512 * (512 + 2560) + 4 * 512
    assert transfer_seg.title(args) == title and weights(model) == wanted
    assert (args.batch_size, args.iterations, args.lr) == (8 if classes == 19 else 16, iterations, 0.01)
    assert args.weight_decay == (0 if args.linear_probe else 5e-4) and args.align_corners == (args.crop == [769, 769])
    assert sum(p.requires_grad for p in model.parameters()) == (2 if args.linear_probe else 175)


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("script, flags", RUNS)
def test_two_steps(script, flags, photos, tmp_path, monkeypatch):
    """The paper's command with other data and a small batch. Nothing is saved: checkpoints have half a gigabyte."""
    monkeypatch.setattr(Run, "save", lambda *_: None)
    monkeypatch.setattr(Run, "measure", lambda *_: None)
    given = f"--data {photos}/images --steps 2 --print-freq 1 --workers 0 --output-dir {tmp_path} --batch-size "
    if script in (setsim, resim, d3ssl):
        script.train(f"{given} 8 {flags}".format(data=photos).split())
    else:
        if script is transfer_det:
            names = {3: "dog", 7: "cat"}
            classes = [{"id": i, "name": names.get(i, "x")} for i in range(1, 81 if "coco" in flags else 21)]
            data = coco.read_coco(photos / "train.json", f"{photos}/images/train", classes)
        else:
            own = dict(task="custom", images=f"{photos}/images", masks=f"{photos}/masks", ignore=[])
            own["classes"] = [str(i) for i in range(19 if "cityscapes" in flags else 21)]
            data = transfer_seg.open_data(argparse.Namespace(**own), "train")
        monkeypatch.setattr(script, "open_data", lambda *_: data)
        script.job(f"{given} 1 {flags}".split())
    lines = [line for line in log_lines(tmp_path) if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2] and all(math.isfinite(line["loss"]) for line in lines)
    assert all(low <= lines[0][name] <= high for name, (low, high) in RUNS[script, flags].items())
