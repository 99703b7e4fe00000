#!/usr/bin/env bash
# Whether this machine's WebGPU device is the software driver of an old Mesa, which compiles the tests'
# kernels four times as slowly as a newer one, and a newer one can be had. $1: the environment's Python.
set -euo pipefail
for tool in apt-get dpkg-deb; do
    command -v $tool >/dev/null || exit 1
done
[ -f /usr/share/keyrings/debian-archive-keyring.gpg ] || exit 1
LORA_WEBGPU=wgpu "$1" -c '
import re, sys
from lora.shaders.choice import list_devices
info = list_devices("wgpu")[0].info
mesa = re.match(r"Mesa (\d+)\.", str(info.get("description", "")))
sys.exit(not (info["adapter_type"] == "CPU" and mesa and int(mesa[1]) < 25))'
