#!/usr/bin/env bash
# Runs launch/tokenize.py in a Python environment of its own (.venv/tokenize), made on first use from the package index.
# Arguments are those of tokenize.py; paths count from where you are.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
environment="$root/.venv/tokenize"

if ! "$environment/bin/python" -c "import tokenizers, h5py" 2>/dev/null; then
  echo "making the Python environment $environment" >&2
  python3 -m venv "$environment"
  "$environment/bin/pip" install --quiet --disable-pip-version-check "tokenizers>=0.20,<1" "h5py>=3.10,<4"
fi
exec "$environment/bin/python" "$root/launch/tokenize.py" "$@"
