"""What a file or a command line may say of a backbone: names and plain numbers, nothing that acts.

timm.create_model also takes arguments that fetch addresses, read files and write caches. The arguments of a
backbone may come from someone else's checkpoint, .safetensors file or recipe, so only those that describe an
architecture are passed on.
"""

import difflib
import math
import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# Arguments of timm's constructors that numbers express, or names that timm looks up in its own tables.
NAMES = """
aa_layer aa_stem_only abs_win_pos_embed act_layer always_partition attn attn_act_layer attn_drop_rate
attn_groups attn_head_dim_reduction attn_mlp attn_mlp_ratio attn_only_layer_scale attn_pool_mlp_ratio
attn_pool_num_heads attn_ratio attn_stage attn_type attn_types attn_upsample avg_down b base_dim
base_dims base_width basic bias bidirectional block_config block_reduce_first block_type bn_size
bottle_ratio bottleneck_width_ratio cardinality ch_div channel_attention channel_attn_v2
channel_multiplier channels class_token cls_attn_layers cls_ratio conv_bias conv_init conv_mlp
conv_ratio cpe_act crop_scale d2_scales deepen_factor depth depth_list depth_mult depth_token_only
depths dim dim_mul dims distillation distilled down_kernel_size down_op down_ops down_pad
down_patch_size down_stride downsample downsample_block downsample_expand_ratios downsample_kernel_size
downsample_padding downsample_ratio downsamples drop drop_block_rate drop_block_size drop_path_rate
drop_rate dropout dw_act_layer dynamic_img_pad dynamic_img_size embed_dim embed_dims encoder_pool eta
expand_groups expand_ratio expansion_ratio extra_norm_period extra_norm_stage fc_act_layer fc_norm
feature_dim ffn ffn_ratio final_chs final_norm first_stride fix_init fix_stem focal_levels focal_windows
fused_conv fused_downsample global_att_blocks global_attn_indexes global_block_counts global_pool
global_pos_size group groups growth_rate growth_rates head_bias head_dim head_fn head_hidden_size
head_init_scale head_mul head_norm head_norm_first head_widths heads hidden_size hidden_sizes img_scale
img_size inc_sec init_channels init_values initial_chs inner_dim inplanes input_3x3 intermediate_size
is_downsample_block k_r k_sec kernel_size kernel_sizes kernels key_dim layer_scale
layer_scale_init_value layer_scale_init_values layers layerscale_value legacy levels linear lkc_use_act
local_conv_size local_mbconv_norm local_up_to_layer locality_strength ls_init_value mask_unit_attn
mask_unit_size mbconv_expand_ratio memory_efficient merge_size mix_block_ratio mlp_act mlp_bias
mlp_ratio mlp_ratio_token_only mlp_ratios multi_conv n_div neck_chans nlhb no_embed_class norm_eps
norm_layer norm_layer_cl normalize_modulator num_blocks num_blocks_list num_features num_heads
num_heads_inner num_heads_outer num_init_features num_kv_heads num_levels num_reg_tokens num_rnn_layers
num_vit outlook_attention output_stride pad_type parallel_depth partial_dim patch_drop_rate patch_kernel
patch_norm patch_padding patch_size patch_sizes patch_stride pconv_fw_type pool_include_prefix pool_size
pool_type pooling_kernel_size pooling_scale pos_drop_rate pos_embed pos_embed_grid_size
position_embedding_size post_layers pre_norm preact proj_bias proj_drop_rate q_pool q_stride qk_dim
qk_norm qkv_bias qkv_fused ref_feat_shape reg_tokens rel_pos_dim rel_pos_type reparam replace_stem_pool
repmixer_kernel_size res_scale_init_values rope_grid_indexing rope_grid_offset rope_mrope_section
rope_rotate_half rope_temperature rope_theta rope_type scale scale_attn_inner scale_attn_norm scale_mlp
scale_mlp_norm se_downsamples se_from_exp se_ratio sep_pos_embed sequential_attn serial_depths
shared_rel_pos shortcut_root small small_kernels spatial_conv sr_ratios ssd_expand stages standardize
state_dim stem_bias stem_chs stem_expand_ratio stem_hidden_dim stem_kernel_size stem_mid_norm stem_norm
stem_size stem_stride stem_type stem_use_scale_branch stem_width strict_img_size stride strides
swiglu_align_to swiglu_mlp token_mixers tokens_norm transformer_depths transformer_drop_path
transition_compression_ratio types union use_abs_pos use_abs_pos_emb use_clipped_linears use_conv
use_expand_proj use_fc_norm use_grn use_lab use_layer_scale use_mlp_head use_msfa use_overlap_down
use_pos_emb use_pos_embed use_post_norm use_post_norm_in_modulation use_post_transformer_norm
use_pre_transformer_norm use_rel_pos use_rel_pos_bias use_rope use_rot_pos_emb use_shared_rel_pos_bias
v2 version vit_stem weight_init widen_factor width width_factor width_list width_mult widths
window_ratio window_size window_sizes window_spec with_fc wss zero_init_last
"""
ARCHITECTURE = frozenset(NAMES.split())
LARGEST = 10**6  # of a number; no layer is as wide
DEEPEST = 4  # of lists in lists


def is_plain_name(name: Any) -> bool:
    """Whether a name of a model is neither an address nor a path to timm."""
    return isinstance(name, str) and re.fullmatch(r"\w+(\.\w+)?", name, re.ASCII) is not None


def check_backbone_name(name: Any, argument: str) -> None:
    """Refuse what timm would take for an address or a path; whether there is such a model is asked later.

    Raises:
        ValueError: it is no plain name; the message begins with `argument`.
    """
    if not is_plain_name(name):
        raise ValueError(f"{argument}: expected the name of a timm model, such as resnet18, got {name!r}")


def backbone_names() -> list[str]:
    """Names of timm's models, by alphabet; none without timm. They are read from its source, because
    importing it takes seconds."""
    timm = find_spec("timm")
    if timm is None or timm.origin is None:
        return []
    sources = (path.read_text() for path in Path(timm.origin).parent.glob("models/*.py"))
    return sorted(name for text in sources for name in re.findall(r"^@register_model\ndef (\w+)", text, re.M))


def check_backbone_arguments(arguments: Any) -> None:
    """Refuse all but what describes an architecture.

    Args:
        arguments: of timm.create_model, by name: numbers, booleans, None, words, and lists of them.

    Raises:
        ValueError: another argument, or another kind of value; the message names it.
    """
    if not isinstance(arguments, Mapping):
        raise ValueError(
            f'backbone_args: expected a mapping, got {arguments!r}; for example {{"layers": [1, 1, 1, 1]}}'
        )
    for name, value in arguments.items():
        if name not in ARCHITECTURE:
            near = difflib.get_close_matches(str(name), ARCHITECTURE, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(
                "backbone_args: expected arguments that describe a network, such as layers or depth, "
                f"got {name!r}{hint}"
            )
        if not _is_plain(value, DEEPEST):
            raise ValueError(
                f"backbone_args: {name}: expected numbers up to {LARGEST}, words or lists of them, "
                f"got {repr(value)[:100]}"
            )


def _is_plain(value: Any, depth: int) -> bool:
    if isinstance(value, list | tuple):
        return depth > 0 and len(value) <= 1000 and all(_is_plain(each, depth - 1) for each in value)
    if isinstance(value, str):
        return re.fullmatch(r"\w{0,64}", value, re.ASCII) is not None
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or (isinstance(value, int) and abs(value) <= LARGEST)
