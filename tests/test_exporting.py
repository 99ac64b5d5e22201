"""ONNX files: they compute what PyTorch does, for any number of images, or are not written."""

import json
import sys
from pathlib import Path

import pytest
import torch

from bincomm import api, cli, exporting
from bincomm.config import PretrainConfig
from bincomm.engine.export import export_backbone
from bincomm.evaluation.pretrained import Pretrained
from bincomm.exporting import export_onnx
from bincomm.networks import Head, Network, PrototypeHead, create_backbone

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

SIZE = 32


SMALL = {"test_vit": {"depth": 1}, "test_resnet": {"layers": [1] * 4}, "test_convnext": {"depths": [1] * 4}}


def pretrained(name="test_vit", prototypes=0, size=SIZE):
    """A backbone and a small head."""
    arguments = SMALL.get(name, {})
    config = PretrainConfig(
        output="tiny",
        backbone=name,
        backbone_args=arguments,
        global_size=size,
        eval_crop=0.9,
        mean=(0.1, 0.2, 0.3),
        precision="fp32",
    )
    backbone, _ = create_backbone(name, size, **arguments)
    width = backbone.num_features
    head = PrototypeHead(width, 16, 40, prototypes) if prototypes else Head(width, 16, 40)
    return Pretrained.of(Network(backbone, head), config, torch.device("cpu"))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return pretrained()


def computed(path, images):
    """Outputs of a file by name."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [each.name for each in session.get_inputs()] == ["images"]
    names = [each.name for each in session.get_outputs()]
    values = session.run(None, {"images": images.numpy()})
    return dict(zip(names, map(torch.from_numpy, values), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "convnext_atto"])
def test_features_of_published_networks_are_those_of_pytorch(name, tmp_path):
    model = pretrained(name, size=64)
    export_onnx(model, tmp_path / "model.onnx")
    images = torch.randn(3, 3, 64, 64)
    features, expected = computed(tmp_path / "model.onnx", images)["features"], model.backbone(images)
    assert (features - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_convnext"])
def test_a_file_computes_the_features_of_any_number_of_images(name, tmp_path):
    model = pretrained(name)
    exported = export_onnx(model, tmp_path / "model.onnx")
    assert (exported.size, exported.features, exported.bits) == (SIZE, model.backbone.num_features, None)
    assert exported.difference < 1e-4
    for count in (1, 2, 5):
        images = torch.randn(count, 3, SIZE, SIZE)
        outputs = computed(tmp_path / "model.onnx", images)
        assert outputs.keys() == {"features"}
        torch.testing.assert_close(outputs["features"], model.backbone(images), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("prototypes", [0, 7])
def test_codes_are_another_output(prototypes, tmp_path):
    model = pretrained(prototypes=prototypes)
    assert export_onnx(model, tmp_path / "model.onnx", codes=True).bits == 40
    images = torch.randn(5, 3, SIZE, SIZE)
    outputs = computed(tmp_path / "model.onnx", images)
    features = model.backbone(images)
    torch.testing.assert_close(outputs["features"], features, rtol=1e-4, atol=1e-5)
    assert outputs["bits"].dtype == torch.bool
    assert torch.equal(outputs["bits"], model.head.code(features) > 0)


@pytest.mark.slow
def test_a_file_says_how_images_are_preprocessed_and_nothing_of_the_machine(model, tmp_path):
    for name in ("model.onnx", "again.onnx"):
        export_onnx(model, tmp_path / name)
    data = (tmp_path / "model.onnx").read_bytes()
    assert data == (tmp_path / "again.onnx").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.onnx", "model.onnx"]
    for word in (b"site-packages", b".py", str(Path.home()).encode() + b"/"):
        assert word not in data
    onnx.checker.check_model(onnx.load_from_string(data), full_check=True)
    properties = {each.key: each.value for each in onnx.load_from_string(data).metadata_props}
    assert properties.pop("interpolation") == "bicubic"
    assert {key: json.loads(value) for key, value in properties.items()} == {
        "input_size": [3, SIZE, SIZE], "crop_pct": 0.9, "mean": [0.1, 0.2, 0.3], "std": [0.229, 0.224, 0.225]
    }  # fmt: skip


@pytest.fixture(scope="module")
def converted(model):
    """The network with bits, converted once."""
    network = exporting.WithBits(model.backbone, model.head).eval()
    return exporting.convert(network, [3, SIZE, SIZE], ["features", "bits"])


def wrong(outputs, what):
    """Outputs that differ in one number."""
    features, bits = (each.copy() for each in outputs)
    if what == "NaN":
        features[0, 0] = float("nan")
    elif what == "features":
        features[-1, -1] += 1e-3 * abs(features).max()
    else:
        bits[:] = ~bits
    return features, bits


@pytest.mark.slow
@pytest.mark.parametrize(
    "what, words",
    [
        ("features", "differ by 0.001 of the largest, expected at most 0.0001; the file was not written"),
        ("NaN", "differ by nan"),
        ("bits", "bits of ONNX Runtime and PyTorch differ"),
        ("batch", "ONNX Runtime cannot run it, so it was not written: .*"),
    ],
)
def test_a_file_that_computes_something_else_is_not_written(
    what, words, model, converted, tmp_path, monkeypatch
):
    class Session(onnxruntime.InferenceSession):
        def run(self, names, inputs):
            if what == "batch":
                inputs = {"images": inputs["images"][:, :2]}
            outputs = super().run(names, inputs)
            return wrong(outputs, what)

    monkeypatch.setattr(exporting, "convert", lambda *arguments: converted)
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    (tmp_path / "model.onnx").write_text("before")
    with pytest.raises(ValueError, match=f"onnx: .*{words}"):
        export_onnx(model, tmp_path / "model.onnx", codes=True)
    assert (tmp_path / "model.onnx").read_text() == "before"
    assert len(list(tmp_path.iterdir())) == 1


def test_what_cannot_be_exported_is_told_before_the_work(model, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.onnx, "export", None)
    without = Pretrained("a file", model.backbone, None, model.config, model.device)
    with pytest.raises(ValueError, match="codes: expected a run's directory or a checkpoint, got a file"):
        export_onnx(without, tmp_path / "model.onnx", codes=True)
    monkeypatch.setattr(exporting, "LARGEST", 1000)
    with pytest.raises(ValueError, match="onnx: expected weights of less than 2 GiB, .* got .* GiB"):
        export_onnx(model, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_network_that_cannot_be_converted_is_named(model, tmp_path):
    class Choosing(torch.nn.Module):
        def forward(self, images):
            return images.flatten(1) if images.sum() > 0 else images

    strange = Pretrained("strange", Choosing().eval(), None, model.config, model.device)
    with pytest.raises(ValueError, match="onnx: Choosing cannot be converted: "):
        export_onnx(strange, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def folder(model, tmp_path):
    """A folder with the backbone alone."""
    (tmp_path / "run").mkdir()
    export_backbone(Network(model.backbone, model.head), model.config, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.slow
def test_the_command_writes_it_in_another_size(model, folder, tmp_path, capsys):
    file = tmp_path / "model.onnx"
    assert cli.main(["export", str(folder), "--onnx", str(file), "--global_size", "48"]) == 0
    printed = capsys.readouterr().out
    assert f"{file}: images (n, 3, 48, 48) -> features (n, {model.backbone.num_features})\n" in printed
    images = torch.randn(2, 3, 48, 48)
    expected = api.load_pretrained(folder, "cpu", global_size=48).backbone(images)
    torch.testing.assert_close(computed(file, images)["features"], expected, rtol=1e-4, atol=1e-5)


def test_the_command_says_what_is_wrong(folder, tmp_path, capsys, monkeypatch):
    assert cli.main(["export", str(folder), "--onnx", str(tmp_path)]) == 2
    assert "onnx: expected a file in a folder that can be written" in capsys.readouterr().err
    assert cli.main(["export", str(folder), "--onnx", str(tmp_path / "a.onnx"), "--codes"]) == 2
    assert "no head" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert cli.main(["export", str(folder), "--onnx", str(tmp_path / "a.onnx")]) == 1
    assert "pip install 'bincomm[export]'" in capsys.readouterr().err
    assert not (tmp_path / "a.onnx").exists()
