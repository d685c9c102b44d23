"""The models of transformers that have batch norms, small where their size can be chosen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["IMAGE", "MODELS", "build", "image"]

IMAGE = 64  # pixels of a side


def image(size: int = IMAGE, channels: int = 3, batch: int = 2) -> Tensor:
    """A random image batch ``[batch, channels, size, size]``."""
    return torch.randn(batch, channels, size, size)


def build(
    model: str, config: str, options: dict[str, Any], inputs: Callable[[], Any]
) -> tuple[nn.Module, Any]:
    """The model with random weights, and its inputs."""
    import transformers

    made = getattr(transformers, config)(**options)
    return getattr(transformers, model)(made), inputs()


def _pixels(size: int = IMAGE) -> Callable[[], Any]:
    return lambda: {"pixel_values": image(size)}


SMALL_RESNET = {"embedding_size": 16, "hidden_sizes": [32, 64, 96, 128], "depths": [2, 2, 2, 2]}
SMALL_DETR = {
    "d_model": 64,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
}
SMALL_SPEECH = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 96,
    "conv_depthwise_kernel_size": 7,
}
_Made = tuple[str, str, dict[str, Any], Callable[[], Any]]
MODELS: dict[str, _Made] = {
    "resnet": ("ResNetForImageClassification", "ResNetConfig", {}, _pixels()),
    "regnet": ("RegNetForImageClassification", "RegNetConfig", {}, _pixels()),
    "mobilenet_v1": ("MobileNetV1ForImageClassification", "MobileNetV1Config", {}, _pixels()),
    "mobilenet_v2": ("MobileNetV2ForImageClassification", "MobileNetV2Config", {}, _pixels()),
    "mobilenet_v2_deeplab": (
        "MobileNetV2ForSemanticSegmentation",
        "MobileNetV2Config",
        {},
        _pixels(),
    ),
    "efficientnet_b0": (
        "EfficientNetForImageClassification",
        "EfficientNetConfig",
        {"width_coefficient": 1.0, "depth_coefficient": 1.0, "hidden_dim": 1280},
        _pixels(),
    ),
    "align_vision": (
        "AlignVisionModel",
        "AlignVisionConfig",
        {"width_coefficient": 1.0, "depth_coefficient": 1.0, "hidden_dim": 1280},
        _pixels(),
    ),
    "levit": (
        "LevitForImageClassification",
        "LevitConfig",
        {"image_size": 64, "kernel_size": 3},
        _pixels(),
    ),
    "mobilevit": (
        "MobileViTForImageClassification",
        "MobileViTConfig",
        {"image_size": 64},
        _pixels(),
    ),
    "mobilevit_deeplab": (
        "MobileViTForSemanticSegmentation",
        "MobileViTConfig",
        {"image_size": 128},
        _pixels(128),
    ),
    "mobilevitv2": (
        "MobileViTV2ForImageClassification",
        "MobileViTV2Config",
        {"image_size": 64},
        _pixels(),
    ),
    "swiftformer": ("SwiftFormerForImageClassification", "SwiftFormerConfig", {}, _pixels(224)),
    "cvt": ("CvtForImageClassification", "CvtConfig", {"depth": [1, 2, 4]}, _pixels()),
    "textnet": ("TextNetForImageClassification", "TextNetConfig", {}, _pixels()),
    "hgnet_v2": ("HGNetV2ForImageClassification", "HGNetV2Config", {}, _pixels()),
    "efficientloftr": (
        "EfficientLoFTRModel",
        "EfficientLoFTRConfig",
        {},
        lambda: {"pixel_values": torch.randn(1, 2, 3, 128, 128)},
    ),
    "rt_detr_resnet": ("RTDetrResNetBackbone", "RTDetrResNetConfig", SMALL_RESNET, _pixels()),
    "rt_detr": (
        "RTDetrModel",
        "RTDetrConfig",
        {**SMALL_DETR, "num_queries": 20, "anchor_image_size": None},
        _pixels(128),
    ),
    "rt_detr_v2": (
        "RTDetrV2Model",
        "RTDetrV2Config",
        {**SMALL_DETR, "num_queries": 20, "anchor_image_size": None},
        _pixels(128),
    ),
    "d_fine": (
        "DFineModel",
        "DFineConfig",
        {**SMALL_DETR, "num_queries": 20, "anchor_image_size": None},
        _pixels(128),
    ),
    "dpt_batch_norm": (
        "DPTForSemanticSegmentation",
        "DPTConfig",
        {
            "hidden_size": 48,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "image_size": 64,
            "backbone_out_indices": [0, 1, 2, 3],
            "neck_hidden_sizes": [16, 24, 32, 32],
            "fusion_hidden_size": 16,
            "use_batch_norm_in_fusion_residual": True,
        },
        _pixels(),
    ),
    "segformer": (
        "SegformerForSemanticSegmentation",
        "SegformerConfig",
        {"decoder_hidden_size": 64},
        _pixels(),
    ),
    "glpn": ("GLPNForDepthEstimation", "GLPNConfig", {}, _pixels()),
    "beit_segmentation": (
        "BeitForSemanticSegmentation",
        "BeitConfig",
        {
            "hidden_size": 48,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "image_size": 64,
            "out_indices": [1, 2, 3, 4],
        },
        _pixels(),
    ),
    "data2vec_segmentation": (
        "Data2VecVisionForSemanticSegmentation",
        "Data2VecVisionConfig",
        {
            "hidden_size": 48,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "image_size": 64,
            "out_indices": [1, 2, 3, 4],
        },
        _pixels(),
    ),
    "vitpose_classic": (
        "VitPoseForPoseEstimation",
        "VitPoseConfig",
        {"use_simple_decoder": False},
        lambda: {"pixel_values": torch.randn(1, 3, 256, 192)},
    ),
    "zoedepth": (
        "ZoeDepthForDepthEstimation",
        "ZoeDepthConfig",
        {"use_batch_norm_in_fusion_residual": True},
        _pixels(),
    ),
    "upernet_resnet": ("UperNetForSemanticSegmentation", "UperNetConfig", {}, _pixels()),
    "wav2vec2_conformer": (
        "Wav2Vec2ConformerModel",
        "Wav2Vec2ConformerConfig",
        {
            **SMALL_SPEECH,
            "conv_depthwise_kernel_size": 7,
            "num_conv_pos_embedding_groups": 4,
        },
        lambda: {"input_values": torch.randn(2, 4000)},
    ),
    "parakeet": (
        "ParakeetEncoder",
        "ParakeetEncoderConfig",
        {
            "hidden_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "intermediate_size": 96,
            "num_mel_bins": 80,
        },
        lambda: {"input_features": torch.randn(2, 64, 80)},
    ),
    "clap_audio": (
        "ClapAudioModel",
        "ClapAudioConfig",
        {},
        lambda: {"input_features": torch.randn(2, 1, 1001, 64)},
    ),
    "patchtst": (
        "PatchTSTForPrediction",
        "PatchTSTConfig",
        {"context_length": 64, "patch_length": 8, "patch_stride": 8, "num_input_channels": 2},
        lambda: {"past_values": torch.randn(2, 64, 2)},
    ),
    "patchtsmixer": (
        "PatchTSMixerForPrediction",
        "PatchTSMixerConfig",
        {
            "context_length": 64,
            "patch_length": 8,
            "patch_stride": 8,
            "num_input_channels": 2,
            "norm_mlp": "BatchNorm",
        },
        lambda: {"past_values": torch.randn(2, 64, 2)},
    ),
    "groupvit": (
        "GroupViTModel",
        "GroupViTConfig",
        {},
        lambda: {
            "input_ids": torch.randint(1, 90, (2, 7)),
            "pixel_values": image(224),
        },
    ),
    "superpoint_superglue": (
        "SuperGlueForKeypointMatching",
        "SuperGlueConfig",
        {},
        lambda: {"pixel_values": torch.rand(1, 2, 3, 96, 96)},
    ),
    "informer": (
        "InformerModel",
        "InformerConfig",
        {"prediction_length": 4, "context_length": 16, "encoder_layers": 3, "num_time_features": 1},
        lambda: {
            "past_values": torch.randn(2, 16 + 7),
            "past_time_features": torch.randn(2, 16 + 7, 1),
            "past_observed_mask": torch.ones(2, 16 + 7),
            "future_values": torch.randn(2, 4),
            "future_time_features": torch.randn(2, 4, 1),
        },
    ),
    "pp_lcnet": ("PPLCNetForImageClassification", "PPLCNetConfig", {}, _pixels()),
    "pp_lcnet_v3": ("PPLCNetV3Backbone", "PPLCNetV3Config", {}, _pixels()),
    "pp_lcnet_v4": ("PPLCNetV4Backbone", "PPLCNetV4Config", {}, _pixels()),
    "pp_ocrv5_mobile_det": (
        "PPOCRV5MobileDetForObjectDetection",
        "PPOCRV5MobileDetConfig",
        {},
        _pixels(),
    ),
    "pp_ocrv5_mobile_rec": (
        "PPOCRV5MobileRecForTextRecognition",
        "PPOCRV5MobileRecConfig",
        {},
        lambda: {"pixel_values": torch.randn(1, 3, 48, 128)},
    ),
    "detr": ("DetrModel", "DetrConfig", {**SMALL_DETR, "use_timm_backbone": False}, _pixels(128)),
}
