"""Train a model: conversations to tokens, batches, and a Trainer with the original's recipe."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
