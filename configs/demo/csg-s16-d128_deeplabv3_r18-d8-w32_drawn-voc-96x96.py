# The demo's DeepLabV3, all 3x3 convs generated: @CSG@ M parameters stored for @DENSE@ M dense, @RATIO@x.
_base_ = './deeplabv3_r18-d8-w32_drawn-voc-96x96.py'
custom_imports = dict(imports=['csg_seg'])
model = dict(type='CSGModel', base_type={{_base_.model.type}}, csg=dict(slice_shape=(16, 16, 3, 3), code_dim=128))
default_hooks = dict(csg=dict(type='CSGHook', save_compact=True), exact_resume=dict(type='ExactResumeHook'))
