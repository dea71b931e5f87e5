# SPDX-License-Identifier: MIT
"""setsim.py: views, matcher and one iteration, each against something independent. Its losses: test_losses.py."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from helpers import block_views, coordinate_image, lifted, record_operations, refused
from PIL import Image
from torch import nn
from torch.testing import assert_close

import common
import setsim
from harness import look

pytestmark = pytest.mark.usefixtures("tiny_resnet")


def test_windows_say_where_every_cell_lies(monkeypatch):
    """Each pixel of an image holds its own place, so the mean colour of a cell is the place that it shows."""
    record_operations(monkeypatch)  # colours stay as they are
    flips = set()
    for i in range(20):
        with common.drawing("pair", i):
            *views, window_q, window_k = setsim.two_views(coordinate_image(), 224)
        assert not torch.equal(*views) and not torch.equal(window_q, window_k)  # two draws
        for view, window in zip(views, (window_q, window_k), strict=True):
            centres, diagonal = setsim.cell_centres(window[None], 7, 7)
            shown = view[:2].float().unfold(1, 32, 32).unfold(2, 32, 32).mean((3, 4)).flatten(1).T / 256 + 0.5 / 256
            assert (centres[0] - shown).abs().max() < 0.012 and diagonal > 0  # three pixels of 256; a cell is 16
        flips.add((bool(window_q[0] > window_q[2]), bool(window_k[0] > window_k[2])))
    assert len(flips) == 4


SHARES = {"jitter (0.4, 0.4, 0.4, 0.1)": 0.8, "rgb_to_grayscale": 0.2, "blur True": 0.5, "hflip": 0.5}


def test_views_follow_the_recipe(monkeypatch):
    """MoCo-v2's: area, aspect and flips of crops, the order of operations and how often each happens."""
    seen, image, windows, happened = record_operations(monkeypatch, "hflip"), Image.new("RGB", (400, 400)), [], []
    for i in range(600):
        with common.drawing("recipe", i):
            windows.append(setsim.random_view(image, 32)[1])
        assert seen == [name for name in SHARES if name in seen]
        happened += seen
        seen.clear()
    assert {name: happened.count(name) / 600 for name in SHARES} == pytest.approx(SHARES, abs=0.06)  # 3 sigma
    x0, y0, x1, y1 = torch.stack(windows).double().T
    area, aspect = (x1 - x0).abs() * (y1 - y0), (x1 - x0).abs() / (y1 - y0)
    assert 0.195 < area.min() < 0.25 and area.max() <= 1 and abs(area.mean() - 0.58) < 0.04
    assert 0.74 < aspect.min() < 0.8 and 1.25 < aspect.max() < 1.35
    assert (x0 > x1).sum() == happened.count("hflip")


def test_geometry_against_a_double_loop():
    windows = torch.rand(2, 6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)  # some are flipped
    got = setsim.geometry_pairs(*windows, 4, 5, 0.8)
    for b in range(6):
        (ax, ay, bx, by), (cx, cy, dx, dy) = windows[:, b].tolist()
        limit = 0.8 * max(math.hypot((bx - ax) / 5, (by - ay) / 4), math.hypot((dx - cx) / 5, (dy - cy) / 4))
        for i, j in itertools.product(range(20), range(20)):
            x = ax + (i % 5 + 0.5) * (bx - ax) / 5 - cx - (j % 5 + 0.5) * (dx - cx) / 5
            y = ay + (i // 5 + 0.5) * (by - ay) / 4 - cy - (j // 5 + 0.5) * (dy - cy) / 4
            assert got[b, i, j].item() == (math.hypot(x, y) < limit)


def test_geometry_of_known_windows():
    square, mirror, wide = torch.tensor([[[0.1, 0.2, 0.5, 0.6]], [[0.5, 0.2, 0.1, 0.6]], [[0.0, 0.0, 1.0, 0.4]]])
    same = torch.eye(49, dtype=torch.bool)[None]
    assert torch.equal(setsim.geometry_pairs(square, square, 7, 7, 0.7), same)
    assert torch.equal(setsim.geometry_pairs(square, mirror, 7, 7), same.view(7, 7, 7, 7).flip(3).reshape(1, 49, 49))
    assert setsim.geometry_pairs(square, square, 7, 7, 0.72).sum() == 217  # PixPro's: four direct neighbours, 49 + 168
    assert setsim.geometry_pairs(wide, wide, 7, 7).sum() == 49 + 84  # in fractions of the image cells are flat


def test_attention_on_a_worked_example():
    z = torch.tensor([[[1.0, 0.0, 3.0], [1.0, -1.0, 1.0]]])  # two channels, three cells
    assert torch.allclose(setsim.attention_map(z), torch.tensor([[(2 - 1) / 3, 0, 1]]))  # sums 2, 1, 4
    square = torch.tensor([[(1 - 0.5) / 4.5, 0, 1]])  # means of squares 1, 0.5, 5
    assert torch.allclose(setsim.attention_map(z, square=True), square)
    assert setsim.threshold_set(setsim.attention_map(z), 0.3).tolist() == [[True, False, True]]


def test_threshold_at_its_ends():
    A = setsim.attention_map(torch.rand(4, 8, 25, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(setsim.threshold_set(A, 1.0), A == A.amax(1, keepdim=True))
    assert setsim.threshold_set(A, 0.0).all()


@pytest.mark.parametrize("percent, count", [(1, 1), (10, 5), (30, 15), (90, 44), (100, 49)])
def test_ratio_takes_the_highest_cells(percent, count):
    """Equal values go by index."""
    A = (20 * torch.rand(3, 49, generator=torch.Generator().manual_seed(0))).round() / 20
    for mask, values in zip(setsim.ratio_set(A, percent), A.tolist(), strict=True):
        assert mask.nonzero()[:, 0].tolist() == sorted(sorted(range(49), key=lambda i, v=values: -v[i])[:count])


@pytest.mark.parametrize("text", ["0.7", "0", "1e-3", "30%", "12.5%"])
def test_set_is_a_threshold_or_a_share(text):
    A, share = torch.rand(2, 40, generator=torch.Generator().manual_seed(0)), text.endswith("%")
    want = setsim.ratio_set(A, float(text[:-1])) if share else setsim.threshold_set(A, float(text))
    assert torch.equal(setsim.select(A, text), want)


def test_a_map_without_contrast_selects_nothing():
    A = setsim.attention_map(torch.stack([torch.ones(3, 4), torch.arange(12.0).view(3, 4)]))
    sets = setsim.threshold_set(A, 0.7)
    for chosen in (sets, setsim.threshold_set(A, 0.0), setsim.ratio_set(A, 30)):
        assert not chosen[0].any() and chosen[1].any()
    for sets_, A_ in ((sets, A), (sets.flip(0), A.flip(0))):  # flat against peaked, and the other way round
        pair, similarity = sets_[:, None], torch.rand(1, 4, 4)
        assert not setsim.set_to_set(*pair, similarity, 0.0, nearest=True).any()
        for kind in setsim.PIXEL_MATCHERS:
            assert not setsim.one_to_one(kind, *pair, *A_[:, None], similarity).any()


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
@pytest.mark.parametrize("mu", [-1.0, 0.0, 0.5, 1.0])
def test_set_to_set_against_a_double_loop(nearest, official, mu):
    rng = torch.Generator().manual_seed(3)
    set_q, set_k = torch.rand(2, 8, 9, generator=rng) > 0.6
    set_k[:, 4] = True
    similarity = torch.randint(-4, 5, (8, 9, 9), generator=rng) / 4 + torch.rand(8, 9, 9, generator=rng) * 1e-3
    similarity[:, :, 2] = similarity[:, :, 2].round(decimals=1)  # exact 0 and 0.5 among them
    similarity[:, 1] = mu - 0.1  # a row that mu empties
    similarity[:, 1, 7] = mu  # ... but for the value mu itself
    for geometry in (None, torch.rand(8, 9, 9, generator=rng) > 0.9):
        got = setsim.set_to_set(set_q, set_k, similarity, mu, nearest, geometry, official)
        for b in range(8):
            where = None if geometry is None else geometry[b].tolist()
            want = loop_set_to_set(set_q[b], set_k[b], similarity[b].tolist(), mu, nearest, official, where)
            assert [set(row.nonzero()[:, 0].tolist()) for row in got[b]] == want
        if geometry is None and (nearest, official, mu) == (True, False, 0.0):  # the paper's, by default
            assert torch.equal(setsim.set_to_set(set_q, set_k, similarity), got)


def pixel_case():
    rng = torch.Generator().manual_seed(5)
    A_q, A_k = torch.rand(2, 4, 16, generator=rng)
    return A_q, A_k, setsim.ratio_set(A_q, 30), setsim.ratio_set(A_k, 30), torch.rand(4, 16, 16, generator=rng)


def matched(kind, seed=0):
    """The pairs of pixel_case, which have to be one to one between the two sets."""
    A_q, A_k, set_q, set_k, similarity = pixel_case()
    c = setsim.one_to_one(kind, set_q, set_k, A_q, A_k, similarity, torch.Generator().manual_seed(seed))
    assert torch.equal(c.any(2), set_q) and torch.equal(c.any(1), set_k)
    assert (c.sum(2) <= 1).all() and (c.sum(1) <= 1).all()
    return c


def test_random_pairs():
    _, _, set_q, set_k, _ = pixel_case()
    assert torch.equal(matched("random"), matched("random"))
    draws = torch.stack([matched("random", seed) for seed in range(300)]).float()
    share = draws.mean(0)[set_q[:, :, None] & set_k[:, None, :]]  # five cells: 1/5 each
    assert share.min() > 0.1 and share.max() < 0.3


def test_sorted_pairs_against_python_sort():
    A_q, A_k, set_q, set_k, _ = pixel_case()
    for b, c in enumerate(matched("sort")):
        cells = [chosen[b].nonzero()[:, 0].tolist() for chosen in (set_q, set_k)]
        order_q, order_k = (sorted(x, key=A[b].tolist().__getitem__) for x, A in zip(cells, (A_q, A_k), strict=True))
        assert c[order_q, order_k].all()


def test_hungarian_finds_the_optimum():
    _, _, set_q, set_k, similarity = pixel_case()
    for c, chosen_q, chosen_k, sim in zip(matched("hungarian"), set_q, set_k, similarity, strict=True):
        i, j = chosen_q.nonzero()[:, 0], chosen_k.nonzero()[:, 0]
        best = max(sim[i, list(order)].sum().item() for order in itertools.permutations(j.tolist()))
        assert sim[c].sum().item() == pytest.approx(best, abs=1e-5)


@pytest.mark.parametrize("official", [False, True])
def test_match_hands_each_matcher_the_right_tensors(official):
    """The same as direct calls. densecl and geometry need no set: the arg-max over all cells, the cells at the place."""
    rng = torch.Generator().manual_seed(7)
    z_q, z_k = torch.randn(2, 3, 6, 4, 5, generator=rng)
    windows = torch.rand(2, 3, 4, generator=rng)
    windows[1, 2] = windows[0, 2]  # one image whose views show the same

    def found(matcher, rule="30%", geometry=None):
        return setsim.match(z_q, z_k, *windows, matcher, rule, geometry, official, torch.Generator().manual_seed(1))

    maps = [z.flatten(2) for z in (z_q, z_k)]
    similarity, place = setsim.cosine_similarity(*maps), setsim.geometry_pairs(*windows, 4, 5, 0.9)
    A = [setsim.attention_map(z, square=official) for z in maps]
    sets, large = [setsim.ratio_set(a, 30) for a in A], [setsim.threshold_set(a, 0.5) for a in A]
    mu = 0.2 if official else 0.0  # S4
    assert 10 < ((0 < similarity) & (similarity < 0.2)).sum()  # pairs that the two values judge differently
    assert {*setsim.MATCHERS} == {*setsim.PIXEL_MATCHERS, "set2set", "set2set-nn", "densecl", "geometry"}
    rng = torch.Generator().manual_seed(1)
    for kind in setsim.PIXEL_MATCHERS:
        assert torch.equal(found(kind).positives, setsim.one_to_one(kind, *sets, *A, similarity, rng))
    for kind, nearest in (("set2set", False), ("set2set-nn", True)):
        got = found(kind)
        assert torch.equal(got.positives, setsim.set_to_set(*sets, similarity, mu, nearest, None, official))
        assert all(map(torch.equal, (*got.attention, *got.sets, got.similarity), (*A, *sets, similarity)))
        joined = setsim.set_to_set(*large, similarity, mu, nearest, place, official)
        assert torch.equal(found(kind, "0.5", 0.9).positives, joined)
    densecl = found("densecl", "0.7").positives
    for b, i in itertools.product(range(3), range(20)):
        assert densecl[b, i].nonzero()[:, 0].tolist() == [similarity[b, i].tolist().index(similarity[b, i].max())]
    assert official or torch.equal(setsim.match(z_q, z_k, *windows).positives, found("set2set-nn", "0.7").positives)
    for geometry, T in ((None, 0.5), (0.9, 0.9)):  # 0.5 where none is given (S12)
        assert torch.equal(found("geometry", "0.7", geometry).positives, setsim.geometry_pairs(*windows, 4, 5, T))


@pytest.fixture(autouse=True)
def groups_of_four(monkeypatch):
    monkeypatch.setattr(common, "GROUP", 4)


def tiny(flags=""):
    """A method whose maps have 2 x 2 cells and whose networks differ on MoCo. At the start the key network is a copy."""
    base = "--data scenes --arch resnet18 --size 64 --batch-size 8 --queue-size 20"
    method, rng = setsim.build(setsim.get_args([*base.split(), *flags.split()]), torch.device("cpu")), torch.Generator()
    with torch.no_grad():
        for p, start in zip(method.key.parameters(), method.query.parameters(), strict=True) if method.key else ():
            assert torch.equal(p, start) and p is not start and not p.requires_grad
            p.add_(0.03 * torch.randn(p.shape, generator=rng))
    return method


def tiny_batch():
    """The key view shows the left half of what the query view shows."""
    windows = torch.tensor([[[0.0, 0.0, 1.0, 1.0]], [[0.0, 0.0, 0.5, 1.0]]]).repeat(1, 8, 1)
    return *block_views(8), *windows


@torch.no_grad()
@pytest.mark.parametrize("framework, groups", [("moco", [3, 3, 2]), ("simsiam", [8])])
def test_encoder_in_groups_equals_each_group_alone(framework, groups, monkeypatch):
    """Batch statistics are of a group (B15), on SimSiam of the batch."""
    monkeypatch.setattr(common, "GROUP", 3)
    encoder, views = setsim.Encoder("resnet18", framework), block_views(8)
    alone = copy.deepcopy(encoder)
    for view, got in zip(views, encoder(*views), strict=True):
        for rows in torch.arange(8).split(groups):
            pairs = zip(got, alone.encode(view[rows]), strict=True)
            assert all(torch.equal(whole[rows], part) for whole, part in pairs)


def unit(x):
    return x / x.norm(dim=-1, keepdim=True)


VARIANTS = {"moco": "", "symmetric": "--symmetric", "simsiam": "--framework simsiam"}


@pytest.mark.parametrize("flags", VARIANTS.values(), ids=VARIANTS)
def test_iteration_by_hand(flags):
    """Momentum, shuffling, matches, losses, gradients, queues and logged values from the outputs of the networks."""
    method, views, moco = tiny(f"{flags} --ema 0.75 --loss-weight 0.3 --geometry 0.7"), tiny_batch(), "sim" not in flags
    keep, match = torch.rand(8, 4, 4, generator=torch.Generator().manual_seed(0)) > 0.4, method.match
    keep[3] = False  # an image without rows

    def match_some(z_q, z_k, *windows, rng=None):
        assert not z_q.requires_grad and not z_k.requires_grad
        found = match(z_q, z_k, *windows, rng=rng)
        return found._replace(positives=found.positives & keep)

    method.match = match_some
    hand = copy.deepcopy(method)
    loss, values = method(method.query, *views, step=2)
    loss.backward()

    queries = keys = hand.query(*views[:2] if flags else views[:1])
    if moco:
        order = torch.randperm(8, generator=common.generator("shuffle", 0, 2))
        with torch.no_grad():
            for key, query in zip(hand.key.parameters(), hand.query.parameters(), strict=True):
                key.copy_(0.75 * key + 0.25 * query)
            keys = hand.key(*(view[order] for view in (views[:2] if flags else views[1:2])))
        keys = [setsim.Encoded(*(x[order.argsort()] for x in key)) for key in keys]
    losses, wants = [], []
    for q, k, windows in zip(queries, keys[::-1], (views[2:], views[:1:-1]), strict=False):
        c = match_some(q.z.detach(), k.z.detach(), *windows).positives
        if moco:
            image = setsim.image_contrastive_loss(unit(q.image), unit(k.image), hand.image_queue.vectors, 0.2)
            dense = setsim.set_contrastive_loss(unit(q.cells), unit(k.cells), c, hand.set_queue.vectors, 0.2)
        else:
            image = setsim.image_cosine_loss(q.image_prediction, k.image)
            dense = setsim.set_cosine_loss(q.cells_prediction, k.cells, c)
        losses.append(0.7 * image + 0.3 * dense)
        sizes = [int(row.sum()) for row in c.flatten(0, 1) if row.any()]
        wants.append(dict(loss_image=image.item(), loss_set=dense.item(), positives=np.mean(sizes)))
        wants[-1] |= dict(rows=len(sizes) / 8, empty=(~c.flatten(1).any(1)).float().mean().item())
        wants[-1] |= dict(std_spread=k.image.shape[1] ** -0.5) | (dict(loss_chance=math.log(21)) if moco else {})
        shown = q if moco else k  # on SimSiam the projections
        for name, x in (("std_image", shown.image), ("std_dense", shown.cells.flatten(0, 1))):
            wants[-1][name] = np.std(unit(x).detach().numpy(), axis=0).mean()
        assert 0 < wants[-1]["empty"] < 1 and len({*sizes}) > 1
    assert len(wants) == (2 if flags else 1) and values.keys() == wants[0].keys()
    for name, value in values.items():
        value = value if name in ("std_spread", "loss_chance") else value.item()  # numbers to compare with, or tensors
        assert type(value) is float and value == pytest.approx(np.mean([w[name] for w in wants]), rel=1e-4), name
    want = sum(losses) / len(losses)
    assert_close(loss, want)
    gradients = torch.autograd.grad(want, [*hand.query.parameters()])
    for (name, p), gradient in zip(method.query.named_parameters(), gradients, strict=True):
        assert_close(p.grad, gradient, rtol=1e-3, atol=1e-5, msg=name)
    for key in keys if moco else ():  # of cells: averaged first, then normalised (S11)
        hand.image_queue.enqueue(unit(key.image))
        hand.set_queue.enqueue(unit(key.cells.mean(1)))
    assert all(p.grad is None for p in method.key.parameters()) if moco else method.key is None
    assert_close({**method.state_dict()}, {**hand.state_dict()})  # the key network's running statistics are its own


@pytest.mark.parametrize("framework", ["moco", "simsiam"])
def test_matcher_and_losses_stay_in_fp32_under_amp(framework, monkeypatch):
    seen, outputs, moco = [], [], framework == "moco"

    def watch(function):
        return lambda *a, **k: seen.append((a, torch.is_autocast_enabled("cpu"))) or function(*a, **k)

    for part in ("image", "set"):
        name = f"{part}_contrastive_loss" if moco else f"{part}_cosine_loss"
        monkeypatch.setattr(setsim, name, watch(getattr(setsim, name)))
    method = tiny(f"--amp bf16 --framework {framework}")
    method.match = watch(method.match)
    for network in filter(None, (method.query, method.key)):
        network.cell_head.register_forward_hook(lambda m, i, out: outputs.append(out.dtype))
    method(method.query, *tiny_batch(), step=0)
    assert outputs == [torch.bfloat16] * (4 if moco else 2)  # the encoders do run in bf16: two groups of two networks
    assert len(seen) == (3 if moco else 6)
    for arguments, autocast in seen:
        assert not autocast and {x.dtype for x in arguments if torch.is_tensor(x)} <= {torch.float32, torch.bool}
    assert not moco or method.set_queue.vectors.dtype == torch.float32


def test_batches_without_any_row_train_on():
    method = tiny("--matcher geometry")
    *views, window, _ = tiny_batch()
    loss, values = method(method.query, *views, window, window + 5, step=0)
    loss.backward()
    assert values["loss_set"].item() == 0 and values["empty"].item() == 1 and values["rows"].item() == 0
    assert all(p.grad.isfinite().all() for p in method.query.parameters())
    assert all((p.grad == 0).all() for p in method.query.cell_head.parameters())


@pytest.mark.parametrize("framework", ["moco", "simsiam"])
def test_a_weight_of_0_is_the_baseline_without_dense_branch(framework):
    method = tiny(f"--loss-weight 0 --framework {framework}")
    assert not hasattr(method, "set_queue") and not any("cell" in name for name in method.state_dict())
    method.match = None  # not called
    loss, values = method(method.query, *tiny_batch(), step=0)
    assert loss.item() == values["loss_image"].item()
    assert {*values} - {"loss_chance"} == {"loss_image", "std_image", "std_spread"}


def test_heads():
    """MoCo-v2's projector, and SimSiam's with its predictor (S17), for the image and in 1x1 convolutions for cells."""
    with torch.device("meta"):
        moco, simsiam = (setsim.Encoder("resnet50", framework) for framework in ("moco", "simsiam"))
    for head in (moco.image_head, moco.cell_head):
        assert [m.weight.shape[:2] for m in head[::2]] == [(2048, 2048), (128, 2048)] and type(head[1]) is nn.ReLU
    for of in ("image", "cell"):
        projector, predictor = getattr(simsiam, f"{of}_head"), getattr(simsiam, f"{of}_predictor")
        assert [m.weight.shape[:2] for m in projector[::3]] == [(2048, 2048)] * 3
        assert type(projector[-1]).__name__.startswith("BatchNorm") and projector[-1].weight is None
        assert [m.weight.shape[:2] for m in predictor[::3]] == [(512, 2048), (2048, 512)]
        assert predictor[0].bias is None and predictor[-1].bias is not None
    trunk = tiny("--framework simsiam").query.trunk
    assert all((block.bn2.weight == 0).all() for block in trunk.layer4)  # B16: the last gain of each branch


@torch.no_grad()
@pytest.mark.parametrize("framework", ["moco", "simsiam"])
def test_method_measures_and_draws_what_its_loss_sees(framework, monkeypatch):
    """Both networks, unshuffled, and the match of these views."""
    drawn, method, views = [], tiny(f"--framework {framework}"), tiny_batch()
    monkeypatch.setattr(look, "draw_matches", lambda *a: drawn.append(a))
    z_q, z_k = method.query(views[0])[0].z, (method.key or method.query)(views[1])[0].z
    similarity = setsim.cosine_similarity(z_q.flatten(2), z_k.flatten(2))
    assert method.measure(*views) == look.correspondence(similarity, *views[2:], 2, 2)
    method.draw("x.png", *views)
    path, view_q, view_k, found, *size = drawn.pop()
    assert [path, *size] == ["x.png", 2, 2] and view_q is views[0] and view_k is views[1]
    assert torch.equal(found.similarity, similarity)


SAME = dict(matcher="set2set-nn", set="0.7", geometry=None, symmetric=False, lr=0.03, arch="resnet50", size=224, amp="none",
            batch_size=256, epochs=200, queue_size=None, ema=0.999, temperature=0.2, loss_weight=0.5)  # fmt: skip
PRESETS = {"paper": SAME, "official": SAME | dict(matcher="set2set", geometry=0.5)}  # the table of presets, copied
DEMO = dict(arch="resnet18", size=136, batch_size=64, epochs=3, ema=0.99, temperature=0.1, demo=True)


def settings(flags):
    return vars(setsim.get_args(["--data", "x", *flags.split()]))


def differing(flags):
    """What a command line changes in the settings of the bare one."""
    return dict(settings(flags).items() - settings("").items())


@pytest.mark.parametrize("preset", PRESETS)
def test_presets(preset):
    assert PRESETS[preset].items() <= settings(f"--preset {preset}").items()
    chosen = PRESETS[preset] | {"lr": 0.1, "symmetric": True, "set": "30%" if preset == "paper" else "0.7"}
    assert chosen.items() <= settings(f"--preset {preset} --framework simsiam").items()


@pytest.mark.parametrize("fast", [False, True])
def test_demo_settings(fast, monkeypatch):
    monkeypatch.setattr(setsim, "bf16_is_fast", lambda: fast)
    changed = DEMO | ({"amp": "bf16"} if fast else {})
    assert setsim.get_args(["--demo"]).data == "scenes" and differing("--demo") == changed | {"lr": 0.6}
    simsiam = {"framework": "simsiam", "set": "30%", "lr": 0.1, "symmetric": True}
    assert differing("--demo --framework simsiam") == changed | simsiam


def test_defaults_of_matchers_and_geometry():
    for matcher, others in itertools.product(setsim.PIXEL_MATCHERS, ("", "--preset official", "--framework simsiam")):
        assert settings(f"--matcher {matcher} {others}")["set"] == "30%"
    assert differing("--geometry") == {"geometry": 0.5} and differing("--geometry 0.7") == {"geometry": 0.7}
    assert tiny("--framework simsiam --no-symmetric").symmetric  # SimSiam always is


@pytest.mark.parametrize("preset, given", [
    ("--demo", {"arch": "resnet50", "size": 224, "batch_size": 256, "epochs": 200, "queue_size": 65536}),
    ("--demo", {"lr": 0.03, "ema": 0.999, "temperature": 0.2, "amp": "none", "data": "y"}),
    ("--preset official", {"matcher": "set2set-nn", "geometry": 0.7, "set": "30%"}),
    ("--framework simsiam --preset official", {"set": "30%", "lr": 0.03, "matcher": "set2set-nn"}),
    ("--demo --preset official --framework simsiam --matcher sort", {"set": "50%", "lr": 0.6, "amp": "none"}),
])  # fmt: skip
def test_what_stands_on_the_command_line_wins(preset, given, monkeypatch):
    """... over every preset, the defaults of the bare command among the values. Nothing else changes."""
    monkeypatch.setattr(setsim, "bf16_is_fast", lambda: True)
    without = settings(preset)
    assert all(without[name] != value for name, value in given.items())
    words = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in given.items())
    for flags in (f"{preset} {words}", f"{words} {preset}"):  # in any order
        assert settings(flags) == without | given


def test_settings_reach_the_matcher():
    for flags, *expected in (
        ("", "set2set-nn", "0.7", None, False),
        ("--matcher set2set --set 40% --geometry", "set2set", "40%", 0.5, False),
        ("--preset official --geometry 0", "set2set", "0.7", 0.0, True),
        ("--framework simsiam", "set2set-nn", "30%", None, False),
    ):
        match, expected = tiny(flags).match, zip("matcher rule geometry official".split(), expected, strict=True)
        assert match.func is setsim.match and match.keywords == dict(expected), flags


REFUSED = {
    "--temperature 0": "argument --temperature: 0: must be at least 0.001",
    "--loss-weight 1.1": "argument --loss-weight: 1.1: must be between 0 and 1",
    "--geometry=-1": "argument --geometry: -1: must be at least 0",
    "--geometry --matcher densecl": "--geometry adds positives to set2set and set2set-nn",
    "--queue-size 0": "argument --queue-size: 0: must be at least 1",
    **{f"--matcher {m} --set 0.7": f"--matcher {m} pairs cells one to one" for m in setsim.PIXEL_MATCHERS},
    **{f"--set {x}%": f"argument --set: {x}: must be between 1 and 100" for x in ("0.5", "101", "nan")},
    **{f"--set {x}": f"argument --set: {x}: must be between 0 and 1" for x in ("1.5", "nan")},
    **{f"--set {x}": f"argument --set: {x}: give an attention" for x in ("abc", "%")},
}


@pytest.mark.parametrize("flags", REFUSED)
def test_settings_that_make_no_sense(flags, capsys):
    assert refused(capsys, setsim.get_args, f"--data x {flags}").startswith(REFUSED[flags])


def test_pieces_work_alone(monkeypatch):
    """The source of each function by itself, with nothing but libraries in scope, passes the same oracles."""
    together = ["random_view two_views", "cell_centres geometry_pairs", "ratio_set threshold_set select"]
    single = "attention_map cosine_similarity set_to_set one_to_one moco_heads simsiam_heads cell_centres"
    for names in (*together, *single.split(), "ratio_set", "threshold_set"):
        for name, alone in zip(names.split(), lifted("setsim.py", *names.split()), strict=True):
            assert alone is not getattr(setsim, name)
            monkeypatch.setattr(setsim, name, alone)
    monkeypatch.setattr(look, "correspondence", *lifted("harness/look.py", "correspondence"))
    test_windows_say_where_every_cell_lies(monkeypatch)
    test_views_follow_the_recipe(monkeypatch)
    test_attention_on_a_worked_example()
    test_set_is_a_threshold_or_a_share("30%")
    test_cosine_similarity_against_a_loop()
    test_set_to_set_against_a_double_loop(True, False, 0.0)
    test_random_pairs()
    test_sorted_pairs_against_python_sort()
    test_hungarian_finds_the_optimum()
    test_geometry_against_a_double_loop()
    test_heads()
    window = torch.tensor([[0.0, 0.0, 0.8, 0.8]])
    assert look.correspondence(torch.eye(25)[None], window, window, 5, 5) == (25, pytest.approx(169 / 25), 25)
