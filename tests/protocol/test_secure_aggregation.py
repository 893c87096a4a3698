"""Masked sums: equal to plain ones, and nothing else for a server that lies."""

import dataclasses
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from task.protocol.secure_aggregation.coordinator import MaskedSum, WrongSharesError
from task.protocol.secure_aggregation.fixed_point import (
    NotFiniteError,
    UpdateFormat,
    decode_measures,
)
from task.protocol.secure_aggregation.keys import (
    IDENTITY_FILE,
    Identity,
    PublicKeys,
    load_identity,
    new_identity_secret,
    read_fingerprints,
)
from task.protocol.secure_aggregation.masks import MASK_CHUNK_BYTES, add_mask
from task.protocol.secure_aggregation.memory import FolderStore, PeersRefusedError
from task.protocol.secure_aggregation.participant import Participant, Upload
from task.protocol.secure_aggregation.shamir import PRIME, join_shares, split_secret
from task.protocol.secure_aggregation.terms import Terms, read_peers

NUMBER, SIZE = 5, 37
FORMAT = UpdateFormat(update_range=0.5, max_images=100, num_clients=NUMBER)
IMAGES = [7, 100, 3000, 1, 55]


def places_of(number: int, least: int) -> Iterator[tuple[int, ...]]:
    for size in range(least, number + 1):
        yield from combinations(range(number), size)


class Hospitals:
    """Five clients, each with an update, and the terms of a sum of theirs."""

    def __init__(self, folder: Path, number: int = NUMBER, **own: object) -> None:
        self.identities = [Identity(new_identity_secret()) for _ in range(number)]
        self.participants = []
        for place, identity in enumerate(self.identities):
            (folder / str(place)).mkdir()
            store = FolderStore(folder / str(place))
            self.participants.append(Participant(identity, store, **own))  # type: ignore[arg-type]
        rng = np.random.default_rng(0)
        self.updates = rng.normal(0, 0.3, (number, SIZE)).astype(np.float32)
        self.terms = Terms(
            run="run",
            server_round=1,
            attempt=1,
            purpose="train",
            peers=tuple(identity.public for identity in self.identities),
            format=dataclasses.replace(FORMAT, num_clients=number),
            model="abc",
        )

    def encoded(self, place: int) -> tuple[np.ndarray, np.ndarray]:
        images, form = IMAGES[place], self.terms.format
        values, _ = form.encode(self.updates[place], images)
        return values, form.encode_measures(images, [0.25 * place, -3.0])

    def upload(self, place: int, terms: Terms | None = None) -> Upload:
        terms = terms or self.terms
        self.participants[place].begin(terms)
        return self.participants[place].upload(terms, *self.encoded(place))

    def plain(self, places: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        encoded = [self.encoded(place) for place in places]
        return sum(v for v, _ in encoded), sum(m for _, m in encoded)  # type: ignore[return-value]


def summed(uploads: dict[int, Upload], number: int = NUMBER) -> MaskedSum:
    masked = MaskedSum(number, size=SIZE, num_measures=3)
    for place, upload in uploads.items():
        masked.check(upload)
        masked.add(place, upload)
    return masked


def test_masked_sums_equal_plain_ones_whoever_drops_out_when(tmp_path: Path) -> None:
    hospitals = Hospitals(tmp_path)
    uploads = {place: hospitals.upload(place) for place in range(NUMBER)}
    patterns = 0
    for attempt, survivors in enumerate(places_of(NUMBER, 3), start=2):
        terms = dataclasses.replace(hospitals.terms, attempt=attempt)
        # Those that are not among the survivors have dropped out before their upload, and help.
        uploads = {place: hospitals.upload(place, terms) for place in range(NUMBER)}
        kept = {place: uploads[place] for place in survivors}
        answers = {}
        masked = summed(kept)
        for place in range(NUMBER):
            helper = hospitals.participants[place]
            answers[place] = helper.answer("run", attempt, survivors, masked.question(place))
            masked.check_answer(answers[place])
        plain = hospitals.plain(survivors)
        for helping in places_of(NUMBER, 1):
            masked = summed(kept)
            some = {place: answers[place] for place in helping}
            if len(helping) < 3:
                with pytest.raises(WrongSharesError):
                    masked.total(some)
                continue
            for found, expected in zip(masked.total(some), plain, strict=True):
                assert np.array_equal(found, expected)
            patterns += 1
    assert patterns == 16 * 16


def test_mean_of_masked_updates_is_the_mean_of_updates_within_their_range(tmp_path: Path) -> None:
    hospitals = Hospitals(tmp_path)
    values, measures = hospitals.plain(range(NUMBER))
    count, means = decode_measures(measures)
    weights = np.minimum(IMAGES, 100)
    assert count == weights.sum()
    assert means == pytest.approx([0.25 * (weights @ np.arange(5)) / count, -3.0], abs=1e-6)
    sent = np.linspace(-1, 1, SIZE, dtype=np.float32)
    clipped = np.clip(hospitals.updates, -0.5, 0.5).astype(np.float64)
    assert (clipped != hospitals.updates).any()
    expected = sent + weights @ clipped / count
    assert FORMAT.add_mean(sent, values, count) == pytest.approx(expected, abs=1e-7)
    everything, number = FORMAT.encode(np.full(SIZE, 9e9, np.float32), 100)
    assert number == SIZE
    total = np.zeros(SIZE, np.uint32)
    for _ in range(NUMBER):
        total += everything  # as much as there can be, and it does not wrap
    assert FORMAT.add_mean(sent, total, 500) == pytest.approx(sent + 0.5, abs=1e-7)


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_what_is_not_finite_is_not_masked(wrong: float) -> None:
    with pytest.raises(NotFiniteError):
        FORMAT.encode(np.array([0, wrong], np.float32), 5)
    with pytest.raises(NotFiniteError):
        FORMAT.encode_measures(5, [wrong])


def test_masks_cancel_over_chunks_and_are_those_of_their_seed() -> None:
    long = np.zeros(MASK_CHUNK_BYTES // 2 + 3, np.uint32)
    short = np.zeros(5, np.uint64)
    add_mask((long, short), bytes(32), sign=1)
    # AES-256 of a block of zeros under a key of zeros, as NIST lists it.
    assert long[:4].tobytes().hex() == "dc95c078a2408989ad48a21492842087"
    assert len(np.unique(long)) > 0.99 * len(long) and short.all()
    add_mask((long, short), bytes(32), sign=-1)
    assert not long.any() and not short.any()


def test_shares_below_the_threshold_say_nothing() -> None:
    assert all(pow(base, PRIME - 1, PRIME) == 1 for base in (2, 3, 5, 7))
    secret = bytes(range(224, 256))
    shares = dict(enumerate(split_secret(secret, threshold=3, shares=5)))
    for places in places_of(5, 1):
        joined = join_shares({place: shares[place] for place in places})
        assert (joined == secret) == (len(places) >= 3)


def test_an_upload_looks_the_same_whatever_is_in_it(tmp_path: Path) -> None:
    hospitals = Hospitals(tmp_path)
    first = hospitals.upload(0)
    # Even with all seeds that it shares with others the own mask covers it.
    values, _ = hospitals.encoded(0)
    for place in range(1, NUMBER):
        seed = hospitals.identities[place].agreed_key(
            hospitals.identities[0].public, b"feddm mask\0" + hospitals.terms.digest
        )
        add_mask((first.values,), seed, sign=-1)
    assert np.count_nonzero(first.values == values) <= 1


def test_server_that_lies_gets_nothing(tmp_path: Path) -> None:
    hospitals = Hospitals(tmp_path, minimum_peers=4)
    terms, client = hospitals.terms, hospitals.participants[0]
    masked = summed({place: hospitals.upload(place) for place in range(NUMBER)})
    with pytest.raises(PeersRefusedError, match="already"):
        client.begin(terms)  # a replay
    with pytest.raises(PeersRefusedError, match="already"):
        client.begin(dataclasses.replace(terms, attempt=0, server_round=2))
    question = masked.question(0)
    lies: list[tuple[list[int], list[bytes], str]] = [
        ([0, 1, 2], question[:3], "at least 4"),
        ([0, 0, 1, 1], question[:4], "at least 4"),
        ([0, 1, 2, 7], question[:4], "at least 4"),
        ([0, 1, 2, 3], [question[1], question[0], *question[2:4]], "changed"),
        ([0, 1, 2, 3], masked.question(1)[:4], "changed"),
    ]
    for attempt, (survivors, shares, why) in enumerate(lies, start=2):
        client.begin(dataclasses.replace(terms, attempt=attempt))
        with pytest.raises(PeersRefusedError, match=why):
            client.answer("run", attempt, survivors, shares)
        # The lie was the one question that there is.
        with pytest.raises(PeersRefusedError, match="before"):
            client.answer("run", attempt, [0, 1, 2, 3, 4], question)
    with pytest.raises(PeersRefusedError, match="not the last"):
        client.answer("run", 1, [0, 1, 2, 3, 4], question)
    with pytest.raises(PeersRefusedError, match="not the last"):
        client.answer("other", 1, [0, 1, 2, 3, 4], question)
    # What was noted outlives the process.
    again = Participant(hospitals.identities[1], FolderStore(tmp_path / "1"))
    again.answer("run", 1, [0, 1, 2, 3, 4], masked.question(1))
    with pytest.raises(PeersRefusedError, match="before"):
        hospitals.participants[1].answer("run", 1, [0, 1, 2, 3], masked.question(1)[:4])


def test_noise_of_a_sum_is_that_of_as_many_as_the_run_wants(tmp_path: Path) -> None:
    hospitals = Hospitals(tmp_path)
    hospitals.terms = dataclasses.replace(hospitals.terms, min_replies=4)
    masked = summed({place: hospitals.upload(place) for place in (0, 1, 3)})
    with pytest.raises(PeersRefusedError, match=r"3 of 5 hospitals .* at least 4"):
        hospitals.participants[0].answer("run", 1, [0, 1, 3], masked.question(0))


def test_masks_of_two_sums_are_not_taken_off_with_the_help_of_colluders(tmp_path: Path) -> None:
    hospitals = Hospitals(tmp_path)
    client = hospitals.participants[0]
    # Of five, two halves of three share one who answers both.
    for colluders, min_replies in ((1, 1), (2, 3), (3, 4)):
        terms = dataclasses.replace(
            hospitals.terms, colluders=colluders, min_replies=min_replies, attempt=9
        )
        with pytest.raises(PeersRefusedError, match="masks off"):
            client.begin(terms)
    client.begin(dataclasses.replace(hospitals.terms, colluders=2, min_replies=4, attempt=9))


@pytest.mark.parametrize("lie", ["min_replies", "model", "server_round", "purpose", "order"])
def test_clients_that_are_told_different_terms_give_no_shares(tmp_path: Path, lie: str) -> None:
    hospitals = Hospitals(tmp_path)
    changes: dict[str, object] = {
        "min_replies": {"min_replies": 2},
        "model": {"model": "other"},
        "server_round": {"server_round": 2},
        "purpose": {"purpose": "evaluate"},
        "order": {"peers": hospitals.terms.peers[::-1]},
    }
    other = dataclasses.replace(hospitals.terms, **changes[lie])  # type: ignore[arg-type]
    uploads = {place: hospitals.upload(place, other if place == 0 else None) for place in range(5)}
    masked = summed(uploads)
    with pytest.raises(PeersRefusedError, match="changed"):
        hospitals.participants[1].answer("run", 1, range(5), masked.question(1))


def test_peers_that_a_hospital_does_not_know_are_refused(tmp_path: Path) -> None:
    hospitals = Hospitals(tmp_path)
    identity, terms = hospitals.identities[0], hospitals.terms
    prints = [peer.fingerprint for peer in terms.peers]
    written = f" {prints[1].upper()}, {prints[2]},{prints[3]},"
    (tmp_path / "own").mkdir()
    client = Participant(
        identity, FolderStore(tmp_path / "own"), trusted=read_fingerprints(written)
    )
    with pytest.raises(PeersRefusedError, match=f"trusted-peers: {prints[4]}"):
        client.begin(terms)

    def of(*places: int, number: int | None = None) -> Terms:
        form = dataclasses.replace(FORMAT, num_clients=number or len(places))
        return dataclasses.replace(
            terms, peers=tuple(terms.peers[place] for place in places), format=form
        )

    with pytest.raises(PeersRefusedError, match="own keys"):
        client.begin(of(1, 2, 3))
    with pytest.raises(PeersRefusedError, match="at least 3"):
        client.begin(of(0, 1))
    with pytest.raises(PeersRefusedError, match="format"):
        client.begin(of(0, 1, 2, number=9))
    client.begin(of(0, 1, 2))
    with pytest.raises(ValueError, match="twice"):
        read_peers([terms.peers[0].to_bytes()] * 3)
    swapped = PublicKeys(prints[1].encode(), terms.peers[2].exchange, terms.peers[1].signature)
    with pytest.raises(ValueError, match="signature"):
        read_peers([dataclasses.replace(swapped, identity=terms.peers[1].identity).to_bytes()])
    for wrong in ("abc", f"{prints[0]};{prints[1]}", "g" * 32):
        with pytest.raises(ValueError, match="trusted-peers must be"):
            read_fingerprints(wrong)


def test_identity_is_made_once_and_for_its_owner_alone(tmp_path: Path) -> None:
    first = load_identity(tmp_path)
    assert load_identity(tmp_path).public == first.public
    file = tmp_path / IDENTITY_FILE
    assert file.stat().st_mode & 0o777 == 0o600
    assert PublicKeys.read(first.public.to_bytes()) == first.public
    file.write_bytes(b"half")
    with pytest.raises(ValueError, match="damaged"):
        load_identity(tmp_path)


def test_shares_that_a_client_falsifies_are_noticed(tmp_path: Path) -> None:
    hospitals = Hospitals(tmp_path)
    masked = summed({place: hospitals.upload(place) for place in range(NUMBER)})
    answers = {
        place: hospitals.participants[place].answer("run", 1, range(5), masked.question(place))
        for place in range(NUMBER)
    }
    wrong = bytes([answers[2][0][0] ^ 1]) + answers[2][0][1:]
    with pytest.raises(WrongSharesError, match="peer 0"):
        masked.total({**answers, 2: [wrong, *answers[2][1:]]})
    with pytest.raises(ValueError, match="answer must be"):
        masked.check_answer(answers[2][:4])
