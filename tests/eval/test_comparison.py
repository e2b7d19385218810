"""Several runs in one table: rows, marks, and what may not stand together."""

import copy
import json
import math

import pytest

from ktransfer.cli import main
from ktransfer.errors import UsageError
from ktransfer.eval.comparison import compare, within_noise


def cell(value, half, **more):
    return {"top1": value, "top1_interval": [value - half, value + half], **more}


def arm(task, *values, half=0.02):
    scores = {f"conv{place}": cell(value, half) for place, value in enumerate(values, start=1)}
    return {"task": task, "arch": "alexnet", "width": 0.5, "scores": scores}


RESULT = {
    "schema": 2,
    "protocol": "linear/1",
    "title": "linear probe",
    "measures": {"top1": "top-1 %"},
    "data": {"train": 90, "test": 30, "classes": 12},
    "chance": 1 / 12,
    "settings": {"epochs": 30, "size": 96, "seeds": 1, "random": True},
    "inputs": {"train": "a", "test": "b", "network one": "c"},
    "arms": {},
}
RANDOM = arm("random", 0.30, 0.40)


def run(home, name, arms, protocol="linear", version=1, **changed):
    folder = home / name / "eval"
    folder.mkdir(parents=True, exist_ok=True)
    result = copy.deepcopy(RESULT) | {"arms": arms, "protocol": f"{protocol}/{version}"} | changed
    (folder / f"{protocol}.json").write_text(json.dumps(result))
    return home / name


def lines(text):
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    return [[part.strip() for part in row.strip("|").split("|")] for row in rows]


def test_one_table_with_the_best_and_what_cannot_be_told_from_it(tmp_path):
    one = run(tmp_path, "one", {"random": RANDOM, "one": arm("pseudo-labels", 0.50, 0.61)})
    two = run(tmp_path, "two", {"random": RANDOM, "two": arm("jigsawpp", 0.52, 0.50)})
    text = compare([one, two, one])
    assert lines(text) == [
        ["linear probe, top-1 %", "conv1", "conv2"],
        ["alexnet, random weights", "30.0 ± 2.0", "40.0 ± 2.0"],
        ["alexnet, retrained on pseudo-labels (one)", "50.0 ± 2.0 ≈", "**61.0 ± 2.0**"],
        ["alexnet, trained on Jigsaw++ (two)", "**52.0 ± 2.0**", "50.0 ± 2.0"],
    ]
    assert "linear/1: 90 images to train" in text
    assert "1.96 standard errors" in text
    assert not (one / "eval" / "compare.md").exists()


def test_the_test_by_hand():
    # Two shares of 1000 images each: 50 % and 54 % differ by 1.79 standard errors, 50 % and 55 % by 2.24.
    def share(p):
        return cell(p, 1.959964 * math.sqrt(p * (1 - p) / 1000))

    assert within_noise(share(0.50), share(0.54), "top1")
    assert not within_noise(share(0.50), share(0.55), "top1")
    # The deviation between four seeds adds its share.
    seeds = {"top1_deviation": 0.03, "top1_seeds": [0.5, 0.5, 0.5, 0.5]}
    assert within_noise(share(0.50) | seeds, share(0.55), "top1")
    assert not within_noise(cell(0.5, 0.0), cell(0.5001, 0.0), "top1")


def test_less_may_be_better_and_relative_measures_need_the_same_reference(tmp_path):
    changed = {"measures": {"top1": "top-1 %", "mce": "mCE %"}, "lower_is_better": ["mce"], "relative": ["mce"]}

    def with_mce(one, value):
        found = copy.deepcopy(one)
        found["scores"]["conv1"] |= {"mce": value, "mce_interval": [value - 0.01, value + 0.01]}
        return found

    arms = {"random": with_mce(RANDOM, 1.0), "one": with_mce(RANDOM, 0.8) | {"task": "jigsaw"}}
    one = run(tmp_path, "one", arms, "robust", **changed)
    two = run(tmp_path, "two", {"random": arms["random"], "two": with_mce(RANDOM, 0.9)}, "robust", **changed)
    assert [row[1] for row in lines(compare([one, two]))[-3:]] == ["100.0 ± 1.0", "**80.0 ± 1.0**", "90.0 ± 1.0"]
    run(tmp_path, "two", {"two": with_mce(arm("jigsaw", 0.3), 1.0)}, "robust", **changed)
    assert "mCE" not in compare([one, two])


def test_what_only_describes_has_no_best(tmp_path):
    one = run(tmp_path, "one", {"random": RANDOM, "one": arm("jigsaw", 0.5, 0.6)}, neither_is_better=["top1"])
    assert "**" not in compare([one])
    assert "≈ " not in compare([one])


def test_networks_of_the_same_label_are_told_apart(tmp_path):
    one = run(tmp_path, "one", {"random": RANDOM})
    two = run(tmp_path, "two", {"random": arm("random", 0.31, 0.41)})
    labels = [row[0] for row in lines(compare([one, two]))[1:]]
    assert labels == ["alexnet, random weights", f"alexnet, random weights, evaluated in {two}"]


def test_protocols_that_only_some_were_evaluated_by(tmp_path):
    one = run(tmp_path, "one", {"one": RANDOM})
    run(tmp_path, "one", {"one": RANDOM}, "knn", title="k nearest")
    two = run(tmp_path, "two", {"two": RANDOM})
    text = compare([one, two])
    assert "| k nearest, top-1 %" in text
    assert f"Not evaluated by knn: {two}." in text
    assert "published" not in text
    assert "CC+vgg-Jigsaw++" in compare([one, two], show_published=True)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"settings": RESULT["settings"] | {"epochs": 20}}, "linear: epochs is 30 in .*one and 20 in .*two"),
        ({"settings": RESULT["settings"] | {"weight_decay": 1}}, "linear: weight-decay is None in .*one and 1 in"),
        ({"inputs": RESULT["inputs"] | {"test": "x"}}, "linear: the test images of .*one and .*two differ"),
        ({"version": 2}, "linear: protocol is 'linear/1' in .*one and 'linear/2' in .*two"),
    ],
)
def test_what_was_made_otherwise_is_refused_in_one_line(tmp_path, changed, words):
    one, two = run(tmp_path, "one", {"one": RANDOM}), run(tmp_path, "two", {"two": RANDOM}, **changed)
    with pytest.raises(UsageError, match=f"--compare: evaluated differently: {words}") as caught:
        compare([one, two])
    assert "\n" not in str(caught.value)


def test_settings_that_a_protocol_does_not_read_may_differ(tmp_path):
    """Results of before hold them, though they say nothing about how they were made."""
    one = run(tmp_path, "one", {"one": RANDOM}, "knn")
    settings = {key: value for key, value in RESULT["settings"].items() if key != "epochs"}
    two = run(tmp_path, "two", {"two": RANDOM}, "knn", settings=settings)
    assert "random weights" in compare([one, two])
    three = run(tmp_path, "three", {"three": RANDOM}, "knn", settings=settings | {"of_later": 1})
    with pytest.raises(UsageError, match=r"of-later is None in .*one and 1 in"):
        compare([one, three])


def test_numbers_of_seeds_and_other_networks_may_differ(tmp_path):
    one = run(tmp_path, "one", {"one": RANDOM})
    settings = RESULT["settings"] | {"seeds": 3, "random": False}
    two = run(tmp_path, "two", {"two": RANDOM}, settings=settings, inputs=RESULT["inputs"] | {"network two": "z"})
    text = compare([one, two])
    assert "random weights (two)" in text
    assert f"Seeds: 1 in {one}, 3 in {two}." in text
    assert "Seeds:" not in compare([one])


def test_a_network_without_a_measure_has_no_row_in_its_table(tmp_path):
    asked = copy.deepcopy(arm("jigsaw", 0.5))
    asked["scores"]["network"] = {"heldout": -0.0004, "heldout_interval": [-0.1, 0.1]}
    measures = {"top1": "top-1 %", "heldout": "held out %"}
    one = run(tmp_path, "one", {"random": RANDOM, "one": asked}, measures=measures, neither_is_better=["heldout"])
    found = lines(compare([one]))
    assert found[3] == ["linear probe, held out %", "network"]
    assert found[4:] == [["alexnet, trained on Jigsaw (one)", "0.0 ± 10.0"]]


def test_what_is_no_result(tmp_path):
    one = run(tmp_path, "one", {"one": RANDOM})
    with pytest.raises(UsageError, match=r"--compare .*none: holds no results; make some first: ktransfer --run"):
        compare([one, tmp_path / "none"])
    for text, words in (("{", "not a result"), ("[]", "not a result"), ('{"schema": 1}', "by another version")):
        (one / "eval" / "linear.json").write_text(text)
        with pytest.raises(UsageError, match=words) as caught:
            compare([one])
        assert "\n" not in str(caught.value)


def test_from_the_command_line(tmp_path, capsys):
    one = run(tmp_path, "one", {"one": RANDOM})
    two = run(tmp_path, "two", {"two": arm("jigsaw", 0.5, 0.6)})
    before = sorted(tmp_path.rglob("*"))
    assert main(["eval", "--compare", f"{one},{two}"]) == 0
    text = capsys.readouterr().out
    assert text.strip() == compare([one, two]).strip()
    assert main(["--run", str(one), "eval", "--compare", str(two), "--published"]) == 0
    assert capsys.readouterr().out.strip() == compare([one, two], True).strip()
    assert main(["eval", "--compare", str(tmp_path / "none")]) == 2
    assert "holds no results" in capsys.readouterr().err
    assert main(["eval"]) == 2
    assert "no run folder given" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_from_python(tmp_path):
    import ktransfer.eval.stage  # noqa: F401 -- its submodules must not hide the function
    from ktransfer.eval import compare as exported

    assert exported is compare
    assert "alexnet" in exported([run(tmp_path, "one", {"one": RANDOM})])
