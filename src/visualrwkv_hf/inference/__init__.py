"""Use a model: load it, chat, caption, serve, draw what it reads, describe a model folder, export to ONNX."""
