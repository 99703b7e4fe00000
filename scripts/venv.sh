#!/usr/bin/env bash
# Makes the virtual environment $2 with the interpreter $1; Debian splits venv into a package.
set -euo pipefail
python=$1 venv=$2
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "Python 3.11 or newer is needed; $("$python" --version) is too old. Try: make PYTHON=python3.12" >&2
    exit 2
}
[ -x "$venv/bin/pip" ] && exit 0
"$python" -m venv "$venv" 2>/dev/null && [ -x "$venv/bin/pip" ] && exit 0
sudo=$([ "$(id -u)" = 0 ] || echo sudo)
command -v apt-get >/dev/null || { echo "Python's venv module is missing; install it." >&2; exit 1; }
$sudo apt-get update -qq
$sudo apt-get install -y -qq python3-venv
"$python" -m venv "$venv"
