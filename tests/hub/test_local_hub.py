"""The double answers huggingface_hub's own client as a Hub does."""

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError


@pytest.fixture
def api(local_hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    return HfApi(endpoint=local_hub.url, token="t")


@pytest.fixture(params=["model", "dataset"])
def kind(request):
    return request.param


def add(api, kind, **files):
    api.create_repo("me/thing", repo_type=kind, exist_ok=True)
    operations = [CommitOperationAdd(name.replace("__", "/"), content) for name, content in files.items()]
    return api.create_commit("me/thing", operations, commit_message="add", repo_type=kind)


def test_what_was_pushed_comes_back_by_branch_tag_and_commit(api, kind, tmp_path):
    big = b"\0" * 1_500_000
    first = add(api, kind, **{"a.txt": b"one", "sub__b.safetensors": b"two", "big.dat": big})
    api.create_tag("me/thing", tag="v1", repo_type=kind)
    second = add(api, kind, **{"a.txt": b"changed"})
    for revision, text in (("main", b"changed"), ("v1", b"one"), (first.oid, b"one"), (second.oid, b"changed")):
        path = hf_hub_download(
            "me/thing", "a.txt", revision=revision, repo_type=kind, endpoint=api.endpoint, cache_dir=tmp_path
        )
        with open(path, "rb") as file:
            assert file.read() == text
    folder = api.snapshot_download("me/thing", repo_type=kind, cache_dir=tmp_path)
    with open(f"{folder}/big.dat", "rb") as file:
        assert file.read() == big


def test_listings(api, kind):
    add(api, kind, **{"a.txt": b"one", "sub__deep__b.bin": b"two"})
    assert api.list_repo_files("me/thing", repo_type=kind) == ["a.txt", "sub/deep/b.bin"]
    tree = api.list_repo_tree("me/thing", recursive=True, repo_type=kind)
    assert sorted(entry.path for entry in tree) == ["a.txt", "sub", "sub/deep", "sub/deep/b.bin"]
    assert [entry.path for entry in api.list_repo_tree("me/thing", "sub", repo_type=kind)] == ["sub/deep"]
    (info,) = api.get_paths_info("me/thing", ["sub/deep/b.bin"], repo_type=kind)
    assert (info.size, info.lfs.size) == (3, 3)
    refs = api.list_repo_refs("me/thing", repo_type=kind)
    assert [branch.name for branch in refs.branches] == ["main"]
    assert api.repo_info("me/thing", repo_type=kind).sha == refs.branches[0].target_commit
    assert api.whoami()["name"] == "tester"


def test_deleting(api, kind):
    add(api, kind, **{"a.txt": b"one", "sub__b.txt": b"two", "sub__c.txt": b"three"})
    gone = [CommitOperationDelete("a.txt"), CommitOperationDelete("sub/", is_folder=True)]
    api.create_commit("me/thing", gone, commit_message="remove", repo_type=kind)
    assert api.list_repo_files("me/thing", repo_type=kind) == []


def test_what_is_absent_is_reported_by_kind(api, tmp_path):
    add(api, "model", **{"a.txt": b"one"})
    place = {"endpoint": api.endpoint, "cache_dir": tmp_path}
    with pytest.raises(RepositoryNotFoundError):
        hf_hub_download("me/absent", "a.txt", **place)
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download("me/thing", "a.txt", revision="absent", **place)
    with pytest.raises(EntryNotFoundError):
        hf_hub_download("me/thing", "absent.txt", **place)
