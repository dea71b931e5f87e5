# SPDX-License-Identifier: MIT
"""transfer_det.py, harness/coco.py and harness/metrics.py against torchvision, slow loops and hand calculations."""

import functools
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from pycocotools import mask as rle
from several import FirstOnes
from torch import nn
from torchvision import ops
from torchvision.models.detection import roi_heads as stock
from torchvision.models.detection.image_list import ImageList

import common
import transfer_det as det
from common import UserError
from harness import coco, metrics

STILL = det.View((1.0, 1.0), (64, 96), False)
CUSTOM = "--task custom --train-json a --val-json b --images c".split()
DOG, CAT = {"id": 3, "name": "dog"}, {"id": 7, "name": "cat"}


def settings(*flags):
    return det.get_args([*map(str, flags), *"--workers 0 --output-dir unused".split()])[0]


def scenes_args(*flags):
    return settings("--demo", "--amp", "none", *flags)


@pytest.fixture(scope="module")
def scene_batch():
    """The arguments of the demo, two scenes and their targets."""
    args = scenes_args("--data", "scenes:8")
    images = det.TrainingImages(det.open_data(args, "train"), args)
    return args, *images.collate([images[0, i] for i in range(2)])[:2]


def demo_detector(args, outputs=("boxes", "masks", "keypoints"), keypoints=4):
    """The demo's detector, with few proposals: quick."""
    model = det.new_detector(args, torch.device("cpu"), 10, outputs, keypoints)
    model.rpn._post_nms_top_n = dict(training=40, testing=40)
    return model


def content(rows, images=1, categories=(CAT, DOG)):
    """What a file in COCO's format holds: images 0.png, 1.png, ... of 96 x 64 pixels with ids 0, 10, ..."""
    told = [{"id": 10 * i, "file_name": f"{i}.png", "width": 96, "height": 64} for i in range(images)]
    return {"images": told, "annotations": rows, "categories": list(categories)}


def annotation(image, box, category=3, **more):
    return {"id": 0, "image_id": image, "category_id": category, "bbox": box, **more}


def write(folder, images=1):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(images):
        pixels = np.random.default_rng(i).integers(0, 256, (64, 96, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")


def coco_data(folder, rows, images=1, categories=(CAT, DOG), known=None):
    """The data set of `content`, its images written before. known: categories of the training data."""
    write(folder, images)
    return coco.CocoData(content(rows, images, categories), str(folder), "a.json", known)


def as_rle(mask):
    return rle.encode(np.asfortranarray(mask, np.uint8))


def test_anchors_of_both_models():
    fpn = det.Anchors([[32], [64], [128], [256], [512]], [4, 8, 16, 32, 64])
    c4 = det.Anchors([[32, 64, 128, 256, 512]], [16])
    wide, square, _ = c4.cell_anchors[0][:3].tolist()  # size outer, ratio inner: .5, 1, 2 of size 32 come first
    assert wide == pytest.approx([-22.6274, -11.3137, 22.6274, 11.3137], abs=1e-4) and square == [-16, -16, 16, 16]
    for cells in fpn.cell_anchors + c4.cell_anchors:
        width, height = (cells[:, 2:] - cells[:, :2]).T
        assert torch.allclose(height / width, torch.tensor([0.5, 1.0, 2.0]).repeat(len(cells) // 3))


def test_anchors_stand_at_multiples_of_the_stride_whatever_the_padding():
    anchors = det.Anchors([[32, 64, 128, 256, 512]], [16])
    maps = [torch.zeros(1, 8, 3, 84, dtype=torch.bfloat16)]
    (found,) = anchors(ImageList(torch.zeros(1, 3, 48, 1333), [(48, 1333)]), maps)  # torchvision: 1333 // 84 = 15
    assert found.shape == (3 * 84 * 15, 4) and found.dtype == torch.float32
    centres = ((found[:, :2] + found[:, 2:]) / 2).view(3, 84, 15, 2)
    wanted = 16.0 * torch.cartesian_prod(torch.arange(3), torch.arange(84)).flip(1).view(3, 84, 1, 2)
    assert torch.allclose(centres, wanted.expand_as(centres), atol=1e-3)


def test_pooling_equals_torchvisions_operator_box_by_box():
    rng, strides, levels = torch.Generator().manual_seed(0), [4, 8, 16, 32], set()
    maps = {f"p{i}": torch.randn(2, 3, 512 // s, 512 // s, generator=rng) for i, s in enumerate(strides)}
    corners = torch.rand(2, 30, 2, generator=rng) * 200
    boxes = list(torch.cat([corners, corners + 2 ** (torch.rand(2, 30, 2, generator=rng) * 8)], 2))
    boxes[0][:2] = torch.tensor([[0.0, 0, 112, 112], [0, 0, 500, 500]])  # the first on the border of two levels
    pooled = det.AlignedRoIPool(strides, 7)(maps, boxes)
    for number, (image, box) in enumerate((i, box) for i in range(2) for box in boxes[i]):
        width, height = (box[2:] - box[:2]).tolist()
        level = min(max(math.floor(4 + math.log2(math.sqrt(width * height) / 224) + 1e-7), 2), 5)
        levels.add(level)
        x = list(maps.values())[level - 2][image : image + 1]
        wanted = ops.roi_align(x, [box[None]], 7, 1 / strides[level - 2], sampling_ratio=0, aligned=True)[0]
        assert torch.allclose(pooled[number], wanted, atol=1e-5)
    assert levels == {2, 3, 4, 5}


def test_pooling_on_a_ramp_gives_cell_centres():
    ramp = torch.arange(8.0).view(1, 1, 1, 8).expand(1, 1, 8, 8) + 0.5  # value = x of the cell's centre, in cells
    pooled = det.AlignedRoIPool([16], 4)({"c4": ramp}, [torch.tensor([[32.0, 32, 96, 96]])])
    assert torch.allclose(pooled[0, 0], torch.tensor([2.5, 3.5, 4.5, 5.5]).expand(4, 4))


def test_rpn_loss_by_hand():
    rpn = det.RPN(det.Anchors([[32]], [16]), det.FloatRPNHead(4, 3), 0.7, 0.3, 256, 0.5, {}, {}, 0.7)
    rpn.fg_bg_sampler = FirstOnes(16, 0.5)
    labels = [torch.tensor([1.0, 0, -1, 0]), torch.tensor([0.0, 1, -1, -1])]
    objectness = torch.tensor([0.3, -0.2, 5.0, 1.0, 0.0, 2.0, -1.0, 7.0])
    deltas, wanted = torch.randn(8, 4), [torch.randn(4, 4), torch.randn(4, 4)]
    loss_class, loss_box = rpn.compute_loss(objectness[:, None], deltas, labels, wanted)
    by_hand_class = by_hand_box = 0.0
    for score, label, d in zip(objectness.tolist(), torch.cat(labels), deltas - torch.cat(wanted), strict=True):
        p = 1 / (1 + math.exp(-score))
        by_hand_class -= math.log(p if label else 1 - p) if label >= 0 else 0
        by_hand_box += sum(abs(x) for x in d.tolist()) if label == 1 else 0
    wanted = [by_hand_class / 32, by_hand_box / 32]  # 16 x 2, though five were sampled
    assert [loss_class.item(), loss_box.item()] == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_box_losses_by_hand(beta):
    scores, deltas = torch.randn(5, 4), torch.randn(5, 16)
    labels, wanted, by_hand = torch.tensor([0, 3, 1, 0, 2]), torch.randn(5, 4), 0.0
    loss_class, loss_box = det.box_losses(scores, deltas, labels, wanted, beta)
    for r, label in enumerate(labels.tolist()):
        for k in range(4) if label else ():
            d = abs(deltas[r, 4 * label + k].item() - wanted[r, k].item())
            by_hand += d - 0.5 * beta if d >= beta else 0.5 * d * d / beta
    wanted = [-scores.log_softmax(1)[range(5), labels].mean().item(), by_hand / 5]
    assert [loss_class.item(), loss_box.item()] == pytest.approx(wanted, rel=1e-5)


def test_mask_targets_of_polygons():
    left_half = [[10.0, 20, 24, 20, 24, 48, 10, 48]]
    two_parts = [[10.0, 20, 17, 20, 17, 48, 10, 48], [31.0, 20, 38, 20, 38, 48, 31, 48]]
    flipped = det.View((2.0, 0.5), (32, 192), True)  # twice as wide, half as high: the left half is on the right
    for mask, box, view, columns in (
        (left_half, [10, 20, 38, 48], STILL, [1] * 14 + [0] * 14),
        (two_parts, [10, 20, 38, 48], STILL, [1] * 7 + [0] * 14 + [1] * 7),
        (left_half, [17, 20, 45, 48], STILL, [1] * 7 + [0] * 21),  # another box: the object moves
        (left_half, [192 - 76, 10, 192 - 20, 24], flipped, [0] * 14 + [1] * 14),
    ):
        (target,) = det.mask_targets(mask, torch.tensor([box]).float(), view, 28)
        assert torch.equal(target, torch.tensor(columns).expand(28, 28).float()), (box, view)


def test_mask_targets_of_bitmaps_are_roi_align_cut_at_one_half():
    def pooled(bitmap, boxes):
        image = torch.tensor(bitmap.copy())[None, None].float()
        return (ops.roi_align(image, [boxes], 14, sampling_ratio=0, aligned=True)[:, 0] >= 0.5).float()

    bitmap = np.random.default_rng(0).integers(0, 2, (5, 7)).repeat(10, 0).repeat(10, 1)
    bitmap = np.pad(bitmap, ((14, 0), (0, 26)))
    boxes = torch.tensor([[3.3, 5.1, 71.7, 49.2], [20.0, 2, 60, 60]])
    targets = det.mask_targets(as_rle(bitmap), boxes, STILL, 14)
    assert torch.equal(targets, pooled(bitmap, boxes)) and 0.2 < targets.mean() < 0.8
    # a view of the whole is the same as a view of the resized and flipped bitmap, pixel by pixel
    double, view = bitmap.repeat(2, 0).repeat(2, 1)[:, ::-1], det.View((2.0, 2.0), (128, 192), True)
    moved = torch.tensor([192.0, 0, 192, 0]) + boxes[:, [2, 1, 0, 3]] * torch.tensor([-2.0, 2, -2, 2])
    assert (det.mask_targets(as_rle(bitmap), moved, view, 14) == pooled(double, moved)).float().mean() > 0.97


def test_mask_loss_gives_each_roi_the_mask_of_its_own_object():
    """Two images, RoIs of several objects in mixed order, one object without a mask: against a loop over RoIs."""
    left, right = [[0.0, 0, 8, 0, 8, 16, 0, 16]], [[8.0, 0, 16, 0, 16, 16, 8, 16]]
    targets = [{"masks": [left, None, right], "view": STILL}, {"masks": [right], "view": STILL}]
    boxes, owners = torch.tensor([[0.0, 0, 16, 16]] * 5).split([4, 1]), [torch.tensor([2, 1, 0, 2]), torch.tensor([0])]
    logits, wanted = torch.randn(5, 4, 4), 0.0
    for r, columns in ((0, [0.0, 0, 1, 1]), (2, [1.0, 1, 0, 0]), (3, [0.0, 0, 1, 1]), (4, [0.0, 0, 1, 1])):
        wanted += F.binary_cross_entropy_with_logits(logits[r], torch.tensor(columns).expand(4, 4)).item() / 4
    assert det.mask_loss(logits, boxes, owners, targets).item() == pytest.approx(wanted, rel=1e-5)


def test_heads_detect_what_torchvisions_do(scene_batch):
    """The same modules in torchvision's own RoIHeads: its forward pass in testing has to agree with ours."""
    ours = demo_detector(scene_batch[0]).eval().roi_heads
    for p in [*ours.box_predictor.parameters(), *ours.mask_predictor.parameters()]:  # their start says next to nothing
        nn.init.normal_(p, std=0.2)
    pools = ours.box_roi_pool, ours.mask_roi_pool, ours.keypoint_roi_pool
    box, mask, points = (lambda maps, boxes, sizes, pool=pool: pool(maps, boxes) for pool in pools)
    theirs = stock.RoIHeads(
        box, ours.box_head, ours.box_predictor, 0.5, 0.5, 32, 0.25, (10.0, 10.0, 5.0, 5.0), 0.05, 0.5, 100,
        mask, ours.mask_head, ours.mask_predictor, points, ours.keypoint_head, ours.keypoint_predictor,
    ).eval()  # fmt: skip
    maps = {f"p{i}": torch.randn(2, 256, 160 // 2**i, 160 // 2**i) for i in (2, 3, 4, 5, 6)}
    proposals = [torch.rand(20, 4) * 60 + torch.tensor([0.0, 0, 70, 70]) for _ in range(2)]
    with torch.no_grad():
        found = ours(maps, proposals, [(150, 140), (130, 160)])
        wanted, _ = theirs(maps, proposals, [(150, 140), (130, 160)])
    assert sum(len(one["boxes"]) for one in found) > 10
    for a, b in zip(found, wanted, strict=True):
        for name in ("boxes", "scores", "labels", "keypoints"):
            assert torch.allclose(a[name], b[name], atol=1e-5), name
        assert torch.allclose(a["masks"], b["masks"][:, 0], atol=1e-5)


def test_every_parameter_is_trained_with_objects_and_without(scene_batch):
    model, values = demo_detector(scenes_args("--heads", "4conv1fc")).train(), []
    for targets in (scene_batch[2], [det.make_target([], {}, STILL, list(range(4)))] * 2):
        model.zero_grad()
        loss, found = model(scene_batch[1], targets)
        loss.backward()
        assert [name for name, p in model.named_parameters() if p.grad is None] == []
        values.append({name: value.item() for name, value in found.items()} | {"loss": loss.item()})
    losses = {name: value for name, value in values[0].items() if name.startswith("loss_")}
    assert sorted(losses) == "loss_box loss_class loss_keypoint loss_mask loss_objectness loss_rpn_box_reg".split()
    assert values[0]["loss"] == pytest.approx(sum(losses.values()), rel=1e-6)
    assert values[0]["foreground"] >= 2  # the objects' own boxes are among the RoIs
    assert losses["loss_keypoint"] == pytest.approx(math.log(56**2), abs=0.3)  # a guess among the cells
    assert [losses[f"loss_{name}"] for name in ("objectness", "mask")] == pytest.approx([math.log(2)] * 2, abs=0.1)
    assert values[1]["foreground"] == values[1]["loss_mask"] == values[1]["loss_keypoint"] == 0
    assert math.isfinite(values[1]["loss"]) and all(buffer.isfinite().all() for buffer in model.buffers())


def test_c4_runs_res5_once_in_training_and_again_in_testing(scene_batch):
    _, pixels, targets = scene_batch
    model = demo_detector(scenes_args("--model", "c4", "--data", "scenes:8"), ["boxes", "masks"]).train()
    heads, pooled, masked, labels = model.roi_heads, [], [], []
    heads.fg_bg_sampler, sampled = FirstOnes(8, 0.25), heads.select_training_samples
    heads.select_training_samples = lambda *a: labels.extend((out := sampled(*a))[2]) or out
    heads.box_head.register_forward_hook(lambda module, inputs, output: pooled.append(output))
    heads.mask_predictor.register_forward_pre_hook(lambda module, inputs: masked.append(inputs[0]))
    _, values = model(pixels, targets)
    assert len(pooled) == 1 and values["loss_mask"] > 0 and heads.box_head.norm.num_batches_tracked == 1
    foreground = torch.cat(labels) > 0  # the mask branch sees its own rows of the shared maps
    assert torch.equal(masked[0], pooled[0][foreground]) and foreground.sum() >= 2
    for p in heads.box_predictor.parameters():
        nn.init.normal_(p, std=0.5)
    model.eval()(pixels)
    assert len(pooled) == 3 and len(pooled[1]) <= 80 and len(pooled[2]) <= 200
    assert model.divisor == 1  # no padding to a multiple


def test_boxes_stay_fp32_under_autocast(scene_batch):
    args, pixels, targets = scene_batch
    model, seen = demo_detector(args).train(), []
    model.roi_heads.box_roi_pool.register_forward_pre_hook(lambda module, inputs: seen.extend(inputs[1]))
    model.rpn.head.register_forward_hook(lambda module, inputs, output: seen.extend(output[0] + output[1]))
    model.roi_heads.box_predictor.register_forward_hook(lambda module, inputs, output: seen.extend(output))
    with torch.autocast("cpu", torch.bfloat16):
        _, values = model(pixels, targets)
    assert {x.dtype for x in [*seen, *values.values()]} == {torch.float32} and len(seen) == 14


def test_the_batch_is_normalised_then_padded():
    images = [torch.full((3, 40, 70), 255, dtype=torch.uint8), torch.randint(0, 256, (3, 65, 30), dtype=torch.uint8)]
    white, seen = (1 - torch.tensor(common.PIXEL_MEAN)) / torch.tensor(common.PIXEL_STD), []
    for divisor in (32, 1):  # of FPN and C4
        det.Detector(seen.append, lambda *_: (None, {}), lambda *_: [], divisor).eval()(images)
    assert [x.shape for x in seen] == [(2, 3, 96, 96), (2, 3, 65, 70)]
    assert torch.allclose(seen[0][0, :, :40, :70], white[:, None, None].expand(3, 40, 70))
    assert (seen[0][0, :, 40:] == 0).all() and (seen[0][0, :, :, 70:] == 0).all() and (seen[0][1, :, :, 30:] == 0).all()


def in_detector(model, name):
    """Where a tensor of the ResNet, or a stage, stands."""
    place = "roi_heads.box_head." if name.startswith("layer4") else "backbone."
    return (place if model == "c4" else "backbone.body.") + name


@pytest.mark.parametrize("model", ["fpn", "c4"])
def test_pretrained_weights_arrive_in_the_detector(model, tmp_path, capsys):
    trunk = common.ResNetTrunk("resnet18").state_dict()
    state = {name: x + torch.rand(x.shape).to(x.dtype) for name, x in trunk.items()}
    torch.save(state, tmp_path / "resnet18.pth")
    flags = "--weights", tmp_path / "resnet18.pth", "--model", model
    found = demo_detector(scenes_args(*flags), ["boxes"]).state_dict()
    assert f"{len(state)} tensors of resnet18" in capsys.readouterr().out
    for name, x in state.items():
        assert torch.equal(found[in_detector(model, name)], x), name


def test_heads_start_as_in_detectron2():
    model = det.build_detector(settings(*"--task coco --data x --heads 4conv1fc".split()), 80, ["boxes", "masks"], 0)
    heads, lateral = model.roi_heads, model.backbone.fpn.inner_blocks[3][0]
    boxes, masks, layers = heads.box_predictor, heads.mask_predictor, [*heads.box_head.modules()]
    fc, conv = (next(m for m in layers if isinstance(m, kind)) for kind in (nn.Linear, nn.Conv2d))
    for layer, std in (
        (boxes.cls_score, 0.01), (boxes.bbox_pred, 0.001), (masks.mask_fcn_logits, 0.001), (model.rpn.head.cls_logits, 0.01),
        (masks.conv5_mask, math.sqrt(2 / (256 * 4))), (conv, math.sqrt(2 / (256 * 9))),
    ):  # fmt: skip
        assert layer.weight.std().item() == pytest.approx(std, rel=0.1) and (layer.bias is None or not layer.bias.any())
    assert fc.weight.abs().max().item() == pytest.approx(math.sqrt(3 / fc.in_features), rel=0.01) and not fc.bias.any()
    assert lateral.bias is None and lateral.weight.abs().max().item() == pytest.approx(math.sqrt(3 / 2048), rel=0.01)
    assert model.divisor == 32


@pytest.mark.parametrize("model, at", [("c4", 0), ("c4", 2), ("c4", 4), ("c4", 5), ("fpn", 2), ("fpn", 4)])
def test_what_is_frozen_stays_as_it_is(model, at, scene_batch):
    _, pixels, targets = scene_batch
    network = demo_detector(scenes_args("--model", model, "--freeze-at", at), ["boxes"]).train()
    stages = "conv1 bn1 layer1 layer2 layer3 layer4".split()[: at and at + 1]
    names = [in_detector(model, name) for name in stages]
    before = {name: x.clone() for name, x in network.state_dict().items()}
    optimizer = torch.optim.SGD(det.parameter_groups(network, 0.1), 0.5)
    network(pixels, targets)[0].backward()
    optimizer.step()
    for name, x in network.state_dict().items():
        assert torch.equal(x, before[name]) == any(name.startswith(f"{n}.") for n in names), name


def test_norms_have_no_weight_decay():
    model = demo_detector(scenes_args("--heads", "4conv1fc", "--freeze-at", 2))
    decayed, free = det.parameter_groups(model, 1e-4)
    assert decayed["weight_decay"] == 1e-4 and free["weight_decay"] == 0
    weights = dict(model.named_parameters())
    trained = {name for name, p in weights.items() if p.requires_grad}
    norms = {name for name in trained if weights[name.rpartition(".")[0] + ".weight"].dim() == 1}  # no other layer's is
    for group, wanted in ((decayed, trained - norms), (free, norms)):
        assert sorted(map(id, group["params"])) == sorted(id(weights[name]) for name in wanted) and len(wanted) > 40


def test_learning_rates():
    """VOC's, and the linear rule of each task."""
    for step, lr in {0: 0.00002, 50: 0.01001, 100: 0.02, 17999: 0.02, 18000: 0.002, 22000: 0.0002}.items():
        assert det.learning_rate(step, 0.02, 100, [18000, 22000]) == pytest.approx(lr)
    for flags, plan in {
        "--task voc": (24000, [18000, 22000], 100, 0.02),
        "--task voc07": (9000, [6750, 8250], 100, 0.02),
        "--task coco --iterations 9000": (9000, [6000, 8000], 100, 0.02),
        "--task coco --iterations 180000": (180000, [120000, 160000], 1000, 0.02),
        "--task coco --iterations 180000 --batch-size 4": (720000, [480000, 640000], 4000, 0.005),
    }.items():
        names = "iterations", "drops", "warmup", "lr"
        assert det.plan(settings(*flags.split(), "--data", "x")) == dict(zip(names, plan, strict=True)), flags


def test_precise_bn_is_the_population():
    torch.manual_seed(0)
    first, second, frozen = nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.BatchNorm2d(3).eval()
    model = nn.Sequential(first, nn.ReLU(), second, frozen)
    batches = [(torch.randn(n, 3, 5, side) * (1 + n) + n,) for n, side in ((2, 7), (5, 3), (3, 9))]
    det.precise_bn(model, batches, model)
    inputs = {first: [x for (x,) in batches], second: []}
    for x in inputs[first]:
        y = (x - x.mean((0, 2, 3), keepdim=True)) / (x.var((0, 2, 3), keepdim=True, correction=0) + 1e-5).sqrt()
        inputs[second].append(F.relu(y))
    for norm, parts in inputs.items():
        population = torch.cat([x.transpose(0, 1).flatten(1) for x in parts], 1)
        assert torch.allclose(norm.running_mean, population.mean(1), rtol=1e-4, atol=1e-5)
        assert torch.allclose(norm.running_var, population.var(1), rtol=1e-4)
    assert (frozen.running_mean == 0).all() and (frozen.running_var == 1).all() and not first._forward_pre_hooks


def test_resized():
    for size, short, longest, wanted in (
        ((480, 640), 800, 1333, (800, 1067)), ((640, 480), 800, 1333, (1067, 800)), ((375, 500), 480, 1333, (480, 640)),
        ((200, 1000), 800, 1333, (267, 1333)), ((3, 4), 2, 99, (2, 3)), ((1024, 2048), 1024, 2048, (1024, 2048)),
        ((1, 5000), 800, 1333, (1, 1333)),
    ):  # fmt: skip
        assert det.resized(*size, short, longest) == wanted, size


def test_objects_follow_a_resize_and_a_flip():
    names = ["nose", "left_eye", "right_eye", "tail", "paw", "ear"]
    points = [10.0, 5, 2, 29, 5, 1, 60, 40, 0, 99, 49, 2, -3, 5, 2, 5, 70, 2]  # the last two leave the image
    rows = [coco.annotation(0, n, [10, 5, 20, 20], keypoints=points) for n in (3, 1)]
    rows.append(coco.annotation(0, 1, [120, 5, 20, 20]))  # outside: clipped to nothing
    order = det.flip_order(names)
    assert order == [0, 2, 1, 3, 4, 5] and det.flip_order(["Left eye", "Right eye", "L"]) == [1, 0, 2]
    view = det.View((3.0, 2.0), (100, 300), True)
    moved = det.make_target(rows, {1: 2, 3: 1}, view, order)
    assert moved["boxes"].tolist() == [[210, 10, 270, 50]] * 2 and moved["labels"].tolist() == [1, 2]
    assert len(moved["masks"]) == 2 and np.allclose(view.back(view.move([[7.0, 9]])), [[7, 9]])
    wanted = [[300 - 31.5, 11, 2], [0, 0, 0], [300 - 88.5, 11, 1], [300 - 298.5, 99, 2], [0, 0, 0], [0, 0, 0]]
    assert np.allclose(moved["keypoints"][0], wanted)


def test_keypoints_come_back_from_the_heat_map():
    """+0.5 on the way in, a cell of the 56 x 56 map, the cell's centre, -0.5 on the way out."""
    points, box = [12.0, 30, 2, 40, 11, 2, 25, 25, 2], torch.tensor([[5.0, 5.0, 61.0, 61.0]])
    moved = det.make_target([coco.annotation(0, 1, [5, 5, 56, 56], keypoints=points)], {1: 1}, STILL, [0, 1, 2])
    cells, valid = stock.keypoints_to_heatmap(moved["keypoints"], box, 56)
    maps = F.one_hot(cells[0], 56 * 56).view(1, 3, 56, 56).float()
    back = stock.heatmaps_to_keypoints(maps, box)[0][0, :, :2] - 0.5
    assert valid.all() and np.allclose(back, np.reshape(points, (3, 3))[:, :2], atol=1e-4)


def test_paste_mask():
    torch.manual_seed(0)
    mask = F.interpolate(torch.rand(1, 1, 4, 4), size=28, mode="bicubic")[0, 0]
    x0, y0, x1, y1 = box = [3.7, -4.2, 38.1, 55.5]  # reaches out of the image
    pasted = det.paste_mask(mask, box, 60, 40)
    for y, x in np.ndindex(60, 40):  # each pixel's centre, read off the mask by hand
        u, v, value = (x + 0.5 - x0) / (x1 - x0) * 28 - 0.5, (y + 0.5 - y0) / (y1 - y0) * 28 - 0.5, 0.0
        for i in (math.floor(v), math.floor(v) + 1):
            for j in (math.floor(u), math.floor(u) + 1):
                inside = 0 <= i < 28 and 0 <= j < 28
                value += (1 - abs(v - i)) * (1 - abs(u - j)) * (mask[i, j].item() if inside else 0)
        if abs(value - 0.5) > 1e-4:
            assert pasted[y, x] == (value > 0.5), (x, y)
    assert 0.2 < pasted.mean() < 0.8


def test_detections_go_back_to_the_original_image():
    """80 x 100 pixels were resized to 61 x 53: another factor for each side."""
    mask = (torch.arange(28) < 14).float().expand(28, 28)
    said = {"scores": torch.tensor([0.9, 0.8, 0.7, 0.6]), "labels": torch.tensor([3, 1, 1, 1])}
    said["boxes"] = torch.tensor([[10.0, 6.1, 30.0, 36.6], [40, 50, 70, 80], [52.9, 5, 53, 9], [53, 5, 53, 9]])
    said["keypoints"] = torch.tensor([[[26.5, 30.5, 1.0], [53, 61, 1]]]).repeat(4, 1, 1)
    said["masks"] = mask.expand(4, 28, 28)
    categories, image = [{"id": 10 * k} for k in (1, 2, 3)], torch.zeros(3, 61, 53, dtype=torch.uint8)
    found = det.detect(lambda images: [said], image, (100, 80), categories)
    assert [one["category_id"] for one in found] == [30, 10, 10]  # the last one is empty
    x, y = 80 / 53, 100 / 61
    assert found[0]["bbox"] == pytest.approx([10 * x, 6.1 * y, 20 * x, 30.5 * y])
    assert found[1]["bbox"] == pytest.approx([40 * x, 50 * y, 80 - 40 * x, 100 - 50 * y])  # clipped
    assert found[0]["keypoints"] == pytest.approx([39.5, 49.5, 1, 79.5, 99.5, 1])
    pasted, (x0, y0, w, h) = rle.decode(found[0]["segmentation"]), found[0]["bbox"]
    assert np.array_equal(pasted, det.paste_mask(mask, [x0, y0, x0 + w, y0 + h], 100, 80))
    assert pasted[30, 20] == 1 and pasted[30, 40] == 0


def test_training_images_are_pils_anti_aliased_ones(tmp_path):
    """Each of a short side and a flip that are drawn for its seed, epoch and index."""
    data, seen = coco_data(tmp_path, [annotation(0, [1, 1, 29, 29])]), []
    flags = [*CUSTOM, "--short-sides", 32, 48, "--test-side", 40, "--seed"]
    images, other = (det.TrainingImages(data, settings(*flags, seed)) for seed in (0, 1))
    assert det.at_test_size(data.read(0), settings(*flags, 0)).shape == (3, 40, 60)
    for epoch in range(16):
        pixels, target, index, passed = images[epoch, 0]
        side, flipped = pixels.shape[1], bool(target["boxes"][0, 0] > 4)
        small = np.asarray(data.read(0).resize((side * 3 // 2, side), Image.BILINEAR))
        assert np.array_equal(pixels.permute(1, 2, 0), small[:, ::-1] if flipped else small)
        assert target["view"] == det.View((side / 64, side / 64), (side, side * 3 // 2), flipped)
        assert torch.equal(pixels, images[epoch, 0][0]) and (index, passed) == (0, 0)
        seen.append((side, flipped))
    assert {*seen} == {(32, False), (32, True), (48, False), (48, True)}
    assert [side for side, _ in seen] != [other[epoch, 0][0].shape[1] for epoch in range(16)]


def test_coco_data_copes_with_what_files_hold(tmp_path, capsys):
    counts = as_rle(np.eye(64, 96))["counts"].decode()
    rows = [
        annotation(0, [1, 2, 30, 40], 7, segmentation=[[1, 2, 31, 2, 31, 42], [5, 5, 6, 6]], iscrowd=0),
        annotation(0, [0, 0, 50, 60], 3, iscrowd=1, segmentation={"size": [64, 96], "counts": [64 * 96 - 5, 5]}),
        annotation(0, [5, 5, 0, 10]),  # degenerate
        annotation(0, [5, 5, 10, float("nan")]),
        annotation(10, [0, 0, 50, 60], iscrowd=1),  # an image of crowds alone
        annotation(99, [0, 0, 9, 9]),  # no such image
        annotation(20, [0, 0, 9, 9], segmentation={"size": [64, 96], "counts": counts}, area=5),
    ]
    data, said = coco_data(tmp_path, rows, images=4), capsys.readouterr().out
    assert "2 annotations have an empty box" in said and "1 annotations have no image" in said
    assert [c["id"] for c in data.categories] == [3, 7] and data.label == {3: 1, 7: 2} and len(data) == 4
    first, crowd = data.annotations(0)
    assert first["category_id"] == 7 and first["bbox"] == [1, 2, 30, 40] and len(first["segmentation"]) == 1
    assert crowd["iscrowd"] and coco.decode(crowd["segmentation"], 64, 96).sum() == 5
    assert data.annotations(3) == [] and data.annotations(2)[0]["area"] == 5
    assert data.usable(keypoints=False) == [0, 2] and data.usable(keypoints=True) == []
    truth = det.coco_truth(data, "bbox")
    assert len(truth.getImgIds()) == 4 and sorted(truth.anns) == [1, 2, 3, 4]  # an id of 0 would count as no match
    assert truth.anns[2]["iscrowd"] == 1 and truth.anns[1]["category_id"] == 7
    images = det.TrainingImages(data, settings(*CUSTOM))  # crowds are no targets
    assert images.name(1) == "2.png" and [len(images[0, i][1]["boxes"]) for i in range(len(images))] == [1, 1]


def test_what_is_not_coco_is_refused_and_images_that_do_not_fit_are_named(tmp_path, capsys):
    data = coco_data(tmp_path, [], 2)
    with pytest.raises(UserError, match="3 of its 5 images are not there, for instance .*2.png"):
        coco.CocoData(content([], images=5), str(tmp_path), "a.json")
    write(tmp_path, 4)
    few = coco.CocoData(content([annotation(40, [1, 1, 5, 5])], images=5), str(tmp_path), "a.json")
    assert len(few) == 4 and "4.png" in capsys.readouterr().out
    Image.new("RGB", (96, 65)).save(tmp_path / "0.png")
    with pytest.raises(OSError, match="annotated are 96 x 64"):
        data.read(0)
    rows = annotation(99, [1, 1, 2, 2]), annotation(0, [1, 1, 2, 2], 5), annotation(0, [1, 1])
    points = content([annotation(0, [1, 1, 2, 2], keypoints=[1] * 6)], 1, [DOG | {"keypoints": ["nose"]}])
    for broken in ({}, [], content([], 0, []), points, *(content([row] * 2) for row in rows)):
        with pytest.raises(UserError):
            coco.CocoData(broken, str(tmp_path), "a.json")


def test_validation_data_use_the_labels_of_training(tmp_path):
    write(tmp_path)
    for name, categories in (("a", [CAT, DOG]), ("b", [CAT])):
        (tmp_path / f"{name}.json").write_text(json.dumps(content([annotation(0, [1, 2, 30, 40], 7)], 1, categories)))
    flags = f"--task custom --train-json {tmp_path}/a.json --val-json {tmp_path}/b.json --images {tmp_path}"
    train = det.open_data(settings(*flags.split()), "train")
    val = det.open_data(settings(*flags.split()), "val", train.categories)
    assert val.label == train.label == {3: 1, 7: 2}
    assert det.evaluate_coco(val, found_as_truth(val), "bbox")["AP"] == pytest.approx(100)
    for other in ({"id": 7, "name": "cow"}, {"id": 8, "name": "cat"}):
        with pytest.raises(UserError, match="are not those of the training data"):
            coco_data(tmp_path, [], categories=[other], known=train.categories)


def test_objects_without_masks_or_keypoints(tmp_path):
    """They are learned as boxes, and count neither way where masks are evaluated."""
    square, named = [[1, 1, 31, 1, 31, 31, 1, 31]], [DOG | {"keypoints": ["nose"]}, CAT]
    rows = [annotation(0, [1, 1, 30, 30], segmentation=square, keypoints=[9, 9, 2]), annotation(0, [50, 10, 20, 20])]
    data = coco_data(tmp_path, rows, categories=named)
    assert det.outputs_of(settings(*CUSTOM), data) == ["boxes", "masks", "keypoints"] and data.keypoints == ["nose"]
    images = det.TrainingImages(data, scenes_args())
    loss, values = demo_detector(scenes_args(), keypoints=1).train()(*images.collate([images[0, 0]])[:2])
    assert loss.isfinite() and values["loss_mask"] > 0
    found = found_as_truth(data)[0] | {"keypoints": [9, 9, 1]}
    for kind in ("segm", "keypoints"):
        assert det.evaluate_coco(data, [dict(found)], kind)["AP"] == pytest.approx(100), kind


def test_a_portrait_with_exif_rotation(tmp_path):
    """Sizes come from the image as it is seen; annotations of the stored pixels are kept, too."""
    exif, told = Image.Exif(), content([annotation(0, [1, 1, 9, 9])])
    exif[0x0112] = 6  # a quarter turn
    Image.new("RGB", (96, 64), "red").save(tmp_path / "0.jpg", exif=exif)
    for size in (None, (96, 64), (64, 96)):
        told["images"] = [{"id": 0, "file_name": "0.jpg"} | dict(zip(("width", "height"), size or (), strict=False))]
        data = coco.CocoData(told, str(tmp_path), "a.json")
        assert data.read(0).size == (size or (64, 96)) == (data.images[0]["width"], data.images[0]["height"])
        kinds = det.TrainingImages(data, settings(*CUSTOM)).kinds.tolist()
        assert kinds == [size == (96, 64)]  # harness.images.Batches keeps wide and high ones apart


def voc_tree(root):
    """Two images in each split, with a dog and a difficult cat."""
    xml = "<annotation><size><width>96</width><height>64</height><depth>3</depth></size>"
    for name, hard, *corners in (("dog", 0, 11, 21, 30, 40), ("cat", 1, 1, 1, 96, 64)):
        edges = zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True)
        edges = "".join(f"<{edge}>{value}</{edge}>" for edge, value in edges)
        xml += f"<object><name>{name}</name><difficult>{hard}</difficult><bndbox>{edges}</bndbox></object>"
    for year, split in (("2007", "trainval"), ("2007", "test"), ("2012", "trainval")):
        base, names = root / f"VOC{year}", [f"{year}_{split}_{i}" for i in range(2)]
        for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
            (base / folder).mkdir(parents=True, exist_ok=True)
        (base / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(names) + "\n")
        for name in names:
            (base / "Annotations" / f"{name}.xml").write_text(f"{xml}</annotation>")
            Image.new("RGB", (96, 64)).save(base / "JPEGImages" / f"{name}.jpg")


@pytest.mark.parametrize("inner", ["", "VOCdevkit"])
def test_voc_reader(inner, tmp_path):
    voc_tree(tmp_path / inner)
    args = settings("--task", "voc", "--data", tmp_path)
    train, val = det.open_data(args, "train"), det.open_data(args, "val")
    assert len(val) == 2 and len(train.categories) == 20
    assert [i["file_name"].split("/")[0] for i in train.images] == ["VOC2007"] * 2 + ["VOC2012"] * 2
    dog, cat = train.annotations(3)
    assert dog["bbox"] == [10, 20, 20, 20] and train.categories[train.label[dog["category_id"]] - 1]["name"] == "dog"
    assert cat["bbox"] == [0, 0, 96, 64] and cat["difficult"] and not dog["difficult"]
    assert len(det.open_data(settings("--task", "voc07", "--data", tmp_path), "train")) == 2
    assert len(det.TrainingImages(val, args)[0, 0][1]["boxes"]) == 2  # difficult ones are trained on


def test_coco_reader(tmp_path):
    rows = [annotation(0, [1, 1, 20, 20]), annotation(0, [1, 1, 9, 9], keypoints=[0] * 51)]
    rows.append(annotation(10, [1, 1, 20, 20], keypoints=[5, 5, 2] + [0, 0, 0] * 16, num_keypoints=1))
    person = {"id": 3, "name": "person", "keypoints": ["nose"] + [f"k{i}" for i in range(16)]}
    (tmp_path / "annotations").mkdir()
    for split in ("train2017", "val2017"):
        write(tmp_path / split, 2)
        for kind, categories in (("instances", [person, CAT]), ("person_keypoints", [person])):
            (tmp_path / f"annotations/{kind}_{split}.json").write_text(json.dumps(content(rows, 2, categories)))
    args, of_persons = (settings("--task", task, "--data", tmp_path) for task in ("coco", "coco-keypoint"))
    assert [len(det.open_data(args, split).categories) for split in ("train", "val")] == [2, 2]
    train = det.open_data(of_persons, "train")
    assert len(train.keypoints) == 17 and det.outputs_of(of_persons, train) == ["boxes", "keypoints"]
    images = det.TrainingImages(train, of_persons)
    assert len(images) == 1 and images.name(0) == "1.png"  # without a visible keypoint an image is not trained on


def test_cityscapes_reader(tmp_path):
    ids = np.full((40, 80), 7, np.uint16)
    ids[5:20, 10:30] = 26001  # a car
    ids[25:35, 40:60] = 24  # a group of persons
    ids[0:4, 0:4] = 29000  # a caravan: not among the eight classes
    for split in ("train", "val"):
        for number, instances in enumerate((ids, np.full_like(ids, 24))):
            pixels = np.zeros((40, 80, 3), np.uint8)
            for name, array in (("leftImg8bit/{}_leftImg8bit", pixels), ("gtFine/{}_gtFine_instanceIds", instances)):
                path = tmp_path / f"{name.format(f'{split}/ulm/ulm_{number:06}_000019')}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(path)
    args = settings("--task", "cityscapes", "--data", tmp_path)
    train, val = det.open_data(args, "train"), det.open_data(args, "val")
    assert len(train) == len(val) == 2 and [c["name"] for c in train.categories][:3] == ["person", "rider", "car"]
    group, car = train.annotations(0)
    assert car["bbox"] == [10, 5, 20, 15] and train.label[car["category_id"]] == 3 and car["area"] == 300
    assert not car["iscrowd"] and group["iscrowd"] and train.label[group["category_id"]] == 1
    images = det.TrainingImages(train, args)
    assert images.usable.tolist() == [0] and len(images[0, 0][1]["masks"]) == 1 and train.images[0]["width"] == 80


def test_scenes_follow_cocos_convention_of_keypoints():
    data = det.SceneData(0, 3)
    scene, still, order = data.scene(1), det.View((1.0, 1.0), (136, 136), False), det.flip_order(data.keypoints)
    moved, seen = det.make_target(data.annotations(1), data.label, still, order), scene["keypoints"][..., 2] > 0
    assert np.allclose(moved["keypoints"][..., :2][seen], scene["keypoints"][..., :2][seen], atol=1e-4)
    assert order == [0, 2, 1, 3]
    assert [coco.decode(mask, 136, 136).sum() for mask in moved["masks"]] == [mask.sum() for mask in scene["masks"]]


def found_as_truth(data):
    """COCO's results that say just what is annotated."""
    results = []
    for index, image in enumerate(data.images):
        for row in data.annotations(index):
            one = {"image_id": image["id"], "category_id": row["category_id"], "score": 0.9, "bbox": row["bbox"]}
            if row["segmentation"] is not None:
                one["segmentation"] = as_rle(coco.decode(row["segmentation"], image["height"], image["width"]))
            results.append(one | ({"keypoints": row["keypoints"]} if row["keypoints"] else {}))
    return results


def test_eleven_points():
    cases = ([0.5], [1], 6 / 11), ([0.25, 0.25, 0.5], [1, 0.5, 2 / 3], (3 + 2) / 11), ([], [], 0)
    for recall, precision, ap in cases:
        assert metrics.voc_ap(np.array(recall), np.array(precision)) == pytest.approx(ap)


def test_voc_rules_on_worked_examples():
    here, far, near = (np.array(box, float) for box in ((1, 1, 10, 10), (50, 1, 60, 10), (3, 1, 12, 10)))
    half = np.array([1.0, 1, 10, 5])  # 50 of 100 pixels, counted inclusively
    one, hard, two = [(here, False)], [(here, True)], [(here, False), (near, False)]
    for rule, truth, threshold, found, right, wrong in (
        ("a duplicate is wrong", one, 0.5, [(0, 0.9, here), (0, 0.8, here)], [1, 0], [0, 1]),
        ("best score first", one, 0.5, [(0, 0.2, here), (0, 0.9, far)], [0, 1], [1, 0]),
        ("difficult ones never count", hard, 0.5, [(0, 0.9, here), (0, 0.8, here)], [0, 0], [0, 0]),
        ("just the threshold is not enough", one, 0.5, [(0, 0.9, half)], [0], [1]),
        ("more than the threshold is", one, 0.4999, [(0, 0.9, half)], [1], [0]),
        ("no second best object", two, 0.5, [(0, 0.9, here), (0, 0.8, here), (0, 0.7, near)], [1, 0, 1], [0, 1, 0]),
        ("ties in the order given", one, 0.5, [(0, 0.5, far), (0, 0.5, here)], [0, 1], [1, 0]),
        ("objects of other images do not count", one, 0.5, [(3, 0.5, here)], [0], [1]),
    ):
        assert [x.tolist() for x in metrics.voc_match(found, {0: truth}, threshold)] == [right, wrong], rule


def test_voc_evaluation(tmp_path):
    voc_tree(tmp_path)
    args = settings("--task", "voc", "--data", tmp_path)
    val = det.open_data(args, "val")
    perfect = found_as_truth(val)
    found = {i: [one for one in perfect if one["image_id"] == image["id"]] for i, image in enumerate(val.images)}
    result = det.evaluate(args, val, found, ["boxes"])
    assert result["box"]["AP"] == result["box"]["AP50"] == pytest.approx(100 / 20)  # classes without objects count as 0
    assert result["coco_style"]["AP50"] == pytest.approx(100)
    assert sorted(a["iscrowd"] for a in det.coco_truth(val, "bbox").anns.values()) == [0, 0, 1, 1]  # difficult ones
    rows = [row for i in range(2) for row in val.annotations(i)]
    dogs = [one for one in perfect if one["category_id"] == 12]
    curve = functools.partial(metrics.evaluate_voc, rows, categories=[12])
    hard = [*rows, rows[0] | {"bbox": [60, 30, 9, 9], "difficult": 1}]  # need not be found
    assert metrics.evaluate_voc(hard, dogs, [12])["AP"] == pytest.approx(100)
    shifted = curve([one | {"bbox": [10, 20, 20, 35]} for one in dogs])["AP_by_IoU"]  # overlap 20 / 35 = .571
    assert shifted["50"] == shifted["55"] == pytest.approx(100) and shifted["60"] == 0
    assert curve(dogs[:1])["AP50"] == pytest.approx(600 / 11)
    # scores are rounded to three decimals: what ties then stands in the order given
    close = [dogs[0] | {"score": 0.90011, "bbox": [60, 1, 10, 8]}, dogs[0] | {"score": 0.90049}]
    assert curve(close)["AP50"] == pytest.approx(100 * 6 / 11 / 2)


def test_coco_evaluation(tmp_path):
    data = det.SceneData(0, 6)
    for kind in ("bbox", "segm", "keypoints"):
        result = det.evaluate_coco(data, found_as_truth(data), kind)
        assert result["AP"] == pytest.approx(100) and result["AP_by_IoU"]["95"] == pytest.approx(100), kind
    assert det.evaluate_coco(data, [], "segm")["AP"] == 0
    data = coco_data(tmp_path, [annotation(10, [1, 2, 30, 40], 7)], 2)
    found = {0: [], 1: [{"category_id": 7, "score": 0.5, "bbox": [1, 2, 30, 40]}]}  # image 1 has id 10
    assert det.evaluate(settings(*CUSTOM), data, found, ["boxes"])["box"]["AP"] == pytest.approx(100)


def test_cityscapes_curve_by_hand():
    for right, wrong, missed, ap in (
        ([0.9, 0.8], [], 0, 1), ([], [0.9], 1, 0), ([], [], 1, 0),
        # (precision, recall) = (.5, .5) at .8, (1, .5) at .9, (1, 0) at the end; steps: half the recall between neighbours
        ([0.9], [0.8], 1, 0.25 + 0.25),
        ([0.8], [0.9], 0, 0.5 * 0.5),  # (.5, 1) at .8, (0, 0) at .9, (1, 0) at the end
    ):  # fmt: skip
        assert metrics.cityscapes_ap(np.array(right), np.array(wrong), missed) == pytest.approx(ap)


EIGHT = {24: "person", 25: "rider", 26: "car", 27: "truck", 28: "bus", 31: "train", 32: "motorcycle", 33: "bicycle"}


def test_cityscapes_rules_on_worked_examples():
    ids = np.full((60, 120), 7)
    ids[0:20, 0:20] = 26000
    ids[0:20, 30:50] = 26001
    ids[30:39, 0:10] = 26002  # 90 pixels: too small to count
    ids[30:50, 30:70] = 26  # a group of cars
    ids[30:50, 80:110] = 4  # void
    cars = [(26, score, as_rle(ids == n)) for n, score in ((26000, 0.9), (26001, 0.8))]
    score = lambda found: metrics.evaluate_cityscapes([ids], [found], EIGHT)  # noqa: E731
    curve = lambda *a: pytest.approx(100 * metrics.cityscapes_ap(*map(np.array, a)))  # noqa: E731
    assert score(cars)["AP"] == score(cars)["AP50"] == pytest.approx(100) and score(cars)["AP_by_class"] == {"car": 100}
    for n in (26002, 26, 4):  # on small objects, groups and void nothing is wrong, whole or in part
        rows = np.cumsum(ids == n).reshape(ids.shape)
        for mask in (ids == n, (ids == n) & (rows <= (ids == n).sum() * 0.4)):
            assert score([*cars, (26, 0.95, as_rle(mask))])["AP"] == pytest.approx(100), n
    wrong = (26, 0.95, as_rle((ids == 7) & (np.arange(120) < 20)))
    assert score([*cars, wrong])["AP50"] == curve([0.9, 0.8], [0.95], 0)
    assert score([cars[0], (26, 0.85, cars[0][2]), cars[1]])["AP50"] == curve([0.9, 0.8], [0.85], 0) != 100
    assert score(cars[:1])["AP50"] == curve([0.9], [], 1) != 100
    assert score([])["AP"] == 0 and score([(24, 0.9, cars[0][2])])["AP"] == 0
    part = (ids == 26000) & (np.arange(120) < 12)  # 240 of 400 pixels: .6, and more than .6 is wanted at .6
    at = score([(26, 0.9, as_rle(part)), cars[1]])["AP_by_IoU"]
    assert at["55"] == pytest.approx(100) and at["60"] < 100


def test_cityscapes_equals_its_own_scripts():
    """The numbers that cityscapesScripts 2.3.0 gives for random maps (with the numpy call it lost put back)."""
    rng, maps, found = np.random.default_rng(0), [], []
    for _ in range(4):
        ids = np.full((120, 200), 7)
        ids[:, 150:] = rng.choice([4, 24, 26])
        for number in range(8):
            y, x = rng.integers(0, 90), rng.integers(0, 140)
            ids[y : y + rng.integers(6, 30), x : x + rng.integers(6, 40)] = 1000 * rng.choice([24, 26, 33, 29]) + number
        maps.append(ids)
        found.append([])
        for number in np.unique(ids):
            label = int(number) // 1000 or int(number)
            for _ in range(rng.integers(0, 3)) if label in (24, 26, 33) else ():
                mask = np.roll(ids == number, rng.integers(-4, 5, 2), (0, 1))
                found[-1].append((label, round(float(rng.random()), 2), as_rle(mask)))
    ours = metrics.evaluate_cityscapes(maps, found, EIGHT)
    assert ours["AP"] == pytest.approx(12.70478, abs=1e-4) and ours["AP50"] == pytest.approx(44.98264, abs=1e-4)


@pytest.mark.slow
def test_four_scenes_are_learnt_by_heart(tiny_resnet, quick, tmp_path, monkeypatch):
    train = det.SceneData(0, 4)
    monkeypatch.setattr(det, "open_data", lambda *_: train)
    monkeypatch.setattr(det, "outputs_of", lambda *_: ["boxes"])
    monkeypatch.setitem(det.TASKS, "scenes", det.TASKS["scenes"] | {"rois": 16, "post_nms": 100})
    monkeypatch.setattr(det.Run, "save", lambda *_: None)
    flags = "--demo --amp none --iterations 60 --short-sides 96 --test-side 96 --precise-bn 10 --workers 0 --output-dir"
    det.job([*flags.split(), str(tmp_path)])
    assert json.loads((tmp_path / "results.jsonl").read_text())["box"]["AP50"] > 90
