#!/usr/bin/env bash
# Installs Debian's software Vulkan driver where WebGPU finds no device. $1: the Python to ask.
set -euo pipefail
python=$1
has_device() { "$python" -c 'import sys; from lora.shaders.choice import list_devices; sys.exit(not list_devices("wgpu"))' 2>/dev/null; }
has_device && exit 0
if ! command -v apt-get >/dev/null; then
    echo "WebGPU finds no device, and this is no Debian: install a Vulkan driver for your GPU." >&2
    exit 1
fi
sudo=
if [ "$(id -u)" != 0 ]; then
    command -v sudo >/dev/null || {
        echo "WebGPU finds no device; as root: apt-get install mesa-vulkan-drivers" >&2
        exit 1
    }
    sudo=sudo
fi
echo "WebGPU finds no device: installing Debian's mesa-vulkan-drivers (a software driver)."
$sudo apt-get update -qq
$sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq mesa-vulkan-drivers
has_device || { echo "WebGPU still finds no device; see \`lora devices\`." >&2; exit 1; }
