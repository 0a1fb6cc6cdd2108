#!/usr/bin/env bash
# Install the requirements of the GPU tests for a machine without a GPU into .software-gpu:
# Mesa's Vulkan driver that computes on the CPU (Debian's packages, unpacked without root),
# llama.cpp with Vulkan, and ONNX Runtime with WebGPU. Without them, these tests are skipped.
set -euo pipefail
cd "$(dirname "$0")/.."
pip="${PYTHON:-python3.11} -m pip install --quiet --no-deps --upgrade --target .software-gpu"
mkdir -p .software-gpu/packages
$pip/llama cyllama-vulkan==0.2.18
$pip/onnx onnxruntime-webgpu==1.27.0
cd .software-gpu/packages
apt-get download --quiet libvulkan1 mesa-vulkan-drivers
for package in *.deb; do dpkg-deb --extract "$package" ../driver; done
sed "s#/usr/lib#$(cd ../driver && pwd)/usr/lib#" \
  ../driver/usr/share/vulkan/icd.d/lvp_icd."$(uname -m)".json > ../lavapipe.json
