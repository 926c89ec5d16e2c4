import os

import pytest

# Tests never reach for the hub: a forgotten download fails at once and by name.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def smollm2():
    """The embedded model in fp32, with its tokenizer. Do not change it in place: copy it."""
    from pftools.models import load_model

    return load_model("smollm2-135m", dtype="float32", device="cpu")
