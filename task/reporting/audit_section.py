"""What the weights of a run remember, for its page: findings, figures, and their course."""

from collections.abc import Mapping, Sequence
from typing import Any

from task.audit.findings import AuditFinding, findings
from task.audit.membership import Attack
from task.audit.records import audited_rounds, newest_audit, recorded_attacks
from task.runs.records import TEST
from task.runs.run import Run

ATTACK_HEADS = (
    *("images of", "attack", "AUC", "95 % interval", "TPR at 1 % FPR", "at 0.1 %"),
    *("members", "held out"),
)


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


def finding_lines(found: Sequence[AuditFinding]) -> list[str]:
    """Write findings as lines that say first what came of each."""
    return [f"{'DETECTED' if each.is_detected else 'not detected'}: {each.says}" for each in found]


def stopping_sentences(run: Run) -> list[str]:
    """Say of a run with several audits after which round memory showed, and where to stop."""
    rounds = audited_rounds(run.records)
    if len(rounds) < 2:
        return []
    shown = [
        number
        for number in rounds
        if any(each.is_detected for each in _findings_of_round(run, number, len(rounds)))
    ]
    listed = " ".join(map(str, rounds))
    said = [
        f"Rounds {listed} were audited. Training images can first be told from others after "
        f"round {shown[0]}."
        if shown
        else f"Rounds {listed} were audited, and nothing was detected after any of them."
    ]
    losses: Mapping[int, float] = run.records.series("loss", reference=TEST)
    if losses:
        best = min(losses, key=lambda number: (losses[number], number))
        said.append(
            f"The test loss was least after round {best} ({losses[best]:.4g}); what is trained "
            "further fits the training images alone."
            if best != max(losses)
            else f"The test loss was least after the last round, {best} ({losses[best]:.4g})."
        )
    return said


def _findings_of_round(run: Run, number: int, looks: int) -> list[AuditFinding]:
    return findings(recorded_attacks(run.records, number), [], times=looks)


def audit_section(run: Run) -> dict[str, Any] | None:
    """Collect what a page says of what the weights remember; None where nobody looked."""
    audit = newest_audit(run)
    if audit is None:
        return None
    return {
        "title": f"Attacks on the weights of round {audit.round}, {audit.by}",
        "findings": finding_lines(audit.findings),
        "course": stopping_sentences(run),
        "heads": ATTACK_HEADS,
        "rows": attack_rows(audit.attacks),
    }
