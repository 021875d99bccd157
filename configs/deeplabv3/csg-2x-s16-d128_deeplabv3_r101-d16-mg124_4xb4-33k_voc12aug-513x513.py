# The paper's DeepLab with two generators, backbone 3x3 and ASPP's dilated 3x3: 26,406,325 parameters stored for 59,344,309 dense, 2.25x.
_base_ = './deeplabv3_r101-d16-mg124_4xb4-33k_voc12aug-513x513.py'
custom_imports = dict(imports=['csg_seg.mm'])
model = dict(
    type='CSGModel',
    base_type={{_base_.model.type}},
    csg=[
        dict(slice_shape=(16, 16, 3, 3), code_dim=128, include=['backbone']),
        dict(slice_shape=(16, 16, 3, 3), code_dim=128, include=['decode_head.aspp_modules']),
    ],
)
# The head's generator learns as fast as the head.
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={'csg.1': dict(lr_mult=10.0)}))
default_hooks = dict(csg=dict(type='CSGHook', save_compact=True), exact_resume=dict(type='ExactResumeHook'))
