# SPDX-License-Identifier: MIT
"""common.py: command line, keys of random draws, networks, groups, queues and processes."""

import argparse
import copy
import importlib

import pytest
import torch
import torchvision
from helpers import ROOT, LargestTensor, lifted, run
from tiny import TinyResNet

import common
from harness.run import agree

# ---- command line


def parser_with(**flags):
    parser = argparse.ArgumentParser()
    for name, kind in flags.items():
        parser.add_argument(f"--{name}", type=kind)
    return parser


def test_numbers_outside_their_range_are_refused_in_words(capsys):
    parser = parser_with(count=common.number(int, 1), rest=common.number(int, 0), share=common.number(float, 0, 1))
    args = parser.parse_args("--count 1 --share 0".split())
    assert (args.count, args.share) == (1, 0) and isinstance(args.count, int) and isinstance(args.share, float)
    assert parser.parse_args("--count 99999 --share 1".split()).share == 1
    for flag, text, words in (
        ("--count", "0", "0: must be at least 1"),
        ("--count", "-3", "-3: must be at least 1"),
        ("--rest", "-1", "-1: must be at least 0"),
        ("--count", "1.5", "invalid int value: '1.5'"),
        ("--share", "1.01", "1.01: must be between 0 and 1"),
        ("--share", "-1e-9", "-1e-9: must be between 0 and 1"),
        ("--share", "nan", "nan: must be between 0 and 1"),
        ("--share", "half", "invalid float value: 'half'"),
    ):
        with pytest.raises(SystemExit) as error:
            parser.parse_args([f"{flag}={text}"])
        assert error.value.code == 2
        assert capsys.readouterr().err.splitlines()[-1].endswith(f"error: argument {flag}: {words}")


def test_presets_replace_defaults_and_the_command_line_wins(capsys):
    def presets(args):
        return dict(lr=0.1, epochs=5) if args.arch == "resnet18" else {}

    def parse(line, presets=presets):
        parser = argparse.ArgumentParser()
        common.run_flags(parser, "x")
        assert len(parser._actions) - 1 == 14  # as the docstring says
        return common.parse(parser, line.split(), presets)

    plain = parse("--data d")
    assert (plain.lr, plain.epochs, plain.output_dir) == (0.03, 200, "runs/x")
    chosen = parse("--data d --arch resnet18")
    assert (chosen.lr, chosen.epochs, chosen.seed) == (0.1, 5, 0)
    given = parse("--data d --arch resnet18 --lr 0.03")  # what is given wins, even if it is the default
    assert (given.lr, given.epochs) == (0.03, 5)
    with pytest.raises(SystemExit) as error:
        parse("--arch resnet18")
    assert error.value.code == 2 and "error: give --data DIR" in capsys.readouterr().err
    assert parse("", lambda args: dict(data="scenes")).data == "scenes"


# ---- keys of random draws


def test_draws_depend_on_the_key_alone():
    assert common.key_seed("a", 1, 2) == common.key_seed("a", 1, 2)
    keys = [("views", s, e, i) for s in range(4) for e in range(20) for i in range(20)] + [
        ("views", 1, 11),
        ("views", 11, 1),
    ]
    assert len({common.key_seed(*key) for key in keys}) == len(keys)
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
    torch.manual_seed(0)
    trunk = common.ResNetTrunk(arch).eval()
    resnet = getattr(torchvision.models, arch)().eval()
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


@pytest.mark.parametrize(
    "size, batches", [(6, [2, 2, 2, 2]), (7, [3, 3, 3]), (5, [4, 4, 4, 4]), (3, [8]), (4, [4, 9, 1])]
)
def test_queue_holds_the_newest_keys_in_ring_order(size, batches):
    queue = common.Queue(size, 2, torch.Generator().manual_seed(0))
    assert torch.allclose(queue.vectors.norm(dim=1), torch.ones(size))
    ring, pointer, number = queue.vectors.tolist(), 0, 0
    for n in batches:
        keys = torch.arange(number, number + n).float()[:, None].repeat(1, 2)
        number += n
        queue.enqueue(keys)
        for key in keys.tolist():
            ring[pointer] = key
            pointer = (pointer + 1) % size
        assert queue.vectors.tolist() == ring and queue.pointer.item() == pointer


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
    network, (x, _) = torch.nn.BatchNorm1d(4, affine=False), two_inputs()
    network.encode, sizes = lambda group: (network(group),), []
    (got,) = common.encode_in_groups(network, 5, x)
    for part, group in ((got[:5], x[:5]), (got[5:], x[5:])):
        torch.testing.assert_close(part, (group - group.mean(0)) / (group.var(0, unbiased=False) + network.eps).sqrt())
    network.encode = lambda group: (sizes.append(len(group)) or group,)
    common.encode_in_groups(network, 4, x)
    assert sizes == [4, 3, 3]


def test_groups_equal_separate_passes_in_value_and_gradient():
    network, (x, y) = Norms(), two_inputs()
    weights = torch.arange(40.0).view(10, 4).cos()
    apart = [network.encode(x[rows], y[rows]) for rows in (slice(0, 4), slice(4, 7), slice(7, 10))]
    want = [torch.cat(parts) for parts in zip(*apart, strict=True)]
    got = common.encode_in_groups(network, 4, x, y)
    assert len(got) == 2
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
        for leaf in (x, network.norm.weight) if a is got[0] else (x,):
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
        out = network(group)
        seen.append((torch.is_autocast_enabled("cpu"), out.dtype))
        return out, group.double()

    network.encode = encode
    with common.autocast(amp, x.device):
        got = common.encode_in_groups(network, 5, x)
    assert seen == [(True, torch.bfloat16) if amp == "bf16" else (False, torch.float32)] * 2
    assert not torch.is_autocast_enabled("cpu") and [y.dtype for y in got] == [torch.float32] * 2


def test_pieces_work_alone(monkeypatch):
    """The source of MoCo's mechanics by itself passes the same oracles."""
    for names in (
        ("Queue",),
        ("momentum_update",),
        ("encode_in_groups",),
        ("NegativeLogSumExp", "negative_logsumexp"),
        ("processes", "rank", "all_gather", "shuffle", "unshuffle"),
    ):
        for name, alone in zip(names, lifted("common.py", *names), strict=True):
            monkeypatch.setattr(common, name, alone)
    test_queue_holds_the_newest_keys_in_ring_order(5, [4, 4, 4, 4])
    test_momentum_update_is_the_formula_and_leaves_buffers()
    test_groups_have_their_own_batch_statistics()
    test_only_the_first_group_updates_running_statistics()
    test_negatives_have_the_gradient_of_their_value()
    x, permutation = torch.arange(6.0), torch.tensor([3, 1, 5, 0, 2, 4])
    assert torch.equal(common.shuffle(x, permutation), permutation.float())
    assert torch.equal(common.unshuffle(common.shuffle(x, permutation), permutation), x)


def test_chunked_negatives_equal_the_whole_in_value_and_gradient():
    rng = torch.Generator().manual_seed(0)
    q = torch.randn(20, 2, generator=rng, dtype=torch.float64, requires_grad=True)
    queue = torch.nn.functional.normalize(torch.randn(2**20, 2, generator=rng, dtype=torch.float64), dim=1)
    with LargestTensor() as watch:
        got = common.negative_logsumexp(q, queue, 0.2)  # 16 rows, then 4
    assert watch.elements == 2**24
    weights = torch.arange(1.0, 21, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((got * weights).sum(), q)
    for row in range(20):
        one = q.detach()[row].requires_grad_()
        want = torch.logsumexp(queue @ one / 0.2, 0)
        torch.testing.assert_close(got[row], want, rtol=1e-12, atol=0)
        want = torch.autograd.grad(want * weights[row], one)[0]
        torch.testing.assert_close(gradient[row], want, rtol=1e-10, atol=1e-13)


def test_negatives_have_the_gradient_of_their_value():
    rng = torch.Generator().manual_seed(0)
    q, queue = (torch.randn(n, 3, generator=rng, dtype=torch.float64) for n in (4, 7))
    assert torch.autograd.gradcheck(lambda x: common.negative_logsumexp(x, queue, 0.2), q.requires_grad_())
    torch.testing.assert_close(common.negative_logsumexp(q, queue, 0.2), (q @ queue.T / 0.2).exp().sum(1).log())


def test_cosine_lr():
    values = [common.cosine_lr(0.4, epoch, 8) for epoch in range(8)]
    assert values[0] == 0.4 and values[4] == pytest.approx(0.2) and values[7] == pytest.approx(0.0152241)


# ---- processes

CASES = [
    "setsim --symmetric --geometry 0.5",
    "resim --window 16 16",
    "resim --window 16 16 --preset official",
    "d3ssl --proposals x",
]


def drawn(name, script, rng):
    """A batch of 16 images as the method takes it, in double precision."""
    views = torch.randint(0, 256, (2, 16, 3, 8, 8), generator=rng, dtype=torch.uint8)
    views = views.repeat_interleave(8, 3).repeat_interleave(8, 4)
    places = torch.rand(2, 16, 4, generator=rng, dtype=torch.float64)
    if name == "setsim":
        return [*views, *places]
    if name == "resim":
        return [*views, *(places * 40 + torch.tensor([0, 0, 80, 80]))]  # in pixels
    corner, side = (torch.rand(2, 16, 4, 2, generator=rng, dtype=torch.float64) for _ in range(2))
    boxes = torch.cat([24 * corner, 24 * corner + 20 + 20 * side], 3)
    keep, shift = torch.rand(2, 16, 64, 64, generator=rng) < 0.7, script.shift_range(boxes[1], 64)[0] // 2
    found = torch.randint(0, 5, (16,), generator=rng)
    return [*views, *boxes, keep[0], keep[0, :, ::2, ::2], shift, keep[1], found]


def train_all(folder):
    """Two steps of each case on this process's share of 16 images; what came of them goes to the folder."""
    number, size, device = common.start_processes()
    assert (number, size) == (common.rank(), common.processes()) and device.type == "cpu"
    mine, x = slice(number * 16 // size, (number + 1) * 16 // size), torch.arange(16.0).view(16, 1)
    permutation = torch.randperm(16, generator=common.generator("p"))
    dealt = common.shuffle(x[mine], permutation)
    assert torch.equal(common.all_gather(x[mine]), x) and torch.equal(common.all_gather(dealt), x[permutation])
    assert torch.equal(common.unshuffle(dealt, permutation), x[mine])
    assert agree(number, 1) == [sum(range(size)), size]
    norm = torch.nn.BatchNorm1d(2)
    assert common.synchronised_norms(norm, device) is norm
    normalise = common.normalise
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torchvision.models, "resnet18", TinyResNet)
        patch.setattr(common, "GROUP", 4)
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)  # rounding would hide small differences
        patch.setattr(common, "normalise", lambda images: normalise(images).double())
        for case, (name, *flags) in enumerate(map(str.split, CASES)):
            script, rng = importlib.import_module(name), torch.Generator().manual_seed(0)
            base = "--data x --arch resnet18 --size 64 --batch-size 16 --queue-size 24 --lr 0.5".split()
            method = script.build(script.get_args([*base, *flags]), device).double()
            network = common.distributed(method.query, device)
            optimizer = torch.optim.SGD(method.query.parameters(), 0.05, momentum=0.9)
            for step in range(2):
                batch = [x[mine] for x in drawn(name, script, rng)]
                loss, values = method(network, *([script.Drawn(*batch)] if name == "d3ssl" else batch), step)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            values = torch.tensor([[float(x) for x in values.values()]], dtype=torch.float64), [*values]
            means = dict(zip(values[1], common.all_gather(values[0]).mean(0).tolist(), strict=True))
            gradients = {key: p.grad for key, p in method.query.named_parameters()}
            torch.save((dict(method.state_dict()), gradients, means), f"{folder}/{case}_{size}_{number}.pth")
    if size > 1:
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def one_and_two_processes(tmp_path_factory):
    """The folder of what each case left, trained in one process and in two."""
    folder = tmp_path_factory.mktemp("processes")
    train_all(folder)
    lines = f"import sys\nsys.path[:0] = {[str(ROOT), str(ROOT / 'tests')]}\nimport test_common\n"
    (folder / "worker.py").write_text(f"{lines}test_common.train_all({str(folder)!r})\n")
    text = run(folder / "worker.py", processes=2)
    assert text.count("synchronised batch norm needs CUDA") == 1  # said once
    return folder


@pytest.mark.parametrize("number", range(len(CASES)), ids=CASES)
def test_one_process_equals_two(number, one_and_two_processes):
    """Weights, gradients, queues, logged values: 16 images in one process or 8 in each of two, groups of 4, two steps.

    Rank 0 also has the running statistics and counters of one process (B17), which are those that are exported. ReSim's
    P4 negatives are gathered over both, P3's are the group's own; D3SSL's backgrounds, too.
    """
    script, *flags = CASES[number].split()
    one, first, second = (torch.load(one_and_two_processes / f"{number}_{name}.pth") for name in ("1_0", "2_0", "2_1"))
    learned = [name for name in one[0] if "running" not in name and "tracked" not in name]
    assert len(learned) < len(one[0]) and first[0].keys() == one[0].keys()
    near = dict(rtol=1e-7, atol=1e-9)  # double precision, sums in another order
    torch.testing.assert_close(first[0], one[0], **near)
    for other in (first, second):
        torch.testing.assert_close(*({name: x[0][name] for name in learned} for x in (other, one)), **near)
        torch.testing.assert_close(other[1], one[1], rtol=1e-5, atol=1e-9)
        for name, value in one[2].items():
            if not name.startswith(("std", "positives")):  # a spread and a ratio within each process
                assert other[2][name] == pytest.approx(value, rel=1e-7)
    assert all(torch.equal(first[0][name], second[0][name]) for name in learned)  # ranks agree bitwise
    assert script != "resim" or min(one[2]["valid_p4"], one[2]["valid_p3"]) > 0.05
    keys, queue = (4, "bank") if script == "d3ssl" else (2 if "--symmetric" in flags else 1, "image_queue")
    assert one[0][f"{queue}.pointer"].item() == 2 * keys * 16 % 24


def test_a_process_without_a_gpu_is_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", None)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(common.UserError, match="process 2 of this machine .* at most --nproc_per_node 2"):
        common.start_processes()
