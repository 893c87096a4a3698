"""By what patients are known again, from one run to another."""

from pathlib import Path

from task.config import load_config
from task.data import build_dataset
from task.privacy.accounting import Spending
from task.privacy.ledger import Charge, Ledger
from task.privacy.patients import names_of_patients
from tests.data.test_data_files import eyes, write_odir

STEPS = Spending(10.0, 1.0, 1)


def test_patient_is_known_again_at_another_size_and_in_another_file(tmp_path: Path) -> None:
    write_odir(tmp_path / "set", eyes(4))
    words = ["data=odir", "data.classes=[N,D]", "data.test_fraction=null"]
    words += [f"data.root={tmp_path / 'set'}", f"data.cache_dir={tmp_path / 'cache'}"]

    def patients(size: int) -> list[list[bytes]]:
        config = load_config([*words, f"data.image_size={size}"])
        return names_of_patients(build_dataset(config, download=False).train)

    # Two files; both eyes have the same pixels here.
    first = patients(32)
    assert [len({*names}) for names in first] == [3] * 4
    ledger = Ledger(tmp_path / "privacy", None, 1e-5)
    for number, names in enumerate((first, patients(16), [one[:1] for one in first])):
        ledger.charge(Charge(str(number), "run", 1, STEPS), names)
    assert ledger.spent()[1] == 4
    assert [run.patients for run in ledger.runs()] == [4, 4, 4]
    once = ledger.runs()[0].epsilon
    assert ledger.spent()[0] > once * 1.5
