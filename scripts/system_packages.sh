#!/usr/bin/env bash
# Installs the Debian packages that launching on several hosts, binding cores and MPI need: as root; otherwise says what is
# missing and what will not run without it. Never fails: all the rest of ZeroPipe works without them.
set -uo pipefail

packages=(pdsh openssh-server openssh-client iproute2 numactl openmpi-bin libopenmpi-dev mpich chromium zsh fish)
command -v dpkg-query >/dev/null || { echo "not a Debian system: see README for what launching on several hosts needs"; exit 0; }

missing() {
  for package in "${packages[@]}"; do
    [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null)" = installed ] || echo "$package"
  done
}

mapfile -t absent < <(missing)
[ ${#absent[@]} -eq 0 ] && exit 0
if [ "$(id -u)" -eq 0 ]; then
  echo "installing ${absent[*]}"
  export DEBIAN_FRONTEND=noninteractive
  apt-get -qq update && apt-get -qq install -y --no-install-recommends "${absent[@]}" >/dev/null && exit 0
  mapfile -t absent < <(missing)
fi
for package in "${absent[@]}"; do
  case $package in
    pdsh | openssh-*) part="launching on several hosts, tests/hosts" ;;
    iproute2) part="tests/hosts" ;;
    numactl) part="binding ranks to cores (--bind_cores_to_rank)" ;;
    mpich) part="zeropipe launch --launcher mpich" ;;
    zsh | fish) part="tests of completion in that shell" ;;
    chromium) part="tests of the report page" ;;
    *) part="preparing text with mpirun" ;;
  esac
  echo "missing Debian package $package: skipped without it: $part (install: apt-get install $package)"
done
