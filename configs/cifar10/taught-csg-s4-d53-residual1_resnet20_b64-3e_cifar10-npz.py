# As csg-s4-d57, but with a residual of rank one in each layer: 114,746 parameters stored for 269,722 dense, 2.35x.
_base_ = './taught-csg-s4-d57_resnet20_b64-3e_cifar10-npz.py'
model = dict(csg=dict(residual=1, code_dim=53))
