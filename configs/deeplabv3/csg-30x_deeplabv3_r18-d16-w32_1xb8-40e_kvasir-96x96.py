# DeepLabV3, ResNet-18 of half the width at output stride 16, on Kvasir-SEG at 96 x 96: 112,588 parameters stored for 3,498,932 dense, 31.08x.
_base_ = './deeplabv3_r18-d16-w32_1xb8-40e_kvasir-96x96.py'
model = dict(type='CSGModel', base_type={{_base_.model.type}}, csg=dict(ratio=29.588))
default_hooks = dict(csg=dict(type='CSGHook', save_compact=True))
