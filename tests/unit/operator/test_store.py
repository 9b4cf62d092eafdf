"""Events and LISTs in any order end in what the API server has."""

from typing import Any

from weightsync_operator.store import Store


def pod(uid: str, version: int, name: str = "p", namespace: str = "default", **labels: str) -> dict[str, Any]:
    return {
        "metadata": {
            "uid": uid,
            "name": name,
            "namespace": namespace,
            "resourceVersion": str(version),
            "labels": labels,
        }
    }


def weightsync(uid: str, version: int, name: str = "policy") -> dict[str, Any]:
    selector = {"selector": {"matchLabels": {"app": "x"}}}
    return {
        "metadata": {"uid": uid, "name": name, "namespace": "default", "resourceVersion": str(version)},
        "spec": {"trainer": selector, "inference": selector},
    }


def uids(store: Store) -> set[str]:
    return {each.uid for each in store.pods()}


def test_an_older_event_changes_nothing() -> None:
    store = Store()
    assert store.put_pod(pod("a", 10, app="new"))
    assert not store.put_pod(pod("a", 9, app="old"))
    found = store.pod("a")
    assert found is not None and dict(found.labels) == {"app": "new"}


def test_versions_are_numbers_not_texts() -> None:
    store = Store()
    store.put_pod(pod("a", 9, app="old"))
    assert store.put_pod(pod("a", 10, app="new"))


def test_an_event_that_changes_nothing_that_matters_says_so() -> None:
    store = Store()
    assert store.put_pod(pod("a", 1))
    assert not store.put_pod(pod("a", 2))


def test_a_list_removes_what_the_watch_missed() -> None:
    store = Store()
    store.put_pod(pod("ghost", 5))
    store.put_pod(pod("other", 5, namespace="elsewhere"))
    gone = store.listed_pods([pod("a", 6)], "7", "default")
    assert [each.uid for each in gone] == ["ghost"]
    assert uids(store) == {"a", "other"}


def test_a_list_does_not_remove_what_came_after_it() -> None:
    store = Store()
    store.put_pod(pod("new", 8))
    assert store.listed_pods([], "7") == []
    assert uids(store) == {"new"}


def test_a_list_does_not_bring_back_the_dead() -> None:
    store = Store()
    store.put_pod(pod("a", 5))
    store.drop_pod("a")
    store.listed_pods([pod("a", 5)], "7")
    assert uids(store) == set()


def test_a_weightsync_made_again_under_its_name_is_another() -> None:
    store = Store()
    store.put_weightsync(weightsync("one", 1))
    store.put_weightsync(weightsync("two", 3))
    found = store.weightsync(("default", "policy"))
    assert found is not None and found.ref.uid == "two"
    store.drop_weightsync("one")
    assert store.weightsync(("default", "policy")) == found
    assert len(store.weightsyncs()) == 1


def test_an_unreadable_weightsync_is_left_out() -> None:
    store = Store()
    broken = weightsync("one", 1)
    broken["status"] = {"term": "three"}
    assert not store.put_weightsync(broken)
    assert store.weightsyncs() == []
    assert store.put_weightsync(weightsync("one", 2))
