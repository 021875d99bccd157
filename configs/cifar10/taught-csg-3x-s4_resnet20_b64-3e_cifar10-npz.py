# As csg-s4-d57, but with a generator for each stage: 116,090 parameters stored for 269,722 dense, 2.32x.
_base_ = './taught-csg-s4-d57_resnet20_b64-3e_cifar10-npz.py'
model = dict(
    csg=[
        dict(slice_shape=(4, 4, 3, 3), code_dim=38, include=['backbone.layer1']),
        dict(slice_shape=(4, 4, 3, 3), code_dim=48, include=['backbone.layer2']),
        dict(slice_shape=(4, 4, 3, 3), code_dim=52, include=['backbone.layer3']),
    ]
)
