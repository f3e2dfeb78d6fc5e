"""A run adds its paper's question types to the shared ones; what one test file ran must not be asked in the next."""

import pytest

import data


@pytest.fixture(scope="module", autouse=True)
def question_types_of_this_file_only():
    shared = (data.TASKS, data.TEMPLATES, data.METRIC)
    before = [type(table)(table) for table in shared]
    yield
    for table, kept in zip(shared, before, strict=True):
        table.clear()
        table.update(kept)
