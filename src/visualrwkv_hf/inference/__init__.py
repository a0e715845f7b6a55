"""Use a model: load it, chat, caption, serve, draw what it reads, describe a model folder, export to ONNX."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
