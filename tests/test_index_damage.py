"""Indexing refuses damaged tars and what is not a sample, and says where it is."""

import gzip
import io
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import webdataset

from shards import inspect, manifest
from shards.config import DataConfig
from shards.index import main
from shards.indexing import index
from shards.stream import open_reader
from tests.webdataset_tars import RAIN, deep_photo, pair, photo, write


def plain(path: Path, members: list[tarfile.TarInfo | tuple[str, bytes]], form: int) -> None:
    """Writes a tar as other programs do."""
    with tarfile.open(path, "w", format=form) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))


def special(name: str, kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "1.gt.png"
    return info


def large(name: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size = 2**32
    return info


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_all_formats_of_tar_are_read(tmp_path: Path, form: int) -> None:
    folder = "./" + ("d" * 60 if form == tarfile.USTAR_FORMAT else "ä" * 150)
    members: list[tarfile.TarInfo | tuple[str, bytes]] = []
    for number in range(3):
        members.append(special(f"{folder}{number}", tarfile.DIRTYPE))
        members.append((f"{folder}{number}/README", b"no field"))
        members.append((f"{folder}{number}/.hidden.png", b"hidden"))
        members += [(f"{folder}{number}/7.{f}", data) for f, data in pair(number).items()]
    plain(tmp_path / "0.tar", members, form)
    index(str(tmp_path), **RAIN)
    reader = open_reader(str(tmp_path), DataConfig())
    keys = [reader.key(reader.locate("derain", number)) for number in range(3)]
    assert keys == [f"{folder}{number}/7" for number in range(3)]
    theirs = webdataset.WebDataset(str(tmp_path / "0.tar"), shardshuffle=False)
    assert keys == [sample["__key__"] for sample in theirs if "gt.png" in sample]
    assert inspect.inspect(str(tmp_path), deep=True, workers=1).ok


def header_of(data: bytes, name: str) -> int:
    return data.index(name.encode())


def flip(data: bytes) -> bytes:
    at = header_of(data, "3.gt.png")
    return data[: at + 100] + bytes([data[at + 100] ^ 1]) + data[at + 101 :]


def end(data: bytes) -> int:
    """Where the zeros after the last member begin, in whole blocks."""
    return -(-len(data.rstrip(b"\0")) // 512) * 512


DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "header": (flip, r"the header at byte \d+ is damaged \(bad checksum\)"),
    "no end": (lambda data: data[: end(data)], r"ends at byte \d+ without the end-of-archive"),
    "cut header": (lambda data: data[: end(data) + 99], "without the end-of-archive block"),
    "cut member": (
        lambda data: data[: header_of(data, "4.lq.jpg") + 700],
        r"4\.lq\.jpg at byte \d+ has \d+ bytes, but the file ends after 188 of them",
    ),
    "joined": (lambda data: data + data, "bytes other than zero after the end of the archive"),
    "rubbish": (lambda data: data[:-3] + b"abc", "bytes other than zero after the end"),
    "empty": (lambda data: b"", "ends at byte 0 without the end-of-archive block"),
    "html": (lambda data: b"<html>" * 200, r"the header at byte 0 is damaged"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_tar_is_refused(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / "0.tar", {f"{n}": pair(n) for n in range(6)})
    damage, message = DAMAGE[kind]
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"0\.tar is damaged: .*{message}.*run the same command"):
        index(str(tmp_path), **RAIN)
    assert [one.name for one in tmp_path.iterdir()] == ["0.tar"]


CONTENT: dict[str, tuple[list[tarfile.TarInfo | tuple[str, bytes]], str]] = {
    "hard link": ([special("2.gt.png", tarfile.LNKTYPE)], r"2\.gt\.png at byte \d+ is a hard link"),
    "symbolic link": ([special("2.gt.png", tarfile.SYMTYPE)], "symbolic link to 1.gt.png"),
    "device": ([special("2.gt.png", tarfile.CHRTYPE)], "is not a plain file"),
    "large": ([large("2.mp4")], r"2\.mp4 at byte \d+ has 4294967296 bytes, .* at most 4294967295"),
    "duplicate field": (
        [("2.gt.png", photo(2)), ("2.GT.png", photo(2))],
        r"2\.GT\.png at byte \d+: the sample '2' has the field 'gt.png' twice \(first 2\.gt\.png",
    ),
    "not adjacent": (
        [("2.gt.png", photo(2)), ("3.gt.png", photo(3)), ("2.lq.jpg", photo(2))],
        r"2\.lq\.jpg at byte \d+: the key '2' was at byte \d+ already",
    ),
    "half": (
        [("2.gt.png", photo(2))],
        r"1 sample of .* cannot be used: 0\.tar: 2 at byte \d+ has no field 'lq\.jpg'",
    ),
    "sizes": (
        [("2.gt.png", photo(2)), ("2.lq.jpg", photo(2, side=40))],
        r"2: the degraded picture is 66x40, but the clean one is 66x48",
    ),
    "16 bit": (
        [("2.gt.png", deep_photo())],
        r"2\.gt\.png at byte \d+ cannot be decoded \(the picture has 16 bits per channel; convert",
    ),
}


@pytest.mark.parametrize("kind", CONTENT)
def test_what_is_no_sample_is_refused(tmp_path: Path, kind: str) -> None:
    members, message = CONTENT[kind]
    good = [(f"1.{field}", data) for field, data in pair(1).items()]
    plain(tmp_path / "0.tar", [*good, *members], tarfile.PAX_FORMAT)
    with pytest.raises(ValueError, match=message):
        index(str(tmp_path), **RAIN)
    assert [one.name for one in tmp_path.iterdir()] == ["0.tar"]


def test_a_key_in_two_tars_is_refused(pairs: Path) -> None:
    shutil.copy(pairs / "000001.tar", pairs / "copy.tar")
    message = r"the key 'a/b/0006' is in the set twice: in 000001.tar at byte \d+ and in copy.tar"
    with pytest.raises(ValueError, match=message):
        index(str(pairs), **RAIN)


def test_compressed_tars_are_refused(pairs: Path) -> None:
    data = (pairs / "000001.tar").read_bytes()
    (pairs / "000001.tar.gz").write_bytes(gzip.compress(data))
    for place in (pairs, pairs / "000001.tar.gz"):
        with pytest.raises(ValueError, match=r"000001\.tar\.gz is compressed, so a single picture"):
            index(str(place), **RAIN)
    (pairs / "000001.tar.gz").rename(pairs / "000001.tar")
    with pytest.raises(ValueError, match=r"000001\.tar is compressed"):
        index(str(pairs), **RAIN)


def test_corrupt_samples_are_listed_or_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = {f"{n}": pair(n) for n in range(10)}
    for number in range(7):
        samples[f"{number}"]["gt.png"] = photo(number)[:200]
    write(tmp_path / "0.tar", samples)
    arguments = [str(tmp_path), "--task", "derain", "--clean", "gt.png", "--degraded", "lq.jpg"]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.count("cannot be decoded") == 5
    assert "7 samples of" in error and "and 2 more" in error and "--skip-corrupt" in error
    assert not (tmp_path / "manifest.json").exists()
    assert main([*arguments, "--skip-corrupt"]) == 0
    out = capsys.readouterr().out
    assert "derain 3 samples in 1 tar" in out and "left out 7 corrupt" in out
    made = manifest.read(str(tmp_path))
    assert len(made.tasks["derain"].missing) == 7
    assert "--skip-corrupt" in made.remedy("derain")
    reader = open_reader(str(tmp_path), DataConfig())
    assert [reader.key(reader.locate("derain", n)) for n in range(3)] == ["7", "8", "9"]
    assert inspect.inspect(str(tmp_path), deep=True, workers=1).ok
