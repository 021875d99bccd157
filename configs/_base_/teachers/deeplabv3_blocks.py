# What a generated DeepLabV3 learns from the dense one that it starts from, beside the labels: the output of every
# block of the backbone and of the head, and a little of the class scores.
deeplabv3_blocks = dict(logits=0.1, features=3.0, layers=['backbone.layer*.*', 'decode_head.bottleneck'])
