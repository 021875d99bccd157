model = dict(
    type='ImageClassifier',
    backbone=dict(type='CIFARShuffleNetV2', widen_factor=0.5),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', num_classes=10, in_channels=1024, loss=dict(type='CrossEntropyLoss')),
)
