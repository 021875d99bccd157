# FCN, ResNet-50, all 3x3 convs generated: 14.6 M parameters stored for 49.5 M dense, 3.40x.
# The import makes 'mmseg::' resolve on both lines of mm packages, whatever program reads this.
_base_ = __import__('csg_seg.mm') and 'mmseg::fcn/fcn_r50-d8_4xb4-40k_voc12aug-512x512.py'
custom_imports = dict(imports=['csg_seg.mm'])
model = dict(type='CSGModel', base_type={{_base_.model.type}}, csg=dict(slice_shape=(16, 16, 3, 3), code_dim=128))
default_hooks = dict(csg=dict(type='CSGHook', save_compact=True), exact_resume=dict(type='ExactResumeHook'))
