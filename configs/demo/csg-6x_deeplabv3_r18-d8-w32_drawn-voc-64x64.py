# The demo's DeepLabV3, 3x3 convs generated with the settings that a ratio finds: 0.57 M parameters stored for 3.54 M dense, 6.25x.
_base_ = './deeplabv3_r18-d8-w32_drawn-voc-64x64.py'
custom_imports = dict(imports=['csg_seg.mm'])
model = dict(type='CSGModel', base_type={{_base_.model.type}}, csg=dict(ratio=6.19))
default_hooks = dict(csg=dict(type='CSGHook', save_compact=True), exact_resume=dict(type='ExactResumeHook'))
