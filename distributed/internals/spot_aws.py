"""The node provider of cluster.yaml; needs boto3."""

from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

from distributed.internals.spot import SpotFirst


class SpotFirstAws(SpotFirst, AWSNodeProvider):
    """Ray's provider for AWS, spot machines first."""
