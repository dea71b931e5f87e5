"""setsim.py: views, matcher, losses and one iteration, each against something independent."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import LargestTensor, coordinate_image, lifted
from PIL import Image

import common
import setsim
from harness import look

# ----------------------------------------------------------------------------------------------------------------------
# views and geometry
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_colours(monkeypatch):
    """Colour operations would change coordinates that are written in colours; crop, resize and flip stay real."""
    monkeypatch.setattr(setsim.transforms, "ColorJitter", lambda *_: lambda image: image)
    monkeypatch.setattr(setsim.TF, "rgb_to_grayscale", lambda image, _: image)
    monkeypatch.setattr(
        setsim.ImageFilter, "GaussianBlur", lambda _: setsim.ImageFilter.Kernel((3, 3), [0] * 4 + [1] + [0] * 4)
    )


def cell_contents(view, cells):
    """The mean colour of each cell of a view, as the place (x, y) in the image: (S, 2)."""
    size = view.shape[1] // cells
    places = view[:2].float().unfold(1, size, size).unfold(2, size, size).mean((3, 4)) / 256 + 0.5 / 256
    return places.flatten(1).T


def test_windows_say_where_every_cell_lies(no_colours):
    image, flips = coordinate_image(), []
    for i in range(40):
        with common.drawing("test", i):
            view, window = setsim.random_view(image, 224)
        centres, diagonal = setsim.cell_centres(window[None], 7, 7)
        assert (centres[0] - cell_contents(view, 7)).abs().max() < 0.012  # three pixels of 256, a cell is 16 at least
        assert diagonal[0] > 0
        flips.append(bool(window[0] > window[2]))
    assert 10 < sum(flips) < 30


def test_matched_cells_show_the_same_place(no_colours):
    image, checked, kinds = coordinate_image(), 0, set()
    for i in range(60):
        with common.drawing("pair", i):
            view_q, view_k, window_q, window_k = setsim.two_views(image, 224)
        near = setsim.geometry_pairs(window_q[None], window_k[None], 7, 7, 0.5)[0]
        place_q, place_k = cell_contents(view_q, 7), cell_contents(view_k, 7)
        side_q = (place_q[8] - place_q[0]).abs()
        side_k = (place_k[8] - place_k[0]).abs()
        limit = 0.5 * max(side_q.norm(), side_k.norm())
        distance = torch.cdist(place_q, place_k)
        sure = (distance - limit).abs() > 0.02  # the colours' rounding
        assert torch.equal(near[sure], distance[sure] < limit)
        checked += near.sum().item()
        kinds.add((bool(window_q[0] > window_q[2]), bool(window_k[0] > window_k[2])))
    assert checked > 500 and len(kinds) == 4  # neither, one, the other and both views flipped


def test_geometry_of_identical_flipped_and_disjoint_views():
    view, mirror = torch.tensor([[0.1, 0.2, 0.5, 0.6]]), torch.tensor([[0.5, 0.2, 0.1, 0.6]])
    identity = torch.eye(49, dtype=torch.bool)[None]
    assert torch.equal(setsim.geometry_pairs(view, view, 7, 7, 0.7), identity)
    assert torch.equal(setsim.geometry_pairs(mirror, mirror, 7, 7, 0.5), identity)
    wide = torch.tensor([[0.0, 0.0, 1.0, 0.4]])  # in image fractions the cells are 2.5 times as wide as high
    assert setsim.geometry_pairs(wide, wide, 7, 7, 0.5).sum() == 49 + 2 * 7 * 6  # ... so vertical neighbours are near
    mirrored = identity.view(7, 7, 7, 7).flip(3).reshape(1, 49, 49)
    assert torch.equal(setsim.geometry_pairs(view, mirror, 7, 7, 0.5), mirrored)
    assert not setsim.geometry_pairs(view, torch.tensor([[0.6, 0.2, 0.9, 0.6]]), 7, 7, 0.5).any()
    # PixPro's numbers on a square: 0.72 takes in the four direct neighbours (217 = 49 + 2 * 84)
    assert setsim.geometry_pairs(view, view, 7, 7, 0.72).sum() == 217


def test_geometry_against_a_double_loop():
    generator = torch.Generator().manual_seed(0)
    windows = torch.rand(2, 6, 4, generator=generator, dtype=torch.float64)
    got = setsim.geometry_pairs(windows[0], windows[1], 4, 5, 0.8)
    for b in range(6):
        (ax, ay, bx, by), (cx, cy, dx, dy) = windows[0, b].tolist(), windows[1, b].tolist()
        limit = 0.8 * max(math.hypot((bx - ax) / 5, (by - ay) / 4), math.hypot((dx - cx) / 5, (dy - cy) / 4))
        for i, j in itertools.product(range(20), range(20)):
            x = ax + (i % 5 + 0.5) * (bx - ax) / 5 - cx - (j % 5 + 0.5) * (dx - cx) / 5
            y = ay + (i // 5 + 0.5) * (by - ay) / 4 - cy - (j // 5 + 0.5) * (dy - cy) / 4
            assert got[b, i, j].item() == (math.hypot(x, y) < limit)


def test_views_follow_the_recipe():
    """Shares and ranges of section 4's MoCo-v2 recipe over many draws: crop area, aspect, flip."""
    image, windows = Image.new("RGB", (400, 400)), []
    for i in range(600):
        with common.drawing("recipe", i):
            windows.append(setsim.random_view(image, 32)[1])
    x0, y0, x1, y1 = torch.stack(windows).double().T
    area, aspect = (x1 - x0).abs() * (y1 - y0), (x1 - x0).abs() / (y1 - y0)
    assert 0.195 < area.min() < 0.25 and area.max() <= 1 and abs(area.mean() - 0.58) < 0.04
    assert 0.74 < aspect.min() and aspect.max() < 1.35 and aspect.min() < 0.8 and aspect.max() > 1.25
    assert abs((x0 > x1).double().mean() - 0.5) < 0.07


def record_operations(monkeypatch):
    """The list that the names of the operations on colours, and of the flip, go into. No colour changes."""
    seen = []
    note = lambda name: lambda image, *_: seen.append(name) or image  # noqa: E731
    monkeypatch.setattr(setsim.TF, "hflip", note("flip"))
    monkeypatch.setattr(setsim.TF, "rgb_to_grayscale", note("grey"))
    monkeypatch.setattr(setsim.transforms, "ColorJitter", lambda *strength: note(f"jitter {strength}"))
    monkeypatch.setattr(
        Image.Image, "filter", lambda image, blur: seen.append(f"blur {0.1 <= blur.radius <= 2}") or image
    )
    return seen


OPERATIONS = {"jitter (0.4, 0.4, 0.4, 0.1)": 0.8, "grey": 0.2, "blur True": 0.5, "flip": 0.5}  # and their shares


def test_colour_operations_in_their_order(monkeypatch):
    seen = record_operations(monkeypatch)
    monkeypatch.setattr(setsim.torch, "rand", lambda *_: torch.tensor(0.0))  # every operation happens
    setsim.random_view(Image.new("RGB", (8, 8)), 8)
    assert seen == list(OPERATIONS)


def test_colour_operations_in_their_shares(monkeypatch):
    seen = record_operations(monkeypatch)
    for i in range(600):
        with common.drawing("shares", i):
            setsim.random_view(Image.new("RGB", (8, 8)), 8)
    assert {name: seen.count(name) / 600 for name in OPERATIONS} == pytest.approx(OPERATIONS, abs=0.06)  # 3 sigma


# ----------------------------------------------------------------------------------------------------------------------
# matcher
# ----------------------------------------------------------------------------------------------------------------------


def test_attention_on_a_worked_example():
    z = torch.tensor([[[1.0, 0.0, 3.0], [1.0, -1.0, 1.0]]])  # two channels, three cells
    assert torch.allclose(setsim.attention_map(z), torch.tensor([[(2 - 1) / 3, 0, 1]]))  # sums 2, 1, 4
    square = torch.tensor([[(1 - 0.5) / 4.5, 0, 1]])  # means of squares 1, 0.5, 5
    assert torch.allclose(setsim.attention_map(z, square=True), square)
    assert setsim.threshold_set(setsim.attention_map(z), 0.7).tolist() == [[False, False, True]]
    assert setsim.threshold_set(setsim.attention_map(z), 0.3).tolist() == [[True, False, True]]


def test_threshold_at_its_ends():
    A = setsim.attention_map(torch.rand(4, 8, 25, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(setsim.threshold_set(A, 1.0), A == A.amax(1, keepdim=True))
    assert setsim.threshold_set(A, 0.0).all()


@pytest.mark.parametrize("percent, count", [(1, 1), (10, 5), (30, 15), (50, 25), (90, 44), (100, 49)])
def test_ratio_takes_the_highest_cells(percent, count):
    A = torch.rand(3, 49, generator=torch.Generator().manual_seed(0))
    for mask, values in zip(setsim.ratio_set(A, percent), A.tolist(), strict=True):
        assert mask.nonzero()[:, 0].tolist() == sorted(sorted(range(49), key=lambda i, v=values: -v[i])[:count])


def test_ratio_ties_go_by_index():
    A = torch.tensor([[0.5, 1.0, 0.5, 0.5, 0.0, 0.5, 0.5, 0.5, 0.5, 0.5]])
    assert setsim.ratio_set(A, 30).nonzero()[:, 1].tolist() == [0, 1, 2]


def test_a_map_without_contrast_selects_nothing():
    z = torch.stack([torch.ones(3, 4), torch.arange(12.0).view(3, 4)])
    A = setsim.attention_map(z)
    for chosen in (setsim.threshold_set(A, 0.7), setsim.threshold_set(A, 0.0), setsim.ratio_set(A, 30)):
        assert not chosen[0].any() and chosen[1].any()
    similarity = torch.rand(2, 4, 4)
    flat, peaked = setsim.threshold_set(A, 0.7)
    for one, other in ((0, 1), (1, 0)):
        sets, attention = [(flat, peaked)[i][None] for i in (one, other)], [A[i][None] for i in (one, other)]
        assert not setsim.set_to_set(*sets, similarity[:1], 0.0, nearest=True).any()
        for kind in setsim.PIXEL_MATCHERS:
            assert not setsim.one_to_one(kind, *sets, *attention, similarity[:1]).any()


def test_cosine_similarity_against_a_loop():
    z_q, z_k = torch.rand(2, 2, 6, 5, generator=torch.Generator().manual_seed(1))
    got = setsim.cosine_similarity(z_q, z_k)
    for b, i, j in itertools.product(range(2), range(5), range(5)):
        u, v = z_q[b, :, i], z_k[b, :, j]
        assert got[b, i, j].item() == pytest.approx((u @ v / u.norm() / v.norm()).item(), abs=1e-6)


def loop_set_to_set(set_q, set_k, similarity, mu, nearest, official, geometry):
    """Eqs. 5-7 word by word, with Python sets, for one image."""
    S, rows = len(set_q), []
    for i in range(S):
        row = set()
        if set_q[i]:
            a = {j for j in range(S) if set_k[j]}
            u = {j for j in a if (similarity[i][j] < mu if official else similarity[i][j] <= mu)}
            row |= a - u
        if geometry is not None:
            row |= {j for j in range(S) if geometry[i][j]}
        if nearest and (row or (set_q[i] and not official)):
            row |= {max(range(S), key=lambda j, i=i: similarity[i][j])}
        rows.append(row)
    return rows


@pytest.mark.parametrize("nearest", [False, True])
@pytest.mark.parametrize("official", [False, True])
@pytest.mark.parametrize("mu", [-1.0, 0.0, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("geometry", [False, True])
def test_set_to_set_against_a_double_loop(nearest, official, mu, geometry):
    rng = torch.Generator().manual_seed(3)
    set_q, set_k = torch.rand(2, 8, 9, generator=rng) > 0.6
    set_k[:, 4] = True
    similarity = torch.randint(-4, 5, (8, 9, 9), generator=rng) / 4 + torch.rand(8, 9, 9, generator=rng) * 1e-3
    similarity[:, :, 2] = similarity[:, :, 2].round(decimals=1)  # exact 0 and 0.5 among them
    similarity[:, 1] = mu - 0.1  # a row that mu empties
    similarity[:, 1, 7] = mu  # ... but for the value mu itself
    place = torch.rand(8, 9, 9, generator=rng) > 0.9 if geometry else None
    got = setsim.set_to_set(set_q, set_k, similarity, mu, nearest, place, official)
    for b in range(8):
        where = None if place is None else place[b].tolist()
        want = loop_set_to_set(set_q[b], set_k[b], similarity[b].tolist(), mu, nearest, official, where)
        assert [set(row.nonzero()[:, 0].tolist()) for row in got[b]] == want


def test_mu_of_zero_removes_only_orthogonal_pairs():
    """Maps after a ReLU have no negative cosines: the text's mu = 0 fires for exactly orthogonal features alone."""
    z = torch.tensor([[[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]]])
    everything = torch.ones(1, 3, dtype=torch.bool)
    c = setsim.set_to_set(everything, everything, setsim.cosine_similarity(z, z), 0.0, nearest=False)
    assert (~c[0]).nonzero().tolist() == [[0, 1], [1, 0]]
    z = torch.rand(4, 16, 9).relu() + 0.01
    everything = torch.ones(4, 9, dtype=torch.bool)
    assert setsim.set_to_set(everything, everything, setsim.cosine_similarity(z, z), 0.0, nearest=False).all()


def pixel_case():
    rng = torch.Generator().manual_seed(5)
    A_q, A_k = torch.rand(2, 4, 16, generator=rng)
    similarity = torch.rand(4, 16, 16, generator=rng)
    return A_q, A_k, setsim.ratio_set(A_q, 30), setsim.ratio_set(A_k, 30), similarity


def assert_one_to_one(c, set_q, set_k):
    assert torch.equal(c.any(2), set_q) and torch.equal(c.any(1), set_k)
    assert (c.sum(2) <= 1).all() and (c.sum(1) <= 1).all()


def test_random_pairs():
    A_q, A_k, set_q, set_k, similarity = pixel_case()
    draws = [
        setsim.one_to_one("random", set_q, set_k, A_q, A_k, similarity, torch.Generator().manual_seed(seed))
        for seed in (0, 0, *range(1, 300))
    ]
    for c in draws:
        assert_one_to_one(c, set_q, set_k)
    assert torch.equal(draws[0], draws[1])
    share = torch.stack(draws).float().mean(0)[set_q[:, :, None] & set_k[:, None, :]]  # five cells: 1/5 each
    assert share.min() > 0.1 and share.max() < 0.3


def test_sorted_pairs_against_python_sort():
    A_q, A_k, set_q, set_k, similarity = pixel_case()
    c = setsim.one_to_one("sort", set_q, set_k, A_q, A_k, similarity)
    assert_one_to_one(c, set_q, set_k)
    for b in range(4):
        order_q = sorted(set_q[b].nonzero()[:, 0].tolist(), key=lambda i, b=b: -A_q[b, i])
        order_k = sorted(set_k[b].nonzero()[:, 0].tolist(), key=lambda i, b=b: -A_k[b, i])
        assert all(c[b, i, j] for i, j in zip(order_q, order_k, strict=True))


def test_hungarian_finds_the_optimum():
    A_q, A_k, set_q, set_k, similarity = pixel_case()
    c = setsim.one_to_one("hungarian", set_q, set_k, A_q, A_k, similarity)
    assert_one_to_one(c, set_q, set_k)
    for b in range(4):
        i, j = set_q[b].nonzero()[:, 0].tolist(), set_k[b].nonzero()[:, 0].tolist()
        best = max(
            sum(similarity[b, p, q].item() for p, q in zip(i, order, strict=True))
            for order in itertools.permutations(j)
        )
        assert similarity[b][c[b]].sum().item() == pytest.approx(best, abs=1e-5)


def match_case():
    """Maps with cosines on both sides of 0 and 0.2, and windows, of three images with 4 x 5 cells."""
    rng = torch.Generator().manual_seed(7)
    return *torch.randn(2, 3, 6, 4, 5, generator=rng), *torch.rand(2, 3, 4, generator=rng)


def test_every_matcher_through_the_front_door():
    """`match` hands each matcher the right tensors: the results equal direct calls on the same features."""
    z_q, z_k, window_q, window_k = match_case()

    def found(matcher, rule="30%", geometry=None, official=False):
        rng = torch.Generator().manual_seed(1)
        return setsim.match(z_q, z_k, window_q, window_k, matcher, rule, geometry, official, rng)

    similarity = setsim.cosine_similarity(z_q.flatten(2), z_k.flatten(2))
    place = setsim.geometry_pairs(window_q, window_k, 4, 5, 0.9)
    for official, mu in ((False, 0.0), (True, 0.2)):  # S4
        A = [setsim.attention_map(z.flatten(2), square=official) for z in (z_q, z_k)]
        sets = [setsim.ratio_set(a, 30) for a in A]
        large = [setsim.threshold_set(a, 0.5) for a in A]
        rng = torch.Generator().manual_seed(1)
        want = {kind: setsim.one_to_one(kind, *sets, *A, similarity, rng) for kind in setsim.PIXEL_MATCHERS}
        for matcher, nearest in (("set2set", False), ("set2set-nn", True)):
            want[matcher] = setsim.set_to_set(*sets, similarity, mu, nearest, None, official)
            joined = setsim.set_to_set(*large, similarity, mu, nearest, place, official)
            assert torch.equal(found(matcher, "0.5", 0.9, official).positives, joined)
        for matcher, c in want.items():
            got = found(matcher, official=official)
            assert torch.equal(got.positives, c), matcher
            assert torch.equal(got.similarity, similarity)
            assert all(torch.equal(*pair) for pair in zip(got.attention + got.sets, A + sets, strict=True))
        everything = found("set2set", "0", official=official).positives
        assert torch.equal(everything, similarity >= mu if official else similarity > mu)
    assert 10 < ((0 < similarity) & (similarity < 0.2)).sum()  # pairs that the two values of mu judge differently
    assert {*want, "geometry", "densecl"} == set(setsim.MATCHERS)


@pytest.mark.parametrize("official", [False, True])
def test_densecl_and_geometry_through_the_front_door(official):
    """Neither needs a set: of every cell the arg-max over all cells, or the cells at the same place."""
    z_q, z_k, window_q, window_k = match_case()
    window_q[2] = window_k[2]  # one image whose views show the same window

    def found(matcher, geometry=None, rule="0.7"):
        return setsim.match(z_q, z_k, window_q, window_k, matcher, rule, geometry, official).positives

    similarity = setsim.cosine_similarity(z_q.flatten(2), z_k.flatten(2)).tolist()
    for densecl in (found("densecl"), found("densecl", 0.5), found("densecl", rule="30%")):
        for b, i in itertools.product(range(3), range(20)):
            assert densecl[b, i].nonzero()[:, 0].tolist() == [max(range(20), key=similarity[b][i].__getitem__)]
    for geometry, T in ((None, 0.5), (0.5, 0.5), (0.9, 0.9)):  # 0.5 where none is given (S12)
        assert torch.equal(found("geometry", geometry), setsim.geometry_pairs(window_q, window_k, 4, 5, T))
    assert found("geometry").any() and not torch.equal(found("geometry"), found("geometry", 0.9))


def test_correspondence_accuracy_on_known_answers():
    window = torch.tensor([[0.0, 0.0, 0.8, 0.8]])
    same = torch.eye(25)[None]
    assert look.correspondence(same, window, window, 5, 5) == (25, pytest.approx(169 / 25), 25)
    mirror = torch.tensor([[0.8, 0.0, 0.0, 0.8]])
    flipped = same.view(1, 5, 5, 5, 5).flip(4).reshape(1, 25, 25)
    assert look.correspondence(flipped, window, mirror, 5, 5)[::2] == (25, 25)
    assert look.correspondence(same, window, mirror, 5, 5)[0] == 5  # the middle column
    shifted = torch.tensor([[0.32, 0.0, 1.12, 0.8]])  # two columns further right: three of five columns remain
    right = torch.zeros(5, 5, 5, 5)
    for y, x in itertools.product(range(5), range(2, 5)):
        right[y, x, y, x - 2] = 1
    hits, _, count = look.correspondence(right.view(1, 25, 25), window, shifted, 5, 5)
    assert (hits, count) == (15, 15)
    both = [torch.cat([a, b]) for a, b in ((same, flipped), (window, window), (window, mirror))]
    assert look.correspondence(*both, 5, 5) == (50, pytest.approx(2 * 169 / 25), 50)  # sums over images


# ----------------------------------------------------------------------------------------------------------------------
# losses
# ----------------------------------------------------------------------------------------------------------------------


def loss_case(B=4, S=6, D=5, K=11, seed=0):
    rng = torch.Generator().manual_seed(seed)
    p_q, p_k = F.normalize(torch.randn(2, B, S, D, generator=rng, dtype=torch.float64), dim=3)
    queue = F.normalize(torch.randn(K, D, generator=rng, dtype=torch.float64), dim=1)
    positives = torch.rand(B, S, S, generator=rng) > 0.6
    positives[0, 1] = False  # an empty row
    positives[2] = False  # an image without rows
    return p_q.requires_grad_(), p_k, positives, queue


def loop_set_loss(p_q, p_k, positives, queue, tau):
    """Eq. 8, term by term, with the averages of S9, S10."""
    images = []
    for b in range(len(p_q)):
        rows = []
        for i in range(p_q.shape[1]):
            c = [j for j in range(p_q.shape[1]) if positives[b, i, j]]
            if not c:
                continue
            denominator = sum(torch.exp(p_q[b, i] @ p_k[b, j] / tau) for j in c)
            denominator = denominator + sum(torch.exp(p_q[b, i] @ k / tau) for k in queue)
            rows.append(-sum(torch.log(torch.exp(p_q[b, i] @ p_k[b, j] / tau) / denominator) for j in c) / len(c))
        images.append(sum(rows) / len(rows) if rows else torch.zeros((), dtype=torch.float64))
    return sum(images) / len(images)


def test_set_loss_against_eq_8_value_and_gradient():
    p_q, p_k, positives, queue = loss_case()
    fast = setsim.set_contrastive_loss(p_q, p_k, positives, queue, 0.2)
    slow = loop_set_loss(p_q, p_k, positives, queue, 0.2)
    torch.testing.assert_close(fast, slow, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(loss, p_q)[0] for loss in (fast, slow)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)
    assert gradients[0].abs().max() > 1e-3


def test_one_positive_a_row_is_densecls_cross_entropy():
    p_q, p_k, _, queue = loss_case(B=3)
    match = torch.randint(0, 6, (3, 6), generator=torch.Generator().manual_seed(2))
    loss = setsim.set_contrastive_loss(p_q, p_k, F.one_hot(match, 6).bool(), queue, 0.2)
    positive = (p_q * p_k.gather(1, match[:, :, None].expand(-1, -1, 5))).sum(2).view(-1, 1)
    logits = torch.cat([positive, p_q.flatten(0, 1) @ queue.T], 1) / 0.2
    torch.testing.assert_close(loss, F.cross_entropy(logits, torch.zeros(18, dtype=torch.int64)))


def test_image_loss_is_cross_entropy_with_target_zero():
    p_q, p_k, _, queue = loss_case(B=3)
    q, k = p_q[0], p_k[0]
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], 1) / 0.07
    want = F.cross_entropy(logits, torch.zeros(6, dtype=torch.int64))
    got = setsim.image_contrastive_loss(q, k, queue, 0.07)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, p_q)[0], torch.autograd.grad(want, p_q)[0])


def test_no_positive_at_all_gives_zero_and_zero_gradients():
    p_q, p_k, positives, queue = loss_case()
    loss = setsim.set_contrastive_loss(p_q, p_k, positives & False, queue, 0.2)
    assert loss.item() == 0.0
    assert torch.equal(torch.autograd.grad(loss, p_q)[0], torch.zeros_like(p_q))
    cosine = setsim.set_cosine_loss(p_q, p_k, positives & False)
    assert cosine.item() == 0.0 and torch.equal(torch.autograd.grad(cosine, p_q)[0], torch.zeros_like(p_q))


def test_chunked_negatives_equal_the_whole_in_value_and_gradient(monkeypatch):
    p_q, _, _, queue = loss_case()
    q = p_q.flatten(0, 1)
    whole = torch.logsumexp(q @ queue.T / 0.2, 1)
    weights = torch.arange(1.0, len(q) + 1, dtype=torch.float64)
    split = torch.Tensor.split
    for rows in (1, 2, 10**6):  # one row at a time, two, all
        monkeypatch.setattr(torch.Tensor, "split", lambda x, _, rows=rows: split(x, rows))
        chunked = common.negative_logsumexp(q, queue, 0.2)
        torch.testing.assert_close(chunked, whole, rtol=1e-12, atol=0)
        gradients = [torch.autograd.grad((x * weights).sum(), p_q, retain_graph=True)[0] for x in (chunked, whole)]
        torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-13)
        assert torch.autograd.gradcheck(
            lambda x: common.negative_logsumexp(x, queue, 0.2), q[:4].detach().requires_grad_()
        )


def test_no_tensor_of_images_times_cells_times_queue():
    B, S, D, K = 8, 49, 16, 65536
    rng = torch.Generator().manual_seed(0)
    p_q, p_k = F.normalize(torch.randn(2, B, S, D, generator=rng), dim=3)
    queue = F.normalize(torch.randn(K, D, generator=rng), dim=1)
    with LargestTensor() as watch:
        loss = setsim.set_contrastive_loss(p_q.requires_grad_(), p_k, torch.ones(B, S, S, dtype=torch.bool), queue, 0.2)
        loss.backward()
    assert K * D <= watch.elements <= 2**24 < B * S * K


def test_simsiam_losses_and_their_stop_gradient():
    rng = torch.Generator().manual_seed(0)
    prediction, projection = torch.randn(2, 3, 4, 6, generator=rng, dtype=torch.float64)
    prediction.requires_grad_(), projection.requires_grad_()
    positives = torch.rand(3, 4, 4, generator=rng) > 0.5
    positives[1] = False
    loss, images = setsim.set_cosine_loss(prediction, projection, positives), []
    for b in range(3):
        rows = []
        for i in range(4):
            c = positives[b, i].nonzero()[:, 0].tolist()
            cosines = [F.cosine_similarity(prediction[b, i], projection[b, j], dim=0) for j in c]
            rows += [sum(cosines) / len(c)] if c else []
        images.append(sum(rows) / len(rows) if rows else 0)
    assert loss.item() == pytest.approx(-(sum(images) / 3).item(), abs=1e-12)
    loss.backward()
    assert projection.grad is None and prediction.grad.abs().max() > 0

    p, z = prediction[:, 0].detach().requires_grad_(), projection[:, 0].detach().requires_grad_()
    loss = setsim.image_cosine_loss(p, z)
    assert loss.item() == pytest.approx(-(F.normalize(p, dim=1) * F.normalize(z, dim=1)).sum(1).mean().item())
    loss.backward()
    assert z.grad is None and p.grad.abs().max() > 0
    assert setsim.image_cosine_loss(z, 3 * z).item() == pytest.approx(-1)


# ----------------------------------------------------------------------------------------------------------------------
# one iteration
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def groups_of_four(monkeypatch):
    monkeypatch.setattr(common, "GROUP", 4)


def tiny(*flags):
    base = "--data scenes --arch resnet18 --size 64 --batch-size 8 --queue-size 20"
    args = setsim.get_args([*base.split(), *flags])
    return setsim.build(args, torch.device("cpu")), args


def tiny_batch(seed=0, n=8):
    rng = torch.Generator().manual_seed(seed)
    views = (
        torch.randint(0, 256, (2, n, 3, 4, 4), generator=rng, dtype=torch.uint8)
        .repeat_interleave(16, 3)
        .repeat_interleave(16, 4)
    )
    windows = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).repeat(n, 1)
    return views[0], views[1], windows.clone(), windows.clone()


def running_statistics(network):
    return {name: x.clone() for name, x in network.named_buffers()}


@torch.no_grad()
@pytest.mark.parametrize("size, groups", [(4, [4, 4]), (3, [3, 3, 2]), (8, [8])])
def test_encoder_in_groups_equals_each_group_alone(size, groups, monkeypatch):
    """Batch statistics are of a group (B15). Running statistics follow the first group alone (B17)."""
    monkeypatch.setattr(common, "GROUP", size)
    method, _ = tiny()
    encoder, alone, view = method.query, copy.deepcopy(method.query), tiny_batch()[0]
    (got,) = encoder(view)
    for number, rows in enumerate(torch.arange(8).split(groups)):
        for whole, part in zip(got, alone.encode(view[rows]), strict=True):
            assert torch.equal(whole[rows], part)
        if number == 0:
            want = running_statistics(alone)
            assert want["trunk.bn1.num_batches_tracked"] == 1
            assert all(torch.equal(x, want[name]) for name, x in running_statistics(encoder).items())
    encoder(view, view)  # the first group of each view
    assert encoder.trunk.bn1.num_batches_tracked == 3
    norms = [module for module in encoder.modules() if hasattr(module, "track_running_stats")]
    assert len(norms) == 20 and all(norm.track_running_stats for norm in norms)  # as before


@torch.no_grad()
def test_simsiam_has_the_batch_statistics_of_the_batch():
    encoder, view = setsim.Encoder("resnet18", "simsiam"), tiny_batch()[0]
    alone = copy.deepcopy(encoder)
    assert all(torch.equal(*pair) for pair in zip(encoder(view)[0], alone.encode(view), strict=True))


def test_key_network_starts_equal_and_gets_no_gradient():
    method, _ = tiny()
    for query, key in zip(method.query.parameters(), method.key.parameters(), strict=True):
        assert torch.equal(query, key) and query is not key and not key.requires_grad
    method(method.query, *tiny_batch(), step=0)[0].backward()
    assert all(p.grad is None for p in method.key.parameters())
    assert all(p.grad is not None for p in method.query.parameters())


@torch.no_grad()
def test_queries_and_keys_come_from_their_own_networks():
    for changed, values_change, queue_changes in (("query", True, False), ("key", True, True)):
        plain, _ = tiny("--ema", "1")
        other, _ = tiny("--ema", "1")
        for parameter in getattr(other, changed).parameters():
            parameter.add_(0.02)
        a, b = (m(m.query, *tiny_batch(), step=0)[1] for m in (plain, other))
        assert (a["loss_set"] != b["loss_set"]).item() is values_change
        assert (a["loss_image"] != b["loss_image"]).item() is values_change
        for name in ("image_queue", "set_queue"):
            same = torch.equal(getattr(plain, name).vectors, getattr(other, name).vectors)
            assert same is not queue_changes


def test_momentum_update_before_the_keys_and_parameters_only():
    method, _ = tiny("--ema", "0.75")
    with torch.no_grad():
        for p in method.query.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    query = [p.detach().clone() for p in method.query.parameters()]
    key = [p.detach().clone() for p in method.key.parameters()]
    seen = []
    method.key.register_forward_pre_hook(lambda m, _: seen.append([p.clone() for p in m.parameters()]))
    buffers = [b.clone() for b in method.key.buffers()]
    method(method.query, *tiny_batch(), step=0)
    for now, q, k in zip(seen[0], query, key, strict=True):  # MoCo's formula, at the time of the key pass
        torch.testing.assert_close(now, 0.75 * k + 0.25 * q)
    assert len(seen) == 1
    own = [b for b in method.key.buffers() if b.ndim]
    taken = [b for b in method.query.buffers() if b.ndim]
    assert not any(torch.equal(a, b) for a, b in zip(own, taken, strict=True))  # running statistics are not copied
    assert len(buffers) == len(list(method.key.buffers()))


@pytest.mark.parametrize("symmetric", [False, True])
def test_losses_see_the_queues_as_they_were_and_enqueue_once(symmetric, monkeypatch):
    method, _ = tiny(*(["--symmetric"] if symmetric else []))
    queues = (method.image_queue, method.set_queue)
    before = [queue.vectors.clone() for queue in queues]
    seen, calls = [], []
    original = setsim.negative_logsumexp
    monkeypatch.setattr(
        setsim, "negative_logsumexp", lambda q, queue, tau: seen.append(queue.clone()) or original(q, queue, tau)
    )
    enqueue = common.Queue.enqueue
    monkeypatch.setattr(
        common.Queue, "enqueue", lambda queue, keys: calls.append((len(seen), keys)) or enqueue(queue, keys)
    )
    passes = []
    method.key.register_forward_hook(lambda m, i, out: passes.append(out))
    view_q, view_k, window_q, window_k = tiny_batch()
    method(method.query, view_q, view_k, window_q, window_k, step=0)
    directions = 2 if symmetric else 1
    assert len(seen) == 2 * directions and len(passes) == 1
    assert all(torch.equal(queue, before[n % 2]) for n, queue in enumerate(seen))  # image loss, set loss, each its own
    assert [after for after, _ in calls] == [2 * directions] * 2 * directions  # both queues, after every loss
    assert all(len(keys) == 8 for _, keys in calls)
    for queue, old in zip(queues, before, strict=True):
        n = 8 * directions
        assert queue.pointer.item() == n and torch.equal(queue.vectors[n:], old[n:])
        assert not torch.equal(queue.vectors[:n], old[:n])
        torch.testing.assert_close(queue.vectors.norm(dim=1), torch.ones(20))
    # contents: the image keys in the order of the images; the keys of cells averaged first, then normalised (S11)
    order = torch.argsort(torch.randperm(8, generator=common.generator("shuffle", 0, 0)))
    image = torch.cat([F.normalize(key.image[order], dim=1) for key in passes[0]])
    pooled = torch.cat([F.normalize(key.cells[order].mean(1), dim=1) for key in passes[0]])
    for queue, keys in zip(queues, (image, pooled), strict=True):
        assert torch.equal(queue.vectors[: 8 * directions], keys)


def test_matcher_sees_z_of_both_networks():
    """z_q of the query network, z_k of the momentum encoder, un-shuffled (S2)."""
    method, _ = tiny("--ema", "1")
    with torch.no_grad():
        for parameter in method.key.parameters():
            parameter.mul_(1.01)
    seen, outputs = [], {}
    match = method.match
    method.match = lambda *views, rng: seen.append(views) or match(*views, rng=rng)
    for name in ("query", "key"):
        getattr(method, name).register_forward_hook(lambda m, i, out, name=name: outputs.update({name: out[0].z}))
    views = tiny_batch()
    views[3][:, 2] = 0.4
    method(method.query, *views, step=0)
    permutation = torch.randperm(8, generator=common.generator("shuffle", 0, 0))
    z_q, z_k, window_q, window_k = seen[0]
    assert torch.equal(z_q, outputs["query"]) and torch.equal(z_k, outputs["key"][torch.argsort(permutation)])
    assert not torch.equal(z_q, z_k) and not z_q.requires_grad
    assert torch.equal(window_q, views[2]) and torch.equal(window_k, views[3])


@pytest.mark.parametrize("framework", ["moco", "simsiam"])
def test_losses_and_queues_stay_in_fp32_under_amp(framework, monkeypatch):
    seen, outputs = [], []

    def watch(function):
        return lambda *a, **k: seen.append((a, torch.is_autocast_enabled("cpu"))) or function(*a, **k)

    losses = {"moco": "contrastive_loss", "simsiam": "cosine_loss"}[framework]
    for name in (f"image_{losses}", f"set_{losses}"):
        monkeypatch.setattr(setsim, name, watch(getattr(setsim, name)))
    method, _ = tiny("--amp", "bf16", "--framework", framework)
    method.match = watch(method.match)
    for network in filter(None, (method.query, method.key)):
        network.cell_head.register_forward_hook(lambda m, i, out: outputs.append(out.dtype))
    method(method.query, *tiny_batch(), step=0)
    assert outputs == 2 * ([torch.bfloat16] * (2 if framework == "moco" else 1))  # the encoders do run in bf16
    assert len(seen) == (3 if framework == "moco" else 6)
    for arguments, autocast in seen:
        assert not autocast
        assert {x.dtype for x in arguments if isinstance(x, torch.Tensor)} <= {torch.float32, torch.bool}
    if framework == "moco":
        assert method.set_queue.vectors.dtype == torch.float32


def test_symmetric_loss_is_the_mean_of_both_directions():
    values = []
    for flags, batch in (([], (0, 1, 2, 3)), ([], (1, 0, 3, 2)), (["--symmetric"], (0, 1, 2, 3))):
        method, _ = tiny("--matcher", "geometry", *flags)
        views = tiny_batch()
        views[2][:, 2] = 0.4  # the windows differ, so it matters whose is whose
        loss, found = method(method.query, *(views[i] for i in batch), step=0)
        values.append(found | {"loss": loss})
    assert values[0]["rows"] != values[1]["rows"] or values[0]["loss_set"] != values[1]["loss_set"]
    for name in ("loss", "loss_image", "loss_set", "rows", "positives"):
        assert values[2][name].item() == pytest.approx((values[0][name] + values[1][name]).item() / 2, rel=1e-5)
    for name in ("loss_chance", "std_spread"):  # the same in each direction, and still plain numbers
        assert values[2][name] == values[0][name] and isinstance(values[2][name], float)


def test_total_loss_weighs_the_two_terms():
    for weight in (0.3, 1.0):
        method, _ = tiny("--loss-weight", str(weight))
        loss, values = method(method.query, *tiny_batch(), step=0)
        want = (1 - weight) * values["loss_image"] + weight * values["loss_set"]
        assert loss.item() == pytest.approx(want.item(), rel=1e-6)
        assert values["loss_image"] != values["loss_set"]


def test_keys_are_normalised_in_other_company_than_queries(monkeypatch):
    """Shuffling is undone in the outputs; without it the batch statistics of the keys are those of the query groups."""
    statistics = {}
    for name in ("shuffled", "plain"):
        method, _ = tiny("--ema", "1")
        if name == "plain":
            monkeypatch.setattr(setsim.torch, "randperm", lambda n, generator=None: torch.arange(n))
        view = tiny_batch()[0]
        taken = []
        hook = method.key.trunk.bn1.register_forward_hook(
            lambda m, i, out, taken=taken: taken.append(i[0].mean((0, 2, 3)))
        )
        (key,) = method.momentum_keys(0, view)
        hook.remove()
        (want,) = method.key(view)
        statistics[name] = torch.stack(taken), torch.equal(key.image, want.image)
        if name == "shuffled":  # row i of the result belongs to image i: nearest by far in spite of other statistics
            distance = torch.cdist(key.z.flatten(1), want.z.flatten(1))
            assert distance.argmin(1).tolist() == list(range(8))
    assert statistics["plain"][1] and not statistics["shuffled"][1]
    assert (statistics["plain"][0] - statistics["shuffled"][0]).abs().max() > 1e-4


def test_batches_without_any_row_train_on():
    method, _ = tiny("--matcher", "geometry")
    view_q, view_k, window, _ = tiny_batch()
    elsewhere = torch.tensor([[5.0, 5.0, 6.0, 6.0]]).repeat(8, 1)
    loss, values = method(method.query, view_q, view_k, window, elsewhere, step=0)
    loss.backward()
    assert values["loss_set"].item() == 0 and values["empty"].item() == 1 and values["rows"].item() == 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in method.query.parameters())
    assert all((p.grad == 0).all() for p in method.query.cell_head.parameters())


@pytest.mark.parametrize("framework", ["moco", "simsiam"])
def test_baseline_has_no_dense_branch_and_is_moco(framework):
    """... or SimSiam. A weight of 0 leaves no trace of the set loss."""
    method, _ = tiny("--loss-weight", "0", "--framework", framework)
    assert not hasattr(method, "set_queue") and not any("cell" in name for name in method.state_dict())
    method.match = None  # not called
    loss, values = method(method.query, *tiny_batch(), step=0)
    assert loss.item() == values["loss_image"].item()
    assert {*values} - {"loss_chance"} == {"loss_image", "std_image", "std_spread"}
    loss.backward()
    assert all(p.grad is not None for p in method.query.parameters())


@pytest.mark.parametrize("framework", ["moco", "simsiam"])
def test_health_values_against_a_count(framework):
    method, _ = tiny("--framework", framework)
    rng = torch.Generator().manual_seed(0)

    def encoded():
        image, cells = torch.randn(2, 8, 16, generator=rng), torch.randn(2, 8, 4, 16, generator=rng)
        return setsim.Encoded(torch.rand(8, 6, 2, 2, generator=rng), image[0], image[1], cells[0], cells[1])

    if framework == "moco":
        method.image_queue, method.set_queue = (common.Queue(20, 16, rng) for _ in "is")
    query, key, positives = encoded(), encoded(), torch.rand(8, 4, 4, generator=rng) > 0.7
    positives[3] = False  # an image without rows
    method.match = lambda *views, rng: setsim.Match((), (), None, positives)
    _, values = method.compare(query, key, *tiny_batch()[2:], rng)
    sizes = [int(row.sum()) for image in positives for row in image if row.any()]
    assert values["positives"].item() == pytest.approx(sum(sizes) / len(sizes))
    assert values["rows"].item() == pytest.approx(len(sizes) / 8)
    assert values["empty"].item() == sum(not image.any() for image in positives) / 8 > 0
    spread_of = query if framework == "moco" else key  # SimSiam: of projections
    for name, x in (("std_image", spread_of.image), ("std_dense", spread_of.cells.flatten(0, 1))):
        unit = (x / x.norm(dim=1, keepdim=True)).numpy()
        assert values[name].item() == pytest.approx(np.std(unit, axis=0).mean(), abs=1e-6)


@pytest.mark.parametrize("framework, D", [("moco", 128), ("simsiam", 512)])
def test_numbers_to_compare_with_are_plain(framework, D):
    """A log averages tensors and takes numbers as they are. Losses and spreads are shown beside a guess's."""
    method, _ = tiny("--framework", framework)
    loss, values = method(method.query, *tiny_batch(), step=0)
    plain = {name: value for name, value in values.items() if not torch.is_tensor(value)}
    want = {"std_spread": D**-0.5} | ({"loss_chance": math.log(21)} if framework == "moco" else {})
    assert plain == pytest.approx(want) and all(type(value) is float for value in plain.values())
    assert all(values[name].ndim == 0 for name in values.keys() - plain.keys()) and loss.ndim == 0
    drawn = F.normalize(torch.randn(4000, D, generator=torch.Generator().manual_seed(0)), dim=1)
    assert drawn.std(0, correction=0).mean().item() == pytest.approx(values["std_spread"], rel=0.01)


def test_simsiam_iteration():
    method, args = tiny("--framework", "simsiam", "--geometry")
    views = tiny_batch()
    views[3][:, 2] = 0.4
    loss, values = method(method.query, *views, step=0)
    loss.backward()
    network = method.query
    assert method.key is None and not any("queue" in name for name in method.state_dict())
    assert all(p.grad is not None for p in network.parameters())
    # B16: the last norm of every residual branch starts at gain zero
    assert all((block.bn2.weight == 0).all() for block in network.trunk.layer4)
    # S17: three-layer projectors whose last norm has no affine part, predictors with a bottleneck of a quarter
    for projector, predictor in (
        (network.image_head, network.image_predictor),
        (network.cell_head, network.cell_predictor),
    ):
        assert type(projector[-1]).__name__.startswith("BatchNorm") and projector[-1].weight is None
        assert sum(hasattr(m, "weight") and m.weight is not None and m.weight.ndim > 1 for m in projector) == 3
        assert predictor[0].weight.shape[:2] == (128, 512) and predictor[-1].bias is not None
    # S18 by hand from the network's outputs
    method2 = setsim.build(args, torch.device("cpu"))
    one, other = method2.query(views[0], views[1])
    found = method2.match(one.z, other.z, views[2], views[3])
    back = method2.match(other.z, one.z, views[3], views[2])
    image = F.cosine_similarity(one.image_prediction, other.image).mean()
    image = -(image + F.cosine_similarity(other.image_prediction, one.image).mean()) / 2
    dense = setsim.set_cosine_loss(one.cells_prediction, other.cells, found.positives)
    dense = dense + setsim.set_cosine_loss(other.cells_prediction, one.cells, back.positives)
    assert values["loss_image"].item() == pytest.approx(image.item(), abs=1e-5)
    assert loss.item() == pytest.approx((0.5 * image + 0.25 * dense).item(), abs=1e-5)
    assert found.sets[0].sum(1).tolist() == [1] * 8  # S24: 30 % of 2 x 2 cells


def test_method_measures_and_draws_what_its_loss_sees(tmp_path, monkeypatch):
    """Both networks, unshuffled, and the match of these views; `draw` gets the same."""
    drawn = []
    monkeypatch.setattr(look, "draw_matches", lambda *a: drawn.append(a))
    for framework in ("moco", "simsiam"):
        method, _ = tiny("--framework", framework)
        if method.key:
            torch.nn.init.normal_(method.key.trunk.conv1.weight, std=0.1)
        views = tiny_batch()
        views[3][:, 2] = 0.4
        with torch.no_grad():
            z_q, z_k = method.query(views[0])[0].z, (method.key or method.query)(views[1])[0].z
            similarity = setsim.cosine_similarity(z_q.flatten(2), z_k.flatten(2))
            want = look.correspondence(similarity, views[2], views[3], 2, 2)
            assert method.measure(*views) == want
            method.draw(tmp_path / "x.png", *views)
        path, view_q, view_k, found, H, W = drawn.pop()
        assert (path, H, W) == (tmp_path / "x.png", 2, 2) and view_q is views[0] and view_k is views[1]
        assert torch.equal(found.similarity, similarity)


# ----------------------------------------------------------------------------------------------------------------------
# settings
# ----------------------------------------------------------------------------------------------------------------------

SAME = dict(matcher="set2set-nn", set="0.7", geometry=None, symmetric=False, lr=0.03, arch="resnet50", size=224, amp="none",
            batch_size=256, epochs=200, queue_size=None, ema=0.999, temperature=0.2, loss_weight=0.5)  # fmt: skip
PRESETS = {  # literal copy of the two columns of the table of presets
    "paper": SAME,
    "official": SAME | dict(matcher="set2set", geometry=0.5),
}
SIMSIAM = dict(lr=0.1, symmetric=True)
DEMO = dict(data="scenes", arch="resnet18", size=136, batch_size=64, epochs=3, ema=0.99, temperature=0.1)


def settings(flags):
    return vars(setsim.get_args(["--data", "x", *flags.split()]))


def differing(flags):
    """What a command line changes in the settings of the bare one."""
    bare = settings("")
    return {name: value for name, value in settings(flags).items() if value != bare[name]}


@pytest.mark.parametrize("preset", PRESETS)
def test_presets(preset):
    args = settings(f"--preset {preset}")
    assert {name: args[name] for name in PRESETS[preset]} == PRESETS[preset]
    simsiam = settings(f"--preset {preset} --framework simsiam")
    chosen = SIMSIAM | {"set": "30%" if preset == "paper" else "0.7"}
    assert {name: simsiam[name] for name in PRESETS[preset]} == PRESETS[preset] | chosen


def test_groups_are_of_32_images(monkeypatch):
    monkeypatch.undo()  # of groups_of_four
    assert common.GROUP == 32


@pytest.mark.parametrize("fast", [False, True])
def test_demo_settings(fast, monkeypatch):
    monkeypatch.setattr(setsim, "bf16_is_fast", lambda: fast)
    amp = {"amp": "bf16"} if fast else {}
    assert vars(setsim.get_args(["--demo"]))["data"] == "scenes"
    changed = DEMO | amp | {"demo": True}
    del changed["data"]  # is given
    assert differing("--demo") == changed | {"lr": 0.6}
    simsiam = {"framework": "simsiam", "set": "30%", "lr": 0.1, "symmetric": True}
    assert differing("--demo --framework simsiam") == changed | simsiam


@pytest.mark.parametrize(
    "preset, given",
    [
        ("--demo", {"arch": "resnet50", "size": 224, "batch_size": 256, "epochs": 200, "queue_size": 65536}),
        ("--demo", {"lr": 0.03, "ema": 0.999, "temperature": 0.2, "amp": "none", "data": "y"}),
        ("--demo --framework simsiam", {"lr": 0.03, "set": "0.7", "matcher": "set2set", "epochs": 5}),
        ("--preset official", {"matcher": "set2set-nn", "geometry": 0.7, "set": "30%"}),
        ("--framework simsiam", {"set": "0.7", "lr": 0.03}),
        ("--framework simsiam --preset official", {"set": "30%", "lr": 0.1, "matcher": "set2set-nn"}),
        *((f"--matcher {matcher}", {"set": "10%"}) for matcher in setsim.PIXEL_MATCHERS),
        ("--demo --preset official --framework simsiam --matcher sort", {"set": "50%", "lr": 0.6, "amp": "none"}),
    ],
)
def test_what_stands_on_the_command_line_wins(preset, given, monkeypatch):
    """... over every preset, the defaults of the bare command among the values. Nothing else changes."""
    monkeypatch.setattr(setsim, "bf16_is_fast", lambda: True)
    without = settings(preset)
    assert all(without[name] != value for name, value in given.items() if (name, value) != ("lr", 0.1))
    words = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in given.items())
    for flags in (f"{preset} {words}", f"{words} {preset}"):  # in any order
        assert settings(flags) == without | given


@pytest.mark.parametrize("preset", ["paper", "official"])
def test_presets_reach_the_matcher(preset, monkeypatch):
    """What no flag shows: mu and the rule at mu, the statistic of the attention."""
    calls, squares = [], []
    monkeypatch.setattr(setsim, "set_to_set", lambda *a: calls.append(a) or torch.zeros(8, 4, 4, dtype=torch.bool))
    attention_map = setsim.attention_map
    monkeypatch.setattr(setsim, "attention_map", lambda z, square: squares.append(square) or attention_map(z, square))
    method, _ = tiny("--preset", preset)
    method(method.query, *tiny_batch(), step=0)
    mu, nearest, geometry, official = calls[0][3:]
    assert (mu, nearest, official) == {"paper": (0.0, True, False), "official": (0.2, False, True)}[preset]
    assert (geometry is not None) == (preset == "official") and squares == [preset == "official"] * 2


@pytest.mark.parametrize(
    "flags, expected",
    [
        ("", dict(matcher="set2set-nn", rule="0.7", geometry=None, official=False)),
        ("--matcher set2set --set 40% --geometry", dict(matcher="set2set", rule="40%", geometry=0.5, official=False)),
        ("--matcher geometry --geometry 0.7", dict(matcher="geometry", rule="0.7", geometry=0.7, official=False)),
        ("--preset official --geometry 0", dict(matcher="set2set", rule="0.7", geometry=0.0, official=True)),
        ("--preset official --matcher densecl", dict(matcher="densecl", rule="0.7", geometry=None, official=True)),
        ("--framework simsiam", dict(matcher="set2set-nn", rule="30%", geometry=None, official=False)),
        ("--preset official --set 0.6", dict(matcher="set2set", rule="0.6", geometry=0.5, official=True)),
    ],
)
def test_settings_reach_the_matcher(flags, expected, monkeypatch):
    seen = []
    monkeypatch.setattr(setsim, "match", lambda *views, rng, **found: seen.append(found) or 1 / 0)
    method, _ = tiny(*flags.split())
    with pytest.raises(ZeroDivisionError):
        method(method.query, *tiny_batch(), step=0)
    assert seen == [expected]


def test_pixel_matchers_and_geometry_have_their_defaults():
    for matcher in setsim.PIXEL_MATCHERS:
        for others in ("", "--preset official", "--framework simsiam", "--demo"):
            assert settings(f"--matcher {matcher} {others}")["set"] == "30%"
    assert differing("--geometry") == {"geometry": 0.5} and settings("--geometry --symmetric")["geometry"] == 0.5
    assert differing("--geometry 0.7") == {"geometry": 0.7}
    assert settings("--framework simsiam --set 0.6")["set"] == "0.6"
    method, _ = tiny("--framework", "simsiam", "--no-symmetric")
    assert method.symmetric  # SimSiam always is


def refused(capsys, flags):
    """The message with which a command line is refused."""
    with pytest.raises(SystemExit) as error:
        setsim.get_args(flags.split())
    usage, message = capsys.readouterr().err.splitlines()
    assert error.value.code == 2 and usage.startswith("usage: ") and ": error: " in message
    return message.split(": error: ")[1]


@pytest.mark.parametrize("text", ["0.7", "0", "1", "1e-3", "30%", "1%", "100%", "12.5%"])
def test_set_is_a_threshold_or_a_share(text):
    assert settings(f"--set {text}")["set"] == text
    A = setsim.attention_map(torch.rand(2, 3, 5, 8, generator=torch.Generator().manual_seed(0)).flatten(2))
    z = torch.rand(2, 3, 5, 8, generator=torch.Generator().manual_seed(0))
    found = setsim.match(z, z, None, None, rule=text).sets[0]
    share = text.endswith("%")
    want = setsim.ratio_set(A, float(text[:-1])) if share else setsim.threshold_set(A, float(text))
    assert torch.equal(found, want)


@pytest.mark.parametrize(
    "text, words",
    [
        ("0%", "0: must be between 1 and 100"),
        ("0.5%", "0.5: must be between 1 and 100"),
        ("101%", "101: must be between 1 and 100"),
        ("nan%", "nan: must be between 1 and 100"),
        ("1.5", "1.5: must be between 0 and 1"),
        ("30", "30: must be between 0 and 1"),
        ("nan", "nan: must be between 0 and 1"),
        ("abc", "abc: give an attention such as 0.7, or a share such as 30%"),
        ("%", "%: give an attention such as 0.7, or a share such as 30%"),
        ("30%%", "30%%: give an attention such as 0.7, or a share such as 30%"),
    ],
)
def test_set_that_makes_no_sense(text, words, capsys):
    message = refused(capsys, f"--data x --set {text}")
    assert message.startswith("argument --set: ") and message.endswith(words)


@pytest.mark.parametrize(
    "flags, words",
    [
        ("", "give --data DIR (a folder of images), or --demo"),
        ("--data x --temperature 0", "argument --temperature: 0: must be at least 0.001"),
        ("--data x --loss-weight 1.1", "argument --loss-weight: 1.1: must be between 0 and 1"),
        ("--data x --ema -0.1", "argument --ema: -0.1: must be between 0 and 1"),
        ("--data x --geometry=-1", "argument --geometry: -1: must be at least 0"),
        (
            "--data x --geometry --matcher densecl",
            "--geometry adds positives to set2set and set2set-nn, not to --matcher densecl",
        ),
        (
            "--data x --geometry 0.7 --matcher sort",
            "--geometry adds positives to set2set and set2set-nn, not to --matcher sort",
        ),
        ("--data x --queue-size 0", "argument --queue-size: 0: must be at least 1"),
        ("--data x --lr nan", "argument --lr: nan: must be at least 0"),
        ("--data x --lr fast", "argument --lr: invalid float value: 'fast'"),
        ("--data x --epochs 2.5", "argument --epochs: invalid int value: '2.5'"),
        ("--data x --matcher none", "argument --matcher: invalid choice: 'none'"),
        ("--data x --threshold 0.5", "unrecognized arguments: --threshold 0.5"),
        *(
            (f"--data x --matcher {matcher} --set 0.7", f"--matcher {matcher} pairs cells one to one")
            for matcher in setsim.PIXEL_MATCHERS
        ),
    ],
)
def test_settings_that_make_no_sense(flags, words, capsys):
    message = refused(capsys, flags)
    assert message.startswith(words)
    assert "one to one" not in words or message.endswith("give --set in percent")


# ----------------------------------------------------------------------------------------------------------------------
# pieces to lift out
# ----------------------------------------------------------------------------------------------------------------------


def test_pieces_work_alone(monkeypatch):
    """The source of each function by itself, with nothing but libraries in scope, passes the same oracles."""
    pieces = "attention_map threshold_set ratio_set cosine_similarity set_to_set one_to_one image_cosine_loss"
    pieces = [(name,) for name in f"{pieces} set_cosine_loss random_view".split()]
    pieces += [
        ("cell_centres", "geometry_pairs"),
        ("random_view", "two_views"),
        ("ratio_set", "threshold_set", "select"),
    ]
    negatives = "NegativeLogSumExp", "negative_logsumexp"
    pieces += [negatives, (*negatives, "image_contrastive_loss"), (*negatives, "set_contrastive_loss")]
    for names in pieces:
        for name, alone in zip(names, lifted("setsim.py", *names), strict=True):
            assert alone is not getattr(setsim, name, None)
            monkeypatch.setattr(setsim, name, alone, raising=name != "NegativeLogSumExp")
    monkeypatch.setattr(look, "correspondence", *lifted("harness/look.py", "correspondence"))
    test_views_follow_the_recipe()
    test_attention_on_a_worked_example()
    test_ratio_ties_go_by_index()
    test_set_is_a_threshold_or_a_share("30%")
    test_cosine_similarity_against_a_loop()
    test_set_to_set_against_a_double_loop(True, False, 0.0, True)
    test_random_pairs()
    test_sorted_pairs_against_python_sort()
    test_hungarian_finds_the_optimum()
    test_geometry_against_a_double_loop()
    test_set_loss_against_eq_8_value_and_gradient()
    test_image_loss_is_cross_entropy_with_target_zero()
    test_simsiam_losses_and_their_stop_gradient()
    test_correspondence_accuracy_on_known_answers()
    assert [x.shape for x in setsim.two_views(Image.new("RGB", (9, 9)), 8)] == [(3, 8, 8)] * 2 + [(4,)] * 2
