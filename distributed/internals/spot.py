"""Starts spot machines first, and on-demand ones where there are none. Tested with Ray 2.60.

If a cloud refuses a machine, Ray's autoscaler asks for the same node type again, without end. (It
turns to another type only for machines that were granted and did not come up.) So the cluster files
have one type of GPU nodes. They name a node provider that is Ray's own for this cloud behind
`SpotFirst`. tests/test_autoscaling.py shows both.
"""

import logging
from collections.abc import Mapping
from typing import Any

logger = logging.getLogger(__name__)


class SpotFirst:
    """Goes before a node provider of Ray: `class SpotFirstX(SpotFirst, XNodeProvider)`."""

    def create_node_with_resources_and_labels(
        self,
        node_config: dict[str, Any],
        tags: dict[str, str],
        count: int,
        resources: dict[str, float],
        labels: dict[str, str],
    ) -> Any:
        """Start `count` nodes one by one, so that a refusal concerns no node that has started.

        Raises:
            Exception: the cloud refuses on-demand machines too; the autoscaler tries again later.
        """
        create: Any = super()
        started: dict[str, Any] = {}
        for _ in range(count):
            try:
                made = create.create_node_with_resources_and_labels(
                    node_config, tags, 1, resources, labels
                )
            except Exception as refusal:  # Ray's provider for Google raises `Exception` itself
                if (fallback := on_demand(node_config)) == node_config:
                    raise
                logger.warning("no spot machine (%s); starting an on-demand one", refusal)
                made = create.create_node_with_resources_and_labels(
                    fallback, tags, 1, resources, labels
                )
            started |= made or {}
        return started


def on_demand(node_config: Mapping[str, Any]) -> dict[str, Any]:
    """The same machine without the wish for a spot one, on AWS and on Google Cloud."""
    config = {name: value for name, value in node_config.items() if name != "InstanceMarketOptions"}
    if "scheduling" in config:
        config["scheduling"] = [
            wish for wish in config["scheduling"] if wish != {"provisioningModel": "SPOT"}
        ]
    return config
