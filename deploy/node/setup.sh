#!/usr/bin/env bash
# Install the project's wheel and what it needs on a node of Ubuntu.
# Arguments: further packages, such as the file system of the storage (s3fs, gcsfs).
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)

# torch 2.13 from PyPI is built for CUDA 13.
oldest_driver=580
if grep -qs 0x10de /sys/bus/pci/devices/*/vendor; then  # there is a card of NVIDIA
  driver=$(cat /sys/module/nvidia/version 2>/dev/null || echo 0)
  if [ "${driver%%.*}" -lt "$oldest_driver" ]; then
    echo "error: the GPU driver is $driver, but torch needs $oldest_driver or newer (0: none is" \
      "loaded); choose another image: the comments of the cluster file tell how" >&2
    exit 1
  fi
fi

# A fresh machine updates itself for minutes after its start, and holds apt's lock meanwhile.
# `update` takes a lock for which apt itself has no option to wait.
apt() { sudo DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=600 -qq "$@"; }
update() { for _ in $(seq 60); do apt update && return; sleep 10; done; return 1; }
# Triton builds its kernels on the node: it needs a C compiler and Python.h.
packages="gcc libc6-dev libjpeg-turbo8 python3.11 python3.11-venv python3.11-dev"
# shellcheck disable=SC2086  # each word is a package
if ! dpkg --status $packages >/dev/null 2>&1; then
  update
  apt install -y software-properties-common
  sudo add-apt-repository --yes --no-update ppa:deadsnakes/ppa
  update
  apt install -y $packages
fi
[ -x ~/venv/bin/python ] || python3.11 -m venv ~/venv
~/venv/bin/pip install --quiet -c "$here/constraints.txt" "$here"/*.whl "$@"
~/venv/bin/python -m distributed.doctor || true  # shows what is active on this node
