"""d3ssl.py: views, boxes, augmentations, networks, losses and one iteration, each against something independent."""

import copy
import itertools
import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from helpers import (
    coordinate_image,
    keep_signals,  # noqa: F401
    lifted,
)
from PIL import Image
from torch import nn

import common
import d3ssl
from d3ssl import Drawn
from harness import images, look
from harness.proposals import WithProposals
from harness.run import Run
from harness.scenes import make_scene

SIZE = 64


AUGMENT = ("prc", "prm", "rbj")  # the paper's


def some_boxes(count, size, seed=0, least=20):
    """(count, 4) boxes inside a view of that size, sides of at least `least` pixels."""
    rng = torch.Generator().manual_seed(seed)
    side = least + torch.rand(count, 2, generator=rng) * (size * 0.6 - least)
    corner = torch.rand(count, 2, generator=rng) * (size - side)
    return torch.cat([corner, corner + side], 1)


def draw(item, *key, **settings):
    """Drawn of (image, proposals). The key stands for the image in its epoch."""
    with common.drawing(*key):
        return d3ssl.draw_views(item, **(dict(size=SIZE, augment=AUGMENT) | settings))


def batched(items, *key, **settings):
    """Drawn of each item, with a leading dimension."""
    drawn = [draw(item, *key, i, **settings) for i, item in enumerate(items)]
    return Drawn(*(torch.stack(x) for x in zip(*drawn, strict=True)))


def batch_of(count, **settings):
    """Drawn of random blocks with random boxes, with a leading dimension."""
    rng, items = np.random.default_rng(0), []
    for i in range(count):
        blocks = rng.integers(0, 256, (12, 15, 3), np.uint8)
        items.append((Image.fromarray(blocks).resize((150, 120), Image.NEAREST), some_boxes(6, 120, i, least=45)))
    return batched(items, "test", **settings)


# ----------------------------------------------------------------------------------------------------------------------
# views and boxes
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_colours(monkeypatch):
    """Colour operations would change coordinates that are written in colours; crop, resize and flip stay real."""
    monkeypatch.setattr(d3ssl.transforms, "ColorJitter", lambda *strength: lambda view: view)
    monkeypatch.setattr(d3ssl.TF, "rgb_to_grayscale", lambda view, channels: view)
    monkeypatch.setattr(Image.Image, "filter", lambda view, blur: view)


def test_boxes_show_the_same_in_every_view(no_colours, monkeypatch):
    """A coordinate image: what lies in a box of x1, x2, x2-s, x3 are the coordinates of the proposal it comes from."""
    monkeypatch.setattr(d3ssl, "proposal_cutout", lambda view, boxes: view)
    W, H = 300, 200
    image, proposals = coordinate_image(W, H), some_boxes(30, 200, 1, least=60)
    checked, flips = 0, [0, 0]
    for i in range(30):
        drawn = batched([(image, proposals)] * 2, "same", i, augment=(), size=128)
        inputs = d3ssl.network_inputs(drawn, torch.tensor([1, 0]))
        mean, std = (torch.tensor(x).view(3, 1, 1) for x in (common.PIXEL_MEAN, common.PIXEL_STD))
        seen = []  # for each view, (K, 4): least and most x and y that a box shows, in pixels of the image
        for x, boxes in inputs:
            shown = (x[0] * std + mean)[:2] * 255 / 256 * torch.tensor([W, H]).view(2, 1, 1)
            spans = []
            for box in boxes[0]:
                (x0, y0), (x1, y1) = box[:2].round().int().tolist(), box[2:].round().int().tolist()
                part = shown[:, y0:y1, x0:x1].flatten(1)
                spans.append(torch.cat([part.amin(1), part.amax(1)]))
            seen.append(torch.stack(spans))
        assert inputs.x2_s[0].shape[-1] == 64 and (inputs.x2_s[1] * 2 - inputs.x2[1]).abs().max() < 1e-4
        flips[0] += bool(inputs.x1[0][0, 0, :, -1].mean() < inputs.x1[0][0, 0, :, 0].mean())
        flips[1] += bool(inputs.x2[0][0, 0, :, -1].mean() < inputs.x2[0][0, 0, :, 0].mean())
        for k in range(4):
            span = seen[0][k]
            proposal = proposals[(proposals - span).abs().amax(1).argmin()]
            assert (span - proposal).abs().max() < 5  # x1 shows all of it
            for other, tolerance in zip(seen[1:], (5, 9, 5), strict=True):
                clipped = torch.cat(
                    [torch.maximum(other[k][:2], proposal[:2]), torch.minimum(other[k][2:], proposal[2:])]
                )
                assert (other[k] - clipped).abs().max() < tolerance  # nothing but the proposal
                border = inputs.x2[1][0, k]
                if border.min() > 0.5 and border.max() < 127.5:  # wholly inside x2: all of it
                    assert (other[k] - proposal).abs().max() < tolerance
                    checked += 1
    assert checked > 200 and all(8 < n < 22 for n in flips)


def test_views_follow_the_recipe():
    """x1 is the whole image. x2 has [0.4, 1] of its area and an aspect of 3/4 to 4/3. Each is flipped half the time."""
    image, shown = Image.new("RGB", (400, 300)), []
    original = d3ssl.distorted_view

    def note(image, crop, size):
        view, flipped = original(image, crop, size)
        shown.append((crop.tolist(), flipped))
        return view, flipped

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(d3ssl, "distorted_view", note)
        for i in range(300):
            draw((image, torch.zeros(0, 4)), "recipe", i, size=32)
    wholes, crops = shown[::2], shown[1::2]
    assert all(crop == [0, 0, 400, 300] for crop, _ in wholes)
    x0, y0, x1, y1 = torch.tensor([crop for crop, _ in crops]).double().T
    area, aspect = (x1 - x0) * (y1 - y0) / 120000, (x1 - x0) / (y1 - y0)
    assert 0.39 < area.min() < 0.44 and 0.9 < area.max() <= 1 and 0.74 < aspect.min() and aspect.max() < 1.35
    first, second = (np.array([flipped for _, flipped in part]) for part in (wholes, crops))
    assert (
        abs(first.mean() - 0.5) < 0.1 and abs(second.mean() - 0.5) < 0.1 and abs((first & second).mean() - 0.25) < 0.1
    )


def test_colour_operations_and_their_shares(monkeypatch):
    """MoCo-v2's, in its order: jitter 0.8, grey 0.2, blur 0.5, flip last."""
    seen = []
    note = lambda name: lambda view, *_: seen.append(name) or view  # noqa: E731
    monkeypatch.setattr(d3ssl.transforms, "ColorJitter", lambda *strength: note(f"jitter {strength}"))
    monkeypatch.setattr(d3ssl.TF, "rgb_to_grayscale", note("grey"))
    monkeypatch.setattr(d3ssl.TF, "hflip", note("flip"))
    radii = []
    monkeypatch.setattr(
        Image.Image, "filter", lambda view, blur: radii.append(blur.radius) or seen.append("blur") or view
    )
    image, crop, runs = Image.new("RGB", (40, 40)), torch.tensor([0.0, 0, 40, 40]), []
    for i in range(500):
        seen.clear()
        with common.drawing("colours", i):
            d3ssl.distorted_view(image, crop, 32)
        runs.append([*seen])
    order = ["jitter (0.4, 0.4, 0.4, 0.1)", "grey", "blur", "flip"]
    assert all(run == [name for name in order if name in run] for run in runs)
    shares = [np.mean([name in run for run in runs]) for name in order]
    assert np.abs(np.array(shares) - (0.8, 0.2, 0.5, 0.5)).max() < 0.07
    assert 0.1 <= min(radii) < 0.15 and 1.9 < max(radii) <= 2 and abs(np.mean(radii) - 1.05) < 0.1


WHOLE = torch.tensor([0.0, 0, 200, 200])
CROP = torch.tensor([50.0, 50, 150, 150])
INSIDE = torch.tensor(
    [[60.0, 60, 100, 100], [70, 70, 140, 120], [100, 100, 150, 150], [51, 52, 90, 140], [60, 90, 99, 140]]
)
PARTLY = torch.tensor([[0.0, 0, 100, 100], [100, 20, 190, 120]])
OUTSIDE = torch.tensor([[0.0, 0, 40, 200], [0, 0, 55, 200], [160, 60, 199, 90]])  # or less than a cell inside


def chosen(boxes, count, i=0):
    with common.drawing("choose", i):
        return d3ssl.choose_boxes(boxes, WHOLE, CROP, 224, count, 16)


def test_boxes_wholly_inside_the_crop_come_first():
    everything = torch.cat([OUTSIDE, PARTLY, INSIDE])
    counts = torch.zeros(len(everything))
    for i in range(200):
        boxes, found = chosen(everything, 4, i)
        picked = [int((everything == box).all(1).nonzero()) for box in boxes]
        assert found == 4 == len(set(picked)) and min(picked) >= 5  # without replacement, of those inside
        counts[picked] += 1
        boxes, found = chosen(everything, 6, i)
        picked = [int((everything == box).all(1).nonzero()) for box in boxes]
        assert found == 6 and set(range(5, 10)) < set(picked) and len(set(picked) & {3, 4}) == 1
    assert (counts[5:] - 160).abs().max() < 25  # each as often as any


@pytest.mark.parametrize("boxes", [torch.zeros(0, 4), OUTSIDE])
def test_an_image_without_a_usable_proposal_gets_the_crop(boxes):
    got, found = chosen(boxes, 4)
    assert found == 0 and torch.equal(got, CROP.expand(4, 4))


@pytest.mark.parametrize("n", [1, 2, 3])
def test_fewer_proposals_than_k_are_repeated(n):
    own = torch.cat([PARTLY[:1], INSIDE[: n - 1]])
    again = set()
    for i in range(30):
        got, found = chosen(torch.cat([own, OUTSIDE]), 4, i)
        picked = [int((own == box).all(1).nonzero()) for box in got]
        assert found == n and sorted(picked[:n]) == list(range(n))
        again |= set(picked[n:])
    assert again == set(range(n))  # any of them


def test_small_boxes_are_left_out_in_either_view():
    """16 pixels of the 224 views: 7.1 of the crop's 100 pixels, 14.3 of the image's 200."""
    for width, usable in ((14.0, False), (14.6, True)):
        box = torch.tensor([[60, 60, 60 + width, 100]])  # large enough in the crop, perhaps not in the whole image
        assert chosen(box, 1)[1] == usable
    for right, usable in ((57.0, False), (57.4, True)):
        box = torch.tensor([[20, 60, right, 100]])  # large in the image, perhaps hardly inside the crop
        assert chosen(box, 1)[1] == usable


# ----------------------------------------------------------------------------------------------------------------------
# region-level augmentations
# ----------------------------------------------------------------------------------------------------------------------


def mask_by_centres(boxes, H, W):
    """Eq. 6, pixel by pixel: is its centre in a box?"""
    mask = torch.zeros(H, W, dtype=torch.bool)
    for i, j, (x0, y0, x1, y1) in itertools.product(range(H), range(W), boxes.tolist()):
        if x0 <= j + 0.5 < x1 and y0 <= i + 0.5 < y1:
            mask[i, j] = True
    return mask


def test_foreground_mask_against_pixel_centres():
    boxes = torch.cat([some_boxes(3, 40, 5, least=4), torch.tensor([[-5.0, 2.5, 3.5, 9.49], [35, 30, 60, 70]])])
    for k in range(len(boxes) + 1):
        assert torch.equal(d3ssl.foreground_mask(boxes[:k], 32, 40), mask_by_centres(boxes[:k], 32, 40))


NESTED = torch.tensor([[70.0, 70, 130, 130], [0, 0, 200, 200], [50, 50, 150, 150], [25, 25, 175, 175]])  # shuffled


def most_rounding(rows, columns, share):
    """How much more than a share of a box its cut can have: up to a pixel along each axis, at any place."""
    scale = share**0.5
    return (math.ceil(scale * rows) * math.ceil(scale * columns)) / (rows * columns) - share


def test_prc_on_nested_boxes_cuts_what_the_rule_says():
    """Four nested boxes at c = 0.3, whose mean shares are known.

    A cut always covers more than c of the next smaller box, wherever it falls, so that box is restored: what is left
    of the cut lies around it. The overlap of a cut and the next box has a mean along each axis by itself.
    """
    shares, c = [], 0.3
    for i in range(400):
        with common.drawing("nested", i):
            keep = d3ssl.proposal_cutout(torch.ones(200, 200), NESTED, c, c)
        shares.append([1 - keep[d3ssl.pixel_slices(box, 200, 200)].mean().item() for box in NESTED[[1, 3, 2, 0]]])
    shares, sides, expected = torch.tensor(shares), [200, 150, 100, 60], [c]
    for side, inner in [*itertools.pairwise(sides)][::-1]:
        start = np.linspace(0, side - c**0.5 * side, 10_000)
        low, high = (side - inner) / 2, (side + inner) / 2
        overlap = np.minimum(start + c**0.5 * side, high) - np.maximum(start, low)
        assert overlap.min() ** 2 > c * inner**2
        expected.insert(0, c - (overlap.mean() ** 2 - expected[0] * inner**2) / side**2)
    assert (shares[:, 3] <= c + most_rounding(60, 60, c)).all()  # it is cut last: never more than its share
    assert np.abs(shares.mean(0).numpy() - expected).max() < 0.008, (shares.mean(0), expected)


def prc_by_sets(boxes, draws):
    """Section 4.1's rule with sets of pixels, and the draws given as (c, u, v) in the order of use.

    An edge at a real-valued place, rounded: the pixels whose centres lie between the edges are cut (D19).
    """
    gone = set()
    for (x0, y0, x1, y1), (c, u, v) in zip(
        sorted(boxes, key=lambda b: -(b[2] - b[0]) * (b[3] - b[1])), draws, strict=True
    ):
        own = {(i, j) for i in range(y0, y1) for j in range(x0, x1)}
        cut = len(own & gone) / len(own)
        if cut > c:
            gone, cut = gone - own, 0
        scale = math.sqrt(c - cut)
        h, w = scale * (y1 - y0), scale * (x1 - x0)
        top, left = y0 + u * (y1 - y0 - h), x0 + v * (x1 - x0 - w)
        gone |= {(i, j) for i, j in own if top < i + 0.5 < top + h and left < j + 0.5 < left + w}
    return gone


def test_prc_against_sets_of_pixels():
    for i in range(20):
        boxes = some_boxes(5, 60, i, least=8).round()
        with common.drawing("prc", i):
            draws = [(0.2 + 0.3 * torch.rand(()).item(), *torch.rand(2).tolist()) for _ in boxes]
        with common.drawing("prc", i):
            keep = d3ssl.proposal_cutout(torch.ones(60, 60, dtype=torch.bool), boxes)
        gone = {(y, x) for y, x in (~keep).nonzero().tolist()}
        assert gone == prc_by_sets([[int(x) for x in box] for box in boxes.tolist()], draws)


@pytest.mark.parametrize("rows, columns, share", [(23, 37, 0.3), (21, 43, 0.2), (25, 31, 0.45)])
def test_prc_rounds_each_edge_of_a_cut(rows, columns, share):
    """D19: the edges are a real-valued start and end, rounded. The size of a cut thus depends on its place.

    A side is rounded up as often as its fraction says, so the mean share is c.
    """
    scale, box, cuts = share**0.5, torch.tensor([[5.0, 7, 5 + columns, 7 + rows]]), []
    for i in range(1500):
        with common.drawing("edges", i):
            torch.rand(())
            u, v = torch.rand(2).tolist()
        with common.drawing("edges", i):
            gone = ~d3ssl.proposal_cutout(torch.ones(70, 60, dtype=torch.bool), box, share, share)
        sides = []
        for at, first, place, side in ((1, 7, u, rows), (0, 5, v, columns)):
            start = place * (side - scale * side)
            found = gone.any(at).nonzero()[:, 0]
            wanted = round(start), round(start + scale * side)
            assert (found[0].item() - first, found[-1].item() + 1 - first) == wanted
            sides.append(len(found))
        assert gone.sum() == sides[0] * sides[1]  # one rectangle
        cuts.append(sides)
    cuts = np.array(cuts)
    for sizes, side in zip(cuts.T, (rows, columns), strict=True):
        length = scale * side
        assert {*sizes.tolist()} == {math.floor(length), math.ceil(length)}  # for one box and one share
        assert (sizes > length).mean() == pytest.approx(length % 1, abs=0.07)
    rounded_sides = round(scale * rows) * round(scale * columns) / (rows * columns)
    assert cuts.prod(1).mean() / (rows * columns) == pytest.approx(share, abs=0.003)
    assert abs(rounded_sides - share) > 0.005  # what rounding the sides would give, at any place


def test_prc_never_leaves_its_box():
    """At any place, the two extreme ones among them, and for any share. A share of 1 cuts all of the box."""
    boxes = torch.cat([some_boxes(20, 60, 3, least=3), torch.tensor([[-4.0, 2.5, 9.6, 30], [40, 50, 70, 66]])])
    draws = {"lowest": 0.0, "highest": 1 - 2**-24, "any": None}
    for i, (box, value) in enumerate(itertools.product(boxes, draws.values())):
        with common.drawing("leaves", i), pytest.MonkeyPatch.context() as patch:
            if value is not None:
                patch.setattr(d3ssl.torch, "rand", lambda *size, value=value: torch.zeros(*size) + value)
            for low, high in ((0.2, 0.5), (0.97, 1.0), (1.0, 1.0)):
                gone = ~d3ssl.proposal_cutout(torch.ones(60, 64, dtype=torch.bool), box[None], low, high)
                inside = mask_by_centres(box[None], 60, 64)
                assert not (gone & ~inside).any()
                assert low < 1 or torch.equal(gone, inside)


def test_prc_cuts_a_rectangle_of_the_boxs_shape_at_any_place():
    box, shares, centres = torch.tensor([[20.0, 10, 100, 50]]), [], []
    view = torch.rand(3, 64, 128) + 0.5
    for i in range(300):
        with common.drawing("one", i):
            got = d3ssl.proposal_cutout(view, box)
        gone = (got == 0).all(0)
        assert torch.equal(got[:, ~gone], view[:, ~gone])
        rows, columns = gone.any(1).nonzero()[:, 0], gone.any(0).nonzero()[:, 0]
        h, w = len(rows), len(columns)
        assert gone.sum() == h * w and abs(w / h - 2) < 0.12  # one rectangle, of the box's aspect
        assert rows[0] >= 10 and rows[-1] < 50 and columns[0] >= 20 and columns[-1] < 100
        shares.append(h * w / 3200)
        centres.append(((rows[0] - 10) / max(1, 40 - h), (columns[0] - 20) / max(1, 80 - w)))
    shares, centres = np.array(shares), np.array(centres)
    assert 0.18 < shares.min() < 0.24 and 0.46 < shares.max() < 0.52 and abs(shares.mean() - 0.35) < 0.02
    assert np.abs(np.corrcoef(centres.T)[0, 1]) < 0.2 and (np.abs(centres.mean(0) - 0.5) < 0.06).all()
    assert (centres.min(0) < 0.05).all() and (centres.max(0) > 0.95).all()


def test_smaller_proposals_keep_theirs():
    """Of the smallest box never more than c is cut, but for the rounding of edges, whatever lies around it.

    Without the rule it would often be more.
    """
    shares, unprotected = [], 0
    for i in range(200):
        small = some_boxes(1, 120, i, least=20)[0] * 0.5 + 30
        boxes = torch.stack([torch.tensor([0.0, 0, 120, 120]), small, torch.tensor([10.0, 10, 110, 110])])
        with common.drawing("small", i):
            keep = d3ssl.proposal_cutout(torch.ones(120, 120), boxes, 0.3, 0.3)
        with common.drawing("small", i):
            around = d3ssl.proposal_cutout(torch.ones(120, 120), boxes[[0, 2]], 0.3, 0.3)
        inside = d3ssl.pixel_slices(small, 120, 120)
        shares.append(1 - keep[inside].mean().item())
        rows, columns = keep[inside].shape
        assert shares[-1] <= 0.3 + (0.3**0.5 * (rows + columns) + 1) / (rows * columns)
        unprotected = max(unprotected, 1 - around[inside].mean().item())
    assert np.mean(shares) < 0.31 and unprotected > 0.9


def test_prm_shows_background_from_all_sides_and_never_touches_boxes():
    boxes = torch.tensor([[40.0, 44, 70, 80], [60, 30, 84, 60]])
    inside = mask_by_centres(boxes, 120, 128)
    sides, shares, aspects = set(), [], []
    for i in range(300):
        with common.drawing("prm", i):
            keep = d3ssl.proposal_mask(torch.ones(120, 128, dtype=torch.bool), boxes)
        with common.drawing("prm", i):
            erased = d3ssl.proposal_mask(torch.ones(120, 128, dtype=torch.bool), boxes, erase=True)
        assert keep[inside].all() and erased[inside].all()
        assert torch.equal(keep[~inside], ~erased[~inside])  # the two readings are complements
        shown = keep & ~inside
        rows, columns = shown.any(1).nonzero()[:, 0], shown.any(0).nonzero()[:, 0]
        top, bottom, left, right = rows[0].item(), rows[-1].item() + 1, columns[0].item(), columns[-1].item() + 1
        filled = keep[top:bottom, left:right]
        assert filled.all()  # one rectangle
        shares.append((bottom - top) * (right - left) / (120 * 128))
        aspects.append((right - left) / (bottom - top))
        for name, reached in dict(above=top < 25, below=bottom > 85, left=left < 30, right=right > 90).items():
            sides |= {name} if reached else set()
            sides |= {f"not {name}"} if not reached else set()
    assert sides == {f"{n}{side}" for n in ("", "not ") for side in ("above", "below", "left", "right")}
    assert 0.18 < min(shares) < 0.25 and 0.55 < max(shares) < 0.62 and 0.72 < min(aspects) and max(aspects) < 1.38


def test_rbj_stays_inside_and_is_never_larger():
    """10,000 draws; each side shrinks evenly by 0 to 20 %, the centre moves evenly over what that leaves."""
    boxes = some_boxes(10_000, 224, 3)
    with common.drawing("rbj"):
        got = d3ssl.restricted_jitter(boxes)
    assert (got[:, :2] >= boxes[:, :2]).all() and (got[:, 2:] <= boxes[:, 2:]).all()
    old, new = boxes[:, 2:] - boxes[:, :2], got[:, 2:] - got[:, :2]
    ratio, place = new / old, (got[:, :2] - boxes[:, :2]) / (old - new).clamp(min=1e-6)
    assert (ratio > 0.7999).all()
    for value, mean, deviation in ((ratio, 0.9, 0.2 / 12**0.5), (place, 0.5, 1 / 12**0.5)):
        assert (value.mean(0) - mean).abs().max() < 0.02 and (value.std(0) - deviation).abs().max() < 0.02
        assert abs(torch.corrcoef(value.T)[0, 1]) < 0.05  # x and y on their own


def test_soco_jitter_moves_every_second_box_by_a_tenth():
    boxes = some_boxes(10_000, 224, 4)
    with common.drawing("soco"):
        got = d3ssl.soco_jitter(boxes, 224)
    moved = (got != boxes).any(1)
    assert abs(moved.float().mean() - 0.5) < 0.02 and got.min() >= 0 and got.max() <= 224
    inner = moved & ((boxes > 20) & (boxes < 200)).all(1)  # nothing is clipped
    old, new = (b[inner, 2:] - b[inner, :2] for b in (boxes, got))
    shift, scale = (got - boxes)[inner, :2] / old, new / old - 1
    for value in (shift, scale):
        assert 0.095 < value.abs().max() < 0.1001 and value.mean().abs() < 0.005
        assert (value.std(0) - 0.2 / 12**0.5).abs().max() < 0.003


def test_soco_cutout_is_a_square_in_every_second_box():
    box, shares, outside = torch.tensor([[40.0, 40, 104, 80]]), [], 0
    for i in range(400):
        with common.drawing("cutout", i):
            gone = ~d3ssl.soco_cutout(torch.ones(120, 144, dtype=torch.bool), box)
        if gone.any():
            h, w = gone.any(1).sum().item(), gone.any(0).sum().item()
            assert abs(h - w) <= 1 and gone.sum() == h * w
            shares.append(h * w / (64 * 40))
            outside += bool((gone & ~d3ssl.foreground_mask(box, 120, 144)).any())
    assert abs(len(shares) / 400 - 0.5) < 0.08 and outside > 50
    assert 0.08 < min(shares) < 0.12 and 0.28 < max(shares) < 0.33 and abs(np.mean(shares) - 0.2) < 0.02


# ----------------------------------------------------------------------------------------------------------------------
# de-positioning
# ----------------------------------------------------------------------------------------------------------------------


def test_shift_range_by_trying_all_shifts():
    for seed in range(8):
        boxes = some_boxes(3, 64, seed, least=6)
        least, most = d3ssl.shift_range(boxes, 64)
        for axis, ends in enumerate((boxes[:, ::2], boxes[:, 1::2])):
            fits = [t for t in range(-64, 65) if (ends + t).min() >= 0 and (ends + t).max() <= 64]
            assert (least[axis], most[axis]) == (fits[0], fits[-1]) and 0 in fits
    least, most = d3ssl.shift_range(torch.tensor([[[0.0, 5, 30, 40], [20, 0, 64, 64]]]), 64)
    assert least.tolist() == most.tolist() == [[0, 0]]  # boxes that fill the view cannot move


def test_shifts_are_drawn_evenly_over_their_range():
    image, boxes, places = Image.new("RGB", (SIZE, SIZE)), torch.tensor([[20.0, 30, 60, 70]]), []
    for i in range(400):
        drawn = draw((image, boxes), "shift", i, augment=("prc", "prm"), boxes=1)
        least, most = d3ssl.shift_range(drawn.boxes_2, SIZE)
        assert (drawn.shift >= least).all() and (drawn.shift <= most).all()
        places.append((drawn.shift - least) / (most - least).clamp(min=1))
    places = torch.stack(places)
    assert (places.mean(0) - 0.5).abs().max() < 0.06 and (places == 0).any(0).all() and (places == 1).any(0).all()


def test_composition_with_shift_0_no_cut_and_its_own_background_gives_x2_back():
    x2, boxes = torch.rand(3, 3, 40, 40), torch.stack([some_boxes(2, 40, i, least=8) for i in range(3)])
    masks = torch.stack([d3ssl.foreground_mask(b, 40, 40) for b in boxes])
    assert torch.equal(d3ssl.compose(x2, torch.zeros(3, 2, dtype=torch.int64), masks, x2), x2)


def test_composition_moves_pixels_by_exactly_t():
    """Against a loop over pixels: under the mask x2 at p - t, elsewhere the background."""
    drawn = batch_of(3)
    x2, background = common.normalise(drawn.view_2), torch.randn(3, 3, 64, 64)
    got = d3ssl.compose(x2, drawn.shift, drawn.mask_3, background)
    assert (drawn.shift != 0).any(1).all()
    for b, i, j in itertools.product(range(3), range(64), range(64)):
        dx, dy = drawn.shift[b].tolist()
        want = x2[b, :, i - dy, j - dx] if drawn.mask_3[b, i, j] else background[b, :, i, j]
        assert torch.equal(got[b, :, i, j], want)
    moved = drawn.boxes_2 + drawn.shift.repeat(1, 2)[:, None]
    assert moved.min() >= 0 and moved.max() <= 64


def test_mask_of_x3_is_the_moved_foreground_cut_once_more():
    """Eqs. 6 and 7, and that --augment does not change them."""
    for augment in ("prc prm rbj", "prm rbj", "soco-cutout rbj", "rbj"):
        drawn = batch_of(6, augment=augment.split())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(d3ssl, "proposal_cutout", lambda view, boxes: view)
            whole = batch_of(6, augment=["rbj"])
        for b in range(6):
            dx, dy = drawn.shift[b].tolist()
            still = mask_by_centres(drawn.boxes_2[b], SIZE, SIZE)
            moved = torch.zeros_like(still)
            for i, j in still.nonzero().tolist():
                moved[i + dy, j + dx] = True  # Eq. 6's mask, pixel by pixel to its new place
            assert torch.equal(whole.mask_3[b], moved)
            assert not (drawn.mask_3[b] & ~moved).any()
            assert 0.15 < 1 - drawn.mask_3[b].sum() / moved.sum() < 0.55


@pytest.mark.parametrize("batch, group", [(8, 4), (7, 4), (2, 32), (9, 9)])
def test_background_is_another_image_of_the_group(batch, group):
    seen = set()
    for step in range(40):
        where = step / 40
        got = d3ssl.other_images(batch, group, where)
        for part in torch.arange(batch).tensor_split(math.ceil(batch / group)):
            assert set(got[part].tolist()) == set(part.tolist()) and (got[part] != part).all()
        seen.add(int(got[0]))
    assert len(seen) == min(batch, math.ceil(batch / math.ceil(batch / group))) - 1  # any other image


FIELDS = Drawn._fields


KEEPS, BOXES_FOLLOW = {"keep_1", "keep_2"}, {"boxes_1", "boxes_2", "keep_1", "keep_2", "shift", "mask_3"}


@pytest.mark.parametrize(
    "settings, changed",
    [
        ({"augment": ("prm", "rbj")}, KEEPS),
        ({"augment": ("soco-cutout", "prm", "rbj")}, KEEPS),
        ({"augment": ("prc", "rbj")}, KEEPS),
        ({"augment": ("prc", "prm-erase", "rbj")}, KEEPS),
        ({"augment": ("prc", "prm", "soco-jitter")}, BOXES_FOLLOW),
        ({"augment": ("prc", "prm")}, BOXES_FOLLOW),
        ({"augment": ("rbj", "prm", "prc")}, set()),  # in any order
        ({"boxes": 3}, BOXES_FOLLOW | {"found"}),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else " ".join(sorted(value)) or "nothing",
)
def test_ablation_flags_change_what_they_name_and_nothing_else(settings, changed):
    before, after = batch_of(4), batch_of(4, **settings)
    different = {name for name in FIELDS if not torch.equal(getattr(before, name), getattr(after, name))}
    assert different == changed
    augment = settings.get("augment", AUGMENT)
    for b in range(4 if changed == KEEPS else 0):
        inside = d3ssl.foreground_mask(before.boxes_1[b], SIZE, SIZE)
        if "prc" not in augment and "soco-cutout" not in augment:  # the background is PRM's alone
            assert torch.equal(before.keep_1[b][~inside], after.keep_1[b][~inside])
            assert after.keep_1[b][inside].all()
        if "prm" not in augment:
            assert torch.equal(before.keep_1[b][inside], after.keep_1[b][inside])
            assert "prm-erase" in augment or after.keep_1[b][~inside].all()


def test_each_kind_of_draw_has_a_generator_of_its_own(monkeypatch):
    """Each function that draws starts from the same state of the generator in all 27 choices of augmentations.

    The views take one number of the generator that they are given, whatever they draw.
    """
    calls = {"choose_boxes": 1, "distorted_view": 2, "restricted_jitter": 2, "soco_jitter": 2, "proposal_cutout": 3,
             "soco_cutout": 2, "proposal_mask": 2, "shift_range": 1}  # fmt: skip
    state = lambda: torch.get_rng_state().numpy().tobytes()  # noqa: E731
    seen = {name: set() for name in calls}
    for name in calls:
        function = getattr(d3ssl, name)
        monkeypatch.setattr(
            d3ssl, name, lambda *a, name=name, f=function, **k: (seen[name].add(state()), f(*a, **k))[1]
        )
    item = Image.new("RGB", (90, 80)), some_boxes(6, 80, 0, least=40)
    for choice in itertools.product(*((None, *pair) for pair in d3ssl.AUGMENTATIONS)):
        with common.drawing("choice"):
            d3ssl.draw_views(item, SIZE, [*filter(None, choice)])
            after = state()
        with common.drawing("choice"):
            torch.randint(2**62, ())
            assert after == state()
    assert {name: len(states) for name, states in seen.items()} == calls
    assert len(set.union(*seen.values())) == 11  # boxes, 2 x (colour, jitter), 3 x cutout, 2 x mask, shift


def test_masks_lie_where_the_boxes_of_each_view_are():
    """For x1 and for x2-s, whose boxes are half as large: PRC cuts inside boxes alone, PRM outside alone, both do."""
    inside = lambda boxes, side: d3ssl.foreground_mask(boxes, side, side)  # noqa: E731
    cut, hidden = batch_of(12, augment=("prc", "rbj")), batch_of(12, augment=("prm", "rbj"))
    shares = []
    for b in range(12):
        for keep, boxes, side in (("keep_1", cut.boxes_1[b], SIZE), ("keep_2", cut.boxes_2[b] / 2, SIZE // 2)):
            box = inside(boxes, side)
            assert getattr(cut, keep)[b][~box].all() and getattr(hidden, keep)[b][box].all()
            shares.append(
                [1 - getattr(cut, keep)[b][box].float().mean(), 1 - getattr(hidden, keep)[b][~box].float().mean()]
            )
    shares = np.array(shares)
    assert (shares[:, 0] > 0.1).all() and shares[:, 1].mean() > 0.3


def test_soco_jitter_is_drawn_for_each_view_and_clipped():
    plain, jittered = batch_of(12, augment=("prc", "prm")), batch_of(12, augment=("prc", "prm", "soco-jitter"))
    for old, new in ((plain.boxes_1, jittered.boxes_1), (plain.boxes_2, jittered.boxes_2)):
        sides = (new[..., 2:] - new[..., :2]) / (old[..., 2:] - old[..., :2])
        # some are larger than before, which RBJ never makes them, and some are as they were
        assert sides.max() > 1.01 and (sides == 1).all(2).any()
        assert new.min() >= 0 and new.max() <= SIZE


def test_draws_depend_on_epoch_image_and_seed_and_holes_of_x3_are_its_own():
    class Same:
        def __getitem__(self, index):
            image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 90, 3), np.uint8))
            return (image, some_boxes(6, 90, 0, least=40)), 0

    def drawn(epoch, index, seed=0):
        return images.Views(Same(), partial(d3ssl.draw_views, size=SIZE, augment=AUGMENT), seed)[epoch, index][:9]

    first = drawn(0, 0)
    assert all(torch.equal(a, b) for a, b in zip(first, drawn(0, 0), strict=True))
    for other in (drawn(1, 0), drawn(0, 1), drawn(0, 0, seed=1)):
        assert not any(torch.equal(a, b) for a, b in zip(first[:6], other[:6], strict=True))
    with pytest.MonkeyPatch.context() as patch:
        keys, drawing = [], common.drawing
        patch.setattr(common, "drawing", lambda *key: keys.append(key) or drawing(*key))
        drawn(0, 0)
    assert len(keys) == len(set(keys)) == 1 + 12  # crop, boxes, 2 x (colour, jitter), 3 x cutout, 2 x mask, shift


def test_regions_are_at_least_a_cell_in_both_views(monkeypatch):
    seen, choose = [], d3ssl.choose_boxes
    monkeypatch.setattr(d3ssl, "choose_boxes", lambda *a, **k: seen.append(k) or choose(*a, **k))
    image = Image.new("RGB", (400, 300))
    for i in range(20):
        drawn = draw((image, some_boxes(30, 300, i, least=5)), "cell", i, augment=("prc", "prm"), size=224)
        for boxes in (drawn.boxes_1, drawn.boxes_2):
            assert (boxes[:, 2:] - boxes[:, :2]).min() > 15.99
    assert all(k == {"least": 16} for k in seen)


def test_jitter_none_uses_the_boxes_as_they_are_and_views_have_draws_of_their_own():
    plain, jittered = batch_of(4, augment=("prc", "prm")), batch_of(4)
    assert all(
        torch.equal(getattr(batch_of(4, augment=()), name), getattr(plain, name)) for name in ("boxes_1", "boxes_2")
    )
    for old, new in ((plain.boxes_1, jittered.boxes_1), (plain.boxes_2, jittered.boxes_2)):
        assert (new[..., :2] >= old[..., :2]).all() and (new[..., 2:] <= old[..., 2:]).all()
    ratios = [
        (new[..., 2] - new[..., 0]) / (old[..., 2] - old[..., 0])
        for old, new in ((plain.boxes_1, jittered.boxes_1), (plain.boxes_2, jittered.boxes_2))
    ]
    assert (ratios[0] - ratios[1]).abs().max() > 0.05
    assert not torch.equal(jittered.keep_1[:, ::2, ::2], jittered.keep_2)


# ----------------------------------------------------------------------------------------------------------------------
# networks
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size, cells", [(224, 14), (112, 7), (136, 8), (68, 4)])
def test_cells_of_a_region_follow_the_view(size, cells, monkeypatch):
    seen, roi_align = [], d3ssl.ops.roi_align
    monkeypatch.setattr(
        d3ssl.ops,
        "roi_align",
        lambda m, b, n, scale, **rest: seen.append((n, scale, rest)) or roi_align(m, b, n, scale, **rest),
    )
    boxes = torch.tensor([[[0.0, 0, 64, 64], [8, 0, 32, 64]]])
    features, z = d3ssl.Encoder("resnet18").encode(torch.zeros(1, 3, size, size), boxes)
    assert seen == [(cells, 1 / 16, {"aligned": True})]
    assert features.shape == (1, 2, 512) and z.shape == (1, 2, 128)


@pytest.mark.parametrize("size", [224, 112])
def test_the_region_of_a_whole_view_is_torchvisions_resnet(size):
    """Eq. 1 with b = the view: RoIAlign then reads each cell of C4 at its centre, and nothing is left of it."""
    encoder, resnet = d3ssl.Encoder("resnet18").eval(), torchvision.models.resnet18().eval()
    for norm in (m for m in encoder.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.running_mean.uniform_(-0.1, 0.1)
    resnet.load_state_dict(encoder.trunk.state_dict(), strict=False)
    resnet.fc = nn.Identity()
    x, box = torch.randn(2, 3, size, size), torch.tensor([[[0.0, 0, size, size]]] * 2)
    features = lambda x, boxes: encoder.encode(x, boxes)[0]  # noqa: E731
    torch.testing.assert_close(features(x, box)[:, 0], resnet(x), rtol=1e-3, atol=1e-4)
    part = torch.tensor([[[0.0, 0, size / 2, size]]] * 2)  # another box: other features, of the image it belongs to
    assert (features(x, part) - features(x, box)).abs().max() > 1e-2
    torch.testing.assert_close(features(x.flip(0), part).flip(0), features(x, part), rtol=1e-4, atol=1e-5)


def build(*flags):
    base = "--data scenes --arch resnet18 --size 64 --batch-size 6 --queue-size 20 --seed 1".split()
    return d3ssl.build(d3ssl.get_args([*base, *flags]), torch.device("cpu"), total=10)


def make_teacher_differ(method):
    """The parameters of the teacher before the iteration: no longer those of the student."""
    with torch.no_grad():
        for p in method.key.parameters():
            p.mul_(1.05)
    return {name: p.clone() for name, p in method.key.named_parameters()}


def test_heads():
    mlp = build().query.projector
    assert [(type(m).__name__, *((m.in_features, m.out_features) if hasattr(m, "in_features") else ())) for m in mlp] == [
        ("Linear", 512, 512), ("ReLU",), ("Linear", 512, 128)
    ]  # fmt: skip
    soco = build("--framework", "soco")
    for mlp, inputs in ((soco.query.projector, 512), (soco.query.predictor, 256), (soco.key.projector, 512)):
        assert [type(m).__name__ for m in mlp] == ["Linear", "BatchNorm1d", "ReLU", "Linear"]
        assert (mlp[0].in_features, mlp[0].out_features, mlp[3].out_features) == (inputs, 4096, 256)
    normed = build("--mlp-norm").query.projector
    assert [type(m).__name__ for m in normed] == ["Linear", "BatchNorm1d", "ReLU", "Linear"]
    assert normed[0].out_features == 512
    assert all((block.bn2.weight == 0).all() for block in soco.query.trunk.layer1)
    assert all((block.bn2.weight == 1).all() for block in build().query.trunk.layer1)


@torch.no_grad()
def test_the_teacher_has_no_predictor_and_follows_trunk_and_projector():
    """SoCo (D39): z of the teacher is the projector's. Its parameters follow those of the student by name."""
    method = build("--framework", "soco")
    assert not [name for name in method.state_dict() if name.startswith("key.predictor")]
    student, before = dict(method.query.named_parameters()), make_teacher_differ(method)
    assert student.keys() - before.keys() == {name for name in student if name.startswith("predictor.")} != set()
    assert not any(p.requires_grad for p in method.key.parameters())
    drawn = batch_of(6)
    view = common.normalise(drawn.view_1), drawn.boxes_1
    (z,) = method.teach(0, view)
    for name, p in method.key.named_parameters():
        torch.testing.assert_close(p, 0.99 * before[name] + 0.01 * student[name])
    ((features, again),) = method.key(view)
    assert torch.equal(z, again)
    torch.testing.assert_close(z, method.key.projector(features.flatten(0, 1)).unflatten(0, (6, 4)))
    (p,) = (z for _, z in method.query(view))
    assert p.shape == z.shape and not torch.allclose(p, z, rtol=0.1)


@torch.no_grad()
@pytest.mark.parametrize("size, groups", [(3, [3, 3]), (4, [3, 3]), (2, [2, 2, 2])])
def test_batch_statistics_are_the_groups_own(size, groups, monkeypatch):
    """Images in groups, regions with their images: each group alone gives the same (B15).

    Running statistics follow the first group alone (B17).
    """
    monkeypatch.setattr(common, "GROUP", size)
    encoder, drawn = d3ssl.Encoder("resnet18", norm=True), batch_of(6)
    alone, x, boxes = copy.deepcopy(encoder), common.normalise(drawn.view_1), drawn.boxes_1
    (whole,) = encoder((x, boxes))
    for number, rows in enumerate(torch.arange(6).split(groups)):
        for got, want in zip(whole, alone.encode(x[rows], boxes[rows]), strict=True):
            torch.testing.assert_close(got[rows], want, rtol=1e-4, atol=1e-5)
        if number == 0:
            buffers = dict(encoder.named_buffers())
            assert buffers["projector.1.num_batches_tracked"] == buffers["trunk.bn1.num_batches_tracked"] == 1
            for name, want in alone.named_buffers():
                torch.testing.assert_close(buffers[name], want, rtol=1e-4, atol=1e-6)
    monkeypatch.setattr(common, "GROUP", 32)
    assert (encoder((x, boxes))[0][1] - whole[1]).abs().max() > 1e-3


@torch.no_grad()
def test_soco_has_the_batch_statistics_of_the_batch(monkeypatch):
    monkeypatch.setattr(common, "GROUP", 2)
    encoder, drawn = build("--framework", "soco").query, batch_of(6)
    x, boxes = common.normalise(drawn.view_1), drawn.boxes_1
    alone = copy.deepcopy(encoder)
    for got, want in zip(encoder((x, boxes))[0], alone.encode(x, boxes), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_images_and_boxes_stay_together_through_shuffling(monkeypatch):
    """In evaluation mode company does not matter: shuffled or not, each region has the same vector, in its place."""
    method, drawn = build().eval(), batch_of(6)
    view = (common.normalise(drawn.view_1), drawn.boxes_1)
    calls = recorded(method, "key", monkeypatch)
    for step in (0, 3):
        (z,) = method.teach(step, view)
        permutation = torch.randperm(6, generator=common.generator("shuffle", 1, step))
        assert (permutation != torch.arange(6)).any()
        ((given,),) = calls
        assert all(torch.equal(x, whole[permutation]) for x, whole in zip(given, view, strict=True))
        ((_, want),) = method.key(view)
        calls.clear()
        torch.testing.assert_close(z, want, rtol=1e-4, atol=1e-5)
    assert (want[0] - want[1]).abs().max() > 1e-3  # images differ, so would a mix-up


# ----------------------------------------------------------------------------------------------------------------------
# losses
# ----------------------------------------------------------------------------------------------------------------------


def units(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=-1)


def naive_nce(z, positive, bank, tau):
    """Eq. 5, region by region, and Eq. 10's mean."""
    total, count = 0, 0
    for image, other in zip(z, positive, strict=True):
        for a, b in zip(image, other, strict=True):
            terms = [torch.exp(a @ x / tau) for x in (b, *bank)]
            total, count = total - torch.log(terms[0] / sum(terms)), count + 1
    return total / count


def test_loss_against_a_naive_loop_value_and_gradient():
    z, positive, bank = units(3, 4, 16).requires_grad_(), units(3, 4, 16, seed=1), units(50, 16, seed=2)
    got, want = (f(z, positive, bank, 0.2) for f in (d3ssl.region_contrastive_loss, naive_nce))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(*(torch.autograd.grad(x, z)[0] for x in (got, want)), rtol=1e-9, atol=1e-12)


def test_soco_loss_and_its_stop_gradient():
    p, z = torch.randn(3, 4, 8, requires_grad=True), torch.randn(3, 4, 8, requires_grad=True)
    loss = d3ssl.region_cosine_loss(p, z)
    cosines = [
        float(a @ b / (a.norm() * b.norm()))
        for a, b in zip(p.detach().flatten(0, 1), z.detach().flatten(0, 1), strict=True)
    ]
    assert loss.item() == pytest.approx(-2 * np.mean(cosines), rel=1e-5)
    loss.backward()
    assert z.grad is None and p.grad.abs().max() > 0


# ----------------------------------------------------------------------------------------------------------------------
# one iteration
# ----------------------------------------------------------------------------------------------------------------------


def recorded(method, name, monkeypatch):
    """What a network of the method is given at each call, [views]."""
    calls, network = [], getattr(method, name)
    forward = network.forward
    monkeypatch.setattr(network, "forward", lambda *views: calls.append(views) or forward(*views))
    return calls


@pytest.mark.parametrize("depositioning", [True, False])
def test_iteration_by_hand(depositioning, monkeypatch):
    """Eqs. 2 to 10 with loops and the two networks, which views go to whom, the bank before and after."""
    method, drawn = build() if depositioning else build("--no-depositioning"), batch_of(6)
    before = make_teacher_differ(method)
    bank = method.bank.vectors.clone()
    students, teachers = recorded(method, "query", monkeypatch), recorded(method, "key", monkeypatch)
    loss, values = method(method.query, drawn, 0)

    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (common.PIXEL_MEAN, common.PIXEL_STD))
    x1, x2 = ((v / 255 - mean) / std for v in (drawn.view_1, drawn.view_2))
    hat_1 = torch.where(drawn.keep_1[:, None], x1, 0)
    small = x2.view(6, 3, 32, 2, 32, 2).mean((3, 5))
    hat_2s = torch.where(drawn.keep_2[:, None], small, 0)
    (views,) = students
    wanted = [(hat_1, drawn.boxes_1), (hat_2s, drawn.boxes_2 / 2)]
    assert len(views) == (3 if depositioning else 2)
    for (x, boxes), (want, where) in zip(views, wanted, strict=False):
        torch.testing.assert_close(x, want, rtol=1e-5, atol=1e-5)
        assert torch.equal(boxes, where)
    permutation = torch.randperm(6, generator=common.generator("shuffle", 1, 0))
    ((first, second),) = teachers  # Eq. 3: the augmented x1, the clean x2
    torch.testing.assert_close(first[0], hat_1[permutation], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(second[0], x2[permutation], rtol=1e-5, atol=1e-5)
    assert torch.equal(first[1], drawn.boxes_1[permutation]) and torch.equal(second[1], drawn.boxes_2[permutation])

    student = dict(method.query.named_parameters())
    for name, p in method.key.named_parameters():
        torch.testing.assert_close(p, 0.999 * before[name] + 0.001 * student[name])  # it follows, then it encodes
    with torch.no_grad():
        z_s = [F.normalize(z, dim=2) for _, z in method.query(*views)]
        t1, t2 = (F.normalize(z, dim=2) for _, z in method.key((hat_1, drawn.boxes_1), (x2, drawn.boxes_2)))
    nce = lambda a, b: naive_nce(a, b, bank, 0.2)  # noqa: E731
    dc = nce(z_s[0], t2) + nce(z_s[1], t1)
    dp = nce(z_s[2], t2) + nce(z_s[2], t1) if depositioning else 0
    assert values["loss_dc"].item() == pytest.approx(dc.item(), rel=1e-3)
    assert loss.item() == pytest.approx(float(dc + dp), rel=1e-3) and ("loss_dp" in values) == depositioning

    regions = t1.flatten(0, 1)  # 24 of them into a bank of 20: the last 20, oldest overwritten first
    stored = torch.empty(20, 128)
    stored[torch.arange(4, 24) % 20] = regions[4:]
    torch.testing.assert_close(method.bank.vectors, stored, rtol=1e-3, atol=1e-4)
    loss.backward()
    assert all(p.grad is None for p in method.key.parameters())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in method.query.parameters())


@pytest.mark.parametrize("group", [32, 3])
def test_x3_is_composed_on_another_images_x2(group, monkeypatch):
    """... of the same group. The distance changes from step to step."""
    monkeypatch.setattr(common, "GROUP", group)
    method, drawn = build(), batch_of(6)
    calls = recorded(method, "query", monkeypatch)
    x2, of_first = common.normalise(drawn.view_2), set()
    for step in range(4):
        method(method.query, drawn, step)
        x3, boxes = calls[-1][2]
        where = torch.rand((), generator=common.generator("background", 1, step)).item()
        other = d3ssl.other_images(6, group, where)
        of_first.add(int(other[0]))
        holes = ~drawn.mask_3
        for b in range(6):
            assert torch.equal(x3[b][:, holes[b]], x2[other[b]][:, holes[b]])
            assert group == 32 or other[b] // 3 == b // 3
        assert torch.equal(boxes, drawn.boxes_2 + drawn.shift.repeat(1, 2)[:, None])
    assert len(of_first) > 1


def test_a_batch_without_any_proposal_trains_on():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 90, 3), np.uint8))
    drawn = batched([(image, torch.zeros(0, 4))] * 6, "none")
    method = build()
    loss, values = method(method.query, drawn, 0)
    loss.backward()
    assert values["empty"] == 1 and values["proposals"] == 0 and loss.isfinite()
    assert all(p.grad.isfinite().all() for p in method.query.parameters())


def test_health_values_against_a_count():
    drawn, z = batch_of(6), units(6, 4, 8)
    stuck = torch.tensor([10.0, 10, 40, 40]).repeat(6, 4, 1)
    stuck[2] = torch.tensor([3.0, 8, SIZE - 12, SIZE - 7])  # 15 pixels of play along both axes: less than a cell
    stuck[3] = torch.tensor([3.0, 8, SIZE - 13, SIZE - 7])  # 16 along x
    drawn = drawn._replace(boxes_2=stuck, found=torch.tensor([4, 0, 3, 4, 1, 0]))
    values = d3ssl.health(drawn, z)
    assert values["proposals"] == 2 and values["empty"].item() == pytest.approx(2 / 6)
    assert values["stuck"].item() == pytest.approx(1 / 6)
    assert values["shift"].item() == pytest.approx(np.mean([math.hypot(*t) for t in drawn.shift.tolist()]), rel=1e-5)
    assert values["std"].item() == pytest.approx(float(z.flatten(0, 1).var(0, correction=0).sqrt().mean()))
    drawn_evenly = units(500, 4, 8)
    assert d3ssl.health(drawn, drawn_evenly)["std"].item() == pytest.approx(values["std_spread"], rel=0.02)


@pytest.mark.parametrize("framework", ["moco", "soco"])
def test_losses_and_bank_stay_in_fp32_under_amp(framework, monkeypatch):
    name = {"moco": "region_contrastive_loss", "soco": "region_cosine_loss"}[framework]
    seen, outputs, loss = [], [], getattr(d3ssl, name)
    method = build("--amp", "bf16", "--framework", framework)

    def watch(*tensors, **others):
        kinds = {x.dtype for x in (*tensors, *others.values()) if isinstance(x, torch.Tensor)}
        seen.append((kinds, torch.is_autocast_enabled("cpu")))
        return loss(*tensors, **others)

    monkeypatch.setattr(d3ssl, name, watch)
    for network in (method.query, method.key):
        network.projector.register_forward_hook(lambda m, i, out: outputs.append(out.dtype))
    total, _ = method(method.query, batch_of(6), 0)
    assert seen == [({torch.float32}, False)] * (4 if framework == "moco" else 2) and total.dtype == torch.float32
    assert outputs == [torch.bfloat16] * (5 if framework == "moco" else 4)  # the encoders do run in bf16
    if framework == "moco":
        assert method.bank.vectors.dtype == torch.float32


def test_soco_iteration_by_hand(monkeypatch):
    """The same views to the same networks; predictions against projections, both ways; momentum 0.99 rising to 1."""
    drawn = batch_of(6)
    for step, momentum in ((0, 0.99), (2, 0.9909549), (5, 0.995), (10, 1.0)):  # of 10
        method = build("--framework", "soco")
        before, student = make_teacher_differ(method), dict(method.query.named_parameters())
        students, teachers = recorded(method, "query", monkeypatch), recorded(method, "key", monkeypatch)
        loss, values = method(method.query, drawn, step)
        for name, p in method.key.named_parameters():
            moved = (p - before[name]).norm() / (student[name] - before[name]).norm()
            assert moved.isnan() or moved.item() == pytest.approx(1 - momentum, rel=0.02, abs=1e-6)  # 0 / 0: a zero
            torch.testing.assert_close(p, momentum * before[name] + (1 - momentum) * student[name])
    inputs = d3ssl.network_inputs(drawn, torch.arange(6))
    for given, wanted in ((students[0], (inputs.x1, inputs.x2_s)), (teachers[0], (inputs.x1, inputs.x2))):
        assert len(given) == 2
        for (x, boxes), (want, where) in zip(given, wanted, strict=True):
            assert torch.equal(x, want) and torch.equal(boxes, where)
    p_1, p_2 = (p.flatten(0, 1) for _, p in method.query(inputs.x1, inputs.x2_s))
    z_1, z_2 = (z.flatten(0, 1) for _, z in method.key(inputs.x1, inputs.x2))
    cosine = lambda a, b: (F.normalize(a, dim=1) * F.normalize(b, dim=1)).sum(1).mean()  # noqa: E731
    assert loss.item() == pytest.approx((-2 * cosine(p_1, z_2) - 2 * cosine(p_2, z_1)).item(), rel=1e-3)
    assert loss.item() == values["loss_dc"].item() and "loss_dp" not in values and method.bank is None
    loss.backward()
    assert all(p.grad is None for p in method.key.parameters())
    assert all(p.grad is not None for p in method.query.parameters())


def test_see_shows_what_the_networks_compare(monkeypatch):
    """The picture has the views as the networks get them, and x3's mask.

    Its similarities are of the student's x3 (else x2-s) and the teacher's x2.
    """
    seen = []
    monkeypatch.setattr(look, "draw_regions", lambda *a: seen.append(a))
    for flags in ((), ("--no-depositioning",), ("--framework", "soco")):
        method, drawn = build(*flags), batch_of(6)
        make_teacher_differ(method)
        with torch.no_grad():
            method.draw("x.png", *drawn)
            path, views, mask, similarity = seen.pop()
            inputs = d3ssl.network_inputs(drawn, d3ssl.other_images(6, 32, 0.5))
            student = method.query(inputs.x2_s if flags else inputs.x3)[0][1]
            teacher = method.key(inputs.x2)[0][1]
        assert path == "x.png" and [title.split(",")[0] for title in views] == ["x1", "x2", "x2-s", "x3"][: len(views)]
        for given, want in zip(views.values(), inputs[: 3 if flags else 4], strict=True):
            assert all(torch.equal(*pair) for pair in zip(given, want, strict=True))
        assert mask is (None if flags else drawn.mask_3)
        for b, i, j in itertools.product(range(6), range(4), range(4)):
            want = F.cosine_similarity(student[b, i], teacher[b, j], dim=0)
            assert similarity[b, i, j].item() == pytest.approx(want.item(), abs=1e-3)


class Told(nn.Module):
    """An encoder whose features tell which box of the image they are of: where its proposal lies, from what it sees."""

    calls = []

    def __init__(self, name):
        super().__init__()
        self.name, self.norm = name, nn.BatchNorm2d(3)

    def forward(self, view):
        """Mean coordinates of each box, from a view of a coordinate image, as a direction."""
        x, boxes = view
        self.calls.append((self.name, x, boxes, self.training))
        self.norm(x)  # changes its running statistics
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (common.PIXEL_MEAN, common.PIXEL_STD))
        shown = (x * std + mean)[:, :2]
        place = torch.stack([
            torch.stack([shown[b][(slice(None), *d3ssl.pixel_slices(box, *x.shape[2:]))].mean((1, 2)) for box in own])
            for b, own in enumerate(boxes)
        ])  # fmt: skip
        angle = 3 * place
        return [[torch.cat([angle.cos(), angle.sin()], 2), None]]


def test_probe_finds_objects_that_the_features_tell(no_colours, monkeypatch, tmp_path):
    """Hits near 1 with a stub that sees where a box lies.

    The networks get unjittered boxes and clean views, x1 the student and x2 the teacher, in training mode. Padding does
    not count. Nothing of the method is changed.
    """

    class Coordinates:
        held_out, order = True, torch.arange(40)

        def __len__(self):
            return 40

        def __getitem__(self, index):
            return (coordinate_image(128, 128), some_boxes(5, 128, index, least=40)), 0

        def probe(self, index):
            return coordinate_image(128, 128), some_boxes(2 + index % 2, 128, index, least=40)

    monkeypatch.setattr(Told, "calls", [])
    monkeypatch.setattr(d3ssl.D3SSL, "draw", lambda method, path, *batch: drawn_at.append((path, batch)))
    drawn_at, written = [], []
    method = d3ssl.D3SSL(Told("student"))
    method.key.name = "teacher"
    run = SimpleNamespace(
        method=method, images=Coordinates(), args=SimpleNamespace(seed=0, demo=False), device=torch.device("cpu"), rank=0,
        path=lambda name: str(tmp_path / name), write=lambda probe: written.append(probe),
    )  # fmt: skip
    views, plain = (partial(d3ssl.draw_views, size=96, augment=augment) for augment in (AUGMENT, ()))
    Run.measure(run, "start", views, plain)
    calls = [*Told.calls]
    Run.measure(run, "end", views, plain)
    first, second = written
    assert first == second  # fixed views
    assert first["hits"] > 0.93 and 0.33 < first["chance"] < 0.6 and 60 < first["count"] <= 80
    (name_1, x1, boxes_1, training_1), (name_2, x2, boxes_2, training_2) = calls
    assert (name_1, name_2, training_1, training_2) == ("student", "teacher", True, True)
    items = [Coordinates().probe(i) for i in range(32)]
    want = [draw(item, "probe", 0, i, size=96, augment=()) for i, item in enumerate(items)]
    want = Drawn(*(torch.stack(x) for x in zip(*want, strict=True)))
    assert torch.equal(boxes_1, want.boxes_1) and torch.equal(x1, common.normalise(want.view_1))
    assert torch.equal(boxes_2, want.boxes_2) and torch.equal(x2, common.normalise(want.view_2))
    assert first["count"] == int(want.found.sum()) and want.keep_1.all() and want.keep_2.all()
    assert [path for path, _ in drawn_at] == [str(tmp_path / f"regions_{title}.png") for title in ("start", "end")]
    assert not Drawn(*drawn_at[0][1]).keep_1.all()  # the picture shows the augmentations
    assert method.query.norm.num_batches_tracked == method.key.norm.num_batches_tracked == 0


def test_picture_shows_each_view_with_its_boxes_and_the_mask(tmp_path):
    """Plain views: the panels' colours, the colours of the boxes at their edges, the mask, the similarities."""
    side, gap = 224, 6
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (common.PIXEL_MEAN, common.PIXEL_STD))
    shades = dict(x1=0.2, x2=0.4, x2_s=0.6, x3=0.8)
    boxes = {name: torch.tensor([[[20.0, 30, 40, 70], [50, 10, 70, 30]]]) + 3 * i for i, name in enumerate(shades)}
    boxes["x2_s"] = boxes["x2_s"] / 2
    views = {
        name: (((shade - mean) / std).expand(1, 3, *([44] * 2 if name == "x2_s" else [88] * 2)), boxes[name])
        for name, shade in shades.items()
    }
    mask = torch.zeros(1, 88, 88, dtype=torch.bool)
    mask[0, 44:] = True
    similarity = torch.tensor([[[0.9, 0.1], [0.3, 0.5]]])
    for given, columns in ((mask, 6), (None, 4)):
        if given is None:
            del views["x3"]
        look.draw_regions(tmp_path / "x.png", views, given, similarity)
        sheet = Image.open(tmp_path / "x.png")
        at = lambda column, x, y: sheet.getpixel((gap + column * (side + gap) + int(x), 20 + int(y)))  # noqa: B023, E731
        assert sheet.size == (columns * (side + gap) + gap, side + gap + 20)
        for column, name in enumerate(views):
            zoom = side / (44 if name == "x2_s" else 88)
            shade = (round(255 * shades[name]),) * 3
            assert at(column, 215, 215) == shade
            for box, colour in zip(boxes[name][0] * zoom, look.COLOURS, strict=False):
                x0, y0, x1, y1 = box.tolist()
                x, y = (x0 + x1) / 2, (y0 + y1) / 2
                for edge in ((x0, y), (x1 - 1, y), (x, y0), (x, y1 - 1)):
                    assert at(column, *edge) == colour, name
                assert at(column, x0 - 3, y0 - 3) == at(column, x, y) == shade
        if given is not None:
            assert at(4, 112, 105) == (0, 0, 0) and at(4, 112, 119) == (255, 255, 255)
        brightness = [sum(at(columns - 1, x, y)[:2]) for y in (56, 168) for x in (56, 168)]
        assert np.argsort(brightness).tolist() == [1, 2, 3, 0]  # rows: the student's regions
    many = {name: [x.expand(8, *x.shape[1:]) for x in view] for name, view in views.items()}
    look.draw_regions(tmp_path / "x.png", many, None, similarity.expand(8, 2, 2))
    assert Image.open(tmp_path / "x.png").height == 6 * (side + gap) + 20  # six images of any batch


def test_both_encoders_start_from_given_weights(tmp_path):
    weights = torchvision.models.resnet18().state_dict()
    torch.save(weights, tmp_path / "resnet18.pth")
    for flags in ((), ("--framework", "soco")):
        args = d3ssl.get_args(["--data", "scenes", "--arch", "resnet18", "--queue-size", "8", *flags])
        method = d3ssl.build(args, torch.device("cpu"), str(tmp_path / "resnet18.pth"))
        for encoder in (method.query, method.key):
            assert all(torch.equal(tensor, weights[name]) for name, tensor in encoder.trunk.state_dict().items())


# ----------------------------------------------------------------------------------------------------------------------
# data, settings
# ----------------------------------------------------------------------------------------------------------------------


class FakeImages:
    held_out = False

    def __len__(self):
        return 5

    def __getitem__(self, index):
        passed = 2 if index == 3 else 0  # images 3 and 4 cannot be read, image 0 takes the place of 3
        return Image.new("RGB", (10 + (index + passed) % 5, 10)), passed

    def name(self, index):
        return f"{index}.png"

    def fingerprint(self):
        return "five"


class FakeProposals:
    boxes, strategy = np.zeros((9, 4)), "single"

    def check(self, images):
        return np.array([4, 3, 2, 1, 0])

    def __getitem__(self, row):
        return np.array([[row, 0, row + 1, 1]], np.int32)


def test_boxes_belong_to_the_image_that_is_read():
    """Rows of the file by name, and the boxes of the neighbour that takes an unreadable image's place."""
    data = WithProposals(FakeImages(), FakeProposals())
    for index, row in ((0, 4), (1, 3), (2, 2), (3, 4)):
        (image, boxes), passed = data[index]
        assert boxes.tolist() == [[row, 0, row + 1, 1]] and boxes.dtype == torch.float32
        assert image.width == 10 + (4 - row) and passed == (2 if index == 3 else 0)
    assert len(data) == 5 and "five" in data.fingerprint() and "9 boxes, single" in data.fingerprint()


def test_held_out_scenes_come_with_their_objects():
    data = WithProposals(images.Scenes(7, 48, 3), type("All", (FakeProposals,), {"check": lambda *_: None})())
    assert data.order.sort().values.tolist() == list(range(7))  # each image is measured once
    image, boxes = data.probe(2)
    scene = make_scene(3, 9, 48)  # beyond the seven that are trained on
    assert np.array_equal(np.asarray(image), scene["image"]) and boxes.tolist() == scene["boxes"].tolist()


DEFAULTS = dict(
    framework="moco", augment=["prc", "prm", "rbj"], depositioning=True, temperature=0.2, queue_size=None, ema=0.999,
    mlp_norm=False, arch="resnet50", size=224, epochs=800, batch_size=256, lr=0.3, amp="none", seed=0, init=None,
    steps=None,
)  # fmt: skip
SOCO = dict(augment=["soco-cutout"], depositioning=False, ema=0.99, mlp_norm=True)


DEMO = dict(arch="resnet18", size=136, batch_size=64, epochs=2, lr=0.15, ema=0.9, temperature=0.1, mlp_norm=True)
BASE = ["--data", "x", "--proposals", "y"]


def settings(flags):
    return vars(d3ssl.get_args([*BASE, *flags.split()]))


def differing(flags):
    """What a command line changes in the settings of the bare one."""
    bare = settings("")
    return {name: value for name, value in settings(flags).items() if value != bare[name]}


def test_defaults():
    bare = settings("")
    assert {name: bare[name] for name in DEFAULTS} == DEFAULTS
    assert (d3ssl.BOXES, d3ssl.DIM, d3ssl.CELL, common.GROUP) == (4, 128, 16, 32)
    assert (d3ssl.SOCO_DIM, d3ssl.SOCO_HIDDEN) == (256, 4096)


@pytest.mark.parametrize("fast", [False, True])
def test_presets(fast, monkeypatch):
    monkeypatch.setattr(d3ssl, "bf16_is_fast", lambda: fast)
    amp, soco = {"amp": "bf16"} if fast else {}, SOCO | {"framework": "soco"}
    assert differing("--framework soco") == soco
    assert differing("--demo") == DEMO | amp | {"demo": True}
    assert differing("--demo --framework soco") == DEMO | amp | {"demo": True} | soco
    demo = d3ssl.get_args(["--demo", "--arch", "resnet34"])
    assert (demo.data, demo.proposals, demo.arch) == ("scenes:2048", None, "resnet34")


@pytest.mark.parametrize(
    "preset, given",
    [
        ("--demo", {"arch": "resnet50", "size": 224, "batch_size": 256, "epochs": 800, "queue_size": 65536}),
        ("--demo", {"lr": 0.3, "ema": 0.999, "temperature": 0.2, "mlp_norm": False, "amp": "none", "data": "z"}),
        ("--framework soco", {"augment": ["prc", "prm", "rbj"], "ema": 0.999}),  # Table 6
        ("--framework soco", {"augment": [], "mlp_norm": False}),
        ("--demo --framework soco", {"ema": 0.9, "augment": ["rbj", "soco-cutout"], "size": 224, "amp": "fp16"}),
    ],
)
def test_what_stands_on_the_command_line_wins(preset, given, monkeypatch):
    """... over every preset, the defaults of the bare command among the values. Nothing else changes."""
    monkeypatch.setattr(d3ssl, "bf16_is_fast", lambda: True)
    without, words = settings(preset), []
    assert all(without[name] != value for name, value in given.items())
    for name, value in given.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words += [f"--{flag}" if value else f"--no-{flag}"]
        else:
            words += [f"--{flag}", *(value if isinstance(value, list) else [str(value)])]
    for flags in (f"{preset} {' '.join(words)}", f"{' '.join(words)} {preset}"):  # in any order
        assert settings(flags) == without | given


def test_augment_takes_at_most_one_of_a_pair_in_any_order():
    for choice in itertools.product(*((None, *pair) for pair in d3ssl.AUGMENTATIONS)):
        names = [*filter(None, choice)]
        for order in itertools.permutations(names):
            for framework in ("moco", "soco"):
                flags = f"--framework {framework} --augment {' '.join(order)}"
                assert settings(flags)["augment"] == sorted(names)
    assert settings("--augment rbj prc rbj")["augment"] == ["prc", "rbj"]
    assert settings("--augment prc --augment rbj")["augment"] == ["rbj"]  # the last one wins, as with all flags


def refused(capsys, flags):
    """The message with which a command line is refused."""
    with pytest.raises(SystemExit) as error:
        d3ssl.get_args(flags.split())
    usage, message = capsys.readouterr().err.splitlines()
    assert error.value.code == 2 and usage.startswith("usage: ") and ": error: " in message
    return message.split(": error: ")[1]


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--proposals y", "give --data DIR (a folder of images), or --demo"),
        ("--data photos", "give --proposals FILE, made by: python -m tools.proposals --data photos --out FILE"),
        ("--data x --proposals y --size 225", "--size 225: must be even and at least 64"),
        ("--data x --proposals y --size 62", "--size 62: must be even and at least 64"),
        ("--data x --proposals y --framework soco --depositioning", "--depositioning is a loss of D3SSL"),
        ("--data x --proposals y --ema 1.5", "argument --ema: 1.5: must be between 0 and 1"),
        ("--data x --proposals y --temperature 0", "argument --temperature: 0: must be at least 0.001"),
        ("--data x --proposals y --queue-size 0", "argument --queue-size: 0: must be at least 1"),
        ("--data x --proposals y --augment none", "argument --augment: invalid choice: 'none'"),
        ("--data x --proposals y --augment rbj prc soco-cutout", "--augment prc soco-cutout: one takes the place of"),
        ("--data x --proposals y --augment prm-erase prm", "--augment prm prm-erase: one takes the place of the other"),
        ("--data x --proposals y --augment soco-jitter prc rbj", "--augment rbj soco-jitter: one takes the place of"),
        (
            "--demo --framework soco --augment prm prm-erase",
            "--augment prm prm-erase: one takes the place of the other",
        ),
        ("--data x --proposals y --cutout none", "unrecognized arguments: --cutout none"),
    ],
)
def test_settings_that_make_no_sense(flags, words, capsys):
    assert refused(capsys, flags).startswith(words)


def test_bank_shrinks_to_the_data(capsys, monkeypatch, tmp_path):
    """It holds four keys of an image. SoCo has none."""
    monkeypatch.setattr(d3ssl.proposals, "attach", lambda run, path: run.images)
    monkeypatch.setattr(d3ssl, "build", lambda args, *_: sizes.append(args.queue_size) or 1 / 0)
    for flags, size, line in (
        ("", 256 * 4 * 3, "queue: 3072 keys instead of 65536"),
        ("--queue-size 5000", 5000, "warning: --queue-size 5000 holds more than an epoch"),
        ("--queue-size 3072", 3072, ""),
        ("--framework soco", None, ""),
        ("--demo", 512, ""),
        ("--demo --queue-size 600", 600, ""),
        ("--demo --framework soco", None, ""),
    ):
        sizes = []
        with pytest.raises(ZeroDivisionError):
            d3ssl.train(["--data", f"scenes:{1024 + 5}", "--output-dir", str(tmp_path), *flags.split()])
        out = capsys.readouterr().out
        assert sizes == [size] and line in out and (line or not out)


@pytest.mark.parametrize(
    "flags, chance, D",
    [
        ("", 4 * math.log(21), 128),
        ("--no-depositioning", 2 * math.log(21), 128),
        ("--framework soco", None, 256),
    ],
)
def test_yardsticks(flags, chance, D):
    """A log averages tensors and takes numbers as they are: the loss and the spread of a guess."""
    method = build(*flags.split())
    loss, values = method(method.query, batch_of(6), 0)
    plain = {name: value for name, value in values.items() if not torch.is_tensor(value)}
    assert plain == pytest.approx({"std_spread": D**-0.5} | ({"loss_chance": chance} if chance else {}))
    assert all(type(value) is float for value in plain.values())
    assert all(values[name].ndim == 0 for name in values.keys() - plain.keys()) and loss.ndim == 0


LIFTED = {  # as the table of docs/d3ssl.md has it: what each piece needs
    "proposal_cutout": "pixel_slices", "proposal_mask": "foreground_mask pixel_slices", "restricted_jitter": "",
    "soco_cutout": "pixel_slices", "soco_jitter": "", "foreground_mask": "pixel_slices", "pixel_slices": "",
    "shift_range": "", "compose": "", "choose_boxes": "boxes_in_view", "boxes_in_view": "", "flip_boxes": "",
    "distorted_view": "", "other_images": "", "region_contrastive_loss": "negative_logsumexp NegativeLogSumExp",
    "region_cosine_loss": "",
}  # fmt: skip


def test_pieces_work_alone(monkeypatch):
    """The source of each piece with libraries and what docs/d3ssl.md says it needs passes the same oracles."""
    for name, others in LIFTED.items():
        alone, *_ = lifted("d3ssl.py", name, *others.split())
        assert alone is not getattr(d3ssl, name)
        monkeypatch.setattr(d3ssl, name, alone)
    test_prc_against_sets_of_pixels()
    test_prm_shows_background_from_all_sides_and_never_touches_boxes()
    test_rbj_stays_inside_and_is_never_larger()
    test_soco_jitter_moves_every_second_box_by_a_tenth()
    test_soco_cutout_is_a_square_in_every_second_box()
    test_foreground_mask_against_pixel_centres()
    test_shift_range_by_trying_all_shifts()
    test_composition_moves_pixels_by_exactly_t()
    test_boxes_wholly_inside_the_crop_come_first()
    test_views_follow_the_recipe()
    test_loss_against_a_naive_loop_value_and_gradient()
    test_soco_loss_and_its_stop_gradient()
    test_background_is_another_image_of_the_group(7, 4)
