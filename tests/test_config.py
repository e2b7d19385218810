"""Settings from flags and TOML: what is wrong is named, all of it at once."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ktransfer import cli, distributed, stages
from ktransfer.config import (
    build,
    chosen,
    in_words,
    kind,
    narrowed,
    nearest,
    option,
    read_by,
    result_settings,
    settings_of,
    stage_tables,
)
from ktransfer.data import loader
from ktransfer.errors import UsageError
from ktransfer.number_list import number_list


@dataclass(frozen=True)
class Some:
    steps: int = option(3, "", low=1, high=9)
    rate: float = option(0.5, "", low=0)
    name: str | None = option(None, "")
    mode: str = option("fast", "", choices=("fast", "slow"))
    batch_norm: bool = option(False, "")
    workers: int = option(0, "", execution=True)


NUMPY = [
    ({"rate": np.float64(0.01)}, 0.01),
    ({"rate": np.float32(0.5)}, 0.5),
    ({"rate": np.int64(2)}, 2.0),
    ({"steps": np.int64(4)}, 4),
    ({"steps": np.uint8(4)}, 4),
    ({"batch_norm": np.bool_(True)}, True),
    ({"name": np.str_("x")}, "x"),
]


@pytest.mark.parametrize(("values", "wanted"), NUMPY)
def test_numbers_of_numpy_are_numbers(values, wanted):
    found = getattr(build(Some, values, "here"), next(iter(values)))
    assert found == wanted and type(found) is type(wanted)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"steps": np.float64(2.5)}, "needs a value of type int"),
        ({"steps": np.int64(10)}, "must be at most 9"),
        ({"rate": np.float64("nan")}, "must be a finite number"),
        ({"rate": np.bool_(True)}, "needs a value of type float"),
        ({"rate": np.array([1.0, 2.0])}, "needs a value of type float"),
    ],
)
def test_wrong_numbers_of_numpy_are_refused_as_others_are(values, words):
    with pytest.raises(UsageError, match=words):
        build(Some, values, "here")


WORDS = st.text("ab1 _-é", max_size=8)
VALID = {
    "steps": st.integers(1, 9),
    "rate": st.floats(0, 1e300) | st.integers(0, 1000),
    "name": st.none() | WORDS,
    "mode": st.sampled_from(["fast", "slow"]),
    "batch_norm": st.booleans(),
    "workers": st.integers(),
}
WRONG = {
    "steps": st.integers(max_value=0) | st.integers(min_value=10) | st.floats() | st.booleans() | WORDS | st.none(),
    "rate": st.floats(max_value=0, exclude_max=True) | st.just(math.nan) | st.just(math.inf) | st.booleans() | WORDS,
    "name": st.integers() | st.booleans() | st.lists(WORDS),
    "mode": WORDS | st.none() | st.integers(),
    "batch_norm": st.integers() | WORDS | st.none(),
    "workers": st.floats() | WORDS | st.none(),
}


def errors(given: dict, cls: type = Some) -> list[str]:
    with pytest.raises(UsageError) as caught:
        build(cls, given, "here")
    return str(caught.value).split("\n")


@settings(max_examples=30)
@given(st.fixed_dictionaries({}, optional=VALID))
def test_valid_values_are_taken_and_the_rest_is_default(values):
    found = dataclasses.asdict(build(Some, values, "here"))
    assert found == dataclasses.asdict(Some()) | values
    assert isinstance(found["rate"], float)


@settings(max_examples=30)
@given(st.fixed_dictionaries({}, optional=VALID), st.sampled_from(sorted(WRONG)), st.data())
def test_one_wrong_value_is_named(values, name, data):
    wrong = data.draw(WRONG[name])
    found = errors(values | {name: wrong})
    assert "\n".join(found).startswith(f"here: {name.replace('_', '-')} = {wrong!r}: ")


def test_all_errors_come_at_once():
    given_values = {"steps": 0, "rate": "x", "mode": "medium", "stps": 1, "batch-norm": 1}
    assert errors(given_values) == [
        "here: steps = 0: must be at least 1",
        "here: rate = 'x': needs a value of type float",
        "here: mode = 'medium': must be one of fast, slow",
        "here: no setting 'stps'; did you mean 'steps'?",
        "here: batch-norm = 1: needs a value of type bool",
    ]


def test_bounds_belong_to_the_range():
    assert build(Some, {"steps": 1}, "").steps == 1
    assert build(Some, {"steps": 9}, "").steps == 9
    assert errors({"steps": 10}) == ["here: steps = 10: must be at most 9"]


def test_both_spellings():
    assert build(Some, {"batch-norm": True}, "") == build(Some, {"batch_norm": True}, "")
    assert build(Some, {"name": Path("a/b")}, "").name == "a/b"


def test_nearest():
    assert nearest("batch_nrom", ["epochs", "batch-norm"]) == "did you mean 'batch-norm'?"
    # A name is shown as it must be typed: of a network, a layer, an image.
    assert nearest("convnext-tiny", ["alexnet", "convnext_tiny"]) == "did you mean 'convnext_tiny'?"
    assert nearest("Blocks-1", ["blocks_1", "norm"]) == "did you mean 'blocks_1'?"
    assert nearest("zzz", ["b", "a"]) == "valid: a, b"


def test_execution_settings_are_no_results():
    assert set(result_settings(Some())) == {"steps", "rate", "name", "mode", "batch_norm"}


@pytest.mark.parametrize("stage", cli.STAGES)
def test_every_setting_of_every_stage(stage):
    cls = stages.settings(stage)
    defaults = dataclasses.asdict(cls())
    assert dataclasses.asdict(build(cls, defaults, stage)) == defaults  # each default passes its own check
    for field in dataclasses.fields(cls):
        assert kind(field) in (str, int, float, bool)
        assert field.metadata["help"]
    assert defaults["overwrite"] is False
    kept = set(result_settings(cls()))
    assert not kept & {"overwrite", "device", "workers", "data", "max_broken"}
    assert kept >= {"seed", "epochs", "lr", "arch", "k", "layer", "pool"} & set(defaults)


def written(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "x.toml"
    path.write_bytes(data)
    return path


def test_toml(tmp_path):
    path = written(tmp_path, b'[pretext]\nepochs = 9\nmin-distance = 4\n[eval]\nlayers = "conv1"\n')
    assert stage_tables(path, cli.STAGES) == {"pretext": {"epochs": 9, "min-distance": 4}, "eval": {"layers": "conv1"}}
    assert stage_tables(written(tmp_path, b""), cli.STAGES) == {}


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"[pretext\n", "not valid TOML"),
        (b"\xff\xfe", "not valid TOML"),
        (b"[pretxt]\nepochs = 1\n", "no stage 'pretxt'; did you mean 'pretext'?"),
        (b"epochs = 1\n", "no stage 'epochs'"),
        (b"pretext = 1\n", "'pretext' must be a table, such as [pretext]"),
        (b"[[pretext]]\nepochs = 1\n", "'pretext' must be a table"),
    ],
)
def test_wrong_toml(tmp_path, data, why):
    path = written(tmp_path, data)
    with pytest.raises(UsageError) as caught:
        stage_tables(path, cli.STAGES)
    assert why in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_missing_toml(tmp_path):
    with pytest.raises(UsageError, match="No such file"):
        stage_tables(tmp_path / "none.toml", cli.STAGES)


def test_commands_are_shown_as_a_user_would_type_them():
    line = in_words(Path("runs/my run"), "retrain", {"weight_decay": 0.1, "labels": "classes", "uniform": False})
    assert line == "ktransfer --run 'runs/my run' retrain --weight-decay 0.1 --labels classes --no-uniform"
    assert in_words("a", "eval", {"random": True}) == "ktransfer --run a eval --random"


def test_names_separated_by_commas_are_each_taken_once():
    assert chosen("--trunk", "full, frozen,full", ("frozen", "full"), "column") == ["full", "frozen"]
    for names, shown in (("ful", "ful"), ("full,", "full,"), ("", "")):
        with pytest.raises(UsageError, match=rf"^--trunk {shown}: no such column; "):
            chosen("--trunk", names, ("frozen", "full"), "column")


def test_settings_of_some_parts_alone():
    @dataclass(frozen=True)
    class Parts(Some):
        steps: int = narrowed(Some, "steps", ("one", "two"))
        extra: int = option(1, "more", of=("two",))

    everywhere = {"rate", "name", "mode", "batch_norm", "workers"}
    assert read_by(Parts, ("three",)) == read_by(Parts(), ()) == everywhere
    assert read_by(Parts, ("three", "one")) == everywhere | {"steps"}
    assert settings_of(Parts(steps=5), "one").values.keys() == everywhere | {"steps"}
    assert build(Parts, {"steps": 9}, "x").steps == 9
    with pytest.raises(UsageError, match="steps = 10: must be at most 9"):
        build(Parts, {"steps": 10}, "x")
    assert dataclasses.fields(Parts)[0].name == "steps" and Parts().steps == 3


def test_numbers_within_their_range():
    assert number_list("--x", "0.5, 1,2", 0.5, 2, "1,2") == [0.5, 1.0, 2.0]


@pytest.mark.parametrize("given", ["", "1,", "a", "0.4", "2.1", "nan", "inf", "1;2"])
def test_others_are_one_line(given):
    with pytest.raises(UsageError, match=rf"^--x {given}: must be numbers from 0.5 to 2 [^\n]+ such as 1,2$"):
        number_list("--x", given, 0.5, 2, "1,2")


def test_nothing_is_above_0_that_is_0():
    with pytest.raises(UsageError, match=r"^--x 0: must be numbers above 0 and up to 2 "):
        number_list("--x", "0", 0, 2, "1,2")


@pytest.mark.parametrize("name", ["LOCAL_WORLD_SIZE", "WORLD_SIZE", "RANK", "LOCAL_RANK"])
def test_an_empty_variable_of_torchrun_is_not_set(name, monkeypatch):
    for other in ("LOCAL_WORLD_SIZE", "WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(other, raising=False)
    usual = loader._default_cache_bytes()
    monkeypatch.setenv(name, "")
    assert distributed.is_leader() and distributed.started() == distributed.local_world_size() == 1
    assert loader._default_cache_bytes() == pytest.approx(usual, rel=0.5)
    monkeypatch.setenv(name, "two")
    if name != "RANK":
        with pytest.raises(UsageError, match=f"{name} is 'two', must be a number"):
            distributed.environment_number(name, 1)
