# MobileNetV2 on ImageNet, the 1x1 expansions: 2.8 M parameters stored for 3.5 M dense, 1.25x.
# The import makes 'mmpretrain::' resolve on both lines of mm packages, whatever program reads this.
_base_ = __import__('csg_seg.mm') and 'mmpretrain::mobilenet_v2/mobilenet-v2_8xb32_in1k.py'
custom_imports = dict(imports=['csg_seg.mm'])
model = dict(
    type='CSGModel',
    base_type={{_base_.model.type}},
    csg=dict(slice_shape=(16, 16, 1, 1), code_dim=16, include=['backbone.layer[2-7].*.conv.0']),
)
default_hooks = dict(csg=dict(type='CSGHook', save_compact=True))
test_evaluator = [_base_.test_evaluator, dict(type='PerClassAccuracy')]
