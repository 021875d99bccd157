# As csg-s4-d57, but with an MLP as generator: 115,914 parameters stored for 269,722 dense, 2.33x.
_base_ = './taught-csg-s4-d57_resnet20_b64-3e_cifar10-npz.py'
model = dict(csg=dict(generator='mlp', hidden=48, code_dim=52))
