# CGNet on CamVid, at half the size: 245,693 parameters stored for 494,269 dense, 2.01x.
_base_ = './cgnet_fcn_1xb8-20k_camvid-360x480.py'
custom_imports = dict(imports=['csg_seg.mm'])
model = dict(type='CSGModel', base_type={{_base_.model.type}}, csg=dict(ratio=2))
default_hooks = dict(csg=dict(type='CSGHook', save_compact=True), exact_resume=dict(type='ExactResumeHook'))
