# SPDX-License-Identifier: MIT
"""The papers' sizes: two steps of each kind of model; every protocol as built, on the device that computes nothing."""

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

TRUNK = 23_508_032  # weights of torchvision's ResNet-50 without fc
MLP, SIMSIAM = (
    4_458_624,
    12_591_104 + 2_100_224,
)  # MoCo-v2's 2048-2048-128; SimSiam's 2048-2048-2048-2048 and 2048-512-2048


def region_head(channels):
    """ReSim's two 3x3 convolutions on MoCo, the first followed by batch norm."""
    return 9 * channels * 128 + 2 * 128 + 9 * 128 * 128 + 128


def simsiam_heads(C, D):
    """Projector C-D-D-D, predictor D-D/4-D: biases at the very end alone; two of three norms learn, and the predictor's."""
    return C * D + 2 * D * D + 4 * D + 2 * D * D // 4 + 2 * D // 4 + D


LATERALS, OUTPUTS = 256 * (512 + 1024 + 2048 + 3), 2 * (9 * 256 * 256 + 256)  # of ReSim's pyramid: C3 to C5; P4 and P3
METHODS = {  # flags: what is learned, queues of 65536 keys
    (setsim, ""): (TRUNK + 2 * MLP, 2),
    (setsim, "--preset official"): (TRUNK + 2 * MLP, 2),
    (setsim, "--loss-weight 0"): (TRUNK + MLP, 1),
    (setsim, "--framework simsiam"): (TRUNK + 2 * SIMSIAM, 0),
    (resim, ""): (TRUNK + MLP + LATERALS + 2 * region_head(256), 1),
    (resim, "--preset official"): (TRUNK + MLP + LATERALS + OUTPUTS, 1),
    (resim, "--levels c4"): (TRUNK + MLP + region_head(1024), 1),
    (resim, "--framework simsiam"): (
        TRUNK + SIMSIAM + LATERALS + simsiam_heads(256, 1024) + simsiam_heads(256, 512),
        0,
    ),
    (d3ssl, "--proposals x"): (TRUNK + MLP, 1),
    (d3ssl, "--proposals x --mlp-norm"): (TRUNK + MLP + 2 * 2048, 1),
    (d3ssl, "--proposals x --framework soco"): (TRUNK + 4096 * (2048 + 256 + 256 + 256 + 2 + 4) + 2 * 256, 0),
}


@pytest.mark.parametrize("script, flags", METHODS)
def test_methods_as_built(script, flags):
    with torch.device("meta"):
        method = script.build(script.get_args(["--data", "x", *flags.split()]), torch.device("meta"))
    queues = [buffer.shape for name, buffer in method.named_buffers() if name.endswith("vectors")]
    learned = sum(p.numel() for p in method.query.parameters())
    assert (learned, queues) == (METHODS[script, flags][0], [(65536, 128)] * METHODS[script, flags][1])


def c4(K):
    """RPN on C4 with 15 anchors; res5 in the head with a norm after it; scores and boxes of K classes and background."""
    return TRUNK + 9 * 1024 * 1024 + 1024 + 15 * 5 * 1025 + 2 * 2048 + 5 * (K + 1) * 2049


def fpn(name, classes, **more):
    """torchvision's, with batch norm where it has biases in the FPN's 8 convolutions."""
    with torch.device("meta"):
        more |= dict(weights=None, weights_backbone=None, norm_layer=torch.nn.BatchNorm2d, num_classes=classes)
        model = getattr(torchvision.models.detection, f"{name}_resnet50_fpn")(**more)
    return sum(p.numel() for p in model.parameters()) + 8 * 256


MASK_C4 = 4 * 2048 * 256 + 256 + 81 * 257  # deconvolution and 1x1 convolution
HEADS_B = 4 * (9 * 256 * 256 + 512) - 1024 * 1025 + 4 * 256  # four convolutions for a linear layer; norms for biases
COCO = ([90000, 60000, 80000, 1000, 0.02], [640, 800, 800, 1333])
DETECTORS = {  # flags: title; weights; iterations, drops, warm-up, rate; sides; tensors with and without weight decay
    "--task voc": ("VOC 07+12, Faster R-CNN R50-C4", c4(20), [24000, 18000, 22000, 100, 0.02], [480, 800, 800, 1333], (63, 108)),
    "--task voc07": ("VOC 07, Faster R-CNN R50-C4", c4(20), [9000, 6750, 8250, 100, 0.02], [480, 800, 800, 1333], (63, 108)),
    "--task voc --freeze-at 4": ("VOC 07+12, Faster R-CNN R50-C4, frozen to C4", None, None, None, (20, 22)),
    "--task coco": ("COCO, Mask R-CNN R50-FPN, protocol A", fpn("maskrcnn", 81), *COCO, (87, 122)),
    "--task coco --iterations 180000": (
        "COCO, Mask R-CNN R50-FPN, protocol A; changed: iterations 180000", None, [180000, 120000, 160000, 1000, 0.02], None, None,
    ),
    "--task coco --freeze-at 2": ("COCO, Mask R-CNN R50-FPN, protocol A, frozen to C2", None, None, None, (76, 100)),
    "--task coco --heads 4conv1fc": ("COCO, Mask R-CNN R50-FPN, protocol B", fpn("maskrcnn", 81) + HEADS_B, *COCO, (85, 138)),
    "--task coco --model c4": ("COCO, Mask R-CNN R50-C4", c4(80) + MASK_C4, *COCO, (67, 108)),
    "--task coco-keypoint": ("COCO keypoints, Keypoint R-CNN R50-FPN, protocol A", fpn("keypointrcnn", 2), *COCO, (93, 122)),
    "--task cityscapes": (
        "Cityscapes, Mask R-CNN R50-FPN, protocol A", fpn("maskrcnn", 9), [24000, 18000, 1000, 0.01], [800, 1024, 1024, 2048], (87, 122),
    ),
}  # fmt: skip


@pytest.mark.parametrize("flags", DETECTORS)
def test_detectors_as_built(flags):
    title, weights, schedule, sides, tensors = DETECTORS[flags]
    args, _ = transfer_det.get_args(["--data", "x", *flags.split()])
    with torch.device("meta"):
        model = transfer_det.build_detector(args, args.classes, args.outputs, 17)
    plan, groups = transfer_det.plan(args), transfer_det.parameter_groups(model, args.weight_decay)
    found = [plan["iterations"], *plan["drops"], plan["warmup"], plan["lr"]]
    assert transfer_det.title(args, args.outputs) == title and schedule in (None, found)
    assert sides in (None, [args.short_sides[0], args.short_sides[-1], args.test_side, args.max_side])
    assert weights in (None, sum(p.numel() for p in model.parameters()))
    assert tensors in (None, tuple(len(group["params"]) for group in groups))
    assert [group["weight_decay"] for group in groups] == [1e-4, 0] and model.roi_heads.box_beta == args.box_beta
    assert (args.box_beta, args.post_nms) == (
        (0.5, 1500) if "keypoint" in flags else (0, 1000)
    ) and args.precise_bn == 200
    assert model.roi_heads.fg_bg_sampler.batch_size_per_image == 512


SEGMENTERS = {  # flags: title; classes, batch, iterations
    "--task voc": ("VOC 2012 train_aug, FCN R50-D8, crop 512x512, test whole", 21, 16, 20000),
    "--task cityscapes": ("Cityscapes, FCN R50-D8, crop 769x769, test slide", 19, 8, 40000),
    "--task cityscapes --crop 512x1024": ("Cityscapes, FCN R50-D8, crop 512x1024, test whole", 19, 8, 40000),
    "--task ade20k": ("ADE20K, FCN R50-D8, crop 512x512, test whole", 150, 16, 80000),
    "--task voc --linear-probe": ("VOC 2012 train_aug, linear probe R50-D8, crop 512x512, test whole", 21, 16, 20000),
}


@pytest.mark.parametrize("flags", SEGMENTERS)
def test_segmenters_as_built(flags):
    """torchvision's FCN with a second convolution in the head and a third that sees C5 beside it."""
    title, classes, batch, iterations = SEGMENTERS[flags]
    args, _ = transfer_seg.get_args(["--data", "x", *flags.split()])
    with torch.device("meta"):
        model = transfer_seg.Segmenter(args.arch, classes, args.align_corners, args.linear_probe)
        more = dict(weights=None, weights_backbone=None, num_classes=classes, aux_loss=True)
        fcn = sum(p.numel() for p in torchvision.models.segmentation.fcn_resnet50(**more).parameters())
    wanted = TRUNK + 2049 * classes if args.linear_probe else fcn + 9 * 512 * (512 + 2560) + 4 * 512
    assert transfer_seg.title(args) == title and sum(p.numel() for p in model.parameters()) == wanted
    assert (args.batch_size, args.iterations, args.lr) == (batch, iterations, 0.01)
    assert args.weight_decay == (0 if args.linear_probe else 5e-4) and args.align_corners == (args.crop == [769, 769])
    assert sum(p.requires_grad for p in model.parameters()) == (2 if args.linear_probe else 175)


K = "--queue-size 65536"
RUNS = {  # script, flags: logged values and their ranges
    (setsim, K): {"loss_chance": (11.09, 11.1), "rows": (1, 49)},
    (setsim, "--framework simsiam"): {"rows": (1, 49), "loss_image": (-1, 1)},
    (resim, K): {"loss_chance": (11.09, 11.1), "valid_p4": (0.2, 0.95), "valid_p3": (0.2, 0.95)},
    (d3ssl, f"{K} --proposals {{data}}/boxes"): {"loss_chance": (44.36, 44.37), "proposals": (3, 4)},
    (transfer_det, "--task coco"): {"loss_class": (0.8 * math.log(81), 1.2 * math.log(81)), "loss_mask": (0.6, 0.8)},
    (transfer_det, "--task voc"): {"loss_class": (0.8 * math.log(21), 1.2 * math.log(21))},
    (transfer_seg, "--task voc"): {"loss_head": (0.8 * math.log(21), 1.2 * math.log(21))},
    (transfer_seg, "--task cityscapes"): {"loss_head": (0.8 * math.log(19), 1.2 * math.log(19))},
}


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("script, flags", RUNS)
def test_two_steps(script, flags, photos, tmp_path, monkeypatch):
    """The paper's command with other data and a small batch. Nothing is saved: checkpoints have half a gigabyte."""
    monkeypatch.setattr(Run, "save", lambda *_: None)
    monkeypatch.setattr(Run, "measure", lambda *_: None)
    common = f"--data {photos}/images --steps 2 --print-freq 1 --workers 0 --output-dir {tmp_path} --batch-size"
    if script in (setsim, resim, d3ssl):
        script.train(f"{common} 8 {flags}".format(data=photos).split())
    else:
        own = argparse.Namespace(
            task="custom",
            images=f"{photos}/images",
            masks=f"{photos}/masks",
            classes=[*map(str, range(19 + 2 * (flags == "--task voc")))],
            ignore=[],
        )
        categories = [
            {"id": i, "name": {3: "dog", 7: "cat"}.get(i, str(i))} for i in range(1, 81 if "coco" in flags else 21)
        ]
        data = coco.read_coco(photos / "train.json", f"{photos}/images/train", categories)
        opened = transfer_seg.open_data(own, "train") if script is transfer_seg else data
        monkeypatch.setattr(script, "open_data", lambda *_: opened)
        script.job(f"{common} 1 {flags}".split())
    lines = [line for line in log_lines(tmp_path) if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2] and all(math.isfinite(line["loss"]) for line in lines)
    assert all(low <= lines[0][name] <= high for name, (low, high) in RUNS[script, flags].items())
