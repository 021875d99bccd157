# What a generated ResNet learns from the dense one that it starts from: every block's output, and a little of the
# class scores. Labels add nothing to a teacher that is right; set labels=1.0 beside one that is not.
resnet_blocks = dict(labels=0.0, logits=0.1, features=3.0, layers=['backbone.layer*.*'])
