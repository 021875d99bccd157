# As csg-s4-d57, but with a tensor ring as generator: 115,818 parameters stored for 269,722 dense, 2.33x.
_base_ = '../../../configs/cifar10/taught-csg-s4-d57_resnet20_b64-3e_cifar10-npz.py'
custom_imports = dict(imports=['csg_seg.mm', 'experiments.rivals.tensor_ring'])
model = dict(csg=dict(generator='tensor_ring', rank=18, code_dim=52))
