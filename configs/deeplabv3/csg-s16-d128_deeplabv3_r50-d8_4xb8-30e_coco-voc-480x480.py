# DeepLabV3, ResNet-50, trained on COCO with VOC's classes, all 3x3 convs generated: 15.3 M parameters stored for 44.0 M dense, 2.89x.
_base_ = './deeplabv3_r50-d8_4xb8-30e_coco-voc-480x480.py'
custom_imports = dict(imports=['csg_seg.mm'])
model = dict(type='CSGModel', base_type={{_base_.model.type}}, csg=dict(slice_shape=(16, 16, 3, 3), code_dim=128))
default_hooks = dict(csg=dict(type='CSGHook', save_compact=True), exact_resume=dict(type='ExactResumeHook'))
