#!/usr/bin/env bash
# Writes constraints.txt anew: the newest versions that the tests and the judges take, from wheels.
# $1: the oldest Python that is supported, since newer ones have wheels of what it takes.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3.11}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
pip="$folder/venv/bin/pip"
"$pip" install --quiet torch==2.13.0
"$pip" install --quiet --only-binary=:all: -e '.[test,parity]'
{
    echo "# The exact versions that CI runs with: pip install -e '.[test]' -c constraints.txt"
    echo "# Written by scripts/constraints.sh."
    # Without the local part: torch==2.13.0+cpu is the same release, built for the CPU.
    "$pip" freeze --all --exclude pip --exclude webgpu-lora | sed 's/+.*//'
} >"$folder/constraints.txt"
mv "$folder/constraints.txt" constraints.txt
