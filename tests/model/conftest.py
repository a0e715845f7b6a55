"""Fixtures that tests of states and scores share: a model that reads pictures in order, and its processor."""

import pytest
from chats import MODELS
from tiny_training import tiny_model, tiny_processor


@pytest.fixture(scope="module")
def rwkv7():
    return tiny_model(**MODELS["rwkv7"])


@pytest.fixture(scope="module")
def rwkv7_processor(rwkv7):
    return tiny_processor(rwkv7)
