"""d3ssl.py: views and boxes, region-level augmentations, networks, losses and one iteration, against something independent."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from helpers import coordinate_image, lifted
from PIL import Image
from torch import nn

import common
import d3ssl
from d3ssl import Drawn

SIZE = 64


def some_boxes(count, size, seed=0, least=20):
    """(count, 4) boxes inside a view of that size, sides of at least `least` pixels."""
    rng = torch.Generator().manual_seed(seed)
    side = least + torch.rand(count, 2, generator=rng) * (size * 0.6 - least)
    corner = torch.rand(count, 2, generator=rng) * (size - side)
    return torch.cat([corner, corner + side], 1)


def views_of(**changes):
    settings = dict(images=None, size=SIZE, boxes=4, cutout="prc", jitter="rbj", prm="keep", seed=0)
    return d3ssl.RegionViews(**(settings | changes))


def batch_of(count, size=SIZE, **changes):
    """Drawn of random scenes with random boxes, with a leading dimension."""
    rng, items = np.random.default_rng(0), []
    for i in range(count):
        blocks = rng.integers(0, 256, (12, 15, 3), np.uint8)
        items.append((Image.fromarray(blocks).resize((150, 120), Image.NEAREST), some_boxes(6, 120, i, least=45)))
    return d3ssl.draw_batch(views_of(size=size, **changes), items, "cpu", "test")


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
    views, checked, flips = views_of(cutout="none", jitter="none", prm="none", size=128), 0, [0, 0]
    for i in range(30):
        drawn = d3ssl.draw_batch(views, [(image, proposals)] * 2, "cpu", i)
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
    """x1 is the whole image; x2 has [0.4, 1] of its area and an aspect of 3/4 to 4/3; each is flipped every second time."""
    image, shown = Image.new("RGB", (400, 300)), []
    original = d3ssl.distorted_view

    def note(image, crop, size):
        view, flipped = original(image, crop, size)
        shown.append((crop.tolist(), flipped))
        return view, flipped

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(d3ssl, "distorted_view", note)
        for i in range(300):
            views_of(size=32).draw(image, torch.zeros(0, 4), i)
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


def test_prc_on_nested_boxes_cuts_what_the_rule_says():
    """Four nested boxes at c = 0.3: on average 0.147, 0.181, 0.221, 0.300 of them are cut, outermost first."""
    shares = []
    for i in range(400):
        with common.drawing("nested", i):
            keep = d3ssl.proposal_cutout(torch.ones(200, 200), NESTED, 0.3, 0.3)
        shares.append([1 - keep[d3ssl.pixel_slices(box, 200, 200)].mean().item() for box in NESTED[[1, 3, 2, 0]]])
    shares = torch.tensor(shares)
    areas = torch.tensor([200.0, 150, 100, 60]) ** 2
    assert (shares[:, 3] <= 0.305).all()  # the innermost is cut last: never more than its share
    assert (shares * areas).max(1).values.le(0.305 * areas[0]).all()
    assert (shares.mean(0) - torch.tensor([0.147, 0.181, 0.221, 0.300])).abs().max() < 0.025, shares.mean(0)


def prc_by_sets(boxes, draws):
    """Section 4.1's rule with sets of pixels, and the draws given as (c, u, v) in the order of use."""
    gone = set()
    for (x0, y0, x1, y1), (c, u, v) in zip(
        sorted(boxes, key=lambda b: -(b[2] - b[0]) * (b[3] - b[1])), draws, strict=True
    ):
        own = {(i, j) for i in range(y0, y1) for j in range(x0, x1)}
        cut = len(own & gone) / len(own)
        if cut > c:
            gone, cut = gone - own, 0
        scale = math.sqrt(c - cut)
        h, w = round(scale * (y1 - y0)), round(scale * (x1 - x0))
        top, left = y0 + int(u * (y1 - y0 - h + 1)), x0 + int(v * (x1 - x0 - w + 1))
        gone |= {(i, j) for i in range(top, top + h) for j in range(left, left + w)}
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
    """Of the smallest box never more than c is cut, whatever lies around it; without the rule it would often be."""
    worst, unprotected = 0, 0
    for i in range(200):
        small = some_boxes(1, 120, i, least=20)[0] * 0.5 + 30
        boxes = torch.stack([torch.tensor([0.0, 0, 120, 120]), small, torch.tensor([10.0, 10, 110, 110])])
        with common.drawing("small", i):
            keep = d3ssl.proposal_cutout(torch.ones(120, 120), boxes, 0.3, 0.3)
        with common.drawing("small", i):
            around = d3ssl.proposal_cutout(torch.ones(120, 120), boxes[[0, 2]], 0.3, 0.3)
        inside = d3ssl.pixel_slices(small, 120, 120)
        worst = max(worst, 1 - keep[inside].mean().item())
        unprotected = max(unprotected, 1 - around[inside].mean().item())
    assert worst < 0.33 and unprotected > 0.9


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
    views = views_of(jitter="none", boxes=1)
    for i in range(400):
        drawn = views.draw(image, boxes, i)
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
    drawn = batch_of(3, 64)
    x2, background = common.normalise(drawn.view_2), torch.randn(3, 3, 64, 64)
    got = d3ssl.compose(x2, drawn.shift, drawn.mask_3, background)
    assert (drawn.shift != 0).any(1).all()
    for b, i, j in itertools.product(range(3), range(64), range(64)):
        dx, dy = drawn.shift[b].tolist()
        want = x2[b, :, i - dy, j - dx] if drawn.mask_3[b, i, j] else background[b, :, i, j]
        assert torch.equal(got[b, :, i, j], want)
    moved = drawn.boxes_2 + drawn.shift.repeat(1, 2)[:, None]
    assert moved.min() >= 0 and moved.max() <= 64


def test_mask_of_x3_is_the_moved_foreground_cut_once_more(monkeypatch):
    """Eqs. 6 and 7, and that --cutout does not change them."""
    for cutout in ("prc", "none", "soco"):
        drawn = batch_of(6, cutout=cutout)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(d3ssl, "proposal_cutout", lambda view, boxes: view)
            whole = batch_of(6, cutout="none")
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


@pytest.mark.parametrize(
    "flags, changed",
    [
        ({"cutout": "none"}, {"keep_1", "keep_2"}),
        ({"cutout": "soco"}, {"keep_1", "keep_2"}),
        ({"prm": "none"}, {"keep_1", "keep_2"}),
        ({"prm": "erase"}, {"keep_1", "keep_2"}),
        ({"jitter": "soco"}, {"boxes_1", "boxes_2", "keep_1", "keep_2", "shift", "mask_3"}),
        ({"jitter": "none"}, {"boxes_1", "boxes_2", "keep_1", "keep_2", "shift", "mask_3"}),
        ({"boxes": 3}, {"boxes_1", "boxes_2", "keep_1", "keep_2", "shift", "mask_3", "found"}),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else " ".join(sorted(value)),
)
def test_ablation_flags_change_what_they_name_and_nothing_else(flags, changed):
    before, after = batch_of(4), batch_of(4, **flags)
    different = {name for name in FIELDS if not torch.equal(getattr(before, name), getattr(after, name))}
    assert different == changed
    if "cutout" in flags:  # background is PRM's alone; SoCo's squares may reach out of the boxes
        for b in range(4):
            outside = ~d3ssl.foreground_mask(before.boxes_1[b], SIZE, SIZE)
            if flags["cutout"] == "none":
                assert torch.equal(before.keep_1[b][outside], after.keep_1[b][outside])
                assert after.keep_1[b][~outside].all()
    if "prm" in flags:
        for b in range(4):
            inside = d3ssl.foreground_mask(before.boxes_1[b], SIZE, SIZE)
            assert torch.equal(before.keep_1[b][inside], after.keep_1[b][inside])
            if flags["prm"] == "none":
                assert after.keep_1[b][~inside].all()


def test_masks_lie_where_the_boxes_of_each_view_are():
    """For x1 and for x2-s, whose boxes are half as large: PRC cuts inside boxes alone, PRM outside alone, both do."""
    inside = lambda boxes, side: d3ssl.foreground_mask(boxes, side, side)  # noqa: E731
    cut, hidden = batch_of(12, prm="none"), batch_of(12, cutout="none")
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
    plain, jittered = batch_of(12, jitter="none"), batch_of(12, jitter="soco")
    for old, new in ((plain.boxes_1, jittered.boxes_1), (plain.boxes_2, jittered.boxes_2)):
        sides = (new[..., 2:] - new[..., :2]) / (old[..., 2:] - old[..., :2])
        assert (
            sides.max() > 1.01 and (sides == 1).all(2).any()
        )  # larger than before, which RBJ never is; some not at all
        assert new.min() >= 0 and new.max() <= SIZE


def test_draws_depend_on_epoch_image_and_seed_and_holes_of_x3_are_its_own():
    class Same:
        def __getitem__(self, index):
            image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 90, 3), np.uint8))
            return (image, some_boxes(6, 90, 0, least=40)), 0

    first = views_of(images=Same())[0, 0]
    assert all(
        torch.equal(torch.as_tensor(a), torch.as_tensor(b))
        for a, b in zip(first, views_of(images=Same())[0, 0], strict=True)
    )
    for other in (views_of(images=Same())[1, 0], views_of(images=Same())[0, 1], views_of(images=Same(), seed=1)[0, 0]):
        assert not any(torch.equal(a, b) for a, b in zip(first[:6], other[:6], strict=True))
    with pytest.MonkeyPatch.context() as patch:
        keys, drawing = [], common.drawing
        patch.setattr(common, "drawing", lambda *key: keys.append(key) or drawing(*key))
        views_of(images=Same())[0, 0]
    assert len(keys) == len(set(keys)) == 12  # crop, boxes, 2 x (colour, jitter), 3 x cutout, 2 x mask, shift


def test_regions_are_at_least_a_cell_in_both_views(monkeypatch):
    seen, choose = [], d3ssl.choose_boxes
    monkeypatch.setattr(d3ssl, "choose_boxes", lambda *a, **k: seen.append(k) or choose(*a, **k))
    image = Image.new("RGB", (400, 300))
    for i in range(20):
        drawn = views_of(jitter="none", size=224).draw(image, some_boxes(30, 300, i, least=5), i)
        for boxes in (drawn.boxes_1, drawn.boxes_2):
            assert (boxes[:, 2:] - boxes[:, :2]).min() > 15.99
    assert all(k == {"least": 16} for k in seen)


def test_jitter_none_uses_the_boxes_as_they_are_and_views_have_draws_of_their_own():
    plain, jittered = batch_of(4, jitter="none"), batch_of(4)
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
    encoder = d3ssl.Encoder("resnet18", 8)
    got = encoder.features(torch.zeros(1, 3, size, size), torch.tensor([[[0.0, 0, 64, 64], [8, 0, 32, 64]]]))
    assert seen == [(cells, 1 / 16, {"aligned": True})] and got.shape == (1, 2, 512)


@pytest.mark.parametrize("size", [224, 112])
def test_the_region_of_a_whole_view_is_torchvisions_resnet(size):
    """Eq. 1 with b = the view: RoIAlign then reads each cell of C4 at its centre, and nothing is left of it."""
    encoder, resnet = d3ssl.Encoder("resnet18", 8).eval(), torchvision.models.resnet18(num_classes=8).eval()
    for norm in (m for m in encoder.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.running_mean.uniform_(-0.1, 0.1)
    resnet.load_state_dict(encoder.trunk.state_dict(), strict=False)
    resnet.fc = nn.Identity()
    x, box = torch.randn(2, 3, size, size), torch.tensor([[[0.0, 0, size, size]]] * 2)
    torch.testing.assert_close(encoder.features(x, box)[:, 0], resnet(x), rtol=1e-3, atol=1e-4)
    part = torch.tensor([[[0.0, 0, size / 2, size]]] * 2)  # another box: other features, of the image it belongs to
    assert (encoder.features(x, part) - encoder.features(x, box)).abs().max() > 1e-2
    swapped = encoder.features(x.flip(0), part)
    torch.testing.assert_close(swapped.flip(0), encoder.features(x, part), rtol=1e-4, atol=1e-5)


def build(*flags, total=10, **changes):
    base = "--data scenes --arch resnet18 --size 64 --batch-size 6 --seed 1".split()
    args = d3ssl.get_args([*base, *([] if "soco" in flags else ["--queue-size", "20", "--group-size", "6"]), *flags])
    return d3ssl.build(args, common.World(0, 1, 0, torch.device("cpu")), total)


def test_heads():
    mlp = build().query.projector
    assert [(type(m).__name__, *((m.in_features, m.out_features) if hasattr(m, "in_features") else ())) for m in mlp] == [
        ("Linear", 512, 512), ("ReLU",), ("Linear", 512, 128)
    ]  # fmt: skip
    soco = build("--framework", "soco")
    for mlp, inputs in ((soco.query.encoder.projector, 512), (soco.query.predictor, 256), (soco.key.projector, 512)):
        assert [type(m).__name__ for m in mlp] == ["Linear", "BatchNorm1d", "ReLU", "Linear"]
        assert (mlp[0].in_features, mlp[0].out_features, mlp[3].out_features) == (inputs, 4096, 256)
    normed = build("--mlp-norm").query.projector
    assert [type(m).__name__ for m in normed] == ["Linear", "BatchNorm1d", "ReLU", "Linear"] and normed[
        0
    ].out_features == 512
    assert all((block.bn2.weight == 0).all() for block in soco.query.encoder.trunk.layer1)
    assert all((block.bn2.weight == 1).all() for block in build().query.trunk.layer1)


def test_batch_statistics_are_the_groups_own():
    """Images in groups of 3, regions with their images: each group alone gives the same."""
    encoder, drawn = d3ssl.Encoder("resnet18", 8, group_size=3), batch_of(6)
    x, boxes = common.normalise(drawn.view_1), drawn.boxes_1
    (whole,) = encoder((x, boxes))
    for part in (slice(0, 3), slice(3, 6)):
        (alone,) = encoder((x[part], boxes[part]))
        torch.testing.assert_close(whole[part], alone, rtol=1e-4, atol=1e-5)
    encoder.group_size = None
    assert (encoder((x, boxes))[0] - whole).abs().max() > 1e-3


def test_images_and_boxes_stay_together_through_shuffling():
    """In evaluation mode company does not matter: shuffled or not, each region has the same vector, in its place."""
    method, drawn = build().eval(), batch_of(6)
    view = (common.normalise(drawn.view_1), drawn.boxes_1)
    (z,) = method.teach(torch.tensor([3, 0, 5, 1, 2, 4]), view)
    with torch.no_grad():
        want = F.normalize(method.key(view)[0], dim=2)
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
    with torch.no_grad():
        for p in method.key.parameters():
            p.mul_(1.05)  # a teacher of its own
    before = [p.clone() for p in method.key.parameters()]
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

    for p, old, student in zip(method.key.parameters(), before, method.query.parameters(), strict=True):
        torch.testing.assert_close(p, 0.999 * old + 0.001 * student)  # it follows first, then it is asked
    with torch.no_grad():
        z_s = [F.normalize(z, dim=2) for z in method.query(*views)]
        t1, t2 = (F.normalize(z, dim=2) for z in method.key((hat_1, drawn.boxes_1), (x2, drawn.boxes_2)))
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


def test_x3_is_composed_on_another_images_x2(monkeypatch):
    method, drawn = build(), batch_of(6)
    calls = recorded(method, "query", monkeypatch)
    x2 = common.normalise(drawn.view_2)
    for step in range(4):
        method(method.query, drawn, step)
        x3, boxes = calls[-1][2]
        where = torch.rand((), generator=common.generator("background", 1, step)).item()
        other = d3ssl.other_images(6, 6, where)
        holes = ~drawn.mask_3
        for b in range(6):
            assert torch.equal(x3[b][:, holes[b]], x2[other[b]][:, holes[b]])
        assert torch.equal(boxes, drawn.boxes_2 + drawn.shift.repeat(1, 2)[:, None])
    assert len({int(d3ssl.other_images(6, 6, torch.rand((), generator=common.generator("background", 1, s)).item())[0]) for s in range(9)}) > 2  # fmt: skip


def test_bank_both_keeps_the_clean_view_too():
    method, drawn = build("--bank", "both", "--queue-size", "48"), batch_of(6)
    method(method.query, drawn, 0)
    with torch.no_grad():
        inputs = d3ssl.network_inputs(drawn, torch.arange(6))
        t1, t2 = (F.normalize(z, dim=2).flatten(0, 1) for z in method.key(inputs.x1, inputs.x2))
    torch.testing.assert_close(method.bank.vectors, torch.cat([t1, t2]), rtol=1e-3, atol=1e-4)


def test_a_batch_without_any_proposal_trains_on():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 90, 3), np.uint8))
    drawn = d3ssl.draw_batch(views_of(), [(image, torch.zeros(0, 4))] * 6, "cpu", "none")
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
    values = d3ssl.health(drawn, SIZE, z)
    assert values["proposals"] == 2 and values["empty"].item() == pytest.approx(2 / 6)
    assert values["stuck"].item() == pytest.approx(1 / 6)
    assert values["shift"].item() == pytest.approx(np.mean([math.hypot(*t) for t in drawn.shift.tolist()]), rel=1e-5)
    assert values["std"].item() == pytest.approx(float(z.flatten(0, 1).var(0, correction=0).sqrt().mean()))


def test_losses_and_bank_stay_in_fp32_under_amp(monkeypatch):
    seen, loss = [], d3ssl.region_contrastive_loss
    monkeypatch.setattr(d3ssl, "region_contrastive_loss", lambda *a: seen.append([x.dtype for x in a[:3]]) or loss(*a))
    method = build("--amp", "bf16")
    total, _ = method(method.query, batch_of(6), 0)
    assert seen == [[torch.float32] * 3] * 4 and total.dtype == method.bank.vectors.dtype == torch.float32


def test_soco_iteration_by_hand(monkeypatch):
    """The same views to the same networks; predictions against projections, both ways; momentum 0.99 rising to 1."""
    drawn = batch_of(6)
    for step, momentum in ((0, 0.99), (2, 0.9909549), (10, 1.0)):
        method = build("--framework", "soco")
        with torch.no_grad():
            for p in method.key.parameters():
                p.mul_(1.05)
        before = [p.clone() for p in method.key.parameters()]
        students, teachers = recorded(method, "query", monkeypatch), recorded(method, "key", monkeypatch)
        loss, values = method(method.query, drawn, step)
        for p, old, student in zip(method.key.parameters(), before, method.query.encoder.parameters(), strict=True):
            torch.testing.assert_close(p, momentum * old + (1 - momentum) * student)
    inputs = d3ssl.network_inputs(drawn, torch.arange(6))
    for given, wanted in ((students[0], (inputs.x1, inputs.x2_s)), (teachers[0], (inputs.x1, inputs.x2))):
        assert len(given) == 2
        for (x, boxes), (want, where) in zip(given, wanted, strict=True):
            assert torch.equal(x, want) and torch.equal(boxes, where)
    p_1, p_2 = (p.flatten(0, 1) for p in method.query(inputs.x1, inputs.x2_s))
    z_1, z_2 = (z.flatten(0, 1) for z in method.key(inputs.x1, inputs.x2))
    cosine = lambda a, b: (F.normalize(a, dim=1) * F.normalize(b, dim=1)).sum(1).mean()  # noqa: E731
    assert loss.item() == pytest.approx((-2 * cosine(p_1, z_2) - 2 * cosine(p_2, z_1)).item(), rel=1e-3)
    loss.backward()
    assert all(p.grad is None for p in method.key.parameters())
    assert all(p.grad is not None for p in method.query.parameters())


def test_see_shows_what_the_networks_compare():
    """The picture's similarities: the student's x3 (else x2-s) against the teacher's x2, and nothing is changed by looking."""
    for flags in ((), ("--no-depositioning",), ("--framework", "soco")):
        method, drawn = build(*flags), batch_of(6)
        with torch.no_grad():
            for p in method.key.parameters():
                p.mul_(1.05)
        inputs, similarity = method.see(drawn)
        student = method.query(inputs.x2_s if flags else inputs.x3)[0]
        teacher = method.key(inputs.x2)[0]
        for b, i, j in itertools.product(range(6), range(4), range(4)):
            want = F.cosine_similarity(student[b, i], teacher[b, j], dim=0)
            assert similarity[b, i, j].item() == pytest.approx(want.item(), abs=1e-3)


def test_found_again_against_a_loop():
    student, teacher = torch.randn(5, 4, 6), torch.randn(5, 4, 6)
    teacher[:3] = student[:3] + 0.3 * teacher[:3]
    known = torch.arange(4) < torch.tensor([4, 3, 1, 2, 0])[:, None]
    same, chance = d3ssl.found_again(student * 3, teacher, known)
    count = 0
    for b, n in enumerate((4, 3, 1, 2, 0)):
        for k in range(4):
            if k >= n:
                assert not same[b, k] and chance[b, k] == 0  # a repeated box is no object
                continue
            cosines = [F.cosine_similarity(student[b, k], teacher[b, j], dim=0) for j in range(n)]
            assert same[b, k] == (int(np.argmax(cosines)) == k) and chance[b, k].item() == pytest.approx(1 / n)
            count += int(same[b, k])
    assert same.sum() == count > 6


class Told(nn.Module):
    """A method whose features tell which box of the image they are of: where its proposal lies, from what the view shows."""

    autocast = staticmethod(lambda: torch.autocast("cpu", enabled=False))

    def __init__(self):
        super().__init__()
        self.query, self.key = nn.Sequential(nn.BatchNorm2d(3)), nn.Sequential(nn.BatchNorm2d(3))
        self.calls = []
        for name in ("query", "key"):
            getattr(self, name).features = lambda x, boxes, name=name: self.features(name, x, boxes)

    def features(self, name, x, boxes):
        """Mean coordinates of each box, from a view of a coordinate image, as a direction."""
        self.calls.append((name, x, boxes, getattr(self, name).training))
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (common.PIXEL_MEAN, common.PIXEL_STD))
        shown = (x * std + mean)[:, :2]
        place = torch.stack([
            torch.stack([shown[b][(slice(None), *d3ssl.pixel_slices(box, *x.shape[2:]))].mean((1, 2)) for box in own])
            for b, own in enumerate(boxes)
        ])  # fmt: skip
        angle = 3 * place
        return torch.cat([angle.cos(), angle.sin()], 2)

    def see(self, drawn):
        self.seen = drawn
        return "inputs", "similarity"


def test_probe_finds_objects_that_the_features_tell(no_colours, monkeypatch, tmp_path):
    """Hits near 1 with a stub that sees where a box lies; unjittered boxes and clean views to the right networks in training
    mode; padding does not count; nothing of the method is changed."""

    class Coordinates:
        held_out, order = True, torch.arange(40)

        def __len__(self):
            return 40

        def __getitem__(self, index):
            return (coordinate_image(128, 128), some_boxes(5, 128, index, least=40)), 0

        def probe(self, index):
            return coordinate_image(128, 128), some_boxes(2 + index % 2, 128, index, least=40)

    drawn_at = []
    monkeypatch.setattr(d3ssl, "draw_regions", lambda *a: drawn_at.append(a))
    method = Told()
    monkeypatch.setattr(d3ssl.copy, "deepcopy", lambda x: copies.append(x) or x)
    copies = []
    args = d3ssl.get_args(["--data", "scenes", "--size", "96", "--output-dir", str(tmp_path)])
    world = common.World(0, 1, 0, torch.device("cpu"))
    first = d3ssl.probe(method, Coordinates(), args, world, "start")
    calls = [*method.calls]
    assert copies == [method] and d3ssl.probe(method, Coordinates(), args, world, "end") == first  # fixed views
    assert first["hits"] > 0.93 and 0.33 < first["chance"] < 0.6 and 60 < first["objects"] <= 80
    (name_1, x1, boxes_1, training_1), (name_2, x2, boxes_2, training_2) = calls
    assert (name_1, name_2, training_1, training_2) == ("query", "key", True, True)
    plain = views_of(size=96, cutout="none", jitter="none", prm="none")
    want = d3ssl.draw_batch(plain, [Coordinates().probe(i) for i in range(32)], "cpu", "probe", 0, 0)
    assert torch.equal(boxes_1, want.boxes_1) and torch.equal(x1, common.normalise(want.view_1))
    assert torch.equal(boxes_2, want.boxes_2) and torch.equal(x2, common.normalise(want.view_2))
    assert first["objects"] == int(want.found.sum())
    path, items, *_ = drawn_at[0]
    assert path.endswith("regions_start.png") and drawn_at[1][0].endswith("regions_end.png") and len(items) == 6


def test_picture_shows_each_view_with_its_boxes_and_the_mask(tmp_path):
    """Plain views: the panels' colours, a box's colour at its edge in each of them, the mask, the similarities."""
    side, gap = 176, 6
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (common.PIXEL_MEAN, common.PIXEL_STD))
    shades = dict(x1=0.2, x2=0.4, x2_s=0.6, x3=0.8)
    boxes = {name: torch.tensor([[[20.0, 30, 60, 70]]]) + 3 * i for i, name in enumerate(shades)}
    boxes["x2_s"] = boxes["x2_s"] / 2
    views = {
        name: (((shade - mean) / std).expand(1, 3, *([44] * 2 if name == "x2_s" else [88] * 2)), boxes[name])
        for name, shade in shades.items()
    }
    mask = torch.zeros(1, 88, 88, dtype=torch.bool)
    mask[0, 44:] = True
    similarity = torch.tensor([[[0.9, 0.1], [0.3, 0.5]]])
    item = (Image.new("RGB", (50, 100), (9, 9, 99)), torch.tensor([[10.0, 20, 40, 60]]))
    for given, columns in ((mask, 7), (None, 5)):
        d3ssl.draw_regions(tmp_path / "x.png", [item], d3ssl.Inputs(**views), given, similarity)
        sheet = Image.open(tmp_path / "x.png")
        at = lambda column, x, y: sheet.getpixel((gap + column * (side + gap) + round(x), 20 + round(y)))  # noqa: B023, E731
        assert sheet.size == (columns * (side + gap) + gap, side + gap + 20)
        assert at(0, 170, 170) == (9, 9, 99) and at(0, 10 * side / 50 + 1, 40 * side / 100) == (255, 255, 160)
        for column, (name, shade) in enumerate(shades.items(), 1):
            if given is None and name == "x3":
                break
            zoom = side / (44 if name == "x2_s" else 88)
            x0, y0, x1, y1 = (boxes[name][0, 0] * zoom).tolist()
            assert at(column, 170, 170) == (round(255 * shade),) * 3
            for x, y in ((x0, (y0 + y1) / 2), (x1 - 1, (y0 + y1) / 2), ((x0 + x1) / 2, y0), ((x0 + x1) / 2, y1 - 1)):
                assert at(column, x, y) == (255, 255, 255), name
            assert at(column, x0 - 3, y0 - 3) == (round(255 * shade),) * 3
        if given is not None:
            assert at(5, 88, 80) == (0, 0, 0) and at(5, 88, 96) == (255, 255, 255)
        brightness = [sum(at(columns - 1, x, y)[:2]) for y in (44, 132) for x in (44, 132)]
        assert np.argsort(brightness).tolist() == [1, 2, 3, 0]  # rows: the student's regions


def test_both_encoders_start_from_given_weights(tmp_path):
    weights = torchvision.models.resnet18().state_dict()
    torch.save(weights, tmp_path / "resnet18.pth")
    for flags in ((), ("--framework", "soco")):
        args = d3ssl.get_args(["--data", "scenes", "--arch", "resnet18", *flags])
        args.queue_size = 8
        method = d3ssl.build(args, common.World(0, 1, 0, torch.device("cpu")), 9, str(tmp_path / "resnet18.pth"))
        for encoder in (d3ssl.online_encoder(method), method.key):
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
    data = d3ssl.WithProposals(FakeImages(), FakeProposals())
    for index, row in ((0, 4), (1, 3), (2, 2), (3, 4)):
        (image, boxes), passed = data[index]
        assert boxes.tolist() == [[row, 0, row + 1, 1]] and boxes.dtype == torch.float32
        assert image.width == 10 + (4 - row) and passed == (2 if index == 3 else 0)
    assert len(data) == 5 and "five" in data.fingerprint() and "9 boxes, single" in data.fingerprint()


def test_held_out_scenes_come_with_their_objects():
    from tools.scenes import make_scene

    data = d3ssl.WithProposals(common.Scenes(7, 48, 3), type("All", (FakeProposals,), {"check": lambda *_: None})())
    assert data.order.sort().values.tolist() == list(range(7))  # pictures show each image once
    image, boxes = data.probe(2)
    scene = make_scene(3, 9, 48)  # beyond the seven that are trained on
    assert np.array_equal(np.asarray(image), scene["image"]) and boxes.tolist() == scene["boxes"].tolist()


DEFAULTS = dict(
    framework="moco", boxes=4, cutout="prc", jitter="rbj", prm="keep", depositioning=True, temperature=0.2, dim=128,
    queue_size=65536, bank="augmented", ema=0.999, arch="resnet50", size=224, group_size=32, epochs=800, batch_size=256,
    lr=0.3, mlp_norm=False, momentum=0.9, weight_decay=1e-4, amp="none", seed=0, init=None, steps=None,
)  # fmt: skip
SOCO = dict(cutout="soco", jitter="none", prm="none", depositioning=False, ema=0.99, dim=256, mlp_norm=True)
BASE = ["--data", "x", "--proposals", "y"]


def test_defaults():
    assert {name: getattr(d3ssl.get_args(BASE), name) for name in DEFAULTS} == DEFAULTS
    soco = d3ssl.get_args([*BASE, "--framework", "soco"])
    assert {name: getattr(soco, name) for name in DEFAULTS} == DEFAULTS | SOCO | {"framework": "soco"}
    table_6 = d3ssl.get_args([*BASE, *"--framework soco --cutout prc --jitter rbj --prm".split()])
    assert (table_6.cutout, table_6.jitter, table_6.prm, table_6.depositioning) == ("prc", "rbj", "keep", False)
    demo = d3ssl.get_args(["--demo", "--arch", "resnet34"])
    assert (demo.data, demo.arch, demo.size, demo.batch_size, demo.proposals) == (
        "scenes:2048",
        "resnet34",
        136,
        64,
        None,
    )
    soco = d3ssl.get_args(["--demo", "--framework", "soco", "--ema", "0.9"])
    assert (soco.cutout, soco.ema, soco.dim, soco.size) == ("soco", 0.9, 256, 136)


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--proposals y", "give --data DIR"),
        ("--data photos", "python -m tools.proposals --data photos --out FILE"),
        ("--data x --proposals y --size 225", "give an even number"),
        ("--data x --proposals y --size 32", "--size 32: must be at least 64"),
        ("--data x --proposals y --boxes 0", "--boxes 0: must be between 1"),
        ("--data x --proposals y --framework soco --temperature 0.1", "--temperature has no effect here"),
        ("--data x --proposals y --framework soco --group-size 8", "--group-size has no effect here"),
        ("--data x --proposals y --framework soco --depositioning", "--depositioning is a loss of D3SSL"),
        ("--data x --proposals y --ema 1.5", "--ema 1.5: must be between 0 and 1"),
    ],
)
def test_settings_that_make_no_sense(flags, words):
    with pytest.raises(common.UserError, match=words) as error:
        d3ssl.get_args(flags.split())
    assert "\n" not in str(error.value)


def test_bank_shrinks_to_the_data(capsys):
    world = common.World(0, 1, 0, torch.device("cpu"))
    for flags, size, line in (
        ("", 256 * 4 * 3, "bank: 3072 regions instead of 65536"),
        ("--bank both", 256 * 8 * 3, "bank: 6144 regions instead of 65536"),
        ("--queue-size 5000", 5000, "warning: --queue-size 5000 can hold an image's own regions"),
        ("--queue-size 3072", 3072, ""),
    ):
        args = d3ssl.get_args([*BASE, *flags.split()])
        d3ssl.fit_batch_and_queue(args, range(1024 + 5), world)
        out = capsys.readouterr().out
        assert args.queue_size == size and line in out and (line or not out)
    for flags, count, words in (
        ("--batch-size 30", 20, "20 images are fewer"),
        ("--batch-size 3 --group-size 2", 99, "it has no other's background"),
    ):
        with pytest.raises(common.UserError, match=words):
            d3ssl.fit_batch_and_queue(d3ssl.get_args([*BASE, *flags.split()]), range(count), world)


def test_yardsticks():
    world = common.World(0, 1, 0, torch.device("cpu"))
    for flags, chance, spread in (
        ("", 4 * math.log(65537), 128**-0.5),
        ("--no-depositioning --dim 64", 2 * math.log(65537), 1 / 8),
        ("--framework soco", None, 1 / 16),
    ):
        found = d3ssl.yardsticks(d3ssl.get_args([*BASE, *flags.split()]), None, world)
        assert found["loss_chance"] == (chance and pytest.approx(chance)) and found["std_spread"] == pytest.approx(
            spread
        )


LIFTED = {  # as README's table has it: what each piece needs
    "proposal_cutout": "pixel_slices", "proposal_mask": "pixel_slices foreground_mask", "restricted_jitter": "",
    "soco_cutout": "pixel_slices", "soco_jitter": "", "foreground_mask": "pixel_slices", "shift_range": "", "compose": "",
    "choose_boxes": "boxes_in_view", "boxes_in_view": "", "flip_boxes": "", "other_images": "",
    "region_contrastive_loss": "negative_logsumexp NegativeLogSumExp",
}  # fmt: skip


def test_pieces_work_alone(monkeypatch):
    """The source of each piece with what README says it needs, and only libraries in scope, passes the same oracles."""
    for name, others in LIFTED.items():
        pieces = {piece.__name__: piece for piece in lifted("d3ssl.py", name, *others.split())}
        monkeypatch.setattr(d3ssl, name, pieces[name])
    test_prc_against_sets_of_pixels()
    test_prm_shows_background_from_all_sides_and_never_touches_boxes()
    test_rbj_stays_inside_and_is_never_larger()
    test_soco_jitter_moves_every_second_box_by_a_tenth()
    test_soco_cutout_is_a_square_in_every_second_box()
    test_foreground_mask_against_pixel_centres()
    test_shift_range_by_trying_all_shifts()
    test_composition_moves_pixels_by_exactly_t()
    test_boxes_wholly_inside_the_crop_come_first()
    test_loss_against_a_naive_loop_value_and_gradient()
    test_background_is_another_image_of_the_group(7, 4)
