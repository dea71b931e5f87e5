"""resim.py: views, regions, Precise RoI Pooling, pyramid, losses and one iteration, each against something independent."""

import copy
import itertools
import math
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from helpers import LargestTensor, coordinate_image, lifted
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms
from torchvision.ops import FeaturePyramidNetwork, roi_align

import common
import resim
from harness import look
from tools import released

# ----------------------------------------------------------------------------------------------------------------------
# views
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_colours(monkeypatch):
    """Colour operations would change coordinates that are written in colours; crop, resize and flip stay real."""
    monkeypatch.setattr(resim.transforms, "ColorJitter", lambda *_: lambda image: image)
    monkeypatch.setattr(resim.TF, "rgb_to_grayscale", lambda image, _: image)
    monkeypatch.setattr(
        resim.ImageFilter, "GaussianBlur", lambda _: resim.ImageFilter.Kernel((3, 3), [0] * 4 + [1] + [0] * 4)
    )


def coordinates(view):
    """What a view of the coordinate image shows: (2, size, size), x and y as fractions of the image."""
    return view[:2].float() / 256 + 0.5 / 256


def test_crops_say_what_the_views_show_and_flips_are_shared(no_colours):
    width, height, flips = 256, 200, 0
    image = coordinate_image(width, height)
    for i in range(40):
        with common.drawing("test", i):
            view_q, view_k, crop_q, crop_k = resim.two_views(image, 224)
        (x_q, y_q), (x_k, y_k) = coordinates(view_q), coordinates(view_k)
        flipped = (x_q[:, -1].mean() < x_q[:, 0].mean()).item()
        assert flipped == (x_k[:, -1].mean() < x_k[:, 0].mean()).item()  # both or neither
        for x, y, crop in ((x_q, y_q, crop_q), (x_k, y_k, crop_k)):
            x0, y0, x1, y1 = crop.tolist()
            want = x0 + (torch.arange(224) + 0.5) / 224 * (x1 - x0)  # in pixels of the flipped image
            want = (width - want if flipped else want) / width
            assert (x.mean(0) - want)[8:-8].abs().max() < 0.008  # two pixels of 256
            want = (y0 + (torch.arange(224) + 0.5) / 224 * (y1 - y0)) / height
            assert (y.mean(1) - want)[8:-8].abs().max() < 0.008
        flips += flipped
    assert 10 < flips < 30


def test_windows_show_the_same_in_both_views(no_colours):
    """The key view cut out at a valid window's box and resized is what the query view shows in the window."""
    image, checked = coordinate_image(), 0
    for i in range(25):
        with common.drawing("pair", i):
            view_q, view_k, crop_q, crop_k = resim.two_views(image, 224)
        pairs = resim.region_pairs(crop_q[None], crop_k[None], 224, 48, 32)
        for box_q, box_k, valid in zip(pairs.boxes_q[0], pairs.boxes_k[0], pairs.valid[0], strict=True):
            if valid:
                x0, y0, x1, y1 = box_q.int().tolist()
                want = coordinates(view_q)[:, y0:y1, x0:x1]
                x0, y0, x1, y1 = box_k.tolist()  # read the key view at the places that correspond, pixel by pixel
                x = ((x0 + (torch.arange(48) + 0.5) / 48 * (x1 - x0)) / 112 - 1).expand(48, 48)
                y = ((y0 + (torch.arange(48) + 0.5) / 48 * (y1 - y0)) / 112 - 1)[:, None].expand(48, 48)
                grid = torch.stack([x, y], 2)[None]
                got = F.grid_sample(coordinates(view_k)[None], grid, align_corners=False, padding_mode="border")[0]
                assert (got - want).abs().max() < 0.02 and (got - want).abs().mean() < 0.004
                checked += 1
    assert checked > 200


def test_views_follow_the_recipe():
    """Shares and ranges of MoCo-v2's crops over many draws."""
    image, crops = Image.new("RGB", (400, 400)), []
    for i in range(300):
        with common.drawing("recipe", i):
            crops += resim.two_views(image, 32)[2:]
    x0, y0, x1, y1 = torch.stack(crops).double().T
    area, aspect = (x1 - x0) * (y1 - y0) / 400**2, (x1 - x0) / (y1 - y0)
    assert 0.195 < area.min() < 0.25 and area.max() <= 1 and abs(area.mean() - 0.54) < 0.03
    assert 0.74 < aspect.min() < 0.8 and 1.25 < aspect.max() < 1.35
    assert x0.min() >= 0 and x1.max() <= 400 and all(x == x.round() for x in x0)


def test_colour_operations_in_their_order(monkeypatch):
    """MoCo-v2's, in every preset (R14): the flip before both crops, and in each view the blur last."""
    seen = []
    monkeypatch.setattr(resim.torch, "rand", lambda *_: torch.tensor(0.0))  # every operation happens
    note = lambda name: lambda image, *_: seen.append(name) or image  # noqa: E731
    monkeypatch.setattr(resim.TF, "hflip", note("flip"))
    monkeypatch.setattr(resim.TF, "resized_crop", note("crop"))
    monkeypatch.setattr(resim.TF, "rgb_to_grayscale", note("grey"))
    monkeypatch.setattr(resim.transforms, "ColorJitter", lambda *strength: note(f"jitter {strength}"))
    monkeypatch.setattr(
        Image.Image, "filter", lambda image, blur: seen.append(f"blur {0.1 <= blur.radius <= 2}") or image
    )
    resim.two_views(Image.new("RGB", (8, 8)), 8)
    assert seen == ["flip", *["crop", "jitter (0.4, 0.4, 0.4, 0.1)", "grey", "blur True"] * 2]


def test_colour_operations_are_drawn_for_each_view(monkeypatch):
    """Probabilities 0.8, 0.2, 0.5 (jitter, grey, blur), each drawn by itself in both views: counted over many draws."""
    happened = []  # a row for each view

    def note(operation):
        def noted(image, *_):
            happened[-1][operation] = 1
            return image

        return noted

    monkeypatch.setattr(resim.TF, "resized_crop", lambda image, *_: happened.append([0, 0, 0]) or image)
    monkeypatch.setattr(resim.transforms, "ColorJitter", lambda *_: note(0))
    monkeypatch.setattr(resim.TF, "rgb_to_grayscale", note(1))
    monkeypatch.setattr(Image.Image, "filter", note(2))
    image = Image.new("RGB", (8, 8))
    for i in range(1000):
        with common.drawing("colours", i):
            resim.two_views(image, 8)
    six = np.array(happened).reshape(1000, 6)  # the three of view q, the three of view k
    assert np.abs(six.mean(0) - [0.8, 0.2, 0.5] * 2).max() < 0.04  # three standard errors
    assert np.abs(np.corrcoef(six.T) - np.eye(6)).max() < 0.1


# ----------------------------------------------------------------------------------------------------------------------
# regions
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window, stride, side", [(48, 32, 6), (32, 24, 8), (16, 16, 13), (48, 16, 11), (64, 48, 4)])
def test_window_counts(window, stride, side):
    grid = resim.window_grid(224, window, stride)
    places = [i for i in range(0, 224, stride) if i + window < 224]  # the rule of the released code
    assert len(places) == side and len(grid) == side**2
    assert grid.tolist() == [[x, y, x + window, y + window] for y in places for x in places]  # row by row


def levels(*flags):
    return resim.make_levels(resim.get_args(["--data", "x", *flags]))


def test_kernels_of_the_negatives():
    """Neighbourhoods as large as a window, in whole cells; 3 x 3 on P3."""

    def kernels(*flags):
        return [level.kernel for level in levels(*flags)]

    assert kernels() == [3, 3] and kernels("--levels", "c4") == [3]
    assert [kernels("--levels", "c4", "--window", w, "16") for w in ("16", "48", "64")] == [[1], [3], [4]]
    assert kernels("--window", "64", "48") == [4, 3]
    assert [kernels("--levels", "c4", "--window", w, "32") for w in ("4", "24", "40")] == [[1], [2], [3]]  # halves up
    assert [kernels("--window", w, "32")[1] for w in ("8", "16", "40", "64")] == [3] * 4  # P3, whatever the window


@pytest.mark.parametrize("name, first", [("c4", "c4"), ("fpn", "p4")])
def test_window_is_that_of_the_first_level(name, first):
    """Table 3 varies it on C4. P3 keeps its windows, and LEVELS, which other scripts read, its values."""
    before = copy.deepcopy(resim.LEVELS)
    one, *others = levels("--levels", name, "--window", "64", "24")
    assert one == resim.Level(first, 2, 16, window=64, step=24, kernel=4, gathered=True)
    assert others == ([resim.Level("p3", 1, 8, window=32, step=24, kernel=3, gathered=False)] if name == "fpn" else [])
    assert resim.LEVELS == before and levels("--levels", name) == before[name]


def random_crops(n, seed=0, width=500, height=375):
    """(2, n, 4) pairs of RandomResizedCrop's boxes, as two_views draws them."""
    image, crops = Image.new("RGB", (width, height)), []
    with common.drawing("crops", seed):
        for _ in range(2 * n):
            top, left, h, w = transforms.RandomResizedCrop.get_params(image, (0.2, 1.0), (3 / 4, 4 / 3))
            crops.append([left, top, left + w, top + h])
    return torch.tensor(crops, dtype=torch.float32).view(2, n, 4)


def test_map_boxes_and_valid_against_a_loop():
    crop_q, crop_k = random_crops(20)
    pairs = resim.region_pairs(crop_q, crop_k, 224, 48, 32)
    checked = 0
    for b, a in itertools.product(range(20), range(36)):
        x, y = 32 * (a % 6), 32 * (a // 6)
        want = []
        for i, t in enumerate((x, y, x + 48, y + 48)):  # to the image, and on to the key view
            axis = i % 2
            absolute = crop_q[b, axis].item() + t * (crop_q[b, axis + 2] - crop_q[b, axis]).item() / 224
            want.append((absolute - crop_k[b, axis].item()) * 224 / (crop_k[b, axis + 2] - crop_k[b, axis]).item())
        valid = want[0] >= 0 and want[1] >= 0 and want[2] < 224 and want[3] < 224
        if min(abs(w) for w in want) > 1e-3 and min(abs(w - 224) for w in want) > 1e-3:  # rounding decides those
            assert pairs.valid[b, a].item() == valid
            checked += 1
        assert pairs.boxes_q[b, a].tolist() == [x, y, x + 48, y + 48]
        if pairs.valid[b, a]:
            torch.testing.assert_close(pairs.boxes_k[b, a], torch.tensor(want), rtol=1e-5, atol=1e-3)
        else:
            assert pairs.boxes_k[b, a].tolist() == [0, 0, 0, 0]
    assert checked > 600
    boxes = resim.map_boxes(resim.window_grid(224, 48, 32), crop_q, crop_k, 224)
    back = resim.map_boxes(boxes, crop_k, crop_q, 224)  # R_q->k is undone by R_k->q
    torch.testing.assert_close(back, resim.window_grid(224, 48, 32).expand(20, -1, -1), rtol=0, atol=2e-3)


def test_identical_crops_make_every_window_valid_and_equal():
    crops = torch.cat([random_crops(500).flatten(0, 1), torch.tensor([[0.0, 0.0, 1.0, 1.0], [99991, 7, 99998, 8]])])
    for size, window, stride in ((224, 48, 32), (224, 32, 24), (136, 48, 32)):
        pairs = resim.region_pairs(crops, crops, size, window, stride)
        assert pairs.valid.all() and torch.equal(pairs.boxes_q, pairs.boxes_k)


def test_inside_is_strict_on_the_far_side_only():
    crop_q = torch.tensor([[0.0, 0.0, 224.0, 224.0]])
    for left, top, valid in (
        (0, 0, True), (-176, 0, False), (-175, 0, True), (0, -176, False), (0, -175, True), (1, 0, False), (0, 1, False),
    ):  # fmt: skip
        crop_k = crop_q + torch.tensor([[left, top, left, top]])  # the key view is shifted, so boxes move the other way
        boxes = resim.map_boxes(resim.window_grid(224, 48, 32)[:1], crop_q, crop_k, 224)[0, 0]
        assert boxes.tolist() == [-left, -top, 48 - left, 48 - top]  # 48 + 176 = 224 is outside already
        assert resim.region_pairs(crop_q, crop_k, 224, 48, 32).valid[0, 0].item() is valid


def test_disjoint_crops_have_no_valid_window():
    crop_q, crop_k = torch.tensor([[0.0, 0.0, 100.0, 100.0]]), torch.tensor([[200.0, 0.0, 300.0, 100.0]])
    for one, two in ((crop_q, crop_k), (crop_k, crop_q)):
        pairs = resim.region_pairs(one, two, 224, 48, 32)
        assert not pairs.valid.any() and not pairs.boxes_k.any()


def test_shares_of_valid_windows_are_those_of_the_released_code():
    """Measured there with random crops: 0.55 to 0.60 and 0.60 to 0.65 of the windows; 0.4 to 2.5 % of images have none."""
    crop_q, crop_k = random_crops(3000)
    coarse, fine = (resim.region_pairs(crop_q, crop_k, 224, *w).valid for w in ((48, 32), (32, 24)))
    assert 0.55 < coarse.float().mean() < 0.60 and 0.60 < fine.float().mean() < 0.65
    assert 0.004 < (~coarse.any(1)).float().mean() < 0.025 and 0.002 < (~fine.any(1)).float().mean() < 0.025


# ----------------------------------------------------------------------------------------------------------------------
# Precise RoI Pooling
# ----------------------------------------------------------------------------------------------------------------------


def interpolate(feature, x, y):
    """Bilinear interpolation of samples at whole coordinates, zero beyond: one point, by its four neighbours.

    feature: (C, H, W) -> (C,)
    """
    H, W = feature.shape[1:]
    total, i, j = feature.new_zeros(len(feature)), math.floor(y), math.floor(x)
    for row, column in itertools.product((i, i + 1), (j, j + 1)):
        if 0 <= row < H and 0 <= column < W:
            total = total + feature[:, row, column] * (1 - abs(y - row)) * (1 - abs(x - column))
    return total


def quadrature(feature, x0, y0, x1, y1):
    """The mean of the interpolated (C, H, W) map over a box: cell by cell, where the midpoint rule is exact."""
    total = feature.new_zeros(len(feature))
    if x1 <= x0 or y1 <= y0:
        return total

    def pieces(start, end):
        cuts = [start, *(i for i in range(math.floor(start) + 1, math.ceil(end))), end]
        return zip(cuts[:-1], cuts[1:], strict=True)

    for (top, bottom), (left, right) in itertools.product(pieces(y0, y1), pieces(x0, x1)):
        total += (bottom - top) * (right - left) * interpolate(feature, (left + right) / 2, (top + bottom) / 2)
    return total / ((x1 - x0) * (y1 - y0))


BOXES = [  # of two images
    [[1.3, 0.2, 4.7, 3.1], [-2.5, -1.5, 3.0, 2.2], [0.0, 0.0, 5.0, 4.0], [2.25, 1.5, 2.5, 1.75], [5.0, 4.0, 5.9, 4.9]],
    [[2.0, 1.0, 5.0, 4.0], [4.1, 3.3, 9.0, 8.0], [-7.0, -7.0, -4.0, -3.0], [-1.0, -1.0, 6.0, 5.0], [2.0, 0.0, 3.0, 1.0]],
]  # fmt: skip


@pytest.mark.parametrize("output_size", [1, 7, (2, 3), (3, 1)])
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_prroi_pool_against_quadrature(output_size, scale):
    """Boxes inside, partly and wholly outside, on whole coordinates and off them, of two images."""
    feature = torch.randn(2, 2, 5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    got = resim.prroi_pool(feature, torch.tensor(BOXES, dtype=torch.float64) / scale, output_size, scale)
    rows, columns = (output_size, output_size) if isinstance(output_size, int) else output_size
    assert got.shape == (2, 5, 2, rows, columns)
    for n, r in itertools.product(range(2), range(5)):
        x0, y0, x1, y1 = BOXES[n][r]
        width, height = (x1 - x0) / columns, (y1 - y0) / rows
        for i, j in itertools.product(range(rows), range(columns)):
            bin = x0 + j * width, y0 + i * height, x0 + (j + 1) * width, y0 + (i + 1) * height
            torch.testing.assert_close(got[n, r, :, i, j], quadrature(feature[n], *bin), rtol=0, atol=1e-12)


def test_prroi_pool_against_a_fine_riemann_sum():
    """The definition at its plainest: the mean of very many interpolated points, by torch's own interpolation."""
    feature = torch.randn(1, 3, 7, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    box, n = (1.2, -0.7, 6.9, 4.4), 1500
    x = box[0] + (torch.arange(n, dtype=torch.float64) + 0.5) / n * (box[2] - box[0])
    y = box[1] + (torch.arange(n, dtype=torch.float64) + 0.5) / n * (box[3] - box[1])
    grid = torch.stack(torch.meshgrid(x / 4 - 1, y / 3 - 1, indexing="xy"), 2)[None]  # -1, 1: first and last sample
    points = F.grid_sample(feature, grid, align_corners=True, padding_mode="zeros")
    got = resim.prroi_pool(feature, torch.tensor([[box]], dtype=torch.float64), 1)
    torch.testing.assert_close(got[0, 0, :, 0, 0], points.mean((0, 2, 3)), rtol=0, atol=1e-5)


def test_prroi_pool_of_a_plane_is_roi_align():
    """On a plane both means are the value at a bin's centre: torchvision's operator with unshifted samples agrees."""
    y, x = torch.meshgrid(torch.arange(12.0), torch.arange(14.0), indexing="ij")
    feature = torch.stack([2 * x - y + 3, 0.5 * y])[None].double()
    boxes = torch.tensor([[[16.0, 20.0, 150.0, 120.0], [33.3, 64.0, 80.1, 112.7]]], dtype=torch.float64)
    for size in (1, 7):
        (ours,) = resim.prroi_pool(feature, boxes, size, 1 / 16)
        torch.testing.assert_close(ours, roi_align(feature, [*boxes], size, 1 / 16, sampling_ratio=2, aligned=False))


def test_prroi_pool_weights_of_the_papers_window():
    """48 pixels at stride 16 from a whole cell: 1/6, 1/3, 1/3, 1/6; over the edge of the map the rest is lost."""
    eye = torch.eye(14, dtype=torch.float64)[None, :, None].expand(-1, -1, 14, -1)  # channel j is 1 in column j
    boxes = torch.tensor([[[32.0, 32, 80, 80], [176, 32, 224, 80]]], dtype=torch.float64)
    inner, outer = resim.prroi_pool(eye, boxes, 1, 1 / 16)[0, :, :, 0, 0]
    torch.testing.assert_close(inner[:7], torch.tensor([0, 0, 1, 2, 2, 1, 0], dtype=torch.float64) / 6)
    torch.testing.assert_close(outer[10:], torch.tensor([0, 1, 2, 2], dtype=torch.float64) / 6)


def test_bins_of_one_cell_average_two_by_two_neighbours():
    feature = torch.randn(1, 3, 6, 8, generator=torch.Generator().manual_seed(2))
    got = resim.prroi_pool(feature, torch.tensor([[[1.0, 2, 6, 5]]]), (3, 5))
    torch.testing.assert_close(got[0], F.avg_pool2d(feature, 2, stride=1)[:, :, 2:5, 1:6])


def test_prroi_pool_gradients():
    """In the features and in the boxes, on whole coordinates as well (where a kink of the formula's parts lies)."""
    rng = torch.Generator().manual_seed(3)
    feature = torch.randn(2, 2, 5, 6, generator=rng, dtype=torch.float64, requires_grad=True)
    boxes, fixed = torch.tensor(BOXES, dtype=torch.float64), feature.detach()
    for size in (1, (2, 3)):
        assert torch.autograd.gradcheck(lambda x, size=size: resim.prroi_pool(x, boxes, size, 0.7), feature)
        for scale in (1.0, 0.7):
            assert torch.autograd.gradcheck(
                lambda b, s=scale, size=size: resim.prroi_pool(fixed, b, size, s),
                boxes.clone().requires_grad_(),
                atol=3e-5,
            )


def test_prroi_pool_of_empty_and_tiny_boxes():
    """Empty ones, among them those of invalid windows, and boxes that run backwards on one axis or on both."""
    feature = torch.randn(1, 2, 5, 6, generator=torch.Generator().manual_seed(4)).requires_grad_()
    empty = [[2.5, 1, 2.5, 3], [2, 1, 4, 1], [3, 3, 3, 3], [0, 0, 0, 0], [4, 1, 2, 3], [1, 3, 4, 2], [4, 3, 2, 1]]
    empty = torch.tensor([empty]).requires_grad_()
    pooled = resim.prroi_pool(feature, empty, 2)
    assert torch.equal(pooled, torch.zeros(1, 7, 2, 2, 2))
    pooled.sum().backward()
    assert torch.equal(feature.grad, torch.zeros_like(feature)) and torch.equal(empty.grad, torch.zeros_like(empty))
    for width in (1e-2, 1e-3, 1e-4):  # in fp32: the interpolated value, on a whole coordinate and off it
        for x, y in ((2.0, 3.0), (2.37, 1.61), (2.0, 1.5)):
            tiny = torch.tensor([[[x - width / 2, y - width / 2, x + width / 2, y + width / 2]]])
            got = resim.prroi_pool(feature, tiny, 1)[0, 0, :, 0, 0]
            torch.testing.assert_close(got, interpolate(feature[0], x, y), rtol=0, atol=4 * width + 1e-6)
    ones = torch.ones(1, 1, 5, 6)  # no cancellation: the weights of a tiny box still sum to 1
    for width in (1e-3, 1e-4, 1e-5):
        tiny = torch.tensor([[[3.7, 2.9, 3.7 + width, 2.9 + width]]])
        assert resim.prroi_pool(ones, tiny, 1).item() == pytest.approx(1, abs=1e-5)


def test_prroi_pool_takes_boxes_as_torchvision_does():
    """(N, L, 4) is its list with one (L, 4) for each image, in the same order; also without boxes or images."""
    feature = torch.arange(3.0).view(3, 1, 1, 1) + torch.zeros(3, 2, 5, 6)  # the values say which image was read
    feature[:, 1] += 10 * torch.arange(6.0)
    some = torch.tensor([[2.0, 1, 5, 4], [1, 1, 2, 3], [2, 0, 3, 1]])
    boxes = torch.stack([some, some.flip(0), some.roll(1, 0)])
    for size in (1, (2, 3)):
        got = resim.prroi_pool(feature, boxes, size)
        torch.testing.assert_close(got.flatten(0, 1), roi_align(feature, list(boxes), size, sampling_ratio=1))
    for n, L in ((3, 0), (0, 4), (0, 0)):
        none = torch.zeros(n, L, 4)
        got = resim.prroi_pool(feature[:n], none, (2, 3))
        assert got.shape == (n, L, 2, 2, 3)
        assert n == 0 or got.flatten(0, 1).shape == roi_align(feature, list(none), (2, 3)).shape


def test_prroi_pool_is_computed_in_fp32():
    feature, boxes = torch.randn(2, 4, 5, 6, generator=torch.Generator().manual_seed(6)), torch.tensor(BOXES)
    want = resim.prroi_pool(feature, boxes, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(resim.prroi_pool(feature, boxes, 2), want)
    half = resim.prroi_pool(feature.bfloat16(), boxes, 2)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half, resim.prroi_pool(feature.bfloat16().float(), boxes, 2).bfloat16())


def test_pool_regions_hands_boxes_to_either_operator():
    feature = torch.randn(3, 4, 14, 14, generator=torch.Generator().manual_seed(7))
    boxes = torch.rand(3, 5, 4, generator=torch.Generator().manual_seed(8)) * 100
    boxes[..., 2:] += 100
    prroi, align = (resim.pool_regions(feature, boxes, 16, name) for name in ("prroi", "roi_align"))
    assert prroi.shape == align.shape == (3, 5, 4)
    for b, a in itertools.product(range(3), range(5)):
        one, box = feature[b : b + 1], boxes[b, a].view(1, 1, 4)
        torch.testing.assert_close(prroi[b, a], resim.prroi_pool(one, box, 1, 1 / 16)[0, 0, :, 0, 0])
        torch.testing.assert_close(align[b, a], roi_align(one, [*box], 1, 1 / 16, aligned=True)[0, :, 0, 0])


@pytest.mark.parametrize("kernel", [1, 3, 4])
def test_neighbourhoods_against_a_loop(kernel):
    feature = torch.randn(2, 3, 6, 7, generator=torch.Generator().manual_seed(9))
    got = resim.neighbourhoods(feature, kernel)
    places = list(itertools.product(range(6 - kernel + 1), range(7 - kernel + 1)))
    assert got.shape == (2, len(places), 3)
    for n, (i, j) in enumerate(places):
        torch.testing.assert_close(got[:, n], feature[:, :, i : i + kernel, j : j + kernel].mean((2, 3)))


# ----------------------------------------------------------------------------------------------------------------------
# pyramid and heads
# ----------------------------------------------------------------------------------------------------------------------


PYRAMIDS = {"paper": (), "official": ("--preset", "official"), "simsiam": ("--framework", "simsiam")}


@pytest.mark.parametrize("side", [(8, 4, 2), (17, 9, 5)])  # sizes that double, and sizes that do not
@pytest.mark.parametrize("kind", PYRAMIDS)
def test_pyramid_against_torchvision(side, kind):
    """The state dict of the pyramid in torchvision's FPN over C2..C5 gives the same P4 and P3."""
    encoder = tiny(*PYRAMIDS[kind])[0].query.double()
    rng = torch.Generator().manual_seed(0)
    sizes = zip(encoder.trunk.widths, (40, *side), strict=True)
    lowest, *maps = (torch.randn(2, w, s, s, generator=rng, dtype=torch.float64) for w, s in sizes)
    for bias in (p for name, p in encoder.pyramid.named_parameters() if "bias" in name):
        nn.init.normal_(bias, generator=rng)  # they start as zeros
    got = encoder.pyramid(*maps)
    fpn = FeaturePyramidNetwork(encoder.trunk.widths, 256).double()
    result = fpn.load_state_dict(encoder.pyramid.state_dict(), strict=False)
    assert result.unexpected_keys == []
    left = {"inner_blocks.0", "layer_blocks.0", "layer_blocks.3"}
    left |= set() if kind == "official" else {"layer_blocks.1", "layer_blocks.2"}
    assert {name.rsplit(".", 2)[0] for name in result.missing_keys} == left
    if kind != "official":  # no output convolutions of ours: make torchvision's an identity
        for block in fpn.layer_blocks:
            nn.init.dirac_(block[0].weight)
            nn.init.zeros_(block[0].bias)
    want = fpn({str(i): x for i, x in enumerate([lowest, *maps])})
    assert got.keys() == {"p4", "p3"}
    torch.testing.assert_close(got["p4"], want["2"])
    torch.testing.assert_close(got["p3"], want["1"])


def test_exported_pyramid_loads_into_torchvisions_detector():
    state = build("--preset", "official").query.pyramid.state_dict()
    detector = torchvision.models.detection.maskrcnn_resnet50_fpn(weights=None, weights_backbone=None)
    result = detector.backbone.fpn.load_state_dict(state, strict=False)
    assert result.unexpected_keys == [] and len(state) == 10
    assert sorted({name.rsplit(".", 2)[0] for name in result.missing_keys}) == [
        "inner_blocks.0", "layer_blocks.0", "layer_blocks.3",
    ]  # fmt: skip


def build(*flags):
    """A method of the paper's size, with a short queue."""
    return resim.build(resim.get_args(["--data", "x", "--queue-size", "8", *flags]), torch.device("cpu"))


def test_heads_of_each_preset():
    """Section 3.4: two 3x3 convolutions to 128 with BN and ReLU between. The released code has one, in the pyramid."""
    for flags, inputs in (((), {"p4": 256, "p3": 256}), (("--levels", "c4"), {"c4": 1024})):
        encoder = build(*flags).query
        assert encoder.region_heads.keys() == inputs.keys() and (encoder.pyramid is None) == ("c4" in inputs)
        assert encoder.pyramid is None or not encoder.pyramid.layer_blocks
        for name, head in encoder.region_heads.items():
            first, norm, relu, second = head
            assert first.weight.shape == (128, inputs[name], 3, 3) and first.bias is None and first.padding == (1, 1)
            assert type(norm) is nn.BatchNorm2d and type(relu) is nn.ReLU
            assert second.weight.shape == (128, 128, 3, 3) and second.bias is not None and second.padding == (1, 1)
    encoder = build("--preset", "official").query
    assert [*encoder.region_heads] == ["p4", "p3"] and not encoder.region_heads.state_dict()
    assert [*encoder.pyramid.layer_blocks] == ["1", "2"]
    for (head,) in encoder.pyramid.layer_blocks.values():
        assert type(head) is nn.Conv2d and head.weight.shape == (256, 256, 3, 3) and head.padding == (1, 1)
        assert (head.bias == 0).all() and head.weight.var().item() == pytest.approx(1 / (256 * 9), rel=0.02)
    assert {name: block[0].weight.shape for name, block in encoder.pyramid.inner_blocks.items()} == {
        "1": (256, 512, 1, 1), "2": (256, 1024, 1, 1), "3": (256, 2048, 1, 1),
    }  # fmt: skip
    assert [m.weight.shape for m in encoder.image_head if isinstance(m, nn.Linear)] == [(2048, 2048), (128, 2048)]


def test_image_embedding_is_torchvisions_resnet_with_mocos_head():
    """Released names put the encoder's weights into a ResNet with fc = linear, ReLU, linear: the same embeddings."""
    method, _ = tiny("--preset", "official")
    resnet = torchvision.models.resnet18()
    resnet.fc = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 128))
    state, prefix = released.to_released(method.state_dict()), "module.encoder_q."
    resnet.load_state_dict(
        {name.removeprefix(prefix): x for name, x in state.items() if prefix in name and "fpn" not in name}
    )
    view = tiny_batch(n=4)[0]
    normalise = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    torch.testing.assert_close(method.query(view)[0], resnet(normalise(view / 255)), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "flags, share", [("", 0.15), ("--levels c4", 0.063), ("--preset official", 0.185)], ids=["fpn", "c4", "official"]
)
def test_heads_share_of_multiply_adds(flags, share):
    """R24, R25: 15 % of ResNet-50's for the pyramid (the paper's hours: 17 % more), 6 % for C4."""
    encoder = build(*flags.split()).query.to("meta")
    image = torch.zeros(2, 3, 224, 224, dtype=torch.uint8, device="meta")
    with FlopCounterMode(display=False) as all_of_it:
        encoder.encode(image)
    with FlopCounterMode(display=False) as moco:
        encoder.image_head(encoder.trunk(common.normalise(image))[-1].mean((2, 3)))
    assert all_of_it.get_total_flops() / moco.get_total_flops() - 1 == pytest.approx(share, abs=0.005)


# ----------------------------------------------------------------------------------------------------------------------
# losses
# ----------------------------------------------------------------------------------------------------------------------


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=-1)


def loss_case(B=4, A=5, D=6, M=9):
    valid = torch.rand(B, A, generator=torch.Generator().manual_seed(1)) > 0.4
    valid[2] = False  # an image without valid windows
    return unit(B, A, D).requires_grad_(), unit(B, A, D, seed=2), valid, unit(M, D, seed=3)


def loop_region_loss(q, k, valid, negatives, tau, per_image):
    """Eq. 2, term by term; with 1/n for each image, or one mean over everything."""
    images = []
    for b in range(len(q)):
        rows = []
        for i in range(q.shape[1]):
            if valid[b, i]:
                positive = torch.exp(q[b, i] @ k[b, i] / tau)
                rows.append(-torch.log(positive / (positive + torch.exp(negatives @ q[b, i] / tau).sum())))
        images.append(rows)
    if per_image:
        means = [sum(rows) / len(rows) for rows in images if rows]
        return sum(means) / len(means)
    rows = sum(images, [])
    return sum(rows) / len(rows)


@pytest.mark.parametrize("per_image", [True, False])
def test_region_loss_against_eq_2_value_and_gradient(per_image):
    q, k, valid, negatives = loss_case()
    fast = resim.region_contrastive_loss(q, k, valid, negatives, 0.2, per_image)
    slow = loop_region_loss(q, k, valid, negatives, 0.2, per_image)
    torch.testing.assert_close(fast, slow, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(loss, q)[0] for loss in (fast, slow)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)
    assert gradients[0].abs().max() > 1e-3 and not gradients[0][~valid].any()


def test_region_loss_over_all_windows_is_cross_entropy():
    """The released code's call: cross-entropy with target 0 and ignore_index -1."""
    q, k, valid, negatives = loss_case()
    logits = torch.cat([(q * k).sum(2, keepdim=True), q @ negatives.T], 2).flatten(0, 1) / 0.2
    want = F.cross_entropy(logits, valid.flatten().long() - 1, ignore_index=-1)
    torch.testing.assert_close(resim.region_contrastive_loss(q, k, valid, negatives, 0.2, per_image=False), want)


@pytest.mark.parametrize("per_image", [True, False])
def test_no_valid_window_gives_zero_and_zero_gradients(per_image):
    q, k, valid, negatives = loss_case()
    loss = resim.region_contrastive_loss(q, k, valid & False, negatives, 0.2, per_image)
    assert loss.item() == 0.0
    assert torch.equal(torch.autograd.grad(loss, q)[0], torch.zeros_like(q))
    cosine = resim.region_cosine_loss(q[valid & False], k[valid & False], valid & False, per_image)
    assert cosine.item() == 0.0 and torch.equal(torch.autograd.grad(cosine, q)[0], torch.zeros_like(q))


def test_image_loss_is_cross_entropy_with_target_zero():
    q, k, queue = unit(6, 5).requires_grad_(), unit(6, 5, seed=1), unit(11, 5, seed=2)
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], 1) / 0.07
    want = F.cross_entropy(logits, torch.zeros(6, dtype=torch.int64))
    got = resim.image_contrastive_loss(q, k, queue, 0.07)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, q)[0], torch.autograd.grad(want, q)[0])


def test_chunked_negatives_equal_the_whole_in_value_and_gradient(monkeypatch):
    q, queue = unit(7, 5).requires_grad_(), unit(11, 5, seed=1)
    whole = torch.logsumexp(q @ queue.T / 0.2, 1)
    weights = torch.arange(1.0, 8, dtype=torch.float64)
    split = torch.Tensor.split
    for rows in (1, 2, 10**6):  # one row at a time, two, all
        monkeypatch.setattr(torch.Tensor, "split", lambda x, _, rows=rows: split(x, rows))
        chunked = resim.negative_logsumexp(q, queue, 0.2)
        torch.testing.assert_close(chunked, whole, rtol=1e-12, atol=0)
        gradients = [torch.autograd.grad((x * weights).sum(), q, retain_graph=True)[0] for x in (chunked, whole)]
        torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-13)


def test_no_tensor_of_windows_times_negatives():
    """A group of 32 images against 36,864 gathered negatives: the logits never exist all at once."""
    q, k, valid = unit(32, 36, 16).float().requires_grad_(), unit(32, 36, 16, seed=1).float(), torch.ones(32, 36).bool()
    with LargestTensor() as watch:
        resim.region_contrastive_loss(q, k, valid, unit(36864, 16, seed=2).float(), 0.2).backward()
    assert 36864 * 16 <= watch.elements <= 2**24 < 32 * 36 * 36864


def test_simsiam_losses_and_their_stop_gradient():
    valid = loss_case()[2]
    prediction, projection = (torch.randn(int(valid.sum()), 6, dtype=torch.float64, requires_grad=True) for _ in "pz")
    loss = resim.region_cosine_loss(prediction, projection, valid)
    where, images = valid.nonzero().tolist(), []
    for b in range(4):
        rows = [r for r, (image, _) in enumerate(where) if image == b]
        cosines = [F.cosine_similarity(prediction[r], projection[r], dim=0) for r in rows]
        images += [sum(cosines) / len(cosines)] if cosines else []
    assert loss.item() == pytest.approx(-(sum(images) / 3).item(), abs=1e-12)
    loss.backward()
    assert projection.grad is None and prediction.grad.abs().max() > 0
    p, z = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True).unbind()
    assert resim.image_cosine_loss(p, z).item() == pytest.approx(
        -(F.normalize(p) * F.normalize(z)).sum(1).mean().item()
    )
    assert torch.autograd.grad(resim.image_cosine_loss(p, z), z, allow_unused=True)[0] is None


# ----------------------------------------------------------------------------------------------------------------------
# one iteration
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def groups_of_four(monkeypatch):
    monkeypatch.setattr(common, "GROUP", 4)


def tiny(*flags):
    base = "--data scenes --arch resnet18 --size 64 --batch-size 8 --queue-size 20 --window 16 16"
    args = resim.get_args([*base.split(), *flags])
    return resim.build(args, torch.device("cpu")), args


def tiny_batch(seed=0, n=8):
    """Views of random blocks; crops that overlap more or less."""
    rng = torch.Generator().manual_seed(seed)
    views = torch.randint(0, 256, (2, n, 3, 4, 4), generator=rng, dtype=torch.uint8)
    views = views.repeat_interleave(16, 3).repeat_interleave(16, 4)
    crops = torch.randint(0, 40, (2, n, 4), generator=rng).float()
    crops[..., 2:] += 80
    return views[0], views[1], crops[0], crops[1]


@pytest.mark.parametrize("size, window, step, kernel", [(64, 16, 16, 1), (96, 48, 32, 3)])
@pytest.mark.parametrize("preset", ["paper", "official"])
def test_a_level_against_double_loops_with_its_in_batch_negatives(preset, size, window, step, kernel):
    """Eqs. 1 and 2 from two feature maps: pooled windows, neighbourhoods of all images (P4) or of the group (P3).

    Small windows, and the paper's, whose negatives are 3 x 3 neighbourhoods on P4 as well.
    """
    method, _ = tiny("--preset", preset, "--size", str(size), "--window", str(window), str(step))
    _, _, crop_q, crop_k = tiny_batch()
    crop_k[2] += 1000  # an image without valid windows
    crop_k[4:, 0] += 30  # the second group has fewer
    kernels = {"p4": kernel, "p3": 3}
    for level in method.levels:
        pairs = resim.region_pairs(crop_q, crop_k, size, level.window, level.step)
        side, n = size // level.stride, kernels[level.name]
        map_q, map_k = torch.randn(2, 8, 6, side, side, generator=torch.Generator().manual_seed(1))
        map_q.requires_grad_()
        loss, values = method.compare_regions(level, pairs, map_q, map_k)
        q, k = (
            resim.prroi_pool(maps, boxes, 1, 1 / level.stride)[..., 0, 0]
            for maps, boxes in ((map_q, pairs.boxes_q), (map_k, pairs.boxes_k))
        )
        q, k = (x / x.norm(dim=2, keepdim=True).clamp(min=1e-12) for x in (q, k))
        near = [[] for _ in range(8)]
        for b, i, j in itertools.product(range(8), range(side - n + 1), range(side - n + 1)):
            vector = sum(map_k[b, :, i + di, j + dj] for di in range(n) for dj in range(n))
            near[b].append(vector / vector.norm())
        groups = []
        for images in (range(0, 4), range(4, 8)):
            negatives = torch.stack([n for b in (range(8) if level.name == "p4" else images) for n in near[b]])
            some = slice(images.start, images.stop)
            groups.append(loop_region_loss(q[some], k[some], pairs.valid[some], negatives, 0.2, preset == "paper"))
        want = (groups[0] + groups[1]) / 2
        torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
        gradients = [torch.autograd.grad(x, map_q, retain_graph=True)[0] for x in (loss, want)]
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)
        assert gradients[0].abs().max() > 1e-4 and pairs.valid[:4].sum() != pairs.valid[4:].sum()
        assert values[f"loss_{level.name}"] == loss.detach()
        assert values[f"chance_{level.name}"] == pytest.approx(math.log(len(negatives) + 1))


def test_identical_pixels_and_crops_give_logits_of_one_over_tau(monkeypatch):
    """In eval mode a view and its copy agree in every window: 36 (C4, P4) and 64 (P3) valid, boxes equal, q . k = 1."""
    base = "--data x --arch resnet18 --batch-size 2 --queue-size 4 --ema 1".split()
    seen = []
    original = resim.region_contrastive_loss
    monkeypatch.setattr(resim, "region_contrastive_loss", lambda *a: seen.append(a) or original(*a))
    for flags, windows in (((), [36, 64]), (("--preset", "official"), [36, 64]), (("--levels", "c4"), [36])):
        method = resim.build(resim.get_args([*base, *flags]), torch.device("cpu")).eval()
        view = torch.randint(0, 256, (2, 3, 224, 224), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        crop = torch.tensor([[3.0, 5, 203, 155], [0, 0, 77, 99]])
        seen.clear()
        with torch.no_grad():
            method(method.query, view, view, crop, crop, 0)
        assert [call[2].shape for call in seen] == [(2, n) for n in windows] and all(call[2].all() for call in seen)
        for q, k, *_ in seen:
            torch.testing.assert_close((q * k).sum(2) / 0.2, torch.full(q.shape[:2], 5.0), rtol=1e-4, atol=0)


def test_regions_are_pooled_from_unshuffled_keys_of_the_key_network():
    seen, outputs = [], {}
    method, _ = tiny("--ema", "1")
    with torch.no_grad():
        for parameter in method.key.parameters():
            parameter.mul_(1.01)
    compare = method.compare_regions
    method.compare_regions = lambda *a: seen.append(a) or compare(*a)
    for name in ("query", "key"):
        getattr(method, name).register_forward_hook(lambda m, i, out, name=name: outputs.update({name: out[1]}))
    method(method.query, *tiny_batch(), step=0)
    back = torch.argsort(torch.randperm(8, generator=common.generator("shuffle", 0, 0)))
    assert [call[0].name for call in seen] == ["p4", "p3"]
    for i, (level, pairs, map_q, map_k) in enumerate(seen):
        assert torch.equal(map_q, outputs["query"][i]) and torch.equal(map_k, outputs["key"][i][back])
        assert map_q.requires_grad and not map_k.requires_grad and not torch.equal(map_k, outputs["key"][i])
        assert all(map(torch.equal, pairs, resim.region_pairs(*tiny_batch()[2:], 64, level.window, level.step)))


def test_key_network_starts_equal_and_gets_no_gradient():
    for flags in ((), ("--levels", "c4"), ("--preset", "official")):
        method, _ = tiny(*flags)
        for query, key in zip(method.query.parameters(), method.key.parameters(), strict=True):
            assert torch.equal(query, key) and query is not key and not key.requires_grad
        method(method.query, *tiny_batch(), step=0)[0].backward()
        assert all(p.grad is None for p in method.key.parameters())
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in method.query.parameters())


def test_momentum_update_before_the_keys_and_parameters_only():
    method, _ = tiny("--ema", "0.75")
    with torch.no_grad():
        for p in method.query.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    query, key = ([p.detach().clone() for p in network.parameters()] for network in (method.query, method.key))
    seen = []
    method.key.register_forward_pre_hook(lambda m, _: seen.append([p.clone() for p in m.parameters()]))
    method(method.query, *tiny_batch(), step=0)
    for now, q, k in zip(seen[0], query, key, strict=True):
        torch.testing.assert_close(now, 0.75 * k + 0.25 * q)
    own, taken = ([b for b in network.buffers() if b.ndim] for network in (method.key, method.query))
    assert len(seen) == 1 and not any(torch.equal(a, b) for a, b in zip(own, taken, strict=True))


def test_image_loss_sees_the_queue_as_it_was_and_regions_have_none(monkeypatch):
    method, _ = tiny()
    before, seen, passes = method.image_queue.vectors.clone(), [], []
    original = resim.image_contrastive_loss
    monkeypatch.setattr(
        resim,
        "image_contrastive_loss",
        lambda q, k, queue, tau: seen.append(queue.clone()) or original(q, k, queue, tau),
    )
    method.key.register_forward_hook(lambda m, i, out: passes.append(out))
    method(method.query, *tiny_batch(), step=0)
    assert len(seen) == 1 and torch.equal(seen[0], before)
    back = torch.argsort(torch.randperm(8, generator=common.generator("shuffle", 0, 0)))
    want = F.normalize(passes[0][0][back], dim=1)
    assert torch.equal(method.image_queue.vectors[:8], want) and torch.equal(method.image_queue.vectors[8:], before[8:])
    assert [name for name, _ in method.named_buffers() if "queue" in name] == [
        "image_queue.vectors",
        "image_queue.pointer",
    ]


@pytest.mark.parametrize("framework", ["moco", "simsiam"])
def test_losses_and_pooling_stay_in_fp32_under_amp(framework, monkeypatch):
    losses = {f"{of}_{'contrastive' if framework == 'moco' else 'cosine'}_loss" for of in ("image", "region")}
    seen, outputs = [], []
    for name in (*losses, "prroi_pool"):
        original = getattr(resim, name)
        note = lambda *a, f=original, n=name: seen.append((n, a, torch.is_autocast_enabled("cpu"))) or f(*a)  # noqa: E731
        monkeypatch.setattr(resim, name, note)
    method, _ = tiny("--amp", "bf16", "--framework", framework)
    for network in filter(None, (method.query, method.key)):
        for module in (network.image_head, *network.region_heads.values()):
            module.register_forward_hook(lambda m, i, out: outputs.append((type(m[-1]), out.dtype)))
    method(method.query, *tiny_batch(), step=0)
    assert {name for name, _, _ in seen} == {*losses, "prroi_pool"}
    for name, arguments, autocast in seen:
        assert not autocast or name == "prroi_pool"  # which turns it off by itself
        assert {x.dtype for x in arguments if isinstance(x, torch.Tensor)} <= {torch.float32, torch.bool}
    assert {dtype for _, dtype in outputs} == {torch.bfloat16}  # the encoders do run in bf16
    assert len(outputs) == (2 * 2 * 3 if framework == "moco" else 2 * 3)  # two networks with two groups, or two views


@pytest.mark.parametrize("flags", [(), ("--levels", "c4"), ("--preset", "official")])
def test_total_loss_adds_the_levels_and_weighs_the_image(flags):
    for weight in (0.0, 2.5):
        method, _ = tiny("--loss-weight", str(weight), *flags)
        loss, values = method(method.query, *tiny_batch(), step=0)
        levels = [values[name] for name in values if name in ("loss_c4", "loss_p4", "loss_p3")]
        assert len(levels) == (1 if "c4" in flags else 2)
        assert loss.item() == pytest.approx((sum(levels) + weight * values["loss_image"]).item(), rel=1e-6)


@pytest.mark.parametrize(
    "flags", [(), ("--preset", "official"), ("--levels", "c4"), ("--framework", "simsiam"), ("--framework", "simsiam", "--levels", "c4")]
)  # fmt: skip
def test_batches_without_valid_windows_train_on(flags):
    method, _ = tiny(*flags)
    view_q, view_k, crop_q, crop_k = tiny_batch()
    optimizer = torch.optim.SGD(method.query.parameters(), 0.01)
    names = [f"loss_{level.name}" for level in method.levels]
    for shift in (1000, 0):
        loss, values = method(method.query, view_q, view_k, crop_q, crop_k + shift, step=0)
        optimizer.zero_grad()
        loss.backward()
        if shift:
            assert [values[name].item() for name in names] == [0] * len(names)
            assert all(values[name].item() == 1 for name in values if name.startswith("empty"))
            of_regions = [p for name, p in method.query.named_parameters() if "region" in name or "pyramid" in name]
            assert of_regions and all((p.grad == 0).all() for p in of_regions)
        assert all(p.grad is not None and p.grad.isfinite().all() for p in method.query.parameters())
        assert loss.item() == pytest.approx(sum(values[name].item() for name in (*names, "loss_image")), abs=1e-5)
        optimizer.step()
    assert all(values[name].item() != 0 for name in names)
    assert all(b.isfinite().all() for b in method.buffers())


@pytest.mark.parametrize("pool", ["prroi", "roi_align"])
@pytest.mark.parametrize("flags", [(), ("--preset", "official"), ("--framework", "simsiam")])
def test_invalid_regions_never_reach_a_loss(flags, pool, monkeypatch):
    """Whatever their boxes are, zeros or any others, losses and gradients are the same, and finite."""
    region_pairs, pool_regions, found, pooled = resim.region_pairs, resim.pool_regions, [], []
    monkeypatch.setattr(resim, "pool_regions", lambda *a: pooled.append((a[1], a[3])) or pool_regions(*a))

    def others(*a):
        """Other boxes in place of the invalid ones, in both views."""
        pairs = region_pairs(*a)
        assert 0.1 < pairs.valid.float().mean() < 0.9 and not pairs.boxes_k[~pairs.valid].any()
        corner = 40 * torch.rand(2, *pairs.valid.shape, 2, generator=torch.Generator().manual_seed(0))
        boxes_q, boxes_k = torch.cat([corner, corner + 8], 3)
        keep = pairs.valid[..., None]
        return pairs._replace(boxes_q=pairs.boxes_q.where(keep, boxes_q), boxes_k=pairs.boxes_k.where(keep, boxes_k))

    for boxes in (region_pairs, others):
        monkeypatch.setattr(resim, "region_pairs", boxes)
        method, _ = tiny("--pool", pool, *flags)
        loss, values = method(method.query, *tiny_batch(), step=0)
        loss.backward()
        gradients = {name: p.grad for name, p in method.query.named_parameters()}
        assert all(x.isfinite().all() for x in (loss, *gradients.values()))
        found.append((loss, {name: x for name, x in values.items() if torch.is_tensor(x)}, gradients))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
    assert len(pooled) == 8 and {kind for _, kind in pooled} == {pool}
    assert not any(torch.equal(a, b) for (a, _), (b, _) in zip(pooled[:4], pooled[4:], strict=True))


@pytest.mark.parametrize("framework", ["moco", "simsiam"])
def test_health_values_against_a_count(framework):
    method, _ = tiny("--framework", framework)
    rng, valid = torch.Generator().manual_seed(0), loss_case()[2]
    boxes = 30 * torch.rand(4, 5, 4, generator=rng) + torch.tensor([0, 0, 30, 30])
    pairs, R = resim.Pairs(boxes, boxes, valid), int(valid.sum())
    if framework == "moco":
        query, key = torch.randn(2, 4, 6, 8, 8, generator=rng)
        vectors = torch.stack([quadrature(query[b], *(boxes[b, a] / 8).tolist()) for b, a in valid.nonzero().tolist()])
    else:
        query, key = ([*torch.randn(2, R, 6, generator=rng)] for _ in "qk")
        vectors = key[0]  # projections
    (_, level), flags = method.levels, valid.tolist()
    _, values = method.compare_regions(level, pairs, query, key)
    assert values["valid_p3"].item() == pytest.approx(sum(map(sum, flags)) / 20)
    assert values["empty_p3"].item() == pytest.approx(sum(not any(row) for row in flags) / 4)
    vectors = (vectors / vectors.norm(dim=1, keepdim=True)).numpy()
    assert values["std_p3"].item() == pytest.approx(np.std(vectors, axis=0).mean(), abs=1e-6)


@pytest.mark.parametrize("processes", [1, 8])
def test_yardsticks(processes, monkeypatch):
    """ln(negatives + 1) with the paper's counts, on 1 process or 8, and 1 / sqrt(D).

    They are 65,536 in the queue, 12 x 12 x 256 on C4 and P4, and 26 x 26 x 32 on P3.
    """
    monkeypatch.setattr(common, "GROUP", 32)
    monkeypatch.setattr(resim, "all_gather", lambda x: x.repeat(processes, 1, 1))
    monkeypatch.setattr(resim, "region_contrastive_loss", lambda q, *_: q.sum())  # the values alone count here
    B = 256 // processes
    pairs = resim.Pairs(*torch.tensor([0.0, 0, 48, 48]).expand(2, B, 1, 4), torch.ones(B, 1, dtype=torch.bool))
    for name in ("c4", "fpn"):
        method, _ = tiny("--levels", name, "--window", "48", "32")
        method.image_queue = common.Queue(65536, 128, torch.Generator().manual_seed(0))
        _, values = method.compare_images(*torch.randn(2, 4, 128))
        assert values["loss_chance"] == pytest.approx(math.log(65_537))
        assert values["std_spread"] == pytest.approx(128**-0.5)
        for level in method.levels:
            side, D = 224 // level.stride, 4
            _, values = method.compare_regions(level, pairs, *torch.randn(2, B, D, side, side))
            chance = math.log((21_632 if level.name == "p3" else 36_864) + 1)
            assert values[f"chance_{level.name}"] == pytest.approx(chance) and values[f"spread_{level.name}"] == 0.5


@pytest.mark.parametrize(
    "flags, widths",
    [
        ("", dict(std_spread=128, spread_p4=128, spread_p3=128)),
        ("--levels c4", dict(std_spread=128, spread_c4=128)),
        ("--preset official", dict(std_spread=128, spread_p4=256, spread_p3=256)),
        ("--framework simsiam", dict(std_spread=512, spread_p4=256, spread_p3=128)),  # a quarter of ResNet-50's
        ("--framework simsiam --levels c4", dict(std_spread=512, spread_c4=256)),
    ],
)
def test_numbers_to_compare_with_are_plain(flags, widths):
    """A log averages tensors and takes numbers as they are. SimSiam's losses have no chance."""
    method, _ = tiny(*flags.split())
    loss, values = method(method.query, *tiny_batch(), step=0)
    plain = {name: value for name, value in values.items() if not torch.is_tensor(value)}
    want = {name: D**-0.5 for name, D in widths.items()}
    if "simsiam" not in flags:  # 20 keys; 4 x 4 cells of 8 images; 6 x 6 neighbourhoods of 4
        counts = dict(loss_chance=20, chance_c4=128, chance_p4=128, chance_p3=144)
        kept = {"loss_chance", *(f"chance_{level.name}" for level in method.levels)}
        want |= {name: math.log(count + 1) for name, count in counts.items() if name in kept}
    assert plain == pytest.approx(want) and all(type(value) is float for value in plain.values())
    assert all(values[name].ndim == 0 for name in values.keys() - plain.keys()) and loss.ndim == 0


@pytest.fixture
def folder(tmp_path):
    """A temporary folder that is removed afterwards, because checkpoints are large."""
    yield tmp_path
    shutil.rmtree(tmp_path)


# ----------------------------------------------------------------------------------------------------------------------
# SimSiam
# ----------------------------------------------------------------------------------------------------------------------

TABLE_7 = {"image": (2048, 2048, 512), "p4": (256, 1024, 256), "p3": (256, 512, 128), "c4": (1024, 1024, 256)}


@pytest.mark.parametrize("levels", ["c4", "fpn"])
def test_simsiam_heads_have_table_7s_dimensions(levels):
    encoder = build("--framework", "simsiam", "--levels", levels).query
    heads = {"image": (encoder.image_head, encoder.image_predictor)}
    for name in encoder.region_heads:
        heads[name] = encoder.region_heads[name], encoder.region_predictors[name]
    assert set(heads) == {"image", *(["c4"] if levels == "c4" else ["p4", "p3"])}
    for name, (projector, predictor) in heads.items():
        inputs, E, bottleneck = TABLE_7[name]
        linear = [m for m in projector if isinstance(m, nn.Linear)]
        assert [tuple(m.weight.shape) for m in linear] == [(E, inputs), (E, E), (E, E)]
        assert all(m.bias is None for m in linear) and isinstance(projector[-1], nn.BatchNorm1d)
        assert projector[-1].weight is None and sum(isinstance(m, nn.ReLU) for m in projector) == 2
        one, norm, relu, two = predictor
        assert one.weight.shape == (bottleneck, E) and one.bias is None and isinstance(norm, nn.BatchNorm1d)
        assert two.weight.shape == (E, bottleneck) and two.bias is not None
    assert all((block.bn3.weight == 0).all() for block in encoder.trunk.layer4)  # B16, R27


def test_simsiam_iteration_by_hand():
    method, _ = tiny("--framework", "simsiam")
    again = copy.deepcopy(method)
    views = tiny_batch()
    loss, values = method(method.query, *views, step=0)
    loss.backward()
    assert all(p.grad is not None for p in method.query.parameters())
    encoder, total = again.query, 0
    z, p, maps = [], [], []
    for view in views[:2]:
        stages = encoder.trunk(common.normalise(view))
        z.append(encoder.image_head(stages[3].mean((2, 3))))
        p.append(encoder.image_predictor(z[-1]))
        maps.append(encoder.pyramid(*stages[1:]))
    image = -(F.cosine_similarity(p[0], z[1]).mean() + F.cosine_similarity(p[1], z[0]).mean()) / 2
    assert values["loss_image"].item() == pytest.approx(image.item(), abs=1e-5)
    for level in again.levels:
        pairs = resim.region_pairs(views[2], views[3], 64, level.window, level.step)
        rows = [[], []]
        for b, a in pairs.valid.nonzero().tolist():  # valid windows alone, one by one
            for side, boxes in enumerate((pairs.boxes_q, pairs.boxes_k)):
                box = boxes[b, a].view(1, 1, 4)
                one = resim.prroi_pool(maps[side][level.name][b : b + 1], box, 1, 1 / level.stride)
                rows[side].append(one[0, 0, :, 0, 0])
        z = [encoder.region_heads[level.name](torch.stack(r)) for r in rows]
        p = [encoder.region_predictors[level.name](x) for x in z]
        cosine = (F.cosine_similarity(p[0], z[1]) + F.cosine_similarity(p[1], z[0])) / 2
        images = [cosine[pairs.valid.nonzero()[:, 0] == b].mean() for b in range(8) if pairs.valid[b].any()]
        want = -sum(images) / len(images)
        assert values[f"loss_{level.name}"].item() == pytest.approx(want.item(), abs=1e-5)
        total = total + want
    assert loss.item() == pytest.approx((total + image).item(), abs=2e-5)


def test_a_single_valid_region_is_left_out_of_simsiam():
    method, _ = tiny("--framework", "simsiam", "--levels", "c4")
    crop_q = torch.tensor([[0.0, 0, 64, 64], [0, 0, 64, 64]])
    crop_k = torch.tensor([[-40.0, -40, 24, 24], [900, 900, 964, 964]])  # one window of the first image at most
    assert resim.region_pairs(crop_q, crop_k, 64, 16, 16).valid.sum() == 1
    view = tiny_batch(n=2)[0]
    loss, values = method(method.query, view, view, crop_q, crop_k, step=0)
    loss.backward()
    assert values["loss_c4"].item() == 0 and values["empty_c4"].item() == 1
    assert all(p.grad is not None and p.grad.isfinite().all() for p in method.query.parameters())


# ----------------------------------------------------------------------------------------------------------------------
# what the regions see: similarities, picture, number
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("framework", ["moco", "simsiam"])
def test_see_against_loops(framework, monkeypatch):
    """What is drawn: similarities of each pooled window of view q to each neighbourhood of view k.

    They are of the networks that the loss has. MoCo's key network has weights of its own here. All images share their
    batch statistics.
    """
    method, _ = tiny("--framework", framework, "--window", "24", "24")
    rng, drawn = torch.Generator().manual_seed(0), []
    monkeypatch.setattr(look, "draw_windows", lambda *a: drawn.append(a))
    with torch.no_grad():
        for p in method.parameters():  # two networks of MoCo, and SimSiam's blocks no longer identities
            p.add_(0.02 * torch.randn(p.shape, generator=rng))
    views, (key, query) = tiny_batch(), (method.key or method.query, method.query)
    with torch.no_grad():
        method.draw("x.png", *views)
        ((path, view_q, view_k, shared_q, shared_k, seen),) = drawn
        assert path == "x.png" and view_q is views[0] and view_k is views[1]
        for crop, other, shared in ((views[2], views[3], shared_q), (views[3], views[2], shared_k)):
            for (x0, y0, x1, y1), (a0, b0, a1, b1), box in zip(
                *(t.tolist() for t in (crop, other, shared)), strict=True
            ):
                want = [(x - x0) * 64 / (x1 - x0) for x in (a0, a1)], [(y - y0) * 64 / (y1 - y0) for y in (b0, b1)]
                assert box == pytest.approx([want[0][0], want[1][0], want[0][1], want[1][1]], abs=1e-3)
        stages_q, stages_k = query.trunk(common.normalise(views[0])), key.trunk(common.normalise(views[1]))
        maps = [network.pyramid(*stages[1:]) for network, stages in ((query, stages_q), (key, stages_k))]
        for level, kernel, (*given, pairs, similarity) in zip(method.levels, (2, 3), seen, strict=True):
            assert given == [level.name, level.stride, kernel]
            side = 64 // level.stride - kernel + 1
            map_q, map_k = (x[level.name] for x in maps)
            if framework == "moco":
                map_q, map_k = query.region_heads[level.name](map_q), key.region_heads[level.name](map_k)
            starts = range(0, 64 - level.window, level.step)
            windows = [[x, y, x + level.window, y + level.window] for y in starts for x in starts]
            q = [quadrature(m, *(edge / level.stride for edge in box)) for m in map_q for box in windows]
            places = list(itertools.product(range(side), range(side)))
            near = [m[:, i : i + kernel, j : j + kernel].mean((1, 2)) for m in map_k for i, j in places]
            q, near = torch.stack(q), torch.stack(near)
            if framework == "simsiam":
                project, predict = query.region_heads[level.name], query.region_predictors[level.name]
                q, near = predict(project(q)), project(near)
            want = torch.empty(8, len(windows), side, side)
            for b, a, (n, (i, j)) in itertools.product(range(8), range(len(windows)), enumerate(places)):
                one, other = q[b * len(windows) + a], near[b * len(places) + n]
                want[b, a, i, j] = one @ other / (one.norm() * other.norm())
            torch.testing.assert_close(similarity, want, rtol=0, atol=1e-4)
            assert similarity.std() > 0.05
            grid = resim.region_pairs(*views[2:], 64, level.window, level.step)
            assert all(torch.equal(x, y) for x, y in zip(pairs, grid, strict=True)) and pairs.valid.any()


@torch.no_grad()
@pytest.mark.parametrize("flags", [(), ("--levels", "c4"), ("--framework", "simsiam")])
def test_method_measures_c4_of_both_networks(flags):
    method, _ = tiny(*flags)
    if method.key:
        nn.init.normal_(method.key.trunk.conv1.weight, std=0.1)
    view_q, view_k, crop_q, crop_k = tiny_batch()
    c4_q = method.query.trunk(common.normalise(view_q))[2].flatten(2)
    c4_k = (method.key or method.query).trunk(common.normalise(view_k))[2].flatten(2)
    cosines = F.cosine_similarity(c4_q[:, :, :, None], c4_k[:, :, None], dim=1)
    hits, chance, count = look.correspondence(cosines, crop_q, crop_k, 4, 4)
    assert method.measure(view_q, view_k, crop_q, crop_k) == (hits, chance, count) and 0 < hits < count


def test_picture_shows_overlap_matching_windows_and_the_heat_in_its_place(tmp_path):
    """Pixels of a picture of plain views: shared parts bright, boxes of a colour in both views, heat where it belongs."""
    size, zoom = 112, 2  # panels have 224 pixels a side
    view_q, view_k = (
        torch.tensor(c, dtype=torch.uint8).view(1, 3, 1, 1).expand(2, 3, size, size)
        for c in ((180, 30, 60), (30, 150, 90))
    )
    shared_q = torch.tensor([[28.0, 14, 140, 126]]).expand(
        2, 4
    )  # the key view shows what lies 28 and 14 pixels further
    shared_k = torch.tensor([[-28.0, -14, 84, 98]]).expand(2, 4)
    boxes_q = torch.tensor([[40.0, 20, 60, 40], [70, 60, 100, 100]]).expand(2, 2, 4)
    boxes_k = torch.tensor([[6.0, 8, 24, 30], [60, 78, 80, 94]]).expand(2, 2, 4)  # not where they belong: told apart
    valid = torch.tensor([[True, True], [False, False]])
    similarity, peaks = torch.full((2, 2, 5, 5), -0.2), ((1, 3), (3, 2))  # of each window, row and column
    for window, (i, j) in enumerate(peaks):
        similarity[0, window, i, j] = 0.7
    levels = [("p4", 16, 3, resim.Pairs(boxes_q, boxes_k, valid), similarity)]
    look.draw_windows(tmp_path / "regions.png", view_q, view_k, shared_q, shared_k, levels)
    picture = Image.open(tmp_path / "regions.png").convert("RGB")

    def pixel(row, column, x, y):
        """x, y: in pixels of the view."""
        return picture.getpixel((6 + column * 230 + round(zoom * x), 20 + row * 230 + round(zoom * y)))

    def edges(row, column, box):
        x0, y0, x1, y1 = box.tolist()
        x, y = (x0 + x1) / 2, (y0 + y1) / 2
        return {pixel(row, column, *at) for at in ((x, y0 + 0.5), (x, y1 - 1), (x0 + 0.5, y), (x1 - 1, y))}

    bright, dark = ((180, 30, 60), (30, 150, 90)), ((60, 10, 20), (10, 50, 30))
    for row in range(2):  # 84 x 98 pixels are shared: the lower right of view q, the upper left of view k
        assert [pixel(row, 0, *at) for at in ((24, 60), (32, 60), (66, 10), (66, 18))] == [dark[0], bright[0]] * 2
        assert [pixel(row, 1, *at) for at in ((80, 40), (88, 40), (40, 94), (40, 102))] == [bright[1], dark[1]] * 2
    colours = []
    for box_q, box_k in zip(boxes_q[0], boxes_k[0], strict=True):
        (colour,) = edges(0, 0, box_q)
        assert edges(0, 1, box_k) == {colour}
        colours.append(colour)
        assert edges(1, 0, box_q) == {bright[0]} and edges(1, 1, box_k) == {bright[1]}  # not valid, not drawn
    assert sorted(colours) == [(255, 176, 0), (255, 255, 255)]
    white = colours.index((255, 255, 255))
    assert edges(0, 2, boxes_k[0, white]) == {colours[white]} and colours[white] not in edges(
        0, 2, boxes_k[0, 1 - white]
    )

    grey = 0.299 * 30 + 0.587 * 150 + 0.114 * 90
    low, high = ([0.4 * grey + 0.6 * c for c in colour] for colour in ((0, 0, 127), (255, 204, 0)))
    # cell j of the map lies at pixel 16 j: 3 x 3 cells from (i, j) have their centre at 16 (j + 1), 16 (i + 1)
    (y, x), (y_other, x_other) = ([16 * (n + 1) for n in peaks[window]] for window in (white, 1 - white))
    assert pixel(0, 2, x, y) == pytest.approx(high, abs=2)
    assert pixel(0, 2, x_other, y_other) == pytest.approx(low, abs=2)  # the other window's similarity is not shown
    for far, red in ((7, high[0]), (9, low[0])):  # a square of one cell
        for at in ((x - far, y - far), (x + far, y - far), (x - far, y + far), (x + far, y + far)):
            assert pixel(0, 2, *at)[0] == pytest.approx(red, abs=2)
    assert pixel(0, 2, 110, 50) == pytest.approx([grey] * 3, abs=2)  # no neighbourhood has its centre there
    assert pixel(1, 2, 56, 56) == pytest.approx([grey] * 3, abs=2)  # no window, no heat


def test_probe_finds_places_that_the_features_tell():
    """C4 tells each cell's place in the image by two angles. Nearly all are found, with the right crops on either side."""
    method, _ = tiny()
    pairs = []
    for i in range(32):
        with common.drawing("probe", i):
            pairs.append(resim.two_views(Image.new("RGB", (64, 56)), 64))
    views, seen = [torch.stack(x) for x in zip(*pairs, strict=True)], []
    for crop in views[2:]:
        x0, y0, x1, y1 = (edge[:, None] / 64 for edge in crop.unbind(1))
        x = (x0 + (x1 - x0) * (torch.arange(8) + 0.5) / 8)[:, None, :].expand(-1, 8, -1)
        y = (y0 + (y1 - y0) * (torch.arange(8) + 0.5) / 8)[:, :, None].expand(-1, -1, 8)
        c4 = torch.stack([x.cos(), x.sin(), y.cos(), y.sin()], 1)
        seen.append(([None, None, c4 * torch.rand(32, 1, 8, 8), None], {}))  # lengths do not matter
    method.see = lambda *given: seen if all(a is b for a, b in zip(given, views, strict=False)) else None
    hits, chance, count = method.measure(*views)
    cells = near = 0  # of query cells that the key view shows; of key cells at most one row and column away
    for (x0, y0, x1, y1), (left, top, right, bottom) in zip(views[2].tolist(), views[3].tolist(), strict=True):
        for i, j in itertools.product(range(8), range(8)):
            x = (x0 + (j + 0.5) * (x1 - x0) / 8 - left) * 8 / (right - left)
            y = (y0 + (i + 0.5) * (y1 - y0) / 8 - top) * 8 / (bottom - top)
            if 0 <= x < 8 and 0 <= y < 8:
                cells += 1
                near += sum(abs(c + 0.5 - x) <= 1.001 for c in range(8)) * sum(
                    abs(c + 0.5 - y) <= 1.001 for c in range(8)
                )
    assert count == cells > 500 and chance == pytest.approx(near / 64, rel=1e-4)
    assert hits > 0.99 * cells


# ----------------------------------------------------------------------------------------------------------------------
# settings, released layout, pieces
# ----------------------------------------------------------------------------------------------------------------------

PRESET = dict(framework="moco", levels="fpn", window=[48, 32], pool="prroi", loss_weight=1.0, temperature=0.2, lr=0.03, batch_size=256,
              epochs=200, queue_size=None, ema=0.999, arch="resnet50", size=224, amp="none")  # fmt: skip
PRESETS = {"paper": PRESET, "official": PRESET}  # literal copy of the table of presets
DEMO = dict(arch="resnet18", size=136, batch_size=64, epochs=3, lr=0.6, ema=0.99, temperature=0.1, demo=True)


def settings(flags):
    return vars(resim.get_args(["--data", "x", *flags.split()]))


def differing(flags):
    """What a command line changes in the settings of the bare one."""
    bare = settings("")
    return {name: value for name, value in settings(flags).items() if value != bare[name]}


@pytest.mark.parametrize("preset", PRESETS)
def test_presets(preset, monkeypatch):
    args = settings(f"--preset {preset}")
    assert {name: args[name] for name in PRESETS[preset]} == PRESETS[preset]
    method, args = tiny("--preset", preset)
    calls = []
    original = resim.region_contrastive_loss
    monkeypatch.setattr(resim, "region_contrastive_loss", lambda *a: calls.append(a) or original(*a))
    method(method.query, *tiny_batch(), step=0)
    assert [call[-1] for call in calls] == [preset == "paper"] * 4  # per image; two levels, two groups
    assert {call[-2] for call in calls} == {0.2}
    assert {call[0].shape[2] for call in calls} == {128 if preset == "paper" else 256}
    assert [len(call[3]) for call in calls] == [8 * 16, 8 * 16, 4 * 36, 4 * 36]  # P4 gathered, P3 of the group


def test_groups_are_of_32_images(monkeypatch):
    monkeypatch.undo()  # of groups_of_four
    assert common.GROUP == 32


@pytest.mark.parametrize("fast", [False, True])
def test_demo_settings(fast, monkeypatch):
    monkeypatch.setattr(resim, "bf16_is_fast", lambda: fast)
    amp = {"amp": "bf16"} if fast else {}
    assert vars(resim.get_args(["--demo"]))["data"] == "scenes"
    assert differing("--demo") == DEMO | amp and differing("--demo --levels c4") == DEMO | amp | {"levels": "c4"}
    simsiam = {"framework": "simsiam", "lr": 0.1}
    assert differing("--demo --framework simsiam") == DEMO | amp | simsiam


@pytest.mark.parametrize(
    "preset, given",
    [
        ("--demo", {"arch": "resnet50", "size": 224, "batch_size": 256, "epochs": 200, "queue_size": 65536}),
        ("--demo", {"lr": 0.03, "ema": 0.999, "temperature": 0.2, "amp": "none", "data": "y"}),
        ("--demo --framework simsiam", {"lr": 0.03, "arch": "resnet50", "epochs": 5}),
        ("--demo --preset official", {"lr": 0.3, "queue_size": 100, "amp": "fp16"}),
        ("--framework simsiam", {"lr": 0.03, "queue_size": 8, "ema": 0.9, "temperature": 0.1}),  # the last three unused
        ("--preset official", {"lr": 1.0, "window": [64, 32], "pool": "roi_align", "loss_weight": 0.5}),
    ],
)
def test_what_stands_on_the_command_line_wins(preset, given, monkeypatch):
    """... over every preset, the defaults of the bare command among the values. Nothing else changes."""
    monkeypatch.setattr(resim, "bf16_is_fast", lambda: True)
    without = settings(preset)
    assert all(without[name] != value for name, value in given.items())
    words = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in given.items())
    words = words.replace("[64, 32]", "64 32")
    for flags in (f"{preset} {words}", f"{words} {preset}"):  # in any order
        assert settings(flags) == without | given


def test_defaults_of_simsiam_and_c4():
    assert differing("--framework simsiam --levels c4") == {"framework": "simsiam", "levels": "c4", "lr": 0.1}
    assert levels("--levels", "c4") == [resim.Level("c4", 2, 16, 48, 32, 3, gathered=True)]
    p4, p3 = levels()
    assert p4 == resim.Level("p4", 2, 16, 48, 32, 3, gathered=True)
    assert p3 == resim.Level("p3", 1, 8, 32, 24, 3, gathered=False)


def refused(capsys, flags):
    """The message with which a command line is refused."""
    with pytest.raises(SystemExit) as error:
        resim.get_args(flags.split())
    usage, message = capsys.readouterr().err.splitlines()
    assert error.value.code == 2 and usage.startswith("usage: ") and ": error: " in message
    return message.split(": error: ")[1]


@pytest.mark.parametrize(
    "flags, words",
    [
        ("", "give --data DIR (a folder of images), or --demo"),
        ("--data x --temperature 0", "argument --temperature: 0: must be at least 0.001"),
        ("--data x --loss-weight -1", "argument --loss-weight: -1: must be at least 0"),
        ("--data x --ema 1.1", "argument --ema: 1.1: must be between 0 and 1"),
        ("--data x --queue-size 0", "argument --queue-size: 0: must be at least 1"),
        ("--data x --levels p4", "argument --levels: invalid choice: 'p4'"),
        ("--data x --pool mean", "argument --pool: invalid choice: 'mean'"),
        ("--data x --window 48", "argument --window: expected 2 arguments"),
        ("--data x --window 48 32 24", "unrecognized arguments: 24"),
        ("--data x --window 0 24", "argument --window: 0: must be at least 1"),
        ("--data x --window 48 0", "argument --window: 0: must be at least 1"),
        ("--data x --window 48 2.5", "argument --window: invalid int value: '2.5'"),
        ("--data x --size 48", "--size 48: a window of 48 pixels must be smaller than the view"),
        ("--data x --window 224 32", "--size 224: a window of 224 pixels must be smaller than the view"),
        ("--data x --window 16 16 --size 32", "--size 32: a window of 32 pixels must be smaller than the view"),  # P3's
        ("--data x --preset official --levels c4", "--preset official is ReSim-FPN on MoCo-v2"),
        ("--data x --preset official --framework simsiam", "--preset official is ReSim-FPN on MoCo-v2"),
        *(
            (f"--data x {flag}", f"unrecognized arguments: {flag}")  # once there, constants now
            for flag in (
                "--stride 32 24", "--dim 64", "--group-size 64", "--momentum 0.8", "--weight-decay 0", "--fix-pred-lr", "--resume x",
            )
        ),
    ],
)  # fmt: skip
def test_settings_that_make_no_sense(flags, words, capsys):
    assert refused(capsys, flags).startswith(words)


def test_windows_that_just_fit():
    """A window ends before the view does (R2), so it is smaller by a pixel. C4 has no windows of P3."""
    for flags in ("--window 223 1", "--size 49", "--size 33 --window 32 1", "--levels c4 --size 32 --window 31 8"):
        for level in resim.make_levels(resim.get_args(["--data", "x", *flags.split()])):
            size = settings(flags)["size"]
            assert len(resim.window_grid(size, level.window, level.step)) > 0
            cells = math.ceil(size / level.stride)
            assert resim.neighbourhoods(torch.zeros(1, 1, cells, cells), level.kernel).shape[1] > 0


def released_checkpoint(arch, dim=128, K=64, seed=0):
    """A state_dict as the released code writes it, from torchvision's ResNet and its own names for the rest."""
    torch.manual_seed(seed)
    state = {}
    for network in ("encoder_q", "encoder_k"):
        resnet = getattr(torchvision.models, arch)()
        C = resnet.fc.in_features
        resnet.fc = nn.Sequential(nn.Linear(C, C), nn.ReLU(), nn.Linear(C, dim))
        for name, inputs, kernel in (
            ("lateral3", C // 4, 1), ("lateral4", C // 2, 1), ("lateral5", C, 1), ("output3", 256, 3), ("output4", 256, 3),
        ):  # fmt: skip
            resnet.add_module(f"fpn_{name}", nn.Conv2d(inputs, 256, kernel, padding=kernel // 2))
        state |= {f"module.{network}.{name}": tensor for name, tensor in resnet.state_dict().items()}
    return state | {"module.queue": F.normalize(torch.randn(dim, K), dim=0), "module.queue_ptr": torch.tensor([7])}


def test_released_checkpoints_load_into_the_model_and_back():
    theirs = released_checkpoint("resnet50")
    method = build("--preset", "official", "--queue-size", "64")
    method.load_state_dict(released.from_released(theirs, method.state_dict()))  # strict: nothing missing or left over
    assert torch.equal(method.image_queue.vectors[3], theirs["module.queue"][:, 3])
    assert torch.equal(method.image_queue.pointer, theirs["module.queue_ptr"])
    pyramid = method.query.pyramid
    assert torch.equal(pyramid.layer_blocks["1"][0].weight, theirs["module.encoder_q.fpn_output3.weight"])
    assert torch.equal(pyramid.inner_blocks["2"][0].weight, theirs["module.encoder_q.fpn_lateral4.weight"])
    assert torch.equal(method.key.pyramid.inner_blocks["3"][0].bias, theirs["module.encoder_k.fpn_lateral5.bias"])
    assert torch.equal(method.key.image_head[2].weight, theirs["module.encoder_k.fc.2.weight"])
    back = released.to_released(method.state_dict())
    assert back.keys() == theirs.keys() and all(torch.equal(back[name], theirs[name]) for name in theirs)


def test_init_takes_the_backbone_of_a_released_checkpoint(folder, capsys):
    """Wrapped as it was published, or the bare state_dict. Both networks start from the query network."""
    theirs, file = released_checkpoint("resnet18"), folder / "resim.pth.tar"
    for state in ({"epoch": 200, "arch": "resnet18", "state_dict": theirs}, theirs):
        torch.save(state, file)
        for preset in ("paper", "official"):
            args = resim.get_args(["--data", "x", "--arch", "resnet18", "--queue-size", "64", "--preset", preset])
            method = resim.build(args, torch.device("cpu"), file)
            for network in (method.query, method.key):
                for name, tensor in network.trunk.state_dict().items():
                    assert torch.equal(tensor, theirs[f"module.encoder_q.{name}"])
            assert "backbone: 120 tensors of resnet18" in capsys.readouterr().out


def test_tool_turns_an_official_run_into_a_released_checkpoint(folder, capsys):
    method, _ = tiny("--preset", "official")
    with torch.no_grad():
        for p in method.key.parameters():  # told apart from the query network
            p.mul_(1.01)
    ours = {"script": "resim", "settings": {"preset": "official"}, "step": 3, "model": method.state_dict()}
    torch.save(ours, folder / "checkpoint.pth")
    released.main([str(folder / "checkpoint.pth"), "--out", str(folder / "released.pth")])
    written = torch.load(folder / "released.pth")
    state, theirs = written["state_dict"], released_checkpoint("resnet18", K=20)
    assert [*written] == ["state_dict"] and f"released.pth: {len(theirs)} tensors" in capsys.readouterr().out
    assert {name: x.shape for name, x in state.items()} == {name: x.shape for name, x in theirs.items()}
    back = released.from_released(state, method.state_dict())
    assert all(torch.equal(back[name], x) for name, x in method.state_dict().items())


def test_tool_takes_backbone_and_pyramid_of_a_released_checkpoint(folder, capsys):
    """... for torchvision's FPN detectors, which must compute the same, and for --init."""
    theirs, out = released_checkpoint("resnet18"), folder / "resim_fpn.pth"
    for state in ({"state_dict": theirs}, theirs):
        torch.save(state, folder / "released.pth")
        released.main([str(folder / "released.pth"), "--out", str(out), "--arch", "resnet18"])
        found = torch.load(out)
        assert f"{out}: 130 tensors" in capsys.readouterr().out and len(found) == 130
    backbone = torchvision.models.detection.backbone_utils.resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, norm_layer=nn.BatchNorm2d
    )
    detector = nn.ModuleDict({"backbone": backbone})
    result = detector.load_state_dict(found, strict=False)
    assert result.unexpected_keys == []
    assert {name.rsplit(".", 2)[0] for name in result.missing_keys} == {
        "backbone.fpn.inner_blocks.0", "backbone.fpn.layer_blocks.0", "backbone.fpn.layer_blocks.3",
    }  # fmt: skip
    method, _ = tiny("--preset", "official", "--queue-size", "64")
    method.load_state_dict(released.from_released(theirs, method.state_dict()))
    image = tiny_batch(n=2)[0]
    with torch.no_grad():
        want, (p4, p3) = backbone(common.normalise(image)), method.query(image)[1]
    torch.testing.assert_close(p4, want["2"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(p3, want["1"], rtol=1e-4, atol=1e-5)
    args = resim.get_args(["--data", "x", "--arch", "resnet18", "--queue-size", "8"])
    start = resim.build(args, torch.device("cpu"), out)
    assert torch.equal(start.query.trunk.conv1.weight, theirs["module.encoder_q.conv1.weight"])


def test_files_that_the_tool_cannot_turn(folder):
    theirs, file = released_checkpoint("resnet18"), folder / "file.pth"
    without = {name: x for name, x in theirs.items() if name != "module.encoder_q.fpn_lateral4.bias"}
    narrow = theirs | {"module.encoder_q.fc.2.weight": torch.zeros(64, 512)}
    for state, flags, words in (
        ({"script": "resim", "settings": {"preset": "paper"}, "model": {}}, "", "not a run with --preset official"),
        ({"state_dict": without}, "--arch resnet18", "fpn_lateral4.bias is missing, so this is not a released"),
        (without, "--arch resnet18", "fpn_lateral4.bias is missing"),
        (narrow, "--arch resnet18", "check --arch .*image_head.2.weight"),
        (theirs, "--arch resnet34", "layer1.2.conv1.weight is missing"),
        ([1, 2], "--arch resnet18", "is missing"),
        ({}, "--arch resnet18", "is missing"),
    ):
        torch.save(state, file)
        with pytest.raises(common.UserError, match=words) as error:
            released.main([str(file), "--out", str(folder / "out.pth"), *flags.split()])
        assert "\n" not in str(error.value) and str(error.value).startswith(f"{file}: ")
        assert not (folder / "out.pth").exists()
    file.write_bytes(b"garbage")
    with pytest.raises(common.UserError, match="not a checkpoint"):
        released.main([str(file), "--out", str(folder / "out.pth")])


def test_pieces_work_alone(monkeypatch):
    """The source of each function by itself, with nothing but libraries in scope, passes the same oracles."""
    pooling = ("hat_integrals", "bin_weights", "prroi_pool")
    pieces = [pooling, ("window_grid",), ("map_boxes",), ("neighbourhoods",), ("image_cosine_loss",)]
    pieces += [("window_grid", "map_boxes", "Pairs", "region_pairs"), ("mean_over_regions", "region_cosine_loss")]
    negatives = ("NegativeLogSumExp", "negative_logsumexp")
    pieces += [negatives, (*pooling, "pool_regions"), ("two_views",), ("PYRAMID", "Pyramid")]
    pieces += [(*negatives, "image_contrastive_loss")]
    pieces += [(*negatives, "mean_over_regions", "region_contrastive_loss")]
    for names in pieces:
        for name, alone in zip(names, lifted("resim.py", *names), strict=True):
            assert name == "PYRAMID" or alone is not getattr(resim, name, None)
            monkeypatch.setattr(resim, name, alone, raising=name != "NegativeLogSumExp")
    test_views_follow_the_recipe()
    test_window_counts(48, 32, 6)
    test_map_boxes_and_valid_against_a_loop()
    test_prroi_pool_against_quadrature((2, 3), 0.5)
    test_prroi_pool_gradients()
    test_prroi_pool_takes_boxes_as_torchvision_does()
    test_pool_regions_hands_boxes_to_either_operator()
    test_neighbourhoods_against_a_loop(3)
    test_region_loss_against_eq_2_value_and_gradient(True)
    test_image_loss_is_cross_entropy_with_target_zero()
    test_simsiam_losses_and_their_stop_gradient()
    test_chunked_negatives_equal_the_whole_in_value_and_gradient(monkeypatch)
    test_pyramid_against_torchvision((8, 4, 2), "official")
