"""Notice of pre-emption: the cloud says that it takes this node away, shortly before.

EC2 says it two minutes before it ends a spot instance, Google Compute Engine 30 seconds before. One
worker per node asks the cloud's metadata server every few seconds. After a notice all workers save
a checkpoint after their current step, and train on: the node may be lost at any moment then, and
the run restarts from that checkpoint.

Sources: "Spot Instance interruption notices" and "Use IMDSv2" in the EC2 user guide; "Detect if a
preemption occurred" in Compute Engine's documentation.
"""

import http.client
import json
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

Cloud = Literal["auto", "aws", "gcp", "off"]

VENDOR = Path("/sys/class/dmi/id/sys_vendor")
"""Who built this machine; a virtual machine names its cloud."""
VENDORS: Mapping[str, Cloud] = {"Amazon EC2": "aws", "Google": "gcp"}
AWS, GCP = "AWS_EC2_METADATA_SERVICE_ENDPOINT", "GCE_METADATA_HOST"
"""Environment variables of the clouds' own programs that name another metadata server."""
ASK_EVERY_S, ANSWER_WITHIN_S = 5.0, 2.0
TOKEN_S = 300
"""Lifetime of EC2's session token; one is taken for each question."""


def which_cloud(configured: Cloud, vendor: Path = VENDOR) -> Cloud:
    """`aws`, `gcp` or `off`; `auto` reads it from the machine.

    Args:
        configured: `scaling.preemption_notice`.
        vendor: the file that names the machine's vendor.
    """
    if configured != "auto":
        return configured
    try:
        return VENDORS.get(vendor.read_text().strip(), "off")
    except OSError:  # no such file in some containers, and on other systems
        return "off"


def notice_of(cloud: Cloud, environment: Mapping[str, str] = os.environ) -> str:
    """What the cloud says of this node; empty while it may stay.

    Args:
        cloud: `aws` or `gcp`.
        environment: of this process.

    Raises:
        OSError, http.client.HTTPException: the metadata server cannot be reached, refuses, or
            breaks off its answer.
    """
    if cloud == "gcp":
        host = environment.get(GCP, "metadata.google.internal")
        url = f"http://{host}/computeMetadata/v1/instance/preempted"
        preempted = _ask(url, {"Metadata-Flavor": "Google"}) == "TRUE"
        return "Compute Engine takes this node away" if preempted else ""
    server = environment.get(AWS, "http://169.254.169.254").rstrip("/")
    lifetime = {"X-aws-ec2-metadata-token-ttl-seconds": str(TOKEN_S)}
    token = _ask(f"{server}/latest/api/token", lifetime, method="PUT")
    try:
        answer = _ask(
            f"{server}/latest/meta-data/spot/instance-action", {"X-aws-ec2-metadata-token": token}
        )
    except urllib.error.HTTPError as error:
        if error.code == 404:  # nothing is planned
            return ""
        raise
    try:
        planned = json.loads(answer)
        return f"EC2 will {planned['action']} this node at {planned['time']}"
    except (ValueError, KeyError, TypeError):  # a notice in any other form is still a notice
        return f"EC2 will take this node away: {answer[:100]}"


class NoticeWatcher:
    """Asks in a thread of its own until there is a notice."""

    def __init__(self, cloud: Cloud, say: Callable[[str], None]) -> None:
        """Starts the thread, unless `cloud` is `off`.

        Args:
            cloud: from `which_cloud`.
            say: called from the thread if the metadata server cannot be asked, once.
        """
        self._cloud, self._say = cloud, say
        self._notice = ""
        self._ended = threading.Event()
        if cloud != "off":
            threading.Thread(target=self._watch, name="notice of pre-emption", daemon=True).start()

    def take(self) -> str:
        """The notice, the first time it is asked for after it came; else empty."""
        if notice := self._notice:  # else the thread may write it just now
            self._notice = ""
        return notice

    def close(self) -> None:
        """End the thread."""
        self._ended.set()

    def _watch(self) -> None:
        said = False
        while not self._ended.is_set():
            try:
                if notice := notice_of(self._cloud):
                    self._notice = notice
                    return
            except (OSError, http.client.HTTPException) as error:
                if not said:
                    self._say(
                        f"warning: the metadata server of {self._cloud} cannot be asked ({error}), "
                        "so no checkpoint is made before a pre-emption; it is asked again. In a "
                        "container EC2 needs a hop limit of 2 (HttpPutResponseHopLimit); "
                        "--scaling.preemption-notice off stops this"
                    )
                said = True
            self._ended.wait(ASK_EVERY_S)


def _ask(url: str, headers: Mapping[str, str], method: str = "GET") -> str:
    # A metadata server is on the node's own link: a proxy must not be asked for it.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    request = urllib.request.Request(url, headers=dict(headers), method=method)
    with opener.open(request, timeout=ANSWER_WITHIN_S) as answer:
        text: str = answer.read().decode(errors="replace").strip()
    return text
