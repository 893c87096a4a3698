"""What a reader of a run should know first: signs that its figures may mislead."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from statistics import median

from task.audit.findings import COPIES, MEMBERS, Outcome, findings
from task.audit.records import audited_rounds, newest_audit
from task.audit.roc import FEWEST_PATIENTS
from task.evaluation.near_copies import least_share_shown
from task.evaluation.noise_position import MOST_COMPARED
from task.reporting.metric_table import Quantity
from task.runs.commands import describe_divergence
from task.runs.records import HELD_OUT, SCORING_CLIENTS, TRAIN, Record, Records, Series
from task.runs.run import Run

# Below five values a median and its deviations say nothing of a sixth.
LEAST_COMPARED = 5
# Deviations from the median, in units of a normal distribution's sigma. Clients whose images differ
# in kind spread widely, so that the usual 3.5 would point at honest ones.
FAR = 6.0
# 1.4826 times the median absolute deviation is the sigma of a normal distribution.
SIGMAS_PER_MAD = 1.4826
# Clients that are nearly alike are not far apart for a difference below a tenth of the median.
LEAST_SPREAD = 0.1 / FAR
# Of the rounds in which a client could be compared: a single odd round is no drift.
DRIFTING_SHARE = 0.25
LEAST_DRIFTING_ROUNDS = 2

# What is compared between the clients of a round.
COMPARED = {"train loss": Quantity("loss", TRAIN), "update norm": Quantity("update_norm")}

# Of each class; fewer leave an agreement or a distance to chance.
LEAST_PER_CLASS = 50
# Between real images and noise (`noise_position`): blurred real images come so far, and a model
# that was hardly trained further.
UNTRAINED = 0.5
# One in a hundred honest runs comes so far.
SIGNIFICANT = 0.01


# Of the way from chance to real images, of an agreement that shows the classes.
LEAST_ABOVE_CHANCE = 0.5


class State(StrEnum):
    """What came of looking for something."""

    WARNING = "warning"
    CLEAR = "not found"
    UNMEASURED = "not measured"


OUTCOME_STATES = {
    Outcome.DETECTED: State.WARNING,
    Outcome.NOT_DETECTED: State.CLEAR,
    Outcome.NOT_MEASURED: State.UNMEASURED,
}


@dataclass(frozen=True)
class Check:
    """One thing that was looked for in a run, or could not be.

    Attributes:
        subject: what was looked for, as the end of "looked for ...".
        state: what came of it.
        says: a sentence or more with the figures, their numbers of images, and what to do.
        client: whose own score it is about; None: it is about the run.
    """

    subject: str
    state: State
    says: str
    client: int | None = None


def checks(run: Run) -> list[Check]:
    """List what was looked for in a run, with what came of it; all that can mislead is in it."""
    looks = (
        _unfinished_check,
        _clients_check,
        _divergence_check,
        _drift_check,
        _leak_check,
        image_checks,
        memory_checks,
    )
    return [check for look in looks for check in look(run)]


def image_checks(run: Run) -> list[Check]:
    """List those of the checks that are about the generated images; of a finished run, its last."""
    if not run.draws:
        return []
    if run.finished:
        run = run.of_round(run.rounds_done)
    looks = (_noise_checks, _class_checks, _number_checks)
    return [check for look in looks for check in look(run)]


def warning_signs(run: Run) -> list[str]:
    """List what a reader should know first, a sentence each; empty where there is nothing."""
    return [check.says for check in checks(run) if check.state is State.WARNING]


def closing_lines(run: Run) -> list[str]:
    """Say for the end of a log what may be wrong, and what was not measured of the images."""
    looked = [*image_checks(run), *memory_checks(run)]
    gaps = [check for check in looked if check.state is State.UNMEASURED]
    return [f"{State.WARNING}: {sign}" for sign in warning_signs(run)] + [
        f"{gap.state}: {gap.subject}. {gap.says}" for gap in gaps
    ]


def _checked(subject: str, signs: Iterable[str], otherwise: str) -> list[Check]:
    """Make a warning of each sign, or say that there is none."""
    found = [Check(subject, State.WARNING, sign) for sign in signs]
    return found or [Check(subject, State.CLEAR, otherwise)]


def _unfinished_check(run: Run) -> list[Check]:
    if run.running and not run.finished:
        return []
    rounds = f"All {run.config.federation.rounds} rounds are done."
    return _checked("an unfinished run", _unfinished(run), rounds)


def _clients_check(run: Run) -> list[Check]:
    if run.setting == "centralized":
        return []
    signs = [*_left_out_clients(run), *_absent(run)]
    everyone = f"Every client replied whenever it was asked ({len(run.clients)} in all)."
    return _checked("clients left out or not there", signs, everyone)


def _divergence_check(run: Run) -> list[Check]:
    if run.setting == "centralized":
        return []
    signs = [
        f"The training of client {client} shows a failure in "
        f"{_counted_rounds(len({each.round for each in own}))}: {own[-1].context['reason']}."
        for client, own in run.records.of_client_divergence().items()
    ]
    return _checked("clients that diverge", signs, "No single client's training has diverged.")


def _drift_check(run: Run) -> list[Check]:
    if run.setting == "centralized":
        return []
    subject, number = "clients that drift", len(run.clients)
    if number < LEAST_COMPARED:
        few = f"Clients are compared where there are {LEAST_COMPARED} or more; here: {number}."
        return [Check(subject, State.UNMEASURED, few)]
    alike = f"None of {number} clients is far from the others in loss or in the size of its update."
    return _checked(subject, _drifting(run), alike)


def _leak_check(run: Run) -> list[Check]:
    if run.trained_on_test is None:
        return []
    classes = zip(run.config.data.classes, run.trained_on_test, strict=True)
    each = ", ".join(f"{name} {number:,}" for name, number in classes if number)
    sign = (
        f"Test images are training images too, pixel by pixel ({each}): what is measured with them "
        "is too good; take them out of one of the splits."
    )
    clear = "No test image is a training image too."
    return _checked("test images that were trained on", [sign] if each else [], clear)


def _noise_checks(run: Run) -> list[Check]:
    subject = "images that look like noise"
    found = [
        Check(
            subject,
            State.WARNING if place.value >= UNTRAINED else State.CLEAR,
            f"{_SAYS_PLACE[place.value >= UNTRAINED]} Between real images (0) and noise (1) they "
            f"lie at {place.value:.2f}"
            + ("" if place.real is None else f", other real images at {place.real:.2f}")
            + f" ({place.where}{_compared(place)}).",
        )
        for place in _measured(run, "noise_position")
    ]
    return found or [Check(subject, State.UNMEASURED, _why_unmeasured(run))]


def _compared(place: "_Figure") -> str:
    """Say how many images a place between real and noise is of, where that is another number."""
    some = f", {MOST_COMPARED} of them compared" if place.number > MOST_COMPARED else ""
    return some + ("" if place.num_real is None else f", {place.num_real:,} real ones")


_SAYS_PLACE = {
    True: "The images look untrained: they are nearer to noise than to real images. Train longer.",
    False: "The images are nearer to real images than to noise.",
}


def _class_checks(run: Run) -> list[Check]:
    subject = "images of other classes than asked for"
    found = [
        _class_check(subject, each, _chance_beside(run, each))
        for each in _measured(run, "class_agreement")
    ]
    if any(check.state is State.WARNING for check in _noise_checks(run)):
        noise = "A classifier may find any class in images that look like noise."
        found = [
            replace(check, state=State.UNMEASURED, says=f"{noise} {check.says}")
            if check.state is State.CLEAR
            else check
            for check in found
        ]
    return found or [Check(subject, State.UNMEASURED, _why_unmeasured(run))]


def _class_check(subject: str, found: "_Figure", chance: float) -> Check:
    real = "" if found.real is None else f", of held-out real images in {found.real:.1%}"
    says = (
        f"The class asked for is found in {found.value:.1%} of the images{real}; one class for all "
        f"would be right in {chance:.1%} ({found.where})."
    )
    if chance == 1:
        return Check(subject, State.UNMEASURED, f"There is one class alone. {says}")
    if found.real is not None and found.real <= chance:
        blind = f"The classifier does not know real images either, so nothing can be said. {says}"
        return Check(subject, State.UNMEASURED, blind)
    from scipy.stats import binomtest  # takes a second to import

    right = round(found.value * found.number)
    if binomtest(right, found.number, chance, "greater").pvalue >= SIGNIFICANT:
        return Check(subject, State.WARNING, f"The classes do not show beyond chance. {says}")
    if found.value - chance < LEAST_ABOVE_CHANCE * ((found.real or 1) - chance):
        return Check(subject, State.WARNING, f"The classes show little. {says}")
    return Check(subject, State.CLEAR, says)


def _copying_checks(run: Run) -> list[Check]:
    searches = [*_searches(run)]
    found = [_copying_check(each, len(searches)) for each in searches]
    return found or [Check(COPIES, State.UNMEASURED, _why_not_searched(run))]


def _copying_check(found: "_Search", num_searches: int) -> Check:
    where = f"{found.where}, n={found.number:,}, {found.held_out:,} held out, p={found.p_value:.2g}"
    # As many searches as there are would find something where nothing is.
    if found.p_value < SIGNIFICANT / num_searches:
        says = (
            "Generated images lie closer to training images than real held-out ones do: "
            f"{found.share:.1%} more of them are near in {found.space} ({where}). Look at them for "
            "copies."
        )
        return Check(COPIES, State.WARNING, says, found.client)
    least = least_share_shown(found.number, found.held_out, SIGNIFICANT / num_searches)
    if least is None:
        few = f"Too few images were held out to show any copies in {found.space} ({where})."
        return Check(COPIES, State.UNMEASURED, few, found.client)
    says = (
        f"Generated images lie no closer to training images in {found.space} than held-out ones do "
        f"({where}); fewer copies than {least:.1%} would not show."
    )
    return Check(COPIES, State.CLEAR, says, found.client)


def memory_checks(run: Run) -> list[Check]:
    """List what was looked for of training images in the weights and images of a run's last round.

    In all of them together one honest run of fifty finds something: one of a hundred in the
    searches, and one in the attacks.
    """
    if run.finished:
        run = run.of_round(run.rounds_done)
    searched = _copying_checks(run) if run.draws else []
    return [*searched, *_membership_checks(run)]


def _membership_checks(run: Run) -> list[Check]:
    audit = newest_audit(run)
    if audit is None:
        return [Check(MEMBERS, State.UNMEASURED, _why_not_audited(run))]
    if not audit.attacks:
        return [Check(MEMBERS, State.UNMEASURED, _why_not_attacked(run))]
    # Half of the false alarms is left for the rounds before.
    times = 2 if len(audited_rounds(run.records)) > 1 else 1
    return [
        Check(MEMBERS, OUTCOME_STATES[each.outcome], each.says, each.client)
        for each in findings(audit.attacks, skipped=audit.skipped, times=times)
    ]


def far_rounds(series: Mapping[int, Series]) -> dict[int, tuple[int, int]]:
    """Count the rounds in which each client's value is far from those of the others.

    Far is more than `FAR` sigmas from the median of the clients of the round, where sigma is
    estimated from the median absolute deviation, which a few odd clients do not move.

    Args:
        series: values by client.

    Returns:
        By client, the rounds in which it is far, and those in which it could be compared.
    """
    counts = dict.fromkeys(series, (0, 0))
    for number in {number for values in series.values() for number in values}:
        present = {client: values[number] for client, values in series.items() if number in values}
        if len(present) < LEAST_COMPARED:
            continue
        middle = median(present.values())
        deviation = median(abs(value - middle) for value in present.values())
        sigma = max(SIGMAS_PER_MAD * deviation, LEAST_SPREAD * abs(middle))
        for client, value in present.items():
            far, compared = counts[client]
            counts[client] = (far + (abs(value - middle) > FAR * sigma), compared + 1)
    return counts


def _unfinished(run: Run) -> Iterator[str]:
    if run.divergence is not None:
        told = describe_divergence(run.config, run.path, run.divergence)
        yield f"{told[0].upper()}{told[1:]}."
    elif not run.finished:
        done = f"{run.rounds_done} of {run.config.federation.rounds} rounds are done"
        yield f"The run is not finished: {done}, and nothing goes on with it."


def _left_out_clients(run: Run) -> Iterator[str]:
    for client in run.clients:
        own = [each for each in run.records.left_out if each.client == client]
        reasons = dict.fromkeys(each.context["reason"] for each in own)
        if own:
            rounds = len({each.round for each in own})
            yield (
                f"Client {client} was left out {_times(len(own))} in {_counted_rounds(rounds)}: "
                f"{'; '.join(reasons)}."
            )


def _absent(run: Run) -> Iterator[str]:
    states = run.participation()
    for client in run.clients:
        missed = [
            number
            for (number, who), state in states.items()
            if who == client and state == "not there"
        ]
        if missed:
            yield (
                f"Client {client} was not there in {_counted_rounds(len(missed))} although all "
                f"clients are asked (first in round {min(missed)}, last in round {max(missed)})."
            )


def _drifting(run: Run) -> Iterator[str]:
    for title, (metric, reference) in COMPARED.items():
        series = run.records.of_clients(metric, reference=reference)
        for client, (far, compared) in far_rounds(series).items():
            if far >= max(LEAST_DRIFTING_ROUNDS, DRIFTING_SHARE * compared):
                yield (
                    f"Client {client} drifts: its {title} is far from that of the other clients "
                    f"in {far} of {compared} rounds (more than {FAR:g} robust standard deviations "
                    "from their median). It may have other images, many more or fewer, or a fault."
                )


@dataclass(frozen=True)
class _Figure:
    """A quantity with those of real images and of chance, numbers of images, and what it is of."""

    value: float
    real: float | None
    chance: float | None
    number: int
    num_real: int | None
    where: str


@dataclass(frozen=True)
class _Search:
    """A search for copies: how many more images are near than of those held out, and p."""

    share: float
    p_value: float
    space: str
    number: int
    held_out: int
    where: str
    client: int | None = None


def _measured(run: Run, metric: str) -> Iterator[_Figure]:
    """Find a quantity wherever it was measured last: files of evaluations, the run, hospitals."""
    evaluated = False
    for each in run.current_evaluations:
        found = each.records.last(metric)
        if found is not None:
            evaluated = evaluated or not each.otherwise
            number = each.label.n_generated
            yield _figure(each.records, found, number, f"n={number:,}, {each.name}")
    found, scored = (run.records.last(metric, reference=of) for of in (None, HELD_OUT))
    # An evaluation at the end of a run is recorded in the run, too.
    if found is not None and not evaluated:
        yield _figure(run.records, found, found.n or 0, f"n={found.n or 0:,}")
    if scored is not None:
        number = _num_scored(run)
        where = f"n={number:,}, scored by {run.records.value(SCORING_CLIENTS):.0f} hospitals"
        yield _figure(run.records, scored, number, where)


def _figure(records: Records, found: Record, number: int, where: str) -> _Figure:
    real = records.last(found.metric, reference=found.reference, real=True)
    return _Figure(
        found.value,
        None if real is None else real.value,
        records.value("chance_agreement", reference=found.reference),
        number,
        None if real is None or found.reference == HELD_OUT else real.n,
        where,
    )


def _num_scored(run: Run) -> int:
    """Return the number of images that hospitals scored last; 0 where they scored none."""
    scored = run.records.last(SCORING_CLIENTS)
    if scored is None:
        return 0
    # A run of the first schema says it of its last round alone.
    return run.config.eval.num_images if scored.n is None else scored.n


def _chance_beside(run: Run, found: _Figure) -> float:
    """Return the agreement by chance, of an older version as with equally many of each class."""
    return 1 / len(run.config.data.classes) if found.chance is None else found.chance


def _searches(run: Run) -> Iterator[_Search]:
    audit = newest_audit(run)
    for search in () if audit is None else audit.searches:
        yield _Search(
            search.found.copied,
            search.found.p_value,
            search.space,
            search.generated,
            search.held_out,
            "by feddm audit",
        )
    evaluated = False
    for each in run.current_evaluations:
        evaluated = evaluated or not each.otherwise
        label = each.label
        numbers = label.n_generated, label.n_test
        yield from _searches_in(each.records, numbers, each.name)
    held_out, found = run.records.value("num_held_out"), run.records.last("pixel_copied")
    # All metrics at the end of a run are recorded in the run, too.
    if found is not None and held_out and not evaluated:
        yield from _searches_in(run.records, (found.n or 0, int(held_out)), "in the run")
    for client in run.clients:
        own = int(run.records.value("num_held_out", client=client) or 0)
        numbers = _num_scored(run), own
        yield from _searches_in(
            run.records, numbers, f"at client {client}", client=client, reference=HELD_OUT
        )


def _searches_in(
    records: Records,
    numbers: tuple[int, int],
    where: str,
    client: int | None = None,
    reference: str | None = None,
) -> Iterator[_Search]:
    for space in ("pixel", "feature"):
        share, p_value = (
            records.value(f"{space}_{of}", client=client, reference=reference)
            for of in ("copied", "p_value")
        )
        # Fewer than were held out: one of each patient.
        beside = records.last(f"{space}_distance", real=True)
        number, held_out = numbers
        if client is None and beside is not None:
            held_out = beside.n or held_out
        if share is not None and p_value is not None:
            yield _Search(share, p_value, f"{space}s", number, held_out, where, client)


def _why_unmeasured(run: Run) -> str:
    """Say why a run has not measured what it could have."""
    if not run.finished:
        return "The run measures its images at its end."
    if run.setting == "real nodes":
        return "No hospital has said how the images compare with its own."
    if run.config.eval.num_images == 0 and not run.config.eval.final_metrics:
        return "eval.num_images=0: measure with feddm evaluate."
    return "The run did not measure it: measure with feddm evaluate."


def _why_not_searched(run: Run) -> str:
    data = run.config.data
    if run.finished and run.setting != "real nodes" and data.test_fraction is None:
        return (
            "No search was recorded. It needs real images that were not trained on: a test split, "
            "or data.test_fraction."
        )
    return _why_unmeasured(run)


def _why_not_audited(run: Run) -> str:
    """Say why nobody has looked whose images the weights were trained on."""
    config = run.config
    if run.setting == "real nodes" and not config.tells_of_clients:
        return (
            "Hospitals say nothing of their own images with privacy.mechanism=dp_sgd or "
            "federation.secure_aggregation=true."
        )
    if not config.audit.at_end:
        audits = "" if run.setting == "real nodes" else ": look with feddm audit"
        return f"audit.at_end=false{audits}."
    if not run.finished:
        return "The run looks for them at its end."
    return "The run did not look for them."


def _why_not_attacked(run: Run) -> str:
    """Say why an audit made no attack."""
    local, drawn_by = run.config.federation.local, run.config.federation.drawn_by
    if run.setting != "centralized" and local and drawn_by == "global":
        return f"federation.local={local}: attacks would look through what stays at the clients."
    if run.setting == "real nodes":
        return "No hospital attacked: they decline (audit=false), or hold too few images out."
    if run.config.data.test_fraction is None and not run.records.value("num_held_out"):
        return "It needs real images that were not trained on: a test split, or data.test_fraction."
    return (
        f"No attack is known for a {run.generator.title}, or too few images are held out: "
        f"of {FEWEST_PATIENTS} patients at least."
    )


def _number_checks(run: Run) -> list[Check]:
    classes = len(run.config.data.classes)
    # By what measured them: the images, and those of the class that has the fewest.
    measured: dict[str, tuple[int, int]] = {}
    for each in run.current_evaluations:
        label = each.label
        even = label.n_generated // classes
        measured[each.name] = label.n_generated, even if label.n_rarest is None else label.n_rarest
    quick = run.records.last("class_agreement")
    if quick is not None and quick.n is not None and not measured:
        measured["the run"] = quick.n, quick.n // classes
    if run.records.value(SCORING_CLIENTS):
        scored = _num_scored(run)
        measured["the hospitals' scores"] = scored, scored // classes
    if not measured:
        return []
    subject = f"fewer than {LEAST_PER_CLASS} measured images of a class"
    counts = {
        what: f"{number:,} of {classes} classes in {what}, at least {least:,} of each"
        for what, (number, least) in measured.items()
    }
    signs = [
        f"Few images of a class were measured: {counts[what]}. Below {LEAST_PER_CLASS} the figures "
        "are left to chance; raise eval.num_images or eval.num_per_class."
        for what, (_, least) in measured.items()
        if least < LEAST_PER_CLASS
    ]
    return _checked(subject, signs, f"Measured were {'; '.join(counts.values())}.")


def _times(number: int) -> str:
    return "once" if number == 1 else f"{number} times"


def _counted_rounds(number: int) -> str:
    return f"{number} round{'' if number == 1 else 's'}"
