import json
from copy import deepcopy

import pytest
import timm
import torch

from bincomm.networks import (
    Head,
    Network,
    PrototypeHead,
    create_backbone,
    create_teacher,
    feature_width,
    update_teacher,
)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("vit_tiny_patch16_224", {"depth": 2}),
        ("test_convnext", {}),
        ("resnet10t", {}),
        ("test_efficientnet", {}),
        ("mobilenetv3_small_050", {}),  # its features are wider than `num_features`
        ("swin_tiny_patch4_window7_224", {"depths": (1, 1, 1, 1), "strict_img_size": False}),
    ],
)
def test_backbones_take_crops_of_two_sizes_and_can_be_made_again(name, arguments):
    backbone, made_with = create_backbone(name, 64, **arguments)
    network = Network(backbone, Head(feature_width(backbone, [64, 32]), 16, 24))
    assert backbone.training
    logits = network(torch.randn(3, 2, 3, 64, 64), torch.randn(3, 4, 3, 32, 32))
    assert logits.shape == (6, 3, 24)
    timm.create_model(**json.loads(json.dumps(made_with))).load_state_dict(backbone.state_dict())


def test_crops_a_backbone_cannot_take_are_refused():
    backbone, _ = create_backbone("test_vit", 64)
    with pytest.raises(ValueError, match="backbone: VisionTransformer cannot take crops of 15 pixels: .*15"):
        feature_width(backbone, [64, 15])


def test_views_come_out_in_their_order():
    backbone = create_backbone("test_convnext", 64)[0].eval()
    network = Network(backbone, Head(feature_width(backbone, [64]), 16, 24))
    large, small = torch.randn(3, 2, 3, 64, 64), torch.randn(3, 4, 3, 32, 32)
    logits = network(large, small)
    torch.testing.assert_close(logits[1, 2], network.head(backbone(large[2:, 1]))[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits[5, 0], network.head(backbone(small[:1, 3]))[0], rtol=1e-4, atol=1e-5)


def test_errors_name_backbone_and_argument():
    with pytest.raises(ValueError, match="backbone: .*vit_tinny.*did you mean vit_tiny"):
        create_backbone("vit_tinny_patch16_224", 32)
    with pytest.raises(ValueError, match="backbone_args: .*nonsense"):
        create_backbone("resnet18", 32, nonsense=3)
    with pytest.raises(ValueError, match="backbone: resnet18 .*patch_size"):  # it describes others
        create_backbone("resnet18", 32, patch_size=3)


def test_head_is_drawn_as_stated_and_reset_depends_on_the_generator_alone():
    head = Head(200, 300, 64)
    for widths, stds in (((200, 300), (0.0392, 0.0523, 0.0523)), ((768, 2048), (0.02, 0.02, 0.02))):
        layers = Head(*widths, 64).layers
        weights = [layer.weight for layer in layers if hasattr(layer, "weight")]
        for weight, std in zip(weights, stds, strict=True):
            assert weight.std().item() == pytest.approx(std, rel=0.05)
        doubled = Head(*widths, 64, std=0.04).layers[0].weight.std().item()
        assert doubled == pytest.approx(2 * stds[0], rel=0.05)
    other = Head(200, 300, 64)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.fill_(7.0)
    head.reset(torch.Generator().manual_seed(5))
    torch.rand(3)  # the global generator plays no part
    other.reset(torch.Generator().manual_seed(5))
    for mine, theirs in zip(head.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert all((layer.bias == 0).all() for layer in head.layers if hasattr(layer, "bias"))


@torch.no_grad()
def test_initial_logits_are_of_one_size_whatever_the_widths():
    """Of features of variance 1; a head that is not scaled would have logits from 0.002 to 0.3."""
    torch.manual_seed(0)
    features = torch.randn(256, 2048)
    for width in (64, 256, 768, 2048):
        for hidden in (128, 512, 2048):
            logits = Head(width, hidden, 256)(features[:, :width])
            assert logits.std().item() == pytest.approx(0.142, rel=0.15)


def test_scores_are_those_of_a_weight_normalized_layer():
    """Against torch's own weight normalization with its magnitudes at 1: scores and gradients."""
    head = PrototypeHead(20, 30, 12, 50, std=0.2).double()
    layer = torch.nn.Linear(12, 50, bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(head.prototypes)
    layer = torch.nn.utils.parametrizations.weight_norm(layer)
    magnitudes, rows = (layer.parametrizations.weight.original0, layer.parametrizations.weight.original1)
    torch.nn.init.ones_(magnitudes)
    features, weights = torch.randn(3, 5, 20).double(), torch.randn(3, 5, 50).double()
    scores = head(features)
    bottleneck = head.bottleneck(features)
    expected = layer(bottleneck / bottleneck.norm(dim=-1, keepdim=True))
    torch.testing.assert_close(scores, expected)
    assert scores.abs().max() <= 1
    mine = torch.autograd.grad((scores * weights).sum(), [*head.bottleneck.parameters(), head.prototypes])
    other = torch.autograd.grad((expected * weights).sum(), [*head.bottleneck.parameters(), rows])
    torch.testing.assert_close(mine, other)


def test_the_code_of_a_head_is_what_lies_before_any_normalization():
    features = torch.randn(4, 20)
    plain, prototypes = Head(20, 30, 12), PrototypeHead(20, 30, 12, 50)
    assert torch.equal(plain.code(features), plain(features))
    assert torch.equal(prototypes.code(features), prototypes.bottleneck(features))


def test_prototypes_are_drawn_as_stated_and_reset_depends_on_the_generator_alone():
    head, other = PrototypeHead(20, 30, 64, 500), PrototypeHead(20, 30, 64, 500)
    assert head.prototypes.abs().max().item() == pytest.approx(1 / 8, rel=0.01)
    assert head.prototypes.std().item() == pytest.approx(1 / 8 / 3**0.5, rel=0.02)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.fill_(7.0)
    head.reset(torch.Generator().manual_seed(5))
    torch.rand(3)  # the global generator plays no part
    other.reset(torch.Generator().manual_seed(5))
    for mine, theirs in zip(head.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    plain = Head(20, 30, 64)
    plain.reset(torch.Generator().manual_seed(5))
    assert torch.equal(head.bottleneck.layers[0].weight, plain.layers[0].weight)


def test_a_head_of_prototypes_is_copied_saved_and_averaged_like_any_other(tmp_path):
    head = PrototypeHead(20, 30, 12, 50)
    assert set(head.state_dict()) == {name for name, _ in head.named_parameters()}
    torch.save(head.state_dict(), tmp_path / "head.pt")
    other = PrototypeHead(20, 30, 12, 50)
    other.load_state_dict(torch.load(tmp_path / "head.pt", weights_only=True))
    features = torch.randn(4, 20)
    head(features).sum().backward()  # a copy can be made after a step, too
    for copied in (deepcopy(head), other):
        assert torch.equal(copied(features), head(features))
    student = Network(torch.nn.Identity(), head)
    teacher = create_teacher(student, torch.nn.Identity())
    before = teacher.head.prototypes.clone()
    with torch.no_grad():
        head.prototypes.add_(1.0)
    update_teacher(list(teacher.parameters()), list(student.parameters()), 0.9)
    torch.testing.assert_close(teacher.head.prototypes, before + 0.1)


def test_prototypes_under_autocast():
    head, features = PrototypeHead(20, 30, 12, 50), torch.randn(3, 5, 20)
    exact = head(features)
    with torch.autocast("cpu", torch.bfloat16):
        scores = head(features)
    assert scores.dtype == torch.bfloat16
    assert (scores - exact).abs().max() < 0.02
    scores.float().sum().backward()
    assert head.prototypes.grad.dtype == torch.float32
    assert head.prototypes.grad.isfinite().all()


def test_features_of_zero_have_finite_scores():
    head = PrototypeHead(20, 30, 12, 50)  # its biases are 0, and so is its bottleneck
    scores = head(torch.zeros(3, 20))
    scores.sum().backward()
    assert (scores == 0).all()
    assert all(p.grad.isfinite().all() for p in head.parameters())


def test_teacher_starts_equal_and_follows():
    def backbone():
        return create_backbone("test_convnext", 32)[0]

    student = Network(backbone(), Head(64, 16, 24))
    teacher = create_teacher(student, backbone())
    assert not any(p.requires_grad for p in teacher.parameters())
    for mine, theirs in zip(teacher.parameters(), student.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    before = [p.clone() for p in teacher.parameters()]
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1.0)
    update_teacher(list(teacher.parameters()), list(student.parameters()), 0.9)
    for was, now in zip(before, teacher.parameters(), strict=True):
        torch.testing.assert_close(now, was + 0.1)
