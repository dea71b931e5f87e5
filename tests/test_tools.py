# SPDX-License-Identifier: MIT
"""Names and values of what tools/to_detectron2.py writes, and the feature pyramids of other people's files."""

import os
import pickle
import pickletools

import numpy as np
import pytest
import torch
import torchvision

import harness.weights
import resim
from common import UserError
from harness.weights import load_fpn
from tools import released, to_detectron2

DEPTHS = {"resnet18": ((2, 2, 2, 2), 2), "resnet50": ((3, 4, 6, 3), 3)}  # blocks of res2..res5, convolutions of a block
NORM = "weight bias running_mean running_var".split()
LEVELS = {  # detectron2's name: torchvision's
    f"fpn_{part}{i + 2}": f"{block}.{i}"
    for block, part in (("inner_blocks", "lateral"), ("layer_blocks", "output"))
    for i in range(4)
}
OFFICIAL = "fpn_lateral3 fpn_lateral4 fpn_lateral5 fpn_output3 fpn_output4".split()


def convolutions(arch):
    """(detectron2's name, convolution, norm) of a ResNet with torchvision's modules, by its stages' depths alone."""
    torch.manual_seed(0)
    model = getattr(torchvision.models, arch)()
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.randn_like(tensor))
    depths, count = DEPTHS[arch]
    found = [("stem.conv1", model.conv1, model.bn1)]
    for stage, blocks in enumerate(depths, 2):
        for b in range(blocks):
            block = getattr(model, f"layer{stage - 1}")[b]
            found += [(f"res{stage}.{b}.conv{k}", block.get_submodule(f"conv{k}"), block.get_submodule(f"bn{k}")) for k in range(1, count + 1)]  # fmt: skip
            if b == 0 and (stage > 2 or count == 3):
                found.append((f"res{stage}.0.shortcut", *block.downsample))
    return model, found


def export(*flags):
    """Run the tool, return what its file holds (which this test has just made)."""
    to_detectron2.main([*map(str, flags)])
    with open(flags[1], "rb") as file:
        return pickle.load(file)


@pytest.mark.parametrize("arch, tensors", [("resnet50", 265), ("resnet18", 100)])
def test_names_and_values_of_the_backbone(tmp_path, arch, tensors, capsys):
    model, wanted = convolutions(arch)
    expected = {}
    for name, convolution, norm in wanted:
        expected[f"{name}.weight"] = convolution.weight
        expected |= {f"{name}.norm.{kind}": getattr(norm, kind) for kind in NORM}
    state = {f"module.encoder_q.{name}": tensor for name, tensor in model.state_dict().items()}
    state |= {f"module.encoder_k.{name}": 0 * tensor for name, tensor in model.state_dict().items()}
    torch.save({"epoch": 200, "state_dict": state | {"module.queue": torch.zeros(8, 9)}}, tmp_path / "moco.pth.tar")
    found = export(tmp_path / "moco.pth.tar", tmp_path / "moco.pkl", "--arch", arch)
    assert found.keys() == {"model", "__author__", "matching_heuristics"} and found["matching_heuristics"] is True
    assert found["model"].keys() == expected.keys() and len(expected) == tensors
    for name, tensor in expected.items():
        array = found["model"][name]
        assert type(array) is np.ndarray and array.dtype == np.float32 and array.flags.writeable
        assert torch.equal(torch.from_numpy(array), tensor.detach()), name
    assert f"{tensors} tensors: res2 res3 res4 res5 stem" in capsys.readouterr().out
    # detectron2 takes the longest name that ends a parameter's own: here of C4 and FPN detectors
    for prefix in ("backbone.bottom_up.", "backbone."):
        for name, _, _ in wanted:
            head = "roi_heads." if prefix == "backbone." and name.startswith("res5") else prefix  # C4's res5
            for kind in ("weight", "norm.running_var"):
                ends = [
                    ours
                    for ours in (*expected, *(f"{level}.weight" for level in LEVELS))
                    if f"{head}{name}.{kind}".endswith("." + ours)
                ]
                assert ends == [f"{name}.{kind}"]


def test_the_pickle_is_float32_and_calls_nothing_that_only_some_versions_of_numpy_have():
    x = torch.arange(96.0).view(2, 3, 4, 4)
    tensors = {
        "a": torch.nn.Parameter(x.half().to(memory_format=torch.channels_last)),
        "b": torch.tensor(3.0).bfloat16(),
    }
    data, strings, called = to_detectron2.to_pickle(tensors | {"c": torch.zeros(0, 2)}), [], set()
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name == "STACK_GLOBAL":
            called.add(tuple(strings[-2:]))
        elif isinstance(argument, str):
            strings.append(argument)
        assert opcode.name != "GLOBAL"
    assert called == {("numpy", "ndarray"), ("builtins", "bytearray")}
    found = pickle.loads(data)["model"]
    assert {array.dtype for array in found.values()} == {np.dtype(np.float32)}
    assert np.array_equal(found["a"], x) and found["b"] == 3 and found["b"].shape == () and found["c"].shape == (0, 2)


def test_weights_of_torchvision_need_no_file(tmp_path, monkeypatch):
    state = {name: x for name, x in convolutions("resnet18")[0].state_dict().items() if not name.startswith("fc")}
    monkeypatch.setattr(harness.weights, "load_backbone", lambda source, arch: (state, f"{source} {arch}"))
    assert len(export("imagenet", tmp_path / "supervised.pkl", "--arch", "resnet18")["model"]) == 100


# ---------------------------------------------------------------------------------------------------------- pyramids


def resim_files(folder, preset, *flags):
    """What resim.py leaves behind, and the same in the released layout; the key network is another than the query."""
    args = resim.get_args(["--data", "x", "--arch", "resnet18", "--preset", preset, *flags])
    method = resim.build(args, torch.device("cpu"))
    for name, tensor in method.state_dict().items():
        if name.startswith("query.") and tensor.is_floating_point():
            tensor.copy_(torch.randn_like(tensor))
    for name, module in {"resnet18.pth": method.query.trunk, "fpn.pth": method.query.pyramid}.items():
        harness.weights.save_weights(module, folder / name)
    torch.save({"script": "resim", "settings": {}, "model": method.state_dict()}, folder / "checkpoint.pth")
    torch.save({"epoch": 200, "state_dict": released.to_released(method.state_dict())}, folder / "released.pth.tar")
    return method.query.pyramid


@pytest.mark.parametrize("flags", ["official --queue-size 8", "paper --framework simsiam"])
def test_pyramids_of_resim_become_detectron2s(tmp_path, flags, capsys):
    """Of a run and of a released file. The paper's heads are no output convolutions: laterals are all there is to take."""
    pyramid = resim_files(tmp_path, *flags.split())
    sources, levels = [("resnet18.pth", "fpn.pth"), ("checkpoint.pth", None)], OFFICIAL[:3]
    if "official" in flags:
        sources, levels = [*sources, ("released.pth.tar", None), ("resnet18.pth", "released.pth.tar")], OFFICIAL
    for file, fpn in sources:
        more = ("--fpn", tmp_path / fpn) if fpn else ()
        found = export(tmp_path / file, tmp_path / "resim.pkl", "--arch", "resnet18", *more)["model"]
        assert {name.split(".")[0] for name in found if "fpn" in name} == {*levels}
        assert len(found) == 100 + 2 * len(levels)
        for level in levels:
            layer = pyramid.get_submodule(f"{LEVELS[level]}.0")
            for kind in ("weight", "bias"):
                assert np.array_equal(found[f"{level}.{kind}"], getattr(layer, kind).detach()), (file, level)
    assert "was not taken" not in capsys.readouterr().out
    assert len(export(tmp_path / "resnet18.pth", tmp_path / "resim.pkl", "--arch", "resnet18")["model"]) == 100
    assert "fpn.pth is there and was not taken: add --fpn" in capsys.readouterr().out


def fpn_of(norm, seed):
    """torchvision's FPN of a ResNet-18, all its numbers drawn anew."""
    torch.manual_seed(seed)
    fpn = torchvision.ops.FeaturePyramidNetwork([64, 128, 256, 512], 256, norm_layer=norm)
    for tensor in fpn.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.randn_like(tensor))
    return fpn


LAYOUTS = {  # of torchvision's block, level, layer and kind of tensor
    "detector": lambda b, l, n, k: ("model", f"backbone.fpn.{b}.{l}.{n}.{k}"),
    "resim": lambda b, l, n, k: ("state_dict", f"module.encoder_q.fpn_{('lateral', 'output')[b[0] == 'l']}{l + 2}.{n}.{k}"),
    "soco": lambda b, l, n, k: ("model_ema", f"neck.{('lateral', 'fpn')[b[0] == 'l']}_convs.{l}.{('conv', 'bn')[n]}.{k}"),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pyramids_with_norms_of_every_layout(tmp_path, layout):
    """They arrive whole in torchvision's FPN, and under detectron2's names."""
    theirs, ours, state = fpn_of(torch.nn.BatchNorm2d, 1), fpn_of(torch.nn.BatchNorm2d, 2), {}
    for name, tensor in theirs.state_dict().items():
        block, level, layer, kind = name.split(".")
        container, key = LAYOUTS[layout](block, int(level), int(layer), kind)
        state[key] = tensor
        if "encoder_q" in key:
            state[key.replace("encoder_q", "encoder_k")] = torch.zeros_like(tensor)
    trunk = {f"encoder.{name}": x for name, x in convolutions("resnet18")[0].state_dict().items()}
    torch.save({container: state | trunk}, tmp_path / "file.pth")
    line = load_fpn(ours, tmp_path / "file.pth")
    assert "no place" not in line
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name
    found = export(tmp_path / "file.pth", tmp_path / "file.pkl", "--arch", "resnet18")["model"]
    assert len(found) == 100 + 8 * 5
    for name, place in LEVELS.items():
        convolution, norm = theirs.get_submodule(f"{place}.0"), theirs.get_submodule(f"{place}.1")
        assert np.array_equal(found[f"{name}.weight"], convolution.weight.detach()), name
        for kind in NORM:
            assert np.array_equal(found[f"{name}.norm.{kind}"], getattr(norm, kind).detach()), (name, kind)


def test_what_has_no_place_in_the_detector_is_said(tmp_path):
    """Biases of released ReSim, whose convolutions have no number, where norms follow; C2's lateral and P2, P5 stay."""
    pyramid, ours = fpn_of(None, 1), fpn_of(torch.nn.BatchNorm2d, 2)
    before = {name: x.clone() for name, x in ours.state_dict().items()}
    part = {
        f"inner_blocks.{i}.0.{kind}": f"fpn_lateral{i + 2}.{kind}" for i in (1, 2, 3) for kind in ("weight", "bias")
    }
    state = {f"module.encoder_q.{name}": pyramid.state_dict()[key] for key, name in part.items()}
    torch.save({"state_dict": state}, tmp_path / "resim.pth")
    names = [f"inner_blocks.{i}.0" for i in (1, 2, 3)]
    assert load_fpn(ours, tmp_path / "resim.pth") == (
        f"pyramid: {', '.join(f'{name}.weight' for name in names)} from {tmp_path / 'resim.pth'}; no place in the detector "
        f"(norms have its biases) for {', '.join(f'{name}.bias' for name in names)}"
    )
    for name, tensor in ours.state_dict().items():
        from_file = name.removesuffix(".weight") in names
        assert torch.equal(tensor, pyramid.state_dict()[name] if from_file else before[name]), name


def test_bad_files_leave_nothing_behind(tmp_path):
    resim_files(tmp_path, "official", "--queue-size", "8")
    model, weights = tmp_path / "resnet18.pth", torch.load(tmp_path / "fpn.pth")
    out, small = tmp_path / "out.pkl", ("--arch", "resnet18")
    torch.save([1], tmp_path / "list.pth")
    torch.save({name: x for name, x in weights.items() if ".2." not in name}, tmp_path / "part.pth")
    torch.save(weights | {"inner_blocks.2.0.weight": torch.zeros(256, 1024, 1, 1)}, tmp_path / "wide.pth")
    torch.save(weights | {"layer_blocks.1.0.bias": torch.zeros(128)}, tmp_path / "narrow.pth")
    torch.save(weights | {"layer_blocks.1.0.weight": torch.full((256, 256, 3, 3), torch.nan)}, tmp_path / "nan.pth")
    before = sorted(os.listdir(tmp_path))
    cases = [
        ("has to end in .pkl", model, tmp_path / "out.pth", *small),
        ("check --arch", model, out),  # resnet50
        ("there is no pyramid in it", model, out, *small, "--fpn", model),
        ("there is no pyramid in it", model, out, *small, "--fpn", tmp_path / "list.pth"),
        (r"not a whole pyramid, inner_blocks.2.0.weight \(laterals", model, out, *small, "--fpn", tmp_path / "part.pth"),
        (r"inner_blocks.2.0.weight is \(256, 1024, 1, 1\), wanted \(256, 256, 1, 1\)", model, out, *small, "--fpn", tmp_path / "wide.pth"),
        (r"layer_blocks.1.0.bias is \(128,\), wanted \(256,\)", model, out, *small, "--fpn", tmp_path / "narrow.pth"),
        ("layer_blocks.1.0.weight is not finite", model, out, *small, "--fpn", tmp_path / "nan.pth"),
        ("give a file that can be written", model, tmp_path / "nowhere" / "out.pkl", *small),
    ]  # fmt: skip
    for words, *flags in cases:
        with pytest.raises(UserError, match=words) as error:
            to_detectron2.main([*map(str, flags)])
        assert "\n" not in str(error.value), flags
    assert sorted(os.listdir(tmp_path)) == before
    with pytest.raises(UserError, match="there is no pyramid in it"):
        load_fpn(fpn_of(None, 0), model)
