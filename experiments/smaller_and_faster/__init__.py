"""Networks that are smaller and faster: fewer channels, CSG, and int8 inference with onnxruntime."""
