"""Which architectures the backbone table tries: of every timm module at least one.

Of each module the smallest member worth using, and one of each further line of architectures that
the module holds; of a module with large ones only, the smallest. The ``test_`` models of timm are
added by name.
"""

from __future__ import annotations

from typing import Any

TEST_MODELS = (
    "test_byobnet test_coatnet test_convnext test_convnext2 test_convnext3 test_efficientnet "
    "test_efficientnet_evos test_efficientnet_gn test_efficientnet_ln test_mambaout test_maxvit "
    "test_nfnet test_resnet test_vit test_vit2 test_vit3 test_vit4 test_vit_relpos"
)

# by timm module
FAMILIES = {
    "beit": "beit_base_patch16_224 beitv2_base_patch16_224",
    "byoanet": "botnet26t_256 eca_halonext26ts lambda_resnet26t",
    "byobnet": "gernet_s mobileone_s1 repvgg_a0 regnetz_b16 resnet50_clip bat_resnext26ts",
    "cait": "cait_xxs24_224",
    "coat": "coat_tiny coat_lite_tiny",
    "convit": "convit_tiny",
    "convmixer": "convmixer_768_32",
    "convnext": "convnext_atto convnext_tiny convnext_base convnextv2_atto",
    "cpubone": "cpubone_nano",
    "crossvit": "crossvit_tiny_240",
    "csatv2": "csatv2",
    "cspnet": "cs3darknet_focus_s cspresnet50 darknet53",
    "cspnext": "cspnext_tiny",
    "davit": "davit_tiny",
    "deepseek_vit": "deepseek_vit_412m",
    "deit": "deit_tiny_patch16_224 deit_tiny_distilled_patch16_224 deit3_small_patch16_224",
    "densenet": "densenet121",
    "dla": "dla34 dla46x_c",
    "dpn": "dpn68",
    "edgenext": "edgenext_xx_small",
    "efficientformer": "efficientformer_l1",
    "efficientformer_v2": "efficientformerv2_s0",
    "efficientnet": (
        "tf_efficientnet_lite0 tf_efficientnet_lite1 efficientnet_b0 tf_efficientnetv2_b0 "
        "mixnet_s mnasnet_small mobilenetv1_100 mobilenetv2_050 tinynet_e"
    ),
    "efficientvim": "efficientvim_m1",
    "efficientvit_mit": "efficientvit_b0 efficientvit_l1",
    "efficientvit_msra": "efficientvit_m0",
    "eva": (
        "eva02_tiny_patch14_224 vit_small_patch16_dinov3 vit_small_patch16_rope_224 "
        "vit_pe_spatial_tiny_patch16_512"
    ),
    "fasternet": "fasternet_t0",
    "fastvit": "fastvit_t8 fastvit_mci0",
    "focalnet": "focalnet_tiny_srf",
    "gcvit": "gcvit_xxtiny",
    "gemma4_vit": "gemma4_vit_167m gemma4_vit_167m_enc",
    "ghostnet": "ghostnet_100 ghostnetv2_100 ghostnetv3_100",
    "hardcorenas": "hardcorenas_a",
    "hgnet": "hgnetv2_b0 hgnet_tiny",
    "hiera": "hiera_tiny_224 hiera_small_abswin_256",
    "hieradet_sam2": "sam2_hiera_tiny hieradet_small",
    "hrnet": "hrnet_w18_small hrnet_w18_ssld",
    "iformer": "iformer_t",
    "inception_next": "inception_next_atto",
    "inception_resnet_v2": "inception_resnet_v2",
    "inception_v3": "inception_v3",
    "inception_v4": "inception_v4",
    "lcnetv2": "lcnetv2_small",
    "levit": "levit_128s levit_conv_128s",
    "lowformer": "lowformer_b0 lowformer_e1",
    "mambaout": "mambaout_femto",
    "maxxvit": "coatnet_pico_rw_224 maxvit_pico_rw_256 maxxvit_rmlp_nano_rw_256",
    "metaformer": "poolformer_s12 caformer_s18 convformer_s18",
    "mlp_mixer": "mixer_s32_224 gmlp_ti16_224 resmlp_12_224",
    "mobilenetv3": (
        "mobilenetv3_small_050 lcnet_050 fbnetv3_b mobilenetv4_conv_small "
        "mobilenetv4_hybrid_medium"
    ),
    "mobilenetv5": "mobilenetv5_base",
    "mobilevit": "mobilevit_xxs mobilevitv2_050",
    "mvitv2": "mvitv2_tiny",
    "naflexvit": "naflexvit_base_patch16_gap",
    "nasnet": "nasnetalarge",
    "nest": "nest_tiny",
    "nextvit": "nextvit_small",
    "nfnet": "nf_regnet_b0 eca_nfnet_l0",
    "pit": "pit_ti_224",
    "pnasnet": "pnasnet5large",
    "pvt_v2": "pvt_v2_b0",
    "qwen3_vit": "qwen3_vit_88m qwen3_vit_88m_merge",
    "rdnet": "rdnet_tiny",
    "regnet": "regnetx_002 regnety_002 regnetz_005",
    "repghost": "repghostnet_050",
    "repvit": "repvit_m0_9",
    "res2net": "res2net50_14w_8s",
    "resnest": "resnest14d",
    "resnet": "resnet10t resnet18 resnet50 resnext50_32x4d seresnet50 ecaresnet26t",
    "resnetv2": "resnetv2_18 resnetv2_50x1_bit",
    "rexnet": "rexnet_100",
    "selecsls": "selecsls42b",
    "senet": "legacy_seresnet18",
    "sequencer": "sequencer2d_s",
    "shvit": "shvit_s1",
    "sknet": "skresnet18",
    "starnet": "starnet_s050",
    "swiftformer": "swiftformer_xs",
    "swin_transformer": (
        "swin_tiny_patch4_window7_224 swin_s3_tiny_224 swin_base_patch4_window7_224"
    ),
    "swin_transformer_v2": "swinv2_tiny_window8_256",
    "swin_transformer_v2_cr": "swinv2_cr_tiny_224",
    "tiny_vit": "tiny_vit_5m_224",
    "tnt": "tnt_s_patch16_224",
    "tresnet": "tresnet_m",
    "twins": "twins_pcpvt_small twins_svt_small",
    "vgg": "vgg11 vgg11_bn",
    "visformer": "visformer_tiny",
    "vision_transformer": (
        "vit_tiny_patch16_224 vit_small_patch14_dinov2 vit_small_patch14_reg4_dinov2 "
        "vit_base_patch32_clip_224 vit_base_patch16_siglip_224 flexivit_small"
    ),
    "vision_transformer_hybrid": "vit_tiny_r_s16_p8_224 vit_small_resnet26d_224",
    "vision_transformer_relpos": "vit_relpos_small_patch16_224",
    "vision_transformer_sam": "samvit_base_patch16_224",
    "vitamin": "vitamin_small_224",
    "volo": "volo_d1_224",
    "vovnet": "ese_vovnet19b_slim_dw vovnet39a",
    "xception": "legacy_xception",
    "xception_aligned": "xception41",
    "xcit": "xcit_nano_12_p8_224 xcit_nano_12_p16_224",
}

# what ConditionedBackbone needs to be told: 768 x 768 pixels need more memory than a trial has
OPTIONS: dict[str, dict[str, Any]] = {
    "gemma4_vit_167m": {"input_size": [96, 96]},
    "gemma4_vit_167m_enc": {"input_size": [96, 96]},
}

# the paper's, or what comes closest, and a few smaller ones: what the table at 256 x 256 holds
SHORTLIST = (
    "tf_efficientnet_lite0 tf_efficientnet_lite1 efficientnet_b0 mobilenetv3_small_050 resnet18 "
    "resnet50 convnextv2_atto convnext_tiny convnext_base convnext_large "
    "swin_tiny_patch4_window7_224 swin_base_patch4_window7_224 vit_small_patch14_dinov2 "
    "vit_small_patch16_dinov3"
)


def model_names() -> list[str]:
    """Every architecture, the ``test_`` models first."""
    return " ".join([TEST_MODELS, *FAMILIES.values()]).split()
