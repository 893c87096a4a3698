"""What attacks and searches came to, in words that a person can sign below.

What was looked for and not found is called "not detected", with what would have shown; nothing is
called private.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from scipy.special import ndtri

from task.audit.membership import Attack
from task.audit.roc import FEWEST_PATIENTS
from task.evaluation.near_copies import Copying, least_share_shown

# One in a hundred audits of models that remember nothing says otherwise.
FALSE_ALARMS = 0.01
# What is looked for.
MEMBERS = "training images that can be told from others"
COPIES = "copies of training images"


@dataclass(frozen=True)
class Search:
    """A search for copies.

    Attributes:
        space: in which images were compared: "pixels" or "features".
        found: what came of it.
        generated: images that were drawn.
        held_out: real images beside them.
    """

    space: str
    found: Copying
    generated: int
    held_out: int


class Outcome(StrEnum):
    """What came of looking for something."""

    DETECTED = "DETECTED"
    NOT_DETECTED = "not detected"
    # Too few images to show even what is there in full.
    NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class AuditFinding:
    """What was looked for, and what came of it.

    Attributes:
        subject: what was looked for, MEMBERS or COPIES.
        outcome: DETECTED only beyond what chance does in `FALSE_ALARMS` of all audits.
        says: a sentence or more, with figures and their numbers of images.
        client: whose images alone it is about; None: those of all, or of several.
    """

    subject: str
    outcome: Outcome
    says: str
    client: int | None = None

    @property
    def line(self) -> str:
        """The outcome, then what it says."""
        return f"{self.outcome}: {self.says}"


def findings(
    attacks: Sequence[Attack],
    searches: Sequence[Search] = (),
    *,
    skipped: Sequence[int] = (),
    times: int = 1,
) -> list[AuditFinding]:
    """Say what an audit came to.

    Attacks on all images, attacks on those of each client by the global model and by its own, and
    searches are a kind each, and share `FALSE_ALARMS` evenly. Within a kind clients share its part
    evenly, and the attacks on the images of one its part again: as many looks as there are would
    find something where nothing is, and no client can take from the part of another.

    Args:
        attacks: on the model of a run and on those of clients.
        searches: for copies.
        skipped: clients of whom too few patients were there to be attacked.
        times: how often so many attacks and searches were made, of which this is one.
    """
    kinds: dict[tuple[bool, bool], list[Attack]] = {}
    for each in sorted(attacks, key=_sort_of):
        kinds.setdefault(_sort_of(each), []).append(each)
    share = FALSE_ALARMS / times / max(1, len(kinds) + bool(searches))
    found = []
    for own in kinds.values():
        found += _of_attacks(own, share)
    if skipped:
        says = (
            f"{_numbered(skipped)}: not attacked. Images of fewer than {FEWEST_PATIENTS} patients "
            "were trained on, or held out, or the hospital declines (audit=false)."
        )
        found.append(AuditFinding(MEMBERS, Outcome.NOT_MEASURED, says))
    return found + [_of_search(each, share / len(searches)) for each in searches]


def _sort_of(attack: Attack) -> tuple[bool, bool]:
    return attack.client is not None, attack.is_local


class _Look(NamedTuple):
    """The strongest of the attacks on the same images, of so many, and the level of each."""

    strongest: Attack
    number: int
    level: float

    @property
    def outcome(self) -> Outcome:
        found = self.strongest.found
        if found.p_value < self.level:
            return Outcome.DETECTED
        shows = found.least_p_value < self.level
        return Outcome.NOT_DETECTED if shows else Outcome.NOT_MEASURED

    @property
    def least_auc(self) -> float:
        """Below it nothing would have shown."""
        return min(1.0, 0.5 + float(-ndtri(self.level)) * self.strongest.found.error)


def _of_attacks(attacks: Sequence[Attack], share: float) -> list[AuditFinding]:
    """Say what attacks of one kind came to: for each client where it shows, else together."""
    found: list[AuditFinding] = []
    quiet: dict[Outcome, list[_Look]] = {}
    clients = dict.fromkeys(each.client for each in attacks)
    for client in clients:
        own = [each for each in attacks if each.client == client]
        strongest = min(own, key=lambda each: (each.found.p_value, each.name))
        look = _Look(strongest, len(own), share / len(clients) / len(own))
        if look.outcome is Outcome.DETECTED or client is None:
            found.append(AuditFinding(MEMBERS, look.outcome, _said(look), client))
        else:
            quiet.setdefault(look.outcome, []).append(look)
    return found + [
        AuditFinding(MEMBERS, outcome, _said_together(looks, outcome))
        for outcome, looks in sorted(quiet.items())
    ]


def _said(look: _Look) -> str:
    """Say what all attacks on the same images came to, by the strongest."""
    attack, found = look.strongest, look.strongest.found
    low, high = found.interval(2 * look.level)
    rates = "".join(
        f"; a threshold that {rate:g} of the held-out images pass finds {share:.1%} of the others"
        for rate, share in found.true_positives.items()
    )
    figures = (
        f"Of the attacks ({look.number}) the strongest, {attack.name}, has an AUC of "
        f"{found.auc:.2f}, where 0.5 is guessing ({100 * (1 - 2 * look.level):.4g} % interval, as "
        f"wide as so many looks need: {low:.2f} to {high:.2f}{rates}). Attacked were "
        f"{found.members:,} training images and {found.others:,} held-out ones, of "
        f"{found.patients[0]:,} and {found.patients[1]:,} patients as far as these are known."
    )
    whose = "" if attack.client is None else f" of client {attack.client}"
    told = f"training images{whose} by {_model(attack)}"
    if look.outcome is Outcome.DETECTED:
        return f"Attacks tell {told} from held-out ones. {figures}"
    if look.outcome is Outcome.NOT_MEASURED:
        return f"Attacks on {told} cannot say anything of so few. {figures}"
    return (
        f"Attacks do not tell {told} from held-out ones. {figures} An AUC below "
        f"{look.least_auc:.2f} would not show, and other attacks may find more."
    )


def _said_together(looks: Sequence[_Look], outcome: Outcome) -> str:
    """Say of which clients nothing was detected, or could be, and how much that is worth."""
    attacks = [each.strongest for each in looks]
    clients = [int(each.client) for each in attacks if each.client is not None]
    model = f"{_model(attacks[0])}{'s' * (attacks[0].is_local and len(clients) > 1)}"
    numbers = [
        _from_to([getattr(each.found, name) for each in attacks], ",")
        for name in ("members", "others")
    ]
    figures = (
        f"The strongest attack on each has an AUC of "
        f"{_from_to([each.found.auc for each in attacks], '.2f')}, on {numbers[0]} training images "
        f"and {numbers[1]} held-out ones of a client"
    )
    if outcome is Outcome.NOT_MEASURED:
        return f"{_numbered(clients)}, by {model}: too few images for attacks to show. {figures}."
    least = _from_to([each.least_auc for each in looks], ".2f")
    return (
        f"Attacks do not tell training images from held-out ones of {_numbered(clients).lower()}, "
        f"by {model}. {figures}; an AUC below {least} would not show."
    )


def _model(attack: Attack) -> str:
    return "its own model" if attack.is_local else "the global model"


def _numbered(clients: Sequence[int]) -> str:
    listed = " ".join(map(str, clients))
    return f"Client{'s' * (len(clients) > 1)} {listed}"


def _from_to(values: Sequence[float], form: str) -> str:
    least, most = (f"{each:{form}}" for each in (min(values), max(values)))
    return least if least == most else f"{least} to {most}"


def _of_search(search: Search, level: float) -> AuditFinding:
    found, space = search.found, search.space
    figures = (
        f"n={search.generated:,}, {search.held_out:,} held out, p={found.p_value:.2g}; median "
        f"distance to the nearest training image {found.generated:.4g}, of held-out images "
        f"{found.held_out:.4g}"
    )
    if found.p_value < level:
        says = (
            f"Copies in {space}: {found.copied:.1%} more of the generated images than of held-out "
            f"ones lie near a training image ({figures})."
        )
        return AuditFinding(COPIES, Outcome.DETECTED, says)
    least = least_share_shown(search.generated, search.held_out, level)
    if least is None:
        says = f"Copies in {space}: too few images were held out to show any ({figures})."
        return AuditFinding(COPIES, Outcome.NOT_MEASURED, says)
    says = f"Copies in {space} ({figures}); fewer than {least:.1%} would not show."
    return AuditFinding(COPIES, Outcome.NOT_DETECTED, says)
