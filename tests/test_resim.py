# SPDX-License-Identifier: MIT
"""resim.py: each piece and one iteration against something independent. Its losses: test_losses.py."""

import copy
import functools
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from helpers import assert_same, block_views, coordinate_image, lifted, record_operations, refused
from PIL import Image
from test_losses import contrastive, over_images, over_rows
from torch import nn
from torch.testing import assert_close
from torchvision import transforms
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops import FeaturePyramidNetwork, roi_align

import common
import resim
from harness import look
from tools import released

pytestmark = pytest.mark.usefixtures("tiny_resnet")


def test_crops_say_what_the_views_show_and_flips_are_shared(monkeypatch):
    """Each pixel of the image holds its own place."""
    record_operations(monkeypatch)  # colours stay as they are
    width, height, flips = 256, 200, 0
    for i in range(30):
        with common.drawing("test", i):
            view_q, view_k, *crops = resim.two_views(coordinate_image(width, height), 224)
        shown = [(view[:2].float() + 0.5) / 256 for view in (view_q, view_k)]  # x and y, fractions of the image
        flipped = (shown[0][0, :, -1].mean() < shown[0][0, :, 0].mean()).item()
        for (x, y), (x0, y0, x1, y1) in zip(shown, crops, strict=True):
            for seen, start, end, side in ((x.mean(0), x0, x1, width), (y.mean(1), y0, y1, height)):
                want = (start + (torch.arange(224) + 0.5) / 224 * (end - start)) / side  # of the flipped image
                want = 1 - want if flipped and side == width else want
                assert (seen - want)[8:-8].abs().max() < 0.008  # two pixels of 256
        flips += flipped
    assert 8 < flips < 22


def test_views_follow_the_recipe(monkeypatch):
    """MoCo-v2's crops, and its operations in their order (R14): the flip before both crops, the others for each view."""
    seen = record_operations(monkeypatch, "hflip", "resized_crop")
    names = ["jitter (0.4, 0.4, 0.4, 0.1)", "rgb_to_grayscale", "blur True"]
    image, crops, happened = Image.new("RGB", (400, 400)), [], []
    for i in range(600):
        with common.drawing("recipe", i):
            crops += resim.two_views(image, 32)[2:]
        start, end = (n for n, name in enumerate(seen) if name == "resized_crop")
        views = seen[start + 1 : end], seen[end + 1 :]
        assert seen[:start] in ([], ["hflip"]) and all(view == [x for x in names if x in view] for view in views)
        happened.append([start > 0, *(name in view for view in views for name in names)])
        seen.clear()
    assert np.abs(np.mean(happened, 0) - [0.5, *[0.8, 0.2, 0.5] * 2]).max() < 0.06  # three standard errors
    assert np.abs(np.corrcoef(np.transpose(happened)) - np.eye(7)).max() < 0.13  # each is drawn by itself
    x0, y0, x1, y1 = torch.stack(crops).double().T
    area, aspect = (x1 - x0) * (y1 - y0) / 400**2, (x1 - x0) / (y1 - y0)
    assert 0.195 < area.min() < 0.25 and area.max() <= 1 and abs(area.mean() - 0.56) < 0.04
    assert 0.74 < aspect.min() < 0.8 and 1.25 < aspect.max() < 1.35
    assert x0.min() >= 0 and x1.max() <= 400 and torch.equal(x0, x0.round())


@pytest.mark.parametrize("window, stride, side", [(48, 32, 6), (32, 24, 8), (16, 16, 13), (64, 48, 4)])
def test_window_counts(window, stride, side):
    grid = resim.window_grid(224, window, stride)
    places = [i for i in range(0, 224, stride) if i + window < 224]  # the rule of the released code
    assert len(places) == side
    assert grid.tolist() == [[x, y, x + window, y + window] for y in places for x in places]  # row by row


def levels(flags):
    return resim.make_levels(resim.get_args(["--data", "x", *flags.split()]))


def test_levels():
    """Table 3 varies the first level's windows; its negatives are as large, in whole cells. P3 keeps its own (R26)."""
    p4, p3 = resim.Level("p4", 2, 16, 48, 32, 3, gathered=True), resim.Level("p3", 1, 8, 32, 24, 3, gathered=False)
    for window, kernel in ((4, 1), (16, 1), (24, 2), (40, 3), (48, 3), (64, 4)):  # halves go up
        first = p4._replace(window=window, step=24, kernel=kernel)
        assert levels(f"--window {window} 24") == [first, p3]
        assert levels(f"--levels c4 --window {window} 24") == [first._replace(name="c4")]
    assert levels("") == [p4, p3] and levels("--levels c4") == [p4._replace(name="c4")]
    for level, negatives in ((p4, 36_864), (p3, 21_632)):  # the paper's, of 256 images and of a group of 32
        assert (224 // level.stride - level.kernel + 1) ** 2 * (256 if level.gathered else 32) == negatives
    assert all(map(levels, ("--size 49", "--window 223 1", "--levels c4 --size 32 --window 31 8")))  # they just fit: R2


def random_crops(n):
    """(2, n, 4) pairs of RandomResizedCrop's boxes, as two_views draws them."""
    image, draw = Image.new("RGB", (500, 375)), transforms.RandomResizedCrop.get_params
    with common.drawing("crops", 0):
        crops = [draw(image, (0.2, 1.0), (3 / 4, 4 / 3)) for _ in range(2 * n)]
    top, left, h, w = torch.tensor(crops, dtype=torch.float32).T
    return torch.stack([left, top, left + w, top + h], 1).view(2, n, 4)


def test_map_boxes_and_valid_against_a_loop():
    """Random crops, and crops one of which is shifted by a few whole pixels: there a window ends just with the view."""
    shifts = torch.tensor([[0.0, 0], [-176, 0], [-175, 0], [0, -176], [0, -175], [1, 0], [0, 1], [900, 0]]).repeat(1, 2)
    square, (crop_q, crop_k) = torch.tensor([0.0, 0, 224, 224]), random_crops(20)
    crop_q, crop_k = torch.cat([crop_q, square.repeat(8, 1)]), torch.cat([crop_k, square + shifts])
    pairs, checked = resim.region_pairs(crop_q, crop_k, 224, 48, 32), 0
    for b, a in itertools.product(range(28), range(36)):
        x, y, want = 32 * (a % 6), 32 * (a // 6), []
        for axis, t in ((0, x), (1, y), (0, x + 48), (1, y + 48)):  # to the image, and on to the key view
            start_q, end_q, start_k, end_k = (crop[b, axis + i].item() for crop in (crop_q, crop_k) for i in (0, 2))
            want.append((start_q + t * (end_q - start_q) / 224 - start_k) * 224 / (end_k - start_k))
        if b >= 20 or min(min(abs(w), abs(w - 224)) for w in want) > 1e-3:  # rounding decides those
            assert pairs.valid[b, a].item() == (min(want[:2]) >= 0 and max(want[2:]) < 224)
            checked += 1
        assert pairs.boxes_q[b, a].tolist() == [x, y, x + 48, y + 48]
        want = torch.tensor(want) if pairs.valid[b, a] else torch.zeros(4)
        assert_close(pairs.boxes_k[b, a], want, rtol=1e-5, atol=1e-3)
    assert checked > 900


def test_shares_of_valid_windows_are_those_of_the_released_code():
    """Measured there with random crops: 0.55 to 0.60 and 0.60 to 0.65 of the windows; 0.4 to 2.5 % of images have none."""
    crop_q, crop_k = random_crops(3000)
    coarse, fine = (resim.region_pairs(crop_q, crop_k, 224, *w).valid for w in ((48, 32), (32, 24)))
    assert 0.55 < coarse.float().mean() < 0.60 and 0.60 < fine.float().mean() < 0.65
    assert 0.004 < (~coarse.any(1)).float().mean() < 0.025 and 0.002 < (~fine.any(1)).float().mean() < 0.025


def interpolate(feature, x, y):
    """Bilinear interpolation of (C, H, W) samples at whole coordinates, zero beyond, at one point -> (C,)"""
    places = ((y, feature.shape[1]), (x, feature.shape[2]))
    hats = [(1 - (t - torch.arange(n, dtype=feature.dtype)).abs()).clamp(min=0) for t, n in places]
    return torch.einsum("chw,h,w->c", feature, *hats)


def quadrature(feature, x0, y0, x1, y1):
    """The mean of the interpolated (C, H, W) map over a box: cell by cell, where the midpoint rule is exact."""
    total = feature.new_zeros(len(feature))
    if x1 <= x0 or y1 <= y0:
        return total

    def pieces(start, end):
        return itertools.pairwise([start, *range(math.floor(start) + 1, math.ceil(end)), end])

    for (top, bottom), (left, right) in itertools.product(pieces(y0, y1), pieces(x0, x1)):
        total = total + (bottom - top) * (right - left) * interpolate(feature, (left + right) / 2, (top + bottom) / 2)
    return total / ((x1 - x0) * (y1 - y0))


BOXES = [  # of two images
    [[1.3, 0.2, 4.7, 3.1], [-2.5, -1.5, 3.0, 2.2], [0.0, 0.0, 5.0, 4.0], [2.25, 1.5, 2.5, 1.75], [5.0, 4.0, 5.9, 4.9]],
    [[2.0, 1.0, 5.0, 4.0], [4.1, 3.3, 9.0, 8.0], [-7.0, -7.0, -4.0, -3.0], [-1.0, -1.0, 6.0, 5.0], [2.0, 0.0, 3.0, 1.0]],
]  # fmt: skip


@pytest.mark.parametrize("size, scale", [(1, 1.0), (7, 0.5), ((2, 3), 0.5), ((3, 1), 1.0)])
def test_prroi_pool_against_quadrature(size, scale):
    """Boxes inside, partly and wholly outside, on whole coordinates and off them, of two images."""
    feature = torch.randn(2, 2, 5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    got = resim.prroi_pool(feature, torch.tensor(BOXES, dtype=torch.float64) / scale, size, scale)
    rows, columns = (size, size) if isinstance(size, int) else size
    assert got.shape == (2, 5, 2, rows, columns)
    for n, r in itertools.product(range(2), range(5)):
        x0, y0, x1, y1 = BOXES[n][r]
        width, height = (x1 - x0) / columns, (y1 - y0) / rows
        for i, j in itertools.product(range(rows), range(columns)):
            bin = x0 + j * width, y0 + i * height, x0 + (j + 1) * width, y0 + (i + 1) * height
            assert_close(got[n, r, :, i, j], quadrature(feature[n], *bin), rtol=0, atol=1e-12)


def test_prroi_pool_weights_of_the_papers_window():
    """48 pixels at stride 16 from a whole cell: 1/6, 1/3, 1/3, 1/6; over the edge of the map the rest is lost."""
    eye = torch.eye(14, dtype=torch.float64)[None, :, None].expand(-1, -1, 14, -1)  # channel j is 1 in column j
    boxes = torch.tensor([[[32.0, 32, 80, 80], [176, 32, 224, 80]]], dtype=torch.float64)
    found = resim.prroi_pool(eye, boxes, 1, 1 / 16)[0, :, :, 0, 0]
    assert_close(6 * found, torch.tensor([[0.0, 0, 1, 2, 2, 1, *[0] * 8], [0] * 11 + [1, 2, 2]], dtype=torch.float64))


def test_prroi_pool_gradients():
    """In the features and in the boxes, on whole coordinates as well (where a kink of the formula's parts lies)."""
    feature = torch.randn(2, 2, 5, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    boxes = torch.tensor(BOXES, dtype=torch.float64, requires_grad=True)
    for size, scale in ((1, 1.0), ((2, 3), 0.7)):
        pool = functools.partial(resim.prroi_pool, output_size=size, spatial_scale=scale)
        assert torch.autograd.gradcheck(lambda x, f=pool: f(x, boxes.detach()), feature.clone().requires_grad_())
        assert torch.autograd.gradcheck(lambda b, f=pool: f(feature, b), boxes, atol=3e-5)


def test_prroi_pool_of_empty_and_tiny_boxes():
    """Empty ones, among them those of invalid windows, and boxes that run backwards on one axis or on both."""
    feature = torch.randn(1, 2, 5, 6, generator=torch.Generator().manual_seed(4)).requires_grad_()
    empty = [[2.5, 1, 2.5, 3], [2, 1, 4, 1], [3, 3, 3, 3], [0, 0, 0, 0], [4, 1, 2, 3], [1, 3, 4, 2], [4, 3, 2, 1]]
    empty = torch.tensor([empty]).requires_grad_()
    pooled = resim.prroi_pool(feature, empty, 2)
    pooled.sum().backward()
    assert pooled.shape == (1, 7, 2, 2, 2) and not any(x.any() for x in (pooled, feature.grad, empty.grad))
    for width, (x, y) in itertools.product((1e-2, 1e-3, 1e-4), ((2.0, 3.0), (2.37, 1.61), (2.0, 1.5))):
        tiny = torch.tensor([[[x - width / 2, y - width / 2, x + width / 2, y + width / 2]]])
        got = resim.prroi_pool(feature, tiny, 1)[0, 0, :, 0, 0]  # in fp32: the interpolated value
        assert_close(got, interpolate(feature[0], x, y), rtol=0, atol=4 * width + 1e-6)
    for n, L in ((3, 0), (0, 4), (0, 0)):
        assert resim.prroi_pool(torch.zeros(n, 2, 5, 6), torch.zeros(n, L, 4), (2, 3)).shape == (n, L, 2, 2, 3)
    for width in (1e-3, 1e-4, 1e-5):  # no cancellation: the weights of a tiny box still sum to 1
        tiny = torch.tensor([[[3.7, 2.9, 3.7 + width, 2.9 + width]]])
        assert resim.prroi_pool(torch.ones(1, 1, 5, 6), tiny, 1).item() == pytest.approx(1, abs=1e-5)


def test_prroi_pool_is_computed_in_fp32():
    feature, boxes = torch.randn(2, 4, 5, 6), torch.tensor(BOXES)
    want = resim.prroi_pool(feature, boxes, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(resim.prroi_pool(feature, boxes, 2), want)
    half, rounded = (resim.prroi_pool(x, boxes, 2) for x in (feature.bfloat16(), feature.bfloat16().float()))
    assert_close(half, rounded.bfloat16())


def test_pool_regions_hands_boxes_to_either_operator():
    feature = torch.randn(3, 4, 14, 14, generator=torch.Generator().manual_seed(7))
    boxes = torch.rand(3, 5, 4, generator=torch.Generator().manual_seed(8)) * 100
    boxes[..., 2:] += 100
    prroi, align = (resim.pool_regions(feature, boxes, 16, name) for name in ("prroi", "roi_align"))
    for b, a in itertools.product(range(3), range(5)):
        one, box = feature[b : b + 1], boxes[b, a].view(1, 1, 4)
        assert_close(prroi[b, a], resim.prroi_pool(one, box, 1, 1 / 16)[0, 0, :, 0, 0])
        assert_close(align[b, a], roi_align(one, [*box], 1, 1 / 16, aligned=True)[0, :, 0, 0])


@pytest.mark.parametrize("preset", ["paper", "official"])
def test_pyramid_against_torchvision(preset):
    """The state dict of the pyramid in torchvision's FPN over C2..C5 gives the same P4 and P3, of sides not just halved."""
    encoder, rng = tiny(f"--preset {preset}").query.double(), torch.Generator().manual_seed(0)
    sizes = zip(encoder.trunk.widths, (34, 17, 9, 5), strict=True)
    lowest, *maps = (torch.randn(2, w, s, s, generator=rng, dtype=torch.float64) for w, s in sizes)
    for bias in (p for name, p in encoder.pyramid.named_parameters() if "bias" in name):
        nn.init.normal_(bias, generator=rng)  # they start as zeros
    fpn = FeaturePyramidNetwork(encoder.trunk.widths, 256).double()
    result = fpn.load_state_dict(encoder.pyramid.state_dict(), strict=False)
    left = {"inner_blocks.0", "layer_blocks.0", "layer_blocks.3"}
    left |= set() if preset == "official" else {"layer_blocks.1", "layer_blocks.2"}
    assert result.unexpected_keys == [] and {name.rsplit(".", 2)[0] for name in result.missing_keys} == left
    if preset == "paper":  # no output convolutions of ours: make torchvision's an identity
        for block in fpn.layer_blocks:
            nn.init.dirac_(block[0].weight)
            nn.init.zeros_(block[0].bias)
    got, want = encoder.pyramid(*maps), fpn({str(i): x for i, x in enumerate([lowest, *maps])})
    assert_close(got, {"p4": want["2"], "p3": want["1"]})


def encoder_of(flags):
    """The paper's size, without memory."""
    with torch.device("meta"):
        return resim.build(resim.get_args(["--data", "x", *flags.split()]), torch.device("meta")).query


def shapes(module, kind):
    return [tuple(m.weight.shape) for m in module.modules() if isinstance(m, kind)]


def test_heads_of_each_preset():
    """Section 3.4: two 3x3 convolutions to 128 with BN and ReLU between. The released code has one, in the pyramid."""
    for flags, inputs in (("", {"p4": 256, "p3": 256}), ("--levels c4", {"c4": 1024})):
        encoder = encoder_of(flags)
        assert encoder.region_heads.keys() == inputs.keys() and (encoder.pyramid is None) == ("c4" in inputs)
        for name, head in encoder.region_heads.items():
            assert [type(m) for m in head] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Conv2d] and head[0].bias is None
            assert shapes(head, nn.Conv2d) == [(128, inputs[name], 3, 3), (128, 128, 3, 3)]
        assert shapes(encoder.image_head, nn.Linear) == [(2048, 2048), (128, 2048)]
    for (head,) in tiny("--preset official").query.pyramid.layer_blocks.values():
        assert (head.bias == 0).all() and head.weight.var().item() == pytest.approx(1 / (256 * 9), rel=0.02)


TABLE_7 = {"image": (2048, 2048, 512), "p4": (256, 1024, 256), "p3": (256, 512, 128), "c4": (1024, 1024, 256)}


@pytest.mark.parametrize("levels", ["c4", "fpn"])
def test_simsiam_heads_have_table_7s_dimensions(levels):
    encoder = encoder_of(f"--framework simsiam --levels {levels}")
    heads = {"image": (encoder.image_head, encoder.image_predictor)}
    heads |= {name: (head, encoder.region_predictors[name]) for name, head in encoder.region_heads.items()}
    assert {*heads} == {"image", *(["c4"] if levels == "c4" else ["p4", "p3"])}
    for name, (projector, predictor) in heads.items():
        inputs, E, bottleneck = TABLE_7[name]
        layers = [nn.Linear, nn.BatchNorm1d, nn.ReLU]
        assert [type(m) for m in projector] == (3 * layers)[:-1] and projector[-1].weight is None
        assert shapes(projector, nn.Linear) == [(E, inputs), (E, E), (E, E)]
        assert [type(m) for m in predictor] == [*layers, nn.Linear] and predictor[-1].bias is not None
        assert shapes(predictor, nn.Linear) == [(bottleneck, E), (E, bottleneck)]
        assert all(m.bias is None for m in (*projector[::3], predictor[0]))
    trunk = tiny("--framework simsiam").query.trunk
    assert all((block.bn2.weight == 0).all() for block in trunk.layer4)  # B16, R27


@pytest.fixture(autouse=True)
def groups_of_four(monkeypatch):
    monkeypatch.setattr(common, "GROUP", 4)


def tiny(flags=""):
    """A method whose networks differ on MoCo. At the start the key network is a copy."""
    base = "--data scenes --arch resnet18 --size 64 --batch-size 8 --queue-size 20 --window 16 16"
    method, rng = resim.build(resim.get_args([*base.split(), *flags.split()]), torch.device("cpu")), torch.Generator()
    with torch.no_grad():
        for p, start in zip(method.key.parameters(), method.query.parameters(), strict=True) if method.key else ():
            assert torch.equal(p, start) and p is not start and not p.requires_grad
            p.add_(0.03 * torch.randn(p.shape, generator=rng))
    return method


def tiny_batch():
    """Crops that overlap more or less."""
    crops = torch.randint(0, 40, (2, 8, 4), generator=torch.Generator().manual_seed(0)).float()
    crops[..., 2:] += 80
    return *block_views(8), *crops


def unit(x):
    return x / x.norm(dim=-1, keepdim=True).clamp(min=1e-12)


def std(x):
    return np.std(unit(x).detach().numpy(), axis=0).mean()


@pytest.mark.parametrize("preset, size", [("paper", 64), ("official", 96)])
def test_a_level_against_double_loops_with_its_in_batch_negatives(preset, size):
    """Eqs. 1 and 2 from two feature maps: pooled windows, neighbourhoods of all images (P4) or of the group (P3)."""
    flags = "" if preset == "paper" else "--preset official --window 48 32 --pool roi_align"
    method, rng = tiny(f"{flags} --size {size}"), torch.Generator().manual_seed(1)
    _, _, crop_q, crop_k = tiny_batch()
    crop_k[2] += 1000  # an image without valid windows
    crop_k[4:, 0] += 10  # the second group has fewer
    mean = over_images if preset == "paper" else over_rows
    for level, n in zip(method.levels, (3 if flags else 1, 3), strict=True):
        pairs, side = resim.region_pairs(crop_q, crop_k, size, level.window, level.step), size // level.stride
        map_q, map_k = torch.randn(2, 8, 6, side, side, generator=rng)
        map_q.requires_grad_()
        loss, values = method.compare_regions(level, pairs, map_q, map_k)
        q = unit(resim.pool_regions(map_q, pairs.boxes_q, level.stride, method.pool))
        k = unit(resim.pool_regions(map_k, pairs.boxes_k, level.stride, method.pool))
        near = [[] for _ in range(8)]
        for b, i, j in itertools.product(range(8), range(side - n + 1), range(side - n + 1)):
            near[b].append(unit(sum(map_k[b, :, i + di, j + dj] for di in range(n) for dj in range(n))))
        want = 0
        for images in (range(0, 4), range(4, 8)):
            negatives = [x for b in (range(8) if level.name == "p4" else images) for x in near[b]]
            rows = [[(q[b, a], k[b, a, None]) for a in pairs.valid[b].nonzero()[:, 0]] for b in images]
            want = want + mean([[contrastive(*row, negatives, 0.2) for row in image] for image in rows]) / 2
        assert_close(loss, want, rtol=1e-5, atol=1e-6)
        gradients = [torch.autograd.grad(x, map_q, retain_graph=True)[0] for x in (loss, want)]
        assert_close(*gradients, rtol=1e-4, atol=1e-7)
        assert gradients[0].abs().max() > 1e-4 and pairs.valid[:4].sum() != pairs.valid[4:].sum()
        empty = np.mean([not any(image) for image in pairs.valid.tolist()])
        wants = dict(loss=want.item(), valid=pairs.valid.float().mean().item(), empty=empty, std=std(q[pairs.valid]))
        wants |= dict(spread=6**-0.5, chance=math.log(len(negatives) + 1))
        assert numbers(values) == pytest.approx({f"{x}_{level.name}": wants[x] for x in wants}, rel=1e-4)


def numbers(values):
    """Logged values: tensors, and plain numbers to compare with, which a log does not average."""
    plain = {name for name in values if "chance" in name or "spread" in name}
    return {name: x if name in plain else x.item() for name, x in values.items()}


def assert_same_step(method, hand, step, want, wants):
    """Loss, logged values, gradients and the state of a method after a step, and what was computed by hand."""
    loss, values = step
    assert_close(loss, want, rtol=1e-4, atol=1e-5)
    assert numbers(values) == pytest.approx(wants, rel=1e-3, abs=1e-5)
    loss.backward()
    gradients = torch.autograd.grad(want, [*hand.query.parameters()])
    for (name, p), gradient in zip(method.query.named_parameters(), gradients, strict=True):
        assert_close(p.grad, gradient, rtol=1e-2, atol=1e-4, msg=name)
        assert gradient.any() or method.key is None, name  # SimSiam's blocks start as identities
    assert method.key is None or all(p.grad is None for p in method.key.parameters())
    assert_close({**method.state_dict()}, {**hand.state_dict()})  # running statistics are each network's own


@pytest.mark.parametrize("flags", ["", "--levels c4", "--preset official"], ids=["fpn", "c4", "official"])
def test_moco_iteration_by_hand(flags):
    """Momentum, shuffling, images, levels, weights and queue, from the networks' outputs and the loss of each level."""
    method, views = tiny(f"{flags} --ema 0.75 --loss-weight 2.5"), tiny_batch()
    hand, order = copy.deepcopy(method), torch.randperm(8, generator=common.generator("shuffle", 0, 2))
    step = method(method.query, *views, step=2)
    with torch.no_grad():
        for key, query in zip(hand.key.parameters(), hand.query.parameters(), strict=True):
            key.copy_(0.75 * key + 0.25 * query)
        image_k, maps_k = hand.key(views[1][order])
    (image_q, maps_q), k = hand.query(views[0]), unit(image_k[order.argsort()])
    image = resim.image_contrastive_loss(unit(image_q), k, hand.image_queue.vectors, 0.2)
    wants = dict(loss_image=image.item(), loss_chance=math.log(21), std_image=std(image_q), std_spread=128**-0.5)
    want = 2.5 * image
    for level, map_q, map_k in zip(hand.levels, maps_q, maps_k, strict=True):
        pairs = resim.region_pairs(*views[2:], 64, level.window, level.step)
        loss, more = hand.compare_regions(level, pairs, map_q, map_k[order.argsort()])
        want, wants = want + loss, wants | numbers(more)
    hand.image_queue.enqueue(k)
    assert_same_step(method, hand, step, want, wants)


@pytest.mark.parametrize("flags", ["", "--levels c4 --pool roi_align"], ids=["fpn", "c4"])
def test_simsiam_iteration_by_hand(flags):
    """Valid windows alone are pooled and get into the batch statistics of the heads."""
    method, views = tiny(f"--framework simsiam --loss-weight 2.5 {flags}"), tiny_batch()
    hand = copy.deepcopy(method)
    step = method(method.query, *views, step=0)

    def cosine(p, z):
        return (F.cosine_similarity(p[0], z[1].detach()) + F.cosine_similarity(p[1], z[0].detach())) / 2

    stages = [hand.query.trunk(common.normalise(view)) for view in views[:2]]
    z = [hand.query.image_head(x[3].mean((2, 3))) for x in stages]
    image = -cosine([hand.query.image_predictor(x) for x in z], z).mean()
    want, wants = 2.5 * image, dict(loss_image=image.item(), std_image=std(z[1]), std_spread=128**-0.5)
    maps = [{"c4": x[2]} if flags else hand.query.pyramid(*x[1:]) for x in stages]
    for level in hand.levels:
        *boxes, valid = resim.region_pairs(*views[2:], 64, level.window, level.step)
        pooled = [resim.pool_regions(maps[n][level.name], boxes[n], level.stride, method.pool)[valid] for n in range(2)]
        z = [hand.query.region_heads[level.name](x) for x in pooled]
        row, image = cosine([hand.query.region_predictors[level.name](x) for x in z], z), valid.nonzero()[:, 0]
        means = [-row[image == b].mean() for b in image.unique()]
        loss = sum(means) / len(means)
        values = dict(loss=loss.item(), valid=valid.float().mean().item(), empty=1 - len(means) / 8, std=std(z[1]),
                      spread=z[1].shape[1] ** -0.5)  # fmt: skip
        want, wants = want + loss, wants | {f"{name}_{level.name}": x for name, x in values.items()}
    assert_same_step(method, hand, step, want, wants)


@pytest.mark.parametrize("framework", ["moco", "simsiam"])
def test_losses_and_pooling_stay_in_fp32_under_amp(framework, monkeypatch):
    kind, seen, outputs = "contrastive" if framework == "moco" else "cosine", [], []

    watch = lambda name, f: lambda *a: seen.append((name, torch.is_autocast_enabled("cpu"), a)) or f(*a)  # noqa: E731
    names = [f"image_{kind}_loss", f"region_{kind}_loss", "prroi_pool"]
    for name in names:
        monkeypatch.setattr(resim, name, watch(name, getattr(resim, name)))
    method = tiny(f"--amp bf16 --framework {framework}")
    for network in filter(None, (method.query, method.key)):
        for module in (network.image_head, *network.region_heads.values()):
            module.register_forward_hook(lambda m, i, out: outputs.append(out.dtype))
    method(method.query, *tiny_batch(), step=0)
    assert outputs == [torch.bfloat16] * (2 * 2 * 3 if framework == "moco" else 2 * 3)  # the encoders do run in bf16
    assert {name for name, *_ in seen} == {*names}
    for name, autocast, arguments in seen:
        assert not autocast or name == "prroi_pool"  # which turns it off by itself
        assert {x.dtype for x in arguments if isinstance(x, torch.Tensor)} <= {torch.float32, torch.bool}


@pytest.mark.parametrize("flags", ["", "--preset official", "--framework simsiam --levels c4"])
def test_batches_without_valid_windows_train_on(flags):
    """On SimSiam a single one counts as none, because batch norm needs two (R22)."""
    method = tiny(flags)
    view_q, view_k, crop_q, crop_k = tiny_batch()
    crop_k += 1000
    if "simsiam" in flags:
        crop_q[0], crop_k[0] = torch.tensor([[0.0, 0, 64, 64], [-40.0, -40, 24, 24]])
        assert resim.region_pairs(crop_q, crop_k, 64, 16, 16).valid.sum() == 1
    loss, values = method(method.query, view_q, view_k, crop_q, crop_k, step=0)
    loss.backward()
    assert all(x.item() == 1 for name, x in values.items() if name.startswith("empty")) and loss == values["loss_image"]
    of_regions = [p for name, p in method.query.named_parameters() if "region" in name or "pyramid" in name]
    assert of_regions and all((p.grad == 0).all() for p in of_regions)
    assert all(x.isfinite().all() for x in [*method.buffers(), *(p.grad for p in method.query.parameters())])


@torch.no_grad()
@pytest.mark.parametrize("framework", ["moco", "simsiam"])
def test_method_measures_and_draws_what_its_loss_sees(framework, monkeypatch):
    """C4 and similarities of pooled windows of view q to neighbourhoods of view k, of images that share statistics."""
    method, drawn = tiny(f"--framework {framework} --window 24 24"), []
    monkeypatch.setattr(look, "draw_windows", lambda *a: drawn.append(a))
    for p in method.query.parameters():  # SimSiam's blocks are no longer identities
        p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    views, networks = tiny_batch(), (method.query, method.key or method.query)
    stages = [network.trunk(common.normalise(view)) for network, view in zip(networks, views[:2], strict=True)]
    c4_q, c4_k = (x[2].flatten(2) for x in stages)
    cosines = F.cosine_similarity(c4_q[:, :, :, None], c4_k[:, :, None], dim=1)
    found = method.measure(*views)
    assert found == look.correspondence(cosines, *views[2:], 4, 4) and 0 < found[0] < found[2]

    method.draw("x.png", *views)
    ((*given, shared_q, shared_k, seen),) = drawn
    assert given[0] == "x.png" and given[1] is views[0] and given[2] is views[1]
    for crop, other, shared in ((views[2], views[3], shared_q), (views[3], views[2], shared_k)):
        corner, side = crop[:, :2].repeat(1, 2), (crop[:, 2:] - crop[:, :2]).repeat(1, 2)
        assert_close(shared, (other - corner) * 64 / side, rtol=0, atol=1e-3)
    maps = [network.pyramid(*x[1:]) for network, x in zip(networks, stages, strict=True)]
    for level, kernel, (*given, pairs, similarity) in zip(method.levels, (2, 3), seen, strict=True):
        assert given == [level.name, level.stride, kernel]
        heads = [network.region_heads[level.name] for network in networks]
        map_q, map_k = (x[level.name] for x in maps)
        if framework == "moco":
            map_q, map_k = heads[0](map_q), heads[1](map_k)
        q = resim.pool_regions(map_q, pairs.boxes_q, level.stride)
        near, side = resim.neighbourhoods(map_k, kernel), 64 // level.stride - kernel + 1
        if framework == "simsiam":
            q, near = (heads[0](x.flatten(0, 1)).unflatten(0, x.shape[:2]) for x in (q, near))
            q = method.query.region_predictors[level.name](q.flatten(0, 1)).unflatten(0, q.shape[:2])
        want = (unit(q) @ unit(near).transpose(1, 2)).unflatten(2, (side, side))
        assert_close(similarity, want, rtol=0, atol=1e-4)
        assert similarity.std() > 0.05 and pairs.valid.any()
        assert all(map(torch.equal, pairs, resim.region_pairs(*views[2:], 64, level.window, level.step)))


def test_picture_shows_overlap_matching_windows_and_the_heat_in_its_place(tmp_path):
    """Pixels of a picture of plain views: shared parts bright, boxes of a colour in both views, heat where it belongs."""
    bright, dark = ((180, 30, 60), (30, 150, 90)), ((60, 10, 20), (10, 50, 30))
    views = [torch.tensor(c, dtype=torch.uint8).view(1, 3, 1, 1).expand(2, 3, 112, 112) for c in bright]
    shared = torch.tensor([[[28.0, 14, 140, 126]], [[-28.0, -14, 84, 98]]]).expand(2, 2, 4)  # 84 x 98 pixels are shared
    boxes_q = torch.tensor([[40.0, 20, 60, 40], [70, 60, 100, 100]]).expand(2, 2, 4)
    boxes_k = torch.tensor([[6.0, 8, 24, 30], [60, 78, 80, 94]]).expand(2, 2, 4)  # not where they belong: told apart
    similarity, peaks = torch.full((2, 2, 5, 5), -0.2), ((1, 3), (3, 2))  # of each window, row and column
    similarity[0, 0][peaks[0]] = similarity[0, 1][peaks[1]] = 0.7
    pairs = resim.Pairs(boxes_q, boxes_k, torch.tensor([[True, True], [False, False]]))
    look.draw_windows(tmp_path / "regions.png", *views, *shared, [("p4", 16, 3, pairs, similarity)])
    picture = Image.open(tmp_path / "regions.png").convert("RGB")

    def pixel(row, column, x, y):  # x, y: in pixels of the view, of which a panel shows two for one
        return picture.getpixel((6 + column * 230 + round(2 * x), 20 + row * 230 + round(2 * y)))

    def edges(row, column, box):
        x0, y0, x1, y1 = box.tolist()
        x, y = (x0 + x1) / 2, (y0 + y1) / 2
        return {pixel(row, column, *at) for at in ((x, y0 + 0.5), (x, y1 - 1), (x0 + 0.5, y), (x1 - 1, y))}

    for row in range(2):  # the lower right of view q, the upper left of view k
        assert [pixel(row, 0, *at) for at in ((24, 60), (32, 60), (66, 10), (66, 18))] == [dark[0], bright[0]] * 2
        assert [pixel(row, 1, *at) for at in ((80, 40), (88, 40), (40, 94), (40, 102))] == [bright[1], dark[1]] * 2
    colours = [edges(0, 0, box) for box in boxes_q[0]]
    assert colours == [edges(0, 1, box) for box in boxes_k[0]]
    white = colours.index({(255, 255, 255)})
    assert colours[1 - white] == {(255, 176, 0)} and edges(0, 2, boxes_k[0, white]) == colours[white]
    assert edges(1, 0, boxes_q[1, 0]) == {bright[0]} and edges(1, 1, boxes_k[1, 0]) == {bright[1]}  # not valid

    grey = 0.299 * 30 + 0.587 * 150 + 0.114 * 90
    low, high = ([0.4 * grey + 0.6 * c for c in colour] for colour in ((0, 0, 127), (255, 204, 0)))
    # cell j of the map lies at pixel 16 j: 3 x 3 cells from (i, j) have their centre at 16 (j + 1), 16 (i + 1)
    (y, x), (y_other, x_other) = ([16 * (n + 1) for n in peaks[window]] for window in (white, 1 - white))
    assert pixel(0, 2, x, y) == pytest.approx(high, abs=2)
    assert pixel(0, 2, x_other, y_other) == pytest.approx(low, abs=2)  # the other window's similarity is not shown
    for far, red in ((7, high[0]), (9, low[0])):  # a square of one cell
        assert pixel(0, 2, x - far, y + far)[0] == pixel(0, 2, x + far, y - far)[0] == pytest.approx(red, abs=2)
    for row, *at in ((0, 110, 50), (1, 56, 56)):  # no neighbourhood has its centre there; no window, no heat
        assert pixel(row, 2, *at) == pytest.approx([grey] * 3, abs=2)


PRESET = dict(framework="moco", levels="fpn", window=[48, 32], pool="prroi", loss_weight=1.0, temperature=0.2, lr=0.03, batch_size=256,
              epochs=200, queue_size=None, ema=0.999, arch="resnet50", size=224, amp="none")  # fmt: skip
DEMO = dict(arch="resnet18", size=136, batch_size=64, epochs=3, lr=0.6, ema=0.99, temperature=0.1, demo=True)


def differing(flags):
    """What a command line changes in the settings of a bare one."""
    bare, given = (vars(resim.get_args(["--data", "x", *words.split()])) for words in ("", flags))
    return {name: value for name, value in given.items() if value != bare[name]}


@pytest.mark.parametrize("fast", [False, True])
def test_presets_and_what_wins_over_them(fast, monkeypatch):
    monkeypatch.setattr(resim, "bf16_is_fast", lambda: fast)
    demo, simsiam = DEMO | ({"amp": "bf16"} if fast else {}), {"framework": "simsiam", "lr": 0.1}
    assert PRESET.items() <= vars(resim.get_args(["--data", "x"])).items()
    assert differing("--preset official") == {"preset": "official"}
    assert differing("--framework simsiam --levels c4") == simsiam | {"levels": "c4"}
    assert resim.get_args(["--demo"]).data == "scenes" and differing("--demo") == demo
    assert differing("--demo --framework simsiam") == demo | simsiam
    bare = "--arch resnet50 --size 224 --batch-size 256 --epochs 200 --lr 0.03 --ema 0.999 --temperature 0.2 --amp none"
    for flags in (f"--demo --framework simsiam {bare}", f"{bare} --framework simsiam --demo"):  # in any order
        assert differing(flags) == {"demo": True, "framework": "simsiam"}


REFUSED = {
    "--loss-weight -1": "argument --loss-weight: -1: must be at least 0",
    "--window 48 0": "argument --window: 0: must be at least 1",
    "--window 224 32": "--size 224: a window of 224 pixels must be smaller than the view",
    "--window 16 16 --size 32": "--size 32: a window of 32 pixels must be smaller than the view",  # P3's
    "--preset official --levels c4": "--preset official is ReSim-FPN on MoCo-v2",
    "--preset official --framework simsiam": "--preset official is ReSim-FPN on MoCo-v2",
}


@pytest.mark.parametrize("flags", REFUSED)
def test_settings_that_make_no_sense(flags, capsys):
    assert refused(capsys, resim.get_args, f"--data x {flags}").startswith(REFUSED[flags])


def resnet_with_head():
    resnet = torchvision.models.resnet18()
    resnet.fc = nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 128))
    return resnet


def released_checkpoint():
    """A state_dict as the released code writes it, from torchvision's ResNet and its own names for the rest."""
    state = {}
    with common.drawing("released"):
        for network in ("encoder_q", "encoder_k"):
            resnet = resnet_with_head()
            widths = {"lateral3": 32, "lateral4": 64, "lateral5": 128, "output3": 256, "output4": 256}
            for name, inputs in widths.items():
                resnet.add_module(f"fpn_{name}", nn.Conv2d(inputs, 256, 3 if "output" in name else 1))
            state |= {f"module.{network}.{name}": tensor for name, tensor in resnet.state_dict().items()}
        return state | {"module.queue": F.normalize(torch.randn(128, 20), dim=0), "module.queue_ptr": torch.tensor([7])}


@torch.no_grad()
def test_released_checkpoints_load_into_the_model_and_back(tmp_path, capsys):
    """Embeddings are those of torchvision's ResNet, maps those of its FPN with the tool's weights."""
    theirs, method = released_checkpoint(), tiny("--preset official")
    ours = {name: theirs[released.released_name(name)] for name in method.state_dict()}
    method.load_state_dict(ours | {"image_queue.vectors": theirs["module.queue"].T})  # strict
    assert torch.equal(method.image_queue.vectors[3], theirs["module.queue"][:, 3])
    assert torch.equal(method.key.pyramid.inner_blocks["3"][0].bias, theirs["module.encoder_k.fpn_lateral5.bias"])
    files = {"run": {"script": "resim", "settings": {"preset": "official"}, "step": 3, "model": method.state_dict()}}
    files |= {"published": {"epoch": 200, "state_dict": theirs}, "bare": theirs}
    for name, content in files.items():
        torch.save(content, tmp_path / name)
    released.main([str(tmp_path / "run"), "--out", str(tmp_path / "back")])
    back = torch.load(tmp_path / "back")
    assert_same(back, {"state_dict": {name: theirs[name] for name in back["state_dict"]}})
    assert back["state_dict"].keys() == theirs.keys() and f"back: {len(theirs)} tensors" in capsys.readouterr().out

    of_resnet = {name.removeprefix("module.encoder_q."): x for name, x in theirs.items() if "encoder_q" in name}
    for name in ("published", "bare"):
        released.main([str(tmp_path / name), "--out", str(tmp_path / "fpn"), "--arch", "resnet18"])
        assert f"fpn: {len(of_resnet) - 4} tensors" in capsys.readouterr().out  # all but the head's
    layers = {f"layer{i + 1}": str(i) for i in range(4)}
    backbone = BackboneWithFPN(torchvision.models.resnet18(), layers, [16, 32, 64, 128], 256)
    result = nn.ModuleDict({"backbone": backbone}).load_state_dict(torch.load(tmp_path / "fpn"), strict=False)
    left = {f"backbone.fpn.{name}" for name in ("inner_blocks.0", "layer_blocks.0", "layer_blocks.3")}
    assert result.unexpected_keys == [] and {name.rsplit(".", 2)[0] for name in result.missing_keys} == left
    resnet, view = resnet_with_head(), common.normalise(block_views(4)[0])
    resnet.load_state_dict({name: x for name, x in of_resnet.items() if "fpn" not in name})
    (image, (p4, p3)), maps = method.query(block_views(4)[0]), backbone(view)
    assert_close((image, p4, p3), (resnet(view), maps["2"], maps["1"]), rtol=1e-3, atol=1e-4)


def test_files_that_the_tool_cannot_turn(tmp_path):
    theirs, file = released_checkpoint(), tmp_path / "file.pth"
    without = {name: x for name, x in theirs.items() if name != "module.encoder_q.fpn_lateral4.bias"}
    narrow = theirs | {"module.encoder_q.fpn_output3.weight": torch.zeros(64, 256, 3, 3)}
    run = {"script": "resim", "settings": {"preset": "paper"}, "model": {}}
    for words, state in {
        "not a run with --preset official": run, "layer_blocks.1.0.weight is .*check --arch": narrow,
        "inner_blocks.2.0.bias is missing, so this is no released": {"state_dict": without},
    }.items():  # fmt: skip
        torch.save(state, file)
        with pytest.raises(common.UserError, match=words) as error:
            released.main([str(file), "--out", str(tmp_path / "out.pth"), "--arch", "resnet18"])
        assert "\n" not in str(error.value) and str(error.value).startswith(f"{file}: ")
        assert not (tmp_path / "out.pth").exists()


def test_pieces_work_alone(monkeypatch):
    """The source of each function by itself, with nothing but libraries in scope, passes the same oracles."""
    pooling = "hat_integrals bin_weights prroi_pool"
    pieces = [f"{pooling} pool_regions", "window_grid map_boxes Pairs region_pairs", "neighbourhoods", "two_views"]
    for names in (*pieces, "PYRAMID Pyramid", "simsiam_heads", "window_grid", "map_boxes"):
        for name, alone in zip(names.split(), lifted("resim.py", *names.split()), strict=True):
            assert name == "PYRAMID" or alone is not getattr(resim, name)
            monkeypatch.setattr(resim, name, alone)
    test_views_follow_the_recipe(monkeypatch)
    test_window_counts(48, 32, 6)
    test_map_boxes_and_valid_against_a_loop()
    test_prroi_pool_against_quadrature((2, 3), 0.5)
    test_prroi_pool_gradients()
    test_pool_regions_hands_boxes_to_either_operator()
    test_a_level_against_double_loops_with_its_in_batch_negatives("paper", 64)
    test_pyramid_against_torchvision("official")
    test_simsiam_heads_have_table_7s_dimensions("c4")
