# CGNet on CamVid: 0.5 M parameters. Pixels as in its authors' code: RGB minus the mean, not divided.
# The import makes 'mmseg::' resolve on both lines of mm packages, whatever program reads this.
_base_ = __import__('csg_seg.mm') and [
    'mmseg::_base_/models/cgnet.py',
    '../_base_/datasets/camvid.py',
    'mmseg::_base_/default_runtime.py',
    'mmseg::_base_/schedules/schedule_20k.py',
]
custom_imports = dict(imports=['csg_seg.mm'])
data_preprocessor = dict(mean=[110.33, 108.41, 105.03], size=(360, 480))
model = dict(
    data_preprocessor=data_preprocessor,
    decode_head=dict(num_classes=11, loss_decode=dict(class_weight=None)),
)
optimizer = dict(_delete_=True, type='Adam', lr=0.001, eps=1e-8, weight_decay=0.0005)
optim_wrapper = dict(optimizer=optimizer)
train_dataloader = dict(batch_size=8)
