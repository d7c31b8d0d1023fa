#!/usr/bin/env bash
# Install what the project needs on a node of Ubuntu; the project itself travels with each job.
# Arguments: further packages, such as the file system of the storage (s3fs, gcsfs).
set -euo pipefail
if ! command -v python3.11 >/dev/null; then
  sudo add-apt-repository -y ppa:deadsnakes/ppa
  sudo apt-get install -y -qq python3.11 python3.11-venv
fi
[ -x ~/venv/bin/python ] || python3.11 -m venv ~/venv
here=$(cd "$(dirname "$0")" && pwd)
~/venv/bin/pip install --quiet -r "$here/requirements.txt" "$@"
