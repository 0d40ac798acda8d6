"""What works without TensorFlow: files, image decoding, the ONNX predictor."""
