"""The node provider of deploy/gcp.yaml; needs google-api-python-client."""

from ray.autoscaler._private.gcp.node_provider import GCPNodeProvider

from distributed.internals.spot import SpotFirst


class SpotFirstGcp(SpotFirst, GCPNodeProvider):
    """Ray's provider for Google Cloud, spot machines first."""
