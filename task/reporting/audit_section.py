"""What a run remembers of its training images, for its page: findings, figures, their course."""

from collections.abc import Sequence
from typing import Any

from task.audit.findings import Outcome, findings
from task.audit.membership import Attack
from task.audit.records import audited_rounds, newest_audit, recorded_attacks
from task.reporting.warning_signs import OUTCOME_STATES, SIGNIFICANT, memory_checks
from task.runs.records import TEST
from task.runs.run import Run

ATTACK_HEADS = (
    *("images of", "attack", "AUC", "95 % interval", "TPR at 1 % FPR", "at 0.1 %"),
    *("members", "held out"),
)
OUTCOMES = {state: outcome for outcome, state in OUTCOME_STATES.items()}


def attack_rows(attacks: Sequence[Attack]) -> list[tuple[str, ...]]:
    """Lay attacks out as rows below `ATTACK_HEADS`."""
    return [_attack_row(each) for each in attacks]


def _attack_row(attack: Attack) -> tuple[str, ...]:
    found = attack.found
    shares = (found.true_positives.get(rate) for rate in (0.01, 0.001))
    whose = "all" if attack.client is None else f"client {attack.client}"
    return (
        f"{whose}, own model" if attack.is_local else whose,
        attack.name,
        f"{found.auc:.3f}",
        f"{found.low:.3f} to {found.high:.3f}",
        *("too few" if share is None else f"{share:.1%}" for share in shares),
        f"{found.members:,}",
        f"{found.others:,}",
    )


def course_sentences(run: Run) -> list[str]:
    """Say of a run with several audits after which round what it remembers showed first."""
    rounds = audited_rounds(run.records)
    if len(rounds) < 2:
        return []
    p_values = run.records.series("pixel_p_value")
    looked = {
        "training images can be told from held-out ones": [
            number for number in rounds if _shows(run, number, rounds)
        ],
        "copies show in pixels": [
            number for number, p_value in p_values.items() if p_value < SIGNIFICANT / len(p_values)
        ],
    }
    said = [f"Audited were rounds {' '.join(map(str, rounds))}."]
    for what, shown in looked.items():
        after = f"first after round {min(shown)}" if shown else "after none of them"
        said.append(f"That {what} was detected {after}.")
    losses = run.records.series("loss", reference=TEST)
    if losses:
        best, last = min(losses, key=lambda number: (losses[number], number)), max(losses)
        said.append(
            f"The test loss was least after round {best}, {losses[best]:.4g}; after round {last} "
            f"it is {losses[last]:.4g}."
        )
    return [" ".join(said)]


def _shows(run: Run, number: int, rounds: Sequence[int]) -> bool:
    """Whether attacks of a round show; those of the last have half of the false alarms."""
    times = 2 if number == rounds[-1] else 2 * (len(rounds) - 1)
    found = findings(recorded_attacks(run.records, number), times=times)
    return any(each.outcome is Outcome.DETECTED for each in found)


def audit_section(run: Run) -> dict[str, Any]:
    """Collect what a page says of what the weights remember."""
    audit = newest_audit(run)
    return {
        "findings": [
            f"{OUTCOMES[check.state]}: {check.subject}. {check.says}"
            for check in memory_checks(run)
        ],
        "course": course_sentences(run),
        "title": "" if audit is None else f"Attacks on round {audit.round}, {audit.by}",
        "heads": ATTACK_HEADS,
        "rows": () if audit is None else attack_rows(audit.attacks),
    }
