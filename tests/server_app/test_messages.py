import gc
import weakref
from collections.abc import Iterator

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from server_app.messages import addressed, packed_record, record_of
from server_app.replies import read_training
from task.protocol.wire import Key
from tests.helpers import SUPERLINK, Network

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
    assert np.array_equal(packed_record(WEIGHTS)[Key.PACKED].numpy(), WEIGHTS)


def test_record_of_another_kind_or_name_is_an_empty_one() -> None:
    content = reply()
    assert record_of(content, Key.METRICS, MetricRecord)[Key.LOSS] == 0.5
    assert record_of(content, Key.METRICS, ArrayRecord) == ArrayRecord()
    assert record_of(content, Key.CONFIG, ConfigRecord) == ConfigRecord()


@pytest.mark.usefixtures("no_collector")
def test_reply_that_was_read_is_freed_at_once() -> None:
    content = reply()
    freed = weakref.ref(content)
    found = read_training(content, WEIGHTS, num_clients=1, max_norm=None)
    assert np.array_equal(found.weights, WEIGHTS)
    del content
    assert freed() is None


def test_addressed_adds_entries_to_a_copy_of_the_shared_content() -> None:
    Network()
    arrays = ArrayRecord({Key.PACKED: Array(np.ones(5, np.float32))})
    shared = RecordDict({Key.ARRAYS: arrays, Key.CONFIG: ConfigRecord({Key.SERVER_ROUND: 3})})
    made = [
        addressed(shared, node_id=n, message_type="train", timeout=100, entries={Key.CLIENT: c})
        for c, n in enumerate((70, 80))
    ]
    for client, message in enumerate(made):
        config = message.content.config_records[Key.CONFIG]
        assert dict(config) == {Key.SERVER_ROUND: 3, Key.CLIENT: client}
        assert message.content.array_records[Key.ARRAYS] is arrays  # not copied for each
        assert message.metadata.dst_node_id == (70, 80)[client]
        assert message.metadata.message_type == "train"
        assert message.metadata.src_node_id == SUPERLINK
    assert set(shared) == {Key.ARRAYS, Key.CONFIG}
    assert dict(shared.config_records[Key.CONFIG]) == {Key.SERVER_ROUND: 3}


@pytest.mark.parametrize("timeout", [0.1, 7200.0])
def test_messages_expire_before_the_exchange_ends(timeout: float) -> None:
    Network()
    message = addressed(RecordDict(), node_id=7, message_type="query", timeout=timeout)
    assert 0.9 * timeout < message.metadata.ttl < timeout
    assert dict(message.content.config_records[Key.CONFIG]) == {}
