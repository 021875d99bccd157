# DeepLabV3, ResNet-101, all 3x3 convs generated: 27.1 M parameters stored for 87.1 M dense, 3.21x.
# The import makes 'mmseg::' resolve on both lines of mm packages, whatever program reads this.
_base_ = __import__('csg_seg.mm') and 'mmseg::deeplabv3/deeplabv3_r101-d8_4xb4-40k_voc12aug-512x512.py'
custom_imports = dict(imports=['csg_seg.mm'])
model = dict(type='CSGModel', base_type={{_base_.model.type}}, csg=dict(slice_shape=(16, 16, 3, 3), code_dim=128))
default_hooks = dict(csg=dict(type='CSGHook', save_compact=True), exact_resume=dict(type='ExactResumeHook'))
