"""Load figures of a running server: requests/s, p50 and p99 at multiples of its capacity.

    python -m distributed.serve runs/demo &
    python bench/serve.py --side 128 --seconds 20

First it measures the capacity: as many requests at the same time as `--together`, each sent when
one before is answered. Then it sends requests at fixed times, at 1, 2 and 4 times that rate,
without waiting for answers. Latencies are those of the requests that were answered with 200.
"""

import asyncio
import io
import os
import time
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import aiohttp
import numpy as np
import tyro
from PIL import Image


class Answer(NamedTuple):
    """One answer."""

    status: int
    """Of HTTP; 0 if the connection was lost."""
    seconds: float
    retry: bool
    """Whether it says when to try again."""


def picture(side: int) -> bytes:
    values = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG")
    return file.getvalue()


async def ask(session: aiohttp.ClientSession, url: str, body: bytes) -> Answer:
    started = time.perf_counter()
    try:
        async with session.post(f"{url}/restore", data=body) as answer:
            await answer.read()
            status, retry = answer.status, "Retry-After" in answer.headers
    except aiohttp.ClientError:
        status, retry = 0, False
    return Answer(status, time.perf_counter() - started, retry)


async def closed(
    session: aiohttp.ClientSession, url: str, body: bytes, together: int, seconds: float
) -> tuple[list[Answer], float]:
    """`together` clients that each wait for their answer; returns answers and seconds."""
    started = time.perf_counter()
    answers: list[Answer] = []

    async def client() -> None:
        while time.perf_counter() - started < seconds:
            answers.append(await ask(session, url, body))

    await asyncio.gather(*(client() for _ in range(together)))
    return answers, time.perf_counter() - started


async def open_loop(
    session: aiohttp.ClientSession, url: str, body: bytes, rate: float, seconds: float
) -> tuple[list[Answer], float]:
    """Requests at fixed times, `rate` a second; returns answers and seconds."""
    started = time.perf_counter()
    tasks = []
    for number in range(max(1, round(rate * seconds))):
        await asyncio.sleep(max(0.0, started + number / rate - time.perf_counter()))
        tasks.append(asyncio.create_task(ask(session, url, body)))
    answers = list(await asyncio.gather(*tasks))
    return answers, time.perf_counter() - started


def line(name: str, answers: list[Answer], seconds: float) -> str:
    good = sorted(answer.seconds for answer in answers if answer.status == 200)
    refused = [answer for answer in answers if answer.status == 503]
    other = Counter(answer.status for answer in answers if answer.status not in (200, 503))
    p50, p99 = np.quantile(good, (0.5, 0.99)) if good else (float("nan"), float("nan"))
    silent = sum(not answer.retry for answer in refused)
    failed = f"{len(refused)} x 503" + (f" ({silent} without Retry-After)" if silent else "")
    rest = "".join(f", {count} x {status or 'lost'}" for status, count in other.items())
    return (
        f"{name:<12} sent {len(answers):>5} ({len(answers) / seconds:6.1f}/s)  "
        f"restored {len(good) / seconds:6.1f}/s  p50 {p50:6.3f} s  p99 {p99:6.3f} s  {failed}{rest}"
    )


async def measure(given: "Arguments") -> None:
    body = picture(given.side)
    token = os.environ.get("MEASNET_SERVE_TOKEN", "")
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    limits = aiohttp.TCPConnector(limit=0)
    patience = aiohttp.ClientTimeout(total=600)
    async with aiohttp.ClientSession(
        connector=limits, timeout=patience, headers=headers
    ) as session:
        await closed(session, given.url, body, given.together, 3.0)  # warm up
        answers, seconds = await closed(session, given.url, body, given.together, given.seconds)
        print(line("closed", answers, seconds), flush=True)
        capacity = sum(answer.status == 200 for answer in answers) / seconds
        if not capacity:
            raise SystemExit("no request was restored; is the server running?")
        for multiple in given.multiples:
            rate = multiple * capacity
            answers, seconds = await open_loop(session, given.url, body, rate, given.seconds)
            print(line(f"{multiple:g} x", answers, seconds), flush=True)


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Load figures of a running server."""

    url: str = "http://127.0.0.1:8000"
    """Of the server; its token is read from MEASNET_SERVE_TOKEN."""
    side: int = 128
    """Side of the picture in pixels."""
    seconds: float = 20.0
    """Length of each measurement, in which requests are sent."""
    together: int = 16
    """Clients that find the capacity."""
    multiples: tuple[float, ...] = (1.0, 2.0, 4.0)
    """Of the capacity."""


if __name__ == "__main__":
    asyncio.run(measure(tyro.cli(Arguments, description=__doc__.splitlines()[0])))
