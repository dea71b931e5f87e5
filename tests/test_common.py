"""common.py: images, queues, groups, processes, checkpoints and the loader of anybody's weights."""

import argparse
import errno
import json
import math
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import torch
import torchvision
from helpers import ROOT, command, lifted, write_images
from PIL import Image

import common

# ----------------------------------------------------------------------------------------------------------------------
# images
# ----------------------------------------------------------------------------------------------------------------------


def gradient(width=12, height=8):
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return np.stack([x, y, 255 - x], 2).astype(np.uint8)


def test_read_image_gives_rgb_for_every_mode(tmp_path):
    rgb, grey = Image.fromarray(gradient()), Image.fromarray(gradient()[:, :, 0])
    rgb.save(tmp_path / "rgb.png")
    assert np.array_equal(common.read_image(tmp_path / "rgb.png"), gradient())

    grey.save(tmp_path / "grey.png")
    want = np.repeat(gradient()[:, :, :1], 3, 2)
    assert np.array_equal(common.read_image(tmp_path / "grey.png"), want)

    Image.fromarray(gradient()[:, :, 0].astype(np.uint16) * 257).save(tmp_path / "grey16.png")
    assert np.array_equal(common.read_image(tmp_path / "grey16.png"), want)

    palette = rgb.quantize(200)
    palette.save(tmp_path / "palette.png")
    assert np.array_equal(common.read_image(tmp_path / "palette.png"), palette.convert("RGB"))

    rgb.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    assert np.abs(np.asarray(common.read_image(tmp_path / "cmyk.jpg"), int) - gradient()).mean() < 12

    alpha = np.dstack([gradient(), np.repeat([[0] * 6 + [255] * 6], 8, 0)]).astype(np.uint8)
    Image.fromarray(alpha).save(tmp_path / "alpha.png")
    got = np.asarray(common.read_image(tmp_path / "alpha.png"))
    assert (got[:, :6] == 255).all() and np.array_equal(got[:, 6:], gradient()[:, 6:])

    Image.fromarray(gradient()[:, :, 0] > 100).save(tmp_path / "bits.png")
    assert set(np.unique(common.read_image(tmp_path / "bits.png"))) == {0, 255}

    frames = [Image.new("RGB", (5, 5), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    red, _, blue = common.read_image(tmp_path / "moving.gif").getpixel((0, 0))
    assert red > 240 and blue < 10

    for image in tmp_path.iterdir():
        assert common.read_image(image).mode == "RGB"


def test_read_image_turns_by_exif(tmp_path):
    image = Image.fromarray(gradient())
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned a quarter clockwise
    image.save(tmp_path / "turned.png", exif=exif)
    got = np.asarray(common.read_image(tmp_path / "turned.png"))
    assert np.array_equal(got, np.rot90(gradient(), -1))


def test_one_pixel_and_huge_images(tmp_path):
    Image.new("RGB", (1, 1), "red").save(tmp_path / "one.png")
    assert common.read_image(tmp_path / "one.png").size == (1, 1)
    Image.new("L", (12000, 9000)).save(tmp_path / "huge.png")  # 108 megapixels: Pillow warns, and it is read
    assert common.read_image(tmp_path / "huge.png").size == (12000, 9000)


def test_broken_images_are_oserrors(tmp_path):
    Image.effect_noise((64, 64), 90).save(tmp_path / "whole.jpg")
    data = (tmp_path / "whole.jpg").read_bytes()
    for name, content in {"half.jpg": data[: len(data) // 2], "empty.jpg": b"", "text.jpg": b"no image"}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(OSError):
            common.read_image(tmp_path / name)


def test_folder_lists_images_recursively_in_order(tmp_path):
    write_images(tmp_path / "b", 2)
    write_images(tmp_path / "a" / "deep", 1)
    (tmp_path / "a" / "notes.txt").write_text("no image")
    (tmp_path / "b" / "._0000.png").write_bytes(b"hidden")
    (tmp_path / "b" / "again").symlink_to(tmp_path)  # a loop
    assert common.list_images(tmp_path) == ["a/deep/0000.png", "b/0000.png", "b/0001.png"]
    images = common.ImageFolder(tmp_path)
    assert len(images) == 3 and images.name(2) == "b/0001.png" and images[2][1] == 0
    write_images(tmp_path / "train" / "class", 4)
    assert len(common.ImageFolder(tmp_path)) == 4  # train/ alone, where there is one


def test_names_in_any_script(tmp_path):
    write_images(tmp_path, 1)
    os.rename(tmp_path / "0000.png", os.fsencode(tmp_path) + b"/\xff caf\xc3\xa9.png")  # not even valid UTF-8
    assert common.ImageFolder(tmp_path)[0][1] == 0


def test_folder_errors(tmp_path):
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "missing"):
        with pytest.raises(common.UserError, match="images"):
            common.ImageFolder(path)


def test_fingerprint_knows_the_files_and_not_the_folder(tmp_path):
    one, two = (common.ImageFolder(write_images(tmp_path / name, 3)).fingerprint() for name in ("one", "two"))
    assert one == two
    os.rename(tmp_path / "two" / "0002.png", tmp_path / "two" / "0003.png")
    assert common.ImageFolder(tmp_path / "two").fingerprint() != one


def test_unreadable_images_are_replaced_named_and_counted(tmp_path, capsys):
    write_images(tmp_path, 200)
    (tmp_path / "0000.png").write_bytes(b"broken")
    (tmp_path / "0199.png").write_bytes(b"broken")
    images = common.ImageFolder(tmp_path)
    assert images[199][1] == 2 and np.array_equal(
        images[199][0], images[1][0]
    )  # past the end, around, to the next good one
    bad = common.BadImages(images)
    bad.note(torch.tensor([199, 5, 0]), torch.tensor([2, 0, 1]))
    bad.share()
    bad.note(torch.tensor([199]), torch.tensor([2]))
    bad.share()
    assert bad.found == {0, 199} and capsys.readouterr().out.count("unreadable image") == 2
    bad.note(torch.tensor([7]), torch.tensor([1]))
    with pytest.raises(common.UserError, match="3 of 200 images cannot be read"):
        bad.share()


def test_a_folder_of_broken_images_ends(tmp_path):
    for i in range(30):
        (tmp_path / f"{i}.png").write_bytes(b"broken")
    images = common.ImageFolder(tmp_path)
    assert images[0][1] == common.TRIES
    bad = common.BadImages(images)
    bad.note(torch.tensor([0]), torch.tensor([images[0][1]]))
    with pytest.raises(common.UserError, match="cannot be read"):
        bad.share()


# ----------------------------------------------------------------------------------------------------------------------
# randomness, batches
# ----------------------------------------------------------------------------------------------------------------------


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


def test_batches_are_the_same_for_any_number_of_processes_and_after_a_resume():
    def batches(rank, size, start=0, stop=9):
        return list(common.Batches(26, 8, common.World(rank, size, 0, None), seed=3, start=start, stop=stop))

    whole = batches(0, 1)
    assert [a + b for a, b in zip(batches(0, 2), batches(1, 2), strict=True)] == whole
    assert batches(0, 1, start=4) == whole[4:]
    for epoch in range(3):  # three steps of 8 from 26 images, every image at most once an epoch
        seen = [index for batch in whole[3 * epoch : 3 * epoch + 3] for _, index in batch]
        assert len(set(seen)) == 24 and {e for batch in whole[3 * epoch : 3 * epoch + 3] for e, _ in batch} == {epoch}
    assert [i for _, i in whole[0]] != [i for _, i in whole[3]] and whole[0][0][1] != 0


# ----------------------------------------------------------------------------------------------------------------------
# networks
# ----------------------------------------------------------------------------------------------------------------------


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


def test_groups_have_their_own_batch_statistics():
    norm, x = torch.nn.BatchNorm1d(4, affine=False), torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
    (got,) = common.encode_in_groups(lambda group: (norm(group),), 5, x)
    for part, group in ((got[:5], x[:5]), (got[5:], x[5:])):
        torch.testing.assert_close(part, (group - group.mean(0)) / (group.var(0, unbiased=False) + norm.eps).sqrt())
    sizes = []
    common.encode_in_groups(lambda group: (sizes.append(len(group)) or group,), 4, x)
    assert sizes == [4, 3, 3]


def test_pieces_work_alone(monkeypatch):
    """The source of MoCo's mechanics by itself passes the same oracles."""
    for names in (
        ("Queue",),
        ("momentum_update",),
        ("encode_in_groups",),
        ("world_size", "all_gather", "shuffle", "unshuffle"),
    ):
        for name, alone in zip(names, lifted("common.py", *names), strict=True):
            monkeypatch.setattr(common, name, alone)
    test_queue_holds_the_newest_keys_in_ring_order(5, [4, 4, 4, 4])
    test_momentum_update_is_the_formula_and_leaves_buffers()
    test_groups_have_their_own_batch_statistics()
    x, permutation = torch.arange(6.0), torch.tensor([3, 1, 5, 0, 2, 4])
    assert torch.equal(common.shuffle(x, permutation), permutation.float())
    assert torch.equal(common.unshuffle(common.shuffle(x, permutation), permutation), x)


def test_cosine_lr():
    values = [common.cosine_lr(0.4, epoch, 8) for epoch in range(8)]
    assert (
        values[0] == 0.4
        and values[4] == pytest.approx(0.2)
        and values[7] == pytest.approx(0.2 * (1 + math.cos(7 * math.pi / 8)))
    )


# ----------------------------------------------------------------------------------------------------------------------
# anybody's weights
# ----------------------------------------------------------------------------------------------------------------------


def resnet_weights(seed):
    torch.manual_seed(seed)
    weights = torchvision.models.resnet18().state_dict()
    return {name: tensor for name, tensor in weights.items() if not name.startswith("fc.")}


def prefixed(prefix, weights, **more):
    return {prefix + name: tensor for name, tensor in weights.items()} | more


GOOD, OTHER = resnet_weights(0), resnet_weights(1)
HEAD = {"fc.0.weight": torch.zeros(2, 2), "fc.2.bias": torch.zeros(2)}
LAYOUTS = {
    "plain": GOOD | {"fc.weight": torch.zeros(10, 512)},
    "moco": {"epoch": 200, "arch": "resnet18", "optimizer": {"state": {}}, "state_dict": prefixed("module.encoder_k.", OTHER)
             | prefixed("module.encoder_q.", GOOD | HEAD, **{"module.queue": torch.zeros(4)})},
    "setsim released": {"state_dict": prefixed("module.encoder_q.0.", GOOD) | prefixed("module.encoder_k.0.", OTHER)
                        | prefixed("module.encoder_q.1.", HEAD)},
    "resim": {"state_dict": prefixed("module.encoder_q.", GOOD | {"fpn_lateral5.weight": torch.zeros(2)})},
    "densecl raw": {"state_dict": prefixed("backbone.", GOOD, **{"neck.mlp.0.weight": torch.zeros(2), "queue": torch.zeros(2)})},
    "pixpro": {"model": prefixed("module.encoder_k.", OTHER) | prefixed("module.encoder.", GOOD)
               | prefixed("module.projector.", {"linear1.weight": torch.zeros(2)}), "opt": argparse.Namespace(arch="resnet18")},
    "soco": {"model": prefixed("module.encoder.", GOOD) | prefixed("module.head.", {"conv1.weight": torch.zeros(3)}),
             "model_ema": prefixed("encoder.", OTHER)},
    "simsiam": {"state_dict": prefixed("module.encoder.", GOOD | HEAD) | prefixed("module.predictor.", HEAD)},
    "swav": prefixed("module.", GOOD | {"projection_head.0.weight": torch.zeros(2), "prototypes.weight": torch.zeros(2)}),
    "dino": {"student": prefixed("module.backbone.", OTHER), "teacher": prefixed("backbone.", GOOD), "args": argparse.Namespace(out=pathlib.PosixPath("x"))},
    "infomin": {"model": prefixed("module.encoder.", GOOD) | prefixed("module.head.", HEAD), "best": np.float64(3)},
    "detector on C4": prefixed("backbone.", {k: v for k, v in GOOD.items() if not k.startswith("layer4.")})
    | prefixed("roi_heads.box_head.", {k: v for k, v in GOOD.items() if k.startswith("layer4.")} | HEAD),
    "ours": {"script": "setsim", "model": prefixed("key.trunk.", OTHER) | prefixed("query.trunk.", GOOD)},
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("legacy", [False, True])
def test_load_backbone_understands(layout, legacy, tmp_path):
    torch.save(LAYOUTS[layout], tmp_path / "file.pth", _use_new_zipfile_serialization=not legacy)
    weights, line = common.load_backbone(tmp_path / "file.pth", "resnet18")
    assert weights.keys() == GOOD.keys() and all(torch.equal(weights[name], GOOD[name]) for name in GOOD)
    assert "file.pth" in line and "120 tensors" in line
    left = {"plain": 1, "moco": 123, "ours": 120, "detector on C4": 2}
    assert layout not in left or f"; {left[layout]} others" in line
    common.ResNetTrunk("resnet18").load_state_dict(weights)


def test_load_backbone_refuses_a_single_missing_or_misshapen_tensor(tmp_path):
    for name in ("conv1.weight", "layer3.0.downsample.1.running_var", "layer4.1.bn2.weight"):
        for broken in (
            {k: v for k, v in GOOD.items() if k != name},
            GOOD | {name: torch.zeros(3)},
            GOOD | {name: GOOD[name] * float("nan")},
        ):
            torch.save({"state_dict": prefixed("module.", broken)}, tmp_path / "file.pth")
            with pytest.raises(common.UserError) as error:
                common.load_backbone(tmp_path / "file.pth", "resnet18")
            assert name in str(error.value) and "\n" not in str(error.value)
    torch.save(GOOD, tmp_path / "file.pth")
    with pytest.raises(common.UserError, match="check --arch"):
        common.load_backbone(tmp_path / "file.pth", "resnet50")
    without = {k: v for k, v in GOOD.items() if "num_batches" not in k}  # files of old PyTorch
    torch.save(without, tmp_path / "file.pth")
    weights, line = common.load_backbone(tmp_path / "file.pth", "resnet18")
    assert weights.keys() == GOOD.keys() and "; 0 others" in line


def test_load_backbone_does_not_guess_whose_last_stage_it_is(tmp_path):
    body = {name: tensor for name, tensor in GOOD.items() if not name.startswith("layer4.")}
    stage = {name: tensor for name, tensor in GOOD.items() if name.startswith("layer4.")}
    for state in (
        prefixed("encoder_q.", body) | prefixed("encoder_k.", body) | prefixed("encoder_k.head.", stage),
        prefixed("a.", body) | prefixed("b.", stage) | prefixed("c.", stage),
        body,
    ):
        torch.save(state, tmp_path / "file.pth")
        with pytest.raises(common.UserError, match="no ResNet in it"):
            common.load_backbone(tmp_path / "file.pth", "resnet18")


class Evil:
    def __reduce__(self):
        return print, ("code from a checkpoint was run",)


def test_load_backbone_never_runs_code(tmp_path, capsys):
    torch.save({"state_dict": GOOD, "evil": Evil()}, tmp_path / "evil.pth")
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "empty.pth").write_text("")
    for name in ("evil", "text", "empty", "missing"):
        with pytest.raises(common.UserError) as error:
            common.load_backbone(tmp_path / f"{name}.pth", "resnet18")
        assert "\n" not in str(error.value)
        assert "two options" not in str(error.value)  # torch's advice to trust the file
    assert capsys.readouterr().out == ""


def test_imagenet_weights_offline_are_one_clear_line(monkeypatch):
    def refuse(*args, **kwargs):
        raise common.urllib.error.URLError("no network")

    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", refuse)
    with pytest.raises(common.UserError, match="cannot be downloaded"):
        common.load_backbone("imagenet", "resnet18")


# ----------------------------------------------------------------------------------------------------------------------
# checkpoints, log
# ----------------------------------------------------------------------------------------------------------------------


def test_saving_replaces_the_old_file_only_when_the_new_one_is_whole(tmp_path, monkeypatch):
    path = tmp_path / "x.pth"
    common.save_atomically({"a": 1}, path)
    monkeypatch.setattr(
        common.os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    )  # killed before renaming
    with pytest.raises(KeyboardInterrupt):
        common.save_atomically({"a": 2}, path)
    assert torch.load(path) == {"a": 1}
    monkeypatch.undo()
    common.save_atomically({"a": 3}, path)
    assert torch.load(path) == {"a": 3} and os.listdir(tmp_path) == ["x.pth"]


def test_full_disk(tmp_path, monkeypatch):
    path = tmp_path / "x.pth"
    common.save_atomically({"a": 1}, path)

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(common.os, "fsync", full)
    with pytest.raises(common.UserError, match="no space left"):
        common.save_atomically({"a": 2}, path)
    assert torch.load(path) == {"a": 1} and os.listdir(tmp_path) == ["x.pth"]


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    checkpoints, trunk = common.Checkpoints(tmp_path, "x", {}), torch.nn.Linear(2, 2)
    checkpoints.save({"net.pth": trunk.state_dict()}, step=1)
    with torch.no_grad():
        trunk.bias[0] = float("nan")
    with pytest.raises(common.UserError, match="no longer finite at step 2"):
        checkpoints.save({"net.pth": trunk.state_dict()}, step=2)
    assert torch.load(tmp_path / "checkpoint.pth")["step"] == 1


def test_log_drops_what_comes_after_the_checkpoint_and_torn_lines(tmp_path):
    log = common.RunLog(tmp_path, {"command": "x"}, 0, 9, True)
    for step in range(1, 6):
        log.write({"step": step})
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 6, "lo')
    common.RunLog(tmp_path, {"command": "y"}, 3, 9, True)
    assert [json.loads(line) for line in open(tmp_path / "log.jsonl")] == [
        {"command": "x"},
        {"step": 1},
        {"step": 2},
        {"step": 3},
    ]
    common.RunLog(tmp_path, {"command": "y"}, 0, 9, True)
    assert [json.loads(line) for line in open(tmp_path / "log.jsonl")] == [{"command": "y"}]
    common.RunLog(tmp_path / "nowhere", {}, 0, 9, False).write({})  # other ranks write nothing


def test_meter_takes_means_and_stops_at_nan():
    meter = common.Meter(4)
    for x in (1.0, 3.0):
        meter.add({"loss": torch.tensor(x), "n": torch.tensor(2 * x)})
    means = meter.means(2)
    assert means["loss"] == 2 and means["n"] == 4 and means["images_per_s"] > 0
    assert list(meter.timed([1, 2])) == [1, 2]
    meter.add({"loss": torch.tensor(float("nan")), "n": torch.tensor(0.0)})
    with pytest.raises(common.UserError, match=r"not finite \(steps 1 to 3\)"):
        meter.means(3)


def test_curves_are_drawn(tmp_path):
    with open(tmp_path / "log.jsonl", "w") as file:
        file.write('{"command": "x"}\n' + "".join(f'{{"step": {i}, "loss": {i}, "flat": 3}}\n' for i in range(5)))
    common.draw_curves(tmp_path, {"a": ["loss", "=flat"], "b": ["absent"]})
    assert Image.open(tmp_path / "curves.png").size[0] > 600


# ----------------------------------------------------------------------------------------------------------------------
# processes
# ----------------------------------------------------------------------------------------------------------------------

WORKER = """
import sys, torch
sys.path.insert(0, {root!r})
import common, setsim, resim, d3ssl
torch.set_num_threads(1)
world = common.start_processes()
share = 16 // world.size
mine = slice(world.rank * share, (world.rank + 1) * share)
x = torch.arange(16.0).view(16, 1)
permutation = torch.randperm(16, generator=common.generator("p"))
dealt = common.shuffle(x[mine], permutation)
assert torch.equal(common.all_gather(x[mine]), x)
assert torch.equal(common.all_gather(dealt), x[permutation])
assert torch.equal(common.unshuffle(dealt, permutation), x[mine])
assert common.agree(world.rank, 1) == [sum(range(world.size)), world.size]
assert common.mean_over_processes(torch.tensor([world.rank * 2.0])).item() == world.size - 1

torch.Tensor.float = torch.Tensor.double  # rounding would hide small differences
normal = common.normalise
common.normalise = lambda images: normal(images).double()


def images(rng):
    return torch.randint(0, 256, (2, 16, 3, 8, 8), generator=rng, dtype=torch.uint8).repeat_interleave(8, 3).repeat_interleave(8, 4)


def two_views(method, network, rng, step):
    views, places = images(rng), torch.rand(2, 16, 4, generator=rng, dtype=torch.float64)
    if isinstance(method, resim.ReSimMoCo):
        places = places * 40 + torch.tensor([0, 0, 80, 80])  # in pixels
    return method(network, views[0][mine], views[1][mine], places[0][mine], places[1][mine], step, world.rank)


def regions(method, network, rng, step):
    views, corner = images(rng), torch.rand(2, 16, 4, 2, generator=rng, dtype=torch.float64) * 24
    boxes = torch.cat([corner, corner + 20 + 20 * torch.rand(2, 16, 4, 2, generator=rng, dtype=torch.float64)], 3)
    keep = torch.rand(2, 16, 64, 64, generator=rng) < 0.7
    shift = d3ssl.shift_range(boxes[1], 64)[0] // 2
    found = torch.randint(0, 5, (16,), generator=rng)
    drawn = d3ssl.Drawn(*views, *boxes, keep[0], keep[0, :, ::2, ::2], shift, keep[1], found)
    return method(network, d3ssl.Drawn(*(x[mine] for x in drawn)), step)


for number, (name, flags) in enumerate({cases!r}):
    script = dict(setsim=setsim, resim=resim, d3ssl=d3ssl)[name]
    base = "--data x --arch resnet18 --size 64 --batch-size 16 --group-size 4 --queue-size 24 --dim 16 --lr 0.5"
    args = script.get_args([*base.split(), *flags.split()])
    method = script.build(args, world, *([9] if name == "d3ssl" else [])).double()
    network = method.query if world.size == 1 else torch.nn.parallel.DistributedDataParallel(method.query)
    optimizer = torch.optim.SGD(method.query.parameters(), 0.05, momentum=0.9)
    rng = torch.Generator().manual_seed(0)
    for step in range(2):
        loss, values = (regions if name == "d3ssl" else two_views)(method, network, rng, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    means = dict(zip(values, common.mean_over_processes(torch.stack(list(values.values()))).tolist()))
    state = {{key: x for key, x in method.state_dict().items() if "running" not in key and "tracked" not in key}}
    gradients = {{key: p.grad for key, p in method.query.named_parameters()}}
    torch.save((state, gradients, means), {out!r} + f"/{{number}}_{{world.size}}_{{world.rank}}.pth")
if world.size > 1: torch.distributed.destroy_process_group()
"""
WINDOWS = "--window 16 12 --stride 16 12"
CASES = [
    ("setsim", "--symmetric --geometry 0.5"),
    ("resim", WINDOWS),
    ("resim", f"{WINDOWS} --preset official"),
    ("d3ssl", "--proposals x"),
]


@pytest.fixture(scope="module")
def one_and_two_processes(tmp_path_factory):
    """The folder of what each case left, trained in one process and in two."""
    folder = tmp_path_factory.mktemp("processes")
    (folder / "worker.py").write_text(WORKER.format(root=str(ROOT), out=str(folder), cases=CASES))
    for n in (0, 2):
        done = subprocess.run(command(folder / "worker.py", processes=n), capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("number", range(len(CASES)), ids=[" ".join(case) for case in CASES])
def test_one_process_equals_two(number, one_and_two_processes):
    """Weights, gradients, queues, logged values: 16 images in one process or 8 in each of two, groups of 4, two steps.

    ReSim's P4 negatives are gathered over both, P3's are the group's own; D3SSL's backgrounds, too.
    """
    (script, flags), folder = CASES[number], one_and_two_processes
    one, first, second = (torch.load(folder / f"{number}_{name}.pth") for name in ("1_0", "2_0", "2_1"))
    for other in (first, second):
        torch.testing.assert_close(other[0], one[0], rtol=1e-7, atol=1e-9)  # double precision, sums in another order
        torch.testing.assert_close(other[1], one[1], rtol=1e-5, atol=1e-9)
        for name, value in one[2].items():
            if not name.startswith(("std", "positives")):  # a spread and a ratio within each process
                assert other[2][name] == pytest.approx(value, rel=1e-7)
    assert all(torch.equal(first[0][name], second[0][name]) for name in first[0])  # ranks agree bitwise
    keys, queue = (4, "bank") if script == "d3ssl" else (2 if "symmetric" in flags else 1, "image_queue")
    assert one[0][f"{queue}.pointer"].item() == 2 * keys * 16 % 24


# ----------------------------------------------------------------------------------------------------------------------
# progress and pictures
# ----------------------------------------------------------------------------------------------------------------------


def test_progress_without_a_terminal_is_a_line_every_ten_seconds(monkeypatch, capsys):
    clock = iter(range(0, 1000, 6))  # seconds; twice looked at in each line, once without
    monkeypatch.setattr(common.time, "time", lambda: next(clock))
    assert list(common.progress("abcdef", 8, 2, what="letters")) == list("abcdef")
    assert capsys.readouterr().out.splitlines()[0] == "4/8 letters, 0.1 a second, eta 0:00:48"
    assert list(common.progress([1, 3, 0], 4, what="MB", size=lambda item: item)) == [1, 3, 0]
    assert capsys.readouterr().out.startswith("4/4 MB, 0.2 a second, eta 0:00:")


def test_a_figure_is_written_whole_and_closed(tmp_path, monkeypatch):
    plt = common.pyplot()
    figure, axes = plt.subplots(figsize=(2, 1))
    axes.plot([1, 2])
    common.save_figure(figure, tmp_path / "a.png", dpi=50)
    before = (tmp_path / "a.png").read_bytes()
    assert Image.open(tmp_path / "a.png").size == (100, 50) and not plt.fignum_exists(figure.number)

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(common.UserError, match="a.png"):
        common.save_figure(plt.figure(), tmp_path / "a.png", dpi=50)
    assert (tmp_path / "a.png").read_bytes() == before and os.listdir(tmp_path) == ["a.png"]
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(common.UserError, match="pip install matplotlib"):
        common.pyplot()
