# SPDX-License-Identifier: MIT
"""The losses of setsim.py, resim.py and d3ssl.py against slow loops, cross-entropy and values known in advance."""

import importlib
import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from helpers import LargestTensor, lifted

TAU = 0.2


def contrastive(q, positives, negatives, tau):
    """One row of SetSim's Eq. 8, term by term. With one positive it is MoCo's InfoNCE."""
    near = [torch.exp(q @ k / tau) for k in positives]
    denominator = sum(near) + sum(torch.exp(q @ k / tau) for k in negatives)
    return -sum(torch.log(x / denominator) for x in near) / len(near)


def cosine(p, positives, *_):
    return -sum(p @ z / (p.norm() * z.norm()) for z in positives) / len(positives)


def over_rows(images):
    return sum(sum(images, [])) / sum(map(len, images))


def over_images(images):
    return over_all_images([*filter(None, images)])


def over_all_images(images):
    return sum(sum(rows) / len(rows) for rows in images if rows) / len(images)


class Loss(NamedTuple):
    script: str
    name: str
    call: Callable  # function, q (B, S, D), k (B, S, D), positives c (B, S, S) bool, negatives (M, D), tau -> loss
    positives: str  # kind of c: image, one cell a row; all, each row its own cell; some of these; sets
    row: Callable
    mean: Callable  # images, of each the losses of its rows that have a positive -> loss
    factor: int = 1


# fmt: off
LOSSES = [
    Loss("setsim", "image_contrastive_loss", lambda f, q, k, c, n, tau: f(q[:, 0], k[:, 0], n, tau), "image", contrastive, over_rows),
    Loss("resim", "image_contrastive_loss", lambda f, q, k, c, n, tau: f(q[:, 0], k[:, 0], n, tau), "image", contrastive, over_rows),
    Loss("setsim", "set_contrastive_loss", lambda f, q, k, c, n, tau: f(q, k, c, n, tau), "sets", contrastive, over_all_images),
    Loss("resim", "region_contrastive_loss", lambda f, q, k, c, n, tau: f(q, k, c.any(2), n, tau), "some", contrastive, over_images),
    Loss("resim", "region_contrastive_loss", lambda f, q, k, c, n, tau: f(q, k, c.any(2), n, tau, False), "some", contrastive, over_rows),
    Loss("d3ssl", "region_contrastive_loss", lambda f, q, k, c, n, tau: f(q, k, n, tau), "all", contrastive, over_rows),
    Loss("setsim", "image_cosine_loss", lambda f, q, k, *_: f(q[:, 0], k[:, 0]), "image", cosine, over_rows),
    Loss("resim", "image_cosine_loss", lambda f, q, k, *_: f(q[:, 0], k[:, 0]), "image", cosine, over_rows),
    Loss("setsim", "set_cosine_loss", lambda f, q, k, c, *_: f(q, k, c), "sets", cosine, over_all_images),
    Loss("resim", "region_cosine_loss", lambda f, q, k, c, *_: f(q[c.any(2)], k[c.any(2)], c.any(2)), "some", cosine, over_images),
    Loss("resim", "region_cosine_loss", lambda f, q, k, c, *_: f(q[c.any(2)], k[c.any(2)], c.any(2), False), "some", cosine, over_rows),
    Loss("d3ssl", "region_cosine_loss", lambda f, q, k, *_: f(q, k), "all", cosine, over_rows, factor=2),
]
# fmt: on
CONTRASTIVE = [loss for loss in LOSSES if loss.row is contrastive]


def each(losses):
    return pytest.mark.parametrize("loss", losses, ids=lambda loss: f"{loss.script}-{loss.name}-{loss.mean.__name__}")


def compute(loss, *inputs, tau=TAU, function=None):
    return loss.call(function or getattr(importlib.import_module(loss.script), loss.name), *inputs, tau)


def case(loss, B=4, S=5, D=6, M=9):
    """q, k, c, negatives in double precision; unit vectors if the loss wants them. One row and one image are empty."""
    rng, S = torch.Generator().manual_seed(0), 1 if loss.positives == "image" else S
    q, k = torch.randn(2, B, S, D, generator=rng, dtype=torch.float64)
    negatives = F.normalize(torch.randn(M, D, generator=rng, dtype=torch.float64), dim=1)
    if loss.row is contrastive:
        q, k = F.normalize(q, dim=2), F.normalize(k, dim=2)
    c = torch.eye(S, dtype=torch.bool).repeat(B, 1, 1)
    if loss.positives in ("some", "sets"):
        c = torch.rand(B, S, S, generator=rng) > 0.6 if loss.positives == "sets" else c
        c[0, 1], c[2], c[3, :3] = False, False, False
    return q.requires_grad_(), k.requires_grad_(), c, negatives


@each(LOSSES)
@pytest.mark.parametrize("alone", [False, True])
def test_loss_against_a_loop_value_and_gradient(loss, alone, monkeypatch):
    """alone: the function's source lifted out, and the negatives' part computed two rows at a time."""
    (q, k, c, negatives), function, split = case(loss), None, torch.Tensor.split
    if alone:
        monkeypatch.setattr(torch.Tensor, "split", lambda x, _: split(x, 2))
        pieces = ["NegativeLogSumExp", "negative_logsumexp"] if loss.row is contrastive else []
        pieces += ["mean_over_regions"] if loss.positives == "some" else []
        *_, function = lifted(f"{loss.script}.py", *pieces, loss.name)
    fast = compute(loss, q, k, c, negatives, function=function)
    rows = [[(q[b, i], k[b, c[b, i]]) for i in range(len(c[b])) if c[b, i].any()] for b in range(len(c))]
    rows = [[loss.row(*row, negatives, TAU) for row in image] for image in rows]
    slow = loss.factor * loss.mean(rows)
    torch.testing.assert_close(fast, slow, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(x, q, retain_graph=True)[0] for x in (fast, slow)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)
    assert gradients[0].abs().max() > 1e-3 and not gradients[0][~c.any(2)].any()
    assert loss.row is contrastive or torch.autograd.grad(fast, k, allow_unused=True)[0] is None  # stop-gradient


@each(CONTRASTIVE)
def test_with_one_positive_a_row_it_is_cross_entropy(loss):
    """MoCo's and DenseCL's call: target 0. The released ReSim ignores rows with target -1."""
    q, k, c, negatives = case(loss)
    if loss.mean is not over_rows:
        c = torch.eye(c.shape[1], dtype=torch.bool).repeat(len(c), 1, 1)
    logits = torch.cat([(q * k).sum(2, keepdim=True), q @ negatives.T], 2).flatten(0, 1) / TAU
    want = F.cross_entropy(logits, c.any(2).flatten().long() - 1, ignore_index=-1)
    torch.testing.assert_close(compute(loss, q, k, c, negatives), want)


@each([loss for loss in LOSSES if loss.positives in ("some", "sets")])
def test_without_any_positive_loss_and_gradient_are_zero(loss):
    q, k, c, negatives = case(loss)
    found = compute(loss, q, k, c & False, negatives)
    assert found.item() == 0 and not torch.autograd.grad(found, q)[0].any()


@each(LOSSES)
def test_extremes_stay_finite(loss):
    """In fp32, at the least temperature that the flag takes: certain rows and hopeless ones. Also vectors of zeros."""
    for sign in (1, -1, 0):
        q = torch.tensor([0.6, 0.8]).expand(2, 1 if loss.positives == "image" else 3, 2) * abs(sign)
        k, negatives = sign * q, -sign * torch.tensor([[0.6, 0.8]]).expand(7, 2)
        c = torch.eye(q.shape[1], dtype=torch.bool).repeat(2, 1, 1)
        found = compute(loss, q.requires_grad_(), k, c, negatives, tau=1e-3)
        want = {1: 0, -1: 2000 + math.log(7), 0: math.log(8)}[sign] if loss.row is contrastive else -sign * loss.factor
        assert found.item() == pytest.approx(want, rel=1e-5, abs=1e-5)
        assert torch.autograd.grad(found, q)[0].isfinite().all()


@each([loss for loss in CONTRASTIVE if loss.positives != "image"])
def test_no_tensor_of_rows_times_negatives(loss):
    """The logits of eight images with 49 cells against MoCo's queue never exist all at once."""
    q, k, _, negatives = (x.float() for x in case(loss, B=8, S=49, D=16, M=65536))
    c = torch.eye(49, dtype=torch.bool).repeat(8, 1, 1)
    with LargestTensor() as watch:
        compute(loss, q.detach().requires_grad_(), k.detach(), c, negatives).backward()
    assert 65536 * 16 <= watch.elements <= 2**24 < 8 * 49 * 65536
