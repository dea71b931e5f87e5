# SPDX-License-Identifier: MIT
"""Names and values of what tools/to_detectron2.py writes, and the feature pyramids of other people's files."""

import itertools
import pickle
import pickletools

import numpy as np
import pytest
import torch
import torchvision
from helpers import assert_same

import resim
from common import UserError
from harness.weights import load_fpn
from tools import released, to_detectron2

DEPTHS = {"resnet18": ((2, 2, 2, 2), 2), "resnet50": ((3, 4, 6, 3), 3)}  # blocks of res2..res5, convolutions of a block
NORM = "weight bias running_mean running_var".split()
LEVELS = {f"fpn_lateral{i + 2}": f"inner_blocks.{i}" for i in range(4)}  # detectron2's name: torchvision's
LEVELS |= {f"fpn_output{i + 2}": f"layer_blocks.{i}" for i in range(4)}


def drawn_anew(module, seed):
    torch.manual_seed(seed)
    for tensor in module.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.randn_like(tensor))
    return module


def convolutions(arch):
    """(detectron2's name, convolution, norm) of a ResNet with torchvision's modules, by its stages' depths alone."""
    model, (depths, count) = drawn_anew(getattr(torchvision.models, arch)(), 0), DEPTHS[arch]
    found = [("stem.conv1", model.conv1, model.bn1)]
    for stage, b in ((stage, b) for stage, blocks in enumerate(depths, 2) for b in range(blocks)):
        block = getattr(model, f"layer{stage - 1}")[b]
        for k in range(1, count + 1):
            found.append((f"res{stage}.{b}.conv{k}", getattr(block, f"conv{k}"), getattr(block, f"bn{k}")))
        if b == 0 and (stage > 2 or count == 3):
            found.append((f"res{stage}.0.shortcut", *block.downsample))
    return model, found


def named(layers):
    """{name of a tensor: its values} of (name, convolution, norm)."""
    tensors = {f"{name}.weight": convolution.weight.detach() for name, convolution, _ in layers}
    return tensors | {f"{name}.norm.{kind}": getattr(norm, kind).detach() for name, _, norm in layers for kind in NORM}


def export(*flags):
    """Run the tool, return what its file holds (which this test has just made)."""
    to_detectron2.main([*map(str, flags)])
    with open(flags[1], "rb") as file:
        return pickle.load(file)


@pytest.mark.parametrize("arch, tensors", [("resnet50", 265), ("resnet18", 100)])
def test_names_and_values_of_the_backbone(tmp_path, arch, tensors, capsys):
    model, layers = convolutions(arch)
    expected = named(layers)
    state = {f"module.encoder_q.{name}": tensor for name, tensor in model.state_dict().items()}
    state |= {f"module.encoder_k.{name}": 0 * tensor for name, tensor in model.state_dict().items()}
    torch.save({"epoch": 200, "state_dict": state | {"module.queue": torch.zeros(8, 9)}}, tmp_path / "moco.pth.tar")
    found = export(tmp_path / "moco.pth.tar", tmp_path / "moco.pkl", "--arch", arch)
    assert found.keys() == {"model", "__author__", "matching_heuristics"} and found["matching_heuristics"] is True
    assert found["model"].keys() == expected.keys() and len(expected) == tensors
    for name, tensor in expected.items():
        array = found["model"][name]
        assert type(array) is np.ndarray and array.dtype == np.float32 and array.flags.writeable
        assert torch.equal(torch.from_numpy(array), tensor), name
    assert f"{tensors} tensors: res2 res3 res4 res5 stem" in capsys.readouterr().out
    # detectron2 takes the longest name that ends a parameter's own: here of C4 and FPN detectors
    known = [*expected, *(f"{level}.weight" for level in LEVELS)]
    for name in expected:
        for head in ("backbone.bottom_up", "roi_heads" if name.startswith("res5") else "backbone"):
            assert [ours for ours in known if f"{head}.{name}".endswith("." + ours)] == [name]


def test_the_pickle_is_float32_and_calls_nothing_that_only_some_versions_of_numpy_have():
    x = torch.arange(96.0).view(2, 3, 4, 4)
    tensors = {"a": torch.nn.Parameter(x.half().to(memory_format=torch.channels_last)), "c": torch.zeros(0, 2)}
    data, strings, called = to_detectron2.to_pickle(tensors | {"b": torch.tensor(3.0).bfloat16()}), [], set()
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name == "STACK_GLOBAL":
            called.add(tuple(strings[-2:]))
        elif isinstance(argument, str):
            strings.append(argument)
        assert opcode.name != "GLOBAL"
    assert called == {("numpy", "ndarray"), ("builtins", "bytearray")}
    found = pickle.loads(data)["model"]
    assert {array.dtype for array in found.values()} == {np.dtype(np.float32)} and np.array_equal(found["a"], x)
    assert found["b"] == 3 and found["b"].shape == () and found["c"].shape == (0, 2)


@pytest.mark.parametrize("flags", ["official --queue-size 8", "paper --framework simsiam"])
def test_pyramids_of_resim_become_detectron2s(tmp_path, flags, capsys):
    """Of a run and of a released file. The paper's heads are no output convolutions: only laterals can be taken."""
    args = resim.get_args(["--data", "x", "--arch", "resnet18", "--preset", *flags.split()])
    method = resim.build(args, torch.device("cpu"))
    query, state = drawn_anew(method.query, 0), method.state_dict()  # the key network is another
    torch.save(query.trunk.state_dict(), tmp_path / "resnet18.pth")
    torch.save(query.pyramid.state_dict(), tmp_path / "fpn.pth")
    torch.save({"script": "resim", "settings": {}, "model": state}, tmp_path / "checkpoint.pth")
    torch.save({"epoch": 200, "state_dict": released.to_released(state)}, tmp_path / "released.pth")
    sources = [("resnet18.pth", "fpn.pth"), ("checkpoint.pth", None)]
    sources += [("released.pth", None), ("resnet18.pth", "released.pth")] * ("official" in flags)
    levels = "fpn_lateral3 fpn_lateral4 fpn_lateral5 fpn_output3 fpn_output4".split()[: 5 if "official" in flags else 3]
    for file, fpn in sources:
        more = ("--fpn", tmp_path / fpn) if fpn else ()
        found = export(tmp_path / file, tmp_path / "resim.pkl", "--arch", "resnet18", *more)["model"]
        wanted = {f"{level}.{kind}": f"{LEVELS[level]}.0.{kind}" for level in levels for kind in ("weight", "bias")}
        assert {name for name in found if "fpn" in name} == {*wanted} and len(found) == 100 + len(wanted)
        for name, ours in wanted.items():
            assert np.array_equal(found[name], query.pyramid.state_dict()[ours]), (file, name)
    assert "was not taken" not in capsys.readouterr().out
    assert len(export(tmp_path / "resnet18.pth", tmp_path / "resim.pkl", "--arch", "resnet18")["model"]) == 100
    assert "fpn.pth is there and was not taken: add --fpn" in capsys.readouterr().out


def fpn_of(norm, seed):  # torchvision's, of a ResNet-18
    return drawn_anew(torchvision.ops.FeaturePyramidNetwork([64, 128, 256, 512], 256, norm_layer=norm), seed)


LAYOUTS = {  # where tensors lie; the two blocks, level {0} of torchvision is {1} of detectron2; convolution, norm
    "detector": ("model", "backbone.fpn.inner_blocks.{0}", "backbone.fpn.layer_blocks.{0}", "0", "1"),
    "resim": ("state_dict", "module.encoder_q.fpn_lateral{1}", "module.encoder_q.fpn_output{1}", "0", "1"),
    "soco": ("model_ema", "neck.lateral_convs.{0}", "neck.fpn_convs.{0}", "conv", "bn"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pyramids_with_norms_of_every_layout(tmp_path, layout):
    """They arrive whole in torchvision's FPN, and under detectron2's names."""
    theirs, ours, state = fpn_of(torch.nn.BatchNorm2d, 1), fpn_of(torch.nn.BatchNorm2d, 2), {}
    container, lateral, output, *layers = LAYOUTS[layout]
    for name, tensor in theirs.state_dict().items():
        block, level, layer, kind = name.split(".")
        block = (lateral if block == "inner_blocks" else output).format(level, int(level) + 2)
        state[f"{block}.{layers[int(layer)]}.{kind}"] = tensor
    state |= {name.replace("encoder_q", "encoder_k"): 0 * x for name, x in state.items() if "encoder_q" in name}
    trunk = {f"encoder.{name}": x for name, x in convolutions("resnet18")[0].state_dict().items()}
    torch.save({container: state | trunk}, tmp_path / "file.pth")
    assert "no place" not in load_fpn(ours, tmp_path / "file.pth")
    assert_same(ours.state_dict(), theirs.state_dict())
    found = export(tmp_path / "file.pth", tmp_path / "file.pkl", "--arch", "resnet18")["model"]
    assert len(found) == 100 + 8 * 5
    for name, tensor in named([(name, *theirs.get_submodule(place)) for name, place in LEVELS.items()]).items():
        assert np.array_equal(found[name], tensor), name


def test_what_has_no_place_in_the_detector_is_said(tmp_path):
    """Biases of released ReSim, whose convolutions have no number, where norms follow; C2's lateral and P2, P5 stay."""
    pyramid, ours = fpn_of(None, 1), fpn_of(torch.nn.BatchNorm2d, 2)
    before, theirs = {name: x.clone() for name, x in ours.state_dict().items()}, pyramid.state_dict()
    names, place = [f"inner_blocks.{i}.0" for i in (1, 2, 3)], "module.encoder_q.fpn_lateral"
    kinds = itertools.product((1, 2, 3), ("weight", "bias"))
    state = {f"{place}{i + 2}.{kind}": theirs[f"inner_blocks.{i}.0.{kind}"] for i, kind in kinds}
    torch.save({"state_dict": state}, tmp_path / "resim.pth")
    weights, biases = (", ".join(f"{name}.{kind}" for name in names) for kind in ("weight", "bias"))
    source, reason = f"{weights} from {tmp_path / 'resim.pth'}", "no place in the detector (norms have its biases) for"
    assert load_fpn(ours, tmp_path / "resim.pth") == f"pyramid: {source}; {reason} {biases}"
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, theirs[name] if name in weights.split(", ") else before[name]), name


def test_bad_files_leave_nothing_behind(tmp_path):
    weights = fpn_of(None, 0).state_dict()
    files = {
        "resnet18": convolutions("resnet18")[0].state_dict(),
        "part": {name: x for name, x in weights.items() if ".2." not in name},
        "nan": weights | {"layer_blocks.1.0.weight": torch.full((256, 256, 3, 3), torch.nan)},
    }
    for name, content in files.items():
        torch.save(content, tmp_path / f"{name}.pth")
    for flags, words in {
        "out.pth": "has to end in .pkl", "out.pkl --arch resnet50": "check --arch",
        f"out.pkl --fpn {tmp_path}/resnet18.pth": "there is no pyramid in it",
        f"out.pkl --fpn {tmp_path}/part.pth": "not a whole pyramid, inner_blocks.2.0.weight (laterals",
        f"out.pkl --fpn {tmp_path}/nan.pth": "layer_blocks.1.0.weight is not finite",
        "nowhere/out.pkl": "give a file that can be written",
    }.items():  # fmt: skip
        model = ["--arch", "resnet18", f"{tmp_path}/resnet18.pth"]
        with pytest.raises(UserError) as error:
            to_detectron2.main([*model, *f"{tmp_path}/{flags}".split()])
        assert words in str(error.value) and "\n" not in str(error.value), flags
    assert {path.stem for path in tmp_path.iterdir()} == {*files}
