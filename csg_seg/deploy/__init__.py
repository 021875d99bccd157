"""Use trained networks: inference, compact files, ONNX, and checkpoints that others released."""
