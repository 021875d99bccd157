"""Trained networks at work: inference and ONNX."""
