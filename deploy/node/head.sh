#!/usr/bin/env bash
# Start Ray on the head. Nobody talks to the cluster without its token; the dashboard listens on
# 127.0.0.1 only (`ray dashboard cluster.yaml` forwards it).
set -euo pipefail
ulimit -n 65536
export PATH="$HOME/venv/bin:$PATH"  # jobs run the python of the cluster
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$HOME/measnet/ray.token" RAY_USAGE_STATS_ENABLED=0
# A job that is stopped may take this long to write its last checkpoint.
export RAY_JOB_STOP_WAIT_TIME_S=90
# A node that fails five looks in a row is lost: one whose Ray has died refuses them at once and is
# known after 3 s, one that does not answer (a cut link) after half a minute.
export RAY_health_check_period_ms=500 RAY_health_check_timeout_ms=5000
export RAY_health_check_failure_threshold=5
exec ray start --head --port=6379 --dashboard-host=127.0.0.1 \
  --autoscaling-config="$HOME/ray_bootstrap_config.yaml"
