#!/usr/bin/env bash
# Installs the Debian 12 packages that building and testing bitmill needs; only those that are missing, so that a second
# run takes no time. Needs root or sudo only when something is missing. BITMILL_SKIP_DEPS=1 turns it off.
set -euo pipefail

packages=(
  cmake ninja-build g++ pkg-config git ca-certificates  # build
  openmpi-bin libopenmpi-dev libhdf5-dev libboost-program-options-dev nlohmann-json3-dev libfmt-dev libxxhash-dev
  libdnnl-dev libopenblas-dev liblapacke-dev            # arithmetic
  libgtest-dev libgmock-dev libbenchmark-dev            # tests and benchmarks
  python3 python3-venv                                  # test scripts, launch/tokenize.sh
)

if [ "${BITMILL_SKIP_DEPS:-0}" = 1 ]; then
  exit 0
fi
if ! command -v dpkg-query >/dev/null || ! command -v apt-get >/dev/null; then
  echo "install_deps.sh: this is not a Debian-like system. Install what these packages hold, then set BITMILL_SKIP_DEPS=1:" >&2
  echo "  ${packages[*]}" >&2
  exit 1
fi

installed="$(dpkg-query -W -f '${Package} ${db:Status-Status}\n' "${packages[@]}" 2>/dev/null || true)"
missing=()
for package in "${packages[@]}"; do
  if ! grep -qx "$package installed" <<<"$installed"; then
    missing+=("$package")
  fi
done

if [ "${#missing[@]}" -gt 0 ]; then
  as_root=()
  if [ "$(id -u)" != 0 ]; then
    if ! command -v sudo >/dev/null; then
      echo "install_deps.sh: neither root nor sudo; ask an administrator to run: apt-get install ${missing[*]}" >&2
      exit 1
    fi
    as_root=(sudo)
  fi
  echo "installing ${missing[*]}"
  log="$(mktemp)"
  trap 'rm -f "$log"' EXIT
  # ${array[@]+...}: an empty array counts as unset in older bash.
  if ! { ${as_root[@]+"${as_root[@]}"} apt-get update &&
         ${as_root[@]+"${as_root[@]}"} env DEBIAN_FRONTEND=noninteractive \
           apt-get install -y --no-install-recommends "${missing[@]}"; } >"$log" 2>&1; then
    tail -n 30 "$log" >&2
    echo "install_deps.sh: apt-get could not install ${missing[*]}" >&2
    exit 1
  fi
fi

found="$(cmake --version | sed -n '1s/[^0-9]*\([0-9.]*\).*/\1/p')"
if [ "$(printf '%s\n' 3.25 "$found" | sort -V | head -n 1)" != 3.25 ]; then
  echo "install_deps.sh: cmake $found is too old, at least 3.25 is needed (Debian 12 has it)" >&2
  exit 1
fi
