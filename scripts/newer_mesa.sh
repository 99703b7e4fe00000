#!/usr/bin/env bash
# Fetches a software Vulkan driver that Dawn takes and that has matrix units: Mesa of Debian's
# trixie-backports with all its libraries, into the folder $1/root, beside the system's own. It needs no
# Python, so that an environment can be made meanwhile; scripts/dawn_driver.sh does the rest.
set -euo pipefail
folder=$1
for tool in apt-get dpkg-deb; do
    command -v $tool >/dev/null || {
        echo "$tool is missing: this driver comes out of Debian's packages. Elsewhere set LORA_WEBGPU=dawn" \
            "and run pytest, with a driver that Dawn takes (see \`lora devices\`)." >&2
        exit 1
    }
done
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
[ -f $keyring ] || { echo "$keyring is missing: apt-get install debian-archive-keyring" >&2; exit 1; }

rm -rf "$folder"
mkdir -p "$folder"/apt/{lists/partial,cache/archives/partial} "$folder/root"
folder=$(cd "$folder" && pwd)
touch "$folder/apt/status" # nothing is installed there: all that is needed comes along
for suite in trixie trixie-backports; do
    echo "deb [signed-by=$keyring] http://deb.debian.org/debian $suite main"
done >"$folder/apt/sources.list"
cat >"$folder/apt/apt.conf" <<END
Dir::State "$folder/apt";
Dir::State::status "$folder/apt/status";
Dir::Cache "$folder/apt/cache";
Dir::Etc::sourcelist "$folder/apt/sources.list";
Dir::Etc::sourceparts "/dev/null";
Dir::Etc::preferencesparts "/dev/null";
APT::Install-Recommends "false";
APT::Sandbox::User "";
Debug::NoLocking "true";
END
export APT_CONFIG="$folder/apt/apt.conf"
echo "Unpacking Mesa of trixie-backports into $folder (63 MB to fetch)."
apt-get update -qq
apt-get install -y -qq --download-only -t trixie-backports mesa-vulkan-drivers libvulkan1 >/dev/null
for package in "$folder"/apt/cache/archives/*.deb; do
    dpkg-deb -x "$package" "$folder/root"
done
rm -rf "$folder/apt"
