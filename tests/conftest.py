"""Shared fixtures: no network, no deprecation, no noise between tests."""

import logging
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"
sys.path.insert(0, str(Path(__file__).parent))

import hypothesis
import matrix
import pytest
import torch

# a loaded machine is no failure; the long tier draws anew and prints what it drew
hypothesis.settings.register_profile("steady", deadline=None, derandomize=True)
hypothesis.settings.register_profile("long", deadline=None, max_examples=500, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "steady"))


@pytest.fixture(autouse=True)
def no_deprecation(request):
    """transformers announces deprecations through its logger: they fail the test."""
    seen = []
    handler = logging.Handler()
    handler.emit = lambda record: seen.append(record.getMessage())
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    yield
    logger.removeHandler(handler)
    # assisted decoding calls the assistant's generate() so itself
    own = "Passing `generation_config` together with generation-related arguments"
    deprecated = [message for message in seen if "deprecat" in message.lower() and own not in message]
    assert not deprecated, deprecated


@pytest.fixture(autouse=True)
def seeded():
    """What a test draws depends neither on the tests before it nor on the process."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def few_threads():
    """Tiny models run slower with many threads; and results must not depend on their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pytest_addoption(parser):
    parser.addoption("--matrix", action="store_true", help="note the outcomes for the tables of docs")


def pytest_configure(config):
    config.addinivalue_line("markers", "matrix: a long test that the tables of docs need: --matrix runs it")
    if config.getoption("--matrix") and config.option.markexpr == "not long":
        config.option.markexpr = "not long or matrix"


def pytest_collection_modifyitems(items):
    for item in items:
        item.user_properties.append(("family", matrix.family_of(item)))
        if matrix.family_of(item) == "llava_llama":
            # the package calls the cache by its name before transformers 5.24, which still takes it
            item.add_marker(pytest.mark.filterwarnings("ignore:.*`past_key_values`:FutureWarning"))


RESULTS: list[tuple[str, str, dict]] = []


def pytest_runtest_logreport(report):
    # a skip or an error may come before the call; an expected failure is one
    if report.when == "call" or report.outcome != "passed":
        outcome = "failed" if hasattr(report, "wasxfail") else report.outcome
        RESULTS.append((report.nodeid.split("[")[0].removeprefix("tests/"), outcome, dict(report.user_properties)))


def pytest_sessionfinish(session):
    if session.config.getoption("--matrix") and not hasattr(session.config, "workerinput"):
        import transformers

        matrix.note(RESULTS, transformers.__version__)
