#!/usr/bin/env bash
# Start Ray on a worker node and join the head whose address is given.
set -euo pipefail
ulimit -n 65536
export PATH="$HOME/venv/bin:$PATH"  # jobs run the python of the cluster
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$HOME/measnet/ray.token" RAY_USAGE_STATS_ENABLED=0
exec ray start --address="$1:6379"
