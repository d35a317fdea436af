"""What a file is, is told by its bytes."""

import gzip

import pysam
import pytest

from genesplice_hf.data.files import is_bgzip, is_gzip, nearest, open_binary
from genesplice_hf.errors import DataError

CONTENT = b"".join(b">c%d\nACGT\n" % n for n in range(20_000))


@pytest.fixture
def plain(tmp_path):
    path = tmp_path / "plain.gz"
    path.write_bytes(CONTENT)
    return path


@pytest.fixture
def gzipped(tmp_path):
    path = tmp_path / "gzipped.fa"
    path.write_bytes(gzip.compress(CONTENT))
    return path


@pytest.fixture
def bgzipped(plain, tmp_path):
    path = tmp_path / "blocks.txt"
    pysam.tabix_compress(str(plain), str(path))
    return path


def test_kinds_are_told_apart_whatever_the_suffix(plain, gzipped, bgzipped):
    assert [is_gzip(path) for path in (plain, gzipped, bgzipped)] == [False, True, True]
    assert [is_bgzip(path) for path in (plain, gzipped, bgzipped)] == [False, False, True]


@pytest.mark.parametrize("kind", ["plain", "gzipped", "bgzipped"])
def test_content_is_the_same(kind, request):
    with open_binary(request.getfixturevalue(kind)) as stream:
        assert stream.read() == CONTENT


@pytest.mark.parametrize("keep", [0.3, 0.999])
def test_truncated_gzip(gzipped, keep):
    content = gzipped.read_bytes()
    gzipped.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(DataError, match="truncated gzip"), open_binary(gzipped) as stream:
        stream.read()


def test_damaged_gzip(gzipped):
    content = bytearray(gzipped.read_bytes())
    content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
    gzipped.write_bytes(content)
    with pytest.raises(DataError, match="gzip file"), open_binary(gzipped) as stream:
        stream.read()


def test_bgzip_cut_between_blocks_is_legal_gzip_but_noticed(bgzipped):
    bgzipped.write_bytes(bgzipped.read_bytes()[:-28])
    assert gzip.decompress(bgzipped.read_bytes()) == CONTENT
    with pytest.raises(DataError, match="truncated bgzip"), open_binary(bgzipped):
        pass


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(DataError, match="there is no"), open_binary(tmp_path / "absent.fa"):
        pass
    with pytest.raises(DataError, match="is a folder"), open_binary(tmp_path):
        pass


def test_nearest():
    assert nearest("sequnce", ["label", "sequence", "id"]) == "sequence"
    assert nearest("zzz", ["a"]) == "a"
