# ResNet-50 on ImageNet: 15.2 M parameters stored for 25.6 M dense, 1.69x.
# The import makes 'mmpretrain::' resolve on both lines of mm packages, whatever program reads this.
_base_ = __import__('csg_seg.mm') and 'mmpretrain::resnet/resnet50_8xb32_in1k.py'
custom_imports = dict(imports=['csg_seg.mm'])
model = dict(type='CSGModel', base_type={{_base_.model.type}}, csg=dict(slice_shape=(16, 16, 3, 3), code_dim=128))
default_hooks = dict(csg=dict(type='CSGHook', save_compact=True))
test_evaluator = [_base_.test_evaluator, dict(type='PerClassAccuracy')]
