"""The service: an ingress that speaks HTTP, and replicas of the network behind it.

The ingress decodes a picture, sends it to a replica and encodes the result. A request that a
replica has lost, because its process died, is sent again: restoring has no side effects. If the
queue is full, the ingress answers 503 and says when to try again.
"""

import asyncio
import math
import secrets
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.responses import HTMLResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from PIL import Image, UnidentifiedImageError
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from torch import Tensor

from distributed.evaluate import load
from distributed.figures import as_uint8
from distributed.pages.charts import colour
from distributed.pages.render import data_uri, render
from distributed.pages.views import coloured
from measnet.decoding import read
from measnet.hardware import DeviceChoice, choose_device, this_machine
from measnet.network import PIXEL_LIBRARIES, MEASNet
from measnet.pictures import WHITE, Picture, PictureError, write
from measnet.routing import record_maps
from measnet.tiling import Tiling, choose_tiling, is_exact, restore

LOSSES = 5
"""Times that a request is sent again because its replica died; more is the request's own fault."""
PAUSE_S = 0.5
"""Seconds before a request is sent again."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one request may need, and how many may wait."""

    bytes: int = 64 * 2**20
    """Size of a file."""
    megapixels: int = 24
    """Pixels of a picture, in 10⁶."""
    batch: int = 8
    """Most pictures that the network restores at once."""
    wait_s: float = 0.01
    """Seconds to wait for more pictures of a batch."""
    queue: int = 32
    """Most requests that wait for a replica; further ones get 503."""


class Job(NamedTuple):
    """A picture to restore."""

    image: Tensor
    """(3, H, W) float32 in [0, 1]."""
    experts: bool = False
    """Give the maps of the experts instead of the restored picture."""


class Done(NamedTuple):
    """The answer to a `Job`, and how long its batch took."""

    image: Tensor | None
    """(3, H, W) in [0, 1]."""
    maps: dict[str, Image.Image]
    """Per-pixel library -> most probable expert of each pixel as a colour."""
    seconds: float


def groups(jobs: Sequence[Job], at_once: int) -> list[list[int]]:
    """Numbers of the jobs that run together: equal sizes and kinds, at most `at_once` pixels."""
    found: dict[tuple[Any, ...], list[list[int]]] = {}
    for number, job in enumerate(jobs):
        height, width = job.image.shape[-2:]
        most = max(1, at_once // (height * width))
        own = found.setdefault((height, width, job.experts), [[]])
        if len(own[-1]) == most:
            own.append([])
        own[-1].append(number)
    return [group for own in found.values() for group in own]


def retry_after(waiting: int, seconds: float, batch: int, replicas: int) -> int:
    """Whole seconds after which the waiting requests should be done, at least 1.

    Args:
        waiting: requests that were accepted and are not answered.
        seconds: that a batch takes.
        batch: requests in a batch.
        replicas: that work at the same time.
    """
    return max(1, math.ceil(waiting / (batch * replicas) * seconds))


@serve.deployment
class Restorer:
    """A replica: the network on its device."""

    def __init__(
        self, checkpoint: str, device: DeviceChoice, limits: Limits, replicas: int
    ) -> None:
        """Load the checkpoint; so many replicas may share the memory of a machine."""
        self.model: MEASNet = load(checkpoint, choose_device(device, this_machine()).choice).eval()
        self.tiling: Tiling = choose_tiling(self.model, processes=replicas)
        self.restore.set_max_batch_size(limits.batch)
        self.restore.set_batch_wait_timeout_s(limits.wait_s)

    @serve.batch
    async def restore(self, jobs: list[Job]) -> list[Done]:
        """Restore pictures; those of equal size together."""
        return await asyncio.to_thread(self._work, jobs)

    def _work(self, jobs: list[Job]) -> list[Done]:
        found: dict[int, Done] = {}
        for numbers in groups(jobs, self.tiling.at_once):
            started = time.perf_counter()
            batch = torch.stack([jobs[number].image for number in numbers])
            if jobs[numbers[0]].experts:
                images, maps = [None] * len(batch), [self._maps(image) for image in batch]
            else:
                tile = self.tiling.side(*batch.shape[-2:])
                images = list(restore(self.model, batch, tile=tile, overlap=self.tiling.overlap))
                maps = [{} for _ in numbers]
            seconds = time.perf_counter() - started
            for number, image, own in zip(numbers, images, maps, strict=True):
                # A copy, else the answer would carry the memory of the whole batch.
                found[number] = Done(None if image is None else image.clone(), own, seconds)
        return [found[number] for number in range(len(jobs))]

    def _maps(self, image: Tensor) -> dict[str, Image.Image]:
        """Of one picture; none if it is restored in blended tiles."""
        height, width = image.shape[-2:]
        tile = self.tiling.side(height, width)
        if tile is not None and not is_exact(self.model):
            return {}
        with record_maps(self.model, height, width) as maps:
            restore(self.model, image, tile=tile, overlap=self.tiling.overlap)
        return coloured(maps, self.model.config.pixel_experts)


# --- HTTP ---
# `serve.ingress` copies the functions that exist when the class is made, so these come first.


async def again_if_lost(call: Callable[[], Any], *, losses: int, pause_s: float) -> Any:
    """Await `call()`; again if the actor that worked on it has died.

    A full queue refuses a new request only. One that was accepted and lost waits for a place.

    Raises:
        BackPressureError: the queue is full, and the request is a new one.
        RayActorError: it was lost more than `losses` times.
    """
    lost = 0
    while True:
        try:
            return await call()
        except RayActorError:
            lost += 1
            if lost > losses:
                raise
        except BackPressureError:
            if not lost:
                raise
        await asyncio.sleep(pause_s)


async def received(chunks: AsyncIterator[bytes], most: int, announced: int) -> bytes:
    """The body of a request.

    Raises:
        HTTPException: 413 if it is larger than `most` bytes, before all of it is read.
    """
    body = bytearray()
    too_large = announced > most
    if not too_large:
        async for chunk in chunks:
            body += chunk
            if len(body) > most:
                too_large = True
                break
    if too_large:
        raise HTTPException(
            413, f"the file is larger than {most:,} bytes, the limit of this server (--max-bytes)"
        )
    return bytes(body)


def decoded(body: bytes, megapixels: int) -> Picture:
    """A picture from the bytes of its file; its size is checked before its pixels are read.

    Raises:
        HTTPException: 413 too many pixels, 415 not a picture.
    """
    try:
        with Image.open(BytesIO(body)) as header:
            pixels = header.width * header.height
    except Image.DecompressionBombError:
        pixels = 10**12
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError):
        pixels = 0  # `read` knows more kinds of files, and says what is wrong
    if pixels > megapixels * 10**6:
        raise HTTPException(
            413,
            f"the picture has more than {megapixels} megapixels, the limit of this server "
            "(--max-megapixels)",
        )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "picture"
        path.write_bytes(body)
        try:
            return read(path, megapixels=megapixels)
        except PictureError as error:
            text = str(error).removeprefix(f"{path} ")
            raise HTTPException(415, f"the file {text}") from error


def check_depth(picture: Picture) -> None:
    """Refuse a picture whose restored one PNG could not hold.

    Raises:
        HTTPException: 415, its values are floats.
    """
    if picture.colour.dtype == np.float32:
        raise HTTPException(415, "PNG does not hold floats; send 8 or 16 bits per channel")


def preview_png(picture: Picture) -> bytes:
    """A picture as PNG with 8 bits, which every browser can show."""
    parts = [picture.colour]
    if picture.alpha is not None:
        parts.append(picture.alpha[..., None])
    pixels = as_uint8(np.concatenate(parts, axis=2) / np.float32(WHITE[picture.colour.dtype]))
    file = BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(file, "PNG")
    return file.getvalue()


def _encoded(picture: Picture, image: Tensor) -> bytes:
    """The restored picture as PNG."""
    restored = picture.with_colour(image)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "restored.png"
        write(restored, path)
        return path.read_bytes()


api = FastAPI(
    title="MEASNet",
    description="Restores pictures with haze, rain, noise, blur or low light.",
    version="1",
    docs_url=None,  # these pages load scripts from the network
    redoc_url=None,
)
_bearer = HTTPBearer(auto_error=False, description="The token that the server was started with.")
Credentials = Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]
BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "description": "The picture file: PNG, JPEG, TIFF, WebP or BMP.",
        "content": {"image/*": {"schema": {"type": "string", "format": "binary"}}},
    }
}
ERRORS: dict[int | str, dict[str, Any]] = {
    401: {"description": "The token is missing or wrong."},
    413: {"description": "The file or the picture is larger than a limit, which is named."},
    415: {"description": "The file is not a picture that can be read."},
    503: {
        "description": "Too many requests wait; try again after the time in Retry-After.",
        "headers": {"Retry-After": {"schema": {"type": "integer"}, "description": "Seconds."}},
    },
}
_PNG = {"image/png": {"schema": {"type": "string", "format": "binary"}}}
PNG_ANSWER: dict[str, Any] = {
    "description": "The restored picture as PNG; depth, transparency and metadata are kept.",
    "content": _PNG,
}
PREVIEW_ANSWER: dict[str, Any] = {"description": "The picture as PNG, 8 bits.", "content": _PNG}


@serve.deployment
@serve.ingress(api)
class Ingress:
    """Speaks HTTP."""

    def __init__(self, restorer: Any, limits: Limits, token: str, replicas: int) -> None:
        """`restorer` is the handle of `Restorer`; an empty token means that none is needed."""
        self._restorer, self._limits = restorer, limits
        self._token, self._replicas = token, replicas
        self._waiting = 0
        self._seconds = 1.0  # of a batch

    @api.get("/", response_class=HTMLResponse, include_in_schema=False)
    def page(self) -> str:
        """A page to drop a picture on."""
        return render(
            "serve.html",
            libraries=PIXEL_LIBRARIES,
            needs_token=bool(self._token),
            limits=self._limits,
            colours=[colour(n) for n in range(8)],
        )

    @api.get("/health")
    def health(self) -> dict[str, int]:
        """How many requests have been accepted and are not answered."""
        return {"waiting": self._waiting}

    @api.post(
        "/restore",
        response_class=Response,
        responses={200: PNG_ANSWER, **ERRORS},
        openapi_extra=BODY,
    )
    async def restore(self, request: Request, credentials: Credentials) -> Response:
        """Restore a picture."""
        picture = await self._picture(request, credentials)
        check_depth(picture)
        done = await self._send(Job(picture.tensor()))
        assert done.image is not None
        return Response(
            await asyncio.to_thread(_encoded, picture, done.image), 200, None, "image/png"
        )

    @api.post("/experts", responses=ERRORS, openapi_extra=BODY)
    async def experts(self, request: Request, credentials: Credentials) -> dict[str, str]:
        """The most probable expert of each pixel, as a PNG in a data address per library.

        Empty for variant official if the picture does not fit the memory whole.
        """
        picture = await self._picture(request, credentials)
        done = await self._send(Job(picture.tensor(), experts=True))
        return {name: data_uri(image) for name, image in done.maps.items()}

    @api.post(
        "/preview",
        response_class=Response,
        responses={200: PREVIEW_ANSWER, **ERRORS},
        openapi_extra=BODY,
    )
    async def preview(self, request: Request, credentials: Credentials) -> Response:
        """The picture itself as PNG with 8 bits, for a browser that cannot show its file (TIFF)."""
        picture = await self._picture(request, credentials)
        return Response(await asyncio.to_thread(preview_png, picture), 200, None, "image/png")

    async def _picture(
        self, request: Request, credentials: HTTPAuthorizationCredentials | None
    ) -> Picture:
        """The picture of a request that is allowed."""
        given = "" if credentials is None else credentials.credentials
        if self._token and not secrets.compare_digest(given.encode(), self._token.encode()):
            raise HTTPException(
                401, "the token is missing or wrong", {"WWW-Authenticate": "Bearer"}
            )
        size = request.headers.get("content-length", "")
        body = await received(
            request.stream(), self._limits.bytes, int(size) if size.isdigit() else 0
        )
        return await asyncio.to_thread(decoded, body, self._limits.megapixels)

    async def _send(self, job: Job) -> Done:
        """The answer of a replica; again if the replica dies."""
        self._waiting += 1
        try:
            done = await again_if_lost(
                lambda: self._restorer.restore.remote(job), losses=LOSSES, pause_s=PAUSE_S
            )
        except BackPressureError as error:
            wait = retry_after(self._waiting, self._seconds, self._limits.batch, self._replicas)
            text = f"{self._limits.queue} requests wait already; try again in {wait} s"
            raise HTTPException(503, text, {"Retry-After": str(wait)}) from error
        except (DeploymentUnavailableError, RayActorError) as error:
            text = "no replica of the network is running; look at the server's log"
            raise HTTPException(503, text, {"Retry-After": "10"}) from error
        finally:
            self._waiting -= 1
        self._seconds += 0.2 * (done.seconds - self._seconds)
        return done


def application(
    checkpoint: str,
    *,
    limits: Limits,
    token: str,
    replicas: int,
    device: DeviceChoice,
    cpus: float = 1.0,
    gpus: float = 0.0,
) -> Any:
    """The application for `ray.serve.run`.

    Args:
        checkpoint: as for `distributed.evaluate.load`; replicas on other machines read it too.
        limits: of requests.
        token: that requests need; empty: none.
        replicas: of the network.
        device: of each replica.
        cpus: of each replica.
        gpus: of each replica; 0 on a CPU.
    """
    network: Any = Restorer
    ingress: Any = Ingress
    restorer = network.options(
        num_replicas=replicas,
        max_ongoing_requests=2 * limits.batch,  # the next batch waits at the replica
        max_queued_requests=limits.queue,
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
        health_check_period_s=2,
        graceful_shutdown_timeout_s=10,
    ).bind(checkpoint, device, limits, replicas)
    # The ingress must be able to refuse more requests than are accepted.
    open_requests = 4 * (limits.queue + 2 * limits.batch * replicas)
    return ingress.options(
        max_ongoing_requests=open_requests, ray_actor_options={"num_cpus": 0}
    ).bind(restorer, limits, token, replicas)
