"""The smallest model of every family of timm is trained, exported and loaded, or is refused early."""

import inspect
import json
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import timm
import torch

from bincomm.backbone_arguments import ARCHITECTURE
from bincomm.building import create_networks
from bincomm.config import PretrainConfig
from bincomm.engine.export import export_backbone
from bincomm.networks import create_backbone, feature_width
from bincomm.weights import load_weights, read_metadata

TABLE = """
beit=beit_base_patch16_224 byoanet=halonet_h1 byobnet=test_byobnet cait=cait_xxs24_224 coat=coat_tiny
convit=convit_tiny convmixer=convmixer_1024_20_ks9_p14 convnext=test_convnext cpubone=cpubone_nano
crossvit=crossvit_tiny_240 csatv2=csatv2 cspnet=cs3darknet_focus_s cspnext=cspnext_tiny davit=davit_tiny
deepseek_vit=deepseek_vit_412m deit=deit_tiny_patch16_224 densenet=densenet121 dla=dla34 dpn=dpn68
edgenext=edgenext_xx_small efficientformer=efficientformer_l1 efficientformer_v2=efficientformerv2_s0
efficientnet=test_efficientnet efficientvim=efficientvim_m1 efficientvit_mit=efficientvit_b0
efficientvit_msra=efficientvit_m0 eva=vit_tiny_patch16_dinov3_qkvb fasternet=fasternet_t0
fastvit=fastvit_t12 focalnet=focalnet_tiny_srf gcvit=gcvit_xxtiny gemma4_vit=gemma4_vit_167m
ghostnet=ghostnet_050 hardcorenas=hardcorenas_a hgnet=hgnetv2_b0 hiera=hiera_tiny_224
hieradet_sam2=sam2_hiera_tiny hrnet=hrnet_w18_small iformer=iformer_t inception_next=inception_next_atto
inception_resnet_v2=inception_resnet_v2 inception_v3=inception_v3 inception_v4=inception_v4
lcnetv2=lcnetv2_small levit=levit_128s lowformer=lowformer_b0 mambaout=test_mambaout
maxxvit=test_coatnet metaformer=poolformerv2_s12 mlp_mixer=gmixer_12_224 mobilenetv3=lcnet_035
mobilenetv5=mobilenetv5_base mobilevit=mobilevit_xxs mvitv2=mvitv2_tiny
naflexvit=naflexvit_base_patch16_gap nasnet=nasnetalarge nest=nest_tiny nextvit=nextvit_small
nfnet=test_nfnet pit=pit_ti_224 pnasnet=pnasnet5large pvt_v2=pvt_v2_b0 qwen3_vit=qwen3_vit_88m
rdnet=rdnet_tiny regnet=regnetx_002 repghost=repghostnet_050 repvit=repvit_m0_9 res2net=res2net50_14w_8s
resnest=resnest14d resnet=test_resnet resnetv2=resnetv2_18 rexnet=rexnet_100 selecsls=selecsls42
senet=legacy_seresnet18 sequencer=sequencer2d_s shvit=shvit_s1 sknet=skresnet18 starnet=starnet_s050
swiftformer=swiftformer_xs swin_transformer=swin_tiny_patch4_window7_224
swin_transformer_v2=swinv2_tiny_window8_256 swin_transformer_v2_cr=swinv2_cr_tiny_224
tiny_vit=tiny_vit_5m_224 tnt=tnt_s_legacy_patch16_224 tresnet=tresnet_m twins=twins_svt_small vgg=vgg11
visformer=visformer_tiny vision_transformer=test_vit vision_transformer_hybrid=vit_tiny_r_s16_p8_224
vision_transformer_relpos=test_vit_relpos vision_transformer_sam=samvit_base_patch16_224
vitamin=vitamin_small_224 volo=volo_d1_224 vovnet=vovnet39a xception=legacy_xception
xception_aligned=xception41p xcit=xcit_nano_12_p8_224
"""
FAMILIES = dict(entry.split("=") for entry in TABLE.split())
# Too large, or at the sizes that they take too slow, for more than their shapes.
ONLY_SHAPES = {"beit", "byoanet", "deepseek_vit", "gemma4_vit", "inception_resnet_v2", "inception_v4"}
ONLY_SHAPES |= {"mobilenetv5", "naflexvit", "nasnet", "pnasnet", "qwen3_vit", "vgg", "vision_transformer_sam"}
# Of different kinds, in less than two seconds each.
USUAL = ["byobnet", "convit", "convnext", "efficientnet", "levit", "maxxvit", "nfnet", "repghost"]
USUAL += ["resnet", "vision_transformer", "vision_transformer_relpos"]
# Sides of global and local crops: those of the tests, then what some need: one size, or a large one.
SIZES = [(64, 32), (64, 64), (256, 128), (224, 224), (240, 240)]
# Numbers that constructors take and that describe no network to pretrain: channels of the images, classes,
# what comes out besides features, how it is computed, and the size that weights from elsewhere had.
NOT_DESCRIBING = {"in_chans", "num_classes", "return_interm_layers", "named_blocks", "out_features"}
NOT_DESCRIBING |= {"pos_embs", "fork_feat", "inference_mode", "head", "aux_logits", "msfa_indices"}
NOT_DESCRIBING |= {"use_checkpoint"}
NOT_DESCRIBING |= {"msfa_output_resolution", "pretrained_window_sizes", "use_aux_head", "use_mix_token"}


def fitting(name):
    """The first of `SIZES` whose crops a model takes; the others are refused with a reason in one line."""
    for sizes in SIZES:
        backbone, _ = create_backbone(name, sizes[0])
        try:
            feature_width(backbone, list(sizes))
            return sizes
        except ValueError as error:
            refused = str(error)
        assert refused.startswith("backbone: ")
        assert "\n" not in refused
        assert not refused.endswith(": ")
    raise AssertionError(f"{name} takes crops of none of these sizes")


def check(name, folder):
    """Two views through both networks and back, then the file, from which timm and bincomm make it again."""
    size, local_size = fitting(name)
    keys = {"backbone": name, "global_size": size, "local_size": local_size, "local_crops": 1, "hidden": 8}
    keys |= {"bits": 8, "precision": "fp32"}
    device = torch.device("cpu")
    refused, keys["drop_path"] = "", 0.1
    try:
        student, teacher = create_networks(PretrainConfig(**keys), device)
    except ValueError as error:
        refused, keys["drop_path"] = str(error), 0.0
        student, teacher = create_networks(PretrainConfig(**keys), device)
    assert refused.startswith(f"drop_path: expected 0, because {name} has no stochastic") or not refused
    logits = student(torch.randn(2, 1, 3, size, size), torch.randn(2, 1, 3, local_size, local_size))
    assert logits.shape == (2, 2, 8)
    logits.square().mean().backward()
    assert any(p.grad is not None for p in student.backbone.parameters())
    export_backbone(teacher, PretrainConfig(**keys), folder)
    file, image = folder / "model.safetensors", torch.randn(1, 3, size, size)
    known = read_metadata(str(file))
    again, _ = create_backbone(known["backbone"], known["global_size"], **known["backbone_args"])
    load_weights(again, str(file))
    with safetensors.safe_open(file, "pt") as opened:
        by_timm = timm.create_model(**json.loads(opened.metadata()["create_model"]))
    by_timm.load_state_dict(safetensors.torch.load_file(file))
    of_folder = timm.create_model(f"local-dir:{folder}", pretrained=True)
    with torch.no_grad():
        for other in (again, by_timm, of_folder):
            torch.testing.assert_close(other.eval()(image), teacher.backbone.eval()(image))


def test_every_family_of_timm_is_tested():
    missing = sorted(set(timm.list_modules()) - set(FAMILIES))
    if timm.__version__ == "1.0.31":
        assert not missing, "add their smallest models to TABLE"
    assert not {*ONLY_SHAPES, *USUAL} - set(FAMILIES)


@pytest.mark.slow
@pytest.mark.parametrize("family", USUAL)
def test_a_family_is_trained_exported_and_loaded(family, tmp_path):
    check(FAMILIES[family], tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("family", sorted({*FAMILIES} - {*USUAL} - ONLY_SHAPES))
def test_other_families_are_trained_exported_and_loaded(family, tmp_path: Path):
    if not timm.list_models(module=family):
        pytest.skip("this version of timm has it not")
    check(FAMILIES[family], tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_family_needs_no_argument_that_is_refused(family):
    """On the meta device, which has shapes only. The large models' features are looked at, too."""
    if not timm.list_models(module=family):
        pytest.skip("this version of timm has it not")
    side = 256
    with torch.device("meta"):
        backbone, made_with = create_backbone(FAMILIES[family], side)
        if family in ONLY_SHAPES:
            patch = 252 if family == "deepseek_vit" else side  # whose patches have 14 pixels
            backbone, made_with = create_backbone(FAMILIES[family], patch)
            assert backbone.eval()(torch.zeros(1, 3, patch, patch)).ndim == 2
    plain = (bool, int, float, tuple, list, str)
    named = {
        name
        for name, parameter in inspect.signature(type(backbone).__init__).parameters.items()
        if isinstance(parameter.default, plain)
    }
    assert named - ARCHITECTURE <= NOT_DESCRIBING
    assert set(made_with) <= {*ARCHITECTURE, "model_name", "num_classes"}
