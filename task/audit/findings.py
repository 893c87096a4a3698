"""What attacks and searches came to, in words that a person can sign below.

What was looked for and not found is called "not detected", with what would have shown; nothing is
called private.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from scipy.special import ndtri

from task.audit.membership import Attack
from task.evaluation.copy_measures import CopyMeasures
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
        measures: further figures, which describe and find nothing.
    """

    space: str
    found: Copying
    generated: int
    held_out: int
    measures: CopyMeasures


@dataclass(frozen=True)
class AuditFinding:
    """What was looked for, and what came of it.

    Attributes:
        subject: what was looked for, MEMBERS or COPIES.
        is_detected: whether it was found, beyond what chance does in `FALSE_ALARMS` of all audits.
        says: a sentence or more, with figures and their numbers of images.
        client: whose images alone it is about; None: those of all, or of several.
    """

    subject: str
    is_detected: bool
    says: str
    client: int | None = None


def findings(
    attacks: Sequence[Attack], searches: Sequence[Search], *, times: int = 1
) -> list[AuditFinding]:
    """Say what an audit came to.

    Attacks on all images, attacks on those of each client by the global model and by its own, and
    searches are a kind each, and share `FALSE_ALARMS` evenly; within a kind each attack or search
    is one look, and as many as there are would find something where nothing is.

    Args:
        attacks: on the model of a run and on those of clients.
        searches: for copies.
        times: how often so many attacks and searches were made, of which this is one.
    """
    kinds: dict[tuple[bool, bool], list[Attack]] = {}
    for each in sorted(attacks, key=_sort_of):
        kinds.setdefault(_sort_of(each), []).append(each)
    share = FALSE_ALARMS / times / max(1, len(kinds) + bool(searches))
    found = []
    for own in kinds.values():
        found += _of_attacks(own, share / len(own))
    return found + [_of_search(each, share / len(searches)) for each in searches]


def _sort_of(attack: Attack) -> tuple[bool, bool]:
    return attack.client is not None, attack.is_local


def _of_attacks(attacks: Sequence[Attack], level: float) -> list[AuditFinding]:
    """Say what attacks of one kind came to: for each client where it shows, else together."""
    found, quiet = [], []
    for client in dict.fromkeys(each.client for each in attacks):
        own = [each for each in attacks if each.client == client]
        strongest = min(own, key=lambda each: (each.found.p_value, each.name))
        is_detected = strongest.found.p_value < level
        if is_detected or client is None:
            says = _said(strongest, len(own), level)
            found.append(AuditFinding(MEMBERS, is_detected, says, client))
        else:
            quiet.append(strongest)
    if quiet:
        found.append(AuditFinding(MEMBERS, False, _said_together(quiet)))
    return found


def _said(strongest: Attack, number: int, level: float) -> str:
    """Say what all attacks on the same images came to, by the strongest."""
    found = strongest.found
    rates = "".join(
        f", {share:.1%} of them at {rate:.1%} false alarms"
        for rate, share in found.true_positives.items()
    )
    figures = (
        f"The strongest of the attacks ({number}), {strongest.name}, has an AUC of {found.auc:.2f} "
        f"(95 % interval {found.low:.2f} to {found.high:.2f}; 0.5 is guessing{rates}; "
        f"n={found.members:,} and {found.others:,} held out, of {found.patients[0]:,} and "
        f"{found.patients[1]:,} patients)"
    )
    if found.p_value < level:
        told = "training images can be told from others of their kind"
        return f"{strongest.whose}: {told}. {figures}."
    least = 0.5 + float(-ndtri(level)) * found.error
    return (
        f"{strongest.whose}: membership. {figures}. An AUC below {least:.2f} would not show, and "
        "other attacks may find more."
    )


def _said_together(attacks: Sequence[Attack]) -> str:
    """Say of which clients nothing was detected, and how much that is worth."""
    clients = " ".join(str(each.client) for each in attacks)
    aucs = [each.found.auc for each in attacks]
    least = min(each.found.others for each in attacks)
    model = "their own models" if attacks[0].is_local else "the global model"
    return (
        f"Images of single clients, on {model}: membership, of {clients}. AUC of the "
        f"strongest attack on each {min(aucs):.2f} to {max(aucs):.2f}; with as few as {least:,} "
        "held-out images of a client only strong memory shows."
    )


def _of_search(search: Search, level: float) -> AuditFinding:
    found, space = search.found, search.space
    figures = (
        f"n={search.generated:,}, {search.held_out:,} held out, p={found.p_value:.2g}; median "
        f"distance to the nearest training image {found.generated:.4g}, of held-out images "
        f"{found.held_out:.4g}"
    )
    if found.p_value < level:
        return AuditFinding(
            COPIES,
            True,
            f"Copies in {space}: {found.copied:.1%} more of the generated images than of held-out "
            f"ones lie near a training image ({figures}).",
        )
    least = least_share_shown(search.generated, search.held_out, level)
    shows = (
        "too few images were held out to show any"
        if least is None
        else (f"fewer than {least:.1%} would not show")
    )
    return AuditFinding(COPIES, False, f"Copies in {space} ({figures}); {shows}.")
