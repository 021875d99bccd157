# ResNet-20 on the CIFAR-10 subset, random binary generator: 22,114 parameters stored for 269,722 dense, 12.20x.
_base_ = './csg-s12-d72_resnet20_b64-20e_cifar10-npz.py'
model = dict(csg=dict(generator='binary'))
