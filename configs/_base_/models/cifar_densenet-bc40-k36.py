model = dict(
    type='ImageClassifier',
    backbone=dict(type='CIFARDenseNet', depth=40, growth_rate=36),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', num_classes=10, in_channels=396, loss=dict(type='CrossEntropyLoss')),
)
