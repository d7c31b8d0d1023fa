"""Serve a network over HTTP: `python -m distributed.serve CHECKPOINT`.

A page to drop a picture on, and an endpoint: `curl --data-binary @photo.jpg
http://127.0.0.1:8000/restore -o restored.png`. Ray Serve runs the replicas; it comes with
`pip install "measnet-ray[serve]"`.
"""

import ipaddress
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import tyro

from measnet.errors import first_line
from measnet.hardware import DeviceChoice, choose_device, this_machine
from measnet.hub import SMALL
from shards.storage import absolute

TOKEN = "MEASNET_SERVE_TOKEN"
"""Environment variable with the token that requests need."""
LEAST_TOKEN = 16
"""Characters of the shortest token."""
NAME = "measnet"


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Serve a network over HTTP. The token is in the environment variable MEASNET_SERVE_TOKEN."""

    checkpoint: tyro.conf.Positional[str]
    """A run folder (its newest complete checkpoint, averaged weights), a .safetensors file, a
    checkpoint of the authors' program (.ckpt, .pth), or `small`, which comes with the program."""
    host: str = "127.0.0.1"
    """Address to listen on. Any other than this machine's own needs a token."""
    port: int = 8000
    """Port to listen on."""
    replicas: int = 0
    """Copies of the network; 0: one per GPU, or one."""
    max_bytes: int = 64 * 2**20
    """Largest file, in bytes."""
    max_megapixels: int = 24
    """Largest picture, in 10⁶ pixels."""
    batch: int = 8
    """Most pictures of equal size that are restored together."""
    batch_wait: float = 0.01
    """Seconds to wait for more pictures of a batch."""
    queue: int = 32
    """Requests that may wait for a replica; further ones get 503 with Retry-After."""
    device: DeviceChoice = "auto"
    """Device of the replicas; `auto`: the GPU if there is one."""

    def check(self, token: str) -> None:
        """Refuse values that cannot be used, and an open address without a token.

        Raises:
            ValueError: with the flag and the limit.
        """
        for name in ("max_bytes", "max_megapixels", "batch", "queue"):
            if getattr(self, name) < 1:
                flag = "--" + name.replace("_", "-")
                raise ValueError(f"{flag} is {getattr(self, name)}, but must be 1 or more")
        for name in ("replicas", "batch_wait"):
            if getattr(self, name) < 0:
                flag = "--" + name.replace("_", "-")
                raise ValueError(f"{flag} is {getattr(self, name)}, but must be 0 or more")
        if not 0 < self.port < 65536:
            raise ValueError(f"--port is {self.port}, but must be between 1 and 65535")
        if token and len(token) < LEAST_TOKEN:
            raise ValueError(f"{TOKEN} has {len(token)} characters, but needs {LEAST_TOKEN}")
        if not token and not is_loopback(self.host):
            raise ValueError(
                f"--host {self.host} is open to other machines, which needs a token; set one: "
                f"export {TOKEN}=$(openssl rand -hex 32)"
            )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return False


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until Ctrl-C; returns 0, or 2 after a message."""
    given = tyro.cli(Arguments, args=argv, prog="python -m distributed.serve")
    token = os.environ.get(TOKEN, "")
    try:
        given.check(token)
        start(given, token)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    address = f"http://{given.host}:{given.port}"
    print(f"serving {given.checkpoint} on {address}; API: {address}/openapi.json; Ctrl-C ends it")
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    ended.wait()
    print("ending")
    stop()
    return 0


def start(given: Arguments, token: str) -> Any:
    """Start Ray where none runs, and the service; returns when it answers.

    Raises:
        ValueError, OSError: no such checkpoint, the port is taken, or Ray Serve is not installed.
    """
    from distributed.evaluate import load

    load(given.checkpoint, "cpu")  # a wrong one is an error here, not in a log of a replica
    _check_port(given.host, given.port)
    try:
        import ray
        from ray import serve
        from ray.exceptions import GetTimeoutError, RayActorError
    except ImportError as error:
        raise ValueError(
            f"Ray Serve is not complete ({error.name} is missing); "
            'install it: pip install "measnet-ray[serve]"'
        ) from error

    from distributed.cluster import is_local, join_cluster, start_local_ray
    from distributed.serve_app import Limits, application

    device: DeviceChoice
    if is_local():
        machine = this_machine()
        cards = len(machine.cards)
        device = "cpu" if choose_device(given.device, machine).choice == "cpu" else "cuda"
        replicas = replicas_on(device, given.replicas, cards)
        if not ray.is_initialized():
            start_local_ray(num_cpus=max(os.cpu_count() or 1, replicas + 1))
    else:
        if not ray.is_initialized():
            join_cluster()
        cards = int(ray.cluster_resources().get("GPU", 0))
        asked = given.device
        device = "cuda" if asked == "cuda" or (asked == "auto" and cards) else "cpu"
        replicas = replicas_on(device, given.replicas, cards)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    limits = Limits(
        bytes=given.max_bytes,
        megapixels=given.max_megapixels,
        batch=given.batch,
        wait_s=given.batch_wait,
        queue=given.queue,
    )
    app = application(
        path_for_replicas(given.checkpoint),
        limits=limits,
        token=token,
        replicas=replicas,
        device=device,
        gpus=1.0 if device != "cpu" else 0.0,
    )
    try:
        serve.start(http_options={"host": given.host, "port": given.port})
        return serve.run(app, name=NAME, route_prefix="/")
    except (RayActorError, GetTimeoutError) as error:
        raise OSError(
            f"Ray Serve did not start ({type(error).__name__}); if the machine is very busy, try "
            "again, else see the logs in /tmp/ray/session_latest/logs/serve"
        ) from error
    except RuntimeError as error:  # a replica could not be made
        raise OSError(
            f"Ray Serve could not start the service: {first_line(error)}; see the "
            "logs in /tmp/ray/session_latest/logs/serve"
        ) from error


def replicas_on(device: str, asked: int, cards: int) -> int:
    """How many replicas to start; by default one per GPU, and one on the CPU.

    Raises:
        ValueError: each replica takes a GPU, and there are fewer.
    """
    if device == "cpu":
        return asked or 1
    if (asked or 1) > cards:
        raise ValueError(
            f"--replicas is {asked or 1}, but there are {cards} GPUs and each replica takes one; "
            "use fewer, or --device cpu"
        )
    return asked or cards


def path_for_replicas(checkpoint: str) -> str:
    """The checkpoint as replicas find it, which run in other folders."""
    shipped = checkpoint == SMALL and not os.path.exists(SMALL)
    return checkpoint if shipped else absolute(checkpoint)


def stop() -> None:
    """End the service and the local Ray."""
    import ray
    from ray import serve

    serve.shutdown()
    ray.shutdown()


def _check_port(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ValueError(
                f"cannot listen on {host}:{port} ({error.strerror}); choose another --port"
            ) from error


if __name__ == "__main__":
    sys.exit(main())
