import gc
import weakref
from collections.abc import Iterator

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from server_app.exchange import check_metrics, check_weights
from server_app.messages import packed_record, packed_weights, record_of
from task.protocol.wire import Key

WEIGHTS = np.arange(5, dtype=np.float32) / 7


def reply() -> RecordDict:
    metrics = MetricRecord({Key.NUM_EXAMPLES: 3, Key.LOSS: 0.5})
    return RecordDict({Key.ARRAYS: packed_record(WEIGHTS), Key.METRICS: metrics})


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


def test_weights_come_back_to_the_bit_as_flower_reads_them_too() -> None:
    record = packed_record(WEIGHTS)
    assert np.array_equal(packed_weights(RecordDict({Key.ARRAYS: record})), WEIGHTS)
    assert np.array_equal(record[Key.PACKED].numpy(), WEIGHTS)


def test_record_of_another_kind_or_name_is_an_empty_one() -> None:
    content = reply()
    assert record_of(content, Key.METRICS, MetricRecord)[Key.LOSS] == 0.5
    assert record_of(content, Key.METRICS, ArrayRecord) == ArrayRecord()
    assert record_of(content, Key.CONFIG, ConfigRecord) == ConfigRecord()


@pytest.mark.usefixtures("no_collector")
def test_reply_that_was_read_is_freed_at_once() -> None:
    content = reply()
    freed = weakref.ref(content)
    check_metrics(content)
    check_weights(content, size=5, num_clients=1)
    assert np.array_equal(packed_weights(content), WEIGHTS)
    del content
    assert freed() is None


def test_weights_that_are_not_there_are_an_error() -> None:
    with pytest.raises(KeyError):
        packed_weights(RecordDict())
