# SPDX-License-Identifier: MIT
"""common.py: command line, keys of random draws, networks, groups, queues. Several processes: test_runs.py."""

import argparse
import copy

import pytest
import torch
import torchvision
from helpers import lifted

import common

# ---- command line


def test_numbers_outside_their_range_are_refused_in_words(capsys):
    parser = argparse.ArgumentParser()
    for name, kind in (("count", (int, 1)), ("rest", (int, 0)), ("share", (float, 0, 1))):
        parser.add_argument(f"--{name}", type=common.number(*kind))
    args = parser.parse_args("--count 1 --share 0".split())
    assert (args.count, args.share) == (1, 0) and isinstance(args.count, int) and isinstance(args.share, float)
    assert parser.parse_args("--count 99999 --share 1".split()).share == 1
    for given, words in {
        "--count=0": "0: must be at least 1",
        "--count=-3": "-3: must be at least 1",
        "--rest=-1": "-1: must be at least 0",
        "--count=1.5": "invalid int value: '1.5'",
        "--share=1.01": "1.01: must be between 0 and 1",
        "--share=-1e-9": "-1e-9: must be between 0 and 1",
        "--share=nan": "nan: must be between 0 and 1",
        "--share=half": "invalid float value: 'half'",
    }.items():
        with pytest.raises(SystemExit) as error:
            parser.parse_args([given])
        assert error.value.code == 2
        assert capsys.readouterr().err.endswith(f"error: argument {given.split('=')[0]}: {words}\n")


def test_presets_replace_defaults_and_the_command_line_wins(capsys):
    def parse(line, presets=lambda args: dict(lr=0.1, epochs=5) if args.arch == "resnet18" else {}):
        parser = argparse.ArgumentParser()
        common.run_flags(parser, "x")
        assert len(parser._actions) - 1 == 14  # as the docstring says
        return common.parse(parser, line.split(), presets)

    plain, chosen = parse("--data d"), parse("--data d --arch resnet18")
    assert (plain.lr, plain.epochs, plain.output_dir) == (0.03, 200, "runs/x")
    assert (chosen.lr, chosen.epochs, chosen.seed) == (0.1, 5, 0)
    given = parse("--data d --arch resnet18 --lr 0.03")  # what is given wins, even if it is the default
    assert (given.lr, given.epochs) == (0.03, 5)
    with pytest.raises(SystemExit) as error:
        parse("--arch resnet18")
    assert error.value.code == 2 and "error: give --data DIR" in capsys.readouterr().err
    assert parse("", lambda args: dict(data="scenes")).data == "scenes"


# ---- keys of random draws


def test_draws_depend_on_the_key_alone():
    keys = [("views", s, e, i) for s in range(4) for e in range(20) for i in range(20)]
    keys += [("views", 1, 11), ("views", 11, 1)]
    assert len({common.key_seed(*key) for key in keys}) == len(keys)
    assert common.key_seed("a", 1, 2) == common.key_seed("a", 1, 2)
    assert all(0 <= common.key_seed(key) < 2**63 for key in keys)
    torch.manual_seed(5)
    want = torch.rand(2)
    torch.manual_seed(5)
    first = torch.rand(1)
    with common.drawing("x"):
        a = torch.rand(3)
    assert torch.equal(torch.cat([first, torch.rand(1)]), want)  # the outer stream goes on undisturbed
    with common.drawing("x"):
        assert torch.equal(a, torch.rand(3))


# ---- networks


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_trunk_is_torchvisions_resnet(arch):
    trunk, resnet = common.ResNetTrunk(arch).eval(), getattr(torchvision.models, arch)().eval()
    missing, unexpected = resnet.load_state_dict(trunk.state_dict(), strict=False)
    assert missing == ["fc.weight", "fc.bias"] and unexpected == []
    x, taken = torch.rand(1, 3, 70, 64), []
    for stage in (resnet.layer1, resnet.layer2, resnet.layer3, resnet.layer4):
        stage.register_forward_hook(lambda m, i, out: taken.append(out))
    resnet(x)
    for mine, theirs, width in zip(trunk(x), taken, trunk.widths, strict=True):
        assert torch.equal(mine, theirs) and mine.shape[1] == width


def test_normalise_is_torchvisions():
    images = torch.randint(0, 256, (2, 3, 5, 5), dtype=torch.uint8)
    want = torchvision.transforms.functional.normalize(images / 255, common.PIXEL_MEAN, common.PIXEL_STD)
    torch.testing.assert_close(common.normalise(images), want)


@pytest.mark.parametrize("size, batches", [(6, [2] * 4), (7, [3] * 3), (5, [4] * 4), (3, [8]), (4, [4, 9, 1])])
def test_queue_holds_the_newest_keys_in_ring_order(size, batches):
    queue = common.Queue(size, 2, torch.Generator().manual_seed(0))
    assert torch.allclose(queue.vectors.norm(dim=1), torch.ones(size))
    ring, number = queue.vectors.tolist(), 0
    for n in batches:
        keys = torch.arange(number, number + n).float()[:, None].repeat(1, 2)
        queue.enqueue(keys)
        for i, key in enumerate(keys.tolist(), number):
            ring[i % size] = key
        number += n
        assert queue.vectors.tolist() == ring and queue.pointer.item() == number % size


def test_momentum_update_is_the_formula_and_leaves_buffers():
    query, key = torch.nn.BatchNorm1d(3), torch.nn.BatchNorm1d(3)
    with torch.no_grad():
        query.weight.fill_(2.0)
        query.running_mean.fill_(7.0)
    common.momentum_update(key, query, 0.9)
    assert torch.allclose(key.weight, torch.full((3,), 1.1)) and (key.running_mean == 0).all()


class Norms(torch.nn.Module):
    """Two batch norms, one of them nested, of two inputs."""

    def __init__(self):
        super().__init__()
        self.norm, self.inner = torch.nn.BatchNorm1d(4), torch.nn.Sequential(torch.nn.BatchNorm1d(4, affine=False))
        torch.nn.init.uniform_(self.norm.weight)

    def encode(self, x, y):
        return self.norm(x) * y, self.inner(x + y)


def two_inputs(n=10):
    rng = torch.Generator().manual_seed(0)
    return torch.randn(n, 4, generator=rng, requires_grad=True), torch.randn(n, 4, generator=rng)


def test_groups_have_their_own_batch_statistics():
    """Their values by the formula; values and gradients as of separate passes."""
    plain, network, (x, y) = torch.nn.BatchNorm1d(4, affine=False), Norms(), two_inputs()
    plain.encode, sizes = lambda group: (sizes.append(len(group)) or plain(group),), []
    (got,) = common.encode_in_groups(plain, 5, x)
    for part, group in ((got[:5], x[:5]), (got[5:], x[5:])):
        torch.testing.assert_close(part, (group - group.mean(0)) / (group.var(0, unbiased=False) + plain.eps).sqrt())
    common.encode_in_groups(plain, 4, x)
    assert sizes == [5, 5, 4, 3, 3]
    weights = torch.arange(40.0).view(10, 4).cos()
    apart = [network.encode(x[rows], y[rows]) for rows in (slice(0, 4), slice(4, 7), slice(7, 10))]
    want = [torch.cat(parts) for parts in zip(*apart, strict=True)]
    for a, b in zip(common.encode_in_groups(network, 4, x, y), want, strict=True):
        assert torch.equal(a, b)
        for leaf in (x, network.norm.weight) if b is want[0] else (x,):
            gradients = [torch.autograd.grad((z * weights).sum(), leaf, retain_graph=True)[0] for z in (a, b)]
            torch.testing.assert_close(*gradients)


def test_only_the_first_group_updates_running_statistics():
    """B17: as if the other groups had been on other GPUs, whose buffers are overwritten."""
    network, (x, y) = Norms(), two_inputs()
    alone = copy.deepcopy(network)
    for calls in (1, 2):
        common.encode_in_groups(network, 4, x, y)
        alone.encode(x[:4], y[:4])
        for (name, buffer), other in zip(network.named_buffers(), alone.buffers(), strict=True):
            assert torch.equal(buffer, other), name
        assert network.norm.num_batches_tracked == network.inner[0].num_batches_tracked == calls
        assert network.norm.track_running_stats and network.inner[0].track_running_stats  # ready for the next call
    whole = common.encode_in_groups(network.eval(), 4, x, y)
    assert all(torch.equal(a, b) for a, b in zip(whole, network.encode(x, y), strict=True))  # running statistics
    assert all(torch.equal(a, b) for a, b in zip(network.buffers(), alone.buffers(), strict=True))


@pytest.mark.parametrize("amp", ["none", "bf16"])
def test_encoders_compute_in_the_precision_of_amp_and_return_fp32(amp):
    network, (x, _), seen = torch.nn.Linear(4, 3), two_inputs(), []

    def encode(group):
        seen.append((torch.is_autocast_enabled("cpu"), network(group).dtype))
        return network(group), group.double()

    network.encode = encode
    with common.autocast(amp, x.device):
        got = common.encode_in_groups(network, 5, x)
    assert seen == [(True, torch.bfloat16) if amp == "bf16" else (False, torch.float32)] * 2
    assert not torch.is_autocast_enabled("cpu") and [y.dtype for y in got] == [torch.float32] * 2


def test_negatives_have_the_gradient_of_their_value():
    rng = torch.Generator().manual_seed(0)
    q, queue = (torch.randn(n, 3, generator=rng, dtype=torch.float64) for n in (4, 7))
    assert torch.autograd.gradcheck(lambda x: common.negative_logsumexp(x, queue, 0.2), q.requires_grad_())
    torch.testing.assert_close(common.negative_logsumexp(q, queue, 0.2), (q @ queue.T / 0.2).exp().sum(1).log())


def test_cosine_lr():
    values = [common.cosine_lr(0.4, epoch, 8) for epoch in range(8)]
    assert values[0] == 0.4 and values[4] == pytest.approx(0.2) and values[7] == pytest.approx(0.0152241)


def test_pieces_work_alone(monkeypatch):
    """The source of MoCo's mechanics by itself passes the same oracles."""
    for names in (
        "Queue", "momentum_update", "encode_in_groups", "NegativeLogSumExp negative_logsumexp",
        "processes rank all_gather shuffle unshuffle",
    ):  # fmt: skip
        for name, alone in zip(names.split(), lifted("common.py", *names.split()), strict=True):
            monkeypatch.setattr(common, name, alone)
    test_queue_holds_the_newest_keys_in_ring_order(5, [4, 4, 4, 4])
    test_momentum_update_is_the_formula_and_leaves_buffers()
    test_groups_have_their_own_batch_statistics()
    test_only_the_first_group_updates_running_statistics()
    test_negatives_have_the_gradient_of_their_value()
    x, permutation = torch.arange(6.0), torch.tensor([3, 1, 5, 0, 2, 4])
    assert torch.equal(common.shuffle(x, permutation), permutation.float())
    assert torch.equal(common.unshuffle(common.shuffle(x, permutation), permutation), x)


def test_a_process_without_a_gpu_is_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", None)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(common.UserError, match="process 2 of this machine .* at most --nproc_per_node 2"):
        common.start_processes()
