"""What several test files start from."""

import numpy as np
import papers
import pytest
import torch

import data
import evaluate


@pytest.fixture(scope="module", autouse=True)
def question_types_of_this_file_only():
    """A run adds its paper's to the shared ones; what one test file ran must not be asked in the next."""
    shared = (data.TASKS, data.TEMPLATES, data.METRIC)
    before = [type(table)(table) for table in shared]
    yield
    for table, kept in zip(shared, before, strict=True):
        table.clear()
        table.update(kept)


@pytest.fixture(autouse=True)
def same_random_numbers():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def scenes():
    return papers.rooms()


@pytest.fixture
def no_java(monkeypatch):
    """Captions without Java: the same scores minus what needs it, and much faster."""
    monkeypatch.setattr(evaluate.shutil, "which", lambda name: None)


@pytest.fixture
def rng():
    return np.random.default_rng(0)
