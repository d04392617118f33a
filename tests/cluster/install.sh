#!/usr/bin/env bash
# Debian packages of the test cluster; needs root, does nothing where they are installed.
set -euo pipefail

packages=(
  iproute2 openssh-client openssh-server pdsh
  munge slurm-client slurmctld slurmd
  openmpi-bin libopenmpi-dev
)

missing=()
for package in "${packages[@]}"; do
  [[ $(dpkg-query -W -f '${Status}' "$package" 2>/dev/null) == *"ok installed" ]] ||
    missing+=("$package")
done
((${#missing[@]})) || exit 0

echo "installing: ${missing[*]}"
# The packages must not start their daemons: those run inside the virtual hosts only.
policy=/usr/sbin/policy-rc.d
if [[ ! -e $policy ]]; then
  printf '#!/bin/sh\nexit 101\n' >"$policy"
  chmod +x "$policy"
  trap 'rm -f "$policy"' EXIT
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
