# SPDX-License-Identifier: MIT
"""d3ssl.py: views, boxes, augmentations, networks and one iteration, each against something independent."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from helpers import coordinate_image, record_operations, refused, write_images
from PIL import Image

import common
import d3ssl
from d3ssl import Drawn
from harness import images, look, proposals
from harness.run import Run

SIZE = 64
AUGMENT = ("prc", "prm", "rbj")  # the paper's
MEAN, STD = (torch.tensor(x).view(3, 1, 1) for x in (common.PIXEL_MEAN, common.PIXEL_STD))


def some_boxes(count, size, seed=0, least=20):
    """(count, 4) boxes inside a view of that size, sides of at least `least` pixels."""
    rng = torch.Generator().manual_seed(seed)
    side = least + torch.rand(count, 2, generator=rng) * (size * 0.6 - least)
    corner = torch.rand(count, 2, generator=rng) * (size - side)
    return torch.cat([corner, corner + side], 1)


def by(key, function, *args, **settings):
    """The result of a function whose draws are those of the key."""
    with common.drawing(key):
        return function(*args, **settings)


def batched(items, size=SIZE, augment=AUGMENT, **more):
    """Drawn of each (image, proposals), with a leading dimension."""
    drawn = [by(i, d3ssl.draw_views, item, size, augment, **more) for i, item in enumerate(items)]
    return Drawn(*(torch.stack(x) for x in zip(*drawn, strict=True)))


def batch_of(count, bare=0, **settings):
    """Drawn of random blocks with random boxes, with a leading dimension. The first `bare` images have no boxes."""
    blocks = np.random.default_rng(0).integers(0, 256, (count, 12, 15, 3), np.uint8)
    boxes = [some_boxes(6 * (i >= bare), 120, i, least=45) for i in range(count)]
    shown = [Image.fromarray(block).resize((150, 120), Image.NEAREST) for block in blocks]
    return batched(zip(shown, boxes, strict=True), **settings)


def test_boxes_show_the_same_in_every_view(monkeypatch):
    """A coordinate image: what lies in a box of x1, x2, x2-s, x3 are the coordinates of the proposal it comes from."""
    record_operations(monkeypatch)  # colours stay what they are; crop, resize and flip are real
    monkeypatch.setattr(d3ssl, "proposal_cutout", lambda view, boxes: view)
    image, proposals = coordinate_image(300, 200), some_boxes(30, 200, 1, least=60)
    drawn = batched([(image, proposals)] * 31, augment=(), size=128)
    inputs = d3ssl.network_inputs(drawn, torch.arange(31).roll(1))
    checked, flips, pixels = 0, np.zeros(2), torch.tensor(image.size).view(2, 1, 1) * 255 / 256
    assert inputs.x2_s[0].shape[-1] == 64 and (inputs.x2_s[1] * 2 - inputs.x2[1]).abs().max() < 1e-4
    for i in range(31):
        seen = []  # for each view, (K, 4): least and most x and y that a box shows, in pixels of the image
        for x, boxes in inputs:
            shown, corners = (x[i] * STD + MEAN)[:2] * pixels, boxes[i].round().int().tolist()
            parts = [shown[:, y0:y1, x0:x1].flatten(1) for x0, y0, x1, y1 in corners]
            seen.append(torch.stack([torch.cat([part.amin(1), part.amax(1)]) for part in parts]))
        flips += [bool(x[i, 0, :, -1].mean() < x[i, 0, :, 0].mean()) for x, _ in inputs[:2]]
        for k, span in enumerate(seen[0]):
            proposal = proposals[(proposals - span).abs().amax(1).argmin()]
            assert (span - proposal).abs().max() < 5  # x1 shows all of it
            wholly = inputs.x2[1][i, k].min() > 0.5 and inputs.x2[1][i, k].max() < 127.5
            checked += wholly
            for other, tolerance in zip(seen[1:], (5, 9, 5), strict=True):
                part = torch.maximum(other[k][:2], proposal[:2]), torch.minimum(other[k][2:], proposal[2:])
                assert (other[k] - torch.cat(part)).abs().max() < tolerance  # nothing but the proposal
                assert not wholly or (other[k] - proposal).abs().max() < tolerance  # all of it
    assert checked > 60 and (abs(flips - 15) < 7).all()


def test_views_follow_the_recipe(monkeypatch):
    """x1 is the whole image. x2 has [0.4, 1] of its area and an aspect of 3/4 to 4/3."""
    image, shown, blank = Image.new("RGB", (400, 300)), [], torch.zeros(3, SIZE, SIZE, dtype=torch.uint8)
    monkeypatch.setattr(d3ssl, "distorted_view", lambda _, crop, size: shown.append(crop) or (blank, False))
    batched([(image, torch.zeros(0, 4))] * 300, augment=())
    assert all(crop.tolist() == [0, 0, 400, 300] for crop in shown[::2])
    x0, y0, x1, y1 = torch.stack(shown[1::2]).double().T
    area, aspect = (x1 - x0) * (y1 - y0) / 120000, (x1 - x0) / (y1 - y0)
    assert 0.39 < area.min() < 0.44 and 0.9 < area.max() <= 1
    assert 0.74 < aspect.min() < 0.8 and 1.25 < aspect.max() < 1.35


def test_colour_operations_and_their_shares(monkeypatch):
    """MoCo-v2's, in its order: jitter 0.8, grey 0.2, blur 0.5, flip last."""
    seen, runs = record_operations(monkeypatch, "hflip"), []
    for i in range(500):
        seen.clear()
        by(i, d3ssl.distorted_view, Image.new("RGB", (40, 40)), torch.tensor([0.0, 0, 40, 40]), 32)
        runs.append([*seen])
    order = ["jitter (0.4, 0.4, 0.4, 0.1)", "rgb_to_grayscale", "blur True", "hflip"]
    assert all(run == [name for name in order if name in run] for run in runs)
    shares = np.array([np.mean([name in run for run in runs]) for name in order])
    assert np.abs(shares - (0.8, 0.2, 0.5, 0.5)).max() < 0.07


WHOLE, CROP = torch.tensor([[0.0, 0, 200, 200], [50, 50, 150, 150]])
INSIDE = torch.tensor([[60.0, 60, 100, 100], [70, 70, 140, 120], [100, 100, 150, 150], [51, 52, 90, 140], [60, 90, 99, 140]])  # fmt: skip
PARTLY = torch.tensor([[0.0, 0, 100, 100], [100, 20, 190, 120]])
OUTSIDE = torch.tensor([[0.0, 0, 40, 200], [0, 0, 55, 200], [160, 60, 199, 90]])  # or less than a cell inside


def chosen(boxes, count, i=0):
    """How many different boxes are chosen, and the places in `boxes` of all that are."""
    got, found = by(i, d3ssl.choose_boxes, boxes, WHOLE, CROP, 224, count, 16)
    assert found or torch.equal(got, CROP.expand(count, 4))  # without a box that can be used, the crop takes its place
    return found, [int((boxes == box).all(1).nonzero()) for box in got] if found else []


def test_boxes_wholly_inside_the_crop_come_first():
    everything, counts = torch.cat([OUTSIDE, PARTLY, INSIDE]), torch.zeros(10)
    for i in range(200):
        found, picked = chosen(everything, 4, i)
        assert found == 4 == len(set(picked)) and min(picked) >= 5  # without replacement, of those inside
        counts[picked] += 1
        found, picked = chosen(everything, 6, i)
        assert found == 6 and set(range(5, 10)) < set(picked) and len(set(picked) & {3, 4}) == 1
    assert (counts[5:] - 160).abs().max() < 25  # each as often as any


@pytest.mark.parametrize("n", range(4))
def test_fewer_proposals_than_k_are_repeated(n):
    boxes, again = torch.cat([PARTLY[:1], INSIDE[:2], OUTSIDE])[[*range(n), 3, 4, 5]], set()
    for i in range(30):
        found, picked = chosen(boxes, 4, i)
        assert found == n and sorted(picked[:n]) == list(range(n))
        again |= set(picked[n:])
    assert again == set(range(n)) and chosen(boxes[:0], 4)[0] == 0  # any of them


def test_regions_are_at_least_a_cell_in_both_views():
    """16 pixels of the 224 views: 7.1 of the crop's 100 pixels, 14.3 of the image's 200."""
    for x0, x1, usable in ((60, 74.0, 0), (60, 74.6, 1), (20, 57.0, 0), (20, 57.4, 1)):
        assert chosen(torch.tensor([[x0, 60, x1, 100]]), 1)[0] == usable  # large in the crop; large in the image
    image = Image.new("RGB", (400, 300))
    drawn = batched([(image, some_boxes(30, 300, i, least=5)) for i in range(20)], augment=(), size=224)
    smallest = [(boxes[..., 2:] - boxes[..., :2]).min().item() for boxes in (drawn.boxes_1, drawn.boxes_2)]
    assert 15.99 < min(smallest) < 18


def mask_by_centres(boxes, H, W):
    """Eq. 6, pixel by pixel: is its centre in a box?"""
    mask = torch.zeros(H, W, dtype=torch.bool)
    for i, j, (x0, y0, x1, y1) in itertools.product(range(H), range(W), boxes.tolist()):
        mask[i, j] |= x0 <= j + 0.5 < x1 and y0 <= i + 0.5 < y1
    return mask


def prc_by_sets(boxes, H, W, draws):
    """Section 4.1's rule with sets of pixels: those that are cut, and how many boxes were restored.

    An edge lies at a real-valued place: the pixels whose centres lie between the edges are cut (D19).
    draws: (c, u, v) of each box in the order of use.
    """
    gone, restored = set(), 0
    for x0, y0, x1, y1 in sorted(boxes.tolist(), key=lambda b: -(b[2] - b[0]) * (b[3] - b[1])):
        rows, columns = ([i for i in range(n) if a <= i + 0.5 < b] for n, a, b in ((H, y0, y1), (W, x0, x1)))
        own = {*itertools.product(rows, columns)}
        if own:
            c, u, v = next(draws)
            cut = len(own & gone) / len(own)
            if cut > c:
                gone, cut, restored = gone - own, 0, restored + 1
            h, w = (math.sqrt(c - cut) * len(side) for side in (rows, columns))
            top, left = rows[0] + u * (len(rows) - h), columns[0] + v * (len(columns) - w)
            gone |= {(i, j) for i, j in own if top < i + 0.5 < top + h and left < j + 0.5 < left + w}
    return gone, restored


def test_prc_against_sets_of_pixels():
    """Boxes in any order, some inside others, some that reach out of the view, one without a pixel in it."""
    fixed = torch.tensor([[12.0, 8, 30, 25], [-3, -4, 50, 60], [9.7, 6.2, 40, 44], [60, 10, 70, 20], [35, 30, 47, 50]])
    restored = 0
    for i in range(60):
        boxes, view = torch.cat([some_boxes(2, 40, i, least=6), fixed]), torch.rand(3, 40, 44) + 0.5
        draws = by(i, lambda n: [(0.2 + 0.3 * torch.rand(()).item(), *torch.rand(2).tolist()) for _ in range(n)], 7)
        got = by(i, d3ssl.proposal_cutout, view, boxes)
        want, again = prc_by_sets(boxes, 40, 44, iter(draws))
        gone = (got == 0).all(0)
        assert {(y, x) for y, x in gone.nonzero().tolist()} == want and torch.equal(got[:, ~gone], view[:, ~gone])
        restored += again
    assert restored > 60


def test_prm_shows_background_from_all_sides_and_never_touches_boxes():
    boxes, view = torch.tensor([[40.0, 44, 70, 80], [60, 30, 84, 60]]), torch.ones(120, 128, dtype=torch.bool)
    inside, found = mask_by_centres(boxes, 120, 128), []
    for i in range(300):
        keep, erased = (by(i, d3ssl.proposal_mask, view, boxes, erase) for erase in (False, True))
        assert torch.equal(erased, ~keep | inside)  # the other reading
        (y0, y1), (x0, x1) = ((x[0].item(), x[-1].item() + 1) for x in (keep & ~inside).nonzero().T.sort()[0])
        assert keep[inside].all() and keep[y0:y1, x0:x1].all()  # one rectangle
        found.append((y0, 120 - y1, x0, 128 - x1, (y1 - y0) * (x1 - x0) / 120 / 128, (x1 - x0) / (y1 - y0)))
    least, most = np.min(found, 0), np.max(found, 0)
    assert (least[:4] < 25).all() and (most[:4] > 35).all()  # it reaches each side, and does not
    assert 0.18 < least[4] < 0.25 and 0.55 < most[4] < 0.62 and 0.72 < least[5] < 0.8 and 1.25 < most[5] < 1.38


def test_rbj_stays_inside_and_is_never_larger():
    """10,000 draws; each side shrinks evenly by 0 to 20 %, the centre moves evenly over what that leaves."""
    boxes = some_boxes(10_000, 224, 3)
    got = by(0, d3ssl.restricted_jitter, boxes)
    assert (got[:, :2] >= boxes[:, :2]).all() and (got[:, 2:] <= boxes[:, 2:]).all()
    old, new = boxes[:, 2:] - boxes[:, :2], got[:, 2:] - got[:, :2]
    ratio, place = new / old, (got[:, :2] - boxes[:, :2]) / (old - new).clamp(min=1e-6)
    assert (ratio > 0.7999).all()
    for value, mean, deviation in ((ratio, 0.9, 0.2 / 12**0.5), (place, 0.5, 1 / 12**0.5)):
        assert (value.mean(0) - mean).abs().max() < 0.02 and (value.std(0) - deviation).abs().max() < 0.02
        assert abs(torch.corrcoef(value.T)[0, 1]) < 0.05  # x and y on their own


def test_soco_jitter_moves_every_second_box_by_a_tenth():
    boxes = some_boxes(10_000, 224, 4)
    got = by(0, d3ssl.soco_jitter, boxes, 224)
    moved = (got != boxes).any(1)
    assert abs(moved.float().mean() - 0.5) < 0.02 and got.min() >= 0 and got.max() <= 224
    inner = moved & ((boxes > 20) & (boxes < 200)).all(1)  # nothing is clipped
    old, new = (b[inner, 2:] - b[inner, :2] for b in (boxes, got))
    for value in ((got - boxes)[inner, :2] / old, new / old - 1):
        assert 0.095 < value.abs().max() < 0.1001 and value.mean().abs() < 0.005
        assert (value.std(0) - 0.2 / 12**0.5).abs().max() < 0.003


def test_soco_cutout_is_a_square_in_every_second_box():
    box, shares, outside = torch.tensor([[40.0, 40, 104, 80]]), [], 0
    for i in range(400):
        gone = ~by(i, d3ssl.soco_cutout, torch.ones(120, 144, dtype=torch.bool), box)
        if gone.any():
            h, w = gone.any(1).sum().item(), gone.any(0).sum().item()
            assert abs(h - w) <= 1 and gone.sum() == h * w
            shares.append(h * w / (64 * 40))
            outside += bool((gone & ~d3ssl.foreground_mask(box, 120, 144)).any())
    assert abs(len(shares) / 400 - 0.5) < 0.08 and outside > 50
    assert 0.08 < min(shares) < 0.12 and 0.28 < max(shares) < 0.33 and abs(np.mean(shares) - 0.2) < 0.02


def test_shift_range_by_trying_all_shifts():
    full = torch.tensor([[0.0, 5, 30, 40], [20, 0, 64, 64]])  # these cannot move
    for boxes in (full, *(some_boxes(3, 64, seed, least=6) for seed in range(8))):
        least, most = d3ssl.shift_range(boxes, 64)
        for axis, ends in enumerate((boxes[:, ::2], boxes[:, 1::2])):
            fits = [t for t in range(-64, 65) if (ends + t).min() >= 0 and (ends + t).max() <= 64]
            assert (least[axis], most[axis]) == (fits[0], fits[-1]) and 0 in fits


def test_shifts_are_drawn_evenly_over_their_range():
    item = Image.new("RGB", (SIZE, SIZE)), torch.tensor([[20.0, 30, 60, 70]])
    drawn = batched([item] * 400, augment=(), boxes=1)
    least, most = d3ssl.shift_range(drawn.boxes_2, SIZE)
    assert (drawn.shift >= least).all() and (drawn.shift <= most).all()
    places = (drawn.shift - least) / (most - least).clamp(min=1)
    assert (places.mean(0) - 0.5).abs().max() < 0.06 and (places == 0).any(0).all() and (places == 1).any(0).all()


def test_mask_of_x3_is_the_moved_foreground_cut_once_more(monkeypatch):
    """Eqs. 6 and 7."""
    drawn = batch_of(4)
    monkeypatch.setattr(d3ssl, "proposal_cutout", lambda view, boxes: view)
    whole = batch_of(4).mask_3
    for b, (dx, dy) in enumerate(drawn.shift.tolist()):
        moved = torch.zeros(SIZE, SIZE, dtype=torch.bool)
        for i, j in mask_by_centres(drawn.boxes_2[b], SIZE, SIZE).nonzero().tolist():
            moved[i + dy, j + dx] = True  # Eq. 6's mask, pixel by pixel to its new place
        assert torch.equal(whole[b], moved) and not (drawn.mask_3[b] & ~moved).any()
        assert 0.15 < 1 - drawn.mask_3[b].sum() / moved.sum() < 0.55


def test_composition_moves_pixels_by_exactly_t():
    """Against a loop over pixels: under the mask x2 at p - t, elsewhere the background."""
    x2, background, shift = torch.rand(2, 3, 9, 11), torch.rand(2, 3, 9, 11), torch.tensor([[2, -1], [-3, 4]])
    mask = torch.rand(2, 9, 11) < 0.5
    got = d3ssl.compose(x2, shift, mask, background)
    for b, i, j in itertools.product(range(2), range(9), range(11)):
        dx, dy = shift[b].tolist()
        want = x2[b, :, (i - dy) % 9, (j - dx) % 11] if mask[b, i, j] else background[b, :, i, j]
        assert torch.equal(got[b, :, i, j], want)


MASKS, BOXES_FOLLOW = {"keep_1", "keep_2"}, {"boxes_1", "boxes_2", "keep_1", "keep_2", "shift", "mask_3"}
CHANGES = {"prm rbj": MASKS, "soco-cutout rbj": MASKS, "prc rbj": MASKS, "prc prm-erase rbj": MASKS,
           "prc prm soco-jitter": BOXES_FOLLOW, "prc prm": BOXES_FOLLOW, "rbj prm prc": set()}  # fmt: skip


@pytest.mark.parametrize("augment", CHANGES)
def test_ablation_flags_change_what_they_name_and_nothing_else(augment):
    """PRC cuts inside boxes alone, PRM hides outside alone, in x1 and in x2-s, whose boxes are half as large."""
    before, after, plain = (batch_of(4, augment=names) for names in (AUGMENT, augment.split(), ()))
    different = {name for name in Drawn._fields if not torch.equal(getattr(before, name), getattr(after, name))}
    assert different == CHANGES[augment]
    for view in (1, 2):
        was, keep = (getattr(x, f"keep_{view}") for x in (before, after))
        boxes, old = (getattr(x, f"boxes_{view}") for x in (after, plain))
        growth = (boxes[..., 2:] - boxes[..., :2]) / (old[..., 2:] - old[..., :2])
        assert (growth.max() > 1.01) == ("soco-jitter" in augment) and boxes.min() >= 0 and boxes.max() <= SIZE
        assert (growth == 1).all(2).any() == ("rbj" not in augment)
        inside = torch.stack([d3ssl.foreground_mask(own / view, *keep.shape[1:]) for own in boxes])
        outside = {"prm rbj": was, "prc rbj": was | True, "prc prm-erase rbj": ~was}.get(augment, keep)
        assert torch.equal(keep[~inside], outside[~inside]) and (augment != "prm rbj" or keep[inside].all())
        assert augment[:4] != "prc " or different != MASKS or torch.equal(keep[inside], was[inside])
        assert "cutout" not in augment or not keep[~inside].all()  # it reaches out of the boxes


def test_each_kind_of_draw_has_a_generator_of_its_own(monkeypatch):
    """An image draws by twelve keys, which one number of the generator that is given makes its own."""
    keys, drawing, item = [], common.drawing, (coordinate_image(90, 80), some_boxes(6, 80, least=40))
    monkeypatch.setattr(common, "drawing", lambda *key: keys.append(key) or drawing(*key))
    for augment in (AUGMENT, ("prm-erase", "soco-cutout", "soco-jitter"), ()):
        with drawing("image"):
            pair = [d3ssl.draw_views(item, SIZE, augment) for _ in range(2)]
            state = torch.get_rng_state()
        with drawing("image"):
            assert torch.randint(2**62, (2,)).ndim and torch.equal(state, torch.get_rng_state())
        assert len({*keys}) == len(keys) == 2 * 12  # crop, boxes, 2 x (colour, jitter, cut, mask), shift, cut of x3
        assert not any(torch.equal(a, b) for a, b in [*zip(*pair, strict=True)][: 8 if augment else 4])
        keys.clear()


@torch.no_grad()
@pytest.mark.parametrize("size", [112, 64])
def test_the_region_of_a_whole_view_is_torchvisions_resnet(size):
    """Eq. 1 with b = the view: RoIAlign then reads each cell of C4 at its centre, and nothing is left of it."""
    encoder, resnet = d3ssl.Encoder("resnet18").eval(), torchvision.models.resnet18().eval()
    for norm in (m for m in encoder.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        norm.running_mean.uniform_(-0.1, 0.1)
    resnet.load_state_dict(encoder.trunk.state_dict(), strict=False)
    resnet.fc = torch.nn.Identity()
    x, box = torch.randn(2, 3, size, size), torch.tensor([[[0.0, 0, size, size]]] * 2)
    features = lambda x, boxes: encoder.encode(x, boxes)[0]  # noqa: E731
    torch.testing.assert_close(features(x, box)[:, 0], resnet(x), rtol=1e-3, atol=1e-4)
    part = torch.tensor([[[0.0, 0, size / 2, size]]] * 2)  # another box: other features
    assert (features(x, part) - features(x, box)).abs().max() > 1e-2


def build(*flags):
    """A method whose teacher is no longer a copy of the student."""
    base = "--data scenes --arch resnet18 --size 64 --batch-size 6 --queue-size 20 --seed 1".split()
    method = d3ssl.build(d3ssl.get_args([*base, *flags]), torch.device("cpu"), None, total=10)
    with torch.no_grad():
        for p in method.key.parameters():
            p.mul_(1.05)
    return method


def test_heads():
    """Projectors and SoCo's predictor: widths, and a norm or none."""
    plain, soco, normed = build(), build("--framework", "soco"), build("--mlp-norm")
    widths = lambda m: [getattr(x, "out_features", type(x).__name__) for x in m]  # noqa: E731
    assert widths(plain.query.projector) == [512, "ReLU", 128]
    assert widths(normed.key.projector) == [512, "BatchNorm1d", "ReLU", 128]
    for mlp, inputs in ((soco.query.projector, 512), (soco.query.predictor, 256), (soco.key.projector, 512)):
        assert (mlp[0].in_features, *widths(mlp)) == (inputs, 4096, "BatchNorm1d", "ReLU", 256)
    assert [m.query.trunk.layer1[0].bn2.weight.unique().tolist() for m in (soco, normed)] == [[0], [1]]


@torch.no_grad()
@pytest.mark.parametrize("framework, groups", [("moco", [3, 3]), ("soco", [6])])
def test_batch_statistics_are_the_groups_own(framework, groups, monkeypatch):
    """Images in groups, regions with their images: each group alone gives the same (B15). SoCo: the whole batch."""
    monkeypatch.setattr(common, "GROUP", 4)
    encoder, drawn = build("--framework", framework, "--mlp-norm").query, batch_of(6)
    x, boxes = common.normalise(drawn.view_1), drawn.boxes_1
    (whole,) = encoder((x, boxes))
    for rows in torch.arange(6).split(groups):
        got = tuple(part[rows] for part in whole)
        torch.testing.assert_close(got, tuple(encoder.encode(x[rows], boxes[rows])), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("flags, m, terms, D", [
    ("", 0.999, 4, 128), ("--no-depositioning", 0.999, 2, 128),
    ("--framework soco", 0.9909549, 0, 256),  # step 2 of 10 on a cosine from 0.99 to 1
], ids=["d3ssl", "no-depositioning", "soco"])  # fmt: skip
def test_iteration_by_hand(flags, m, terms, D, monkeypatch):
    """Eqs. 2 to 10: who sees what, the teacher's step, the loss, the bank. One image has no proposals."""
    method, drawn = build(*flags.split()), batch_of(6, bare=1)
    before = {name: p.clone() for name, p in method.key.named_parameters()}
    bank = method.bank.vectors.clone() if terms else None
    students, teachers, forward = [], [], method.key.forward
    monkeypatch.setattr(method.key, "forward", lambda *views: teachers.append(views) or forward(*views))
    loss, values = method(lambda *views: students.append(views) or method.query(*views), drawn, 2)
    x1, x2 = ((v / 255 - MEAN) / STD for v in (drawn.view_1, drawn.view_2))
    hat_1, small = torch.where(drawn.keep_1[:, None], x1, 0), x2.view(6, 3, 32, 2, 32, 2).mean((3, 5))
    hat_2s = torch.where(drawn.keep_2[:, None], small, 0)
    order = torch.randperm(6, generator=common.generator("shuffle", 1, 2)) if terms else torch.arange(6)
    taught = (hat_1, drawn.boxes_1), (x2, drawn.boxes_2)  # Eq. 3: the augmented x1, the clean x2
    wanted = (hat_1, drawn.boxes_1), (hat_2s, drawn.boxes_2 / 2), *([x[order] for x in view] for view in taught)
    for pair in zip((*students[0][:2], *teachers[0]), wanted, strict=True):
        torch.testing.assert_close(*map(list, pair), rtol=1e-5, atol=1e-5)
    assert len(students) == len(teachers) == 1 and len(students[0]) == 2 + (terms == 4)
    student = dict(method.query.named_parameters())
    for name, p in method.key.named_parameters():  # it follows, then it encodes
        torch.testing.assert_close(p, m * before[name] + (1 - m) * student[name], rtol=1e-6, atol=1e-9)
    assert {name.split(".")[0] for name in student.keys() - before.keys()} == (set() if terms else {"predictor"})  # D39
    with torch.no_grad():
        z_s, (t1, t2) = [z for _, z in method.query(*students[0])], [z for _, z in method.key(*taught)]

    unit = lambda z: F.normalize(z, dim=2).flatten(0, 1)  # noqa: E731

    def compare(z, positive):
        if not terms:
            return -2 * F.cosine_similarity(z, positive, dim=2).mean()
        logits = torch.cat([(unit(z) * unit(positive)).sum(1, keepdim=True), unit(z) @ bank.T], 1) / 0.2
        return F.cross_entropy(logits, torch.zeros(24, dtype=torch.int64))

    dc = compare(z_s[0], t2) + compare(z_s[1], t1)
    dp = compare(z_s[2], t2) + compare(z_s[2], t1) if terms == 4 else torch.zeros(())
    assert [values["loss_dc"].item(), loss.item()] == pytest.approx([dc.item(), (dc + dp).item()], rel=1e-3)
    assert values["std"].item() == pytest.approx(unit(t1).std(0, correction=0).mean().item(), rel=1e-3)
    plain = {name: x for name, x in values.items() if not torch.is_tensor(x)}  # a log takes them as they are
    assert plain == pytest.approx({"std_spread": D**-0.5} | ({"loss_chance": terms * math.log(21)} if terms else {}))
    if terms:  # 24 regions into a bank of 20: the last 20, oldest overwritten first
        stored = torch.cat([unit(t1)[20:], unit(t1)[4:20]])
        torch.testing.assert_close(method.bank.vectors, stored, rtol=1e-3, atol=1e-4)
    loss.backward()
    assert all(p.grad is None and not p.requires_grad for p in method.key.parameters())


@pytest.mark.parametrize("group", [32, 4])
def test_x3_is_composed_on_another_images_x2(group, monkeypatch):
    """... of the same group, each on another one. Over the steps on any."""
    monkeypatch.setattr(common, "GROUP", group)
    method, drawn, seen, of_first = build(), batch_of(6), [], set()
    monkeypatch.setattr(method, "teach", lambda step, *views: torch.randn(2, 6, 4, 128))
    x2, groups = common.normalise(drawn.view_2), torch.arange(6).tensor_split(math.ceil(6 / group))
    for step in range(30):
        method(lambda *views: seen.append(views[2]) or [(None, torch.randn(6, 4, 128))] * 3, drawn, step)
        x3, boxes = seen[step]
        same = ((x3[:, None] == x2) | drawn.mask_3[:, None, None]).flatten(2).all(2)  # (B, B), whose x2 the holes show
        other = same.int().argmax(1)
        assert (same.sum(1) == 1).all() and not same.diagonal().any()
        assert all({*other[rows].tolist()} == {*rows.tolist()} for rows in groups)
        assert torch.equal(x3, d3ssl.compose(x2, drawn.shift, drawn.mask_3, x2[other]))
        assert torch.equal(boxes, drawn.boxes_2 + drawn.shift.repeat(1, 2)[:, None])
        of_first.add(int(other[0]))
    assert of_first == {*groups[0].tolist()} - {0}


def test_health_values_against_a_count():
    drawn, stuck = batch_of(6), torch.tensor([10.0, 10, 40, 40]).repeat(6, 4, 1)
    stuck[2] = torch.tensor([3.0, 8, SIZE - 12, SIZE - 7])  # 15 pixels of play along both axes: less than a cell
    stuck[3] = torch.tensor([3.0, 8, SIZE - 13, SIZE - 7])  # 16 along x
    drawn = drawn._replace(boxes_2=stuck, found=torch.tensor([4, 0, 3, 4, 1, 0]))
    z = F.normalize(torch.randn(500, 4, 8), dim=2)
    values = {name: float(value) for name, value in d3ssl.health(drawn, z).items()}
    shift = np.mean([math.hypot(*t) for t in drawn.shift.tolist()])
    want = {"proposals": 2, "empty": 2 / 6, "stuck": 1 / 6, "shift": shift, "std_spread": 8**-0.5}
    assert values == pytest.approx(want | {"std": z.numpy().reshape(2000, 8).std(0).mean()}, rel=1e-5)


@pytest.mark.parametrize("framework, name", [("moco", "region_contrastive_loss"), ("soco", "region_cosine_loss")])
def test_losses_and_bank_stay_in_fp32_under_amp(framework, name, monkeypatch):
    method, seen, outputs, loss = build("--amp", "bf16", "--framework", framework), set(), set(), getattr(d3ssl, name)

    def watch(*args, **more):
        seen.update((x.dtype, torch.is_autocast_enabled("cpu")) for x in (*args, more.get("bank", args[0])))
        return loss(*args, **more)

    monkeypatch.setattr(d3ssl, name, watch)
    for network in (method.query, method.key):
        network.projector.register_forward_hook(lambda m, i, out: outputs.add(out.dtype))
    assert method(method.query, batch_of(6), 0)[0].dtype == torch.float32
    assert seen == {(torch.float32, False)} and outputs == {torch.bfloat16}


def test_measure_compares_the_student_in_x1_with_the_teacher_in_x2(monkeypatch):
    """Repeated boxes are no regions of their own."""
    drawn = batch_of(4, bare=1)._replace(found=torch.tensor([0, 4, 3, 1]))
    monkeypatch.setattr(look, "found_again", lambda *a: a)
    see = lambda sign: lambda view: [(sign * view[1] + view[0].mean((1, 2, 3))[:, None, None], None)]  # noqa: E731
    found = d3ssl.D3SSL.measure(SimpleNamespace(query=see(1), key=see(-1)), *drawn)
    light = [common.normalise(view).mean((1, 2, 3))[:, None, None] for view in (drawn.view_1, drawn.view_2)]
    assert torch.equal(found[0], drawn.boxes_1 + light[0]) and torch.equal(found[1], light[1] - drawn.boxes_2)
    assert found[2].tolist() == [[False] * 4, [True] * 4, [True] * 3 + [False], [True] + [False] * 3]


@torch.no_grad()
@pytest.mark.parametrize("flags", ["", "--framework soco"])
def test_picture_shows_what_the_networks_compare(flags, monkeypatch):
    """The views as the networks get them, x3's mask, and cosines of the student's x3 (else x2-s) and the teacher's x2."""
    method, drawn, seen = build(*flags.split()), batch_of(6), []
    monkeypatch.setattr(look, "draw_regions", lambda *a: seen.append(a))
    method.draw("x.png", *drawn)
    ((path, views, mask, similarity),) = seen
    inputs = d3ssl.network_inputs(drawn, d3ssl.other_images(6, 32, 0.5))
    assert path == "x.png" and [title.split(",")[0] for title in views] == ["x1", "x2", "x2-s", "x3"][: len(views)]
    for given, want in zip(views.values(), inputs[: 3 if flags else 4], strict=True):
        assert all(torch.equal(*pair) for pair in zip(given, want, strict=True))
    assert mask is (None if flags else drawn.mask_3)
    ((_, student),), ((_, teacher),) = method.query(inputs.x2_s if flags else inputs.x3), method.key(inputs.x2)
    want = F.cosine_similarity(student[:, :, None], teacher[:, None], dim=3)
    torch.testing.assert_close(similarity, want, rtol=0, atol=1e-3)


def test_picture_shows_each_view_with_its_boxes_and_the_mask(tmp_path):
    """Plain views: the panels' colours, the colours of the boxes at their edges, the mask, the similarities."""
    side, gap, mask = 224, 6, torch.arange(88).view(1, 88, 1).expand(8, 88, 88) >= 44
    shades = dict(x1=(51, 88), x2=(102, 88), x2_s=(153, 44), x3=(204, 88))
    corners, views = torch.tensor([[20.0, 30, 40, 70], [50, 10, 70, 30]]) / 88, {}
    for i, (name, (shade, size)) in enumerate(shades.items()):
        views[name] = ((shade / 255 - MEAN) / STD).expand(8, 3, size, size), (corners * size + i).expand(8, 2, 4)
    similarity = torch.tensor([[0.9, 0.1], [0.3, 0.5]]).expand(8, 2, 2)
    look.draw_regions(tmp_path / "x.png", views, mask, similarity)
    sheet = Image.open(tmp_path / "x.png")
    assert sheet.size == (6 * (side + gap) + gap, 6 * (side + gap) + 20)  # six images of any batch
    at = lambda column, x, y: sheet.getpixel((gap + column * (side + gap) + int(x), 20 + int(y)))  # noqa: E731
    for column, (name, (shade, size)) in enumerate(shades.items()):
        for (x0, y0, x1, y1), colour in zip((views[name][1][0] * side / size).tolist(), look.COLOURS, strict=False):
            x, y = (x0 + x1) / 2, (y0 + y1) / 2
            assert {at(column, *edge) for edge in ((x0, y), (x1 - 1, y), (x, y0), (x, y1 - 1))} == {colour}, name
            assert {at(column, *place) for place in ((x0 - 3, y0 - 3), (x, y), (215, 215))} == {(shade,) * 3}, name
    assert at(4, 112, 105) == (0, 0, 0) and at(4, 112, 119) == (255, 255, 255)
    brightness = [sum(at(5, x, y)[:2]) for y in (56, 168) for x in (56, 168)]
    assert np.argsort(brightness).tolist() == [1, 2, 3, 0]  # rows: the student's regions


def test_boxes_belong_to_the_image_that_is_read(tmp_path, monkeypatch):
    """By name, also of a part of the images; with the boxes of the neighbour that takes an unreadable image's place."""
    monkeypatch.setattr(proposals, "search", lambda image, strategy: np.array([[0, 0, image.width, 40]]))
    folder, out = write_images(tmp_path / "images", 0), str(tmp_path / "boxes")
    for i, width in enumerate((90, 50, 60, 70, 80)):
        Image.new("RGB", (width, 60)).save(folder / f"{i}.png")
    proposals.make(images.open_images(str(folder), 0, 0), out)
    (folder / "0.png").unlink()
    data = proposals.WithProposals(images.open_images(str(folder), 0, 0), proposals.Proposals(out))
    assert sorted(data.probe(i)[0].width for i in range(4)) == [50, 60, 70, 80]  # each image is measured once
    (folder / "2.png").write_bytes(b"torn")
    for index, width in enumerate((50, 70, 70, 80)):
        (image, boxes), passed = data[index]
        assert image.width == width and boxes.tolist() == [[0, 0, width, 40]] and boxes.dtype == torch.float32
        assert passed == (index == 1)
    assert data.images.fingerprint() in data.fingerprint() and "5 boxes" in data.fingerprint()
    scenes = images.Scenes(7, 48, 3)
    image, boxes = proposals.WithProposals(scenes, SimpleNamespace(check=lambda images: None)).probe(2)
    scene = scenes.scene(9)  # beyond the seven that are trained on
    assert np.array_equal(np.asarray(image), scene["image"]) and boxes.tolist() == scene["boxes"].tolist()


DEFAULTS = dict(
    framework="moco", augment=["prc", "prm", "rbj"], depositioning=True, temperature=0.2, queue_size=None, ema=0.999,
    mlp_norm=False, arch="resnet50", size=224, epochs=800, batch_size=256, lr=0.3, amp="none", demo=False,
)  # fmt: skip
SOCO = dict(framework="soco", augment=["soco-cutout"], depositioning=False, ema=0.99, mlp_norm=True)
DEMO = dict(demo=True, arch="resnet18", size=136, batch_size=64, epochs=2, lr=0.15, ema=0.9, temperature=0.1)


@pytest.mark.parametrize("fast", [False, True])
def test_defaults_and_presets(fast, monkeypatch):
    """What stands on the command line wins, a default of the bare command too. Nothing else changes."""
    monkeypatch.setattr(d3ssl, "bf16_is_fast", lambda: fast)
    demo = DEMO | {"mlp_norm": True, "amp": "bf16" if fast else "none"}
    changes = {"": {}, "--framework soco": SOCO, "--demo": demo, "--demo --framework soco": demo | SOCO}
    given, words = dict(ema=0.999, size=224, mlp_norm=False), " --ema 0.999 --size 224 --no-mlp-norm "
    for flags, changed in changes.items():
        for line, more in ((flags, {}), (flags + words, given), (words + flags, given)):
            found = vars(d3ssl.get_args(["--data", "x", "--proposals", "y", *line.split()]))
            assert {name: found[name] for name in DEFAULTS} == DEFAULTS | changed | more
    args = d3ssl.get_args(["--demo"])
    assert (args.data, args.proposals) == ("scenes:2048", None)
    assert d3ssl.get_args("--demo --augment rbj prc rbj".split()).augment == ["prc", "rbj"]  # in any order
    assert (d3ssl.BOXES, d3ssl.DIM, d3ssl.CELL, common.GROUP) == (4, 128, 16, 32)


REFUSED = {
    "--demo --size 225": "--size 225: must be even and at least 64",
    "--demo --size 62": "--size 62: must be even and at least 64",
    "--data x --proposals y --framework soco --depositioning": "--depositioning is a loss of D3SSL",
    "--demo --temperature 0": "argument --temperature: 0: must be at least 0.001",
    "--demo --augment rbj prc soco-cutout": "--augment prc soco-cutout: one takes the place of the other",
    "--demo --augment prm-erase prm": "--augment prm prm-erase: one takes the place of the other",
    "--demo --framework soco --augment soco-jitter rbj": "--augment rbj soco-jitter: one takes the place of the other",
}


@pytest.mark.parametrize("flags", REFUSED)
def test_settings_that_make_no_sense(flags, capsys):
    assert refused(capsys, d3ssl.get_args, flags).startswith(REFUSED[flags])


def test_socos_momentum_rises_over_the_schedule_and_not_over_a_start(photos, tiny_resnet, quick, tmp_path, monkeypatch):
    """Also: the views are augmented as the flags say, those that are measured are not."""
    momenta, views, update, steps = [], [], common.momentum_update, Run.steps
    monkeypatch.setattr(common, "momentum_update", lambda key, query, m: momenta.append(m) or update(key, query, m))
    monkeypatch.setattr(Run, "steps", lambda run, *a: views.extend(a) or steps(run, *a))
    monkeypatch.setattr(Run, "measure", lambda *_: None)
    flags = f"--data {photos}/images --proposals {photos}/boxes --arch resnet18 --batch-size 6 --epochs 3 --workers 0"
    flags += f" --framework soco --size 96 --augment prm soco-jitter --output-dir {tmp_path}"
    for part in ("--steps 2", ""):
        d3ssl.train(f"{flags} {part}".split())
    rising = [1 - 0.01 * (math.cos(math.pi * step / 6) + 1) / 2 for step in range(6)]
    assert momenta[::2] == momenta[1::2] == pytest.approx(rising)  # trunk and projector
    item = Image.new("RGB", (90, 70)), torch.tensor([[5.0, 5, 60, 65], [20, 10, 80, 60]])
    for function, augment in zip(views, (["prm", "soco-jitter"], []) * 2, strict=True):
        for i in range(5):
            got, want = by(i, function, item), by(i, d3ssl.draw_views, item, size=96, augment=augment)
            assert all(torch.equal(*pair) for pair in zip(got, want, strict=True))
