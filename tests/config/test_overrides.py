import shlex
import tomllib
from pathlib import Path

import pytest
from flwr.common.config import flatten_dict
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st

from task.config import (
    Config,
    anchored,
    changed_config,
    flat_values,
    hydra_override,
    load_config,
    load_run_config,
    read_config,
    read_override,
    write_config,
)
from task.config.hydra_grammar import quoted
from task.runs.commands import as_toml, training_command

SIGNS = "ab1e_\\\\'\"=,[](){}$${#~:;! \t.-+*?%&|<>@`^/\x7fé東😀"
ANY_TEXT = st.one_of(
    st.text(st.sampled_from(SIGNS), max_size=12),
    st.text(st.characters(exclude_categories=("Cs",)), max_size=12),
    st.sampled_from(
        ["1e5", "007", "1_000", "null", "true", "inf", "a=b (x)", "~/x", "choice(a,b)"]
    ),
).filter(lambda text: text != "???")
# A folder's name; `~` and relative paths are looked at elsewhere.
PATH = ANY_TEXT.map(lambda text: "/" + text)
NAME = ANY_TEXT.filter(lambda text: text not in ("", ".", "..") and "/" not in text)
FIELDS = {
    "run_name": NAME,
    "output_dir": PATH,
    "data.root": PATH,
    "eval.inception_weights": ANY_TEXT,
    "eval.exported_program": PATH,
}
TEXTS = st.fixed_dictionaries(FIELDS)
CLASSES = st.lists(ANY_TEXT, min_size=1, max_size=4, unique=True)
# Without shrinking, which takes minutes where an example takes a second.
PHASES = (Phase.explicit, Phase.generate)
few = settings(max_examples=15, deadline=None, derandomize=True, phases=PHASES)
many = settings(max_examples=300, deadline=None, derandomize=True)


def values(config: Config, names: dict[str, str]) -> dict[str, object]:
    return {name: flat_values(config)[name] for name in names}


def parsed(override: str) -> object:
    return OverridesParser.create().parse_override(override).value()


def is_quoted(text: str) -> bool:
    return len(text) > 1 and text[0] == text[-1] and text[0] in "'\""


@few
@given(TEXTS, CLASSES)
def test_any_text_survives_overrides_files_and_a_shell(
    tmp_path_factory: pytest.TempPathFactory, texts: dict[str, str], classes: list[str]
) -> None:
    words = [hydra_override(name, text) for name, text in texts.items()]
    words.append(hydra_override("data.classes", classes))
    config = load_config(words)
    assert values(config, texts) == texts and config.data.classes == classes
    file = tmp_path_factory.mktemp("run") / "config.yaml"
    write_config(config, file)
    assert read_config(file) == config
    assert load_config(shlex.split(shlex.join(words))) == config
    submitted = tomllib.loads(as_toml({**texts, "overrides": shlex.join(words)}))
    assert load_run_config(flatten_dict(submitted)) == anchored(config, Path.home())


@few
@given(TEXTS)
def test_text_is_taken_as_it_was_typed(texts: dict[str, str]) -> None:
    assume(not any(map(is_quoted, texts.values())))
    config = load_config([f"{name}={text}" for name, text in texts.items()])
    assert values(config, texts) == texts


@settings(few, max_examples=3)
@given(PATH, CLASSES)
def test_printed_command_trains_on_the_same_images(root: str, classes: list[str]) -> None:
    words = ["data=image_folder", hydra_override("data.root", root)]
    config = load_config([*words, hydra_override("data.classes", classes)])
    program, *printed = shlex.split(training_command(config))
    repeated = load_config(printed)
    assert program == "feddm-train"
    assert (repeated.data.root, repeated.data.classes) == (root, classes)


@few
@given(st.fixed_dictionaries({"data.root": PATH, "eval.exported_program": PATH}))
def test_text_changes_a_run_as_it_was_typed(texts: dict[str, str]) -> None:
    expected = {name: str(Path(text)) for name, text in texts.items()}
    config = load_config()
    typed = [f"{name}={text}" for name, text in texts.items()]
    assert values(changed_config(config, typed, options={}, names=texts), texts) == expected
    assert values(changed_config(config, options=texts, names=texts), texts) == expected


@many
@given(ANY_TEXT)
def test_quoted_text_is_read_by_hydra_as_it_was(text: str) -> None:
    assume("${" not in text)  # which OmegaConf resolves, after Hydra
    assert parsed(f"output_dir={quoted(text)}") == text
    assert read_override(f"output_dir={quoted(text)}", sweep=True) == f"output_dir={quoted(text)}"


@many
@given(CLASSES)
def test_texts_of_a_sweep_stand_between_commas(texts: list[str]) -> None:
    assume(len(texts) > 1 and "${" not in "".join(texts))
    word = read_override("data.root=" + ",".join(map(quoted, texts)), sweep=True)
    swept = OverridesParser.create().parse_override(word).sweep_string_iterator()
    assert [parsed(f"data.root={each}") for each in swept] == texts


@pytest.mark.parametrize(
    ("typed", "sweep", "expected"),
    [
        ("data.root=/tmp/a=b (x)", False, ["/tmp/a=b (x)"]),
        ("data.root=/a,/b", False, ["/a,/b"]),
        ("data.root=/a,/b", True, ["/a", "/b"]),
        ("data.root='/a,/b', /é", True, ["/a,/b", "/é"]),
        ("data.root='/a b'", False, ["/a b"]),
        ("run_name=1e5", False, ["1e5"]),
        ("run_name=1e5,it's", True, ["1e5", "it's"]),
        ("run_name=null", False, ["null"]),
        ("+run_name=007", False, ["007"]),
        ("diffusion.sampler=choice(ddim,ddpm)", True, ["ddim", "ddpm"]),
        ("data.classes=[007,1e5, it's,'a,b']", False, [["007", "1e5", "it's", "a,b"]]),
        ("data.classes=[a,1],[b,2]", True, ["[a,'1']", "[b,'2']"]),
        ("data.classes=[]", False, [[]]),
        ("partition.beta=0.1,0.5", True, ["0.1", "0.5"]),
        ("~data", False, [None]),
    ],
)
def test_typed_values_are_what_they_look_like(
    typed: str, sweep: bool, expected: list[object]
) -> None:
    override = OverridesParser.create().parse_override(read_override(typed, sweep=sweep))
    if not override.is_sweep_override():
        assert [override.value()] == expected
    elif typed.startswith("data.classes"):
        assert [each.replace('"', "'") for each in override.sweep_string_iterator()] == expected
    else:
        swept = [each.strip("'\"") for each in override.sweep_string_iterator()]
        assert swept == expected


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("run_name", 1e5, r"run_name must be text in quotes, such as run_name=\"1e5\", got 100000"),
        ("data.root", "???", r"data\.root must be another text .*'\?\?\?'"),
        ("data.root", "/\udcff", r"data\.root must be text in UTF-8, got '/\\udcff'"),
    ],
)
def test_what_cannot_be_kept_as_text_is_refused(path: str, value: object, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        hydra_override(path, value)
    if isinstance(value, str):
        with pytest.raises(ValueError, match=expected):
            read_override(f"{path}={value}")
