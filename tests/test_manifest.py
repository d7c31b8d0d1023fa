"""A large manifest is read once per node; its shards are a table that the processes share."""

import json
import os
import pickle
from pathlib import Path

import pytest

from shards import manifest
from shards.cache import Cache
from shards.manifest import Manifest, TaskEntry
from shards.reader import DamagedError, Reader
from shards.table import Shard, ShardTable

COUNT = 9000
"""More than the rows of a block."""


def shards(task: str, count: int, size: int = 100) -> list[Shard]:
    return [
        Shard(f"{task}-{n:06d}.tar", task, n % 7 + 1, size, f"{n:064x}", f"{n + 1:064x}")
        for n in range(count)
    ]


def written(folder: Path, count: int = COUNT, size: int = 100) -> Manifest:
    made = Manifest(tasks={}, shards=ShardTable.of([]), uri=str(folder))
    for task in ("derain", "dehaze"):
        rows = shards(task, count, size)
        entry = TaskEntry(samples=sum(row.samples for row in rows), layout="paired")
        made = made.with_task(task, entry, rows)
    manifest.write(made, str(folder))
    return made


@pytest.fixture(autouse=True)
def small_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "SHARED_BYTES", 1)


def test_the_shared_table_is_the_manifest(tmp_path: Path) -> None:
    written(tmp_path)
    plain = manifest.read(str(tmp_path))
    for _ in range(2):  # made, then found
        shared = manifest.read(str(tmp_path), str(tmp_path / "cache"))
        assert shared == plain
        assert list(shared.shards) == list(plain.shards)
        assert shared.shards[-1] == plain.shards[-1]
        assert list(shared.shards_of("derain")) == shards("derain", COUNT)
        assert shared.fingerprint == plain.fingerprint
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 1


def test_the_fingerprint_is_that_of_the_whole_list(tmp_path: Path) -> None:
    made = written(tmp_path)
    assert made.fingerprint == manifest.digest([list(shard) for shard in made.shards])


def test_another_process_gets_the_file_and_not_the_rows(tmp_path: Path) -> None:
    written(tmp_path)
    for task in ("derain", "dehaze"):
        table = manifest.read(str(tmp_path), str(tmp_path / "cache")).shards_of(task)[5:]
        data = pickle.dumps(table)
        assert len(data) < 1000
        assert list(pickle.loads(data)) == shards(task, COUNT)[5:]
    own = manifest.read(str(tmp_path)).shards_of("derain")
    assert pickle.loads(pickle.dumps(own)) == own


def test_a_new_manifest_gets_a_new_table(tmp_path: Path) -> None:
    written(tmp_path)
    manifest.read(str(tmp_path), str(tmp_path / "cache"))
    written(tmp_path, size=101)
    assert manifest.read(str(tmp_path), str(tmp_path / "cache")).shards[0].bytes == 101


@pytest.mark.parametrize("kind", ["npy", "json"])
def test_a_table_that_was_evicted_is_made_again(tmp_path: Path, kind: str) -> None:
    written(tmp_path)
    first = manifest.read(str(tmp_path), str(tmp_path / "cache"))
    (gone,) = (tmp_path / "cache").glob(f"*.{kind}")
    gone.unlink()
    assert list(first.shards_of("dehaze")) == shards("dehaze", COUNT)  # what is open stays readable
    assert manifest.read(str(tmp_path), str(tmp_path / "cache")) == first


@pytest.mark.parametrize("kind", ["npy", "json"])
@pytest.mark.parametrize("kept", [0, 40, 0.5, -1])
def test_a_damaged_table_is_made_again(tmp_path: Path, kind: str, kept: float) -> None:
    """As a crash may leave it: empty, the header alone, half of it, or zeros at the end."""
    made = written(tmp_path)
    manifest.read(str(tmp_path), str(tmp_path / "cache"))
    (file,) = (tmp_path / "cache").glob(f"*.{kind}")
    data = file.read_bytes()
    left = int(kept if kept != 0.5 else len(data) / 2)
    file.write_bytes(data[:left] if kept >= 0 else data[:-500] + bytes(500))
    assert manifest.read(str(tmp_path), str(tmp_path / "cache")).shards == made.shards
    assert file.read_bytes() == data


def test_a_cache_that_cannot_be_used_is_not_needed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = written(tmp_path)
    (tmp_path / "cache").write_text("not a folder")
    assert manifest.read(str(tmp_path), str(tmp_path / "cache")).shards == made.shards
    assert "cannot use the shard cache" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples": "many"}, "is damaged .ValueError"),
        ({"samples": -1}, "is damaged .OverflowError"),
        ({"samples": 100}, "do not add up"),
        ({"name": "../secret.tar"}, "which is not a shard in its folder"),
        ({"task": "painting"}, "unknown task"),
        ({"sha256": "0" * 64}, "fingerprint does not match"),
        ({"sha256": None}, "is damaged .AttributeError"),
        ({"more": 1}, "is not a shard"),
    ],
)
def test_damage_is_found_with_and_without_the_table(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    written(tmp_path, count=3)
    file = tmp_path / manifest.NAME
    raw = json.loads(file.read_text())
    raw["shards"][1] |= change
    file.write_text(json.dumps(raw))
    for cache in ("", str(tmp_path / "cache")):
        with pytest.raises(ValueError, match=message):
            manifest.read(str(tmp_path), cache)
    assert not list((tmp_path / "cache").glob("*.npy"))


def test_every_shard_is_looked_up_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shards.reader.SIZES", 4)
    made = written(tmp_path, count=10, size=3)
    for shard in made.shards:
        (tmp_path / shard.name).write_bytes(b"tar")
    reader = Reader(manifest.read(str(tmp_path)), Cache(folder=str(tmp_path / "cache"), limit=1))
    reader.check_present()
    (tmp_path / "dehaze-000004.tar").write_bytes(b"other size, not looked at yet")
    reader.check_present()
    (tmp_path / "dehaze-000003.tar").write_bytes(b"other size")
    with pytest.raises(DamagedError, match=r"dehaze-000003.tar has 10 bytes"):
        reader.check_present()
    os.unlink(tmp_path / "derain-000007.tar")
    with pytest.raises(DamagedError, match=r"derain-000007.tar is named"):
        reader.check_present()
