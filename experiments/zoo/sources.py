"""The networks of libraries that list none, as sources of compact files: a builder, a name and arguments."""

from importlib import import_module
from typing import Any

# One encoder of each family, the smallest.
SMP_ENCODERS = (
    *('resnet18', 'dpn68', 'vgg11_bn', 'se_resnet50', 'densenet121', 'inceptionresnetv2', 'inceptionv4', 'xception'),
    *('efficientnet-b0', 'timm-efficientnet-b0', 'timm-skresnet18', 'mobilenet_v2', 'mit_b0', 'mobileone_s0'),
    *('tu-convnext_atto', 'tu-mobilenetv3_small_050'),
)
SMP_VITS = ('tu-vit_tiny_patch16_224', 'tu-deit_tiny_patch16_224', 'tu-beit_base_patch16_224')  # of DPT
GREY = dict(in_channels=1, out_channels=3)
GREY_CLASSES = dict(in_channels=1, num_classes=3)
LEVELS = dict(channels=(16, 32, 64), strides=(2, 2))
PATCHES = dict(img_size=64, hidden_size=96, mlp_dim=192, num_heads=4)
# Names of monai.networks.nets with the dimensions they are for, and arguments.
MONAI: dict[str, tuple[str, dict[str, Any]]] = {
    'AHNet': ('23', GREY | dict(psp_block_num=2)),
    'AttentionUnet': ('123', GREY | LEVELS),
    'AutoEncoder': ('123', GREY | dict(channels=(16, 32), strides=(2, 2))),
    'BasicUNet': ('123', GREY),
    'BasicUNetPlusPlus': ('123', GREY),
    'DAF3D': ('', GREY),
    'DenseNet121': ('123', GREY),
    'DynUNet': ('123', GREY | dict(kernel_size=(3, 3, 3), strides=(1, 2, 2), upsample_kernel_size=(2, 2))),
    'EfficientNetBN': ('123', GREY_CLASSES | dict(model_name='efficientnet-b0')),
    'FlexibleUNet': ('23', GREY | dict(backbone='efficientnet-b0')),
    'HighResNet': ('123', GREY),
    'HoVerNet': ('', dict(out_classes=5)),
    'MedNeXtS': ('23', GREY),
    'MILModel': ('', dict(num_classes=3, backbone='resnet18')),
    'Quicknat': ('', dict(num_classes=3)),
    'RegUNet': ('23', GREY | dict(num_channel_initial=16, depth=3)),
    'SENet154': ('3', GREY_CLASSES),
    'SEResNet50': ('123', GREY_CLASSES),
    'SEResNext50': ('123', GREY_CLASSES),
    'SegResNet': ('23', GREY),
    'SegResNetDS': ('123', GREY | dict(init_filters=16)),
    'SegResNetDS2': ('123', GREY | dict(init_filters=16)),
    'SegResNetVAE': ('', GREY | dict(input_image_size=(32, 32, 32), vae_nz=32)),
    'SwinUNETR': ('23', GREY | dict(feature_size=12)),
    'TorchVisionFCModel': ('', dict(num_classes=3, use_conv=True, pool=None)),
    'UNETR': ('23', GREY | PATCHES),
    'UNet': ('123', GREY | LEVELS | dict(num_res_units=2)),
    'VNet': ('23', GREY),
    'ViT': ('23', dict(in_channels=1, patch_size=16, num_layers=2, classification=True) | PATCHES),
    'ViTAutoEnc': ('23', GREY | PATCHES | dict(patch_size=16, num_layers=2)),
    'resnet18': ('123', dict(n_input_channels=1, num_classes=3)),
    'resnet50': ('123', dict(n_input_channels=1, num_classes=3)),
    'vista3d132': ('', dict(encoder_embed_dim=24)),
}
TASKS = (
    *('SEMANTIC_SEGMENTATION', 'IMAGE_SEGMENTATION', 'UNIVERSAL_SEGMENTATION', 'INSTANCE_SEGMENTATION'),
    'IMAGE_CLASSIFICATION',
)
SMALL = dict(hidden_size=96, num_hidden_layers=4, num_attention_heads=4, intermediate_size=192, image_size=64)
QUERIES = dict(num_queries=8, encoder_layers=1, decoder_layers=3)
# Configs of transformers' networks whose default is large, or not enough to build the network.
TRANSFORMERS: dict[str, dict[str, Any]] = {
    'BeitForSemanticSegmentation': SMALL | dict(out_indices=[1, 2, 3, 4]),
    'Data2VecVisionForSemanticSegmentation': SMALL | dict(out_indices=[1, 2, 3, 4]),
    'DPTForSemanticSegmentation': SMALL | dict(backbone_out_indices=[0, 1, 2, 3]),
    'EfficientNetForImageClassification': dict(width_coefficient=1.0, depth_coefficient=1.0, hidden_dim=1280),
    'EomtForUniversalSegmentation': SMALL | dict(num_blocks=1, num_queries=8),
    'EomtDinov3ForUniversalSegmentation': SMALL | dict(num_blocks=1, num_queries=8),
    'Mask2FormerForUniversalSegmentation': QUERIES,
    'OneFormerForUniversalSegmentation': QUERIES,
    'Sapiens2ForSemanticSegmentation': SMALL
    | dict(num_key_value_attention_heads=4)
    | dict(
        head_config=dict(
            upsample_out_channels=[32], upsample_kernel_sizes=[4], conv_out_channels=[32], conv_kernel_sizes=[1]
        )
    ),
}


def list_sources(scope: str) -> dict[str, dict[str, Any]]:
    """Return how each network of a library is built, by a name for it: see :func:`csg_seg.save_compact`.

    Args:
        scope: 'smp' for segmentation_models_pytorch, 'monai', or 'transformers'.
    """
    if scope == 'smp':
        decoders = import_module('segmentation_models_pytorch').MODEL_ARCHITECTURES_MAPPING
        return {
            f'{decoder} {encoder}': dict(builder='smp', name=decoder, encoder_name=encoder)
            for encoder in (*SMP_ENCODERS, *SMP_VITS)
            for decoder in decoders
            if (decoder == 'dpt') == (encoder in SMP_VITS)
        }
    if scope == 'monai':
        return {
            f'{name} {dimensions}D' if dimensions else name: dict(
                builder='monai', name=name, **({'spatial_dims': int(dimensions)} if dimensions else {}), **arguments
            )
            for name, (choices, arguments) in MONAI.items()
            for dimensions in choices or ('',)
        }
    auto = import_module('transformers.models.auto.modeling_auto')
    groups = [getattr(auto, f'MODEL_FOR_{task}_MAPPING_NAMES').values() for task in TASKS]
    names = [name for group in groups for each in group for name in ([each] if isinstance(each, str) else each)]
    return {
        name: dict(builder='transformers', name=name, config=TRANSFORMERS.get(name, {}))
        for name in dict.fromkeys(names)
    }
