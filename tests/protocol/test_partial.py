"""Updates of some parts: who sends what, and what comes of it."""

from collections import Counter

import numpy as np
import pytest

from server_app.build_strategy import build_strategy
from server_app.weighting import Weighting
from task.config import load_config
from task.generators.registry import weightless_generator
from task.protocol.partial import REST, PartLayout, deal_parts, senders
from task.protocol.wire import WeightLayout

WORDS = ["model=tiny", "model.width=4", "data.image_size=8", "model.num_poolings=1"]
GENERATOR = weightless_generator(load_config(WORDS))
LAYOUT = WeightLayout.of(GENERATOR)
PARTS = PartLayout(LAYOUT, GENERATOR)


def test_parts_of_the_papers_network_are_as_large_as_it_says() -> None:
    generator = weightless_generator(load_config(["model=feddm", "data=cifar10"]))
    masks = PartLayout(layout := WeightLayout.of(generator), generator).masks
    assert [*masks] == ["down", "middle", "up"]  # which is all
    assert sum(masks.values()).tolist() == [1] * layout.size  # type: ignore[union-attr]
    shares = [round(100 * mask.sum() / layout.size) for mask in masks.values()]
    assert shares == [12, 72, 16]


@pytest.mark.parametrize("model", ["attention_unet", "vae", "stylegan2_ada_tiny", "resnet_gan"])
def test_every_family_has_parts(model: str) -> None:
    generator = weightless_generator(load_config([f"model={model}", "data=cifar10"]))
    layout = WeightLayout.of(generator, generator.local | generator.frozen)
    masks = PartLayout(layout, generator).masks
    assert [*masks][: len(generator.parts)] == [*generator.parts]
    assert all(masks[part].any() for part in generator.parts)
    assert generator.undrawn <= generator.parts.keys()


def test_pairs_send_every_part_once() -> None:
    rng, middle = np.random.default_rng(0), Counter[str]()
    pairs = set()
    for _ in range(200):
        dealt = deal_parts(["down", "middle", "up"], [3, 5, 8, 9], rng)
        assert dealt.keys() == {3, 5, 8, 9}
        for part in ("down", "middle", "up"):
            assert len(senders(dealt, part)) == 2
        assert senders(dealt, REST) == {3, 5, 8, 9}
        assert all(("down" in parts) != ("up" in parts) for parts in dealt.values())
        pairs.add(frozenset(senders(dealt, "down")))
        middle.update("down" for parts in dealt.values() if parts == ["down", "middle"])
    assert len(pairs) == 6
    assert middle["down"] == pytest.approx(200, abs=35)
    alone = Counter(str(deal_parts(["a", "b"], [7], rng)[7]) for _ in range(200))
    assert alone["['a']"] + alone["['b']"] == 200 and min(alone.values()) > 60


def test_parts_without_a_pair_are_refused() -> None:
    vae = weightless_generator(load_config(["model=vae_small", "federation.local=[encoder]"]))
    with pytest.raises(ValueError, match=r"^federation\.sharing .* fewer than two .* .decoder."):
        PartLayout(WeightLayout.of(vae, vae.local), vae)
    with pytest.raises(ValueError, match=r"^parts must be of down, middle, up, got \['bottom'\]"):
        PARTS.wire(["bottom"], "float32")


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_what_is_not_sent_counts_as_it_was_sent(dtype: str) -> None:
    rng = np.random.default_rng(1)
    sent, own = rng.normal(size=(2, LAYOUT.size)).astype(np.float32)
    wire = PARTS.wire(["up"], dtype)
    mask = PARTS.masks["up"]
    encoded = wire.encode_local(own, sent, rng)
    found = wire.decode_local(encoded, sent)
    assert np.array_equal(found[~mask], sent[~mask])
    np.testing.assert_allclose(found[mask], own[mask], atol=0 if dtype == "float32" else 0.05)
    whole = {"float32": 4, "float16": 2, "int8": 1}[dtype]
    assert encoded.nbytes / mask.sum() == pytest.approx(whole, rel=0.4)
    assert wire.is_lossy == (dtype == "int8")
    travelling = wire.encode_weights(sent, rng)
    np.testing.assert_allclose(wire.decode_weights(travelling), sent, atol=0.05)


def test_each_part_is_averaged_over_those_that_sent_it() -> None:
    config = load_config([*WORDS, "federation.sharing=usplit"])
    strategy = build_strategy(config, LAYOUT, Weighting())
    sent = strategy.broadcast(LAYOUT.unpack(np.zeros(LAYOUT.size, np.float32)), 3)
    dealt = {0: ["down"], 1: ["down", "middle"], 2: ["up"]}
    strategy.reduce_parts([(m, senders(dealt, part)) for part, m in PARTS.masks.items()])
    for client, images in ((0, 30), (1, 10), (2, 60)):
        own = np.full(LAYOUT.size, client + 1, np.float32)
        wire = PARTS.wire(dealt[client], "float32")
        travelled = wire.encode_local(own, sent, np.random.default_rng(0))
        strategy.add(client, wire.decode_local(travelled, sent), images)
    found = LAYOUT.pack(strategy.finish())
    expected = {"down": (30 * 1 + 10 * 2) / 40, "middle": 2, "up": 3}
    for part, mask in PARTS.masks.items():
        assert found[mask] == pytest.approx(expected[part]), part
    # Of a part that nobody sent, nothing changes.
    before = LAYOUT.unpack(found)
    sent = strategy.broadcast(before, 1)
    strategy.reduce_parts([(m, senders({0: ["up"]}, part)) for part, m in PARTS.masks.items()])
    strategy.add(0, np.full(LAYOUT.size, 9, np.float32), 5)
    after = LAYOUT.pack(strategy.finish())
    assert np.array_equal(after[PARTS.masks["down"]], found[PARTS.masks["down"]])
    assert set(after[PARTS.masks["up"]]) == {9}
