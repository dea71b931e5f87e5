# SPDX-License-Identifier: MIT
"""transfer_seg.py against torchvision, OpenCV, slow loops, hand calculations. What all runs share: test_runs.py."""

import contextlib
import itertools
import json
import math

import numpy as np
import pytest
import scipy.io
import torch
import torch.nn.functional as F
import torchvision
from helpers import assert_same, checkpoint, log_lines
from PIL import Image
from tiny import TinyResNet
from torch import nn

import common
import transfer_seg as seg
from harness import run, scenes

pytestmark = pytest.mark.usefixtures("tiny_resnet", "quick")
# A complete job of a second. Its learning rate is so low that a network still predicts several classes.
TINY = "--task scenes --arch resnet18 --data scenes:8 --batch-size 4 --crop 48 --resize 160x40 --lr 2e-4 --iterations 2"


def settings(flags):
    return seg.get_args(f"{flags} --workers 0 --output-dir unused".split())[0]


def segmenter(align_corners=False, probe=False, classes=5):
    """A `Segmenter` from fixed random numbers. No branch of its ResNet starts at zero."""
    torch.manual_seed(0)
    model = seg.Segmenter("resnet18", classes, align_corners, probe)
    for name, weight in model.backbone.named_parameters():
        if name.endswith("bn2.weight"):
            nn.init.ones_(weight)
    return model


RNG = torch.Generator().manual_seed(1)
BATCH = torch.randn(2, 3, 48, 48, generator=RNG), torch.randint(0, 5, (2, 48, 48), generator=RNG)


@pytest.mark.parametrize("arch", ["resnet34", "resnet50"])
def test_every_fourth_cell_of_the_dilated_c5_is_the_old_c5(arch):
    torch.manual_seed(0)
    plain, dilated = common.ResNetTrunk(arch).eval(), seg.dilate(common.ResNetTrunk(arch)).eval()
    dilated.load_state_dict(plain.state_dict())
    with torch.no_grad():
        (*_, c4, c5), new = plain(x := torch.randn(1, 3, 96, 128)), dilated(x)
    assert [x.shape[-2:] for x in new] == [(24, 32), (12, 16), (12, 16), (12, 16)]  # output stride 8
    assert torch.allclose(new[2][..., ::2, ::2], c4, rtol=1e-4, atol=1e-5 * c4.abs().max())
    assert torch.allclose(new[3][..., ::4, ::4], c5, rtol=1e-4, atol=1e-5 * c5.abs().max())


def test_random_weights_start_as_in_mmsegmentation():
    """The last norm of each block at zero, so blocks start as identities; heads by fan-out, classifiers near zero."""
    torch.manual_seed(0)
    model = seg.Segmenter("resnet50", 21, False, False)
    assert all(x.any() == (".bn3." not in name) for name, x in model.backbone.named_parameters() if "weight" in name)
    assert model.head.classifier.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert not model.head.classifier.bias.any()
    assert model.head.concat[0].weight.std().item() == pytest.approx(math.sqrt(2 / (512 * 9)), rel=0.02)


def test_the_head_sees_its_input_beside_what_it_made_of_it():
    torch.manual_seed(0)
    head, x = seg.FCNHead(6, 4, 3, convs=2, concat=True), torch.randn(2, 6, 5, 7)
    dropped, y = head.dropout(torch.ones(9, 400, 3, 3)), x
    assert dropped.mean((2, 3)).unique().tolist() == pytest.approx([0, 1 / 0.9])  # whole channels, a tenth of them
    head.eval()
    for conv, norm, _ in head.convs:
        y = norm(F.conv2d(y, conv.weight, padding=1)).relu()
    y = head.concat[1](F.conv2d(torch.cat([x, y], 1), head.concat[0].weight, padding=1)).relu()
    assert torch.allclose(head(x), torch.einsum("kc,nchw->nkhw", head.classifier.weight[..., 0, 0], y), atol=1e-6)


@pytest.mark.parametrize("aligned", [False, True])
def test_logits_have_the_size_of_the_image_and_corners_as_asked(aligned):
    model, x = segmenter(aligned).eval(), torch.randn(1, 3, 48, 64)
    with torch.no_grad():
        small, large = model.head(model.backbone(x)[3]), model(x)
    assert small.shape == (1, 5, 6, 8) and large.shape == (1, 5, 48, 64) and large.dtype == torch.float32
    place = 10 * 7 / 63 if aligned else 10.5 / 8 - 0.5  # of pixel 10 on the upper edge, in cells
    wanted = torch.lerp(small[..., 0, int(place)], small[..., 0, int(place) + 1], place % 1)
    assert torch.allclose(large[..., 0, 10], wanted, rtol=1e-4, atol=1e-4 * small.abs().max())


def test_every_parameter_gets_a_gradient_and_the_auxiliary_loss_weighs_four_tenths():
    loss, values = (model := segmenter())(*BATCH)
    values["loss_auxiliary"].backward(retain_graph=True)  # it hangs on C4
    reached = {name for name, p in model.named_parameters() if p.grad is not None}
    assert any("layer3" in name for name in reached) and not any("layer4" in name for name in reached)
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    assert loss.item() == pytest.approx((values["loss_head"] + 0.4 * values["loss_auxiliary"]).item(), rel=1e-6)
    assert all(count == 1 for name, count in model.named_buffers() if name.endswith("num_batches_tracked"))
    assert values["loss_head"].item() == pytest.approx(math.log(5), abs=0.3)


def test_logged_accuracy_is_of_the_pixels_that_count():
    model, (x, _) = segmenter().eval(), BATCH
    labels = model(x).argmax(1)
    labels[:, :12] = (labels[:, :12] + 1) % 5
    labels[:, 24:] = 255
    assert model(x, labels)[1]["accuracy"].item() == pytest.approx(0.5)
    assert model(x, torch.full_like(labels, 255))[1]["accuracy"] == 0


def test_the_probe_trains_one_convolution_and_freezes_statistics():
    model = segmenter(probe=True).train()
    c5, learned = model.backbone.widths[3], {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {n: tuple(p.shape) for n, p in learned.items()} == {"head.1.weight": (5, c5, 1, 1), "head.1.bias": (5,)}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    loss, values = model(*BATCH)
    loss.backward()
    torch.optim.SGD(learned.values(), 0.1).step()
    assert values.keys() == {"loss_head", "accuracy"} and torch.equal(values["loss_head"], loss)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {*learned, *(f"head.0.{name}" for name in ("running_mean", "running_var", "num_batches_tracked"))}
    zero, one, two = (model.eval().head(torch.full((1, c5, 2, 2), x)) for x in (0.0, 1.0, 2.0))
    assert torch.allclose(two - one, one - zero, atol=1e-4)  # linear


def test_loss_is_averaged_over_all_pixels_ignored_ones_too():
    logits = torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    labels, total = torch.arange(30).view(2, 3, 5) % 4, 0.0
    labels[0, :2] = 255
    for n, y, x in np.ndindex(2, 3, 5):
        if labels[n, y, x] != 255:
            column = [logits[n, k, y, x].item() for k in range(4)]
            total += math.log(sum(map(math.exp, column))) - column[labels[n, y, x]]
    loss = seg.pixel_loss(logits, labels)
    assert loss.item() == pytest.approx(total / 30, rel=1e-6)
    loss.backward()
    assert logits.grad[0, :, :2].abs().max() == 0 and logits.grad[1].abs().max() > 0
    assert seg.pixel_loss(logits, torch.full_like(labels, 255)) == 0


def test_poly_with_floor():
    """mmsegmentation's numbers: from 0.01 to 1e-4, power 0.9."""
    rates = [seg.learning_rate(step, 0.01, 20000) for step in (0, 10000, 20000)]
    assert rates == pytest.approx([0.01, 0.0054053, 1e-4], rel=1e-5)


def test_protocols():
    """What test_paper_size.py does not look at."""
    for flags, resize, words in (
        ("voc", [2048, 512], "whole"), ("cityscapes", [2049, 1025], "slide"),
        ("cityscapes --crop 512x1024", [2048, 1024], "whole"),
        ("cityscapes --crop 64", [2049, 1025], "slide; changed: crop [64, 64]"),
    ):  # fmt: skip
        args = settings(f"--data x --task {flags}")
        assert args.resize == resize and words.startswith(args.test) and seg.title(args).endswith(f", test {words}")


def test_slide_grid_of_cityscapes():
    rows, columns = zip(*seg.slide_windows(1025, 2049, (769, 769)), strict=True)
    assert [(x.start, x.stop) for x in rows] == [(0, 769)] * 4 + [(256, 1025)] * 4
    assert [(x.start, x.stop) for x in columns] == [(0, 769), (513, 1282), (1026, 1795), (1280, 2049)] * 2


@pytest.mark.parametrize("size", [(40, 70), (32, 33), (20, 130), (20, 10), (64, 32)])
def test_one_window_equals_the_whole_and_several_are_averaged(size):
    torch.manual_seed(0)
    network, x = nn.Conv2d(3, 4, 5, padding=2).requires_grad_(False), torch.randn(1, 3, *size)
    assert torch.equal(seg.slide(network, x, (64, 136)), network(x))
    total, count, windows = np.zeros((4, *size)), np.zeros(size), seg.slide_windows(*size, (32, 32))
    for rows, columns in windows:
        part = network(x[..., rows, columns])[0].numpy()
        assert part.shape[1:] == tuple(min(side, 32) for side in size)
        for y, x0 in np.ndindex(part.shape[1:]):
            total[:, rows.start + y, columns.start + x0] += part[:, y, x0]
            count[rows.start + y, columns.start + x0] += 1
    assert np.abs(seg.slide(network, x, (32, 32))[0].numpy() - total / count).max() < 1e-5
    assert count.min() > 0 and len(windows) == math.prod(max(math.ceil((side - 32) / 21), 0) + 1 for side in size)


def test_scores_against_a_loop():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, (3, 9, 11)).astype(np.uint8)
    predicted = np.where(rng.random(labels.shape) < 0.6, labels, rng.integers(0, 6, labels.shape)).astype(np.uint8)
    labels[labels == 4] = 255  # class 4 is predicted only, class 5 is not in the truth either, class 6 is nowhere
    labels[0, 0] = 255
    found = seg.scores(sum(seg.confusion(p, t, 7) for p, t in zip(predicted, labels, strict=True)), list("abcdefg"))
    pairs = [(p, t) for p, t in zip(predicted.ravel().tolist(), labels.ravel().tolist(), strict=True) if t != 255]
    iou, recall = {}, []
    for k, name in enumerate("abcdefg"):
        P, T = ({i for i, pair in enumerate(pairs) if pair[j] == k} for j in (0, 1))  # pixels
        iou |= {name: 100 * len(P & T) / len(P | T)} if P | T else {}
        recall += [100 * len(P & T) / len(T)] if T else []
    assert found["IoU_by_class"] == pytest.approx(iou) and list(iou) == list("abcdef") and iou["e"] == 0
    assert found["mIoU"] == pytest.approx(sum(iou.values()) / 6)
    assert found["accuracy"] == pytest.approx(100 * sum(p == t for p, t in pairs) / len(pairs))
    assert found["mean_accuracy"] == pytest.approx(sum(recall) / len(recall))
    assert seg.scores(np.zeros((2, 2), int), ["a", "b"])["mIoU"] == 0


# ---- training images


SIZES = [  # (height, width), the box, the wanted size
    ((375, 500), (2048, 512), (512, 683)), ((500, 375), (512, 2048), (683, 512)),  # scale 1.3653, lying or upright
    ((100, 1000), (2048, 512), (205, 2048)), ((3, 1000), (100, 100), (1, 100)),  # the long side is the limit
    ((375, 500), (333, 200), (200, 267)), ((375, 500), (500, 375), (375, 500)), ((375, 500), (1001, 750), (750, 1000)),
]  # fmt: skip


@pytest.mark.parametrize("size, box, wanted", SIZES)
def test_resizing_into_the_box_is_opencvs(size, box, wanted):
    cv2, rng = pytest.importorskip("cv2"), np.random.default_rng(0)
    image, labels = (rng.integers(0, 256, (*size, *more), dtype=np.uint8) for more in ((3,), ()))
    ours, moved = seg.fit(Image.fromarray(image), labels, box)
    assert moved.shape == wanted
    theirs = cv2.resize(image, wanted[::-1], interpolation=cv2.INTER_LINEAR)
    assert np.abs(ours.permute(1, 2, 0).numpy().astype(int) - theirs).max() <= 1
    assert (moved.numpy() == cv2.resize(labels, wanted[::-1], interpolation=cv2.INTER_NEAREST)).all()


def test_crops_have_two_classes_and_none_on_three_quarters():
    def window(labels, *draws):
        return [part.start for part in seg.crop_window(labels, (8, 16), draws)]

    labels = torch.zeros(20, 40, dtype=torch.uint8)
    labels[:, 20:] = 1
    left, middle, edge, right = (0.5, 0.0), (0.5, 0.5), (0.5, 0.245), (0.5, 0.9999)
    for draws, wanted in (
        ([(0.0, 0.0)], [0, 0]), ([(0.99999, 0.99999)], [12, 24]),  # both ends
        ([left, middle, right], [6, 12]), ([left, right], [6, 24]),  # the first good one; none is good: the last one
        ([edge, middle], [6, 12]),  # 14 of 16 columns are of one class
    ):  # fmt: skip
        assert window(labels, *draws) == wanted
    labels[:, 8:16] = 255  # of the crop at 6, 2 columns count as class 0, 8 are ignored, 6 are ...
    labels[:, 16:] = 1
    assert window(labels, (0.0, 6 / 25 + 1e-6), middle)[1] == 12  # 2 of 8: 75 % exactly is too much
    assert window(labels, (0.0, 5 / 25 + 1e-6), middle)[1] == 5  # 3 of 8: 62.5 % of what counts
    assert window(torch.full((20, 40), 255, dtype=torch.uint8), middle, left)[1] == 0
    small = labels[:5, :9]
    assert torch.equal(small[seg.crop_window(small, (8, 16), [(0.3, 0.9)])], small)  # smaller than the crop


def test_distortion_is_opencvs():
    """One after another. Brightness has -32 to 32, contrast and saturation factors 0.5 to 1.5, hue -18 to 17."""
    cv2, rng = pytest.importorskip("cv2"), np.random.default_rng(0)
    image = np.asarray(Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((64, 64), Image.BICUBIC))
    ranges = {"b": (32, 64), "c": (-0.5, 1), "s": (-0.5, 1), "h": (18.5, 36)}
    for steps, most in {  # and the mean difference: hue in 256 and in 180 steps
        "": 0, "b25.3": 0, "b-31.9": 0, "c1.4": 0, "s0.6": 2.5, "h-18": 2.5, "h17": 2.5, "s1.4 h-15": 2.5,
        "b10 c1.4 s0.6 h-15": 3, "b10 s0.6 h-15 c1.4": 3,
    }.items():  # fmt: skip
        wanted, amounts = image, {step[0]: float(step[1:]) for step in steps.split()}
        for name, x in amounts.items():
            changed = (wanted if name in "bc" else cv2.cvtColor(wanted, cv2.COLOR_RGB2HSV)).astype(np.float32)
            channels, (factor, shift) = {"s": 1, "h": 0}.get(name, slice(3)), (1, x) if name in "bh" else (x, 0)
            changed[..., channels] = changed[..., channels] * np.float32(factor) + np.float32(shift)
            changed = (changed % [180, 256, 256] if name == "h" else changed.clip(0, 255)).astype(np.uint8)
            wanted = changed if name in "bc" else cv2.cvtColor(changed, cv2.COLOR_HSV2RGB)
        numbers = [(amounts[n] + low) / width if n in amounts else 0.7 for n, (low, width) in ranges.items()]
        coins = [0.499 if name in amounts else 0.5 for name in ranges] + [0.5 if steps.endswith(" c1.4") else 0.499]
        assert np.abs(seg.distort(image, coins, numbers).astype(int) - wanted).mean() <= most, steps


class Painted(list):
    """Images of these sizes (height, width), whose red channel is 80 times their label; None is unreadable."""

    def read(self, index):
        if self[index] is None:
            raise OSError
        (y, x), (height, width) = np.indices(self[index]), self[index]
        labels = np.where((y >= height // 2) & (x >= width // 2), 2, x >= width // 3).astype(np.uint8)
        return Image.fromarray(np.stack([80 * labels, 0 * labels + 40, 0 * labels + 120], 2)), labels


def training(*sizes, flags=""):
    return seg.TrainingImages(Painted(sizes), settings(f"{TINY} {flags}"))


def test_labels_follow_their_image(monkeypatch):
    monkeypatch.setattr(seg, "distort", lambda image, coins, numbers: image)
    items, flips = training((60, 80)), 0
    for epoch in range(40):
        image, labels, *_ = items[epoch, 0]
        known, red = labels != 255, (image[0] * 0.229 + 0.485) * 255
        assert (((red - 80 * labels.float()).abs() < 1) | ~known).float().mean() > 0.85  # all but edges
        height, width = known.any(1).sum().item(), known.any(0).sum().item()
        assert known[:height, :width].all() and known.shape == (48, 48)  # padded below and on the right
        assert (image[:, ~known] == 0).all()  # after normalisation
        flips += (labels[0, 1:width] < labels[0, : width - 1]).any().item()
    assert 8 < flips < 32


def test_scale_is_uniform_between_a_half_and_two(monkeypatch):
    """The box is scaled, then cut to whole pixels, as in mmsegmentation. What `distort` gets is uniform as well."""
    boxes, draws, fit, items = [], [], seg.fit, training((60, 80))
    monkeypatch.setattr(seg, "fit", lambda image, labels, box: boxes.append(box) or fit(image, labels, box))
    monkeypatch.setattr(seg, "distort", lambda image, coins, numbers: draws.append(coins + numbers) or image)
    for epoch in range(400):
        items[epoch, 0]
    ratios, draws = np.array([box[1] / 40 for box in boxes]), np.array(draws)
    assert 0.5 <= ratios.min() < 0.53 and 1.95 < ratios.max() < 2 and ratios.mean() == pytest.approx(1.24, abs=0.05)
    assert all(type(side) is int for box in boxes for side in box) and all(0 <= a - 4 * b <= 4 for a, b in boxes)
    assert draws.shape == (400, 9) and np.abs(draws.mean(0) - 0.5).max() < 0.06 and draws.min() >= 0
    assert np.abs(np.corrcoef(draws.T) - np.eye(9)).max() < 0.2 and draws.max(0).min() > 0.97


def test_draws_depend_on_seed_epoch_and_index_alone():
    items = training((60, 80), None, (60, 80))
    first, others = items[3, 2], [items[3, 0], items[4, 2], training(*items.data, flags="--seed 1")[3, 2], items[3, 1]]
    assert_same(first, items[3, 2])
    assert not any(torch.equal(first[0], other[0]) for other in others)
    assert others[3][2:] == (1, 1) and (training(None)[0, 0][1] == 255).all()  # unreadable: the neighbour, or nothing


# ---- data sets


def write(path, values=None, palette=None, size=(8, 6)):
    """A mask (6, 8) whose columns hold these values, from the left; without values an image."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", size) if values is None else Image.fromarray(columns(*values))
    if palette is not None:
        image.putpalette(palette)
    image.save(path)


def columns(*values):
    return np.repeat(np.resize(np.array(values, np.uint8), max(8, len(values)))[None], 6, 0)


def open_both(flags):
    args = settings(flags)
    train = seg.open_data(args, "train")
    return train, seg.open_data(args, "val", train.classes)


def names(data):
    return [data.name(i) for i in range(len(data))]


@pytest.mark.parametrize("inner", ["", "VOCdevkit"])
def test_voc_reader(inner, tmp_path):
    voc, sbd = tmp_path / inner / "VOC2012", tmp_path / inner / "benchmark_RELEASE" / "dataset"
    for folder, *lists in ((voc / "ImageSets" / "Segmentation", "1 2", "3"), (sbd, "2 4 3", "5 1")):
        folder.mkdir(parents=True)
        for part, listed in zip(("train", "val"), lists, strict=True):
            (folder / f"{part}.txt").write_text(listed.replace(" ", "\n") + "\n")
    (sbd / "cls").mkdir()
    for name in "12345":
        write(voc / "JPEGImages" / f"{name}.jpg")
        write(voc / "SegmentationClass" / f"{name}.png", (0, 255, 20), seg.voc_palette().tobytes())
        record = np.zeros((1,), [("Categories", "O"), ("Segmentation", "O"), ("Boundaries", "O")])
        record["Segmentation"][0] = columns(0, 7, 15)
        scipy.io.savemat(sbd / "cls" / f"{name}.mat", {"GTcls": record})
    train, val = open_both(f"--task voc --data {tmp_path}")
    assert names(train) == ["1", "2", "4", "5"] and names(val) == ["3"]
    assert len(train.classes) == 21 and (train.classes[0], train.classes[20]) == ("background", "tvmonitor")
    for index, values in enumerate([(0, 255, 20)] * 2 + [(0, 7, 15)] * 2):
        assert (train.read(index)[1] == columns(*values)).all()
    assert train.palette[[1, 2, 20, 255]].tolist() == [[128, 0, 0], [0, 128, 0], [0, 64, 128], [224, 224, 192]]
    (sbd / "cls" / "4.mat").unlink()
    with pytest.raises(common.UserError, match=r"1 files are not there, the first is .*4.mat.*SBD's benchmark"):
        open_both(f"--task voc --data {tmp_path}")


def test_cityscapes_reader(tmp_path):
    ids = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33, 0, 6, 9, 29, 30]
    values = {"Ids": ids, "TrainIds": [*range(19), *[255] * 5]}
    for stem, kinds in {"train/bonn/1": "Ids", "train/aachen/2": "TrainIds", "val/ulm/3": "Ids TrainIds"}.items():
        write(tmp_path / "leftImg8bit" / f"{stem}_leftImg8bit.png", size=(24, 6))
        for kind in kinds.split():
            write(tmp_path / "gtFine" / f"{stem}_gtFine_label{kind}.png", values[kind])
    train, val = open_both(f"--task cityscapes --data {tmp_path}")
    assert names(train) == ["aachen/2_leftImg8bit.png", "bonn/1_leftImg8bit.png"] and len(val) == 1
    assert all((read[1] == columns(*values["TrainIds"])).all() for read in (train.read(0), train.read(1), val.read(0)))
    assert train.classes[:3] == ["road", "sidewalk", "building"] and train.classes[18] == "bicycle"
    assert train.palette[[0, 13]].tolist() == [[128, 64, 128], [0, 0, 142]]


def test_ade20k_reader(tmp_path):
    root = tmp_path / "ADEChallengeData2016"
    for split in ("training", "validation"):
        write(root / "images" / split / "ADE_1.jpg")
        write(root / "annotations" / split / "ADE_1.png", (0, 1, 150, 255))
    for folder in (tmp_path, root):
        for data in open_both(f"--task ade20k --data {folder}"):
            assert (data.read(0)[1] == columns(255, 0, 149, 255)).all()
    assert len(data.classes) == len({*data.classes}) == 150 and data.classes[::149] == ["wall", "flag"]
    assert len({tuple(c) for c in data.palette[:150].tolist()}) == 149  # road and skyscraper are both grey
    assert data.palette[0].tolist() == [120, 120, 120] and not data.palette[150:].any()
    write(root / "annotations" / "validation" / "ADE_1.png", (0, 151))
    with pytest.raises(OSError, match="a value that is no class"):
        data.read(0)


@pytest.fixture
def own(tmp_path):
    """Ten images with masks of classes 0, 1, 2 and void 11, in subfolders, one image without a mask."""
    for i in range(10):
        write(tmp_path / "images" / f"{i % 2}" / f"photo{i}.jpg")
        write(tmp_path / "masks" / f"{i % 2}" / f"photo{i}.png", (0, 1, 2, 11, 255))
    write(tmp_path / "images" / "lonely.jpg")
    return tmp_path


def custom(folder, flags="", images="images", masks="masks"):
    return open_both(f"--task custom --images {folder / images} --masks {folder / masks} {flags}")


def test_custom_masks(own, capsys):
    train, val = custom(own, "--ignore 11")
    printed = capsys.readouterr().out
    assert printed.count("1 of 11 images") == printed.count("2 of 10 images are held out") == 1
    assert (len(train), len(val)) == (8, 2) and train.classes == ["0", "1", "2"]
    assert {*names(train), *names(val)} == {f"{i % 2}/photo{i}.jpg" for i in range(10)}
    assert (train.read(0)[1] == columns(0, 1, 2, 255, 255)).all()
    again, _ = custom(own, "--ignore 11 --classes sky road car")
    assert again.fingerprint() == train.fingerprint() != val.fingerprint() and again.classes == ["sky", "road", "car"]
    shifted, _ = custom(own, "--ignore 0")  # as ADE20K: 1 becomes 0, ..., and 11 the tenth
    assert (shifted.read(0)[1] == columns(255, 0, 1, 10, 255)).all() and shifted.classes == [*map(str, range(1, 12))]
    for kind, number in itertools.product(("images", "masks"), (0, 1)):
        (own / kind / str(number)).rename(own / kind / ("train", "val")[number])
    assert [names(data) for data in custom(own)] == [[f"photo{i}.jpg" for i in range(j, 10, 2)] for j in (0, 1)]


def test_custom_masks_beside_their_images_bring_their_palette(tmp_path):
    """Or else they have 16 bits, or one."""
    for i in range(5):
        write(tmp_path / f"{i}.jpg")
        write(tmp_path / f"{i}.png", (1, 2), [9, 9, 9, 1, 2, 3, 250, 0, 7])
    train, _ = custom(tmp_path, "--ignore 0", "", "")
    assert len(train) == 4 and train.name(0).endswith(".jpg") and (train.read(0)[1] == columns(0, 1)).all()
    assert train.palette[:2].tolist() == [[1, 2, 3], [250, 0, 7]]
    for dtype in (np.uint16, bool):
        Image.fromarray(columns(0, 1).astype(dtype)).save(tmp_path / "0.png")
        assert (seg.read_mask(str(tmp_path / "0.png")) == columns(0, 1)).all()


STRANGE = {  # how masks are refused: what befalls them, flags
    r"masks hold \[0, 1, 2, 11\], 3 classes: .*--ignore others": (lambda x: write(x, (0, 1, 2, 11)), "--classes a b c"),
    r"masks hold \[0\], 1 classes": (lambda x: None, "--ignore 1 2"),
    "0.png: a mask must have one channel of class numbers": (lambda x: write(x), ""),
    "0.png: .* class numbers, 0 to 255": (lambda x: Image.fromarray(np.full((6, 8), 256, np.uint16)).save(x), ""),
    r"0.png has \(4, 3\) pixels, its image \(8, 6\)": (lambda x: Image.new("L", (4, 3)).save(x), ""),
    "0.png: cannot identify image file": (lambda x: x.write_bytes(b"no mask at all"), ""),
    "none are there; wanted is a folder": (lambda x: [m.rename(f"{m}.jpg") for m in [*x.parent.glob("*")]], ""),
    "1 have no image of the same name, for instance other.png": (lambda x: write(x.with_name("other.png")), ""),
}


@pytest.mark.parametrize("words", STRANGE)
def test_custom_masks_that_do_not_fit_are_refused(words, tmp_path):
    for i in range(5):
        write(tmp_path / "images" / f"{i}.jpg")
        write(tmp_path / "masks" / f"{i}.png", (0, 1, 2, 255))
    happen, flags = STRANGE[words]
    happen(tmp_path / "masks" / "0.png")
    with pytest.raises(common.UserError, match=words):
        custom(tmp_path, flags)


# ---- as users do


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run of four steps."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torchvision.models, "resnet18", TinyResNet)
        seg.job(f"{TINY} --workers 0 --print-freq 2 --output-dir {folder}".split())
    return folder


def test_the_result_is_what_the_pieces_say(finished):
    """Image by image, without loader or processes, on scenes that training has not seen."""
    (result,) = [json.loads(line) for line in (finished / "results.jsonl").read_text().splitlines()]
    assert [*result] == "seed protocol weights mIoU accuracy mean_accuracy IoU_by_class".split()
    train, val = open_both(TINY)
    assert (names(train)[-1], names(val)[0], train.classes[0]) == ("scene 7", "scene 8", "background")
    model, matrix = seg.Segmenter("resnet18", 11, False, False).eval(), np.zeros((11, 11), np.int64)
    model.load_state_dict(torch.load(finished / "segmenter.pth"))
    mean, std = torch.tensor(common.PIXEL_MEAN).view(3, 1, 1), torch.tensor(common.PIXEL_STD).view(3, 1, 1)
    for image, labels in (val.read(i) for i in range(len(val))):
        pixels = F.interpolate(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None], (40, 40), mode="bilinear")
        with torch.no_grad():
            logits = F.interpolate(model((pixels / 255 - mean) / std), (136, 136), mode="bilinear")
        np.add.at(matrix, (labels, logits.argmax(1)[0].numpy()), 1)
    found = seg.scores(matrix, val.classes)
    assert len(found["IoU_by_class"]) > 5
    assert all(found[name] == pytest.approx(result[name], abs=0.01) for name in ("mIoU", "accuracy", "mean_accuracy"))


def test_norms_and_biases_have_weight_decay_too(finished):
    """And the heads have the backbone's rate, which falls to a hundredth."""
    (group,) = checkpoint(finished)["optimizer"]["param_groups"]
    assert (group["weight_decay"], group["momentum"], group["nesterov"]) == (5e-4, 0.9, False)
    assert len(group["params"]) == len([*segmenter().parameters()])
    rates = [line["lr"] for line in log_lines(finished) if "loss" in line]
    assert rates == pytest.approx([seg.learning_rate(step, 1e-4, 4) for step in (1, 3)])


def test_other_settings_can_be_evaluated_later(finished):
    found = []
    for flags in ("--resize 80", "--resize 80 --test slide"):
        seg.job(f"--eval-only --workers 0 --output-dir {finished} {flags}".split())
        found.append(json.loads((finished / "evaluation.json").read_text()))
    assert all("changed: " in x["protocol"] and "resize [80, 80]" in x["protocol"] for x in found)
    assert found[1]["protocol"].endswith(", test slide") and found[0]["accuracy"] != found[1]["accuracy"]


def test_other_data_can_be_evaluated_later(own):
    """The segmenter knows its three classes: what it was trained on may be gone."""
    end = f"--workers 0 --output-dir {own}/run"
    seg.job(f"{TINY} --task custom --images {own}/images --masks {own}/masks --ignore 11 {end}".split())
    other = f"--eval-only --images {own}/new_images --masks {own}/new_masks {end}".split()
    for kind in ("images", "masks"):
        (own / kind).rename(own / f"new_{kind}")
    for values in ((0, 1), (0, 1, 3)):
        for mask in (own / "new_masks").rglob("*.png"):
            write(mask, values)
        with pytest.raises(common.UserError, match="3 classes") if 3 in values else contextlib.nullcontext():
            seg.job(other)


def test_predictions_are_masks_in_colours(finished, tmp_path):
    """A picture: the image, its classes in colours, and from below that on a line for each class."""
    sizes = {"a/odd.jpg": (131, 77), "thin.png": (300, 3)}
    for name, size in sizes.items():
        write(tmp_path / name, size=size)
    seg.job(["--predict", str(tmp_path), "--output-dir", str(finished), "--workers", "0"])
    folder, data = finished / "predictions", seg.SceneData(0, 1)
    told, colours = json.loads((folder / "classes.json").read_text()), data.palette[:11].tolist()
    assert [[*c.values()] for c in told] == [[k, data.classes[k], colours[k]] for k in range(11)]
    for name, (width, height) in sizes.items():
        mask, picture = (Image.open(folder / kind / f"{name}.png") for kind in ("masks", "pictures"))
        values, picture = np.asarray(mask), np.asarray(picture)
        assert mask.mode == "P" and values.shape == (height, width) and mask.getpalette()[:33] == sum(colours, [])
        assert (picture[height + 5 : 2 * height + 5] == data.palette[values]).all()
        assert (picture[2 * height + 17 :: 18, 10] == data.palette[np.unique(values)]).all()


@pytest.mark.slow
def test_eight_scenes_are_learnt_by_heart(monkeypatch):
    """Over-fit: evaluated on what it was trained on, mIoU above 90.

    Windows of 80 pixels around the largest object of large scenes: at stride 8 no network could draw the thin parts of
    small ones. Classes on less than a sixteenth of a window are ignored.
    """
    monkeypatch.setattr(torchvision.models, "resnet18", torchvision.models.resnet.resnet18)
    pixels, labels, model = [], [], segmenter(classes=11).to(memory_format=torch.channels_last).train()
    for number in range(8):
        scene = scenes.make_scene(0, number, 260)
        x0, y0, x1, y1 = scene["boxes"][scene["masks"].sum((1, 2)).argmax()]
        left, top = (int(np.clip((a + b - 80) / 2, 0, 180)) for a, b in ((x0, x1), (y0, y1)))
        image, inside = (torch.tensor(scene[k][top : top + 80, left : left + 80]) for k in ("image", "semantic"))
        rare = torch.bincount(inside.flatten(), minlength=256) < 400
        pixels.append(image.permute(2, 0, 1))
        labels.append(inside.long().masked_fill(rare[inside.long()], 255))
    pixels, labels = common.normalise(torch.stack(pixels)), torch.stack(labels)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for step in range(48):
        optimizer.param_groups[0]["lr"] = seg.learning_rate(step, 0.05, 48)
        with torch.autocast("cpu", torch.bfloat16, enabled=run.bf16_is_fast()):
            loss, _ = model(pixels, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    predicted = model.eval()(pixels).argmax(1).numpy().astype(np.uint8)
    found = seg.scores(seg.confusion(predicted, labels.numpy(), 11), [*"abcdefghijk"])
    assert len(found["IoU_by_class"]) >= 7 and found["mIoU"] > 90
