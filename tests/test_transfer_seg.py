"""transfer_seg.py, piece by piece against torchvision, OpenCV, slow loops and hand calculations, and as a user runs it."""

import json
import math
import signal

import numpy as np
import pytest
import scipy.io
import torch
import torch.nn.functional as F
import torchvision
from helpers import assert_same, checkpoint, keep_signals, lifted, log_lines, run, signal_after  # noqa: F401
from PIL import Image
from torch import nn

import common
import harness.images
import harness.legacy
import harness.run
import harness.weights
import transfer_seg as seg
from harness.scenes import make_scene

WORLD = harness.legacy.World(0, 1, 0, torch.device("cpu"))
# A complete job of seconds, with so low a learning rate that a network still predicts several classes.
TINY = "--task scenes --arch resnet18 --data scenes:16 --batch-size 4 --crop 48 --resize 160x40 --workers 0".split()
TINY += "--print-freq 2 --lr 0.0002".split()


def settings(*flags):
    return seg.get_args([*map(str, flags), *"--workers 0 --output-dir unused".split()])


def open_both(args):
    train = seg.open_data(args, "train")
    return train, seg.open_data(args, "val", train.classes)


def table(*flags):
    args = settings(*flags, "--steps", 0)
    return seg.protocol_table(args, seg.build_segmenter(args, 21)[0].train())


# --------------------------------------------------------------------------------------------------------- network


def of_convs(trunk):
    """{name: (kernel, stride, dilation, padding)} of the convolutions."""
    convs = {name: m for name, m in trunk.named_modules() if isinstance(m, nn.Conv2d)}
    return {name: (m.kernel_size, m.stride, m.dilation, m.padding) for name, m in convs.items()}


def test_dilation_is_torchvisions_of_resnet50():
    ours = of_convs(seg.dilate(common.ResNetTrunk("resnet50")))
    stock = torchvision.models.resnet50(replace_stride_with_dilation=[False, True, True])
    assert ours == of_convs(stock)
    assert [d[0] for kernel, _, d, _ in ours.values() if kernel == (3, 3)] == [1] * 7 + [1, 2, 2, 2, 2, 2, 2, 4, 4]


@pytest.mark.parametrize("arch, pattern", [("resnet18", [1, 2, 2, 2, 2, 4, 4, 4]), ("resnet50", None)])
def test_every_fourth_cell_of_the_dilated_c5_is_the_old_c5(arch, pattern):
    torch.manual_seed(0)
    plain = common.ResNetTrunk(arch).eval()
    dilated = seg.dilate(common.ResNetTrunk(arch)).eval()
    dilated.load_state_dict(plain.state_dict())
    x = torch.randn(1, 3, 96, 128)
    with torch.no_grad():
        old, new = plain(x), dilated(x)
    assert [x.shape[-2:] for x in new] == [(24, 32), (12, 16), (12, 16), (12, 16)]  # output stride 8
    assert torch.allclose(new[2][..., ::2, ::2], old[2], rtol=1e-4, atol=1e-5 * old[2].abs().max())
    assert torch.allclose(new[3][..., ::4, ::4], old[3], rtol=1e-4, atol=1e-5 * old[3].abs().max())
    if pattern:
        found = [d[0] for name, (kernel, _, d, _) in of_convs(dilated).items() if kernel == (3, 3)]
        assert found[8 + 0 :] == pattern


def test_heads_are_the_protocols():
    torch.manual_seed(0)
    model = seg.Segmenter("resnet50", 21, False, False)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if not name.startswith("backbone.")}
    weights = {name: shape for name, shape in shapes.items() if len(shape) == 4}
    assert weights == {
        "head.convs.0.0.weight": (512, 2048, 3, 3), "head.convs.1.0.weight": (512, 512, 3, 3),
        "head.concat.0.weight": (512, 2560, 3, 3), "head.classifier.weight": (21, 512, 1, 1),
        "auxiliary.convs.0.0.weight": (256, 1024, 3, 3), "auxiliary.classifier.weight": (21, 256, 1, 1),
    }  # fmt: skip
    assert [
        name for name in shapes if name.endswith("bias") and name.split(".")[-2] == "0"
    ] == []  # norms have the bias
    assert model.head.classifier.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert model.head.classifier.bias.abs().max() == 0
    wanted = math.sqrt(2 / (512 * 9))
    assert model.head.concat[0].weight.std().item() == pytest.approx(wanted, rel=0.02)


def test_the_head_sees_its_input_beside_what_it_made_of_it():
    torch.manual_seed(0)
    head = seg.FCNHead(6, 4, 3, convs=2, concat=True).eval()
    x = torch.randn(2, 6, 5, 7)
    y = x
    for conv, norm, _ in head.convs:
        y = norm(F.conv2d(y, conv.weight, padding=1)).relu()
    y = head.concat[1](F.conv2d(torch.cat([x, y], 1), head.concat[0].weight, padding=1)).relu()
    wanted = torch.einsum("kc,nchw->nkhw", head.classifier.weight[..., 0, 0], y)
    assert torch.allclose(head(x), wanted, atol=1e-6)


def test_dropout_takes_whole_channels():
    head = seg.FCNHead(6, 400, 1, convs=1, concat=False)
    dropped = head.dropout.train()(torch.ones(4, 400, 3, 3))
    assert dropped.mean((2, 3)).unique().tolist() == pytest.approx([0, 1 / 0.9])
    assert (dropped == 0).float().mean().item() == pytest.approx(0.1, abs=0.03)


@pytest.mark.parametrize("aligned", [False, True])
def test_logits_have_the_size_of_the_image_and_corners_as_asked(aligned):
    torch.manual_seed(0)
    model = seg.Segmenter("resnet18", 5, aligned, False).eval()
    x = torch.randn(1, 3, 48, 64)
    with torch.no_grad():
        small, large = model.head(model.backbone(x)[3]), model(x)
    assert small.shape == (1, 5, 6, 8) and large.shape == (1, 5, 48, 64) and large.dtype == torch.float32
    slope = small[..., 0, 1] - small[..., 0, 0]  # along the upper edge, a cell on
    x10 = 10 * 7 / 63 if aligned else 10.5 / 8 - 0.5  # the place of pixel 10 in cells
    wanted = torch.lerp(small[..., 0, 1], small[..., 0, 2], x10 - 1) if x10 > 1 else small[..., 0, 0] + x10 * slope
    assert torch.allclose(large[..., 0, 10], wanted, rtol=1e-4, atol=1e-4 * small.abs().max())
    assert torch.allclose(large[..., 0, 0], small[..., 0, 0], rtol=1e-4)


def test_every_parameter_gets_a_gradient_and_the_auxiliary_loss_weighs_four_tenths():
    torch.manual_seed(0)
    model = seg.Segmenter("resnet18", 5, False, False)
    x, labels = torch.randn(2, 3, 48, 48), torch.randint(0, 5, (2, 48, 48))
    before = {name: b.clone() for name, b in model.named_buffers() if "running" in name}
    loss, values = model(x, labels)
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    assert loss.item() == pytest.approx((values["loss_head"] + 0.4 * values["loss_auxiliary"]).item(), rel=1e-6)
    assert all(not torch.equal(b, before[name]) for name, b in model.named_buffers() if "running" in name)
    assert values["loss_head"].item() == pytest.approx(math.log(5), abs=0.3)


def test_the_auxiliary_head_hangs_on_c4():
    torch.manual_seed(0)
    model = seg.Segmenter("resnet18", 5, False, False)
    _, values = model(torch.randn(2, 3, 48, 48), torch.randint(0, 5, (2, 48, 48)))
    values["loss_auxiliary"].backward()
    reached = {
        name.split(".")[1] for name, p in model.named_parameters() if name.startswith("backbone") and p.grad is not None
    }
    assert "layer3" in reached and "layer4" not in reached


def test_logged_accuracy_is_of_the_pixels_that_count():
    torch.manual_seed(0)
    model = seg.Segmenter("resnet18", 5, False, False).eval()
    x = torch.randn(2, 3, 48, 48)
    labels = model(x).argmax(1)
    labels[:, :12] = (labels[:, :12] + 1) % 5
    labels[:, 24:] = 255
    assert model(x, labels)[1]["accuracy"].item() == pytest.approx(0.5)
    assert model(x, torch.full_like(labels, 255))[1]["accuracy"] == 0


def test_the_probe_trains_one_convolution_and_freezes_statistics():
    torch.manual_seed(0)
    model = seg.Segmenter("resnet18", 5, False, True).train()
    assert {n: tuple(p.shape) for n, p in model.named_parameters() if p.requires_grad} == {
        "head.1.weight": (5, 512, 1, 1), "head.1.bias": (5,)
    }  # fmt: skip
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = seg.new_optimizer(model, 0.1, 0.0)
    loss, values = model(torch.randn(2, 3, 48, 48), torch.randint(0, 5, (2, 48, 48)))
    loss.backward()
    optimizer.step()
    assert values.keys() == {"loss", "loss_head", "accuracy"}
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert {name for name in changed if "running" not in name} == {
        "head.1.weight",
        "head.1.bias",
        "head.0.num_batches_tracked",
    }
    assert not any(name.startswith("backbone.") for name in changed)
    model.eval()
    logits = (
        model.head(torch.zeros(1, 512, 2, 2)),
        model.head(torch.ones(1, 512, 2, 2)),
        model.head(torch.full((1, 512, 2, 2), 2.0)),
    )
    assert torch.allclose(logits[2] - logits[1], logits[1] - logits[0], atol=1e-4)  # linear


def test_pretrained_weights_arrive_in_the_backbone(tmp_path):
    trunk = common.ResNetTrunk("resnet18")
    torch.save({"state_dict": {f"module.encoder_q.{k}": v for k, v in trunk.state_dict().items()}}, tmp_path / "w.pth")
    args = settings(*TINY, "--weights", tmp_path / "w.pth")
    model, lines = seg.new_segmenter(args, 0, 11, WORLD, None)
    assert "module.encoder_q" in lines[0]
    assert_same(dict(model.backbone.state_dict()), dict(trunk.state_dict()))
    with pytest.raises(common.UserError, match="check --arch"):
        seg.build_segmenter(settings("--task", "voc", "--data", "x", "--weights", tmp_path / "w.pth"), 21)


# ------------------------------------------------------------------------------------------------- loss and schedule


def test_loss_is_averaged_over_all_pixels_ignored_ones_too():
    (pixel_loss,) = lifted_with_ignored("pixel_loss")
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 4, 3, 5, generator=rng, requires_grad=True)
    labels = torch.randint(0, 4, (2, 3, 5), generator=rng)
    labels[0, :2] = 255
    total = 0.0
    for n, y, x in np.ndindex(2, 3, 5):
        if labels[n, y, x] != 255:
            column = [logits[n, k, y, x].item() for k in range(4)]
            total += math.log(sum(map(math.exp, column))) - column[labels[n, y, x]]
    loss = pixel_loss(logits, labels)
    assert loss.item() == pytest.approx(total / 30, rel=1e-6)
    assert loss.item() == pytest.approx(F.cross_entropy(logits, labels, ignore_index=255).item() * 20 / 30, rel=1e-5)
    loss.backward()
    assert logits.grad[0, :, :2].abs().max() == 0
    nothing = pixel_loss(logits, torch.full_like(labels, 255))
    assert nothing == 0


def lifted_with_ignored(*names):
    """`lifted`, for pieces that know the number of ignored pixels and each other."""
    found = lifted("transfer_seg.py", *names)
    for one in found:
        one.__globals__.update(IGNORED=255, Image=Image)
    return found


def test_poly_with_floor():
    (learning_rate,) = lifted("transfer_seg.py", "learning_rate")
    schedule = seg.plan(settings("--task", "voc", "--data", "x"))
    assert schedule == {"iterations": 20000, "lr": 0.01, "floor": 1e-4}
    assert learning_rate(0, **schedule) == 0.01 and learning_rate(20000, **schedule) == 1e-4
    for step in (1, 5000, 19999):
        assert learning_rate(step, **schedule) == pytest.approx((0.01 - 1e-4) * (1 - step / 20000) ** 0.9 + 1e-4)
    assert learning_rate(10000, **schedule) == pytest.approx(0.0054053, abs=1e-7)


def test_the_linear_rule():
    schedule = seg.plan(settings("--task", "cityscapes", "--data", "x", "--batch-size", 2))
    assert schedule == {"iterations": 160000, "lr": 0.0025, "floor": 2.5e-5}
    schedule = seg.plan(settings("--task", "ade20k", "--data", "x", "--batch-size", 32, "--iterations", 8000))
    assert schedule["iterations"] == 4000 and schedule["lr"] == 0.02


def test_norms_and_biases_have_weight_decay_too():
    (group,) = seg.new_optimizer(seg.Segmenter("resnet18", 5, False, False), 0.01, 5e-4).param_groups
    assert group["weight_decay"] == 5e-4 and group["momentum"] == 0.9 and not group["nesterov"]
    assert len(group["params"]) == len(list(seg.Segmenter("resnet18", 5, False, False).parameters()))


# ----------------------------------------------------------------------------------------------------------- testing


def test_slide_grid_of_cityscapes():
    slide_windows, slide_stride = lifted("transfer_seg.py", "slide_windows", "slide_stride")
    assert slide_stride([769, 769]) == [513, 513]
    windows = slide_windows(1025, 2049, (769, 769), (513, 513))
    rows, columns = sorted({w[0] for w in windows}), sorted({w[1] for w in windows})
    assert len(windows) == 8 and rows == [0, 256] and columns == [0, 513, 1026, 1280]
    assert all(bottom - top == 769 and right - left == 769 for top, left, bottom, right in windows)


@pytest.mark.parametrize("size", [(48, 48), (49, 90), (30, 200), (30, 20), (80, 48), (48, 49)])
def test_slide_windows_cover_the_image_and_stay_in_it(size):
    windows = seg.slide_windows(*size, (48, 48), (32, 32))
    count = np.zeros(size, int)
    for top, left, bottom, right in windows:
        assert 0 <= top < bottom <= size[0] and 0 <= left < right <= size[1]
        assert bottom - top == min(48, size[0]) and right - left == min(48, size[1])
        count[top:bottom, left:right] += 1
    assert count.min() == 1 or len(windows) > 1 and count.min() > 0
    assert len(windows) == len(set(windows)) == math.prod(max(math.ceil((side - 48) / 32), 0) + 1 for side in size)


def test_one_window_equals_the_whole_and_several_are_averaged():
    (slide,) = lifted("transfer_seg.py", "slide")
    torch.manual_seed(0)
    network = nn.Conv2d(3, 4, 5, padding=2).requires_grad_(False)
    x = torch.randn(1, 3, 40, 70)
    assert torch.equal(slide(network, x, seg.slide_windows(40, 70, (64, 96), (43, 64))), network(x))
    windows = seg.slide_windows(40, 70, (32, 32), (21, 21))
    total, count = np.zeros((4, 40, 70)), np.zeros((40, 70))
    for top, left, bottom, right in windows:
        part = network(x[..., top:bottom, left:right])[0].numpy()
        for y, x0 in np.ndindex(bottom - top, right - left):
            total[:, top + y, left + x0] += part[:, y, x0]
            count[top + y, left + x0] += 1
    found = slide(network, x, windows)[0].numpy()
    assert np.abs(found - total / count).max() < 1e-5
    assert np.abs(found - network(x)[0].numpy()).max() > 0.01  # windows do see less


class Ramp(nn.Module):
    """Class 1 right of the middle, class 2 in the lower half."""

    align_corners = False

    def forward(self, pixels):
        height, width = pixels.shape[-2:]
        x, y = (
            torch.linspace(-1, 1, width).expand(height, width),
            torch.linspace(-1, 1, height)[:, None].expand(height, width),
        )
        return torch.stack([torch.zeros_like(x), x, 3 * y])[None]


def test_labels_come_at_the_original_size():
    found = seg.segment(Ramp(), torch.zeros(3, 32, 64, dtype=torch.uint8), (50, 100), (16, 16), "whole")
    assert found.shape == (50, 100) and found.dtype == np.uint8
    assert found[5, 20] == 0 and found[5, 80] == 1 and found[45, 20] == 2
    slid = seg.segment(Ramp(), torch.zeros(3, 32, 64, dtype=torch.uint8), (50, 100), (32, 64), "slide")
    assert (slid == found).all()
    assert (seg.segment(Ramp(), torch.zeros(3, 32, 64, dtype=torch.uint8), (50, 100), (16, 16), "slide") != found).any()


def test_scores_against_a_loop():
    confusion, scores = lifted_with_ignored("confusion", "scores")
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, (3, 9, 11)).astype(np.uint8)
    predicted = np.where(rng.random(labels.shape) < 0.6, labels, rng.integers(0, 6, labels.shape)).astype(np.uint8)
    labels[labels == 4] = 255  # class 4 is predicted only, class 5 is not in the truth either, class 6 is nowhere
    labels[0, 0] = 255
    matrix = sum(confusion(p, t, 7) for p, t in zip(predicted, labels, strict=True))
    names = list("abcdefg")
    found = scores(matrix, names)
    pairs = [(p, t) for p, t in zip(predicted.ravel().tolist(), labels.ravel().tolist(), strict=True) if t != 255]
    iou, recall = {}, []
    for k in range(7):
        both = sum(p == t == k for p, t in pairs)
        either = sum(p == k or t == k for p, t in pairs)
        if either:
            iou[names[k]] = 100 * both / either
        if any(t == k for _, t in pairs):
            recall.append(100 * both / sum(t == k for _, t in pairs))
    assert found["IoU_by_class"] == pytest.approx(iou) and list(iou) == list("abcdef") and iou["e"] == 0
    assert found["mIoU"] == pytest.approx(sum(iou.values()) / 6)
    assert found["accuracy"] == pytest.approx(100 * sum(p == t for p, t in pairs) / len(pairs))
    assert found["mean_accuracy"] == pytest.approx(sum(recall) / len(recall))
    assert scores(np.zeros((2, 2), int), ["a", "b"])["mIoU"] == 0


# ------------------------------------------------------------------------------------------------------ augmentation


@pytest.mark.parametrize(
    "size, box, wanted",
    [
        ((375, 500), (2048, 512), (512, 683)),  # scale 1.3653
        ((500, 375), (2048, 512), (683, 512)),
        ((100, 1000), (2048, 512), (205, 2048)),  # the long side is the limit
        ((1024, 2048), (2049, 1025), (1025, 2049)),
        ((1024, 2048), (2048, 1024), (1024, 2048)),
        ((375, 500), (2048 * 0.5, 512 * 0.5), (256, 341)),
        ((3, 1000), (100, 100), (1, 100)),
    ],
)
def test_resized(size, box, wanted):
    (resized,) = lifted("transfer_seg.py", "resized")
    assert resized(*size, *box) == wanted


@pytest.mark.parametrize("size", [(512, 683), (200, 333), (375, 500), (750, 1001)])
def test_resizing_is_opencvs(size):
    cv2 = pytest.importorskip("cv2")
    resize_image, resize_labels = lifted("transfer_seg.py", "resize_image", "resize_labels")
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (375, 500, 3), dtype=np.uint8)
    labels = rng.integers(0, 256, (375, 500), dtype=np.uint8)
    ours = resize_image(torch.from_numpy(image).permute(2, 0, 1), size).permute(1, 2, 0).numpy().astype(int)
    assert np.abs(ours - cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR)).max() <= 1
    ours = resize_labels(torch.from_numpy(labels), size).numpy()
    assert (ours == cv2.resize(labels, size[::-1], interpolation=cv2.INTER_NEAREST)).all()


def test_crops_have_two_classes_and_none_on_three_quarters():
    (crop_window,) = lifted("transfer_seg.py", "crop_window")
    labels = torch.zeros(20, 40, dtype=torch.uint8)
    labels[:, 20:] = 1
    left, middle, edge, right = (0.5, 0.0), (0.5, 0.5), (0.5, 0.245), (0.5, 0.9999)
    crop = (8, 16)
    for draws, wanted in (
        ([left, middle, right], 12),  # one class, then half and half
        ([middle, left], 12),  # good at once
        ([left, right, left, right], 24),  # none is good: the last one
        ([edge, middle], 12),  # 14 of 16 columns are of one class
    ):
        top, x, bottom, x1 = crop_window(labels, crop, draws)
        assert (top, bottom - top, x, x1 - x) == (6, 8, wanted, 16)
    labels[:, 8:16] = 255  # of the crop at 6, 2 columns count as class 0, 8 are ignored, 6 are ...
    labels[:, 16:] = 1
    assert crop_window(labels, crop, [(0.0, 6 / 25 + 1e-6), middle])[1] == 12  # 2 of 8: 75 % exactly is too much
    assert crop_window(labels, crop, [(0.0, 5 / 25 + 1e-6), middle])[1] == 5  # 3 of 8: 62.5 % of what counts
    nothing = torch.full((20, 40), 255, dtype=torch.uint8)
    assert crop_window(nothing, crop, [middle, left])[1] == 0
    assert crop_window(labels[:5, :9], crop, [(0.3, 0.9)]) == (0, 0, 5, 9)  # smaller than the crop


def test_crops_reach_both_ends():
    labels = torch.zeros(20, 40, dtype=torch.uint8)
    assert seg.crop_window(labels, (8, 16), [(0.0, 0.0)]) == (0, 0, 8, 16)
    assert seg.crop_window(labels, (8, 16), [(0.99999, 0.99999)]) == (12, 24, 20, 40)


def test_colours_are_drawn_in_their_ranges():
    (draw_colours,) = lifted("transfer_seg.py", "draw_colours")
    drawn = [draw_colours(common.generator(i)) for i in range(4000)]
    for name, low, high in (
        ("brightness", -32, 32),
        ("contrast", 0.5, 1.5),
        ("saturation", 0.5, 1.5),
        ("hue", -18, 17),
    ):
        values = [d[name] for d in drawn if d[name] is not None]
        assert len(values) / 4000 == pytest.approx(0.5, abs=0.04), name
        assert low <= min(values) < low + 0.02 * (high - low) and high - 0.02 * (high - low) < max(values) <= high
        assert np.mean(values) == pytest.approx((low + high) / 2, abs=0.05 * (high - low))
    assert {d["hue"] for d in drawn} == {None, *range(-18, 18)}
    assert np.mean([d["contrast_first"] for d in drawn]) == pytest.approx(0.5, abs=0.04)
    both = [d["brightness"] is None and d["hue"] is None for d in drawn]
    assert np.mean(both) == pytest.approx(0.25, abs=0.03)  # coins of their own
    together = [(d["contrast"], d["saturation"]) for d in drawn if None not in (d["contrast"], d["saturation"])]
    assert abs(np.corrcoef(np.array(together).T)[0, 1]) < 0.1


NEUTRAL = dict(brightness=None, contrast=None, saturation=None, hue=None, contrast_first=True)


def test_distortion_is_opencvs():
    cv2 = pytest.importorskip("cv2")
    (distort,) = lifted_with_ignored("distort")
    rng = np.random.default_rng(0)
    image = np.asarray(Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((64, 64), Image.BICUBIC))

    def convert(x, alpha=1.0, beta=0.0):
        return np.clip(x.astype(np.float32) * alpha + beta, 0, 255).astype(np.uint8)

    def in_hsv(x, change):
        hsv = cv2.cvtColor(x, cv2.COLOR_RGB2HSV)
        return cv2.cvtColor(change(hsv), cv2.COLOR_HSV2RGB)

    def saturate(hsv):
        hsv[..., 1] = convert(hsv[..., 1], 0.6)
        return hsv

    def turn(hsv):
        hsv[..., 0] = (hsv[..., 0].astype(int) - 15) % 180
        return hsv

    assert (distort(image, **NEUTRAL) == image).all()
    assert (distort(image, **NEUTRAL | dict(brightness=25.3)) == convert(image, 1, 25.3)).all()
    assert (distort(image, **NEUTRAL | dict(brightness=-31.9)) == convert(image, 1, -31.9)).all()
    assert (distort(image, **NEUTRAL | dict(contrast=1.4)) == convert(image, 1.4)).all()
    for ours, theirs in (
        (dict(saturation=0.6), in_hsv(image, saturate)),
        (dict(hue=-15), in_hsv(image, turn)),
        (dict(saturation=0.6, hue=-15), in_hsv(in_hsv(image, saturate), turn)),
    ):
        difference = np.abs(distort(image, **NEUTRAL | ours).astype(int) - theirs.astype(int))
        assert difference.max() <= 12 and difference.mean() < 2.5  # hue in 256 and in 180 steps
    first = distort(image, 10.0, 1.4, 0.6, -15, True)
    last = distort(image, 10.0, 1.4, 0.6, -15, False)
    for found, order in ((first, True), (last, False)):
        x = convert(image, 1, 10)
        x = convert(x, 1.4) if order else x
        x = in_hsv(in_hsv(x, saturate), turn)
        x = x if order else convert(x, 1.4)
        assert np.abs(found.astype(int) - x.astype(int)).mean() < 3
    assert (first != last).any()


class Painted:
    """Images whose red channel is 80 times their label, one with an odd size that is smaller than the crop."""

    title, classes, palette = "painted", ["a", "b", "c"], seg.voc_palette()

    def __init__(self, sizes=((60, 80), (20, 30)), broken=()):
        self.sizes, self.broken = sizes, broken

    def __len__(self):
        return len(self.sizes)

    def name(self, index):
        return f"image {index}"

    def fingerprint(self):
        return "painted"

    def read(self, index):
        if index in self.broken:
            raise OSError("broken")
        height, width = self.sizes[index]
        labels = np.zeros((height, width), np.uint8)
        labels[:, width // 3 :] = 1
        labels[height // 2 :, width // 2 :] = 2
        image = np.zeros((height, width, 3), np.uint8)
        image[..., 0], image[..., 1], image[..., 2] = 80 * labels, 40, 120
        return Image.fromarray(image), labels


@pytest.fixture
def plain_colours(monkeypatch):
    monkeypatch.setattr(seg, "draw_colours", lambda rng: NEUTRAL)


def red(image):
    """The red channel of a normalised image, as bytes."""
    return (image[0] * 0.229 + 0.485) * 255


def test_labels_follow_their_image(plain_colours):
    args = settings(*TINY)
    images = seg.TrainingImages(Painted(), args, 0)
    scales, flips = [], 0
    for epoch in range(40):
        image, labels, index, passed = images[epoch, 0]
        assert image.shape == (3, 48, 48) and labels.shape == (48, 48) and (index, passed) == (0, 0)
        known = labels != 255
        assert (((red(image) - 80 * labels.float()).abs() < 1) | ~known).float().mean() > 0.85  # all but edges
        assert (image[:, ~known] == 0).all()  # padding: after normalisation
        inside = known.any(1), known.any(0)
        assert known.sum() == inside[0].sum() * inside[1].sum()
        assert known[0, 0]  # padded below and on the right
        scales.append((inside[0].sum().item(), inside[1].sum().item()))
        row = labels[0][: scales[-1][1]].tolist()
        flips += row != sorted(row)
    assert min(scales)[0] < 25 and max(scales)[0] == 48  # 40 x .5 = 20 rows or more
    assert 8 < flips < 32


def test_scale_is_uniform_between_a_half_and_two(monkeypatch, plain_colours):
    seen = []
    original = seg.resized
    monkeypatch.setattr(seg, "resized", lambda h, w, *box: seen.append(box) or original(h, w, *box))
    images = seg.TrainingImages(Painted(), settings(*TINY), 0)
    for epoch in range(200):
        images[epoch, 0]
    ratios = np.array([box[1] / 40 for box in seen])
    assert 0.5 <= ratios.min() < 0.53 and 1.95 < ratios.max() < 2 and ratios.mean() == pytest.approx(1.25, abs=0.08)
    assert all(box[0] == pytest.approx(4 * box[1]) for box in seen)


def test_draws_depend_on_seed_epoch_and_index_alone():
    args = settings(*TINY)
    images = seg.TrainingImages(Painted(((60, 80), (60, 80))), args, 0)
    first = images[3, 1]
    images[0, 0], torch.manual_seed(9)
    for x, y in zip(first, images[3, 1], strict=True):
        assert torch.equal(torch.as_tensor(x), torch.as_tensor(y))
    others = [images[3, 0][0], images[4, 1][0], seg.TrainingImages(images.data, args, 1)[3, 1][0]]
    assert not any(torch.equal(first[0], other) for other in others)


def test_an_unreadable_image_is_replaced_by_its_neighbour():
    images = seg.TrainingImages(Painted(((60, 80),) * 3, broken=(0, 1)), settings(*TINY), 0)
    _, labels, index, passed = images[0, 0]
    assert (index, passed) == (0, 2) and (labels != 255).any()
    images.data.broken = (0, 1, 2)
    image, labels, _, passed = images[0, 0]
    assert passed == harness.images.TRIES and (labels == 255).all() and image.shape == (3, 48, 48)


# --------------------------------------------------------------------------------------------------------- data sets


def write_mask(path, values, mode=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(values, np.uint8))
    if mode == "P":
        image.putpalette(seg.voc_palette().flatten().tolist())
    image.save(path)


def write_image(path, size=(8, 6)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (10, 20, 30)).save(path)


def squares(*values):
    """A mask (6, 8) whose columns hold these values, from the left."""
    return np.repeat(np.resize(values, 8)[None], 6, 0)


def write_voc(root):
    voc, sbd = root / "VOC2012", root / "benchmark_RELEASE" / "dataset"
    lists = {"train": ["2007_1", "2008_2"], "val": ["2009_3"]}
    for part, names in lists.items():
        (voc / "ImageSets" / "Segmentation").mkdir(parents=True, exist_ok=True)
        (voc / "ImageSets" / "Segmentation" / f"{part}.txt").write_text("\n".join(names) + "\n")
        for name in names:
            write_mask(voc / "SegmentationClass" / f"{name}.png", squares(0, 255, 20), "P")
    sets = {"train": ["2008_2", "2010_4", "2009_3"], "val": ["2011_5", "2007_1"]}  # 3 is VOC's val, 1 and 2 its train
    for part, names in sets.items():
        (sbd / "cls").mkdir(parents=True, exist_ok=True)
        (sbd / f"{part}.txt").write_text("\n".join(names) + "\n")
        for name in names:
            record = np.zeros((1,), [("Categories", "O"), ("Segmentation", "O"), ("Boundaries", "O")])
            record["Segmentation"][0] = squares(0, 7, 15).astype(np.uint8)
            scipy.io.savemat(sbd / "cls" / f"{name}.mat", {"GTcls": record})
    for i, year in enumerate((2007, 2008, 2009, 2010, 2011), 1):
        write_image(voc / "JPEGImages" / f"{year}_{i}.jpg")
        write_image(sbd / "img" / f"{year}_{i}.jpg")


@pytest.mark.parametrize("inner", ["", "VOCdevkit"])
def test_voc_reader(inner, tmp_path):
    write_voc(tmp_path / inner)
    if inner:
        (tmp_path / inner / "benchmark_RELEASE").rename(tmp_path / "benchmark_RELEASE")
    train, val = open_both(settings("--task", "voc", "--data", tmp_path))
    names = [train.name(i) for i in range(len(train))]
    assert names == [f"VOC2012/JPEGImages/{n}.jpg" for n in ("2007_1", "2008_2", "2010_4", "2011_5")]
    assert [val.name(i) for i in range(len(val))] == ["VOC2012/JPEGImages/2009_3.jpg"]
    assert len(train.classes) == 21 and train.classes[20] == "tvmonitor" and train.classes[0] == "background"
    for index, values in ((0, (0, 255, 20)), (1, (0, 255, 20)), (2, (0, 7, 15)), (3, (0, 7, 15))):
        image, labels = train.read(index)
        assert image.size == (8, 6) and labels.dtype == np.uint8 and (labels == squares(*values)).all()
    assert train.palette[:3].tolist() == [[0, 0, 0], [128, 0, 0], [0, 128, 0]]
    assert train.palette[20].tolist() == [0, 64, 128] and train.palette[255].tolist() == [224, 224, 192]
    with Image.open(train.root + "/VOC2012/SegmentationClass/2007_1.png") as mask:
        assert mask.mode == "P"


def test_voc_wants_sbd(tmp_path):
    write_voc(tmp_path)
    args = settings("--task", "voc", "--data", tmp_path)
    (tmp_path / "benchmark_RELEASE" / "dataset" / "cls" / "2010_4.mat").unlink()
    with pytest.raises(common.UserError, match=r"1 of its 8 files are not there.*2010_4.mat.*SBD's benchmark_RELEASE"):
        open_both(args)
    (tmp_path / "benchmark_RELEASE").rename(tmp_path / "elsewhere")
    with pytest.raises(common.UserError, match=r"benchmark_RELEASE/dataset/train.txt: no such file; --data must be"):
        open_both(args)


CITYSCAPES_ID = {0: 7, 1: 8, 2: 11, 3: 12, 4: 13, 5: 17, 6: 19, 7: 20, 8: 21, 9: 22, 10: 23, 11: 24, 12: 25, 13: 26,
                 14: 27, 15: 28, 16: 31, 17: 32, 18: 33}  # fmt: skip


def test_cityscapes_reader(tmp_path):
    for split, city, kinds in (("train", "aachen", ["labelTrainIds"]), ("train", "bonn", ["labelIds"]),
                               ("val", "ulm", ["labelIds", "labelTrainIds"])):  # fmt: skip
        stem = f"{city}_000000_000019"
        write_image(tmp_path / "leftImg8bit" / split / city / f"{stem}_leftImg8bit.png", (19, 6))
        train_ids = np.repeat(np.arange(19)[None], 6, 0)
        for kind in kinds:
            values = train_ids if kind == "labelTrainIds" else np.vectorize(CITYSCAPES_ID.get)(train_ids)
            values[0, :5] = 255 if kind == "labelTrainIds" else [0, 6, 9, 29, 30]
            write_mask(tmp_path / "gtFine" / split / city / f"{stem}_gtFine_{kind}.png", values)
    train, val = open_both(settings("--task", "cityscapes", "--data", tmp_path))
    wanted = np.repeat(np.arange(19)[None], 6, 0)
    wanted[0, :5] = 255
    assert len(train) == 2 and len(val) == 1
    for data in (train, val):
        for i in range(len(data)):
            assert (data.read(i)[1] == wanted).all()
    assert val.pairs[0][1].endswith("labelTrainIds.png")
    assert train.classes[:3] == ["road", "sidewalk", "building"] and train.classes[18] == "bicycle"
    assert train.palette[0].tolist() == [128, 64, 128] and train.palette[13].tolist() == [0, 0, 142]
    (tmp_path / "gtFine/val/ulm/ulm_000000_000019_gtFine_labelTrainIds.png").unlink()
    (tmp_path / "gtFine/val/ulm/ulm_000000_000019_gtFine_labelIds.png").unlink()
    with pytest.raises(common.UserError, match="not there, for instance .*gtFine_labelIds.png.*gtFine/"):
        open_both(settings("--task", "cityscapes", "--data", tmp_path))


def test_a_folder_that_is_no_data_set_is_refused_with_the_layout(tmp_path):
    for task, word in (("voc", "SegmentationClass"), ("cityscapes", "leftImg8bit"), ("ade20k", "ADEChallengeData2016")):
        with pytest.raises(common.UserError, match=word):
            open_both(settings("--task", task, "--data", tmp_path))
        with pytest.raises(common.UserError, match=f"no such folder.*{word}"):
            open_both(settings("--task", task, "--data", tmp_path / "missing"))


def test_ade20k_reader(tmp_path):
    root = tmp_path / "ADEChallengeData2016"
    for split, name in (("training", "ADE_train_00000001"), ("validation", "ADE_val_00000001")):
        write_image(root / "images" / split / f"{name}.jpg")
        write_mask(root / "annotations" / split / f"{name}.png", squares(0, 1, 150, 255))
    for folder in (tmp_path, root):
        train, val = open_both(settings("--task", "ade20k", "--data", folder))
        assert (train.read(0)[1] == squares(255, 0, 149, 255)).all() and (val.read(0)[1] == train.read(0)[1]).all()
    assert (
        len(train.classes) == len(set(train.classes)) == 150
        and train.classes[0] == "wall"
        and train.classes[149] == "flag"
    )
    assert len(seg.ADE20K_COLOURS) == 150 and train.palette[0].tolist() == [120, 120, 120]
    write_mask(root / "annotations" / "validation" / "ADE_val_00000001.png", squares(0, 151))
    with pytest.raises(OSError, match="the value 151, which is no class"):
        val.read(0)


def test_colours_are_distinct():
    assert len({tuple(c) for c in seg.voc_palette().tolist()}) == 256
    assert len({colour for _, colour in seg.CITYSCAPES.values()}) == 19
    assert len(set(seg.ADE20K_COLOURS)) == 149  # road and skyscraper are both grey


def custom(tmp_path, *flags, images="images", masks="masks"):
    return open_both(settings("--task", "custom", "--images", tmp_path / images, "--masks", tmp_path / masks, *flags))


@pytest.fixture
def own(tmp_path):
    """Ten images with masks of classes 0, 1, 2 and void 11, in subfolders, one image without a mask."""
    for i in range(10):
        write_image(tmp_path / "images" / f"{i % 2}" / f"photo{i}.jpg")
        write_mask(tmp_path / "masks" / f"{i % 2}" / f"photo{i}.png", squares(0, 1, 2, 11, 255))
    write_image(tmp_path / "images" / "lonely.jpg")
    return tmp_path


def test_custom_masks(own, capsys):
    train, val = custom(own, "--ignore", 11)
    printed = capsys.readouterr().out
    assert "1 of 11 images" in printed and "2 of 10 images are held out" in printed
    assert (len(train), len(val)) == (8, 2) and train.classes == ["0", "1", "2"]
    names = {data.name(i) for data in (train, val) for i in range(len(data))}
    assert len(names) == 10
    assert (train.read(0)[1] == squares(0, 1, 2, 255, 255)).all()
    again, _ = custom(own, "--ignore", 11, "--classes", "sky", "road", "car")
    assert again.fingerprint() == train.fingerprint() and again.classes == ["sky", "road", "car"]
    shifted, _ = custom(own, "--ignore", 0)  # as ADE20K: 1 becomes 0, ..., and 11 the tenth
    assert (shifted.read(0)[1] == squares(255, 0, 1, 10, 255)).all() and shifted.classes[0] == "1"
    assert len(shifted.classes) == 11


def test_custom_masks_of_both_kinds_of_folders(own):
    both = custom(
        own,
        "--val-images",
        own / "images" / "1",
        "--val-masks",
        own / "masks" / "1",
        images="images/0",
        masks="masks/0",
    )
    for kind in ("images", "masks"):
        (own / kind / "0").rename(own / kind / "train")
        (own / kind / "1").rename(own / kind / "val")
    other = custom(own)
    assert [len(d) for d in both] == [len(d) for d in other] == [5, 5]
    with pytest.raises(common.UserError, match="go together"):
        custom(own, "--val-images", own)


def test_custom_masks_beside_their_images(tmp_path):
    for i in range(5):
        write_image(tmp_path / "all" / f"{i}.jpg")
        write_mask(tmp_path / "all" / f"{i}.png", squares(0, 1))
    train, val = custom(tmp_path, images="all", masks="all")
    assert len(train) == 4 and train.name(0).endswith(".jpg") and (train.read(0)[1] == squares(0, 1)).all()


def test_custom_masks_bring_their_palette(tmp_path):
    for i in range(5):
        write_image(tmp_path / "images" / f"{i}.jpg")
        image = Image.fromarray(squares(1, 2).astype(np.uint8))
        image.putpalette([9, 9, 9, 1, 2, 3, 250, 0, 7])
        (tmp_path / "masks").mkdir(exist_ok=True)
        image.save(tmp_path / "masks" / f"{i}.png")
    train, _ = custom(tmp_path, "--ignore", 0)
    assert train.palette[:2].tolist() == [[1, 2, 3], [250, 0, 7]]


@pytest.mark.parametrize(
    "values, flags, complaint",
    [
        ((0, 1, 2, 11), ["--classes", "a", "b", "c"], r"\[11\] beyond the 3 classes.*--ignore"),
        ((0, 255), [], "a single class"),
        ((0, 11), ["--ignore", "11"], "a single class"),
    ],
)
def test_custom_masks_of_strange_values_are_refused(values, flags, complaint, tmp_path):
    for i in range(5):
        write_image(tmp_path / "images" / f"{i}.jpg")
        write_mask(tmp_path / "masks" / f"{i}.png", squares(*values))
    with pytest.raises(common.UserError, match=complaint):
        custom(tmp_path, *flags)


def test_custom_masks_that_do_not_fit_are_refused(tmp_path):
    for i in range(5):
        write_image(tmp_path / "images" / f"{i}.jpg")
        write_image(tmp_path / "masks" / f"{i}.png")
    with pytest.raises(common.UserError, match="5 masks cannot be used.*RGB: a mask has one channel"):
        custom(tmp_path)
    for i in range(5):
        write_mask(tmp_path / "masks" / f"{i}.png", squares(0, 1)[:4])
    with pytest.raises(common.UserError, match=r"\(8, 4\) pixels, its image \(8, 6\)"):
        custom(tmp_path)
    write_mask(tmp_path / "masks" / "other.png", squares(0, 1))
    with pytest.raises(common.UserError, match="1 have no image of the same name.*other.png"):
        custom(tmp_path)
    with pytest.raises(common.UserError, match="no such folder"):
        custom(tmp_path, masks="nothing")
    (tmp_path / "jpegs").mkdir()
    write_image(tmp_path / "jpegs" / "0.jpg")
    with pytest.raises(common.UserError, match="no PNG"):
        custom(tmp_path, masks="jpegs")


def test_masks_of_every_depth(tmp_path):
    wide = np.array([[0, 1], [2, 255]])
    for mode, image in (
        ("L", Image.fromarray(wide.astype(np.uint8))),
        ("I;16", Image.fromarray(wide.astype(np.uint16))),
        ("1", Image.fromarray(np.array([[True, False], [False, True]]))),
    ):
        image.save(tmp_path / "m.png")
        wanted = wide if mode != "1" else [[1, 0], [0, 1]]
        assert (seg.read_mask(str(tmp_path / "m.png")) == wanted).all(), mode
    Image.fromarray(np.array([[0, 300]], np.uint16)).save(tmp_path / "m.png")
    with pytest.raises(OSError, match="from 0 to 300"):
        seg.read_mask(str(tmp_path / "m.png"))
    for name in ("m.png", "m.mat"):
        (tmp_path / name).write_bytes(b"no mask at all")
        with pytest.raises(OSError):
            seg.read_mask(str(tmp_path / name))


def test_scenes_that_are_evaluated_were_not_seen():
    train, val = open_both(settings("--demo", "--data", "scenes:64"))
    assert len(train) == 64 and len(val) == 16 and val.name(0) == "scene 64"
    assert train.classes[0] == "background" and len(train.classes) == 11
    image, labels = train.read(0)
    assert image.size == (136, 136) and labels.shape == (136, 136) and labels.max() <= 10


# ------------------------------------------------------------------------------------------------------ command line


@pytest.mark.parametrize(
    "flags, complaint",
    [
        ("", "give --task"),
        ("--task voc", "wants --data: a folder with VOC2012"),
        ("--task custom --images x", "wants --masks"),
        ("--task voc --data x --images y", "--images has no meaning for --task voc"),
        ("--task custom --images x --masks y --data z", "--data has no meaning"),
        ("--task voc --data x --crop 16", "--crop 16x16: must be at least 32"),
        ("--task voc --data x --resize 512x2048", "the limit of the long side comes first"),
        ("--task voc --data x --batch-size 0", "must be at least 1"),
        ("--task custom --images x --masks y --ignore 300", "between 0 and 255"),
        ("--eval-only --output-dir nowhere", "nowhere/checkpoint.pth: no such file"),
    ],
)
def test_bad_flags_are_refused_in_one_line(flags, complaint, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(common.UserError, match=complaint):
        seg.get_args(flags.split())


@pytest.mark.parametrize("text", ["0x", "a", "1x2x3"])
def test_sizes_that_are_none(text):
    with pytest.raises(SystemExit):
        settings("--task", "voc", "--data", "x", "--crop", text)


def test_cityscapes_has_two_protocols():
    whole = settings("--task", "cityscapes", "--data", "x", "--crop", "512x1024")
    slide = settings("--task", "cityscapes", "--data", "x", "--crop", "769")
    assert (whole.crop, whole.resize, whole.test, whole.align_corners) == ([512, 1024], [2048, 1024], "whole", False)
    assert (slide.crop, slide.resize, slide.test, slide.align_corners) == ([769, 769], [2049, 1025], "slide", True)
    assert seg.protocol_name(whole) == "Cityscapes, FCN R50-D8, crop 512x1024, test whole"
    assert seg.protocol_name(slide) == "Cityscapes, FCN R50-D8, crop 769x769, test slide"
    other = settings("--task", "cityscapes", "--data", "x", "--crop", "256x512", "--batch-size", 4)
    assert seg.protocol_name(other).endswith("test slide; changed: batch_size 4, crop 256x512")


# ------------------------------------------------------------------------------------------------------ as users do


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of sixteen steps, and its folder."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    seg.main([*TINY, "--iterations", "8", "--output-dir", str(folder)])
    return folder


def test_a_run_leaves_what_it_promises(finished):
    names = {path.name for path in finished.iterdir()}
    assert names == {"checkpoint.pth", "segmenter.pth", "log.jsonl", "results.jsonl", "predictions.png", "curves.png"}
    lines = log_lines(finished)
    assert [line["step"] for line in lines if "loss" in line] == [*range(2, 17, 2)]
    assert lines[-1]["result"]["step"] == 16 and lines[1]["lr"] == pytest.approx(seg.learning_rate(1, 1e-4, 1e-6, 16))
    (result,) = [json.loads(line) for line in (finished / "results.jsonl").read_text().splitlines()]
    assert (
        result == lines[-1]["result"]
        and max(list(result["IoU_by_class"].values())[1:]) > 1
        and 0 < result["accuracy"] <= 100
    )
    model = seg.Segmenter("resnet18", 11, False, False)
    model.load_state_dict(torch.load(finished / "segmenter.pth"))
    assert "backbone.layer4.1.conv2.weight" in model.state_dict()
    backbone, _ = harness.weights.load_backbone(str(finished / "segmenter.pth"), "resnet18")
    assert backbone["conv1.weight"].shape == (64, 3, 7, 7)
    with Image.open(finished / "predictions.png") as picture:
        assert picture.width == 6 * (400 + 10)


def test_evaluation_alone_says_the_same(finished, capsys):
    (result,) = [json.loads(line) for line in (finished / "results.jsonl").read_text().splitlines()]
    seg.main(["--eval-only", "--output-dir", str(finished), "--workers", "0"])
    again = json.loads((finished / "evaluation.json").read_text())
    assert {k: again[k] for k in ("mIoU", "accuracy", "IoU_by_class", "step")} == {
        k: result[k] for k in ("mIoU", "accuracy", "IoU_by_class", "step")
    }
    assert f"mIoU {result['mIoU']:.2f}" in capsys.readouterr().out
    seg.main(["--eval-only", "--output-dir", str(finished), "--workers", "0", "--test", "slide"])
    assert json.loads((finished / "evaluation.json").read_text())["protocol"].endswith("test slide")


def test_the_result_is_what_the_pieces_say(finished):
    """Image by image, without loader, batches or processes."""
    (result,) = [json.loads(line) for line in (finished / "results.jsonl").read_text().splitlines()]
    args = settings(*TINY)
    _, val = open_both(args)
    model = seg.Segmenter("resnet18", 11, False, False).eval()
    model.load_state_dict(torch.load(finished / "segmenter.pth"))
    matrix = np.zeros((11, 11), np.int64)
    for i in range(len(val)):
        image, labels = val.read(i)
        pixels = seg.resize_image(torch.from_numpy(np.array(image)).permute(2, 0, 1), (40, 40))[None]
        mean, std = torch.tensor(common.PIXEL_MEAN).view(3, 1, 1), torch.tensor(common.PIXEL_STD).view(3, 1, 1)
        with torch.no_grad():
            logits = F.interpolate(model((pixels / 255 - mean) / std), (136, 136), mode="bilinear")
        np.add.at(matrix, (labels, logits.argmax(1)[0].numpy()), 1)
    assert seg.scores(matrix, val.classes)["accuracy"] == pytest.approx(result["accuracy"], abs=0.01)
    assert seg.scores(matrix, val.classes)["mIoU"] == pytest.approx(result["mIoU"], abs=0.01)


def test_a_finished_run_says_so_and_another_one_is_refused(finished, capsys):
    seg.main([*TINY, "--iterations", "8", "--output-dir", str(finished)])
    assert "finished, at step 16" in capsys.readouterr().out
    for flags, name in (
        (["--lr", "0.5"], "lr"),
        (["--data", "scenes:32"], "files"),
        (["--linear-probe"], "linear_probe"),
    ):
        with pytest.raises(common.UserError, match=f"{name} .* ->"):
            seg.main([*TINY, "--iterations", "8", "--output-dir", str(finished), *flags])


def test_predictions_are_masks_in_colours(finished, tmp_path, capsys):
    write_image(tmp_path / "photos" / "a" / "odd.jpg", (131, 77))
    write_image(tmp_path / "photos" / "thin.png", (300, 3))
    (tmp_path / "photos" / "broken.jpg").write_bytes(b"nothing")
    seg.main(["--predict", str(tmp_path / "photos"), "--output-dir", str(finished), "--workers", "0"])
    assert "unreadable, passed over: broken.jpg" in capsys.readouterr().out
    folder = finished / "predictions"
    classes = json.loads((folder / "classes.json").read_text())
    assert [c["value"] for c in classes] == list(range(11)) and classes[1]["name"] == "fish"
    for name, size in (("a/odd.jpg.png", (131, 77)), ("thin.png.png", (300, 3))):
        with Image.open(folder / "masks" / name) as mask:
            assert mask.mode == "P" and mask.size == size and np.asarray(mask).max() < 11
            assert mask.getpalette()[3:6] == classes[1]["colour"]
        with Image.open(folder / "pictures" / name) as picture:
            assert picture.mode == "RGB" and picture.width >= size[0]


def test_pictures_are_drawn_in_the_palette():
    image = Image.new("RGB", (60, 40), (1, 2, 3))
    labels = np.zeros((40, 60), np.uint8)
    labels[10:20, 10:20] = 2
    labels[:5] = 255
    palette = seg.voc_palette()
    sheet = np.asarray(seg.draw(image, [labels], ["a", "b", "c"], palette))
    assert sheet[20, 30].tolist() == [1, 2, 3]
    panel = sheet[45:85, :60]
    for place, k in (((15, 15), 2), ((30, 30), 0), ((2, 30), 255)):
        assert panel[place].tolist() == palette[k].tolist()


def test_trials_and_their_deviation(tmp_path, capsys):
    flags = [*TINY, "--iterations", "2", "--trials", "2", "--seed", "3", "--output-dir", str(tmp_path)]
    seg.main(flags)
    results = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [r["seed"] for r in results] == [3, 4] and (tmp_path / "seed4" / "checkpoint.pth").exists()
    values = [r["accuracy"] for r in results]
    assert values[0] != values[1]
    mean, deviation = sum(values) / 2, abs(values[0] - values[1]) / math.sqrt(2)
    assert "2 trials: mIoU" in capsys.readouterr().out
    assert f"accuracy {mean:.2f} +- {deviation:.2f}" in seg.spread(results)


def test_corrupt_images_are_named_once_and_too_many_stop_the_run(tmp_path, capsys):
    for i in range(12):
        write_image(tmp_path / "images" / f"{i:02}.png", (60, 50))
        write_mask(tmp_path / "masks" / f"{i:02}.png", np.repeat(np.arange(60)[None] // 20, 50, 0))
    flags = "--task custom --arch resnet18 --batch-size 2 --crop 48 --resize 160x40 --workers 0 --iterations 1".split()
    flags += ["--images", tmp_path / "images", "--masks", tmp_path / "masks"]
    flags = [*map(str, flags), "--val-images", str(tmp_path / "images"), "--val-masks", str(tmp_path / "masks")]
    (tmp_path / "images" / "03.png").write_bytes((tmp_path / "images" / "03.png").read_bytes()[:60])
    seg.main([*flags, "--output-dir", str(tmp_path / "run")])
    printed = capsys.readouterr().out
    assert printed.count("another one takes its place") == 1 and "03.png" in printed
    assert "cannot be read, not counted" in printed
    assert checkpoint(tmp_path / "run")["bad_images"] == [3]
    (tmp_path / "images" / "05.png").write_bytes((tmp_path / "images" / "05.png").read_bytes()[:60])
    with pytest.raises(common.UserError, match="2 of 12 images cannot be read|2 masks cannot be used"):
        seg.main([*flags, "--output-dir", str(tmp_path / "run2")])


def test_another_set_is_evaluated_without_the_training_data(own, capsys):
    flags = "--arch resnet18 --batch-size 2 --crop 48 --resize 160x40 --iterations 1 --lr 1e-5 --workers 0".split()
    flags += ["--task", "custom", "--images", str(own / "images"), "--masks", str(own / "masks"), "--ignore", "11"]
    seg.main([*flags, "--output-dir", str(own / "run")])
    for kind in ("images", "masks"):
        (own / kind / "0").rename(own / f"new {kind}")
        (own / kind).rename(own / f"gone {kind}")
    other = ["--eval-only", "--output-dir", str(own / "run"), "--workers", "0"]
    new = ["--val-images", str(own / "new images"), "--val-masks", str(own / "new masks")]
    seg.main([*other, *new])
    assert json.loads((own / "run" / "evaluation.json").read_text())["IoU_by_class"].keys() <= {"0", "1", "2"}
    write_mask(own / "new masks" / "photo0.png", squares(0, 1, 3))
    with pytest.raises(common.UserError, match=r"\[3\] beyond the 3 classes"):
        seg.main([*other, *new])
    with pytest.raises(common.UserError, match="--task scenes: the segmenter in .* was made with another"):
        seg.main([*other, "--task", "scenes"])


def test_a_batch_that_is_larger_than_the_data(tmp_path):
    with pytest.raises(common.UserError, match="16 images to train on: --batch-size must be at most that"):
        seg.main([*TINY, "--batch-size", "32", "--output-dir", str(tmp_path / "run")])


def test_protocol_is_printed_without_data(capsys):
    seg.main(["--task", "voc", "--arch", "resnet18", "--steps", "0"])
    printed = capsys.readouterr().out
    assert "dilations [1, 2, 2, 2] in C4, [2, 4, 4, 4] in C5" in printed and "0.01 at 0" in printed


def test_workers_and_resuming_change_nothing(tmp_path):
    flags = [*TINY, "--iterations", "3", "--print-freq", "1"]
    seg.main([*flags, "--output-dir", str(tmp_path / "straight")])
    seg.main([*flags, "--output-dir", str(tmp_path / "halved"), "--steps", "3", "--workers", "2"])
    assert checkpoint(tmp_path / "halved")["step"] == 3
    seg.main([*flags, "--output-dir", str(tmp_path / "halved")])
    straight, halved = checkpoint(tmp_path / "straight"), checkpoint(tmp_path / "halved")
    for name in ("model", "optimizer", "step"):
        assert_same(halved[name], straight[name])
    losses = [[line["loss"] for line in log_lines(tmp_path / d) if "loss" in line] for d in ("straight", "halved")]
    assert losses[0] == losses[1]


def test_the_probe_as_a_run(tmp_path):
    flags = [*TINY, "--iterations", "2", "--linear-probe", "--output-dir", str(tmp_path)]
    seg.main(flags)
    (result,) = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert "linear probe R18-D8" in result["protocol"]
    with common.drawing("model", 0):
        fresh = seg.build_segmenter(settings(*TINY, "--linear-probe"), 11)[0]
    assert_same(
        {k: v for k, v in checkpoint(tmp_path)["model"].items() if k.startswith("backbone.")},
        {k: v for k, v in fresh.state_dict().items() if k.startswith("backbone.")},
    )
    seg.main(["--eval-only", "--output-dir", str(tmp_path), "--workers", "0"])
    assert json.loads((tmp_path / "evaluation.json").read_text())["mIoU"] == result["mIoU"]


# -------------------------------------------------------------------------------------------------------------- slow


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_run_ends_as_one_that_was_not(number, tmp_path, finished):
    flags = [*TINY, "--iterations", "8", "--save-every", "3", "--output-dir", str(tmp_path / "run")]
    code, _ = signal_after("transfer_seg.py", *flags, line=4, number=number)
    assert code == (0 if number == signal.SIGTERM else -9)
    assert 0 < checkpoint(tmp_path / "run")["step"] < 16
    assert "continued from step" in run("transfer_seg.py", *flags)
    straight, resumed = checkpoint(finished), checkpoint(tmp_path / "run")
    assert_same(resumed["model"], straight["model"])
    assert_same(resumed["optimizer"], straight["optimizer"])
    assert (tmp_path / "run" / "results.jsonl").read_text() == (finished / "results.jsonl").read_text()


@pytest.mark.slow
def test_two_processes(tmp_path):
    flags = [*TINY, "--iterations", "4", "--output-dir", str(tmp_path)]
    printed = run("transfer_seg.py", *flags, processes=2, env={"OMP_NUM_THREADS": "1"})
    assert "batch 4 = 2 x 2 on cpu" in printed and printed.count("mIoU") == 1
    (result,) = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    seg.main(["--eval-only", "--output-dir", str(tmp_path), "--workers", "0"])
    alone = json.loads((tmp_path / "evaluation.json").read_text())
    assert alone["IoU_by_class"] == pytest.approx(result["IoU_by_class"], abs=0.05)


def near_scenes(count, side=80):
    """Windows around the largest object of large scenes: at stride 8 no network could draw the thin parts of small ones.
    Classes on less than a sixteenth of a window are ignored."""
    pixels, labels = [], []
    for number in range(count):
        scene = make_scene(0, number, 260)
        x0, y0, x1, y1 = scene["boxes"][scene["masks"].sum((1, 2)).argmax()]
        left, top = (int(np.clip((a + b - side) / 2, 0, 260 - side)) for a, b in ((x0, x1), (y0, y1)))
        window = slice(top, top + side), slice(left, left + side)
        inside = torch.from_numpy(scene["semantic"][window].copy()).long()
        for k in inside.unique().tolist():
            if (inside == k).sum() < side**2 / 16:
                inside[inside == k] = 255
        pixels.append(seg.to_tensor(scene["image"][window]))
        labels.append(inside)
    return common.normalise(torch.stack(pixels)), torch.stack(labels)


@pytest.mark.slow
def test_eight_scenes_are_learnt_by_heart():
    """Over-fit: evaluated on what it was trained on, mIoU above 0.9."""
    pixels, labels = near_scenes(8)
    torch.manual_seed(0)
    model = seg.Segmenter("resnet18", 11, False, False).to(memory_format=torch.channels_last).train()
    optimizer = seg.new_optimizer(model, 0.05, 0.0)
    for step in range(48):
        torch.manual_seed(step)
        optimizer.param_groups[0]["lr"] = seg.learning_rate(step, 0.05, 0.0005, 48)
        with torch.autocast("cpu", torch.bfloat16, enabled=harness.run.bf16_is_fast()):
            loss, _ = model(pixels, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        predicted = model.eval()(pixels).argmax(1)
    matrix = seg.confusion(predicted.numpy().astype(np.uint8), labels.numpy(), 11)
    found = seg.scores(matrix, list(map(str, range(11))))
    assert len(found["IoU_by_class"]) >= 7 and found["mIoU"] > 90


HEAD = "conv3 2048-512, norm, conv3 512-512, norm, conv3 2560-512, norm, dropout of channels 0.1, conv1 512-{}"
AUXILIARY = "conv3 1024-256, norm, dropout of channels 0.1, conv1 256-{}"
COMMON = {
    "learning rate": "0.01 at 0, 0.00540528 at {half}, 0.0001 at {iterations}",
    "weight decay": "0.0005 on 175 tensors, 114 of norms among them; momentum 0.9",
    "backbone": "resnet50, strides [1, 2, 1, 1], dilations [1, 2, 2, 2, 2, 2] in C4, [2, 4, 4] in C5",
    "loss": "cross-entropy over all pixels, 255 counts as 0; + 0.4 of the auxiliary head",
    "frozen": "nothing",
    "batch norms": "57 trained, 0 frozen",
}
PROTOCOLS = {
    "voc": ("--task voc", 16, 20000, 21, "VOC 2012 train_aug, FCN R50-D8, crop 512x512, test whole",
            "within 2048x512 times 0.5 to 2, crop 512x512, flip, colours", "within 2048x512, whole", "not "),
    "cityscapes 769": ("--task cityscapes", 8, 40000, 19, "Cityscapes, FCN R50-D8, crop 769x769, test slide",
                       "within 2049x1025 times 0.5 to 2, crop 769x769, flip, colours",
                       "within 2049x1025, windows of 769x769, 513x513 apart", ""),
    "cityscapes 512x1024": ("--task cityscapes --crop 512x1024", 8, 40000, 19, "Cityscapes, FCN R50-D8, crop 512x1024, test whole",
                            "within 2048x1024 times 0.5 to 2, crop 512x1024, flip, colours", "within 2048x1024, whole", "not "),
    "ade20k": ("--task ade20k", 16, 80000, 150, "ADE20K, FCN R50-D8, crop 512x512, test whole",
               "within 2048x512 times 0.5 to 2, crop 512x512, flip, colours", "within 2048x512, whole", "not "),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", PROTOCOLS)
def test_protocols_as_built_take_a_step(name):
    """The papers' numbers, written out, against the model at full size; and one step of it on one small crop."""
    flags, batch, iterations, classes, title, images, testing, aligned = PROTOCOLS[name]
    args = settings(*flags.split(), "--steps", 0)
    model, _ = seg.build_segmenter(args, classes)
    found = seg.protocol_table(args, model.train())
    wanted = {key: text.format(half=iterations // 2, iterations=iterations) for key, text in COMMON.items()}
    wanted |= {"protocol": title, "classes": str(classes), "batch": f"{batch} images", "iterations": str(iterations)}
    wanted |= {
        "head": HEAD.format(classes),
        "auxiliary": AUXILIARY.format(classes),
        "images": images,
        "testing": testing,
    }
    assert found == wanted | {"upsampling": f"bilinear, corners {aligned}aligned"}
    optimizer = seg.new_optimizer(model, seg.plan(args)["lr"], args.weight_decay)
    images = seg.TrainingImages(Painted(), args, 0)
    image, labels, _, _ = images[0, 0]
    assert image.shape == (3, *args.crop)
    x, y = torch.stack([image[:, :129, :129]] * 2), torch.stack([labels[:129, :129]] * 2).long()
    loss, values = model(x, y)
    loss.backward()
    before = model.head.classifier.weight.clone()
    optimizer.step()
    assert math.isfinite(loss.item()) and not torch.equal(model.head.classifier.weight, before)


@pytest.mark.slow
def test_the_probes_table():
    found = table("--task", "voc", "--linear-probe")
    assert (
        found["head"] == "norm without weights, conv1 2048-21"
        and found["auxiliary"] == "none"
        and found["frozen"] == "backbone"
    )
    assert found["batch norms"] == "1 trained, 53 frozen" and found["weight decay"].startswith(
        "0 on 2 tensors, 0 of norms"
    )
    assert found["protocol"] == "VOC 2012 train_aug, linear probe R50-D8, crop 512x512, test whole"
