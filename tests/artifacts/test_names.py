"""Names of clusters: groups by name, junk without a label, single images elsewhere; what is malformed is one line."""

import numpy as np
import pytest

from ktransfer.artifacts.labels import read_assignment, read_labels, write_labels
from ktransfer.artifacts.names import Names, grouped, read_names
from ktransfer.errors import UsageError

CLUSTERS = np.array([0, 1, 2, -1, 3, 1, 2], np.int32)
KEYS = ["a", "b", "c", "broken", "d", "e", "f"]


def test_a_file_as_the_page_saves_it(tmp_path):
    path = tmp_path / "names.csv"
    path.write_text(
        'cluster,key,name,junk,clustering\n3,,"a ""dog"", big",,abc\n1,,,yes,abc\n,x/1.jpg,cat,,abc\n,y.jpg,,yes,abc\n',
        encoding="utf-8-sig",
    )
    assert read_names(path) == Names({3: 'a "dog", big', 1: None}, {"x/1.jpg": "cat", "y.jpg": None}, "abc")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("cluster,name\n1,a\n", "no column key, junk"),
        ("cluster,key,name,junk\n1,,,\n", "line 2: neither a name nor junk"),
        ("cluster,key,name,junk\n-1,,a,\n", "line 2: cluster is '-1', not a number"),
        ("cluster,key,name,junk\n1,,a,maybe\n", "line 2: junk is 'maybe'"),
        ("cluster,key,name,junk\n1,,a,\n1,,b,\n", "line 3: cluster 1 has another name before"),
        ("cluster,key,name,junk\n,k,a,\n,k,,yes\n", "line 3: k was moved elsewhere before"),
        ("cluster,key,name,junk\n1,a\n", "line 2 has not as many fields as the header, 4"),
        ("cluster,key,name,junk,clustering\n1,,a,,x\n2,,b,,y\n", "of different clusterings, x and y"),
    ],
)
def test_what_is_malformed_is_one_line(tmp_path, text, says):
    path = tmp_path / "names.csv"
    path.write_text(text)
    with pytest.raises(UsageError, match="not a file of names") as error:
        read_names(path)
    assert says in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UsageError, match=r"none\.csv"):
        read_names(tmp_path / "none.csv")


def test_groups_junk_and_moved_images(tmp_path):
    names = Names({0: "dog", 2: "dog", 1: None}, {"e": "cat", "f": None}, "abc")
    labels, called = grouped(tmp_path, names, KEYS, CLUSTERS, 4, "abcdef")
    assert called == ["dog", "cluster 3", "cat"]
    assert labels.tolist() == [0, -1, 0, -1, 1, 2, -1]
    assert labels.dtype == np.int32


def test_without_names_clusters_keep_their_places_and_empty_ones_have_none(tmp_path):
    labels, called = grouped(tmp_path, Names({}, {}, ""), KEYS, CLUSTERS, 6, "abc")
    assert labels.tolist() == CLUSTERS.tolist()
    assert called == [f"cluster {place}" for place in range(4)]


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (Names({}, {}, "other"), "of another clustering"),
        (Names({4: "a"}, {}, ""), "no cluster 4, but 0 to 3"),
        (Names({}, {"zebra": "a"}, ""), "zebra is none of the images"),
    ],
)
def test_names_of_others_are_refused(tmp_path, names, says):
    with pytest.raises(UsageError, match=says):
        grouped(tmp_path, names, KEYS, CLUSTERS, 4, "abc")


def test_label_files_keep_names_and_clusters(tmp_path):
    labels, called = grouped(tmp_path, Names({0: "dog", 1: None}, {}, ""), KEYS, CLUSTERS, 4, "abc")
    distances = np.arange(7, dtype=np.float32)
    paths = write_labels(tmp_path, KEYS, labels, distances, len(called), "c", "f", None, called, CLUSTERS)
    for path in paths[:2]:
        found = read_labels(path)
        assert found.names == ("dog", "cluster 2", "cluster 3")
        assert found.labels.tolist() == labels.tolist()
    found = read_assignment(paths[1])
    assert found.clusters.tolist() == CLUSTERS.tolist()
    np.testing.assert_array_equal(found.distances, [0, 1, 2, np.nan, 4, 5, 6])
    paths[0].write_text("key,label,group\na,0,dog\nb,0,cat\n")
    with pytest.raises(UsageError, match="label 0 is called 'cat', and not before"):
        read_labels(paths[0])
