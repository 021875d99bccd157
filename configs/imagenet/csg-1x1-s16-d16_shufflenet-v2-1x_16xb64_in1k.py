# ShuffleNetV2 on ImageNet, each block's 1x1 convs before the depthwise one, and the shortcut's: 1,907,840 parameters stored for 2,278,604 dense, 1.19x.
# The import makes 'mmpretrain::' resolve on both lines of mm packages, whatever program reads this.
_base_ = __import__('csg_seg.mm') and 'mmpretrain::shufflenet_v2/shufflenet-v2-1x_16xb64_in1k.py'
custom_imports = dict(imports=['csg_seg.mm'])
model = dict(
    type='CSGModel',
    base_type={{_base_.model.type}},
    csg=dict(
        slice_shape=(16, 16, 1, 1),
        code_dim=16,
        include=['backbone.layers.*.branch2.0', 'backbone.layers.*.0.branch1.1'],
    ),
)
default_hooks = dict(csg=dict(type='CSGHook', save_compact=True))
test_evaluator = [_base_.test_evaluator, dict(type='PerClassAccuracy')]
