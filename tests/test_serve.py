"""The server: limits, batches and retries as functions; and a real one, whose replica is killed."""

import asyncio
import io
import json
import os
import pickle
import socket
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import pytest
import tifffile
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from skimage import data

pytest.importorskip("ray.serve", exc_type=ImportError, reason="the extra `serve` is missing")

from fastapi import HTTPException
from ray.exceptions import ActorDiedError
from ray.serve.exceptions import BackPressureError

from distributed.serve import TOKEN, Arguments, is_loopback, main, path_for_replicas, replicas_on
from distributed.serve_app import (
    Job,
    Restorer,
    again_if_lost,
    api,
    check_depth,
    decoded,
    groups,
    preview_png,
    received,
    retry_after,
)
from measnet import png16
from measnet.config import tiny
from measnet.decoding import read
from measnet.network import MEASNet
from measnet.tiling import choose_tiling, restore
from tests.browser import Page, browse, needs_chromium

ROOT = Path(__file__).resolve().parent.parent


# --- Parts ---


@pytest.mark.parametrize(
    ("arguments", "token", "message"),
    [
        ({"port": 0}, "", "--port is 0, but must be between 1 and 65535"),
        ({"queue": 0}, "", "--queue is 0, but must be 1 or more"),
        ({"max_megapixels": 0}, "", "--max-megapixels is 0, but must be 1 or more"),
        ({"replicas": -1}, "", "--replicas is -1, but must be 0 or more"),
        ({"host": "0.0.0.0"}, "", "--host 0.0.0.0 is open to other machines, which needs a token"),
        ({"host": "example.org"}, "", "is open to other machines"),
        ({}, "short", f"{TOKEN} has 5 characters, but needs 16"),
    ],
)
def test_wrong_values_are_refused(arguments: dict[str, Any], token: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Arguments(checkpoint="model.safetensors", **arguments).check(token)


def test_good_values_are_accepted() -> None:
    Arguments(checkpoint="model.safetensors").check("")
    Arguments(checkpoint="model.safetensors", host="0.0.0.0").check("x" * 16)


def test_a_wrong_checkpoint_is_an_error_before_ray_starts(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["nowhere.safetensors"]) == 2
    assert capsys.readouterr().err == "error: there is no file nowhere.safetensors\n"


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.3.2.1", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.1", False),
        ("localhost.example.org", False),
    ],
)
def test_addresses_that_only_this_machine_reaches(host: str, expected: bool) -> None:
    assert is_loopback(host) == expected


@pytest.mark.parametrize(
    ("sizes", "at_once", "expected"),
    [
        ([], 100, []),
        ([(8, 8), (8, 8), (8, 8)], 1000, [[0, 1, 2]]),
        ([(8, 8), (8, 16), (8, 8)], 1000, [[0, 2], [1]]),
        ([(8, 8), (8, 8), (8, 8)], 128, [[0, 1], [2]]),
        ([(8, 8), (8, 8)], 10, [[0], [1]]),
    ],
)
def test_equal_sizes_run_together(
    sizes: list[tuple[int, int]], at_once: int, expected: list[list[int]]
) -> None:
    assert groups([Job(torch.zeros(3, *size)) for size in sizes], at_once) == expected


def test_maps_and_pictures_do_not_run_together() -> None:
    jobs = [Job(torch.zeros(3, 8, 8)), Job(torch.zeros(3, 8, 8), experts=True)]
    assert groups(jobs, 1000) == [[0], [1]]


@pytest.mark.parametrize(
    ("waiting", "seconds", "batch", "replicas", "expected"),
    [(0, 1.0, 8, 1, 1), (8, 0.1, 8, 1, 1), (32, 2.0, 8, 1, 8), (32, 2.0, 8, 2, 4)],
)
def test_retry_after_is_the_time_of_the_waiting_requests(
    waiting: int, seconds: float, batch: int, replicas: int, expected: int
) -> None:
    assert retry_after(waiting, seconds, batch, replicas) == expected


FULL, LOST = BackPressureError(3, 3), ActorDiedError()


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        (["answer"], "answer"),
        ([LOST, "answer"], "answer"),
        ([LOST, FULL, FULL, FULL, FULL, "answer"], "answer"),
        ([LOST, FULL, LOST, "answer"], "answer"),
        ([FULL, "answer"], FULL),
        ([LOST, LOST, LOST, "answer"], LOST),
        ([ValueError("its own"), "answer"], ValueError),
    ],
)
def test_lost_requests_are_sent_again_and_new_ones_are_refused(
    events: list[Any], expected: Any
) -> None:
    left = iter(events)

    async def call() -> str:
        event = next(left)
        if isinstance(event, Exception):
            raise event
        return str(event)

    async def run() -> Any:
        return await again_if_lost(call, losses=2, pause_s=0)

    if isinstance(expected, str):
        assert asyncio.run(run()) == expected
    else:
        kind = expected if isinstance(expected, type) else type(expected)
        with pytest.raises(kind):
            asyncio.run(run())


@pytest.mark.parametrize(
    ("announced", "chunks", "read_chunks", "allowed"),
    [(0, 4, 4, True), (40, 4, 4, True), (0, 9, 5, False), (41, 4, 0, False)],
)
def test_bodies_above_the_limit_are_not_read_to_the_end(
    announced: int, chunks: int, read_chunks: int, allowed: bool
) -> None:
    seen = []

    async def stream() -> AsyncIterator[bytes]:
        for number in range(chunks):
            seen.append(number)
            yield b"x" * 10

    if allowed:
        assert asyncio.run(received(stream(), 40, announced)) == b"x" * 10 * chunks
    else:
        with pytest.raises(HTTPException) as error:
            asyncio.run(received(stream(), 40, announced))
        assert error.value.status_code == 413 and "40 bytes" in error.value.detail
    assert len(seen) == read_chunks


def png_of_size(width: int, height: int) -> bytes:
    """A file of some bytes that claims to be a large picture."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", b"")


def png_chunk(kind: bytes, content: bytes) -> bytes:
    crc = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + crc


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (png_of_size(60_000, 60_000), 413, "more than 1 megapixels, the limit"),
        (png_of_size(1001, 1000), 413, "more than 1 megapixels, the limit"),
        (png_of_size(100, 100), 415, "the file"),
        (b"", 415, "the file cannot be read as a picture"),
        (b"GIF89a no picture", 415, "the file cannot be read as a picture"),
    ],
)
def test_files_that_are_refused(body: bytes, status: int, words: str) -> None:
    with pytest.raises(HTTPException) as error:
        decoded(body, 1)
    assert error.value.status_code == status
    assert words in error.value.detail and "/tmp" not in error.value.detail


def test_a_picture_with_much_text_is_restored() -> None:
    """Editors keep their work as text in a PNG; Pillow refuses more than 1 MB of it."""
    text = PngInfo()
    text.add_text("workflow", "x" * 2**21, zip=True)
    file = io.BytesIO()
    Image.fromarray(np.full((40, 48, 3), 7, np.uint8)).save(file, "PNG", pnginfo=text)
    try:
        picture = decoded(file.getvalue(), 1)
    except HTTPException as error:
        assert error.status_code == 415
    else:
        assert picture.colour.shape == (40, 48, 3)


@pytest.mark.parametrize(
    ("device", "asked", "cards", "found"),
    [("cpu", 0, 0, 1), ("cpu", 3, 0, 3), ("cuda", 0, 4, 4), ("cuda", 2, 4, 2)],
)
def test_how_many_replicas(device: str, asked: int, cards: int, found: int) -> None:
    assert replicas_on(device, asked, cards) == found


def test_more_replicas_than_gpus_are_refused() -> None:
    with pytest.raises(ValueError, match="--replicas is 2, but there are 1 GPUs"):
        replicas_on("cuda", 2, 1)


def test_an_answer_does_not_carry_the_whole_batch(tmp_path: Path) -> None:
    network = object.__new__(Restorer.func_or_class)
    network.model = MEASNet(tiny()).eval()
    network.tiling = choose_tiling(network.model)
    jobs = [Job(torch.rand(3, 32, 32), False) for _ in range(8)]
    for done in network._work(jobs):
        assert len(pickle.dumps(done.image)) < 2 * done.image.nbytes


def test_replicas_find_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert path_for_replicas("runs/demo") == str(tmp_path / "runs" / "demo")
    assert path_for_replicas("s3://bucket/run") == "s3://bucket/run"
    assert path_for_replicas("small") == "small"
    (tmp_path / "small").mkdir()
    assert path_for_replicas("small") == str(tmp_path / "small")


def test_sixteen_bits_are_kept() -> None:
    values = np.arange(48 * 40 * 3, dtype=np.uint16).reshape(48, 40, 3) * 11
    assert np.array_equal(decoded(png16.encode(values), 1).colour, values)


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_preview_has_eight_bits_and_the_same_values(
    kind: type, channels: int, tmp_path: Path
) -> None:
    unit = np.linspace(0, 1, 24 * 30 * channels).reshape(24, 30, channels)
    white = 1 if kind is np.float32 else np.iinfo(kind).max
    pixels = (unit * white).astype(kind)
    photometric = "minisblack" if channels == 1 else "rgb"
    tifffile.imwrite(tmp_path / "a.tif", pixels.squeeze(), photometric=photometric)
    picture = decoded((tmp_path / "a.tif").read_bytes(), 1)
    with Image.open(io.BytesIO(preview_png(picture))) as shown:
        assert shown.format == "PNG" and shown.mode == ("L" if channels == 1 else "RGB")
        found = np.asarray(shown).reshape(24, 30, channels) / 255
    assert np.abs(found - unit).max() <= 1 / 255
    if kind is np.float32:
        with pytest.raises(HTTPException, match="PNG does not hold floats"):
            check_depth(picture)


def test_transparency_is_in_the_preview() -> None:
    pixels = np.zeros((8, 9, 4), np.uint8)
    pixels[..., 3] = np.arange(9)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    with Image.open(io.BytesIO(preview_png(decoded(file.getvalue(), 1)))) as shown:
        assert np.array_equal(np.asarray(shown), pixels)


def test_the_interface_is_described() -> None:
    paths = api.openapi()["paths"]
    assert set(paths) == {"/health", "/restore", "/experts", "/preview"}
    restore_ = paths["/restore"]["post"]
    assert set(restore_["responses"]) >= {"200", "401", "413", "415", "503"}
    assert "image/png" in restore_["responses"]["200"]["content"]
    assert "image/*" in restore_["requestBody"]["content"]
    assert restore_["security"] == [{"HTTPBearer": []}]


# --- A real server ---


class Reply(NamedTuple):
    status: int
    body: bytes
    headers: dict[str, str]


class Server(NamedTuple):
    url: str
    token: str
    process: "subprocess.Popen[bytes]"
    weights: Path

    def post(self, path: str, body: bytes, token: str | None = None) -> Reply:
        given = self.token if token is None else token
        request = urllib.request.Request(
            f"{self.url}{path}", body, {"Authorization": f"Bearer {given}"}
        )
        try:
            with urllib.request.urlopen(request, timeout=300) as answer:
                return Reply(answer.status, answer.read(), dict(answer.headers))
        except urllib.error.HTTPError as error:
            return Reply(error.code, error.read(), dict(error.headers))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One replica, batches of two, places for four requests that wait."""
    weights = tmp_path_factory.mktemp("serve") / "model.safetensors"
    torch.manual_seed(0)
    MEASNet(tiny()).save_pretrained(weights)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    token = "a token for this test"
    options = ["--port", str(port), "--replicas", "1", "--batch", "2", "--queue", "4"]
    options += ["--max-bytes", "200000", "--max-megapixels", "1", "--device", "cpu"]
    process = subprocess.Popen(
        [sys.executable, "-m", "distributed.serve", str(weights), *options],
        cwd=ROOT,
        env={**os.environ, TOKEN: token, "RAY_AUTH_MODE": "disabled"},
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    first = process.stdout.readline()
    assert b"serving" in first, first
    yield Server(f"http://127.0.0.1:{port}", token, process, weights)
    process.terminate()
    assert process.wait(timeout=60) == 0


def photograph(height: int = 64, width: int = 72) -> bytes:
    file = io.BytesIO()
    Image.fromarray(data.astronaut()[:height, 100 : 100 + width]).save(file, "PNG")
    return file.getvalue()


@pytest.mark.slow
def test_the_answer_is_that_of_the_network(server: Server, tmp_path: Path) -> None:
    reply = server.post("/restore", photograph())
    assert reply.status == 200 and reply.headers["content-type"] == "image/png"
    (tmp_path / "before.png").write_bytes(photograph())
    (tmp_path / "after.png").write_bytes(reply.body)
    before = read(tmp_path / "before.png")
    model = MEASNet.from_pretrained(server.weights)
    expected = before.with_colour(restore(model, before.tensor())).colour
    found = read(tmp_path / "after.png").colour
    assert np.abs(found.astype(int) - expected.astype(int)).max() <= 1
    maps = json.loads(server.post("/experts", photograph()).body)
    assert set(maps) == {"encoder1", "encoder2", "encoder3"}


@pytest.mark.slow
def test_what_a_request_may_not_do(server: Server) -> None:
    picture = photograph()
    for token in ("", "wrong"):
        assert server.post("/restore", picture, token).status == 401
    large = server.post("/restore", b"x" * 200_001)
    assert large.status == 413 and b"200,000 bytes" in large.body
    wide = server.post("/restore", png_of_size(2000, 2000))
    assert wide.status == 413 and b"1 megapixels" in wide.body
    assert server.post("/restore", b"no picture").status == 415


def burst(server: Server, number: int, during: Callable[[], None] = lambda: None) -> list[Reply]:
    """Requests that are sent at the same time; `during` runs when they are on their way."""
    with ThreadPoolExecutor(number) as pool:
        asked = [pool.submit(server.post, "/restore", photograph()) for _ in range(number)]
        during()
        return [one.result() for one in asked]


@pytest.mark.slow
def test_more_requests_than_the_queue_holds_are_refused_with_retry_after(
    server: Server,
) -> None:
    replies = burst(server, 32)
    statuses = [reply.status for reply in replies]
    assert set(statuses) == {200, 503}
    assert statuses.count(200) >= 4
    for reply in replies:
        if reply.status == 503:
            assert int(reply.headers["retry-after"]) >= 1
            assert b"4 requests wait already" in reply.body


@pytest.mark.slow
def test_a_replica_killed_under_load_loses_no_accepted_request(server: Server) -> None:
    def kill() -> None:
        deadline = time.monotonic() + 20
        while json.loads(urllib.request.urlopen(f"{server.url}/health").read())["waiting"] < 3:
            assert time.monotonic() < deadline
        own = psutil.Process(server.process.pid).children(recursive=True)
        replicas = [
            one
            for one in own
            if "ServeReplica:measnet:Restorer" in one.name() + "".join(one.cmdline())
        ]
        assert len(replicas) == 1
        replicas[0].kill()

    replies = burst(server, 6, kill)
    assert [reply.status for reply in replies] == [200] * 6
    assert len({reply.body for reply in replies}) == 1


@pytest.mark.slow
@needs_chromium
@pytest.mark.parametrize("suffix", ["png", "tif"])  # a browser cannot show TIFF
def test_the_page_restores_a_picture(server: Server, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"photo.{suffix}"
    Image.open(io.BytesIO(photograph())).save(path)

    async def visit(page: Page) -> None:
        await page.open(f"{server.url}/", 390)
        await page.evaluate(f"document.getElementById('token').value = '{server.token}'")
        root = (await page.call("DOM.getDocument"))["root"]["nodeId"]
        node = await page.call("DOM.querySelector", nodeId=root, selector="#file")
        await page.call("DOM.setFileInputFiles", files=[str(path)], nodeId=node["nodeId"])
        hidden = "document.getElementById('maps').hidden"
        deadline = time.monotonic() + 60
        while await page.evaluate(hidden):
            assert time.monotonic() < deadline, await page.evaluate("document.body.innerText")
            await asyncio.sleep(0.2)
        shown = (
            "['picture-left', 'picture-right'].map(id => document.getElementById(id).naturalWidth)"
        )
        assert await page.evaluate(shown) == [72, 72]
        name = "document.getElementById('download').download"
        assert await page.evaluate(name) == "photo-restored.png"
        assert await page.sideways() == 0
        assert not page.problems
        assert all(one.startswith(server.url) for one in page.requests)

    browse(visit)
